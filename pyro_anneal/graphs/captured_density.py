"""Base and target of K chains on one recording, whatever data it is bound to."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

from ..kernels import State
from ..models.places import summary
from ..native.evaluation import DensitySource
from .evaluation import LINALG_ERROR, LogDensities, Outputs, evaluate_or_nan
from .exits import Exit
from .inductor import compile_graph, compiler_problem
from .programs import Evaluator, Native, Program, replaced, stacked
from .purity import evaluate_rows, undisturbed, worst_difference
from .recorded import Mode
from .recording import (
    Recording,
    Trace,
    batch,
)

__all__ = ["CapturedDensity"]


class CapturedDensity:
    """Base and target of K chains, a :class:`~pyro_anneal.kernels.Density`.

    Made by :func:`capture`.

    Attributes:
        reason: Why a better :attr:`mode` is not used, or None.
        num_evaluations: Calls so far; each evaluates all chains once.
        exits: Values that left the recording: of the position (then there is no graph) or of data.
    """

    def __init__(
        self,
        function: LogDensities | None,
        example: Tensor,
        traced: Trace | None,
        *,
        num_chains: int,
        compile: bool,
        reason: str | None,
        gradients: bool = True,
        native: bool = False,
    ) -> None:
        self.function = function
        self.example = example
        self.num_chains = num_chains
        self._gradients = gradients
        self.num_evaluations = 0
        self.reason = reason
        self._trace = traced
        self._constants = [] if traced is None else traced.constants
        self.exits: tuple[Exit, ...] = () if traced is None else traced.exits
        self._compile = False
        self._looped = False
        self._wants_native = native and example.device.type == "cpu"
        self._programs: dict[int | None, Program] = {}  # shared by all that have this graph
        self._evaluators: dict[int | None, Evaluator] = {}
        if compile:
            self.compile()
        self._prepare()

    def chains_at_once(self, num_chains: int) -> int:
        """Tells how many of ``num_chains`` chains are evaluated together: all, or as many as fit.

        Many data make the arrays of all chains too large for a processor's memory to keep up with.
        Their graph is evaluated chain by chain, or a few at a time where they share large matrices.
        """
        if self._trace is None or self.example.device.type != "cpu":
            return num_chains
        evaluator = self._evaluator(None)
        return evaluator.program.chains_at_once(num_chains, evaluator.values)

    @property
    def mode(self) -> Mode:
        """How densities are evaluated, from fast to slow: compiled, graph, graph-loop, eager."""
        if self._trace is None:
            return "eager"
        if self._native() is not None:
            return "compiled"
        if self._looped:
            return "graph-loop"
        return "compiled" if self._compile else "graph"

    def compile(self) -> None:
        """Compiles evaluations from now on, where that is possible."""
        if self._trace is None or self._looped or self._compile:
            return
        self._wants_native = self.example.device.type == "cpu"
        if self._native() is not None:
            return
        problem = compiler_problem(self.example.device)
        if problem is not None:
            self.reason = problem
            return
        self._compile = True
        self._evaluators = {key: one for key, one in self._evaluators.items() if key is None}

    @property
    def constants(self) -> tuple[Tensor, ...]:
        """The live tensors that the density reads: parameters, data, buffers."""
        return tuple(self._constants)

    @property
    def serves_all_data(self) -> bool:
        """Whether the graph is proven to serve all data and parameters of its shapes.

        So it is where no value of a tensor left the recording.
        """
        return self._trace is not None and not self.exits

    def serves(self, replacements: Mapping[Tensor, Tensor] | None = None) -> bool:
        """Tells whether the graph is right for other data, and for parameters as they are now.

        Args:
            replacements: New tensor by old tensor, as in :meth:`rebind`.

        Returns:
            True where nothing left the recording, and where what left is the same for these data
            (the same branch, the same count). False without a graph.
        """
        if self._trace is None:
            return False
        if self._trace.guards is None:
            return True
        given = {id(old): new for old, new in (replacements or {}).items()}
        return self._trace.guards.hold([given.get(id(c), c) for c in self._constants])

    @property
    def code(self) -> str | None:
        """The operations recorded for one chain, or None without a graph."""
        return None if self._trace is None else str(self._trace.graph.code)

    def __call__(self, position: Tensor) -> State:
        """Evaluates K chains.

        Args:
            position: Unconstrained positions, shape ``[K, *batch, D]``. A K not met before is
                vectorized (and compiled) on the spot.

        Returns:
            Log densities in nats and their gradients; NaN where the model fails.

        Raises:
            ValueError: If the shape is not K times the example's.
        """
        if position.shape[1:] != self.example.shape:
            raise ValueError(
                f"position has shape {list(position.shape)}, expected [K, "
                f"{', '.join(map(str, self.example.shape))}]"
            )
        self.num_evaluations += 1
        return State(position, *self._outputs(position))

    def refresh(self) -> None:
        """Reads parameters and data anew; call it after they changed in place.

        Raises:
            ValueError: If the new values change a shape inside the density, or a number that left
                the recording.
        """
        self._check_guards()
        for evaluator in self._evaluators.values():
            evaluator.refresh(self._constants)

    def rebind(
        self, replacements: Mapping[Tensor, Tensor], function: LogDensities | None = None
    ) -> CapturedDensity:
        """Returns the same density on other data (or parameters), without a new capture.

        Args:
            replacements: New tensor by old tensor. Old tensors are known by identity.
            function: The log densities of one chain on the new data; needed by :meth:`check`
                and in the eager mode.

        Returns:
            A density that shares graphs and compiled code with this one.

        Raises:
            ValueError: If an old tensor is not read by the density, shape, dtype or device
                differ, ``function`` is missing in the eager mode, or :meth:`serves` is false.
        """
        if self._trace is None and function is None:
            raise ValueError(
                "the eager mode has no graph to rebind: pass function on the new data"
            )
        constants = list(self._constants)
        if self._trace is not None:
            for old, new in replacements.items():
                constants = replaced(constants, old, new)
        other = copy.copy(self)
        other.function = function
        other.num_evaluations = 0
        other._constants = constants
        other._check_guards()
        other._evaluators = {}
        for count, evaluator in self._evaluators.items():
            other._evaluators[count] = copy.copy(evaluator)
        other.refresh()
        return other

    def without_data(self) -> CapturedDensity:
        """Returns the graphs alone, for :meth:`on_recording` to put data in."""
        other, traced = copy.copy(self), self._required
        exits = tuple(replace(exit, sources=()) for exit in self.exits)
        made = traced.constants[traced.num_read :]
        other._trace = replace(traced, constants=made, exits=exits)
        other.exits, other.function = exits, None
        other._constants, other._evaluators = [], {}
        return other

    def on_recording(
        self,
        function: LogDensities,
        example: Tensor,
        recording: Recording,
        *,
        num_chains: int,
    ) -> CapturedDensity | None:
        """Puts data in graphs :meth:`without_data`.

        Args:
            function: One chain's log densities.
            example: A typical position.
            recording: Of the function, of the same code as the one that the graphs were made of.
            num_chains: Number K of chains to prepare for.

        Returns:
            The density of the function; None if a number that left the recording is another.
        """
        other, traced = copy.copy(self), self._required
        other.function, other.example, other.num_chains = function, example, num_chains
        other.num_evaluations = 0
        other.exits = tuple(recording.influence.exits)
        other._constants = [*recording.constants, *traced.constants]
        other._trace = replace(traced, constants=other._constants, exits=other.exits)
        other._evaluators = {}
        if not other.serves():
            return None
        try:
            other._prepare()
        except ValueError:  # a shape that follows from values
            return None
        return other

    def _check_guards(self) -> None:
        if self._trace is None or self.serves():
            return
        left = "; ".join(str(exit) for exit in self.exits[:3])
        raise ValueError(
            f"the graph was recorded with numbers that are others now ({left}): capture the "
            "density anew, or keep such values in tensors"
        )

    def graph_and_inputs(self, num_chains: int) -> tuple[fx.GraphModule, list[Tensor]]:
        """Returns the graph of K chains, for compilation inside something larger.

        Args:
            num_chains: Number K of chains.

        Returns:
            ``graph`` and ``inputs`` such that ``graph(position, *inputs)`` returns log_base,
            log_target, grad_base and grad_target, contiguous. :meth:`refresh` makes new inputs.

        Raises:
            ValueError: If there is no graph of K chains.
        """
        if self.mode not in ("eager", "graph-loop"):
            evaluator = self._evaluator(num_chains)
            if not self._looped:
                return evaluator.body, list(evaluator.values)
        raise ValueError(f"no graph of {num_chains} chains: {self.reason}")

    def chain_graph_and_inputs(self) -> tuple[fx.GraphModule, list[Tensor]]:
        """Returns the graph of one chain, for vectorization by other means than vmap.

        Returns:
            ``graph`` and ``inputs`` as in :meth:`graph_and_inputs`, for a position
            ``[*batch, D]``.

        Raises:
            ValueError: If there is no graph.
        """
        evaluator = self._evaluator(None)
        return evaluator.body, list(evaluator.values)

    def native_source_and_inputs(self) -> tuple[DensitySource, list[Tensor]] | None:
        """Returns the density in C++ and what all chains share, or None where there is none."""
        native = self._native()
        if native is None or native.source is None:
            return None
        return native.source, self._evaluator(None).ready

    @property
    def native_problem(self) -> str | None:
        """Why there is no native code of this graph, or None if there is."""
        if self._native() is not None:
            return None
        if self._trace is None or not self._wants_native:
            return "native code was not asked for"
        native = self._evaluator(None).program.native
        reason = None if native is None else native.reason
        return reason or "so few chains would leave most of each vector of native code idle"

    def without_native_code(self) -> None:
        """Evaluates the graph itself from now on."""
        self._wants_native = False
        self._prepare()

    def check(self, positions: Tensor) -> None:
        """Compares the graph with the model itself.

        A graph is wrong where the model turned tensors into numbers (``.numpy()``, ``.tolist()``,
        ``.item()``) or read a Python attribute that changed since: these were recorded as
        constants. Beside it, the gradient of a sum with random weights of rows tells whether rows of
        a batch plate meet there: it must be every row's own, times its weight.

        Args:
            positions: Where to compare, shape ``[N, *batch, D]``; each costs one evaluation
                through the model.

        Raises:
            ValueError: If they differ by more than rounding, or rows meet.
        """
        function = self.function
        has_rows = self._gradients and self.example.shape[:-1].numel() > 1
        if self._trace is None and (function is None or not has_rows):
            return
        if function is None:
            raise ValueError("this density was rebound without function: nothing to check against")
        with undisturbed(self.example.device):
            meet = False
            if has_rows:
                evaluated = [evaluate_rows(function, position) for position in positions]
                model = stacked([outputs for outputs, _ in evaluated])
                meet = any(rows_meet for _, rows_meet in evaluated)
            else:
                model = self._eager_at(function, positions)
            if self._trace is not None:
                mismatch = self._mismatch(function, positions, model)
                if mismatch is not None:
                    raise ValueError(
                        f"the density depends on values that left the graph: {mismatch}. Look for "
                        ".numpy(), .tolist(), .item() or float() of latents, parameters or data, "
                        "and for Python attributes that changed; keep such values in tensors"
                    )
        if meet:
            raise ValueError(
                "rows of a batch plate influence each other's log density: leave the plate "
                "out of batch_plates to treat it jointly"
            )

    @property
    def _required(self) -> Trace:
        """The recording, where what is asked needs one."""
        if self._trace is None:
            raise ValueError(f"no graph of one chain: {self.reason}")
        return self._trace

    def _prepare(self) -> None:
        """Makes what evaluates the chains, where there is a graph."""
        if self._trace is not None and self._native() is None:
            size = self.chains_at_once(self.num_chains)
            self._evaluator(None if size == 1 and not self._compile else size)

    def _native(self) -> Native | None:
        """Finds or makes native code; None if it is not wanted or cannot be made."""
        if not self._wants_native or self._trace is None:
            return None
        evaluator = self._evaluator(None)
        if evaluator.program.native is None:
            evaluator.program.native = Native(evaluator.body, self.example, evaluator.values)
        native = evaluator.program.native
        if native.density is None or native.wastes(self.num_chains):
            return None
        return native

    def _evaluator(self, num_chains: int | None) -> Evaluator:
        """Finds or makes the graph of K chains; of one chain for None, or if vmap fails."""
        key = None if self._looped else num_chains
        if key in self._evaluators:
            return self._evaluators[key]
        traced, program = self._required, self._programs.get(key)
        constants = [constant.detach() for constant in self._constants]
        if program is None:
            if key is not None:
                try:
                    position = self.example.expand(key, *self.example.shape).contiguous()
                    traced = batch(traced.graph, position, constants)
                except Exception as error:  # noqa: BLE001 - whatever vmap does not know
                    self._looped = True
                    self.reason = f"the graph does not vectorize over chains ({summary(error)})"
                    return self._evaluator(num_chains)
            program = Program(traced, len(constants))
        evaluator = Evaluator(program, constants)
        if self._compile and key is not None:
            position = self.example.expand(key, *self.example.shape).contiguous()
            try:
                evaluator.run = compile_graph(program.body, [position, *evaluator.values])
            except Exception as error:  # noqa: BLE001 - inductor's own failures
                self._compile = False
                self.reason = f"compilation failed ({summary(error)})"
        self._programs[key] = program
        self._evaluators[key] = evaluator
        return evaluator

    def _outputs(self, position: Tensor) -> Outputs:
        if self._trace is None:
            return self._eager(position)
        native = self._native()
        if native is not None and native.density is not None:
            position = position.detach().contiguous()
            log_base, log_target, grad_base, grad_target = native.density(
                position, self._evaluator(None).ready
            )
            return log_base, log_target, grad_base, grad_target
        size = self.chains_at_once(len(position))
        try:
            with torch.no_grad():
                if self._looped or (size == 1 and not self._compile):
                    alone = self._evaluator(None)
                    return stacked([alone(chain) for chain in position])
                if size < len(position):
                    return self._in_turn(position, size)
                return self._evaluator(len(position))(position)
        except LINALG_ERROR:  # an eigendecomposition of one chain
            return self._eager(position)

    def _in_turn(self, position: Tensor, size: int) -> Outputs:
        """Evaluates ``size`` chains at a time, exactly: the last call is filled up."""
        filler = position[:1].expand(-len(position) % size, *position.shape[1:])
        pieces = torch.cat([position, filler]).split(size)
        merged = zip(*(self._evaluator(size)(piece) for piece in pieces), strict=True)
        parts = (torch.cat(part)[: len(position)] for part in merged)
        log_base, log_target, grad_base, grad_target = parts
        return log_base, log_target, grad_base, grad_target

    def _eager(self, position: Tensor) -> Outputs:
        function = self.function
        if function is None:
            raise ValueError("this density was rebound without function and has no graph")
        return self._eager_at(function, position)

    def _eager_at(self, function: LogDensities, positions: Tensor) -> Outputs:
        return stacked(self._eager_each(function, positions))

    def _eager_each(self, function: LogDensities, positions: Tensor) -> list[Outputs]:
        return [evaluate_or_nan(function, u, gradients=self._gradients) for u in positions]

    def _mismatch(self, function: LogDensities, positions: Tensor, model: Outputs) -> str | None:
        """Describes the largest difference between graph and model beyond rounding.

        Args:
            function: One chain's log densities, through the model.
            positions: Where to compare, ``[N, *batch, D]``.
            model: What the function gives there.
        """
        graph = self._graph_outputs(positions)
        # Log densities may have a wider type than the position, but no more digits.
        eps = torch.finfo(positions.dtype).eps
        if worst_difference(graph, model, eps) is None:
            return None
        # A cancellation amplifies rounding: what a few ulps of the position do is no error.
        moved = self._eager_at(function, positions * (1.0 + 4.0 * eps))
        noise = [(a - b).abs().nan_to_num() for a, b in zip(moved, model, strict=True)]
        return worst_difference(graph, model, eps, noise)

    def _graph_outputs(self, positions: Tensor) -> Outputs:
        """Evaluates N positions by a graph of K chains, repeating positions to fill it."""
        count = self.num_chains
        chunks = []
        for start in range(0, len(positions), count):
            indices = torch.arange(start, start + count, device=positions.device)
            chunks.append(self._outputs(positions[indices % len(positions)]))
        merged = (torch.cat(parts)[: len(positions)] for parts in zip(*chunks, strict=True))
        log_base, log_target, grad_base, grad_target = merged
        return log_base, log_target, grad_base, grad_target
