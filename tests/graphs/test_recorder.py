"""A recorded graph does what the function does, on other inputs too."""

import threading

import pytest
import torch
from torch import nn

from pyro_anneal.graphs.recorder import current_recorder, flat_graph
from pyro_anneal.graphs.rewriting import is_mutable, lift_constants, without_private_writes

aten = torch.ops.aten
WEIGHT = torch.linspace(-1.0, 1.5, 9, dtype=torch.float64).reshape(3, 3)


def writes(x):
    y = x.clone()
    y[0] = 2.0
    view = y[1:]
    view.mul_(3.0)
    return y.sum(), view


def parts(x):
    first, *rest = x.split(1)
    values, indices = torch.stack(rest).max(0)
    return {"sum": [first + values, indices], "input": x}


def gradient(x):
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        value = (leaf @ WEIGHT).exp().sum() + torch.tensor(2.0) * leaf.square().sum()
    (grad,) = torch.autograd.grad(value, leaf)
    return value.detach(), grad


def vectorized(x):
    return torch.func.vmap(lambda row: torch.linalg.norm(row) * WEIGHT[0] @ row.outer(row))(x)


def functional(x):
    return torch.func.functionalize(lambda x: writes(x)[0])(x)


def number_of_its_own(x):
    count = int(torch.tensor([1, 2]).sum())
    return x * count


def convolved(x):
    return nn.functional.conv1d(x.unsqueeze(0), WEIGHT.unsqueeze(0)).tanh()


def leaves(values):
    return torch.utils._pytree.tree_leaves(values)


@pytest.mark.parametrize(
    "function",
    [writes, parts, gradient, vectorized, functional, number_of_its_own, convolved],
    ids=lambda function: function.__name__,
)
def test_graphs_repeat_what_ran(function):
    generator = torch.Generator().manual_seed(1)
    recorded, other = (torch.randn(3, 3, generator=generator) for _ in range(2))
    graph = flat_graph(function, recorded)
    assert all(
        node.meta["tensor_meta"] is not None
        for node in graph.graph.nodes
        if node.op == "call_function"
    )
    for x in (recorded, other):
        for ours, theirs in zip(leaves(graph(x)), leaves(function(x)), strict=True):
            assert torch.equal(ours, theirs)
    assert current_recorder() is None


def clamped(x):
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        value = (leaf.clamp(-0.5, 0.5) * leaf).sum() + leaf.cumprod(0).sum()
    return torch.autograd.grad(value, leaf)


def written_twice(x):
    y = x + 1.0
    y.mul_(x)
    y.add_(x)
    return y.sum()


def seen_through_a_view(x):
    y = x + 1.0
    row = y[0]
    y.mul_(x)
    return row


def read_by_another_name(x):
    y = x @ WEIGHT
    z = y.view(-1)
    y.mul_(2.0 * x)
    return z.sum() + y.sum()


def input_written(x):
    x = x.detach()
    x.mul_(x)
    return x


@pytest.mark.parametrize(
    ("function", "rest"),
    [
        (clamped, 0),
        (written_twice, 0),
        (seen_through_a_view, 1),
        (read_by_another_name, 1),
        (input_written, 1),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_only_writes_that_nobody_else_sees_become_operations(function, rest):
    generator = torch.Generator().manual_seed(2)
    recorded, other = (torch.randn(3, 3, generator=generator).double() for _ in range(2))
    graph = flat_graph(function, recorded.clone())
    without_private_writes(graph)
    graph.recompile()
    assert sum(is_mutable(node) for node in graph.graph.nodes) == rest
    for x in (recorded, other):
        for ours, theirs in zip(
            leaves(graph(x.clone())), leaves(function(x.clone())), strict=True
        ):
            assert torch.equal(ours, theirs)


def test_numbers_of_inputs_are_refused():
    with pytest.raises(RuntimeError, match="needs the value of a tensor that is being recorded"):
        flat_graph(lambda x: x * float(x.sum()), torch.ones(2))
    weight = torch.ones(2)
    with pytest.raises(RuntimeError, match="needs the value"):
        flat_graph(lambda x: x * float(weight.sum()), torch.ones(2))
    assert current_recorder() is None


def test_constants_are_the_tensors_themselves_and_once():
    weight = nn.Parameter(torch.ones(2))
    graph = flat_graph(lambda x: (x * weight + weight, weight), torch.ones(2))
    (constant,) = lift_constants(graph)
    assert constant is weight
    with torch.no_grad():
        assert torch.equal(graph(torch.ones(2), 2.0 * weight)[0], torch.full((2,), 4.0))


def test_composite_operations_are_opened():
    """vmap hands on operations that are defined by others."""
    graph = flat_graph(torch.func.vmap(lambda x: nn.functional.silu(x) @ WEIGHT), torch.ones(4, 3))
    targets = {node.target for node in graph.graph.nodes if node.op == "call_function"}
    assert aten.matmul.default not in targets
    assert targets & {aten.mm.default, aten.mv.default, aten.bmm.default}


def test_threads_record_apart():
    graphs = {}

    def record(number):
        graphs[number] = flat_graph(
            lambda x: sum((x + number for _ in range(50)), x), torch.ones(2)
        )

    threads = [threading.Thread(target=record, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, graph in graphs.items():
        assert torch.equal(graph(torch.ones(2)), torch.full((2,), 1.0 + 50.0 * (1 + number)))
