"""The path of a run, frozen before its chains start, and what the chains carry along it."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..kernels import Kernel, State, Tuning
from ..kernels.base import SeveralStepSizes

__all__ = [
    "Carry",
    "Direction",
    "Path",
    "StepStatistics",
    "StepTable",
    "TuningTable",
]

Direction = Literal["forward", "reverse"]


@dataclass(frozen=True, eq=False)
class TuningTable:
    """Step sizes and scales at the pilot's betas, interpolated between them, and frozen."""

    betas: tuple[float, ...]  # S knots, increasing
    log_step_size: Tensor  # [S, *batch]; of a kernel of M parts, [S, *batch, M]
    log_scale: Tensor  # [S, *batch, D]

    def at(self, beta: float) -> Tuning:
        """Interpolates the tuning at ``beta``; constant beyond the outer knots."""
        knots = self.betas
        if beta <= knots[0] or len(knots) == 1:
            return Tuning(self.log_step_size[0].exp(), self.log_scale[0].exp())
        if beta >= knots[-1]:
            return Tuning(self.log_step_size[-1].exp(), self.log_scale[-1].exp())
        upper = bisect.bisect_right(knots, beta)
        fraction = (beta - knots[upper - 1]) / (knots[upper] - knots[upper - 1])
        log_step = torch.lerp(self.log_step_size[upper - 1], self.log_step_size[upper], fraction)
        log_scale = torch.lerp(self.log_scale[upper - 1], self.log_scale[upper], fraction)
        return Tuning(log_step.exp(), log_scale.exp())

    def at_all(self, betas: Tensor) -> Tuning:
        """Interpolates the tuning at several betas ``[n]``, all at once.

        Returns:
            Step sizes ``[n, *batch]`` and scales ``[n, *batch, D]``.
        """
        last = len(self.betas) - 1
        knots = torch.tensor(self.betas, dtype=torch.float64, device="cpu")
        betas = betas.double().cpu()
        upper = torch.searchsorted(knots, betas, right=True).clamp(min(1, last), last)
        lower = (upper - 1).clamp(min=0)
        width = (knots[upper] - knots[lower]).clamp(min=torch.finfo(torch.float64).tiny)
        fraction = ((betas - knots[lower]) / width).clamp(0.0, 1.0)

        def interpolate(table: Tensor) -> Tensor:
            weight = fraction.to(table).reshape(-1, *(1 for _ in table.shape[1:]))
            below, above = table[lower.to(table.device)], table[upper.to(table.device)]
            return torch.lerp(below, above, weight).exp()

        return Tuning(interpolate(self.log_step_size), interpolate(self.log_scale))

    @staticmethod
    def constant(
        step_size: float | Tensor, example: Tensor, kernel: Kernel | None = None
    ) -> TuningTable:
        """Builds the table of one step size for all betas and unit scales.

        Args:
            step_size: Number, or tensor of shape ``[*batch]``.
            example: Position of one chain, ``[*batch, D]``.
            kernel: A kernel of several parts gives each of them this step size.
        """
        step = torch.as_tensor(step_size, dtype=example.dtype, device=example.device)
        batch = example.shape[:-1]
        if step.shape not in (torch.Size(), batch):
            raise ValueError(
                f"step_size has shape {list(step.shape)}, expected a number or the batch's shape "
                f"{list(batch)}"
            )
        log_step = step.log().expand(batch)
        if isinstance(kernel, SeveralStepSizes):
            log_step = log_step.unsqueeze(-1).expand(*batch, kernel.num_step_sizes)
        return TuningTable((0.0,), log_step.unsqueeze(0), torch.zeros_like(example).unsqueeze(0))


@dataclass(frozen=True, eq=False)
class Path:
    """Everything frozen before the chains start."""

    betas: Tensor  # [T + 1], float64, on the host
    kernel: Kernel
    tuning: TuningTable

    @property
    def num_steps(self) -> int:
        """Number T of weight increments."""
        return len(self.betas) - 1


class Carry(NamedTuple):
    """What the loop carries from step to step."""

    state: State
    log_weights: Tensor  # [K, *batch], float64
    integral: Tensor  # thermodynamic integration by trapezoids, [K, *batch], float64


class StepStatistics(NamedTuple):
    """Averages over chains and batch, one entry per step: memory does not grow with K or batch."""

    mean_log_ratio: Tensor  # [T]
    var_log_ratio: Tensor  # over chains, averaged over the batch, [T]
    accept_prob: Tensor  # [T - 1]
    num_diverging: Tensor  # [T - 1], over chains and batch


class StepTable(NamedTuple):
    """What changes from step to step apart from the noise, one row per step."""

    beta: Tensor  # [n], of the position's dtype
    step_size: Tensor  # [n, *batch]; of a kernel of M parts, [n, *batch, M]
    scale: Tensor  # [n, *batch, D]
    width: Tensor  # beta_t - beta_{t-1} of the increment after the move, float64, [n]
    quadrature: Tensor  # weight of the state after the move in the integral over beta, [n]
