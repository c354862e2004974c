"""Log densities of many bits, in half the passes over memory.

Images and belief nets have a ``Bernoulli`` of logits over an event of hundreds of bits, whose log
density is a good part of a training step: torch makes six tensors of the size of the logits on the
way forward and four on the way back. Here it is one and one, to the same rounding.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from .sites import density_sites
from .types import Node, Trace

__all__ = ["log_prob_of_bits", "score_parts_of_bits"]

_THRESHOLD = 50.0  # beyond it log(1 + e^u) is u in double precision


class _LogProb(torch.autograd.Function):
    """Computes ``sum_i log sigmoid((2 x_i - 1) l_i)`` over the last axis."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, bits: Tensor) -> Tensor:
        ctx.save_for_backward(logits, bits)
        surprise = (1.0 - 2.0 * bits) * logits
        # In place: new memory costs as much as the arithmetic.
        torch.ops.aten.softplus.out(surprise, 1.0, _THRESHOLD, out=surprise)
        return -surprise.sum(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, bits = ctx.saved_tensors
        grad = grads[0].unsqueeze(-1)
        if torch.is_grad_enabled():  # to be differentiated again
            return (bits - logits.sigmoid()) * grad, None
        rates = _collapsed(logits).sigmoid()
        if rates.shape != logits.shape:
            return (rates - bits) * -grad, None
        return rates.sub_(bits).mul_(-grad), None


def _collapsed(values: Tensor) -> Tensor:
    """Undoes an expansion, such as that of a distribution in the plate of particles."""
    for axis, (size, stride) in enumerate(zip(values.shape, values.stride(), strict=True)):
        if stride == 0 and size > 1:
            values = values.narrow(axis, 0, 1)
    return values


def log_prob_of_bits(trace: Trace, known: Collection[int] = ()) -> list[str]:
    r"""Computes the log densities of a trace's sites that are events of bits.

    .. math:: \log p(x) = -\sum_i \log\bigl(1 + e^{(1 - 2 x_i) l_i}\bigr)

    That is what ``Bernoulli(logits=l).to_event(n).log_prob(x)`` is; Pyro keeps what it finds in a
    trace. Sites whose values are not validated, and may be grey, are left to Pyro, and so are those
    whose values are wrong, for its error.

    Args:
        trace: A run of a model without log densities yet; its nodes are changed.
        known: Identities of values that are known to be bits.

    Returns:
        Names of these sites.
    """
    names = []
    for name, found in density_sites(trace):
        if "log_prob" in found or not _is_event_of_bits(found, known):
            continue
        site = trace.nodes[name]
        fn, bits = site["fn"], site["value"]
        count = fn.reinterpreted_batch_ndims
        logits = fn.base_dist.logits
        log_prob = _LogProb.apply(logits.flatten(-count), bits.flatten(-count))  # type: ignore[no-untyped-call]
        site["unscaled_log_prob"] = log_prob
        site["log_prob"] = scale_and_mask(log_prob, site["scale"], site["mask"])
        site["log_prob_sum"] = site["log_prob"].sum()
        names.append(name)
    return names


def score_parts_of_bits(trace: Trace, known: Collection[int] = ()) -> None:
    """Computes the log densities of a guide's sites that are events of bits, which are scores too.

    Args:
        trace: A run of a guide without log densities yet; its nodes are changed.
        known: Identities of values that are known to be bits, such as those that a model was given.
    """
    for name in log_prob_of_bits(trace, known):
        site = trace.nodes[name]
        parts = ScoreParts(site["unscaled_log_prob"], site["unscaled_log_prob"], 0)
        site["score_parts"] = parts.scale_and_mask(site["scale"], site["mask"])


def _is_event_of_bits(site: Node, known: Collection[int]) -> bool:
    """Tells whether a site is a plain event of valid bits with logits, in every particle its own."""
    fn, bits = site["fn"], site["value"]
    if type(fn) is not dist.Independent or type(fn.base_dist) is not dist.Bernoulli:
        return False
    base, count = fn.base_dist, fn.reinterpreted_batch_ndims
    if "logits" not in base.__dict__ or not base._validate_args or site["args"] or site["kwargs"]:
        return False
    logits: Tensor = base.logits
    if not isinstance(bits, Tensor) or bits.requires_grad or bits.dtype != logits.dtype:
        return False
    if bits.shape[-count:] != logits.shape[-count:] or bits.dim() > logits.dim():
        return False
    axes = zip(reversed(bits.shape), reversed(logits.shape), strict=False)
    if any(size not in (1, whole) for size, whole in axes):  # which Pyro explains
        return False
    if id(bits) not in known:
        try:
            base._validate_sample(bits)
        except ValueError:  # likewise
            return False
    return True
