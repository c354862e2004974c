"""Bayes factors between models, from their evidence bounds on the same data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import as_real
from ..models.types import Figure
from .base import Columns, Result
from .batches import EvidenceOfBatches
from .drawn import EvidenceFromSamples
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
    entries = _named(evidence)
    weights = _prior_weights(prior_odds, list(entries))
    digest, different = _shared_digest(entries, allow_different_data)
    read = [_read(name, entry) for name, entry in entries.items()]
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


class _Entry(NamedTuple):
    """What a comparison takes from the evidence of one model; sums over its batch."""

    name: str
    lower: Tensor
    upper: Tensor
    std_error: Tensor
    looks: int
    notes: list[str]
    found: list[Diagnostic]
    records: dict[str, Provenance]


def _read(name: str, entry: object) -> _Entry:
    """Reads an entry, and says what qualifies it, under the name of its model."""
    forward, reverse = _forward_and_reverse(name, entry)
    runs = [run for run in (forward, reverse) if isinstance(run, AnnealedRun)]
    notes = [f"{name}: {note}" for note in forward.notes]
    upper = torch.full_like(forward.lower.sum().double().cpu(), torch.inf)
    found = [*(entry if isinstance(entry, EvidenceFromSamples) else forward).diagnostics]
    if isinstance(forward, AnnealedRun) and not forward.certified:
        notes.append(f"{name}: its forward run is not certified: an estimate, not a bound")
    if reverse is not None and reverse.certified:
        upper = reverse.upper.sum().double().cpu()
        found += [d for d in reverse.diagnostics if d.name not in {e.name for e in found}]
    elif reverse is not None:
        notes.append(
            f"{name}: its reverse run is not certified (its posterior samples are not known to "
            "be exact), so it gives no upper bound here"
        )
    if forward.scale != 1.0:
        notes.append(f"{name}: scaled by {forward.scale:g}, guarantees do not apply")
        upper = torch.full_like(upper, torch.inf)
    if isinstance(entry, EvidenceFromSamples):
        records = {name: entry.provenance}
    else:
        records = {name: forward.provenance}
        if reverse is not None:
            records[f"{name} (reverse)"] = reverse.provenance
    return _Entry(
        name=name,
        lower=forward.lower.sum().double().cpu(),
        upper=upper,
        std_error=forward.std_error.square().sum().sqrt().double().cpu(),
        looks=max((run.num_looks for run in runs), default=0),
        notes=notes,
        found=[replace(d, message=f"{name}: {d.message}") for d in found],
        records={which: record for which, record in records.items() if record is not None},
    )


def _named(evidence: object) -> dict[str, object]:
    """Reads a dictionary, or a list of pairs of a name and evidence."""
    if isinstance(evidence, Mapping):
        pairs = list(evidence.items())
    elif isinstance(evidence, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str)
        for pair in evidence
    ):
        pairs = [(pair[0], pair[1]) for pair in evidence]
    else:
        raise TypeError(
            'compare takes a dictionary {"a": a, "b": b} or a list of pairs [("a", a), ("b", b)] '
            f"of names and runs, got {type(evidence).__name__}"
        )
    if not pairs:
        raise ValueError("compare needs at least one model")
    names = [name for name, _ in pairs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"compare needs a name of its own for each model, repeated: {repeated}")
    return dict(pairs)


def _prior_weights(
    prior_odds: Mapping[str, float] | Sequence[float] | None, names: list[str]
) -> Tensor | None:
    """Normalizes prior odds to log prior probabilities, in the order of the names."""
    if prior_odds is None:
        return None
    if isinstance(prior_odds, Mapping):
        if set(prior_odds) != set(names):
            raise ValueError(
                f"prior_odds must name every model once: expected {names}, got {list(prior_odds)}"
            )
        odds = [prior_odds[name] for name in names]
    else:
        odds = list(prior_odds)
        if len(odds) != len(names):
            raise ValueError(
                f"prior_odds must have one number per model: expected {len(names)}, got {len(odds)}"
            )
    numbers = [as_real("prior_odds", value) for value in odds]
    if not all(0.0 < number < math.inf for number in numbers):
        raise ValueError(f"prior_odds must be positive numbers, got {odds}")
    return torch.tensor(numbers, dtype=torch.float64).log().log_softmax(dim=0)


def _shared_digest(entries: Mapping[str, object], allow: bool) -> tuple[str, str]:
    """Finds the digest that all entries share, or a note on how they differ."""
    digests = {}
    for name, entry in entries.items():
        for run in _parts(entry):
            which = f"{name} ({run.direction})" if isinstance(entry, tuple) else name
            digests[which] = run.data_digest
    seen = {digest for digest in digests.values() if digest}
    if len(seen) <= 1:
        return (seen.pop() if seen and all(digests.values()) else ""), ""
    sizes = {name: int(digest.split(":")[0]) for name, digest in digests.items() if digest}
    counts = f" (numbers of values: {sizes})" if len(set(sizes.values())) > 1 else ""
    first = next(name for name, digest in digests.items() if digest)
    others = [n for n, digest in digests.items() if digest and digest != digests[first]]
    text = f"{others} observed other values than {first!r}{counts}"
    if not allow:
        raise ValueError(
            f"compare: {text}. Evidence of different data cannot be compared; run all models on "
            "the same observed values, or pass allow_different_data=True if you know that the "
            "difference has no meaning"
        )
    return "", f"{text}: Bayes factors compare models of the same data only"


def _parts(entry: object) -> tuple[Any, ...]:
    """Returns the results of an entry that have a digest of their data."""
    if isinstance(entry, EvidenceFromSamples):
        return (entry.forward,)
    return entry if isinstance(entry, tuple) else (entry,)


def _forward_and_reverse(
    name: str, entry: object
) -> tuple[AnnealedRun | EvidenceOfBatches, AnnealedRun | None]:
    if isinstance(entry, EvidenceOfBatches):
        return entry, None
    if isinstance(entry, EvidenceFromSamples):
        return entry.forward, entry.reverse
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
