"""Betas of a thermodynamic sum, chosen from the log-weights of each evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..arguments import as_count
from .base import finite_or_zero

__all__ = ["Moments", "Tightest"]


def _curve(betas: Tensor, log_weights: Tensor) -> Tensor:
    """Computes E_beta[log w], averaged over the batch: ``[S, N]`` at betas ``[J]`` to ``[J]``."""
    weights = torch.softmax(betas[:, None, None] * log_weights, dim=1)
    return (weights * log_weights).sum(1).mean(1)


def _flattened(log_weights: Tensor) -> Tensor:
    """Returns finite log-weights in single precision at least, shape ``[S, N]``."""
    values = log_weights.detach()
    values = finite_or_zero(values.to(torch.promote_types(values.dtype, torch.float32)))
    return values.reshape(values.shape[0], -1)


@dataclass(frozen=True)
class Moments:
    r"""Spaces betas so that :math:`E_\beta[\log w]`, averaged over the batch, grows equally.

    The betas are found by bisection on the particles of each evaluation. Any betas give a lower
    bound with ``integration="left"``, so these do.

    Source: Brekelmans et al. (2020), *All in the Exponential Family*, section 6.

    Args:
        partitions: Number K of intervals.

    Raises:
        ValueError: If ``partitions`` is below 1.

    Example:
        >>> Moments(partitions=2)(torch.tensor([[0.0], [1.0]])).tolist()[::2]
        [0.0, 1.0]
    """

    partitions: int

    def __post_init__(self) -> None:
        as_count("Moments.partitions", self.partitions)

    def __call__(self, log_weights: Tensor, num_iterations: int = 40) -> Tensor:
        """Returns betas of shape ``[K + 1]`` for log-weights ``[S, *batch]``, float64."""
        values = _flattened(log_weights)
        fractions = torch.arange(1, self.partitions, device=values.device) / self.partitions
        ends = _curve(values.new_tensor([0.0, 1.0]), values)
        targets = ends[0] + fractions * (ends[1] - ends[0])
        low, high = torch.zeros_like(targets), torch.ones_like(targets)
        for _ in range(num_iterations):
            middle = 0.5 * (low + high)
            below = _curve(middle, values) < targets
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        # A flat curve (an exact guide) says nothing: space linearly there.
        flat = ~(ends[1] - ends[0] > 1e-12 * (1.0 + ends[0].abs()))
        inner = torch.where(flat, fractions.to(values.dtype), 0.5 * (low + high))
        return torch.cat([values.new_zeros(1), inner, values.new_ones(1)])


@dataclass(frozen=True)
class Tightest:
    r"""Places betas where the Riemann sum is tightest at the particles of each evaluation.

    The left sum :math:`\sum_j (\beta_{j+1} - \beta_j) E_{\beta_j}[\log w]`, averaged over the
    batch, is a lower bound at any betas: these make it largest. The right sum, of
    ``bound="upper"``, is made smallest. The betas are the best of a grid, logarithmic below and
    linear above, found by dynamic programming; they come from the curve that the sum needs anyway,
    so that no ``beta_1`` has to be searched for.

    Args:
        partitions: Number K of intervals.
        grid_size: Number of inner betas to choose from, at least ``partitions - 1``.

    Raises:
        ValueError: If ``partitions`` is below 1, or the grid too small for them.

    Example:
        >>> betas = Tightest(partitions=2)(torch.tensor([[0.0], [1.0]]))
        >>> betas.tolist()[::2]
        [0.0, 1.0]
        >>> bool((betas[1] - 0.5).abs() < 0.1)  # the curve is nearly straight
        True
    """

    partitions: int
    grid_size: int = 32

    def __post_init__(self) -> None:
        as_count("Tightest.partitions", self.partitions)
        as_count("Tightest.grid_size", self.grid_size, least=max(1, self.partitions - 1))

    def __call__(self, log_weights: Tensor, side: Literal["left", "right"] = "left") -> Tensor:
        """Returns betas of shape ``[K + 1]`` for log-weights ``[S, *batch]``, float64."""
        values = _flattened(log_weights)
        ends = values.new_tensor([0.0, 1.0])
        if self.partitions == 1:
            return ends
        betas = torch.cat([ends[:1], self._grid().to(values), ends[1:]])
        curve = _curve(betas, values)
        height = curve[:, None] if side == "left" else -curve[None, :]
        steps = betas[None, :] - betas[:, None]
        area = torch.where(steps > 0.0, steps * height, -torch.inf).cpu()  # of one rectangle
        best, origins = area[0], []  # the best sum from 0 to each beta, and its last beta
        for _ in range(self.partitions - 1):
            best, origin = (best[:, None] + area).max(dim=0)
            origins.append(origin)
        index, chosen = len(betas) - 1, []
        for origin in reversed(origins):
            index = int(origin[index])
            chosen.append(index)
        return torch.cat([ends[:1], betas[chosen[::-1]], ends[1:]])

    def _grid(self) -> Tensor:
        """Returns inner betas, half of them below 0.1 in equal ratios, half above in equal steps."""
        count = self.grid_size
        low = torch.logspace(-4.0, -1.0, count // 2, dtype=torch.float64, device="cpu")
        steps = count - count // 2
        equal = torch.arange(1, steps + 1, dtype=torch.float64, device="cpu") / (steps + 1)
        return torch.cat([low, 0.1 + 0.9 * equal])
