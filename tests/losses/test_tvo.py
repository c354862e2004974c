"""TVO: closed forms, exact gradients, the order of the bounds, schedules and corrections."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_objectives import PROBLEMS, assert_within, estimated_gradient, exact_gradient
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import SVI
from pyro.optim import Adam

from pyro_anneal.losses import IWAE, TVO, Moments, Tightest
from pyro_anneal.losses.tvo import thermodynamic
from pyro_anneal.schedules import Linear, LogUniform, Sigmoid

FIVE = torch.linspace(0.0, 1.0, 6)


def riemann(betas, integration):
    """The quadrature weights, written out."""
    steps = [b - a for a, b in itertools.pairwise(betas)]
    left, right = torch.tensor([*steps, 0.0]), torch.tensor([0.0, *steps])
    return {"left": left, "right": right, "trapezoid": (left + right) / 2}[integration]


def two_particle_sum(betas, integration):
    """The finite-S objective for S = 2, of log-weights ``[2, A, A]``."""

    def objective(log_w):
        total = 0.0
        for beta, width in zip(betas, riemann(betas.tolist(), integration), strict=True):
            first = torch.sigmoid(beta * (log_w[0] - log_w[1]))
            total = total + width * (first * log_w[0] + (1 - first) * log_w[1])
        return total

    return objective


def limit_gradient(problem, betas, integration):
    """Gradient of the objective at S = infinity, by summing over atoms."""
    leaves = problem.leaves()
    mass, log_w = problem.atoms(leaves)
    value = torch.tensor(0.0)
    for beta, width in zip(betas, riemann(betas.tolist(), integration), strict=True):
        tilted = torch.softmax(mass.log() + beta * log_w, 0)
        value = value + width * (tilted * log_w).sum()
    grads = torch.autograd.grad(value, list(leaves.values()))
    return value.detach(), dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("name", ["gaussian", "chain"])
@pytest.mark.parametrize("gradient", ["reparam", "dreg"])
def test_path_gradients_are_those_of_the_two_particle_objective(name, gradient):
    problem = PROBLEMS[name]
    betas = torch.tensor([0.0, 0.15, 0.5, 1.0])
    value, truth = exact_gradient(problem, two_particle_sum(betas, "left"))
    loss = TVO(2, betas, "lower", gradient, vectorize_particles=True)
    estimate, grads = estimated_gradient(problem, loss)
    assert -estimate.item() == pytest.approx(value.item(), rel=0.03)
    for param, grad in grads.items():
        assert_within(-grad, truth[param])


@pytest.mark.parametrize("name", list(PROBLEMS))
@pytest.mark.parametrize("gradient", ["covariance", "auto"])
def test_gradients_approach_the_exact_objective(name, gradient):
    problem = PROBLEMS[name]
    value, truth = limit_gradient(problem, FIVE, "left")
    loss = TVO(10_000, FIVE, "lower", gradient, vectorize_particles=True)
    estimate, grads = estimated_gradient(problem, loss, count=20)
    assert -estimate.item() == pytest.approx(value.item(), abs=0.02)
    for param, grad in grads.items():
        assert_within(-grad, truth[param])


@pytest.mark.parametrize("name", list(PROBLEMS))
@pytest.mark.parametrize("betas", [[0.0, 1.0], [0.0, 0.2, 0.7, 1.0]], ids=["wake-phi", "three"])
def test_the_upper_sum_is_minimized_over_the_guide_alone(name, betas):
    """Table 2, TVO^U_K: the exact gradient for the guide, and none for the model."""
    problem = PROBLEMS[name]
    value, truth = limit_gradient(problem, torch.tensor(betas), "right")
    loss = TVO(10_000, betas, "upper", vectorize_particles=True)
    estimate, grads = estimated_gradient(problem, loss, count=20)
    assert estimate.item() == pytest.approx(value.item(), abs=0.02)
    for param, grad in grads.items():
        if param == "theta":
            assert not grad.any()
        else:
            assert_within(grad, truth[param])


@pytest.mark.parametrize("bound", ["lower", "upper"])
def test_both_sides_bring_a_guide_to_the_posterior(bound):
    """Closed form: slope .5, standard deviation .707, minus log evidence 3.78."""
    torch.set_default_dtype(torch.float32)
    x = torch.tensor([2.0, -1.0])

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide():
        slope, log_sd = pyro.param("a", torch.tensor(0.1)), pyro.param("s", torch.tensor(-0.4))
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(slope * x, log_sd.exp()))

    options = {"vectorize_particles": True, "max_plate_nesting": 1}
    loss = TVO(100, [0.0, 0.3, 1.0], bound, **options)
    svi = SVI(model, guide, Adam({"lr": 0.02}), loss)
    for _ in range(400):
        svi.step()
    assert pyro.param("a").item() == pytest.approx(0.5, abs=0.05)
    assert pyro.param("s").exp().item() == pytest.approx(0.5**0.5, abs=0.05)
    evidence = dist.Normal(0.0, 2.0**0.5).log_prob(x).sum().item()
    sign = -1.0 if bound == "lower" else 1.0
    assert sign * loss.loss(model, guide) == pytest.approx(evidence, abs=0.05)


def test_the_upper_sum_hides_the_model_from_the_optimizer():
    def model(x):
        z = pyro.sample("z", dist.Normal(pyro.param("theta", torch.tensor(0.1)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("phi", torch.tensor(0.2)) * x, 1.0))

    svi = SVI(model, guide, Adam({"lr": 0.1}), TVO(5, [0.0, 0.5, 1.0], bound="upper"))
    svi.step(torch.tensor(1.0))
    assert pyro.param("theta").item() == pytest.approx(0.1)
    assert pyro.param("phi").item() != pytest.approx(0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"integration": "right"}, 'use bound="upper", which minimizes it over the guide'),
        ({"integration": "trapezoid"}, "bounds from neither side, so that it cannot be trained"),
        ({"integration": "simpson"}, 'integration must be "left" or None'),
        ({"bound": "upper", "gradient": "reparam"}, "has no gradient='reparam'"),
        ({"bound": "upper", "integration": "left"}, "is the lower bound"),
        ({"bound": "right"}, 'bound must be "lower" or "upper"'),
    ],
)
def test_an_objective_without_direction_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TVO(10, **options)


def test_losses_say_what_they_are():
    assert repr(TVO(10, [0, 0.1, 1], "upper")) == (
        "TVO(num_particles=10, schedule=[0, 0.1, 1], bound='upper', gradient='covariance')"
    )
    assert repr(IWAE(3, vectorize_particles=True)) == (
        "IWAE(num_particles=3, vectorize_particles=True, gradient='auto')"
    )
    with pytest.raises(TypeError, match="IWAE has no option 'vectorise_particles'"):
        IWAE(3, vectorise_particles=True)


@pytest.mark.parametrize("name", list(PROBLEMS))
@pytest.mark.parametrize("gradient", ["covariance", "auto"])
def test_one_left_partition_is_the_elbo_in_expectation(name, gradient):
    problem = PROBLEMS[name]
    betas = torch.tensor([0.0, 1.0])
    value, truth = limit_gradient(problem, betas, "left")  # mean log-weight
    loss = TVO(2, betas, "lower", gradient, vectorize_particles=True)
    estimate, grads = estimated_gradient(problem, loss)
    assert -estimate.item() == pytest.approx(value.item(), rel=0.02)
    for param, grad in grads.items():
        assert_within(-grad, truth[param])


@pytest.mark.parametrize(
    ("num_partitions", "lower", "upper"),
    [
        (2, -2.780050, -1.905050),
        (5, -2.453322, -2.103322),
        (10, -2.356234, -2.181234),
        (50, -2.283141, -2.248141),
    ],
)
def test_values_of_a_gaussian(num_partitions, lower, upper):
    particles = draw_gaussian(replicates=40, num_particles=2000)
    betas = Linear()(num_partitions)
    for integration, truth in {
        "left": lower,
        "right": upper,
        "trapezoid": (lower + upper) / 2,
    }.items():
        values = thermodynamic(particles.log_weights, betas, integration=integration).value
        assert_within(values, truth)
        assert values.std() / 40**0.5 < 0.015


def draw_gaussian(replicates, num_particles):
    """Particles of case E01, many times over."""

    def model():
        with pyro.plate("replicates", replicates):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.full((replicates,), 2.0))

    def guide():
        with pyro.plate("replicates", replicates):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    loss = TVO(num_particles, vectorize_particles=True, max_plate_nesting=1)
    return loss._particles(model, guide, ((), {}), "score")


def test_best_beta_of_two_partitions_lies_inside():
    """TVO paper, Fig. 2(d): the sweep over beta_1 at K = 2 peaks inside (0, 1)."""
    log_w = draw_gaussian(replicates=40, num_particles=2000).log_weights
    sweep = torch.linspace(0.02, 0.98, 49)
    bounds = torch.stack(
        [thermodynamic(log_w, LogUniform(b.item())(2)).value.mean() for b in sweep]
    )
    best = bounds.argmax()
    assert sweep[best].item() == pytest.approx(0.3833, abs=0.03)
    values = thermodynamic(log_w, LogUniform(0.3833)(2)).value
    assert_within(values, -2.744669)
    assert bounds[best] > max(bounds[0], bounds[-1]) + 0.3


@pytest.mark.parametrize("num_partitions", [1, 2, 7])
def test_left_iwae_right_are_ordered_pointwise(num_partitions):
    log_w = 5.0 * torch.randn(6, 10_000) ** 3
    betas = LogUniform(0.2)(num_partitions)
    iwae = torch.logsumexp(log_w, 0) - math.log(6)
    left = thermodynamic(log_w, betas, integration="left").value
    right = thermodynamic(log_w, betas, integration="right").value
    slack = 1e-12 * log_w.abs().amax(0)
    assert (left <= iwae + slack).all()
    assert (iwae <= right + slack).all()
    assert (right - left).min() > 0


def test_coefficients_are_derivatives_of_the_value():
    log_w = (3.0 * torch.randn(5, 4)).requires_grad_()
    betas = torch.tensor([0.0, 0.02, 0.3, 1.0])
    parts = thermodynamic(log_w, betas, integration="trapezoid", path=True)
    (first,) = torch.autograd.grad(parts.value.sum(), log_w, create_graph=True)
    assert torch.allclose(first, parts.weights, rtol=1e-12)
    second = torch.stack(
        [torch.autograd.grad(first[k].sum(), log_w, retain_graph=True)[0][k] for k in range(5)]
    )
    assert torch.allclose(parts.weights - second, parts.path_weights, rtol=1e-10)


def test_a_particle_of_zero_weight():
    log_w = torch.tensor([[-torch.inf, -torch.inf], [1.0, -torch.inf], [2.0, -torch.inf]])
    betas = torch.tensor([0.0, 0.5, 1.0])
    left = thermodynamic(log_w, betas, integration="left")
    right = thermodynamic(log_w, betas, integration="right")
    assert torch.equal(left.value, torch.tensor([-torch.inf, -torch.inf]))
    weights = torch.softmax(torch.tensor([0.5, 1.0]), 0), torch.softmax(torch.tensor([1.0, 2]), 0)
    expected = sum(0.5 * (w * torch.tensor([1.0, 2.0])).sum() for w in weights)
    assert right.value[0] == pytest.approx(expected.item())
    assert right.value[1] == -torch.inf
    for part in (left, right):
        assert all(x.isfinite().all() for x in (part.weights, part.score_weights))
        assert part.weights[0, 0] == 0.0


@pytest.mark.parametrize("gradient", ["covariance", "dreg", "auto", "reparam"])
def test_an_exact_guide_has_no_noise(gradient):
    """Every log-weight is log p(x), and so the guide's gradient is exactly zero."""
    loc = torch.tensor([1.0, -0.5], requires_grad=True)

    def model(x):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(loc, 0.5**0.5))

    x = torch.tensor([2.0, -1.0])
    truth = dist.Normal(0.0, 2.0**0.5).log_prob(x).sum().item()
    for schedule in (LogUniform(0.1, partitions=3), Moments(3), Tightest(3)):
        loss = TVO(4, schedule, gradient=gradient)
        value = loss.differentiable_loss(model, guide, x)
        assert -value.item() == pytest.approx(truth, rel=1e-13)
        (grad,) = torch.autograd.grad(value, loc)
        if gradient != "reparam":  # which has: the density's gradient at fixed z has mean zero
            assert grad.abs().max() < 1e-13


def test_moments_space_the_curve_equally():
    log_w = 4.0 * torch.randn(200, 3) ** 2
    betas = Moments(4)(log_w)
    assert betas[0] == 0.0
    assert betas[-1] == 1.0
    curve = torch.stack([(torch.softmax(b * log_w, 0) * log_w).sum(0).mean() for b in betas])
    steps = curve.diff()
    assert torch.allclose(steps, steps.mean().expand(4), rtol=1e-6)
    assert not torch.allclose(betas, torch.linspace(0, 1, 5), atol=0.05)
    with pytest.raises(ValueError, match=r"Moments.partitions must be at least 1, got 0"):
        Moments(0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tightest_betas_are_the_best_of_all_choices(side):
    """Dynamic programming finds what trying all pairs and triples of the grid finds."""
    log_w = 3.0 * torch.randn(60, 4) ** 2 - 5.0 * torch.rand(60, 4)
    log_w[3, 1] = -torch.inf
    sign = 1.0 if side == "left" else -1.0

    def area(betas):
        curve = torch.stack([(torch.softmax(b * w, 0) * w).sum(0).mean() for b in betas])
        heights = curve[:-1] if side == "left" else curve[1:]
        return float((betas.diff() * heights).sum())

    w = torch.where(log_w == -torch.inf, 0.0, log_w)  # what carries no weight is left out as 0
    for partitions in (1, 2, 3):
        schedule = Tightest(partitions, grid_size=12)
        betas = schedule(log_w, side)
        assert betas.shape == (partitions + 1,)
        assert (betas.diff() > 0.0).all()
        grid = schedule._grid()
        ends = torch.tensor([0.0]), torch.tensor([1.0])
        others = [
            area(torch.cat([ends[0], grid[list(inner)], ends[1]]))
            for inner in itertools.combinations(range(12), partitions - 1)
        ]
        assert sign * area(betas) == pytest.approx(max(sign * a for a in others), rel=1e-12)
    assert sign * area(Tightest(3)(log_w, side)) > sign * area(torch.tensor([0.0, 0.05, 0.2, 1.0]))
    with pytest.raises(ValueError, match=r"Tightest.grid_size must be at least 4, got 2"):
        Tightest(5, grid_size=2)


def test_many_partitions_lead_the_guide_as_a_wake_phase_over_all_temperatures():
    """At fixed draws the coefficients of log q tend to a closed form (integration by parts)."""
    log_w = 3.0 * torch.randn(7, 4) ** 2 - 2.0
    count = len(log_w)
    parts = thermodynamic(log_w, torch.linspace(0.0, 1.0, 20_001), correction="particles")
    betas = torch.linspace(0.0, 1.0, 20_001)[:, None, None]
    mean_weight = torch.trapezoid(torch.softmax(betas * log_w, 1), betas[:, 0, 0], dim=0)
    of_log_q = parts.score_weights - parts.weights  # log w has minus log q
    assert torch.allclose(of_log_q, (mean_weight - 1.0 / count) / (count - 1), atol=1e-3)
    assert of_log_q.abs().max() > 0.02  # and is not zero, unlike the derivative of the bound


def test_the_default_has_thirty_equal_partitions():
    assert TVO(10).schedule == Linear(30)
    log_w = torch.tensor([[0.0], [9.0], [1.0]])
    default, early = (
        thermodynamic(log_w, loss.betas(log_w)).value
        for loss in (TVO(10), TVO(10, LogUniform(0.025, partitions=2)))
    )
    assert early < default < torch.logsumexp(log_w, 0) - math.log(3)


def test_the_tightest_upper_sum_lies_below_other_right_sums_and_above_iwae():
    problem = PROBLEMS["gaussian"]
    model, guide = problem.pair(problem.leaves((200,)), 200)
    values = {}
    schedules = {"tightest": Tightest(3), "moments": Moments(3), "early": [0.0, 0.01, 0.1, 1.0]}
    for name, schedule in schedules.items():
        pyro.set_rng_seed(0)
        values[name] = TVO(30, schedule, "upper", vectorize_particles=True).loss(model, guide)
    pyro.set_rng_seed(0)
    iwae = -IWAE(30, vectorize_particles=True).loss(model, guide)
    assert iwae < values["tightest"] < min(values["moments"], values["early"])


def test_chosen_betas_give_a_lower_bound():
    problem = PROBLEMS["gaussian"]
    model, guide = problem.pair(problem.leaves((500,)), 500)
    values = {}
    schedules = {"moments": Moments(5), "linear": Linear(5), "tightest": Tightest(5)}
    for name, schedule in schedules.items():
        pyro.set_rng_seed(0)
        values[name] = -TVO(50, schedule, vectorize_particles=True).loss(model, guide)
    pyro.set_rng_seed(0)
    iwae = -IWAE(50, vectorize_particles=True).loss(model, guide)
    assert values["linear"] < iwae
    assert max(values["moments"], values["linear"]) < values["tightest"] < iwae


def belief_net():
    weights = torch.tensor(np.random.RandomState(0).randn(16, 8))
    x = torch.arange(16) % 2
    states = torch.tensor([[i >> j & 1 for j in range(8)] for i in range(256)]).double()
    return weights, x.double(), states


def test_a_belief_net_of_256_states():
    """Values of the table of cases (E52), and gradients by autograd over all states."""
    weights, x, states = belief_net()
    logits_q = torch.zeros(8, requires_grad=True)
    bias = torch.zeros(16, requires_grad=True)

    def densities(z, bias, logits):
        log_p = (dist.Bernoulli(logits=(2 * z - 1) @ weights.T + bias).log_prob(x)).sum(-1)
        log_p = log_p - 8 * math.log(2)
        return log_p, dist.Bernoulli(logits=logits).log_prob(z).sum(-1)

    log_p, log_q = densities(states, bias, logits_q)
    assert torch.logsumexp(log_p, 0).item() == pytest.approx(-16.394085, abs=1e-6)
    betas = torch.tensor([0.0, 0.3, 1.0])
    exact = 0.0
    for beta, width in ((0.0, 0.3), (0.3, 0.7)):
        tilted = torch.softmax(log_q + beta * (log_p - log_q), 0)
        exact = exact + width * (tilted * (log_p - log_q)).sum()
    assert exact.item() == pytest.approx(-18.951259, abs=1e-6)
    truth = torch.autograd.grad(exact, (bias, logits_q))

    count = 60
    many_bias = bias.detach().expand(count, 16).clone().requires_grad_()
    many_logits = logits_q.detach().expand(count, 8).clone().requires_grad_()

    def model():
        with pyro.plate("replicates", count):
            z = pyro.sample("z", dist.Bernoulli(torch.full((8,), 0.5)).to_event(1))
            logits = (2 * z - 1) @ weights.T + many_bias
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x.expand(count, 16))

    def guide():
        with pyro.plate("replicates", count):
            pyro.sample("z", dist.Bernoulli(logits=many_logits).to_event(1))

    loss = TVO(4000, betas, vectorize_particles=True)
    value = loss.differentiable_loss(model, guide)
    assert -value.item() / count == pytest.approx(-18.951259, abs=0.02)
    value.backward()
    for estimates, expected in ((many_bias.grad, truth[0]), (many_logits.grad, truth[1])):
        for i in range(len(expected)):
            assert_within(-estimates[:, i], expected[i])


def test_particle_counts_options_and_betas_are_checked():
    with pytest.raises(ValueError, match="needs num_particles >= 2, got 1"):
        TVO(1)
    with pytest.raises(ValueError, match=r"betas\[2\] = 0.2 follows betas\[1\] = 0.3"):
        TVO(2, torch.tensor([0.0, 0.3, 0.2, 1.0]))
    with pytest.raises(ValueError, match="Sigmoid needs a number of steps"):
        TVO(2, Sigmoid())
    with pytest.raises(ValueError, match=r"betas\[2\] = 0.2 follows betas\[1\] = 0.3"):
        TVO(2, [0, 0.3, 0.2, 1])
    with pytest.raises(ValueError, match="gradient must be one of"):
        TVO(2, gradient="vimco")
    with pytest.raises(ValueError, match="correction must be"):
        TVO(2, correction="bessel")


def test_corrections_are_the_stated_factors():
    log_w = torch.randn(4, 3)
    betas = torch.tensor([0.0, 0.4, 1.0])
    plain = thermodynamic(log_w, betas, integration="right", correction="none").score_weights
    bessel = thermodynamic(log_w, betas, integration="right", correction="particles").score_weights
    assert torch.allclose(bessel - 0.25, (plain - 0.25) * 4 / 3)
    weighted = thermodynamic(log_w, betas, integration="right", correction="weighted")
    expected = torch.full_like(log_w, 0.25)
    for beta, width in ((0.4, 0.4), (1.0, 0.6)):
        w = torch.softmax(beta * log_w, 0)
        deviation = log_w - (w * log_w).sum(0)
        expected = expected + width * w * deviation / (1 - w.square().sum(0))
    assert torch.allclose(weighted.score_weights, expected)


def test_scores_where_nothing_is_reparameterized():
    """A guide of Pyro's fake NonreparameterizedNormal has the gradients of the Normal one."""
    problem = PROBLEMS["gaussian"]
    _, truth = limit_gradient(problem, FIVE, "left")
    leaves = problem.leaves((100,))
    model, _ = problem.pair(leaves, 100)

    def guide():
        with pyro.plate("data", 100):
            pyro.sample("z", NonreparameterizedNormal(leaves["m"], leaves["s"].exp()))

    with pytest.raises(NotImplementedError, match='guide site "z" is a NonreparameterizedNormal'):
        TVO(2, gradient="reparam").differentiable_loss(model, guide)
    TVO(4000, FIVE, gradient="auto", vectorize_particles=True).loss_and_grads(model, guide)
    for param, leaf in leaves.items():
        assert_within(-leaf.grad, truth[param])


def test_common_random_numbers_halve_the_noise():
    """TVO paper, Table 1: both means of a covariance from one set of particles, or from two."""
    weights, x, _ = belief_net()
    count, size, beta = 2000, 20, 0.1
    z = torch.bernoulli(torch.full((2, size, count, 8), 0.5))
    logits = (2 * z - 1) @ weights.T
    f = dist.Bernoulli(logits=logits).log_prob(x).sum(-1, keepdim=True)  # log w: q is the prior
    g = (1 - beta) * (z - 0.5)  # gradient of log pi with respect to the guide's logits
    w = torch.softmax(beta * f, dim=1)

    def mean(values):
        return (w * values).sum(1)

    product = mean(f * g)
    common = product[0] - mean(f)[0] * mean(g)[0]
    apart = product[0] - mean(f)[1] * mean(g)[1]
    assert common.std(0).mean() < 0.5 * apart.std(0).mean()

    # and the first is what the loss computes
    many = torch.zeros(count, 8, requires_grad=True)

    def model():
        with pyro.plate("replicates", count):
            pyro.sample("z", dist.Bernoulli(torch.full((8,), 0.5)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=logits[0]).to_event(1), obs=x)

    def guide():
        with pyro.plate("replicates", count):
            pyro.sample("z", Replayed(many, z[0]).to_event(1))

    betas = torch.tensor([0.0, beta, 1.0])
    loss = TVO(size, betas, correction="none", vectorize_particles=True, max_plate_nesting=1)
    (grad,) = torch.autograd.grad(-loss.differentiable_loss(model, guide), many)

    def expectation_gradient(beta):
        tilted = torch.softmax(beta * f[0], 0)
        deviation = f[0] - (tilted * f[0]).sum(0)
        covariance = (tilted * deviation * (1 - beta) * (z[0] - 0.5)).sum(0)
        return covariance - ((tilted - 1 / size) * (z[0] - 0.5)).sum(0)

    expected = beta * expectation_gradient(0.0) + (1 - beta) * expectation_gradient(beta)
    assert torch.allclose(grad, expected, rtol=1e-10)


class Replayed(dist.Bernoulli):
    """A Bernoulli of given logits whose draws are given."""

    def __init__(self, logits, draws):
        super().__init__(logits=logits)
        self.draws = draws

    def expand(self, batch_shape, _instance=None):
        return Replayed(self.logits.expand(batch_shape), self.draws)

    def sample(self, sample_shape=()):
        return self.draws
