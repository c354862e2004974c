"""Latents whose densities are normalized on sets that torch does not declare, or that move."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_anneal import mi

TURN = torch.linspace(-math.pi, math.pi, 2001, dtype=torch.float64)[:-1]
CUT = dist.VonMises(torch.tensor(2.5, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))


def around_a_cut():
    """An angle that an observation sees as a number: it jumps where the density does not."""
    z = pyro.sample("z", dist.VonMises(torch.tensor(2.5), torch.tensor(1.0)))
    pyro.sample("x", dist.Normal(z, 1.5), obs=torch.tensor(0.0))


def log_evidence_around_a_cut(x):
    log_joint = CUT.log_prob(TURN) + dist.Normal(TURN, 1.5).log_prob(x.unsqueeze(-1))
    return log_joint.logsumexp(-1) + math.log(2 * math.pi / len(TURN))


def under_a_bound():
    """A uniform latent below another latent."""
    top = pyro.sample("top", dist.Gamma(3.0, 2.0))
    below = pyro.sample("below", dist.Uniform(0.0, top))
    pyro.sample("x", dist.Normal(below, 0.3), obs=torch.tensor(0.0))


def log_evidence_under_a_bound(x):
    r"""p(below) = int_below^inf Gamma(t; 3, 2) / t dt = (1 + 2 below) exp(-2 below)."""
    below = torch.linspace(0.0, 12.0, 6001, dtype=torch.float64)
    log_prior = torch.log1p(2.0 * below) - 2.0 * below
    log_joint = log_prior + dist.Normal(below, 0.3).log_prob(x.unsqueeze(-1))
    edges = torch.tensor([0, -1])
    log_joint[:, edges] -= math.log(2.0)  # the trapezoidal rule
    return log_joint.logsumexp(-1) + math.log(12.0 / 6000)


def from_distributions():
    return mi.DistributionJoint(CUT, lambda z: dist.Normal(z, 1.5))


@pytest.mark.parametrize(
    ("make", "log_evidence"),
    [
        (lambda: mi.PyroJoint(around_a_cut), log_evidence_around_a_cut),
        (from_distributions, log_evidence_around_a_cut),
        (lambda: mi.PyroJoint(under_a_bound), log_evidence_under_a_bound),
    ],
    ids=["angle of a Pyro model", "angle of distributions", "moving bound"],
)
def test_both_bounds_where_the_density_is_normalized(make, log_evidence):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    joint = make()
    x, z = joint.sample(300)
    exact = joint.log_likelihood(x, z) - log_evidence(x)
    est = mi.AIS(joint, num_chains=4, num_steps=20).estimate(x, z, seed=1)
    below, above = exact - est.pair_lower, est.pair_upper - exact
    for deficit in (below, above):
        error = deficit.std() / len(deficit) ** 0.5
        assert -5 * error < deficit.mean() < 0.1 + 5 * error
    assert est.gap < 0.2


def test_both_identities_hold_for_angles():
    """E[e^L / p(x)] = 1 and E[p(x) e^-U] = 1, over pairs, from a guide that is wrong."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    joint = from_distributions()
    x, z = joint.sample(1500)
    bound = mi.AIS(
        joint, lambda x: dist.VonMises(x, 1.5), num_chains=2, num_steps=4, resampling=False
    )
    est = bound.estimate(x, z, seed=1)
    exact = joint.log_likelihood(x, z) - log_evidence_around_a_cut(x)
    for log_ratio in (exact - est.pair_upper, est.pair_lower - exact):
        ratio = log_ratio.exp()
        assert (ratio.mean() - 1.0).abs() < 5 * ratio.std() / len(ratio) ** 0.5


def test_mine_ais_on_the_circle():
    """The normalizer of a von Mises guide tilted by a critic that jumps at the cut."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    guide = lambda x: dist.VonMises(x, 2.0)
    bound = mi.MINEAIS(
        dist.VonMises(torch.tensor(0.0), torch.tensor(1.0)),
        guide,
        lambda x, z: 1.5 * z.sum(-1),
        num_chains=16,
        num_steps=60,
    )
    x = torch.tensor([0.0, 2.0, 3.0]).repeat(20)
    grid = TURN + math.pi / len(TURN)  # midpoints
    log_z = (guide(x.unsqueeze(-1)).log_prob(grid) + 1.5 * grid).logsumexp(-1)
    log_z = log_z + math.log(2 * math.pi / len(TURN))
    est = bound.estimate(x, dist.VonMises(x, 2.0).sample(), seed=0)
    assert (est.measurements["log_z_lower"] - log_z.mean()).abs() < 0.03
    draws = bound.sample_posterior(x[:3], 600, seed=0)
    weights = (guide(x[:3].unsqueeze(-1)).log_prob(grid) + 1.5 * grid).softmax(-1)
    mean = (weights * grid).sum(-1)
    deviation = ((weights * grid.square()).sum(-1) - mean.square()).sqrt()
    assert ((draws.mean(0) - mean).abs() < 5 * deviation / 600**0.5 + 0.05).all()
