"""Equally weighted draws among the ends of a run's chains."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..weights import resample_indices

if TYPE_CHECKING:
    from .run import AnnealedRun

__all__ = ["resample_ends"]


def resample_ends(run: AnnealedRun, num_samples: int, seed: int | None) -> dict[str, Tensor]:
    """Draws ends of a forward run by their weights, per datum; see ``AnnealedRun.resample``."""
    generator = None
    if seed is not None:
        generator = torch.Generator(device=run.log_weights.device).manual_seed(seed)
    indices = resample_indices(run.log_weights, num_samples, generator=generator)
    draws = {}
    for name, value in run.posterior.items():
        missing = [p for p in run.plates if p not in run.site_plates[name]]
        if not missing:
            draws[name] = _take(value, indices, tuple(run.plates), run.site_plates[name])
        elif bool((value == value[:1]).all()):
            draws[name] = value[:1].expand(num_samples, *value.shape[1:]).clone()
    return draws


def _take(
    value: Tensor, indices: Tensor, plates: tuple[str, ...], names: tuple[str | None, ...]
) -> Tensor:
    """Takes particle ``indices[n, *batch]`` of a value whose dims carry the plates in any place."""
    shape = list(value.shape[1:])
    view = [1] * len(shape)
    order = []
    for position, name in enumerate(names):
        if name in plates:  # a size of one stands for all rows of the plate
            axis = 1 + plates.index(name)
            view[position] = shape[position] = indices.shape[axis]
            order.append(axis)
    placed = indices.permute(0, *order).reshape(-1, *view)
    expanded = value.expand(value.shape[0], *shape)
    return expanded.gather(0, placed.expand(-1, *shape))
