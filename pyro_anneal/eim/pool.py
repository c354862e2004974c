"""Samplers that pick one of a pool of proposals: the common part of SNIS and TRS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution

from .base import SamplerInduced, evaluate, has_exact_log_prob

__all__ = ["PoolSampler"]


class PoolSampler(SamplerInduced):
    r"""A sampler that draws N proposals and returns one of them.

    With ``log_weight`` the function that decides (minus an energy, a log acceptance), the joint
    density of the pick and the other N - 1 proposals, their order randomized, is

    .. math:: p(x, z_{2:N}) = \pi(x) \prod_{j=2}^N \pi(z_j) \cdot R(x, z_{2:N}),

    so that ``r = prod_j pi(z_j)`` leaves the weight ``w = pi(x) R``. A subclass gives R.
    """

    def __init__(
        self,
        proposal: Distribution,
        log_weight: Callable[[Tensor], Tensor],
        pool_size: int,
        **options: Any,
    ) -> None:
        self._log_weight = log_weight
        self._pool_size = pool_size
        super().__init__(proposal, **options)

    def _log_weights_of(self, value: Tensor) -> Tensor:
        return evaluate(self._log_weight, value, len(self.event_shape))

    def _log_ratio(self, log_weight: Tensor, others: Tensor) -> Tensor:
        """Computes log R from the log-weights of the pick ``[*leading]`` and the others ``[N - 1, ...]``."""
        raise NotImplementedError

    def _pick(self, log_weights: Tensor) -> Tensor:
        """Draws the index of the pick, ``[...]``, from the log-weights of the pool ``[N, ...]``."""
        raise NotImplementedError

    def _elements_per_particle(self, shape: Size, shared: bool) -> int:
        values = self.proposal.batch_shape.numel() if shared else shape.numel()
        per_value: int = self._pool_size * max(1, self.event_shape.numel())
        return per_value * values + shape.numel()

    def _log_base(self, value: Tensor) -> Tensor:
        if not has_exact_log_prob(self.proposal):
            return torch.zeros((), dtype=value.dtype, device=value.device)  # see _log_ratios
        log_prob: Tensor = self.proposal.log_prob(value)
        return log_prob

    def _log_ratios(
        self, value: Tensor, shape: Size, num_particles: int, shared: bool
    ) -> tuple[Tensor, Tensor | None]:
        value = value.expand(shape + self.event_shape)
        log_weight = self._log_weights_of(value)
        if self._pool_size == 1:
            log_ratio, score = torch.zeros_like(log_weight).expand(num_particles, *shape), None
        else:
            others, score = self._draw_others(shape, num_particles, shared)
            log_ratio = self._log_ratio(log_weight, self._log_weights_of(others))
        if not has_exact_log_prob(self.proposal):
            # An estimate of pi(x), fresh for each particle: the product of independent unbiased
            # estimates is unbiased.
            particles = value.expand(num_particles, *value.shape)
            log_ratio = log_ratio + self.proposal.log_prob(particles)
        return log_ratio, score

    def _draw_others(
        self, shape: Size, num_particles: int, shared: bool
    ) -> tuple[Tensor, Tensor | None]:
        """N - 1 proposals ``[N - 1, M, *shape, *event]``; 1 in place of shared dimensions."""
        source = self.proposal if shared else self._expanded_proposal()
        missing = len(shape) - len(source.batch_shape)
        sizes = [1] * missing if shared else list(shape[:missing])
        sample_shape = Size([self._pool_size - 1, num_particles, *sizes])
        if source.has_rsample and torch.is_grad_enabled():
            draws: Tensor = source.rsample(sample_shape)
            return draws, None
        with torch.no_grad():
            others = source.sample(sample_shape)
        exact = has_exact_log_prob(source)
        if source.has_rsample or not exact or not torch.is_grad_enabled():
            return others, None
        log_prob: Tensor = source.log_prob(others)
        if not log_prob.requires_grad:
            return others, None
        return others, (log_prob - log_prob.detach()).sum(dim=0)

    def _extended_event_shape(self) -> Size:
        return Size([self._pool_size, *self.event_shape])

    def _extended_log_prob(self, value: Tensor) -> Tensor:
        log_weights = self._log_weights_of(value)
        log_proposal: Tensor = self.proposal.log_prob(value).sum(dim=0)
        if self._pool_size == 1:
            return log_proposal
        return log_proposal + self._log_ratio(log_weights[0], log_weights[1:])

    def _extended_sample(self, sample_shape: Size) -> Tensor:
        pool = self._expanded_proposal().sample(Size([self._pool_size, *sample_shape]))
        log_weights = self._log_weights_of(pool)
        index = self._pick(log_weights)
        # Random keys order the pool; a key below all others puts the pick into slot 0.
        keys = torch.rand_like(log_weights)
        order = keys.scatter(0, index.unsqueeze(0), -1.0).argsort(dim=0)
        event_dim = len(self.event_shape)
        order = order.reshape(order.shape + (1,) * event_dim).expand(pool.shape)
        ordered: Tensor = pool.gather(0, order).movedim(0, pool.dim() - 1 - event_dim)
        return ordered


def take(pool: Tensor, index: Tensor, event_dim: int) -> Tensor:
    """Selects ``pool[index]`` per element: ``[N, *leading, *event]``, ``[*leading]``."""
    index = index.reshape((1, *index.shape) + (1,) * event_dim)
    return pool.gather(0, index.expand(1, *pool.shape[1:])).squeeze(0)
