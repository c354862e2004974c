"""Families with mass within rounding of an edge: densities and draws in u."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import special

from pyro_anneal import AnnealedImportance
from pyro_anneal.models.coordinates import bijection
from pyro_anneal.models.edges import (
    draw_unconstrained,
    exact_log_det,
    exact_log_prob,
    has_closed_form,
)
from pyro_anneal.runs.freezing import freeze
from pyro_anneal.runs.run import forward, reverse

pytestmark = pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")


def beta_binomial(a, b, n, k):
    choose = special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)
    return float(choose + special.betaln(a + k, b + n - k) - special.betaln(a, b))


def beta_model(a, b, n, k):
    def model():
        p = pyro.sample("p", dist.Beta(torch.tensor(a), torch.tensor(b)))
        pyro.sample("x", dist.Binomial(n, p), obs=torch.tensor(float(k)))

    return model


FAMILIES = {
    "Beta": lambda: dist.Beta(torch.tensor([0.05, 2.0]), torch.tensor([0.3, 0.5])),
    "Kumaraswamy": lambda: dist.Kumaraswamy(torch.tensor([0.2, 2.0]), torch.tensor([0.3, 3.0])),
    "Gamma": lambda: dist.Gamma(torch.tensor([0.1, 2.0]), torch.tensor([3.0, 0.5])),
    "InverseGamma": lambda: dist.InverseGamma(torch.tensor([0.1, 2.0]), torch.tensor([3.0, 0.5])),
    "Weibull": lambda: dist.Weibull(torch.tensor([3.0, 0.5]), torch.tensor([0.2, 2.0])),
    "RelaxedBernoulli": lambda: dist.RelaxedBernoulli(
        torch.tensor(0.2), logits=torch.tensor([0.5, -1.0])
    ),
    "AffineBeta": lambda: dist.AffineBeta(0.2, torch.tensor([0.3, 2.0]), -1.0, 3.0),
    "Chi2": lambda: dist.Chi2(torch.tensor([0.2, 3.0])),
    "reflected Chi2": lambda: dist.TransformedDistribution(
        torch.distributions.Chi2(torch.tensor([0.2, 3.0])),  # a class of torch itself
        [dist.transforms.AffineTransform(0.5, -2.0)],
    ),
    "scaled": lambda: dist.TransformedDistribution(
        dist.Beta(torch.tensor([0.2, 2.0]), 0.5), [dist.transforms.AffineTransform(1.0, -2.0)]
    ),
}


class Tempered(dist.Beta):
    """A user's class that derives from a family and has another density."""

    def log_prob(self, value):
        return super().log_prob(value) + 2.0 * value.log()


def test_classes_with_a_density_of_their_own_are_no_known_family():
    assert not has_closed_form(Tempered(torch.tensor(2.0), torch.tensor(1.0)))
    assert has_closed_form(dist.Beta(torch.tensor(2.0), torch.tensor(1.0)))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_exact_densities_integrate_to_one_and_agree_inside(name):
    fn = FAMILIES[name]()
    transform = bijection(fn)
    u = torch.linspace(-400.0, 400.0, 80001).unsqueeze(-1).expand(-1, 2)
    value = transform(u)
    log_prob, log_det = exact_log_prob(fn, u), exact_log_det(transform, u, value)
    total = (log_prob + log_det).exp().sum(0) * 0.01
    torch.testing.assert_close(total, torch.ones(2), rtol=0, atol=1e-5)
    inside = u[:, 0].abs() < 8.0
    torch.testing.assert_close(log_prob[inside], fn.log_prob(value[inside]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_draws_in_u_have_that_density(name):
    """E[n(u) / q(u)] = 1 for a normal n in the middle, and at the 10% quantiles of the draws."""
    fn = FAMILIES[name]().expand([20000, 2]).to_event(1)
    u = draw_unconstrained(fn)
    assert u.shape == (20000, 2)
    single = FAMILIES[name]()
    log_prob = exact_log_prob(single, u) + exact_log_det(
        bijection(single), u, bijection(single)(u)
    )
    for share in (0.1, 0.5, 0.9):
        centre = u.quantile(share, 0)
        width = 0.1 * (u.quantile(0.7, 0) - u.quantile(0.3, 0))
        ratio = (dist.Normal(centre, width).log_prob(u) - log_prob).exp()
        error = ratio.std(0) / math.sqrt(len(u))
        assert bool(((ratio.mean(0) - 1.0).abs() <= 5.0 * error + 1e-3).all())


@pytest.mark.parametrize("kind", ["Dirichlet", "RelaxedOneHotCategorical"])
def test_simplex(kind):
    def fn(shape=()):
        if kind == "Dirichlet":
            return dist.Dirichlet(torch.tensor([0.3, 0.1, 2.0])).expand(shape)
        logits = torch.tensor([0.5, -1.0, 0.0])
        return dist.RelaxedOneHotCategorical(torch.tensor(0.7), logits=logits).expand(shape)

    transform = bijection(fn())
    u = torch.randn(50, 2)
    value = transform(u)
    torch.testing.assert_close(exact_log_prob(fn(), u), fn().log_prob(value))
    torch.testing.assert_close(
        exact_log_det(transform, u, value), transform.log_abs_det_jacobian(u, value)
    )
    u = draw_unconstrained(fn((20000,)))
    log_prob = exact_log_prob(fn(), u) + exact_log_det(transform, u, transform(u))
    width = 0.3 * (u.quantile(0.7, 0) - u.quantile(0.3, 0))
    normal = dist.Normal(u.quantile(0.5, 0), width).to_event(1)
    ratio = (normal.log_prob(u) - log_prob).exp()
    assert abs(float(ratio.mean()) - 1.0) <= 5.0 * float(ratio.std()) / math.sqrt(len(u))


PRIOR_CASES = [
    (0.1, 0.1, 10, 3, torch.float32),
    pytest.param(*(0.1, 0.1, 10, 10, torch.float32), marks=pytest.mark.slow),
    pytest.param(*(0.03, 0.03, 10, 3, torch.float64), marks=pytest.mark.slow),
    pytest.param(*(0.03, 0.03, 10, 10, torch.float64), marks=pytest.mark.slow),
    (0.01, 0.01, 5, 5, torch.float64),
]


@pytest.mark.parametrize(("a", "b", "n", "k", "dtype"), PRIOR_CASES)
def test_from_the_prior(a, b, n, k, dtype):
    torch.set_default_dtype(dtype)
    model = beta_model(a, b, n, k)
    ais = AnnealedImportance(
        model, None, num_chains=1000, num_steps=50, seed=0, progress_bar=False
    )
    result = ais.run()
    error = float(result.log_evidence) - beta_binomial(a, b, n, k)
    assert abs(error) <= 4.0 * float(result.std_error)


@pytest.mark.parametrize(("shape", "dtype"), [(0.01, torch.float64), (0.05, torch.float32)])
def test_both_identities_at_the_edge(shape, dtype):
    """E[e^L] = Z, and E[e^-U] = 1/Z from exact posterior draws made in u.

    The likelihood .2 + .6 p is bounded below, so that 1/w has a variance. Given x = 1 the posterior
    is the even mixture of Beta(a, b) and Beta(a + 1, b) if b = 2 a.
    """
    torch.set_default_dtype(dtype)
    a, b = torch.tensor(shape), torch.tensor(2.0 * shape)

    def model():
        p = pyro.sample("p", dist.Beta(a, b))
        pyro.sample("x", dist.Bernoulli(0.2 + 0.6 * p), obs=torch.tensor(1.0))

    truth = math.log(0.2 + 0.6 / 3.0)
    ais = AnnealedImportance(
        model, None, num_chains=1000, num_steps=10, seed=0, progress_bar=False
    )
    relative = (ais.run().log_weights - truth).exp()
    assert abs(float(relative.mean()) - 1.0) <= 5.0 * float(relative.std()) / 1000**0.5
    parts = [draw_unconstrained(dist.Beta(a + i, b).expand([1000])) for i in (0, 1)]
    u = torch.where(torch.rand(1000) < 0.5, *parts)
    relative = (truth - reverse_weights(ais, u.unsqueeze(-1))).exp()
    assert float(relative.std()) < 1.0
    assert abs(float(relative.mean()) - 1.0) <= 5.0 * float(relative.std()) / 1000**0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "k", "num_steps", "dtype"),
    [
        (0.01, 5, 10, torch.float64),
        (0.01, 5, 100, torch.float64),
        (0.01, 0, 10, torch.float64),
        (0.01, 0, 100, torch.float64),
        (0.05, 5, 10, torch.float32),
        (0.05, 0, 100, torch.float32),
    ],
)
def test_reverse_paths_are_forward_paths_weighted(shape, k, num_steps, dtype):
    """E_r[Z/w; Z/w < c] + P_f(Z/w >= c) = 1, the identity E_r[Z/w] = 1 without its heavy tail.

    Reverse paths weighted by Z / w are forward paths. Of those with Z / w >= c, which carry half of
    the identity here and are hardly ever seen in reverse, forward chains tell the share.
    """
    torch.set_default_dtype(dtype)
    num_chains, c = 10_000, 10.0
    truth = beta_binomial(shape, shape, 5, k)
    ais = AnnealedImportance(
        beta_model(shape, shape, 5, k), None, num_chains=num_chains, num_steps=num_steps,
        seed=1, progress_bar=False,
    )  # fmt: skip
    posterior = dist.Beta(torch.tensor(shape + k), torch.tensor(shape + 5 - k))
    u = draw_unconstrained(posterior.expand([num_chains])).unsqueeze(-1)
    with ais._journal("run_reverse", ((), {})) as journal:  # one path for both directions
        frozen = freeze(ais, ais.model, ((), {}), ((), {}), journal, seed=1)
        both = forward(frozen, journal)[0].log_weights, reverse(frozen, u, journal).log_weights
    ahead, back = ((truth - log_weights.double()).exp() for log_weights in both)
    assert abs(float((1 / ahead).mean()) - 1.0) <= 5.0 * float((1 / ahead).std()) / 100.0
    kept, rest = torch.where(back < c, back, 0.0), (ahead >= c).double()
    std_error = ((kept.var() + rest.var()) / num_chains).sqrt()
    assert std_error < 0.02
    assert rest.mean() > 0.03  # which reverse chains alone would miss
    assert abs(kept.mean() + rest.mean() - 1.0) <= 4.0 * std_error


def reverse_weights(ais, position):
    """Runs reverse chains from unconstrained positions."""
    with ais._journal("run_reverse", ((), {})) as journal:
        frozen = freeze(ais, ais.model, ((), {}), ((), {}), journal, seed=0)
        return reverse(frozen, position, journal).log_weights


@pytest.mark.parametrize(
    ("a", "b", "dtype"),
    [
        pytest.param(1.0, 0.1, torch.float32, marks=pytest.mark.slow),
        (0.05, 0.05, torch.float32),
        pytest.param(0.01, 0.01, torch.float64, marks=pytest.mark.slow),
    ],
)
def test_from_a_fit(a, b, dtype):
    torch.set_default_dtype(dtype)
    ais = AnnealedImportance(
        beta_model(a, b, 5, 5), "auto", num_chains=64, num_steps=50, seed=0, progress_bar=False
    )
    result = ais.run()
    error = float(result.log_evidence) - beta_binomial(a, b, 5, 5)
    assert abs(error) <= 4.0 * float(result.std_error)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)]
)
def test_the_upper_bound_stays_one(dtype):
    """Reverse chains start from the u that was drawn, not from the value that it rounds to."""
    torch.set_default_dtype(dtype)
    for seed in (3,) if dtype == torch.float32 else (1, 3, 4, 5, 6):
        ais = AnnealedImportance(
            beta_model(0.05, 0.05, 5, 5), "auto", num_chains=64, num_steps=50, seed=seed,
            progress_bar=False,
        )  # fmt: skip
        found = ais.sandwich()
        truth = beta_binomial(0.05, 0.05, 5, int(found.simulated["x"]))
        assert abs(float(found.lower) - truth) <= 0.05
        assert abs(float(found.upper) - truth) <= 0.05


@pytest.mark.parametrize(
    "alpha", [pytest.param([0.1] * 4, marks=pytest.mark.slow), [1.0, 0.1, 0.1, 0.1]]
)
def test_dirichlet(alpha):
    torch.set_default_dtype(torch.float32)

    def model():
        p = pyro.sample("p", dist.Dirichlet(torch.tensor(alpha)))
        with pyro.plate("data", 5):
            pyro.sample("x", dist.Categorical(p), obs=torch.zeros(5, dtype=torch.long))

    total = sum(alpha)
    truth = float(
        special.gammaln(total)
        - special.gammaln(total + 5)
        + special.gammaln(alpha[0] + 5)
        - special.gammaln(alpha[0])
    )
    ais = AnnealedImportance(model, None, num_chains=300, num_steps=50, seed=0, progress_bar=False)
    result = ais.run()
    assert abs(float(result.log_evidence) - truth) <= 4.0 * float(result.std_error)
