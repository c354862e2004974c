"""Error and flags of every start on the hard problems of ``tests/helpers/hard_problems.py``.

Run as ``python benchmarks/hard_cases.py [--only NAME] [--starts default prior ...]``; prints the
table of ``docs/hard_cases.md`` and merges into ``benchmarks/results/hard_cases.json``.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

import torch

from pyro_anneal import AnnealedImportance

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "hard_cases.json"
sys.path.insert(0, str(HERE.parent / "tests" / "helpers"))

STARTS = {
    "default": {
        "guide": "auto",
        "num_chains": 32,
        "target_gap": 0.02,
        "max_rounds": "auto",
    },  # log_evidence
    "prior": {"guide": None, "num_chains": 64},
    "prior_weight=0.5": {"guide": "auto", "prior_weight": 0.5, "num_chains": 64},
    "cross_check=True": {"guide": "auto", "cross_check": True, "num_chains": 64},
}


def measure(problem, truth, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = AnnealedImportance(problem.model, seed=0, progress_bar=False, **options).run(
            *problem.args
        )
    return {
        "error": float(run.lower) - truth,
        "std_error": float(run.std_error),
        "steps": run.num_steps,
        "chains": run.num_chains,
        "flags": [found.name for found in run.diagnostics if found.severity == "warning"],
    }


def cell(record):
    if record is None:
        return ""
    flags = f" ({', '.join(record['flags'])})" if record["flags"] else ""
    return f"{record['error']:+.3f}{flags}"


def main():
    from hard_problems import HARD_PROBLEMS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=list(STARTS))
    parser.add_argument("--print", action="store_true", help="print what was measured before")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, make in HARD_PROBLEMS.items():
        if options.only not in name or options.print:
            continue
        problem = make()
        record = found.setdefault(name, {"multimodal": problem.multimodal})
        if "truth" not in record:
            record["truth"] = float(problem.truth())
        for start in options.starts:
            record[start] = measure(problem, record["truth"], STARTS[start])
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print("| problem | log p(x) |", " | ".join(STARTS), "|")
    print("|---" * (2 + len(STARTS)) + "|")
    for name, record in found.items():
        cells = " | ".join(cell(record.get(start)) for start in STARTS)
        print(f"| {name} | {record['truth']:.3f} | {cells} |")


if __name__ == "__main__":
    main()
