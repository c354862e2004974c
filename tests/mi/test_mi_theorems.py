"""The theorems of the paper, by exact enumeration of a small lopsided discrete joint.

The bounds see every configuration of (x, z_1, ..., z_K) as a "pair" of its own, through a guide
whose draws are scripted; weighting their per-pair values by the probabilities gives population
values without Monte Carlo error.
"""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from pyro_anneal import mi

# p(x, z) in 1/20ths: 3 x's, 4 z's.
COUNTS = np.array([[4, 1, 0.5, 0.5], [1, 0.5, 3, 0.5], [0.5, 2, 1, 5.5]])
P = COUNTS / COUNTS.sum()
PX, PZ = P.sum(1), P.sum(0)
I = float((P * np.log(P / np.outer(PX, PZ))).sum())
# q(z|x) in 1/8ths, so that 8 scripted draws represent it exactly.
Q8 = np.array([[4, 2, 1, 1], [2, 1, 4, 1], [1, 2, 2, 3]])
Q = Q8 / 8.0
CRITIC = np.array([[0.5, -0.3, 0.1, 0.0], [-0.2, 0.4, 0.9, -1.0], [0.3, 0.0, -0.4, 1.2]])


def table(values) -> Tensor:
    return torch.tensor(np.asarray(values))


def look_up(values):
    """A critic that looks its score up in a table [x, z]."""
    entries = table(values)
    return lambda x, z: entries[x.squeeze(-1), z.squeeze(-1)]


class Scripted(torch.distributions.Categorical):
    """A categorical distribution whose draws are given, one column per row of x."""

    def __init__(self, probs, draws):
        super().__init__(probs=probs)
        self.draws = draws

    def sample(self, sample_shape=()):
        return self.draws[: sample_shape[0]]


PRIOR = torch.distributions.Categorical(table(PZ))
JOINT = mi.DistributionJoint(
    PRIOR, lambda z: torch.distributions.Categorical(table((P / PZ).T.copy())[z])
)


def population(make_bound, q, num_particles):
    """Enumerates (x, z_1 ~ p(z|x), z_2..K ~ q) and returns the exact value of a lower bound."""
    shape = [3] + [4] * num_particles
    states = np.array(list(itertools.product(*[range(n) for n in shape])))
    x, z, others = states[:, 0], states[:, 1], states[:, 2:]
    weight = P[x, z] * np.prod(q[x[:, None], others], axis=1)
    # IWAE asks for K draws and uses K - 1 of them below: the last is a dummy.
    draws = table(np.concatenate([others, z[:, None]], axis=1).T.copy())
    guide = lambda given: Scripted(table(q)[given], draws)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*ceiling")
        est = make_bound(guide).estimate(table(x), table(z), batch_size=len(x))
    return float((table(weight) * est.pair_lower).sum())


def giwae(q, critic, num_particles):
    return population(
        lambda g: mi.GIWAE(PRIOR, g, look_up(critic), num_particles), q, num_particles
    )


def iwae(q, num_particles):
    return population(lambda g: mi.IWAE(JOINT, g, num_particles), q, num_particles)


def barber_agakov(q):
    """By hand: E log q(z|x) / p(z)."""
    return float((P * np.log(q / PZ)).sum())


@pytest.mark.parametrize("num_particles", [1, 2, 4])
def test_giwae_between_barber_agakov_and_iwae(num_particles):
    ba = barber_agakov(Q)
    assert population(lambda g: mi.BarberAgakov(PRIOR, g), Q, 1) == pytest.approx(ba, abs=1e-12)
    best = np.log(P / Q)
    upper = iwae(Q, num_particles)
    assert giwae(Q, best, num_particles) == pytest.approx(upper, abs=1e-12)
    offset = np.array([[5.0], [-2.0], [700.0]])  # any function of x leaves it alone
    assert giwae(Q, best + offset, num_particles) == pytest.approx(upper, abs=1e-9)
    tolerance = 1e-12
    assert ba <= upper + tolerance
    assert upper <= min(ba + math.log(num_particles), I) + tolerance
    if num_particles == 1:
        assert upper == pytest.approx(ba, abs=tolerance)
    else:
        assert ba < giwae(Q, best, num_particles) < I
        assert giwae(Q, CRITIC, num_particles) < upper
        # A bad critic falls below Barber-Agakov.
        assert giwae(Q, -best, num_particles) < ba


@pytest.mark.parametrize("num_particles", [2, 3])
def test_best_giwae_critic_cannot_be_improved(num_particles):
    """Numerical optimization over all critics finds the IWAE value and no more."""
    states = np.array(list(itertools.product(range(3), *[range(4)] * num_particles)))
    x, zs = states[:, 0], states[:, 1:]
    weight = P[x, zs[:, 0]] * np.prod(Q[x[:, None], zs[:, 1:]], axis=1)

    def negative(flat):
        scores = flat.reshape(3, 4)[x[:, None], zs]
        top = scores.max(1)
        log_mean = np.log(np.exp(scores - top[:, None]).mean(1)) + top
        return -(weight * (scores[:, 0] - log_mean)).sum()

    found = barber_agakov(Q) - minimize(negative, np.zeros(12), method="BFGS").fun
    assert found == pytest.approx(iwae(Q, num_particles), abs=1e-6)


@pytest.mark.parametrize("num_particles", [2, 4])
def test_info_nce_below_structured_below_log_k(num_particles):
    prior = np.broadcast_to(PZ, (3, 4))

    def info_nce(critic):
        # InfoNCE is GIWAE with the prior as guide: the variational term vanishes.
        return giwae(prior, critic, num_particles)

    structured = iwae(prior, num_particles)
    assert info_nce(CRITIC) < structured
    assert info_nce(np.log(P / PZ)) == pytest.approx(structured, abs=1e-12)
    assert 0.0 < structured < min(I, math.log(num_particles))


def mine(bound, critic):
    """Population value of a MINE bound: pairs with multiplicity, 8 draws that represent q."""
    multiplicity = np.round(COUNTS * 2).astype(int)  # COUNTS are multiples of a half
    x, z = (np.repeat(i.ravel(), multiplicity.ravel()) for i in np.indices((3, 4)))
    draws = np.array([np.repeat(np.arange(4), Q8[i]) for i in x]).T.copy()
    guide = lambda given: Scripted(table(Q)[given], table(draws))
    est = bound(look_up(critic), 8, model=PRIOR, guide=guide).estimate(table(x), table(z))
    return float(est.plug_in if est.lower is None else est.lower)


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
def test_mine_f_below_mine_dv_below_ibal_below_mi(scale):
    critic = scale * CRITIC + np.array([[0.2], [-0.5], [0.4]])
    expected_log_z = np.log((Q * np.exp(critic)).sum(1))  # log Z(x)
    positive = (P * critic).sum()
    ba = barber_agakov(Q)
    ibal = ba + positive - (PX * expected_log_z).sum()
    dv = ba + positive - np.log((PX * np.exp(expected_log_z)).sum())
    f = ba + positive - (PX * np.exp(expected_log_z)).sum() / math.e
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*ceiling")
        assert mine(mi.MINE_DV, critic) == pytest.approx(dv, abs=1e-12)
        assert mine(mi.MINE_F, critic) == pytest.approx(f, abs=1e-12)
    assert f < dv < ibal < I


def test_best_critic_gives_equality_throughout():
    """T = log p(z|x) / q(z|x) makes all of them I; MINE-F needs 1 more."""
    best = np.log(P / PX[:, None] / Q)
    assert mine(mi.MINE_DV, best) == pytest.approx(I, abs=1e-12)
    assert mine(mi.MINE_F, best + 1.0) == pytest.approx(I, abs=1e-12)
    assert mine(mi.MINE_F, best) < I - 0.1


def test_giwae_tends_to_ibal():
    """As K grows; exactly, since the draws of a binary z are counted by a binomial."""
    p = np.array([[0.3, 0.1], [0.05, 0.2], [0.2, 0.15]])
    q = np.array([[0.6, 0.4], [0.3, 0.7], [0.5, 0.5]])
    critic = np.array([[0.9, -0.4], [-1.0, 0.3], [0.2, 0.0]])
    prior = torch.distributions.Categorical(table(p.sum(0)))
    ba = (p * np.log(q / p.sum(0))).sum()
    log_z = np.log((q * np.exp(critic)).sum(1))
    ibal = ba + (p * critic).sum() - (p.sum(1) * log_z).sum()

    def exact(num_particles):
        count = num_particles - 1
        x, z, ones = (i.ravel() for i in np.indices((3, 2, count + 1)))
        log_binomial = np.array([math.log(math.comb(count, k)) for k in range(count + 1)])[ones]
        weight = p[x, z] * np.exp(
            log_binomial + ones * np.log(q[x, 1]) + (count - ones) * np.log(q[x, 0])
        )
        draws = (np.arange(count)[:, None] < ones).astype(int)
        guide = lambda given: Scripted(table(q)[given], table(draws))
        bound = mi.GIWAE(prior, guide, look_up(critic), num_particles)
        est = bound.estimate(table(x), table(z), batch_size=len(x))
        assert weight.sum() == pytest.approx(1.0)
        return float((table(weight) * est.pair_lower).sum())

    errors = [abs(exact(k) - ibal) for k in (2, 8, 32, 128)]
    assert errors == sorted(errors, reverse=True)
    # The error falls as 1 / K.
    assert errors[-1] == pytest.approx(errors[-2] / 4, rel=0.1)
    assert errors[-1] < 2e-3


# Roles swapped: q(x|z) in 1/8ths, one row per z.
Q8_X = np.array([[4, 2, 2], [2, 1, 5], [1, 6, 1], [3, 2, 3]])
Q_X = Q8_X / 8.0
P_X = P / PZ  # p(x|z), [x, z]
REST = float((P * np.log(P_X)).sum())  # I - H(x) = -H(x|z)
BEST_X = np.log(P_X / Q_X.T)  # [x, z]


def swapped_giwae(critic, num_particles):
    """Exact value of GIWAE without p(z), by the class and by hand."""
    states = np.array(list(itertools.product(range(4), *[range(3)] * num_particles)))
    z, xs = states[:, 0], states[:, 1:]
    weight = P[xs[:, 0], z] * np.prod(Q_X[z[:, None], xs[:, 1:]], axis=1)
    guide = lambda given: Scripted(table(Q_X)[given], table(xs[:, 1:].T.copy()))
    bound = mi.GIWAE(None, guide, look_up(critic), num_particles)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*ceiling")
        est = bound.estimate(table(xs[:, 0]), table(z), batch_size=len(z))
    assert est.missing == "H(x)"
    scores = critic[xs, z[:, None]]
    by_hand = np.log(Q_X[z, xs[:, 0]]) + scores[:, 0] - np.log(np.exp(scores).mean(1))
    return float((table(weight) * est.pair_lower).sum()), float((weight * by_hand).sum())


@pytest.mark.parametrize("num_particles", [1, 2, 4])
def test_swapped_giwae_between_barber_agakov_and_the_rest_of_the_entropy(num_particles):
    ba = float((P * np.log(Q_X.T)).sum())
    values = {}
    for name, critic in (("best", BEST_X), ("other", CRITIC), ("worst", -BEST_X)):
        values[name], by_hand = swapped_giwae(critic, num_particles)
        assert values[name] == pytest.approx(by_hand, abs=1e-12)
    if num_particles == 1:
        assert values["best"] == pytest.approx(ba, abs=1e-12)
    else:
        assert values["worst"] < ba < values["best"] < min(ba + math.log(num_particles), REST)
        assert values["other"] < values["best"]
        # The best critic is free up to any function of z.
        moved, _ = swapped_giwae(BEST_X + np.array([3.0, -1.0, 0.0, 9.0]), num_particles)
        assert moved == pytest.approx(values["best"], abs=1e-9)


@pytest.mark.parametrize("name", ["best", "other"])
def test_swapped_mine_f_below_mine_dv_below_the_rest_of_the_entropy(name):
    critic = BEST_X if name == "best" else CRITIC
    multiplicity = np.round(COUNTS * 2).astype(int)
    x, z = (np.repeat(i.ravel(), multiplicity.ravel()) for i in np.indices((3, 4)))
    draws = np.array([np.repeat(np.arange(3), Q8_X[i]) for i in z]).T.copy()
    guide = lambda given: Scripted(table(Q_X)[given], table(draws))

    def measure(bound, critic):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*ceiling")
            est = bound(look_up(critic), 8, guide=guide).estimate(table(x), table(z))
        assert est.missing == "H(x)"
        return float(est.plug_in if est.lower is None else est.lower)

    ba, positive = (P * np.log(Q_X.T)).sum(), (P * critic).sum()
    partition = (PZ * (Q_X.T * np.exp(critic)).sum(0)).sum()
    dv, f = ba + positive - np.log(partition), ba + positive - partition / math.e
    assert measure(mi.MINE_DV, critic) == pytest.approx(dv, abs=1e-12)
    assert measure(mi.MINE_F, critic) == pytest.approx(f, abs=1e-12)
    if name == "best":
        assert dv == pytest.approx(REST, abs=1e-12)
        assert measure(mi.MINE_F, critic + 1.0) == pytest.approx(REST, abs=1e-12)
    else:
        assert f < dv < REST
