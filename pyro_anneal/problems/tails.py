r"""Whether a fitted base covers what the prior reaches: tails, above all.

A fit is judged on its own draws, and those know nothing of what they do not reach: a posterior
with the heavy tails of its prior looks like a Gaussian to a Gaussian. Draws of the prior, weighted
by the likelihood, are draws of the posterior wherever the data say little, which is where its tails
are the prior's:

.. math:: S = \sum_n \bar w_n \, [p(u_n \mid x) > c \, q(u_n)], \quad w_n = p(x \mid u_n)

is the share of the posterior at which the base has less than the c-th part of its density. Where the
prior's draws have too few effective ones among them, they cannot tell.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..models.density import ModelDensity
from ..persistence.randomness import derived_seed, own_randomness
from .bases import FittedBase
from .over_chains import draw_prior_chains
from .rows import rows_at_once

__all__ = ["prior_weight_for"]

_MOST_DRAWS, _MOST_ROWS = 512, 16_384  # from the prior, and times the elements of a batch
_LEAST_DRAWS, _LEAST_EFFECTIVE = 64, 20.0
_FEW_ROWS = 32  # evaluations at once below which rows are dear
_THIN, _SHARE = 10.0, 0.02  # density of the posterior over the base's, and mass where it is larger
_LEAST_THIN = 3  # draws there
_WEIGHT = 0.2


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
    layout = model.layout
    if layout.improper or base.symmetry is not None:
        return 0.0
    elements = max(layout.batch_shape.numel(), 1)
    count = min(_MOST_DRAWS, _MOST_ROWS // elements)
    if count < _LEAST_DRAWS or rows_at_once(target, layout.dim) < _FEW_ROWS:
        return 0.0
    with own_randomness(derived_seed(seed, "tails")), torch.no_grad():
        draws = draw_prior_chains(model, count, vouched=vouched)
        state = target(draws)
        log_weights = state.log_ratio().double().nan_to_num(nan=-torch.inf)
        log_weights = torch.where(draws.isfinite().all(-1), log_weights, -torch.inf)
        log_base = base.log_density_of_rows(draws).double()
    weights = log_weights.softmax(0).nan_to_num()
    log_evidence = log_weights.logsumexp(0) - math.log(count)
    thin = state.log_target.double() - log_evidence - log_base > math.log(_THIN)
    effective = 1.0 / weights.square().sum(0).clamp(min=1e-300)
    told = (effective >= _LEAST_EFFECTIVE) & (thin.sum(0) >= _LEAST_THIN)
    share = torch.where(told, (weights * thin).sum(0), 0.0)
    return _WEIGHT if float(share.mean()) > _SHARE else 0.0
