"""Every kind of Pyro model: the density of u by quadrature, its gradient, and the evidence."""

import functools

import pytest
import torch
from integrals import integrate
from problems import PROBLEMS

from pyro_anneal import AnnealedImportance
from pyro_anneal.problems.problem import prepare


@functools.cache  # several tests look at one problem
def shared(problem):
    return prepared(problem)


def prepared(problem, guide=None, **options):
    arguments = (problem.args, problem.kwargs)
    options = {"num_chains": 8, "batch_plates": "auto", "compile": False, "seed": 0} | options
    return prepare(problem.model, guide, arguments, arguments, **options)


# The trapezoidal rule converges geometrically for these analytic integrands on the line.
RULES = {1: (60.0, 1201), 2: (32.0, 257), 3: (8.0, 41), 4: (7.0, 25)}


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_evidence_is_the_integral_over_u(problem):
    made = shared(problem)
    layout = made.layout
    assert layout.dim == problem.dim
    assert tuple(layout.batch_shape) == problem.batch
    log_prior, log_evidence = integrate(made.density, layout, *RULES[layout.dim])
    truth = torch.as_tensor(problem.truth)
    tolerance = 1e-6 if layout.dim <= 2 else 2e-4
    torch.testing.assert_close(layout.scale * log_evidence, truth, rtol=0, atol=tolerance)
    torch.testing.assert_close(log_prior, torch.zeros_like(truth), rtol=0, atol=tolerance)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_gradient_matches_finite_differences(problem):
    made = shared(problem)
    layout = made.layout
    torch.manual_seed(1)
    position = 0.7 * torch.randn(8, *layout.batch_shape, layout.dim)
    state = made.density(position)
    width = 1e-5
    for axis in range(layout.dim):
        shift = torch.zeros(layout.dim)
        shift[axis] = width
        up, down = made.function(position[0] + shift), made.function(position[0] - shift)
        for grad, a, b in zip((state.grad_base, state.grad_target), up, down, strict=True):
            slope = (a - b) / (2 * width)
            torch.testing.assert_close(grad[0, ..., axis], slope, rtol=1e-6, atol=1e-6)


# One of each kind through the whole engine: pilot, chains, weights.
ANNEALED = [
    "support: simplex",
    "support: corr_cholesky 3",
    "dynamic: upper bound",
    "handler: scale of the likelihood",
    "handler: common scale",
    "enumerated: inner plate in a batch plate",
    "plates: crossed",
    "plates: two batch plates",
    "module: linear VAE",
]
MORE_ANNEALED = [
    "support: interval",
    "support: ordered",
    "dynamic: lower bound",
    "handler: obs_mask",
    "enumerated: inside the plate",
    "plates: nested",
    "plates: batch on the left",
    "module: PyroSample",
]


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")  # short runs
@pytest.mark.parametrize(
    "name", [*ANNEALED, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_ANNEALED)]
)
def test_annealed_evidence(name):
    (problem,) = (problem for problem in PROBLEMS if problem.name == name)
    ais = AnnealedImportance(
        problem.model, num_chains=64, num_steps=64, seed=1, compile=False, progress_bar=False
    )
    run = ais.run(*problem.args, **problem.kwargs)
    truth = torch.as_tensor(problem.truth)
    assert run.lower.shape == problem.batch
    assert bool((run.std_error < 0.15).all())
    assert bool(((run.lower - truth).abs() <= 5.0 * run.std_error).all())
