"""Arguments of operations of a graph: what torch wrote there, values of a schedule in place of nodes."""

from __future__ import annotations

from typing import Any

from torch._ops import OpOverload

__all__ = ["Args", "Kwargs", "OpOverload"]

Args = tuple[Any, ...]  # by position: values, numbers, lists of both, None
Kwargs = dict[str, Any]  # by name
