"""Densities of known normalizer for ``paths_and_kernels.py``, as functions of batches of points."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

__all__ = ["PROBLEMS", "Problem", "State", "draw_lopsided", "lopsided", "take"]

_LOG_2PI = math.log(2.0 * math.pi)


@dataclass(frozen=True)
class Problem:
    """A base N(0, scale), a target of known normalizer, and how many runs its noise asks for."""

    dim: int
    scale: float
    log_target: Callable[[Tensor], Tensor]
    truth: float
    repeats: int = 64

    def evaluate(self, position: Tensor) -> State:
        """Computes both densities and the gradient of the target."""
        with torch.enable_grad():
            u = position.detach().requires_grad_()
            log_p = self.log_target(u)
            (grad,) = torch.autograd.grad(log_p.sum(), u)
        square = position.square().sum(-1) / self.scale**2
        log_q = -0.5 * square - self.dim * (math.log(self.scale) + 0.5 * _LOG_2PI)
        return State(position, log_q, log_p.detach(), -position / self.scale**2, grad)


class State(NamedTuple):
    """Of S populations of K chains."""

    position: Tensor  # [S, K, D]
    log_q: Tensor  # [S, K]
    log_p: Tensor
    grad_q: Tensor
    grad_p: Tensor

    def take(self, index: Tensor) -> State:
        """Selects chains, ``[S, M]``."""
        return State(*(take(value, index) for value in self))


def take(value: Tensor, index: Tensor) -> Tensor:
    if value.dim() > index.dim():
        index = index.unsqueeze(-1).expand(*index.shape, value.shape[-1])
    return value.gather(1, index)


def _mixture(means: Tensor, square: Tensor) -> Callable[[Tensor], Tensor]:
    def log_target(u: Tensor) -> Tensor:
        far = u.square().sum(-1, keepdim=True) - 2.0 * u @ means.T + square
        normal = -0.5 * means.shape[1] * _LOG_2PI - math.log(len(means))
        return (-0.5 * far).logsumexp(-1) + normal

    return log_target


def _uniform_means(count: int, dim: int, reach: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (2.0 * torch.rand(count, dim, generator=generator, dtype=torch.float64) - 1.0) * reach


def forty_gaussians() -> Problem:
    means = _uniform_means(40, 50, 40.0)
    return Problem(50, 40.0, _mixture(means, means.square().sum(-1)), 0.0, repeats=32)


def one_gaussian() -> Problem:
    means = torch.zeros(1, 50, dtype=torch.float64)
    return Problem(50, 40.0, _mixture(means, means.square().sum(-1)), 0.0)


def student_mixture() -> Problem:
    means = _uniform_means(10, 50, 10.0)
    each = math.lgamma(1.5) - math.lgamma(1.0) - 0.5 * math.log(2.0 * math.pi)

    def log_target(u: Tensor) -> Tensor:
        square = (u.unsqueeze(-2) - means).square()
        return (each - 1.5 * (0.5 * square).log1p()).sum(-1).logsumexp(-1) - math.log(10.0)

    return Problem(50, 15.0, log_target, 0.0, repeats=16)


def correlated() -> Problem:
    index = torch.arange(20, dtype=torch.float64)
    covariance = 0.95 ** (index - index[:, None]).abs()
    precision, shift = covariance.inverse(), torch.ones(20, dtype=torch.float64)
    constant = -10.0 * _LOG_2PI - 0.5 * float(covariance.logdet())
    return Problem(
        20,
        3.0,
        lambda u: constant - 0.5 * ((u - shift) @ precision * (u - shift)).sum(-1),
        0.0,
    )


def funnel() -> Problem:
    def log_target(u: Tensor) -> Tensor:
        v, x = u[..., 0], u[..., 1:]
        neck = -0.5 * x.square().sum(-1) * (-v).exp() - 4.5 * v
        return neck - v.square() / 18.0 - math.log(3.0) - 5.0 * _LOG_2PI

    return Problem(10, 3.0, log_target, 0.0)


def spike_and_slab() -> Problem:
    def part(u: Tensor, spread: float) -> Tensor:
        """Likelihood N(u; 1, s) over its evidence under the prior N(0, 1)."""
        total = 1.0 + spread**2
        like = -0.5 * (u - 1.0).square() / spread**2 - math.log(spread)
        return (like + 0.5 / total + 0.5 * math.log(total)).sum(-1)

    def log_target(u: Tensor) -> Tensor:
        prior = -0.5 * u.square().sum(-1) - 5.0 * _LOG_2PI
        return prior + torch.logaddexp(part(u, 0.5), math.log(9.0) + part(u, 0.1))

    return Problem(10, 1.0, log_target, math.log(10.0))


def many_well() -> Problem:
    def log_target(u: Tensor) -> Tensor:
        x, y = u[..., ::2], u[..., 1::2]
        return (-x.pow(4) + 6.0 * x.square() + 0.5 * x - 0.5 * y.square()).sum(-1)

    return Problem(6, 2.0, log_target, 30.880439)


def _logistic(features: np.ndarray, labels: np.ndarray, scale: float, truth: float) -> Problem:
    spread = features.std(0)
    scaled = (features - features.mean(0)) / np.where(spread > 0.0, spread, 1.0)
    design = np.concatenate([np.ones((len(scaled), 1)), scaled], 1)
    signed = torch.from_numpy(design * (2.0 * labels[:, None] - 1.0))
    dim = design.shape[1]

    def log_target(u: Tensor) -> Tensor:
        prior = -0.5 * u.square().sum(-1) / scale**2 - dim * (math.log(scale) + 0.5 * _LOG_2PI)
        return prior + logsigmoid(u @ signed.T).sum(-1)

    return Problem(dim, scale, log_target, truth, repeats=24)


def pima() -> Problem:
    from datafiles import find

    table = np.genfromtxt(find("pima") / "pima-indians-diabetes.data", delimiter=",")
    return _logistic(table[:, :8], table[:, 8], 1.0, -383.8820)


def ionosphere() -> Problem:
    from datafiles import find

    file = np.load(find("ionosphere") / "ionosphere_full.npz")
    return _logistic(file["X"], (file["y"] + 1.0) / 2.0, 1.0, -111.6122)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "correlated, d = 20": correlated,
    "funnel, d = 10": funnel,
    "many-well, d = 6": many_well,
    "spike and slab, d = 10": spike_and_slab,
    "one Gaussian, d = 50": one_gaussian,
    "40 Gaussians, d = 50": forty_gaussians,
    "Student-t mixture, d = 50": student_mixture,
    "ionosphere, d = 35": ionosphere,
    "Pima, d = 9": pima,
}


def lopsided() -> Problem:
    """Two Gaussians in two dimensions, weights .8 and .2, one narrow."""
    centres = torch.tensor([[1.5, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    scales = torch.tensor([0.4, 1.0], dtype=torch.float64)
    share = torch.tensor([0.8, 0.2], dtype=torch.float64)

    def log_target(u: Tensor) -> Tensor:
        square = ((u.unsqueeze(-2) - centres) / scales.unsqueeze(-1)).square().sum(-1)
        return (share.log() - 2.0 * scales.log() - _LOG_2PI - 0.5 * square).logsumexp(-1)

    return Problem(2, 1.5, log_target, 0.0)


def draw_lopsided(count: int) -> Tensor:
    first = torch.rand(count, 1, dtype=torch.float64) < 0.8
    noise = torch.randn(count, 2, dtype=torch.float64)
    one = torch.tensor([1.5, 0.0], dtype=torch.float64) + 0.4 * noise
    return torch.where(first, one, torch.tensor([-1.0, 1.0], dtype=torch.float64) + noise)
