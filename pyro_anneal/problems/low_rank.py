r"""A Gaussian of low rank plus diagonal for many dimensions, by gradients and Hessian products.

The covariance is :math:`D^{1/2} (I + V (S^2 - I) V^T) D^{1/2}` with a diagonal D, r orthonormal
columns V and r standard deviations S, so draws and densities cost O(D r). It is fitted so:

1. L-BFGS from the unconstrained origin to a mode, several step lengths at once.
2. The diagonal from products of the Hessian with random signs.
3. Block Lanczos on the Hessian averaged over draws of the current Gaussian, in units of the diagonal:
   Ritz values far from one get a column of V. On the span of V the bound is largest at
   :math:`S^2 = 1 / \theta` for Ritz values :math:`\theta`, whether they have converged or not.
4. Ascent of the bound in location, diagonal and S, with the path derivative; and Lanczos again.

No step costs more than O(D r^2), and none builds a matrix of D columns.

Source: Liu and Nocedal (1989) for L-BFGS; Golub and Van Loan (2013), *Matrix Computations*, section
10.1, for Lanczos; Ong, Nott and Smith (2018), *Gaussian variational approximation with a factor
covariance structure*; Roeder, Wu and Duvenaud (2017) for the gradient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import Density
from ..persistence.randomness import seeded_generator
from .rows import Rows, rows_at_once

__all__ = ["LowRankFit", "LowRankScale", "fit_low_rank"]

# Loss of the bound in nats below which a direction keeps the diagonal's scale.
_LEAST_GAIN = 0.01
# Vectors by which the Krylov space grows, length below which nothing is left outside it, and its
# largest dimension.
_BLOCK, _INVARIANT, _MOST_RANK = 32, 1e-6, 256
# Rows that products of matrices repay.
_ROWS = 32


@dataclass(frozen=True, eq=False)
class LowRankScale:
    """The factor ``D^(1/2) (I + V (S - I) V^T)`` of a covariance of low rank plus diagonal."""

    deviation: Tensor  # D^(1/2), [*batch, D]
    vectors: Tensor  # V, orthonormal columns, [*batch, D, r]
    stretch: Tensor  # S, [*batch, r]

    def stretched(self, noise: Tensor, stretch: Tensor) -> Tensor:
        """Computes ``(I + V (stretch - I) V^T) noise`` for rows ``[K, *batch, D]``."""
        along = torch.einsum("...dr,k...d->k...r", self.vectors, noise)
        return noise + torch.einsum("...dr,k...r->k...d", self.vectors, along * (stretch - 1.0))

    def place(self, loc: Tensor, noise: Tensor) -> Tensor:
        """Computes draws from rows of normal noise."""
        return loc + self.deviation * self.stretched(noise, self.stretch)

    def transposed(self, grad: Tensor) -> Tensor:
        """Multiplies rows of gradients by the transposed factor."""
        return self.stretched(self.deviation * grad, self.stretch)

    def covariance(self, vector: Tensor) -> Tensor:
        """Multiplies one vector ``[*batch, D]`` by the covariance."""
        inner = self.stretched((self.deviation * vector).unsqueeze(0), self.stretch.square())
        return self.deviation * inner[0]

    @property
    def log_det(self) -> Tensor:
        """Log determinant of the factor, ``[*batch]``."""
        return self.deviation.log().sum(-1) + self.stretch.log().sum(-1)


@dataclass(frozen=True, eq=False)
class LowRankFit:
    """A fitted Gaussian of low rank plus diagonal per batch element."""

    loc: Tensor  # [*batch, D]
    scale: LowRankScale
    elbo: Tensor  # evidence lower bound in nats, [*batch]
    num_gradients: int  # single-chain gradients, per batch element


def fit_low_rank(
    density: Density,
    origin: Tensor,
    *,
    seed: int,
    rank: int = _MOST_RANK,
    num_mode: int = 200,
    num_rounds: int = 2,
    progress: Callable[[int], object] = lambda count: None,
) -> LowRankFit:
    """Fits a Gaussian of low rank plus diagonal to the target of each batch element.

    Args:
        density: Evaluates positions ``[K, *batch, D]``; only the target side is used.
        origin: Where the search for a mode starts, ``[*batch, D]``.
        seed: Seed of the fit's own randomness.
        rank: Largest dimension of the Krylov space of one round, at least the rank r.
        num_mode: Steps toward the mode, at most.
        num_rounds: Rounds of Lanczos and ascent.
        progress: Called with the number of steps done since the last call.

    Returns:
        The fit.

    Raises:
        ValueError: If the target has no density at the origin.
    """
    dim = origin.shape[-1]
    rows = Rows(density, _rows_together(density, dim), origin.dim() - 1)
    generator = seeded_generator(origin.device, seed, "gaussian fit")
    count = min(rows.size, 32)
    rank = min(rank, dim)
    scale = _Probes(rows, origin, generator).diagonal()
    loc = _find_mode(rows, origin, scale, num_mode, progress)
    best: list[LowRankFit] = []  # after each round
    noise = _noise(loc, count, generator)
    for number in range(num_rounds):
        points = scale.place(loc, _noise(loc, 8, generator)) if number else loc.unsqueeze(0)
        if number == 0:
            probes = _Probes(rows, loc, generator)
            scale = _lanczos(rows, points, probes.diagonal(), rank, generator)
            loc = _find_mode(rows, loc, scale, num_mode, progress)
            points, probes = loc.unsqueeze(0), _Probes(rows, loc, generator)
            for _ in range(3):  # what the columns explain is taken out of the diagonal
                scale = _lanczos(rows, points, probes.diagonal(scale), rank, generator)
        else:
            scale = _lanczos(rows, points, scale, rank, generator)
        fits = best[-1:]
        for new_loc, new_scale in ((loc, scale), *_ascend(rows, loc, scale, count, generator)):
            values, _ = rows(new_scale.place(new_loc, noise))
            entropy = new_scale.log_det + 0.5 * dim * (1.0 + math.log(2.0 * math.pi))
            elbo = (values.mean(0) + entropy).nan_to_num(nan=-torch.inf)
            fits.append(LowRankFit(new_loc, new_scale, elbo, 0))
        best.append(functools.reduce(lambda old, new: _better(new, old), fits))
        loc, scale = best[-1].loc, best[-1].scale
        progress(60)
    final = best[-1]
    if not bool(final.elbo.isfinite().all()):
        raise ValueError(
            'guide="auto" found no density around the unconstrained origin for '
            f"{int((~final.elbo.isfinite()).sum())} of {final.elbo.numel()} batch elements: start "
            "from the prior (guide=None) or pass a guide"
        )
    return LowRankFit(final.loc, final.scale, final.elbo, rows.count)


def _rows_together(density: Density, dim: int) -> int:
    """Chooses rows per evaluation: more where they share matrices that are read once for all."""
    together = getattr(density, "chains_at_once", None)
    size = rows_at_once(density, dim)
    return size if together is None else max(size, together(_ROWS))


def _better(new: LowRankFit, old: LowRankFit) -> LowRankFit:
    """Selects per batch element; columns that one of both lacks get a stretch of one."""
    better = new.elbo > old.elbo
    rank = max(new.scale.stretch.shape[-1], old.scale.stretch.shape[-1])
    parts = []
    for fit in (new, old):
        missing = rank - fit.scale.stretch.shape[-1]
        vectors = torch.nn.functional.pad(fit.scale.vectors, (0, missing))
        parts.append(
            (vectors, torch.nn.functional.pad(fit.scale.stretch, (0, missing), value=1.0))
        )
    (vectors, stretch), (old_vectors, old_stretch) = parts
    wide = better.unsqueeze(-1)
    scale = LowRankScale(
        torch.where(wide, new.scale.deviation, old.scale.deviation),
        torch.where(wide.unsqueeze(-1), vectors, old_vectors),
        torch.where(wide, stretch, old_stretch),
    )
    loc = torch.where(wide, new.loc, old.loc)
    return LowRankFit(loc, scale, torch.where(better, new.elbo, old.elbo), 0)


def _noise(loc: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draws antithetic normal noise ``[count, *batch, D]`` whose variances are exactly 1."""
    shape = (max(count // 2, 1), *loc.shape)
    half = torch.randn(shape, dtype=loc.dtype, device=loc.device, generator=generator)
    half = half / half.square().mean(0).sqrt()
    return torch.cat([half, -half])


def _find_mode(
    rows: Rows,
    origin: Tensor,
    scale: LowRankScale,
    num_steps: int,
    progress: Callable[[int], object],
) -> Tensor:
    """Climbs by L-BFGS in units of ``scale``, the best of several step lengths at a time."""
    lengths = torch.tensor([1.0, 0.3, 3.0, 0.05, 0.002], dtype=origin.dtype, device=origin.device)
    lengths = lengths.reshape(-1, *[1] * origin.dim())
    point = origin
    value, grad = (part[0] for part in rows(point.unsqueeze(0)))
    history: list[tuple[Tensor, Tensor]] = []
    failures = 0
    for _ in range(num_steps):
        direction = _two_loops(grad, history, scale)
        values, grads = rows(point + lengths * direction)
        new_value, choice = values.max(0)
        success = (new_value > value).unsqueeze(-1)
        index = choice.reshape(1, *choice.shape, 1).expand(1, *point.shape)
        new_point = (point + lengths * direction).gather(0, index)[0]
        new_grad = grads.gather(0, index)[0]
        gain = torch.where(success.squeeze(-1), new_value - value, 0.0)
        step = torch.where(success, new_point - point, 0.0)
        change = torch.where(success, grad - new_grad, 0.0)
        history = [*history[-19:], (step, change)]
        point = torch.where(success, new_point, point)
        grad = torch.where(success, new_grad, grad)
        value = torch.where(success.squeeze(-1), new_value, value)
        progress(1)
        failures = 0 if bool((gain > 1e-3).any()) else failures + 1
        if failures == 1 and not bool(success.any()):
            history = []  # start anew from the scale's own step
        if failures >= 3:
            break
    return point


def _two_loops(grad: Tensor, history: list[tuple[Tensor, Tensor]], scale: LowRankScale) -> Tensor:
    """Multiplies the gradient of log p by the inverse Hessian of L-BFGS."""
    direction, alphas, rhos = grad, [], []
    for step, change in reversed(history):
        product = (step * change).sum(-1, keepdim=True)
        # pairs of negative curvature say nothing of an inverse Hessian
        limit = 1e-10 * step.norm(dim=-1, keepdim=True) * change.norm(dim=-1, keepdim=True)
        rho = torch.where(product > limit, 1.0 / product, 0.0)
        alpha = rho * (step * direction).sum(-1, keepdim=True)
        direction = direction - alpha * change
        alphas.append(alpha)
        rhos.append(rho)
    direction = scale.covariance(direction)
    for (step, change), alpha, rho in zip(history, reversed(alphas), reversed(rhos), strict=True):
        beta = rho * (change * direction).sum(-1, keepdim=True)
        direction = direction + step * (alpha - beta)
    return direction


class _Probes:
    """Products of the Hessian with random signs, which tell of its diagonal."""

    def __init__(self, rows: Rows, loc: Tensor, generator: torch.Generator) -> None:
        shape = (32, *loc.shape)
        signs = torch.randn(shape, dtype=loc.dtype, device=loc.device, generator=generator)
        self.signs = signs.sign()
        self.products = -rows.products(loc.expand(shape), self.signs)

    def diagonal(self, known: LowRankScale | None = None) -> LowRankScale:
        """Estimates the diagonal of the Hessian, or of what the columns of ``known`` leave."""
        rest = self.products
        if known is not None:
            scaled = self.signs / known.deviation
            values = known.stretch.square().reciprocal()
            values = torch.where(values > 1.5, values, 1.0)  # directions of which data tell more
            low = known.stretched(scaled, values) - scaled
            rest = rest - low / known.deviation
        # of signs and products, so the error of few probes is what lies off the diagonal
        diagonal = (self.signs * rest).mean(0)
        spread = rest.square().mean(0).sqrt()
        diagonal = torch.maximum(diagonal, 0.1 * spread)
        floor = 1e-8 * diagonal.amax(-1, keepdim=True).clamp(min=1e-12)
        empty = diagonal[..., :0]
        return LowRankScale(
            diagonal.clamp(min=floor).rsqrt(),
            empty.unsqueeze(-2).expand(*diagonal.shape, 0),
            empty,
        )


def _lanczos(
    rows: Rows, points: Tensor, scale: LowRankScale, rank: int, generator: torch.Generator
) -> LowRankScale:
    """Finds the directions in which the averaged Hessian differs from the diagonal.

    The Krylov space grows by blocks, since products with several vectors cost little more than one.
    """
    deviation = scale.deviation
    at, dim = points.unsqueeze(1), deviation.shape[-1]
    basis, images = torch.empty(0), torch.empty(0)
    block = torch.randn(
        (*deviation.shape, min(_BLOCK, rank)),
        dtype=deviation.dtype,
        device=deviation.device,
        generator=generator,
    )
    while True:
        block = torch.linalg.qr(block).Q
        if basis.numel():  # once more: what was left may be rounding alone
            block = torch.linalg.qr(_left(basis, block)).Q
        basis = torch.cat([basis, block], -1) if basis.numel() else block  # [*batch, D, j]
        vectors = (deviation.unsqueeze(-1) * block).movedim(-1, 0)
        shape = (len(points), *vectors.shape)
        products = rows.products(at.expand(shape), vectors.expand(shape)).mean(0)
        image = (-deviation * products).movedim(0, -1)
        images = torch.cat([images, image], -1) if images.numel() else image
        size = min(_BLOCK, min(rank, dim) - basis.shape[-1])
        block = _left(basis, image)
        if size <= 0 or not bool((block.norm(dim=-2) > _INVARIANT).any()):
            break
        block = block[..., :size]
    small = torch.einsum("...di,...dj->...ij", basis, images)
    values, vectors = torch.linalg.eigh(0.5 * (small + small.mT))
    vectors = basis @ vectors
    # of a saddle the size of the curvature counts, as for Newton steps
    values = values.abs().clamp(min=1e-4, max=1e8)
    gain = 0.5 * (values - 1.0 - values.log())
    order = gain.argsort(-1, descending=True)
    kept = int((gain > _LEAST_GAIN).sum(-1).max())
    order = order[..., :kept]
    stretch = values.gather(-1, order).rsqrt()
    chosen = vectors.gather(-1, order.unsqueeze(-2).expand(*vectors.shape[:-1], kept))
    return LowRankScale(deviation, chosen, stretch)


def _left(basis: Tensor, block: Tensor) -> Tensor:
    """Removes from the columns of a block what orthonormal columns span; twice is enough."""
    for _ in range(2):
        block = block - basis @ (basis.mT @ block)
    return block


def _ascend(
    rows: Rows, loc: Tensor, scale: LowRankScale, count: int, generator: torch.Generator
) -> list[tuple[Tensor, LowRankScale]]:
    """Climbs the bound in location, diagonal and stretch; the end and the average of the tail."""
    num_steps = 40
    tail = num_steps // 2
    mean_loc, mean_log = torch.zeros_like(loc), torch.zeros_like(loc)
    mean_stretch = torch.zeros_like(scale.stretch)
    for step in range(num_steps):
        rate = 0.5 * 0.1 ** (step / (num_steps - 1))
        noise = _noise(loc, count, generator)
        _, grad = rows(scale.place(loc, noise))
        white = scale.transposed(grad) + noise  # zero at a Gaussian target
        norm = white.norm(dim=-1, keepdim=True)
        white = white * (10.0 * math.sqrt(loc.shape[-1]) / norm.clamp(min=1e-30)).clamp(max=1.0)
        mean = white.mean(0)
        mean = mean * (math.sqrt(loc.shape[-1]) / mean.norm(dim=-1, keepdim=True)).clamp(max=1.0)
        shift = scale.deviation * scale.stretched(mean.unsqueeze(0), scale.stretch)[0]
        along = torch.einsum("...dr,k...d->k...r", scale.vectors, white)
        along = (along * torch.einsum("...dr,k...d->k...r", scale.vectors, noise)).mean(0)
        inside = torch.einsum("...dr,...r->...d", scale.vectors.square(), along)
        outside = (white * noise).mean(0) - inside  # the diagonal's part is what V leaves
        loc = loc + rate * shift
        growth = 0.3 * rate * outside.clamp(-1.0, 1.0)
        stretch = scale.stretch * (rate * along.clamp(-1.0, 1.0)).exp()
        scale = LowRankScale(scale.deviation * growth.exp(), scale.vectors, stretch)
        if step >= num_steps - tail:
            mean_loc = mean_loc + loc / tail
            mean_log = mean_log + scale.deviation.log() / tail
            mean_stretch = mean_stretch + stretch.log() / tail
    average = LowRankScale(mean_log.exp(), scale.vectors, mean_stretch.exp())
    return [(loc, scale), (mean_loc, average)]
