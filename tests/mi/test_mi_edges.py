"""Likelihoods with hard edges, x possible at some z only, and values that no pair can have."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_anneal import AnnealedImportance, mi
from pyro_anneal.oed import ais_eig
from pyro_anneal.schedules import Linear

PRIOR = dist.Gamma(torch.tensor(2.0), torch.tensor(1.0))
UNIFORM = 1.0 - float(torch.digamma(torch.tensor(2.0)))  # x is Exponential(1) then


def pareto_information() -> float:
    """I of x ~ Pareto(z, 3): h(log x) - h(log x | z), the former by quadrature."""
    grid = np.linspace(1e-6, 1.0, 4001)
    log_x = np.linspace(-12.0, 9.0, 8001)
    x = np.exp(log_x)[:, None]
    inner = 3.0 * (grid * x) * np.exp(-grid * x) * grid**3 / x  # p(z) p(x|z) dz, z = grid * x
    density = np.trapezoid(inner * x, grid, axis=1) * np.exp(log_x)
    entropy = -np.trapezoid(np.where(density > 0, density * np.log(density + 1e-300), 0.0), log_x)
    assert abs(np.trapezoid(density, log_x) - 1.0) < 1e-4
    return float(entropy - (1.0 - math.log(3.0)))


def uniform(z):
    return dist.Uniform(torch.zeros_like(z), z)


def pareto(z):
    return dist.Pareto(z, torch.full_like(z, 3.0))


def as_pyro(likelihood):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", PRIOR)
            pyro.sample("x", likelihood(z), obs=x)

    return mi.PyroJoint(model, example=torch.ones(1))


@pytest.mark.parametrize(
    ("likelihood", "truth", "kind"),
    [(uniform, UNIFORM, "pyro"), (pareto, pareto_information(), "distributions")],
)
def test_importance_bounds_take_particles_at_which_x_is_impossible(likelihood, truth, kind):
    joint = as_pyro(likelihood) if kind == "pyro" else mi.DistributionJoint(PRIOR, likelihood)
    est = mi.StructuredInfoNCE(joint, 2000).estimate(num_pairs=1000, seed=0)
    low, high = est.normal_interval(0.9999)
    assert low < truth < high
    assert float(est.gap) < 0.05
    assert float(est.lower_std_error) < 0.05


@pytest.mark.parametrize("likelihood", [uniform, pytest.param(pareto, marks=pytest.mark.slow)])
def test_annealing_across_an_edge_says_so(likelihood):
    joint = mi.DistributionJoint(PRIOR, likelihood)
    truth = UNIFORM if likelihood is uniform else pareto_information()
    options = {"num_steps": 10, "schedule": Linear(), "step_size": 0.3}
    est = mi.AIS(joint, num_chains=4, **options).estimate(num_pairs=100, seed=0)
    (found,) = [d for d in est.diagnostics if d.name == "edges"]
    assert "StructuredInfoNCE" in found.message
    assert float(est.lower) < truth + 4.0 * float(est.lower_std_error)
    assert float(est.upper) > truth - 4.0 * float(est.lower_std_error)
    assert not [d for d in est.diagnostics if d.name == "gap"]  # more steps would not help


def test_no_edge_is_seen_where_supports_are_fixed():
    joint = mi.DistributionJoint(PRIOR, lambda z: dist.Exponential(z))
    x, _ = joint.sample(3)
    assert not joint.has_edges(x)
    assert mi.DistributionJoint(PRIOR, uniform).has_edges(x)


def test_an_observation_that_its_own_z_forbids_is_an_error():
    joint = mi.DistributionJoint(PRIOR, uniform)
    with pytest.raises(ValueError, match="support"):
        mi.StructuredInfoNCE(joint, 10).estimate(torch.tensor([2.0]), torch.tensor([1.0]))


def student_pairs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Student-t pairs with two degrees of freedom: both sides share their scale."""
    torch.manual_seed(1)
    both = dist.MultivariateStudentT(torch.tensor(2.0), torch.zeros(2), torch.eye(2))
    sample = both.sample((count,))
    return sample[:, :1], sample[:, 1:]


def student_guide(x):
    """p(z|x), exactly."""
    spread = ((2.0 + x.square()) / 3.0).sqrt()
    return dist.StudentT(3.0, 0.0, spread).to_event(1)


def test_values_that_no_pair_can_have_are_found_and_true_ones_are_not():
    prior = dist.StudentT(2.0, torch.zeros(1), 1.0).to_event(1)
    x, z = student_pairs(2000)
    light = mi.BarberAgakov(prior, lambda x: dist.Normal(0.0 * x, 2.0).to_event(1))
    est = light.estimate(x, z)
    (found,) = [d for d in est.diagnostics if d.name == "loose_pairs"]
    exact = mi.BarberAgakov(prior, student_guide).estimate(x, z)
    assert not [d for d in exact.diagnostics if d.name == "loose_pairs"]
    lacks = float(exact.lower - est.lower)
    assert 0.5 * lacks < found.value < lacks + 0.1


def test_the_information_of_a_pair_is_rarely_far_below_zero():
    """P(i < -a) <= exp(-a), which the finding rests on; E exp(-i) = 1 here."""
    prior = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    joint = mi.DistributionJoint(prior, lambda z: dist.Normal(z, 0.3).to_event(1))
    torch.manual_seed(0)
    x, z = joint.sample(50_000)
    marginal = dist.Normal(torch.zeros(1), 1.09**0.5).to_event(1)
    values = (joint.log_likelihood(x, z) - marginal.log_prob(x)).double()
    for a in (0.5, 1.0, 2.0, 4.0):
        assert float((values < -a).double().mean()) <= math.exp(-a)


class TestCritics:
    prior = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    joint = mi.DistributionJoint(prior, lambda z: dist.Normal(z, 0.5).to_event(1))

    @staticmethod
    def wide(x):
        return dist.Normal(0.8 * x, 1.0).to_event(1)

    @staticmethod
    def blind(x, z):
        return 0.0 * (x + z).sum(-1)

    @staticmethod
    def wrong(x, z):
        return -3.0 * (z - 0.8 * x - 2.0).square().sum(-1)

    def found(self, bound, **given):
        est = bound.estimate(*self.joint.sample(300), seed=0, **given)
        return {d.name: d for d in est.diagnostics}, est

    def test_mine_ais_says_how_far_it_is_where_the_joint_is_known(self):
        torch.manual_seed(0)
        options = {"num_chains": 4, "num_steps": 20}
        named, est = self.found(mi.MINEAIS(self.joint, self.wide, self.blind, **options))
        assert named["critic"].value > 0.2
        assert float(est.measurements["best_critic"]) > float(est.lower) + 0.2

    @pytest.mark.parametrize("kind", ["GIWAE", "MINEAIS"])
    def test_a_critic_worse_than_none_is_found_from_p_z_alone(self, kind):
        torch.manual_seed(0)
        make = getattr(mi, kind)
        options = {"num_steps": 50, "num_chains": 4} if kind == "MINEAIS" else {}
        named, _ = self.found(make(self.prior, self.wide, self.wrong, **options))
        assert named["critic"].severity == "warning"
        named, _ = self.found(make(self.prior, self.wide, self.blind, **options))
        assert "critic" not in named


def test_a_start_that_no_data_allow_names_the_moving_support():
    def model(x):
        z = pyro.sample("z", PRIOR)
        pyro.sample("x", dist.Uniform(torch.zeros(()), z), obs=x)

    with pytest.raises(ValueError, match=r"support of \['x'\] depends on latents.*num_chains"):
        AnnealedImportance(model, num_steps=5, progress_bar=False).run(torch.tensor(40.0))


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")
def test_designs_with_infinite_bounds_say_so():
    def model(design):
        with pyro.plate_stack("designs", design.shape):
            z = pyro.sample("z", PRIOR)
            pyro.sample("y", dist.Uniform(torch.zeros_like(z), z * design))

    eig = ais_eig(model, torch.tensor([1.0]), "y", budget=2000, seed=0)
    named = [d.name for d in eig.diagnostics]
    assert ("edges" in named) == bool(eig.upper.isinf().any())
    assert "edges" in named
    assert float(eig.lower) < UNIFORM + 4.0 * float(eig.lower_std_error)
