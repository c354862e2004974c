r"""A base fitted to posterior draws: a Gaussian, a Student-t, or a mixture, in coordinates that suit.

Candidates are fitted to the first four fifths of the draws (of each chain) and judged on the rest by
their mean log density, which differs from minus :math:`\mathrm{KL}(p \| q)` by a constant. The best
is then fitted to all. Coordinates, centred or not, are judged alike, by the mean of log p(x, u) -
log q(u), since log p(x) is the same in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.coordinates import hierarchical_sites, noncentred
from ..models.density import ModelDensity
from ..models.validation import validation_disabled
from .bases import FittedBase
from .components import Component, DenseComponent, LowRankComponent
from .low_rank import LowRankScale

__all__ = ["DrawnBase", "drawn_base", "fit_base", "pack_draws"]

# Covariances are shrunk towards their diagonal by these shares; degrees of freedom of Student-t.
_SHRINKAGE, _DOF = (0.0, 0.03, 0.1, 0.5), (4.0, 8.0)
# Up to this dimension covariances are dense, and beyond if draws abound, up to another.
_DENSE, _MOST_DENSE = 100, 1000
# Numbers of components of mixtures, up to what dimension, and what a mixture must gain, in nats.
_COMPONENTS, _MIXTURE_DIM, _LEAST_GAIN = (2, 3, 5, 8), 30, 0.02
# Draws at which coordinates are compared.
_NUM_COMPARED = 64

Fit = Callable[[Tensor], "tuple[list[Component], Tensor | None]"]


@dataclass(frozen=True, eq=False)
class DrawnBase:
    """A base, the coordinates in which it was fitted, and what it is."""

    model: ModelDensity
    base: FittedBase
    kind: str


def pack_draws(model: ModelDensity, values: Mapping[str, Tensor]) -> Tensor:
    """Packs draws ``[N, *value_shape]`` by site into positions ``[N, *batch, D]``.

    Args:
        model: The model's side of the path, in whichever coordinates.
        values: Draws of every site of its layout.

    Raises:
        ValueError: If a draw lies outside the support of its site.
    """
    layout = model.layout
    count = len(values[layout.sites[0].name])
    with torch.no_grad(), validation_disabled():
        if layout.is_static:
            for site in layout.sites:
                inside = site.support.check(values[site.name])
                if not bool(inside.all()):
                    raise ValueError(
                        f'draws of site "{site.name}" lie outside its support {site.support}'
                    )
            whole = {site.name: site.transform.inv(values[site.name]) for site in layout.sites}
            rows = [layout.join({name: u[n] for name, u in whole.items()}) for n in range(count)]
        else:
            names = [site.name for site in layout.sites]
            rows = [model.pack({name: values[name][n] for name in names}) for n in range(count)]
    positions = torch.stack(rows).to(layout.dtype)
    if not bool(positions.isfinite().all()):
        row = positions.isfinite().flatten(1).all(1).logical_not().nonzero()[0]
        parts = layout.split(positions[int(row)])
        bad = [name for name, u in parts.items() if not bool(u.isfinite().all())]
        raise ValueError(f"draws of site(s) {bad} lie outside the support, or at its edge")
    return positions


def drawn_base(model: ModelDensity, values: Mapping[str, Tensor]) -> DrawnBase:
    """Fits a base to draws, in centred or non-centred coordinates.

    Args:
        model: The model's side of the path.
        values: Draws ``[C, N, *value_shape]`` by site.

    Returns:
        The base, and the model in its coordinates.

    Raises:
        ValueError: If there are fewer than ten draws, or some outside the support.
    """
    chains, count = next(iter(values.values())).shape[:2]
    if chains * count < 10:
        raise ValueError(f"a base needs at least 10 draws, got {chains * count}")
    flat = {name: value.flatten(0, 1) for name, value in values.items()}
    scored: list[tuple[float, DrawnBase]] = []
    candidates = _coordinates(model, {name: value[0] for name, value in flat.items()})
    for candidate in candidates:
        positions = pack_draws(candidate, flat)
        base, kind = fit_base(
            positions.unflatten(0, (chains, count)), mixtures=not candidate.layout.batch
        )
        score = 0.0
        if len(candidates) > 1:
            score = _divergence(candidate, base, positions)
        where = ", non-centred" if candidate.layout.noncentred else ""
        scored.append((score, DrawnBase(candidate, base, kind + where)))
    return min(scored, key=lambda pair: pair[0])[1]


def _coordinates(model: ModelDensity, values: dict[str, Tensor]) -> list[ModelDensity]:
    layout = model.layout
    if layout.enumerated:
        return [model]
    sites = hierarchical_sites(model.model, model.arguments, layout, values)
    if not sites:
        return [model]
    return [model, ModelDensity(model.model, noncentred(layout, sites), model.arguments)]


def _divergence(model: ModelDensity, base: FittedBase, positions: Tensor) -> float:
    """Computes the mean of log p - log q over some draws; infinite where a density is not finite."""
    stride = max(1, len(positions) // _NUM_COMPARED)
    total, rows = 0.0, positions[::stride]
    with torch.no_grad(), validation_disabled():
        for row in rows:
            evaluation = model.evaluate(row)
            log_joint = evaluation.log_joint + evaluation.total_log_det
            total += float((log_joint - base.log_density(row)).sum())
    return total / len(rows) if math.isfinite(total) else math.inf


def fit_base(positions: Tensor, *, mixtures: bool) -> tuple[FittedBase, str]:
    """Chooses a family on held-out draws, and fits it to all.

    Args:
        positions: Positions ``[C, N, *batch, D]``.
        mixtures: Whether to try mixtures, which a batch has not.

    Returns:
        The base and the name of its family.

    Raises:
        ValueError: If the draws do not vary in some direction.
    """
    count = positions.shape[1]
    cut = max(1, (4 * count) // 5) if count > 1 else 1
    everything = positions.flatten(0, 1)
    if cut < count:
        train, held = positions[:, :cut].flatten(0, 1), positions[:, cut:].flatten(0, 1)
    else:  # one draw per chain
        cut = max(1, (4 * len(everything)) // 5)
        train, held = everything[:cut], everything[cut:]
    best_score, best_kind = -math.inf, ""
    fits = _families(len(train), positions.shape[-1], mixtures)
    for kind, fit in fits.items():
        try:
            base = FittedBase(*fit(train))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        score = float(base._log_density(held).sum()) / len(held)
        least = _LEAST_GAIN if best_kind else 0.0
        if math.isfinite(score) and score > best_score + least:
            best_score, best_kind = score, kind
    if not best_kind:
        raise ValueError(
            "no base could be fitted to the draws: they do not vary in some direction, or are not "
            "finite; pass more draws"
        )
    return FittedBase(*fits[best_kind](everything)), best_kind


def _families(count: int, dim: int, mixtures: bool) -> dict[str, Fit]:
    """Collects families by name, the simplest first."""
    fits: dict[str, Fit] = {}

    def dense(shrink: float, dof: float) -> Fit:
        return lambda rows: ([_dense(rows, shrink, dof)], None)

    if dim > _DENSE:
        fits["Gaussian of low rank"] = lambda rows: ([_low_rank(rows)], None)
    if dim <= _DENSE or (count > 3 * dim and dim <= _MOST_DENSE):
        for shrink in _SHRINKAGE:
            if shrink > 0.0 or count > 2 * dim:
                how = f" shrunk by {shrink:g}" if shrink else ""
                fits[f"Gaussian{how}"] = dense(shrink, math.inf)
        for dof in _DOF:
            shrink = 0.0 if count > 5 * dim else 0.1
            fits[f"Student-t, {dof:g} degrees of freedom"] = dense(shrink, dof)
    if mixtures and dim <= _MIXTURE_DIM:
        for number in _COMPONENTS:
            if count > 10 * number * (dim + 1):
                fits[f"mixture of {number}"] = _mixture_of(number)
    return fits


def _mixture_of(number: int) -> Fit:
    return lambda rows: _mixture(rows, number)


def _factor(covariance: Tensor, shrink: float) -> Tensor:
    diagonal = torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))
    shrunk = (1.0 - shrink) * covariance + (shrink + 1e-9) * diagonal
    factor: Tensor = torch.linalg.cholesky(shrunk)
    return factor


def _dense(rows: Tensor, shrink: float, dof: float) -> DenseComponent:
    """Fits a Gaussian by moments, or a Student-t by its EM steps, to ``[N, *batch, D]``."""
    weights = torch.ones(rows.shape[:-1], dtype=rows.dtype, device=rows.device)
    for _ in range(1 if math.isinf(dof) else 15):
        loc = (weights.unsqueeze(-1) * rows).sum(0) / weights.sum(0).unsqueeze(-1)
        centred = rows - loc
        weighted = weights.unsqueeze(-1) * centred
        covariance = torch.einsum("n...i,n...j->...ij", weighted, centred) / len(rows)
        factor = _factor(covariance, shrink)
        if not math.isinf(dof):
            white = DenseComponent(loc, factor).whiten @ centred.unsqueeze(-1)
            square = white.squeeze(-1).square().sum(-1)
            weights = (dof + rows.shape[-1]) / (dof + square)
    return DenseComponent(loc, factor, dof)


def _low_rank(rows: Tensor) -> LowRankComponent:
    """Fits a Gaussian of low rank plus diagonal to ``[N, *batch, D]``.

    Eigenvalues of the correlation matrix below the edge of pure noise count as one, and those above
    are corrected for their bias.

    Source: Johnstone (2001); Baik and Silverstein (2006), *Eigenvalues of large sample covariance
    matrices of spiked population models*.
    """
    count, dim = rows.shape[0], rows.shape[-1]
    loc, deviation = rows.mean(0), rows.std(0)
    scaled = ((rows - loc) / deviation).movedim(0, -2)  # [*batch, N, D]
    _, values, vectors = torch.linalg.svd(scaled / math.sqrt(count - 1), full_matrices=False)
    gamma = dim / count
    eigen = values.square()
    shifted = eigen + 1.0 - gamma
    spike = 0.5 * (shifted + (shifted.square() - 4.0 * eigen).clamp(min=0.0).sqrt())
    edge = (1.0 + math.sqrt(gamma)) ** 2
    kept = int((eigen > edge).reshape(-1, eigen.shape[-1]).any(0).sum())
    stretch = torch.where(eigen > edge, spike, torch.ones_like(spike))[..., :kept].sqrt()
    vectors = vectors.mT[..., :kept]
    # the diagonal keeps each coordinate's variance
    gain = (vectors.square() * (stretch.square() - 1.0).unsqueeze(-2)).sum(-1)
    scale = LowRankScale(deviation / (1.0 + gain).sqrt(), vectors, stretch)
    return LowRankComponent(loc, scale)


def _mixture(rows: Tensor, number: int) -> tuple[list[Component], Tensor]:
    """Fits a mixture of Gaussians to ``[N, D]`` by expectation maximization."""
    count, dim = rows.shape
    factor = _factor(torch.cov(rows.T).reshape(dim, dim), 0.0)
    white = torch.linalg.solve_triangular(factor, (rows - rows.mean(0)).T, upper=False).T
    centres = white[:1]
    for _ in range(number - 1):  # the point that is farthest, but not an outlier of its own
        distance = torch.cdist(white, centres).amin(1)
        order = distance.sort().indices
        pick = order[int(0.98 * (count - 1))]
        centres = torch.cat([centres, white[pick : pick + 1]])
    for _ in range(10):
        nearest = torch.cdist(white, centres).argmin(1)
        centres = torch.stack(
            [
                white[nearest == j].mean(0) if bool((nearest == j).any()) else centres[j]
                for j in range(number)
            ]
        )
    share = torch.nn.functional.one_hot(nearest, number).to(rows.dtype)
    components: list[Component] = []
    for _ in range(50):
        mass = share.sum(0) + 1e-3
        components = []
        for j in range(number):
            loc = (share[:, j : j + 1] * rows).sum(0) / mass[j]
            centred = rows - loc
            covariance = torch.einsum("n,ni,nj->ij", share[:, j], centred, centred) / mass[j]
            floor = 1e-3 * (factor @ factor.T)
            components.append(DenseComponent(loc, _factor(covariance + floor, 0.0)))
        log_weights = (mass / mass.sum()).log()
        terms = torch.stack([c.log_density(rows) for c in components], 1) + log_weights
        share = terms.softmax(1)
    return components, log_weights
