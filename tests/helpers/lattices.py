"""Annealing paths on small lattices, alone or beside a continuous coordinate, summed exactly."""

import itertools
import math
from dataclasses import dataclass, field

import torch

from pyro_anneal.kernels import (
    Block,
    Composite,
    DiscreteLangevin,
    Info,
    Lattice,
    State,
    accept,
)
from pyro_anneal.kernels.discrete import _PROPOSALS, _step_of

# u, then two zeros and ones, a one-hot vector of three, and a number from 0 to 3
MIXED = Lattice(
    7,
    (
        Block("binary", 1, 3),
        Block("one-hot", 3, 6, size=3),
        Block("integer", 6, 7, lower=(0.0,), upper=(3.0,)),
    ),
)
# the same without u
DISCRETE = Lattice(
    6,
    (
        Block("binary", 0, 2),
        Block("one-hot", 2, 5, size=3),
        Block("integer", 5, 6, lower=(0.0,), upper=(3.0,)),
    ),
)


def states():
    """Lists all 48 states of the discrete variables, [48, 6]."""
    rows = [
        (a, b, *(float(c == k) for k in range(3)), d)
        for a, b, c, d in itertools.product((0.0, 1.0), (0.0, 1.0), range(3), range(4))
    ]
    return torch.tensor(rows, dtype=torch.float64)


@dataclass(frozen=True)
class LatticePath:
    """A product base and a lopsided target with couplings that no gradient foretells exactly.

    Given the discrete part d, the continuous coordinate is Normal(m . d, s).
    """

    lattice: Lattice
    has_gradients: bool = True
    pull: torch.Tensor = field(default_factory=lambda: _numbers(6, 1, 0.6))
    couplings: torch.Tensor = field(default_factory=lambda: 0.3 * _numbers(36, 2, 1.0).view(6, 6))
    loc: torch.Tensor = field(default_factory=lambda: _numbers(6, 3, 0.6))
    scale: float = 0.7

    @property
    def is_mixed(self):
        return self.lattice.dim == 7

    def _base(self, d):
        return d @ torch.tensor([0.3, -0.2, 0.1, -0.3, 0.2, -0.4], dtype=torch.float64)

    def _target(self, d):
        bent = torch.nn.functional.softplus(d @ self.pull.flip(0))
        return d @ self.pull + ((d @ self.couplings) * d).sum(-1) - bent

    def log_densities(self, position):
        d = position[..., 1:] if self.is_mixed else position
        log_base = self._base(d) - self._base(states()).logsumexp(0)
        log_target = self._target(d)
        if self.is_mixed:
            u = position[..., 0]
            log_base = log_base - 0.5 * u.square() - 0.5 * math.log(2.0 * math.pi)
            log_target = log_target - 0.5 * ((u - d @ self.loc) / self.scale).square()
        return log_base, log_target

    def __call__(self, position):
        with torch.enable_grad():
            leaf = position.detach().requires_grad_()
            values = self.log_densities(leaf)
            grads = [torch.autograd.grad(v.sum(), leaf, retain_graph=True)[0] for v in values]
        if not self.has_gradients:
            grads = [grad * 0.0 for grad in grads]
        return State(position, *(v.detach() for v in values), *grads)

    @property
    def log_normalizer(self):
        extra = math.log(self.scale * math.sqrt(2.0 * math.pi)) if self.is_mixed else 0.0
        return float(self._target(states()).logsumexp(0)) + extra

    def probabilities(self, beta):
        """Sums the path of the discrete lattice at beta, [48]."""
        assert not self.is_mixed
        base, target = self.log_densities(states())
        return (base + beta * (target - base)).softmax(0)

    def draw(self, log_weights, shape, loc, scale):
        index = torch.multinomial(log_weights.softmax(0), math.prod(shape), replacement=True)
        d = states()[index]
        if self.is_mixed:
            u = d @ loc + scale * torch.randn(len(d), dtype=torch.float64)
            d = torch.cat([u.unsqueeze(-1), d], dim=-1)
        return d.reshape(*shape, self.lattice.dim)

    def draw_base(self, *shape):
        return self.draw(self._base(states()), shape, torch.zeros(6, dtype=torch.float64), 1.0)

    def draw_target(self, *shape):
        return self.draw(self._target(states()), shape, self.loc, self.scale)


def _numbers(count, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class UncorrectedLangevin(DiscreteLangevin):
    """BROKEN: accepts as if the proposals were symmetric."""

    def step(self, state, density, beta, tuning, noise):
        each, uniform = noise
        grad = state.grad(beta)
        parts = []
        for block in self.lattice.blocks:
            taken = [block.take(value) for value in (state.position, grad)]
            step = _step_of(block, tuning)
            parts.append(_PROPOSALS[block.kind].draw(block, *taken, step, block.take(each)))
        proposal = density(self.lattice.replace(state.position, parts))
        log_accept = proposal.log_density(beta) - state.log_density(beta)
        new, accept_prob = accept(state, proposal, log_accept, uniform)
        return new, Info(accept_prob, log_accept.isnan())


@dataclass(frozen=True)
class OneWay(Composite):
    """BROKEN: A B, which is no palindrome, yet claims to be its own reversal."""

    @property
    def _order(self):
        return list(range(len(self.parts)))
