"""SNIS: the distribution induced by self-normalized importance sampling."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Size, Tensor
from torch.distributions import Distribution

from .base import CHUNK_ELEMENTS, check_count
from .pool import PoolSampler, take

__all__ = ["SNIS"]


class SNIS(PoolSampler):
    r"""Distribution of one of K proposals, picked in proportion to ``exp(-energy)``.

    With ``w(x) = exp(-U(x))``, and over K - 1 fresh proposals ``z_j ~ pi``,

    .. math::
        p(x) = \pi(x)\, E\Bigl[\frac{K w(x)}{w(x) + \sum_{j=2}^K w(z_j)}\Bigr],
        \qquad
        L = \log \pi(x) + \log \frac{K w(x)}{w(x) + \sum_{j=2}^K w(z_j)} .

    ``log_prob`` draws L, a lower bound in expectation with ``E[e^L] = p(x)``. As K grows, p
    approaches the energy model proportional to ``pi(x) exp(-U(x))``; a constant energy, or K = 1,
    gives the proposal exactly. ``p(x) <= K pi(x)``, always. Where all weights of a pool vanish
    (energies ``+inf``) the pick is uniform. Time and memory of one ``log_prob`` are those of
    ``K * M`` energies per value, or per call with ``share_proposals``.

    Source: Lawson et al. (2019), section 3.2.

    Args:
        proposal: Distribution pi; learnable through its own parameters.
        energy: Callable, maps ``[..., *event]`` to ``[...]``, in nats; an ``nn.Module`` is learned.
        num_samples: Number K of proposals in the pool.
        num_particles: Number M of pools averaged in ``log_prob``.
        share_proposals: Whether the values of one ``log_prob`` call share the K - 1 fresh
            proposals: right for training on a batch, K energies instead of K per value.
        validate_args: As in torch.

    Raises:
        ValueError: If a number is below 1, or the energy returns an unexpected shape.

    Example:
        >>> from pyro.distributions import Normal
        >>> flat = SNIS(Normal(0.0, 1.0), lambda x: torch.ones_like(x), num_samples=1024)
        >>> value = torch.tensor([0.0, 2.0])
        >>> torch.allclose(flat.log_prob(value), Normal(0.0, 1.0).log_prob(value))
        True
    """

    def __init__(
        self,
        proposal: Distribution,
        energy: Callable[[Tensor], Tensor],
        num_samples: int = 1024,
        *,
        num_particles: int = 1,
        share_proposals: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        self.energy = energy
        check_count("num_samples", num_samples)
        self.num_samples = num_samples
        super().__init__(
            proposal,
            energy,
            num_samples,
            num_particles=num_particles,
            share_proposals=share_proposals,
            validate_args=validate_args,
        )

    def sample(self, sample_shape: Size | tuple[int, ...] = Size()) -> Tensor:  # noqa: B008
        """Draws exact samples, shape ``[*sample, *batch, *event]``; memory does not grow with K."""
        source, event_dim = self._expanded_proposal(), len(self.event_shape)
        size = Size(sample_shape).numel() * source.batch_shape.numel()
        chunk = max(1, CHUNK_ELEMENTS // max(1, size * self.event_shape.numel()))
        with torch.no_grad():
            sizes = [
                min(chunk, self.num_samples - start) for start in range(0, self.num_samples, chunk)
            ]
            best, picked = self._winner(source, sizes[0], sample_shape)
            for count in sizes[1:]:
                key, value = self._winner(source, count, sample_shape)
                better = key > best
                best = torch.where(better, key, best)
                mask = better.reshape(better.shape + (1,) * event_dim)
                picked = torch.where(mask, value, picked)
        return picked

    def _winner(
        self, source: Distribution, count: int, sample_shape: Size | tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Draws proposals, and takes the one of the largest perturbed weight: key and value."""
        pool = source.sample(Size([count, *sample_shape]))
        key, index = _perturbed(self._log_weights_of(pool)).max(dim=0)
        return key, take(pool, index, len(self.event_shape))

    def _log_weights_of(self, value: Tensor) -> Tensor:
        return -super()._log_weights_of(value)

    def _pick(self, log_weights: Tensor) -> Tensor:
        return _perturbed(log_weights).argmax(dim=0)

    def _log_ratio(self, log_weight: Tensor, others: Tensor) -> Tensor:
        log_sum = torch.logsumexp(others, dim=0)
        total = torch.logsumexp(torch.stack(torch.broadcast_tensors(log_weight, log_sum)), dim=0)
        empty = total == -torch.inf  # no weight anywhere: the pick is uniform, R = 1
        log_share = torch.where(empty, 0.0, log_weight) - torch.where(empty, 0.0, total)
        return torch.where(empty, 0.0, math.log(self.num_samples) + log_share)


def _perturbed(log_weights: Tensor) -> Tensor:
    """Adds Gumbel noise, so that the largest is a draw in proportion to the weights.

    Without any weight the log-weights are taken as equal: the pick is uniform.
    """
    empty = (log_weights == -torch.inf).all(dim=0)
    noise = -torch.empty_like(log_weights).exponential_().log()
    return torch.where(empty, -torch.inf, log_weights + noise)
