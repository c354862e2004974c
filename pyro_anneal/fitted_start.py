"""``guide="auto"``: chooses coordinates, fits a Gaussian in them, and makes it the base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .capture import capture
from .chains import seeded_generator
from .coordinates import hierarchical_sites, noncentred
from .densities import (
    Base,
    GaussianBase,
    ModelDensity,
    PathDensity,
    PriorBase,
    StandardNormalBase,
)
from .gaussian_fit import GaussianFit, fit_gaussian
from .sites import Layout

__all__ = ["FittedStart", "fit_start"]

# Starting points of the fit of one evidence; a batch of many gets the origin alone, since each
# point costs Newton steps of all its elements.
_NUM_ORIGINS = 4


@dataclass(frozen=True, eq=False)
class FittedStart:
    """A Gaussian base and the coordinates in which it was fitted."""

    model: ModelDensity
    base: GaussianBase
    from_prior: Any  # captured density of the path from the prior, None if that is improper
    num_gradients: int  # single-chain gradients spent, per batch element


def fit_start(
    model: ModelDensity,
    example: Tensor,
    *,
    num_chains: int,
    seed: int,
    progress: Callable[[int], object] = lambda count: None,
) -> FittedStart:
    """Fits a Gaussian in centred and, where there is a hierarchy, in non-centred coordinates.

    The coordinates whose fit has the larger evidence lower bound are kept.

    Args:
        model: The model's side of the path.
        example: A finite position, ``[*batch, D]``.
        num_chains: Chains K that captures are made for.
        seed: Seed of the fit.
        progress: Called with the steps done since the last call.

    Returns:
        The base, and the model in its coordinates.

    Raises:
        ValueError: If no density is found around the unconstrained origin.
    """
    best: tuple[ModelDensity, GaussianFit, Any] | None = None
    failure: ValueError | None = None
    spent = 0
    for layout in _layouts(model, example):
        candidate = ModelDensity(model.model, layout, model.arguments)
        try:
            target = _capture(candidate, example, num_chains)
            fit = _fit(candidate, target, example, seed, progress)
        except ValueError as error:
            failure = failure or error
            continue
        spent += fit.num_gradients
        if best is None or bool(fit.elbo.sum() > best[1].elbo.sum()):
            best = candidate, fit, target
    if best is None:
        assert failure is not None
        raise failure
    chosen, fit, target = best
    base = GaussianBase(fit.loc, fit.scale_tril)
    return FittedStart(chosen, base, None if chosen.layout.improper else target, spent)


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


def _fit(
    model: ModelDensity,
    target: Any,
    example: Tensor,
    seed: int,
    progress: Callable[[int], object],
) -> GaussianFit:
    count = _NUM_ORIGINS if not model.layout.batch else 1
    generator = seeded_generator(example.device, seed, "origins")
    shape = (count - 1, *example.shape)
    around = torch.randn(shape, dtype=example.dtype, device=example.device, generator=generator)
    origins = torch.cat([torch.zeros_like(example).unsqueeze(0), 2.0 * around])
    return fit_gaussian(target, origins, seed=seed, progress=progress)
