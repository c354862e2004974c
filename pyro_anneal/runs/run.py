"""Chains through a frozen problem, in one direction or around an exact sample, and their result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..chains.budget import choose_blocks
from ..chains.path import Direction, StepStatistics
from ..chains.resampling import Reference, Resampling, lineage_memory, systematic_ancestors
from ..compiled.choice import describe_mode, loop_notes
from ..kernels import State
from ..persistence.journal import Journal
from ..persistence.randomness import seeded_generator
from ..results.digest import digest_of_data
from ..results.run import AnnealedRun
from .blocks import Ends, anneal_blocks, split
from .continuation import Continuation
from .findings import findings_of
from .progress import progress_bar
from .settings import Frozen

__all__ = ["around_paths", "forward", "reverse", "shared_end"]


def forward(
    frozen: Frozen,
    journal: Journal,
    prefix: str = "",
    *,
    stream: str = "forward",
    keep_samples: bool = True,
) -> tuple[AnnealedRun, Ends]:
    """Runs K chains from the base to the model, resampled where the grouping says so.

    Args:
        frozen: The problem and its path.
        journal: Where progress is kept.
        prefix: As in :func:`freeze`.
        stream: Name of the stream of noise.
        keep_samples: Whether the run keeps its chains' ends as posterior samples.

    Returns:
        The run, and its ends.
    """
    resampling = frozen.grouping.resampling
    ends = _from_base(frozen, journal, prefix, stream, resampling)
    run = _result(frozen, ends, "forward", keep_samples, resampling)
    if keep_samples:
        rows = frozen.chain_batch_size
        handle = Continuation(frozen.problem, frozen.path, ends.position, ends.log_weights, rows)
        run = replace(run, continuation=handle)
    return run, ends


def _from_base(
    frozen: Frozen,
    journal: Journal,
    prefix: str,
    stream: str,
    resampling: Resampling | None,
    paths: Sequence[Reference] = (),
) -> Ends:
    """Runs K chains from the base; the first of each population along a path, if there are any."""
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
    return _anneal(
        frozen, journal, prefix, blocks, start, "forward", stream, check, resampling, paths
    )


def around_paths(
    frozen: Frozen,
    position: Tensor,
    journal: Journal,
    prefix: str = "",
    *,
    stream: str = "reverse",
) -> AnnealedRun:
    """Runs the populations of a run around paths drawn in reverse from one posterior sample.

    Paths take as many chains as the populations, so that one compiled density serves both.

    Args:
        frozen: The problem, its path, and populations that resample.
        position: The exact posterior sample, ``[*batch, D]``.
        journal: Where progress is kept.
        prefix: As in :func:`freeze`.
        stream: Name of the stream of noise.

    Raises:
        ValueError: If the sample has no density, or chains do not resample.
    """
    resampling = frozen.grouping.resampling
    if resampling is None:
        raise ValueError("chains that do not resample leave no paths: run them in reverse")
    blocks = split(frozen.num_chains, frozen.chain_batch_size)
    starts = position.expand(frozen.num_chains, *position.shape)
    back = _back(frozen, starts, journal, prefix, blocks, f"{stream} paths", resampling)
    around = f"{stream} populations"
    ends = _from_base(frozen, journal, prefix, around, resampling, back.paths)
    # curves are those of the paths, which start at the posterior sample
    curves = ends._replace(statistics=back.statistics, integral=back.integral)
    run = _result(frozen, curves, "reverse", keep_samples=False, resampling=resampling)
    return replace(
        run,
        num_gradients=2 * run.num_gradients,
        num_evaluations=run.num_evaluations + back.num_evaluations,
        seconds=run.seconds + back.seconds,
    )


def shared_end(ends: Ends, resampling: Resampling | None, seed: int) -> Tensor:
    """Draws where other chains start in reverse, ``[*batch, D]``: at an end of the first chain.

    Where chains were resampled it is an end of the first population, drawn by its weights.

    Args:
        ends: Of a forward run.
        resampling: Of its chains.
        seed: Seed of the draw.
    """
    if resampling is None:
        return ends.position[0]
    device = ends.log_weights.device
    generator = seeded_generator(device, seed, "an end of the first population")
    weights = ends.log_weights[: resampling.population_size]
    chosen = systematic_ancestors(weights, generator)[:1]
    return ends.position.gather(
        0, chosen.unsqueeze(-1).expand(1, *ends.position.shape[1:])
    ).squeeze(0)


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
    blocks = split(len(position), frozen.chain_batch_size)
    ends = _back(frozen, position, journal, prefix, blocks, stream)
    run = _result(frozen, ends, "reverse", keep_samples)
    starts = stream.split(",")[0] == "reverse" and not bool((position == position[:1]).all())
    variance = math.nan if frozen.pilot is None else frozen.pilot.expected_variance
    count, num_data = len(position), math.prod(run.batch_shape)
    return replace(
        run,
        certified=certified,
        independent_starts=starts,
        blocks=choose_blocks(count, variance)[:],
        total_blocks=choose_blocks(count, variance, num_data=num_data)[:],
    )


def _back(
    frozen: Frozen,
    position: Tensor,
    journal: Journal,
    prefix: str,
    blocks: Sequence[range],
    stream: str,
    resampling: Resampling | None = None,
) -> Ends:
    """Runs reverse chains from ``position``, which leave their paths for ``resampling``."""
    problem = frozen.problem

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

    return _anneal(
        frozen, journal, prefix, blocks, start, "reverse", stream, resampling=resampling
    )


def _anneal(
    frozen: Frozen,
    journal: Journal,
    prefix: str,
    blocks: Sequence[range],
    start: Callable[[range], State],
    direction: Direction,
    stream: str,
    check: Callable[[Tensor], object] = lambda positions: None,
    resampling: Resampling | None = None,
    paths: Sequence[Reference] = (),
) -> Ends:
    own = range(journal.world.rank, len(blocks), journal.world.size)
    total = frozen.path.num_steps * len(own)
    with torch.no_grad(), progress_bar(stream, total) as bar:
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
            resampling=resampling,
            paths=paths,
            check=check,
            progress=bar.update,
        )


def _result(
    frozen: Frozen,
    ends: Ends,
    direction: Direction,
    keep_samples: bool,
    resampling: Resampling | None = None,
) -> AnnealedRun:
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
        population_size=1 if resampling is None else resampling.population_size,
        ancestors=None if ends.lineage is None else ends.lineage.ancestors,
        num_resamplings=None if ends.lineage is None else ends.lineage.num_resamplings,
        lineage_memory=None
        if ends.lineage is None
        else lineage_memory(ends.position, ends.lineage.ancestors).unsqueeze(0),
        blocks=frozen.grouping.blocks[:],
        total_blocks=frozen.grouping.total_blocks[:],
        data_digest=digest_of_data(layout.observed),
        diagnostics=findings_of(problem, ends.position),
    )
