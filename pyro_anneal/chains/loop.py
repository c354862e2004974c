r"""The annealing loops: K chains through the path, forward or in reverse.

Forward, from ``z ~ q``: for t = 1..T the weight grows by ``(beta_t - beta_{t-1}) ratio(z)``, then
(t < T) a transition at ``beta_t``. Reverse, from an exact posterior sample: for t = T..1 the same
increment, then (t > 1) the reversed transition at ``beta_{t-1}``. The transition at ``beta_T``
never enters a weight. Log-weights accumulate in float64 whatever the model's dtype.

Steps run in chunks. The noise of a chunk comes from a generator seeded by (seed, stream, chunk),
so a chunk can be repeated bit by bit from its starting state alone. Nothing in a chunk waits for
the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..kernels import Density, Kernel, State, Tuning
from ..kernels.noise import noise_in_blocks
from ..persistence.randomness import seeded_generator
from .path import Carry, Direction, Path, StepStatistics, StepTable
from .resampling import Lineage, Reference, Resampling

__all__ = [
    "CHUNK_SIZE",
    "ChunkRunner",
    "Progress",
    "final_move",
    "reversed_paths",
    "run_chains",
]

CHUNK_SIZE = 100


@runtime_checkable
class ChunkRunner(Protocol):
    """A density that can also run a chunk of steps as a whole, such as a compiled loop."""

    def run_chunk(
        self,
        kernel: Kernel,
        carry: Carry,
        table: StepTable,
        noise: tuple[Tensor, ...],
    ) -> tuple[Carry, Tensor] | None:
        """Runs the steps of ``table``: for each a move, then an increment of the weights.

        Args:
            kernel: Moves the chains.
            carry: Where they stand.
            table: One row per step.
            noise: What the kernel draws, with a leading dimension of steps.

        Returns:
            Where the chains stand after the last step, and the statistics of each step ``[n, 4]``
            in the order of :class:`~pyro_anneal.chains.path.StepStatistics`. None where the steps
            must be run one by one.
        """
        ...


class Progress(NamedTuple):
    """Where chains stand between two chunks: all that the rest of a run depends on."""

    num_chunks: int  # done
    num_steps: int  # done
    carry: Carry
    statistics: StepStatistics  # of the steps done; later entries mean nothing yet
    lineage: Lineage | None = None  # where chains are resampled

    @staticmethod
    def beginning(state: State, num_steps: int, population_size: int | None = None) -> Progress:
        """Places chains at ``state`` before the first of ``num_steps`` steps."""
        weights = torch.zeros_like(state.log_target, dtype=torch.float64)
        statistics = _empty_statistics(num_steps, state.position.device)
        lineage = None
        if population_size is not None:
            lineage = Lineage.beginning(weights, population_size)
        return Progress(0, 0, Carry(state, weights, weights), statistics, lineage)


def _trapezoid_weights(betas: Tensor, direction: Direction) -> Tensor:
    """Computes quadrature weights of the T states, in order of visit.

    Forward chains visit beta_0 .. beta_{T-1}, reverse chains beta_T .. beta_1; the interval next
    to the end that is not visited counts for its neighbour.
    """
    widths = betas.diff()
    nodes = torch.zeros_like(betas)
    nodes[:-1] += 0.5 * widths
    nodes[1:] += 0.5 * widths
    if direction == "forward":
        weights = nodes[:-1].clone()
        weights[-1] += 0.5 * widths[-1]
        return weights
    weights = nodes[1:].clone()
    weights[0] += 0.5 * widths[0]
    return weights.flip(0)


def _log_ratio(state: State) -> Tensor:
    """Computes log p - log q in float64; a state of no density (NaN) has weight zero."""
    ratio = state.log_target.double() - state.log_base.double()
    return torch.where(ratio.isnan(), -torch.inf, ratio)


def run_chains(
    density: Density,
    path: Path,
    start: State | Progress,
    *,
    direction: Direction,
    seed: int,
    stream: str,
    stops: Sequence[int] = (),
    resampling: Resampling | None = None,
    reference: Reference | None = None,
    progress: Callable[[int], object] = lambda count: None,
    record: Callable[[Progress], object] = lambda progress: None,
) -> tuple[Carry, StepStatistics]:
    """Anneals K chains from ``start`` and returns their log-weights.

    Args:
        density: Evaluates base and target of K chains.
        path: Frozen betas, kernel and tuning.
        start: Forward: draws from the base. Reverse: exact posterior samples. ``[K, *batch]``. Or
            what ``record`` was given in an earlier call with the same other arguments: the rest of
            that run then follows bit by bit.
        direction: ``"forward"`` or ``"reverse"``.
        seed: Seed of the noise.
        stream: Name of the stream of noise, so that the runs of a sandwich are independent.
        stops: Steps done at which to end a chunk, beside those of ``resampling``.
        resampling: Which chains are resampled, and when; None for none.
        reference: Reversed paths to hold in the first slot of each population.
        progress: Called with the number of steps done since the last call.
        record: Called after each chunk with all that the rest of the run depends on.

    Returns:
        The carry whose state is the one at which the last weight was taken, and the statistics;
        the lineage of chains that were resampled is in what ``record`` was given last.
    """
    if isinstance(start, State):
        size = None if resampling is None else resampling.population_size
        start = Progress.beginning(start, path.num_steps, size)
    done, _, carry, statistics, lineage = start
    device = carry.state.position.device
    points = () if resampling is None else resampling.points
    for chunk, steps in enumerate(_chunks(path.num_steps, {*stops, *points})):
        if chunk < done:
            continue
        generator = seeded_generator(device, seed, stream, chunk)
        carry = _run_chunk(density, path, carry, statistics, steps, direction, generator)
        if resampling is not None and steps.stop in (*points, path.num_steps):
            if lineage is None:
                lineage = Lineage.beginning(carry.log_weights, resampling.population_size)
            generator = seeded_generator(device, seed, stream, "resampling", steps.stop)
            state, log_weights, lineage = resampling.at(
                steps.stop, carry.state, carry.log_weights, lineage, generator, reference
            )
            carry = Carry(state, log_weights, carry.integral)
        progress(len(steps))
        record(Progress(chunk + 1, steps.stop, carry, statistics, lineage))
    return carry, statistics


def reversed_paths(
    density: Density,
    path: Path,
    state: State,
    resampling: Resampling,
    *,
    seed: int,
    stream: str,
    progress: Callable[[int], object] = lambda count: None,
) -> Reference:
    """Draws paths that end at posterior samples, for populations to hold.

    Args:
        density: Evaluates base and target.
        path: Frozen betas, kernel and tuning.
        state: Exact posterior samples, one per chain of the populations, ``[K, *batch]``: as many
            as will run, so that one compiled density serves both.
        resampling: Of the populations.
        seed: Seed of the noise.
        stream: Name of the stream of noise.
        progress: Called with the number of steps done since the last call.

    Returns:
        The paths of the first R samples, one per population, at the points of ``resampling``.
    """
    stops = resampling.reverse_points(path.num_steps)
    passed: list[tuple[State, Tensor]] = []

    def record(now: Progress) -> None:
        if now.num_steps in stops:
            passed.append((now.carry.state, now.carry.log_weights))

    carry, _ = run_chains(
        density,
        path,
        state,
        direction="reverse",
        seed=seed,
        stream=stream,
        stops=stops,
        progress=progress,
        record=record,
    )
    paths = Reference.from_reverse(state, carry.log_weights, passed, resampling.points, path.betas)
    return paths.first(len(carry.log_weights) // resampling.population_size)


def _chunks(num_steps: int, stops: Iterable[int] = ()) -> Iterator[range]:
    """Cuts the steps at every hundredth, and at ``stops``."""
    ends = {*range(CHUNK_SIZE, num_steps, CHUNK_SIZE), *stops, num_steps}
    for start, stop in itertools.pairwise(sorted({0, *ends})):
        yield range(start, stop)


def _empty_statistics(num_steps: int, device: torch.device) -> StepStatistics:
    def empty(length: int) -> Tensor:
        return torch.zeros(length, dtype=torch.float64, device=device)

    moves = num_steps - 1
    return StepStatistics(empty(num_steps), empty(num_steps), empty(moves), empty(moves))


def _run_chunk(
    density: Density,
    path: Path,
    carry: Carry,
    statistics: StepStatistics,
    steps: range,
    direction: Direction,
    generator: torch.Generator,
) -> Carry:
    """Runs the visits ``steps`` (0 is the first): one increment each, and a move between visits."""
    table = _step_table(path, steps, direction, carry.state)
    if steps.start == 0:  # no move leads to the first visit
        carry, seen_first = _weigh(carry, carry.state, table.width[0], table.quadrature[0])
        statistics.mean_log_ratio[0], statistics.var_log_ratio[0] = seen_first
        table = StepTable(*(column[1:] for column in table))
    kernel = path.kernel if direction == "forward" else path.kernel.reversal()
    if len(table.beta):
        carry, seen = _move(density, kernel, carry, table, generator)
        _write(statistics, slice(steps.stop - len(seen), steps.stop), seen)
    return carry


def _move(
    density: Density,
    kernel: Kernel,
    carry: Carry,
    table: StepTable,
    generator: torch.Generator,
) -> tuple[Carry, Tensor]:
    """Runs the steps of a table, as many at once as the density can."""
    blocks = noise_in_blocks(kernel, carry.state, len(table.beta), CHUNK_SIZE, generator)
    seen = []
    for steps, noise in blocks:
        part = StepTable(*(column[steps] for column in table))
        outcome = None
        if isinstance(density, ChunkRunner):
            outcome = density.run_chunk(kernel, carry, part, noise)
        if outcome is None:
            outcome = _step_by_step(density, kernel, carry, part, noise)
        carry = outcome[0]
        seen.append(outcome[1])
    return carry, torch.cat(seen)


def _step_by_step(
    density: Density, kernel: Kernel, carry: Carry, table: StepTable, noise: Sequence[Tensor]
) -> tuple[Carry, Tensor]:
    """Runs the steps of a table one after another."""
    seen = []
    each = zip(*(part.contiguous().unbind(0) for part in noise), strict=True)
    for own, (beta, step_size, scale, width, quadrature) in zip(
        each, zip(*table, strict=True), strict=True
    ):
        state, info = kernel.step(carry.state, density, beta, Tuning(step_size, scale), own)
        carry, ratio = _weigh(carry, state, width, quadrature)
        moves = (info.accept_prob.mean().double(), info.diverging.sum().double())
        seen.append(torch.stack([*ratio, *moves]))
    return carry, torch.stack(seen)


def _weigh(
    carry: Carry, state: State, width: Tensor, quadrature: Tensor
) -> tuple[Carry, tuple[Tensor, Tensor]]:
    """Takes the weight at ``state``; also returns mean and variance of its log ratio."""
    ratio = _log_ratio(state)
    statistics = (ratio.mean(), ratio.var(dim=0, correction=0).mean())
    weights = carry.log_weights + width * ratio
    return Carry(state, weights, carry.integral + quadrature * ratio), statistics


def _step_table(path: Path, visits: range, direction: Direction, state: State) -> StepTable:
    """Tabulates the moves that lead to ``visits`` and the increments there."""
    betas = path.betas if direction == "forward" else path.betas.flip(0)
    position = state.position
    rows = slice(visits.start, visits.stop)
    step_size, scale = path.tuning.at_all(betas[rows])
    widths, quadrature = betas.diff().abs(), _trapezoid_weights(path.betas, direction)
    return StepTable(
        beta=betas[rows].to(position),
        step_size=step_size,
        scale=scale,
        width=widths[rows].to(position.device),
        quadrature=quadrature[rows].to(position.device),
    )


def _write(statistics: StepStatistics, visits: slice, seen: Tensor) -> None:
    """Enters the statistics ``[n, 4]`` of the steps that lead to ``visits``."""
    moves = slice(visits.start - 1, visits.stop - 1)
    statistics.mean_log_ratio[visits], statistics.var_log_ratio[visits] = seen[:, 0], seen[:, 1]
    statistics.accept_prob[moves], statistics.num_diverging[moves] = seen[:, 2], seen[:, 3]


def final_move(
    density: Density, path: Path, state: State, *, seed: int, stream: str
) -> tuple[State, Tensor]:
    """Moves chains once at beta = 1, after the last weight was taken (AIWAE uses these states).

    Args:
        density: Evaluates base and target of K chains.
        path: Frozen kernel and tuning.
        state: Where a forward run ended.
        seed: Seed of the run.
        stream: Name of its stream of noise.

    Returns:
        The states, and the mean acceptance probability, a scalar.
    """
    generator = seeded_generator(state.position.device, seed, stream, "final")
    one = torch.ones(1, dtype=torch.float64, device="cpu")
    none = torch.zeros(1, dtype=torch.float64, device=state.position.device)
    table = StepTable(one.to(state.position), *path.tuning.at_all(one), none, none)
    weights = torch.zeros_like(state.log_target, dtype=torch.float64)
    carry = Carry(state, weights, weights)
    carry, seen = _move(density, path.kernel, carry, table, generator)
    return carry.state, seen[0, 2]
