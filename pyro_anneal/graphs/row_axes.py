"""Where rows lie after operations that move, cut, reduce and join axes, entries as they were."""

from __future__ import annotations

import math

import torch

from .row_calls import Call, Meet, Result, Rows, aligned, dims_of, located

__all__ = [
    "as_pairs",
    "constant",
    "elementwise",
    "expanded",
    "joined",
    "kept",
    "on_diagonal",
    "padded",
    "permuted",
    "reduced",
    "reshaped",
    "scattered",
    "selected",
    "unknown",
    "unreduced",
]

aten = torch.ops.aten


def elementwise(call: Call) -> Result:
    """Combines entries of the same place, after broadcasting."""
    return call.each(aligned(call, call.tensors))


def reshaped(call: Call) -> Result:
    """Keeps the order of entries: a row is a digit of their number."""
    source = call["self"]
    rows, old, new = call.own(source), call.known_shape(source), call.known_shape(call.node)
    place = rows.inner * math.prod(old[rows.axis + 1 :])
    for axis, length in enumerate(new):
        right = math.prod(new[axis + 1 :])
        if length > 1 and place % right == 0 and (right * length) % (place * call.size) == 0:
            return Rows(axis, place // right)
    raise Meet("a view cuts the rows apart")


def permuted(call: Call) -> Result:
    """Reorders axes."""
    rows, rank = call.own(call["self"]), call.rank(call["self"])
    if "dims" in call.given:
        order = [dim % rank for dim in call["dims"]]
    else:
        order = list(range(rank))
        one, two = (call["dim0"], call["dim1"]) if "dim0" in call.given else (0, -1)
        if rank:
            order[one], order[two] = order[two], order[one]
    return Rows(order.index(rows.axis), rows.inner)


def expanded(call: Call) -> Result:
    """Repeats axes of length one, or tiles: rows stay digits of their axis."""
    rows = call.own(call["self"])
    return Rows(rows.axis + call.rank(call.node) - call.rank(call["self"]), rows.inner)


def _without(call: Call, rows: Rows, dim: int) -> Rows:
    if rows.axis == dim:
        raise Meet("it takes single rows")
    return Rows(rows.axis - (dim < rows.axis), rows.inner)


def selected(call: Call) -> Result:
    """Takes one entry of an axis."""
    rows = call.own(call["self"])
    (dim,) = dims_of(call, call["self"], call["dim"])
    return call.each(_without(call, rows, dim))


def kept(call: Call) -> Result:
    """Works along axes that stay, on all other axes alike."""
    source = call.get("self", "input")
    rows = call.rows(source)
    if rows is None:
        raise Meet("another argument depends on latents")
    call_dims = call.get("dims", "dim", "dimension")
    full = call.outputs is None and call.shape(source) == call.shape(call.node)
    if call.node.target is aten.slice.Tensor and full and call["step"] == 1:
        return rows
    if any(call.rows(tensor) is not None for tensor in call.tensors if tensor is not source):
        raise Meet("another argument depends on latents")
    if rows.axis in dims_of(call, source, call_dims):
        raise Meet("it works along the rows")
    return call.each(rows)


def reduced(call: Call) -> Result:
    """Reduces axes."""
    source = call.get("self", "input")
    rows = call.rows(source)
    if rows is None or any(
        call.rows(tensor) is not None for tensor in call.tensors if tensor is not source
    ):
        raise Meet("another argument depends on latents")
    dims = dims_of(call, source, call.get("dim", "dims"))
    if rows.axis in dims:
        raise Meet("it reduces the rows")
    if call.get("keepdim"):
        return call.each(rows)
    return call.each(Rows(rows.axis - sum(dim < rows.axis for dim in dims), rows.inner))


def joined(call: Call) -> Result:
    """Puts tensors one after the other."""
    tensors = call["tensors"]
    rank = call.rank(tensors[0]) + (call.node.target is aten.stack.default)
    dim = call["dim"] % max(rank, 1)
    # An empty one-dimensional tensor is allowed beside others.
    tensors = [t for t in tensors if call.shape(t) != (0,)]
    rows = located(aligned(call, tensors))
    if call.node.target is aten.stack.default:
        return Rows(rows.axis + (dim <= rows.axis), rows.inner)
    if rows.axis == dim and len(tensors) > 1:
        raise Meet("it puts rows together anew")
    return rows


def padded(call: Call) -> Result:
    """Pads the last axes."""
    source = call["self"]
    rows = call.own(source)
    if rows.axis >= call.rank(source) - len(call.get("pad", "padding")) // 2:
        raise Meet("it pads the rows")
    return rows


def scattered(call: Call) -> Result:
    """Writes a slice into a tensor."""
    source, new = call["self"], call["src"]
    (dim,) = dims_of(call, source, call["dim"])
    own = call.rows(new)
    if own is not None and call.node.target is aten.select_scatter.default:
        own = Rows(own.axis + (dim <= own.axis), own.inner)
    rows = call.rows(source)
    if rows is not None and own is not None and rows != own:
        raise Meet("it combines different rows")
    found = located(rows or own)
    if found.axis == dim and call.shape(new) != call.shape(source):
        raise Meet("it writes single rows")
    return found


def on_diagonal(call: Call) -> Result:
    """Takes a diagonal."""
    rows = call.own(call["self"])
    dims = dims_of(call, call["self"], (call["dim1"], call["dim2"]))
    if rows.axis in dims:
        raise Meet("it takes a diagonal over rows")
    return Rows(rows.axis - sum(dim < rows.axis for dim in dims), rows.inner)


def unreduced(call: Call) -> Result:
    """A loss, entry by entry."""
    if call["reduction"] != 0:
        raise Meet("it reduces the rows")
    return elementwise(call)


def as_pairs(call: Call) -> Result:
    """Views complex numbers as pairs, along a new last axis."""
    return call.rows(call["self"])


def constant(call: Call) -> Result:
    """Takes only a shape."""
    return call.each(None)


def unknown(call: Call) -> Result:
    """No rule."""
    raise Meet("how it treats rows is not known")
