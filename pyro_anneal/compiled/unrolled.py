"""One chain's graph for K chains, element by element: one loop over chains, the rest in registers.

A tensor ``[*shape]`` of one chain becomes an array of as many vectors ``[K]``. Slices, views and
concatenations only move these; what is left are operations on vectors of one length, which
inductor fuses into one loop that writes nothing to memory in between. Compilation takes longer,
in proportion to the elements.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..graphs.folding import RESHAPES
from ..models.types import Array
from .operands import Given, Named, Operand, Target

__all__ = ["CannotUnroll", "count_operations", "over_chains_unrolled"]

aten = torch.ops.aten


class CannotUnroll(Exception):
    """An operation is not known element by element."""


class _Elements:
    """A tensor, element by element; its own class marks it as a leaf among arguments."""

    def __init__(self, array: Array, dtype: torch.dtype) -> None:
        self.array = array
        self.dtype = dtype


class _Zero:
    """An element that is zero by structure, outside the slice of a gradient."""


_ZERO = _Zero()


def count_operations(graph: fx.GraphModule) -> int:
    """Counts the operations on vectors that a graph becomes.

    Args:
        graph: Flat aten graph of one chain whose nodes carry fake tensors.

    Returns:
        Their number, an upper bound.
    """
    count = 0
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.target in _MOVES:
            continue
        sizes = [_shape(x) for x in (node, *node.all_input_nodes)]
        if node.target in _PRODUCTS:  # [n, m] times [m, p] as [n, p] times m
            sizes = [torch.Size([*sizes[0], sizes[-2][-1]])]
        count += max(size.numel() for size in sizes)
    return count


def _shape(node: fx.Node) -> torch.Size:
    value = node.meta.get("val", node.meta.get("tensor_meta"))
    return torch.Size(getattr(value, "shape", ()))  # of a tuple, nothing


def over_chains_unrolled(
    graph: fx.GraphModule, per_chain: Sequence[Tensor], shared: Sequence[Tensor]
) -> list[list[Tensor]]:
    """Evaluates one chain's graph for K chains at once.

    Args:
        graph: Functional aten graph of ``(*per_chain, *shared)`` with a flat tuple of outputs, its
            nodes with fake tensors.
        per_chain: Inputs of all chains, ``[*shape, K]``.
        shared: Inputs that all chains share, ``[*shape]``.

    Returns:
        The elements of each output in order, ``[K]`` each.

    Raises:
        CannotUnroll: If the graph has an operation that no rule knows.
    """
    inputs = [_Elements(_array(tensor, tensor.dim() - 1), tensor.dtype) for tensor in per_chain]
    outputs = _Interpreter(graph).run(*inputs, *shared)
    count = per_chain[0].shape[-1]
    example = per_chain[0].new_zeros(count)

    def rows(value: Operand) -> list[Tensor]:
        elements = _elements(value)
        zero = torch.zeros(1, dtype=elements.dtype, device=example.device)
        vectors = (zero if x is _ZERO else x for x in elements.array.reshape(-1))
        return [vector.expand(count) for vector in vectors]

    return [rows(output) for output in outputs]


def _array(tensor: Tensor, rank: int) -> Array:
    """Takes a tensor apart along its first ``rank`` dimensions, each repeated number once."""
    array = np.empty(tuple(tensor.shape[:rank]), dtype=object)
    known: dict[tuple[int, ...], Tensor] = {}
    for where in np.ndindex(array.shape):
        first = tuple(i if s else 0 for i, s in zip(where, tensor.stride(), strict=False))
        if first not in known:
            known[first] = tensor[first] if first else tensor
        array[where] = known[first]
    return array


def _elements(value: Operand) -> _Elements:
    """Takes apart what all chains share; elements keep a dimension that the tensor had."""
    if isinstance(value, _Elements):
        return value
    if value.dim() == 0:
        return _Elements(_array(value, 0), value.dtype)
    return _Elements(_array(value.unsqueeze(-1), value.dim()), value.dtype)


class _Interpreter(fx.Interpreter):
    """Runs a graph in which some values are taken apart."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.value: Operand = None
        self.known: dict[object, tuple[Operand, Operand]] = {}

    def run_node(self, n: fx.Node) -> Operand:
        """Notes the recorded value, for its shape and dtype."""
        self.value = n.meta.get("val")
        return super().run_node(n)

    def call_function(self, target: Target, args: Given, kwargs: Named) -> Operand:
        """Applies the rule of one operation."""
        leaves = pytree.tree_leaves((args, kwargs))
        if target is operator.getitem or not any(isinstance(leaf, _Elements) for leaf in leaves):
            return target(*args, **kwargs)
        rule = _MOVES.get(target) or _SUMS.get(target)
        if rule is not None:
            if kwargs:  # alpha and beta of a product, dtype of a sum
                raise CannotUnroll(f"{target} with {sorted(kwargs)}")
            return rule(self, args)
        if target in _COPIES:
            return args[0]
        if target is aten._to_copy.default:
            return self.elementwise(target, args, {"dtype": self.value.dtype})
        elementwise = torch.Tag.pointwise in target.tags or target in _ELEMENTWISE
        if not elementwise or any(isinstance(x, list) for x in args):
            raise CannotUnroll(str(target))
        return self.elementwise(target, args, kwargs)

    def elementwise(self, target: Target, args: Given, kwargs: Named) -> _Elements:
        """Applies an operation to each element."""
        operands = [_elements(x) if isinstance(x, (_Elements, Tensor)) else x for x in args]
        given = [x.array for x in operands if isinstance(x, _Elements)]
        wide = iter(np.broadcast_arrays(*given))
        columns = [next(wide) if isinstance(x, _Elements) else x for x in operands]
        dtypes = [x.dtype if isinstance(x, _Elements) else None for x in operands]
        result = np.empty(np.broadcast_shapes(*(x.shape for x in given)), dtype=object)
        for where in np.ndindex(result.shape):
            elements = [x[where] if isinstance(x, np.ndarray) else x for x in columns]
            result[where] = self.element(target, elements, dtypes, kwargs)
        return _Elements(result, self.value.dtype)

    def element(
        self,
        target: Target,
        args: list[Operand],
        dtypes: Sequence[torch.dtype | None],
        kwargs: Named,
    ) -> Operand:
        """Applies an operation to one element, unless its result is known."""
        if any(x is _ZERO for x in args):
            unchanged = all(dtype in (None, self.value.dtype) for dtype in dtypes)
            if target is aten.neg.default:
                return _ZERO
            if target is aten.add.Tensor and len(args) == 2 and unchanged and not kwargs:
                return args[1] if args[0] is _ZERO else args[0]
            device = self.value.device
            args = [
                torch.zeros(1, dtype=dtype, device=device) if x is _ZERO else x
                for x, dtype in zip(args, dtypes, strict=True)
            ]
        names = tuple(id(x) if isinstance(x, Tensor) else repr(x) for x in args)
        key = (target, names, repr(kwargs), self.value.dtype)
        if key not in self.known:
            result = target(*args, **kwargs)
            if result.dtype != self.value.dtype:
                result = result.to(self.value.dtype)
            self.known[key] = (result, args)  # which must live as long as their ids are known
        return self.known[key][0]

    def total(self, elements: Iterable[Operand], target: Target = aten.add.Tensor) -> Operand:
        """Joins elements in pairs, and these in pairs."""
        row = list(elements)
        dtypes = [self.value.dtype] * 2
        while len(row) > 1:
            last = row[len(row) // 2 * 2 :]
            pairs = zip(row[::2], row[1::2], strict=False)
            row = [self.element(target, list(pair), dtypes, {}) for pair in pairs] + last
        return row[0] if row else _ZERO


Rule = Callable[[_Interpreter, tuple[Operand, ...]], Operand]
_MOVES: dict[Target, Rule] = {}  # no arithmetic
_SUMS: dict[Target, Rule] = {}
_ELEMENTWISE = (  # not tagged as such, or only by later versions of torch
    aten.elu.default,
    aten.elu_backward.default,
    aten.hardtanh.default,
    aten.hardtanh_backward.default,
    aten.leaky_relu.default,
    aten.leaky_relu_backward.default,
    aten.mish.default,
    aten.mish_backward.default,
    aten.softplus.default,
    aten.softplus_backward.default,
    aten.special_ndtr.default,
)
_COPIES = (aten.alias.default, aten.clone.default, aten.detach.default)
_PRODUCTS = (aten.mm.default, aten.mv.default, aten.dot.default, aten.addmm.default)


def _rule(rules: dict[Target, Rule], *targets: Target) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        rules.update(dict.fromkeys(targets, rule))
        return rule

    return register


def _given(args: Given, *defaults: Operand) -> Given:
    """Completes positional arguments."""
    return (*args, *defaults[len(args) :])


@_rule(_MOVES, *RESHAPES)
def _reshape(self: _Interpreter, args: Given) -> _Elements:
    source = _elements(args[0])
    return _Elements(source.array.reshape(tuple(self.value.shape)), source.dtype)


@_rule(_MOVES, aten.expand.default)
def _expand(self: _Interpreter, args: Given) -> _Elements:
    source = _elements(args[0])
    return _Elements(np.broadcast_to(source.array, tuple(self.value.shape)), source.dtype)


@_rule(_MOVES, aten.permute.default)
def _permute(self: _Interpreter, args: Given) -> _Elements:
    source, dims = args
    return _Elements(source.array.transpose([dim % len(dims) for dim in dims]), source.dtype)


@_rule(_MOVES, aten.transpose.int, aten.t.default)
def _transpose(self: _Interpreter, args: Given) -> _Elements:
    source, first, second = _given(args, None, 0, 1)
    array = source.array if source.array.ndim < 2 else source.array.swapaxes(first, second)
    return _Elements(array, source.dtype)


def _slices(rank: int, dim: int, part: slice) -> tuple[slice, ...]:
    index = [slice(None)] * rank
    index[dim] = part
    return tuple(index)


def _one(index: int, size: int) -> slice:
    return slice(index % size, index % size + 1)


def _part(self: _Interpreter, source: _Elements, dim: int, part: slice) -> _Elements:
    array = source.array[_slices(source.array.ndim, dim, part)]
    return _Elements(array.reshape(tuple(self.value.shape)), source.dtype)


@_rule(_MOVES, aten.select.int)
def _select(self: _Interpreter, args: Given) -> _Elements:
    source, dim, index = args
    return _part(self, source, dim, _one(index, source.array.shape[dim]))


@_rule(_MOVES, aten.slice.Tensor)
def _slice(self: _Interpreter, args: Given) -> _Elements:
    source, dim, *bounds = _given(args, None, 0, None, None, 1)
    return _part(self, source, dim, slice(*bounds))


def _scattered(self: _Interpreter, source: _Elements, dim: int, part: slice) -> _Elements:
    array = np.full(tuple(self.value.shape), _ZERO, dtype=object)
    where = _slices(array.ndim, dim, part)
    array[where] = source.array.reshape(array[where].shape)
    return _Elements(array, self.value.dtype)


@_rule(_MOVES, aten.slice_backward.default)
def _slice_backward(self: _Interpreter, args: Given) -> _Elements:
    source, _, dim, *bounds = args
    return _scattered(self, source, dim, slice(*bounds))


@_rule(_MOVES, aten.select_backward.default)
def _select_backward(self: _Interpreter, args: Given) -> _Elements:
    source, sizes, dim, index = args
    return _scattered(self, source, dim, _one(index, sizes[dim]))


@_rule(_MOVES, aten.cat.default)
def _cat(self: _Interpreter, args: Given) -> _Elements:
    parts, dim = _given(args, None, 0)
    arrays = [_elements(part).array for part in parts]
    return _Elements(np.concatenate(arrays, dim), self.value.dtype)


@_rule(_MOVES, aten.stack.default)
def _stack(self: _Interpreter, args: Given) -> _Elements:
    parts, dim = _given(args, None, 0)
    arrays = [_elements(part).array for part in parts]
    return _Elements(np.stack(arrays, dim), self.value.dtype)


def _reduced(self: _Interpreter, source: _Elements, dims: Operand, target: Target) -> _Elements:
    rank = source.array.ndim
    chosen = [dim % rank for dim in dims or range(rank)] if rank else []
    kept = [dim for dim in range(rank) if dim not in chosen]
    array = source.array.transpose([*kept, *chosen])
    array = array.reshape(*(source.array.shape[dim] for dim in kept), -1)
    result = np.empty(array.shape[:-1], dtype=object)
    for where in np.ndindex(result.shape):
        result[where] = self.total(array[where], target)
    return _Elements(result.reshape(tuple(self.value.shape)), self.value.dtype)


@_rule(_SUMS, aten.sum.default, aten.sum.dim_IntList)
def _sum(self: _Interpreter, args: Given) -> _Elements:
    source, dims, *_ = _given(args, None, None)
    if source.dtype != self.value.dtype:
        raise CannotUnroll("a sum of another type")
    return _reduced(self, source, dims, aten.add.Tensor)


@_rule(_SUMS, aten.amax.default)
def _amax(self: _Interpreter, args: Given) -> _Elements:
    source, dims, *_ = _given(args, None, None)
    return _reduced(self, source, dims, aten.maximum.default)


@_rule(_SUMS, aten.mm.default, aten.mv.default, aten.dot.default)
def _product(self: _Interpreter, args: Given) -> _Elements:
    left, right = (_elements(x).array for x in args)
    dtypes = [self.value.dtype] * 2
    rows = left.reshape(-1, left.shape[-1])
    columns = right.reshape(right.shape[0], -1).T
    result = np.empty((len(rows), len(columns)), dtype=object)
    for i, j in np.ndindex(result.shape):
        pairs = zip(rows[i], columns[j], strict=True)
        products = [self.element(aten.mul.Tensor, list(pair), dtypes, {}) for pair in pairs]
        result[i, j] = self.total(products)
    return _Elements(result.reshape(tuple(self.value.shape)), self.value.dtype)


@_rule(_SUMS, aten.addmm.default)
def _add_product(self: _Interpreter, args: Given) -> _Elements:
    bias, *factors = args
    return self.elementwise(aten.add.Tensor, (bias, _product(self, tuple(factors))), {})
