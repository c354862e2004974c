"""Energy-inspired priors of a variational autoencoder, at the paper's size.

    python benchmarks/papers/eim_priors.py --images mnist --data FOLDER
    python benchmarks/papers/eim_priors.py --images mnist --data FOLDER --continuous
    python benchmarks/papers/eim_priors.py --images fashion-mnist --data FOLDER    # where a person has it

Setting of section 5.2 of the paper: 50 latents, encoder and decoder of two layers of 300 tanh units,
energies of two layers of 100, a Gaussian proposal, K = T = 1024 for SNIS and TRS, T = 5 leapfrogs for
HIS, Adam on minibatches of 128, the divergence warmed up linearly (``anneal_kl``). Binary images are drawn
anew from the grey ones in each minibatch; ``--continuous`` keeps grey pixels with uniform noise, under
a Gaussian of learned scale per pixel. The paper trains for 10,000,000 steps; ``--steps`` says how many here.

Test evidence is the IWAE bound of ``--num-test`` images: exact weights for the Gaussian prior, for the
others a fresh estimate of the prior's density per particle, which keeps E[w] = p(x) and so a lower bound.

Source: Lawson, Tucker, Dai and Ranganath (2019), *Energy-Inspired Models*, section 5.2, appendix D.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from common import RESULTS, Images, Record, Trainer, load, parser, start, table
from nets import two_layers
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from pyro_anneal.eim import HIS, SNIS, TRS, Leapfrog
from pyro_anneal.losses import anneal_kl

PRIORS = ("gaussian", "snis", "his", "trs")


class Model(nn.Module):
    """A decoder under one of the priors."""

    def __init__(self, prior: str, args: argparse.Namespace, mean: Tensor) -> None:
        super().__init__()
        self.name, self.size = prior, args.leapfrogs if prior == "his" else args.proposals
        self.continuous, self.latents = args.continuous, args.latents
        self.decoder = two_layers(args.latents, args.hidden, len(mean))
        self.decoder[-1].bias.data = torch.logit(mean, eps=1e-3)
        self.log_scale = nn.Parameter(torch.full((len(mean),), -1.5))
        if prior != "gaussian":
            self.net = two_layers(args.latents, args.hidden_energy, 1)
        if prior == "his":
            self.momentum = two_layers(args.latents, args.hidden_energy, 2 * args.latents)
            self.leapfrog = Leapfrog(args.leapfrogs, (args.latents,), step_size=0.05)

    def energy(self, z: Tensor) -> Tensor:
        return self.net(z).squeeze(-1)

    def log_accept(self, z: Tensor) -> Tensor:
        return logsigmoid(self.energy(z))

    def momentum_guide(self, z: Tensor) -> Any:
        loc, raw = self.momentum(z).chunk(2, -1)
        return dist.Normal(loc, softplus(raw + 0.5) + 1e-4).to_event(1)

    def prior(self) -> Any:
        base = dist.Normal(self.log_scale.new_zeros(self.latents), 1.0).to_event(1)
        if self.name == "snis":
            return SNIS(base, self.energy, self.size, share_proposals=True)
        if self.name == "trs":
            return TRS(base, self.log_accept, self.size, share_proposals=True)
        if self.name == "his":
            step, tempering = self.leapfrog.step_size, self.leapfrog.log_tempering
            return HIS(
                base,
                self.energy,
                self.size,
                self.momentum_guide,
                step_size=step,
                log_tempering=tempering,
            )
        return base

    def likelihood(self, z: Tensor) -> Any:
        logits = self.decoder(z)
        if self.continuous:
            return dist.Normal(logits.sigmoid(), self.log_scale.exp() + 1e-3).to_event(1)
        return dist.Bernoulli(logits=logits).to_event(1)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(z), obs=x)


class Guide(nn.Module):
    """A diagonal Gaussian."""

    def __init__(self, args: argparse.Namespace, mean: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.net = two_layers(len(mean), args.hidden, 2 * args.latents)

    def posterior(self, x: Tensor) -> Any:
        loc, raw = self.net(x - self.mean).chunk(2, -1)
        return dist.Normal(loc, softplus(raw) + 1e-3).to_event(1)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(x))


@torch.no_grad()
def log_evidence(model: Model, guide: Guide, x: Tensor, args: argparse.Namespace) -> Tensor:
    """Computes the IWAE bound of each image, nats."""
    parts = []
    prior_particles = 1 if model.name == "his" else args.eval_prior_particles
    for part in x.split(20):
        q, prior = guide.posterior(part), model.prior()
        z = q.sample((args.eval_particles,))
        if model.name == "gaussian":
            log_prior = prior.log_prob(z)
        else:
            log_prior = prior.log_prob_bound(z, prior_particles)
        logs = log_prior + model.likelihood(z).log_prob(part) - q.log_prob(z)
        parts.append(torch.logsumexp(logs, 0) - math.log(args.eval_particles))
    return torch.cat(parts)


def cells(args: argparse.Namespace, images: Images, record: Record) -> None:
    """Trains and judges what the record does not hold yet."""
    mean = images.train.mean(0)
    test = (images if args.continuous else images.binarized()).test[: args.num_test]
    train, test = images.train.to(args.device), test.to(args.device)
    for seed in args.seeds:
        for prior in args.priors:
            cell = {"prior": prior, "seed": seed, "images": args.images}
            cell |= {"pixels": "grey" if args.continuous else "binary"}
            cell |= {"steps": args.steps, "batch": args.batch}
            if record.has(cell):
                continue
            pyro.set_rng_seed(seed)
            model = Model(prior, args, mean).to(args.device)
            guide = Guide(args, mean).to(args.device)
            elbo, weight = Trace_ELBO(), [0.0]

            def loss(
                model: nn.Module,
                guide: nn.Module,
                x: Tensor,
                elbo: Any = elbo,
                weight: Any = weight,
            ) -> Tensor:
                pair = anneal_kl(model, guide, lambda: weight[0])
                return elbo.differentiable_loss(*pair, x)

            def warm(step: int, weight: Any = weight) -> None:
                weight[0] = min(1.0, (step + 1) / max(1.0, args.warm_up * args.steps))

            place = None
            if args.checkpoints is not None:
                kind = "grey" if args.continuous else "binary"
                place = (
                    args.checkpoints / f"eim_{args.images}_{kind}_{prior}_{seed}_{args.steps}.pt"
                )
            trainer = Trainer(
                args.steps,
                args.batch,
                args.rate,
                seed,
                place,
                redraw=not args.continuous,
                on_step=warm,
            )
            milliseconds = trainer.run(model, guide, loss, train)
            values = log_evidence(model, guide, test, args)
            record.add(
                cell
                | {
                    "size": 0 if prior == "gaussian" else model.size,
                    "log evidence": float(values.mean()),
                    "error over images": float(values.std() / len(values) ** 0.5),
                    "test images": len(test),
                    "per image": [round(v, 2) for v in values.tolist()],
                    "ms per step": milliseconds,
                }
            )
            trainer.finished()
    columns = ["log evidence", "error over images", "ms per step"]
    print(table(record.rows, ["images", "pixels", "steps", "prior", "size"], columns))


def main(arguments: list[str] | None = None) -> None:
    """Runs all cells."""
    options = parser(__doc__, steps=20_000, batch=128, rate=1e-3, num_test=1000)
    options.add_argument(
        "--images", choices=["digits", "mnist", "omniglot", "fashion-mnist"], default="mnist"
    )
    options.add_argument("--priors", nargs="*", default=list(PRIORS), choices=PRIORS)
    options.add_argument("--continuous", action="store_true", help="grey pixels")
    options.add_argument("--proposals", type=int, default=1024, help="K of SNIS, T of TRS")
    options.add_argument("--leapfrogs", type=int, default=5, help="T of HIS")
    options.add_argument("--latents", type=int, default=50)
    options.add_argument("--hidden", type=int, default=300)
    options.add_argument("--hidden-energy", type=int, default=100)
    options.add_argument("--warm-up", type=float, default=0.25, help="share of the steps")
    options.add_argument("--eval-particles", type=int, default=500)
    options.add_argument("--eval-prior-particles", type=int, default=10)
    args = options.parse_args(arguments)
    start(args)
    images = load(args.images, args.data)
    if args.continuous:
        images = images.dequantized()
    kind = "grey" if args.continuous else "binary"
    output = args.output or RESULTS / f"papers_eim_{args.images}_{kind}.json"
    about = {k: v for k, v in vars(args).items() if not isinstance(v, Path)}
    cells(args, images, Record(output, about))


if __name__ == "__main__":
    main()
