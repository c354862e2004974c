"""Energy-inspired models on three synthetic densities: training, held-out bounds and the figure.

Setting: Lawson et al. (2019), App. D.1: energies with two layers of 20 tanh units, proposal N(0, I),
K = T = 1024 for SNIS and TRS, 5 leapfrog steps for HIS, batch 128, Adam. The paper trains at a
constant 3e-4; here the learning rate starts at 1e-2 (HIS: 5e-3) and decays by a cosine, which takes
minutes on one core. Two choices speed up training without changing the class of energies: inputs
are divided by the target's scale, and the units of the first layer start spread over the plane.

    python benchmarks/eim.py train              # nine runs, benchmarks/results/eim_*.json
    python benchmarks/eim.py sweep              # K and T sweeps on nine Gaussians (as Fig. 3)
    python benchmarks/eim.py figure             # benchmarks/results/eim_densities.png (as Fig. 2)
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import torch
from torch import nn
from versions import versions

from pyro_anneal.eim import HIS, LARS, SNIS, TRS, Leapfrog

RESULTS = Path(__file__).parent / "results"
MODELS = Path(__file__).parent / "cache"  # grids for the figure; not kept in the repository


class NineGaussians:
    """Equal mixture of nine normals of variance 0.01 at {-1, 0, 1}^2."""

    name, title, scale, extent = "nine_gaussians", "nine Gaussians", 1.0, 2.0

    def __init__(self):
        centers = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 2)
        self.distribution = dist.MixtureSameFamily(
            dist.Categorical(torch.ones(9)), dist.Normal(centers, 0.1).to_event(1)
        )

    def sample(self, n):
        """Draws n points."""
        return self.distribution.sample((n,))

    def log_density(self, x):
        """Log density in nats."""
        return self.distribution.log_prob(x)


class Checkerboard:
    """Uniform on eight squares of side 0.25, alternating on a 4 by 4 board of side 1."""

    name, title, scale, extent = "checkerboard", "checkerboard", 0.25, 0.75

    def sample(self, n):
        """Draws n points."""
        cell = torch.randint(0, 8, (n,))
        row = cell // 2
        column = 2 * (cell % 2) + row % 2
        corner = torch.stack([row, column], -1) * 0.25 - 0.5
        return corner + 0.25 * torch.rand(n, 2)

    def log_density(self, x):
        """Log density in nats."""
        cell = torch.floor((x + 0.5) / 0.25)
        inside = ((cell >= 0) & (cell < 4)).all(-1) & (cell.sum(-1) % 2 == 0)
        return torch.where(inside, math.log(2.0), -torch.inf)


class TwoRings:
    """Density proportional to N(|x|; 0.6, 0.1) + N(|x|; 1.3, 0.1): 0.1 is a standard deviation."""

    name, title, scale, extent = "two_rings", "two rings", 1.0, 2.0
    radii, width = (0.6, 1.3), 0.1

    def __init__(self):
        self.grid = torch.linspace(0.0, 2.5, 20_001, dtype=torch.float64)
        mass = self.grid * self._profile(self.grid).exp() * 2.0 * math.pi
        self.log_normalizer = float(torch.trapezoid(mass, self.grid).log())
        cumulative = torch.cumulative_trapezoid(mass, self.grid)
        self.cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), cumulative])

    def _profile(self, radius):
        rings = [dist.Normal(r, self.width).log_prob(radius) for r in self.radii]
        return torch.logaddexp(*rings)

    def sample(self, n):
        """Draws n points."""
        level = np.random.default_rng(torch.randint(2**31, ()).item()).random(n)
        cumulative = self.cumulative / self.cumulative[-1]
        radius = torch.as_tensor(np.interp(level, cumulative, self.grid), dtype=torch.float32)
        angle = 2.0 * math.pi * torch.rand(n)
        return radius.unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], -1)

    def log_density(self, x):
        """Log density in nats."""
        return self._profile(x.norm(dim=-1)) - self.log_normalizer


TARGETS = {t.name: t for t in (NineGaussians(), Checkerboard(), TwoRings())}


def attainable(target, num=3000):
    """Minus the entropy, by the midpoint rule on a square that holds the mass."""
    side = 2.0 * target.extent
    ticks = (torch.arange(num, dtype=torch.float64) + 0.5) / num * side - target.extent
    total = 0.0
    for row in ticks.split(500):
        x = torch.stack(torch.meshgrid(row, ticks, indexing="ij"), -1)
        log_density = target.log_density(x)
        total += float(torch.special.xlogy(log_density.exp(), log_density.exp()).sum())
    return total * (side / num) ** 2


class Net(nn.Module):
    """Two layers of 20 tanh units on inputs divided by the target's scale.

    The first layer starts with steps of random direction and slope ``spread`` through random
    points of the square [-2, 2]^2. The usual start puts them all near the origin, and the outer
    squares of the checkerboard then take very long to be seen.
    """

    def __init__(self, scale, outputs=1, *, accept=False, spread=4.0):
        super().__init__()
        self.scale, self.accept = scale, accept
        self.layers = nn.Sequential(
            nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, outputs)
        )
        self.outputs = outputs
        with torch.no_grad():
            weight = nn.functional.normalize(torch.randn(20, 2), dim=1) * spread
            point = 4.0 * torch.rand(20, 2) - 2.0
            self.layers[0].weight.copy_(weight)
            self.layers[0].bias.copy_(-(weight * point).sum(1))
            self.layers[2].weight.mul_(0.75 * spread)

    def forward(self, x):
        """The energy or log acceptance, or several outputs."""
        value = self.layers(x / self.scale)
        if self.outputs > 1:
            return value
        value = value.squeeze(-1)
        return nn.functional.logsigmoid(value) if self.accept else value


class Model(nn.Module):
    """The learned parts of one method; ``distribution()`` builds it from their current values."""

    def __init__(self, method, scale, size):
        super().__init__()
        self.method, self.size = method, size
        spread = 3.0 if method == "his" else 4.0
        self.net = Net(scale, accept=method in ("trs", "lars"), spread=spread)
        if method == "his":
            self.momentum = Net(scale, outputs=4, spread=spread)
            self.leapfrog = Leapfrog(size, (2,), step_size=0.2 * scale**0.5, tempering=0.9)
        if method == "lars":
            self.logit = nn.Parameter(torch.zeros(()))

    def momentum_guide(self, x):
        """The guide q(momentum | x) of HIS."""
        loc, raw = self.momentum(x).chunk(2, -1)
        return dist.Normal(loc, nn.functional.softplus(raw) + 1e-5).to_event(1)

    def distribution(self):
        """The sampler-induced distribution."""
        base = dist.Normal(torch.zeros(2), 1.0, validate_args=False).to_event(1)
        options = {"share_proposals": True, "validate_args": False}
        if self.method == "snis":
            return SNIS(base, self.net, self.size, **options)
        if self.method == "trs":
            return TRS(base, self.net, self.size, **options)
        if self.method == "lars":
            log_normalizer = nn.functional.logsigmoid(self.logit)
            return LARS(base, self.net, self.size, log_normalizer=log_normalizer, **options)
        return HIS(
            base,
            self.net,
            self.size,
            self.momentum_guide,
            step_size=self.leapfrog.step_size,
            log_tempering=self.leapfrog.log_tempering,
            **options,
        )


def evaluate(model, target, num_points, num_particles):
    """Held-out bound and its mean distance below the target's density, each with its error."""
    points, parts = target.sample(num_points), []
    with torch.no_grad():
        for part in points.split(250 if model.method == "his" else num_points):
            distribution = model.distribution()
            parts.append(distribution.log_prob_bound(part, num_particles))
    bound = torch.cat(parts)
    # On the same points: the noise of the points cancels, what remains is a divergence.
    gap = target.log_density(points) - bound
    return [(float(v.mean()), float(v.std() / math.sqrt(num_points))) for v in (bound, gap)]


def train(target, method, size, *, num_steps, batch, learning_rate, seed, quick=False):
    """Trains one model; returns its record and the model."""
    torch.manual_seed(seed)
    model = Model(method, target.scale, size)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, num_steps, 1e-2 * learning_rate
    )
    curve, start = [], time.perf_counter()
    for step in range(num_steps):
        if step % max(1, num_steps // 20) == 0:
            curve.append([step, round(evaluate(model, target, 1000, 20)[1][0], 4)])
        loss = -model.distribution().log_prob(target.sample(batch)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - start
    points, particles = (1000, 50) if quick else (10_000 if method != "his" else 2000, 1000)
    (bound, error), (gap, gap_error) = evaluate(model, target, points, particles)
    best = attainable(target)
    record = {
        "target": target.name,
        "method": method,
        "size": size,
        "bound": bound,
        "standard_error": error,
        "attainable": best,
        "gap": gap,
        "gap_standard_error": gap_error,
        "num_points": points,
        "num_particles": particles,
        "num_steps": num_steps,
        "batch": batch,
        "learning_rate": learning_rate,
        "seed": seed,
        "seconds": round(seconds, 1),
        "versions": versions(),
        "gap_curve": [*curve, [num_steps, round(gap, 4)]],
    }
    print(
        f"{target.name:15s} {method:5s} {size:5d}: bound {bound:8.4f} +- {error:.4f}, attainable "
        f"{best:8.4f}, gap {gap:.4f} +- {gap_error:.4f}, {seconds:.0f} s",
        flush=True,
    )
    return record, model


def density_grid(model, target, num=120, num_particles=200):
    """Learned density on a grid: exp of the bound, which is unbiased."""
    ticks = (torch.arange(num) + 0.5) / num * 2.0 * target.extent - target.extent
    points = torch.cartesian_prod(ticks, ticks)
    with torch.no_grad():
        parts = [
            model.distribution().log_prob_bound(part, num_particles).exp()
            for part in points.split(600 if model.method == "his" else len(points))
        ]
    return torch.cat(parts).reshape(num, num).T.numpy()  # rows are the second coordinate


def run_training(args):
    MODELS.mkdir(exist_ok=True)
    for name in args.targets:
        for method in args.methods:
            size = 5 if method == "his" else args.size
            record, model = train(
                TARGETS[name],
                method,
                size,
                num_steps=args.num_steps,
                batch=args.batch,
                learning_rate=args.learning_rate or (5e-3 if method == "his" else 1e-2),
                seed=args.seed,
                quick=args.quick,
            )
            torch.save(model.state_dict(), MODELS / f"{name}_{method}.pt")
            np.save(MODELS / f"{name}_{method}.npy", density_grid(model, TARGETS[name]))
            path = RESULTS / f"eim_{name}_{method}.json"
            path.write_text(json.dumps(record, indent=1) + "\n")


def run_sweep(args):
    """K of SNIS, T of TRS and T of HIS on nine Gaussians: held-out bounds, as in Fig. 3."""
    sizes = {"snis": [4, 16, 64, 256, 1024], "trs": [4, 16, 64, 256, 1024], "his": [1, 2, 5, 10]}
    records = []
    for method in args.methods:
        for size in sizes.get(method, []):
            record, _ = train(
                TARGETS["nine_gaussians"],
                method,
                size,
                num_steps=args.num_steps,
                batch=args.batch,
                learning_rate=args.learning_rate or (5e-3 if method == "his" else 1e-2),
                seed=args.seed,
                quick=args.quick,
            )
            del record["gap_curve"]
            records.append(record)
            (RESULTS / "eim_sweep.json").write_text(json.dumps(records, indent=1) + "\n")


def run_figure(args):
    """Targets against learned densities, one row each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    methods = ["target", "trs", "snis", "his"]
    figure, axes = plt.subplots(3, 4, figsize=(8.0, 6.4))
    for row, target in zip(axes, TARGETS.values(), strict=True):
        num = 120
        ticks = (torch.arange(num) + 0.5) / num * 2.0 * target.extent - target.extent
        points = torch.cartesian_prod(ticks, ticks)
        truth = target.log_density(points).exp().reshape(num, num).T.numpy()
        for axis, method in zip(row, methods, strict=True):
            grid, title = truth, f"{target.title}\n{attainable(target):.3f} nats"
            if method != "target":
                path = RESULTS / f"eim_{target.name}_{method}.json"
                record = json.loads(path.read_text())
                grid = np.load(MODELS / f"{target.name}_{method}.npy")
                title = f"{method.upper()}\n{record['bound']:.3f} nats"
            axis.imshow(grid, origin="lower", vmin=0.0, vmax=truth.max(), cmap="magma")
            axis.set_title(title, fontsize=9)
            axis.set_xticks([])
            axis.set_yticks([])
    figure.tight_layout()
    figure.savefig(RESULTS / "eim_densities.png", dpi=80)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["train", "sweep", "figure"])
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--methods", nargs="*", default=["trs", "snis", "his"])
    parser.add_argument("--size", type=int, default=1024, help="K of SNIS and T of TRS")
    parser.add_argument("--num-steps", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="small evaluation, to try things")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    {"train": run_training, "sweep": run_sweep, "figure": run_figure}[args.command](args)


if __name__ == "__main__":
    main()
