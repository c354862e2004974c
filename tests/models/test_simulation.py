"""Exact pairs, and the arguments that a guide sees on simulated data."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer.reparam
import pytest
import torch
from pyro import poutine
from scipy import stats

from pyro_anneal import AnnealedImportance
from pyro_anneal.models.simulation import guide_arguments, simulate

X = torch.tensor([0.4, 1.9, -0.3], dtype=torch.float64)


def plain(x):
    z = pyro.sample("z", dist.Normal(0.5, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.5), obs=x)


def test_log_joint_and_shapes():
    pair = simulate(plain, ((X,), {}))
    z, x = pair.latents["z"], pair.observed["x"]
    assert x.shape == X.shape
    assert not torch.equal(x, X)
    assert pair.original["x"] is X
    expected = stats.norm(0.5, 2.0).logpdf(z) + stats.norm(float(z), 1.5).logpdf(x).sum()
    assert pair.log_joint == pytest.approx(float(expected), abs=1e-10)


def test_pairs_follow_the_joint():
    pairs = [simulate(plain, ((X,), {})) for _ in range(800)]
    z = torch.stack([p.latents["z"] for p in pairs])
    x = torch.stack([p.observed["x"][1] for p in pairs])
    joint = torch.stack([z, x]).numpy()
    # E[z x] = 0.25 + 4, with the standard error measured here.
    product = joint[0] * joint[1]
    assert abs(product.mean() - 4.25) <= 5 * product.std() / math.sqrt(len(product))
    assert abs(x.mean() - 0.5) <= 5 * x.std() / math.sqrt(len(x))


def factor(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("penalty", -z.square())
    pyro.sample("x", dist.Normal(z, 1.0).expand([3]).to_event(1), obs=x)


def weighted_delta(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0).expand([3]).to_event(1), obs=x)
    pyro.sample("spike", dist.Delta(z, log_density=-z.square()), obs=z)


def improper(x):
    z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("x", dist.Normal(z, 1.0).expand([3]).to_event(1), obs=x)


def flat(x):
    with poutine.mask(mask=False):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def subsampled(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3, subsample_size=2) as i:
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (flat, 'the prior of site "z" is flat'),
        (factor, r'pyro.factor\("penalty"\) changes the joint'),
        (poutine.scale(plain, scale=2.0), 'poutine.scale acts on site "z"'),
        (weighted_delta, 'site "spike" is a Delta with its own log_density'),
        (improper, 'site "z" is improper'),
        (subsampled, 'plate "data" is subsampled'),
    ],
)
def test_inexact_simulation_raises(model, message):
    with pytest.raises(ValueError, match=message):
        simulate(model, ((X,), {}))
    ais = AnnealedImportance(model, progress_bar=False, num_steps=2)
    with pytest.raises(ValueError, match=message):
        ais.sandwich(X)


def test_autoregressive_mean_of_the_argument_raises():
    def model(y):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("time", len(y) - 1):
            pyro.sample("y", dist.Normal(b * y[:-1], 1.0), obs=y[1:])

    with pytest.raises(ValueError, match=r"elsewhere than at the observed sites \['y'\]"):
        simulate(model, ((X,), {}))


def test_autoregression_on_returned_values_is_exact():
    def model(y):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        last = y.new_zeros(())
        for t in range(len(y)):
            last = pyro.sample(f"y_{t}", dist.Normal(b * last, 1.0), obs=y[t])

    pair = simulate(model, ((X,), {}))
    assert set(pair.observed) == {"y_0", "y_1", "y_2"}


def test_prior_from_the_data_raises():
    def model(x):
        z = pyro.sample("z", dist.Normal(x.mean(), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="uses its data elsewhere"):
        simulate(model, ((X,), {}))


def test_masked_data_that_influence_others_raise():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=torch.tensor(False)):
            first = pyro.sample("first", dist.Normal(z, 1.0), obs=x[0])
        pyro.sample("second", dist.Normal(first, 1.0), obs=x[1])

    with pytest.raises(ValueError, match=r"masked entries of \['first'\] influence other sites"):
        simulate(model, ((X,), {}))


@pytest.mark.parametrize("how", ["mask", "fn.mask", "obs_mask"])
def test_masked_data_are_exact(how):
    keep = torch.tensor([True, False, True])

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            if how == "mask":
                with poutine.mask(mask=keep):
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            elif how == "fn.mask":
                pyro.sample("x", dist.Normal(z, 1.0).mask(keep), obs=x)
            else:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=keep)

    pair = simulate(model, ((X,), {}))
    name = "x_observed" if how == "obs_mask" else "x"
    assert set(pair.observed) == {name}
    z, x = float(pair.latents["z"]), pair.observed[name].numpy()[[0, 2]]
    expected = stats.norm.logpdf(z) + stats.norm(z).logpdf(x).sum()
    if how == "obs_mask":
        expected += stats.norm(z).logpdf(pair.latents["x_unobserved"][1])
    assert pair.log_joint == pytest.approx(float(expected), abs=1e-10)


def test_reparameterized_latent_stays_tied_to_its_noise():
    def centred(x):
        z = pyro.sample("z", dist.Normal(0.5, torch.tensor(2.0)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    config = {"z": pyro.infer.reparam.LocScaleReparam(0.0)}
    pair = simulate(poutine.reparam(centred, config=config), ((X,), {}))
    assert set(pair.latents) == {"z_decentered"}
    assert set(pair.observed) == {"x"}  # not z, which is computed
    z = 0.5 + 2.0 * float(pair.latents["z_decentered"])
    assert abs(float(pair.observed["x"].mean()) - z) < 0.5


# ---- which arguments the guide sees


def pair_for(x):
    return simulate(plain, ((x,), {}))


def test_identical_argument_is_replaced_and_covariates_are_kept():
    pair, covariate = pair_for(X), torch.ones(3)
    (x, c), kwargs = guide_arguments(((X, covariate), {"x": X, "n": 3}), pair)
    torch.testing.assert_close(x, pair.observed["x"], rtol=0, atol=0)
    torch.testing.assert_close(kwargs["x"], pair.observed["x"], rtol=0, atol=0)
    assert c is covariate
    assert kwargs["n"] == 3


def test_reshaped_strided_and_nested_arguments_are_replaced():
    table = torch.arange(12.0).reshape(3, 4)
    column = table[:, 1]  # not contiguous
    pair = simulate(plain, ((column,), {}))
    simulated = pair.observed["x"]
    ((rows,), inner), _ = guide_arguments((([column.reshape(3, 1)], {"c": table[:, 0]}), {}), pair)
    torch.testing.assert_close(rows, simulated.reshape(3, 1), rtol=0, atol=0)
    torch.testing.assert_close(inner["c"], table[:, 0], rtol=0, atol=0)  # same storage, apart
    (whole,), _ = guide_arguments(((table,), {}), pair)
    expected = table.clone()
    expected[:, 1] = simulated
    torch.testing.assert_close(whole, expected, rtol=0, atol=0)
    assert table[0, 1] == 1.0  # the user's data stay


def test_numpy_argument_is_replaced():
    array = np.array([0.4, 1.9, -0.3])
    pair = simulate(lambda a: plain(torch.from_numpy(a)), ((array,), {}))
    (new,), _ = guide_arguments(((array,), {}), pair)
    np.testing.assert_array_equal(new, pair.observed["x"].numpy())


@pytest.mark.parametrize("change", [torch.clone, lambda x: (x - x.mean()) / x.std()])
def test_copy_or_transform_raises_and_make_args_works(change):
    pair = pair_for(X)
    with pytest.raises(ValueError, match=r"site\(s\) \['x'\].*make_args=lambda observed"):
        guide_arguments(((change(X),), {}), pair)
    args, kwargs = guide_arguments(
        ((change(X),), {}), pair, lambda observed: ((change(observed["x"]),), {"flag": True})
    )
    torch.testing.assert_close(args[0], change(pair.observed["x"]))
    assert kwargs == {"flag": True}


def test_two_sites_on_the_same_data_are_ambiguous():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(z, 1.0), obs=x)
            pyro.sample("b", dist.Normal(z, 2.0), obs=x)

    with pytest.raises(ValueError, match=r"site\(s\) \['b'\] share memory"):
        guide_arguments(((X,), {}), simulate(model, ((X,), {})))


def test_expanded_data_are_ambiguous():
    x = torch.tensor([0.5]).expand(3)  # three observations in one place of memory
    pair = pair_for(x)
    assert len(pair.observed["x"].unique()) == 3
    with pytest.raises(ValueError, match=r"site\(s\) \['x'\] share memory"):
        guide_arguments(((x,), {}), pair)


def test_guide_of_a_sandwich_sees_simulated_data():
    seen = []

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        seen.append(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2.0, math.sqrt(0.5)))

    ais = AnnealedImportance(model, guide, num_chains=3, num_steps=2, progress_bar=False, seed=3)
    sandwich = ais.sandwich(X)
    x = sandwich.simulated["x"]
    assert all(torch.equal(value, x) for value in seen)
    # The guide is the posterior: both bounds equal the evidence, N(x; 0, sqrt 2).
    truth = torch.as_tensor(stats.norm(0.0, math.sqrt(2.0)).logpdf(x))
    torch.testing.assert_close(sandwich.lower, truth, rtol=0, atol=1e-10)
    torch.testing.assert_close(sandwich.upper, truth, rtol=0, atol=1e-10)


def recorded(x):
    """The mean of each row goes through a deterministic site inside the plate."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 0.7))
        mean = pyro.deterministic("mean", z.exp())
        pyro.sample("x", dist.Normal(mean, 0.2), obs=x)


def test_deterministic_sites_keep_their_shape():
    pair = simulate(recorded, ((X,), {}))
    assert pair.observed["x"].shape == X.shape
    assert set(pair.observed) == {"x"}


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")  # eight chains, forty steps
def test_deterministic_sites_do_not_change_information():
    """Beside quadrature of log p(x); the simulation was of [N, N] numbers once, and 3.7 nats."""
    z, step = np.linspace(-3.5, 3.5, 801, retstep=True)
    x, width = np.linspace(-1.5, 35.0, 4001, retstep=True)
    prior = stats.norm(0.0, 0.7).pdf(z) * step
    likelihood = stats.norm(np.exp(z)[:, None], 0.2).pdf(x)
    marginal = prior @ likelihood
    known = np.where(marginal > 0.0, -marginal * np.log(np.maximum(marginal, 1e-300)), 0.0)
    truth = known.sum() * width - 0.5 * math.log(2.0 * math.pi * math.e * 0.04)
    ais = AnnealedImportance(recorded, num_chains=8, num_steps=40, seed=0, progress_bar=False)
    found = ais.mutual_information(torch.ones(100))
    low, high = found.normal_interval(0.9999)
    assert low < truth < high
    assert found.gap < 0.3
