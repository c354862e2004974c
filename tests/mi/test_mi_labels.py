"""Discrete values in mutual information: labels in critics, and the prior in place of a guide."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_anneal import mi


def entropy(p):
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def joint():
    z = pyro.sample("z", dist.Bernoulli(0.3))
    pyro.sample("x", dist.Bernoulli(0.1 + 0.8 * z))


TRUTH = entropy(0.3 * 0.9 + 0.7 * 0.1) - entropy(0.1)  # I = H(x) - H(x | z), H(x | z) = H(.1)


@pytest.mark.parametrize("given", ["nothing", "joint"])
def test_iwae_takes_the_prior_where_there_is_no_guide(given):
    model = mi.PyroJoint(joint, observed=["x"])
    bound = mi.IWAE(model, None, num_particles=400) if given == "nothing" else mi.IWAE(model)
    estimate = bound.estimate(num_pairs=4000)
    error = estimate.pair_lower.std() / 4000**0.5
    assert abs(float(estimate.lower) - TRUTH) < 5 * float(error) + 0.01
    assert abs(float(estimate.upper) - TRUTH) < 5 * float(error) + 0.01


CRITICS = {
    "concatenated": lambda: mi.ConcatCritic(1, 1, hidden=[16]),
    "separable": lambda: mi.SeparableCritic(1, 1, hidden=[16]),
}


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("dtype", [torch.int64, pytest.param(torch.bool, marks=pytest.mark.slow)])
def test_labels_train_critics(critic, dtype):
    z = torch.randn(512)
    y = (z + 0.5 * torch.randn(512) > 0).to(dtype)
    bound = mi.InfoNCE(CRITICS[critic]())
    optimizer = torch.optim.Adam(bound.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        bound.loss(z, y).backward()
        optimizer.step()
    value = float(bound.estimate(z, y).lower)
    assert 0.1 < value < math.log(2.0)  # at most the entropy of a bit
