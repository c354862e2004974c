"""Random Pyro models whose evidence is known: trees of latents, by nested quadrature.

A model has a root, perhaps a second global latent below it, perhaps an enumerated site, and rows in
a plate, each perhaps with a latent of its own. Truths use quantile functions from scipy in place of
densities, ``E[f(z)] = int_0^1 f(Q(v)) dv``, so that nothing of torch's or this package's supports,
transforms and Jacobians enters them.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy import special, stats

T = dist.transforms


class Seeded:
    """Chooses by a seed."""

    def __init__(self, seed):
        self.random = np.random.RandomState(seed)

    def pick(self, options):
        return options[self.random.randint(len(options))]

    def number(self, low, high):
        return float(self.random.uniform(low, high))


class Drawn:
    """Chooses by hypothesis, so that failures shrink."""

    def __init__(self, draw, strategies):
        self.draw = draw
        self.strategies = strategies

    def pick(self, options):
        return self.draw(self.strategies.sampled_from(options))

    def number(self, low, high):
        steps = self.draw(self.strategies.integers(0, 1000))
        return low + (high - low) * steps / 1000


@dataclass
class Latent:
    """A latent by its torch distribution and by its quantiles, both at a parent's value."""

    name: str
    make: object  # parent (tensor) -> distribution
    parts: list  # of (weight, quantile(v, parent) on arrays)
    read: object = field(default=lambda value: value)  # to one number per element


def _family(choose, parent):
    """A family: its name, constructor and quantile at the location of ``parent``, or at zero."""
    a, b = choose.number(0.3, 3.0), choose.number(0.3, 3.0)
    loc = choose.number(-2.0, 2.0)
    real = {
        "Normal": (lambda p: dist.Normal(p + loc, a), lambda v, p: p + loc + a * special.ndtri(v)),
        "Laplace": (lambda p: dist.Laplace(p, a), lambda v, p: stats.laplace.ppf(v, p, a)),
        "StudentT": (
            lambda p: dist.StudentT(3.0 + a, p, b),
            lambda v, p: p + b * stats.t.ppf(v, 3.0 + a),
        ),
        "Gumbel": (lambda p: dist.Gumbel(p, a), lambda v, p: p - a * np.log(-np.log(v))),
        "Logistic": (lambda p: dist.Logistic(p, a), lambda v, p: p + a * special.logit(v)),
    }
    if parent:
        # a scale that depends on the parent, a funnel of moderate width
        real["scaled"] = (
            lambda p: dist.Normal(0.0, torch.nn.functional.softplus(p) + 0.1),
            lambda v, p: (np.logaddexp(0.0, p) + 0.1) * special.ndtri(v),
        )
        # a support that depends on the parent
        real["moving"] = (
            lambda p: dist.Uniform(p - a, p + b),
            lambda v, p: p - a + (a + b) * v,
        )
    fixed = {
        "Exponential": (lambda p: dist.Exponential(a), lambda v, p: -np.log1p(-v) / a),
        "Gamma": (
            lambda p: dist.Gamma(a, b),
            lambda v, p: special.gammaincinv(a, v) / b,
        ),
        "LogNormal": (lambda p: dist.LogNormal(loc, 0.5), lambda v, p: np.exp(loc + 0.5 * special.ndtri(v))),
        "HalfNormal": (lambda p: dist.HalfNormal(a), lambda v, p: a * special.ndtri(0.5 + 0.5 * v)),
        "HalfCauchy": (lambda p: dist.HalfCauchy(a), lambda v, p: a * np.tan(0.5 * math.pi * v)),
        "Weibull": (
            lambda p: dist.Weibull(b, 0.5 + a),
            lambda v, p: b * (-np.log1p(-v)) ** (1 / (0.5 + a)),
        ),
        "InverseGamma": (
            lambda p: dist.InverseGamma(1.0 + a, b),
            lambda v, p: b / special.gammainccinv(1.0 + a, v),
        ),
        "Uniform": (lambda p: dist.Uniform(loc, loc + a), lambda v, p: loc + a * v),
        "Beta": (lambda p: dist.Beta(a, b), lambda v, p: special.betaincinv(a, b, v)),
        "Kumaraswamy": (
            lambda p: dist.Kumaraswamy(a, b),
            lambda v, p: (-np.expm1(np.log1p(-v) / b)) ** (1 / a),
        ),
        "small Beta": (
            lambda p: dist.Beta(0.1 * a, 0.1 * b),
            lambda v, p: special.betaincinv(0.1 * a, 0.1 * b, v),
        ),
        "VonMises": (
            lambda p: dist.VonMises(loc, b),
            lambda v, p: np.angle(np.exp(1j * (loc + _vonmises(b, v)))),
        ),
        "Pareto": (lambda p: dist.Pareto(a, 1.0 + b), lambda v, p: a * (1 - v) ** (-1 / (1.0 + b))),
    }  # fmt: skip
    families = real | fixed
    name = choose.pick(sorted(real) * 2 + sorted(fixed))
    return name, *families[name]


def _vonmises(kappa, v):
    knots = np.linspace(-math.pi, math.pi, 20001)
    density = np.exp(kappa * (np.cos(knots) - 1.0))
    below = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
    return np.interp(v, below / below[-1], knots)


def _transformed(choose, name, make, quantile):
    """Shifts, reflects or bends a family, or leaves it."""
    kind = choose.pick(["none", "none", "affine", "reflect", "exp", "sigmoid"])
    shift, scale = choose.number(-1.0, 1.0), choose.number(0.5, 2.0)
    if kind == "reflect":
        scale = -scale
    if kind in ("affine", "reflect"):
        transform = T.AffineTransform(shift, scale)
        through = lambda x: shift + scale * x
    elif kind == "exp" and name in ("Normal", "Uniform", "Beta", "Kumaraswamy", "VonMises"):
        transform, through = T.ExpTransform(), np.exp
    elif kind == "sigmoid":
        transform, through = T.SigmoidTransform(), special.expit
    else:
        return name, make, quantile
    return (
        f"{kind} of {name}",
        lambda p: dist.TransformedDistribution(make(p), [transform]),
        lambda v, p: through(quantile(v, p)),
    )


def _latent(choose, site, parent):
    kind = choose.pick(["plain"] * 6 + ["mixture", "simplex", "correlation"])
    a, b = choose.number(0.5, 3.0), choose.number(0.5, 3.0)
    if kind == "mixture":
        locs, weights = torch.tensor([-a, b]), torch.tensor([0.3, 0.7])
        parts = [
            (w, lambda v, p, m=m: m + 0.5 * special.ndtri(v)) for w, m in ((0.3, -a), (0.7, b))
        ]
        make = lambda p: dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(locs, 0.5))
        return kind, Latent(site, make, parts)
    if kind == "simplex":
        quantile = lambda v, p: special.betaincinv(a, b, v)
        make = lambda p: dist.Dirichlet(torch.tensor([a, b]))
        return kind, Latent(site, make, [(1.0, quantile)], lambda z: z[..., 0])
    if kind == "correlation":
        quantile = lambda v, p: 2.0 * special.betaincinv(a, a, v) - 1.0
        make = lambda p: dist.LKJCholesky(2, torch.tensor(a))
        return kind, Latent(site, make, [(1.0, quantile)], lambda z: z[..., 1, 0])
    name, make, quantile = _transformed(choose, *_family(choose, parent))
    if parent and choose.pick([False, False, True]):  # an image that moves with the parent
        name = f"shifted {name}"
        shifted = lambda p: dist.TransformedDistribution(make(p), [T.AffineTransform(p, 1.0)])
        return name, Latent(site, shifted, [(1.0, lambda v, p: p + quantile(v, p))])
    return name, Latent(site, make, [(1.0, quantile)])


@dataclass
class RandomModel:
    """A model without arguments, the log evidence of its data, and how to run it."""

    model: object
    log_evidence: float
    accuracy: float  # of the quadrature, in nats
    dtype: torch.dtype
    guide: object
    batch_plates: object
    description: str


def build(choose):
    """Builds a random model."""
    dtype = choose.pick([torch.float32, torch.float64])
    torch.set_default_dtype(dtype)
    root_name, root = _latent(choose, "root", parent=False)
    has_child = choose.pick([False, True])
    child_name, child = _latent(choose, "child", parent=True) if has_child else ("", None)
    rows = choose.pick([0, 1, 3])
    has_local = rows > 0 and choose.pick([False, True])
    local_name, local = _latent(choose, "local", parent=True) if has_local else ("", None)
    enumerated = choose.pick(["", "", "global", "rows" if rows else ""])
    noise = choose.number(0.4, 2.0)
    likelihood = choose.pick(["Normal", "Normal", "Bernoulli", "Poisson", "StudentT"])
    slope = choose.pick([1.0, -0.5])
    data = [choose.pick([-1.0, 0.5, 1.5]) for _ in range(max(rows, 1))]
    if likelihood == "Bernoulli":
        data = [float(d > 0) for d in data]
    if likelihood == "Poisson":
        data = [float(round(d + 1.0)) for d in data]
    y = torch.tensor(data)
    # rows: 0 for one observation outside of plates
    guide = choose.pick([None, None, None, None, None, "auto"])

    def squash(h):
        return 3.0 * torch.tanh(h / 3.0)

    def observe(h, k, value):
        h = slope * squash(h) + k
        fn = {
            "Normal": lambda: dist.Normal(h, noise),
            "StudentT": lambda: dist.StudentT(4.0, h, noise),
            "Bernoulli": lambda: dist.Bernoulli(logits=h),
            "Poisson": lambda: dist.Poisson(h.exp()),
        }[likelihood]()
        pyro.sample("y", fn, obs=value)

    def switch():
        return pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})

    def model():
        h = root.read(pyro.sample("root", root.make(torch.zeros(()))))
        if child is not None:
            z = pyro.sample("child", child.make(squash(h)))
            h = child.read(z) + 0.5 * squash(h)
        k = switch() if enumerated == "global" else torch.zeros(())
        if not rows:
            observe(h, k, y[0])
            return
        with pyro.plate("rows", rows):
            if local is not None:
                fn = local.make(squash(h))
                fn = fn if fn.batch_shape else fn.expand([rows])
                h = local.read(pyro.sample("local", fn)) + 0.5 * squash(h)
            observe(h, switch() if enumerated == "rows" else k, y)

    coarse = _evidence(root, child, local, enumerated, likelihood, noise, slope, data, rows, 6)
    fine = _evidence(root, child, local, enumerated, likelihood, noise, slope, data, rows, 10)
    names = [f"{n}" for n in (root_name, child_name, local_name) if n]
    description = (
        f"{' > '.join(names)}; {rows} rows, {likelihood}({noise:.2f}), enumerated {enumerated!r}, "
        f"{dtype}, guide {guide}"
    )
    return RandomModel(model, fine, abs(fine - coarse), dtype, guide, [], description)


_EDGES = [0.0, 1e-12, 1e-8, 1e-5, 1e-3, 0.02, 0.1, 0.25, 0.5]


def _nodes(count):
    """Gauss-Legendre nodes in panels that narrow towards both ends."""
    x, w = np.polynomial.legendre.leggauss(count)
    edges = np.array(_EDGES)
    widths = np.diff(edges)
    v = (edges[:-1, None] + 0.5 * widths[:, None] * (x + 1.0)).ravel()
    weights = (0.5 * widths[:, None] * w).ravel()
    return np.concatenate([v, 1.0 - v[::-1]]), np.concatenate([weights, weights[::-1]])


def _evidence(root, child, local, enumerated, likelihood, noise, slope, data, rows, count):
    v, w = _nodes(count)
    v = np.clip(v, 1e-300, 1.0 - 1e-16)

    def squash(h):
        return 3.0 * np.tanh(h / 3.0)

    def density(h, k, value):
        h = slope * squash(h) + k
        if likelihood == "Normal":
            return np.exp(-0.5 * ((value - h) / noise) ** 2) / (noise * math.sqrt(2 * math.pi))
        if likelihood == "StudentT":
            return stats.t.pdf((value - h) / noise, 4.0) / noise
        if likelihood == "Bernoulli":
            return special.expit(h if value else -h)
        return np.exp(value * h - np.exp(h) - special.gammaln(value + 1.0))

    def average(latent, parent, function):
        """Averages a function of a latent, and of what is below, at parents ``[...]``."""
        total, parent = 0.0, np.asarray(parent)[..., None]
        for weight, quantile in latent.parts:
            z = np.broadcast_to(quantile(v, parent), (*parent.shape[:-1], len(v)))
            total = total + weight * (function(z + 0.5 * parent) * w).sum(-1)
        return total

    def switched(function, kind):
        if enumerated != kind:
            return function(0.0)
        return 0.7 * function(0.0) + 0.3 * function(1.0)

    def row(h, k, value):
        if local is None:
            return switched(lambda j: density(h, k + j, value), "rows")
        return average(
            local, squash(h), lambda z: switched(lambda j: density(z, k + j, value), "rows")
        )

    def all_rows(h):
        def product(k):
            if not rows:
                return density(h, k, data[0])
            result = 1.0
            for value in data:
                result = result * row(h, k, value)
            return result

        return switched(product, "global")

    def below(h):
        return all_rows(h) if child is None else average(child, squash(h), all_rows)

    return math.log(float(average(root, np.zeros(()), below)))
