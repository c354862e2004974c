"""How the results of a call were computed: what was asked for, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Mapping

from ..results.batches import EvidenceOfBatches
from ..results.provenance import Provenance
from ..results.run import AnnealedRun
from .settings import Settings

__all__ = ["record_batches", "record_call"]


def record_call(
    settings: Settings,
    task: str,
    began: float,
    seconds: Mapping[str, float],
    *runs: AnnealedRun,
) -> Provenance:
    """Records how runs were computed that share a problem and a pilot.

    Args:
        settings: What was asked for.
        task: The method that was called.
        began: When it was called, on the clock of :func:`time.perf_counter`.
        seconds: Wall time by part.
        *runs: The runs of both directions, or the only one.

    Returns:
        The record; gradients are per chain, and those of both directions are added.
    """
    first = runs[0]
    gradients = {"fit": first.fit_gradients}
    if first.pilot is not None:
        gradients["pilot"] = first.pilot.num_gradients
    gradients["chains"] = sum(run.num_gradients for run in runs)
    if first.rounds:
        gradients["earlier rounds"] = sum(
            run.num_gradients for each in runs for run in each.rounds[:-1]
        )
    return Provenance(
        task=task,
        seed=first.seed,
        kernel=first.kernel,
        device=str(first.log_weights.device),
        settings=settings.record(),
        seconds={**seconds, "total": time.perf_counter() - began},
        gradients=gradients,
    )


def record_batches(
    settings: Settings, began: float, seconds: Mapping[str, float], result: EvidenceOfBatches
) -> Provenance:
    """Records how the evidence of batches was computed; see :func:`record_call`."""
    return Provenance(
        task="run_batches",
        seed=result.seed,
        kernel=repr(settings.plan.kernel),
        device=str(result.lower.device),
        settings=settings.record(),
        seconds={**seconds, "total": time.perf_counter() - began},
        gradients={"chains": result.num_gradients},
    )
