"""One table: what each operation does to the rows of a plate.

A rule is given an operation's arguments and where the rows lie in them, and says where they lie in
the result. It raises :class:`Meet` where one row of the result would depend on several rows, or
where it cannot tell. Arguments that do not depend on the position are constants, whatever they hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

__all__ = ["Call", "Meet", "Rows", "rule_of"]

aten = torch.ops.aten


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

    @staticmethod
    def shape(value: Any) -> tuple[int, ...] | None:
        """Returns the shape of a tensor; None for other arguments."""
        meta: Any = getattr(value, "meta", {}).get("tensor_meta")
        return tuple(meta.shape) if hasattr(meta, "shape") else None

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


def _dims(call: Call, tensor: Any, dims: Any) -> list[int]:
    rank = call.rank(tensor)
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return list(range(rank))
    dims = [dims] if isinstance(dims, int) else dims
    return [dim % max(rank, 1) for dim in dims]


def elementwise(call: Call) -> Result:
    """Combines entries of the same place, after broadcasting."""
    return call.each(_aligned(call, call.tensors))


def _aligned(call: Call, tensors: Sequence[Any]) -> Rows | None:
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


def reshaped(call: Call) -> Result:
    """Keeps the order of entries: a row is a digit of their number."""
    source = call["self"]
    rows, old, new = call.rows(source), call.shape(source), call.shape(call.node)
    assert rows is not None
    assert old is not None
    assert new is not None
    place = rows.inner * math.prod(old[rows.axis + 1 :])
    for axis, length in enumerate(new):
        right = math.prod(new[axis + 1 :])
        if length > 1 and place % right == 0 and (right * length) % (place * call.size) == 0:
            return Rows(axis, place // right)
    raise Meet("a view cuts the rows apart")


def permuted(call: Call) -> Result:
    """Reorders axes."""
    rows, rank = call.rows(call["self"]), call.rank(call["self"])
    assert rows is not None
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
    rows = call.rows(call["self"])
    assert rows is not None
    return Rows(rows.axis + call.rank(call.node) - call.rank(call["self"]), rows.inner)


def _without(call: Call, rows: Rows, dim: int) -> Rows:
    if rows.axis == dim:
        raise Meet("it takes single rows")
    return Rows(rows.axis - (dim < rows.axis), rows.inner)


def selected(call: Call) -> Result:
    """Takes one entry of an axis."""
    rows = call.rows(call["self"])
    assert rows is not None
    (dim,) = _dims(call, call["self"], call["dim"])
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
    if rows.axis in _dims(call, source, call_dims):
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
    dims = _dims(call, source, call.get("dim", "dims"))
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
    rows = _aligned(call, tensors)
    assert rows is not None
    if call.node.target is aten.stack.default:
        return Rows(rows.axis + (dim <= rows.axis), rows.inner)
    if rows.axis == dim and len(tensors) > 1:
        raise Meet("it puts rows together anew")
    return rows


def padded(call: Call) -> Result:
    """Pads the last axes."""
    source = call["self"]
    rows = call.rows(source)
    assert rows is not None
    if rows.axis >= call.rank(source) - len(call.get("pad", "padding")) // 2:
        raise Meet("it pads the rows")
    return rows


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
        rows = call.rows(tensor)
        assert rows is not None
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


def embedded(call: Call) -> Result:
    """Looks rows up in a table."""
    if call.rows(call["weight"]) is not None:
        raise Meet("its table depends on latents")
    return call.rows(call["indices"])


def gathered(call: Call) -> Result:
    """Gathers or scatters along one axis."""
    others = [call[name] for name in ("index", "src") if isinstance(call.get(name), fx.Node)]
    tensors = [call["self"], *others]
    rows = _aligned(call, tensors)
    assert rows is not None
    (dim,) = _dims(call, call["self"], call["dim"])
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
    (dim,) = _dims(call, source, call["dim"])
    if call.rows(index) is not None:
        if call.rows(source) is not None or call.get("source") is not None:
            raise Meet("it chooses among rows")
        return Rows(dim, call.rows(index).inner)  # type: ignore[union-attr]
    other = call.get("source")
    parts = [source, other] if isinstance(other, fx.Node) else [source]
    rows = _aligned(call, parts)
    assert rows is not None
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


def _masked(call: Call, source: Any, indices: list[Any]) -> Result:
    """Handles one constant mask over axes that hold no rows."""
    rows = call.rows(source)
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(given) != 1 or call.rows(given[0][1]) is not None:
        raise Meet("it chooses by a mask")
    axis, mask = given[0]
    width = call.rank(mask)
    if "values" in call.given:
        if call.rows(call["values"]) is not None or rows is None:
            raise Meet("it puts rows by a mask")
        return rows
    assert rows is not None
    if axis <= rows.axis < axis + width:
        raise Meet("a mask chooses among rows")
    return Rows(rows.axis - (width - 1) * (rows.axis > axis), rows.inner)


def scattered(call: Call) -> Result:
    """Writes a slice into a tensor."""
    source, new = call["self"], call["src"]
    (dim,) = _dims(call, source, call["dim"])
    own = call.rows(new)
    if own is not None and call.node.target is aten.select_scatter.default:
        own = Rows(own.axis + (dim <= own.axis), own.inner)
    rows = call.rows(source)
    if rows is not None and own is not None and rows != own:
        raise Meet("it combines different rows")
    found = rows or own
    assert found is not None
    if found.axis == dim and call.shape(new) != call.shape(source):
        raise Meet("it writes single rows")
    return found


def on_diagonal(call: Call) -> Result:
    """Takes a diagonal."""
    rows = call.rows(call["self"])
    assert rows is not None
    dims = _dims(call, call["self"], (call["dim1"], call["dim2"]))
    if rows.axis in dims:
        raise Meet("it takes a diagonal over rows")
    return Rows(rows.axis - sum(dim < rows.axis for dim in dims), rows.inner)


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
    rows, tensor = (one, call["x1"]) if one is not None else (two, call["x2"])
    assert rows is not None
    if rows.axis == call.rank(tensor) - 1:
        raise Meet("it sums over the rows")
    at_points = rows.axis == call.rank(tensor) - 2
    if at_points and two is not None:
        return Rows(rank - 1, rows.inner)
    return Rows(rows.axis - call.rank(tensor) + rank, rows.inner)


def unreduced(call: Call) -> Result:
    """A loss, entry by entry."""
    if call["reduction"] != 0:
        raise Meet("it reduces the rows")
    return elementwise(call)


def likelihood_of_class(call: Call) -> Result:
    """Picks the entry of each row's class."""
    rows = call.rows(call["self"])
    if call["reduction"] != 0 or rows is None or rows.axis != 0:
        raise Meet("it reduces the rows")
    return (rows, None)


def as_pairs(call: Call) -> Result:
    """Views complex numbers as pairs, along a new last axis."""
    return call.rows(call["self"])


def searched(call: Call) -> Result:
    """Finds places in a constant list."""
    boundaries = call.get("boundaries", "sorted_sequence")
    if call.rows(boundaries) is not None or call.rank(boundaries) != 1:
        raise Meet("its boundaries depend on latents")
    return call.rows(call["self"])


def constant(call: Call) -> Result:
    """Takes only a shape."""
    return call.each(None)


def unknown(call: Call) -> Result:
    """No rule."""
    raise Meet("how it treats rows is not known")


def _table() -> dict[str, Rule]:
    """Lists the rules by names of operations."""
    groups: list[tuple[Rule, str]] = [
        (
            elementwise,
            (
                "_to_copy clone detach alias lift_fresh lift_fresh_copy copy tril triu masked_fill where "
                "_prelu_kernel polygamma complex real imag conj _conj _neg_view resolve_conj resolve_neg "
                "addcmul addcdiv lerp nan_to_num clamp angle log_sigmoid_forward "
                "hardswish polar special_ndtr floor_divide"
            ),
        ),
        (
            reshaped,
            "view _unsafe_view reshape unsqueeze squeeze _reshape_alias",
        ),
        (permuted, "permute transpose t"),
        (expanded, "expand repeat"),
        (selected, "select unbind"),
        (
            kept,
            (
                "slice split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk "
                "flip roll cumsum cumprod logcumsumexp cummax cummin sort argsort topk _softmax "
                "_log_softmax _safe_softmax glu unfold _fft_r2c _fft_c2r _fft_c2c"
            ),
        ),
        (
            reduced,
            (
                "sum mean prod amax amin logsumexp var std var_mean std_mean norm linalg_vector_norm "
                "any all argmax argmin max min median nanmedian mode kthvalue count_nonzero nansum "
                "aminmax"
            ),
        ),
        (joined, "cat stack"),
        (padded, "constant_pad_nd"),
        (multiplied, "mm bmm addmm baddbmm mv addmv dot vdot linear"),
        (
            leading(),
            (
                "convolution mkldnn_convolution cudnn_convolution _slow_conv2d_forward native_group_norm "
                "thnn_conv2d conv_depthwise3d _conv_depthwise2d slow_conv3d_forward miopen_convolution"
            ),
        ),
        (layer_normalized, "native_layer_norm _fused_rms_norm"),
        (
            batch_normalized,
            (
                "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
                "cudnn_batch_norm miopen_batch_norm _batch_norm_with_update"
            ),
        ),
        (embedded, "embedding"),
        (gathered, "gather scatter scatter_add scatter_reduce"),
        (index_selected, "index_select index_add index_copy index_fill"),
        (indexed, "index index_put _unsafe_index _unsafe_index_put"),
        (scattered, "select_scatter slice_scatter"),
        (on_diagonal, "diagonal diagonal_copy"),
        (
            of_matrices,
            (
                "linalg_cholesky_ex cholesky linalg_inv_ex _linalg_solve_ex linalg_solve_triangular "
                "triangular_solve cholesky_solve cholesky_inverse _linalg_eigh linalg_eigh linalg_eig "
                "_linalg_svd linalg_qr _linalg_det _linalg_slogdet linalg_lu_factor_ex linalg_lu_solve "
                "linalg_matrix_exp linalg_ldl_factor_ex linalg_pinv linalg_lu"
            ),
        ),
        (
            attended,
            (
                "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
                "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
                "_scaled_dot_product_attention_math"
            ),
        ),
        (compared, "_cdist_forward"),
        (
            unreduced,
            (
                "mse_loss binary_cross_entropy binary_cross_entropy_with_logits smooth_l1_loss "
                "huber_loss soft_margin_loss"
            ),
        ),
        (likelihood_of_class, "nll_loss_forward"),
        (searched, "bucketize searchsorted"),
        (as_pairs, "view_as_real"),
        (
            constant,
            (
                "ones_like zeros_like full_like empty_like new_ones new_zeros new_full new_empty "
                "new_empty_strided rand_like randn_like sym_size sym_numel"
            ),
        ),
        (
            spatial(1),
            (
                "max_pool1d avg_pool1d upsample_linear1d upsample_nearest1d reflection_pad1d "
                "replication_pad1d adaptive_avg_pool1d _upsample_nearest_exact1d diag_embed"
            ),
        ),
        (
            spatial(2),
            (
                "max_pool2d_with_indices avg_pool2d upsample_nearest2d upsample_bilinear2d "
                "upsample_bicubic2d reflection_pad2d replication_pad2d _adaptive_avg_pool2d "
                "adaptive_max_pool2d pixel_shuffle pixel_unshuffle _upsample_nearest_exact2d "
                "_upsample_bilinear2d_aa"
            ),
        ),
        (
            spatial(3),
            (
                "max_pool3d_with_indices avg_pool3d upsample_nearest3d upsample_trilinear3d "
                "_adaptive_avg_pool3d reflection_pad3d replication_pad3d"
            ),
        ),
    ]
    return {f"aten::{name}": rule for rule, names in groups for name in names.split()}


_RULES = _table()


def rule_of(func: Any) -> Rule:
    """Finds the rule of an operation."""
    tags = getattr(func, "tags", ())
    schema = getattr(func, "_schema", None)
    if schema is None:
        return unknown
    # Attention carries the tag of random operations even without dropout.
    is_plain = torch.Tag.nondeterministic_seeded not in tags
    if torch.Tag.pointwise in tags and is_plain:
        return elementwise
    return _RULES.get(schema.name, unknown)
