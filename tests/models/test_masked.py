"""NaN under a mask: the value is right, or the message names NaN."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats

from pyro_anneal import AnnealedImportance

NAN = math.nan
tensor = torch.tensor


def run(model, guide="auto", *, num_chains=32, num_steps=60):
    ais = AnnealedImportance(
        model, guide, num_chains=num_chains, num_steps=num_steps, seed=0, progress_bar=False
    )
    return ais.run()


def near(result, truth):
    error = abs(float(result.log_evidence) - truth)
    return error <= 4.0 * float(result.std_error) + 0.005


def gaussian(design, y, noise):
    covariance = [
        [a * b + (noise**2 if i == j else 0.0) for j, b in enumerate(design)]
        for i, a in enumerate(design)
    ]
    return float(stats.multivariate_normal.logpdf(y, [0.0] * len(y), covariance))


X = [NAN, 1.0, 2.0, 0.5]
Y = [NAN, 0.3, 1.7, NAN]


def regression(fill):
    def model():
        x, y = tensor(X), tensor(Y)
        x = x.nan_to_num() if fill else x
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4), poutine.mask(mask=~y.isnan()):
            pyro.sample("eps", dist.Normal(loc * x, 1.0), obs=y)

    return model


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)]
)
def test_missing_data_under_a_mask(dtype):
    torch.set_default_dtype(dtype)
    truth = gaussian([1.0, 2.0], [0.3, 1.7], 1.0)
    assert truth == pytest.approx(-3.083, abs=1e-3)
    result = run(regression(fill=True))
    assert near(result, truth)
    assert int(result.num_diverging.sum()) == 0


def test_missing_covariates_under_a_mask_are_refused_by_name():
    with pytest.raises(ValueError, match=r'"eps" the log density is NaN at 1 masked place.*fill'):
        run(regression(fill=False))


@pytest.mark.parametrize("guide", ["auto", pytest.param(None, marks=pytest.mark.slow)])
def test_obs_mask(guide):
    def model():
        y = tensor(Y)
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(loc, 1.0), obs=y, obs_mask=~y.isnan())
            pyro.sample("w", dist.Normal(z, 0.5), obs=torch.ones(4))

    # given loc: z and w are independent rows; marginally joint Gaussian
    names = [("z", 1), ("z", 2), ("w", 0), ("w", 1), ("w", 2), ("w", 3)]

    def covariance(a, b):
        value = 1.0  # loc
        value += 1.0 if a[1] == b[1] else 0.0  # the row's own z
        return value + (0.25 if a == b and a[0] == "w" else 0.0)

    matrix = [[covariance(a, b) for b in names] for a in names]
    observed = [0.3, 1.7, 1.0, 1.0, 1.0, 1.0]
    truth = float(stats.multivariate_normal.logpdf(observed, [0.0] * 6, matrix))
    assert truth == pytest.approx(-7.955, abs=1e-3)
    result = run(model, guide, num_chains=64)
    assert near(result, truth)
    assert int(result.num_diverging.sum()) == 0


def masked_family(kind):
    mask = tensor([True, False, True])

    def model():
        r = pyro.sample("r", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", 3):
            if kind == "Poisson, fn.mask":
                pyro.sample("y", dist.Poisson(r).mask(mask), obs=tensor([2.0, NAN, 1.0]))
            elif kind == "Exponential, poutine.mask":
                with poutine.mask(mask=mask):
                    pyro.sample("y", dist.Exponential(r), obs=tensor([2.0, NAN, 1.0]))
            elif kind == "event":
                y = tensor([[2.0, 0.5], [NAN, NAN], [1.0, 1.0]])
                fn = dist.Exponential(r).expand([3, 2]).to_event(1).mask(mask)
                pyro.sample("y", fn, obs=y)
            else:  # single entries of events
                y = tensor([[2.0, 0.5], [NAN, 3.0], [1.0, NAN]])
                fn = dist.Exponential(r).expand([3, 2]).mask(~y.isnan()).to_event(1)
                pyro.sample("y", fn, obs=y)

    return model


def gamma_evidence(count, total):
    """Exponential data of a rate from Gamma(2, 1)."""
    return math.lgamma(2 + count) - (2 + count) * math.log(1.0 + total)


TRUTHS = {
    "Poisson, fn.mask": math.lgamma(5.0) - 5.0 * math.log(3.0) - math.log(2.0),
    "Exponential, poutine.mask": gamma_evidence(2, 3.0),
    "event": gamma_evidence(4, 4.5),
    "entries of events": gamma_evidence(4, 6.5),
}


@pytest.mark.parametrize("kind", TRUTHS)
def test_other_families_and_places_of_masks(kind):
    result = run(masked_family(kind), num_steps=30)
    assert near(result, TRUTHS[kind])
    assert int(result.num_diverging.sum()) == 0


@pytest.mark.parametrize("validate", [None, pytest.param(False, marks=pytest.mark.slow)])
def test_distributions_that_take_nan_for_missing(validate):
    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            fn = dist.NanMaskedNormal(loc, 1.0, validate_args=validate)
            pyro.sample("y", fn, obs=tensor([0.3, NAN, 1.7]))

    result = run(model)
    assert near(result, gaussian([1.0, 1.0], [0.3, 1.7], 1.0))
    assert int(result.num_diverging.sum()) == 0


def test_vectors_with_missing_entries():
    def model():
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", 2):
            fn = dist.NanMaskedMultivariateNormal(loc, torch.eye(2))
            pyro.sample("y", fn, obs=tensor([[0.3, NAN], [1.0, -0.5]]))

    truth = gaussian([1.0, 1.0], [0.3, 1.0], 1.0) + gaussian([1.0], [-0.5], 1.0)
    assert near(run(model), truth)


def test_unmasked_nan_is_still_refused_by_name():
    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(loc, 1.0), obs=tensor(NAN))

    with pytest.raises(ValueError, match=r'"y" 1 observed value.* NaN and not masked'):
        run(model)
