"""What native code does, one stage after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .values import Expression, Value

__all__ = [
    "Cholesky",
    "DensityCall",
    "Loop",
    "Member",
    "Product",
    "Read",
    "Scan",
    "Scatter",
    "Solve",
    "Stage",
]

Read = Callable[[Value, Sequence[str]], Expression]  # an element of a value


@dataclass(frozen=True)
class Member:
    """One operation inside a loop.

    Attributes:
        result: Where its result goes if anybody else reads it.
        inputs: What it reads at the loop's own element.
        elsewhere: What it reads at other elements, from memory.
        emit: Makes the expression of one element.
        reduced: Of a sum, how it begins and what joins two terms; None for none.
        dims: Dimensions of the loop that a sum runs over.
    """

    result: Value
    inputs: tuple[Value, ...]
    elsewhere: tuple[Value, ...]
    emit: Callable[[Read, Sequence[str]], Expression]
    reduced: tuple[float, str] | None = None
    dims: tuple[int, ...] = ()


@dataclass
class Loop:
    """Operations that share a loop over the elements of a shape."""

    shape: tuple[int, ...]
    members: list[Member] = field(default_factory=list)


@dataclass(frozen=True)
class Product:
    """A product of matrices, by batch; ``added`` to what is there."""

    result: Value  # [b, m, l]
    left: Value  # [b, m, n]
    right: Value  # [b, n, l]
    added: Value | None = None


@dataclass(frozen=True)
class DensityCall:
    """Both log densities and both gradients at a position."""

    position: Value
    results: tuple[Value, ...]


@dataclass(frozen=True)
class Scatter:
    """Puts elements of ``rows``, or adds them, where ``place`` says for each of their indices."""

    result: Value
    start: Value
    rows: Value
    place: Callable[[Read, Sequence[str]], list[str]]
    accumulate: bool


@dataclass(frozen=True)
class Scan:
    """Joins each element with the one before it along a dimension."""

    result: Value
    source: Value
    dim: int
    join: str


@dataclass(frozen=True)
class Cholesky:
    """The lower factors of batches of matrices; NaN where one is not positive definite."""

    result: Value  # [b, n, n], zero from the start
    matrix: Value


@dataclass(frozen=True)
class Solve:
    """Solves batches of triangular systems ``matrix @ result = right``."""

    result: Value  # [b, n, m]
    matrix: Value  # [b, n, n]
    right: Value
    is_upper: bool
    is_unit: bool  # ones on the diagonal, which is not read


Stage = Cholesky | Solve | Scan | Loop | Product | DensityCall | Scatter
