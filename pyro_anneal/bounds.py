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

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .arguments import as_real
from .weights import log_mean_exp

__all__ = [
    "bennett",
    "coupled_lower",
    "coupled_upper",
    "independent_multi_lower",
    "independent_multi_upper",
    "independent_reverse_lower",
    "independent_reverse_upper",
    "interval",
    "log_harmonic_mean",
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

    The chains are K independent forward chains. This is also the lower bound of BDMC.

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
    r"""Computes the coupled reverse (CR) upper bound, that of BDMC.

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
