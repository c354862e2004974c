"""What a graph computes, as native code sees it: arrays of vectors or of numbers, and views of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

__all__ = [
    "SCALARS",
    "SUFFIX",
    "CannotGenerate",
    "Expression",
    "Value",
    "converted",
    "literal",
    "strides_of",
]

SUFFIX = {torch.float32: "f", torch.float64: "d", torch.int64: "l", torch.bool: "b"}
SCALARS = {torch.float32: "float", torch.float64: "double", torch.int64: "i64", torch.bool: "int"}


class CannotGenerate(Exception):
    """A graph has an operation that native code does not know, or is too large for it."""


@dataclass(frozen=True)
class Expression:
    """C++ of one number per chain, or of one number that all chains share."""

    code: str
    dtype: torch.dtype
    is_vector: bool

    def widened(self) -> Expression:
        """Returns a vector."""
        return self if self.is_vector else Expression(f"wide({self.code})", self.dtype, True)


def converted(expression: Expression, dtype: torch.dtype) -> Expression:
    """Changes the type of an expression."""
    if expression.dtype is dtype:
        return expression
    return replace(expression, code=f"to_{SUFFIX[dtype]}({expression.code})", dtype=dtype)


def literal(number: float, dtype: torch.dtype) -> Expression:
    """Writes a number of Python, rounded to the type as torch rounds it."""
    if dtype is torch.bool:
        code = "-1" if number else "0"
    elif dtype is torch.int64:
        code = f"((i64){int(number)}LL)"
    elif math.isnan(number):
        code = f"(({SCALARS[dtype]})NOT_A_NUMBER)"
    elif math.isinf(number):
        code = f"(({SCALARS[dtype]}){'-' if number < 0 else ''}INF)"
    else:
        rounded = torch.tensor(number, dtype=dtype, device="cpu").item()
        if math.isinf(rounded):
            return literal(rounded, dtype)
        code = f"(({SCALARS[dtype]}){float(rounded).hex()})"
    return Expression(f"({code})", dtype, False)


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Computes the strides of a contiguous array."""
    strides, size = [], 1
    for length in reversed(shape):
        strides.append(size)
        size *= length
    return tuple(reversed(strides))


@dataclass(frozen=True)
class Value:
    """A tensor of one chain: a view of an array, or one number everywhere.

    Attributes:
        name: The array in C++.
        dtype: Of its numbers.
        is_vector: Whether each element is a vector over chains.
        shape: Of the view.
        strides: Of the view, in elements.
        offset: Of its first element.
        number: Instead of an array.
        is_stored_as_bytes: Whether the array holds booleans as torch does.
    """

    name: str
    dtype: torch.dtype
    is_vector: bool
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    number: float | None = None
    is_stored_as_bytes: bool = False

    @staticmethod
    def array(name: str, dtype: torch.dtype, shape: Sequence[int], *, is_vector: bool) -> Value:
        """Describes a contiguous array."""
        if dtype not in SUFFIX:
            raise CannotGenerate(f"numbers of type {dtype}")
        return Value(name, dtype, is_vector, tuple(shape), strides_of(shape))

    @staticmethod
    def filled(number: float, dtype: torch.dtype, shape: Sequence[int]) -> Value:
        """Describes a tensor filled with one number."""
        if dtype not in SUFFIX:
            raise CannotGenerate(f"numbers of type {dtype}")
        return Value("", dtype, False, tuple(shape), (0,) * len(shape), 0, number)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_whole(self) -> bool:
        """Whether the view is all of a contiguous array, in its order."""
        dims = zip(self.shape, self.strides, strides_of(self.shape), strict=True)
        return self.offset == 0 and all(n == 1 or s == t for n, s, t in dims)

    def at(self, indices: Sequence[str]) -> Expression:
        """Reads an element; indices of fewer or longer dimensions broadcast from the right."""
        if self.number is not None:
            return literal(self.number, self.dtype)
        terms = [str(self.offset)] if self.offset else []
        own = indices[len(indices) - len(self.shape) :]
        for index, size, stride in zip(own, self.shape, self.strides, strict=True):
            if size > 1 and stride and index != "0":
                terms.append(index if stride == 1 else f"{stride} * {index}")
        code = f"{self.name}[{' + '.join(terms) or '0'}]"
        if self.is_stored_as_bytes:
            code = f"(-(int){code})"
        return Expression(code, self.dtype, self.is_vector)

    def viewed(
        self, shape: Sequence[int], strides: Sequence[int], offset: int | None = None
    ) -> Value:
        """Returns another view of the same array."""
        start = self.offset if offset is None else offset
        return replace(self, shape=tuple(shape), strides=tuple(strides), offset=start)

    def reshaped(self, shape: Sequence[int]) -> Value | None:
        """Returns a view of another shape, None where elements would have to move."""
        if self.number is not None:
            return self.viewed(shape, (0,) * len(shape))
        old = [(n, s) for n, s in zip(self.shape, self.strides, strict=True) if n != 1]
        merged: list[tuple[int, int]] = []  # runs of dimensions that are one in memory
        for size, stride in old:
            if merged and merged[-1][1] == size * stride:
                merged[-1] = (merged[-1][0] * size, stride)
            else:
                merged.append((size, stride))
        strides: list[int] = []
        for size in reversed(shape):
            if size == 1:
                strides.append(0)
                continue
            if not merged or merged[-1][0] % size:
                return None
            whole, stride = merged.pop()
            strides.append(stride)
            if whole != size:
                merged.append((whole // size, stride * size))
        return None if merged else self.viewed(shape, strides[::-1])
