"""The identities of test_identities.py on lattices, alone and beside a continuous coordinate."""

import pytest
import torch
from lattices import DISCRETE, MIXED, LatticePath, UncorrectedLangevin
from test_identities import NUM_STEPS, frozen_path, identities

from pyro_anneal.chains.path import Path, TuningTable
from pyro_anneal.kernels import HMC, ChromaticGibbs, Composite, DiscreteLangevin, SingleSite
from pyro_anneal.schedules import Linear

REPEATS = 10_000
LARGEST_STD_ERROR = 0.017
KERNELS = {  # with step sizes far from the best ones
    "langevin": (DISCRETE, DiscreteLangevin(), 0.15),
    "single site": (DISCRETE, SingleSite(1), 1.0),
    "colours": (
        DISCRETE,
        Composite(
            (
                ChromaticGibbs((0, 1, 0), DISCRETE.only("binary", "one-hot")),
                DiscreteLangevin(lattice=DISCRETE.only("integer")),
            )
        ),
        0.15,
    ),
    "langevin and HMC": (MIXED, Composite((DiscreteLangevin(), HMC(1))), 0.3),
}


def cases():
    for name in KERNELS:
        for schedule in (Linear(), "adaptive"):
            mixed = name == "langevin and HMC"
            if mixed and not isinstance(schedule, str):
                continue  # even steps leave weights of tails too long for 10,000 repeats to tell
            is_default = isinstance(schedule, str) == mixed
            marks = () if is_default else pytest.mark.slow
            yield pytest.param(name, schedule, marks=marks, id=f"{name}-{schedule!r}")


@pytest.mark.parametrize(("name", "schedule"), list(cases()))
def test_identities_hold_on_lattices(name, schedule):
    lattice, kernel, step_size = KERNELS[name]
    density, kernel = LatticePath(lattice), kernel.on(lattice)
    path = frozen(density, kernel, step_size, schedule)
    values = identities(density, path, num_repeats=REPEATS)
    assert len(values) == 8
    assert violated(values) == set()


def violated(values, largest=LARGEST_STD_ERROR):
    """Names the identities that are off by more than 5 standard errors, which must be small."""
    found = set()
    for name, value in values.items():
        std_error = float(value.std()) / len(value) ** 0.5
        assert std_error <= largest
        if abs(float(value.mean()) - 1.0) > 5.0 * std_error:
            found.add(name)
    return found


def frozen(density, kernel, step_size, schedule):
    torch.manual_seed(0)
    if schedule == "adaptive":
        return frozen_path(density, kernel, step_size, schedule, num_repeats=REPEATS)
    table = TuningTable.constant(step_size, density.draw_base(REPEATS), kernel)
    return Path(schedule(NUM_STEPS), kernel, table)


def test_identities_catch_proposals_that_are_not_corrected():
    density, kernel = LatticePath(DISCRETE), UncorrectedLangevin(lattice=DISCRETE)
    values = identities(density, frozen(density, kernel, 0.6, Linear()), num_repeats=REPEATS)
    assert {"w", "1/w"} <= violated(values, largest=0.05)
