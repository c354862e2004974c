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


def answers():
    """A yes or no, whose densities take floats, beside a class that indexes a table."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.2, 0.8])))
    slope = torch.tensor([1.0, 4.0])[kind]
    pyro.sample("y", dist.Bernoulli(logits=slope * z))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_whole_numbers_as_observations(dtype):
    """Arrays of labels give what floats give, from distributions and from a Pyro model."""
    torch.manual_seed(0)
    joint = mi.DistributionJoint(dist.Normal(0.0, 1.0), lambda z: dist.Bernoulli(logits=3.0 * z))
    x, z = joint.sample(50)
    given = x.to(dtype).numpy()
    bound = mi.AIS(joint, num_chains=4, num_steps=5)
    expected, found = bound.estimate(x, z, seed=1), bound.estimate(given, z.numpy(), seed=1)
    assert torch.allclose(found.pair_lower, expected.pair_lower)
    assert torch.allclose(found.pair_upper, expected.pair_upper)
    model = mi.PyroJoint(answers, observed=["kind", "y"])
    x, z = model.sample(50)
    exact = torch.log(torch.tensor([0.2, 0.8]))[x[:, 0].long()]
    slope = torch.tensor([1.0, 4.0])[x[:, 0].long()]
    exact = exact + dist.Bernoulli(logits=slope * z).log_prob(x[:, 1])
    rows = x if dtype is torch.float32 else x.to(torch.int64)
    assert torch.allclose(model.log_likelihood(rows, z), exact)


def test_an_axis_too_many_is_named():
    joint = mi.DistributionJoint(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 0.5))
    x, z = joint.sample(20)
    with pytest.raises(ValueError, match=r"x has shape \[20, 1\].*values of shape \[\]"):
        mi.AIS(joint, num_chains=4, num_steps=5).estimate(x.unsqueeze(1), z)
    with pytest.raises(ValueError, match=r"z has shape \[20, 1\]"):
        mi.IWAE(joint, None, 4).estimate(x, z.unsqueeze(1))


def test_whole_numbers_as_latents():
    prior, guide = dist.Normal(0.0, 1.0), lambda x: dist.Normal(x, 1.0)
    bound = mi.MINEAIS(prior, guide, lambda x, z: 0.0 * (x * z).sum(-1), num_steps=3)
    labels = torch.tensor([0, 1, 1, 0] * 5)
    x = torch.randn(20)
    found, expected = (bound.estimate(x, z, seed=0) for z in (labels, labels.float()))
    assert torch.allclose(found.pair_lower, expected.pair_lower, atol=1e-5)
