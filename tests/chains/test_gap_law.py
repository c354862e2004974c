"""Case M02: the linear VAE, where bounds under perfect transitions are known in closed form.

z ~ N(0, I_10), x = W z + e in R^100, W from ``RandomState(0)``. With a linear schedule and perfect
transitions the gap times T is tr W'W at every T, and HMC must come near it.
"""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from paths import LOG_2PI
from transitions import PerfectTransition

from pyro_anneal import bounds
from pyro_anneal.chains.loop import run_chains
from pyro_anneal.chains.path import Path, TuningTable
from pyro_anneal.chains.pilot import Pilot, run_pilot
from pyro_anneal.kernels import HMC, State
from pyro_anneal.persistence.randomness import seeded_generator
from pyro_anneal.schedules import Linear

TRACE = 976.282626  # tr W'W
TABLE = {1: (0.0, 976.2826), 10: (9.587615, 107.215877), 100: (18.983137, 28.745963)}
WEIGHTS = torch.tensor(np.random.RandomState(0).randn(100, 10))


@dataclass(frozen=True, eq=False)
class LinearVAE:
    """One annealing path per datum: from the prior to the joint density with its x."""

    gram: torch.Tensor  # W'W in the coordinates of z, [10, 10]
    pull: torch.Tensor  # W'x, [N, 10]
    square: torch.Tensor  # x'x, [N]
    latents: torch.Tensor  # the z that made x, [N, 10]

    def __call__(self, position):
        base = -0.5 * (position.square() + LOG_2PI).sum(-1)
        force = self.pull - position @ self.gram
        log_likelihood = (
            0.5 * ((self.pull + force) * position).sum(-1) - 0.5 * self.square - 50.0 * LOG_2PI
        )
        return State(position, base, base + log_likelihood, -position, force - position)

    def log_evidence(self):
        """Computes log N(x; 0, I + W W') by the matrix determinant and inversion lemmas."""
        precision = torch.eye(10) + self.gram
        explained = (self.pull * torch.linalg.solve(precision, self.pull.T).T).sum(-1)
        return 0.5 * (explained - self.square - torch.logdet(precision)) - 50.0 * LOG_2PI

    def at(self, beta):
        """Computes location and standard deviation of the path; needs a diagonal ``gram``."""
        precision = 1.0 + beta * self.gram.diagonal()
        return beta * self.pull / precision, precision.rsqrt()


def simulate(num_pairs, *, principal=False):
    """Draws pairs (z, x); ``principal`` uses the singular vectors of W as coordinates of z."""
    weights = WEIGHTS
    if principal:
        left, values, _ = torch.linalg.svd(WEIGHTS, full_matrices=False)
        weights = left * values
    latents = torch.randn(num_pairs, 10)
    x = latents @ weights.T + torch.randn(num_pairs, 100)
    return LinearVAE(weights.T @ weights, x @ weights, x.square().sum(-1), latents)


def sandwich(vae, path, num_chains=1):
    """Anneals both ways and returns log-weights, [K, N] each."""
    start = torch.randn(num_chains, *vae.latents.shape)
    exact = vae.latents.expand_as(start)
    forward = run_chains(vae, path, vae(start), direction="forward", seed=0, stream="forward")[0]
    reverse = run_chains(vae, path, vae(exact), direction="reverse", seed=0, stream="reverse")[0]
    return forward.log_weights, reverse.log_weights


def information(vae, log_bound):
    """Returns log p(x | z) - bound: its mean is a bound on I(x; z)."""
    at_latents = vae(vae.latents)
    return at_latents.log_target - at_latents.log_base - log_bound


def mean_and_error(values):
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


@pytest.mark.parametrize(("num_steps", "num_pairs"), [(1, 40_000), (10, 40_000), (100, 10_000)])
def test_perfect_transitions_give_the_table_and_the_gap_law(num_steps, num_pairs):
    vae = simulate(num_pairs, principal=True)
    table = TuningTable.constant(1.0, vae.latents)
    path = Path(Linear()(num_steps), PerfectTransition(vae.at), table)
    forward, reverse = sandwich(vae, path)
    lower, upper = information(vae, reverse[0]), information(vae, forward[0])
    for values, truth in zip((lower, upper), TABLE[num_steps], strict=True):
        mean, std_error = mean_and_error(values)
        assert abs(mean - truth) <= 5.0 * std_error + 1e-6
    gap, std_error = mean_and_error((upper - lower) * num_steps)
    assert std_error < 0.01 * TRACE
    assert abs(gap - TRACE) <= 5.0 * std_error


def test_the_table_itself_sums_to_the_law():
    for num_steps, (lower, upper) in TABLE.items():
        assert (upper - lower) * num_steps == pytest.approx(TRACE, abs=1e-3)
    assert float((WEIGHTS.T @ WEIGHTS).trace()) == pytest.approx(TRACE, abs=1e-6)
    truth = 0.5 * float(torch.logdet(torch.eye(10) + WEIGHTS.T @ WEIGHTS))
    assert truth == pytest.approx(22.735186, abs=1e-6)
    assert all(lower < truth < upper for lower, upper in TABLE.values())


def tuned(vae, kernel, num_steps):
    """Freezes a path of linear betas and the pilot's step sizes."""
    settings = Pilot(num_chains=16)
    start = vae(torch.randn(16, *vae.latents.shape))
    generator = seeded_generator(start.position.device, 0, "pilot")
    outcome = run_pilot(vae, kernel, start, generator, settings=settings)
    return Path(Linear()(num_steps), kernel, outcome.tuning)


def test_hmc_approaches_the_gap_law():
    # three leapfrogs of small steps turn the Gaussian by a quarter period, nearly a perfect draw;
    # one leapfrog diffuses; long trajectories forget the position but keep half of the energy
    vae, gaps = simulate(100), {}
    near, one, default = HMC(3, target_accept=0.9, jitter=0.1), HMC(1), HMC()
    for kernel, num_steps in ((near, 50), (near, 200), (one, 50), (default, 50)):
        forward, reverse = sandwich(vae, tuned(vae, kernel, num_steps), num_chains=2)
        gap, std_error = mean_and_error((reverse - forward).mean(0) * num_steps)
        assert std_error < 0.1 * TRACE
        assert gap >= TRACE - 5.0 * std_error  # no kernel beats perfect transitions
        gaps[kernel, num_steps] = gap
    assert gaps[near, 50] < 1.5 * TRACE
    assert gaps[near, 200] < 1.5 * TRACE  # the law: four times the steps, a quarter of the gap
    assert gaps[default, 50] < 2.5 * TRACE
    assert gaps[near, 50] < gaps[default, 50] < gaps[one, 50] < 4.0 * TRACE


def test_bounds_tighten_in_k():
    vae = simulate(400)
    truth = vae.log_evidence()
    forward, reverse = sandwich(vae, tuned(vae, HMC(2), 50), num_chains=16)
    lower, upper, mixed = [], [], []
    for count in (1, 4, 16):
        lower.append(bounds.independent_multi_lower(forward[:count]))
        upper.append(bounds.coupled_upper(reverse[:count]))
        mixed.append(bounds.independent_multi_upper(reverse[:1], forward[: count - 1]))
    for worse, better in ((lower[0], lower[1]), (lower[1], lower[2])):
        mean, std_error = mean_and_error(better - worse)
        assert mean > 5.0 * std_error
    for uppers in (upper, mixed):
        for worse, better in ((uppers[0], uppers[1]), (uppers[1], uppers[2])):
            mean, std_error = mean_and_error(worse - better)
            assert mean > 5.0 * std_error
    for slack in (
        *(truth - value for value in lower),
        *(value - truth for value in upper + mixed),
    ):
        mean, std_error = mean_and_error(slack)
        assert mean > 5.0 * std_error
    for count, value in zip((1, 4, 16), mixed, strict=True):
        assert (mixed[0] - value <= math.log(count) + 1e-9).all()
