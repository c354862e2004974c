"""Evaluating more positions than fit in memory at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import Density, State

__all__ = ["Blockwise"]


class Blockwise:
    """Evaluates a density at most ``size`` positions at a time.

    Args:
        density: The density.
        size: Positions per call, exactly: the last call is filled up, so that one graph serves all.
    """

    def __init__(self, density: Density, size: int) -> None:
        self.density = density
        self.size = size

    def __call__(self, position: Tensor) -> State:
        """Evaluates K positions."""
        count = len(position)
        if count <= self.size:
            return self.density(position)
        filler = position[:1].expand(-count % self.size, *position.shape[1:])
        pieces = torch.cat([position, filler]).split(self.size)
        states = [self.density(piece) for piece in pieces]
        return State(*(torch.cat(parts)[:count] for parts in zip(*states, strict=True)))
