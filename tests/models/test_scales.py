"""Runs and losses read the scales of a model alike: what multiplies the evidence, and what acts inside."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_anneal import AnnealedImportance
from pyro_anneal.losses import IWAE
from pyro_anneal.models.inspection import inspect_model
from pyro_anneal.models.scales import own_scale, site_subsampling

NOTHING: tuple = ((), {})
X = torch.tensor([0.4, -1.2, 2.0], dtype=torch.float64)


def model(inside=1.0, factor=1.0):
    zero = torch.zeros((), dtype=torch.float64)
    with poutine.scale(scale=factor), pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(zero, 1.0))
        with poutine.scale(scale=inside):
            pyro.sample("x", dist.Normal(z, 0.5), obs=X)


def guide(inside=1.0, factor=1.0):
    """The posterior, so that one particle gives the evidence exactly."""
    with poutine.scale(scale=factor), pyro.plate("data", 3):
        pyro.sample("z", dist.Normal(0.8 * X, 0.2**0.5))


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_a_common_scale_multiplies_the_evidence(factor):
    evidence = float(dist.Normal(0.0, 1.25**0.5).log_prob(X).sum())
    ais = AnnealedImportance(
        model, guide, num_chains=4, num_steps=2, seed=0, progress_bar=False, cross_check=False
    )
    run = ais.run(factor=factor)
    assert float(run.lower.sum()) == pytest.approx(factor * evidence)
    assert run.scale == pytest.approx(factor)
    assert IWAE(2).loss(model, guide, factor=factor) == pytest.approx(-factor * evidence)


def test_a_scale_of_one_site_acts_inside_the_weight():
    layout = inspect_model(model, None, ((), {"inside": 0.3}), ((), {"inside": 0.3}))
    assert layout.scale == 1.0
    assert any("poutine.scale acts on ['x']" in note for note in layout.notes)
    # One particle from the posterior: the mean of log p(z) + .3 log p(x | z) - log q(z).
    q = dist.Normal(0.8 * X, 0.2**0.5)
    z = q.sample((200_000,))
    terms = dist.Normal(0.0, 1.0).log_prob(z) + 0.3 * dist.Normal(z, 0.5).log_prob(X)
    truth = (terms - q.log_prob(z)).sum(-1)
    losses = torch.tensor([IWAE(1).loss(model, guide, inside=0.3) for _ in range(200)])
    error = (losses.var() / 200 + truth.var() / 200_000).sqrt()
    assert abs(float(losses.mean() + truth.mean())) < 5 * float(error)


def test_subsampling_is_told_from_the_users_scale():
    def subsampled():
        with poutine.scale(scale=0.3), pyro.plate("data", 12, subsample_size=3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=X)

    trace = poutine.trace(subsampled).get_trace()
    for name in ("z", "x"):
        assert site_subsampling(trace.nodes[name]) == 4.0
        assert own_scale(trace.nodes[name]) == pytest.approx(0.3)
