"""The share of draws at which a value no longer moves: measured, named, and no false alarm."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_anneal import AnnealedImportance
from pyro_anneal.diagnostics import diagnose

pytestmark = pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")
tensor = torch.tensor


def run(prior, likelihood, *, guide=None, num_chains=64):
    def model():
        z = pyro.sample("z", prior())
        pyro.sample("y", likelihood(z), obs=tensor(1.0))

    ais = AnnealedImportance(
        model, guide, num_chains=num_chains, num_steps=4, seed=0, progress_bar=False
    )
    return ais.run()


def saturated(result):
    return [found for found in result.diagnostics if found.name == "saturated"]


coin = lambda p: dist.Bernoulli(0.2 + 0.6 * p)


def edges():
    """Mass at the edges without a closed form: a mixture of Beta."""
    shapes = torch.tensor([0.03, 5.0])
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Beta(shapes, shapes))


def test_mixtures_with_mass_at_an_edge_are_flagged_in_float32_by_name():
    torch.set_default_dtype(torch.float32)
    (found,) = saturated(run(edges, coin))
    # half of the draws are Beta(.03, .03), of which P(p > 1 - 2^-23) = .31
    assert found.value == pytest.approx(0.5 * 0.31, abs=0.15)
    assert 'of site "z" are so near to the edge' in found.message
    assert "torch.set_default_dtype(torch.float64)" in found.message


def test_correlations_at_an_edge_are_flagged():
    torch.set_default_dtype(torch.float32)
    result = run(lambda: dist.LKJCholesky(2, tensor(0.03)), lambda z: dist.Normal(z[1, 0], 1.0))
    assert saturated(result)[0].value > 0.05


def test_float64_moves_the_edge_away():
    torch.set_default_dtype(torch.float64)
    shapes = tensor([0.3, 5.0])
    mild = lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Beta(shapes, shapes)
    )
    assert saturated(run(mild, coin)) == []


@pytest.mark.parametrize("guide", [None, pytest.param("auto", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "prior",
    [
        lambda: dist.Uniform(0.0, 1.0),
        lambda: dist.Beta(0.02, 0.02),  # known in u
        lambda: dist.Normal(0.0, 1e9),
        lambda: dist.VonMises(3.0, 0.1),
        lambda: dist.LogNormal(0.0, 3.0),
    ],
)
def test_other_families_stay_unflagged(prior, guide):
    torch.set_default_dtype(torch.float32)
    assert saturated(run(prior, lambda z: dist.Normal(z, 2.0), guide=guide, num_chains=32)) == []


def test_lkj_of_three_stays_unflagged():
    prior = lambda: dist.LKJCholesky(3, tensor(1.5))
    assert saturated(run(prior, lambda z: dist.Normal(z[2, 1], 1.0))) == []


@pytest.mark.parametrize("size", [2, 3])
def test_the_ones_of_a_correlation_matrix_do_not_count(size):
    torch.set_default_dtype(torch.float32)  # where they are ones up to rounding
    assert (
        saturated(run(lambda: dist.LKJ(size, tensor(1.0)), lambda z: dist.Normal(z[1, 0], 1.0)))
        == []
    )


def test_a_guide_that_rounds_a_family_known_in_u_is_flagged():
    torch.set_default_dtype(torch.float32)

    def guide():
        logits = dist.Normal(0.0, 30.0)
        wide = dist.TransformedDistribution(logits, [dist.transforms.SigmoidTransform()])
        pyro.sample("z", wide)

    assert saturated(run(lambda: dist.Beta(0.1, 0.1), coin, guide=guide))


def test_findings_of_the_problem_outlive_a_second_look():
    torch.set_default_dtype(torch.float32)
    result = run(edges, coin)
    assert [d.name for d in diagnose(result) if d.name == "saturated"] == ["saturated"]


def test_sandwiches_carry_them():
    torch.set_default_dtype(torch.float32)

    def model():
        z = pyro.sample("z", edges())
        pyro.sample("lost", dist.Normal(0.0, 1.0))
        pyro.sample("y", coin(z), obs=tensor(1.0))

    ais = AnnealedImportance(model, num_chains=32, num_steps=3, seed=0, progress_bar=False)
    names = {found.name for found in ais.sandwich(num_simulations=2).diagnostics}
    assert {"unread", "saturated"} <= names
