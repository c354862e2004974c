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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ..kernels import State
from ..models.places import user_line
from .exits import Exit, PositionLeft
from .inductor import compile_graph, compiler_problem
from .purity import check_pure, rows_meet_at, undisturbed, worst_difference
from .recording import LINALG_ERROR, Outputs, Trace, batch, evaluate_or_nan, split, trace
from .repetition import ComputeOnce, WrittenTo, repeated_dims
from .rewriting import Impure

__all__ = ["CapturedDensity", "capture"]

LogDensities = Callable[[Tensor], tuple[Tensor, Tensor]]
Mode = Literal["compiled", "graph", "graph-loop", "eager"]


class _Evaluator:
    """One graph, split into the part per run and the part per evaluation."""

    def __init__(self, traced: Trace, constants: Sequence[Tensor]) -> None:
        self.prologue, self.body = split(traced.graph)
        self.run: Callable[..., Outputs] = self.body
        self.own = traced.constants[len(constants) :]  # made by the passes, never rebound
        self.values: list[Tensor] = []
        self.refresh(constants)

    def refresh(self, constants: Sequence[Tensor]) -> None:
        """Evaluates what does not depend on the position."""
        with torch.no_grad():
            tensors = [_dense(constant.detach()) for constant in (*constants, *self.own)]
            try:
                with ComputeOnce():
                    values = list(self.prologue(*tensors))
            except WrittenTo:
                values = list(self.prologue(*tensors))
        if self.values:
            for old, new in zip(self.values, values, strict=True):
                if old.shape != new.shape:
                    raise ValueError(
                        f"the new constants change a shape inside the density from "
                        f"{list(old.shape)} to {list(new.shape)} (a mask that selects another "
                        "number of elements?): capture the density anew"
                    )
            pairs = zip(self.values, values, strict=True)
            values = [_with_strides_of(old, new) for old, new in pairs]
        self.values = values

    def __call__(self, position: Tensor) -> Outputs:
        return self.run(position.contiguous(), *self.values)


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
        self._evaluators: dict[int | None, _Evaluator] = {}
        if compile:
            self.compile()
        if traced is not None:
            self._evaluator(num_chains)

    @property
    def mode(self) -> Mode:
        """How densities are evaluated, from fast to slow: compiled, graph, graph-loop, eager."""
        if self._trace is None:
            return "eager"
        if self._looped:
            return "graph-loop"
        return "compiled" if self._compile else "graph"

    def compile(self) -> None:
        """Compiles evaluations from now on, where that is possible."""
        if self._trace is None or self._looped or self._compile:
            return
        problem = compiler_problem(self.example.device)
        if problem is not None:
            self.reason = problem
            return
        self._compile = True
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
        if self.mode in ("eager", "graph-loop"):
            raise ValueError(f"no graph of {num_chains} chains: {self.reason}")
        evaluator = self._evaluator(num_chains)
        return evaluator.body, list(evaluator.values)

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
        if None not in self._evaluators:
            constants = [constant.detach() for constant in self._constants]
            self._evaluators[None] = _Evaluator(self._trace, constants)
        evaluator = self._evaluators[None]
        return evaluator.body, list(evaluator.values)

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

    def _evaluator(self, num_chains: int) -> _Evaluator:
        """Finds or makes the graph of K chains; of one chain if vmap fails."""
        assert self._trace is not None
        key = None if self._looped else num_chains
        if key in self._evaluators:
            return self._evaluators[key]
        traced = self._trace
        constants = [constant.detach() for constant in self._constants]
        if key is not None:
            try:
                position = self.example.expand(num_chains, *self.example.shape).contiguous()
                traced = batch(traced.graph, position, constants)
            except Exception as error:  # noqa: BLE001 - whatever vmap does not know
                self._looped = True
                self.reason = f"the graph does not vectorize over chains ({_summary(error)})"
                return self._evaluator(num_chains)
        evaluator = _Evaluator(traced, constants)
        if self._compile and key is not None:
            try:
                evaluator.run = compile_graph(evaluator.body, [position, *evaluator.values])
            except Exception as error:  # noqa: BLE001 - inductor's own failures
                self._compile = False
                self.reason = f"compilation failed ({_summary(error)})"
        self._evaluators[key] = evaluator
        return evaluator

    def _outputs(self, position: Tensor) -> Outputs:
        if self._trace is None:
            return self._eager(position)
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
    with undisturbed(example.device), torch.inference_mode(False):
        check_pure(function, example, gradients=gradients)
        traced, reason = None, None
        exits: tuple[Exit, ...] = ()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the checks above have shown the model's own
                traced = trace(function, example, gradients=gradients)
        except Impure:
            raise
        except PositionLeft as error:
            reason, exits = f"it cannot be recorded ({error})", (error.exit,)
        except Exception as error:  # noqa: BLE001 - anything that a tracer or a model may raise
            reason = f"it cannot be recorded ({_summary(error)})"
        options: dict[str, Any] = {"num_chains": num_chains, "gradients": gradients}
        density = None
        if traced is not None:
            try:
                density = CapturedDensity(
                    function, example, traced, compile=compile, reason=None, **options
                )
                mismatch = density._mismatch(function, _probes(example))
                if mismatch is not None:
                    density._trace = None
                    density.reason = (
                        f"it depends on values that leave the graph, such as .numpy() or .item() "
                        f"({mismatch})"
                    )
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - operations that record and do not replay
                density, reason = None, f"its graph does not replay ({_summary(error)})"
        if density is None:
            density = CapturedDensity(
                function, example, None, compile=False, reason=reason, **options
            )
            density.exits = exits
    if density.mode in ("graph-loop", "eager"):
        how = "its graph" if density.mode == "graph-loop" else "the model"
        warnings.warn(
            f"the density is evaluated slowly, chain by chain through {how}: {density.reason}",
            stacklevel=2,
        )
    return density


def _dense(tensor: Tensor) -> Tensor:
    """Leaves only repetitions that follow from the graph, the same for any data."""
    return tensor.contiguous() if repeated_dims(tensor) else tensor


def _with_strides_of(old: Tensor, new: Tensor) -> Tensor:
    """Lays new values out as the old ones, for which code was compiled."""
    if old.stride() == new.stride():
        return new
    return torch.empty_strided(old.shape, old.stride(), dtype=new.dtype, device=new.device).copy_(
        new
    )


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
