"""The one-liners of docs/losses.md: each has the gradient of the objective it names.

A belief net of 3 bits over 4, so that every objective is a finite sum: over 8 states, and over
16 data for those that simulate.
"""

import itertools
import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_objectives import assert_within
from pyro.infer import SVI
from pyro.optim import SGD

from pyro_anneal.losses import EUBO, IWAE, TVO

COUNT = 20_000
X = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
WEIGHTS = torch.tensor([[0.9, -0.4, 1.3, 0.2], [-0.7, 0.8, 0.1, -1.1], [0.3, 0.5, -0.6, 1.7]],
                       dtype=torch.float64)  # fmt: skip
STATES = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)), dtype=torch.float64)
DATA = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)), dtype=torch.float64)


def bernoulli(value, logits):
    return dist.Bernoulli(logits=logits).log_prob(value).sum(-1)


def densities(theta, phi, x):
    """log p(x, z) and log q(z | x) of all states, for data ``[..., 4]``: ``[..., 8]``."""
    log_p = bernoulli(STATES, torch.zeros(3)) + bernoulli(
        x[..., None, :], STATES @ WEIGHTS + theta
    )
    log_q = bernoulli(STATES, x[..., None, :] @ WEIGHTS.T * phi)
    return log_p, log_q


class Net(torch.nn.Module):
    """Model and guide with a scalar parameter per replicate."""

    def __init__(self, value, count=COUNT):
        super().__init__()
        self.value = torch.nn.Parameter(torch.full((count, 1), value, dtype=torch.float64))


class Model(Net):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(3)).to_event(1))
            logits = z @ WEIGHTS + self.value
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


class Guide(Net):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=x @ WEIGHTS.T * self.value).to_event(1))


def exact(objective):
    theta = torch.tensor(0.3, requires_grad=True)
    phi = torch.tensor(0.4, requires_grad=True)
    value = objective(theta, phi)
    grads = torch.autograd.grad(value, (theta, phi), allow_unused=True)
    return [0.0 if g is None else g.item() for g in grads]


def elbo(theta, phi):
    log_p, log_q = densities(theta, phi, X)
    return (log_q.exp() * (log_p - log_q)).sum()


def iwae(theta, phi):
    log_p, log_q = densities(theta, phi, X)
    f = log_p - log_q
    mass = log_q.exp()[:, None] * log_q.exp()
    return (mass * (torch.logaddexp(f[:, None], f) - math.log(2))).sum()


def eubo(theta, phi):
    log_p, log_q = densities(theta, phi, X)
    return (torch.softmax(log_p, 0).detach() * (log_p.detach() - log_q)).sum()


def sleep(theta, phi):
    log_p, log_q = densities(theta, phi, DATA)
    return (log_p.exp().detach() * (log_p.detach() - log_q)).sum()


model, guide = Model(0.3), Guide(0.4)
x = X.expand(COUNT, 4).contiguous()
ONE_LINERS = {
    "VI, VAE": (lambda: IWAE(1)(model, guide)(x), lambda t, p: -elbo(t, p), "both"),
    "VAE by TVO": (
        lambda: TVO(2, torch.tensor([0.0, 1.0]))(model, guide)(x),
        lambda t, p: -elbo(t, p),
        "both",
    ),
    "IWAE": (lambda: IWAE(2)(model, guide)(x), lambda t, p: -iwae(t, p), "both"),
    "wake-theta": (
        lambda: IWAE(2).differentiable_loss(model, torch.no_grad()(guide), x),
        lambda t, p: -iwae(t, p),
        "model",
    ),
    "sleep-phi, inference compilation": (
        lambda: EUBO(1, "simulated")(model, guide)(x),
        sleep,
        "guide",
    ),
}


@pytest.mark.parametrize("name", list(ONE_LINERS))
def test_one_liner_has_the_gradient_of_its_objective(name):
    run, objective, learns = ONE_LINERS[name]
    model.zero_grad()
    guide.zero_grad()
    run().backward()
    theta, phi = exact(objective)
    for net, truth, who in ((model, theta, "model"), (guide, phi, "guide")):
        if learns in ("both", who):
            assert abs(truth) > 0.01
            assert_within(net.value.grad[:, 0], truth)
        else:
            assert net.value.grad is None or not net.value.grad.any()


def test_wake_phi_has_the_gradient_of_the_eubo():
    """Self-normalized, hence many particles and few replicates."""
    few = Model(0.3, 50), Guide(0.4, 50)
    EUBO(4000, vectorize_particles=True)(*few)(x[:50]).backward()
    assert few[0].value.grad is None
    assert_within(few[1].value.grad[:, 0], exact(eubo)[1])


def test_reweighted_wake_sleep_is_a_sum():
    """Model by wake-theta, guide by wake-phi and sleep-phi, in one backward pass."""

    def wake_theta():
        pyro.set_rng_seed(0)
        return IWAE(2).differentiable_loss(model, torch.no_grad()(guide), x)

    def wake_phi():
        pyro.set_rng_seed(1)
        return EUBO(5).differentiable_loss(model, guide, x)

    def sleep_phi():
        pyro.set_rng_seed(2)
        return EUBO(1, "simulated").differentiable_loss(model, guide, x)

    parameters = [model.value, guide.value]
    parts = [
        torch.autograd.grad(run(), parameters, allow_unused=True)
        for run in (wake_theta, wake_phi, sleep_phi)
    ]
    total = torch.autograd.grad(wake_theta() + 0.5 * wake_phi() + 0.5 * sleep_phi(), parameters)
    assert torch.equal(total[0], parts[0][0])
    assert torch.allclose(total[1], 0.5 * (parts[1][1] + parts[2][1]), rtol=1e-12)
    assert parts[0][1] is None
    assert parts[1][0] is None
    assert parts[2][0] is None


def test_wake_theta_in_svi_leaves_the_guide_alone():
    def model(x):
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(pyro.param("theta", torch.tensor(0.1)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(pyro.param("phi", torch.tensor(0.2)) * x, 1.0))

    wake_theta = SVI(model, torch.no_grad()(guide), SGD({"lr": 0.1}), IWAE(5))
    wake_phi = SVI(model, guide, SGD({"lr": 0.1}), EUBO(5))
    data = torch.tensor([1.0, 2.0, 3.0, -1.0])
    wake_theta.step(data)
    assert pyro.param("phi").item() == 0.2
    theta = pyro.param("theta").item()
    assert theta != 0.1
    wake_phi.step(data)
    assert pyro.param("phi").item() != 0.2
    assert pyro.param("theta").item() == theta


def test_the_page_shows_these_lines():
    page = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
    for line in (
        "IWAE(1)",
        "TVO(num_particles=S, schedule=[0.0, 1.0])",
        "TVO(S, schedule=LogUniform(beta_1, partitions=K))",
        'TVO(S, schedule=LogUniform(beta_1, partitions=K), bound="upper")',
        "IWAE(K).differentiable_loss(model, torch.no_grad()(guide), x)",
        "EUBO(K)",
        'EUBO(1, posterior="simulated")',
    ):
        assert line in page, line
