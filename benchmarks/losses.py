"""Cost of one training step: ours against Pyro's RenyiELBO and the authors' own code.

    python benchmarks/losses.py                           # against Pyro
    python benchmarks/losses.py --tvo DIR --aiwae DIR     # also against the authors' code

``--tvo`` takes the folder ``discrete_vae`` of a checkout of vmasrani/tvo, ``--aiwae`` the folder
``script`` of one of xqding/AIWAE. Everything is measured in one process of one thread, the candidates
in turn, in processor time. On a shared machine only ratios mean anything, and the median over rounds of
each round's ratio is what the table gives.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal
from torch import Tensor, nn
from versions import versions

from pyro_anneal.losses import AIWAE, EUBO, IWAE, TVO, DifferentiableAIS, Moments, Tightest
from pyro_anneal.schedules import LogUniform


class VAE(nn.Module):
    """A variational autoencoder of the usual size, 784-200-200-50."""

    def __init__(self, x_dim: int = 784, hidden: int = 200, z_dim: int = 50) -> None:
        super().__init__()
        self.z_dim = z_dim
        self.decoder = nn.Sequential(
            nn.Linear(z_dim, hidden),
            nn.Tanh(),
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            nn.Linear(hidden, x_dim),
        )
        self.encoder = nn.Sequential(
            nn.Linear(x_dim, hidden),
            nn.Tanh(),
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            nn.Linear(hidden, 2 * z_dim),
        )

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.z_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        loc, log_scale = self.encoder(x).chunk(2, dim=-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


Row = dict[str, float]


def race(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, Row]:
    """Times the candidates in turn, each relative to the first of the same round."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    for _ in range(rounds):
        for name, run in candidates.items():
            began = time.process_time()
            run()
            times[name].append(1e3 * (time.process_time() - began))
    reference = next(iter(times.values()))
    return {
        name: {
            "ms": statistics.median(values),
            "ratio": statistics.median(a / b for a, b in zip(values, reference, strict=True)),
            "smallest / smallest": min(values) / min(reference),
        }
        for name, values in times.items()
    }


def against_pyro(rounds: int, batch: int, particles: int) -> dict[str, Row]:
    vae = VAE()
    x = torch.bernoulli(torch.full((batch, 784), 0.3))
    options = {"vectorize_particles": True, "max_plate_nesting": 1}
    fifty = LogUniform(1e-3, partitions=50)
    losses = {
        "Pyro RenyiELBO": RenyiELBO(num_particles=particles, **options),
        "Pyro Trace_ELBO": Trace_ELBO(num_particles=particles, **options),
        "Pyro TraceGraph_ELBO": TraceGraph_ELBO(num_particles=particles, **options),
        "IWAE reparam": IWAE(particles, **options),
        "IWAE dreg": IWAE(particles, "dreg", **options),
        "IWAE vimco": IWAE(particles, "vimco", **options),
        "TVO covariance": TVO(particles, **options),
        "TVO covariance, 2 partitions": TVO(particles, LogUniform(0.05, partitions=2), **options),
        "TVO covariance, 50 partitions": TVO(particles, fifty, **options),
        "TVO moments, 5 partitions": TVO(particles, Moments(5), **options),
        "TVO tightest, 2 partitions": TVO(particles, Tightest(2), **options),
        "TVO reparam": TVO(particles, gradient="reparam", **options),
        "TVO dreg": TVO(particles, gradient="dreg", **options),
        "EUBO importance": EUBO(particles, **options),
        "AIWAE, 4 steps of 5 leapfrogs": AIWAE(particles, 4, compile=False, **options),
    }

    def step(loss: object) -> Callable[[], object]:
        def run() -> None:
            vae.zero_grad()
            loss.loss_and_grads(vae.model, vae.guide, x)

        return run

    return race({name: step(loss) for name, loss in losses.items()}, rounds)


def many_chains(rounds: int, batch: int) -> dict[str, Row]:
    """DifferentiableAIS of 16 chains and of one, beside the bare arithmetic of its decoder.

    The bare step takes the gradient of the log joint at as many points as the path has, and
    differentiates once more through all of them: what no implementation can leave out.
    """
    vae = VAE()
    x = torch.bernoulli(torch.full((batch, 784), 0.3))
    options = {"vectorize_particles": True, "max_plate_nesting": 1}

    def path(chains: int) -> Callable[[], object]:
        loss = DifferentiableAIS(chains, 4, step_size=0.05, **options)
        return lambda: loss.loss_and_grads(vae.model, vae.guide, x)

    def bare(chains: int) -> Callable[[], object]:
        position = torch.randn(chains, batch, 50)

        def run() -> None:
            total: Tensor = torch.zeros(())
            for _ in range(5):
                u = position.clone().requires_grad_()
                logits = vae.decoder(u)
                value = (x * logits - nn.functional.softplus(logits)).sum()
                value = value - 0.5 * u.square().sum()
                (grad,) = torch.autograd.grad(value, u, create_graph=True)
                total = total + value + grad.square().sum()
            total.backward()

        return run

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        log_tau = pyro.sample("log_tau", dist.Normal(0.0, 1.0))
        with pyro.plate("schools", 8):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            pyro.sample(
                "y", dist.Normal(mu + log_tau.exp() * eta, 12.0), obs=4.0 * torch.arange(8.0)
            )

    guide = AutoDiagonalNormal(model)
    guide()

    def small(chains: int) -> Callable[[], object]:
        loss = DifferentiableAIS(chains, 4, step_size=0.05, **options)
        return lambda: loss.loss_and_grads(model, guide)

    candidates = {
        f"{name}, {chains} chain(s)": make(chains)
        for name, make in {"VAE": path, "VAE, bare decoder": bare, "eight schools": small}.items()
        for chains in (1, 16)
    }
    return race(candidates, rounds)


def against_tvo(folder: Path, rounds: int, batch: int, particles: int) -> dict[str, Row]:
    """The authors' thermodynamic loss on their linear belief net of 200 bits."""
    sys.path.insert(0, str(folder))
    import losses as theirs
    import models

    net = models.GenerativeModel(1, 0, 200, 784)
    inference = models.InferenceNetwork(1, 0, 200, 784)
    decoder, encoder = net.decoder_to_obs, inference.encoder_to_obs
    x = torch.bernoulli(torch.full((batch, 784), 0.3))
    partition = torch.tensor([0.0, 0.05, 1.0])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=net.latent_param_logits).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(2 * z - 1)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            logits = encoder((x - 0.5 + 1) / 2)
            pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))

    loss = TVO(particles, partition, vectorize_particles=True, max_plate_nesting=1)

    def ours() -> None:
        loss.loss_and_grads(model, guide, x)

    def authors() -> None:
        value, _ = theirs.get_thermo_loss(net, inference, x, partition, particles)
        value.backward()

    return race({"authors' TVO": authors, "TVO covariance": ours}, rounds)


def against_aiwae(folder: Path, rounds: int, batch: int, particles: int) -> dict[str, Row]:
    """The authors' AIWAE with T = 5 betas and 5 leapfrogs, on the same networks."""
    sys.path.insert(0, str(folder))
    import AIWAE_models

    net = AIWAE_models.AIWAE(784, 50)
    x = torch.bernoulli(torch.full((batch, 784), 0.3))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(50), 1.0).to_event(1))
            logits = net.decoder.transform[:-1](z)  # all but the sigmoid
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc, scale = net.encoder(x)
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    loss = AIWAE(particles, 4, 5, vectorize_particles=True, max_plate_nesting=1, compile=False)
    compiled = AIWAE(particles, 4, 5, vectorize_particles=True, max_plate_nesting=1, compile=True)
    betas = [0.0, 0.25, 0.5, 0.75, 1.0]

    def ours(loss: AIWAE) -> Callable[[], None]:
        return lambda: loss.differentiable_loss(model, guide, x).backward()

    layers = [layer for layer in net.decoder.transform if isinstance(layer, nn.Linear)]
    first, second, last = [layer.weight.detach() for layer in layers]
    position = torch.randn(particles * batch, 50)

    def bare() -> None:
        """The matrix products of the 21 gradients that 4 moves of 5 leapfrogs need, alone."""
        for _ in range(21):
            logits = position @ first.T @ second.T @ last.T
            _ = logits @ last @ second @ first

    def authors() -> None:
        value, _ = net.decoder_loss(x, particles, [0.1] * 5, 5, betas)
        value.mean().backward()
        net.encoder_loss(x).mean().backward()

    candidates = {"authors' AIWAE": authors, "AIWAE": ours(loss), "AIWAE compiled": ours(compiled)}
    return race(candidates | {"matrix products of the chains alone": bare}, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--particles", type=int, default=10)
    parser.add_argument("--tvo", type=Path, help="folder discrete_vae of vmasrani/tvo")
    parser.add_argument("--aiwae", type=Path, help="folder script of xqding/AIWAE")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    tables = {"Pyro RenyiELBO": against_pyro(args.rounds, args.batch, args.particles)}
    chains = many_chains(max(args.rounds // 2, 3), args.batch)
    tables["DifferentiableAIS of a VAE, one chain"] = chains
    if args.tvo is not None:
        tables["authors' TVO"] = against_tvo(args.tvo, 4 * args.rounds, 24, 50)
    if args.aiwae is not None:
        rounds = max(args.rounds // 2, 3)
        tables["authors' AIWAE"] = against_aiwae(args.aiwae, rounds, args.batch, args.particles)
    for reference, table in tables.items():
        print(f"\n{'ms':>9} {'ratio':>7} {'best':>7}  relative to {reference}")
        for name, row in table.items():
            print(
                f"{row['ms']:9.2f} {row['ratio']:7.2f} {row['smallest / smallest']:7.2f}  {name}"
            )
    if args.output is not None:
        record = {"races": tables, "versions": versions(), "rounds": args.rounds, "seed": 0}
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
