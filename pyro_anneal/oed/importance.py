r"""Bounds on log densities of simulated observations from independent draws: annealing at T = 1.

With K draws from a start q and the exact posterior sample :math:`\theta^*` of the pair,

.. math::
    L = \log \frac{1}{K} \sum_{k=1}^{K} w_k, \qquad
    U = \log \frac{1}{K} \Bigl( w^* + \sum_{k=2}^{K} w_k \Bigr), \qquad
    w = \frac{p(\theta, y | d)}{q(\theta | y, d)}

bound log p(y | d) from below and above in expectation, from the same K + 1 evaluations. Where little
is learned they are all that is needed, and cost a hundredth of a chain.

Source: Burda, Grosse and Salakhutdinov (2016) for L; Sobolev and Vetrov (2019) and Brekelmans et al.
(2022), section 3, for U.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..weights import log_mean_exp
from .pairs import Experiment
from .starts import Regression, constrain, unconstrain

__all__ = ["Weighed", "weigh"]

_PRIOR_SHARE = 0.1  # of the draws, where a start is fitted: for tails that it lacks
_MOST_ROWS = 2**19  # draws times pairs times designs that are evaluated at once


@dataclass(frozen=True, eq=False)
class Weighed:
    """Log-weights of pairs, in nats.

    Attributes:
        exact: At the latents of each pair, ``[N, *designs]``.
        drawn: At the draws, ``[K, N, *designs]``.
    """

    exact: Tensor
    drawn: Tensor

    def bounds(self, num_draws: int | None = None) -> tuple[Tensor, Tensor]:
        """Bounds the log density of each pair, or blocks of fewer draws, ``[(blocks,) N, *designs]``."""
        drawn = self.drawn
        if num_draws is not None:
            blocks = len(drawn) // num_draws
            drawn = drawn[: blocks * num_draws].unflatten(0, (blocks, num_draws)).movedim(1, 0)
        exact = self.exact.expand(drawn.shape[1:])
        others = torch.cat([exact.unsqueeze(0), drawn[1:]])
        return log_mean_exp(drawn), log_mean_exp(others)


def weigh(
    experiment: Experiment, observed: Sequence[str], start: Regression | None, num_draws: int
) -> Weighed:
    """Computes log-weights for the log density of some sites, the other latents being drawn.

    Args:
        experiment: The pairs.
        observed: Names of the sites whose joint log density is to be bounded.
        start: A fitted start; None for the prior.
        num_draws: Number K of draws per pair.
    """
    size = max(1, _MOST_ROWS // (num_draws * max(1, math.prod(experiment.shape[1:]))))
    parts = []
    with torch.no_grad():
        for first in range(0, len(experiment.design), size):
            rows = experiment.part(slice(first, first + size))
            given = tuple(observed)
            if start is None:
                parts.append(_from_prior(rows, given, num_draws))
            else:
                parts.append(_from_regression(rows, given, start, num_draws))
    return Weighed(
        torch.cat([part.exact for part in parts]), torch.cat([part.drawn for part in parts], 1)
    )


def _from_prior(experiment: Experiment, observed: tuple[str, ...], num_draws: int) -> Weighed:
    given = {name: experiment.values[name] for name in observed}
    drawn = experiment.run(given, num_draws).log_prob(observed)
    return Weighed(experiment.run(experiment.values).log_prob(observed).double(), drawn.double())


def _from_regression(
    experiment: Experiment, observed: tuple[str, ...], start: Regression, num_draws: int
) -> Weighed:
    given = {name: experiment.values[name] for name in observed}
    mean = start.mean(given, experiment.shape)
    prior = experiment.run(given, num_draws)
    values = prior.values(start.unknown)
    dtype = next(iter(values.values())).dtype
    fitted = start.draw(mean, num_draws).to(dtype)
    from_prior = torch.rand(prior.lead) < _PRIOR_SHARE
    u = torch.where(from_prior.unsqueeze(-1), unconstrain(prior, start.unknown, values), fitted)
    moved, log_det = constrain(prior, start.unknown, u)
    run = experiment.run(given | moved, num_draws)
    exact = experiment.run(experiment.values)
    u_exact = unconstrain(exact, start.unknown, experiment.values)
    exact_log_det = constrain(exact, start.unknown, u_exact)[1]
    results = []
    for found, position, volume in ((exact, u_exact, exact_log_det), (run, u, log_det)):
        log_prior = found.log_prob(start.unknown).double()
        log_fit = start.log_density(position, mean) - volume.double()
        log_start = torch.logaddexp(
            log_prior + math.log(_PRIOR_SHARE), log_fit + math.log1p(-_PRIOR_SHARE)
        )
        log_target = log_prior + found.log_prob(observed).double()
        results.append(torch.where(log_start == -torch.inf, -torch.inf, log_target - log_start))
    return Weighed(*results)
