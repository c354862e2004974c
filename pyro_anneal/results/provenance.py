"""How a result was computed, kept apart from what was computed."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import pyro
import torch

from .._version import __version__
from .files import stored
from .tables import format_fields

__all__ = ["Provenance", "differing_versions", "installed_versions", "joint_record"]

_Number = TypeVar("_Number", int, float)


@stored
@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How a result was computed: what would be needed to compute it again, and what it cost.

    Attributes:
        task: The method that was called, such as ``"run"``.
        seed: Seed of the call.
        kernel: The transition kernel.
        device: Where the chains ran.
        settings: What was asked for, as short texts by option: ``num_chains``, ``num_steps`` or
            ``target_gap``, ``guide``, ``resampling`` and so on. Models and guides are there by
            their names.
        seconds: Wall time by part: ``fit`` (inspection of the model, recording and the automatic
            guide), ``pilot``, ``chains``, and ``total`` of the whole call. What the total holds
            beyond the parts went to compilation, checks and files.
        gradients: Gradients of the log density by part. ``pilot`` and ``chains`` are per chain,
            ``fit`` counts single chains.
        versions: Of python, torch, pyro and pyro_anneal.
    """

    task: str
    seed: int | None
    kernel: str
    device: str = "cpu"
    settings: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: installed_versions())

    def summary(self) -> str:
        """Formats the record as a table, which is also what ``print`` shows.

        Example:
            >>> print(
            ...     Provenance(
            ...         task="run",
            ...         seed=0,
            ...         kernel="HMC()",
            ...         settings={"guide": "auto"},
            ...         seconds={"total": 2.5},
            ...         gradients={"chains": 1999},
            ...         versions={"torch": "2.13.0"},
            ...     )
            ... )
            How the result of run was computed
              seed       0
              kernel     HMC()
              device     cpu
              guide      auto
              wall time  2.50 s in all
              gradients  chains 1999
              versions   torch 2.13.0
        """
        known = {"seed": str(self.seed), "kernel": self.kernel, "device": self.device}
        fields = [*known.items(), *self.settings.items()]
        fields.append(("wall time", self.describe_seconds()))
        for name, parts in (("gradients", self.gradients), ("versions", self.versions)):
            fields.append((name, ", ".join(f"{key} {value}" for key, value in parts.items())))
        return format_fields(f"How the result of {self.task} was computed", fields)

    def __str__(self) -> str:
        return self.summary()

    def describe_seconds(self) -> str:
        """Formats the wall time.

        Example:
            >>> Provenance(
            ...     task="run", seed=0, kernel="HMC()", seconds={"fit": 1.0, "total": 2.5}
            ... ).describe_seconds()
            '2.50 s in all (fit 1.00)'
        """
        return describe_seconds(self.seconds)


def describe_seconds(seconds: Mapping[str, float]) -> str:
    """Formats seconds by part, the total first."""
    parts = [f"{name} {value:.2f}" for name, value in seconds.items() if name != "total" and value]
    total = f"{seconds['total']:.2f} s in all" if "total" in seconds else "seconds"
    return f"{total} ({', '.join(parts)})" if parts else total


def joint_record(task: str, records: Sequence[Provenance]) -> Provenance:
    """Records what several calls have in common, and what they cost together.

    Args:
        task: What was made of their results.
        records: How each of them was computed, at least one.

    Returns:
        Sums of seconds and gradients, and the seed, kernel, device and settings of all, where these
        are the same for all.

    Example:
        >>> record = Provenance(task="run", seed=0, kernel="HMC()", seconds={"total": 1.5})
        >>> joint_record("compare", [record, record]).seconds
        {'total': 3.0}
    """
    first = records[0]
    seeds = {record.seed for record in records}
    kernels = list(dict.fromkeys(record.kernel for record in records))
    devices = list(dict.fromkeys(record.device for record in records))
    settings = {
        name: text
        for name, text in first.settings.items()
        if all(record.settings.get(name) == text for record in records)
    }
    return Provenance(
        task=task,
        seed=first.seed if len(seeds) == 1 else None,
        kernel=", ".join(kernels),
        device=", ".join(devices),
        settings=settings,
        seconds=_sums([record.seconds for record in records]),
        gradients=_sums([record.gradients for record in records]),
    )


def _sums(parts: Sequence[Mapping[str, _Number]]) -> dict[str, _Number]:
    total: dict[str, _Number] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total


def differing_versions(records: Mapping[str, Provenance]) -> str:
    """Says which results were computed by other software than the first; empty if none.

    Example:
        >>> old = Provenance(task="run", seed=0, kernel="HMC()", versions={"torch": "2.4.1"})
        >>> new = Provenance(task="run", seed=0, kernel="HMC()", versions={"torch": "2.13.0"})
        >>> differing_versions({"a": old, "b": new})
        'computed by different versions: a by torch 2.4.1, b by torch 2.13.0'
        >>> differing_versions({"a": old, "b": old})
        ''
    """
    names = dict.fromkeys(name for record in records.values() for name in record.versions)
    parts = []
    for name in names:
        versions = {which: record.versions.get(name) for which, record in records.items()}
        if len(set(versions.values())) > 1:
            parts += [f"{which} by {name} {version}" for which, version in versions.items()]
    return f"computed by different versions: {', '.join(parts)}" if parts else ""


def installed_versions() -> dict[str, str]:
    """Collects the versions of the software that computes."""
    return {
        "pyro_anneal": __version__,
        "pyro": str(pyro.__version__),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
