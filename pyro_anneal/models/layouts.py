"""The parts of a layout: batch plates, scale, precision, and the place of each site in the vector."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from .checks import (
    support_of,
    undeclared_axes,
)
from .discrete import discrete_map
from .edges import has_closed_form
from .scales import own_scale, same_scale
from .sites import (
    TRANSPORT,
    BatchPlate,
    Site,
    density_sites,
    is_factor,
    latent_sites,
    observed_sites,
    plate_frames,
    plate_size,
)
from .supports import bijection_onto
from .types import Node, Trace

__all__ = [
    "describe_undeclared",
    "find_batch",
    "find_scale",
    "loops_of",
    "make_site",
    "observed_values",
    "plate_nesting",
    "widest_dtype",
]


def find_batch(
    model_trace: Trace, guide_trace: Trace | None, requested: str | Sequence[str]
) -> tuple[BatchPlate, ...]:
    """Finds the plates that enclose every site, or checks those that the user named."""
    model_sites = list(density_sites(model_trace))
    guide_sites = [] if guide_trace is None else list(latent_sites(guide_trace).items())
    both = (model_sites, guide_sites)
    first = plate_frames(model_sites[0][1])
    common: dict[str, BatchPlate] = {}
    for name, frame in first.items():
        frames = [[plate_frames(site).get(name) for _, site in sites] for sites in both]
        if any(f is None or f.size != frame.size for group in frames for f in group):
            continue
        dims, guide_dims = ({f.dim for f in group if f is not None} for group in frames)
        guide_dims = guide_dims or dims
        if len(dims) == 1 and len(guide_dims) == 1:
            size = plate_size(frame, [site for _, site in model_sites])
            common[name] = BatchPlate(name, size, frame.dim, guide_dims.pop())
    named = isinstance(requested, Sequence) and all(isinstance(n, str) for n in requested)
    if requested != "auto" and (isinstance(requested, str) or not named):
        raise ValueError(
            f'batch_plates must be "auto" or a list of plate names, got {requested!r}'
        )
    if isinstance(requested, str):
        chosen = list(common.values())
    else:
        for plate in requested:
            if list(requested).count(plate) > 1:
                raise ValueError(f'plate "{plate}" stands twice in batch_plates')
            if plate not in common:
                outside = [
                    n for n, site in model_sites + guide_sites if plate not in plate_frames(site)
                ]
                raise ValueError(
                    f'plate "{plate}" cannot be a batch dimension: it does not enclose '
                    f"{outside or 'every site with one size and dim'}; leave it out of "
                    "batch_plates, or move those sites inside the plate"
                )
        chosen = [common[name] for name in requested]
    return tuple(sorted(chosen, key=lambda plate: plate.dim))


def find_scale(model_trace: Trace) -> tuple[float, tuple[str, ...]]:
    """Finds the common scale of all sites, and what makes the normalizer no log p(x)."""
    notes = []
    scales: dict[str, Tensor | float] = {}
    for name, site in density_sites(model_trace):
        if is_factor(site) and not name.startswith(TRANSPORT):
            notes.append(f'a normalizer, not log p(x): the model has pyro.factor("{name}")')
        scale = own_scale(site)
        constant = not isinstance(scale, Tensor) or scale.numel() == 1
        scales[name] = float(scale) if constant else scale
    first = next(iter(scales.values()), 1.0)
    if isinstance(first, float) and all(same_scale(first, scale) for scale in scales.values()):
        common = first
        if common != 1.0:
            notes.append(f"{common:g} times the log evidence: poutine.scale encloses every site")
        return common, tuple(notes)
    scaled = [n for n, scale in scales.items() if isinstance(scale, Tensor) or scale != 1.0]
    notes.append(f"a normalizer, not log p(x): poutine.scale acts on {scaled}")
    return 1.0, tuple(notes)


def plate_nesting(trace: Trace) -> int:
    """Counts the dimensions that plates may take, from the right."""
    dims = [
        frame.dim
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in plate_frames(site).values()
    ]
    return -min(dims, default=0)


def observed_values(trace: Trace, device: torch.device) -> dict[str, Tensor]:
    """Collects the values of observed sites, factors left out."""
    return {
        name: torch.as_tensor(site["value"], device=device).detach()
        for name, site in observed_sites(trace).items()
        if not is_factor(site)
    }


def loops_of(trace: Trace) -> dict[str, list[int]]:
    """Collects the indices of plates that are used as loops."""
    return {
        frame.name: list(range(frame.size))
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
        if not frame.vectorized and frame.name in trace.nodes
    }


def make_site(name: str, site: Node, batch: Sequence[BatchPlate], start: int) -> Site:
    """Works out the bijection of a latent site, and gives it its place from ``start`` on."""
    fn = site["fn"]
    if not isinstance(fn, TorchDistributionMixin):
        raise ValueError(f'site "{name}" has no torch distribution: {type(fn).__name__}')
    support = support_of(name, site)
    try:
        transform = discrete_map(name, fn) if support.is_discrete else bijection_onto(support)
    except NotImplementedError as error:
        raise ValueError(
            f'at latent site "{name}": no bijection from R^n to the support {support} of '
            f"{type(fn).__name__} is registered; reparameterize it (a correlation matrix through "
            "LKJCholesky, say) or register one with torch.distributions.biject_to.register"
        ) from error
    rank, dtype = len(fn.batch_shape), site["value"].dtype
    shape = torch.Size(transform.inverse_shape(fn.batch_shape + fn.event_shape))
    axes = tuple(rank + plate.dim for plate in batch)
    size = math.prod(n for i, n in enumerate(shape) if i not in axes)
    by_axis = {frame.dim + rank: frame.name for frame in plate_frames(site).values()}
    return Site(
        name=name,
        batch_shape=fn.batch_shape,
        event_shape=fn.event_shape,
        unconstrained_shape=shape,
        batch_axes=axes,
        plates=tuple(by_axis.get(axis) for axis in range(rank)),
        transform=transform,
        dtype=dtype if dtype.is_floating_point else torch.get_default_dtype(),
        start=start,
        stop=start + size,
        support=support,
        is_exact=has_closed_form(fn),
    )


def describe_undeclared(trace: Trace, enumerated: Sequence[str]) -> str:
    """Describes the axes that belong to no plate."""
    found = []
    for name, site in density_sites(trace):
        axes = undeclared_axes(name, site, enumerated=bool(enumerated))
        if axes:
            found.append(f'{axes} of site "{name}"')
    return ", ".join(found)


def widest_dtype(trace: Trace, sites: Sequence[Site]) -> torch.dtype:
    """Finds the precision to compute in: the widest of all latents and log densities."""
    dtypes = [site["unscaled_log_prob"].dtype for _, site in density_sites(trace)]
    widest: torch.dtype = functools.reduce(
        torch.promote_types, [*dtypes, *[site.dtype for site in sites]]
    )
    return widest
