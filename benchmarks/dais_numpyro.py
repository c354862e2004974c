"""NumPyro's AutoDAIS on the targets of ``dais.py``; run by an interpreter that has NumPyro.

Usage: ``python dais_numpyro.py IN.npz OUT.json``, with settings in IN.npz. Bounds are averages of
single-sample log-weights, as ``Trace_ELBO`` gives them.
"""

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDAIS
from numpyro.infer.initialization import init_to_value

jax.config.update("jax_enable_x64", True)


def schools(y, sigma):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    log_tau = numpyro.sample("log_tau", dist.Normal(0.0, 1.0))
    with numpyro.plate("schools", len(y)):
        eta = numpyro.sample("eta", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu + jnp.exp(log_tau) * eta, sigma), obs=y)


def logistic(design, y):
    w = numpyro.sample("w", dist.Normal(jnp.zeros(design.shape[1]), 1.0).to_event(1))
    numpyro.sample("y", dist.Bernoulli(logits=design @ w).to_event(1), obs=y)


def walk(y):
    scale = numpyro.sample("log_scale", dist.Normal(-1.0, 1.0))
    z = numpyro.sample("z", dist.Normal(jnp.zeros(len(y)), 1.0).to_event(1))
    path = jnp.cumsum(z) * jnp.exp(scale)
    numpyro.sample("y", dist.Normal(path, 0.3).to_event(1), obs=y)


def seeds(germinated, total, design):
    b = numpyro.sample("b", dist.Normal(jnp.zeros(4), 10.0).to_event(1))
    log_sigma = numpyro.sample("log_sigma", dist.Normal(-1.0, 1.0))
    with numpyro.plate("plates", len(total)):
        effect = numpyro.sample("effect", dist.Normal(0.0, 1.0))
        logits = design @ b + jnp.exp(log_sigma) * effect
        numpyro.sample("y", dist.Binomial(total.astype(int), logits=logits), obs=germinated)


MODELS = {"schools": schools, "logistic": logistic, "walk": walk, "seeds": seeds}


def main(inputs, output):
    settings = np.load(inputs)
    args = [jnp.asarray(settings[f"arg{i}"]) for i in range(int(settings["num_args"]))]
    model = MODELS[str(settings["target"])]
    steps, rate, count = int(settings["steps"]), float(settings["rate"]), int(settings["count"])
    results = []
    for seed in settings["seeds"].tolist():
        start = {k[5:]: jnp.asarray(settings[k]) for k in settings.files if k.startswith("start")}
        guide = AutoDAIS(
            model,
            K=int(settings["gradients"]),
            eta_init=float(settings["step_size"]),
            eta_max=float(settings["step_size_max"]),
            init_loc_fn=init_to_value(values=start),
            init_scale=float(settings["init_scale"]),
        )
        rates = numpyro.optim.Adam(lambda step: rate * 0.1 ** (step / steps))
        svi = SVI(model, guide, rates, Trace_ELBO())
        state = svi.init(jax.random.PRNGKey(seed), *args)
        update = jax.jit(lambda state, svi=svi: svi.update(state, *args))
        state, _ = update(state)
        began = time.process_time()
        for _ in range(steps - 1):
            state, _ = update(state)
        jax.block_until_ready(state)
        seconds = time.process_time() - began
        params = svi.get_params(state)
        keys = jax.random.split(jax.random.PRNGKey(1000 + seed), count)

        def weigh(key, params=params, guide=guide):
            return -Trace_ELBO().loss(key, params, model, guide, *args)

        values = np.asarray(jax.lax.map(weigh, keys))
        row = {"seed": seed, "bound": float(values.mean()), "se": float(values.std() / count**0.5)}
        results.append(row | {"ms per step": 1e3 * seconds / steps})
    versions = {"numpyro": numpyro.__version__, "jax": jax.__version__}
    with open(output, "w") as file:
        json.dump({"rows": results, "versions": versions}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
