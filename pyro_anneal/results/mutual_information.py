"""Bounds on mutual information: the one result type, whatever measured it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..models.types import Figure
from .base import Columns, Result
from .controls import control_of_sides
from .findings import Diagnostic
from .provenance import Provenance
from .quantiles import student_quantile
from .run import AnnealedRun, std_error_over_pairs
from .sandwich import Sandwich
from .tables import Table, format_value

__all__ = ["MutualInformation"]

# Below this many pairs an interval rests on what the pairs seen happen to show; a note says so.
FEW_PAIRS = 20
# Probability of a pair below the limit of plausible values, and nats of a mean that are worth a word.
_IMPOSSIBLE, _TAKEN = 0.01, 0.01
_NO_INTERVAL = (
    "an interval by that name is guaranteed in finite samples here, and the mean over pairs is not. "
    "normal_interval(level) is asymptotic over pairs, with quantiles of Student's t; gap is what "
    "the method leaves open"
)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class MutualInformation(Result):
    r"""Bounds on mutual information from N pairs, in nats.

    What is stored is one value per pair, whose mean is the bound. Where pairs serve as each other's
    negatives the values are linearized (the empirical influence of the pair on the bound), so that
    their spread gives the standard error without pretending that the terms are independent.

    A sandwich can be tight pair by pair and yet off by the sampling of the pairs: ``gap`` speaks of
    the method, ``lower_std_error`` and ``normal_interval`` of the data. There is no ``interval``:
    nothing is guaranteed of a mean over finitely many pairs of unknown distribution.

    Attributes:
        method: Name of the bound.
        pair_lower: Per-pair values of the lower bound, shape ``[N]``, or None.
        pair_upper: Per-pair values of the upper bound, shape ``[N]``, or None.
        pair_plug_in: Per-pair values of an estimate without direction, shape ``[N]``, or None.
        terms: Means of the parts that add up to the lower bound (or the plug-in estimate), scalars
            in nats: the ``variational`` (Barber-Agakov) and the ``contrastive`` term, and minus the
            ``control`` variates where they were used, whose expectation is zero.
        ceiling: Largest value that the contrastive term can take (``log K``), or for a plug-in
            estimate can be trusted at (``log N``); None where there is no such limit.
        saturated: Whether the contrastive term comes within 10% of the ceiling.
        missing: Name of an unknown constant that was left out, for example ``"H(x)"``: then the
            bounds are on I minus that constant. None if nothing is missing.
        notes: What the directions depend on beyond independent exact pairs, and what I is about.
        measurements: Further measured numbers, by name.
        diagnostics: Findings about the estimate, or about the sandwich behind it.
        provenance: How it was computed: settings, seed, versions, seconds.

    Example:
        >>> estimate = MutualInformation(
        ...     method="BarberAgakov", pair_lower=torch.tensor([1.0, 3.0])
        ... )
        >>> estimate.lower, estimate.lower_std_error
        (tensor(2.), tensor(1.))
    """

    method: str
    pair_lower: Tensor | None = None
    pair_upper: Tensor | None = None
    pair_plug_in: Tensor | None = None
    terms: dict[str, Tensor] = field(default_factory=dict)
    ceiling: float | None = None
    saturated: bool = False
    missing: str | None = None
    notes: tuple[str, ...] = ()
    measurements: dict[str, Tensor] = field(default_factory=dict)
    diagnostics: tuple[Diagnostic, ...] = ()
    provenance: Provenance | None = None
    _absent: ClassVar[Mapping[str, str]] = {"interval": _NO_INTERVAL}

    @classmethod
    def from_sandwich(
        cls,
        sandwich: Sandwich,
        *,
        notes: tuple[str, ...] = (),
        controls: Tensor | None = None,
    ) -> MutualInformation:
        r"""Computes bounds on I from bounds on the log evidence of simulated pairs.

        .. math:: I = E[\log p(x | z)] - E[\log p(x)]

        An upper bound on ``log p(x)`` gives the lower bound on I, and the reverse. The variational
        term is the Barber-Agakov bound of the base q: the log ratio at which the reverse chains
        start turns log p(x|z) into log q(z|x) - log p(z).

        Source: Brekelmans et al. (2022), multi-sample AIS bounds.

        Args:
            sandwich: Bounds on simulated data that kept their pairs' log likelihood.
            notes: Remarks to keep, such as which latents were summed out.
            controls: Control variates of the pairs, of mean zero, shape ``[C, *pairs]``.

        Returns:
            The bounds on mutual information.

        Raises:
            ValueError: If the sandwich has no ``true_log_likelihood``.
        """
        log_likelihood = sandwich.true_log_likelihood
        if log_likelihood is None:
            raise ValueError("the sandwich has no true_log_likelihood of its pairs")
        pair_lower = (log_likelihood - sandwich.upper).flatten()
        pair_upper = (log_likelihood - sandwich.lower).flatten()
        variational = log_likelihood.mean() - sandwich.reverse.mean_log_ratio[-1]
        terms = {"variational": variational, "contrastive": pair_lower.mean() - variational}
        measurements: dict[str, Tensor] = {}
        if controls is not None:
            flat = controls.reshape(len(controls), -1)
            sides = control_pairs(pair_lower, pair_upper, flat)
            terms |= sides.terms
            measurements |= sides.measurements
        else:
            sides = ControlledPairs(lower=pair_lower, upper=pair_upper)
        return cls(
            method="AIS",
            pair_lower=sides.lower,
            pair_upper=sides.upper,
            terms=terms,
            notes=(*sandwich.notes, *notes),
            measurements=measurements,
            diagnostics=(
                *sandwich.diagnostics,
                *few_pairs(len(pair_lower)),
                *loose_pairs(pair_lower),
            ),
            provenance=sandwich.provenance,
        )

    @property
    def directions(self) -> dict[str, AnnealedRun]:
        """None: of the runs behind the bounds one value per pair is kept."""
        return {}

    @property
    def sides(self) -> dict[str, Tensor]:
        """The bounds by side, scalars in nats: those that the method has."""
        sides = {"lower": self.lower, "upper": self.upper}
        return {name: bound for name, bound in sides.items() if bound is not None}

    @property
    def lower(self) -> Tensor | None:
        """Lower bound in expectation, scalar in nats, or None."""
        return None if self.pair_lower is None else self.pair_lower.mean()

    @property
    def upper(self) -> Tensor | None:
        """Upper bound in expectation, scalar in nats, or None."""
        return None if self.pair_upper is None else self.pair_upper.mean()

    @property
    def plug_in(self) -> Tensor | None:
        """Estimate that is neither a lower nor an upper bound, scalar in nats, or None."""
        return None if self.pair_plug_in is None else self.pair_plug_in.mean()

    @property
    def lower_std_error(self) -> Tensor | None:
        """Standard error of ``lower`` over pairs, scalar in nats; NaN for a single pair."""
        return None if self.pair_lower is None else std_error_over_pairs(self.pair_lower)

    @property
    def upper_std_error(self) -> Tensor | None:
        """Standard error of ``upper`` over pairs, scalar in nats; NaN for a single pair."""
        return None if self.pair_upper is None else std_error_over_pairs(self.pair_upper)

    @property
    def plug_in_std_error(self) -> Tensor | None:
        """Standard error of ``plug_in`` over pairs, scalar in nats; NaN for a single pair."""
        return None if self.pair_plug_in is None else std_error_over_pairs(self.pair_plug_in)

    @property
    def gap(self) -> Tensor | None:
        """Upper minus lower bound, scalar in nats, or None unless both exist."""
        if self.lower is None or self.upper is None:
            return None
        return self.upper - self.lower

    @property
    def num_pairs(self) -> int:
        """Number N of pairs."""
        for values in (self.pair_lower, self.pair_upper, self.pair_plug_in):
            if values is not None:
                return values.shape[0]
        return 0

    def normal_interval(self, level: float = 0.95) -> tuple[float, float]:
        r"""Computes an asymptotic interval for I from the bounds and their errors over pairs.

        .. math:: [L - t\, \mathrm{se}(L),\; U + t\, \mathrm{se}(U)], \qquad
            t = t_{N - 1}\bigl(\tfrac{1 + level}{2}\bigr)

        with the quantile of Student's t for N pairs. It rests on the central limit theorem: the
        values of pairs are not normal, and a kind of pair too rare to be among those drawn is
        missed by any number of standard errors. A single pair tells nothing of its spread, and both
        ends are infinite. So is the side of a bound that does not exist; a plug-in estimate has no
        interval for I.

        Args:
            level: Probability of coverage for many pairs, in (0, 1).

        Returns:
            Ends of the interval in nats.

        Raises:
            ValueError: If ``level`` is not in (0, 1).

        Example:
            >>> values = torch.tensor([1.0, 3.0])  # the quantile for two pairs is 1 at level 1/2
            >>> low, high = MutualInformation(method="IWAE", pair_upper=values).normal_interval(0.5)
            >>> low, round(high, 5)
            (-inf, 3.0)
        """
        low, high = self.lower_interval(level), self.upper_interval(level)
        return (
            -math.inf if low is None else low[0],
            math.inf if high is None else high[1],
        )

    def lower_interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """Computes an asymptotic interval of the expected lower bound, over pairs.

        Args:
            level: Coverage for many pairs, in (0, 1).

        Returns:
            Both ends in nats, infinite for a single pair, or None without a lower bound.

        Raises:
            ValueError: If ``level`` is not in (0, 1).
        """
        return _student_interval(self.pair_lower, level)

    def upper_interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """Computes an asymptotic interval of the expected upper bound, over pairs.

        Args:
            level: Coverage for many pairs, in (0, 1).

        Returns:
            Both ends in nats, infinite for a single pair, or None without an upper bound.

        Raises:
            ValueError: If ``level`` is not in (0, 1).
        """
        return _student_interval(self.pair_upper, level)

    def _columns(self) -> tuple[Columns, Columns]:
        columns = {"lower": self.pair_lower, "upper": self.pair_upper}
        columns["plug_in"] = self.pair_plug_in
        kept = {name: values for name, values in columns.items() if values is not None}
        return {"pair": torch.arange(self.num_pairs)}, kept

    def plot(self) -> Figure:
        """Draws the bounds; see :func:`pyro_anneal.results.plotting.plot_mutual_information`."""
        from .plotting import plot_mutual_information

        return plot_mutual_information(self)

    def _table(self) -> Table:
        target = "I(x; z)" if self.missing is None else f"I(x; z) - {self.missing}"
        fields = []
        for name in ("lower", "upper", "plug_in"):
            value, error = getattr(self, name), getattr(self, f"{name}_std_error")
            if value is not None:
                label = "plug-in (no direction)" if name == "plug_in" else f"{name} bound"
                fields.append((label, format_value(float(value), float(error))))
        if self.pair_lower is not None or self.pair_upper is not None:
            low, high = self.normal_interval(0.95)
            fields.append(("95% interval (asymptotic over pairs)", f"[{low:.3f}, {high:.3f}]"))
        fields += [
            (name.replace("_", " ") + " term", format_value(float(v)))
            for name, v in self.terms.items()
        ]
        if self.ceiling is not None:
            at = ", and the estimate sits on it" if self.saturated else ""
            fields.append(("ceiling", f"{self.ceiling:.3f}{at}"))
        title = f"{self.method} on {target}, nats, from {self.num_pairs} pairs"
        fields.append(("verdict", self.verdict))
        if self.provenance is not None:
            fields.append(("wall time", self.provenance.describe_seconds()))
        return Table(title, fields, [*self.notes, *(d.message for d in self.diagnostics)])


@dataclass(frozen=True, kw_only=True, eq=False)
class ControlledPairs:
    """Values of pairs after their control variates, and what these did."""

    lower: Tensor | None
    upper: Tensor | None
    terms: dict[str, Tensor] = field(default_factory=dict)
    measurements: dict[str, Tensor] = field(default_factory=dict)


def control_pairs(lower: Tensor | None, upper: Tensor | None, controls: Tensor) -> ControlledPairs:
    """Subtracts control variates from both sides, with one set of coefficients for the two.

    So the gap of each pair stays what it was.

    Args:
        lower: Values of the lower bound, ``[N]`` in nats, or None.
        upper: Values of the upper bound, or None.
        controls: Quantities of mean zero, ``[C, N]``.

    Returns:
        The controlled values; ``measurements`` has ``variance_ratio``, the variance that is left of
        what was there, where anything was done.
    """
    sides = [side for side in (lower, upper) if side is not None]
    unchanged = ControlledPairs(lower=lower, upper=upper)
    if not sides:
        return unchanged
    middle = torch.stack(sides).mean(0)
    control = control_of_sides(sides[0], sides[-1], controls.to(middle))
    if not bool(control.any()):
        return unchanged
    return ControlledPairs(
        lower=None if lower is None else lower - control,
        upper=None if upper is None else upper - control,
        terms={} if lower is None else {"control": -control.mean()},
        measurements={"variance_ratio": (middle - control).var() / middle.var()},
    )


def few_pairs(num_pairs: int) -> tuple[Diagnostic, ...]:
    """Notes that an average rests on few pairs; empty from 20 pairs on.

    Example:
        >>> [found.name for found in few_pairs(1)], few_pairs(20)
        (['few_pairs'], ())
    """
    if num_pairs >= FEW_PAIRS:
        return ()
    if num_pairs < 2:
        what = "a single pair says nothing of the spread over pairs, so the interval is infinite"
    else:
        what = (
            f"{num_pairs} pairs: the interval has wide quantiles (Student's t), but holds only "
            "if no rare kind of pair is missing among them"
        )
    message = f"{what}; simulate at least {FEW_PAIRS}, or give target_std_error"
    return (
        Diagnostic(name="few_pairs", severity="info", message=message, value=float(num_pairs)),
    )


def loose_pairs(pair_lower: Tensor) -> tuple[Diagnostic, ...]:
    r"""Finds pairs at which a lower bound lies below what the information of any pair can be.

    Over pairs from the joint, :math:`i = \log p(x, z) / (p(x) p(z))` has
    :math:`P(i < -a) \le e^{-a}`, since :math:`E[e^{-i}] \le 1`. So in a sample of N pairs none lies
    below :math:`-\log(N / \alpha)`, but with probability :math:`\alpha` = 1%; values that do are those of a bound
    that is loose there, as with a guide whose tails are lighter than the posterior's. Nothing needs
    to be known of the densities.

    Args:
        pair_lower: Values of a lower bound, per pair, ``[N]`` in nats.

    Returns:
        A warning whose value is what these pairs take from the mean, in nats, beyond that limit.

    Example:
        >>> loose_pairs(torch.tensor([1.0, 2.0, -99.0, 1.5]))[0].value > 20.0
        True
        >>> loose_pairs(torch.tensor([1.0, 2.0, -5.0, 1.5]))
        ()
    """
    limit = -math.log(len(pair_lower) / _IMPOSSIBLE)
    excess = (limit - pair_lower.double()).clamp(min=0.0)
    count, taken = int((excess > 0.0).sum()), float(excess.mean())
    if not taken > _TAKEN:
        return ()
    message = (
        f"{count} of {len(pair_lower)} pairs have values below {limit:.3g} nats, which the information of "
        f"a pair goes below with probability {_IMPOSSIBLE:.0%} in so many: the bound is loose there, and they "
        f"take {taken:.3g} nats from the mean, whose standard error a few pairs decide. Give the guide heavier "
        "tails (Student-t, or a larger scale), train it on more pairs, or let the critic see the tails; or "
        "else these pairs are no draws from the joint"
    )
    return (Diagnostic(name="loose_pairs", severity="warning", message=message, value=taken),)


def _student_interval(values: Tensor | None, level: float) -> tuple[float, float] | None:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level}")
    if values is None:
        return None
    if len(values) < 2 or not bool(values.isfinite().all()):
        return -math.inf, math.inf
    quantile = student_quantile(len(values) - 1, 0.5 + 0.5 * level)
    margin = quantile * float(std_error_over_pairs(values))
    return float(values.mean()) - margin, float(values.mean()) + margin
