"""Latents that no observation depends on are named; parents, branches and missing data are not."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib import gp

from pyro_anneal import AnnealedImportance, AnnealingWarning
from pyro_anneal.models.relevance import unread_sites


def unread(model, *args):
    def trace():
        with torch.no_grad():
            return poutine.trace(model).get_trace(*args)

    return unread_sites(model, (args, {}), trace(), trace())


def gaussian_process():
    X = torch.linspace(0, 1, 6)
    likelihood = gp.likelihoods.Gaussian(variance=torch.tensor(0.1))
    return gp.models.VariationalGP(X, torch.sin(3 * X), gp.kernels.RBF(1), likelihood).model


@pytest.mark.parametrize("guide", [pytest.param("auto", marks=pytest.mark.slow), None])
def test_the_latent_function_of_a_variational_process(guide):
    ais = AnnealedImportance(
        gaussian_process(), guide, num_chains=16, num_steps=10, seed=0, progress_bar=False
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = ais.run()
    assert "unread" in {found.name for found in result.diagnostics}
    texts = [str(w.message) for w in caught if issubclass(w.category, AnnealingWarning)]
    assert any("no observed site depends on latent site(s) ['f']" in text for text in texts)


def test_parents_count_by_their_children_and_siblings_do_not():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.LogNormal(mu, 1.0))
        with pyro.plate("groups", 4):
            theta = pyro.sample("theta", dist.Normal(0.0, tau))
        lost = pyro.sample("lost", dist.Normal(theta[0], 1.0))
        pyro.sample("lost child", dist.Normal(lost, 1.0))
        pyro.sample("y", dist.Normal(theta.sum(), 1.0), obs=torch.tensor(0.3))

    assert unread(model) == ("lost", "lost child")


def test_dependence_without_a_gradient_counts():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        c = pyro.sample("c", dist.Gamma(2.0, 1.0))
        k = pyro.sample("k", dist.Categorical(torch.ones(3)))
        loc = (a > 0).float() + k.float() + (1.0 if b.item() > 0 else -1.0) + float(c.numpy())
        pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.tensor(0.3))

    assert unread(model) == ()


@pytest.mark.parametrize("seed", range(5))
def test_discrete_latents_are_read_whatever_is_drawn(seed):
    def model():
        k = pyro.sample("k", dist.Bernoulli(0.05))
        n = pyro.sample("n", dist.Poisson(0.1))
        with pyro.plate("rows", 2):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.9, 0.05, 0.05])))
        lost = pyro.sample("lost", dist.Binomial(3, 0.1))
        pyro.sample("lost child", dist.Bernoulli(0.2 + 0.1 * lost))
        loc = k + n + torch.tensor([0.0, 1.0, 2.0])[c].sum()
        pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.tensor(0.3))

    pyro.set_rng_seed(seed)
    assert unread(model) == ("lost", "lost child")


def test_factors_read_and_masks_and_missing_data_do_not_alarm():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.factor("f", -a.square())
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            mask = torch.tensor([True, False, True])
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.ones(3), obs_mask=mask)

    assert unread(model) == ()


def test_latents_of_simplexes_scales_and_enumerated_mixtures_are_read():
    def model(x):
        w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("parts", 2):
            loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(w), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc[k], 1.0), obs=x)

    assert unread(model, torch.tensor([-1.0, 0.5, 2.0])) == ()


def spike_and_slab():
    slab = pyro.sample("slab", dist.Normal(0.0, 2.0))
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.01)))
        pyro.sample("y", dist.Normal(slab * z, 0.5), obs=torch.tensor([1.0, 0.2, 0.0]))


def one_of_ten():
    means = [pyro.sample(f"mean {k}", dist.Normal(0.0, 1.0)) for k in range(10)]
    z = pyro.sample("z", dist.Categorical(torch.ones(10)))
    pyro.sample("y", dist.Normal(torch.stack(means)[z], 1.0), obs=torch.tensor(0.5))


def one_hot():
    means = [pyro.sample(f"mean {k}", dist.Normal(0.0, 1.0)) for k in range(4)]
    z = pyro.sample("z", dist.OneHotCategorical(torch.ones(4)))
    pyro.sample("y", dist.Normal((torch.stack(means) * z).sum(-1), 1.0), obs=torch.tensor(0.5))


def two_switches():
    jump = pyro.sample("jump", dist.Gamma(2.0, 1.0))
    z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.01)).to_event(1))
    pyro.sample("y", dist.Poisson(1.0 + jump * z[0] * (1.0 - z[1])), obs=torch.tensor(4.0))


def count_beyond_three():
    slope = pyro.sample("slope", dist.LogNormal(0.0, 1.0))
    n = pyro.sample("n", dist.Poisson(torch.tensor(0.1)))
    pyro.sample("y", dist.Normal(slope * (n - 3.0).relu(), 1.0), obs=torch.tensor(0.5))


def far_edge():
    c = pyro.sample("c", dist.Normal(0.0, 1.0))
    a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.4)))
    pyro.sample("y", dist.Normal(a * (c - 2.5).relu(), 1.0), obs=torch.tensor(0.5))


@pytest.mark.parametrize(
    "model",
    [spike_and_slab, one_of_ten, one_hot, two_switches, count_beyond_three, far_edge],
    ids=lambda model: model.__name__,
)
def test_what_rare_values_of_others_make_matter_is_read(model):
    pyro.set_rng_seed(0)
    assert unread(model) == ()


def test_unread_beside_discrete_latents_is_still_named():
    def model():
        spike_and_slab()
        with pyro.plate("more", 2):
            flag = pyro.sample("flag", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("lost", dist.Normal(flag, 1.0))

    assert unread(model) == ("flag", "lost")
