"""Operations that join, place and pick elements, and products of matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .stages import Cholesky, Read, Scan, Scatter, Solve
from .values import CannotGenerate, Expression, Value, converted, literal
from .views import expanded, transposed

if TYPE_CHECKING:
    from .schedule import Schedule

__all__ = ["RULES", "SEVERAL"]

aten = torch.ops.aten
Shape = tuple[int, ...]
Rule = Callable[["Schedule", Any, Any, Shape, torch.dtype], Value]


def _alternatives(cases: Sequence[tuple[str, Expression]], other: Expression) -> Expression:
    """Chooses by an index, before the element is read."""
    is_vector = other.is_vector or any(case.is_vector for _, case in cases)
    code = (other.widened() if is_vector else other).code
    for condition, case in reversed(cases):
        code = f"({condition} ? {(case.widened() if is_vector else case).code} : {code})"
    return Expression(code, other.dtype, is_vector)


def _moved(at: Sequence[str], dim: int, index: str) -> list[str]:
    return [*at[:dim], index, *at[dim + 1 :]]


def _joined(
    schedule: Schedule, parts: Sequence[Value], dim: int, shape: Shape, dtype: Any
) -> Value:
    parts = [part for part in parts if part.size]

    def emit(read: Read, at: Sequence[str]) -> Expression:
        cases, start = [], 0
        for part in parts:
            index = at[dim] if start == 0 else f"({at[dim]} - {start})"
            element = converted(read(part, _moved(at, dim, index)), dtype)
            start += part.shape[dim]
            cases.append((f"{at[dim]} < {start}", element))
        return _alternatives(cases[:-1], cases[-1][1])

    return schedule.member((), tuple(parts), emit, shape, dtype)


def _cat(schedule: Schedule, args: Any, kwargs: Any, shape: Shape, dtype: torch.dtype) -> Value:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    return _joined(schedule, args[0], dim % len(shape), shape, dtype)


def _stack(schedule: Schedule, args: Any, kwargs: Any, shape: Shape, dtype: torch.dtype) -> Value:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % len(shape)
    size = (*shape[:dim], 1, *shape[dim + 1 :])
    parts = []
    for part in args[0]:
        strides = (*part.strides[:dim], 0, *part.strides[dim:])
        parts.append(part.viewed(size, strides))
    return _joined(schedule, parts, dim, shape, dtype)


def _placed(
    schedule: Schedule, source: Value, dim: int, chosen: range, shape: Shape, dtype: torch.dtype
) -> Value:
    """Puts a slice into zeros."""

    def emit(read: Read, at: Sequence[str]) -> Expression:
        index, zero = at[dim], literal(0.0, dtype)
        if not chosen:
            return zero
        inside = f"{index} >= {chosen.start} && {index} <= {chosen[-1]}"
        moved = f"({index} - {chosen.start})" if chosen.start else index
        if chosen.step != 1:
            inside += f" && {moved} % {chosen.step} == 0"
            moved = f"({moved} / {chosen.step})"
        return _alternatives([(inside, read(source, _moved(at, dim, moved)))], zero)

    return schedule.member((), (source,), emit, shape, dtype)


def _slice_backward(
    schedule: Schedule, args: Any, kwargs: Any, shape: Shape, dtype: torch.dtype
) -> Value:
    source, _, dim, *bounds = args
    dim %= len(shape)
    return _placed(schedule, source, dim, range(shape[dim])[slice(*bounds)], shape, dtype)


def _select_backward(
    schedule: Schedule, args: Any, kwargs: Any, shape: Shape, dtype: torch.dtype
) -> Value:
    source, _, dim, index = args
    dim %= len(shape)
    index %= shape[dim]
    size, strides = list(source.shape), list(source.strides)
    size.insert(dim, 1)
    strides.insert(dim, 0)
    source = source.viewed(size, strides)
    return _placed(schedule, source, dim, range(index, index + 1), shape, dtype)


def _pad(schedule: Schedule, args: Any, kwargs: Any, shape: Shape, dtype: torch.dtype) -> Value:
    source, widths, number = [*args, 0.0][:3]
    low = [0] * len(shape)
    for k in range(len(widths) // 2):
        low[len(shape) - 1 - k] = widths[2 * k]

    def emit(read: Read, at: Sequence[str]) -> Expression:
        moved = [f"({i} - {before})" if before else i for i, before in zip(at, low, strict=True)]
        tests = [
            f"{i} >= {before} && {i} < {before + size}"
            for i, before, size in zip(at, low, source.shape, strict=True)
        ]
        inside = " && ".join(tests) or "true"
        return _alternatives([(inside, read(source, moved))], literal(number, dtype))

    return schedule.member((), (source,), emit, shape, dtype)


def _place_of(index: Value, read: Read, at: Sequence[str], size: int) -> str:
    """Reads a place that data name."""
    if index.is_vector or index.dtype is not torch.int64:
        raise CannotGenerate("places that depend on the position, or a mask of places")
    return f"row({read(index, at).code}, {size})"


def _picked(schedule: Schedule, args: Any, kwargs: Any, shape: Shape, dtype: torch.dtype) -> Value:
    """Reads ``x[..., index, ...]`` with one block of indexed dimensions."""
    source, places = args[0], list(args[1])
    places += [None] * (len(source.shape) - len(places))
    indexed = [dim for dim, index in enumerate(places) if index is not None]
    first, last = indexed[0], indexed[-1]
    if indexed != list(range(first, last + 1)):
        raise CannotGenerate("indices with a gap between them")
    for dim in indexed:
        _place_of(places[dim], lambda value, at: value.at(at), ["0"] * 9, 1)
    width = len(shape) - (len(source.shape) - len(indexed))

    def emit(read: Read, at: Sequence[str]) -> Expression:
        inner = at[first : first + width]
        moved = [*at[:first]]
        moved += [_place_of(places[d], read, inner, source.shape[d]) for d in indexed]
        return read(source, [*moved, *at[first + width :]])

    indices = tuple(places[dim] for dim in indexed)
    return schedule.member((), (source, *indices), emit, shape, dtype)


def _index_select(
    schedule: Schedule, args: Any, kwargs: Any, shape: Shape, dtype: torch.dtype
) -> Value:
    source, dim, index = args
    places = [None] * (dim % len(source.shape)) + [index.reshaped((index.size,))]
    return _picked(schedule, (source, places), {}, shape, dtype)


def _embedding(
    schedule: Schedule, args: Any, kwargs: Any, shape: Shape, dtype: torch.dtype
) -> Value:
    return _picked(schedule, (args[0], [args[1]]), {}, shape, dtype)


def _gather(schedule: Schedule, args: Any, kwargs: Any, shape: Shape, dtype: torch.dtype) -> Value:
    source, dim, index = args[:3]
    dim %= len(shape)
    _place_of(index, lambda value, at: value.at(at), ["0"] * 9, 1)

    def emit(read: Read, at: Sequence[str]) -> Expression:
        place = _place_of(index, read, at, source.shape[dim])
        return read(source, _moved(at, dim, place))

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
    schedule: Schedule, args: Any, kwargs: Any, shape: Shape, dtype: torch.dtype
) -> Value:
    start, places, rows = args[:3]
    accumulate = bool(args[3]) if len(args) > 3 else bool(kwargs.get("accumulate", False))
    if any(index is None for index in places):
        raise CannotGenerate("rows put at some dimensions")
    named = torch.broadcast_shapes(*(index.shape for index in places))
    rows = expanded(rows, (*named, *shape[len(places) :]))

    def place(read: Read, at: Sequence[str]) -> list[str]:
        own = [
            _place_of(index, read, at[: len(named)], size)
            for index, size in zip(places, shape, strict=False)
        ]
        return [*own, *at[len(named) :]]

    return _scattered(schedule, start, rows, place, accumulate)


def _along(schedule: Schedule, start: Value, dim: int, index: Value, rows: Value) -> Value:
    """Adds rows along one dimension, each to the place that its own index names."""
    dim %= len(start.shape)
    sizes = zip(rows.shape, index.shape, strict=True)
    rows = rows.viewed([min(pair) for pair in sizes], rows.strides)

    def place(read: Read, at: Sequence[str]) -> list[str]:
        return _moved(at, dim, _place_of(index, read, at, start.shape[dim]))

    return _scattered(schedule, start, rows, place, True)


def _scatter_add(
    schedule: Schedule, args: Any, kwargs: Any, shape: Shape, dtype: torch.dtype
) -> Value:
    return _along(schedule, *args)


def _index_add(
    schedule: Schedule, args: Any, kwargs: Any, shape: Shape, dtype: torch.dtype
) -> Value:
    start, dim, index, rows = args
    if kwargs.get("alpha", 1) != 1 or len(index.shape) != 1:
        raise CannotGenerate("rows added with a factor")
    dim %= len(shape)
    strides = [0] * len(rows.shape)
    strides[dim] = index.strides[0]
    return _along(schedule, start, dim, index.viewed(rows.shape, strides), rows)


def _embedding_backward(
    schedule: Schedule, args: Any, kwargs: Any, shape: Shape, dtype: torch.dtype
) -> Value:
    rows, index, _, padding, scaled = args
    if padding >= 0 or scaled:
        raise CannotGenerate("an embedding with options")
    start = Value.filled(0.0, dtype, shape)
    return _index_put(schedule, (start, [index], rows, True), {}, shape, dtype)


def _diagonal_backward(
    schedule: Schedule, args: Any, kwargs: Any, shape: Shape, dtype: torch.dtype
) -> Value:
    source, _, shift, first, second = args
    first, second = first % len(shape), second % len(shape)

    def emit(read: Read, at: Sequence[str]) -> Expression:
        rest = [index for dim, index in enumerate(at) if dim not in (first, second)]
        element = read(source, [*rest, at[first] if shift >= 0 else at[second]])
        test = f"{at[second]} - {at[first]} == {shift}"
        return _alternatives([(test, element)], literal(0.0, dtype))

    return schedule.member((), (source,), emit, shape, dtype)


def _batched(value: Value) -> Value:
    return value.viewed((1, *value.shape), (0, *value.strides))


def _unbatched(value: Value, shape: Shape) -> Value:
    found = value.reshaped(shape)
    if found is None:
        raise CannotGenerate("a product of unknown shape")
    return found


def _product(
    schedule: Schedule, args: Any, kwargs: Any, shape: Shape, dtype: torch.dtype
) -> Value:
    """Multiplies matrices, a matrix and a vector, or two vectors."""
    left, right = args
    if len(left.shape) == 1:
        left = left.viewed((1, *left.shape), (0, *left.strides))
    if len(right.shape) == 1:
        right = right.viewed((*right.shape, 1), (*right.strides, 0))
    result = schedule.product(_batched(left), _batched(right), None, dtype)
    return _unbatched(result, shape)


def _bmm(schedule: Schedule, args: Any, kwargs: Any, shape: Shape, dtype: torch.dtype) -> Value:
    return schedule.product(args[0], args[1], None, dtype)


def _addmm(schedule: Schedule, args: Any, kwargs: Any, shape: Shape, dtype: torch.dtype) -> Value:
    added, left, right = args[:3]
    if any(kwargs.get(name, 1) != 1 for name in ("alpha", "beta")) or len(args) > 3:
        raise CannotGenerate("a product with factors")
    if len(right.shape) == 1:  # addmv
        right = right.viewed((*right.shape, 1), (*right.strides, 0))
        added = added.viewed((*added.shape, 1), (*added.strides, 0))
    if len(left.shape) == 2:
        left, right = _batched(left), _batched(right)
    return _unbatched(schedule.product(left, right, added, dtype), shape)


def _scan(join: str) -> Rule:
    def rule(schedule: Schedule, args: Any, kwargs: Any, shape: Shape, dtype: torch.dtype) -> Value:
        source, dim = args[:2]
        if not shape:
            raise CannotGenerate("a cumulative sum of one number")
        if source.dtype is not dtype:
            source = schedule.map(aten._to_copy.default, (source,), {}, shape, dtype)
        result = schedule.new(shape, dtype, is_vector=source.is_vector)
        return schedule.alone(Scan(result, source, dim % len(shape), join))

    return rule


def _triangle(*, upper: bool) -> Rule:
    def rule(schedule: Schedule, args: Any, kwargs: Any, shape: Shape, dtype: torch.dtype) -> Value:
        source, shift = [*args, 0][:2]

        def emit(read: Read, at: Sequence[str]) -> Expression:
            test = f"{at[-1]} - {at[-2]} {'>=' if upper else '<='} {shift}"
            return _alternatives([(test, read(source, at))], literal(0.0, dtype))

        return schedule.member((source,), (), emit, shape, dtype)

    return rule


def _arange(schedule: Schedule, args: Any, kwargs: Any, shape: Shape, dtype: torch.dtype) -> Value:
    start, step = (args[0] if len(args) > 1 else 0), (args[2] if len(args) > 2 else 1)

    def emit(read: Read, at: Sequence[str]) -> Expression:
        index = converted(Expression(f"((i64){at[0]})", torch.int64, False), dtype)
        first, width = literal(start, dtype), literal(step, dtype)
        return Expression(f"({first.code} + {width.code} * {index.code})", dtype, False)

    return schedule.member((), (), emit, shape, dtype)


def _matrices(schedule: Schedule, value: Value) -> Value:
    """Joins the dimensions of a batch of matrices."""
    return schedule.reshaped(value, (-1, *value.shape[-2:]))


def _cholesky(schedule: Schedule, args: Any, kwargs: Any, shape: Shape, dtype: Any) -> Any:
    if (len(args) > 1 and args[1]) or kwargs.get("upper"):
        raise CannotGenerate("an upper factor")
    matrix = _matrices(schedule, args[0])
    result = schedule.new(matrix.shape, matrix.dtype, is_vector=matrix.is_vector)
    schedule.alone(Cholesky(result, matrix), work=result.size * matrix.shape[-1] // 3)
    info = Value.filled(0.0, torch.int64, args[0].shape[:-2])
    return schedule.reshaped(result, args[0].shape), info


def _solve(schedule: Schedule, args: Any, kwargs: Any, shape: Shape, dtype: torch.dtype) -> Value:
    matrix, right = args[:2]
    is_upper, is_unit = kwargs["upper"], kwargs.get("unitriangular", False)
    batch = torch.broadcast_shapes(matrix.shape[:-2], right.shape[:-2])
    matrix = _matrices(schedule, expanded(matrix, (*batch, *matrix.shape[-2:])))
    right = _matrices(schedule, expanded(right, (*batch, *right.shape[-2:])))
    from_left = kwargs.get("left", True)
    result = schedule.new(right.shape, dtype, is_vector=matrix.is_vector or right.is_vector)
    work = right.size * matrix.shape[-1] // 2
    if from_left:
        schedule.alone(Solve(result, matrix, right, is_upper, is_unit), work=work)
    else:  # result @ matrix = right, transposed
        turned = [transposed(value) for value in (result, matrix, right)]
        schedule.alone(Solve(*turned, not is_upper, is_unit), work=work)
    return schedule.reshaped(result, shape)


def _max(schedule: Schedule, args: Any, kwargs: Any, shape: Shape, dtype: torch.dtype) -> Any:
    """The largest elements; which they are is not known."""
    source, dim = args[:2]
    keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    size = list(source.shape)
    size[dim] = 1
    if not keep:
        del size[dim]
    return schedule.largest(source, dim, tuple(size)), None


# What has several results, or results without a shape.
SEVERAL: dict[Any, Callable[..., Any]] = {
    aten.linalg_cholesky_ex.default: _cholesky,
    aten.max.dim: _max,
    aten._linalg_check_errors.default: lambda *_: None,
}
RULES: dict[Any, Rule] = {
    aten.linalg_solve_triangular.default: _solve,
    **dict.fromkeys((aten.arange.default, aten.arange.start, aten.arange.start_step), _arange),
    aten.cumsum.default: _scan("{0} + {1}"),
    aten.cumprod.default: _scan("{0} * {1}"),
    aten.tril.default: _triangle(upper=False),
    aten.triu.default: _triangle(upper=True),
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.slice_backward.default: _slice_backward,
    aten.select_backward.default: _select_backward,
    aten.constant_pad_nd.default: _pad,
    aten.index.Tensor: _picked,
    aten._unsafe_index.Tensor: _picked,
    aten.index_select.default: _index_select,
    aten.embedding.default: _embedding,
    aten.gather.default: _gather,
    aten.index_put.default: _index_put,
    aten._unsafe_index_put.default: _index_put,
    aten.scatter_add.default: _scatter_add,
    aten.index_add.default: _index_add,
    aten.embedding_dense_backward.default: _embedding_backward,
    aten.diagonal_backward.default: _diagonal_backward,
    aten.mm.default: _product,
    aten.mv.default: _product,
    aten.dot.default: _product,
    aten.bmm.default: _bmm,
    aten.addmm.default: _addmm,
    aten.addmv.default: _addmm,
    aten.baddbmm.default: _addmm,
}
