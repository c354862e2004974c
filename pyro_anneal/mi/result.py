"""The one result type of every mutual information bound."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["MutualInformationEstimate"]


@dataclass(frozen=True, kw_only=True, eq=False)
class MutualInformationEstimate:
    r"""Bounds on mutual information from N pairs, in nats.

    What is stored is one value per pair, whose mean is the bound. Where pairs serve as each other's
    negatives the values are linearized (the empirical influence of the pair on the bound), so that
    their spread gives the standard error without pretending that the terms are independent.

    A sandwich can be tight pair by pair and yet off by the sampling of the pairs: ``gap`` speaks of
    the method, ``lower_std_error`` and ``interval`` of the data.

    Attributes:
        method: Name of the bound.
        pair_lower: Per-pair values of the lower bound, shape ``[N]``, or None.
        pair_upper: Per-pair values of the upper bound, shape ``[N]``, or None.
        pair_plug_in: Per-pair values of an estimate without direction, shape ``[N]``, or None.
        terms: Means of the parts that add up to the lower bound (or the plug-in estimate): the
            ``variational`` (Barber-Agakov) and the ``contrastive`` term, scalars in nats.
        ceiling: Largest value that the contrastive term can take (``log K``), or for a plug-in
            estimate can be trusted at (``log N``); None where there is no such limit.
        saturated: Whether the contrastive term comes within 10% of the ceiling.
        missing: Name of an unknown constant that was left out, for example ``"H(x)"``: then the
            bounds are on I minus that constant. None if nothing is missing.
        caveats: What the directions depend on beyond independent exact pairs.
        diagnostics: Further measured numbers, by name.

    Example:
        >>> estimate = MutualInformationEstimate(
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
    caveats: tuple[str, ...] = ()
    diagnostics: dict[str, Tensor] = field(default_factory=dict)

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
        return None if self.pair_lower is None else _std_error(self.pair_lower)

    @property
    def upper_std_error(self) -> Tensor | None:
        """Standard error of ``upper`` over pairs, scalar in nats; NaN for a single pair."""
        return None if self.pair_upper is None else _std_error(self.pair_upper)

    @property
    def plug_in_std_error(self) -> Tensor | None:
        """Standard error of ``plug_in`` over pairs, scalar in nats; NaN for a single pair."""
        return None if self.pair_plug_in is None else _std_error(self.pair_plug_in)

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

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        r"""Computes an interval for the mutual information from the bounds and their errors.

        .. math:: [L - z\, \mathrm{se}(L),\; U + z\, \mathrm{se}(U)], \qquad
            z = \Phi^{-1}\bigl(\tfrac{1 + level}{2}\bigr)

        It rests on the central limit theorem over pairs. The side of a bound that does not exist
        is infinite; a plug-in estimate has no interval for I, and both sides are infinite.

        Args:
            level: Probability of coverage, in (0, 1).

        Returns:
            Ends of the interval in nats.

        Raises:
            ValueError: If ``level`` is not in (0, 1).

        Example:
            >>> values = torch.tensor([1.0, 3.0])
            >>> MutualInformationEstimate(method="IWAE", pair_upper=values).interval(0.6827)
            (-inf, 3.0...)
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"level must lie strictly between 0 and 1, got {level}")
        score = torch.special.ndtri(torch.tensor(0.5 + 0.5 * level, dtype=torch.float64)).item()
        low, high = -math.inf, math.inf
        if self.lower is not None and self.lower_std_error is not None:
            low = float(self.lower - score * self.lower_std_error)
        if self.upper is not None and self.upper_std_error is not None:
            high = float(self.upper + score * self.upper_std_error)
        return low, high

    def __repr__(self) -> str:
        target = "I(x; z)" if self.missing is None else f"I(x; z) - {self.missing}"
        parts = []
        for name in ("lower", "upper", "plug_in"):
            value, error = getattr(self, name), getattr(self, f"{name}_std_error")
            if value is not None:
                parts.append(f"{name.replace('_', '-')} {value:.4g} +- {error:.2g}")
        text = f"{self.method} on {target}: {', '.join(parts)} nats from {self.num_pairs} pairs"
        if self.pair_plug_in is not None:
            text += " (no direction)"
        if self.saturated:
            text += f" (at its ceiling of {self.ceiling:.3g} nats)"
        return text


def _std_error(values: Tensor) -> Tensor:
    if values.shape[0] < 2:
        return torch.full_like(values.mean(), torch.nan)
    return values.std(dim=0) / math.sqrt(values.shape[0])
