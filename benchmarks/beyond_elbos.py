"""The targets of "Beyond ELBOs" that are at hand, by the default call, without training.

``python benchmarks/beyond_elbos.py [--seeds 0 1] [--steps T] [--gaps] [NAME ...]`` merges into
``benchmarks/results/beyond_elbos.json``: the evidence, its standard error, the evidence lower bound
of one chain (mean log-weight), steps of the rounds and CPU seconds of one thread. Ionosphere, sonar
and German credit are logistic regressions under N(0, 1); "Credit, no prior" is German credit as
that benchmark has it, the Cox process is on its grid of 40 x 40. With ``--gaps`` the Cox processes
are bounded from both sides on data that they simulate, at T = 512. Names and priors: Blessing et
al. (2024), *Beyond ELBOs: a large-scale evaluation of variational methods for sampling*.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from cases import CASES, _log_gaussian_cox, _pad, _standardize, logistic
from datafiles import find
from misses import brownian, brownian_data, brownian_truth
from races import SONAR_TRUTH

from pyro_anneal import AnnealedImportance, log_evidence

RESULTS = Path(__file__).parent / "results" / "beyond_elbos.json"
# Importance sampling from a Student-t refitted four times, 200,000 draws: standard error 0.001.
CREDIT_TRUTH = -504.4869


def sonar():
    data = np.load(find("sonar/sonar_full.npz"))
    y = (data["y"] + 1) / 2 if data["y"].min() < 0 else data["y"]
    return torch.tensor(_pad(_standardize(data["X"]))), torch.tensor(y), 1.0


def seeds(germinated, total, x1, x2):
    """Random effects of 21 plates of seeds (Crowder 1978), with the priors of BUGS."""
    precision = pyro.sample("precision", dist.Gamma(0.01, 0.01))
    a = pyro.sample("a", dist.Normal(torch.zeros(4), 10.0).to_event(1))
    with pyro.plate("plates", len(total)):
        b = pyro.sample("b", dist.Normal(0.0, precision.rsqrt()))
        logits = a[0] + a[1] * x1 + a[2] * x2 + a[3] * x1 * x2 + b
        pyro.sample("germinated", dist.Binomial(total, logits=logits), obs=germinated)


def seeds_data():
    data = json.loads(find("seeds/seeds.data.json").read_text())
    return tuple(torch.tensor(data[name], dtype=torch.double) for name in ("n", "N", "x1", "x2"))


def credit(design, y):
    """Logistic regression as that benchmark has it: the prior is left out, the likelihood is all."""
    anywhere = dist.Normal(torch.zeros(design.shape[1]), 10.0).to_event(1)
    w = pyro.sample("w", anywhere)
    logits = design @ w
    likelihood = (y * logits - torch.nn.functional.softplus(logits)).sum()
    pyro.factor("likelihood", likelihood - anywhere.log_prob(w))


def credit_data():
    """Columns over their standard deviations, not centred."""
    data = np.genfromtxt(find("german/german.data-numeric"))
    design = data[:, :-1] / data[:, :-1].std(0)
    return torch.tensor(_pad(design)), torch.tensor(data[:, -1] - 1)


def problems():
    """Yields name, dimension, model, arguments and the truth, where it is known."""
    for name, case, dim in (
        ("Ionosphere", "E12 ionosphere", 35),
        ("German credit", "E15 german", 25),
    ):
        made = CASES[case]()
        yield name, dim, made.model, lambda made=made: made.args, made.truth
    yield "Credit, no prior", 25, credit, credit_data, CREDIT_TRUTH
    yield "Sonar", 61, logistic, sonar, SONAR_TRUTH
    yield "Seeds", 26, seeds, seeds_data, None
    yield "Brownian", 32, brownian, brownian_data, brownian_truth
    for grid, truth in ((20, 490.726), (40, None)):
        made = _log_gaussian_cox(grid, truth, None)
        yield f"LGCP {grid} x {grid}", grid**2, made.model, lambda made=made: made.args, truth


def cox(counts, chol, mean, area):
    """The Cox process with counts that can be simulated."""
    white = pyro.sample("white", dist.Normal(torch.zeros(len(chol)), 1.0).to_event(1))
    rate = area * (mean + chol @ white).exp()
    pyro.sample("counts", dist.Poisson(rate).to_event(1), obs=counts)


def measure_gap(args, seed, num_steps):
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ais = AnnealedImportance(
            cox, guide="auto", num_chains=32, num_steps=num_steps, seed=seed, progress_bar=False
        )
        found = ais.sandwich(*args)
    bounds = {name: round(float(value), 4) for name, value in found.bounds.items()}
    return {"seed": seed, **bounds, "cpu_seconds": round(time.process_time() - began, 2)}


def measure(model, args, seed, num_steps):
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = log_evidence(model, *args, seed=seed, num_steps=num_steps, progress_bar=False)
    return {
        "seed": seed,
        "log_evidence": round(float(run.lower), 4),
        "std_error": round(float(run.std_error), 4),
        "elbo_of_one_chain": round(float(run.log_weights.mean()), 4),
        "steps": [each.num_steps for each in run.rounds or (run,)],
        "chains": run.num_chains,
        "warnings": [d.name for d in run.diagnostics if d.severity == "warning"],
        "cpu_seconds": round(time.process_time() - began, 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[""])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="a fixed T in place of rounds")
    parser.add_argument("--gaps", action="store_true", help="of simulated Cox processes")
    given = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, dim, model, make_args, truth in problems():
        if not any(part in name for part in given.names):
            continue
        if given.gaps and not name.startswith("LGCP"):
            continue
        truth = truth() if callable(truth) else truth
        steps = 512 if given.gaps and given.steps is None else given.steps
        what = "rounds" if steps is None else f"T = {steps}"
        runs = []
        for seed in given.seeds:
            args = make_args()
            if given.gaps:
                runs.append(measure_gap(args, seed, steps))
            else:
                runs.append(measure(model, args, seed, steps))
            print(name, json.dumps(runs[-1]), flush=True)
            record = kept.setdefault(name, {"dim": dim, "truth": truth})
            record[f"simulated, {what}" if given.gaps else what] = runs
            lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in kept.items())
            RESULTS.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
