"""What each pass over a recorded graph buys on whole calls: CPU time of one thread, with and without, in turns.

Run ``python benchmarks/passes.py [--only CASE ...] [--output FILE]``. A pass is switched off by leaving its function
out. Every number is the smaller of two calls of ``run`` (fit or pilot, chains and all) after one that compiles
and is not counted; compilers run in processes of their own and are not counted either.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import time
import warnings
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import pyro
import pyro.distributions as dist
import torch
import torch._dynamo
import torch._inductor.compile_fx

from pyro_anneal import AnnealedImportance
from pyro_anneal.graphs import inductor, kept, recording
from pyro_anneal.kernels import HMC

RESULTS = Path(__file__).resolve().parent / "results" / "passes.json"
Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools():
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, SIGMA), obs=Y)


def decoder(sizes, rows):
    weights = [torch.randn(n, m) / n**0.5 for n, m in itertools.pairwise(sizes)]
    x = torch.randn(rows, sizes[-1])

    def model():
        with pyro.plate("data", rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(sizes[0]), 1.0).to_event(1))
            for layer in weights[:-1]:
                z = (z @ layer).tanh()
            if len(weights) > 1:
                noise = dist.Bernoulli(logits=z @ weights[-1])
                pyro.sample("x", noise.to_event(1), obs=(x > 0).float())
            else:
                pyro.sample("x", dist.Normal(z @ weights[-1], 1.0).to_event(1), obs=x)

    return model


def process(size):
    x = torch.linspace(0.0, 1.0, size)
    y = (6.0 * x).sin() + 0.3 * torch.randn(size)
    apart = (x.unsqueeze(0) - x.unsqueeze(1)).square()

    def model():
        length = pyro.sample("length", dist.LogNormal(-1.0, 0.5))
        noise = pyro.sample("noise", dist.HalfNormal(0.5))
        cov = (-0.5 * apart / length**2).exp() + (noise**2 + 1e-4) * torch.eye(size)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(size), cov), obs=y)

    return model


def cox(side):
    cells = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    apart = torch.cdist(cells, cells)
    root = torch.linalg.cholesky(
        1.9 * (-apart * 30.0 / (side * side)).exp() + 1e-4 * torch.eye(side**2)
    )
    counts = torch.poisson(torch.full((side**2,), 0.3))

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(side**2), 1.0).to_event(1))
        rate = (root @ z - math.log(3.0)).exp()
        pyro.sample("n", dist.Poisson(rate).to_event(1), obs=counts)

    return model


def regression(rows, columns):
    design = torch.randn(rows, columns)
    y = design @ torch.randn(columns) + torch.randn(rows)

    def model():
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(columns), 1.0).to_event(1))
        with pyro.plate("data", rows):
            pyro.sample("y", dist.Normal(design @ w, scale), obs=y)

    return model


CASES = {  # model, options of the call
    "eight schools": (lambda: schools, {"guide": "auto", "num_chains": 32, "num_steps": 500}),
    "linear decoder, 100 rows": (
        lambda: decoder([10, 100], 100),
        {"num_chains": 16, "num_steps": 100, "kernel": HMC(5)},
    ),
    "MLP 10-512-512-784": (
        lambda: decoder([10, 512, 512, 784], 16),
        {"num_chains": 8, "num_steps": 30, "kernel": HMC(5), "compile": True},
    ),
    "Gaussian process, 40 points": (lambda: process(40), {"num_chains": 16, "num_steps": 100}),
    "Cox process, 20 x 20": (lambda: cox(20), {"num_chains": 16, "num_steps": 100}),
    "regression, 500 x 60": (lambda: regression(500, 60), {"num_chains": 16, "num_steps": 200}),
}


def _as_it_is(graph, *rest):
    return graph


def _only_dead(graph):
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


@contextlib.contextmanager
def _without_products():
    yield []


PASSES = {
    "uniform numbers folded": lambda: mock.patch.object(recording, "fold_uniform", _as_it_is),
    "repeated operations dropped": lambda: mock.patch.object(recording, "simplify", _only_dead),
    "products by oneDNN": lambda: mock.patch.object(
        inductor, "onednn_products", _without_products
    ),
}


@contextlib.contextmanager
def fresh(change):
    """Keeps the graphs and the programs of one way apart from those of another."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(kept, "_GRAPHS", OrderedDict()))
        stack.enter_context(mock.patch.object(inductor, "_COMPILED", OrderedDict()))
        stack.enter_context(torch._inductor.config.patch(force_disable_caches=True))
        stack.enter_context(change())
        yield


def measure(make, options, passes):
    """Times whole calls with all passes, and with all but one."""
    torch.manual_seed(0)
    model = make()
    guide = {"guide": options["guide"]} if "guide" in options else {}
    rest = {name: value for name, value in options.items() if name != "guide"}
    seconds = {}
    for name, change in {"all": contextlib.nullcontext, **passes}.items():
        with fresh(change):
            calls = AnnealedImportance(model, **guide, **rest, seed=0, progress_bar=False)
            calls.run()
            times = []
            for _ in range(2):
                began = time.process_time()
                calls.run()
                times.append(time.process_time() - began)
        seconds[name] = min(times)
    return seconds


def main() -> None:
    """Prints seconds, and what each pass buys; writes both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(CASES))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = json.loads(options.output.read_text())["cases"] if options.output.exists() else {}
    for name, (make, rest) in CASES.items():
        if name not in options.only:
            continue
        found[name] = measure(make, rest, PASSES)
        whole = found[name]["all"]
        ratios = {key: round(value / whole, 2) for key, value in found[name].items()}
        print(f"{name}: {whole:.2f} s, {ratios}", flush=True)
        unit = "seconds of CPU time of one thread, the smaller of two calls"
        options.output.write_text(json.dumps({"unit": unit, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
