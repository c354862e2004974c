"""``guide="auto"``: chooses coordinates, fits a Gaussian in them, and makes it the base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..chains.blockwise import Blockwise
from ..graphs.captured import capture
from ..models.coordinates import hierarchical_sites, noncentred
from ..models.sites import Layout
from ..persistence.randomness import seeded_generator
from .bases import (
    Base,
    GaussianBase,
    ModelDensity,
    PathDensity,
    PriorBase,
    StandardNormalBase,
)
from .gaussian import fit_gaussian

__all__ = ["FittedStart", "Once", "fit_start"]

Once = Callable[[Callable[[], dict[str, Any]]], dict[str, Any]]

# Starting points of the fit of one evidence; a batch of many gets the origin alone, since each
# point costs Newton steps of all its elements.
_NUM_ORIGINS = 4


@dataclass(frozen=True, eq=False)
class FittedStart:
    """A Gaussian base and the coordinates in which it was fitted."""

    model: ModelDensity
    base: GaussianBase
    from_prior: Callable[[], Any] | None  # captures the path from the prior, if that is proper
    num_gradients: int  # single-chain gradients spent, per batch element


def fit_start(
    model: ModelDensity,
    example: Tensor,
    *,
    num_chains: int,
    seed: int,
    progress: Callable[[int], object] = lambda count: None,
    max_rows: int | None = None,
    once: Once = lambda compute: compute(),
) -> FittedStart:
    """Fits a Gaussian in centred and, where there is a hierarchy, in non-centred coordinates.

    The coordinates whose fit has the larger evidence lower bound are kept.

    Args:
        model: The model's side of the path.
        example: A finite position, ``[*batch, D]``.
        num_chains: Chains K that captures are made for.
        seed: Seed of the fit.
        progress: Called with the steps done since the last call.
        max_rows: Positions that may be evaluated at once.
        once: Calls the fit, or returns what it gave before.

    Returns:
        The base, and the model in its coordinates.

    Raises:
        ValueError: If no density is found around the unconstrained origin.
    """
    captured: dict[frozenset[str], Any] = {}

    def evaluator(candidate: ModelDensity) -> Any:
        sites = candidate.layout.noncentred
        if sites not in captured:
            captured[sites] = _capture(candidate, example, num_chains)
        return captured[sites]

    def compute() -> dict[str, Any]:
        fits, failures, spent = [], [], 0
        for layout in _layouts(model, example):
            target = evaluator(ModelDensity(model.model, layout, model.arguments))
            density = target if max_rows is None else Blockwise(target, max_rows)
            origins = _origins(layout, example, seed)
            try:
                fit = fit_gaussian(density, origins, seed=seed, progress=progress)
            except ValueError as error:
                failures.append(error)
                continue
            spent += fit.num_gradients
            fits.append((float(fit.elbo.sum()), fit, sorted(layout.noncentred)))
        if not fits:
            raise failures[0]
        _, fit, sites = max(fits, key=lambda entry: entry[0])
        found = {"loc": fit.loc, "scale_tril": fit.scale_tril}
        return found | {"noncentred": sites, "num_gradients": spent}

    found = once(compute)
    base = GaussianBase(found["loc"].to(example), found["scale_tril"].to(example))
    layout, sites = model.layout, frozenset(found["noncentred"])
    chosen = model
    if sites:
        chosen = ModelDensity(model.model, noncentred(layout, sites), model.arguments)
    from_prior = None if layout.improper else lambda: evaluator(chosen)
    return FittedStart(chosen, base, from_prior, found["num_gradients"])


def _layouts(model: ModelDensity, example: Tensor) -> list[Layout]:
    layout = model.layout
    if layout.enumerated:  # parameters that depend on an enumerated site are no coordinates
        return [layout]
    sites = hierarchical_sites(model.model, model.arguments, layout, model.unpack(example))
    return [layout, noncentred(layout, sites)] if sites else [layout]


def _capture(model: ModelDensity, example: Tensor, num_chains: int) -> Any:
    """Captures the target, beside the prior where there is one: the scout starts from it."""
    improper = bool(model.layout.improper)
    base: Base = StandardNormalBase(model.layout) if improper else PriorBase(model)
    return capture(PathDensity(model, base), example, num_chains=num_chains)


def _origins(layout: Layout, example: Tensor, seed: int) -> Tensor:
    count = 1 if layout.batch else _NUM_ORIGINS
    generator = seeded_generator(example.device, seed, "origins")
    shape = (count - 1, *example.shape)
    around = torch.randn(shape, dtype=example.dtype, device=example.device, generator=generator)
    return torch.cat([torch.zeros_like(example).unsqueeze(0), 2.0 * around])
