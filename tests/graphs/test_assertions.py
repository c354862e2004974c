"""Assertions and Pyro's shortcuts do not keep a model from being recorded; other branches do."""

import pyro
import pyro.distributions as dist
import pyro.distributions.stable as pyro_stable
import pyro.infer.reparam.stable as pyro_reparam
import pytest
import torch
from asserting_models import asserting, counting
from pyro.infer.reparam import StableReparam, SymmetricStableReparam

from pyro_anneal.graphs.assertions import without_shortcuts
from pyro_anneal.problems.problem import prepare


def problem(model):
    return prepare(
        model, None, ((), {}), ((), {}), num_chains=3, batch_plates="auto", compile=False, seed=0
    )


def test_assertions_about_latents_are_recorded():
    found = problem(asserting)
    assert found.density.mode == "graph"
    u = torch.tensor([[-1.0], [0.2], [1.4]]).to(found.layout.dtype)
    state = found.density(u)
    prior = dist.Normal(0.0, 1.0).log_prob(u[:, 0])
    likelihood = dist.Normal(u[:, 0].exp(), 0.5).log_prob(torch.tensor(1.0))
    assert torch.allclose(state.log_target, prior + likelihood)
    with pytest.warns(UserWarning, match="needs the value of a latent"):
        assert problem(counting).density.mode == "eager"


def symmetric():
    with pyro.plate("rows", 3):
        z = pyro.sample("z", dist.Stable(1.7, 0.0, 1.0, 0.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=torch.tensor([-1.0, 0.2, 2.0]))


def observed():
    stability = pyro.sample("stability", dist.Uniform(0.5, 2.0))
    with pyro.plate("rows", 3):
        y = torch.tensor([-1.0, 0.2, 2.0])
        pyro.sample("y", dist.Stable(stability, 0.3, 1.0, 0.0), obs=y)


def at_the_holes():
    stability = pyro.sample("stability", dist.Uniform(0.96, 1.04))
    with pyro.plate("rows", 3):
        y = torch.tensor([-0.001, 0.0, 0.001]) - 0.3 * (0.525 * torch.pi * torch.ones(3)).tan()
        pyro.sample("y", dist.Stable(stability, 0.3, 1.0, 0.0), obs=y)


def warned():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    z = pyro.util.warn_if_nan(z, "z")
    pyro.factor("y", pyro.util.warn_if_inf(-z.square(), "y"))


def test_checks_that_only_warn_are_not_branches():
    found = problem(warned)
    assert found.density.mode == "graph"
    torch.manual_seed(1)
    found.density.check(found.draw(4))


@pytest.mark.parametrize(
    "model",
    [
        pyro.poutine.reparam(symmetric, {"z": SymmetricStableReparam()}),
        pyro.poutine.reparam(observed, {"y": StableReparam()}),
        observed,
        at_the_holes,
    ],
    ids=["symmetric", "observed", "own density", "own density at its holes"],
)
def test_stable_models_are_recorded_and_agree_with_pyro(model):
    found = problem(model)
    assert found.density.mode == "graph"
    torch.manual_seed(1)
    found.density.check(found.draw(8))  # against the model itself, or raises


STABILITY = torch.tensor([0.5, 0.991, 0.999, 1.0, 1.004, 1.3, 1.9], dtype=torch.float64)


@pytest.mark.parametrize("stability", [STABILITY, STABILITY[[0, -1]]], ids=["near 1", "far"])
@pytest.mark.parametrize("coords", ["S0", "S"])
def test_the_branch_free_transform_is_pyros(coords, stability):
    count = len(stability)
    generator = torch.Generator().manual_seed(2)
    uniform = torch.rand(count, generator=generator, dtype=torch.float64) * 3.0 - 1.5
    exponential = -torch.rand(count, generator=generator, dtype=torch.float64).log()
    skew = torch.full((count,), 0.4, dtype=torch.float64)

    def value_and_gradient():
        leaf = stability.clone().requires_grad_()
        value = pyro_stable._standard_stable(leaf, skew, uniform, exponential, coords)
        (grad,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), grad

    theirs = value_and_gradient()
    with without_shortcuts():
        ours = value_and_gradient()
    far = ~(stability == 1.0) if coords == "S" else slice(None)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one[far], other[far], rtol=1e-9)


@pytest.mark.parametrize("stability", [STABILITY, STABILITY[[0, -1]]], ids=["near 1", "far"])
def test_the_branch_free_shift_is_pyros(stability):
    skew = torch.linspace(-0.9, 0.7, len(stability), dtype=torch.float64)

    def value_and_gradient():
        leaf = stability.clone().requires_grad_()
        scale = skew.abs().pow(leaf.reciprocal())
        value = pyro_reparam._safe_shift(leaf, skew, scale, skew.abs())
        return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    theirs = value_and_gradient()
    with without_shortcuts():
        ours = value_and_gradient()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-9)
