"""Observed values under a mask: what is masked is never evaluated, so that NaN there does no harm.

A mask multiplies a log density by zero after the fact. The term of a NaN is then zero, but its
gradient is zero times NaN. Here masked entries are filled with a value inside the support first,
for the log density only: what the model itself reads stays as it is.
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor

from .sites import base_distribution, is_factor, is_wrapper, observed_sites, unmasked
from .supports import bijection_onto, normalized_support
from .types import Distribution, Node, Trace

__all__ = ["check_filled", "check_masked", "fill_masked", "reads_nan_as_missing"]


def reads_nan_as_missing(fn: Distribution) -> bool:
    """Tells whether a distribution takes NaN for a missing value."""
    kinds = (dist.NanMaskedNormal, dist.NanMaskedMultivariateNormal)
    return isinstance(base_distribution(fn), kinds)


def fill_masked(trace: Trace) -> None:
    """Fills observed values of a trace where masks are False, before log densities are computed.

    Args:
        trace: A run of the model; its nodes are changed, and no tensor.
    """
    for name, site in observed_sites(trace).items():
        mask, value = _mask(site), site["value"]
        if mask is None or not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        inside = _inside(site["fn"], value)
        if inside is not None:
            trace.nodes[name]["value"] = torch.where(mask, value, inside)


def check_masked(trace: Trace) -> None:
    """Checks that NaN stands under masks alone, and in values alone.

    Raises:
        ValueError: If an observed value is NaN without a mask, or a masked term is NaN by a
            parameter, since its gradient would be NaN in spite of the mask.
    """
    for name, site in observed_sites(trace).items():
        mask, value, fn = _mask(site), site["value"], unmasked(site["fn"])
        _check_unmasked(name, site, mask)
        if mask is None or not isinstance(value, Tensor) or bool(mask.all()):
            continue
        inside = _inside(fn, value) if value.is_floating_point() else None
        log_prob = fn.log_prob(value if inside is None else torch.where(mask, value, inside))
        _check_terms(name, fn, log_prob, mask)


def check_filled(trace: Trace) -> None:
    """Checks that the terms under masks are finite, once their values are filled.

    Args:
        trace: A run of the model after :func:`fill_masked`, with its log densities.

    Raises:
        ValueError: If a masked term is NaN by a parameter, since its gradient would be NaN in spite
            of the mask.
    """
    for name, site in observed_sites(trace).items():
        mask = _mask(site)
        if mask is None:
            continue
        fn = unmasked(site["fn"])
        hidden = fn is not site["fn"]  # the distribution's own mask is in its log density
        log_prob = fn.log_prob(site["value"]) if hidden else site["unscaled_log_prob"]
        _check_terms(name, fn, log_prob.detach(), mask)


def _check_terms(name: str, fn: Distribution, log_prob: Tensor, mask: Tensor) -> None:
    wrong = log_prob.isnan()
    outer = mask.reshape(*mask.shape[: mask.dim() - fn.event_dim], -1).all(-1)
    wrong = wrong & ~outer.expand(wrong.shape)
    if bool(wrong.any()):
        raise ValueError(
            f'at site "{name}" the log density is NaN at {int(wrong.sum())} masked place(s): a '
            "mask makes such a term zero, but not its gradient; fill the NaN among the "
            "distribution's parameters (x.nan_to_num(), say), or leave those rows out"
        )


def _check_unmasked(name: str, site: Node, mask: Tensor | None) -> None:
    value = site["value"]
    if is_factor(site) or not isinstance(value, Tensor) or not value.is_floating_point():
        return
    missing = value.isnan() if mask is None else value.isnan() & mask
    excused = reads_nan_as_missing(site["fn"]) or site["mask"] is False
    if bool(missing.any()) and not excused and bool(site["unscaled_log_prob"].isnan().any()):
        index = missing.nonzero()[0].tolist()
        first = f" (the first at index {index})" if index else ""
        raise ValueError(
            f'at site "{name}" {int(missing.sum())} observed value(s) are NaN and not masked'
            f"{first}: "
            "check the data for NaN, leave those rows out, or mask them "
            "(poutine.mask(mask=~x.isnan()))"
        )


def _mask(site: Node) -> Tensor | None:
    """Combines the masks of a site, in the shape of its value; None if no tensor is among them."""
    value, fn = site["value"], site["fn"]
    if is_factor(site) or not isinstance(value, Tensor):
        return None
    found = [(site["mask"], fn.event_dim)]
    while is_wrapper(fn):
        found.append((getattr(fn, "_mask", None), fn.event_dim))
        fn = fn.base_dist
    masks = [
        mask.reshape(mask.shape + (1,) * event_dim)
        for mask, event_dim in found
        if isinstance(mask, Tensor)
    ]
    if not masks:
        return None
    shape = torch.broadcast_shapes(value.shape, *[mask.shape for mask in masks])
    combined = torch.ones(shape, dtype=torch.bool, device=value.device)
    for mask in masks:
        combined = combined & mask
    return combined


def _inside(fn: Distribution, value: Tensor) -> Tensor | None:
    """Finds a value inside the support, without gradient, or None where no way to it is known."""
    try:
        support = normalized_support(fn)
        if support.is_discrete:
            return torch.zeros_like(value)
        transform = bijection_onto(support)
        shape = transform.inverse_shape(value.shape)
        zero = torch.zeros(shape, dtype=value.dtype, device=value.device)
        inside: Tensor = transform(zero).detach()
    except (AttributeError, NotImplementedError, RuntimeError, ValueError):
        return None
    return inside
