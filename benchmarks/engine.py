"""What the compiled loop saves AIWAE and mi.AIS on small models: CPU time of one thread, in turns.

Run ``python benchmarks/engine.py [results.json]``. Compilation happens before and is not counted.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import pyro
import pyro.distributions as dist
import torch

from pyro_anneal import mi
from pyro_anneal.losses import AIWAE


def in_turns(jobs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Measures the median CPU time of each job in seconds, one after another in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        job()
        job()
    for _ in range(rounds):
        for name, job in jobs.items():
            began = time.process_time()
            job()
            seconds[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def aiwae_steps(num_steps: int, rounds: int) -> dict[str, float]:
    """A gradient step on 20 rows of a linear decoder from 2 latents to 5 pixels, K = 10, L = 5."""
    decoder, encoder = torch.nn.Linear(2, 5), torch.nn.Linear(5, 4)

    def model(x: torch.Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("rows", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def job(compile: bool) -> Callable[[], object]:
        loss = AIWAE(
            10, num_steps, 5, vectorize_particles=True, max_plate_nesting=1, compile=compile
        )
        return lambda: loss.loss_and_grads(model, guide, torch.rand(20, 5).round())

    return in_turns({"steps": job(False), "compiled": job(True)}, rounds)


def ais_estimates(num_steps: int, rounds: int) -> dict[str, float]:
    """Bounds on 8 pairs of a Gaussian joint, K = 8; the pilot is part of each estimate."""
    model = mi.DistributionJoint(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 0.5))
    x, z = model.sample(8)

    def job(compile: bool, **options: float) -> Callable[[], object]:
        bound = mi.AIS(model, num_chains=8, num_steps=num_steps, compile=compile, **options)
        return lambda: bound.estimate(x, z)

    jobs = {"steps": job(False), "compiled": job(True)}
    fixed = {"step_size": 0.5, "schedule": torch.linspace(0.0, 1.0, num_steps + 1)}
    jobs |= {"steps, no pilot": job(False, **fixed), "compiled, no pilot": job(True, **fixed)}
    return in_turns(jobs, rounds)


def main() -> None:
    """Prints the figures, and writes them to a file if one is named."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = {f"AIWAE, {count} steps": aiwae_steps(count, 15) for count in (4, 50)}
    found |= {f"mi.AIS, {count} steps": ais_estimates(count, 3) for count in (1000,)}
    for name, seconds in found.items():
        print(name, {job: f"{1e3 * value:.1f} ms" for job, value in seconds.items()}, flush=True)
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w") as file:
            json.dump(
                {"unit": "seconds of CPU time, median", "torch": torch.__version__} | found,
                file,
                indent=1,
            )


if __name__ == "__main__":
    main()
