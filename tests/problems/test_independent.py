"""Parts of a posterior that do not meet: found, fitted one by one, and multiplied."""

import math
import warnings

import pyro.distributions as dist
import pytest
import torch
from hard_problems import many_well
from scipy import integrate, stats

from pyro_anneal import AnnealedImportance
from pyro_anneal.chains.loop import run_chains
from pyro_anneal.chains.path import Path, TuningTable
from pyro_anneal.kernels import HMC, State
from pyro_anneal.problems.components import MixtureOfPart, ProductComponent
from pyro_anneal.problems.gaussian import Candidates
from pyro_anneal.problems.independent import independent_parts, marginal_fit, rows_of_part
from pyro_anneal.problems.problem import prepare
from pyro_anneal.problems.rows import Rows
from pyro_anneal.schedules import Linear


def rows_of(log_density):
    """Evaluates a function of ``[..., D]`` and its gradient."""

    def density(position):
        with torch.enable_grad():
            at = position.detach().requires_grad_(True)
            value = log_density(at)
            (grad,) = torch.autograd.grad(value.sum(), at)
        value = value.detach()
        return State(position, torch.zeros_like(value), value, torch.zeros_like(grad), grad)

    return Rows(density, 16, 0)


def wells(u):
    """Coordinates 0 and 2 meet, 1 and 3 do so with nobody."""
    pair = -0.5 * (u[..., 0] - u[..., 2].sin()).square() - 0.3 * u[..., 2].square()
    return pair - u[..., 1] ** 4 + 3.0 * u[..., 1] ** 2 - 0.5 * (u[..., 3] - 1.0).square()


def far_apart(u):
    """Two normals, whose curvature meets beyond (3, 3) only."""
    return -0.5 * u.square().sum(-1) - (u[..., 0] - 3.0).relu() * (u[..., 1] - 3.0).relu()


def test_parts_are_those_that_do_not_meet():
    points = torch.randn(3, 4)
    assert independent_parts(rows_of(wells), points) == [[0, 2], [1], [3]]
    joint = lambda u: wells(u) - 0.1 * (u[..., 1] * u[..., 3]).square()
    assert independent_parts(rows_of(joint), points) == [[0, 2], [1, 3]]
    assert independent_parts(rows_of(wells), points[:1]) == [[0, 1, 2, 3]]


def test_exchanges_find_what_curvature_does_not_show():
    near = torch.randn(2, 2)
    assert independent_parts(rows_of(far_apart), near) == [[0], [1]]
    far = torch.tensor([[0.0, 4.5], [5.0, 0.3]])
    assert independent_parts(rows_of(far_apart), far) == [[0, 1]]


def test_a_part_keeps_its_own_density():
    rows, loc, u = rows_of(wells), torch.randn(4), torch.randn(5, 2)
    value, grad = rows_of_part(rows, loc, [0, 2])(u)
    whole = loc.expand(5, 4).clone()
    whole[:, [0, 2]] = u
    torch.testing.assert_close(value, wells(whole))
    torch.testing.assert_close(grad, rows(whole)[1][:, [0, 2]])
    factor = torch.randn(4, 4).tril(-1) + torch.eye(4)
    fit = Candidates(loc.unsqueeze(0), factor.unsqueeze(0), torch.zeros(1))
    part = marginal_fit(rows_of_part(rows, loc, [0, 2]), fit, [0, 2], torch.Generator())
    covariance = (factor @ factor.T)[[0, 2]][:, [0, 2]]
    torch.testing.assert_close(part.scale_tril[0] @ part.scale_tril[0].T, covariance)


def product():
    pair = MixtureOfPart(
        [0, 3],
        torch.tensor([0.2, 0.8]).log(),
        torch.tensor([[-4.0, 1.0], [2.0, 0.0]]),
        torch.tensor([[[1.0, 0.0], [0.7, 0.4]], [[0.3, 0.0], [0.0, 2.0]]]),
        math.inf,
    )
    one = MixtureOfPart(
        [2], torch.zeros(1), torch.tensor([[7.0]]), torch.full((1, 1, 1), 0.5), 8.0
    )
    three = MixtureOfPart(
        [1],
        torch.tensor([0.5, 0.3, 0.2]).log(),
        torch.tensor([[-9.0], [0.0], [5.0]]),
        torch.tensor([1.0, 0.1, 2.0]).view(3, 1, 1),
        8.0,
    )
    return ProductComponent([pair, one, three])


def _by_hand(u):
    u = u.double()
    pair = dist.MultivariateNormal(
        torch.tensor([[-4.0, 1.0], [2.0, 0.0]]),
        scale_tril=torch.tensor([[[1.0, 0.0], [0.7, 0.4]], [[0.3, 0.0], [0.0, 2.0]]]),
    )
    mixed = pair.log_prob(u[:, None, [0, 3]]) + torch.tensor([0.2, 0.8]).log()
    three = dist.StudentT(8.0, torch.tensor([-9.0, 0.0, 5.0]), torch.tensor([1.0, 0.1, 2.0]))
    weighted = three.log_prob(u[:, None, 1]) + torch.tensor([0.5, 0.3, 0.2]).log()
    one = dist.StudentT(8.0, 7.0, 0.5).log_prob(u[:, 2])
    return mixed.logsumexp(1) + weighted.logsumexp(1) + one


def test_a_product_has_the_density_of_its_parts():
    u = 4.0 * torch.randn(50, 4)
    torch.testing.assert_close(product().log_density(u), _by_hand(u))


def test_a_product_draws_from_its_density():
    """Reweighted from another density, draws have mean weight 1; modes have their shares."""
    base = product()
    draws = torch.stack([base.draw() for _ in range(6000)])
    shares = {
        0: ((draws[:, 0] < -1.5), 0.2),
        1: ((draws[:, 1] < -5.0), 0.5),
        2: ((draws[:, 1] > 1.5), 0.2 * stats.t.sf((1.5 - 5.0) / 2.0, 8)),
    }
    for hit, expected in shares.values():
        error = math.sqrt(expected * (1.0 - expected) / len(draws))
        assert abs(float(hit.double().mean()) - expected) < 4.5 * error
    other = dist.Normal(torch.tensor([2.0, 0.0, 7.0, 0.0]), torch.tensor([0.2, 0.08, 0.3, 1.0]))
    weights = (other.to_event(1).log_prob(draws) - base.log_density(draws)).exp()
    error = float(weights.std()) / math.sqrt(len(draws))
    assert error < 0.1
    assert abs(float(weights.mean()) - 1.0) < 4.5 * error


def _log_evidence(pairs):
    well = lambda x: math.exp(-(x**4) + 6.0 * x**2 + 0.5 * x)
    one = integrate.quad(well, -5.0, 5.0, points=[-1.7, 1.7])[0]
    return pairs * (math.log(one) + 0.5 * math.log(2.0 * math.pi))


def _exact_draws(pairs, count):
    grid = torch.linspace(-4.0, 4.0, 20_001, dtype=torch.float64)
    log_well = -(grid**4) + 6.0 * grid**2 + 0.5 * grid
    index = torch.multinomial(log_well.softmax(0), count * pairs, replacement=True)
    first = grid[index] + 4e-4 * (torch.rand(count * pairs) - 0.5)
    return torch.stack([first, torch.randn(count * pairs)], -1).view(count, pairs, 2)


def test_both_identities_hold_from_a_product():
    """E[w] = Z and E[1/w] = 1/Z, in three steps from the product of mixtures of double wells."""
    torch.manual_seed(1)
    arguments, count, log_z = ((3,), {}), 4000, _log_evidence(3)
    problem = prepare(
        many_well,
        "auto",
        arguments,
        arguments,
        num_chains=count,
        batch_plates="auto",
        compile=False,
        seed=0,
    )
    assert isinstance(problem.base.components[0], ProductComponent)
    example = torch.zeros(6, dtype=problem.layout.dtype)
    path = Path(Linear()(3), HMC(1), TuningTable.constant(0.15, example, HMC(1)))
    ratios = []
    exact = problem.pack_chains({"x": _exact_draws(3, count)})
    for start, direction in ((problem.draw(count), "forward"), (exact, "reverse")):
        state = problem.density(start)
        found, *_ = run_chains(
            problem.density, path, state, direction=direction, seed=1, stream=direction
        )
        sign = 1.0 if direction == "forward" else -1.0
        ratios.append((sign * (found.log_weights.double() - log_z)).exp())
    for values in ratios:
        error = float(values.std()) / math.sqrt(count)
        assert 0.001 < error < 0.05
        assert abs(float(values.mean()) - 1.0) < 4.5 * error


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [4, 16])
def test_modes_multiply(pairs):
    """2^pairs modes by the default, where a list of fits would hold eight."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = AnnealedImportance(many_well, "auto", num_steps=100, seed=0, progress_bar=False).run(
            pairs
        )
    assert float(run.std_error) < 0.06
    assert abs(float(run.lower) - _log_evidence(pairs)) < 4.5 * float(run.std_error)
    assert "modes" not in {found.name for found in run.diagnostics}
