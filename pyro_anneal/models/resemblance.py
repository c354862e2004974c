r"""Numbers that look as if they were computed from data, outside of torch or before the model ran.

A copy is found by its values. What was computed from the data has other values, but is seldom like
anything else: a moment that agrees to six digits, a series that is an affine or a monotone function
of the data. By chance an order of n different numbers agrees with that of the data, or its reverse,
in one of :math:`n! / 2` cases. A covariate may be monotone in what it explains, so that a series is
a reason for a remark; a moment is one for a refusal.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from .types import Array

__all__ = ["how_alike", "is_round", "moments"]

_LARGEST = 100_000  # numbers of a series
_CHANCE = math.log(500.0)
_SHIFTS = 3  # places by which a series may lag behind the data, or lead
_TOLERANCE = 2e-6  # relative, of numbers that may have been rounded to float32


def moments(data: Tensor) -> dict[str, float]:
    """Computes what models are given of their data: moments, quantiles and their logarithms.

    Args:
        data: Values of an observed site, of any shape.

    Returns:
        Numbers by name, without those that are round, which models contain anyway.

    Example:
        >>> import torch
        >>> sorted(moments(torch.tensor([1.0, 2.0, 4.0])))[:3]
        ['deviation of the logs', 'log of the mean', 'mean']
    """
    x = _numbers(data)
    x = x[np.isfinite(x)]
    if not 3 <= len(x) <= _LARGEST or len(np.unique(x)) < 3:
        return {}
    found = {
        "mean": x.mean(),
        "standard deviation": x.std(),
        "standard deviation (n - 1)": x.std(ddof=1),
        "variance": x.var(),
        "variance (n - 1)": x.var(ddof=1),
        "median": np.median(x),
        "smallest value": x.min(),
        "largest value": x.max(),
        "lower quartile": np.quantile(x, 0.25),
        "upper quartile": np.quantile(x, 0.75),
    }
    if x.mean() > 0.0:
        found |= {"log of the mean": math.log(x.mean()), "reciprocal of the mean": 1.0 / x.mean()}
    if x.min() > 0.0:
        found |= {"mean of the logs": np.log(x).mean(), "deviation of the logs": np.log(x).std()}
    return {name: float(value) for name, value in found.items() if not is_round(float(value))}


def is_round(value: float) -> bool:
    """Tells whether a number has at most four decimals, as those have that people write.

    Example:
        >>> is_round(0.3), is_round(1 / 3)
        (True, False)
    """
    scaled = value * 1e4
    return not math.isfinite(scaled) or abs(scaled - round(scaled)) <= 2e-7 * max(abs(scaled), 1.0)


def _numbers(values: Tensor) -> Array:
    return values.detach().cpu().double().reshape(-1).numpy()


def how_alike(values: Tensor, data: Tensor) -> str | None:
    """Says how a series depends on data, or on all of them but a few at an end.

    Args:
        values: A series that a model reads.
        data: Values of an observed site.

    Returns:
        "an affine function" (of data up to three places away), "a monotone function" or None; ranges, constants, and what would agree by chance
        once in 500 cases, count as nothing.

    Example:
        >>> import torch
        >>> x = torch.tensor([0.3, -1.2, 2.1, 0.4, 1.7, -0.2, 0.9, -0.8])
        >>> how_alike(2 * x + 1, x), how_alike(x.abs().log1p(), x), how_alike(x.sin(), x)
        ('an affine function', 'a monotone function', None)
    """
    if not 4 <= values.numel() <= data.numel() + _SHIFTS or data.numel() > _LARGEST:
        return None
    ours, theirs = _numbers(values), _numbers(data)
    if len(np.unique(ours)) < 2 or not np.isfinite(ours).all():
        return None
    steps = np.diff(ours)
    if np.ptp(steps) <= 1e-6 * np.abs(steps).max():  # a range, of times say
        return None
    for shift in range(-_SHIFTS, len(theirs) - len(ours) + _SHIFTS + 1):
        first, last = max(-shift, 0), min(len(ours), len(theirs) - shift)
        if last - first < max(4, len(ours) - _SHIFTS, len(theirs) - _SHIFTS):
            continue
        part, of_data = ours[first:last], theirs[first + shift : last + shift]
        if not np.isfinite(of_data).all():
            continue
        if _is_affine(part, of_data):
            return "an affine function"
        sizes = (of_data, np.abs(of_data), np.abs(of_data - of_data.mean()))
        if _surprise(part) > _CHANCE and any(_is_monotone(part, size) for size in sizes):
            return "a monotone function"
    return None


def _is_affine(ours: Array, theirs: Array) -> bool:
    spread = np.ptp(theirs)
    if len(np.unique(ours)) < 4 or spread == 0.0:
        return False
    u, v = ours - ours.mean(), theirs - theirs.mean()
    slope = (u * v).sum() / (v * v).sum()
    scale = np.abs(u).max() + _TOLERANCE * np.abs(ours).max()
    return bool(np.abs(u - slope * v).max() <= 1e1 * _TOLERANCE * scale)


def _is_monotone(ours: Array, theirs: Array) -> bool:
    """Tells whether a series rises, or falls, with another, and is equal where that is."""
    order = np.lexsort((ours, theirs))
    steps, moved = np.diff(ours[order]), np.diff(theirs[order])
    same = moved <= _TOLERANCE * np.abs(theirs).max()
    steps = np.where(np.abs(steps) <= _TOLERANCE * np.abs(ours).max(), 0.0, steps)
    return bool((steps[same] == 0.0).all() and ((steps >= 0.0).all() or (steps <= 0.0).all()))


def _surprise(ours: Array) -> float:
    """Computes minus the log of the chance that an order at random agrees with one of those tried."""
    _, counts = np.unique(ours, return_counts=True)
    orders = math.lgamma(len(ours) + 1) - sum(math.lgamma(count + 1) for count in counts)
    return orders - math.log(2.0 * 3.0 * (2 * _SHIFTS + 1))
