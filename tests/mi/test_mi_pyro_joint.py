"""Pyro models as joints: covariates, arguments, discrete latents, and what is refused."""

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam

from pyro_anneal import AnnealedImportance, mi


def regression(x):
    """Slope z, covariate c: x = c z + noise of scale 0.5."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        c = pyro.sample("c", dist.Normal(1.0, 2.0), obs=x[:, 0])
        pyro.sample("y", dist.Normal(c * z, 0.5), obs=x[:, 1])


def slope_posterior(x):
    precision = 1.0 + (x[:, 0] / 0.5) ** 2
    return dist.Normal(x[:, 0] * x[:, 1] / 0.25 / precision, precision.rsqrt())


def test_covariates_as_observed_sites_give_conditional_information():
    """I((c, y); z) = I(y; z | c) = E log(1 + c^2 / s^2) / 2, by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    inner = 0.5 * np.log1p(((1.0 + 2.0 * nodes) / 0.5) ** 2)
    truth = float((weights * inner).sum() / math.sqrt(2.0 * math.pi))
    joint = mi.PyroJoint(regression, example=torch.zeros(1, 2))
    x, z = joint.sample(4000)
    assert x.shape == (4000, 2)
    est = mi.IWAE(joint, slope_posterior, 2).estimate(x, z)
    torch.testing.assert_close(est.pair_lower, est.pair_upper)
    assert abs(est.lower - truth) < 5 * est.lower_std_error
    # The density of the covariate cancels pair by pair.
    by_hand = slope_posterior(x).log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z)
    torch.testing.assert_close(est.pair_lower, by_hand)


def design_of_rows(x, design, *, noise=1.0):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(design * z.unsqueeze(-1), noise).to_event(1), obs=x)


def design_of_one_pair(design, *, noise=1.0):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(design * z.unsqueeze(-1), noise).to_event(1))


class Design(pyro.nn.PyroModule):
    def forward(self, design, *, noise=1.0):
        return design_of_one_pair(design, noise=noise)


DESIGN = torch.tensor([2.0, -0.5, 1.0], dtype=torch.float64)
OPTIONS = {"args": (DESIGN,), "kwargs": {"noise": 0.7}}
WITH_DESIGN = {
    "rows": lambda: mi.PyroJoint(design_of_rows, example=torch.zeros(1, 3), **OPTIONS),
    "one pair": lambda: mi.PyroJoint(design_of_one_pair, observed=["y"], **OPTIONS),
    "module": lambda: mi.PyroJoint(Design(), observed=["y"], **OPTIONS),
    "partial": lambda: mi.PyroJoint(
        functools.partial(design_of_one_pair, DESIGN, noise=0.7), observed=["y"]
    ),
}


@pytest.mark.parametrize("name", WITH_DESIGN)
def test_arguments_reach_the_model(name):
    precision = 1.0 + DESIGN.square().sum() / 0.49
    posterior = lambda x: dist.Normal(
        x @ DESIGN / 0.49 / precision, precision.rsqrt().expand(len(x))
    )
    joint = WITH_DESIGN[name]()
    x, z = joint.sample(500)
    expected = dist.Normal(z.unsqueeze(-1) * DESIGN, 0.7).log_prob(x).sum(-1)
    torch.testing.assert_close(joint.log_likelihood(x, z), expected)
    est = mi.IWAE(joint, posterior, 2).estimate(x, z)
    torch.testing.assert_close(est.pair_lower, est.pair_upper)
    assert abs(est.lower - 0.5 * precision.log()) < 5 * est.lower_std_error


LOCS = torch.tensor([-2.0, 0.5, 4.0], dtype=torch.float64)
PROBS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def mixture(x, infer=None):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(PROBS), infer=infer or {})
        pyro.sample("x", dist.Normal(LOCS[k], 1.0), obs=x)


def test_a_discrete_latent_is_part_of_z():
    """I(x; k) by quadrature over x; with the exact posterior both bounds meet pair by pair."""
    grid = torch.linspace(-12.0, 14.0, 20001)
    log_joint = dist.Normal(LOCS, 1.0).log_prob(grid.unsqueeze(-1)) + PROBS.log()
    log_ratio = log_joint - PROBS.log() - log_joint.logsumexp(-1, keepdim=True)
    truth = torch.trapezoid((log_joint.exp() * log_ratio).sum(-1), grid)

    def posterior(x):
        logits = dist.Normal(LOCS, 1.0).log_prob(x.unsqueeze(-1)) + PROBS.log()
        return dist.Categorical(logits=logits)

    joint = mi.PyroJoint(mixture, example=torch.zeros(1))
    est = mi.IWAE(joint, posterior, 3).estimate(num_pairs=3000)
    torch.testing.assert_close(est.pair_lower, est.pair_upper)
    assert abs(est.lower - truth) < 5 * est.lower_std_error
    with pytest.raises(NotImplementedError, match="discrete support"):
        mi.AIS(joint, num_steps=3).estimate(num_pairs=3)


@pytest.mark.parametrize(
    "model",
    [
        functools.partial(mixture, infer={"enumerate": "parallel"}),
        pyro.infer.config_enumerate(mixture),
    ],
    ids=["site", "model"],
)
def test_a_site_marked_for_enumeration_is_refused(model):
    """It is summed out elsewhere in the package: another mutual information."""
    with pytest.raises(NotImplementedError, match='at site "k": it is marked for enumeration'):
        mi.PyroJoint(model, example=torch.zeros(1)).sample(3)


@pytest.mark.filterwarnings("ignore:one of 8 chains holds")
def test_annealing_sums_the_enumerated_site_out():
    """I(x; z) without k, which the refusal recommends, by quadrature over x and z."""

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(PROBS), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(LOCS[k], 0.8))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    # I = H(x) - H(x|z), the noise being Gaussian.
    grid = torch.linspace(-12.0, 14.0, 20001)
    scale = math.sqrt(0.8**2 + 0.5**2)
    log_marginal = dist.Normal(LOCS, scale).log_prob(grid.unsqueeze(-1)) + PROBS.log()
    log_marginal = log_marginal.logsumexp(-1)
    entropy = -torch.trapezoid(log_marginal.exp() * log_marginal, grid)
    truth = entropy - 0.5 * math.log(2.0 * math.pi * math.e * 0.25)
    ais = AnnealedImportance(model, num_chains=8, num_steps=100, seed=1, progress_bar=False)
    est = ais.mutual_information(torch.zeros(400))
    assert est.lower <= truth + 5 * est.lower_std_error
    assert est.upper >= truth - 5 * est.upper_std_error
    assert -0.02 < est.gap < 0.2
    assert any("k" in note and "summed out" in note for note in est.notes)


def test_missing_arguments_and_missing_observations_are_named():
    with pytest.raises(ValueError, match="missing a required argument: 'design'"):
        mi.PyroJoint(design_of_rows)
    with pytest.raises(ValueError, match=r"too many positional arguments.*PyroJoint\(args="):
        mi.PyroJoint(regression, example=torch.zeros(1, 2), args=(DESIGN,))
    with pytest.raises(ValueError, match=r"which of the sites \['z', 'y'\] are x"):
        mi.PyroJoint(design_of_one_pair, **OPTIONS).sample(3)
    with pytest.raises(ValueError, match=r"observed sites \['w'\] are not in the model"):
        mi.PyroJoint(design_of_one_pair, observed=["w"], **OPTIONS).sample(3)


def test_a_simulator_of_rows_without_likelihood():
    """Rows in a plate; x tells the sign of z and nothing else: I = log 2."""

    def simulator(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("x", z.sign() * (0.1 + torch.rand_like(z)))

    def half_normal(x):
        """The exact p(z|x): a normal restricted to the side of x."""
        side = dist.transforms.AffineTransform(0.0, x.sign())
        return dist.TransformedDistribution(dist.HalfNormal(torch.ones_like(x)), side)

    joint = mi.PyroJoint(simulator, observed=["x"], example=torch.zeros(1))
    assert joint.knowledge == "marginal p(z)"
    est = mi.BarberAgakov(joint, half_normal).estimate(num_pairs=50)
    torch.testing.assert_close(est.pair_lower, torch.full((50,), math.log(2.0)))
    assert est.upper is None
    with pytest.raises(ValueError, match="include a deterministic one, which has no density"):
        joint.log_likelihood(*joint.sample(3))
    for bound in (lambda: mi.IWAE(joint, half_normal), lambda: mi.AIS(joint)):
        with pytest.raises(ValueError, match="needs the full joint"):
            bound()


def reparameterized(x):
    config = {"z": LocScaleReparam(0.0)}
    with poutine.reparam(config=config), pyro.plate("data", len(x)):
        shift = pyro.sample("shift", dist.Delta(torch.full((len(x),), 0.7)))
        z = pyro.sample("z", dist.Normal(shift, 1.5))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def test_what_other_latents_fix_is_neither_x_nor_z():
    """A reparameterized site, and a Delta, were counted as data: then information is infinite."""
    joint = mi.PyroJoint(reparameterized, example=torch.zeros(1))
    x_layout, z_layout = joint.layouts(torch.zeros(1))
    assert (x_layout.names, z_layout.names) == (["x"], ["z_decentered"])
    x, z = joint.sample(500)
    scale = 1.5**2 / (1.5**2 + 0.25)
    posterior = lambda x: dist.Normal(scale * (x - 0.7) / 1.5, math.sqrt(1.0 - scale))
    est = mi.IWAE(joint, posterior, 2).estimate(x, z)
    torch.testing.assert_close(est.pair_lower, est.pair_upper, rtol=1e-4, atol=1e-4)
    assert abs(est.lower - 0.5 * math.log(1.0 + 1.5**2 / 0.25)) < 5 * est.lower_std_error


def test_a_mask_of_a_distribution_is_refused_like_one_of_poutine():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).mask(x > 0), obs=x)

    with pytest.raises(NotImplementedError, match=r'at site "x".*mask'):
        mi.BarberAgakov(model, lambda x: dist.Normal(x, 1.0)).estimate(
            torch.zeros(4), torch.zeros(4)
        )
