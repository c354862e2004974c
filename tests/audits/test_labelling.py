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
