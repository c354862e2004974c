r"""``guide="auto"``: a Gaussian in unconstrained space, fitted in seconds on the captured gradient.

Two phases, both invariant to affine changes of coordinates, so that a parameter near 3000 and one
near 0.001 cost the same:

1. Saddle-free Newton steps from the unconstrained origin and points around it, with Hessians by
   central differences of the gradient. Every iterate proposes the Gaussian of its curvature, and
   the one of largest evidence lower bound is kept, as in Pathfinder: a mode at infinity (a funnel)
   does no harm.
2. Natural-gradient ascent of that bound with the path derivative only, whose variance vanishes at
   a Gaussian target; repeated while the bound still rises.

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

__all__ = ["GaussianFit", "fit_gaussian"]

# Numbers of the full-rank fit's evaluations, 2 D * D per batch element, above which it is diagonal.
_FULL_RANK_LIMIT = 20_000_000


@dataclass(frozen=True, eq=False)
class GaussianFit:
    """A fitted Gaussian per batch element."""

    loc: Tensor  # [*batch, D]
    scale_tril: Tensor  # [*batch, D, D]
    elbo: Tensor  # evidence lower bound in nats, [*batch]
    num_gradients: int  # single-chain gradients, per batch element


class _Counter:
    """Evaluates the target at a fixed number of rows, so that one graph serves all calls."""

    def __init__(self, density: Density, num_rows: int) -> None:
        self.density = density
        self.num_rows = num_rows
        self.count = 0

    def __call__(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log p ``[K, *batch]`` and its gradient, with NaN as no density at all."""
        rows = position.shape[0]
        if rows < self.num_rows:
            filler = position[:1].expand(self.num_rows - rows, *position.shape[1:])
            position = torch.cat([position, filler])
        state = self.density(position)
        self.count += self.num_rows
        value = torch.where(state.log_target.isnan(), -torch.inf, state.log_target)
        grad = torch.where(state.grad_target.isfinite(), state.grad_target, 0.0)
        return value[:rows], grad[:rows]


def fit_gaussian(
    density: Density,
    origins: Tensor,
    *,
    seed: int,
    num_newton: int = 40,
    num_ascent: int = 300,
    max_rounds: int = 4,
    progress: Callable[[int], object] = lambda count: None,
) -> GaussianFit:
    """Fits a Gaussian to the target of each batch element.

    Args:
        density: Evaluates positions ``[K, *batch, D]``; only the target side is used.
        origins: Starting points of the Newton steps, ``[S, *batch, D]``.
        seed: Seed of the fit's own randomness.
        num_newton: Newton steps from each.
        num_ascent: Natural-gradient steps of one round.
        max_rounds: Rounds of ascent; there is another one only if the last raised the bound of
            some batch element by over 0.1 nats.
        progress: Called with the number of steps done since the last call.

    Returns:
        The fit. Its covariance is full, or diagonal where ``2 D * D * batch`` exceeds 2e7.

    Raises:
        ValueError: If the target has no density around the origin.
    """
    origin = origins[0]
    dim = origin.shape[-1]
    batch = math.prod(origin.shape[:-1])
    full_rank = 2 * dim * dim * batch <= _FULL_RANK_LIMIT
    num_rows = max(2 * dim if full_rank else 32, 32)
    evaluate = _Counter(density, num_rows)
    generator = seeded_generator(origin.device, seed, "gaussian fit")
    noise = _balanced_noise(origin, num_rows, full_rank, generator)
    eye = torch.eye(dim, dtype=origin.dtype, device=origin.device).expand(*origin.shape, dim)
    loc, scale = origin, 0.1 * eye
    elbo = _elbo(evaluate, loc, scale, noise)
    for start in origins if full_rank else ():
        loc, scale, elbo = _newton(evaluate, start, loc, scale, elbo, noise, num_newton, progress)
    for _ in range(max_rounds):
        before = elbo
        loc, scale, elbo = _ascend(
            evaluate, loc, scale, elbo, noise, num_ascent, full_rank, generator, progress
        )
        if not bool((elbo > before + 0.1).any()):
            break
    if not bool(elbo.isfinite().all()):
        raise ValueError(
            'guide="auto" found no density around the unconstrained origin for '
            f"{int((~elbo.isfinite()).sum())} of {elbo.numel()} batch elements: start from the "
            "prior (guide=None) or pass a guide"
        )
    return GaussianFit(loc, scale, elbo, evaluate.count)


def _balanced_noise(
    origin: Tensor, num_rows: int, full_rank: bool, generator: torch.Generator
) -> Tensor:
    """Draws rows of normal noise with mean 0 and covariance (or variances) exactly 1.

    Bounds over such noise are exact at a Gaussian target. Plain noise would let a fit that is off
    by minus the noise's mean look better than the exact one.
    """
    shape = (num_rows // 2, *origin.shape)
    half = torch.randn(shape, dtype=origin.dtype, device=origin.device, generator=generator)
    if full_rank:  # num_rows / 2 >= D
        q, r = torch.linalg.qr(half.movedim(0, -2))
        q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
        half = q.movedim(-2, 0) * math.sqrt(num_rows // 2)
    else:
        half = half / half.square().mean(0).sqrt()
    return torch.cat([half, -half])


def _place(loc: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """Computes ``loc + scale @ noise`` for K rows of noise."""
    return loc + (scale @ noise.unsqueeze(-1)).squeeze(-1)


def _elbo(evaluate: _Counter, loc: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """Estimates E_q[log p - log q], shape ``[*batch]``."""
    value, _ = evaluate(_place(loc, scale, noise))
    entropy = scale.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    constant = 0.5 * loc.shape[-1] * (1.0 + math.log(2.0 * math.pi))
    elbo = value.mean(0) + entropy + constant
    return torch.where(elbo.isnan(), -torch.inf, elbo)


def _keep(better: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Selects per batch element."""
    return torch.where(
        better.reshape([*better.shape, *[1] * (new.dim() - better.dim())]), new, old
    )


def _hessian(evaluate: _Counter, loc: Tensor) -> Tensor:
    """Computes the Hessian of the target at ``loc`` by central differences of the gradient."""
    dim = loc.shape[-1]
    unit = 1e-5 if loc.dtype == torch.float64 else 3e-3
    width = unit * (1.0 + loc.abs())  # [*batch, D]
    shifts = torch.diag_embed(width).movedim(-2, 0)  # [D, *batch, D]
    _, grad = evaluate(torch.cat([loc + shifts, loc - shifts]))
    columns = (grad[:dim] - grad[dim:]).movedim(0, -2) / (2.0 * width.unsqueeze(-1))
    return 0.5 * (columns + columns.mT)


def _newton(
    evaluate: _Counter,
    point: Tensor,
    loc: Tensor,
    scale: Tensor,
    elbo: Tensor,
    noise: Tensor,
    num_steps: int,
    progress: Callable[[int], object],
) -> tuple[Tensor, Tensor, Tensor]:
    """Follows damped saddle-free Newton steps and keeps the Gaussian of largest bound."""
    value, grad = evaluate(point.unsqueeze(0))
    value, grad = value[0], grad[0]
    damping = torch.ones_like(value)
    for _ in range(num_steps):
        hessian = _hessian(evaluate, point).nan_to_num()
        eigenvalues, vectors = torch.linalg.eigh(hessian)
        curvature = eigenvalues.abs()
        floor = 1e-8 * curvature.amax(-1, keepdim=True).clamp(min=1e-12)
        curvature = curvature.clamp(min=floor)
        proposal = vectors * curvature.rsqrt().unsqueeze(-2)
        upper = torch.linalg.qr(proposal.mT).R  # proposal @ proposal.mT = upper.mT @ upper
        candidate = upper.mT * upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
        at_candidate = _elbo(evaluate, point, candidate, noise)
        better = at_candidate > elbo
        loc, scale = _keep(better, point, loc), _keep(better, candidate, scale)
        elbo = torch.where(better, at_candidate, elbo)
        damped = curvature + damping.unsqueeze(-1) * curvature.median(-1, keepdim=True).values
        along = (vectors.mT @ grad.unsqueeze(-1)).squeeze(-1)
        step = (vectors @ (along / damped).unsqueeze(-1)).squeeze(-1)
        new_value, new_grad = evaluate((point + step).unsqueeze(0))
        success = new_value[0] >= value
        point = _keep(success, point + step, point)
        value, grad = _keep(success, new_value[0], value), _keep(success, new_grad[0], grad)
        damping = torch.where(success, 0.2 * damping, 8.0 * damping).clamp(1e-6, 1e12)
        progress(1)
    return loc, scale, elbo


def _ascend(
    evaluate: _Counter,
    loc: Tensor,
    scale: Tensor,
    elbo: Tensor,
    fixed_noise: Tensor,
    num_steps: int,
    full_rank: bool,
    generator: torch.Generator,
    progress: Callable[[int], object],
) -> tuple[Tensor, Tensor, Tensor]:
    """Climbs the bound by natural gradients; keeps the better of start, end and average."""
    dim = loc.shape[-1]
    best = (loc, scale, elbo)
    mean_loc, mean_scale = torch.zeros_like(loc), torch.zeros_like(scale)
    tail = num_steps // 3
    for step in range(num_steps):
        noise = torch.randn(
            fixed_noise.shape, dtype=loc.dtype, device=loc.device, generator=generator
        )
        _, grad = evaluate(_place(loc, scale, noise))
        white = (scale.mT @ grad.unsqueeze(-1)).squeeze(-1) + noise  # zero at a Gaussian target
        norm = white.norm(dim=-1, keepdim=True)
        white = white * (10.0 * math.sqrt(dim) / norm.clamp(min=1e-30)).clamp(max=1.0)
        outer = torch.einsum("k...i,k...j->...ij", white, noise) / len(noise)
        outer = outer.tril() if full_rank else outer.diagonal(dim1=-2, dim2=-1).diag_embed()
        rate = 0.3 * 0.03 ** (step / max(num_steps - 1, 1))
        size = outer.norm(dim=(-2, -1), keepdim=True)
        outer = outer * (1.0 / size.clamp(min=1.0))
        mean = white.mean(0)
        mean = mean / mean.norm(dim=-1, keepdim=True).clamp(min=1.0)
        growth = rate * outer
        diagonal = growth.diagonal(dim1=-2, dim2=-1)
        growth = growth.tril(-1) + diagonal.exp().diag_embed()
        loc = loc + rate * (scale @ mean.unsqueeze(-1)).squeeze(-1)
        scale = scale @ growth
        if step >= num_steps - tail:
            mean_loc, mean_scale = mean_loc + loc / tail, mean_scale + scale / tail
        progress(1)
    for new_loc, new_scale in ((loc, scale), (mean_loc, mean_scale)):
        new_elbo = _elbo(evaluate, new_loc, new_scale, fixed_noise)
        better = new_elbo > best[2]
        best = (
            _keep(better, new_loc, best[0]),
            _keep(better, new_scale, best[1]),
            torch.where(better, new_elbo, best[2]),
        )
    return best
