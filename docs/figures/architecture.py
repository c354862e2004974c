"""Draws the rooms of the package, as pyproject.toml orders them, with what each answers.

Run from the root of the repository: ``python docs/figures/architecture.py``.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt

QUESTIONS = {
    "demo": "a picture to start with",
    "audits": "what do posterior\ndraws tell?",
    "oed": "which design tells most?",
    "anneal": "the front door",
    "losses": "training",
    "mi": "information",
    "runs": "what does one call do?",
    "compiled": "how does a chunk become\none program?",
    "problems": "what is annealed,\nfrom where?",
    "chains": "what path, what pilot, what loop?",
    "diagnostics": "what looks wrong?",
    "results": "what comes back?",
    "graphs": "from one chain's densities\nto a graph of K chains",
    "eim": "energy-inspired models",
    "kernels": "transitions",
    "models": "how is a Pyro model\none vector?",
    "native": "how does a graph\nbecome C++?",
    "persistence": "what outlives\na process?",
}


def layers() -> list[list[str]]:
    """Reads the order of rooms, and keeps those that are folders or the front door."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    lines = text.split("layers = [")[1].split("]")[0].splitlines()
    rows = [line.strip(' ",').split(" | ") for line in lines if line.strip()]
    kept = [[room for room in row if room in QUESTIONS] for row in rows]
    return [row for row in kept if row]


def main() -> None:
    """Writes docs/architecture.png."""
    rows = layers()
    figure, axes = plt.subplots(figsize=(8.0, 0.85 * len(rows)))
    for height, row in enumerate(reversed(rows)):
        width = 12.0 / len(row)
        for place, room in enumerate(row):
            box = plt.Rectangle(
                (place * width + 0.1, height + 0.08), width - 0.2, 0.84, fc="#e8f1f8", ec="#0072B2"
            )
            axes.add_patch(box)
            middle = (place + 0.5) * width
            axes.text(middle, height + 0.7, room, ha="center", va="center", weight="bold")
            axes.text(middle, height + 0.33, QUESTIONS[room], ha="center", va="center", fontsize=8)
    axes.set(xlim=(0.0, 12.0), ylim=(0.0, len(rows)))
    axes.axis("off")
    figure.savefig(Path(__file__).parents[1] / "architecture.png", dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
