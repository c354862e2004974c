"""Arguments that a run of the model uses up: iterators, and containers that it empties.

A model is run many times. An argument that is gone after the first run would leave the others
without data, which shows itself as an error far from its cause, or as sites that come and go.
"""

from __future__ import annotations

import inspect
import operator
from collections import deque
from collections.abc import Iterator, MutableMapping, MutableSequence, MutableSet
from types import GeneratorType

from .types import Arguments

__all__ = ["Consumed"]

_DEPTH = 5  # of containers within containers


class Consumed:
    """Remembers the sizes of the containers among a model's arguments, and where iterators stand.

    Example:
        >>> data = {"x": 1.0}
        >>> consumed = Consumed(((data,), {}))
        >>> _ = data.pop("x")
        >>> consumed.what()
        'argument [0] (a dict of 1 item, of which a run of the model left 0)'
    """

    def __init__(self, arguments: Arguments) -> None:
        leaves = list(_leaves(arguments))
        self._containers = [
            (name, value, len(value))
            for name, value in leaves
            if isinstance(value, MutableMapping | MutableSequence | MutableSet | deque)
        ]
        self._iterators = [
            (name, value, _state(value))
            for name, value in leaves
            if isinstance(value, Iterator) and type(value).__module__ in ("builtins", "itertools")
        ]

    def what(self) -> str | None:
        """Names what has lost items since, or was iterated over; None if nothing."""
        for name, value, size in self._containers:
            if len(value) < size:
                items = "1 item" if size == 1 else f"{size} items"
                return (
                    f"argument {name} (a {type(value).__name__} of {items}, of which a run of the "
                    f"model left {len(value)})"
                )
        for name, iterator, state in self._iterators:
            if state is None or _state(iterator) != state:
                return f"argument {name} (a {type(iterator).__name__}: pass list(...) of it)"
        return None


def _state(iterator: Iterator[object]) -> object:
    """Tells where an iterator stands; None where that cannot be seen."""
    if isinstance(iterator, GeneratorType):
        return inspect.getgeneratorstate(iterator)
    return operator.length_hint(iterator, -1) if hasattr(iterator, "__length_hint__") else None


def _leaves(arguments: Arguments) -> Iterator[tuple[str, object]]:
    """Iterates over arguments and what is in their lists, tuples and dictionaries, with names."""
    args, kwargs = arguments
    pending = [(f"[{i}]", value, _DEPTH) for i, value in enumerate(args)]
    pending += [(f"{name}", value, _DEPTH) for name, value in kwargs.items()]
    while pending:
        name, value, depth = pending.pop()
        yield name, value
        if depth == 0:
            continue
        if type(value) is dict:
            pending += [(f"{name}[{k!r}]", part, depth - 1) for k, part in value.items()]
        elif type(value) in (list, tuple) and len(value) <= 1000:
            pending += [(f"{name}[{i}]", part, depth - 1) for i, part in enumerate(value)]
