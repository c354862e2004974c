r"""Mutual information of the linear VAE: the paper's Fig. 3(a), first column, and Fig. 5.

    python benchmarks/mi_linear_vae.py              # table, minutes on two cores
    python benchmarks/mi_linear_vae.py --figure 5   # bounds over T for K = 1 and 100
    python benchmarks/mi_linear_vae.py --quick      # everything, too short to mean anything

Model: z ~ N(0, I_10), x = W z + e in R^100, W ~ N(0, 1), unit noise;
I = log det(I + W'W) / 2. W differs from the paper's draw, so compare deficits from the analytic
value. The guide is linear-Gaussian with a diagonal covariance. Critics are smaller than the paper's
(two layers of 128) and see z in units of the guide (``RelativeCritic``), so that training takes
minutes; the paper's numbers are those of its Fig. 3(a), Brekelmans et al. (2022). One more row
measures the energy-based bound of GIWAE's own critic: for one critic IBAL is at least GIWAE.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_anneal import mi
from pyro_anneal.kernels import HMC

# Fig. 3(a), linear VAE; analytic 23.2 (23.23 for the draw of W there).
PAPER = {
    "AIS lower": 23.23,
    "AIS upper": 23.23,
    "IWAE K=1000": 23.19,
    "IWAE K=100": 23.14,
    "structured InfoNCE K=1000": 6.91,
    "structured InfoNCE K=100": 4.61,
    "MINE-AIS": 23.15,
    "GIWAE K=100": 22.87,
    "BA": 22.69,
    "InfoNCE K=100": 4.61,
}
PAPER_TRUTH = 23.23


class LinearGuide(nn.Module):
    """q(z|x) = N(A x + b, diag(s^2))."""

    def __init__(self, x_dim: int, z_dim: int) -> None:
        super().__init__()
        self.mean = nn.Linear(x_dim, z_dim)
        self.log_scale = nn.Parameter(torch.full((z_dim,), -2.0))

    def forward(self, x: Tensor) -> dist.Distribution:
        return dist.Normal(self.mean(x), self.log_scale.exp()).to_event(1)


def linear_vae(seed: int) -> tuple[mi.DistributionJoint, float]:
    """Builds the joint and its mutual information."""
    weights = torch.tensor(np.random.RandomState(seed).randn(100, 10))
    truth = 0.5 * (torch.eye(10) + weights.mT @ weights).logdet().item()
    weights = weights.to(torch.get_default_dtype())
    prior = dist.Normal(torch.zeros(10), 1.0).to_event(1)
    joint = mi.DistributionJoint(prior, lambda z: dist.Normal(z @ weights.mT, 1.0).to_event(1))
    return joint, truth


def train(bound: mi.Bound, joint: mi.Joint, num_steps: int, lr: float, batch: int) -> float:
    """Trains by Adam with a cosine schedule on fresh pairs; returns seconds of the processor."""
    began = time.process_time()
    optimizer = torch.optim.Adam(bound.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        optimizer.zero_grad()
        bound.loss(*joint.sample(batch)).backward()
        optimizer.step()
        schedule.step()
    return time.process_time() - began


def table(args: argparse.Namespace) -> None:
    """Measures every bound on the same pairs and prints them beside the paper's."""
    joint, truth = linear_vae(args.seed)
    torch.manual_seed(args.seed)
    scale = 0.02 if args.quick else 1.0
    steps = {"BA": int(3000 * scale), "critic": int(args.train_steps * scale)}
    x, z = joint.sample(120 if args.quick else args.num_pairs)
    # Subtracting each pair's log p(x|z) / p(x), known here, removes the sampling of the pairs.
    weights = joint.likelihood(torch.eye(10)).base_dist.loc.mT
    marginal = dist.MultivariateNormal(torch.zeros(100), weights @ weights.mT + torch.eye(100))
    exact = joint.log_likelihood(x, z) - marginal.log_prob(x)
    record = f"mi_linear_vae_{args.seed}"
    on_pairs = {"truth": truth, "exact_on_pairs": float(exact.mean()), "pairs": len(exact)}

    guide = LinearGuide(100, 10)
    ba = mi.BarberAgakov(joint, guide)
    seconds = {"BA": train(ba, joint, steps["BA"], 1e-2, 256)}
    frozen = LinearGuide(100, 10)
    frozen.load_state_dict(guide.state_dict())
    frozen.requires_grad_(False)

    def critic(q: LinearGuide) -> nn.Module:
        return mi.RelativeCritic(q, mi.ConcatCritic(100, 10, [128, 128]))

    def copy() -> LinearGuide:
        guide_copy = LinearGuide(100, 10)
        guide_copy.load_state_dict(guide.state_dict())
        return guide_copy

    first, second = copy(), copy()
    energy = {
        "num_chains": 8,
        "num_steps": 200,
        "num_moves": 4,
        "num_leapfrog": 5,
        "num_negatives": 8,
    }
    giwae = mi.GIWAE(joint, first, critic(first), 100)
    bounds: dict[str, mi.Bound] = {
        "BA": ba,
        "GIWAE K=100": giwae,
        "MINE-AIS": mi.MINEAIS(joint, second, critic(second), **energy),
        "InfoNCE K=100": mi.InfoNCE(mi.SeparableCritic(100, 10, [128, 128]), 100),
    }
    for name, lr in (("GIWAE K=100", 1e-3), ("MINE-AIS", 1e-3), ("InfoNCE K=100", 1e-3)):
        seconds[name] = train(bounds[name], joint, steps["critic"], lr, 100)
        print(f"trained {name} in {seconds[name]:.0f} s", flush=True)
    bounds |= {
        "IBAL of GIWAE's critic": mi.MINEAIS(joint, first, giwae.critic, **energy),
        "IWAE K=1000": mi.IWAE(joint, frozen, 1000),
        "IWAE K=100": mi.IWAE(joint, frozen, 100),
        "structured InfoNCE K=1000": mi.StructuredInfoNCE(joint, 1000),
        "structured InfoNCE K=100": mi.StructuredInfoNCE(joint, 100),
        "AIS": mi.AIS(joint, num_chains=16, num_steps=20 if args.quick else 500),
    }
    estimates = {}
    for name, bound in bounds.items():
        began = time.process_time()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*ceiling")
            estimates[name] = bound.estimate(x, z)
        seconds[f"{name} (measure)"] = time.process_time() - began
        print(f"measured {name} in {seconds[f'{name} (measure)']:.1f} s", flush=True)
        save(args.output, record, estimates, {**on_pairs, "cpu_seconds": seconds}, exact)
    report(estimates, exact, truth)
    if args.plot:
        axes = mi.plot_decomposition(estimates, truth=truth)
        axes.figure.savefig(args.plot, dpi=150)


def report(estimates: dict[str, mi.MutualInformation], exact: Tensor, truth: float) -> None:
    """Prints deficits from the analytic value beside the paper's."""
    print(f"\nanalytic {truth:.3f} nats; on these {len(exact)} pairs {exact.mean():.3f}")
    header = f"{'bound':<27}{'value':>9}{'+-':>7}{'deficit':>10}{'+-':>7}{'paper value':>13}"
    print(header + f"{'paper deficit':>15}")
    rows = [("AIS lower", "AIS", "lower"), ("AIS upper", "AIS", "upper")]
    rows += [(name, name, "lower") for name in estimates if name != "AIS"]
    for label, name, side in rows:
        est = estimates[name]
        values = getattr(est, f"pair_{side}")
        deficit = exact - values
        error = deficit.std() / math.sqrt(len(deficit))
        print(
            f"{label:<27}{getattr(est, side):9.3f}{getattr(est, side + '_std_error'):7.3f}"
            f"{deficit.mean():10.3f}{error:7.3f}"
            + (f"{PAPER[label]:13.2f}{PAPER_TRUTH - PAPER[label]:15.2f}" if label in PAPER else "")
        )
    mine = estimates["MINE-AIS"].measurements
    print(f"MINE-AIS: log Z in [{mine['log_z_lower']:.3f}, {mine['log_z_upper']:.3f}] on average")


def figure_5(args: argparse.Namespace) -> None:
    """Bounds over T for K = 1 and 100: the gap shrinks as 1 / T."""
    joint, truth = linear_vae(args.seed)
    torch.manual_seed(args.seed)
    x, z = joint.sample(10 if args.quick else 100)
    steps = [1, 10, 100] if args.quick else [1, 10, 100, 1000, 5000]
    series: dict[str, dict[float, mi.MutualInformation]] = {}
    kernel = HMC(num_leapfrog=args.num_leapfrog)
    print(f"analytic {truth:.3f}; HMC with {args.num_leapfrog} leapfrogs, from the prior")
    for num_chains in (1, 100):
        for kinds in (("IM", "IM"),) if num_chains == 1 else (("IM", "IM"), ("CR", "CR")):
            name = f"K={num_chains} {kinds[0]}" if num_chains > 1 else "K=1"
            for num_steps in steps:
                if num_steps * num_chains > args.max_cost:
                    continue
                bound = mi.AIS(
                    joint,
                    num_chains=num_chains,
                    num_steps=num_steps,
                    lower=kinds[0],
                    upper=kinds[1],
                    kernel=kernel,
                )
                began = time.perf_counter()
                est = bound.estimate(x, z)
                series.setdefault(name, {})[num_steps] = est
                print(
                    f"{name:<10} T={num_steps:<6} lower {est.lower:9.3f}  upper {est.upper:9.3f}  "
                    f"gap x T {est.gap * num_steps:9.1f}  {time.perf_counter() - began:6.1f} s",
                    flush=True,
                )
    flat = {f"{n} T={t}": est for n, points in series.items() for t, est in points.items()}
    save(args.output, "mi_figure_5", flat, {"truth": truth})
    if args.plot:
        mi.plot_bounds(series, against="T", truth=truth).figure.savefig(args.plot, dpi=150)


def save(
    folder: Path | None, name: str, estimates: dict, extra: dict, exact: Tensor | None = None
) -> None:
    """Writes means and errors as JSON, with deficits from the exact values of the pairs."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        label: {
            key: float(value)
            for key in ("lower", "lower_std_error", "upper", "upper_std_error")
            if (value := getattr(est, key)) is not None
        }
        for label, est in estimates.items()
    }
    for label, est in estimates.items() if exact is not None else ():
        deficit = exact - est.pair_lower
        rows[label]["deficit"] = float(deficit.mean())
        rows[label]["deficit_std_error"] = float(deficit.std() / math.sqrt(len(deficit)))
    (folder / f"{name}.json").write_text(json.dumps({"bounds": rows, **extra}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", choices=["3a", "5"], default="3a")
    parser.add_argument("--seed", type=int, default=0, help="of W (RandomState) and the run")
    parser.add_argument("--num-pairs", type=int, default=1000)
    parser.add_argument("--train-steps", type=int, default=4000, help="of each critic")
    parser.add_argument("--num-leapfrog", type=int, default=2)
    parser.add_argument("--max-cost", type=int, default=100_000, help="largest K T of Fig. 5")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, help="folder for a JSON file")
    parser.add_argument("--plot", type=Path, help="file for the figure")
    args = parser.parse_args()
    table(args) if args.figure == "3a" else figure_5(args)


if __name__ == "__main__":
    main()
