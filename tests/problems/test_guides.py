"""Every kind of guide: its density over u by quadrature and against its own trace, its errors."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from integrals import integrate
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, autoguide
from pyro.optim import Adam
from scipy import stats
from torch import nn

from pyro_anneal import AnnealedImportance
from pyro_anneal.models.inspection import inspect_model
from pyro_anneal.problems.bases import GuideBase, ModelDensity
from pyro_anneal.problems.problem import prepare

X = torch.tensor([0.4, 1.9, -0.3], dtype=torch.float64)


def model(x):
    """Two latents of different supports: D = 2."""
    a = pyro.sample("a", dist.Gamma(3.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.5, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(b, a), obs=x)


def local_model(x):
    """The same per datum."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Gamma(3.0, 2.0))
        b = pyro.sample("b", dist.Normal(0.5, 1.0))
        pyro.sample("x", dist.Normal(b, a), obs=x)


def jolt(guide, *args):
    """Moves an AutoGuide's parameters away from their symmetric start."""
    guide(*args)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return guide


def laplace(x):
    guide = autoguide.AutoLaplaceApproximation(model)
    svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(40):
        svi.step(x)
    return guide.laplace_approximation(x)


def guide_list(x):
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoNormal(poutine.block(model, expose=["a"]), init_scale=0.6))
    guide.append(
        autoguide.AutoMultivariateNormal(poutine.block(model, expose=["b"]), init_scale=0.6)
    )
    return jolt(guide, x)


def guide_list_with_callable(x):
    def by_hand(x):
        pyro.sample("b", dist.StudentT(6.0, x.mean(), 0.8))

    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoDiagonalNormal(poutine.block(model, expose=["a"]), init_scale=0.6))
    guide.append(by_hand)
    return jolt(guide, x)


def flow(x):
    def transforms(latent_dim):
        return dist.transforms.affine_coupling(latent_dim, hidden_dims=[8])

    return jolt(autoguide.AutoNormalizingFlow(model, transforms), x)


def messenger(x):
    guide = autoguide.AutoNormalMessenger(model, init_scale=0.6)
    guide(x)
    return guide


def by_hand(x):
    def guide(x):
        b = pyro.sample("b", dist.Normal(x.mean(), 0.7))
        pyro.sample("a", dist.LogNormal(0.2 * b, 0.5).mask(False))  # a mask must not matter
        pyro.deterministic("note", b)

    return guide


def auto(kind, **options):
    def make(x):
        return jolt(kind(model, **options), x)

    make.__name__ = kind.__name__
    return make


GUIDES = [
    by_hand,
    auto(autoguide.AutoNormal, init_scale=0.6),
    auto(autoguide.AutoDiagonalNormal, init_scale=0.6),
    auto(autoguide.AutoMultivariateNormal, init_scale=0.6),
    auto(autoguide.AutoLowRankMultivariateNormal, rank=1, init_scale=0.6),
    auto(autoguide.AutoIAFNormal, hidden_dim=[8]),
    flow,
    laplace,
    messenger,
    guide_list,
    guide_list_with_callable,
]
each_guide = pytest.mark.parametrize("make", GUIDES, ids=lambda make: make.__name__)


def base_of(model, guide, x):
    arguments = ((x,), {})
    layout = inspect_model(model, guide, arguments, arguments)
    density = ModelDensity(model, layout, arguments)
    return GuideBase(guide, density, arguments)


@each_guide
def test_guide_is_normalized_over_u(make):
    guide = make(X)
    arguments = ((X,), {})
    made = prepare(
        model,
        guide,
        arguments,
        arguments,
        num_chains=8,
        batch_plates="auto",
        compile=False,
        seed=0,
    )
    assert made.density.mode == "graph"
    radius, points = (42.0, 701) if make.__name__ == "AutoIAFNormal" else (14.0, 101)  # long tails
    log_base, _ = integrate(made.density, made.layout, radius, points)
    torch.testing.assert_close(log_base, torch.zeros(()), rtol=0, atol=2e-4)


@each_guide
def test_density_is_that_of_the_guides_trace(make):
    guide = make(X)
    base = base_of(model, guide, X)
    for _ in range(3):
        trace = poutine.trace(guide).get_trace(X)
        values = {name: trace.nodes[name]["value"] for name in ("a", "b")}
        position = base.model.pack(values)
        evaluation = base.model.evaluate(position)
        trace.compute_log_prob()
        # AutoGuides' Delta sites subtract the Jacobian; hand-written sites are densities of z.
        expected = evaluation.total_log_det
        for site in trace.nodes.values():
            if site["type"] == "sample" and not site["is_observed"]:
                expected = expected + site["unscaled_log_prob"]
        if make is by_hand:  # whose mask hides a's density from the trace
            a = dist.LogNormal(0.2 * values["b"], 0.5)
            expected = expected + a.log_prob(values["a"])
        torch.testing.assert_close(base.log_prob(evaluation, position), expected)


@pytest.mark.parametrize(
    "make",
    [
        make
        if make in (by_hand, flow, guide_list) or "Multivariate" in make.__name__
        else pytest.param(make, marks=pytest.mark.slow)
        for make in GUIDES
    ],
    ids=lambda make: make.__name__,
)
def test_draws_follow_the_density(make):
    base = base_of(model, make(X), X)
    with torch.no_grad():
        u = torch.stack([base.draw() for _ in range(300)])
        log_base = torch.stack([base.log_prob(base.model.evaluate(v), v) for v in u])
    # Under q, E[n(u) / q(u)] = 1 for any density n, here a narrow normal at the draws' centre.
    narrow = dist.Normal(u.mean(0), 0.5 * u.std(0)).to_event(1)
    ratio = (narrow.log_prob(u) - log_base).exp()
    error = ratio.std() / math.sqrt(len(ratio))
    assert error < 0.3
    assert abs(ratio.mean() - 1.0) <= 5.0 * error


def amortized(x):
    """Own plate at another dim: the event dimension of the model's site is a plate here."""
    with pyro.plate("data", len(x), dim=-2), pyro.plate("entries", 2, dim=-1):
        pyro.sample("z", dist.Normal(0.45 * x[:, :2], 0.8))


def vector_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def test_guide_with_plates_at_other_dims_keeps_the_batch():
    x = torch.tensor([[0.4, 1.0], [-0.3, 0.2], [2.0, 0.1]])
    arguments = ((x,), {})
    layout = inspect_model(vector_model, amortized, arguments, arguments)
    assert [(p.name, p.dim, p.guide_dim) for p in layout.batch] == [("data", -1, -2)]
    base = base_of(vector_model, amortized, x)
    u = torch.randn(3, 2)
    evaluation = base.model.evaluate(u)
    expected = stats.norm(0.45 * x, 0.8).logpdf(u).sum(1)
    torch.testing.assert_close(base.log_prob(evaluation, u), torch.as_tensor(expected))


def test_amortized_module_gives_exact_evidence():
    encoder = nn.Linear(2, 2).double()
    with torch.no_grad():
        encoder.weight.copy_(0.5 * torch.eye(2))
        encoder.bias.zero_()

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), math.sqrt(0.5)).to_event(1))

    x = torch.tensor([[0.4, 1.0], [-0.3, 0.2], [2.0, 0.1]])
    ais = AnnealedImportance(vector_model, guide, num_chains=2, num_steps=1, progress_bar=False)
    truth = torch.as_tensor(stats.norm(0.0, math.sqrt(2.0)).logpdf(x).sum(1))
    # The guide is the posterior: every log-weight equals the log evidence.
    log_weights = ais.run(x).log_weights
    torch.testing.assert_close(log_weights, truth.expand(2, 3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [autoguide.AutoNormal, autoguide.AutoDiagonalNormal])
def test_autoguides_of_local_latents(kind):
    guide = jolt(kind(local_model), X)
    arguments = ((X,), {})
    layout = inspect_model(local_model, guide, arguments, arguments)
    # AutoNormal keeps the plates, the joint guides do not.
    assert tuple(layout.batch_shape) == ((3,) if kind is autoguide.AutoNormal else ())
    base = base_of(local_model, guide, X)
    trace = poutine.trace(guide).get_trace(X)
    u = base.model.pack({name: trace.nodes[name]["value"] for name in ("a", "b")})
    evaluation = base.model.evaluate(u)
    expected = trace.log_prob_sum() + evaluation.total_log_det.sum()
    torch.testing.assert_close(base.log_prob(evaluation, u).sum(), expected)


def test_autoguide_prototype_is_set_up_on_demand():
    guide = autoguide.AutoNormal(model)
    run = AnnealedImportance(model, guide, num_chains=4, num_steps=1, progress_bar=False).run(X)
    assert run.log_weights.isfinite().all()


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")  # of the empty chains
def test_wider_support_of_the_guide_only_costs_weights():
    """A normal guide of a positive latent: the draws below zero have weight zero, none is redrawn."""

    def half(x):
        z = pyro.sample("z", dist.HalfNormal(1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(0.3, 1.0))

    x = torch.tensor(0.5)
    truth = math.log(2.0) + stats.norm(0.0, math.sqrt(2.0)).logpdf(0.5)
    truth += stats.norm.logcdf(0.25 * math.sqrt(2.0))  # z given x is N(0.25, 1/2) above zero
    for num_steps in (1, 6):
        ais = AnnealedImportance(
            half, guide, num_chains=2000, num_steps=num_steps, progress_bar=False, seed=2
        )
        run = ais.run(x)
        empty = (run.log_weights == -torch.inf).double().mean()
        below = stats.norm(0.3, 1.0).cdf(0.0)
        assert abs(empty - below) < 5 * math.sqrt(below * (1 - below) / 2000)
        assert abs(run.lower - truth) <= 5.0 * run.std_error
        assert run.std_error < 0.05


# ---- errors


def check_error(guide, message, model=model, x=X):
    with pytest.raises(ValueError, match=message):
        AnnealedImportance(model, guide, num_chains=4, num_steps=2, progress_bar=False).run(x)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (autoguide.AutoDelta, "AutoDelta has no density to anneal from"),
        (autoguide.AutoLaplaceApproximation, r"laplace_approximation\(\*args\)"),
    ],
)
def test_guides_without_density_raise(kind, message):
    check_error(kind(model), message)


def test_list_with_a_point_mass_raises():
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoNormal(poutine.block(model, expose=["a"])))
    guide.append(autoguide.AutoDelta(poutine.block(model, expose=["b"])))
    check_error(guide, "AutoDelta has no density")


def test_hand_written_delta_raises():
    def guide(x):
        pyro.sample("a", dist.Gamma(3.0, 2.0))
        pyro.sample("b", dist.Delta(pyro.param("b_map", lambda: torch.zeros(()))))

    check_error(guide, "a point mass, or an auxiliary number")


def test_missing_and_surplus_sites_raise():
    def guide(x):
        pyro.sample("a", dist.Gamma(3.0, 2.0))
        pyro.sample("c", dist.Normal(0.0, 1.0))

    check_error(
        guide, r"without a guide: \['b'\]; sites of the guide that the model lacks: \['c'\]"
    )


def test_guide_that_samples_data_raises():
    def guide(x):
        pyro.sample("a", dist.Gamma(3.0, 2.0))
        pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0))

    check_error(guide, r"sites of the guide that the model observes: \['x'\]")


def test_auxiliary_site_of_a_hand_written_guide_raises():
    """Its density would have to be integrated out; sampled anew per call it gave random numbers."""

    def guide(x):
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("a", dist.LogNormal(noise, 1.0))
        pyro.sample("b", dist.Normal(noise, 1.0))

    check_error(guide, r"auxiliary sites \['noise'\]")


def test_shape_mismatch_raises():
    def guide(x):
        pyro.sample("a", dist.Gamma(3.0, 2.0))
        pyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    check_error(guide, r'at site "b" the guide draws shape \[2\], the model expects \[\]')


def test_narrower_support_of_the_guide_raises():
    def guide(x):
        pyro.sample("a", dist.Gamma(3.0, 2.0))
        pyro.sample("b", dist.HalfNormal(1.0))

    check_error(guide, r'at site "b" the guide \(HalfNormal.*no density at values that the model')


def test_autoguide_with_a_moving_support_raises():
    def moving(x):
        top = pyro.sample("top", dist.Gamma(3.0, 2.0))
        z = pyro.sample("z", dist.Uniform(torch.zeros(()), top))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    check_error(
        autoguide.AutoNormal(moving), "freezes the supports", model=moving, x=torch.tensor(0.8)
    )


def test_unknown_guide_raises():
    check_error("foo", "guide must be a Pyro guide, \"auto\" or None, got 'foo'")
    check_error(3, 'guide must be a Pyro guide, "auto" or None, got 3')


# ---- guides that draw what the model enumerates


def labelled(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(2.0 * k, 1.0))
        pyro.sample("x", dist.Normal(z, 0.7), obs=x)


def labelling(x):
    loc = torch.tensor([0.1, 1.2])
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(torch.sigmoid(x - 1.0)))
        pyro.sample("z", dist.Normal(loc[k.long()] + 0.2 * x, 0.8))


@pytest.mark.parametrize("marked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_guides_that_draw_enumerated_sites_are_summed_over_them(marked):
    x = torch.tensor([0.5, 2.0, -1.0])
    wide = (1.0 + 0.49) ** 0.5
    truth = torch.logsumexp(
        torch.stack(
            [
                math.log(0.7) + dist.Normal(0.0, wide).log_prob(x),
                math.log(0.3) + dist.Normal(2.0, wide).log_prob(x),
            ]
        ),
        0,
    )
    guide = pyro.infer.config_enumerate(labelling) if marked else labelling
    for num_steps in (1, 10):
        options = {"num_chains": 400, "num_steps": num_steps, "progress_bar": False, "seed": 1}
        run = AnnealedImportance(labelled, guide, **options).run(x)
        assert bool(((run.lower - truth).abs() < 5 * run.std_error + 1e-3).all())
    sandwich = AnnealedImportance(labelled, guide, num_chains=50, num_steps=10, progress_bar=False)
    assert bool(sandwich.sandwich(x, num_simulations=2).gap.isfinite().all())
