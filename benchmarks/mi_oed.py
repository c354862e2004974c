r"""Expected information gain by pyro.contrib.oed.eig and by pyro_anneal.mi, side by side.

    python benchmarks/mi_oed.py --output benchmarks/results
    python benchmarks/mi_oed.py --quick     # too short to mean anything

The expected information gain of a design is the mutual information of latents and observations.
Model: linear regression, theta ~ N(0, diag(2^2, 1, .5^2)), y = A theta + N(0, .5^2) in R^6 with a
fixed random design A; I = log det(I + A S A' / .25) / 2. Both libraries see the same model, the
same families of guide and critic, and the same number of training steps and pairs per step.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.contrib.oed import eig
from torch import Tensor, nn

from pyro_anneal import mi

SCALES = torch.tensor([2.0, 1.0, 0.5])
NOISE = 0.5


def make_design() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, generator=generator)


def truth(design: Tensor) -> float:
    covariance = design @ SCALES.square().diag() @ design.mT / NOISE**2
    return 0.5 * (torch.eye(6) + covariance).logdet().item()


def oed_model(design: Tensor) -> Tensor:
    """Pyro's convention: leading dimensions of the design are batch."""
    with pyro.plate_stack("plate", design.shape[:-2]):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(3), SCALES).to_event(1))
        mean = (design @ theta.unsqueeze(-1)).squeeze(-1)
        return pyro.sample("y", dist.Normal(mean, NOISE).to_event(1))


class Guide(nn.Module):
    """A linear-Gaussian guide with diagonal covariance, shared by both libraries."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Linear(6, 3)
        self.log_scale = nn.Parameter(torch.zeros(3))

    def forward(self, y: Tensor) -> dist.Distribution:
        return dist.Normal(self.mean(y), self.log_scale.exp()).to_event(1)


class Critic(nn.Module):
    """An MLP critic, shared by both libraries."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mi.ConcatCritic(6, 3, [64, 64])

    def forward(self, y: Tensor, theta: Tensor) -> Tensor:
        return self.net(y, theta)


def theirs(design: Tensor, args: argparse.Namespace) -> dict[str, float | tuple[float, float]]:
    """Runs pyro.contrib.oed.eig."""
    results = {}
    module = Guide()

    def guide(y_dict, design, observation_labels, target_labels):
        pyro.module("guide", module)
        with pyro.plate_stack("plate", design.shape[:-2]):
            pyro.sample("theta", module(y_dict["y"]))

    critic = Critic()

    def score(design, trace, observation_labels, target_labels):
        pyro.module("critic", critic)
        return critic(trace.nodes["y"]["value"], trace.nodes["theta"]["value"])

    common = {"observation_labels": ["y"], "target_labels": ["theta"]}
    pyro.clear_param_store()
    results["posterior_eig (lower)"] = eig.posterior_eig(
        oed_model, design, num_samples=args.batch, num_steps=args.steps, guide=guide,
        optim=pyro.optim.Adam({"lr": 5e-3}), final_num_samples=args.num_pairs, **common,
    )  # fmt: skip
    results[f"vnmc_eig M={args.particles} (upper)"] = eig.vnmc_eig(
        oed_model, design, num_samples=(args.batch, 4), num_steps=args.steps // 4, guide=guide,
        optim=pyro.optim.Adam({"lr": 5e-3}),
        final_num_samples=(args.num_pairs, args.particles), **common,
    )  # fmt: skip
    results[f"nmc_eig M={args.particles} (upper)"] = eig.nmc_eig(
        oed_model, design, N=args.num_pairs, M=args.particles, **common
    )
    results["donsker_varadhan_eig (none)"] = eig.donsker_varadhan_eig(
        oed_model, design, num_samples=args.batch, num_steps=args.steps, T=score,
        optim=pyro.optim.Adam({"lr": 5e-3}), final_num_samples=args.num_pairs, **common,
    )  # fmt: skip
    return {name: float(value.detach()) for name, value in results.items()}


def ours(design: Tensor, args: argparse.Namespace) -> dict[str, mi.MutualInformation]:
    """Runs the bounds of pyro_anneal.mi on the same model."""
    joint = mi.PyroJoint(lambda: oed_model(design), observed=["y"])
    guide, critic = Guide(), Critic()

    def fit(bound: mi.Bound) -> mi.Bound:
        optimizer = torch.optim.Adam(bound.parameters(), lr=5e-3)
        for _ in range(args.steps):
            optimizer.zero_grad()
            bound.loss(*joint.sample(args.batch)).backward()
            optimizer.step()
        return bound

    bounds = {
        "BarberAgakov": fit(mi.BarberAgakov(joint, guide, args.particles)),
        f"IWAE K={args.particles}": mi.IWAE(joint, guide, args.particles),
        f"StructuredInfoNCE K={args.particles}": mi.StructuredInfoNCE(joint, args.particles),
        "GIWAE K=64": fit(mi.GIWAE(joint, Guide(), Critic(), 64)),
        "MINE_DV (none)": fit(mi.MINE_DV(critic)),
        "AIS K=8 T=100": mi.AIS(joint, num_chains=8, num_steps=100),
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*ceiling")
        return {
            name: bound.estimate(*joint.sample(args.num_pairs)) for name, bound in bounds.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="of training")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--num-pairs", type=int, default=2000)
    parser.add_argument("--particles", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, help="folder for a JSON file")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.num_pairs = 20, 200
    pyro.set_rng_seed(args.seed)
    design = make_design()
    exact = truth(design)
    settings = {k: v for k, v in vars(args).items() if k not in ("output", "quick")}
    record = {"truth": exact, **settings, "rows": []}

    def keep(library: str, name: str, value: float, error: float | None) -> None:
        margin = "" if error is None else f" +- {error:.4f}"
        print(f"  {name:<34}{value:9.4f}   error {value - exact:+.4f}{margin}", flush=True)
        row = {"library": library, "estimator": name, "value": value, "std_error": error}
        record["rows"].append(row)

    print(f"analytic expected information gain: {exact:.4f} nats\n")
    began = time.perf_counter()
    print("pyro.contrib.oed.eig (no standard errors)")
    for name, value in theirs(design, args).items():
        keep("pyro.contrib.oed.eig", name, value, None)
    print(f"  {time.perf_counter() - began:.1f} s\n\npyro_anneal.mi")
    began = time.perf_counter()
    for name, est in ours(design, args).items():
        for side in ("lower", "plug_in", "upper"):
            value = getattr(est, side)
            if value is not None and math.isfinite(value):
                label = f"{name} {side.replace('_', '-')}"
                keep(
                    "pyro_anneal.mi", label, float(value), float(getattr(est, f"{side}_std_error"))
                )
    print(f"  {time.perf_counter() - began:.1f} s")
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / f"mi_oed_{args.seed}.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
