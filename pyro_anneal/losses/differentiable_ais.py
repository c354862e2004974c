"""Differentiable annealed importance sampling, with a learned path."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor
from typing_extensions import Unpack

from ..arguments import as_count, as_real
from ..problems.bases import PathDensity
from ..weights import log_mean_exp
from .base import Evaluation, ParticleELBO, PyroOptions, require_pathwise
from .particles import collect
from .problem_cache import ProblemCache, pack_draws
from .traces import Arguments

__all__ = ["DifferentiableAIS"]


class DifferentiableAIS(ParticleELBO, torch.nn.Module):
    r"""Anneals from guide to posterior by Hamiltonian steps without a Metropolis test.

    From ``u_0 ~ q`` and a momentum ``v_1 ~ N(0, I)``, each step t = 1..T makes one leapfrog at
    ``beta_t`` and refreshes the momentum in part:

    .. math::
        (u_t, \hat v_t) = \mathrm{leapfrog}_{\beta_t}(u_{t-1}, v_t), \qquad
        v_{t+1} = \gamma \hat v_t + \sqrt{1 - \gamma^2}\, \epsilon_t

    .. math::
        \log w = \log p(x, u_T) - \log q(u_0)
                 + \sum_{t=1}^T \bigl(\log N(\hat v_t) - \log N(v_t)\bigr)

    ``E[w] = p(x)``, so ``log mean w`` over K chains is a lower bound in expectation, and the loss
    is **minus** it. Without a Metropolis test everything is differentiable: model, guide, step
    sizes, betas and damping learn from the same bound by the reparameterized gradient. Memory grows
    with T; for long paths and a fixed guide use :class:`AIWAE` or ``AnnealedImportance``.

    The path's parameters belong to the loss, a module itself: ``loss(model, guide).parameters()``
    has them, and under ``SVI`` they are in Pyro's parameter store under ``name``.

    Source: Geffner and Domke (2021), *MCMC Variational Inference via Uncorrected Hamiltonian
    Annealing*, Algorithm 2; Zhang et al. (2021), *Differentiable Annealed Importance Sampling and
    the Perils of Gradient Noise*, Algorithm 1.

    Args:
        num_particles: Number K of chains.
        num_steps: Number T of leapfrogs.
        step_size: Step size to begin with, at every temperature.
        damping: Share gamma of the momentum that is kept, to begin with, in (0, 1).
        name: Name of the path's parameters in Pyro's parameter store.
        **options: What Pyro's losses take too, see :class:`~pyro_anneal.losses.base.PyroOptions`.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> loss = DifferentiableAIS(num_steps=2)
        >>> loss.betas.tolist()
        [0.5, 1.0]
        >>> [name for name, _ in loss.named_parameters()]
        ['logit_increments', 'log_step_size', 'logit_damping']
    """

    def __init__(
        self,
        num_particles: int = 1,
        num_steps: int = 8,
        *,
        step_size: float = 0.1,
        damping: float = 0.9,
        name: str = "differentiable_ais",
        **options: Unpack[PyroOptions],
    ) -> None:
        num_steps = as_count("num_steps", num_steps)
        if not 0.0 < as_real("step_size", step_size) < math.inf:
            raise ValueError(f"step_size must be positive and finite, got {step_size}")
        if not 0.0 < as_real("damping", damping) < 1.0:
            raise ValueError(f"damping must lie strictly between 0 and 1, got {damping}")
        torch.nn.Module.__init__(self)
        ParticleELBO.__init__(
            self,
            num_particles,
            **options,
        )
        self.name = name
        self.logit_increments = torch.nn.Parameter(torch.zeros(num_steps))
        self.log_step_size = torch.nn.Parameter(torch.full((num_steps,), math.log(step_size)))
        self.logit_damping = torch.nn.Parameter(torch.tensor(math.log(damping / (1.0 - damping))))
        self._cache = ProblemCache(1, compile=False)

    @property
    def betas(self) -> Tensor:
        """Inverse temperatures of the T steps, increasing to exactly 1, shape ``[T]``."""
        inner = torch.softmax(self.logit_increments, dim=0).cumsum(dim=0)[:-1]
        return torch.cat([inner, inner.new_ones(1)])

    def _evaluate(
        self, model: Callable[..., Any], guide: Callable[..., Any], arguments: Arguments
    ) -> Evaluation:
        learning = torch.is_grad_enabled()
        pyro.module(self.name, self)
        count = self.num_particles
        vectorized = self.vectorize_particles and count > 1
        runs = self._runs(model, guide, arguments, arguments, count, None)
        start = collect(runs, num_particles=count, vectorized=vectorized, sampling="pathwise")
        require_pathwise(start, "DifferentiableAIS", "IWAE or TVO")
        subsamples = runs[0].subsamples
        prepared, _ = self._cache.prepared(model, guide, arguments, subsamples, start.scales)
        function = self._cache.function(
            prepared, model, guide, arguments, subsamples, start.scales.is_common
        )
        positions = pack_draws(prepared, [run.guide for run in runs], count)
        log_weights = torch.stack([self._chain(function, u, learning) for u in positions])
        bound = (log_mean_exp(log_weights) * start.scale).sum()
        return Evaluation(-bound.detach(), -bound if learning else None)

    def _chain(self, function: PathDensity, position: Tensor, learning: bool) -> Tensor:
        """Runs one chain from ``[*batch, D]``; returns its log-weight ``[*batch]``."""
        betas = self.betas.to(position)
        step_sizes = self.log_step_size.to(position).exp()
        damping = torch.sigmoid(self.logit_damping).to(position)
        momentum = torch.randn_like(position)
        state = _evaluate(function, position, learning)
        log_weight = -state[0]
        for beta, step in zip(betas, step_sizes, strict=True):
            log_weight = log_weight + 0.5 * momentum.square().sum(-1)
            momentum = momentum + 0.5 * step * torch.lerp(state[2], state[3], beta)
            position = position + step * momentum
            state = _evaluate(function, position, learning)
            momentum = momentum + 0.5 * step * torch.lerp(state[2], state[3], beta)
            log_weight = log_weight - 0.5 * momentum.square().sum(-1)
            fresh = torch.randn_like(momentum)
            momentum = damping * momentum + (1.0 - damping.square()).sqrt() * fresh
        return log_weight + state[1]


def _evaluate(
    function: PathDensity, position: Tensor, learning: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Evaluates log q, log p and their gradients, all differentiable if ``learning``."""
    with torch.enable_grad():
        # A new node, so that gradients are taken with respect to this position alone.
        u = position.clone() if learning and position.requires_grad else position.detach()
        u = u if u.requires_grad else u.requires_grad_()
        log_base, log_target = function(u)
        grads = [
            torch.autograd.grad(value.sum(), u, create_graph=learning, retain_graph=True)[0]
            if value.requires_grad
            else torch.zeros_like(u)
            for value in (log_base, log_target)
        ]
    if not learning:
        return log_base.detach(), log_target.detach(), grads[0], grads[1]
    return log_base, log_target, grads[0], grads[1]
