"""Times one evaluation of value and gradient: through Pyro, as a graph, compiled.

Run as ``python benchmarks/capture.py [--seconds 1.0]``. All columns are measured in one process,
on one thread, alternately; ratios are to the plain Pyro trace with autograd, vectorized over rows
by hand where the model allows it.
"""

import argparse
import contextlib
import statistics
import time

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from torch.distributions import biject_to, constraints

from pyro_anneal.graphs.captured import capture

SCHOOLS_Y = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]  # Rubin (1981)
SCHOOLS_SIGMA = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]


def eight_schools(num_chains):
    y, sigma = torch.tensor(SCHOOLS_Y), torch.tensor(SCHOOLS_SIGMA)

    def model(chains):
        with chains:
            mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
            log_tau = pyro.sample("log_tau", dist.Normal(5.0, 1.0))
            with pyro.plate("schools", 8, dim=-1):
                theta = pyro.sample("theta", dist.Normal(mu, log_tau.exp()))
                pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    def one(u):
        data = {"mu": u[0], "log_tau": u[1], "theta": u[2:]}
        trace = poutine.trace(poutine.condition(model, data=data)).get_trace(
            contextlib.nullcontext()
        )
        trace.compute_log_prob()
        prior = sum(trace.nodes[name]["log_prob"].sum() for name in data)
        return prior, prior + trace.nodes["y"]["log_prob"].sum()

    def plain(u):
        data = {"mu": u[:, :1], "log_tau": u[:, 1:2], "theta": u[:, 2:]}
        chains = pyro.plate("chains", num_chains, dim=-2)
        trace = poutine.trace(poutine.condition(model, data=data)).get_trace(chains)
        trace.compute_log_prob()
        prior = sum(trace.nodes[name]["log_prob"].sum() for name in data)
        return prior, prior + trace.nodes["y"]["log_prob"].sum()

    return one, plain, torch.zeros(10)


def enumerated_mixture(num_chains):
    x = torch.cat([torch.randn(40) - 2, torch.randn(60) + 1])

    @config_enumerate
    def model():
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("clusters", 2):
            loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            label = pyro.sample("label", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(loc[label], 1.0), obs=x)

    to_simplex = biject_to(constraints.simplex)

    def one(u):
        weights = to_simplex(u[:1])
        log_det = to_simplex.log_abs_det_jacobian(u[:1], weights)
        values = {"weights": weights, "loc": u[1:]}
        enumerated = poutine.enum(poutine.condition(model, data=values), first_available_dim=-2)
        trace = poutine.trace(enumerated).get_trace()
        log_target = TraceEinsumEvaluator(trace, True, 1).log_prob(trace) + log_det
        return -0.5 * u.square().sum(), log_target

    def plain(u):  # no chain dimension: enumeration owns the dimensions left of the plates
        pairs = [one(chain) for chain in u]
        return sum(base for base, _ in pairs), sum(target for _, target in pairs)

    return one, plain, torch.zeros(3)


def linear_vae(num_rows):
    decoder, x = torch.nn.Linear(10, 100), torch.randn(num_rows, 100)

    def model():
        with pyro.plate("data", num_rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(10), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def one(u):
        trace = poutine.trace(poutine.condition(model, data={"z": u})).get_trace()
        trace.compute_log_prob()
        prior = trace.nodes["z"]["log_prob"]
        return prior, prior + trace.nodes["x"]["log_prob"]

    def plain(u):
        base, target = one(u[0])
        return base.sum(), target.sum()

    return one, plain, torch.zeros(num_rows, 10)


def with_gradients(function):
    """Evaluates both log densities and both gradients through autograd."""

    def evaluate(u):
        u = u.detach().requires_grad_()
        base, target = function(u)
        (grad_base,) = torch.autograd.grad(base, u, retain_graph=True)
        (grad_target,) = torch.autograd.grad(target, u)
        return base, target, grad_base, grad_target

    return evaluate


def alternate(functions, u, seconds):
    """Takes the median time of each function over rounds that visit all of them."""
    times = [[] for _ in functions]
    for function in functions:
        function(u)
    end = time.perf_counter() + seconds * len(functions)
    while time.perf_counter() < end:
        for record, function in zip(times, functions, strict=True):
            calls = 1 if not record or record[0] > 1e-3 else 20
            start = time.perf_counter()
            for _ in range(calls):
                function(u)
            record.append((time.perf_counter() - start) / calls)
    return [statistics.median(record) for record in times]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="time per column")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    problems = [
        ("eight schools, 64 chains", eight_schools, 64, 64),
        ("enumerated mixture, 16 chains", enumerated_mixture, 16, 16),
        ("linear VAE 10->100, 1600 rows", linear_vae, 1600, 1),
    ]
    print("| model (float32) | Pyro trace + autograd | graph | compiled | graph | compiled |")
    print("|---|---|---|---|---|---|")
    for name, make, size, num_chains in problems:
        one, plain, example = make(size)
        with pyro.validation_enabled(False):
            graph = capture(one, example, num_chains=num_chains)
            compiled = capture(one, example, num_chains=num_chains, compile=True)
            u = 0.5 * torch.randn(num_chains, *example.shape)
            state = graph(u)
            sums = plain(u)
            torch.testing.assert_close(
                state.log_target.sum(), sums[1].detach(), rtol=1e-4, atol=0.1
            )
            traced, *fast = alternate([with_gradients(plain), graph, compiled], u, seconds)
        micro = [f"{1e6 * t:.0f} us" for t in (traced, *fast)]
        ratios = [f"1/{traced / t:.1f}" for t in fast]
        note = "" if compiled.mode == "compiled" else f" ({compiled.reason})"
        print(f"| {name}{note} | {' | '.join(micro + ratios)} |")


if __name__ == "__main__":
    main()
