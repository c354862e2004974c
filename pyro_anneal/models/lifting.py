r"""Exact differences of all single changes of discrete latents, from one gradient.

The log density of discrete latents with one-hot coordinates w has a multilinear extension

.. math:: f(w) = \sum_{k_1 .. k_n} w_{1 k_1} \cdots w_{n k_n} \, \log p(x, k_1, .., k_n)

whose gradient holds, at a vertex, the log density of every single change: no relaxation of the
model is needed, and values may be indices. Factor by factor it is small where each factor depends
on few discrete latents: the factors' tables are those that Pyro's parallel enumeration computes.
The gradient guides proposals only; log densities stay those of the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.ops import packed
from pyro.poutine.messenger import Messenger
from torch import Tensor

from .discrete import DiscreteMap
from .sites import (
    Layout,
    Site,
    base_distribution,
    latent_sites,
    observed_sites,
    sum_to_batch,
)
from .types import Distribution, Fn, Message, Node, Trace

__all__ = [
    "CannotLift",
    "liftable_sites",
    "lifted_densities",
    "marked_for_enumeration",
    "own_extension",
    "shared_factor",
]

# Entries of the factors' tables per evaluation of one chain.
_MAX_ENTRIES = 100_000
# A table below this would make 0 times infinity.
_LEAST = -1e8


class CannotLift(ValueError):
    """The tables of some factor are too large, or mix elements of a plate."""


class _Mark(Messenger):  # type: ignore[misc]
    """Marks sites for parallel enumeration."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Message) -> None:
        if msg["name"] in self.names:
            msg["infer"] = {**msg["infer"], "enumerate": "parallel"}


def marked_for_enumeration(model: Fn, names: Sequence[str]) -> Fn:
    """Returns a model whose named sites are marked for parallel enumeration."""
    marked: Fn = _Mark(names)(model)
    return marked


def liftable_sites(layout: Layout, trace: Trace) -> list[str]:
    """Names the discrete latents of a trace that can be enumerated.

    Args:
        layout: The layout.
        trace: A run of the model.
    """
    found = []
    for site in layout.sites:
        fn = trace.nodes[site.name]["fn"]
        if not isinstance(site.transform, DiscreteMap) or site.transform.kind == "integer":
            continue
        try:
            fn.enumerate_support(expand=False)
        except (NotImplementedError, ValueError):
            continue
        found.append(site.name)
    return found


def lifted_densities(
    run: Callable[[Callable[[Fn], Fn], Mapping[str, Tensor]], Trace],
    layout: Layout,
    values: Mapping[str, Tensor],
    unconstrained: Mapping[str, Tensor],
    log_prob: Callable[[Node, bool], Tensor],
    names: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """Computes the extensions of log prior and log joint density, ``[*batch]`` each.

    Args:
        run: Traces the model, wrapped by a function, with given values.
        layout: The layout.
        values: Values of all latent sites.
        unconstrained: Coordinates of all latent sites.
        log_prob: Log density of a site, scaled or not.
        names: The sites whose coordinates are extended.

    Raises:
        CannotLift: If tables are too large, or elements of a plate meet in one factor.
    """
    trace = _enumerated(run, layout, values, names)
    weights = {}
    for site in layout.sites:
        if site.name in names:
            symbol, weight = _weight(site, unconstrained[site.name], trace.nodes[site.name])
            weights[symbol] = (weight, _plates(trace.nodes[site.name]))
    latents, observed = latent_sites(trace), observed_sites(trace)
    prior: list[Tensor] = []
    joint: list[Tensor] = []
    total = 0
    for name, node in [*latents.items(), *observed.items()]:
        for scaled, terms in ((True, joint), (False, prior)):
            if not scaled and name not in latents:
                continue
            table = packed.pack(log_prob(node, scaled), node["infer"]["_dim_to_symbol"])
            total += table.numel()
            if total > _MAX_ENTRIES:
                raise CannotLift(f"tables of more than {_MAX_ENTRIES} entries")
            terms.append(_contract(name, node, table, weights, layout, trace))
    return torch.stack(prior).sum(0), torch.stack(joint).sum(0)


def shared_factor(
    run: Callable[[Callable[[Fn], Fn], Mapping[str, Tensor]], Trace],
    layout: Layout,
    values: Mapping[str, Tensor],
    names: Sequence[str],
) -> str | None:
    """Names a site whose density depends on two enumerated sites; None where they meet in none.

    The shapes of the tables tell, whatever the values in them are: a coupling that is zero here has
    an axis for each of the sites that it couples.

    Args:
        run: As of :func:`lifted_densities`, like the others.
        layout: Likewise.
        values: Likewise.
        names: The sites that are enumerated.
    """
    trace = _enumerated(run, layout, values, names)
    infers = [trace.nodes[name]["infer"] for name in names]
    own = {infer["_dim_to_symbol"][infer["_enumerate_dim"]] for infer in infers}
    for name, node in (latent_sites(trace) | observed_sites(trace)).items():
        table = packed.pack(node["unscaled_log_prob"], node["infer"]["_dim_to_symbol"])
        if len(own.intersection(table._pyro_dims)) > 1:
            return name
    return None


def _enumerated(
    run: Callable[[Callable[[Fn], Fn], Mapping[str, Tensor]], Trace],
    layout: Layout,
    values: Mapping[str, Tensor],
    names: Sequence[str],
) -> Trace:
    """Runs the model with some sites enumerated and all others given, densities computed."""
    first = -1 - layout.max_plate_nesting

    def wrap(model: Fn) -> Fn:
        enumerated: Fn = poutine.enum(
            marked_for_enumeration(model, names), first_available_dim=first
        )
        return enumerated

    trace = run(wrap, {n: value.detach() for n, value in values.items() if n not in names})
    trace.compute_log_prob()
    trace.symbolize_dims()
    return trace


def _plates(node: Node) -> set[str]:
    return {frame.name for frame in node["cond_indep_stack"] if frame.vectorized}


def own_extension(site: Site, u: Tensor, fn: Distribution) -> Tensor:
    """Computes the extension of one site's own log density, values of others being fixed.

    Args:
        site: A discrete site that is no integer.
        u: Its coordinates.
        fn: Its distribution, such as a guide's.

    Returns:
        Log densities of the distribution's batch shape.
    """
    base = base_distribution(fn)
    table = base.log_prob(base.enumerate_support(expand=False)).clamp(min=_LEAST)
    weight = _categories_last(site, u).movedim(-1, 0)
    extra = len(fn.event_shape) - len(base.event_shape)
    value: Tensor = sum_rightmost((weight * table).sum(0), extra)
    return value


def _categories_last(site: Site, u: Tensor) -> Tensor:
    return torch.stack([1.0 - u, u], dim=-1) if site.transform.kind == "binary" else u


def _weight(site: Site, u: Tensor, node: Node) -> tuple[str, Tensor]:
    """Packs one-hot weights ``[*batch_shape, categories]``, categories as the enumerated dim."""
    weight = _categories_last(site, u)
    infer = node["infer"]
    dim = infer["_enumerate_dim"]
    rank = weight.dim() - 1
    weight = weight.movedim(-1, 0)
    shape = [weight.shape[0], *[1] * (-dim - 1 - rank), *weight.shape[1:]]
    result: Tensor = packed.pack(weight.reshape(shape), infer["_dim_to_symbol"])
    return infer["_dim_to_symbol"][dim], result


def _contract(
    name: str,
    node: Node,
    table: Tensor,
    weights: Mapping[str, tuple[Tensor, set[str]]],
    layout: Layout,
    trace: Trace,
) -> Tensor:
    """Averages one factor's table over the weights of the sites it depends on."""
    dims = table._pyro_dims  # type: ignore[attr-defined]
    here = [symbol for symbol in weights if symbol in dims]
    for symbol in here:
        if not weights[symbol][1] <= _plates(node):
            raise CannotLift(f'site "{name}" mixes elements of a plate')
    plate_symbols = [trace.plate_to_symbol[plate.name] for plate in layout.batch]
    kept = [symbol for symbol in plate_symbols if symbol in dims]
    operands = [(dims, table.clamp(min=_LEAST))]
    operands += [(w._pyro_dims, w) for w in (weights[symbol][0] for symbol in here)]  # type: ignore[attr-defined]
    equation = ",".join(letters for letters, _ in operands) + "->" + "".join(kept)
    value = torch.einsum(equation, *(operand for _, operand in operands))
    batch = {trace.plate_to_symbol[plate.name]: plate.dim for plate in layout.batch}
    value._pyro_dims = "".join(kept)  # type: ignore[attr-defined]
    spread = packed.unpack(value, {symbol: batch[symbol] for symbol in kept}) if kept else value
    return sum_to_batch(spread, [plate.dim for plate in layout.batch], layout.batch_shape)
