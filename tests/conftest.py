"""Fixtures shared by all tests: float64 by default, seeded, a clean parameter store."""

import gc

import pyro
import pytest
import torch

# Two test processes with two threads each would wait for one another.
torch.set_num_threads(1)
# Recordings make objects by the ten thousand, few of which are garbage.
gc.set_threshold(20_000)


@pytest.fixture(autouse=True, scope="module")
def _spare_the_collector():
    """Leaves out of every garbage collection what was there before: imports, for the most part."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    """Runs every test in float64 from seed 0, and restores what it changed."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(dtype)
