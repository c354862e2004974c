"""KL annealing against closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_objectives import assert_within
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.optim import Adam

from pyro_anneal.losses import IWAE, anneal_kl

X = torch.tensor([1.3, -0.4], dtype=torch.float64)


def objective(theta, loc, scale, weight):
    """E_q[log N(x; z, .7)] - weight KL(N(loc, scale) || N(theta, 1)), summed over X."""
    fit = -0.5 * ((X - loc) ** 2 + scale**2) / 0.49 - math.log(0.7) - 0.5 * math.log(2 * math.pi)
    divergence = 0.5 * (scale**2 + (loc - theta) ** 2 - 1.0) - scale.log()
    return (fit - weight * divergence).sum()


def pair(theta, loc, scale, size=None):
    def model(x):
        with pyro.plate("data", len(x), subsample_size=size) as index:
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 0.7), obs=x[index])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=size):
            pyro.sample("z", dist.Normal(loc, scale))

    return model, guide


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("loss", [IWAE(1), Trace_ELBO()], ids=["IWAE", "Trace_ELBO"])
def test_value_and_gradient_are_those_of_the_weighted_divergence(loss, weight):
    leaves = [torch.tensor(v, requires_grad=True) for v in (0.4, 0.9, 0.6)]
    model, guide = anneal_kl(*pair(*leaves), weight)
    values, grads = [], []
    for _ in range(30):
        value = -loss.differentiable_loss(model, guide, X.repeat(100)) / 100
        values.append(value.detach())
        grads.append(torch.stack(torch.autograd.grad(value, leaves, allow_unused=False)))
    truth = objective(*leaves, weight)
    exact = torch.autograd.grad(truth, leaves)
    assert_within(torch.stack(values), truth.item())
    for index, expected in enumerate(exact):
        found = torch.stack(grads)[:, index]
        if found.std() < 1e-12:
            assert found[0].item() == pytest.approx(expected.item(), abs=1e-12)
        else:
            assert_within(found, expected.item())


def test_subsampling_scales_fit_and_divergence_alike():
    """Minibatches of one datum are unbiased for the sum over both."""
    leaves = [torch.tensor(v) for v in (0.4, 0.9, 0.6)]
    model, guide = anneal_kl(*pair(*leaves, size=50), 0.3)
    x = X.repeat(50)
    values = torch.tensor([-IWAE(1).loss(model, guide, x) / 50 for _ in range(60)])
    assert_within(values, objective(*leaves, 0.3).item())


def test_the_scale_of_one_site_is_another_objective():
    """What ``poutine.scale`` around the prior does instead: the guide's entropy keeps weight 1."""
    leaves = [torch.tensor(v) for v in (0.4, 0.9, 0.6)]

    def scaled(x):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=0.3):
                z = pyro.sample("z", dist.Normal(leaves[0], 1.0))
            pyro.sample("x", dist.Normal(z, 0.7), obs=x)

    guide = pair(*leaves)[1]
    values = torch.tensor([-IWAE(1).loss(scaled, guide, X.repeat(100)) / 100 for _ in range(20)])
    error = values.std() / len(values) ** 0.5
    assert (values.mean() - objective(*leaves, 0.3)).abs() > 10.0 * error


@pytest.mark.slow
def test_a_weight_that_rises_with_an_automatic_guide():
    """With beta held small the guide ignores the prior; at 1 it is the posterior."""
    pyro.clear_param_store()
    model = pair(torch.tensor(-3.0), None, None)[0]
    guide = AutoMultivariateNormal(model)
    weights = [0.01]
    annealed = anneal_kl(model, guide, lambda: weights[-1])
    means = []
    for weight in (0.01, 1.0):
        weights.append(weight)
        svi = SVI(*annealed, Adam({"lr": 0.03}), IWAE(1))
        for _ in range(600):
            svi.step(X)
        with torch.no_grad():
            means.append(guide.median()["z"].clone())
    for weight, mean in zip((0.01, 1.0), means, strict=True):
        expected = (X / 0.49 - 3.0 * weight) / (1.0 / 0.49 + weight)
        assert mean.tolist() == pytest.approx(expected.tolist(), abs=0.15)


def test_wrong_weights_are_refused():
    model, guide = pair(*(torch.tensor(v) for v in (0.4, 0.9, 0.6)))
    with pytest.raises(ValueError, match="weight must be finite and not negative, got -1"):
        anneal_kl(model, guide, -1.0)
    with pytest.raises(ValueError, match="weight must be finite and not negative, got nan"):
        anneal_kl(model, guide, lambda: math.nan)
