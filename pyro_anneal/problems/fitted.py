"""``guide="auto"``: chooses coordinates, fits a Gaussian in them, and makes it the base.

A fit of other data starts from scratch. From the last one it would save a tenth of a second at most
(eight schools: 0.09 s of a call of 0.45 s, processor time), make numbers depend on what ran
before, and could stay in a mode that the new data have left. What it evaluates is shared: the
densities that the first data recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..chains.blockwise import Blockwise
from ..graphs.captured import CapturedDensity, capture
from ..models.coordinates import hierarchical_sites, noncentred
from ..models.precision import in_float64
from ..models.sites import Layout
from ..persistence.randomness import derived_seed, own_randomness, seeded_generator
from .bases import (
    Base,
    FittedBase,
    ModelDensity,
    PathDensity,
    PriorBase,
    StandardNormalBase,
)
from .components import (
    Component,
    DenseComponent,
    LowRankComponent,
    MixtureOfPart,
    NestedComponent,
    ProductComponent,
)
from .content import Remembered, content_of
from .exchangeable import as_symmetry
from .gaussian import fit_gaussian
from .given import Given
from .low_rank import LowRankScale, fit_low_rank
from .several import several_fits
from .tails import TAIL_WEIGHT, prior_weight_for, wider_component

__all__ = ["Captured", "FittedStart", "Once", "Rebind", "fit_start"]

Once = Callable[..., dict[str, Any]]  # once(compute), or once(compute, name=...)

# Densities of the path from the prior, by the sites whose coordinate is not centred.
Captured = Mapping[frozenset[str], CapturedDensity]
# Finds the density of those sites that other data have left, put on the present data.
Rebind = Callable[[frozenset[str], PathDensity], CapturedDensity | None]

# Starting points of the fit of one evidence; a batch of many gets the origin alone, since each
# point costs Newton steps of all its elements.
_NUM_ORIGINS = 4

# A factor is full up to so many dimensions, and while the evaluations of the fit times their size,
# 2 D * D per batch element, stay below the limit; otherwise it is of low rank plus diagonal.
_FULL_RANK, _FULL_RANK_LIMIT = 128, 20_000_000


_WIDER = (
    "draws of a wider Student-t show that the fit lacks tails of the posterior: it is mixed into "
    "the fit at weight {:g}"
)
_TAILS = (
    "the fitted start is mixed with the prior (weight {:g}), whose draws reach tails of the posterior "
    "that the fit lacks"
)

# Fits by the content of all that they depend on.
_FITS: Remembered[dict[str, Any]] = Remembered()


@dataclass(frozen=True, eq=False)
class FittedStart:
    """A Gaussian base and the coordinates in which it was fitted."""

    model: ModelDensity
    base: Base
    from_prior: Callable[[], Any] | None  # captures the path from the prior, if that is proper
    num_gradients: int  # single-chain gradients spent, per batch element
    prior_weight: float = 0.0  # at which the prior is to be mixed in, since it reaches further
    captured: Captured = field(default_factory=dict)


def fit_start(
    model: ModelDensity,
    example: Tensor,
    *,
    num_chains: int,
    seed: int,
    progress: Callable[[int], object] = lambda count: None,
    max_rows: int | None = None,
    once: Once = lambda compute: compute(),
    native: bool = False,
    vouched: set[str] | None = None,
    rebind: Rebind = lambda sites, function: None,
) -> FittedStart:
    """Fits a Gaussian in centred and, where there is a hierarchy, in non-centred coordinates.

    The coordinates whose fit has the larger evidence lower bound are kept. A fit of the same
    operations, data and parameters by the same seed is made once.

    Args:
        model: The model's side of the path.
        example: A finite position, ``[*batch, D]``.
        num_chains: Chains K that captures are made for.
        seed: Seed of the fit.
        progress: Called with the steps done since the last call.
        max_rows: Positions that may be evaluated at once.
        once: Calls the fit, or returns what it gave before.
        native: Whether small graphs become native code.
        vouched: Kinds of draws whose noise is known to be torch's own, to be added to.
        rebind: Finds a density that other data of the same shapes have left.

    Returns:
        The base, and the model in its coordinates.

    Raises:
        ValueError: If no density is found around the unconstrained origin.
    """
    captured: dict[frozenset[str], CapturedDensity] = {}

    def evaluator(candidate: ModelDensity) -> Any:
        sites = candidate.layout.noncentred
        if sites not in captured:
            function = _from_prior(candidate)
            captured[sites] = rebind(sites, function) or capture(
                function, example, num_chains=num_chains, native=native
            )
        return captured[sites]

    def compute() -> dict[str, Any]:
        return _FITS.get(content_of(evaluator(model), seed, max_rows), fit)

    def fit() -> dict[str, Any]:
        fits, failures, spent = [], [], 0
        for layout in _layouts(model, example):
            target = evaluator(ModelDensity(model.model, layout, model.arguments))
            density = target if max_rows is None else Blockwise(target, max_rows)
            origins = _origins(layout, example, seed)
            try:
                elbo, component, count = _fit(density, origins, seed, progress)
            except ValueError as error:
                failures.append(error)
                continue
            spent += count
            fits.append((elbo, component, sorted(layout.noncentred)))
        if not fits:
            raise failures[0]
        elbo, component, sites = max(fits, key=lambda entry: entry[0])
        chosen = _in_coordinates(model, sites)
        target = evaluator(chosen)
        density = target if max_rows is None else Blockwise(target, max_rows)
        with own_randomness(derived_seed(seed, "several fits")):
            found = several_fits(
                chosen, target, density, component, elbo, seed, max_rows, vouched=vouched
            )
        spent += found.pop("spent")
        base = _base_of(found, chosen.layout, example)
        weight = prior_weight_for(chosen, density, base, seed, vouched=vouched)
        wide = wider_component(chosen, density, base, seed) if weight == 0.0 else None
        if wide is not None:
            found |= _beside(found, base, wide)
        return found | {"noncentred": sites, "num_gradients": spent, "prior_weight": weight}

    found = once(compute)
    chosen = _in_coordinates(model, found["noncentred"])
    layout = chosen.layout
    base = _base_of(found, layout, example)
    if base.symmetry is not None:
        layout = replace(layout, notes=(*layout.notes, base.symmetry.describe()))
        chosen = ModelDensity(model.model, layout, model.arguments)
    from_prior = None if layout.improper else lambda: evaluator(chosen)
    weight = found.get("prior_weight", 0.0)
    if found.get("is_wider"):
        layout = replace(layout, notes=(*layout.notes, _WIDER.format(TAIL_WEIGHT)))
        chosen = ModelDensity(model.model, layout, model.arguments)
    if weight > 0.0:
        layout = replace(layout, notes=(*layout.notes, _TAILS.format(weight)))
        chosen = ModelDensity(model.model, layout, model.arguments)
    return FittedStart(chosen, base, from_prior, found["num_gradients"], weight, captured)


def _beside(found: Mapping[str, Any], base: FittedBase, wide: DenseComponent) -> dict[str, Any]:
    """Mixes a wider component into a base, as what a journal keeps of it."""
    kept = {"loc": wide.loc, "scale_tril": wide.scale_tril, "dof": wide.dof}
    weights = [math.log1p(-TAIL_WEIGHT) + each for each in base.log_weights]
    log_weights = torch.tensor(
        [*weights, math.log(TAIL_WEIGHT)], dtype=torch.float64, device="cpu"
    )
    components = [*found["components"], kept]
    return {"components": components, "log_weights": log_weights, "is_wider": True}


def _base_of(found: Mapping[str, Any], layout: Layout, example: Tensor) -> FittedBase:
    """Makes a base from what a journal keeps of it."""
    components = [_component(kept, example) for kept in found["components"]]
    return FittedBase(components, found["log_weights"], as_symmetry(layout, found["groups"]))


def _in_coordinates(model: ModelDensity, sites: Sequence[str]) -> ModelDensity:
    if not sites:
        return model
    layout = noncentred(model.layout, frozenset(sites))
    return ModelDensity(model.model, layout, model.arguments)


def _fit(
    density: Any, origins: Tensor, seed: int, progress: Callable[[int], object]
) -> tuple[float, dict[str, Any], int]:
    """Fits in one choice of coordinates: the bound, the component as tensors, the gradients."""
    example = origins[0]
    dim, batch = example.shape[-1], example[..., 0].numel()
    if dim <= _FULL_RANK and 2 * dim * dim * batch <= _FULL_RANK_LIMIT:
        fit = fit_gaussian(density, origins, seed=seed, progress=progress)
        kept = {"loc": fit.loc, "scale_tril": fit.scale_tril}
        return float(fit.elbo.sum()), kept, fit.num_gradients
    low = fit_low_rank(density, example, seed=seed, progress=progress)
    scale = low.scale
    kept = {"loc": low.loc, "deviation": scale.deviation}
    kept |= {"vectors": scale.vectors, "stretch": scale.stretch}
    return float(low.elbo.sum()), kept, low.num_gradients


def _component(kept: dict[str, Any], example: Tensor) -> Component:
    """Makes a component from the tensors of a fit."""
    if "parts" in kept:
        tables = ("log_weights", "loc", "scale_tril")
        parts = [
            MixtureOfPart(**(part | {name: part[name].to(example) for name in tables}))
            for part in kept["parts"]
        ]
        return ProductComponent(parts)
    if "order" in kept:
        marginal = [kept[name].to(example) for name in ("log_weights", "loc", "scale_tril")]
        given = Given(**{name: table.to(example) for name, table in kept["given"].items()})
        log_weights, loc, scale_tril = marginal
        return NestedComponent(kept["order"], log_weights, loc, scale_tril, kept["dof"], given)
    tensors = {n: value.to(example) for n, value in kept.items() if isinstance(value, Tensor)}
    if "scale_tril" in tensors:
        return DenseComponent(tensors["loc"], tensors["scale_tril"], kept.get("dof", math.inf))
    scale = LowRankScale(tensors["deviation"], tensors["vectors"], tensors["stretch"])
    return LowRankComponent(tensors["loc"], scale)


def _layouts(model: ModelDensity, example: Tensor) -> list[Layout]:
    layout = model.layout
    if layout.enumerated:  # parameters that depend on an enumerated site are no coordinates
        return [layout]
    with in_float64(layout.wide):
        sites = hierarchical_sites(model.model, model.arguments, layout, model.unpack(example))
    return [layout, noncentred(layout, sites)] if sites else [layout]


def _from_prior(model: ModelDensity) -> PathDensity:
    """Takes the target beside the prior, where there is one: the scout starts from it."""
    improper = bool(model.layout.improper)
    base: Base = StandardNormalBase(model.layout) if improper else PriorBase(model)
    return PathDensity(model, base)


def _origins(layout: Layout, example: Tensor, seed: int) -> Tensor:
    count = 1 if layout.batch else _NUM_ORIGINS
    generator = seeded_generator(example.device, seed, "origins")
    shape = (count - 1, *example.shape)
    around = torch.randn(shape, dtype=example.dtype, device=example.device, generator=generator)
    return torch.cat([torch.zeros_like(example).unsqueeze(0), 2.0 * around])
