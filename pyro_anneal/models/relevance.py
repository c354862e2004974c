"""Latents that no observation depends on, directly or through other latents.

The posterior of such a site is its prior: the evidence is what it would be without it. That is
right for the model as written, but seldom what its author meant: the model of
``contrib.gp.models.VariationalGP``, say, has a likelihood that reads parameters in place of its
latent function.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from .discrete import is_discrete
from .sites import latent_sites, mark_points, observed_sites
from .types import Arguments, Distribution, Fn, Message, Node, Trace
from .validation import validation_disabled

__all__ = ["unread_sites"]


_MOST_RUNS = 200  # of the model, where gradients do not tell


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
    these densities at all is read, be it through a branch, a comparison or another library.

    Args:
        model: Pyro model.
        arguments: Its ``(args, kwargs)``.
        first: A trace of it.
        second: Another, from which other values are taken.

    Returns:
        Names of sites. What ``obs_mask`` leaves unobserved does not count.
    """
    names = [name for name in latent_sites(first) if not _is_missing_data(name, first)]
    values = {name: _value(first, name) for name in latent_sites(first)}
    try:
        read = _read_by_gradient(model, arguments, values)
    except Exception:  # noqa: BLE001 - whatever a model raises that leaves torch
        read = set()
    left = [name for name in names if name not in read]
    others: list[dict[str, Tensor]] = [{}, {}]
    for name, value in values.items():
        pair = _neighbours(first.nodes[name]["fn"], value) or (_value(second, name), -value)
        for other, moved in zip(others, pair, strict=True):
            other[name] = moved
    if not left or len(left) * len(others) > _MOST_RUNS:
        return ()
    return _unread_by_value(model, arguments, values, others, left, read)


def _neighbours(fn: Distribution, value: Tensor) -> tuple[Tensor, Tensor] | None:
    """Finds two other values for every element of a discrete site; None if it is none."""
    if not is_discrete(fn) or fn.event_shape:
        return None
    if not fn.has_enumerate_support:
        return value + 1, (value - 1).abs()
    states = fn.enumerate_support(expand=False).reshape(-1).to(value.dtype)
    index = (value.unsqueeze(-1) == states).to(torch.uint8).argmax(-1)
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
