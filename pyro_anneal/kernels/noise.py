"""The randomness of transitions: what a kernel declares, and how many steps of it are drawn at once.

A small generator call costs more than the numbers it draws. A kernel that declares its noise has
that of a whole chunk of steps drawn by one call for each part, chains last: the order in which
compiled steps keep it, so that nothing has to be moved. Steps that run one by one use the same
numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from .base import Kernel, State

__all__ = [
    "DeclaresNoise",
    "Noise",
    "declared",
    "draw_step",
    "draw_steps",
    "draw_together",
    "noise_in_blocks",
]

# Numbers of noise held at once: 32 MB in float64.
_LIMIT = 2**22


class Noise(NamedTuple):
    """One tensor of the randomness of a step, ``[K, *batch, *shape]``, of the position's dtype."""

    kind: Literal["normal", "uniform", "exponential"]
    shape: tuple[int, ...] = ()
    low: float = 0.0  # ends of the uniform distribution
    high: float = 1.0


@runtime_checkable
class DeclaresNoise(Protocol):
    """A kernel whose noise may be drawn for many steps at once."""

    def declared_noise(self, state: State) -> tuple[Noise, ...] | None:
        """Describes the tensors that ``noise`` returns, in their order; None if it cannot."""
        ...


def declared(kernel: Kernel, state: State) -> tuple[Noise, ...] | None:
    """Asks a kernel for its noise; None if it declares nothing."""
    return kernel.declared_noise(state) if isinstance(kernel, DeclaresNoise) else None


def draw_together(
    parts: Sequence[Noise], state: State, count: int, generator: torch.Generator | None
) -> tuple[Tensor, ...]:
    """Draws the noise of several steps, each part by one call.

    Args:
        parts: What to draw.
        state: Of K chains; its shapes, dtype and device count.
        count: Number n of steps.
        generator: Source of randomness.

    Returns:
        Each part, ``[n, K, *batch, *shape]``, with chains last in memory.
    """
    num_chains, *batch = state.log_base.shape
    drawn = []
    for part in parts:
        stored = state.position.new_empty(count, *batch, *part.shape, num_chains)
        if part.kind == "normal":
            stored.normal_(generator=generator)
        elif part.kind == "uniform":
            stored.uniform_(part.low, part.high, generator=generator)
        else:
            stored.exponential_(generator=generator)
        drawn.append(stored.movedim(-1, 1))
    return tuple(drawn)


def draw_step(
    parts: Sequence[Noise], state: State, generator: torch.Generator | None
) -> tuple[Tensor, ...]:
    """Draws what a kernel declares, for one step.

    Args:
        parts: What to draw.
        state: Of K chains.
        generator: Source of randomness.

    Returns:
        Each part, ``[K, *batch, *shape]``.
    """
    drawn = draw_together(parts, state, 1, generator)
    return tuple(part[0].contiguous() for part in drawn)


def draw_steps(
    kernel: Kernel, state: State, count: int, generator: torch.Generator | None
) -> tuple[Tensor, ...]:
    """Draws the noise of several steps of a kernel, together where it declares what it needs.

    Args:
        kernel: The kernel.
        state: Of K chains.
        count: Number n of steps.
        generator: Source of randomness.

    Returns:
        The tensors of ``kernel.noise``, each with a leading dimension of n.
    """
    parts = declared(kernel, state)
    if parts is not None:
        return draw_together(parts, state, count, generator)
    steps = [kernel.noise(state, generator) for _ in range(count)]
    return tuple(torch.stack(part) for part in zip(*steps, strict=True))


def noise_in_blocks(
    kernel: Kernel, state: State, num_steps: int, most: int, generator: torch.Generator
) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Draws the noise of a chunk of steps, in as few blocks as memory allows.

    Args:
        kernel: The kernel.
        state: Of K chains.
        num_steps: Number of steps of the chunk.
        most: The most steps that any chunk has.
        generator: Source of randomness.

    Returns:
        The blocks in turn, each with its steps and their noise.
    """
    first, parts = None, declared(kernel, state)
    if parts is not None:
        numbers = state.log_base.numel() * sum(torch.Size(part.shape).numel() for part in parts)
    else:
        first = kernel.noise(state, generator)
        numbers = sum(part.numel() for part in first)
    size = max(1, min(most, _LIMIT // max(1, numbers)))

    def blocks() -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        ahead = first
        for start in range(0, num_steps, size):
            stop = min(start + size, num_steps)
            count = stop - start
            if ahead is None:
                yield slice(start, stop), draw_steps(kernel, state, count, generator)
                continue
            rest = [kernel.noise(state, generator) for _ in range(count - 1)]
            together = zip(ahead, *rest, strict=True)
            ahead = None
            yield slice(start, stop), tuple(torch.stack(part) for part in together)

    return blocks()
