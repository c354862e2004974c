"""One progress bar for a whole call, and the seconds that each of its stages took.

A call goes through stages: it fits the guide, runs the pilot, then chains in one direction or both.
They share one bar, which names the stage and ends full. Stages within others (the runs on each of
several data sets) show their name only. ``PYRO_ANNEAL_PROGRESS=0`` in the environment silences all.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from tqdm.std import TqdmWarning

from ..arguments import bars_are_silenced

with warnings.catch_warnings():  # notebooks without ipywidgets get bars of text, without advice
    warnings.simplefilter("ignore", TqdmWarning)
    from tqdm.auto import tqdm

__all__ = ["CallProgress", "Stage", "follow_call", "progress_bar"]

_UNITS = 1000  # of the bar, in all
_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


class Stage:
    """One stage: counts up to its total, or without end where that is unknown."""

    def __init__(self, call: CallProgress, label: str, total: float, *, is_outer: bool) -> None:
        self.n: float = 0.0
        self.total = total
        self.label = label
        self._call = call
        self._is_outer = is_outer

    def update(self, count: float = 1) -> None:
        """Counts ``count`` more."""
        self.n += count
        if self._is_outer and 0.0 < self.total < math.inf:
            self._call.show(self.label, min(self.n / self.total, 1.0))


class CallProgress:
    """The progress of one call.

    Args:
        task: Name of the call.
        stages: Shares of the bar by stage, for those that are known to come.
        visible: Whether the bar is shown.
        seconds: Where to add up the wall time of ``fit``, ``pilot`` and ``chains``.
    """

    def __init__(
        self, task: str, stages: Mapping[str, float], visible: bool, seconds: dict[str, float]
    ) -> None:
        self.shares = dict(stages)
        self.seconds = seconds
        self._depth = 0
        self._done: dict[str, float] = {}
        self._bar: Any = tqdm(
            total=_UNITS, desc=task, disable=not visible, bar_format=_FORMAT, leave=True
        )

    @contextlib.contextmanager
    def stage(self, label: str, total: float) -> Iterator[Stage]:
        """Enters a stage, and counts it as done on leaving without an error."""
        is_outer, began = self._depth == 0, time.perf_counter()
        if is_outer:
            self.shares.setdefault(label, 1.0)
        self._bar.set_postfix_str(label)
        self._depth += 1
        try:
            yield Stage(self, label, total, is_outer=is_outer)
        finally:
            self._depth -= 1
            part = label if label in ("fit", "pilot") else "chains"
            if label not in ("simulations", "batches"):
                spent = time.perf_counter() - began
                self.seconds[part] = self.seconds.get(part, 0.0) + spent
        if is_outer:
            self.show(label, 1.0)

    def show(self, label: str, fraction: float) -> None:
        """Draws that a stage is done by a fraction; the bar never runs backwards."""
        self._done[label] = fraction
        whole = sum(self.shares.values())
        done = sum(share * self._done.get(name, 0.0) for name, share in self.shares.items())
        target = int(_UNITS * done / whole)
        if target > self._bar.n:
            self._bar.update(target - self._bar.n)

    def close(self, *, succeeded: bool) -> None:
        """Ends the bar: full where the call succeeded, else it disappears."""
        if succeeded:
            self._bar.set_postfix_str("done", refresh=False)
            self._bar.update(_UNITS - self._bar.n)
        else:
            self._bar.leave = False
        self._bar.close()


_CURRENT: ContextVar[CallProgress | None] = ContextVar("pyro_anneal_progress", default=None)


@contextlib.contextmanager
def follow_call(
    task: str, stages: Mapping[str, float], visible: bool, seconds: dict[str, float]
) -> Iterator[CallProgress]:
    """Shows one bar for all stages inside; see :class:`CallProgress`."""
    call = CallProgress(task, stages, visible and not bars_are_silenced(), seconds)
    token = _CURRENT.set(call)
    try:
        yield call
    except BaseException:
        call.close(succeeded=False)
        raise
    finally:
        _CURRENT.reset(token)
    call.close(succeeded=True)


def progress_bar(label: str, total: float) -> contextlib.AbstractContextManager[Stage]:
    """Enters a stage of the call that is going on.

    Args:
        label: Name of the stage.
        total: What it counts to; infinite if unknown.
    """
    call = _CURRENT.get()
    if call is None:  # a part of the engine, called by itself
        call = CallProgress(label, {}, False, {})
    return call.stage(label, total)
