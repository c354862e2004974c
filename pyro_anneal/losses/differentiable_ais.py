"""Differentiable annealed importance sampling, with a learned path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import pyro
import torch
from pyro import poutine
from torch import Tensor
from typing_extensions import Unpack

from ..arguments import as_count, as_real
from ..graphs.differentiable import DifferentiableDensity
from ..models.types import Fn, Trace
from ..persistence.randomness import own_randomness
from ..problems.bases import PathDensity
from ..weights import log_mean_exp
from .base import Evaluation, ParticleELBO, PyroOptions, require_pathwise
from .particles import collect
from .problem_cache import FixedBatch, ProblemCache, pack_draws
from .traces import Arguments

__all__ = ["DifferentiableAIS"]

_LARGEST_STEP = 1.0
_SMALLEST_STEP = 2.0**-24
# Of the best step size at the start. From a half some trainings meet gradients from which Adam does
# not recover; from an eighth a posterior much narrower than the start is reached late.
_SHARE = 0.25
_NUM_PROBES = 4  # runs of the chains from the same draws at each step size tried


class DifferentiableAIS(ParticleELBO, torch.nn.Module):
    r"""Anneals from guide to posterior by Hamiltonian steps without a Metropolis test.

    From ``u_0 ~ q`` and a momentum ``v_1 ~ N(0, I)``, each step t = 1..T makes one leapfrog at
    ``beta_t``, with the gradient in the middle of the step, and refreshes the momentum in part. T
    steps take T gradients:

    .. math::
        (u_t, \hat v_t) = \mathrm{leapfrog}_{\beta_t}(u_{t-1}, v_t), \qquad
        v_{t+1} = \gamma \hat v_t + \sqrt{1 - \gamma^2}\, \epsilon_t

    .. math::
        \log w = \log p(x, u_T) - \log q(u_0)
                 + \sum_{t=1}^T \bigl(\log N(\hat v_t) - \log N(v_t)\bigr)

    With a network ``reverse`` s the reversed refreshment learns its mean, and each step adds

    .. math:: \log \frac{N(\hat v_t; \gamma v_{t+1} + (1 - \gamma^2) s, (1 - \gamma^2) I)}
                     {N(\hat v_t; \gamma v_{t+1}, (1 - \gamma^2) I)},
              \qquad s = s(u_t, v_{t+1}, \beta_t)

    so that the bound can close where the momenta of neighbouring temperatures are far from
    independent of the positions.

    ``E[w] = p(x)``, so ``log mean w`` over K chains is a lower bound in expectation, and the loss
    is **minus** it. Without a Metropolis test everything is differentiable: model, guide, step
    sizes, betas and damping learn from the same bound by the reparameterized gradient. Memory grows
    with T; for long paths and a fixed guide use :class:`AIWAE` or ``AnnealedImportance``.

    The path's parameters belong to the loss, a module itself: ``loss(model, guide).parameters()``
    has them, and under ``SVI`` they are in Pyro's parameter store under ``name``.

    Source: Geffner and Domke (2021), *MCMC Variational Inference via Uncorrected Hamiltonian
    Annealing*, Algorithm 2; Zhang et al. (2021), *Differentiable Annealed Importance Sampling and
    the Perils of Gradient Noise*, Algorithm 1; Doucet et al. (2022), *Score-Based Diffusion meets
    Annealed Importance Sampling*, and Geffner and Domke (2023), *Langevin Diffusion Variational
    Inference*, for learned reverse kernels.

    Args:
        num_particles: Number K of chains.
        num_steps: Number T of leapfrogs.
        step_size: Step size to begin with, at every temperature. None finds it at the first
            evaluation: halved until the bound gets worse, then a quarter of the best. Without a
            Metropolis test steps that are too large are not rejected: a few draws get enormous
            gradients, after which Adam hardly moves.
        damping: Share gamma of the momentum that is kept, to begin with, in (0, 1).
        dim: Size D of the latents of one row in unconstrained space. With it, each coordinate
            learns a scale of its own, shared by all steps: a diagonal mass matrix. Latents of
            unequal spread need it.
        reverse: Module ``(position, momentum, beta) -> correction``, all of shape
            ``[K, *batch, D]``, such as :class:`ReverseScore`; None for the kernel's own reversal.
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
        >>> loss.betas
        tensor([0.3333, 0.6667], grad_fn=<SliceBackward0>)
        >>> [name for name, _ in loss.named_parameters()]
        ['logit_increments', 'log_step_size', 'logit_damping']
    """

    is_set: Tensor

    def __init__(
        self,
        num_particles: int = 1,
        num_steps: int = 8,
        *,
        step_size: float | None = None,
        damping: float = 0.9,
        dim: int | None = None,
        reverse: torch.nn.Module | None = None,
        name: str = "differentiable_ais",
        **options: Unpack[PyroOptions],
    ) -> None:
        num_steps = as_count("num_steps", num_steps)
        if step_size is not None and not 0.0 < as_real("step_size", step_size) < math.inf:
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
        self.reverse = reverse
        self.logit_increments = torch.nn.Parameter(torch.zeros(num_steps + 1))
        start = math.log(_LARGEST_STEP if step_size is None else step_size)
        self.log_step_size = torch.nn.Parameter(torch.full((num_steps,), start))
        # Whether the first step size is still to be found; a buffer, so that a state has it.
        self.register_buffer("is_set", torch.tensor(step_size is not None))
        self.logit_damping = torch.nn.Parameter(torch.tensor(math.log(damping / (1.0 - damping))))
        size = 1 if dim is None else as_count("dim", dim)
        self.log_scale = torch.nn.Parameter(torch.zeros(size)) if dim is not None else None
        self._cache = ProblemCache(1, compile=False)

    @property
    def betas(self) -> Tensor:
        """Inverse temperatures of the T steps, increasing inside (0, 1), shape ``[T]``.

        A step at beta = 1 would conserve the energy that the weight is made of, and gain nothing.
        """
        return torch.softmax(self.logit_increments, dim=0).cumsum(dim=0)[:-1]

    def _fields(self) -> dict[str, object]:
        shown = super()._fields() | {"num_steps": len(self.log_step_size)}
        return shown if self.reverse is None else shown | {"reverse": self.reverse}

    def _evaluate(self, model: Fn, guide: Fn, arguments: Arguments) -> Evaluation:
        learning = torch.is_grad_enabled()
        pyro.module(self.name, self)
        # One particle of model and guide: subsamples, scales, and every parameter seen.
        runs = self._runs(model, guide, arguments, arguments, 1, None)
        start = collect(runs, num_particles=1, vectorized=False, sampling="pathwise")
        require_pathwise(start, "DifferentiableAIS", "IWAE or TVO")
        subsamples = runs[0].subsamples
        prepared, tensors = self._cache.prepared(model, guide, arguments, subsamples, start.scales)
        function = self._cache.function(
            prepared, model, guide, arguments, subsamples, start.scales.is_common
        )
        count = self.num_particles
        traces = self._guide_traces(guide, arguments, subsamples, runs[0].guide)
        position = pack_draws(prepared, traces, count)
        chains: _Chains
        recorded = prepared.differentiate(function, count)
        if recorded is None:
            chains = _OneByOne(function)
        else:
            chains = _Recorded(recorded, recorded.inputs(prepared.replacements(tensors)))
        if not self.is_set:
            self._find_step_size(chains, position.detach())
        log_weights = self._anneal(chains, position, learning)
        bound = (log_mean_exp(log_weights) * start.scale).sum()
        return Evaluation(-bound.detach(), -bound if learning else None)

    @torch.no_grad()
    def _find_step_size(self, chains: _Chains, position: Tensor) -> None:
        """Halves the step size until the bound gets worse, and takes a share of the best."""
        best, step = -math.inf, _LARGEST_STEP
        while step > _SMALLEST_STEP:
            self.log_step_size.fill_(math.log(step))
            with own_randomness(0):
                values = [self._anneal(chains, position, False) for _ in range(_NUM_PROBES)]
            bound = float(torch.stack(values).mean())
            bound = -math.inf if math.isnan(bound) else bound  # left all sense
            if bound < best:
                step *= 2.0
                break
            best = bound
            step *= 0.5
        self.log_step_size.fill_(math.log(_SHARE * step))
        self.is_set.fill_(True)

    def _guide_traces(
        self, guide: Fn, arguments: Arguments, subsamples: Trace, first: Any
    ) -> list[Any]:
        """Runs the guide for the particles besides the first, or for all in one plate."""
        args, kwargs = arguments
        count = self.num_particles
        with FixedBatch(subsamples):
            if self.vectorize_particles and count > 1:
                fn = self._in_particle_plate(guide, count)
                return [poutine.trace(fn).get_trace(*args, **kwargs)]
            others = [poutine.trace(guide).get_trace(*args, **kwargs) for _ in range(count - 1)]
        return [first, *others]

    def _anneal(self, chains: _Chains, position: Tensor, learning: bool) -> Tensor:
        """Moves K chains from ``[K, *batch, D]``; returns their log-weights ``[K, *batch]``."""
        betas = self.betas.to(position)
        step_sizes = self._step_sizes(position)
        damping = torch.sigmoid(self.logit_damping).to(position)
        variance = 1.0 - damping.square()
        momentum = torch.randn_like(position)
        log_weight = -_values(chains, position, learning)[0]
        for index, (beta, step) in enumerate(zip(betas, step_sizes, strict=True)):
            log_weight = log_weight + 0.5 * momentum.square().sum(-1)
            middle = position + 0.5 * step * momentum
            gradients = _gradients(chains, middle, learning)
            momentum = momentum + step * torch.lerp(*gradients, beta)
            position = middle + 0.5 * step * momentum
            log_weight = log_weight - 0.5 * momentum.square().sum(-1)
            if index == len(betas) - 1:  # the last momentum needs no successor
                break
            fresh = torch.randn_like(momentum)
            refreshed = damping * momentum + variance.sqrt() * fresh
            if self.reverse is not None:
                # N(v; gamma v' + (1 - gamma^2) s, 1 - gamma^2) over the same with s = 0.
                correction = self.reverse(position, refreshed, beta)
                surprise = momentum - damping * refreshed
                log_weight = log_weight + (
                    (surprise * correction).sum(-1) - 0.5 * variance * correction.square().sum(-1)
                )
            momentum = refreshed
        return log_weight + _values(chains, position, learning)[1]

    def _step_sizes(self, position: Tensor) -> Tensor:
        """Returns the step sizes of all steps, shape ``[T]`` or, by coordinate, ``[T, D]``."""
        sizes = self.log_step_size.to(position)
        if self.log_scale is None:
            return sizes.exp()
        if len(self.log_scale) != position.shape[-1]:
            raise ValueError(
                f"dim={len(self.log_scale)} scales were set, but the latents of one row have size "
                f"{position.shape[-1]} in unconstrained space; use dim={position.shape[-1]}"
            )
        return (sizes[:, None] + self.log_scale.to(position)).exp()


class _Chains(Protocol):
    def __call__(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluates log q and log p of K chains."""


class _Recorded:
    """Evaluates all chains at once, through a graph."""

    def __init__(self, density: DifferentiableDensity, inputs: Sequence[Tensor]) -> None:
        self.density = density
        self.inputs = inputs

    def __call__(self, position: Tensor) -> tuple[Tensor, Tensor]:
        return self.density(position, self.inputs)


class _OneByOne:
    """Evaluates chain by chain, through the model itself."""

    def __init__(self, function: PathDensity) -> None:
        self.function = function

    def __call__(self, position: Tensor) -> tuple[Tensor, Tensor]:
        log_base, log_target = zip(*(self.function(chain) for chain in position), strict=True)
        return torch.stack(log_base), torch.stack(log_target)


def _values(chains: _Chains, position: Tensor, learning: bool) -> tuple[Tensor, Tensor]:
    """Evaluates log q and log p, differentiable if ``learning``."""
    with torch.set_grad_enabled(learning):
        return chains(position)


def _gradients(chains: _Chains, position: Tensor, learning: bool) -> tuple[Tensor, Tensor]:
    """Computes the gradients of log q and log p, differentiable if ``learning``."""
    with torch.enable_grad():
        # A new node, so that gradients are taken with respect to this position alone.
        u = position.clone() if learning and position.requires_grad else position.detach()
        u = u if u.requires_grad else u.requires_grad_()
        log_base, log_target = (
            torch.autograd.grad(value.sum(), u, create_graph=learning, retain_graph=True)[0]
            if value.requires_grad
            else torch.zeros_like(u)
            for value in chains(u)
        )
    return log_base, log_target
