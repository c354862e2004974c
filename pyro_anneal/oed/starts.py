r"""Starts that are fitted per design: a regression of latents on what would be observed.

Pairs simulated from the model are draws of the joint density, so a regression of the latents (in
unconstrained coordinates u) on the observations is a posterior for *every* observation, at the cost
of the simulations and of no density:

.. math:: q(u | y, d) = N(u;\, A_d\, \phi(y) + b_d,\, \Sigma_d)

It is exact for linear Gaussian models. Bounds stay bounds for any start that does not know the pairs
they are measured on: a better one is a smaller gap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.coordinates import bijection
from ..models.discrete import is_discrete
from ..models.moving import supports_are_static
from ..models.types import Arguments
from .pairs import Experiment, ModelRun

__all__ = ["Regression", "constrain", "fit_start", "unconstrain"]

_LEAST_PAIRS = 30  # per design, to fit to
_MOST_PRODUCTS = 6  # observed numbers up to which their products are features too
_RIDGES = (1e-6, 1e-2)  # of standardized features


def unconstrain(run: ModelRun, names: Sequence[str], values: Mapping[str, Tensor]) -> Tensor:
    """Maps values of sites, ``[*lead, ...]`` each, to u ``[*lead, D]``; lead is that of the run."""
    parts = [bijection(run.fn(name)).inv(values[name]) for name in names]
    return torch.cat([part.reshape(*run.lead, -1) for part in parts], -1)


def constrain(run: ModelRun, names: Sequence[str], u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Maps u ``[*lead, D]`` to values of sites and log |d value / du| ``[*lead]``."""
    values: dict[str, Tensor] = {}
    total, start = torch.zeros(run.lead, dtype=u.dtype, device=u.device), 0
    for name in names:
        fn = run.fn(name)
        transform = bijection(fn)
        shape = transform.inverse_shape(fn.batch_shape + fn.event_shape)
        size = math.prod(shape[len(run.lead) :])
        part = u[..., start : start + size].reshape(shape)
        values[name] = transform(part)
        log_det = transform.log_abs_det_jacobian(part, values[name])
        total = total + log_det.reshape(*run.lead, -1).sum(-1)
        start += size
    return values, total


@dataclass(frozen=True, eq=False)
class Regression:
    """A Gaussian of u about a function of the observations, one per design.

    Attributes:
        unknown: Names of the latents it speaks of, in the order of u.
        observed: Names of the sites it looks at.
        centre: Means of the observed numbers, ``[*designs, F]``.
        spread: Their standard deviations.
        has_products: Whether products of two of them are features.
        weights: Of the features, ``[*designs, P, D]``.
        factor: Cholesky factor of the residual covariance, ``[*designs, D, D]``.
        gain: Nats of log density on held-out pairs beyond the prior's, mean over designs.
    """

    unknown: tuple[str, ...]
    observed: tuple[str, ...]
    centre: Tensor
    spread: Tensor
    has_products: bool
    weights: Tensor
    factor: Tensor
    gain: float = 0.0

    def mean(self, values: Mapping[str, Tensor], lead: torch.Size) -> Tensor:
        """Computes the mean of u, ``[*lead, D]``, from values of the observed sites."""
        features = self._features(_numbers(self.observed, values, lead))
        found: Tensor = (features.unsqueeze(-2) @ self.weights).squeeze(-2)
        return found

    def log_density(self, u: Tensor, mean: Tensor) -> Tensor:
        """Computes log q(u), in nats, over the last dimension."""
        white = torch.linalg.solve_triangular(
            self.factor, (u.to(mean) - mean).unsqueeze(-1), upper=False
        ).squeeze(-1)
        log_det = self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = 0.5 * math.log(2.0 * math.pi) * u.shape[-1]
        density: Tensor = -0.5 * white.square().sum(-1) - log_det - constant
        return density

    def draw(self, mean: Tensor, count: int) -> Tensor:
        """Draws u, ``[count, *mean.shape]``."""
        noise = torch.randn((count, *mean.shape), dtype=mean.dtype, device=mean.device)
        return mean + (self.factor @ noise.unsqueeze(-1)).squeeze(-1)

    def _features(self, numbers: Tensor) -> Tensor:
        white = (numbers - self.centre) / self.spread
        return _expanded(white, self.has_products)


def _numbers(names: Sequence[str], values: Mapping[str, Tensor], lead: torch.Size) -> Tensor:
    parts = [values[name].reshape(*lead, -1).to(torch.float64) for name in names]
    return torch.cat(parts, -1)


def _expanded(white: Tensor, has_products: bool) -> Tensor:
    parts = [torch.ones_like(white[..., :1]), white]
    if has_products:
        first, second = torch.triu_indices(white.shape[-1], white.shape[-1])
        parts.append(white[..., first] * white[..., second])
    return torch.cat(parts, -1)


def _solve(features: Tensor, u: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Fits weights and residual covariance; pairs come first, ``[M, *designs, .]``."""
    phi, target = features.movedim(0, -2), u.movedim(0, -2)
    count, width = phi.shape[-2], phi.shape[-1]
    gram = phi.mT @ phi / count + ridge * torch.eye(width, dtype=phi.dtype)
    weights = torch.linalg.solve(gram, phi.mT @ target / count)
    rest = target - phi @ weights
    covariance = rest.mT @ rest / max(count - width, 1)
    scale = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] + 1e-12
    factor, _ = torch.linalg.cholesky_ex(covariance + 1e-8 * scale * torch.eye(u.shape[-1]))
    return weights, factor


def fit_start(experiment: Experiment, observed: Sequence[str]) -> Regression | None:
    """Fits a regression of the latents that are not observed, if it beats the prior.

    A fifth of the pairs is held out: the features and the ridge that give it the most density are
    kept, fitted to all pairs.

    Args:
        experiment: Pairs that are measured nowhere else.
        observed: Names of the sites to look at; targets may be among them.

    Returns:
        The regression; None where some latent is discrete or its support moves, pairs are few, or
        the prior predicts held-out latents as well.
    """
    unknown = tuple(name for name in experiment.latents if name not in observed)
    count = len(experiment.design)
    if count < _LEAST_PAIRS or not unknown or not _can_move(experiment, unknown):
        return None
    run = experiment.run(experiment.values)
    u = unconstrain(run, unknown, experiment.values)
    numbers = _numbers(observed, experiment.values, experiment.shape)
    prior = run.log_prob(unknown) + constrain(run, unknown, u)[1]
    u = u.double()
    if not bool(u.isfinite().all() & numbers.isfinite().all() & prior.isfinite().all()):
        return None
    held = count - count // 5
    best, gain = None, 0.0
    for has_products in (False, True):
        if has_products and numbers.shape[-1] > _MOST_PRODUCTS:
            continue
        for ridge in _RIDGES:
            part = _fitted(unknown, observed, numbers[:held], u[:held], has_products, ridge)
            if part is None:
                continue
            mean = (part._features(numbers[held:]).unsqueeze(-2) @ part.weights).squeeze(-2)
            score = float((part.log_density(u[held:], mean) - prior[held:]).mean())
            if math.isfinite(score) and score > gain:
                best, gain = (has_products, ridge), score
    if best is None:
        return None
    found = _fitted(unknown, observed, numbers, u, *best)
    return None if found is None else Regression(**(vars(found) | {"gain": gain}))


def _fitted(
    unknown: Sequence[str],
    observed: Sequence[str],
    numbers: Tensor,
    u: Tensor,
    has_products: bool,
    ridge: float,
) -> Regression | None:
    centre, spread = numbers.mean(0), numbers.std(0)
    spread = torch.where(spread > 0.0, spread, 1.0)
    features = _expanded((numbers - centre) / spread, has_products)
    if 3 * features.shape[-1] > len(features):
        return None
    weights, factor = _solve(features, u, ridge)
    if not bool(factor.isfinite().all() & (factor.diagonal(dim1=-2, dim2=-1) > 0.0).all()):
        return None
    return Regression(
        tuple(unknown), tuple(observed), centre, spread, has_products, weights, factor
    )


def _can_move(experiment: Experiment, names: Sequence[str]) -> bool:
    first, second = (experiment.run({}) for _ in range(2))
    if any(is_discrete(first.fn(name)) for name in names):
        return False
    arguments: Arguments = ((experiment.design,), {})
    return supports_are_static(experiment.model, arguments, first.trace, second.trace, names)
