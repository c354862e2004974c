"""The one rule of compilation at the service of bounds on mutual information and of AIWAE."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_anneal import mi
from pyro_anneal.compiled import choice, looped
from pyro_anneal.compiled.native_loop import NativeLoop
from pyro_anneal.graphs import kept
from pyro_anneal.graphs.inductor import compiler_problem
from pyro_anneal.kernels import HMC
from pyro_anneal.losses import AIWAE
from pyro_anneal.schedules import Linear

NEEDS_COMPILER = pytest.mark.skipif(
    compiler_problem(torch.device("cpu")) is not None, reason="no C++ compiler"
)
DATA = torch.tensor([0.2, 1.9, -0.4], dtype=torch.float64)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.5, 1.0))
        pyro.sample("x", dist.Normal(z, 0.8), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.3 * x, 1.1))


def losses_of(compile, calls):
    pyro.set_rng_seed(0)
    loss = AIWAE(50, 12, 1, step_size=0.5, vectorize_particles=True, compile=compile)
    return [loss.loss(model, guide, DATA + 0.1 * call) for call in range(calls)]


@NEEDS_COMPILER
def test_aiwae_runs_the_compiled_loop_on_new_data():
    before = set(looped._LOOPS)
    steps, loop = losses_of(False, 3), losses_of(True, 3)
    (made,) = [looped._LOOPS[key] for key in looped._LOOPS if key not in before]
    assert isinstance(made, NativeLoop)  # one program for the chunk, the last move, and all data
    assert loop == pytest.approx(steps, rel=1e-9)
    truth = [dist.Normal(0.5, math.sqrt(1.64)).log_prob(DATA + 0.1 * n).sum() for n in range(3)]
    assert loop == pytest.approx([-float(value) for value in truth], abs=0.5)


@pytest.fixture
def left_to_torch(monkeypatch):
    """Leaves graphs without native code, and counts evaluations that torch's compiler is offered."""
    asked = []
    monkeypatch.setattr("pyro_anneal.native.library.compiler_problem", lambda: "not here")
    monkeypatch.setattr(kept, "_GRAPHS", type(kept._GRAPHS)())
    monkeypatch.setattr(
        choice,
        "compile_evaluations",
        lambda density, compile, count: asked.append((density, compile, count)),
    )
    return asked


def test_aiwae_counts_the_steps_so_far(left_to_torch):
    losses_of("auto", 4)
    densities, _, counts = zip(*left_to_torch, strict=True)
    assert counts == tuple(50 * 11 * calls for calls in range(1, 5))  # 50 chains, 11 moves
    # the recording that is kept, not what is made of it for one call
    assert len({id(density) for density in densities}) == 1


def test_a_loop_that_does_not_compile_is_not_tried_again(monkeypatch):
    tried = []

    def fail(*args):
        tried.append(1)
        raise RuntimeError("no such loop")

    monkeypatch.setattr(looped, "NativeLoop", fail)
    monkeypatch.setattr(looped, "_LOOPS", type(looped._LOOPS)())
    assert losses_of(True, 4) == pytest.approx(losses_of("density", 4), rel=1e-12)
    assert len(tried) == 1


JOINT = mi.DistributionJoint(
    dist.Normal(torch.zeros((), dtype=torch.float64), 1.0), lambda z: dist.Normal(z, 0.5)
)


def estimates(compile, **options):
    pyro.set_rng_seed(1)
    x, z = JOINT.sample(40)
    bound = mi.AIS(
        JOINT,
        num_chains=4,
        num_steps=30,
        kernel=HMC(1),
        schedule=Linear(),
        step_size=0.4,
        resampling=False,
        compile=compile,
        **options,
    )
    return bound.estimate(x, z, batch_size=20)


@NEEDS_COMPILER
def test_ais_for_pairs_runs_the_compiled_loop():
    before = set(looped._LOOPS)
    steps, loop = estimates(False), estimates(True)
    (made,) = [looped._LOOPS[key] for key in looped._LOOPS if key not in before]
    assert isinstance(made, NativeLoop)  # forward and in reverse, for both batches
    torch.testing.assert_close(loop.pair_lower, steps.pair_lower, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loop.pair_upper, steps.pair_upper, rtol=1e-9, atol=1e-9)
    low, high = loop.normal_interval(0.999)
    assert low < 0.5 * math.log(5.0) < high


def test_ais_counts_all_runs_of_an_estimate(monkeypatch, left_to_torch):
    monkeypatch.setattr("pyro_anneal.mi.annealer._CAPTURE_ABOVE", 0)
    estimates("auto")
    estimates("auto", upper="CR")
    counts = [count for _, _, count in left_to_torch]
    assert counts == [4 * 2 * 2 * 29] * 2 + [4 * 2 * 3 * 29] * 2  # 4 chains, 2 batches
