"""The pilot against Gaussian paths whose best schedule is known in closed form."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from paths import LOG_2PI, Counted, lopsided

import pyro_anneal.anneal
from pyro_anneal import AnnealedImportance
from pyro_anneal.chains.path import TuningTable
from pyro_anneal.chains.pilot import Pilot, PilotOutcome, adaptive_betas, run_pilot
from pyro_anneal.kernels import HMC, RandomWalk, State
from pyro_anneal.persistence.randomness import seeded_generator
from pyro_anneal.schedules import as_betas


class Narrowing:
    """From N(0, I) to N(0, diag(scales^2)): Gaussian at every beta, per batch element."""

    def __init__(self, scales):
        self.precision = scales**-2.0  # [*batch, D]

    def at(self, beta):
        """Computes the standard deviation of the path at ``beta``."""
        return (1.0 + beta * (self.precision - 1.0)).rsqrt()

    def __call__(self, position):
        base = -0.5 * (position.square() + LOG_2PI).sum(-1)
        target = -0.5 * (self.precision * position.square()).sum(-1)
        return State(position, base, target, -position, -self.precision * position)


def pilot(density, kernel, position, *, seed=0, **settings):
    generator = seeded_generator(torch.device("cpu"), seed, "pilot")
    return run_pilot(density, kernel, density(position), generator, settings=Pilot(**settings))


# --- the schedule -----------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "dim"), [(0.01, 2), (0.1, 4), (30.0, 3)])
def test_betas_lie_at_equal_thermodynamic_length(scale, dim):
    # Var_beta[log p - log q] = D / 2 (a / (1 + a beta))^2 with a = 1 / scale^2 - 1: betas of equal
    # length are equally spaced in log(1 + a beta)
    density = Narrowing(torch.full((dim,), scale))
    outcome = pilot(density, HMC(3), torch.randn(2000, dim), num_moves=8)
    rise = scale**-2.0 - 1.0
    progress = torch.log1p(rise * adaptive_betas(outcome, 40)) / math.log1p(rise)
    assert (progress - torch.linspace(0.0, 1.0, 41)).abs().max() < 0.05


@pytest.mark.parametrize(
    ("scale", "dim", "tolerance"),
    [(0.01, 2, 0.04), (0.1, 4, 0.04), (30.0, 3, 0.08)],  # widening: weights of heavy tails
)
def test_stages_keep_the_fraction_of_effective_particles(scale, dim, tolerance):
    # a stage that multiplies the path's precision by g keeps ((2 g - 1) / g^2)^(D / 2) of them:
    # with f that fraction to the power 2 / D, g = (1 +- sqrt(1 - f)) / f
    density = Narrowing(torch.full((dim,), scale))
    outcome = pilot(density, HMC(3), torch.randn(4000, dim), num_moves=8)
    fraction = 0.6 ** (2.0 / dim)
    sign = 1.0 if scale < 1.0 else -1.0
    growth = (1.0 + sign * math.sqrt(1.0 - fraction)) / fraction
    precision = density.at(torch.tensor(outcome.tuning.betas).unsqueeze(-1))[:, 0] ** -2.0
    ratios = precision.log().diff()[:-1]  # the last stage ends at beta = 1
    assert ((ratios / math.log(growth) - 1.0).abs() < 5.0 * tolerance).all()
    assert float(ratios.mean()) == pytest.approx(math.log(growth), rel=tolerance)
    kept = torch.tensor(outcome.ess_fraction)
    assert kept[0] == 1.0
    assert torch.allclose(kept[1:-1], torch.tensor(0.6), atol=1e-6)
    assert kept[-1] >= 0.6 - 1e-6


@pytest.mark.parametrize(("scale", "dim"), [(0.1, 4), (30.0, 3)])
def test_the_length_of_small_stages_is_the_thermodynamic_length(scale, dim):
    density = Narrowing(torch.full((dim,), scale))
    outcome = pilot(density, HMC(3), torch.randn(2000, dim), num_moves=4, ess_fraction=0.97)
    length = math.sqrt(dim / 2) * abs(math.log(scale**-2.0))
    assert outcome.lengths[-1] == pytest.approx(length, rel=0.1)


def test_few_chains_find_the_schedule_too():
    density = Narrowing(torch.full((200, 2), 0.01))  # a batch of 200 shares the betas
    outcome = pilot(density, HMC(3), torch.randn(16, 200, 2))
    betas = adaptive_betas(outcome, 40)
    progress = torch.log1p((1e4 - 1.0) * betas) / math.log(1e4)
    assert (progress - torch.linspace(0.0, 1.0, 41)).abs().max() < 0.1


def outcome_of(betas, lengths):
    stages = len(betas)
    table = TuningTable(tuple(betas), torch.zeros(stages), torch.zeros(stages, 1))
    ones = (1.0,) * stages
    return PilotOutcome(
        table, tuple(lengths), ones, ones, 1, 4, torch.zeros(4, 1), torch.zeros(())
    )


def test_adaptive_betas_by_hand():
    outcome = outcome_of([0.0, 0.1, 1.0], [0.0, 3.0, 4.0])
    expected = [0.0, 0.1 / 3.0, 0.2 / 3.0, 0.1, 1.0]
    assert adaptive_betas(outcome, 4).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("num_steps", [1, 2, 500])
def test_adaptive_betas_are_a_valid_schedule_when_stages_have_no_length(num_steps):
    for lengths in ([0.0, 0.0, 0.0, 2.0], [0.0, 2.0, 2.0, 2.0], [0.0] * 4):
        outcome = outcome_of([0.0, 1e-30, 0.5, 1.0], lengths)
        betas = adaptive_betas(outcome, num_steps)
        assert as_betas(betas, num_steps).shape == (num_steps + 1,)  # strictly increasing


def test_a_target_equal_to_the_base_needs_no_stages():
    outcome = pilot(Narrowing(torch.ones(2)), HMC(), torch.randn(16, 2))
    assert outcome.tuning.betas == (0.0, 1.0)
    assert outcome.lengths == pytest.approx((0.0, 0.0), abs=1e-6)
    expected = [0.0, 0.25, 0.5, 0.75, 1.0]
    assert adaptive_betas(outcome, 4).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("power", [30, 90])
def test_a_heavy_tailed_start_gives_a_tiny_first_beta(power):
    # a log-likelihood near -10^power for a typical draw from the base, a few nats at u = -3
    steep = power * math.log(10.0) / 3.0

    def heavy(position):
        u = position[..., 0]
        base = -0.5 * (u.square() + LOG_2PI)
        fall = (steep * (u + 3.0)).exp()
        grad = torch.stack([-u - steep * fall], dim=-1)
        return State(position, base, base - fall, -position, grad)

    outcome = pilot(heavy, HMC(2), torch.randn(64, 1), num_chains=64)
    betas = torch.tensor(outcome.tuning.betas, dtype=torch.float64)
    assert 0.0 < betas[1] < 10.0 ** (-0.9 * power)
    assert betas[-1] == 1.0
    assert len(betas) < 300
    assert outcome.tuning.log_step_size.isfinite().all()
    assert outcome.tuning.log_scale.isfinite().all()
    assert all(math.isfinite(length) for length in outcome.lengths)
    assert as_betas(adaptive_betas(outcome, 1000)).shape == (1001,)


def test_particles_without_density_are_replaced():
    def half(position):
        state = Narrowing(torch.full((1,), 0.1))(position)
        outside = position[..., 0] < 0.0
        return state._replace(log_target=torch.where(outside, math.nan, state.log_target))

    outcome = pilot(half, HMC(2), torch.randn(32, 5, 1))
    assert outcome.tuning.betas[-1] == 1.0
    assert (outcome.position > 0.0).all()
    assert outcome.tuning.log_step_size.isfinite().all()


def test_stages_are_limited():
    density = Narrowing(torch.full((2,), 0.001))
    outcome = pilot(density, HMC(2), torch.randn(16, 2), max_stages=3)
    assert len(outcome.tuning.betas) == 4
    assert outcome.tuning.betas[-1] == 1.0


# --- step sizes and scales --------------------------------------------------------------------


@pytest.mark.parametrize(
    "kernel", [HMC(1), HMC(3), HMC(2, target_accept=0.9), RandomWalk()], ids=repr
)
def test_acceptance_at_the_knots_is_near_its_target(kernel):
    # judged by fresh, exact draws of the path, not by the pilot's own chains
    density = Narrowing(torch.tensor([[0.02, 0.3, 0.5], [2.0, 0.7, 5.0]]).repeat(20, 1))
    outcome = pilot(density, kernel, torch.randn(32, 40, 3), num_chains=32)
    generator = torch.Generator().manual_seed(9)
    accepts = []
    for beta in outcome.tuning.betas[1:]:
        state = density(density.at(beta) * torch.randn(400, 40, 3))
        noise = kernel.noise(state, generator)
        tuning = outcome.tuning.at(beta)
        _, info = kernel.step(state, density, torch.tensor(beta), tuning, noise)
        accepts.append(float(info.accept_prob.mean()))
    assert max(abs(accept - kernel.target_accept) for accept in accepts) < 0.12
    assert sum(accepts) / len(accepts) == pytest.approx(kernel.target_accept, abs=0.06)


def test_scales_follow_the_path_per_coordinate_and_batch_element():
    scales = torch.tensor([[0.01, 3.0], [1.0, 0.1]])
    density = Narrowing(scales)
    outcome = pilot(density, HMC(2), torch.randn(64, 2, 2), num_chains=64)
    for beta in (outcome.tuning.betas[len(outcome.tuning.betas) // 2], 1.0):
        ratio = outcome.tuning.at(beta).scale / density.at(beta)
        assert 0.5 < ratio.min()
        assert ratio.max() < 2.0


def test_kernels_without_a_target_keep_their_step_size():
    class Untuned(RandomWalk):
        target_accept = None

        def __init__(self):
            pass

    outcome = pilot(Narrowing(torch.full((4,), 0.1)), Untuned(), torch.randn(16, 4))
    assert torch.allclose(
        outcome.tuning.log_step_size, torch.tensor(-0.25 * math.log(4.0)), rtol=1e-12
    )


# --- bookkeeping ------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [HMC(1), HMC(3), RandomWalk()], ids=repr)
def test_gradients_are_counted(kernel):
    density = Counted(lopsided())
    outcome = pilot(density, kernel, density.density.draw_base(16))
    assert outcome.num_gradients == density.count


def test_the_pilot_is_a_function_of_its_generator():
    density = lopsided()
    position = density.draw_base(16)
    first, again, other = (pilot(density, HMC(), position, seed=seed) for seed in (1, 1, 2))
    assert first.tuning.betas == again.tuning.betas
    assert torch.equal(first.tuning.log_step_size, again.tuning.log_step_size)
    assert not torch.equal(first.tuning.log_step_size, other.tuning.log_step_size)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_chains": 3}, "num_chains must be at least 4, got 3"),
        ({"num_moves": 0}, "num_moves must be at least 1, got 0"),
        ({"ess_fraction": 1.0}, r"ess_fraction must lie in \(0, 1\), got 1.0"),
        ({"ess_fraction": 0.0}, r"ess_fraction must lie in \(0, 1\), got 0.0"),
        ({"max_stages": 0}, "max_stages must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range(setting, message):
    with pytest.raises(ValueError, match=message):
        Pilot(**setting)


def test_the_number_of_particles_follows_the_run_within_limits():
    assert [Pilot().chains_for(k) for k in (1, 16, 40, 1000)] == [16, 16, 40, 64]
    assert Pilot(num_chains=7).chains_for(1000) == 7


# --- frozen, and blind to the posterior sample ------------------------------------------------


def conjugate(x):
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(1.0, 2.0))
        pyro.sample("x", dist.Normal(z, 0.3), obs=x)


DATA = [0.3, -2.0, 5.0]


def recorded_paths(monkeypatch):
    """Records the path object that each annealing loop is given."""
    paths, original = {}, pyro_anneal.runs.blocks.run_chains

    def record(density, path, state, *, direction, seed, stream, **kwargs):
        paths[stream] = path
        return original(
            density, path, state, direction=direction, seed=seed, stream=stream, **kwargs
        )

    monkeypatch.setattr(pyro_anneal.runs.blocks, "run_chains", record)
    return paths


@pytest.mark.filterwarnings("ignore::pyro_anneal.diagnostics.AnnealingWarning")
def test_both_directions_use_the_same_frozen_path(monkeypatch):
    paths = recorded_paths(monkeypatch)
    ais = AnnealedImportance(conjugate, num_chains=4, num_steps=20, progress_bar=False, seed=0)
    result = ais.sandwich(torch.tensor(DATA), bounds=("CR lower", "CR upper"))
    assert set(paths) == {"forward", "reverse", "coupled reverse"}
    assert len({id(path) for path in paths.values()}) == 1
    table = paths["forward"].tuning
    assert len(table.betas) > 2  # something was tuned
    assert torch.equal(result.forward.betas, result.reverse.betas)
    assert torch.equal(result.forward.step_size, result.reverse.step_size)


@pytest.mark.filterwarnings("ignore::pyro_anneal.diagnostics.AnnealingWarning")
def test_the_pilot_never_sees_the_posterior_sample(monkeypatch):
    # the same simulated x with another z*: pilot and forward chains must not notice
    original = pyro_anneal.runs.pairs.simulate
    results, tables = [], []
    for shift in (0.0, 0.7):

        def simulate(*args, shift=shift, **kwargs):
            simulation = original(*args, **kwargs)
            for name, value in simulation.latents.items():
                simulation.latents[name] = value + shift
            return simulation

        with monkeypatch.context() as patch:
            patch.setattr(pyro_anneal.runs.pairs, "simulate", simulate)
            paths = recorded_paths(patch)
            ais = AnnealedImportance(
                conjugate, num_chains=4, num_steps=20, progress_bar=False, seed=0
            )
            results.append(ais.sandwich(torch.tensor(DATA)))
            tables.append(paths["forward"])
    first, second = tables
    assert torch.equal(first.betas, second.betas)
    assert torch.equal(first.tuning.log_step_size, second.tuning.log_step_size)
    assert torch.equal(first.tuning.log_scale, second.tuning.log_scale)
    assert torch.equal(results[0].forward.log_weights, results[1].forward.log_weights)
    assert not torch.isclose(results[0].reverse.log_weights, results[1].reverse.log_weights).any()


# --- its cost ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_chains", "num_moves"), [(8, 480), (4, 60), (64, 1000), (200, 100)])
def test_a_limited_pilot_costs_a_quarter_of_the_run(num_chains, num_moves):
    settings = Pilot().within(num_chains, num_moves)
    particles = settings.chains_for(num_chains)
    assert 8 <= particles <= 64
    density = Narrowing(torch.tensor([0.05, 0.2, 0.3]))
    outcome = run_pilot(
        density, HMC(2), density(torch.randn(particles, 3)),
        seeded_generator(torch.device("cpu"), 0, "pilot"), settings=settings,
    )  # fmt: skip
    moves = (outcome.num_gradients - 1) // 2
    stages = len(outcome.tuning.betas)
    quarter = num_chains * num_moves // (4 * particles)
    assert moves <= max(quarter, 12, 4 + stages)  # a stage has one at least
    assert 0.4 < outcome.accept_prob[-1] <= 1.0
