"""The picture of an expected information gain (``pip install 'pyro-anneal[plot]'``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..models.types import Figure
from .plot_axes import pyplot

if TYPE_CHECKING:  # results import their pictures, not the other way round
    from .information_gain import ExpectedInformationGain

__all__ = ["plot_information_gain"]

_COLORS = {"lower": "#0072B2", "upper": "#D55E00"}


def plot_information_gain(result: ExpectedInformationGain) -> Figure:
    """Draws both bounds of each design, with bars of two standard errors over pairs.

    Args:
        result: The bounds.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = pyplot().figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    design, count = result.design, result.lower.numel()
    is_number = design is not None and design.shape == result.lower.shape and design.dim() == 1
    places = [float(place) for place in range(count)]
    if is_number and design is not None:
        places = [float(value) for value in design]
    order = sorted(range(count), key=places.__getitem__)
    for name, color in _COLORS.items():
        values = getattr(result, name).flatten().tolist()
        errors = (2.0 * getattr(result, f"{name}_std_error")).nan_to_num(0.0).flatten().tolist()
        axes.errorbar(
            [places[i] for i in order],
            [values[i] for i in order],
            [errors[i] for i in order],
            color=color,
            marker="o",
            ms=4,
            lw=1.0,
            capsize=3,
            label=f"{name} bound",
        )
    axes.set_xlabel("design" if is_number else "index of the design")
    axes.set_ylabel("expected information gain (nats)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.suptitle(
        f"Expected information gain, {result.num_pairs} pairs per design, bars: two standard errors",
        fontsize="medium",
    )
    return figure
