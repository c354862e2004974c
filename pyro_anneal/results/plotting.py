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

from ..models.types import Array, Axes, Figure

if TYPE_CHECKING:  # results import their pictures, not the other way round
    from .batches import EvidenceOfBatches
    from .comparison import Comparison
    from .mutual_information import MutualInformation
    from .run import AnnealedRun
    from .sandwich import Sandwich

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

_LOWER, _UPPER, _ESTIMATE, _SHADE = "#0072B2", "#D55E00", "#000000", "#999999"


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
    _tidy(*panels)
    return panels[0].figure


def _plot_sides(
    axes: Axes, ordered: Mapping[int, AnnealedRun | Sandwich], truth: float | None
) -> None:
    for side, color in (("lower", _LOWER), ("upper", _UPPER)):
        points = [(t, *_mean_bound(r, side)) for t, r in ordered.items() if _has(r, side)]
        if points:
            steps, means, errors = (np.array(column) for column in zip(*points, strict=True))
            axes.errorbar(
                steps, means, 2.0 * errors, color=color, marker="o", ms=4, capsize=2, label=side
            )
    if truth is not None:
        axes.axhline(truth, color=_ESTIMATE, lw=1, ls="--", label="truth")
    several = any(math.prod(_batch(result)) > 1 for result in ordered.values())
    axes.set(xscale="log", ylabel=f"log evidence{' per datum' if several else ''} (nats)")
    axes.set_title("Bounds, bars: two standard errors", fontsize="medium")
    _steps_axis(axes, list(ordered))
    _legend(axes)


def plot_log_weights(result: AnnealedRun | Sandwich, *, axes: Axes = None) -> Figure:
    """Draws histograms of the log-weights of each direction, with the bounds as lines.

    A batch is pooled after subtracting each datum's log evidence (Bennett's estimate, or the bound
    of a single run). Far outliers are counted in the legend instead of stretching the axis.

    Args:
        result: A run or a sandwich.
        axes: Where to draw; a new figure if ``None``.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    axes = _new_axes() if axes is None else axes
    runs = _runs(result)
    pooled = result.forward.batch_shape if _is_two_sided(result) else result.batch_shape
    center = result.bennett if _is_two_sided(result) else result.log_evidence
    if math.prod(pooled) == 1:
        center = center * 0.0
    weights = {
        direction: _finite(run.scale * run.log_weights - center) for direction, run in runs.items()
    }
    edges = _bin_edges(list(weights.values()))
    for direction, values in weights.items():
        outside = int(((values < edges[0]) | (values > edges[-1])).sum())
        outside += runs[direction].log_weights.numel() - values.size
        label = f"{direction} chains" + (f" ({outside} off the axis)" if outside else "")
        color = _LOWER if direction == "forward" else _UPPER
        axes.hist(values, bins=edges, color=color, alpha=0.45, label=label)
    for side, color in (("lower", _LOWER), ("upper", _UPPER)):
        if _has(result, side):
            bound = float((getattr(result, side) - center).mean())
            axes.axvline(bound, color=color, lw=1.8, label=f"{side} bound")
    if _is_two_sided(result):
        estimate = float((result.bennett - center).mean())
        axes.axvline(estimate, color=_ESTIMATE, lw=1.2, ls="--", label="Bennett")
    minus = "" if math.prod(pooled) == 1 else " - log evidence"
    axes.set(xlabel=f"log-weight{minus} (nats)", ylabel="chains")
    axes.set_title("Log-weights and bounds", fontsize="medium")
    axes.locator_params(axis="x", nbins=4)  # labels such as -139.175 are wide
    _count_axis(axes)
    _legend_above(axes)
    _tidy(axes)
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
    axes = _new_axes() if axes is None else axes
    spread = []
    center = _flat_height(result)
    for direction, run in _runs(result).items():
        betas, curve = _numpy(run.betas), run.scale * _numpy(run.mean_log_ratio) - center
        curve = np.where(np.isfinite(curve), curve, np.nan)  # chains of zero weight leave gaps
        taken = betas[:-1] if direction == "forward" else betas[1:]
        color = _LOWER if direction == "forward" else _UPPER
        axes.plot(taken, curve, color=color, lw=1.8, label=f"{direction}: " + _EXPECTATION)
        integral = np.concatenate([[0.0], np.cumsum(np.diff(betas) * curve)])  # NaN from a gap on
        label = f"{direction}: integral, {run.single.mean().item():.4g}"
        axes.plot(betas, integral, color=color, lw=1.2, ls="--", label=label)
        if direction == "forward" or len(_runs(result)) == 1:
            axes.fill_between(taken, curve, 0.0, color=_SHADE, alpha=0.25, lw=0)
        spread += [curve, integral]
    axes.axhline(0.0, color=_SHADE, lw=0.8)
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
        _legend(axes)
    else:
        _legend_above(axes)
    _tidy(axes)
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
        color = _LOWER if direction == "forward" else _UPPER
        axes[0].plot(
            _numpy(run.betas[1:-1]), _numpy(run.accept_prob), color=color, lw=1.2, label=direction
        )
        pilot = run.pilot
        if direction == "forward" and pilot is not None:
            marks = {"color": _ESTIMATE, "ls": "", "marker": ".", "ms": 5, "label": "pilot"}
            marks["clip_on"] = False  # its first beta is 0 and its last 1
            axes[0].plot(_numpy(pilot.betas), _numpy(pilot.accept_prob), **marks)
            axes[1].plot(_numpy(pilot.betas), _numpy(pilot.step_size), **marks)
    first = next(iter(runs.values()))
    axes[1].plot(_numpy(first.betas[1:-1]), _numpy(first.step_size), color=_LOWER, lw=1.2)
    axes[0].set(ylabel="acceptance", ylim=(-0.02, 1.02))
    _scale_step_sizes(axes[1], _numpy(first.step_size))
    axes[0].set_title("Acceptance", fontsize="medium")
    axes[1].set_title("Step size", fontsize="medium")
    axes[0].legend(frameon=False, fontsize="small", loc="lower right")
    for panel in axes:
        _scale_beta_axis(panel, result)
    if stacked:
        axes[0].set(xlabel=None)
        axes[0].tick_params(labelbottom=False)
    _tidy(*axes)
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
    lower, ess = _numpy(evidence.lower), _numpy(evidence.ess)
    finite = _finite(evidence.lower)
    left.hist(finite, bins=_bin_edges([finite]), color=_LOWER, alpha=0.7)
    outside = lower.size - finite.size
    left.set(xlabel="lower bound per datum (nats)", ylabel="data")
    left.set_title(f"{outside} without finite bound" if outside else "", fontsize="small")
    _count_axis(left)
    right.plot(lower, ess, ls="", marker=".", ms=4, alpha=0.6, color=_LOWER)
    for share, style, name in ((1 / 3, "--", "few should be below"), (0.1, ":", "none below")):
        least = share * (min(evidence.num_chains, 64) if share > 0.1 else evidence.num_chains)
        right.axhline(least, color=_SHADE, lw=1, ls=style, label=name)
    right.set(xlabel="lower bound per datum (nats)", ylabel="effective sample size")
    right.set_ylim(0.0, 1.05 * evidence.num_chains)
    _legend(right)
    figure.suptitle(
        f"{len(lower)} data in {evidence.num_batches} batches: lower bound on their log evidence "
        f"{evidence.total.item():.6g} nats",
        fontsize="medium",
    )
    _tidy(left, right)
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
            ("lower", "lower bound", _LOWER),
            ("plug_in", "plug-in", _ESTIMATE),
            ("upper", "upper bound", _UPPER),
        )
        if getattr(information, name) is not None
    ]
    values = {name: _finite(getattr(information, f"pair_{name}")) for name, _, _ in sides}
    edges = _bin_edges(list(values.values()))
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
        left.axhline(information.ceiling, color=_SHADE, lw=1, ls="--", label=ceiling)
        _legend_above(left)
    target = "I(x; z)" if information.missing is None else f"I(x; z) - {information.missing}"
    left.set_ylabel(f"{target} (nats)")
    right.set(xlabel="value of a pair (nats)", ylabel="pairs")
    _count_axis(right)
    _legend_above(right)
    figure.suptitle(
        f"{information.method} on {target}, {information.num_pairs} pairs, "
        "bars: two standard errors",
        fontsize="medium",
    )
    _tidy(left, right)
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
    factors = _numpy(comparison.log_bayes_factors[:, 0])
    low, high = (_numpy(end[:, 0]) for end in comparison.normal_interval(level))
    sure_low, sure_high = (_numpy(end[:, 0]) for end in comparison.interval(level))
    probabilities = comparison.probabilities.tolist()
    for i in range(count):
        if i and np.isfinite([sure_low[i], sure_high[i]]).all():
            named = any(line.get_label() == "guaranteed" for line in axes.lines)
            name = "_" if named else "guaranteed"
            axes.plot([sure_low[i], sure_high[i]], [i, i], color=_LOWER, lw=1.2, label=name)
        if i:
            name = "asymptotic" if i == 1 else "_"
            axes.plot([low[i], high[i]], [i, i], color=_LOWER, lw=4.5, label=name)
        axes.plot([factors[i]], [i], color=_ESTIMATE, marker="o", ms=5, ls="")
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
    axes.axvline(0.0, color=_SHADE, lw=1)
    for nats, name in ((-3.0, "3 and 5 nats"), (-5.0, "_")):
        axes.axvline(nats, color=_SHADE, lw=0.8, ls=":", label=name)
    axes.set_yticks(range(count), comparison.names)
    axes.set_ylim(count - 0.4, -0.9)
    axes.set_xlabel(f"log Bayes factor against {comparison.names[0]} (nats)")
    title = f"Log Bayes factors, intervals at {level:.0%}"
    axes.set_title(title, fontsize="medium", pad=24 if count > 1 else None)
    if count > 1:
        where = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "borderaxespad": 0.0}
        axes.legend(frameon=False, fontsize="small", ncols=3, **where)
    _tidy(axes)
    return axes.figure


def _count_axis(axes: Axes) -> None:
    """Puts ticks of the vertical axis at whole numbers."""
    axes.locator_params(axis="y", integer=True)


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize="small")


def _legend_above(axes: Axes) -> None:
    """Makes room for a legend above all that is drawn."""
    handles, labels = axes.get_legend_handles_labels()
    rows = -(-len(labels) // 2)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.12 * rows * (high - low))
    for line in axes.lines:  # vertical lines end below the legend
        if line.get_transform() == axes.get_xaxis_transform(which="grid"):
            line.set_ydata([0.0, 1.0 / (1.0 + 0.12 * rows)])
    axes.legend(
        handles,
        labels,
        frameon=False,
        fontsize="small",
        loc="upper center",
        ncols=2,
        borderaxespad=0.1,
        handlelength=1.6,
        columnspacing=1.2,
    )


def _steps_axis(axes: Axes, steps: Sequence[int]) -> None:
    """Labels a logarithmic axis at the numbers of steps, as far as they have room."""
    axes.set_xlabel("steps $T$")
    span = math.log(steps[-1] / steps[0]) if len(steps) > 1 else 0.0
    shown: list[int] = []
    for count in steps:
        if not shown or math.log(count / shown[-1]) > 0.12 * span:
            shown.append(count)
    axes.set_xticks(shown, [str(count) for count in shown])
    axes.set_xticks([], minor=True)


def _flat_height(result: AnnealedRun | Sandwich) -> float:
    """Returns the height of a curve that is flat beside it, else 0."""
    curves = [run.scale * _numpy(run.mean_log_ratio) for run in _runs(result).values()]
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
        color=_ESTIMATE,
        marker="o",
        ms=4,
        capsize=2,
    )
    # a realized gap can be of either sign: where it is not positive show only how far it may reach
    limits = np.nan_to_num(gaps + 2.0 * errors)
    limited = ~positive & (limits > 0.0)
    if limited.any():
        marks = {"ls": "", "marker": "v", "mfc": "none", "color": _ESTIMATE, "ms": 5}
        axes.plot(steps[limited], limits[limited], **marks, label="not positive, at most")
    if positive.any():
        anchor = gaps[positive][0] * steps[positive][0]
        axes.plot(steps, anchor / steps, color=_SHADE, lw=1, ls="--", label=r"$\propto 1 / T$")
        axes.legend(frameon=False, fontsize="small", loc="lower left")
    axes.set(xscale="log", yscale="log", ylabel="mean gap (nats)")
    axes.set_title("Gap", fontsize="medium")
    _steps_axis(axes, list(sandwiches))


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


def _bin_edges(samples: list[Array]) -> Array:
    """Shares bins between directions; the range leaves out what lies far from the middle half."""
    values = np.concatenate(samples)
    if values.size == 0:
        return np.linspace(-1.0, 1.0, 3)
    low, high = np.quantile(values, [0.25, 0.75])
    reach = 4.0 * (high - low)  # 6 standard deviations of a Gaussian
    low, high = max(values.min(), low - reach), min(values.max(), high + reach)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    count = int(np.clip(2.0 * math.sqrt(values.size), 8, 50))
    return np.linspace(low, high, count + 1)


def _scale_beta_axis(axes: Axes, result: AnnealedRun | Sandwich) -> None:
    betas = _numpy(next(iter(_runs(result).values())).betas)
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


def _scale_step_sizes(axes: Axes, step_sizes: Array) -> None:
    axes.set_ylabel("step size")
    if step_sizes.size and step_sizes.max() > 10.0 * step_sizes.min() > 0.0:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0.0)


def _tidy(*panels: Axes) -> None:
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)


def _finite(values: Tensor) -> Array:
    array: Array = _numpy(values).reshape(-1)
    return np.asarray(array[np.isfinite(array)])


def _numpy(values: Tensor) -> Array:
    array: Array = values.detach().cpu().numpy()
    return array


def _new_axes() -> Figure:
    return pyplot().figure(figsize=(4.8, 3.6), layout="constrained").subplots()


def pyplot() -> Figure:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "plots need the package matplotlib: pip install 'pyro-anneal[plot]'"
        ) from error
    return pyplot
