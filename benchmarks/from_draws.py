"""Evidence from NUTS draws on the models of posteriordb, beside truths by quadrature.

    python benchmarks/from_draws.py [--draws 500] [--data FOLDER] [NAME ...]    # adds to results/from_draws.json

Pyro's NUTS runs twice per model, from other seeds. ``evidence_from_samples`` then reads the draws in
three forms: the ``MCMC`` object of the first chain, both chains grouped in a dictionary, and both as
ArviZ's ``InferenceData``. In a fourth call the draws are wrong: those are left out in which the first
coordinate is above its median, as by a sampler that misses half of the posterior. Reported are errors
of the bridge and of the annealed bound, in nats, and the verdict. FOLDER is that of ``posteriordb.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arviz
import pyro
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import posteriordb

from pyro_anneal import EvidenceFromSamples, evidence_from_samples

RESULTS = Path(__file__).parent / "results" / "from_draws.json"


def chain(model: Any, args: tuple[Any, ...], seed: int, warmup: int, draws: int) -> MCMC:
    pyro.set_rng_seed(seed)
    mcmc = MCMC(
        NUTS(model, jit_compile=False),
        num_samples=draws,
        warmup_steps=warmup,
        disable_progbar=True,
    )
    mcmc.run(*args)
    return mcmc


def halved(grouped: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leaves out the half of all draws in which the first coordinate is large."""
    flat = {name: value.flatten(0, 1) for name, value in grouped.items()}
    value = next(iter(flat.values()))
    first = value.reshape(len(value), -1)[:, 0]
    kept = first <= first.median()
    return {name: value[kept] for name, value in flat.items()}


def row(found: EvidenceFromSamples, truth: float, seconds: float) -> dict[str, Any]:
    return {
        "bridge_error": round(float(found.estimate.value) - truth, 4),
        "bridge_std_error": round(float(found.estimate.std_error), 4),
        "lower_error": round(float(found.lower) - truth, 4),
        "lower_std_error": round(float(found.std_error), 4),
        "interval_covers": bool(float(found.interval()[0]) <= truth),
        "effective": round(float(found.num_effective), 1),
        "r_hat": round(float(found.r_hat), 4),
        "base": found.base,
        "verdict": found.verdict,
        "warnings": [d.name for d in found.diagnostics if d.severity == "warning"],
        "cpu_seconds": round(seconds, 2),
    }


def measure(name: str, make: Callable[[], Any], warmup: int, draws: int) -> dict[str, Any]:
    model, args, exact, log_joint, start = make()
    truth = posteriordb.sampled(log_joint, start, num=20_000)[0] if exact is None else exact()
    began = time.process_time()
    runs = [chain(model, args, seed, warmup, draws) for seed in (1, 2)]
    nuts_seconds = time.process_time() - began
    parts = [run.get_samples() for run in runs]
    grouped = {site: torch.stack([part[site] for part in parts]) for site in parts[0]}
    forms = {
        "MCMC": runs[0],
        "two chains": grouped,
        "InferenceData": arviz.from_dict({k: v.numpy() for k, v in grouped.items()}),
        "half missing": halved(grouped),
    }
    record: dict[str, Any] = {"truth": round(truth, 5), "nuts_cpu_seconds": round(nuts_seconds, 1)}
    for form, samples in forms.items():
        began = time.process_time()
        found = evidence_from_samples(model, samples, *args, seed=0, progress_bar=False)
        record[form] = row(found, truth, time.process_time() - began)
        print(name, form, json.dumps(record[form]), flush=True)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[""])
    parser.add_argument("--warmup", type=int, default=300)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--data", type=Path, help="folder of posteriordb's data, as JSON")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    kept = json.loads(given.output.read_text()) if given.output.exists() else {}
    for name, make in posteriordb.at(given.data):
        if name not in kept and any(part in name for part in given.names):
            kept[name] = {
                "draws_per_chain": given.draws,
                "warmup": given.warmup,
                **measure(name, make, given.warmup, given.draws),
            }
            given.output.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
