"""Products of matrices by oneDNN in compiled programs, where PyTorch's own library is slow.

PyTorch multiplies float32 matrices with MKL, which does not use the widest instructions of AMD
processors; oneDNN, which PyTorch ships too, does. Inductor reaches it for constant weights only;
here parameters are inputs, so the rule by which inductor lowers a product is replaced while it
compiles. Whether a product goes to oneDNN follows from its shape and the processor, never from
measured time: equal seeds give equal numbers.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

__all__ = ["onednn_products", "prefers_onednn"]

aten = torch.ops.aten
# oneDNN looks up its kernel in each call, some 10 microseconds: as many multiplications take that.
_FEWEST_MULTIPLICATIONS = 2**20


def prefers_onednn(rows: int, inner: int, columns: int) -> bool:
    """Tells whether oneDNN is the faster library for a product of float32 matrices.

    Args:
        rows: Of the left matrix.
        inner: Columns of the left matrix.
        columns: Of the right matrix.

    Returns:
        Whether the processor is AMD's and the product large.
    """
    return rows > 1 and rows * inner * columns >= _FEWEST_MULTIPLICATIONS and _mkl_is_slow()


@lru_cache(maxsize=1)
def _mkl_is_slow() -> bool:
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if platform.system() == "Linux":
        try:
            return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
        except OSError:
            return False
    return "AuthenticAMD" in platform.processor()


@contextmanager
def onednn_products() -> Iterator[list[tuple[int, ...]]]:
    """Lets inductor, while it compiles, leave products to oneDNN that oneDNN does faster.

    Its rules are no public interface; where they are not as known, nothing changes.

    Yields:
        A list that collects the sizes of these products.
    """
    found: list[tuple[int, ...]] = []
    try:
        from torch._inductor.lowering import lowerings

        rules = _rules(lowerings, found)
    except (ImportError, AttributeError, KeyError):  # another version of torch
        yield found
        return
    with mock.patch.dict(lowerings, rules):
        yield found


def _rules(lowerings: Any, found: list[tuple[int, ...]]) -> dict[Any, Any]:
    """Makes inductor's rules for ``mm`` and ``addmm``."""
    from torch._inductor.ir import FixedLayout, TensorBox
    from torch._inductor.mkldnn_ir import LinearUnary, _create_output_node

    product, product_and_sum = lowerings[aten.mm.default], lowerings[aten.addmm.default]
    add, permute = lowerings[aten.add.Tensor], lowerings[aten.permute.default]

    def fits(left: Any, right: Any) -> bool:
        (rows, inner), columns = map(int, left.get_size()), int(right.get_size()[1])
        kinds = {(x.get_dtype(), x.get_device().type) for x in (left, right)}
        return kinds == {(torch.float32, "cpu")} and prefers_onednn(rows, inner, columns)

    def multiply(left: Any, right: Any, **options: Any) -> Any:
        if options or not fits(left, right):
            return product(left, right, **options)
        found.append((*map(int, left.get_size()), int(right.get_size()[1])))
        rows = LinearUnary.require_contiguous(LinearUnary.realize_input(left))
        weight = LinearUnary.realize_input(permute(right, [1, 0]))
        size = [left.get_size()[0], right.get_size()[1]]
        layout = FixedLayout(device=left.get_device(), dtype=left.get_dtype(), size=size)
        node = LinearUnary(
            layout=layout, inputs=[rows, weight], constant_args=[None, "none", [-1], ""]
        )
        return TensorBox.create(_create_output_node(node))

    def multiply_and_add(bias: Any, left: Any, right: Any, **options: Any) -> Any:
        if options or not fits(left, right):
            return product_and_sum(bias, left, right, **options)
        return add(multiply(left, right), bias)

    return {aten.mm.default: multiply, aten.addmm.default: multiply_and_add}
