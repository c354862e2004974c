"""Log densities and gradients of one chain through the model itself, the way that is recorded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..models.modes import DispatchMode

__all__ = [
    "LINALG_ERROR",
    "FailuresAsNaN",
    "LogDensities",
    "Outputs",
    "as_written",
    "evaluate",
    "evaluate_or_nan",
    "evaluate_weighted",
    "values_of",
]

aten = torch.ops.aten


# Not in the stubs of every version of torch.
LINALG_ERROR: type[RuntimeError] = vars(torch.linalg)["LinAlgError"]


LogDensities = Callable[[Tensor], tuple[Tensor, Tensor]]


Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


class FailuresAsNaN(DispatchMode):
    """Makes a failed factorization return NaN instead of raising, matrix by matrix.

    ``torch.linalg.cholesky``, ``inv``, ``solve`` and ``lu_factor`` are two operations: one that
    reports failures in an ``info`` tensor, one that raises on it. Here the second is skipped and
    the results of the first are NaN where ``info`` is not zero, so a bad proposal of one chain is
    rejected and the other chains go on.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs one operation."""
        kwargs = dict(kwargs or {})
        if func is aten._linalg_check_errors.default:
            return None
        if "check_errors" in kwargs:
            kwargs["check_errors"] = False
        result = func(*args, **kwargs)
        returns = func._schema.returns
        if len(returns) < 2 or returns[-1].name != "info":
            return result
        *values, info = result
        failed = info.ne(0)
        return (*[_nan_where(failed, value) for value in values], info)


def _nan_where(failed: Tensor, value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value
    failed = failed.reshape(failed.shape + (1,) * (value.dim() - failed.dim()))
    return torch.where(failed, torch.nan, value)


def evaluate(
    function: LogDensities,
    position: Tensor,
    *,
    gradients: bool = True,
) -> Outputs:
    """Computes both log densities and their gradients for one chain.

    Args:
        function: One chain's ``(log_base, log_target)``, each of shape ``[*batch]``.
        position: Unconstrained position, shape ``[*batch, D]``.
        gradients: Whether gradients are needed; zeros if not, and the function may leave torch.

    Returns:
        Log densities ``[*batch]`` and gradients ``[*batch, D]``; a gradient is zero where the
        density does not depend on the position.

    Raises:
        ValueError: If a log density has another shape.
    """
    context: Any = getattr(function, "context", nullcontext)  # backward passes need it as well
    with torch.enable_grad() if gradients else torch.no_grad(), as_written(), context():
        leaf = position.detach().requires_grad_(gradients)
        log_densities = values_of(function, leaf)
        grads = [_gradient(value, leaf) for value in log_densities]
    log_base, log_target = (value.detach().contiguous() for value in log_densities)
    return log_base, log_target, grads[0].contiguous(), grads[1].contiguous()


def evaluate_weighted(
    function: LogDensities, position: Tensor, row_weights: Tensor
) -> tuple[Outputs, tuple[Tensor, Tensor]]:
    """Computes :func:`evaluate`, and the gradients of sums with weights of rows, by one run.

    Args:
        function: One chain's ``(log_base, log_target)``, each of shape ``[*batch]``.
        position: Unconstrained position, shape ``[*batch, D]``.
        row_weights: Weights ``[*batch]`` of the rows in the sums of the second gradients.

    Returns:
        As :func:`evaluate`, and the gradients of the two weighted sums, ``[*batch, D]``.

    Raises:
        ValueError: If a log density has another shape.
    """
    context: Any = getattr(function, "context", nullcontext)
    with torch.enable_grad(), as_written(), context():
        leaf = position.detach().requires_grad_()
        log_densities = values_of(function, leaf)
        plain = [_gradient(value, leaf).contiguous() for value in log_densities]
        weighted = [_gradient(value * row_weights, leaf) for value in log_densities]
    log_base, log_target = (value.detach().contiguous() for value in log_densities)
    return (log_base, log_target, plain[0], plain[1]), (weighted[0], weighted[1])


@contextmanager
def as_written() -> Iterator[None]:
    """Runs what a model has compiled by itself as it is written, where torch can: from 2.6 on.

    A compiled module keeps no graph that could be differentiated twice, nor recorded.
    """
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is None or not hasattr(torch.compiler, "set_stance"):
        yield
        return
    with (
        torch.compiler.set_stance("force_eager"),
        dynamo.config.patch(error_on_nested_fx_trace=False),
    ):
        yield


def values_of(function: LogDensities, position: Tensor) -> tuple[Tensor, Tensor]:
    """Computes both log densities of one chain, and checks that there is one per row."""
    log_densities = function(position)
    for name, value in zip(("log_base", "log_target"), log_densities, strict=True):
        if value.shape != position.shape[:-1]:
            raise ValueError(
                f"{name} has shape {list(value.shape)}, expected {list(position.shape[:-1])}: "
                f"one log density per row of the position {list(position.shape)}"
            )
    return log_densities


def _gradient(value: Tensor, leaf: Tensor) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    # Rows are independent, so the gradient of the sum holds every row's own gradient. The graph is
    # retained because base and target share parts of it.
    (grad,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True, allow_unused=True)
    return torch.zeros_like(leaf) if grad is None else grad.detach()


def evaluate_or_nan(
    function: LogDensities, position: Tensor, *, strict: bool = False, gradients: bool = True
) -> Outputs:
    """Computes :func:`evaluate`, with NaN where a model raises at this position.

    Args:
        function: One chain's ``(log_base, log_target)``.
        position: Unconstrained position, shape ``[*batch, D]``.
        strict: Whether only failed factorizations count; other errors are raised.
        gradients: As in :func:`evaluate`.

    Returns:
        As :func:`evaluate`; NaN log densities with zero gradients if the whole chain fails.
    """
    try:
        return evaluate(function, position, gradients=gradients)
    except torch.cuda.OutOfMemoryError:
        raise
    except (ValueError, ArithmeticError, RuntimeError) as error:
        if strict and not isinstance(error, LINALG_ERROR):
            raise
    try:
        with FailuresAsNaN():  # spares the rows that did not fail
            return evaluate(function, position, gradients=gradients)
    except torch.cuda.OutOfMemoryError:
        raise
    except (ValueError, ArithmeticError, RuntimeError):
        if strict:
            raise
    nan = torch.full(position.shape[:-1], torch.nan, dtype=position.dtype, device=position.device)
    zero = torch.zeros_like(position, memory_format=torch.contiguous_format)
    return nan, nan, zero, zero
