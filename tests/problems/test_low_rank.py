"""Fits of low rank plus diagonal, the densities made of them, and Hessian products."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from paths import LOG_2PI

from pyro_anneal.graphs.captured import capture
from pyro_anneal.kernels import State
from pyro_anneal.problems.components import DenseComponent, LowRankComponent
from pyro_anneal.problems.low_rank import LowRankScale, fit_low_rank
from pyro_anneal.problems.problem import prepare
from pyro_anneal.problems.rows import Rows


class Precise:
    """An unnormalized Gaussian ``Z N(loc, P^-1)`` per batch element, from its precision."""

    def __init__(self, loc, precision, log_normalizer):
        self.loc, self.precision, self.log_normalizer = loc, precision, log_normalizer

    def __call__(self, position):
        shift = position - self.loc
        grad = -(self.precision @ shift.unsqueeze(-1)).squeeze(-1)
        constant = 0.5 * (torch.logdet(self.precision) - shift.shape[-1] * LOG_2PI)
        value = 0.5 * (shift * grad).sum(-1) + constant + self.log_normalizer
        return State(position, torch.zeros_like(value), value, torch.zeros_like(grad), grad)


def lopsided(dim, rank, *, batch=(), seed=0):
    """Scales from 0.01 to 100, and few directions in which data tell a thousand times more."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-2, 2, dim)[torch.randperm(dim, generator=generator)]
    factor = torch.randn(*batch, dim, rank, generator=generator)
    factor = factor * torch.logspace(0, 1.0, rank) / math.sqrt(dim)
    inner = torch.eye(dim) + factor @ factor.mT
    precision = inner / (scales.unsqueeze(-1) * scales)
    return Precise(scales * torch.randn(*batch, dim, generator=generator), precision, -3.5)


def test_a_gaussian_of_low_rank_is_recovered():
    target = lopsided(150, 6)
    fit = fit_low_rank(target, torch.zeros(150), seed=0)
    deviation = torch.linalg.inv(target.precision).diagonal().sqrt()
    assert ((fit.loc - target.loc).abs() < 0.3 * deviation).all()
    assert -1.5 < fit.elbo.item() + 3.5 < 0.02  # an exact fit's bound is log Z; mean field: -39
    assert fit.scale.stretch.shape[-1] < 100


def test_hundreds_of_directions_are_found():
    generator = torch.Generator().manual_seed(0)
    design = torch.randn(100, 180, generator=generator)  # data tell along 100 directions of 180
    target = Precise(torch.ones(180), torch.eye(180) + design.T @ design / 30.0, 2.0)
    fit = fit_low_rank(target, torch.zeros(180), seed=0)
    assert abs(fit.elbo.item() - 2.0) < 0.5
    few = fit_low_rank(target, torch.zeros(180), seed=0, rank=64, num_rounds=1)
    assert few.elbo.item() < -5.0


@pytest.mark.slow
def test_batch_elements_of_low_rank_are_fitted_apart():
    target = lopsided(140, 3, batch=(2,))
    fit = fit_low_rank(target, torch.zeros(2, 140), seed=0)
    assert fit.elbo.shape == (2,)
    assert ((fit.elbo + 3.5).abs() < 2.0).all()


@pytest.mark.parametrize("dof", [math.inf, 5.0])
def test_low_rank_components_are_the_dense_ones(dof):
    generator = torch.Generator().manual_seed(0)
    loc, deviation = torch.randn(4, generator=generator), torch.tensor([0.3, 2.0, 1.0, 5.0])
    vectors, _ = torch.linalg.qr(torch.randn(4, 2, generator=generator))
    stretch = torch.tensor([0.2, 3.0])
    low = LowRankComponent(loc, LowRankScale(deviation, vectors, stretch), dof)
    factor = deviation[:, None] * (torch.eye(4) + vectors @ ((stretch - 1.0)[:, None] * vectors.T))
    dense = DenseComponent(loc, torch.linalg.cholesky(factor @ factor.T), dof)
    rows = torch.randn(7, 4, generator=generator) * 3.0
    assert torch.allclose(low.log_density(rows), dense.log_density(rows))
    if math.isinf(dof):
        truth = torch.distributions.MultivariateNormal(loc, factor @ factor.T).log_prob(rows)
        assert torch.allclose(low.log_density(rows), truth)
    torch.manual_seed(0)
    draws = torch.stack([low.draw() for _ in range(4000)])
    white = torch.linalg.solve(factor, (draws - loc).T).T
    variance = 1.0 if math.isinf(dof) else dof / (dof - 2.0)
    assert torch.allclose(white.T @ white / 4000, variance * torch.eye(4), atol=0.3)


def test_a_students_t_is_normalized():
    component = DenseComponent(torch.tensor([0.7]), torch.tensor([[1.3]]), 4.0)
    grid = torch.linspace(-3e3, 3e3, 2_000_001).unsqueeze(-1)
    total = torch.trapezoid(component.log_density(grid).exp(), grid[:, 0])
    assert float(total) == pytest.approx(1.0, abs=1e-6)


def test_products_differentiate_the_recorded_gradient():
    weights = torch.tensor([[1.0, 0.2], [0.2, 3.0]])

    def function(u):
        value = -(u**4).sum(-1) - torch.logsumexp(u @ weights, -1)
        return -0.5 * u.square().sum(-1), value

    density = capture(function, torch.zeros(2), num_chains=4)
    position = torch.tensor([[0.3, -1.2], [2.0, 0.1], [0.0, 0.0]])
    vectors = torch.tensor([[1.0, 0.0], [0.5, -2.0], [0.3, 0.3]])
    exact = [
        torch.autograd.functional.hvp(lambda u: function(u)[1], u, v)[1]
        for u, v in zip(position, vectors, strict=True)
    ]
    rows = Rows(density, 4, 0)
    product = rows.products(position, vectors)
    assert torch.allclose(product, torch.stack(exact), rtol=1e-10)
    assert rows._product != rows._difference
    plain = Rows(lambda u: density(u), 4, 0)  # nothing recorded: differences
    assert torch.allclose(plain.products(position, vectors), torch.stack(exact), rtol=1e-5)


def regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def test_many_dimensions_get_a_base_of_low_rank():
    """Its draws estimate the evidence, known in closed form."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 200, generator=generator)
    y = torch.randn(12, generator=generator)
    arguments = ((x, y), {})
    problem = prepare(
        regression,
        "auto",
        arguments,
        arguments,
        num_chains=64,
        batch_plates="auto",
        compile=False,
        seed=0,
    )
    assert isinstance(problem.base.components[0], LowRankComponent)
    torch.manual_seed(0)
    ratio = problem.density(problem.draw(64)).log_ratio()
    covariance = x @ x.T + 0.25 * torch.eye(12)
    truth = torch.distributions.MultivariateNormal(torch.zeros(12), covariance).log_prob(y)
    assert float(ratio.std()) < 1.0
    estimate = float(ratio.logsumexp(0)) - math.log(64)
    assert abs(estimate - float(truth)) < 5.0 * float(ratio.std()) / 8.0 + 1e-3
