"""Densities, bounds, samples and gradients of TRS, LARS, SNIS and HIS against quadrature."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from eim_truths import (
    GRID,
    LOC,
    POINTS,
    SCALE,
    STEP,
    accept,
    assert_mean,
    energy,
    his_density,
    log_accept,
    normal,
    snis_density,
    trs_density,
)

from pyro_anneal.eim import HIS, LARS, SNIS, TRS, MovingAverageNormalizer
from pyro_anneal.eim.trs import _log_subset_sum, log_one_minus_exp

TEMPERING = (-0.3, 0.1, -0.2)


def proposal():
    return dist.Normal(LOC, SCALE)


def momentum_guide(x):
    return dist.Normal(0.2 * x, 1.3 + 0.1 * torch.tanh(x))


def his(num_steps=3, guide=momentum_guide, **options):
    tempering = torch.tensor(TEMPERING[:num_steps])
    return HIS(
        proposal(),
        energy,
        num_steps,
        guide,
        step_size=0.35,
        log_tempering=tempering,
        **options,
    )


CASES = {
    "snis-2": (lambda **o: SNIS(proposal(), energy, 2, **o), lambda x: snis_density(x, 2)),
    "snis-3": (lambda **o: SNIS(proposal(), energy, 3, **o), lambda x: snis_density(x, 3)),
    "trs-1": (lambda **o: TRS(proposal(), log_accept, 1, **o), lambda x: trs_density(x, 1)),
    "trs-2": (lambda **o: TRS(proposal(), log_accept, 2, **o), lambda x: trs_density(x, 2)),
    "trs-9": (lambda **o: TRS(proposal(), log_accept, 9, **o), lambda x: trs_density(x, 9)),
    "his-3": (his, lambda x: his_density(x, 3, 0.35, TEMPERING)),
    "his-default-guide": (
        lambda **o: his(1, None, **o),
        lambda x: his_density(x, 1, 0.35, TEMPERING[:1]),
    ),
}


@pytest.mark.parametrize("num_particles", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_exponential_of_log_prob_is_unbiased_for_the_density(case, num_particles):
    build, density = CASES[case]
    bound = build(num_particles=num_particles).log_prob(POINTS.expand(20_000, -1))
    assert_mean(bound.exp(), density(POINTS), sigmas=4.0)


@pytest.mark.parametrize("case", CASES)
def test_log_prob_is_a_lower_bound_that_tightens_with_particles(case):
    build, density = CASES[case]
    one, many = (
        build().log_prob_bound(POINTS.expand(20_000, -1), num_particles=m) for m in (1, 16)
    )
    error = (one.var(0) / len(one) + many.var(0) / len(many)).sqrt()
    truth = density(POINTS).log()
    assert (many.mean(0) <= truth + 5.0 * error + 1e-12).all()
    assert (one.mean(0) <= many.mean(0) + 5.0 * error + 1e-12).all()
    if case != "trs-1":
        assert (one.mean(0) < many.mean(0)).any()
        assert ((truth - many.mean(0)) < 0.25 * (truth - one.mean(0)) + 5.0 * error).all()


@pytest.mark.parametrize("case", CASES)
def test_samples_follow_the_density(case):
    build, density = CASES[case]
    samples = build().sample((40_000,))
    mass = density(GRID[::4]) * STEP * 4
    assert mass.sum().item() == pytest.approx(1.0, abs=1e-6)
    for statistic in (lambda x: x, torch.square, lambda x: torch.sin(2.0 * x), accept):
        assert_mean(statistic(samples), (statistic(GRID[::4]) * mass).sum())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("case", ["snis-2", "trs-9"])
def test_sharing_proposals_keeps_every_value_unbiased(case, shared):
    build, density = CASES[case]
    d = build()
    bound = torch.stack([d.log_prob_bound(POINTS, 2, share_proposals=shared) for _ in range(2500)])
    assert_mean(bound.exp(), density(POINTS))
    product = bound.exp().prod(-1)
    independent = (product.mean() - density(POINTS).prod()).abs() < 5.0 * product.std() / 2500**0.5
    assert independent == (not shared)


@pytest.mark.parametrize("num_others", [1, 2, 5, 8])
def test_trs_averages_over_all_subsets(num_others):
    accepts = torch.rand(num_others) ** 3
    subset_means = [
        np.mean([math.prod((1.0 - accepts[list(s)]).tolist()) for s in subsets])
        for t in range(num_others + 1)
        for subsets in [list(itertools.combinations(range(num_others), t))]
    ]
    log_sum = _log_subset_sum(accepts.log())
    assert log_sum.item() == pytest.approx(math.log(sum(subset_means)), abs=1e-13)
    # The whole ratio, written as the density is: trials before the last, and the forced one.
    own = torch.tensor(0.37)
    expected = math.log(0.37 * sum(subset_means[:-1]) + subset_means[-1])
    ratio = TRS(proposal(), log_accept, num_others + 1)._log_ratio(own.log(), accepts.log())
    assert ratio.item() == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("spread", [1.0, 8.0, 60.0])
@pytest.mark.parametrize("num_others", [31, 1023, 4095])
def test_trs_quadrature_matches_the_recursion_of_subset_means(num_others, spread):
    log_accepts = torch.nn.functional.logsigmoid(spread * torch.randn(num_others) - 2.0)
    rejects = (-np.expm1(log_accepts.numpy())).astype(np.longdouble)
    means = np.zeros(num_others + 1, dtype=np.longdouble)
    means[0] = 1.0
    for n, reject in enumerate(rejects, start=1):  # means of products over subsets of n rejections
        t = np.arange(1, n + 1)
        means[1 : n + 1] = (1 - t / n) * means[1 : n + 1] + (t / n) * reject * means[:n]
    expected = float(np.log(means.sum()))
    assert _log_subset_sum(log_accepts).item() == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("log_value", [0.0, math.log(0.1), -30.0, -700.0, -1e5])
@pytest.mark.parametrize("num_trials", [1, 2, 1024])
def test_trs_with_constant_acceptance_is_the_proposal(num_trials, log_value):
    d = TRS(proposal(), lambda x: torch.full_like(x, log_value), num_trials)
    torch.testing.assert_close(d.log_prob(POINTS), proposal().log_prob(POINTS), rtol=0, atol=1e-10)


def test_trs_is_tighter_than_one_order_and_than_a_variational_trial():
    def narrow(x):  # nearly binary, accepts the tails: Z = 0.022
        return torch.nn.functional.logsigmoid(20.0 * (x.abs() - 2.3))

    base, x, num_trials = dist.Normal(0.0, 1.0), torch.tensor(2.5).expand(400), 1024
    normalizer = float((narrow(GRID).exp() * normal(GRID, 0.0, 1.0)).sum() * STEP)
    own, rest = narrow(x[0]).exp(), (1.0 - normalizer) ** (num_trials - 1)
    truth = base.log_prob(x[0]) + torch.log(own * (1.0 - rest) / normalizer + rest)
    gap = truth - TRS(base, narrow, num_trials).log_prob(x).mean()
    rejected = log_one_minus_exp(narrow(base.sample((num_trials - 1, 400)))).cumsum(0)
    terms = torch.cat([narrow(x)[None], narrow(x) + rejected[:-1], rejected[-1:]])
    gap_one_order = truth - (base.log_prob(x) + torch.logsumexp(terms, 0)).mean()
    gap_variational = min(
        truth - LARS(base, narrow, num_trials, log_normalizer=level).log_prob(x).mean()
        for level in torch.logspace(-4.0, -0.1, 20).log()
    )
    assert -0.01 < gap < 0.05
    assert 0.3 < gap_one_order < 0.6
    assert 1.5 < gap_variational < 2.2


def test_trs_forced_acceptance_has_no_log_accept_term():
    # At a = 0.1, T = 2 a log a(x) at the last trial would cost 2 nats; the bound is exact.
    d = TRS(proposal(), lambda x: torch.full_like(x, 0.1).log(), 2)
    assert (d.log_prob(POINTS) - normal(POINTS).log()).abs().max() < 1e-14


@pytest.mark.parametrize("level", [-1e4, 0.0, 3.7, 1e4])
@pytest.mark.parametrize("num_samples", [1, 2, 1024])
def test_snis_with_constant_energy_is_the_proposal(num_samples, level):
    d = SNIS(proposal(), lambda x: torch.full_like(x, level), num_samples)
    torch.testing.assert_close(d.log_prob(POINTS), proposal().log_prob(POINTS), rtol=0, atol=1e-11)


def test_untempered_his_without_leapfrogs_is_the_proposal():
    d = HIS(proposal(), energy, num_steps=0, momentum_guide=momentum_guide, num_particles=64)
    bound = d.log_prob_bound(POINTS.expand(2000, -1), num_particles=8)
    assert_mean(bound.exp(), normal(POINTS))
    exact = HIS(proposal(), energy, num_steps=0)  # the default guide is exact: zero variance
    assert (exact.log_prob(POINTS) - normal(POINTS).log()).abs().max() < 1e-14


def test_snis_approaches_its_energy_model_and_his_does_not():
    log_normalizer = torch.log((torch.exp(-energy(GRID)) * normal(GRID)).sum() * STEP)
    limit = normal(POINTS).log() - energy(POINTS) - log_normalizer
    errors = []
    for num_samples in (16, 256, 4096):
        d = SNIS(proposal(), energy, num_samples)
        errors.append((d.log_prob_bound(POINTS, 500).detach() - limit).abs().max().item())
    assert errors[0] > 4.0 * errors[1] > 8.0 * errors[2]
    assert errors[2] < 0.01
    long = his_density(POINTS, 40, 0.35, [0.0] * 40).log()
    assert (long - limit).abs().max() > 0.1


def test_trs_approaches_its_energy_model():
    normalizer = (accept(GRID) * normal(GRID)).sum() * STEP
    limit = (normal(POINTS) * accept(POINTS) / normalizer).log()
    errors = []
    for num_trials in (2, 16, 1024):
        bound = TRS(proposal(), log_accept, num_trials).log_prob_bound(POINTS, 500)
        errors.append((bound - limit).abs().max().item())
    assert errors[0] > 2.0 * errors[1] > 20.0 * errors[2]
    assert errors[2] < 0.01


@pytest.mark.parametrize("log_own", [0.0, -5.0, -5000.0, -torch.inf])
def test_trs_does_not_underflow_at_a_thousand_trials(log_own):
    # Others accept with probability 0.9: all 1023 reject with probability 1e-1023.
    others = torch.full((1023,), 0.9).log()
    ratio = TRS(proposal(), log_accept, 1024)._log_ratio(torch.tensor(log_own), others)
    # Exactly: a (1 - 0.1^1023) / 0.9 + 0.1^1023, whose second term is below the first or alone.
    expected = 1023.0 * math.log(0.1) if log_own < -2355.0 else log_own - math.log(0.9)
    assert ratio.item() == pytest.approx(expected, abs=1e-8)


def test_snis_survives_extreme_energies():
    d = SNIS(proposal(), lambda x: 1e4 * x, 1024)
    bound = d.log_prob(POINTS)
    assert bound.isfinite().all()
    assert bound[-1] < -1e3  # far from where the weight is
    wall = SNIS(proposal(), lambda x: torch.where(x > 0.0, 0.0, torch.inf), 1024)
    assert (wall.sample((500,)) > 0.0).all()
    assert wall.log_prob(torch.tensor(-1.0)) == -torch.inf
    nothing = SNIS(proposal(), lambda x: torch.full_like(x, torch.inf), 8)  # uniform pick
    torch.testing.assert_close(nothing.log_prob(POINTS), normal(POINTS).log())
    assert_mean(nothing.sample((20_000,)), LOC)


def test_log_one_minus_exp_and_its_gradient():
    x = torch.tensor([0.0, -1e-20, -0.3, -40.0, -torch.inf], requires_grad=True)
    value = log_one_minus_exp(x)
    expected = torch.tensor([-torch.inf, math.log(1e-20), math.log1p(-math.exp(-0.3)), 0.0, 0.0])
    torch.testing.assert_close(value, expected, atol=1e-15, rtol=1e-12)
    (gradient,) = torch.autograd.grad(value[1:].sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("log_normalizer", [-0.2, -1.0, -3.0])
@pytest.mark.parametrize("num_trials", [1, 2, 9, 1024])
def test_learned_lars_is_below_trs_with_the_same_draws(num_trials, log_normalizer):
    values = POINTS.expand(50, -1)
    pyro.set_rng_seed(1)
    tight = TRS(proposal(), log_accept, num_trials).log_prob(values)
    pyro.set_rng_seed(1)
    lars = LARS(
        proposal(), log_accept, num_trials, log_normalizer=torch.tensor(log_normalizer)
    ).log_prob(values)
    assert (lars <= tight + 1e-12).all()
    if num_trials == 1:
        torch.testing.assert_close(lars, tight)


def test_learned_lars_formula_at_two_trials():
    # T = 2: q(1 rejection) = (1 - Z0) / f; written out from the expectation over trials.
    z0, pyro_seed = 0.4, 3
    d = LARS(proposal(), log_accept, 2, log_normalizer=torch.tensor(z0).log())
    pyro.set_rng_seed(pyro_seed)
    bound = d.log_prob(POINTS)
    pyro.set_rng_seed(pyro_seed)
    other = proposal().sample((1, 1, 4))[0, 0]
    a = accept(POINTS)
    q = torch.stack([a, torch.full_like(a, 1.0 - z0)])
    q = q / q.sum(0)
    expected = q[0] * (a.log() - q[0].log()) + q[1] * ((1.0 - accept(other)).log() - q[1].log())
    torch.testing.assert_close(bound, normal(POINTS).log() + expected)


def test_moving_average_lars_plugs_the_normalizer_into_the_density():
    normalizer = MovingAverageNormalizer(decay=0.9)
    d = LARS(proposal(), log_accept, 9, log_normalizer=normalizer)
    for _ in range(200):
        d.log_prob(POINTS)
    truth = (accept(GRID) * normal(GRID)).sum() * STEP
    normalizer.log_value.fill_(truth.log())
    normalizer.eval()
    torch.testing.assert_close(d.log_prob(POINTS).exp(), trs_density(POINTS, 9))
    fresh = MovingAverageNormalizer().eval()
    with pytest.raises(ValueError, match="training mode first"):
        fresh(torch.zeros(3))


def parametrized(name, theta):
    """One distribution of each kind, all parts depending on the vector theta."""
    base = dist.Normal(theta[0], theta[1].exp())

    def theta_energy(x):
        return theta[2] * x + theta[3] * torch.sin(2.0 * x)

    def theta_log_accept(x):
        return torch.nn.functional.logsigmoid(theta_energy(x))

    def theta_guide(x):
        return dist.Normal(theta[4] * x, theta[5].exp())

    return {
        "snis": lambda: SNIS(base, theta_energy, 7, num_particles=3),
        "snis-shared": lambda: SNIS(base, theta_energy, 7, num_particles=3, share_proposals=True),
        "trs": lambda: TRS(base, theta_log_accept, 7, num_particles=3),
        "lars": lambda: LARS(base, theta_log_accept, 7, log_normalizer=-theta[4].exp()),
        "his": lambda: HIS(
            base,
            theta_energy,
            2,
            theta_guide,
            step_size=theta[6].exp(),
            log_tempering=theta[4:6],
            num_particles=3,
        ),
    }[name]()


@pytest.mark.parametrize(
    ("name", "what"),
    [(name, "log_prob") for name in ("snis", "snis-shared", "trs", "lars", "his")]
    + [(name, "extended") for name in ("snis", "trs", "his")]
    + [("his", "rsample")],
)
def test_gradients_match_finite_differences(name, what):
    def value(theta):
        pyro.set_rng_seed(5)
        d = parametrized(name, theta)
        if what == "log_prob":
            return d.log_prob(POINTS).sum()
        if what == "rsample":
            return d.rsample((4,)).sin().sum()
        pool = torch.linspace(-1.3, 1.9, d.extended().event_shape[0])
        return d.extended().log_prob(pool)

    theta = torch.tensor([0.3, -0.2, 0.8, 0.7, -0.3, 0.2, -1.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(value(theta), theta)
    steps = 1e-5 * torch.eye(len(theta))
    expected = [(value(theta + s) - value(theta - s)).item() / 2e-5 for s in steps]
    torch.testing.assert_close(gradient, torch.tensor(expected), rtol=1e-6, atol=1e-7)
    assert (gradient[:4] != 0.0).all()


def test_gradient_through_a_proposal_without_rsample():
    x = torch.tensor(0.6)

    def mixture(logit):
        mix = torch.stack([torch.zeros(()), logit])
        return dist.MixtureSameFamily(
            dist.Categorical(logits=mix), dist.Normal(torch.tensor([-1.0, 1.5]), 0.7)
        )

    def expected_bound(logit):
        d = mixture(logit)
        share = 2.0 / (1.0 + torch.exp(energy(x) - energy(GRID)))
        return d.log_prob(x) + (d.log_prob(GRID).exp() * share.log()).sum() * STEP

    logit = torch.tensor(0.4, requires_grad=True)
    (truth,) = torch.autograd.grad(expected_bound(logit), logit)
    values = x.expand(500)
    draws = torch.stack(
        [
            torch.autograd.grad(SNIS(mixture(logit), energy, 2).log_prob(values).mean(), logit)[0]
            for _ in range(40)
        ]
    )
    assert_mean(draws, truth)


def test_particles_are_drawn_in_chunks_without_bias(monkeypatch):
    monkeypatch.setattr("pyro_anneal.eim.base.CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr("pyro_anneal.eim.snis.CHUNK_ELEMENTS", 50_000)
    bound = SNIS(proposal(), energy, 2).log_prob_bound(POINTS.expand(500, -1), num_particles=7)
    assert_mean(bound.exp(), snis_density(POINTS, 2))
    samples = SNIS(proposal(), energy, 3).sample((40_000,))
    mass = snis_density(GRID[::10], 3) * STEP * 10
    assert_mean(samples, (GRID[::10] * mass).sum())


def test_nested_samplers_stay_unbiased():
    inner = TRS(proposal(), log_accept, 3)
    z = GRID[::4]
    inner_density = trs_density(z, 3) * STEP * 4
    weight, others = torch.exp(-energy(POINTS))[:, None], torch.exp(-energy(z))
    share = (2.0 * weight / (weight + others) * inner_density).sum(-1)
    d = SNIS(inner, energy, 2, num_particles=3)
    assert_mean(d.log_prob(POINTS.expand(20_000, -1)).exp(), trs_density(POINTS, 3) * share)


@pytest.mark.parametrize("name", ["snis", "trs", "his"])
def test_extended_density_is_normalized_with_the_right_marginal(name):
    build, density = CASES[{"snis": "snis-2", "trs": "trs-2", "his": "his-3"}[name]]
    extended = build().extended()
    assert extended.has_exact_log_prob
    grid = GRID[::8]
    pairs = torch.cartesian_prod(POINTS, grid)
    joint = extended.log_prob(pairs).exp().reshape(len(POINTS), len(grid))
    torch.testing.assert_close(joint.sum(-1) * STEP * 8, density(POINTS), rtol=1e-6, atol=1e-9)
    assert torch.equal(extended.log_prob(pairs), extended.log_prob(pairs))


@pytest.mark.parametrize("name", ["snis", "trs", "his"])
def test_extended_samples_follow_the_extended_density(name):
    build, _ = CASES[{"snis": "snis-2", "trs": "trs-2", "his": "his-3"}[name]]
    extended = build().extended()
    grid = GRID[::16]
    pairs = torch.cartesian_prod(grid, grid)
    mass = extended.log_prob(pairs).exp() * (STEP * 16) ** 2
    samples = extended.sample((40_000,))
    for statistic in (
        lambda p: p[..., 0],
        lambda p: p[..., 1],
        lambda p: torch.sin(p[..., 0]) * p[..., 1],
        lambda p: p[..., 1].square(),
    ):
        assert_mean(statistic(samples), (statistic(pairs) * mass).sum())


def test_extended_pool_of_three_is_exchangeable_in_the_auxiliaries():
    extended = TRS(proposal(), log_accept, 3).extended()
    pool = torch.tensor([0.2, -1.0, 1.4])
    swapped = extended.log_prob(pool[[0, 2, 1]])
    torch.testing.assert_close(extended.log_prob(pool), swapped)
    samples = extended.sample((40_000,))
    assert_mean(samples[:, 1] - samples[:, 2], 0.0)
    assert_mean(samples[:, 1].square() - samples[:, 2].square(), 0.0)
