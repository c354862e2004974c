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

from ..models.squashed import SquashedGaussian
from ..persistence.randomness import own_randomness
from .joints import Joint

__all__ = ["Surrogate"]

_NUM_FITTED, _NUM_FRESH, _MOST_ROWS = 1000, 32, 2**14


@dataclass(frozen=True, eq=False)
class Surrogate:
    """What follows the information of pairs of a joint, and can be simulated.

    Attributes:
        joint: The full joint density.
        gaussian: A Gaussian of x, flattened, with long tails drawn in.
        seed: Seed of the fresh pairs.
    """

    joint: Joint
    gaussian: SquashedGaussian
    seed: int

    @staticmethod
    def fit(joint: Joint, seed: int) -> Surrogate:
        """Fits the Gaussian of x to a thousand simulated pairs."""
        with own_randomness(seed), torch.no_grad():
            x, _ = joint.sample(_NUM_FITTED)
        return Surrogate(joint, SquashedGaussian.fit(x.reshape(len(x), -1)), seed)

    def values(self, x: Tensor, z: Tensor) -> Tensor:
        """Computes log p(x|z) and log q(x), up to a constant, in nats, ``[2, N]``."""
        log_q = self.gaussian.log_density(x.reshape(len(x), -1))
        return torch.stack([self.joint.log_likelihood(x, z).double(), log_q])

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
