"""Expected information gain against closed forms and quadrature, nuisances and gradients included."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_anneal.oed import ais_eig
from pyro_anneal.results.quantiles import student_quantile

DESIGNS = torch.tensor([0.3, 1.0, 3.0])
# Short runs on many pairs: some pair in a hundred is flagged, and its bounds say so by their width.
pytestmark = pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")


def linear(design):
    with pyro.plate_stack("designs", design.shape):
        theta = pyro.sample("theta", dist.Normal(0.5, 1.5))
        pyro.sample("y", dist.Normal(design * theta, 0.7))


def gain(design):
    return 0.5 * (1.0 + (design * 1.5 / 0.7) ** 2).log()


def with_nuisance(design):
    with pyro.plate_stack("designs", design.shape):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        drift = pyro.sample("drift", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.Normal(design * theta + drift, 0.5))


def coupled_nuisance(design):
    """The target's prior depends on the nuisance: theta ~ N(0, sqrt 2) all in all."""
    with pyro.plate_stack("designs", design.shape):
        drift = pyro.sample("drift", dist.Normal(0.0, 1.0))
        theta = pyro.sample("theta", dist.Normal(drift, 1.0))
        pyro.sample("y", dist.Normal(design * theta + drift, 0.5))


def working_memory(design):
    """Pyro's example of adaptive psychology: is a list of this length recalled?"""
    with pyro.plate_stack("designs", design.shape):
        theta = pyro.sample("theta", dist.Normal(7.0, 2.0))
        pyro.sample("y", dist.Bernoulli(logits=2.0 * (theta - design)))


def bernoulli_gain(design):
    theta = np.linspace(-8.0, 22.0, 20001)
    prior = np.exp(-0.5 * ((theta - 7.0) / 2.0) ** 2) / math.sqrt(8.0 * math.pi)
    p = 1.0 / (1.0 + np.exp(-2.0 * (theta - float(design))))

    def entropy(p):
        p = np.clip(p, 1e-300, 1.0 - 1e-16)
        return -p * np.log(p) - (1.0 - p) * np.log1p(-p)

    step = theta[1] - theta[0]  # the integrand vanishes at both ends
    marginal = (prior * p).sum() * step
    return float(entropy(marginal) - (prior * entropy(p)).sum() * step)


def assert_sandwiched(eig, truth, *, gap):
    truth = torch.as_tensor(truth)
    assert eig.lower.shape == truth.shape
    assert bool((eig.lower - 5.0 * eig.lower_std_error < truth).all())
    assert bool((eig.upper + 5.0 * eig.upper_std_error > truth).all())
    assert bool((eig.gap < gap).all()), eig.gap
    assert bool((eig.gap > -5.0 * (eig.lower_std_error + eig.upper_std_error)).all())


def test_linear_designs():
    eig = ais_eig(linear, DESIGNS, "y", num_pairs=100, num_steps=40, seed=0)
    assert_sandwiched(eig, gain(DESIGNS), gap=0.15)
    assert "from 100 pairs per design" in repr(eig)
    assert eig.num_pairs == 100


def test_nuisances_are_bounded_on_both_sides():
    """I(theta; y) of a Gaussian: the drift adds to the noise."""
    truth = 0.5 * (1.0 + DESIGNS.square() / (0.25 + 4.0)).log()
    eig = ais_eig(with_nuisance, DESIGNS, ["y"], ["theta"], num_pairs=100, num_steps=30, seed=1)
    assert_sandwiched(eig, truth, gap=0.3)


@pytest.mark.slow
def test_targets_whose_prior_depends_on_nuisances():
    given = torch.tensor(2.0)  # var theta; drift given theta: mean theta / 2, var 1 / 2
    slope = DESIGNS + 0.5
    truth = 0.5 * (1.0 + slope.square() * given / (0.25 + 0.5)).log()
    eig = ais_eig(coupled_nuisance, DESIGNS, "y", "theta", num_pairs=200, num_steps=60, seed=2)
    assert_sandwiched(eig, truth, gap=0.3)


def test_binary_observations():
    design = torch.tensor([5.0, 7.0, 10.0])
    eig = ais_eig(working_memory, design, "y", "theta", num_pairs=200, num_steps=30, seed=3)
    assert_sandwiched(eig, [bernoulli_gain(d) for d in design], gap=0.05)


def test_the_gradient_is_that_of_the_gain():
    """Independent pairs give independent estimates: their mean is the derivative, at five errors."""
    design = torch.tensor([0.6, 1.4]).repeat_interleave(20)
    eig = ais_eig(linear, design, "y", num_pairs=40, num_steps=25, gradient=True, seed=4)
    assert eig.gradient.shape == design.shape
    ratio = (1.5 / 0.7) ** 2
    for value, estimates in zip((0.6, 1.4), eig.gradient.split(20), strict=True):
        truth = value * ratio / (1.0 + value**2 * ratio)
        error = estimates.std() / 20**0.5
        assert abs(estimates.mean() - truth) < 5.0 * error
        assert truth > 3.0 * error  # the test can tell it from zero


def finite_difference(function, value, step=1e-3):
    return (function(value + step) - function(value - step)) / (2.0 * step)


@pytest.mark.parametrize(
    ("model", "labels", "truth", "values"),
    [
        pytest.param(
            with_nuisance,
            ("y", "theta"),
            lambda d: 0.5 * math.log(1.0 + d**2 / 4.25),
            (0.8, 3.0),
            marks=pytest.mark.slow,
        ),
        (working_memory, ("y", "theta"), bernoulli_gain, (5.0, 9.5)),
    ],
    ids=["nuisance", "binary"],
)
def test_the_gradient_is_the_slope_of_the_closed_form(model, labels, truth, values):
    """Beside finite differences of closed form and quadrature; an integer has no other gradient."""
    design = torch.tensor(values).repeat_interleave(24)
    eig = ais_eig(model, design, *labels, num_pairs=150, num_steps=20, gradient=True, seed=6)
    for value, estimates in zip(values, eig.gradient.split(24), strict=True):
        slope = finite_difference(truth, value)
        error = float(estimates.std()) / 24**0.5
        assert abs(float(estimates.mean()) - slope) < 5.0 * error
        assert abs(slope) > 2.5 * error  # the test can tell it from zero


def test_the_result_speaks_the_words_of_all_results(tmp_path):
    design = torch.tensor([2.0, 0.3])
    eig = ais_eig(linear, design, "y", num_pairs=30, num_steps=10, seed=7)
    assert torch.equal(eig.design, design)
    assert eig.provenance.task == "ais_eig"
    assert eig.provenance.seed == 7
    assert eig.provenance.gradients["chains"] > 0
    assert eig.provenance.settings["num_pairs"] == "30"
    eig.save(tmp_path / "eig")
    again = type(eig).load(tmp_path / "eig")
    assert torch.equal(again.pair_upper, eig.pair_upper)
    assert repr(again) == repr(eig)
    assert list(eig.to_dataframe()["design"]) == pytest.approx([2.0, 0.3])
    few = ais_eig(linear, design, "y", num_pairs=3, num_steps=10, seed=7)
    assert "few_pairs" in [found.name for found in few.diagnostics]


def test_intervals_are_wider_for_few_pairs():
    eig = ais_eig(linear, DESIGNS[:1], "y", num_pairs=2, num_steps=20, seed=5)
    low, high = eig.normal_interval(0.95)
    margin = float(eig.lower - low) / float(eig.lower_std_error)
    assert margin == pytest.approx(12.7062, abs=1e-3)
    assert high > eig.upper
    one = ais_eig(linear, DESIGNS[:1], "y", num_pairs=1, num_steps=20, seed=5)
    assert one.normal_interval()[0].item() == -math.inf


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("z", None), r"site\(s\) \['z'\] are no unobserved sites of the model"),
        (("y", "phi"), r"site\(s\) \['phi'\] are no unobserved"),
        (("y", "y"), r"site\(s\) \['y'\] are both observed and target"),
        (((), None), "needs at least one observed"),
    ],
)
def test_labels_are_checked(labels, message):
    with pytest.raises(ValueError, match=message):
        ais_eig(linear, DESIGNS, *labels, num_pairs=3, num_steps=5)


def test_designs_that_are_no_plates_are_refused():
    def model(design):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(design.sum() * theta, 1.0))

    with pytest.raises(ValueError, match="leading dimensions must be plates"):
        ais_eig(model, DESIGNS, "y", num_pairs=3, num_steps=5)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 30, 101, 6000])
@pytest.mark.parametrize("probability", [0.6, 0.975, 0.9995, 0.02])
def test_student_quantiles(freedom, probability):
    stats = pytest.importorskip("scipy.stats")
    truth = stats.t.ppf(probability, freedom)
    assert student_quantile(freedom, probability) == pytest.approx(truth, rel=2e-4)


def repeated(design):
    """Four measurements of one target, in a plate inside the designs, with a recorded middle."""
    with (
        pyro.plate("designs", design.shape[-1], dim=-2) as _,
        pyro.plate_stack("pairs", design.shape[:-1], rightmost_dim=-3),
    ):
        theta = pyro.sample("theta", dist.Normal(0.5, 1.5))
        middle = pyro.deterministic("middle", theta * design.unsqueeze(-1))
        with pyro.plate("measurements", 4, dim=-1):
            pyro.sample("y", dist.Normal(middle, 0.7))


def test_measurements_in_an_inner_plate():
    truth = 0.5 * (1.0 + 4.0 * (DESIGNS * 1.5 / 0.7) ** 2).log()
    eig = ais_eig(
        repeated, DESIGNS, "y", "theta", num_pairs=100, num_steps=40, gradient=True, seed=0
    )
    assert_sandwiched(eig, truth, gap=0.5)
    assert eig.gradient.shape == DESIGNS.shape
    assert bool((eig.pair_lower.std(0) > 0).all())


def hidden(design):
    """The target's prior depends on a nuisance, measured three times."""
    with (
        pyro.plate("designs", design.shape[-1], dim=-2) as _,
        pyro.plate_stack("pairs", design.shape[:-1], rightmost_dim=-3),
    ):
        drift = pyro.sample("drift", dist.Normal(0.0, 1.0))
        theta = pyro.sample("theta", dist.Normal(drift, 1.0))
        with pyro.plate("measurements", 3, dim=-1):
            pyro.sample("y", dist.Normal(design.unsqueeze(-1) * theta, 0.5))


@pytest.mark.slow
def test_measurements_in_an_inner_plate_beside_nuisances():
    truth = 0.5 * (1.0 + 3.0 * 2.0 * (DESIGNS / 0.5) ** 2).log()
    eig = ais_eig(hidden, DESIGNS, "y", "theta", num_pairs=150, num_steps=60, seed=0)
    assert_sandwiched(eig, truth, gap=0.4)


def parabola(design):
    """A posterior of two narrow modes, of which a fit holds one."""
    with pyro.plate_stack("designs", design.shape):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta.square(), 0.02 * design))


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")
@pytest.mark.parametrize(
    ("kind", "start"), [("one mode", "a fitted start"), ("two modes", "the prior")]
)
def test_chains_start_where_the_gap_is_smaller(kind, start):
    def line(design):
        with pyro.plate_stack("designs", design.shape):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(theta, 0.02 * design))

    options = {"num_pairs": 20, "num_steps": 20, "num_chains": 8, "seed": 0}
    model = line if kind == "one mode" else parabola
    eig = ais_eig(model, np.array([1.0, 2.0]), "y", **options)
    assert eig.notes[0].startswith(f"chains start from {start}")
    if kind == "one mode":  # 3.9 nats: ln(1 / .02)
        assert float(eig.gap.max()) < 1e-4
        plain = ais_eig(model, torch.tensor([1.0, 2.0]), "y", guide=None, **options)
        assert float(plain.gap.max()) > 0.1


def test_a_start_of_another_name_is_refused():
    with pytest.raises(ValueError, match=r'"best", "auto" or None, got \'bset\''):
        ais_eig(linear, torch.ones(1, 1), "y", "theta", guide="bset")
