"""Times annealing: step by step, compiled densities, the native loop, and peers in ``lax.scan``.

Run as ``python benchmarks/loop.py [--peer-python PYTHON] [--tfp-python PYTHON] [--only CASE]``. The
peers need an environment with jax and numpyro (tensorflow_probability for TFP), whose interpreter
is given. All columns are measured in one run, on one processor, alternately; a value is the smallest
and the median over the rounds, per leapfrog of all chains, in CPU time of this process for ours and in
the peers' own time for theirs. Random numbers are drawn before the
clock starts, for peers too, except where a row says otherwise.
"""

import argparse
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch

from pyro_anneal.chains.loop import run_chains
from pyro_anneal.chains.path import Carry, StepTable, TuningTable
from pyro_anneal.chains.path import Path as AnnealingPath
from pyro_anneal.compiled.looped import LoopedDensity
from pyro_anneal.kernels import HMC
from pyro_anneal.kernels.noise import draw_steps
from pyro_anneal.problems.problem import prepare
from pyro_anneal.schedules import Linear

RESULTS = Path(__file__).parent / "results" / "loop.json"
SCHOOLS_Y = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]  # Rubin (1981)
SCHOOLS_SIGMA = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]
CASES = {  # model, chains, leapfrogs, steps
    "schools-64": ("schools", 64, 5, 99),
    "schools-1024": ("schools", 1024, 5, 99),
    "linear": ("linear", 1, 5, 99),
    "mlp": ("mlp", 1, 2, 20),
}


def schools():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        log_tau = pyro.sample("log_tau", dist.Normal(5.0, 1.0))
        with pyro.plate("schools", 8):
            theta = pyro.sample("theta", dist.Normal(mu, log_tau.exp()))
            sigma = torch.tensor(SCHOOLS_SIGMA)
            pyro.sample("y", dist.Normal(theta, sigma), obs=torch.tensor(SCHOOLS_Y))

    return model


def decoder(sizes, rows):
    weights = [torch.randn(n, m) / n**0.5 for n, m in itertools.pairwise(sizes)]
    x = torch.randn(rows, sizes[-1])
    binary = len(sizes) > 2

    def model():
        with pyro.plate("data", rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(sizes[0]), 1.0).to_event(1))
            for layer in weights[:-1]:
                z = (z @ layer).tanh()
            mean = z @ weights[-1]
            if binary:
                likelihood = dist.Bernoulli(logits=mean).to_event(1)
                pyro.sample("x", likelihood, obs=(x > 0).float())
            else:
                pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    return model


MODELS = {
    "schools": schools,
    "linear": lambda: decoder([10, 100], 1600),
    "mlp": lambda: decoder([10, 1024, 1024, 1024, 784], 64),
}


class Peer:
    """A process that runs a method of ``loop_peers.py`` once per line."""

    def __init__(self, python):
        script = str(Path(__file__).with_name("loop_peers.py"))
        self.process = subprocess.Popen(
            [python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, *words):
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        if not answer or answer.startswith("failed"):
            raise RuntimeError(answer or "the peer ended")
        return float(answer)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def timed(function):
    start = time.process_time()
    function()
    return time.process_time() - start


def ours(name, num_chains, num_leapfrog, num_steps):
    """Prepares our columns; returns functions of no argument and the seconds to compile."""
    arguments = ((), {})
    model = MODELS[name]()
    columns, compile_seconds = {}, {}
    kernel = HMC(num_leapfrog)
    for label, options in {
        "graph": {"compile": False, "native": False},
        "compiled": {"compile": True, "native": True},
    }.items():
        began = time.process_time()
        problem = prepare(
            model, None, arguments, arguments, num_chains=num_chains, batch_plates="auto", seed=0,
            **options,
        )  # fmt: skip
        density = problem.density
        compile_seconds[label] = time.process_time() - began
        state = density(0.1 + torch.zeros(num_chains, *density.example.shape))
        tuning = TuningTable.constant(0.05, density.example)
        path = AnnealingPath(Linear()(num_steps + 1), kernel, tuning)
        run = {"direction": "forward", "seed": 0, "stream": "s"}
        columns[f"steps, {label}"] = functools.partial(run_chains, density, path, state, **run)
        columns[f"gradient, {label}"] = functools.partial(
            repeat, density, state.position, num_leapfrog * num_steps
        )
    if density.native_source_and_inputs() is not None:  # else too large, and compiled by torch
        looped = LoopedDensity(density)
        whole = functools.partial(run_chains, looped, path, state, **run)
        compile_seconds["loop"] = timed(whole)
        assert looped.has_run, looped.loop_reason
        columns["loop, random numbers included"] = whole
        columns["loop"] = without_noise(looped, path, state, num_steps)
    return columns, compile_seconds


def repeat(function, argument, count):
    for _ in range(count):
        function(argument)


def without_noise(looped, path, state, num_steps):
    """Leaves the random numbers out, as for the peers."""
    kernel = path.kernel
    generator = torch.Generator().manual_seed(0)
    noise = draw_steps(kernel, state, num_steps, generator)
    betas = path.betas[1:-1]
    step_size, scale = path.tuning.at_all(betas)
    widths = torch.full((num_steps,), 1.0 / num_steps, dtype=torch.float64)
    table = StepTable(betas.to(state.position), step_size, scale, widths, widths)
    weights = torch.zeros_like(state.log_target, dtype=torch.float64)
    carry = Carry(state, weights, weights)
    return functools.partial(looped.run_chunk, kernel, carry, table, noise)


def race(case, peers, seconds):
    name, num_chains, num_leapfrog, num_steps = CASES[case]
    sizes = (num_chains, num_leapfrog, num_steps)
    with torch.no_grad():
        columns, compile_seconds = ours(name, *sizes)
        runs = {label: functools.partial(timed, run) for label, run in columns.items()}
        notes = {}
        for label, (peer, method) in peers.items():
            try:
                peer(method, name, *sizes)
                runs[label] = functools.partial(peer, method, name, *sizes)
            except RuntimeError as error:
                notes[label] = str(error)
        times = {label: [] for label in runs}
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times["steps, graph"]) < 5:
            for label, run in runs.items():
                times[label].append(run())
    per = num_leapfrog * num_steps
    return {
        "sizes": {"chains": num_chains, "leapfrogs": num_leapfrog, "steps": num_steps},
        "microseconds": {
            label: {"min": 1e6 * min(t) / per, "median": 1e6 * statistics.median(t) / per}
            for label, t in times.items()
        },
        "rounds": len(times["steps, graph"]),
        "compile_seconds": compile_seconds,
        "notes": notes,
    }


def show(results):
    for case, result in results.items():
        print(f"\n{case}, {result['sizes']}: microseconds per leapfrog of all chains")
        fastest = result["microseconds"]["steps, graph"]
        print("| | smallest | median | over steps of the graph |")
        print("|---|---|---|---|")
        for label, values in result["microseconds"].items():
            ratio = values["median"] / fastest["median"]
            print(f"| {label} | {values['min']:.1f} | {values['median']:.1f} | {ratio:.2f} |")
        seconds = {k: round(v, 1) for k, v in result["compile_seconds"].items()}
        print(f"compiled in {seconds} s; {result['notes'] or ''}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", help="interpreter with jax and numpyro")
    parser.add_argument("--tfp-python", help="interpreter with tensorflow_probability as well")
    parser.add_argument("--only", choices=CASES, nargs="*", default=list(CASES))
    parser.add_argument("--seconds", type=float, default=8.0, help="time per case")
    parser.add_argument("--output", type=Path, default=RESULTS, help="merged with what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # XLA's flags do not keep it to one thread
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.manual_seed(0)
    processes, peers = [], {}
    if options.peer_python:
        processes.append(Peer(options.peer_python))
        peers |= {
            "NumPyro, annealed": (processes[-1], "annealed"),
            "NumPyro, leapfrogs alone": (processes[-1], "leapfrogs"),
            "NumPyro, gradient": (processes[-1], "gradient"),
        }
    if options.tfp_python:
        processes.append(Peer(options.tfp_python))
        peers["TFP, its random numbers included"] = (processes[-1], "tfp")
        peers["NumPyro of that environment, annealed"] = (processes[-1], "annealed")
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    for case in options.only:
        results[case] = race(case, peers, options.seconds)
        show({case: results[case]})
        sys.stdout.flush()
        options.output.write_text(json.dumps(results, indent=1) + "\n")
    for process in processes:
        process.close()


if __name__ == "__main__":
    main()
