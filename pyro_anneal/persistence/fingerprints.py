"""What a run depends on, as short texts by name, so that two runs can be compared.

Everything is described by content: what two texts have in common gives the same numbers, and what
has no description by content is refused, since a file could not tell whether it has changed.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import os
import re
import sys
import types
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._version import __version__

__all__ = [
    "Fingerprint",
    "Undescribable",
    "describe",
    "describe_arguments",
    "describe_name",
    "described",
    "digest",
    "versions",
]

Fingerprint = dict[str, str]

_LIMIT = 200  # characters of a text before its end is replaced by a digest
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range, slice)
# Attributes of a class that say nothing about what it computes.
_NOT_CONTENT = {
    *("__dict__", "__weakref__", "__doc__", "__module__", "__firstlineno__", "__annotations__"),
    *("__static_attributes__", "__abstractmethods__", "_abc_impl", "__match_args__"),
    *("__dataclass_fields__", "__dataclass_params__", "__annotate_func__"),
}
_NAMED = (torch.dtype, torch.device, torch.layout, torch.Size, enum.Enum, os.PathLike)


class Undescribable(ValueError):
    """A value has no description by content."""


def digest(*parts: bytes) -> str:
    """Computes a short digest of some bytes."""
    hasher = hashlib.blake2b(digest_size=8)
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little") + part)
    return hasher.hexdigest()


def _tensor_bytes(value: Tensor) -> bytes:
    dense = value.detach().cpu().to_dense() if value.layout != torch.strided else value.detach()
    plain = dense.cpu().resolve_conj().resolve_neg()
    # contiguous() leaves an expanded number its stride of zero, which has no view in bytes
    raw = plain.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
    return raw.numpy().tobytes()


def describe_name(value: Any) -> str:
    """Describes a model or a guide by its name; a module by its tensors, a value by its content.

    What the function computes is described elsewhere, by the graph that is recorded from it.
    """
    if isinstance(value, nn.Module):
        named = [*value.named_parameters(), *value.named_buffers()]
        content = "".join(f"{name}: {describe(tensor)}\n" for name, tensor in named)
        return f"{type(value).__qualname__} {digest(content.encode())}"
    if isinstance(value, _PLAIN):
        return describe(value)
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def describe(value: Any) -> str:
    """Describes a value by a text that is the same in every process.

    Tensors, arrays, modules, containers, functions (code, closure, the globals that they read) and
    objects of plain classes (code and attributes) are described by all of their content.

    Raises:
        Undescribable: If the value, or one that it holds, has no content that can be read.

    Example:
        >>> describe(torch.zeros(2, dtype=torch.float64)) == describe(torch.ones(2).double())
        False
        >>> describe(0.5)
        '0.5'
        >>> describe([0.5, {"a": (1, None)}])
        "[0.5, {'a': (1, None)}]"
    """
    return _Describer()(value)


class _Describer:
    """Describes values; an object that is met again on the way to itself is named by its place."""

    def __init__(self) -> None:
        self._path: dict[int, int] = {}  # objects that are being described, by id
        self._known: dict[int, tuple[Any, str]] = {}  # held, so that ids stay theirs

    def __call__(self, value: Any) -> str:
        if isinstance(value, _PLAIN) and not isinstance(value, enum.Enum):
            return _short(repr(value))
        if isinstance(value, _NAMED):
            return _short(repr(value))
        if isinstance(value, Tensor):
            kind = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
            return f"{kind} {digest(_tensor_bytes(value))}"
        if isinstance(value, np.ndarray):
            inside = self(value.tolist()) if value.dtype.hasobject else value.tobytes().hex()
            return f"{value.dtype}{list(value.shape)} {digest(inside.encode())}"
        if isinstance(value, np.generic):
            return f"{value.dtype} {value.item()!r}"
        if id(value) in self._path:
            return f"<the object {len(self._path) - self._path[id(value)]} levels up>"
        if id(value) not in self._known:
            self._path[id(value)] = len(self._path)
            try:
                self._known[id(value)] = (value, _short(self._compound(value)))
            finally:
                del self._path[id(value)]
        return self._known[id(value)][1]

    def _compound(self, value: Any) -> str:
        if isinstance(value, list | tuple) and type(value) in (list, tuple):
            inside = ", ".join(self(part) for part in value)
            if isinstance(value, list):
                return f"[{inside}]"
            return f"({inside},)" if len(value) == 1 else f"({inside})"
        if isinstance(value, set | frozenset):
            return f"{{{', '.join(sorted(self(part) for part in value))}}}"
        if isinstance(value, dict) and type(value).__module__ in ("builtins", "collections"):
            return "{" + ", ".join(f"{self(k)}: {self(v)}" for k, v in value.items()) + "}"
        if isinstance(value, types.ModuleType):
            return f"module {value.__name__} {getattr(value, '__version__', '')}".strip()
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, functools.partial):
            return f"partial({self(value.func)}, {self(value.args)}, {self(value.keywords)})"
        if isinstance(value, types.MethodType):
            return f"{self(value.__self__)}.{self(value.__func__)}"
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.CodeType):
            return self._code(value)
        if isinstance(value, torch.Generator):
            return f"generator {self(value.get_state())}"
        if isinstance(value, weakref.ReferenceType):
            return "weakref"
        if isinstance(value, nn.Module):
            return self._module(value)
        return self._object(value)

    def _module(self, value: nn.Module) -> str:
        named = {n: self(t) for n, t in [*value.named_parameters(), *value.named_buffers()]}
        own = [
            (type(m).__qualname__, m.training, {k: v for k, v in vars(m).items() if k[0] != "_"})
            for m in value.modules()
        ]
        content = repr(named) + self(own) + self(type(value))
        return f"{type(value).__qualname__} {digest(content.encode())}"

    def _object(self, value: Any) -> str:
        kind = type(value)
        if kind is object:
            return "object"
        if dataclasses.is_dataclass(value):
            content = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        elif hasattr(value, "__dict__"):
            content = dict(vars(value))
        elif any("__slots__" in vars(base) for base in kind.__mro__):
            names = [n for base in kind.__mro__ for n in vars(base).get("__slots__", ())]
            content = {n: getattr(value, n) for n in names if hasattr(value, n)}
        elif callable(value) and _is_library(kind) and hasattr(value, "__qualname__"):
            owner = getattr(value, "__self__", None)
            held = "" if owner is None or isinstance(owner, types.ModuleType) else self(owner)
            return f"{held}{value.__qualname__}"  # a function written in C
        else:
            content = None
        bases = (list, tuple, dict, set, int, float, str)
        base = next((b for b in bases if isinstance(value, b)), None)
        if content is None or _is_opaque(value):
            raise Undescribable(
                f"a value of type {kind.__module__}.{kind.__qualname__} has no content that can "
                "be read"
            )
        inside = ", ".join(f"{name}={self(part)}" for name, part in content.items())
        if base is not None:
            inside = ", ".join(part for part in (self(base(value)), inside) if part)
        code = "" if _is_library(kind) else f" {digest(self._class(kind).encode())}"
        return f"{kind.__qualname__}({inside}){code}"

    def _class(self, kind: type) -> str:
        if _is_library(kind):
            return f"class {kind.__module__}.{kind.__qualname__}"
        content = []
        for name, part in sorted(vars(kind).items()):
            if name in _NOT_CONTENT or isinstance(part, types.MemberDescriptorType):
                continue
            if isinstance(part, staticmethod | classmethod):
                part = part.__func__
            if isinstance(part, property):
                part = (part.fget, part.fset)
            if isinstance(part, functools.cached_property):
                part = part.func
            content.append(f"{name}: {self(part)}")
        bases = [self(base) for base in kind.__bases__]
        return f"class {kind.__qualname__} {digest(repr((bases, content)).encode())}"

    def _function(self, value: types.FunctionType) -> str:
        if _is_library(value):
            return f"{value.__module__}.{value.__qualname__}"
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        names = sorted(_names(value.__code__) & set(value.__globals__))
        parts = [self(value.__code__), self(value.__defaults__), self(value.__kwdefaults__)]
        parts += [self(cell) for cell in cells]
        parts += [f"{name}: {self(value.__globals__[name])}" for name in names]
        wrapped = getattr(value, "__wrapped__", None)
        parts += [] if wrapped is None else [self(wrapped)]
        return f"{value.__qualname__} {digest(*[part.encode() for part in parts])}"

    def _code(self, code: types.CodeType) -> str:
        constants = [self(constant) for constant in code.co_consts]
        parts = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, constants)
        return f"code {digest(code.co_code, repr(parts).encode())}"


def _short(text: str) -> str:
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    return text if len(text) < _LIMIT else f"{text[: _LIMIT // 2]}... {digest(text.encode())}"


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # a variable that is assigned later
        return False
    return True


def _names(code: types.CodeType) -> set[str]:
    """Collects the names that a function, or one inside it, may read from its globals."""
    inner = [_names(part) for part in code.co_consts if isinstance(part, types.CodeType)]
    return set(code.co_names).union(*inner)


def _is_library(value: Any) -> bool:
    """Tells whether a class or function belongs to a package that versions tell apart."""
    name = getattr(value, "__module__", None) or "builtins"
    top = name.split(".")[0]
    if top == "__main__":
        return False
    if top in sys.stdlib_module_names or top in ("torch", "pyro", "numpy", "pyro_anneal"):
        return True
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def _is_opaque(value: Any) -> bool:
    """Tells whether an object of the standard library keeps its state out of sight."""
    kind = type(value)
    visible = dataclasses.is_dataclass(value) or kind is types.SimpleNamespace or kind is object
    top = kind.__module__.split(".")[0]
    containers = isinstance(value, list | tuple | dict | set | int | float | str)
    return top in sys.stdlib_module_names and not visible and not containers


def describe_arguments(
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]], *, strict: bool = True
) -> Fingerprint:
    """Describes each tensor and number in nested arguments of a model.

    Args:
        arguments: ``(args, kwargs)``.
        strict: Whether to refuse what has no description by content; else its type stands for it.

    Raises:
        Undescribable: If one has no description by content; it names the argument.

    Example:
        >>> describe_arguments(((1.5,), {"flag": True}))
        {'argument args[0]': '1.5', "argument kwargs['flag']": 'True'}
    """
    args, kwargs = arguments
    found = {}
    for name, part in (("args", args), ("kwargs", dict(kwargs))):
        leaves, _ = pytree.tree_flatten_with_path(part)
        for path, leaf in leaves:
            place = f"argument {name}{pytree.keystr(path)}"
            found[place] = described(place, leaf, strict=strict)
    return found


def described(what: str, value: Any, *, strict: bool = True) -> str:
    """Describes a value, and names it where that fails.

    Args:
        what: What the value is.
        value: The value.
        strict: As in :func:`describe_arguments`.

    Raises:
        Undescribable: If the value has no description by content.
    """
    try:
        return describe(value)
    except Undescribable as error:
        if not strict:
            return type(value).__qualname__
        raise Undescribable(
            f"no checkpoint can be kept: {what} cannot be described by its content, so that a file "
            f"could not tell whether it has changed ({error}); pass tensors, numbers or objects "
            "with attributes, or leave checkpoint= out"
        ) from error


def versions() -> Fingerprint:
    """Describes the software that computes."""
    return {"version of pyro_anneal": __version__, "version of torch": str(torch.__version__)}
