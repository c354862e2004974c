r"""What every transition kernel shares: the cached state, the tuning, the protocol.

An annealing path between a base density q and a target density p is

.. math:: \log \pi_\beta(u) = (1 - \beta) \log q(u) + \beta \log p(u)

up to its normalizer. A :class:`State` caches the four ingredients (both log densities and both
gradients), never the mixture: so the weight update and a change of beta cost no evaluation, and no
density of an earlier beta can be reused by mistake.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = [
    "Density",
    "Info",
    "Kernel",
    "LimitsSteps",
    "MovesChainsAlone",
    "SaysWhatItReads",
    "SeveralStepSizes",
    "State",
    "Tuning",
    "largest_step",
    "moves_chains_alone",
    "needs_gradients",
    "step_targets",
]


class State(NamedTuple):
    """What the next transition needs of K chains; a NamedTuple, hence a pytree for compilers."""

    position: Tensor  # u, unconstrained, [K, *batch, D]
    log_base: Tensor  # log q(u), nats, [K, *batch]
    log_target: Tensor  # log p(x, u), nats, [K, *batch]
    grad_base: Tensor  # [K, *batch, D]
    grad_target: Tensor  # [K, *batch, D]

    def log_density(self, beta: Tensor) -> Tensor:
        """Computes the unnormalized log density of the path at ``beta``, shape ``[K, *batch]``."""
        return self.log_base + beta * (self.log_target - self.log_base)

    def grad(self, beta: Tensor) -> Tensor:
        """Computes the gradient of the path's log density, shape ``[K, *batch, D]``."""
        return self.grad_base + beta * (self.grad_target - self.grad_base)

    def log_ratio(self) -> Tensor:
        """Computes ``log p(x, u) - log q(u)``, the derivative of the path in beta, nats."""
        return self.log_target - self.log_base


class Density(Protocol):
    """Evaluates base and target of K chains: positions ``[K, *batch, D]`` to a :class:`State`."""

    def __call__(self, position: Tensor) -> State:
        """Evaluates both log densities and both gradients at ``position``."""
        ...


class Tuning(NamedTuple):
    """What a pilot chose for one beta and froze."""

    step_size: Tensor  # per batch element, [*batch]; of a kernel of M parts, [*batch, M]
    scale: Tensor  # standard deviation per coordinate (inverse mass = scale ** 2), [*batch, D]


class Info(NamedTuple):
    """What a human may ask about one transition."""

    accept_prob: Tensor  # [K, *batch]
    diverging: Tensor  # bool, [K, *batch]
    accept_by_part: Tensor | None = None  # of a kernel of M parts, [K, *batch, M]


@runtime_checkable
class Kernel(Protocol):
    """A transition that leaves the path's density at one beta invariant.

    ``noise`` draws all randomness of one step up front, so that ``step`` is a pure function of
    tensors, exact to test and compilable. ``reversal`` returns the kernel of the time-reversed
    chain: the kernel itself when it is reversible (detailed balance).
    """

    @property
    def num_gradients(self) -> int:
        """Calls of the density per step."""
        ...

    @property
    def target_accept(self) -> float | None:
        """Acceptance that the pilot steers the step size toward; None if there is none to tune."""
        ...

    def noise(self, state: State, generator: torch.Generator | None) -> tuple[Tensor, ...]:
        """Draws the randomness of one step."""
        ...

    def step(
        self,
        state: State,
        density: Density,
        beta: Tensor,
        tuning: Tuning,
        noise: tuple[Tensor, ...],
    ) -> tuple[State, Info]:
        """Moves all chains once at inverse temperature ``beta``."""
        ...

    def reversal(self) -> Kernel:
        """Returns the kernel of the time-reversed chain."""
        ...


@runtime_checkable
class MovesChainsAlone(Protocol):
    """A kernel that says whether chains see each other.

    Where they do not, a step may be recorded for one chain and run for all of them with chains last
    in memory, which is several times as fast for small models. Of a kernel that says nothing it is
    taken that chains may see each other, as in ensemble samplers.
    """

    @property
    def moves_chains_alone(self) -> bool:
        """Whether the move of a chain depends on that chain and its own noise only."""
        ...


def moves_chains_alone(kernel: Kernel) -> bool:
    """Asks a kernel whether each chain moves by itself; False if it does not say so.

    Example:
        >>> from pyro_anneal.kernels import HMC
        >>> moves_chains_alone(HMC())
        True
    """
    return isinstance(kernel, MovesChainsAlone) and bool(kernel.moves_chains_alone)


@runtime_checkable
class LimitsSteps(Protocol):
    """A kernel with step sizes beyond which nothing changes.

    Where proposals are always accepted, a pilot would lengthen the steps for ever.
    """

    @property
    def largest_step(self) -> float | tuple[float, ...]:
        """The largest useful step size, or one for each of ``Tuning.step_size``."""
        ...


def largest_step(kernel: Kernel) -> float | tuple[float, ...]:
    """Asks a kernel for its largest useful step size; infinite if it does not say."""
    return kernel.largest_step if isinstance(kernel, LimitsSteps) else math.inf


@runtime_checkable
class SaysWhatItReads(Protocol):
    """A kernel that says whether it looks at gradients."""

    @property
    def needs_gradients(self) -> bool:
        """Whether ``step`` reads ``grad_base`` or ``grad_target``; if not, models may leave torch."""
        ...


def needs_gradients(kernel: Kernel) -> bool:
    """Asks a kernel whether it looks at gradients; True if it does not say."""
    return kernel.needs_gradients if isinstance(kernel, SaysWhatItReads) else True


@runtime_checkable
class SeveralStepSizes(Protocol):
    """A kernel of several parts, each with a step size of its own."""

    @property
    def num_step_sizes(self) -> int:
        """Number M of step sizes, in the last dimension of ``Tuning.step_size``."""
        ...

    @property
    def target_accepts(self) -> tuple[float | None, ...]:
        """Acceptance that the pilot steers each of them toward; None if there is none to tune."""
        ...


def step_targets(kernel: Kernel) -> tuple[float | None, ...]:
    """Collects the acceptance to steer toward, one per step size of a kernel."""
    if isinstance(kernel, SeveralStepSizes):
        return kernel.target_accepts
    return (kernel.target_accept,)
