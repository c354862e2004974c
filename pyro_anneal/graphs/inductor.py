"""Compiling graphs with inductor, once per distinct graph."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .matrix_products import onednn_products

__all__ = [
    "compile_graph",
    "compile_with_inductor",
    "compiler_problem",
    "count_operations",
]

# Compiled code by graph and input layout. A graph holds no tensors (all are inputs), so captures
# of the same model on other data, and after other optimizer steps, share one compilation.
_COMPILED: OrderedDict[tuple[Any, ...], Callable[..., Any]] = OrderedDict()
_CAPACITY = 64
_PRODUCTS = tuple(
    getattr(torch.ops.aten, name).default
    for name in ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv")
)
# Inductor's options for graphs with chains first on a CPU: what is read from more than two buffers
# and used twice is computed once. Else numbers of each row return in every loop over elements.
_CHAINS_FIRST = {"realize_reads_threshold": 2}


def count_operations(graph: fx.GraphModule, *, term: float = 1.0) -> int:
    """Counts the operations on numbers of one call, about: products of matrices by their terms.

    Args:
        graph: Flat aten graph whose nodes know their shapes.
        term: What a term of a product counts, beside an element of another result.

    Returns:
        The number of multiplications of products, and of elements of all other results.
    """
    count = 0
    for node in graph.graph.nodes:
        shape = getattr(node.meta.get("tensor_meta"), "shape", None)
        if node.op != "call_function" or shape is None:
            continue
        is_product = node.target in _PRODUCTS
        inner = node.args[-1].meta["tensor_meta"].shape[-2:][0] if is_product else 1
        count += torch.Size(shape).numel() * max(int(inner * term), 1)
    return count


def compiler_problem(device: torch.device) -> str | None:
    """Says why this machine cannot compile for ``device``, or None if it can."""
    try:
        from torch._inductor import cpp_builder

        names = ("get_cpp_compiler", "_get_cpp_compiler")  # since torch 2.5, and before
        next(getattr(cpp_builder, name) for name in names if hasattr(cpp_builder, name))()
    except Exception as error:  # noqa: BLE001 - InvalidCxxCompiler, PermissionError for an empty CXX, ...
        first_line = (str(error).strip() or "no reason given").splitlines()[0]
        return f"no C++ compiler ({type(error).__name__}: {first_line})"
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            return "no triton for the GPU"
    return None


def compile_with_inductor(
    graph: fx.GraphModule, inputs: Sequence[Any], **options: Any
) -> Callable[..., Any]:
    """Hands a functional graph straight to inductor.

    Dynamo has nothing to find in a flat graph, and its guards would cost more per call than a small
    model.

    Args:
        graph: Graph without tensors of its own.
        inputs: Example inputs.
        options: Of inductor.

    Returns:
        A function of the same inputs.

    Raises:
        Exception: Whatever inductor raises.
    """

    def compiled() -> Callable[..., Any]:  # inductor may change what it is given
        result: Callable[..., Any] = torch._inductor.compile(
            copy.deepcopy(graph), list(inputs), options=options
        )
        return result

    with onednn_products() as products:
        try:
            return compiled()
        except Exception:
            if not products:
                raise
    return compiled()  # this version of torch cannot compile them


def compile_graph(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """Compiles a functional graph for inputs of fixed shapes, or finds it compiled already.

    Args:
        graph: Graph without tensors of its own.
        inputs: Example inputs.

    Returns:
        A function of the same inputs, to be called under :class:`torch.no_grad`.

    Raises:
        Exception: Whatever inductor raises.
    """
    key = (
        graph.code,
        *((x.shape, x.stride(), x.dtype, x.device) for x in inputs),
        torch.get_num_threads(),
    )
    if key not in _COMPILED:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # inductor's imports use what torch deprecates
            on_cpu = all(x.device.type == "cpu" for x in inputs)
            compiled = compile_with_inductor(graph, inputs, **(_CHAINS_FIRST if on_cpu else {}))
            compiled(*inputs)
        _COMPILED[key] = compiled
        if len(_COMPILED) > _CAPACITY:
            _COMPILED.popitem(last=False)
    _COMPILED.move_to_end(key)
    return _COMPILED[key]
