r"""How log p/q fluctuates along the path, as the pilot sees it: by how much, and for how long.

Each stretch between two knots is cut in pieces that double in width, since the variance of log p/q
can fall by decades within the first stretch. In each piece, moments are those of the particles at
both ends, tilted to the beta between them by weights :math:`e^{\Delta\beta \, \log p/q}`, and
averaged in proportion to nearness.

One transition shows the fast part of the memory only. What is slow shows in the lineages of
particles, over the transitions of a stage and across resampling: tilting a Gaussian process moves
its mean and leaves its correlations. These are correlations of ranks, pooled over all stages, since
a few outlying particles would decide any others; of their sum remains one factor, by which the
memory outlasts that of the first lag.

Source: our own derivation.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Fluctuations", "Lineages", "Pieces", "memory_factor"]

# Ends of the pieces of a stretch, as fractions of it; moments are taken at 3/4 of each upper end.
# Finer ones, of a few steps of a run, see more of the tails of log p/q than its chains do.
_HALVINGS = tuple(0.5**power for power in range(4, -1, -1))
_REACH = 24  # longest lag in transitions; fewer than a fifth of all lineages survive four stages
# What memories were found to outlast their first lag by, on paths from a prior and from a fit, and
# the number of particles and stages that this is worth against what is measured.
_USUAL_FACTOR, _USUAL_COUNT = 1.5, 128
_LARGEST_FACTOR, _LARGEST_CORRELATION = 10.0, 0.99
_LEAST_CORRELATION = 0.05  # smaller ones end the sum over lags


class Pieces(NamedTuple):
    """The path in pieces, in each of which log p/q fluctuates alike."""

    betas: tuple[float, ...]  # ends of the P pieces, [P + 1]
    lengths: tuple[float, ...]  # thermodynamic, [P]
    correlations: tuple[float, ...]  # of a memory that decays as 1, rho, rho^2, ..., [P]


class Fluctuations:
    """Gathers what the stages of a pilot tell; nothing in it waits for the device."""

    def __init__(self) -> None:
        self._knots: list[float] = []
        self._latest = torch.zeros(())
        self._moments: list[Tensor] = []
        self._lineages = Lineages()

    def stage(self, beta: float, ratios: Tensor) -> None:
        """Enters log p/q ``[N + 1, M, *batch]`` before, between and after N transitions at beta."""
        late = ratios[(len(ratios) - 1) // 2 :]  # step sizes have settled
        if self._knots:
            self._moments.append(_stretch(self._latest, late, beta - self._knots[-1]))
            self._lineages.stage(ratios)
        self._knots.append(beta)
        self._latest = late

    def resample(self, indices: Tensor) -> None:
        """Enters the ancestors ``[M, *batch]`` of the next stage's particles."""
        self._lineages.resample(indices)

    def pieces(self) -> Pieces:
        """Returns lengths and correlations of all pieces."""
        factor = self._lineages.factor()
        moments = torch.cat(self._moments).tolist()
        betas, lengths, correlations = [self._knots[0]], [], []
        widths = [b - a for a, b in itertools.pairwise(self._knots)]
        for stretch, width in enumerate(widths):
            for index, end in enumerate(_HALVINGS):
                variance, covariance = moments[stretch * len(_HALVINGS) + index]
                start = _HALVINGS[index - 1] if index else 0.0
                betas.append(self._knots[stretch] + end * width)
                lengths.append((end - start) * width * math.sqrt(variance))
                first = covariance / variance if variance > 0.0 else 0.0
                correlations.append(_outlasting(first, factor))
            betas[-1] = self._knots[stretch + 1]
        return Pieces(tuple(betas), tuple(lengths), tuple(correlations))


class Lineages:
    """Correlations of the ranks of log p/q along lineages, by lag in transitions."""

    def __init__(self) -> None:
        self._past: list[tuple[int, Tensor]] = []  # transitions ago, and log p/q of the ancestors
        self._seen: dict[int, list[Tensor]] = {}
        self._size = 1

    def resample(self, indices: Tensor) -> None:
        """Replaces particles by those at ``indices`` ``[M, *batch]``."""
        self._past = [(age, torch.gather(value, 0, indices)) for age, value in self._past]

    def stage(self, ratios: Tensor) -> None:
        """Enters log p/q ``[N + 1, M, *batch]`` before, between and after N transitions."""
        count = len(ratios) - 1
        ranks = _ranks(ratios)
        self._size = ratios[0].numel()
        for lag in range(1, count + 1):
            self._enter(lag, (ranks[lag:] * ranks[:-lag]).mean())
        for age, value in self._past:
            self._enter(age + count, (_ranks(value.unsqueeze(0))[0] * ranks[-1]).mean())
        self._past = [
            (age + count, value) for age, value in self._past if age + 2 * count <= _REACH
        ]
        self._past += [(count - start, ratios[start]) for start in sorted({0, count // 2})]

    def _enter(self, lag: int, correlation: Tensor) -> None:
        if lag <= _REACH:
            self._seen.setdefault(lag, []).append(correlation)

    def factor(self) -> float:
        """Estimates how much memories outlast their first lag; 1.5 where little was seen."""
        means = {lag: float(torch.stack(seen).mean()) for lag, seen in self._seen.items()}
        errors = {lag: (len(seen) * self._size) ** -0.5 for lag, seen in self._seen.items()}
        found = memory_factor(means, errors)
        count = len(self._seen[1]) * self._size
        return (count * found + _USUAL_COUNT * _USUAL_FACTOR) / (count + _USUAL_COUNT)


def memory_factor(correlations: dict[int, float], errors: dict[int, float]) -> float:
    r"""Compares a memory with one that decays from its first lag on as :math:`\rho_1^k`.

    .. math:: \sum_{k \ge 1} \rho_k \Big/ \frac{\rho_1}{1 - \rho_1}

    Between lags the sum is linear. It ends at the last lag before one within two standard errors of
    zero; beyond, the memory decays as it did over the latter half of these lags, but at most twice
    as slowly as over all of them.

    Args:
        correlations: By lag, from 1.
        errors: Standard errors by lag.

    Returns:
        Factor in [1, 10].

    Example:
        >>> halves = {lag: 0.5**lag for lag in range(1, 12)}
        >>> round(memory_factor(halves, dict.fromkeys(halves, 0.0)), 1)
        1.0
    """
    seen = {0: 1.0}
    for lag in sorted(correlations):
        value = min(correlations[lag], _LARGEST_CORRELATION)
        if not value > max(_LEAST_CORRELATION, 2.0 * errors[lag]):
            break
        seen[lag] = value
    if len(seen) == 1:
        return _USUAL_FACTOR
    lags = list(seen)
    total = -0.5  # the trapezoids count half of lag 0
    for before, lag in itertools.pairwise(lags):
        total += 0.5 * (lag - before) * (seen[before] + seen[lag])
    total += seen[lags[-1]] * _decay_time(seen)
    first = min(correlations[1], _LARGEST_CORRELATION)
    return min(max(total * (1.0 - first) / first, 1.0), _LARGEST_FACTOR)


def _decay_time(seen: dict[int, float]) -> float:
    """Estimates the time in transitions in which the memory decays by e after the last lag."""
    end = max(seen)
    middle = max(lag for lag in seen if 2 * lag <= end)
    overall = -end / math.log(seen[end])
    fall = math.log(seen[middle] / seen[end])
    latter = (end - middle) / fall if fall > 0.0 else math.inf
    return min(max(latter, overall), 2.0 * overall)


def _outlasting(first: float, factor: float) -> float:
    """Raises a correlation until the sum of its powers is ``factor`` times as large."""
    first = min(max(first, 0.0), _LARGEST_CORRELATION)
    total = factor * first / (1.0 - first)
    return total / (1.0 + total)


def _ranks(values: Tensor) -> Tensor:
    """Computes ranks among the particles of ``[N, M, *batch]``, of mean 0 and variance 1."""
    count = values.shape[1]
    ranks = values.argsort(dim=1, stable=True).argsort(dim=1).double()
    return (ranks - 0.5 * (count - 1)) / math.sqrt((count**2 - 1) / 12.0)


def _stretch(before: Tensor, after: Tensor, width: float) -> Tensor:
    """Computes variance and lagged covariance in each piece between two knots, ``[P, 2]``."""
    found = []
    for end in _HALVINGS:
        share = 0.75 * end
        near = _tilted_moments(before, share * width)
        far = _tilted_moments(after, (share - 1.0) * width)
        found.append((1.0 - share) * near + share * far)
    return torch.stack(found)


def _tilted_moments(ratios: Tensor, increment: float) -> Tensor:
    """Computes variance and lagged covariance of ``[N, M, *batch]`` at another beta, ``[2]``."""
    known = ratios.isfinite()
    ratios = ratios.where(known, 0.0)
    weights = (increment * ratios).where(known, -torch.inf).softmax(1).nan_to_num(0.0)
    variance = (weights * (ratios - _mean(weights, ratios)).square()).sum(1).mean()
    first, second = ratios[:-1], ratios[1:]
    covariances = [  # of the transitions from tilted particles, and of those to them
        (tilted * (first - _mean(tilted, first)) * (second - _mean(tilted, second))).sum(1).mean()
        for tilted in (weights[:-1], weights[1:])
    ]
    count = ratios.shape[1]
    moments = torch.stack([variance, 0.5 * (covariances[0] + covariances[1])])
    return moments.nan_to_num(0.0, 0.0, 0.0) * count / (count - 1)


def _mean(weights: Tensor, values: Tensor) -> Tensor:
    return (weights * values).sum(1, keepdim=True)
