"""From one fit to the base: permutations that leave the model as it is, and further optima."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..kernels import Density
from ..persistence.randomness import seeded_generator
from .bases import FittedBase, ModelDensity
from .branches import branch_optima
from .components import DenseComponent
from .exchangeable import Symmetry, find_symmetry
from .gaussian import Candidates
from .independent import independent_parts, marginal_fit, rows_of_part
from .marginals import DOF
from .mixtures import Mixture, mixture_of_fits
from .nested import Nested
from .over_chains import draw_prior_chains
from .phases import likelihood_optima
from .rows import Rows, rows_at_once

__all__ = ["several_fits"]

# Starting points of further fits, and dimensions up to which there are any.
_FURTHER_ORIGINS, _MOST_DIMENSIONS = 8, 64
# Optima that are kept, if the model does not name more phases.
_MOST_FITS = 8
# Draws of one adaptation by the rows of one evaluation; none where rows are dear.
_NUM_DRAWS = {128: 1024, 32: 256}


def several_fits(
    model: ModelDensity,
    target: Any,
    density: Density,
    component: dict[str, Any],
    elbo: float,
    seed: int,
    max_rows: int | None,
    *,
    vouched: set[str] | None = None,
) -> dict[str, Any]:
    """Makes a base of one fit, of further ones, and of permutations.

    Args:
        model: The model in the coordinates of the fit.
        target: Its captured density.
        density: The same, at most ``max_rows`` positions at once.
        component: The fit as tensors.
        elbo: Its evidence lower bound, summed over the batch.
        seed: Seed of the fit.
        max_rows: Positions that may be evaluated at once.
        vouched: As of :func:`~.over_chains.draw_chains`.

    Returns:
        ``components``, ``log_weights`` and ``groups`` of :class:`~.bases.FittedBase`, as tensors
        and plain values, and the gradients ``spent``.
    """
    layout = model.layout
    size = rows_at_once(target, layout.dim)
    rows = Rows(density, size, len(layout.batch))
    kept: dict[str, Any] = {"components": [component], "log_weights": torch.zeros(1, device="cpu")}
    kept |= {"groups": [], "spent": 0}
    if "scale_tril" not in component or (max_rows is not None and max_rows < size):
        return kept
    origins = _prior_draws(model, vouched=vouched)
    generator = seeded_generator(layout.device, seed, "several fits")
    symmetry = _symmetry(model, rows, origins, component) if len(origins) > 2 else None
    if not layout.batch and layout.dim <= _MOST_DIMENSIONS and size in _NUM_DRAWS:
        scale = component["scale_tril"].unsqueeze(0)
        bound = torch.full_like(scale[:, 0, 0], elbo)
        further = _around(origins, component["loc"], generator)
        if not layout.improper:
            optima = likelihood_optima(rows, component["loc"], generator)
            further = torch.cat([further, optima])
        branches, spent = branch_optima(model, component["loc"], generator)
        rows.count += spent
        further = torch.cat([further, branches])
        fit = Candidates(component["loc"].unsqueeze(0), scale, bound)
        # further optima among the points: parts that meet in a spike do not meet in a slab
        parts = independent_parts(rows, torch.cat([fit.loc, _finite(rows, further.flip(0))[:12]]))
        mixture = mixture_of_fits(
            rows,
            further,
            fit,
            symmetry,
            generator,
            num_draws=_NUM_DRAWS[size],
            most=max(_MOST_FITS, len(branches)),
            draw_prior=None
            if layout.improper
            else lambda count: _prior_draws(model, count, vouched=vouched),
            settle=len(parts) == 1,
        )
        if mixture is None:
            kept["components"] = [_of_parts(rows, further, fit, parts, generator)]
            return kept | {"spent": rows.count}
        kept |= _as_tensors(mixture)
    if symmetry is not None and _matters(kept, symmetry):
        kept["groups"] = symmetry.spread
    return kept | {"spent": rows.count}


def _of_parts(
    rows: Rows,
    origins: Tensor,
    fit: Candidates,
    parts: list[list[int]],
    generator: torch.Generator,
) -> dict[str, Any]:
    """Fits a mixture to each of the parts that do not meet."""
    mixtures = []
    for part in parts:
        own = rows_of_part(rows, fit.loc[0], part)
        mixture = mixture_of_fits(
            own,
            origins[:, part],
            marginal_fit(own, fit, part, generator),
            None,
            generator,
            num_draws=_NUM_DRAWS[rows.size],
            most=_MOST_FITS,
            nest=False,
        )
        assert isinstance(mixture, Mixture)  # no leading coordinates are looked for
        rows.count += own.count
        mixtures.append(
            {
                "part": part,
                "log_weights": mixture.log_weights,
                "loc": mixture.loc,
                "scale_tril": mixture.scale_tril,
                "dof": mixture.dof,
            }
        )
    return {"parts": mixtures}


def _finite(rows: Rows, points: Tensor) -> Tensor:
    """Keeps the points ``[N, D]`` that have a density."""
    return points[rows(points)[0].isfinite()] if len(points) else points


def _as_tensors(mixture: Mixture | Nested) -> dict[str, Any]:
    if isinstance(mixture, Nested):
        nested = {
            "order": [*mixture.lead, *mixture.rest],
            "log_weights": mixture.marginal.log_weights,
            "loc": mixture.marginal.loc,
            "scale_tril": mixture.marginal.scale_tril,
            "dof": DOF,
            "given": mixture.given.tensors(),
        }
        return {"components": [nested], "log_weights": torch.zeros(1, device="cpu")}
    components = [
        {"loc": loc, "scale_tril": scale, "dof": mixture.dof}
        for loc, scale in zip(mixture.loc, mixture.scale_tril, strict=True)
    ]
    return {"components": components, "log_weights": mixture.log_weights}


def _prior_draws(
    model: ModelDensity, count: int = _FURTHER_ORIGINS, *, vouched: set[str] | None
) -> Tensor:
    """Draws from the prior; those that are finite of each ``count`` draws, ``[N, *batch, D]``."""
    layout = model.layout
    empty = torch.empty(0, *layout.batch_shape, layout.dim, dtype=layout.dtype)
    if layout.improper:
        return empty.to(layout.device)
    draws = draw_prior_chains(model, count, vouched=vouched)
    return draws[draws.reshape(len(draws), -1).isfinite().all(1)]


def _around(origins: Tensor, loc: Tensor, generator: torch.Generator) -> Tensor:
    """Takes draws of the prior as starting points; without any, points around the origin."""
    if len(origins):
        return origins
    noise = torch.randn((4, *loc.shape), dtype=loc.dtype, device=loc.device, generator=generator)
    return 3.0 * noise


def _symmetry(
    model: ModelDensity, rows: Rows, origins: Tensor, component: dict[str, Any]
) -> Symmetry | None:
    """Looks for permutations at draws of the prior that have a density, and at the fit."""
    points = torch.cat([component["loc"].unsqueeze(0), origins])
    values = rows(points)[0].reshape(len(points), -1)
    alive = points[values.isfinite().all(1)][:3]
    if len(alive) < 2:
        return None
    return find_symmetry(model.layout, lambda position: rows(position)[0], alive)


def _matters(kept: dict[str, Any], symmetry: Symmetry, *, num_draws: int = 64) -> bool:
    """Tells whether the base changes by over 0.02 nat of divergence when it is averaged."""
    components = [
        DenseComponent(part["loc"], part["scale_tril"], part.get("dof", math.inf))
        for part in kept["components"]
    ]
    plain = FittedBase(components, kept["log_weights"])
    averaged = FittedBase(components, kept["log_weights"], symmetry)
    draws = [plain.draw() for _ in range(num_draws)]
    with torch.no_grad():
        gain = [plain.log_density(draw) - averaged.log_density(draw) for draw in draws]
    return float(torch.stack(gain).mean()) > 0.02
