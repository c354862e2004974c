"""Frees what a captured model leaves behind, so that thousands of them fit in memory."""

from __future__ import annotations

import contextlib
import gc
import linecache
import time
from collections.abc import Iterator
from typing import Any

import torch.fx.graph_module

__all__ = ["released"]

_next_collection = 0.0  # on the clock of time.perf_counter
_num_made = 0  # graphs since the last collection
_LEAST_MADE = 32  # that are worth one


def _sources() -> dict[str, Any]:
    """Finds where torch.fx keeps the source text of every graph it ever made, for tracebacks."""
    loader = getattr(torch.fx.graph_module, "_loader", None)
    found = getattr(loader, "eval_cache", None)
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Frees graphs that were made inside and are no longer in use.

    They refer to themselves, so they live until garbage is collected, and Python waits long for
    that: it counts objects, not bytes. The tensors that they read are free before
    (:func:`~pyro_anneal.graphs.recorder.flat_graph`). Their source text would stay for ever.
    """
    global _num_made
    before = set(_sources())
    try:
        yield
    finally:
        sources = _sources()
        made = [name for name in sources if name not in before]
        for name in made:
            del sources[name]
            linecache.cache.pop(name, None)
        _num_made += len(made)
        if _num_made >= _LEAST_MADE:
            _collect()


def _collect() -> None:
    """Collects garbage, unless that would take more than a twentieth of the time."""
    global _next_collection, _num_made
    began = time.perf_counter()
    if began < _next_collection:
        return
    gc.collect()
    _num_made = 0
    ended = time.perf_counter()
    _next_collection = ended + 19.0 * (ended - began)
