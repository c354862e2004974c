r"""Phases: a narrow spike inside a broad slab, which no path of densities connects smoothly.

From the slab the spike is invisible: nearly no draw comes near it, and gradients elsewhere know
nothing of it. But what is narrow is made so by the likelihood. The optima of

.. math:: \log p(z) + s \, \log p(x \mid z)

for growing powers s lead from the posterior's optimum to that of the likelihood, where such a
spike stands. From the spike, in turn, the slab shows in the curvature far away
(:func:`~.gaussian.quadratic_models`). What is found counts by the evidence lower bound of its
Gaussian, never by the height of its density: a funnel's neck is high and holds nothing. A needle
toward which no gradient leads stays unseen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import Density, State
from .gaussian import follow_newton
from .rows import Rows

__all__ = ["likelihood_optima"]

# Powers of the likelihood whose optima are followed, each from the last.
_POWERS = (4.0, 256.0)


class _Tilted:
    """The target with its likelihood raised to a power."""

    def __init__(self, from_prior: Density, power: float) -> None:
        self.from_prior = from_prior
        self.power = power

    def __call__(self, position: Tensor) -> State:
        state = self.from_prior(position)
        more = self.power - 1.0
        value = state.log_target + more * (state.log_target - state.log_base)
        grad = state.grad_target + more * (state.grad_target - state.grad_base)
        return state._replace(log_target=value, grad_target=grad)


def likelihood_optima(rows: Rows, origin: Tensor, generator: torch.Generator) -> Tensor:
    """Follows the optimum from the posterior toward the likelihood's.

    Args:
        rows: Evaluates the target beside the prior.
        origin: An optimum of the target, ``[D]``.
        generator: Source of noise.

    Returns:
        Optima by power ``[S, D]``, those that are finite.
    """
    point, found = origin.unsqueeze(0), [origin.unsqueeze(0)]
    for power in _POWERS:
        tilted = Rows(_Tilted(rows.density, power), rows.size, rows.batch_rank)
        point = follow_newton(tilted, point, generator, num_steps=12, patience=3).loc
        rows.count += tilted.count
        if not bool(point.isfinite().all()):
            break
        found.append(point)
    return torch.cat(found[1:] or [origin.unsqueeze(0)])
