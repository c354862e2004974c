"""What the scripts of this folder share: images, training that resumes, records that grow.

Every script here trains networks of the size of a paper on the paper's data. A run is cut into
cells (a method, a number of particles, a seed). A cell that is finished is a row in a JSON file and
is not run again; a cell that is not leaves a checkpoint, if ``--checkpoints FOLDER`` is given, from which
training goes on with the same random numbers. Lengths are in steps: ``--steps`` sets how near to the
paper's a run comes, and each row says how long it was.

Data: ``--data FOLDER`` holds MNIST's four gzipped idx files in ``mnist/`` (LeCun and Cortes), and
``omniglot/omniglot28_box.npz`` (Lake et al., MIT), 28 x 28 grey images with the arrays ``background`` and
``evaluation``. Where a person has Fashion-MNIST, its files in ``fashion-mnist/`` are read like MNIST's.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import pyro_anneal
from pyro_anneal.datasets import load_digits
from pyro_anneal.losses import IWAE

RESULTS = Path(__file__).parents[1] / "results"
OPTIONS = {"vectorize_particles": True, "max_plate_nesting": 1}

Loss = Callable[[nn.Module, nn.Module, Tensor], Tensor]
"""A loss of model, guide and a minibatch, summed over it, in nats; or detached, after backward."""


@dataclass(frozen=True)
class Images:
    """Images as rows of pixels in [0, 1]: ``[images, pixels]``."""

    train: Tensor
    valid: Tensor
    test: Tensor

    def to(self, device: str) -> Images:
        return Images(*(part.to(device) for part in (self.train, self.valid, self.test)))

    def binarized(self, seed: int = 0) -> Images:
        """Draws each pixel once with its intensity as probability, by a seed of its own."""
        generator = torch.Generator().manual_seed(seed)
        return Images(
            *(torch.bernoulli(p, generator=generator) for p in (self.train, self.valid, self.test))
        )

    def dequantized(self, seed: int = 0) -> Images:
        """Adds uniform noise of one grey level, so that the pixels have a density on [0, 1]."""
        generator = torch.Generator().manual_seed(seed)
        return Images(
            *(
                (255.0 * p + torch.rand(p.shape, generator=generator)) / 256.0
                for p in (self.train, self.valid, self.test)
            )
        )


def mnist(folder: Path, name: str = "mnist") -> Images:
    """Reads MNIST: 50,000 images to train, 10,000 to validate, 10,000 to test."""

    def read(part: str) -> Tensor:
        with gzip.open(folder / name / f"{part}-images-idx3-ubyte.gz") as file:
            pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 784)
        return torch.from_numpy(pixels / np.float32(255.0))

    train, valid = read("train").split([50_000, 10_000])
    return Images(train, valid, read("t10k"))


def omniglot(folder: Path) -> Images:
    """Reads Omniglot: the background alphabets to train, the others, shuffled, to test."""
    arrays = np.load(folder / "omniglot" / "omniglot28_box.npz")
    background, evaluation = (
        torch.from_numpy(arrays[name].reshape(-1, 784) / np.float32(255.0))
        for name in ("background", "evaluation")
    )
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(background), generator=generator)
    valid, train = background[order].split([1345, len(background) - 1345])
    shuffled = torch.randperm(
        len(evaluation), generator=generator
    )  # else the first are one letter
    return Images(train, valid, evaluation[shuffled])


def digits() -> Images:
    """Reads scikit-learn's 8 x 8 digits, binary; the images to validate are the last to train."""
    data = load_digits()
    train = data.train.float()
    return Images(train[:-100], train[-100:], data.test.float())


def load(name: str, folder: Path | None) -> Images:
    """Reads a data set by its name."""
    if name == "digits":
        return digits()
    if folder is None:
        raise SystemExit(f"--images {name} needs --data FOLDER")
    return omniglot(folder) if name == "omniglot" else mnist(folder, name)


class Record:
    """Rows of finished cells in a JSON file, with what made them."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"rows": []}
        if path.exists():
            self.content = json.loads(path.read_text())
        self.content["about"] = about
        self.content["versions"] = {
            "pyro_anneal": pyro_anneal.__version__,
            "torch": torch.__version__,
            "pyro": pyro.__version__,
            "python": platform.python_version(),
        }

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content["rows"]

    def has(self, cell: dict[str, Any]) -> bool:
        return any(all(row.get(k) == v for k, v in cell.items()) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row and writes the file, whole or not at all."""
        self.rows.append({k: _short(v) for k, v in row.items()})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.content, indent=1) + "\n")
        part.replace(self.path)
        shown = {k: v for k, v in self.rows[-1].items() if not k.endswith("per image")}
        print(shown, flush=True)


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return [_short(v) for v in value] if isinstance(value, list) else value


def parser(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Makes a parser with the options that all scripts share."""
    result = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    result.add_argument("--data", type=Path, help="folder of mnist/ and omniglot/")
    result.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    result.add_argument("--steps", type=int)
    result.add_argument("--batch", type=int)
    result.add_argument("--rate", type=float, help="of Adam; falls tenfold over the run")
    result.add_argument("--device", default="cpu")
    result.add_argument("--num-test", type=int, help="test images that are judged; None: all")
    result.add_argument("--checkpoints", type=Path, help="folder for unfinished cells")
    result.add_argument("--output", type=Path)
    result.set_defaults(**defaults)
    return result


def start(args: argparse.Namespace) -> None:
    """Sets what a run on a CPU is measured with: one thread, single precision."""
    torch.set_default_dtype(torch.float32)
    if args.device == "cpu":
        torch.set_num_threads(1)


@dataclass
class Trainer:
    """Trains a model and a guide by Adam on minibatches; a run that is cut short goes on.

    ``carried`` lists objects and the names of their attributes that training changes besides the
    parameters, such as the step sizes of ``AIWAE``.
    """

    steps: int
    batch: int
    rate: float
    seed: int
    checkpoint: Path | None = None
    every: int = 500
    decay: float = 0.1  # of the rate, over the whole run
    carried: Sequence[tuple[Any, tuple[str, ...]]] = ()
    redraw: bool = False  # whether grey pixels are binarized anew in each minibatch
    on_step: Callable[[int], None] | None = None

    def run(self, model: nn.Module, guide: nn.Module, loss: Loss, images: Tensor) -> float:
        """Trains in place; returns milliseconds of processor time per step."""
        parameters = [*model.parameters(), *guide.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=self.rate)
        done, seconds = self._resume(model, guide, optimizer)
        for step in range(done, self.steps):
            for group in optimizer.param_groups:
                group["lr"] = self.rate * self.decay ** (step / self.steps)
            began = time.process_time()
            if self.on_step is not None:
                self.on_step(step)
            x = images[torch.randint(len(images), (self.batch,)).to(images.device)]
            x = torch.bernoulli(x) if self.redraw else x
            optimizer.zero_grad()
            value = loss(model, guide, x)
            if value.requires_grad:  # else it ran backward itself
                (value / self.batch).backward()
            optimizer.step()
            seconds += time.process_time() - began
            if self.checkpoint is not None and (step + 1) % self.every == 0:
                self._save(model, guide, optimizer, step + 1, seconds)
        return 1e3 * seconds / max(self.steps, 1)

    def finished(self) -> None:
        """Drops the checkpoint, once the cell is recorded."""
        if self.checkpoint is not None:
            self.checkpoint.unlink(missing_ok=True)

    def _save(self, model: Any, guide: Any, optimizer: Any, step: int, seconds: float) -> None:
        assert self.checkpoint is not None
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "step": step,
            "seconds": seconds,
            "model": model.state_dict(),
            "guide": guide.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "carried": [[getattr(o, n) for n in names] for o, names in self.carried],
        }
        if torch.cuda.is_available():
            state["random_cuda"] = torch.cuda.get_rng_state_all()
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.checkpoint)

    def _resume(self, model: Any, guide: Any, optimizer: Any) -> tuple[int, float]:
        if self.checkpoint is None or not self.checkpoint.exists():
            return 0, 0.0
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        guide.load_state_dict(state["guide"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        if "random_cuda" in state:
            torch.cuda.set_rng_state_all(state["random_cuda"])
        for (thing, names), values in zip(self.carried, state["carried"], strict=True):
            for name, value in zip(names, values, strict=True):
                setattr(thing, name, value)
        return state["step"], state["seconds"]


@torch.no_grad()
def evidence(model: Any, guide: Any, x: Tensor, particles: int, size: int = 25) -> float:
    """Computes the mean IWAE bound of an image, a lower bound on log p(x) in nats."""
    loss = IWAE(particles, **OPTIONS)
    return -sum(loss.loss(model, guide, part) for part in x.split(size)) / len(x)


@torch.no_grad()
def elbo(model: Any, guide: Any, x: Tensor, particles: int = 100, size: int = 100) -> float:
    """Computes the mean ELBO of an image, nats."""
    loss = Trace_ELBO(num_particles=particles, **OPTIONS)
    return -sum(loss.loss(model, guide, part) for part in x.split(size)) / len(x)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and its standard error; NaN of one value."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def table(rows: list[dict[str, Any]], by: Sequence[str], columns: Sequence[str]) -> str:
    """Formats means over seeds with standard errors, one line per group."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    lines = ["| " + " | ".join([*by, "seeds", *columns]) + " |"]
    lines.append("|" + "---|" * (len(by) + 1 + len(columns)))
    for key, members in groups.items():
        cells = [*map(str, key), str(len(members))]
        for column in columns:
            mean, error = mean_and_error([row[column] for row in members])
            cells.append(f"{mean:.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
