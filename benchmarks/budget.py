"""Expected against measured variance of log-weights, whose gap a budget aims at, on the open cases.

Run as ``python benchmarks/budget.py [--only NAME] [--steps 1000] [--chains 64]``. Variances are
robust (interquartile range): a chain left behind is a failure of another kind, which the ``lag``
diagnostic reports. Merges into ``benchmarks/results/budget.json``.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

import torch

from pyro_anneal import AnnealedImportance
from pyro_anneal.budget import weight_variance

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "budget.json"
sys.path.insert(0, str(HERE.parent / "tests"))
PRIOR = ("E02 radiata M1", "E08 pima-768", "E18 eight schools", "E24 turtles", "E40 cox M=10")
FITTED = ("E08 pima-768", "E12 ionosphere", "E18 eight schools", "E26 hierarchical", "E34 sblri")


def main():
    import cases

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--chains", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    starts = [(name, "prior") for name in PRIOR] + [(name, "auto") for name in FITTED]
    for name, start in starts:
        if options.only not in name:
            continue
        case = cases.CASES[name]()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = AnnealedImportance(
                case.model,
                "auto" if start == "auto" else None,
                num_chains=options.chains,
                num_steps=options.steps,
                progress_bar=False,
                seed=0,
            ).run(*case.args)
        quartiles = run.log_weights.quantile(torch.tensor([0.25, 0.75]), 0)
        expected = weight_variance(run.pilot.length, run.pilot.correlation, options.steps)
        measured = float(quartiles.diff(dim=0) / 1.349) ** 2
        record = {"expected": expected, "measured": measured, "ratio": measured / expected}
        record |= {"length": run.pilot.length, "correlation": run.pilot.correlation}
        record["flags"] = [d.name for d in run.diagnostics if d.severity == "warning"]
        found[f"{name}, {start}"] = record
        print(name, start, record, flush=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
