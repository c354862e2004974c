"""The layout of a model: moving supports, masks, dtypes."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_anneal import AnnealedImportance
from pyro_anneal.models.inspection import inspect_model
from pyro_anneal.models.sites import base_distribution, is_deterministic, unmasked
from pyro_anneal.problems.bases import ModelDensity
from pyro_anneal.problems.problem import prepare


def layout_of(model, *args):
    return inspect_model(model, None, (args, {}), (args, {}))


def clipped(x):  # the support is [0, 4] at most draws of top, but not at all
    top = pyro.sample("top", dist.Gamma(3.0, 2.0))
    z = pyro.sample("z", dist.Uniform(torch.zeros(()), top.clamp(min=4.0)))
    pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def test_support_that_rarely_moves_is_dynamic():
    x = torch.tensor(0.8)
    layout = layout_of(clipped, x)
    assert not layout.is_static
    density = ModelDensity(clipped, layout, ((x,), {}))
    values = density.unpack(torch.tensor([math.log(10.0), 0.0]))
    assert float(values["top"]) == pytest.approx(10.0)
    assert float(values["z"]) == pytest.approx(5.0)  # the middle of [0, 10]
    torch.testing.assert_close(density.pack(values), torch.tensor([math.log(10.0), 0.0]))


@pytest.mark.parametrize(
    ("family", "high"),
    [
        (lambda: dist.Categorical(torch.ones(3)), lambda k: 1.0 + (k > 1).float()),
        (lambda: dist.Bernoulli(0.5), lambda k: 1.0 + k.long()),
        (lambda: dist.Poisson(0.1), lambda k: 1.0 + (k > 10).float()),
        (lambda: dist.Categorical(torch.tensor([0.98, 0.01, 0.01])), lambda k: 1.0 + k),
    ],
)
def test_supports_that_move_with_integers_do_so_at_every_seed(family, high):
    def model(x):
        k = pyro.sample("k", family())
        z = pyro.sample("z", dist.Uniform(torch.zeros(()), high(k)))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def still(x):
        k = pyro.sample("k", family())
        z = pyro.sample("z", dist.Uniform(torch.zeros(()), torch.tensor(4.0)))
        pyro.sample("x", dist.Normal(z + high(k), 0.5), obs=x)

    for seed in range(8):
        torch.manual_seed(seed)
        assert not layout_of(model, torch.tensor(0.8)).is_static
        assert layout_of(still, torch.tensor(0.8)).is_static


def test_fixed_tensor_bounds_are_static():
    def model(x):
        z = pyro.sample("z", dist.Uniform(torch.zeros(()), torch.tensor(4.0)))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    assert layout_of(model, torch.tensor(0.8)).is_static


@pytest.mark.parametrize("event_dim", [0, 1])
def test_masks_are_removed_at_any_depth(event_dim):
    keep = torch.tensor([True, False])
    plain = dist.Normal(torch.tensor([0.0, 1.0]), 2.0).to_event(event_dim)
    masked = dist.Normal(torch.tensor([0.0, 1.0]), 2.0).mask(keep).to_event(event_dim)
    value = torch.tensor([0.3, -0.7])
    torch.testing.assert_close(unmasked(masked).log_prob(value), plain.log_prob(value))
    assert unmasked(plain) is plain
    assert isinstance(base_distribution(masked), dist.Normal)


def test_a_point_mass_under_a_mask_is_deterministic():
    site = {"fn": dist.Delta(torch.ones(2), event_dim=1).mask(False), "infer": {}}
    assert is_deterministic(site)
    assert not is_deterministic({**site, "fn": dist.Delta(torch.ones(2), event_dim=1)})
    assert not is_deterministic({**site, "fn": dist.Normal(0.0, 1.0).mask(False)})


def test_mixed_dtypes_keep_each_site_its_own():
    def model(x):
        a = pyro.sample("a", dist.Normal(torch.zeros(2, dtype=torch.float32), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        c = pyro.sample("c", dist.Normal(torch.zeros((), dtype=torch.float32), 1.0))
        assert (a.dtype, b.dtype, c.dtype) == (torch.float32, torch.float64, torch.float32)
        mean = torch.eye(2, dtype=torch.float32) @ a  # fails for a of another dtype
        pyro.sample("x", dist.Normal(mean.double() + b + c, 1.0).to_event(1), obs=x)

    x = torch.tensor([0.5, 1.5])
    layout = layout_of(model, x)
    assert layout.dtype == torch.float64
    run = AnnealedImportance(model, num_chains=32, num_steps=30, progress_bar=False, seed=0).run(x)
    truth = stats.multivariate_normal([0, 0], [[4.0, 2.0], [2.0, 4.0]]).logpdf(x.numpy())
    assert abs(run.lower - truth) <= 5.0 * run.std_error


def test_draws_without_density_have_weight_zero():
    """Drawing again would anneal from a truncated base and overstate the evidence."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        factor = torch.linalg.cholesky(torch.eye(1) * z)  # raises for z below zero
        pyro.sample("x", dist.Normal(factor.squeeze(), 1.0), obs=x)

    x = torch.tensor(0.7)
    arguments = ((x,), {})
    problem = prepare(
        model, None, arguments, arguments, num_chains=8, batch_plates="auto", compile=False, seed=0
    )
    positions = problem.draw(400)
    empty = positions.isnan().all(-1).double().mean()
    assert abs(empty - 0.5) < 5 * 0.5 / math.sqrt(400)


def test_scale_of_a_latent_beside_an_enumerated_site():
    """A scale with a value per plate element multiplies each element's own log density."""
    power = torch.tensor([1.0, 2.0, 3.0])

    def model(x):
        with pyro.plate("data", 3, dim=-2):
            with pyro.poutine.scale(scale=power.unsqueeze(-1)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + k, 1.0), obs=x)

    x = torch.tensor([[0.5], [1.0], [-0.5]])
    layout = layout_of(model, x)
    density = ModelDensity(model, layout, ((x,), {}))
    u = torch.tensor([[0.3], [-1.0], [0.8]])
    evaluation = density.evaluate(u)
    prior = stats.norm.logpdf(u[:, 0])
    likelihood = torch.as_tensor(
        0.7 * stats.norm(u, 1.0).pdf(x) + 0.3 * stats.norm(u + 1.0, 1.0).pdf(x)
    ).log()[:, 0]
    expected = power * torch.as_tensor(prior) + likelihood
    torch.testing.assert_close(evaluation.log_joint, expected)
    torch.testing.assert_close(evaluation.log_prior, torch.as_tensor(prior))
