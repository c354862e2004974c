"""The identities behind the bounds: E[w] = Z, E[1/w] = 1/Z, E[e^L] = Z, E[e^-U] = 1/Z.

They hold at any T, with any valid kernel, however poor: so they are tested with few steps and poor
kernels on lopsided targets. Every batch element is an independent repeat. Deliberately broken
kernels must fail the very same check.
"""

import math

import pytest
import torch
from paths import lopsided, lopsided_gaussian
from transitions import AdaptingHMC, CachedMixtureHMC, GibbsScan, MetropolisScan

from pyro_anneal import bounds
from pyro_anneal.chains.loop import run_chains
from pyro_anneal.chains.path import Path, TuningTable
from pyro_anneal.chains.pilot import Pilot, adaptive_betas, run_pilot
from pyro_anneal.kernels import HMC, RandomWalk
from pyro_anneal.persistence.randomness import seeded_generator
from pyro_anneal.schedules import Linear, LogUniform, Power, Sigmoid

NUM_CHAINS = 3
NUM_REPEATS = 20_000
NUM_STEPS = 8
NUM_PILOTS = 500  # tuned apart, and frozen for the repeats that share them
LARGEST_STD_ERROR = 0.005
KERNELS = {  # with step sizes far from the best ones
    "HMC, 1 leapfrog": (HMC(1), 0.5),
    "HMC, 3 leapfrogs": (HMC(3), 0.4),
    "random walk": (RandomWalk(), 0.8),
    "non-reversible scan": (MetropolisScan(), 0.9),
}
SCHEDULES = [Linear(), LogUniform(0.1), "adaptive", Sigmoid(4.0), Power(2.0)]
DEFAULT = [("HMC, 1 leapfrog", Linear()), ("HMC, 1 leapfrog", LogUniform(0.1))]
MIXED = {"IM upper", "CR lower", "IR lower"}  # need forward and reverse chains of one path


def identities(density, path, *, num_repeats=NUM_REPEATS):
    """Draws variables whose expectation is 1 if the identities hold, ``[repeats]`` each."""
    chains = (NUM_CHAINS, num_repeats)

    def anneal(position, direction, stream):
        state = density(position)
        return run_chains(density, path, state, direction=direction, seed=1, stream=stream)[0]

    end, forward, _ = anneal(density.draw_base(*chains), "forward", "forward")
    one = density.draw_target(1, num_repeats)
    from_one = anneal(one.expand(*chains, -1), "reverse", "one start").log_weights
    from_many = anneal(density.draw_target(*chains), "reverse", "many starts").log_weights
    again = end.position[:1].expand(NUM_CHAINS - 1, num_repeats, -1)
    coupled = anneal(again, "reverse", "coupled").log_weights
    first = forward[:1]
    lower = {
        "w": forward.flatten(),
        "IM lower": bounds.independent_multi_lower(forward),
        "CR lower": bounds.coupled_lower(first, coupled),
        "IR lower": bounds.independent_reverse_lower(first, from_many[1:]),
    }
    upper = {
        "1/w": from_many.flatten(),
        "IM upper": bounds.independent_multi_upper(from_one[:1], forward[1:]),
        "CR upper": bounds.coupled_upper(from_one),
        "IR upper": bounds.independent_reverse_upper(from_many),
    }
    log_z = density.log_normalizer
    return {name: (value - log_z).exp() for name, value in lower.items()} | {
        name: (log_z - value).exp() for name, value in upper.items()
    }


def deviation(values):
    """Returns mean minus 1 in standard errors, and the standard error, which must be small."""
    std_error = float(values.std() / math.sqrt(len(values)))
    assert std_error <= LARGEST_STD_ERROR
    return (float(values.mean()) - 1.0) / std_error


def violated(values):
    """Names the identities that are off by more than 5 standard errors."""
    return {name for name, value in values.items() if abs(deviation(value)) > 5.0}


def frozen_path(density, kernel, step_size, schedule, *, num_repeats=NUM_REPEATS):
    """Freezes a path: of one step size, or of the pilot's betas and step sizes."""
    if schedule != "adaptive":
        table = TuningTable.constant(step_size, density.draw_base(num_repeats))
        return Path(schedule(NUM_STEPS), kernel, table)
    settings = Pilot(num_chains=8, num_moves=2)
    start = density(density.draw_base(settings.num_chains, NUM_PILOTS))
    generator = seeded_generator(start.position.device, 1, "pilot")
    outcome = run_pilot(density, kernel, start, generator, settings=settings)
    copies = num_repeats // NUM_PILOTS
    knots, log_step_size, log_scale = (
        outcome.tuning.betas,
        torch.cat([outcome.tuning.log_step_size] * copies, dim=1),
        outcome.tuning.log_scale.repeat(1, copies, 1),
    )
    table = TuningTable(knots, log_step_size, log_scale)
    return Path(adaptive_betas(outcome, NUM_STEPS), kernel, table)


def combinations():
    """Every kernel with the pilot's schedule, and an even and a steep one; others are slow."""
    for name in KERNELS:
        for schedule in SCHEDULES:
            is_default = schedule == "adaptive" or (name, schedule) in DEFAULT
            marks = () if is_default else pytest.mark.slow
            yield pytest.param(name, schedule, marks=marks, id=f"{name}-{schedule!r}")


@pytest.mark.parametrize(("name", "schedule"), list(combinations()))
def test_identities_hold_with_poor_kernels(name, schedule):
    density = lopsided()
    path = frozen_path(density, *KERNELS[name], schedule)
    values = identities(density, path)
    assert len(values) == 8
    assert violated(values) == set()


def test_chains_are_far_from_equilibrium():
    # the identities above would hold trivially if every weight were Z
    density = lopsided()
    path = frozen_path(density, *KERNELS["HMC, 1 leapfrog"], Linear())
    values = identities(density, path)
    assert float(values["w"].std()) > 0.5
    assert float(values["w"].log().mean()) < -0.1  # dissipation: the bound is loose
    assert float(values["1/w"].log().mean()) < -0.1


def gibbs_values(reverses):
    density = lopsided_gaussian()
    kernel = GibbsScan(density, reverses=reverses)
    table = TuningTable.constant(1.0, density.draw_base(45_000))
    return identities(density, Path(Linear()(10), kernel, table), num_repeats=45_000)


def test_gibbs_scan_with_its_reversal():
    assert violated(gibbs_values(reverses=True)) == set()


def test_gibbs_scan_without_its_reversal_is_caught_by_the_mixed_bounds_alone():
    # each scan leaves the path invariant, so one direction alone sees nothing
    assert violated(gibbs_values(reverses=False)) == MIXED


def test_density_cached_across_betas_is_caught():
    density = lopsided()
    table = TuningTable.constant(0.8, density.draw_base(NUM_REPEATS))
    bad = set()
    for direction in ("forward", "reverse"):
        path = Path(Linear()(NUM_STEPS), CachedMixtureHMC(2), table)
        bad |= {direction} if abs(single(density, path, direction)) > 5.0 else set()
    assert bad == {"forward", "reverse"}
    correct = Path(Linear()(NUM_STEPS), HMC(2, jitter=0.0), table)  # same steps, valid energies
    assert abs(single(density, correct, "forward")) <= 5.0
    assert abs(single(density, correct, "reverse")) <= 5.0


def single(density, path, direction, position=None):
    """Returns the deviation of E[w]/Z or E[1/w] Z from 1, in standard errors."""
    num_repeats = path.tuning.log_step_size.shape[1]
    draw = density.draw_base if direction == "forward" else density.draw_target
    position = draw(1, num_repeats) if position is None else position
    carry, _ = run_chains(
        density, path, density(position), direction=direction, seed=2, stream="single"
    )
    sign = 1.0 if direction == "forward" else -1.0
    return deviation((sign * (carry.log_weights[0] - density.log_normalizer)).exp())


def test_step_size_adapted_inside_the_run_is_caught():
    density = lopsided()
    table = TuningTable.constant(1.0, density.draw_base(70_000))
    assert abs(single(density, Path(Linear()(40), AdaptingHMC(1), table), "forward")) > 5.0
    assert abs(single(density, Path(Linear()(40), HMC(1), table), "forward")) <= 5.0


def test_kernel_chosen_from_the_posterior_sample_is_caught():
    density = lopsided()
    num_repeats = 30_000
    position = density.draw_target(1, num_repeats)
    chosen = torch.where(position[0, :, 0] > 0.3, 1.0, 0.1)
    betas = Linear()(10)
    for step_size, caught in ((chosen, True), (chosen[torch.randperm(num_repeats)], False)):
        path = Path(betas, HMC(1), TuningTable.constant(step_size, position[0]))
        assert (abs(single(density, path, "reverse", position)) > 5.0) == caught
