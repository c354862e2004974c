"""Pictures of evidence from draws and of audits, with matplotlib (``pip install 'pyro-anneal[plot]'``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..models.types import Figure
from .plot_axes import pyplot

if TYPE_CHECKING:  # results import their pictures, not the other way round
    from .drawn import EvidenceFromSamples
    from .inference import InferenceCheck

__all__ = ["plot_evidence_from_samples", "plot_ranks"]

# Panels of a picture of ranks: the quantities of smallest p-value.
_PANELS = 12

_NAMES = {
    "lower": "annealed lower bound",
    "upper": "annealed upper bound",
    "bridge": "bridge sampling",
    "thames": "truncated harmonic mean",
}
_COLORS = {"lower": "#0072B2", "upper": "#D55E00", "bridge": "#000000", "thames": "#999999"}


def plot_evidence_from_samples(result: EvidenceFromSamples) -> Figure:
    """Draws bounds and estimates side by side, with two standard errors; sums over a batch.

    Args:
        result: The result.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    found = result._estimates()
    size = (6.4, 1.5 + 0.4 * len(found))
    figure = pyplot().figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    for place, (name, (value, error)) in enumerate(found.items()):
        bar = 2.0 * float(error.square().sum().sqrt())
        bar = bar if np.isfinite(bar) else 0.0
        axes.errorbar(float(value.sum()), -place, xerr=bar, fmt="o", color=_COLORS[name])
    axes.set_yticks([-place for place in range(len(found))], [_NAMES[name] for name in found])
    axes.set_ylim(-len(found) + 0.5, 0.5)
    several = result.lower.numel()
    axes.set_xlabel(f"log evidence{f', sum over {several} data' if several > 1 else ''} (nats)")
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.locator_params(axis="x", nbins=6)
    figure.suptitle(
        f"Log evidence from {result.num_draws} {'exact ' if result.exact else ''}posterior draws, "
        "bars: two standard errors",
        fontsize="medium",
    )
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_ranks(result: InferenceCheck) -> Figure:
    """Draws, by quantity, the distribution function of ranks minus the uniform one.

    The band holds a uniform sample's whole curve with probability 95%. A curve above the band on the
    left: the inference lies too high; an S: it is too narrow (up, then down) or too wide. At most
    twelve quantities are shown, those of smallest p-value.

    Source: Sailynoja, Buerkner and Vehtari (2022), *Graphical test for discrete uniformity*, for the
    picture; the band is that of Dvoretzky, Kiefer, Wolfowitz and Massart (1990).

    Args:
        result: The audit.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    curves = []
    for name, value in result.p_values.items():
        uniforms = result.uniforms[name].reshape(result.num_simulations, -1)
        for column, p in enumerate(value.reshape(-1).tolist()):
            place = f"[{column}]" if value.numel() > 1 else ""
            curves.append((p, name + place, uniforms[:, column].sort().values.numpy()))
    shown = sorted(curves, key=lambda curve: curve[0])[:_PANELS]
    columns = min(4, max(2, len(shown)))
    rows = -(-len(shown) // columns)
    figure = pyplot().figure(figsize=(2.6 * columns, 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    count = result.num_simulations
    band = np.sqrt(np.log(2.0 / 0.05) / (2.0 * count))
    steps = np.arange(1, count + 1) / count
    for axes, (p, label, ordered) in zip(panels.flat, shown, strict=False):
        grid = np.concatenate([[0.0], ordered, [1.0]])
        axes.fill_between([0.0, 1.0], -band, band, color="#999999", alpha=0.3, linewidth=0.0)
        level = np.concatenate([[0.0], steps, [1.0]])
        axes.step(grid, level - grid, where="post", color="#0072B2")
        axes.set_title(f"{label}, p = {p:.2g}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels.flat[len(shown) :]:
        axes.axis("off")
    figure.supxlabel("normalized rank of the exact sample", fontsize=9)
    figure.supylabel("distribution minus uniform", fontsize=9)
    hidden = f", {len(shown)} of {len(curves)} quantities" if len(curves) > len(shown) else ""
    figure.suptitle(f"Ranks on {count} simulated data sets{hidden}", fontsize="medium")
    return figure
