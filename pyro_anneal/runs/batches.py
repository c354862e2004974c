"""Evidence of a data set that comes in batches: a few numbers per datum are all that is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import bounds
from ..chains.budget import MOST_BLOCKS, choose_blocks
from ..diagnostics import checks as diagnostics
from ..models.simulation import Arguments
from ..persistence.fingerprints import describe_arguments
from ..persistence.journal import Journal
from ..persistence.memory import released
from ..persistence.randomness import derived_seed, random_state, set_random_state
from ..problems.cache import Kept, KeptProblems
from ..results.batches import EvidenceOfBatches
from ..results.digest import add_digests
from ..results.findings import Diagnostic
from ..results.run import AnnealedRun
from .freezing import freeze, make_problem
from .progress import progress_bar
from .rounds import Done, in_rounds, run_forward
from .run import forward
from .settings import Frozen, Settings

__all__ = ["as_arguments", "run_batches"]

_PER_DATUM = ("lower", "single", "std_error", "ess")
_SHARED = ("num_chains", "num_steps", "num_gradients", "scale")
_JOINT_NOTE = (
    "the model has no batch plates, so each batch has one evidence: their sum is that of all data "
    "only if no latent is shared between batches"
)


def as_arguments(batch: Any) -> Arguments:
    """Turns what a DataLoader yields into arguments: a tensor, a tuple, list or mapping of them.

    Example:
        >>> as_arguments([1.0, 2.0])
        ((1.0, 2.0), {})
        >>> as_arguments({"x": 1.0})
        ((), {'x': 1.0})
    """
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, list | tuple):
        return tuple(batch), {}
    return (batch,), {}


def run_batches(
    settings: Settings,
    batches: Iterable[Any],
    journal: Journal,
    to_arguments: Callable[[Any], Arguments],
    on_batch: Callable[[int, AnnealedRun], object] | None,
) -> EvidenceOfBatches:
    """Runs forward chains on one batch after another; ranks take turns.

    Args:
        settings: Settings.
        batches: The same on every rank and after every restart.
        journal: Where progress is kept.
        to_arguments: Turns a batch into arguments of model and guide.
        on_batch: Called with the index and the run of each batch that this process ran.

    Raises:
        ValueError: If there is no batch, or batches are not those of the checkpoint or of the
            other ranks.
    """
    stored = journal.get("batches")
    total = _Batches() if stored is None else _Batches.from_dict(stored)
    count = total.count
    length = len(batches) if isinstance(batches, Sized) else math.inf
    total.length = len(batches) if isinstance(batches, Sized) else 1
    turns: dict[int, Arguments] = {}
    index = -1
    with progress_bar("batches", length) as bar:
        for index, arguments in enumerate(_reproducibly(batches, to_arguments)):
            digest = _digest(arguments, strict=journal.is_kept)
            if index < count:
                _check_finished(settings, arguments, journal, index, total.digests[index], digest)
                bar.update(1)
                continue
            total.digests.append(digest)
            turns[index] = arguments
            if len(turns) == journal.world.size:
                _take_turns(settings, turns, total, journal, on_batch)
                bar.update(len(turns))
                turns = {}
        if turns:
            _take_turns(settings, turns, total, journal, on_batch)
    if total.count == 0:
        raise ValueError("run_batches got no batch: the iterable is empty or used up")
    if len(total.digests) != total.count or index + 1 < count:
        raise ValueError(
            f"the checkpoint holds {count} batches, but there are {index + 1} now: pass the same "
            "batches, or name another file"
        )
    return total.result(journal.seed)


def _reproducibly(
    batches: Iterable[Any], to_arguments: Callable[[Any], Arguments]
) -> Iterator[Arguments]:
    """Iterates over batches with a random stream of their own, which runs cannot disturb.

    So a loader that shuffles by torch's global generator gives the same batches at each restart.
    """
    iterator, theirs = iter(batches), random_state()
    while True:
        ours = random_state()
        set_random_state(theirs)
        try:
            batch = next(iterator)
        except StopIteration:
            return
        finally:
            theirs = random_state()
            set_random_state(ours)
        yield to_arguments(batch)


def _digest(arguments: Arguments, *, strict: bool) -> str:
    described = repr(sorted(describe_arguments(arguments, strict=strict).items()))
    return f"{derived_seed(described):016x}"


def _check_finished(
    settings: Settings,
    arguments: Arguments,
    journal: Journal,
    index: int,
    stored: str,
    digest: str,
) -> None:
    """Checks that a batch in the checkpoint is this one; and for the first, the model too."""
    if digest != stored:
        raise ValueError(
            f"batch {index} is not the one of the checkpoint: pass the same data in the same "
            "order (a DataLoader without shuffle, or shuffled by torch's own generator)"
        )
    if index == 0:
        seed = journal.seed
        torch.manual_seed(seed)
        make_problem(settings, settings.model, arguments, arguments, journal, "0/", seed=seed)


def _take_turns(
    settings: Settings,
    turns: Mapping[int, Arguments],
    total: _Batches,
    journal: Journal,
    on_batch: Callable[[int, AnnealedRun], object] | None,
) -> None:
    """Runs one batch on each rank, and adds what all ranks found."""
    own, world = None, journal.world
    digests = [total.digests[index] for index in turns]
    for rank, theirs in enumerate(world.gather(digests, "the batches")):
        if theirs != digests:
            raise ValueError(
                f"ranks {rank} and {world.rank} see different batches: pass the same loader to "
                "every rank (no DistributedSampler); ranks take turns by themselves"
            )
    if settings.plan.target_gap is not None and total.num_steps is None:
        total.num_steps = _steps_reached(settings, turns, journal)
    if world.rank < len(turns):
        index = list(turns)[world.rank]
        with released(), journal.on_this_rank():
            run = _run_batch(settings, turns[index], journal, index, on_batch is not None, total)
        own = _reduce(run)
        if on_batch is not None:
            on_batch(index, run)
    gathered = world.gather(own, "the batches' evidence")
    for batch in gathered:
        if batch is not None:
            total.add(batch)
    for index in turns:
        journal.forget(f"{index}/", keep=("0/problem", "0/fit"))
    journal.put("batches", total.to_dict)


def _steps_reached(settings: Settings, turns: Mapping[int, Arguments], journal: Journal) -> int:
    """Runs the rounds of the first batch, whose number of steps all batches then take.

    The first batch runs again like the others: no decision hangs on the numbers that are reported.
    """

    def compute() -> dict[str, Any]:
        index, arguments = next(iter(turns.items()))
        seed, model, prefix = journal.seed + index, settings.model, f"{index}/"
        torch.manual_seed(seed)
        with released(), journal.on_this_rank():
            frozen = freeze(settings, model, arguments, arguments, journal, prefix, seed=seed)

            def anneal(frozen: Frozen, suffix: str) -> Done:
                stream = f"forward{suffix}"
                return run_forward(frozen, journal, prefix, stream=stream, keep_samples=False)

            frozen, _ = in_rounds(frozen, anneal, task="batches")
        return {"num_steps": frozen.path.num_steps}

    reached: int = journal.once("steps", compute)["num_steps"]
    return reached


def _run_batch(
    settings: Settings,
    arguments: Arguments,
    journal: Journal,
    index: int,
    keep_samples: bool,
    total: _Batches,
) -> AnnealedRun:
    seed, prefix, model = journal.seed + index, f"{index}/", settings.model
    torch.manual_seed(seed)
    frozen = freeze(
        settings,
        model,
        arguments,
        arguments,
        journal,
        prefix,
        seed=seed,
        num_steps=total.num_steps,
        problems=total.problems,
        num_runs=total.length,
    )
    run, _ = forward(frozen, journal, prefix, keep_samples=keep_samples)
    return replace(run, diagnostics=diagnostics.diagnose(run))


def _reduce(run: AnnealedRun) -> dict[str, Any]:
    """Keeps a few numbers per datum of a run."""
    kept: dict[str, Any] = {n: getattr(run, n).detach().cpu().flatten() for n in _PER_DATUM}
    kept |= {name: getattr(run, name) for name in (*_SHARED, "seconds")}
    kept["data_digest"] = run.data_digest
    kept["block_sums"] = _block_sums(run)
    kept["num_units"] = run.num_populations if run.population_size > 1 else 0
    kept["variance"] = math.nan if run.pilot is None else run.pilot.expected_variance
    notes = [] if run.plates else [_JOINT_NOTE]
    return kept | {
        "notes": [*run.notes, *notes],
        "diagnostics": [vars(found) for found in run.diagnostics],
    }


def _block_sums(run: AnnealedRun) -> dict[int, Tensor]:
    """Sums the bounds of R blocks of chains over the batch, for every R that may be chosen."""
    counts = (r for r in range(1, run.num_populations + 1) if run.num_populations % r == 0)
    return {
        count: run.scale
        * bounds.block_means(run.log_weights, count).reshape(count, -1).sum(1).detach().cpu()
        for count in counts
        if count <= MOST_BLOCKS
    }


def _severity(found: Mapping[str, Any]) -> tuple[bool, float]:
    return found["severity"] == "warning", found["value"]


class _Batches:
    """What finished batches gave."""

    def __init__(self) -> None:
        self.problems: KeptProblems[Kept] = KeptProblems()  # for batches to come
        self.length = 1  # of the call, as far as it is known
        self.num_steps: int | None = None  # that rounds have reached
        self.digests: list[str] = []
        self.sizes: list[int] = []
        self.per_datum: dict[str, list[Tensor]] = {name: [] for name in _PER_DATUM}
        self.shared: dict[str, Any] = {}  # of the first batch
        self.seconds = 0.0
        self.data_digest = ""
        self.diagnostics: dict[str, dict[str, Any]] = {}  # the worst of each kind
        self.block_sums: dict[int, Tensor] = {}  # by the number of blocks
        self.num_units = 0  # populations that every batch can be divided into, 0 if it has none
        self.variance = 0.0  # that pilots expect, summed over data

    @property
    def count(self) -> int:
        return len(self.sizes)

    def add(self, batch: dict[str, Any]) -> None:
        """Adds the next batch."""
        self.sizes.append(len(batch["lower"]))
        for name in _PER_DATUM:
            self.per_datum[name].append(batch[name])
        shared = {name: batch[name] for name in (*_SHARED, "notes")}
        if self.count == 1:
            self.shared = shared
        elif shared["scale"] != self.shared["scale"]:
            raise ValueError(
                f"poutine.scale is {self.shared['scale']} in the first batch and "
                f"{shared['scale']} in batch {self.count - 1}: their evidence cannot be added"
            )
        self.seconds += batch["seconds"]
        self.variance += len(batch["lower"]) * batch["variance"]
        self.num_units = math.gcd(self.num_units, batch["num_units"])
        sums = batch["block_sums"]
        if self.count > 1:
            sums = {r: self.block_sums[r] + own for r, own in sums.items() if r in self.block_sums}
        self.block_sums = sums
        self.data_digest = add_digests([self.data_digest, batch["data_digest"]])
        for found in batch["diagnostics"]:
            known = self.diagnostics.get(found["name"])
            worst = found | {"batch": self.count - 1}
            if known is not None and _severity(known) > _severity(found):
                worst = known
            count = 1 if known is None else known["count"] + 1
            self.diagnostics[found["name"]] = worst | {"count": count}

    def result(self, seed: int) -> EvidenceOfBatches:
        """Builds the result."""
        found = [
            Diagnostic(
                name=name,
                severity=kind["severity"],
                message=f"in {kind['count']} of {self.count} batches, as in batch "
                f"{kind['batch']}: {kind['message']}",
                value=kind["value"],
            )
            for name, kind in self.diagnostics.items()
        ]
        shared = self.shared | {"notes": tuple(self.shared["notes"])}
        fields: dict[str, Any] = {n: torch.cat(values) for n, values in self.per_datum.items()}
        # A choice by what pilots expected, as if before any chain ran: pilots do not see chains.
        num_data = sum(self.sizes)
        blocks = choose_blocks(
            shared["num_chains"],
            self.variance / num_data,
            num_units=self.num_units,
            num_data=num_data,
        )
        return EvidenceOfBatches(
            **fields,
            **shared,
            batch_sizes=tuple(self.sizes),
            seconds=self.seconds,
            seed=seed,
            block_totals=self.block_sums[blocks.num_blocks],
            num_kept=blocks.num_kept,
            data_digest=self.data_digest,
            diagnostics=tuple(found),
        )

    def to_dict(self) -> dict[str, Any]:
        """Describes the batches by tensors and plain values."""
        return {
            "digests": self.digests[: self.count],
            "sizes": self.sizes,
            "per_datum": {name: torch.cat(values) for name, values in self.per_datum.items()},
            "shared": self.shared,
            "seconds": self.seconds,
            "data_digest": self.data_digest,
            "block_sums": self.block_sums,
            "num_units": self.num_units,
            "variance": self.variance,
            "diagnostics": self.diagnostics,
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> _Batches:
        """Undoes :meth:`to_dict`."""
        total = cls()
        total.digests, total.sizes = list(content["digests"]), list(content["sizes"])
        total.per_datum = {name: [values] for name, values in content["per_datum"].items()}
        total.shared, total.seconds = content["shared"], content["seconds"]
        total.data_digest = content["data_digest"]
        total.block_sums = dict(content["block_sums"])
        total.num_units, total.variance = content["num_units"], content["variance"]
        total.diagnostics = dict(content["diagnostics"])
        return total
