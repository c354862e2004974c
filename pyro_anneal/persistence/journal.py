"""What a call of AnnealedImportance has found so far, kept through kills, restarts and processes.

A call is a sequence of named stages (a fit, a pilot, chains). The outcome of each is computed once,
by rank 0 or by all ranks together, given to all, and written to the checkpoint; a restarted call
finds it there and goes on. Chains also leave their state after each chunk. Since a stage may draw
from torch's global generators, its outcome includes their states, so that what follows draws the
same numbers whether the stage was computed or found.

Each rank writes a file of its own: rank 0 the one that the user named, others one beside it that
lasts as long as the call. A restart merges them, and may have another number of ranks.
"""

from __future__ import annotations

import contextlib
import glob
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from . import files as checkpoint
from .processes import World, alone, connect
from .randomness import draw_seed, own_randomness, random_state, set_random_state

__all__ = ["Journal", "differences", "keep_journal"]

Outcome = dict[str, Any]  # tensors and plain values
Identity = Mapping[str, str]  # what a stage depends on, by name

# Seconds between writes where the user names no number of steps; and the work worth a write.
_WRITE_AFTER = 30.0
_WORTH_WRITING = 1.0


class Journal:
    """The stages of one call.

    Args:
        task: Name of the call, such as ``"run"``; each has a place of its own in the file.
        identity: What the call depends on.
        path: The checkpoint, or None.
        every: Steps of chains after which to write; None for every 30 seconds.
        seed: The user's seed; None for the one of the checkpoint, or a new one.
        world: The processes that share the call.

    Raises:
        ValueError: If the checkpoint is broken, or of another call; lists what differs.
    """

    def __init__(
        self,
        task: str,
        identity: Identity,
        *,
        path: Path | None,
        every: int | None,
        seed: int | None,
        world: World,
    ) -> None:
        self.world = world
        self.seconds: dict[str, float] = {}  # of the call's stages, in this process
        self._task = task
        self._path = path
        self._every = every
        self._others: dict[str, Any] = {}  # other calls' places in the file
        self._merged: list[Path] = []  # files of other ranks, here or of an earlier start
        self._unwritten = False
        self._unwritten_steps = 0
        self._last_write = time.monotonic()
        self._rank, self._size = world.rank, world.size
        drawn = draw_seed() if seed is None else seed  # by every rank, restarted or not
        self._check_ranks("call", {**identity, "seed": repr(seed)})
        slot = world.from_first(lambda: self._open(identity, seed, drawn), "the checkpoint")
        self.seed: int = slot["seed"]
        self._clock: int = slot["clock"]  # common events of all ranks so far
        self._identities: dict[str, dict[str, str]] = slot["identities"]
        self._outcomes: dict[str, Any] = slot["outcomes"]
        self._blocks: dict[str, dict[int, Outcome]] = slot["blocks"]

    @property
    def is_kept(self) -> bool:
        """Whether anything has to be kept: there is a checkpoint, or another process."""
        return self._path is not None or self.world.size > 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks for all, to the user and to the file."""
        return self._rank == 0

    # --- stages ---------------------------------------------------------------------------------

    def once(self, name: str, compute: Callable[[], Outcome]) -> Outcome:
        """Computes a stage on rank 0, or returns what it gave before.

        Args:
            name: Name of the stage.
            compute: Returns tensors and plain values.

        Returns:
            The outcome; its tensors lie on the host if it was kept.
        """
        if not self.is_kept:
            return compute()

        def kept() -> Outcome:
            outcome = checkpoint.to_host(compute())
            return {"value": outcome, "random_state": random_state()}

        if name not in self._outcomes:
            self.put(name, self.world.from_first(kept, name))
        outcome = self._outcomes[name]
        set_random_state(outcome["random_state"])
        value: Outcome = outcome["value"]
        return value

    def put(self, name: str, outcome: Outcome | Callable[[], Outcome]) -> None:
        """Keeps an outcome that all ranks share, or a function that describes it at any time."""
        if not self.is_kept:
            return
        self._outcomes[name] = outcome
        self._blocks.pop(name, None)
        if self.world.size == self._size:
            self._clock += 1
        self._unwritten = True
        if time.monotonic() - self._last_write > _WORTH_WRITING:
            self.write()

    def get(self, name: str) -> Outcome | None:
        """Finds what :meth:`put` kept."""
        return self._outcomes.get(name)

    def forget(self, prefix: str, *, keep: Collection[str] = ()) -> None:
        """Drops stages that a later outcome has made superfluous; to be followed by a put."""
        stages: tuple[dict[str, Any], ...] = (self._outcomes, self._blocks, self._identities)
        for kept in stages:
            for name in [name for name in kept if name.startswith(prefix) and name not in keep]:
                del kept[name]

    # --- chains ---------------------------------------------------------------------------------

    def block(self, name: str, block: int) -> Outcome | None:
        """Finds where a block of chains stood."""
        return self._blocks.get(name, {}).get(block)

    def record(self, name: str, block: int, state: Outcome, *, steps: int) -> None:
        """Keeps where a block of chains stands after ``steps`` more steps."""
        if not self.is_kept:
            return
        self._blocks.setdefault(name, {})[block] = state
        self._unwritten = True
        self._unwritten_steps += steps
        if self._every is None:
            due = time.monotonic() - self._last_write >= _WRITE_AFTER
        else:
            due = self._unwritten_steps >= self._every
        if due:
            self.write()

    @contextlib.contextmanager
    def on_this_rank(self) -> Iterator[None]:
        """Keeps stages inside for this rank alone: other ranks have stages of other names."""
        shared, self.world = self.world, alone()
        try:
            yield
        finally:
            self.world = shared

    # --- identity -------------------------------------------------------------------------------

    def identify(self, name: str, identity: Identity) -> None:
        """Checks that something is what it was when the checkpoint was written, on every rank.

        Raises:
            ValueError: If it is not; lists what differs.
        """
        if not self.is_kept:
            return
        self._check_ranks(name, identity)
        stored = self._identities.setdefault(name, dict(identity))
        self._compare(stored, identity, self._path)

    def _check_ranks(self, name: str, identity: Identity) -> None:
        for rank, other in enumerate(self.world.gather(dict(identity), name)):
            found = differences(other, identity)
            if found:
                raise ValueError(
                    f"ranks {rank} and {self.world.rank} do not see the same {name}: "
                    f"{'; '.join(found)}. Every rank must build the same model and data"
                )

    @staticmethod
    def _compare(stored: Identity, identity: Identity, path: Path | None) -> None:
        found = differences(stored, identity)
        if found:
            raise ValueError(
                f"the checkpoint {path} belongs to another run: {'; '.join(found)}. Name another "
                "file, or delete this one to start anew"
            )

    # --- files ----------------------------------------------------------------------------------

    def _open(self, identity: Identity, seed: int | None, drawn: int) -> dict[str, Any]:
        """Reads and merges the files of all ranks; rank 0 only."""
        slots = []
        if self._path is not None:
            if self._path.exists():
                self._others = checkpoint.load(self._path)["tasks"]
                slots = [self._others.pop(self._task)] if self._task in self._others else []
            pattern = f"{glob.escape(str(self._path))}.{self._task}.rank*"
            self._merged = [Path(p) for p in sorted(glob.glob(pattern)) if not p.endswith("tmp")]
            slots += [checkpoint.load(path)["tasks"][self._task] for path in self._merged]
        for slot in slots:
            given = {} if seed is None else {"seed": repr(seed)}
            there = {} if seed is None else {"seed": repr(slot["seed"])}
            stored = slot["identities"]["call"]
            self._compare({**stored, **there}, {**identity, **given}, self._path)
        if slots:
            return _merge(slots)
        return {
            "seed": drawn,
            "clock": 0,
            "identities": {"call": dict(identity)},
            "outcomes": {},
            "blocks": {},
        }

    def write(self) -> None:
        """Writes this rank's file now."""
        self._unwritten, self._unwritten_steps = False, 0
        if self._path is None:
            return
        outcomes = {
            n: value() if callable(value) else value for n, value in self._outcomes.items()
        }
        slot = {
            "seed": self.seed,
            "clock": self._clock,
            "identities": self._identities,
            "outcomes": outcomes,
            "blocks": self._blocks,
        }
        checkpoint.save(self._own_file(), {"tasks": {**self._others, self._task: slot}})
        self._last_write = time.monotonic()

    def finish(self) -> None:
        """Writes what all ranks share to the user's file; the other ranks' files go."""
        if self._rank == 0 and self._unwritten:
            self.write()
        self.world.gather(None, "the end of the call")
        if self._path is not None:
            for path in self._merged if self._rank == 0 else [self._own_file()]:
                path.unlink(missing_ok=True)

    def save_progress(self) -> None:
        """Writes what is not yet written, before an error or an interrupt is passed on."""
        if self._unwritten:
            self.write()

    def _own_file(self) -> Path:
        if self._path is None:
            raise RuntimeError("this journal is kept in no file")
        if self._rank == 0:
            return self._path
        return Path(f"{self._path}.{self._task}.rank{self._rank}")


def _merge(slots: list[dict[str, Any]]) -> dict[str, Any]:
    """Merges what the ranks wrote: all that belongs to their latest common event."""
    latest = max(slot["clock"] for slot in slots)
    newest = [slot for slot in slots if slot["clock"] == latest]
    merged = {**newest[0], "identities": {}, "outcomes": {}, "blocks": {}}
    for slot in newest:
        merged["identities"].update(slot["identities"])
        merged["outcomes"].update(slot["outcomes"])
        for name, blocks in slot["blocks"].items():
            known = merged["blocks"].setdefault(name, {})
            for block, state in blocks.items():
                if block not in known or state["num_chunks"] > known[block]["num_chunks"]:
                    known[block] = state
    return merged


@contextlib.contextmanager
def keep_journal(
    task: str,
    describe: Callable[[], Identity],
    *,
    path: Path | None,
    every: int | None,
    seed: int | None,
) -> Iterator[Journal]:
    """Opens the journal of a call, seeds torch inside, and leaves a checkpoint whatever happens.

    Args:
        task: Name of the call.
        describe: Describes what the call depends on; called where anything is kept or shared.
        path: The checkpoint, or None.
        every: Steps of chains between writes, or None.
        seed: The user's seed, or None.
    """
    with connect() as world:
        identity = describe() if path is not None or world.size > 1 else {}
        journal = Journal(task, identity, path=path, every=every, seed=seed, world=world)
        with own_randomness(journal.seed):
            try:
                yield journal
            except BaseException:
                journal.save_progress()
                raise
            journal.finish()


def differences(stored: Identity, current: Identity) -> list[str]:
    """Lists what two identities do not share.

    Example:
        >>> differences({"K": "16", "T": "9"}, {"K": "8", "T": "9"})
        ['K: 16 there, 8 now']
    """
    names = dict.fromkeys([*stored, *current])
    return [
        f"{name}: {stored.get(name, 'absent')} there, {current.get(name, 'absent')} now"
        for name in names
        if stored.get(name) != current.get(name)
    ]
