"""Which operations share a loop, and which results are kept in memory.

Operations on elements of one shape go into one loop over these elements, the earliest that comes
after all that they read; sums are taken along in the loop over what they add up. Views and
expansions are only other ways to read an array.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from .arguments import Args, Kwargs, OpOverload
from .rules import ELEMENTWISE, elementwise
from .stages import Cholesky, DensityCall, Loop, Member, Product, Read, Scan, Scatter, Solve, Stage
from .structured import RULES as _STRUCTURED
from .structured import SEVERAL as _SEVERAL
from .values import CannotGenerate, Expression, Value
from .views import SPLITS, expanded, view_of

__all__ = ["Schedule", "evaluate_density", "shape_of", "squeezed"]

aten = torch.ops.aten


def evaluate_density(position: Any) -> Any:
    """Marks a call of the density in the graph of a step."""
    raise NotImplementedError("native code calls the density")


def shape_of(node: fx.Node) -> tuple[tuple[int, ...], torch.dtype]:
    """Finds the shape and the type of a node's tensor."""
    meta: Any = node.meta.get("tensor_meta", node.meta.get("val"))
    if not hasattr(meta, "dtype"):
        raise CannotGenerate(f"the shape of {node.target} is not known")
    return tuple(int(size) for size in meta.shape), meta.dtype


_FILLED: dict[OpOverload, Callable[..., Any]] = {
    aten.full.default: lambda args: args[1],
    aten.full_like.default: lambda args: args[1],
    aten.new_full.default: lambda args: args[2],
    aten.scalar_tensor.default: lambda args: args[0],
    **dict.fromkeys(
        (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default), lambda args: 0.0
    ),
    **dict.fromkeys(
        (aten.ones.default, aten.ones_like.default, aten.new_ones.default), lambda args: 1.0
    ),
}
_SUMS: dict[OpOverload, tuple[float, str]] = {
    aten.sum.default: (0.0, "{0} + {1}"),
    aten.sum.dim_IntList: (0.0, "{0} + {1}"),
    aten.mean.default: (0.0, "{0} + {1}"),
    aten.mean.dim: (0.0, "{0} + {1}"),
    aten.prod.default: (1.0, "{0} * {1}"),
    aten.prod.dim_int: (1.0, "{0} * {1}"),
    aten.amax.default: (-torch.inf, "larger({0}, {1})"),
    aten.amin.default: (torch.inf, "smaller({0}, {1})"),
    aten.any.default: (0.0, "{0} | {1}"),
    aten.any.dim: (0.0, "{0} | {1}"),
    aten.all.default: (1.0, "{0} & {1}"),
    aten.all.dim: (1.0, "{0} & {1}"),
}


class Schedule:
    """The stages of a graph, in order.

    Args:
        graph: Functional aten graph of one chain, whose nodes know their shapes.
        inputs: Of the graph.
        prefix: Of the names of its arrays.
        density: Shapes and types of the density's results, where the graph may call it.

    Raises:
        CannotGenerate: If it has an operation that native code does not know.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        inputs: Sequence[Value],
        prefix: str = "t",
        density: Sequence[tuple[tuple[int, ...], torch.dtype]] = (),
    ) -> None:
        self.stages: list[Stage] = []
        self.outputs: list[Value] = []
        self.work = 0  # operations on vectors, about
        self._prefix, self._density = prefix, density
        self._count = 0
        self._values: dict[fx.Node, Any] = {}
        self._made_by: dict[str, int] = {}  # stage by array
        given = iter(inputs)
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                self._values[node] = next(given)
            elif node.op == "call_function":
                self._values[node] = self._add(node)
            elif node.op == "output":
                self.outputs = [self._value(arg) for arg in node.args[0]]
            else:
                raise CannotGenerate(f"a node {node.op}")

    def _value(self, argument: Any) -> Any:
        return fx.node.map_arg(argument, self._values.__getitem__)

    def _new(self, shape: Sequence[int], dtype: torch.dtype, *, is_vector: bool) -> Value:
        self._count += 1
        name = f"{self._prefix}{self._count}"
        return Value.array(name, dtype, shape, is_vector=is_vector)

    def _add(self, node: fx.Node) -> Any:
        args, kwargs = self._value(node.args), self._value(node.kwargs)
        target: Any = node.target
        if target is operator.getitem:
            return args[0][args[1]]
        if target is evaluate_density:
            results = tuple(self._new(*one, is_vector=True) for one in self._density)
            return self._alone(DensityCall(args[0], results), *results)
        if target is aten.log_sigmoid_forward.default:
            return self._log_sigmoid(args[0])
        if target in _SEVERAL:
            return _SEVERAL[target](self, args, kwargs, (), None)
        if target in SPLITS:
            return view_of(target, args, (), self._copied)
        shape, dtype = shape_of(node)
        if 0 in shape:  # nobody reads an element
            return Value.filled(0.0, dtype, shape)
        if target in _FILLED:
            return Value.filled(_FILLED[target](args), dtype, shape)
        found = view_of(target, args, shape, self._copied)
        if found is not None:
            return found
        if target in _SUMS:
            return self._reduce(target, args, kwargs, shape, dtype)
        short = str(target).removeprefix("aten.")
        if short in ELEMENTWISE:
            return self.map(target, args, kwargs, shape, dtype)
        rule = _STRUCTURED.get(target)
        if rule is None:
            raise CannotGenerate(f"no native code for {target}")
        return rule(self, args, kwargs, shape, dtype)

    def map(
        self,
        target: OpOverload,
        args: Args,
        kwargs: Kwargs,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Value:
        """Adds an operation on single numbers."""
        inputs = tuple(arg for arg in args if isinstance(arg, Value))
        if any(isinstance(arg, Value) for arg in kwargs.values()):
            raise CannotGenerate(f"{target} with a tensor by name")

        def emit(read: Read, at: Sequence[str]) -> Expression:
            operands = [read(arg, at) if isinstance(arg, Value) else arg for arg in args]
            return elementwise(target, operands, kwargs, dtype)

        # types and ranks are checked now, where another way can still be taken
        elementwise(target, [_any_element(arg) for arg in args], kwargs, dtype)
        return self.member(inputs, (), emit, shape, dtype)

    def member(
        self,
        inputs: tuple[Value, ...],
        elsewhere: tuple[Value, ...],
        emit: Callable[[Read, Sequence[str]], Expression],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Value:
        """Adds an operation on elements to the earliest loop of its shape that may have it."""
        is_vector = any(value.is_vector for value in (*inputs, *elsewhere))
        result = self._new(shape, dtype, is_vector=is_vector)
        self._place(Member(result, inputs, elsewhere, emit), shape)
        return result

    def _place(self, member: Member, shape: tuple[int, ...]) -> None:
        own = squeezed(shape)
        self.work += max(member.result.size, _size(shape))
        first = 0
        for value in member.inputs:
            first = max(first, self._after(value, own))
        for value in member.elsewhere:
            first = max(first, self._after(value, None))
        for index, stage in enumerate(self.stages[first:], first):
            if isinstance(stage, Loop) and squeezed(stage.shape) == own:
                stage.members.append(member)
                self._made_by[member.result.name] = index
                return
        self._made_by[member.result.name] = len(self.stages)
        self.stages.append(Loop(shape, [member]))

    def _after(self, value: Value, own: tuple[int, ...] | None) -> int:
        """Finds the first stage that may read a value, as the element of a loop over ``own``."""
        if value.number is not None or value.name not in self._made_by:
            return 0
        index = self._made_by[value.name]
        stage = self.stages[index]
        if own is None or not isinstance(stage, Loop) or squeezed(stage.shape) != own:
            return index + 1
        maker = next(m for m in stage.members if m.result.name == value.name)
        same = maker.reduced is None and value.is_whole and squeezed(value.shape) == own
        return index if same else index + 1

    def _alone(self, stage: Stage, *results: Value) -> Any:
        for result in results:
            self._made_by[result.name] = len(self.stages)
        self.stages.append(stage)
        return results

    def _copied(self, value: Value) -> Value:
        """Lays a view out as an array of its own."""

        def emit(read: Read, at: Sequence[str]) -> Expression:
            return read(value, at)

        return self.member((value,), (), emit, value.shape, value.dtype)

    def _reduce(
        self,
        target: OpOverload,
        args: Args,
        kwargs: Kwargs,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Value:
        source = args[0]
        rank = len(source.shape)
        given = args[1] if len(args) > 1 else None
        given = [given] if isinstance(given, int) else given
        dims = tuple(sorted(d % rank for d in given)) if given else tuple(range(rank))
        average = target in (aten.mean.default, aten.mean.dim)
        count = _size([source.shape[dim] for dim in dims])
        if not count:
            return Value.filled(torch.nan if average else _SUMS[target][0], dtype, shape)

        def emit(read: Read, at: Sequence[str]) -> Expression:
            return elementwise(aten._to_copy.default, [read(source, at)], {}, dtype)

        kept = tuple(1 if d in dims else n for d, n in enumerate(source.shape))
        result = self._new(kept, dtype, is_vector=source.is_vector)
        self._place(Member(result, (source,), (), emit, _SUMS[target], dims), source.shape)
        whole = result.reshaped(shape)
        if whole is None:
            raise CannotGenerate("a sum of unknown shape")
        if not average:
            return whole
        return self.map(aten.div.Scalar, (whole, count), {}, shape, dtype)

    def _log_sigmoid(self, x: Value) -> tuple[Value, Value]:
        def emit(read: Read, at: Sequence[str]) -> Expression:
            element = read(x, at)
            return Expression(f"v_logsigmoid({element.code})", x.dtype, element.is_vector)

        result = self.member((x,), (), emit, x.shape, x.dtype)
        return result, Value.filled(0.0, x.dtype, (0,))

    def product(self, left: Value, right: Value, added: Value | None, dtype: torch.dtype) -> Value:
        """Adds a product of batches of matrices, ``[b, m, n]`` times ``[b, n, l]``."""
        shape = (left.shape[0], left.shape[1], right.shape[2])
        is_vector = left.is_vector or right.is_vector or (added is not None and added.is_vector)
        if not {left.dtype, right.dtype} == {dtype} or not dtype.is_floating_point:
            raise CannotGenerate("a product of other types")
        if not left.size:  # a sum of no terms
            zero = Value.filled(0.0, dtype, shape)
            return zero if added is None else expanded(added, shape)
        result = self._new(shape, dtype, is_vector=is_vector)
        self.work += _size(shape) * left.shape[2]
        return self._alone(Product(result, left, right, added), result)[0]  # type: ignore[no-any-return]

    def reshaped(self, value: Value, shape: Sequence[int]) -> Value:
        """Returns a view of another shape, of a copy where elements have to move."""
        known = _size([size for size in shape if size != -1])
        whole = tuple(value.size // max(known, 1) if size == -1 else size for size in shape)
        view: Value = view_of(aten.view.default, (value,), whole, self._copied)
        return view

    def reduced(
        self, target: OpOverload, args: Args, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Value:
        """Adds a sum, or what takes its place, over some dimensions."""
        return self._reduce(target, args, {}, shape, dtype)

    def largest(self, source: Value, dim: int, shape: tuple[int, ...]) -> Value:
        """Adds the largest elements along a dimension."""
        return self._reduce(aten.amax.default, (source, dim), {}, shape, source.dtype)

    def alone(self, stage: Scan | Scatter | Cholesky | Solve, work: int = 0) -> Value:
        """Adds a stage that shares no loop."""
        self.work += max(work, stage.result.size)
        self._alone(stage, stage.result)
        return stage.result

    def new(self, shape: Sequence[int], dtype: torch.dtype, *, is_vector: bool) -> Value:
        """Names an array."""
        return self._new(shape, dtype, is_vector=is_vector)


def squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    """Leaves out dimensions of one element."""
    return tuple(size for size in shape if size != 1)


def _size(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _any_element(argument: Any) -> Any:
    if isinstance(argument, Value):
        return argument.at(["0"] * len(argument.shape))
    return argument
