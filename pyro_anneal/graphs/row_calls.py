"""One operation of a graph, and where the rows of a plate lie in its arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

__all__ = ["Call", "Meet", "Result", "Rows", "Rule", "aligned", "dims_of", "located"]


@dataclass(frozen=True)
class Rows:
    """Where the rows of a plate of a known size lie in a tensor.

    Entry ``i`` of the axis belongs to row ``(i // inner) % size``: an axis may be the plate alone,
    or the plate merged with its neighbours by a view.
    """

    axis: int
    inner: int = 1


Result = Rows | None | tuple[Rows | None, ...]


Rule = Callable[["Call"], Result]


class Meet(Exception):
    """Rows meet in an operation, or cannot be followed through it."""


def located(rows: Rows | None) -> Rows:
    """Refuses what has no rows where the position reaches the operation all the same."""
    if rows is None:
        raise Meet("another argument depends on latents")
    return rows


class Call:
    """One operation of a graph: its arguments by name, and the rows in them."""

    def __init__(self, node: fx.Node, rows: dict[fx.Node, Result], size: int) -> None:
        self.node = node
        self.size = size
        self._rows = rows
        schema = node.target._schema  # type: ignore[union-attr]
        self.given: dict[str, Any] = {}
        for at, argument in enumerate(schema.arguments):
            value = argument.default_value if argument.has_default_value() else None
            value = node.args[at] if at < len(node.args) else node.kwargs.get(argument.name, value)
            self.given[argument.name] = value
        self.tensors = [n for n in node.all_input_nodes if self.shape(n) is not None]

    def __getitem__(self, name: str) -> Any:
        return self.given[name]

    def get(self, *names: str) -> Any:
        """Returns the first argument of these names that the operation has."""
        return next((self.given[name] for name in names if name in self.given), None)

    def rows(self, value: Any) -> Rows | None:
        """Says where the rows lie in an argument; None in a constant."""
        if not isinstance(value, fx.Node):
            return None
        found = self._rows.get(value)
        if isinstance(found, tuple):
            raise Meet("a tuple is passed on")
        return found

    def own(self, value: Any) -> Rows:
        """Says where the rows lie in the one argument that has them."""
        return located(self.rows(value))

    @staticmethod
    def shape(value: Any) -> tuple[int, ...] | None:
        """Returns the shape of a tensor; None for other arguments."""
        meta: Any = getattr(value, "meta", {}).get("tensor_meta")
        return tuple(meta.shape) if hasattr(meta, "shape") else None

    def known_shape(self, value: Any) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        shape = self.shape(value)
        if shape is None:
            raise Meet("a shape is not known")
        return shape

    def rank(self, value: Any) -> int:
        """Returns the number of axes of a tensor."""
        return len(self.shape(value) or ())

    @property
    def outputs(self) -> tuple[tuple[int, ...] | None, ...] | None:
        """Shapes of several results; None for one tensor."""
        meta = self.node.meta.get("tensor_meta")
        if isinstance(meta, (list, tuple)) and not hasattr(meta, "shape"):
            return tuple(tuple(m.shape) if hasattr(m, "shape") else None for m in meta)
        return None

    def each(self, rows: Rows | None) -> Result:
        """Gives every result the same rows."""
        outputs = self.outputs
        if outputs is None:
            return rows
        return tuple(rows if shape else None for shape in outputs)


def dims_of(call: Call, tensor: Any, dims: Any) -> list[int]:
    """Counts the axes that an argument names from the front; all of them for None."""
    rank = call.rank(tensor)
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return list(range(rank))
    dims = [dims] if isinstance(dims, int) else dims
    return [dim % max(rank, 1) for dim in dims]


def aligned(call: Call, tensors: Sequence[Any]) -> Rows | None:
    """Says where the rows of several tensors lie after broadcasting, if at one place."""
    rank = max(call.rank(tensor) for tensor in tensors)
    found = {
        Rows(rows.axis - call.rank(tensor) + rank, rows.inner)
        for tensor in tensors
        if (rows := call.rows(tensor)) is not None
    }
    if len(found) > 1:
        raise Meet("it combines different rows")
    if not found:
        return None
    (rows,) = found
    sizes = {
        shape[rows.axis - rank]
        for tensor in tensors
        if call.rows(tensor) is not None and (shape := call.shape(tensor)) is not None
    }
    if len(sizes) > 1:
        raise Meet("it combines different rows")
    return rows
