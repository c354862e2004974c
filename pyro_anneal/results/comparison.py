"""Bayes factors between models, from their evidence bounds on the same data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import torch
from torch import Tensor

from ..models.types import Figure
from .base import Columns, Result
from .batches import EvidenceOfBatches
from .drawn import EvidenceFromSamples
from .entries import named_entries, prior_weights, read_entry, shared_digest
from .findings import Diagnostic
from .provenance import Provenance, differing_versions, joint_record
from .run import AnnealedRun
from .tables import Table, format_value

__all__ = ["Comparison", "compare"]

Evidence = AnnealedRun | EvidenceOfBatches | EvidenceFromSamples | tuple[AnnealedRun, AnnealedRun]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Comparison(Result):
    """Models ordered by evidence, the best first, as :func:`compare` returns them.

    Everything is in nats and summed over the batch. ``log_bayes_factors[i, j]`` is the log evidence
    of model i minus that of model j, in the order of ``names``: 3 nats are odds of 20 to 1.
    ``probabilities`` are those of the models once the data are seen. Print the comparison for a
    table, or :meth:`plot` it.
    """

    names: tuple[str, ...]  # of the M models, by evidence
    lower: Tensor  # lower bounds on the log evidence, [M]
    upper: Tensor  # upper bounds, +inf without a certified reverse run, [M]
    std_error: Tensor  # of the lower bounds, by the delta method, [M]
    log_prior: Tensor | None = None  # log prior probabilities of the models, [M]; None: equal
    notes: tuple[str, ...] = ()  # what qualifies the numbers, by model
    diagnostics: tuple[Diagnostic, ...] = ()  # of all models, their names in the messages
    data_digest: str = ""  # of the data that all models share; empty if they do not, or unknown
    provenance: Provenance | None = None  # of all runs together
    # How each model's evidence was computed: that of a pair of runs is under "a" and "a (reverse)".
    provenances: dict[str, Provenance] = field(default_factory=dict)
    looks: tuple[int, ...] = ()  # of each model's rounds (AnnealedRun.num_looks); empty: none

    @property
    def directions(self) -> dict[str, AnnealedRun]:
        """Empty: of each model's runs only the evidence is kept."""
        return {}

    @property
    def sides(self) -> dict[str, Tensor]:
        """Bounds on the log evidences; upper ones are infinite without a certified reverse run."""
        return {"lower": self.lower, "upper": self.upper}

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
        """Posterior probabilities of the models, ``[M]``: equal prior ones unless given."""
        return torch.softmax(self._log_joint, dim=0)

    @property
    def _log_joint(self) -> Tensor:
        return self.lower if self.log_prior is None else self.lower + self.log_prior

    def normal_interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
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

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        r"""Computes intervals of the log Bayes factors that hold in finite samples.

        .. math:: \bigl[L_i - U_j - 2 m,\; U_i - L_j + 2 m\bigr], \qquad m = \log(4 / \alpha)

        Each of the four bounds misses by m with probability at most ``alpha / 4`` (Markov); for a
        model whose rounds were looked at n times m is larger by n log 2 (``looks``). Ends are
        infinite for models without an upper bound.

        Args:
            level: Probability of coverage, in (0, 1), for each pair of models.

        Returns:
            Both ends in nats, each ``[M, M]``, zero on the diagonal.

        Raises:
            ValueError: If ``level`` is not in (0, 1).
        """
        _check_level(level)
        looks = self.lower.new_tensor(self.looks or (0,) * len(self.names))
        margins = math.log(4.0 / (1.0 - level)) + math.log(2.0) * looks
        low = (self.lower - margins).unsqueeze(1) - (self.upper + margins).unsqueeze(0)
        low = low.masked_fill(torch.eye(len(self.names), dtype=torch.bool, device=low.device), 0.0)
        return low, -low.T

    def _columns(self) -> tuple[Columns, Columns]:
        low, high = self.normal_interval(0.95)
        return {"model": self.names}, {
            "lower": self.lower,
            "upper": self.upper,
            "std_error": self.std_error,
            "log_bayes_factor": self.log_bayes_factors[:, 0],
            "log_bayes_factor_low": low[:, 0],
            "log_bayes_factor_high": high[:, 0],
            "probability": self.probabilities,
            "seed": [self._recorded(name, "seed") for name in self.names],
            "seconds": [self._recorded(name, "seconds") for name in self.names],
        }

    def _recorded(self, name: str, what: str) -> float | int | None:
        """Looks up a number in how a model's evidence was computed."""
        record = self.provenances.get(name)
        if record is None:
            return None
        return record.seed if what == "seed" else record.seconds.get("total")

    def plot(self) -> Figure:
        """Draws a forest of the log Bayes factors against the best model.

        See :func:`pyro_anneal.results.plotting.plot_comparison`.
        """
        from .plotting import plot_comparison

        return plot_comparison(self)

    def _table(self) -> Table:
        low, high = self.normal_interval(0.95)
        header = ["model", "log evidence (lower)", "log Bayes factor"]
        header += ["95% (asymptotic)", "probability"]
        guaranteed_low, guaranteed_high = self.interval(0.95)
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
        footer = []
        if self.log_prior is not None:
            prior = self.log_prior.exp().tolist()
            shares = ", ".join(f"{n} {p:.3g}" for n, p in zip(self.names, prior, strict=True))
            footer.append(("prior probabilities", shares))
        footer.append(("verdict", self.verdict))
        if self.provenance is not None and self.provenance.seconds:
            footer.append(("wall time", self.provenance.describe_seconds()))
        return Table(title, rows, self.notes, header, footer)


def compare(
    evidence: Mapping[str, Evidence] | Sequence[tuple[str, Evidence]],
    *,
    prior_odds: Mapping[str, float] | Sequence[float] | None = None,
    allow_different_data: bool = False,
) -> Comparison:
    r"""Compares models by their evidence for the same data.

    .. math:: \log B_{ij} = \log p(x \mid i) - \log p(x \mid j), \qquad
        P(i \mid x) \propto o_i \, p(x \mid i)

    with the prior odds :math:`o_i`. Evidence is the forward lower bound, summed over the batch.
    Forward runs alone say with a finite-sample guarantee only that an evidence is not below a
    limit, so intervals of Bayes factors are asymptotic; given a certified reverse run on the same
    data as well, :meth:`Comparison.interval` needs no asymptotics.

    Args:
        evidence: By model name a forward run, the evidence of batches or from posterior draws, or
            a pair of a forward and a reverse run, all on the same data. A dictionary, or a list of
            pairs of a name and evidence. A sandwich speaks of data simulated from its own model
            and cannot enter.
        prior_odds: Prior weights of the models, by name or in the order of ``evidence``, up to a
            factor: ``{"simple": 3, "complex": 1}``. Equal ones if None.
        allow_different_data: Whether to compare runs whose observed values differ. Evidence of
            different data says nothing about which model is better; the exception is data that
            are the same but for a change of variables whose Jacobian you have accounted for.

    Returns:
        The comparison, best model first.

    Raises:
        TypeError: If an entry is none of these.
        ValueError: If there is no entry, a name comes twice, the directions are not as above, runs
            saw different data, or prior odds are not positive numbers, one for each model.

    Example:
        >>> def model(x, scale):
        ...     z = pyro.sample("z", dist.Normal(0.0, scale))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> from pyro_anneal import AnnealedImportance
        >>> ais = AnnealedImportance(model, num_steps=100, progress_bar=False, seed=0)
        >>> runs = [(f"scale {s}", ais.run(torch.tensor(2.0), s)) for s in (1.0, 10.0)]
        >>> compare(runs, prior_odds=[1, 3]).names
        ('scale 1.0', 'scale 10.0')
    """
    entries = named_entries(evidence)
    weights = prior_weights(prior_odds, list(entries))
    digest, different = shared_digest(entries, allow_different_data)
    read = [read_entry(name, entry) for name, entry in entries.items()]
    values = torch.stack([each.lower for each in read])
    order = torch.argsort(values, descending=True)
    found = [each for entry in read for each in entry.found]
    notes = [note for entry in read for note in entry.notes]
    notes += [different] if different else []
    notes += [d.message for d in found if d.severity == "warning"]
    read = [read[i] for i in order.tolist()]
    records = {name: record for each in read for name, record in each.records.items()}
    other_software = differing_versions(records)
    return Comparison(
        names=tuple(each.name for each in read),
        lower=values[order],
        upper=torch.stack([each.upper for each in read]),
        std_error=torch.stack([each.std_error for each in read]),
        log_prior=None if weights is None else weights[order],
        notes=tuple(notes + ([other_software] if other_software else [])),
        diagnostics=tuple(found),
        data_digest=digest,
        looks=tuple(each.looks for each in read),
        provenance=joint_record("compare", list(records.values())) if records else None,
        provenances=records,
    )


def _check_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level}")


def _format_ends(low: Tensor, high: Tensor) -> str:
    return f"[{low.item():.3f}, {high.item():.3f}]"
