"""One run of a model draws for all chains: independently, and by the law of one chain."""

import math
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_anneal import AnnealedImportance
from pyro_anneal.problems.over_chains import draw_chains, map_chains
from pyro_anneal.problems.problem import prepare

COUNT = 4000
FAMILIES = [
    dist.Beta(2.0, 0.7),
    dist.Cauchy(1.0, 2.0),
    dist.Dirichlet(torch.tensor([0.5, 1.0, 3.0])),
    dist.Exponential(0.3),
    dist.Gamma(0.4, 2.0),
    dist.Geometric(torch.tensor(0.2)),
    dist.HalfCauchy(3.0),
    dist.InverseGamma(3.0, 1.0),
    dist.Laplace(-1.0, 2.0),
    dist.LKJCholesky(3, 0.7),
    dist.LogNormal(0.3, 0.5),
    dist.LowRankMultivariateNormal(torch.zeros(2), torch.tensor([[1.0], [2.0]]), torch.ones(2)),
    dist.Multinomial(6, torch.tensor([0.2, 0.5, 0.3])),
    dist.MultivariateNormal(torch.ones(2), torch.tensor([[2.0, 1.2], [1.2, 1.0]])),
    dist.Pareto(1.0, 3.0),
    dist.Poisson(2.5),
    dist.StudentT(3.0),
    dist.VonMises(0.5, 2.0),  # by rejection, chain by chain
    dist.Weibull(1.0, 0.7),
]


def _largest_gap(one, other):
    """Kolmogorov and Smirnov's distance of two samples."""
    both = torch.cat([one, other]).sort().values
    first, second = (torch.searchsorted(x.sort().values, both, right=True) for x in (one, other))
    return float((first / len(one) - second / len(other)).abs().max())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: type(family).__name__)
def test_draws_follow_the_law_of_one_chain_independently(family):
    torch.manual_seed(0)
    drawn = draw_chains(family.sample, COUNT, numbers=1, device=torch.device("cpu")).double()
    expected = family.sample((COUNT,)).double()
    assert drawn.shape == expected.shape
    drawn, expected = (x.reshape(COUNT, -1) for x in (drawn, expected))
    views = [(drawn, expected), (drawn.roll(1, -1) * drawn, expected.roll(1, -1) * expected)]
    # the distance exceeds this with probability 1e-6
    limit = math.sqrt(0.5 * math.log(2.0 / 1e-6)) * math.sqrt(2.0 / COUNT)
    for ours, theirs in views:
        for axis in range(ours.shape[1]):
            assert _largest_gap(ours[:, axis], theirs[:, axis]) < limit
    order = drawn[:, -1].argsort().argsort().double()  # ranks: of heavy tails, too
    order = (order - order.mean()) / order.std()
    assert abs(float((order * order.roll(1)).mean())) < 5.0 / math.sqrt(COUNT)


def _counted(model):
    calls = []

    def counting(*args):
        calls.append(1)
        return model(*args)

    return counting, calls


def _schools(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 10.0), obs=y)


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")  # of two steps only
@pytest.mark.parametrize("num_chains", [32, 512])
def test_calls_of_the_model_do_not_grow_with_the_chains(num_chains):
    model, calls = _counted(_schools)
    ais = AnnealedImportance(
        model, num_chains=num_chains, num_steps=2, seed=0, progress_bar=False, cross_check=False
    )
    run = ais.run(torch.tensor([28.0, 8.0, -3.0]))
    assert len(calls) <= 40
    assert run.posterior["theta"].shape == (num_chains, 3)


def _random_numpy():
    return torch.randn(2) + torch.as_tensor(np.random.randn(2)).float()


def _own_generator():
    generator = np.random.default_rng(0)
    return lambda: torch.randn(2) + torch.as_tensor(generator.standard_normal(2)).float()


@pytest.mark.parametrize("draw", [_random_numpy, _own_generator()], ids=["global", "own"])
def test_noise_of_numpy_is_drawn_for_each_chain(draw):
    np.random.seed(0)
    torch.manual_seed(0)
    drawn = draw_chains(draw, 500, numbers=1, device=torch.device("cpu"))
    centred = drawn - drawn.mean(0)
    # were numpy's noise shared, chains would vary by torch's alone
    assert float(centred.var(0).min()) > 1.5


def test_a_model_that_branches_on_a_latent_is_run_chain_by_chain():
    def draw():
        z = torch.randn(1)
        return z if float(z) > 0.0 else 10.0 * z

    torch.manual_seed(0)
    drawn = draw_chains(draw, COUNT, numbers=1, device=torch.device("cpu"))
    assert float(drawn[drawn > 0].mean()) == pytest.approx(math.sqrt(2 / math.pi), abs=0.1)
    assert float(drawn[drawn < 0].mean()) == pytest.approx(-10 * math.sqrt(2 / math.pi), abs=1.0)


def test_chains_are_drawn_in_parts_where_they_would_not_fit():
    torch.manual_seed(0)
    sizes = []

    def draw():
        z = torch.randn(1)
        sizes.append(1)
        return z

    drawn = draw_chains(draw, 40, numbers=2**20, device=torch.device("cpu"))
    assert len(sizes) == 2 * 3  # 16, 16 and 8 chains, twice each
    assert len(drawn.unique()) == 40


def test_draws_that_are_vouched_for_are_made_once():
    calls, vouched = [], set()

    def draw():
        calls.append(1)
        return torch.randn(1)

    options = {"numbers": 1, "device": torch.device("cpu"), "vouched": vouched}
    torch.manual_seed(0)
    first = draw_chains(draw, 10, kind="prior", **options)
    again = draw_chains(draw, 10, kind="prior", **options)
    assert len(calls) == 3
    assert not torch.equal(first, again)
    torch.manual_seed(0)
    assert torch.equal(draw_chains(draw, 10, kind="prior", **options), first)  # the same numbers
    draw_chains(draw, 10, kind="guide", **options)  # another base
    assert len(calls) == 6
    numpy = _own_generator()
    draw_chains(numpy, 10, kind="numpy", **options)
    assert vouched == {"prior", "guide"}


class _Leaky:
    """A base a third of whose draws lie outside the support, where there is no coordinate."""

    def draw(self):
        return (torch.randn(1) + 0.43).log()


def test_draws_outside_the_support_are_nan_chain_by_chain():
    def model(x):
        z = pyro.sample("z", dist.Exponential(1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    arguments = ((torch.tensor(1.0),), {})
    problem = prepare(
        model, None, arguments, arguments, num_chains=4, batch_plates="auto", compile=False, seed=0
    )
    torch.manual_seed(0)
    drawn = replace(problem, base=_Leaky()).draw(COUNT)
    share = 0.5 * (1.0 - math.erf(0.43 / math.sqrt(2.0)))
    error = math.sqrt(share * (1.0 - share) / COUNT)
    assert abs(float(drawn.isnan().double().mean()) - share) < 5 * error


def test_a_draw_that_fails_is_nan_alone():
    class Failing:
        def draw(self):
            matrix = torch.randn(1, 1)
            return torch.linalg.cholesky(matrix)[0]

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    arguments = ((torch.tensor(1.0),), {})
    problem = prepare(
        model, None, arguments, arguments, num_chains=4, batch_plates="auto", compile=False, seed=0
    )
    torch.manual_seed(0)
    drawn = replace(problem, base=Failing()).draw(1000)
    assert abs(float(drawn.isnan().double().mean()) - 0.5) < 5 * math.sqrt(0.25 / 1000)
    assert bool((drawn[~drawn.isnan()] > 0).all())


def test_values_are_those_of_each_chain():
    def model(x):
        top = pyro.sample("top", dist.Exponential(1.0))
        pyro.sample("low", dist.Uniform(0.0, top))  # a support that depends on another latent
        pyro.sample("x", dist.Normal(top, 1.0), obs=x)

    arguments = ((torch.tensor(1.0),), {})
    problem = prepare(
        model, None, arguments, arguments, num_chains=4, batch_plates="auto", compile=False, seed=0
    )
    torch.manual_seed(0)
    position = problem.draw(7)
    values = problem.unpack(position)
    assert bool((values["low"] < values["top"]).all())
    for k in range(7):
        one = problem.model.unpack(position[k])
        assert torch.allclose(values["low"][k], one["low"], rtol=1e-6)
    assert torch.allclose(problem.pack_chains(values), position, rtol=1e-3, atol=1e-3)


def test_a_function_of_several_tensors_is_mapped():
    found = map_chains(
        lambda chain: {"sum": chain["a"] + chain["b"].sum()},
        {"a": torch.arange(3.0), "b": torch.ones(3, 2)},
        numbers=1,
    )
    assert found["sum"].tolist() == [2.0, 3.0, 4.0]


def test_values_are_known_where_the_likelihood_fails():
    def model():
        scale = pyro.sample("scale", dist.HalfNormal(2.0))
        tie = pyro.sample("tie", dist.Uniform(0.0, scale))  # beyond 1 no covariance
        cov = torch.eye(2) + tie * torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), cov), obs=torch.ones(2))

    found = prepare(
        model, None, ((), {}), ((), {}), num_chains=2, batch_plates="auto", compile=False, seed=0
    )
    assert not found.layout.is_static
    position = torch.tensor([[0.0, -3.0], [1.5, 3.0]]).to(found.layout.dtype)
    values = found.unpack(position)
    assert float(values["tie"][1]) > 1.0
    for name, value in found.unpack(position[:1]).items():
        assert torch.equal(values[name][:1], value)
    assert values["scale"].isfinite().all()
