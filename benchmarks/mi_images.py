r"""Mutual information of image decoders: the paper's Fig. 3 and its tables, at a size for one thread.

    python benchmarks/mi_images.py --data mnist --work build --output benchmarks/results
    python benchmarks/mi_images.py --data mnist --work build --only MINE --decoder GAN

Decoders with 20 latents and two hidden layers of 64 units are trained on 10,000 images of MNIST, as the
decoder of a VAE and as the generator of a GAN with an InfoGAN term, and then get Gaussian noise per
pixel, .105 (VAE) and .04 (GAN): x = sigmoid(f(z)) + noise. Pairs are simulated, so their number in
training is not limited. Bounds see, from the least to the most: pairs and p(z) (Barber-Agakov, GIWAE,
MINE-AIS), or the full joint (IWAE, AIS). Each row is measured on the same fresh pairs, and its
deficit from the lower bound of AIS is taken pair by pair.

    python benchmarks/mi_images.py --plot benchmarks/results    # draws the records in that folder

What has been trained is kept in the folder --work; rows are added to the record as they come.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_anneal
from pyro_anneal import mi
from pyro_anneal.datasets import load_mnist

NUM_LATENT, NUM_PIXELS, HIDDEN = 20, 784, 64
NOISE = {"VAE": 0.03 * (784 / 64) ** 0.5, "GAN": 0.04}
PRIOR = dist.Normal(torch.zeros(NUM_LATENT), 1.0).to_event(1)


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(len(sizes) - 1):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class Encoder(nn.Module):
    """A diagonal Gaussian q(z|x)."""

    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.net = mlp(NUM_PIXELS, hidden, hidden, 2 * NUM_LATENT)

    def forward(self, x: Tensor) -> dist.Distribution:
        loc, log_scale = self.net(x).chunk(2, -1)
        return dist.Normal(loc, log_scale.clamp(-7.0, 3.0).exp()).to_event(1)


class Likelihood(nn.Module):
    """A network of its own for r(x|z) = N(sigmoid(g(z)), s^2 I), to be fitted to pairs.

    It knows that pixels lie in [0, 1] but for Gaussian noise, of an unknown scale.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.net = mlp(NUM_LATENT, hidden, hidden, NUM_PIXELS)
        self.log_scale = nn.Parameter(torch.tensor(-1.0))

    def forward(self, z: Tensor) -> dist.Distribution:
        return dist.Normal(self.net(z).sigmoid(), self.log_scale.exp()).to_event(1)


def train_vae(images: Tensor, num_steps: int) -> nn.Module:
    decoder, encoder = mlp(NUM_LATENT, HIDDEN, HIDDEN, NUM_PIXELS), Encoder()
    optimizer = torch.optim.Adam([*decoder.parameters(), *encoder.parameters()], lr=1e-3)
    unit = torch.distributions.Normal(0.0, 1.0)
    for _ in range(num_steps):
        x = images[torch.randint(len(images), (128,))]
        q = encoder(x)
        log_p = dist.Normal(decoder(q.rsample()).sigmoid(), 0.1).to_event(1).log_prob(x)
        kl = torch.distributions.kl_divergence(q.base_dist, unit).sum(-1)
        optimizer.zero_grad()
        (kl - log_p).mean().backward()
        optimizer.step()
    return decoder


def train_gan(images: Tensor, num_steps: int) -> nn.Module:
    """Trains a generator; without the InfoGAN term a small one ignores its latents."""
    generator, judge = mlp(NUM_LATENT, HIDDEN, HIDDEN, NUM_PIXELS), mlp(NUM_PIXELS, 64, 64, 1)
    encoder, noise = Encoder(), 0.1
    for_g = torch.optim.Adam([*generator.parameters(), *encoder.parameters()], lr=1e-3)
    for_d = torch.optim.Adam(judge.parameters(), lr=3e-4, betas=(0.5, 0.999))
    softplus = nn.functional.softplus
    for _ in range(num_steps):
        real = images[torch.randint(len(images), (128,))]
        real = real + noise * torch.randn_like(real)
        z = torch.randn(128, NUM_LATENT)
        fake = generator(z).sigmoid()
        fake = fake + noise * torch.randn_like(fake)
        for_d.zero_grad()
        (softplus(-judge(real)) + softplus(judge(fake.detach()))).mean().backward()
        for_d.step()
        for_g.zero_grad()
        (softplus(-judge(fake)).mean() - 0.1 * encoder(fake).log_prob(z).mean()).backward()
        for_g.step()
    return generator


def train(
    bound: mi.Bound, joint: mi.DistributionJoint, num_steps: int, lr: float, size: int = 100
) -> mi.Bound:
    """Trains on fresh pairs, the learning rate falling to zero along a cosine."""
    optimizer = torch.optim.Adam(bound.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        optimizer.zero_grad()
        bound.loss(*joint.sample(size)).backward()
        optimizer.step()
        schedule.step()
    return bound


class Kept:
    """Networks that were trained before, and how long that took."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(
        self, part: str, network: nn.Module, fit: Callable[[nn.Module], None]
    ) -> tuple[nn.Module, float]:
        path = self.folder / f"{self.name}_{part}.pt"
        if path.exists():
            stored = torch.load(path, weights_only=True)
            network.load_state_dict(stored["state"])
            return network, stored["seconds"]
        began = time.process_time()
        fit(network)
        seconds = time.process_time() - began
        torch.save({"state": network.state_dict(), "seconds": seconds}, path)
        print(f"trained {part} in {seconds:.0f} s", flush=True)
        return network, seconds


def problem(args: argparse.Namespace, kept: Kept) -> tuple[mi.DistributionJoint, Encoder]:
    """Trains or reads the decoder and the Barber-Agakov guide of it."""
    decoder = mlp(NUM_LATENT, HIDDEN, HIDDEN, NUM_PIXELS)

    def fit(network: nn.Module) -> None:
        images = load_mnist(args.data, binarize=False).train[:10000].float()
        trained = {"VAE": train_vae, "GAN": train_gan}[args.decoder](images, 2000)
        network.load_state_dict(trained.state_dict())

    decoder, _ = kept("decoder", decoder, fit)
    decoder.requires_grad_(False)
    noise = NOISE[args.decoder]
    joint = mi.DistributionJoint(
        PRIOR, lambda z: dist.Normal(decoder(z).sigmoid(), noise).to_event(1)
    )
    guide, _ = kept(
        "guide", Encoder(), lambda net: void(train(mi.BarberAgakov(PRIOR, net), joint, 5000, 1e-3))
    )
    assert isinstance(guide, Encoder)
    return joint, guide


def void(_: object) -> None:
    pass


def critics(
    joint: mi.DistributionJoint, guide: Encoder, kept: Kept
) -> dict[str, Callable[[], tuple[nn.Module, Encoder, float]]]:
    """Lists critics by name; each comes with a guide of its own and the seconds spent before."""

    def copy() -> Encoder:
        other = Encoder()
        other.load_state_dict(guide.state_dict())
        return other

    def concat() -> tuple[nn.Module, Encoder, float]:
        other = copy()
        return (
            mi.RelativeCritic(other, mi.ConcatCritic(NUM_PIXELS, NUM_LATENT, [256, 256])),
            other,
            0.0,
        )

    def bilinear() -> tuple[nn.Module, Encoder, float]:
        return (
            mi.SeparableCritic(NUM_PIXELS, NUM_LATENT, [256], num_features=128),
            copy(),
            0.0,
        )

    def likelihood(hidden: int) -> tuple[nn.Module, Encoder, float]:
        other = copy().requires_grad_(False)
        swapped, seconds = kept(
            f"likelihood_{hidden}",
            Likelihood(hidden),
            lambda net: void(train(mi.BarberAgakov(None, net), joint, 10000, 5e-3, 256)),
        )
        return mi.LikelihoodCritic(swapped, PRIOR, other), other, seconds

    return {
        "MLP": concat,
        "separable": bilinear,
        "likelihood": lambda: likelihood(128),
    }


def plot(folder: Path) -> None:
    """Draws the records: lower bounds as bars (Fig. 3a), and bounds over T and K (Fig. 5, 7)."""
    import matplotlib.pyplot as plt

    bars = {
        "Barber-Agakov": "BA",
        "GIWAE, MLP": "GIWAE, K=100, MLP",
        "MINE-AIS, MLP": "MINE-AIS, MLP",
        "IWAE, K = 1000": "IWAE, K=1000",
        "MINE-AIS, likelihood": "MINE-AIS, likelihood, untouched",
        "AIS, T = 3000": "AIS, K=8, T=3000",
    }
    figure, axes = plt.subplots(2, 2, figsize=(9.5, 6.4), layout="constrained")
    for row, decoder in zip(axes, ("VAE", "GAN"), strict=True):
        record = json.loads((folder / f"mi_images_{decoder}.json").read_text())
        rows = record["rows"]
        found = {label: rows[name] for label, name in bars.items() if name in rows}
        places = range(len(found))
        row[0].barh(
            [-place for place in places],
            [r["lower"] for r in found.values()],
            xerr=[2.0 * r["lower_std_error"] for r in found.values()],
            color="#0072B2",
            alpha=0.75,
            ecolor="#555555",
            capsize=2,
        )
        row[0].set_yticks([-place for place in places], list(found))
        upper = rows["AIS, K=8, T=3000"]["upper"]
        row[0].axvline(upper, color="#D55E00", lw=1.2, label="AIS, upper bound")
        row[0].set(xlabel="lower bound on I (nats)", title=f"decoder of a {decoder}")
        row[0].legend(frameon=False, loc="upper right", bbox_to_anchor=(0.93, 1.0), fontsize=8)
        for family, prefix, color in (
            ("AIS over T", "AIS, K=8, T=", "#0072B2"),
            ("IWAE over K", "IWAE, K=", "#999999"),
        ):
            points = sorted(
                (int(name.removeprefix(prefix)), r)
                for name, r in rows.items()
                if name.startswith(prefix)
            )
            size = [count for count, _ in points]
            for side, mark in (("lower", "^-"), ("upper", "v--")):
                values = [r[side] for _, r in points]
                row[1].plot(size, values, mark, color=color, ms=4, label=f"{family}, {side}")
        row[1].set(
            xscale="log",
            yscale="symlog",
            xlabel="T (AIS, K = 8) or K (IWAE)",
            ylabel="bounds on I (nats)",
            title=f"decoder of a {decoder}",
        )
        ticks = [0, 3, 10, 30, 100, 1000]
        row[1].set_yticks(ticks, [str(tick) for tick in ticks])
        row[1].set_ylim(1.0, 2000.0)
        row[1].legend(frameon=False, fontsize=8)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "mi_images.png", dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of MNIST's files")
    parser.add_argument("--work", type=Path, help="folder of trained networks")
    parser.add_argument("--plot", type=Path, help="folder of records to draw, and nothing else")
    parser.add_argument("--decoder", choices=["VAE", "GAN"], default="VAE")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of rows")
    parser.add_argument("--missing", action="store_true", help="leave rows of the record alone")
    parser.add_argument("--train-steps", type=int, default=1500)
    parser.add_argument("--measure-steps", type=int, default=3000)
    parser.add_argument("--num-pairs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for a JSON file")
    args = parser.parse_args()
    if args.plot is not None:
        plot(args.plot)
        return
    if args.data is None or args.work is None:
        parser.error("--data and --work are needed, but for --plot")
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    kept = Kept(args.work, f"{args.decoder}_{args.seed}")
    joint, guide = problem(args, kept)
    torch.manual_seed(args.seed + 1000)
    x, z = joint.sample(args.num_pairs)
    made = critics(joint, guide, kept)
    energy = {"num_moves": 5, "num_leapfrog": 4, "num_negatives": 4, "num_chains": 8}

    def giwae(name: str) -> Callable[[], tuple[mi.Bound, float]]:
        def make() -> tuple[mi.Bound, float]:
            critic, own, seconds = made[name]()
            bound = mi.GIWAE(PRIOR, own, critic, 100)
            steps = args.train_steps if name == "MLP" else 0
            if steps:
                _, more = kept(
                    f"giwae_{name}", bound, lambda net: void(train(bound, joint, steps, 1e-3))
                )
                seconds += more
            return bound, seconds

        return make

    def mine(name: str, steps: int, lr: float) -> Callable[[], tuple[mi.Bound, float]]:
        def make() -> tuple[mi.Bound, float]:
            critic, own, seconds = made[name]()
            bound = mi.MINEAIS(PRIOR, own, critic, num_steps=args.measure_steps, **energy)
            if steps:
                _, more = kept(
                    f"mine_{name}_{steps}",
                    bound,
                    lambda net: void(train(bound, joint, steps, lr, 64)),
                )
                seconds += more
            return bound, seconds

        return make

    def fixed(bound: mi.Bound) -> Callable[[], tuple[mi.Bound, float]]:
        return lambda: (bound, 0.0)

    steps = args.train_steps
    rows: dict[str, Callable[[], tuple[mi.Bound, float]]] = {
        "BA": fixed(mi.BarberAgakov(PRIOR, guide)),
        "structured InfoNCE, K=1000": fixed(mi.StructuredInfoNCE(joint, 1000)),
        "IWAE, K=1": fixed(mi.IWAE(joint, guide, 1)),
        "IWAE, K=100": fixed(mi.IWAE(joint, guide, 100)),
        "IWAE, K=1000": fixed(mi.IWAE(joint, guide, 1000)),
        "GIWAE, K=100, MLP": giwae("MLP"),
        "GIWAE, K=100, likelihood": giwae("likelihood"),
        "MINE-AIS, MLP": mine("MLP", steps, 1e-3),
        "MINE-AIS, separable": mine("separable", steps, 1e-3),
        "MINE-AIS, likelihood, untouched": mine("likelihood", 0, 0.0),
        "MINE-AIS, likelihood, 300 steps": mine("likelihood", 300, 3e-4),
    }
    for length in (10, 100, 1000):
        rows[f"AIS, K=8, T={length}"] = fixed(mi.AIS(joint, num_chains=8, num_steps=length))
    rows[f"AIS, K=8, T={args.measure_steps}"] = fixed(
        mi.AIS(joint, num_chains=8, num_steps=args.measure_steps)
    )
    suffix = f"_{args.seed}" if args.seed else ""
    path = None if args.output is None else args.output / f"mi_images_{args.decoder}{suffix}.json"
    record = {"rows": {}}
    if path is not None and path.exists():
        record = json.loads(path.read_text())
    record |= {
        "decoder": args.decoder,
        "noise": NOISE[args.decoder],
        "seed": args.seed,
        "pairs": args.num_pairs,
        "versions": {
            "pyro_anneal": pyro_anneal.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    for name, make in rows.items():
        if not any(part in name for part in args.only):
            continue
        if args.missing and name in record["rows"]:
            continue
        torch.manual_seed(args.seed + 1)
        bound, training = make()
        began = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            est = bound.estimate(x, z, seed=args.seed)
        row = {"training_cpu_seconds": training, "cpu_seconds": time.process_time() - began}
        for side in ("lower", "upper"):
            if (value := getattr(est, side)) is not None:
                row[side] = float(value)
                row[f"{side}_std_error"] = float(getattr(est, f"{side}_std_error"))
        row["pair_lower"] = [round(v, 4) for v in est.pair_lower.tolist()]
        row |= {k: float(v) for k, v in est.measurements.items()}
        record["rows"][name] = row
        print(
            f"{args.decoder} {name}",
            {k: v for k, v in row.items() if k != "pair_lower"},
            flush=True,
        )
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
