"""Quantiles of the normal and of Student's t distribution, for asymptotic intervals."""

from __future__ import annotations

import math
from statistics import NormalDist

from ..arguments import as_real

__all__ = ["normal_quantile", "student_quantile"]

# Beyond this many degrees of freedom the normal quantile is the same to five digits.
_MANY = 100_000


def _central_probability(t: float, freedom: int) -> float:
    """Computes ``P(|T| < t)`` by the finite sums of Abramowitz and Stegun (1964), 26.7.3-4."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    even = freedom % 2 == 0
    term = total = (1.0 if even else cosine) if freedom > 1 else 0.0
    for k in range(2 if even else 3, freedom - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    return sine * total if even else 2.0 / math.pi * (angle + sine * total)


def student_quantile(freedom: int, probability: float) -> float:
    """Computes a quantile of Student's t distribution.

    Args:
        freedom: Degrees of freedom, at least 1.
        probability: In (0, 1).

    Returns:
        The t with ``P(T <= t) = probability``.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> round(student_quantile(1, 0.975), 3), round(student_quantile(10, 0.975), 3)
        (12.706, 2.228)
    """
    if freedom < 1 or not 0.0 < probability < 1.0:
        raise ValueError(
            f"expected freedom >= 1 and 0 < probability < 1, got {freedom} and {probability}"
        )
    if probability < 0.5:
        return -student_quantile(freedom, 1.0 - probability)
    if freedom > _MANY:
        return NormalDist().inv_cdf(probability)
    central = 2.0 * probability - 1.0
    low, high = 0.0, 1.0
    while _central_probability(high, freedom) < central:
        low, high = high, 2.0 * high
    while high - low > 1e-12 * high:
        middle = 0.5 * (low + high)
        if _central_probability(middle, freedom) < central:
            low = middle
        else:
            high = middle
        if middle in (low, high) and high - low <= math.ulp(high):
            break
    return 0.5 * (low + high)


def normal_quantile(level: float) -> float:
    """Computes how many standard errors an asymptotic interval of coverage ``level`` has each way.

    Raises:
        ValueError: If ``level`` is not in (0, 1).

    Example:
        >>> round(normal_quantile(0.95), 2)
        1.96
    """
    if not 0.0 < as_real("level", level) < 1.0:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level}")
    return NormalDist().inv_cdf(0.5 + 0.5 * level)
