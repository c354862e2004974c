"""Latents that no observation depends on, directly or through other latents.

The posterior of such a site is its prior: the evidence is what it would be without it. That is
right for the model as written, but seldom what its author meant: the model of
``contrib.gp.models.VariationalGP``, say, has a likelihood that reads parameters in place of its
latent function.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.poutine.messenger import Messenger
from torch import Tensor

from .discrete import is_discrete
from .sites import base_distribution, latent_sites, mark_points, observed_sites
from .types import Arguments, Distribution, Fn, Message, Node, Trace
from .validation import validation_disabled

__all__ = ["unread_sites"]


_MOST_RUNS = 200  # of the model, where gradients do not tell
# Places at which discrete sites are moved, all by as many states and each by its own number, and how
# many standard deviations continuous ones are moved.
_NUM_SHIFTS, _NUM_MIXED, _FAR = 12, 6, 5.0


class _Put(Messenger):  # type: ignore[misc]
    """Puts values at latent sites, which stay latent."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Message) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


def unread_sites(model: Fn, arguments: Arguments, first: Trace, second: Trace) -> tuple[str, ...]:
    """Names the latents that reach no observed site.

    A site is read where the gradient of an observed site's log density with respect to its value is
    not zero, or that of the prior of another site that is read: parents count by their children.
    Where no gradient shows it, values are put in place of each other: a site that changes any of
    these densities at all is read, be it through a branch, a comparison or another library. All that
    is repeated at other values of the latents, until nothing is left.

    Args:
        model: Pyro model.
        arguments: Its ``(args, kwargs)``.
        first: A trace of it.
        second: Another, from which other values are taken.

    Returns:
        Names of sites. What ``obs_mask`` leaves unobserved does not count.
    """
    names = [name for name in latent_sites(first) if not _is_missing_data(name, first)]
    left, spent = names, 0
    for values in _places(first, second):
        try:
            read = _read_by_gradient(model, arguments, values)
        except Exception:  # noqa: BLE001 - whatever a model raises that leaves torch
            read = set()
        left = [name for name in left if name not in read]
        others: list[dict[str, Tensor]] = [{}, {}]
        for name, value in values.items():
            pair = _neighbours(first.nodes[name]["fn"], value) or (_value(second, name), -value)
            for other, moved in zip(others, pair, strict=True):
                other[name] = moved
        if not left or len(left) * len(others) > _MOST_RUNS:
            return ()
        read |= set(names) - set(left)
        spent += 2 + len(left) * len(others)
        with contextlib.suppress(Exception):  # values that the model does not accept
            left = list(_unread_by_value(model, arguments, values, others, left, read))
        if not left or spent > _MOST_RUNS:
            break
    return tuple(left)


def _places(first: Trace, second: Trace) -> Iterator[dict[str, Tensor]]:
    """Yields values of all latents: where discrete ones are zero, others may matter to nothing.

    The component of a mixture that no draw of the prior belongs to is an example, a slab whose
    indicators are rarely one another. So discrete sites are moved, and continuous ones put far out.
    """
    values = {name: _value(first, name) for name in latent_sites(first)}
    yield values
    yield {name: _value(second, name) for name in values}

    def far(values: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        return {n: _far(first.nodes[n]["fn"], value, factor) for n, value in values.items()}

    yield from (far(values, factor) for factor in (_FAR, -_FAR))
    discrete = {name for name in values if is_discrete(first.nodes[name]["fn"])}
    if not discrete:
        return
    generator = torch.Generator().manual_seed(0)
    for count in range(1, 1 + _NUM_SHIFTS + _NUM_MIXED):
        moved = dict(values)
        for name in discrete:
            fn, value = first.nodes[name]["fn"], values[name]
            by = torch.tensor(count)
            if count > _NUM_SHIFTS:
                by = torch.randint(_NUM_SHIFTS, value.shape, generator=generator)
            moved[name] = _shifted(fn, value, by.to(value.device))
        yield moved
        if count == 1 or count > _NUM_SHIFTS:
            yield from (far(moved, factor) for factor in (_FAR, -_FAR))


def _far(fn: Distribution, value: Tensor, factor: float) -> Tensor:
    """Moves a number on the line far out."""
    try:
        base = base_distribution(fn)
        if base.support is not constraints.real:
            return value
        scale = base.stddev
    except NotImplementedError:
        return value
    return value + factor * torch.where(scale.isfinite(), scale, value.abs())


def _shifted(fn: Distribution, value: Tensor, by: Tensor) -> Tensor:
    """Moves a discrete site by a number of states, around where they end."""
    fn = base_distribution(fn)
    if fn.event_shape:
        return value.roll(int(by.flatten()[0]), -1)
    if not fn.has_enumerate_support:
        return value + by.to(value.dtype)
    states, index = _states(fn, value)
    return states[(index + by) % len(states)]


def _states(fn: Distribution, value: Tensor) -> tuple[Tensor, Tensor]:
    """Lists the states of a discrete site, and where a value is among them."""
    states = fn.enumerate_support(expand=False).reshape(-1).to(value.dtype)
    return states, (value.unsqueeze(-1) == states).to(torch.uint8).argmax(-1)


def _neighbours(fn: Distribution, value: Tensor) -> tuple[Tensor, Tensor] | None:
    """Finds two other values for every element of a discrete site; None if it is none."""
    if not is_discrete(fn) or fn.event_shape:
        return None
    if not fn.has_enumerate_support:
        return value + 1, (value - 1).abs()
    states, index = _states(fn, value)
    return states[(index + 1) % len(states)], states[index - 1]


def _value(trace: Trace, name: str) -> Tensor:
    value: Tensor = trace.nodes[name]["value"]
    return value.detach()


def _is_missing_data(name: str, trace: Trace) -> bool:
    """Tells whether a site holds the values that ``obs_mask`` says are missing."""
    whole, ends = name.removesuffix("_unobserved"), name.endswith("_unobserved")
    return ends and f"{whole}_observed" in trace.nodes


def _trace(
    model: Fn, arguments: Arguments, values: Mapping[str, Tensor]
) -> tuple[dict[str, Node], dict[str, Node]]:
    """Runs the model at given values; returns its latent and its observed sites."""
    args, kwargs = arguments
    with validation_disabled(), poutine.block(), _Put(values):
        trace = poutine.trace(model).get_trace(*args, **kwargs)
        mark_points(trace)
        trace.compute_log_prob()
    return latent_sites(trace), observed_sites(trace)


def _read_by_gradient(model: Fn, arguments: Arguments, values: Mapping[str, Tensor]) -> set[str]:
    """Follows gradients from the observed sites up, generation by generation."""
    with torch.enable_grad():
        leaves = {
            name: value.clone().requires_grad_()
            for name, value in values.items()
            if value.is_floating_point()
        }
        latents, observed = _trace(model, arguments, {**values, **leaves})
        read: set[str] = set()
        terms = [site["unscaled_log_prob"].sum() for site in observed.values()]
        while terms:
            total = torch.stack([term.double() for term in terms]).sum()
            rest = [name for name in leaves if name not in read]
            if not total.requires_grad or not rest:
                break
            grads = torch.autograd.grad(
                total, [leaves[name] for name in rest], retain_graph=True, allow_unused=True
            )
            found = [
                n for n, g in zip(rest, grads, strict=True) if g is not None and bool(g.any())
            ]
            read |= set(found)
            terms = [latents[name]["unscaled_log_prob"].sum() for name in found if name in latents]
    return read


def _unread_by_value(
    model: Fn,
    arguments: Arguments,
    values: Mapping[str, Tensor],
    others: list[dict[str, Tensor]],
    left: list[str],
    read: set[str],
) -> tuple[str, ...]:
    """Puts other values in place of those of single sites, and sees which densities change."""
    with torch.no_grad():
        changes: dict[str, set[str]] = {name: set() for name in left}
        latents, observed = _trace(model, arguments, values)
        before = latents | observed
        for name in left:
            for other in others:
                try:
                    now = _trace(model, arguments, {**values, name: other[name]})
                except Exception:  # noqa: BLE001 - a value that the model does not accept
                    changes[name] |= set(before)
                    continue
                after = now[0] | now[1]
                changes[name] |= {
                    key for key in after if key not in before or _differ(after[key], before[key])
                }
    known = set(observed) | read | (set(values) - set(left))
    while True:
        found = {name for name in left if name not in known and (changes[name] - {name}) & known}
        if not found:
            return tuple(name for name in left if name not in known)
        known |= found


def _differ(site: Node, before: Node) -> bool:
    one, two = site["unscaled_log_prob"], before["unscaled_log_prob"]
    return one.shape != two.shape or not bool(((one == two) | (one.isnan() & two.isnan())).all())
