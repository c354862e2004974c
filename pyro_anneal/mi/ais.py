"""Multi-sample AIS bounds on mutual information, which need the full joint density."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..arguments import as_real
from ..chains.pilot import Pilot
from ..kernels import Kernel
from ..models.validation import validation_disabled
from ..persistence.fingerprints import describe_name, described
from ..persistence.randomness import own_randomness
from ..results.findings import Diagnostic
from ..results.mutual_information import FEW_PAIRS, MutualInformation
from ..schedules import Schedule
from .annealer import AnnealedWeights, Annealer
from .base import Bound, Direction, Values
from .joints import Knowledge

__all__ = ["AIS"]

_WIDE = 1.0  # nats of mean gap, as for sandwiches
_OUTSIDE, _NUM_STARTS = 0.01, 64  # a share of starts at which x is impossible, and how many tell
_CROSSED = 6.0  # standard errors of the mean gap over pairs
MultiSample = Literal["IM", "CR", "IR", "single"]


class AIS(Bound):
    r"""Bounds I from both sides by annealed importance sampling with K chains per pair.

    .. math:: E[\log p(x|z)] - E[U(x)] \le I \le E[\log p(x|z)] - E[L(x)]

    L and U are multi-sample AIS bounds on log p(x): independent (IM), coupled reverse (CR) or, with
    several posterior samples, independent reverse (IR). Reverse chains start from the z of the
    pair, an exact posterior sample. At T = 1 IM is :class:`IWAE` (:class:`StructuredInfoNCE` without
    a guide). The gap shrinks as 1 / T.

    Chains of all pairs of a batch run together, and any number of pairs streams through
    ``estimate`` in bounded memory. The result's ``measurements`` hold every bound that was run, by
    names such as ``"CR lower"``, and the mean acceptance.

    Source: Brekelmans et al. (2022), multi-sample AIS bounds.

    Args:
        model: The full joint: a Pyro model or a joint.
        guide: Base of the path, q(z|x), called with x; the prior if None.
        num_chains: K chains per pair and direction.
        num_steps: T weight increments; 1000 if neither this nor ``target_gap`` is given.
        target_gap: Mean gap over pairs, in nats, that T is chosen for: rounds of more and more steps
            on the first batch of an estimate go on until their gap is below it, and are then
            dropped. Chains of that length are run anew for all batches.
        max_rounds: Largest number of rounds; T is at most ``64 * 2 ** (max_rounds - 1)``.
        lower: Which upper bound on log p(x) gives the lower bound on I.
        upper: Which lower bound on log p(x) gives the upper bound on I; ``"CR"`` costs K - 1 more
            reverse chains per pair.
        posterior: For ``"IR"``: maps ``x [N, *x_event]`` and a number n to exact posterior samples
            ``[n, N, *z_event]``.
        kernel: Transition kernel; HMC by default.
        schedule: ``"adaptive"`` from a pilot, a schedule such as ``Linear()``, or betas.
        step_size: Fixed step size at all betas in place of the pilot's.
        pilot: Settings of the pilot, which runs once per batch of pairs.
        prior_weight: Weight of the prior mixed into the guide, in [0, 1): a defensive start, for
            modes that a guide may miss.
        resampling: Whether chains of a pair resample among each other at points of the path: True,
            False, or ``"auto"`` where the pilot expects log-weights to vary by more than one squared
            nat. Populations then take the place of chains in all bounds but ``"IR"``.
        compile: ``"auto"`` compiles chunks of steps when the batches to come repay it; True or
            False decide.
        checkpoint: File to keep finished batches of an ``estimate`` in. The same call, with the same
            pairs or seed, goes on where the file ends, and gives the same numbers. Its
            ``batch_size`` is how much can be lost.

    Raises:
        ValueError: If the full joint is not known, a number is below 1, or ``"IR"`` is asked for
            without ``posterior``.

    Example:
        >>> from pyro_anneal import mi
        >>> model = mi.DistributionJoint(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 0.5))
        >>> est = mi.AIS(model, num_chains=4, num_steps=50).estimate(num_pairs=200)
        >>> low, high = est.normal_interval(0.999)
        >>> low < 0.5 * torch.tensor(5.0).log() < high
        tensor(True)
    """

    requires: ClassVar[Knowledge] = "full joint p(x, z)"
    directions: ClassVar[tuple[Direction, ...]] = ("lower", "upper")
    breaks: ClassVar[str] = "a guide trained on the same pairs; a kernel tuned on their z"

    def __init__(
        self,
        model: Any,
        guide: Callable[..., Any] | None = None,
        *,
        num_chains: int = 16,
        num_steps: int | None = None,
        target_gap: float | None = None,
        max_rounds: int = 8,
        lower: MultiSample = "CR",
        upper: MultiSample = "IM",
        posterior: Callable[[Tensor, int], Tensor] | None = None,
        kernel: Kernel | None = None,
        schedule: str | Schedule | Tensor = "adaptive",
        step_size: float | None = None,
        pilot: Pilot | None = None,
        prior_weight: float = 0.0,
        resampling: bool | str = "auto",
        compile: bool | str = "auto",
        checkpoint: str | Path | None = None,
    ) -> None:
        super().__init__(model=model, guide=guide)
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.prior_weight = as_real("prior_weight", prior_weight)
        if not 0.0 <= self.prior_weight < 1.0:
            raise ValueError(f"prior_weight must lie in [0, 1), got {prior_weight}")
        if self.prior_weight > 0.0 and guide is None:
            raise ValueError("prior_weight mixes the prior into a guide: pass guide=")
        self.annealer = Annealer(
            num_chains=num_chains,
            num_steps=num_steps,
            target_gap=target_gap,
            max_rounds=max_rounds,
            kernel=kernel,
            schedule=schedule,
            pilot=pilot,
            step_size=step_size,
            resampling=resampling,
            compile=compile,
        )
        self._chosen_steps: int | None = None  # by rounds on an estimate's first batch
        for kind in (lower, upper):
            if kind not in ("IM", "CR", "IR", "single"):
                raise ValueError(f'the bound must be "IM", "CR", "IR" or "single", got {kind!r}')
            if kind == "IR" and posterior is None:
                raise ValueError(
                    "IR bounds need several exact posterior samples per x, a simulated pair has "
                    "one: pass posterior=, or use IM or CR"
                )
        if resampling is True and "IR" in (lower, upper):
            raise ValueError(
                "IR bounds take one posterior sample per chain, and chains that resample share one: "
                "pass resampling=False, or use IM or CR"
            )
        self.lower_kind, self.upper_kind = lower, upper
        self.posterior = posterior

    @property
    def num_rows_per_pair(self) -> int:
        """Chains of a pair that run together."""
        return max(self.annealer.num_chains, self.annealer.plan.pilot.chains_for(1))

    def _path(
        self, x: Tensor
    ) -> tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Callable[[int], Tensor]]:
        """Returns the log densities of base and target, and what draws from the base."""
        joint = self._known
        q = None if self.guide is None else self._condition(x)

        def log_densities(values: Tensor) -> tuple[Tensor, Tensor]:
            log_prior = joint.log_prior(values, x)
            log_base = log_prior if q is None else q.log_prob(values)
            if self.prior_weight > 0.0:
                log_base = torch.logaddexp(
                    log_base + math.log1p(-self.prior_weight),
                    log_prior + math.log(self.prior_weight),
                )
            return log_base, log_prior + joint.log_likelihood(x, values)

        def draw(count: int) -> Tensor:
            drawn = joint.sample_prior(count, x) if q is None else q.sample(count)[0]
            if self.prior_weight > 0.0:
                from_prior = torch.rand(drawn.shape[:2], device=drawn.device) < self.prior_weight
                shape = (*from_prior.shape, *[1] * (drawn.dim() - 2))
                drawn = torch.where(from_prior.reshape(shape), joint.sample_prior(count, x), drawn)
            return drawn

        return log_densities, draw

    def _anneal(self, x: Tensor, z: Tensor) -> tuple[AnnealedWeights, Tensor]:
        """Anneals from the base; returns the weights and the base's log q(z|x) - log p(z)."""
        joint = self._known
        joint.has_edges(x)  # found before the density is recorded
        log_densities, draw = self._path(x)
        posterior = None
        if self.posterior is not None and "IR" in (self.lower_kind, self.upper_kind):
            posterior = self.posterior(x, self.annealer.num_chains - 1)
        weights = self.annealer.run(
            log_densities,
            joint.bijection(x),
            draw,
            z,
            posterior=posterior,
            coupled_lower=self.upper_kind == "CR",
            num_batches=self._num_batches,
            num_steps=self._chosen_steps,
            gap=lambda weights: weights.upper(self.lower_kind) - weights.lower(self.upper_kind),
        )
        log_base, log_joint = log_densities(z.unsqueeze(0))
        return weights, (log_base - log_joint).squeeze(0) + joint.log_likelihood(x, z)

    def _outside(self, x: Tensor) -> Tensor:
        """Computes the share of the base's draws at which x is impossible, per pair, ``[N]``."""
        log_densities, draw = self._path(x)
        with own_randomness(0), validation_disabled():
            return (log_densities(draw(_NUM_STARTS))[1] == -torch.inf).double().mean(0)

    def _statistics(self, x: Tensor, z: Tensor, *, for_loss: bool) -> dict[str, Tensor]:
        if for_loss:
            raise ValueError("AIS has nothing to learn: it measures; use estimate")
        weights, variational = self._anneal(x, z)
        log_likelihood = self._known.log_likelihood(x, z)
        uppers = {"CR", "IM", "single", self.lower_kind}
        lowers = {"IM", "single", self.upper_kind}
        statistics = {f"{k} lower": log_likelihood - weights.upper(k) for k in sorted(uppers)}
        statistics |= {f"{k} upper": log_likelihood - weights.lower(k) for k in sorted(lowers)}
        statistics["variational"] = variational
        statistics["accept_prob"] = torch.full_like(log_likelihood, float(weights.accept_prob))
        statistics["num_steps"] = torch.full_like(log_likelihood, weights.num_steps)
        if self._known.has_edges(x):
            statistics["outside"] = self._outside(x)
        return statistics

    def _measured(self, *args: Any) -> Iterator[Any]:
        try:
            for pair, statistics in super()._measured(*args):
                if self.annealer.target_gap is not None:  # also where a checkpoint had the batch
                    self._chosen_steps = int(statistics["num_steps"][0])
                yield pair, statistics
        finally:
            self._chosen_steps = None

    def _identity(self) -> dict[str, str]:
        plan = self.annealer.plan
        options = {
            "guide": "none" if self.guide is None else describe_name(self.guide),
            "prior_weight": repr(self.prior_weight),
            "bounds": f"{self.lower_kind} lower, {self.upper_kind} upper",
        }
        for name in ("num_chains", "num_steps", "target_gap", "max_rounds", "resampling"):
            options[name] = repr(getattr(plan, name))
        for name in ("kernels", "betas", "step_size", "pilot"):
            options[name] = described(name, getattr(plan, name))
        return super()._identity() | options

    def _content(self, x: Tensor, z: Tensor) -> dict[str, Tensor]:
        content = super()._content(x, z) | {
            "log p(x|z)": self._known.log_likelihood(x, z),
            "log p(z)": self._known.log_prior(z, x),
        }
        return content if self.guide is None else content | {"log q(z|x)": self._log_guide(x, z)}

    def _log_guide(self, x: Tensor, z: Tensor) -> Tensor:
        return self._condition(x).log_prob(z)

    def _assemble(self, statistics: dict[str, Tensor]) -> Values:
        lower, variational = statistics[f"{self.lower_kind} lower"], statistics["variational"]
        return Values(
            lower=lower,
            upper=statistics[f"{self.upper_kind} upper"],
            terms={"variational": variational, "contrastive": lower - variational},
            measurements={name: value.mean() for name, value in statistics.items()},
        )

    def _report(self, values: Values, controls: Tensor | None) -> MutualInformation:
        result = super()._report(values, controls)
        found = _check_edges(result) or _check_sides(result)
        found = (*found, *_check_target(result, self.annealer.target_gap))
        return replace(result, diagnostics=(*result.diagnostics, *found))


def _gaps(result: MutualInformation) -> Tensor:
    """Computes upper minus lower bound of each pair."""
    if result.pair_lower is None or result.pair_upper is None:
        raise TypeError("a result of AIS has both bounds")
    return result.pair_upper - result.pair_lower


def _check_edges(result: MutualInformation) -> tuple[Diagnostic, ...]:
    """Finds starts at which x is impossible: chains cannot cross, however many steps they make."""
    outside = float(result.measurements.get("outside", 0.0))
    if outside <= _OUTSIDE:
        return ()
    message = (
        f"the support of x depends on z, and x is impossible at {outside:.1%} of the draws that "
        "chains start from. Reverse chains never end there, so the lower bound stays low by about "
        "-log(1 - that share) per pair whatever num_steps, and the upper bound is infinite where all "
        "chains of a pair start there. Pass a guide whose draws stay where x is possible, or use "
        "StructuredInfoNCE or IWAE with many particles, which have no path to cross"
    )
    return (Diagnostic(name="edges", severity="warning", message=message, value=outside),)


def _check_target(result: MutualInformation, target: float | None) -> tuple[Diagnostic, ...]:
    """Finds a gap that rounds did not bring to the target."""
    if target is None:
        return ()
    gaps = _gaps(result)
    gap = float(gaps.mean())
    error = float(gaps.std()) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
    if gap - 2.0 * error <= target:
        return ()
    message = (
        f"the bounds are {gap:.3g} nats apart on average, above the target of {target:.3g}, after "
        f"{int(result.measurements['num_steps'])} steps; raise max_rounds or num_chains"
    )
    return (Diagnostic(name="target", severity="info", message=message, value=gap),)


def _check_sides(result: MutualInformation) -> tuple[Diagnostic, ...]:
    """Finds bounds that are far apart, or on the wrong sides of each other beyond chance."""
    gaps = _gaps(result)
    gap = float(gaps.mean())
    error = float(gaps.std()) / len(gaps) ** 0.5 if len(gaps) >= FEW_PAIRS else math.inf
    if gap > _WIDE:
        kind, message = "gap", f"the bounds are {gap:.3g} nats apart on average; raise num_steps"
    elif gap < -_CROSSED * error:
        kind = "agreement"
        message = (
            f"the lower bound exceeds the upper one by {-gap:.3g} nats, beyond chance: pairs are "
            "no draws from the model, or its density is not the one that is simulated"
        )
    else:
        return ()
    return (Diagnostic(name=kind, severity="warning", message=message, value=gap),)
