"""Mixtures of Student-t over a few coordinates, fitted to weighted values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DOF", "Marginal", "fit_marginal", "heavy", "white_noise"]

DOF = 5.0  # degrees of freedom of each term
_NUM_EM, _NUM_MORE = 30, 8


def white_noise(like: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draws normal noise of the kind of ``like``."""
    return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)


def heavy(like: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draws the factors ``[count, 1]`` that make normal noise Student-t."""
    half = like.new_full((count, 1), 0.5 * DOF)
    factor: Tensor = (torch._standard_gamma(half, generator=generator) / half).rsqrt()
    return factor


@dataclass(frozen=True, eq=False)
class Marginal:
    """A mixture of Student-t over few coordinates."""

    log_weights: Tensor  # [J]
    loc: Tensor  # [J, d]
    scale_tril: Tensor  # [J, d, d]

    def white(self, value: Tensor) -> Tensor:
        """Computes white coordinates of values ``[N, d]``, ``[J, N, d]``."""
        eye = torch.eye(value.shape[-1], dtype=value.dtype, device=value.device)
        inverse = torch.linalg.solve_triangular(
            self.scale_tril, eye.expand_as(self.scale_tril), upper=False
        )
        white: Tensor = (value - self.loc.unsqueeze(1)) @ inverse.mT
        return white

    def terms(self, value: Tensor) -> Tensor:
        """Computes log of weight times density by term, ``[J, N]``."""
        dim = value.shape[-1]
        constant = math.lgamma(0.5 * (DOF + dim)) - math.lgamma(0.5 * DOF)
        constant -= 0.5 * dim * math.log(DOF * math.pi)
        radial = -0.5 * (DOF + dim) * torch.log1p(self.white(value).square().sum(-1) / DOF)
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
        noise = white_noise(self.loc, (count, self.loc.shape[-1]), generator)
        noise = noise * heavy(self.loc, count, generator)
        placed: Tensor = (self.scale_tril[index] @ noise.unsqueeze(-1)).squeeze(-1)
        return self.loc[index] + placed

    def beside(self, other: Marginal, share: float) -> Marginal:
        """Adds the terms of another mixture, of a share of the mass."""
        log_weights = [self.log_weights + math.log1p(-share), other.log_weights + math.log(share)]
        loc = torch.cat([self.loc, other.loc])
        return Marginal(
            torch.cat(log_weights), loc, torch.cat([self.scale_tril, other.scale_tril])
        )


def fit_marginal(
    value: Tensor,
    weights: Tensor,
    count: int,
    generator: torch.Generator,
    *,
    start: Marginal | None = None,
) -> Marginal:
    """Fits a mixture to weighted values by expectation maximization.

    Args:
        value: Values ``[N, d]``.
        weights: Their normalized weights ``[N]``.
        count: Terms at most.
        generator: Chooses where terms begin.
        start: Terms to begin from, instead.

    Returns:
        The mixture; terms that few values back keep to where they began.
    """
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
    found = Marginal(
        log_weights, value[index], torch.linalg.cholesky(shrunk).expand(count, dim, dim)
    )
    if start is not None:
        found = start
    for _ in range(_NUM_EM if start is None else _NUM_MORE):
        mass = found.terms(value).softmax(0) * weights  # [J, N]
        total = mass.sum(1)
        effective = total.square() / mass.square().sum(1).clamp(min=1e-300)
        tails = (DOF + dim) / (DOF + found.white(value).square().sum(-1))
        pull = mass * tails
        loc = (pull @ value) / pull.sum(1, keepdim=True).clamp(min=1e-300)
        trust = (effective / (effective + 1.0)).unsqueeze(-1)
        loc = trust * loc + (1.0 - trust) * found.loc
        apart = value - loc.unsqueeze(1)  # [J, N, d]
        moments = (apart * pull.unsqueeze(-1)).mT @ apart / total.clamp(min=1e-300).view(-1, 1, 1)
        strength = (effective / (effective + 2.0 * dim + 2.0)).view(-1, 1, 1)
        covariance = strength * moments + (1.0 - strength) * shrunk
        log_weights = (total + 1e-3 / len(total)).log().log_softmax(0)
        found = Marginal(log_weights, loc, torch.linalg.cholesky(covariance))
    return found
