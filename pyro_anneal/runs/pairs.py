"""Runs on simulated pairs, one data set after another, merged as they come.

Of each simulated data set only log-weights are kept: curves over T are summed, and posterior
samples and data are dropped unless they are asked for. So memory does not grow with T or the size
of latents and data times the number of simulations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from ..chains.grouping import Grouping
from ..models.autoguides import sees_arguments
from ..models.entropies import pair_controls
from ..models.simulation import (
    Arguments,
    Conditioned,
    Simulation,
    check_copies,
    guide_arguments,
    simulate,
)
from ..persistence.journal import Journal
from ..persistence.memory import released
from ..problems.cache import Kept, KeptProblems
from .freezing import freeze, make_problem
from .pair_sums import Pair, PairSum
from .progress import Stage, progress_bar
from .rounds import Done, in_rounds, run_both
from .run import around_paths, reverse, shared_end
from .settings import Frozen, Settings

__all__ = ["Pair", "PairSum", "simulate_pair", "simulate_pairs"]


class Shared(NamedTuple):
    """What the first data set chooses for all, so that their runs can be merged."""

    num_steps: int | None = None  # that rounds have reached
    grouping: Grouping | None = None

    def to_dict(self) -> dict[str, Any]:
        """Describes it by plain values."""
        grouping = None if self.grouping is None else self.grouping.to_dict()
        return {"num_steps": self.num_steps, "grouping": grouping}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Shared:
        """Undoes :meth:`to_dict`."""
        grouping = content["grouping"]
        return cls(
            content["num_steps"], None if grouping is None else Grouping.from_dict(grouping)
        )


_NOTHING_SHARED = Shared()


def simulate_pair(
    settings: Settings,
    arguments: Arguments,
    journal: Journal,
    prefix: str = "",
    *,
    seed: int,
    coupled: bool,
    keep_samples: bool,
    shared: Shared = _NOTHING_SHARED,
    problems: KeptProblems[Kept] | None = None,
    num_pairs: int = 1,
) -> tuple[Pair, Shared]:
    """Simulates a data set, and runs chains in both directions on it.

    Args:
        settings: Settings.
        arguments: ``(args, kwargs)`` of model and guide.
        journal: Where progress is kept.
        prefix: Distinguishes this data set in the journal.
        seed: Seed of the data set and its runs.
        coupled: Whether to run reverse chains from the end of a forward one.
        keep_samples: Whether to keep posterior samples and data.
        shared: What was chosen on another data set.
        problems: What other data sets of the call have left for this one.
        num_pairs: Data sets of the whole call.

    Returns:
        The runs, and what the next data set shares with them.
    """
    conditioned, guide_args, simulation, remarks = _simulated(
        settings, arguments, seed, check=prefix in ("", "0/")
    )
    frozen = freeze(
        settings,
        conditioned,
        arguments,
        guide_args,
        journal,
        prefix,
        seed=seed,
        num_steps=shared.num_steps,
        grouping=shared.grouping,
        problems=problems,
        num_runs=num_pairs * (3 if coupled else 2),
    )
    exact = frozen.problem.pack(simulation.latents, simulation.unconstrained)

    def anneal(frozen: Frozen, suffix: str) -> Done:
        return run_both(frozen, exact, journal, prefix, suffix, keep_samples=keep_samples)

    frozen, done = in_rounds(frozen, anneal, task="sandwich")
    (run, back), ends = done.runs, done.ends
    run = replace(run, notes=(*run.notes, *remarks))
    assert ends is not None
    count, size = frozen.num_chains, frozen.grouping.population_size
    extra = None
    if coupled and count > size:
        end = shared_end(ends, frozen.grouping.resampling, seed)
        stream = "coupled reverse"
        if size > 1:  # of all populations, that of the forward run is the one to spare
            again = around_paths(frozen, end, journal, prefix, stream=stream)
            extra = again.log_weights[size:]
        else:
            first = end.expand(count - 1, *exact.shape)
            again = reverse(frozen, first, journal, prefix, stream=stream, keep_samples=False)
            extra = again.log_weights
    log_likelihood = frozen.problem.log_likelihood(exact)
    observed = simulation.observed if keep_samples else {}
    controls = pair_controls(
        conditioned, arguments, simulation.latents, simulation.observed, frozen.problem.layout
    )
    pair = Pair(run, back, extra, observed, log_likelihood, controls)
    return pair, Shared(frozen.path.num_steps, frozen.grouping)


def _simulated(
    settings: Settings, arguments: Arguments, seed: int, *, check: bool
) -> tuple[Any, Arguments, Simulation, tuple[str, ...]]:
    """Simulates a data set: the model conditioned on it, the guide's arguments, and remarks."""
    torch.manual_seed(seed)
    simulation = simulate(settings.model, arguments)
    remarks = check_copies(settings.model, arguments, simulation) if check else ()
    conditioned = Conditioned(settings.model, simulation.observed)
    guide_args = arguments
    if sees_arguments(settings.guide) or settings.make_args is not None:
        guide_args = guide_arguments(arguments, simulation, settings.make_args)
    return conditioned, guide_args, simulation, remarks


def simulate_pairs(
    settings: Settings,
    arguments: Arguments,
    journal: Journal,
    *,
    num_simulations: int,
    coupled: bool,
    keep_samples: bool,
    more: Callable[[PairSum], int] | None = None,
) -> PairSum:
    """Simulates data sets one after another, and goes on where a journal ends.

    The rounds of the first data set (``target_gap``) choose the steps and the grouping of all, whose curves
    and populations can then be merged.

    Args:
        settings: Settings.
        arguments: ``(args, kwargs)`` of model and guide.
        journal: Where progress is kept.
        num_simulations: Number of data sets.
        coupled: As in :func:`simulate_pair`.
        keep_samples: Likewise.
        more: Asked after that number, and after each that it names, for the number of data sets
            there should be; no more than there are ends the simulations.
    """
    stored, seed = journal.get("pairs"), journal.seed
    total, shared = PairSum(), Shared()
    problems: KeptProblems[Kept] = KeptProblems()
    if stored is not None:  # by a model that must be what it was: the first data set shows it
        model, guide_args, *_ = _simulated(settings, arguments, seed, check=False)
        problem = make_problem(settings, model, arguments, guide_args, journal, "0/", seed=seed)
        total = PairSum.from_dict(stored["sum"], problem.layout.device)
        shared = Shared.from_dict(stored["shared"])
    wanted = num_simulations
    with contextlib.ExitStack() as stack:
        bar: Stage | None = None
        while True:
            if total.count >= wanted:
                wanted = wanted if more is None else more(total)
                if total.count >= wanted:
                    break
            if bar is None and wanted > 1:  # a single data set shows its own stages
                bar = stack.enter_context(progress_bar("simulations", wanted))
                bar.update(total.count)
            if bar is not None:
                bar.total = wanted
            prefix = f"{total.count}/"
            with released():
                pair, shared = simulate_pair(
                    settings,
                    arguments,
                    journal,
                    prefix,
                    seed=seed + total.count,
                    coupled=coupled,
                    keep_samples=keep_samples,
                    shared=shared,
                    problems=problems,
                    num_pairs=num_simulations,
                )
            total.add(pair)
            journal.forget(prefix, keep=("0/problem", "0/fit"))
            journal.put("pairs", partial(_described, total, shared))
            if bar is not None:
                bar.update(1)
    return total


def _described(total: PairSum, shared: Shared) -> dict[str, Any]:
    return {"sum": total.to_dict(), "shared": shared.to_dict()}
