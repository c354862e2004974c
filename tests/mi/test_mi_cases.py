"""Every bound on cases of known mutual information: on its right side, and exact where it must be."""

import math
import warnings

import pytest
import torch
from mi_problems import PROBLEMS, linear_vae

from pyro_anneal import mi

NUM_PAIRS = 1000


BOUNDS = {
    "BarberAgakov": lambda p: mi.BarberAgakov(p.joint, p.guide, 4),
    "GIWAE": lambda p: mi.GIWAE(p.joint, p.guide, p.bad_critic(), 8),
    "IWAE": lambda p: mi.IWAE(p.joint, p.guide, 8),
    "RIWAE": lambda p: mi.RIWAE(
        p.joint, p.guide, 4, posterior=lambda x, n: p.posterior(x).sample((n,))
    ),
    "StructuredInfoNCE": lambda p: mi.StructuredInfoNCE(p.joint, 16),
    "InfoNCE in batch": lambda p: mi.InfoNCE(p.bad_critic(), 16),
    "InfoNCE fresh": lambda p: mi.InfoNCE(p.bad_critic(), 16, model=p.joint),
    "MINE-F in batch": lambda p: mi.MINE_F(p.bad_critic(), 8),
    "MINE-F fresh": lambda p: mi.MINE_F(p.bad_critic(), 8, model=p.joint),
    "MINE-F generalized": lambda p: mi.MINE_F(p.bad_critic(), 8, model=p.joint, guide=p.guide),
}


@pytest.mark.parametrize("bound_name", BOUNDS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_bound_is_on_its_side(name, bound_name):
    problem = PROBLEMS[name]()
    bound = BOUNDS[bound_name](problem)
    with warnings.catch_warnings():  # saturation has a test of its own
        warnings.filterwarnings("ignore", message=".*ceiling")
        est = bound.estimate(*problem.joint.sample(NUM_PAIRS))
    assert ("lower" in bound.directions) == (est.lower is not None)
    assert est.lower <= problem.truth + 5 * est.lower_std_error
    if "upper" in bound.directions:
        assert est.upper >= problem.truth - 5 * est.upper_std_error
        assert est.lower <= est.upper + 5 * (est.lower_std_error + est.upper_std_error)
    low, high = est.normal_interval(0.9999)
    assert low < problem.truth < high


@pytest.mark.parametrize("name", PROBLEMS)
def test_exact_guide_gives_equality(name):
    """With q = p(z|x) all weights equal p(x), so lower and upper coincide pair by pair."""
    problem = PROBLEMS[name]()
    x, z = problem.joint.sample(NUM_PAIRS)
    expected = problem.log_ratio(x, z)
    for bound in (
        mi.BarberAgakov(problem.joint, problem.posterior),
        mi.IWAE(problem.joint, problem.posterior, 3),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            est = bound.estimate(x, z)
        torch.testing.assert_close(est.pair_lower, expected, atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(est.pair_upper, expected, atol=1e-8, rtol=1e-8)
        assert abs(est.lower - problem.truth) < 5 * est.lower_std_error


@pytest.mark.parametrize("name", PROBLEMS)
def test_best_critic_makes_giwae_equal_iwae(name):
    """T = log p(x, z) / q(z|x), up to any function of x, gives the IWAE lower bound."""
    problem = PROBLEMS[name]()
    joint, guide = problem.joint, problem.guide

    def best(x, z):
        log_joint = joint.likelihood(z).log_prob(x) + joint.prior.log_prob(z)
        return log_joint - guide(x).log_prob(z) + 3.0 * problem.log_marginal(x)

    x, z = joint.sample(200)
    torch.manual_seed(1)
    giwae = mi.GIWAE(joint, guide, problem.critic(best), 6).estimate(x, z)
    torch.manual_seed(1)
    z_draws = guide(x).sample((5,))
    log_w = torch.cat([z.unsqueeze(0), z_draws])
    log_w = (
        joint.likelihood(log_w).log_prob(x)
        + joint.prior.log_prob(log_w)
        - guide(x).log_prob(log_w)
    )
    expected = joint.likelihood(z).log_prob(x) - (log_w.logsumexp(0) - math.log(6))
    torch.testing.assert_close(giwae.pair_lower, expected)


def test_linear_vae_truths():
    """0.5 log det(I + W'W) for the first seeds, from the table of cases."""
    truths = [22.735186, 22.663755, 22.909958, 22.897653, 22.330593]
    for seed, truth in enumerate(truths):
        assert linear_vae(seed).truth == pytest.approx(truth, abs=1e-6)


def test_plug_in_mine_dv_overshoots_and_declares_no_direction():
    """With the best critic on M01 (I = 22.7) the plug-in estimate lies far above I."""
    problem = linear_vae()
    values = []
    for num_pairs in (100, 1000):
        x, z = problem.joint.sample(num_pairs)
        bound = mi.MINE_DV(problem.best_critic(), 1)
        with pytest.warns(UserWarning, match="log N"):
            est = bound.estimate(x, z)
        assert est.lower is None
        assert est.upper is None
        assert est.normal_interval() == (-math.inf, math.inf)
        assert est.ceiling == pytest.approx(math.log(num_pairs))
        assert "no direction" in repr(est)
        values.append(est.plug_in)
    assert values[0] > values[1] > problem.truth + 10.0
