"""Discrete kernels against sums over all states: draws, detailed balance, and broken kernels."""

import math
from dataclasses import dataclass

import pytest
import torch
from lattices import DISCRETE, MIXED, LatticePath, OneWay, UncorrectedLangevin, states

from pyro_anneal.kernels import (
    HMC,
    Block,
    ChromaticGibbs,
    Composite,
    DiscreteLangevin,
    Lattice,
    SingleSite,
    State,
    Tuning,
)
from pyro_anneal.kernels.discrete import _PROPOSALS, _step_of

BETA = torch.tensor(0.7, dtype=torch.float64)
LANGEVIN = DiscreteLangevin(lattice=DISCRETE)
SITES = SingleSite(2, lattice=DISCRETE)
COLOURS = ChromaticGibbs((1, 0, 0), DISCRETE.only("binary", "one-hot"))  # the number stays
KERNELS = {
    "langevin": (LANGEVIN, 0.5),
    "langevin, long": (LANGEVIN, 30.0),
    "single site": (SITES, 0.7),
    "palindrome": (Composite((LANGEVIN, SITES)), 0.6),
    "colours": (COLOURS, 1.0),
}


@dataclass(frozen=True)
class Untested(ChromaticGibbs):
    """BROKEN: accepts what a wrong gradient proposes."""

    def noise(self, state, generator):
        each, tests, coin = super().noise(state, generator)
        return each, 0.0 * tests, coin


@dataclass(frozen=True)
class Forward(ChromaticGibbs):
    """BROKEN: always in one order, yet claims to be its own reversal."""

    def noise(self, state, generator):
        each, tests, coin = super().noise(state, generator)
        return each, tests, 0.0 * coin


def tuning(kernel, step_size, dim=6):
    parts = getattr(kernel, "num_step_sizes", None)
    step = torch.full((), step_size, dtype=torch.float64)
    return Tuning(step if parts is None else step.expand(parts), torch.ones(dim).double())


def number(position):
    """Finds the state in the list of all, as a number."""
    weights = torch.tensor([24.0, 12.0, 0.0, 4.0, 8.0, 1.0], dtype=torch.float64)
    return (position @ weights).long()


def flows(kernel, step_size, count=400_000, density=None):
    """Counts transitions of a chain in equilibrium, [48, 48]."""
    density = density or LatticePath(DISCRETE)
    torch.manual_seed(5)
    index = torch.multinomial(density.probabilities(BETA), count, replacement=True)
    state = density(states()[index])
    generator = torch.Generator().manual_seed(6)
    noise = kernel.noise(state, generator)
    new, info = kernel.step(state, density, BETA, tuning(kernel, step_size), noise)
    assert torch.equal(states()[number(new.position)], new.position)
    pairs = 48 * index + number(new.position)
    return torch.bincount(pairs, minlength=48 * 48).view(48, 48).double(), info


def excess(table):
    """Tests symmetry of flows: the chi-square statistic in standard deviations beyond its mean."""
    upper = torch.triu_indices(48, 48, offset=1)
    there, back = table[upper[0], upper[1]], table.T[upper[0], upper[1]]
    seen = there + back >= 10
    square = ((there - back).square() / (there + back))[seen]
    return float((square.sum() - seen.sum()) / math.sqrt(2.0 * seen.sum()))


def test_all_states_are_numbered():
    assert torch.equal(number(states()), torch.arange(48))


@pytest.mark.parametrize("name", KERNELS)
def test_flows_balance_in_detail(name):
    table, info = flows(*KERNELS[name])
    assert abs(excess(table)) < 5.0
    share = 1.0 - float(table.diagonal().sum() / table.sum())
    assert share > 0.2  # it moves
    assert 0.2 < info.accept_prob.mean() < 0.99
    # the density is invariant, every state by itself
    probs = LatticePath(DISCRETE).probabilities(BETA)
    score = (table.sum(0) / table.sum() - probs) / (probs / table.sum()).sqrt()
    assert score.abs().max() < 5.0


def test_the_test_of_balance_catches_broken_kernels():
    broken, _ = flows(UncorrectedLangevin(lattice=DISCRETE), 0.5)
    assert excess(broken) > 50.0
    one_way, _ = flows(OneWay((LANGEVIN, SITES)), 0.6)
    assert excess(one_way) > 15.0
    for kind in (Untested, Forward):
        broken, _ = flows(kind(COLOURS.colours, COLOURS.lattice), 1.0, count=200_000)
        assert excess(broken) > 15.0


def test_gradients_that_say_nothing_cost_no_exactness():
    density = LatticePath(DISCRETE, has_gradients=False)
    table, _ = flows(LANGEVIN, 0.5, density=density)
    assert abs(excess(table)) < 5.0


@pytest.mark.parametrize("step_size", [0.05, 0.7, 40.0])
def test_draws_follow_the_proposals_that_are_corrected_for(step_size):
    # from one state, the frequencies of 300,000 proposals against q, which sums to one
    density, count = LatticePath(DISCRETE), 300_000
    here = density(states()[29:30])
    grad, there = here.grad(BETA), density(states()).position
    table = tuning(LANGEVIN, step_size)
    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(count, 6, generator=generator, dtype=torch.float64)
    log_q, parts = torch.zeros(48, dtype=torch.float64), []
    for block in DISCRETE.blocks:
        rule, step = _PROPOSALS[block.kind], _step_of(block, table)
        x, g = (block.take(value) for value in (here.position, grad))
        log_q = log_q + rule.log_prob(block, x, g, step, block.take(there))
        parts.append(rule.draw(block, x, g, step, block.take(uniform)))
    drawn = DISCRETE.replace(here.position.expand(count, -1), parts)
    q = log_q.exp()
    assert float(q.sum()) == pytest.approx(1.0, abs=1e-12)
    seen = torch.bincount(number(drawn), minlength=48).double() / count
    likely = q * count > 10
    assert (((seen - q) / (q / count).sqrt())[likely].abs().max()) < 4.5
    assert float(seen[~likely].sum()) < 1e-3


def test_independent_variables_are_always_accepted_at_any_step():
    # at beta = 0 the path is its product base: q is reversible with respect to it
    lattice = Lattice(6, DISCRETE.blocks[:2])
    density = LatticePath(DISCRETE)
    state = density(states())
    kernel, generator = DiscreteLangevin(lattice=lattice), torch.Generator().manual_seed(2)
    for step in (0.01, 1.0, 1e9):
        noise = kernel.noise(state, generator)
        zero = torch.tensor(0.0).double()
        _, info = kernel.step(state, density, zero, tuning(kernel, step), noise)
        assert torch.allclose(info.accept_prob, torch.ones(48).double(), atol=1e-10)


@pytest.mark.parametrize("size", [2, 5])
def test_a_long_step_draws_one_variable_from_its_conditional(size):
    lattice = Lattice(size, (Block("one-hot", 0, size, size=size),))
    logits = torch.linspace(-2.0, 3.0, size, dtype=torch.float64).flip(0)

    def density(position):
        value = position @ logits
        grad = logits.expand_as(position)
        return State(position, value, value, grad, grad)

    start = torch.zeros(100_000, size, dtype=torch.float64)
    start[:, -1] = 1.0
    kernel, state = DiscreteLangevin(lattice=lattice), density(start)
    noise = kernel.noise(state, torch.Generator().manual_seed(3))
    new, info = kernel.step(state, density, BETA, tuning(kernel, 1e12, size), noise)
    assert info.accept_prob.min() > 1.0 - 1e-9
    probs, seen = logits.softmax(0), new.position.mean(0)
    assert ((seen - probs) / (probs / 100_000).sqrt()).abs().max() < 4.5


def test_integers_stay_within_their_bounds_and_may_be_unbounded():
    upper = (3.0, math.inf, 0.0)
    lattice = Lattice(3, (Block("integer", 0, 3, lower=(0.0, -math.inf, 0.0), upper=upper),))

    def density(position):
        value = -0.02 * (position - 5.0).square().sum(-1)
        grad = -0.04 * (position - 5.0)
        return State(position, value, value, grad, grad)

    generator = torch.Generator().manual_seed(4)
    for kernel in (DiscreteLangevin(lattice=lattice), SingleSite(3, lattice=lattice)):
        state = density(torch.zeros(500, 3, dtype=torch.float64))
        for _ in range(50):
            noise = kernel.noise(state, generator)
            state, info = kernel.step(state, density, BETA, tuning(kernel, 2.0, 3), noise)
            assert not info.diverging.any()
        position = state.position
        assert torch.equal(position, position.round())
        assert set(position[:, 0].tolist()) == {0.0, 1.0, 2.0, 3.0}
        assert position[:, 1].min() < 0.0
        assert position[:, 1].max() > 8.0
        assert position[:, 2].abs().max() == 0.0


def test_parts_of_a_composite_move_their_own_coordinates_only():
    density, generator = LatticePath(MIXED), torch.Generator().manual_seed(7)
    state = density(density.draw_base(2000))
    hmc_alone = Composite((HMC(2),)).on(MIXED)
    noise = hmc_alone.noise(state, generator)
    new, info = hmc_alone.step(state, density, BETA, tuning(hmc_alone, 0.5, 7), noise)
    assert torch.equal(new.position[:, 1:], state.position[:, 1:])
    assert (new.position[:, 0] != state.position[:, 0]).double().mean() > 0.8
    discrete = Composite((DiscreteLangevin(),)).on(MIXED)
    noise = discrete.noise(state, generator)
    new, info = discrete.step(state, density, BETA, tuning(discrete, 0.5, 7), noise)
    assert torch.equal(new.position[:, 0], state.position[:, 0])
    assert info.accept_by_part.shape == (2000, 1)


def test_a_kernel_without_coordinates_says_so():
    density = LatticePath(DISCRETE)
    state = density(states())
    for kernel in (DiscreteLangevin(), SingleSite()):
        noise = kernel.noise(state, None)
        with pytest.raises(ValueError, match="no discrete coordinates to move"):
            kernel.step(state, density, BETA, tuning(kernel, 1.0), noise)
    with pytest.raises(ValueError, match="at least one kernel"):
        Composite(())
    with pytest.raises(ValueError, match="target_accept"):
        DiscreteLangevin(target_accept=1.0)
    with pytest.raises(ValueError, match="lower and upper bound"):
        Block("integer", 0, 2, lower=(0.0,), upper=(1.0,))
    with pytest.raises(ValueError, match="holds no vectors of 3"):
        Block("one-hot", 0, 4, size=3)
    with pytest.raises(ValueError, match="without gaps"):
        ChromaticGibbs((0, 2))
    with pytest.raises(ValueError, match="2 colours for 3 discrete variables"):
        ChromaticGibbs((0, 1), COLOURS.lattice)
    with pytest.raises(ValueError, match="use DiscreteLangevin"):
        ChromaticGibbs().on(DISCRETE)
    kernel = ChromaticGibbs(lattice=COLOURS.lattice)
    noise = kernel.noise(state, None)
    with pytest.raises(ValueError, match="given no colours"):
        kernel.step(state, density, BETA, tuning(kernel, 1.0), noise)


def test_variables_of_one_colour_are_drawn_from_their_conditionals():
    # a ring of spins with fields, linear in each: nothing is rejected, and one sweep forgets where
    # it came from but for the neighbours of what moved first
    fields = torch.linspace(-1.0, 1.5, 6, dtype=torch.float64)

    def density(position):
        right = position.roll(-1, -1)
        value = position @ fields + 1.3 * (position * right).sum(-1)
        return State(position, value, value, *[fields + 1.3 * (right + position.roll(1, -1))] * 2)

    lattice = Lattice(6, (Block("binary", 0, 6),))
    kernel = ChromaticGibbs((0, 1) * 3, lattice)
    state = density(torch.ones(200_000, 6, dtype=torch.float64))
    each, tests, coin = kernel.noise(state, torch.Generator().manual_seed(8))
    noise = each, tests, 0.0 * coin  # even ones first
    new, info = kernel.step(state, density, BETA, tuning(kernel, 1.0), noise)
    assert info.accept_prob.min() > 1.0 - 1e-9
    even = torch.sigmoid(fields[0::2] + 2.6)  # with both neighbours up
    seen = new.position[:, 0::2].mean(0)
    assert ((seen - even).abs() < 4.5 * (even * (1.0 - even) / 200_000).sqrt()).all()
    around = new.position[:, 0::2] + new.position[:, 0::2].roll(-1, -1)
    expected = torch.sigmoid(fields[1::2] + 1.3 * around).mean(0)  # given those drawn before
    seen = new.position[:, 1::2].mean(0)
    assert ((seen - expected).abs() < 4.5 * 0.5 / 200_000**0.5).all()
