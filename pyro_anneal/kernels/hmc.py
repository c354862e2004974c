r"""Hamiltonian Monte Carlo with a leapfrog integrator and a diagonal mass matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import as_count, as_real
from .base import Density, Info, State, Tuning
from .metropolis import MetropolisKernel, accept, check_target_accept
from .noise import Noise

__all__ = ["HMC", "leapfrog"]

# An energy error of 1000 nats marks a divergence, as in Stan and Pyro.
MAX_ENERGY_ERROR = 1000.0


def leapfrog(
    state: State, momentum: Tensor, density: Density, beta: Tensor, tuning: Tuning, num_steps: int
) -> tuple[State, Tensor]:
    r"""Integrates Hamilton's equations with the leapfrog scheme.

    In whitened momentum ``v = scale * p``, standard normal, with h = ``step_size``:

    .. math::
        v \leftarrow v + \tfrac{h}{2}\, s \nabla \log \pi_\beta(u), \qquad u \leftarrow u + h\, s\, v

    The map is volume-preserving and reversible under ``v -> -v``. It evaluates the density exactly
    ``num_steps`` times: the gradient at the start is cached in ``state``.

    Args:
        state: Starting points of K chains, positions ``[K, *batch, D]``.
        momentum: Whitened momentum, ``[K, *batch, D]``.
        density: Evaluates base and target.
        beta: Inverse temperature, scalar tensor.
        tuning: Step size ``[*batch]`` and scale ``[*batch, D]``.
        num_steps: Number of leapfrogs.

    Returns:
        The end state and the momentum there.
    """
    move = tuning.step_size.unsqueeze(-1) * tuning.scale
    half = 0.5 * move
    momentum = torch.addcmul(momentum, half, state.grad(beta))
    for left in reversed(range(num_steps)):
        state = density(torch.addcmul(state.position, move, momentum))
        # between two leapfrogs, two half steps of the momentum are one
        momentum = torch.addcmul(momentum, move if left else half, state.grad(beta))
    return state, momentum


@dataclass(frozen=True)
class HMC(MetropolisKernel):
    r"""Hamiltonian Monte Carlo: fresh momentum, L leapfrogs, Metropolis test.

    This is the default kernel for continuous latents. A transition draws a momentum, follows the
    gradient of the log density for ``num_leapfrog`` steps, and accepts or rejects where it arrives.
    Step sizes and a scale per coordinate are tuned by the pilot, for each beta. The kernel is
    reversible with respect to the path's density at any beta, step size and scale, and one
    transition costs exactly ``num_leapfrog`` gradients.

    Source: Neal (2011), *MCMC using Hamiltonian dynamics*, sections 3.2 and 4.2 (jitter).

    Args:
        num_leapfrog: Leapfrogs per transition. At the same cost, more temperatures with few
            leapfrogs give tighter bounds than fewer temperatures with many.
        target_accept: Acceptance probability that the pilot steers the step sizes toward.
        jitter: Each chain multiplies its step size by a number uniform on ``1 - jitter`` to
            ``1 + jitter``, drawn anew at each transition. Without it, L leapfrogs of one length can
            return a Gaussian to where it was, with an acceptance that looks perfect.

    Raises:
        ValueError: If ``num_leapfrog`` is below 1, ``target_accept`` not in (0, 1) or ``jitter`` not
            in [0, 1).

    Example:
        >>> HMC(num_leapfrog=3).num_gradients
        3
    """

    num_leapfrog: int = 2
    target_accept: float = 0.75
    jitter: float = 0.5

    def __post_init__(self) -> None:
        as_count("num_leapfrog", self.num_leapfrog)
        check_target_accept(self.target_accept)
        if not 0.0 <= as_real("jitter", self.jitter) < 1.0:
            raise ValueError(f"jitter must lie in [0, 1), got {self.jitter}")

    @property
    def num_gradients(self) -> int:
        """Gradients per transition: the leapfrogs."""
        return self.num_leapfrog

    def declared_noise(self, state: State) -> tuple[Noise, ...]:
        """A standard normal momentum, a uniform number, and one in [-1, 1) for the jitter."""
        momentum = Noise("normal", (state.position.shape[-1],))
        return momentum, Noise("uniform"), Noise("uniform", low=-1.0)

    def step(
        self,
        state: State,
        density: Density,
        beta: Tensor,
        tuning: Tuning,
        noise: tuple[Tensor, ...],
    ) -> tuple[State, Info]:
        """Moves all chains once at inverse temperature ``beta``."""
        momentum, uniform, jitter = noise
        step_size = tuning.step_size * (1.0 + self.jitter * jitter)
        tuning = Tuning(step_size, tuning.scale)
        proposal, end = leapfrog(state, momentum, density, beta, tuning, self.num_leapfrog)
        kinetic = 0.5 * (momentum.square().sum(-1) - end.square().sum(-1))
        log_accept = proposal.log_density(beta) - state.log_density(beta) + kinetic
        new, accept_prob = accept(state, proposal, log_accept, uniform)
        diverging = ~(log_accept > -MAX_ENERGY_ERROR)  # NaN counts as diverging
        return new, Info(accept_prob=accept_prob, diverging=diverging)
