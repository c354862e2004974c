"""Guides that derive latents from auxiliary sites: runs and annealed losses from them are right."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.easyguide import EasyGuide
from pyro.infer import SVI, Trace_ELBO, autoguide
from pyro.optim import Adam

from pyro_anneal import AnnealedImportance
from pyro_anneal.losses import AIWAE, IWAE, TVO, DifferentiableAIS

pytestmark = pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")  # poor guides

X = torch.tensor(0.5, dtype=torch.float64)


def scale_model(x):
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    pyro.sample("x", dist.Normal(0.0, s), obs=x)


def scale_evidence(x):
    u = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    values = dist.Normal(0.0, 1.0).log_prob(u) + dist.Normal(0.0, u.exp()).log_prob(x)
    return float(torch.trapezoid(values.exp(), u).log())


def scale_guide(x):
    loc = pyro.param("loc", torch.tensor(-0.2))
    u = pyro.sample("u", dist.Normal(loc, 0.8), infer={"is_auxiliary": True})
    pyro.sample("s", dist.Delta(u.exp(), log_density=-u))


def annealed(model, guide, **options):
    settings = {"num_chains": 64, "num_steps": 30, "seed": 0, "progress_bar": False}
    return AnnealedImportance(model, guide, **(settings | options))


def test_an_auxiliary_site_and_a_delta_with_its_jacobian():
    truth = scale_evidence(X)
    assert truth == pytest.approx(-1.273, abs=1e-3)
    run = annealed(scale_model, scale_guide).run(X)
    assert abs(float(run.lower) - truth) < 5 * float(run.std_error) + 1e-3
    assert set(run.posterior) == {"s"} == set(run.site_plates)
    assert bool((run.posterior["s"] > 0).all())
    assert set(run.observed) == {"x"}
    assert not any("normalizer" in note for note in run.notes)


def test_chains_that_would_have_to_start_from_latents_are_refused():
    ais = annealed(scale_model, scale_guide, num_steps=3)
    with pytest.raises(ValueError, match="density at given latents is not known"):
        ais.sandwich(X, num_simulations=2)
    with pytest.raises(ValueError, match="density at given latents is not known"):
        ais.run_reverse({"s": torch.ones(4)}, X)
    with pytest.raises(ValueError, match="leave prior_weight out"):
        annealed(scale_model, scale_guide, prior_weight=0.1).run(X)


def test_a_wrong_jacobian_is_found():
    def guide(x):
        u = pyro.sample("u", dist.Normal(-0.2, 0.8), infer={"is_auxiliary": True})
        pyro.sample("s", dist.Delta(u.exp(), log_density=u))

    with pytest.raises(ValueError, match="not minus the log-Jacobian"):
        annealed(scale_model, guide).run(X)


def test_more_auxiliary_numbers_than_latents_are_refused():
    def guide(x):
        u = pyro.sample("u", dist.Normal(torch.zeros(2), 0.8).to_event(1))
        pyro.sample("s", dist.Delta(u.sum().exp(), log_density=-u.sum()))

    with pytest.raises(ValueError, match=r"derives 1 unconstrained numbers .* from 2"):
        annealed(scale_model, guide).run(X)


def hierarchy(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(mu, tau))
        pyro.sample("x", dist.Normal(z, 0.7), obs=x)


DATA = torch.tensor([0.4, 1.9, -0.3], dtype=torch.float64)


def hierarchy_evidence(x):
    """Quadrature over mu and log tau; z is integrated in closed form."""
    mu = torch.linspace(-14, 14, 561, dtype=torch.float64)[:, None]
    u = torch.linspace(-4, 4, 401, dtype=torch.float64)[None, :]
    spread = (u.exp().square() + 0.49).sqrt()
    value = dist.Normal(0.0, 2.0).log_prob(mu) + dist.Normal(0.0, 0.5).log_prob(u)
    value = value + sum(dist.Normal(mu, spread).log_prob(v) for v in x)
    return float(torch.trapezoid(torch.trapezoid(value.exp(), u[0], dim=1), mu[:, 0]).log())


class Easy(EasyGuide):
    def guide(self, x):
        for name in ("mu", "tau"):
            group = self.group(match=name)
            group.sample(
                f"{name}_aux", dist.Normal(torch.full(group.event_shape, 0.3), 0.8).to_event(1)
            )
        with self.plate("data", 3):
            loc = pyro.param("loc", 0.5 * x)
            pyro.sample("z", dist.Normal(loc, 0.6))


def flow(x):
    auxiliary = {"is_auxiliary": True}
    u = pyro.sample("u", dist.Normal(torch.zeros(5), 0.7).to_event(1), infer=auxiliary)
    v = 0.5 * u + 0.4 * u.cumsum(-1)  # triangular: its log-Jacobian is that of the diagonal
    log_det = 5 * torch.log(torch.tensor(0.9))
    pyro.sample("mu", dist.Delta(v[0], log_density=-log_det))
    pyro.sample("tau", dist.Delta(v[1].exp(), log_density=-v[1]))
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Delta(v[2:]))


GUIDES = {
    "easy": lambda: Easy(hierarchy),
    "flow": lambda: flow,
    "gaussian": lambda: autoguide.AutoGaussian(hierarchy, init_scale=0.5),
    "structured": lambda: autoguide.AutoStructured(hierarchy, init_scale=0.5),
}


@pytest.mark.parametrize("name", GUIDES)
def test_guides_of_a_hierarchy(name):
    truth = hierarchy_evidence(DATA)
    run = annealed(hierarchy, GUIDES[name](), num_steps=60).run(DATA)
    assert abs(float(run.lower) - truth) < 5 * float(run.std_error) + 0.01
    assert set(run.posterior) == {"mu", "tau", "z"}
    assert run.posterior["z"].shape == (64, 3)
    assert run.site_plates["z"] == ("data",)


def test_a_trained_gaussian_guide_gives_a_tight_bound():
    guide = autoguide.AutoGaussian(hierarchy)
    svi = SVI(hierarchy, guide, Adam({"lr": 0.03}), Trace_ELBO())
    for _ in range(200):
        svi.step(DATA)
    run = annealed(hierarchy, guide, num_steps=20).run(DATA)
    assert float(run.std_error) < 0.2
    assert abs(float(run.lower) - hierarchy_evidence(DATA)) < 5 * float(run.std_error) + 0.01


@pytest.mark.parametrize("vectorize", [False, True])
def test_annealed_losses_move_auxiliary_sites(vectorize):
    truth = scale_evidence(X)
    options = {"vectorize_particles": vectorize, "max_plate_nesting": 1} if vectorize else {}
    for loss in (AIWAE(16, num_steps=4, **options), DifferentiableAIS(16, num_steps=4, **options)):
        values = torch.tensor([loss.loss_and_grads(scale_model, scale_guide, X) for _ in range(8)])
        error = float(values.std()) / 8**0.5
        assert -truth - 5 * error - 0.02 < float(values.mean()) < -truth + 0.3
        assert bool(pyro.param("loc").grad.isfinite())


@pytest.mark.parametrize(
    "name",
    [
        "flow",
        "gaussian",
        pytest.param("easy", marks=pytest.mark.slow),
        pytest.param("structured", marks=pytest.mark.slow),
    ],
)
def test_losses_take_these_guides(name):
    guide = GUIDES[name]()
    losses = [
        IWAE(4),
        TVO(4, gradient="reparam"),
        AIWAE(4, num_steps=2),
        DifferentiableAIS(2, num_steps=2),
    ]
    for loss in losses:
        value = loss.loss_and_grads(hierarchy, guide, DATA)
        assert -hierarchy_evidence(DATA) - 3.0 < value < 60.0
