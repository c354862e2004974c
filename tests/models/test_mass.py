"""Distributions of the user's own: their mass, their draws and their support are looked at."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import TorchDistribution, constraints

from pyro_anneal import AnnealedImportance
from pyro_anneal.models.mass import check_domains, check_normalized, saturates


class Own(TorchDistribution):
    """A distribution made of functions."""

    arg_constraints = {}
    support = constraints.real

    def __init__(self, batch_shape=(), event_shape=()):
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return type(self)(batch_shape)

    def shape_of(self, sample_shape):
        return (*sample_shape, *self.batch_shape, *self.event_shape)


class TooWide(Own):
    """Exponential draws; the formula -x goes on below zero."""

    def sample(self, sample_shape=()):
        return torch.empty(self.shape_of(sample_shape)).exponential_()

    def log_prob(self, value):
        return -value


class WithoutConstant(Own):
    def sample(self, sample_shape=()):
        return torch.randn(self.shape_of(sample_shape))

    def log_prob(self, value):
        return -0.5 * value**2


class Shifted(TooWide):
    """Lives above 2, says it lives above 0."""

    support = constraints.positive

    def sample(self, sample_shape=()):
        return 2.0 + super().sample(sample_shape)

    def log_prob(self, value):
        return 2.0 - value


class HalfOfIt(WithoutConstant):
    """A normal that declares the positive numbers."""

    support = constraints.positive

    def log_prob(self, value):
        return -0.5 * value**2 - 0.5 * math.log(2 * math.pi)


class Periodic(Own):
    """A wrapped density on all the reals."""

    def sample(self, sample_shape=()):
        return dist.VonMises(0.0, 1.0).sample(self.shape_of(sample_shape))

    def log_prob(self, value):
        return dist.VonMises(0.0, 1.0).log_prob(value)


class OtherDraws(WithoutConstant):
    def log_prob(self, value):
        return dist.Normal(0.5, 1.0).log_prob(value)


class ZeroAtDraws(TooWide):
    support = constraints.positive

    def log_prob(self, value):
        return torch.where(value < 1.0, -torch.inf, 1.0 - value)


class OutsideInTwo(Own):
    """Two dimensions: only draws can tell."""

    support = constraints.independent(constraints.positive, 1)

    def __init__(self, batch_shape=()):
        super().__init__(batch_shape, (2,))

    def sample(self, sample_shape=()):
        return torch.randn(self.shape_of(sample_shape))

    def log_prob(self, value):
        return dist.Normal(0.0, 1.0).log_prob(value).sum(-1)


WRONG = {
    TooWide: r'"z": the density of TooWide integrates to infinity.*support Real\(\)',
    WithoutConstant: r'"z": the density of WithoutConstant integrates to 2.51 .*pyro.factor',
    Shifted: r'"z": the density of Shifted integrates to 7.39 .*GreaterThan',
    HalfOfIt: r'"z": draws of HalfOfIt lie outside of its declared support',
    Periodic: r'"z": the density of Periodic integrates to infinity',
    OtherDraws: r'"z": draws of OtherDraws do not follow its log_prob .* 0.2',
    ZeroAtDraws: r'"z": ZeroAtDraws has no density .* at draws of its own',
    OutsideInTwo: r'"z": draws of OutsideInTwo lie outside',
}


@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrong_classes_are_refused_by_name(kind, dtype):
    torch.set_default_dtype(dtype)

    def model():
        z = pyro.sample("z", kind())
        pyro.sample("y", dist.Normal(z.sum(), 1.0), obs=torch.tensor(0.5))

    for guide in (None, "auto"):
        ais = AnnealedImportance(model, guide, num_chains=4, num_steps=2, progress_bar=False)
        with pytest.raises(ValueError, match=WRONG[kind]):
            ais.run()


def test_a_guide_without_its_constant_is_refused():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.5))

    def guide():
        pyro.sample("z", WithoutConstant())

    ais = AnnealedImportance(model, guide, num_chains=4, num_steps=2, progress_bar=False)
    with pytest.raises(ValueError, match=r'site "z" of the guide: the density of WithoutConstant'):
        ais.run()


def own(family):
    """A subclass, so that it counts as a class of the user's own."""
    return type("My" + family.__name__, (family,), {})


tensor = torch.tensor
RIGHT = {
    "Normal": (dist.Normal, (tensor([0.0, 1e4, -3.0]), tensor([1.0, 1e-2, 1e3]))),
    "Cauchy": (dist.Cauchy, (0.0, 1.0)),
    "StudentT": (dist.StudentT, (0.5, 0.0, 1.0)),
    "Laplace": (dist.Laplace, (1.0, 2.0)),
    "Gumbel": (dist.Gumbel, (1.0, 2.0)),
    "Stable": (dist.Levy if hasattr(dist, "Levy") else dist.LogNormal, (0.0, 1.0)),
    "Gamma": (dist.Gamma, (tensor([0.05, 0.5, 5.0, 500.0]), tensor([1.0, 10.0, 0.1, 2.0]))),
    "Beta": (dist.Beta, (tensor([0.05, 0.5, 5.0, 500.0]), tensor([0.05, 2.0, 0.5, 1.0]))),
    "Kumaraswamy": (dist.Kumaraswamy, (tensor([0.2, 2.0]), tensor([0.3, 3.0]))),
    "Weibull": (dist.Weibull, (2.0, tensor([0.3, 3.0]))),
    "Pareto": (dist.Pareto, (2.0, 0.5)),
    "Exponential": (dist.Exponential, (tensor([1e-3, 1e3]),)),
    "HalfCauchy": (dist.HalfCauchy, (tensor(5.0),)),
    "HalfNormal": (dist.HalfNormal, (tensor(5.0),)),
    "LogNormal": (dist.LogNormal, (0.0, tensor([0.1, 5.0]))),
    "Uniform": (dist.Uniform, (tensor([0.0, -5.0]), tensor([1e-3, 5.0]))),
    "VonMises": (dist.VonMises, (tensor([0.0, 3.0]), tensor([0.1, 50.0]))),
    "Logistic": (dist.Logistic, (1.0, 2.0)),
    "ContinuousBernoulli": (torch.distributions.ContinuousBernoulli, (tensor([0.1, 0.9]),)),
    "InverseGamma": (dist.InverseGamma, (tensor([0.5, 5.0]), tensor([1.0, 3.0]))),
    "AsymmetricLaplace": (dist.AsymmetricLaplace, (0.0, 1.0, 3.0)),
    "SoftLaplace": (dist.SoftLaplace, (0.0, 1.0)),
}


@pytest.mark.parametrize("name", sorted(RIGHT))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_right_classes_pass(name, dtype):
    """Heavy tails, jumps, poles at edges, widths and places of all sizes: no false alarm."""
    torch.set_default_dtype(dtype)
    family, parameters = RIGHT[name]
    parameters = [torch.as_tensor(p, dtype=dtype) for p in parameters]
    check_normalized('site "z"', own(family)(*parameters))


class WrongJacobian(dist.transforms.Transform):
    domain = constraints.real
    codomain = constraints.positive
    bijective = True

    def _call(self, x):
        return (2.0 * x).exp()

    def _inverse(self, y):
        return 0.5 * y.log()

    def log_abs_det_jacobian(self, x, y):
        return 2.0 * x  # log 2 is missing


def test_transforms_of_the_users_own_count():
    fn = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [WrongJacobian()])
    with pytest.raises(ValueError, match=r'"z": the density of TransformedD.* integrates to 2 '):
        check_normalized('"z"', fn)


def test_far_modes_and_other_dimensions_pass():
    spikes = dist.Normal(tensor([-1000.0, 0.0, 1000.0]), tensor([1.0, 1e-3, 1.0]))
    check_normalized('"z"', own(dist.MixtureSameFamily)(dist.Categorical(torch.ones(3)), spikes))
    check_normalized('"z"', own(dist.Poisson)(tensor(3.0)))
    check_normalized('"z"', own(dist.Dirichlet)(torch.ones(3)))
    check_normalized('"z"', own(dist.MultivariateNormal)(torch.zeros(2), torch.eye(2)))
    check_normalized('"z"', own(dist.Normal)(torch.zeros(50_000), 1.0))


def test_it_leaves_the_generator_alone():
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    check_normalized('"z"', own(dist.Gamma)(tensor(2.0), tensor(1.0)))
    drawn = torch.random.get_rng_state()
    torch.random.set_rng_state(state)
    assert torch.equal(drawn, state)


def test_values_at_an_edge_stand_still():
    transform = dist.transforms.SigmoidTransform()
    value = torch.sigmoid(tensor([-80.0, -10.0, 0.0, 10.0, 30.0], dtype=torch.float32))
    assert saturates(transform, value).tolist() == [False, False, False, False, True]


def test_a_family_of_torch_whose_constant_is_wrong_is_refused():
    def model():
        z = pyro.sample("z", dist.ContinuousBernoulli(logits=torch.tensor(40.0)))
        pyro.sample("y", dist.Bernoulli(z), obs=torch.tensor(0.0))

    with pytest.raises(
        ValueError, match=r'"z": the density of ContinuousBernoulli integrates to 0'
    ):
        AnnealedImportance(model, num_chains=4, num_steps=2, progress_bar=False).run()


OUTSIDE = {
    "power of a normal": lambda: dist.TransformedDistribution(
        dist.Normal(1.0, 1.0), [dist.transforms.PowerTransform(torch.tensor(3.0))]
    ),
    "log of a normal": lambda: dist.TransformedDistribution(
        dist.Normal(2.0, 1.0), [dist.transforms.ExpTransform().inv]
    ),
    "logit of a shifted uniform": lambda: dist.TransformedDistribution(
        dist.TransformedDistribution(
            dist.Uniform(0.0, 1.0), [dist.transforms.AffineTransform(0.5, 1.0)]
        ),
        [dist.transforms.SigmoidTransform().inv],
    ),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_transforms_are_used_where_they_are_defined(name):
    def model():
        z = pyro.sample("z", OUTSIDE[name]())
        pyro.sample("x", dist.Normal(z, 0.5), obs=torch.tensor(0.7))

    with pytest.raises(ValueError, match=r'"z": 0\.\d+ of the draws of \w+ lie outside of'):
        AnnealedImportance(model, num_chains=4, num_steps=2, progress_bar=False).run()


def test_transforms_at_the_edge_of_their_domain_are_no_fault():
    edge = dist.TransformedDistribution(  # draws round to 0 and 1
        dist.Beta(0.01, 0.01), [dist.transforms.SigmoidTransform().inv]
    )
    check_domains("z", edge)
    check_domains("z", dist.LogNormal(0.0, 100.0))  # rounds to zero and to infinity
    half = dist.TransformedDistribution(
        dist.LogNormal(0.0, 60.0), [dist.transforms.ExpTransform().inv]
    )
    check_domains("z", half)
