"""What Pyro users rely on: plates, scales, masks, subsampling, enumeration, AutoGuides, errors."""

import itertools
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule
from pyro.optim import Adam

from pyro_anneal.losses import AIWAE, EUBO, IWAE, TVO, DifferentiableAIS
from pyro_anneal.schedules import Linear

DATA = torch.tensor([0.2, 1.9, -0.4, 3.0, 0.7], dtype=torch.float64)
VECTORIZE = pytest.mark.parametrize("vectorize", [True, False])


def losses(**options):
    return {
        "IWAE": IWAE(4, **options),
        "IWAE, one particle": IWAE(1, **options),
        "IWAE dreg": IWAE(4, "dreg", **options),
        "IWAE vimco": IWAE(4, "vimco", **options),
        "TVO left": TVO(4, **options),
        "TVO upper": TVO(4, bound="upper", **options),
        "TVO, five betas": TVO(4, Linear(5), **options),
        "TVO auto": TVO(4, gradient="auto", **options),
        "TVO reparam": TVO(4, gradient="reparam", **options),
        "TVO dreg": TVO(4, gradient="dreg", **options),
        "EUBO importance": EUBO(4, **options),
        "EUBO simulated": EUBO(4, "simulated", **options),
        "EUBO simulated, one particle": EUBO(1, "simulated", **options),
    }


ALL = pytest.mark.parametrize("name", list(losses()))
# One loss for each way of treating draws, and of combining weights.
ON_DATA = pytest.mark.parametrize(
    "name", ["IWAE", "IWAE vimco", "TVO upper", "TVO dreg", "EUBO importance"]
)


def sign(name):
    return 1.0 if name.startswith("EUBO") or "upper" in name else -1.0


def local_model(x, size=None, subsample=None):
    size = len(x) if size is None else size
    with pyro.plate("data", size, subsample=subsample) as index:
        batch = x if subsample is None else x[index]
        z = pyro.sample("z", dist.Normal(0.5, 1.0))
        pyro.sample("x", dist.Normal(z, 0.8), obs=batch)


def exact_guide(x, size=None, subsample=None):
    size = len(x) if size is None else size
    precision = 1.0 + 1.0 / 0.64
    with pyro.plate("data", size, subsample=subsample) as index:
        batch = x if subsample is None else x[index]
        loc = (0.5 + batch / 0.64) / precision
        pyro.sample("z", dist.Normal(loc, precision**-0.5))


def log_evidence(x):
    return dist.Normal(0.5, math.sqrt(1.64)).log_prob(x)


@VECTORIZE
@ON_DATA
def test_exact_guide_gives_the_evidence(name, vectorize):
    loss = losses(vectorize_particles=vectorize)[name]
    expected = sign(name) * log_evidence(DATA).sum().item()
    assert loss.loss(local_model, exact_guide, DATA) == pytest.approx(expected, rel=1e-12)


@VECTORIZE
@ON_DATA
def test_particles_share_a_minibatch_and_its_factor_stays_outside(name, vectorize):
    """With an exact guide a minibatch gives N/B times the sum of its own evidences."""
    batches = itertools.combinations(range(5), 2)
    possible = [2.5 * log_evidence(DATA[list(b)]).sum().item() for b in batches]

    def model(x):
        with pyro.plate("data", 5, subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.5, 1.0))
            pyro.sample("x", dist.Normal(z, 0.8), obs=x[index])

    def guide(x):
        with pyro.plate("data", 5, subsample_size=2) as index:
            loc, scale = (0.5 + x[index] / 0.64) / (1 + 1 / 0.64), (1 + 1 / 0.64) ** -0.5
            pyro.sample("z", dist.Normal(loc, scale))

    loss = losses(vectorize_particles=vectorize)[name]
    for _ in range(3):
        value = sign(name) * loss.loss(model, guide, DATA)
        assert min(abs(value - p) for p in possible) < 1e-10


class Table(poutine.messenger.Messenger):
    """Puts given draws at site z, those of the rows that are subsampled."""

    def __init__(self, draws, rows):
        super().__init__()
        self.draws = draws[..., rows]

    def _pyro_sample(self, msg):
        if msg["name"] == "z":
            msg["value"], msg["done"] = self.draws, True


@ON_DATA
def test_minibatches_are_unbiased_for_the_full_data(name):
    """The exact average over all minibatches, with the same draws for each datum."""
    draws = torch.randn(4, 5)
    options = {"vectorize_particles": True, "max_plate_nesting": 1}

    def guide(x, size, rows):
        with pyro.plate("data", 5, subsample=rows):
            pyro.sample("z", dist.Normal(x[rows] / 2, 1.1))

    def run(rows):
        rows = torch.tensor(rows)
        with Table(draws, rows):
            return losses(**options)[name].loss(local_model, guide, DATA, 5, rows)

    parts = [run(rows) for rows in itertools.combinations(range(5), 2)]
    assert sum(parts) / len(parts) == pytest.approx(run(range(5)), rel=1e-12)


@VECTORIZE
@ON_DATA
def test_constant_likelihood_in_a_plate(name, vectorize):
    """Guide = prior and a likelihood of 0.6: N log 0.6, subsampled or not."""

    def model(batch_size):
        with pyro.plate("data", 10, subsample_size=batch_size):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(0.6), obs=torch.tensor(1.0))

    def guide(batch_size):
        with pyro.plate("data", 10, subsample_size=batch_size):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    for batch_size in (10, 3):
        loss = losses(vectorize_particles=vectorize)[name]
        expected = sign(name) * 10 * math.log(0.6)
        assert loss.loss(model, guide, batch_size) == pytest.approx(expected, rel=1e-12)


@VECTORIZE
@ON_DATA
@pytest.mark.parametrize("scale", [0.2, torch.tensor(0.2), torch.tensor([0.2, 1, 2.0, 0.1, 0.5])])
def test_a_common_scale_multiplies_the_bound(name, vectorize, scale):
    def guide(x):
        with pyro.plate("data", 5):
            pyro.sample("z", dist.Normal(x / 3, 1.2))

    def run(index, factor):
        pyro.set_rng_seed(0)
        loss = losses(vectorize_particles=vectorize, max_plate_nesting=1)[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weight = torch.zeros(5)
            weight[index] = 1.0
            masks = [poutine.mask(f, mask=weight.bool()) for f in (local_model, guide)]
            return loss.loss(*[poutine.scale(f, scale=factor) for f in masks], DATA)

    total = sum(run([i], 1.0) * float(torch.as_tensor(scale).expand(5)[i]) for i in range(5))
    assert run(list(range(5)), scale) == pytest.approx(total, rel=1e-10)


@VECTORIZE
def test_a_scale_of_one_site_acts_inside_the_weight(vectorize):
    """Annealing the prior and the guide of z: a weight p(x|z) (p(z) / q(z))^c."""

    def model(x):
        with pyro.plate("data", 5):
            with poutine.scale(scale=0.3):
                z = pyro.sample("z", dist.Normal(0.5, 1.0))
            pyro.sample("x", dist.Normal(z, 0.8), obs=x)

    def guide(x):
        with pyro.plate("data", 5), poutine.scale(scale=0.3):
            pyro.sample("z", dist.Normal(x / 3, 1.2))

    loss = IWAE(6, vectorize_particles=vectorize, max_plate_nesting=1)
    pyro.set_rng_seed(0)
    value = loss.loss(model, guide, DATA)
    pyro.set_rng_seed(0)
    noise = torch.randn(6, 5) if vectorize else torch.stack([torch.randn(5) for _ in range(6)])
    z = DATA / 3 + 1.2 * noise
    log_w = dist.Normal(z, 0.8).log_prob(DATA)
    log_w = log_w + 0.3 * dist.Normal(0.5, 1.0).log_prob(z)
    log_w = log_w - 0.3 * dist.Normal(DATA / 3, 1.2).log_prob(z)
    expected = -(torch.logsumexp(log_w, 0) - math.log(6)).sum()
    assert value == pytest.approx(expected.item(), rel=1e-12)
    with pytest.raises(NotImplementedError, match=r'"dreg" needs the plain density .* site "z"'):
        IWAE(2, "dreg").differentiable_loss(
            model, poutine.condition(learned(guide), data={}), DATA
        )


def learned(guide):
    """Makes the guide's draws depend on a parameter."""

    def wrapped(x):
        return guide(x + pyro.param("shift", torch.tensor(0.0)))

    return wrapped


@VECTORIZE
@ON_DATA
def test_global_latents_take_one_log_mean_exp_over_the_model(name, vectorize):
    """The exact joint posterior as guide: every weight is the evidence of all data."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 0.8), obs=x)

    x = DATA[:3]
    covariance = 4.0 * torch.ones(3, 3) + 1.64 * torch.eye(3)
    evidence = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x).item()
    precision = 1 / 4 + 3 / 1.64
    loc = (x.sum() / 1.64) / precision

    def guide(x):
        mu = pyro.sample("mu", dist.Normal(loc, precision**-0.5))
        with pyro.plate("data", 3):
            local = 1.0 + 1.0 / 0.64
            pyro.sample("z", dist.Normal((mu + x / 0.64) / local, local**-0.5))

    loss = losses(vectorize_particles=vectorize)[name]
    assert loss.loss(model, guide, x) == pytest.approx(sign(name) * evidence, rel=1e-12)

    # and with another guide: the log-mean-exp of summed log-weights
    def wide(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(mu, 1.5))

    pyro.set_rng_seed(1)
    loss = IWAE(6, vectorize_particles=True, max_plate_nesting=1)
    value = loss.loss(model, wide, x)
    pyro.set_rng_seed(1)
    mu = torch.randn(6, 1)
    z = mu + 1.5 * torch.randn(6, 3)
    log_w = dist.Normal(0.0, 2.0).log_prob(mu)[:, 0] - dist.Normal(0.0, 1.0).log_prob(mu)[:, 0]
    local = dist.Normal(mu, 1.0).log_prob(z) + dist.Normal(z, 0.8).log_prob(x)
    log_w = log_w + (local - dist.Normal(mu, 1.5).log_prob(z)).sum(-1)
    assert value == pytest.approx(-(log_w.logsumexp(0).item() - math.log(6)), rel=1e-12)


@VECTORIZE
def test_a_joint_autoguide_samples_outside_the_plate(vectorize):
    """AutoMultivariateNormal at the exact posterior: every weight is the evidence."""
    guide = AutoMultivariateNormal(local_model)
    guide(DATA)
    precision = 1.0 + 1.0 / 0.64
    guide.loc.data = (0.5 + DATA / 0.64) / precision
    guide.scale = torch.full((5,), precision**-0.5)
    guide.scale_tril = torch.eye(5)
    truth = log_evidence(DATA).sum().item()
    for name, loss in losses(vectorize_particles=vectorize).items():
        if "simulated" in name:
            continue
        assert loss.loss(local_model, guide, DATA) == pytest.approx(sign(name) * truth, rel=1e-10)


@pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal, AutoIAFNormal, AutoDelta])
@pytest.mark.parametrize("name", ["IWAE", "TVO auto", "TVO reparam"])
def test_autoguides_train(make, name):
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", 5):
            pyro.sample("x", dist.Normal(mu, scale), obs=x)

    guide = make(model)
    svi = SVI(model, guide, Adam({"lr": 0.1}), losses(vectorize_particles=True)[name])
    first = sum(svi.step(DATA + 3) for _ in range(5)) / 5
    for _ in range(40):
        svi.step(DATA + 3)
    last = sum(svi.step(DATA + 3) for _ in range(5)) / 5
    assert last < first - 1.0


@VECTORIZE
@ON_DATA
def test_enumerated_sites_are_summed_out(name, vectorize):
    """Against the same model with the sum written out."""
    probs = torch.tensor([0.2, 0.5, 0.3])
    locs = torch.tensor([-1.0, 0.5, 2.0])
    x = torch.tensor([[0.2, 1.9, -0.4], [0.1, 0.3, 2.2]])

    @config_enumerate
    def model():
        with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Categorical(probs))
            pyro.sample("x", dist.Normal(locs[k] + z, 0.8), obs=x)

    def written_out():
        with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            mixture = dist.MixtureSameFamily(
                dist.Categorical(probs), dist.Normal(locs + z[..., None], 0.8)
            )
            pyro.sample("x", mixture, obs=x)

    def guide():
        with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
            pyro.sample("z", dist.Normal(0.3, pyro.param("scale", torch.tensor(1.1))))

    results = []
    for fn in (model, written_out):
        pyro.clear_param_store()
        loss = losses(vectorize_particles=vectorize, max_plate_nesting=2)[name]
        pyro.set_rng_seed(2)
        value = loss.loss_and_grads(fn, guide)
        results.append((value, pyro.get_param_store()["scale"].unconstrained().grad.item()))
    assert results[0] == pytest.approx(results[1], rel=1e-10)
    # without max_plate_nesting it is guessed
    value = losses(vectorize_particles=vectorize)[name].loss(model, guide)
    assert math.isfinite(value)


@VECTORIZE
def test_global_and_enumerated_sites_agree_with_traceenum(vectorize):
    """A mixture with global parameters and a subsampled plate, at one particle."""
    x = torch.tensor([0.2, 1.9, -0.4, 3.0])

    @config_enumerate
    def model():
        locs = pyro.sample("locs", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
        with pyro.plate("data", 4, subsample=torch.tensor([3, 0])) as index:
            k = pyro.sample("k", dist.Bernoulli(0.3)).long()
            pyro.sample("x", dist.Normal(locs[k], 0.8), obs=x[index])

    def guide():
        pyro.sample("locs", dist.Normal(pyro.param("loc", torch.zeros(2)), 0.5).to_event(1))

    results = []
    for make in (TraceEnum_ELBO, IWAE):
        pyro.clear_param_store()
        pyro.set_rng_seed(5)
        value = make(1, max_plate_nesting=1, vectorize_particles=vectorize).loss_and_grads(
            model, guide
        )
        results.append((value, pyro.get_param_store()["loc"].grad.clone()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-10)


@VECTORIZE
@ON_DATA
def test_masks_leave_data_out(name, vectorize):
    mask = torch.tensor([True, False, True, True, False])

    def masked(x):
        with pyro.plate("data", 5), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(0.5, 1.0))
            pyro.sample("x", dist.Normal(z, 0.8), obs=x)

    def guide(x):
        with pyro.plate("data", 5), poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal((0.5 + x / 0.64) / (1 + 1 / 0.64), 1.64**-0.5 * 0.8))

    loss = losses(vectorize_particles=vectorize)[name]
    expected = sign(name) * log_evidence(DATA[mask]).sum().item()
    assert loss.loss(masked, guide, DATA) == pytest.approx(expected, rel=1e-12)


@VECTORIZE
@ON_DATA
def test_a_factor_shifts_the_log_weights(name, vectorize):
    def model(x):
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(0.5, 1.0))
            pyro.sample("x", dist.Normal(z, 0.8), obs=x)
            pyro.factor("extra", x)

    loss = losses(vectorize_particles=vectorize)[name]
    expected = sign(name) * (log_evidence(DATA).sum() + DATA.sum()).item()
    assert loss.loss(model, exact_guide, DATA) == pytest.approx(expected, rel=1e-12)


@VECTORIZE
def test_nested_plates_that_enclose_some_sites_are_summed(vectorize):
    """Groups enclose everything, members do not: the bound is per group."""
    x = torch.tensor([[0.2, 1.9, -0.4], [0.1, 0.3, 2.2]]).T  # [members, groups]

    def model():
        with pyro.plate("groups", 2, dim=-1):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("members", 3, dim=-2):
                pyro.sample("x", dist.Normal(mu, 0.8), obs=x)
            pyro.deterministic("note", mu + 1)
        pyro.deterministic("outside", torch.tensor(0.0))

    def guide():
        with pyro.plate("groups", 2, dim=-1):
            pyro.sample("mu", dist.Normal(0.4, 0.9))

    pyro.set_rng_seed(0)
    loss = IWAE(6, vectorize_particles=vectorize, max_plate_nesting=2)
    value = loss.loss(model, guide)
    pyro.set_rng_seed(0)
    mu = 0.4 + 0.9 * torch.randn(6, 1, 2)
    log_w = dist.Normal(0.0, 1.0).log_prob(mu) - dist.Normal(0.4, 0.9).log_prob(mu)
    log_w = log_w.squeeze(1) + dist.Normal(mu, 0.8).log_prob(x).sum(1)
    expected = -(log_w.logsumexp(0) - math.log(6)).sum().item()
    assert value == pytest.approx(expected, rel=1e-12)


@ON_DATA
def test_sequential_plates_are_summed(name):
    def model(x):
        for i in pyro.plate("data", 5):
            z = pyro.sample(f"z{i}", dist.Normal(0.5, 1.0))
            pyro.sample(f"x{i}", dist.Normal(z, 0.8), obs=x[i])

    def guide(x):
        precision = 1.0 + 1.0 / 0.64
        for i in pyro.plate("data", 5):
            pyro.sample(f"z{i}", dist.Normal((0.5 + x[i] / 0.64) / precision, precision**-0.5))

    expected = sign(name) * log_evidence(DATA).sum().item()
    assert losses()[name].loss(model, guide, DATA) == pytest.approx(expected, rel=1e-12)


def test_a_subsampled_plate_inside_global_latents_warns_that_it_is_no_bound():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", 5, subsample_size=2) as index:
            pyro.sample("x", dist.Normal(mu, 0.8), obs=x[index])

    def guide(x):
        pyro.sample("mu", dist.Normal(1.0, 0.4))

    with pytest.warns(UserWarning, match=r"plate\(s\) \['data'\] around site 'x' are subsampled"):
        IWAE(3).loss(model, guide, DATA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        IWAE(1).loss(model, guide, DATA)


class Decoder(torch.nn.Module):
    """A model of plain modules, with no pyro.param anywhere."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(1, 1)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), 0.8).to_event(1), obs=x)


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(1, 2)

    def forward(self, x):
        loc, log_scale = self.net(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


@VECTORIZE
@ALL
def test_plain_modules_get_gradients(name, vectorize):
    model, guide = Decoder(), Encoder()
    x = DATA.unsqueeze(-1)
    elbo = losses(vectorize_particles=vectorize)[name](model, guide)
    elbo(x).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in guide.parameters())
    if sign(name) > 0:  # bounds from above: the guide alone learns
        assert all(p.grad is None for p in model.parameters())
    else:
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    module = {n: p.grad for n, p in elbo.named_parameters() if p.grad is not None}
    for parameter in elbo.parameters():
        parameter.grad = None
    pyro.set_rng_seed(0)
    loss = losses(vectorize_particles=vectorize)[name]
    value = loss.loss_and_grads(model, guide, x)
    assert isinstance(value, float)
    assert {n for n, p in elbo.named_parameters() if p.grad is not None} == set(module)


@VECTORIZE
@ALL
def test_the_three_ways_agree(name, vectorize):
    """`loss`, `loss_and_grads` and `differentiable_loss` at one seed: one value, one gradient."""
    model, guide = Decoder(), Encoder()
    x = DATA.unsqueeze(-1)
    loss = losses(vectorize_particles=vectorize, max_plate_nesting=1)[name]
    parameters = [*model.parameters(), *guide.parameters()]
    pyro.set_rng_seed(7)
    value = loss.loss(model, guide, x)
    pyro.set_rng_seed(7)
    assert loss.loss_and_grads(model, guide, x) == pytest.approx(value, rel=1e-13)
    grads = [None if p.grad is None else p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    pyro.set_rng_seed(7)
    tensor = loss.differentiable_loss(model, guide, x)
    assert tensor.item() == pytest.approx(value, rel=1e-13)
    assert tensor.dim() == 0
    tensor.backward()
    for p, grad in zip(parameters, grads, strict=True):
        assert (p.grad is None) == (grad is None)
        if grad is not None:
            assert torch.equal(p.grad, grad)


@pytest.mark.parametrize("name", ["IWAE", "TVO left", "TVO dreg", "EUBO importance"])
def test_svi_trains_a_pyro_module(name):
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.tensor(-1.0))

        def forward(self, x):
            with pyro.plate("data", 5):
                z = pyro.sample("z", dist.Normal(self.loc, 1.0))
                pyro.sample("x", dist.Normal(z, 0.8), obs=x)

    model = Model()
    guide = AutoNormal(model)
    svi = SVI(model, guide, Adam({"lr": 0.1}), losses(vectorize_particles=True)[name])
    for _ in range(40):
        svi.step(DATA)
    if name.startswith("EUBO"):
        assert model.loc.item() == -1.0
    else:
        assert model.loc.item() > 0.0


def test_disagreements_name_the_site():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("w", dist.Normal(0.0, 1.0))

    def guide():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    for loss in (IWAE(2), TVO(2), EUBO(2)):
        with pytest.raises(ValueError, match='latent site "w" of the model is not in the guide'):
            loss.loss(model, guide)

    @config_enumerate(num_samples=3)
    def sampled():
        pyro.sample("z", dist.Bernoulli(0.3))

    with pytest.raises(NotImplementedError, match='"z" is enumerated by num_samples draws'):
        IWAE(2, max_plate_nesting=0).loss(sampled, lambda: None)


def test_a_scale_inside_an_enumerated_sum_is_refused():
    @config_enumerate
    def model():
        k = pyro.sample("k", dist.Bernoulli(0.3))
        with poutine.scale(scale=0.5):
            pyro.sample("x", dist.Normal(k, 1.0), obs=torch.tensor(0.4))

    with pytest.raises(NotImplementedError, match='site "x" depends on an enumerated site'):
        IWAE(2).loss(model, lambda: None)


def test_particle_counts_are_checked():
    with pytest.raises(ValueError, match="num_particles must be at least 1, got 0"):
        IWAE(0)


def test_nan_warns_and_minus_infinity_is_a_value():
    def model(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", x)

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    assert IWAE(3).loss_and_grads(model, guide, torch.tensor(-torch.inf)) == torch.inf
    assert pyro.get_param_store()["loc"].grad.isfinite()
    with pyro.validation_enabled(False), pytest.warns(UserWarning, match="Encountered NaN"):
        IWAE(3).loss(model, guide, torch.tensor(torch.nan))


def test_constructor_takes_pyro_arguments():
    for make in (IWAE, TVO, EUBO):
        loss = make(
            num_particles=3,
            max_plate_nesting=2,
            vectorize_particles=True,
            strict_enumeration_warning=False,
            ignore_jit_warnings=True,
            retain_graph=True,
        )
        assert loss.max_plate_nesting == Trace_ELBO(3, 2, None, True).max_plate_nesting == 3


@pytest.mark.parametrize(
    "make",
    [
        lambda: IWAE(3),
        lambda: TVO(3, gradient="dreg"),
        lambda: EUBO(3),
        lambda: AIWAE(3, 2, step_size=0.2),
        pytest.param(lambda: DifferentiableAIS(3, 2, step_size=0.2), marks=pytest.mark.slow),
    ],
    ids=["IWAE", "TVO", "EUBO", "AIWAE", "DifferentiableAIS"],
)
def test_what_is_masked_may_be_nan(make):
    """Missing values have the loss and the gradients of rows without that site's term."""
    x = torch.tensor([0.4, float("nan"), -1.0])
    results = []
    for value in (x, torch.tensor([0.4, 7.0, -1.0])):  # what a mask hides may be any number
        shift = torch.tensor(0.3, requires_grad=True)

        def model(x, shift=shift):
            with pyro.plate("data", 3):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                with poutine.mask(mask=torch.tensor([True, False, True])):
                    pyro.sample("x", dist.Normal(z + shift, 0.5), obs=x)

        def guide(x, shift=shift):
            with pyro.plate("data", 3):
                pyro.sample("z", dist.Normal(shift, 0.8))

        pyro.set_rng_seed(2)
        loss = make().differentiable_loss(model, guide, value)
        (grad,) = torch.autograd.grad(loss, shift)
        results.append([loss.item(), grad.item()])
    assert results[0] == pytest.approx(results[1], rel=1e-12)
    assert abs(results[0][1]) > 1e-3


def masked_regression(x, y):
    slope = pyro.param("slope", torch.tensor(0.7))
    with pyro.plate("data", len(y)), poutine.mask(mask=~y.isnan()):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(slope * x + z, 0.5), obs=y)


def masked_guide(x, y):
    shift = pyro.param("shift", torch.tensor(0.2))
    with pyro.plate("data", len(y)), poutine.mask(mask=~y.isnan()):
        pyro.sample("z", dist.Normal(shift, 0.8))


def test_masked_nan_among_parameters_is_named():
    x, y = torch.tensor([1.0, math.nan, -1.0]), torch.tensor([0.4, math.nan, 0.1])
    with (
        pyro.validation_enabled(False),
        pytest.raises(ValueError, match=r'"y" the log density is NaN at 1 masked place'),
    ):
        IWAE(20).loss_and_grads(masked_regression, masked_guide, x, y)
