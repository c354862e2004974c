"""Starts that hold: the defensive mixture, and the cross-check from the prior."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.integrate import quad

from pyro_anneal import AnnealedImportance, AnnealingWarning
from pyro_anneal.problems import fitted, several
from pyro_anneal.problems.branches import branch_optima
from pyro_anneal.problems.content import Remembered
from pyro_anneal.problems.populations import draw_population
from pyro_anneal.problems.problem import prepare
from pyro_anneal.problems.rows import Rows

X = torch.tensor(9.0)


def two_modes(x):
    """Posterior modes near -3 and 3, unequal: the prior leans to the right."""
    z = pyro.sample("z", dist.Normal(0.5, 3.0))
    pyro.sample("x", dist.Normal(z.square(), 0.5), obs=x)


def one_mode(x):
    z = pyro.sample("z", dist.Normal(0.5, 3.0))
    pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def _normal(value, loc, scale):
    return np.exp(-0.5 * ((value - loc) / scale) ** 2) / (scale * math.sqrt(2.0 * math.pi))


def _truth():
    density = lambda z: _normal(z, 0.5, 3.0) * _normal(9.0, z**2, 0.5)
    return math.log(quad(density, -5, 0, points=[-3])[0] + quad(density, 0, 5, points=[3])[0])


def engine(model, **options):
    settings = {"num_chains": 64, "num_steps": 300, "progress_bar": False, "seed": 0}
    return AnnealedImportance(model, "auto", **{**settings, **options})


@pytest.fixture
def one_fit(monkeypatch):
    """Fits one Gaussian and no more, as in many dimensions or on many data."""
    monkeypatch.setattr(several, "_MOST_DIMENSIONS", 0)
    monkeypatch.setattr(fitted, "prior_weight_for", lambda *arguments, **options: 0.0)
    monkeypatch.setattr(fitted, "_FITS", Remembered())  # no fit that other tests left


def test_several_fits_find_both_modes():
    run = engine(two_modes, cross_check=False).run(X)
    assert abs(run.lower - _truth()) < 5.0 * run.std_error + 1e-3
    assert run.std_error < 0.05
    assert run.ess > 50.0


def test_a_fitted_start_misses_a_mode_without_knowing(one_fit):
    """The failure that the other tests guard against: a good effective sample size, wrong."""
    run = engine(two_modes, cross_check=False).run(X)
    assert run.ess > 60.0
    assert run.diagnostics == ()
    assert run.lower < _truth() - 0.3


def test_the_scout_sees_the_other_mode_by_default(one_fit):
    with pytest.warns(AnnealingWarning, match="from the prior disagree with this start"):
        run = engine(two_modes).run(X)
    (found,) = run.diagnostics
    assert found.name == "modes"
    assert 0.2 < found.value < 0.8  # about half of the mass lies in the other mode


def test_the_scout_sees_what_a_little_prior_leaves_out(one_fit):
    """Two chains of a hundred from the prior do not find the mode; density there proves nothing."""
    with pytest.warns(AnnealingWarning, match="from the prior disagree with this start"):
        run = engine(two_modes, prior_weight=0.01).run(X)
    assert run.lower < _truth() - 0.2
    assert "modes" in {found.name for found in run.diagnostics}


def test_the_scout_believes_a_defensive_start_that_found_the_mode(one_fit):
    run = engine(two_modes, prior_weight=0.5, num_chains=256).run(X)
    assert abs(run.lower - _truth()) < 5.0 * run.std_error
    assert "modes" not in {found.name for found in run.diagnostics}


def test_the_scout_passes_an_easy_posterior():
    assert engine(one_mode).run(X).diagnostics == ()


def test_cross_check_says_that_starts_disagree(one_fit):
    with (
        pytest.warns(AnnealingWarning, match="from the prior finds .* nats more evidence"),
        pytest.warns(AnnealingWarning, match="came down from the prior disagree"),
    ):
        run = engine(two_modes, cross_check=True).run(X)
    assert [found.name for found in run.diagnostics] == ["modes", "starts"]


def test_cross_check_of_the_prior_finds_the_spike():
    """Chains from the prior see the slab alone; a fit knows both phases."""
    options = {"num_chains": 16, "num_steps": 100, "progress_bar": False, "seed": 0}
    with (
        pytest.warns(AnnealingWarning, match="starting from a fit finds 2.* nats more evidence"),
        pytest.warns(AnnealingWarning, match="no or too few chains ended there"),
    ):
        run = AnnealedImportance(spike_and_slab, None, cross_check=True, **options).run(
            0.05, 0.9, 10
        )
    assert [found.name for found in run.diagnostics] == ["modes", "starts"]


def test_cross_check_passes_an_easy_posterior():
    assert engine(one_mode, cross_check=True).run(X).diagnostics == ()


def test_a_defensive_start_finds_both_modes(one_fit):
    run = engine(two_modes, prior_weight=0.5, num_chains=128).run(X)
    assert abs(run.lower - _truth()) < 5.0 * run.std_error
    assert run.std_error < 0.15  # half the mass of a mode is 0.3 nats and more


def test_the_mixture_is_normalized():
    """Its density, through the captured graph, integrates to one over u."""
    arguments = ((X,), {})
    problem = prepare(
        one_mode,
        "auto",
        arguments,
        arguments,
        num_chains=4001,
        batch_plates="auto",
        compile=False,
        seed=0,
        prior_weight=0.3,
    )
    grid = torch.linspace(-25.0, 25.0, 4001)
    total = torch.trapezoid(problem.density(grid.unsqueeze(-1)).log_base.exp(), grid)
    assert float(total) == pytest.approx(1.0, abs=1e-8)


def test_cross_check_is_checked():
    with pytest.raises(ValueError, match='cross_check must be "auto", True or False'):
        engine(one_mode, cross_check="always")


@pytest.mark.parametrize("weight", [-0.1, 1.0])
def test_the_weight_is_checked(weight):
    with pytest.raises(ValueError, match=r"prior_weight must lie in \[0, 1\)"):
        engine(one_mode, prior_weight=weight)


def spike_and_slab(width, share, dim, shift=0.0):
    """A normalized mixture of two phases, the narrow one with ``share`` and ``shift`` aside."""
    x = pyro.sample("x", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
    phases = []
    for scale, weight, loc in ((0.5, 1.0 - share, 1.0), (width, share, 1.0 + shift)):
        centre = torch.full((dim,), loc)
        evidence = dist.Normal(torch.zeros(dim), math.hypot(1.0, scale)).log_prob(centre).sum()
        likelihood = dist.Normal(centre, scale).log_prob(x).sum()
        phases.append(likelihood - evidence + math.log(weight))
    pyro.factor("phases", torch.logaddexp(*phases))


@pytest.mark.parametrize(
    ("width", "share", "dim", "shift"),
    [
        (0.01, 0.9, 10, 0.0),
        (0.02, 0.9, 10, 0.4),  # no gradient of the slab leads there
        pytest.param(0.05, 0.5, 10, -0.4, marks=pytest.mark.slow),
        pytest.param(0.1, 0.9, 10, 0.0, marks=pytest.mark.slow),
        pytest.param(0.05, 0.3, 5, 0.0, marks=pytest.mark.slow),
    ],
)
def test_both_phases_are_in_the_fit(width, share, dim, shift):
    """Their evidence is 1 by construction; one phase alone gives log of its share."""
    run = engine(spike_and_slab, num_steps=50).run(width, share, dim, shift)
    assert abs(float(run.lower)) < 0.02 + 5.0 * float(run.std_error)
    assert float(run.std_error) < 0.03
    assert run.diagnostics == ()


@pytest.mark.parametrize(
    ("width", "share", "shift"), [(0.1, 0.9, 0.0), (0.02, 0.9, 0.4), (0.05, 0.5, 0.4)]
)
def test_a_run_from_the_prior_says_which_phase_it_overlooked(width, share, shift):
    options = {"num_chains": 32, "num_steps": 60, "progress_bar": False, "seed": 0}
    with pytest.warns(AnnealingWarning, match="no or too few chains ended there"):
        run = AnnealedImportance(spike_and_slab, None, **options).run(width, share, 10, shift)
    assert float(run.lower) < 0.5 * math.log(1.0 - share)
    (found,) = [each for each in run.diagnostics if each.name == "modes"]
    # what it missed over what it found: the shares of both phases
    expected = math.exp(-float(run.lower)) * share
    assert found.value == pytest.approx(expected, rel=0.05)


def test_a_run_from_the_prior_that_entered_both_phases_passes():
    """In one dimension chains fall into the spike; its Gaussian and their ends then agree."""
    options = {"num_chains": 512, "num_steps": 100, "progress_bar": False, "seed": 0}
    run = AnnealedImportance(spike_and_slab, None, **options).run(0.1, 0.5, 1, 0.4)
    assert abs(float(run.lower)) < 5.0 * float(run.std_error)
    assert "modes" not in {found.name for found in run.diagnostics}


def three_phases(data):
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 3.0).to_event(1))
    near, middle, far = (dist.Normal(loc, 0.01).log_prob(x).sum() for loc in (-2.0, 0.5, 4.0))
    pyro.factor("phases", torch.logaddexp(torch.logaddexp(near, middle), far))
    with pyro.plate("data", len(data)):  # one sum per datum is no phase
        terms = dist.Normal(torch.tensor([0.0, 9.0]), 50.0).log_prob(data[:, None])
        pyro.sample("y", dist.Normal(x[0] + terms.logsumexp(-1), 1e4), obs=data)


def test_every_term_of_a_mixture_in_the_model_is_a_branch():
    arguments = ((torch.arange(5.0),), {})
    problem = prepare(
        three_phases,
        None,
        arguments,
        arguments,
        num_chains=2,
        batch_plates="auto",
        compile=False,
        seed=0,
    )
    optima, spent = branch_optima(problem.model, torch.zeros(3), torch.Generator())
    assert spent > 0
    found = optima.mean(-1).sort().values
    assert torch.allclose(found, torch.tensor([-2.0, 0.5, 4.0]).to(found), atol=1e-2)
    assert len(branch_optima(_plain().model, torch.zeros(1), torch.Generator())[0]) == 0


def _plain():
    arguments = ((X,), {})
    options = {"num_chains": 2, "batch_plates": "auto", "compile": False, "seed": 0}
    return prepare(two_modes, None, arguments, arguments, **options)


def test_a_population_weighs_what_the_base_misses():
    """A base that knows one of two modes; particles from the prior find the other."""
    problem = _plain()
    rows = Rows(problem.density, 128, 0)
    base = dist.Normal(torch.tensor([3.0]).to(problem.layout.dtype), 0.2)
    generator = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(8):
        found = draw_population(
            rows,
            problem.draw_prior,
            lambda count: base.sample((count,)),
            lambda position: base.log_prob(position).sum(-1),
            generator,
        )
        shares.append(float(found.weights[found.position[:, 0] < 0.0].sum()))
        assert float(found.weights.sum()) == pytest.approx(1.0)
    low = quad(lambda z: _normal(z, 0.5, 3.0) * _normal(9.0, z**2, 0.5), -5, 0, points=[-3])[0]
    expected = low / math.exp(_truth())
    # both sides count, and the base's knows nothing of it: between a half and all of the truth
    error = np.std(shares) / math.sqrt(len(shares))
    assert 0.45 * expected - 4.0 * error < np.mean(shares) < expected + 4.0 * error
    assert np.mean(shares) > 4.0 * error


def far_modes(loc):
    """Unit Gaussians far apart, normalized, under a wide prior."""
    prior = dist.Normal(torch.zeros(loc.shape[-1]), 40.0).to_event(1)
    x = pyro.sample("x", prior)
    modes = dist.Normal(loc, 1.0).to_event(1).log_prob(x).logsumexp(0) - math.log(len(loc))
    pyro.factor("modes", modes - prior.log_prob(x))


def _forty():
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(40, 50, generator=generator) * 2.0 - 1.0) * 40.0


@pytest.mark.slow
def test_far_modes_that_the_model_names_are_all_in_the_fit():
    run = engine(far_modes, num_steps=20).run(_forty())
    assert abs(float(run.lower)) < 0.01
    assert run.diagnostics == ()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"prior_weight": 0.5}])
def test_missed_modes_of_many_are_flagged(options, seed, monkeypatch):
    """As where a model does not name its modes."""
    monkeypatch.setattr(
        several, "branch_optima", lambda model, origin, generator: (origin.new_empty(0, 50), 0)
    )
    monkeypatch.setattr(fitted, "_FITS", Remembered())
    loc = _forty()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AnnealingWarning)
        run = engine(far_modes, num_steps=100, **{"seed": seed, **options}).run(loc)
    assert abs(float(run.lower)) < 0.2 or "modes" in {found.name for found in run.diagnostics}
