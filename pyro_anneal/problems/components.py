r"""Densities that a fitted base is made of: Gaussians and Student-t, dense, of low rank, in products.

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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .given import Given
from .low_rank import LowRankScale

__all__ = [
    "Component",
    "DenseComponent",
    "LowRankComponent",
    "MixtureOfPart",
    "NestedComponent",
    "ProductComponent",
]


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


class _White:
    """White coordinates of many terms by one product, which is what native code knows best.

    Args:
        whiten: Inverse factors by term, ``[*terms, d, D]``.
        loc: Locations, ``[*terms, D]``.
        centre: What is taken off first, ``[D]``: places far from zero have few digits.
    """

    def __init__(self, whiten: Tensor, loc: Tensor, centre: Tensor) -> None:
        self.shape = whiten.shape[:-1]
        self.centre = centre
        self.matrix = whiten.flatten(0, -2)  # [terms * d, D]
        offset = whiten @ (loc - self.centre).unsqueeze(-1)
        self.offset = offset.flatten()

    def __call__(self, position: Tensor) -> Tensor:
        """Computes them at rows ``[P, D]``, ``[P, *terms, d]``."""
        white = (self.matrix @ (position - self.centre).unsqueeze(-1)).squeeze(-1) - self.offset
        return white.reshape(*position.shape[:-1], *self.shape)


class NestedComponent:
    r"""A mixture of Student-t over leading coordinates, and all others Gaussian given them.

    .. math:: \log q(h, x) = \log \sum_j \pi_j \, t_\nu(h; \mu_j, \Sigma_j)
        + \log N(x; m(h), S(h))

    Args:
        order: Coordinates in the order of the tables, the leading ones first.
        log_weights: Log weights ``[J]``.
        loc: Locations ``[J, d]``.
        scale_tril: Lower triangular factors ``[J, d, d]``.
        dof: Degrees of freedom of the leading ones.
        given: The Gaussian of the others.
    """

    def __init__(
        self,
        order: Sequence[int],
        log_weights: Tensor,
        loc: Tensor,
        scale_tril: Tensor,
        dof: float,
        given: Given,
    ) -> None:
        self.order = list(order)
        self.inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        self.num_leading = loc.shape[-1]
        whole = torch.eye(len(self.order), dtype=loc.dtype, device=loc.device)
        self.pick = whole[self.order]
        self.log_weights = log_weights.to(loc).log_softmax(0)
        self.loc = loc
        self.scale_tril = scale_tril
        self.dof = dof
        self.given = given
        identity = torch.eye(loc.shape[-1], dtype=loc.dtype, device=loc.device)
        whiten = torch.linalg.solve_triangular(
            scale_tril, identity.expand_as(scale_tril), upper=False
        )
        self.white = _White(whiten, loc, loc.mean(0))
        log_scale = scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        self.log_factor = self.log_weights - log_scale

    def draw(self) -> Tensor:
        """Draws ``u`` of shape ``[D]``."""
        lead = _noise(self.loc[0], self.dof)
        uniform = torch.rand_like(self.log_weights).clamp(min=1e-30)
        index = (self.log_weights - (-uniform.log()).log()).argmax().reshape(1)
        value = self.loc[index][0] + self.scale_tril[index][0] @ lead
        other = self.given.place(value, torch.randn_like(self.given.centre))
        return torch.cat([value, other])[self.inverse]

    def log_density(self, position: Tensor) -> Tensor:
        """Computes log q at rows ``[P, D]``, shape ``[P]``."""
        lead = self.num_leading
        # native code knows products and slices, and no rows put where an index says
        ordered = (self.pick @ position.unsqueeze(-1)).squeeze(-1)
        value, other = ordered[..., :lead], ordered[..., lead:]
        terms = _radial(self.white(value).square().sum(-1), lead, self.dof) + self.log_factor
        return terms.logsumexp(-1) + self.given.log_density(value, other)


class ProductComponent:
    r"""A product over parts of the coordinates, of a mixture each.

    .. math:: \log q(u) = \sum_b \log \sum_j \pi_{bj} \, q_{bj}(u_b)

    Args:
        parts: The mixtures; their parts divide all coordinates among them.
    """

    def __init__(self, parts: Sequence[MixtureOfPart]) -> None:
        alike: dict[tuple[int, float], list[MixtureOfPart]] = {}
        for each in parts:
            alike.setdefault((len(each.part), each.dof), []).append(each)
        dim = sum(len(each.part) for each in parts)
        self.groups = [_AlikeParts(group, dim) for group in alike.values()]
        order = [i for group in self.groups for i in group.part.flatten().tolist()]
        self.inverse = sorted(range(len(order)), key=order.__getitem__)

    def draw(self) -> Tensor:
        """Draws ``u`` of shape ``[D]``, each part from a term of its own."""
        return torch.cat([group.draw() for group in self.groups])[self.inverse]

    def log_density(self, position: Tensor) -> Tensor:
        """Computes log q at rows ``[P, D]``, shape ``[P]``."""
        return torch.stack([group.log_density(position) for group in self.groups]).sum(0)


@dataclass(frozen=True, eq=False)
class MixtureOfPart:
    """A mixture of Gaussians or Student-t over some of the coordinates."""

    part: list[int]
    log_weights: Tensor  # [J]
    loc: Tensor  # [J, D_b]
    scale_tril: Tensor  # [J, D_b, D_b]
    dof: float


class _AlikeParts:
    """Parts of one size and of the same degrees of freedom, evaluated together."""

    def __init__(self, mixtures: Sequence[MixtureOfPart], dim: int) -> None:
        most = max(len(each.log_weights) for each in mixtures)

        def stacked(values: list[Tensor], fill: float | None = None) -> Tensor:
            """Stacks to ``[B, J, ...]``, the last term repeated at no weight."""
            filled = []
            for value in values:
                more = value[-1:].expand(most - len(value), *value.shape[1:])
                filled.append(torch.cat([value, more if fill is None else more * 0.0 + fill]))
            return torch.stack(filled)

        self.loc = stacked([each.loc for each in mixtures])
        self.scale_tril = stacked([each.scale_tril for each in mixtures])
        log_weights = [each.log_weights.to(self.loc).log_softmax(0) for each in mixtures]
        self.log_weights = stacked(log_weights, -torch.inf)
        self.dof = mixtures[0].dof
        self.part = torch.tensor([each.part for each in mixtures], device=self.loc.device)
        identity = torch.eye(self.loc.shape[-1], dtype=self.loc.dtype, device=self.loc.device)
        whiten = torch.linalg.solve_triangular(
            self.scale_tril, identity.expand_as(self.scale_tril), upper=False
        )
        whole = whiten.new_zeros(*whiten.shape[:-1], dim)  # [B, J, D_b, D]
        loc = whiten.new_zeros(*whiten.shape[:2], dim)
        for number, each in enumerate(mixtures):
            whole[number][..., each.part] = whiten[number]
            loc[number][..., each.part] = self.loc[number]
        self.white = _White(whole, loc, loc.sum(0).mean(0))  # parts have no coordinate in common
        log_scale = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        self.log_factor = self.log_weights - log_scale

    def draw(self) -> Tensor:
        """Draws all parts in their order, ``[B * D_b]``."""
        noise = _noise(self.loc[:, 0], self.dof)
        # Gumbel's largest: the index stays a tensor, so that all chains are drawn at once
        uniform = torch.rand_like(self.log_weights).clamp(min=1e-30)
        index = (self.log_weights - (-uniform.log()).log()).argmax(1)
        rows = torch.arange(len(self.loc), device=self.loc.device)
        loc, scale = self.loc[rows, index], self.scale_tril[rows, index]
        return (loc + (scale @ noise.unsqueeze(-1)).squeeze(-1)).flatten()

    def log_density(self, position: Tensor) -> Tensor:
        """Computes the sum over parts at rows ``[P, D]``, shape ``[P]``."""
        square = self.white(position).square().sum(-1)  # [P, B, J]
        terms = _radial(square, self.loc.shape[-1], self.dof) + self.log_factor
        return terms.logsumexp(-1).sum(-1)
