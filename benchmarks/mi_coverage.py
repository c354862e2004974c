"""How often do intervals over pairs cover the mutual information? Results in docs/mi.md.

    python benchmarks/mi_coverage.py --output benchmarks/results    # half a minute of one thread

Nominal 95% intervals at 2 to 100 pairs, 2000 repetitions each, with normal quantiles, with Student's
t (what ``normal_interval`` does), and with control variates from 20 pairs on
(the package uses them from 50 on); then with the number
of pairs chosen by ``target_std_error``. Three problems with known mutual information:

- narrow: z ~ N(0, 1), x ~ N(z, .05), measured by structured InfoNCE with 2000 particles;
- counts: z ~ Exponential(1), x ~ Poisson(3 z), whose marginal is geometric: skewed values;
- rare: z ~ Bernoulli(.05), x ~ N(6 z, 1): most small samples hold one kind of pair only.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_anneal import mi
from pyro_anneal.results import controls as control_module
from pyro_anneal.results.controls import control_of_sides
from pyro_anneal.results.quantiles import student_quantile
from pyro_anneal.results.rounds import PairRounds

COUNTS = (2, 3, 4, 5, 7, 10, 20, 50, 100)
Pool = tuple[Tensor, Tensor, Tensor, float]  # lower, upper [P], controls [C, P], truth


def narrow(count: int) -> Pool:
    joint = mi.DistributionJoint(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 0.05))
    bound = mi.StructuredInfoNCE(joint, 2000)
    lower, upper, controls = [], [], []
    for _ in range(count // 10_000):
        x, z = joint.sample(10_000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            est = bound.estimate(x, z)
        lower.append(est.pair_lower)
        upper.append(est.pair_upper)
        controls.append(joint.controls(x, z))
    truth = 0.5 * math.log1p(400.0)
    return torch.cat(lower).double(), torch.cat(upper).double(), torch.cat(controls, 1), truth


def counts(count: int) -> Pool:
    joint = mi.DistributionJoint(
        dist.Exponential(torch.tensor(1.0)), lambda z: dist.Poisson(3 * z)
    )
    x, z = joint.sample(count)
    values = joint.log_likelihood(x, z) - (x * math.log(0.75) - math.log(4.0))
    grid = (torch.arange(400_000, dtype=torch.double) + 0.5) * 1e-4
    weight = (-grid).exp() * 1e-4
    truth = -(3.0 * math.log(0.75) - math.log(4.0))
    for k in range(200):
        log_prob = dist.Poisson(3 * grid).log_prob(torch.tensor(float(k)))
        truth += float((weight * log_prob.exp() * log_prob).sum())
    return values.double(), values.double(), joint.controls(x, z), truth


def rare(count: int) -> Pool:
    joint = mi.DistributionJoint(
        dist.Bernoulli(torch.tensor(0.05)), lambda z: dist.Normal(6 * z, 1)
    )
    x, z = joint.sample(count)

    def log_marginal(x: Tensor) -> Tensor:
        on = math.log(0.05) + dist.Normal(6.0, 1.0).log_prob(x)
        return torch.logaddexp(on, math.log(0.95) + dist.Normal(0.0, 1.0).log_prob(x))

    values = joint.log_likelihood(x, z) - log_marginal(x)
    grid = torch.linspace(-10.0, 16.0, 200_001, dtype=torch.double)
    truth = 0.0
    for location, weight in ((0.0, 0.95), (6.0, 0.05)):
        log_prob = dist.Normal(location, 1.0).log_prob(grid)
        gain = log_prob.exp() * (log_prob - log_marginal(grid))
        truth += weight * float(gain.sum() * (grid[1] - grid[0]))
    return values.double(), values.double(), joint.controls(x, z), truth


def interval(lower: Tensor, upper: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Intervals of R repetitions, from values ``[N, R]``."""
    root = math.sqrt(len(lower))
    return (
        lower.mean(0) - quantile * lower.std(0) / root,
        upper.mean(0) + quantile * upper.std(0) / root,
    )


def covered(ends: tuple[Tensor, Tensor], truth: float) -> dict[str, float]:
    inside = (ends[0] < truth) & (truth < ends[1])
    return {
        "coverage": float(inside.double().mean()),
        "width": float((ends[1] - ends[0]).median()),
    }


def fixed(pool: Pool, repetitions: int) -> dict[str, dict]:
    """Coverage at fixed numbers of pairs."""
    lower, upper, controls, truth = pool
    rows = {}
    for n in COUNTS:
        size = n * repetitions
        low, high = (side[:size].reshape(n, repetitions) for side in (lower, upper))
        t = student_quantile(n - 1, 0.975)
        row = {
            "normal": covered(interval(low, high, NormalDist().inv_cdf(0.975)), truth),
            "student": covered(interval(low, high, t), truth),
        }
        if n >= 20 and len(controls):
            c = controls[:, :size].reshape(len(controls), n, repetitions)
            shift = control_of_sides(low, high, c)
            row["controlled"] = covered(interval(low - shift, high - shift, t), truth)
        rows[str(n)] = row
    return rows


def in_rounds(pool: Pool, target: float, least: int, repetitions: int) -> dict[str, float]:
    """Coverage where the measured standard error decides on the number of pairs."""
    lower, upper, _, truth = pool
    rounds = PairRounds(target, least=least)
    hits, sizes, means = 0, [], []
    for _ in range(repetitions):
        place, n = int(torch.randint(len(lower), ())), least
        while True:
            index = torch.arange(place, place + n) % len(lower)
            low, high = lower[index], upper[index]
            error = float(torch.maximum(low.std(), high.std())) / math.sqrt(n)
            more = rounds.next(n, error)
            if more <= n:
                break
            n = more
        ends = interval(low.unsqueeze(1), high.unsqueeze(1), student_quantile(n - 1, 0.975))
        hits += bool(ends[0] < truth < ends[1])
        sizes.append(n)
        means.append(0.5 * float(low.mean() + high.mean()))
    average = torch.tensor(means, dtype=torch.double)
    return {
        "target": target,
        "first_round": least,
        "coverage": hits / repetitions,
        "mean_pairs": sum(sizes) / repetitions,
        "bias": float(average.mean()) - truth,
        "bias_std_error": float(average.std()) / math.sqrt(repetitions),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--output", type=Path, help="folder for a JSON file")
    args = parser.parse_args()
    torch.manual_seed(0)
    control_module.MIN_PAIRS = 20  # to see what its default of 50 is for
    problems: dict[str, Callable[[int], Pool]] = {"narrow": narrow, "counts": counts, "rare": rare}
    record = {}
    for name, make in problems.items():
        pool = make(100 * args.repetitions)
        spread = float(pool[0].std())
        record[name] = {
            "truth": pool[3],
            "std": spread,
            "fixed": fixed(pool, args.repetitions),
            "rounds": [
                in_rounds(pool, spread / 10.0, least, args.repetitions // 4)
                for least in (5, 20, 100)
            ],
        }
        print(name, json.dumps(record[name], indent=1), flush=True)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "mi_coverage.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
