"""Bounds on the expected information gain of designs: the result of :func:`pyro_anneal.oed.ais_eig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .base import Columns, Result
from .findings import Diagnostic
from .provenance import Provenance
from .quantiles import student_quantile
from .tables import Table, format_value

if TYPE_CHECKING:
    from .run import AnnealedRun

__all__ = ["ExpectedInformationGain"]

_NO_INTERVAL = (
    "an interval by that name is guaranteed in finite samples here, and the mean over pairs is not. "
    "normal_interval(level) is asymptotic over pairs, with quantiles of Student's t; gap is what the "
    "method leaves open"
)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ExpectedInformationGain(Result):
    """Bounds on the expected information gain of a batch of designs, in nats.

    Attributes:
        pair_lower: Values whose mean over N pairs is the lower bound, shape ``[N, *designs]``.
        pair_upper: Likewise of the upper bound.
        design: The designs, shape ``[*designs, ...]``, or None.
        gradient: Estimate of the gradient of the sum of all gains with respect to the designs, in
            the shape of ``design``, or None where it was not asked for.
        notes: What the numbers depend on.
        diagnostics: Findings about the pairs and about the sandwiches behind the bounds.
        provenance: How it was computed.

    Example:
        >>> pairs = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
        >>> gain = ExpectedInformationGain(pair_lower=pairs, pair_upper=pairs + 0.5)
        >>> gain.lower, gain.gap
        (tensor([2., 2.]), tensor([0.5000, 0.5000]))
    """

    pair_lower: Tensor
    pair_upper: Tensor
    design: Tensor | None = None
    gradient: Tensor | None = None
    notes: tuple[str, ...] = ()
    diagnostics: tuple[Diagnostic, ...] = ()
    provenance: Provenance | None = None
    _absent: ClassVar[Mapping[str, str]] = {"interval": _NO_INTERVAL}

    @property
    def directions(self) -> dict[str, AnnealedRun]:
        """Empty: of the runs behind the bounds only the values of pairs are kept."""
        return {}

    @property
    def sides(self) -> dict[str, Tensor]:
        """The bounds by side, in nats, each of shape ``designs``."""
        return {"lower": self.lower, "upper": self.upper}

    @property
    def lower(self) -> Tensor:
        """Lower bound in expectation, one per design, nats, shape ``designs``."""
        return self.pair_lower.mean(0)

    @property
    def upper(self) -> Tensor:
        """Upper bound in expectation, one per design, nats, shape ``designs``."""
        return self.pair_upper.mean(0)

    @property
    def lower_std_error(self) -> Tensor:
        """Standard error of ``lower`` over pairs, nats, shape ``designs``; NaN for one pair."""
        return _std_error(self.pair_lower)

    @property
    def upper_std_error(self) -> Tensor:
        """Standard error of ``upper`` over pairs, nats, shape ``designs``; NaN for one pair."""
        return _std_error(self.pair_upper)

    @property
    def gap(self) -> Tensor:
        """``upper - lower``, the uncertainty of the method, nats, shape ``designs``."""
        return self.upper - self.lower

    @property
    def num_pairs(self) -> int:
        """Number N of simulated pairs per design."""
        return len(self.pair_lower)

    def normal_interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Computes an interval per design that covers its gain with about ``level`` probability.

        Both bounds are widened by their errors over pairs, with quantiles of Student's t. It is
        asymptotic: the values of pairs are not normal, and their mean has no guarantee in finite
        samples.

        Args:
            level: Probability of coverage, in (0, 1).

        Returns:
            Ends in nats, each of shape ``designs``; infinite for a single pair.

        Raises:
            ValueError: If ``level`` is not in (0, 1).
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"level must lie strictly between 0 and 1, got {level}")
        if self.num_pairs < 2:
            infinite = torch.full_like(self.lower, torch.inf)
            return -infinite, infinite
        quantile = student_quantile(self.num_pairs - 1, 0.5 + 0.5 * level)
        return (
            self.lower - quantile * self.lower_std_error,
            self.upper + quantile * self.upper_std_error,
        )

    def _columns(self) -> tuple[Columns, Columns]:
        low, high = self.normal_interval()
        columns: dict[str, Any] = {
            "lower": self.lower,
            "lower_std_error": self.lower_std_error,
            "upper": self.upper,
            "upper_std_error": self.upper_std_error,
            "normal_interval_low": low,
            "normal_interval_high": high,
        }
        if self.design is not None and self.design.shape == self.lower.shape:
            columns = {"design": self.design, **columns}
        return {"index": torch.arange(self.lower.numel())}, columns

    def _labels(self) -> list[str]:
        """Names each design: by its value where that is one number, by its place otherwise."""
        if self.design is not None and self.design.shape == self.lower.shape:
            return [f"{value:.4g}" for value in self.design.flatten().tolist()]
        return [str(place) for place in range(self.lower.numel())]

    def _table(self) -> Table:
        low, high = (end.flatten().tolist() for end in self.normal_interval())
        columns = zip(
            self._labels(),
            self.lower.flatten().tolist(),
            self.lower_std_error.flatten().tolist(),
            self.upper.flatten().tolist(),
            self.upper_std_error.flatten().tolist(),
            low,
            high,
            strict=True,
        )
        rows = [
            (
                label,
                format_value(lower, lower_error),
                format_value(upper, upper_error),
                f"[{left:.3f}, {right:.3f}]",
            )
            for label, lower, lower_error, upper, upper_error, left, right in columns
        ]
        rows.append(("verdict", self.verdict, "", ""))
        if self.provenance is not None:
            rows.append(("wall time", self.provenance.describe_seconds(), "", ""))
        title = f"Expected information gain in nats, from {self.num_pairs} pairs per design"
        header = ("design", "lower bound", "upper bound", "95% interval (asymptotic)")
        return Table(title, rows, [*self.notes, *(d.message for d in self.diagnostics)], header)

    def plot(self) -> Any:
        """Draws both bounds of each design, with bars of two standard errors over pairs.

        Returns:
            A matplotlib figure. Designs that are one number each are the axis.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from .information_gain_plot import plot_information_gain

        return plot_information_gain(self)


def _std_error(values: Tensor) -> Tensor:
    if len(values) < 2:
        return torch.full_like(values[0], torch.nan)
    std_error: Tensor = values.std(0) / len(values) ** 0.5
    return std_error
