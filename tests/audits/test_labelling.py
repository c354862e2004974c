"""Draws that keep to one labelling of a mixture lack log K!, and are told so."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_anneal import evidence_from_samples

pytestmark = pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")

# Means far apart beside their own noise: the posterior is two Gaussians, one per labelling.
LOCS = torch.tensor([-4.0, 4.0])


def model():
    with pyro.plate("parts", 2):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    terms = [dist.Normal(LOCS, 0.3).log_prob(mu[..., order]).sum(-1) for order in ([0, 1], [1, 0])]
    pyro.factor("likelihood", torch.logaddexp(*terms))


def draws(swapped):
    """Draws exactly: the prior's density times each Gaussian is a Gaussian."""
    precision = 1.0 / 5.0**2 + 1.0 / 0.3**2
    loc = LOCS / 0.3**2 / precision
    found = loc + precision**-0.5 * torch.randn(1000, 2)
    swap = torch.rand(1000, 1) < swapped
    return {"mu": torch.where(swap, found.flip(1), found)}


TRUTH = math.log(2.0) + 2.0 * dist.Normal(0.0, math.hypot(5.0, 0.3)).log_prob(LOCS[1]).item()


@pytest.mark.parametrize("swapped", [0.0, 0.5])
def test_labellings(swapped):
    torch.manual_seed(0)
    settings = {"exact": True, "seed": 0, "num_steps": 20, "progress_bar": False}
    result = evidence_from_samples(model, draws(swapped), **settings)
    missing = [d for d in result.diagnostics if d.name == "labelling"]
    error = float(result.estimate.value) - TRUTH
    if swapped:
        assert not missing
        assert abs(error) <= 5.0 * float(result.estimate.std_error) + 0.01
    else:
        assert missing[0].value == pytest.approx(math.log(2.0), abs=0.01)
        assert error == pytest.approx(-math.log(2.0), abs=0.05)
        assert "mu" in missing[0].message
        assert result.verdict != "ok"


def mixture_of_two(y):
    """Components exchange their places as the weight of the first becomes that of the second."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    weights = torch.stack([theta, 1.0 - theta])
    with pyro.plate("data", len(y)):
        parts = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(mu, 1.0))
        pyro.sample("y", parts, obs=y)


@pytest.mark.parametrize("share", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_a_weight_between_two_components_is_part_of_their_labelling(share):
    torch.manual_seed(0)
    y = torch.cat([torch.randn(12) - 4.0, torch.randn(20) + 4.0])
    # components are so far apart that mu and theta are nearly independent given the labels
    sides = (y < 0.0, y > 0.0)
    precision = [float(side.sum()) + 0.04 for side in sides]
    means = [float(y[side].sum()) / p for side, p in zip(sides, precision, strict=True)]
    mu = torch.tensor(means) + torch.tensor(precision) ** -0.5 * torch.randn(400, 2)
    theta = dist.Beta(5.0 + 12.0, 5.0 + 20.0).sample((400,))
    swapped = torch.rand(400) < share
    draws = {
        "mu": torch.where(swapped[:, None], mu.flip(1), mu),
        "theta": torch.where(swapped, 1.0 - theta, theta),
    }
    settings = {"seed": 0, "num_steps": 20, "progress_bar": False}
    result = evidence_from_samples(mixture_of_two, draws, y, **settings)
    missing = [d for d in result.diagnostics if d.name == "labelling"]
    if share:
        assert not missing
    else:
        assert missing[0].value == pytest.approx(math.log(2.0), abs=0.05)
        assert "theta" in missing[0].message
