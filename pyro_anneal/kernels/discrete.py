r"""Locally informed proposals for discrete coordinates: many flips at once, one gradient each.

With :math:`g` the gradient of the relaxed log density of the path, a change of one variable from j
to k is estimated to change it by :math:`d_{jk} = g_k - g_j`, exactly so if the density is linear in
each variable. Let :math:`\pi_k \propto e^{g_k}` be the variable's conditional distribution by that
estimate. All variables are proposed anew, independently, with

.. math:: q(k | j) = \pi_k \left(1 - e^{-h / \sqrt{\pi_j \pi_k}}\right), \qquad k \ne j

For a small step h this is :math:`h \sqrt{\pi_k / \pi_j} = h e^{d_{jk} / 2}`, the locally balanced
rate, which forgives a gradient that overstates every change alike; as h grows it becomes an exact
draw from the conditional. At any h it is reversible with respect to :math:`\pi`, so independent
variables are always accepted. The Metropolis test, with the gradient at the proposal, mends the
rest. With two states it is the discrete Langevin sampler of Sun et al.; the form for more states
shares both limits.

Source: Zanella (2020), *Informed proposals for local MCMC in discrete spaces*; Grathwohl et al.
(2021), *Oops I took a gradient*; Sun, Dai, Schuurmans et al. (2023), *Discrete Langevin samplers
via Wasserstein gradient flow*; Zhang, Liu and Liu (2022), *A Langevin-like sampler for discrete
distributions*.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..arguments import as_count
from .base import Density, Info, State, Tuning
from .lattice import Block, Kind, Lattice, bound
from .metropolis import MetropolisKernel, accept, check_target_accept
from .noise import Noise

__all__ = ["DiscreteLangevin", "SingleSite"]

# At h = 2 a variable keeps its value against its estimated conditional with probability e^-4.
_LARGEST_STEP = 2.0
_LEAST_WIDTH = 0.2  # of the proposal for integers: below, almost none would move


def _log1mexp(x: Tensor) -> Tensor:
    """Computes log(1 - e^-x) for x >= 0."""
    tiny = torch.finfo(x.dtype).tiny
    x = x.clamp(min=tiny)
    small = (-torch.expm1(-x)).clamp(min=tiny).log()
    return torch.where(x < math.log(2.0), small, torch.log1p(-(-x).exp()))


def _log_rate(log_to: Tensor, log_from: Tensor, step: Tensor) -> Tensor:
    """Computes h / sqrt(pi_j pi_k), within what exponentials allow."""
    log_rate = step.log() - 0.5 * (log_to + log_from)
    return log_rate.clamp(max=80.0).exp()


class _Rule(Protocol):
    """How the variables of one kind are proposed."""

    @staticmethod
    def draw(block: Block, x: Tensor, grad: Tensor, step: Tensor, uniform: Tensor) -> Tensor:
        """Draws new values from uniform numbers."""
        ...

    @staticmethod
    def log_prob(block: Block, x: Tensor, grad: Tensor, step: Tensor, new: Tensor) -> Tensor:
        """Computes the log probability of drawing ``new``, summed over the block."""
        ...


class _Binary:
    """Proposals for zeros and ones."""

    @staticmethod
    def _log_flip(x: Tensor, grad: Tensor, step: Tensor) -> Tensor:
        difference = (1.0 - 2.0 * x) * grad
        log_to, log_from = logsigmoid(difference), logsigmoid(-difference)
        return log_to + _log1mexp(_log_rate(log_to, log_from, step))

    @staticmethod
    def draw(block: Block, x: Tensor, grad: Tensor, step: Tensor, uniform: Tensor) -> Tensor:
        flips = uniform < _Binary._log_flip(x, grad, step).exp()
        return torch.where(flips, 1.0 - x, x)

    @staticmethod
    def log_prob(block: Block, x: Tensor, grad: Tensor, step: Tensor, new: Tensor) -> Tensor:
        log_flip = _Binary._log_flip(x, grad, step)
        return torch.where(new != x, log_flip, _log1mexp(-log_flip)).sum(-1)


class _OneHot:
    """Proposals for categories."""

    @staticmethod
    def _log_moves(x: Tensor, grad: Tensor, step: Tensor) -> Tensor:
        """Computes log q(k | j) for all k, ``[..., count, size]``."""
        here = x > 0.5
        log_pi = grad.log_softmax(-1)
        log_here = torch.where(here, log_pi, 0.0).sum(-1, keepdim=True)
        rate = _log_rate(log_pi, log_here, step.unsqueeze(-1))
        # What stays is what was here, and what would have come but did not.
        log_stay = torch.where(here, log_pi, log_pi - rate).logsumexp(-1, keepdim=True)
        return torch.where(here, log_stay, log_pi + _log1mexp(rate))

    @staticmethod
    def draw(block: Block, x: Tensor, grad: Tensor, step: Tensor, uniform: Tensor) -> Tensor:
        gumbel = -(-uniform.log()).log()
        best = (_OneHot._log_moves(x, grad, step) + gumbel).argmax(-1, keepdim=True)
        return (best == torch.arange(block.size, device=x.device)).to(x.dtype)

    @staticmethod
    def log_prob(block: Block, x: Tensor, grad: Tensor, step: Tensor, new: Tensor) -> Tensor:
        moves = _OneHot._log_moves(x, grad, step)
        return torch.where(new > 0.5, moves, 0.0).sum((-2, -1))


class _Integer:
    """Proposals for counts: a Langevin step with logistic noise, rounded, cut at the bounds."""

    @staticmethod
    def _centre_and_scale(x: Tensor, grad: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        drift = 0.5 * width.square() * grad
        drift = torch.maximum(torch.minimum(drift, 2.0 * width), -2.0 * width)
        return x + drift, width * (math.sqrt(3.0) / math.pi)

    @staticmethod
    def draw(block: Block, x: Tensor, grad: Tensor, width: Tensor, uniform: Tensor) -> Tensor:
        centre, scale = _Integer._centre_and_scale(x, grad, width)
        lower, upper = block.bounds(x)
        new = (centre + scale * torch.logit(uniform, eps=torch.finfo(uniform.dtype).eps)).round()
        return torch.maximum(torch.minimum(new, upper), lower)

    @staticmethod
    def log_prob(block: Block, x: Tensor, grad: Tensor, width: Tensor, new: Tensor) -> Tensor:
        centre, scale = _Integer._centre_and_scale(x, grad, width)
        lower, upper = block.bounds(x)
        above = (new + 0.5 - centre) / scale
        below = (new - 0.5 - centre) / scale
        inner = logsigmoid(above) + logsigmoid(-below) + _log1mexp(1.0 / scale)
        at_lower = logsigmoid(above)
        at_upper = logsigmoid(-below)
        log_prob = torch.where(new <= lower, at_lower, torch.where(new >= upper, at_upper, inner))
        return torch.where(lower >= upper, 0.0, log_prob).sum(-1)


_PROPOSALS: dict[Kind, type[_Rule]] = {"binary": _Binary, "one-hot": _OneHot, "integer": _Integer}


@dataclass(frozen=True)
class DiscreteLangevin(MetropolisKernel):
    r"""Moves all discrete coordinates at once by locally informed proposals.

    The gradient of the log density, as if the discrete coordinates were real numbers, says which
    changes look promising, and many of them are proposed at once; a Metropolis test accepts or
    rejects them together. A variable of state j, whose conditional probabilities by that gradient
    are :math:`\pi_k`, is proposed to change to k with probability
    :math:`\pi_k (1 - e^{-h / \sqrt{\pi_j \pi_k}})`; integers take a rounded Langevin step. The
    step size h is tuned by the pilot.

    The kernel is reversible. One transition costs one gradient, since that of the present state is
    kept. The test reads only log densities at discrete states, so a gradient that is wrong or zero
    costs acceptance, and never makes the kernel inexact.

    Source: Zanella (2020), *Informed proposals for local MCMC in discrete spaces*; Sun, Dai,
    Schuurmans et al. (2023), *Discrete Langevin samplers via Wasserstein gradient flow*.

    Args:
        target_accept: Acceptance probability that the pilot steers the step sizes toward.
        lattice: The coordinates to move; None until the problem that is annealed fills them in.

    Raises:
        ValueError: If ``target_accept`` is not in (0, 1).

    Example:
        >>> DiscreteLangevin().num_gradients
        1
    """

    target_accept: float = 0.8
    lattice: Lattice | None = None

    def __post_init__(self) -> None:
        check_target_accept(self.target_accept)

    @property
    def num_gradients(self) -> int:
        """Gradients per transition."""
        return 1

    @property
    def largest_step(self) -> float:
        """Step size beyond which nothing changes."""
        return _LARGEST_STEP

    def on(self, lattice: Lattice) -> DiscreteLangevin:
        """Returns the kernel that moves the coordinates of ``lattice``."""
        return replace(self, lattice=lattice)

    def declared_noise(self, state: State) -> tuple[Noise, ...]:
        """A uniform number per coordinate, and one for the acceptance."""
        return Noise("uniform", (state.position.shape[-1],)), Noise("uniform")

    def step(
        self,
        state: State,
        density: Density,
        beta: Tensor,
        tuning: Tuning,
        noise: tuple[Tensor, ...],
    ) -> tuple[State, Info]:
        """Moves all chains once at inverse temperature ``beta``."""
        lattice = bound(self.lattice, self)
        each, uniform = noise
        here, grad = state.position, state.grad(beta)
        parts = []
        for block in lattice.blocks:
            x, g, u = block.take(here), block.take(grad), block.take(each)
            parts.append(_PROPOSALS[block.kind].draw(block, x, g, _step_of(block, tuning), u))
        proposal = density(lattice.replace(here, parts))
        there, grad_there = proposal.position, proposal.grad(beta)
        log_accept = proposal.log_density(beta) - state.log_density(beta)
        for block in lattice.blocks:
            x, y = block.take(here), block.take(there)
            g, back = block.take(grad), block.take(grad_there)
            step, rule = _step_of(block, tuning), _PROPOSALS[block.kind]
            log_accept = log_accept + rule.log_prob(block, y, back, step, x)
            log_accept = log_accept - rule.log_prob(block, x, g, step, y)
        new, accept_prob = accept(state, proposal, log_accept, uniform)
        return new, Info(accept_prob=accept_prob, diverging=log_accept.isnan())


def _step_of(block: Block, tuning: Tuning) -> Tensor:
    """Computes the step of a block's proposals, ``[*batch, 1]``, or its widths ``[*batch, n]``."""
    step = tuning.step_size.unsqueeze(-1)
    if block.kind != "integer":
        return step
    return step * tuning.scale[..., block.start : block.stop].clamp(min=0.5) + _LEAST_WIDTH


@dataclass(frozen=True)
class SingleSite(MetropolisKernel):
    r"""Random-scan Metropolis: changes one discrete variable, chosen at random, at a time.

    A categorical variable is proposed to change to any other category, with equal probabilities; an
    integer by a rounded symmetric step. The kernel reads no gradient, so it serves densities whose
    gradient says nothing about the effect of a change. A transition makes ``num_moves`` such moves,
    each with a Metropolis test of its own, and is reversible.

    Args:
        num_moves: Changes tried per transition; each costs one evaluation.
        target_accept: Acceptance probability that the pilot steers the widths of integers toward.
        lattice: As of :class:`DiscreteLangevin`.

    Raises:
        ValueError: If ``num_moves`` is below 1 or ``target_accept`` not in (0, 1).

    Example:
        >>> SingleSite(num_moves=3).num_gradients
        3
    """

    num_moves: int = 4
    target_accept: float = 0.4
    lattice: Lattice | None = None

    def __post_init__(self) -> None:
        as_count("num_moves", self.num_moves)
        check_target_accept(self.target_accept)

    @property
    def num_gradients(self) -> int:
        """Evaluations per transition."""
        return self.num_moves

    @property
    def largest_step(self) -> float:
        """Step size beyond which nothing changes."""
        return _LARGEST_STEP

    def on(self, lattice: Lattice) -> SingleSite:
        """Returns the kernel that moves the coordinates of ``lattice``."""
        return replace(self, lattice=lattice)

    def declared_noise(self, state: State) -> tuple[Noise, ...]:
        """Three uniform numbers per move: which variable, where to, whether to accept."""
        each = Noise("uniform", (self.num_moves,))
        return each, each, each

    def step(
        self,
        state: State,
        density: Density,
        beta: Tensor,
        tuning: Tuning,
        noise: tuple[Tensor, ...],
    ) -> tuple[State, Info]:
        """Moves all chains once at inverse temperature ``beta``."""
        lattice = bound(self.lattice, self)
        numbers = lattice.variables(state.position)
        total = torch.zeros_like(state.log_base)
        failed = torch.zeros_like(state.log_base, dtype=torch.bool)
        for move in range(self.num_moves):
            which, where, uniform = (part[..., move] for part in noise)
            index = (which * lattice.count).floor().clamp(max=lattice.count - 1)
            chosen = numbers == index.unsqueeze(-1)
            here = state.position
            parts = [
                _change(block, block.take(here), where.unsqueeze(-1), tuning)
                for block in lattice.blocks
            ]
            there = torch.where(chosen, lattice.replace(here, parts), here)
            proposal = density(there)
            log_accept = proposal.log_density(beta) - state.log_density(beta)
            state, accept_prob = accept(state, proposal, log_accept, uniform)
            total = total + accept_prob / self.num_moves
            failed = failed | log_accept.isnan()
        return state, Info(accept_prob=total, diverging=failed)


def _change(block: Block, x: Tensor, uniform: Tensor, tuning: Tuning) -> Tensor:
    """Proposes another value of each variable by a symmetric rule."""
    if block.kind == "binary":
        return 1.0 - x
    if block.kind == "one-hot":
        size = block.size
        names = torch.arange(size, dtype=x.dtype, device=x.device)
        shift = 1.0 + (uniform * (size - 1)).floor().clamp(max=max(size - 2, 0))
        index = ((x * names).sum(-1) + shift) % size
        return (names == index.unsqueeze(-1)).to(x.dtype)
    width = _step_of(block, tuning)
    jump = width * torch.logit(uniform, eps=torch.finfo(uniform.dtype).eps)
    jump = jump.sign() * (1.0 + jump.abs().floor())  # a symmetric step of one at least
    lower, upper = block.bounds(x)
    new = x + jump
    return torch.where((new >= lower) & (new <= upper), new, x)
