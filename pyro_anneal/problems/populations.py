r"""Populations that show a start what the posterior looks like where importance sampling cannot.

Where few draws of a mixture carry weight, nothing can be learnt from them. Two short tempered
populations, one that comes down from the prior and one from the mixture itself, end near the
posterior: weighted by what evidence each found, their particles tell where components are missing.
They also judge bases, half of them held back, by

.. math:: E_p[\log p(x, u) - \log q(u)] = \log p(x) + \mathrm{KL}(p \,\|\, q)

whose least value covers all that the particles saw. An effective sample size of draws of q says
nothing of places that q does not reach.

Source: Del Moral, Doucet and Jasra (2006), *Sequential Monte Carlo samplers*.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..chains.blockwise import Blockwise
from ..chains.pilot import Pilot, run_pilot
from ..kernels import HMC, Density, State
from .rows import Rows

__all__ = ["Population", "draw_population"]

# Particles from either side.
_NUM_PARTICLES = 128
_SETTINGS = Pilot(num_chains=_NUM_PARTICLES, num_moves=5, ess_fraction=0.5, max_stages=40)
# Nats of evidence by which one side may trail the other and still count.
_TRAILING = 12.0


@dataclass(frozen=True, eq=False)
class Population:
    """Particles near the posterior."""

    position: Tensor  # [N, D]
    log_target: Tensor  # [N]
    weights: Tensor  # normalized, [N]

    def halves(self) -> tuple[Population, Population]:
        """Splits it in two that share no particle."""
        parts = [self._part(slice(first, None, 2)) for first in (0, 1)]
        return parts[0], parts[1]

    def _part(self, which: slice) -> Population:
        weights = self.weights[which]
        return Population(self.position[which], self.log_target[which], weights / weights.sum())


class _FromBase:
    """The path from a base whose density and gradient are at hand, to the target of rows."""

    def __init__(self, target: Density, log_density: Callable[[Tensor], Tensor]) -> None:
        self.target = target
        self.log_density = log_density

    def __call__(self, position: Tensor) -> State:
        state = self.target(position)
        with torch.enable_grad():
            at = position.detach().requires_grad_(True)
            log_base = self.log_density(at)
            (grad,) = torch.autograd.grad(log_base.sum(), at)
        return state._replace(log_base=log_base.detach(), grad_base=grad)


def draw_population(
    rows: Rows,
    draw_prior: Callable[[int], Tensor] | None,
    draw: Callable[[int], Tensor],
    log_density: Callable[[Tensor], Tensor],
    generator: torch.Generator,
) -> Population | None:
    """Walks particles from the prior and from a base to the posterior.

    Args:
        rows: Evaluates the target, beside the prior where there is one.
        draw_prior: Draws N positions from the prior, or as many of them as are finite; None where it
            is improper.
        draw: Draws N positions of the base.
        log_density: Log density of the base at ``[N, D]``.
        generator: Source of noise.

    Returns:
        Their ends; None if there are none of any density.
    """
    target = Blockwise(rows.density, rows.size)
    sides: list[tuple[Density, Tensor]] = [(_FromBase(target, log_density), draw(_NUM_PARTICLES))]
    if draw_prior is not None:
        sides.append((target, draw_prior(_NUM_PARTICLES)))
    ends, evidence = [], []
    for density, start in sides:
        if not len(start):
            continue
        with torch.no_grad():
            state = density(start)
            if not bool((state.log_ratio() > -torch.inf).any()):
                continue
            found = run_pilot(density, HMC(), state, generator, settings=_SETTINGS)
            rows.count += found.num_gradients * len(start)
            end = target(found.position)
        if bool(found.log_evidence.isfinite()) and bool(end.log_target.isfinite().all()):
            ends.append(end)
            evidence.append(found.log_evidence)
    if not ends:
        return None
    log_share = torch.stack(evidence)
    log_share = torch.where(log_share < log_share.max() - _TRAILING, -torch.inf, log_share)
    sizes = torch.tensor([len(end.position) for end in ends], device=log_share.device)
    shares = (log_share.softmax(0) / sizes).repeat_interleave(sizes)
    kept = shares > 0.0
    position = torch.cat([end.position for end in ends])[kept]
    log_target = torch.cat([end.log_target for end in ends])[kept]
    return Population(position, log_target, shares[kept].to(position.dtype))
