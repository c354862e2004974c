"""The statistics of annealing steps over chains, in a table with one column per step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import State

__all__ = ["STATISTICS", "in_one_pass", "in_passes", "last_mean", "new_table", "with_column"]

STATISTICS = ("mean log ratio", "its variance over chains", "acceptance", "number of divergences")


def new_table(size: int, state: State) -> Tensor:
    """Makes a table for the steps after ``state``.

    Args:
        size: Number of steps.
        state: Its mean log ratio stands where :func:`last_mean` looks before the first step.

    Returns:
        Float64, ``[4, size]``.
    """
    table = torch.zeros(len(STATISTICS), size, dtype=torch.float64, device=state.position.device)
    mean = (state.log_target.double() - state.log_base.double()).mean()
    table[0] = torch.where(mean.isfinite(), mean, 0.0)
    return table


def last_mean(table: Tensor, index: Tensor) -> Tensor:
    """Reads the mean log ratio of the step before ``index``, zero where that is not finite."""
    size = table.shape[1]
    mean = table[0].index_select(0, ((index + size - 1) % size).reshape(1)).squeeze(0)
    return torch.where(mean.abs() < torch.inf, mean, 0.0)


def with_column(table: Tensor, index: Tensor, values: Sequence[Tensor]) -> Tensor:
    """Returns the table with the statistics of one step in column ``index``."""
    row = torch.arange(len(STATISTICS), device=table.device).unsqueeze(1)
    column = values[0]
    for number, value in enumerate(values[1:], 1):
        column = torch.where(row == number, value, column)
    here = torch.arange(table.shape[1], device=table.device) == index
    return torch.where(here, column, table)


def in_passes(
    ratio: Tensor, accepted: Tensor, diverged: Tensor, *, chain_dim: int
) -> list[Tensor]:
    """Takes the statistics of one step.

    Args:
        ratio: ``log p - log q``, float64.
        accepted: Acceptance probabilities.
        diverged: Whether a chain diverged.
        chain_dim: The dimension of chains in each.

    Returns:
        What :data:`STATISTICS` names, numbers of float64.
    """
    variance = ratio.var(dim=chain_dim, correction=0).mean()
    return [ratio.mean(), variance, accepted.mean().double(), diverged.sum().double()]


def in_one_pass(
    ratio: Tensor, accepted: Tensor, diverged: Tensor, *, count: int, near: Tensor
) -> list[Tensor]:
    """Takes the statistics of one step as sums, which one loop over chains can collect.

    Args:
        ratio: ``log p - log q``, float64, chains last.
        accepted: Acceptance probabilities, likewise.
        diverged: Whether a chain diverged, likewise.
        count: Number of chains; what comes after them in the last dimension does not count.
        near: A number near the mean ratio, which keeps the sum of squares from cancelling.

    Returns:
        What :data:`STATISTICS` names, numbers of float64.
    """
    counted = torch.arange(ratio.shape[-1], device=ratio.device) < count

    def total(values: Tensor) -> Tensor:
        return torch.where(counted, values.double(), 0.0).sum(-1)

    shifted = ratio - near
    mean = total(shifted) / count
    variance = (total(shifted.square()) / count - mean.square()).clamp(min=0.0)
    number = accepted.numel() // accepted.shape[-1] * count
    return [
        mean.mean() + near,
        variance.mean(),
        total(accepted).sum() / number,
        total(diverged).sum(),
    ]
