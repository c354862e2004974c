"""Pictures of runs and sandwiches, with matplotlib (``pip install 'pyro-anneal[plot]'``).

Forward chains and lower bounds are blue, reverse chains and upper bounds vermilion, estimates
black: three of the Okabe-Ito colours, which colour-blind readers tell apart. Where most betas lie
near zero their axis is stretched by a power, chosen so that the median beta sits in the middle.
Every function returns a figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from typing_extensions import TypeIs

from ..models.types import Axes, Figure

if TYPE_CHECKING:  # results import their pictures, not the other way round
    from .run import AnnealedRun
    from .sandwich import Sandwich

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
    new_axes,
    pyplot,
    scale_step_sizes,
    steps_axis,
    tidy,
)
from .plot_comparison import plot_batches, plot_comparison, plot_mutual_information

__all__ = [
    "plot_acceptance",
    "plot_batches",
    "plot_bounds",
    "plot_comparison",
    "plot_log_weights",
    "plot_mutual_information",
    "plot_run",
    "plot_sandwich",
    "plot_thermodynamic_curve",
]


def _is_two_sided(result: AnnealedRun | Sandwich) -> TypeIs[Sandwich]:
    return len(result.directions) == 2


def plot_bounds(
    results: Mapping[int, AnnealedRun | Sandwich],
    *,
    truth: float | None = None,
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Draws bounds on the log evidence against the number of steps T.

    Points are means over pairs (or the batch), bars twice their standard error. Sandwiches get a
    second panel with the gap on logarithmic axes, where the law ``gap ~ 1 / T`` is a straight line.

    Args:
        results: Runs or sandwiches by T.
        truth: The log evidence per datum in nats, where it is known.
        axes: One set of axes, and for sandwiches a second, to draw on; a new figure if ``None``.

    Returns:
        The figure.

    Raises:
        ValueError: If ``results`` is empty.
        ImportError: If matplotlib is not installed.
    """
    if not results:
        raise ValueError("plot_bounds needs at least one result")
    ordered = dict(sorted(results.items()))
    sandwiches = {t: r for t, r in ordered.items() if _is_two_sided(r)}
    if axes is None:
        figure = pyplot().figure(figsize=(8.5 if sandwiches else 4.8, 3.6), layout="constrained")
        axes = figure.subplots(1, 2 if sandwiches else 1, squeeze=False)[0]
    panels = list(axes)
    _plot_sides(panels[0], ordered, truth)
    if len(panels) > 1 and sandwiches:
        _plot_gaps(panels[1], sandwiches)
    tidy(*panels)
    return panels[0].figure


def _plot_sides(
    axes: Axes, ordered: Mapping[int, AnnealedRun | Sandwich], truth: float | None
) -> None:
    for side, color in (("lower", LOWER), ("upper", UPPER)):
        points = [(t, *_mean_bound(r, side)) for t, r in ordered.items() if _has(r, side)]
        if points:
            steps, means, errors = (np.array(column) for column in zip(*points, strict=True))
            axes.errorbar(
                steps, means, 2.0 * errors, color=color, marker="o", ms=4, capsize=2, label=side
            )
    if truth is not None:
        axes.axhline(truth, color=ESTIMATE, lw=1, ls="--", label="truth")
    several = any(math.prod(_batch(result)) > 1 for result in ordered.values())
    axes.set(xscale="log", ylabel=f"log evidence{' per datum' if several else ''} (nats)")
    axes.set_title("Bounds, bars: two standard errors", fontsize="medium")
    steps_axis(axes, list(ordered))
    add_legend(axes)


def plot_log_weights(result: AnnealedRun | Sandwich, *, axes: Axes = None) -> Figure:
    """Draws histograms of the log-weights of each direction, with the bounds as lines.

    A batch is pooled after subtracting each datum's log evidence (Bennett's estimate, or the bound
    of a single run). Far outliers are counted below the axis instead of stretching it.

    Args:
        result: A run or a sandwich.
        axes: Where to draw; a new figure if ``None``.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    axes = new_axes() if axes is None else axes
    runs = _runs(result)
    pooled = result.forward.batch_shape if _is_two_sided(result) else result.batch_shape
    center = result.bennett if _is_two_sided(result) else result.log_evidence
    if math.prod(pooled) == 1:
        center = center * 0.0
    weights = {
        direction: finite_values(run.scale * run.log_weights - center)
        for direction, run in runs.items()
    }
    edges = bin_edges(list(weights.values()))
    beyond = []
    for direction, values in weights.items():
        outside = int(((values < edges[0]) | (values > edges[-1])).sum())
        outside += runs[direction].log_weights.numel() - values.size
        beyond += [f"{outside} {direction}"] if outside else []
        color = LOWER if direction == "forward" else UPPER
        axes.hist(values, bins=edges, color=color, alpha=0.45, label=f"{direction} chains")
    for side, color in (("lower", LOWER), ("upper", UPPER)):
        if _has(result, side):
            bound = float((getattr(result, side) - center).mean())
            axes.axvline(bound, color=color, lw=1.8, label=f"{side} bound")
    if _is_two_sided(result):
        estimate = float((result.bennett - center).mean())
        axes.axvline(estimate, color=ESTIMATE, lw=1.2, ls="--", label="Bennett")
    minus = "" if math.prod(pooled) == 1 else " - log evidence"
    left_out = f"\noff the axis: {', '.join(beyond)}" if beyond else ""
    axes.set(xlabel=f"log-weight{minus} (nats){left_out}", ylabel="chains")
    axes.set_title("Log-weights and bounds", fontsize="medium")
    axes.locator_params(axis="x", nbins=4)  # labels such as -139.175 are wide
    count_axis(axes)
    add_legend_above(axes)
    tidy(axes)
    return axes.figure


def plot_thermodynamic_curve(result: AnnealedRun | Sandwich, *, axes: Axes = None) -> Figure:
    r"""Draws the mean of ``log p/q`` along the path, and its integral.

    The integral of :math:`E_\beta[\log p / q]` over beta is the log evidence; the dashed line is
    the integral up to beta. Summed over the increments of a run it ends at the single-sample
    bound: below the log evidence for forward chains, above for reverse ones. Values are per datum.
    Where a fitted base makes the curve flat beside its own height, that height is taken out of
    both lines.

    Args:
        result: A run or a sandwich.
        axes: Where to draw; a new figure if ``None``.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    axes = new_axes() if axes is None else axes
    spread = []
    center = _flat_height(result)
    for direction, run in _runs(result).items():
        betas, curve = as_array(run.betas), run.scale * as_array(run.mean_log_ratio) - center
        curve = np.where(np.isfinite(curve), curve, np.nan)  # chains of zero weight leave gaps
        taken = betas[:-1] if direction == "forward" else betas[1:]
        color = LOWER if direction == "forward" else UPPER
        axes.plot(taken, curve, color=color, lw=1.8, label=f"{direction}: " + _EXPECTATION)
        integral = np.concatenate([[0.0], np.cumsum(np.diff(betas) * curve)])  # NaN from a gap on
        label = f"{direction}: integral, {run.single.mean().item():.4g}"
        axes.plot(betas, integral, color=color, lw=1.2, ls="--", label=label)
        if direction == "forward" or len(_runs(result)) == 1:
            axes.fill_between(taken, curve, 0.0, color=SHADE, alpha=0.25, lw=0)
        spread += [curve, integral]
    axes.axhline(0.0, color=SHADE, lw=0.8)
    drawn = np.concatenate(spread)
    drawn = drawn[np.isfinite(drawn)]
    settled = max(float(np.median(np.abs(drawn))), 1.0)
    if np.abs(drawn).max() > 100.0 * settled:
        axes.set_yscale("symlog", linthresh=settled)
        low, high = min(0.0, drawn.min()), max(0.0, drawn.max())
        axes.set_ylim(1.5 * low - 0.2 * settled, 1.5 * high + 0.2 * settled)
    _scale_beta_axis(axes, result)
    per_datum = " per datum" if math.prod(_batch(result)) > 1 else ""
    above = "" if center == 0.0 else f" above {center:.4g}"
    axes.set(ylabel=f"nats{per_datum}{above}")
    axes.set_title("Thermodynamic curve", fontsize="medium")
    if center == 0.0:
        add_legend(axes)
    else:
        add_legend_above(axes)
    tidy(axes)
    return axes.figure


def plot_acceptance(
    result: AnnealedRun | Sandwich, *, axes: tuple[Axes, Axes] | None = None
) -> Figure:
    """Draws acceptance and step size against beta.

    Args:
        result: A run or a sandwich.
        axes: Two axes, for acceptance and for step size; a new figure if ``None``.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    stacked = axes is None
    if axes is None:
        figure = pyplot().figure(figsize=(4.8, 4.8), layout="constrained")
        axes = tuple(figure.subplots(2, 1))
    runs = _runs(result)
    for direction, run in runs.items():
        color = LOWER if direction == "forward" else UPPER
        axes[0].plot(
            as_array(run.betas[1:-1]),
            as_array(run.accept_prob),
            color=color,
            lw=1.2,
            label=direction,
        )
        pilot = run.pilot
        if direction == "forward" and pilot is not None:
            marks = {"color": ESTIMATE, "ls": "", "marker": ".", "ms": 5, "label": "pilot"}
            marks["clip_on"] = False  # its first beta is 0 and its last 1
            axes[0].plot(as_array(pilot.betas), as_array(pilot.accept_prob), **marks)
            axes[1].plot(as_array(pilot.betas), as_array(pilot.step_size), **marks)
    first = next(iter(runs.values()))
    axes[1].plot(as_array(first.betas[1:-1]), as_array(first.step_size), color=LOWER, lw=1.2)
    axes[0].set(ylabel="acceptance", ylim=(-0.02, 1.02))
    scale_step_sizes(axes[1], as_array(first.step_size))
    axes[0].set_title("Acceptance", fontsize="medium")
    axes[1].set_title("Step size", fontsize="medium")
    axes[0].legend(frameon=False, fontsize="small", loc="lower right")
    for panel in axes:
        _scale_beta_axis(panel, result)
    if stacked:
        axes[0].set(xlabel=None)
        axes[0].tick_params(labelbottom=False)
    tidy(*axes)
    return axes[0].figure


def plot_run(run: AnnealedRun) -> Figure:
    """Draws the four pictures of a run: weights, thermodynamic curve, acceptance, step size.

    Args:
        run: A run of either direction.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    title = f"{run.direction} run, {run.num_chains} chains, {run.num_steps} steps"
    return _four_panels(run, title)


def plot_sandwich(sandwich: Sandwich) -> Figure:
    """Draws the four pictures of a sandwich, both directions in each.

    Args:
        sandwich: Bounds on simulated data.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    forward = sandwich.forward
    gap = sandwich.gap.mean().item()
    return _four_panels(
        sandwich,
        f"simulated data, {forward.num_chains} chains, {forward.num_steps} steps, "
        f"mean gap {gap:.3g} nats",
    )


def _flat_height(result: AnnealedRun | Sandwich) -> float:
    """Returns the height of a curve that is flat beside it, else 0."""
    curves = [run.scale * as_array(run.mean_log_ratio) for run in _runs(result).values()]
    values = np.concatenate(curves)
    values = values[np.isfinite(values)]
    height = float(np.median(values)) if values.size > 2 else 0.0
    return height if values.size > 2 and np.ptp(values) < 0.2 * abs(height) else 0.0


def _batch(result: AnnealedRun | Sandwich) -> tuple[int, ...]:
    return next(iter(_runs(result).values())).batch_shape


_EXPECTATION = r"$E_\beta[\log p/q]$"


def _four_panels(result: AnnealedRun | Sandwich, title: str) -> Figure:
    figure = pyplot().figure(figsize=(9.0, 6.2), layout="constrained")
    panels = figure.subplots(2, 2)
    plot_log_weights(result, axes=panels[0, 0])
    plot_thermodynamic_curve(result, axes=panels[0, 1])
    plot_acceptance(result, axes=(panels[1, 0], panels[1, 1]))
    figure.suptitle(title, fontsize="medium")
    return figure


def _plot_gaps(axes: Axes, sandwiches: Mapping[int, Sandwich]) -> None:
    steps = np.array(list(sandwiches))
    gaps = np.array([s.gap.mean().item() for s in sandwiches.values()])
    errors = np.array([s.std_error["gap"].item() for s in sandwiches.values()])
    positive = gaps > 0.0
    reach = np.nan_to_num(2.0 * errors[positive])
    below = np.minimum(reach, 0.9 * gaps[positive])  # keep bars on the logarithmic axis
    axes.errorbar(
        steps[positive],
        gaps[positive],
        (below, reach),
        color=ESTIMATE,
        marker="o",
        ms=4,
        capsize=2,
    )
    # a realized gap can be of either sign: where it is not positive show only how far it may reach
    limits = np.nan_to_num(gaps + 2.0 * errors)
    limited = ~positive & (limits > 0.0)
    if limited.any():
        marks = {"ls": "", "marker": "v", "mfc": "none", "color": ESTIMATE, "ms": 5}
        axes.plot(steps[limited], limits[limited], **marks, label="not positive, at most")
    if positive.any():
        anchor = gaps[positive][0] * steps[positive][0]
        axes.plot(steps, anchor / steps, color=SHADE, lw=1, ls="--", label=r"$\propto 1 / T$")
        axes.legend(frameon=False, fontsize="small", loc="lower left")
    axes.set(xscale="log", yscale="log", ylabel="mean gap (nats)")
    axes.set_title("Gap", fontsize="medium")
    steps_axis(axes, list(sandwiches))


def _runs(result: AnnealedRun | Sandwich) -> dict[str, AnnealedRun]:
    if _is_two_sided(result):
        return {"forward": result.forward, "reverse": result.reverse}
    return {result.direction: result}


def _has(result: AnnealedRun | Sandwich, side: str) -> bool:
    return _is_two_sided(result) or (result.direction == "forward") == (side == "lower")


def _mean_bound(result: AnnealedRun | Sandwich, side: str) -> tuple[float, float]:
    bound: Tensor = getattr(result, side)
    count = bound.numel()
    if count > 1:
        return bound.mean().item(), bound.std().item() / math.sqrt(count)
    single = 0.0 if _is_two_sided(result) else result.std_error.nan_to_num(0.0).item()
    return bound.mean().item(), single


def _scale_beta_axis(axes: Axes, result: AnnealedRun | Sandwich) -> None:
    betas = as_array(next(iter(_runs(result).values())).betas)
    middle = float(np.median(betas))
    axes.set_xlabel(r"inverse temperature $\beta$")
    if middle >= 0.1 or len(betas) < 4:
        axes.set_xlim(0.0, 1.0)
        return
    first = max(
        float(betas[1]), 1e-300
    )  # the stretch below the first beta is empty: keep it short
    power = max(math.log(0.5) / math.log(middle), math.log(0.06) / math.log(first))
    axes.set_xscale(
        "function",
        functions=(
            lambda x: np.clip(x, 0.0, None) ** power,
            lambda y: np.clip(y, 0.0, None) ** (1.0 / power),
        ),
    )
    ticks, position = [1.0], 1.0
    exponent = 0
    while position > 0.24 and exponent > -300:
        exponent -= 1
        if position - 10.0 ** (exponent * power) >= 0.14:
            position = 10.0 ** (exponent * power)
            ticks.append(10.0**exponent)
    labels = ["1", *(rf"$10^{{{round(math.log10(tick))}}}$" for tick in ticks[1:])]
    axes.set_xticks([0.0, *ticks[::-1]], ["0", *labels[::-1]])
    axes.set_xticks([], minor=True)
    axes.set_xlim(0.0, 1.0)
