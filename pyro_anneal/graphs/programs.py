"""One graph in two parts, what is computed once per run and what per evaluation, and its data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch.fx.passes.shape_prop import TensorMetadata

from ..models.places import summary
from ..native.evaluation import DensitySource, NativeDensity, density_source, ready
from ..native.values import CannotGenerate
from .evaluation import Outputs
from .recorder import graph_module
from .recording import Trace
from .rewriting import dependent_nodes, drop_dead

__all__ = ["Evaluator", "Native", "Program", "replaced", "split", "stacked"]


# Operations on vectors by one evaluation above which vectors should be filled.
_MUCH_WORK = 30_000
# Bytes of one array of all chains beyond which a processor waits for memory: allocators then ask
# the system for new pages at every operation, which takes longer than the operation itself.
_MOST_BYTES = 2**24
# Numbers in one chain's largest array from which an operation takes longer than its call.
_MANY_NUMBERS = 50_000
# Numbers that all chains share, over those of one chain's largest array, from which products of
# matrices repay that several chains are evaluated together; and how many then are.
_MUCH_SHARED, _TOGETHER = 32, 16


class Program:
    """One graph, split into the part per run and the part per evaluation; it holds no data."""

    def __init__(self, traced: Trace, num_constants: int) -> None:
        self.prologue, self.body = split(traced.graph)
        self.own = traced.constants[num_constants:]  # made by the passes, never rebound
        self.native: Native | None = None  # of the graph of one chain, once asked for
        # Of the values of the first evaluation, for which the body may be compiled.
        self.layouts: list[tuple[torch.Size, tuple[int, ...]]] | None = None
        self._largest: tuple[int, int] | None = None

    def chains_at_once(self, num_chains: int, values: Sequence[Tensor]) -> int:
        """Chooses how many chains a graph of one chain should be evaluated for at a time.

        Args:
            num_chains: Number K of chains.
            values: What they share.
        """
        if self._largest is None:
            self._largest = _largest_array(self.body)
        numbers, size = self._largest
        shares = max((value.numel() for value in values), default=0) >= _MUCH_SHARED * numbers
        if not shares and numbers >= _MANY_NUMBERS:
            return 1
        if num_chains * size <= _MOST_BYTES:
            return num_chains
        return min(num_chains, max(1, _MOST_BYTES // size, _TOGETHER if shares else 1))


def _largest_array(graph: fx.GraphModule) -> tuple[int, int]:
    """Finds the numbers and bytes of the largest array that a graph makes."""
    found = (1, 1)
    for node in graph.graph.nodes:
        meta = node.meta.get("tensor_meta") if node.op == "call_function" else None
        if isinstance(meta, TensorMetadata):
            count = meta.shape.numel()
            found = max(found, (count, count * meta.dtype.itemsize))
    return found


class Native:
    """The graph of one chain as native code, or why there is none."""

    def __init__(self, body: fx.GraphModule, example: Tensor, values: Sequence[Tensor]) -> None:
        self.source: DensitySource | None = None
        self.density: NativeDensity | None = None
        self.reason: str | None = None
        try:
            self.source = density_source(body, example, values)
            self.density = NativeDensity(self.source)
        except CannotGenerate as error:
            self.reason = str(error)
        except Exception as error:  # noqa: BLE001 - the graph itself is right without native code
            self.reason = f"it cannot be written ({summary(error)})"

    def wastes(self, num_chains: int) -> bool:
        """Tells whether so few chains would leave most of each vector idle in much work."""
        source = self.source
        return source is not None and 2 * num_chains < source.lanes and source.work > _MUCH_WORK


class Evaluator:
    """A program on its data."""

    def __init__(self, program: Program, constants: Sequence[Tensor]) -> None:
        self.program = program
        self.run: Callable[..., Outputs] = program.body  # or what it was compiled to
        self.values: list[Tensor] = []
        self._ready: list[Tensor] | None = None
        self.refresh(constants)

    @property
    def body(self) -> fx.GraphModule:
        """The part per evaluation."""
        return self.program.body

    def refresh(self, constants: Sequence[Tensor]) -> None:
        """Evaluates what does not depend on the position."""
        prologue = self.program.prologue
        with torch.no_grad():
            tensors = [_dense(constant.detach()) for constant in (*constants, *self.program.own)]
            values = list(prologue(*tensors))
        if self.program.layouts is None:
            self.program.layouts = [(value.shape, value.stride()) for value in values]
        for at, (shape, strides) in enumerate(self.program.layouts):
            if values[at].shape != shape:
                raise ValueError(
                    f"the new constants change a shape inside the density from {list(shape)} to "
                    f"{list(values[at].shape)} (a mask that selects another number of elements?): "
                    "capture the density anew"
                )
            values[at] = _with_strides(strides, values[at])
        self.values = values
        self._ready = None

    @property
    def ready(self) -> list[Tensor]:
        """The values as native code reads them."""
        if self._ready is None:
            self._ready = [ready(value) for value in self.values]
        return self._ready

    def __call__(self, position: Tensor) -> Outputs:
        """Evaluates densities and gradients."""
        return self.run(position.contiguous(), *self.values)


def _dense(tensor: Tensor) -> Tensor:
    """Leaves only repetitions that follow from the graph, the same for any data."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    repeats = any(size > 1 and stride == 0 for size, stride in sizes)
    return tensor.contiguous() if repeats else tensor


def _with_strides(strides: tuple[int, ...], value: Tensor) -> Tensor:
    """Lays a value out as one for which code was compiled."""
    if value.stride() == strides:
        return value
    laid = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device)
    return laid.copy_(value)


def replaced(constants: list[Tensor], old: Tensor, new: Tensor) -> list[Tensor]:
    """Puts a tensor in the place of another, which is known by identity."""
    if not any(constant is old for constant in constants):
        raise ValueError(
            f"the density reads no tensor that is this one, of shape {list(old.shape)}; it reads "
            f"tensors of shapes {[list(constant.shape) for constant in constants]}. Was it copied, "
            "viewed or turned into numbers before?"
        )
    for name in ("shape", "dtype", "device"):
        expected, got = getattr(old, name), getattr(new, name)
        if expected != got:
            raise ValueError(f"the new tensor has {name} {got}, expected {expected}")
    return [new if constant is old else constant for constant in constants]


def stacked(chains: Sequence[Outputs]) -> Outputs:
    """Puts the results of single chains together."""
    log_base, log_target, grad_base, grad_target = (
        torch.stack(parts) for parts in zip(*chains, strict=True)
    )
    return log_base, log_target, grad_base, grad_target


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
    for node, new in late.items():
        new.meta = dict(node.meta)
    for node in graph.graph.nodes:
        if node.op == "call_function" and node in dependent:
            late[node] = body.node_copy(node, late.__getitem__)
        elif node.op == "call_function":
            early[node] = prologue.node_copy(node, early.__getitem__)
    prologue.output(tuple(early[node] for node in values))
    body.output(fx.map_arg(output.args[0], late.__getitem__))
    for part in (prologue, body):
        drop_dead(part)
    return graph_module(torch.nn.Module(), prologue), graph_module(torch.nn.Module(), body)
