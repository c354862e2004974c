"""Batches of an estimate that a file keeps, so that a killed call goes on where it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from ..persistence.fingerprints import describe, versions
from ..persistence.journal import Journal, keep_journal
from ..persistence.randomness import seeded_if

__all__ = ["OncePerBatch", "keep_batches"]

Statistics = dict[str, Tensor]
# Computes the statistics of the next batch, or returns what an earlier call computed for it. Asked
# for what the batch holds only where something is kept.
OncePerBatch = Callable[[Callable[[], Statistics], Callable[[], Statistics]], Statistics]


@contextlib.contextmanager
def keep_batches(
    path: Path | None, settings: Callable[[], Mapping[str, str]], seed: int | None
) -> Iterator[OncePerBatch]:
    """Seeds torch inside, and keeps the batches of an estimate where there is a checkpoint.

    After each batch the states of the global generators are those that computing it left, whether
    it was computed or found; so the pairs that follow are the same.

    Args:
        path: The checkpoint, or None.
        settings: Describes what batches depend on; called where anything is kept.
        seed: The user's seed, or None.

    Raises:
        ValueError: If the checkpoint is broken, or of another call; lists what differs.
    """
    if path is None:
        with seeded_if(seed):
            yield lambda content, compute: compute()
        return

    def identity() -> dict[str, str]:
        return {**settings(), **versions()}

    with keep_journal("estimate", identity, path=path, every=None, seed=seed) as journal:
        yield _Batches(journal)


class _Batches:
    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.count = 0

    def __call__(
        self, content: Callable[[], Statistics], compute: Callable[[], Statistics]
    ) -> Statistics:
        name, self.count = f"batch {self.count}", self.count + 1
        found = content()
        described = {f"{what} of {name}": describe(value) for what, value in found.items()}
        self.journal.identify(name, described)
        device = next(iter(found.values())).device
        kept = self.journal.once(name, compute)
        return {key: value.to(device) for key, value in kept.items()}
