"""Expected against measured variance of log-weights, whose gap a budget aims at, on the open cases.

Run as ``python benchmarks/budget.py [--only NAME] [--steps 1000] [--chains 64] [--seeds 3]
[--further]``. Variances are robust (interquartile range): a chain left behind is a failure of another
kind, which the ``lag`` diagnostic reports. Over 64 chains they have an error of a quarter, hence
several seeds, each with a fit and a pilot of its own. ``--further`` takes other starts. Merges into
``benchmarks/results/budget.json``.
"""

import argparse
import json
import math
import sys
import warnings
from pathlib import Path

import torch

from pyro_anneal import AnnealedImportance

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "budget.json"
sys.path.insert(0, str(HERE.parent / "tests" / "helpers"))
PRIOR = ("E02 radiata M1", "E08 pima-768", "E18 eight schools", "E24 turtles", "E40 cox M=10")
FITTED = ("E08 pima-768", "E12 ionosphere", "E18 eight schools", "E26 hierarchical", "E34 sblri")
STARTS = [(name, "prior") for name in PRIOR] + [(name, "auto") for name in FITTED]
FURTHER = [
    ("E04 pima-532 M1", "prior"),
    ("E12 ionosphere", "prior"),
    ("E15 german", "prior"),
    ("E17 dogs", "prior"),
    ("E21 brownian", "prior"),
    ("E26 hierarchical", "prior"),
    ("E28 nhefs", "prior"),
    ("E31 google", "prior"),
    ("E34 sblri", "prior"),
    ("E38 galaxies K=3", "prior"),
    ("E44 many-well 6-d", "prior"),
    ("E46 funnel", "prior"),
    ("E02 radiata M1", "auto"),
    ("E15 german", "auto"),
    ("E17 dogs", "auto"),
    ("E31 google", "auto"),
    ("E40 cox M=10", "auto"),
]


def main():
    import cases

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--chains", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--further", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    starts = FURTHER if options.further else STARTS
    for name, start in starts:
        if options.only not in name:
            continue
        case = cases.CASES[name]()
        runs = [measure(case, start, options, seed) for seed in range(options.seeds)]
        ratios = [run["ratio"] for run in runs]
        record = {"ratio": math.prod(ratios) ** (1.0 / len(ratios)), "seeds": runs}
        key = f"{name}, {start}"
        if (options.steps, options.chains) != (1000, 64):
            key += f", T = {options.steps}, K = {options.chains}"
        found[key] = record
        print(key, round(record["ratio"], 2), [round(ratio, 2) for ratio in ratios], flush=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def measure(case, start, options, seed):
    """Runs one seed of one start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = AnnealedImportance(
            case.model,
            "auto" if start == "auto" else None,
            num_chains=options.chains,
            num_steps=options.steps,
            progress_bar=False,
            cross_check=False,
            seed=seed,
        ).run(*case.args)
    quartiles = run.log_weights.quantile(torch.tensor([0.25, 0.75]), 0)
    measured = float((quartiles.diff(dim=0) / 1.349).square().mean())
    pilot = run.pilot
    return {
        "expected": pilot.expected_variance,
        "measured": measured,
        "ratio": measured / pilot.expected_variance,
        "length": pilot.length,
        "correlation": pilot.correlation,
        "pilot_gradients": pilot.num_gradients,
        "flags": [d.name for d in run.diagnostics if d.severity == "warning"],
    }


if __name__ == "__main__":
    main()
