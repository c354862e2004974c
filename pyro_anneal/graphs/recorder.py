"""Writes down the operations that a function runs: a flat graph of aten calls on tensors.

A mode below autograd sees every operation with its tensors and results. Each becomes a node; a
tensor that no node made is a constant of the graph. Nothing is traced symbolically and no value is
described twice, so recording costs a small multiple of running the function once.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import TensorMetadata
from torch.utils import _pytree as pytree

from ..models.modes import DispatchMode
from ..models.places import Place
from .rewriting import is_mutable

__all__ = ["Recorder", "current_recorder", "flat_graph", "graph_module", "tensors_in"]

aten = torch.ops.aten
# Kinds of arguments that hold no tensor, by far the most.
_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout})


class _Active(threading.local):
    """The recorders of a thread, the innermost last."""

    def __init__(self) -> None:
        self.recorders: list[Recorder] = []


_active = _Active()


class Recorder(DispatchMode):
    """Builds a graph of the operations that run while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.is_paused = False
        self._nodes: dict[int, tuple[weakref.ref[Tensor], fx.Node]] = {}
        self._constants: list[Tensor] = []  # held, so that no other tensor gets their identity

    def enter(self, tensor: Tensor, node: fx.Node) -> None:
        """Notes that a node made a tensor."""
        node.meta["tensor_meta"] = TensorMetadata(
            tensor.shape, tensor.dtype, False, tensor.stride(), None, False, {}
        )
        self._nodes[id(tensor)] = (weakref.ref(tensor), node)

    def node_of(self, tensor: Tensor) -> fx.Node:
        """Finds the node of a tensor, or makes it a constant."""
        found = self._nodes.get(id(tensor))
        if found is not None and found[0]() is tensor:
            return found[1]
        name = f"_tensor_constant{len(self._constants)}"
        setattr(self.root, name, tensor)
        self._constants.append(tensor)
        node = self.graph.create_node("get_attr", name)
        self.enter(tensor, node)
        return node

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Runs operations without writing them down."""
        self.is_paused, before = True, self.is_paused
        try:
            yield
        finally:
            self.is_paused = before

    def note_place(self, place: Callable[[], Place | None]) -> None:
        """Tells the operations recorded last which line of the model they come from."""
        found: Place | None = None
        for node in reversed(self.graph.nodes):
            if node.op != "call_function" or "place" in node.meta:
                return
            found = found or place()
            node.meta["place"] = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs one operation and writes it down."""
        kwargs = kwargs or {}
        if self.is_paused:
            return func(*args, **kwargs)
        if _is_composite(func):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func is aten.lift_fresh.default:  # the graph's own copy, which it may write to
            func = aten.lift_fresh_copy.default
        inputs = _mapped(self.node_of, args)
        named = {name: _mapped(self.node_of, value) for name, value in kwargs.items()}
        node = self.graph.create_node("call_function", func, inputs, named)
        if torch.Tag.data_dependent_output in func.tags and not _is_fixed(node):
            raise RuntimeError(f"{func} needs the value of a tensor that is being recorded")
        result = func(*args, **kwargs)
        self._enter_all(result, node)
        return result

    def _enter_all(self, result: Any, node: fx.Node) -> None:
        if isinstance(result, Tensor):
            self.enter(result, node)
        elif isinstance(result, tuple | list):
            metas = []
            for index, part in enumerate(result):
                if not isinstance(part, Tensor | tuple | list):
                    metas.append(part)
                    continue
                item = self.graph.create_node("call_function", operator.getitem, (node, index))
                self._enter_all(part, item)
                metas.append(item.meta.get("tensor_meta"))
            node.meta["tensor_meta"] = tuple(metas)


@functools.cache
def _is_composite(func: Any) -> bool:
    """Tells whether an operation is defined by others, which are recorded in its place."""
    return bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    )


def _mapped(function: Callable[[Tensor], fx.Node], value: Any) -> Any:
    """Replaces the tensors in an argument by nodes."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple | list):
        return kind([_mapped(function, part) for part in value])
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """Collects the tensors in the arguments or results of an operation, in order."""
    found: list[Tensor] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[Tensor]) -> None:
    kind = type(value)
    if kind in _PLAIN:
        return
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, tuple | list):
        for part in value:
            _collect(part, found)
    elif isinstance(value, dict):
        for part in value.values():
            _collect(part, found)


def _is_fixed(node: fx.Node) -> bool:
    """Tells whether a node follows from numbers of the function alone."""
    waiting = [node]
    while waiting:
        here = waiting.pop()
        if here.op == "placeholder":
            return False
        if here.op == "get_attr":
            if any(user.target is not aten.lift_fresh_copy.default for user in here.users):
                return False
            continue
        waiting.extend(here.all_input_nodes)
    return True


def flat_graph(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """Records a function of tensors as a graph of aten operations.

    Operations of autograd's backward passes and those that :func:`torch.func.vmap` makes are
    recorded as they run. Every node carries ``tensor_meta``. The graph's source is made when it is
    first called, not after each pass.

    Args:
        function: Returns tensors, or a nest of them.
        inputs: What it is called with.

    Returns:
        The graph of the inputs; other tensors that the function read are its attributes.
    """
    recorder = Recorder()
    for number, tensor in enumerate(inputs):
        recorder.enter(tensor, recorder.graph.placeholder(f"input_{number}"))
    _active.recorders.append(recorder)
    try:
        with recorder:
            results = function(*inputs)
    finally:
        _active.recorders.pop()
    recorder.graph.output(pytree.tree_map_only(Tensor, recorder.node_of, results))
    _drop_unread(recorder.graph)
    return graph_module(recorder.root, recorder.graph)


def _drop_unread(graph: fx.Graph) -> None:
    """Removes what nothing reads, but for writes in place."""
    for node in reversed(graph.nodes):
        writes = node.op == "call_function" and is_mutable(node)
        if not node.users and node.op in ("call_function", "get_attr") and not writes:
            graph.erase_node(node)


def graph_module(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Makes a module of a graph, whose source is made when it is first called."""
    try:
        from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module
    except ImportError:
        return fx.GraphModule(root, graph)
    with _use_lazy_graph_module(True):
        return _make_graph_module(root, graph)


def current_recorder() -> Recorder | None:
    """Finds what records in this thread now, the innermost if there are several."""
    return _active.recorders[-1] if _active.recorders else None
