"""Leading coordinates, and Gaussians of all others given them."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hard_problems import HARD_PROBLEMS
from scipy import integrate, stats

from pyro_anneal import AnnealedImportance
from pyro_anneal.chains.loop import run_chains
from pyro_anneal.chains.path import Path, TuningTable
from pyro_anneal.kernels import HMC, State
from pyro_anneal.problems.components import NestedComponent
from pyro_anneal.problems.gaussian import Candidates
from pyro_anneal.problems.given import Given, fit_given
from pyro_anneal.problems.leading import is_bent, leading_coordinates
from pyro_anneal.problems.marginals import DOF, Marginal
from pyro_anneal.problems.nested import Nested, nested_gaussians
from pyro_anneal.problems.problem import prepare
from pyro_anneal.problems.rows import Rows
from pyro_anneal.schedules import Linear

DIM = 5


def rows_of(log_density):
    """Evaluates a function of ``[..., D]`` and its gradient."""

    def density(position):
        with torch.enable_grad():
            at = position.detach().requires_grad_(True)
            value = log_density(at)
            (grad,) = torch.autograd.grad(value.sum(), at)
        value = value.detach()
        return State(position, torch.zeros_like(value), value, torch.zeros_like(grad), grad)

    return Rows(density, 128, 0)


def funnel(u):
    """A normalized funnel whose scale is the third coordinate, which is skewed and leans on none."""
    h, x = u[..., 2], torch.cat([u[..., :2], u[..., 3:]], -1)
    marginal = h - h.exp()  # log of a unit exponential
    mean = torch.tensor([1.0, -2.0, 0.5, 0.0]) * h.unsqueeze(-1)
    given = dist.Normal(mean, (0.4 * h).exp().unsqueeze(-1), validate_args=False).log_prob(x)
    return marginal + given.sum(-1)


def gaussian(u):
    precision = torch.eye(DIM) + 0.3
    return -0.5 * torch.einsum("...i,ij,...j->...", u, precision, u)


def _fit(loc=0.0):
    scale = torch.eye(DIM).unsqueeze(0)
    return Candidates(torch.full((1, DIM), loc), scale, torch.zeros(1))


def test_the_leading_coordinate_is_the_scale():
    assert leading_coordinates(rows_of(funnel), _fit()) == [2]
    assert leading_coordinates(rows_of(gaussian), _fit()) == []
    assert is_bent(rows_of(funnel), _fit(), torch.Generator().manual_seed(0))
    assert not is_bent(rows_of(gaussian), _fit(), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dim", [2, 3])
def test_one_coordinate_is_left_to_be_fitted(dim):
    def bent(u):  # every coordinate bends the others
        return (
            -0.5 * u.square().sum(-1) + u.prod(-1) - u.square().prod(-1) + (2.0 * u).sin().sum(-1)
        )

    fit = Candidates(torch.zeros(1, dim), torch.eye(dim).unsqueeze(0), torch.zeros(1))
    lead = leading_coordinates(rows_of(bent), fit)
    assert 0 < len(lead) < dim
    found = nested_gaussians(rows_of(bent), fit, lead, torch.Generator().manual_seed(0))
    assert bool(found.log_density(torch.randn(3, dim)).isfinite().all())


def test_a_nested_fit_covers_a_funnel():
    """Weights of its draws have mean 1 and vary little."""
    generator = torch.Generator().manual_seed(0)
    found = nested_gaussians(rows_of(funnel), _fit(), [2], generator)
    draws = found.draw(4000, generator)
    weights = (funnel(draws) - found.log_density(draws)).exp()
    error = float(weights.std()) / math.sqrt(len(draws))
    assert error < 0.03  # an effective share of a fifth at least
    assert abs(float(weights.mean()) - 1.0) < 4.5 * error


def test_both_identities_hold_in_a_funnel():
    """E[w] = 1 and E[1/w] = 1 from a nested fit, in three poor steps."""
    generator = torch.Generator().manual_seed(0)
    target = rows_of(funnel).density
    base = nested_gaussians(rows_of(funnel), _fit(), [2], generator)
    own = rows_of(base.log_density).density

    def density(position):
        start, end = own(position), target(position)
        return end._replace(log_base=start.log_target, grad_base=start.grad_target)

    count = 6000
    h = torch.empty(count).exponential_(generator=generator).log()
    noise = torch.randn(count, 4, generator=generator)
    x = torch.tensor([1.0, -2.0, 0.5, 0.0]) * h.unsqueeze(-1) + (0.4 * h).exp()[:, None] * noise
    exact = torch.cat([x[:, :2], h.unsqueeze(-1), x[:, 2:]], -1)
    path = Path(Linear()(3), HMC(1), TuningTable.constant(0.15, exact[0], HMC(1)))
    for start, direction in ((base.draw(count, generator), "forward"), (exact, "reverse")):
        found, *_ = run_chains(
            density, path, density(start), direction=direction, seed=1, stream=direction
        )
        values = ((1.0 if direction == "forward" else -1.0) * found.log_weights.double()).exp()
        error = float(values.std()) / math.sqrt(count)
        assert 0.001 < error < 0.02
        assert abs(float(values.mean()) - 1.0) < 4.5 * error


def _nested():
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    factor = 0.3 * normal(2, 2, 2).tril(-1) + torch.diag(torch.tensor([0.5, 1.5]))
    marginal = Marginal(torch.tensor([0.3, 0.7]).log(), 2.0 * normal(2, 2), factor)
    nodes, functions = normal(3, 2), 9
    given = Given(
        nodes,
        torch.tensor([[1.0, 0.0], [0.4, 0.7]]),
        torch.tensor([[-3.0, -2.0], [4.0, 5.0]]),
        normal(3),
        normal(functions, 3),
        0.3 * normal(functions, 3),
        0.4 * normal(functions, 3, 3).tril(-1),
    )
    return Nested([3, 1], [0, 2, 4], marginal, given)


def _by_hand(nested, u):
    """The density by scipy: a mixture of Student-t of two coordinates, a normal of three given them."""
    marginal, given = nested.marginal, nested.given
    found = []
    for row in u.double().numpy():
        h, x = row[[3, 1]], row[[0, 2, 4]]
        terms = [
            float(log_weight) + stats.multivariate_t(loc, factor @ factor.T, df=DOF).logpdf(h)
            for log_weight, loc, factor in zip(
                marginal.log_weights,
                marginal.loc.numpy(),
                marginal.scale_tril.numpy(),
                strict=True,
            )
        ]
        inside = np.clip(h, *given.box.numpy())
        apart = inside - given.nodes.numpy()
        bumps = np.exp(-0.5 * ((apart @ given.metric.numpy().T) ** 2).sum(1))
        bumps /= bumps.sum()
        slopes = np.concatenate([np.ones((3, 1)), apart], 1) * bumps[:, None]
        shift, log_scale, lower = (
            np.tensordot(slopes.ravel(), table.numpy(), 1)
            for table in (given.shift, given.log_scale, given.lower)
        )
        inverse = np.linalg.inv(np.eye(3) + lower)
        root = inverse * np.exp(log_scale)
        mean = given.centre.numpy() + inverse @ shift
        given_h = stats.multivariate_normal(mean, root @ root.T).logpdf(x)
        found.append(np.logaddexp(*terms) + given_h)
    return np.array(found)


def test_the_density_is_that_of_its_factors():
    nested = _nested()
    u = 2.0 * torch.randn(40, DIM, generator=torch.Generator().manual_seed(0))
    expected = torch.as_tensor(_by_hand(nested, u)).to(u)
    torch.testing.assert_close(nested.component().log_density(u), expected)


def test_functions_of_a_neck_are_met():
    """A regression whose scale falls by e^8, at places that the fit has not seen."""

    def exact(h):
        scale = h.squeeze(-1).exp()
        covariance = torch.ones(len(h), 2, 2, dtype=h.dtype)
        covariance[:, 1, 1] += scale.square()  # x_2 = x_1 + e^h noise
        mean = torch.stack([0.2 * scale, 0.2 * scale + 0.1 * scale.square()], -1)
        return mean, torch.linalg.cholesky(covariance)

    generator = torch.Generator().manual_seed(0)
    seen = 9.0 * torch.rand(300, 1, generator=generator, dtype=torch.float64) - 8.0
    given = fit_given(seen, torch.full((300,), 1 / 300), *exact(seen), generator)
    h = 8.0 * torch.rand(200, 1, generator=generator, dtype=torch.float64) - 7.5
    mean, factor = exact(h)
    noise = torch.randn(200, 2, generator=generator, dtype=torch.float64)
    own = mean + (factor @ noise.unsqueeze(-1)).squeeze(-1)
    for x in (own, given.place(h, noise)):
        log_p = dist.MultivariateNormal(mean, scale_tril=factor).log_prob(x)
        assert float((log_p - given.log_density(h, x)).abs().max()) < 0.1


def test_both_ways_of_drawing_follow_the_density():
    nested = _nested()
    component = nested.component()
    one_by_one = torch.vmap(lambda _: component.draw(), randomness="different")(
        torch.zeros(20_000)
    )
    marginal, given = nested.marginal, nested.given
    narrow = dist.MultivariateNormal(marginal.loc[1], scale_tril=0.7 * marginal.scale_tril[1])
    centred = torch.tensor([0.5, -0.3, 0.2])
    for draws in (one_by_one, nested.draw(20_000, torch.Generator().manual_seed(1))):
        h, x = draws[:, [3, 1]], draws[:, [0, 2, 4]]
        noise = given.place(h, torch.zeros_like(x)), given.at(h)
        # a normalized density of x that the one of the draws covers: its noise, narrower and moved
        mean, (_, log_scale, lower) = noise
        white = ((torch.eye(3) + lower) @ (x - mean).unsqueeze(-1)).squeeze(-1)
        white = white * (-log_scale).exp()
        log_other = dist.Normal(centred, 0.7).log_prob(white).sum(-1) - log_scale.sum(-1)
        log_other = log_other + narrow.log_prob(h)
        weights = (log_other - component.log_density(draws)).exp()
        error = float(weights.std()) / math.sqrt(len(draws))
        assert error < 0.1
        assert abs(float(weights.mean()) - 1.0) < 4.5 * error


# --- A hierarchy, and its two identities

Y = torch.tensor([0.3, -0.2, 1.4, 1.9, 1.6, 2.1, 2.0, 0.7])
STEPS = np.minimum.outer(np.arange(1.0, 9.0), np.arange(1.0, 9.0))


def walk(y):
    """A random walk of eight steps seen through noise, both of unknown scale."""
    step = pyro.sample("step", dist.LogNormal(0.0, 1.5))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.5))
    x = torch.zeros(())
    for t in range(len(y)):
        x = pyro.sample(f"x{t}", dist.Normal(x, step))
        pyro.sample(f"y{t}", dist.Normal(x, noise), obs=y[t])


def _marginal():
    """Log density of the logs of both scales given y, times p(y), on a grid."""
    values, vectors = np.linalg.eigh(STEPS)
    turned = vectors.T @ Y.double().numpy()
    grid = np.linspace(-9.0, 3.5, 801)
    variance = np.exp(2.0 * grid)[:, None, None] * values + np.exp(2.0 * grid)[:, None]
    log_lik = -0.5 * (turned**2 / variance + np.log(2.0 * math.pi * variance)).sum(-1)
    prior = stats.norm.logpdf(grid, 0.0, 1.5)
    return grid, log_lik + prior[:, None] + prior


def _posterior(count):
    """Exact draws: both scales from a grid, the walk given them."""
    generator = np.random.default_rng(0)
    grid, table = _marginal()
    shares = np.exp(table - table.max())
    index = generator.choice(table.size, count, p=(shares / shares.sum()).ravel())
    jitter = (generator.random((2, count)) - 0.5) * (grid[1] - grid[0])
    step, noise = np.exp(grid[index // 801] + jitter[0]), np.exp(grid[index % 801] + jitter[1])
    prior = step[:, None, None] ** 2 * STEPS
    gain = prior @ np.linalg.inv(prior + noise[:, None, None] ** 2 * np.eye(8))
    mean, covariance = gain @ Y.double().numpy(), prior - gain @ prior
    root = np.linalg.cholesky(covariance + 1e-12 * np.eye(8))
    x = mean + (root @ generator.standard_normal((count, 8, 1)))[..., 0]
    values = {"step": step, "noise": noise} | {f"x{t}": x[:, t] for t in range(8)}
    return {name: torch.as_tensor(value) for name, value in values.items()}


@pytest.mark.slow
def test_both_identities_hold_from_a_nested_base():
    """E[w] = Z and E[1/w] = 1/Z, in three steps."""
    torch.manual_seed(1)
    grid, table = _marginal()
    log_z = math.log(integrate.simpson(integrate.simpson(np.exp(table), x=grid), x=grid))
    arguments, count = ((Y.double(),), {}), 1500
    options = {"num_chains": count, "batch_plates": (), "compile": False, "seed": 0}
    problem = prepare(walk, "auto", arguments, arguments, **options)
    base = getattr(problem.base, "first", problem.base)  # the prior may be mixed in
    assert isinstance(base.components[0], NestedComponent)
    example = torch.zeros(problem.layout.dim, dtype=problem.layout.dtype)
    path = Path(Linear()(3), HMC(1), TuningTable.constant(0.3, example, HMC(1)))
    exact = problem.pack_chains(_posterior(count))
    for start, direction in ((problem.draw(count), "forward"), (exact, "reverse")):
        state = problem.density(start)
        found, *_ = run_chains(
            problem.density, path, state, direction=direction, seed=1, stream=direction
        )
        sign = 1.0 if direction == "forward" else -1.0
        values = (sign * (found.log_weights.double() - log_z)).exp()
        error = float(values.std()) / math.sqrt(count)
        assert 0.001 < error < 0.05
        assert abs(float(values.mean()) - 1.0) < 4.5 * error


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")
@pytest.mark.parametrize("name", ["random walk, two scales", "Gaussian process, no jitter"])
def test_hierarchies_of_two_scales_are_right_or_say_so(name):
    problem = HARD_PROBLEMS[name]()
    engine = AnnealedImportance(
        problem.model,
        "auto",
        num_chains=32,
        target_gap=0.02,
        max_rounds="auto",  # as log_evidence has it
        seed=0,
        progress_bar=False,
    )
    run = engine.run(*problem.args)
    error = abs(float(run.lower) - problem.truth())
    assert error < 5.0 * float(run.std_error) + 1e-3
    assert error < 0.1 or any(found.severity == "warning" for found in run.diagnostics)
