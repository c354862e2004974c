"""A Gaussian of data with long tails drawn in: a cheap stand-in for log p(x)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SquashedGaussian"]


@dataclass(frozen=True, eq=False)
class SquashedGaussian:
    """A Gaussian of x, beyond about three standard deviations of its logarithm.

    Attributes:
        loc: Mean of x, ``[D]``.
        scale: Its standard deviations.
        factor: Cholesky factor of the covariance of what is left, with long tails drawn in, shrunk
            to the diagonal, ``[D, D]``.
    """

    loc: Tensor
    scale: Tensor
    factor: Tensor

    @staticmethod
    def fit(rows: Tensor) -> SquashedGaussian:
        """Fits it to rows ``[M, D]``.

        Example:
            >>> found = SquashedGaussian.fit(3.0 + torch.randn(100, 2))
            >>> found.log_density(torch.tensor([[3.0, 3.0], [9.0, 9.0]])).argmax()
            tensor(0)
        """
        rows = rows.double()
        loc, scale = rows.mean(0), rows.std(0)
        scale = torch.where(scale > 0.0, scale, 1.0)
        white = _drawn_in((rows - loc) / scale)
        covariance = white.mT @ white / len(rows)
        share = min(0.5, rows.shape[1] / len(rows))  # few pairs know little of many covariances
        diagonal = covariance.diagonal().clamp(min=1e-12)
        covariance = (1.0 - share) * covariance + torch.diag(share * diagonal + 1e-9 * diagonal)
        return SquashedGaussian(loc, scale, torch.linalg.cholesky(covariance))

    def log_density(self, rows: Tensor) -> Tensor:
        """Computes log q(x) up to a constant, in nats, ``[M]`` of rows ``[M, D]``."""
        white = _drawn_in((rows.double() - self.loc) / self.scale)
        solved = torch.linalg.solve_triangular(self.factor, white.mT, upper=False)
        squares: Tensor = solved.square().sum(0)
        return -0.5 * squares


def _drawn_in(white: Tensor) -> Tensor:
    """Keeps values of up to about three standard deviations, and takes logarithms beyond."""
    return 3.0 * (white / 3.0).asinh()
