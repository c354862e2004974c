"""What multiplies a site's log density: the plates' subsampling, and the user's own scale."""

from __future__ import annotations

import math

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from .types import Node

__all__ = ["own_scale", "same_scale", "site_subsampling", "subsampling"]


def subsampling(frame: CondIndepStackFrame) -> float:
    """Computes the factor N/B of a plate of N elements of which B are at hand."""
    if frame.full_size is None or frame.full_size == frame.size:
        return 1.0
    return float(frame.full_size) / float(frame.size)


def site_subsampling(site: Node) -> float:
    """Computes the product of the factors N/B of all plates around a site."""
    return math.prod(subsampling(frame) for frame in site["cond_indep_stack"])


def own_scale(site: Node) -> Tensor | float:
    """Returns what ``poutine.scale`` gave a site, without the subsampling of its plates."""
    scale: Tensor | float = site["scale"]
    every = site_subsampling(site)
    return scale if every == 1.0 else scale / every


def same_scale(a: Tensor | float, b: Tensor | float) -> bool:
    """Tells whether two scales are the same, up to rounding."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            device = a.device if isinstance(a, Tensor) else b.device  # type: ignore[union-attr]
            a, b = torch.as_tensor(a, device=device), torch.as_tensor(b, device=device)
        return a is b or (a.shape == b.shape and torch.allclose(a.double(), b.double(), 1e-6))
    return math.isclose(a, b, rel_tol=1e-6)
