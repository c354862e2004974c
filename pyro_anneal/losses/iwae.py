"""The importance-weighted bound (IWAE) with gradients that suit the guide."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pyro.infer import TraceEnum_ELBO
from pyro.infer.util import MultiFrameTensor, get_plate_stacks
from torch import Tensor
from typing_extensions import Unpack

from ..arguments import as_count
from ..models.types import Fn
from ..weights import log_mean_exp, log_normalized_weights
from .base import (
    Evaluation,
    ParticleELBO,
    PyroOptions,
    finite_or_zero,
    require_pathwise,
    weighted_sum,
)
from .particles import Particles, Sampling
from .paths import doubly_reparameterized
from .traces import Arguments

__all__ = ["IWAE", "leave_one_out", "score_weights"]

_SAMPLING: dict[str, Sampling] = {
    "auto": "pathwise",
    "reparam": "pathwise",
    "dreg": "gated",
    "vimco": "score",
}


def leave_one_out(log_weights: Tensor) -> Tensor:
    r"""Computes the bound that each particle would leave behind, a baseline for its score.

    .. math::
        L^{-k} = \log \frac{1}{K} \Bigl(\sum_{j \ne k} w_j
        + \exp \frac{1}{K - 1} \sum_{j \ne k} \log w_j \Bigr)

    It does not depend on particle k.

    Source: Mnih and Rezende (2016), *Variational Inference for Monte Carlo Objectives*, Eq. 9.

    Args:
        log_weights: Log-weights in nats, shape ``[K, *batch]``, K >= 2.

    Returns:
        Baselines in nats, shape ``[K, *batch]``.

    Raises:
        ValueError: If there are fewer than two particles.

    Example:
        >>> leave_one_out(torch.tensor([1.0, 3.0]).log()).exp()
        tensor([3., 1.])
    """
    count = log_weights.shape[0] if log_weights.dim() else 0
    if count < 2:
        raise ValueError(f"leave_one_out needs at least 2 particles, got {count}")
    none = log_weights.new_full((1, *log_weights.shape[1:]), -torch.inf)
    before = torch.cat([none, log_weights.logcumsumexp(0)[:-1]])
    after = torch.cat([log_weights.flip(0).logcumsumexp(0).flip(0)[1:], none])
    # With one particle of weight zero the mean of the others' logs is -inf only if it is theirs.
    finite = finite_or_zero(log_weights)
    zero = (log_weights == -torch.inf).to(log_weights.dtype)
    mean = (finite.sum(0) - finite) / (count - 1)
    mean = torch.where(zero.sum(0) - zero > 0, -torch.inf, mean)
    return torch.logaddexp(torch.logaddexp(before, after), mean) - math.log(count)


class IWAE(ParticleELBO):
    r"""Importance-weighted lower bound on the log evidence of each datum.

    .. math:: L = \log \frac{1}{K} \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k | x)}, \qquad z_k \sim q

    The loss is **minus** the bound, summed over data. ``E[L]`` is a lower bound on ``log p(x)`` and
    grows with K. With one particle it is Pyro's ``Trace_ELBO`` in value and gradient, or
    ``TraceEnum_ELBO`` where the guide marks sites for enumeration; with more particles such sites
    are sampled like others, since a weight needs a value.

    Gradients of the guide:

    * ``"auto"``: per site, along the sampling path where the site is reparameterized, by the score
      with a leave-one-out baseline (VIMCO) where it is not.
    * ``"reparam"``: along the sampling path; an error where a site has none.
    * ``"dreg"``: doubly reparameterized, with less noise for many particles; an error likewise.
    * ``"vimco"``: by the score for every site, K >= 2.

    Source: Burda, Grosse and Salakhutdinov (2016), Eq. 8; Tucker et al. (2019), section 3, for
    ``"dreg"``; Mnih and Rezende (2016), Eq. 9, for ``"vimco"``.

    Args:
        num_particles: Number K of particles.
        gradient: Estimator of the guide's gradient.
        **options: What Pyro's losses take too, see :class:`~pyro_anneal.losses.base.PyroOptions`.

    Raises:
        ValueError: If ``gradient`` is unknown, or ``"vimco"`` has fewer than two particles.

    Example:
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # the exact posterior: every weight equals p(x)
        ...     pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> round(IWAE(num_particles=5).loss(model, guide, torch.tensor(2.0)), 4)
        2.2655
    """

    def __init__(
        self,
        num_particles: int = 10,
        gradient: Literal["auto", "reparam", "dreg", "vimco"] = "auto",
        **options: Unpack[PyroOptions],
    ) -> None:
        if gradient not in _SAMPLING:
            raise ValueError(f"gradient must be one of {list(_SAMPLING)}, got {gradient!r}")
        num_particles = as_count("num_particles", num_particles)
        if gradient == "vimco" and num_particles < 2:
            raise ValueError(
                f'gradient="vimco" compares particles and needs num_particles >= 2, got '
                f'{num_particles}; use gradient="auto"'
            )
        super().__init__(
            num_particles,
            **options,
        )
        self.gradient = gradient

    def _fields(self) -> dict[str, object]:
        return super()._fields() | {"gradient": self.gradient}

    def _evaluate(self, model: Fn, guide: Fn, arguments: Arguments) -> Evaluation:
        particles = self._particles(model, guide, arguments, _SAMPLING[self.gradient])
        if self.num_particles == 1 and self.gradient == "auto" and particles.runs[0].marked:
            return self._enumerated(model, guide, arguments)
        log_weights = particles.log_weights.detach()
        bound = log_mean_exp(log_weights)
        value = -particles.total(bound).detach()
        if not torch.is_grad_enabled():
            return Evaluation(value, None)
        weights = log_normalized_weights(log_weights).exp()
        if self.gradient == "dreg":
            return Evaluation(value, -doubly_reparameterized(particles, weights, weights.square()))
        if self.gradient == "reparam":
            require_pathwise(particles, 'gradient="reparam"', 'gradient="vimco" or "auto"')
        if particles.score is None:
            return Evaluation(value, -weighted_sum(particles, weights, None))
        if self.num_particles == 1:
            return Evaluation(value, -_single_particle(particles))
        return Evaluation(value, -weighted_sum(particles, weights, score_weights(log_weights)))

    def _enumerated(self, model: Fn, guide: Fn, arguments: Arguments) -> Evaluation:
        """Takes the guide's expectation over the sites that it enumerates, as Pyro's ELBO does."""
        elbo = TraceEnum_ELBO(
            max_plate_nesting=self.max_plate_nesting,
            strict_enumeration_warning=self.strict_enumeration_warning,
        )
        args, kwargs = arguments
        if not torch.is_grad_enabled():
            value = elbo.loss(model, guide, *args, **kwargs)
            return Evaluation(torch.as_tensor(value, device="cpu"), None)
        loss = elbo.differentiable_loss(model, guide, *args, **kwargs)
        return Evaluation(loss.detach(), loss)


def score_weights(log_weights: Tensor) -> Tensor:
    """Computes what multiplies each particle's score: the bound less its baseline.

    1 / K is added, times a score a term of mean zero. It cancels the noise that the guide's
    density in the log-weights brings, so that an exact guide has no noise at all.
    """
    signal = log_mean_exp(log_weights) - leave_one_out(log_weights)
    return torch.where(signal.isfinite(), signal, 0.0) + 1.0 / log_weights.shape[0]


def _single_particle(particles: Particles) -> Tensor:
    """Builds the surrogate of one particle as ``Trace_ELBO`` does, its learning signal per plate."""
    (run,) = particles.runs
    surrogate = particles.total(finite_or_zero(particles.log_weights)[0])
    signal = MultiFrameTensor()
    stacks = get_plate_stacks(run.model)
    for name, site in run.model.nodes.items():
        if site["type"] == "sample" and site["infer"].get("_enumerate_dim") is None:
            term = site["log_prob"].detach()
            if name in run.guide.nodes:
                term = term - run.guide.nodes[name]["log_prob"].detach()
            signal.add((stacks[name], term))
    for name in particles.score_sites:
        site = run.guide.nodes[name]
        _, score, entropy = site["score_parts"]
        if isinstance(entropy, Tensor) and entropy.requires_grad:
            pass  # partly reparameterized (rejection samplers): the density stays in the weight
        else:
            surrogate = surrogate + site["log_prob"].sum()
        surrogate = surrogate + (signal.sum_to(site["cond_indep_stack"]) * score).sum()
    return surrogate
