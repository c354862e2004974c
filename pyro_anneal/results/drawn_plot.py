"""Pictures of evidence from draws and of audits, with matplotlib (``pip install 'pyro-anneal[plot]'``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .plotting import pyplot

if TYPE_CHECKING:  # results import their pictures, not the other way round
    from .drawn import EvidenceFromSamples

__all__ = ["plot_evidence_from_samples"]

_COLORS = {"lower": "#0072B2", "upper": "#D55E00", "bridge": "#000000", "thames": "#999999"}


def plot_evidence_from_samples(result: EvidenceFromSamples) -> Any:
    """Draws bounds and estimates side by side, with two standard errors; sums over a batch.

    Args:
        result: The result.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    figure = pyplot().figure(figsize=(4.8, 2.8), layout="constrained")
    axes = figure.subplots()
    found = result._estimates()
    for place, (name, (value, error)) in enumerate(found.items()):
        bar = 2.0 * float(error.square().sum().sqrt())
        bar = bar if np.isfinite(bar) else 0.0
        axes.errorbar(float(value.sum()), -place, xerr=bar, fmt="o", color=_COLORS[name])
    axes.set_yticks([-place for place in range(len(found))], list(found))
    axes.set_ylim(-len(found) + 0.5, 0.5)
    axes.set_xlabel("log evidence, nats")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
