"""Ranks among draws, and tests of their uniformity."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

__all__ = ["divergence_limit", "rank", "uniformity_p_value"]

_BINS = 4  # of the histogram that bounds the divergence


def rank(exact: Tensor, draws: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ranks an exact posterior sample among draws, ties broken at random.

    Args:
        exact: The exact sample, of any shape.
        draws: Draws ``[L, *shape]``.
        generator: Source of the ties' order and of V.

    Returns:
        Ranks from 0 to L, and ``(rank + V) / (L + 1)`` with V uniform, which is uniform whatever L is
        if the sample and the draws are exchangeable.

    Example:
        >>> ranks, _ = rank(torch.tensor(0.5), torch.tensor([0.0, 1.0, 2.0]), torch.Generator())
        >>> int(ranks)
        1
    """
    below = (draws < exact).sum(0)
    ties = (draws == exact).sum(0)
    where = torch.rand(2, *exact.shape, dtype=torch.float64, generator=generator)
    ranks = below.cpu() + (where[0] * (ties.cpu() + 1)).floor().long()
    return ranks, (ranks + where[1]) / (len(draws) + 1)


def uniformity_p_value(uniforms: Tensor) -> Tensor:
    """Tests uniformity by three statistics at once: shape, location and spread.

    The largest distance of distribution functions (Kolmogorov and Smirnov), the mean of normal
    scores, and their mean square; thrice the smallest p-value counts. The normal scores see the tails
    that the first does not.

    Source: Stephens (1970) for the first's distribution; Cook, Gelman and Rubin (2006), *Validation
    of software for Bayesian models using posterior quantiles*, for the last.

    Args:
        uniforms: Values in (0, 1), ``[S, *shape]``.

    Returns:
        p-values of ``shape``.

    Example:
        >>> even = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
        >>> bool(uniformity_p_value(even) > 0.5), bool(uniformity_p_value(even / 2) < 1e-6)
        (True, True)
    """
    count = len(uniforms)
    values = uniforms.double().clamp(1e-12, 1.0 - 1e-12)
    ordered = values.sort(0).values
    steps = torch.arange(count + 1, dtype=torch.float64).reshape(-1, *[1] * (values.dim() - 1))
    steps = steps / count
    distance = torch.maximum((steps[1:] - ordered).amax(0), (ordered - steps[:-1]).amax(0))
    scaled = (math.sqrt(count) + 0.12 + 0.11 / math.sqrt(count)) * distance
    shape = torch.zeros_like(scaled)
    for k in range(1, 101):
        shape = shape + 2.0 * (-1.0) ** (k - 1) * torch.exp(-2.0 * k**2 * scaled.square())
    shape = torch.where(scaled < 0.2, torch.ones_like(shape), shape).clamp(0.0, 1.0)
    scores = torch.special.ndtri(values)
    location = torch.special.erfc((math.sqrt(count) * scores.mean(0)).abs() / math.sqrt(2.0))
    half = torch.full_like(scaled, 0.5 * count)
    square = 0.5 * scores.square().sum(0)
    below, above = torch.special.gammainc(half, square), torch.special.gammaincc(half, square)
    spread = (2.0 * torch.minimum(below, above)).clamp(max=1.0)
    least = torch.stack([shape, location, spread]).amin(0)
    return (3.0 * least).clamp(max=1.0)


def divergence_limit(uniforms: Tensor, *, level: float = 0.95) -> float:
    r"""Bounds the Jeffreys divergence of draws and posterior from below, by histograms of ranks.

    Data processing and convexity: with the probabilities :math:`\pi_b` of B equal bins,

    .. math::
        E_x[\mathrm{KL}(q \| p) + \mathrm{KL}(p \| q)]
        \ge \sum_b (\pi_b - 1 / B) \log(B \pi_b)

    for every scalar. The estimate of the right side is corrected for its bias ``(B - 1) / S``, and
    lowered by normal quantiles of its standard error, so that the largest over all scalars is a
    confidence limit.

    Args:
        uniforms: Randomized ranks of n scalars, ``[S, n]``.
        level: Confidence, over all scalars together.

    Returns:
        The limit in nats, at least 0.
    """
    count, number = uniforms.shape
    bins = (uniforms.double() * _BINS).long().clamp(0, _BINS - 1)
    seen = torch.nn.functional.one_hot(bins, _BINS).double().sum(0)  # [n, B]
    share = (seen + 0.5) / (count + 0.5 * _BINS)
    value = ((share - 1.0 / _BINS) * (_BINS * share).log()).sum(-1) - (_BINS - 1) / count
    slope = (_BINS * share).log() + 1.0 - 1.0 / (_BINS * share)
    mean = (share * slope).sum(-1, keepdim=True)
    variance = (share * (slope - mean).square()).sum(-1) / count
    quantile = NormalDist().inv_cdf(1.0 - (1.0 - level) / number)
    return max(0.0, (value - quantile * variance.sqrt()).max().item())
