"""Scales of sites: what multiplies the bound of a datum, and what acts inside the weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.sites import density_sites, sum_to_batch
from .traces import Run, Site

__all__ = ["Scales", "same_scale"]


class Scales:
    """Splits each site's scale into a part outside the bound of a datum and one inside."""

    def __init__(self, runs: Sequence[Run], batch: Mapping[str, Any]) -> None:
        self.notes: tuple[str, ...] = ()
        self.is_common = False  # whether all sites share one scale, taken outside
        self._own: dict[int, Tensor | float] = {}  # poutine.scale of a site, by id
        self._inside: dict[int, float] = {}  # subsampling of plates that are no batch
        self._ratio = 1.0
        self._common: Tensor | float = 1.0
        sites = [
            (name, site)
            for run in runs
            for trace in (run.model, run.guide)
            for name, site in density_sites(trace)
        ]
        ratios = {name: self._common_ratio(name, sites) for name in batch}
        self._ratio = math.prod(ratios.values())
        for name, site in sites:
            frames = site["cond_indep_stack"]
            every = math.prod(_ratio(frame) for frame in frames)
            own = site["scale"] if every == 1.0 else site["scale"] / every
            inside = every / self._ratio
            self._own[id(site)] = own
            self._inside[id(site)] = 1.0 if math.isclose(inside, 1.0, rel_tol=1e-9) else inside
            if self._inside[id(site)] != 1.0 and not self.notes:
                plates = [f.name for f in frames if _ratio(f) != 1.0]
                self.notes = (
                    (
                        f"plate(s) {plates} around site {name!r} are subsampled but do not enclose "
                        "every site of model and guide: with more than one particle the estimate is "
                        "no bound on the evidence of the full data"
                    ),
                )
        owns = list(self._own.values())
        dims = {frame.dim for frame in batch.values()}
        if (
            owns
            and _varies_over(owns[0], dims)
            and all(same_scale(owns[0], own) for own in owns[1:])
        ):
            self._common = owns[0]
            self._own = dict.fromkeys(self._own, 1.0)
            self.is_common = True
        # What a graph recorded under these scales depends on.
        self.key = tuple(
            dict.fromkeys(
                (name, "common" if self.is_common else _number(self._own[id(site)]))
                for name, site in sites
            )
        )

    @staticmethod
    def _common_ratio(plate: str, sites: list[tuple[str, Site]]) -> float:
        ratios = {_ratio(f) for _, s in sites for f in s["cond_indep_stack"] if f.name == plate}
        return ratios.pop() if len(ratios) == 1 else 1.0

    def inside(self, site: Site) -> Tensor | float:
        """Returns what multiplies the log density of a site."""
        own, inside = self._own[id(site)], self._inside[id(site)]
        if isinstance(own, float | int) and math.isclose(own, 1.0, rel_tol=1e-9):
            return inside
        return own * inside

    def outside(self, dims: Sequence[int], shape: torch.Size) -> Tensor | float:
        """Returns what multiplies the bound of each datum."""
        if not isinstance(self._common, Tensor) or self._common.dim() == 0:
            return self._common * self._ratio
        return sum_to_batch(self._common, list(dims), shape) * self._ratio


def _number(scale: Tensor | float) -> float | str:
    """Returns a scale that acts as a number in a recorded graph; tensors are its inputs."""
    if isinstance(scale, Tensor):
        return "a tensor" if scale.numel() > 1 else float(scale)
    return float(scale)


def _ratio(frame: Any) -> float:
    """Computes the subsampling factor N/B of a plate."""
    if frame.full_size is None or frame.full_size == frame.size:
        return 1.0
    return float(frame.full_size) / float(frame.size)


def same_scale(a: Tensor | float, b: Tensor | float) -> bool:
    """Tells whether two scales are the same, up to rounding."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            device = a.device if isinstance(a, Tensor) else b.device  # type: ignore[union-attr]
            a, b = torch.as_tensor(a, device=device), torch.as_tensor(b, device=device)
        return a is b or (a.shape == b.shape and torch.allclose(a.double(), b.double(), 1e-6))
    return math.isclose(a, b, rel_tol=1e-6)


def _varies_over(scale: Tensor | float, dims: set[int]) -> bool:
    """Tells whether a scale is constant along all dimensions but ``dims``."""
    if not isinstance(scale, Tensor):
        return True
    return all(size == 1 or axis - scale.dim() in dims for axis, size in enumerate(scale.shape))
