"""What repeated calls, simulations and batches cost, and how often the model runs.

Run as ``python benchmarks/kept.py [--as after] [--only NAME]`` on one thread. Each case runs in a
process of its own: seconds of CPU (of that one thread) beside seconds of wall time, and calls of the
model. With ``--as before`` and another checkout of the package on ``PYTHONPATH`` the numbers of that
checkout are kept beside. What the first recording imports of torch (torch._dynamo, 0.9 s) is
imported before the clock starts. Programs on disk are those of ``PYRO_ANNEAL_CACHE_DIR``: name an
empty folder for the first process ever, and the same again for another. Merges into ``benchmarks/results/kept.json``.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import torch._dynamo

from pyro_anneal import AnnealedImportance

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "kept.json"
Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
CALLS = [0]


def schools(y, sigma):
    CALLS[0] += 1
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def decoder():
    """A toy decoder: 2 latents, 16 hidden units, 8 observations per row."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8)
    ).requires_grad_(False)

    def model(x):
        CALLS[0] += 1
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(network(z), 0.5).to_event(1), obs=x)

    return model


def compiling():
    """CPU time of processes that this one waited for: the C++ compiler."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(call):
    CALLS[0] = 0
    wall, cpu, below = time.perf_counter(), time.process_time(), compiling()
    call()
    return {
        "cpu_seconds": round(time.process_time() - cpu, 3),
        "compiler_seconds": round(compiling() - below, 3),
        "wall_seconds": round(time.perf_counter() - wall, 3),
        "model_calls": CALLS[0],
    }


def annealed(model, guide=None, **options):
    return AnnealedImportance(model, guide, seed=0, progress_bar=False, **options)


def repeated(guide, num_chains, num_steps, **options):
    ais = annealed(schools, guide, num_chains=num_chains, num_steps=num_steps, **options)
    calls = {name: timed(lambda: ais.run(Y, SIGMA)) for name in ("first call", "second call")}
    calls["other data"] = timed(lambda: ais.run(Y + 1.0, SIGMA))
    return calls


def simulations():
    ais = annealed(schools, num_chains=32, num_steps=200)
    return {"20 simulations": timed(lambda: ais.sandwich(Y, SIGMA, num_simulations=20))}


def batches():
    ais = annealed(decoder(), num_chains=16, num_steps=100)
    data = torch.randn(20, 64, 8, generator=torch.Generator().manual_seed(1))
    return {"20 batches of 64 rows": timed(lambda: ais.run_batches(list(data)))}


CASES = {
    "eight schools, auto, K=32, T=1000": lambda: repeated("auto", 32, 1000),
    "eight schools, auto, K=32, T=1000, compiled": lambda: repeated(
        "auto", 32, 1000, compile=True
    ),
    "eight schools, auto, K=512, T=10": lambda: repeated("auto", 512, 10),
    "eight schools, prior, K=32, T=10": lambda: repeated(None, 32, 10),
    "eight schools, prior, K=512, T=10": lambda: repeated(None, 512, 10),
    "sandwich of eight schools from the prior, K=32, T=200": simulations,
    "run_batches, toy decoder, K=16, T=100": batches,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--as", dest="name", default="after")
    parser.add_argument("--only", default="")
    parser.add_argument("--case", default="", help="run one case here and print its numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.case:
        print(json.dumps(CASES[options.case]()))
        return
    for case in CASES:
        if options.only not in case:
            continue
        command = [sys.executable, "-W", "ignore", __file__, "--case", case]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        found.setdefault(case, {})[options.name] = json.loads(output.splitlines()[-1])
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        print(case, output.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
