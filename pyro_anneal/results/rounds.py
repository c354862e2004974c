"""How many pairs an average needs: in rounds, from the standard error that was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..arguments import as_count, as_real
from .findings import Diagnostic
from .mutual_information import FEW_PAIRS, MutualInformation

__all__ = ["PairRounds"]

_GROWTH = 4.0  # at most, from one round to the next
_MARGIN = 1.1  # the first rounds' standard errors are uncertain themselves


@dataclass(frozen=True)
class PairRounds:
    r"""Decides on the number of pairs, round by round.

    After a round of N pairs with standard error s (the larger of both sides'), the next one ends at
    ``1.1 N (s / target)^2`` pairs, at least one more and at most four times as many, until
    ``s <= target``. The number of pairs then depends on the values: rounds stop more readily where
    the pairs happened to agree, so the standard error is a little too small on average, and so is
    the interval. The mean is biased too, by the order of s^2, where values and their spread go
    together.

    Args:
        target: Standard error to reach, in nats, or None for no target.
        least: Pairs of the first round.
        most: Pairs at which to give up.

    Raises:
        ValueError: If ``target`` is not positive, or a number of pairs is below 1.

    Example:
        >>> PairRounds(0.1).next(20, 0.2), PairRounds(0.1).next(100, 0.09)
        (80, 100)
    """

    target: float | None
    least: int = FEW_PAIRS
    most: int = 100_000

    def __post_init__(self) -> None:
        as_count("the number of pairs", self.least)
        as_count("the largest number of pairs", self.most)
        if self.target is not None and not as_real("target_std_error", self.target) > 0.0:
            raise ValueError(f"target_std_error must be positive, in nats, got {self.target}")

    def next(self, num_pairs: int, std_error: float) -> int:
        """Returns how many pairs there should be; no more than there are if that is enough."""
        if num_pairs < self.least:
            return min(self.least, max(self.most, num_pairs))
        if self.target is None or std_error <= self.target or num_pairs >= self.most:
            return num_pairs
        ratio = (std_error / self.target) ** 2 if math.isfinite(std_error) else math.inf
        wanted = num_pairs * min(_MARGIN * ratio, _GROWTH)
        return min(max(num_pairs + 1, math.ceil(wanted)), self.most)

    def after(self, information: MutualInformation) -> int:
        """Returns how many pairs there should be after a result."""
        errors = (
            information.lower_std_error,
            information.upper_std_error,
            information.plug_in_std_error,
        )
        found = [float(error) for error in errors if error is not None]
        worst = math.inf if any(math.isnan(error) for error in found) else max(found)
        return self.next(information.num_pairs, worst)

    def missed(self, information: MutualInformation) -> tuple[Diagnostic, ...]:
        """Warns where the largest number of pairs left the target unreached."""
        if self.target is None or information.num_pairs < self.most:
            return ()
        errors = (information.lower_std_error, information.upper_std_error)
        worst = max((float(error) for error in errors if error is not None), default=0.0)
        if worst <= self.target:
            return ()
        message = (
            f"{information.num_pairs} pairs left a standard error of {worst:.3g} nats, above the "
            f"target of {self.target:.3g}; allow more pairs or raise target_std_error"
        )
        return (
            Diagnostic(name="target_std_error", severity="warning", message=message, value=worst),
        )
