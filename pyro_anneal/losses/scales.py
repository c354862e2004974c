"""Scales of sites: what multiplies the bound of a datum, and what acts inside the weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from ..models.scales import own_scale, same_scale, site_subsampling, subsampling
from ..models.sites import sum_to_batch
from .traces import Run, Site

__all__ = ["Scales"]


class Scales:
    """Splits each site's scale into a part outside the bound of a datum and one inside."""

    def __init__(self, runs: Sequence[Run], batch: Mapping[str, CondIndepStackFrame]) -> None:
        self.notes: tuple[str, ...] = ()
        self.is_common = False  # whether all sites share one scale, taken outside
        self._own: dict[int, Tensor | float] = {}  # poutine.scale of a site, by id
        self._inside: dict[int, float] = {}  # subsampling of plates that are no batch
        self._ratio = 1.0
        self._common: Tensor | float = 1.0
        sites = [(name, site) for run in runs for name, site in run.sites]
        ratios = {name: self._common_ratio(name, sites) for name in batch}
        self._ratio = math.prod(ratios.values())
        for name, site in sites:
            frames = site["cond_indep_stack"]
            own = own_scale(site)
            inside = site_subsampling(site) / self._ratio
            self._own[id(site)] = own
            self._inside[id(site)] = 1.0 if math.isclose(inside, 1.0, rel_tol=1e-9) else inside
            if self._inside[id(site)] != 1.0 and not self.notes:
                plates = [f.name for f in frames if subsampling(f) != 1.0]
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
        ratios = {
            subsampling(f) for _, s in sites for f in s["cond_indep_stack"] if f.name == plate
        }
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


def _varies_over(scale: Tensor | float, dims: set[int]) -> bool:
    """Tells whether a scale is constant along all dimensions but ``dims``."""
    if not isinstance(scale, Tensor):
        return True
    return all(size == 1 or axis - scale.dim() in dims for axis, size in enumerate(scale.shape))
