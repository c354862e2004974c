r"""Chunks of annealing steps as one compiled program.

For small models the time of a step is the time to dispatch its operations one by one. Here the
graph of a whole step (:mod:`.chunk_graph`) becomes the body of a loop that inductor compiles to
C++; its random numbers are drawn before, as those of the eager loop, so that both give the same
numbers to rounding. On a GPU the step is captured once as a CUDA graph and
replayed, which needs no synchronization with the host.

What cannot be compiled runs step by step; :class:`LoopedDensity` says why.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, fx

from ..chains.path import Carry, StepTable
from ..graphs.exits import Exit
from ..graphs.recorded import LogDensities, Mode, RecordedDensity
from ..graphs.repetition import repeated_dims
from ..kernels import Kernel, State, Tuning
from ..kernels.base import moves_chains_alone
from ..native.evaluation import DensitySource
from .native_loop import NativeLoop
from .runners import Run, as_cuda_graph, as_loop, step_by_step
from .statistics import new_table
from .step_graph import Body, DensityGraphs, build_body
from .storage import store_table

__all__ = ["LoopMode", "LoopedDensity"]

LoopMode = Literal["loop", "cuda-graph", "step"]


class _Compiled(NamedTuple):
    """A body, what runs it, how, and why not better."""

    body: Body
    run: Run
    mode: LoopMode
    reason: str | None


# Programs by what they were made for, or why there is none. They hold no data: these are inputs.
_PROGRAMS: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
Made = TypeVar("Made")
# State, log-weights and integral after the steps of a table, and their statistics.
_Runs = Callable[..., tuple[State, Tensor, Tensor, Tensor]]
_CAPACITY = 32
# Inductor's time grows with the operations of the step, and so does the C++ compiler's.
_MAX_OPERATIONS = 12_000


class LoopedDensity:
    """A captured density that also runs whole chunks of steps.

    As a :class:`~pyro_anneal.kernels.Density` it is the density it wraps.

    Args:
        density: The captured density.
        problem: Why chunks must be run step by step from the start.
        fallback: Called once if chunks turn out not to compile; by default compiles the density.

    Attributes:
        loop_mode: How chunks ran so far, or None: ``"loop"``, ``"cuda-graph"``, or ``"step"``, one
            call per step.
        loop_reason: Why nothing better was possible, or None.
    """

    def __init__(
        self,
        density: RecordedDensity,
        problem: str | None = None,
        *,
        fallback: Callable[[], object] | None = None,
    ) -> None:
        self.density = density
        self.fallback = density.compile if fallback is None else fallback
        self.loop_mode: LoopMode | None = None
        self.loop_reason = problem

    def __call__(self, position: Tensor) -> State:
        """Evaluates K chains."""
        return self.density(position)

    @property
    def num_evaluations(self) -> int:
        """Calls so far; each evaluates all chains once."""
        return self.density.num_evaluations

    @num_evaluations.setter
    def num_evaluations(self, count: int) -> None:
        self.density.num_evaluations = count

    @property
    def mode(self) -> Mode:
        """How single evaluations are made."""
        return self.density.mode

    @property
    def reason(self) -> str | None:
        """Why the mode is no faster one, or None."""
        return self.density.reason

    @property
    def example(self) -> Tensor:
        """A position of one chain."""
        return self.density.example

    @property
    def num_chains(self) -> int:
        """Number K of chains that the density was prepared for."""
        return self.density.num_chains

    @property
    def exits(self) -> tuple[Exit, ...]:
        """Values that left the recording."""
        return self.density.exits

    @property
    def constants(self) -> tuple[Tensor, ...]:
        """The live tensors that the density reads."""
        return self.density.constants

    @property
    def code(self) -> str | None:
        """The operations recorded for one chain, or None without a graph."""
        return self.density.code

    def check(self, positions: Tensor) -> None:
        """Compares the graph with the model itself."""
        self.density.check(positions)

    def serves(self, replacements: Mapping[Tensor, Tensor] | None = None) -> bool:
        """Tells whether the graph is right for other data."""
        return self.density.serves(replacements)

    def rebind(
        self, replacements: Mapping[Tensor, Tensor], function: LogDensities | None = None
    ) -> RecordedDensity:
        """Returns the density alone on other data."""
        return self.density.rebind(replacements, function)

    def graph_and_inputs(self, num_chains: int) -> tuple[fx.GraphModule, list[Tensor]]:
        """Returns the graph of K chains, and its inputs."""
        return self.density.graph_and_inputs(num_chains)

    def chain_graph_and_inputs(self) -> tuple[fx.GraphModule, list[Tensor]]:
        """Returns the graph of one chain, and its inputs."""
        return self.density.chain_graph_and_inputs()

    def native_source_and_inputs(self) -> tuple[DensitySource, list[Tensor]] | None:
        """Returns the density in C++, and what all chains share."""
        return self.density.native_source_and_inputs()

    def compile(self) -> None:
        """Compiles single evaluations."""
        self.density.compile()

    def run_chunk(
        self,
        kernel: Kernel,
        carry: Carry,
        table: StepTable,
        noise: tuple[Tensor, ...],
        *,
        rows: int,
    ) -> tuple[Carry, Tensor] | None:
        """Runs the steps of ``table``, or returns None where they must be run one by one.

        Args:
            kernel: Moves the chains.
            carry: Where the chains are.
            table: One row per step.
            noise: What the kernel draws, with a leading dimension of steps.
            rows: The most steps that any table has: programs are made for so many.

        Returns:
            Where the chains are after the last step, and the statistics of each, ``[n, 4]``.
        """
        if self.loop_reason is not None and self.loop_mode is None:
            return None
        try:
            program = self._native(kernel, carry.state, noise, table)
            program = program or self._program(kernel, carry.state, noise, table, rows)
            state, log_weights, integral, seen = program(*carry, table, noise)
        except Exception as error:  # of kernels, vmap, inductor, the C++ compiler
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            known = isinstance(error, _NoProgram)
            self.loop_mode = None
            self.loop_reason = str(error) if known else _first_line(error)
            self.fallback()
            return None
        self.density.num_evaluations += kernel.num_gradients * len(table.beta)
        return Carry(state, log_weights, integral), seen

    def _native(
        self, kernel: Kernel, state: State, noise: Sequence[Tensor], table: StepTable
    ) -> _Runs | None:
        """Finds or makes native code for the chunks; None where inductor must compile them."""
        found = self.density.native_source_and_inputs() if moves_chains_alone(kernel) else None
        if found is None:
            return None
        source, shared = found
        one = [part[:1] for part in noise]
        shapes = [(x.shape[1:], x.dtype) for x in (*state, *(part[0] for part in noise))]
        key = ("native", type(kernel), kernel, source.text, *shapes, torch.get_num_threads())

        def make() -> NativeLoop:
            loop = NativeLoop(source, kernel, state, [part[0] for part in noise], table)
            _check(partial(loop, shared=shared), kernel, self.density, state, one, table)
            return loop

        loop = _kept(key, make)
        if isinstance(loop, str):
            return None
        self.loop_mode, self.loop_reason = "loop", None
        return partial(loop, shared=shared)

    def _program(
        self,
        kernel: Kernel,
        state: State,
        noise: Sequence[Tensor],
        table: StepTable,
        size: int,
    ) -> _Program:
        graphs = DensityGraphs(
            self.density.chain_graph_and_inputs(),
            self.density.graph_and_inputs(len(state.position)),
        )
        one = [part[:1] for part in noise]
        key = _key(kernel, graphs, [*state, *one], size)
        found = _kept(key, lambda: self._make(graphs, kernel, state, noise, table, size))
        if isinstance(found, str):
            raise _NoProgram(found)
        self.loop_mode, self.loop_reason = found[2:]
        shared = graphs.one_chain[1] if found.body.layout.last else graphs.all_chains[1]
        return _Program(found, shared)

    def _make(
        self,
        graphs: DensityGraphs,
        kernel: Kernel,
        state: State,
        noise: Sequence[Tensor],
        table: StepTable,
        size: int,
    ) -> _Compiled:
        step = [part[0].contiguous() for part in noise]
        body = build_body(graphs, kernel, state, step, table, size)
        shared = graphs.one_chain[1] if body.layout.last else graphs.all_chains[1]
        one = [part[:1] for part in noise]
        compiled = _compile(body, state, one, table, shared)
        _check(_Program(compiled, shared), kernel, self.density, state, one, table)
        return compiled


def _kept(key: tuple[Any, ...], make: Callable[[], Made]) -> Made | str:
    """Returns what was made for a key, or why it could not be."""
    found = _PROGRAMS.get(key)
    if found is None:
        try:
            found = make()
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - to be raised again, now and later
            found = _first_line(error)
        _PROGRAMS[key] = found
        if len(_PROGRAMS) > _CAPACITY:
            _PROGRAMS.popitem(last=False)
    _PROGRAMS.move_to_end(key)
    return found


class _NoProgram(Exception):
    """Says why there is no program for these chunks."""


class _Program:
    """A compiled body with one density's data."""

    def __init__(self, compiled: _Compiled, shared: Sequence[Tensor]) -> None:
        self.body, self.run = compiled.body, compiled.run
        self.shared = self.body.layout.store_shared(shared)

    def __call__(
        self,
        state: State,
        log_weights: Tensor,
        integral: Tensor,
        table: StepTable,
        noise: Sequence[Tensor],
    ) -> tuple[State, Tensor, Tensor, Tensor]:
        count = len(table.beta)
        arguments = _arguments(self.body, state, log_weights, integral, table, noise, self.shared)
        with torch.no_grad():
            _, *buffers, seen = self.run(count, *arguments)
        *parts, log_weights, integral = self.body.layout.load(buffers)
        return State(*parts), log_weights, integral, seen[:, :count].T


def _arguments(
    body: Body,
    state: State,
    log_weights: Tensor,
    integral: Tensor,
    table: StepTable,
    noise: Sequence[Tensor],
    shared: Sequence[Tensor],
) -> list[Tensor]:
    """Lays out the arguments of a body at step 0."""
    layout, size = body.layout, body.size
    return [
        torch.zeros((), dtype=torch.long, device=log_weights.device),
        *layout.store([*state, log_weights, integral]),
        new_table(size, state),
        *store_table(table, size),
        *layout.store_noise(noise, size),
        *shared,
        *body.constants,
    ]


def _key(
    kernel: Kernel, graphs: DensityGraphs, tensors: Sequence[Tensor], size: int
) -> tuple[Any, ...]:
    shared = (*graphs.one_chain[1], *graphs.all_chains[1])
    return (
        type(kernel),
        kernel,
        graphs.all_chains[0].code,
        graphs.one_chain[0].code,
        *((x.shape, x.dtype, x.device, repeated_dims(x)) for x in (*tensors, *shared)),
        size,
        torch.get_num_threads(),
    )


def _compile(
    body: Body,
    state: State,
    noise: Sequence[Tensor],
    table: StepTable,
    shared: Sequence[Tensor],
) -> _Compiled:
    """Compiles a body: as a loop where that works, else as one step per call."""
    num_operations = len(body.graph.graph.nodes)
    if num_operations > _MAX_OPERATIONS:
        raise NotImplementedError(
            f"a step has {num_operations} operations, more than the {_MAX_OPERATIONS} that "
            "compile in reasonable time: use fewer leapfrogs"
        )
    # Two tensors: inputs that share storage would be compiled into one.
    weights = torch.zeros_like(state.log_target, dtype=torch.float64)
    integral = weights.clone()
    stored = body.layout.store_shared(shared)
    first = StepTable(*(column[:1] for column in table))
    example = _arguments(body, state, weights, integral, first, noise, stored)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor's imports use what torch deprecates
        if state.position.device.type == "cuda":
            return _Compiled(body, as_cuda_graph(body, example), "cuda-graph", None)
        try:
            return _Compiled(body, as_loop(body, example), "loop", None)
        except Exception as error:  # noqa: BLE001 - no such loop, or an operation not in loops
            reason = f"one call per step: {_first_line(error)}"
            return _Compiled(body, step_by_step(body, example), "step", reason)


def _check(
    program: _Runs,
    kernel: Kernel,
    density: RecordedDensity,
    state: State,
    noise: Sequence[Tensor],
    table: StepTable,
) -> None:
    """Compares the first step with the kernel's own.

    Raises:
        ValueError: If they differ by more than rounding: the kernel's step is no pure function of
            tensors, or the compiler is wrong.
    """
    weights = torch.zeros_like(state.log_target, dtype=torch.float64)
    first = StepTable(*(column[:1] for column in table))
    got = program(state, weights, weights, first, noise)[0]
    tuning = Tuning(table.step_size[0], table.scale[0])
    with torch.no_grad():
        expected, _ = kernel.step(
            state, density, table.beta[0], tuning, tuple(part[0] for part in noise)
        )
    density.num_evaluations -= kernel.num_gradients
    eps = torch.finfo(state.position.dtype).eps
    same = torch.isclose(got.position, expected.position, rtol=eps**0.5, atol=eps**0.5)
    same |= got.position.isnan() & expected.position.isnan()
    # A chain whose acceptance is decided by rounding may go either way.
    if float((~same).any(-1).double().mean()) > 0.01 and int((~same).any(-1).sum()) > 1:
        raise ValueError("the compiled step differs from the kernel's own step")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
