"""``fit_gaussian`` on targets whose best Gaussian is known."""

import math

import pytest
import torch
from paths import LOG_2PI, Counted

from pyro_anneal.kernels import State
from pyro_anneal.problems.gaussian import Candidates, fit_gaussian
from pyro_anneal.problems.mixtures import distinct


class Gaussian:
    """An unnormalized Gaussian target ``Z N(loc, cov)`` per batch element; the base is unused."""

    def __init__(self, loc, cov, log_normalizer):
        self.loc, self.cov, self.log_normalizer = loc, cov, log_normalizer
        self.precision = torch.linalg.inv(cov)

    def __call__(self, position):
        shift = position - self.loc
        grad = -(self.precision @ shift.unsqueeze(-1)).squeeze(-1)
        constant = -0.5 * (torch.logdet(self.cov) + shift.shape[-1] * LOG_2PI)
        value = 0.5 * (shift * grad).sum(-1) + constant + self.log_normalizer
        zero = torch.zeros_like(value)
        return State(position, zero, value, torch.zeros_like(grad), grad)


def lopsided_gaussian(scales, locs, *, seed=0, log_normalizer=0.0):
    """Builds a correlated Gaussian of given standard deviations and locations, ``[*batch, D]``."""
    scales, locs = torch.as_tensor(scales), torch.as_tensor(locs)
    dim = scales.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(*scales.shape, dim, generator=generator)
    cov = mix @ mix.mT + 0.5 * torch.eye(dim)
    deviation = cov.diagonal(dim1=-2, dim2=-1).sqrt()
    rescale = scales / deviation
    return Gaussian(locs, rescale.unsqueeze(-1) * cov * rescale.unsqueeze(-2), log_normalizer)


BADLY_SCALED = [
    ([1.0, 2.0], [0.5, -3.0]),
    ([1000.0, 100.0, 0.4], [3000.0, 185.0, 11.2]),  # the radiata pines: a, b, log s^2
    ([1e-3, 3000.0], [2e-3, -9000.0]),
    ([1e-4, 0.01, 1.0, 100.0, 1e4], [1e-3, -0.05, 3.0, 50.0, -1e4]),
]


@pytest.mark.parametrize(("scales", "locs"), BADLY_SCALED)
def test_a_gaussian_posterior_is_recovered(scales, locs):
    target = lopsided_gaussian(scales, locs, log_normalizer=-7.5)
    fit = fit_gaussian(target, torch.zeros(1, len(scales)), seed=0)
    scales = torch.tensor(scales)
    assert ((fit.loc - target.loc).abs() < 1e-3 * scales).all()
    outer = scales.unsqueeze(-1) * scales
    covariance = fit.scale_tril @ fit.scale_tril.mT
    assert ((covariance - target.cov).abs() < 1e-3 * outer).all()
    assert torch.equal(fit.scale_tril, fit.scale_tril.tril())
    assert (fit.scale_tril.diagonal() > 0.0).all()
    assert fit.elbo.item() == pytest.approx(-7.5, abs=1e-4)  # exact fit: the bound is log Z


def test_batch_elements_are_fitted_apart():
    scales = torch.tensor([[1.0, 0.1], [30.0, 5.0], [0.01, 100.0]])
    locs = torch.tensor([[0.0, 1.0], [-50.0, 7.0], [0.3, 900.0]])
    target = lopsided_gaussian(scales, locs)
    fit = fit_gaussian(target, torch.zeros(1, 3, 2), seed=0)
    assert ((fit.loc - locs).abs() < 1e-3 * scales).all()
    covariance = fit.scale_tril @ fit.scale_tril.mT
    outer = scales.unsqueeze(-1) * scales.unsqueeze(-2)
    assert ((covariance - target.cov).abs() < 1e-3 * outer).all()
    assert fit.elbo.shape == (3,)


def test_float32():
    target = lopsided_gaussian([2.0, 0.5, 1.0], [3.0, -1.0, 0.2])
    target = Gaussian(target.loc.float(), target.cov.float(), 0.0)
    fit = fit_gaussian(target, torch.zeros(1, 3, dtype=torch.float32), seed=0)
    assert fit.loc.dtype == fit.scale_tril.dtype == torch.float32
    covariance = fit.scale_tril @ fit.scale_tril.mT
    assert torch.allclose(covariance, target.cov, rtol=0.0, atol=0.02)
    assert torch.allclose(fit.loc, target.loc, rtol=0.0, atol=0.02)


def funnel(position):
    """Neal's funnel, v ~ N(0, 3), x_i ~ N(0, e^{v/2}): no mode but at infinity, log Z = 0."""
    v, x = position[..., :1], position[..., 1:]
    count = x.shape[-1]
    squares = x.square() * (-v).exp()
    value = (
        -0.5 * (v / 3.0).square().squeeze(-1)
        - math.log(3.0)
        - 0.5 * (squares.sum(-1) + count * v.squeeze(-1) + (count + 1) * LOG_2PI)
    )
    grad_v = -v / 9.0 + 0.5 * squares.sum(-1, keepdim=True) - 0.5 * count
    grad = torch.cat([grad_v, -x * (-v).exp()], dim=-1)
    zero = torch.zeros_like(value)
    return State(position, zero, value, torch.zeros_like(grad), grad)


@pytest.mark.parametrize("origin", [0.0, 2.0])
def test_a_funnel_does_no_harm(origin):
    fit = fit_gaussian(funnel, torch.full((1, 10), origin), seed=0)
    assert fit.loc.abs().max() < 20.0
    assert fit.scale_tril.isfinite().all()
    samples = fit.loc + torch.randn(20_000, 10) @ fit.scale_tril.T
    normal = torch.distributions.MultivariateNormal(fit.loc, scale_tril=fit.scale_tril)
    elbo = funnel(samples).log_target - normal.log_prob(samples)
    std_error = float(elbo.std()) / math.sqrt(len(elbo))
    # the prior-like Gaussian N(0, diag(9, 1, ..)) reaches about -300; the best ones about -1.6
    assert -2.5 < float(elbo.mean()) < 5.0 * std_error
    assert 0.3 < fit.scale_tril[0, 0] < 3.0


def test_regions_without_density_are_avoided():
    def truncated(position):  # u > -1 only, NaN outside; the rest as N(2, 1)
        target = Gaussian(torch.tensor([2.0]), torch.eye(1), 0.0)(position)
        outside = position[..., 0] < -1.0
        return target._replace(
            log_target=torch.where(outside, math.nan, target.log_target),
            grad_target=torch.where(outside.unsqueeze(-1), math.nan, target.grad_target),
        )

    fit = fit_gaussian(truncated, torch.zeros(1, 1), seed=0)
    assert fit.loc.isfinite().all()
    assert fit.elbo.isfinite()
    assert abs(float(fit.loc) - 2.0) < 0.5


def test_no_density_at_all_is_an_error():
    def empty(position):
        state = Gaussian(torch.zeros(2), torch.eye(2), 0.0)(position)
        return state._replace(log_target=torch.full_like(state.log_target, math.nan))

    with pytest.raises(ValueError, match="no density around the unconstrained origin for 1 of 1"):
        fit_gaussian(empty, torch.zeros(1, 2), seed=0)


def test_the_fit_is_a_function_of_its_seed_and_counts_its_gradients():
    target = lopsided_gaussian([1.0, 2.0], [0.5, -3.0])
    counted = Counted(target)
    steps = []
    first = fit_gaussian(
        counted, torch.zeros(1, 2), seed=1, num_newton=5, num_ascent=9, progress=steps.append
    )
    before = torch.get_rng_state()
    again = fit_gaussian(target, torch.zeros(1, 2), seed=1, num_newton=5, num_ascent=9)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.loc, again.loc)
    assert torch.equal(first.scale_tril, again.scale_tril)
    assert first.num_gradients == 128 * counted.count  # rows of single-chain gradients
    assert 9 < sum(steps) <= 5 + 9  # Newton steps end where they converge


def test_many_data_cost_few_gradients(monkeypatch):
    """Where each row costs, one origin and few draws: the same Gaussian from fewer gradients."""
    monkeypatch.setattr("pyro_anneal.problems.gaussian.rows_at_once", lambda density, dim: 8)
    target = lopsided_gaussian([1.0, 2.0, 0.1], [0.5, -3.0, 8.0], log_normalizer=-7.5)
    counted = Counted(target)
    fit = fit_gaussian(counted, torch.zeros(4, 3), seed=0)
    assert fit.elbo.item() == pytest.approx(-7.5, abs=1e-4)
    assert fit.num_gradients == 8 * counted.count < 400


@pytest.mark.parametrize(
    ("elbo", "kept"),
    [
        ([-1.0, torch.nan, -1.5], [0.0, 2.0]),  # NaN would come first
        ([torch.inf, -1.0, -9e9], [1.0]),
        ([-6e20], [0.0]),  # beside which a few nats are nothing
        ([torch.nan, -torch.inf], []),
    ],
)
def test_fits_without_evidence_hide_no_others(elbo, kept):
    loc = torch.arange(len(elbo), dtype=torch.float64).unsqueeze(-1)
    scales = torch.full((len(elbo), 1, 1), 1e-3, dtype=torch.float64)
    found = distinct(Candidates(loc, scales, torch.tensor(elbo, dtype=torch.float64)), None)
    assert found.loc.flatten().tolist() == kept
