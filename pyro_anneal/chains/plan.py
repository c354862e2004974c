"""What a run is asked to be, before a pilot has seen its problem."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..arguments import as_count, as_flag, as_real, check_kernel, check_step_size
from ..kernels import HMC, Kernel
from ..schedules import Schedule, as_betas
from .pilot import Pilot

__all__ = ["PathOptions", "Plan"]

# What an annealing run takes where nobody says otherwise.
_NUM_STEPS, _MAX_ROUNDS = 1000, 13


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Everything that a tuner needs to know beside the densities; :class:`PathOptions` makes it.

    Args:
        num_chains: Number K of chains of the run.
        num_steps: Number T of weight increments.
        kernels: The kernel of the run; or several, among which pilots decide.
        betas: Betas from 0 to 1, ``[T + 1]``; None for those of the pilot.
        step_size: Fixed step size at all betas; None for those of the pilot.
        pilot: Settings of the pilot.
        target_gap: Error in nats per datum that rounds go on to reach; None for ``num_steps``.
        max_rounds: Largest number of rounds.
        is_sparing: Whether no round may take more operations than half a minute has.
        resampling: Whether chains resample among each other; ``"auto"`` leaves it to the pilot.
        fewest_steps: T of the first of several rounds, on a short path.
    """

    num_chains: int
    num_steps: int
    kernels: tuple[Kernel, ...]
    betas: Tensor | None
    step_size: float | Tensor | None
    pilot: Pilot
    target_gap: float | None
    max_rounds: int = 8
    is_sparing: bool = False
    resampling: bool | str = False
    fewest_steps: int = 16

    @property
    def kernel(self) -> Kernel:
        """The kernel, or the first that is tried."""
        return self.kernels[0]

    def with_steps(self, num_steps: int) -> Plan:
        """Returns the plan once the number of steps is decided."""
        return replace(self, num_steps=num_steps, target_gap=None)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PathOptions:
    """Options of everything that anneals. They check themselves.

    Args:
        num_chains: Number K of chains.
        num_steps: Number T of weight increments; 1000 if None.
        target_gap: Error in nats per datum that rounds of doubled T go on to reach, instead of
            ``num_steps``.
        max_rounds: Largest number of rounds. ``"auto"`` is 13, or as many as have no more operations,
            counted from the recorded graph, than about half a minute; 8 without a graph.
        schedule: ``"adaptive"`` from the pilot, a schedule, or betas from 0 to 1 of shape
            ``[T + 1]``, which then decide T.
        kernel: Transition kernel; HMC if None.
        step_size: Fixed step size at all betas in place of the pilot's, with unit scales.
        pilot: Settings of the pilot; its defaults if None.
        resampling: Whether chains resample among each other at points of the path: True, False, or
            ``"auto"`` where the pilot expects log-weights to vary by more than one squared nat.

    Raises:
        ValueError: If a number is out of range, or the schedule is unknown.
    """

    num_chains: int = 16
    num_steps: int | None = None
    target_gap: float | None = None
    max_rounds: int | str = 8
    schedule: str | Schedule | Tensor = "adaptive"
    kernel: Kernel | None = None
    step_size: float | Tensor | None = None
    pilot: Pilot | None = None
    resampling: bool | str = "auto"

    def __post_init__(self) -> None:
        as_count("num_chains (K)", self.num_chains)
        if self.target_gap is not None:
            if not as_real("target_gap", self.target_gap) > 0.0:
                raise ValueError(
                    f"target_gap must be positive, in nats per datum: {self.target_gap}"
                )
            if self.num_steps is not None or not isinstance(self.schedule, str):
                raise ValueError("pass either target_gap or num_steps (or a schedule), not both")
        if self.max_rounds != "auto":
            as_count("max_rounds", self.max_rounds)
        if self.num_steps is not None:
            as_count("num_steps (T)", self.num_steps)
        if self.kernel is not None:
            check_kernel(self.kernel)
        if self.step_size is not None:
            check_step_size(self.step_size)
        if not isinstance(self.pilot, Pilot | None):
            raise ValueError(f"pilot must be a Pilot(...) or None, got {self.pilot!r}")
        if isinstance(self.schedule, str) and self.schedule != "adaptive":
            raise ValueError(
                f'schedule must be "adaptive", a schedule or betas, got {self.schedule!r}'
            )
        as_flag("resampling", self.resampling)
        _ = self.plan  # checks the schedule

    @cached_property
    def plan(self) -> Plan:
        """What was asked, with what was left open decided."""
        num_steps = _NUM_STEPS if self.num_steps is None else as_count("T", self.num_steps)
        betas = None
        if not isinstance(self.schedule, str):
            given = isinstance(self.schedule, Tensor | list | tuple)
            betas = as_betas(self.schedule, None if given else num_steps)
            num_steps = len(betas) - 1
        elif num_steps == 1 and self.target_gap is None:
            betas = torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu")
        return Plan(
            num_chains=as_count("num_chains (K)", self.num_chains),
            num_steps=num_steps,
            kernels=(HMC() if self.kernel is None else self.kernel,),
            betas=betas,
            step_size=self.step_size,
            pilot=Pilot() if self.pilot is None else self.pilot,
            target_gap=self.target_gap,
            max_rounds=_MAX_ROUNDS if isinstance(self.max_rounds, str) else self.max_rounds,
            is_sparing=self.max_rounds == "auto",
            resampling=self.resampling,
        )
