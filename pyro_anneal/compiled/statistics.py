"""The statistics of annealing steps over chains, in a table with one column per step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import State

__all__ = ["STATISTICS", "in_passes", "new_table", "with_column"]

STATISTICS = ("mean log ratio", "its variance over chains", "acceptance", "number of divergences")


def new_table(size: int, state: State) -> Tensor:
    """Makes a table of zeros for ``size`` steps after ``state``, float64, ``[4, size]``."""
    return torch.zeros(len(STATISTICS), size, dtype=torch.float64, device=state.position.device)


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
