r"""What kernels share that propose a move and take it or leave it, each chain by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from typing_extensions import Self

from ..arguments import as_real
from .base import State
from .noise import Noise, draw_step

__all__ = ["MetropolisKernel", "accept", "check_target_accept"]


def accept(
    state: State, proposal: State, log_accept: Tensor, uniform: Tensor
) -> tuple[State, Tensor]:
    """Accepts or rejects per chain and batch element, on the log scale.

    A NaN in ``log_accept`` rejects, so one bad proposal never poisons a chain.

    Args:
        state: Current states.
        proposal: Proposed states.
        log_accept: Log acceptance ratio, shape ``[K, *batch]``.
        uniform: Uniform numbers in [0, 1), shape ``[K, *batch]``.

    Returns:
        The next states, and the acceptance probability in [0, 1].
    """
    log_accept = torch.where(log_accept.isnan(), -torch.inf, log_accept)
    # 1 - uniform lies in (0, 1]: a uniform of exactly 0 must not accept an absurd proposal.
    take = torch.log1p(-uniform) < log_accept
    wide = take.unsqueeze(-1)
    new = State(
        position=torch.where(wide, proposal.position, state.position),
        log_base=torch.where(take, proposal.log_base, state.log_base),
        log_target=torch.where(take, proposal.log_target, state.log_target),
        grad_base=torch.where(wide, proposal.grad_base, state.grad_base),
        grad_target=torch.where(wide, proposal.grad_target, state.grad_target),
    )
    return new, log_accept.clamp(max=0.0).exp()


def check_target_accept(target_accept: float) -> None:
    """Refuses an acceptance that no pilot can steer toward.

    Raises:
        ValueError: If it is not in (0, 1).
    """
    if not 0.0 < as_real("target_accept", target_accept) < 1.0:
        raise ValueError(f"target_accept must lie in (0, 1), got {target_accept}")


class MetropolisKernel(ABC):
    """A reversible kernel that moves every chain by its own noise, which it declares."""

    @property
    def moves_chains_alone(self) -> bool:
        """Chains do not see each other, so a step may be recorded for one of them."""
        return True

    @abstractmethod
    def declared_noise(self, state: State) -> tuple[Noise, ...]:
        """Says what one step draws for each chain and batch element."""

    def noise(self, state: State, generator: torch.Generator | None) -> tuple[Tensor, ...]:
        """Draws what is declared, for one step."""
        return draw_step(self.declared_noise(state), state, generator)

    def reversal(self) -> Self:
        """Returns the kernel itself: it satisfies detailed balance."""
        return self
