"""Evidence by PyMC, BlackJAX and dynesty; run by ``races.py`` with an interpreter that has them.

Usage: ``python race_peers.py METHOD KIND DATA.npz OUT.json SEEDS``. Every seed is timed whole, in
CPU seconds; imports are not counted, compilation is, though a library may keep some for the next.
"""

import json
import resource
import sys
from importlib.metadata import version

import numpy as np


def pymc_model(kind, data):
    import pymc as pm

    with pm.Model() as model:
        if kind == "logistic":
            design, y, scale = data["arg0"], data["arg1"], float(data["arg2"])
            w = pm.Normal("w", 0.0, scale, shape=design.shape[1])
            pm.Bernoulli("y", logit_p=pm.math.dot(design, w), observed=y)
        elif kind == "schools":
            mu = pm.Normal("mu", 0.0, 10.0)
            log_tau = pm.Normal("log_tau", 5.0, 1.0)
            theta = pm.Normal("theta", mu, pm.math.exp(log_tau), shape=8)
            pm.Normal("y", theta, data["arg1"], observed=data["arg0"])
        else:
            y = data["arg0"]
            lags = np.stack([y[5 - k : len(y) - k] for k in range(1, 6)], -1)
            alpha = pm.Normal("alpha", 0.0, 10.0)
            beta = pm.Normal("beta", 0.0, 10.0, shape=5)
            sigma = pm.HalfCauchy("sigma", 2.5)
            pm.Normal("y", alpha + pm.math.dot(lags, beta), sigma, observed=y[5:])
    return model


def pymc(kind, data, seed):
    import logging

    import pymc as pm

    logging.getLogger("pymc").setLevel(logging.ERROR)
    with pymc_model(kind, data):
        trace = pm.sample_smc(
            draws=2000,
            chains=2,
            cores=1,
            random_seed=seed,
            progressbar=False,
            return_inferencedata=False,
        )
    values = [float(np.asarray(v, dtype=object).ravel()[-1][-1]) if np.ndim(v) == 0 or
              isinstance(np.asarray(v, dtype=object).ravel()[-1], (list, np.ndarray))
              else float(np.asarray(v).ravel()[-1])
              for v in np.atleast_1d(trace.report.log_marginal_likelihood)]  # fmt: skip
    return float(np.mean(values))


def jax_densities(kind, data):
    """Log prior and log likelihood of one flat unconstrained vector, and a draw of the prior."""
    import jax
    import jax.numpy as jnp
    from jax.scipy import stats

    if kind == "logistic":
        design, y, scale = jnp.array(data["arg0"]), jnp.array(data["arg1"]), float(data["arg2"])
        dim = design.shape[1]
        prior = lambda u: stats.norm.logpdf(u, 0.0, scale).sum()

        def likelihood(u):
            logits = design @ u
            return (y * logits - jnp.logaddexp(0.0, logits)).sum()

        draw = lambda key, n: scale * jax.random.normal(key, (n, dim))
    elif kind == "schools":
        y, sigma = jnp.array(data["arg0"]), jnp.array(data["arg1"])

        def prior(u):
            own = stats.norm.logpdf(u[0], 0.0, 10.0) + stats.norm.logpdf(u[1], 5.0, 1.0)
            return own + stats.norm.logpdf(u[2:], u[0], jnp.exp(u[1])).sum()

        likelihood = lambda u: stats.norm.logpdf(y, u[2:], sigma).sum()

        def draw(key, n):
            z = jax.random.normal(key, (n, 10))
            mu, log_tau = 10.0 * z[:, :1], 5.0 + z[:, 1:2]
            return jnp.concatenate([mu, log_tau, mu + jnp.exp(log_tau) * z[:, 2:]], 1)
    else:
        y = data["arg0"]
        lags = jnp.array(np.stack([y[5 - k : len(y) - k] for k in range(1, 6)], -1))
        target = jnp.array(y[5:])

        def prior(u):
            scale = jnp.exp(u[6])
            cauchy = jnp.log(2.0 / jnp.pi / 2.5) - jnp.log1p((scale / 2.5) ** 2) + u[6]
            return stats.norm.logpdf(u[:6], 0.0, 10.0).sum() + cauchy

        likelihood = lambda u: stats.norm.logpdf(target, u[0] + lags @ u[1:6], jnp.exp(u[6])).sum()

        def draw(key, n):
            first, second = jax.random.split(key)
            tau = 2.5 * jnp.abs(jax.random.cauchy(second, (n, 1)))
            return jnp.concatenate([10.0 * jax.random.normal(first, (n, 6)), jnp.log(tau)], 1)

    return prior, likelihood, draw


def blackjax(kind, data, seed):
    """Adaptive tempered SMC of 1000 particles, 10 moves of HMC, mass and step from particles."""
    import blackjax
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    prior, likelihood, draw = jax_densities(kind, data)
    key = jax.random.PRNGKey(seed)
    key, start = jax.random.split(key)
    particles = draw(start, 1000)

    def step(key, state, inverse_mass):
        dim = inverse_mass.shape[0]
        parameters = {
            "step_size": jnp.array([0.5 * dim**-0.25]),
            "inverse_mass_matrix": inverse_mass[None],
            "num_integration_steps": jnp.array([5]),
        }
        kernel = blackjax.adaptive_tempered_smc(
            prior,
            likelihood,
            blackjax.hmc.build_kernel(),
            blackjax.hmc.init,
            parameters,
            blackjax.smc.resampling.systematic,
            target_ess=0.7,
            num_mcmc_steps=10,
        )
        return kernel.step(key, state)

    step = jax.jit(step)
    state = blackjax.smc.tempered.init(particles)
    log_evidence, stages = 0.0, 0
    lmbda = lambda s: float(getattr(s, "tempering_param", getattr(s, "lmbda", None)))
    while lmbda(state) < 1.0 and stages < 500:
        key, now = jax.random.split(key)
        variance = jnp.var(state.particles, 0)
        state, info = step(now, state, variance)
        log_evidence += float(info.log_likelihood_increment)
        stages += 1
    return log_evidence


def dynesty(kind, data, seed):
    import dynesty
    from scipy import special, stats

    if kind == "logistic":
        design, y, scale = data["arg0"], data["arg1"], float(data["arg2"])
        dim = design.shape[1]
        transform = lambda v: scale * special.ndtri(v)
        likelihood = lambda u: float((y * (design @ u) - np.logaddexp(0.0, design @ u)).sum())
    elif kind == "schools":
        y, sigma = data["arg0"], data["arg1"]
        dim = 10

        def transform(v):
            z = special.ndtri(v)
            mu, log_tau = 10.0 * z[0], 5.0 + z[1]
            return np.concatenate([[mu, log_tau], mu + np.exp(log_tau) * z[2:]])

        likelihood = lambda u: float(stats.norm.logpdf(y, u[2:], sigma).sum())
    else:
        y = data["arg0"]
        lags = np.stack([y[5 - k : len(y) - k] for k in range(1, 6)], -1)
        dim = 7

        def transform(v):
            return np.append(10.0 * special.ndtri(v[:6]), 2.5 * np.tan(0.5 * np.pi * v[6]))

        def likelihood(u):
            error = (y[5:] - u[0] - lags @ u[1:6]) / u[6]
            return float(-0.5 * (error @ error) - len(error) * (np.log(u[6]) + 0.9189385332046727))

    sampler = dynesty.NestedSampler(
        likelihood, transform, dim, nlive=500, rstate=np.random.default_rng(seed)
    )
    sampler.run_nested(print_progress=False, dlogz=0.1)
    return float(sampler.results.logz[-1])


def processor_seconds():
    """Counts those of this process and of compilers that it called."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(part for kind in kinds for part in resource.getrusage(kind)[:2])


def main():
    method, kind, data, out, seeds = sys.argv[1:]
    data = dict(np.load(data))
    runs = []
    for seed in range(int(seeds)):
        began = processor_seconds()
        log_evidence = {"pymc": pymc, "blackjax": blackjax, "dynesty": dynesty}[method](
            kind, data, seed
        )
        seconds = processor_seconds() - began
        runs.append({"log_evidence": log_evidence, "seconds": seconds, "version": version(method)})
        with open(out, "w") as file:
            json.dump({"runs": runs}, file)


if __name__ == "__main__":
    main()
