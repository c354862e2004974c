"""Products that oneDNN does in compiled programs, against PyTorch's own."""

from importlib.util import find_spec

import pytest
import torch

from pyro_anneal.graphs import matrix_products
from pyro_anneal.graphs.inductor import compile_graph, compiler_problem
from pyro_anneal.graphs.matrix_products import prefers_onednn
from pyro_anneal.graphs.recorder import flat_graph

needs_compiler = pytest.mark.skipif(
    compiler_problem(torch.device("cpu")) is not None, reason="no C++ compiler"
)
needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or find_spec("torch._inductor.mkldnn_ir") is None,
    reason="a version of torch without oneDNN, or whose inductor calls it otherwise",
)
LEFT, RIGHT, BIAS = (torch.randn(*size).float() for size in ((64, 130), (130, 140), (140,)))
FUNCTIONS = {
    "mm": lambda x, w, b: (x.sin() @ w,),
    "mm, transposed": lambda x, w, b: (x @ w.mT.contiguous().mT,),
    "addmm": lambda x, w, b: (torch.addmm(b, x, w).tanh(),),
    "addmm, scaled": lambda x, w, b: (torch.addmm(b, x, w, alpha=0.5),),
}


@pytest.fixture
def slow_mkl(monkeypatch):
    """Processors differ; the rules for all are tested on any."""
    monkeypatch.setattr(matrix_products, "_mkl_is_slow", lambda: True)
    torch._dynamo.reset()


def test_only_large_products_of_several_rows_go_to_onednn(slow_mkl):
    assert prefers_onednn(1024, 32, 32)
    assert not prefers_onednn(1023, 32, 32)
    assert not prefers_onednn(1, 4096, 4096)


def test_other_processors_keep_their_library(monkeypatch):
    monkeypatch.setattr(matrix_products, "_mkl_is_slow", lambda: False)
    assert not prefers_onednn(1024, 1024, 1024)


@needs_compiler
@needs_onednn
@pytest.mark.parametrize(
    "name", [x if x == "addmm" else pytest.param(x, marks=pytest.mark.slow) for x in FUNCTIONS]
)
def test_products_are_those_of_torch(slow_mkl, name):
    inputs = [LEFT, RIGHT, BIAS]
    graph = flat_graph(FUNCTIONS[name], *inputs)
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        compiled = compile_graph(graph, inputs)
        with torch.profiler.profile() as profile:
            (got,) = compiled(*inputs)
    used = any("_linear_pointwise" in event.name for event in profile.events())
    assert used == (name != "addmm, scaled")
    double = [tensor.double() for tensor in inputs]
    (expected,) = FUNCTIONS[name](*double)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-4)


@needs_compiler
@pytest.mark.slow
def test_an_unknown_inductor_multiplies_as_it_always_did(slow_mkl, monkeypatch):
    def unknown(lowerings, found):
        raise AttributeError("another version")

    def broken(lowerings, found):
        def multiply(left, right):
            found.append("a product")
            raise TypeError("another version")

        return {torch.ops.aten.mm.default: multiply}

    inputs = [LEFT, RIGHT, BIAS]
    for number, rules in enumerate((unknown, broken)):
        monkeypatch.setattr(matrix_products, "_rules", rules)
        graph = flat_graph(lambda x, w, b: (x @ w - b - number,), *inputs)  # noqa: B023
        with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
            (got,) = compile_graph(graph, inputs)(*inputs)
        torch.testing.assert_close(got, LEFT @ RIGHT - BIAS - number)
