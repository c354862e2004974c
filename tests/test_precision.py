"""A long run in both precisions, with densities of thousands of nats."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from paths import lopsided
from scipy import stats

from pyro_anneal import AnnealedImportance, Sigmoid
from pyro_anneal.chains.loop import run_chains
from pyro_anneal.chains.path import Path, TuningTable
from pyro_anneal.kernels import HMC
from pyro_anneal.schedules import Linear


def anneal(dtype, num_steps, num_chains, direction):
    density = lopsided(dtype=dtype, log_normalizer=-8123.25)  # exact in both precisions
    table = TuningTable.constant(0.7, torch.zeros(2, dtype=dtype))
    draw = density.draw_base if direction == "forward" else density.draw_target
    state = density(draw(num_chains))
    assert state.log_target.dtype == dtype
    path = Path(Linear()(num_steps), HMC(1), table)
    carry, _ = run_chains(density, path, state, direction=direction, seed=0, stream=direction)
    return carry.log_weights + 8123.25


def check(log_weights, direction):
    """Checks single-sample and averaged weights against the truth, 0."""
    num_chains = len(log_weights)
    std_error = float(log_weights.std()) / math.sqrt(num_chains)
    assert std_error < 0.005
    # the bias of one chain's log-weight is half its variance: far below 0.01 nat here
    assert abs(float(log_weights.mean())) <= 0.01 + 5.0 * std_error
    sign = 1.0 if direction == "forward" else -1.0
    log_mean = sign * float((sign * log_weights).logsumexp(0) - math.log(num_chains))
    assert abs(log_mean) <= 0.01 + 5.0 * std_error


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_twenty_thousand_steps_end_within_a_hundredth_of_a_nat(dtype, direction):
    check(anneal(dtype, 20_000, 128, direction), direction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_thousand_steps_end_within_a_hundredth_of_a_nat(dtype):
    check(anneal(dtype, 2_000, 256, "forward"), "forward")


# --- an image-sized problem: 784 pixels, a likelihood of 1e4 nats, the answer in closed form ---

PIXELS, LATENTS = 784, 6


def image_problem(dtype):
    """Builds ``z ~ N(0, 1), x = W z + e`` with an evidence of about -1.2e4 nats."""
    rng = np.random.RandomState(0)
    w = rng.randn(PIXELS, LATENTS) / math.sqrt(PIXELS) * np.array([0.5, 1.0, 1.5, 2.0, 2.5, 3.0])
    noise = 1e6 * (0.8 + 0.4 * rng.rand(PIXELS))  # pixels in units of 1e-6: 14.7 nats each
    w = w * 1e6
    x = w @ rng.randn(LATENTS) + noise * rng.randn(PIXELS)
    # the numbers that the model sees, rounded to its precision
    w, noise, x = (torch.as_tensor(v).to(dtype) for v in (w, noise, x))
    cov = (w.double() @ w.double().T + noise.double().square().diag()).numpy()
    truth = stats.multivariate_normal(np.zeros(PIXELS), cov).logpdf(x.double().numpy())

    def model(x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(LATENTS), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(w @ z, noise).to_event(1), obs=x)

    return model, x, float(truth)


def check_run(run, truth, *, largest_error):
    std_error = float(run.std_error)
    assert run.log_weights.dtype == torch.float64
    assert 0.0 < std_error < largest_error
    assert abs(float(run.lower) - truth) <= 0.01 + 5.0 * std_error, float(run.lower) - truth
    # single chains are below by half their variance, and by no more
    below = 0.5 * float(run.log_weights.var())
    spread = float(run.log_weights.std()) / math.sqrt(run.num_chains)
    single = float(run.log_weights.mean()) - truth + below
    assert abs(single) <= 0.01 + 5.0 * spread, single


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_hundred_thousand_steps_on_an_image(dtype):
    model, x, truth = image_problem(dtype)
    assert -1.3e4 < truth < -1.0e4
    ais = AnnealedImportance(
        model,
        num_chains=8,
        num_steps=100_000,
        schedule=Sigmoid(4.0),
        compile=True,
        progress_bar=False,
        seed=0,
    )
    run = ais.run(x)
    assert run.density_mode == "compiled loop"
    check_run(run, truth, largest_error=0.015)  # of 8 chains: itself known within a quarter


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)]
)
def test_a_thousand_steps_on_an_image(dtype):
    model, x, truth = image_problem(dtype)
    options = {"num_chains": 64, "num_steps": 1000, "progress_bar": False, "seed": 0}
    run = AnnealedImportance(model, schedule=Sigmoid(4.0), **options).run(x)
    check_run(run, truth, largest_error=0.03)


# --- decoders in half precision under autocast ---


def autocast_decoder(x, weight):
    """A linear decoder whose product is in bfloat16: about three digits."""
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean = torch.nn.functional.linear(z, weight)
        assert mean.dtype == torch.bfloat16
    pyro.sample("x", dist.Normal(mean.float(), 0.5).to_event(1), obs=x)


@pytest.mark.parametrize(
    "where", ["inside the model", pytest.param("around the run", marks=pytest.mark.slow)]
)
def test_a_decoder_under_autocast_is_right_to_its_precision(where):
    """Means round to three digits, 2^-9; the evidence of 20 pixels moves by far less than 0.2."""
    rng = np.random.RandomState(1)
    weight = rng.randn(20, 3)
    x = weight @ rng.randn(3) + 0.5 * rng.randn(20)
    cov = weight @ weight.T + 0.25 * np.eye(20)
    truth = stats.multivariate_normal(np.zeros(20), cov).logpdf(x)
    weight, x = (torch.as_tensor(v, dtype=torch.float32) for v in (weight, x))
    ais_options = {"num_chains": 64, "num_steps": 500, "progress_bar": False, "seed": 0}
    torch.set_default_dtype(torch.float32)

    def outside(x, weight):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        mean = torch.nn.functional.linear(z, weight).float()
        pyro.sample("x", dist.Normal(mean, 0.5).to_event(1), obs=x)

    if where == "inside the model":
        run = AnnealedImportance(autocast_decoder, **ais_options).run(x, weight)
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run = AnnealedImportance(outside, **ais_options).run(x, weight)
    assert run.density_mode == "graph"  # autocast is part of what is recorded
    assert run.log_weights.dtype == torch.float64
    assert 0.0 < float(run.std_error) < 0.1
    assert abs(float(run.lower) - truth) <= 0.2 + 5.0 * float(run.std_error)
    exact = AnnealedImportance(outside, **ais_options).run(x, weight)
    assert abs(float(exact.lower) - truth) <= 5.0 * float(exact.std_error) + 1e-3
    # the rounding is there: same noise, other numbers
    assert not torch.equal(run.log_weights, exact.log_weights)
