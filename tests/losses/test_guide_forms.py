"""Models and guides of unusual form in losses: observed guide sites, enumeration, markov, Deltas."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, autoguide, config_enumerate

from pyro_anneal.losses import AIWAE, EUBO, IWAE, TVO, DifferentiableAIS

X = torch.tensor(0.5, dtype=torch.float64)
LOG_P = float(dist.Normal(0.0, 2.0**0.5).log_prob(torch.tensor(0.5, dtype=torch.float64)))


def conjugate(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_with_narrow_observation(x):
    pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
    pyro.sample("aux", dist.Normal(1.0, 1e-3), obs=x, infer={"is_auxiliary": True})


def guide_with_discrete_observation(x):
    p = pyro.param("p", torch.tensor(0.3))
    pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
    pyro.sample("b", dist.Bernoulli(p), obs=torch.tensor(1.0), infer={"is_auxiliary": True})


LOSSES = {
    "iwae": lambda: IWAE(5),
    "reparam": lambda: IWAE(4, gradient="reparam"),
    "dreg": lambda: IWAE(4, gradient="dreg"),
    "single": lambda: IWAE(1),
    "tvo": lambda: TVO(10),
    "aiwae": lambda: AIWAE(4, num_steps=2),
    "differentiable": lambda: DifferentiableAIS(4, num_steps=2),
}
EXACT = {"iwae", "reparam", "dreg", "single", "tvo"}  # every weight is the evidence


@pytest.mark.filterwarnings("ignore:Found auxiliary vars")
@pytest.mark.parametrize("guide", [guide_with_narrow_observation, guide_with_discrete_observation])
@pytest.mark.parametrize("name", LOSSES)
def test_observed_sites_of_a_guide_are_no_part_of_its_density(name, guide):
    loss = LOSSES[name]().loss_and_grads(conjugate, guide, X)
    if name in EXACT:
        assert loss == pytest.approx(-LOG_P, abs=1e-6)
    elif name == "aiwae":
        assert loss == pytest.approx(-LOG_P, abs=1e-6)  # the base is the posterior
    else:  # Langevin steps without correction lose some
        assert -LOG_P - 0.2 < loss < -LOG_P + 1.0
    assert EUBO(5).loss(conjugate, guide, X) == pytest.approx(LOG_P, abs=1e-6)


def markov_beside_enumerated():
    s = pyro.sample("phi_0", dist.Normal(0.0, 1.0))
    z = torch.tensor(0.0)
    for t in pyro.markov(range(3)):
        a = pyro.sample(f"phi_{t + 1}", dist.Normal(s, 1.0))
        z = pyro.sample(
            f"z_{t}", dist.Bernoulli(torch.sigmoid(a + z)), infer={"enumerate": "parallel"}
        )
        pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=X)


def fixed_phi():
    for t in range(4):
        pyro.sample(f"phi_{t}", dist.Normal(0.2 * t, 1e-7))


def evidence_at_fixed_phi():
    """Sums over the 8 paths at phi_t = 0.2 t, where the guide above almost always draws."""
    phi = [0.2 * t for t in range(4)]
    prior = dist.Normal(0.0, 1.0).log_prob(torch.tensor(phi)).sum()
    prior = dist.Normal(0.0, 1.0).log_prob(torch.tensor(phi[0])) + sum(
        dist.Normal(phi[0], 1.0).log_prob(torch.tensor(phi[t])) for t in (1, 2, 3)
    )
    total = 0.0
    for path in range(8):
        before, log_p = 0.0, 0.0
        for t in range(3):
            z = (path >> t) & 1
            p = 1.0 / (1.0 + math.exp(-(phi[t + 1] + before)))
            log_p += math.log(p if z else 1.0 - p)
            log_p += float(dist.Normal(float(z), 1.0).log_prob(X))
            before = z
        total += math.exp(log_p)
    return float(prior) + math.log(total)


MARKOV = {
    "iwae": lambda: IWAE(5),
    "vectorized": lambda: IWAE(5, vectorize_particles=True, max_plate_nesting=1),
    "single": lambda: IWAE(1),
    "tvo": lambda: TVO(5),
    "eubo": lambda: EUBO(5),
}


@pytest.mark.parametrize("name", MARKOV)
def test_markov_contexts_beside_enumerated_sites(name):
    loss = MARKOV[name]().loss_and_grads(markov_beside_enumerated, fixed_phi)
    log_q = 4 * float(dist.Normal(0.0, 1e-7).log_prob(torch.tensor(0.0)))  # less the noise below
    expected = evidence_at_fixed_phi() - log_q
    # log q of a draw is lower than at its centre by half a chi-square of 4: between 0 and 15 or so
    sign = 1.0 if name == "eubo" else -1.0
    assert expected < sign * loss < expected + 15.0


@pytest.mark.parametrize("loss", [AIWAE(3, num_steps=2), DifferentiableAIS(3, num_steps=2)])
def test_markov_contexts_in_annealed_losses(loss):
    guide = autoguide.AutoNormal(
        poutine.block(markov_beside_enumerated, hide_fn=lambda s: s["name"].startswith("z"))
    )
    value = loss.loss_and_grads(markov_beside_enumerated, guide)
    reference = sum(
        TraceEnum_ELBO(max_plate_nesting=0).loss(markov_beside_enumerated, guide)
        for _ in range(50)
    )
    assert value < reference / 50 + 2.0  # an annealed bound is no worse than the ELBO, by much


def mixture(x):
    k = pyro.sample("k", dist.Bernoulli(0.3))
    z = pyro.sample("z", dist.Normal(2.0 * k, 1.0))
    pyro.sample("x", dist.Normal(z, 0.7), obs=x)


def mixture_guide(x):
    p = pyro.param("p", torch.tensor(0.6))
    loc = pyro.param("loc", torch.tensor([0.1, 1.2]))
    k = pyro.sample("k", dist.Bernoulli(p))
    pyro.sample("z", dist.Normal(loc[k.long()], 0.6))


def mixture_evidence():
    wide = (1.0 + 0.49) ** 0.5
    terms = [
        0.7 * dist.Normal(0.0, wide).log_prob(X).exp(),
        0.3 * dist.Normal(2.0, wide).log_prob(X).exp(),
    ]
    return float((terms[0] + terms[1]).log())


def test_one_particle_takes_the_expectation_over_enumerated_guide_sites():
    model, guide = config_enumerate(mixture), config_enumerate(mixture_guide)
    ours, theirs = IWAE(1), TraceEnum_ELBO(max_plate_nesting=0)
    values = {}
    for name, loss in {"ours": ours, "theirs": theirs}.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(7)
        # the reference skips the run that shows which sites are marked
        if name == "theirs":
            pyro.set_rng_seed(7)
        total = torch.tensor([loss.loss(model, guide, X) for _ in range(150)])
        pyro.set_rng_seed(3)
        grads = []
        for _ in range(150):
            for p in pyro.get_param_store().values():
                p.grad = None
            loss.loss_and_grads(model, guide, X)
            grads.append(pyro.param("p").unconstrained().grad.clone())
        grads = torch.stack(grads)
        values[name] = (total, grads)
    for a, b in zip(*values.values(), strict=True):
        error = (a.var() / len(a) + b.var() / len(b)).sqrt()
        assert (a.mean() - b.mean()).abs() < 5 * error


@pytest.mark.parametrize("marked", ["both", "guide", "model"])
@pytest.mark.parametrize("vectorize", [False, True])
def test_several_particles_sample_the_sites_that_a_guide_enumerates(marked, vectorize):
    model = config_enumerate(mixture) if marked != "guide" else mixture
    guide = config_enumerate(mixture_guide) if marked != "model" else mixture_guide
    loss = IWAE(2000, vectorize_particles=vectorize, max_plate_nesting=1)
    if not vectorize:
        loss = IWAE(400)
    values = torch.tensor([loss.loss(model, guide, X) for _ in range(4)]).neg().exp()
    error = values.std() / 2 + 0.01 * values.mean()
    assert (values.mean() - math.exp(mixture_evidence())).abs() < 5 * error
    assert math.isfinite(TVO(5).loss_and_grads(model, guide, X))
    assert math.isfinite(EUBO(5).loss_and_grads(model, guide, X))
    assert math.isfinite(IWAE(5, gradient="vimco").loss_and_grads(model, guide, X))


def with_point(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    d = pyro.sample("d", dist.Delta(2.0 * z))
    pyro.sample("x", dist.Normal(d, 1.0), obs=x)


@pytest.mark.parametrize("name", LOSSES)
def test_a_point_mass_of_the_model_is_a_value(name):
    def guide(x):
        pyro.sample("z", dist.Normal(2.0 * x / 5.0, 0.2**0.5))

    truth = float(dist.Normal(0.0, 5.0**0.5).log_prob(X))
    loss = LOSSES[name]().loss_and_grads(with_point, guide, X)
    tolerance = 1e-6 if name != "differentiable" else 1.0
    assert loss == pytest.approx(-truth, abs=tolerance)


def test_a_point_mass_that_the_guide_draws_stays_a_density():
    def model(x):
        z = pyro.sample("z", dist.Delta(torch.tensor(1.0)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Delta(torch.tensor(2.0)))

    assert IWAE(1).loss(model, guide, X) == math.inf == Trace_ELBO().loss(model, guide, X)


def sizeless(x):
    with pyro.plate("data"):
        z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("name", [*LOSSES, "vectorized"])
def test_a_plate_without_a_size_has_that_of_its_sites(name):
    x = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])

    def guide(x):
        with pyro.plate("data"):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    truth = float(dist.Normal(0.0, 2.0**0.5).log_prob(x).sum())
    make = LOSSES.get(name, lambda: IWAE(5, vectorize_particles=True, max_plate_nesting=2))
    loss = make().loss_and_grads(sizeless, guide, x)
    assert loss == pytest.approx(-truth, abs=1e-6 if name != "differentiable" else 2.0)


def undeclared(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("name", LOSSES)
def test_axes_that_no_plate_declares_are_summed(name):
    x = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])

    def guide(x):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    truth = float(dist.Normal(0.0, 2.0**0.5).log_prob(x).sum())
    with pytest.warns(UserWarning, match=r"belong to no plate are summed: \[-1\] of site \"z\""):
        loss = LOSSES[name]().loss_and_grads(undeclared, guide, x)
    assert loss == pytest.approx(-truth, abs=1e-5 if name != "differentiable" else 2.0)


def test_value_and_distribution_that_spread_each_other_are_refused():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z * torch.ones(5), 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r'at site "x": log_prob has shape .* spread each other'):
        IWAE(2).loss(model, guide, torch.zeros(5, 1))


def test_axes_that_are_not_those_of_a_sites_plates_are_refused_as_by_pyro():
    def model():
        with pyro.plate("outer", 5):
            pyro.sample("x", dist.Normal(torch.zeros(5, 1), 1.0))  # [5, 5] in the plate

    with pytest.raises(ValueError, match="invalid log_prob shape"):
        IWAE(2).loss(model, model)
