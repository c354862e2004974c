"""Estimates of a log normalizer from posterior draws and a normalized density near them.

Log ratios ``log p(x, u) - log q(u)`` are in nats; draws come first, then the batch.
"""

from __future__ import annotations

import math

import torch
from pyro.ops.stats import effective_sample_size, fit_generalized_pareto
from torch import Tensor

from ..results.run import Estimate
from ..weights import log_mean_exp

__all__ = ["bridge", "pareto_k", "series_ess", "truncated_harmonic_mean"]

# Draws beyond which a tail is judged, and the least number of them.
_TAIL_SHARE, _LEAST_TAIL = 0.2, 5


def series_ess(series: Tensor, *, independent: bool = False) -> Tensor:
    """Computes the effective sample size of chains, between 1 and their number of draws.

    Args:
        series: Values ``[C, N, *shape]``.
        independent: Whether the draws are known to be independent.

    Returns:
        Effective numbers of draws, ``shape``; constant series count in full.

    Example:
        >>> float(series_ess(torch.zeros(2, 50), independent=True))
        100.0
    """
    total = float(series.shape[0] * series.shape[1])
    full = torch.full(series.shape[2:], total, dtype=torch.float64, device=series.device)
    if independent or series.shape[1] < 4:
        return full
    centred = series.double() - series.double().mean((0, 1))
    found: Tensor = effective_sample_size(centred, chain_dim=0, sample_dim=1)
    return torch.where(found.isfinite(), found, full).clamp(1.0, total)


def bridge(
    proposals: Tensor,
    draws: Tensor,
    *,
    independent: bool = False,
    num_iterations: int = 1000,
    tolerance: float = 1e-10,
) -> Estimate:
    r"""Estimates log Z by the bridge of least variance, with a standard error.

    With ratios :math:`w_j` at N proposals and :math:`v_i` at M posterior draws, and shares
    :math:`s_1 = M_e / (M_e + N)`, :math:`s_2 = 1 - s_1`, it solves

    .. math::
        Z = \frac{\frac{1}{N} \sum_j w_j / (s_1 w_j + s_2 Z)}
                 {\frac{1}{M} \sum_i 1 / (s_1 v_i + s_2 Z)}

    where :math:`M_e` is the effective number of draws. Neither a lower nor an upper bound.

    Source: Meng and Wong (1996), *Simulating ratios of normalizing constants via a simple
    identity*, section 3; the standard error is equation (7) of Fruehwirth-Schnatter (2004) with the
    effective sample size in place of the spectral density.

    Args:
        proposals: Log ratios at independent draws of the normalized density, ``[N, *batch]``.
        draws: Log ratios at posterior draws, grouped by chain, ``[C, M / C, *batch]``.
        independent: Whether posterior draws are independent.
        num_iterations: Most iterations.
        tolerance: Change in nats at which to stop.

    Returns:
        The estimate and its standard error in nats, of shape ``batch``.

    Raises:
        ValueError: If a posterior draw has no finite ratio.

    Example:
        >>> round(float(bridge(torch.full((4,), -2.0), torch.full((1, 8), -2.0)).value), 9)
        -2.0
    """
    if not bool(draws.isfinite().all()):
        raise ValueError("bridge: every posterior draw needs a finite log ratio")
    proposals, draws = proposals.double(), draws.double()
    flat = draws.flatten(0, 1)
    effective = series_ess(draws, independent=independent)
    share = effective / (effective + len(proposals))
    log_s1, log_s2 = share.log(), torch.log1p(-share)
    value = flat.median(0).values
    for _ in range(num_iterations):
        above = log_mean_exp(proposals - torch.logaddexp(log_s1 + proposals, log_s2 + value))
        below = log_mean_exp(-torch.logaddexp(log_s1 + flat, log_s2 + value))
        new = above - below
        done = bool(((new - value).abs() <= tolerance).all()) or not bool(new.isfinite().all())
        value = new
        if done:
            break
    # bounded terms, in units of Z, so that their spread is a fair guide to the error
    first = (proposals - torch.logaddexp(log_s1 + proposals, log_s2 + value)).exp()
    second = (log_s1 + value - torch.logaddexp(log_s1 + draws, log_s2 + value)).exp()
    length = series_ess(second, independent=independent)
    both = second.flatten(0, 1)
    variance = first.var(0) / first.mean(0).square() / len(first)
    variance = variance + both.var(0) / both.mean(0).square() / length
    return Estimate(value, variance.sqrt())


def truncated_harmonic_mean(
    log_joint: Tensor,
    white: Tensor,
    log_scale: Tensor,
    *,
    independent: bool = False,
) -> Estimate:
    r"""Estimates log Z by the truncated harmonic mean over an ellipsoid (THAMES).

    .. math:: \frac{1}{Z} \approx \frac{1}{M} \sum_i \frac{1\{|w_i|^2 < D + 1\}}{V \, p(x, u_i)}

    in white coordinates w, with V the ellipsoid's volume. Its centre and scale must come from other
    draws. Neither a lower nor an upper bound.

    Source: Metodiev, Perrot-Dockes, Ouadah, Irons, Latouche and Raftery (2024), *Easily computed
    marginal likelihoods from posterior simulation using the THAMES estimator*, section 2.

    Args:
        log_joint: log p(x, u) at posterior draws in nats, ``[C, N, *batch]``.
        white: Their white coordinates, ``[C, N, *batch, D]``.
        log_scale: Log determinant of the scale, ``[*batch]``.
        independent: Whether the draws are independent.

    Returns:
        The estimate and its standard error, ``[*batch]``; infinite where no draw lies inside.
    """
    dim = white.shape[-1]
    radius = math.sqrt(dim + 1.0)
    log_ball = 0.5 * dim * math.log(math.pi) - math.lgamma(0.5 * dim + 1.0)
    log_volume = log_ball + dim * math.log(radius) + log_scale.double()
    inside = white.double().square().sum(-1) < radius**2
    terms = torch.where(inside, -log_joint.double() - log_volume, -torch.inf)
    level = log_mean_exp(terms.flatten(0, 1))
    relative = (terms - level).exp()
    length = series_ess(relative, independent=independent)
    return Estimate(-level, (relative.flatten(0, 1).var(0) / length).sqrt())


def pareto_k(log_weights: Tensor) -> Tensor:
    r"""Computes the tail index k of weights, whose mean is unreliable beyond 0.7.

    A generalized Pareto distribution is fitted to the largest weights, at most a fifth of them and
    :math:`3 \sqrt N`.

    Source: Vehtari, Simpson, Gelman, Yao and Gabry (2024), *Pareto smoothed importance sampling*.

    Args:
        log_weights: Log-weights in nats, ``[N, *batch]``.

    Returns:
        Tail index, of shape ``batch``; ``-inf`` where the largest weights are equal, NaN where there
        are too few.

    Example:
        >>> pareto_k(torch.zeros(100))
        tensor(-inf, dtype=torch.float64)
    """
    count = log_weights.shape[0]
    flat = log_weights.double().cpu().reshape(count, -1)
    found = [_pareto_k(column) for column in flat.unbind(1)]
    result = torch.tensor(found, dtype=torch.float64, device=log_weights.device)
    return result.reshape(log_weights.shape[1:])


def _pareto_k(log_weights: Tensor) -> float:
    count = len(log_weights)
    size = int(min(_TAIL_SHARE * count, 3.0 * math.sqrt(count)))
    if size < _LEAST_TAIL:
        return math.nan
    ordered = (log_weights - log_weights.max()).exp().sort().values
    excess = ordered[-size:] - ordered[-size - 1]
    # equal up to rounding, as ratios are where q is the posterior
    if float(excess[-1]) <= 1e-8:
        return -math.inf
    excess = excess.clamp(min=1e-12 * float(excess[-1]))
    return float(fit_generalized_pareto(excess)[0])
