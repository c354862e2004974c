r"""What a run will give: from the pilot's path to the gap of a sandwich.

Weight increments :math:`x_t` of chains that keep up with the path have variances
:math:`d_t^2`, the squared thermodynamic length of a step, and a memory that decays by
:math:`\rho_t` from one transition to the next, so that log-weights vary by

.. math:: \sigma^2 = \sum_{s,t=1}^{T} d_s d_t \prod_{u=s \wedge t + 1}^{s \vee t} \rho_u
    \;\to\; \sum_i \frac{\Lambda_i^2}{T_i} \, \frac{1 + \rho_i}{1 - \rho_i}

where the path has pieces of length :math:`\Lambda_i` in :math:`T_i` steps. Perfect transitions
have no memory: in steps of equal length, :math:`\Lambda^2 / T` is then the gap. What matters is
how far a piece goes during its memory, so a short piece with a long memory may outweigh all others,
and no average over the path shows it. Log-weights are sums of many terms and so nearly normal: both
ends of a single-chain sandwich are then :math:`\sigma^2 / 2` from the truth, and those of K chains
nearly :math:`(e^{\sigma^2} - 1) / 2 K`.

Source: Grosse, Maddison and Salakhutdinov (2013), *Annealing between distributions by averaging
moments*, for perfect transitions; Hummer (2001), *Fast-growth thermodynamic integration*, for the
linear response of imperfect ones. The memory of pieces enters here by our own derivation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from .. import bounds
from .fluctuations import Pieces

__all__ = [
    "MOST_BLOCKS",
    "Blocks",
    "choose_blocks",
    "expected_gap",
    "mean_correlation",
    "steps_within",
    "weight_variance",
]

# Log-weights of a run of which no pilot said anything vary like this, in squared nats.
_UNKNOWN_VARIANCE = 1.0
_LOG_GRID = math.log(1.1)  # of variances that are told apart
MOST_BLOCKS = 64
_SIMULATED_CHAINS = 256


class Blocks(NamedTuple):
    """Blocks of chains for a guaranteed interval, chosen before the run."""

    num_blocks: int  # R
    num_kept: int  # the m highest bounds, of which the lowest counts


def weight_variance(
    lengths: Sequence[float], correlations: Sequence[float], steps: Sequence[float]
) -> float:
    """Predicts the variance of log-weights over chains.

    Neighbouring pieces are joined until each has a step: a step cannot tell what it crosses.

    Args:
        lengths: Thermodynamic lengths of the pieces of a path.
        correlations: Of log p/q over one transition in each piece, in [0, 1).
        steps: Number of weight increments in each piece, not rounded.

    Returns:
        Variance in squared nats.

    Example:
        >>> weight_variance([8.0], [0.0], [16])  # perfect transitions: length^2 / T
        4.0
    """
    variance = echo = 0.0  # echo: of all earlier increments, in the memory of the last one
    for length, rho, count in _joined(lengths, correlations, steps):
        size, left, kept = length / count, 1.0 - rho, rho**count
        pairs = count * (1.0 + rho) / left - 2.0 * rho * (1.0 - kept) / left**2
        variance += size**2 * pairs + 2.0 * size * echo * rho * (1.0 - kept) / left
        echo = echo * kept + size * (1.0 - kept) / left
    return variance


def _joined(
    lengths: Sequence[float], correlations: Sequence[float], steps: Sequence[float]
) -> list[tuple[float, float, float]]:
    """Joins neighbours until each piece has a step; memories are averaged by length."""
    pieces: list[list[float]] = []  # length, sum of length times memory, steps
    for length, rho, count in zip(lengths, correlations, steps, strict=True):
        if not pieces or pieces[-1][2] >= 1.0:
            pieces.append([0.0, 0.0, 0.0])
        for entry, value in enumerate((length, length * rho / (1.0 - rho), count)):
            pieces[-1][entry] += value
    if len(pieces) > 1 and pieces[-1][2] < 1.0:
        last = pieces.pop()
        pieces[-1] = [sum(pair) for pair in zip(pieces[-1], last, strict=True)]
    # memory m = rho / (1 - rho), so rho = m / (1 + m)
    return [(length, sum_ / (length + sum_), n) for length, sum_, n in pieces if length > 0.0]


def steps_within(
    ends: Sequence[float], betas: Sequence[float], clock: Sequence[float]
) -> list[float]:
    """Counts the steps that a schedule spends between given betas.

    Args:
        ends: Betas between which to count, increasing, ``[P + 1]``.
        betas: Betas of the schedule, or some of them, increasing.
        clock: Steps done when each of them is reached; linear between them.

    Returns:
        Numbers of steps, not rounded, ``[P]``.

    Example:
        >>> steps_within([0.0, 0.5, 1.0], [0.0, 0.25, 1.0], [0, 2, 8])
        [4.0, 4.0]
    """
    return [float(count) for count in np.diff(np.interp(ends, betas, clock))]


def mean_correlation(pieces: Pieces, shares: Sequence[float]) -> float:
    """Computes the one correlation of all pieces that gives the same variance at many steps.

    Args:
        pieces: Of the path.
        shares: Of the steps that each piece has.

    Returns:
        Correlation in [0, 1), 0 for a path of no length.
    """
    many = 1e9
    steps = [many * share for share in shares]
    variance = weight_variance(pieces.lengths, pieces.correlations, steps)
    if not variance > 0.0:
        return 0.0
    memory = max(many * variance / sum(pieces.lengths) ** 2, 1.0)
    return (memory - 1.0) / (memory + 1.0)


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


def choose_blocks(
    num_chains: int,
    variance: float = math.nan,
    *,
    num_units: int = 0,
    num_data: int = 1,
    dead: float = 0.0,
) -> Blocks:
    r"""Chooses R and m for :func:`~pyro_anneal.bounds.limit_of_blocks` at level 0.95.

    Many blocks make the margin :math:`\log(1 / \alpha) / R` small and the lowest of them low. The
    choice has the highest mean limit over simulated normal log-weights of the variance that the
    pilot expects.

    Args:
        num_chains: Number K of chains.
        variance: Expected variance of log-weights over chains; NaN where no pilot ran.
        num_units: Number of populations that cannot be divided; 0 where there are none.
        num_data: Number of independent data over which bounds are summed, whose sum is normal.
        dead: Share of chains expected to start where the target has no mass, in [0, 1). A limit that
            rests on a block of such chains alone is infinite: there are so few blocks that this
            happens once in 200 runs.

    Returns:
        The blocks, whose number divides the number of chains or populations.

    Example:
        >>> choose_blocks(64, 0.05**2)
        Blocks(num_blocks=64, num_kept=64)
        >>> choose_blocks(64, 4.0).num_blocks
        4
        >>> choose_blocks(64, 0.05**2, dead=0.3).num_blocks  # .3^8 is rare, also among eight
        8
    """
    variance = min(_UNKNOWN_VARIANCE if math.isnan(variance) else variance, 100.0)
    if dead > 0.0:  # which spreads the others' weights as well
        dead = float(f"{dead:.2g}")
        variance = math.log1p(math.expm1(variance) + dead / max(1.0 - dead, 0.01))
    # A guess, so that a tenth more or less will do; data sets that are alike share what follows.
    grid = round(math.log(max(variance, 1e-12)) / _LOG_GRID)
    return _best_blocks(num_chains, math.exp(_LOG_GRID * grid), dead, num_units, num_data)


@lru_cache(maxsize=256)
def _best_blocks(
    num_chains: int, variance: float, dead: float, num_units: int, num_data: int
) -> Blocks:
    units = num_units or num_chains
    simulated = min(units, _SIMULATED_CHAINS)
    # means over several chains vary less: of log-normal weights by as much as this
    sigma = math.sqrt(math.log1p(math.expm1(variance) * simulated / num_chains))
    if num_units:  # resampling keeps weights from spreading
        sigma = math.sqrt(variance * simulated / num_chains)
    best, highest = Blocks(1, 1), -math.inf
    for count in (r for r in range(1, min(simulated, MOST_BLOCKS) + 1) if units % r == 0):
        if num_data == 1 and count < simulated:
            noise = _noise(simulated).T
            limits = bounds.block_means(sigma * noise - 0.5 * sigma**2, count)
            lowest = limits.sort(dim=0).values.mean(1)
        else:
            total = num_data * math.log1p(math.expm1(sigma**2) * count / simulated)
            lowest = math.sqrt(total) * _order_statistics(simulated, count) - 0.5 * total
        for dropped in range(count // 4 + 1):
            kept = count - dropped
            if count > 1 and _share_infinite(num_chains, dead, num_data, count, dropped) > 0.005:
                continue
            limit = float(lowest[dropped]) - bounds.block_margin(count, kept)
            if limit > highest:
                best, highest = Blocks(count, kept), limit
    return best


def _share_infinite(
    num_chains: int, dead: float, num_data: int, count: int, dropped: int
) -> float:
    """Computes how often more blocks than are dropped hold dead chains alone."""
    share = 1.0 - (1.0 - dead ** (num_chains // count)) ** num_data
    few = (
        math.comb(count, j) * share**j * (1.0 - share) ** (count - j) for j in range(dropped + 1)
    )
    return 1.0 - sum(few)


@lru_cache(maxsize=128)
def _order_statistics(num_chains: int, count: int) -> torch.Tensor:
    """Estimates means of ``count`` normal numbers in rising order, ``[count]``."""
    return _noise(num_chains)[:, :count].sort(dim=1).values.mean(0)


@lru_cache(maxsize=8)
def _noise(num_chains: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (max(1 << 10, (1 << 16) // num_chains), num_chains)
    half = torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.cat([half, -half])
