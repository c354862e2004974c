"""Pictures of results over many data or models: batches, mutual information, Bayes factors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ..models.types import Axes, Figure

if TYPE_CHECKING:  # results import their pictures, not the other way round
    from .batches import EvidenceOfBatches
    from .comparison import Comparison
    from .mutual_information import MutualInformation

from .plot_axes import (
    ESTIMATE,
    LOWER,
    SHADE,
    UPPER,
    add_legend,
    add_legend_above,
    as_array,
    bin_edges,
    count_axis,
    finite_values,
    pyplot,
    tidy,
)

__all__ = ["plot_batches", "plot_comparison", "plot_mutual_information"]


def plot_batches(evidence: EvidenceOfBatches) -> Figure:
    """Draws the evidence of data that came in batches: lower bounds and effective sample sizes.

    Args:
        evidence: Lower bounds per datum.

    Returns:
        The figure, with a histogram of the lower bounds, and effective sample sizes against them.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = pyplot().figure(figsize=(9.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    lower, ess = as_array(evidence.lower), as_array(evidence.ess)
    finite = finite_values(evidence.lower)
    left.hist(finite, bins=bin_edges([finite]), color=LOWER, alpha=0.7)
    outside = lower.size - finite.size
    left.set(xlabel="lower bound per datum (nats)", ylabel="data")
    left.set_title(f"{outside} without finite bound" if outside else "", fontsize="small")
    count_axis(left)
    right.plot(lower, ess, ls="", marker=".", ms=4, alpha=0.6, color=LOWER)
    for share, style, name in ((1 / 3, "--", "few should be below"), (0.1, ":", "none below")):
        least = share * (min(evidence.num_chains, 64) if share > 0.1 else evidence.num_chains)
        right.axhline(least, color=SHADE, lw=1, ls=style, label=name)
    right.set(xlabel="lower bound per datum (nats)", ylabel="effective sample size")
    right.set_ylim(0.0, 1.05 * evidence.num_chains)
    add_legend(right)
    figure.suptitle(
        f"{len(lower)} data in {evidence.num_batches} batches: lower bound on their log evidence "
        f"{evidence.total.item():.6g} nats",
        fontsize="medium",
    )
    tidy(left, right)
    return figure


def plot_mutual_information(information: MutualInformation) -> Figure:
    """Draws bounds on mutual information, and the values of the pairs whose means they are.

    Args:
        information: The bounds.

    Returns:
        The figure, with bars of twice their standard error, and histograms over pairs.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = pyplot().figure(figsize=(9.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    sides = [
        (name, label, color)
        for name, label, color in (
            ("lower", "lower bound", LOWER),
            ("plug_in", "plug-in", ESTIMATE),
            ("upper", "upper bound", UPPER),
        )
        if getattr(information, name) is not None
    ]
    values = {name: finite_values(getattr(information, f"pair_{name}")) for name, _, _ in sides}
    edges = bin_edges(list(values.values()))
    for place, (name, label, color) in enumerate(sides):
        mean = float(getattr(information, name))
        error = 2.0 * float(getattr(information, f"{name}_std_error"))
        bar = None if math.isnan(error) else [error]
        left.errorbar([place], [mean], bar, color=color, marker="o", ms=5, capsize=4)
        right.hist(values[name], bins=edges, color=color, alpha=0.45, label=label)
        right.axvline(mean, color=color, lw=1.8)
    left.set_xticks(range(len(sides)), [label for _, label, _ in sides])
    left.set_xlim(-0.6, len(sides) - 0.4)
    if information.ceiling is not None:
        ceiling = f"ceiling {information.ceiling:.3g}"
        left.axhline(information.ceiling, color=SHADE, lw=1, ls="--", label=ceiling)
        add_legend_above(left)
    target = "I(x; z)" if information.missing is None else f"I(x; z) - {information.missing}"
    left.set_ylabel(f"{target} (nats)")
    right.set(xlabel="value of a pair (nats)", ylabel="pairs")
    count_axis(right)
    add_legend_above(right)
    figure.suptitle(
        f"{information.method} on {target}, {information.num_pairs} pairs, "
        "bars: two standard errors",
        fontsize="medium",
    )
    tidy(left, right)
    return figure


def plot_comparison(comparison: Comparison, *, level: float = 0.95, axes: Axes = None) -> Figure:
    """Draws a forest of log Bayes factors: each model against the best.

    A thick bar is the asymptotic normal interval. A thin one is guaranteed in finite samples, where
    the models have certified upper bounds. Dotted lines mark 3 and 5 nats: odds of 20 and of 150.

    Args:
        comparison: The models.
        level: Probability of coverage, in (0, 1).
        axes: Where to draw; a new figure if ``None``.

    Returns:
        The figure.

    Raises:
        ValueError: If ``level`` is not in (0, 1).
        ImportError: If matplotlib is not installed.
    """
    count = len(comparison.names)
    if axes is None:
        size = (6.4, 1.4 + 0.42 * count)
        axes = pyplot().figure(figsize=size, layout="constrained").subplots()
    factors = as_array(comparison.log_bayes_factors[:, 0])
    low, high = (as_array(end[:, 0]) for end in comparison.normal_interval(level))
    sure_low, sure_high = (as_array(end[:, 0]) for end in comparison.interval(level))
    probabilities = comparison.probabilities.tolist()
    for i in range(count):
        if i and np.isfinite([sure_low[i], sure_high[i]]).all():
            named = any(line.get_label() == "guaranteed" for line in axes.lines)
            name = "_" if named else "guaranteed"
            axes.plot([sure_low[i], sure_high[i]], [i, i], color=LOWER, lw=1.2, label=name)
        if i:
            name = "asymptotic" if i == 1 else "_"
            axes.plot([low[i], high[i]], [i, i], color=LOWER, lw=4.5, label=name)
        axes.plot([factors[i]], [i], color=ESTIMATE, marker="o", ms=5, ls="")
        axes.annotate(
            f"{probabilities[i]:.2g}",
            (1.0, i),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize="small",
        )
    axes.annotate(
        "probability",
        (1.0, -0.75),
        xycoords=("axes fraction", "data"),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize="small",
    )
    axes.axvline(0.0, color=SHADE, lw=1)
    for nats, name in ((-3.0, "3 and 5 nats"), (-5.0, "_")):
        axes.axvline(nats, color=SHADE, lw=0.8, ls=":", label=name)
    axes.set_yticks(range(count), comparison.names)
    axes.set_ylim(count - 0.4, -0.9)
    axes.set_xlabel(f"log Bayes factor against {comparison.names[0]} (nats)")
    title = f"Log Bayes factors, intervals at {level:.0%}"
    axes.set_title(title, fontsize="medium", pad=24 if count > 1 else None)
    if count > 1:
        where = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "borderaxespad": 0.0}
        axes.legend(frameon=False, fontsize="small", ncols=3, **where)
    tidy(axes)
    return axes.figure
