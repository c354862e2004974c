r"""The pilot: a short tempered run that chooses betas, step sizes and scales, which are then frozen.

Step sizes adapted inside a run break ``E[w] = Z``; a pilot on chains of its own does not. It walks
from base to target in stages. At each stage it moves its particles a few times while steering the
step size toward the kernel's acceptance, records a knot, and chooses the next beta by bisection on
the effective sample size of the incremental weights, after which particles are resampled.

Stages are therefore equally far apart in thermodynamic length,

.. math:: \Lambda = \int_0^1 \sqrt{\mathrm{Var}_\beta[\log p - \log q]} \, d\beta

measured by the effective sample size, ``-log(ESS / M) ~ length^2``, and not by a variance: under
heavy-tailed priors a few particles dominate any variance, and the first beta can be 1e-27.

Source: Gelman and Meng (1998) for schedules of equal thermodynamic length; Jasra et al. (2011) and
Zhou, Johansen and Aston (2016) for adaptive tempering by (conditional) effective sample size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import as_count, as_real
from ..kernels import Density, Kernel, State, Tuning
from ..kernels.base import SeveralStepSizes, largest_step, step_targets
from ..kernels.noise import draw_steps
from ..weights import effective_sample_size, log_mean_exp, resample_indices
from .fluctuations import Fluctuations, Pieces
from .path import TuningTable

__all__ = [
    "Pilot",
    "PilotOutcome",
    "adaptive_betas",
    "largest_log_step",
    "log_scale_of",
    "run_pilot",
]

# Smallest increment of beta that is tried; likelihoods of -1e100 under vague priors need 1e-100.
_SMALLEST_LOG_INCREMENT = math.log(1e-200)
_NUM_HALVINGS = 44  # of that range, which leave 3e-11
# Transitions that a pilot takes however short the run is.
_FEWEST_MOVES = 12


@dataclass(frozen=True)
class Pilot:
    """Settings of the pilot, the short run that chooses betas, step sizes and scales.

    M particles walk from the base to the target in stages. In each stage beta grows until their
    weights are worth ``ess_fraction * M`` equal ones; then they are resampled, and moved
    ``num_moves`` times while the step size is adapted. The defaults suit most models. Give the
    pilot more chains or moves if a warning says that the run's acceptance is not the pilot's.

    Args:
        num_chains: Number M of particles; None for the run's number of chains, but at least 16
            and at most 64.
        num_moves: Transitions per stage.
        ess_fraction: Effective sample size over M at which a stage ends, in (0, 1). A lower one
            means fewer and longer stages.
        max_stages: Number of stages after which the pilot goes to the target at once.
        max_moves: Transitions of all stages together, None for no limit. Stages then have fewer of
            them, but at least one each.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> Pilot(num_moves=4).ess_fraction
        0.6
    """

    num_chains: int | None = None
    num_moves: int = 6
    ess_fraction: float = 0.6
    max_stages: int = 300
    max_moves: int | None = None

    def __post_init__(self) -> None:
        if self.num_chains is not None:
            as_count("Pilot.num_chains", self.num_chains, least=4)
        as_count("Pilot.num_moves", self.num_moves)
        as_count("Pilot.max_stages", self.max_stages)
        if self.max_moves is not None:
            as_count("Pilot.max_moves", self.max_moves)
        if not 0.0 < as_real("Pilot.ess_fraction", self.ess_fraction) < 1.0:
            raise ValueError(f"Pilot.ess_fraction must lie in (0, 1), got {self.ess_fraction}")

    def chains_for(self, num_chains: int) -> int:
        """Chooses the number of particles beside a run of ``num_chains`` chains."""
        return self.num_chains or min(max(num_chains, 16), 64)

    def within(self, num_chains: int, num_moves: int) -> Pilot:
        """Limits the transitions, times particles, to a quarter of those of a run.

        The particles are then as many as the run's chains, so that one program serves both.

        Args:
            num_chains: Number K of chains of the run.
            num_moves: Its transitions.
        """
        particles = min(max(num_chains, 8), 64)
        most = max(num_chains * num_moves // (4 * particles), _FEWEST_MOVES)
        return replace(self, num_chains=particles, max_moves=most)

    def moves_of(self, stage: int, done: int) -> int:
        """Chooses the transitions of a stage, the first of which has three times as many.

        Args:
            stage: Its number, from 0.
            done: Transitions before it.
        """
        wanted = self.num_moves * (3 if stage == 0 else 1)
        if self.max_moves is None:
            return wanted
        # the number of stages is not known before: each takes its part of what is left
        left = (self.max_moves - done) // (3 if stage == 0 else 5)
        return max(min(wanted, left), 1)


class PilotOutcome(NamedTuple):
    """What the pilot found."""

    tuning: TuningTable
    lengths: tuple[float, ...]  # cumulative thermodynamic length at the knots, from 0
    accept_prob: tuple[float, ...]  # at the knots
    ess_fraction: tuple[float, ...]  # of the stage that ends at the knot
    num_gradients: int  # per chain
    num_chains: int
    position: Tensor  # particles at the target, [M, *batch, D]
    log_evidence: Tensor  # of sequential Monte Carlo, nats, [*batch]; NaN where it was not kept
    pieces: Pieces = Pieces((0.0, 1.0), (0.0,), (0.0,))  # lengths and correlations on the way


class _Knot(NamedTuple):
    """What one stage used and found."""

    beta: float
    log_step: Tensor  # [*batch]
    log_scale: Tensor  # [*batch, D]
    length: float  # up to here, from 0
    accept: float
    fraction: float  # effective particles that the stage before kept


def run_pilot(
    density: Density,
    kernel: Kernel,
    state: State,
    generator: torch.Generator,
    *,
    settings: Pilot,
    progress: Callable[[float], object] = lambda beta: None,
) -> PilotOutcome:
    """Walks M particles from base to target and records what the run needs.

    Args:
        density: Evaluates base and target of M chains.
        kernel: The kernel of the run.
        state: M draws from the base.
        generator: Source of randomness.
        settings: Settings of the pilot.
        progress: Called with the beta reached after each stage.

    Returns:
        Tuning at the knots, their thermodynamic lengths, what it cost.
    """
    alive = state.log_ratio() > -torch.inf
    state = _revive(state)
    beta, stage, length, fraction, num_moves = 0.0, 0, 0.0, 1.0, 0
    log_scale = log_scale_of(state.position, None)
    dim = state.position.shape[-1]
    log_step = torch.full_like(log_scale[..., 0], -0.25 * math.log(dim))
    if isinstance(kernel, SeveralStepSizes):
        ones = [1] * log_step.dim()
        log_step = log_step.unsqueeze(-1).repeat(*ones, kernel.num_step_sizes)
    knots: list[_Knot] = []
    fluctuations = Fluctuations()
    log_evidence = alive.double().mean(0).log()
    while True:
        moves = settings.moves_of(stage, num_moves)
        state, log_step, accept, ratios = _tune_and_move(
            density,
            kernel,
            state,
            beta,
            Tuning(log_step, log_scale),
            moves,
            generator,
            first_gain=1.5 if stage == 0 else 0.8,
        )
        num_moves += moves
        knots.append(_Knot(beta, log_step, log_scale, length, accept, fraction))
        fluctuations.stage(beta, ratios)
        progress(beta)
        if beta >= 1.0:
            break
        increment, fraction = _next_increment(state.log_ratio(), 1.0 - beta, settings.ess_fraction)
        stage += 1
        beta = 1.0 if stage >= settings.max_stages or increment >= 1.0 - beta else beta + increment
        length += math.sqrt(max(-math.log(max(fraction, 1e-300)), 0.0))
        log_evidence = log_evidence + _log_mean_weight(state, beta - knots[-1].beta)
        state, ancestors = _reweight(state, beta - knots[-1].beta, generator)
        fluctuations.resample(ancestors)
        log_scale = log_scale_of(state.position, log_scale)
    betas, steps, scales, lengths, accepts, fractions = zip(*knots, strict=True)
    return PilotOutcome(
        tuning=TuningTable(betas, _smooth(torch.stack(steps)), _smooth(torch.stack(scales))),
        lengths=lengths,
        accept_prob=accepts,
        ess_fraction=fractions,
        num_gradients=1 + num_moves * kernel.num_gradients,
        num_chains=state.position.shape[0],
        position=state.position,
        pieces=fluctuations.pieces(),
        log_evidence=log_evidence,
    )


def adaptive_betas(outcome: PilotOutcome, num_steps: int) -> Tensor:
    """Places T + 1 betas at equal thermodynamic length between the pilot's knots.

    Args:
        outcome: What the pilot found.
        num_steps: Number T of weight increments.

    Returns:
        Betas from 0 to 1, float64, shape ``[T + 1]``.
    """
    knots = torch.tensor(outcome.tuning.betas, dtype=torch.float64, device="cpu")
    lengths = torch.tensor(outcome.lengths, dtype=torch.float64, device="cpu")
    if not lengths[-1] > 0.0:  # base equals target: any schedule is exact
        return torch.linspace(0.0, 1.0, num_steps + 1, dtype=torch.float64, device="cpu")
    # Stages of zero length would make betas coincide; give each a sliver.
    lengths = (
        lengths
        + torch.linspace(0.0, 1e-6, len(lengths), dtype=torch.float64, device="cpu") * lengths[-1]
    )
    wanted = (
        torch.linspace(0.0, 1.0, num_steps + 1, dtype=torch.float64, device="cpu") * lengths[-1]
    )
    upper = torch.searchsorted(lengths, wanted, right=True).clamp(1, len(knots) - 1)
    fraction = (wanted - lengths[upper - 1]) / (lengths[upper] - lengths[upper - 1])
    betas = torch.lerp(knots[upper - 1], knots[upper], fraction.clamp(0.0, 1.0))
    betas[0], betas[-1] = 0.0, 1.0
    return betas


def _revive(state: State) -> State:
    """Replaces particles of no density by others of the same batch element."""
    alive = state.log_ratio().isfinite()
    log_weights = torch.where(alive, 0.0, -torch.inf).to(state.log_base.dtype)
    rank = torch.argsort(log_weights, dim=0, descending=True, stable=True)
    count = alive.sum(0).clamp(min=1)
    ticks = torch.arange(len(rank), device=rank.device).view(-1, *[1] * (rank.dim() - 1))
    return _gather(state, torch.gather(rank, 0, ticks % count))


def _gather(state: State, indices: Tensor) -> State:
    """Selects particles by ``indices`` of shape ``[M, *batch]``."""

    def select(value: Tensor) -> Tensor:
        index = indices.unsqueeze(-1).expand_as(value) if value.dim() > indices.dim() else indices
        return torch.gather(value, 0, index)

    return State(*(select(value) for value in state))


def _reweight(state: State, increment: float, generator: torch.Generator) -> tuple[State, Tensor]:
    """Resamples particles by the incremental weights of one stage; also returns their ancestors."""
    log_weights = _finite_ratio(state.log_ratio()) * increment
    count = state.position.shape[0]
    ancestors = resample_indices(log_weights, count, generator=generator)
    return _gather(state, ancestors), ancestors


def _log_mean_weight(state: State, increment: float) -> Tensor:
    return log_mean_exp(_finite_ratio(state.log_ratio()) * increment)


def _finite_ratio(log_ratio: Tensor) -> Tensor:
    """Converts to float64, NaN to weight zero."""
    ratio = log_ratio.double()
    return torch.where(ratio.isnan(), -torch.inf, ratio)


def _mean_log_ess(log_ratio: Tensor, increment: float) -> float:
    """Computes the batch mean of log(ESS / M) after one increment of beta."""
    fraction = effective_sample_size(increment * log_ratio) / log_ratio.shape[0]
    return float(fraction.clamp(min=1e-12).log().mean())


def _next_increment(log_ratio: Tensor, largest: float, target: float) -> tuple[float, float]:
    """Finds the increment of beta that keeps the target fraction of effective particles.

    Bisection in the logarithm of the increment: under vague priors it spans many decades.
    """
    ratio = _finite_ratio(log_ratio)
    goal = math.log(target)
    at_largest = _mean_log_ess(ratio, largest)
    if at_largest >= goal:
        return largest, math.exp(at_largest)
    low, high = _SMALLEST_LOG_INCREMENT, math.log(largest)
    for _ in range(_NUM_HALVINGS):
        middle = 0.5 * (low + high)
        if _mean_log_ess(ratio, math.exp(middle)) >= goal:
            low = middle
        else:
            high = middle
    increment = math.exp(low)
    return increment, math.exp(_mean_log_ess(ratio, increment))


def _tune_and_move(
    density: Density,
    kernel: Kernel,
    state: State,
    beta: float,
    log_tuning: Tuning,
    num_moves: int,
    generator: torch.Generator,
    *,
    first_gain: float,
) -> tuple[State, Tensor, float, Tensor]:
    """Moves particles at ``beta``, steering the step size toward the kernel's acceptance.

    Returns:
        State, log step size, acceptance, and log p/q before and after each move,
        ``[N + 1, M, *batch]``.
    """
    log_step, log_scale = log_tuning
    target, largest = _target_accept(kernel, log_step), largest_log_step(kernel, log_step)
    scale = log_scale.exp()
    on_device = torch.full_like(log_step.reshape(-1)[0], beta)
    late, late_accept = torch.zeros_like(log_step), torch.zeros_like(log_step)
    ratios = [_finite_ratio(state.log_ratio())]
    drawn = draw_steps(kernel, state, num_moves, generator)
    for move, noise in enumerate(zip(*(part.unbind(0) for part in drawn), strict=True)):
        tuning = Tuning(log_step.exp(), scale)
        state, info = kernel.step(state, density, on_device, tuning, noise)
        ratios.append(_finite_ratio(state.log_ratio()))
        by_part = info.accept_by_part
        accept_prob = (info.accept_prob if by_part is None else by_part).mean(0)
        if target is not None:
            change = first_gain / (1.0 + move) ** 0.6 * (accept_prob - target)
            log_step = torch.minimum(log_step + change, largest)
        if move >= num_moves // 2:  # Polyak average: acceptance over few chains is noisy
            late = late + log_step / (num_moves - num_moves // 2)
            late_accept = late_accept + accept_prob / (num_moves - num_moves // 2)
    return state, late, float(late_accept.mean()), torch.stack(ratios)


def _target_accept(kernel: Kernel, like: Tensor) -> Tensor | None:
    """Collects the acceptance to steer toward; NaN-free, one per step size, None without any."""
    targets = step_targets(kernel)
    if all(target is None for target in targets):
        return None
    found = [1.0 if target is None else target for target in targets]
    return torch.tensor(found, dtype=like.dtype, device=like.device)


def largest_log_step(kernel: Kernel, like: Tensor) -> Tensor:
    """Collects the step sizes beyond which nothing changes, one per step size; infinite for most.

    Where proposals are always accepted, steps would lengthen for ever and not come back in time.
    """
    return torch.as_tensor(largest_step(kernel), dtype=like.dtype, device=like.device).log()


def log_scale_of(position: Tensor, previous: Tensor | None) -> Tensor:
    """Estimates the log standard deviation per coordinate, robustly, and shrinks it.

    The variance of M particles is noisy and, after resampling, correlated: it is averaged with
    that of the stage before, as Stan regularizes its metric.
    """
    count = position.shape[0]
    ordered = position.double().sort(dim=0).values
    robust = (ordered[(3 * count) // 4] - ordered[count // 4]) / 1.349
    deviation = position.double().std(dim=0).clamp(max=3.0 * robust.clamp(min=1e-300))
    tiny = torch.finfo(position.dtype).tiny ** 0.5
    variance = deviation.square()
    if previous is None:
        pooled = variance.reshape(-1, variance.shape[-1]).mean(0)
        prior, strength = pooled.expand_as(variance), 3.0
    else:
        prior, strength = (2.0 * previous.double()).exp(), 3.0
    variance = (count * variance + strength * prior) / (count + strength)
    return (0.5 * variance.clamp(min=tiny).log()).to(position.dtype)


def _smooth(table: Tensor) -> Tensor:
    """Averages each knot with its neighbours, weights 1/4, 1/2, 1/4."""
    padded = torch.cat([table[:1], table, table[-1:]])
    return 0.25 * padded[:-2] + 0.5 * padded[1:-1] + 0.25 * padded[2:]
