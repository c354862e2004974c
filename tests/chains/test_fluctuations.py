"""Lengths, correlations and memories of log p/q against Gaussian processes in closed form."""

import math

import pytest
import torch

from pyro_anneal.chains.fluctuations import Fluctuations, Lineages, memory_factor


def autoregressive(rho, count, *shape):
    """Draws a stationary process of variance 1 and autocorrelation rho^lag, [count + 1, *shape]."""
    values = [torch.randn(shape)]
    for _ in range(count):
        values.append(rho * values[-1] + math.sqrt(1.0 - rho**2) * torch.randn(shape))
    return torch.stack(values)


def resampled(values, increment):
    """Draws indices in proportion to e^(increment values), [M, *batch]."""
    weights = (increment * values).softmax(0).movedim(0, -1)
    count = weights.shape[-1]
    indices = torch.multinomial(weights.reshape(-1, count), count, replacement=True)
    return indices.reshape(*weights.shape[:-1], count).movedim(-1, 0)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_a_gaussian_stretch(rho):
    # log p/q ~ N(beta, 1) at beta: of constant variance, and tilting moves the mean alone
    fluctuations = Fluctuations()
    for beta in (0.0, 0.6):
        fluctuations.stage(beta, beta + autoregressive(rho, 6, 20_000))
        if not beta:
            fluctuations.resample(torch.arange(20_000))  # independent: no memory between stages
    pieces = fluctuations.pieces()
    assert pieces.betas[0] == 0.0
    assert pieces.betas[-1] == 0.6
    widths = torch.tensor(pieces.betas).diff()
    assert torch.allclose(torch.tensor(pieces.lengths), widths, rtol=0.05)
    assert sum(pieces.lengths) == pytest.approx(0.6, rel=0.03)
    for found in pieces.correlations:
        assert found == pytest.approx(rho, abs=0.03)


def test_a_variance_that_falls_along_the_stretch():
    """Log p/q = -z^2 / 2 from N(0, s^2): Var_beta = v^2 / 2 with 1/v = 1/s^2 + beta."""
    spread, count = 1.3, 200_000
    fluctuations = Fluctuations()
    for beta in (0.0, 1.0):
        scale = (spread**-2.0 + beta) ** -0.5
        fluctuations.stage(beta, -0.5 * (scale * torch.randn(5, count)).square())
        if not beta:
            fluctuations.resample(torch.arange(count))
    pieces = fluctuations.pieces()
    ends = torch.tensor(pieces.betas) + spread**-2.0
    # the integral of Var_beta over a piece times its width is the square of its length
    expected = (0.5 * ends.diff() * (1.0 / ends[:-1] - 1.0 / ends[1:])).sqrt()
    assert torch.allclose(torch.tensor(pieces.lengths), expected, rtol=0.1)
    assert sum(pieces.lengths) == pytest.approx(float(expected.sum()), rel=0.03)


def test_a_batch_is_averaged():
    scales = torch.tensor([1.0, 2.0])
    fluctuations = Fluctuations()
    for beta in (0.0, 0.1):
        fluctuations.stage(beta, scales * autoregressive(0.5, 6, 50_000, 2))
        if not beta:
            fluctuations.resample(torch.arange(50_000)[:, None].expand(-1, 2))
    assert sum(fluctuations.pieces().lengths) == pytest.approx(0.1 * math.sqrt(2.5), rel=0.02)


def test_particles_of_no_density_do_not_count():
    clean, dirty = Fluctuations(), Fluctuations()
    for beta in (0.0, 0.3):
        ratios = autoregressive(0.5, 6, 400)
        clean.stage(beta, ratios)
        dirty.stage(beta, torch.cat([ratios, torch.full((7, 3), -torch.inf)], 1))
        if not beta:
            clean.resample(torch.arange(400))
            dirty.resample(torch.arange(403))
    for ours, theirs in zip(clean.pieces().lengths, dirty.pieces().lengths, strict=True):
        assert theirs == pytest.approx(ours, rel=0.01)


def test_one_value_has_no_length():
    fluctuations = Fluctuations()
    fluctuations.stage(0.0, torch.full((7, 16), 3.0))
    fluctuations.resample(torch.arange(16))
    fluctuations.stage(1.0, torch.full((7, 16), 3.0))
    assert sum(fluctuations.pieces().lengths) == 0.0


# --- memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.3, 0.8, 0.95])
def test_a_memory_that_decays_from_its_first_lag_on_does_not_outlast_it(rho):
    lags = {lag: rho**lag for lag in (1, 2, 3, 4, 5, 6, 9, 12, 15, 18, 21, 24)}
    assert memory_factor(lags, dict.fromkeys(lags, 0.0)) == pytest.approx(1.0, abs=0.06)


def test_a_memory_of_two_times():
    fast, slow, share = 0.5, 0.96, 0.3
    lags = {k: (1.0 - share) * fast**k + share * slow**k for k in range(1, 25)}
    first = lags[1]
    total = (1.0 - share) * fast / (1.0 - fast) + share * slow / (1.0 - slow)
    expected = total * (1.0 - first) / first
    assert memory_factor(lags, dict.fromkeys(lags, 0.0)) == pytest.approx(expected, rel=0.1)


def test_the_factor_is_limited():
    assert memory_factor({1: -0.2}, {1: 0.1}) == 1.5  # nothing seen
    assert memory_factor({1: 1.0, 2: 1.0}, {1: 0.1, 2: 0.1}) <= 10.0
    assert memory_factor({1: 0.5, 2: 0.01}, {1: 0.01, 2: 0.01}) >= 1.0


def test_lineages_remember_across_resampling():
    """Tilting a Gaussian process moves its mean: correlations of lineages are those untilted."""
    fast, slow, share, count, particles = 0.3, 0.95, 0.4, 6, 30_000
    state = [torch.randn(particles), torch.randn(particles)]
    lineages = Lineages()
    for _ in range(5):
        values = []
        for step in range(count + 1):
            if step:
                state = [
                    rho * part + math.sqrt(1.0 - rho**2) * torch.randn(particles)
                    for rho, part in zip((fast, slow), state, strict=True)
                ]
            values.append(math.sqrt(1.0 - share) * state[0] + math.sqrt(share) * state[1])
        ratios = torch.stack(values)
        lineages.stage(ratios)
        ancestors = resampled(ratios[-1], 0.5)
        state = [part[ancestors] for part in state]
        lineages.resample(ancestors)
    first = (1.0 - share) * fast + share * slow
    total = (1.0 - share) * fast / (1.0 - fast) + share * slow / (1.0 - slow)
    assert lineages.factor() == pytest.approx(total * (1.0 - first) / first, rel=0.1)


def test_few_particles_take_the_usual_factor():
    lineages = Lineages()
    lineages.stage(autoregressive(0.5, 2, 4))
    assert lineages.factor() == pytest.approx(1.5, abs=0.3)
