r"""Which discrete variables of a density are independent given the others: a colouring of them.

Found from the density itself. One variable is changed at a time; the coordinates whose gradients
change with it are its neighbours, in base or target. The same evaluations tell whether gradients
foretell changes exactly, without which no conditional distribution can be read off them.

Source: Brélaz (1979), *New methods to color the vertices of a graph* (DSATUR, which needs two
colours wherever two suffice).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..graphs.recorded import RecordedDensity
from ..kernels import Density, Lattice, State

__all__ = ["Drawn", "change_one", "colour", "foretold", "neighbours"]

# Dependence is asked of every pair of variables: beyond this many it costs more than it promises.
_MOST_VARIABLES = 4096
_MOST_EAGER = 64  # of a density that is evaluated chain by chain
_TOLERANCE = 1e-3


def change_one(lattice: Lattice, position: Tensor, index: Tensor | int) -> Tensor:
    """Changes one variable to another value: bits flip, categories and integers go one further.

    Args:
        lattice: The variables.
        position: Positions, ``[..., D]``.
        index: The number of the variable, or one for each position, ``[...]``.

    Returns:
        The changed positions.
    """
    which = torch.as_tensor(index, device=position.device)
    chosen = lattice.variables(position) == which.unsqueeze(-1)
    parts = []
    for block in lattice.blocks:
        x = block.take(position)
        if block.kind == "binary":
            parts.append(1.0 - x)
        elif block.kind == "one-hot":
            parts.append(x.roll(1, -1))
        else:
            lower, upper = block.bounds(x)
            parts.append(torch.where(x < upper, x + 1.0, torch.maximum(x - 1.0, lower)))
    return torch.where(chosen, lattice.replace(position, parts), position)


def foretold(move: Tensor, grad: Tensor) -> Tensor:
    """Computes the change of a log density that a gradient foretells, ``[...]``.

    A coordinate that stays says nothing: its gradient may be NaN.
    """
    return torch.where(move == 0.0, 0.0, move * grad).sum(-1)


def neighbours(
    density: Density, lattice: Lattice, positions: Tensor, *, num_chains: int
) -> Tensor | None:
    """Finds which variables see each other, if gradients foretell all single changes.

    Args:
        density: Evaluates base and target.
        lattice: The variables.
        positions: Finite positions at which to look, ``[n, *batch, D]``.
        num_chains: Positions to evaluate at once.

    Returns:
        A symmetric bool matrix, ``[count, count]``; None where a change is not what the gradient
        foretold within a thousandth, or has no density.
    """
    count, device = lattice.count, positions.device
    owner = lattice.variables(positions)
    owner = torch.where(owner < 0, count, owner)
    found = torch.zeros(count, count + 1, dtype=torch.bool, device=device)
    for here in positions:
        start = density(here.expand(num_chains, *here.shape))
        for first in range(0, count, num_chains):
            index = torch.arange(first, first + num_chains, device=device).clamp(max=count - 1)
            ones = index.view(-1, *[1] * (here.dim() - 1))
            there = change_one(lattice, start.position, ones.expand(num_chains, *here.shape[:-1]))
            end = density(there)
            if not _is_foretold(start, end):
                return None
            changed = _changed_gradients(start, end)
            seen = changed.reshape(num_chains, -1, changed.shape[-1]).any(1).to(torch.uint8)
            into = torch.zeros(num_chains, count + 1, dtype=torch.uint8, device=device)
            into.index_add_(1, owner, seen)
            found[index] |= into > 0
    graph = found[:, :count]
    graph = graph | graph.T
    graph.fill_diagonal_(False)
    return graph


def _is_foretold(start: State, end: State) -> bool:
    """Tells whether log densities changed as the gradients at either end say."""
    move = end.position - start.position
    pairs = (
        (start.log_base, end.log_base, start.grad_base, end.grad_base),
        (start.log_target, end.log_target, start.grad_target, end.grad_target),
    )
    for before, after, grad, grad_after in pairs:
        change = after - before
        for told in (foretold(move, grad), foretold(move, grad_after)):
            wrong = (told - change).abs()
            if not bool((wrong <= _TOLERANCE * (1.0 + change.abs())).all()):
                return False
    return True


def _changed_gradients(start: State, end: State) -> Tensor:
    """Marks coordinates whose gradient moved beyond rounding, ``[n, *batch, D]``."""
    eps = 1e3 * torch.finfo(start.position.dtype).eps
    marks = torch.zeros_like(start.position, dtype=torch.bool)
    for before, after in ((start.grad_base, end.grad_base), (start.grad_target, end.grad_target)):
        marks = marks | ((after - before).abs() > eps * (1.0 + before.abs() + after.abs()))
    return marks


class Drawn(Protocol):
    """A problem: its density and draws from its base."""

    @property
    def density(self) -> RecordedDensity:
        """Evaluates base and target."""
        ...

    def draw(self, num_chains: int) -> Tensor:
        """Draws positions ``[num_chains, *batch, D]`` from the base."""
        ...


def colour(problem: Drawn, lattice: Lattice, *, num_colours: int = 8) -> tuple[int, ...] | None:
    """Colours the variables so that neighbours differ.

    Args:
        problem: What is annealed.
        lattice: Zeros, ones and categories.
        num_colours: The most colours that are of use.

    Returns:
        A colour of each variable; None where gradients do not foretell changes, where more colours
        are needed, or where there are too many variables to ask all pairs.
    """
    density = problem.density
    most = _MOST_VARIABLES if density.mode in ("graph", "compiled") else _MOST_EAGER
    if lattice.count > most:
        return None
    with torch.no_grad():
        positions = problem.draw(2)
        if not bool(positions.isfinite().all()):
            return None
        graph = neighbours(density, lattice, positions, num_chains=density.num_chains)
    return None if graph is None else _dsatur(graph, num_colours)


def _dsatur(graph: Tensor, num_colours: int) -> tuple[int, ...] | None:
    """Colours the variable with most colours around it first, ties by degree."""
    graph = graph.cpu()
    count = len(graph)
    degree = graph.sum(1)
    colours = torch.full((count,), -1)
    around = torch.zeros(count, num_colours, dtype=torch.bool)
    for _ in range(count):
        rank = around.sum(1) * (count + 1) + degree
        chosen = int(torch.where(colours < 0, rank, -1).argmax())
        free = (~around[chosen]).nonzero()
        if not len(free):
            return None
        own = int(free[0])
        colours[chosen] = own
        around[graph[chosen], own] = True
    return tuple(int(value) for value in colours)
