r"""Contrastive bounds that need no density: InfoNCE, MINE-DV, MINE-F, and the generalized MINEs.

Negatives are the z's of other pairs in the batch, or fresh draws: from p(z) where a model is
known, from q(z|x) where a guide is given too (generalized MINE), from q(x|z) where only a guide is
given (roles swapped, bounds up to the data entropy).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..arguments import as_count
from ..models.types import Fn
from ..weights import log_mean_exp
from .base import Bound, Direction, Values, flatten
from .critics import indexed_scores, score
from .joints import Knowledge

__all__ = ["MINE_DV", "MINE_F", "InfoNCE", "contrastive_term"]


def contrastive_term(positive: Tensor, negatives: Tensor) -> Tensor:
    r"""Computes the contrastive term of one positive among K candidates, at most ``log K``.

    .. math:: \log \frac{e^{T_1}}{\frac{1}{K} \sum_{k=1}^K e^{T_k}}

    Source: van den Oord et al. (2018); the contrastive part of GIWAE, Brekelmans et al. (2022).

    Args:
        positive: Score of the positive, :math:`T_1`, in nats, shape ``[N]``.
        negatives: Scores of the K - 1 others, in nats, shape ``[K - 1, N]``.

    Returns:
        Value in nats, shape ``[N]``.

    Example:
        >>> contrastive_term(torch.tensor([3.0]).log(), torch.tensor([[1.0], [2.0]]).log()).exp()
        tensor([1.5000])
    """
    return positive - log_mean_exp(torch.cat([positive.unsqueeze(0), negatives]))


def _in_batch(
    critic: Callable[..., Tensor], x: Tensor, z: Tensor, num_negatives: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores each pair and each x against M other z's of the batch, every z used M times.

    Returns:
        Scores of pairs ``[N]``, of negatives ``[N, M]``, and the row of each negative ``[N, M]``.
    """
    flat_x, flat_z = flatten(x, 1), flatten(z, 1)
    num_pairs = x.shape[0]
    count = num_pairs - 1 if num_negatives is None else num_negatives
    if not 1 <= count <= num_pairs - 1:
        raise ValueError(
            f"a batch of {num_pairs} pairs offers {num_pairs - 1} negatives, but {count} are "
            "needed (at least 1); use larger batches, fewer particles, or pass a model with p(z)"
        )
    # A random cycle: neighbours in a sorted data set would be poor stand-ins for p(z).
    order = torch.randperm(num_pairs, device=x.device)
    place = torch.argsort(order)
    shifts = torch.arange(1, count + 1, device=x.device)
    index = order[(place.unsqueeze(1) + shifts) % num_pairs]
    scores = indexed_scores(critic, flat_x, flat_z, index)
    return score(critic, flat_x, flat_z), scores, index


def _column_log_mean(scores: Tensor, index: Tensor) -> Tensor:
    """Computes, for each z, the log-mean-exp of the scores in which it is a negative, ``[N]``."""
    top = scores.max()
    sums = torch.zeros(scores.shape[0], dtype=scores.dtype, device=scores.device)
    sums = sums.scatter_add(0, index.flatten(), (scores - top).exp().flatten())
    return sums.log() + top - math.log(index.shape[1])


class InfoNCE(Bound):
    r"""Bounds I from below by picking the true z among K, needing joint samples only.

    .. math:: E\Bigl[\log \frac{e^{T(x, z_1)}}{\frac{1}{K} \sum_{k=1}^K e^{T(x, z_k)}}\Bigr]
        \le \min(I, \log K), \qquad z_1 \sim p(z | x), \; z_{2:K} \sim p(z)

    The best critic is ``log p(x|z) + c(x)``; see :class:`StructuredInfoNCE`, which knows it.

    Source: van den Oord, Li and Vinyals (2018), InfoNCE; Brekelmans et al. (2022): GIWAE with
    q(z|x) = p(z).

    Args:
        critic: Scores pairs.
        num_particles: K, the positive included; None for the size of the batch. Without a model
            the K - 1 negatives are z's of other pairs in the batch.
        model: What gives p(z), to draw fresh negatives instead: needed where K exceeds the batch.

    Raises:
        ValueError: If ``num_particles`` is below 2, or None together with a model.

    Example:
        >>> from pyro_anneal import mi
        >>> bound = InfoNCE(mi.SeparableCritic(x_dim=2, z_dim=2, hidden=[8]))
        >>> bound.loss(torch.randn(16, 2), torch.randn(16, 2)).backward()
    """

    requires: ClassVar[Knowledge] = "joint samples"
    directions: ClassVar[tuple[Direction, ...]] = ("lower",)
    breaks: ClassVar[str] = "pairs that are not independent; a critic trained on the same pairs"

    def __init__(
        self,
        critic: Callable[..., Tensor],
        num_particles: int | None = None,
        *,
        model: Any = None,
    ) -> None:
        super().__init__(model=model, critic=critic)
        _check_count("num_particles", num_particles, least=2, fresh=model is not None)
        self.num_particles = num_particles

    @property
    def num_rows_per_pair(self) -> int:  # noqa: D102
        return 0 if self.joint is None or self.num_particles is None else self.num_particles

    def _statistics(self, x: Tensor, z: Tensor, *, for_loss: bool) -> dict[str, Tensor]:
        count = None if self.num_particles is None else self.num_particles - 1
        if self.joint is not None and count is not None:
            negatives = self._score(x, self.joint.sample_prior(count, x), 2)
            term = contrastive_term(self._score(x, z), negatives)
            influence = torch.zeros_like(term)
        else:
            positive, scores, index = _in_batch(self._scorer, x, z, count)
            term = contrastive_term(positive, scores.mT)
            count = scores.shape[1]
            # A pair also moves the terms in which its z is a negative, by its softmax share there;
            # shares of a row sum to 1, so this leaves the mean as it is.
            log_total = positive - term + math.log(count + 1)
            share = (positive - log_total).exp().detach()
            others = (scores - log_total.unsqueeze(1)).exp().detach()
            influence = share.scatter_add(0, index.flatten(), others.flatten()) - 1.0
        log_k = torch.full_like(term, math.log(count + 1)).detach()
        return {"contrastive": term, "influence": influence, "log_k": log_k}

    def _assemble(self, statistics: dict[str, Tensor]) -> Values:
        term = statistics["contrastive"]
        return Values(
            lower=term - statistics["influence"],
            terms={"contrastive": term},
            ceiling=statistics["log_k"].mean().item(),
        )


class _Mine(Bound):
    """What MINE-DV and MINE-F share: scores of pairs and of product samples, in log space."""

    requires: ClassVar[Knowledge] = "joint samples"

    def __init__(
        self,
        critic: Callable[..., Tensor],
        num_particles: int | None = None,
        *,
        model: Any = None,
        guide: Fn | None = None,
    ) -> None:
        super().__init__(model=model, guide=guide, critic=critic)
        self.fresh = model is not None or guide is not None
        _check_count("num_particles", num_particles, least=1, fresh=self.fresh)
        self.num_particles = num_particles

    @property
    def num_rows_per_pair(self) -> int:
        return self.num_particles or 0 if self.fresh else 0

    def _missing(self) -> str | None:
        return "H(x)" if self.guide is not None and self.joint is None else None

    def _statistics(self, x: Tensor, z: Tensor, *, for_loss: bool) -> dict[str, Tensor]:
        if not self.fresh or self.num_particles is None:
            positive, scores, index = _in_batch(self._scorer, x, z, self.num_particles)
            return {
                "positive": positive,
                "row": log_mean_exp(scores.mT),
                "column": _column_log_mean(scores.detach(), index),
            }
        statistics = {"positive": self._score(x, z)}
        if self.guide is None:
            draws = self._known.sample_prior(self.num_particles, x)
            statistics["row"] = log_mean_exp(self._score(x, draws, 2))
        elif self.joint is not None:
            q = self._condition(x)
            statistics["variational"] = q.log_prob(z) - self.joint.log_prior(z, x)
            statistics["row"] = log_mean_exp(self._score(x, q.sample(self.num_particles)[0], 2))
        else:  # roles swapped: negatives are x
            q = self._condition(z)
            statistics["variational"] = q.log_prob(x)
            draws = flatten(q.sample(self.num_particles)[0], 2)
            statistics["row"] = log_mean_exp(self._scorer(draws, flatten(z, 1)))
        return statistics


class MINE_DV(_Mine):
    r"""Estimates I by the Donsker-Varadhan representation; no direction at finite N.

    .. math:: E_{p(x, z)}\Bigl[\log \frac{q(z|x)}{p(z)}\Bigr] + E_{p(x, z)}[T]
        - \log E_{p(x) q(z|x)}[e^{T}] \le I

    With q(z|x) = p(z) (no guide) the first term vanishes: plain MINE-DV. With exact expectations
    it is a lower bound. The plug-in estimate is not: by Jensen the logarithm of a sample mean is
    too small in expectation, hence the estimate too large, and far too large when T spreads over
    more than log N nats. So the result carries ``plug_in``, neither ``lower`` nor ``upper``, and
    warns near log N, beyond which no estimate from N pairs alone can be trusted.

    Source: Belghazi et al. (2018), MINE; the generalized form is Brekelmans et al. (2022);
    McAllester and Stratos (2020) for the limit of log N.

    Args:
        critic: Scores pairs.
        num_particles: Product samples per pair: z's of other pairs in the batch (None for all
            others), or draws where a model or guide is given.
        model: What gives p(z), to draw from or to measure the guide against.
        guide: The variational conditional q(z|x); without a model q(x|z), roles swapped.

    Raises:
        ValueError: If ``num_particles`` is below 1, or None together with a model or guide.

    Example:
        >>> from pyro_anneal import mi
        >>> bound = MINE_DV(mi.SeparableCritic(x_dim=2, z_dim=2, hidden=[8]))
        >>> bound.estimate(torch.randn(16, 2), torch.randn(16, 2)).lower is None
        True
    """

    directions: ClassVar[tuple[Direction, ...]] = ()
    breaks: ClassVar[str] = "finite N: the logarithm of a sample mean is biased"

    def _assemble(self, statistics: dict[str, Tensor]) -> Values:
        positive, row = statistics["positive"], statistics["row"]
        log_mean = log_mean_exp(row)
        term = positive - log_mean
        terms = {"contrastive": term}
        values = term - ((row - log_mean).exp().detach() - 1.0)
        if "column" in statistics:
            values = values - ((statistics["column"] - log_mean).exp().detach() - 1.0)
        if "variational" in statistics:
            terms["variational"] = statistics["variational"]
            values = values + statistics["variational"]
        return Values(plug_in=values, terms=terms, ceiling=math.log(positive.shape[0]))


class MINE_F(_Mine):
    r"""Bounds I from below by the dual representation of the KL divergence (also called NWJ).

    .. math:: E_{p(x, z)}\Bigl[\log \frac{q(z|x)}{p(z)}\Bigr] + E_{p(x, z)}[T]
        - e^{-1} E_{p(x) q(z|x)}[e^{T}] \le I

    With q(z|x) = p(z) (no guide) the first term vanishes: plain MINE-F. The estimate is unbiased,
    so the direction holds at any N, but its variance grows with :math:`e^{I}`; for one critic it
    lies below MINE-DV. The best critic is ``1 + log p(z|x) / q(z|x)``.

    Source: Nguyen, Wainwright and Jordan (2010); Belghazi et al. (2018), MINE-f; the generalized
    form is Brekelmans et al. (2022).

    Args:
        critic: Scores pairs.
        num_particles: Product samples per pair: z's of other pairs in the batch (None for all
            others), or draws where a model or guide is given.
        model: What gives p(z), to draw from or to measure the guide against.
        guide: The variational conditional q(z|x); without a model q(x|z), roles swapped.

    Raises:
        ValueError: If ``num_particles`` is below 1, or None together with a model or guide.

    Example:
        >>> bound = MINE_F(lambda x, z: torch.ones(z.shape[:-1]), 1, model=dist.Normal(0.0, 1.0))
        >>> bound.estimate(torch.zeros(3), torch.zeros(3)).lower
        tensor(0.)
    """

    directions: ClassVar[tuple[Direction, ...]] = ("lower",)
    breaks: ClassVar[str] = "a critic trained on the same pairs; the variance grows with exp(I)"

    def _assemble(self, statistics: dict[str, Tensor]) -> Values:
        positive = statistics["positive"]
        # Doubles reach e^709; beyond, the bound is -inf, as it should be.
        tilted = (statistics["row"].double() - 1.0).exp().to(positive.dtype)
        term = positive - tilted
        terms = {"contrastive": term}
        values = term
        if "column" in statistics:
            tilted_column = (statistics["column"].double() - 1.0).exp().to(positive.dtype)
            influence = (tilted_column - tilted_column.mean()).detach()
            if bool(influence.isfinite().all()):
                values = values - influence
        if "variational" in statistics:
            terms["variational"] = statistics["variational"]
            values = values + statistics["variational"]
        return Values(lower=values, terms=terms)


def _check_count(name: str, count: int | None, *, least: int, fresh: bool) -> None:
    if count is None and fresh:
        raise ValueError(f"{name} must be given where negatives are drawn from a model or guide")
    if count is not None:
        as_count(name, count, least=least)
