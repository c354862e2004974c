"""Two ways in, one implementation: Pyro models and tensors; errors, errors bars, stability."""

import math
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_anneal import mi
from pyro_anneal.mi.guides import condition_on

W = torch.tensor([[1.0, -2.0], [0.5, 0.3], [2.0, 1.0]], dtype=torch.float64)


def row_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ W.mT, 0.7).to_event(1), obs=x)


def pair_model():
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z @ W.mT, 0.7).to_event(1))


def plated_pair_model():
    """The same joint, with latents and observations in plates inside one pair."""
    with pyro.plate("latents", 2, dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))  # [..., 2, 1]
    loc = (W @ z).squeeze(-1)
    with pyro.plate("features", 3):
        pyro.sample("x", dist.Normal(loc.unsqueeze(-2), 0.7))


JOINT = mi.DistributionJoint(
    dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1),
    lambda z: dist.Normal(z @ W.mT, 0.7).to_event(1),
)
TRUTH = 0.5 * torch.logdet(torch.eye(2, dtype=torch.float64) + W.mT @ W / 0.49)


def factory(x):
    return dist.Normal(x @ W / 6.0, 0.8).to_event(1)


def row_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x @ W / 6.0, 0.8).to_event(1))


MODELS = {
    "rows": lambda: mi.PyroJoint(row_model, example=torch.zeros(1, 3)),
    "one pair": lambda: mi.PyroJoint(pair_model, observed=["x"]),
    "inner plates": lambda: mi.PyroJoint(plated_pair_model, observed=["x"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_pyro_model_agrees_with_distributions(name):
    joint = MODELS[name]()
    assert joint.knowledge == "full joint p(x, z)"
    x, z = joint.sample(50)
    assert x.shape == (50, 3)
    assert z.shape == (50, 2)
    particles = joint.sample_prior(4, x)
    assert particles.shape == (4, 50, 2)
    assert len(particles[:, :, 0].unique()) == 200
    for values in (z, particles):
        torch.testing.assert_close(joint.log_prior(values, x), JOINT.log_prior(values, x))
        torch.testing.assert_close(
            joint.log_likelihood(x, values), JOINT.log_likelihood(x, values)
        )


@pytest.mark.parametrize("guide", [factory, row_guide])
@pytest.mark.parametrize("name", MODELS)
def test_pyro_bounds_hold(name, guide):
    est = mi.IWAE(MODELS[name](), guide, num_particles=20).estimate(num_pairs=2000)
    assert abs(est.lower - TRUTH) < 0.1 + 5 * est.lower_std_error
    assert est.lower <= TRUTH + 5 * est.lower_std_error
    assert est.upper >= TRUTH - 5 * est.upper_std_error


def test_guide_forms_agree():
    x, z = JOINT.sample(10)
    joint = mi.PyroJoint(row_model)
    first, second = condition_on(factory, x), condition_on(row_guide, x, joint)
    for values in (z, torch.randn(5, 10, 2)):
        torch.testing.assert_close(first.log_prob(values), second.log_prob(values))
    draws, log_q = second.sample(7)
    assert draws.shape == (7, 10, 2)
    torch.testing.assert_close(log_q, first.log_prob(draws))


def test_several_sites_are_packed_in_the_order_of_the_model():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 2.0))
            b = pyro.sample("b", dist.Normal(a.unsqueeze(-1).expand(*a.shape, 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(a + b.sum(-1), 1.0), obs=x)

    def guide(x):  # the other order
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Normal(torch.zeros(2), 1.5).to_event(1))
            pyro.sample("a", dist.Normal(x, 1.0))

    joint = mi.PyroJoint(model, example=torch.zeros(1))
    x, z = joint.sample(6)
    a, b = z[:, 0], z[:, 1:]
    expected = dist.Normal(0.0, 2.0).log_prob(a)
    expected = expected + dist.Normal(a.unsqueeze(-1), 1.0).log_prob(b).sum(-1)
    torch.testing.assert_close(joint.log_prior(z, x), expected)
    q = condition_on(guide, x, joint)
    expected = dist.Normal(x, 1.0).log_prob(a) + dist.Normal(0.0, 1.5).log_prob(b).sum(-1)
    torch.testing.assert_close(q.log_prob(z), expected)
    est = mi.BarberAgakov(joint, guide).estimate(num_pairs=20)
    assert est.num_pairs == 20


def test_simulator_without_likelihood():
    """A Pyro simulator whose output has no density still gives pairs and p(z)."""

    def simulator():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        noise = torch.rand((*z.shape[:-1], 3)).pow(2)
        pyro.deterministic("x", (z @ W.mT).sinh() * noise, event_dim=1)

    joint = mi.PyroJoint(simulator, observed=["x"])
    assert joint.knowledge == "marginal p(z)"
    est = mi.GIWAE(joint, factory, mi.SeparableCritic(3, 2, [8]), 4).estimate(num_pairs=30)
    assert est.pair_lower.shape == (30,)
    assert mi.BarberAgakov(joint, factory).estimate(num_pairs=30).upper is None
    with pytest.raises(ValueError, match=r"IWAE needs the full joint p.x, z., but only the margi"):
        mi.IWAE(joint, factory)


def test_roles_swapped_bound_the_rest_of_the_data_entropy():
    """With joint samples only, a decoder q(x|z) bounds I - H(x)."""
    x, z = JOINT.sample(4000)
    cov = W @ W.mT + 0.49 * torch.eye(3)
    entropy = 0.5 * (3 * math.log(2 * math.pi * math.e) + cov.logdet()).item()
    decoder = lambda z: dist.Normal(z @ W.mT, 0.8).to_event(1)
    critic = lambda x, z: 0.1 * (x * (z @ W.mT)).sum(-1)
    for bound in (
        lambda h: mi.BarberAgakov(None, decoder, data_entropy=h),
        lambda h: mi.GIWAE(None, decoder, critic, 4, data_entropy=h),
    ):
        est = bound(entropy).estimate(x, z)
        assert est.missing is None
        assert est.lower <= TRUTH + 5 * est.lower_std_error
        assert est.lower > TRUTH - 1.0
    est = mi.BarberAgakov(None, decoder).estimate(x, z)
    assert est.missing == "H(x)"
    assert "I(x; z) - H(x)" in repr(est)
    torch.testing.assert_close(est.lower, decoder(z).log_prob(x).mean())


def test_roles_swapped_train_an_encoder():
    """Gradients flow through z, and the encoder finds the informative direction."""
    encoder, scale = nn.Linear(2, 1, bias=False), 0.3
    log_scale = nn.Parameter(torch.zeros(2))
    decode = nn.Linear(1, 2)
    bound = mi.BarberAgakov(None, lambda z: dist.Normal(decode(z), log_scale.exp()).to_event(1))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decode.parameters(), log_scale], lr=0.05)
    for _ in range(200):
        x = torch.randn(128, 2) * torch.tensor([3.0, 0.1])
        z = torch.tanh(encoder(x)) + scale * torch.randn(128, 1)
        optimizer.zero_grad()
        bound.loss(x, z).backward()
        optimizer.step()
    # The first coordinate carries nearly all of the data's spread.
    direction = encoder.weight.detach().squeeze().abs() * torch.tensor([3.0, 0.1])
    assert direction[0] > 10 * direction[1]


@pytest.mark.parametrize("num_particles", [None, 6])
def test_standard_error_accounts_for_shared_negatives(num_particles):
    """The error reported for in-batch negatives matches the spread over repeated data sets."""
    critic = lambda x, z: (x @ W * z).sum(-1)
    makers = {
        "InfoNCE": lambda: mi.InfoNCE(lambda x, z: 3 * critic(x, z).tanh(), num_particles),
        "MINE_F": lambda: mi.MINE_F(lambda x, z: 0.2 * critic(x, z).tanh(), num_particles),
        "MINE_DV": lambda: mi.MINE_DV(lambda x, z: 2 * critic(x, z).tanh(), num_particles),
    }
    for name, make in makers.items():
        repeats = [make().estimate(*JOINT.sample(100)) for _ in range(200)]
        values = [e.plug_in if e.lower is None else e.lower for e in repeats]
        errors = [e.lower_std_error if e.plug_in is None else e.plug_in_std_error for e in repeats]
        spread = torch.stack(values).std()
        reported = torch.stack(errors).square().mean().sqrt()
        # 200 repeats: the spread itself has a relative error of 5%.
        assert 0.75 < reported / spread < 1.3, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_of_hundreds_of_nats_do_not_overflow(dtype):
    """Shifting scores by a constant moves MINE-DV and InfoNCE by nothing, at 700 nats too."""
    x, z = (v.to(dtype) for v in JOINT.sample(40))
    weights = W.to(dtype)
    for scale in (1.0, 40.0):

        def critic(x, z, shift=0.0, scale=scale):
            return scale * (x @ weights * z).sum(-1) + shift

        spread = critic(x, z).abs().max()
        assert spread > 500 or scale == 1.0
        for make in (mi.InfoNCE, mi.MINE_DV):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*ceiling")
                torch.manual_seed(0)
                base = make(critic).estimate(x, z)
                torch.manual_seed(0)
                moved = make(lambda x, z: critic(x, z, shift=600.0)).estimate(x, z)
            for est in (base, moved):
                values = est.pair_lower if est.plug_in is None else est.pair_plug_in
                assert values.isfinite().all()
            torch.testing.assert_close(
                base.terms["contrastive"], moved.terms["contrastive"], atol=1e-2, rtol=1e-4
            )
    f = mi.MINE_F(lambda x, z: 0.0 * x.sum(-1) + 0.0 * z.sum(-1) + 400.0).estimate(x, z)
    if dtype == torch.float64:
        torch.testing.assert_close(f.lower, torch.tensor(400.0 - math.exp(399.0), dtype=dtype))
    else:
        assert f.lower == -torch.inf


def test_separable_critic_costs_n_plus_k_passes():
    critic = mi.SeparableCritic(3, 2, [4], num_features=2)
    rows = []
    for net in (critic.x_net, critic.z_net):
        net.register_forward_hook(lambda _, args, out: rows.append(out[..., 0].numel()))
    mi.InfoNCE(critic).estimate(*JOINT.sample(50))
    assert sum(rows) == 2 * (50 + 50)  # the table of all pairs, and the pairs themselves
    rows.clear()
    q_bound = mi.GIWAE(JOINT.prior, factory, critic, 20)
    q_bound.estimate(*JOINT.sample(50))
    assert sum(rows) == 50 + 50 + 50 + 19 * 50  # features of x are computed once, not 19 times


def test_concat_critic_is_a_network_of_the_concatenated_vector():
    critic = mi.ConcatCritic(3, 2, [5, 4])
    x, z = torch.randn(6, 3), torch.randn(6, 2)
    weight = torch.cat([critic.first_x.weight, critic.first_z.weight], 1)
    hidden = torch.cat([x, z], 1) @ weight.mT + critic.first_x.bias
    torch.testing.assert_close(critic(x, z), critic.rest(hidden).squeeze(-1))
    torch.testing.assert_close(mi.pairwise_scores(critic, x, z).diagonal(), critic(x, z))
    with pytest.raises(ValueError, match="at least one hidden layer"):
        mi.ConcatCritic(3, 2, [])


@pytest.mark.parametrize("kind", ["InfoNCE", "InfoNCE 3", "GIWAE", "MINE_DV", "MINE_F", "BA"])
def test_gradient_of_loss_is_that_of_the_estimate(kind):
    """By finite differences of the estimate, with the same draws."""
    critic = mi.ConcatCritic(3, 2, [4])
    scale = nn.Parameter(torch.tensor(0.1))
    guide = lambda x: dist.Normal(x @ W / 6.0, scale.exp()).to_event(1)
    bound = {
        "InfoNCE": lambda: mi.InfoNCE(critic),
        "InfoNCE 3": lambda: mi.InfoNCE(critic, 3),
        "GIWAE": lambda: mi.GIWAE(JOINT.prior, guide, critic, 3),
        "MINE_DV": lambda: mi.MINE_DV(critic, 2, model=JOINT.prior, guide=guide),
        "MINE_F": lambda: mi.MINE_F(critic, 2),
        "BA": lambda: mi.BarberAgakov(JOINT.prior, guide),
    }[kind]()
    x, z = JOINT.sample(12)

    def value():
        torch.manual_seed(3)
        est = bound.estimate(x, z)
        return est.plug_in if est.lower is None else est.lower

    torch.manual_seed(3)
    bound.loss(x, z).backward()
    for parameter in [*critic.parameters(), scale]:
        if parameter.grad is None:
            continue
        flat, grad = parameter.data.view(-1), parameter.grad.view(-1)
        for i in range(0, flat.numel(), 3):
            old = flat[i].item()
            flat[i] = old + 1e-5
            above = value()
            flat[i] = old - 1e-5
            below = value()
            flat[i] = old
            assert -grad[i].item() == pytest.approx(float(above - below) / 2e-5, abs=1e-6)


def test_loader_and_tensors_agree():
    x, z = JOINT.sample(90)
    bound = mi.BarberAgakov(JOINT, factory)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, z), batch_size=32)
    torch.testing.assert_close(bound.estimate(loader).lower, bound.estimate(x, z).lower)
    est = bound.estimate(x, z, batch_size=7)
    assert est.num_pairs == 90
    torch.testing.assert_close(est.pair_lower, bound.estimate(x, z).pair_lower)
    with pytest.raises(ValueError, match="data loader is empty"):
        bound.estimate([])


def test_ceiling_warns_once_and_is_recorded():
    problem_critic = lambda x, z: 40.0 * -(x - z).square().sum(-1)
    x = torch.randn(200, 2)
    with pytest.warns(UserWarning, match="sits at its ceiling of 2.08 nats") as record:
        est = mi.InfoNCE(problem_critic, 8).estimate(x, x + 0.01 * torch.randn(200, 2))
    assert len(record) == 1
    assert est.saturated
    assert est.ceiling == pytest.approx(math.log(8))
    assert "ceiling" in repr(est)


def shifted(x):
    with pyro.plate("data", len(x)):
        first = pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        pyro.sample("z", dist.Normal(first, 1.0))


def factored(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("penalty", torch.zeros(len(x)))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def subsampled(x):
    with pyro.plate("data", 10, subsample_size=len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def unplated(x):
    pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1), obs=x)


ERRORS = {
    "latent depends on x": (shifted, NotImplementedError, "latent site among"),
    "factor": (factored, NotImplementedError, 'at site "penalty"'),
    "scale": (subsampled, NotImplementedError, 'at site "z": the scale is'),
    "no plate": (unplated, ValueError, 'at site "z": expected a plate of size 4'),
    "no latent": (
        lambda: pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(())),
        ValueError,
        "no latent site",
    ),
    "no observed": (lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), ValueError, "mark them with"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_models_that_have_no_pairs(name):
    model, error, message = ERRORS[name]
    guide = lambda x: dist.Normal(x, 1.0)
    with pytest.raises(error, match=message):
        mi.BarberAgakov(model, guide).estimate(torch.zeros(4), torch.zeros(4))


def test_errors_say_what_is_missing():
    x, z = JOINT.sample(8)
    critic = mi.SeparableCritic(3, 2, [4])
    with pytest.raises(ValueError, match=r"needs the full joint p.x, z., but only the joint samp"):
        mi.IWAE(None, factory)
    with pytest.raises(ValueError, match=r"needs the full joint p.x, z., but only the marginal"):
        mi.StructuredInfoNCE(JOINT.prior)
    with pytest.raises(ValueError, match="has no model to simulate pairs from"):
        mi.InfoNCE(critic).estimate(num_pairs=5)
    with pytest.raises(ValueError, match="from a prior alone"):
        mi.GIWAE(JOINT.prior, factory, critic).estimate(num_pairs=5)
    with pytest.raises(ValueError, match="example=x"):
        mi.IWAE(row_model, row_guide).estimate(num_pairs=5)
    with pytest.raises(ValueError, match="same number N >= 1 of pairs"):
        mi.InfoNCE(critic).estimate(x, z[:3])
    with pytest.raises(ValueError, match="8 pairs offers 7 negatives, but 9"):
        mi.InfoNCE(critic, 10).estimate(x, z)
    with pytest.raises(ValueError, match="must be given where negatives are drawn"):
        mi.MINE_F(critic, model=JOINT)
    with pytest.raises(ValueError, match="needs 3 exact posterior samples"):
        mi.RIWAE(JOINT, factory, 4)
    with pytest.raises(ValueError, match="nothing to learn"):
        mi.StructuredInfoNCE(JOINT).loss(x, z)
    with pytest.raises(ValueError, match=r"batch shape \[8, 2\], expected \[N=8\]"):
        mi.BarberAgakov(JOINT, lambda x: dist.Normal(x @ W, 1.0)).estimate(x, z)
    with pytest.raises(ValueError, match="prior has batch shape"):
        mi.DistributionJoint(dist.Normal(torch.zeros(2), 1.0))
    with pytest.raises(ValueError, match="must return a distribution"):
        mi.BarberAgakov(JOINT, lambda x: x).estimate(x, z)
    with pytest.raises(ValueError, match="guide and model disagree on latent sites"):
        mi.IWAE(mi.PyroJoint(lambda x: shifted_names(x)), row_guide).estimate(x, z)
    with pytest.raises(ValueError, match="critic returned scores of shape"):
        mi.GIWAE(JOINT, factory, lambda x, z: x.sum(-1)).estimate(x, z)


def shifted_names(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("other", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ W.mT, 0.7).to_event(1), obs=x)


def test_discrete_guide_cannot_be_trained_through_its_samples():
    logits = nn.Parameter(torch.zeros(4))
    guide = lambda x: dist.Categorical(logits=logits.expand(len(x), 4))
    prior = dist.Categorical(torch.ones(4))
    x, z = torch.randn(6), torch.randint(4, (6,))
    critic = lambda x, z: x.squeeze(-1) * z.squeeze(-1)
    mi.BarberAgakov(prior, guide).loss(x, z).backward()
    assert logits.grad is not None
    with pytest.raises(NotImplementedError, match="cannot be reparameterized"):
        mi.GIWAE(prior, guide, critic, 3).loss(x, z)


def test_relative_critic_standardizes_z_and_trains_its_guide():
    loc = nn.Parameter(torch.tensor(3.0))
    guide = lambda x: dist.Normal(loc * x, 0.5).to_event(1)
    critic = mi.RelativeCritic(guide, lambda x, z: z.square().sum(-1) + x.sum(-1))
    x, z = torch.randn(4, 2), torch.randn(7, 4, 2)
    expected = ((z - 3.0 * x) / 0.5).square().sum(-1) + x.sum(-1)
    torch.testing.assert_close(critic(x, z), expected)
    critic(x, z).sum().backward()
    assert loc.grad.item() == pytest.approx((-8.0 * x * (z - 3.0 * x)).sum().item())


def train(bound, joint, num_steps, *, batch=128, lr=3e-3):
    optimizer = torch.optim.Adam(bound.parameters(), lr=lr)
    for _ in range(num_steps):
        optimizer.zero_grad()
        bound.loss(*joint.sample(batch)).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["InfoNCE", "MINE_F", "MINE_DV", "GIWAE"])
def test_training_a_critic_closes_most_of_the_gap(kind):
    """Bivariate normal, rho .75 (M07): I = 0.413339."""
    rho, truth = 0.75, 0.413339
    joint = mi.DistributionJoint(
        dist.Normal(0.0, 1.0), lambda z: dist.Normal(rho * z, math.sqrt(1 - rho**2))
    )
    critic = mi.SeparableCritic(1, 1, [32], num_features=8)
    wide = lambda x: dist.Normal(0.5 * x, 1.0)
    bound = {
        "InfoNCE": lambda: mi.InfoNCE(critic),
        "MINE_F": lambda: mi.MINE_F(critic),
        "MINE_DV": lambda: mi.MINE_DV(critic),
        "GIWAE": lambda: mi.GIWAE(joint, wide, critic, 32),
    }[kind]()
    train(bound, joint, 300)
    est = bound.estimate(*joint.sample(4000), batch_size=None if kind == "MINE_DV" else 500)
    value = est.plug_in if est.lower is None else est.lower
    error = est.plug_in_std_error if est.lower is None else est.lower_std_error
    assert truth - 0.05 - 5 * error < value < truth + 5 * error


def test_first_example_of_the_guide_runs():
    page = (Path(__file__).parents[2] / "docs" / "mi.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    scope: dict = {}
    exec(code, scope)  # the page's own words
    low, high = scope["est"].normal_interval(0.9999)
    weights = scope["W"]
    truth = 0.5 * torch.logdet(torch.eye(10) + weights.T @ weights)
    assert low < truth < high


def test_critics_of_wrong_shape_and_nan_are_named():
    joint = mi.DistributionJoint(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 0.5))

    def posterior(x):
        return dist.Normal(0.8 * x, 0.45)

    x, z = joint.sample(30)
    wide = mi.MINEAIS(joint, posterior, lambda x, z: x * z, num_chains=4, num_steps=3)
    with pytest.raises(ValueError, match="critic returned scores of shape"):
        wide.estimate(x, z)
    undefined = mi.GIWAE(joint, posterior, lambda x, z: (z - 99.0).log().squeeze(-1), 5)
    (found,) = undefined.estimate(x, z).diagnostics
    assert (found.name, found.severity, found.value) == ("critic", "warning", 30.0)
    assert "30 of 30 pairs are NaN" in found.message
