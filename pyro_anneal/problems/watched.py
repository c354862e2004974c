"""Python values that a model can reach, watched for changes between calls.

A recorded graph reads tensors anew at every call. What its Python code read, a number in an attribute,
say, or a tensor that was later exchanged for another, is in the graph for good. So the values that
a function can reach are collected when it is recorded: closures, globals that its code names, default
arguments, attributes, items of containers, and the same of the functions and objects found there.
Later calls compare them, plain values by content and tensors by identity, at some 50 ns each. What
changes at every call (counters, the last output kept in an attribute) may be ignored by name.

Not followed: code of libraries, which holds no state of a model, objects without ``__dict__``, and what
lies beyond a few thousand values.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
import pyro
from torch import Tensor, nn

from ..models.types import Array

__all__ = ["Watched"]

_LIMIT = 5000  # values
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
# Of these libraries only handlers, modules and partial functions hold state of a model.
_LIBRARIES = frozenset({*sys.stdlib_module_names, "torch", "pyro", "numpy", "scipy", __package__.split(".")[0]})  # fmt: skip
_MISSING = object()
_CELL, _LIST, _ARRAY = "a variable of an enclosing function", "a list", "an array"


class Watched:
    """Collects the Python values that functions can reach, and tells whether they are still there.

    Args:
        *functions: A model and a guide.

    Example:
        >>> state = {"scale": 1.0}
        >>> watched = Watched(lambda x, state=state: x * state["scale"])
        >>> watched.change() is None
        True
        >>> state["scale"] = 2.0
        >>> watched.change()
        "['scale']"
    """

    def __init__(self, *functions: object) -> None:
        self._tables: list[
            tuple[Mapping[Any, object], dict[Any, object]]
        ] = []  # live ones, with copies
        self._cells: list[tuple[types.CellType, object]] = []
        self._sequences: list[tuple[Collection[object], tuple[object, ...]]] = []
        self._arrays: list[tuple[Array, Array]] = []
        self._seen: dict[int, object] = {}  # held, so that ids stay theirs
        self._room = _LIMIT
        self._functions = functions
        pending = list(functions)
        while pending:
            value = pending.pop()
            if isinstance(value, (*_PLAIN, Tensor)) or id(value) in self._seen:
                continue
            if self._room <= 0:
                break
            self._seen[id(value)] = value
            pending.extend(self._look(value))
        self._parameters = _parameters()
        self.is_complete = self._room > 0  # whether all that was reached is watched

    def change(self, ignored: AbstractSet[str] = frozenset()) -> str | None:
        """Names something that has changed since; None if nothing has.

        Args:
            ignored: Names, as returned here, of what may change.
        """
        if next(self._differences(ignored), None) is None:
            return None
        # Objects made anew at each call may hold what they held before.
        again = Watched(*self._functions)
        names = [name for name in self._content() if name not in ignored]
        now, then = again._content(), self._content()
        for name in names:
            if name not in now and name.startswith("parameter"):
                continue  # the model will make it anew
            if name not in now or not _agree(now[name], then[name]):
                return name
        self.__dict__.update(again.__dict__)
        return None

    def _differences(self, ignored: AbstractSet[str]) -> Iterator[str]:
        for live, copy in self._tables:
            for key, value in copy.items():
                if not _same(live.get(key, _MISSING), value) and f"[{key!r}]" not in ignored:
                    yield f"[{key!r}]"
        for cell, value in self._cells:
            if not _same(_content(cell), value) and _CELL not in ignored:
                yield _CELL
        for sequence, items in self._sequences:
            same = len(sequence) == len(items) and all(map(_same, sequence, items))
            if not same and _LIST not in ignored:
                yield _LIST
        for now, then in self._arrays:
            same = now.shape == then.shape and now.tobytes() == then.tobytes()
            if not same and _ARRAY not in ignored:
                yield _ARRAY
        parameters = _parameters()
        for name, found in self._parameters.items():
            if parameters.get(name, found) is not found and f'parameter "{name}"' not in ignored:
                yield f'parameter "{name}"'

    def _content(self) -> dict[str, list[object]]:
        """Collects what was found, by name, in the order of the walk."""
        found: dict[str, list[object]] = {}
        for _, copy in self._tables:
            for key, value in copy.items():
                found.setdefault(f"[{key!r}]", []).append(value)
        for _, value in self._cells:
            found.setdefault(_CELL, []).append(value)
        for _, items in self._sequences:
            found.setdefault(_LIST, []).extend(items)
        for _, array in self._arrays:
            found.setdefault(_ARRAY, []).append(repr(array.shape).encode() + array.tobytes())
        for name, value in self._parameters.items():
            found[f'parameter "{name}"'] = [value]
        return found

    def _look(self, value: object) -> Iterable[object]:
        """Notes what a value holds, and returns it for a look in turn."""
        if isinstance(value, types.MethodType):
            return value.__self__, value.__func__
        if isinstance(value, functools.partial):
            return value.func, value.args, value.keywords
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, np.ndarray):
            self._room -= 1 + value.size // 100
            if self._room > 0:
                self._arrays.append((value, value.copy()))
            return ()
        if isinstance(value, list | tuple | set | frozenset):
            self._room -= 1 + len(value)
            if self._room <= 0:
                return ()
            items = tuple(value)
            self._sequences.append((value, items))
            return items
        if isinstance(value, dict):
            return self._table(value, value.keys())
        if isinstance(value, nn.Module):
            own = vars(value)
            inside = [own.get(name, {}) for name in ("_parameters", "_buffers", "_modules")]
            names = [name for name in own if name == "training" or not name.startswith("_")]
            if _is_library(type(value)):  # an AutoGuide makes its plates anew at each call
                names = [name for name in names if isinstance(own[name], _PLAIN)]
            return (*self._table(own, names), *inside, *self._class(type(value)))
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.ModuleType) or not hasattr(value, "__dict__"):
            return ()
        if _is_library(type(value)) and not _holds_state(value):
            return ()
        return *self._table(vars(value), vars(value).keys()), *self._class(type(value))

    def _table(self, live: Mapping[Any, object], keys: Iterable[object]) -> tuple[object, ...]:
        copy = {key: live[key] for key in keys if key in live}
        self._room -= 1 + len(copy)
        if self._room <= 0:
            return ()
        self._tables.append((live, copy))
        return tuple(copy.values())

    def _class(self, kind: type) -> tuple[object, ...]:
        """Looks at the methods and attributes of a user's class."""
        found: list[object] = []
        for base in kind.__mro__:
            if not _is_library(base):
                names = [name for name in vars(base) if not name.startswith("__")]
                names += [name for name in ("__call__",) if name in vars(base)]
                found.extend(self._table(vars(base), names))
        return tuple(_bare(value) for value in found)

    def _function(self, value: types.FunctionType) -> tuple[object, ...]:
        found: list[object] = [value.__defaults__, value.__kwdefaults__]
        for cell in value.__closure__ or ():
            content = _content(cell)
            self._cells.append((cell, content))
            found.append(content)
        self._room -= len(value.__closure__ or ())
        found.extend(vars(value).values())
        if _is_library_name(value.__module__):
            return tuple(found)
        space = value.__globals__
        names = set(_names(value.__code__)) & space.keys()
        found.extend(self._table(space, sorted(names)))
        for name in sorted(names):  # settings in a module of the user's own
            module = space[name]
            if isinstance(module, types.ModuleType) and not _is_library_name(module.__name__):
                read = set(_names(value.__code__)) & vars(module).keys()
                found.extend(self._table(vars(module), sorted(read)))
        return tuple(found)


def _same(now: object, then: object) -> bool:
    return now is then or (
        isinstance(then, _PLAIN) and type(now) is type(then) and bool(now == then)
    )


def _agree(now: list[object], then: list[object]) -> bool:
    """Tells whether values are the same, taking objects by their kind: their content is elsewhere."""
    if len(now) != len(then):
        return False
    for new, old in zip(now, then, strict=True):
        plain = isinstance(old, (*_PLAIN, Tensor))
        if not _same(new, old) and (plain or type(new) is not type(old)):
            return False
    return True


def _content(cell: types.CellType) -> object:
    try:
        content: object = cell.cell_contents
        return content
    except ValueError:  # not set yet
        return _MISSING


def _names(code: types.CodeType) -> Iterable[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _bare(value: object) -> object:
    """Returns the function of a method's descriptor."""
    if isinstance(value, property):
        return value.fget
    return value.__func__ if isinstance(value, staticmethod | classmethod) else value


def _is_library(kind: type) -> bool:
    return _is_library_name(kind.__module__)


def _is_library_name(name: str | None) -> bool:
    return (name or "").split(".")[0] in _LIBRARIES - {"__main__"}


def _holds_state(value: object) -> bool:
    """Tells whether an object of a library holds state of a model: a handler, say."""
    poutine = pyro.poutine
    is_plate = isinstance(value, poutine.indep_messenger.IndepMessenger)
    is_handler = isinstance(value, poutine.messenger.Messenger) and not is_plate
    return is_handler or isinstance(value, types.SimpleNamespace)


def _parameters() -> dict[str, object]:
    """Finds the tensors of the parameter store by name."""
    return dict(pyro.get_param_store()._params)
