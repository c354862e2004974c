"""Sums over enumerated sites, by message passing within plates: one for runs and losses alike."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from torch import Tensor

from .sites import plate_frames
from .types import Node, Trace

__all__ = ["Summed", "sum_out"]


class Summed(NamedTuple):
    """Log densities of some sites of a trace, enumerated sites summed out of their product.

    All of them are in the dimensions of the sites: those of plates, and none of enumeration.
    """

    terms: list[Tensor]  # what the sums leave
    summed: tuple[str, ...]  # sites that depend on an enumerated one: their product is in terms
    plain: tuple[str, ...]  # the other sites


def sum_out(
    trace: Trace,
    sites: Iterable[tuple[str, Node]],
    enumerated: Iterable[str],
    log_prob: Callable[[Node], Tensor],
) -> Summed:
    """Sums enumerated sites out of the product of some sites' densities.

    Args:
        trace: Trace that was run under ``poutine.enum``.
        sites: The sites whose densities are multiplied, by name.
        enumerated: Names of the enumerated sites.
        log_prob: Returns the log density of a site, masked, and not scaled: a power of a sum is
            no sum, so that scales act on what comes out.

    Returns:
        The sums, and which sites are in them.
    """
    trace.symbolize_dims()
    sum_dims: set[str] = set()
    for name in enumerated:
        infer = trace.nodes[name]["infer"]
        sum_dims.add(infer["_dim_to_symbol"][infer["_enumerate_dim"]])
    factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    symbol_to_dim: dict[str, int] = {}
    summed, plain = [], []
    for name, site in sites:
        frames = plate_frames(site).values()
        symbol_to_dim.update({trace.plate_to_symbol[f.name]: f.dim for f in frames})
        term = packed.pack(log_prob(site), site["infer"]["_dim_to_symbol"])
        if sum_dims.isdisjoint(term._pyro_dims):
            plain.append(name)
            continue
        ordinal = frozenset(trace.plate_to_symbol[frame.name] for frame in frames)
        factors.setdefault(ordinal, []).append(term)
        summed.append(name)
    kinds = [term.dtype for terms in factors.values() for term in terms]
    if len(set(kinds)) > 1:  # latents in one precision and data in another
        widest = functools.reduce(torch.promote_types, kinds)
        for terms in factors.values():
            terms[:] = [_in_dtype(term, widest) for term in terms]
    trees = contract_tensor_tree(factors, sum_dims, cache={}).values() if factors else ()
    terms = [packed.unpack(term, symbol_to_dim) for tree in trees for term in tree]
    return Summed(terms, tuple(summed), tuple(plain))


def _in_dtype(term: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts a factor and keeps the names of its dimensions."""
    converted = term.to(dtype)
    converted._pyro_dims = term._pyro_dims  # type: ignore[attr-defined]
    return converted
