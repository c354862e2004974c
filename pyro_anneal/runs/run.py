"""One run: a problem and its pilot, frozen, then chains through it in one direction."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..chains.blockwise import Blockwise
from ..chains.path import Direction, StepStatistics
from ..chains.tuning import Budget, Particles, choose_kernel, tune
from ..compiled.choice import describe_mode, loop_notes, with_loop
from ..compiled.program import LoopedDensity
from ..kernels import State
from ..models.simulation import Arguments
from ..persistence.journal import Journal
from ..problems.discrete import kernels_for, lattice_of
from ..problems.fingerprint import describe_problem
from ..problems.problem import Problem, prepare
from ..results.digest import digest_of_data
from ..results.run import AnnealedRun
from .blocks import Ends, anneal_blocks, split
from .continuation import Continuation
from .settings import Frozen, Settings, progress_bar

__all__ = ["forward", "freeze", "make_problem", "particles", "reverse"]


def make_problem(
    settings: Settings,
    model: Callable[..., Any],
    model_args: Arguments,
    guide_args: Arguments,
    journal: Journal,
    prefix: str,
    *,
    seed: int,
) -> Problem:
    """Inspects, fits and captures, and checks that the journal speaks of the same problem."""
    visible = settings.progress_bar and settings.guide == "auto" and journal.is_first
    num_chains, size = settings.plan.num_chains, settings.chain_batch_size
    # One increment moves no chain; with a target gap the steps are not known yet.
    moves = settings.plan.num_steps != 1 or settings.target_gap is not None
    with progress_bar(visible, "fit", 340) as bar:
        problem = prepare(
            model,
            settings.guide,
            model_args,
            guide_args,
            num_chains=min(num_chains, size or num_chains),
            batch_plates=settings.batch_plates,
            compile=settings.compile == "density",
            seed=seed,
            prior_weight=settings.prior_weight,
            progress=bar.update,
            max_rows=size,
            once=lambda compute, name="fit": journal.once(f"{prefix}{name}", compute),
            gradients=moves and bool(getattr(settings.plan.kernel, "needs_gradients", True)),
        )
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
    budget: Budget | None = None,
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
        budget: What ``target_gap`` chose for another problem, to be shared; None to choose.
    """
    began = time.perf_counter()
    problem = make_problem(settings, model, model_args, guide_args, journal, prefix, seed=seed)
    setup_seconds = time.perf_counter() - began
    visible = settings.progress_bar and journal.is_first
    with progress_bar(visible, "pilot", 1.0, delay=1e-3) as bar:
        walkers = particles(
            problem,
            seed,
            max_rows=settings.chain_batch_size,
            progress=lambda beta: bar.update(beta - bar.n),
        )

        def once(name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            return journal.once(f"{prefix}{name}", compute)

        plan = settings.plan
        if lattice_of(problem.layout) is not None or len(plan.kernels) == 1:
            kernels = kernels_for(plan.kernel, problem.model, problem.probe(), seed=seed)
            plan = choose_kernel(walkers, replace(plan, kernels=kernels), once=once)
        path, summary, budget = tune(walkers, plan, budget=budget, once=once)
    problem = replace(problem, density=with_loop(problem.density, path, settings.compile))
    how = {"density evaluated as": problem.density.mode}
    how["steps run by"] = _steps_run_by(problem.density)
    journal.identify(f"{prefix}mode", how)
    return Frozen(
        problem=problem,
        path=path,
        pilot=summary,
        budget=budget,
        num_chains=settings.plan.num_chains,
        chain_batch_size=settings.chain_batch_size,
        seed=seed,
        setup_seconds=setup_seconds,
        progress_bar=visible,
    )


def _steps_run_by(density: Any) -> str:
    if not isinstance(density, LoopedDensity):
        return "steps"
    return "a loop, unrolled" if density.unroll else "a loop"


def forward(
    frozen: Frozen,
    journal: Journal,
    prefix: str = "",
    *,
    stream: str = "forward",
    keep_samples: bool = True,
) -> tuple[AnnealedRun, Tensor]:
    """Runs K chains from the base to the model.

    Args:
        frozen: The problem and its path.
        journal: Where progress is kept.
        prefix: As in :func:`freeze`.
        stream: Name of the stream of noise.
        keep_samples: Whether the run keeps its chains' ends as posterior samples.

    Returns:
        The run, and the position ``[*batch, D]`` of chain 0 at its last weight.
    """
    problem = frozen.problem
    blocks = split(frozen.num_chains, frozen.chain_batch_size)

    def start(chains: range) -> State:
        with torch.no_grad():
            position = problem.draw(len(chains))
            state: State = problem.density(position)
        problem.check_start(state, is_all=len(blocks) == 1)
        problem.density.check(position[:1].nan_to_num())
        return state

    # A density that froze something, or changed under way, shows at one end or the other.
    check = problem.density.check
    ends = _anneal(frozen, journal, prefix, blocks, start, "forward", stream, check)
    run = _result(frozen, ends, "forward", keep_samples)
    if keep_samples:
        rows = frozen.chain_batch_size
        handle = Continuation(problem, frozen.path, ends.position, ends.log_weights, rows)
        run = replace(run, continuation=handle)
    return run, ends.position[0]


def reverse(
    frozen: Frozen,
    position: Tensor,
    journal: Journal,
    prefix: str = "",
    *,
    stream: str = "reverse",
    certified: bool = True,
    keep_samples: bool = True,
) -> AnnealedRun:
    """Runs chains from posterior samples ``[K, *batch, D]`` back to the base.

    Args:
        frozen: The problem and its path.
        position: Starting points.
        journal: Where progress is kept.
        prefix: As in :func:`freeze`.
        stream: Name of the stream of noise.
        certified: Whether the samples are exact.
        keep_samples: Whether the run keeps its chains' ends.

    Raises:
        ValueError: If a sample has no density.
    """
    problem = frozen.problem
    blocks = split(len(position), frozen.chain_batch_size)

    def start(chains: range) -> State:
        with torch.no_grad():
            state: State = problem.density(position[chains.start : chains.stop].contiguous())
        if bool((~state.log_ratio().isfinite()).any()):
            problem.check_start(state, is_all=len(blocks) == 1)
            raise ValueError(
                "some posterior samples have no density under the model or the base: check that "
                "they lie inside the supports, and that the guide covers the posterior"
            )
        return state

    ends = _anneal(frozen, journal, prefix, blocks, start, "reverse", stream)
    run = _result(frozen, ends, "reverse", keep_samples)
    starts = stream == "reverse" and not bool((position == position[:1]).all())
    return replace(run, certified=certified, independent_starts=starts)


def _anneal(
    frozen: Frozen,
    journal: Journal,
    prefix: str,
    blocks: Sequence[range],
    start: Callable[[range], State],
    direction: Direction,
    stream: str,
    check: Callable[[Tensor], object] = lambda positions: None,
) -> Ends:
    own = range(journal.world.rank, len(blocks), journal.world.size)
    total = frozen.path.num_steps * len(own)
    with torch.no_grad(), progress_bar(frozen.progress_bar, stream, total) as bar:
        return anneal_blocks(
            frozen.problem.density,
            frozen.path,
            blocks,
            start,
            direction=direction,
            stream=stream,
            seed=frozen.seed,
            journal=journal,
            name=f"{prefix}{stream}",
            check=check,
            progress=bar.update,
        )


def _result(frozen: Frozen, ends: Ends, direction: Direction, keep_samples: bool) -> AnnealedRun:
    problem, path = frozen.problem, frozen.path
    layout = problem.layout
    statistics = ends.statistics
    if direction == "reverse":
        statistics = StepStatistics(*(value.flip(0) for value in statistics))
    moves = path.betas[1:-1].tolist()
    step_size = [float(path.tuning.at(beta).step_size.log().mean().exp()) for beta in moves]
    return AnnealedRun(
        direction=direction,
        log_weights=ends.log_weights,
        betas=path.betas,
        accept_prob=statistics.accept_prob,
        num_diverging=statistics.num_diverging,
        step_size=torch.tensor(step_size, dtype=torch.float64, device="cpu"),
        mean_log_ratio=statistics.mean_log_ratio,
        var_log_ratio=statistics.var_log_ratio,
        log_evidence_ti=ends.integral,
        posterior=problem.unpack(ends.position) if keep_samples else {},
        plates={plate.name: plate.size for plate in layout.batch},
        site_plates={site.name: site.plates for site in layout.model_sites},
        num_gradients=1 + path.kernel.num_gradients * (path.num_steps - 1),
        num_evaluations=ends.num_evaluations,
        seconds=ends.seconds,
        seed=frozen.seed,
        kernel=repr(path.kernel),
        target_accept=path.kernel.target_accept,
        density_mode=describe_mode(problem.density),
        pilot=frozen.pilot,
        setup_seconds=frozen.setup_seconds,
        fit_gradients=problem.fit_gradients,
        notes=(*layout.notes, *loop_notes(problem.density)),
        scale=layout.scale,
        observed=layout.observed if keep_samples else {},
        data_digest=digest_of_data(layout.observed),
    )
