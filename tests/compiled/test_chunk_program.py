"""The compiled loop: the same numbers as the loop of single steps, or the reason why not."""

import math
from collections import OrderedDict
from dataclasses import dataclass, field

import cases
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import ShapeProp
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_anneal import AnnealedImportance
from pyro_anneal.chains.loop import CHUNK_SIZE, run_chains
from pyro_anneal.chains.loop import _run_chunk as run_chunk
from pyro_anneal.chains.path import Path, StepTable, TuningTable
from pyro_anneal.compiled import program as chunk_program
from pyro_anneal.compiled import runners as body_runners
from pyro_anneal.compiled.chains_last import Transposing, over_chains_last
from pyro_anneal.compiled.choice import loop_problem, repays_compilation
from pyro_anneal.compiled.program import LoopedDensity
from pyro_anneal.compiled.step_graph import DensityGraphs, build_body
from pyro_anneal.compiled.storage import Shared, StorageLayout
from pyro_anneal.graphs import kept, matrix_products
from pyro_anneal.graphs.captured import capture
from pyro_anneal.graphs.folding import shapes_to_literals, simplify
from pyro_anneal.graphs.inductor import compiler_problem
from pyro_anneal.graphs.repetition import repeated_dims
from pyro_anneal.kernels import HMC, RandomWalk
from pyro_anneal.persistence.randomness import seeded_generator
from pyro_anneal.problems.problem import prepare
from pyro_anneal.schedules import Power

needs_compiler = pytest.mark.skipif(
    compiler_problem(torch.device("cpu")) is not None, reason="no C++ compiler"
)


def prepared(model, *args, num_chains=9, dtype=torch.float64, native=False):
    arguments = (args, {})
    with pyro.validation_enabled(False):
        problem = prepare(
            model, None, arguments, arguments, num_chains=num_chains, batch_plates="auto",
            compile=False, seed=0, native=native,
        )  # fmt: skip
    return problem.density, problem.draw(num_chains)


def natively(density):
    """The same density as native code."""
    return capture(density.function, density.example, num_chains=density.num_chains, native=True)


def lopsided_tuning(example, step=0.15):
    """Steps and scales that differ by beta, batch element and coordinate."""
    knots = (0.0, 0.1, 0.45, 1.0)
    ramp = torch.linspace(-0.7, 0.4, example.numel()).reshape(example.shape)
    rows = torch.linspace(0.0, 0.5, max(1, example[..., 0].numel())).reshape(example.shape[:-1])
    log_step = torch.stack([math.log(step) - 0.3 * k + rows for k in range(4)])
    return TuningTable(knots, log_step, torch.stack([ramp * (1 + k) / 4 for k in range(4)]))


def assert_both_agree(density, position, path, direction="forward", *, mode="loop", native=None):
    """Runs step by step and compiled, and compares everything.

    The compiled steps are those of ``native`` where that is given: the same density as native code.
    """
    state = density(position)
    kept = [part.clone() for part in state]
    compiled = native or density
    looped = LoopedDensity(compiled)
    options = {"direction": direction, "seed": 3, "stream": "s"}
    with torch.no_grad():
        expected = run_chains(density, path, state, **options)
        before = compiled.num_evaluations
        got = run_chains(looped, path, state, **options)
    assert looped.loop_mode == mode, looped.loop_reason
    assert compiled.num_evaluations - before >= path.kernel.num_gradients * (path.num_steps - 1)
    assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))  # left as it was
    tolerance = {"rtol": 1e-9, "atol": 1e-9, "equal_nan": True}
    for a, b in zip((*got[0][0], *got[0][1:]), (*expected[0][0], *expected[0][1:]), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert torch.allclose(a, b, **tolerance)
    for a, b in zip(got[1], expected[1], strict=True):
        assert torch.allclose(a, b, **tolerance)
    assert 0.05 < float(expected[1].accept_prob.mean()) < 0.999  # both branches were taken
    return got


def schools(num_chains=9):
    data = torch.tensor(cases.SCHOOLS_Y), torch.tensor(cases.SCHOOLS_SIGMA)
    return prepared(cases.eight_schools, *data, num_chains=num_chains)


# --- agreement --------------------------------------------------------------------------------


@needs_compiler
def test_the_loop_gives_the_numbers_of_single_steps(monkeypatch):
    """All lengths and both directions, from one compilation."""
    compilations = []
    compile_body = chunk_program._compile
    monkeypatch.setattr(
        chunk_program, "_compile", lambda *a: compilations.append(1) or compile_body(*a)
    )
    monkeypatch.setattr(chunk_program, "_PROGRAMS", type(chunk_program._PROGRAMS)())
    density, position = schools()
    tuning = lopsided_tuning(position[0], step=0.5)
    for num_steps in (2, CHUNK_SIZE, CHUNK_SIZE + 1, 2 * CHUNK_SIZE + 37):
        for direction in ("forward", "reverse"):
            path = Path(Power(2.0)(num_steps), HMC(1), tuning)
            assert_both_agree(density, position, path, direction)
    assert len(compilations) == 1
    # other data, another density object: the same program
    other, position = prepared(
        cases.eight_schools, torch.tensor(cases.SCHOOLS_Y) + 3.0, torch.tensor(cases.SCHOOLS_SIGMA)
    )
    assert_both_agree(other, position, path)
    assert len(compilations) == 1
    # a chunk repeated from its start, as after an interruption
    state = other(position)
    with torch.no_grad():
        whole = run_chains(other, path, state, direction="reverse", seed=3, stream="s")
        carry, statistics = whole[0], whole[1]
        zero = torch.zeros(9, dtype=torch.float64)
        carry = type(whole[0])(state, zero, zero)
        for chunk, start in enumerate(range(0, path.num_steps, CHUNK_SIZE)):
            steps = range(start, min(start + CHUNK_SIZE, path.num_steps))
            generator = seeded_generator(torch.device("cpu"), 3, "s", chunk)
            runner = LoopedDensity(other) if chunk == 1 else other
            carry = run_chunk(runner, path, carry, statistics, steps, "reverse", generator)
    assert torch.allclose(carry.log_weights, whole[0].log_weights, rtol=1e-10)


@needs_compiler
@pytest.mark.slow  # by default: that it gives the numbers of single steps, which are
def test_the_compiled_loop_is_unbiased():
    """E[w] = Z on a lopsided target in one dimension, every chain a repeat."""

    def function(u):  # log Z = 0.7
        base = dist.Normal(0.0, 1.0).log_prob(u).sum(-1)
        parts = [dist.Normal(-1.0, 0.4).log_prob(u), dist.Normal(1.5, 0.2).log_prob(u)]
        return base, 0.7 + torch.logaddexp(math.log(0.8) + parts[0], math.log(0.2) + parts[1]).sum(
            -1
        )

    density = capture(function, torch.zeros(1, dtype=torch.float64), num_chains=20_000)
    position = torch.randn(20_000, 1, dtype=torch.float64)
    path = Path(Power(1.3)(8), RandomWalk(), TuningTable.constant(0.7, position[0]))
    carry, _ = assert_both_agree(density, position, path)
    weights = (carry.log_weights - 0.7).exp()
    error = weights.std() / math.sqrt(len(weights))
    assert float(error) < 0.02
    assert abs(float(weights.mean()) - 1.0) < 5 * float(error)


def hierarchical():
    y = torch.tensor([1.2, -0.4, 2.5, 0.3, -1.1, 0.9], dtype=torch.float64)
    return prepared(cases._hierarchical, y)


def mixture():
    x = torch.cat([torch.randn(12) - 2, torch.randn(20) + 1]).double()

    @config_enumerate
    def model(x):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("clusters", 2):
            loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            label = pyro.sample("label", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(loc[label], 1.0), obs=x)

    return prepared(model, x, num_chains=16)


def linear_vae():
    decoder = torch.nn.Linear(3, 50).double().requires_grad_(False)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    return prepared(model, torch.randn(40, 50, dtype=torch.float64), num_chains=10)


def plates_in_a_batch():
    def model(x):
        with pyro.plate("data", 4, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", 3, dim=-1):
                s = pyro.sample("s", dist.Gamma(2.0, 1.5))
                pyro.sample("x", dist.Normal(z, s), obs=x)

    return prepared(model, torch.randn(4, 3, dtype=torch.float64), num_chains=10)


def dynamic():
    def model(x):
        top = pyro.sample("top", dist.Gamma(3.0, 2.0))
        z = pyro.sample("z", dist.Uniform(torch.zeros(()), top))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    return prepared(model, torch.tensor(0.8, dtype=torch.float64))


def covariance():
    """A factorization, which chains last leaves to vmap."""

    def model(y):
        length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
        t = torch.linspace(0.0, 1.0, 5)
        kernel = (-(t - t[:, None]).square() / length**2).exp() + 0.1 * torch.eye(5)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(5), kernel), obs=y)

    return prepared(model, torch.tensor([0.3, 0.1, -0.2, 0.5, 1.0], dtype=torch.float64))


MODELS = {
    "hierarchical": hierarchical,
    "enumerated mixture": mixture,
    "linear VAE": linear_vae,
    "plates in a batch": plates_in_a_batch,
    "dynamic support": dynamic,
    "covariance": covariance,
}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_models_agree_in_the_loop(name):
    density, position = MODELS[name]()
    tuning = lopsided_tuning(position[0], step=1.5 if name == "covariance" else 0.3)
    for direction, num_steps in (("forward", 130), ("reverse", 57)):
        assert_both_agree(
            density, position, Path(Power(2.0)(num_steps), HMC(2), tuning), direction
        )


BY_DEFAULT = ("enumerated mixture", "linear VAE", "dynamic support", "covariance")


@needs_compiler
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in BY_DEFAULT else pytest.mark.slow)
        for name in ("schools", *MODELS)
    ],
)
def test_models_agree_as_native_code(name):
    density, position = {"schools": schools, **MODELS}[name]()
    native = natively(density)
    tuning = lopsided_tuning(position[0], step=1.5 if name == "covariance" else 0.3)
    kernel = RandomWalk() if name == "dynamic support" else HMC(2)
    for direction, num_steps in (("forward", 130), ("reverse", 57)):
        path = Path(Power(2.0)(num_steps), kernel, tuning)
        assert_both_agree(density, position, path, direction, native=native)


@needs_compiler
@pytest.mark.parametrize("num_chains", [pytest.param(1, marks=pytest.mark.slow), 40])
def test_native_chunks_serve_other_data_and_lengths(num_chains, monkeypatch):
    """One program, whatever the number of steps and the data; chains that fill no vector, too."""
    monkeypatch.setattr(chunk_program, "_PROGRAMS", type(chunk_program._PROGRAMS)())
    density, position = schools(num_chains)
    tuning = lopsided_tuning(position[0], step=0.5)
    for num_steps in (2, CHUNK_SIZE, CHUNK_SIZE + 1, 2 * CHUNK_SIZE + 37):
        path = Path(Power(2.0)(num_steps), HMC(1), tuning)
        assert_both_agree(density, position, path, native=natively(density))
    other, position = prepared(
        cases.eight_schools,
        torch.tensor(cases.SCHOOLS_Y) + 3.0,
        torch.tensor(cases.SCHOOLS_SIGMA),
        num_chains=num_chains,
    )
    assert_both_agree(other, position, path, "reverse", native=natively(other))
    assert len(chunk_program._PROGRAMS) == 1


@needs_compiler
def test_native_chunks_satisfy_both_identities():
    """E[e^L] = Z forward and E[e^-U] = 1 / Z in reverse, on a lopsided target, in float32."""

    def function(u):  # log Z = 0.7
        base = dist.Normal(0.0, 1.0).log_prob(u).sum(-1)
        parts = [dist.Normal(-1.0, 0.4).log_prob(u), dist.Normal(1.5, 0.2).log_prob(u)]
        both = torch.logaddexp(math.log(0.8) + parts[0], math.log(0.2) + parts[1])
        return base, 0.7 + both.sum(-1)

    example, count = torch.zeros(1, dtype=torch.float32), 20_000
    density = capture(function, example, num_chains=count, native=True)
    path = Path(Power(1.3)(12), HMC(2), TuningTable.constant(0.4, example))
    generator = torch.Generator().manual_seed(5)
    draws = torch.randn(count, 1, generator=generator, dtype=torch.float32)
    first = torch.rand(count, 1, generator=generator) < 0.8
    noise = torch.randn(count, 1, generator=generator, dtype=torch.float32)
    exact = torch.where(first, -1.0 + 0.4 * noise, 1.5 + 0.2 * noise)
    for direction, start, sign in (("forward", draws, 1.0), ("reverse", exact, -1.0)):
        looped = LoopedDensity(density)
        carry, _ = run_chains(
            looped, path, looped(start), direction=direction, seed=1, stream=direction
        )
        assert looped.loop_mode == "loop"
        weights = (sign * (carry.log_weights - 0.7)).exp()
        error = float(weights.std()) / math.sqrt(count)
        assert error < 0.02
        assert abs(float(weights.mean()) - 1.0) < 5 * error


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("num_chains", [1, 3])
def test_few_chains_stay_first(num_chains):
    density, position = schools(num_chains)
    tuning = lopsided_tuning(position[0], step=1.0)
    assert_both_agree(density, position, Path(Power(2.0)(120), HMC(2), tuning))


@needs_compiler
@pytest.mark.slow
def test_noise_that_does_not_fit_comes_in_smaller_pieces(monkeypatch):
    density, position = schools()
    monkeypatch.setattr("pyro_anneal.kernels.noise._LIMIT", 7 * 9 * 12 + 5)  # 7 steps
    tuning = lopsided_tuning(position[0], step=0.5)
    assert_both_agree(density, position, Path(Power(2.0)(130), HMC(1), tuning))


@needs_compiler
@pytest.mark.slow
def test_float32_stays_float32():
    def function(u):
        return -0.5 * u.square().sum(-1), -2.0 * (u - 0.3).square().sum(-1)

    density = capture(function, torch.zeros(3, dtype=torch.float32), num_chains=12)
    looped = LoopedDensity(density)
    start = density(torch.randn(12, 3, dtype=torch.float32))
    path = Path(Power(1.3)(30), HMC(1), TuningTable.constant(0.3, start.position[0]))
    carry, _ = run_chains(looped, path, start, direction="forward", seed=0, stream="s")
    assert looped.loop_mode == "loop"
    assert carry.state.position.dtype == torch.float32
    assert carry.log_weights.dtype == torch.float64
    other, _ = run_chains(density, path, start, direction="forward", seed=0, stream="s")
    assert torch.allclose(carry.log_weights, other.log_weights, atol=1e-4)


@needs_compiler
@pytest.mark.slow
def test_products_by_onednn_agree_in_the_loop(monkeypatch):
    """A decoder in float32, on any processor; parameters stay inputs."""
    monkeypatch.setattr(matrix_products, "_mkl_is_slow", torch.backends.mkldnn.is_available)
    monkeypatch.setattr(chunk_program, "_PROGRAMS", type(chunk_program._PROGRAMS)())
    torch.set_default_dtype(torch.float32)
    decoder = torch.nn.Sequential(
        torch.nn.Linear(20, 80), torch.nn.Tanh(), torch.nn.Linear(80, 50)
    )
    decoder.requires_grad_(False)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(20), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    density, position = prepared(model, torch.randn(300, 50), num_chains=3, dtype=torch.float32)
    path = Path(Power(1.3)(20), HMC(2), lopsided_tuning(position[0]))
    for scale in (1.0, 1.1):
        decoder[0].weight.mul_(scale)
        density.refresh()
        start = density(position)
        looped = LoopedDensity(density)
        options = {"direction": "forward", "seed": 0, "stream": "s"}
        got, _ = run_chains(looped, path, start, **options)
        assert looped.loop_mode == "loop", looped.loop_reason
        expected, _ = run_chains(density, path, start, **options)
        difference = (got.log_weights - expected.log_weights).abs()
        assert float(difference.median()) < 1e-3  # some proposals are decided by rounding
    assert len(chunk_program._PROGRAMS) == 1


def test_programs_tell_what_repeats():
    """One scale for all rows, and one per row: the same operations, but not the same storage."""

    def keyed(scale):
        def model(x):
            with pyro.plate("data", 40):
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, scale).to_event(1), obs=x)

        density, position = prepared(model, torch.zeros(40, 3, dtype=torch.float64))
        graphs = DensityGraphs(density.chain_graph_and_inputs(), density.graph_and_inputs(9))
        noise = HMC(1).noise(density(position), torch.Generator().manual_seed(0))
        key = chunk_program._key(HMC(1), graphs, noise, 4)
        values = [x for x in graphs.all_chains[1] if x.shape == (40, 3)]
        return graphs.all_chains[0].code, key, sum(bool(repeated_dims(x)) for x in values)

    one, each = (
        keyed(torch.tensor(0.5).double()),
        keyed(torch.linspace(0.1, 2.0, 120).reshape(40, 3)),
    )
    assert one[0] == each[0]
    assert one[2] > each[2]
    assert one[1] != each[1]


def test_shared_tensors_are_stored_once():
    matrix = torch.randn(300, 70)
    tensors = [
        torch.randn(4),
        matrix,
        matrix.mT,
        torch.randn(70).expand(300, 70),
        torch.randn(()).expand(300, 70),
        torch.arange(3),
    ]
    shared = tuple(
        Shared.of(tensor, transposed=tensor.shape == (300, 70), chains_last=False)
        for tensor in tensors
    )
    layout = StorageLayout(False, 1, (), (), shared)
    stored = layout.store_shared(tensors)
    assert [buffer.numel() for buffer in stored] == [4 + 70 + 1, 3, 300 * 70, 300 * 70]
    assert stored[2].shape == (70, 300)  # transposed
    for loaded, tensor in zip(layout.load_shared(stored), tensors, strict=True):
        assert torch.equal(loaded, tensor)


@pytest.mark.parametrize(
    ("tensor", "chains_last", "numbers"),
    [
        (torch.randn(10).expand(300, 10), True, 10),
        (torch.randn(10).expand(300, 10), False, 3000),  # else each loop would have 10 steps
        (torch.randn(2, 1, 10).expand(2, 300, 10), False, 6000),
        (torch.randn(64).expand(300, 64), False, 64),
        (torch.randn(300, 1).expand(300, 10), False, 300),
        (torch.randn(10).expand(30_000, 10), False, 10),  # too many
    ],
)
def test_short_rows_are_stored_as_often_as_they_repeat(tensor, chains_last, numbers):
    shared = Shared.of(tensor, transposed=False, chains_last=chains_last)
    stored = shared.store(tensor)
    assert stored.shape == shared.stored_shape
    assert stored.numel() == numbers
    assert torch.equal(shared.load(stored.contiguous()), tensor)


# --- what cannot be a loop --------------------------------------------------------------------


@needs_compiler
@pytest.mark.slow
def test_without_loops_one_step_is_compiled(monkeypatch):
    def no_loop(*args):
        raise NotImplementedError("an operation not in loops")

    monkeypatch.setattr(chunk_program, "as_loop", no_loop)
    monkeypatch.setattr(chunk_program, "_PROGRAMS", type(chunk_program._PROGRAMS)())
    density, position = schools()
    tuning = lopsided_tuning(position[0], step=0.5)
    assert_both_agree(density, position, Path(Power(2.0)(130), HMC(1), tuning), mode="step")


@dataclass(frozen=True)
class Branching(HMC):
    """Looks at beta, which a recording cannot do."""

    def step(self, state, density, beta, tuning, noise):
        if float(beta) > 0.5:
            tuning = tuning._replace(step_size=0.5 * tuning.step_size)
        return super().step(state, density, beta, tuning, noise)


@dataclass(frozen=True)
class Counting(HMC):
    """Changes its step size from call to call, which a recording would freeze."""

    calls: list = field(default_factory=lambda: [1], compare=False)

    def step(self, state, density, beta, tuning, noise):
        self.calls[0] += 1
        factor = 1.0 + 0.1 * self.calls[0]
        tuning = tuning._replace(step_size=factor * tuning.step_size)
        return super().step(state, density, beta, tuning, noise)


def test_a_kernel_that_looks_at_beta_runs_step_by_step():
    density, position = schools()
    state = density(position)
    path = Path(Power(2.0)(20), Branching(1), TuningTable.constant(0.5, position[0]))
    options = {"direction": "forward", "seed": 3, "stream": "s"}
    expected, _ = run_chains(density, path, state, **options)
    looped = LoopedDensity(density)
    density.compile = lambda: None  # the fallback compiles single evaluations
    got, _ = run_chains(looped, path, state, **options)
    assert looped.loop_mode is None
    assert looped.loop_reason
    torch.testing.assert_close(got.log_weights, expected.log_weights, rtol=1e-10, atol=1e-10)


def test_a_kernel_that_changes_between_calls_is_found_out(monkeypatch):
    def interpreted(body, *args):  # the check does not need a compiler
        run = body_runners.step_by_step
        monkeypatch.setattr(
            body_runners, "compile_with_inductor", lambda graph, inputs, **_: graph
        )
        example = chunk_program._arguments(
            body, args[0], *[torch.zeros_like(args[0].log_base) for _ in range(2)],
            type(args[2])(*(column[:1] for column in args[2])), args[1],
            body.layout.store_shared(args[3]),
        )  # fmt: skip
        return chunk_program._Compiled(body, run(body, example), "step", None)

    monkeypatch.setattr(chunk_program, "_compile", interpreted)
    density, position = schools()
    state = density(position)
    tuning = TuningTable.constant(0.2, position[0])
    for kernel, found in ((Counting(1), True), (HMC(1), False)):
        monkeypatch.setattr(chunk_program, "_PROGRAMS", type(chunk_program._PROGRAMS)())
        looped = LoopedDensity(density)
        density.compile = lambda: None
        path = Path(Power(2.0)(20), kernel, tuning)
        run_chains(looped, path, state, direction="forward", seed=3, stream="s")
        assert ("differs" in (looped.loop_reason or "")) is found


@pytest.mark.filterwarnings("ignore::pyro_anneal.diagnostics.AnnealingWarning")
def test_a_failed_compilation_changes_no_number(monkeypatch):
    def broken(*args):
        raise RuntimeError("the compiler\nfell over")

    monkeypatch.setattr(chunk_program, "_compile", broken)
    monkeypatch.setattr(chunk_program, "_PROGRAMS", type(chunk_program._PROGRAMS)())
    monkeypatch.setattr("pyro_anneal.native.library.compiler_problem", lambda: "no g++")
    monkeypatch.setattr(kept, "_GRAPHS", OrderedDict())  # which keep their native code
    x = torch.tensor(2.0)
    options = {"num_steps": 30, "num_chains": 8, "seed": 2, "progress_bar": False}
    options |= {"step_size": 2.0, "schedule": Power(1.5)}
    monkeypatch.setattr(
        "pyro_anneal.graphs.captured_density.compile_graph", lambda graph, inputs: graph
    )
    expected = AnnealedImportance(cases.conjugate, compile=False, **options).run(x)
    run = AnnealedImportance(cases.conjugate, compile=True, **options).run(x)
    assert torch.equal(run.log_weights, expected.log_weights)
    assert run.num_evaluations == expected.num_evaluations
    assert run.density_mode == "compiled"  # each evaluation by itself
    assert any("loop could not be compiled (RuntimeError: the compiler)" in n for n in run.notes)


def test_without_a_compiler_nothing_is_compiled(monkeypatch):
    for module in ("compiled.choice", "graphs.captured_density"):
        monkeypatch.setattr(f"pyro_anneal.{module}.compiler_problem", lambda device: "no g++")
    monkeypatch.setattr("pyro_anneal.native.library.compiler_problem", lambda: "no g++")
    monkeypatch.setattr(kept, "_GRAPHS", OrderedDict())  # which keep their native code
    options = {"num_steps": 30, "num_chains": 8, "seed": 2, "progress_bar": False}
    run = AnnealedImportance(cases.conjugate, compile=True, **options).run(torch.tensor(2.0))
    assert run.density_mode == "graph"
    assert any("no g++" in note for note in run.notes)


def test_reasons_are_known_before_the_run():
    density, _ = schools()
    assert "not a recorded graph" in loop_problem(lambda position: None, HMC())
    unhashable = Branching()
    object.__setattr__(unhashable, "jitter", [])
    assert "not hashable" in loop_problem(density, unhashable)


# --- decisions --------------------------------------------------------------------------------


def test_compilation_is_chosen_from_counts():
    density, _ = schools()
    chosen = [repays_compilation(density, HMC(2), moves) for moves in (10, 1_000, 10**5, 10**6)]
    assert chosen == sorted(chosen)
    assert not chosen[0]
    assert chosen[-1]
    # with more leapfrogs there is more to save, and more to compile
    fewest = {
        leapfrogs: min(
            moves for moves in range(0, 10**5, 100)
            if repays_compilation(density, HMC(leapfrogs), moves)
        )
        for leapfrogs in (1, 8)
    }  # fmt: skip
    assert fewest[8] < fewest[1]


def test_options_of_compile():
    x = torch.tensor(2.0)
    options = {"num_steps": 3, "num_chains": 4, "progress_bar": False, "seed": 0}
    for choice, mode in (("auto", "compiled"), ("density", "compiled"), (False, "graph")):
        run = AnnealedImportance(cases.conjugate, compile=choice, **options).run(x)
        assert run.density_mode == mode
    with pytest.raises(ValueError, match="compile must be"):
        AnnealedImportance(cases.conjugate, compile="loop")


# --- the graph --------------------------------------------------------------------------------


class Syncs(TorchDispatchMode):
    """Counts the values that leave the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernel", [HMC(2), RandomWalk()])
@pytest.mark.parametrize("num_chains", [3, 9])
def test_a_step_waits_for_nothing(kernel, num_chains):
    """The body reads its row of the tables by a tensor, so a CUDA graph of it can be replayed."""
    density, position = schools(num_chains)
    state, table = density(position), _table(position)
    generator = torch.Generator().manual_seed(0)
    noise = kernel.noise(state, generator)
    graphs = DensityGraphs(density.chain_graph_and_inputs(), density.graph_and_inputs(num_chains))
    body = build_body(graphs, kernel, state, noise, table, 5)
    assert body.layout.last is (num_chains == 9)
    shared = (graphs.one_chain if body.layout.last else graphs.all_chains)[1]
    weights = torch.zeros(2, num_chains, dtype=torch.float64)
    arguments = chunk_program._arguments(
        body,
        state,
        weights[0],
        weights[1],
        table,
        [part[None] for part in noise],
        body.layout.store_shared(shared),
    )
    with Syncs() as syncs:
        outputs = body.graph(*arguments)
    assert syncs.count == 0
    assert int(outputs[0]) == 1


def _table(position):
    batch = position.shape[1:-1]
    one = torch.ones(1, dtype=torch.float64)
    return StepTable(
        0.3 * one,
        0.2 * torch.ones(1, *batch, dtype=position.dtype),
        torch.ones(1, *position.shape[1:], dtype=position.dtype),
        0.1 * one,
        0.1 * one,
    )


def test_tables_interpolate_as_single_betas_do():
    tuning = lopsided_tuning(torch.zeros(2, 3))
    for table in (tuning, TuningTable.constant(0.3, torch.zeros(2, 3))):
        betas = torch.tensor([0.0, 1e-9, 0.1, 0.2, 0.45, 0.999, 1.0], dtype=torch.float64)
        steps, scales = table.at_all(betas)
        for row, beta in enumerate(betas.tolist()):
            one = table.at(beta)
            assert torch.allclose(steps[row], one.step_size, rtol=1e-6)
            assert torch.allclose(scales[row], one.scale, rtol=1e-6)


MATRIX = torch.randn(4, 3, dtype=torch.float64)
PER_CHAIN = {
    "reductions": lambda u: (u.sum() + u.sum(-1).amax() + u.mean(0).logsumexp(-1)) * u,
    "views": lambda u: u.t().reshape(2, 6).unsqueeze(1).expand(2, 4, 6).permute(2, 0, 1).squeeze(),
    "indices": lambda u: u[torch.tensor([2, 0, 1, 1]), torch.tensor([0, 3, 3, 1])] + u[-1, 1:2],
    "slices": lambda u: torch.cat([u[:, 1:], u[:, :2], torch.zeros(3, 1)], -1).flip(0),
    "stack": lambda u: torch.stack([u[0], torch.arange(4.0).double(), u[2]], 1).cumsum(0),
    "softmax": lambda u: u.softmax(0) + u.log_softmax(-1),
    "matrix from the left": lambda u: MATRIX @ u,
    "matrix times vector": lambda u: MATRIX.t() @ u[1] + torch.dot(u[0], u[2]),
    "small matrix from the right": lambda u: u @ MATRIX,
    "own matrices": lambda u: u.t() @ u + torch.bmm(u.reshape(3, 2, 2), u.reshape(3, 2, 2)).sum(0).sum(),
    "affine": lambda u: torch.nn.functional.linear(u, MATRIX.t(), torch.arange(3.0).double()),
    "broadcasting": lambda u: torch.where(u > 0, u[:, :1], torch.arange(4.0).double()) * u.exp(),
    "gather": lambda u: u.gather(1, u.argsort(1)),
    "factor": lambda u: torch.linalg.cholesky_ex(u @ u.t() + torch.eye(3)).L,
    "shared": lambda u: MATRIX * 2.0,
}  # fmt: skip


@pytest.mark.parametrize("name", PER_CHAIN)
def test_chains_last_is_vmap(name):
    function = PER_CHAIN[name]
    u = torch.randn(7, 3, 4, dtype=torch.float64)

    def with_gradient(u):
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            value = function(leaf)
            weights = torch.arange(1.0, value.numel() + 1).reshape(value.shape)
            total = (weights * value).sum()
            (grad,) = torch.autograd.grad(total, leaf) if total.requires_grad else (u * 0,)
        return value.detach(), grad

    graph = make_fx(with_gradient)(u[0])
    from pyro_anneal.graphs.rewriting import lift_constants

    constants = lift_constants(graph)
    ShapeProp(graph).propagate(u[0], *constants)
    shapes_to_literals(graph, u.device)
    simplify(graph)
    per_chain = [u.movedim(0, -1).contiguous()]
    got = over_chains_last(graph, per_chain, constants)
    for k, chain in enumerate(u):
        for value, expected in zip(got, with_gradient(chain), strict=True):
            assert torch.allclose(value[..., k], expected, rtol=1e-12, atol=1e-12)


def test_large_products_from_the_right_keep_chains_first():
    weight = torch.randn(100, 80, dtype=torch.float64)
    graph = make_fx(lambda u, w: (u @ w,))(torch.zeros(60, 100, dtype=torch.float64), weight)
    with pytest.raises(Transposing):
        over_chains_last(graph, [torch.zeros(60, 100, 9, dtype=torch.float64)], [weight])


@pytest.mark.gpu
def test_a_step_is_captured_as_a_cuda_graph():
    def function(u):
        return -0.5 * u.square().sum(-1), -2.0 * (u - 0.3).square().sum(-1)

    example = torch.zeros(3, dtype=torch.float64, device="cuda")
    density = capture(function, example, num_chains=32)
    position = torch.randn(32, 3, dtype=torch.float64, device="cuda")
    path = Path(Power(1.3)(250), HMC(2), TuningTable.constant(0.4, example))
    assert_both_agree(density, position, path, mode="cuda-graph")
    assert_both_agree(density, position, path, "reverse", mode="cuda-graph")
