"""Runs and sandwiches whose chains resample: certified on both sides, whatever the grouping."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pyro_anneal import HMC, AnnealedImportance, AnnealedRun, Linear, bounds
from pyro_anneal.chains.grouping import Grouping, choose_grouping
from pyro_anneal.chains.resampling import Resampling
from pyro_anneal.graphs.inductor import compiler_problem


def gaussian(x):
    """Two latents of which each datum sees the sum: x ~ N(0, 2 + .3^2)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 0.3), obs=x)


def truth(x):
    return torch.distributions.Normal(0.0, math.sqrt(2.09)).log_prob(x)


def annealed(model=gaussian, **options):
    defaults = {
        "num_chains": 32,
        "num_steps": 5,
        "schedule": Linear(),
        "step_size": 0.4,
        "kernel": HMC(1),
        "resampling": True,
        "progress_bar": False,
        "seed": 0,
    }
    return AnnealedImportance(model, **(defaults | options))


def is_one(values, num_errors=5.0):
    error = float(values.std() / math.sqrt(values.numel()))
    return error < 0.05 and abs(float(values.mean()) - 1.0) < num_errors * error


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")  # poor on purpose
@pytest.mark.parametrize("chains_at_once", [None, 8])
def test_all_bounds_of_a_sandwich_are_certified(chains_at_once):
    x = torch.zeros(3000, dtype=torch.float64)
    ais = annealed(
        num_chains=32 if chains_at_once is None else 16, chain_batch_size=chains_at_once
    )
    sandwich = ais.sandwich(x, bounds=("CR lower", "CR upper"), keep_samples=True)
    assert sandwich.forward.num_populations == sandwich.reverse.num_populations == 2
    assert float(sandwich.forward.num_resamplings.double().mean()) > 0.5
    exact = truth(sandwich.simulated["x"])
    for name in ("IM lower", "CR lower"):
        assert is_one((sandwich.bounds[name] - exact).exp()), name
    for name in ("CR upper", "IM upper"):
        assert is_one((exact - sandwich.bounds[name]).exp()), name
    assert float((sandwich.forward.lower - exact).mean()) < 0.0
    for level in (0.5, 0.9):
        low, high = sandwich.interval(level)
        covered = ((low <= exact) & (exact <= high)).double().mean()
        assert float(covered) > level - 5.0 * math.sqrt(level * (1.0 - level) / 3000)


def test_standard_errors_of_resampled_chains_are_those_of_repeats():
    x = torch.full((2000,), 1.5, dtype=torch.float64)  # each datum repeats the run
    run = annealed(num_chains=64, num_steps=8).run(x)
    assert run.num_populations == 4
    claimed = float(run.std_error.square().mean().sqrt())
    spread = float((run.lower - truth(x)).exp().std())
    assert 0.8 < claimed / spread < 1.4
    low, high = run.normal_interval(0.95)
    covered = ((low <= truth(x)) & (truth(x) <= high)).double().mean()
    assert 0.9 < float(covered) <= 1.0
    assert bool((run.interval(0.95)[0] <= truth(x)).double().mean() > 0.99)


def test_a_resampled_run_reports_its_populations_and_weighted_samples():
    x = torch.tensor([1.5, -0.5], dtype=torch.float64)
    run = annealed(num_chains=64, num_steps=40).run(x)
    assert run.population_size == 16
    assert run.population_estimates.shape == (4, 2)
    mean = run.population_estimates.logsumexp(0) - math.log(4.0)
    assert torch.allclose(run.lower, mean)
    assert run.num_resamplings.shape == (4, 2)
    assert bool((run.num_lineages <= 64).all() and (run.num_lineages >= 4).all())
    assert bool(run.thermodynamic_integration.std_error.isnan().all())
    assert "lineages" in run.summary()
    assert "at least (95%, guaranteed)" in run.summary()
    many = annealed(num_chains=4096, num_steps=20, chain_batch_size=1024).run(x)
    draws = many.resample(4000, seed=1)["z"].sum(-1)
    mean, error = 2.0 / 2.09 * x, math.sqrt(2.0 * 0.09 / 2.09)
    assert bool(((draws.mean(0) - mean).abs() < 0.05).all())
    assert bool(((draws.std(0) - error).abs() < 0.03).all())


@pytest.mark.skipif(compiler_problem(torch.device("cpu")) is not None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")  # poor on purpose
def test_chunks_of_native_code_resample_as_single_steps_do():
    x = torch.tensor([1.5, -0.5], dtype=torch.float64)
    native, single = (annealed(num_steps=20, compile=c).run(x) for c in (True, False))
    assert (native.density_mode, single.density_mode) == ("compiled loop", "graph")
    assert int(single.num_resamplings.min()) > 0
    assert torch.equal(native.ancestors, single.ancestors)
    assert torch.allclose(native.log_weights, single.log_weights, rtol=0.0, atol=1e-9)


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")  # poor on purpose
def test_chains_at_once_are_never_resampled_among_others():
    x = torch.tensor([1.5], dtype=torch.float64)
    run = annealed(num_chains=24, num_steps=30, chain_batch_size=8).run(x)
    assert run.population_size == 8
    for start in range(0, 24, 8):
        members = run.ancestors[start : start + 8]
        assert bool(((members >= start) & (members < start + 8)).all())
    with pytest.raises(ValueError, match="choose a chain_batch_size that divides num_chains"):
        annealed(num_chains=7, chain_batch_size=3).run(x)


def test_one_chain_has_nobody_to_resample_with():
    x = torch.tensor([1.5], dtype=torch.float64)
    one, plain = (annealed(num_chains=1, resampling=r).run(x) for r in (True, False))
    assert torch.equal(one.log_weights, plain.log_weights)
    assert one.population_size == 1


def test_batches_and_mutual_information_resample():
    x = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    options = {"num_chains": 64, "num_steps": 30}
    evidence = annealed(**options).run_batches(DataLoader(TensorDataset(x), batch_size=4))
    errors = evidence.std_error
    assert bool(((evidence.lower - truth(x)).abs() < 5.0 * errors).all())
    assert len(evidence.block_totals) in (1, 2, 4)
    assert bool(evidence.interval()[0] <= truth(x).sum())
    both = annealed(**options).mutual_information(x.new_zeros(150), num_simulations=2)
    exact = 0.5 * math.log(2.09 / 0.09)
    assert abs(float(both.lower) - exact) < 5.0 * float(both.lower_std_error) + 0.1
    assert abs(float(both.upper) - exact) < 5.0 * float(both.upper_std_error) + 0.1


def test_several_simulations_share_the_grouping_of_the_first():
    x = torch.zeros(2, dtype=torch.float64)
    sandwich = annealed(num_steps=30).sandwich(x, num_simulations=3)
    assert sandwich.forward.ancestors.shape == (32, 3, 2)
    assert sandwich.forward.num_resamplings.shape == (2, 3, 2)
    assert sandwich.lower.shape == sandwich.upper.shape == (3, 2)


def test_a_saved_run_comes_back_with_its_populations(tmp_path):
    x = torch.tensor([1.5], dtype=torch.float64)
    run = annealed(num_steps=20).run(x)
    run.save(tmp_path / "run")
    again = AnnealedRun.load(tmp_path / "run")
    assert torch.equal(again.ancestors, run.ancestors)
    assert torch.equal(again.interval()[0], run.interval()[0])
    assert torch.equal(again.std_error, run.std_error)


def peaked(x):
    """The likelihood is far narrower than the prior, so that weights of few steps differ."""
    z = pyro.sample("z", dist.Normal(x.new_zeros(10), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 0.02).to_event(1), obs=x)


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")
def test_auto_asks_the_pilot_and_nobody_else():
    options = {"resampling": "auto", "schedule": "adaptive", "step_size": None}
    x = torch.full((10,), 1.0, dtype=torch.float64)
    hard = annealed(peaked, num_steps=50, **options).run(x)
    easy = annealed(gaussian, num_steps=200, **options).run(x[:2])
    assert hard.pilot.expected_variance > 1.0 > easy.pilot.expected_variance
    assert (hard.population_size, easy.population_size) == (16, 1)
    again = annealed(peaked, num_steps=50, **(options | {"seed": 9})).run(x)
    assert again.population_size == 16
    exact = torch.distributions.Normal(0.0, math.sqrt(1.0004)).log_prob(x).sum()
    plain = annealed(peaked, num_steps=50, **(options | {"resampling": False})).run(x)
    assert abs(float(hard.lower - exact)) < abs(float(plain.lower - exact))


@pytest.mark.parametrize(
    ("given", "size", "num_points"),
    [
        ({"num_chains": 64, "length": 20.0}, 16, 30),
        ({"num_chains": 4096, "length": 1.0}, 512, 10),
        ({"num_chains": 100, "length": 200.0}, 20, 100),
        ({"num_chains": 6}, 6, 50),
        ({"num_chains": 32, "chains_at_once": 8}, 8, 50),
    ],
)
def test_populations_and_points_follow_from_the_numbers(given, size, num_points):
    grouping = choose_grouping(True, num_steps=500, **given)
    assert grouping.population_size == size
    assert len(grouping.resampling.points) == num_points
    assert all(0 < point < 500 for point in grouping.resampling.points)
    assert Grouping.from_dict(grouping.to_dict()) == grouping
    assert choose_grouping(False, num_steps=500, **given).resampling is None


def test_auto_leaves_small_populations_and_unknown_paths_alone():
    assert choose_grouping("auto", num_chains=64, num_steps=9, variance=5.0).population_size == 16
    for given in ({"num_chains": 4, "variance": 5.0}, {"num_chains": 64}):
        assert choose_grouping("auto", num_steps=9, **given).resampling is None


def test_intervals_of_plain_runs_are_narrower_than_markov_and_cover():
    x = torch.linspace(-2.0, 2.0, 400, dtype=torch.float64)
    run = annealed(resampling=False, num_chains=64, num_steps=40).run(x)
    num_blocks, kept = run.blocks
    assert num_blocks > 1
    low, high = run.interval(0.95)
    means = bounds.block_means(run.log_weights, num_blocks)
    assert torch.equal(low, bounds.limit_of_blocks(means, 0.95, num_kept=kept))
    assert bool((high == math.inf).all())
    assert float((low <= truth(x)).double().mean()) > 0.99
    assert float((truth(x) - low).mean()) < 2.0 < math.log(20.0)
    total = run.interval(0.95, total=True)[0]
    assert bool(total <= truth(x).sum())


def test_points_of_a_resampling_lie_inside_the_path():
    resampling = Resampling(4, (1, 3, 9))
    assert resampling.reverse_points(10) == (2, 8, 10)
