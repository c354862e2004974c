r"""Control variates from a surrogate of the information, centred by simulated pairs.

The value of a pair is about :math:`\log p(x|z) - \log p(x)`. A surrogate :math:`s(x, z)`, any function of
the pair, follows it from pair to pair, but its mean is unknown: that of
:math:`\log p(x|z) - \log q(x|z)` is a divergence. Pairs can be simulated, though, at a small part of
the price of a bound, so each pair i gets m fresh ones of its own:

.. math:: c_i = s(x_i, z_i) - \frac{1}{m} \sum_{j=1}^m s(x_{ij}, z_{ij}), \qquad E[c_i] = 0 .

They are independent over pairs, so errors over pairs hold what the centring adds, and at most a share
of :math:`1 / (m + 1)` of the surrogate's variance is left. Here s is log p(x|z), and a Gaussian log q(x), of x
with its tails drawn in, that is fitted to other simulated pairs; their coefficients are fitted like those of all control variates.

Source: Owen (2013), *Monte Carlo theory, methods and examples*, section 8.9; Peherstorfer, Willcox
and Gunzburger (2016), *Optimal model management for multifidelity Monte Carlo estimation*.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..persistence.randomness import own_randomness
from .joints import Joint

__all__ = ["Surrogate"]

_NUM_FITTED, _NUM_FRESH, _MOST_ROWS = 1000, 32, 2**14


@dataclass(frozen=True, eq=False)
class Surrogate:
    """What follows the information of pairs of a joint, and can be simulated.

    Attributes:
        joint: The full joint density.
        loc: Mean of x, flattened, ``[D]``.
        scale: Its standard deviations.
        factor: Cholesky factor of the covariance of what is left, with long tails drawn in, shrunk
            to the diagonal, ``[D, D]``.
        seed: Seed of the fresh pairs.
    """

    joint: Joint
    loc: Tensor
    scale: Tensor
    factor: Tensor
    seed: int

    @staticmethod
    def fit(joint: Joint, seed: int) -> Surrogate:
        """Fits the Gaussian of x to a thousand simulated pairs."""
        with own_randomness(seed), torch.no_grad():
            x, _ = joint.sample(_NUM_FITTED)
        rows = x.reshape(len(x), -1).double()
        loc, scale = rows.mean(0), rows.std(0)
        scale = torch.where(scale > 0.0, scale, 1.0)
        white = _drawn_in((rows - loc) / scale)
        covariance = white.mT @ white / len(rows)
        share = min(0.5, rows.shape[1] / len(rows))  # few pairs know little of many covariances
        diagonal = covariance.diagonal().clamp(min=1e-12)
        covariance = (1.0 - share) * covariance + torch.diag(share * diagonal + 1e-9 * diagonal)
        return Surrogate(joint, loc, scale, torch.linalg.cholesky(covariance), seed)

    def values(self, x: Tensor, z: Tensor) -> Tensor:
        """Computes log p(x|z) and log q(x), up to a constant, in nats, ``[2, N]``."""
        rows = _drawn_in((x.reshape(len(x), -1).double() - self.loc) / self.scale)
        white = torch.linalg.solve_triangular(self.factor, rows.mT, upper=False)
        return torch.stack(
            [self.joint.log_likelihood(x, z).double(), -0.5 * white.square().sum(0)]
        )

    def controls(self, x: Tensor, z: Tensor, batch: int) -> Tensor:
        """Computes control variates of N pairs, of mean zero over simulated pairs, ``[2, N]``.

        Args:
            x: Simulated data.
            z: The z of each.
            batch: Number of the batch, which tells its fresh pairs from those of others.
        """
        found = self.values(x, z)
        total = torch.zeros_like(found)
        each = max(1, _MOST_ROWS // len(x))
        with own_randomness(self.seed + 1 + batch):
            for first in range(0, _NUM_FRESH, each):
                repeats = min(each, _NUM_FRESH - first)
                fresh = self.values(*self.joint.sample(repeats * len(x)))
                total += fresh.reshape(2, repeats, len(x)).sum(1)
        return found - total / _NUM_FRESH


def _drawn_in(white: Tensor) -> Tensor:
    """Keeps values of up to about three standard deviations, and takes logarithms beyond."""
    return 3.0 * (white / 3.0).asinh()
