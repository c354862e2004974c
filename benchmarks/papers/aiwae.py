"""The table of the annealed importance-weighted autoencoder, at the paper's size.

    python benchmarks/papers/aiwae.py --images mnist --data FOLDER
    python benchmarks/papers/aiwae.py --images omniglot --data FOLDER --particles 1 5 50

Networks of the authors' code: 50 latents, two layers of 200 tanh units, pixels drawn anew in each
minibatch. The paper trains for 3280 epochs with a rate that falls tenfold seven times; ``--steps`` says
how many minibatches here. Its T counts betas: T = 5 and 11 are 4 and 10 steps, of 5 leapfrogs.

Each row has, in nats per image:

* ``NLL``: minus the annealed lower bound of ``--num-test`` test images, so that it errs upward; ``NLL
  limit`` lies above the true NLL with probability 95%, in finite samples.
* ``sandwich gap``: upper minus lower bound on as many images simulated from the model, where both hold:
  how far the AIS of this length may be off.
* ``variational gap``: NLL's evidence minus the ELBO of the guide, on the same images.
* ``training gap``: NLL of test images minus that of as many training images.
* ``active units``: latents whose encoded mean varies over images with a variance above 0.01.

Source: Ding and Freedman (2019), *Learning Deep Generative Models with Annealed Importance Sampling*,
Tables 1 and 2.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import pyro
import torch
from common import (
    OPTIONS,
    RESULTS,
    Images,
    Record,
    Trainer,
    elbo,
    load,
    parser,
    start,
    table,
)
from nets import Decoder, Encoder
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pyro_anneal import AnnealedImportance
from pyro_anneal.losses import AIWAE, IWAE

METHODS = ("VAE", "IWAE", "AIWAE T=5", "AIWAE T=11")
COLUMNS = ("NLL", "sandwich gap", "variational gap", "training gap", "active units")


def method(name: str, particles: int, args: argparse.Namespace) -> Any:
    """Makes a loss; at one particle IWAE is the VAE."""
    if name == "VAE":
        return Trace_ELBO(num_particles=particles, **OPTIONS)
    if name == "IWAE":
        return IWAE(particles, **OPTIONS)
    steps = int(name.removeprefix("AIWAE T=")) - 1
    return AIWAE(particles, steps, 5, compile="auto" if args.compile else False, **OPTIONS)


def judge(
    model: nn.Module, guide: nn.Module, x: Tensor, train: Tensor, args: argparse.Namespace
) -> dict[str, Any]:
    """Measures what the table reports, on test images and as many training images."""
    ais = AnnealedImportance(
        model,
        guide,
        num_chains=args.chains,
        num_steps=args.ais_steps,
        seed=0,
        progress_bar=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        test_run, train_run = ais.run(x), ais.run(train)
        sandwich = ais.sandwich(x[: args.num_simulated])
    test, training = float(test_run.lower.mean()), float(train_run.lower.mean())
    per_image = [round(-float(value), 2) for value in test_run.lower]
    with torch.no_grad():
        means = guide.net(train - guide.mean).chunk(2, dim=-1)[0]
    return {
        "NLL": -test,
        "NLL limit": -float(test_run.interval(0.95, total=True)[0]) / len(x),
        "sandwich gap": float(sandwich.gap.mean()),
        "variational gap": test - elbo(model, guide, x),
        "training gap": training - test,
        "active units": float((means.var(0) > 0.01).sum()),
        "test images": len(x),
        "AIS steps": args.ais_steps,
        "chains": args.chains,
        "NLL per image": per_image,
    }


def cells(args: argparse.Namespace, images: Images, record: Record) -> None:
    """Trains and judges what the record does not hold yet."""
    mean = images.train.mean(0)
    fixed = images.binarized()
    x, train = fixed.test[: args.num_test], fixed.train[: args.num_test]
    x, train = x.to(args.device), train.to(args.device)
    for seed in args.seeds:
        for particles in args.particles:
            for name in args.methods:
                cell = {"method": name, "K": particles, "seed": seed, "images": args.images}
                cell |= {"steps": args.steps, "batch": args.batch, "latents": args.latents}
                if record.has(cell) or (name == "IWAE" and particles == 1):
                    continue
                pyro.set_rng_seed(seed)
                model = Decoder(args.latents, args.hidden, mean).to(args.device)
                guide = Encoder(args.latents, args.hidden, mean).to(args.device)
                loss = method(name, particles, args)
                place = None
                if args.checkpoints is not None:
                    label = f"aiwae_{args.images}_{name}_{particles}_{seed}_{args.steps}".replace(
                        " ", "_"
                    )
                    place = args.checkpoints / f"{label}.pt"
                trainer = Trainer(
                    args.steps,
                    args.batch,
                    args.rate,
                    seed,
                    place,
                    carried=[(loss, ("log_step_size", "num_adaptations"))]
                    if isinstance(loss, AIWAE)
                    else [],
                    redraw=True,
                )
                train_images = images.train.to(args.device)
                milliseconds = trainer.run(model, guide, loss.differentiable_loss, train_images)
                result = judge(model, guide, x, train, args)
                record.add(cell | result | {"ms per step": milliseconds})
                trainer.finished()
    print(table(record.rows, ["images", "steps", "K", "method"], COLUMNS))


def main(arguments: list[str] | None = None) -> None:
    """Runs all cells."""
    options = parser(__doc__, steps=20_000, batch=128, rate=1e-3, num_test=1000)
    options.add_argument("--images", choices=["digits", "mnist", "omniglot"], default="mnist")
    options.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    options.add_argument("--particles", type=int, nargs="*", default=[1, 5, 50])
    options.add_argument("--latents", type=int, default=50)
    options.add_argument("--hidden", type=int, default=200)
    options.add_argument("--chains", type=int, default=16)
    options.add_argument("--ais-steps", type=int, default=1000)
    options.add_argument("--num-simulated", type=int, default=100)
    options.add_argument("--compile", action="store_true", help="AIWAE's chains, on many steps")
    args = options.parse_args(arguments)
    start(args)
    images = load(args.images, args.data)
    output = args.output or RESULTS / f"papers_aiwae_{args.images}.json"
    about = {k: v for k, v in vars(args).items() if not isinstance(v, Path)}
    cells(args, images, Record(output, about))


if __name__ == "__main__":
    main()
