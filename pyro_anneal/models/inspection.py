"""Runs a model and a guide a few times, and checks and works out their layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from pyro import poutine

from .checks import (
    check_latents,
    check_log_probs,
    check_plates,
    check_structure,
)
from .layouts import (
    describe_undeclared,
    find_batch,
    find_scale,
    loops_of,
    make_site,
    observed_values,
    plate_nesting,
    widest_dtype,
)
from .masked import check_masked
from .mass import check_domains, check_normalized
from .moving import check_observed, has_bounds, moving_supports, supports_are_static
from .relevance import unread_sites
from .sites import (
    BatchPlate,
    Layout,
    Site,
    density_sites,
    is_flat,
    is_partly_masked,
    latent_sites,
)
from .supports import can_be_sampled, is_improper
from .tracing import draw_two, trace_pair
from .types import Arguments, Fn, Trace
from .validation import validation_disabled

__all__ = ["NothingToAnneal", "inspect_model"]


class NothingToAnneal(ValueError):
    """A model has no latent that chains could move: its log evidence is its log density."""

    def __init__(self, layout: Layout) -> None:
        what = "enumerated sites only" if layout.enumerated else "no latent site"
        super().__init__(
            f"the model has {what}, so there is nothing to anneal: its log evidence is the log "
            "density itself, which run() and log_evidence return"
        )
        self.layout = layout  # without sites


def inspect_model(
    model: Fn,
    guide: Fn | None,
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
        first, second = draw_two(model, guide, model_args, guide_args, num_tries)
        trace, guide_trace = first
        check_plates(trace)
        if guide_trace is not None:
            check_plates(guide_trace)
        enumerated = check_latents(trace, guide_trace)
        check_structure(trace, second[0])
        check_log_probs(trace)
        check_masked(trace)
        undeclared = describe_undeclared(trace, enumerated)
        batch = find_batch(trace, guide_trace, batch_plates)
        sites = _make_sites(trace, batch, enumerated)
        names = [site.name for site in sites]
        is_static = not sites or supports_are_static(model, model_args, trace, second[0], names)
        guarded = moving_supports(trace, second[0])
        guarded += tuple(site.name for site in sites if has_bounds(site))
    check_observed(model, model_args, trace, guarded)
    scale, notes = find_scale(trace)
    if undeclared:
        notes += (f"axes that belong to no plate are summed: {undeclared}",)
    if enumerated:
        rest = ": latents are the other sites" if sites else ""
        notes += (f"discrete sites {enumerated} are summed out{rest}",)
    improper, unsampled = _check_priors(trace, sites)
    if improper:
        notes += (f"a normalizer, not log p(x): the prior of {improper} is improper",)
    notes += _masked(trace, sites)
    device = next(site["unscaled_log_prob"].device for _, site in density_sites(trace))
    layout = Layout(
        sites=tuple(sites),
        batch=batch,
        dtype=widest_dtype(trace, sites),
        device=device,
        enumerated=tuple(enumerated),
        max_plate_nesting=plate_nesting(trace),
        scale=scale,
        is_static=is_static,
        guarded=guarded,
        observed=observed_values(trace, device),
        improper=tuple(dict.fromkeys([*improper, *unsampled])),
        loops=loops_of(trace),
        notes=notes,
        unread=unread_sites(model, model_args, trace, second[0]),
    )
    if not sites:
        raise NothingToAnneal(layout)
    return layout


def _make_sites(
    trace: Trace, batch: Sequence[BatchPlate], enumerated: Sequence[str]
) -> list[Site]:
    """Gives every latent that is not summed out its place in the vector."""
    sites: list[Site] = []
    for name, site in latent_sites(trace).items():
        if name not in enumerated:
            sites.append(make_site(name, site, batch, sites[-1].stop if sites else 0))
    if sites and sites[-1].stop == 0:
        raise ValueError(
            f"the latent sites {[site.name for site in sites]} have no elements, so there is "
            "nothing to anneal: leave them out, and run() returns the log density itself"
        )
    return sites


def _masked(trace: Trace, sites: Sequence[Site]) -> tuple[str, ...]:
    """Says whose masks are left out."""
    masked = [
        site.name
        for site in sites
        if is_partly_masked(trace.nodes[site.name]) and not site.name.endswith("_unobserved")
    ]
    if not masked:
        return ()
    left_out = f"masks of latent sites {masked} are left out: all elements have their prior"
    return (f"{left_out} (a constant mask=False makes a prior flat)",)


def _check_priors(trace: Trace, sites: Sequence[Site]) -> tuple[list[str], list[str]]:
    """Names the sites whose priors are improper, and those that have no draws; checks the rest."""
    nodes = {site.name: trace.nodes[site.name] for site in sites}
    improper = [name for name, node in nodes.items() if is_flat(node) or is_improper(node["fn"])]
    for name, node in nodes.items():
        if name not in improper:
            check_domains(f'latent site "{name}"', node["fn"])
            check_normalized(f'latent site "{name}"', node["fn"])
    return improper, [name for name, node in nodes.items() if not can_be_sampled(node["fn"])]


def inspect_again(
    layout: Layout,
    model: Fn,
    guide: Fn | None,
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
            trace, _ = trace_pair(model, guide, model_args, guide_args)
            check_log_probs(trace)
        except (ValueError, RuntimeError):  # to be explained by a full inspection
            return None
        check_plates(trace)
        latents = latent_sites(trace)
        if set(latents) != {*(site.name for site in layout.sites), *layout.enumerated}:
            return None
        sites = [
            make_site(old.name, latents[old.name], layout.batch, old.start) for old in layout.sites
        ]
        if any(_shape(new) != _shape(old) for new, old in zip(sites, layout.sites, strict=True)):
            return None
        values = observed_values(trace, layout.device)
        same = {n: v.shape for n, v in values.items()} == {
            n: v.shape for n, v in layout.observed.items()
        }
        scale, notes = find_scale(trace)
        same &= scale == layout.scale and set(notes) <= set(layout.notes)
        if not same or widest_dtype(trace, sites) != layout.dtype:
            return None
    check_observed(model, model_args, trace, layout.guarded)
    return replace(layout, sites=tuple(sites), observed=values)


def _shape(site: Site) -> tuple[object, ...]:
    """Collects what a site must share with another to take its place."""
    sizes = (site.batch_shape, site.event_shape, site.unconstrained_shape, site.batch_axes)
    kinds = (type(site.transform), type(site.support), site.dtype)
    return (*sizes, *kinds, site.plates, site.start, site.stop)
