r"""From runs of a model and a guide to log-weights per datum.

A loss sees K particles as two tensors of shape ``[K, *batch]``, the log joint density
:math:`\log p(x, z_k)` and the log density of the guide :math:`\log q(z_k \mid x)`. What Pyro knows
beyond that is settled here:

* **Plates** that enclose every sample site of model and guide are the batch. All other dimensions
  are summed, so that a log-mean-exp over particles is taken inside the batch plates, and once over
  the whole model where there are none (global latents, joint AutoGuides).
* **Scales.** The subsampling factor N/B of a batch plate, and a ``poutine.scale`` common to all
  sites, multiply the bound of a datum from outside: a minibatch is then unbiased for the bound of
  the full data. A scale of single sites multiplies their log densities, inside the weight.
* **Masks** act on the log density of their site. **Subsamples** are shared by all particles.
* **Enumerated** sites of the model are summed out of the joint density.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions.util import is_identically_zero, scale_and_mask
from torch import Tensor

from ..models.enumeration import sum_out
from ..models.scales import same_scale
from ..models.sites import (
    base_distribution,
    plate_frames,
    plate_size,
    sum_to_batch,
)
from .scales import Scales
from .traces import Gates, Run, Site

__all__ = ["PARTICLE_PLATE", "Particles", "Sampling", "collect"]

PARTICLE_PLATE = "num_particles_vectorized"  # the name that Pyro's ELBO gives it

Sampling = Literal["pathwise", "score", "gated"]
"""How gradients pass through a guide's samples: freely, never, or until the gates close."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Particles:
    """K particles of one loss evaluation."""

    log_joint: Tensor  # log p(x, z), nats, [K, *batch]
    log_guide: Tensor  # log q(z | x), nats, [K, *batch]
    score: Tensor | None  # log density of the draws that gradients do not reach, [K, *batch]
    score_sites: tuple[str, ...]  # where those are
    altered_sites: tuple[str, ...]  # guide sites with a mask or an inner scale
    scale: Tensor | float  # multiplies each datum's bound, [*batch]
    scales: Scales  # of single sites
    runs: tuple[Run, ...]
    gates: Gates | None
    axes: tuple[int, ...] | None = (
        None  # of the particles and the batch, in one run of all particles
    )
    notes: tuple[str, ...] = ()  # why the objective is no bound

    @cached_property
    def log_weights(self) -> Tensor:
        """Log-weights in nats, shape ``[K, *batch]``."""
        return self.log_joint - self.log_guide

    def total(self, value: Tensor) -> Tensor:
        """Sums a value per datum, ``[..., *batch]``, with its scale, to a scalar."""
        return (value * self.scale).sum()


def collect(
    runs: Sequence[Run],
    *,
    num_particles: int,
    vectorized: bool,
    sampling: Sampling,
    gates: Gates | None = None,
    batch_plates: Sequence[str] | None = None,
) -> Particles:
    """Reduces runs to log-weights per datum.

    Args:
        runs: One run in the particle plate, or one run per particle.
        num_particles: Number K of particles.
        vectorized: Whether the one run holds K particles in the particle plate.
        sampling: How the guide's samples were treated.
        gates: The gates, if ``sampling`` is ``"gated"``.
        batch_plates: Names of the plates that are the batch, where they were found before.

    Returns:
        The particles.

    Raises:
        NotImplementedError: If a scale does not commute with summing a site out.
    """
    batch = _batch_plates(runs)
    if batch_plates is not None:
        batch = {n: f for n, f in batch.items() if n in batch_plates or n == PARTICLE_PLATE}
    scales = Scales(runs, batch)
    plates = [frame for frame in batch.values() if frame.name != PARTICLE_PLATE]
    dims = [frame.dim for frame in plates]
    shape = torch.Size(_size(frame, runs) for frame in plates)
    particle_dim = [batch[PARTICLE_PLATE].dim] if vectorized else []
    reducer = _Reducer(
        particle_dim + dims, torch.Size([num_particles] if vectorized else []) + shape, scales
    )
    parts = [_reduce_run(run, reducer, sampling) for run in runs]
    score_sites = tuple(dict.fromkeys(name for part in parts for name in part.score_sites))
    score = None
    if score_sites:
        score = _stack(
            [torch.zeros_like(p.log_guide) if p.score is None else p.score for p in parts],
            vectorized,
        )
    return Particles(
        log_joint=_stack([part.log_joint for part in parts], vectorized),
        log_guide=_stack([part.log_guide for part in parts], vectorized),
        score=score,
        score_sites=score_sites,
        altered_sites=tuple(
            name
            for run in runs
            for name, site in run.guide_sites.items()
            if site["mask"] is not None or not same_scale(scales.inside(site), 1.0)
        ),
        scale=scales.outside(dims, shape),
        scales=scales,
        runs=tuple(runs),
        gates=gates,
        axes=tuple(particle_dim + dims) if vectorized else None,
        notes=scales.notes,
    )


def _stack(values: Sequence[Tensor], vectorized: bool) -> Tensor:
    return values[0] if vectorized else torch.stack(list(values))


def _batch_plates(runs: Sequence[Run]) -> dict[str, Any]:
    """Finds the plates that enclose every site of all runs, by name, leftmost first."""
    common: dict[str, Any] | None = None
    for run in runs:
        for _, site in run.sites:
            frames = plate_frames(site)
            if common is None:
                common = frames
            common = {n: f for n, f in common.items() if n in frames and _same(f, frames[n])}
    return dict(sorted((common or {}).items(), key=lambda item: item[1].dim))


def _same(a: Any, b: Any) -> bool:
    """Tells whether two frames are of one plate; Pyro's own comparison is slow."""
    return a is b or tuple.__eq__(a, b) is True or bool(a == b)


def _size(frame: Any, runs: Sequence[Run]) -> int:
    """Returns the size of a plate in these runs."""
    if frame.size >= 0:
        return int(frame.size)
    return plate_size(frame, [site for run in runs for _, site in run.sites])


class _Reducer(NamedTuple):
    """Sums log densities to particles and batch plates."""

    dims: list[int]
    shape: torch.Size
    scales: Scales

    def __call__(self, value: Tensor) -> Tensor:
        return sum_to_batch(value, self.dims, self.shape)

    def log_prob(self, site: Site) -> Tensor:
        """Reduces the log density of a site, masked and with its inner scale."""
        inside = self.scales.inside(site)
        if not isinstance(inside, Tensor) and inside == 1.0 and site["mask"] is None:
            return self(site["unscaled_log_prob"])
        return self(scale_and_mask(site["unscaled_log_prob"], inside, site["mask"]))


class _Reduced(NamedTuple):
    log_joint: Tensor
    log_guide: Tensor
    score: Tensor | None
    score_sites: tuple[str, ...]


def _reduce_run(run: Run, reducer: _Reducer, sampling: Sampling) -> _Reduced:
    enumerated = [
        name
        for name, site in run.model_sites.items()
        if not site["is_observed"] and site["infer"].get("_enumerate_dim") is not None
    ]
    if enumerated:
        log_joint = _sum_out(run, enumerated, reducer)
    else:
        terms = [reducer.log_prob(site) for site in run.model_sites.values()]
        log_joint = _sum(terms, torch.zeros(reducer.shape))
    terms = [reducer.log_prob(site) for site in run.guide_sites.values()]
    log_guide = _sum(terms, log_joint)
    scores, names = [], []
    for name, site in run.guide_sites.items():
        score = _score(name, site, sampling)
        if score is not None and score.requires_grad:
            scores.append(reducer(score))
            names.append(name)
    score = _sum(scores, log_joint) if scores else None
    return _Reduced(log_joint, log_guide, score, tuple(names))


def _sum(terms: Sequence[Tensor], like: Tensor) -> Tensor:
    return functools.reduce(torch.add, terms) if terms else torch.zeros_like(like)


def _score(name: str, site: Site, sampling: Sampling) -> Tensor | None:
    """Returns the log density whose gradient is the score of a draw, where one is needed."""
    score = site["score_parts"].score_function
    if not is_identically_zero(score):
        return torch.as_tensor(score)
    if sampling != "score":
        return None
    fn = base_distribution(site["fn"])
    if isinstance(fn, dist.Delta) and fn.v.requires_grad:
        raise NotImplementedError(
            f'guide site "{name}" is a Delta with a learnable location, which has no score: use '
            'gradient="reparam" or "auto"'
        )
    return site["unscaled_log_prob"]  # type: ignore[no-any-return]


def _sum_out(run: Run, enumerated: Sequence[str], reducer: _Reducer) -> Tensor:
    """Sums enumerated sites out of the joint density, by message passing within plates."""
    sites = run.model_sites
    found = sum_out(
        run.model,
        sites.items(),
        enumerated,
        lambda site: scale_and_mask(site["unscaled_log_prob"], mask=site["mask"]),
    )
    scale = _one_scale({name: reducer.scales.inside(sites[name]) for name in found.summed})
    terms = [reducer(term * scale) for term in found.terms]
    terms += [reducer.log_prob(sites[name]) for name in found.plain]
    return _sum(terms, torch.zeros(reducer.shape))


def _one_scale(scales: Mapping[str, Tensor | float]) -> Tensor | float:
    """Returns the scale that all factors of an enumerated sum share."""
    first = next(iter(scales.values()))
    if isinstance(first, Tensor) and first.dim():
        raise NotImplementedError(
            f"sites {list(scales)} depend on an enumerated site: only a scalar poutine.scale works"
        )
    for name, scale in scales.items():
        if not same_scale(first, scale):
            raise NotImplementedError(
                f'site "{name}" depends on an enumerated site and has a poutine.scale that '
                f"{next(iter(scales))!r} has not: a power of one factor does not commute with the "
                "sum; scale all such sites or none"
            )
    return first
