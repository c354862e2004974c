"""What a sandwich returns: bounds from both sides on simulated data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .. import bounds
from ..models.types import Figure
from .base import Columns, Result
from .exported import Exported
from .findings import Diagnostic
from .provenance import Provenance
from .run import AnnealedRun, Estimate, std_error_over_pairs
from .tables import Table, format_value

__all__ = ["Sandwich", "check_names"]


_LOWER = ("IM lower", "CR lower", "single lower")
_UPPER = ("IM upper", "CR upper", "single upper")


def check_names(names: object) -> None:
    """Checks the names of the two bounds that a sandwich shall report.

    Raises:
        ValueError: If they are not one of a lower and one of an upper bound, in this order.
    """
    if (
        not isinstance(names, tuple | list)
        or len(names) != 2
        or names[0] not in _LOWER
        or names[1] not in _UPPER
    ):
        raise ValueError(
            f"bounds must be a pair of one of {list(_LOWER)} and one of {list(_UPPER)}, got {names!r}"
        )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Sandwich(Exported, Result):
    r"""Lower and upper bounds on the log evidence of SIMULATED data.

    Each pair (z, x) is drawn from the model, so that z is an exact posterior sample given x: the
    reverse chains start there. The bounds speak of the simulated x, not of the user's data. They
    tell how tight the same number of chains and steps is on data such as these. For several
    simulations the first plate of both runs counts them.

    ``lower`` and ``upper`` are the two bounds that were asked for, ``gap`` is their difference, and
    ``bounds`` has all bounds that these chains give, by name. ``forward`` and ``reverse`` are the
    runs themselves, with their own diagnostics and pictures.

    Example:
        >>> from pyro_anneal import AnnealedImportance
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> ais = AnnealedImportance(model, num_steps=50, progress_bar=False, seed=0)
        >>> sandwich = ais.sandwich(torch.tensor(2.0))
        >>> truth = dist.Normal(0.0, 2**0.5).log_prob(sandwich.simulated["x"])
        >>> low, high = sandwich.interval(0.95)
        >>> bool(low <= truth <= high)
        True
    """

    forward: AnnealedRun  # chains from the base, on the simulated data
    reverse: AnnealedRun  # chains from the exact posterior samples
    # Log-weights of the reverse chains of the CR lower bound, from the end of forward chain 0,
    # [K - 1, *batch], or of population 0, [K - M, *batch]; None unless that bound was asked for.
    coupled_reverse: Tensor | None = None
    simulated: dict[str, Tensor] = field(default_factory=dict)  # observed sites' values
    true_log_likelihood: Tensor | None = None  # log p(x | z) of the pairs, nats, [*batch]
    lower_bound: str = "IM lower"  # which of the bounds lower is
    upper_bound: str = "CR upper"  # which of the bounds upper is
    notes: tuple[str, ...] = ()  # remarks beside those of the runs
    diagnostics: tuple[Diagnostic, ...] = ()  # what checks found, in both runs and between them
    provenance: Provenance | None = None  # how the sandwich was computed, and what it cost

    def __post_init__(self) -> None:
        if self.forward.direction != "forward" or self.reverse.direction != "reverse":
            raise ValueError(
                "a sandwich takes a forward and a reverse run, got "
                f"{self.forward.direction} and {self.reverse.direction}"
            )
        if self.forward.batch_shape != self.reverse.batch_shape:
            raise ValueError(
                "forward and reverse runs must share their batch, got "
                f"{list(self.forward.batch_shape)} and {list(self.reverse.batch_shape)}"
            )
        for name, end in ((self.lower_bound, "lower"), (self.upper_bound, "upper")):
            if name not in self.bounds or not name.endswith(end):
                available = [key for key in self.bounds if key.endswith(end)]
                raise ValueError(f'no {end} bound "{name}" here: choose among {available}')

    @property
    def directions(self) -> dict[str, AnnealedRun]:
        """The forward and the reverse run."""
        return {"forward": self.forward, "reverse": self.reverse}

    @property
    def sides(self) -> dict[str, Tensor]:
        """The bounds named by ``lower_bound`` and ``upper_bound``, nats, shape ``batch``."""
        return {"lower": self.lower, "upper": self.upper}

    @property
    def data_digest(self) -> str:
        """Digest of the simulated data."""
        return self.forward.data_digest

    @property
    def bounds(self) -> dict[str, Tensor]:
        """All bounds by name, nats, shape ``batch``; see :mod:`pyro_anneal.bounds`.

        Where chains are resampled, populations take their place: they have estimates instead of
        weights, and those of the reverse side hold paths from the posterior sample.
        """
        forward = self.forward.population_estimates
        reverse = self.reverse.population_estimates
        result = {
            "IM lower": bounds.independent_multi_lower(forward),
            "IM upper": bounds.independent_multi_upper(reverse[:1], forward[1:]),
            "CR upper": bounds.coupled_upper(reverse),
            "single lower": bounds.single_sample(forward),
            "single upper": bounds.single_sample(reverse),
        }
        if self.coupled_reverse is not None:
            extra, size = self.coupled_reverse, self.forward.population_size
            if size > 1:
                extra = bounds.block_means(extra, len(extra) // size)
            result["CR lower"] = bounds.coupled_lower(forward[:1], extra)
        return {name: self.forward.scale * bound for name, bound in result.items()}

    @property
    def lower(self) -> Tensor:
        """The lower bound named by ``lower_bound``, nats, shape ``batch``."""
        return self.bounds[self.lower_bound]

    @property
    def upper(self) -> Tensor:
        """The upper bound named by ``upper_bound``, nats, shape ``batch``."""
        return self.bounds[self.upper_bound]

    @property
    def gap(self) -> Tensor:
        """``upper - lower``: nonnegative in expectation, of either sign in one draw."""
        return self.upper - self.lower

    @property
    def num_pairs(self) -> int:
        """Number of independent pairs (z, x): simulations times batch elements."""
        return self.lower.numel()

    @property
    def bennett(self) -> Tensor:
        """Bennett acceptance ratio estimate, where both weight sets cross, no bound."""
        return self.forward.scale * bounds.bennett(
            self.forward.population_estimates, self.reverse.population_estimates
        )

    @property
    def thermodynamic_integration(self) -> Estimate:
        """Mean of both directions' estimates, no bound; the lags of the two oppose each other.

        The standard error is NaN: the reverse chains of a pair share their start.
        """
        forward, reverse = (r.thermodynamic_integration for r in (self.forward, self.reverse))
        std_error = 0.5 * (forward.std_error.square() + reverse.std_error.square()).sqrt()
        return Estimate(0.5 * (forward.value + reverse.value), std_error)

    @property
    def std_error(self) -> dict[str, Tensor]:
        """Standard errors of the means over pairs of each bound and of the gap, by name.

        They come from independent pairs only, since the reverse chains of a pair share one
        posterior sample; NaN for a single pair.
        """
        quantities = {**self.bounds, "gap": self.gap}
        return {name: std_error_over_pairs(value) for name, value in quantities.items()}

    def interval(self, level: float = 0.95, *, total: bool = False) -> tuple[Tensor, Tensor]:
        """Computes an interval that covers the log evidence with at least ``level``.

        It holds in finite samples, at any K and T. Each side fails with half of the probability:
        the lower one by blocks of chains (:func:`pyro_anneal.bounds.limit_of_blocks`) if it is the
        IM bound, all others by Markov's inequality (:func:`pyro_anneal.bounds.interval`), since
        reverse chains share one posterior sample.

        Args:
            level: Probability of coverage, in (0, 1).
            total: Whether to cover the sum over all pairs instead of each.

        Returns:
            Ends of the interval in nats, each of shape ``batch``, or scalars for the total.

        Raises:
            ValueError: If ``level`` is not in (0, 1).
        """
        lower, upper = (b.sum() if total else b for b in (self.lower, self.upper))
        spent = bounds.level_of_look(level, self.forward.num_looks)
        low, high = bounds.interval(lower / self.forward.scale, upper / self.forward.scale, spent)
        low, high = self.forward.scale * low, self.forward.scale * high
        if self.lower_bound == "IM lower":
            low = self.forward.interval(0.5 + 0.5 * level, total=total)[0]
        return low, high

    def normal_interval(
        self, level: float = 0.95, *, total: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Computes the asymptotic interval of the forward run.

        Reverse chains share their start, so that their spread says nothing of their error. See
        :meth:`pyro_anneal.AnnealedRun.normal_interval`.

        Args:
            level: Coverage for many chains, in (0, 1).
            total: Whether to cover the sum over all pairs instead of each.

        Returns:
            Ends of the interval in nats, each of shape ``batch``, or scalars for the total.
        """
        return self.forward.normal_interval(level, total=total)

    def _columns(self) -> tuple[Columns, Columns]:
        index, forward = self.forward._columns()
        columns: dict[str, Tensor | Sequence[object]] = {
            "lower": self.lower,
            "upper": self.upper,
            "gap": self.gap,
        }
        columns |= self.bounds
        columns |= {
            "bennett": self.bennett,
            "ess": forward["ess"],
            "ess_reverse": self.reverse.ess,
        }
        columns["thermodynamic_integration"] = self.thermodynamic_integration.value
        if self.true_log_likelihood is not None:
            columns["true_log_likelihood"] = self.true_log_likelihood
        return index, columns

    def _table(self) -> Table:
        several = self.num_pairs > 1
        errors = self.std_error
        fields = [
            (name, format_value(value.mean().item(), errors[name].item()))
            for name, value in sorted(self.bounds.items(), key=lambda item: item[0].split()[::-1])
        ]
        fields.append(("gap", format_value(self.gap.mean().item(), errors["gap"].item())))
        low, high = self.interval(0.95)
        ends = f"[{low.mean().item():.3f}, {high.mean().item():.3f}]"
        fields.append(("95% interval (guaranteed)", ends))
        for name, value in (
            ("Bennett (no bound)", self.bennett),
            ("thermodynamic integration (no bound)", self.thermodynamic_integration.value),
        ):
            error = std_error_over_pairs(value).item()
            fields.append((name, format_value(value.mean().item(), error)))
        batch = ", ".join(f"{plate}={size}" for plate, size in self.forward.plates.items())
        title = (
            f"Sandwich of the log evidence of SIMULATED data: {self.forward.num_chains} chains, "
            f"{self.forward.num_steps} steps{', batch ' + batch if batch else ''}; nats"
            f"{', means over ' + str(self.num_pairs) + ' pairs' if several else ''}"
        )
        notes = [*self._explanations((high - low).mean().item())]
        notes += [*self.forward.notes, *self.notes, *(d.message for d in self.diagnostics)]
        fields.append(("verdict", self.verdict))
        if self.provenance is not None:
            fields.append(("wall time", self.provenance.describe_seconds()))
        return Table(title, fields, notes)

    def _explanations(self, width: float) -> list[str]:
        """Explains what a reader of the table may take for a mistake."""
        gap = self.gap.mean().item()
        notes = []
        if gap < 0.0 and all(d.name != "agreement" for d in self.diagnostics):
            notes.append(
                f"the lower bound lies {-gap:.2g} nats above the upper one, no more than chance "
                "allows: each is a bound in expectation, and one draw may fall on either side"
            )
        notes.append(
            f"the 95% interval is {width - gap:.1f} nats wider than the gap by construction: a "
            "margin that makes it hold in finite samples, at any numbers of chains and steps"
        )
        return notes

    def posterior_samples(
        self, num_samples: int, *, thin: int = 10, seed: int | None = None
    ) -> dict[str, Tensor]:
        """Draws posterior samples given the SIMULATED data, by continuing the forward chains.

        See :meth:`pyro_anneal.AnnealedRun.posterior_samples`.

        Args:
            num_samples: Number n of draws.
            thin: Transitions of a chain before each of its draws.
            seed: Seed of the draws; one drawn from torch's global generator if None.

        Returns:
            Values by site in the model's own space, ``[n, *value_shape]``.

        Raises:
            ValueError: As there; or if there are several simulated data sets.
        """
        return self.forward.posterior_samples(num_samples, thin=thin, seed=seed)

    def plot(self) -> Figure:
        """Draws the sandwich; see :func:`pyro_anneal.results.plotting.plot_sandwich`."""
        from .plotting import plot_sandwich

        return plot_sandwich(self)
