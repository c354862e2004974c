"""How a run is shown: its table, and its columns as a data frame."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import Columns
from .tables import Table, format_value

if TYPE_CHECKING:
    from .run import AnnealedRun

__all__ = ["run_columns", "run_table"]

Field = tuple[str, str]  # what, and its value as text


def run_columns(run: AnnealedRun) -> tuple[Columns, Columns]:
    """Collects the index of the batch, and the figures of each of its elements."""
    axes = [torch.arange(size) for size in run.batch_shape]
    index = (
        dict(zip(run.plates, torch.meshgrid(*axes, indexing="ij"), strict=True)) if axes else {}
    )
    ti = run.thermodynamic_integration
    return index, {
        run.kind.replace(" bound", ""): run.log_evidence,
        "std_error": run.std_error,
        "single": run.single,
        "ess": run.ess,
        "largest_weight": run.largest_weight,
        "thermodynamic_integration": ti.value,
        "thermodynamic_integration_std_error": ti.std_error,
    }


def run_table(run: AnnealedRun) -> Table:
    """Lists what a run found, how its chains went, and what it cost."""
    fields = [*_bounds(run), *_chains(run), ("verdict", run.verdict)]
    pilot = run.pilot
    if pilot is not None and not math.isnan(pilot.expected_gap):
        fields.append(("expected gap per datum (pilot)", f"{pilot.expected_gap:.2g}"))
    fields.append(("cost", _cost(run)))
    if run.provenance is not None:
        fields.append(("wall time", run.provenance.describe_seconds()))
    if run.direction == "reverse" or not run.certified:
        fields.append(("certified", str(run.certified)))
    batch = _batch(run)
    title = (
        f"AnnealedRun, {run.direction}: {run.num_chains} chains, {run.num_steps} steps, "
        f"{run.kernel}{', batch ' + batch if batch else ''}"
    )
    notes = [*run.notes, *(d.message for d in run.diagnostics)]
    if not run.certified and "uncertified" not in {d.name for d in run.diagnostics}:
        notes.append("certified=False: the starts are approximate, so this is no bound")
    return Table(title, fields, notes)


def _batch(run: AnnealedRun) -> str:
    return ", ".join(f"{plate}={size}" for plate, size in run.plates.items())


def _bounds(run: AnnealedRun) -> list[Field]:
    """Lists bounds and estimates of the evidence, summed over the batch."""
    name, batch = run.kind, _batch(run)
    total_error = run.std_error.square().sum().sqrt().item()
    summed = format_value(run.log_evidence.sum().item(), total_error)
    fields = [(f"{name} (nats{', sum' if batch else ''})", summed)]
    if batch:
        fields.append((f"{name} per datum", _range(run.log_evidence)))
    if run.certified:
        low, high = run.interval(0.95, total=True)
        end = ("at least", low) if run.direction == "forward" else ("at most", high)
        fields.append((f"{end[0]} (95%, guaranteed)", format_value(end[1].item())))
    ti = run.thermodynamic_integration
    return [
        *fields,
        ("single-sample bound", format_value(run.single.sum().item())),
        (
            "thermodynamic integration (no bound)",
            format_value(ti.value.sum().item(), ti.std_error.square().sum().sqrt().item()),
        ),
    ]


def _chains(run: AnnealedRun) -> list[Field]:
    """Lists how the chains went."""
    fields = [("effective sample size", _range(run.ess, f" of {run.num_chains}"))]
    if run.num_resamplings is not None and run.num_lineages is not None:
        counts = _range(run.num_resamplings.double())
        lineages = _range(run.num_lineages.double(), f" of {run.num_chains}")
        fields.append(("populations", f"{run.num_populations} of {run.population_size}"))
        fields.append(("resamplings", counts))
        fields.append(("lineages", lineages))
    if run.rounds:
        steps = ", ".join(str(done.num_steps) for done in run.rounds)
        fields.append((f"rounds (target {run.target_gap:g})", f"T = {steps}"))
    if run.num_steps > 1:
        fields.append(("acceptance", _range(run.accept_prob)))
        fields.append(("divergences", f"{int(run.num_diverging.sum())}"))
    return fields


def _cost(run: AnnealedRun) -> str:
    """Counts the gradients of chains, pilot and fit."""
    cost = f"{run.num_gradients} gradients per chain"
    extra = []
    if len(run.rounds) > 1:
        spent = sum(done.num_gradients for done in run.rounds[:-1])
        extra.append(f"earlier rounds: {spent}")
    if run.pilot is not None:
        extra.append(f"pilot: {run.pilot.num_gradients} on {run.pilot.num_chains} chains")
    if run.fit_gradients:
        extra.append(f"automatic guide: {run.fit_gradients} in all")
    if extra:
        cost += f" ({'; '.join(extra)})"
    if run.provenance is None:
        cost += f", {run.seconds:.2f} s"
    return f"{cost}, {run.density_mode}"


def _range(values: Tensor, suffix: str = "") -> str:
    if values.numel() == 1:
        return f"{values.item():.4g}{suffix}"
    return (
        f"{values.mean().item():.4g}{suffix} "
        f"({values.min().item():.4g} to {values.max().item():.4g})"
    )
