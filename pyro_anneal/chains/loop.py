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

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..compiled.program import LoopedDensity
from ..compiled.storage import StepTable
from ..kernels import Density, Kernel, State, Tuning
from ..persistence.randomness import seeded_generator
from .resampling import Lineage, Reference, Resampling

__all__ = [
    "CHUNK_SIZE",
    "Carry",
    "Direction",
    "Path",
    "Progress",
    "StepStatistics",
    "TuningTable",
    "final_move",
    "reversed_paths",
    "run_chains",
    "seeded_generator",
]

CHUNK_SIZE = 100
Direction = Literal["forward", "reverse"]


@dataclass(frozen=True, eq=False)
class TuningTable:
    """Step sizes and scales at the pilot's betas, interpolated between them, and frozen."""

    betas: tuple[float, ...]  # S knots, increasing
    log_step_size: Tensor  # [S, *batch]; of a kernel of M parts, [S, *batch, M]
    log_scale: Tensor  # [S, *batch, D]

    def at(self, beta: float) -> Tuning:
        """Interpolates the tuning at ``beta``; constant beyond the outer knots."""
        knots = self.betas
        if beta <= knots[0] or len(knots) == 1:
            return Tuning(self.log_step_size[0].exp(), self.log_scale[0].exp())
        if beta >= knots[-1]:
            return Tuning(self.log_step_size[-1].exp(), self.log_scale[-1].exp())
        upper = bisect.bisect_right(knots, beta)
        fraction = (beta - knots[upper - 1]) / (knots[upper] - knots[upper - 1])
        log_step = torch.lerp(self.log_step_size[upper - 1], self.log_step_size[upper], fraction)
        log_scale = torch.lerp(self.log_scale[upper - 1], self.log_scale[upper], fraction)
        return Tuning(log_step.exp(), log_scale.exp())

    def at_all(self, betas: Tensor) -> Tuning:
        """Interpolates the tuning at several betas ``[n]``, all at once.

        Returns:
            Step sizes ``[n, *batch]`` and scales ``[n, *batch, D]``.
        """
        last = len(self.betas) - 1
        knots = torch.tensor(self.betas, dtype=torch.float64)
        betas = betas.double().cpu()
        upper = torch.searchsorted(knots, betas, right=True).clamp(min(1, last), last)
        lower = (upper - 1).clamp(min=0)
        width = (knots[upper] - knots[lower]).clamp(min=torch.finfo(torch.float64).tiny)
        fraction = ((betas - knots[lower]) / width).clamp(0.0, 1.0)

        def interpolate(table: Tensor) -> Tensor:
            weight = fraction.to(table).reshape(-1, *(1 for _ in table.shape[1:]))
            below, above = table[lower.to(table.device)], table[upper.to(table.device)]
            return torch.lerp(below, above, weight).exp()

        return Tuning(interpolate(self.log_step_size), interpolate(self.log_scale))

    @staticmethod
    def constant(
        step_size: float | Tensor, example: Tensor, kernel: Kernel | None = None
    ) -> TuningTable:
        """Builds the table of one step size for all betas and unit scales.

        Args:
            step_size: Number, or tensor of shape ``[*batch]``.
            example: Position of one chain, ``[*batch, D]``.
            kernel: A kernel of several parts gives each of them this step size.
        """
        step = torch.as_tensor(step_size, dtype=example.dtype, device=example.device)
        batch = example.shape[:-1]
        if step.shape not in (torch.Size(), batch):
            raise ValueError(
                f"step_size has shape {list(step.shape)}, expected a number or the batch's shape "
                f"{list(batch)}"
            )
        log_step = step.log().expand(batch)
        parts = getattr(kernel, "num_step_sizes", None)
        if parts is not None:
            log_step = log_step.unsqueeze(-1).expand(*batch, parts)
        return TuningTable((0.0,), log_step.unsqueeze(0), torch.zeros_like(example).unsqueeze(0))


@dataclass(frozen=True, eq=False)
class Path:
    """Everything frozen before the chains start."""

    betas: Tensor  # [T + 1], float64, on the host
    kernel: Kernel
    tuning: TuningTable

    @property
    def num_steps(self) -> int:
        """Number T of weight increments."""
        return len(self.betas) - 1


class Carry(NamedTuple):
    """What the loop carries from step to step."""

    state: State
    log_weights: Tensor  # [K, *batch], float64
    integral: Tensor  # thermodynamic integration by trapezoids, [K, *batch], float64


class StepStatistics(NamedTuple):
    """Averages over chains and batch, one entry per step: memory does not grow with K or batch."""

    mean_log_ratio: Tensor  # [T]
    var_log_ratio: Tensor  # over chains, averaged over the batch, [T]
    accept_prob: Tensor  # [T - 1]
    num_diverging: Tensor  # [T - 1], over chains and batch


class Progress(NamedTuple):
    """Where chains stand between two chunks: all that the rest of a run depends on."""

    num_chunks: int  # done
    num_steps: int  # done
    carry: Carry
    statistics: StepStatistics  # of the steps done; later entries mean nothing yet
    lineage: Lineage | None = None  # where chains are resampled

    @staticmethod
    def beginning(state: State, num_steps: int, num_populations: int | None = None) -> Progress:
        """Places chains at ``state`` before the first of ``num_steps`` steps."""
        weights = torch.zeros_like(state.log_target, dtype=torch.float64)
        statistics = _empty_statistics(num_steps, state.position.device)
        lineage = None
        if num_populations is not None:
            lineage = Lineage.beginning(weights, num_populations)
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
        populations = None if resampling is None else resampling.num_populations
        start = Progress.beginning(start, path.num_steps, populations)
    done, _, carry, statistics, lineage = start
    device = carry.state.position.device
    points = () if resampling is None else resampling.points
    for chunk, steps in enumerate(_chunks(path.num_steps, {*stops, *points})):
        if chunk < done:
            continue
        generator = seeded_generator(device, seed, stream, chunk)
        carry = _run_chunk(density, path, carry, statistics, steps, direction, generator)
        if resampling is not None and steps.stop in (*points, path.num_steps):
            assert lineage is not None
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
        state: Exact posterior samples, one per population, or more; ``[R, *batch]``.
        resampling: Of the populations.
        seed: Seed of the noise.
        stream: Name of the stream of noise.
        progress: Called with the number of steps done since the last call.

    Returns:
        The paths of the first R samples, at the points of ``resampling``.
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
    return paths.first(resampling.num_populations)


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
    betas = path.betas if direction == "forward" else path.betas.flip(0)
    quadrature = _trapezoid_weights(path.betas, direction)
    kernel = path.kernel if direction == "forward" else path.kernel.reversal()
    state, log_weights, integral = carry
    host_betas, host_quadrature = betas.tolist(), quadrature.tolist()
    for visit in steps:
        if visit > 0:  # the move that leads to this visit
            if isinstance(density, LoopedDensity):
                rest = slice(visit, steps.stop)
                table = _step_table(
                    path.tuning, betas[visit : steps.stop + 1], quadrature[rest], state
                )
                outcome = density.run(
                    kernel, state, log_weights, integral, table, generator, rows=CHUNK_SIZE
                )
                if outcome is not None:
                    _write(statistics, rest, outcome.statistics)
                    return Carry(*outcome[:3])
            beta = host_betas[visit]
            noise = kernel.noise(state, generator)
            on_device = torch.full((), beta, dtype=state.position.dtype, device=noise[0].device)
            state, info = kernel.step(state, density, on_device, path.tuning.at(beta), noise)
            statistics.accept_prob[visit - 1] = info.accept_prob.mean()
            statistics.num_diverging[visit - 1] = info.diverging.sum()
        ratio = _log_ratio(state)
        log_weights = log_weights + abs(host_betas[visit + 1] - host_betas[visit]) * ratio
        integral = integral + host_quadrature[visit] * ratio
        statistics.mean_log_ratio[visit] = ratio.mean()
        statistics.var_log_ratio[visit] = ratio.var(dim=0, correction=0).mean()
    return Carry(state, log_weights, integral)


def _step_table(tuning: TuningTable, betas: Tensor, quadrature: Tensor, state: State) -> StepTable:
    """Tabulates the moves at all but the last of ``betas`` and the increments after them."""
    position = state.position
    step_size, scale = tuning.at_all(betas[:-1])
    return StepTable(
        beta=betas[:-1].to(position),
        step_size=step_size,
        scale=scale,
        width=betas.diff().abs().to(position.device),
        quadrature=quadrature.to(position.device),
    )


def _write(statistics: StepStatistics, visits: slice, seen: Tensor) -> None:
    """Enters the statistics of a compiled chunk, ``[n, 4]``."""
    moves = slice(visits.start - 1, visits.stop - 1)
    statistics.mean_log_ratio[visits], statistics.var_log_ratio[visits] = seen[:, 0], seen[:, 1]
    statistics.accept_prob[moves], statistics.num_diverging[moves] = seen[:, 2], seen[:, 3]


def final_move(density: Density, path: Path, state: State, *, seed: int, stream: str) -> State:
    """Moves chains once at beta = 1, after the last weight was taken (AIWAE uses these states)."""
    generator = seeded_generator(state.position.device, seed, stream, "final")
    one = torch.ones((), dtype=state.position.dtype, device=state.position.device)
    noise = path.kernel.noise(state, generator)
    return path.kernel.step(state, density, one, path.tuning.at(1.0), noise)[0]
