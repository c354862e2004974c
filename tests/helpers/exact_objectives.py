"""Two-particle objectives and their gradients without sampling, by enumeration and quadrature.

A particle is one of A atoms: the discrete draws times the nodes of a Gauss-Hermite rule for the
Gaussian noise. An expectation over K = 2 independent particles is then a double sum, and autograd
through it gives the exact gradient, of the atoms' probabilities included.
"""

from dataclasses import dataclass, field

import numpy as np
import pyro
import pyro.distributions as dist
import torch

X = 1.3
NODES = 40


def hermite(count=NODES):
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.tensor(nodes), torch.tensor(weights / weights.sum())


def normal(value, loc, scale):
    scale = torch.as_tensor(scale)
    return -0.5 * ((value - loc) / scale) ** 2 - scale.log() - 0.5 * np.log(2 * np.pi)


def bernoulli(value, logits):
    return value * logits - torch.nn.functional.softplus(logits)


@dataclass
class Problem:
    """A model and a guide over per-replicate parameters, and their atoms."""

    name: str
    params: dict = field(default_factory=dict)  # name -> value
    discrete: bool = False
    continuous: bool = True

    def leaves(self, shape=()):
        return {
            name: torch.full(shape, value, requires_grad=True)
            for name, value in self.params.items()
        }


class Gaussian(Problem):
    """z ~ N(theta, 1), x ~ N(z, .7); q = N(m, s)."""

    def __init__(self):
        super().__init__("gaussian", {"theta": 0.4, "m": 0.9, "s": -0.3})

    def pair(self, p, count):
        def model():
            with pyro.plate("data", count):
                z = pyro.sample("z", dist.Normal(p["theta"], 1.0))
                pyro.sample("x", dist.Normal(z, 0.7), obs=torch.full((count,), X))

        def guide():
            with pyro.plate("data", count):
                pyro.sample("z", dist.Normal(p["m"], p["s"].exp()))

        return model, guide

    def atoms(self, p):
        eps, weight = hermite()
        z = p["m"] + p["s"].exp() * eps
        log_w = normal(z, p["theta"], 1.0) + normal(X, z, 0.7) - normal(z, p["m"], p["s"].exp())
        return weight, log_w


class Chain(Problem):
    """A guide of two continuous sites, the second depending on the first."""

    def __init__(self):
        super().__init__("chain", {"theta": 0.5, "m": 0.6, "s": -0.2, "a": 0.7, "r": -0.4})

    def pair(self, p, count):
        def model():
            with pyro.plate("data", count):
                u = pyro.sample("u", dist.Normal(p["theta"], 1.0))
                z = pyro.sample("z", dist.Normal(p["theta"] * u, 0.8))
                pyro.sample("x", dist.Normal(z + 0.2 * u, 0.7), obs=torch.full((count,), X))

        def guide():
            with pyro.plate("data", count):
                u = pyro.sample("u", dist.Normal(p["m"], p["s"].exp()))
                pyro.sample("z", dist.Normal(p["a"] * u, p["r"].exp()))

        return model, guide

    def atoms(self, p):
        eps, weight = hermite(14)
        weight = (weight[:, None] * weight).flatten()
        u = (p["m"] + p["s"].exp() * eps)[:, None].expand(14, 14)
        z = p["a"] * u + p["r"].exp() * eps
        log_p = normal(u, p["theta"], 1.0) + normal(z, p["theta"] * u, 0.8)
        log_p = log_p + normal(X, z + 0.2 * u, 0.7)
        log_q = normal(u, p["m"], p["s"].exp()) + normal(z, p["a"] * u, p["r"].exp())
        return weight, (log_p - log_q).flatten()


class Discrete(Problem):
    """d in {0, 1}^2 Bernoulli, the second depending on the first in the guide."""

    def __init__(self):
        super().__init__(
            "discrete",
            {"theta": 0.8, "l": 0.3, "r": -0.5, "t": 0.9},
            discrete=True,
            continuous=False,
        )

    def pair(self, p, count):
        def model():
            with pyro.plate("data", count):
                d = pyro.sample("d", dist.Bernoulli(0.3))
                e = pyro.sample("e", dist.Bernoulli(logits=p["theta"] * (d - 0.3)))
                pyro.sample(
                    "x", dist.Normal(d + 2 * p["theta"] * e, 0.7), obs=torch.full((count,), X)
                )

        def guide():
            with pyro.plate("data", count):
                d = pyro.sample("d", dist.Bernoulli(logits=p["l"]))
                pyro.sample("e", dist.Bernoulli(logits=p["r"] + p["t"] * d))

        return model, guide

    def atoms(self, p):
        d = torch.tensor([0.0, 0.0, 1.0, 1.0])
        e = torch.tensor([0.0, 1.0, 0.0, 1.0])
        log_q = bernoulli(d, p["l"]) + bernoulli(e, p["r"] + p["t"] * d)
        log_p = bernoulli(d, torch.tensor(0.3).logit()) + bernoulli(e, p["theta"] * (d - 0.3))
        log_p = log_p + normal(X, d + 2 * p["theta"] * e, 0.7)
        return log_q.exp(), log_p - log_q


class Mixed(Problem):
    """A continuous site of the guide feeds a discrete one, which feeds a continuous one."""

    def __init__(self):
        super().__init__(
            "mixed",
            {"theta": 0.8, "m": 0.2, "s": -0.3, "l": 0.3, "t": 0.6, "c": 0.5},
            discrete=True,
        )

    def pair(self, p, count):
        def model():
            with pyro.plate("data", count):
                u = pyro.sample("u", dist.Normal(0.0, 1.0))
                d = pyro.sample("d", dist.Bernoulli(logits=p["theta"] * u))
                z = pyro.sample("z", dist.Normal(p["theta"] * d, 1.0))
                pyro.sample("x", dist.Normal(z + u, 0.7), obs=torch.full((count,), X))

        def guide():
            with pyro.plate("data", count):
                u = pyro.sample("u", dist.Normal(p["m"], p["s"].exp()))
                d = pyro.sample("d", dist.Bernoulli(logits=p["l"] + p["t"] * u))
                pyro.sample("z", dist.Normal(p["c"] + 0.5 * d - 0.3 * u, 0.8))

        return model, guide

    def atoms(self, p):
        count = 12
        eps, weight = hermite(count)
        u = (p["m"] + p["s"].exp() * eps)[:, None, None]
        d = torch.tensor([0.0, 1.0])[None, :, None]
        log_d = bernoulli(d, p["l"] + p["t"] * u)
        loc = p["c"] + 0.5 * d - 0.3 * u
        z = loc + 0.8 * eps[None, None, :]
        log_q = normal(u, p["m"], p["s"].exp()) + log_d + normal(z, loc, 0.8)
        log_p = normal(u, 0.0, 1.0) + bernoulli(d, p["theta"] * u) + normal(z, p["theta"] * d, 1.0)
        log_p = log_p + normal(X, z + u, 0.7)
        mass = weight[:, None, None] * log_d.exp() * weight[None, None, :]
        return mass.flatten(), (log_p - log_q).flatten()


PROBLEMS = {p.name: p for p in (Gaussian(), Chain(), Discrete(), Mixed())}


def exact_gradient(problem, objective):
    """Differentiates E[objective(log_w)] of two independent particles.

    ``objective`` maps log-weights ``[2, A, A]`` to ``[A, A]``.
    """
    leaves = problem.leaves()
    mass, log_w = problem.atoms(leaves)
    count = len(log_w)
    pairs = torch.stack([log_w[:, None].expand(count, count), log_w.expand(count, count)])
    value = (mass[:, None] * mass * objective(pairs)).sum()
    grads = torch.autograd.grad(value, list(leaves.values()))
    return value.detach(), dict(zip(leaves, grads, strict=True))


def estimated_gradient(problem, loss, count=40_000):
    """Draws ``count`` independent gradients at once: each replicate has its own parameters."""
    leaves = problem.leaves((count,))
    model, guide = problem.pair(leaves, count)
    value = loss.differentiable_loss(model, guide)
    value.backward()
    grads = {n: p.grad if p.grad is not None else torch.zeros(count) for n, p in leaves.items()}
    return value.detach() / count, grads


def assert_within(estimates, truth, *, num_errors=5.0):
    """Asserts that the mean of independent estimates is the truth, within its standard error."""
    error = estimates.std() / len(estimates) ** 0.5
    assert error > 0
    z = (estimates.mean() - truth) / error
    assert abs(z) < num_errors, f"mean {estimates.mean():.6f}, truth {truth:.6f}, z {z:.1f}"
