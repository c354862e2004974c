"""Which coordinates of a position hold integers, and what single changes of them there are.

A position is one vector of floating-point numbers. Its discrete coordinates hold integers: 0 or 1,
one-hot vectors, or counts between bounds. A :class:`Block` is a run of neighbours of one kind.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from .base import Kernel

__all__ = ["Block", "Kind", "Lattice", "MovesLattice", "bound", "lattice_moved_by"]

Kind = Literal["binary", "one-hot", "integer"]


@dataclass(frozen=True)
class Block:
    """Neighbouring discrete coordinates of one kind.

    Args:
        kind: ``"binary"`` for 0 or 1, ``"one-hot"`` for vectors of ``size`` coordinates of which
            one is 1 and the others 0, ``"integer"`` for numbers from ``lower`` to ``upper``.
        start: First coordinate.
        stop: Behind the last coordinate.
        size: Number of categories; 1 for other kinds.
        lower: Least values, one per coordinate; of integers only.
        upper: Greatest values, likewise; may be infinite.
    """

    kind: Kind
    start: int
    stop: int
    size: int = 1
    lower: tuple[float, ...] = ()
    upper: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        length = self.stop - self.start
        if length < 1 or self.size < 1 or length % self.size:
            raise ValueError(f"a block of {length} coordinates holds no vectors of {self.size}")
        if self.kind == "integer" and not len(self.lower) == len(self.upper) == length:
            raise ValueError(
                f"a block of {length} integers needs a lower and upper bound for each"
            )

    @property
    def count(self) -> int:
        """Number of variables."""
        return (self.stop - self.start) // self.size

    def take(self, value: Tensor) -> Tensor:
        """Takes the block's coordinates, one-hot vectors as ``[..., count, size]``."""
        part = value[..., self.start : self.stop]
        if self.kind != "one-hot":
            return part
        return part.reshape(*part.shape[:-1], self.count, self.size)

    def bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the bounds of integers as tensors, ``[count]``."""
        lower = torch.tensor(self.lower, dtype=like.dtype, device=like.device)
        return lower, torch.tensor(self.upper, dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class Lattice:
    """The discrete coordinates among all ``dim`` coordinates of a position.

    Example:
        >>> lattice = Lattice(4, (Block("binary", 1, 3),))
        >>> lattice.mask(torch.zeros(4))
        tensor([False,  True,  True, False])
    """

    dim: int
    blocks: tuple[Block, ...]

    @staticmethod
    def of(dim: int, blocks: Iterable[Block]) -> Lattice:
        """Builds a lattice, joining neighbouring blocks that can be moved as one."""
        joined: list[Block] = []
        for block in blocks:
            last = joined[-1] if joined else None
            same = last is not None and (last.kind, last.size) == (block.kind, block.size)
            if last is not None and same and last.stop == block.start:
                joined[-1] = replace(
                    last,
                    stop=block.stop,
                    lower=last.lower + block.lower,
                    upper=last.upper + block.upper,
                )
            else:
                joined.append(block)
        return Lattice(dim, tuple(joined))

    def __repr__(self) -> str:
        kinds: dict[str, int] = {}
        for block in self.blocks:
            name = f"{block.kind} of {block.size}" if block.kind == "one-hot" else block.kind
            kinds[name] = kinds.get(name, 0) + block.count
        return f"Lattice({', '.join(f'{count} {name}' for name, count in kinds.items())})"

    @functools.cached_property
    def count(self) -> int:
        """Number of discrete variables."""
        return sum(block.count for block in self.blocks)

    def only(self, *kinds: Kind) -> Lattice:
        """Keeps the blocks of some kinds."""
        return Lattice(self.dim, tuple(block for block in self.blocks if block.kind in kinds))

    def mask(self, like: Tensor) -> Tensor:
        """Marks the discrete coordinates, bool ``[dim]``, on the device of ``like``."""
        marked = [False] * self.dim  # nothing is written in place, so that steps can be recorded
        for block in self.blocks:
            marked[block.start : block.stop] = [True] * (block.stop - block.start)
        return torch.tensor(marked, device=like.device)

    def variables(self, like: Tensor) -> Tensor:
        """Numbers the variables: that of each coordinate, -1 for others, ``[dim]``."""
        numbers, first = [-1] * self.dim, 0
        for block in self.blocks:
            own = [first + index for index in range(block.count) for _ in range(block.size)]
            numbers[block.start : block.stop] = own
            first += block.count
        return torch.tensor(numbers, device=like.device)

    def replace(self, position: Tensor, parts: list[Tensor]) -> Tensor:
        """Puts new values of the blocks, as :meth:`Block.take` gives them, into a position."""
        pieces, end = [], 0
        for block, part in zip(self.blocks, parts, strict=True):
            pieces.append(position[..., end : block.start])
            pieces.append(part.reshape(*position.shape[:-1], block.stop - block.start))
            end = block.stop
        pieces.append(position[..., end:])
        return torch.cat(pieces, dim=-1)


@runtime_checkable
class MovesLattice(Protocol):
    """A kernel that moves discrete coordinates, once it is told which these are."""

    @property
    def lattice(self) -> Lattice | None:
        """The coordinates that it moves; None until it is told."""
        ...

    def on(self, lattice: Lattice) -> Kernel:
        """Returns the kernel that moves the coordinates of ``lattice``."""
        ...


def lattice_moved_by(kernel: Kernel) -> Lattice | None:
    """Asks a kernel which discrete coordinates it moves; None if it moves none, or knows not yet."""
    return kernel.lattice if isinstance(kernel, MovesLattice) else None


def bound(lattice: Lattice | None, kernel: object) -> Lattice:
    """Returns the lattice of a kernel, or raises ValueError if it was given none."""
    if lattice is None:
        raise ValueError(
            f"{type(kernel).__name__} was given no discrete coordinates to move: build it with "
            "lattice=..., or hand it to AnnealedImportance, which fills them in"
        )
    return lattice
