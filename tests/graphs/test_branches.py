"""Branches on latents are recorded along each way, and every chain takes its own."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_anneal import AnnealedImportance
from pyro_anneal.problems.problem import prepare


def problem(model, *args):
    return prepare(
        model,
        None,
        (args, {}),
        (args, {}),
        num_chains=4,
        batch_plates="auto",
        compile=False,
        seed=0,
    )


def two():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    loc = 3.0 * z.sqrt() if z > 0.5 else -z  # the root of the other way is NaN
    pyro.sample("y", dist.Normal(loc, 0.3), obs=torch.tensor(1.0))


def four():
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    loc = torch.zeros(())
    for value in z:
        loc = loc + value if bool(value > 0.1) else loc - 2.0 * value
    pyro.sample("y", dist.Normal(loc, 0.5), obs=torch.tensor(1.0))


def nested():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    if z < -0.3:
        scale = 0.4
    elif z < 0.6:
        scale = 0.8
    else:
        scale = 1.6
    pyro.sample("y", dist.Normal(z, scale), obs=torch.tensor(0.7))


@pytest.mark.parametrize("model", [two, four, nested])
def test_every_chain_takes_its_own_way(model):
    found = problem(model)
    assert found.density.mode == "graph"
    torch.manual_seed(0)
    positions = found.draw(40)
    found.density.check(positions)  # against the model itself, or raises
    state = found.density(positions)
    assert state.grad_target.isfinite().all()


def test_the_evidence_of_both_ways():
    run = AnnealedImportance(two, num_chains=256, num_steps=200, seed=0, progress_bar=False).run()
    z = torch.linspace(-8.0, 8.0, 160_001, dtype=torch.float64)
    loc = torch.where(z > 0.5, 3.0 * z.clamp(min=0.0).sqrt(), -z)
    joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(loc, 0.3).log_prob(torch.tensor(1.0))
    truth = float(joint.logsumexp(0)) + math.log(1e-4)
    assert abs(float(run.log_evidence) - truth) < 5.0 * float(run.std_error) + 1e-3
    assert float(run.std_error) < 0.2


def many():
    z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))
    loc = sum(value if bool(value > 0.0) else -value for value in z)
    pyro.sample("y", dist.Normal(loc, 0.5), obs=torch.tensor(1.0))


def counting():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    loc = z if z < 5.0 else z * int(z)
    pyro.sample("y", dist.Normal(loc, 0.5), obs=torch.tensor(1.0))


def failing():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    if z > 3.0:
        raise ValueError("not there")
    pyro.sample("y", dist.Normal(z, 0.5), obs=torch.tensor(1.0))


def test_a_way_that_raises_has_no_density():
    found = problem(failing)
    assert found.density.mode == "graph"
    state = found.density(torch.tensor([[0.0], [2.9], [3.1], [-1.0]]).to(found.layout.dtype))
    assert state.log_target.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("model", [many, counting])
def test_many_ways_or_one_that_leaves_torch_keep_the_model_as_it_is(model):
    with pytest.warns(UserWarning, match=r"a branch needs the value of a latent at test_branches"):
        assert problem(model).density.mode == "eager"
