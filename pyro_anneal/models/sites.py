"""The layout of a Pyro model: which sites are latent, and where each lives in one flat vector.

A model's latent sites are packed into one unconstrained vector ``u`` of shape ``[*batch, D]``: the
plates that enclose every site of model and guide come first (they are the batch), everything else
is flattened behind them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints

from .types import Distribution, Node, Support, Trace

__all__ = [
    "TRANSPORT",
    "BatchPlate",
    "Layout",
    "Site",
    "base_distribution",
    "density_sites",
    "is_deterministic",
    "is_factor",
    "is_flat",
    "is_partly_masked",
    "is_point",
    "is_wrapper",
    "latent_sites",
    "mark_points",
    "observed_sites",
    "plate_frames",
    "plate_size",
    "sum_to_batch",
    "unmasked",
]


TRANSPORT = "guide: "  # begins the names of sites that stand for a guide's (models/transport.py)


def is_wrapper(fn: Distribution) -> bool:
    """Tells whether a distribution is a ``to_event``, ``mask`` or ``expand`` of another."""
    return isinstance(fn, dist.MaskedDistribution) or type(fn).__name__ in (
        "ExpandedDistribution",
        "Independent",
    )


def base_distribution(fn: Distribution) -> Distribution:
    """Unwraps ``to_event``, ``mask`` and ``expand`` down to the distribution that does the work."""
    while is_wrapper(fn):
        fn = fn.base_dist
    return fn


def unmasked(fn: Distribution) -> Distribution:
    """Removes every ``mask`` from a distribution, also from below ``to_event`` and ``expand``."""
    if isinstance(fn, dist.MaskedDistribution):
        return unmasked(fn.base_dist)
    if not is_wrapper(fn) or unmasked(fn.base_dist) is fn.base_dist:
        return fn
    base = unmasked(fn.base_dist)
    if type(fn).__name__ == "Independent":
        return base.to_event(fn.reinterpreted_batch_ndims)
    return base.expand(fn.batch_shape)


def is_deterministic(site: Node) -> bool:
    """Tells whether a site only records a value and has no density.

    That is ``pyro.deterministic``, and the site that ``poutine.reparam`` leaves in place of one it
    has reparameterized: a ``Delta`` under ``mask(False)``.
    """
    fn = site["fn"]
    if site["infer"].get("_deterministic", False):
        return True
    masked_out = False
    while is_wrapper(fn):
        masked_out |= getattr(fn, "_mask", True) is False
        fn = fn.base_dist
    return masked_out and isinstance(fn, dist.Delta)


def is_flat(site: Node) -> bool:
    """Tells whether a constant mask False leaves a latent site without any density of its own.

    NeuTraReparam and contrib.epidemiology do so: the prior is written elsewhere, as a factor. A
    mask that is a tensor says which entries count, as ``obs_mask`` does, and is no such statement.
    """
    return any(mask is False for mask in _masks(site))


def is_partly_masked(site: Node) -> bool:
    """Tells whether a tensor masks some elements of a latent site."""
    masks = _masks(site)
    return any(isinstance(mask, Tensor) and not bool(mask.all()) for mask in masks)


def _masks(site: Node) -> list[Any]:
    masks, fn = [site["mask"]], site["fn"]
    while is_wrapper(fn):
        masks.append(getattr(fn, "_mask", None))
        fn = fn.base_dist
    return masks


def is_point(site: Node) -> bool:
    """Tells whether a site samples a ``Delta`` without a log density of its own: a known value."""
    fn = base_distribution(site["fn"])
    observed = site["is_observed"] or site["infer"].get("was_observed")
    if observed or not isinstance(fn, dist.Delta):
        return False
    log_density = torch.as_tensor(fn.log_density)
    return not log_density.requires_grad and bool((log_density == 0).all())


def mark_points(model_trace: Trace, guide_trace: Trace | None = None) -> None:
    """Marks the ``Delta`` sites of a model's trace as deterministic, where no guide draws them.

    ``pyro.sample("d", Delta(v))`` is how models recorded a value before ``pyro.deterministic``.
    """
    for name, site in model_trace.nodes.items():
        drawn = guide_trace is not None and name in guide_trace.nodes
        if site["type"] == "sample" and not drawn and is_point(site):
            site["infer"] = {**site["infer"], "_deterministic": True}
            site["is_observed"] = True  # as at sites of pyro.deterministic


def is_factor(site: Node) -> bool:
    """Tells whether a site is a ``pyro.factor``."""
    return isinstance(base_distribution(site["fn"]), dist.Unit)


def density_sites(trace: Trace) -> Iterable[tuple[str, Node]]:
    """Iterates over the sample sites of a trace that carry a density, in program order."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site_is_subsample(site) and not is_deterministic(site):
            yield name, site


def latent_sites(trace: Trace) -> dict[str, Node]:
    """Collects the latent sites of a trace, in program order."""
    return {name: site for name, site in density_sites(trace) if not site["is_observed"]}


def observed_sites(trace: Trace) -> dict[str, Node]:
    """Collects the observed sites of a trace that carry a density, factors included."""
    return {name: site for name, site in density_sites(trace) if site["is_observed"]}


def plate_frames(site: Node) -> dict[str, CondIndepStackFrame]:
    """Collects the vectorized plates around a site, by name."""
    return {f.name: f for f in site["cond_indep_stack"] if f.vectorized}


def plate_size(frame: CondIndepStackFrame, sites: Iterable[Node]) -> int:
    """Returns the size of a plate; one that was made without a size has that of its sites.

    Args:
        frame: The plate, as it stands in a site's ``cond_indep_stack``.
        sites: Sites with log densities, some of them in the plate.
    """
    if frame.size >= 0:
        return int(frame.size)
    shapes = [
        site["unscaled_log_prob"].shape for site in sites if frame.name in plate_frames(site)
    ]
    return max((shape[frame.dim] for shape in shapes if len(shape) >= -frame.dim), default=1)


@dataclass(frozen=True)
class BatchPlate:
    """A plate that encloses every site, and so becomes a batch dimension."""

    name: str
    size: int
    dim: int  # in the model, negative
    guide_dim: int  # in the guide, negative


@dataclass(frozen=True, eq=False)
class Site:
    """One latent site, continuous or discrete, and its place in the flat vector."""

    name: str
    batch_shape: torch.Size  # of the distribution at the site
    event_shape: torch.Size
    unconstrained_shape: torch.Size  # batch and unconstrained event dimensions
    batch_axes: tuple[int, ...]  # axes of the value that are batch plates, in plate order
    plates: tuple[str | None, ...]  # name of the plate behind each axis of batch_shape
    transform: Any  # the prototype's bijection; exact for every value only if the layout is static
    dtype: torch.dtype
    start: int
    stop: int
    support: Support = constraints.real  # where the prototype's density is normalized
    is_exact: bool = False  # whether its density is known in u itself, also at edges

    @property
    def value_shape(self) -> torch.Size:
        """Shape of the site's value in the model's own space."""
        return self.batch_shape + self.event_shape

    def flatten(self, unconstrained: Tensor) -> Tensor:
        """Moves batch plates to the front and flattens the rest, to ``[*batch, stop - start]``."""
        unconstrained = unconstrained.expand(self.unconstrained_shape)
        moved = unconstrained.movedim(self.batch_axes, tuple(range(len(self.batch_axes))))
        return moved.reshape([*moved.shape[: len(self.batch_axes)], self.stop - self.start])

    def unflatten(self, flat: Tensor) -> Tensor:
        """Undoes :meth:`flatten` on ``flat`` of shape ``[*batch, stop - start]``."""
        count = len(self.batch_axes)
        rest = [n for i, n in enumerate(self.unconstrained_shape) if i not in self.batch_axes]
        moved = flat.reshape([*flat.shape[:count], *rest])
        return moved.movedim(tuple(range(count)), self.batch_axes).to(self.dtype)


@dataclass(frozen=True, eq=False)
class Layout:
    """Everything about a model and guide that does not depend on the values of latents."""

    sites: tuple[Site, ...]
    batch: tuple[BatchPlate, ...]
    dtype: torch.dtype
    device: torch.device
    enumerated: tuple[str, ...]  # discrete sites that are summed out
    max_plate_nesting: int
    scale: float  # common poutine.scale of all sites, taken outside the weights
    is_static: bool  # no support depends on another latent
    guarded: tuple[str, ...]  # observed sites whose support depends on latents
    observed: dict[str, Tensor]  # values of observed sites, factors left out
    improper: tuple[str, ...]  # latent sites whose prior is not normalized and cannot be sampled
    loops: dict[str, list[int]]  # indices of the plates that are used as loops
    notes: tuple[str, ...]  # what a reader of the evidence must know
    lifted: tuple[str, ...] = ()  # discrete sites whose gradient is that of exact differences
    derived: tuple[Site, ...] = ()  # latents that a guide derives from the sites, if it does
    unread: tuple[str, ...] = ()  # latents that no observed site depends on
    noncentred: frozenset[str] = frozenset()  # sites whose location and scale are taken out of u
    wide: bool = False  # whether the model is computed in float64 whatever its own precision

    @property
    def model_sites(self) -> tuple[Site, ...]:
        """The model's own latents, in whichever coordinates chains move."""
        return self.derived or self.sites

    @property
    def batch_shape(self) -> torch.Size:
        """Sizes of the batch plates."""
        return torch.Size(plate.size for plate in self.batch)

    @property
    def dim(self) -> int:
        """Unconstrained dimensions D per batch element."""
        return self.sites[-1].stop

    def split(self, position: Tensor) -> dict[str, Tensor]:
        """Splits ``u`` of shape ``[*batch, D]`` into unconstrained values by site."""
        return {s.name: s.unflatten(position[..., s.start : s.stop]) for s in self.sites}

    def join(self, unconstrained: Mapping[str, Tensor]) -> Tensor:
        """Undoes :meth:`split`."""
        parts = [s.flatten(unconstrained[s.name]).to(self.dtype) for s in self.sites]
        return torch.cat(parts, dim=-1)


def sum_to_batch(value: Tensor, dims: Sequence[int], shape: torch.Size) -> Tensor:
    """Sums a log density over all axes but the batch plates.

    Args:
        value: Log densities of one site, its last axes being the site's batch shape.
        dims: Negative axes of the batch plates, in plate order.
        shape: Sizes of the batch plates.

    Returns:
        Tensor of shape ``shape``.
    """
    if not dims:
        return value.sum()
    if value.shape == shape and all(dim == i - len(dims) for i, dim in enumerate(dims)):
        return value
    rank = max(value.dim(), -min(dims))
    target = list(value.shape)
    target = [1] * (rank - len(target)) + target
    for dim, size in zip(dims, shape, strict=True):
        target[dim] = size
    value = value.expand(target)
    value = value.movedim(tuple(dims), tuple(range(len(dims))))
    return value.reshape(*shape, -1).sum(-1)
