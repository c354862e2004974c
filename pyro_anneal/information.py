"""What :meth:`AnnealedImportance.mutual_information` returns: bounds from a sandwich of pairs."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

from torch import Tensor

from .results import Sandwich, std_error_over_pairs
from .tables import format_fields, format_value

__all__ = ["MutualInformation"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class MutualInformation:
    r"""Bounds on the mutual information of observed and latent variables, over simulated pairs.

    .. math:: I = E[\log p(x | z)] - E[\log p(x)]

    An upper bound on ``log p(x)`` gives the lower bound on I, and the reverse. Both hold in
    expectation over pairs.
    """

    pair_lower: Tensor  # log p(x|z) - upper bound on log p(x), nats, [N]
    pair_upper: Tensor  # log p(x|z) - lower bound on log p(x), nats, [N]
    log_likelihood: Tensor  # log p(x|z), nats, [N]
    notes: tuple[str, ...] = ()

    @classmethod
    def from_sandwich(
        cls, sandwich: Sandwich, *, notes: tuple[str, ...] = ()
    ) -> MutualInformation:
        """Computes the bounds from a sandwich that kept its pairs' log likelihood.

        Args:
            sandwich: Bounds on simulated data.
            notes: Remarks to keep, such as which latents were summed out.

        Returns:
            The bounds on mutual information.

        Raises:
            ValueError: If the sandwich has no ``true_log_likelihood``.
        """
        log_likelihood = sandwich.true_log_likelihood
        if log_likelihood is None:
            raise ValueError("the sandwich has no true_log_likelihood of its pairs")
        return cls(
            pair_lower=(log_likelihood - sandwich.upper).flatten(),
            pair_upper=(log_likelihood - sandwich.lower).flatten(),
            log_likelihood=log_likelihood.flatten(),
            notes=(*sandwich.notes, *notes),
        )

    def __repr__(self) -> str:
        return self.summary()

    @property
    def num_pairs(self) -> int:
        """Number N of pairs."""
        return self.pair_lower.numel()

    @property
    def lower(self) -> Tensor:
        """Mean lower bound on the mutual information, nats, scalar."""
        return self.pair_lower.mean()

    @property
    def upper(self) -> Tensor:
        """Mean upper bound on the mutual information, nats, scalar."""
        return self.pair_upper.mean()

    @property
    def lower_std_error(self) -> Tensor:
        """Standard error of ``lower`` over pairs; NaN for one pair."""
        return std_error_over_pairs(self.pair_lower)

    @property
    def upper_std_error(self) -> Tensor:
        """Standard error of ``upper`` over pairs; NaN for one pair."""
        return std_error_over_pairs(self.pair_upper)

    def lower_interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Computes an asymptotic normal interval of the expected lower bound, over pairs.

        Args:
            level: Coverage for many pairs, in (0, 1).

        Returns:
            Both ends in nats, scalars.
        """
        return _normal_interval(self.lower, self.lower_std_error, level)

    def upper_interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Computes an asymptotic normal interval of the expected upper bound, over pairs.

        Args:
            level: Coverage for many pairs, in (0, 1).

        Returns:
            Both ends in nats, scalars.
        """
        return _normal_interval(self.upper, self.upper_std_error, level)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Computes an asymptotic interval that covers the mutual information itself.

        The lower end of the lower bound's interval and the upper end of the upper bound's, each
        one-sided at half of ``1 - level``.

        Args:
            level: Coverage for many pairs, in (0, 1).

        Returns:
            Both ends in nats, scalars.
        """
        return self.lower_interval(level)[0], self.upper_interval(level)[1]

    def summary(self) -> str:
        """Formats a short table."""
        low, high = (end.item() for end in self.interval(0.95))
        fields = [
            ("lower bound", format_value(self.lower.item(), self.lower_std_error.item())),
            ("upper bound", format_value(self.upper.item(), self.upper_std_error.item())),
            ("95% interval (asymptotic over pairs)", f"[{low:.3f}, {high:.3f}]"),
            ("mean log p(x|z)", format_value(self.log_likelihood.mean().item())),
        ]
        title = f"MutualInformation (nats) from {self.num_pairs} simulated pairs"
        return format_fields(title, fields, self.notes)


def _normal_interval(mean: Tensor, std_error: Tensor, level: float) -> tuple[Tensor, Tensor]:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level}")
    margin = NormalDist().inv_cdf(0.5 + 0.5 * level) * std_error
    return mean - margin, mean + margin
