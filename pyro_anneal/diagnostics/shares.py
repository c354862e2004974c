"""How many of a tensor's entries show a sign."""

from __future__ import annotations

from torch import Tensor

__all__ = ["share_of"]


def share_of(condition: Tensor) -> float:
    """Computes the share of entries that are true, in [0, 1]."""
    return condition.double().mean().item()
