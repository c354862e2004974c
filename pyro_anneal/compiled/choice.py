"""Whether to compile a run: what may be compiled, what repays it, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ..graphs.captured import CapturedDensity
from ..graphs.inductor import compiler_problem
from ..graphs.recorded import RecordedDensity
from ..kernels import Kernel
from ..kernels.base import moves_chains_alone
from .program import LoopedDensity

__all__ = [
    "describe_mode",
    "loop_notes",
    "loop_problem",
    "repays_compilation",
    "with_loop",
]


def loop_problem(density: RecordedDensity, kernel: Kernel) -> str | None:
    """Says why chunks of this density and kernel cannot be compiled, or None if they may be.

    Args:
        density: What evaluates the chains.
        kernel: What moves them.

    Returns:
        The reason, or None.
    """
    if not isinstance(density, CapturedDensity):
        return "the density is not a recorded graph"
    if density.mode in ("eager", "graph-loop"):
        return density.reason
    try:
        hash(kernel)
    except TypeError:
        return f"the kernel {type(kernel).__name__} is not hashable"
    return compiler_problem(density.example.device)


# One operation dispatched from Python takes about 5 microseconds, a step of HMC about 60 besides
# those of the density; compiling takes about 5 seconds and 20 milliseconds per operation.
_DISPATCH_SECONDS = 5e-6
_KERNEL_OPERATIONS = 60
_COMPILE_SECONDS = 5.0
_COMPILE_SECONDS_PER_OPERATION = 0.02
# Steps from which native code is taken: it compiles in half a second, and is kept on disk.
_NATIVE_FROM = 400


def repays_compilation(density: RecordedDensity, kernel: Kernel, num_moves: int) -> bool:
    """Decides from counts whether a compiled loop saves more dispatching than compiling costs.

    Args:
        density: The captured density; the operations of its graph are counted.
        kernel: Its gradients per step are counted.
        num_moves: Steps of all chains at once, over the runs to come.

    Returns:
        Whether to compile.
    """
    if density.native_source_and_inputs() is not None and moves_chains_alone(kernel):
        return num_moves >= _NATIVE_FROM
    graph, _ = density.chain_graph_and_inputs()
    per_gradient = sum(node.op == "call_function" for node in graph.graph.nodes)
    per_step = kernel.num_gradients * per_gradient + _KERNEL_OPERATIONS
    saved = num_moves * per_step * _DISPATCH_SECONDS
    return bool(saved > _COMPILE_SECONDS + per_step * _COMPILE_SECONDS_PER_OPERATION)


class _Path(Protocol):
    @property
    def kernel(self) -> Kernel: ...

    @property
    def num_steps(self) -> int: ...


def with_loop(
    density: RecordedDensity,
    path: _Path,
    compile: bool | str,
    *,
    num_runs: int = 1,
    fallback: Callable[[], object] | None = None,
) -> RecordedDensity:
    """Prepares a density for a path: with a compiled loop, compiled alone, or as it is.

    Args:
        density: The captured density.
        path: The kernel and the number of steps to come.
        compile: As of :class:`~pyro_anneal.AnnealedImportance`.
        num_runs: Runs of as many chains and steps that must repay the compilation: those to come,
            over all data sets of a call, or, where nobody knows how many will, those so far.
        fallback: As of :class:`LoopedDensity`.

    Returns:
        The density, or a :class:`LoopedDensity` of it.
    """
    if compile in (False, "density") or path.num_steps == 1:
        return density
    num_moves = num_runs * (path.num_steps - 1)
    if compile == "auto" and (
        density.mode in ("eager", "graph-loop")
        or not repays_compilation(density, path.kernel, num_moves)
    ):
        return density
    problem = loop_problem(density, path.kernel)
    if problem is not None:
        if isinstance(density, CapturedDensity):
            density.compile()
        return LoopedDensity(density, problem)
    return LoopedDensity(density, fallback=fallback)


def describe_mode(density: RecordedDensity) -> str:
    """Says how a density is evaluated: ``"graph"``, ``"compiled loop"``, ..."""
    if isinstance(density, LoopedDensity) and density.loop_mode is not None:
        return f"compiled {density.loop_mode}"
    return str(density.mode)


def loop_notes(density: RecordedDensity) -> tuple[str, ...]:
    """Says why a loop that was wanted could not be compiled."""
    if isinstance(density, LoopedDensity) and density.loop_reason is not None:
        return (f"the annealing loop could not be compiled ({density.loop_reason})",)
    return ()
