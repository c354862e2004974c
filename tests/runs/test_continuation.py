import copy
import dataclasses
import math
import pickle
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_anneal import AnnealedImportance, AnnealedRun, compare
from pyro_anneal.results.arviz import to_datasets

pytestmark = [
    pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning"),
    pytest.mark.filterwarnings("ignore:The inplace keyword"),  # ArviZ on pandas 3.1
]
X = torch.tensor([0.4, -2.0, 1.1, 3.0], dtype=torch.float64)


def _gamma_model(counts):  # Gamma(2, 1) prior, Poisson counts: a skewed posterior in closed form
    rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0, dtype=torch.float64), 1.0))
    with pyro.plate("data", len(counts)):
        pyro.sample("x", dist.Poisson(rate), obs=counts)


COUNTS = torch.tensor([1.0, 0.0, 4.0, 2.0, 1.0, 3.0, 0.0, 2.0], dtype=torch.float64)


@pytest.fixture(scope="module")
def run():
    ais = AnnealedImportance(
        _gamma_model, num_chains=24, num_steps=60, compile=False, progress_bar=False, seed=3
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ais.run(COUNTS)


def test_draws_are_of_the_posterior_and_do_not_repeat_the_ends(run):
    n = 2400
    rate = run.posterior_samples(n, seed=1)["rate"]
    assert rate.shape == (n,)
    truth = torch.distributions.Gamma(2.0 + 13.0, 1.0 + 8.0)  # conjugate
    assert len(rate.unique()) > 0.9 * n
    # The standard error comes from the means of the 24 chains, which are independent.
    chains = rate.reshape(-1, 24)
    for moment, expected in (
        (chains, truth.mean),
        ((chains - truth.mean) ** 2, truth.variance),
        ((chains > 2.0).double(), _upper_tail(2.0)),
    ):
        means = moment.mean(0)
        error = means.std() / math.sqrt(24)
        assert error < 0.2 * expected
        assert (means.mean() - expected).abs() < 5 * error


def _upper_tail(cut):  # of Gamma(15, 9): a Poisson probability
    mean = 9.0 * cut
    return math.exp(-mean) * sum(mean**k / math.factorial(k) for k in range(15))


def test_draws_depend_on_the_seed_alone(run):
    state = torch.get_rng_state()
    first = run.posterior_samples(30, seed=1)["rate"]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, run.posterior_samples(30, seed=1)["rate"])
    assert not torch.equal(first, run.posterior_samples(30, seed=2)["rate"])
    assert run.posterior_samples(5, thin=1, seed=1)["rate"].shape == (5,)
    torch.manual_seed(0)
    a = run.posterior_samples(3)["rate"]
    torch.manual_seed(0)
    assert torch.equal(a, run.posterior_samples(3)["rate"])


def test_weights_decide_per_datum():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), dtype=x.dtype), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    ais = AnnealedImportance(
        model, num_chains=40, num_steps=30, compile=False, progress_bar=False, seed=0
    )
    run = ais.run(X)
    z = run.posterior_samples(2000, thin=3, seed=0)["z"]
    assert z.shape == (2000, 4)
    chains = z.reshape(-1, 40, 4).mean(0)
    assert ((chains.mean(0) - 0.8 * X).abs() < 5 * chains.std(0) / math.sqrt(40)).all()
    # the ends' weights matter: without moves, chains of no weight give no draw
    weights = run.log_weights.clone()
    weights[1:, 0] = -math.inf
    handle = dataclasses.replace(run.continuation, log_weights=weights)
    still = handle.draw(40, thin=0, seed=0)["z"]
    assert len(still[:, 0].unique()) == 1
    assert len(still[:, 1].unique()) > 10


def test_what_cannot_be_continued_says_so(run, tmp_path):
    run.save(tmp_path / "run")
    for other in (
        AnnealedRun.load(tmp_path / "run"),
        pickle.loads(pickle.dumps(run)),
        copy.copy(run),
    ):
        assert torch.equal(other.log_weights, run.log_weights)
        with pytest.raises(ValueError, match=r"kept only in the process.*resample\(n\)"):
            other.posterior_samples(3)
    with pytest.raises(ValueError, match="num_samples"):
        run.posterior_samples(0)
    ais = AnnealedImportance(_gamma_model, num_chains=2, num_steps=2, progress_bar=False, seed=0)
    reverse = ais.run_reverse({"rate": torch.ones(2, dtype=torch.float64)}, COUNTS)
    with pytest.raises(ValueError, match="needs a forward run"):
        reverse.posterior_samples(3)
    with pytest.raises(ValueError, match="several simulated data sets"):
        ais.sandwich(COUNTS, num_simulations=2).to_arviz(log_likelihood=True)


def test_a_sandwich_continues_on_its_simulated_data():
    ais = AnnealedImportance(
        _gamma_model, num_chains=24, num_steps=40, compile=False, progress_bar=False, seed=1
    )
    sandwich = ais.sandwich(COUNTS)
    counts = sandwich.simulated["x"]
    assert not torch.equal(counts, COUNTS)
    truth = torch.distributions.Gamma(2.0 + counts.sum(), 9.0)
    chains = sandwich.posterior_samples(1200, seed=1)["rate"].reshape(-1, 24).mean(0)
    assert (chains.mean() - truth.mean).abs() < 5 * chains.std() / math.sqrt(24)
    groups = to_datasets(sandwich, log_likelihood=True, num_samples=50, seed=2)
    rate = torch.tensor(groups["posterior"]["rate"].values[0])
    expected = torch.distributions.Poisson(rate[:, None]).log_prob(counts)
    np.testing.assert_allclose(groups["log_likelihood"]["x"].values[0], expected.numpy())
    assert all(group.attrs["simulated_data"] == 1 for group in groups.values())


def test_log_likelihood_of_each_datum(run):
    arviz = _arviz()
    data = run.to_arviz(log_likelihood=True, num_samples=400, seed=4)
    rate = data.posterior["rate"].values[0]
    assert rate.shape == (400,)
    values = data.log_likelihood["x"].values[0]
    expected = torch.distributions.Poisson(torch.tensor(rate)[:, None]).log_prob(COUNTS)
    np.testing.assert_allclose(values, expected.numpy())
    assert "log_weight" not in data.sample_stats
    loo = arviz.loo(data)
    # Exact leave-one-out: the predictive of a count is negative binomial.
    exact = 0.0
    for count in COUNTS.tolist():
        shape, rest = 2.0 + COUNTS.sum().item() - count, 1.0 + 7.0
        exact += (
            math.lgamma(shape + count)
            - math.lgamma(shape)
            - math.lgamma(count + 1.0)
            + shape * math.log(rest / (rest + 1.0))
            - count * math.log(rest + 1.0)
        )
    assert float(loo.elpd_loo if "elpd_loo" in dir(loo) else loo.elpd) == pytest.approx(
        exact, abs=0.2
    )


def _arviz():
    pytest.importorskip("xarray")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return pytest.importorskip("arviz")


def test_arviz_compares_models_by_leave_one_out():
    arviz = _arviz()

    def model(x, scale):
        m = pyro.sample("m", dist.Normal(torch.zeros((), dtype=x.dtype), 3.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, scale), obs=x)

    torch.manual_seed(0)
    x = torch.randn(20, dtype=torch.float64)
    ais = AnnealedImportance(
        model, num_chains=16, num_steps=40, compile=False, progress_bar=False, seed=0
    )
    runs = {f"sd {scale:g}": ais.run(x, scale) for scale in (1.0, 5.0)}
    table = arviz.compare({n: r.to_arviz(log_likelihood=True, seed=0) for n, r in runs.items()})
    assert list(table.index) == ["sd 1", "sd 5"] == list(compare(runs).names)


def test_summed_out_sites_have_no_pointwise_likelihood():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(torch.zeros((), dtype=x.dtype), 3.0))
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc + 4.0 * s, 1.0), obs=x)

    ais = AnnealedImportance(
        model, num_chains=4, num_steps=10, compile=False, progress_bar=False, seed=0
    )
    run = ais.run(X)
    assert run.posterior_samples(6, seed=0)["loc"].shape == (6,)
    with pytest.raises(ValueError, match=r"site\(s\) \['s'\] have no draws"):
        run.to_arviz(log_likelihood=True)
