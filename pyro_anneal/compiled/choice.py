"""What of a run to compile: what may be compiled, what repays it, and what came of it.

All that is decided here follows from counts, never from measured time or from what an earlier
process left, so that equal seeds give equal numbers on one machine.
"""

from __future__ import annotations

from typing import Protocol

from ..graphs.captured import CapturedDensity
from ..graphs.inductor import count_operations
from ..graphs.recorded import RecordedDensity
from ..kernels import Kernel
from ..kernels.base import moves_chains_alone
from .looped import LoopedDensity

__all__ = [
    "compile_evaluations",
    "describe_mode",
    "is_dear",
    "loop_notes",
    "loop_problem",
    "with_loop",
]

# Steps from which a loop is made of native code: it compiles in half a second, and is kept on disk.
_LOOP_FROM = 400
# Operations of one chain's evaluation, about a millisecond, from which each chain costs by itself.
_DEAR = 10_000_000
# Operations on numbers, some ten seconds of them, of which torch's compiler saves half and more
# than the four seconds that it takes.
_COMPILE_FROM = 4e11


def loop_problem(density: RecordedDensity, kernel: Kernel) -> str | None:
    """Says why chunks of this density and kernel cannot be a loop, or None if they may be.

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
    if not moves_chains_alone(kernel):
        return f"the kernel {type(kernel).__name__} does not say that it moves each chain alone"
    return density.native_problem


def is_dear(density: object) -> bool:
    """Tells whether each chain costs by itself, because the graph is too large for native code.

    Args:
        density: What evaluates the chains.
    """
    if not isinstance(density, CapturedDensity) or density.mode in ("eager", "graph-loop"):
        return False
    if density.native_source_and_inputs() is not None:
        return False
    return count_operations(density.chain_graph_and_inputs()[0]) >= _DEAR


def compile_evaluations(
    density: RecordedDensity, compile: bool | str, num_evaluations: int
) -> None:
    """Has torch's compiler compile evaluations that native code does not serve, where it repays itself.

    Args:
        density: What evaluates the chains.
        compile: As of :class:`~pyro_anneal.AnnealedImportance`.
        num_evaluations: Of single chains, over the runs to come.
    """
    if compile not in (True, "auto") or density.mode != "graph":
        return
    if compile == "auto":
        operations = count_operations(density.chain_graph_and_inputs()[0])
        if num_evaluations * operations < _COMPILE_FROM:
            return
    density.compile()


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
    kept: RecordedDensity | None = None,
) -> RecordedDensity:
    """Prepares a density for a path: with a loop, compiled alone, or as it is.

    Args:
        density: The captured density.
        path: The kernel and the number of steps to come.
        compile: As of :class:`~pyro_anneal.AnnealedImportance`.
        num_runs: Runs of as many chains and steps that must repay the compilation: those to come,
            over all data sets of a call, or, where nobody knows how many will, those so far.
        kept: What single evaluations are compiled of instead, such as the density that ``density``
            was made of and others will be.

    Returns:
        The density, or a :class:`LoopedDensity` of it.
    """
    if compile in (False, "density") or path.num_steps == 1:
        return density
    num_moves = num_runs * (path.num_steps - 1)
    problem = loop_problem(density, path.kernel)
    if problem is None:
        enough = compile is True or num_moves >= _LOOP_FROM
        return LoopedDensity(density) if enough else density
    evaluations = num_moves * path.kernel.num_gradients * density.num_chains
    compile_evaluations(density if kept is None else kept, compile, evaluations)
    return LoopedDensity(density, problem) if compile is True else density


def describe_mode(density: RecordedDensity) -> str:
    """Says how a density is evaluated: ``"graph"``, ``"compiled loop"``, ..."""
    if isinstance(density, LoopedDensity) and density.has_run:
        return "compiled loop"
    return str(density.mode)


def loop_notes(density: RecordedDensity) -> tuple[str, ...]:
    """Says why a loop that was wanted could not be compiled."""
    if isinstance(density, LoopedDensity) and density.loop_reason is not None:
        return (f"the annealing loop could not be compiled ({density.loop_reason})",)
    return ()
