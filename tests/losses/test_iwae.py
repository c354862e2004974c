"""IWAE: exact gradients, the reduction to Trace_ELBO, and no gradient lost."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_objectives import PROBLEMS, assert_within, estimated_gradient, exact_gradient
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import SGD

from pyro_anneal.losses import IWAE
from pyro_anneal.losses.iwae import leave_one_out


def log_mean(log_w):
    return torch.logsumexp(log_w, 0) - math.log(2)


CASES = [
    ("gaussian", "reparam"),
    ("gaussian", "dreg"),
    ("gaussian", "vimco"),
    ("chain", "reparam"),
    ("chain", "dreg"),
    ("chain", "vimco"),
    ("discrete", "vimco"),
    ("discrete", "auto"),
    ("mixed", "auto"),
    ("mixed", "vimco"),
]


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize(("name", "gradient"), CASES)
def test_gradient_is_that_of_the_exact_objective(name, gradient, vectorize):
    problem = PROBLEMS[name]
    _, truth = exact_gradient(problem, log_mean)
    loss = IWAE(2, gradient, vectorize_particles=vectorize, max_plate_nesting=1)
    _, grads = estimated_gradient(problem, loss)
    for param, grad in grads.items():
        assert_within(-grad, truth[param])


def test_dreg_has_less_noise_with_many_particles():
    problem = PROBLEMS["gaussian"]
    std = {}
    for gradient in ("reparam", "dreg"):
        loss = IWAE(64, gradient, vectorize_particles=True)
        _, grads = estimated_gradient(problem, loss, count=2000)
        std[gradient] = grads["m"].std()
    assert std["dreg"] < 0.2 * std["reparam"]


def test_leave_one_out_against_the_direct_formula():
    log_w = torch.tensor([[0.3, -40.0], [-2.0, 1.0], [1.5, -torch.inf], [0.0, 700.0]])
    result = leave_one_out(log_w)
    for k in range(4):
        others = torch.cat([log_w[:k], log_w[k + 1 :]])
        replaced = torch.cat([others, others.mean(0, keepdim=True)])
        expected = torch.logsumexp(replaced, 0) - math.log(4)
        assert torch.allclose(result[k], expected, rtol=1e-13)
    with pytest.raises(ValueError, match="at least 2 particles, got 1"):
        leave_one_out(torch.zeros(1))


def paired_models():
    """Models on which Trace_ELBO has a well-defined gradient."""
    data = torch.tensor([0.2, 1.9, -0.4, 3.0])

    def local_model(x):
        scale = pyro.param("scale", torch.tensor(0.9))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    def local_guide(x):
        loc = pyro.param("loc", torch.tensor([0.1, 0.2, 0.3, 0.4]))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.7))

    def global_model(x):
        mu = pyro.sample("mu", dist.Normal(pyro.param("scale", torch.tensor(0.9)), 2.0))
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Bernoulli(logits=mu))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def global_guide(x):
        loc = pyro.param("loc", torch.tensor([0.1, 0.2, 0.3, 0.4]))
        pyro.sample("mu", dist.Normal(loc.sum(), 0.5))
        with pyro.plate("data", len(x), subsample_size=2) as index:
            pyro.sample("z", dist.Bernoulli(logits=loc[index]))

    def rejection_guide(x):
        loc = pyro.param("loc", torch.tensor([0.1, 0.2, 0.3, 0.4]))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.testing.fakes.NonreparameterizedNormal(loc, 0.7))

    masked = torch.tensor([True, False, True, True])
    return {
        "local": (local_model, local_guide, data),
        "subsampled, global, discrete": (global_model, global_guide, data),
        "not reparameterized": (local_model, rejection_guide, data),
        "scaled": (
            poutine.scale(local_model, scale=0.3),
            poutine.scale(local_guide, scale=0.3),
            data,
        ),
        "masked": (
            poutine.mask(local_model, mask=masked),
            poutine.mask(local_guide, mask=masked),
            data,
        ),
    }


@pytest.mark.parametrize("name", list(paired_models()))
@pytest.mark.parametrize("vectorize", [True, False])
def test_one_particle_is_trace_elbo(name, vectorize):
    model, guide, data = paired_models()[name]
    results = []
    for loss in (
        Trace_ELBO(vectorize_particles=vectorize),
        IWAE(1, vectorize_particles=vectorize),
    ):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        value = loss.loss_and_grads(model, guide, data)
        params = pyro.get_param_store().named_parameters()
        results.append((value, {name: p.grad.clone() for name, p in params}))
    (value, grads), (our_value, our_grads) = results
    assert our_value == pytest.approx(value, rel=1e-12)
    assert grads.keys() == our_grads.keys()
    for param, grad in grads.items():
        assert torch.allclose(grad, our_grads[param], rtol=1e-10), param


@pytest.mark.parametrize("gradient", ["reparam", "dreg"])
def test_a_lost_gradient_is_an_error_that_names_the_site(gradient):
    problem = PROBLEMS["mixed"]
    model, guide = problem.pair(problem.leaves((3,)), 3)
    with pytest.raises(NotImplementedError, match='guide site "d" is a Bernoulli'):
        IWAE(2, gradient).differentiable_loss(model, guide)


def test_vimco_needs_particles_and_a_density():
    with pytest.raises(ValueError, match="num_particles >= 2, got 1"):
        IWAE(1, "vimco")
    with pytest.raises(ValueError, match="gradient must be one of"):
        IWAE(2, "renyi")

    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        pyro.sample("z", dist.Delta(pyro.param("loc", torch.tensor(0.3))))

    with pytest.raises(NotImplementedError, match='"z" is a Delta with a learnable location'):
        IWAE(2, "vimco").differentiable_loss(model, guide)
    IWAE(2).loss_and_grads(model, guide)  # a point mass is reparameterized
    assert pyro.get_param_store()["loc"].unconstrained().grad == pytest.approx(0.3)


def test_training_finds_the_posterior():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(-1.0))
        pyro.sample("z", dist.Normal(loc, 0.5**0.5))

    svi = SVI(model, guide, SGD({"lr": 0.2}), IWAE(4, "dreg", vectorize_particles=True))
    for _ in range(150):
        svi.step(torch.tensor(2.0))
    assert pyro.param("loc").item() == pytest.approx(1.0, abs=1e-3)
    assert svi.evaluate_loss(torch.tensor(2.0)) == pytest.approx(2.265512, abs=1e-4)
