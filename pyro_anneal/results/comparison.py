"""Bayes factors between models, from their evidence bounds on the same data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from .run import AnnealedRun
from .tables import format_grid, format_value

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Comparison:
    """Models ordered by evidence, the best first. Everything is in nats, summed over the batch."""

    names: tuple[str, ...]
    lower: Tensor  # lower bounds on the log evidence, [M]
    upper: Tensor  # upper bounds, +inf without a certified reverse run, [M]
    std_error: Tensor  # of the lower bounds, by the delta method, [M]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return self.summary()

    @property
    def log_bayes_factors(self) -> Tensor:
        """Estimated log Bayes factors, row against column, ``log Z_i - log Z_j``, ``[M, M]``."""
        return self.lower.unsqueeze(1) - self.lower.unsqueeze(0)

    @property
    def bayes_factor_std_errors(self) -> Tensor:
        """Standard errors of ``log_bayes_factors``, zero on the diagonal, ``[M, M]``."""
        variance = self.std_error.square()
        total = (variance.unsqueeze(1) + variance.unsqueeze(0)).sqrt()
        diagonal = torch.eye(len(self.names), dtype=torch.bool, device=total.device)
        return torch.where(diagonal, 0.0, total)

    @property
    def probabilities(self) -> Tensor:
        """Posterior probabilities of the models under equal prior probabilities, ``[M]``."""
        return torch.softmax(self.lower, dim=0)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Computes asymptotic normal intervals of the log Bayes factors.

        They rest on the delta method's standard errors: a mode that no chain visited does not
        show in them.

        Args:
            level: Coverage for many chains, in (0, 1).

        Returns:
            Both ends in nats, each ``[M, M]``.

        Raises:
            ValueError: If ``level`` is not in (0, 1).
        """
        _check_level(level)
        margin = NormalDist().inv_cdf(0.5 + 0.5 * level) * self.bayes_factor_std_errors
        return self.log_bayes_factors - margin, self.log_bayes_factors + margin

    def guaranteed_interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        r"""Computes intervals of the log Bayes factors that hold in finite samples.

        .. math:: \bigl[L_i - U_j - 2 m,\; U_i - L_j + 2 m\bigr], \qquad m = \log(4 / \alpha)

        Each of the four bounds misses by m with probability at most ``alpha / 4`` (Markov). Ends
        are infinite for models without an upper bound.

        Args:
            level: Probability of coverage, in (0, 1), for each pair of models.

        Returns:
            Both ends in nats, each ``[M, M]``, zero on the diagonal.

        Raises:
            ValueError: If ``level`` is not in (0, 1).
        """
        _check_level(level)
        margin = 2.0 * math.log(4.0 / (1.0 - level))
        low = self.lower.unsqueeze(1) - self.upper.unsqueeze(0) - margin
        low = low.masked_fill(torch.eye(len(self.names), dtype=torch.bool, device=low.device), 0.0)
        return low, -low.T

    def summary(self) -> str:
        """Formats the table of models, each against the best."""
        low, high = self.interval(0.95)
        header = ["model", "log evidence (lower)", "log Bayes factor"]
        header += ["95% (asymptotic)", "probability"]
        guaranteed_low, guaranteed_high = self.guaranteed_interval(0.95)
        guaranteed = len(self.names) > 1 and bool(self.upper.isfinite().any())
        if guaranteed:
            header.append("95% (guaranteed)")
        rows = []
        for i, name in enumerate(self.names):
            row = [
                name,
                format_value(self.lower[i].item(), self.std_error[i].item()),
                format_value(self.log_bayes_factors[i, 0].item()),
                _format_ends(low[i, 0], high[i, 0]),
                f"{self.probabilities[i].item():.3g}",
            ]
            if guaranteed:
                row.append(_format_ends(guaranteed_low[i, 0], guaranteed_high[i, 0]))
            rows.append(row if i else [*row[:3], "", row[4], *([""] if guaranteed else [])])
        title = f"Comparison of {len(self.names)} models (nats; Bayes factors against the first)"
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([title, format_grid(header, rows), *notes])


def compare(
    evidence: Mapping[str, AnnealedRun | tuple[AnnealedRun, AnnealedRun]],
) -> Comparison:
    r"""Compares models by their evidence for the same data.

    .. math:: \log B_{ij} = \log p(x \mid i) - \log p(x \mid j)

    Evidence is the forward lower bound, summed over the batch. Forward runs alone say with a
    finite-sample guarantee only that an evidence is not below a limit, so intervals of Bayes
    factors are asymptotic; given a certified reverse run on the same data as well,
    :meth:`Comparison.guaranteed_interval` needs no asymptotics.

    Args:
        evidence: By model name a forward run, or a pair of a forward and a reverse run, all on the
            same data. A sandwich speaks of data simulated from its own model and cannot enter.

    Returns:
        The comparison, best model first.

    Raises:
        TypeError: If an entry is neither a run nor a pair of runs.
        ValueError: If there is no entry, or the directions are not as above.
    """
    if not evidence:
        raise ValueError("compare needs at least one model")
    lower, upper, std_error, notes = [], [], [], []
    num_observed: dict[str, int] = {}
    for name, entry in evidence.items():
        forward, reverse = _forward_and_reverse(name, entry)
        lower.append(forward.lower.sum().double().cpu())
        std_error.append(forward.std_error.square().sum().sqrt().double().cpu())
        upper.append(torch.full_like(lower[-1], torch.inf))
        if reverse is not None and reverse.certified:
            upper[-1] = reverse.upper.sum().double().cpu()
        notes += [f"{name}: {note}" for note in forward.notes]
        notes += [f"{name}: {d.message}" for d in forward.diagnostics if d.severity == "warning"]
        if forward.scale != 1.0:
            notes.append(f"{name}: scaled by {forward.scale:g}, guarantees do not apply")
            upper[-1] = torch.full_like(lower[-1], torch.inf)
        if forward.observed:
            num_observed[name] = sum(v.numel() for v in forward.observed.values())
    if len(set(num_observed.values())) > 1:
        notes.append(
            f"models observe different numbers of values {num_observed}: Bayes factors compare "
            "models of the same data only"
        )
    values = torch.stack(lower)
    order = torch.argsort(values, descending=True)
    names = list(evidence)
    return Comparison(
        names=tuple(names[i] for i in order.tolist()),
        lower=values[order],
        upper=torch.stack(upper)[order],
        std_error=torch.stack(std_error)[order],
        notes=tuple(notes),
    )


def _forward_and_reverse(name: str, entry: object) -> tuple[AnnealedRun, AnnealedRun | None]:
    runs = entry if isinstance(entry, tuple) else (entry,)
    if not 1 <= len(runs) <= 2 or not all(isinstance(run, AnnealedRun) for run in runs):
        raise TypeError(
            f'compare: entry "{name}" is a {type(entry).__name__}, expected the AnnealedRun of '
            "run(), or a pair of a forward and a reverse run on the same data; a Sandwich speaks "
            "of simulated data"
        )
    directions = tuple(run.direction for run in runs)
    if directions not in (("forward",), ("forward", "reverse")):
        raise ValueError(
            f'compare: entry "{name}" has directions {directions}, expected a forward run, then '
            "optionally a reverse run"
        )
    return runs[0], (runs[1] if len(runs) == 2 else None)


def _check_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level}")


def _format_ends(low: Tensor, high: Tensor) -> str:
    return f"[{low.item():.3f}, {high.item():.3f}]"
