"""What is compared: evidence of several models, read and checked to speak of the same data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import as_real
from .batches import EvidenceOfBatches
from .drawn import EvidenceFromSamples
from .findings import Diagnostic
from .provenance import Provenance
from .run import AnnealedRun

__all__ = ["Entry", "named_entries", "prior_weights", "read_entry", "shared_digest"]


class Entry(NamedTuple):
    """What a comparison takes from the evidence of one model; sums over its batch."""

    name: str
    lower: Tensor
    upper: Tensor
    std_error: Tensor
    looks: int
    notes: list[str]
    found: list[Diagnostic]
    records: dict[str, Provenance]


def read_entry(name: str, entry: object) -> Entry:
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
    return Entry(
        name=name,
        lower=forward.lower.sum().double().cpu(),
        upper=upper,
        std_error=forward.std_error.square().sum().sqrt().double().cpu(),
        looks=max((run.num_looks for run in runs), default=0),
        notes=notes,
        found=[replace(d, message=f"{name}: {d.message}") for d in found],
        records={which: record for which, record in records.items() if record is not None},
    )


def named_entries(evidence: object) -> dict[str, object]:
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


def prior_weights(
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


def shared_digest(entries: Mapping[str, object], allow: bool) -> tuple[str, str]:
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
