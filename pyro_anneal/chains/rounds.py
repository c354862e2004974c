r"""Rounds: measure instead of predicting how many steps a target takes.

A pilot of a few particles tells the variance of log-weights within a factor of three, and fails
where chains lag behind. Rounds double T until the *measured* error is at the target. Whatever a
round uses is fixed before it starts: the schedule, step sizes and scales come from the pilot and
from earlier rounds, and so does whether it may be the one to report. Hence each round keeps
:math:`E[e^{L_j} \mid \text{earlier rounds}] = Z`, and a limit of level :math:`1 - \alpha_j` fails
with probability :math:`\alpha_j` at most, whatever happened before.

Where the error falls more slowly than steps grow, chains do not cross between modes, or stay in the
tails where they started; no number of steps mends that, and any number of chains does. Then K grows
instead of T.

The decision to stop looks at the round itself, and so at its error: among the rounds that may be
reported, one that overstates the evidence could be the more likely to stop. Their number n is
counted, and the n-th has the share :math:`\alpha_n = 2^{-n} \alpha`, so that

.. math:: P(\text{the limit reported fails}) \le \sum_n 2^{-n} \alpha = \alpha

for every rule of stopping. A round is one of them only if the round before it predicts that it
reaches the target, so most calls report the first: that costs :math:`\log 2 / R` nats of R blocks.

The schedule is that of the pilot and the measured one in equal parts: no part of the path has less
than half of the steps that either gives it, however noisy it is. The measured one has steps of
equal :math:`\sqrt{\mathrm{Var}_\beta[\log p - \log q]} \, d\beta`, over all chains of the round.

Source: Syed, Bouchard-Cote, Chern and Doucet (2024), *Optimised annealed sequential Monte Carlo
samplers*, for rounds that double; the accounting of looks is our own, by the union bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..kernels.base import SeveralStepSizes
from ..weights import resample_indices
from .path import Path, StepStatistics, TuningTable
from .pilot import PilotOutcome, largest_log_step, log_scale_of

__all__ = ["Goal", "Round", "first_steps", "refine"]

_MOST_AT_FIRST = 64
_FAR = 2.5  # errors beyond as many targets quadruple T
_NEAR = 1.5  # a predicted error within as many targets may be the last
_LARGEST_CHANGE = 0.7  # of a log step size or log scale from one round to the next
_KNOTS = 16


@dataclass(frozen=True)
class Round:
    """What is fixed of a round before it runs."""

    number: int  # from 1
    num_steps: int
    look: int  # which of the rounds that may be reported it is, from 1; 0 if it may not be
    looks_before: int  # rounds before it that might have been reported
    is_last: bool  # the last one that may run
    growth: int = 1  # times as many chains as the first had

    @property
    def work(self) -> int:
        """Steps of the round in chains of the first."""
        return self.num_steps * self.growth


@dataclass(frozen=True)
class Goal:
    """When to stop, and what comes next.

    Args:
        target: Error in nats to reach.
        max_rounds: Largest number of rounds; T (times K, where that grows) ends at
            ``first_steps * 2 ** (max_rounds - 1)``.
        first_steps: Number T of the first round.
        most_steps: Largest T (times K, where that grows) for another reason, at least
            ``first_steps``; None for none.

    Example:
        >>> goal = Goal(0.02, max_rounds=8, first_steps=16)
        >>> first = goal.first(expected_error=0.1)
        >>> first.num_steps, first.look  # too far from the target to be reported
        (16, 0)
        >>> second = goal.after(first, error=0.024, sound=True)
        >>> second.num_steps, second.look
        (32, 1)
        >>> goal.after(second, error=0.019, sound=True) is None
        True
    """

    target: float
    max_rounds: int
    first_steps: int
    most_steps: int | None = None

    def first(self, expected_error: float) -> Round:
        """Opens with a round that may be reported if the pilot expects the target."""
        return self._round(1, self.first_steps, 0, expected_error)

    def after(
        self, done: Round, error: float, *, sound: bool, stalls: bool = False
    ) -> Round | None:
        """Decides what follows a round.

        Args:
            done: The round.
            error: What was measured, in nats.
            sound: Whether nothing speaks against believing it.
            stalls: Whether further chains are needed rather than further steps.

        Returns:
            The next round; None to report this one.
        """
        if done.is_last or (done.look > 0 and sound and error <= self.target):
            return None
        growth = 2 if error <= _FAR * self.target else 4  # an error that is NaN is far
        while growth > 1 and done.work * growth > self._largest:
            growth //= 2
        expected = error * math.sqrt(1.0 / growth)
        steps, chains = (1, growth) if stalls else (growth, 1)
        return self._round(
            done.number + 1,
            done.num_steps * steps,
            done.looks_before + (done.look > 0),
            expected,
            done.growth * chains,
        )

    @property
    def _largest(self) -> int:
        largest = self.first_steps << (self.max_rounds - 1)
        return largest if self.most_steps is None else min(largest, self.most_steps)

    def _round(
        self, number: int, steps: int, looks_before: int, expected: float, chains: int = 1
    ) -> Round:
        is_last = number >= self.max_rounds or 2 * steps * chains > self._largest
        may_stop = is_last or expected <= _NEAR * self.target
        look = looks_before + 1 if may_stop else 0
        return Round(number, steps, look, looks_before, is_last, chains)


def first_steps(length: float, fewest: int = 16) -> int:
    """Chooses T of the first round: a few steps, more where a step would go too far.

    Args:
        length: Thermodynamic length of the path.
        fewest: Steps on a short path.

    Returns:
        ``fewest``, or it doubled some times, up to 64.

    Example:
        >>> first_steps(1.0), first_steps(9.0)
        (16, 64)
    """
    steps = fewest
    while steps < min(_MOST_AT_FIRST, length**2):
        steps *= 2
    return steps


def refine(
    pilot: PilotOutcome,
    path: Path,
    statistics: StepStatistics,
    position: Tensor,
    log_weights: Tensor,
    generator: torch.Generator,
) -> PilotOutcome:
    """Improves what the pilot found by what a forward round has measured.

    Args:
        pilot: What the pilot found, before any round.
        path: Of the round.
        statistics: Of the round's steps.
        position: Where its chains ended, ``[K, *batch, D]``.
        log_weights: Their log-weights, ``[K, *batch]``.
        generator: Resamples the ends by their weights.

    Returns:
        The pilot's outcome with the round's tuning, acceptance and clock.
    """
    betas = path.betas.double().cpu().numpy()
    knots = _knots(pilot.tuning.betas, betas)
    table = path.tuning.at_all(torch.tensor(knots, dtype=torch.float64, device="cpu"))
    log_step, log_scale = table.step_size.log(), table.scale.log()
    accept = statistics.accept_prob.double().cpu().numpy()
    target = path.kernel.target_accept
    if target is not None and len(accept) and not isinstance(path.kernel, SeveralStepSizes):
        count = log_weights.numel()
        change = _at_knots(knots, betas[1:-1], np.nan_to_num(accept) - target, count)
        shifts = torch.as_tensor(change).to(log_step).reshape(-1, *[1] * (log_step.dim() - 1))
        log_step = torch.minimum(log_step + shifts, largest_log_step(path.kernel, log_step))
    if bool(log_weights.isfinite().all()):
        indices = resample_indices(log_weights, len(log_weights), generator=generator)
        ends = position.gather(0, indices.unsqueeze(-1).expand_as(position))
        moved = 0.5 * (log_scale_of(ends, log_scale[-1]) - log_scale[-1])
        moved = moved.clamp(-_LARGEST_CHANGE, _LARGEST_CHANGE)
        shares = torch.tensor(knots).to(log_scale).reshape(-1, *[1] * moved.dim())
        log_scale = log_scale + shares * moved
    known = np.array(pilot.tuning.betas)
    seen = np.interp(knots, known, pilot.accept_prob)
    if len(accept):
        seen = np.interp(knots, betas[1:-1], np.nan_to_num(accept))
    return pilot._replace(
        tuning=TuningTable(tuple(knots), log_step, log_scale),
        lengths=tuple(_clock(pilot, betas, statistics.var_log_ratio, knots).tolist()),
        accept_prob=tuple(seen.tolist()),
        ess_fraction=tuple(np.interp(knots, known, pilot.ess_fraction).tolist()),
    )


def _knots(own: tuple[float, ...], betas: np.ndarray) -> list[float]:
    """Joins the pilot's knots and a few evenly spread betas of the run."""
    count = min(_KNOTS, len(betas) - 1)
    chosen = np.linspace(0, len(betas) - 1, count + 1).round().astype(int)
    return sorted({*own, *betas[chosen].tolist()})


def _at_knots(knots: list[float], betas: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Averages values at betas around each knot, shrunk where few transitions tell."""
    hats = np.stack([np.interp(betas, knots, row) for row in np.eye(len(knots))])
    means = hats @ values / (hats.sum(1) + 50.0 / count)
    clipped: np.ndarray = means.clip(-_LARGEST_CHANGE, _LARGEST_CHANGE)
    return clipped


def _clock(
    pilot: PilotOutcome, betas: np.ndarray, variances: Tensor, knots: list[float]
) -> np.ndarray:
    """Measures lengths at the knots: half of the pilot's share, half of the run's."""
    own = np.interp(knots, pilot.tuning.betas, pilot.lengths)
    speed = variances.double().cpu().clamp(min=0.0).sqrt().numpy()
    speed = np.append(speed, speed[-1])  # no chain was seen at beta = 1
    pieces = 0.5 * (speed[1:] + speed[:-1]) * np.diff(betas)
    total = pieces.sum()
    if not (math.isfinite(total) and total > 0.0 and own[-1] > 0.0):
        return own
    measured = np.interp(knots, betas, np.append(0.0, pieces.cumsum()))
    mixed: np.ndarray = 0.5 * (own + measured * own[-1] / total)
    return mixed
