"""A long run in both precisions, with densities of thousands of nats."""

import math

import pytest
import torch
from paths import lopsided

from pyro_anneal.chains import Path, TuningTable, run_chains
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
