"""Exchangeable elements of plates: found, averaged over, and counted in the evidence."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hard_problems import HARD_PROBLEMS

from pyro_anneal import AnnealedImportance
from pyro_anneal.native.library import compiler_problem
from pyro_anneal.problems.bases import FittedBase
from pyro_anneal.problems.components import DenseComponent
from pyro_anneal.problems.exchangeable import Symmetry, as_symmetry, find_symmetry
from pyro_anneal.problems.problem import prepare


def mixture(x, num):
    w = pyro.sample("w", dist.Dirichlet(torch.ones(num)))
    with pyro.plate("components", num):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        sd = pyro.sample("sd", dist.LogNormal(-1.0, 0.7))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(w), dist.Normal(mu, sd)), obs=x)


def lopsided_mixture(x, num):
    w = pyro.sample("w", dist.Dirichlet(torch.arange(1.0, num + 1.0)))
    with pyro.plate("components", num):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(w), dist.Normal(mu, 0.5)), obs=x)


def two_pairs(x):
    """Two sets of exchangeable elements of the same length, and a latent that is none."""
    with pyro.plate("first", 2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("second", 2):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    c = pyro.sample("c", dist.Normal(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1))
    pyro.sample("x", dist.Normal(a.square().sum() + 3.0 * b.prod() + c.sum(), 1.0), obs=x)


X = torch.tensor([-1.2, -1.1, -0.7, 0.3, 0.6, 0.5, 1.4])


def problem_of(model, *args, guide=None):
    arguments = (args, {})
    return prepare(
        model,
        guide,
        arguments,
        arguments,
        num_chains=4,
        batch_plates="auto",
        compile=False,
        seed=0,
    )


def symmetry_of(model, *args):
    problem = problem_of(model, *args)
    torch.manual_seed(0)
    evaluate = lambda rows: torch.stack([problem.function(row)[1] for row in rows])
    return problem, find_symmetry(problem.layout, evaluate, problem.draw(3))


@pytest.mark.parametrize("num", [2, 3, 4])
def test_components_of_a_mixture_move_with_their_weights(num):
    problem, symmetry = symmetry_of(mixture, X, num)
    assert [site.name for site in problem.layout.sites] == ["w", "mu", "sd"]
    assert symmetry.groups == ((num, ((0, 0), (1, 0), (2, 0))),)
    assert symmetry.order == math.factorial(num)


def test_unequal_weights_are_no_symmetry():
    assert symmetry_of(lopsided_mixture, X, 3)[1] is None


def test_sets_of_axes_are_told_apart():
    _, symmetry = symmetry_of(two_pairs, torch.tensor(1.0))
    assert symmetry.groups == ((2, ((0, 0),)), (2, ((1, 0),)))
    assert symmetry.order == 4


def test_the_action_permutes_values_and_its_jacobian_is_autograds():
    problem, symmetry = symmetry_of(mixture, X, 3)
    torch.manual_seed(1)
    position = torch.randn(problem.layout.dim)
    values = problem.model.unpack(position)
    for element in symmetry.elements():
        rows, log_jacobian = symmetry.act([element], position)
        moved = problem.model.unpack(rows[0])
        for name, value in values.items():
            assert torch.allclose(moved[name], value[list(element[0])], atol=1e-12)
        act = lambda u, e=element: symmetry.act([e], u)[0][0]
        jacobian = torch.autograd.functional.jacobian(act, position)
        assert torch.allclose(log_jacobian[0], torch.linalg.slogdet(jacobian)[1])


def test_weights_next_to_zero_keep_their_digits():
    problem, symmetry = symmetry_of(mixture, X, 3)
    position = torch.zeros(problem.layout.dim)
    position[:2] = torch.tensor([-60.0, 45.0])
    rows, log_jacobian = symmetry.act(symmetry.elements(), position)
    back = [symmetry.act(symmetry.elements(), row) for row in rows]
    assert all((moved - position).norm(dim=-1).min() < 1e-9 for moved, _ in back)
    assert log_jacobian.isfinite().all()


def test_the_averaged_base_is_invariant_and_normalized():
    """The even mixture of all permuted densities, by enumeration in the space of values."""
    _, symmetry = symmetry_of(mixture, X, 2)
    generator = torch.Generator().manual_seed(3)
    loc = torch.randn(5, generator=generator)
    scale = 0.5 * torch.eye(5) + 0.2 * torch.randn(5, 5, generator=generator).tril(-1)
    component = DenseComponent(loc, scale)
    base = FittedBase([component], None, symmetry)
    position = loc + 0.3 * torch.randn(5, generator=generator)
    rows, log_jacobian = symmetry.act(symmetry.elements(), position)
    values = torch.stack([base.log_density(row) for row in rows]) + log_jacobian
    assert torch.allclose(values, values[:1].expand(2))
    plain = FittedBase([component])
    torch.manual_seed(0)
    draws = [base.draw() for _ in range(4000)]
    ratio = torch.stack([plain.log_density(u) - base.log_density(u) for u in draws]).exp()
    assert abs(float(ratio.mean()) - 1.0) < 5.0 * float(ratio.std()) / math.sqrt(4000)


def test_a_symmetry_survives_a_journal():
    problem, symmetry = symmetry_of(mixture, X, 3)
    again = as_symmetry(problem.layout, symmetry.spread)
    assert isinstance(again, Symmetry)
    assert again.groups == symmetry.groups
    assert as_symmetry(problem.layout, []) is None


def test_label_switching_costs_nothing():
    """Both orders of two means count: the evidence by quadrature, not log 2 below it."""
    case = HARD_PROBLEMS["two means, symmetric"]()
    engine = AnnealedImportance(
        case.model, "auto", num_chains=32, num_steps=30, seed=0, progress_bar=False
    )
    run = engine.run(*case.args)
    assert abs(float(run.lower) - case.truth()) < 0.05
    assert run.ess > 25.0
    assert any("elements of mu are exchangeable" in note for note in run.notes)


def test_a_mean_of_exchangeable_elements_needs_no_average():
    """One bulk that is symmetric already: nothing is averaged."""

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=x)

    assert symmetry_of(model, torch.tensor(2.0))[1].order == 24
    problem = problem_of(model, torch.tensor(2.0), guide="auto")
    assert problem.base.symmetry is None


@pytest.mark.slow
def test_three_components_reach_the_evidence():
    """Few data, so that prior draws with every order enumerated give the truth."""
    x = torch.tensor([-1.5, 0.2, 1.3])
    run = AnnealedImportance(
        mixture, "auto", num_chains=64, num_steps=200, seed=0, progress_bar=False
    ).run(x, 3)
    generator = torch.Generator().manual_seed(0)
    count = 400_000
    w = torch.rand(count, 3, generator=generator).log().neg()
    w = w / w.sum(-1, keepdim=True)
    mu = 2.0 * torch.randn(count, 3, generator=generator)
    sd = (-1.0 + 0.7 * torch.randn(count, 3, generator=generator)).exp()
    density = dist.Normal(mu.unsqueeze(-1), sd.unsqueeze(-1)).log_prob(x).exp()
    likelihood = (w.unsqueeze(-1) * density).sum(1).prod(-1)
    truth = float(likelihood.mean().log())
    error = float(likelihood.std() / likelihood.mean()) / math.sqrt(count)
    assert abs(float(run.lower) - truth) < 5.0 * math.hypot(float(run.std_error), error)
    if compiler_problem() is None:  # sums over orders are native code, ten times as fast
        assert "compiled" in run.density_mode
