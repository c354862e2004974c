"""Native code against torch: single operations, whole graphs, where they are kept."""

import gc
import math
import os
from itertools import chain, product

import numpy as np
import pyro
import pytest
import torch
from problems import PROBLEMS
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import ShapeProp

from pyro_anneal.graphs import kept
from pyro_anneal.graphs.captured import capture
from pyro_anneal.graphs.folding import shapes_to_literals, simplify
from pyro_anneal.graphs.rewriting import lift_constants
from pyro_anneal.native import library, rules, schedule, structured, views
from pyro_anneal.native.evaluation import NativeDensity, density_source, ready
from pyro_anneal.native.values import CannotGenerate, Value, strides_of
from pyro_anneal.problems.problem import prepare

needs_compiler = pytest.mark.skipif(
    library.compiler_problem() is not None, reason="no C++ compiler"
)
KINDS = (torch.float32, torch.float64)


def native(function, example, seen=None):
    """Makes native code of a function of one chain; notes in ``seen`` what operations it has."""
    graph = make_fx(function)(example)
    if seen is not None:
        seen.update(node.target for node in graph.graph.nodes)
    constants = [constant.detach() for constant in lift_constants(graph)]
    ShapeProp(graph).propagate(example, *constants)
    shapes_to_literals(graph, example.device)
    graph = simplify(graph)
    density = NativeDensity(density_source(graph, example, constants))
    shared = [ready(constant) for constant in constants]
    return lambda position: density(position.contiguous(), shared)


# --- single operations ------------------------------------------------------------------------

F = torch.nn.functional
POSITIVE = {
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "lgamma": torch.lgamma,
    "digamma": torch.digamma,
    "power": lambda x: x**1.7,
    "power of a number": lambda x: 0.3**x,
    "xlogy": lambda x: torch.xlogy(x, x),
    "log2": torch.log2,
    "log10": torch.log10,
}
ANY = {
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log1p": lambda x: torch.log1p(x.abs() - 0.5),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "log sigmoid": F.logsigmoid,
    "logit": torch.logit,
    "logit within bounds": lambda x: torch.logit(x, eps=0.01),
    "softplus": F.softplus,
    "softplus by hand": lambda x: F.softplus(x, beta=2.0, threshold=5.0),
    "erf": torch.erf,
    "erfc": torch.erfc,
    "ndtr": torch.special.ndtr,
    "relu": torch.relu,
    "elu": F.elu,
    "leaky": F.leaky_relu,
    "silu": F.silu,
    "abs": torch.abs,
    "sign": torch.sign,
    "square": torch.square,
    "cube": lambda x: x**3,
    "inverse square": lambda x: x**-2,
    "reciprocal": torch.reciprocal,
    "clamp": lambda x: x.clamp(-1.0, 2.0),
    "clamp from below": lambda x: x.clamp(min=0.1),
    "floor": torch.floor,
    "round": torch.round,
    "sin": torch.sin,
    "cos": torch.cos,
    "atan": torch.atan,
    "maximum": lambda x: torch.maximum(x, 0.5 - x),
    "logaddexp": lambda x: torch.logaddexp(x, 1.0 - x),
    "where": lambda x: torch.where((x > 0.0) & ~(x == 1.0) | x.isnan(), x, -2.0 * x),
    "comparison as a number": lambda x: (x <= 0.3).to(x.dtype) + (x != 1.0),
    "masked": lambda x: x.masked_fill(x < 0, -math.inf),
    "nan to number": lambda x: x.nan_to_num(nan=7.0, posinf=8.0, neginf=-9.0),
    "subtraction with a factor": lambda x: torch.sub(x, x * x, alpha=2.0) + (1.0 - x),
    "to the other type": lambda x: x.to(torch.float64 if x.dtype == torch.float32 else torch.float32).exp().to(x.dtype),
    "whole numbers": lambda x: (x > 0).long() * 3 + x,
    "product of truths": lambda x: ((x < 5.0) * (x.abs() != math.inf)).to(x.dtype),
    "sum of truths": lambda x: ((x > 0.5) + (x.abs() < 1.0)).to(x.dtype),
    "least truth": lambda x: torch.minimum(x > 0.5, x < 2.0).to(x.dtype),
    "largest truth": lambda x: torch.maximum(x > 2.0, x < 0.5).to(x.dtype),
}  # fmt: skip
EDGES = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 700.0, -700.0, 88.0, -88.0, 100.0, -103.0, 1e30, -1e30, 1e-30, 1e-42, 0.5, -0.5, 20.0, -20.0, 0.3]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("functions", [ANY, POSITIVE], ids=["any", "positive"])
def test_operations_are_those_of_torch(functions, dtype):
    """At random numbers of all sizes and at edges: to a few units in the last place."""
    torch.manual_seed(0)
    scales = torch.logspace(-6, 2, 9, dtype=dtype).unsqueeze(1)
    numbers = (scales * torch.randn(9, 50, dtype=dtype)).flatten()
    numbers = torch.cat([numbers, torch.tensor(EDGES, dtype=dtype)])
    if functions is POSITIVE:
        numbers = numbers.abs()
    position = numbers.unsqueeze(-1)
    run = native(lambda u: tuple(f(u) for f in functions.values()), position[0])
    for name, got in zip(functions, run(position), strict=True):
        exact = torch.expm1 if name == "elu" else functions[name]  # torch 2.4 cancels there
        expected = exact(position.double() if dtype == torch.float32 else position)
        expected = expected.to(got.dtype)
        if name == "elu":
            expected = torch.where(position > 0, position, expected)
        eager = functions[name](position)
        assert got.dtype == eager.dtype, name
        # torch itself overflows or is undefined earlier in float32 than in float64
        usual = eager.isfinite() & expected.isfinite()
        assert torch.equal(got.isnan(), eager.isnan()), name
        assert torch.equal(got[~usual & ~eager.isnan()], eager[~usual & ~eager.isnan()]), name
        eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
        eps = torch.finfo(torch.float32).eps if name == "to the other type" else eps
        own = (eager.double() - expected.double()).abs()  # what torch is off by
        error = (got.double() - expected.double()).abs() - 4.0 * own
        # a factor that is too small for the type may count as zero: silu at -88
        size = position.abs().clamp(min=1.0).nan_to_num(1.0)
        bound = 8.0 * eps * expected.double().abs() + 4.0 * tiny * size
        if name in ("digamma", "lgamma"):  # relative to their roots
            bound = bound + 32.0 * eps
        assert bool((error <= bound)[usual].all()), name


# --- graphs -----------------------------------------------------------------------------------

MATRIX = torch.linspace(-1.0, 1.3, 12, dtype=torch.float64).reshape(4, 3)
TABLE = torch.linspace(-2.0, 2.0, 10, dtype=torch.float64).reshape(5, 2)
EYE = torch.eye(3, dtype=torch.float64)
LONG = torch.linspace(0.0, 1.0, 90, dtype=torch.float64)
CODES = torch.tensor([4, 0, 2, 2])


def positive(u):
    return u @ u.mT + 2.0 * EYE


def factor(u):
    return torch.linalg.cholesky_ex(positive(u)).L


def solved(u):
    """Triangular systems from both sides, one matrix for several right sides, ones understood."""
    lower, solve = positive(u).tril(), torch.linalg.solve_triangular
    from_left = solve(lower, u, upper=False) + solve(lower.mT, u, upper=True)
    from_right = solve(lower, u.mT, upper=False, left=False)
    unit = solve(lower * 0.1, u, upper=False, unitriangular=True)
    return from_left + from_right.mT + unit


GRAPHS = {
    "sums": lambda u: (u.sum() + u.sum(-1).amax() + u.mean(0).prod()) * u,
    "long sums": lambda u: (u.reshape(-1, 1) * LONG).sum(),
    "views": lambda u: u.t().reshape(2, 6).unsqueeze(1).expand(2, 4, 6).permute(2, 0, 1).squeeze(),
    "indices": lambda u: u[torch.tensor([2, 0, 1, 1]), torch.tensor([0, 3, -1, 1])] + u[-1, 1:2],
    "rows by data": lambda u: (u[torch.tensor([2, 0, 2, 1])] * TABLE[CODES, 1:]).sum(0),
    "slices": lambda u: torch.cat([u[:, 1:], u[:, :2], torch.zeros(3, 1)], -1).flip(0),
    "steps": lambda u: u[:, ::2] * u[:, 1::2] + torch.diagonal(u).sum(),
    "stack": lambda u: torch.stack([u[0], torch.arange(4.0).double(), u[2]], 1),
    "sums so far": lambda u: u.cumsum(0) + u.flip(1).cumsum(1),
    "triangles": lambda u: u.tril() + 2.0 * u.triu(1) + u[:, :3].tril(-1).sum(),
    "pads": lambda u: F.pad(u, (1, 2), value=0.5).exp(),
    "matrix from the left": lambda u: MATRIX @ u,
    "matrix times vector": lambda u: MATRIX.t() @ u[1] + torch.dot(u[0], u[2]),
    "matrix from the right": lambda u: u @ MATRIX,
    "own matrices": lambda u: u.t() @ u + torch.bmm(u.reshape(3, 2, 2), u.reshape(3, 2, 2)).sum(0).sum(),
    "affine": lambda u: F.linear(u, MATRIX.t(), torch.arange(3.0).double()),
    "broadcasting": lambda u: torch.where(u > 0, u[:, :1], torch.arange(4.0).double()) * u.exp(),
    "picked": lambda u: u.gather(1, torch.tensor([[0, 3, 1], [1, 1, 2], [2, 0, 0]])),
    "table": lambda u: F.embedding(CODES[2:] - 1, u) * u.index_select(1, CODES - 1 + (CODES == 0))[:2],
    "factors": lambda u: factor(u) + factor(u).diagonal().log().sum(),
    "triangular systems": solved,
    "places of each chain": lambda u: u.gather(1, u.argmax(1, keepdim=True)) + TABLE.index_select(0, u[0].max(0)[1].reshape(1)).sum() + u.max(1)[0].sum(),
    "softmax": lambda u: u.softmax(0) + u.log_softmax(-1) * 0.3,
    "sums of exponentials": lambda u: u.logsumexp(-1) + u.logsumexp((0, 1)) + u.t().logsumexp(0, keepdim=True).sum(),
    "Bernoulli": lambda u: F.binary_cross_entropy_with_logits(u, u.detach().sigmoid(), reduction="none"),
    "parts": lambda u: sum(x.sum() for x in u.unbind(0)) * u.split([1, 3], 1)[1] - u.split(2, 1)[0].sum(),
    "nested": lambda u: ((u - u.amax(-1, keepdim=True)).exp().sum(-1).log() * u.amin(0).sum()).tanh(),
    "shared": lambda u: MATRIX * 2.0,
    "diagonals": lambda u: torch.diag_embed(u, 1).sum(0)[:4, 1] * torch.diag_embed(u[:, 0], -2, 1, 0)[0, 2:3] + torch.diag_embed(u)[1, 2],
    "written parts": lambda u: torch.slice_scatter(u, u[:, :2].exp(), 1, 1, None, 2) * torch.slice_scatter(u, u.flip(0)) + torch.select_scatter(u, u[1] * u[2], 0, -1),
    "no elements": lambda u: u.sum() + u[:, 4:].exp().reshape(0, 3).sum() + torch.cat([u[:0] * 2.0, u]) * (u[:, :0] @ u[:0]).sum().exp() + u[:, :0].prod(),
    "masks": lambda u: u * torch.tensor([True, False, True, True]) + (u > 0).any(0).double(),
}  # fmt: skip
aten = torch.ops.aten
CUBE = (3, 2, 2)
SPELLINGS = {  # that no function of torch above leads to
    "index": lambda u: aten._unsafe_index.Tensor(u, [torch.tensor([2, 0])]),
    "index put": lambda u: aten._unsafe_index_put.default(u, [torch.tensor([2, 2])], u[:2] * 2.0, True),
    "index put behind": lambda u: aten.index_put.default(u, [None, torch.tensor([[3, 1], [1, 0]])], u.exp().reshape(3, 2, 2), True) + aten.index_put.default(u, [None, torch.tensor([2, 0])], u[:, 1:2] * 2.0),
    "scatter": lambda u: aten.scatter.value(u, 1, torch.tensor([[0], [1], [3]]), 7.0),
    "addmv": lambda u: aten.addmv.default(u[:, 0], u, u[0]),
    "baddbmm": lambda u: aten.baddbmm.default(u.reshape(CUBE), u.reshape(CUBE).exp(), u.reshape(CUBE)),
    "copies": lambda u: aten.alias.default(u) * 2.0,
    "all": lambda u: u * aten.all.default(u > -9.0) + aten.all.dim(u > 0.0, 0) + 2.0 * aten.any.default(u > 9.0),
    "numbers": lambda u: u[0] * aten.arange.start_step(1.0, 9.0, 2.0, dtype=u.dtype),
    "filled": lambda u: aten.full.default([3, 4], 2.0, dtype=u.dtype) * aten.full_like.default(u, 3.0) + aten.new_full.default(u, [4], 5.0) * aten.new_ones.default(u, [4]) + aten.zeros_like.default(u) + u,
    "other sums": lambda u: aten.mean.default(u) + aten.prod.dim_int(u, 1),
    "squeezed": lambda u: aten.squeeze.dims(u.unsqueeze(0) * 2.0, [0]),
    "checked": lambda u: torch.linalg.cholesky(positive(u)),
}  # fmt: skip
REFUSED = {
    "an inverse": lambda u: torch.linalg.inv(u @ u.t() + EYE),
    "an order": lambda u: u.gather(1, u.argsort(1)),
    "indices with a gap": lambda u: u.reshape(3, 2, 2)[torch.tensor([0, 1]), :, torch.tensor([1])],
    "places with a gap": lambda u: aten.index_put.default(
        u.reshape(3, 2, 2), [torch.tensor([0, 1]), None, torch.tensor([1])], u[:2, :2]
    ),
}


def with_gradient(function):
    def both(u):
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            value = function(leaf)
            weights = torch.arange(1.0, value.numel() + 1).reshape(value.shape)
            total = (weights * value).sum()
            (grad,) = torch.autograd.grad(total, leaf) if total.requires_grad else (u * 0,)
        return value.detach(), grad

    return both


@needs_compiler
@pytest.mark.parametrize(
    "num_chains", [19, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 8))]
)
def test_graphs_and_their_gradients_are_those_of_torch(num_chains):
    """All in one program; chains that do not fill the last vector, too."""
    u = torch.randn(
        num_chains, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    graphs, seen = GRAPHS | SPELLINGS, set()
    functions = [with_gradient(f) for f in graphs.values()]
    got = native(lambda u: sum((f(u) for f in functions), ()), u[0], seen)(u)
    tables = (structured.RULES, structured.SEVERAL, schedule._SUMS, schedule._FILLED, views.SPLITS)
    by_passes = {aten.reshape.default, aten.lift_fresh.default}  # which write or drop them
    known = {*chain(*tables), *views._RESHAPES, *views._SAME}
    assert sorted(map(str, known - seen - by_passes)) == []
    for number, (name, function) in enumerate(zip(graphs, functions, strict=True)):
        for value, expected in zip(
            got[2 * number : 2 * number + 2],
            (torch.stack(parts) for parts in zip(*map(function, u), strict=True)),
            strict=True,
        ):
            assert value.shape == expected.shape, name
            torch.testing.assert_close(
                value, expected, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_rule_knows_is_refused(name):
    example = torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(CannotGenerate):
        native(lambda u: (REFUSED[name](u),), example)


@needs_compiler
def test_sums_in_float32_keep_their_digits():
    """Ten thousand terms: to a few units, where adding them in turn would lose three digits."""
    data = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    run = native(lambda u: ((data * u).sum(),), torch.ones(1))
    (got,) = run(torch.ones(3, 1))
    assert torch.allclose(got.double(), data.double().sum(), rtol=2e-7)


@needs_compiler
def test_large_arrays_share_memory_that_others_have_left():
    """A chain of products of sizes that do not fit the stack; every result is still right."""
    torch.manual_seed(0)
    weights = [torch.randn(60, 60, dtype=torch.float64) / 8 for _ in range(5)]
    rows = torch.randn(7, 60, dtype=torch.float64)

    def function(u):
        hidden = rows * u
        for weight in weights:
            hidden = torch.tanh(hidden @ weight) + 0.1 * hidden
        return (hidden.sum(-1), hidden)

    u = torch.randn(11, 60, dtype=torch.float64)
    got = native(function, u[0])(u)
    for k in range(11):
        for value, expected in zip(got, function(u[k]), strict=True):
            torch.testing.assert_close(value[k], expected, rtol=1e-11, atol=1e-11)


@needs_compiler
def test_several_threads_give_the_same_numbers(monkeypatch):
    run = native(lambda u: (u.exp().sum(-1),), torch.zeros(3, dtype=torch.float64))
    u = torch.randn(101, 3, dtype=torch.float64)
    (alone,) = run(u)
    monkeypatch.setattr(library, "_WORK_OF_A_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        (together,) = run(u)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, together)


def test_views_are_those_of_numpy():
    """Reshapes of permuted, sliced and expanded views: the same elements, or a refusal."""
    rng = np.random.RandomState(0)
    refused = 0
    for _ in range(200):
        shape = tuple(rng.choice([1, 2, 3, 4], size=rng.randint(1, 4)))
        array = torch.arange(math.prod(shape)).reshape(shape)
        order = rng.permutation(len(shape)).tolist()
        value = Value.array("t", torch.int64, shape, is_vector=True)
        view = value.viewed([shape[d] for d in order], [strides_of(shape)[d] for d in order])
        moved = array.permute(order)
        target = tuple(s for s in ((-1, 2), (1, -1), (-1, 1, 1), (-1, 4))[rng.randint(4)])
        if math.prod(shape) % abs(math.prod(target)):
            continue
        expected = moved.reshape(target)
        found = view.reshaped(tuple(expected.shape))
        if found is None:
            refused += 1
            with pytest.raises(RuntimeError):
                moved.view(target)
            continue
        flat = array.reshape(-1)
        for index in product(*map(range, expected.shape)):
            at = found.offset + sum(i * s for i, s in zip(index, found.strides, strict=True))
            assert flat[at] == expected[index]
    assert refused > 5


# --- the density ------------------------------------------------------------------------------


def function(u):
    return -0.5 * u.square().sum(-1), -2.0 * (u - 0.3).square().sum(-1) + u.sum(-1).sin()


DEFAULT = ("support: simplex",)


@needs_compiler
@pytest.mark.parametrize(
    "problem",
    [
        pytest.param(p, id=p.name, marks=[] if p.name in DEFAULT else pytest.mark.slow)
        for p in PROBLEMS
    ],
)
def test_known_problems_have_native_code(problem):
    """Of every support, handler, enumeration and plate: the numbers of the recorded graph."""
    torch.set_default_dtype(torch.float64)
    arguments = (problem.args, problem.kwargs)
    with pyro.validation_enabled(False):
        prepared = prepare(
            problem.model, None, arguments, arguments, num_chains=9, batch_plates="auto",
            compile=False, seed=0,
        )  # fmt: skip
    graph = prepared.density
    density = capture(graph.function, graph.example, num_chains=9, native=True)
    assert density.native_source_and_inputs() is not None
    torch.manual_seed(0)
    position = torch.cat([prepared.draw(5), torch.randn(4, *graph.example.shape)])
    for got, expected in zip(density(position), graph(position), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9, equal_nan=True)


@needs_compiler
def test_wrong_native_code_is_not_used(monkeypatch):
    """A rule that is wrong shows at the probes, and the graph itself is evaluated."""
    monkeypatch.setattr(kept, "_GRAPHS", type(kept._GRAPHS)())
    example = torch.zeros(3, dtype=torch.float64)
    assert capture(function, example, num_chains=4, native=True).mode == "compiled"
    monkeypatch.setattr(kept, "_GRAPHS", type(kept._GRAPHS)())
    monkeypatch.setitem(rules._RULES, "sin.default", lambda x: f"v_cos({x})")
    density = capture(function, example, num_chains=4, native=True)
    assert density.mode == "graph"
    position = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(density(position).log_target, function(position)[1])


@needs_compiler
@pytest.mark.parametrize("empty", [True, False], ids=["no elements", "a fault of the writer"])
def test_what_cannot_be_written_is_evaluated_by_its_graph(monkeypatch, empty):
    """Native code is never the reason to go chain by chain through the model; nor are empty arrays."""
    monkeypatch.setattr(kept, "_GRAPHS", type(kept._GRAPHS)())
    if not empty:
        monkeypatch.setitem(rules._RULES, "sin.default", lambda x: 1 // 0)

    def with_nothing(u):
        first, second = function(u)
        nothing = u[..., 3:].reshape((*u.shape[:-1], 0, 2)).sum((-2, -1)) if empty else 0.0
        return first + nothing, second + nothing

    example = torch.zeros(3, dtype=torch.float64)
    density = capture(with_nothing, example, num_chains=4, native=True)
    assert density.mode == ("compiled" if empty else "graph")
    position = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(density(position).log_target, with_nothing(position)[1])


@needs_compiler
def test_few_chains_do_not_waste_vectors():
    """Much work on one chain stays a graph; of many chains, or little of it, becomes native."""
    weight = torch.linspace(-1.0, 1.0, 50 * 200, dtype=torch.float64).reshape(50, 200)

    def function(u):
        return -0.5 * u.square().sum(-1), -0.5 * (u @ weight).square().sum(-1)

    for rows, num_chains, mode in ((3, 1, "graph"), (3, 4, "compiled"), (1, 1, "compiled")):
        example = torch.zeros(rows, 50, dtype=torch.float64)
        density = capture(function, example, num_chains=num_chains, native=True)
        assert density.mode == mode
        position = torch.randn(num_chains, rows, 50, dtype=torch.float64)
        torch.testing.assert_close(density(position).log_target, function(position)[1])


@needs_compiler
def test_fresh_data_give_fresh_numbers():
    """Parameters changed in place, other data, and the first again."""
    scale, data = torch.tensor([0.5, 2.0]).double(), torch.tensor([1.0, -1.0]).double()

    def on(data):
        return lambda u: (-0.5 * u.square().sum(-1), -(scale * (u - data)).square().sum(-1))

    density = capture(on(data), torch.zeros(2, dtype=torch.float64), num_chains=3, native=True)
    assert density.mode == "compiled"
    position = torch.randn(3, 2, dtype=torch.float64)

    def assert_right(density, function):
        state = density(position)
        torch.testing.assert_close(state.log_target, function(position)[1])
        leaf = position.clone().requires_grad_()
        (grad,) = torch.autograd.grad(function(leaf)[1].sum(), leaf)
        torch.testing.assert_close(state.grad_target, grad)

    assert_right(density, on(data))
    other = data + 3.0
    moved = density.rebind({data: other}, on(other))
    assert_right(moved, on(other))
    assert_right(density, on(data))
    scale.mul_(3.0)
    density.refresh()
    moved.refresh()
    assert_right(density, on(data))
    assert_right(moved, on(other))
    again = capture(on(other + 1.0), torch.zeros(2).double(), num_chains=3, native=True)
    assert_right(again, on(other + 1.0))


# --- on disk ----------------------------------------------------------------------------------

SOURCE = (
    'extern "C" void run(long long count, long long, long long, void **p, char *) '
    "{ *(double *)p[0] = NUMBER; }\n"
)


def run(number):
    made = library.load(SOURCE.replace("NUMBER", number))
    result = torch.zeros(1, dtype=torch.float64)
    made.run(1, [result], lanes=1, scratch=0, work=1)
    return float(result)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PYRO_ANNEAL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "_LOADED", type(library._LOADED)())
    return tmp_path / "cache"


@needs_compiler
def test_another_process_finds_what_was_compiled(cache, monkeypatch):
    assert run("1.5") == 1.5
    assert run("2.5") == 2.5
    assert len(list(cache.glob("*.so"))) == 2
    monkeypatch.setattr(library, "_LOADED", type(library._LOADED)())  # a new process
    compiled = []
    monkeypatch.setattr(
        library.subprocess, "run", lambda *a, **k: compiled.append(a) or pytest.fail("compiled")
    )
    assert run("2.5") == 2.5
    assert not compiled


@needs_compiler
def test_files_of_others_are_not_loaded(cache, monkeypatch):
    """A library that anybody may have written is made anew; so is a folder not used."""
    run("3.5")
    (kept,) = cache.glob("*.so")
    before = kept.stat().st_ino
    kept.chmod(0o777)
    monkeypatch.setattr(library, "_LOADED", type(library._LOADED)())
    assert run("3.5") == 3.5
    assert kept.stat().st_ino != before
    cache.chmod(0o777)
    monkeypatch.setattr(library, "_LOADED", type(library._LOADED)())
    assert run("4.5") == 4.5
    assert len(list(cache.glob("*.so"))) == 1


@needs_compiler
def test_what_was_used_long_ago_is_removed(cache, monkeypatch):
    names = {}
    for age, number in enumerate(("5.25", "5.5", "5.75")):
        assert run(number) == float(number)
        (names[number],) = set(cache.iterdir()) - set(names.values())
        os.utime(names[number], (1e9 - age, 1e9 - age))  # the first is the youngest
    monkeypatch.setattr(library, "_LOADED", type(library._LOADED)())
    assert run("5.75") == 5.75  # the oldest was used
    size = names["5.5"].stat().st_size
    (cache / "left by a crash").mkdir()
    os.utime(cache / "left by a crash", (1e9, 1e9))
    monkeypatch.setenv("PYRO_ANNEAL_CACHE_MB", str(3.5 * size / 2**20))
    assert run("6.25") == 6.25
    (last,) = set(cache.glob("*.so")) - set(names.values())
    assert set(cache.iterdir()) == {names["5.25"], names["5.75"], last}
    monkeypatch.setattr(library, "_MOST_FILES", 2)
    assert run("6.75") == 6.75
    assert len(list(cache.iterdir())) == 2
    assert last in cache.iterdir()


def test_a_folder_of_its_own_goes_with_the_process(tmp_path, monkeypatch):
    at_exit = []
    monkeypatch.setattr(library.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(library.atexit, "register", at_exit.append)
    monkeypatch.setattr(library.os, "getpid", lambda: 1)
    place = library._own_folder(-7)  # made by another process, which was forked
    at_exit[0]()
    assert place.parent == tmp_path
    assert place.is_dir()
    monkeypatch.setattr(library.os, "getpid", lambda: -7)
    at_exit[0]()
    assert not place.exists()


@needs_compiler
@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="Linux tells what is loaded")
def test_libraries_that_nobody_uses_leave_memory(cache):
    made = library.load(SOURCE.replace("NUMBER", "6.5"))
    (file,) = cache.glob("*.so")

    def is_loaded():
        with open("/proc/self/maps") as maps:
            return file.name in maps.read()

    assert is_loaded()
    library._LOADED.clear()
    assert is_loaded()  # it is in use
    del made
    gc.collect()
    assert not is_loaded()
    assert run("6.5") == 6.5


@needs_compiler
def test_what_the_compiler_refuses_is_told(cache):
    with pytest.raises(CannotGenerate, match=r"the C\+\+ compiler failed .*error"):
        run("no_such_name")
    assert not list(cache.iterdir())


def test_without_a_compiler_the_graph_is_evaluated(monkeypatch):
    monkeypatch.setenv("CXX", "")
    monkeypatch.setattr(kept, "_GRAPHS", type(kept._GRAPHS)())
    density = capture(function, torch.zeros(3).double(), num_chains=2, native=True)
    assert density.mode == "graph"
    position = torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(density(position).log_target, function(position)[1])
