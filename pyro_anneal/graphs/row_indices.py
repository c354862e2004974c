"""Where rows lie after entries are looked up, gathered or written by indices and masks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from .row_calls import Call, Meet, Result, Rows, aligned, dims_of, located

__all__ = ["embedded", "gathered", "index_selected", "indexed", "likelihood_of_class", "searched"]

aten = torch.ops.aten


def embedded(call: Call) -> Result:
    """Looks rows up in a table."""
    if call.rows(call["weight"]) is not None:
        raise Meet("its table depends on latents")
    return call.rows(call["indices"])


def gathered(call: Call) -> Result:
    """Gathers or scatters along one axis."""
    others = [call[name] for name in ("index", "src") if isinstance(call.get(name), fx.Node)]
    tensors = [call["self"], *others]
    rows = located(aligned(call, tensors))
    (dim,) = dims_of(call, call["self"], call["dim"])
    if dim == rows.axis:
        if call.rows(call["self"]) is None and len(tensors) == 2 and "src" not in call.given:
            return rows
        raise Meet("it gathers along the rows")
    if len({(call.shape(tensor) or ())[rows.axis] for tensor in tensors}) > 1:
        raise Meet("it gathers some of the rows")
    return rows


def index_selected(call: Call) -> Result:
    """Takes entries of one axis by a list, or adds to them."""
    source, index = call["self"], call["index"]
    (dim,) = dims_of(call, source, call["dim"])
    if call.rows(index) is not None:
        if call.rows(source) is not None or call.get("source") is not None:
            raise Meet("it chooses among rows")
        return Rows(dim, call.rows(index).inner)  # type: ignore[union-attr]
    other = call.get("source")
    parts = [source, other] if isinstance(other, fx.Node) else [source]
    rows = located(aligned(call, parts))
    if rows.axis == dim:
        raise Meet("it chooses among rows")
    return rows


def _counts_rows(call: Call, index: Any, shape: tuple[int, ...]) -> int | None:
    """Finds the axis along which a literal index counts 0, 1, 2, ...; None if it does not."""
    value = _literal(index)
    if value is None or value.dtype is torch.bool or value.numel() != call.size:
        return None
    long = [axis for axis, length in enumerate(value.shape) if length > 1]
    if len(long) != 1 or not torch.equal(
        value.flatten().cpu(), torch.arange(call.size, device="cpu")
    ):
        return None
    return long[0] + len(shape) - value.dim()


def _literal(node: Any) -> torch.Tensor | None:
    """Evaluates a node that follows from literals alone, such as ``arange(3).unsqueeze(-1)``."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or not callable(node.target):
        return None
    values = {argument: _literal(argument) for argument in node.all_input_nodes}
    if any(value is None for value in values.values()):
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda argument: values[argument])
    result = node.target(*args, **kwargs)
    return result if isinstance(result, torch.Tensor) else None


def indexed(call: Call) -> Result:
    """Takes entries by several indices at once, or puts values there."""
    source, indices = call["self"], list(call["indices"])
    put = "values" in call.given
    at = [axis for axis, index in enumerate(indices) if index is not None]
    shapes = [call.shape(indices[axis]) or () for axis in at]
    if any(_is_mask(indices[axis]) for axis in at):
        return _masked(call, source, indices)
    broadcast = tuple(torch.broadcast_shapes(*shapes))
    contiguous = at == list(range(at[0], at[-1] + 1))
    front = at[0] if contiguous else 0  # where the result of the indices is put
    found: set[Rows] = set()
    rows = call.rows(source)
    counted: int | None = None
    if rows is not None and rows.axis in at:
        counted = _counts_rows(call, indices[rows.axis], broadcast)
        if counted is None or rows.inner != 1 or call.shape(source)[rows.axis] != call.size:  # type: ignore[index]
            raise Meet("it chooses among rows")
        found.add(Rows(front + counted))
    elif rows is not None:
        before = sum(axis < rows.axis for axis in at)
        after_front = rows.axis > at[-1] or not contiguous
        place = rows.axis - before + (len(broadcast) if after_front else 0)
        found.add(Rows(place, rows.inner))
    for axis in at:
        own = call.rows(indices[axis])
        if own is not None:
            place = own.axis - call.rank(indices[axis]) + len(broadcast)
            if put:
                raise Meet("it writes to places that depend on latents")
            found.add(Rows(front + place, own.inner))
    if put:
        return _put(call, rows, found, front, len(broadcast), at)
    if len(found) != 1:
        raise Meet("it combines different rows")
    return found.pop()


def _put(
    call: Call, rows: Rows | None, found: set[Rows], front: int, count: int, at: list[int]
) -> Result:
    """Says where rows lie after values were put at constant places."""
    values = call["values"]
    own = call.rows(values)
    if own is None:
        return rows
    rank = call.rank(call["self"]) - len(at) + count
    place = Rows(own.axis - call.rank(values) + rank, own.inner)
    if found and found != {place}:
        raise Meet("it combines different rows")
    if rows is not None:
        return rows
    if front <= place.axis < front + count:
        for axis in at:
            if _counts_rows(call, call["indices"][axis], tuple([1] * count)) == place.axis - front:
                return Rows(axis)
        raise Meet("it writes rows to chosen places")
    others = [axis for axis in range(call.rank(call["self"])) if axis not in at]
    position = place.axis if place.axis < front else place.axis - count
    return Rows(others[position], place.inner)


def _is_mask(index: Any) -> bool:
    meta = getattr(index, "meta", {}).get("tensor_meta")
    return getattr(meta, "dtype", None) in (torch.bool, torch.uint8)


def _is_number(call: Call, value: Any) -> bool:
    shape = call.shape(value)
    return call.rows(value) is None and shape is not None and math.prod(shape) == 1


def _masked(call: Call, source: Any, indices: list[Any]) -> Result:
    """Handles one constant mask over axes that hold no rows, and a number written by any mask."""
    rows = call.rows(source)
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(given) == 1 and "values" in call.given and _is_number(call, call["values"]):
        mask = given[0][1]
        if call.known_shape(mask) == call.known_shape(source):  # element by element
            return aligned(call, [source, mask])
    if len(given) != 1 or call.rows(given[0][1]) is not None:
        raise Meet("it chooses by a mask")
    axis, mask = given[0]
    width = call.rank(mask)
    if "values" in call.given:
        written = call.rows(call["values"])
        if written is None:
            return rows
        # What the mask picks is one axis in its place: [*before, count, *after].
        written = located(written)
        place = written.axis + call.rank(source) - width + 1 - call.rank(call["values"])
        if place == axis:
            raise Meet("it puts rows by a mask")
        found = Rows(place + (width - 1) * (place > axis), written.inner)
        if rows is not None and located(rows) != found:
            raise Meet("it combines different rows")
        return found
    rows = located(rows)
    if axis <= rows.axis < axis + width:
        raise Meet("a mask chooses among rows")
    return Rows(rows.axis - (width - 1) * (rows.axis > axis), rows.inner)


def likelihood_of_class(call: Call) -> Result:
    """Picks the entry of each row's class."""
    rows = call.rows(call["self"])
    if call["reduction"] != 0 or rows is None or rows.axis != 0:
        raise Meet("it reduces the rows")
    return (rows, None)


def searched(call: Call) -> Result:
    """Finds places in a constant list."""
    boundaries = call.get("boundaries", "sorted_sequence")
    if call.rows(boundaries) is not None or call.rank(boundaries) != 1:
        raise Meet("its boundaries depend on latents")
    return call.rows(call["self"])
