"""Joint distributions with known mutual information, with imperfect guides and critics.

The numbers in the names are those of the project's table of cases. ``truth`` is in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_anneal import mi


@dataclass(frozen=True)
class Problem:
    name: str
    joint: mi.DistributionJoint
    truth: float
    posterior: Callable[[Tensor], dist.Distribution]  # exact p(z|x)
    guide: Callable[[Tensor], dist.Distribution]  # a wrong q(z|x)
    log_marginal: Callable[[Tensor], Tensor]  # log p(x), events flattened

    def log_ratio(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x, z) / (p(x) p(z)) for x, z that broadcast: the best critic."""
        return self.joint.likelihood(z).log_prob(x) - self.log_marginal(x)

    def critic(self, function: Callable[[Tensor, Tensor], Tensor]) -> mi.Critic:
        """Makes a critic, which sees flattened events, of a function of x and z in shape."""
        if self.joint.prior.event_shape:
            return function
        return lambda x, z: function(x.squeeze(-1), z.squeeze(-1))

    def best_critic(self) -> mi.Critic:
        return self.critic(self.log_ratio)

    def bad_critic(self) -> mi.Critic:
        """The best critic, tempered and tilted."""
        dim = len(self.joint.prior.event_shape)

        def function(x: Tensor, z: Tensor) -> Tensor:
            tilt = z.sum(-1) if dim else z
            return 0.8 * self.log_ratio(x, z) + 0.1 * tilt.tanh()

        return self.critic(function)


def _gaussian(name: str, zz: Tensor, xz: Tensor, xx: Tensor, truth: float | None) -> Problem:
    """z and x jointly normal with zero mean; guide: shifted and too wide."""
    gain = torch.linalg.solve(zz, xz.mT).mT  # E[x|z] = gain z
    noise = torch.linalg.cholesky(xx - gain @ xz.mT)
    back = torch.linalg.solve(xx, xz).mT  # E[z|x] = back x
    spread = torch.linalg.cholesky(zz - back @ xz)
    noise = torch.where(noise.abs() > 1e-9, noise, 0.0)
    prior = dist.MultivariateNormal(torch.zeros(len(zz)), zz)
    marginal = dist.MultivariateNormal(torch.zeros(len(xx)), xx)
    if truth is None:
        both = torch.cat([torch.cat([zz, xz.mT], 1), torch.cat([xz, xx], 1)])
        truth = 0.5 * (zz.logdet() + xx.logdet() - both.logdet()).item()
    shift = 0.1 * torch.linspace(-1.0, 2.0, len(zz)) * spread.diagonal()

    def likelihood(z: Tensor) -> dist.Distribution:
        if torch.equal(noise, noise.diagonal().diag()):
            return dist.Normal(z @ gain.mT, noise.diagonal()).to_event(1)
        return dist.MultivariateNormal(z @ gain.mT, scale_tril=noise)

    return Problem(
        name,
        mi.DistributionJoint(prior, likelihood),
        truth,
        lambda x: dist.MultivariateNormal(x @ back.mT, scale_tril=spread),
        lambda x: dist.MultivariateNormal(x @ back.mT + shift, scale_tril=1.3 * spread),
        marginal.log_prob,
    )


def linear_vae(seed: int = 0, num_latent: int = 10, num_observed: int = 100) -> Problem:
    """M01: z ~ N(0, I), x = W z + e; I = log det(I + W'W) / 2."""
    draws = np.random.RandomState(seed).randn(num_observed, num_latent)
    weights = torch.tensor(draws, dtype=torch.get_default_dtype())
    eye_z, eye_x = torch.eye(num_latent), torch.eye(num_observed)
    truth = 0.5 * (eye_z + weights.mT @ weights).logdet().item()
    return _gaussian("M01", eye_z, weights, weights @ weights.mT + eye_x, truth)


def dense_normal(d: int) -> Problem:
    """M03: all correlations .5."""
    same = 0.5 * torch.eye(d) + 0.5 * torch.ones(d, d)
    truth = {2: 0.293893, 3: 0.413339, 5: 0.592812}[d]
    return _gaussian(f"M03-{d}", same, 0.5 * torch.ones(d, d), same, truth)


def sparse_normal() -> Problem:
    """M04: two correlated pairs (.8), the rest independent."""
    eye = torch.eye(3)
    return _gaussian("M04", eye, torch.diag(torch.tensor([0.8, 0.8, 0.0])), eye, 1.021651)


def correlated_normal(rho: float, truth: float, d: int = 20) -> Problem:
    """M12: d pairs of correlation rho."""
    return _gaussian("M12", torch.eye(d), rho * torch.eye(d), torch.eye(d), truth)


def _student(df: float, x: Tensor, widen: float = 1.0) -> dist.Distribution:
    """p(z|x) of a (2 + 2)-dimensional t with identity dispersion: a t with df + 2."""
    scale = ((df + x.square().sum(-1)) / (df + 2.0)).sqrt() * widen
    return dist.MultivariateStudentT(
        torch.full_like(scale, df + 2.0),
        torch.zeros_like(x),
        scale[..., None, None] * torch.eye(2),
    )


def student() -> Problem:
    """M05: multivariate Student-t, df 2: dependence without correlation."""
    prior = dist.MultivariateStudentT(torch.tensor(2.0), torch.zeros(2), torch.eye(2))
    return Problem(
        "M05",
        mi.DistributionJoint(prior, lambda z: _student(2.0, z)),
        0.193147,
        lambda x: _student(2.0, x),
        lambda x: _student(2.0, x, widen=1.4),
        prior.log_prob,
    )


def transformed_normal() -> Problem:
    """M07 after monotone maps: z -> exp(z), x -> sinh(x); neither changes I."""
    rho, noise = 0.75, math.sqrt(1.0 - 0.75**2)

    def sinh(loc: Tensor, scale: float) -> dist.Distribution:
        # sinh is (e^x - e^-x) / 2; its inverse is asinh
        return dist.TransformedDistribution(dist.Normal(loc, scale), [_Sinh()])

    return Problem(
        "M07",
        mi.DistributionJoint(dist.LogNormal(0.0, 1.0), lambda z: sinh(rho * z.log(), noise)),
        0.413339,
        lambda x: dist.LogNormal(rho * x.asinh(), noise),
        lambda x: dist.LogNormal(rho * x.asinh() + 0.2, 1.2 * noise),
        lambda x: sinh(torch.zeros(()), 1.0).log_prob(x),
    )


class _Sinh(torch.distributions.Transform):
    domain = codomain = torch.distributions.constraints.real
    bijective = True
    sign = 1

    def _call(self, x):
        return x.sinh()

    def _inverse(self, y):
        return y.asinh()

    def log_abs_det_jacobian(self, x, y):
        return x.cosh().log()


def cross() -> Problem:
    """M08: equal mixture of normals with correlations +.9 and -.9."""

    def arms(given: Tensor, widen: float = 1.0) -> dist.Distribution:
        loc = torch.stack([0.9 * given, -0.9 * given], -1)
        parts = dist.Normal(loc, widen * math.sqrt(0.19))
        logits = torch.zeros_like(loc)
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), parts)

    return Problem(
        "M08",
        mi.DistributionJoint(dist.Normal(0.0, 1.0), arms),
        0.408443,
        arms,
        lambda x: arms(x, widen=1.4),
        dist.Normal(0.0, 1.0).log_prob,
    )


PROBLEMS = {
    "linear VAE (M01)": linear_vae,
    "dense normal 2 (M03)": lambda: dense_normal(2),
    "dense normal 5 (M03)": lambda: dense_normal(5),
    "sparse normal (M04)": sparse_normal,
    "Student-t (M05)": student,
    "transformed normal (M07)": transformed_normal,
    "X (M08)": cross,
    "normal, I = 2 (M12)": lambda: correlated_normal(0.425757, 2.0),
    "normal, I = 6 (M12)": lambda: correlated_normal(0.671706, 6.0),
}
