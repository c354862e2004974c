r"""From the log densities of one chain to a fast evaluator of K chains.

A model written for one chain is recorded once, vectorized over chains as a graph and, on request,
compiled. Parameters and data are inputs of the graph: :meth:`CapturedDensity.refresh` reads them
anew after optimizer steps, :meth:`CapturedDensity.rebind` swaps them for other data of the same
shape, and neither records or compiles again. What cannot be recorded is evaluated through the
model itself, chain by chain, with a warning that says why; what is no function of the latents
(dropout, running statistics) is refused.
"""

from __future__ import annotations

import copy
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ..kernels import State
from ..models.places import user_line
from ..native.evaluation import DensitySource, NativeDensity, density_source, ready
from ..native.values import CannotGenerate
from .exits import Exit, PositionLeft
from .inductor import compile_graph, compiler_problem
from .purity import check_pure, rows_meet_at, undisturbed, worst_difference
from .recording import (
    LINALG_ERROR,
    Outputs,
    Recording,
    Trace,
    batch,
    evaluate_or_nan,
    record_densities,
    split,
    trace,
)
from .repetition import ComputeOnce, WrittenTo, repeated_dims
from .rewriting import Impure

__all__ = ["CapturedDensity", "capture"]

LogDensities = Callable[[Tensor], tuple[Tensor, Tensor]]
Mode = Literal["compiled", "graph", "graph-loop", "eager"]


class _Program:
    """One graph, split into the part per run and the part per evaluation; it holds no data."""

    def __init__(self, traced: Trace, num_constants: int) -> None:
        self.prologue, self.body = split(traced.graph)
        self.run: Callable[..., Outputs] = self.body
        self.own = traced.constants[num_constants:]  # made by the passes, never rebound
        self.native: _Native | None = None  # of the graph of one chain, once asked for
        # Of the values of the first evaluation, for which the body may be compiled.
        self.layouts: list[tuple[torch.Size, tuple[int, ...]]] | None = None


class _Native:
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


class _Evaluator:
    """A program on its data."""

    def __init__(self, program: _Program, constants: Sequence[Tensor]) -> None:
        self.program = program
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
            try:
                with ComputeOnce():
                    values = list(prologue(*tensors))
            except WrittenTo:
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
        return self.program.run(position.contiguous(), *self.values)


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
        self._programs: dict[int | None, _Program] = {}  # shared by all that have this graph
        self._evaluators: dict[int | None, _Evaluator] = {}
        if compile:
            self.compile()
        self._prepare()

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
        self._programs = {}
        self._evaluators = {}

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
                constants = _replaced(constants, old, new)
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
        assert self._trace is not None
        other = copy.copy(self)
        exits = tuple(replace(exit, sources=()) for exit in self.exits)
        made = self._trace.constants[self._trace.num_read :]
        other._trace = replace(self._trace, constants=made, exits=exits)
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
        assert self._trace is not None
        other = copy.copy(self)
        other.function, other.example, other.num_chains = function, example, num_chains
        other.num_evaluations = 0
        other.exits = tuple(recording.influence.exits)
        other._constants = [*recording.constants, *self._trace.constants]
        other._trace = replace(self._trace, constants=other._constants, exits=other.exits)
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
        if self._trace is None:
            raise ValueError(f"no graph of one chain: {self.reason}")
        evaluator = self._evaluator(None)
        return evaluator.body, list(evaluator.values)

    def native_source_and_inputs(self) -> tuple[DensitySource, list[Tensor]] | None:
        """Returns the density in C++ and what all chains share, or None where there is none."""
        native = self._native()
        if native is None or native.source is None:
            return None
        return native.source, self._evaluator(None).ready

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
        if self._trace is None:
            self._check_rows(positions)
            return
        if self.function is None:
            raise ValueError("this density was rebound without function: nothing to check against")
        with undisturbed(self.example.device):
            mismatch = self._mismatch(self.function, positions)
        if mismatch is None:
            self._check_rows(positions)
        else:
            raise ValueError(
                f"the density depends on values that left the graph: {mismatch}. Look for "
                ".numpy(), .tolist(), .item() or float() of latents, parameters or data, and for "
                "Python attributes that changed; keep such values in tensors"
            )

    def _check_rows(self, positions: Tensor) -> None:
        function = self.function
        if function is None or not self._gradients or self.example.shape[:-1].numel() < 2:
            return
        with undisturbed(self.example.device):
            if any(rows_meet_at(function, position) for position in positions):
                raise ValueError(
                    "rows of a batch plate influence each other's log density: leave the plate "
                    "out of batch_plates to treat it jointly"
                )

    def _prepare(self) -> None:
        """Makes what evaluates the chains, where there is a graph."""
        if self._trace is not None and self._native() is None:
            self._evaluator(self.num_chains)

    def _native(self) -> _Native | None:
        """Finds or makes native code; None if it is not wanted or cannot be made."""
        if not self._wants_native or self._trace is None:
            return None
        evaluator = self._evaluator(None)
        if evaluator.program.native is None:
            evaluator.program.native = _Native(evaluator.body, self.example, evaluator.values)
        native = evaluator.program.native
        return None if native.density is None else native

    def _evaluator(self, num_chains: int | None) -> _Evaluator:
        """Finds or makes the graph of K chains; of one chain for None, or if vmap fails."""
        assert self._trace is not None
        key = None if self._looped else num_chains
        if key in self._evaluators:
            return self._evaluators[key]
        traced, program = self._trace, self._programs.get(key)
        constants = [constant.detach() for constant in self._constants]
        if program is None:
            if key is not None:
                try:
                    position = self.example.expand(key, *self.example.shape).contiguous()
                    traced = batch(traced.graph, position, constants)
                except Exception as error:  # noqa: BLE001 - whatever vmap does not know
                    self._looped = True
                    self.reason = f"the graph does not vectorize over chains ({_summary(error)})"
                    return self._evaluator(num_chains)
            program = _Program(traced, len(constants))
        evaluator = _Evaluator(program, constants)
        if self._compile and key is not None and key not in self._programs:
            try:
                program.run = compile_graph(program.body, [position, *evaluator.values])
            except Exception as error:  # noqa: BLE001 - inductor's own failures
                self._compile = False
                self.reason = f"compilation failed ({_summary(error)})"
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
        evaluator = self._evaluator(len(position))
        try:
            with torch.no_grad():
                if self._looped:
                    return _stacked([evaluator(chain) for chain in position])
                return evaluator(position)
        except LINALG_ERROR:  # an eigendecomposition of one chain
            return self._eager(position)

    def _eager(self, position: Tensor) -> Outputs:
        function = self.function
        if function is None:
            raise ValueError("this density was rebound without function and has no graph")
        return self._eager_at(function, position)

    def _eager_at(self, function: LogDensities, positions: Tensor) -> Outputs:
        chains = [evaluate_or_nan(function, u, gradients=self._gradients) for u in positions]
        return _stacked(chains)

    def _mismatch(self, function: LogDensities, positions: Tensor) -> str | None:
        """Describes the largest difference between graph and model beyond rounding."""
        graph = self._graph_outputs(positions)
        model = self._eager_at(function, positions)
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


def capture(
    function: LogDensities,
    example: Tensor,
    *,
    num_chains: int,
    compile: bool = False,
    gradients: bool = True,
    native: bool = False,
) -> CapturedDensity:
    r"""Turns the log densities of one chain into an evaluator of K chains.

    .. math:: u \mapsto (\log q(u), \log p(x, u), \nabla \log q(u), \nabla \log p(x, u))

    Rows of the batch must be independent: the gradient of their sum is taken as every row's own.

    Args:
        function: Maps an unconstrained position ``[*batch, D]`` to ``(log_base, log_target)``,
            each ``[*batch]``, nats. Any PyTorch or Pyro code.
        example: A typical position, shape ``[*batch, D]``.
        num_chains: Number K of chains to prepare for.
        compile: Whether to compile with inductor.
        gradients: Whether gradients are needed; they are zeros if not, and a function that leaves
            torch will do.
        native: Whether a small graph on a CPU becomes native code, which takes a moment.

    Returns:
        The evaluator. Its ``mode`` is ``"compiled"``, ``"graph"``, ``"graph-loop"`` (chain by
        chain through the graph) or ``"eager"`` (chain by chain through ``function``); ``reason``
        says why not better. The last two warn.

    Raises:
        ValueError: If the density draws random numbers, changes a module's buffers, writes into
            tensors it did not create, differs between two calls, or has a wrong shape.

    Example:
        >>> def function(u):
        ...     return -0.5 * u.square().sum(-1), -2.0 * u.square().sum(-1)
        >>> density = capture(function, torch.zeros(2), num_chains=3)
        >>> density.mode
        'graph'
        >>> density(torch.ones(3, 2)).grad_target[0]
        tensor([-4., -4.])
    """
    example = example.detach().contiguous()
    options: dict[str, Any] = {"num_chains": num_chains, "gradients": gradients}
    options |= {"native": native or compile}
    with undisturbed(example.device), torch.inference_mode(False):
        recording = _recorded_again(function, example, _kind(example, compile, **options))
        kind = _kind(example, compile, **options)
        density = _kept(function, example, recording, num_chains=num_chains, kind=kind)
        if density is None:
            density = _captured(function, example, recording, compile=compile, **options)
    if density.mode in ("graph-loop", "eager"):
        how = "its graph" if density.mode == "graph-loop" else "the model"
        warnings.warn(
            f"the density is evaluated slowly, chain by chain through {how}: {density.reason}",
            stacklevel=2,
        )
    return density


def _captured(
    function: LogDensities,
    example: Tensor,
    recording: Recording | None,
    *,
    num_chains: int,
    compile: bool,
    gradients: bool,
    native: bool,
) -> CapturedDensity:
    """Checks, records and vectorizes a function for the first time."""
    options: dict[str, Any] = {"num_chains": num_chains, "gradients": gradients}
    options["native"] = native
    check_pure(function, example, gradients=gradients)
    traced, reason = None, None
    exits: tuple[Exit, ...] = ()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the checks above have shown the model's own
            if recording is None:
                recording = record_densities(function, example, gradients=gradients)
            traced = trace(function, example, gradients=gradients, recording=recording)
    except Impure:
        raise
    except PositionLeft as error:
        reason, exits = f"it cannot be recorded ({error})", (error.exit,)
    except Exception as error:  # noqa: BLE001 - anything that a tracer or a model may raise
        reason = f"it cannot be recorded ({_summary(error)})"
    if traced is not None and recording is not None:
        try:
            density = CapturedDensity(
                function, example, traced, compile=compile, reason=None, **options
            )
            mismatch = density._mismatch(function, _probes(example))
            if mismatch is not None and density.native_source_and_inputs() is not None:
                density._wants_native = False
                mismatch = density._mismatch(function, _probes(example))
            if mismatch is None:
                _keep(density, recording, _kind(example, compile, **options))
            else:
                density._trace = None
                density.reason = (
                    f"it depends on values that leave the graph, such as .numpy() or .item() "
                    f"({mismatch})"
                )
            return density
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - operations that record and do not replay
            reason = f"its graph does not replay ({_summary(error)})"
    density = CapturedDensity(function, example, None, compile=False, reason=reason, **options)
    density.exits = exits
    return density


# Graphs by what they were made of. A recording holds every operation and every number of Python,
# so that equal ones differ in the values of tensors alone, which are inputs of the graphs.
_GRAPHS: OrderedDict[tuple[Any, ...], dict[tuple[Any, ...], CapturedDensity]] = OrderedDict()
_CAPACITY = 64
_PER_KIND = 16
_MOST_GUARDED = 10_000  # numbers


def _kind(
    example: Tensor, compile: bool, *, gradients: bool, native: bool, num_chains: int
) -> tuple[Any, ...]:
    """Tells apart what is recorded and compiled in other ways, whatever the number of chains."""
    shape = (tuple(example.shape), example.dtype, example.device)
    return (*shape, compile, gradients, native, torch.get_num_threads())


def _content(recording: Recording) -> tuple[Any, ...]:
    metas = ((tuple(x.shape), x.dtype, x.device) for x in recording.constants)
    return (recording.code, *metas)


def _recorded_again(
    function: LogDensities, example: Tensor, kind: tuple[Any, ...]
) -> Recording | None:
    """Records a function if graphs of its kind are kept, which may be its own."""
    if kind not in _GRAPHS:
        return None
    gradients: bool = kind[4]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return record_densities(function, example, gradients=gradients)
    except Exception:  # noqa: BLE001 - to be explained where it is captured for the first time
        return None


def _kept(
    function: LogDensities,
    example: Tensor,
    recording: Recording | None,
    *,
    num_chains: int,
    kind: tuple[Any, ...],
) -> CapturedDensity | None:
    """Finds the graphs of an equal recording, and puts the data in."""
    if recording is None:
        return None
    content = _content(recording)
    found = _GRAPHS[kind].get(content)
    if found is None:
        return None
    _GRAPHS.move_to_end(kind)
    return found.on_recording(function, example, recording, num_chains=num_chains)


def _keep(density: CapturedDensity, recording: Recording, kind: tuple[Any, ...]) -> None:
    guards = None if density._trace is None else density._trace.guards
    if guards is not None and sum(value.numel() for value in guards.values) > _MOST_GUARDED:
        return  # they hold the data
    content = _content(recording)
    kept = _GRAPHS.setdefault(kind, {})
    kept[content] = density.without_data()
    while len(kept) > _PER_KIND:
        del kept[next(iter(kept))]
    _GRAPHS.move_to_end(kind)
    while len(_GRAPHS) > _CAPACITY:
        _GRAPHS.popitem(last=False)


def _dense(tensor: Tensor) -> Tensor:
    """Leaves only repetitions that follow from the graph, the same for any data."""
    return tensor.contiguous() if repeated_dims(tensor) else tensor


def _with_strides(strides: tuple[int, ...], value: Tensor) -> Tensor:
    """Lays a value out as one for which code was compiled."""
    if value.stride() == strides:
        return value
    laid = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device)
    return laid.copy_(value)


def _probes(example: Tensor) -> Tensor:
    """Moves the example by a little and by a unit, without the global random state."""
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(example.shape, generator=generator, dtype=torch.float64, device="cpu").to(
        example
    )
    return torch.stack([example, example + 0.1 * noise, example - noise])


def _replaced(constants: list[Tensor], old: Tensor, new: Tensor) -> list[Tensor]:
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


def _stacked(chains: Sequence[Outputs]) -> Outputs:
    log_base, log_target, grad_base, grad_target = (
        torch.stack(parts) for parts in zip(*chains, strict=True)
    )
    return log_base, log_target, grad_base, grad_target


def _summary(error: Exception) -> str:
    where = user_line(traceback.extract_tb(error.__traceback__))
    message = str(error).strip()
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}{where}"
