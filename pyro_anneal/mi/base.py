"""What every bound shares: what it needs, which way it points, and how it is trained and measured."""

from __future__ import annotations

import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..arguments import as_count, as_seed, check_function
from ..chains.plan import PathOptions
from ..persistence.randomness import derived_seed, draw_seed, seeded_if
from ..results.findings import Diagnostic, warn
from ..results.mutual_information import (
    MutualInformation,
    control_pairs,
    few_pairs,
    loose_pairs,
)
from ..results.provenance import Provenance
from ..results.rounds import PairRounds
from .checkpoints import OncePerBatch, keep_batches
from .fitting import Fit, FitOptions, as_values, fit_bound
from .guides import Conditional, Prior, condition_on
from .joints import Joint, Knowledge
from .progress import progress_over
from .pyro_joint import as_joint
from .surrogates import Surrogate

__all__ = ["Bound", "Values", "flatten"]

Direction = Literal["lower", "upper"]
_LEVELS: dict[Knowledge, int] = {
    "joint samples": 0,
    "marginal p(z)": 1,
    "full joint p(x, z)": 2,
}
_FIRST_ROUND = 100  # pairs, where the standard error decides on their number
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
    diagnostics: tuple[Diagnostic, ...] = ()

    @property
    def objective(self) -> Tensor:
        """What training maximizes: the estimate, or else the lower bound."""
        values = self.lower if self.plug_in is None else self.plug_in
        if values is None:
            raise TypeError("a bound gives a lower bound or an estimate")
        return values


class Bound(nn.Module, ABC):
    """A bound on, or an estimate of, the mutual information of x and z.

    It is an ``nn.Module``, so ``bound.parameters()`` are those of its guide and critic where these
    are modules. Parameters of Pyro guides live in Pyro's parameter store as always.

    Attributes:
        history: How :meth:`fit` went, or None.
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
        self.history: Fit | None = None
        self.__dict__["joint"] = as_joint(model)
        self._check_knowledge(self.requires)

    joint: Joint | None
    checkpoint: Path | None = None  # of estimates
    _num_batches: int = 1  # of the size of the present one, that an estimate is made of

    def _check_knowledge(self, needed: Knowledge) -> None:
        known: Knowledge = "joint samples" if self.joint is None else self.joint.knowledge
        if _LEVELS[known] < _LEVELS[needed]:
            raise ValueError(
                f"{type(self).__name__} needs the {needed}, but only the {known} is known; pass "
                "a Pyro model or a DistributionJoint that has it, or use a bound that needs less"
            )

    @property
    def _known(self) -> Joint:
        """What is known of p(x, z), for a bound that needs to know."""
        if self.joint is None:
            raise TypeError(f"{type(self).__name__} was made without a model")
        return self.joint

    @property
    def _scorer(self) -> Callable[..., Tensor]:
        """The critic, for a bound that has one."""
        if self.critic is None:
            raise TypeError(f"{type(self).__name__} was made without a critic")
        return self.critic

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
        x, z = self._checked_pairs(x, z)
        values = self._assemble(self._statistics(x, z, for_loss=True))
        loss = -values.objective.mean()
        if not loss.requires_grad:
            raise ValueError(
                f"{type(self).__name__} has nothing to learn here: neither its guide nor its "
                "critic nor x and z require gradients; use estimate"
            )
        return loss

    def held_out_values(self, x: Tensor, z: Tensor) -> Values:
        """Computes what :meth:`fit` compares on held-out pairs: the objective of the loss."""
        return self._assemble(self._statistics(x, z, for_loss=True))

    def fit(
        self,
        x: Any = None,
        z: Any = None,
        *,
        num_pairs: int | None = None,
        max_epochs: int = 200,
        batch_size: int = 128,
        lr: float = 1e-3,
        patience: int = 20,
        validation: float = 0.2,
        seed: int | None = None,
        progress_bar: bool = True,
    ) -> Self:
        """Trains critic and guide on pairs, and keeps the weights that were best on held-out ones.

        Adam on minibatches of :meth:`loss`. A part of the pairs is held out, and measured after
        each epoch with the same random numbers; training stops when it has not improved for
        ``patience`` epochs. Estimate on fresh pairs: the held-out ones chose the weights.

        Args:
            x: Data, ``[N, *x_event]``: a tensor or a numpy array.
            z: The z of each row, ``[N, *z_event]``; integers and booleans are labels, which
                critics of this package cast, or encode one-hot where they were made for that many
                classes.
            num_pairs: Number of pairs to simulate from the model, in place of ``x`` and ``z``.
            max_epochs: Passes over the training pairs at most.
            batch_size: Pairs per step. It bounds the contrastive term where pairs are each other's
                negatives.
            lr: Learning rate at the start, halved where the held-out value stops rising.
            patience: Epochs without a better held-out value before training stops.
            validation: Fraction of pairs that is held out, in (0, 1).
            seed: Seed of the split, batches and particles, which then leaves the global generator
                as it was.
            progress_bar: Whether to show one, over epochs; ``PYRO_ANNEAL_PROGRESS=0`` in the
                environment silences all.

        Returns:
            The bound itself. Its ``history`` holds the curves and findings (overfitted, unfinished,
            at the ceiling), which ``estimate`` repeats.

        Raises:
            ValueError: If the bound has nothing to learn, a number is out of range, or there are
                too few pairs to split.

        Example:
            >>> from pyro_anneal import mi
            >>> z = torch.randn(200)
            >>> bound = mi.InfoNCE(mi.ConcatCritic(1, 1, hidden=[8]))
            >>> bound = bound.fit(z + 0.5, z, max_epochs=3, seed=0, progress_bar=False)
            >>> len(bound.history.held_out)
            3
        """
        options = FitOptions(
            max_epochs=max_epochs,
            batch_size=batch_size,
            lr=lr,
            patience=patience,
            validation=validation,
        )
        seed = as_seed(seed)
        if num_pairs is not None:
            if x is not None or z is not None or self.joint is None:
                raise ValueError(
                    "num_pairs simulates pairs from a model: give it without x and z, to a bound "
                    "that has a model"
                )
            with seeded_if(seed):
                x, z = self.joint.sample(as_count("num_pairs", num_pairs))
        elif x is None or z is None:
            raise ValueError("fit takes x and z, or num_pairs= where there is a model")
        x, z = self._checked_pairs(x, z)
        given = None if seed is None else seed + 1  # not the numbers that pairs were made of
        self.history = fit_bound(self, x, z, options, seed=given, progress_bar=progress_bar)
        return self

    def estimate(
        self,
        x: Tensor | Iterable[tuple[Tensor, Tensor]] | None = None,
        z: Tensor | None = None,
        *,
        num_pairs: int | None = None,
        target_std_error: float | None = None,
        max_pairs: int = 100_000,
        batch_size: int | None = None,
        seed: int | None = None,
        control_variates: bool | Literal["simulated"] = True,
        progress_bar: bool = False,
    ) -> MutualInformation:
        """Measures the bound on pairs: given, from a data loader, or simulated from the model.

        Memory is bounded by one batch; what is kept per pair is a few numbers. No gradients.

        Args:
            x: Data, shape ``[N, *x_event]``; or an iterable of batches ``(x, z)``, whose order
                must be random where pairs serve as each other's negatives.
            z: The z that belongs to each row, shape ``[N, *z_event]``.
            num_pairs: Number of pairs to simulate from the model, in place of ``x`` and ``z``.
            target_std_error: Standard error over pairs to reach, in nats, by simulating pairs in
                rounds, as many as the measured error asks for
                (:class:`pyro_anneal.results.rounds.PairRounds`). ``num_pairs`` is then that of the
                first round, 100 by default.
            max_pairs: Pairs at which to give up on ``target_std_error``, with a warning.
            batch_size: Pairs per batch; by default as many as keep particles times pairs
                below 65536, and all of them where pairs are each other's negatives.
            seed: Seed of simulated pairs, particles and chains, which then leaves the global
                generator as it was; None draws from that.
            control_variates: Whether log densities of simulated pairs whose entropies are known
                serve as control variates, from 50 pairs on, with coefficients that leave bounds
                what they are. ``"simulated"`` adds log p(x|z) and a Gaussian log q(x), centred by 32
                fresh pairs for each pair, where the full joint is known. Given pairs are taken as
                they come: they need not follow the model.
            progress_bar: Whether to show one, over batches.

        Returns:
            The estimate, with standard errors over pairs.

        Raises:
            ValueError: If pairs are neither given nor can be simulated, or shapes disagree.
        """
        began, seed = time.perf_counter(), as_seed(seed)
        rounds = PairRounds(target_std_error, most=as_count("max_pairs", max_pairs))
        if target_std_error is not None:
            if x is not None or z is not None:
                raise ValueError(
                    "target_std_error chooses the number of simulated pairs: pass no x and z"
                )
            num_pairs = _FIRST_ROUND if num_pairs is None else num_pairs
        if control_variates not in (True, False, "simulated"):
            raise ValueError(
                f'control_variates must be True, False or "simulated", got {control_variates!r}'
            )
        surrogate: Surrogate | None = None
        if x is not None or self.joint is None:
            control_variates = False
        elif control_variates == "simulated":
            self._check_knowledge("full joint p(x, z)")
            key = draw_seed() if seed is None else seed
            surrogate = Surrogate.fit(self.joint, derived_seed(key, "surrogate") % 2**62)
        kept: list[dict[str, Tensor]] = []
        controls: list[Tensor] = []
        wanted, count = num_pairs, 0
        with keep_batches(self.checkpoint, self._identity, seed) as once, torch.no_grad():
            while True:
                batches, total = self._batches(x, z, wanted, batch_size)
                shown = progress_over(type(self).__name__, batches, progress_bar, total)
                for pair, statistics in self._measured(shown, total, once):
                    kept.append(statistics)
                    count += len(pair[0])
                    if control_variates:
                        found = self._known.controls(*pair)
                        if surrogate is not None:
                            more = surrogate.controls(*pair, len(controls)).to(found)
                            found = torch.cat([found, more])
                        controls.append(found)
                if not kept:
                    raise ValueError("there are no pairs: the data loader is empty")
                values = self._assemble({k: torch.cat([s[k] for s in kept]) for k in kept[0]})
                result = self._report(values, torch.cat(controls, 1) if controls else None)
                enough = rounds.after(result) if target_std_error is not None else count
                if enough <= count:
                    break
                wanted = enough - count
        self._warn_of_ceiling(values, result)
        missed = rounds.missed(result)
        warn(missed)
        settings = self._settings()
        provenance = Provenance(
            task=f"mi.{type(self).__name__}.estimate",
            seed=seed,
            kernel=settings.pop("kernel", "none"),
            device=str(next(iter(kept[0].values())).device),
            settings=settings,
            seconds={"total": time.perf_counter() - began},
        )
        diagnostics = (*result.diagnostics, *missed)
        return replace(result, diagnostics=diagnostics, provenance=provenance)

    def _settings(self) -> dict[str, str]:
        """Describes the numbers that this bound was made with, by option."""
        settings: dict[str, str] = {}
        for name, value in vars(self).items():
            if isinstance(value, PathOptions):
                plan = value.plan
                settings |= {"num_chains": str(plan.num_chains), "num_steps": str(plan.num_steps)}
                settings["kernel"] = repr(plan.kernel)
            elif isinstance(value, int | float | str) and name[0] != "_" and name != "training":
                settings[name] = str(value)
        return settings

    def _identity(self) -> dict[str, str]:
        """Describes what the values of pairs depend on, beside the pairs; for a checkpoint."""
        return {"bound": type(self).__name__}

    def _content(self, x: Tensor, z: Tensor) -> dict[str, Tensor]:
        """Collects what tells whether a batch, and the densities at it, are what they were."""
        return {"x": x, "z": z}

    def _measured(
        self, batches: Iterator[tuple[Tensor, Tensor]], total: int | None, once: OncePerBatch
    ) -> Iterator[tuple[tuple[Tensor, Tensor], dict[str, Tensor]]]:
        """Yields pairs and their statistics, batch by batch."""
        size = 0
        try:
            for pair in batches:
                x, z = self._checked_pairs(*pair)
                size = size or len(x)
                self._num_batches = total or 1 if len(x) == size else 1
                yield (
                    (x, z),
                    once(
                        partial(self._content, x, z),
                        partial(self._statistics, x, z, for_loss=False),
                    ),
                )
        finally:
            self._num_batches = 1

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
            x, z = self._checked_pairs(x, z)
            size = size or x.shape[0]
            return zip(x.split(size), z.split(size), strict=True), math.ceil(x.shape[0] / size)
        if x is not None and z is None and not isinstance(x, Tensor | np.ndarray):
            return ((batch[0], batch[1]) for batch in x), getattr(x, "__len__", lambda: None)()
        raise ValueError("pass x and z, an iterable of (x, z) batches, or num_pairs=")

    @staticmethod
    def _checked_pairs(x: Any, z: Any) -> tuple[Tensor, Tensor]:
        x, z = as_values("x", x), as_values("z", z)
        for name, value in (("x", x), ("z", z)):
            if bool(value.isnan().any()):
                raise ValueError(f"{name} holds {int(value.isnan().sum())} NaN")
        if x.dim() == 0 or z.dim() == 0 or x.shape[0] != z.shape[0] or x.shape[0] == 0:
            raise ValueError(
                "x and z must hold the same number N >= 1 of pairs along dimension 0, got shapes "
                f"{list(x.shape)} and {list(z.shape)}"
            )
        return x, z

    def _report(self, values: Values, controls: Tensor | None) -> MutualInformation:
        terms = {name: term.mean() for name, term in values.terms.items()}
        measurements = dict(values.measurements)
        lower, upper, ceiling = values.lower, values.upper, values.ceiling
        if controls is not None:
            adjusted = control_pairs(lower, upper, controls)
            lower, upper = adjusted.lower, adjusted.upper
            terms |= adjusted.terms
            measurements |= adjusted.measurements
        per_pair = next(v for v in (lower, upper, values.plug_in) if v is not None)
        return MutualInformation(
            method=type(self).__name__,
            pair_lower=lower,
            pair_upper=upper,
            pair_plug_in=values.plug_in,
            terms=terms,
            ceiling=ceiling,
            saturated=ceiling is not None and bool(terms["contrastive"] >= 0.9 * ceiling > 0.0),
            missing=self._missing(),
            notes=values.notes,
            measurements=measurements,
            diagnostics=(
                *few_pairs(len(per_pair)),
                *(() if values.lower is None or self._leaves_out() else loose_pairs(values.lower)),
                *values.diagnostics,
                *(() if self.history is None else self.history.diagnostics),
            ),
        )

    def _warn_of_ceiling(self, values: Values, result: MutualInformation) -> None:
        if result.saturated:
            kind = "estimate" if values.plug_in is not None else "bound"
            warnings.warn(
                f"the contrastive term of this {type(self).__name__} {kind}, "
                f"{result.terms['contrastive'].item():.3g} nats, sits at its ceiling of "
                f"{result.ceiling:.3g} nats: {self._advice(values)}",
                stacklevel=3,
            )

    def _leaves_out(self) -> bool:
        """Tells whether values of pairs are short of log p(x, z) / (p(x) p(z)) by some term."""
        return self._missing() is not None

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
        flat_x, flat_z = flatten(x, 1), flatten(z, num_leading)
        return self._scores(flat_x, flat_z, flat_z.shape[:-1])

    def _scores(self, x: Tensor, z: Tensor, expected: torch.Size) -> Tensor:
        """Calls the critic and checks the shape of what it returns."""
        scores = self._scorer(x, z)
        if scores.shape != expected:
            raise ValueError(
                f"the critic returned scores of shape {list(scores.shape)} for x "
                f"{list(x.shape)} and z {list(z.shape)}, expected {list(expected)}"
            )
        return scores


def flatten(value: Tensor, num_leading: int) -> Tensor:
    """Flattens events: ``[*leading, *event]`` to ``[*leading, D]``, with D = 1 for scalars."""
    return value.reshape((*value.shape[:num_leading], -1))
