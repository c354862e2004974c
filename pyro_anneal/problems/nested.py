r"""Nested Gaussians: a few leading coordinates, and all others given them.

Scales of a hierarchy bend a posterior: given them the rest is next to a Gaussian, but one whose
location and covariance move with them, so that one Gaussian of all has no room for the neck of a
funnel. Leading coordinates h are those along which the curvature changes; at many values of them
Gaussians :math:`q(x \mid h)` are fitted, whose evidence lower bounds

.. math:: \ell(h) \le \log \int p(h, x) \, dx

are those of the marginal posterior of h. It is fitted by a small mixture
:math:`\sum_j \pi_j N(h; \mu_j, \Sigma_j)`, in few dimensions and from many values, and each term is
given its own conditional Gaussian, whose mean moves linearly with h:

.. math:: q(h, x) = \sum_j \pi_j \, N(h; \mu_j, \Sigma_j) \,
    N(x; m_j + M_j (h - \mu_j), S_j), \quad M_j = -H_{xx}^{-1} H_{xh}

Source: Rue, Martino and Chopin (2009), *Approximate Bayesian inference for latent Gaussian models by
using integrated nested Laplace approximations*, for the nesting; its use as a base is our own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import State
from .components import NestedComponent
from .gaussian import Candidates, follow_newton, hessians
from .rows import Rows

__all__ = ["Nested", "leading_coordinates", "nested_gaussians"]

# Leading coordinates at most, values of them, and Gaussians by their number.
_MOST_LEADING, _NUM_VALUES = 3, 96
# Coordinates that are tried: those along which curvature changes most.
_MOST_LIKELY = 12
_NUM_TERMS = {1: 6, 2: 14, 3: 18}
# Times that values are drawn and their marginal is fitted anew, and steps of one fit.
_NUM_TURNS, _NUM_EM = 4, 30
# Third derivatives left to explain, squared: what is little, over that at first, and in itself.
_LEAST_SHARE, _LEAST_SIZE = 0.05, 0.1
# Values are drawn from Student-t this much wider than the fit's marginal, of these degrees of freedom.
_WIDER, _DOF = 1.5, 5.0
_SHARE_OF_WIDE = 0.05  # kept for what a few values do not show


@dataclass(frozen=True, eq=False)
class Nested:
    """Terms over all coordinates in the order of ``lead`` and ``rest``."""

    lead: list[int]
    rest: list[int]
    log_weights: Tensor  # [J]
    loc: Tensor  # [J, D]
    scale_tril: Tensor  # [J, D, D]
    dof: float = _DOF

    def component(self) -> NestedComponent:
        """Makes the density."""
        order = [*self.lead, *self.rest]
        tables = (self.log_weights, self.loc, self.scale_tril)
        return NestedComponent(order, len(self.lead), *tables, self.dof)

    def log_density(self, position: Tensor) -> Tensor:
        """Computes log q at rows ``[N, D]``."""
        return self.component().log_density(position)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws rows ``[count, D]``."""
        weights = self.log_weights.exp()
        index = torch.multinomial(weights, count, replacement=True, generator=generator)
        noise = _noise(self.loc, (count, self.loc.shape[-1]), generator)
        lead = len(self.lead)
        heavy = _heavy(self.loc.new_full((count, 1), self.dof), generator)
        noise = torch.cat([noise[:, :lead] * heavy, noise[:, lead:]], 1)
        placed = self.loc[index] + (self.scale_tril[index] @ noise.unsqueeze(-1)).squeeze(-1)
        found = torch.empty_like(placed)
        found[:, [*self.lead, *self.rest]] = placed
        return found


def _noise(like: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)


def _heavy(dof: Tensor, generator: torch.Generator) -> Tensor:
    """Draws the factors that make normal noise Student-t."""
    half = 0.5 * dof
    factor: Tensor = (torch._standard_gamma(half, generator=generator) / half).rsqrt()
    return factor


def leading_coordinates(rows: Rows, fit: Candidates) -> list[int]:
    r"""Finds coordinates given which the others are next to a Gaussian.

    With :math:`T_{ijk}` the third derivatives of the target, in units of the Gaussian's conditional
    covariance given h, :math:`\|T\|^2` over all others is what h leaves unexplained. Coordinates are
    added one by one, each the one that leaves the least.

    Args:
        rows: Evaluates the target.
        fit: A Gaussian, ``[1, D]``.

    Returns:
        Up to three coordinates; none where a Gaussian fits.
    """
    loc, scale = fit.loc[0], fit.scale_tril[0]
    precision = torch.cholesky_inverse(scale)
    width = precision.diagonal().rsqrt()
    shifts = torch.diag(width)
    found = hessians(rows, torch.cat([loc + shifts, loc - shifts])).nan_to_num()
    third = (found[: len(loc)] - found[len(loc) :]) / (2.0 * width).view(-1, 1, 1)
    moved = (scale.mT @ third @ scale).square().sum((1, 2)) * width.square()
    likely = moved.argsort(descending=True)[:_MOST_LIKELY].tolist()
    lead: list[int] = []
    size = first = _unexplained(third, precision, lead)
    most = min(_MOST_LEADING, len(loc) - 1)
    while len(lead) < most and size > max(_LEAST_SIZE, _LEAST_SHARE * first):
        rest = [i for i in likely if i not in lead]
        left = [_unexplained(third, precision, [*lead, i]) for i in rest]
        least = min(range(len(rest)), key=left.__getitem__)
        if not left[least] < 0.7 * size:
            break
        lead, size = [*lead, rest[least]], left[least]
    return lead


def _unexplained(third: Tensor, precision: Tensor, lead: list[int]) -> float:
    """Computes the squared size of third derivatives given the leading coordinates."""
    rest = [i for i in range(len(third)) if i not in lead]
    own = torch.linalg.inv(precision[rest][:, rest])
    factor = torch.linalg.cholesky(0.5 * (own + own.mT))
    part = third[rest][:, rest][:, :, rest]
    for _ in range(3):
        part = torch.tensordot(part, factor, dims=([0], [0]))
    return float(part.square().sum())


class _Given:
    """The target of the others at each of N values of the leading coordinates, as a batch."""

    def __init__(
        self, rows: Rows, lead: Sequence[int], rest: Sequence[int], value: Tensor
    ) -> None:
        self.rows, self.lead, self.rest, self.value = rows, list(lead), list(rest), value

    def __call__(self, position: Tensor) -> State:
        value, grad = self.rows(self.joined(position))
        grad = grad[..., self.rest]
        return State(position, value, value, grad, grad)

    def joined(self, position: Tensor) -> Tensor:
        """Joins ``[..., N, D - d]`` and the values to ``[..., N, D]``."""
        shape = (*position.shape[:-1], len(self.lead) + len(self.rest))
        whole = position.new_empty(shape)
        whole[..., self.lead] = self.value
        whole[..., self.rest] = position
        return whole


@dataclass(frozen=True, eq=False)
class _Split:
    """Leading coordinates and the others, under a Gaussian of both."""

    lead: list[int]
    rest: list[int]
    loc: Tensor  # [D]
    covariance: Tensor  # [D, D]

    def start(self, value: Tensor) -> Tensor:
        """Computes the conditional mean of the others, ``[N, D - d]``."""
        own = self.covariance[self.lead][:, self.lead]
        slope: Tensor = torch.linalg.solve(own, self.covariance[self.lead][:, self.rest])
        return self.loc[self.rest] + (value - self.loc[self.lead]) @ slope


def _conditional(
    rows: Rows, split: _Split, value: Tensor, generator: torch.Generator
) -> Candidates:
    """Fits the others at each value ``[N, d]``: Gaussians ``[N, D - d]`` and their bounds."""
    given = Rows(_Given(rows, split.lead, split.rest, value), 8, 1)
    start = split.start(value).unsqueeze(0)
    found = follow_newton(given, start, generator, num_steps=10, patience=2)
    return Candidates(found.loc[0], found.scale_tril[0], found.elbo[0])


def nested_gaussians(
    rows: Rows, fit: Candidates, lead: list[int], generator: torch.Generator
) -> Nested | None:
    """Fits Gaussians of all coordinates along the leading ones.

    Args:
        rows: Evaluates the target.
        fit: A Gaussian of all coordinates, ``[1, D]``.
        lead: Leading coordinates.
        generator: Source of noise.

    Returns:
        The mixture, or None if no density was found.
    """
    loc, scale = fit.loc[0], fit.scale_tril[0]
    rest = [i for i in range(len(loc)) if i not in lead]
    split = _Split(lead, rest, loc, scale @ scale.mT)
    own = torch.linalg.cholesky(split.covariance[lead][:, lead])
    wide = _Marginal(loc.new_zeros(1), loc[lead].unsqueeze(0), _WIDER * own.unsqueeze(0))
    used, found = wide, wide
    values, bounds, proposals = [], [], []
    for _ in range(_NUM_TURNS):
        values.append(used.draw(_NUM_VALUES, generator))
        bounds.append(_conditional(rows, split, values[-1], generator).elbo)
        proposals.append(used)
        seen, bound = torch.cat(values), torch.cat(bounds)
        log_proposal = torch.stack([each.log_density(seen) for each in proposals])
        log_weight = (bound - log_proposal.logsumexp(0)).double().nan_to_num(nan=-torch.inf)
        if not bool(log_weight.isfinite().any()):
            return None
        found = _fit_marginal(seen, log_weight.softmax(0), _NUM_TERMS[len(lead)], generator)
        used = found.beside(wide, _SHARE_OF_WIDE)
    return _with_others(rows, split, used, generator)


@dataclass(frozen=True, eq=False)
class _Marginal:
    """A mixture of Student-t over the leading coordinates."""

    log_weights: Tensor  # [J]
    loc: Tensor  # [J, d]
    scale_tril: Tensor  # [J, d, d]

    def white(self, value: Tensor) -> Tensor:
        """Computes white coordinates of values ``[N, d]``, ``[J, N, d]``."""
        apart = (value - self.loc.unsqueeze(1)).mT
        white: Tensor = torch.linalg.solve_triangular(self.scale_tril, apart, upper=False)
        return white.mT

    def terms(self, value: Tensor) -> Tensor:
        """Computes log of weight times density by term, ``[J, N]``."""
        dim = value.shape[-1]
        constant = math.lgamma(0.5 * (_DOF + dim)) - math.lgamma(0.5 * _DOF)
        constant -= 0.5 * dim * math.log(_DOF * math.pi)
        radial = -0.5 * (_DOF + dim) * torch.log1p(self.white(value).square().sum(-1) / _DOF)
        log_scale = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        terms: Tensor = constant + radial + (self.log_weights - log_scale).unsqueeze(-1)
        return terms

    def log_density(self, value: Tensor) -> Tensor:
        """Computes the log density at values ``[N, d]``."""
        return self.terms(value).logsumexp(0)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws values ``[count, d]``."""
        weights = self.log_weights.exp()
        index = torch.multinomial(weights, count, replacement=True, generator=generator)
        noise = _noise(self.loc, (count, self.loc.shape[-1]), generator)
        noise = noise * _heavy(self.loc.new_full((count, 1), _DOF), generator)
        placed: Tensor = (self.scale_tril[index] @ noise.unsqueeze(-1)).squeeze(-1)
        return self.loc[index] + placed

    def beside(self, other: _Marginal, share: float) -> _Marginal:
        """Adds the terms of another mixture, of a share of the mass."""
        log_weights = [self.log_weights + math.log1p(-share), other.log_weights + math.log(share)]
        loc = torch.cat([self.loc, other.loc])
        return _Marginal(
            torch.cat(log_weights), loc, torch.cat([self.scale_tril, other.scale_tril])
        )


def _fit_marginal(
    value: Tensor, weights: Tensor, count: int, generator: torch.Generator
) -> _Marginal:
    """Fits a mixture to weighted values ``[N, d]`` by expectation maximization."""
    dim = value.shape[-1]
    weights = weights.to(value)
    count = min(count, int((weights > 0.0).sum()))
    centred = value - weights @ value
    pooled = (centred * weights.unsqueeze(-1)).mT @ centred
    eye = torch.eye(dim, dtype=value.dtype, device=value.device)
    pooled = pooled + 1e-6 * eye * pooled.diagonal().mean().clamp(min=1e-12)
    index = torch.multinomial(weights, count, replacement=False, generator=generator)
    shrunk = pooled / count ** (2.0 / dim)  # what each has of the volume
    log_weights = value.new_full((count,), -math.log(count))
    found = _Marginal(
        log_weights, value[index], torch.linalg.cholesky(shrunk).expand(count, dim, dim)
    )
    for _ in range(_NUM_EM):
        mass = found.terms(value).softmax(0) * weights  # [J, N]
        total = mass.sum(1)
        effective = total.square() / mass.square().sum(1).clamp(min=1e-300)
        tails = (_DOF + dim) / (_DOF + found.white(value).square().sum(-1))
        pull = mass * tails
        loc = (pull @ value) / pull.sum(1, keepdim=True).clamp(min=1e-300)
        trust = (effective / (effective + 1.0)).unsqueeze(-1)
        loc = trust * loc + (1.0 - trust) * found.loc
        apart = value - loc.unsqueeze(1)  # [J, N, d]
        moments = (apart * pull.unsqueeze(-1)).mT @ apart / total.clamp(min=1e-300).view(-1, 1, 1)
        strength = (effective / (effective + 2.0 * dim + 2.0)).view(-1, 1, 1)
        covariance = strength * moments + (1.0 - strength) * shrunk
        log_weights = (total + 1e-3 / count).log().log_softmax(0)
        found = _Marginal(log_weights, loc, torch.linalg.cholesky(covariance))
    return found


def _with_others(
    rows: Rows, split: _Split, marginal: _Marginal, generator: torch.Generator
) -> Nested | None:
    """Adds to each term of h the conditional Gaussian of the others."""
    lead, rest = split.lead, split.rest
    found = _conditional(rows, split, marginal.loc, generator)
    whole = _Given(rows, lead, rest, marginal.loc).joined(found.loc)
    cross = hessians(rows, whole).nan_to_num()[:, rest][:, :, lead]
    slope = found.scale_tril @ (found.scale_tril.mT @ cross)  # -H_xx is the inverse of S
    own = marginal.scale_tril
    above = torch.cat([own, own.new_zeros(len(own), len(lead), len(rest))], 2)
    below = torch.cat([slope @ own, found.scale_tril], 2)
    alive = found.elbo.isfinite() & below.isfinite().all((1, 2))
    if not bool(alive.any()):
        return None
    return Nested(
        lead,
        rest,
        marginal.log_weights[alive].log_softmax(0),
        torch.cat([marginal.loc, found.loc], 1)[alive],
        torch.cat([above, below], 1)[alive],
    )
