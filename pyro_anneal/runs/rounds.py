"""Rounds of one call: each refines the path of the one before, and the last one is reported."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..chains.path import StepStatistics
from ..chains.rounds import Goal, Round, refine
from ..chains.tuning import Found, lay_path
from ..diagnostics import checks as diagnostics
from ..graphs.inductor import count_operations
from ..persistence.journal import Journal
from ..persistence.randomness import seeded_generator
from ..results.run import AnnealedRun
from .blocks import Ends
from .freezing import group, loop_for
from .run import around_paths, forward, reverse
from .settings import Frozen

__all__ = ["Done", "in_rounds", "run_back", "run_both", "run_forward"]

# Findings that say that a standard error is not to be believed.
_UNSOUND = frozenset(
    {"ess", "dominance", "lag", "lineages", "zero_weights", "undefined_weights", "agreement"}
)
# Relative variance of a chain's weight below which more chains are as good as more steps, the least
# power of T with which it must fall for more steps, and the numbers that positions may fill.
_FEW_ENOUGH, _FALLS, _MOST_NUMBERS = 3.0, 0.7, 1_000_000
# Operations on numbers that a round may take where rounds are to be spared, about half a minute;
# terms of a product of matrices are an eighth of one.
_MOST_WORK, _TERM = 3e10, 0.125
_DOUBLINGS_OF_EAGER = 7  # of what cannot be counted
# Rounds whose weights vary by less, relative to their mean, say something about each other.
_COMPARABLE, _MOST_ERRORS = 1.0, 4.0


class Done(NamedTuple):
    """What chains did on a path: in either direction, or both."""

    runs: tuple[AnnealedRun, ...]
    ends: Ends | None  # of forward chains
    error: Tensor  # measured, nats, scalar


def in_rounds(
    frozen: Frozen, anneal: Callable[[Frozen, str], Done], *, task: str
) -> tuple[Frozen, Done]:
    """Anneals once; or in rounds until the plan's target is reached.

    Args:
        frozen: The problem, and the path of the first round.
        anneal: Runs the chains of a round on a path; the string tells its streams of noise apart.
        task: Names the rounds' own generators.

    Returns:
        What the last round used, and what it gave, with the runs of all rounds.
    """
    found = frozen.found
    if found is None or found.plan.target_gap is None:
        return frozen, anneal(frozen, "")
    plan, target = found.plan, found.plan.target_gap
    most = _affordable_steps(frozen) if plan.is_sparing else None
    goal = Goal(target, plan.max_rounds, frozen.path.num_steps, most)
    now = goal.first(_expected_error(frozen, both=task == "sandwich"))
    history: list[Done] = []
    while True:
        done = anneal(frozen, f", round {now.number}")
        history.append(done)
        error, sound = float(done.error), _is_sound(history)
        stalls = task == "run" and _stalls(history)
        following = goal.after(now, error, sound=sound, stalls=stalls)
        if following is None:
            return frozen, _reported(history, goal, now)
        frozen, now = _refined(frozen, found, done, following, task), following


def _affordable_steps(frozen: Frozen) -> int:
    """Counts the steps that a round of the first round's chains may take."""
    density = frozen.problem.density
    if density.mode == "eager":
        return frozen.path.num_steps << _DOUBLINGS_OF_EAGER
    operations = count_operations(density.chain_graph_and_inputs()[0], term=_TERM)
    per_step = operations * frozen.path.kernel.num_gradients * frozen.num_chains
    return max(frozen.path.num_steps, int(_MOST_WORK / max(per_step, 1.0)))


def run_forward(
    frozen: Frozen, journal: Journal, prefix: str = "", *, stream: str, keep_samples: bool = True
) -> Done:
    """Runs forward chains; their error is the standard error, over a batch the root mean square."""
    run, ends = forward(frozen, journal, prefix, stream=stream, keep_samples=keep_samples)
    return Done((run,), ends, _std_error(run))


def run_back(
    frozen: Frozen, position: Tensor, journal: Journal, stream: str, *, certified: bool
) -> Done:
    """Runs reverse chains from posterior samples; the error is as that of forward chains."""
    run = reverse(frozen, position, journal, stream=stream, certified=certified)
    return Done((run,), None, _std_error(run))


def run_both(
    frozen: Frozen,
    exact: Tensor,
    journal: Journal,
    prefix: str,
    suffix: str,
    *,
    keep_samples: bool,
) -> Done:
    r"""Runs chains in both directions on one path; their error is the gap.

    The gap of few data is mostly noise. Of several chains it is measured by what it is in
    expectation, half of the relative variances of both means, and by the bounds themselves where
    they differ by more than twice their error.
    """
    run, ends = forward(
        frozen, journal, prefix, stream=f"forward{suffix}", keep_samples=keep_samples
    )
    if frozen.grouping.population_size > 1:
        back = around_paths(frozen, exact, journal, prefix, stream=f"reverse{suffix}")
    else:
        starts = exact.expand(frozen.num_chains, *exact.shape)
        back = reverse(
            frozen, starts, journal, prefix, stream=f"reverse{suffix}", keep_samples=keep_samples
        )
    return Done((run, back), ends, _measured_gap(run, back))


def _measured_gap(run: AnnealedRun, back: AnnealedRun) -> Tensor:
    gap = (back.upper - run.lower).flatten()
    if run.num_chains == 1:
        return gap.abs().mean()
    squares = [_variance(each) for each in (run, back)]
    expected = 0.5 * run.scale * (squares[0] + squares[1])
    noise = run.scale * ((squares[0] + squares[1]) / gap.numel()).sqrt()
    return torch.maximum(expected, gap.mean() - 2.0 * noise)


def _std_error(run: AnnealedRun) -> Tensor:
    """Measures the standard error; of one chain, which has none, as the pilot expects it."""
    if run.num_chains == 1:
        expected = math.nan if run.pilot is None else run.pilot.expected_variance
        return torch.tensor(run.scale * math.sqrt(expected), dtype=torch.float64)
    return run.scale * _variance(run).sqrt()


def _variance(run: AnnealedRun) -> Tensor:
    """Measures the relative variance of the mean weight, averaged over the batch."""
    if run.ancestors is not None and run.direction == "forward":
        return (run.std_error / run.scale).square().mean()
    count = run.num_chains
    weights = run.log_weights if run.direction == "forward" else -run.log_weights
    if run.population_size > 1:  # around a path: populations are what varies
        weights, count = -run.population_estimates, run.num_populations
        if count == 1:
            return torch.zeros((), dtype=torch.float64, device=weights.device)
    relative = (weights - weights.logsumexp(0) + math.log(count)).exp()
    return (relative.var(dim=0) / count).mean()


def _is_sound(history: list[Done]) -> bool:
    """Asks whether the last round's error may be believed, and whether the one before agrees."""
    run = history[-1].runs[0]
    found = [d for each in history[-1].runs for d in diagnostics.diagnose(each)]
    if any(d.name in _UNSOUND and d.severity == "warning" for d in found):
        return False
    if len(history) == 1:
        return True
    before = history[-2].runs[0]
    errors = [_variance(each).sqrt() * each.scale for each in (run, before)]
    if before.num_chains == 1 or _variance(before) * before.num_chains > _COMPARABLE:
        return True
    apart = (run.log_evidence - before.log_evidence).mean().abs()
    data = math.sqrt(max(math.prod(run.batch_shape), 1))
    return bool(apart <= _MOST_ERRORS * torch.hypot(*errors) / data + 1e-6)


def _stalls(history: list[Done]) -> bool:
    """Asks whether the variance of single chains falls too slowly with the number of steps."""
    first, last = history[0].runs[0], history[-1].runs[0]
    if len(history) < 3 or last.batch_shape or last.num_chains < 8:  # two tell too little
        return False
    numbers = sum(value.numel() for value in last.posterior.values())
    if 4 * numbers > _MOST_NUMBERS:
        return False
    before, after = (float(_variance(run)) * run.num_chains for run in (first, last))
    if not 0.0 < after < _FEW_ENOUGH or before == 0.0:
        return False
    growth = last.num_steps / first.num_steps
    return math.log(before / after) < _FALLS * math.log(growth)


def _expected_error(frozen: Frozen, *, both: bool) -> float:
    if frozen.pilot is None:
        return math.inf
    if both:
        return frozen.pilot.expected_gap
    variance = min(frozen.pilot.expected_variance, 30.0)
    return math.sqrt(math.expm1(variance) / frozen.num_chains)


def _refined(frozen: Frozen, found: Found, done: Done, now: Round, task: str) -> Frozen:
    """Fixes all that the next round uses."""
    run, density = done.runs[0], frozen.problem.density
    outcome = found.outcome
    example = torch.zeros_like(frozen.path.tuning.log_scale[0])
    if done.ends is not None:
        ends = done.ends
        outcome = refine(
            outcome,
            frozen.path,
            StepStatistics(*(value.detach() for value in ends.statistics)),
            ends.position,
            ends.log_weights,
            seeded_generator(example.device, frozen.seed, task, f"round {now.number}"),
        )
    num_chains = found.plan.num_chains * now.growth
    plan = replace(found.plan.with_steps(now.num_steps), num_chains=num_chains)
    path, summary, _ = lay_path(found._replace(outcome=outcome), plan, example)
    variance = summary.expected_variance
    steps = frozen.path.num_steps / now.num_steps
    seen = float(_variance(run)) * run.num_chains * steps
    if math.isfinite(seen):
        variance = max(variance, math.log1p(seen))
    problem = replace(frozen.problem, density=loop_for(density, path, frozen.compile))
    grouping = group(
        plan,
        path.num_steps,
        frozen.problem,
        frozen.chain_batch_size,
        length=summary.length,
        variance=variance,
    )
    return replace(
        frozen,
        problem=problem,
        path=path,
        pilot=summary,
        grouping=grouping,
        num_chains=num_chains,
    )


def _reported(history: list[Done], goal: Goal, last: Round) -> Done:
    """Hands over the last round, with the runs of all."""
    done = history[-1]
    runs: list[AnnealedRun] = []
    for index, run in enumerate(done.runs):
        rounds = tuple(_without_samples(past.runs[index]) for past in history)
        runs.append(
            replace(
                run,
                rounds=rounds,
                num_looks=last.look,
                target_gap=goal.target,
                measured_gap=float(done.error),
            )
        )
    return done._replace(runs=tuple(runs))


def _without_samples(run: AnnealedRun) -> AnnealedRun:
    found = diagnostics.diagnose(run)
    return replace(run, posterior={}, observed={}, continuation=None, diagnostics=found)
