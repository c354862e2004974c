"""TRS and LARS: the distribution induced by truncated rejection sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution

from .base import CHUNK_ELEMENTS, Extended, check_count
from .pool import PoolSampler, take

__all__ = ["LARS", "TRS", "MovingAverageNormalizer"]


class TRS(PoolSampler):
    r"""Distribution of the first accepted of T proposals; the last is accepted always.

    With acceptance probability a(x) and ``Z = E_pi[a]``, the density is

    .. math:: p(x) = \pi(x) \Bigl[a(x) \sum_{t=0}^{T-2} (1 - Z)^t + (1 - Z)^{T-1}\Bigr]:

    no a(x) at the forced acceptance, so a constant a gives the proposal exactly. As T grows, p
    approaches the energy model ``pi(x) a(x) / Z``; and ``p(x) <= T pi(x)``.

    ``log_prob`` draws N = T - 1 proposals and estimates every power of 1 - Z without bias by the
    mean over all subsets of the rejection probabilities, i.e. it sums out the accepted trial and
    the order of the proposals (the paper's bound keeps a variational distribution of the trial).
    The sum over subsets is an integral,

    .. math::
        \sum_{t=0}^{N} \frac{e_t(1 - a_1, \dots, 1 - a_N)}{\binom{N}{t}}
        = (N + 1) \int_0^1 \prod_{j=1}^N (1 - v a_j)\, dv = S,

    .. math::
        L = \log \pi(x) + \log\Bigl[a(x) S + (1 - a(x)) \prod_j (1 - a_j)\Bigr],

    with :math:`e_t` the elementary symmetric polynomials. Gauss-Legendre quadrature in
    :math:`\sqrt v` has relative error below 1e-12 up to T = 4096 (exact up to T = 16), all terms
    are positive, and all is in log space. ``E[e^L] = p(x)`` and ``E[L] <= log p(x)``. One
    ``log_prob`` needs T acceptances per value and particle and about ``2 sqrt(T) T`` cheap
    elements; with ``share_proposals``, per call.

    Source: Lawson et al. (2019), section 3.1, with the forced acceptance treated exactly and the
    auxiliary variables summed out as above; Bauer and Mnih (2019) for the density.

    Args:
        proposal: Distribution pi; learnable through its own parameters.
        log_accept: Callable, maps ``[..., *event]`` to ``[...]``: log a(x) in nats, at most 0,
            e.g. ``logsigmoid`` of a network.
        num_trials: Number T of trials.
        num_particles: Number M of pools averaged in ``log_prob``.
        share_proposals: Whether the values of one ``log_prob`` call share the T - 1 fresh
            proposals: right for training on a batch.
        validate_args: As in torch; checks that ``log_accept`` is at most 0.

    Raises:
        ValueError: If a number is below 1, or ``log_accept`` returns an unexpected shape or, when
            validating, a positive number.

    Example:
        >>> from pyro.distributions import Normal
        >>> d = TRS(Normal(0.0, 1.0), lambda x: torch.full_like(x, 0.1).log(), num_trials=2)
        >>> value = torch.tensor([0.0, 2.0])
        >>> torch.allclose(d.log_prob(value), Normal(0.0, 1.0).log_prob(value))
        True
    """

    def __init__(
        self,
        proposal: Distribution,
        log_accept: Callable[[Tensor], Tensor],
        num_trials: int = 1024,
        *,
        num_particles: int = 1,
        share_proposals: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        self.log_accept = log_accept
        check_count("num_trials", num_trials)
        self.num_trials = num_trials
        super().__init__(
            proposal,
            log_accept,
            num_trials,
            num_particles=num_particles,
            share_proposals=share_proposals,
            validate_args=validate_args,
        )

    def sample(self, sample_shape: Size | tuple[int, ...] = Size()) -> Tensor:  # noqa: B008
        """Draws exact samples, shape ``[*sample, *batch, *event]``; stops when all accepted."""
        source, event_dim = self._expanded_proposal(), len(self.event_shape)
        size = Size(sample_shape).numel() * source.batch_shape.numel()
        chunk = max(1, CHUNK_ELEMENTS // max(1, size * self.event_shape.numel()))
        chunk = min(chunk, 16)  # most samplers accept early: do not draw what nobody needs
        with torch.no_grad():
            picked, done = self._tried(source, min(chunk, self.num_trials), sample_shape)
            for start in range(chunk, self.num_trials, chunk):
                if bool(done.all()):
                    break
                count = min(chunk, self.num_trials - start)
                value, accepted = self._tried(source, count, sample_shape)
                # Not accepted yet: the latest candidate. In the last chunk that must be the
                # last trial, which `_first` returns where none is accepted.
                mask = done.reshape(done.shape + (1,) * event_dim)
                picked, done = torch.where(mask, picked, value), done | accepted
        return picked

    def _tried(
        self, source: Distribution, count: int, sample_shape: Size | tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Draws proposals; takes the first that is accepted, or the last, and tells which."""
        pool = source.sample(Size([count, *sample_shape]))
        accepted = _accepted(self._log_weights_of(pool))
        return take(pool, _first(accepted), len(self.event_shape)), accepted.any(dim=0)

    def _log_weights_of(self, value: Tensor) -> Tensor:
        log_accept = super()._log_weights_of(value)
        if self._validate_args and bool((log_accept > 0.0).any()):
            raise ValueError(
                f"log_accept must be at most 0, got {log_accept.max().item():.6g}; end the network "
                "in torch.nn.functional.logsigmoid"
            )
        return log_accept

    def _elements_per_particle(self, shape: Size, shared: bool) -> int:
        values = self.proposal.batch_shape.numel() if shared else shape.numel()
        nodes = _num_nodes(self.num_trials - 1)
        return super()._elements_per_particle(shape, shared) + nodes * self.num_trials * values

    def _pick(self, log_weights: Tensor) -> Tensor:
        return _first(_accepted(log_weights))

    def _log_ratio(self, log_weight: Tensor, others: Tensor) -> Tensor:
        log_rejected = log_one_minus_exp(others).sum(dim=0)
        terms = torch.broadcast_tensors(
            log_weight + _log_subset_sum(others),
            log_one_minus_exp(log_weight) + log_rejected,
        )
        return torch.logsumexp(torch.stack(terms), dim=0)


class LARS(TRS):
    r"""Truncated rejection sampling trained through a normalizer: learned, or a moving average.

    The sampler is that of :class:`TRS`. ``log_prob`` uses a normalizer ``Z_0`` in place of
    ``Z = E_pi[a]``, with :math:`f(Z) = a(x) \sum_{t=0}^{T-2} (1 - Z)^t + (1 - Z)^{T-1}`:

    - **learned** (a tensor): auxiliary-variable inference, with ``Z_0`` the parameter of the
      variational distribution of the number t of rejections,

      .. math::
          L = \log \pi(x) + \log f(Z_0)
            + E_{q(t)}[t] \Bigl(\frac{1}{N} \sum_{j=1}^N \log (1 - a_j) - \log(1 - Z_0)\Bigr),

      with N = max(T - 1, 1). A lower bound: ``E[L] <= log p(x)`` and ``E[e^L] <= p(x)``, for any
      ``Z_0``; maximizing it over ``Z_0`` is sound. Never above the bound of :class:`TRS` with the
      same draws.
    - **moving average** (:class:`MovingAverageNormalizer`): the plug-in estimate
      ``log pi(x) + log f(Z_0)``, as LARS trains it. Neither an upper nor a lower bound.

    Use :class:`TRS` to evaluate either: the distributions are the same.

    Source: Bauer and Mnih (2019), *Resampled Priors for Variational Autoencoders*, Eqs. 5 to 8, for
    the moving average; Lawson et al. (2019), section 3.1, for the bound.

    Args:
        proposal: Distribution pi.
        log_accept: Log acceptance, at most 0, as in :class:`TRS`.
        num_trials: Number T of trials.
        log_normalizer: log Z_0 below 0, in nats, a scalar tensor or parameter, or a
            :class:`MovingAverageNormalizer` (for proposals without batch shape).
        num_particles: Particles averaged in ``log_prob`` (learned normalizer only).
        share_proposals: As in :class:`TRS`.
        validate_args: As in torch.

    Raises:
        ValueError: As in :class:`TRS`, for a moving average over a proposal with a batch, and, when
            validating, for a ``log_normalizer`` of 0 or more.

    Example:
        >>> from pyro.distributions import Normal
        >>> log_accept = lambda x: torch.full_like(x, 0.25).log()
        >>> d = LARS(Normal(0.0, 1.0), log_accept, 8, log_normalizer=torch.tensor(0.25).log())
        >>> value = torch.tensor([0.0, 2.0])
        >>> torch.allclose(d.log_prob(value), Normal(0.0, 1.0).log_prob(value))
        True
    """

    def __init__(
        self,
        proposal: Distribution,
        log_accept: Callable[[Tensor], Tensor],
        num_trials: int = 1024,
        *,
        log_normalizer: Tensor | MovingAverageNormalizer,
        num_particles: int = 1,
        share_proposals: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        if isinstance(log_normalizer, MovingAverageNormalizer) and proposal.batch_shape:
            raise ValueError(
                "a MovingAverageNormalizer averages one normalizer, but the proposal has batch "
                f"shape {list(proposal.batch_shape)}; use a learned log_normalizer, or TRS"
            )
        self.log_normalizer = log_normalizer
        super().__init__(
            proposal,
            log_accept,
            num_trials,
            num_particles=num_particles,
            share_proposals=share_proposals,
            validate_args=validate_args,
        )
        if self._validate_args and isinstance(log_normalizer, Tensor):
            largest = log_normalizer.max().item()
            if not largest < 0.0:
                raise ValueError(
                    f"log_normalizer must be below 0, got {largest:.6g}; parametrize it by "
                    "torch.nn.functional.logsigmoid"
                )

    def _draw_others(
        self, shape: Size, num_particles: int, shared: bool
    ) -> tuple[Tensor, Tensor | None]:
        moving = isinstance(self.log_normalizer, MovingAverageNormalizer)
        return super()._draw_others(shape, num_particles, shared or moving)

    def extended(self) -> Extended:
        """Raises: the extended space belongs to the exact bound of :class:`TRS`."""
        raise NotImplementedError(
            "LARS estimates log_prob through a normalizer; build TRS with the same proposal and "
            "log_accept, which is the same distribution, and call its extended()"
        )

    def _log_ratio(self, log_weight: Tensor, others: Tensor) -> Tensor:
        if isinstance(self.log_normalizer, MovingAverageNormalizer):
            moving, log_normalizer = True, self.log_normalizer(others)
        else:
            moving, log_normalizer = False, self.log_normalizer
        log_reject = log_one_minus_exp(log_normalizer)  # log(1 - Z_0)
        trials = torch.arange(self.num_trials, dtype=log_weight.dtype, device=log_weight.device)
        trials = trials.reshape(-1, *([1] * log_weight.dim()))
        forced = trials == self.num_trials - 1  # the last trial has no factor a(x)
        log_survival = torch.where(trials == 0, 0.0, trials * log_reject)  # 0 even where Z_0 = 1
        log_terms = log_survival + torch.where(forced, 0.0, log_weight)
        log_f = torch.logsumexp(log_terms, dim=0)
        if moving:
            return log_f.expand(others.shape[1], *log_f.shape)
        num_rejected = (torch.softmax(log_terms, dim=0) * trials).sum(dim=0)
        return log_f + num_rejected * (log_one_minus_exp(others).mean(dim=0) - log_reject)


class MovingAverageNormalizer(nn.Module):
    r"""Moving average of ``Z = E_pi[a]``, with the gradient of the current estimate.

    In training mode each call averages the acceptances it is given into the buffer ``log_value``
    and returns the average, with the gradient of the current mean passed straight through. In
    evaluation mode it returns the buffer: first call it in training mode, or set the buffer to an
    estimate from many proposals.

    Source: Bauer and Mnih (2019), section 3.2.

    Args:
        decay: Weight of the past at each call, in [0, 1).

    Raises:
        ValueError: If ``decay`` is not in [0, 1), or nothing was averaged before evaluation.

    Example:
        >>> normalizer = MovingAverageNormalizer(decay=0.5)
        >>> normalizer(torch.tensor([0.2, 0.4]).log()).exp()
        tensor(0.3000)
        >>> normalizer(torch.tensor([0.1, 0.1]).log()).exp()
        tensor(0.2000)
    """

    log_value: Tensor

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.register_buffer("log_value", torch.tensor(torch.nan))

    def forward(self, log_accept: Tensor) -> Tensor:
        """Averages log acceptances of proposals, any shape, and returns log Z, a scalar."""
        if not self.training:
            if bool(self.log_value.isnan()):
                raise ValueError("the normalizer is empty: call it in training mode first")
            return self.log_value
        current = torch.logsumexp(log_accept.flatten(), dim=0) - math.log(log_accept.numel())
        past = torch.where(self.log_value.isnan(), current.detach(), self.log_value.to(current))
        average = torch.logsumexp(
            torch.stack([past + _log(self.decay), current.detach() + _log(1.0 - self.decay)]), 0
        )
        self.log_value.copy_(average)
        # The gradient of Z is that of the current mean; of log Z, scaled by current / average.
        return average + torch.exp(current.detach() - average) * (current - current.detach())


def log_one_minus_exp(log_value: Tensor) -> Tensor:
    r"""Computes ``log(1 - e^x)`` for x at most 0, ``-inf`` at 0, with finite gradients there."""
    certain = log_value >= 0.0
    inside = torch.where(certain, -1.0, log_value)
    return torch.where(certain, -torch.inf, torch.log(-torch.expm1(inside)))


def _log_subset_sum(log_accept: Tensor) -> Tensor:
    """Computes log S of :class:`TRS` from the log acceptances of N proposals, ``[N, ...]`` to ``[...]``."""
    num = log_accept.shape[0]
    nodes, log_weights = (
        torch.as_tensor(array, dtype=log_accept.dtype, device=log_accept.device)
        for array in _quadrature(num)
    )
    tail = [1] * (log_accept.dim() - 1)
    accept = log_accept.exp()
    log_products = torch.log1p(-nodes.reshape(-1, 1, *tail) * accept).sum(dim=1)
    return math.log(num + 1.0) + torch.logsumexp(log_weights.reshape(-1, *tail) + log_products, 0)


def _num_nodes(num: int) -> int:
    # In s = sqrt(v) the integrand has degree 2 N + 1: N + 1 nodes are exact. The s nodes gather
    # where the integrand decays, v of order 1 / N, so order sqrt(N) of them suffice.
    return min(num + 1, 16 + math.ceil(2.0 * math.sqrt(num)))


@lru_cache(maxsize=64)
def _quadrature(num: int) -> tuple[np.ndarray, np.ndarray]:
    points, weights = np.polynomial.legendre.leggauss(_num_nodes(num))
    roots = 0.5 * (points + 1.0)
    return roots**2, np.log(weights * roots)  # v = s^2, dv = 2 s ds, and 1/2 from [-1, 1]


def _accepted(log_accept: Tensor) -> Tensor:
    # 1 - U lies in (0, 1], so log_accept = -inf is never accepted and 0 always is.
    return torch.log1p(-torch.rand_like(log_accept)) <= log_accept


def _first(accepted: Tensor) -> Tensor:
    """Index of the first accepted trial along dimension 0; the last where there is none."""
    last = accepted.shape[0] - 1
    return torch.where(accepted.any(dim=0), accepted.to(torch.uint8).argmax(dim=0), last)


def _log(value: float) -> float:
    return math.log(value) if value > 0.0 else -math.inf
