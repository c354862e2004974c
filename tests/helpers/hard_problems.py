"""Problems on which starts fail, with their log evidence by quadrature.

Vague priors under which the likelihood explodes, funnels of half-Cauchy and inverse-Gamma scales,
covariances that cannot be factorized, and modes that one Gaussian cannot cover. Truths come from
numpy and scipy in the model's own space; Gaussian latents are integrated in closed form, others
one at a time on a grid. Data are simulated from fixed seeds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy import integrate, special, stats

LOG_2PI = math.log(2.0 * math.pi)


@dataclass(frozen=True, eq=False)
class HardProblem:
    """A model, its data, and how to compute its log evidence."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    truth: Callable[[], float]
    multimodal: bool = False


def _tensor(values):
    return torch.as_tensor(np.asarray(values, dtype=np.float64))


def _log_integral(log_density, low, high, num=801):
    """Integrates exp(log_density) over one axis by Simpson's rule on a grid wide enough."""
    grid = np.linspace(low, high, num)
    values = np.array([log_density(x) for x in grid])
    edge = max(values[0], values[-1]) - values.max()
    assert edge < -12.0, f"the grid cuts mass off: {edge}"
    peak = values.max()
    return peak + math.log(integrate.simpson(np.exp(values - peak), x=grid))


def _log_integral_2d(log_density, first, second, num=(121, 121)):
    """Likewise over two axes; ``log_density(x, ys)`` is vectorized over the second."""
    xs, ys = np.linspace(*first, num[0]), np.linspace(*second, num[1])
    values = np.array([log_density(x, ys) for x in xs])
    border = np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])
    peak = values.max()
    assert border.max() - peak < -9.0, f"the grid cuts mass off: {border.max() - peak}"
    rows = integrate.simpson(np.exp(values - peak), x=ys, axis=1)
    return peak + math.log(integrate.simpson(rows, x=xs))


def _log_normal(y, mean, cov):
    chol = np.linalg.cholesky(cov)
    white = np.linalg.solve(chol, y - mean)
    return -0.5 * (white @ white + len(y) * LOG_2PI) - np.log(np.diag(chol)).sum()


def _half_cauchy(scale):
    return functools.partial(stats.halfcauchy.logpdf, scale=scale)


# --- Autoregression with wide priors: under a draw from the prior the likelihood is -1e5 nats.


def autoregression(y):
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(5), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    lags = torch.stack([y[5 - k : len(y) - k] for k in range(1, 6)], -1)
    with pyro.plate("times", len(y) - 5):
        pyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=y[5:])


def autoregression_data(num=200):
    noise = np.random.RandomState(0)
    y = list(noise.randn(5))
    for _ in range(num - 5):
        lags = np.array(y[-1:-6:-1])
        y.append(0.1 + lags @ [0.7, 0.4, -0.2, 0.2, -0.3] + 0.15 * noise.randn())
    return np.array(y)


def _autoregression_truth(y):
    lags = np.stack([y[5 - k : len(y) - k] for k in range(1, 6)], -1)
    design = np.concatenate([np.ones((len(lags), 1)), lags], 1)
    gram = 100.0 * design @ design.T
    scale = _half_cauchy(2.5)

    def log_density(log_sigma):
        sigma = math.exp(log_sigma)
        cov = gram + sigma**2 * np.eye(len(design))
        return _log_normal(y[5:], 0.0, cov) + scale(sigma) + log_sigma

    return _log_integral(log_density, -2.6, -1.2, 201)


# --- Half-Cauchy hierarchies: a funnel at the origin of the scale and a heavy tail.


def schools(y, sigma, centred):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        if centred:
            theta = pyro.sample("theta", dist.Normal(mu, tau))
        else:
            theta = mu + tau * pyro.sample("white", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


SCHOOLS_Y = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]  # Rubin (1981)
SCHOOLS_SIGMA = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]


def _schools_truth():
    y, sigma = np.array(SCHOOLS_Y), np.array(SCHOOLS_SIGMA)
    scale = _half_cauchy(5.0)

    def log_density(log_tau):
        cov = 25.0 + np.diag(math.exp(2.0 * log_tau) + sigma**2)
        return _log_normal(y, 0.0, cov) + scale(math.exp(log_tau)) + log_tau

    return _log_integral(log_density, -25.0, 12.0, 4001)


def groups(y, centred):
    """One scale within groups, one between them, both half-Cauchy: ``y`` is ``[groups, n]``."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
    with pyro.plate("groups", len(y)):
        if centred:
            theta = pyro.sample("theta", dist.Normal(mu, tau))
        else:
            theta = mu + tau * pyro.sample("white", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta[:, None], sigma).expand(y.shape).to_event(1), obs=y)


def groups_data():
    noise = np.random.RandomState(1)
    return 1.5 + 0.3 * noise.randn(12, 1) + 0.8 * noise.randn(12, 4)


def _compound_symmetric(y, prior_var, between, within):
    """Log density of groups with a common mean ~ N(0, prior_var), effects and noise integrated."""
    num_groups, size = y.shape
    means = y.mean(1)
    spread = ((y - means[:, None]) ** 2).sum()
    var = between + within / size  # of a group's mean
    result = -0.5 * (num_groups * (size - 1)) * (LOG_2PI + np.log(within)) - 0.5 * spread / within
    result += 0.5 * num_groups * -math.log(size)
    precision = num_groups / var + 1.0 / prior_var
    centre = means.sum() / var / precision
    result += -0.5 * num_groups * (LOG_2PI + np.log(var)) - 0.5 * (means**2).sum() / var
    return result + 0.5 * precision * centre**2 - 0.5 * np.log(precision * prior_var)


def _groups_truth():
    y, scale = groups_data(), _half_cauchy(1.0)

    def log_density(log_sigma, log_tau):
        sigma, tau = math.exp(log_sigma), np.exp(log_tau)
        value = _compound_symmetric(y, 100.0, tau**2, sigma**2)
        return value + scale(sigma) + scale(tau) + log_sigma + log_tau

    return _log_integral_2d(log_density, (-1.6, 1.2), (-16.0, 5.0), (201, 4001))


# --- Random effects with Gamma(.01, .01) precision: a draw from the prior can be 1e100 away.


def random_effects(counts, totals, centred):
    """Overdispersed binomial counts."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    precision = pyro.sample("precision", dist.Gamma(0.01, 0.01))
    with pyro.plate("units", len(counts)):
        if centred:
            effect = pyro.sample("effect", dist.Normal(mu, precision.rsqrt()))
        else:
            effect = mu + precision.rsqrt() * pyro.sample("white", dist.Normal(0.0, 1.0))
        pyro.sample("count", dist.Binomial(totals, logits=effect), obs=counts)


def random_effects_data(num=21):
    noise = np.random.RandomState(2)
    totals = noise.randint(4, 80, num)
    return noise.binomial(totals, special.expit(-0.4 + 0.6 * noise.randn(num))), totals


def _random_effects_truth():
    counts, totals = random_effects_data()
    constant = special.gammaln(totals + 1) - special.gammaln(counts + 1)
    constant = (constant - special.gammaln(totals - counts + 1)).sum()
    nodes, weights = np.polynomial.hermite_e.hermegauss(301)
    log_weights = np.log(np.clip(weights, 1e-300, None)) - 0.5 * LOG_2PI

    def log_density(mu, log_precision):
        sd = np.exp(-0.5 * log_precision)  # [P]
        effect = mu + sd[:, None] * nodes  # [P, nodes]
        total = np.zeros_like(sd)
        for count, size in zip(counts, totals, strict=True):
            log_lik = count * effect - size * np.logaddexp(0.0, effect)
            total += special.logsumexp(log_lik + log_weights, axis=1)
        prior = stats.norm.logpdf(mu, 0.0, 10.0)
        gamma = stats.gamma.logpdf(np.exp(log_precision), 0.01, scale=100.0) + log_precision
        return constant + total + prior + gamma

    return _log_integral_2d(log_density, (-4.0, 3.0), (-6.0, 15.0), (141, 421))


def gaussian_effects(y):
    """Gaussian random effects under Gamma(.01, .01) for both precisions."""
    mu = pyro.sample("mu", dist.Normal(0.0, 100.0))
    between = pyro.sample("between", dist.Gamma(0.01, 0.01))
    within = pyro.sample("within", dist.Gamma(0.01, 0.01))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, between.rsqrt()))
        likelihood = dist.Normal(theta[:, None], within.rsqrt()).expand(y.shape).to_event(1)
        pyro.sample("y", likelihood, obs=y)


def gaussian_effects_data():
    noise = np.random.RandomState(3)
    return 5.0 + 2.0 * noise.randn(10, 1) + noise.randn(10, 4)


def _gaussian_effects_truth():
    y = gaussian_effects_data()

    def log_gamma(log_precision):
        return stats.gamma.logpdf(np.exp(log_precision), 0.01, scale=100.0) + log_precision

    def log_density(within, between):
        value = _compound_symmetric(y, 1e4, np.exp(-between), math.exp(-within))
        return value + log_gamma(within) + log_gamma(between)

    return _log_integral_2d(log_density, (-3.0, 2.5), (-8.0, 14.0), (201, 2001))


# --- Gaussian process with counts: no jitter, so some covariances of the prior have no factor.


def gaussian_process(x, counts):
    rho = pyro.sample("rho", dist.Gamma(4.0, 0.5))
    scale = pyro.sample("scale", dist.HalfNormal(2.0))
    cov = scale.square() * torch.exp(-0.5 * ((x[:, None] - x) / rho).square())
    chol = torch.linalg.cholesky(cov)
    white = pyro.sample("white", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("count", dist.Poisson((chol @ white).exp()), obs=counts)


def gaussian_process_data():
    x = np.linspace(-10.0, 10.0, 11)
    return x, np.array([40, 37, 29, 12, 4, 3, 9, 19, 77, 82, 33])


def _gaussian_process_truth():
    """Quadrature over both hyperparameters, importance sampling from Laplace inside."""
    x, counts = gaussian_process_data()
    noise = stats.qmc.MultivariateNormalQMC(np.zeros(11), seed=0).random(1024)
    log_noise = -0.5 * ((noise**2).sum(1) + 11 * LOG_2PI)

    def given(log_rho, log_scale):
        scale, rho = math.exp(log_scale), math.exp(log_rho)
        cov = scale**2 * np.exp(-0.5 * ((x[:, None] - x) / rho) ** 2)
        try:
            chol = np.linalg.cholesky(cov)
        except np.linalg.LinAlgError:
            return -math.inf
        white = np.linalg.lstsq(chol, np.log(counts + 0.5), rcond=1e-6)[0]
        for _ in range(100):  # damped Newton: the likelihood is log-concave in white
            rate = np.exp(chol @ white)
            step = np.linalg.solve(
                np.eye(11) + chol.T @ (rate[:, None] * chol), chol.T @ (counts - rate) - white
            )
            white = white + step / max(1.0, np.abs(chol @ step).max())
        precision = np.eye(11) + chol.T @ (np.exp(chol @ white)[:, None] * chol)
        root = np.linalg.inv(np.linalg.cholesky(precision)).T
        draws = white + noise @ root.T
        field = draws @ chol.T
        log_joint = (counts * field - np.exp(field)).sum(1) - 0.5 * (draws**2).sum(1)
        log_joint += -0.5 * 11 * LOG_2PI - special.gammaln(counts + 1).sum()
        log_base = log_noise - np.log(np.diag(root)).sum()
        inner = special.logsumexp(log_joint - log_base) - math.log(len(noise))
        prior = stats.gamma.logpdf(rho, 4.0, scale=2.0) + log_rho
        return inner + prior + stats.halfnorm.logpdf(scale, scale=2.0) + log_scale

    def log_density(log_rho, log_scales):
        return np.array([given(log_rho, log_scale) for log_scale in log_scales])

    return _log_integral_2d(log_density, (-1.5, 2.6), (-0.6, 2.3), (83, 59))


# --- Random walk with two unknown scales.


def random_walk(y):
    innovation = pyro.sample("innovation", dist.HalfNormal(1.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    state = []
    for t in range(len(y)):
        scale = innovation if t else 1.0
        state.append(pyro.sample(f"x{t}", dist.Normal(state[-1] if t else 0.0, scale)))
    with pyro.plate("times", len(y)):
        pyro.sample("y", dist.Normal(torch.stack(state), noise), obs=y)


def random_walk_data():
    noise = np.random.RandomState(4)
    return np.cumsum(0.3 * noise.randn(30)) + 0.5 * noise.randn(30)


def _random_walk_truth():
    y = random_walk_data()
    steps = np.minimum.outer(np.arange(30), np.arange(30)).astype(float)

    def given(log_innovation, log_noise):
        innovation, noise = math.exp(log_innovation), math.exp(log_noise)
        cov = 1.0 + innovation**2 * steps + noise**2 * np.eye(30)
        prior = stats.halfnorm.logpdf(innovation) + stats.halfnorm.logpdf(noise)
        return _log_normal(y, 0.0, cov) + prior + log_innovation + log_noise

    def log_density(log_innovation, log_noise):
        return np.array([given(log_innovation, value) for value in log_noise])

    return _log_integral_2d(log_density, (-14.0, 1.5), (-7.0, 0.8), (401, 151))


# --- Modes that one Gaussian cannot cover.


def two_means(y):
    """A symmetric mixture: swapping both means leaves the likelihood as it is."""
    with pyro.plate("components", 2):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        label = pyro.sample(
            "label", dist.Categorical(torch.tensor([0.5, 0.5])), infer={"enumerate": "parallel"}
        )
        pyro.sample("y", dist.Normal(mu[label], 0.5), obs=y)


def two_means_data():
    noise = np.random.RandomState(5)
    return np.where(noise.rand(100) < 0.5, -1.5, 1.5) + 0.5 * noise.randn(100)


def _two_means_truth():
    y = two_means_data()

    def log_density(first, second):
        near = stats.norm.logpdf(y, first, 0.5)[:, None]
        far = stats.norm.logpdf(y[:, None], second, 0.5)
        value = (np.logaddexp(near, far) - math.log(2.0)).sum(0)
        return value + stats.norm.logpdf(first, 0.0, 2.0) + stats.norm.logpdf(second, 0.0, 2.0)

    return _log_integral_2d(log_density, (-2.5, 2.5), (-2.5, 2.5), (501, 501))


def many_well(pairs):
    """Pairs of a double well, against a wide Gaussian that a factor takes out again."""
    x = pyro.sample("x", dist.Normal(torch.zeros(pairs, 2), 1.5).to_event(2))
    base = dist.Normal(0.0, 1.5).log_prob(x).sum()
    first, second = x[:, 0], x[:, 1]
    well = -(first**4) + 6.0 * first**2 + 0.5 * first - 0.5 * second**2
    pyro.factor("well", well.sum() - base)


def _many_well_truth(pairs):
    well = lambda x: math.exp(-(x**4) + 6.0 * x**2 + 0.5 * x)
    one = integrate.quad(well, -5.0, 5.0, points=[-1.7, 1.7])[0]
    return pairs * (math.log(one) + 0.5 * LOG_2PI)


def _schools_problem(centred):
    args = (_tensor(SCHOOLS_Y), _tensor(SCHOOLS_SIGMA), centred)
    return HardProblem(schools, args, _schools_truth)


def _groups_problem(centred):
    return HardProblem(groups, (_tensor(groups_data()), centred), _groups_truth)


def _effects_problem(centred):
    counts, totals = (_tensor(values) for values in random_effects_data())
    return HardProblem(random_effects, (counts, totals, centred), _random_effects_truth)


def _autoregression_problem():
    y = autoregression_data()
    truth = functools.partial(_autoregression_truth, y)
    return HardProblem(autoregression, (_tensor(y),), truth)


def _gaussian_process_problem():
    x, counts = (_tensor(values) for values in gaussian_process_data())
    return HardProblem(gaussian_process, (x, counts), _gaussian_process_truth)


def _many_well_problem(pairs):
    truth = functools.partial(_many_well_truth, pairs)
    return HardProblem(many_well, (pairs,), truth, multimodal=True)


HARD_PROBLEMS: dict[str, Callable[[], HardProblem]] = {
    "AR(5), N(0,10)": _autoregression_problem,
    "schools, half-Cauchy, centred": lambda: _schools_problem(True),
    "schools, half-Cauchy, non-centred": lambda: _schools_problem(False),
    "groups, two half-Cauchy, centred": lambda: _groups_problem(True),
    "groups, two half-Cauchy, non-centred": lambda: _groups_problem(False),
    "effects, Gamma(.01,.01), centred": lambda: _effects_problem(True),
    "effects, Gamma(.01,.01), non-centred": lambda: _effects_problem(False),
    "effects, two Gamma(.01,.01)": lambda: HardProblem(
        gaussian_effects, (_tensor(gaussian_effects_data()),), _gaussian_effects_truth
    ),
    "Gaussian process, no jitter": _gaussian_process_problem,
    "random walk, two scales": lambda: HardProblem(
        random_walk, (_tensor(random_walk_data()),), _random_walk_truth
    ),
    "two means, symmetric": lambda: HardProblem(
        two_means, (_tensor(two_means_data()),), _two_means_truth, multimodal=True
    ),
    "many-well, 4 modes": lambda: _many_well_problem(2),
    "many-well, 2^16 modes": lambda: _many_well_problem(16),
}
