"""Pictures of mutual information bounds; matplotlib is imported where it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..models.types import Axes, Figure
from ..results.mutual_information import MutualInformation

__all__ = ["plot_bounds", "plot_bounds_against_time", "plot_decomposition"]

Series = Mapping[str, Mapping[float, MutualInformation]]


def _axes(axes: Axes) -> Figure:
    if axes is not None:
        return axes
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib: pip install matplotlib, or pip install 'pyro-anneal[plot]'"
        ) from error
    return plt.subplots(figsize=(6.0, 4.0), layout="constrained")[1]


def _draw_series(axes: Axes, series: Series, level: float) -> None:
    for index, (name, points) in enumerate(series.items()):
        color = f"C{index}"
        for side, style in (("lower", "-"), ("upper", "--"), ("plug_in", ":")):
            chosen = [
                (at, est) for at, est in sorted(points.items()) if getattr(est, side) is not None
            ]
            if not chosen:
                continue
            places = [at for at, _ in chosen]
            values = [float(getattr(est, side)) for _, est in chosen]
            margin = _normal_score(level)
            errors = [margin * float(getattr(est, f"{side}_std_error")) for _, est in chosen]
            label = f"{name} {side.replace('_', '-')}"
            axes.plot(places, values, style, color=color, marker="o", markersize=3, label=label)
            below = [value - error for value, error in zip(values, errors, strict=True)]
            above = [value + error for value, error in zip(values, errors, strict=True)]
            axes.fill_between(places, below, above, color=color, alpha=0.15, linewidth=0)


def _normal_score(level: float) -> float:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level}")
    from statistics import NormalDist

    return NormalDist().inv_cdf(0.5 + 0.5 * level)


def _finish(axes: Axes, truth: float | None, xlabel: str) -> Figure:
    if truth is not None:
        axes.axhline(truth, color="black", linewidth=1.0, label="truth")
    axes.set_xscale("log")
    axes.set_xlabel(xlabel)
    axes.set_ylabel("mutual information (nats)")
    axes.legend(fontsize=8)
    return axes


def plot_bounds(
    series: Series,
    *,
    against: str = "K",
    truth: float | None = None,
    level: float = 0.95,
    axes: Axes = None,
) -> Figure:
    """Plots bounds against the number of particles K or of annealing steps T.

    Lower bounds are solid, upper bounds dashed, plug-in estimates dotted; bands are intervals over
    pairs. Source: Brekelmans et al. (2022), Fig. 5.

    Args:
        series: Estimates by name, then by K or T.
        against: Label of the horizontal axis, ``"K"`` or ``"T"``.
        truth: The mutual information in nats, if known.
        level: Coverage of the bands.
        axes: Matplotlib axes to draw into; new ones if None.

    Returns:
        The matplotlib axes.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If ``series`` is empty, or ``level`` is not in (0, 1).
    """
    if not any(series.values()):
        raise ValueError("there is nothing to plot: series is empty")
    axes = _axes(axes)
    _draw_series(axes, series, level)
    label = {"K": "particles K", "T": "annealing steps T"}.get(against, against)
    axes.set_title("Bounds on mutual information", fontsize="medium")
    return _finish(axes, truth, label)


def plot_bounds_against_time(
    series: Series,
    *,
    truth: float | None = None,
    level: float = 0.95,
    axes: Axes = None,
) -> Figure:
    """Plots bounds against the wall time they took. Source: Brekelmans et al. (2022), Fig. 8.

    Args:
        series: Estimates by name, then by seconds.
        truth: The mutual information in nats, if known.
        level: Coverage of the bands.
        axes: Matplotlib axes to draw into; new ones if None.

    Returns:
        The matplotlib axes.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If ``series`` is empty, or ``level`` is not in (0, 1).
    """
    return plot_bounds(series, against="wall time (s)", truth=truth, level=level, axes=axes)


def plot_decomposition(
    estimates: Mapping[str, MutualInformation] | Sequence[MutualInformation],
    *,
    truth: float | None = None,
    axes: Axes = None,
) -> Figure:
    """Plots each lower bound as a bar of its variational and contrastive parts.

    Bounds that have no parts (AIS) are one bar. A tick marks the ceiling of the contrastive part.
    Source: Brekelmans et al. (2022), Fig. 3(a).

    Args:
        estimates: Estimates by label, or a sequence labelled by method.
        truth: The mutual information in nats, if known.
        axes: Matplotlib axes to draw into; new ones if None.

    Returns:
        The matplotlib axes.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If an estimate has neither a lower bound nor a plug-in value.
    """
    if not isinstance(estimates, Mapping):
        estimates = {est.method: est for est in estimates}
    axes = _axes(axes)
    colors = {"variational": "C0", "contrastive": "C1", "total": "C2"}
    for place, (label, est) in enumerate(estimates.items()):
        value = est.lower if est.lower is not None else est.plug_in
        error = est.lower_std_error if est.lower is not None else est.plug_in_std_error
        if value is None or error is None:
            raise ValueError(f'"{label}" has no lower bound to decompose, only an upper one')
        parts = {k: float(v) for k, v in est.terms.items()} or {"total": float(value)}
        # A negative part hangs below 0: stacked on a positive one it would be hidden by it.
        positive = 0.0
        for name in ("variational", "contrastive", "total"):
            if name in parts:
                bottom = positive if parts[name] >= 0.0 else 0.0
                axes.bar(place, parts[name], bottom=bottom, width=0.7, color=colors[name])
                positive += max(parts[name], 0.0)
        axes.errorbar(place, float(value), yerr=1.96 * float(error), color="black", capsize=3)
        if est.ceiling is not None:
            top = est.ceiling + parts.get("variational", 0.0)
            axes.hlines(top, place - 0.35, place + 0.35, color="grey", linestyle=":")
    axes.set_title("Parts of the bounds (dotted: their ceiling)", fontsize="medium")
    axes.set_xticks(range(len(estimates)), list(estimates), rotation=30, ha="right")
    axes.set_ylabel("mutual information (nats)")
    if truth is not None:
        axes.axhline(truth, color="black", linewidth=1.0)
    used = {k for est in estimates.values() for k in (list(est.terms) or ["total"])}
    handles = [axes.bar(0, 0, color=colors[k], label=k) for k in colors if k in used]
    axes.legend(handles=handles, fontsize=8)
    return axes
