"""Whole calls, pilot included, over the usual eager scheme, in CPU time of one thread.

Run as ``python benchmarks/whole_calls.py [results.json]``. The usual scheme is annealed importance
sampling as papers publish it: L + 1 gradients and four evaluations of the densities per step by
autograd, on all chains and rows at once, one step size per row adapted in the run (so that its weights
are no longer unbiased). Ours is ``AnnealedImportance.run`` with ``guide=None``. Both take as many chains and steps;
each number is the median of rounds in turns, after one round that compiles and is not counted.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
import time
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import torch._dynamo

from pyro_anneal import AnnealedImportance
from pyro_anneal.kernels import HMC

CASES = {  # sizes of the decoder, rows, K, T, L, rounds
    "linear decoder, 100 rows": ([10, 100], 100, 16, 200, 10, 3),
    "MLP 10-512-512-784, 16 rows": ([10, 512, 512, 784], 16, 8, 60, 10, 3),
}


def decoder(sizes, rows):
    torch.manual_seed(0)
    weights = [torch.randn(n, m) / n**0.5 for n, m in itertools.pairwise(sizes)]
    binary = len(sizes) > 2

    def mean(z):
        for layer in weights[:-1]:
            z = (z @ layer).tanh()
        return z @ weights[-1]

    x = mean(torch.randn(rows, sizes[0])) + torch.randn(rows, sizes[-1])
    x = (x > 0).float() if binary else x

    def log_likelihood(z):
        if binary:
            return dist.Bernoulli(logits=mean(z), validate_args=False).log_prob(x).sum(-1)
        return dist.Normal(mean(z), 1.0, validate_args=False).log_prob(x).sum(-1)

    def model():
        with pyro.plate("data", rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(sizes[0]), 1.0).to_event(1))
            noise = dist.Bernoulli(logits=mean(z)) if binary else dist.Normal(mean(z), 1.0)
            pyro.sample("x", noise.to_event(1), obs=x)

    return model, log_likelihood


def usual(log_likelihood, rows, dim, num_chains, num_steps, num_leapfrog):
    """Annealed importance sampling as it is published; the log evidence of each row."""

    def log_prior(z):
        return -0.5 * (z.square() + math.log(2.0 * math.pi)).sum(-1)

    def gradient(z, beta):
        z = z.detach().requires_grad_()
        total = (log_prior(z) + beta * log_likelihood(z)).sum()
        return torch.autograd.grad(total, z)[0]

    def energy(z, v, beta):
        return -(log_prior(z) + beta * log_likelihood(z)) + 0.5 * v.square().sum(-1)

    betas = torch.linspace(0.0, 1.0, num_steps + 1).tolist()
    z = torch.randn(num_chains, rows, dim)
    weights = torch.zeros(num_chains, rows)
    step = torch.full((rows, 1), 0.1)
    for before, beta in itertools.pairwise(betas):
        with torch.no_grad():
            weights += (log_prior(z) + beta * log_likelihood(z)) - (
                log_prior(z) + before * log_likelihood(z)
            )
            v = torch.randn_like(z)
            start = energy(z, v, beta)
        new, velocity = z, v + 0.5 * step * gradient(z, beta)
        for leapfrog in range(num_leapfrog):
            new = new + step * velocity
            scale = 1.0 if leapfrog < num_leapfrog - 1 else 0.5
            velocity = velocity + scale * step * gradient(new, beta)
        with torch.no_grad():
            accept = torch.rand(num_chains, rows).log() < start - energy(new, velocity, beta)
            z = torch.where(accept.unsqueeze(-1), new, z)
            step = step * torch.where(accept.float().mean(0) > 0.65, 1.02, 0.98).unsqueeze(-1)
    return weights.logsumexp(0) - math.log(num_chains)


def main():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = {}
    for name, (sizes, rows, chains, steps, leapfrogs, rounds) in CASES.items():
        model, log_likelihood = decoder(sizes, rows)
        ais = AnnealedImportance(
            model, num_chains=chains, num_steps=steps, kernel=HMC(leapfrogs), seed=0,
            progress_bar=False, compile=True,
        )  # fmt: skip
        runs = []
        jobs = {
            "usual scheme": lambda f=log_likelihood, r=rows, d=sizes[0], k=chains, t=steps, n=leapfrogs: usual(
                f, r, d, k, t, n
            ),
            "ours": lambda ais=ais, runs=runs: runs.append(ais.run()),
        }  # fmt: skip
        seconds = {job: [] for job in jobs}
        for _ in range(rounds + 1):
            for job, call in jobs.items():
                began = time.process_time()
                call()
                seconds[job].append(time.process_time() - began)
        medians = {job: statistics.median(values[1:]) for job, values in seconds.items()}
        medians["ours, first call"] = seconds["ours"][0]
        run = runs[-1]
        medians["pilot, wall"], medians["chains, wall"] = run.pilot.seconds, run.seconds
        medians["mode"] = run.density_mode
        found[name] = medians
        print(name, medians, medians["usual scheme"] / medians["ours"], flush=True)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
