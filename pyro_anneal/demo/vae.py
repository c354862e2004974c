"""The demo: train a small VAE on real digits with a loss of ours, and certify what it learned."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..anneal import AnnealedImportance
from ..datasets.images import load_digits
from ..losses import TVO
from ..models.types import Axes
from ..results.mutual_information import MutualInformation
from ..results.plot_axes import pyplot
from ..results.plotting import plot_log_weights, plot_thermodynamic_curve
from ..results.run import AnnealedRun
from ..results.sandwich import Sandwich

__all__ = ["VAE", "DemoOutcome", "plot_demo", "run_demo"]


class VAE(nn.Module):
    """A variational auto-encoder of binary images with one hidden layer on each side.

    Args:
        num_pixels: Pixels of an image.
        num_latents: Dimensions of the latent code.
        num_hidden: Units of each hidden layer.
    """

    def __init__(self, num_pixels: int = 64, num_latents: int = 8, num_hidden: int = 128) -> None:
        super().__init__()
        self.num_latents = num_latents
        self.decoder = nn.Sequential(
            nn.Linear(num_latents, num_hidden), nn.Tanh(), nn.Linear(num_hidden, num_pixels)
        )
        self.encoder = nn.Sequential(
            nn.Linear(num_pixels, num_hidden), nn.Tanh(), nn.Linear(num_hidden, 2 * num_latents)
        )

    def model(self, x: Tensor) -> None:
        """Generates images from standard normal codes."""
        pyro.module("decoder", self.decoder)
        prior = dist.Normal(x.new_zeros(self.num_latents), 1.0).to_event(1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Encodes images to Gaussians over codes."""
        pyro.module("encoder", self.encoder)
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


@dataclass(frozen=True, kw_only=True, eq=False)
class DemoOutcome:
    """What the demo measured."""

    losses: list[float]  # training loss per datum and epoch, nats
    sandwich: Sandwich  # simulated digits
    held_out: AnnealedRun  # real digits
    held_out_guide: Tensor  # lower bound by importance sampling with the guide, same K, per datum
    from_prior: dict[int, Sandwich]  # the same simulated digits from the prior, by T
    information: MutualInformation
    seconds: float


def train(vae: VAE, images: Tensor, *, epochs: int, progress_bar: bool = True) -> list[float]:
    """Trains a VAE with the thermodynamic variational objective.

    Args:
        vae: The model and guide.
        images: Training images, ``[N, num_pixels]``.
        epochs: Passes over the images.
        progress_bar: Whether to show progress.

    Returns:
        Mean loss per datum of each epoch, nats.
    """
    loss = TVO(num_particles=10, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(vae.model, vae.guide, Adam({"lr": 3e-3}), loss=loss)
    history = []
    bar = tqdm(range(epochs), desc="train (TVO)", disable=not progress_bar)
    for _ in bar:
        batches = images[torch.randperm(len(images))].split(100)
        total = sum(svi.step(batch) for batch in batches)
        history.append(total / len(images))
        bar.set_postfix(loss=f"{history[-1]:.2f}")
    return history


def run_demo(
    *, epochs: int = 120, num_steps: int = 500, num_data: int = 100, progress_bar: bool = True
) -> DemoOutcome:
    """Trains a VAE on digits and bounds its log evidence and mutual information.

    Args:
        epochs: Training epochs.
        num_steps: Annealing steps T.
        num_data: Simulated and held-out digits that are bounded.
        progress_bar: Whether to show progress.

    Returns:
        Everything that was measured.
    """
    began = time.perf_counter()
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    digits = load_digits()
    vae = VAE()
    history = train(vae, digits.train, epochs=epochs, progress_bar=progress_bar)
    test = digits.test[:num_data]

    def engine(steps: int, guide: Any = vae.guide) -> AnnealedImportance:
        options: dict[str, Any] = {"num_chains": 16, "seed": 0, "progress_bar": progress_bar}
        return AnnealedImportance(vae.model, guide, num_steps=steps, **options)

    sandwich = engine(num_steps).sandwich(test)
    shorter = [steps for steps in (10, 30, 100, 300) if steps < num_steps]
    from_prior = {t: engine(t, None).sandwich(test) for t in [*shorter, num_steps]}
    return DemoOutcome(
        losses=history,
        sandwich=sandwich,
        held_out=engine(num_steps).run(test),
        held_out_guide=engine(1).run(test).lower,
        from_prior=from_prior,
        information=MutualInformation.from_sandwich(sandwich),
        seconds=time.perf_counter() - began,
    )


def plot_demo(outcome: DemoOutcome) -> Any:
    """Draws what the demo measured: bounds against T, log-weights, images with their bounds.

    Args:
        outcome: What the demo measured.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = pyplot().figure(figsize=(11.0, 6.6), layout="constrained")
    panels = figure.subplots(2, 3)
    _plot_closing(panels[0, 0], outcome)
    plot_log_weights(outcome.from_prior[max(outcome.from_prior)], axes=panels[0, 1])
    panels[0, 1].set_title("From the prior, longest run", fontsize="medium")
    plot_log_weights(outcome.sandwich, axes=panels[0, 2])
    panels[0, 2].set_title("From the encoder", fontsize="medium")
    plot_thermodynamic_curve(outcome.from_prior[max(outcome.from_prior)], axes=panels[1, 0])
    real = outcome.held_out.observed["x"]
    simulated = outcome.sandwich.simulated["x"]
    for axes, images, title in (
        (panels[1, 1], real, "Held-out digits, log p(x) at least"),
        (panels[1, 2], simulated, "Simulated digits, log p(x) between"),
    ):
        _plot_images(axes, images[:9])
        axes.set_title(title, fontsize="medium")
    _label_images(panels[1, 1], [f"{v:.1f}" for v in outcome.held_out.lower[:9]])
    ends = zip(outcome.sandwich.lower[:9], outcome.sandwich.upper[:9], strict=True)
    _label_images(panels[1, 2], [f"{low:.1f}, {high:.1f}" for low, high in ends])
    return figure


def _plot_closing(axes: Axes, outcome: DemoOutcome) -> None:
    """Draws both bounds against T, minus the best estimate of each datum's log evidence."""
    reference = outcome.sandwich.bennett
    steps = list(outcome.from_prior)
    for side, color in (("lower", "#0072B2"), ("upper", "#D55E00")):
        errors = [getattr(s, side) - reference for s in outcome.from_prior.values()]
        means = [float(error.mean()) for error in errors]
        bars = [2.0 * float(error.std()) / len(error) ** 0.5 for error in errors]
        axes.errorbar(steps, means, bars, color=color, marker="o", ms=4, capsize=2, label=side)
    axes.axhline(0.0, color="black", lw=1, ls="--")
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set(xlabel="steps $T$", ylabel="bound - log p(x) (nats per digit)")
    axes.set_title("Bounds from the prior, simulated digits", fontsize="medium")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _plot_images(axes: Axes, images: Tensor) -> None:
    """Draws nine square images in a three by three mosaic."""
    side = round(images.shape[-1] ** 0.5)
    mosaic = np.full((3 * (side + 3), 3 * (side + 3)), np.nan)
    for place, image in enumerate(images.cpu().numpy().reshape(-1, side, side)):
        row, column = divmod(place, 3)
        top, left = row * (side + 3), column * (side + 3)
        mosaic[top : top + side, left : left + side] = image
    axes.imshow(mosaic, cmap="gray_r", vmin=0.0, vmax=1.0)
    axes.set_axis_off()


def _label_images(axes: Axes, labels: Sequence[str]) -> None:
    """Writes a label under each image of the mosaic."""
    pitch = axes.images[0].get_array().shape[0] // 3
    for place, label in enumerate(labels):
        row, column = divmod(place, 3)
        x, y = column * pitch + (pitch - 4) / 2.0, row * pitch + pitch - 2.2
        axes.text(x, y, label, ha="center", va="center", fontsize="small")
