"""Supports that are worked out, not believed: periods, images, mixtures, matrices, flat priors."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal
from pyro.infer.reparam import NeuTraReparam
from scipy import integrate, special, stats

from pyro_anneal import AnnealedImportance
from pyro_anneal.models.coordinates import bijection
from pyro_anneal.models.supports import normalized_support
from pyro_anneal.models.validation import validation_disabled
from pyro_anneal.problems.problem import prepare

NOTHING: tuple = ((), {})

pytestmark = [
    pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning"),
    pytest.mark.filterwarnings("ignore:Singular sample"),  # torch's Wishart
]
T = dist.transforms


def run(model, guide="auto", *, num_chains=64, num_steps=100, seed=0):
    ais = AnnealedImportance(
        model, guide, num_chains=num_chains, num_steps=num_steps, seed=seed, progress_bar=False
    )
    return ais.run()


def one_latent(prior, likelihood, y):
    def model():
        z = pyro.sample("z", prior())
        pyro.sample("y", likelihood(z), obs=torch.tensor(y))

    return model


def quadrature(density, *ranges):
    return math.log(integrate.nquad(density, ranges)[0])


def normal(y, loc, scale):
    return stats.norm.pdf(y, loc, scale)


def circular(z, loc, kappa):
    return math.exp(kappa * math.cos(z - loc)) / (2 * math.pi * special.i0(kappa))


def shifted(loc, scale, base=lambda: dist.Exponential(1.0)):
    return lambda: dist.TransformedDistribution(base(), [T.AffineTransform(loc, scale)])


def near(result, truth, standard_errors=4.0):
    error = float(result.log_evidence) - truth
    return abs(error) <= standard_errors * float(result.std_error) + 0.005


PI = math.pi
around = lambda z: dist.Normal(z, 1.0)
# prior, likelihood, datum, truth by quadrature in the model's own space
CASES = {
    "VonMises, periodic data": (
        lambda: dist.VonMises(0.0, 0.5), lambda z: dist.VonMises(z, 1.0), 3.0,
        quadrature(lambda z: circular(z, 0, 0.5) * circular(3.0, z, 1.0), (-PI, PI)),
    ),
    "VonMises around the cut": (
        lambda: dist.VonMises(3.0, 1.0), around, 3.0,
        quadrature(lambda z: circular(z, 3.0, 1.0) * normal(3.0, z, 1.0), (-PI, PI)),
    ),
    "mixture of VonMises": (
        lambda: dist.MixtureSameFamily(
            dist.Categorical(torch.tensor([1.0, 3.0])),
            dist.VonMises(torch.tensor([-1.0, 1.5]), torch.tensor([2.0, 4.0])),
        ),
        lambda z: dist.Normal(z.sin(), 0.5), 0.4,
        quadrature(
            lambda z: (0.25 * circular(z, -1, 2) + 0.75 * circular(z, 1.5, 4))
            * normal(0.4, math.sin(z), 0.5), (-PI, PI),
        ),
    ),
    "shifted": (shifted(2.0, 1.0), around, 2.5,
        quadrature(lambda z: math.exp(-(z - 2)) * normal(2.5, z, 1.0), (2, np.inf))),
    "reflected": (shifted(2.0, -1.0), around, 2.5,
        quadrature(lambda z: math.exp(z - 2) * normal(2.5, z, 1.0), (-np.inf, 2))),
    "scaled interval": (
        shifted(0.0, 3.0, lambda: dist.Uniform(0.1, 0.9)), around, 1.0,
        quadrature(lambda z: normal(1.0, z, 1.0) / 2.4, (0.3, 2.7))),
    "chain of transforms": (
        lambda: dist.TransformedDistribution(
            dist.Gamma(2.0, 1.0),
            [T.AffineTransform(1.0, 2.0), T.PowerTransform(torch.tensor(0.5)), T.AffineTransform(0.0, -1.0)],
        ), around, -2.0,
        quadrature(lambda g: g * math.exp(-g) * normal(-2.0, -math.sqrt(1 + 2 * g), 1.0), (0, np.inf))),
    "exponential of a bounded base": (
        lambda: dist.TransformedDistribution(dist.Beta(2.0, 3.0), [T.ExpTransform()]), around, 2.5,
        quadrature(lambda b: stats.beta.pdf(b, 2, 3) * normal(2.5, math.exp(b), 1.0), (0, 1))),
    "mixture of normals": (
        lambda: dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([-1.0, 1.0]), 1.0)
        ), around, 0.5,
        math.log(0.5 * normal(0.5, -1, 2**0.5) + 0.5 * normal(0.5, 1, 2**0.5))),
    "mixture of uniforms": (
        lambda: dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2)),
            dist.Uniform(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])),
        ), around, 0.5,
        math.log(
            0.25 * (stats.norm.cdf(1.5) - stats.norm.cdf(-0.5))
            + 0.25 * (stats.norm.cdf(2.5) - stats.norm.cdf(0.5))
        )),
    "ProjectedNormal in the plane": (
        lambda: dist.ProjectedNormal(torch.tensor([1.0, 2.0])), lambda z: dist.Normal(z[0], 0.5), 0.7,
        quadrature(
            lambda r, a: r * normal(r * math.cos(a), 1, 1) * normal(r * math.sin(a), 2, 1)
            * normal(0.7, math.cos(a), 0.5), (0, 12), (-PI, PI))),
    "Wishart": (
        lambda: dist.Wishart(torch.tensor(4.0), torch.eye(2)), lambda z: dist.Normal(z[0, 0], 1.0), 3.0,
        quadrature(lambda z: stats.chi2.pdf(z, 4) * normal(3.0, z, 1.0), (0, np.inf))),
    "ordered by a simplex": (
        lambda: dist.TransformedDistribution(
            dist.Dirichlet(torch.tensor([2.0, 1.0])), [T.SimplexToOrderedTransform()]
        ), lambda z: dist.Normal(z[0], 1.0), -0.5,
        quadrature(lambda b: 2 * b * normal(-0.5, math.log(b / (1 - b)), 1.0), (0, 1))),
    "LKJ": (
        lambda: dist.LKJ(2, torch.tensor(1.5)), lambda z: dist.Normal(z[0, 1], 0.3), 0.9,
        quadrature(lambda r: stats.beta.pdf((1 + r) / 2, 1.5, 1.5) / 2 * normal(0.9, r, 0.3), (-1, 1))),
}  # fmt: skip
if hasattr(dist, "GeneralizedPareto"):
    CASES["GeneralizedPareto"] = (
        lambda: dist.GeneralizedPareto(0.0, 1.0, 0.2), around, 1.0,
        quadrature(lambda z: stats.genpareto.pdf(z, 0.2) * normal(1.0, z, 1.0), (0, np.inf)),
    )  # fmt: skip


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_density_over_u_integrates_to_prior_and_evidence(name):
    """By quadrature in the coordinate itself: no chains, no chance."""
    prior, likelihood, y, truth = CASES[name]
    fn = prior()
    transform = bijection(fn)
    shape = transform.inverse_shape(fn.event_shape)
    if math.prod(shape) != 1:
        pytest.skip("more than one dimension")
    u = torch.linspace(-30.0, 30.0, 12001)
    z = transform(u.reshape(-1, *shape))
    log_det = transform.log_abs_det_jacobian(u.reshape(-1, *shape), z).reshape(-1)
    with validation_disabled():  # as in a run; the parts of a mixture may differ
        log_prior = (fn.log_prob(z).reshape(-1) + log_det).nan_to_num(nan=-torch.inf)
        log_likelihood = torch.vmap(lambda v: likelihood(v).log_prob(torch.tensor(y)))(z)
    width = u[1] - u[0]
    assert float(log_prior.exp().sum() * width) == pytest.approx(1.0, abs=2e-3)
    evidence = ((log_prior + log_likelihood).exp().sum() * width).log()
    assert float(evidence) == pytest.approx(truth, abs=6e-3)  # a jump at the cut


@pytest.mark.parametrize(
    ("name", "guide"),
    [("VonMises around the cut", "auto"), ("reflected", None), ("Wishart", None)],
)
def test_annealed_evidence(name, guide):
    prior, likelihood, y, truth = CASES[name]
    assert near(run(one_latent(prior, likelihood, y), guide, num_steps=50), truth)


@pytest.mark.slow
@pytest.mark.parametrize("guide", ["auto", None])
@pytest.mark.parametrize("name", sorted(CASES))
def test_annealed_evidence_of_all(name, guide):
    prior, likelihood, y, truth = CASES[name]
    assert near(run(one_latent(prior, likelihood, y), guide, num_chains=256), truth)


# Of a narrow likelihood 1/w would rest on one chain in a thousand, and so would its standard error.
BOUNDED = {
    "VonMises around the cut": (
        lambda: dist.VonMises(3.0, 1.0), lambda z: dist.Normal(z, 3.0), 2.0,
        quadrature(lambda z: circular(z, 3.0, 1.0) * normal(2.0, z, 3.0), (-PI, PI)),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["VonMises around the cut", pytest.param("reflected", marks=pytest.mark.slow)]
)
def test_both_identities(name):
    """E[e^L] = Z forward, and E[e^-U] = 1/Z backward from exact posterior draws."""
    prior, likelihood, y, truth = (CASES | BOUNDED)[name]
    model = one_latent(prior, likelihood, y)
    ais = AnnealedImportance(model, None, num_chains=500, num_steps=4, seed=0, progress_bar=False)
    forward = ais.run().log_weights
    relative = (forward - truth).exp()
    assert float(relative.mean()) == pytest.approx(1.0, abs=5 * float(relative.std()) / 500**0.5)
    fn = prior()
    z = fn.sample((200_000,))
    weights = likelihood(z).log_prob(torch.tensor(y)).exp()
    exact = z[torch.multinomial(weights, 500)]  # a large pool: as good as exact
    backward = ais.run_reverse({"z": exact}, exact=True).log_weights
    relative = (truth - backward).exp()
    assert float(relative.mean()) == pytest.approx(1.0, abs=5 * float(relative.std()) / 500**0.5)


def test_images_know_their_members():
    support = normalized_support(shifted(2.0, -1.0)().expand([3]).to_event(1))
    inside = support.check(torch.tensor([[1.0, 0.0, -3.0], [1.0, 0.0, 3.0]]))
    assert inside.tolist() == [True, False]


def test_transforms_that_fill_their_domain_keep_their_declared_support():
    scaled = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [T.AffineTransform(1.0, 2.0)])
    assert normalized_support(scaled) is scaled.support


def test_transforms_that_are_not_one_to_one_are_refused():
    prior = lambda: dist.TransformedDistribution(dist.Normal(0.0, 1.0), [T.AbsTransform()])
    with pytest.raises(ValueError, match=r'"z": AbsTransform is not one to one.*HalfNormal'):
        run(one_latent(prior, around, 1.0))


def test_transforms_that_do_not_say_that_they_are_one_to_one_are_told_how():
    class Doubling(T.Transform):
        domain = codomain = dist.constraints.real

        def _call(self, x):
            return 2.0 * x

        def _inverse(self, y):
            return 0.5 * y

        def log_abs_det_jacobian(self, x, y):
            return torch.full_like(x, math.log(2.0))

    prior = lambda: dist.TransformedDistribution(dist.Exponential(1.0), [Doubling()])
    with pytest.raises(ValueError, match="bijective = True"):
        run(one_latent(prior, around, 1.0))
    Doubling.bijective, Doubling.sign = True, 1
    result = run(one_latent(prior, around, 1.0))
    assert near(result, quadrature(lambda z: math.exp(-z / 2) / 2 * normal(1, z, 1), (0, np.inf)))


def test_transforms_without_an_inverse_are_refused():
    flow = T.planar(2)
    prior = lambda: dist.TransformedDistribution(
        dist.Normal(0.0, 1.0).expand([2]).to_event(1), [flow]
    )
    with pytest.raises(ValueError, match='at site "z": TransformedDistribution'):
        run(one_latent(prior, lambda z: dist.Normal(z.sum(), 1.0), 1.0))


def test_components_of_different_support_are_refused():
    bounds = torch.tensor([1.0, 2.0])
    prior = lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Pareto(bounds, 1.0)
    )
    with pytest.raises(ValueError, match=r'"z": the components .* different supports'):
        run(one_latent(prior, around, 1.0))


def test_matrices_that_round_beyond_the_edge_have_no_finite_coordinate():
    transform = bijection(dist.Wishart(torch.tensor(4.0), torch.eye(2)))
    inside, beyond = torch.eye(2), torch.tensor([[1.0, 1.0 + 1e-12], [1.0 + 1e-12, 1.0]])
    u = transform.inv(torch.stack([inside, beyond]))
    assert u.isnan().all(-1).tolist() == [False, True]


def test_a_density_without_draws_starts_from_a_fit():
    prior = lambda: dist.VonMises3D(torch.tensor([0.5, 1.0, 0.0]))
    model = one_latent(prior, lambda z: dist.Normal(z[0], 1.0), 1.0)
    kappa, mean = 1.25**0.5, np.array([0.5, 1.0, 0.0])

    def density(t, a):
        z = np.array([math.sin(t) * math.cos(a), math.sin(t) * math.sin(a), math.cos(t)])
        constant = kappa / (4 * PI * math.sinh(kappa))
        return math.sin(t) * constant * math.exp(z @ mean) * normal(1.0, z[0], 1.0)

    truth = quadrature(density, (0, PI), (-PI, PI))
    assert near(run(model, num_steps=50), truth)
    with pytest.raises(ValueError, match="has no draws"):
        run(model, None)


# --- mask(False) ---


def flat(mask):
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(mask))
        pyro.factor("prior", dist.Normal(0.0, 2.0).log_prob(z))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


def test_a_masked_latent_is_flat():
    model, x = flat(False), torch.tensor(0.5)
    truth = float(dist.Normal(0.0, 5**0.5).log_prob(x))
    assert truth == pytest.approx(-1.7487, abs=1e-4)

    def guide(x):
        pyro.sample("z", dist.Normal(0.3, 1.2))

    for start in ("auto", guide):
        ais = AnnealedImportance(
            model, start, num_chains=64, num_steps=50, seed=0, progress_bar=False
        )
        result = ais.run(x)
        assert near(result, truth)
        assert any("is improper" in note and "'z'" in note for note in result.notes)
    ais = AnnealedImportance(model, None, num_chains=8, num_steps=5, progress_bar=False)
    with pytest.raises(ValueError, match=r'improper.*mask\(False\).*use guide="auto"'):
        ais.run(x)


@pytest.mark.parametrize("start", ["auto", None])
def test_an_enumerated_site_with_a_flat_prior_is_summed_with_weight_one(start):
    # sir_hmc.py of Pyro's examples: the density of a masked site is written elsewhere.
    probs, x = torch.tensor([0.2, 0.5, 0.3]), torch.tensor(0.5)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        masked = dist.Categorical(torch.tensor([0.7, 0.2, 0.1])).mask(False)
        k = pyro.sample("k", masked, infer={"enumerate": "parallel"})
        pyro.factor("prior", probs[k].log())
        pyro.sample("x", dist.Normal(z + k, 1.0), obs=x)

    each = dist.Normal(torch.arange(3.0), 2**0.5).log_prob(x)
    truth = float(torch.logsumexp(probs.log() + each, 0))
    ais = AnnealedImportance(model, start, num_chains=64, num_steps=50, seed=0, progress_bar=False)
    assert near(ais.run(), truth)


def test_a_context_that_masks_latents_makes_them_flat_too():
    x = torch.tensor([0.5, -1.0, 2.0])

    def model():
        with poutine.mask(mask=False):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    square = float((x - x.mean()).square().sum())
    truth = -math.log(2 * PI) - 0.5 * square - 0.5 * math.log(3)
    assert near(run(model), truth)


def test_masks_of_some_elements_of_a_latent_are_left_out_and_noted():
    def model():
        with pyro.plate("rows", 2):
            with poutine.mask(mask=torch.tensor([True, False])):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor([0.5, 0.7]))

    result = run(model, num_chains=8, num_steps=5)
    truth = dist.Normal(0.0, 2**0.5).log_prob(torch.tensor([0.5, 0.7]))
    torch.testing.assert_close(result.log_evidence, truth, rtol=0, atol=1e-6)
    assert any("masks of latent sites ['z'] are left out" in note for note in result.notes)


def test_scalar_masks_of_missing_data_are_no_flat_priors():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.5), obs_mask=torch.tensor(True))

    result = run(model)
    assert near(result, float(dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(0.5))))
    assert not any("improper" in note for note in result.notes)


def test_neutra():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor(0.5)
    guide = AutoDiagonalNormal(model)
    guide(x)
    warped = NeuTraReparam(guide.requires_grad_(False)).reparam(model)
    ais = AnnealedImportance(
        warped, "auto", num_chains=64, num_steps=100, seed=0, progress_bar=False
    )
    assert near(ais.run(x), float(dist.Normal(0.0, 5**0.5).log_prob(x)))


# --- guides ---


def test_a_guide_on_the_reals_is_refused_for_an_angle():
    model = one_latent(
        lambda: dist.VonMises(0.0, 2.0), lambda z: dist.Normal((2 * z).sin(), 0.5), -0.3
    )
    with pytest.raises(ValueError, match=r'"z" the model has an angle.*VonMises'):
        run(model, lambda: pyro.sample("z", dist.Normal(0.0, 3.0)))
    truth = quadrature(lambda z: circular(z, 0, 2) * normal(-0.3, math.sin(2 * z), 0.5), (-PI, PI))
    assert truth == pytest.approx(-0.961, abs=1e-3)
    assert near(run(model, lambda: pyro.sample("z", dist.VonMises(-0.2, 1.0))), truth)


@pytest.mark.parametrize(
    "prior", [lambda: dist.VonMises(0.0, 1.0), shifted(2.0, 1.0)], ids=["angle", "image"]
)
def test_autoguides_that_mistake_a_support_are_refused(prior):
    model = one_latent(prior, around, 2.5)
    guide = AutoDiagonalNormal(model)
    guide()
    with pytest.raises(
        ValueError, match='at site "z" AutoDiagonalNormal takes the declared support'
    ):
        run(model, guide)


NARROW = {
    "bounded": (lambda: dist.Normal(0.0, 10.0), lambda: dist.Uniform(-4.0, 4.0)),
    "far but bounded": (lambda: dist.Normal(0.0, 10.0), lambda: dist.Uniform(-600.0, 600.0)),
    "above": (lambda: dist.Gamma(2.0, 1.0), lambda: dist.Pareto(1e-3, 1.0)),
    "part of an interval": (lambda: dist.Uniform(0.0, 10.0), lambda: dist.Uniform(1e-4, 10.0)),
    "image": (lambda: dist.Normal(0.0, 1.0), shifted(-3.0, 1.0)),
}


@pytest.mark.parametrize("name", sorted(NARROW))
def test_guides_narrower_than_the_model_are_refused(name):
    prior, guide = NARROW[name]
    model = one_latent(prior, around, 3.0)
    with pytest.raises(ValueError, match=r'"z" the guide .* has no density at values'):
        run(model, lambda: pyro.sample("z", guide()))


def test_draws_of_a_guide_outside_of_the_support_have_no_weight():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Uniform(a - 1.0, a + 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    def guide():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(a, 1.0))  # the bijection would clamp a third of its draws

    cdf = lambda a: stats.norm.cdf(a + 1.0, 1.0) - stats.norm.cdf(a - 1.0, 1.0)
    truth = quadrature(lambda a: normal(a, 0.0, 1.0) * cdf(a) / 2.0, (-8.0, 8.0))
    result = run(model, guide, num_chains=400, num_steps=2)
    assert near(result, truth)
    dead = float((result.log_weights == -torch.inf).double().mean())
    assert dead == pytest.approx(0.317, abs=5 * (0.317 * 0.683 / 400) ** 0.5)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)]
)
def test_guides_of_the_same_support_are_accepted(dtype):
    torch.set_default_dtype(dtype)
    for prior in (
        lambda: dist.Uniform(-1.0, 7.3),
        lambda: dist.Beta(0.5, 2.0),
        shifted(2.0, 1.0),
        lambda: dist.Gamma(2.0, 1.0),
        lambda: dist.Cauchy(0.0, 1.0),
    ):
        model = one_latent(prior, around, 3.0)
        problems = [
            prepare(
                model, guide, NOTHING, NOTHING,
                num_chains=4, batch_plates="auto", compile=False, seed=0,
            )
            for guide in (lambda prior=prior: pyro.sample("z", prior()), None)
        ]  # fmt: skip
        position = problems[1].draw(4)
        accepted, own = (problem.density(position).log_base for problem in problems)
        torch.testing.assert_close(accepted, own, rtol=1e-4, atol=1e-4)
