"""Control variates from a surrogate that fresh pairs centre: mean zero, and what they remove."""

import math

import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_anneal import mi
from pyro_anneal.mi.surrogates import Surrogate


def counts():
    """Poisson counts, whose entropy torch does not know, of a Gamma rate."""
    return mi.DistributionJoint(dist.Gamma(2.0, 1.0), lambda z: dist.Poisson(3.0 * z))


def exact(x, z):
    """log p(x|z) - log p(x): the marginal is negative binomial."""
    marginal = torch.as_tensor(stats.nbinom(2.0, 0.25).logpmf(x.numpy()))
    return dist.Poisson(3.0 * z).log_prob(x).double() - marginal


def test_controls_have_mean_zero_and_follow_the_information():
    torch.manual_seed(0)
    joint = counts()
    surrogate = Surrogate.fit(joint, 5)
    x, z = joint.sample(20_000)
    controls = surrogate.controls(x, z, 0)
    error = controls.std(1) / len(x) ** 0.5
    assert bool((controls.mean(1).abs() < 4.5 * error).all())
    values = exact(x, z)
    design = torch.cat([controls, torch.ones(1, len(x))]).double().mT
    slope = torch.linalg.lstsq(design, values.unsqueeze(1)).solution
    left = (values - (design @ slope).squeeze(1)).var() / values.var()
    assert float(left) < 0.5
    again = surrogate.controls(x, z, 0)
    assert torch.equal(controls, again)
    assert not torch.equal(controls, surrogate.controls(x, z, 1))


def test_estimates_keep_their_mean_and_lose_variance():
    """A batch of 100 pairs at a time, against I by summation over the counts."""
    torch.manual_seed(1)
    u = (torch.arange(4000) + 0.5) / 4000
    rate = torch.as_tensor(stats.gamma.ppf(u.numpy(), 2.0))
    x = torch.arange(300.0, dtype=torch.float64)
    log_p = dist.Poisson(3.0 * rate.unsqueeze(1)).log_prob(x)
    marginal = torch.as_tensor(stats.nbinom(2.0, 0.25).logpmf(x.numpy()))
    truth = float((log_p.exp() * (log_p - marginal)).sum(1).mean())
    joint = counts()
    bound = mi.IWAE(joint, None, 64)
    values, widths = [], []
    for seed in range(40):
        plain = bound.estimate(num_pairs=100, seed=seed, control_variates=False)
        found = bound.estimate(num_pairs=100, seed=seed, control_variates="simulated")
        torch.testing.assert_close(
            found.pair_upper - found.pair_lower,
            plain.pair_upper - plain.pair_lower,
            atol=1e-5,
            rtol=1e-5,
        )
        values.append(float(0.5 * (found.lower + found.upper)))
        widths.append(float(found.lower_std_error / plain.lower_std_error))
    mean, error = torch.tensor(values).mean(), torch.tensor(values).std() / 40**0.5
    assert abs(mean - truth) < 4.5 * error + 0.01
    assert torch.tensor(widths).mean() < 0.75
    claimed = float(found.lower_std_error)
    assert 0.5 < float(torch.tensor(values).std()) / claimed < 1.7


def test_they_need_a_likelihood_and_a_known_word():
    prior = dist.Normal(0.0, 1.0)
    sampled = mi.DistributionJoint(prior, simulator=lambda z: z + torch.randn_like(z))
    bound = mi.GIWAE(sampled, lambda x: dist.Normal(0.5 * x, 1.0), lambda x, z: (x * z).sum(-1), 4)
    with pytest.raises(ValueError, match="full joint"):
        bound.estimate(num_pairs=100, control_variates="simulated")
    with pytest.raises(ValueError, match="control_variates must be"):
        bound.estimate(num_pairs=100, control_variates="all")
    assert math.isfinite(float(bound.estimate(num_pairs=100, seed=0).lower))
