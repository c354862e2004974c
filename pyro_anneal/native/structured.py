"""Operations that join, place and pick elements, and products of matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .arguments import Args, Kwargs, OpOverload
from .places import PLACES, alternatives, moved, which
from .stages import Cholesky, Read, Scan, Solve
from .sums import EXPONENTIALS
from .values import CannotGenerate, Expression, Value, converted, literal
from .views import expanded, transposed

if TYPE_CHECKING:
    from .schedule import Schedule

__all__ = ["RULES", "SEVERAL"]

aten = torch.ops.aten
Shape = tuple[int, ...]
Rule = Callable[["Schedule", Args, Kwargs, Shape, torch.dtype], Value]


def _joined(
    schedule: Schedule, parts: Sequence[Value], dim: int, shape: Shape, dtype: torch.dtype
) -> Value:
    parts = [part for part in parts if part.size]

    def emit(read: Read, at: Sequence[str]) -> Expression:
        cases, start = [], 0
        for part in parts:
            index = at[dim] if start == 0 else f"({at[dim]} - {start})"
            element = converted(read(part, moved(at, dim, index)), dtype)
            start += part.shape[dim]
            cases.append((f"{at[dim]} < {start}", element))
        return alternatives(cases[:-1], cases[-1][1])

    return schedule.member((), tuple(parts), emit, shape, dtype)


def _cat(
    schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
) -> Value:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    return _joined(schedule, args[0], dim % len(shape), shape, dtype)


def _stack(
    schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
) -> Value:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % len(shape)
    size = (*shape[:dim], 1, *shape[dim + 1 :])
    parts = []
    for part in args[0]:
        strides = (*part.strides[:dim], 0, *part.strides[dim:])
        parts.append(part.viewed(size, strides))
    return _joined(schedule, parts, dim, shape, dtype)


def _placed(
    schedule: Schedule,
    source: Value,
    dim: int,
    chosen: range,
    shape: Shape,
    dtype: torch.dtype,
    into: Value | None = None,
) -> Value:
    """Puts a slice into zeros, or into another array."""

    def emit(read: Read, at: Sequence[str]) -> Expression:
        index = at[dim]
        zero = literal(0.0, dtype) if into is None else read(into, at)
        if not chosen:
            return zero
        inside = f"{index} >= {chosen.start} && {index} <= {chosen[-1]}"
        place = f"({index} - {chosen.start})" if chosen.start else index
        if chosen.step != 1:
            inside += f" && {place} % {chosen.step} == 0"
            place = f"({place} / {chosen.step})"
        element = converted(read(source, moved(at, dim, place)), dtype)
        return alternatives([(inside, element)], zero)

    return schedule.member(() if into is None else (into,), (source,), emit, shape, dtype)


def _slice_scatter(
    schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
) -> Value:
    into, source, dim, *bounds = [*args, 0][:3] if len(args) < 3 else args
    dim %= len(shape)
    chosen = range(shape[dim])[slice(*bounds) if bounds else slice(None)]
    return _placed(schedule, source, dim, chosen, shape, dtype, into)


def _select_scatter(
    schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
) -> Value:
    into, source, dim, index = args
    dim %= len(shape)
    index %= shape[dim]
    return _placed(
        schedule, _with_dim(source, dim), dim, range(index, index + 1), shape, dtype, into
    )


def _with_dim(source: Value, dim: int) -> Value:
    size, strides = list(source.shape), list(source.strides)
    size.insert(dim, 1)
    strides.insert(dim, 0)
    return source.viewed(size, strides)


def _slice_backward(
    schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
) -> Value:
    source, _, dim, *bounds = args
    dim %= len(shape)
    return _placed(schedule, source, dim, range(shape[dim])[slice(*bounds)], shape, dtype)


def _select_backward(
    schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
) -> Value:
    source, _, dim, index = args
    dim %= len(shape)
    index %= shape[dim]
    chosen = range(index, index + 1)
    return _placed(schedule, _with_dim(source, dim), dim, chosen, shape, dtype)


def _pad(
    schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
) -> Value:
    source, widths, number = [*args, 0.0][:3]
    low = [0] * len(shape)
    for k in range(len(widths) // 2):
        low[len(shape) - 1 - k] = widths[2 * k]

    def emit(read: Read, at: Sequence[str]) -> Expression:
        where = [f"({i} - {before})" if before else i for i, before in zip(at, low, strict=True)]
        tests = [
            f"{i} >= {before} && {i} < {before + size}"
            for i, before, size in zip(at, low, source.shape, strict=True)
        ]
        inside = " && ".join(tests) or "true"
        return alternatives([(inside, read(source, where))], literal(number, dtype))

    return schedule.member((), (source,), emit, shape, dtype)


def _diagonal_backward(
    schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
) -> Value:
    source, _, shift, first, second = args
    return _on_diagonal(schedule, source, shift, (first, second), shape)


def _diag_embed(
    schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
) -> Value:
    shift, first, second = list(args[1:]) + [0, -2, -1][len(args) - 1 :]
    return _on_diagonal(schedule, args[0], shift, (first, second), shape)


def _on_diagonal(
    schedule: Schedule, source: Value, shift: int, dims: tuple[int, int], shape: Shape
) -> Value:
    """Puts elements on a diagonal of zeros."""
    first, second = (dim % len(shape) for dim in dims)
    dtype = source.dtype

    def emit(read: Read, at: Sequence[str]) -> Expression:
        rest = [index for dim, index in enumerate(at) if dim not in (first, second)]
        element = read(source, [*rest, at[first] if shift >= 0 else at[second]])
        test = f"{at[second]} - {at[first]} == {shift}"
        return alternatives([(test, element)], literal(0.0, dtype))

    return schedule.member((), (source,), emit, shape, dtype)


def _batched(value: Value) -> Value:
    return value.viewed((1, *value.shape), (0, *value.strides))


def _unbatched(value: Value, shape: Shape) -> Value:
    found = value.reshaped(shape)
    if found is None:
        raise CannotGenerate("a product of unknown shape")
    return found


def _product(
    schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
) -> Value:
    """Multiplies matrices, a matrix and a vector, or two vectors."""
    left, right = args
    if len(left.shape) == 1:
        left = left.viewed((1, *left.shape), (0, *left.strides))
    if len(right.shape) == 1:
        right = right.viewed((*right.shape, 1), (*right.strides, 0))
    result = schedule.product(_batched(left), _batched(right), None, dtype)
    return _unbatched(result, shape)


def _bmm(
    schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
) -> Value:
    return schedule.product(args[0], args[1], None, dtype)


def _addmm(
    schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
) -> Value:
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
    def rule(
        schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
    ) -> Value:
        source, dim = args[:2]
        if not shape:
            raise CannotGenerate("a cumulative sum of one number")
        if source.dtype is not dtype:
            source = schedule.map(aten._to_copy.default, (source,), {}, shape, dtype)
        result = schedule.new(shape, dtype, is_vector=source.is_vector)
        return schedule.alone(Scan(result, source, dim % len(shape), join))

    return rule


def _triangle(*, upper: bool) -> Rule:
    def rule(
        schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
    ) -> Value:
        source, shift = [*args, 0][:2]

        def emit(read: Read, at: Sequence[str]) -> Expression:
            test = f"{at[-1]} - {at[-2]} {'>=' if upper else '<='} {shift}"
            return alternatives([(test, read(source, at))], literal(0.0, dtype))

        return schedule.member((source,), (), emit, shape, dtype)

    return rule


def _arange(
    schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
) -> Value:
    start, step = (args[0] if len(args) > 1 else 0), (args[2] if len(args) > 2 else 1)

    def emit(read: Read, at: Sequence[str]) -> Expression:
        index = converted(Expression(f"((i64){at[0]})", torch.int64, False), dtype)
        first, width = literal(start, dtype), literal(step, dtype)
        return Expression(f"({first.code} + {width.code} * {index.code})", dtype, False)

    return schedule.member((), (), emit, shape, dtype)


def _matrices(schedule: Schedule, value: Value) -> Value:
    """Joins the dimensions of a batch of matrices."""
    return schedule.reshaped(value, (-1, *value.shape[-2:]))


def _cholesky(
    schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
) -> Any:
    if (len(args) > 1 and args[1]) or kwargs.get("upper"):
        raise CannotGenerate("an upper factor")
    matrix = _matrices(schedule, args[0])
    result = schedule.new(matrix.shape, matrix.dtype, is_vector=matrix.is_vector)
    schedule.alone(Cholesky(result, matrix), work=result.size * matrix.shape[-1] // 3)
    info = Value.filled(0.0, torch.int64, args[0].shape[:-2])
    return schedule.reshaped(result, args[0].shape), info


def _solve(
    schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
) -> Value:
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
        turned = transposed(result)
        solve = Solve(turned, transposed(matrix), transposed(right), not is_upper, is_unit)
        schedule.alone(solve, work=work)
    return schedule.reshaped(result, shape)


def _max(schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype) -> Any:
    """The largest elements, and which they are."""
    source, dim = args[:2]
    keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    dim %= len(source.shape)
    size = list(source.shape)
    size[dim] = 1
    if not keep:
        del size[dim]
    return schedule.largest(source, dim, tuple(size)), which(schedule, source, dim, tuple(size))


# What has several results, or results without a shape.
SEVERAL: dict[OpOverload, Callable[..., Any]] = {
    aten.linalg_cholesky_ex.default: _cholesky,
    aten.max.dim: _max,
    aten._linalg_check_errors.default: lambda *_: None,
}
RULES: dict[OpOverload, Rule] = {
    **PLACES,
    **EXPONENTIALS,
    aten.linalg_solve_triangular.default: _solve,
    **dict.fromkeys((aten.arange.default, aten.arange.start, aten.arange.start_step), _arange),
    aten.cumsum.default: _scan("{0} + {1}"),
    aten.cumprod.default: _scan("{0} * {1}"),
    aten.tril.default: _triangle(upper=False),
    aten.triu.default: _triangle(upper=True),
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.slice_backward.default: _slice_backward,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
    aten.diag_embed.default: _diag_embed,
    aten.select_backward.default: _select_backward,
    aten.constant_pad_nd.default: _pad,
    aten.diagonal_backward.default: _diagonal_backward,
    aten.mm.default: _product,
    aten.mv.default: _product,
    aten.dot.default: _product,
    aten.bmm.default: _bmm,
    aten.addmm.default: _addmm,
    aten.addmv.default: _addmm,
    aten.baddbmm.default: _addmm,
}
