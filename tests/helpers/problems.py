"""Problems whose log evidence is known from outside the package.

Truths come from closed forms, or from quadrature by scipy in the model's own (constrained) space:
no bijection, no Jacobian and no code of the package takes part in them. The data are lopsided, so
that a sign or an order that is wrong shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer.reparam
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.nn import PyroModule, PyroSample
from scipy import integrate, special, stats
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class KnownProblem:
    """A model, its data, and its log evidence."""

    name: str
    model: Callable[..., Any]
    args: tuple[Any, ...]
    truth: Any  # log evidence, a number or an array of the batch's shape
    dim: int  # unconstrained dimensions per batch element
    batch: tuple[int, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    prior_is_normalized: bool = True  # log p(z) integrates to one over u


class WithSupport(TorchDistribution):
    """A distribution given by functions, on any support: what a user's own class would be."""

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, log_prob, sample, support, batch_shape=(), event_shape=()):
        self._log_prob, self._sample, self._support = log_prob, sample, support
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=False)

    @property
    def support(self):
        return self._support

    def log_prob(self, value):
        return self._log_prob(value)

    def sample(self, sample_shape=()):
        return self._sample(torch.Size(sample_shape))

    def expand(self, batch_shape, _instance=None):
        if torch.Size(batch_shape) != self.batch_shape:
            raise NotImplementedError
        return self


def _tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _log_integral(density: Callable[..., float], *ranges: Any) -> float:
    """Integrates a density by adaptive quadrature, to the log."""
    options = {"epsabs": 1e-13, "epsrel": 1e-11, "limit": 200}
    value, _ = integrate.nquad(density, ranges, opts=[options] * len(ranges))
    return math.log(value)


normal = stats.norm.pdf


def _one_latent(prior: Callable[[], Any]) -> Callable[[Tensor], None]:
    """Builds ``z ~ prior, x ~ N(z, 0.7)``."""

    def model(x: Tensor) -> None:
        z = pyro.sample("z", prior())
        pyro.sample("x", dist.Normal(z, 0.7), obs=x)

    return model


def _scalar_supports() -> list[KnownProblem]:
    """One latent per kind of scalar support."""

    def below_two() -> WithSupport:  # 2 - z ~ Exponential(1.5)
        return WithSupport(
            lambda z: math.log(1.5) - 1.5 * (2.0 - z),
            lambda s: 2.0 - dist.Exponential(1.5).sample(s),
            constraints.less_than(2.0),
        )

    def above_one() -> WithSupport:  # z - 1 ~ Exponential(0.8)
        return WithSupport(
            lambda z: math.log(0.8) - 0.8 * (z - 1.0),
            lambda s: 1.0 + dist.Exponential(0.8).sample(s),
            constraints.greater_than(1.0),
        )

    def half_open() -> WithSupport:  # density 2 z / 9 on [0, 3)
        return WithSupport(
            lambda z: (2.0 * z / 9.0).log(),
            lambda s: 3.0 * torch.rand(s).sqrt(),
            constraints.half_open_interval(0.0, 3.0),
        )

    def softplus() -> WithSupport:
        gamma = dist.Gamma(3.0, 2.0)
        return WithSupport(gamma.log_prob, gamma.sample, constraints.softplus_positive)

    gamma = stats.gamma(3.0, scale=0.5).pdf
    rows = [
        ("real", lambda: dist.Normal(0.4, 1.3), stats.norm(0.4, 1.3).pdf, (-np.inf, np.inf)),
        ("heavy tails", lambda: dist.StudentT(5.0, 0.4, 0.8), stats.t(5.0, 0.4, 0.8).pdf, (-40, 40)),
        ("positive", lambda: dist.Gamma(3.0, 2.0), gamma, (0, np.inf)),
        ("log-normal", lambda: dist.LogNormal(0.2, 0.6), stats.lognorm(0.6, 0, math.exp(0.2)).pdf, (0, np.inf)),
        ("nonnegative", lambda: dist.HalfNormal(1.4), stats.halfnorm(0, 1.4).pdf, (0, np.inf)),
        ("greater than or equal", lambda: dist.Pareto(0.5, 3.0), stats.pareto(3.0, 0, 0.5).pdf, (0.5, np.inf)),
        ("greater than", above_one, stats.expon(1.0, 1.25).pdf, (1.0, np.inf)),
        ("less than", below_two, lambda z: 1.5 * math.exp(-1.5 * (2.0 - z)), (-np.inf, 2.0)),
        ("interval", lambda: dist.Uniform(-1.0, 3.0), lambda z: 0.25, (-1.0, 3.0)),
        ("unit interval", lambda: dist.Beta(2.0, 3.5), stats.beta(2.0, 3.5).pdf, (0, 1)),
        ("half-open interval", half_open, lambda z: 2.0 * z / 9.0, (0, 3)),
        ("softplus positive", softplus, gamma, (0, np.inf)),
    ]  # fmt: skip
    x = 1.1
    return [
        KnownProblem(
            f"support: {name}",
            _one_latent(prior),
            (torch.tensor(x),),
            _log_integral(lambda z, pdf=pdf: pdf(z) * normal(x, z, 0.7), bounds),
            1,
        )
        for name, prior, pdf, bounds in rows
    ]


def _simplex() -> KnownProblem:
    labels, a = torch.tensor([0, 0, 0, 2, 0, 1, 2, 0]), np.array([1.5, 2.0, 3.0])

    def model(labels):
        p = pyro.sample("p", dist.Dirichlet(torch.tensor(a)))
        with pyro.plate("data", len(labels)):
            pyro.sample("label", dist.Categorical(p), obs=labels)

    n = np.bincount(labels.numpy())
    truth = special.gammaln(a.sum()) - special.gammaln(a.sum() + n.sum())
    truth += (special.gammaln(a + n) - special.gammaln(a)).sum()
    return KnownProblem("support: simplex", model, (labels,), float(truth), 2)


_PAIR = _tensor(1.2, 0.9)


def _pair_density(rho: float) -> float:
    cov = np.array([[1.0, rho], [rho, 1.0]])
    return float(stats.multivariate_normal(np.zeros(2), cov).pdf(_PAIR.numpy()))


def _correlation(kind: str) -> KnownProblem:
    """LKJ(2, eta): (rho + 1) / 2 ~ Beta(eta, eta)."""
    eta = 1.7

    def model(x):
        if kind == "corr_cholesky":
            factor = pyro.sample("L", dist.LKJCholesky(2, eta))
        else:
            factor = torch.linalg.cholesky(pyro.sample("R", dist.LKJ(2, eta)))
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), scale_tril=factor), obs=x)

    prior = stats.beta(eta, eta, -1.0, 2.0).pdf
    truth = _log_integral(lambda r: prior(r) * _pair_density(r), (-1.0, 1.0))
    return KnownProblem(f"support: {kind}", model, (_PAIR,), truth, 1)


def _correlation_3() -> KnownProblem:
    """LKJ(3, eta) through its canonical partial correlations, by Gauss-Legendre."""
    eta, x = 1.5, np.array([1.2, 0.9, -0.3])

    def model(x):
        factor = pyro.sample("L", dist.LKJCholesky(3, eta))
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), scale_tril=factor), obs=x)

    nodes, weights = np.polynomial.legendre.leggauss(60)
    # The substitution r = sin(pi t / 2) removes the square-root ends of the beta densities.
    r, jacobian = np.sin(0.5 * np.pi * nodes), 0.5 * np.pi * np.cos(0.5 * np.pi * nodes)
    outer = stats.beta(eta + 0.5, eta + 0.5, -1.0, 2.0).pdf(r) * jacobian * weights
    inner = stats.beta(eta, eta, -1.0, 2.0).pdf(r) * jacobian * weights
    r12, r13, p23 = np.meshgrid(r, r, r, indexing="ij")
    s12, s13 = np.sqrt(1 - r12**2), np.sqrt(1 - r13**2)
    # Rows of the Cholesky factor: (1), (r12, s12), (r13, p23 s13, s13 sqrt(1 - p23^2)).
    last = s13 * np.sqrt(1 - p23**2)
    e1 = x[0]
    e2 = (x[1] - r12 * e1) / s12
    e3 = (x[2] - r13 * e1 - p23 * s13 * e2) / last
    likelihood = np.exp(-0.5 * (e1**2 + e2**2 + e3**2)) / (2 * np.pi) ** 1.5 / (s12 * last)
    truth = math.log(np.einsum("i,j,k,ijk->", outer, outer, inner, likelihood))
    return KnownProblem("support: corr_cholesky 3", model, (torch.tensor(x),), truth, 3)


def _ordered() -> KnownProblem:
    """Two sorted standard normals; given x each is N(x / 2, 1 / 2), restricted to z1 < z2."""
    x = _tensor(0.9, 0.2)

    def prior():
        return WithSupport(
            lambda z: math.log(2.0) + dist.Normal(0.0, 1.0).log_prob(z).sum(-1),
            lambda s: torch.randn(*s, 2).sort(-1).values,
            constraints.ordered_vector,
            event_shape=(2,),
        )

    def model(x):
        z = pyro.sample("z", prior())
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    marginal = stats.norm(0.0, math.sqrt(2.0)).logpdf(x.numpy()).sum()
    in_order = stats.norm.logcdf(float(x[1] - x[0]) / 2.0)
    return KnownProblem("support: ordered", model, (x,), math.log(2.0) + marginal + in_order, 2)


def _positive_ordered() -> KnownProblem:
    """Two sorted standard exponentials."""
    x = _tensor(0.5, 1.4)

    def prior():
        return WithSupport(
            lambda z: math.log(2.0) - z.sum(-1),
            lambda s: dist.Exponential(1.0).sample(torch.Size((*s, 2))).sort(-1).values,
            constraints.positive_ordered_vector,
            event_shape=(2,),
        )

    def model(x):
        z = pyro.sample("z", prior())
        pyro.sample("x", dist.Normal(z, 0.6).to_event(1), obs=x)

    def density(a):  # integrated over b > a, where exp(-b) N(1.4; b, 0.6) is a moved normal
        moved = 1.4 - 0.6**2
        above = math.exp(0.5 * 0.6**2 - 1.4) * special.ndtr((moved - a) / 0.6)
        return 2.0 * math.exp(-a) * normal(0.5, a, 0.6) * above

    truth = _log_integral(density, (0.0, 12.0))
    return KnownProblem("support: positive ordered", model, (x,), truth, 2)


def _concatenated() -> KnownProblem:
    """One site whose first entry is positive and whose second is real."""
    x = torch.tensor(1.3)

    def prior():
        first, second = dist.Gamma(3.0, 2.0), dist.Normal(0.5, 1.0)
        return WithSupport(
            lambda z: first.log_prob(z[..., 0]) + second.log_prob(z[..., 1]),
            lambda s: torch.stack([first.sample(s), second.sample(s)], -1),
            constraints.independent(
                constraints.cat([constraints.positive, constraints.real], -1, [1, 1]), 1
            ),
            event_shape=(2,),
        )

    def model(x):
        z = pyro.sample("z", prior())
        pyro.sample("x", dist.Normal(z.sum(-1), 0.7), obs=x)

    pdf = stats.gamma(3.0, scale=0.5).pdf
    sd = math.hypot(1.0, 0.7)
    truth = _log_integral(lambda a: pdf(a) * normal(1.3, a + 0.5, sd), (0.0, 30.0))
    return KnownProblem("support: cat", model, (x,), truth, 2)


def _real_vector() -> KnownProblem:
    loc, cov = np.array([0.5, -1.0]), np.array([[1.0, 0.6], [0.6, 2.0]])
    x = _tensor(1.5, 0.2)

    def model(x):
        z = pyro.sample("z", dist.MultivariateNormal(torch.tensor(loc), torch.tensor(cov)))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    truth = stats.multivariate_normal(loc, cov + 0.25 * np.eye(2)).logpdf(x.numpy())
    return KnownProblem("support: real vector", model, (x,), truth, 2)


def _matrix() -> KnownProblem:
    """A 2 x 1 matrix event of unit intervals."""
    x = _tensor(0.8, 0.1)

    def model(x):
        z = pyro.sample("z", dist.Beta(2.0, 3.0).expand([2, 1]).to_event(2))
        pyro.sample("x", dist.Normal(z.squeeze(-1), 0.3).to_event(1), obs=x)

    pdf = stats.beta(2.0, 3.0).pdf
    truth = sum(
        _log_integral(lambda z, v=v: pdf(z) * normal(v, z, 0.3), (0.0, 1.0)) for v in x.tolist()
    )
    return KnownProblem("support: matrix event", model, (x,), truth, 2)


def _dynamic_supports() -> list[KnownProblem]:
    """Supports that move with another latent."""
    x = torch.tensor(0.8)

    def upper(x):
        top = pyro.sample("top", dist.Gamma(3.0, 2.0))
        z = pyro.sample("z", dist.Uniform(torch.zeros(()), top))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def lower(x):
        low = pyro.sample("low", dist.Beta(2.0, 3.0))
        z = pyro.sample("z", dist.Uniform(low, 3.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    gamma = stats.gamma(3.0, scale=0.5).pdf

    def below(top):  # mean of N(0.8; z, 0.5) for z uniform on [0, top]
        cdf = stats.norm(0.8, 0.5).cdf
        return (cdf(top) - cdf(0.0)) / top

    def above(low):
        cdf = stats.norm(0.8, 0.5).cdf
        return (cdf(3.0) - cdf(low)) / (3.0 - low)

    prior = stats.beta(2.0, 3.0).pdf
    return [
        KnownProblem(
            "dynamic: upper bound",
            upper,
            (x,),
            _log_integral(lambda t: gamma(t) * below(t), (0, 40)),
            2,
        ),
        KnownProblem(
            "dynamic: lower bound",
            lower,
            (x,),
            _log_integral(lambda t: prior(t) * above(t), (0.0, 1.0)),
            2,
        ),
    ]


def _handlers() -> list[KnownProblem]:
    """Pyro's effect handlers around ``z ~ N(0, 1), x_i ~ N(z, 1)``."""
    x = _tensor(0.4, 1.9, -0.3)

    def gaussian(values: Any, power: float = 1.0, precision: float = 1.0) -> float:
        """Log of the integral of N(z; 0, 1)^a prod N(x_i; z, 1)^power, a = precision."""
        values = np.atleast_1d(values)
        a = precision + power * len(values)
        b = power * values.sum()
        constant = -0.5 * (precision + power * len(values)) * math.log(2 * math.pi)
        constant -= 0.5 * power * (values**2).sum()
        return constant + 0.5 * math.log(2 * math.pi / a) + 0.5 * b * b / a

    def plain(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2.0 * z)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def scaled_likelihood(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)), poutine.scale(scale=0.3):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def scaled_per_datum(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)), poutine.scale(scale=_tensor(0.0, 1.0, 2.0)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def scaled_prior(x):
        with poutine.scale(scale=2.0):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def masked(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)), poutine.mask(mask=torch.tensor([True, False, True])):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def masked_distribution(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        keep = torch.tensor([True, False, True])
        pyro.sample("x", dist.Normal(z, 1.0).expand([3]).mask(keep).to_event(1), obs=x)

    def missing(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            seen = torch.tensor([True, True, False])
            pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=seen)

    def factor(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("x", dist.Normal(z, 1.0).log_prob(x).sum())

    def conditioned(x):
        def inner():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(z, 1.0))

        return poutine.condition(inner, data={"x": x})()

    def reparameterized(x):
        def inner():
            z = pyro.sample("z", dist.Normal(torch.zeros(()), torch.ones(())))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        config = {"z": pyro.infer.reparam.LocScaleReparam(0.3)}
        return poutine.reparam(inner, config=config)()

    def sequential(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])

    values = x.numpy()
    per_datum = (
        -0.5 * 3.0 * math.log(2 * math.pi)  # powers 0 + 1 + 2
        - 0.5 * (values[1] ** 2 + 2 * values[2] ** 2)
        + 0.5 * math.log(1.0 / 4.0)
        + 0.5 * (values[1] + 2 * values[2]) ** 2 / 4.0
    )
    rows = [
        ("plain", plain, gaussian(values), 1),
        ("scale of the likelihood", scaled_likelihood, gaussian(values, 0.3), 1),
        ("scale per datum", scaled_per_datum, per_datum, 1),
        ("scale of the prior", scaled_prior, gaussian(values, 1.0, 2.0), 1),
        ("mask of the data", masked, gaussian(values[[0, 2]]), 1),
        ("masked distribution of the data", masked_distribution, gaussian(values[[0, 2]]), 1),
        ("factor", factor, gaussian(values), 1),
        ("condition", conditioned, gaussian(values), 1),
        ("reparam", reparameterized, gaussian(values), 1),
        ("sequential plate", sequential, gaussian(values), 1),
    ]
    problems = [KnownProblem(f"handler: {n}", m, (x,), t, d) for n, m, t, d in rows]
    problems.append(  # u = (z, three values of x_unobserved, of which one matters)
        KnownProblem("handler: obs_mask", missing, (x,), gaussian(values[:2]), 4)
    )
    common = poutine.scale(plain, scale=0.25)
    problems.append(
        KnownProblem("handler: common scale", common, (x,), 0.25 * gaussian(values), 1)
    )
    return problems


def _enumerated() -> list[KnownProblem]:
    """Discrete latents that are summed out."""
    x = _tensor(0.4, 1.9, -0.3)
    logits, shifts = _tensor(0.3, 0.7).log(), _tensor(-1.0, 1.5)
    enumerate_it = {"enumerate": "parallel"}

    def outside(x):  # one component for all data: log sum_k pi_k prod_i ...
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Categorical(logits=logits), infer=enumerate_it)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z + shifts[k], 1.0), obs=x)

    def inside(x):  # one component per datum
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(logits=logits), infer=enumerate_it)
            pyro.sample("x", dist.Normal(z + shifts[k], 1.0), obs=x)

    def upstream(x):  # the continuous latent's prior depends on the discrete one
        k = pyro.sample("k", dist.Categorical(logits=logits), infer=enumerate_it)
        z = pyro.sample("z", dist.Normal(shifts[k], 0.8))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def batched(x):  # everything in the data plate: one evidence per datum
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Categorical(logits=logits), infer=enumerate_it)
            pyro.sample("x", dist.Normal(z + shifts[k], 1.0), obs=x)

    def batched_inner(x):  # an inner plate with a discrete site per entry, in a batch plate
        with pyro.plate("rows", 2, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("columns", 3, dim=-1):
                k = pyro.sample("k", dist.Categorical(logits=logits), infer=enumerate_it)
                pyro.sample("x", dist.Normal(z + shifts[k], 1.0), obs=x)

    @pyro.infer.config_enumerate
    def markov(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        k = 0
        for t in pyro.markov(range(len(x))):
            stay = _tensor(0.8, 0.35)[k]
            k = pyro.sample(f"k_{t}", dist.Bernoulli(1.0 - stay)).long()
            pyro.sample(f"x_{t}", dist.Normal(z + shifts[k], 1.0), obs=x[t])

    pi, mu, data = np.array([0.3, 0.7]), np.array([-1.0, 1.5]), x.numpy()
    line = (-9.0, 9.0)

    def each(z, values):  # [data] mixture densities
        return (pi * normal(values[:, None], z + mu, 1.0)).sum(1)

    def together(values):
        return sum(
            p * stats.multivariate_normal(np.full(len(values), m), 1.0 + np.eye(len(values))).pdf(values)
            for p, m in zip(pi, mu, strict=True)
        )  # fmt: skip

    def upstream_density():
        cov = 0.64 + np.eye(3)
        return sum(
            p * stats.multivariate_normal(np.full(3, m), cov).pdf(data)
            for p, m in zip(pi, mu, strict=True)
        )

    def chain(z):
        stay = np.array([0.8, 0.35])
        step = np.stack([stay, 1.0 - stay], 1)  # [from, to]
        forward = np.array([1.0, 0.0])
        for value in data:
            forward = (forward @ step) * normal(value, z + mu, 1.0)
        return normal(z) * forward.sum()

    table = np.array([[0.4, 1.9, -0.3], [2.5, -1.0, 0.1]])
    return [
        KnownProblem("enumerated: outside the plate", outside, (x,), math.log(together(data)), 1),
        KnownProblem(
            "enumerated: inside the plate",
            inside,
            (x,),
            _log_integral(lambda z: normal(z) * each(z, data).prod(), line),
            1,
        ),
        KnownProblem("enumerated: upstream", upstream, (x,), math.log(upstream_density()), 1),
        KnownProblem(
            "enumerated: per datum",
            batched,
            (x,),
            np.array([math.log(together(data[i : i + 1])) for i in range(3)]),
            1,
            (3,),
        ),
        KnownProblem(
            "enumerated: inner plate in a batch plate",
            batched_inner,
            (torch.tensor(table),),
            np.array(
                [_log_integral(lambda z, r=r: normal(z) * each(z, r).prod(), line) for r in table]
            ),
            1,
            (2,),
        ),
        KnownProblem(
            "enumerated: hidden Markov chain", markov, (x,), _log_integral(chain, line), 1
        ),
    ]


def _gaussian(model, x, design, noise, prior, name, **kwargs) -> KnownProblem:
    """``x = design @ z + noise``, ``z ~ N(0, diag(prior^2))``: the marginal is Gaussian."""
    cov = (design * prior**2) @ design.T + noise**2 * np.eye(len(design))
    truth = stats.multivariate_normal(np.zeros(len(design)), cov).logpdf(x.numpy().reshape(-1))
    return KnownProblem(name, model, (x,), truth, design.shape[1], **kwargs)


def _plates() -> list[KnownProblem]:
    """Nested and crossed plates of Gaussians."""
    random = np.random.RandomState(3)
    table = torch.tensor(random.randn(2, 3) + 0.7)
    rows = np.repeat(np.eye(2), 3, 0)
    # Of the crossed plates, the data of the first two columns: rows (0, 0, 1, 1), columns (0, 1, 0, 1).
    crossing = np.hstack([np.tile(np.eye(2), (2, 1)), np.repeat(np.eye(2), 2, 0)])

    def nested(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("groups", 2, dim=-2):
            theta = pyro.sample("theta", dist.Normal(mu, 0.5))
            with pyro.plate("items", 3, dim=-1):
                pyro.sample("x", dist.Normal(theta, 0.7), obs=x)

    def crossed(x):
        across = pyro.plate("columns", 2, dim=-1)
        down = pyro.plate("rows", 2, dim=-2)
        with across:
            b = pyro.sample("b", dist.Normal(0.0, 0.5))
        with down:
            a = pyro.sample("a", dist.Normal(0.0, 1.5))
        with down, across:
            pyro.sample("x", dist.Normal(a + b, 0.7), obs=x)

    def far_plate(x):  # a plate four dimensions to the left
        with pyro.plate("rows", 2, dim=-5):
            a = pyro.sample("a", dist.Normal(0.0, 1.5))
            with pyro.plate("columns", 3, dim=-2):
                pyro.sample("x", dist.Normal(a, 0.7), obs=x.reshape(2, 1, 1, 3, 1))

    # Centred nested model: theta = mu + 0.5 e, so the design acts on (mu, e).
    problems = [
        _gaussian(
            nested, table, np.hstack([np.ones((6, 1)), rows]), 0.7, np.array([2.0, 0.5, 0.5]),
            "plates: nested",
        ),
        _gaussian(
            crossed, table[:, :2].contiguous(), crossing, 0.7, np.repeat([0.5, 1.5], 2),
            "plates: crossed",
        ),
    ]  # fmt: skip
    cov = 1.5**2 + 0.49 * np.eye(3)
    per_row = np.array([stats.multivariate_normal(np.zeros(3), cov).logpdf(r) for r in table])
    problems.append(KnownProblem("plates: far to the left", far_plate, (table,), per_row, 1, (2,)))

    def batch_not_rightmost(x):
        with pyro.plate("rows", 2, dim=-2):
            a = pyro.sample("a", dist.Normal(0.0, 1.5))
            with pyro.plate("columns", 3, dim=-1):
                b = pyro.sample("b", dist.Normal(a, 0.5))
                pyro.sample("x", dist.Normal(b, 0.7), obs=x)

    def batch_rightmost(x):
        with pyro.plate("columns", 3, dim=-1):
            a = pyro.sample("a", dist.Normal(0.0, 1.5))
            with pyro.plate("rows", 2, dim=-2):
                b = pyro.sample("b", dist.Normal(a, 0.5))
                pyro.sample("x", dist.Normal(b, 0.7), obs=x)

    def two_batches(x):
        with pyro.plate("columns", 3, dim=-1), pyro.plate("rows", 2, dim=-3):
            a = pyro.sample("a", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(a, 0.7), obs=x.unsqueeze(1))

    per_row = [
        stats.multivariate_normal(np.zeros(3), 1.5**2 + 0.74 * np.eye(3)).logpdf(r) for r in table
    ]
    per_column = [
        stats.multivariate_normal(np.zeros(2), 1.5**2 + 0.74 * np.eye(2)).logpdf(c)
        for c in table.T.numpy()
    ]
    pdf = stats.gamma(2.0).pdf
    each = [
        [_log_integral(lambda a, v=v: pdf(a) * normal(v, a, 0.7), (0.0, 40.0)) for v in r]
        for r in table.tolist()
    ]
    problems += [
        KnownProblem("plates: batch on the left", batch_not_rightmost, (table,), np.array(per_row), 4, (2,)),
        KnownProblem("plates: batch on the right", batch_rightmost, (table,), np.array(per_column), 3, (3,)),
        KnownProblem("plates: two batch plates", two_batches, (table,), np.array(each), 1, (2, 3)),
    ]  # fmt: skip
    return problems


class _Regression(PyroModule):  # type: ignore[misc]
    """Bayesian linear regression with its weight as a PyroSample."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1, bias=False)
        # Expanded while validation is on, as priors of modules usually are: it stays on in it.
        scale = torch.tensor(1.2, dtype=torch.float64)
        self.linear.weight = PyroSample(dist.Normal(0.0, scale).expand([1, 2]).to_event(2))

    def forward(self, x: Tensor, y: Tensor) -> None:
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 0.9), obs=y)


def _modules() -> list[KnownProblem]:
    random = np.random.RandomState(5)
    design = random.randn(4, 2)
    y = torch.tensor(design @ np.array([0.5, -1.0]) + 0.3 * random.randn(4))
    cov = 1.44 * design @ design.T + 0.81 * np.eye(4)
    truth = stats.multivariate_normal(np.zeros(4), cov).logpdf(y.numpy())
    regression = KnownProblem(
        "module: PyroSample", _Regression().double(), (torch.tensor(design), y), truth, 2
    )

    weight, bias = random.randn(3, 2), random.randn(3)
    decoder = nn.Linear(2, 3).double()
    with torch.no_grad():
        decoder.weight.copy_(torch.tensor(weight))
        decoder.bias.copy_(torch.tensor(bias))

    def vae(x):
        pyro.module("decoder", decoder)
        noise = pyro.param("noise", lambda: torch.tensor(0.6, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), noise).to_event(1), obs=x)

    x = torch.tensor(random.randn(2, 3))
    marginal = stats.multivariate_normal(bias, weight @ weight.T + 0.36 * np.eye(3))
    return [
        regression,
        KnownProblem(
            "module: linear VAE", vae, (x,), np.array([marginal.logpdf(r) for r in x]), 2, (2,)
        ),
    ]


PROBLEMS: list[KnownProblem] = [
    *_scalar_supports(),
    _simplex(),
    _correlation("corr_cholesky"),
    _correlation("corr_matrix"),
    _correlation_3(),
    _ordered(),
    _positive_ordered(),
    _concatenated(),
    _real_vector(),
    _matrix(),
    *_dynamic_supports(),
    *_handlers(),
    *_enumerated(),
    *_plates(),
    *_modules(),
]
