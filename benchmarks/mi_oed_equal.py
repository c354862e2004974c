r"""Expected information gain at equal numbers of likelihood evaluations: ais_eig beside Pyro's own.

    python benchmarks/mi_oed_equal.py --output benchmarks/results
    python benchmarks/mi_oed_equal.py --quick     # too short to mean anything
    python benchmarks/mi_oed_equal.py --starts --output benchmarks/results    # mi_oed_starts.json

Problems, each with a batch of designs: Pyro's example of *working memory* (is a list of this length
recalled? truth by quadrature), its example of an *A/B test* by regression (how many of ten
participants in the first group? closed form), the same *regression with little noise*, where an
experiment tells 10 nats (closed form), and *two sides*, a parabola seen with little noise, whose
posteriors have two narrow modes that no guide here can hold (quadrature).

Every method gets the same budget of evaluations of log p(y | theta, d) per design, training
included. A value with its gradient counts as three: that is what the chains of ``ais_eig`` use, in
the pilot and in both directions. ``ais_eig(budget=)`` chooses pairs, draws, steps and start by
itself; a second row has chains of 30 steps from the prior throughout. NMC has N = M^2; VNMC and the posterior bound spend half of the
budget on training; Donsker-Varadhan evaluates no density: its training pairs are counted. Each
call is repeated with other seeds: what is reported is the mean error over seeds and the root mean
square over designs, with the standard error of the mean over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.contrib.oed import eig
from torch import Tensor, nn

import pyro_anneal
from pyro_anneal.oed import ais_eig


@dataclass(frozen=True)
class Problem:
    """A model of designs, its guide family for posterior bounds, and the truth."""

    model: Callable[[Tensor], Any]
    design: Tensor
    target: str
    guide: Callable[[], nn.Module]  # maps y and design to a distribution of the target
    truth: Tensor
    num_designs: int


def recall(design: Tensor) -> Tensor:
    with pyro.plate_stack("designs", design.shape):
        capacity = pyro.sample("capacity", dist.Normal(7.0, 2.0))
        return pyro.sample("y", dist.Bernoulli(logits=2.0 * (capacity - design)))


class RecallGuide(nn.Module):
    """A normal for each design and each answer, as in Pyro's tutorial."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(7.0 * torch.ones(2, count))
        self.log_scale = nn.Parameter(math.log(2.0) * torch.ones(2, count))

    def forward(self, y: Tensor, design: Tensor) -> dist.Distribution:
        mean = torch.where(y > 0, self.mean[1], self.mean[0])
        scale = torch.where(y > 0, self.log_scale[1], self.log_scale[0]).exp()
        return dist.Normal(mean, scale)


def recall_truth(design: Tensor) -> Tensor:
    grid = np.linspace(-9.0, 23.0, 20001)
    prior = np.exp(-0.5 * ((grid - 7.0) / 2.0) ** 2) / math.sqrt(8.0 * math.pi)
    step = grid[1] - grid[0]

    def entropy(p: Any) -> Any:
        p = np.clip(p, 1e-300, 1.0 - 1e-16)
        return -p * np.log(p) - (1.0 - p) * np.log1p(-p)

    gains = []
    for value in design.tolist():
        p = 1.0 / (1.0 + np.exp(-2.0 * (grid - value)))
        gains.append(entropy((prior * p).sum() * step) - (prior * entropy(p)).sum() * step)
    return torch.tensor(gains)


def groups(counts: Tensor) -> Tensor:
    """Design matrices of ten participants, [designs, 10, 2]."""
    first = (torch.arange(10) < counts.unsqueeze(-1)).to(torch.get_default_dtype())
    return torch.stack([first, 1.0 - first], -1)


def regression(noise: float) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    scales = torch.tensor([10.0, 2.5])

    def model(design: Tensor) -> Tensor:
        with pyro.plate_stack("designs", design.shape[:-2]):
            weight = pyro.sample("weight", dist.Normal(torch.zeros(2), scales).to_event(1))
            mean = (design @ weight.unsqueeze(-1)).squeeze(-1)
            return pyro.sample("y", dist.Normal(mean, noise).to_event(1))

    design = groups(torch.tensor([1, 3, 5, 7, 9]))
    inner = torch.eye(10) + design @ scales.square().diag() @ design.mT / noise**2
    return model, 0.5 * inner.logdet()


class RegressionGuide(nn.Module):
    """A diagonal normal about a linear map of y, for each design."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(count, 2, 10))
        self.log_scale = nn.Parameter(torch.ones(count, 2))

    def forward(self, y: Tensor, design: Tensor) -> dist.Distribution:
        mean = (self.gain @ y.unsqueeze(-1)).squeeze(-1)
        return dist.Normal(mean, self.log_scale.exp()).to_event(1)


def problems() -> dict[str, Problem]:
    lengths = torch.tensor([4.0, 6.0, 7.0, 8.0, 10.0])
    found = {
        "working memory": Problem(
            recall, lengths, "capacity", lambda: RecallGuide(5), recall_truth(lengths), 5
        )
    }
    for name, noise in (("A/B test", 1.0), ("regression, little noise", 0.05)):
        model, truth = regression(noise)
        design = groups(torch.tensor([1, 3, 5, 7, 9]))
        found[name] = Problem(model, design, "weight", lambda: RegressionGuide(5), truth, 5)
    centres = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0])
    found["two sides"] = Problem(
        parabola, centres, "theta", lambda: ScalarGuide(5), parabola_truth(centres), 5
    )
    return found


def parabola(design: Tensor) -> Tensor:
    with pyro.plate_stack("designs", design.shape):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        return pyro.sample("y", dist.Normal((theta - design).square(), 0.02))


def parabola_truth(design: Tensor) -> Tensor:
    theta = np.linspace(-7.0, 7.0, 14001)
    prior = np.exp(-0.5 * theta**2) / math.sqrt(2.0 * math.pi) * (theta[1] - theta[0])
    gains = []
    for value in design.tolist():
        mean = (theta - value) ** 2
        # In the square root of y the marginal is smooth up to the noise at the bottom.
        y = np.concatenate([np.linspace(-0.2, 1.0, 6001), np.linspace(1.0, 90.0, 20001)[1:]])
        marginal = np.zeros_like(y)
        for part in np.array_split(np.arange(len(y)), 400):
            near = np.abs(y[part][:, None] - mean) < 0.2
            used = near.any(0)
            gap = (y[part][:, None] - mean[used]) / 0.02
            density = np.exp(-0.5 * gap**2) / (0.02 * math.sqrt(2.0 * math.pi))
            marginal[part] = density @ prior[used]
        entropy = -np.trapezoid(marginal * np.log(np.maximum(marginal, 1e-300)), y)
        gains.append(entropy - 0.5 * math.log(2.0 * math.pi * math.e * 0.02**2))
    return torch.tensor(gains)


class ScalarGuide(nn.Module):
    """A normal about a linear map of y, for each design."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(count))
        self.offset = nn.Parameter(torch.zeros(count))
        self.log_scale = nn.Parameter(torch.zeros(count))

    def forward(self, y: Tensor, design: Tensor) -> dist.Distribution:
        return dist.Normal(self.gain * y + self.offset, self.log_scale.exp())


class Critic(nn.Module):
    def __init__(self, y_dim: int, dim: int, count: int) -> None:
        super().__init__()
        width = y_dim + dim + count
        self.net = nn.Sequential(
            nn.Linear(width, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)
        )
        self.which = torch.eye(count)

    def forward(self, y: Tensor, target: Tensor) -> Tensor:
        which = self.which.expand(*y.shape[:-1], len(self.which))
        return self.net(torch.cat([y, target, which], -1)).squeeze(-1)


def theirs(problem: Problem, budget: int, seed: int) -> dict[str, Tensor]:
    """Runs Pyro's estimators, each within the budget per design."""
    pyro.set_rng_seed(seed)
    labels = {"observation_labels": ["y"], "target_labels": [problem.target]}
    found = {}
    inner = round(budget ** (1 / 3))
    found["NMC (upper)"] = eig.nmc_eig(
        problem.model, problem.design, N=budget // (inner + 1), M=inner, **labels
    )

    def guided(method: Callable[..., Tensor], **options: Any) -> Tensor:
        pyro.clear_param_store()
        module = problem.guide()

        def guide(y_dict, design, observation_labels, target_labels):
            pyro.module("guide", module)
            rows = design.shape[: design.dim() - problem.design.dim() + 1]
            with pyro.plate_stack("designs", rows):
                pyro.sample(problem.target, module(y_dict["y"], design))

        optim = pyro.optim.Adam({"lr": 0.02})
        return method(problem.model, problem.design, guide=guide, optim=optim, **labels, **options)

    half, batch = budget // 2, 32
    found["posterior (lower)"] = guided(
        eig.posterior_eig,
        num_samples=batch,
        num_steps=half // (3 * batch),
        final_num_samples=half,
    )
    final = max(4, round(half ** (1 / 3)))
    found["VNMC (upper)"] = guided(
        eig.vnmc_eig,
        num_samples=(batch, 4),
        num_steps=half // (3 * batch * 5),
        final_num_samples=(half // (final + 1), final),
    )
    pyro.clear_param_store()
    is_scalar = problem.design.dim() == 1
    critic = Critic(1 if is_scalar else 10, 1 if is_scalar else 2, problem.num_designs)

    def score(design, trace, observation_labels, target_labels):
        pyro.module("critic", critic)
        values = [trace.nodes[name]["value"] for name in ("y", problem.target)]
        return critic(*[v.unsqueeze(-1) if is_scalar else v for v in values])

    found["Donsker-Varadhan (none)"] = eig.donsker_varadhan_eig(
        problem.model,
        problem.design,
        num_samples=batch,
        num_steps=half // (3 * batch),
        T=score,
        optim=pyro.optim.Adam({"lr": 5e-3}),
        final_num_samples=half,
        **labels,
    )
    return {name: value.detach() for name, value in found.items()}


def ours(problem: Problem, budget: int, seed: int) -> tuple[dict[str, Tensor], str]:
    """Runs ais_eig, which spends the budget as it sees fit; returns how."""
    result = ais_eig(problem.model, problem.design, "y", problem.target, budget=budget, seed=seed)
    values = {"ais_eig, lower": result.lower, "ais_eig, upper": result.upper}
    return values, result.notes[0]


def annealed(problem: Problem, budget: int, seed: int) -> dict[str, Tensor]:
    """Runs ais_eig with chains of 30 steps and as many pairs as the budget allows."""
    num_chains, num_steps = 8, 30

    def call(num_pairs: int) -> Any:
        return ais_eig(
            problem.model,
            problem.design,
            "y",
            problem.target,
            num_pairs=num_pairs,
            num_chains=num_chains,
            num_steps=num_steps,
            guide=None,
            seed=seed,
        )

    # The pilot moves 16 chains of each pair, or as many as the run has.
    gradients = call(2).provenance.gradients
    cost = 3 * (16 * gradients.get("pilot", 0) + num_chains * gradients["chains"])
    result = call(max(2, budget // cost))
    return {"chains, lower": result.lower, "chains, upper": result.upper}


def starts(folder: Path | None) -> None:
    """Compares gaps from the prior, from a fitted start, and from the better of both, at one T."""
    record: dict[str, Any] = {}
    for name, problem in problems().items():
        record[name] = {}
        for guide in (None, "auto", "best"):
            began = time.process_time()
            options: dict[str, Any] = {"num_pairs": 100, "num_steps": 30, "seed": 0}
            found = ais_eig(
                problem.model, problem.design, "y", problem.target, guide=guide, **options
            )
            record[name]["prior" if guide is None else guide] = {
                "gap": [round(v, 4) for v in found.gap.tolist()],
                "lower_error": [round(v, 4) for v in (found.lower - problem.truth).tolist()],
                "upper_error": [round(v, 4) for v in (found.upper - problem.truth).tolist()],
                "notes": list(found.notes[:1]),
                "cpu_seconds": round(time.process_time() - began, 2),
            }
        print(name, json.dumps(record[name]), flush=True)
    if folder is not None:
        (folder / "mi_oed_starts.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=int, default=100_000, help="evaluations per design")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--starts", action="store_true", help="compare starts, and nothing else")
    parser.add_argument("--output", type=Path, help="folder for a JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.starts:
        warnings.simplefilter("ignore")
        starts(args.output)
        return
    if args.quick:
        args.budget, args.seeds = 20_000, 2
    record: dict[str, Any] = {
        "budget": args.budget,
        "seeds": args.seeds,
        "versions": {
            "pyro_anneal": pyro_anneal.__version__,
            "pyro": pyro.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "problems": {},
    }
    warnings.simplefilter("ignore")
    for name, problem in problems().items():
        errors: dict[str, list[Tensor]] = {}
        seconds: dict[str, float] = {}
        spent = []
        for seed in range(args.seeds):
            began = time.process_time()
            values, cost = ours(problem, args.budget, seed)
            spent.append(cost)
            seconds["ais_eig"] = seconds.get("ais_eig", 0.0) + time.process_time() - began
            began = time.process_time()
            values |= theirs(problem, args.budget, seed)
            values |= annealed(problem, args.budget, seed)
            seconds["pyro"] = seconds.get("pyro", 0.0) + time.process_time() - began
            for method, value in values.items():
                errors.setdefault(method, []).append(value.double() - problem.truth.double())
        rows = {}
        for method, found in errors.items():
            table = torch.stack(found)  # [seeds, designs]
            spread = table.mean(1).std() / len(table) ** 0.5
            rows[method] = {
                "mean_error": float(table.mean()),
                "std_error": float(spread),
                "rms_error": float(table.square().mean().sqrt()),
            }
            print(f"{name:<26}{method:<26}", {k: round(v, 4) for k, v in rows[method].items()})
        record["problems"][name] = {
            "truth": problem.truth.tolist(),
            "choices_of_ais_eig": spent,
            "cpu_seconds": seconds,
            "methods": rows,
        }
        print(f"{name}: {spent}, seconds {seconds}", flush=True)
        if args.output is not None:
            args.output.mkdir(parents=True, exist_ok=True)
            text = json.dumps(record, indent=1) + "\n"
            (args.output / "mi_oed_equal.json").write_text(text)


if __name__ == "__main__":
    main()
