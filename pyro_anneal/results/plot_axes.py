"""What the pictures of results share: colours, axes, legends."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..models.types import Array, Axes, Figure

__all__ = [
    "ESTIMATE",
    "LOWER",
    "SHADE",
    "UPPER",
    "add_legend",
    "add_legend_above",
    "as_array",
    "bin_edges",
    "count_axis",
    "finite_values",
    "new_axes",
    "pyplot",
    "scale_step_sizes",
    "steps_axis",
    "tidy",
]

LOWER, UPPER, ESTIMATE, SHADE = "#0072B2", "#D55E00", "#000000", "#999999"


def count_axis(axes: Axes) -> None:
    """Puts ticks of the vertical axis at whole numbers."""
    axes.locator_params(axis="y", integer=True)


def add_legend(axes: Axes) -> None:
    """Adds a small legend without a frame."""
    axes.legend(frameon=False, fontsize="small")


def add_legend_above(axes: Axes) -> None:
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


def steps_axis(axes: Axes, steps: Sequence[int]) -> None:
    """Labels a logarithmic axis at the numbers of steps, as far as they have room."""
    axes.set_xlabel("steps $T$")
    span = math.log(steps[-1] / steps[0]) if len(steps) > 1 else 0.0
    shown: list[int] = []
    for count in steps:
        if not shown or math.log(count / shown[-1]) > 0.12 * span:
            shown.append(count)
    axes.set_xticks(shown, [str(count) for count in shown])
    axes.set_xticks([], minor=True)


def bin_edges(samples: list[Array]) -> Array:
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


def scale_step_sizes(axes: Axes, step_sizes: Array) -> None:
    """Labels an axis of step sizes, which is logarithmic if they differ by much."""
    axes.set_ylabel("step size")
    if step_sizes.size and step_sizes.max() > 10.0 * step_sizes.min() > 0.0:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0.0)


def tidy(*panels: Axes) -> None:
    """Removes the lines above and on the right."""
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)


def finite_values(values: Tensor) -> Array:
    """Collects the finite values of a tensor."""
    array: Array = as_array(values).reshape(-1)
    return np.asarray(array[np.isfinite(array)])


def as_array(values: Tensor) -> Array:
    """Copies a tensor to the host as an array."""
    array: Array = values.detach().cpu().numpy()
    return array


def new_axes() -> Figure:
    """Makes a figure of one panel."""
    return pyplot().figure(figsize=(4.8, 3.6), layout="constrained").subplots()


def pyplot() -> Figure:
    """Imports matplotlib, or names the extra that brings it."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "plots need the package matplotlib: pip install 'pyro-anneal[plot]'"
        ) from error
    return pyplot
