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

# On the clock of time.perf_counter; the first collection waits until there may be something.
_next_collection: float | None = None
_FIRST_WAIT = 2.0  # seconds


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
    global _next_collection
    if _next_collection is None:
        _next_collection = time.perf_counter() + _FIRST_WAIT
    before = set(_sources())
    try:
        yield
    finally:
        sources = _sources()
        for name in [name for name in sources if name not in before]:
            del sources[name]
            linecache.cache.pop(name, None)
        _collect()


def _collect() -> None:
    """Collects garbage, unless that would take more than a twentieth of the time."""
    global _next_collection
    began = time.perf_counter()
    if _next_collection is not None and began < _next_collection:
        return
    gc.collect()
    ended = time.perf_counter()
    _next_collection = ended + 19.0 * (ended - began)
