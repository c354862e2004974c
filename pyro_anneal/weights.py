"""Pure functions of log-weights.

The currency of the package is ``log_weights`` of shape ``[K, *batch]``: particles (or chains)
first, then the plates that enclose the whole model. Every function reduces over dimension 0,
keeps dtype and device, and lets gradients flow unless it says otherwise.

``-inf`` is a legal weight (a particle of zero weight). If all K weights are ``-inf`` the mean
weight is zero and its logarithm ``-inf``. NaN is never masked: it reaches the result.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arguments import as_count

__all__ = [
    "effective_sample_size",
    "log_mean_exp",
    "log_normalized_weights",
    "resample_indices",
]


def _check_particles(log_weights: Tensor) -> None:
    if not isinstance(log_weights, Tensor):
        raise ValueError(
            f"log_weights must be a tensor of shape [K, *batch], got {type(log_weights).__name__}"
        )
    if log_weights.dim() == 0 or log_weights.shape[0] == 0:
        raise ValueError(
            "log_weights needs a leading particle dimension of size K >= 1: expected shape "
            f"[K, *batch], got {list(log_weights.shape)}"
        )


def log_mean_exp(log_weights: Tensor) -> Tensor:
    r"""Computes the logarithm of the mean weight.

    .. math:: \log \frac{1}{K} \sum_{k=1}^K w_k

    Args:
        log_weights: Log-weights in nats, shape ``[K, *batch]``.

    Returns:
        Value in nats, shape ``batch``; ``-inf`` where all K weights are zero.

    Raises:
        ValueError: If ``log_weights`` has no particle dimension.

    Example:
        >>> log_mean_exp(torch.tensor([1.0, 3.0]).log()).exp()
        tensor(2.)
    """
    _check_particles(log_weights)
    return torch.logsumexp(log_weights, dim=0) - math.log(log_weights.shape[0])


def log_normalized_weights(log_weights: Tensor) -> Tensor:
    r"""Normalizes weights to sum to one over the particles.

    .. math:: \log \bar w_k = \log w_k - \log \sum_j w_j

    Args:
        log_weights: Log-weights in nats, shape ``[K, *batch]``.

    Returns:
        Normalized log-weights, shape ``[K, *batch]``. Where all K weights are zero they carry
        no information, and the result is uniform, ``-log K``.

    Raises:
        ValueError: If ``log_weights`` has no particle dimension.

    Example:
        >>> log_normalized_weights(torch.tensor([1.0, 3.0]).log()).exp()
        tensor([0.2500, 0.7500])
    """
    _check_particles(log_weights)
    empty = (log_weights == -torch.inf).all(dim=0)
    return torch.log_softmax(torch.where(empty, torch.zeros_like(log_weights), log_weights), 0)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    r"""Computes the effective sample size of K weighted particles.

    .. math:: \mathrm{ESS} = \Bigl(\sum_k w_k\Bigr)^2 \Big/ \sum_k w_k^2

    Source: Owen (2013), *Monte Carlo theory, methods and examples*, section 9.3.

    Args:
        log_weights: Unnormalized log-weights in nats, shape ``[K, *batch]``.

    Returns:
        Value in ``[1, K]``, in particles, shape ``batch``; 0 where all K weights are zero.

    Raises:
        ValueError: If ``log_weights`` has no particle dimension.

    Example:
        >>> effective_sample_size(torch.tensor([[0.0, 0.0], [0.0, -torch.inf]]))
        tensor([2., 1.])
    """
    _check_particles(log_weights)
    ess = torch.exp(-torch.logsumexp(2.0 * log_normalized_weights(log_weights), dim=0))
    empty = (log_weights == -torch.inf).all(dim=0)
    return torch.where(empty, torch.zeros_like(ess), ess)


def resample_indices(
    log_weights: Tensor,
    num_samples: int,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draws particle indices in proportion to their weights, by systematic resampling.

    One uniform number per batch element places ``num_samples`` equally spaced points on the
    cumulative weights, so particle k is drawn ``floor`` or ``ceil`` of ``n w_k`` times.

    Source: Douc, Cappe and Moulines (2005), *Comparison of resampling schemes for particle
    filtering*, section 2.4.

    Args:
        log_weights: Log-weights in nats, shape ``[K, *batch]``.
        num_samples: Number n of indices to draw per batch element.
        generator: Source of randomness; the global generator of the device if ``None``.

    Returns:
        Indices into dimension 0, shape ``[num_samples, *batch]``.

    Raises:
        ValueError: If ``log_weights`` has no particle dimension or holds NaN, or ``num_samples`` is
            below 1.

    Example:
        >>> resample_indices(torch.tensor([0.5, 0.0, 0.5]).log(), 4)
        tensor([0, 0, 2, 2])
    """
    num_samples = as_count("num_samples", num_samples)
    if bool(log_weights.isnan().any()):
        raise ValueError("log_weights hold NaN: particles without a weight cannot be resampled")
    cumulative = log_normalized_weights(log_weights.double()).exp().cumsum(dim=0)
    cumulative = (cumulative / cumulative[-1:]).movedim(0, -1).contiguous()
    batch = cumulative.shape[:-1]
    offset = torch.rand(
        *batch, 1, dtype=cumulative.dtype, device=cumulative.device, generator=generator
    )
    ticks = torch.arange(num_samples, dtype=cumulative.dtype, device=cumulative.device)
    points = (ticks + offset) / num_samples
    indices = torch.searchsorted(cumulative, points.contiguous(), right=True)
    return indices.clamp(max=log_weights.shape[0] - 1).movedim(-1, 0)
