"""Running a step again and again: a loop in C++, one call per step, or a CUDA graph replayed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode

from ..graphs.inductor import CHAINS_FIRST, compile_with_inductor
from ..graphs.recording import flat_graph
from .step_graph import Body

__all__ = ["Run", "as_cuda_graph", "as_loop", "step_by_step"]

# Calls a body ``count`` times: ``(count, *arguments)`` to what the last call returned.
Run = Callable[..., Sequence[Tensor]]


def as_loop(body: Body, example: Sequence[Tensor]) -> Run:
    """Compiles ``while index < count: body`` with its control flow in C++."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    count = torch.zeros((), dtype=torch.long)
    carried = body.num_carried

    def condition(*tensors: Tensor) -> Tensor:
        return tensors[0] < tensors[carried]

    def with_count(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = body.graph(*tensors[:carried], *tensors[carried + 1 :])
        return outputs

    inputs = [*example[:carried], count, *example[carried:]]
    root = torch.nn.Module()
    root.condition = flat_graph(condition, *inputs)
    root.body = flat_graph(with_count, *inputs)
    graph = fx.Graph()
    arguments = [graph.placeholder(f"argument_{number}") for number in range(len(inputs))]
    parts = (graph.get_attr("condition"), graph.get_attr("body"))
    operands = (tuple(arguments[:carried]), tuple(arguments[carried:]))
    loop = graph.call_function(torch.ops.higher_order.while_loop, (*parts, *operands))
    items = [graph.call_function(operator.getitem, (loop, k)) for k in range(carried)]
    graph.output(tuple(items))
    # Inductor gives the loop's index a symbol, for which it needs a mode with a shape environment.
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_fallback_kernels=True)
    fakes: list[Any] = [mode.from_tensor(x, static_shapes=True) for x in inputs]
    with tracing(TracingContext(mode)):
        compiled = compile_with_inductor(
            fx.GraphModule(root, graph), fakes, cpp_wrapper=True, **_options(body)
        )

    def run(count: int, *tensors: Tensor) -> Sequence[Tensor]:
        end = torch.full((), count, dtype=torch.long)
        outputs: Sequence[Tensor] = compiled(*tensors[:carried], end, *tensors[carried:])
        return outputs

    run(0, *example)
    return run


def _options(body: Body) -> dict[str, Any]:
    """Chooses inductor's options for a step on a CPU."""
    return {} if body.layout.last else CHAINS_FIRST


def step_by_step(body: Body, example: Sequence[Tensor]) -> Run:
    """Compiles the body alone, to be called once per step."""
    step = compile_with_inductor(body.graph, example, **_options(body))
    carried = body.num_carried

    def run(count: int, *tensors: Tensor) -> Sequence[Tensor]:
        carry, inputs = list(tensors[:carried]), tensors[carried:]
        for _ in range(count):
            carry = list(step(*carry, *inputs))
        return carry

    run(1, *example)
    return run


def as_cuda_graph(body: Body, example: Sequence[Tensor]) -> Run:
    """Captures one compiled step, which reads its index on the device, and replays it."""
    step = compile_with_inductor(body.graph, example)
    carried = body.num_carried
    static = [tensor.clone() for tensor in example]

    def advance() -> None:
        for old, new in zip(static, step(*static), strict=False):  # the carry comes first
            old.copy_(new)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # capture needs everything allocated and loaded
            static[0].zero_()
            advance()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        advance()

    def run(count: int, *tensors: Tensor) -> Sequence[Tensor]:
        for old, new in zip(static, tensors, strict=True):
            old.copy_(new)
        for _ in range(count):
            graph.replay()
        return [tensor.clone() for tensor in static[:carried]]

    return run
