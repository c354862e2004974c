"""What 64 chains of 500 steps leave on forty Gaussians far apart, if every transition is perfect.

    python benchmarks/perfect_transitions.py

The 40 Gaussians of ``benchmarks/misses.py`` (d = 50, means uniform in +-40, unit scales) are annealed
from N(0, 40^2) by populations of K = 64 in numpy alone: while modes overlap, chains draw their mode
and place anew from the exact path; once they are apart (beta > .0015), their place within it alone.
Betas are at equal thermodynamic length, and resampling is systematic, below .8 of K, as in the package.
Prints the standard deviation of log Z over repetitions (its truth is 0), and how often one run, and
eight of eight, end within half a nat.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results" / "perfect_transitions.json"
DIM, NUM_MODES, WIDTH = 50, 40, 40.0
APART = 0.0015  # modes are 230 apart: from here on four deviations of a mode do not reach another


def local(beta, means):
    """Returns precision and means of the path's Gaussians, and their log masses."""
    precision = (1.0 - beta) / WIDTH**2 + beta
    centre = beta * means / precision
    square = (means**2).sum(-1)
    log_mass = 0.5 * precision * (centre**2).sum(-1) - 0.5 * beta * square
    log_mass = log_mass - 0.5 * DIM * np.log(precision)
    constant = -beta * np.log(NUM_MODES) - (1.0 - beta) * DIM * np.log(WIDTH)
    return precision, centre, log_mass + constant


def betas_of_equal_length(means, num_steps):
    """Divides the path of the middle mode by the standard deviation of log p/q along it."""
    grid = np.concatenate([[0.0], np.logspace(-8, 0, 20_000)])
    square = np.median((means**2).sum(-1))
    precision = (1.0 - grid) / WIDTH**2 + grid
    slope = 1.0 / WIDTH**2 - 1.0
    pull = square * (slope * grid / precision + 1.0) ** 2
    speed = np.sqrt(pull / precision + 0.5 * DIM * slope**2 / precision**2)
    length = np.concatenate([[0.0], np.cumsum(0.5 * (speed[1:] + speed[:-1]) * np.diff(grid))])
    inner = np.interp(np.linspace(0.0, length[-1], num_steps + 1), length, grid)
    return inner, float(length[-1])


def run(means, betas, num_chains, rng, *, resample):
    """Runs one population; returns its error of log Z."""
    modes = rng.integers(NUM_MODES, size=num_chains)
    log_weights, log_norm = np.zeros(num_chains), 0.0
    for now, after in pairwise(betas):
        precision, centre, log_mass = local(now, means)
        if now <= APART:
            noise = rng.gumbel(size=(num_chains, NUM_MODES))
            modes = (log_mass + noise).argmax(-1)
        place = centre[modes] + rng.standard_normal((num_chains, DIM)) / np.sqrt(precision)
        ratio = -0.5 * ((place - means[modes]) ** 2).sum(-1) - np.log(NUM_MODES)
        ratio = ratio + 0.5 * (place**2).sum(-1) / WIDTH**2 + DIM * np.log(WIDTH)
        log_weights = log_weights + (after - now) * ratio
        top = log_weights.max()
        weights = np.exp(log_weights - top)
        if resample and weights.sum() ** 2 < 0.8 * num_chains * (weights**2).sum():
            log_norm += top + np.log(weights.mean())
            cuts = (np.arange(num_chains) + rng.random()) / num_chains
            kept = np.searchsorted(np.cumsum(weights) / weights.sum(), cuts)
            modes, log_weights = modes[kept.clip(max=num_chains - 1)], np.zeros(num_chains)
    top = log_weights.max()
    estimate = log_norm + top + np.log(np.exp(log_weights - top).mean())
    return estimate + np.log(NUM_MODES)  # the path begins with one prior for each mode


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=400)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    means = rng.uniform(-40.0, 40.0, (NUM_MODES, DIM))
    found = {"numpy": np.__version__, "repetitions": options.repetitions}
    for name, num_steps, resample in (
        ("resampled, T = 500", 500, True),
        ("not resampled, T = 500", 500, False),
        ("resampled, T = 2000", 2000, True),
    ):
        betas, length = betas_of_equal_length(means, num_steps)
        errors = [
            run(means, betas, 64, rng, resample=resample) for _ in range(options.repetitions)
        ]
        errors = np.array(errors)
        within = float((np.abs(errors) < 0.5).mean())
        found[name] = {
            "length": length,
            "mean": float(errors.mean()),
            "standard deviation": float(errors.std()),
            "within half a nat": within,
            "eight of eight": within**8,
        }
        print(name, {key: round(value, 3) for key, value in found[name].items()}, flush=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
