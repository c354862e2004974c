"""What is knowing a density worth? Estimators of mutual information on tasks with known answers.

    python benchmarks/mi_tasks.py --output benchmarks/results    # half an hour of one thread
    python benchmarks/mi_tasks.py --table benchmarks/results/mi_tasks.json

Tasks with known marginals, as in the benchmark of Czyz et al. (2023), *Beyond Normal: On the
Evaluation of Mutual Information Estimators*: bivariate normal of correlation .75 (also with one side
cubed), dense normal of 5 + 5 dimensions, two correlated pairs among 3 + 3, Student-t with two
degrees of freedom, the "X" mixture, and 20 + 20 correlated dimensions with I = 2 and 6.

Joint samples only: InfoNCE and MINE (Donsker-Varadhan, no direction) with an MLP critic, and KSG
(Kraskov, Stoegbauer and Grassberger, 2004, Eq. 8, with 3 neighbours, from scipy). With p(z): GIWAE
and MINE-AIS, the latter also with a learned likelihood (a mixture of two normals given z, of full
covariance) as critic. With the full joint: AIS from the prior. Each trains on the same 4000 pairs, and all
but KSG, which sees the training pairs, are measured on the same 1000 fresh ones. The marginal of x is
known too, so each value is compared with the mean of log p(x|z) / p(x) over the very pairs it was measured
on (I itself for KSG): what remains is the error of the method and not that of the pairs.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from scipy.spatial import cKDTree
from scipy.special import digamma
from torch import Tensor, nn

import pyro_anneal
from pyro_anneal import mi


@dataclass(frozen=True)
class Task:
    """A joint with known mutual information; ``warp`` is a monotone map of x, which keeps I."""

    joint: mi.DistributionJoint
    marginal: dist.Distribution  # of x before the map
    truth: float
    x_dim: int
    z_dim: int
    warp: Callable[[Tensor], Tensor] = lambda x: x

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        x, z = self.joint.sample(count)
        return self.warp(x), z

    def information(self, x: Tensor, z: Tensor) -> Tensor:
        """Computes log p(x|z) / p(x) of each pair, with x before the map."""
        return self.joint.log_likelihood(x, z) - self.marginal.log_prob(x)


def gaussian(cross: Tensor, z_cov: Tensor, x_cov: Tensor) -> Task:
    """Jointly normal z and x with zero mean; ``cross`` is Cov(x, z)."""
    gain = torch.linalg.solve(z_cov, cross.mT).mT
    noise = torch.linalg.cholesky(x_cov - gain @ cross.mT)
    prior = dist.MultivariateNormal(torch.zeros(len(z_cov)), z_cov)
    truth = 0.5 * (x_cov.logdet() - 2.0 * noise.diagonal().log().sum())
    joint = mi.DistributionJoint(
        prior, lambda z: dist.MultivariateNormal(z @ gain.mT, scale_tril=noise)
    )
    marginal = dist.MultivariateNormal(torch.zeros(len(x_cov)), x_cov)
    return Task(joint, marginal, float(truth), len(x_cov), len(z_cov))


def student() -> Task:
    """Multivariate Student-t of 2 + 2 dimensions, identity dispersion, 2 degrees of freedom."""
    prior = dist.MultivariateStudentT(torch.tensor(2.0), torch.zeros(2), torch.eye(2))

    def likelihood(z: Tensor) -> dist.Distribution:
        spread = ((2.0 + z.square().sum(-1)) / 4.0).sqrt()  # given z: 4 degrees of freedom
        tril = spread[..., None, None] * torch.eye(2)
        return dist.MultivariateStudentT(torch.full_like(spread, 4.0), torch.zeros(2), tril)

    return Task(mi.DistributionJoint(prior, likelihood), prior, 0.193147, 2, 2)


def crossed() -> Task:
    """Equal mixture of bivariate normals of correlation .9 and -.9."""
    prior = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    spread = math.sqrt(1.0 - 0.81)

    def likelihood(z: Tensor) -> dist.Distribution:
        parts = dist.Normal(torch.stack([0.9 * z, -0.9 * z], -1), spread)
        weights = dist.Categorical(torch.full((2,), 0.5).expand(*z.shape, 2))
        return dist.MixtureSameFamily(weights, parts).to_event(1)

    return Task(mi.DistributionJoint(prior, likelihood), prior, 0.408443, 1, 1)


def tasks() -> dict[str, Task]:
    rho = torch.tensor([[0.75]])
    one = torch.eye(1)
    pair = gaussian(rho, one, one)
    dense = 0.5 * torch.ones(5, 5) + 0.5 * torch.eye(5)
    sparse = torch.diag(torch.tensor([0.8, 0.8, 0.0]))
    found = {
        "normal, .75": pair,
        "normal, .75, x cubed": Task(pair.joint, pair.marginal, pair.truth, 1, 1, lambda x: x**3),
        "dense normal, 5 + 5": gaussian(0.5 * torch.ones(5, 5), dense, dense),
        "two pairs, 3 + 3": gaussian(sparse, torch.eye(3), torch.eye(3)),
        "Student-t, 2 + 2": student(),
        "X": crossed(),
    }
    for nats, correlation in ((2, 0.425757), (6, 0.671706)):
        eye = torch.eye(20)
        found[f"normal, 20 + 20, I = {nats}"] = gaussian(correlation * eye, eye, eye)
    return found


class Guide(nn.Module):
    """q(z|x) = N(m(x), diag s(x)^2), a small network."""

    def __init__(self, x_dim: int, z_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(x_dim, 2 * z_dim)
        self.net = nn.Sequential(
            nn.Linear(x_dim, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 2 * z_dim)
        )

    def forward(self, x: Tensor) -> dist.Distribution:
        squashed = x.asinh()  # tails of x cubed and of Student-t
        loc, scale = (self.linear(squashed) + self.net(squashed)).chunk(2, -1)
        return dist.Normal(loc, nn.functional.softplus(scale) + 1e-3).to_event(1)


class Likelihood(nn.Module):
    """r(x|z): a mixture of two normals of full covariance, of the asinh of x."""

    def __init__(self, x_dim: int, z_dim: int) -> None:
        super().__init__()
        self.x_dim, self.size = x_dim, x_dim * (x_dim + 3) // 2
        self.linear = nn.Linear(z_dim, 2 * self.size + 2)
        self.net = nn.Sequential(nn.Linear(z_dim, 32), nn.SiLU(), nn.Linear(32, 2 * self.size + 2))
        self.below = torch.tril_indices(x_dim, x_dim)

    def forward(self, z: Tensor) -> dist.Distribution:
        squashed = z.asinh()
        raw = self.linear(squashed) + self.net(squashed)
        parts = raw[..., :-2].unflatten(-1, (2, self.size))
        tril = parts.new_zeros((*parts.shape[:-1], self.x_dim, self.x_dim))
        tril[..., self.below[0], self.below[1]] = parts[..., self.x_dim :]
        diagonal = nn.functional.softplus(tril.diagonal(dim1=-2, dim2=-1) + 0.5) + 1e-3
        tril = tril.tril(-1) + torch.diag_embed(diagonal)
        normals = dist.MultivariateNormal(parts[..., : self.x_dim], scale_tril=tril)
        return dist.MixtureSameFamily(dist.Categorical(logits=raw[..., -2:]), normals)


class OfSquashed(nn.Module):
    """Shows a likelihood critic the asinh of x, whose density r then is."""

    def __init__(self, critic: nn.Module) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        likelihood = self.critic.likelihood(z).log_prob(x.asinh())
        ratio = self.critic.prior.log_prob(z) - self.critic.guide(x).log_prob(z)
        return likelihood + ratio


class Squashed(nn.Module):
    """Shows a critic the asinh of both sides."""

    def __init__(self, critic: nn.Module) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.critic(x.asinh(), z.asinh())


def ksg(x: Tensor, z: Tensor, neighbours: int = 3) -> float:
    """First estimator of Kraskov et al., Eq. 8, in the maximum norm."""
    sides = [np.asarray(v, dtype=float) for v in (x, z)]
    sides = [v / v.std(0) for v in sides]
    both = np.concatenate(sides, 1)
    radius = cKDTree(both).query(both, neighbours + 1, p=np.inf)[0][:, -1]
    total = digamma(neighbours) + digamma(len(both))
    for side in sides:
        counts = cKDTree(side).query_ball_point(
            side, radius * (1 - 1e-12), p=np.inf, return_length=True
        )
        total -= digamma(counts).mean()  # the point itself is counted: n + 1
    return float(total)


def row(
    task: Task, pairs: tuple[Tensor, Tensor], est: mi.MutualInformation, began: float
) -> dict[str, Any]:
    """Records a value, and what it lacks of the information in the same pairs, pair by pair."""
    value = est.plug_in if est.lower is None else est.lower
    error = est.plug_in_std_error if est.lower is None else est.lower_std_error
    known = task.information(*pairs)
    found = {"value": float(value), "std_error": float(error)}
    if est.pair_lower is not None:
        lacks = known - est.pair_lower
        found["deficit"] = float(lacks.mean())
        found["deficit_std_error"] = float(lacks.std() / len(lacks) ** 0.5)
    else:
        found["deficit"] = float(known.mean() - value)
    if est.pair_upper is not None:
        excess = est.pair_upper - known
        found |= {"upper": float(est.upper), "upper_std_error": float(est.upper_std_error)}
        found["excess"] = float(excess.mean())
        found["excess_std_error"] = float(excess.std() / len(excess) ** 0.5)
    found["cpu_seconds"] = time.process_time() - began
    return found | {"findings": [d.name for d in est.diagnostics]}


def measure(task: Task, seed: int, epochs: int) -> dict[str, dict[str, Any]]:
    torch.manual_seed(seed)
    x, z = task.sample(4000)
    unwarped = task.joint.sample(1000)
    fresh = (task.warp(unwarped[0]), unwarped[1])
    rows: dict[str, dict[str, Any]] = {}

    def critic() -> nn.Module:
        return Squashed(mi.ConcatCritic(task.x_dim, task.z_dim, [64, 64]))

    options = {"max_epochs": epochs, "patience": 5, "seed": seed, "progress_bar": False}
    prior = task.joint.prior
    ba = mi.BarberAgakov(prior, Guide(task.x_dim, task.z_dim)).fit(x, z, lr=5e-3, **options)
    ba.guide.requires_grad_(False)
    energy = {"num_chains": 8, "num_steps": 100, "num_moves": 3, "num_negatives": 4}
    began = time.process_time()
    likelihood = Likelihood(task.x_dim, task.z_dim)
    mi.BarberAgakov(None, likelihood).fit(x.asinh(), z, lr=5e-3, **options | {"max_epochs": 40})
    likelihood_seconds = time.process_time() - began
    learned = OfSquashed(mi.LikelihoodCritic(likelihood, prior, ba.guide))
    bounds: dict[str, mi.Bound] = {
        "InfoNCE": mi.InfoNCE(critic()),
        "MINE": mi.MINE_DV(critic()),
        "GIWAE": mi.GIWAE(prior, ba.guide, critic(), 64),
        "MINE-AIS": mi.MINEAIS(prior, ba.guide, critic(), **energy),
        "MINE-AIS, likelihood": mi.MINEAIS(prior, ba.guide, learned, **energy),
    }
    for name, bound in bounds.items():
        began = time.process_time()
        size = 256 if name in ("InfoNCE", "MINE") else 128
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if name == "MINE-AIS, likelihood":  # trained by maximum likelihood
                began -= likelihood_seconds
            else:
                bound.fit(x, z, lr=2e-3, batch_size=size, **options)
            est = bound.estimate(*fresh, seed=seed)
        rows[name] = row(task, unwarped, est, began)
    began = time.process_time()
    value = ksg(x, z)
    seconds = time.process_time() - began
    rows["KSG"] = {"value": value, "deficit": task.truth - value, "cpu_seconds": seconds}
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Given x cubed, I is the same, and so is the posterior: AIS sees x itself.
        est = mi.AIS(task.joint, num_chains=8, num_steps=100).estimate(*unwarped, seed=seed)
    rows["AIS"] = row(task, unwarped, est, began)
    return rows


def show(record: dict[str, Any]) -> None:
    """Prints what each method lacks, means over seeds, as a table of Markdown."""
    names = ["InfoNCE", "MINE", "KSG", "GIWAE", "MINE-AIS", "MINE-AIS, likelihood", "AIS"]
    print("| task | I |", " | ".join(names), "| AIS, upper |")
    print("|---" * (len(names) + 3) + "|")
    for name, entry in record["tasks"].items():
        runs = list(entry["seeds"].values())
        cells = []
        for method in names:
            values = np.array([run[method]["deficit"] for run in runs])
            spread = f" ± {values.std(ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.3f}{spread}")
        upper = np.mean([run["AIS"]["excess"] for run in runs])
        print(f"| {name} | {entry['truth']:.3f} |", " | ".join(cells), f"| {-upper:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--only", help="part of a task's name")
    parser.add_argument("--output", type=Path, help="folder for a JSON file, which is added to")
    parser.add_argument("--table", type=Path, help="show this record, and run nothing")
    args = parser.parse_args()
    if args.table:
        show(json.loads(args.table.read_text()))
        return
    record: dict[str, Any] = {"tasks": {}}
    path = None if args.output is None else args.output / "mi_tasks.json"
    if path is not None and path.exists():
        record = json.loads(path.read_text())
    record["versions"] = {"pyro_anneal": pyro_anneal.__version__, "torch": torch.__version__}
    record["epochs"] = args.epochs
    for seed in args.seeds:
        for name, task in tasks().items():
            entry = record["tasks"].setdefault(name, {"truth": task.truth, "seeds": {}})
            if (args.only and args.only not in name) or str(seed) in entry["seeds"]:
                continue
            rows = entry["seeds"][str(seed)] = measure(task, seed, args.epochs)
            print(f"{name}, seed {seed}: {task.truth:.3f}", end="")
            for method, found in rows.items():
                print(f"  {method} -{found['deficit']:.3f} ({found['cpu_seconds']:.0f} s)", end="")
            print(flush=True)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
