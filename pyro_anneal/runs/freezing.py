"""What is decided before chains run, and frozen: the problem, the path, how chains are grouped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..chains.blockwise import Blockwise
from ..chains.grouping import Grouping, choose_grouping
from ..chains.path import Path
from ..chains.pilot import Pilot
from ..chains.plan import Plan
from ..chains.tuning import Particles, Tuned, choose_kernel, tune
from ..compiled.choice import compile_evaluations, with_loop
from ..compiled.choice import is_dear as is_dear_graph
from ..compiled.looped import LoopedDensity
from ..graphs.purity import undisturbed
from ..graphs.recorded import RecordedDensity
from ..kernels.base import needs_gradients
from ..models.simulation import Arguments
from ..persistence.journal import Journal
from ..persistence.randomness import derived_seed
from ..problems.cache import Kept, KeptProblems, prepare_kept
from ..problems.colours import colour
from ..problems.discrete import kernels_for, lattice_of
from ..problems.fingerprint import describe_problem
from ..problems.problem import MakeStart, Problem
from ..problems.rows import is_dear
from .blocks import DEFAULT_SIZE
from .progress import progress_bar
from .settings import Frozen, Settings

__all__ = ["freeze", "group", "loop_for", "make_problem", "particles"]


# From a fit to so many data that each position costs by itself.
_DRAWS = 64  # of the base, to see how many have no density
_SHORT_PILOT = Pilot(num_chains=8, num_moves=3)


# The fit of a problem is a function of model and data alone, so that it need not be repeated.
_FIT_SEED = 0


def make_problem(
    settings: Settings,
    model: Callable[..., Any],
    model_args: Arguments,
    guide_args: Arguments,
    journal: Journal,
    prefix: str,
    *,
    seed: int,
    make_start: MakeStart | None = None,
    problems: KeptProblems[Kept] | None = None,
) -> Problem:
    """Inspects, fits and captures, and checks that the journal speaks of the same problem."""
    num_chains, size = settings.plan.num_chains, settings.chain_batch_size
    # One increment moves no chain; with a target the steps are not known yet.
    moves = settings.plan.num_steps != 1 or settings.target_gap is not None
    with progress_bar("fit", 340) as bar:
        problem = prepare_kept(
            problems,
            model,
            settings.guide,
            model_args,
            guide_args,
            num_chains=min(num_chains, size or num_chains),
            batch_plates=settings.batch_plates,
            compile=settings.compile == "density",
            seed=_FIT_SEED,
            prior_weight=settings.prior_weight,
            progress=bar.update,
            max_rows=size,
            once=lambda compute, name="fit": journal.once(f"{prefix}{name}", compute),
            gradients=moves and needs_gradients(settings.plan.kernel),
            make_start=make_start,
            native=settings.compile is not False,
        )
    # Whatever was drawn to make the problem, or found and not drawn again: the same draws follow.
    torch.manual_seed(derived_seed(seed, "draws"))
    if journal.is_kept:
        journal.identify(f"{prefix}problem", describe_problem(problem))
    return problem


def particles(
    problem: Problem,
    seed: int,
    *,
    max_rows: int | None = None,
    progress: Callable[[float], object] = lambda beta: None,
) -> Particles:
    """Hands a problem to the tuner.

    Args:
        problem: The problem.
        seed: Seed of the pilot.
        max_rows: Positions that may be evaluated at once.
        progress: Called with the beta reached after each stage of the pilot.
    """
    layout, density = problem.layout, problem.density
    return Particles(
        density=density if max_rows is None else Blockwise(density, max_rows),
        draw=problem.draw,
        example=torch.zeros(
            *layout.batch_shape, layout.dim, dtype=layout.dtype, device=layout.device
        ),
        seed=seed,
        check=problem.check_start,
        progress=progress,
    )


def freeze(
    settings: Settings,
    model: Callable[..., Any],
    model_args: Arguments,
    guide_args: Arguments,
    journal: Journal,
    prefix: str = "",
    *,
    seed: int,
    num_steps: int | None = None,
    grouping: Grouping | None = None,
    make_start: MakeStart | None = None,
    problems: KeptProblems[Kept] | None = None,
    num_runs: int = 1,
) -> Frozen:
    """Prepares the problem and runs the pilot.

    Args:
        settings: Settings.
        model: The model, conditioned on its data.
        model_args: ``(args, kwargs)`` of the model.
        guide_args: ``(args, kwargs)`` of the guide.
        journal: Where stages are kept.
        prefix: Distinguishes the stages of this run from those of others.
        seed: Seed of the run.
        num_steps: What the rounds of another problem reached, to be shared; None for what was
            asked for: with a target the path is then that of a first round.
        grouping: How the chains of another problem are grouped, to be shared; None to choose.
        make_start: Makes the base of ``guide="auto"``, in place of the automatic fit.
        problems: What other data sets of the call have left for this one.
        num_runs: Runs of the whole call, of this and of other data sets.
    """
    began = time.perf_counter()
    problem = make_problem(
        settings,
        model,
        model_args,
        guide_args,
        journal,
        prefix,
        seed=seed,
        make_start=make_start,
        problems=problems,
    )
    setup_seconds = time.perf_counter() - began
    plan = settings.plan
    moves = num_runs * plan.num_steps * plan.num_chains
    compile_evaluations(problem.density, settings.compile, moves * plan.kernel.num_gradients)
    path, summary, found = _lay(settings, problem, journal, prefix, seed, num_steps)
    density = loop_for(problem.density, path, settings.compile, num_runs=num_runs)
    problem = replace(problem, density=density)
    how: dict[str, str] = {"density evaluated as": problem.density.mode}
    how["steps run by"] = _steps_run_by(problem.density)
    if grouping is None:
        grouping = group(
            settings.plan,
            path.num_steps,
            problem,
            settings.chain_batch_size,
            length=math.nan if summary is None else summary.length,
            variance=math.nan if summary is None else summary.expected_variance,
        )
    has_rounds = found is not None and found.plan.target_gap is not None
    journal.identify(f"{prefix}mode of rounds" if has_rounds else f"{prefix}mode", how)
    return Frozen(
        problem=problem,
        path=path,
        pilot=summary,
        found=found,
        compile=settings.compile,
        grouping=grouping,
        num_chains=settings.plan.num_chains,
        chain_batch_size=settings.chain_batch_size,
        seed=seed,
        setup_seconds=setup_seconds,
    )


def _lay(
    settings: Settings,
    problem: Problem,
    journal: Journal,
    prefix: str,
    seed: int,
    num_steps: int | None,
) -> Tuned:
    """Chooses a kernel, and lays the path that a pilot finds."""
    with progress_bar("pilot", 1.0) as bar:
        walkers = particles(
            problem,
            seed,
            max_rows=settings.chain_batch_size,
            progress=lambda beta: bar.update(beta - bar.n),
        )

        def once(name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            return journal.once(f"{prefix}{name}", compute)

        plan = settings.plan
        is_fitted = settings.pilot is None and settings.guide == "auto"
        if is_fitted and is_dear(problem.density, problem.layout.dim):
            plan = replace(plan, pilot=_SHORT_PILOT, fewest_steps=4)
        elif settings.pilot is None and is_dear_graph(problem.density):
            plan = replace(plan, pilot=plan.pilot.within(plan.num_chains, plan.num_steps))
        if lattice_of(problem.layout) is not None or len(plan.kernels) == 1:
            kernels = kernels_for(
                plan.kernel,
                problem.model,
                problem.density.example,
                seed=seed,
                colour=lambda lattice: colour(problem, lattice),
            )
            plan = choose_kernel(walkers, replace(plan, kernels=kernels), once=once)
        return tune(walkers, plan, num_steps=num_steps, once=once)


def group(
    plan: Plan,
    num_steps: int,
    problem: Problem,
    chain_batch_size: int | None,
    *,
    length: float,
    variance: float,
) -> Grouping:
    """Groups the chains of a run; see :func:`~pyro_anneal.chains.grouping.choose_grouping`."""
    return choose_grouping(
        plan.resampling,
        num_chains=plan.num_chains,
        num_steps=num_steps,
        batch_size=math.prod(problem.layout.batch_shape),
        chains_at_once=chain_batch_size or DEFAULT_SIZE,
        length=length,
        variance=variance,
        dead=_share_dead(problem),
    )


def _share_dead(problem: Problem) -> float:
    """Estimates how many draws of the base have no density, where supports let that happen."""
    if not problem.layout.guarded and lattice_of(problem.layout) is None:
        return 0.0
    with undisturbed(problem.layout.device), torch.no_grad():
        torch.manual_seed(0)  # a function of model and data alone
        draws, density = problem.draw(_DRAWS), problem.density
        before = density.num_evaluations
        found = Blockwise(density, density.num_chains)(draws).log_target == -torch.inf
        density.num_evaluations = before
    return float(found.double().mean(0).max())


def loop_for(
    density: RecordedDensity, path: Path, compile: bool | str, *, num_runs: int = 1
) -> RecordedDensity:
    """Compiles a density's loop where that repays itself; an earlier round may have done so."""
    if isinstance(density, LoopedDensity):
        return density
    return with_loop(density, path, compile, num_runs=num_runs)


def _steps_run_by(density: Any) -> str:
    return "a loop" if isinstance(density, LoopedDensity) else "steps"
