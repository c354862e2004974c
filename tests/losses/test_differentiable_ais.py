"""DifferentiableAIS: unbiased weights, the gradient of its own bound, a path that learns."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_objectives import assert_within
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.ops.special import safe_log
from pyro.optim import Adam

from pyro_anneal.losses import DifferentiableAIS, ReverseScore

DATA = torch.tensor([0.2, 1.9, -0.4], dtype=torch.float64)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.5, 1.0))
        pyro.sample("x", dist.Normal(z, 0.8), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.3 * x, 1.1))


def log_evidence(x):
    return dist.Normal(0.5, math.sqrt(1.64)).log_prob(x)


def test_weights_are_unbiased():
    """E[w] = p(x) at any step sizes, betas and damping: no Metropolis test, and none needed."""
    loss = DifferentiableAIS(num_steps=5, step_size=0.4, damping=0.6)
    with torch.no_grad():
        loss.logit_increments += torch.tensor([0.3, -0.5, 0.0, 1.0, 0.2, -0.4])
        loss.log_step_size += torch.tensor([0.1, 0.3, -0.4, 0.0, 0.2])
    count = 20_000
    x = torch.full((count,), 1.9)
    kept = []
    anneal = loss._anneal
    loss._anneal = lambda *args: (kept.append(anneal(*args)), kept[-1])[1]
    value = -loss.loss(model, guide, x) / count
    truth = log_evidence(x[:1]).item()
    assert_within((kept[0][0] - truth).exp(), 1.0)
    elbo = -Trace_ELBO().loss(model, guide, x) / count
    assert elbo + 0.05 < value < truth


def test_weights_are_unbiased_whatever_the_reverse_kernel_is():
    score = ReverseScore(1, hidden=[8])
    with torch.no_grad():
        for parameter in score.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    loss = DifferentiableAIS(num_steps=4, step_size=0.4, damping=0.6, reverse=score)
    kept = []
    anneal = loss._anneal
    loss._anneal = lambda *args: (kept.append(anneal(*args)), kept[-1])[1]
    x = torch.full((20_000,), 1.9)
    loss.loss(model, guide, x)
    truth = log_evidence(x[:1]).item()
    assert (kept[0][0] - truth).std() > 0.05  # the network does something
    assert_within((kept[0][0] - truth).exp(), 1.0)


def test_scales_by_coordinate_keep_weights_unbiased():
    """A mass matrix of a correlated pair: E[w] = p(x), by the Gaussian evidence."""
    x = torch.tensor([1.9, -3.0])
    spread = torch.tensor([0.3, 4.0])

    def pair(data):
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), spread).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 0.8), obs=data)

    def base(data):
        with pyro.plate("data", len(data)):
            pyro.sample("z", dist.Normal(torch.tensor([0.1, -0.5]), spread).to_event(1))

    loss = DifferentiableAIS(1, 4, step_size=0.3, damping=0.6, dim=2)
    with torch.no_grad():
        loss.log_scale += spread.log()
    kept = []
    anneal = loss._anneal
    loss._anneal = lambda *args: (kept.append(anneal(*args)), kept[-1])[1]
    data = x.repeat(3_000)
    loss.loss(pair, base, data)
    truth = dist.Normal(0.0, (spread.square().sum() + 0.64).sqrt()).log_prob(x)
    logs = kept[0][0].reshape(-1, 2) - truth
    for column in (0, 1):
        assert_within(logs[:, column].exp(), 1.0)
    with torch.no_grad():  # one step size for both is no good
        loss.log_scale -= spread.log()
    loss.loss(pair, base, data)
    assert (kept[1][0].reshape(-1, 2) - truth).mean() < logs.mean() - 0.02
    with pytest.raises(ValueError, match=r"dim=3 scales .* have size 2 .* use dim=2"):
        DifferentiableAIS(1, 2, dim=3).loss(pair, base, data[:4])


def test_the_first_step_size_fits_the_narrower_end():
    """A prior of sd 1 and a likelihood of .01: leapfrogs are stable below twice the smaller."""

    def narrow(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.01), obs=x)

    def wide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.02))

    x = torch.linspace(-1.0, 1.0, 50)
    loss = DifferentiableAIS(2, 6)
    elbo = -Trace_ELBO(num_particles=50).loss(narrow, wide, x)
    values = [-loss.loss(narrow, wide, x) for _ in range(10)]
    assert not loss.log_step_size.isnan().any()
    steps = loss.log_step_size.exp()
    assert ((steps > 0.0005) & (steps < 0.005)).all()  # a quarter of it
    truth = dist.Normal(0.0, (1 + 1e-4) ** 0.5).log_prob(x).sum().item()
    assert elbo + 1.0 < sum(values) / 10 < truth
    assert torch.equal(loss.log_step_size.exp(), steps)  # found once
    other = DifferentiableAIS(2, 6)
    other.load_state_dict(loss.state_dict())
    other.loss(narrow, wide, x)
    assert torch.equal(other.log_step_size.exp(), steps)


@pytest.mark.slow
def test_a_learned_reverse_kernel_tightens_the_bound():
    """Few strongly damped steps: the momenta that positions reached are worth knowing."""
    torch.manual_seed(0)
    x = DATA.repeat(40)
    values = {}
    for name, score in (("kernel's own", None), ("learned", ReverseScore(1, hidden=[32]))):
        pyro.clear_param_store()
        loss = DifferentiableAIS(1, 3, step_size=0.5, damping=0.3, reverse=score)
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.02)
        for _ in range(150):
            optimizer.zero_grad()
            loss.differentiable_loss(model, guide, x).backward()
            optimizer.step()
        with torch.no_grad():
            estimates = torch.tensor([-loss.loss(model, guide, x) for _ in range(150)]) / len(x)
        values[name] = estimates
    difference = values["learned"].mean() - values["kernel's own"].mean()
    error = sum(v.var() / len(v) for v in values.values()).sqrt()
    assert difference > 3.0 * error
    assert values["learned"].mean() < log_evidence(DATA).mean() + 5.0 * error


@pytest.mark.parametrize("copies", [False, True], ids=["plain", "written into a buffer"])
def test_chains_at_once_are_chains_one_by_one(copies):
    """The recorded graph gives the numbers and the gradients of the model itself."""
    x = DATA
    loss = DifferentiableAIS(3, 4, step_size=0.3)
    leaf = torch.nn.Parameter(torch.tensor(0.3))

    def learned_guide(x):
        slope = torch.tanh(leaf)
        if copies:  # as triangular matrices and recurrent networks do
            buffer = torch.zeros(len(x))
            buffer[:] = slope
            slope = buffer
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, 1.1))

    def run():
        pyro.set_rng_seed(3)
        leaf.grad = None
        value = loss.differentiable_loss(model, learned_guide, x)
        value.backward()
        return value.item(), leaf.grad.item()

    run()  # prepares, which draws
    at_once = run()
    (entry,) = [kept for entries in loss._cache._kept._entries.values() for kept in entries]
    assert entry.differentiable[3] is not None
    entry.differentiable[3] = None
    assert run() == pytest.approx(at_once, rel=1e-9)


def test_gradient_is_the_derivative_of_its_estimate():
    """At one seed the bound is a smooth function of every parameter: finite differences."""
    names = ["loc", "scale", "theta"]
    values = {"loc": torch.tensor(0.3), "scale": torch.tensor(0.1), "theta": torch.tensor(-0.2)}
    leaves = {n: torch.nn.Parameter(v) for n, v in values.items()}

    def learned(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.LogNormal(leaves["theta"], 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z - leaves["theta"]), obs=x)

    def learned_guide(x):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.LogNormal(leaves["loc"] * x, leaves["scale"].exp()))

    x = torch.tensor([1.0, 0.0, 1.0])
    loss = DifferentiableAIS(2, 3, step_size=0.3)
    parameters = [leaves[n] for n in names] + list(loss.parameters())

    def value():
        pyro.set_rng_seed(4)
        return loss.loss(learned, learned_guide, x)

    value()  # prepares the problem, which draws
    pyro.set_rng_seed(4)
    loss.differentiable_loss(learned, learned_guide, x).backward()
    for parameter in parameters:
        flat = parameter.data.view(-1)
        for i in range(flat.numel()):
            flat[i] += 1e-5
            up = value()
            flat[i] -= 2e-5
            down = value()
            flat[i] += 1e-5
            expected = (up - down) / 2e-5
            assert parameter.grad.view(-1)[i].item() == pytest.approx(expected, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("vectorize", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_path_learns_under_svi(vectorize):
    loss = DifferentiableAIS(2, 4, step_size=0.05, vectorize_particles=vectorize)
    autoguide = AutoNormal(model)
    svi = SVI(model, autoguide, Adam({"lr": 0.05}), loss)
    first = loss.log_step_size.detach().clone()
    values = [svi.step(DATA) for _ in range(60)]
    truth = -log_evidence(DATA).sum().item()
    assert sum(values[-10:]) / 10 < sum(values[:10]) / 10
    assert sum(values[-10:]) / 10 == pytest.approx(truth, abs=0.3)
    assert not torch.allclose(loss.log_step_size, first, atol=0.05)
    assert any(name.startswith("differentiable_ais") for name in pyro.get_param_store())


def test_as_a_module_it_brings_its_parameters():
    net = torch.nn.Linear(1, 1)

    def forward(x):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(net(x[:, None])[:, 0], 1.0))

    class Guide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            forward(x)

    class Model(torch.nn.Module):
        def forward(self, x):
            model(x)

    elbo = DifferentiableAIS(num_steps=3)(Model(), Guide())
    names = {name for name, _ in elbo.named_parameters()}
    assert {"elbo.log_step_size", "elbo.logit_damping", "guide.net.weight"} <= names
    elbo(DATA).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in elbo.parameters())


def test_gradients_that_a_model_makes_itself_are_kept():
    # As in hidden Markov models of Pyro: log of a sum over states, one of probability zero.
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        terms = safe_log(torch.stack([z.exp(), torch.zeros_like(z)]))
        pyro.factor("states", terms.logsumexp(0))

    def guide():
        loc = pyro.param("loc", torch.tensor(0.8))
        pyro.sample("z", dist.Normal(loc, 1.2))

    loss = DifferentiableAIS(100, num_steps=2, step_size=0.3, vectorize_particles=False)
    with pyro.get_param_store().scope():
        pyro.set_rng_seed(0)
        values = torch.tensor([-loss.loss_and_grads(model, guide) for _ in range(4)]).double()
        assert pyro.param("loc").unconstrained().grad.isfinite()
    ratios = (values - 0.5).exp()  # E[exp(z)] = exp(1/2)
    assert_within(ratios, 1.0)


def test_subsampled_plates_scale_the_bound():
    """Guide = exact posterior and tiny steps: nearly N/B times the minibatch's evidence."""
    precision = 1.0 + 1.0 / 0.64

    def subsampled(x):
        with pyro.plate("data", 3, subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.5, 1.0))
            pyro.sample("x", dist.Normal(z, 0.8), obs=x[index])

    def exact(x):
        with pyro.plate("data", 3, subsample_size=2) as index:
            pyro.sample("z", dist.Normal((0.5 + x[index] / 0.64) / precision, precision**-0.5))

    loss = DifferentiableAIS(num_steps=2, step_size=1e-4)
    evidence = log_evidence(DATA)
    possible = [1.5 * (evidence[i] + evidence[j]).item() for i in range(3) for j in range(i)]
    for _ in range(3):
        value = -loss.loss(subsampled, exact, DATA)
        assert min(abs(value - p) for p in possible) < 1e-5


def test_arguments_and_sites_are_checked():
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        DifferentiableAIS(num_steps=0)
    with pytest.raises(ValueError, match="damping must lie strictly between 0 and 1"):
        DifferentiableAIS(damping=1.0)
    with pytest.raises(ValueError, match="step_size must be positive"):
        DifferentiableAIS(step_size=-1.0)

    def discrete(x):
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.1))))

    with pytest.raises(NotImplementedError, match='guide site "z" is a Bernoulli'):
        DifferentiableAIS().loss_and_grads(discrete, discrete, DATA)
