r"""Bijections that torch lacks: onto the circle, the sphere, and positive-definite matrices.

Each maps unconstrained numbers one to one onto its set, up to a set of measure zero, with the
Jacobian of the measure that the distributions there use: angle, surface, lower triangle.
"""

from __future__ import annotations

import math

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import Transform
from torch.nn.functional import logsigmoid

__all__ = [
    "BendTransform",
    "CircleTransform",
    "PositiveDefiniteTransform",
    "SphereTransform",
    "wrapped",
]


def wrapped(angle: Tensor) -> Tensor:
    """Maps angles to [-pi, pi).

    Example:
        >>> wrapped(torch.tensor(4.0))
        tensor(-2.2832)
    """
    return torch.remainder(angle + math.pi, 2.0 * math.pi) - math.pi


def _log_slope(u: Tensor) -> Tensor:
    """Computes the log derivative of the sigmoid."""
    return logsigmoid(u) + logsigmoid(-u)


def _logit(share: Tensor) -> Tensor:
    tiny = torch.finfo(share.dtype).tiny
    eps = torch.finfo(share.dtype).eps
    share = share.clamp(tiny, 1.0 - eps)
    return share.log() - torch.log1p(-share)


class BendTransform(Transform):
    r"""Turns exponential tails into Gaussian ones: ``u = v + k v |v| / 2``, k by the sign of v.

    Where a density falls as :math:`e^{-r|u|}`, that of v with ``k = 1 / r - 1`` falls as a normal's.

    Args:
        left: Bend k >= 0 of negative values.
        right: Bend of positive values.
    """

    domain = constraints.real
    codomain = constraints.real
    bijective = True

    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.left = left
        self.right = right

    def _bend(self, x: Tensor) -> Tensor:
        return torch.where(x < 0, self.left, self.right)

    def _call(self, x: Tensor) -> Tensor:
        return x + 0.5 * self._bend(x) * x * x.abs()

    def _inverse(self, y: Tensor) -> Tensor:
        return 2.0 * y / (1.0 + (1.0 + 2.0 * self._bend(y) * y.abs()).sqrt())

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Computes log(1 + k |v|)."""
        return torch.log1p(self._bend(x) * x.abs())


class CircleTransform(Transform):
    r"""Maps the reals onto one period, ``angle = centre + 2 pi (sigmoid(u) - 1/2)``, wrapped.

    The cut, where u is infinite, lies opposite to the centre: a density around it stays in one
    piece, wherever on the circle that is.

    Args:
        centre: Angle at u = 0.
    """

    domain = constraints.real
    codomain = constraints.interval(-math.pi, math.pi)
    bijective = True

    def __init__(self, centre: Tensor) -> None:
        super().__init__()
        self.centre = centre

    def _call(self, x: Tensor) -> Tensor:
        return wrapped(self.centre + 2.0 * math.pi * (torch.sigmoid(x) - 0.5))

    def _inverse(self, y: Tensor) -> Tensor:
        return _logit(wrapped(y - self.centre) / (2.0 * math.pi) + 0.5)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Computes log of the angle per unit of u."""
        return _log_slope(x) + math.log(2.0 * math.pi)


class SphereTransform(Transform):
    r"""Maps n - 1 reals onto the unit sphere of R^n by its angles, the last one a full circle.

    .. math:: dS = \prod_{k=1}^{n-2} \sin^{n-1-k}\theta_k \; d\theta_1 \cdots d\theta_{n-1}

    A reflection takes the middle of the chart to ``centre``.

    Args:
        centre: Direction of the mass, of any length, shape ``[..., n]``; or None.
        dim: Dimension n of the space around the sphere.
    """

    domain = constraints.real_vector
    codomain = constraints.sphere
    bijective = True

    def __init__(self, centre: Tensor | None, dim: int) -> None:
        super().__init__()
        self.centre = centre
        self.dim = dim

    def _reflect(self, x: Tensor) -> Tensor:
        if self.centre is None:
            return x
        axes = torch.arange(self.dim, device=x.device)
        pole = (axes == self.dim - 2).to(x.dtype)  # the middle of the chart
        length = self.centre.norm(dim=-1, keepdim=True)
        unit = torch.where(length > 0, self.centre / length.clamp(min=1e-30), pole)
        normal = pole - unit
        square = normal.square().sum(-1, keepdim=True).clamp(min=1e-20)
        return x - 2.0 * normal * (normal * x).sum(-1, keepdim=True) / square

    def _call(self, x: Tensor) -> Tensor:
        polar = math.pi * torch.sigmoid(x[..., :-1])
        last = 2.0 * math.pi * (torch.sigmoid(x[..., -1:]) - 0.5)
        one = torch.ones_like(last)
        sines = torch.cat([one, polar.sin()], -1).cumprod(-1)  # [..., n - 1]
        parts = [sines[..., :-1] * polar.cos(), sines[..., -1:] * last.cos()]
        return self._reflect(torch.cat([*parts, sines[..., -1:] * last.sin()], -1))

    def _inverse(self, y: Tensor) -> Tensor:
        y = self._reflect(y)
        rest = y.square().flip(-1).cumsum(-1).flip(-1).sqrt()  # norms of tails
        polar = torch.atan2(rest[..., 1:-1], y[..., :-2])
        last = torch.atan2(y[..., -1:], y[..., -2:-1])
        return torch.cat([_logit(polar / math.pi), _logit(last / (2.0 * math.pi) + 0.5)], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Computes log of the surface per unit of u."""
        powers = torch.arange(self.dim - 2, 0, -1, dtype=x.dtype, device=x.device)
        sines = (math.pi * torch.sigmoid(x[..., :-1])).sin()
        constant = math.log(2.0 * math.pi) + (self.dim - 2) * math.log(math.pi)
        return constant + _log_slope(x).sum(-1) + (powers * sines.log()).sum(-1)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """Returns the shape of values."""
        return torch.Size([*shape[:-1], shape[-1] + 1])

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """Returns the shape of unconstrained values."""
        return torch.Size([*shape[:-1], shape[-1] - 1])


class PositiveDefiniteTransform(Transform):
    r"""Maps n (n + 1) / 2 reals to ``L L^T``, L lower triangular with an exponentiated diagonal.

    .. math:: \log|J| = n \log 2 + \sum_{i=1}^n (n - i + 2) \log L_{ii}

    with respect to the entries of the lower triangle, as densities of matrices are.

    Source: Muirhead (1982), *Aspects of multivariate statistical theory*, theorem 2.1.9.
    """

    domain = constraints.real_vector
    codomain = constraints.positive_definite
    bijective = True

    def _call(self, x: Tensor) -> Tensor:
        size = self._size(x.shape[-1])
        row = torch.arange(size, device=x.device).unsqueeze(-1)
        place = row * (row + 1) // 2 + row.mT.clamp(max=row)  # of entry (i, j) in x
        lower = x[..., place.flatten()].reshape(*x.shape[:-1], size, size).tril(-1)
        lower = lower + x[..., place.diagonal()].exp().diag_embed()
        return lower @ lower.mT

    def _inverse(self, y: Tensor) -> Tensor:
        lower, info = torch.linalg.cholesky_ex(y)
        # rounded beyond the edge: no finite u
        lower = torch.where((info == 0)[..., None, None], lower, torch.nan)
        size = y.shape[-1]
        diagonal = lower.diagonal(dim1=-2, dim2=-1).log()
        lower = lower.tril(-1) + diagonal.diag_embed()
        rows, columns = torch.tril_indices(size, size, device=y.device).unbind()
        packed: Tensor = lower[..., rows, columns]
        return packed

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Computes log of the matrices' volume per unit of u."""
        size = y.shape[-1]
        ends = torch.arange(1, size + 1, device=x.device)
        log_diagonal = x[..., ends * (ends + 1) // 2 - 1]
        weights: Tensor = (size + 2 - ends) * log_diagonal
        return size * math.log(2.0) + weights.sum(-1)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """Returns the shape of values."""
        size = self._size(shape[-1])
        return torch.Size([*shape[:-1], size, size])

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """Returns the shape of unconstrained values."""
        size = shape[-1]
        return torch.Size([*shape[:-2], size * (size + 1) // 2])

    @staticmethod
    def _size(length: int) -> int:
        return (math.isqrt(8 * length + 1) - 1) // 2
