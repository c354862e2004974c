r"""Whether a fitted base covers what the prior reaches: tails, above all.

A fit is judged on its own draws, and those know nothing of what they do not reach: a posterior
with the heavy tails of its prior looks like a Gaussian to a Gaussian. Draws of the prior, weighted
by the likelihood, are draws of the posterior wherever the data say little, which is where its tails
are the prior's:

.. math:: S = \sum_n \bar w_n \, [p(u_n \mid x) > c \, q(u_n)], \quad w_n = p(x \mid u_n)

is the share of the posterior at which the base has less than the c-th part of its density. Where the
prior's draws have too few effective ones among them, or it is improper, draws of a Student-t that
is wider than the fit, and follows its own weighted draws, are asked the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..models.density import ModelDensity
from ..persistence.randomness import derived_seed, own_randomness
from .bases import FittedBase
from .components import DenseComponent
from .over_chains import draw_prior_chains
from .rows import rows_at_once

__all__ = ["TAIL_WEIGHT", "prior_weight_for", "wider_component"]

_MOST_DRAWS, _MOST_ROWS = 512, 16_384  # from the prior, and times the elements of a batch
_LEAST_DRAWS, _LEAST_EFFECTIVE = 64, 20.0
_FEW_ROWS = 32  # evaluations at once below which rows are dear
_THIN, _SHARE = 10.0, 0.02  # density of the posterior over the base's, and mass where it is larger
_LEAST_THIN = 3  # draws there
TAIL_WEIGHT = 0.2
_WIDER, _DOF = 2.0, 5.0  # scale of a wider fit over the fit, and its degrees of freedom
_NUM_TURNS, _WIDER_STILL = 4, 1.3  # turns of moving it to the draws, and scale over theirs


def prior_weight_for(
    model: ModelDensity,
    target: Any,
    base: FittedBase,
    seed: int,
    *,
    vouched: set[str] | None = None,
) -> float:
    """Chooses the weight at which the prior is to be mixed into a fitted base.

    Args:
        model: The model in the coordinates of the fit.
        target: Its captured density, beside that of the prior.
        base: What was fitted.
        seed: Seed of the fit.
        vouched: As of :func:`~.over_chains.draw_chains`.

    Returns:
        A weight, or zero where the fit covers the posterior, or nothing can be said.
    """
    count = _affordable_draws(model, target)
    if model.layout.improper or base.symmetry is not None or count < _LEAST_DRAWS:
        return 0.0
    with own_randomness(derived_seed(seed, "tails")), torch.no_grad():
        draws = draw_prior_chains(model, count, vouched=vouched)
        state = target(draws)
        log_weights = torch.where(draws.isfinite().all(-1), state.log_ratio(), -torch.inf)
        lacks = _lacks_tails(log_weights, state.log_target, base.log_density_of_rows(draws))
    return TAIL_WEIGHT if lacks else 0.0


def wider_component(
    model: ModelDensity, target: Any, base: FittedBase, seed: int
) -> DenseComponent | None:
    """Widens a fit that lacks tails, where the prior did not show it or is improper.

    Args:
        model: The model in the coordinates of the fit.
        target: Its captured density.
        base: What was fitted.
        seed: Seed of the fit.

    Returns:
        A Student-t, begun at one of the base's Gaussians and moved to its own weighted draws, to be
        mixed in at ``TAIL_WEIGHT``; None where they do not show that the base lacks tails of the
        posterior, or nothing can be said.
    """
    dense = [each for each in base.components if isinstance(each, DenseComponent)]
    count = _affordable_draws(model, target)
    many = base.symmetry is not None or len(dense) < len(base.components)
    if many or count < _LEAST_DRAWS:
        return None
    largest = dense[max(range(len(dense)), key=base.log_weights.__getitem__)]
    wide = DenseComponent(largest.loc, _WIDER * largest.scale_tril, _DOF)
    lacks = False
    with own_randomness(derived_seed(seed, "tails")), torch.no_grad():
        for turn in range(_NUM_TURNS):
            draws = torch.stack([wide.draw() for _ in range(count)])
            log_target = target(draws).log_target
            log_weights = log_target - wide.log_density(draws)
            lacks = _lacks_tails(log_weights, log_target, base.log_density_of_rows(draws))
            if turn < _NUM_TURNS - 1:
                wide = _moved(wide, draws, log_weights)
    return wide if lacks else None


def _moved(wide: DenseComponent, draws: Tensor, log_weights: Tensor) -> DenseComponent:
    """Moves a Student-t to the moments of weighted draws ``[N, *batch, D]``, and widens it."""
    weights = log_weights.double().nan_to_num(nan=-torch.inf).softmax(0).nan_to_num().to(draws)
    effective = 1.0 / weights.square().sum(0).clamp(min=1e-30)
    trust = (effective / (effective + draws.shape[-1] + 2.0)).unsqueeze(-1)
    mean = (weights.unsqueeze(-1) * draws.nan_to_num()).sum(0)
    loc = trust * mean + (1.0 - trust) * wide.loc
    apart = (draws - loc).nan_to_num()
    moments = torch.einsum("n...,n...i,n...j->...ij", weights, apart, apart)
    before = wide.scale_tril @ wide.scale_tril.mT
    trust = trust.unsqueeze(-1)
    covariance = trust * _WIDER_STILL**2 * moments + (1.0 - trust) * before
    factor, info = torch.linalg.cholesky_ex(covariance)
    if bool((info != 0).any()) or not bool(factor.isfinite().all()):
        return wide
    return DenseComponent(loc, factor, _DOF)


def _affordable_draws(model: ModelDensity, target: Any) -> int:
    """Counts the draws that may be weighed."""
    elements = max(model.layout.batch_shape.numel(), 1)
    dear = rows_at_once(target, model.layout.dim) < _FEW_ROWS
    return 0 if dear else min(_MOST_DRAWS, _MOST_ROWS // elements)


def _lacks_tails(log_weights: Tensor, log_target: Tensor, log_base: Tensor) -> bool:
    """Asks whether a base is thin where weighted draws ``[N, *batch]`` see the posterior."""
    log_weights = log_weights.double().nan_to_num(nan=-torch.inf)
    weights = log_weights.softmax(0).nan_to_num()
    log_evidence = log_weights.logsumexp(0) - math.log(len(log_weights))
    thin = log_target.double() - log_evidence - log_base.double() > math.log(_THIN)
    effective = 1.0 / weights.square().sum(0).clamp(min=1e-300)
    told = (effective >= _LEAST_EFFECTIVE) & (thin.sum(0) >= _LEAST_THIN)
    share = torch.where(told, (weights * thin).sum(0), 0.0)
    return float(share.mean()) > _SHARE
