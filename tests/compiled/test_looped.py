"""Chunks of steps as native code: the same numbers as single steps, or the reason why not."""

import itertools
import math
from collections import OrderedDict
from dataclasses import dataclass, field

import cases
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate

from pyro_anneal import AnnealedImportance
from pyro_anneal.chains.loop import CHUNK_SIZE, run_chains
from pyro_anneal.chains.loop import _run_chunk as run_chunk
from pyro_anneal.chains.path import Path, TuningTable
from pyro_anneal.compiled import choice, looped
from pyro_anneal.compiled.choice import compile_evaluations, is_dear, loop_problem, with_loop
from pyro_anneal.compiled.looped import LoopedDensity
from pyro_anneal.graphs import kept
from pyro_anneal.graphs.captured import capture
from pyro_anneal.graphs.inductor import compiler_problem
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


def assert_both_agree(density, position, path, direction="forward"):
    """Runs the graph step by step and native code in chunks, and compares everything."""
    native = natively(density)
    looped = LoopedDensity(native)
    state = density(position)
    kept = [part.clone() for part in state]
    options = {"direction": direction, "seed": 3, "stream": "s"}
    with torch.no_grad():
        expected = run_chains(density, path, state, **options)
        before = native.num_evaluations
        got = run_chains(looped, path, state, **options)
    assert looped.has_run, looped.loop_reason
    assert native.num_evaluations - before == path.kernel.num_gradients * (path.num_steps - 1)
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
    tuning = lopsided_tuning(position[0], step=1.5 if name == "covariance" else 0.3)
    kernel = RandomWalk() if name == "dynamic support" else HMC(2)
    for direction, num_steps in (("forward", 130), ("reverse", 57)):
        path = Path(Power(2.0)(num_steps), kernel, tuning)
        assert_both_agree(density, position, path, direction)


@needs_compiler
@pytest.mark.parametrize("num_chains", [pytest.param(1, marks=pytest.mark.slow), 40])
def test_native_chunks_serve_other_data_and_lengths(num_chains, monkeypatch):
    """One program, whatever the number of steps and the data; chains that fill no vector, too."""
    monkeypatch.setattr(looped, "_LOOPS", OrderedDict())
    density, position = schools(num_chains)
    tuning = lopsided_tuning(position[0], step=0.5)
    for num_steps in (2, CHUNK_SIZE, CHUNK_SIZE + 1, 2 * CHUNK_SIZE + 37):
        path = Path(Power(2.0)(num_steps), HMC(1), tuning)
        assert_both_agree(density, position, path)
    other, position = prepared(
        cases.eight_schools,
        torch.tensor(cases.SCHOOLS_Y) + 3.0,
        torch.tensor(cases.SCHOOLS_SIGMA),
        num_chains=num_chains,
    )
    assert_both_agree(other, position, path, "reverse")
    assert len(looped._LOOPS) == 1


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
        runner = LoopedDensity(density)
        carry, _ = run_chains(
            runner, path, runner(start), direction=direction, seed=1, stream=direction
        )
        assert runner.has_run
        weights = (sign * (carry.log_weights - 0.7)).exp()
        error = float(weights.std()) / math.sqrt(count)
        assert error < 0.02
        assert abs(float(weights.mean()) - 1.0) < 5 * error


@needs_compiler
@pytest.mark.slow
def test_noise_that_does_not_fit_comes_in_smaller_pieces(monkeypatch):
    density, position = schools()
    monkeypatch.setattr("pyro_anneal.kernels.noise._LIMIT", 7 * 9 * 12 + 5)  # 7 steps
    tuning = lopsided_tuning(position[0], step=0.5)
    assert_both_agree(density, position, Path(Power(2.0)(130), HMC(1), tuning))


@needs_compiler
def test_a_chunk_is_repeated_from_its_start():
    """As after an interruption: one chunk natively, the others step by step."""
    density, position = schools()
    path = Path(Power(2.0)(2 * CHUNK_SIZE + 37), HMC(1), lopsided_tuning(position[0], step=0.5))
    state, zero = density(position), torch.zeros(9, dtype=torch.float64)
    with torch.no_grad():
        whole, statistics = run_chains(
            density, path, state, direction="reverse", seed=3, stream="s"
        )
        carry = type(whole)(state, zero, zero)
        edges = [0, CHUNK_SIZE, 2 * CHUNK_SIZE, path.num_steps]
        for chunk, (start, stop) in enumerate(itertools.pairwise(edges)):
            generator = seeded_generator(torch.device("cpu"), 3, "s", chunk)
            runner = LoopedDensity(natively(density)) if chunk == 1 else density
            steps = range(start, stop)
            carry = run_chunk(runner, path, carry, statistics, steps, "reverse", generator)
    assert torch.allclose(carry.log_weights, whole.log_weights, rtol=1e-10)


# --- what cannot be a loop --------------------------------------------------------------------


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


@needs_compiler
@pytest.mark.parametrize(
    ("kernel", "reason"), [(Branching(1), "Error"), (Counting(1), "differs"), (HMC(1), None)]
)
def test_kernels_that_are_no_pure_functions_run_step_by_step(kernel, reason, monkeypatch):
    monkeypatch.setattr(looped, "_LOOPS", OrderedDict())
    density, position = schools()
    state = density(position)
    path = Path(Power(2.0)(20), kernel, TuningTable.constant(0.2, position[0]))
    options = {"direction": "forward", "seed": 3, "stream": "s"}
    runner = LoopedDensity(natively(density))
    got, _ = run_chains(runner, path, state, **options)
    if reason is None:
        assert runner.has_run
        assert runner.loop_reason is None
        return
    assert not runner.has_run
    assert reason in runner.loop_reason
    if not isinstance(kernel, Counting):
        expected, _ = run_chains(density, path, state, **options)
        torch.testing.assert_close(got.log_weights, expected.log_weights, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore::pyro_anneal.diagnostics.AnnealingWarning")
@needs_compiler
def test_a_loop_that_fails_changes_no_number(monkeypatch):
    def broken(*args):
        raise RuntimeError("the compiler\nfell over")

    monkeypatch.setattr(looped, "NativeLoop", broken)
    monkeypatch.setattr(looped, "_LOOPS", OrderedDict())
    x = torch.tensor(2.0)
    options = {"num_steps": 30, "num_chains": 8, "seed": 2, "progress_bar": False}
    options |= {"step_size": 2.0, "schedule": Power(1.5)}
    expected = AnnealedImportance(cases.conjugate, compile="density", **options).run(x)
    run = AnnealedImportance(cases.conjugate, compile=True, **options).run(x)
    assert torch.equal(run.log_weights, expected.log_weights)
    assert run.num_evaluations == expected.num_evaluations
    assert run.density_mode == "compiled"  # each evaluation by itself
    assert any("loop could not be compiled (RuntimeError: the compiler)" in n for n in run.notes)


def test_without_a_compiler_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(
        "pyro_anneal.graphs.captured_density.compiler_problem", lambda device: "no g++"
    )
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
    assert "not asked for" in loop_problem(density, HMC())
    ensemble = type("Ensemble", (HMC,), {"moves_chains_alone": False})
    assert "Ensemble does not say" in loop_problem(density, ensemble())


# --- decisions --------------------------------------------------------------------------------


def decoder(width, rows=8):
    """An MLP of three layers; a square one of 1024 is too large for native code."""
    weights = [torch.randn(width, width) / width**0.5 for _ in range(2)]

    def function(u):
        hidden = (u @ weights[0]).tanh()
        return -0.5 * u.square().sum(-1), -(hidden @ weights[1]).square().sum(-1)

    return function, torch.zeros(rows, width)


@needs_compiler
def test_a_loop_is_chosen_from_the_number_of_steps():
    density, position = schools()
    native, tuning = natively(density), TuningTable.constant(0.2, position[0])
    short, long = (Path(Power(2.0)(steps), HMC(1), tuning) for steps in (400, 401))
    for path, compile, runs, is_looped in (
        (short, "auto", 1, False),
        (short, "auto", 2, True),
        (long, "auto", 1, True),
        (long, False, 9, False),
        (long, "density", 9, False),
        (short, True, 1, True),
    ):
        found = with_loop(native, path, compile, num_runs=runs)
        assert isinstance(found, LoopedDensity) is is_looped


def test_torch_compiles_what_repays_it_alone(monkeypatch):
    """By operations and evaluations; a graph with native code never."""
    compiled = []
    monkeypatch.setattr(
        choice.CapturedDensity, "compile", lambda density: compiled.append(density)
    )
    function, example = decoder(1024)
    large = capture(function, example, num_chains=4, native=True)
    assert large.mode == "graph"
    assert is_dear(large)
    assert "too much work" in loop_problem(large, HMC())
    # forward and back through two layers of 1024 x 1024, 8 rows
    assert choice.count_operations(large.chain_graph_and_inputs()[0]) == pytest.approx(
        4 * 8 * 1024**2, rel=0.01
    )
    compile_evaluations(large, "auto", 1_000)
    compile_evaluations(large, False, 10**9)
    compile_evaluations(large, "density", 10**9)  # compiled when it was captured
    assert not compiled
    compile_evaluations(large, "auto", 100_000)
    compile_evaluations(large, True, 1)
    assert compiled == [large, large]
    small = capture(*decoder(4), num_chains=4, native=True)
    assert not is_dear(small)
    assert not is_dear(lambda position: None)


def test_options_of_compile():
    x = torch.tensor(2.0)
    options = {"num_steps": 3, "num_chains": 4, "progress_bar": False, "seed": 0}
    for how, mode in (("auto", "compiled"), ("density", "compiled"), (False, "graph")):
        run = AnnealedImportance(cases.conjugate, compile=how, **options).run(x)
        assert run.density_mode == mode
    with pytest.raises(ValueError, match="compile must be"):
        AnnealedImportance(cases.conjugate, compile="loop")


def test_tables_interpolate_as_single_betas_do():
    tuning = lopsided_tuning(torch.zeros(2, 3))
    for table in (tuning, TuningTable.constant(0.3, torch.zeros(2, 3))):
        betas = torch.tensor([0.0, 1e-9, 0.1, 0.2, 0.45, 0.999, 1.0], dtype=torch.float64)
        steps, scales = table.at_all(betas)
        for row, beta in enumerate(betas.tolist()):
            one = table.at(beta)
            assert torch.allclose(steps[row], one.step_size, rtol=1e-6)
            assert torch.allclose(scales[row], one.scale, rtol=1e-6)
