"""Errors of the default start on hard problems and on mixtures with exchangeable labels.

``python benchmarks/starts.py [--steps T] [--seeds N] [NAME ...]`` writes
``benchmarks/results/starts.json``: for each problem and seed the bound minus the truth where it is
known, standard error, warnings, gradients of the fit and CPU seconds of one thread. Names are parts
of those in ``tests/helpers/hard_problems.py``, or ``iris``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from hard_problems import HARD_PROBLEMS

from pyro_anneal import AnnealedImportance

RESULTS = Path(__file__).parent / "results" / "starts.json"
# Petal lengths of the irises: two components by symmetrized importance sampling, others unknown.
IRIS_TRUTHS = {2: -131.959, 3: None, 4: None}


def components(x, num):
    w = pyro.sample("w", dist.Dirichlet(torch.ones(num)))
    with pyro.plate("components", num):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        sd = pyro.sample("sd", dist.LogNormal(-1.0, 0.7))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(w), dist.Normal(mu, sd)), obs=x)


def iris():
    from sklearn.datasets import load_iris

    x = torch.tensor(load_iris().data[:, 2])
    return (x - x.mean()) / x.std()


def problems(names):
    for name, make in HARD_PROBLEMS.items():
        if any(part in name for part in names):
            case = make()
            yield name, case.model, case.args, case.truth()
    if "iris" in names:
        for num, truth in IRIS_TRUTHS.items():
            yield f"iris, {num} components", components, (iris(), num), truth


def measure(model, args, truth, *, steps, seed):
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = AnnealedImportance(
            model, "auto", num_chains=32, num_steps=steps, seed=seed, progress_bar=False
        ).run(*args)
    return {
        "seed": seed,
        "lower": float(run.lower),
        "error": None if truth is None else float(run.lower) - truth,
        "std_error": float(run.std_error),
        "ess": float(run.ess),
        "warnings": [found.name for found in run.diagnostics],
        "fit_gradients": run.fit_gradients,
        "cpu_seconds": time.process_time() - began,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["two means", "many-well", "iris"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, model, args, truth in problems(options.names):
        rows = []
        for seed in range(options.seeds):
            rows.append(measure(model, args, truth, steps=options.steps, seed=seed))
            print(name, rows[-1], flush=True)
        kept[name] = {"steps": options.steps, "truth": truth, "runs": rows}
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
