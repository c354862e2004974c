"""What the evidence from posterior draws returns: bounds by annealing, and two estimates beside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import as_real
from ..models.types import Figure
from .base import Columns, Result
from .findings import Diagnostic
from .provenance import Provenance
from .quantiles import normal_quantile
from .run import AnnealedRun, Estimate
from .tables import Table, format_value

__all__ = ["EvidenceFromSamples"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class EvidenceFromSamples(Result):
    """Log evidence from posterior draws, by three methods.

    Chains annealed from a density fitted to half of the draws give a lower bound, whatever the
    draws are. If these are exact, reverse chains from some of the other half give an upper bound.
    Bridge sampling between the fitted density and the other half gives the :attr:`estimate`, which
    is as good as the draws; the truncated harmonic mean of that half checks it.
    """

    forward: AnnealedRun  # chains from the fitted density
    reverse: AnnealedRun | None = None  # chains from exact draws; None for other draws
    bridge: Tensor  # bridge sampling's estimate of the log evidence, nats, [*batch]
    bridge_std_error: Tensor  # its standard error, nats, [*batch]
    harmonic_mean: Tensor  # estimate by the truncated harmonic mean (THAMES), nats, [*batch]
    harmonic_mean_std_error: Tensor  # its standard error, nats, [*batch]
    pareto_k: Tensor  # of p / q at draws of the base, and of q / p at posterior draws, [2, *batch]
    r_hat: Tensor  # largest over dimensions, [*batch]; NaN for exact draws
    num_effective: Tensor  # effective number of posterior draws, the least over them, [*batch]
    num_draws: int  # of all chains together
    base: str  # the density that was fitted to the first half of the draws, in words
    exact: bool = False  # whether the draws were said to be exact
    diagnostics: tuple[Diagnostic, ...] = ()  # what checks found
    provenance: Provenance | None = None  # how it was computed, and what it cost

    @property
    def lower(self) -> Tensor:
        """The annealed lower bound, nats, shape ``batch``: a bound for any draws."""
        return self.forward.lower

    @property
    def upper(self) -> Tensor:
        """The annealed upper bound, nats, shape ``batch``.

        Raises:
            ValueError: If the draws were not said to be exact.
        """
        if self.reverse is None:
            raise ValueError(
                "only exact posterior draws give an upper bound: pass exact=True if they are, and "
                "not for draws of a Markov chain"
            )
        return self.reverse.upper

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on the annealed runs."""
        return self.forward.notes

    @property
    def std_error(self) -> Tensor:
        """Standard error of :attr:`lower`, nats, shape ``batch``."""
        return self.forward.std_error

    @property
    def estimate(self) -> Estimate:
        """Bridge sampling: no bound. Its standard error knows only the modes that draws are in."""
        return Estimate(self.bridge, self.bridge_std_error)

    @property
    def thames(self) -> Estimate:
        """The truncated harmonic mean: no bound, and poor where the posterior is far from round."""
        return Estimate(self.harmonic_mean, self.harmonic_mean_std_error)

    @property
    def directions(self) -> dict[str, AnnealedRun]:
        """The annealed runs by direction; a reverse one only from exact draws."""
        runs = {"forward": self.forward}
        return runs if self.reverse is None else runs | {"reverse": self.reverse}

    @property
    def sides(self) -> dict[str, Tensor]:
        """The annealed bounds by side, nats, shape ``batch``."""
        lower = {"lower": self.lower}
        return lower if self.reverse is None else lower | {"upper": self.upper}

    def interval(self, level: float = 0.95, *, total: bool = False) -> tuple[Tensor, Tensor]:
        """Computes an interval that covers the log evidence with at least ``level``.

        It holds in finite samples. The lower end comes from the annealed bound, and holds for any
        draws; the upper end is infinite unless they are exact, since no number of approximate draws
        excludes evidence where none of them lies.

        Args:
            level: Probability of coverage, in (0, 1).
            total: Whether to cover the sum over the batch instead of each element.

        Returns:
            Ends of the interval in nats, each of shape ``batch``, or scalars for the total.

        Raises:
            ValueError: If ``level`` is not in (0, 1).
        """
        if not 0.0 < as_real("level", level) < 1.0:
            raise ValueError(f"level must lie strictly between 0 and 1, got {level}")
        if self.reverse is None:
            return self.forward.interval(level, total=total)
        each = 0.5 + 0.5 * level
        low = self.forward.interval(each, total=total)[0]
        return low, self.reverse.interval(each, total=total)[1]

    def normal_interval(
        self, level: float = 0.95, *, total: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Computes an asymptotic interval around the bridge estimate.

        Args:
            level: Coverage for many draws that represent the posterior, in (0, 1).
            total: Whether to cover the sum over the batch instead of each element.

        Returns:
            Ends of the interval in nats, each of shape ``batch``, or scalars for the total.

        Raises:
            ValueError: If ``level`` is not in (0, 1).
        """
        value, error = self.estimate
        if total:
            value, error = value.sum(), error.square().sum().sqrt()
        margin = normal_quantile(level) * error
        return value - margin, value + margin

    def _estimates(self) -> dict[str, Estimate]:
        found = {"lower": Estimate(self.lower, self.std_error)}
        if self.reverse is not None:
            found["upper"] = Estimate(self.upper, self.reverse.std_error)
        return found | {"bridge": self.estimate, "thames": self.thames}

    def _columns(self) -> tuple[Columns, Columns]:
        columns: dict[str, Any] = {}
        for name, (value, error) in self._estimates().items():
            columns |= {name: value, f"{name}_std_error": error}
        columns |= {
            "ess": self.forward.ess,
            "num_effective": self.num_effective,
            "r_hat": self.r_hat,
            "pareto_k_base": self.pareto_k[0],
            "pareto_k_draws": self.pareto_k[1],
        }
        return self.forward._columns()[0], columns

    def _table(self) -> Table:
        names = {
            "lower": "annealed lower bound",
            "upper": "annealed upper bound",
            "bridge": "bridge sampling (no bound)",
            "thames": "truncated harmonic mean (no bound)",
        }
        fields = [
            (names[name], format_value(value.sum().item(), error.square().sum().sqrt().item()))
            for name, (value, error) in self._estimates().items()
        ]
        low, high = (end.item() for end in self.interval(0.95, total=True))
        end = f"at least {low:.3f}" if high == torch.inf else f"[{low:.3f}, {high:.3f}]"
        fields.append(("95% interval (guaranteed)", end))
        fields.append(("base", self.base))
        effective = self.num_effective.min().item()
        fields.append(("posterior draws", f"{self.num_draws}, at least {effective:.0f} effective"))
        k = ", ".join(f"{value.max().item():.2f}" for value in self.pareto_k)
        fields.append(("Pareto k (base, draws)", k))
        if not self.exact:
            fields.append(("R-hat", f"{self.r_hat.max().item():.3f}"))
        fields.append(("verdict", self.verdict))
        if self.provenance is not None:
            fields.append(("wall time", self.provenance.describe_seconds()))
        batch = ", ".join(f"{plate}={size}" for plate, size in self.forward.plates.items())
        title = (
            f"Log evidence from {'exact ' if self.exact else ''}posterior draws, nats"
            f"{', sum over batch ' + batch if batch else ''}"
        )
        notes = [*self.notes, *(d.message for d in self.diagnostics)]
        return Table(title, fields, notes)

    def plot(self) -> Figure:
        """Draws bounds and estimates with two standard errors; returns a matplotlib figure."""
        from .drawn_plot import plot_evidence_from_samples

        return plot_evidence_from_samples(self)
