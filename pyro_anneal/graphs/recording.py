r"""Graphs of one chain's densities: traced, made functional, batched over chains, split.

The order of the passes matters. Autograd runs first, on the user's own code, so that its custom
gradients, ``detach`` and ``no_grad`` count; what it did is recorded as a flat graph of aten
operations (:func:`trace`). Only then are in-place writes removed, and only then is the graph
vectorized over chains (:func:`batch`): user code and its ``autograd.Function`` classes, which
:func:`torch.func.vmap` would refuse, are no longer in it. Last, everything that does not depend on
the position is split off, to run once per annealing run instead of once per evaluation
(:func:`~pyro_anneal.graphs.programs.split`).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import (
    get_innermost_proxy_mode,
    make_fx,
)
from torch.fx.passes.shape_prop import ShapeProp

from ..models.places import current_place
from .assertions import without_shortcuts
from .evaluation import FailuresAsNaN, LogDensities, as_written, evaluate, values_of
from .exits import Exit, ExitsByFunction, Influence, PositionLeft
from .folding import fold_uniform, shapes_to_literals, simplify
from .guards import Guards, split_guards
from .rewriting import (
    drop_dead,
    is_mutable,
    lift_constants,
    make_batchable,
    refuse_randomness,
    refuse_writes,
)

__all__ = [
    "Recording",
    "Trace",
    "batch",
    "flat_graph",
    "record",
    "record_densities",
    "trace",
]

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Trace:
    """Log densities and gradients as a functional graph."""

    graph: fx.GraphModule  # (position, *constants) -> Outputs
    constants: list[Tensor]  # the live tensors that the function read: parameters, data, buffers
    exits: tuple[Exit, ...] = ()  # by which data left
    guards: Guards | None = None  # what they must give anew for the graph to stay right
    num_read: int = 0  # constants that the function read, which come first; passes made the rest


class Recording(NamedTuple):
    """A function as it was recorded, before any pass.

    Two recordings of the same :attr:`code` differ in the values of their constants alone: the same
    operations, with the same numbers, in the same order.
    """

    graph: fx.GraphModule  # (position, *constants) -> results and guards
    constants: list[Tensor]  # in the order in which they were read
    influence: Influence
    code: str


class _Recording(FailuresAsNaN):
    """Follows what position and data reach, and lets numbers leave that data alone reach.

    A branch on the data, a loop over ``range(len(x))`` or over a sequential plate are the same in
    every evaluation. ``make_fx`` refuses them all, since it does not know which operations lie
    between the position and a number. The numbers are recorded as constants, with a guard.
    """

    def __init__(self, influence: Influence) -> None:
        super().__init__()
        self.influence = influence

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs one operation and notes where influences go, and at which line."""
        run = super().__torch_dispatch__
        result = self.influence.follow(
            func, args, kwargs or {}, lambda func, args, kwargs: run(func, types, args, kwargs)
        )
        _note_place()
        return result


def _note_place() -> None:
    """Tells the nodes recorded last which line of the model they come from."""
    mode = get_innermost_proxy_mode()
    if mode is None:
        return
    place = None
    for node in reversed(mode.tracer.graph.nodes):
        if node.op != "call_function" or "place" in node.meta:
            return
        place = place or current_place()
        node.meta["place"] = place


@contextmanager
def _without_onednn() -> Iterator[None]:
    """Records recurrent layers step by step: oneDNN's one operation does not replay."""
    enabled: bool = torch._C._get_mkldnn_enabled()  # the public context warns of other settings
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def _sources_when_called() -> AbstractContextManager[Any]:
    """Makes the source of recorded graphs when they are first called, where torch can."""
    try:
        from torch.fx._lazy_graph_module import _use_lazy_graph_module
    except ImportError:
        return nullcontext()
    return _use_lazy_graph_module(True)


@contextmanager
def _without_fake_values() -> Iterator[None]:
    """Leaves out the fake tensor by which make_fx describes every value, beside its metadata.

    Nothing here reads it, and it is near half the time of a recording. Values that are fake already
    are described as always, and so is what another thread records meanwhile.
    """
    extract: Any = getattr(proxy_tensor, "extract_val", None)
    if extract is None:
        yield
        return
    own = threading.get_ident()

    def described(value: Any, *args: Any, **kwargs: Any) -> Any:
        if type(value) in (Tensor, torch.nn.Parameter) and threading.get_ident() == own:
            return None
        return extract(value, *args, **kwargs)

    module: Any = proxy_tensor
    module.extract_val = described
    try:
        yield
    finally:
        module.extract_val = extract


def flat_graph(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """Records aten operations with make_fx, under one fake mode.

    make_fx describes values by fake tensors and, where it finds no fake mode, makes a new one
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
        with tracing(TracingContext(fakes)), _sources_when_called(), _without_fake_values():
            return make_fx(noted)(*inputs)
    finally:
        for tracer in tracers:
            vars(tracer).clear()


def trace(
    function: LogDensities,
    position: Tensor,
    *,
    gradients: bool = True,
    only_values: bool = False,
    recording: Recording | None = None,
) -> Trace:
    """Records :func:`evaluate` as a functional graph whose every constant is an input.

    Args:
        function: One chain's ``(log_base, log_target)``.
        position: Example position, shape ``[*batch, D]``.
        gradients: Whether gradients are needed; zeros are recorded if not.
        only_values: Whether to record log densities alone. Then the graph itself may be
            differentiated, twice if need be: recorded gradients hold what autograd saved as
            constants, which breaks second derivatives.
        recording: What :func:`record_densities` gave for the same function, if that was done.

    Returns:
        The graph and the live tensors to call it with.

    Raises:
        Unsupported: If operations' shapes depend on the position.
        Impure: If the function writes into a tensor that it did not create, or draws randomly.
        Exception: Whatever :func:`~torch.fx.experimental.proxy_tensor.make_fx` or the function
            raise, for example at a branch that depends on the position.
    """
    if recording is None:
        recording = record_densities(
            function, position, gradients=gradients, only_values=only_values
        )
    num_read, noted = len(recording.constants), recording.influence
    graph, constants = _functional(recording, position)
    refuse_writes(graph)
    guards = split_guards(graph, position, constants, noted)
    drop_dead(graph)
    refuse_randomness(graph)
    ShapeProp(graph).propagate(position, *(constant.detach() for constant in constants))
    shapes_to_literals(graph, position.device)
    constants = constants + make_batchable(graph, position.device)
    fold_uniform(simplify(graph), position.device)
    return Trace(simplify(graph), constants, tuple(noted.exits), guards, num_read)


def record_densities(
    function: LogDensities,
    position: Tensor,
    *,
    gradients: bool = True,
    only_values: bool = False,
) -> Recording:
    """Records :func:`evaluate`, as :func:`trace` does, before any pass."""

    def outputs(leaf: Tensor) -> tuple[Tensor, ...]:
        if only_values:
            return values_of(function, leaf)
        return evaluate(function, leaf, gradients=gradients)

    return _record(outputs, position)


def record(
    function: Callable[[Tensor], tuple[Tensor, ...]], position: Tensor
) -> tuple[fx.GraphModule, list[Tensor], Influence]:
    """Records a function as a functional graph, and what leaves it.

    Args:
        function: From the position to tensors.
        position: Example position.

    Returns:
        The graph of ``(position, *constants)`` with the guards as last outputs, the constants,
        and what left.
    """
    recording = _record(function, position)
    graph, constants = _functional(recording, position)
    return graph, constants, recording.influence


def _record(function: Callable[[Tensor], tuple[Tensor, ...]], position: Tensor) -> Recording:
    noted: list[Influence] = []

    def recorded(leaf: Tensor) -> tuple[Tensor, ...]:
        influence = Influence(leaf)
        noted.append(influence)
        with _Recording(influence), ExitsByFunction(influence):
            outputs = function(leaf)
        for exit in influence.exits:
            if exit.reached_by == "position":  # the model caught the exception
                raise PositionLeft(exit)
        return (*outputs, *(guard.tensor for guard in influence.guards))

    with as_written(), _without_onednn(), without_shortcuts():
        graph = flat_graph(recorded, position)
    constants = lift_constants(graph)
    return Recording(graph, constants, noted[-1], str(graph.code))


def _functional(recording: Recording, position: Tensor) -> tuple[fx.GraphModule, list[Tensor]]:
    """Removes writes in place; the constants that the function read stay the first inputs."""
    graph, constants = recording.graph, recording.constants
    inputs = [position, *(constant.detach() for constant in constants)]
    if any(is_mutable(node) for node in graph.graph.nodes):
        functional = torch.func.functionalize(_WithPlaces(graph).run, remove="mutations")
        with as_written(), _without_onednn():
            graph = flat_graph(functional, *inputs)
        constants = constants + lift_constants(graph)
    return graph, constants


class _WithPlaces(fx.Interpreter):
    """Runs a graph and hands the places of its nodes on to those recorded meanwhile."""

    def run_node(self, node: fx.Node) -> Any:
        """Runs one node."""
        result = super().run_node(node)
        mode = get_innermost_proxy_mode()
        for new in reversed(mode.tracer.graph.nodes) if mode is not None else ():
            if new.op != "call_function" or "place" in new.meta:
                break
            new.meta["place"] = node.meta.get("place")
        return result


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
