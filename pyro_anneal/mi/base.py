"""What every bound shares: what it needs, which way it points, and how it is trained and measured."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..arguments import as_count, check_function
from ..results.mutual_information import MutualInformation
from .guides import Conditional, Prior, condition_on
from .joints import Joint, Knowledge
from .pyro_joint import as_joint

__all__ = ["Bound", "Values", "flatten"]

Direction = Literal["lower", "upper"]
_LEVELS: dict[Knowledge, int] = {
    "joint samples": 0,
    "marginal p(z)": 1,
    "full joint p(x, z)": 2,
}
_MAX_PARTICLES = 2**16  # rows (particles times pairs) of one batch of an estimate


@dataclass(frozen=True, kw_only=True, eq=False)
class Values:
    """Per-pair values of a bound, each ``[N]`` in nats; their means are what is reported."""

    lower: Tensor | None = None
    upper: Tensor | None = None
    plug_in: Tensor | None = None
    terms: dict[str, Tensor] = field(default_factory=dict)
    ceiling: float | None = None
    notes: tuple[str, ...] = ()
    measurements: dict[str, Tensor] = field(default_factory=dict)


class Bound(nn.Module, ABC):
    """A bound on, or an estimate of, the mutual information of x and z.

    It is an ``nn.Module``, so ``bound.parameters()`` are those of its guide and critic where these
    are modules. Parameters of Pyro guides live in Pyro's parameter store as always.

    Attributes:
        requires: The least that must be known of p(x, z).
        directions: Which way it points in expectation; empty for a plug-in estimate.
        breaks: What breaks the directions.
    """

    requires: ClassVar[Knowledge]
    directions: ClassVar[tuple[Direction, ...]]
    breaks: ClassVar[str]

    def __init__(
        self,
        *,
        model: Any = None,
        guide: Callable[..., Any] | None = None,
        critic: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__()
        if guide is not None:
            check_function(
                "guide", guide, what="a Pyro guide, or a function of x to a distribution"
            )
        if critic is not None:
            check_function("critic", critic, what="a function of x and z to scores")
        self.model = model  # registers the parameters of a module, which the joint would hide
        self.guide = guide
        self.critic = critic
        self.__dict__["joint"] = as_joint(model)
        self._check_knowledge(self.requires)

    joint: Joint | None
    _num_batches: int = 1  # of the size of the present one, that an estimate is made of

    def _check_knowledge(self, needed: Knowledge) -> None:
        known: Knowledge = "joint samples" if self.joint is None else self.joint.knowledge
        if _LEVELS[known] < _LEVELS[needed]:
            raise ValueError(
                f"{type(self).__name__} needs the {needed}, but only the {known} is known; pass "
                "a Pyro model or a DistributionJoint that has it, or use a bound that needs less"
            )

    @property
    def num_rows_per_pair(self) -> int:
        """Rows of particles that one pair costs, which sets the size of a batch; 0 for no limit."""
        return 1

    @abstractmethod
    def _statistics(self, x: Tensor, z: Tensor, *, for_loss: bool) -> dict[str, Tensor]:
        """Computes per-pair statistics ``[N]`` of one batch; only what the loss needs if asked."""

    @abstractmethod
    def _assemble(self, statistics: dict[str, Tensor]) -> Values:
        """Turns the statistics of all pairs into per-pair values of the bound."""

    def loss(self, x: Tensor, z: Tensor) -> Tensor:
        """Computes minus the lower bound (or plug-in estimate) on a minibatch, differentiably.

        Args:
            x: Data, shape ``[N, *x_event]``.
            z: The z that belongs to each row, shape ``[N, *z_event]``.

        Returns:
            Scalar in nats; call ``backward()`` on it.

        Raises:
            ValueError: If the bound has nothing to learn.
        """
        self._check_pairs(x, z)
        values = self._assemble(self._statistics(x, z, for_loss=True))
        objective = values.lower if values.plug_in is None else values.plug_in
        assert objective is not None
        loss = -objective.mean()
        if not loss.requires_grad:
            raise ValueError(
                f"{type(self).__name__} has nothing to learn here: neither its guide nor its "
                "critic nor x and z require gradients; use estimate"
            )
        return loss

    def estimate(
        self,
        x: Tensor | Iterable[tuple[Tensor, Tensor]] | None = None,
        z: Tensor | None = None,
        *,
        num_pairs: int | None = None,
        batch_size: int | None = None,
        progress_bar: bool = False,
    ) -> MutualInformation:
        """Measures the bound on pairs: given, from a data loader, or simulated from the model.

        Memory is bounded by one batch; what is kept per pair is a few numbers. No gradients.

        Args:
            x: Data, shape ``[N, *x_event]``; or an iterable of batches ``(x, z)``, whose order
                must be random where pairs serve as each other's negatives.
            z: The z that belongs to each row, shape ``[N, *z_event]``.
            num_pairs: Number of pairs to simulate from the model, in place of ``x`` and ``z``.
            batch_size: Pairs per batch; by default as many as keep particles times pairs
                below 65536, and all of them where pairs are each other's negatives.
            progress_bar: Whether to show one, over batches.

        Returns:
            The estimate, with standard errors over pairs.

        Raises:
            ValueError: If pairs are neither given nor can be simulated, or shapes disagree.
        """
        batches, total = self._batches(x, z, num_pairs, batch_size)
        if progress_bar:
            from tqdm.auto import tqdm

            batches = tqdm(batches, total=total, desc=type(self).__name__)
        kept: list[dict[str, Tensor]] = []
        size = 0
        try:
            with torch.no_grad():
                for batch_x, batch_z in batches:
                    self._check_pairs(batch_x, batch_z)
                    size = size or len(batch_x)
                    self._num_batches = total or 1 if len(batch_x) == size else 1
                    kept.append(self._statistics(batch_x, batch_z, for_loss=False))
        finally:
            self._num_batches = 1
        if not kept:
            raise ValueError("there are no pairs: the data loader is empty")
        with torch.no_grad():
            values = self._assemble({k: torch.cat([s[k] for s in kept]) for k in kept[0]})
        return self._report(values)

    def _batches(
        self,
        x: Tensor | Iterable[tuple[Tensor, Tensor]] | None,
        z: Tensor | None,
        num_pairs: int | None,
        batch_size: int | None,
    ) -> tuple[Iterator[tuple[Tensor, Tensor]], int | None]:
        rows = self.num_rows_per_pair
        size = batch_size or (max(1, _MAX_PARTICLES // rows) if rows else None)
        if num_pairs is not None:
            if x is not None or z is not None:
                raise ValueError("give x and z or num_pairs, not both")
            if self.joint is None:
                raise ValueError(
                    f"{type(self).__name__} has no model to simulate pairs from; pass x and z"
                )
            num_pairs = as_count("num_pairs", num_pairs)
            size = size or num_pairs
            sizes = [min(size, num_pairs - i) for i in range(0, num_pairs, size)]
            return (self.joint.sample(n) for n in sizes), len(sizes)
        if x is not None and z is not None:
            self._check_pairs(x, z)
            assert isinstance(x, Tensor)
            size = size or x.shape[0]
            return zip(x.split(size), z.split(size), strict=True), math.ceil(x.shape[0] / size)
        if x is not None and z is None and not isinstance(x, Tensor):
            return ((batch[0], batch[1]) for batch in x), getattr(x, "__len__", lambda: None)()
        raise ValueError("pass x and z, an iterable of (x, z) batches, or num_pairs=")

    @staticmethod
    def _check_pairs(x: Any, z: Any) -> None:
        for name, value in (("x", x), ("z", z)):
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"{name} must be a tensor with pairs along dimension 0, got "
                    f"{type(value).__name__}; torch.as_tensor makes one of an array"
                )
            if bool(value.isnan().any()):
                raise ValueError(f"{name} holds {int(value.isnan().sum())} NaN")
        if x.dim() == 0 or z.dim() == 0 or x.shape[0] != z.shape[0] or x.shape[0] == 0:
            raise ValueError(
                "x and z must hold the same number N >= 1 of pairs along dimension 0, got shapes "
                f"{list(x.shape)} and {list(z.shape)}"
            )

    def _report(self, values: Values) -> MutualInformation:
        terms = {name: term.mean() for name, term in values.terms.items()}
        ceiling = values.ceiling
        saturated = ceiling is not None and bool(terms["contrastive"] >= 0.9 * ceiling > 0.0)
        if saturated:
            kind = "estimate" if values.plug_in is not None else "bound"
            warnings.warn(
                f"the contrastive term of this {type(self).__name__} {kind}, "
                f"{terms['contrastive'].item():.3g} nats, sits at its ceiling of {ceiling:.3g} "
                f"nats: {self._advice(values)}",
                stacklevel=3,
            )
        return MutualInformation(
            method=type(self).__name__,
            pair_lower=values.lower,
            pair_upper=values.upper,
            pair_plug_in=values.plug_in,
            terms=terms,
            ceiling=ceiling,
            saturated=saturated,
            missing=self._missing(),
            notes=values.notes,
            measurements=values.measurements,
        )

    def _missing(self) -> str | None:
        return None

    def _advice(self, values: Values) -> str:
        if values.plug_in is not None:
            return (
                "N pairs cannot support more than about log N, and this estimate may be far above "
                "the mutual information"
            )
        return "the mutual information may be much larger; use more particles or a better guide"

    def _condition(self, x: Tensor) -> Conditional:
        if self.guide is not None:
            return condition_on(self.guide, x, self.joint)
        if self.joint is None or _LEVELS[self.joint.knowledge] < _LEVELS["marginal p(z)"]:
            raise ValueError(
                f"{type(self).__name__} needs a guide q(z|x), or a model whose prior can stand in "
                "for it: pass guide="
            )
        return Prior(self.joint, x)

    def _score(self, x: Tensor, z: Tensor, num_leading: int = 1) -> Tensor:
        """Scores z ``[(K,) N, *z_event]`` against x ``[N, *x_event]`` with the critic."""
        assert self.critic is not None
        flat_x, flat_z = flatten(x, 1), flatten(z, num_leading)
        scores = self.critic(flat_x, flat_z)
        if scores.shape != flat_z.shape[:-1]:
            raise ValueError(
                f"the critic returned scores of shape {list(scores.shape)} for x "
                f"{list(flat_x.shape)} and z {list(flat_z.shape)}, expected "
                f"{list(flat_z.shape[:-1])}"
            )
        return scores


def flatten(value: Tensor, num_leading: int) -> Tensor:
    """Flattens events: ``[*leading, *event]`` to ``[*leading, D]``, with D = 1 for scalars."""
    return value.reshape((*value.shape[:num_leading], -1))
