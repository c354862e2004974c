"""Vectorizing one chain's graph over chains, with chains as the last dimension.

:func:`torch.func.vmap` puts chains first, so the innermost loops of compiled code run over the few
coordinates of a latent. With chains last they run over chains: contiguous, long, and the same for
every operation. Broadcasting then needs care in one place only: a tensor that all chains share
gets a trailing dimension of size one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..graphs.folding import RESHAPES
from .operands import Given, Named, Operand, Shape, Target

__all__ = ["Transposing", "over_chains_last"]

aten = torch.ops.aten
# Multiplications of one chain above which a product is left to a matrix library.
_SMALL_PRODUCT = 4096


class Transposing(Exception):
    """Chains last would turn one large matrix product into many small ones."""


class _Chains:
    """A tensor of all chains, ``[*shape, K]``; its own class marks it as a leaf among arguments."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def rank(self) -> int:
        """Dimensions of one chain's tensor."""
        return self.tensor.dim() - 1


def over_chains_last(
    graph: fx.GraphModule, per_chain: Sequence[Tensor], shared: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Evaluates one chain's graph for K chains at once.

    Args:
        graph: Functional aten graph of ``(*per_chain, *shared)`` with a flat tuple of outputs, its
            nodes with ``tensor_meta``.
        per_chain: Inputs of all chains, ``[*shape, K]``.
        shared: Inputs that all chains share, ``[*shape]``.

    Returns:
        The outputs, ``[*shape, K]``.

    Raises:
        Transposing: If a product with a matrix from the right, or a convolution, would need chains
            first to be fast.
        Exception: Whatever vmap raises for an operation that it does not know.
    """
    count = per_chain[0].shape[-1]
    inputs = [*(_Chains(tensor) for tensor in per_chain), *shared]
    outputs = _Interpreter(graph, count).run(*inputs)
    return tuple(_all_chains(output, count) for output in outputs)


def _all_chains(value: Operand, count: int) -> Tensor:
    if isinstance(value, _Chains):
        return value.tensor
    shared: Tensor = value
    return shared.unsqueeze(-1).expand(*shared.shape, count)


class _Interpreter(fx.Interpreter):
    """Runs a graph in which some values hold all chains."""

    def __init__(self, graph: fx.GraphModule, count: int) -> None:
        super().__init__(graph)
        self.count = count
        self.node: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Operand:
        """Notes the node, whose recorded shape some rules read."""
        self.node = n
        return super().run_node(n)

    def call_function(self, target: Target, args: Given, kwargs: Named) -> Operand:
        """Applies the rule of one operation."""
        leaves = pytree.tree_leaves((args, kwargs))
        if target is operator.getitem or not any(isinstance(leaf, _Chains) for leaf in leaves):
            return target(*args, **kwargs)
        if torch.Tag.pointwise in getattr(target, "tags", ()) or target in _POINTWISE:
            args, kwargs = pytree.tree_map(_broadcastable, (tuple(args), kwargs))
            return _Chains(target(*args, **kwargs))
        rule = _RULES.get(target)
        result = None
        if rule is not None:
            meta = {} if self.node is None else self.node.meta
            shape = getattr(meta.get("tensor_meta"), "shape", None)
            result = rule(self.count, shape, target, args, kwargs)
        return _by_vmap(target, args, kwargs) if result is None else _Chains(result)


def _broadcastable(value: Operand) -> Operand:
    """Aligns with ``[*shape, K]``: what all chains share gets a trailing dimension."""
    if isinstance(value, _Chains):
        return value.tensor
    if isinstance(value, Tensor) and value.dim() > 0:
        return value.unsqueeze(-1)
    return value


def _by_vmap(target: Target, args: Given, kwargs: Named) -> Operand:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    where = [index for index, leaf in enumerate(leaves) if isinstance(leaf, _Chains)]

    def one_chain(*tensors: Tensor) -> Operand:
        filled = list(leaves)
        for index, tensor in zip(where, tensors, strict=True):
            filled[index] = tensor
        own_args, own_kwargs = pytree.tree_unflatten(filled, spec)
        return target(*own_args, **own_kwargs)

    tensors = [leaves[index].tensor for index in where]
    result = torch.func.vmap(one_chain, in_dims=-1, out_dims=-1)(*tensors)
    return pytree.tree_map_only(Tensor, _Chains, result)


Rule = Callable[[int, Shape, Target, Given, Named], "Tensor | None"]
_RULES: dict[Target, Rule] = {}
# Not tagged as such, but the same number of every element of one argument.
_POINTWISE = (aten._to_copy.default, aten.clone.default)


def _rule(*targets: Target) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for target in targets:
            _RULES[target] = rule
        return rule

    return register


def _positive(dims: Operand, rank: int) -> Operand:
    """Counts dimensions from the left, where they are those of one chain."""
    if isinstance(dims, int):
        return dims % max(rank, 1)
    return [dim % max(rank, 1) for dim in dims]


@_rule(
    aten.amax.default,
    aten.amin.default,
    aten.logsumexp.default,
    aten.mean.default,
    aten.mean.dim,
    aten.sum.default,
    aten.sum.dim_IntList,
)
def _reduce(count: int, shape: Shape, target: Target, args: Given, kwargs: Named) -> Tensor | None:
    source, *rest = args
    dims = rest[0] if rest else None
    if source.rank == 0:
        return None  # nothing but chains is left: vmap knows
    chosen = list(range(source.rank)) if dims in (None, []) else _positive(dims, source.rank)
    overload: Target = target
    if target in (aten.sum.default, aten.mean.default):
        overload = aten.sum.dim_IntList if target is aten.sum.default else aten.mean.dim
    result: Tensor = overload(source.tensor, chosen, *rest[1:], **kwargs)
    return result


@_rule(*RESHAPES)
def _reshape(count: int, shape: Shape, target: Target, args: Given, kwargs: Named) -> Tensor:
    tensor: Tensor = args[0].tensor
    return tensor.reshape(*shape, count)


@_rule(aten.expand.default)
def _expand(count: int, shape: Shape, target: Target, args: Given, kwargs: Named) -> Tensor:
    tensor: Tensor = args[0].tensor
    ones = [1] * (len(shape) - args[0].rank)
    return tensor.reshape(*ones, *tensor.shape).expand(*shape, count)


@_rule(aten.permute.default)
def _permute(count: int, shape: Shape, target: Target, args: Given, kwargs: Named) -> Tensor:
    source, dims = args
    tensor: Tensor = source.tensor
    return tensor.permute(*_positive(dims, source.rank), source.rank)


@_rule(aten.transpose.int, aten.t.default)
def _transpose(count: int, shape: Shape, target: Target, args: Given, kwargs: Named) -> Tensor:
    source, *dims = args
    tensor: Tensor = source.tensor
    if source.rank < 2:
        return tensor
    first, second = _positive(dims or [0, 1], source.rank)
    return tensor.transpose(first, second)


@_rule(
    aten._log_softmax.default,
    aten._softmax.default,
    aten.cumsum.default,
    aten.flip.default,
    aten.index_select.default,
    aten.select.int,
    aten.slice.Tensor,
)
def _along(count: int, shape: Shape, target: Target, args: Given, kwargs: Named) -> Tensor | None:
    source, *rest = args
    if not isinstance(source, _Chains) or source.rank == 0:
        return None
    if any(isinstance(argument, _Chains) for argument in rest):
        return None  # indices of a chain's own
    dims = rest[0] if rest else 0
    result: Tensor = target(source.tensor, _positive(dims, source.rank), *rest[1:], **kwargs)
    return result


@_rule(aten.select_backward.default, aten.slice_backward.default)
def _scatter(count: int, shape: Shape, target: Target, args: Given, kwargs: Named) -> Tensor:
    source, sizes, dim, *rest = args
    dim = _positive(dim, len(sizes))
    result: Tensor = target(source.tensor, [*sizes, count], dim, *rest, **kwargs)
    return result


@_rule(aten.cat.default, aten.stack.default)
def _cat(count: int, shape: Shape, target: Target, args: Given, kwargs: Named) -> Tensor:
    parts, *rest = args
    tensors = [_all_chains(part, count) for part in parts]
    dim = _positive(rest[0] if rest else 0, len(shape))
    result: Tensor = target(tensors, dim)
    return result


@_rule(aten.index.Tensor)
def _index(count: int, shape: Shape, target: Target, args: Given, kwargs: Named) -> Tensor | None:
    source, indices = args
    if not isinstance(source, _Chains) or any(isinstance(index, _Chains) for index in indices):
        return None
    result: Tensor = target(source.tensor, indices)
    return result


def _multiply(count: int, shape: Shape, target: Target, left: Operand, right: Operand) -> Tensor:
    if not isinstance(left, _Chains) and target is not aten.bmm.default:
        tensor: Tensor = right.tensor
        return torch.mm(left, tensor.reshape(tensor.shape[0], -1)).reshape(*shape, count)
    first, second = (_all_chains(argument, 1) for argument in (left, right))
    if target is aten.mv.default:
        second = second.unsqueeze(1)
    multiplications = torch.Size(shape).numel() * first.shape[-2]
    if multiplications > _SMALL_PRODUCT:
        raise Transposing(str(target))
    # [..., n, m, 1, K] times [..., 1, m, p, K]
    product = first.unsqueeze(-2) * second.unsqueeze(-4)
    return product.sum(-3).reshape(*shape, count)


@_rule(aten.mv.default, aten.mm.default, aten.bmm.default)
def _product(count: int, shape: Shape, target: Target, args: Given, kwargs: Named) -> Tensor:
    return _multiply(count, shape, target, *args)


@_rule(aten.addmm.default)
def _add_product(
    count: int, shape: Shape, target: Target, args: Given, kwargs: Named
) -> Tensor | None:
    if kwargs or not any(isinstance(argument, _Chains) for argument in args[1:]):
        return None
    bias: Tensor = _broadcastable(args[0])
    return bias + _multiply(count, shape, aten.mm.default, *args[1:])


@_rule(aten.dot.default)
def _dot(count: int, shape: Shape, target: Target, args: Given, kwargs: Named) -> Tensor:
    left, right = (_broadcastable(argument) for argument in args)
    product: Tensor = left * right
    return product.sum(0)


@_rule(aten.baddbmm.default, aten.convolution.default)
def _refuse(count: int, shape: Shape, target: Target, args: Given, kwargs: Named) -> Tensor:
    raise Transposing(str(target))
