"""Runs a model and a guide a few times, and checks and works out their layout."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

from .checks import (
    check_latents,
    check_log_probs,
    check_plates,
    check_structure,
    check_value_shapes,
    explained,
    outside_support,
    support_of,
    undeclared_axes,
)
from .coordinates import bijection
from .discrete import DiscreteMap, discrete_map, is_discrete, support_edges
from .edges import has_closed_form
from .masked import check_masked
from .mass import check_normalized
from .relevance import unread_sites
from .sites import (
    TRANSPORT,
    BatchPlate,
    Layout,
    Site,
    base_distribution,
    density_sites,
    is_factor,
    is_flat,
    latent_sites,
    mark_points,
    observed_sites,
    plate_frames,
    plate_size,
)
from .supports import bijection_onto, can_be_sampled, is_improper
from .validation import validation_disabled

__all__ = ["NothingToAnneal", "inspect_model", "supports_are_static"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class NothingToAnneal(ValueError):
    """A model has no latent that chains could move: its log evidence is its log density."""

    def __init__(self, layout: Layout) -> None:
        what = "enumerated sites only" if layout.enumerated else "no latent site"
        super().__init__(
            f"the model has {what}, so there is nothing to anneal: its log evidence is the log "
            "density itself, which run() and log_evidence return"
        )
        self.layout = layout  # without sites


def _find_batch(
    model_trace: Any, guide_trace: Any | None, requested: str | Sequence[str]
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


def _find_scale(model_trace: Any) -> tuple[float, tuple[str, ...]]:
    """Finds the common scale of all sites, and what makes the normalizer no log p(x)."""
    notes = []
    scales: dict[str, float | None] = {}
    for name, site in density_sites(model_trace):
        if is_factor(site) and not name.startswith(TRANSPORT):
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


def _support_images(trace: Any, names: Sequence[str]) -> list[Tensor]:
    """Computes the image of one unconstrained value under each site's bijection."""
    images = []
    for name in names:
        node = trace.nodes[name]
        fn = node["fn"]
        if is_discrete(fn):
            images.append(support_edges(name, fn))
            continue
        transform = bijection(fn)
        shape = transform.inverse_shape(fn.batch_shape + fn.event_shape)
        origin = torch.zeros(shape, dtype=node["value"].dtype, device=node["value"].device)
        images.append(transform(origin + 0.5))
    return images


def supports_are_static(
    model: Callable[..., Any], arguments: Arguments, first: Any, second: Any, names: Sequence[str]
) -> bool:
    """Tells whether no site's support depends on another latent.

    Two draws of the latents must give the same supports, and autograd must find no path from a
    latent to a support: ``Uniform(0, top.clamp(min=4))`` has the same support at most draws.

    Args:
        model: What samples the sites.
        arguments: Its ``(args, kwargs)``.
        first: A trace of it.
        second: Another one.
        names: Of all latent sites.
    """
    pairs = zip(_support_images(first, names), _support_images(second, names), strict=True)
    if not all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs):
        return False
    latents = {name: first.nodes[name]["value"].detach().clone() for name in names}
    with torch.enable_grad():
        continuous = [value for value in latents.values() if value.is_floating_point()]
        for value in continuous:
            value.requires_grad_(True)
        try:
            trace = _trace(poutine.condition(model, data=latents), arguments)
        except RuntimeError as error:
            if "on Tensor that requires grad" in str(error):  # it leaves torch: nothing is proven
                return False
            raise
        images = [image for image in _support_images(trace, names) if image.requires_grad]
        if not images:
            return True
        total = torch.stack([image.sum() for image in images]).sum()
        grads = torch.autograd.grad(total, continuous, allow_unused=True)
    return all(grad is None for grad in grads)


class _StartImproper(Messenger):  # type: ignore[misc]
    """Gives sites that cannot be sampled, as with an improper prior, some value in the support."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if msg["value"] is None and not can_be_sampled(fn):
            transform = bijection(fn)
            shape = transform.inverse_shape(fn.batch_shape + fn.event_shape)
            msg["value"] = transform(torch.randn(shape))
            msg["done"] = True


def _trace(function: Callable[..., Any], arguments: Arguments) -> Any:
    args, kwargs = arguments
    with explained(), _StartImproper():
        return poutine.trace(function).get_trace(*args, **kwargs)


def _check_observed(
    model: Callable[..., Any], arguments: Arguments, trace: Any, guarded: Sequence[str]
) -> None:
    """Refuses observed values outside their support, unless the user switched validation off."""
    found = {name: text for name, text in outside_support(trace).items() if name not in guarded}
    if not found:
        return
    # the trace at hand has validation switched off everywhere: look at the user's own setting
    with torch.no_grad(), poutine.block(), torch.random.fork_rng(devices=()):
        validated = _trace(model, arguments)
    for name, text in found.items():
        if base_distribution(validated.nodes[name]["fn"])._validate_args:
            raise ValueError(text)


def _moving_supports(first: Any, second: Any) -> tuple[str, ...]:
    """Names observed sites whose support depends on latents.

    There a value may be impossible for some latents only, where torch, with validation off, may
    give a finite density (``Pareto`` does).
    """
    moving = []
    for name, site in observed_sites(first).items():
        images = []
        for fn in (site["fn"], second.nodes[name]["fn"]):
            try:
                if is_discrete(fn):
                    images.append(support_edges(name, fn))
                    continue
                transform = biject_to(fn.support)
                shape = transform.inverse_shape(fn.batch_shape + fn.event_shape)
                images.append(transform(torch.zeros(shape, device=site["value"].device)))
            except (AttributeError, NotImplementedError, RuntimeError, ValueError):  # none
                continue
        if len(images) == 2 and not torch.equal(*images):
            moving.append(name)
    return tuple(moving)


def _has_bounds(site: Site) -> bool:
    """Tells whether a latent is an integer, whose family may give a density beyond its support."""
    return isinstance(site.transform, DiscreteMap) and site.transform.kind == "integer"


class _Marks(Messenger):  # type: ignore[misc]
    """Remembers the model's own marks for enumeration, in whose place replay puts the guide's."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        self.marks[msg["name"]] = msg["infer"].get("enumerate")

    def restore(self, trace: Any) -> None:
        """Puts the marks back at the sites of the model's trace."""
        for name, mark in self.marks.items():
            site = trace.nodes.get(name)
            if site is not None and site["infer"].get("enumerate") != mark:
                site["infer"] = {**site["infer"], "enumerate": mark}


def _trace_pair(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    model_args: Arguments,
    guide_args: Arguments,
) -> tuple[Any, Any | None]:
    if guide is None:
        trace = _trace(model, model_args)
        mark_points(trace)
        return trace, None
    guide_trace = _trace(guide, guide_args)
    try:
        marks = _Marks()
        trace = _trace(poutine.replay(marks(model), trace=guide_trace), model_args)
        marks.restore(trace)
    except (RuntimeError, ValueError):  # perhaps because the guide's values do not fit the model
        check_value_shapes(_trace(model, model_args), guide_trace)
        raise
    mark_points(trace, guide_trace)
    check_value_shapes(trace, guide_trace)
    return trace, guide_trace


def inspect_model(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    model_args: Arguments,
    guide_args: Arguments,
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
        NothingToAnneal: If no latent is continuous.
        ValueError: If model and guide disagree, a latent is discrete and not enumerated, a plate
            is subsampled, a site's shape is not covered by plates, nothing is latent or observed.
    """
    with torch.no_grad(), poutine.block(), validation_disabled():
        first, second = _draw_two(model, guide, model_args, guide_args, num_tries)
        trace, guide_trace = first
        check_plates(trace)
        if guide_trace is not None:
            check_plates(guide_trace)
        enumerated = check_latents(trace, guide_trace)
        check_structure(trace, second[0])
        check_log_probs(trace)
        check_masked(trace)
        undeclared = _undeclared(trace, enumerated)
        batch = _find_batch(trace, guide_trace, batch_plates)
        sites: list[Site] = []
        for name, site in latent_sites(trace).items():
            if name not in enumerated:
                sites.append(_make_site(name, site, batch, sites[-1].stop if sites else 0))
        is_empty = not sites
        if sites and sites[-1].stop == 0:
            raise ValueError(
                f"the latent sites {[site.name for site in sites]} have no elements, so there is "
                "nothing to anneal: leave them out, and run() returns the log density itself"
            )
        names = [site.name for site in sites]
        is_static = is_empty or supports_are_static(model, model_args, trace, second[0], names)
        guarded = _moving_supports(trace, second[0])
        guarded += tuple(site.name for site in sites if _has_bounds(site))
    _check_observed(model, model_args, trace, guarded)
    scale, notes = _find_scale(trace)
    if undeclared:
        notes += (f"axes that belong to no plate are summed: {undeclared}",)
    if enumerated:
        rest = "" if is_empty else ": latents are the other sites"
        notes += (f"discrete sites {enumerated} are summed out{rest}",)
    nodes = {site.name: trace.nodes[site.name] for site in sites}
    improper = [name for name, node in nodes.items() if is_flat(node) or is_improper(node["fn"])]
    for name, node in nodes.items():
        if name not in improper:
            check_normalized(f'latent site "{name}"', node["fn"])
    if improper:
        notes += (f"a normalizer, not log p(x): the prior of {improper} is improper",)
    unsampled = [name for name, node in nodes.items() if not can_be_sampled(node["fn"])]
    dims = [
        frame.dim
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in plate_frames(site).values()
    ]
    device = next(site["unscaled_log_prob"].device for _, site in density_sites(trace))
    layout = Layout(
        sites=tuple(sites),
        batch=batch,
        dtype=_dtype(trace, sites),
        device=device,
        enumerated=tuple(enumerated),
        max_plate_nesting=-min(dims, default=0),
        scale=scale,
        is_static=is_static,
        guarded=guarded,
        observed={
            name: torch.as_tensor(site["value"], device=device).detach()
            for name, site in observed_sites(trace).items()
            if not is_factor(site)
        },
        improper=tuple(dict.fromkeys([*improper, *unsampled])),
        loops={
            frame.name: list(range(frame.size))
            for site in trace.nodes.values()
            if site["type"] == "sample"
            for frame in site["cond_indep_stack"]
            if not frame.vectorized and frame.name in trace.nodes
        },
        notes=notes,
        unread=unread_sites(model, model_args, trace, second[0]),
    )
    if is_empty:
        raise NothingToAnneal(layout)
    return layout


def inspect_again(
    layout: Layout,
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    model_args: Arguments,
    guide_args: Arguments,
) -> Layout | None:
    """Looks at everything in a layout that depends on the values of data and parameters.

    One run of the model and the guide, for data of the shapes for which the layout was made.

    Args:
        layout: From :func:`inspect_model`.
        model: Pyro model with its observations.
        guide: Pyro guide, or None for the prior.
        model_args: ``(args, kwargs)`` of the model.
        guide_args: ``(args, kwargs)`` of the guide.

    Returns:
        The layout of the new data; None where more differs than values.

    Raises:
        ValueError: If an observed value lies outside its support.
    """
    with torch.no_grad(), poutine.block(), validation_disabled():
        try:
            trace, _ = _trace_pair(model, guide, model_args, guide_args)
            check_log_probs(trace)
        except (ValueError, RuntimeError):  # to be explained by a full inspection
            return None
        check_plates(trace)
        latents = latent_sites(trace)
        if set(latents) != {*(site.name for site in layout.sites), *layout.enumerated}:
            return None
        sites = [
            _make_site(old.name, latents[old.name], layout.batch, old.start)
            for old in layout.sites
        ]
        if any(_shape(new) != _shape(old) for new, old in zip(sites, layout.sites, strict=True)):
            return None
        values = {
            name: torch.as_tensor(site["value"], device=layout.device).detach()
            for name, site in observed_sites(trace).items()
            if not is_factor(site)
        }
        same = {n: v.shape for n, v in values.items()} == {
            n: v.shape for n, v in layout.observed.items()
        }
        scale, notes = _find_scale(trace)
        same &= scale == layout.scale and set(notes) <= set(layout.notes)
        if not same or _dtype(trace, sites) != layout.dtype:
            return None
    _check_observed(model, model_args, trace, layout.guarded)
    return replace(layout, sites=tuple(sites), observed=values)


def _shape(site: Site) -> tuple[Any, ...]:
    """Collects what a site must share with another to take its place."""
    sizes = (site.batch_shape, site.event_shape, site.unconstrained_shape, site.batch_axes)
    kinds = (type(site.transform), type(site.support), site.dtype)
    return (*sizes, *kinds, site.plates, site.start, site.stop)


def _undeclared(trace: Any, enumerated: Sequence[str]) -> str:
    """Describes the axes that belong to no plate."""
    found = []
    for name, site in density_sites(trace):
        axes = undeclared_axes(name, site, enumerated=bool(enumerated))
        if axes:
            found.append(f'{axes} of site "{name}"')
    return ", ".join(found)


def _dtype(trace: Any, sites: Sequence[Site]) -> torch.dtype:
    """Finds the precision to compute in: the widest of all latents and log densities."""
    dtypes = [site["unscaled_log_prob"].dtype for _, site in density_sites(trace)]
    widest: torch.dtype = functools.reduce(
        torch.promote_types, [*dtypes, *[site.dtype for site in sites]]
    )
    return widest


def _draw_two(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    model_args: Arguments,
    guide_args: Arguments,
    num_tries: int,
) -> tuple[tuple[Any, Any | None], tuple[Any, Any | None]]:
    """Traces model and guide twice; where some draws have no density, looks for two that have."""
    traces: list[tuple[Any, Any | None]] = []
    for attempt in range(num_tries):
        try:
            traces.append(_trace_pair(model, guide, model_args, guide_args))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            if attempt == num_tries - 1:
                raise
        if len(traces) == 2:
            break
    return traces[0], traces[-1]
