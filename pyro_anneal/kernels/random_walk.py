"""Random-walk Metropolis: the simplest kernel, for densities without useful gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import Density, Info, State, Tuning
from .metropolis import MetropolisKernel, accept, check_target_accept
from .noise import Noise

__all__ = ["RandomWalk"]


@dataclass(frozen=True)
class RandomWalk(MetropolisKernel):
    r"""Random-walk Metropolis with Gaussian proposals ``u + step_size * scale * noise``.

    Reversible. One step evaluates the density once.

    Source: Roberts, Gelman and Gilks (1997) for the default acceptance.

    Args:
        target_accept: Acceptance probability that the pilot steers the step sizes toward.

    Raises:
        ValueError: If ``target_accept`` is not in (0, 1).

    Example:
        >>> RandomWalk().num_gradients
        1
    """

    target_accept: float = 0.3

    def __post_init__(self) -> None:
        check_target_accept(self.target_accept)

    @property
    def num_gradients(self) -> int:
        """Evaluations per transition."""
        return 1

    def declared_noise(self, state: State) -> tuple[Noise, ...]:
        """A standard normal step and a uniform number."""
        return Noise("normal", (state.position.shape[-1],)), Noise("uniform")

    @property
    def needs_gradients(self) -> bool:
        """Proposals do not look at gradients, so the density may leave torch."""
        return False

    def step(
        self,
        state: State,
        density: Density,
        beta: Tensor,
        tuning: Tuning,
        noise: tuple[Tensor, ...],
    ) -> tuple[State, Info]:
        """Moves all chains once at inverse temperature ``beta``."""
        direction, uniform = noise
        move = tuning.step_size.unsqueeze(-1) * tuning.scale
        proposal = density(state.position + move * direction)
        log_accept = proposal.log_density(beta) - state.log_density(beta)
        new, accept_prob = accept(state, proposal, log_accept, uniform)
        return new, Info(accept_prob=accept_prob, diverging=log_accept.isnan())
