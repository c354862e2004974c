"""The prior with enumerated sites summed out: one where nothing sees them, a sum where it does."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_anneal.models.density import ModelDensity
from pyro_anneal.models.inspection import inspect_model

SHARES = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
LOCS = torch.tensor([-1.0, 0.5, 4.0], dtype=torch.float64)
MARK = {"enumerate": "parallel"}


def chain():
    loc = pyro.sample("loc", dist.Normal(torch.zeros((), dtype=torch.float64), 2.0))
    z = torch.tensor(0)
    for step in pyro.markov(range(4)):
        table = torch.stack([SHARES, SHARES.flip(0), SHARES.roll(1)])
        z = pyro.sample(f"z{step}", dist.Categorical(table[z]), infer=MARK)
        pyro.sample(f"y{step}", dist.Normal(loc + LOCS[z], 1.0), obs=torch.tensor(0.3))


def latents_that_depend():
    with pyro.plate("rows", 3):
        z = pyro.sample("z", dist.Categorical(SHARES), infer=MARK)
        x = pyro.sample("x", dist.Normal(LOCS[z], 0.5))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor([0.1, 0.2, 0.3]))


def masked():
    loc = pyro.sample("loc", dist.Normal(torch.zeros((), dtype=torch.float64), 2.0))
    with pyro.plate("rows", 3), poutine.mask(mask=torch.tensor([True, False, True])):
        z = pyro.sample("z", dist.Categorical(SHARES), infer=MARK)
        pyro.sample("y", dist.Normal(loc + LOCS[z], 1.0), obs=torch.tensor([0.1, 0.2, 0.3]))


def evaluated(model, position):
    layout = inspect_model(model, None, ((), {}), ((), {}), batch_plates=[])
    return ModelDensity(model, layout, ((), {})).evaluate(position)


@pytest.mark.parametrize("model", [chain, masked])
def test_sites_that_only_data_see_leave_the_prior_of_the_others(model):
    u = torch.tensor([0.7], dtype=torch.float64)
    prior = evaluated(model, u).log_prior
    assert float(prior) == pytest.approx(float(dist.Normal(0.0, 2.0).log_prob(u).sum()), abs=1e-6)


def test_latents_that_depend_on_an_enumerated_site_have_a_mixture_as_prior():
    u = torch.tensor([-1.2, 0.4, 3.0], dtype=torch.float64)
    wanted = (SHARES.log() + dist.Normal(LOCS, 0.5).log_prob(u.unsqueeze(-1))).logsumexp(-1).sum()
    assert float(evaluated(latents_that_depend, u).log_prior) == pytest.approx(float(wanted))


def test_the_joint_is_the_sum_over_all_ways():
    u = torch.tensor([0.7], dtype=torch.float64)
    table = torch.stack([SHARES, SHARES.flip(0), SHARES.roll(1)])
    emit = dist.Normal(u + LOCS, 1.0).log_prob(torch.tensor(0.3, dtype=torch.float64))
    forward = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    for _ in range(4):
        forward = (forward @ table) * emit.exp()
    wanted = forward.sum().log() + dist.Normal(0.0, 2.0).log_prob(u).sum()
    assert float(evaluated(chain, u).log_joint) == pytest.approx(float(wanted), abs=1e-6)
