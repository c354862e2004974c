"""The annealed importance-weighted autoencoder (AIWAE)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from typing_extensions import Unpack

from ..arguments import as_count, as_real
from ..chains.loop import final_move, run_chains
from ..chains.path import Path, TuningTable
from ..compiled.choice import with_loop
from ..compiled.looped import LoopedDensity
from ..kernels import HMC, State
from ..schedules import Linear, as_betas
from ..weights import log_mean_exp, log_normalized_weights
from .base import (
    Evaluation,
    ParticleELBO,
    PyroOptions,
    finite_or_zero,
    require_pathwise,
)
from .particles import Particles, collect
from .paths import along_the_path
from .problem_cache import (
    FixedBatch,
    Prepared,
    ProblemCache,
    pack_draws,
    particle_values,
    unrecorded,
)
from .traces import Arguments, Gates, run_guide

__all__ = ["AIWAE"]


class AIWAE(ParticleELBO):
    r"""Trains a model by annealed importance sampling from its guide to its posterior.

    K chains are annealed from the guide q at beta = 0 to the posterior at beta = 1 through
    ``num_steps`` temperatures, by Hamiltonian Monte Carlo. Their weights give the loss, **minus**
    the annealed lower bound

    .. math:: L = \log \frac{1}{K} \sum_{k=1}^K w_k, \qquad E[w_k] = p(x)

    and, after one more move at beta = 1, their states the gradient of the model,

    .. math:: \sum_k \bar w_k \nabla_\theta \log p(x, z_k), \qquad \bar w_k = w_k / \sum_j w_j

    with weights and states taken as constants: a self-normalized estimate of
    :math:`\nabla \log p(x)`, biased at finite K. The guide learns by the ELBO, along its sampling
    path, from the draws at which chains start (from one draw where particles are not vectorized). No
    gradient passes through the chains, so memory does not grow with ``num_steps``.

    Each temperature has its own step size, moved toward ``target_accept`` between minibatches and
    constant within one: so ``E[w] = p(x)`` holds in each.

    The paper's T counts betas: its T is ``num_steps + 1`` here.

    Source: Ding and Freedman (2019), *Learning Deep Generative Models with Annealed Importance
    Sampling*, Algorithm 1.

    Args:
        num_particles: Number K of chains.
        num_steps: Number of weight increments; as many moves of ``num_leapfrog`` gradients.
        num_leapfrog: Leapfrogs of one move.
        target_accept: Acceptance probability that step sizes are moved toward.
        schedule: Betas from 0 to 1: a schedule or a tensor ``[num_steps + 1]``; linear if None.
        step_size: Step size to begin with, at every temperature.
        compile: As of :class:`~pyro_anneal.AnnealedImportance`; ``"auto"`` counts the steps so far
            on data of one shape.
        **options: What Pyro's losses take too, see :class:`~pyro_anneal.losses.base.PyroOptions`.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # the exact posterior: every weight equals p(x)
        ...     pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> round(AIWAE(num_particles=3, num_steps=2).loss(model, guide, torch.tensor(2.0)), 4)
        2.2655
    """

    def __init__(
        self,
        num_particles: int = 10,
        num_steps: int = 4,
        num_leapfrog: int = 5,
        target_accept: float = 0.6,
        *,
        schedule: Callable[..., Tensor] | Tensor | None = None,
        step_size: float = 0.1,
        compile: bool | Literal["auto"] = "auto",
        **options: Unpack[PyroOptions],
    ) -> None:
        num_steps = as_count("num_steps", num_steps)
        if not 0.0 < as_real("step_size", step_size) < math.inf:
            raise ValueError(f"step_size must be positive and finite, got {step_size}")
        super().__init__(
            num_particles,
            **options,
        )
        self.kernel = HMC(num_leapfrog, target_accept)
        self.betas = as_betas(Linear() if schedule is None else schedule, num_steps)
        self.log_step_size = torch.full(
            (num_steps,), math.log(step_size), dtype=torch.float64, device="cpu"
        )
        self.accept_prob = torch.full((num_steps,), torch.nan, dtype=torch.float64, device="cpu")
        self.num_adaptations = 0
        self._cache = ProblemCache(num_particles, compile=compile)

    @property
    def num_steps(self) -> int:
        """Number of weight increments, and of moves."""
        return len(self.betas) - 1

    @property
    def step_size(self) -> Tensor:
        """Step sizes at ``betas[1:]``, shape ``[num_steps]``."""
        return self.log_step_size.exp()

    def _evaluate(
        self, model: Callable[..., Any], guide: Callable[..., Any], arguments: Arguments
    ) -> Evaluation:
        learning = torch.is_grad_enabled()
        # Particles with gradients: the guide's part, the subsamples, and every parameter seen.
        gates = Gates() if learning else None
        elbo = self._of_the_guide(model, guide, arguments, gates)
        subsamples = elbo.runs[0].subsamples
        prepared, density = self._cache.get(model, guide, arguments, subsamples, elbo.scales)
        with unrecorded():
            draws = [run.guide for run in elbo.runs]
            if len(elbo.log_guide) < self.num_particles:
                draws = self._draws(guide, arguments, subsamples)
            start = pack_draws(prepared, draws, self.num_particles)
            state, log_weights = self._anneal(prepared, density, start, learning)
        scale = elbo.scale
        bound = log_mean_exp(log_weights)
        value = -(bound * scale).sum()
        if not learning:
            return Evaluation(value, None)
        weights = log_normalized_weights(log_weights).exp()
        log_joint = self._log_joint(prepared, model, arguments, subsamples, state.position)
        for_model = (weights.to(log_joint) * finite_or_zero(log_joint)).sum(0)
        share = torch.full_like(elbo.log_weights, 1.0 / len(elbo.log_weights))
        for_guide = along_the_path(elbo, share)
        return Evaluation(value, -(for_model * scale).sum() - for_guide)

    def _of_the_guide(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        arguments: Arguments,
        gates: Gates | None,
    ) -> Particles:
        """Draws particles from the guide: all in one run, where chains then start; else one."""
        is_function = not isinstance(poutine.unwrap(guide), Messenger)
        vectorized = self.vectorize_particles and self.num_particles > 1 and is_function
        count = self.num_particles if vectorized else 1
        runs = self._runs(model, guide, arguments, arguments, count, gates)
        elbo = collect(
            runs,
            num_particles=count,
            vectorized=vectorized,
            sampling="pathwise" if gates is None else "gated",
            gates=gates,
        )
        require_pathwise(elbo, "AIWAE", "IWAE or TVO")
        for name in elbo.altered_sites:
            if runs[0].guide.nodes[name]["mask"] is None:
                raise NotImplementedError(
                    f'guide site "{name}" has a poutine.scale that other sites have not: its power '
                    "is no density to anneal from; scale all sites or none"
                )
        return elbo

    def _anneal(
        self,
        prepared: Prepared,
        density: Any,
        start: Tensor,
        adapt: bool,
    ) -> tuple[State, Tensor]:
        """Runs K chains; returns their states after the move at beta = 1, and their weights."""
        seed = int(torch.randint(2**31, (), device="cpu").item())
        state = density(start)
        example = state.position[0]
        table = TuningTable(
            tuple(self.betas[1:].tolist()),
            self.log_step_size.to(example)
            .reshape(-1, *[1] * (example.dim() - 1))
            .expand(-1, *example.shape[:-1]),
            torch.zeros_like(example).expand(self.num_steps, *example.shape),
        )
        path = Path(self.betas, self.kernel, table)
        density = with_loop(
            density,
            path,
            self._cache.compile,
            num_runs=prepared.num_calls,
            kept=prepared.problem.density,
        )
        if isinstance(density, LoopedDensity) and density.loop_reason is None:
            prepared.problem.density.chain_graph_and_inputs()  # made once, for all data
        carry, statistics = run_chains(
            density, path, state, direction="forward", seed=seed, stream="AIWAE"
        )
        state, last = final_move(density, path, carry.state, seed=seed, stream="AIWAE")
        accept = torch.cat([statistics.accept_prob, last.reshape(1)])
        self.accept_prob = accept.cpu()
        if adapt:
            self._adapt()
        return state, carry.log_weights

    def _adapt(self) -> None:
        """Moves step sizes toward the target acceptance, for the next minibatch."""
        self.num_adaptations += 1
        gain = max(0.05, self.num_adaptations**-0.5)  # fast at first, steady later
        self.log_step_size = self.log_step_size + gain * (
            self.accept_prob.nan_to_num(0.0) - self.kernel.target_accept
        )

    def _draws(
        self, guide: Callable[..., Any], arguments: Arguments, subsamples: Any
    ) -> list[Any]:
        """Runs the guide for K particles."""
        args, kwargs = arguments
        count = self.num_particles
        vectorized = self.vectorize_particles and count > 1
        fn = self._in_particle_plate(guide, count) if vectorized else guide
        with FixedBatch(subsamples):
            return [
                poutine.trace(fn).get_trace(*args, **kwargs)
                for _ in range(1 if vectorized else count)
            ]

    def _log_joint(
        self,
        prepared: Prepared,
        model: Callable[..., Any],
        arguments: Arguments,
        subsamples: Any,
        position: Tensor,
    ) -> Tensor:
        """Computes log p(x, z) at given positions, differentiable in the model's parameters."""
        count = self.num_particles
        vectorized = self.vectorize_particles and count > 1
        with unrecorded():
            nesting = self.max_plate_nesting if vectorized else None
            values = particle_values(prepared, prepared.problem.model, position, nesting)

        def run(values: dict[str, Tensor]) -> Any:
            fn = poutine.condition(model, data=values)
            fn = self._in_particle_plate(fn, count) if vectorized else fn
            finite = self.max_plate_nesting < math.inf
            return run_guide(
                fn,
                lambda *args, **kwargs: None,
                arguments,
                arguments,
                first_enumeration_dim=-1 - int(self.max_plate_nesting) if finite else None,
                max_plate_nesting=self.max_plate_nesting,
            )

        with poutine.block(hide_types=["sample"]), FixedBatch(subsamples):
            if vectorized:
                runs = [run(values)]
            else:
                runs = [run({n: v[k] for n, v in values.items()}) for k in range(count)]
        return collect(
            runs,
            num_particles=count,
            vectorized=vectorized,
            sampling="pathwise",
            batch_plates=prepared.batch_plates,
        ).log_joint
