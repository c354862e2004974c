r"""Resampling among chains: sequential Monte Carlo forward, and around a reversed path.

K chains are R populations of M. At points fixed before the run, a population whose effective
sample size is low, per batch element, is resampled: chains of small weight give way to copies of
others, and every log-weight of the population becomes the logarithm of its mean weight so far. So
log-weights still tell all: ``log mean_k w_k`` over a population is its estimate
:math:`\log \hat Z` of sequential Monte Carlo, and final weights are proper weights of the
posterior. In every finite run

.. math:: E[\hat Z] = Z, \qquad E[1 / \hat Z] = 1 / Z

forward, and around a path held in slot 0 of each population. This path is drawn in reverse from an
exact posterior sample: it ends there, and each earlier state comes from the next by the reversed
transition. Then all variables of the population follow the law of the forward run, weighted by
:math:`\hat Z / Z`.

Ancestors are systematic on a circle: one uniform number v per population and batch element, and
slot n takes the particle at :math:`v + n / M` modulo 1 on the cumulative weights. Each slot has
particle k with probability :math:`W_k`, and given that slot 0 keeps particle 0, v is uniform on
particle 0's own arc: conditional resampling is exact. Turning the slots turns the circle, which
leaves the law of all else as it was, so that the held slot may be slot 0 every time. The decision to
resample depends on weights alone.

Source: Del Moral, Doucet and Jasra (2006) for samplers; Andrieu, Doucet and Holenstein (2010) for
the extended target; Chopin and Singh (2015), *On particle Gibbs sampling*, for conditional
systematic resampling.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import State
from ..weights import effective_sample_size, log_mean_exp, log_normalized_weights

__all__ = [
    "Lineage",
    "Reference",
    "Resampling",
    "gather_chains",
    "lineage_memory",
    "systematic_ancestors",
]


class Lineage(NamedTuple):
    """Where the chains of a run came from."""

    ancestors: Tensor  # the chain at the start that each descends from, int64, [K, *batch]
    num_resamplings: Tensor  # int64, [R, *batch]
    offset: Tensor  # what resampling added to the weight of a held path, nats, [R, *batch]

    @staticmethod
    def beginning(log_weights: Tensor, population_size: int) -> Lineage:
        """Every chain descends from itself."""
        first = log_weights[::population_size]
        own = torch.arange(len(log_weights), device=log_weights.device)
        ancestors = own.view(-1, *[1] * (log_weights.dim() - 1)).expand(log_weights.shape)
        zeros = torch.zeros_like(first, dtype=torch.int64)
        return Lineage(ancestors.clone(), zeros, torch.zeros_like(first))


class Reference(NamedTuple):
    """Paths of R reverse chains, at the points where populations may be resampled."""

    states: tuple[State, ...]  # at each point and at the end, [R, *batch]
    log_weights: tuple[Tensor, ...]  # sums of the increments up to there, [R, *batch]

    @staticmethod
    def from_reverse(
        end: State,
        total: Tensor,
        passed: Sequence[tuple[State, Tensor]],
        points: Sequence[int],
        betas: Tensor,
    ) -> Reference:
        r"""Turns the course of reverse chains around.

        At a point after c steps a reverse chain has taken the increments of steps T down to c, so
        that a forward chain there would have :math:`\sum_{t \le c} = \log w - \sum_{t > c}`.

        Args:
            end: Where the paths end: the posterior sample, ``[R, *batch]``.
            total: Log-weights of the whole paths, ``[R, *batch]``.
            passed: State and log-weight of the reverse chains at each point, the last point first.
            points: Steps of a forward chain at each point, increasing.
            betas: Of the path, ``[T + 1]``.

        Returns:
            The paths in forward order.
        """
        widths = betas.diff().tolist()
        states, sums = [], []
        for point, (state, weight) in zip(points, reversed(passed), strict=True):
            own = widths[point - 1] * (state.log_target.double() - state.log_base.double())
            states.append(state)
            sums.append(total - weight + own)
        return Reference((*states, end), (*sums, total))

    def first(self, count: int) -> Reference:
        """Keeps the first paths."""
        states = [State(*(value[:count] for value in state)) for state in self.states]
        return Reference(tuple(states), tuple(sums[:count] for sums in self.log_weights))


@dataclass(frozen=True)
class Resampling:
    """Who is resampled, and when: all of it fixed before the run.

    Args:
        population_size: Number M of neighbouring chains that share a population.
        points: Steps done at each point, increasing, between the first step and the last.
        threshold: Effective sample size over M below which a population is resampled. At .8
            estimates vary less than at .5 (40 modes in 50 dimensions: .6 nats against .9), since
            systematic resampling of nearly even weights loses little.
    """

    population_size: int
    points: tuple[int, ...]
    threshold: float = 0.8

    def reverse_points(self, num_steps: int) -> tuple[int, ...]:
        """Returns the steps that reverse chains have done where they pass the points."""
        return tuple(num_steps - point + 1 for point in reversed(self.points))

    def at(
        self,
        num_steps: int,
        state: State,
        log_weights: Tensor,
        lineage: Lineage,
        generator: torch.Generator,
        reference: Reference | None,
    ) -> tuple[State, Tensor, Lineage]:
        """Does what is due after ``num_steps`` steps, at a point or at the end.

        Arguments and results are those of :meth:`resample`.
        """
        held = None
        if reference is not None:
            index = bisect.bisect_left(self.points, num_steps)
            path, held = reference.states[index], reference.log_weights[index]
            state, log_weights = self.hold(state, log_weights, lineage, path, held)
        if num_steps not in self.points:
            return state, log_weights, lineage
        return self.resample(state, log_weights, lineage, generator, held=held)

    def resample(
        self,
        state: State,
        log_weights: Tensor,
        lineage: Lineage,
        generator: torch.Generator,
        *,
        held: Tensor | None = None,
    ) -> tuple[State, Tensor, Lineage]:
        """Resamples the populations that need it.

        Args:
            state: Of all chains, ``[K, *batch]``.
            log_weights: Float64, ``[K, *batch]``.
            lineage: Of all chains.
            generator: Source of randomness.
            held: Weight of the path in slot 0 by its own increments, ``[R, *batch]``; None for
                the forward run.

        Returns:
            All of it afterwards. A population of no weight at all stays as it is.
        """
        size = self.population_size
        groups = len(log_weights) // size
        grouped = log_weights.unflatten(0, (groups, size)).movedim(1, 0)  # [M, R, *batch]
        ess = effective_sample_size(grouped)
        needed = (ess < self.threshold * size) & (ess > 0.0)
        drawn = systematic_ancestors(grouped, generator, holds_first=held is not None)
        slots = torch.arange(size, device=drawn.device).view(-1, *[1] * needed.dim())
        chosen = torch.where(needed, drawn, slots)
        starts = torch.arange(groups, device=drawn.device) * size
        chosen = chosen + starts.view(1, -1, *[1] * (needed.dim() - 1))
        indices = chosen.movedim(0, 1).flatten(0, 1)
        log_mean = log_mean_exp(grouped)
        after = torch.where(needed, log_mean, grouped).movedim(0, 1).flatten(0, 1)
        offset = lineage.offset
        if held is not None:
            offset = torch.where(needed, log_mean - held, offset)
        moved = Lineage(
            torch.gather(lineage.ancestors, 0, indices),
            lineage.num_resamplings + needed.long(),
            offset,
        )
        return gather_chains(state, indices), after, moved

    def hold(
        self, state: State, log_weights: Tensor, lineage: Lineage, path: State, weights: Tensor
    ) -> tuple[State, Tensor]:
        """Puts the reversed paths into the first slot of each population.

        Args:
            state: Of all chains, ``[K, *batch]``.
            log_weights: Float64, ``[K, *batch]``.
            lineage: Of all chains.
            path: Of R reverse chains here, ``[R, *batch]``.
            weights: Sum of their increments up to here, ``[R, *batch]``.

        Returns:
            State and log-weights with the paths in their slots.
        """
        slots = slice(None, None, self.population_size)
        parts = []
        for value, own in zip(state, path, strict=True):
            value = value.clone()
            value[slots] = own
            parts.append(value)
        log_weights = log_weights.clone()
        log_weights[slots] = weights + lineage.offset
        return State(*parts), log_weights


def lineage_memory(position: Tensor, ancestors: Tensor) -> Tensor:
    r"""Measures what the ends of chains still tell of where their lineages began.

    Of each coordinate's ranks over the chains, that is the share of variance between descendants of
    one first chain and of others, :math:`1 - \mathrm{MS}_{within} / \mathrm{MS}_{total}`, here of the
    coordinate that tells most. Chains that moved through all of the target have forgotten their
    ancestors, and it is near 0, however few these are; chains that cannot leave the mode of their
    ancestor bring it near 1.

    Args:
        position: Ends of chains, ``[K, *batch, D]``.
        ancestors: The first chain that each descends from, ``[K, *batch]``.

    Returns:
        The share, ``[*batch]``, 1 where all chains descend from one, 0 where each is alone.
    """
    count = len(position)
    ranks = position.argsort(0).argsort(0).double()
    index = ancestors.unsqueeze(-1).expand_as(position)
    sums = torch.zeros_like(ranks).scatter_add(0, index, ranks)
    sizes = torch.zeros_like(ranks).scatter_add(0, index, torch.ones_like(ranks))
    groups = (sizes > 0.0).sum(0)
    centred = ranks - (sums / sizes.clamp(min=1.0)).gather(0, index)
    within = centred.square().sum(0) / (count - groups).clamp(min=1)
    total = (ranks - ranks.mean(0)).square().sum(0) / max(count - 1, 1)
    share = (1.0 - within / total.clamp(min=1e-12)).clamp(0.0, 1.0)
    share = torch.where(groups == count, 0.0, torch.where(groups == 1, 1.0, share))
    return share.amax(-1)


def systematic_ancestors(
    log_weights: Tensor, generator: torch.Generator | None, *, holds_first: bool = False
) -> Tensor:
    r"""Draws an ancestor for each of M slots, systematically on a circle.

    .. math:: A_n = F^{-1}\bigl((v + n / M) \bmod 1\bigr), \qquad v \sim U[0, 1)

    with the cumulative normalized weights F, or :math:`v \sim U[0, W_0)` given that slot 0 keeps
    particle 0.

    Args:
        log_weights: Log-weights in nats, ``[M, *batch]``.
        generator: Source of randomness.
        holds_first: Whether slot 0 keeps particle 0.

    Returns:
        Indices into dimension 0, int64, ``[M, *batch]``. Particles of weight zero are never drawn
        unless all are.

    Example:
        >>> systematic_ancestors(torch.tensor([1.0, 0.0]).log(), None, holds_first=True)
        tensor([0, 0])
    """
    count = len(log_weights)
    cumulative = log_normalized_weights(log_weights.double()).exp().cumsum(0)
    cumulative = (cumulative / cumulative[-1:]).movedim(0, -1).contiguous()
    start = torch.rand(
        cumulative.shape[:-1],
        dtype=cumulative.dtype,
        device=cumulative.device,
        generator=generator,
    )
    if holds_first:
        start = start * cumulative[..., 0]
    ticks = torch.arange(count, dtype=cumulative.dtype, device=cumulative.device) / count
    points = ((start.unsqueeze(-1) + ticks) % 1.0).contiguous()
    indices = torch.searchsorted(cumulative, points, right=True)
    if holds_first:  # whatever rounding says
        indices[..., 0] = 0
    return indices.clamp(max=count - 1).movedim(-1, 0)


def gather_chains(state: State, indices: Tensor) -> State:
    """Selects chains by ``indices`` of shape ``[K, *batch]``."""

    def select(value: Tensor) -> Tensor:
        index = indices.unsqueeze(-1).expand_as(value) if value.dim() > indices.dim() else indices
        return torch.gather(value, 0, index)

    return State(*(select(value) for value in state))
