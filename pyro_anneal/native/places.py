"""Reading and writing elements at places that data, or the position itself, name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .arguments import Args, Kwargs, OpOverload
from .stages import Read, Scatter
from .values import CannotGenerate, Expression, Value, converted, literal
from .views import expanded

if TYPE_CHECKING:
    from .schedule import Schedule

__all__ = ["PLACES", "alternatives", "moved", "which"]

aten = torch.ops.aten
Shape = tuple[int, ...]
Rule = Callable[["Schedule", Args, Kwargs, Shape, torch.dtype], Any]


def alternatives(cases: Sequence[tuple[str, Expression]], other: Expression) -> Expression:
    """Chooses by an index, before the element is read."""
    is_vector = other.is_vector or any(case.is_vector for _, case in cases)
    code = (other.widened() if is_vector else other).code
    for condition, case in reversed(cases):
        code = f"({condition} ? {(case.widened() if is_vector else case).code} : {code})"
    return Expression(code, other.dtype, is_vector)


def moved(at: Sequence[str], dim: int, index: str) -> list[str]:
    """Replaces one index."""
    return [*at[:dim], index, *at[dim + 1 :]]


def _chosen(place: Expression, size: int, element: Callable[[str], Expression]) -> Expression:
    """Reads the element that each chain names by a place of its own."""
    here = element("k").widened()
    code = (
        f"[&] {{ const auto at = {place.code}; auto found = {element('0').widened().code}; "
        f"for (i64 k = 0; k < {size}; k++) "
        f"found = sel(eq(at, wide(k)) | eq(at, wide(k - {size})), {here.code}, found); "
        "return found; }()"
    )
    return Expression(code, here.dtype, True)


def which(schedule: Schedule, source: Value, dim: int, shape: Shape) -> Value:
    """Finds the first of the largest elements along a dimension."""

    def emit(read: Read, at: Sequence[str]) -> Expression:
        own = list(at) if len(shape) == len(source.shape) else [*at[:dim], "0", *at[dim:]]
        first = read(source, moved(own, dim, "0")).widened()
        here = read(source, moved(own, dim, "k")).widened()
        code = (
            f"[&] {{ auto most = {first.code}; vl at = {{}}; "
            f"for (i64 k = 1; k < {source.shape[dim]}; k++) {{ const auto x = {here.code}; "
            "const auto more = gt(x, most); most = sel(more, x, most); "
            "at = sel(more, wide(k), at); } return at; }()"
        )
        return Expression(code, torch.int64, True)

    return schedule.member((), (source,), emit, shape, torch.int64)


def _place_of(index: Value, read: Read, at: Sequence[str], size: int) -> str:
    """Reads a place that data name."""
    if index.is_vector or index.dtype is not torch.int64:
        raise CannotGenerate("places that the position names, or a mask of places")
    return f"row({read(index, at).code}, {size})"


def _picked(
    schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
) -> Value:
    """Reads ``x[..., index, ...]`` with one block of indexed dimensions."""
    source, places = args[0], list(args[1])
    places += [None] * (len(source.shape) - len(places))
    indexed = [dim for dim, index in enumerate(places) if index is not None]
    first, last = indexed[0], indexed[-1]
    if indexed != list(range(first, last + 1)):
        raise CannotGenerate("indices with a gap between them")
    own = [dim for dim in indexed if places[dim].is_vector]
    if len(own) > 1 or any(places[dim].dtype is not torch.int64 for dim in indexed):
        raise CannotGenerate("several places that the position names, or a mask of places")
    width = len(shape) - (len(source.shape) - len(indexed))

    def emit(read: Read, at: Sequence[str]) -> Expression:
        inner = at[first : first + width]
        where = [*at[:first]]
        for dim in indexed:
            known = dim not in own
            where.append(_place_of(places[dim], read, inner, source.shape[dim]) if known else "k")
        where += at[first + width :]
        if not own:
            return read(source, where)
        size = source.shape[own[0]]
        named = read(places[own[0]], inner)
        return _chosen(named, size, lambda k: read(source, moved(where, own[0], k)))

    indices = tuple(places[dim] for dim in indexed)
    return schedule.member((), (source, *indices), emit, shape, dtype)


def _index_select(
    schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
) -> Value:
    source, dim, index = args
    places = [None] * (dim % len(source.shape)) + [index.reshaped((index.size,))]
    return _picked(schedule, (source, places), {}, shape, dtype)


def _embedding(
    schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
) -> Value:
    return _picked(schedule, (args[0], [args[1]]), {}, shape, dtype)


def _gather(
    schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
) -> Value:
    source, dim, index = args[:3]
    dim %= len(shape)

    def emit(read: Read, at: Sequence[str]) -> Expression:
        if index.is_vector:
            size = source.shape[dim]
            return _chosen(read(index, at), size, lambda k: read(source, moved(at, dim, k)))
        place = _place_of(index, read, at, source.shape[dim])
        return read(source, moved(at, dim, place))

    return schedule.member((), (source, index), emit, shape, dtype)


def _scattered(
    schedule: Schedule,
    start: Value,
    rows: Value,
    place: Callable[[Read, Sequence[str]], list[str]],
    accumulate: bool,
) -> Value:
    if rows.dtype is not start.dtype:
        raise CannotGenerate("rows of another type")
    place(lambda value, at: value.at(at), ["0"] * len(rows.shape))  # refused now or never
    is_vector = start.is_vector or rows.is_vector
    result = schedule.new(start.shape, start.dtype, is_vector=is_vector)
    return schedule.alone(Scatter(result, start, rows, place, accumulate))


def _index_put(
    schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
) -> Value:
    start, places, rows = args[:3]
    accumulate = bool(args[3]) if len(args) > 3 else bool(kwargs.get("accumulate", False))
    places = [*places, *[None] * (len(shape) - len(places))]
    indexed = [dim for dim, index in enumerate(places) if index is not None]
    first, last = indexed[0], indexed[-1]
    if indexed != list(range(first, last + 1)):
        raise CannotGenerate("indices with a gap between them")
    chosen = places[first : last + 1]
    named = torch.broadcast_shapes(*(index.shape for index in chosen))
    rows = expanded(rows, (*shape[:first], *named, *shape[last + 1 :]))

    def place(read: Read, at: Sequence[str]) -> list[str]:
        inner = at[first : first + len(named)]
        own = [
            _place_of(index, read, inner, size)
            for index, size in zip(chosen, shape[first:], strict=False)
        ]
        return [*at[:first], *own, *at[first + len(named) :]]

    return _scattered(schedule, start, rows, place, accumulate)


def _along(schedule: Schedule, start: Value, dim: int, index: Value, rows: Value) -> Value:
    """Adds rows along one dimension, each to the place that its own index names."""
    dim %= len(start.shape)
    sizes = zip(rows.shape, index.shape, strict=True)
    rows = rows.viewed([min(pair) for pair in sizes], rows.strides)

    def place(read: Read, at: Sequence[str]) -> list[str]:
        return moved(at, dim, _place_of(index, read, at, start.shape[dim]))

    return _scattered(schedule, start, rows, place, True)


def _scatter_add(
    schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
) -> Value:
    if args[2].is_vector:
        return _each_way(schedule, args, shape, dtype, accumulate=True)
    return _along(schedule, *args)


def _scatter(
    schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
) -> Value:
    return _each_way(schedule, args, shape, dtype, accumulate=False)


def _each_way(
    schedule: Schedule, args: Args, shape: Shape, dtype: torch.dtype, *, accumulate: bool
) -> Value:
    """Asks at each element which of the given ones come here."""
    start, dim, index, rows = args
    dim %= len(shape)
    others = [size for d, size in enumerate(shape) if d != dim]
    if others != [size for d, size in enumerate(index.shape) if d != dim]:
        raise CannotGenerate("rows for a part of the places")

    given = (rows,) if isinstance(rows, Value) else ()
    is_vector = any(value.is_vector for value in (start, index, *given))

    def wide(expression: Expression) -> str:
        return (expression.widened() if is_vector else expression).code

    def emit(read: Read, at: Sequence[str]) -> Expression:
        code = wide(converted(read(start, at), dtype))
        for k in range(index.shape[dim]):
            there = moved(at, dim, str(k))
            row = read(rows, there) if isinstance(rows, Value) else literal(rows, dtype)
            element = wide(converted(row, dtype))
            element = f"{code} + {element}" if accumulate else element
            place = wide(Expression(f"((i64){at[dim]})", torch.int64, False))
            code = f"sel(eq({wide(read(index, there))}, {place}), {element}, {code})"
        return Expression(code, dtype, is_vector)

    return schedule.member((), (start, index, *given), emit, shape, dtype)


def _index_add(
    schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
) -> Value:
    start, dim, index, rows = args
    if kwargs.get("alpha", 1) != 1 or len(index.shape) != 1:
        raise CannotGenerate("rows added with a factor")
    dim %= len(shape)
    strides = [0] * len(rows.shape)
    strides[dim] = index.strides[0]
    return _along(schedule, start, dim, index.viewed(rows.shape, strides), rows)


def _embedding_backward(
    schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
) -> Value:
    rows, index, _, padding, scaled = args
    if padding >= 0 or scaled:
        raise CannotGenerate("an embedding with options")
    start = Value.filled(0.0, dtype, shape)
    return _index_put(schedule, (start, [index], rows, True), {}, shape, dtype)


def _argmax(
    schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
) -> Value:
    source, dim = args[0], (args[1] if len(args) > 1 else kwargs.get("dim"))
    if dim is None:
        raise CannotGenerate("the largest of all elements")
    return which(schedule, source, dim % len(source.shape), shape)


PLACES: dict[OpOverload, Rule] = {
    aten.argmax.default: _argmax,
    aten.index.Tensor: _picked,
    aten._unsafe_index.Tensor: _picked,
    aten.index_select.default: _index_select,
    aten.embedding.default: _embedding,
    aten.gather.default: _gather,
    aten.index_put.default: _index_put,
    aten._unsafe_index_put.default: _index_put,
    aten.scatter.value: _scatter,
    aten.scatter.src: _scatter,
    aten.scatter_add.default: _scatter_add,
    aten.index_add.default: _index_add,
    aten.embedding_dense_backward.default: _embedding_backward,
}
