"""Rounds beside a fixed T = 1000: error, standard error, gradients and CPU seconds by case.

python benchmarks/rounds.py [--seeds 0] [--cases E05 E18] [--save FILE]

Prints a table; ``benchmarks/results/rounds.json`` keeps one line per case, seed and choice. CPU
seconds are those of this process for the whole call, its fit included.
"""

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "helpers"))
from cases import CASES

from pyro_anneal import log_evidence

RECORD = Path(__file__).parent / "results" / "rounds.json"
USUAL = ["E02", "E04", "E05", "E08", "E12", "E15", "E17", "E18", "E24", "E26", "E28", "E31", "E34"]


def measure(name, seed, num_steps):
    """Runs one case by rounds (``num_steps=None``) or at a fixed T."""
    case = CASES[name]()
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = log_evidence(
            case.model,
            *case.args,
            guide=case.guide,
            num_steps=num_steps,
            seed=seed,
            progress_bar=False,
        )
    rounds = run.rounds or (run,)
    return {
        "case": name,
        "seed": seed,
        "choice": "rounds" if num_steps is None else f"T = {num_steps}",
        "steps": [each.num_steps for each in rounds],
        "gradients": sum(each.num_gradients for each in rounds),
        "cpu_seconds": round(time.process_time() - began, 2),
        "error": round(float(run.lower) - case.truth, 5),
        "std_error": round(float(run.std_error), 5),
        "covers": float(run.interval()[0]) <= case.truth,
        "below": round(case.truth - float(run.interval()[0]), 4),
        "warnings": [d.name for d in run.diagnostics if d.severity == "warning"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--cases", nargs="*", default=USUAL)
    parser.add_argument("--save", type=Path, default=RECORD)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    lines = []
    for name in (n for n in CASES if n.startswith(tuple(options.cases))):
        for seed in options.seeds:
            for num_steps in (None, 1000):
                lines.append(measure(name, seed, num_steps))
                print(" | ".join(str(value) for value in lines[-1].values()), flush=True)
                text = ",\n".join(json.dumps(line) for line in lines)
                options.save.write_text(
                    f'{{"torch": "{torch.__version__}", "runs": [\n{text}\n]}}\n'
                )


if __name__ == "__main__":
    main()
