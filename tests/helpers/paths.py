"""Annealing paths whose normalizer is known, with exact draws from both ends.

Densities are closures with hand-written gradients: nothing here goes through Pyro or autograd, so
a batch of 20,000 elements of one problem gives 20,000 independent repeats in one call.
"""

import math
from dataclasses import dataclass

import torch

from pyro_anneal.chains.path import Path, TuningTable
from pyro_anneal.kernels import State

LOG_2PI = math.log(2.0 * math.pi)


def normal_log_prob(value, loc, scale):
    return -0.5 * ((value - loc) / scale).square() - torch.log(scale) - 0.5 * LOG_2PI


@dataclass(frozen=True, eq=False)
class MixturePath:
    """From a diagonal Gaussian to ``Z`` times an unequal mixture of two diagonal Gaussians.

    Nothing is symmetric: weights, means, scales and coordinates differ, so an error of sign or
    order has nowhere to hide. ``p^2 / q`` and ``q^2 / p`` are integrable, so that w and 1 / w have
    a variance in both directions.
    """

    base_loc: torch.Tensor  # [D]
    base_scale: torch.Tensor  # [D]
    weights: torch.Tensor  # [2]
    locs: torch.Tensor  # [2, D]
    scales: torch.Tensor  # [2, D]
    log_normalizer: float

    def __call__(self, position):
        base_white = (position - self.base_loc) / self.base_scale
        base = -0.5 * (base_white.square() + LOG_2PI).sum(-1) - self.base_scale.log().sum()
        grad_base = -base_white / self.base_scale
        pulls, parts = [], []
        for weight, loc, scale in zip(self.weights, self.locs, self.scales, strict=True):
            white = (position - loc) / scale
            parts.append(
                weight.log() - scale.log().sum() - 0.5 * (white.square() + LOG_2PI).sum(-1)
            )
            pulls.append(-white / scale)
        target = torch.logaddexp(parts[0], parts[1])
        share = (parts[0] - target).exp().unsqueeze(-1)
        grad_target = pulls[1] + share * (pulls[0] - pulls[1])
        return State(position, base, target + self.log_normalizer, grad_base, grad_target)

    @property
    def dim(self):
        return len(self.base_loc)

    def draw_base(self, *shape):
        noise = torch.randn(*shape, self.dim, dtype=self.base_loc.dtype)
        return self.base_loc + self.base_scale * noise

    def draw_target(self, *shape):
        noise = torch.randn(*shape, self.dim, dtype=self.base_loc.dtype)
        which = (torch.rand(*shape) >= self.weights[0]).long()
        return self.locs[which] + self.scales[which] * noise


def lopsided(dim=2, dtype=torch.float64, log_normalizer=0.7):
    """Builds the mixture path of one or two dimensions used throughout."""

    def tensor(values):
        return torch.tensor(values, dtype=dtype)

    return MixturePath(
        base_loc=tensor([0.2, -0.3][:dim]),
        base_scale=tensor([1.05, 0.85][:dim]),
        weights=tensor([0.7, 0.3]),
        locs=tensor([[-0.7, 0.3], [1.4, -0.6]])[:, :dim],
        scales=tensor([[0.6, 0.8], [0.9, 0.65]])[:, :dim],
        log_normalizer=log_normalizer,
    )


@dataclass(frozen=True, eq=False)
class GaussianPath:
    """From ``N(base_loc, base_cov)`` to ``Z N(loc, cov)``: Gaussian at every beta."""

    base_loc: torch.Tensor  # [D]
    base_precision: torch.Tensor  # [D, D]
    loc: torch.Tensor  # [D]
    precision: torch.Tensor  # [D, D]
    log_normalizer: float

    def __call__(self, position):
        base, grad_base = self._evaluate(position, self.base_loc, self.base_precision)
        target, grad_target = self._evaluate(position, self.loc, self.precision)
        return State(position, base, target + self.log_normalizer, grad_base, grad_target)

    @staticmethod
    def _evaluate(position, loc, precision):
        shift = position - loc
        grad = -shift @ precision
        constant = 0.5 * torch.logdet(precision) - 0.5 * len(loc) * LOG_2PI
        return 0.5 * (shift * grad).sum(-1) + constant, grad

    def at(self, beta):
        """Computes location and precision of the path at ``beta``."""
        precision = (1 - beta) * self.base_precision + beta * self.precision
        pull = (1 - beta) * self.base_precision @ self.base_loc + beta * self.precision @ self.loc
        return torch.linalg.solve(precision, pull), precision

    def draw(self, beta, *shape):
        """Draws exactly from the path at ``beta``."""
        loc, precision = self.at(beta)
        factor = torch.linalg.cholesky(torch.linalg.inv(precision))
        return loc + torch.randn(*shape, len(loc), dtype=loc.dtype) @ factor.T

    def draw_base(self, *shape):
        return self.draw(0.0, *shape)

    def draw_target(self, *shape):
        return self.draw(1.0, *shape)


def lopsided_gaussian():
    """Builds a correlated Gaussian path in two dimensions that treats its coordinates unequally."""
    return GaussianPath(
        base_loc=torch.tensor([0.7, -0.3]),
        base_precision=torch.linalg.inv(torch.tensor([[1.0, 0.8], [0.8, 1.0]])),
        loc=torch.tensor([-0.3, 0.3]),
        precision=torch.linalg.inv(torch.tensor([[0.6, 0.55], [0.55, 0.9]])),
        log_normalizer=-0.4,
    )


def constant_path(betas, kernel, step_size, example):
    """Builds a path of one step size and unit scales; ``example`` is ``[*batch, D]``."""
    return Path(betas, kernel, TuningTable.constant(step_size, example))


class Counted:
    """Counts the calls of a density."""

    def __init__(self, density):
        self.density = density
        self.count = 0

    def __call__(self, position):
        self.count += 1
        return self.density(position)
