"""AIWAE: unbiased weights, exact gradients, adaptation between minibatches, one capture."""

import math
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_objectives import assert_within
from pyro.infer import SVI, Trace_ELBO, config_enumerate
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.optim import Adam

from pyro_anneal.losses import AIWAE, DifferentiableAIS, problem_cache
from pyro_anneal.schedules import Sigmoid

DATA = torch.tensor([0.2, 1.9, -0.4, 3.0, 0.7], dtype=torch.float64)
ALL = {"vectorize_particles": True}
VECTORIZE = pytest.mark.parametrize("vectorize", [True, False])


def model(x, theta=0.5):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, 0.8), obs=x)


def wide_guide(x, theta=0.5):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.3 * x, 1.1))


def exact_guide(x):
    precision = 1.0 + 1.0 / 0.64
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((0.5 + x / 0.64) / precision, precision**-0.5))


def log_evidence(x, theta=0.5):
    return dist.Normal(theta, math.sqrt(1.64)).log_prob(x)


@VECTORIZE
def test_exact_guide_gives_the_evidence(vectorize):
    loss = AIWAE(4, 3, vectorize_particles=vectorize)
    assert loss.loss(model, exact_guide, DATA) == pytest.approx(-log_evidence(DATA).sum().item())


def log_weights_of(loss, x):
    """Runs the loss's own chains and returns their log-weights ``[K, *batch]``."""
    kept = []
    anneal = loss._anneal

    def keep(*args):
        state, log_weights = anneal(*args)
        kept.append(log_weights)
        return state, log_weights

    loss._anneal = keep
    loss.loss(model, wide_guide, x)
    return kept[0]


def test_weights_are_unbiased_and_annealing_tightens():
    x = torch.full((500,), 1.9)
    truth = log_evidence(x[:1]).item()
    stds = []
    for num_steps in (1, 4, 16):
        loss = AIWAE(20, num_steps, step_size=0.5, vectorize_particles=True)
        log_w = log_weights_of(loss, x)
        assert_within((log_w - truth).exp().mean(0), 1.0)
        stds.append(log_w.std().item())
    assert stds[0] > 1.5 * stds[1] > 2.0 * stds[2]


def test_model_gradient_is_that_of_the_evidence():
    count = 300
    x = torch.full((count,), 1.9)
    theta = torch.full((count,), 0.5, requires_grad=True)
    loss = AIWAE(100, 8, step_size=0.5, vectorize_particles=True)
    loss.differentiable_loss(model, wide_guide, x, theta).backward()
    assert_within(-theta.grad, (1.9 - 0.5) / 1.64)


def test_guide_gradient_is_that_of_the_elbo():
    count = 4000
    leaves = [torch.full((count,), v, requires_grad=True) for v in (0.3, -0.1)]
    theta = torch.full((count,), 0.5, requires_grad=True)
    x = torch.full((count,), 1.9)

    def guide(x):
        with pyro.plate("data", count):
            pyro.sample("z", dist.Normal(leaves[0] * x, leaves[1].exp()))

    def theta_model(x):
        model(x, theta)

    AIWAE(2, 2, vectorize_particles=True).differentiable_loss(theta_model, guide, x).backward()
    a, s = (torch.tensor(v, requires_grad=True) for v in (0.3, -0.1))
    loc, variance = a * 1.9, (2 * s).exp()
    elbo = -0.5 * ((loc - 0.5) ** 2 + variance) - 0.5 * ((1.9 - loc) ** 2 + variance) / 0.64 + s
    elbo.backward()
    assert_within(-leaves[0].grad, a.grad)
    assert_within(-leaves[1].grad, s.grad)


def test_step_sizes_move_between_minibatches_toward_the_target():
    loss = AIWAE(8, 3, 5, 0.6, step_size=0.05, vectorize_particles=True)
    first = loss.step_size.clone()
    loss.loss(model, wide_guide, DATA)
    assert torch.equal(loss.step_size, first)  # evaluation does not adapt
    assert loss.accept_prob.min() > 0.98
    theta = torch.tensor(0.5, requires_grad=True)
    accepts = []
    for _ in range(60):
        loss.differentiable_loss(model, wide_guide, DATA, theta)
        accepts.append(loss.accept_prob)
    assert (torch.stack(accepts[-30:]).mean(0) - 0.6).abs().max() < 0.08
    assert (loss.step_size > 4 * first).all()
    assert loss.step_size.shape == (3,)


@VECTORIZE
def test_new_data_and_parameters_need_no_new_capture(vectorize, monkeypatch):
    captures = []
    prepare = problem_cache.prepare
    monkeypatch.setattr(
        problem_cache, "prepare", lambda *a, **k: (captures.append(1), prepare(*a, **k))[1]
    )
    loc = torch.nn.Parameter(torch.tensor(0.5))

    def learned(batch):
        model(batch["x"], loc)

    def guide(batch):
        wide_guide(batch["x"])

    def seeded(loss, batch):
        pyro.set_rng_seed(1)
        return loss.loss(learned, guide, batch)

    loss = AIWAE(4, 3, vectorize_particles=vectorize)
    before = seeded(loss, {"x": DATA})
    loc.data += 1.0
    value = seeded(loss, {"x": DATA + 1})
    assert len(captures) == 1
    fresh = AIWAE(4, 3, vectorize_particles=vectorize)
    seeded(fresh, {"x": DATA + 1})
    assert len(captures) == 2
    assert value == pytest.approx(seeded(fresh, {"x": DATA + 1}), rel=1e-12)
    assert abs(value - before) > 0.01
    loss.loss(learned, guide, {"x": DATA[:3]})
    assert len(captures) == 3  # a new shape


def test_data_that_leave_the_graph_are_recorded_anew():
    def hidden(x):
        model(torch.tensor(x.tolist()))

    loss = AIWAE(2, 2)
    for x in (DATA, DATA + 1, DATA):
        # The guide is exact, so every weight is the evidence.
        assert loss.loss(hidden, exact_guide, x) == pytest.approx(
            AIWAE(2, 2).loss(model, exact_guide, x), rel=1e-9
        )


def evidence_of_rows(x, scale):
    """Minus the log evidence of z ~ N(0, 1), x ~ N(z, scale), row by row."""
    return -float(torch.distributions.Normal(0.0, (1 + scale**2) ** 0.5).log_prob(x).sum())


def test_a_branch_on_the_minibatch_is_followed_at_every_call():
    def branching(x):
        scale = 1.0 if x.mean() > 0 else 3.0
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    def near(x):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.3 * x, 0.8))

    loss, a = AIWAE(200, num_steps=4, compile=False), torch.tensor([0.5, 1.0, 2.0])
    assert evidence_of_rows(a, 1.0) == pytest.approx(5.109, abs=1e-3)
    assert evidence_of_rows(a, 3.0) == pytest.approx(6.473, abs=1e-3)
    pyro.set_rng_seed(0)
    for sign in (1, 1, -1, 1, -1, -1, -1):
        value = loss.loss(branching, near, sign * a)
        assert value == pytest.approx(evidence_of_rows(a, 1.0 if sign > 0 else 3.0), abs=0.2)
    assert [len(kept) for kept in loss._cache._kept._entries.values()] == [2]


@pytest.mark.parametrize("kind", ["number", "tensor"])
@pytest.mark.parametrize(
    "make", [lambda: AIWAE(300, 4, **ALL), lambda: DifferentiableAIS(300, 4, **ALL)]
)
def test_a_common_scale_that_changes_multiplies_the_bound(make, kind):
    state = {"s": 1.0}

    def scaled(fn):
        def run(x):
            s = torch.tensor(state["s"]) if kind == "tensor" else state["s"]
            with pyro.poutine.scale(scale=s), pyro.plate("data", 3):
                fn(x)

        return run

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(0.3 * x, 0.8))

    loss, x = make(), torch.tensor([0.5, 1.0, 2.0])
    scaled_model, scaled_guide = scaled(model), scaled(guide)
    pyro.set_rng_seed(0)
    for s in (1.0, 1.0, 0.5, 0.5, 2.0):
        state["s"] = s
        value = loss.loss(scaled_model, scaled_guide, x)
        assert value == pytest.approx(s * evidence_of_rows(x, 1.0), abs=0.15 * s)
    assert len(loss._cache._kept._entries) == 1


def test_a_scale_of_one_site_that_changes_is_followed():
    state = {"s": 1.0}

    def tempered(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.poutine.scale(scale=state["s"]):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.3 * x, 0.8))

    def truth(x, s):  # of the likelihood to the power s, by its Gaussian normalizer
        wide = torch.distributions.Normal(0.0, (1 + 1 / s) ** 0.5).log_prob(x)
        constant = 0.5 * math.log(2 * math.pi) * (1 - s) - 0.5 * math.log(s)
        return -float((wide + constant).sum())

    loss, x = AIWAE(500, 4, compile=False), torch.tensor([0.5, 1.0, 2.0])
    pyro.set_rng_seed(0)
    for s in (1.0, 0.5, 0.5, 2.0, 1.0):
        state["s"] = s
        assert loss.loss(tempered, guide, x) == pytest.approx(truth(x, s), abs=0.2)


@VECTORIZE
def test_subsampled_plates_give_minibatch_bounds(vectorize):
    def pair(x):
        def run(fn):
            with pyro.plate("data", 5, subsample_size=2) as index:
                batch = x[index]
                if fn == "guide":
                    loc = (0.5 + batch / 0.64) / (1 + 1 / 0.64)
                    pyro.sample("z", dist.Normal(loc, (1 + 1 / 0.64) ** -0.5))
                    return
                z = pyro.sample("z", dist.Normal(0.5, 1.0))
                pyro.sample("x", dist.Normal(z, 0.8), obs=batch)

        return run

    loss = AIWAE(3, 2, vectorize_particles=vectorize)
    evidence = log_evidence(DATA)
    possible = {
        round(2.5 * (evidence[i] + evidence[j]).item(), 8) for i in range(5) for j in range(i)
    }
    seen = set()
    subsampled_model, subsampled_guide = (
        lambda x: pair(x)("model"),
        lambda x: pair(x)("guide"),
    )
    for _ in range(12):
        seen.add(round(-loss.loss(subsampled_model, subsampled_guide, DATA), 8))
    assert seen <= possible
    assert len(seen) > 3


@VECTORIZE
def test_enumerated_sites_are_summed_out(vectorize):
    @config_enumerate
    def mixture(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, pyro.param("scale", torch.tensor(1.0))))
            k = pyro.sample("k", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(z + 2 * k, 0.7), obs=x)

    def guide(x):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.4)) * x, 1.0))

    x = torch.tensor([0.1, 2.0, -1.0])
    loss = AIWAE(400 if vectorize else 30, 6, step_size=0.4, vectorize_particles=vectorize)
    parts = [
        math.log(p) + dist.Normal(2.0 * k, math.sqrt(1.49)).log_prob(x)
        for k, p in ((0, 0.7), (1, 0.3))
    ]
    truth = torch.logaddexp(*parts).sum().item()
    value = loss.loss_and_grads(mixture, guide, x)
    assert -value == pytest.approx(truth, abs=0.05 if vectorize else 0.3)
    assert pyro.get_param_store()["scale"].unconstrained().grad.abs() > 0
    assert pyro.get_param_store()["a"].unconstrained().grad.abs() > 0


@pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal])
def test_svi_trains_with_autoguides(make):
    def positive(x):
        scale = pyro.sample("scale", dist.LogNormal(pyro.param("m", torch.tensor(0.0)), 0.5))
        with pyro.plate("data", 5):
            pyro.sample("x", dist.Normal(3.0, scale), obs=x)

    guide = make(positive)
    loss = AIWAE(6, 3, vectorize_particles=True)
    svi = SVI(positive, guide, Adam({"lr": 0.05}), loss)
    values = [svi.step(DATA) for _ in range(30)]
    assert sum(values[-5:]) < sum(values[:5]) - 2.5
    assert pyro.param("m").item() > 0.1


def test_more_precise_than_the_elbo_on_the_same_guide():
    elbo = Trace_ELBO(200, vectorize_particles=True).loss(model, wide_guide, DATA)
    annealed = AIWAE(10, 10, step_size=0.5, vectorize_particles=True).loss(model, wide_guide, DATA)
    truth = -log_evidence(DATA).sum().item()
    assert abs(annealed - truth) < 0.2 * (elbo - truth)


def test_errors_name_the_site():
    def discrete(x):
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(z, 0.8), obs=x)

    def discrete_guide(x):
        with pyro.plate("data", 5):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.1))))

    with pytest.raises(NotImplementedError, match=r'AIWAE needs .* site "z" is a Bernoulli'):
        AIWAE(2).loss_and_grads(discrete, discrete_guide, DATA)
    with pytest.raises(ValueError, match='"z" is discrete'):
        AIWAE(2).loss(discrete, discrete_guide, DATA)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        AIWAE(2, 0)
    with pytest.raises(ValueError, match="step_size must be positive"):
        AIWAE(2, 3, step_size=0.0)
    with pytest.raises(ValueError, match="expected 4 betas for num_steps=3, got 3"):
        AIWAE(2, 3, schedule=torch.tensor([0.0, 0.5, 1.0]))
    assert AIWAE(2, 3, schedule=Sigmoid()).num_steps == 3


MEMORY = """
import resource, sys, torch, pyro, pyro.distributions as dist
from pyro_anneal.losses import AIWAE
torch.set_num_threads(1)
net = torch.nn.Sequential(torch.nn.Linear(10, 400), torch.nn.Tanh(), torch.nn.Linear(400, 784))
x = torch.bernoulli(torch.full((50, 784), 0.4))
def model(x):
    with pyro.plate("data", 50):
        z = pyro.sample("z", dist.Normal(torch.zeros(10), 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=net(z)).to_event(1), obs=x)
def guide(x):
    with pyro.plate("data", 50):
        pyro.sample("z", dist.Normal(torch.zeros(10), 0.5 * torch.ones(10)).to_event(1))
loss = AIWAE(20, int(sys.argv[1]), vectorize_particles=True)
for _ in range(2):
    loss.differentiable_loss(model, guide, x).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_steps():
    """Peak resident memory; the activations of one evaluation are about 5 MB, kept by none."""

    def peak(num_steps):
        command = [sys.executable, "-c", MEMORY, str(num_steps)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    few, many = peak(2), peak(40)
    assert many < 1.05 * few


@pytest.mark.parametrize("kind", [AIWAE, pytest.param(DifferentiableAIS, marks=pytest.mark.slow)])
def test_what_is_prepared_already_moves_no_random_number(kind):
    """A training that goes on in a new process, which prepares anew, gives the same numbers."""
    shift = torch.nn.Parameter(torch.tensor(0.3))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(shift, 1.0))
            pyro.sample("x", dist.StudentT(4.0, z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.9))

    x = torch.tensor([0.4, -1.2])
    kept = kind(2, num_steps=2, step_size=0.2)
    kept.loss(model, guide, x)
    with torch.no_grad():
        shift += 0.5
    numbers = []
    for loss in (kept, kind(2, num_steps=2, step_size=0.2)):  # the kept one is checked now
        pyro.set_rng_seed(1)
        numbers.append([loss.loss(model, guide, x), torch.rand(()).item()])
    assert numbers[0] == numbers[1]
