"""The budget: thermodynamic length, the variance of weights, the gap, and blocks."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, stats
from test_gap_law import WEIGHTS, simulate

from pyro_anneal import HMC, AnnealedImportance, bounds
from pyro_anneal.chains.budget import (
    Blocks,
    choose_blocks,
    expected_gap,
    mean_correlation,
    steps_within,
    weight_variance,
)
from pyro_anneal.chains.fluctuations import Pieces
from pyro_anneal.chains.pilot import Pilot, run_pilot
from pyro_anneal.persistence.randomness import seeded_generator


def linear_vae(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(10), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ WEIGHTS.T, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize(("rho", "steps"), [(0.0, 7), (0.6, 1), (0.6, 5), (0.9, 40)])
def test_the_variance_is_that_of_a_correlated_sum(rho, steps):
    lags = np.abs(np.subtract.outer(np.arange(steps), np.arange(steps)))
    expected = (3.0 / steps) ** 2 * (rho**lags).sum()
    assert weight_variance([3.0], [rho], [steps]) == pytest.approx(expected, rel=1e-12)


def test_the_variance_of_pieces_is_that_of_an_inhomogeneous_sum():
    lengths, rhos, steps = [3.0, 0.0, 1.0, 2.0], [0.9, 0.3, 0.0, 0.8], [5, 2, 3, 4]
    sizes = np.repeat(np.divide(lengths, steps), steps)
    decays = np.repeat(rhos, steps)
    total = 0.0
    for s in range(sum(steps)):
        for t in range(sum(steps)):
            total += sizes[s] * sizes[t] * np.prod(decays[min(s, t) + 1 : max(s, t) + 1])
    assert weight_variance(lengths, rhos, steps) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("steps", [1.0, 2.5, 40.0])
def test_cutting_a_piece_changes_nothing(steps):
    whole = weight_variance([3.0], [0.7], [steps])
    parts = weight_variance([0.6, 1.2, 1.2], [0.7] * 3, [0.2 * steps, 0.4 * steps, 0.4 * steps])
    assert parts == pytest.approx(whole, rel=1e-12)


def test_pieces_of_less_than_a_step_are_joined():
    # three perfect pieces in one step: as if log p/q were measured once, at their common scale
    assert weight_variance([1.0, 2.0, 3.0], [0.0] * 3, [0.8, 0.1, 0.1]) == pytest.approx(36.0)
    assert weight_variance([2.0, 0.0], [0.5, 0.0], [1.0, 0.0]) == pytest.approx(4.0)
    assert weight_variance([0.0, 0.0], [0.0, 0.0], [1.0, 2.0]) == 0.0


def test_the_mean_correlation_has_the_same_effect():
    pieces = Pieces((0.0, 0.2, 1.0), (3.0, 1.0), (0.9, 0.4))
    rho = mean_correlation(pieces, [0.5, 0.5])
    steps = 10**6
    expected = weight_variance(pieces.lengths, pieces.correlations, [0.5 * steps, 0.5 * steps])
    assert weight_variance([4.0], [rho], [steps]) == pytest.approx(expected, rel=1e-3)
    assert mean_correlation(Pieces((0.0, 1.0), (0.0,), (0.0,)), [1.0]) == 0.0


def test_steps_are_counted_between_betas():
    betas = np.linspace(0.0, 1.0, 101) ** 2
    steps = steps_within([0.0, 0.04, 0.25, 1.0], betas, range(101))
    assert steps == pytest.approx([20.0, 30.0, 50.0])


@pytest.mark.parametrize("variance", [0.04, 0.8, 4.0])
def test_the_gap_of_two_chains_by_quadrature(variance):
    sigma = math.sqrt(variance)
    grid = np.linspace(-9.0, 9.0, 601)
    first, second = np.meshgrid(grid, grid)
    log_mean = np.logaddexp(sigma * first, sigma * second) - math.log(2.0) - 0.5 * variance
    weights = stats.norm.pdf(first) * stats.norm.pdf(second)
    loss = -integrate.trapezoid(integrate.trapezoid(weights * log_mean, grid), grid)
    assert expected_gap(variance, 2) == pytest.approx(2.0 * loss, rel=0.03)


def test_the_gap_of_many_chains_is_that_of_the_delta_method():
    assert expected_gap(0.1, 64) == pytest.approx(math.expm1(0.1) / 64, rel=0.03)


def test_the_pilot_measures_the_length():
    r"""From the prior, mean Var_beta[log p/q] = sum_j s^2(1+s^2)/(1+bs^2)^3 + s^4/2(1+bs^2)^2."""
    squares = np.linalg.svd(WEIGHTS.numpy(), compute_uv=False) ** 2

    def speed(beta):
        shrink = 1.0 + beta * squares
        variance = squares * (1.0 + squares) / shrink**3 + 0.5 * squares**2 / shrink**2
        return math.sqrt(variance.sum())

    truth = integrate.quad(speed, 0.0, 1.0, points=[1e-3, 1e-2, 0.1])[0]
    vae = simulate(100)
    start = vae(torch.randn(32, *vae.latents.shape))
    generator = seeded_generator(start.position.device, 0, "pilot")
    outcome = run_pilot(vae, HMC(2), start, generator, settings=Pilot())
    assert sum(outcome.pieces.lengths) == pytest.approx(truth, rel=0.1)
    assert all(0.0 <= rho < 0.9 for rho in outcome.pieces.correlations)


def test_the_gap_is_predicted_within_a_factor_of_two():
    ais = AnnealedImportance(
        linear_vae, num_chains=1, num_steps=400, kernel=HMC(2), seed=0, progress_bar=False
    )
    sandwich = ais.sandwich(torch.zeros(200, 100))
    expected, measured = sandwich.forward.pilot.expected_gap, float(sandwich.gap.mean())
    std_error = float(sandwich.std_error["gap"])
    assert std_error < 0.15 * measured
    assert 0.5 * measured < expected < 2.0 * measured
    assert "expected gap per datum" in repr(sandwich.forward)


def median_limit(blocks, log_weights):
    means = bounds.block_means(log_weights, blocks.num_blocks)
    return float(bounds.limit_of_blocks(means, num_kept=blocks.num_kept).median())


@pytest.mark.parametrize("num_chains", [16, 64, 100])
@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0, 2.0])
def test_blocks_are_chosen_for_the_narrowest_interval(sigma, num_chains):
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(num_chains, 10_000, generator=generator, dtype=torch.float64)
    log_weights = sigma * noise - 0.5 * sigma**2
    chosen = choose_blocks(num_chains, sigma**2)
    assert num_chains % chosen.num_blocks == 0
    divisors = [count for count in range(1, num_chains + 1) if num_chains % count == 0]
    best = max(median_limit(Blocks(count, count), log_weights) for count in divisors)
    assert median_limit(chosen, log_weights) > best - 0.05


def test_blocks_of_populations_are_whole_populations():
    for variance in (0.01, 1.0, 9.0, math.nan, math.inf):
        assert 4 % choose_blocks(64, variance, num_units=4).num_blocks == 0
    assert choose_blocks(64, 0.01, num_units=1) == Blocks(1, 1)
    assert choose_blocks(1, 0.5) == Blocks(1, 1)


def test_blocks_of_many_chains_are_chosen_in_no_time():
    assert choose_blocks(4096, 0.3).num_blocks >= 16


@pytest.mark.parametrize("dead", [0.05, 0.3, 0.7])
@pytest.mark.parametrize("num_chains", [2, 16, 64])
def test_limits_rest_on_living_chains(dead, num_chains):
    blocks = choose_blocks(num_chains, 0.2, dead=dead)
    generator = torch.Generator().manual_seed(0)
    alive = torch.rand(num_chains, 20_000, generator=generator) >= dead
    log_weights = torch.where(alive, -math.log(1.0 - dead), -math.inf)
    means = bounds.block_means(log_weights, blocks.num_blocks)
    limit = bounds.limit_of_blocks(means, num_kept=blocks.num_kept)
    hopeless = dead**num_chains  # whatever the blocks
    assert float((limit == -math.inf).double().mean()) <= hopeless + 0.01
    assert float((limit > 0.0).double().mean()) <= 0.05  # it is a limit
    assert choose_blocks(num_chains, 0.2, dead=0.0) == choose_blocks(num_chains, 0.2)
