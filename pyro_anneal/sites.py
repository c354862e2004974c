"""The layout of a Pyro model: which sites are latent, and where each lives in one flat vector.

A model's latent sites are packed into one unconstrained vector ``u`` of shape ``[*batch, D]``: the
plates that enclose every site of model and guide come first (they are the batch), everything else
is flattened behind them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

__all__ = [
    "BatchPlate",
    "Layout",
    "Site",
    "base_distribution",
    "inspect_model",
    "is_deterministic",
    "is_factor",
    "latent_sites",
    "observed_sites",
    "sum_to_batch",
]


def base_distribution(fn: Any) -> Any:
    """Unwraps ``to_event``, ``mask`` and ``expand`` down to the distribution that does the work."""
    while isinstance(fn, dist.Independent | dist.MaskedDistribution) or type(fn).__name__ in (
        "ExpandedDistribution",
        "Independent",
    ):
        fn = fn.base_dist
    return fn


def is_deterministic(site: Mapping[str, Any]) -> bool:
    """Tells whether a site only records a value (``pyro.deterministic``) and has no density."""
    return bool(site["infer"].get("_deterministic", False))


def is_factor(site: Mapping[str, Any]) -> bool:
    """Tells whether a site is a ``pyro.factor``."""
    return isinstance(base_distribution(site["fn"]), dist.Unit)


def _density_sites(trace: Any) -> Iterable[tuple[str, dict[str, Any]]]:
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site_is_subsample(site) and not is_deterministic(site):
            yield name, site


def latent_sites(trace: Any) -> dict[str, dict[str, Any]]:
    """Collects the latent sites of a trace, in program order."""
    return {name: site for name, site in _density_sites(trace) if not site["is_observed"]}


def observed_sites(trace: Any) -> dict[str, dict[str, Any]]:
    """Collects the observed sites of a trace that carry a density, factors included."""
    return {name: site for name, site in _density_sites(trace) if site["is_observed"]}


@dataclass(frozen=True)
class BatchPlate:
    """A plate that encloses every site, and so becomes a batch dimension."""

    name: str
    size: int
    dim: int  # in the model, negative
    guide_dim: int  # in the guide, negative


@dataclass(frozen=True, eq=False)
class Site:
    """One continuous latent site and its place in the flat vector."""

    name: str
    batch_shape: torch.Size  # of the distribution at the site
    event_shape: torch.Size
    unconstrained_shape: torch.Size  # batch and unconstrained event dimensions
    batch_axes: tuple[int, ...]  # axes of the value that are batch plates, in plate order
    plates: tuple[str | None, ...]  # name of the plate behind each axis of batch_shape
    transform: Any  # the prototype's bijection; exact for every value only if the layout is static
    start: int
    stop: int

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
        return moved.movedim(tuple(range(count)), self.batch_axes)


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
    observed: dict[str, Tensor]  # values of observed sites, factors left out
    notes: tuple[str, ...]  # what a reader of the evidence must know

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
        return torch.cat([s.flatten(unconstrained[s.name]) for s in self.sites], dim=-1)


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
    rank = max(value.dim(), -min(dims))
    target = list(value.shape)
    target = [1] * (rank - len(target)) + target
    for dim, size in zip(dims, shape, strict=True):
        target[dim] = size
    value = value.expand(target)
    value = value.movedim(tuple(dims), tuple(range(len(dims))))
    return value.reshape(*shape, -1).sum(-1)


def _frames(site: Mapping[str, Any]) -> dict[str, Any]:
    return {f.name: f for f in site["cond_indep_stack"] if f.vectorized}


def _check_plates(trace: Any) -> None:
    for name, site in trace.nodes.items():
        if site["type"] != "sample":
            continue
        for frame in site["cond_indep_stack"]:
            if frame.full_size is not None and frame.full_size != frame.size:
                raise ValueError(
                    f'plate "{frame.name}" is subsampled ({frame.size} of {frame.full_size}) at '
                    f'site "{name}": the evidence of a random subset is no evidence of the data; '
                    "pass the whole data set, or the subset with a plate of its own size"
                )


def _check_shape(name: str, site: Mapping[str, Any]) -> None:
    """Checks that every axis of a site's batch shape belongs to a plate."""
    shape = site["fn"].batch_shape
    known = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
    for axis in range(-len(shape), 0):
        if shape[axis] > 1 and axis not in known:
            raise ValueError(
                f'at site "{name}": log_prob has shape {list(shape)}, but axis {axis} of size '
                f"{shape[axis]} belongs to no plate; enclose it in "
                f'pyro.plate("data", {shape[axis]}, dim={axis}) or declare it dependent with '
                f".to_event({-axis})"
            )


def _check_latents(model_trace: Any, guide_trace: Any | None) -> list[str]:
    """Checks that latents are continuous or enumerated and covered by the guide."""
    latents = latent_sites(model_trace)
    enumerated = []
    for name, site in latents.items():
        how = site["infer"].get("enumerate")
        if how == "parallel" and getattr(site["fn"], "has_enumerate_support", False):
            enumerated.append(name)
        elif how == "sequential":
            raise ValueError(
                f'site "{name}" is enumerated sequentially; use '
                'infer={"enumerate": "parallel"} or config_enumerate(model, "parallel")'
            )
        elif base_distribution(site["fn"]).support is not None and getattr(
            site["fn"].support, "is_discrete", False
        ):
            raise ValueError(
                f'latent site "{name}" is discrete ({type(site["fn"]).__name__}) and nothing sums '
                "it out or moves it: mark it with "
                'infer={"enumerate": "parallel"} or wrap the model in pyro.infer.config_enumerate'
            )
    continuous = [name for name in latents if name not in enumerated]
    if not continuous:
        what = "enumerated sites only" if enumerated else "no latent site"
        raise ValueError(
            f"the model has {what}, so there is nothing to anneal: its log evidence is the "
            "log density itself (pyro.infer.TraceEnum_ELBO sums enumerated sites exactly)"
        )
    if not observed_sites(model_trace):
        raise ValueError(
            "the model has no observation: condition it on data with pyro.sample(..., obs=x) or "
            "poutine.condition; without any its log evidence is 0"
        )
    if guide_trace is not None:
        _check_guide(continuous, enumerated, guide_trace, observed_sites(model_trace))
    return enumerated


def _check_guide(
    continuous: list[str],
    enumerated: list[str],
    guide_trace: Any,
    observed: Mapping[str, Any],
) -> None:
    guided = latent_sites(guide_trace)
    missing = [name for name in continuous if name not in guided]
    extra = [
        name
        for name, site in guided.items()
        if name not in continuous and not site["infer"].get("is_auxiliary")
    ]
    if missing or extra:
        problems = []
        if missing:
            problems.append(f"latent sites of the model without a guide: {missing}")
        both = [name for name in extra if name in enumerated]
        if both:
            problems.append(f"sites that the model enumerates and the guide samples: {both}")
        seen = [name for name in extra if name in observed]
        if seen:
            problems.append(f"sites of the guide that the model observes: {seen}")
        rest = [name for name in extra if name not in both and name not in seen]
        if rest:
            problems.append(
                f"sites of the guide that the model lacks: {rest} (their density cannot be "
                "integrated out of the guide)"
            )
        raise ValueError("model and guide disagree on sites; " + "; ".join(problems))


def _find_batch(
    model_trace: Any, guide_trace: Any | None, requested: str | Sequence[str]
) -> tuple[BatchPlate, ...]:
    """Finds the plates that enclose every site, or checks those that the user named."""
    model_sites = list(_density_sites(model_trace))
    guide_sites = [] if guide_trace is None else list(latent_sites(guide_trace).items())
    both = (model_sites, guide_sites)
    first = _frames(model_sites[0][1])
    common: dict[str, BatchPlate] = {}
    for name, frame in first.items():
        frames = [[_frames(site).get(name) for _, site in sites] for sites in both]
        if any(f is None or f.size != frame.size for group in frames for f in group):
            continue
        dims, guide_dims = ({f.dim for f in group if f is not None} for group in frames)
        guide_dims = guide_dims or dims
        if len(dims) == 1 and len(guide_dims) == 1:
            common[name] = BatchPlate(name, frame.size, frame.dim, guide_dims.pop())
    if isinstance(requested, str):
        if requested != "auto":
            raise ValueError(
                f'batch_plates must be "auto" or a list of plate names, got {requested!r}'
            )
        chosen = list(common.values())
    else:
        for plate in requested:
            if plate not in common:
                outside = [
                    n for n, site in model_sites + guide_sites if plate not in _frames(site)
                ]
                raise ValueError(
                    f'plate "{plate}" cannot be a batch dimension: it does not enclose '
                    f"{outside or 'every site with one size and dim'}; leave it out of "
                    "batch_plates, or move those sites inside the plate"
                )
        chosen = [common[name] for name in requested]
    return tuple(sorted(chosen, key=lambda plate: plate.dim))


def _find_scale(model_trace: Any) -> tuple[float, tuple[str, ...]]:
    """Finds the common scale of all sites, and what makes the normalizer no log p(x)."""
    notes = []
    scales: dict[str, float | None] = {}
    for name, site in _density_sites(model_trace):
        if is_factor(site):
            notes.append(f'a normalizer, not log p(x): the model has pyro.factor("{name}")')
        scale = site["scale"]
        constant = not isinstance(scale, Tensor) or scale.numel() == 1
        scales[name] = float(scale) if constant else None
    values = set(scales.values())
    if len(values) == 1 and None not in values:
        common = next(iter(values))
        assert common is not None
        if common != 1.0:
            notes.append(f"{common:g} times the log evidence: poutine.scale encloses every site")
        return common, tuple(notes)
    scaled = [name for name, value in scales.items() if value != 1.0]
    notes.append(f"a normalizer, not log p(x): poutine.scale acts on {scaled}")
    return 1.0, tuple(notes)


def _make_site(
    name: str, site: Mapping[str, Any], batch: Sequence[BatchPlate], start: int
) -> Site:
    fn = site["fn"]
    if not isinstance(fn, TorchDistributionMixin):
        raise ValueError(f'site "{name}" has no torch distribution: {type(fn).__name__}')
    try:
        transform = biject_to(fn.support)
    except NotImplementedError as error:
        raise ValueError(
            f'at latent site "{name}": no bijection from R^n to the support {fn.support} of '
            f"{type(fn).__name__} is registered; reparameterize it (a correlation matrix through "
            "LKJCholesky, say) or register one with torch.distributions.biject_to.register"
        ) from error
    rank = len(fn.batch_shape)
    shape = torch.Size(transform.inverse_shape(fn.batch_shape + fn.event_shape))
    axes = tuple(rank + plate.dim for plate in batch)
    size = math.prod(n for i, n in enumerate(shape) if i not in axes)
    by_axis = {frame.dim + rank: frame.name for frame in _frames(site).values()}
    return Site(
        name=name,
        batch_shape=fn.batch_shape,
        event_shape=fn.event_shape,
        unconstrained_shape=shape,
        batch_axes=axes,
        plates=tuple(by_axis.get(axis) for axis in range(rank)),
        transform=transform,
        start=start,
        stop=start + size,
    )


def _supports_are_static(first: Any, second: Any, sites: Sequence[Site]) -> bool:
    """Tells whether two runs with different latents gave each site the same support."""
    for site in sites:
        probe = torch.zeros(site.unconstrained_shape, dtype=first.nodes[site.name]["value"].dtype)
        probe = probe.to(first.nodes[site.name]["value"].device)
        values = [
            biject_to(trace.nodes[site.name]["fn"].support)(probe) for trace in (first, second)
        ]
        if values[0].shape != values[1].shape or not torch.equal(*values):
            return False
    return True


def _trace_pair(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    model_args: tuple[tuple[Any, ...], dict[str, Any]],
    guide_args: tuple[tuple[Any, ...], dict[str, Any]],
) -> tuple[Any, Any | None]:
    args, kwargs = model_args
    if guide is None:
        return poutine.trace(model).get_trace(*args, **kwargs), None
    guide_trace = poutine.trace(guide).get_trace(*guide_args[0], **guide_args[1])
    replayed = poutine.replay(model, trace=guide_trace)
    return poutine.trace(replayed).get_trace(*args, **kwargs), guide_trace


def inspect_model(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    model_args: tuple[tuple[Any, ...], dict[str, Any]],
    guide_args: tuple[tuple[Any, ...], dict[str, Any]],
    *,
    batch_plates: str | Sequence[str] = "auto",
    num_tries: int = 100,
) -> Layout:
    """Runs model and guide a few times and works out their layout.

    Args:
        model: Pyro model with its observations.
        guide: Pyro guide, or None for the prior.
        model_args: ``(args, kwargs)`` of the model.
        guide_args: ``(args, kwargs)`` of the guide.
        batch_plates: ``"auto"`` for every plate that encloses all sites, or plate names.
        num_tries: Draws to try where a model raises for some values of its latents.

    Returns:
        The layout.

    Raises:
        ValueError: If model and guide disagree, a latent is discrete and not enumerated, a plate
            is subsampled, a site's shape is not covered by plates, nothing is latent or observed.
    """
    with torch.no_grad(), poutine.block(), pyro.validation_enabled(False):
        first = second = None
        for attempt in range(num_tries):
            try:
                first = first or _trace_pair(model, guide, model_args, guide_args)
                second = _trace_pair(model, guide, model_args, guide_args)
                break
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # some draws have no density: look for one that has
                if attempt == num_tries - 1:
                    raise
    assert first is not None
    assert second is not None
    trace, guide_trace = first
    _check_plates(trace)
    if guide_trace is not None:
        _check_plates(guide_trace)
    enumerated = _check_latents(trace, guide_trace)
    for name, site in _density_sites(trace):
        _check_shape(name, site)
    batch = _find_batch(trace, guide_trace, batch_plates)
    scale, notes = _find_scale(trace)
    if enumerated:
        notes += (f"discrete sites {enumerated} are summed out: latents are the other sites",)
    sites: list[Site] = []
    for name, site in latent_sites(trace).items():
        if name not in enumerated:
            sites.append(_make_site(name, site, batch, sites[-1].stop if sites else 0))
    values = [trace.nodes[site.name]["value"] for site in sites]
    dims = [f.dim for _, site in _density_sites(trace) for f in _frames(site).values()]
    return Layout(
        sites=tuple(sites),
        batch=batch,
        dtype=torch.stack([value.new_zeros(()) for value in values]).dtype
        if len({value.dtype for value in values}) == 1
        else torch.promote_types(values[0].dtype, values[-1].dtype),
        device=values[0].device,
        enumerated=tuple(enumerated),
        max_plate_nesting=-min(dims, default=0),
        scale=scale,
        is_static=_supports_are_static(trace, second[0], sites),
        observed={
            name: site["value"].detach()
            for name, site in observed_sites(trace).items()
            if not is_factor(site)
        },
        notes=notes,
    )
