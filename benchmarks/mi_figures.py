r"""Bounds on mutual information over T, over K and over wall time: the paper's Fig. 5 and Fig. 8.

    python benchmarks/mi_figures.py --output benchmarks/results --plot benchmarks/results/mi_bounds.png
    python benchmarks/mi_figures.py --quick     # too short to mean anything

Model: the linear VAE of ``mi_linear_vae.py``, z ~ N(0, I_10), x = W z + e in R^100, seed 0. AIS starts
from the prior and uses HMC with two leapfrogs; its time includes the pilot and the recording of the
density. The importance-sampling bounds have the prior (structured InfoNCE) and the best Gaussian
guide of diagonal covariance (IWAE), which is known here, as is every pair's log p(x|z) / p(x). That
serves as a control variate where it lowers the variance: bound - log-ratio + I has the same mean
and shows the method's error alone.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_anneal import mi
from pyro_anneal.kernels import HMC

Series = dict[str, dict[float, mi.MutualInformation]]


def make_problem() -> tuple[
    mi.DistributionJoint, Callable[[Tensor], dist.Distribution], Callable[..., Tensor], float
]:
    """Builds the joint, its best mean-field guide, log p(x|z) / p(x), and I."""
    weights = torch.tensor(np.random.RandomState(0).randn(100, 10))
    precision = torch.eye(10, dtype=torch.float64) + weights.mT @ weights
    truth = 0.5 * precision.logdet().item()
    covariance = torch.linalg.inv(precision)
    back = (weights @ covariance).to(torch.get_default_dtype())
    # The mean-field q that maximizes E log q has the posterior's marginal variances.
    scale = covariance.diagonal().sqrt().to(back)
    marginal = dist.MultivariateNormal(
        torch.zeros(100, dtype=torch.float64), weights @ weights.mT + torch.eye(100)
    )
    weights = weights.to(back)
    prior = dist.Normal(torch.zeros(10), 1.0).to_event(1)
    joint = mi.DistributionJoint(prior, lambda z: dist.Normal(z @ weights.mT, 1.0).to_event(1))

    def log_ratio(x: Tensor, z: Tensor) -> Tensor:
        return joint.log_likelihood(x, z) - marginal.log_prob(x.double())

    return joint, lambda x: dist.Normal(x @ back, scale).to_event(1), log_ratio, truth


def bounds(
    joint: mi.DistributionJoint, guide: Callable[[Tensor], dist.Distribution], quick: bool
) -> list[tuple[str, str, int, mi.Bound]]:
    """Lists panel, name, K or T, and bound."""
    grid: list[tuple[str, str, int, mi.Bound]] = []
    kernel = HMC(num_leapfrog=2)
    for num_chains, longest in ((1, 1000), (100, 300)):
        for num_steps in (1, 3, 10, 30, 100, 300, 1000):
            if num_steps <= (10 if quick else longest):
                ais = mi.AIS(
                    joint, num_chains=num_chains, num_steps=num_steps, lower="IM", kernel=kernel
                )
                grid.append(("T", f"AIS, K={num_chains}", num_steps, ais))
    for exponent in range(2 if quick else 5):
        count = 10**exponent
        grid.append(("K", "IWAE", count, mi.IWAE(joint, guide, count)))
        grid.append(("K", "structured InfoNCE", count, mi.StructuredInfoNCE(joint, count)))
        if count <= 100:
            ais = mi.AIS(joint, num_chains=count, num_steps=100, lower="IM", kernel=kernel)
            grid.append(("K", "AIS, T=100", count, ais))
    return grid


def reduce_variance(values: Tensor, control: Tensor) -> Tensor:
    """Subtracts the control variate, of mean zero, where that helps.

    A bound stuck at a ceiling does not vary with the pair.
    """
    return min(values, values - control, key=lambda v: float(v.var()))


def measure(args: argparse.Namespace) -> tuple[Series, Series, Series, float]:
    """Runs the grid; returns series over T, K and seconds, and I."""
    joint, guide, log_ratio, truth = make_problem()
    torch.manual_seed(0)
    x, z = joint.sample(args.num_pairs)
    control = log_ratio(x, z) - truth
    panels: dict[str, Series] = {"T": {}, "K": {}}
    timed: Series = {}
    rows = []
    for panel, name, size, bound in bounds(joint, guide, args.quick):
        seconds = float("inf")
        for _ in range(2):  # the faster of two; the first of them may also warm up
            began = time.perf_counter()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*ceiling")
                est = bound.estimate(x, z)
            seconds = min(seconds, time.perf_counter() - began)
        est = replace(
            est,
            pair_lower=reduce_variance(est.pair_lower, control),
            pair_upper=reduce_variance(est.pair_upper, control),
        )
        panels[panel].setdefault(name, {})[size] = est
        if name != "AIS, T=100":
            timed.setdefault(name, {})[seconds] = est
        row = {"name": name, panel: size, "seconds": round(seconds, 3)}
        for side in ("lower", "upper"):
            row[side] = round(float(getattr(est, side)), 4)
            row[f"{side}_std_error"] = round(float(getattr(est, f"{side}_std_error")), 4)
        rows.append(row)
        print(row, flush=True)
        if args.output is not None:
            args.output.mkdir(parents=True, exist_ok=True)
            content = {"truth": truth, "pairs": args.num_pairs, "rows": rows}
            (args.output / "mi_figures.json").write_text(json.dumps(content, indent=1))
    return panels["T"], panels["K"], timed, truth


def plot(over_t: Series, over_k: Series, timed: Series, truth: float, path: Path) -> None:
    """Draws the three panels; upper bounds of hundreds of nats are cut off."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14.0, 4.2), sharey=True, layout="constrained")
    mi.plot_bounds(over_t, against="T", truth=truth, axes=axes[0])
    mi.plot_bounds(over_k, against="K", truth=truth, axes=axes[1])
    mi.plot_bounds_against_time(timed, truth=truth, axes=axes[2])
    for ax in axes:
        ax.set_ylim(0.0, 60.0)
        ax.label_outer()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-pairs", type=int, default=50)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, help="folder for a JSON file")
    parser.add_argument("--plot", type=Path, help="file for the figure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    over_t, over_k, timed, truth = measure(args)
    if args.plot:
        plot(over_t, over_k, timed, truth, args.plot)


if __name__ == "__main__":
    main()
