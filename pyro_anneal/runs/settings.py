"""What an object was told, and what a call has frozen before its chains start."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any

from ..arguments import as_count, as_flag, as_real, as_seed, check_function
from ..chains.grouping import Grouping
from ..chains.path import Path
from ..chains.plan import PathOptions
from ..chains.tuning import Found
from ..models.simulation import MakeArgs
from ..persistence.fingerprints import (
    Fingerprint,
    describe,
    describe_name,
    described,
    versions,
)
from ..problems.problem import Guide, Problem
from ..results.run import PilotSummary

__all__ = ["Frozen", "Settings"]


# An option that a checkpoint need not share, since it changes no number.
_UNTOLD = {"told": False}


@dataclass(frozen=True, eq=False, repr=False)
class Settings(PathOptions):
    """All options of :class:`~pyro_anneal.AnnealedImportance`, which describes them.

    An option is one field here (or in :class:`~pyro_anneal.chains.plan.PathOptions`), with its check
    in ``__post_init__``: the constructor and the identity of checkpoints follow from the fields.
    """

    model: Callable[..., Any]
    guide: Guide = None
    _: KW_ONLY
    batch_plates: str | Sequence[str] = "auto"
    prior_weight: float = 0.0
    cross_check: bool | str = field(
        default="auto", metadata=_UNTOLD
    )  # part of the identity of run, its only reader
    compile: bool | str = "auto"
    progress_bar: bool = field(default=True, metadata=_UNTOLD)
    seed: int | None = field(
        default=None, metadata=_UNTOLD
    )  # checkpoints compare seeds by themselves
    make_args: MakeArgs | None = None
    chain_batch_size: int | None = None
    checkpoint: str | os.PathLike[str] | None = field(default=None, metadata=_UNTOLD)
    checkpoint_every: int | None = field(default=None, metadata=_UNTOLD)

    def __post_init__(self) -> None:
        check_function("model", self.model)
        if self.guide is not None and self.guide != "auto":
            check_function("guide", self.guide, what='a Pyro guide, "auto" or None')
        if self.make_args is not None:
            check_function("make_args", self.make_args, what="a function of the simulated values")
        super().__post_init__()
        if not 0.0 <= as_real("prior_weight", self.prior_weight) < 1.0:
            raise ValueError(f"prior_weight must lie in [0, 1), got {self.prior_weight}")
        as_flag("cross_check", self.cross_check)
        as_flag("compile", self.compile, "density")
        if self.checkpoint_every is not None and self.checkpoint is None:
            raise ValueError("checkpoint_every needs a file: pass checkpoint= as well")
        object.__setattr__(self, "seed", as_seed(self.seed))  # of whatever library's integers
        for name in ("chain_batch_size", "checkpoint_every"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else as_count(name, value))

    def describe(self, *, strict: bool = True) -> Fingerprint:
        """Describes what a checkpoint must share with a run that continues it.

        Args:
            strict: Whether to refuse an option without a description by content.
        """
        plan = self.plan
        kernel = self.kernel if len(plan.kernels) > 1 else plan.kernel
        decided = {  # by what was decided, not by what was told
            "model": describe_name(self.model),
            "guide": describe_name(self.guide),
            "num_chains (K)": str(plan.num_chains),
            "num_steps (T)": str(plan.num_steps),
            "schedule": "adaptive" if plan.betas is None else describe(plan.betas),
            "kernel": described("the kernel", kernel, strict=strict),
            "pilot": describe(plan.pilot),
            "batch_plates": str(self.batch_plates),
            "make_args": describe_name(self.make_args),
        }
        done = {name.split()[0] for name in decided}
        told = [option.name for option in fields(self) if option.metadata.get("told", True)]
        rest = {
            name: described(name, getattr(self, name), strict=strict)
            for name in told
            if name not in done
        }
        return versions() | rest | decided

    def record(self) -> dict[str, str]:
        """Describes by short texts what a result was asked to be, for its provenance."""
        plan = self.plan
        if self.target_gap is None:
            steps = {"num_steps": str(plan.num_steps)}
        else:
            steps = {"target_gap": str(self.target_gap), "max_rounds": str(self.max_rounds)}
        decided = {
            "model": _short_name(self.model),
            "guide": _short_name(self.guide),
            "num_chains": str(plan.num_chains),
            **steps,
            "schedule": "adaptive" if plan.betas is None else describe(plan.betas),
            "pilot": describe(plan.pilot),
            "make_args": _short_name(self.make_args),
            "cross_check": str(self.cross_check),
        }
        elsewhere = {"num_steps", "target_gap", "max_rounds", "kernel"}
        rest = {
            option.name: getattr(self, option.name)
            for option in fields(self)
            if option.metadata.get("told", True) and option.name not in decided.keys() | elsewhere
        }
        return decided | {
            name: value if isinstance(value, str) else described(name, value, strict=False)
            for name, value in rest.items()
        }


def _short_name(function: object) -> str:
    """Names a model or a guide; ``"auto"`` and None name themselves."""
    if function is None or isinstance(function, str):
        return str(function)
    return str(getattr(function, "__qualname__", type(function).__qualname__))


@dataclass(frozen=True, kw_only=True, eq=False)
class Frozen:
    """A problem and all that was decided about its chains before they start."""

    problem: Problem
    path: Path
    pilot: PilotSummary | None
    found: Found | None  # what the pilot found, for rounds to improve on
    compile: bool | str
    grouping: Grouping
    num_chains: int
    chain_batch_size: int | None
    seed: int
    setup_seconds: float
