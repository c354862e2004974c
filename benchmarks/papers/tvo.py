"""The experiments of the thermodynamic variational objective, at the paper's size.

    python benchmarks/papers/tvo.py compare --images digits --layers 30        # methods by S
    python benchmarks/papers/tvo.py compare --images mnist --data FOLDER       # 200-200-200 bits
    python benchmarks/papers/tvo.py partitions --images mnist --data FOLDER    # Figs. 2, 3: K, beta_1
    python benchmarks/papers/tvo.py gradients --images mnist --data FOLDER     # Table 1
    python benchmarks/papers/tvo.py continuous --images mnist --data FOLDER    # Fig. 4

The sigmoid belief net is the paper's: layers of bits, each with linear logits of the one above, in a
guide that goes the other way; minibatches of 24, Adam. A test image is judged by its IWAE bound with
``--eval-particles`` and by the gap of the ELBO to it, an estimate of KL(q || p). The paper trains for
4,000,000 steps; ``--steps`` says how many here.

Methods: TVO with two partitions at ``beta_1``, with 30 equal ones (the default), with ``Moments`` and with ``Tightest``; VIMCO; reweighted
wake-sleep (wake theta, wake phi) and wake-sleep (wake theta, sleep phi); Pyro's ``Trace_ELBO`` and
``TraceGraph_ELBO`` by the score.

``gradients`` trains one net by TVO and looks at the gradient of its guide at that point: the mean
over parameters of the standard deviation over repetitions. *Common random numbers* are the same S
particles in every term of the covariance (what ``TVO`` does); *separate* takes the mean of the
log-weights from S other particles.

Source: Masrani, Le and Wood (2019), *The Thermodynamic Variational Objective*, section 7.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pyro
import torch
from common import (
    OPTIONS,
    RESULTS,
    Images,
    Loss,
    Record,
    Trainer,
    elbo,
    evidence,
    load,
    parser,
    start,
    table,
)
from nets import BeliefGuide, BeliefModel, Decoder, Encoder
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from torch import Tensor, nn

from pyro_anneal.losses import EUBO, IWAE, TVO, Moments, Tightest
from pyro_anneal.losses.base import finite_or_zero
from pyro_anneal.losses.tvo import thermodynamic
from pyro_anneal.schedules import Linear, LogUniform

METHODS = (
    "TVO tightest",
    "TVO tightest, 5",
    "TVO tightest, 10",
    "TVO tightest, 30",
    "TVO linear, 30",
    "TVO moments",
    "TVO .05",
    "TVO .4",
    "VIMCO",
    "RWS",
    "WS",
    "Trace_ELBO",
    "TraceGraph_ELBO",
)


def method(name: str, particles: int) -> Loss:
    """Makes a method's loss; the phases of wake-sleep are added, each reaching its own side."""
    count = particles
    schedules: dict[str, Any] = {
        "TVO tightest": Tightest(2),
        "TVO tightest, 5": Tightest(5),
        "TVO tightest, 10": Tightest(10),
        "TVO tightest, 30": Tightest(30),
        "TVO linear, 30": Linear(30),
        "TVO moments": Moments(2),
        "TVO .05": LogUniform(0.05, partitions=2),
        "TVO .4": LogUniform(0.4, partitions=2),
    }
    if name in schedules:
        return TVO(count, schedules[name], **OPTIONS).differentiable_loss
    if name == "VIMCO":
        return IWAE(count, "vimco", **OPTIONS).differentiable_loss
    if name in ("RWS", "WS"):
        wake, wake_phi = IWAE(count, **OPTIONS), EUBO(count, **OPTIONS)
        sleep = EUBO(1, posterior="simulated", max_plate_nesting=1)

        def both(model: nn.Module, guide: nn.Module, x: Tensor) -> Tensor:
            phi = wake_phi if name == "RWS" else sleep
            theta = wake.differentiable_loss(model, torch.no_grad()(guide), x)
            return theta + phi.differentiable_loss(model, guide, x)

        return both
    if name == "Trace_ELBO":
        return Trace_ELBO(num_particles=count, **OPTIONS).differentiable_loss
    graph = TraceGraph_ELBO(num_particles=count, **OPTIONS)

    def with_backward(model: nn.Module, guide: nn.Module, x: Tensor) -> Tensor:
        value = graph.loss_and_grads(model, guide, x)  # it has no differentiable_loss
        for parameter in [*model.parameters(), *guide.parameters()]:
            parameter.grad /= len(x)
        return torch.tensor(value)

    return with_backward


def belief_net(args: argparse.Namespace, images: Images, seed: int) -> tuple[nn.Module, nn.Module]:
    pyro.set_rng_seed(seed)
    mean = images.train.mean(0)
    pair = BeliefModel(args.layers, mean), BeliefGuide(args.layers, mean)
    return pair[0].to(args.device), pair[1].to(args.device)


def trained(
    args: argparse.Namespace,
    pair: tuple[nn.Module, nn.Module],
    loss: Loss,
    images: Images,
    seed: int,
    name: str,
) -> dict[str, Any]:
    """Trains a pair and judges it on test images."""
    place = None if args.checkpoints is None else args.checkpoints / f"{name}.pt"
    trainer = Trainer(args.steps, args.batch, args.rate, seed, place)
    milliseconds = trainer.run(*pair, loss, images.train)
    test = images.test[: args.num_test]
    log_p = evidence(*pair, test, args.eval_particles)
    trainer.finished()
    return {
        "log evidence": log_p,
        "KL(q||p)": log_p - elbo(*pair, test),
        "ms per step": milliseconds,
        "batch": args.batch,
        "test images": len(test),
    }


def lengths(args: argparse.Namespace) -> dict[str, Any]:
    """Says what else makes a cell of the belief net another one: a longer run is not the same."""
    return {"steps": args.steps, "layers": args.layers, "images": args.images}


def compare(args: argparse.Namespace, images: Images, record: Record) -> None:
    """Trains the belief net by each method, at each S."""
    for seed in args.seeds:
        for particles in args.particles:
            for name in args.methods:
                cell = {"method": name, "S": particles, "seed": seed} | lengths(args)
                if record.has(cell):
                    continue
                pair = belief_net(args, images, seed)
                label = f"compare_{args.images}_{name}_{particles}_{seed}_{args.steps}".replace(
                    " ", "_"
                )
                result = trained(args, pair, method(name, particles), images, seed, label)
                record.add(cell | result)
    print(
        table(record.rows, ["steps", "S", "method"], ["log evidence", "KL(q||p)", "ms per step"])
    )


def partitions(args: argparse.Namespace, images: Images, record: Record) -> None:
    """Trains the belief net by TVO over K partitions that begin at beta_1."""
    for seed in args.seeds:
        for particles in args.particles:
            for count in args.partitions:
                for beta_1 in args.beta_1 if count > 1 else [1.0]:
                    cell = {"K": count, "beta_1": beta_1, "S": particles, "seed": seed}
                    cell |= lengths(args)
                    if record.has(cell):
                        continue
                    betas = [0.0, 1.0] if count == 1 else LogUniform(beta_1, partitions=count)
                    loss = TVO(particles, betas, **OPTIONS).differentiable_loss
                    pair = belief_net(args, images, seed)
                    label = f"partitions_{args.images}_{count}_{beta_1}_{particles}_{seed}_{args.steps}"
                    record.add(cell | trained(args, pair, loss, images, seed, label))
    print(table(record.rows, ["steps", "S", "K", "beta_1"], ["log evidence", "KL(q||p)"]))


class SeparateDraws(TVO):
    """TVO whose covariance takes the mean log-weight from a second set of particles."""

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        first, second = (self._draw(model, guide, (args, kwargs)) for _ in range(2))
        logs = first.log_weights.detach()
        betas = self.betas(logs).to(logs)
        width = betas.diff().reshape(-1, 1, 1)
        beta = betas[:-1].reshape(-1, 1, 1)
        weights = torch.softmax(beta * logs, dim=1)
        others = second.log_weights.detach()
        mean = (torch.softmax(beta * others, dim=1) * others).sum(1, keepdim=True)
        covariance = weights * (logs - mean) * len(logs) / (len(logs) - 1)
        plain = (width * (weights + beta * covariance)).sum(0) * finite_or_zero(first.log_weights)
        assert first.score is not None
        score = (width * covariance).sum(0) * first.score
        surrogate = -first.total((plain + score).sum(0))
        return surrogate - surrogate.detach() - first.total(thermodynamic(logs, betas).value)


def spread(loss: Loss, model: nn.Module, guide: nn.Module, x: Tensor, repetitions: int) -> float:
    """Computes the standard deviation of the guide's gradient, averaged over its entries."""
    parameters = list(guide.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    squares = [torch.zeros_like(p) for p in parameters]
    for _ in range(repetitions):
        grads = torch.autograd.grad(loss(model, guide, x) / len(x), parameters)
        for t, s, g in zip(total, squares, grads, strict=True):
            t += g
            s += g.square()
    n = repetitions
    deviations = [
        ((s - t.square() / n) / (n - 1)).clamp_min(0.0).sqrt().flatten()
        for t, s in zip(total, squares, strict=True)
    ]
    return float(torch.cat(deviations).mean())


def gradients(args: argparse.Namespace, images: Images, record: Record) -> None:
    """Measures the noise of the guide's gradient along a training by TVO."""
    for seed in args.seeds:
        pair = belief_net(args, images, seed)
        done = 0
        for steps in sorted({args.steps // 10, args.steps}):
            part = argparse.Namespace(**(vars(args) | {"steps": steps - done}))
            trainer = Trainer(part.steps, args.batch, args.rate, seed)
            trainer.run(*pair, method("TVO linear, 30", 10), images.train)
            done = steps
            x = images.test[: args.batch]
            for count in args.particles:
                losses: dict[str, Loss] = {
                    "TVO, common random numbers": TVO(
                        count, LogUniform(0.05, partitions=args.partitions[-1]), **OPTIONS
                    ).differentiable_loss,
                    "TVO, separate draws": SeparateDraws(
                        count, LogUniform(0.05, partitions=args.partitions[-1]), **OPTIONS
                    ).differentiable_loss,
                    "VIMCO": method("VIMCO", count),
                    "wake-phi": EUBO(count, **OPTIONS).differentiable_loss,
                    "Trace_ELBO": method("Trace_ELBO", count),
                }
                for name, loss in losses.items():
                    cell = {"loss": name, "S": count, "seed": seed, "after steps": steps}
                    if not record.has(cell):
                        value = spread(loss, *pair, x, args.repetitions)
                        record.add(cell | {"sd": value, "K": args.partitions[-1]})
    print(table(record.rows, ["after steps", "S", "loss"], ["sd"]))


def continuous(args: argparse.Namespace, images: Images, record: Record) -> None:
    """Trains a variational autoencoder by TVO, IWAE and the ELBO, at each S."""
    for seed in args.seeds:
        for particles in args.particles:
            losses: dict[str, Any] = {
                "TVO tightest": TVO(particles, Tightest(2), **OPTIONS),
                "TVO linear, 30": TVO(particles, Linear(30), **OPTIONS),
                "TVO .02": TVO(particles, LogUniform(0.02, partitions=5), **OPTIONS),
                "TVO reparam": TVO(particles, Linear(30), gradient="reparam", **OPTIONS),
                "TVO dreg": TVO(particles, Linear(30), gradient="dreg", **OPTIONS),
                "IWAE": IWAE(particles, **OPTIONS),
                "VAE": Trace_ELBO(num_particles=particles, **OPTIONS),
            }
            for name, loss in losses.items():
                cell = {"method": name, "S": particles, "seed": seed, "images": args.images}
                cell |= {"steps": args.steps, "latents": args.latents, "hidden": args.hidden}
                if record.has(cell):
                    continue
                pyro.set_rng_seed(seed)
                mean = images.train.mean(0)
                sizes = args.latents, args.hidden, mean
                pair = Decoder(*sizes).to(args.device), Encoder(*sizes).to(args.device)
                label = f"continuous_{args.images}_{name}_{particles}_{seed}_{args.steps}".replace(
                    " ", "_"
                )
                result = trained(args, pair, loss.differentiable_loss, images, seed, label)
                record.add(cell | result)
    print(
        table(record.rows, ["steps", "S", "method"], ["log evidence", "KL(q||p)", "ms per step"])
    )


TASKS = {
    "compare": compare,
    "partitions": partitions,
    "gradients": gradients,
    "continuous": continuous,
}


def main(arguments: list[str] | None = None) -> None:
    """Runs one task."""
    options = parser(__doc__, steps=20_000, batch=24, rate=1e-3)
    options.add_argument("task", choices=list(TASKS))
    options.add_argument("--images", choices=["digits", "mnist", "omniglot"], default="mnist")
    options.add_argument("--layers", type=int, nargs="*", default=[200, 200, 200])
    options.add_argument("--latents", type=int, default=50)
    options.add_argument("--hidden", type=int, default=200)
    options.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    options.add_argument("--particles", type=int, nargs="*", default=[5, 10, 20, 50])
    options.add_argument("--partitions", type=int, nargs="*", default=[1, 2, 5, 10, 50])
    options.add_argument("--beta-1", type=float, nargs="*", default=[0.001, 0.01, 0.05, 0.2, 0.5])
    options.add_argument("--eval-particles", type=int, default=1000)
    options.add_argument("--repetitions", type=int, default=50, help="of a gradient")
    args = options.parse_args(arguments)
    start(args)
    images = load(args.images, args.data)
    if args.images != "digits":
        images = images.binarized()
    images = images.to(args.device)
    output = args.output or RESULTS / f"papers_tvo_{args.task}_{args.images}.json"
    about = {k: v for k, v in vars(args).items() if not isinstance(v, Path)}
    TASKS[args.task](args, images, Record(output, about))


if __name__ == "__main__":
    main()
