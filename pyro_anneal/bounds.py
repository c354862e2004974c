r"""Bounds and estimates of a log normalizer, as pure functions of log-weights.

A forward chain carries a weight with ``E[w] = Z``, a reverse chain, started from an exact
posterior sample, one with ``E[1 / w] = 1 / Z``; Z is the evidence p(x) for a Pyro model. Log-weights
have shape ``[K, *batch]`` and are in nats.

Each bound L (lower) or U (upper) satisfies, at any K and T and with any valid transitions,

.. math:: E[e^{L}] = Z, \qquad E[e^{-U}] = 1 / Z,

hence ``E[L] <= log Z <= E[U]`` by Jensen, and by Markov ``P(L > log Z + b) <= e^-b`` and
``P(U < log Z - b) <= e^-b``. A single realized pair (L, U) need not contain the truth;
:func:`interval` does, with the probability asked for. What breaks the guarantees: transitions
chosen from the posterior sample or adapted inside the run, posterior samples that are not exact,
and, for the bounds that mix directions (IM upper, CR lower, Bennett), transitions that are neither
reversible nor reversed.

Source: Brekelmans et al. (2022), *Improving Mutual Information Estimation with Annealed and
Energy-Based Bounds*, section 3; Grosse, Ghahramani and Adams (2015) for the coupled
upper bound (BDMC).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .arguments import as_real
from .weights import log_mean_exp

__all__ = [
    "bennett",
    "block_margin",
    "block_means",
    "coupled_lower",
    "coupled_upper",
    "independent_multi_lower",
    "independent_multi_upper",
    "independent_reverse_lower",
    "independent_reverse_upper",
    "interval",
    "level_of_look",
    "limit_of_blocks",
    "log_harmonic_mean",
    "population_upper",
    "single_sample",
]


def single_sample(log_weights: Tensor) -> Tensor:
    r"""Computes the single-sample bound, the mean of K log-weights.

    Forward chains give a lower bound, ``E[log w] <= log Z``; reverse chains an upper one. The
    identity ``E[e^L] = Z`` is lost for K > 1, but by the inequality of the means it is never above
    the IM lower (below the CR upper) bound of the same chains, so :func:`interval` still covers.

    Source: Neal (2001), *Annealed importance sampling*; Brekelmans et al. (2022), section 3.

    Args:
        log_weights: Log-weights of K chains of one direction, in nats, shape ``[K, *batch]``.

    Returns:
        Bound in nats, shape ``batch``.

    Example:
        >>> single_sample(torch.tensor([-1.0, -3.0]))
        tensor(-2.)
    """
    return log_weights.mean(dim=0)


def log_harmonic_mean(log_weights: Tensor) -> Tensor:
    r"""Computes the logarithm of the harmonic mean weight, ``-log mean_k 1 / w_k``.

    Args:
        log_weights: Log-weights in nats, shape ``[K, *batch]``.

    Returns:
        Value in nats, shape ``batch``; ``-inf`` where any weight is zero.

    Example:
        >>> log_harmonic_mean(torch.tensor([1.0, 3.0]).log()).exp()
        tensor(1.5000)
    """
    return -log_mean_exp(-log_weights)


def independent_multi_lower(forward: Tensor) -> Tensor:
    r"""Computes the independent multi-sample (IM) lower bound; IWAE when T = 1.

    .. math:: L = \log \frac{1}{K} \sum_{k=1}^K w_k

    The chains are K independent forward chains. This is also the lower bound of
    bidirectional Monte Carlo (BDMC).

    Source: Brekelmans et al. (2022), section 3; Burda et al. (2016) for T = 1.

    Args:
        forward: Log-weights of K forward chains in nats, shape ``[K, *batch]``.

    Returns:
        Lower bound in nats, shape ``batch``.

    Example:
        >>> independent_multi_lower(torch.tensor([1.0, 3.0]).log()).exp()
        tensor(2.)
    """
    return log_mean_exp(forward)


def independent_multi_upper(reverse: Tensor, forward: Tensor) -> Tensor:
    r"""Computes the independent multi-sample (IM) upper bound; IWAE upper when T = 1.

    .. math:: U = \log \frac{1}{K} \Bigl(w_1 + \sum_{k=2}^K w_k\Bigr)

    ``w_1`` comes from a reverse chain started at an exact posterior sample, the others from
    independent forward chains. It improves on the single-sample upper bound by at most ``log K``.
    Needs transitions that are reversible, or reversed.

    Source: Brekelmans et al. (2022), section 3.

    Args:
        reverse: Log-weight of one reverse chain in nats, shape ``[1, *batch]``.
        forward: Log-weights of K - 1 forward chains in nats, shape ``[K - 1, *batch]``.

    Returns:
        Upper bound in nats, shape ``batch``.

    Raises:
        ValueError: If ``reverse`` holds more than one chain.

    Example:
        >>> independent_multi_upper(torch.tensor([5.0]).log(), torch.tensor([1.0, 3.0]).log()).exp()
        tensor(3.)
    """
    if reverse.shape[0] != 1:
        raise ValueError(
            "independent_multi_upper takes exactly one reverse chain: expected shape "
            f"[1, *batch], got {list(reverse.shape)}; for several reverse chains use coupled_upper"
        )
    return log_mean_exp(torch.cat([reverse, forward], dim=0))


def coupled_upper(reverse: Tensor) -> Tensor:
    r"""Computes the coupled reverse (CR) upper bound, that of bidirectional Monte Carlo (BDMC).

    .. math:: U = -\log \frac{1}{K} \sum_{k=1}^K \frac{1}{w_k}

    The K reverse chains start from one and the same exact posterior sample.

    Source: Grosse et al. (2015); Brekelmans et al. (2022), section 3.

    Args:
        reverse: Log-weights of K reverse chains in nats, shape ``[K, *batch]``.

    Returns:
        Upper bound in nats, shape ``batch``.

    Example:
        >>> coupled_upper(torch.tensor([1.0, 3.0]).log()).exp()
        tensor(1.5000)
    """
    return log_harmonic_mean(reverse)


def coupled_lower(forward: Tensor, reverse: Tensor) -> Tensor:
    r"""Computes the coupled reverse (CR) lower bound.

    .. math:: L = -\log \frac{1}{K} \Bigl(\frac{1}{w_1} + \sum_{k=2}^K \frac{1}{w_k}\Bigr)

    ``w_1`` comes from one forward chain; the other K - 1 chains run in reverse from the last state
    at which its weight was taken. Needs transitions that are reversible, or reversed.

    Source: Brekelmans et al. (2022), section 3.

    Args:
        forward: Log-weight of one forward chain in nats, shape ``[1, *batch]``.
        reverse: Log-weights of K - 1 reverse chains from its end in nats, ``[K - 1, *batch]``.

    Returns:
        Lower bound in nats, shape ``batch``.

    Raises:
        ValueError: If ``forward`` holds more than one chain.

    Example:
        >>> coupled_lower(torch.tensor([1.0]).log(), torch.tensor([3.0]).log()).exp()
        tensor(1.5000)
    """
    if forward.shape[0] != 1:
        raise ValueError(
            "coupled_lower takes exactly one forward chain: expected shape [1, *batch], got "
            f"{list(forward.shape)}; for several forward chains use independent_multi_lower"
        )
    return log_harmonic_mean(torch.cat([forward, reverse], dim=0))


def independent_reverse_upper(reverse: Tensor) -> Tensor:
    r"""Computes the independent reverse (IR) upper bound; RIWAE upper when T = 1.

    .. math:: U = -\log \frac{1}{K} \sum_{k=1}^K \frac{1}{w_k}

    The K reverse chains start from K independent exact posterior samples of the same data.

    Source: Brekelmans et al. (2022), section 3.

    Args:
        reverse: Log-weights of K reverse chains in nats, shape ``[K, *batch]``.

    Returns:
        Upper bound in nats, shape ``batch``.

    Example:
        >>> independent_reverse_upper(torch.tensor([1.0, 3.0]).log()).exp()
        tensor(1.5000)
    """
    return log_harmonic_mean(reverse)


def independent_reverse_lower(forward: Tensor, reverse: Tensor) -> Tensor:
    r"""Computes the independent reverse (IR) lower bound; RIWAE lower when T = 1.

    .. math:: L = -\log \frac{1}{K} \Bigl(\frac{1}{w_1} + \sum_{k=2}^K \frac{1}{w_k}\Bigr)

    ``w_1`` comes from one forward chain; the other K - 1 reverse chains start from independent
    exact posterior samples.

    Source: Brekelmans et al. (2022), section 3.

    Args:
        forward: Log-weight of one forward chain in nats, shape ``[1, *batch]``.
        reverse: Log-weights of K - 1 reverse chains in nats, shape ``[K - 1, *batch]``.

    Returns:
        Lower bound in nats, shape ``batch``.

    Raises:
        ValueError: If ``forward`` holds more than one chain.

    Example:
        >>> independent_reverse_lower(torch.tensor([1.0]).log(), torch.tensor([3.0]).log()).exp()
        tensor(1.5000)
    """
    return coupled_lower(forward, reverse)


def interval(lower: Tensor, upper: Tensor, level: float = 0.95) -> tuple[Tensor, Tensor]:
    r"""Computes an interval that covers log Z with at least the probability asked for.

    .. math:: \bigl[L - \log(2 / \alpha),\; U + \log(2 / \alpha)\bigr], \qquad \alpha = 1 - level

    By Markov's inequality on ``E[e^L] = Z`` and ``E[e^-U] = 1 / Z`` each side fails with
    probability at most ``alpha / 2``, at any K and T, with no asymptotics. It holds per batch
    element, and for the sum over independent elements when L and U are summed first.

    Args:
        lower: Lower bound L with ``E[e^L] = Z``, in nats, any shape.
        upper: Upper bound U with ``E[e^-U] = 1 / Z``, in nats, same shape.
        level: Probability of coverage, in (0, 1).

    Returns:
        Ends of the interval in nats, each of the shape of the bounds.

    Raises:
        ValueError: If ``level`` is not in (0, 1).

    Example:
        >>> low, high = interval(torch.tensor(-3.0), torch.tensor(-2.0), level=0.5)
        >>> (low + 3.0).exp(), (high + 2.0).exp()
        (tensor(0.2500), tensor(4.))
    """
    if not 0.0 < as_real("level", level) < 1.0:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level}")
    margin = math.log(2.0 / (1.0 - level))
    return lower - margin, upper + margin


def block_means(log_weights: Tensor, num_blocks: int) -> Tensor:
    r"""Computes the bound of each of R blocks of chains.

    .. math:: L_r = \log \frac{1}{|B_r|} \sum_{k \in B_r} w_k

    Blocks are runs of neighbouring chains whose sizes differ by one at most. Where blocks share no
    chain and no randomness, each has :math:`E[e^{L_r}] = Z` and they are independent, which is
    what :func:`limit_of_blocks` needs. Chains that resampled among each other must lie in one
    block.

    Args:
        log_weights: Log-weights of K forward chains in nats, shape ``[K, *batch]``.
        num_blocks: Number R of blocks.

    Returns:
        Lower bounds in nats, shape ``[R, *batch]``.

    Raises:
        ValueError: If there are fewer chains than blocks.

    Example:
        >>> block_means(torch.tensor([1.0, 3.0, 5.0, 7.0]).log(), 2).exp()
        tensor([2., 6.])
    """
    count = log_weights.shape[:1].numel()
    if not 1 <= num_blocks <= count:
        raise ValueError(f"num_blocks must lie between 1 and the {count} chains, got {num_blocks}")
    blocks = torch.tensor_split(log_weights, num_blocks)
    return torch.stack([log_mean_exp(block) for block in blocks])


def population_upper(log_weights: Tensor, num_populations: int) -> Tensor:
    r"""Computes the upper bound of R populations around reversed paths of one posterior sample.

    .. math:: U = -\log \frac{1}{R} \sum_{r=1}^R \frac{1}{\hat Z_r}, \qquad
        \hat Z_r = \frac{R}{K} \sum_{k \in B_r} w_k

    Each population holds a path drawn in reverse from the exact posterior sample, and the rest of
    it is conditional sequential Monte Carlo, with :math:`E[1 / \hat Z_r] = 1 / Z`. Populations of
    one chain are reverse chains, and U is :func:`coupled_upper`; one population that never
    resamples gives :func:`independent_multi_upper`.

    Source: Andrieu, Doucet and Holenstein (2010), *Particle Markov chain Monte Carlo methods*,
    section 4 for the extended target from which the identity follows.

    Args:
        log_weights: Log-weights in nats, shape ``[K, *batch]``; neighbours share a population.
        num_populations: Number R of populations.

    Returns:
        Upper bound in nats, shape ``batch``.

    Raises:
        ValueError: If there are fewer chains than populations.

    Example:
        >>> population_upper(torch.tensor([1.0, 3.0, 5.0, 7.0]).log(), 2).exp()
        tensor(3.)
    """
    return log_harmonic_mean(block_means(log_weights, num_populations))


def limit_of_blocks(lower: Tensor, level: float = 0.95, *, num_kept: int | None = None) -> Tensor:
    r"""Computes a lower limit of log Z that holds in finite samples and is narrow.

    Let :math:`L_{(m)}` be the m-th largest of the lower bounds of R independent blocks, each with
    :math:`E[e^{L_r}] = Z`. By Markov's inequality a block exceeds log Z + b with probability at
    most :math:`e^{-b}`, and by independence m of them do with at most the binomial tail

    .. math:: \sum_{j=m}^R \binom{R}{j} e^{-bj} (1 - e^{-b})^{R-j} = \alpha = 1 - level,

    so that :math:`\log Z \ge L_{(m)} - b` with probability at least ``level``, at any K and T. For
    m = R it is :math:`\min_r L_r - \log(1 / \alpha) / R`: many blocks cost little; for R = 1
    Markov's own limit. m and R must be chosen before the chains run.

    Source: Markov's inequality and independence; the tail as in Clopper and Pearson (1934).

    Args:
        lower: Lower bounds of R independent blocks in nats, shape ``[R, *batch]``.
        level: Probability of coverage, in (0, 1).
        num_kept: Number m of blocks that stay when the lowest are dropped; None for all R.

    Returns:
        Lower limit in nats, shape ``batch``.

    Raises:
        ValueError: If ``level`` is not in (0, 1), or ``num_kept`` not in 1 to R.

    Example:
        >>> limit_of_blocks(torch.tensor([-2.0, -2.1]), level=0.75)  # -2.1 - log(4) / 2
        tensor(-2.7931)
    """
    count = lower.shape[:1].numel()
    kept = count if num_kept is None else num_kept
    if not 1 <= kept <= count:
        raise ValueError(f"num_kept must lie between 1 and the {count} blocks, got {num_kept}")
    return lower.sort(dim=0).values[count - kept] - block_margin(count, kept, level)


def level_of_look(level: float, look: int) -> float:
    r"""Computes the level of one of several results, of which a rule that saw them reports one.

    .. math:: \alpha_n = 2^{-n} \alpha, \qquad \sum_{n \ge 1} \alpha_n = \alpha

    Source: the union bound.

    Args:
        level: Probability of coverage of what is reported, in (0, 1).
        look: Number n of the result among those that might have been reported; 0 if nothing was
            chosen.

    Returns:
        Level of the n-th result by itself.

    Example:
        >>> level_of_look(0.9, 0), level_of_look(0.9, 1)
        (0.9, 0.95)
    """
    return level if look == 0 else 1.0 - (1.0 - level) / 2.0**look


@lru_cache(maxsize=4096)
def block_margin(num_blocks: int, num_kept: int, level: float = 0.95) -> float:
    r"""Computes how far :func:`limit_of_blocks` lies below the m-th largest of R bounds.

    Args:
        num_blocks: Number R of independent blocks.
        num_kept: Number m of blocks that stay.
        level: Probability of coverage, in (0, 1).

    Returns:
        Margin b in nats, which is ``log(1 / alpha) / R`` for m = R.

    Raises:
        ValueError: If ``level`` is not in (0, 1).
    """
    if not 0.0 < as_real("level", level) < 1.0:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level}")
    if num_kept == num_blocks:
        return math.log(1.0 / (1.0 - level)) / num_blocks
    low, high = 0.0, (math.log(2.0) * num_blocks - math.log1p(-level)) / num_kept
    for _ in range(60):  # the tail falls in b, and the sum of binomials is at most 2^R
        middle = 0.5 * (low + high)
        low, high = (
            (middle, high)
            if _log_tail(num_blocks, num_kept, middle) > math.log1p(-level)
            else (low, middle)
        )
    return high


def _log_tail(num_blocks: int, num_kept: int, margin: float) -> float:
    """Computes log P(Binomial(R, e^-b) >= m)."""
    if margin <= 0.0:
        return 0.0
    log_miss, terms = math.log(-math.expm1(-margin)), []
    for j in range(num_kept, num_blocks + 1):
        chosen = math.lgamma(num_blocks + 1) - math.lgamma(j + 1) - math.lgamma(num_blocks - j + 1)
        terms.append(chosen - margin * j + log_miss * (num_blocks - j))
    largest = max(terms)
    return largest + math.log(sum(math.exp(term - largest) for term in terms))


def bennett(forward: Tensor, reverse: Tensor, *, num_iterations: int = 60) -> Tensor:
    r"""Computes the Bennett acceptance ratio estimate, where forward and reverse weights cross.

    It solves for c, with ``m = log(K_f / K_r)`` and the logistic function :math:`\sigma`,

    .. math::
        \sum_{k=1}^{K_f} \sigma(\log w_k - c - m) = \sum_{k=1}^{K_r} \sigma(c + m - \log w'_k)

    It is an estimate of log Z, not a bound. Needs transitions that are reversible, or reversed.

    Source: Bennett (1976); Shirts, Bair, Hooker and Pande (2003).

    Args:
        forward: Log-weights of forward chains in nats, shape ``[K_f, *batch]``.
        reverse: Log-weights of reverse chains in nats, shape ``[K_r, *batch]``.
        num_iterations: Bisection steps; each halves the error.

    Returns:
        Estimate of log Z in nats, shape ``batch``; NaN where either side has no finite weight.

    Example:
        >>> bennett(torch.tensor([-2.0, -2.0]), torch.tensor([-2.0]))
        tensor(-2.)
    """
    if 0 in (forward.shape[:1].numel(), reverse.shape[:1].numel()):
        raise ValueError(
            "bennett needs at least one chain of each direction, got log-weights of shapes "
            f"{list(forward.shape)} and {list(reverse.shape)}"
        )
    shift = math.log(forward.shape[0] / reverse.shape[0])
    both = torch.cat([forward, reverse], dim=0)
    finite = both.isfinite()
    low = torch.where(finite, both, torch.inf).amin(dim=0) - abs(shift)
    high = torch.where(finite, both, -torch.inf).amax(dim=0) + abs(shift)
    for _ in range(num_iterations):
        middle = 0.5 * (low + high)
        # in logs: 1000 nats from the crossing both sums underflow and would compare equal
        accepted_forward = logsigmoid(forward - middle - shift).logsumexp(dim=0)
        accepted_reverse = logsigmoid(middle + shift - reverse).logsumexp(dim=0)
        root_above = accepted_forward > accepted_reverse
        low = torch.where(root_above, middle, low)
        high = torch.where(root_above, high, middle)
    defined = forward.isfinite().any(dim=0) & reverse.isfinite().any(dim=0)
    return torch.where(defined, 0.5 * (low + high), torch.nan)
