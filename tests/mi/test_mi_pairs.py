"""How many pairs, what their average is worth, and one seed (FAULTS A26)."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_anneal import AnnealedImportance, AnnealingWarning, MutualInformation, mi
from pyro_anneal.mi.ais import _check_sides

NARROW = mi.DistributionJoint(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 0.05))
TRUTH = 0.5 * math.log1p(400.0)


def lonely():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 0.5), obs=torch.tensor(0.0))


def _ais(model, **options):
    options = {"num_chains": 4, "num_steps": 20, "progress_bar": False, "seed": 0} | options
    return AnnealedImportance(model, **options)


@pytest.mark.parametrize("num_pairs", [2, 3, 5])
def test_intervals_of_few_pairs_cover(num_pairs):
    torch.manual_seed(0)
    repetitions = 300
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        est = mi.StructuredInfoNCE(NARROW, 500).estimate(
            num_pairs=num_pairs * repetitions, control_variates=False
        )
    lower, upper = est.pair_lower, est.pair_upper
    covered = 0
    for rows in torch.arange(num_pairs * repetitions).split(num_pairs):
        part = {"pair_lower": lower[rows], "pair_upper": upper[rows]}
        low, high = type(est)(method="x", **part).normal_interval(0.95)
        covered += low < TRUTH < high
    assert covered / repetitions > 0.95 - 3.0 * (0.95 * 0.05 / repetitions) ** 0.5


@pytest.mark.filterwarnings("ignore:the contrastive term")
def test_control_variates_keep_bounds_and_shrink_errors():
    joint = mi.DistributionJoint(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 0.2))
    truth = 0.5 * math.log1p(25.0)
    bound = mi.StructuredInfoNCE(joint, 2000)
    est = bound.estimate(num_pairs=1000, seed=1)
    plain = bound.estimate(num_pairs=1000, control_variates=False, seed=1)
    assert est.lower - 4.5 * est.lower_std_error < truth < est.upper + 4.5 * est.upper_std_error
    torch.testing.assert_close(est.gap, plain.gap, atol=1e-5, rtol=1e-4)  # pair by pair
    # The value is -e^2/2 + x^2/2 up to constants, and e^2 and z^2 are both known: nearly all.
    assert float(est.measurements["variance_ratio"]) < 0.1
    assert est.lower_std_error < 0.4 * plain.lower_std_error
    total = est.terms["contrastive"] + est.terms["control"]
    torch.testing.assert_close(est.lower, total)
    x, z = joint.sample(100)
    assert "control" not in bound.estimate(x, z).terms  # given pairs need not be the model's


def test_pyro_models_know_their_entropies():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Poisson(3.0))
        with pyro.plate("inner", 4):
            pyro.sample("x", dist.Normal(z + k, 0.5))

    joint = mi.PyroJoint(model, observed=["x"])
    x, z = joint.sample(3000)
    controls = joint.controls(x, z)
    assert controls.shape == (2, 3000)
    error = controls.std(1) / 3000**0.5
    assert bool((controls.mean(1).abs() < 4.5 * error).all())
    expected = dist.Normal(0.0, 1.0).log_prob(z[:, 0]) + dist.Normal(0.0, 1.0).entropy()
    torch.testing.assert_close(controls[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:the contrastive term")
def test_target_std_error_chooses_pairs_and_seed_repeats():
    state = torch.random.get_rng_state()
    wide = mi.DistributionJoint(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 0.3))
    bound = mi.StructuredInfoNCE(wide, 200)
    est = bound.estimate(target_std_error=0.03, control_variates=False, seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    assert est.lower_std_error <= 0.03
    assert est.upper_std_error <= 0.03
    assert 400 < est.num_pairs < 2600  # the standard deviation is about 1
    again = bound.estimate(target_std_error=0.03, control_variates=False, seed=3)
    assert torch.equal(est.pair_lower, again.pair_lower)
    with pytest.warns(AnnealingWarning, match="above the target"):
        short = bound.estimate(target_std_error=1e-4, max_pairs=150, seed=3)
    assert short.num_pairs == 150
    assert short.verdict == "suspicious"
    with pytest.raises(ValueError, match="pass no x and z"):
        bound.estimate(*wide.sample(5), target_std_error=0.1)


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")
def test_models_without_batch_plates_get_enough_pairs():
    options = {"num_steps": 3, "compile": False}
    est = _ais(lonely, **options).mutual_information()
    assert est.num_pairs == 20
    low, high = est.normal_interval()
    assert math.isfinite(low)
    assert math.isfinite(high)
    assert "variance_ratio" not in est.measurements  # from 50 pairs on
    one = _ais(lonely, **options).mutual_information(num_simulations=1)
    assert one.normal_interval() == (-math.inf, math.inf)
    assert "few_pairs" in [found.name for found in one.diagnostics]
    assert "nan" not in repr(one)


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")
def test_mutual_information_in_rounds(tmp_path):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    truth, x = 0.5 * math.log(5.0), torch.zeros(50)
    path = tmp_path / "rounds"
    est = _ais(model, checkpoint=path).mutual_information(x, target_std_error=0.05)
    assert max(est.lower_std_error, est.upper_std_error) <= 0.05
    assert est.num_pairs % 50 == 0
    assert est.num_pairs > 50
    assert est.lower - 4.5 * est.lower_std_error < truth < est.upper + 4.5 * est.upper_std_error
    again = _ais(model, checkpoint=path).mutual_information(x, target_std_error=0.05)
    assert torch.equal(est.pair_lower, again.pair_lower)
    with pytest.warns(AnnealingWarning, match="above the target"):
        short = _ais(model).mutual_information(x, target_std_error=0.001, max_simulations=2)
    assert short.num_pairs == 100


def _two_modes():
    """|z| is seen and its sign is not: I is that of the folded normal, by quadrature below."""
    return mi.DistributionJoint(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z.abs(), 0.2))


def _one_mode(x):
    return dist.Normal(x, 0.25)


def test_prior_weight_mends_a_guide_that_misses_a_mode():
    # I = h(|z| + e) - h(e)
    grid = torch.linspace(-2.0, 8.0, 4001, dtype=torch.double)
    z = torch.linspace(0.0, 8.0, 4001, dtype=torch.double)
    weight = 2.0 * dist.Normal(0.0, 1.0).log_prob(z).exp() * (z[1] - z[0])
    weight[0] *= 0.5
    density = (dist.Normal(z, 0.2).log_prob(grid.unsqueeze(1)).exp() * weight).sum(1)
    entropy = -torch.special.xlogy(density, density).sum() * (grid[1] - grid[0])
    truth = float(entropy - dist.Normal(0.0, 0.2).entropy())
    options = {"num_chains": 8, "num_steps": 40, "resampling": False, "compile": False}
    mended = mi.AIS(_two_modes(), _one_mode, prior_weight=0.5, **options)
    est = mended.estimate(num_pairs=150, seed=0)
    assert est.lower - 4.5 * est.lower_std_error < truth < est.upper + 4.5 * est.upper_std_error
    plain = mi.AIS(_two_modes(), _one_mode, **options).estimate(num_pairs=150, seed=0)
    assert est.gap < 0.5 * plain.gap
    for weight, guide, message in ((1.0, _one_mode, "must lie in"), (0.5, None, "pass guide=")):
        with pytest.raises(ValueError, match=message):
            mi.AIS(_two_modes(), guide, prior_weight=weight)


def test_wide_and_crossed_bounds_are_found():
    z = torch.randn(30, generator=torch.Generator().manual_seed(0))
    wide = mi.AIS(NARROW, num_chains=1, num_steps=2, compile=False)
    assert "gap" in [d.name for d in wide.estimate(num_pairs=20, seed=0).diagnostics]
    values = {"pair_lower": torch.full((30,), 2.0), "pair_upper": 1.0 + 0.1 * torch.randn(30)}
    (crossed,) = _check_sides(MutualInformation(method="AIS", **values))
    assert crossed.name == "agreement"
    assert not _check_sides(MutualInformation(method="AIS", pair_lower=z, pair_upper=z + 0.1))
