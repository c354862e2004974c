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

import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import ShapeProp
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "FailuresAsNaN",
    "Impure",
    "Trace",
    "Unsupported",
    "batch",
    "evaluate",
    "evaluate_or_nan",
    "is_random",
    "split",
    "trace",
]

aten = torch.ops.aten
# Not in the stubs of every version of torch.
LINALG_ERROR: type[RuntimeError] = vars(torch.linalg)["LinAlgError"]
LogDensities = Callable[[Tensor], tuple[Tensor, Tensor]]
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
_NO_END = 2**63 - 1  # how aten writes "to the end" in a slice


class Unsupported(Exception):
    """The function cannot be recorded faithfully; the message says why."""


class Impure(ValueError):
    """The function is no function of the latents alone: no mode of evaluation would be right."""


@dataclass(frozen=True, eq=False)
class Trace:
    """One chain's log densities and gradients as a functional graph."""

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
        super().__init__()

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
        with FailuresAsNaN():
            return evaluate(function, leaf)

    graph = make_fx(recorded)(position)
    constants = _lift_constants(graph)
    inputs = [position, *(constant.detach() for constant in constants)]
    if any(_is_mutable(node) for node in graph.graph.nodes):
        graph = make_fx(torch.func.functionalize(graph, remove="mutations"))(*inputs)
        _refuse_written_inputs(graph)
    _refuse_random(graph)
    ShapeProp(graph).propagate(*inputs)
    dependent = _dependent(graph)
    for node in list(graph.graph.nodes):
        _refuse_dynamic_shape(node, dependent)
        if node.target in (aten.as_strided.default, aten.as_strided_scatter.default):
            if node in dependent:
                constants.append(_unstride(node, position.device, len(constants)))
        else:
            _make_batchable(node, dependent)
    return Trace(_simplify(graph), constants)


def batch(graph: fx.GraphModule, position: Tensor, constants: Sequence[Tensor]) -> fx.GraphModule:
    """Vectorizes a graph over chains.

    Args:
        graph: One chain's graph.
        position: Example positions of K chains, shape ``[K, *batch, D]``.
        constants: What the graph is called with besides the position.

    Returns:
        The graph of K chains, as flat aten operations again.

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
        return _simplify(make_fx(chains)(position, *constants))


def split(graph: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Splits off everything that does not depend on the position.

    Args:
        graph: Graph of ``(position, *constants)``.

    Returns:
        The prologue ``(*constants) -> values`` and the body ``(position, *values) -> Outputs``.
    """
    dependent = _dependent(graph)
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


def is_random(func: Any, args: Sequence[Any] = ()) -> bool:
    """Tells whether an operation draws random numbers."""
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
        return False
    # Attention and fused dropout carry the tag even when their probability is zero.
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False))
    if "dropout_p" in names:
        return bool(given.get("dropout_p", 0.0))
    return not (given.get("train") is False or given.get("training") is False)


def _is_mutable(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and getattr(node.target, "_schema", None) is not None
        and (
            node.target._schema.is_mutable  # type: ignore[union-attr]
        )
    )


def _lift_constants(graph: fx.GraphModule) -> list[Tensor]:
    """Turns every captured tensor into an input, one per tensor, and returns the tensors."""
    placeholders: dict[int, fx.Node] = {}
    constants: list[Tensor] = []
    last = next(node for node in graph.graph.nodes if node.op == "placeholder")
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = operator.attrgetter(node.target)(graph)
        if id(tensor) not in placeholders:
            with graph.graph.inserting_after(last):
                last = graph.graph.placeholder(f"constant_{len(constants)}")
            placeholders[id(tensor)] = last
            constants.append(tensor)
        node.replace_all_uses_with(placeholders[id(tensor)])
        graph.graph.erase_node(node)
    graph.recompile()
    return constants


def _refuse_written_inputs(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        if _is_mutable(node) and node.args[0].op == "placeholder":
            shape = list(node.meta["val"].shape) if "val" in node.meta else "unknown"
            raise Impure(
                f"the density writes in place into a tensor of shape {shape} that it did not "
                "create (a buffer, a parameter or data): it must be a function of its latents "
                "alone; call .eval() on modules with running statistics, or write into a clone"
            )


def _refuse_random(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        if node.op == "call_function" and is_random(node.target, node.args):
            raise Impure(
                f"the density draws random numbers ({node.target}): annealing needs a "
                "deterministic density; call .eval() on modules with dropout"
            )


def _dependent(graph: fx.GraphModule) -> set[fx.Node]:
    """Collects the nodes that depend on the position, the first input."""
    dependent: set[fx.Node] = set()
    for node in graph.graph.nodes:
        first = node.op == "placeholder" and not dependent
        if node.op != "output" and (first or not dependent.isdisjoint(node.all_input_nodes)):
            dependent.add(node)
    return dependent


def _dtype(node: Any) -> torch.dtype | None:
    return getattr(node.meta.get("tensor_meta"), "dtype", None) if node is not None else None


def _refuse_dynamic_shape(node: fx.Node, dependent: set[fx.Node]) -> None:
    """Refuses operations whose result's shape follows from the position's values."""
    if node not in dependent or node.op != "call_function":
        return
    masks: Sequence[Any] = ()
    if node.target in (aten.index.Tensor, aten.index_put.default):
        masks = [i for i in node.args[1] if _dtype(i) is torch.bool]  # type: ignore[union-attr]
        dynamic = any(mask in dependent for mask in masks)
    else:
        dynamic = torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ()) and any(
            argument in dependent for argument in node.all_input_nodes
        )
    if dynamic:
        raise Unsupported(f"the shape of {node.target} depends on latent values")


def _make_batchable(node: fx.Node, dependent: set[fx.Node]) -> None:
    """Rewrites an operation that vmap does not know into ones that it knows."""
    if node.op != "call_function":
        return
    graph = node.graph
    if node.target in (aten.index.Tensor, aten.index_put.default):
        _masks_to_indices(node)
    elif node not in dependent:
        return
    elif node.target is aten.copy.default:
        operands: Any = node.args[:2]
        target, source = operands
        with graph.inserting_before(node):
            shape = list(target.meta["tensor_meta"].shape)
            new = graph.call_function(aten.expand.default, (source, shape))
            if _dtype(source) is not _dtype(target):
                new = graph.call_function(aten._to_copy.default, (new,), {"dtype": _dtype(target)})
        _replace(node, new)
    elif _NO_END in node.args:
        _close_slice(node)


def _replace(old: fx.Node, new: fx.Node) -> None:
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def _masks_to_indices(node: fx.Node) -> None:
    """Replaces constant boolean masks by the indices of their true elements."""
    indices: list[Any] = []
    with node.graph.inserting_before(node):
        for index in node.args[1]:  # type: ignore[union-attr]
            if _dtype(index) is not torch.bool:
                indices.append(index)
                continue
            call = node.graph.call_function
            rank = len(index.meta["tensor_meta"].shape)
            found = call(aten.nonzero.default, (index,))
            indices += [call(aten.select.int, (found, 1, dim)) for dim in range(rank)]
    node.args = (node.args[0], indices, *node.args[2:])


def _close_slice(node: fx.Node) -> None:
    """Replaces "to the end" by the length: vmap's arithmetic overflows on the former."""
    args = list(node.args)
    at: int = args.index(_NO_END)
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    if names[at] != "end" or "dim" not in names:
        return
    source: Any = args[1] if "input_sizes" in names else args[0]
    shape = source.meta["tensor_meta"].shape if isinstance(source, fx.Node) else source
    args[at] = shape[args[names.index("dim")]]
    node.args = tuple(args)


def _unstride(node: fx.Node, device: torch.device, number: int) -> Tensor:
    """Replaces a view of raw storage, which autograd makes for in-place writes, by indexing.

    Returns:
        The indices, a new constant of the graph.
    """
    scatter = node.target is aten.as_strided_scatter.default
    base: Any = node.args[0]
    view: Any = node.args[2:] if scatter else node.args[1:]
    size, stride, *rest = view
    meta = base.meta["tensor_meta"]
    # Where each element of the storage lies in the base, then which of them the view sees.
    extent = 1 + sum((n - 1) * s for n, s in zip(meta.shape, meta.stride, strict=True))
    where = torch.zeros(extent, dtype=torch.long)
    order = torch.arange(meta.shape.numel()).view(meta.shape)
    where.as_strided(meta.shape, meta.stride).copy_(order)
    seen = where.as_strided(size, stride, rest[0] if rest and rest[0] else 0).flatten()

    graph, call = node.graph, node.graph.call_function
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        index = graph.placeholder(f"constant_{number}")
    with graph.inserting_before(node):
        rows = call(aten.reshape.default, (base, [-1]))
        if scatter:
            source = call(aten.reshape.default, (node.args[1], [-1]))
            put = call(aten.index_put.default, (rows, [index], source))
            new = call(aten.reshape.default, (put, list(meta.shape)))
        else:
            taken = call(aten.index.Tensor, (rows, [index]))
            new = call(aten.reshape.default, (taken, size))
    _replace(node, new)
    return seen.to(device)


_COPIES = (
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
)


def _simplify(graph: fx.GraphModule) -> fx.GraphModule:
    """Drops copies that a functional graph without autograd does not need, and repetitions.

    The two gradients share most of their forward pass and part of the backward pass.
    """
    seen: dict[tuple[Any, str, str], fx.Node] = {}
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _COPIES:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
            continue
        # repr tells 1 from 1.0 and True, which compare equal.
        first = seen.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.graph.lint()
    graph.recompile()
    return graph
