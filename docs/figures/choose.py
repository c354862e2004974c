"""Draws the decision picture of the documentation: ``python docs/figures/choose.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"

# Three columns: what is asked, what is at hand, which call answers.
BRANCHES = [
    (
        "How probable\nis my data?",
        BLUE,
        [
            ("a model; one mode", 'log_evidence(model, x)\nguide="auto", lower bound'),
            ("several modes", 'guide="auto", cross_check=True\nor prior_weight=0.5'),
            ("want both sides", "ais.sandwich(x)\nsimulated data: lower and upper"),
            (
                "exact posterior samples",
                "ais.run_reverse(samples, x, exact=True)\nupper bound on x itself",
            ),
            ("two models", "compare({...})\nBayes factors with intervals"),
        ],
    ),
    (
        "How much do\nlatents tell?",
        ORANGE,
        [
            ("p(z) and p(x | z)", "mi.AIS\nlower and upper, gap falls as 1/T"),
            ("p(z) and samples", "mi.GIWAE, mi.MINEAIS\nlower"),
            (
                "samples only",
                "mi.InfoNCE (at most log K)\nmi.GIWAE(None, decoder, critic): I - H(x)",
            ),
        ],
    ),
    (
        "Train with a\ntighter bound",
        GREEN,
        [
            ("continuous latents", 'losses.IWAE(10, gradient="dreg")'),
            ("discrete latents", "losses.TVO(10)"),
            ("poor guide, HMC affordable", "losses.AIWAE(10, num_steps=4)"),
            ("the guide must cover", "losses.EUBO(10)"),
        ],
    ),
]


def _box(
    axes: Any, x: float, y: float, width: float, height: float, text: str, **style: Any
) -> None:
    color = style.pop("color")
    axes.add_patch(
        FancyBboxPatch(
            (x, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.12",
            edgecolor=color,
            facecolor=style.pop("fill", "white"),
            lw=1.2,
        )
    )
    axes.text(x + width / 2, y, text, ha="center", va="center", **style)


def draw() -> Any:
    """Draws the picture.

    Returns:
        The figure.
    """
    rows = sum(len(options) for _, _, options in BRANCHES) + 0.6 * (len(BRANCHES) - 1)
    figure = plt.figure(figsize=(10.0, 0.56 * rows + 0.5))
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set(xlim=(0, 10), ylim=(-rows + 0.35, 1.1))
    axes.set_axis_off()
    for x, title in ((0.0, "I want to know"), (2.65, "I have"), (5.6, "I call")):
        axes.text(x, 0.85, title, color=GREY, style="italic", fontsize=11)
    top = 0.0
    for question, color, options in BRANCHES:
        middle = top - (len(options) - 1) / 2
        _box(axes, 0.0, middle, 1.9, 1.0, question, color=color, fontsize=11, weight="bold")
        for index, (given, call) in enumerate(options):
            y = top - index
            axes.plot(
                [1.9, 2.25, 2.25, 2.6], [middle, middle, y, y], color=color, lw=1.2, zorder=0
            )
            _box(axes, 2.6, y, 2.5, 0.62, given, color=color, fontsize=10)
            axes.annotate(
                "", (5.55, y), (5.1, y), arrowprops={"arrowstyle": "->", "color": color, "lw": 1.2}
            )
            _box(
                axes,
                5.55,
                y,
                4.4,
                0.78,
                call,
                color=color,
                fontsize=9.5,
                family="monospace",
                fill="#f6f6f6",
            )
        top -= len(options) + 0.6
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).resolve().parents[1] / "choose.png", dpi=130)
