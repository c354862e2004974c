r"""Nested Gaussians: a few leading coordinates, and all others given them.

Scales of a hierarchy bend a posterior: given them the rest is next to a Gaussian, but one whose
location and covariance move with them, so that no few Gaussians of all have room for the neck of a
funnel. At many values of the leading coordinates h Gaussians :math:`q(x \mid h)` are fitted, whose
evidence lower bounds

.. math:: \ell(h) \le \log \int p(h, x) \, dx

are those of the marginal posterior of h. It is fitted by a mixture of Student-t in few dimensions,
and means, scales and correlations of the Gaussians by smooth functions of h (:mod:`.given`):

.. math:: q(h, x) = \sum_j \pi_j \, t_\nu(h; \mu_j, \Sigma_j) \; N(x; m(h), S(h))

Where x given h is Gaussian, only h is left to be fitted, and draws of q, weighted by
:math:`p(h, x) / q(h, x)`, move its mixture further, at one evaluation each.

Source: Rue, Martino and Chopin (2009), *Approximate Bayesian inference for latent Gaussian models by
using integrated nested Laplace approximations*, for the nesting; its use as a base is our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import State
from .components import NestedComponent
from .gaussian import Candidates, follow_newton
from .given import Given, fit_given
from .marginals import DOF, Marginal, fit_marginal, white_noise
from .rows import Rows

__all__ = ["Nested", "nested_gaussians"]

# Values of the leading coordinates, times that they are drawn, and terms of their marginal.
_NUM_VALUES, _NUM_TURNS = 96, 4
_NUM_TERMS = {1: 6, 2: 14, 3: 18}
# Student-t this much wider than the moments of the marginal.
_WIDER = 2.0
# Its share of the values at which the others are fitted, and what is kept of it in the end: chains
# from there weigh nothing, which varies by luck and shows in no weights of few chains.
_SHARE_OF_SEEN, _SHARE_OF_WIDE = 0.25, 0.02
# Draws of the whole, times that they move the marginal, and the effective share that is enough.
_NUM_DRAWS, _NUM_FIRST_MOVES, _NUM_MOVES, _ENOUGH = 2048, 2, 4, 0.9
# Nats below the largest density of a value seen at which it no longer matters to the others' fit.
_FAR = 25.0


@dataclass(frozen=True, eq=False)
class Nested:
    """A mixture over the leading coordinates, and a Gaussian of all others given them."""

    lead: list[int]
    rest: list[int]
    marginal: Marginal
    given: Given

    def component(self) -> NestedComponent:
        """Makes the density."""
        marginal = self.marginal
        tables = (marginal.log_weights, marginal.loc, marginal.scale_tril)
        return NestedComponent([*self.lead, *self.rest], *tables, DOF, self.given)

    def log_density(self, position: Tensor) -> Tensor:
        """Computes log q at rows ``[N, D]``."""
        return self.component().log_density(position)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws rows ``[count, D]``."""
        value = self.marginal.draw(count, generator)
        noise = white_noise(value, (count, len(self.rest)), generator)
        return self.joined(value, self.given.place(value, noise))

    def joined(self, value: Tensor, other: Tensor) -> Tensor:
        """Joins leading coordinates and the others."""
        found = value.new_empty(len(value), len(self.lead) + len(self.rest))
        found[:, [*self.lead, *self.rest]] = torch.cat([value, other], 1)
        return found


class _AtValues:
    """The target of the others at each of N values of the leading coordinates, as a batch."""

    def __init__(
        self, rows: Rows, lead: Sequence[int], rest: Sequence[int], value: Tensor
    ) -> None:
        self.rows, self.lead, self.rest, self.value = rows, list(lead), list(rest), value

    def __call__(self, position: Tensor) -> State:
        value, grad = self.rows(self.joined(position))
        grad = grad[..., self.rest]
        return State(position, value, value, grad, grad)

    def joined(self, position: Tensor) -> Tensor:
        """Joins ``[..., N, D - d]`` and the values to ``[..., N, D]``."""
        shape = (*position.shape[:-1], len(self.lead) + len(self.rest))
        whole = position.new_empty(shape)
        whole[..., self.lead] = self.value
        whole[..., self.rest] = position
        return whole


@dataclass(frozen=True, eq=False)
class _Seen:
    """Values of the leading coordinates, and the Gaussians of the others at each."""

    value: Tensor  # [N, d]
    found: Candidates  # [N, D - d]

    def beside(self, other: _Seen) -> _Seen:
        """Adds further ones."""
        pairs = ((getattr(self.found, n), getattr(other.found, n)) for n in _FIELDS)
        found = Candidates(*(torch.cat(pair) for pair in pairs))
        return _Seen(torch.cat([self.value, other.value]), found)

    def fit(self, weights: Tensor, generator: torch.Generator) -> Given:
        """Fits functions of h to the Gaussians."""
        bound = self.found.elbo
        alive = bound > bound.nan_to_num(nan=-torch.inf).max() - _FAR
        alive &= self.found.scale_tril.isfinite().all(-1).all(-1)
        kept = weights[alive]
        return fit_given(
            self.value[alive],
            kept / kept.sum(),
            self.found.loc[alive],
            self.found.scale_tril[alive],
            generator,
        )


_FIELDS = ("loc", "scale_tril", "elbo")


def _see(
    rows: Rows,
    split: tuple[list[int], list[int]],
    value: Tensor,
    start: Tensor,
    generator: torch.Generator,
) -> _Seen:
    """Fits the others at each value ``[N, d]``, from ``start`` ``[N, D - d]``."""
    given = Rows(_AtValues(rows, *split, value), 8, 1)
    found = follow_newton(
        given, start.unsqueeze(0), generator, num_steps=10, patience=2, damping=1e-3
    )
    return _Seen(value, Candidates(found.loc[0], found.scale_tril[0], found.elbo[0]))


def nested_gaussians(
    rows: Rows, fit: Candidates, lead: list[int], generator: torch.Generator
) -> Nested | None:
    """Fits the leading coordinates, and Gaussians of all others along them.

    Args:
        rows: Evaluates the target.
        fit: A Gaussian of all coordinates, ``[1, D]``.
        lead: Leading coordinates.
        generator: Source of noise.

    Returns:
        The fit, or None if no density was found.
    """
    search = _Search(rows, fit, lead, generator)
    for _ in range(_NUM_TURNS):
        if not search.turn():
            return None
    best, share = search.move(_NUM_FIRST_MOVES)
    if share < _ENOUGH and search.turn():
        other, more = search.move(_NUM_MOVES)
        if more > share:
            return other
    return best


class _Search:
    """What is known of the marginal and of the others, turn by turn."""

    def __init__(
        self, rows: Rows, fit: Candidates, lead: list[int], generator: torch.Generator
    ) -> None:
        self.rows, self.lead, self.generator = rows, lead, generator
        loc, scale = fit.loc[0], fit.scale_tril[0]
        self.rest = [i for i in range(len(loc)) if i not in lead]
        self.loc, covariance = loc, scale @ scale.mT
        own = covariance[lead][:, lead]
        self.slope = torch.linalg.solve(own, covariance[lead][:, self.rest])
        self.wide = _around(loc[lead], own)
        self.marginal: Marginal | None = None
        self.seen: _Seen | None = None
        self.given: Given | None = None
        self.proposals: list[Marginal] = []

    def used(self, share: float) -> Marginal:
        """Takes the marginal beside a wide one of some share."""
        return self.wide if self.marginal is None else self.marginal.beside(self.wide, share)

    def turn(self) -> bool:
        """Fits the others at further values, and both fits to all; False without any density."""
        self.proposals.append(self.used(_SHARE_OF_SEEN))
        value = self.proposals[-1].draw(_NUM_VALUES, self.generator)
        start = self.loc[self.rest] + (value - self.loc[self.lead]) @ self.slope
        if self.given is not None:
            start = self.given.place(value, torch.zeros_like(start))
        more = _see(self.rows, (self.lead, self.rest), value, start, self.generator)
        self.seen = seen = more if self.seen is None else self.seen.beside(more)
        log_proposal = torch.stack([each.log_density(seen.value) for each in self.proposals])
        log_weight = (seen.found.elbo - log_proposal.logsumexp(0)).double()
        log_weight = log_weight.nan_to_num(nan=-torch.inf)
        if not bool(log_weight.isfinite().any()):
            return False
        weights = log_weight.softmax(0)
        self.given = seen.fit(weights, self.generator)
        self._fit(seen.value, weights, None)
        return True

    def _fit(self, value: Tensor, weights: Tensor, start: Marginal | None) -> None:
        """Fits the marginal to weighted values, and the wide one to their moments."""
        count = _NUM_TERMS[len(self.lead)]
        self.marginal = fit_marginal(value, weights, count, self.generator, start=start)
        weights = weights.to(value)
        mean = weights @ value
        apart = value - mean
        self.wide = _around(mean, (apart * weights.unsqueeze(-1)).mT @ apart)

    def move(self, count: int) -> tuple[Nested, float]:
        """Moves the marginal to draws of the whole, while more of them carry weight."""
        assert self.given is not None
        given, best, at_best = self.given, None, -1.0
        past: list[tuple[Marginal, Tensor, Tensor]] = []
        for _ in range(count + 1):
            used = self.used(_SHARE_OF_WIDE)
            nested = Nested(self.lead, self.rest, used, given)
            value = used.draw(_NUM_DRAWS, self.generator)
            noise = white_noise(value, (_NUM_DRAWS, len(self.rest)), self.generator)
            other = given.place(value, noise)
            log_rest = self.rows(nested.joined(value, other))[0] - given.log_density(value, other)
            log_weight = (log_rest - used.log_density(value)).double()
            share = float(1.0 / log_weight.softmax(0).square().sum()) / _NUM_DRAWS
            if best is None or share > at_best:
                best, at_best = nested, share
            if share > _ENOUGH:
                break
            past = [*past[-2:], (used, value, log_rest)]
            self._fit(*_weighted(past), self.marginal)
        assert best is not None
        return best, at_best


def _around(loc: Tensor, covariance: Tensor) -> Marginal:
    """Makes a wide Student-t of a mean and a covariance."""
    size = 1e-6 * covariance.diagonal().mean().clamp(min=1e-12)
    eye = torch.eye(len(loc), dtype=loc.dtype, device=loc.device)
    factor = _WIDER * torch.linalg.cholesky(covariance + size * eye)
    return Marginal(loc.new_zeros(1), loc.unsqueeze(0), factor.unsqueeze(0))


def _weighted(past: list[tuple[Marginal, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Weights draws of several proposals together; the largest weights are capped."""
    seen = torch.cat([value for _, value, _ in past])
    log_rests = torch.cat([log_rest for _, _, log_rest in past])
    log_proposal = torch.stack([each[0].log_density(seen) for each in past]).logsumexp(0)
    log_weights = (log_rests - log_proposal).double().nan_to_num(nan=-torch.inf)
    cap = log_weights.sort(descending=True).values[max(len(seen) // 200, 4)]
    return seen, log_weights.clamp(max=cap).softmax(0)
