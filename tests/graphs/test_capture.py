"""Graphs of one chain's densities against the model itself, and everything that must not pass."""

import math
from collections import OrderedDict

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from torch import nn
from torch._inductor import cpp_builder

from pyro_anneal.graphs import inductor as compilation
from pyro_anneal.graphs import kept
from pyro_anneal.graphs.captured import capture
from pyro_anneal.graphs.inductor import compiler_problem

K = 4
needs_compiler = pytest.mark.skipif(
    compiler_problem(torch.device("cpu")) is not None, reason="needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    """Captures anew whatever other tests have captured."""
    monkeypatch.setattr("pyro_anneal.graphs.kept._GRAPHS", OrderedDict())


def standard(u):
    return -0.5 * u.square().sum(-1)


# Densities of one chain, written with Pyro where a model would be.

SCHOOLS_Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
SCHOOLS_SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)


def eight_schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    log_tau = pyro.sample("log_tau", dist.Normal(5.0, 1.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, log_tau.exp()))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def schools(y=SCHOOLS_Y, sigma=SCHOOLS_SIGMA):
    def function(u):
        data = {"mu": u[0], "log_tau": u[1], "theta": u[2:]}
        model = poutine.condition(eight_schools, data=data)
        trace = poutine.trace(model).get_trace(y, sigma)
        trace.compute_log_prob()
        log_prior = sum(trace.nodes[name]["log_prob"].sum() for name in data)
        return log_prior, log_prior + trace.nodes["y"]["log_prob"].sum()

    return function


def schools_truth(u):
    """Log joint and its gradient, written out."""
    mu, log_tau, theta = u[:, 0], u[:, 1], u[:, 2:]
    variance = (2 * log_tau).exp().unsqueeze(-1)
    residual = theta - mu.unsqueeze(-1)
    log_joint = (
        -0.5 * (mu / 10) ** 2
        - math.log(10)
        - 0.5 * (log_tau - 5) ** 2
        - 0.5 * (residual**2 / variance).sum(-1)
        - 8 * log_tau
        - 0.5 * (((SCHOOLS_Y - theta) / SCHOOLS_SIGMA) ** 2).sum(-1)
        - SCHOOLS_SIGMA.log().sum()
        - 9 * math.log(2 * math.pi)
    )
    d_theta = -residual / variance + (SCHOOLS_Y - theta) / SCHOOLS_SIGMA**2
    d_mu = -mu / 100 + (residual / variance).sum(-1)
    d_log_tau = -(log_tau - 5) + (residual**2 / variance).sum(-1) - 8
    return log_joint, torch.cat([d_mu[:, None], d_log_tau[:, None], d_theta], -1)


@config_enumerate
def mixture_model(data):
    weight = pyro.sample("weight", dist.Beta(2.0, 1.0))
    with pyro.plate("clusters", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(data)):
        label = pyro.sample("label", dist.Bernoulli(weight)).long()
        pyro.sample("x", dist.Normal(loc[label], 1.0), obs=data)


def mixture(data):
    def function(u):
        weight = u[0].sigmoid()
        values = {"weight": weight, "loc": u[1:]}
        model = poutine.enum(poutine.condition(mixture_model, data=values), first_available_dim=-2)
        trace = poutine.trace(model).get_trace(data)
        evaluator = TraceEinsumEvaluator(trace, True, 1)
        log_det = weight.log() + (1 - weight).log()
        return standard(u), evaluator.log_prob(trace) + log_det

    return function


def mixture_truth(u, data):
    w = u[:, :1].sigmoid()
    first = (1 - w).log() + dist.Normal(u[:, 1:2], 1.0).log_prob(data)
    second = w.log() + dist.Normal(u[:, 2:3], 1.0).log_prob(data)
    prior = dist.Beta(2.0, 1.0).log_prob(w[:, 0]) + dist.Normal(0.0, 3.0).log_prob(u[:, 1:]).sum(
        -1
    )
    return torch.logaddexp(first, second).sum(-1) + prior + (w * (1 - w)).log()[:, 0]


class LinearVAE(nn.Module):
    """Decoder and amortized guide of a linear VAE, with a plate over data."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(2, 3)
        self.encoder = nn.Linear(3, 2)

    def log_densities(self, x):
        def function(u):  # [N, 2]
            base = dist.Normal(self.encoder(x), 0.7).log_prob(u).sum(-1)
            prior = dist.Normal(0.0, 1.0).log_prob(u).sum(-1)
            return base, prior + dist.Normal(self.decoder(u), 1.0).log_prob(x).sum(-1)

        return function

    def truth(self, x, u):
        q, w, b = self.encoder(x), self.decoder.weight, self.decoder.bias
        log_base = -0.5 * ((u - q) / 0.7).square().sum(-1) - 2 * math.log(
            0.7 * math.sqrt(2 * math.pi)
        )
        residual = x - u @ w.T - b
        log_target = -0.5 * (u.square().sum(-1) + residual.square().sum(-1)) - 2.5 * math.log(
            2 * math.pi
        )
        return log_base, log_target, -(u - q) / 0.49, -u + residual @ w


def write_columns(u):
    h = torch.zeros(3, 3)
    h[:, 0] = u
    h[1, 1:] = u[:2].exp()
    h.t()[2] += u.cumsum(0)
    return standard(u), -0.5 * (h @ h).square().sum() - h[0, 0]


def write_columns_truth(u):
    e, c = u[:2].exp(), u.cumsum(0)
    rows = [
        torch.stack([u[0], torch.zeros(()), c[0]]),
        torch.stack([u[1], e[0], e[1] + c[1]]),
        torch.stack([u[2], torch.zeros(()), c[2]]),
    ]
    h = torch.stack(rows)
    return -0.5 * (h @ h).square().sum() - u[0]


MASK = torch.tensor([True, False, True])


def by_mask(u):
    h = torch.ones(3)
    h[MASK] = u[1:]
    kept = torch.masked_select(u, MASK)
    return standard(u), -(u[MASK] ** 4).sum() - (h * u).sum() - (kept[0] * kept[1]).sin()


def by_mask_truth(u):
    return -(u[0] ** 4) - u[2] ** 4 - u[1] * u[0] - u[1] - u[2] * u[2] - (u[0] * u[2]).sin()


def constant_base(u):
    return torch.tensor(-1.5), -u.square().sum() * u.cos().prod()


def sequential(u):
    total = torch.zeros(())
    for i in pyro.plate("sequential", 3):
        total = total - (i + 1) * u[i] ** 2
    if (MASK.double() > 0).any():  # a branch on data
        total = total - u.sum()
    return standard(u), total


def logistic(u):
    """A fused derivative that does not broadcast its seed over chains."""
    return standard(u), nn.functional.logsigmoid(u).sum()


def double_gradient(u):
    """A density that itself differentiates, as a learned sampler's does."""
    v = u.clone()
    (force,) = torch.autograd.grad(-(v**4).sum(), v, create_graph=True)
    return standard(u), -force.square().sum()


def silent(u):
    """Parts that autograd is told to ignore must not come back in the graph."""
    with torch.no_grad():
        level = u.square().sum()
    return standard(u), -(level * u).sum() - (u.detach() * u).sum()


def finite_differences(truth, u, width=1e-5):
    """Central differences of a function of one chain, ``[K, D]`` for positions ``[K, D]``."""
    shifts = width * torch.eye(u.shape[-1])
    rows = [[(truth(v + s) - truth(v - s)) / (2 * width) for s in shifts] for v in u]
    return torch.tensor(rows)


def slow_capture(function, example, match, **options):
    with pytest.warns(UserWarning, match=match):
        return capture(function, example, num_chains=K, **options)


# Values and gradients.


def test_eight_schools_has_the_closed_form():
    density = capture(schools(), torch.zeros(10), num_chains=K)
    u = torch.randn(K, 10) + 2
    state = density(u)
    log_joint, grad = schools_truth(u)
    assert density.mode == "graph"
    assert density.reason is None
    assert state.position is u
    torch.testing.assert_close(state.log_target, log_joint)
    torch.testing.assert_close(state.grad_target, grad)
    likelihood_grad = (SCHOOLS_Y - u[:, 2:]) / SCHOOLS_SIGMA**2
    prior_grad = grad - torch.cat([torch.zeros(K, 2), likelihood_grad], -1)
    torch.testing.assert_close(state.grad_base, prior_grad)


def test_enumerated_mixture_sums_labels():
    data = torch.tensor([-1.0, 0.3, 2.5, 4.0, 4.2])
    density = capture(mixture(data), torch.zeros(3), num_chains=K)
    u = torch.randn(K, 3).requires_grad_()
    truth = mixture_truth(u, data)
    (grad,) = torch.autograd.grad(truth.sum(), u)
    state = density(u.detach())
    assert density.mode == "graph"
    torch.testing.assert_close(state.log_target, truth.detach())
    torch.testing.assert_close(state.grad_target, grad)


def test_rows_of_a_plate_have_their_own_gradient():
    vae, x = LinearVAE(), torch.randn(5, 3)
    density = capture(vae.log_densities(x), torch.zeros(5, 2), num_chains=K)
    u = torch.randn(K, 5, 2)
    assert density.mode == "graph"
    torch.testing.assert_close(tuple(density(u)[1:]), vae.truth(x, u))


@pytest.mark.parametrize(
    ("function", "truth"),
    [
        (write_columns, write_columns_truth),
        (by_mask, by_mask_truth),
        (constant_base, lambda u: -u.square().sum() * u.cos().prod()),
        (sequential, lambda u: -(torch.tensor([1.0, 2.0, 3.0]) * u**2 + u).sum()),
        (logistic, lambda u: -torch.log1p(torch.exp(-u)).sum()),
        (double_gradient, lambda u: -16 * (u**6).sum()),
    ],
)
def test_awkward_code_becomes_a_graph(function, truth):
    density = capture(function, torch.tensor([0.3, -0.2, 0.5]), num_chains=K)
    u = 0.8 * torch.randn(K, 3)
    state = density(u)
    assert density.mode == "graph"
    torch.testing.assert_close(state.log_target, torch.stack([truth(v) for v in u]))
    expected = finite_differences(truth, u)
    torch.testing.assert_close(state.grad_target, expected, rtol=1e-6, atol=1e-6)


def test_a_scale_that_rows_share_may_change_its_shape():
    scale = torch.linspace(0.5, 2.0, 7)

    def function(u):
        variance = scale.expand(5, 7).square().reshape(-1)
        return -0.5 * u.square().sum(-1), -(u.square() / variance).sum(-1)

    density = capture(function, torch.zeros(35), num_chains=K)
    u = torch.randn(K, 35)
    assert density.mode == "graph"
    expected = -(u / scale.repeat(5)).square().sum(-1)
    torch.testing.assert_close(density(u).log_target, expected)


def test_a_constant_density_has_zero_gradient():
    state = capture(constant_base, torch.ones(3), num_chains=K)(torch.randn(K, 3))
    assert torch.equal(state.log_base, torch.full((K,), -1.5))
    assert torch.equal(state.grad_base, torch.zeros(K, 3))


def test_what_the_model_detaches_stays_detached():
    u = torch.randn(K, 3)
    state = capture(silent, torch.ones(3), num_chains=K)(u)
    torch.testing.assert_close(state.grad_target, -u.square().sum(-1, keepdim=True) - u)


def test_another_number_of_chains_is_vectorized_when_met():
    density = capture(schools(), torch.zeros(10), num_chains=K)
    for count in (1, 7):
        u = torch.randn(count, 10)
        torch.testing.assert_close(density(u).log_target, schools_truth(u)[0])
    assert density.num_evaluations == 2


@pytest.mark.parametrize(
    ("rows", "columns", "shared", "expected"),
    [
        (1000, 3, 3, 70),  # small: all chains together
        (60_000, 3, 3, 1),  # operations take longer than their calls
        (30_000, 3, 40, 69),  # a large matrix is read once for several chains
    ],
)
def test_many_data_are_evaluated_for_few_chains_at_a_time(rows, columns, shared, expected):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, shared, generator=generator, dtype=torch.float64)
    y = torch.randn(rows, generator=generator, dtype=torch.float64)
    rest = torch.zeros(shared - columns, dtype=torch.float64)

    def function(u):
        return standard(u), standard(u) + torch.log1p(
            (y - x @ torch.cat([u, rest])).square()
        ).sum()

    example = torch.zeros(columns, dtype=torch.float64)
    density = capture(function, example, num_chains=70)
    assert density.chains_at_once(70) == expected
    u = torch.randn(70, columns, generator=generator, dtype=torch.float64)
    state = density(u)
    own = x[:, :columns]
    residual = y - u @ own.T
    torch.testing.assert_close(
        state.log_target, standard(u) + residual.square().log1p().sum(-1), rtol=1e-10, atol=0.0
    )
    slope = -2.0 * residual / (1.0 + residual.square())
    torch.testing.assert_close(state.grad_target, slope @ own - u, rtol=1e-8, atol=1e-6)
    assert density.mode == "graph"


def test_dtype_is_kept():
    torch.set_default_dtype(torch.float32)  # else the model's own constants are float64
    y, sigma = SCHOOLS_Y.float(), SCHOOLS_SIGMA.float()
    density = capture(schools(y, sigma), torch.zeros(10, dtype=torch.float32), num_chains=K)
    state = density(torch.ones(K, 10, dtype=torch.float32))
    assert {part.dtype for part in state} == {torch.float32}
    assert all(part.is_contiguous() for part in state)


def test_position_of_another_shape_raises():
    density = capture(schools(), torch.zeros(10), num_chains=K)
    with pytest.raises(ValueError, match=r"position has shape \[4, 9\], expected \[K, 10\]"):
        density(torch.zeros(K, 9))


def test_log_density_of_another_shape_raises():
    def function(u):
        return standard(u), -u.square()

    with pytest.raises(ValueError, match=r"log_target has shape \[3\], expected \[\]"):
        capture(function, torch.zeros(3), num_chains=K)


# Chains that fail.

BASE_MATRIX = torch.tensor([[2.0, 0.3], [0.3, 1.0]], dtype=torch.float64)


def factorized(kind):
    def function(u):
        matrix = BASE_MATRIX * u[0]
        if kind == "cholesky":
            value = torch.linalg.cholesky(matrix).diagonal().log().sum()
        elif kind == "inverse":
            value = torch.linalg.inv(matrix).sum()
        else:
            value = torch.linalg.solve(matrix, u[1:]).sum()
        return standard(u), value

    return function


@pytest.mark.parametrize(("kind", "bad"), [("cholesky", -1.0), ("inverse", 0.0), ("solve", 0.0)])
def test_a_failed_factorization_is_nan_for_its_chain_alone(kind, bad):
    density = capture(factorized(kind), torch.tensor([1.0, 0.4, 0.2]), num_chains=3)
    u = torch.tensor([[0.5, 1.0, 2.0], [bad, 1.0, 2.0], [2.0, 1.0, 2.0]])
    state = density(u)
    good = torch.tensor([0, 2])
    assert density.mode == "graph"
    assert torch.isfinite(state.log_base).all()
    assert state.log_target.isnan().tolist() == [False, True, False]
    inverse = torch.tensor([[1.0, -0.3], [-0.3, 2.0]]) / 1.91
    truth = {
        "cholesky": lambda v: 0.5 * (1.91 * v[0] ** 2).log(),
        "inverse": lambda v: inverse.sum() / v[0],
        "solve": lambda v: (inverse @ v[1:]).sum() / v[0],
    }[kind]
    torch.testing.assert_close(state.log_target[good], torch.stack([truth(v) for v in u[good]]))
    expected = finite_differences(truth, u[good])
    torch.testing.assert_close(state.grad_target[good], expected, rtol=1e-6, atol=1e-6)


def test_an_example_that_fails_can_be_captured():
    density = capture(factorized("cholesky"), torch.tensor([-1.0, 0.4, 0.2]), num_chains=2)
    assert density.mode == "graph"
    value = density(torch.tensor([[2.0, 0.0, 0.0], [-2.0, 0.0, 0.0]])).log_target
    torch.testing.assert_close(value[0], 0.5 * torch.tensor(1.91 * 4).log())
    assert value[1].isnan()


def test_an_error_in_eager_mode_rejects_its_chain():
    def function(u):
        if float(u[0].detach()) > 1:
            raise ValueError("scale must be positive")
        chol = torch.linalg.cholesky(BASE_MATRIX * u[1])
        return standard(u), -u.square().sum() + chol.diagonal().log().sum()

    density = slow_capture(function, torch.full((2,), 0.5), "needs the value of a latent")
    state = density(torch.tensor([[0.5, 1.0], [2.0, 1.0], [0.5, -1.0]]))
    torch.testing.assert_close(state.log_target[0], -1.25 + 0.5 * torch.tensor(1.91).log())
    assert state.log_target.isnan().tolist() == [False, True, True]
    assert state.log_base.isnan().tolist() == [False, True, False]
    assert torch.equal(state.grad_target[1], torch.zeros(2))


# What cannot be recorded.


def branch(u):
    return standard(u), -u.square().sum() if u[0] > 0 else -3 * u.square().sum()


def number(u):
    return standard(u), -u.square().sum() if float(u[0].detach()) > 0 else -3 * u.square().sum()


def length_depends(u):
    return standard(u), -u[u > 0].square().sum()


@pytest.mark.parametrize(
    ("function", "truth", "match"),
    [
        (
            number,
            lambda u: (1 + 2 * (u[0] <= 0)) * -u.square().sum(),
            r"model: .*test_capture.py",
        ),
        (
            length_depends,
            lambda u: -u.relu().square().sum(),
            r"the shape of a result \(aten.index.Tensor\) needs",
        ),
    ],
)
def test_control_flow_on_latents_runs_eagerly_and_says_why(function, truth, match):
    density = slow_capture(function, torch.tensor([0.3, -0.4]), match)
    u = torch.tensor([[0.5, 1.0], [-0.5, 2.0], [0.1, -1.0], [-1.0, -1.0]])
    state = density(u)
    assert density.mode == "eager"
    torch.testing.assert_close(state.log_target, torch.stack([truth(v) for v in u]))
    expected = finite_differences(truth, u)
    torch.testing.assert_close(state.grad_target, expected, rtol=1e-6, atol=1e-6)
    density.check(u)
    with pytest.raises(ValueError, match="no graph of 4 chains"):
        density.graph_and_inputs(4)


def test_a_branch_on_a_latent_is_recorded_both_ways():
    density = capture(branch, torch.tensor([0.3, -0.4]), num_chains=4)
    u = torch.tensor([[0.5, 1.0], [-0.5, 2.0], [0.1, -1.0], [-1.0, -1.0]])
    state = density(u)
    assert density.mode == "graph"
    expected = (1.0 + 2.0 * (u[:, 0] <= 0)) * -u.square().sum(1)
    torch.testing.assert_close(state.log_target, expected)
    slope = (1.0 + 2.0 * (u[:, :1] <= 0)) * -2.0 * u
    torch.testing.assert_close(state.grad_target, slope)
    density.check(u)


def test_a_number_taken_from_a_latent_is_caught_at_capture():
    def function(u):
        return standard(u), -u.square().sum() * float(u.detach().numpy()[0])

    density = slow_capture(function, torch.tensor([0.3, -0.4]), r"\.numpy\(\) needs the value")
    u = torch.randn(K, 2)
    assert density.mode == "eager"
    torch.testing.assert_close(density(u).log_target, -u.square().sum(-1) * u[:, 0])


def test_check_finds_an_attribute_that_changed():
    class Model:
        power = 2.0

        def __call__(self, u):
            return standard(u), -u.abs().pow(self.power).sum()

    model = Model()
    density = capture(model, torch.ones(2), num_chains=K)
    density.check(torch.randn(3, 2))
    model.power = 2.1
    with pytest.raises(ValueError, match=r"values that left the graph: log_target is"):
        density.check(torch.randn(3, 2))


def test_check_finds_a_parameter_turned_into_a_number():
    scale = torch.tensor(2.0)
    density = capture(
        lambda u: (standard(u), -u.square().sum() * scale.item()), torch.ones(2), num_chains=K
    )
    density.check(torch.randn(9, 2))
    scale.fill_(2.5)
    with pytest.raises(ValueError, match=r"keep such values in tensors"):
        density.check(torch.randn(9, 2))
    with pytest.raises(ValueError, match=r"keep such values in tensors"):
        density.refresh()


def test_check_allows_rejections_and_rounding():
    def function(u):
        # The difference of two large numbers: float32 keeps about two digits of it.
        value = (u.sum() + 1e5) ** 2 - 1e10
        return standard(u), torch.where(u[0] > 0, value, -torch.inf)

    density = capture(function, torch.ones(2, dtype=torch.float32), num_chains=K)
    density.check(torch.tensor([[1.0, 0.5], [-1.0, 0.2]], dtype=torch.float32))


def test_operations_vmap_does_not_know_run_chain_by_chain(monkeypatch):
    def refuse(*args):
        raise RuntimeError("no batching rule")

    monkeypatch.setattr("pyro_anneal.graphs.captured_density.batch", refuse)
    density = slow_capture(schools(), torch.zeros(10), "no batching rule")
    u = torch.randn(K, 10)
    state = density(u)
    assert density.mode == "graph-loop"
    torch.testing.assert_close((state.log_target, state.grad_target), schools_truth(u))


def test_what_silu_fills_is_known_to_vmap():
    """Its derivative writes ones into an empty tensor, which vmap would do once per chain."""

    def function(u):
        return standard(u), standard(torch.nn.functional.silu(u).log_softmax(0))

    torch._C._functorch._set_vmap_fallback_enabled(False)
    try:
        density = capture(function, torch.zeros(3), num_chains=K, native=False)
        u = torch.randn(K, 3)
        state = density(u)
    finally:
        torch._C._functorch._set_vmap_fallback_enabled(True)
    assert density.mode == "graph"
    leaf = u.clone().requires_grad_()
    target = torch.stack([function(row)[1] for row in leaf])
    (grad,) = torch.autograd.grad(target.sum(), leaf)
    torch.testing.assert_close((state.log_target, state.grad_target), (target.detach(), grad))


# What is no density.


class Decoder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.layer = layer

    def forward(self, u):
        return self.layer(self.first(u.reshape(-1, 3))).reshape(u.shape)


def decoded(decoder):
    return lambda u: (standard(u), standard(decoder(u)))


def test_dropout_raises_and_names_its_module():
    decoder = Decoder(nn.Dropout(0.5))
    with pytest.raises(ValueError, match=r"in module Dropout \(Decoder\.layer\).*\.eval\(\)"):
        capture(decoded(decoder), torch.zeros(2, 3), num_chains=K)
    decoder.eval()
    assert capture(decoded(decoder), torch.zeros(2, 3), num_chains=K).mode == "graph"


def test_batch_norm_raises_names_its_buffer_and_restores_it():
    decoder = Decoder(nn.BatchNorm1d(3))
    before = {name: value.clone() for name, value in decoder.named_buffers()}
    message = r'buffer "running_mean" of module BatchNorm1d \(Decoder\.layer\).*\.eval\(\)'
    with pytest.raises(ValueError, match=message):
        capture(decoded(decoder), torch.randn(2, 3), num_chains=K)
    for name, value in decoder.named_buffers():
        assert torch.equal(value, before[name]), name
    decoder.eval()
    assert capture(decoded(decoder), torch.randn(2, 3), num_chains=K).mode == "graph"


def test_an_unconditioned_latent_raises_and_names_its_line():
    def function(u):
        noise = pyro.sample("forgotten", dist.Normal(0.0, 1.0))
        return standard(u), standard(u) + noise

    with pytest.raises(ValueError, match=r'random numbers .*pyro.sample\("forgotten"'):
        capture(function, torch.zeros(2), num_chains=K)


def test_a_private_generator_raises():
    generator = torch.Generator().manual_seed(0)

    def function(u):
        return standard(u), standard(u) + torch.randn((), generator=generator)

    with pytest.raises(ValueError, match="two different results at the same position"):
        capture(function, torch.zeros(2), num_chains=K)


def test_writing_into_data_raises():
    seen = torch.zeros(2)

    def function(u):
        seen.copy_(u.detach())
        return standard(u), standard(u)

    with pytest.raises(ValueError, match="did not create"):
        capture(function, torch.zeros(2), num_chains=K)


def test_capture_leaves_no_trace():
    vae, x = LinearVAE(), torch.randn(5, 3)

    def function(u):
        shift = pyro.param("shift", lambda: torch.randn(2))
        base, target = vae.log_densities(x)(u - shift)
        return base, target

    pyro.param("other", torch.ones(1))
    random_state = torch.get_rng_state()
    validation = torch.distributions.Distribution._validate_args
    capture(function, torch.zeros(5, 2), num_chains=K)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.distributions.Distribution._validate_args is validation
    assert list(pyro.get_param_store().keys()) == ["other"]
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert not nn.modules.module._global_forward_pre_hooks
    assert not nn.modules.module._global_forward_hooks


# Parameters and data are inputs.


def test_refresh_sees_an_optimizer_step():
    vae, x, u = LinearVAE(), torch.randn(5, 3), torch.randn(K, 5, 2)
    density = capture(vae.log_densities(x), torch.zeros(5, 2), num_chains=K)
    optimizer = torch.optim.SGD(vae.parameters(), lr=0.3)
    (-vae.log_densities(x)(u[0])[1].sum() - vae.log_densities(x)(u[0])[0].sum()).backward()
    before = tuple(density(u)[1:])
    optimizer.step()
    density.refresh()
    with torch.no_grad():
        truth = vae.truth(x, u)
    torch.testing.assert_close(tuple(density(u)[1:]), truth)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(before, truth, strict=True))


def test_what_does_not_depend_on_the_position_runs_once():
    vae, x = LinearVAE(), torch.randn(5, 3)
    covariance = torch.eye(2) + 0.1

    def function(u):
        base, target = vae.log_densities(x)(u)
        return base, target + dist.MultivariateNormal(torch.zeros(2), covariance).log_prob(u)

    density = capture(function, torch.zeros(5, 2), num_chains=K)
    graph, _ = density.graph_and_inputs(K)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert not any("cholesky_ex" in target for target in targets)
    assert sum("mm" in target for target in targets) == 2  # the decoder and its derivative


def test_rebind_swaps_data_and_leaves_the_original():
    vae, x, other = LinearVAE(), torch.randn(5, 3), torch.randn(5, 3)
    u = torch.randn(K, 5, 2)
    density = capture(vae.log_densities(x), torch.zeros(5, 2), num_chains=K)
    rebound = density.rebind({x: other}, vae.log_densities(other))
    torch.testing.assert_close(tuple(rebound(u)[1:]), vae.truth(other, u))
    torch.testing.assert_close(tuple(density(u)[1:]), vae.truth(x, u))
    rebound.check(u)
    assert (density.num_evaluations, rebound.num_evaluations) == (1, 1)
    shared = [d.graph_and_inputs(K)[0] for d in (density, rebound)]
    assert shared[0] is shared[1]


def test_rebind_to_a_function_on_other_data_fails_the_check():
    vae, x, other = LinearVAE(), torch.randn(5, 3), torch.randn(5, 3)
    density = capture(vae.log_densities(x), torch.zeros(5, 2), num_chains=K)
    with pytest.raises(ValueError, match="left the graph"):
        density.rebind({x: other}, vae.log_densities(x)).check(torch.randn(K, 5, 2))
    with pytest.raises(ValueError, match="without function"):
        density.rebind({x: other}).check(torch.randn(K, 5, 2))


def test_rebind_refuses_what_does_not_fit():
    vae, x = LinearVAE(), torch.randn(5, 3)
    density = capture(vae.log_densities(x), torch.zeros(5, 2), num_chains=K)
    with pytest.raises(ValueError, match=r"new tensor has shape .*4, 3.*expected .*5, 3"):
        density.rebind({x: x[:4]})
    with pytest.raises(ValueError, match="new tensor has dtype"):
        density.rebind({x: x.float()})
    with pytest.raises(ValueError, match="reads no tensor that is this one"):
        density.rebind({x.clone(): x})


def test_a_mask_of_another_length_needs_a_new_capture():
    density = capture(by_mask, torch.zeros(3), num_chains=K)
    swapped = density.rebind({MASK: torch.tensor([False, True, True])})
    u = torch.randn(K, 3)
    h_dot_u = u[:, 0] + u[:, 1] * u[:, 1] + u[:, 2] * u[:, 2]
    expected = -(u[:, 1:] ** 4).sum(-1) - h_dot_u - (u[:, 1] * u[:, 2]).sin()
    torch.testing.assert_close(swapped(u).log_target, expected)
    with pytest.raises(ValueError, match="capture the density anew"):
        density.rebind({MASK: torch.tensor([False, True, False])})


# Compilation.


@pytest.fixture
def without_native_code(monkeypatch):
    """Leaves graphs to inductor; the compiler is found there in another way."""
    monkeypatch.setattr("pyro_anneal.native.library.compiler_problem", lambda: "not here")
    monkeypatch.setattr(kept, "_GRAPHS", type(kept._GRAPHS)())


@needs_compiler
def test_compiled_equals_the_closed_form_in_float32():
    torch.set_default_dtype(torch.float32)
    y, sigma = SCHOOLS_Y.float(), SCHOOLS_SIGMA.float()
    density = capture(schools(y, sigma), torch.zeros(10), num_chains=K, compile=True)
    u = torch.randn(K, 10) + 1
    state = density(u)
    assert density.mode == "compiled"
    truth = tuple(part.float() for part in schools_truth(u.double()))
    actual = (state.log_target, state.grad_target)
    torch.testing.assert_close(actual, truth, rtol=1e-5, atol=1e-4)
    assert all(part.is_contiguous() for part in state)


@needs_compiler
def test_compiled_code_is_reused_for_other_data(monkeypatch, without_native_code):
    calls = []
    compile = compilation.compile_with_inductor
    monkeypatch.setattr(compilation, "_COMPILED", type(compilation._COMPILED)())
    monkeypatch.setattr(
        compilation, "compile_with_inductor", lambda *a, **k: calls.append(1) or compile(*a, **k)
    )
    u = torch.randn(K, 10)
    for shift in (0.0, 1.0):
        density = capture(schools(SCHOOLS_Y + shift), torch.zeros(10), num_chains=K, compile=True)
        expected = schools_truth(u)[1][:, 2:] + shift / SCHOOLS_SIGMA**2
        torch.testing.assert_close(density(u).grad_target[:, 2:], expected)
    assert density.mode == "compiled"
    assert len(calls) == 1


@needs_compiler
def test_compiled_code_sees_other_parameters():
    vae, x, other = LinearVAE(), torch.randn(5, 3), torch.randn(5, 3)
    u = torch.randn(K, 5, 2)
    density = capture(vae.log_densities(x), torch.zeros(5, 2), num_chains=K, compile=True)
    with torch.no_grad():
        vae.decoder.weight.mul_(1.5)
    rebound = density.rebind({x: other})
    assert rebound.mode == "compiled"
    with torch.no_grad():
        torch.testing.assert_close(tuple(rebound(u)[1:]), vae.truth(other, u))


def test_no_compiler_falls_back_to_the_graph(monkeypatch, without_native_code):
    def missing():
        raise PermissionError("[Errno 13] Permission denied: ''")

    names = ("get_cpp_compiler", "_get_cpp_compiler")  # since torch 2.5, and before
    monkeypatch.setattr(cpp_builder, next(n for n in names if hasattr(cpp_builder, n)), missing)
    density = capture(schools(), torch.zeros(10), num_chains=K, compile=True)
    assert density.mode == "graph"
    assert density.reason == "no C++ compiler (PermissionError: [Errno 13] Permission denied: '')"
    u = torch.randn(K, 10)
    torch.testing.assert_close(density(u).log_target, schools_truth(u)[0])


def test_a_failed_compilation_falls_back_to_the_graph(monkeypatch, without_native_code):
    def fail(*args):
        raise RuntimeError("inductor broke")

    monkeypatch.setattr(
        "pyro_anneal.graphs.captured_density.compiler_problem", lambda device: None
    )
    monkeypatch.setattr("pyro_anneal.graphs.captured_density.compile_graph", fail)
    density = capture(schools(), torch.zeros(10), num_chains=K, compile=True)
    assert density.mode == "graph"
    assert "inductor broke" in density.reason


def test_the_graph_runs_inside_a_larger_function():
    density = capture(schools(), torch.zeros(10), num_chains=K)
    graph, inputs = density.graph_and_inputs(K)
    u = torch.randn(K, 10)
    outputs = graph(u, *inputs)
    torch.testing.assert_close((outputs[1], outputs[3]), schools_truth(u))
    assert not any(
        isinstance(node.target, str) and node.op == "get_attr" for node in graph.graph.nodes
    )
