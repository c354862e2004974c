r"""``guide="auto"``: a Gaussian in unconstrained space, fitted in seconds on the captured gradient.

Two phases, both invariant to affine changes of coordinates, so that a parameter near 3000 and one
near 0.001 cost the same:

1. Saddle-free Newton steps from the unconstrained origin and points around it, all at once, with
   Hessians by central differences of the gradient. Every iterate proposes the Gaussian of its
   curvature, and the one of largest evidence lower bound is kept, as in Pathfinder: a mode at
   infinity (a funnel) does no harm.
2. Natural-gradient ascent of that bound with the path derivative only, whose variance vanishes at
   a Gaussian target, on noise that has mean 0 and covariance 1 exactly; until the bound no longer
   rises.

The fit sees the data, never a posterior sample, so it may serve as the base of a sandwich. All
batch elements are fitted at once.

Source: Zhang et al. (2022), *Pathfinder*; Dauphin et al. (2014) for saddle-free Newton; Roeder, Wu
and Duvenaud (2017), *Sticking the landing*, for the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import Density
from ..persistence.randomness import seeded_generator
from .rows import Rows, rows_at_once

__all__ = [
    "Candidates",
    "GaussianFit",
    "ascend",
    "elbo_of",
    "fit_gaussian",
    "follow_newton",
    "hessians",
    "quadratic_models",
]

# Damping of one Newton step, relative to that of the last: tried all at once, the best is taken.
_DAMPINGS = (1.0 / 25.0, 1.0, 25.0)
# Squared gradient in units of the curvature, twice the nats to gain, at which steps end.
_CONVERGED = 1e-8


@dataclass(frozen=True, eq=False)
class GaussianFit:
    """A fitted Gaussian per batch element."""

    loc: Tensor  # [*batch, D]
    scale_tril: Tensor  # [*batch, D, D]
    elbo: Tensor  # evidence lower bound in nats, [*batch]
    num_gradients: int  # single-chain gradients, per batch element


@dataclass(frozen=True, eq=False)
class Candidates:
    """The best Gaussian on the way from each origin."""

    loc: Tensor  # [S, *batch, D]
    scale_tril: Tensor  # [S, *batch, D, D]
    elbo: Tensor  # [S, *batch]


def fit_gaussian(
    density: Density,
    origins: Tensor,
    *,
    seed: int,
    num_newton: int = 40,
    num_ascent: int = 800,
    progress: Callable[[int], object] = lambda count: None,
) -> GaussianFit:
    """Fits a Gaussian to the target of each batch element.

    Args:
        density: Evaluates positions ``[K, *batch, D]``; only the target side is used.
        origins: Starting points of the Newton steps, ``[S, *batch, D]``.
        seed: Seed of the fit's own randomness.
        num_newton: Newton steps from each, at most.
        num_ascent: Natural-gradient steps, at most.
        progress: Called with the number of steps done since the last call.

    Returns:
        The fit.

    Raises:
        ValueError: If the target has no density around the origin.
    """
    batch_rank, dim = origins.dim() - 2, origins.shape[-1]
    rows = Rows(density, rows_at_once(density, dim), batch_rank)
    if rows.is_dear:  # many data: a posterior next to a Gaussian, and each row costs
        origins, num_ascent = origins[:1], min(num_ascent, 4)
    generator = seeded_generator(origins.device, seed, "gaussian fit")
    found = follow_newton(rows, origins, generator, num_steps=num_newton, progress=progress)
    best = found.elbo.argmax(0)  # [*batch]
    start = Candidates(*(_take(x, best) for x in (found.loc, found.scale_tril, found.elbo)))
    fit = ascend(rows, start, generator, num_steps=num_ascent, progress=progress)
    if not bool(fit.elbo.isfinite().all()):
        raise ValueError(
            'guide="auto" found no density around the unconstrained origin for '
            f"{int((~fit.elbo.isfinite()).sum())} of {fit.elbo.numel()} batch elements: start "
            "from the prior (guide=None) or pass a guide"
        )
    return GaussianFit(fit.loc[0], fit.scale_tril[0], fit.elbo[0], rows.count)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Selects one of S candidates per batch element, ``[1, *batch, ...]``."""
    index = index.reshape(1, *index.shape, *[1] * (values.dim() - 1 - index.dim()))
    return values.gather(0, index.expand(1, *values.shape[1:]))


def _balanced_noise(example: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draws rows of normal noise ``[count, *example.shape]`` of mean 0 and covariance exactly 1.

    Bounds over such noise are exact at a Gaussian target. Plain noise would let a fit that is off
    by minus the noise's mean look better than the exact one.
    """
    shape = (count // 2, *example.shape)
    half = torch.randn(shape, dtype=example.dtype, device=example.device, generator=generator)
    q, r = torch.linalg.qr(half.movedim(0, -2))  # count / 2 >= D
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    half = q.movedim(-2, 0) * math.sqrt(count // 2)
    return torch.cat([half, -half])


def _num_draws(dim: int, rows: Rows) -> int:
    return max(2 * dim, 4) if rows.is_dear else max(2 * dim, 32)


def _place(loc: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """Computes ``loc + scale @ noise`` for rows of noise."""
    return loc + (scale @ noise.unsqueeze(-1)).squeeze(-1)


def _elbo(values: Tensor, scale: Tensor) -> Tensor:
    """Estimates E_q[log p - log q] from log p at rows of balanced noise."""
    entropy = scale.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    constant = 0.5 * scale.shape[-1] * (1.0 + math.log(2.0 * math.pi))
    elbo = values.mean(0) + entropy + constant
    return torch.where(elbo.isnan(), -torch.inf, elbo)


def _keep(better: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Selects per candidate and batch element."""
    return torch.where(
        better.reshape([*better.shape, *[1] * (new.dim() - better.dim())]), new, old
    )


def hessians(rows: Rows, loc: Tensor) -> Tensor:
    """Computes Hessians of the target at ``loc`` by central differences of the gradient."""
    dim = loc.shape[-1]
    unit = 1e-5 if loc.dtype == torch.float64 else 3e-3
    width = unit * (1.0 + loc.abs())
    shifts = torch.diag_embed(width).movedim(-2, 0)
    _, grad = rows(torch.cat([loc + shifts, loc - shifts]))
    columns = (grad[:dim] - grad[dim:]).movedim(0, -2) / (2.0 * width.unsqueeze(-1))
    return 0.5 * (columns + columns.mT)


def elbo_of(rows: Rows, loc: Tensor, scale: Tensor, generator: torch.Generator) -> Candidates:
    """Measures the evidence lower bounds of Gaussians ``[S, *batch, D]``."""
    noise = _balanced_noise(loc, _num_draws(loc.shape[-1], rows), generator)
    return Candidates(loc, scale, _elbo(rows(_place(loc, scale, noise))[0], scale))


def follow_newton(
    rows: Rows,
    origins: Tensor,
    generator: torch.Generator,
    *,
    num_steps: int = 40,
    patience: int = 6,
    damping: float = 1.0,
    progress: Callable[[int], object] = lambda count: None,
) -> Candidates:
    """Follows damped saddle-free Newton steps and keeps the Gaussians of largest bound.

    Args:
        rows: Evaluates the target.
        origins: Starting points ``[S, *batch, D]``.
        generator: Source of noise.
        num_steps: Steps at most.
        patience: Steps without a better Gaussian for any, after which all end.
        damping: Of the first step, over the median curvature; little where starts are good.
        progress: Called after each step.

    Returns:
        The best Gaussian from each origin.
    """
    point = origins
    noise = _balanced_noise(point, _num_draws(point.shape[-1], rows), generator)
    eye = torch.eye(point.shape[-1], dtype=point.dtype, device=point.device)
    loc, scale = point, (0.1 * eye).expand(*point.shape, len(eye))
    elbo = torch.full_like(point[..., 0], -torch.inf)
    value, grad = (part[0] for part in rows(point.unsqueeze(0)))
    dampings, quiet = torch.full_like(value, damping), 0
    hessian, success = torch.zeros_like(scale), torch.ones_like(value, dtype=torch.bool)
    for _ in range(num_steps):
        if bool(success.any()):
            hessian = hessians(rows, point).nan_to_num()
        curvature, vectors, candidate = _of_curvature(hessian)
        along = (vectors.mT @ grad.unsqueeze(-1)).squeeze(-1)
        median = curvature.median(-1, keepdim=True).values
        trials = []
        for factor in _DAMPINGS:
            damped = curvature + (factor * dampings).unsqueeze(-1) * median
            trials.append(point + (vectors @ (along / damped).unsqueeze(-1)).squeeze(-1))
        converged = (along.square() / curvature).sum(-1) < _CONVERGED
        values, grads = rows(torch.cat([_place(point, candidate, noise), torch.stack(trials)]))
        at_candidate = _elbo(values[: len(noise)], candidate)
        better = at_candidate > elbo
        quiet = 0 if bool((at_candidate > elbo + 0.01).any()) else quiet + 1
        loc, scale = _keep(better, point, loc), _keep(better, candidate, scale)
        elbo = torch.where(better, at_candidate, elbo)
        new_value, choice = values[len(noise) :].max(0)
        success = new_value > value
        point = _keep(success, _pick(torch.stack(trials), choice), point)
        grad = _keep(success, _pick(grads[len(noise) :], choice), grad)
        value = torch.where(success, new_value, value)
        factors = torch.tensor(_DAMPINGS, dtype=point.dtype, device=point.device)[choice]
        dampings = torch.where(success, factors, 25.0 * 25.0) * dampings
        dampings = dampings.clamp(1e-6, 1e12)
        progress(1)
        if (
            bool(converged.all())
            or quiet >= patience
            or not bool(success.any() | (dampings < 1e12).any())
        ):
            break
    return Candidates(loc, scale, elbo)


def _of_curvature(hessian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the sizes of curvature, their vectors, and the factor of the inverse."""
    eigenvalues, vectors = torch.linalg.eigh(hessian)
    curvature = eigenvalues.abs()
    floor = 1e-8 * curvature.amax(-1, keepdim=True).clamp(min=1e-12)
    curvature = curvature.clamp(min=floor)
    proposal = vectors * curvature.rsqrt().unsqueeze(-2)
    upper = torch.linalg.qr(proposal.mT).R  # proposal @ proposal.mT = upper.mT @ upper
    factor = upper.mT * upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return curvature, vectors, factor


def quadratic_models(rows: Rows, points: Tensor, generator: torch.Generator) -> Candidates:
    """Makes the Gaussian of the target's own quadratic model at each of ``[S, *batch, D]``.

    Its centre is where a full Newton step from the point leads, so a broad Gaussian is found from
    its flanks although something narrow stands at its centre.
    """
    _, grad = (part[0] for part in rows(points.unsqueeze(0)))
    curvature, vectors, scale = _of_curvature(hessians(rows, points).nan_to_num())
    along = (vectors.mT @ grad.unsqueeze(-1)).squeeze(-1)
    loc = points + (vectors @ (along / curvature).unsqueeze(-1)).squeeze(-1)
    return elbo_of(rows, loc, scale, generator)


def _pick(trials: Tensor, choice: Tensor) -> Tensor:
    """Selects the chosen trial, per candidate and batch element."""
    index = choice.reshape(1, *choice.shape, 1).expand(1, *trials.shape[1:])
    return trials.gather(0, index)[0]


def ascend(
    rows: Rows,
    start: Candidates,
    generator: torch.Generator,
    *,
    num_steps: int = 800,
    round_steps: int = 20,
    tolerance: float = 0.02,
    progress: Callable[[int], object] = lambda count: None,
) -> Candidates:
    """Climbs the bound by natural gradients; keeps the best of start, ends and averages.

    Args:
        rows: Evaluates the target.
        start: Where to start.
        generator: Source of noise.
        num_steps: Steps at most.
        round_steps: Steps of one round, within which the step size falls.
        tolerance: Nats by which a round must raise a bound for another to follow.
        progress: Called after each step.

    Returns:
        The best Gaussian of each candidate.
    """
    loc, scale, round_steps = start.loc, start.scale_tril, min(round_steps, num_steps)
    count = _num_draws(loc.shape[-1], rows)
    fixed = _balanced_noise(loc, count, generator)
    best = Candidates(loc, scale, _elbo(rows(_place(loc, scale, fixed))[0], scale))
    fall = 0.1
    for _ in range(max(1, num_steps // round_steps)):
        before = best.elbo
        loc, scale = best.loc, best.scale_tril
        mean_loc, mean_scale = torch.zeros_like(loc), torch.zeros_like(scale)
        tail = max(1, round_steps // 2)
        for step in range(round_steps):
            rate = 0.6 * fall ** (step / max(round_steps - 1, 1))
            loc, scale = _natural_step(rows, loc, scale, count, rate, generator)
            if step >= round_steps - tail:
                mean_loc, mean_scale = mean_loc + loc / tail, mean_scale + scale / tail
            progress(1)
        for new_loc, new_scale in ((loc, scale), (mean_loc, mean_scale)):
            elbo = _elbo(rows(_place(new_loc, new_scale, fixed))[0], new_scale)
            better = elbo > best.elbo
            best = Candidates(
                _keep(better, new_loc, best.loc),
                _keep(better, new_scale, best.scale_tril),
                torch.where(better, elbo, best.elbo),
            )
        gain = best.elbo - before
        if not bool((gain > tolerance).any()):
            break
        fall = 1.0 if bool((gain > 1.0).any()) else 0.1  # a long way to go: do not slow down
    return best


def _natural_step(
    rows: Rows, loc: Tensor, scale: Tensor, count: int, rate: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Makes one natural-gradient step with the path derivative, of bounded size."""
    noise = _balanced_noise(loc, count, generator)
    _, grad = rows(_place(loc, scale, noise))
    white = (scale.mT @ grad.unsqueeze(-1)).squeeze(-1) + noise  # zero at a Gaussian target
    norm = white.norm(dim=-1, keepdim=True)
    white = white * (10.0 * math.sqrt(loc.shape[-1]) / norm.clamp(min=1e-30)).clamp(max=1.0)
    outer = torch.einsum("k...i,k...j->...ij", white, noise).tril() / len(noise)
    size = outer.norm(dim=(-2, -1), keepdim=True)
    growth = rate * outer / size.clamp(min=1.0)
    mean = white.mean(0)
    mean = mean / mean.norm(dim=-1, keepdim=True).clamp(min=1.0)
    diagonal = growth.diagonal(dim1=-2, dim2=-1)
    growth = growth.tril(-1) + diagonal.exp().diag_embed()
    return loc + rate * (scale @ mean.unsqueeze(-1)).squeeze(-1), scale @ growth
