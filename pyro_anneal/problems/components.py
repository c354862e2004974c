r"""Densities that a fitted base is made of: Gaussians and Student-t, dense or of low rank.

With white coordinates :math:`w = S^{-1} (u - m)` of a factor S,

.. math::
    \log q(u) = -\log |S| - \tfrac{D}{2} \log 2 \pi - \tfrac12 |w|^2

for a Gaussian, and for a multivariate Student-t of :math:`\nu` degrees of freedom

.. math::
    \log q(u) = -\log |S| + \log \frac{\Gamma((\nu + D) / 2)}{\Gamma(\nu / 2) (\nu \pi)^{D / 2}}
    - \tfrac{\nu + D}{2} \log(1 + |w|^2 / \nu).
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from .low_rank import LowRankScale

__all__ = ["Component", "DenseComponent", "LowRankComponent"]


class Component(Protocol):
    """One normalized density of a fitted base, per batch element."""

    def draw(self) -> Tensor:
        """Draws ``u`` of shape ``[*batch, D]``."""
        ...

    def log_density(self, position: Tensor) -> Tensor:
        """Computes log q at rows ``[P, *batch, D]``, shape ``[P, *batch]``."""
        ...


def _radial(square: Tensor, dim: int, dof: float) -> Tensor:
    """Computes the log density of white coordinates from their squared norm."""
    if math.isinf(dof):
        return -0.5 * dim * math.log(2.0 * math.pi) - 0.5 * square
    normalizer = math.lgamma(0.5 * (dof + dim)) - math.lgamma(0.5 * dof)
    normalizer -= 0.5 * dim * math.log(dof * math.pi)
    return normalizer - 0.5 * (dof + dim) * torch.log1p(square / dof)


def _noise(loc: Tensor, dof: float) -> Tensor:
    """Draws white noise of the shape of ``loc``."""
    noise = torch.randn_like(loc)
    if math.isinf(dof):
        return noise
    half = torch.full_like(loc[..., :1], 0.5 * dof)
    return noise * (torch._standard_gamma(half) / (0.5 * dof)).rsqrt()


class DenseComponent:
    """A Gaussian or Student-t with a full factor.

    Args:
        loc: Location ``[*batch, D]``.
        scale_tril: Lower triangular factor ``[*batch, D, D]``.
        dof: Degrees of freedom; infinity for a Gaussian.
    """

    def __init__(self, loc: Tensor, scale_tril: Tensor, dof: float = math.inf) -> None:
        self.loc = loc
        self.scale_tril = scale_tril
        self.dof = dof
        identity = torch.eye(loc.shape[-1], dtype=loc.dtype, device=loc.device)
        self.whiten = torch.linalg.solve_triangular(
            scale_tril, identity.expand_as(scale_tril), upper=False
        )
        self.log_scale = scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def draw(self) -> Tensor:
        """Draws ``u`` of shape ``[*batch, D]``."""
        noise = _noise(self.loc, self.dof)
        return self.loc + (self.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)

    def log_density(self, position: Tensor) -> Tensor:
        """Computes log q at rows ``[P, *batch, D]``, shape ``[P, *batch]``."""
        white = (self.whiten @ (position - self.loc).unsqueeze(-1)).squeeze(-1)
        return _radial(white.square().sum(-1), self.loc.shape[-1], self.dof) - self.log_scale


class LowRankComponent:
    """A Gaussian or Student-t whose covariance is of low rank plus diagonal.

    Args:
        loc: Location ``[*batch, D]``.
        scale: Its factor.
        dof: Degrees of freedom; infinity for a Gaussian.
    """

    def __init__(self, loc: Tensor, scale: LowRankScale, dof: float = math.inf) -> None:
        self.loc = loc
        self.scale = scale
        self.dof = dof
        self.inverse = scale.deviation.reciprocal()
        self.shrink = scale.stretch.square().reciprocal() - 1.0
        self.log_scale = scale.log_det

    def draw(self) -> Tensor:
        """Draws ``u`` of shape ``[*batch, D]``."""
        return self.scale.place(self.loc, _noise(self.loc, self.dof).unsqueeze(0))[0]

    def log_density(self, position: Tensor) -> Tensor:
        """Computes log q at rows ``[P, *batch, D]``, shape ``[P, *batch]``."""
        scaled = (position - self.loc) * self.inverse
        along = (self.scale.vectors.mT @ scaled.unsqueeze(-1)).squeeze(-1)
        square = scaled.square().sum(-1) + (self.shrink * along.square()).sum(-1)
        return _radial(square, self.loc.shape[-1], self.dof) - self.log_scale
