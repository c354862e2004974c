r"""Densities that run whole chunks of annealing steps as native code.

For small models the time of a step is the time to dispatch its operations one by one. Here a step
of the kernel and the density become one loop in C++ (:mod:`.native_loop`). Its random numbers are
drawn before, as those of single steps, so that both give the same numbers to rounding. What cannot
be written runs step by step; :class:`LoopedDensity` says why.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ..chains.path import Carry, StepTable
from ..graphs.exits import Exit
from ..graphs.recorded import LogDensities, Mode, RecordedDensity
from ..kernels import Kernel, State, Tuning
from ..native.evaluation import DensitySource
from .native_loop import NativeLoop

__all__ = ["LoopedDensity"]

# Loops by what they were made for, or why there is none. They hold no data: these are inputs.
_LOOPS: OrderedDict[tuple[Any, ...], NativeLoop | str] = OrderedDict()
_CAPACITY = 32


class LoopedDensity:
    """A density with native code that also runs whole chunks of steps.

    As a :class:`~pyro_anneal.kernels.Density` it is the density it wraps.

    Args:
        density: The captured density.
        problem: Why chunks must be run step by step from the start.

    Attributes:
        has_run: Whether a chunk ran as a loop so far.
        loop_reason: Why chunks are run step by step, or None.
    """

    def __init__(self, density: RecordedDensity, problem: str | None = None) -> None:
        self.density = density
        self.has_run = False
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
        self, kernel: Kernel, carry: Carry, table: StepTable, noise: tuple[Tensor, ...]
    ) -> tuple[Carry, Tensor] | None:
        """Runs the steps of ``table``, or returns None where they must be run one by one.

        Args:
            kernel: Moves the chains.
            carry: Where the chains are.
            table: One row per step.
            noise: What the kernel draws, with a leading dimension of steps.

        Returns:
            Where the chains are after the last step, and the statistics of each, ``[n, 4]``.
        """
        found = None if self.loop_reason is not None else self.density.native_source_and_inputs()
        if found is None:
            return None
        source, shared = found
        loop = self._loop(source, shared, kernel, carry.state, noise, table)
        if isinstance(loop, str):
            self.loop_reason = loop
            return None
        state, log_weights, integral, seen = loop(*carry, table, noise, shared)
        self.has_run = True
        self.density.num_evaluations += kernel.num_gradients * len(table.beta)
        return Carry(state, log_weights, integral), seen

    def _loop(
        self,
        source: DensitySource,
        shared: Sequence[Tensor],
        kernel: Kernel,
        state: State,
        noise: Sequence[Tensor],
        table: StepTable,
    ) -> NativeLoop | str:
        """Finds or makes the loop of a kernel, or says why there is none."""
        shapes = [(x.shape[1:], x.dtype) for x in (*state, *(part[0] for part in noise))]

        def make() -> NativeLoop:
            loop = NativeLoop(source, kernel, state, [part[0] for part in noise], table)
            one = [part[:1] for part in noise]
            _check(partial(loop, shared=shared), kernel, self.density, state, one, table)
            return loop

        return _kept((type(kernel), kernel, source.text, *shapes), make)


def _kept(key: tuple[Any, ...], make: Callable[[], NativeLoop]) -> NativeLoop | str:
    """Returns what was made for a key, or why it could not be."""
    found = _LOOPS.get(key)
    if found is None:
        try:
            found = make()
        except Exception as error:  # noqa: BLE001 - of kernels, recording, the C++ compiler
            found = _first_line(error)
        _LOOPS[key] = found
        if len(_LOOPS) > _CAPACITY:
            _LOOPS.popitem(last=False)
    _LOOPS.move_to_end(key)
    return found


def _check(
    loop: Callable[..., tuple[State, Tensor, Tensor, Tensor]],
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
    got = loop(state, weights, weights, first, noise)[0]
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
