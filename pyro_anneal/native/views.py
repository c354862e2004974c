"""Operations that only read an array in another way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .arguments import Args, OpOverload
from .values import CannotGenerate, Value

__all__ = ["SPLITS", "expanded", "transposed", "view_of"]

aten = torch.ops.aten
Copy = Callable[[Value], Value]
_RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)
SPLITS = (aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default)
_SAME = (aten.alias.default, aten.detach.default, aten.lift_fresh.default)


def _permuted(value: Value, dims: Sequence[int]) -> Value:
    order = [dim % len(dims) for dim in dims]
    return value.viewed([value.shape[d] for d in order], [value.strides[d] for d in order])


def expanded(value: Value, shape: Sequence[int]) -> Value:
    """Repeats a value along dimensions of one element and new ones."""
    missing = len(shape) - len(value.shape)
    old = [(1, 0)] * missing + list(zip(value.shape, value.strides, strict=True))
    strides = [0 if n == 1 and new != 1 else s for (n, s), new in zip(old, shape, strict=True)]
    return value.viewed(shape, strides)


def transposed(value: Value) -> Value:
    """Turns matrices."""
    rank = len(value.shape)
    return _permuted(value, [*range(rank - 2), rank - 1, rank - 2])


def _selected(value: Value, dim: int, index: int) -> Value:
    dim %= len(value.shape)
    index %= value.shape[dim]
    shape = value.shape[:dim] + value.shape[dim + 1 :]
    strides = value.strides[:dim] + value.strides[dim + 1 :]
    return value.viewed(shape, strides, value.offset + index * value.strides[dim])


def _sliced(
    value: Value, dim: int = 0, start: Any = None, stop: Any = None, step: int = 1
) -> Value:
    dim %= len(value.shape)
    chosen = range(value.shape[dim])[slice(start, stop, step)]
    shape, strides = list(value.shape), list(value.strides)
    offset = value.offset + (chosen.start * strides[dim] if chosen else 0)
    shape[dim], strides[dim] = len(chosen), strides[dim] * chosen.step
    return value.viewed(shape, strides, offset)


def _diagonal(value: Value, offset: int = 0, first: int = 0, second: int = 1) -> Value:
    rank = len(value.shape)
    first, second = first % rank, second % rank
    rest = [d for d in range(rank) if d not in (first, second)]
    rows, columns = value.shape[first], value.shape[second]
    size = max(min(rows, columns - offset) if offset >= 0 else min(rows + offset, columns), 0)
    start = offset * value.strides[second] if offset >= 0 else -offset * value.strides[first]
    shape = [*(value.shape[d] for d in rest), size]
    strides = [
        *(value.strides[d] for d in rest),
        value.strides[first] + value.strides[second],
    ]
    return value.viewed(shape, strides, value.offset + start)


def _flipped(value: Value, dims: Sequence[int]) -> Value:
    strides, offset = list(value.strides), value.offset
    for dim in {d % len(strides) for d in dims}:
        offset += (value.shape[dim] - 1) * strides[dim]
        strides[dim] = -strides[dim]
    return value.viewed(value.shape, strides, offset)


def _parts(value: Value, size: Any, dim: int = 0) -> tuple[Value, ...]:
    whole = value.shape[dim % len(value.shape)]
    sizes = size if isinstance(size, (list, tuple)) else None
    if sizes is None:
        sizes = [min(size, whole - start) for start in range(0, whole, size)]
    parts, start = [], 0
    for one in sizes:
        parts.append(_sliced(value, dim, start, start + one))
        start += one
    return tuple(parts)


def view_of(target: OpOverload, args: Args, shape: tuple[int, ...], copied: Copy) -> Any:
    """Returns a view, where the operation makes one.

    Args:
        target: The operation.
        args: Its operands.
        shape: Of the result.
        copied: Lays a value out as an array of its own.

    Returns:
        The view, several for an operation that splits, or None.
    """
    if not args or not isinstance(args[0], Value):
        return None
    value, rest = args[0], args[1:]
    if target in _SAME:
        return value
    if target in _RESHAPES:
        view = value.reshaped(shape)
        if view is None:
            view = copied(value).reshaped(shape)
        if view is None:
            raise CannotGenerate(f"a view of {list(value.shape)} as {list(shape)}")
        return view
    if target is aten.expand.default:
        return expanded(value, shape)
    if target is aten.permute.default:
        return _permuted(value, rest[0])
    if target in (aten.transpose.int, aten.t.default):
        rank = len(value.shape)
        if rank < 2:
            return value
        first, second = rest if rest else (0, 1)
        order = list(range(rank))
        order[first % rank], order[second % rank] = second % rank, first % rank
        return _permuted(value, order)
    if target is aten.select.int:
        return _selected(value, *rest)
    if target is aten.slice.Tensor:
        return _sliced(value, *rest)
    if target is aten.diagonal.default:
        return _diagonal(value, *rest)
    if target is aten.flip.default:
        return _flipped(value, *rest)
    if target is aten.unbind.int:
        dim = rest[0] if rest else 0
        return tuple(_selected(value, dim, i) for i in range(value.shape[dim]))
    if target in (aten.split.Tensor, aten.split_with_sizes.default):
        return _parts(value, *rest)
    return None
