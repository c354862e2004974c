"""What runs, losses and compilers may ask of the densities of K chains, beside their values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

from torch import Tensor, fx

from ..kernels import Density
from ..native.evaluation import DensitySource
from .evaluation import LogDensities
from .exits import Exit

__all__ = ["LogDensities", "Mode", "RecordedDensity"]

Mode = Literal["compiled", "graph", "graph-loop", "eager"]


class RecordedDensity(Density, Protocol):
    """Base and target of K chains, recorded where that was possible.

    :class:`~.captured.CapturedDensity` is one, and so is what adds a compiled loop to it.
    """

    num_evaluations: int

    @property
    def mode(self) -> Mode:
        """How densities are evaluated, from fast to slow: compiled, graph, graph-loop, eager."""
        ...

    @property
    def reason(self) -> str | None:
        """Why nothing faster is used, or None."""
        ...

    @property
    def example(self) -> Tensor:
        """A position of one chain, ``[*batch, D]``."""
        ...

    @property
    def num_chains(self) -> int:
        """Number K of chains that it was prepared for."""
        ...

    @property
    def exits(self) -> tuple[Exit, ...]:
        """Values that left the recording."""
        ...

    @property
    def constants(self) -> tuple[Tensor, ...]:
        """The live tensors that the density reads: parameters, data, buffers."""
        ...

    @property
    def code(self) -> str | None:
        """The operations recorded for one chain, or None without a graph."""
        ...

    def check(self, positions: Tensor) -> None:
        """Compares the graph with the model itself at positions ``[N, *batch, D]``."""
        ...

    def serves(self, replacements: Mapping[Tensor, Tensor] | None = None) -> bool:
        """Tells whether the graph is right for other data, and for parameters as they are now."""
        ...

    def rebind(
        self, replacements: Mapping[Tensor, Tensor], function: LogDensities | None = None
    ) -> RecordedDensity:
        """Returns the same density on other data, without a new capture."""
        ...

    def graph_and_inputs(self, num_chains: int) -> tuple[fx.GraphModule, list[Tensor]]:
        """Returns the graph of K chains, and its inputs after the position."""
        ...

    def chain_graph_and_inputs(self) -> tuple[fx.GraphModule, list[Tensor]]:
        """Returns the graph of one chain, and its inputs after the position."""
        ...

    def native_source_and_inputs(self) -> tuple[DensitySource, list[Tensor]] | None:
        """Returns the density in C++ and what all chains share, or None where there is none."""
        ...

    def compile(self) -> None:
        """Compiles evaluations from now on, where that is possible."""
        ...
