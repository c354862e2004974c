"""Models of posteriordb that are typed from their descriptions, for ``posteriordb.py --data``.

Each function takes the data and returns the Pyro model, its arguments, the exact evidence as a
function, the log density of what :func:`~posteriordb.sampled` draws (latents that are independent
given the others are integrated there), and where its search for an optimum starts. Exact evidences
are closed forms or sums over grids that cover the whole density. Terms and priors are those of
posteriordb (Magnusson et al., BSD-3-Clause); uniform latents are written as such.
"""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy import optimize, special, stats

# Standard normal nodes of inner integrals over independent latents.
_NODES = np.linspace(-9.0, 9.0, 181)
_LOG_NODES = stats.norm.logpdf(_NODES) + math.log(_NODES[1] - _NODES[0])


def grid(log_density, *axes):
    """Sums exp(log_density(u [N, D])) over a grid, a few thousand points at a time."""
    cell = math.prod(axis[1] - axis[0] for axis in axes)
    mesh = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
    parts = [log_density(part) for part in np.array_split(mesh, max(1, len(mesh) // 2000))]
    values = np.concatenate(parts)
    edge = max(_faces(values.reshape([len(axis) for axis in axes])))
    assert edge < values.max() - 12.0, "the grid cuts mass off"
    return float(special.logsumexp(values) + math.log(cell))


def around(log_density, start, width=8.0, num=41):
    """Sums likewise, in coordinates that the curvature at the optimum makes white."""
    negative = lambda u: -float(log_density(u[None])[0])
    best = optimize.minimize(negative, start, method="BFGS", options={"maxiter": 2000}).x
    dim, step = len(best), 1e-3
    eye, hessian = np.eye(dim) * step, np.empty((dim, dim))
    for i in range(dim):
        for j in range(dim):
            parts = [(a * b, best + a * eye[i] + b * eye[j]) for a in (1, -1) for b in (1, -1)]
            hessian[i, j] = sum(sign * negative(u) for sign, u in parts) / (4 * step**2)
    scale = np.linalg.cholesky(np.linalg.inv(0.5 * (hessian + hessian.T)))
    axis = np.linspace(-width, width, num)
    found = grid(lambda z: log_density(best + z @ scale.T), *[axis] * dim)
    return found + float(np.log(np.diag(scale)).sum())


def _faces(values):
    for dim in range(values.ndim):
        yield values.take(0, dim).max()
        yield values.take(-1, dim).max()


def log_unit(logit):
    """Log density in the logit of a uniform number."""
    return -np.logaddexp(0.0, logit) - np.logaddexp(0.0, -logit)


def box(low, high, logit):
    return low + (high - low) * special.expit(logit)


def uniform(name, low=0.0, high=1.0):
    return pyro.sample(name, dist.Uniform(torch.tensor(low), torch.tensor(high)))


def tensor(values):
    return torch.tensor(np.asarray(values), dtype=torch.float64)


# Rates of binomial counts


def rates(successes, trials, groups, spare):
    """Counts whose rates are uniform, one for each group, and ``spare`` rates without data."""
    with pyro.plate("rates", int(max(groups)) + 1 + spare):
        theta = pyro.sample("theta", dist.Beta(1.0, 1.0))
    with pyro.plate("data", len(successes)):
        pyro.sample("k", dist.Binomial(trials, theta[groups]), obs=successes)


def rate(successes, trials, groups, spare=0):
    k, n, groups = (np.array(values) for values in (successes, trials, groups))
    which = range(groups.max() + 1)

    def exact():
        own = [(k[groups == g].sum(), (n - k)[groups == g].sum()) for g in which]
        coefficients = (
            special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)
        ).sum()
        return float(coefficients + sum(special.betaln(a + 1, b + 1) for a, b in own))

    def log_joint(u):
        theta = special.expit(u)[:, groups]
        return stats.binom.logpmf(k, n, theta).sum(1) + log_unit(u).sum(1)

    args = (tensor(k), tensor(n), torch.tensor(groups), spare)
    return rates, args, exact, log_joint, np.zeros(groups.max() + 1 + spare)


def survey_model(counts, most):
    theta = uniform("theta")
    totals = torch.arange(float(counts.max()), most + 1.0)
    members = dist.Binomial(totals.unsqueeze(-1), theta.expand(len(totals), len(counts))).to_event(
        1
    )
    weights = dist.Categorical(torch.ones(len(totals)))
    pyro.sample("k", dist.MixtureSameFamily(weights, members), obs=counts)


def survey(data):
    """The number of surveys is uniform up to 500: here from the largest count on, which is all."""
    k, most = np.array(data["k"]), data["nmax"]
    totals = np.arange(k.max(), most + 1)

    def log_joint(u):
        theta = special.expit(u)
        terms = stats.binom.logpmf(k, totals[:, None], theta[:, :, None]).sum(-1)
        return special.logsumexp(terms, axis=1) - math.log(len(totals)) + log_unit(u[:, 0])

    exact = lambda: grid(log_joint, np.linspace(-14.0, 14.0, 2001))
    return survey_model, (tensor(k), most), exact, log_joint, np.array([-2.0])


# Capture and recapture, with individuals that were never seen


def capture_model(seen, log_terms, counts, names):
    """Patterns of capture: each has a log probability given that the individual exists."""
    omega, rest = uniform("omega"), {name: uniform(name) for name in names}
    given = log_terms(**rest)
    alive = omega.log() + given
    terms = torch.where(seen, alive, torch.logaddexp(alive, torch.log1p(-omega)))
    pyro.factor("captures", (counts * terms).sum())


def capture(data, kind):
    y = np.array(data["y"])
    patterns, counts = np.unique(y, axis=0, return_counts=True)
    T, seen = y.shape[1], patterns.sum(1) > 0
    before = np.concatenate([np.zeros((len(patterns), 1)), patterns[:, :-1]], 1)
    names = {"M0": ["p"], "Mb": ["p", "c"], "Mt": [f"p{t}" for t in range(T)]}[kind]
    caught, earlier = tensor(patterns), tensor(before)

    def chances(**p):
        if kind == "Mt":
            return torch.stack([p[name] for name in names])
        return p["p"] + (earlier * (p["c"] - p["p"]) if kind == "Mb" else 0.0 * earlier)

    def log_terms(**p):
        q = chances(**p)
        return (caught * q.log() + (1.0 - caught) * torch.log1p(-q)).sum(-1)

    choose = 0.0  # M0 counts the ways to be caught so many times
    if kind == "M0":
        totals = y.sum(1)
        choose = float(np.log(special.comb(T, totals)).sum())

    def log_joint(u):
        omega, p = special.expit(u[:, 0]), special.expit(u[:, 1:])
        if kind == "Mt":
            q = p[:, None, :]
        elif kind == "Mb":
            q = p[:, :1, None] * (1 - before) + p[:, 1:, None] * before
        else:
            q = np.broadcast_to(p[:, :1, None], (len(u), *before.shape))
        given = special.xlogy(patterns, q).sum(2) + special.xlog1py(1 - patterns, -q).sum(2)
        alive = np.log(omega)[:, None] + given
        terms = np.where(seen, alive, np.logaddexp(alive, np.log1p(-omega)[:, None]))
        return terms @ counts + log_unit(u).sum(1) + choose

    def model(seen, counts, choose):
        capture_model(seen, log_terms, counts, names)
        pyro.factor("ways", torch.tensor(choose))

    start = np.zeros(1 + len(names))
    wide = {"M0": (12.0, 201), "Mb": (12.0, 81), "Mt": (9.0, 31)}[kind]
    args = (torch.tensor(seen), tensor(counts), choose)
    return model, args, lambda: around(log_joint, start, *wide), log_joint, start


def mh_model(y, T):
    omega, mean_p, sigma = uniform("omega"), uniform("mean_p"), uniform("sigma", 0.0, 5.0)
    with pyro.plate("individuals", len(y)):
        raw = pyro.sample("eps_raw", dist.Normal(0.0, 1.0))
    logits = torch.logit(mean_p) + sigma * raw
    alive = omega.log() + dist.Binomial(T, logits=logits).log_prob(y)
    terms = torch.where(y > 0, alive, torch.logaddexp(alive, torch.log1p(-omega)))
    pyro.factor("captures", terms.sum())


def mh(data):
    y, T = np.array(data["y"]), data["T"]
    counts = np.bincount(y, minlength=T + 1)

    def log_joint(u):
        omega, mean, sigma = special.expit(u[:, 0]), u[:, 1], 5.0 * special.expit(u[:, 2])
        logits = mean[:, None] + sigma[:, None] * _NODES
        value = log_unit(u).sum(1)
        for k in range(T + 1):
            one = -np.logaddexp(0.0, -logits) * k - np.logaddexp(0.0, logits) * (T - k)
            one = special.logsumexp(one + _LOG_NODES, axis=1) + math.log(special.comb(T, k))
            one = np.log(omega) + one
            value = value + counts[k] * (np.logaddexp(one, np.log1p(-omega)) if k == 0 else one)
        return value

    axes = [np.linspace(-6.0, 12.0, 61), np.linspace(-14.0, 6.0, 61), np.linspace(-9.0, 11.0, 61)]
    return (
        mh_model,
        (tensor(y), T),
        lambda: grid(log_joint, *axes),
        log_joint,
        np.array([0.0, 0, 0]),
    )


# Regressions of counts


def binomial_model(C, N, design):
    b = pyro.sample("beta", dist.Normal(torch.zeros(3), 100.0).to_event(1))
    with pyro.plate("years", len(C)):
        pyro.sample("C", dist.Binomial(N, logits=design @ b), obs=C)


def glm_binomial(data):
    year, C, N = (np.array(data[key], dtype=float) for key in ("year", "C", "N"))
    design = np.stack([np.ones_like(year), year, year**2], -1)
    ways = (special.gammaln(N + 1) - special.gammaln(C + 1) - special.gammaln(N - C + 1)).sum()

    def log_joint(u):
        logits = u @ design.T
        value = (C * logits - N * np.logaddexp(0.0, logits)).sum(1) + ways
        return value + stats.norm.logpdf(u, 0.0, 100.0).sum(1)

    args = (tensor(C), tensor(N), tensor(design))
    return (
        binomial_model,
        args,
        lambda: around(log_joint, np.zeros(3)),
        log_joint,
        np.zeros(3),
    )


def poisson_model(C, design, wide, has_noise):
    highs = [20.0, 10.0, 20.0 if wide else 10.0, 10.0]
    names = ("alpha", "beta1", "beta2", "beta3")
    lows = [-20.0, -10.0, -10.0, -10.0]
    b = torch.stack([uniform(n, lo, hi) for n, lo, hi in zip(names, lows, highs, strict=True)])
    log_rate = design @ b
    sigma = uniform("sigma", 0.0, 5.0) if has_noise else None
    with pyro.plate("years", len(C)):
        if has_noise:
            log_rate = log_rate + pyro.sample("eps", dist.Normal(0.0, sigma))
        pyro.sample("C", dist.Poisson(log_rate.exp()), obs=C)


def poisson(data, has_noise):
    """Boxes are so wide that their edges do not matter: coefficients are integrated as they are."""
    year, C = np.array(data["year"]), np.array(data["C"], dtype=float)
    design = np.stack([year**k for k in range(4)], -1)
    area = 40.0 * 20.0 * (30.0 if has_noise else 20.0) * 20.0
    constant = -special.gammaln(C + 1).sum() - math.log(area)

    def log_joint(u):
        log_rate = u[:, :4] @ design.T
        if not has_noise:
            return (C * log_rate - np.exp(log_rate)).sum(1) + constant
        value = constant + log_unit(u[:, 4])
        sigma = 5.0 * special.expit(u[:, 4])
        for t in range(len(C)):
            shifted = log_rate[:, t, None] + sigma[:, None] * _NODES
            one = C[t] * shifted - np.exp(np.minimum(shifted, 50.0))
            value = value + special.logsumexp(one + _LOG_NODES, axis=1)
        return value

    start = np.linalg.lstsq(design, np.log(C + 0.5), rcond=None)[0]
    start = np.append(start, -3.0) if has_noise else start
    args = (tensor(C), tensor(design), has_noise, has_noise)
    exact = lambda: around(log_joint, start, 7.0, 33)
    return poisson_model, args, None if has_noise else exact, log_joint, start


def sites_model(obs, site, num_sites):
    mu, sd = pyro.sample("mu_alpha", dist.Normal(0.0, 10.0)), uniform("sd_alpha", 0.0, 5.0)
    with pyro.plate("sites", num_sites):
        alpha = pyro.sample("alpha", dist.Normal(mu, sd))
    with pyro.plate("data", len(obs)):
        pyro.sample("obs", dist.Poisson(alpha[site].exp()), obs=obs)


def glmm_sites(data):
    obs, site = np.array(data["obs"], dtype=float), np.array(data["obssite"]) - 1
    num = data["nsite"]
    totals, visits = np.bincount(site, obs, num), np.bincount(site, minlength=num)
    constant = -special.gammaln(obs + 1).sum()
    # integrals over the sites of as many visits and counts are the same
    kinds, counts = np.unique(np.stack([totals, visits], -1), axis=0, return_counts=True)
    alphas = np.linspace(-16.0, 8.0, 1201)
    log_like = kinds[:, :1] * alphas - kinds[:, 1:] * np.exp(alphas)

    def log_joint(u):
        sd = 5.0 * special.expit(u[:, 1])
        value = stats.norm.logpdf(u[:, 0], 0.0, 10.0) + log_unit(u[:, 1]) + constant
        for row, (mu, s) in enumerate(zip(u[:, 0], sd, strict=True)):
            prior = stats.norm.logpdf(alphas, mu, s) + math.log(alphas[1] - alphas[0])
            value[row] += counts @ special.logsumexp(log_like + prior, axis=1)
        return value

    start = np.array([2.0, -1.0])
    args = (tensor(obs), torch.tensor(site), num)
    exact = lambda: around(log_joint, start, 7.0, 25)
    return sites_model, args, exact, log_joint, start


# Dogs


def _shocks(y):
    shock = np.concatenate([np.zeros((len(y), 1)), y.cumsum(1)[:, :-1]], 1)
    return shock, np.arange(y.shape[1]) - shock


def dogs_log_model(y, avoid, shock):
    b = torch.stack([uniform("beta1", -100.0, 0.0), uniform("beta2", 0.0, 100.0)])
    with pyro.plate("trials", y.numel()):
        pyro.sample("y", dist.Bernoulli(logits=b[0] * avoid + b[1] * shock), obs=y)


def dogs_log(data):
    y = np.array(data["y"], dtype=float)
    shock, avoid = (part.reshape(-1) for part in _shocks(y))
    flat = y.reshape(-1)

    def log_joint(u):
        b = np.stack([-100.0 * special.expit(-u[:, 0]), 100.0 * special.expit(u[:, 1])])
        logits = b[0][:, None] * avoid + b[1][:, None] * shock
        return (flat * logits - np.logaddexp(0.0, logits)).sum(1) + log_unit(u).sum(1)

    axes = [np.linspace(2.0, 30.0, 561), np.linspace(-30.0, -2.0, 561)]
    exact = lambda: grid(log_joint, *axes)
    return (
        dogs_log_model,
        (tensor(flat), tensor(avoid), tensor(shock)),
        exact,
        log_joint,
        np.array([6.0, -6]),
    )


def dogs_rates_model(y, avoid, shock):
    log_p = uniform("a").log() * shock + uniform("b").log() * avoid
    log_q = torch.log(-torch.expm1(log_p))
    pyro.factor("y", torch.where(y > 0.5, log_p, log_q).sum())


def dogs_rates(data):
    """The first trial, at which the model shocks for certain, is left out."""
    y = np.array(data["y"], dtype=float)
    shock, avoid = (part[:, 1:].reshape(-1) for part in _shocks(y))
    flat = y[:, 1:].reshape(-1)

    def log_joint(u):
        log_a, log_b = (-np.logaddexp(0.0, -part)[:, None] for part in u.T)
        log_p = log_a * shock + log_b * avoid
        log_q = np.log(-np.expm1(np.minimum(log_p, -1e-300)))
        return np.where(flat > 0.5, log_p, log_q).sum(1) + log_unit(u).sum(1)

    start = np.array([2.0, 1.0])
    exact = lambda: around(log_joint, start, 9.0, 161)
    return dogs_rates_model, (tensor(flat), tensor(avoid), tensor(shock)), exact, log_joint, start


# Normal models with groups


def pilots_model(y, group, scenario):
    deviations = [uniform(name, 0.0, 100.0) for name in ("sigma_a", "sigma_b", "sigma_y")]
    mu_a, mu_b = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in ("mu_a", "mu_b"))
    with pyro.plate("groups", int(group.max()) + 1):
        a = pyro.sample("a", dist.Normal(10.0 * mu_a, deviations[0]))
    with pyro.plate("scenarios", int(scenario.max()) + 1):
        b = pyro.sample("b", dist.Normal(10.0 * mu_b, deviations[1]))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a[group] + b[scenario], deviations[2]), obs=y)


def pilots(data):
    y = np.array(data["y"])
    group, scenario = (np.array(data[f"{key}_id"]) - 1 for key in ("group", "scenario"))
    same_group = (group[:, None] == group).astype(float)
    same_scenario = (scenario[:, None] == scenario).astype(float)

    def log_joint(u):
        a, b, s = (np.exp(2.0 * np.log(100.0) - 2.0 * np.logaddexp(0.0, -part)) for part in u.T)
        cov = 200.0 + a[:, None, None] * same_group + b[:, None, None] * same_scenario
        cov = cov + s[:, None, None] * np.eye(len(y))
        factor = np.linalg.cholesky(cov)
        white = np.linalg.solve(factor, np.broadcast_to(y[:, None], (len(u), len(y), 1)))[..., 0]
        value = -0.5 * (white**2).sum(1) - 0.5 * len(y) * math.log(2.0 * math.pi)
        value = value - np.log(np.diagonal(factor, axis1=1, axis2=2)).sum(1)
        return value + log_unit(u).sum(1)

    axes = [
        np.linspace(-24.0, 12.0, 73),
        np.linspace(-24.0, 12.0, 73),
        np.linspace(-7.5, -4.0, 29),
    ]
    args = (tensor(y), torch.tensor(group), torch.tensor(scenario))
    exact = lambda: grid(log_joint, *axes)
    return pilots_model, args, exact, log_joint, np.array([-6.0, -6.0, -6.0])


def counties_model(y, county, num):
    mu = pyro.sample("mu_a", dist.Normal(0.0, 1.0))
    sigma_a, sigma_y = uniform("sigma_a", 0.0, 100.0), uniform("sigma_y", 0.0, 100.0)
    with pyro.plate("counties", num):
        a = pyro.sample("a", dist.Normal(mu, sigma_a))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a[county], sigma_y), obs=y)


def radon_county(data):
    y, county, num = np.array(data["y"]), np.array(data["county"]) - 1, data["J"]
    n, total = np.bincount(county, minlength=num), np.bincount(county, y, num)
    squares = (y**2).sum()

    def log_joint(u):
        mu, own = u[:, :1], (np.log(100.0) - np.logaddexp(0.0, -u[:, 1:]))
        a, s = np.exp(2.0 * own[:, :1]), np.exp(2.0 * own[:, 1:])
        joint = n * a / s + 1.0  # of a county's mean, over its share of noise
        fit = (total - n * mu) ** 2 * a / (s * s * joint)
        rest = (squares - 2.0 * mu * total.sum() + n.sum() * mu**2)[:, 0] / s[:, 0]
        value = 0.5 * fit.sum(1) - 0.5 * np.log(joint).sum(1) - 0.5 * rest
        value = value - 0.5 * len(y) * np.log(2.0 * math.pi * s[:, 0])
        return value + stats.norm.logpdf(mu[:, 0]) + log_unit(u[:, 1:]).sum(1)

    start = np.array([1.0, -5.0, -5.0])
    args = (tensor(y), torch.tensor(county), num)
    exact = lambda: around(log_joint, start, 9.0, 61)
    return counties_model, args, exact, log_joint, start


def surgical_model(r, n):
    mu = pyro.sample("mu", dist.Normal(0.0, 1000.0))
    variance = pyro.sample("sigmasq", dist.InverseGamma(0.001, 0.001))
    with pyro.plate("hospitals", len(r)):
        b = pyro.sample("b", dist.Normal(mu, variance.sqrt()))
        pyro.sample("r", dist.Binomial(n, logits=b), obs=r)


def surgical(data):
    r, n = (np.array(data[key], dtype=float) for key in ("r", "n"))
    ways = (special.gammaln(n + 1) - special.gammaln(r + 1) - special.gammaln(n - r + 1)).sum()

    def log_joint(u):
        mu, log_variance = u[:, 0], u[:, 1]
        value = stats.norm.logpdf(mu, 0.0, 1000.0) + ways + log_variance
        value = value + stats.invgamma.logpdf(np.exp(log_variance), 0.001, scale=0.001)
        logits = mu[:, None] + np.exp(0.5 * log_variance)[:, None] * _NODES
        for one, of in zip(r, n, strict=True):
            terms = one * logits - of * np.logaddexp(0.0, logits)
            value = value + special.logsumexp(terms + _LOG_NODES, axis=1)
        return value

    axes = [np.linspace(-6.0, 0.0, 121), np.linspace(-14.0, 6.0, 101)]
    exact = lambda: grid(log_joint, *axes)
    return surgical_model, (tensor(r), tensor(n)), exact, log_joint, np.array([-2.5, -2.0])


# Curves


def dugongs_model(x, y):
    ends = [pyro.sample(name, dist.Normal(0.0, 1000.0)) for name in ("alpha", "beta")]
    rate, tau = uniform("lambda", 0.5, 1.0), pyro.sample("tau", dist.Gamma(0.0001, 0.0001))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(ends[0] - ends[1] * rate**x, tau.rsqrt()), obs=y)


def dugongs(data):
    x, y = np.array(data["x"]), np.array(data["Y"])

    def log_joint(u):
        rate, log_tau = 0.5 + 0.5 * special.expit(u[:, 0]), u[:, 1]
        curve = rate[:, None] ** x
        gram = 1e6 * (1.0 + curve[:, :, None] * curve[:, None, :])
        cov = gram + np.exp(-log_tau)[:, None, None] * np.eye(len(x))
        factor = np.linalg.cholesky(cov)
        white = np.linalg.solve(factor, np.broadcast_to(y[:, None], (len(u), len(y), 1)))[..., 0]
        value = -0.5 * (white**2).sum(1) - 0.5 * len(y) * math.log(2.0 * math.pi)
        value = value - np.log(np.diagonal(factor, axis1=1, axis2=2)).sum(1) + log_unit(u[:, 0])
        return value + stats.gamma.logpdf(np.exp(log_tau), 1e-4, scale=1e4) + log_tau

    axes = [np.linspace(-3.5, 7.0, 106), np.linspace(1.0, 7.5, 66)]
    exact = lambda: grid(log_joint, *axes)
    return dugongs_model, (tensor(x), tensor(y)), exact, log_joint, np.array([1.0, 4.5])


def bones_model(log_terms, num):
    with pyro.plate("children", num):
        theta = pyro.sample("theta", dist.Normal(0.0, 36.0))
    pyro.factor("grades", log_terms(theta).sum())


def bones(data):
    """Ages of bones: every child's is independent of the others."""
    gamma, delta = np.array(data["gamma"]), np.array(data["delta"])
    levels, grade = np.array(data["ncat"]), np.array(data["grade"])
    num = len(grade)
    has = grade != -1
    low = np.where(
        grade > 1,
        np.take_along_axis(gamma[None].repeat(num, 0), np.maximum(grade - 2, 0)[..., None], 2)[
            ..., 0
        ],
        -np.inf,
    )
    top = np.minimum(grade - 1, 3)
    high = np.take_along_axis(gamma[None].repeat(num, 0), np.maximum(top, 0)[..., None], 2)[..., 0]
    high = np.where(grade < levels, high, np.inf)
    first, last = grade == 1, grade == levels

    def log_terms(theta):
        """Log chances of grades, [N, indicators], of ages [N] one for each child."""
        up = torch.sigmoid(
            tensor(delta) * (theta.unsqueeze(-1) - tensor(np.where(first, 0.0, low)))
        )
        down = torch.sigmoid(
            tensor(delta) * (theta.unsqueeze(-1) - tensor(np.where(last, 0.0, high)))
        )
        chance = torch.where(torch.tensor(first), torch.ones_like(up), up)
        chance = chance - torch.where(torch.tensor(last), torch.zeros_like(down), down)
        return torch.where(
            torch.tensor(has), chance.clamp(min=1e-300), torch.ones_like(chance)
        ).log()

    def log_joint(u):
        rows = [log_terms(tensor(row)).sum(-1).numpy() for row in u]
        return (np.stack(rows) + stats.norm.logpdf(u, 0.0, 36.0)).sum(1)

    def exact():
        ages = np.linspace(-15.0, 40.0, 2201)
        values = np.stack([log_terms(tensor(np.full(num, age))).sum(-1).numpy() for age in ages])
        values = values + stats.norm.logpdf(ages, 0.0, 36.0)[:, None]
        return float((special.logsumexp(values, axis=0) + math.log(ages[1] - ages[0])).sum())

    return bones_model, (log_terms, num), exact, log_joint, np.full(num, 5.0)


def _two(data):
    return [data["k1"], data["k2"]], [data["n1"], data["n2"]]


# Name to the file of data and what makes the problem.
MORE = {
    "Rate_1": ("Rate_1_data", lambda d: rate([d["k"]], [d["n"]], [0])),
    "Rate_2": ("Rate_2_data", lambda d: rate(*_two(d), [0, 1])),
    "Rate_3": ("Rate_3_data", lambda d: rate(*_two(d), [0, 0])),
    "Rate_4": ("Rate_4_data", lambda d: rate([d["k"]], [d["n"]], [0], spare=1)),
    "Rate_5": ("Rate_5_data", lambda d: rate(*_two(d), [0, 0])),
    "Survey": ("Survey_data", survey),
    "M0": ("M0_data", lambda d: capture(d, "M0")),
    "Mb": ("Mb_data", lambda d: capture(d, "Mb")),
    "Mt": ("Mt_data", lambda d: capture(d, "Mt")),
    "Mh": ("Mh_data", mh),
    "GLM_Binomial": ("GLM_Binomial_data", glm_binomial),
    "GLM_Poisson": ("GLM_Poisson_Data", lambda d: poisson(d, False)),
    "GLMM_Poisson": ("GLMM_Poisson_data", lambda d: poisson(d, True)),
    "GLMM1": ("GLMM_data", glmm_sites),
    "dogs_log": ("dogs", dogs_log),
    "dogs_hierarchical": ("dogs", dogs_rates),
    "pilots": ("pilots", pilots),
    "radon_county": ("radon_mod", radon_county),
    "surgical": ("surgical_data", surgical),
    "dugongs": ("dugongs_data", dugongs),
    "bones": ("bones_data", bones),
}
