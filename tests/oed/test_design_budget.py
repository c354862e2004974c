"""Gains for a budget of evaluations: draws, fitted starts, and what a pilot chooses."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_anneal.oed import ais_eig
from pyro_anneal.oed.budget import choose
from pyro_anneal.oed.importance import weigh
from pyro_anneal.oed.pairs import Experiment, Labels
from pyro_anneal.oed.starts import fit_start

DESIGNS = torch.tensor([0.4, 2.0])


def linear(design):
    with pyro.plate_stack("designs", design.shape):
        theta = pyro.sample("theta", dist.Normal(0.5, 1.5))
        pyro.sample("y", dist.Normal(design * theta, 0.7))


def log_evidence(y):
    return dist.Normal(0.5 * DESIGNS, (0.49 + (1.5 * DESIGNS).square()).sqrt()).log_prob(y)


def read(model, labels, count, seed):
    return Experiment.read(model, DESIGNS, Labels.check(*labels), count, seed)


@pytest.mark.parametrize("is_fitted", [False, True])
def test_both_identities(is_fitted):
    """E[e^L] = p(y) and E[e^-U] = 1 / p(y) with two draws, from the prior and from a poor fit."""
    torch.manual_seed(0)
    start = None
    if is_fitted:
        start = fit_start(read(linear, ("y", "theta"), 40, 1), ("y",))
        assert start is not None
        assert start.gain > 0.0
    pairs = read(linear, ("y", "theta"), 40_000, 2)
    low, high = weigh(pairs, ("y",), start, 2).bounds()
    truth = log_evidence(pairs.values["y"])
    for ratio in ((low - truth).exp(), (truth - high).exp()):
        error = ratio.std(0) / len(ratio) ** 0.5
        assert bool(((ratio.mean(0) - 1.0).abs() < 5.0 * error).all())
        assert bool((error < 0.15).all())


def test_a_regression_is_the_posterior_of_a_linear_model():
    torch.manual_seed(0)
    start = fit_start(read(linear, ("y", "theta"), 2000, 3), ("y",))
    precision = 1.0 / 2.25 + (DESIGNS / 0.7).square()
    y = torch.tensor([[1.0, 3.0], [-1.0, 0.0]])
    mean = (0.5 / 2.25 + DESIGNS * y / 0.49) / precision
    found = start.mean({"y": y}, y.shape).squeeze(-1)
    spread = precision.rsqrt()
    assert bool(((found - mean).abs() < 0.25 * spread).all())
    torch.testing.assert_close(start.factor.flatten(), spread.double(), rtol=0.1, atol=0.0)


def positive(design):
    """A positive target with a label and a count about it, beside a nuisance."""
    with pyro.plate_stack("designs", design.shape):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        tilt = pyro.sample("tilt", dist.Normal(0.0, 0.3))
        pyro.sample("count", dist.Poisson(design * rate * tilt.exp()))


def test_nuisances_and_positive_targets_for_a_budget():
    """Beside quadrature over both latents."""
    truth = []
    u = torch.linspace(-9.0, 3.0, 241, dtype=torch.float64)
    t = torch.linspace(-1.5, 1.5, 61, dtype=torch.float64)
    prior = dist.Gamma(2.0, 1.0).log_prob(u.exp()) + u
    prior = (prior - prior.logsumexp(0)).exp()
    tilt = dist.Normal(0.0, 0.3).log_prob(t).softmax(0)
    for design in DESIGNS.double():
        rate = design * u.exp()[:, None] * t.exp()
        counts = torch.arange(80.0, dtype=torch.float64)
        given = (dist.Poisson(rate.unsqueeze(-1)).log_prob(counts).exp() * tilt[:, None]).sum(1)
        marginal = prior @ given
        ratio = torch.where(given > 0.0, given * (given.log() - marginal.log()), 0.0)
        truth.append(float((prior[:, None] * ratio).sum()))
    eig = ais_eig(positive, DESIGNS, "count", "rate", budget=20_000, seed=0)
    for bound, error, sign in (
        (eig.lower, eig.lower_std_error, 1.0),
        (eig.upper, eig.upper_std_error, -1.0),
    ):
        excess = sign * (bound - torch.tensor(truth))
        assert bool((excess < 5.0 * error).all())
        assert bool((excess > -0.1 - 5.0 * error).all())
        assert bool((error < 0.1).all())
    assert eig.num_pairs > 100
    assert "evaluations per design" in eig.notes[0]


def test_discrete_targets_are_drawn():
    table = torch.tensor([[0.7, 0.3], [0.2, 0.8]])

    def model(design):
        with pyro.plate_stack("designs", design.shape):
            kind = pyro.sample("kind", dist.Bernoulli(0.3))
            p = table[kind.long(), 1] * design
            pyro.sample("y", dist.Bernoulli(p))

    def entropy(p):
        return -p * math.log(p) - (1.0 - p) * math.log(1.0 - p)

    design = torch.tensor([1.0, 0.5])
    truth = [
        entropy(d * (0.7 * 0.3 + 0.3 * 0.8)) - 0.7 * entropy(0.3 * d) - 0.3 * entropy(0.8 * d)
        for d in design.tolist()
    ]
    eig = ais_eig(model, design, "y", "kind", budget=20_000, seed=0)
    low, high = eig.normal_interval(0.9999)
    assert bool((low < torch.tensor(truth)).all() and (torch.tensor(truth) < high).all())
    assert float((high - low).max()) < 0.1


def test_the_budget_is_kept_and_said():
    labels = ("y", "theta")
    seen = []

    def make(count, seed):
        seen.append(count)
        return read(linear, labels, count, seed % 2**31)

    plan = choose(make, 5000, 0, lambda *_: pytest.fail("independent draws are enough here"))
    assert plan.spent <= 5000
    assert plan.num_steps == 1
    assert seen[0] == 250
    main = plan.num_pairs * (plan.num_draws + 1)
    assert 0.8 * 5000 < main < plan.spent
    with pytest.raises(ValueError, match="budget chooses the start"):
        ais_eig(linear, DESIGNS, "y", budget=5000, guide="auto")
    with pytest.raises(ValueError, match="budget"):
        ais_eig(linear, DESIGNS, "y", budget=10)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")  # few chains per pair
def test_chains_where_draws_do_not_reach():
    """A parabola seen with little noise: two narrow modes, I by a fine grid."""

    def model(design):
        with pyro.plate_stack("designs", design.shape):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal((theta - design).square(), 0.02))

    eig = ais_eig(model, torch.tensor([0.0, 1.0]), "y", "theta", budget=100_000, seed=0)
    truth = torch.tensor([3.4220, 4.1282])  # benchmarks/mi_oed_equal.py
    assert "chains of" in eig.notes[0]
    assert bool((eig.lower - 5.0 * eig.lower_std_error < truth).all())
    assert bool((eig.upper + 5.0 * eig.upper_std_error > truth).all())
    assert bool((eig.lower > truth - 1.5).all())
