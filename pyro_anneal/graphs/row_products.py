"""Where rows lie after operations that combine whole axes: products of matrices, layers, attention."""

from __future__ import annotations

from typing import Any

from .row_calls import Call, Meet, Result, Rows, Rule

__all__ = [
    "attended",
    "batch_normalized",
    "compared",
    "layer_normalized",
    "leading",
    "multiplied",
    "of_matrices",
    "spatial",
]


def multiplied(call: Call) -> Result:
    """Multiplies matrices: rows may be rows, columns, or members of the batch."""
    names = {"mm": ("self", "mat2"), "bmm": ("self", "mat2"), "mv": ("self", "vec")}
    names |= {"addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2"), "addmv": ("mat", "vec")}
    names |= {"dot": ("self", "tensor"), "vdot": ("self", "other"), "linear": ("input", "weight")}
    kind = call.node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
    left, right = (call[name] for name in names[kind])
    one, two = call.rows(left), call.rows(right)
    batched = kind in ("bmm", "baddbmm")
    product: Rows | None = None
    if one is not None and two is not None:
        if not batched or one != two or one.axis != 0:
            raise Meet("it multiplies rows with rows")
        product = one
    elif one is not None:
        if one.axis == call.rank(left) - 1:
            raise Meet("it sums over the rows")
        product = one
    elif two is not None:
        contracted = call.rank(right) - 2 if call.rank(right) > 1 else 0
        contracted = 1 if kind == "linear" else contracted
        if two.axis == contracted:
            raise Meet("it sums over the rows")
        product = Rows(call.rank(call.node) - 1, two.inner) if kind == "linear" else two
    if kind not in ("addmm", "baddbmm", "addmv"):
        return product
    bias = call.rows(call["self"])
    if bias is None:
        return product
    bias = Rows(bias.axis - call.rank(call["self"]) + call.rank(call.node), bias.inner)
    if product is not None and product != bias:
        raise Meet("it combines different rows")
    return bias


def leading(axes: int = 1) -> Rule:
    """Makes the rule for rows among the first axes of one argument; the others are constants."""

    def rule(call: Call) -> Result:
        tensor = call.get("input", "self")
        for other in call.tensors:
            if other is not tensor and call.rows(other) is not None:
                raise Meet("its weights depend on latents")
        rows = call.own(tensor)
        if rows.axis >= axes:
            raise Meet("it works along the rows")
        return call.each(rows)

    return rule


def spatial(count: int) -> Rule:
    """Makes the rule for operations on the last axes: pooling, interpolation, padding."""

    def rule(call: Call) -> Result:
        tensor = call.get("self", "input")
        return leading(call.rank(tensor) - count)(call)

    return rule


def layer_normalized(call: Call) -> Result:
    """Normalizes the last axes."""
    axes = call.rank(call["input"]) - len(call["normalized_shape"])
    return leading(axes)(call)


def batch_normalized(call: Call) -> Result:
    """Normalizes by given statistics, or by those over all axes but the second."""
    rows = call.rows(call["input"])
    if rows is None or len([t for t in call.tensors if call.rows(t) is not None]) > 1:
        raise Meet("its weights depend on latents")
    if call.get("training", "train") and rows.axis != 1:
        raise Meet("it normalizes by statistics over the rows")
    outputs = call.outputs
    return rows if outputs is None else (rows, *(None for _ in outputs[1:]))


def of_matrices(call: Call) -> Result:
    """Works on the last two axes, matrix by matrix."""
    tensors = call.tensors
    ranks = {tensor: call.rank(tensor) + _is_vector(call, tensor) for tensor in tensors}
    depth = max(ranks.values()) - 2
    found = set()
    for tensor in tensors:
        rows, rank = call.rows(tensor), ranks[tensor]
        if rows is not None and rows.axis >= rank - 2:
            return _columns(call, tensor, rows)
        if rows is not None:
            found.add(Rows(rows.axis - (rank - 2) + depth, rows.inner))
    if len(found) != 1:
        raise Meet("it combines different rows")
    return call.each(found.pop())


def _is_vector(call: Call, tensor: Any) -> bool:
    """Tells whether a right-hand side is one vector per matrix."""
    matrix = call.get("A", "LU")
    if tensor is not call.get("B") or matrix is None or "upper" in call.given:
        return False
    shape, square = call.shape(tensor) or (), call.shape(matrix) or ()
    return len(shape) == 1 or shape == square[:-1]


def _columns(call: Call, tensor: Any, rows: Rows) -> Result:
    """Solves for many right-hand sides, each of its own."""
    kind = call.node.target._schema.name  # type: ignore[union-attr]
    solves = {
        "aten::linalg_solve_triangular": "B",
        "aten::_linalg_solve_ex": "B",
        "aten::linalg_lu_solve": "B",
        "aten::cholesky_solve": "self",
        "aten::triangular_solve": "self",
    }
    is_right_side = kind in solves and call[solves[kind]] is tensor
    left = call.get("left")
    column = call.rank(tensor) - 1 if left is None or left else call.rank(tensor) - 2
    others = [t for t in call.tensors if t is not tensor and call.rows(t) is not None]
    if not is_right_side or others or rows.axis != column:
        raise Meet("it works on matrices of rows")
    outputs = call.outputs
    if outputs is None:
        return Rows(rows.axis - call.rank(tensor) + call.rank(call.node), rows.inner)
    place = Rows(rows.axis - call.rank(tensor) + len(outputs[0] or ()), rows.inner)
    return (place, *(None for _ in outputs[1:]))


def attended(call: Call) -> Result:
    """Attends over the keys of one row, or of constants."""
    query, key, value = (call[name] for name in ("query", "key", "value"))
    rows = [call.rows(tensor) for tensor in (query, key, value)]
    if rows[0] is not None and rows[1] is None and rows[2] is None and rows[0].axis == 2:
        outputs = call.outputs
        return rows[0] if outputs is None else (rows[0], *(None for _ in outputs[1:]))
    found = {r for r in rows if r is not None}
    mask = call.get("attn_mask", "attn_bias")
    if mask is not None and call.rows(mask) is not None:
        raise Meet("its mask depends on latents")
    if len(found) != 1 or next(iter(found)).axis > 1:
        raise Meet("rows attend to rows")
    rows_out = found.pop()
    outputs = call.outputs
    if outputs is None:
        return rows_out
    return tuple(
        rows_out if at == 0 or (shape and len(shape) >= 2) else None
        for at, shape in enumerate(outputs)
    )


def compared(call: Call) -> Result:
    """Distances between two lists of points."""
    one, two = call.rows(call["x1"]), call.rows(call["x2"])
    rank = call.rank(call.node)
    if one is not None and two is not None:
        if one != two or one.axis >= rank - 2:
            raise Meet("it compares rows with rows")
        return one
    tensor = call["x1"] if one is not None else call["x2"]
    rows = call.own(tensor)
    if rows.axis == call.rank(tensor) - 1:
        raise Meet("it sums over the rows")
    at_points = rows.axis == call.rank(tensor) - 2
    if at_points and two is not None:
        return Rows(rank - 1, rows.inner)
    return Rows(rows.axis - call.rank(tensor) + rank, rows.inner)
