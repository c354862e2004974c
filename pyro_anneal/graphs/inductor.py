"""Compiling graphs with inductor, once per distinct graph."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx

from .matrix_products import onednn_products

__all__ = ["CHAINS_FIRST", "compile_graph", "compile_with_inductor", "compiler_problem"]

# Compiled code by graph and input layout. A graph holds no tensors (all are inputs), so captures
# of the same model on other data, and after other optimizer steps, share one compilation.
_COMPILED: OrderedDict[tuple[Any, ...], Callable[..., Any]] = OrderedDict()
_CAPACITY = 64
# Inductor's options for graphs with chains first on a CPU: what is read from more than two buffers
# and used twice is computed once. Else numbers of each row return in every loop over elements.
CHAINS_FIRST = {"realize_reads_threshold": 2}


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

    def compiled() -> Callable[..., Any]:
        with _unused_buffers_dropped():  # inductor may change what it is given
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


@contextmanager
def _unused_buffers_dropped() -> Iterator[None]:
    """Keeps inductor from allocating what a fused kernel inside a loop no longer writes.

    It plans the memory of a loop's body with the list of dropped buffers of the whole graph, which
    those of the body are missing from.
    """
    try:
        from torch._inductor.graph import GraphLowering

        generate = GraphLowering.codegen_subgraph
    except (ImportError, AttributeError):  # another version of torch
        yield
        return

    def generate_and_tell(self: Any, parent_graph: Any) -> None:
        generate(self, parent_graph)
        parent_graph.removed_buffers |= self.removed_buffers  # their names begin with the graph's

    with mock.patch.object(GraphLowering, "codegen_subgraph", generate_and_tell):
        yield


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
            compiled = compile_with_inductor(graph, inputs, **(CHAINS_FIRST if on_cpu else {}))
            compiled(*inputs)
        _COMPILED[key] = compiled
        if len(_COMPILED) > _CAPACITY:
            _COMPILED.popitem(last=False)
    _COMPILED.move_to_end(key)
    return _COMPILED[key]
