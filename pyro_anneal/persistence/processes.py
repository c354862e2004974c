"""The processes that share a run: what they tell each other, through torch.distributed.

Whoever starts the processes (``torchrun``) also initializes the default process group. Messages of
a run are small and lie in the host's memory, so they go through a gloo group of their own: a rank
that has finished its chains may wait for hours, which NCCL's watchdog would take for a failure.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

__all__ = ["World", "alone", "connect"]


class World:
    """The processes of a run, seen from one of them.

    Args:
        rank: Number of this process.
        size: Number of processes.
        group: Process group for messages; None for a process of its own.
    """

    def __init__(self, rank: int, size: int, group: Any = None) -> None:
        self.rank = rank
        self.size = size
        self.group = group

    def gather(self, value: Any, what: str) -> list[Any]:
        """Collects one value of every rank, on every rank.

        Raises:
            RuntimeError: If another process does not answer any more.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._explained(what):
            dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, compute: Callable[[], Any], what: str) -> Any:
        """Computes something on rank 0 and gives it to all.

        Raises:
            ValueError: Whatever rank 0 raised, on every rank.
            RuntimeError: If another process does not answer any more.
        """
        if self.size == 1:
            return compute()
        message: list[Any] = [None]
        failure: ValueError | None = None
        if self.rank == 0:
            try:
                message = [(True, compute())]
            except ValueError as error:
                failure, message = error, [(False, str(error))]
        with self._explained(what):
            dist.broadcast_object_list(message, src=0, group=self.group)
        if failure is not None:
            raise failure
        succeeded, value = message[0]
        if not succeeded:
            raise ValueError(f"{value} (found by rank 0)")
        return value

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RuntimeError(
                f"rank {self.rank} of {self.size} could not share {what}: another process of this "
                f"run died or lost its connection ({reason}). Its own error says why. What was "
                "written to the checkpoint is good: start the same command again to continue"
            ) from error


def alone() -> World:
    """Makes the world of a process without others."""
    return World(0, 1)


@contextlib.contextmanager
def connect() -> Iterator[World]:
    """Joins the processes of the default group of torch.distributed, if there is one."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        yield alone()
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    try:
        yield World(dist.get_rank(), dist.get_world_size(), group)
    finally:
        with contextlib.suppress(RuntimeError, ValueError):
            dist.destroy_process_group(group)
