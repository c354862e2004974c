"""Exponentials that are summed, taken apart into operations on elements and sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .arguments import Args, Kwargs, OpOverload
from .values import CannotGenerate, Value

if TYPE_CHECKING:
    from .schedule import Schedule

__all__ = ["EXPONENTIALS"]

aten = torch.ops.aten
Shape = tuple[int, ...]


class _Steps:
    """Adds operations on the elements of one tensor, and sums over some of its dimensions."""

    def __init__(
        self, schedule: Schedule, shape: Shape, dims: list[int], dtype: torch.dtype
    ) -> None:
        self.schedule, self.shape, self.dtype = schedule, shape, dtype
        self.dims = [dim % len(shape) for dim in dims]
        self.kept = tuple(1 if d in self.dims else n for d, n in enumerate(shape))

    def __call__(self, target: OpOverload, *args: object) -> Value:
        tensors = [arg.shape for arg in args if isinstance(arg, Value)]
        shape = tuple(torch.broadcast_shapes(*tensors))
        return self.schedule.map(target, args, {}, shape, self.dtype)

    def sum(self, value: Value, target: OpOverload = aten.sum.dim_IntList) -> Value:
        return self.schedule.reduced(target, (value, self.dims), self.kept, self.dtype)


def _steps(schedule: Schedule, value: Value, dims: Any, dtype: torch.dtype) -> _Steps:
    if value.dtype is not dtype or not value.shape:
        raise CannotGenerate("a sum of exponentials of another type")
    return _Steps(schedule, value.shape, [dims] if isinstance(dims, int) else dims, dtype)


def _log_softmax(
    schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
) -> Value:
    step = _steps(schedule, args[0], args[1], dtype)
    shifted = step(aten.sub.Tensor, args[0], step.sum(args[0], aten.amax.default))
    total = step.sum(step(aten.exp.default, shifted))
    return step(aten.sub.Tensor, shifted, step(aten.log.default, total))


def _softmax(
    schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
) -> Value:
    step = _steps(schedule, args[0], args[1], dtype)
    shifted = step(aten.sub.Tensor, args[0], step.sum(args[0], aten.amax.default))
    exponential = step(aten.exp.default, shifted)
    return step(aten.div.Tensor, exponential, step.sum(exponential))


def _log_softmax_backward(
    schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
) -> Value:
    grad, output, dim = args[:3]
    step = _steps(schedule, grad, dim, dtype)
    share = step(aten.mul.Tensor, step(aten.exp.default, output), step.sum(grad))
    return step(aten.sub.Tensor, grad, share)


def _softmax_backward(
    schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
) -> Value:
    grad, output, dim = args[:3]
    step = _steps(schedule, grad, dim, dtype)
    product = step(aten.mul.Tensor, grad, output)
    return step(aten.sub.Tensor, product, step(aten.mul.Tensor, output, step.sum(product)))


def _logsumexp(
    schedule: Schedule, args: Args, kwargs: Kwargs, shape: Shape, dtype: torch.dtype
) -> Value:
    step = _steps(schedule, args[0], args[1], dtype)
    largest = step.sum(args[0], aten.amax.default)
    # where all are -inf, or one is inf, nothing is taken off
    finite = schedule.map(aten.isinf.default, (largest,), {}, largest.shape, torch.bool)
    largest = step(aten.masked_fill.Scalar, largest, finite, 0.0)
    total = step.sum(step(aten.exp.default, step(aten.sub.Tensor, args[0], largest)))
    result = step(aten.add.Tensor, step(aten.log.default, total), largest)
    return schedule.reshaped(result, shape)


EXPONENTIALS: dict[OpOverload, Callable[..., Value]] = {
    aten._log_softmax.default: _log_softmax,
    aten._softmax.default: _softmax,
    aten._log_softmax_backward_data.default: _log_softmax_backward,
    aten._softmax_backward_data.default: _softmax_backward,
    aten.logsumexp.default: _logsumexp,
}
