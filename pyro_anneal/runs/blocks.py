"""Chains in fixed blocks: each has random streams of its own, and one process runs it.

Blocks depend on the number of chains and their size alone, so results do not depend on how many
processes share them, in which order, or how often a process was restarted.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..chains.loop import Progress, run_chains
from ..chains.path import Carry, Direction, Path, StepStatistics
from ..chains.resampling import Lineage, Reference, Resampling
from ..graphs.recorded import RecordedDensity
from ..kernels import State
from ..persistence.files import to_host
from ..persistence.journal import Journal
from ..persistence.randomness import derived_seed, own_randomness, random_state, set_random_state

__all__ = ["DEFAULT_SIZE", "Ends", "anneal_blocks", "split"]

DEFAULT_SIZE = 4096

Record = dict[str, Any]  # tensors and plain values


class Ends(NamedTuple):
    """Where all chains of a run ended."""

    log_weights: Tensor  # [K, *batch], float64
    integral: Tensor  # [K, *batch], float64
    position: Tensor  # at the last weight, [K, *batch, D]
    statistics: StepStatistics
    num_evaluations: int
    seconds: float  # of the slowest process
    lineage: Lineage | None = None  # where chains were resampled
    paths: tuple[Reference, ...] = ()  # of reverse chains, for each block's populations to hold


def split(num_chains: int, size: int | None) -> list[range]:
    """Splits chains into blocks of ``size``, the last one shorter where K is no multiple.

    Example:
        >>> split(5, 2)
        [range(0, 2), range(2, 4), range(4, 5)]
    """
    size = DEFAULT_SIZE if size is None else size
    return [range(k, min(k + size, num_chains)) for k in range(0, num_chains, size)]


def anneal_blocks(
    density: RecordedDensity,
    path: Path,
    blocks: Sequence[range],
    start: Callable[[range], State],
    *,
    direction: Direction,
    stream: str,
    seed: int,
    journal: Journal,
    name: str,
    resampling: Resampling | None = None,
    paths: Sequence[Reference] = (),
    check: Callable[[Tensor], object] = lambda positions: None,
    progress: Callable[[int], object] = lambda count: None,
) -> Ends:
    """Runs this process's blocks of chains, and gathers all.

    Args:
        density: Evaluates base and target, and counts its evaluations.
        path: Frozen betas, kernel and tuning.
        blocks: The chains of each block.
        start: Makes the first state of a block's chains.
        direction: ``"forward"`` or ``"reverse"``.
        stream: Name of the stream of noise.
        seed: Seed of the noise.
        journal: Where progress is kept, and whose processes share the blocks.
        name: Name of this run of chains in the journal.
        resampling: Of forward chains; of reverse chains the first of each population leaves its path.
        paths: For each block the reversed paths that its populations hold; none for a plain run.
        check: Called with the first and last position of each block, ``[2, *batch, D]``.
        progress: Called with the number of steps done since the last call.

    Returns:
        The ends of all chains, on every process.
    """
    example = density.example
    outcome = journal.get(name)
    if outcome is None:
        world = journal.world
        if world.rank == 0 and len(blocks) < world.size:
            _warn_of_idle(world.size, blocks)

        def run(number: int) -> Record:
            block = _Block(
                density,
                path,
                direction,
                seed,
                _stream_of(stream, number),
                resampling,
                paths[number] if paths else None,
            )
            found = journal.block(name, number)
            record = block.begin(blocks[number], start, number) if found is None else found
            return block.finish(
                record,
                lambda record, steps: journal.record(name, number, record, steps=steps),
                check,
                progress,
            )

        own = {number: run(number) for number in range(world.rank, len(blocks), world.size)}
        mine = own if world.size == 1 else to_host(own)
        outcome = _merge(world.gather(mine, f"the {stream} chains"))
        journal.put(name, outcome)
    set_random_state(outcome["random_state"])
    lineage, passed = outcome["lineage"], outcome["passed"]
    if lineage is not None:
        lineage = Lineage(*(value.to(example.device) for value in lineage))
    return Ends(
        outcome["log_weights"].to(example.device),
        outcome["integral"].to(example.device),
        outcome["position"].to(example.device),
        StepStatistics(*(value.to(example.device) for value in outcome["statistics"])),
        outcome["num_evaluations"],
        outcome["seconds"],
        lineage,
        ()
        if resampling is None
        else tuple(_paths(block, path, resampling, example.device) for block in passed),
    )


def _warn_of_idle(size: int, blocks: Sequence[range]) -> None:
    total = blocks[-1].stop
    warnings.warn(
        f"{total} chains are {len(blocks)} block(s), so {size - len(blocks)} of "
        f"{size} processes have nothing to do: set chain_batch_size to at most "
        f"{-(-total // size)}",
        stacklevel=3,
    )


class _Block:
    """Runs one block of chains from wherever it stands to its end."""

    def __init__(
        self,
        density: RecordedDensity,
        path: Path,
        direction: Direction,
        seed: int,
        stream: str,
        resampling: Resampling | None,
        reference: Reference | None,
    ) -> None:
        self.density = density
        self.path = path
        self.direction = direction
        self.seed = seed
        self.stream = stream
        self.is_passing = direction == "reverse" and resampling is not None
        self.stops: tuple[int, ...] = ()
        if resampling is not None and self.is_passing:
            self.stops = resampling.reverse_points(path.num_steps)
        self.every = 1 if resampling is None else resampling.population_size
        self.resampling = None if self.is_passing else resampling
        self.reference = reference

    def _passing(self, carry: Carry) -> list[Tensor]:
        """Takes state and log-weight of one chain per population."""
        count = len(carry.log_weights) // self.every
        return [value[:count].clone() for value in (*carry.state, carry.log_weights)]

    def begin(self, chains: range, start: Callable[[range], State], number: int) -> Record:
        """Makes the record of a block before its first step."""
        began, before = time.perf_counter(), self.density.num_evaluations
        if number == 0:
            state = start(chains)
        else:
            with own_randomness(derived_seed(self.seed, self.stream, "start")):
                state = start(chains)
        first = state.position[:1].clone()
        cost = {
            "num_evaluations": self.density.num_evaluations - before,
            "seconds": time.perf_counter() - began,
        }
        size = None if self.resampling is None else self.resampling.population_size
        beginning = Progress.beginning(state, self.path.num_steps, size)
        own = {
            "first": first,
            "random_state": random_state(),
            "finished": False,
            "passed": [self._passing(beginning.carry)] if self.is_passing else [],
        }
        return own | cost | _describe(beginning)

    def finish(
        self,
        record: Record,
        keep: Callable[[Record, int], object],
        check: Callable[[Tensor], object],
        progress: Callable[[int], object],
    ) -> Record:
        """Runs the rest of a block; ``keep`` is given its record after each chunk."""
        if record["finished"]:
            progress(self.path.num_steps)
            return record
        began, before, latest = time.perf_counter(), self.density.num_evaluations, record
        total = self.path.num_steps

        def on_chunk(now: Progress) -> None:
            nonlocal latest
            cost = {
                "num_evaluations": record["num_evaluations"]
                + self.density.num_evaluations
                - before,
                "seconds": record["seconds"] + time.perf_counter() - began,
            }
            steps = now.num_steps - latest["num_steps"]
            passed = latest["passed"]
            if now.num_steps in self.stops or (self.is_passing and now.num_steps == total):
                passed = [*passed, self._passing(now.carry)]
            latest = record | cost | _describe(now) | {"passed": passed}
            keep(latest, steps)

        progress(record["num_steps"])
        carry, _ = run_chains(
            self.density,
            self.path,
            _restore(record, self.density.example.device),
            direction=self.direction,
            seed=self.seed,
            stream=self.stream,
            stops=self.stops,
            resampling=self.resampling,
            reference=self.reference,
            progress=progress,
            record=on_chunk,
        )
        position = carry.state.position
        check(torch.cat([record["first"].to(position), position[:1]]).nan_to_num())
        latest = latest | {"finished": True, "state": {"position": position}}
        keep(latest, 0)
        return latest


def _describe(progress: Progress) -> Record:
    carry = progress.carry
    return {
        "num_chunks": progress.num_chunks,
        "num_steps": progress.num_steps,
        "state": carry.state._asdict(),
        "log_weights": carry.log_weights,
        "integral": carry.integral,
        "statistics": progress.statistics._asdict(),
        "lineage": None if progress.lineage is None else progress.lineage._asdict(),
    }


def _restore(record: Record, device: torch.device) -> Progress:
    def on_device(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(device) for name, value in named.items()}

    state = State(**on_device(record["state"]))
    carry = Carry(state, record["log_weights"].to(device), record["integral"].to(device))
    statistics = StepStatistics(**on_device(record["statistics"]))
    lineage = record["lineage"]
    if lineage is not None:
        lineage = Lineage(**on_device(lineage))
    return Progress(record["num_chunks"], record["num_steps"], carry, statistics, lineage)


def _paths(
    passed: Sequence[Sequence[Tensor]],
    path: Path,
    resampling: Resampling,
    device: torch.device,
) -> Reference:
    """Turns around what reverse chains passed: the posterior samples first, the whole last."""
    records = [[value.to(device) for value in record] for record in passed]
    states = [State(*record[:-1]) for record in records]
    weights = [record[-1] for record in records]
    points = len(resampling.points)
    between = list(zip(states[1 : points + 1], weights[1 : points + 1], strict=True))
    return Reference.from_reverse(states[0], weights[-1], between, resampling.points, path.betas)


def _merged_lineage(records: Sequence[Record]) -> list[Tensor] | None:
    """Joins the lineages of all blocks, whose chains are counted on."""
    if records[0]["lineage"] is None:
        return None
    ancestors, others, before = [], [], 0
    for record in records:
        own, *rest = Lineage(**record["lineage"])
        ancestors.append(own + before)
        others.append(rest)
        before += len(own)
    return [_joined(ancestors), *(_joined(parts) for parts in zip(*others, strict=True))]


def _stream_of(stream: str, number: int) -> str:
    """Names the noise of a block; that of the first is the noise of chains in one block."""
    return stream if number == 0 else f"{stream}, block {number}"


def _merge(gathered: Sequence[dict[int, Record]]) -> Record:
    """Merges the records of all blocks, in their order, as each process gives its own."""
    everything = {number: r for records in gathered for number, r in records.items()}
    records = [everything[number] for number in range(len(everything))]
    statistics = merge_statistics(
        [StepStatistics(**record["statistics"]) for record in records],
        [len(record["log_weights"]) for record in records],
    )
    return {
        "log_weights": _joined([record["log_weights"] for record in records]),
        "integral": _joined([record["integral"] for record in records]),
        "position": _joined([record["state"]["position"] for record in records]),
        "statistics": list(statistics),
        "num_evaluations": sum(record["num_evaluations"] for record in records),
        "seconds": max(sum(r["seconds"] for r in own.values()) for own in gathered),
        "random_state": records[0]["random_state"],
        "lineage": _merged_lineage(records),
        "passed": [record["passed"] for record in records if record["passed"]],
    }


def _joined(values: Sequence[Tensor]) -> Tensor:
    if len(values) == 1:
        return values[0]
    return torch.cat([value.to(values[0].device) for value in values])


def merge_statistics(parts: Sequence[StepStatistics], counts: Sequence[int]) -> StepStatistics:
    """Merges the averages of several blocks of chains.

    The variance over chains is pooled within blocks, where each block's own mean is subtracted:
    the same quantity in expectation as over all chains at once. NaN if every block has one chain.

    Args:
        parts: Averages of each block.
        counts: Chains of each block.

    Returns:
        Averages over all chains.
    """
    if len(parts) == 1:
        return parts[0]
    total = sum(counts)
    device = parts[0].mean_log_ratio.device
    shares = torch.tensor(counts, dtype=torch.float64, device=device) / total

    def mean(values: Sequence[Tensor]) -> Tensor:
        return (torch.stack([value.to(device) for value in values]) * shares.unsqueeze(1)).sum(0)

    freedom = total - len(parts)
    unbiased = (total - 1) / freedom if freedom else math.nan
    return StepStatistics(
        mean([part.mean_log_ratio for part in parts]),
        mean([part.var_log_ratio for part in parts]) * unbiased,
        mean([part.accept_prob for part in parts]),
        torch.stack([part.num_diverging.to(device) for part in parts]).sum(0),
    )
