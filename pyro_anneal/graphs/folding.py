"""Folding a functional graph: repetitions, copies, and what is known before it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .rewriting import drop_dead

__all__ = ["RESHAPES", "fold_uniform", "shapes_to_literals", "simplify"]

aten = torch.ops.aten

# Without autograd and without writes, these are their argument.
_COPIES = (
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
)
# These only change the shape, and keep elements and their order.
RESHAPES = (
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.view.default,
)
# Of a uniform tensor these make a uniform tensor.
_MOVES = (
    *RESHAPES,
    aten.expand.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
)
_SAME_SHAPE = (aten.expand.default, aten.view.default, aten._unsafe_view.default)
# Filled with a known number, in the shape of another tensor.
_LIKE: dict[Any, Callable[[fx.Node], Any]] = {
    aten.ones_like.default: lambda node: 1,
    aten.zeros_like.default: lambda node: 0,
    aten.full_like.default: lambda node: node.args[1],
    aten.new_ones.default: lambda node: 1,
    aten.new_zeros.default: lambda node: 0,
    aten.new_full.default: lambda node: node.args[2],
}


def simplify(graph: fx.GraphModule) -> fx.GraphModule:
    """Drops copies that a functional graph without autograd does not need, and repetitions.

    The two gradients share most of their forward pass and part of the backward pass.
    """
    seen: dict[tuple[Any, str, str], fx.Node] = {}
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        if _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
            continue
        if node.target is aten.isnan.default:  # which inductor asks of one number at a time
            node.target, node.args = aten.ne.Tensor, (node.args[0], node.args[0])
        # repr tells 1 from 1.0 and True, which compare equal.
        first = seen.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.graph.erase_node(node)
    drop_dead(graph.graph)
    graph.recompile()
    return graph


def _is_identity(node: fx.Node) -> bool:
    if node.target in _COPIES:
        return True
    before, after = _meta(node.args[0]) if node.args else None, _meta(node)
    if before is None or after is None:
        return False
    if node.target is aten.pow.Tensor_Scalar and node.args[1] == 1:  # derivative of a square
        return bool(before.dtype == after.dtype)
    return node.target in _SAME_SHAPE and before.shape == after.shape


def shapes_to_literals(graph: fx.GraphModule, device: torch.device) -> None:
    """Replaces tensors that only take their shape from another one by literals.

    So the seed of the backward pass, ``ones_like(log_density)``, no longer depends on the
    position, and what follows from it alone is computed before the run.
    """
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and node.target in _LIKE:
            _replace(node, _full(node, _LIKE[node.target](node), device))


def fold_uniform(graph: fx.GraphModule, device: torch.device) -> None:
    """Computes what follows from tensors filled with one number, and drops factors of one."""
    uniform: dict[fx.Node, Any] = {}
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or _meta(node) is None:
            continue
        args: Any = node.args
        if node.target is aten.full.default:
            uniform[node] = args[1]
        elif node.target in _MOVES and args[0] in uniform:
            new = _full(node, uniform[args[0]], device)
            uniform[new] = uniform[args[0]]
            _replace(node, new)
        elif node.target is aten.neg.default and args[0] in uniform:
            new = _full(node, -uniform[args[0]], device)
            uniform[new] = -uniform[args[0]]
            _replace(node, new)
        elif node.target is aten.mul.Tensor:
            for factor, other in (args, args[::-1]):
                if _is_tensor(other) and _drop_factor(node, uniform.get(factor), other):
                    break


def _is_tensor(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and _meta(argument) is not None


def _drop_factor(node: fx.Node, factor: Any, other: fx.Node) -> bool:
    """Replaces ``factor * other`` where the factor is 1 or -1."""
    if factor not in (1, -1) or _meta(other).dtype != _meta(node).dtype:
        return False
    new = other
    with node.graph.inserting_before(node):
        if factor == -1:
            new = node.graph.call_function(aten.neg.default, (new,))
            new.meta = dict(other.meta)
        if _meta(other).shape != _meta(node).shape:
            new = node.graph.call_function(aten.expand.default, (new, list(_meta(node).shape)))
            new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return True


def _meta(node: Any) -> Any:
    """Returns shape and dtype of a tensor, None for tuples and where they are not known."""
    meta = getattr(node, "meta", {}).get("tensor_meta")
    return meta if hasattr(meta, "dtype") else None


def _full(node: fx.Node, value: Any, device: torch.device) -> fx.Node:
    kwargs: dict[str, Any] = {"dtype": _meta(node).dtype, "device": device}
    with node.graph.inserting_before(node):
        return node.graph.call_function(
            aten.full.default, (list(_meta(node).shape), value), kwargs
        )


def _replace(old: fx.Node, new: fx.Node) -> None:
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
