r"""Graphs of one chain's densities: traced, made functional, batched over chains, split.

The order of the passes matters. Autograd runs first, on the user's own code, so that its custom
gradients, ``detach`` and ``no_grad`` count; what it did is recorded as a flat graph of aten
operations (:func:`trace`). Only then are in-place writes removed, and only then is the graph
vectorized over chains (:func:`batch`): user code and its ``autograd.Function`` classes, which
:func:`torch.func.vmap` would refuse, are no longer in it. Last, everything that does not depend on
the position is split off, to run once per annealing run instead of once per evaluation
(:func:`split`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_innermost_proxy_mode,
    make_fx,
)
from torch.fx.passes.shape_prop import ShapeProp
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .folding import fold_uniform, shapes_to_literals, simplify
from .rewriting import (
    dependent_nodes,
    is_mutable,
    lift_constants,
    make_batchable,
    refuse_impurities,
)

__all__ = [
    "FailuresAsNaN",
    "Trace",
    "batch",
    "evaluate",
    "evaluate_or_nan",
    "flat_graph",
    "split",
    "trace",
]

aten = torch.ops.aten
# Not in the stubs of every version of torch.
LINALG_ERROR: type[RuntimeError] = vars(torch.linalg)["LinAlgError"]
LogDensities = Callable[[Tensor], tuple[Tensor, Tensor]]
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Trace:
    """Log densities and gradients as a functional graph."""

    graph: fx.GraphModule  # (position, *constants) -> Outputs
    constants: list[Tensor]  # the live tensors that the function read: parameters, data, buffers


class FailuresAsNaN(TorchDispatchMode):
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


class _Recording(FailuresAsNaN):
    """Lets numbers leave the graph that do not depend on the position.

    A branch on the data, a loop over ``range(len(x))`` or over a sequential plate are the same in
    every evaluation. ``make_fx`` refuses them all, since it does not know which operations lie
    between the position and a number; this mode follows the position through the storages it
    reaches. The numbers are recorded as constants.
    """

    def __init__(self, position: Tensor) -> None:
        super().__init__()
        self.reached = {_storage(position)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs one operation and notes where the position's influence goes."""
        inputs = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        depends = any(_storage(x) in self.reached for x in inputs)
        if torch.Tag.data_dependent_output in func.tags and not depends:
            with disable_proxy_modes_tracing():
                return func(*args, **(kwargs or {}))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        written = inputs[:1] if func._schema.is_mutable else []
        for output in (*written, *pytree.tree_leaves(result)):
            if isinstance(output, Tensor) and depends:
                self.reached.add(_storage(output))
            elif isinstance(output, Tensor):
                self.reached.discard(_storage(output))  # the address of a freed storage
        return result


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _nan_where(failed: Tensor, value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value
    failed = failed.reshape(failed.shape + (1,) * (value.dim() - failed.dim()))
    return torch.where(failed, torch.nan, value)


def evaluate(function: LogDensities, position: Tensor) -> Outputs:
    """Computes both log densities and their gradients for one chain.

    Args:
        function: One chain's ``(log_base, log_target)``, each of shape ``[*batch]``.
        position: Unconstrained position, shape ``[*batch, D]``.

    Returns:
        Log densities ``[*batch]`` and gradients ``[*batch, D]``; a gradient is zero where the
        density does not depend on the position.

    Raises:
        ValueError: If a log density has another shape.
    """
    with torch.enable_grad():
        leaf = position.detach().requires_grad_()
        log_densities = function(leaf)
        for name, value in zip(("log_base", "log_target"), log_densities, strict=True):
            if value.shape != position.shape[:-1]:
                raise ValueError(
                    f"{name} has shape {list(value.shape)}, expected {list(position.shape[:-1])}: "
                    f"one log density per row of the position {list(position.shape)}"
                )
        grads = [_gradient(value, leaf) for value in log_densities]
    log_base, log_target = (value.detach().contiguous() for value in log_densities)
    return log_base, log_target, grads[0].contiguous(), grads[1].contiguous()


def _gradient(value: Tensor, leaf: Tensor) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    # Rows are independent, so the gradient of the sum holds every row's own gradient. The graph is
    # retained because base and target share parts of it.
    (grad,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True, allow_unused=True)
    return torch.zeros_like(leaf) if grad is None else grad.detach()


def evaluate_or_nan(function: LogDensities, position: Tensor, *, strict: bool = False) -> Outputs:
    """Computes :func:`evaluate`, with NaN where a model raises at this position.

    Args:
        function: One chain's ``(log_base, log_target)``.
        position: Unconstrained position, shape ``[*batch, D]``.
        strict: Whether only failed factorizations count; other errors are raised.

    Returns:
        As :func:`evaluate`; NaN log densities with zero gradients if the whole chain fails.
    """
    try:
        return evaluate(function, position)
    except torch.cuda.OutOfMemoryError:
        raise
    except (ValueError, ArithmeticError, RuntimeError) as error:
        if strict and not isinstance(error, LINALG_ERROR):
            raise
    try:
        with FailuresAsNaN():  # spares the rows that did not fail
            return evaluate(function, position)
    except torch.cuda.OutOfMemoryError:
        raise
    except (ValueError, ArithmeticError, RuntimeError):
        if strict:
            raise
    nan = torch.full(position.shape[:-1], torch.nan, dtype=position.dtype, device=position.device)
    zero = torch.zeros_like(position, memory_format=torch.contiguous_format)
    return nan, nan, zero, zero


def _sources_when_called() -> AbstractContextManager[Any]:
    """Makes the source of recorded graphs when they are first called, where torch can."""
    try:
        from torch.fx._lazy_graph_module import _use_lazy_graph_module
    except ImportError:
        return nullcontext()
    return _use_lazy_graph_module(True)


def flat_graph(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """Records aten operations with make_fx, under one fake mode.

    make_fx describes every value by a fake tensor and, where it finds no fake mode, makes a new one
    for each: most of the time of a recording. The graph's source is made when it is first called,
    not after each pass. What recorded refers to itself; emptied, it does not hold the tensors that
    the function read until garbage is collected.
    """
    tracers: list[Any] = []

    def noted(*inputs: Tensor) -> Any:
        mode = get_innermost_proxy_mode()
        if mode is not None:
            tracers.append(mode.tracer)
        return function(*inputs)

    try:
        fakes = FakeTensorMode(allow_fallback_kernels=True)
        with tracing(TracingContext(fakes)), _sources_when_called():
            return make_fx(noted)(*inputs)
    finally:
        for tracer in tracers:
            vars(tracer).clear()


def trace(function: LogDensities, position: Tensor) -> Trace:
    """Records :func:`evaluate` as a functional graph whose every constant is an input.

    Args:
        function: One chain's ``(log_base, log_target)``.
        position: Example position, shape ``[*batch, D]``.

    Returns:
        The graph and the live tensors to call it with.

    Raises:
        Unsupported: If operations' shapes depend on the position.
        Impure: If the function writes into a tensor that it did not create, or draws randomly.
        Exception: Whatever :func:`~torch.fx.experimental.proxy_tensor.make_fx` or the function
            raise, for example at a branch that depends on the position.
    """

    def recorded(leaf: Tensor) -> Outputs:
        with _Recording(leaf):
            return evaluate(function, leaf)

    graph = flat_graph(recorded, position)
    constants = lift_constants(graph)
    inputs = [position, *(constant.detach() for constant in constants)]
    if any(is_mutable(node) for node in graph.graph.nodes):
        functional = torch.func.functionalize(graph, remove="mutations")
        graph = flat_graph(functional, *inputs)
        constants += lift_constants(graph)
    refuse_impurities(graph)
    ShapeProp(graph).propagate(position, *(constant.detach() for constant in constants))
    shapes_to_literals(graph, position.device)
    constants += make_batchable(graph, position.device)
    fold_uniform(simplify(graph), position.device)
    return Trace(simplify(graph), constants)


def batch(graph: fx.GraphModule, position: Tensor, constants: Sequence[Tensor]) -> Trace:
    """Vectorizes a graph over chains.

    Args:
        graph: One chain's graph.
        position: Example positions of K chains, shape ``[K, *batch, D]``.
        constants: What the graph is called with besides the position.

    Returns:
        The graph of K chains, as flat aten operations again, with the same constants first.

    Raises:
        Exception: Whatever :func:`torch.func.vmap` raises for an operation it does not know.
    """

    def chains(position: Tensor, *constants: Tensor) -> tuple[Tensor, ...]:
        in_dims = (0, *(None for _ in constants))
        results = torch.func.vmap(graph, in_dims=in_dims)(position, *constants)
        return tuple(result.contiguous() for result in results)

    with torch.no_grad(), warnings.catch_warnings():
        # A missing batching rule only means one operation per chain, unrolled into the graph.
        warnings.simplefilter("ignore")
        batched = flat_graph(chains, position, *constants)
        constants = [*constants, *lift_constants(batched)]
        ShapeProp(batched).propagate(position, *constants)
    return Trace(simplify(batched), constants)


def split(graph: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Splits off everything that does not depend on the position.

    Args:
        graph: Graph of ``(position, *constants)``.

    Returns:
        The prologue ``(*constants) -> values`` and the body ``(position, *values) -> Outputs``.
    """
    dependent = dependent_nodes(graph)
    position, *constants = [node for node in graph.graph.nodes if node.op == "placeholder"]
    (output,) = [node for node in graph.graph.nodes if node.op == "output"]
    users = [node for node in graph.graph.nodes if node in dependent or node is output]
    values = list(
        dict.fromkeys(n for user in users for n in user.all_input_nodes if n not in dependent)
    )

    prologue, body = fx.Graph(), fx.Graph()
    early: dict[fx.Node, fx.Node] = {}
    late = {position: body.placeholder("position")}
    for number, node in enumerate(constants):
        early[node] = prologue.placeholder(f"constant_{number}")
    for number, node in enumerate(values):
        late[node] = body.placeholder(f"value_{number}")
    for node in graph.graph.nodes:
        if node.op == "call_function" and node in dependent:
            late[node] = body.node_copy(node, late.__getitem__)
        elif node.op == "call_function":
            early[node] = prologue.node_copy(node, early.__getitem__)
    prologue.output(tuple(early[node] for node in values))
    body.output(fx.map_arg(output.args[0], late.__getitem__))
    for part in (prologue, body):
        part.eliminate_dead_code()
        part.lint()
    return fx.GraphModule(torch.nn.Module(), prologue), fx.GraphModule(torch.nn.Module(), body)
