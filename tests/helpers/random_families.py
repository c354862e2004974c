"""Families of latents for random models: the distribution in torch, the quantile function in scipy.

Each entry of :data:`FAMILIES` takes two positive numbers and a location and gives a constructor and
a quantile, both at a parent's value. Numbers are tensors in the one and floats in the other, so that
models of one structure share a recorded graph. Quantiles are those of one number of each value: the
``read`` of the family says which. Nothing of torch's or this package's supports, transforms and
Jacobians enters the truth.
"""

import math
from typing import NamedTuple

import numpy as np
import pyro.distributions as dist
import torch
from scipy import special, stats
from torch.distributions import constraints

T = dist.transforms
ndtri = special.ndtri


class Family(NamedTuple):
    """A family of latents."""

    make: object  # parent (tensor) -> distribution
    quantile: object  # v, parent (arrays) -> values
    read: object = lambda value: value  # one number of a value
    one: bool = True  # one number per value: may be transformed further
    atoms: object = None  # values and probabilities of a discrete latent
    improper: object = None  # log density that a factor adds to a flat latent


class TruncatedNormal(dist.TorchDistribution):
    """A class of a user: a normal on (-1, 2), in units of its scale."""

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}
    has_rsample = True
    LOW, HIGH = stats.norm.cdf(-1.0), stats.norm.cdf(2.0)

    def __init__(self, loc, scale):
        self.loc, self.scale = torch.broadcast_tensors(loc, torch.as_tensor(scale))
        super().__init__(self.loc.shape)

    @property
    def support(self):
        return constraints.interval(self.loc - self.scale, self.loc + 2.0 * self.scale)

    def expand(self, shape, _instance=None):
        return TruncatedNormal(self.loc.expand(shape), self.scale.expand(shape))

    def rsample(self, sample_shape=torch.Size()):  # noqa: B008
        v = torch.rand(self._extended_shape(sample_shape), dtype=self.loc.dtype)
        return self.loc + self.scale * torch.special.ndtri(self.LOW + (self.HIGH - self.LOW) * v)

    def log_prob(self, value):
        u = (value - self.loc) / self.scale
        log_prob = -0.5 * u.square() - self.scale.log() - math.log(self.HIGH - self.LOW)
        log_prob = log_prob - 0.5 * math.log(2.0 * math.pi)
        return torch.where((u > -1.0) & (u < 2.0), log_prob, -math.inf)


def _table(log_density):
    """Builds the quantile function of a density on (-pi, pi) of angles."""
    knots = np.linspace(-math.pi, math.pi, 20001)
    density = np.exp(log_density(knots))
    below = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
    return lambda v: np.interp(v, below / below[-1], knots)


def _angle(kappa, loc, skew=0.0):
    quantile = _table(lambda x: kappa * (np.cos(x - loc) - 1.0) + np.log1p(skew * np.sin(x - loc)))
    return lambda v, p: quantile(v)


def _first_of_direction(first):
    """Tabulates the first coordinate of a normal vector with mean (first, 1), projected."""

    def log_density(angle):
        along = first * np.cos(angle) + np.sin(angle)
        return np.log1p(along * np.exp(stats.norm.logcdf(along) - stats.norm.logpdf(along)))

    quantile = _table(log_density)
    return lambda v, p: np.cos(quantile(v))


def _asymmetric_laplace(v, loc, scale, skew):
    left = skew**2 / (1.0 + skew**2)
    low = loc + scale * skew * np.log(v / left)
    return np.where(v < left, low, loc - scale / skew * np.log((1.0 - v) / (1.0 - left)))


def families(a, b, loc, parent):
    """Builds all families at numbers ``a, b > 0`` and a location, by kind of support."""
    ta, tb, tl = (torch.tensor(v) for v in (a, b, loc))
    zero = torch.zeros_like(ta)
    real = {
        "Normal": Family(lambda p: dist.Normal(p + tl, ta), lambda v, p: p + loc + a * ndtri(v)),
        "Laplace": Family(lambda p: dist.Laplace(p, ta), lambda v, p: stats.laplace.ppf(v, p, a)),
        "StudentT": Family(
            lambda p: dist.StudentT(3.0 + ta, p, tb),
            lambda v, p: p + b * stats.t.ppf(v, 3.0 + a),
        ),
        "Gumbel": Family(lambda p: dist.Gumbel(p, ta), lambda v, p: p - a * np.log(-np.log(v))),
        "Logistic": Family(lambda p: dist.Logistic(p, ta), lambda v, p: p + a * special.logit(v)),
        "Cauchy": Family(lambda p: dist.Cauchy(p, ta), lambda v, p: p + a * stats.cauchy.ppf(v)),
        "SoftLaplace": Family(
            lambda p: dist.SoftLaplace(p, ta),
            lambda v, p: p + a * np.log(np.tan(0.5 * math.pi * v)),
        ),
        "AsymmetricLaplace": Family(
            lambda p: dist.AsymmetricLaplace(p, ta, tb),
            lambda v, p: _asymmetric_laplace(v, p, a, b),
        ),
    }
    if parent:
        real["scaled"] = Family(  # a funnel of moderate width
            lambda p: dist.Normal(zero, torch.nn.functional.softplus(p) + 0.1),
            lambda v, p: (np.logaddexp(0.0, p) + 0.1) * ndtri(v),
        )
        real["moving"] = Family(  # a support that depends on the parent
            lambda p: dist.Uniform(p - ta, p + tb), lambda v, p: p - a + (a + b) * v
        )
        real["truncated"] = Family(
            lambda p: TruncatedNormal(p, ta),
            lambda v, p: p + a * ndtri(TruncatedNormal.LOW + (TruncatedNormal.HIGH - TruncatedNormal.LOW) * v),
        )  # fmt: skip
    positive = {
        "Exponential": Family(lambda p: dist.Exponential(ta), lambda v, p: -np.log1p(-v) / a),
        "Gamma": Family(lambda p: dist.Gamma(ta, tb), lambda v, p: special.gammaincinv(a, v) / b),
        "Chi2": Family(lambda p: dist.Chi2(ta), lambda v, p: 2.0 * special.gammaincinv(a / 2, v)),
        "LogNormal": Family(
            lambda p: dist.LogNormal(tl, 0.5), lambda v, p: np.exp(loc + 0.5 * ndtri(v))
        ),
        "HalfNormal": Family(lambda p: dist.HalfNormal(ta), lambda v, p: a * ndtri(0.5 + 0.5 * v)),
        "HalfCauchy": Family(
            lambda p: dist.HalfCauchy(ta), lambda v, p: a * np.tan(0.5 * math.pi * v)
        ),
        "Weibull": Family(
            lambda p: dist.Weibull(tb, 0.5 + ta),
            lambda v, p: b * (-np.log1p(-v)) ** (1 / (0.5 + a)),
        ),
        "InverseGamma": Family(
            lambda p: dist.InverseGamma(1.0 + ta, tb),
            lambda v, p: b / special.gammainccinv(1.0 + a, v),
        ),
        "FisherSnedecor": Family(
            lambda p: dist.FisherSnedecor(2.0 + ta, 4.0 + tb),
            lambda v, p: stats.f.ppf(v, 2.0 + a, 4.0 + b),
        ),
        "Pareto": Family(
            lambda p: dist.Pareto(ta, 1.0 + tb), lambda v, p: a * (1 - v) ** (-1 / (1.0 + b))
        ),
        "Wishart": Family(
            lambda p: dist.Wishart(2.0 + ta, torch.eye(2)),
            lambda v, p: 2.0 * special.gammaincinv(1.0 + a / 2, v),
            lambda z: z[..., 0, 0],
            one=False,
        ),
    }
    interval = {
        "Uniform": Family(lambda p: dist.Uniform(tl, tl + ta), lambda v, p: loc + a * v),
        "Beta": Family(lambda p: dist.Beta(ta, tb), lambda v, p: special.betaincinv(a, b, v)),
        "Kumaraswamy": Family(
            lambda p: dist.Kumaraswamy(ta, tb),
            lambda v, p: (-np.expm1(np.log1p(-v) / b)) ** (1 / a),
        ),
        "small Beta": Family(
            lambda p: dist.Beta(0.1 * ta, 0.1 * tb),
            lambda v, p: special.betaincinv(0.1 * a, 0.1 * b, v),
        ),
        "AffineBeta": Family(
            lambda p: dist.AffineBeta(ta, tb, tl, tb),
            lambda v, p: loc + b * special.betaincinv(a, b, v),
        ),
        "LogitNormal": Family(
            lambda p: dist.TransformedDistribution(dist.Normal(tl, ta), [T.SigmoidTransform()]),
            lambda v, p: special.expit(loc + a * ndtri(v)),
        ),
        "ContinuousBernoulli": Family(
            lambda p: dist.ContinuousBernoulli(logits=tl),
            lambda v, p: _continuous_bernoulli(v, special.expit(loc)),
        ),
    }
    angles = {
        "VonMises": Family(lambda p: dist.VonMises(tl, tb), _angle(b, loc)),
        "SineSkewed": Family(
            lambda p: dist.SineSkewed(
                dist.Independent(dist.VonMises(tl.view(1), tb.view(1)), 1), torch.full((1,), 0.6)
            ),
            _angle(b, loc, 0.6),
            lambda z: z[..., 0],
            one=False,
        ),
        "ProjectedNormal": Family(
            lambda p: dist.ProjectedNormal(torch.stack([tl, torch.ones_like(tl)])),
            _first_of_direction(loc),
            lambda z: z[..., 0],
            one=False,
        ),
    }
    vectors = {
        "Dirichlet": Family(
            lambda p: dist.Dirichlet(torch.stack([ta, tb])),
            lambda v, p: special.betaincinv(a, b, v),
            lambda z: z[..., 0],
            one=False,
        ),
        "Dirichlet of 3": Family(
            lambda p: dist.Dirichlet(torch.stack([0.3 * ta, tb, 0.2 * tb])),
            lambda v, p: special.betaincinv(0.3 * a, 1.2 * b, v),
            lambda z: z[..., 0],
            one=False,
        ),
        "LKJCholesky": Family(
            lambda p: dist.LKJCholesky(2, ta),
            lambda v, p: 2.0 * special.betaincinv(a, a, v) - 1.0,
            lambda z: z[..., 1, 0],
            one=False,
        ),
        "LKJ": Family(
            lambda p: dist.LKJ(2, ta),
            lambda v, p: 2.0 * special.betaincinv(a, a, v) - 1.0,
            lambda z: z[..., 0, 1],
            one=False,
        ),
        "MultivariateNormal": Family(
            lambda p: dist.MultivariateNormal(
                torch.stack([p + tl, p], -1), torch.tensor([[1.0, 0.6], [0.6, 2.0]]) * ta.square()
            ),
            lambda v, p: p + math.sqrt(2.0) * a * ndtri(v),
            lambda z: z[..., 1],
            one=False,
        ),
        "ordered": Family(
            lambda p: dist.TransformedDistribution(
                dist.Normal(torch.stack([p, torch.zeros_like(p)], -1), ta).to_event(1),
                [T.OrderedTransform()],
            ),
            lambda v, p: p + a * ndtri(v),
            lambda z: z[..., 0],
            one=False,
        ),
        "event": Family(
            lambda p: dist.Gamma(
                ta, torch.stack([tb + 0 * p, 2 * tb + 0 * p, tb + p.abs()], -1)
            ).to_event(1),
            lambda v, p: special.gammaincinv(a, v) / (b + np.abs(p)),
            lambda z: z[..., 2],
            one=False,
        ),
    }
    discrete = {
        "plain Bernoulli": Family(
            lambda p: dist.Bernoulli(0.4 * ta / (ta + 1.0)),
            None,
            atoms=(np.array([0.0, 1.0]), np.array([1 - 0.4 * a / (a + 1), 0.4 * a / (a + 1)])),
        ),
        "plain Categorical": Family(
            lambda p: dist.Categorical(torch.stack([ta, tb, torch.ones_like(ta)])),
            None,
            lambda k: 0.7 * k.to(torch.get_default_dtype()),
            atoms=(np.array([0.0, 0.7, 1.4]), np.array([a, b, 1.0]) / (a + b + 1.0)),
        ),
        "plain Poisson": Family(
            lambda p: dist.Poisson(ta),
            None,
            lambda k: 0.5 * k,
            atoms=(0.5 * np.arange(40), stats.poisson.pmf(np.arange(40), a)),
        ),
        "plain Binomial": Family(
            lambda p: dist.Binomial(4, tb / (tb + 1.0)),
            None,
            lambda k: 0.5 * k,
            atoms=(0.5 * np.arange(5), stats.binom.pmf(np.arange(5), 4, b / (b + 1.0))),
        ),
    }
    flat = {
        "masked Normal": Family(
            lambda p: dist.Normal(zero, 1.0).mask(False),
            lambda v, p: p + loc + a * ndtri(v),
            improper=lambda z, p: dist.Normal(p + tl, ta).log_prob(z),
        ),
        "ImproperUniform": Family(
            lambda p: dist.ImproperUniform(constraints.positive, p.shape, ()),
            lambda v, p: special.gammaincinv(1.0 + a, v) / b,
            improper=lambda z, p: dist.Gamma(1.0 + ta, tb).log_prob(z),
        ),
    }
    return {
        "real": real,
        "positive": positive,
        "interval": interval,
        "angle": angles,
        "vector": vectors,
        "discrete": discrete,
        "flat": flat,
    }


def _continuous_bernoulli(v, p):
    """Inverts F(x) = (r^x - 1) / (r - 1) with r = p / (1 - p)."""
    if abs(p - 0.5) < 1e-6:
        return v
    log_r = math.log(p / (1.0 - p))
    return np.log1p(v * math.expm1(log_r)) / log_r


def transformed(kind, family, shift, scale):
    """Shifts, scales, reflects or bends a family of one number."""
    transform, through = {
        "affine": (T.AffineTransform(torch.tensor(shift), torch.tensor(scale)), lambda x: shift + scale * x),
        "reflect": (T.AffineTransform(torch.tensor(shift), -torch.tensor(scale)), lambda x: shift - scale * x),
        "exp": (T.ExpTransform(), np.exp),
        "sigmoid": (T.SigmoidTransform(), special.expit),
        "tanh": (T.TanhTransform(), np.tanh),
        "power": (T.PowerTransform(torch.tensor(2.0)), np.square),
        "softplus": (T.SoftplusTransform(), lambda x: np.logaddexp(0.0, x)),
    }[kind]  # fmt: skip
    return family._replace(
        make=lambda p: dist.TransformedDistribution(family.make(p), [transform]),
        quantile=lambda v, p: through(family.quantile(v, p)),
    )
