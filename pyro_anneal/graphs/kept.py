"""Graphs that are kept for other data: found again by what they were made of."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from .captured_density import CapturedDensity
from .evaluation import LogDensities
from .recording import (
    Recording,
    record_densities,
)

__all__ = ["Kind", "find_kept", "keep", "kind_of", "recorded_again"]


# Graphs by what they were made of. A recording holds every operation and every number of Python,
# so that equal ones differ in the values of tensors alone, which are inputs of the graphs.
_GRAPHS: OrderedDict[tuple[Any, ...], dict[tuple[Any, ...], CapturedDensity]] = OrderedDict()


_CAPACITY = 64


_PER_KIND = 16


_MOST_GUARDED = 10_000  # numbers


Kind = tuple[Any, ...]


def kind_of(example: Tensor, *, compile: bool, gradients: bool, native: bool) -> Kind:
    """Tells apart what is recorded or compiled in other ways."""
    shape = (tuple(example.shape), example.dtype, example.device)
    return (*shape, compile, gradients, native, torch.get_num_threads())


def _content(recording: Recording) -> tuple[Any, ...]:
    metas = ((tuple(x.shape), x.dtype, x.device) for x in recording.constants)
    return (recording.code, *metas)


def recorded_again(
    function: LogDensities, example: Tensor, kind: Kind, *, gradients: bool
) -> Recording | None:
    """Records a function if graphs of its kind are kept, which may be its own."""
    if kind not in _GRAPHS:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return record_densities(function, example, gradients=gradients)
    except Exception:  # noqa: BLE001 - to be explained where it is captured for the first time
        return None


def find_kept(
    function: LogDensities,
    example: Tensor,
    recording: Recording | None,
    kind: Kind,
    *,
    num_chains: int,
) -> CapturedDensity | None:
    """Finds the graphs of an equal recording, and puts the data in."""
    if recording is None:
        return None
    content = _content(recording)
    found = _GRAPHS[kind].get(content)
    if found is None:
        return None
    _GRAPHS.move_to_end(kind)
    return found.on_recording(function, example, recording, num_chains=num_chains)


def keep(density: CapturedDensity, recording: Recording, kind: Kind) -> None:
    """Keeps the graphs of a density, without its data."""
    guards = None if density._trace is None else density._trace.guards
    if guards is not None and sum(value.numel() for value in guards.values) > _MOST_GUARDED:
        return  # they hold the data
    content = _content(recording)
    kept = _GRAPHS.setdefault(kind, {})
    kept[content] = density.without_data()
    while len(kept) > _PER_KIND:
        del kept[next(iter(kept))]
    _GRAPHS.move_to_end(kind)
    while len(_GRAPHS) > _CAPACITY:
        _GRAPHS.popitem(last=False)
