"""Seconds until common kinds of models are recorded as a graph of all chains, and how they then run.

Run as ``python benchmarks/common_models.py [--only NAME]``; CPU seconds of one thread, from the call to
the first densities of 16 chains, and of 100 evaluations after that.
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.reparam import LatentStableReparam, StableReparam, SymmetricStableReparam

from pyro_anneal.problems.problem import prepare

RESULTS = Path(__file__).resolve().parent / "results" / "common_models.json"


def multinomial():
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones(4)))
    with pyro.plate("rows", 5):
        pyro.sample("y", dist.Multinomial(10, shares), obs=torch.tensor([1.0, 2.0, 3.0, 4.0]))


def stable():
    alpha = pyro.sample("alpha", dist.Uniform(1.1, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", 10):
        pyro.sample("y", dist.Stable(alpha, 0.3, scale, 0.0), obs=torch.linspace(-2.0, 2.0, 10))


def latent_stable():
    with pyro.plate("rows", 10):
        z = pyro.sample("z", dist.Stable(1.7, 0.3, 1.0, 0.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=torch.linspace(-2.0, 2.0, 10))


def symmetric_stable():
    with pyro.plate("rows", 10):
        z = pyro.sample("z", dist.Stable(1.7, 0.0, 1.0, 0.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=torch.linspace(-2.0, 2.0, 10))


def branch():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    loc = 2.0 * z if z > 0.0 else -z
    pyro.sample("y", dist.Normal(loc, 0.5), obs=torch.tensor(1.0))


def state_space():
    z = torch.zeros(())
    for step in pyro.markov(range(100)):
        z = pyro.sample(f"z{step}", dist.Normal(0.9 * z, 0.5))
        pyro.sample(f"y{step}", dist.Normal(z, 1.0), obs=torch.tensor(0.1))


def hidden_markov():
    probs = pyro.sample("probs", dist.Dirichlet(torch.ones(3, 3)).to_event(1))
    locs = pyro.sample("locs", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    z = torch.tensor(0)
    for step in pyro.markov(range(100)):
        z = pyro.sample(f"z{step}", dist.Categorical(probs[z]), infer={"enumerate": "parallel"})
        pyro.sample(f"y{step}", dist.Normal(locs[z], 1.0), obs=torch.tensor(0.1))


def scalars():
    values = [pyro.sample(f"z{k}", dist.Normal(0.0, 1.0)) for k in range(100)]
    pyro.sample("y", dist.Normal(torch.stack(values).sum(), 1.0), obs=torch.tensor(3.0))


def reparametrized(model, name, how):
    return pyro.poutine.reparam(model, {name: how})


CASES = {
    "Multinomial": multinomial,
    "Stable, its own log density": stable,
    "Stable observed, StableReparam": reparametrized(stable, "y", StableReparam()),
    "Stable latent, LatentStableReparam": reparametrized(
        latent_stable, "z", LatentStableReparam()
    ),
    "Stable latent, SymmetricStableReparam": reparametrized(
        symmetric_stable, "z", SymmetricStableReparam()
    ),
    "if on a latent": branch,
    "state space, 100 steps": state_space,
    "hidden Markov, 100 steps, enumerated": hidden_markov,
    "100 scalar sites": scalars,
}


def measure(model):
    began = time.process_time()
    found = prepare(
        model, None, ((), {}), ((), {}), num_chains=16, batch_plates="auto", compile=False, seed=0
    )
    position = found.draw(16)
    found.density(position)
    recorded = time.process_time() - began
    began = time.process_time()
    for _ in range(100):
        found.density(position)
    return {
        "mode": found.density.mode,
        "why": found.density.reason,
        "seconds_to_first": round(recorded, 2),
        "milliseconds_per_evaluation": round(10.0 * (time.process_time() - began), 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, model in CASES.items():
        if options.only not in name:
            continue
        pyro.set_rng_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kept[name] = measure(model)
        print(name, kept[name], flush=True)
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
