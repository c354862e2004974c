"""Random models of all supports, couplings and precisions: no quiet error beyond 5 standard errors.

``python benchmarks/quiet_errors.py`` runs them by the thousand and keeps the records.
"""

import os

import pytest
import torch
from random_models import Seeded, build, judge

pytestmark = pytest.mark.filterwarnings("ignore")
FIRST = int(os.environ.get("RANDOM_MODELS_FIRST", "10000"))
COUNT = int(os.environ.get("RANDOM_MODELS", "200"))
# Structures that are quick to record, of which four models share a graph; a half by default.
DEFAULT, OTHERS, NUMBERS = (1, 4, 7, 14, 16, 20), (2, 3, 5, 12, 15, 17, 21), 4
FOUND = [  # seeds of what the generator found, mended since
    10129,  # a fit without tails above a flat root, where no prior can be mixed in
    100001,  # data in float64 beside latents in float32 and an enumerated site
    100076,  # a guide with a Wishart: matrices that round beyond the edge
    100199,  # a reflected Chi2: not known as a Gamma
    410468,  # a fit without evidence hid itself and all others
    410720,  # a support that moves with an integer, found or not by chance
]


@pytest.fixture(autouse=True)
def default_dtype():
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


def check(model, seed):
    assert model.accuracy < 5e-3
    record = judge(model, seed=seed)
    quiet = not record["warnings"]
    assert abs(record["error"]) <= record["allowed"] or not quiet, (seed, record)
    return not quiet


@pytest.mark.parametrize("structures", [DEFAULT, pytest.param(OTHERS, marks=pytest.mark.slow)])
def test_no_quiet_error(structures):
    flagged = 0
    for structure in structures:
        for numbers in range(NUMBERS):
            model = build(Seeded(structure, numbers=numbers), small=True)
            flagged += check(model, seed=numbers)
    assert flagged <= 0.2 * len(structures) * NUMBERS  # were all flagged, nothing would be tested


@pytest.mark.slow  # each has a test of its kind besides
@pytest.mark.parametrize("seed", FOUND)
def test_what_was_found(seed):
    check(build(Seeded(seed)), seed)


@pytest.mark.slow
def test_no_quiet_error_in_many():
    vague = 0
    for seed in range(FIRST, FIRST + COUNT):
        model = build(Seeded(seed))
        if model.accuracy < 5e-3:
            check(model, seed)
        else:  # the quadrature does not know the truth well enough
            vague += 1
    assert vague <= 0.04 * COUNT  # 22 of 1256 in the record
