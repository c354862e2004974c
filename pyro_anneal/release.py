"""Frees what a captured model leaves behind, so that thousands of them fit in memory."""

from __future__ import annotations

import contextlib
import gc
import linecache
from collections.abc import Iterator
from typing import Any

import torch.fx.graph_module

__all__ = ["released"]


def _sources() -> dict[str, Any]:
    """Finds where torch.fx keeps the source text of every graph it ever made, for tracebacks."""
    loader = getattr(torch.fx.graph_module, "_loader", None)
    found = getattr(loader, "eval_cache", None)
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Frees graphs that were made inside and are no longer in use.

    They refer to themselves, and hold the data of their model until the collector of garbage runs;
    it counts objects, not bytes. Their source text would stay for ever.
    """
    before = set(_sources())
    try:
        yield
    finally:
        sources = _sources()
        for name in [name for name in sources if name not in before]:
            del sources[name]
            linecache.cache.pop(name, None)
        gc.collect()
