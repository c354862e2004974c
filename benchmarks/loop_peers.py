"""The peers' half of ``benchmarks/loop.py``: NumPyro's potentials in ``lax.scan``, and TFP.

Runs in an environment with jax and numpyro (and tensorflow_probability, if there). Reads names of
cases from standard input, runs each once, and prints its seconds.
"""

import functools
import os
import sys
import time

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer.util import initialize_model

SCHOOLS_Y = jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])  # Rubin (1981)
SCHOOLS_SIGMA = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(observed):
    mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
    log_tau = numpyro.sample("log_tau", dist.Normal(5.0, 1.0))
    with numpyro.plate("schools", 8):
        theta = numpyro.sample("theta", dist.Normal(mu, jnp.exp(log_tau)))
        if observed:
            numpyro.sample("y", dist.Normal(theta, SCHOOLS_SIGMA), obs=SCHOOLS_Y)


def decoder_model(sizes, rows):
    keys = jax.random.split(jax.random.PRNGKey(0), len(sizes))
    weights = [
        jax.random.normal(key, (n, m)) / n**0.5
        for key, n, m in zip(keys, sizes[:-1], sizes[1:], strict=False)
    ]
    x = jax.random.normal(keys[-1], (rows, sizes[-1]))
    binary = len(sizes) > 2

    def model(observed):
        with numpyro.plate("data", rows):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(sizes[0]), 1.0).to_event(1))
            if not observed:
                return
            for layer in weights[:-1]:
                z = jnp.tanh(z @ layer)
            mean = z @ weights[-1]
            if binary:
                likelihood = dist.Bernoulli(logits=mean).to_event(1)
                numpyro.sample("x", likelihood, obs=(x > 0).astype(jnp.float32))
            else:
                numpyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    return model


MODELS = {
    "schools": schools,
    "linear": decoder_model([10, 100], 1600),
    "mlp": decoder_model([10, 1024, 1024, 1024, 784], 64),
}


@functools.cache
def potentials(name):
    joint = initialize_model(jax.random.PRNGKey(0), MODELS[name], model_args=(True,))
    prior = initialize_model(jax.random.PRNGKey(0), MODELS[name], model_args=(False,))
    return joint.potential_fn, prior.potential_fn, joint.param_info.z


def leapfrogs(name, num_chains, num_leapfrog, num_steps):
    """Leapfrogs alone on the joint potential."""
    joint, _, z = potentials(name)
    gradient = jax.vmap(jax.value_and_grad(joint))
    position = jax.tree.map(lambda v: jnp.full((num_chains, *v.shape), 0.1), z)

    def step(carry, momentum):
        position, _, grad = carry
        for _ in range(num_leapfrog):
            momentum = jax.tree.map(lambda p, g: p - 0.025 * g, momentum, grad)
            position = jax.tree.map(lambda u, p: u + 0.05 * p, position, momentum)
            value, grad = gradient(position)
            momentum = jax.tree.map(lambda p, g: p - 0.025 * g, momentum, grad)
        return (position, value, grad), value.mean()

    noise = _normals(position, num_steps)
    run = jax.jit(lambda carry, noise: jax.lax.scan(step, carry, noise))
    start = (position, *gradient(position))
    return lambda: jax.block_until_ready(run(start, noise))


def annealed(name, num_chains, num_leapfrog, num_steps):
    """Steps of annealed importance sampling that cache both potentials and both gradients."""
    joint, prior, z = potentials(name)

    def both(position):
        return jax.vmap(jax.value_and_grad(prior))(position), jax.vmap(jax.value_and_grad(joint))(
            position
        )

    def mixed(beta, values):
        return jax.tree.map(lambda a, b: a + beta * (b - a), values[0], values[1])

    def square(momentum):
        leaves = [jnp.sum(p * p, axis=tuple(range(1, p.ndim))) for p in jax.tree.leaves(momentum)]
        return sum(leaves)

    def step(carry, inputs):
        state, log_weights = carry
        beta, momentum, uniform = inputs
        position, values = state
        start = momentum
        new, new_values = position, values
        for _ in range(num_leapfrog):
            grad = mixed(beta, new_values)[1]
            momentum = jax.tree.map(lambda p, g: p - 0.025 * g, momentum, grad)
            new = jax.tree.map(lambda u, p: u + 0.05 * p, new, momentum)
            new_values = both(new)
            grad = mixed(beta, new_values)[1]
            momentum = jax.tree.map(lambda p, g: p - 0.025 * g, momentum, grad)
        change = mixed(beta, new_values)[0] - mixed(beta, values)[0]
        log_accept = 0.5 * (square(start) - square(momentum)) - change
        take = jnp.log1p(-uniform) < log_accept

        def choose(a, b):
            return jnp.where(take.reshape(-1, *(1 for _ in a.shape[1:])), a, b)

        state = jax.tree.map(choose, (new, new_values), (position, values))
        ratio = state[1][0][0] - state[1][1][0]
        seen = ratio.mean(), ratio.var(), jnp.minimum(jnp.exp(log_accept), 1.0).mean()
        return (state, log_weights + 0.001 * ratio), seen

    position = jax.tree.map(lambda v: jnp.full((num_chains, *v.shape), 0.1), z)
    noise = (
        jnp.linspace(0.0, 1.0, num_steps),
        _normals(position, num_steps),
        jax.random.uniform(jax.random.PRNGKey(2), (num_steps, num_chains)),
    )
    run = jax.jit(lambda carry, noise: jax.lax.scan(step, carry, noise))
    start = ((position, both(position)), jnp.zeros(num_chains))
    return lambda: jax.block_until_ready(run(start, noise))


def tfp(name, num_chains, num_leapfrog, num_steps):
    """TFP's own annealed importance sampling, its random numbers included."""
    import tensorflow_probability.substrates.jax as tfp

    joint, prior, z = potentials(name)
    names = list(z)
    start = [jnp.full((num_chains, *z[n].shape), 0.1) for n in names]

    def log_prob(potential):
        return lambda *parts: -jax.vmap(potential)(dict(zip(names, parts, strict=True)))

    @jax.jit
    def run(key):
        return tfp.mcmc.sample_annealed_importance_chain(
            num_steps=num_steps,
            proposal_log_prob_fn=log_prob(prior),
            target_log_prob_fn=log_prob(joint),
            current_state=start,
            make_kernel_fn=lambda target: tfp.mcmc.HamiltonianMonteCarlo(
                target_log_prob_fn=target, step_size=0.05, num_leapfrog_steps=num_leapfrog
            ),
            seed=key,
        )[1]

    return lambda: jax.block_until_ready(run(jax.random.PRNGKey(0)))


def gradient(name, num_chains, num_leapfrog, num_steps):
    """One value and gradient of the joint, as often as the leapfrogs of a run."""
    joint, _, z = potentials(name)
    evaluate = jax.jit(jax.vmap(jax.value_and_grad(joint)))
    position = jax.tree.map(lambda v: jnp.full((num_chains, *v.shape), 0.1), z)

    def run():
        for _ in range(num_leapfrog * num_steps):
            jax.block_until_ready(evaluate(position))

    return run


def _normals(position, num_steps):
    key = jax.random.PRNGKey(1)
    return jax.tree.map(lambda v: jax.random.normal(key, (num_steps, *v.shape)), position)


METHODS = {"leapfrogs": leapfrogs, "annealed": annealed, "tfp": tfp, "gradient": gradient}


@functools.cache
def prepared(method, name, *sizes):
    run = METHODS[method](name, *sizes)
    run()
    return run


def main():
    for line in sys.stdin:
        method, name, *sizes = line.split()
        try:
            run = prepared(method, name, *map(int, sizes))
            start = time.perf_counter()
            run()
            print(time.perf_counter() - start, flush=True)
        except Exception as error:  # noqa: BLE001 - a peer that does not run is part of the table
            first = (str(error).splitlines() or [""])[0]
            print(f"failed: {type(error).__name__}: {first}", flush=True)


if __name__ == "__main__":
    main()
