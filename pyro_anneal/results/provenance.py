"""How a result was computed, kept apart from what was computed."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field

import pyro
import torch

from .._version import __version__
from .files import stored

__all__ = ["Provenance", "installed_versions"]


@stored
@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How a result was computed: what would be needed to compute it again, and what it cost.

    Attributes:
        task: The method that was called, such as ``"run"``.
        seed: Seed of the call.
        kernel: The transition kernel.
        device: Where the chains ran.
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
    seconds: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: installed_versions())

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


def installed_versions() -> dict[str, str]:
    """Collects the versions of the software that computes."""
    return {
        "pyro_anneal": __version__,
        "pyro": str(pyro.__version__),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
