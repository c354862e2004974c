"""Runs go to float64 by themselves where float32 loses a hundredth of a nat, and only there."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_anneal import AnnealedImportance


@pytest.fixture(autouse=True)
def _float32():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


def run(model, guide="auto", *, chains=16, steps=30, **options):
    ais = AnnealedImportance(
        model,
        guide,
        num_chains=chains,
        num_steps=steps,
        seed=0,
        progress_bar=False,
        cross_check=False,
        **options,
    )
    return ais.run()


def assert_right_in_float64(result, truth):
    assert any("computed in float64" in note and "float32" in note for note in result.notes)
    error = float(result.std_error)
    assert float(result.lower) == pytest.approx(truth, abs=max(5 * error, 1e-4))


def binomial(n):
    def model():
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        pyro.sample("x", dist.Binomial(n, p), obs=torch.tensor(n / 2))

    return model


@pytest.mark.parametrize("n", [pytest.param(1e7, marks=pytest.mark.slow), 1e8])
def test_large_binomial_counts(n):
    assert_right_in_float64(run(binomial(n)), -math.log(n + 1))


def test_large_counts_from_the_prior():
    assert_right_in_float64(run(binomial(1e7), None, chains=64, steps=300), -math.log(1e7 + 1))


@pytest.mark.parametrize("level", [pytest.param(1e6, marks=pytest.mark.slow), 1e8])
def test_large_poisson_counts(level):
    y = torch.tensor([level, 1.0001 * level, 0.9999 * level])

    def model():
        r = pyro.sample("r", dist.Gamma(2.0, 2.0 / level))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Poisson(r), obs=y)

    y64, rate = y.double(), float(torch.tensor(2.0 / level))
    truth = 2 * math.log(rate) - math.lgamma(2.0) + math.lgamma(2.0 + float(y64.sum()))
    truth -= (2.0 + float(y64.sum())) * math.log(rate + 3) + float(torch.lgamma(y64 + 1).sum())
    assert_right_in_float64(run(model), truth)


@pytest.mark.parametrize("guide", ["auto", None])
def test_a_latent_whose_grid_is_wider_than_its_posterior(guide):
    torch.manual_seed(0)
    y = torch.randn(50) * 0.1 + 1e6

    def model():
        m = pyro.sample("m", dist.Normal(1e6, 1.0))
        with pyro.plate("data", 50):
            pyro.sample("y", dist.Normal(m, 0.1), obs=y)

    covariance = torch.eye(50, dtype=torch.float64) * 0.01 + 1.0
    mean = torch.full((50,), 1e6, dtype=torch.float64)
    truth = torch.distributions.MultivariateNormal(mean, covariance).log_prob(y.double())
    result = run(model, guide, chains=16 if guide else 64, steps=30 if guide else 200)
    assert result.posterior["m"].dtype == torch.float64
    # The width .1 of the model is rounded to float32: its square to 3e-8, the sum to 1e-5.
    assert_right_in_float64(result, float(truth))


@pytest.mark.slow
def test_long_sums():
    torch.manual_seed(2)
    y = torch.randn(100_000) + 0.3

    def model():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    y64, n = y.double(), len(y)
    quadratic = float(y64.square().sum() - y64.sum() ** 2 / (n + 1))
    truth = -0.5 * (n * math.log(2 * math.pi) + math.log(n + 1) + quadratic)
    assert truth == pytest.approx(-141576.3065, abs=1e-3)
    assert_right_in_float64(run(model, steps=10), truth)


def test_float32_decoders_run_in_float64_where_counts_are_large():
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    y = torch.tensor([1e6, 1.001e6, 0.999e6])

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        rate = 1e6 * (1.0 + 0.003 * decoder(z).squeeze(-1))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    grid = torch.linspace(-8.0, 8.0, 40_001, dtype=torch.float64)
    wide = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    wide.load_state_dict(decoder.state_dict())
    with torch.no_grad():
        rate = 1e6 * (1.0 + 0.003 * wide(grid.unsqueeze(-1)))
        terms = torch.distributions.Poisson(rate).log_prob(y.double()).sum(-1)
    terms = terms + torch.distributions.Normal(0.0, 1.0).log_prob(grid)
    truth = float(terms.logsumexp(0) + math.log(float(grid[1] - grid[0])))
    assert_right_in_float64(run(model, None, chains=64, steps=100), truth)


@pytest.mark.filterwarnings("ignore:the weights differ")  # 30, from the prior, in few steps
def test_float32_stays_where_it_is_enough():
    def model():
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor([0.1, -1.0, 2.0, 30.0]))

    for guide in ("auto", None):
        result = run(model, guide)
        assert not any("float64" in note for note in result.notes)
        assert result.posterior["z"].dtype == torch.float32


@pytest.mark.parametrize("guide", ["auto", pytest.param(None, marks=pytest.mark.slow)])
def test_mixed_inputs(guide):
    y = torch.linspace(-1, 1, 5, dtype=torch.float64)

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 2.0))
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(a, 0.3), obs=y)

    covariance = torch.eye(5, dtype=torch.float64) * 0.09 + 4.0
    truth = torch.distributions.MultivariateNormal(torch.zeros(5).double(), covariance)
    result = run(model, guide, chains=64)
    assert float(result.lower) == pytest.approx(
        float(truth.log_prob(y)), abs=5 * float(result.std_error) + 1e-4
    )


def test_enumerated_sites_beside_data_in_float64():
    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 2):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(z + 2.0 * k, 1.0), obs=y)

    y = torch.tensor([0.5, 1.7], dtype=torch.float64)
    result = AnnealedImportance(
        model, num_chains=64, num_steps=10, seed=0, progress_bar=False
    ).run(y)
    covariance = torch.eye(2, dtype=torch.float64) + 1.0
    terms = []
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        mean = torch.tensor([2.0 * i, 2.0 * j], dtype=torch.float64)
        density = dist.MultivariateNormal(mean, covariance).log_prob(y)
        terms.append(density + math.log(0.3 ** (i + j) * 0.7 ** (2 - i - j)))
    truth = float(torch.stack(terms).logsumexp(0))
    assert float(result.lower) == pytest.approx(truth, abs=5 * float(result.std_error))
