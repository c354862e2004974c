"""Samplers as Pyro distributions: shapes, errors, training, priors, annealing, moving, pickling."""

import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from eim_truths import GRID, STEP, assert_mean
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_anneal import AnnealedImportance
from pyro_anneal.eim import (
    HIS,
    LARS,
    SNIS,
    TRS,
    Leapfrog,
    MovingAverageNormalizer,
    has_exact_log_prob,
)
from pyro_anneal.losses import IWAE


class Net(nn.Module):
    """A scalar network with two layers of 20 tanh units; an energy or a log acceptance."""

    def __init__(self, dim, accept=False):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1)
        )
        self.accept = accept

    def forward(self, x):
        value = self.layers(x).squeeze(-1)
        return nn.functional.logsigmoid(value) if self.accept else value


def quadratic(x):
    return (x - 0.7).square().sum(-1)


def log_accept(x):
    return -nn.functional.softplus(quadratic(x))


BUILD = {
    "snis": lambda p, **o: SNIS(p, quadratic, 5, **o),
    "trs": lambda p, **o: TRS(p, log_accept, 5, **o),
    "lars": lambda p, **o: LARS(p, log_accept, 5, log_normalizer=torch.tensor(-1.0), **o),
    "his": lambda p, **o: HIS(p, quadratic, 2, **o),
}


def plane(*batch):
    loc = torch.arange(2.0 * math.prod(batch)).reshape(*batch, 2) / 3.0
    return dist.Normal(loc, 1.0).to_event(1)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("batch", [(), (3,), (4, 3)])
@pytest.mark.parametrize("name", BUILD)
def test_shapes_of_samples_and_log_prob(name, batch, shared):
    d = BUILD[name](plane(*batch), share_proposals=shared, num_particles=2)
    assert d.batch_shape == batch
    assert d.event_shape == (2,)
    assert d.sample().shape == (*batch, 2)
    assert d.sample((6, 1)).shape == (6, 1, *batch, 2)
    value = torch.randn(6, 1, *batch, 2)
    assert d.log_prob(value).shape == (6, 1, *batch)
    assert d.log_prob(torch.zeros(2)).shape == batch
    assert d.log_prob_bound(value, 3).shape == (6, 1, *batch)
    assert not d.has_exact_log_prob
    assert d.support.event_dim == 1
    if name != "lars":
        extended = d.extended()
        slots = 2 if name == "his" else 5
        assert extended.event_shape == (slots, 2)
        assert extended.sample((6,)).shape == (6, *batch, slots, 2)
        assert extended.log_prob(torch.randn(6, *batch, slots, 2)).shape == (6, *batch)
        assert extended.support.event_dim == 2
        assert extended.expand((7, *batch)).sample().shape == (7, *batch, slots, 2)


@pytest.mark.parametrize("name", BUILD)
def test_expand_draws_independent_elements_of_the_same_law(name):
    d = BUILD[name](plane(), num_particles=2)
    wide = d.expand((1000,))
    assert wide.batch_shape == (1000,)
    assert d.batch_shape == ()
    bounds = wide.log_prob(torch.tensor([0.4, 0.9]).expand(1000, 2))
    assert bounds.unique().numel() > 990
    again = d.log_prob(torch.tensor([0.4, 0.9]).expand(4000, 2)).exp()
    difference = bounds.exp().mean() - again.mean()
    assert abs(difference) < 5.0 * (bounds.exp().var() / 1000 + again.var() / 4000).sqrt() + 1e-12
    samples = wide.sample((4,))
    assert samples.shape == (4, 1000, 2)
    assert samples.reshape(-1, 2).unique(dim=0).shape[0] == 4000
    with pytest.raises(RuntimeError):
        BUILD[name](plane(3)).expand((4,))


@pytest.mark.parametrize("name", BUILD)
def test_batched_proposals_give_each_element_its_own_law(name):
    batched, value = BUILD[name](plane(3)), torch.tensor([0.4, 0.9])
    together = batched.log_prob_bound(value.expand(20_000, 3, 2)).exp()
    for i in range(3):
        single = BUILD[name](dist.Normal(plane(3).base_dist.loc[i], 1.0).to_event(1))
        alone = single.log_prob(value.expand(20_000, 2)).exp()
        error = ((together[:, i].var() + alone.var()) / 20_000).sqrt()
        assert abs(together[:, i].mean() - alone.mean()) < 5.0 * error + 1e-12


def test_wrappers_keep_the_bound_and_the_flag():
    flat = dist.Normal(torch.tensor([0.0, 1.0]), 1.0)
    wrapped = SNIS(flat, lambda x: torch.zeros_like(x), 4).to_event(1)
    value = torch.tensor([[0.3, -1.0], [2.0, 0.1]])
    torch.testing.assert_close(wrapped.log_prob(value), flat.log_prob(value).sum(-1))
    assert wrapped.sample((5,)).shape == (5, 2)
    shifted = dist.TransformedDistribution(wrapped, dist.transforms.AffineTransform(1.0, 2.0))
    torch.testing.assert_close(
        shifted.log_prob(1.0 + 2.0 * value), flat.log_prob(value).sum(-1) - 2.0 * math.log(2.0)
    )
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), SNIS(flat, torch.square, 4))
    for distribution in (wrapped, wrapped.mask(True), wrapped.expand((5,)), shifted, mixture):
        assert not has_exact_log_prob(distribution)
    assert has_exact_log_prob(flat.to_event(1).mask(True))


def test_share_proposals_draws_once_for_an_expanded_batch():
    calls = []

    def counted(x):
        calls.append(x.shape[:-1].numel())
        return quadratic(x)

    SNIS(plane(), counted, 64, share_proposals=True).expand((128,)).log_prob(torch.zeros(128, 2))
    assert sorted(calls) == [63, 128]
    calls.clear()
    SNIS(plane(), counted, 64).expand((128,)).log_prob(torch.zeros(128, 2))
    assert sorted(calls) == [128, 63 * 128]


def test_wrong_input_is_named():
    normal, pair = dist.Normal(0.0, 1.0), plane()
    with pytest.raises(ValueError, match="num_samples must be an integer of at least 1, got 0"):
        SNIS(normal, torch.square, 0)
    with pytest.raises(ValueError, match="num_trials"):
        TRS(normal, torch.square, 0)
    with pytest.raises(ValueError, match="num_particles"):
        SNIS(normal, torch.square, 4, num_particles=0)
    with pytest.raises(ValueError, match="num_particles"):
        SNIS(normal, torch.square, 4).log_prob_bound(torch.zeros(()), num_particles=-1)
    with pytest.raises(TypeError, match="proposal must be a distribution, got int"):
        SNIS(3, torch.square, 4)
    column = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"Linear returned shape \[128, 1\].*squeeze"):
        SNIS(pair, column, 4).log_prob(torch.zeros(128, 2))
    with pytest.raises(ValueError, match=r"Linear returned shape .* expected \[4, 7\]"):
        TRS(pair, column, 4).sample((7,))
    with pytest.raises(ValueError, match="log_accept must be at most 0, got 2"):
        TRS(normal, lambda x: torch.full_like(x, 2.0), 4, validate_args=True).sample()
    with pytest.raises(ValueError, match="support"):
        SNIS(dist.Gamma(2.0, 1.0), torch.log, 4, validate_args=True).log_prob(torch.tensor(-1.0))
    with pytest.raises(ValueError, match="real space"):
        HIS(dist.Gamma(2.0, 1.0), torch.square)
    with pytest.raises(ValueError, match=r"log_tempering has shape \[2\], expected \[3\]"):
        HIS(normal, torch.square, 3, log_tempering=torch.zeros(2))
    with pytest.raises(ValueError, match="num_steps"):
        HIS(normal, torch.square, -1)
    with pytest.raises(ValueError, match=r"momentum_guide returned Normal of shape \[\]"):
        HIS(pair, quadratic, 1, lambda x: dist.Normal(0.0, 1.0)).log_prob(torch.zeros(2))
    with pytest.raises(NotImplementedError, match="build TRS with the same proposal"):
        LARS(normal, log_accept, 4, log_normalizer=torch.tensor(-1.0)).extended()
    with pytest.raises(ValueError, match="log_normalizer must be below 0, got 0"):
        LARS(normal, torch.square, 4, log_normalizer=torch.tensor(0.0), validate_args=True)
    with pytest.raises(ValueError, match=r"batch shape \[3\]"):
        LARS(plane(3), log_accept, 4, log_normalizer=MovingAverageNormalizer())
    with pytest.raises(NotImplementedError, match="exact log_prob, got TRS"):
        SNIS(TRS(normal, torch.square, 4), torch.square, 4).extended()
    with pytest.raises(ValueError, match="decay"):
        MovingAverageNormalizer(1.0)
    with pytest.raises(ValueError, match="tempering in"):
        Leapfrog(3, tempering=1.0)


def test_a_thousand_samples_for_a_batch_of_128():
    pyro.set_rng_seed(3)
    net, value = Net(2).float(), torch.randn(128, 2, dtype=torch.float32)
    base = dist.Normal(torch.zeros(2, dtype=torch.float32), 1.0).to_event(1)
    for d in (SNIS(base, net, 1024), TRS(base, Net(2, accept=True).float(), 1024)):
        bound = d.log_prob(value)
        bound.sum().backward()
        reference = d.to(torch.float64).log_prob_bound(value.double(), 20, share_proposals=True)
        assert (bound.double() - reference).abs().max() < 0.3
        assert bound.dtype == torch.float32
        gradients = [p.grad for p in net.parameters()]
        assert all(g.isfinite().all() for g in gradients)
        assert any((g != 0.0).any() for g in gradients[:-1])  # the last bias cancels in SNIS


# A lopsided mixture on the line, 0.8 N(-1, .4) + 0.2 N(1.5, .3), to be learned from draws.
TARGET_MIX, TARGET_LOC, TARGET_SCALE = (0.8, 0.2), (-1.0, 1.5), (0.4, 0.3)


def target():
    return dist.MixtureSameFamily(
        dist.Categorical(probs=torch.tensor(TARGET_MIX)),
        dist.Normal(torch.tensor(TARGET_LOC), torch.tensor(TARGET_SCALE)),
    )


@pytest.mark.parametrize("name", ["snis", "trs", pytest.param("his", marks=pytest.mark.slow)])
def test_svi_trains_a_data_model_without_a_guide(name):
    pyro.set_rng_seed(2)
    net = Net(1, accept=name == "trs").to(torch.float64)
    leapfrog = Leapfrog(3, (1,), step_size=0.3)
    guide_net = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 2))

    def momentum_guide(x):
        loc, scale = guide_net(x).chunk(2, -1)
        return dist.Normal(loc, nn.functional.softplus(scale) + 0.01)

    def build():
        base = dist.Normal(torch.zeros(1), 1.5).to_event(1)
        if name == "snis":
            return SNIS(base, net, 64, share_proposals=True)
        if name == "trs":
            return TRS(base, net, 64, share_proposals=True)
        return HIS(
            base,
            net,
            3,
            momentum_guide,
            step_size=leapfrog.step_size,
            log_tempering=leapfrog.log_tempering,
        )

    def model(data):
        pyro.module("net", net)
        if name == "his":
            pyro.module("leapfrog", leapfrog)
            pyro.module("guide_net", guide_net)
        with pyro.plate("data", len(data)):
            pyro.sample("x", build(), obs=data)

    before = {k: v.detach().clone() for k, v in net.state_dict().items()}
    svi = SVI(model, lambda data: None, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    held_out = target().sample((2000,)).unsqueeze(-1)
    start = build().log_prob_bound(held_out, 50).mean().item()
    for _ in range(400):
        svi.step(target().sample((256,)).unsqueeze(-1))
    assert all((before[k] != v).any() for k, v in net.state_dict().items() if "4.bias" not in k)
    with torch.no_grad():
        bound = build().log_prob_bound(held_out, 50)
    mass = target().log_prob(GRID).exp() * STEP
    attainable = (mass * target().log_prob(GRID)).sum()
    log_ratio = bound - target().log_prob(held_out.squeeze(-1))
    error = (log_ratio.std() / math.sqrt(len(held_out))).item()
    assert start < attainable - 0.3
    assert log_ratio.mean() < 5.0 * error  # minus a divergence
    assert log_ratio.mean() > (-0.15 if name == "his" else -0.06)


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("name", ["snis", "trs", "his"])
def test_as_a_latent_prior_with_an_exact_guide_the_elbo_is_the_evidence(name, vectorize):
    # A flat energy leaves the N(0, 1) prior: x = 2 has posterior N(1, sqrt .5), zero variance.
    base = dist.Normal(0.0, 1.0)
    prior = {
        "snis": SNIS(base, lambda z: 0.0 * z, 32),
        "trs": TRS(base, lambda z: 0.0 * z - 1.3, 32),
        "his": HIS(base, lambda z: 0.0 * z, 0),
    }[name]

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor([2.0, 2.0, -2.0]))

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(torch.tensor([1.0, 1.0, -1.0]), math.sqrt(0.5)))

    elbo = Trace_ELBO(num_particles=4, vectorize_particles=vectorize, max_plate_nesting=1)
    assert -elbo.loss(model, guide) == pytest.approx(3 * -2.265512, abs=1e-5)


def evidence_truth(num_samples, prior_energy, observation):
    grid = GRID[::8]
    mass = dist.Normal(0.0, 1.0).log_prob(grid).exp() * STEP * 8
    weight = torch.exp(-prior_energy(grid))
    assert num_samples == 2
    share = (2.0 * weight[:, None] / (weight[:, None] + weight) * mass).sum(-1)
    likelihood = dist.Normal(grid, 0.5).log_prob(torch.tensor(observation)).exp()
    return float((mass * share * likelihood).sum().log())


def test_extended_site_makes_the_prior_exact_in_a_model():
    def model():
        with pyro.plate("data", 5000):
            pool = pyro.sample("pool", SNIS(dist.Normal(0.0, 1.0), prior_energy, 2).extended())
            pyro.sample("x", dist.Normal(pool[..., 0], 0.5), obs=torch.tensor(0.9).expand(5000))

    truth = evidence_truth(2, prior_energy, 0.9)
    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert_mean(trace.nodes["x"]["log_prob"].exp(), math.exp(truth))
    # As any exact density, it gives an ELBO below the evidence with an automatic guide.
    pyro.clear_param_store()
    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(150):
        loss = svi.step() / 5000
    assert truth - 0.2 < -loss < truth + 0.02


@pytest.mark.parametrize("name", ["snis", "trs"])
def test_losses_stay_lower_bounds_with_a_stochastic_prior(name):
    rows, base = 4000, dist.Normal(0.0, 1.0)
    prior = {
        "snis": SNIS(base, prior_energy, 2),
        "trs": TRS(base, lambda z: nn.functional.logsigmoid(-prior_energy(z)), 2),
    }[name]
    grid = GRID[::8]
    joint = prior.extended().log_prob(torch.cartesian_prod(grid, grid)).exp()
    mass = joint.reshape(len(grid), len(grid)).sum(1) * (STEP * 8) ** 2
    truth = (dist.Normal(grid, 0.5).log_prob(torch.tensor(0.9)).exp() * mass).sum().log()

    def model():
        with pyro.plate("data", rows):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 0.5), obs=torch.tensor(0.9).expand(rows))

    def guide():
        with pyro.plate("data", rows):
            pyro.sample("z", dist.Normal(1.0, 0.6))

    bounds = []
    for num_particles in (1, 8):
        bound = -IWAE(num_particles, max_plate_nesting=1).loss(model, guide) / rows
        bounds.append(bound)
    guide_trace = pyro.poutine.trace(guide).get_trace()
    replayed = pyro.poutine.trace(pyro.poutine.replay(model, guide_trace)).get_trace()
    replayed.compute_log_prob()
    guide_trace.compute_log_prob()
    log_weights = sum(replayed.nodes[site]["log_prob"] for site in ("z", "x"))
    log_weights = log_weights - guide_trace.nodes["z"]["log_prob"]
    assert_mean(log_weights.exp(), truth.exp())  # an unbiased weight, as with an exact prior
    error = (log_weights.std() / math.sqrt(rows)).item()
    assert bounds[0] == pytest.approx(log_weights.mean().item(), abs=8.0 * error)
    assert bounds[0] + 5.0 * error < bounds[1] < truth + 5.0 * error
    assert bounds[1] > truth - 0.1


def prior_energy(z):
    return -2.0 * z + torch.sin(3.0 * z)


@pytest.mark.parametrize(
    "name", ["snis", *(pytest.param(name, marks=pytest.mark.slow) for name in ("trs", "his"))]
)
def test_annealing_takes_the_extended_site_and_refuses_the_stochastic_one(name):
    base = dist.Normal(0.0, 1.0)
    prior = {
        "snis": SNIS(base, prior_energy, 2),
        "trs": TRS(base, lambda z: nn.functional.logsigmoid(-prior_energy(z)), 2),
        "his": HIS(base, prior_energy, 2, step_size=0.3),
    }[name]
    observed = torch.tensor([0.9, -0.6, 2.0])

    def stochastic():
        with pyro.plate("data", 3):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 0.5), obs=observed)

    def exact():
        with pyro.plate("data", 3):
            pool = pyro.sample("pool", prior.extended())
            pyro.sample("x", dist.Normal(pool[..., 0], 0.5), obs=observed)

    options = {"num_chains": 100, "num_steps": 8, "seed": 0, "progress_bar": False}
    with pytest.raises(ValueError, match="draws random numbers"):
        AnnealedImportance(stochastic, compile=False, **options).run()
    evidence = AnnealedImportance(exact, compile=False, **options).run()
    grid = GRID[::8]
    joint = prior.extended().log_prob(torch.cartesian_prod(grid, grid)).exp()
    mass = joint.reshape(len(grid), len(grid)).sum(1) * (STEP * 8) ** 2  # of slot 0
    truth = (dist.Normal(grid, 0.5).log_prob(observed.unsqueeze(-1)).exp() * mass).sum(-1)
    if name == "snis":
        expected = [evidence_truth(2, prior_energy, x.item()) for x in observed]
        torch.testing.assert_close(truth.log(), torch.tensor(expected), atol=1e-7, rtol=0)
    assert_mean(evidence.log_weights.exp(), truth)
    assert (evidence.lower - truth.log()).abs().max() < 0.3


def test_pyro_call_and_condition():
    d = SNIS(plane(), quadratic, 8)
    assert d().shape == (2,)
    assert d((3,)).shape == (3, 2)
    conditioned = pyro.condition(lambda: pyro.sample("z", d), {"z": torch.ones(2)})
    trace = pyro.poutine.trace(conditioned).get_trace()
    assert torch.equal(trace.nodes["z"]["value"], torch.ones(2))
    assert trace.log_prob_sum().isfinite()


@pytest.mark.parametrize("name", ["snis", "trs", "his"])
def test_moving_to_another_dtype_and_pickling(name):
    net = Net(2, accept=name == "trs").double()
    scale = torch.tensor([1.0, 2.0], requires_grad=True)
    base = dist.Normal(torch.zeros(2), scale).to_event(1)
    d = {
        "snis": lambda: SNIS(base, net, 4),
        "trs": lambda: TRS(base, net, 4),
        "his": lambda: HIS(base, net, 2, step_size=torch.tensor([0.1, 0.2])),
    }[name]()
    value = torch.tensor([0.3, -0.2])
    pyro.set_rng_seed(4)
    expected = d.log_prob(value).item()
    copied = pickle.loads(pickle.dumps(d.to(torch.float64)))
    pyro.set_rng_seed(4)
    assert copied.log_prob(value).item() == expected
    single = d.to(torch.float32)
    assert single.sample().dtype == torch.float32
    assert next(net.parameters()).dtype == torch.float32  # modules move in place
    bound = single.log_prob(value.float())
    assert bound.dtype == torch.float32
    (gradient,) = torch.autograd.grad(bound, scale)
    assert (gradient != 0.0).all()  # still connected to the parameter


@pytest.mark.gpu
@pytest.mark.parametrize("name", BUILD)
def test_moving_to_the_accelerator(name):
    d = BUILD[name](plane()).to("cuda")
    assert d.sample((3,)).device.type == "cuda"
    assert d.log_prob(torch.zeros(3, 2, device="cuda")).device.type == "cuda"


def test_cloudpickle_keeps_closures():
    cloudpickle = pytest.importorskip("cloudpickle")
    shift = torch.tensor(0.7)
    d = SNIS(dist.Normal(0.0, 1.0), lambda x: (x - shift).square(), 4)
    copied = pickle.loads(cloudpickle.dumps(d))
    for d_ in (d, copied):
        pyro.set_rng_seed(4)
        value = d_.log_prob(torch.tensor(0.2))
    pyro.set_rng_seed(4)
    assert torch.equal(value, d.log_prob(torch.tensor(0.2)))


def test_no_gradient_needed_under_no_grad():
    d = HIS(plane(), Net(2).double(), 3)
    with torch.no_grad():
        bound = d.log_prob(torch.zeros(2))
        sample = d.rsample()
    assert not bound.requires_grad
    assert not sample.requires_grad
    assert d.has_rsample
    assert not HIS(SNIS(plane(), quadratic, 3), quadratic, 2).has_rsample
