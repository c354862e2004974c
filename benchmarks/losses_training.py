"""The table of the AIWAE paper at a small size; ``papers/`` has all experiments at the papers' size.

    python benchmarks/losses_training.py --seeds 0 1 2
    python benchmarks/losses_training.py --mnist FOLDER    # MNIST's gzipped idx files
    python benchmarks/losses_training.py --quick    # everything, too short to mean anything

Data: scikit-learn's digits, 8 x 8, binarized; or MNIST, averaged to 14 x 14 and binarized. Log evidence
of test digits is measured by annealed importance sampling of 16 chains. Networks and run lengths are far
smaller than in the paper; what should carry over is the order of the methods.

Source: Ding and Freedman (2019), Table 1.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from versions import versions

from pyro_anneal import AnnealedImportance
from pyro_anneal.datasets import Digits, load_digits
from pyro_anneal.losses import AIWAE, IWAE

Loss = Callable[[nn.Module, nn.Module, Tensor], Tensor]


def load_mnist(folder: Path) -> Digits:
    """Reads MNIST's own files, averages 2 x 2 pixels and binarizes at half intensity."""

    def read(name: str) -> Tensor:
        with gzip.open(folder / f"{name}-images-idx3-ubyte.gz") as file:
            pixels = torch.frombuffer(bytearray(file.read()[16:]), dtype=torch.uint8)
        images = pixels.reshape(-1, 28, 28).float()
        small = nn.functional.avg_pool2d(images, 2).flatten(1)
        return (small > 127.5).to(torch.get_default_dtype())

    return Digits(train=read("train"), test=read("t10k"))


class Decoder(nn.Module):
    """A deep generative model with Gaussian latents."""

    def __init__(self, z_dim: int, hidden: int, x_dim: int) -> None:
        super().__init__()
        self.z_dim = z_dim
        self.net = nn.Sequential(
            nn.Linear(z_dim, hidden),
            nn.Tanh(),
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            nn.Linear(hidden, x_dim),
        )

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.z_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(1), obs=x)


class Encoder(nn.Module):
    """Its guide, a diagonal Gaussian."""

    def __init__(self, z_dim: int, hidden: int, x_dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(x_dim, hidden),
            nn.Tanh(),
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            nn.Linear(hidden, 2 * z_dim),
        )

    def forward(self, x: Tensor) -> None:
        loc, log_scale = self.net(x).chunk(2, dim=-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def train(
    model: nn.Module, guide: nn.Module, loss: Loss, x: Tensor, steps: int, rate: float
) -> float:
    """Trains by Adam with a rate that falls tenfold; returns milliseconds per step."""
    optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=rate)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1 ** (1.0 / steps))
    began = time.perf_counter()
    for _ in range(steps):
        batch = x[torch.randint(len(x), (100,))]
        optimizer.zero_grad()
        (loss(model, guide, batch) / len(batch)).backward()
        optimizer.step()
        scheduler.step()
    return 1e3 * (time.perf_counter() - began) / steps


def elbo_per_datum(model: nn.Module, guide: nn.Module, x: Tensor) -> float:
    loss = Trace_ELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        return -loss.loss(model, guide, x) / len(x)


METHODS = ("VAE", "IWAE", "AIWAE T=5", "AIWAE T=11")


def autoencoder(
    data: Digits, seed: int, method: str, args: argparse.Namespace
) -> dict[str, float]:
    """Trains one autoencoder at K particles; returns its test NLL, gap and active units."""
    options = {"vectorize_particles": True, "max_plate_nesting": 1}
    loss = {
        "VAE": lambda: Trace_ELBO(num_particles=args.particles, **options),
        "IWAE": lambda: IWAE(args.particles, **options),
        "AIWAE T=5": lambda: AIWAE(args.particles, 4, **options),
        "AIWAE T=11": lambda: AIWAE(args.particles, 10, **options),
    }[method]()
    test = data.test[: args.num_test]
    pyro.set_rng_seed(seed)
    x_dim = test.shape[1]
    model, guide = Decoder(10, 100, x_dim), Encoder(10, 100, x_dim)
    milliseconds = train(model, guide, loss.differentiable_loss, data.train, args.steps, 1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ais = AnnealedImportance(
            model, guide, num_chains=16, num_steps=args.ais_steps, seed=seed, progress_bar=False
        )
        evidence = float(ais.run(test).lower.mean())
    with torch.no_grad():
        means = guide.net(data.train[:5000]).chunk(2, dim=-1)[0]
    return {
        "NLL": -evidence,
        "gap": evidence - elbo_per_datum(model, guide, test),
        "active units": float((means.var(0) > 0.01).sum()),
        "ms": milliseconds,
    }


def aiwae(args: argparse.Namespace) -> list[dict[str, dict[str, float]]]:
    """Runs all seeds and methods that the output file does not hold yet."""
    data = load_digits() if args.mnist is None else load_mnist(args.mnist)
    done: dict[str, Any] = {}  # by seed, and the versions
    if args.output is not None and args.output.exists():
        done = json.loads(args.output.read_text())
    for seed in args.seeds:
        for method in args.methods:
            row = done.setdefault(str(seed), {})
            if method not in row:
                row[method] = autoencoder(data, seed, method, args)
                print(seed, method, {k: round(v, 3) for k, v in row[method].items()}, flush=True)
            if args.output is not None:
                done["versions"] = versions()
                args.output.write_text(json.dumps(done, indent=1) + "\n")
    rows = [row for seed, row in done.items() if seed != "versions"]
    return [row for row in rows if all(method in row for method in args.methods)]


def summarize(runs: list[dict[str, dict[str, float]]]) -> None:
    for name in runs[0]:
        cells = []
        for quantity in runs[0][name]:
            values = [run[name][quantity] for run in runs]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
            cells.append(f"{quantity} {statistics.mean(values):9.3f} +- {error:.3f}")
        print(f"{name:12s}", " | ".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="losses")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--particles", type=int, default=5)
    parser.add_argument("--ais-steps", type=int, default=300)
    parser.add_argument("--num-test", type=int, default=300)
    parser.add_argument("--mnist", type=Path, help="folder of MNIST's files")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.quick:
        args.seeds, args.steps, args.ais_steps, args.num_test = [0], 20, 20, 10
    runs = aiwae(args)
    if runs:
        summarize(runs)


if __name__ == "__main__":
    main()
