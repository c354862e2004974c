r"""What a number of evaluations is best spent on: more pairs, more draws per pair, or annealing.

A pilot on pairs of its own measures the gap g of the two bounds for K draws from the start, and the
variance :math:`\sigma^2` of the pairs' values. With a budget B the mean of :math:`N = B / (K + 1)`
pairs is off by about

.. math:: \epsilon^2 = (g_K / 2)^2 + \sigma^2_K / N ,

which is least for some K. Where that leaves more than chance does, chains of T steps are tried on a
few pairs: their gap falls as 1 / T while their pairs get fewer, so that the best T solves
:math:`T^3 = g^2 B / (2 c \sigma^2)` with c evaluations per pair and step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..persistence.randomness import derived_seed, own_randomness
from ..results.controls import leave_one_out_control
from .importance import Weighed, weigh
from .pairs import Experiment
from .starts import Regression, fit_start

__all__ = ["LEAST_BUDGET", "Bounds", "Plan", "Tried", "choose", "information"]

Bounds = Callable[[tuple[str, ...]], tuple[Tensor, Tensor]]

# Shares of the budget for the fit of starts and for each pilot; pairs and draws of a pilot.
_SHARE, _MOST_FITTED, _PILOT_PAIRS, _PILOT_DRAWS = 0.05, 2000, 64, 64
LEAST_BUDGET = 1000
_WIDE = 0.1  # nats of gap beyond which chains are tried
_FEW_CHAINS, _FEW_STEPS, _FEW_PAIRS, _LEAST_PAIRS = 4, 30, 4, 10


@dataclass(frozen=True)
class Tried:
    """What chains of a few steps gave on a few pairs."""

    gap: float  # nats, mean over pairs and designs
    variance: float  # of the pairs' values, mean over designs, of the bound that varies less
    fixed: float  # evaluations of the pilot and of starts, per pair
    per_step: float  # evaluations per pair and step


@dataclass(frozen=True)
class Plan:
    """What to spend a budget on.

    Attributes:
        num_pairs: Number N of pairs per design.
        num_draws: Number K of draws, or of chains.
        num_steps: Number T of steps; 1 for independent draws.
        starts: Fitted starts by the sites that they look at; None for the prior.
        spent: Evaluations per design, all pilots included.
        expected: Root mean square error that the pilot leads to expect, nats.
    """

    num_pairs: int
    num_draws: int
    num_steps: int
    starts: dict[tuple[str, ...], Regression | None]
    spent: int
    expected: float

    def bounds(self, experiment: Experiment) -> Bounds:
        """Returns what bounds log densities of these pairs by independent draws."""
        return lambda observed: weigh(
            experiment, observed, self.starts.get(observed), self.num_draws
        ).bounds()

    def note(self) -> str:
        """Says what was chosen."""
        fitted = any(start is not None for start in self.starts.values())
        start = "a regression fitted per design" if fitted and self.num_steps == 1 else "the prior"
        way = (
            f"{self.num_draws} independent draws"
            if self.num_steps == 1
            else f"{self.num_draws} chains of {self.num_steps} steps"
        )
        return (
            f"the budget was spent on {self.num_pairs} pairs per design with {way} each from "
            f"{start}: {self.spent} evaluations per design, pilots included"
        )


def information(
    experiment: Experiment, bounds: Bounds, known: Callable[[], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Bounds ``log p(y | theta, d) - log p(y | d)`` of each pair, ``[N, *designs]``.

    Without nuisances the first term is known. With them it is log p(theta, y | d) less
    log p(theta | d), each bounded, unless the latter is known.

    Args:
        experiment: The pairs.
        bounds: Bounds the joint log density of some sites of each pair.
        known: Computes log p(y | theta, d) after the first call of ``bounds``; by a run of the model
            if None.
    """
    observations = experiment.labels.observations
    low, high = bounds(observations)
    if not experiment.nuisances:
        if known is None:
            value = experiment.run(experiment.values).log_prob(observations)
        else:
            value = known()
        return value - high, value - low
    joint = bounds((*experiment.targets, *observations))
    prior = experiment.log_prior_of_targets()
    if prior is not None:
        return joint[0] - prior - high, joint[1] - prior - low
    # It depends on nuisances, and needs bounds of its own.
    targets = bounds(experiment.targets)
    return joint[0] - targets[1] - high, joint[1] - targets[0] - low


def _asked(experiment: Experiment) -> list[tuple[str, ...]]:
    """Collects the groups of sites whose joint log density will be bounded."""
    asked: list[tuple[str, ...]] = []

    def record(observed: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        asked.append(observed)
        return torch.zeros(()), torch.zeros(())

    information(experiment, record)
    return asked


def choose(
    make: Callable[[int, int], Experiment],
    budget: int,
    seed: int,
    anneal: Callable[[Experiment, int, int], Tried],
) -> Plan:
    """Chooses pairs, draws and steps for a budget of evaluations per design.

    Args:
        make: Simulates a number of pairs from a seed.
        budget: Evaluations of log p(y | theta, d) per design.
        seed: Seed of the pilots.
        anneal: Tries chains on pairs, with these numbers of chains and steps.
    """
    fitted = make(min(_MOST_FITTED, max(50, int(_SHARE * budget))), derived_seed(seed, "starts"))
    asked = _asked(fitted)
    starts = {observed: fit_start(fitted, observed) for observed in asked}
    num_pairs = _PILOT_PAIRS
    most = 2 ** int(math.log2(max(2.0, _SHARE * budget / (num_pairs * len(asked)))))
    num_draws = min(_PILOT_DRAWS, most)
    pilot = make(num_pairs, derived_seed(seed, "pilot"))
    with own_randomness(derived_seed(seed, "pilot draws")):
        weighed = {
            observed: weigh(pilot, observed, starts[observed], num_draws) for observed in asked
        }
    used = len(fitted.design) + num_pairs * len(asked) * (num_draws + 1)
    left = budget - used
    controls = pilot.controls()
    sizes: list[tuple[float, int, int, float]] = []
    for draws in _sizes(num_draws, left // _LEAST_PAIRS):
        gap, variance = _measured(pilot, weighed, controls, draws, num_draws)
        pairs = max(2, left // (len(asked) * (draws + 1)))
        sizes.append((0.25 * gap**2 + variance / pairs, pairs, draws, gap))
    error, pairs, draws, gap = min(sizes, key=lambda entry: entry[0])
    spent = used + pairs * len(asked) * (draws + 1)
    plan = Plan(pairs, draws, 1, starts, spent, math.sqrt(error))
    if gap < _WIDE or left < _LEAST_PAIRS * 6 * _FEW_CHAINS * _FEW_STEPS:
        return plan
    few = make(_FEW_PAIRS, derived_seed(seed, "few"))
    tried = anneal(few, _FEW_CHAINS, _FEW_STEPS)
    used += round(_FEW_PAIRS * (tried.fixed + tried.per_step * _FEW_STEPS))
    return _annealed(tried, plan, used, budget - used) or plan


def _annealed(tried: Tried, plan: Plan, used: int, left: int) -> Plan | None:
    """Chooses T, or finds that chains are not worth their price."""
    variance = max(tried.variance, 1e-12)
    gap = max(tried.gap, 0.0) * _FEW_STEPS  # times 1 / T
    wanted = (gap**2 * left / (2.0 * max(tried.per_step, 1.0) * variance)) ** (1.0 / 3.0)
    longest = (left / _LEAST_PAIRS - tried.fixed) / tried.per_step
    steps = round(min(max(wanted, _FEW_STEPS), max(longest, 2.0)))
    cost = tried.fixed + tried.per_step * steps
    pairs = int(left / cost)
    if pairs < 4:
        return None
    expected = math.sqrt(0.25 * (gap / steps) ** 2 + variance / pairs)
    if not expected < plan.expected:
        return None
    return Plan(pairs, _FEW_CHAINS, steps, {}, used + round(pairs * cost), expected)


def _sizes(measured: int, most: int) -> list[int]:
    """Lists numbers of draws to consider: powers of two, beyond those that were measured too."""
    found = [2]
    while 2 * found[-1] <= max(2, most):
        found.append(2 * found[-1])
    return [size for size in found if size <= 8 * measured]


def _measured(
    pilot: Experiment,
    weighed: dict[tuple[str, ...], Weighed],
    controls: Tensor,
    draws: int,
    num_draws: int,
) -> tuple[float, float]:
    """Estimates gap and variance for a number of draws, the largest over designs.

    Beyond the number that was drawn the gap is taken to fall as 1 / K.
    """
    size = min(draws, num_draws)
    found: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {
        observed: value.bounds(size) for observed, value in weighed.items()
    }
    lower, upper = information(pilot, lambda observed: found[observed])  # [blocks, N, *designs]
    gap = (upper - lower).mean((0, 1)).max()
    middle = 0.5 * (lower + upper)
    control = torch.stack([leave_one_out_control(m, controls.to(m)) for m in middle])
    variance = (middle - control).var(1).mean(0).max()
    worth = [float(gap) * size / draws, float(variance)]
    return max(worth[0], 0.0), worth[1] if math.isfinite(worth[1]) else math.inf
