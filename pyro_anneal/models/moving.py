"""Supports that move with other latents, and observed values beyond their support."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from .checks import (
    outside_support,
)
from .coordinates import bijection
from .discrete import DiscreteMap, is_discrete, support_edges
from .sites import (
    Site,
    base_distribution,
    observed_sites,
)
from .tracing import trace_of
from .types import Arguments, Distribution, Fn, Trace
from .validation import validation_disabled

__all__ = [
    "check_observed",
    "has_bounds",
    "log_prob_inside",
    "moving_supports",
    "supports_are_static",
    "supports_differ",
]


_MOST_STATES = 20  # of a discrete site, at each of which the model is run once


def _support_images(trace: Trace, names: Sequence[str]) -> list[Tensor]:
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
    model: Fn, arguments: Arguments, first: Trace, second: Trace, names: Sequence[str]
) -> bool:
    """Tells whether no site's support depends on another latent.

    Two draws of the latents must give the same supports, and autograd must find no path from a
    latent to a support: ``Uniform(0, top.clamp(min=4))`` has the same support at most draws. An
    integer has no gradient, so that its other values are put in its place.

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
    if _move_with_integers(model, arguments, first, latents):
        return False
    with torch.enable_grad():
        continuous = [value for value in latents.values() if value.is_floating_point()]
        for value in continuous:
            value.requires_grad_(True)
        try:
            trace = trace_of(poutine.condition(model, data=latents), arguments)
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


def _move_with_integers(
    model: Fn, arguments: Arguments, first: Trace, latents: Mapping[str, Tensor]
) -> bool:
    """Tells whether a support is another one at other values of some discrete latent."""
    names = list(latents)
    known = _support_images(first, names)
    for name, value in latents.items():
        for other in _other_values(first.nodes[name]["fn"], value):
            conditioned = poutine.condition(model, data={**latents, name: other})
            try:
                images = _support_images(trace_of(conditioned, arguments), names)
            except (ArithmeticError, KeyError, RuntimeError, ValueError):
                return True  # a value that changes more, or fails: nothing is proven
            pairs = zip(known, images, strict=True)
            if not all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs):
                return True
    return False


def _other_values(fn: Distribution, value: Tensor) -> Iterator[Tensor]:
    """Moves every element of a discrete site on, through all of its states or to neighbours."""
    if not is_discrete(fn) or fn.event_shape:
        return
    if not fn.has_enumerate_support:
        yield from (torch.zeros_like(value), value + 1, value + 20)
        return
    states = fn.enumerate_support(expand=False).reshape(-1).to(value.dtype)
    index = (value.unsqueeze(-1) == states).to(torch.uint8).argmax(-1)
    for step in range(1, min(len(states), _MOST_STATES)):
        yield states[(index + step) % len(states)]


def check_observed(model: Fn, arguments: Arguments, trace: Trace, guarded: Sequence[str]) -> None:
    """Refuses observed values outside their support, unless the user switched validation off."""
    found = {name: text for name, text in outside_support(trace).items() if name not in guarded}
    if not found:
        return
    # the trace at hand has validation switched off everywhere: look at the user's own setting
    with torch.no_grad(), poutine.block(), torch.random.fork_rng(devices=()):
        validated = trace_of(model, arguments)
    for name, text in found.items():
        if base_distribution(validated.nodes[name]["fn"])._validate_args:
            raise ValueError(text)


def moving_supports(first: Trace, second: Trace) -> tuple[str, ...]:
    """Names observed sites whose support depends on latents.

    There a value may be impossible for some latents only, where torch, with validation off, may
    give a finite density (``Pareto`` does).
    """
    return tuple(
        name
        for name, site in observed_sites(first).items()
        if supports_differ(
            site["fn"], second.nodes[name]["fn"], getattr(site["value"], "device", None)
        )
    )


def supports_differ(
    first: Distribution, second: Distribution, device: torch.device | None = None
) -> bool:
    """Tells whether two distributions of one site, at other latents, have supports that differ.

    Example:
        >>> supports_differ(dist.Uniform(0.0, 1.0), dist.Uniform(0.0, 2.0))
        True
        >>> supports_differ(dist.Gamma(1.0, 1.0), dist.Gamma(2.0, 1.0))
        False
    """
    images = []
    for fn in (first, second):
        try:
            if is_discrete(fn):
                images.append(support_edges("", fn))
                continue
            transform = biject_to(fn.support)
            shape = transform.inverse_shape(fn.batch_shape + fn.event_shape)
            images.append(transform(torch.zeros(shape, device=device)))
        except (AttributeError, NotImplementedError, RuntimeError, ValueError):  # none
            continue
    return len(images) == 2 and not torch.equal(*images)


def log_prob_inside(fn: Distribution, value: Tensor) -> Tensor:
    """Computes a log density that is -inf outside the support, where torch may give a finite one.

    Example:
        >>> log_prob_inside(dist.Pareto(torch.tensor([1.0, 3.0]), 1.0), torch.tensor(2.0))
        tensor([-1.3863,    -inf])
    """
    with validation_disabled():
        log_prob = fn.log_prob(value)
    return torch.where(fn.support.check(value), log_prob, -torch.inf)


def has_bounds(site: Site) -> bool:
    """Tells whether a latent is an integer, whose family may give a density beyond its support."""
    return isinstance(site.transform, DiscreteMap) and site.transform.kind == "integer"
