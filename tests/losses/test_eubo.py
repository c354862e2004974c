"""EUBO: closed forms, exact gradients of its two posteriors, and a model that stays put."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_objectives import PROBLEMS, assert_within, estimated_gradient
from pyro import poutine
from pyro.infer import SVI, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.optim import SGD

from pyro_anneal.losses import EUBO

REPLICATES = 20_000


def limit_gradient(problem):
    """EUBO and its gradient in the guide, by summing over atoms of q tilted to the posterior."""
    leaves = problem.leaves()
    mass, log_w = problem.atoms({n: p.detach() for n, p in leaves.items()})
    posterior = torch.softmax(mass.log() + log_w, 0)
    return (posterior * log_w).sum()


@pytest.mark.parametrize("name", ["gaussian", "discrete", "mixed"])
def test_importance_approaches_the_bound(name):
    """-E_p(z|x)[grad log q], by finite differences of the exact bound in each parameter."""
    problem = PROBLEMS[name]
    loss = EUBO(10_000, vectorize_particles=True)
    value, grads = estimated_gradient(problem, loss, count=20)
    assert value.item() == pytest.approx(limit_gradient(problem).item(), abs=0.02)
    for param in problem.params:
        if param == "theta":
            assert torch.equal(grads[param], torch.zeros(20))
            continue
        ends = []
        for step in (-1e-5, 1e-5):
            moved = type(problem)()
            moved.params = {**problem.params, param: problem.params[param] + step}
            ends.append(limit_gradient(moved).item())
        assert_within(grads[param], (ends[1] - ends[0]) / 2e-5)


def simulated_problem(leaves):
    """z ~ N(.4, 1), x ~ N(z, .7) and an amortized guide N(a x + b, e^s)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.4, 1.0))
            pyro.sample("x", dist.Normal(z, 0.7), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(leaves["a"] * x + leaves["b"], leaves["s"].exp()))

    return model, guide


def amortized_leaves(count):
    values = {"a": 0.3, "b": 0.5, "s": -0.2}
    return {n: torch.full((count,), v, requires_grad=True) for n, v in values.items()}


def test_one_simulated_pair_is_the_sleep_phase():
    """E_p(x, z)[log p(x, z) - log q(z | x)] for Gaussians, value and gradient."""
    leaves = amortized_leaves(REPLICATES)
    model, guide = simulated_problem(leaves)
    loss = EUBO(1, "simulated")
    value = loss.differentiable_loss(model, guide, torch.zeros(REPLICATES))
    value.backward()

    a, b, s = (torch.tensor(v, requires_grad=True) for v in (0.3, 0.5, -0.2))
    # residual z - a x - b = (1 - a) z - a e - b, with z ~ N(.4, 1), e ~ N(0, .7)
    residual = ((1 - a) * 0.4 - b) ** 2 + (1 - a) ** 2 + a**2 * 0.49
    cross_entropy = 0.5 * residual * (-2 * s).exp() + s + 0.5 * math.log(2 * math.pi)
    entropy = -math.log(2 * math.pi) - 1.0 - math.log(0.7)
    truth = entropy + cross_entropy
    truth.backward()
    assert value.item() / REPLICATES == pytest.approx(truth.item(), abs=0.03)
    for param, exact in zip(("a", "b", "s"), (a, b, s), strict=True):
        assert_within(leaves[param].grad, exact.grad)


def log_q(leaves, z, x):
    return dist.Normal(leaves["a"] * x + leaves["b"], leaves["s"].exp()).log_prob(z)


@pytest.mark.parametrize("reparameterized", [True, False])
def test_more_particles_tighten_an_upper_bound(reparameterized):
    """K = 2: value and gradient against quadrature over (x, z*, noise)."""
    from exact_objectives import hermite

    leaves = amortized_leaves(REPLICATES)
    model, guide = simulated_problem(leaves)
    if not reparameterized:

        def guide(x):
            fake = dist.testing.fakes.NonreparameterizedNormal
            with pyro.plate("data", len(x)):
                pyro.sample("z", fake(leaves["a"] * x + leaves["b"], leaves["s"].exp()))

    loss = EUBO(2, "simulated", vectorize_particles=True)
    value = loss.differentiable_loss(model, guide, torch.zeros(REPLICATES))
    value.backward()

    exact = {
        n: torch.tensor(v, requires_grad=True) for n, v in {"a": 0.3, "b": 0.5, "s": -0.2}.items()
    }
    eps, weight = hermite(40)
    z = (0.4 + eps)[:, None, None]
    x = z + 0.7 * eps[None, :, None]
    draw = exact["a"] * x + exact["b"] + exact["s"].exp() * eps
    mass = weight[:, None, None] * weight[:, None] * weight

    def log_weight(z):
        joint = dist.Normal(0.4, 1.0).log_prob(z) + dist.Normal(z, 0.7).log_prob(x)
        return joint - log_q(exact, z, x)

    bound = torch.logaddexp(log_weight(z).expand(40, 40, 40), log_weight(draw)) - math.log(2)
    truth = (mass * bound).sum()
    truth.backward()
    evidence = -0.5 * math.log(2 * math.pi * 1.49) - 0.5
    assert truth.item() > evidence
    assert value.item() / REPLICATES == pytest.approx(truth.item(), abs=0.03)
    for param, leaf in exact.items():
        assert_within(leaves[param].grad, leaf.grad)


def test_upper_bounds_decrease_to_the_evidence_with_particles():
    leaves = amortized_leaves(REPLICATES)
    model, guide = simulated_problem(leaves)
    evidence = -0.5 * math.log(2 * math.pi * 1.49) - 0.5
    values = [
        EUBO(k, "simulated", vectorize_particles=True).loss(model, guide, torch.zeros(REPLICATES))
        / REPLICATES
        for k in (1, 3, 30)
    ]
    assert values[0] > values[1] > values[2] > evidence - 0.02
    assert values[2] < evidence + 0.1


def test_the_model_learns_nothing_and_svi_does_not_see_it():
    def model(x):
        loc = pyro.param("model_loc", torch.tensor(0.3))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.0)) * x, 0.8))

    x = torch.tensor([2.0, -1.0, 0.4])
    for loss in (EUBO(5), EUBO(1, "simulated"), EUBO(5, "simulated")):
        pyro.clear_param_store()
        svi = SVI(model, guide, SGD({"lr": 0.01, "weight_decay": 0.5}), loss)
        for _ in range(3):
            svi.step(x)
        assert pyro.param("model_loc").item() == pytest.approx(0.3, abs=1e-12)
        assert pyro.param("a").item() != 0.0


@pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal])
def test_autoguides_are_clamped_to_the_simulation(make):
    """A guide on an unconstrained space: the density at the simulated z has its Jacobian."""

    def model(x):
        scale = pyro.sample("scale", dist.LogNormal(0.3, 0.5))
        mu = pyro.sample("mu", dist.Normal(1.0, 2.0))
        with pyro.plate("data", 2):
            pyro.sample("x", dist.Normal(mu, scale), obs=x)

    x = torch.tensor([0.5, 1.5])
    guide = make(model, init_scale=0.6)
    guide(x)
    loss = EUBO(1, "simulated")
    pyro.set_rng_seed(0)
    value = loss.loss(model, guide, x)
    pyro.set_rng_seed(0)
    trace = poutine.trace(poutine.uncondition(model)).get_trace(x)
    scale, mu = trace.nodes["scale"]["value"], trace.nodes["mu"]["value"]
    if make is AutoNormal:
        loc = torch.stack([guide.locs.scale, guide.locs.mu])
    else:
        loc = guide.loc
    gaussian = dist.Normal(loc, 0.6).log_prob(torch.stack([scale.log(), mu])).sum()
    expected = trace.log_prob_sum() - (gaussian - scale.log())
    assert value == pytest.approx(expected.item(), rel=1e-10)


def test_enumerated_sites_are_summed_out_of_the_simulation():
    @config_enumerate
    def model(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(z + 2 * k, 0.7), obs=x)

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(x / 2, 1.1))

    x = torch.tensor([0.1, 0.2, 0.3])
    pyro.set_rng_seed(0)
    value = EUBO(1, "simulated").loss(model, guide, x)
    pyro.set_rng_seed(0)
    trace = poutine.trace(poutine.uncondition(model)).get_trace(x)
    z, x = trace.nodes["z"]["value"], trace.nodes["x"]["value"]
    parts = [
        math.log(p) + dist.Normal(z + 2 * k, 0.7).log_prob(x) for k, p in ((0, 0.7), (1, 0.3))
    ]
    expected = dist.Normal(0.0, 1.0).log_prob(z) + torch.logaddexp(*parts)
    expected = expected - dist.Normal(x / 2, 1.1).log_prob(z)
    assert value == pytest.approx(expected.sum().item(), rel=1e-10)


def test_arguments_and_densities_are_checked():
    with pytest.raises(ValueError, match=r'"importance".* needs num_particles >= 2, got 1'):
        EUBO(1)
    with pytest.raises(ValueError, match='posterior must be "importance" or "simulated"'):
        EUBO(2, "exact")
    x = torch.tensor([0.5, 1.5])

    def model(x):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def narrow(x):
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Uniform(-1e-6, 1e-6))

    with (
        pytest.raises(ValueError, match='no density at the latent "z"'),
        pyro.validation_enabled(False),
    ):
        EUBO(1, "simulated").loss(model, narrow, x)

    def derived(x):
        with pyro.plate("data", 2):
            u = pyro.sample("u", dist.Normal(x / 2, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(2.0 * u, log_density=-math.log(2.0)))

    with pytest.raises(ValueError, match='the guide puts a Delta at the latent "z"'):
        EUBO(1, "simulated").loss(model, derived, x)
    with pytest.raises(ValueError, match="AutoDelta has no density"):
        EUBO(1, "simulated").loss(model, AutoDelta(model), x)

    def doubled(x):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=2 * x)

    with pytest.raises(ValueError, match=r"\['x'\].*make_args=lambda observed"):
        EUBO(1, "simulated").loss(doubled, narrow, x)


def test_make_args_decides_what_the_guide_sees():
    def model(data):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data["x"])

    seen = []

    def guide(data):
        seen.append(data["x"])
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(data["x"] / 2, 1.0))

    data = {"x": torch.tensor([100.0, 200.0])}
    loss = EUBO(1, "simulated", make_args=lambda observed: (({"x": observed["x"]},), {}))
    loss.loss(model, guide, data)
    assert all((x.abs() < 10).all() for x in seen)
