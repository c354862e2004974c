r"""What a run will cost: from the pilot's path to the gap of a sandwich, and back to T.

Along a path of thermodynamic length :math:`\Lambda` in T steps of equal length, log-weights of
chains that keep up with the path vary by

.. math::
    \sigma^2 = \frac{\Lambda^2}{T^2} \sum_{s,t=1}^{T} \rho^{|s - t|}
    \;\to\; \frac{\Lambda^2}{T} \, \frac{1 + \rho}{1 - \rho}

where :math:`\rho` is the correlation of log p/q from one transition to the next; it is 0 for
perfect transitions, of which :math:`\Lambda^2 / T` is the gap. Log-weights are sums of many terms
and so nearly normal: both ends of a single-chain sandwich are then :math:`\sigma^2 / 2` from the
truth, and those of K chains nearly :math:`(e^{\sigma^2} - 1) / 2 K`.

Source: Grosse, Maddison and Salakhutdinov (2013), *Annealing between distributions by averaging
moments*, for perfect transitions; Hummer (2001), *Fast-growth thermodynamic integration*, for the
linear response of imperfect ones. The correlation enters here by our own derivation.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

__all__ = ["expected_gap", "steps_for_gap", "weight_variance"]

# Fewer steps cannot follow a path that bends; more than these take longer than anybody waits.
_FEWEST, _MOST = 10, 1_000_000


def weight_variance(length: float, correlation: float, num_steps: int) -> float:
    """Predicts the variance of log-weights over chains.

    Args:
        length: Thermodynamic length of the path.
        correlation: Of log p/q over one transition, in [0, 1).
        num_steps: Number T of weight increments.

    Returns:
        Variance in squared nats.

    Example:
        >>> weight_variance(8.0, 0.0, 16)  # perfect transitions: length^2 / T
        4.0
    """
    count, rho = num_steps, correlation
    pairs = count * (1.0 + rho) / (1.0 - rho) - 2.0 * rho * (1.0 - rho**count) / (1.0 - rho) ** 2
    return (length / count) ** 2 * pairs


def expected_gap(variance: float, num_chains: int) -> float:
    r"""Predicts the gap between the IM lower and the CR upper bound of K chains.

    .. math:: 2 \, \bigl(0 - E \log \tfrac{1}{K} \textstyle\sum_k e^{\sigma \epsilon_k -
        \sigma^2 / 2}\bigr)

    over standard normal :math:`\epsilon`, as if all chains were independent.

    Args:
        variance: Of log-weights over chains.
        num_chains: Number K of chains.

    Returns:
        Gap in nats.

    Example:
        >>> expected_gap(0.5, 1)
        0.5
    """
    if num_chains == 1 or variance == 0.0:
        return variance
    sigma = math.sqrt(variance)
    log_weights = sigma * _noise(num_chains) - 0.5 * variance
    log_mean = torch.logsumexp(log_weights, 1) - math.log(num_chains)
    # log m - (m - 1) has the same mean, since E[m] = 1, and little noise where m is near 1.
    loss = -log_mean if variance > 1.0 else log_mean.expm1() - log_mean
    return min(2.0 * float(loss.mean()), variance)


@lru_cache(maxsize=8)
def _noise(num_chains: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (max(1 << 10, (1 << 16) // num_chains), num_chains)
    half = torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.cat([half, -half])


def steps_for_gap(target: float, length: float, correlation: float, num_chains: int) -> int:
    """Finds the number of steps whose expected gap is the target.

    Args:
        target: Gap in nats per datum.
        length: Thermodynamic length of the path.
        correlation: Of log p/q over one transition, in [0, 1).
        num_chains: Number K of chains.

    Returns:
        Number T, within 10 and a million.

    Example:
        >>> steps_for_gap(0.1, length=10.0, correlation=0.0, num_chains=1)
        1000
    """
    low, high = _FEWEST, _MOST
    while low < high:
        middle = (low + high) // 2
        variance = weight_variance(length, correlation, middle)
        if expected_gap(variance, num_chains) <= target * (1.0 + 1e-12):
            high = middle
        else:
            low = middle + 1
    return low
