"""Schedules against their formulas, and the errors of `as_betas`."""

import math

import pytest
import torch

from pyro_anneal.schedules import Linear, LogUniform, Power, Schedule, Sigmoid, as_betas

SCHEDULES = [
    Linear(),
    Power(3.0),
    Sigmoid(),
    Sigmoid(0.1),
    Sigmoid(30.0),
    LogUniform(0.025),
    LogUniform(1e-12),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 1000])
def test_runs_from_exactly_0_to_exactly_1(schedule, num_steps):
    assert isinstance(schedule, Schedule)
    betas = as_betas(schedule, num_steps)  # raises unless strictly increasing
    assert betas.shape == (num_steps + 1,)
    assert betas.dtype == torch.float64
    assert betas[0].item() == 0.0
    assert betas[-1].item() == 1.0


def test_linear_and_power():
    assert torch.equal(Linear()(5), torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1.0]))
    expected = torch.tensor([0.0, 1 / 27, 8 / 27, 1.0])
    assert torch.allclose(Power(3.0)(3), expected, atol=1e-15)


@pytest.mark.parametrize("delta", [0.5, 4.0, 9.0])
def test_sigmoid_is_the_rescaled_logistic(delta):
    def sigma(t):
        return 1.0 / (1.0 + math.exp(-delta * (2.0 * t / 6 - 1.0)))

    expected = [(sigma(t) - sigma(0)) / (sigma(6) - sigma(0)) for t in range(7)]
    assert torch.allclose(Sigmoid(delta)(6), torch.tensor(expected), atol=1e-14)


def test_log_uniform_has_a_constant_ratio():
    betas = LogUniform(beta_1=0.025)(5)
    assert betas[1].item() == pytest.approx(0.025, rel=1e-14)
    ratios = betas[2:] / betas[1:-1]
    assert torch.allclose(ratios, torch.full_like(ratios, 0.025 ** (-1 / 4)), rtol=1e-13)


def test_partitions_stand_in_for_num_steps():
    assert torch.equal(as_betas(LogUniform(0.3, partitions=2), None), torch.tensor([0.0, 0.3, 1]))
    assert torch.equal(as_betas(Linear(partitions=2), 2), torch.tensor([0.0, 0.5, 1.0]))
    with pytest.raises(ValueError, match="partitions=2, but num_steps=3"):
        as_betas(Linear(partitions=2), 3)
    with pytest.raises(ValueError, match="Sigmoid needs a number of steps"):
        as_betas(Sigmoid(), None)


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([0.1, 1.0], r"betas\[0\] must be 0, got 0.1"),
        ([0.0, 0.9], r"betas\[1\] must be 1, got 0.9"),
        ([0.0, 0.5, 0.5, 1.0], r"betas\[2\] = 0.5 follows betas\[1\] = 0.5"),
        ([0.0, 0.7, 0.3, 1.0], r"betas\[2\] = 0.3 follows betas\[1\] = 0.7"),
        ([0.0, math.nan, 1.0], r"betas\[1\] = nan follows"),
        ([0.0, 1.5, 1.0], r"betas\[2\] = 1.0 follows"),
        ([[0.0, 1.0]], r"one-dimensional .* got \[1, 2\]"),
        ([0.0], r"at least two entries, got \[1\]"),
    ],
)
def test_bad_betas_are_named(betas, message):
    with pytest.raises(ValueError, match=message):
        as_betas(torch.tensor(betas), None)


def test_disagreement_and_bad_arguments():
    with pytest.raises(ValueError, match="expected 4 betas for num_steps=3, got 2"):
        as_betas(torch.tensor([0.0, 1.0]), 3)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        as_betas(Linear(), 0)
    with pytest.raises(ValueError, match="0 < beta_1 < 1, got 1"):
        LogUniform(1.0)
    with pytest.raises(ValueError, match="positive, finite delta"):
        Sigmoid(0.0)
    with pytest.raises(ValueError, match="positive, finite exponent"):
        Power(math.inf)


def test_a_float32_tensor_is_accepted():
    betas = as_betas(torch.tensor([0.0, 0.25, 1.0], dtype=torch.float32), 2)
    assert betas.dtype == torch.float64
