"""How often runs on easy problems are flagged: random models whose evidence is known.

Run as ``python benchmarks/easy_problems.py [--first 0] [--count 60] [--chains 16] [--steps 1000]``. Conjugate
regressions (known and unknown noise), hierarchies and Poisson-gamma models of random sizes, priors
and data; truths in closed form. A run is flagged if any diagnostic is a warning. Writes
``benchmarks/results/easy_problems.json`` after every problem.
"""

import argparse
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy import special, stats

from pyro_anneal import AnnealedImportance

RESULTS = Path(__file__).parent / "results" / "easy_problems.json"


def regression(design, y, prior, noise):
    w = pyro.sample("w", dist.Normal(torch.zeros(design.shape[1]), prior).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(design @ w, noise), obs=y)


def unknown_noise(design, y, prior):
    s2 = pyro.sample("s2", dist.InverseGamma(3.0, 2.0))
    scale = prior * s2.sqrt()
    w = pyro.sample("w", dist.Normal(torch.zeros(design.shape[1]), scale).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(design @ w, s2.sqrt()), obs=y)


def hierarchy(y, between, within):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, between))
        pyro.sample("y", dist.Normal(theta[:, None], within).expand(y.shape).to_event(1), obs=y)


def rates(counts, shape, rate):
    with pyro.plate("units", counts.shape[1], dim=-1):
        level = pyro.sample("level", dist.Gamma(shape, rate))
        with pyro.plate("times", len(counts), dim=-2):
            pyro.sample("count", dist.Poisson(level), obs=counts)


def _log_normal(y, cov):
    _, log_det = np.linalg.slogdet(cov)
    return -0.5 * (y @ np.linalg.solve(cov, y) + log_det + len(y) * math.log(2.0 * math.pi))


def make(index):
    """Draws one problem: name, model, arguments, truth."""
    draw = np.random.RandomState(index)
    kind = index % 4
    tensor = lambda x: torch.as_tensor(x, dtype=torch.float64)
    if kind == 3:
        shape, rate = draw.uniform(0.5, 4.0), draw.uniform(0.2, 2.0)
        level = draw.gamma(shape, 1.0 / rate, size=draw.randint(1, 6))
        counts = draw.poisson(level, size=(draw.randint(2, 12), len(level)))
        total, times = counts.sum(0), len(counts)
        truth = shape * math.log(rate) - special.gammaln(shape) + special.gammaln(shape + total)
        truth = truth - (shape + total) * math.log(rate + times)
        truth = truth.sum() - special.gammaln(counts + 1).sum()
        return "rates", rates, (tensor(counts), shape, rate), truth
    if kind == 2:
        groups, size = draw.randint(3, 12), draw.randint(2, 8)
        between, within = draw.uniform(0.3, 3.0), draw.uniform(0.3, 3.0)
        y = (
            3.0 * draw.randn()
            + between * draw.randn(groups, 1)
            + within * draw.randn(groups, size)
        )
        member = np.kron(np.eye(groups), np.ones((size, 1)))
        cov = 9.0 + between**2 * member @ member.T + within**2 * np.eye(groups * size)
        return "hierarchy", hierarchy, (tensor(y), between, within), _log_normal(y.ravel(), cov)
    rows, dim = draw.randint(10, 100), draw.randint(1, 12)
    mixing = np.eye(dim) + 0.5 * draw.randn(dim, dim)
    design = draw.randn(rows, dim) @ mixing
    prior, noise = draw.uniform(0.3, 5.0), draw.uniform(0.3, 2.0)
    y = design @ (prior * draw.randn(dim)) + noise * draw.randn(rows)
    gram = prior**2 * design @ design.T
    if kind == 0:
        truth = _log_normal(y, gram + noise**2 * np.eye(rows))
        return "regression", regression, (tensor(design), tensor(y), prior, noise), truth
    y = y / noise
    cov = (2.0 / 3.0) * (gram + np.eye(rows))  # s2 ~ IG(3, 2) gives a Student-t of 6 degrees
    truth = stats.multivariate_t.logpdf(y, np.zeros(rows), cov, df=6)
    return "unknown noise", unknown_noise, (tensor(design), tensor(y), prior), truth


def study(index, start, chains, steps):
    name, model, args, truth = make(index)
    batch = [] if name == "rates" else "auto"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = AnnealedImportance(
            model,
            "auto" if start == "auto" else None,
            num_chains=chains,
            num_steps=steps,
            batch_plates=batch,
            progress_bar=False,
            seed=index,
        ).run(*args)
    return {
        "index": index,
        "kind": name,
        "start": start,
        "error": float(run.lower) - float(truth),
        "std_error": float(run.std_error),
        "flags": [d.name for d in run.diagnostics if d.severity == "warning"],
        "seconds": run.setup_seconds + run.pilot.seconds + run.seconds,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--first", type=int, default=0, help="go on from here, keep the others")
    parser.add_argument("--chains", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--starts", nargs="+", default=["auto", "prior"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    records = []
    if RESULTS.exists() and options.first > 0:
        records = json.loads(RESULTS.read_text())["records"]
    for start in options.starts:
        for index in range(options.first, options.first + options.count):
            records.append(study(index, start, options.chains, options.steps))
            settings = {"chains": options.chains, "steps": options.steps}
            RESULTS.write_text(json.dumps({"settings": settings, "records": records}, indent=1))
        mine = [r for r in records if r["start"] == start]
        flagged = sum(bool(r["flags"]) for r in mine)
        errors = sorted(abs(r["error"]) for r in mine)
        print(
            f"{start}: {flagged} of {len(mine)} flagged, median error {errors[len(mine) // 2]:.4f},"
            f" largest {errors[-1]:.3f} nats"
        )


if __name__ == "__main__":
    main()
