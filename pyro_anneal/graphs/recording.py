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

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ..models.places import current_place, described
from .assertions import without_shortcuts
from .branches import Untaken, along_branches
from .evaluation import FailuresAsNaN, LogDensities, as_written, evaluate, values_of
from .exits import Exit, ExitsByFunction, Influence, PositionLeft
from .folding import fold_uniform, shapes_to_literals, simplify
from .guards import Guards, split_guards
from .recorder import current_recorder, flat_graph
from .rewriting import (
    drop_dead,
    is_mutable,
    lift_constants,
    make_batchable,
    refuse_randomness,
    refuse_writes,
    without_private_writes,
)

__all__ = [
    "Recording",
    "Trace",
    "batch",
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
    every evaluation. The numbers are recorded as constants, with a guard.
    """

    def __init__(self, influence: Influence) -> None:
        super().__init__()
        self.influence = influence
        self.recorder = current_recorder()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs one operation and notes where influences go, and at which line."""
        run = super().__torch_dispatch__
        result = self.influence.follow(
            func, args, kwargs or {}, lambda func, args, kwargs: run(func, types, args, kwargs)
        )
        if self.recorder is not None:
            self.recorder.note_place(current_place)
        return result


@contextmanager
def _without_onednn() -> Iterator[None]:
    """Records recurrent layers step by step: oneDNN's one operation does not replay."""
    enabled: bool = torch._C._get_mkldnn_enabled()  # the public context warns of other settings
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


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
        Exception: Whatever the function raises while it is recorded.
    """
    if recording is None:
        recording = record_densities(
            function, position, gradients=gradients, only_values=only_values
        )
    num_read, noted = len(recording.constants), recording.influence
    graph, constants = _functional(recording, position)
    refuse_writes(graph)
    guards = split_guards(graph, position, constants, noted)
    drop_dead(graph.graph)
    refuse_randomness(graph)
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

    return _record(outputs, position, branching=not only_values)


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


def _record(
    function: Callable[[Tensor], tuple[Tensor, ...]], position: Tensor, *, branching: bool = True
) -> Recording:
    noted: list[Influence] = []

    def recorded(leaf: Tensor) -> tuple[Tensor, ...]:
        influence = Influence(leaf)
        noted.append(influence)
        with _Recording(influence), ExitsByFunction(influence):
            if branching:
                outputs = _along_branches(lambda: function(leaf), influence)
            else:  # to be differentiated: what one way gives would reach the others
                outputs = function(leaf)
        for exit in influence.exits:
            if exit.reached_by == "position":  # the model caught the exception
                raise PositionLeft(exit)
        return (*outputs, *(guard.tensor for guard in influence.guards))

    with as_written(), _without_onednn(), without_shortcuts():
        graph = flat_graph(recorded, position)
    constants = lift_constants(graph)
    return Recording(graph, constants, noted[-1], graph.graph.python_code("self").src)


def _along_branches(
    function: Callable[[], tuple[Tensor, ...]], influence: Influence
) -> tuple[Tensor, ...]:
    try:
        return along_branches(function, influence.branches)
    except Untaken as error:
        place = described(influence.branches.place)
        raise PositionLeft(Exit("a branch", place, "position")) from error


def _functional(recording: Recording, position: Tensor) -> tuple[fx.GraphModule, list[Tensor]]:
    """Removes writes in place; the constants that the function read stay the first inputs."""
    graph, constants = recording.graph, recording.constants
    inputs = [position, *(constant.detach() for constant in constants)]
    without_private_writes(graph)
    if any(is_mutable(node) for node in graph.graph.nodes):
        functional = torch.func.functionalize(_WithPlaces(graph).run, remove="mutations")
        with as_written(), _without_onednn():
            graph = flat_graph(functional, *inputs)
        constants = constants + lift_constants(graph)
        for node in graph.graph.nodes:
            if node.target is torch.ops.aten.fill.Scalar:  # which vmap would run once per chain
                node.target = torch.ops.aten.full_like.default
        graph.recompile()
    return graph, constants


class _WithPlaces(fx.Interpreter):
    """Runs a graph and hands the places of its nodes on to those recorded meanwhile."""

    def run_node(self, node: fx.Node) -> Any:
        """Runs one node."""
        result = super().run_node(node)
        recorder = current_recorder()
        if recorder is not None:
            recorder.note_place(lambda: node.meta.get("place"))
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
    return Trace(simplify(batched), constants)
