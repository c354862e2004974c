"""Signs that a run or a sandwich should not be trusted, as pure functions of results.

A numerical outcome is data: each function returns a :class:`Diagnostic` or ``None``. No list of
signs is complete: a base that misses a mode gives flawless weights, which is what
:func:`diagnose_starts` looks for with a second base.
"""

from __future__ import annotations

import math

from ..results.findings import AnnealingWarning, Diagnostic, warn
from ..results.run import AnnealedRun
from ..results.sandwich import Sandwich
from .transitions import check_acceptance, check_divergences, check_pilot
from .weights import (
    check_dominance,
    check_lag,
    check_lineages,
    check_weights,
    check_zero_weights,
)

__all__ = [
    "AnnealingWarning",
    "Diagnostic",
    "check_agreement",
    "check_certified",
    "check_gap",
    "check_target",
    "diagnose",
    "diagnose_sandwich",
    "diagnose_starts",
    "warn",
]


# Kinds of findings that came with the run, since no figure of it shows them.
_OF_THE_PROBLEM = ("unread", "saturated")


def check_target(run: AnnealedRun, *, far: float = 2.5) -> Diagnostic | None:
    """Says what rounds have reached where it is not the target.

    Args:
        run: The last of several rounds.
        far: Multiple of the target from which the remark is a warning.

    Returns:
        A remark or warning whose value is the measured error in nats, or ``None``.
    """
    target, error = run.target_gap, run.measured_gap
    if target is None or error is None or error <= target:
        return None
    return Diagnostic(
        name="target",
        severity="warning" if error > far * target else "info",
        message=f"after {len(run.rounds)} rounds, the last of {run.num_steps} steps, the error is "
        f"{error:.2g} nats and not yet {target:g}: raise max_rounds (log_evidence: pass target_gap) or num_chains, or start closer "
        "to the posterior (another guide)",
        value=error,
    )


def check_certified(run: AnnealedRun) -> Diagnostic | None:
    """Looks for a reverse run from approximate posterior samples, which gives no bound."""
    if run.certified:
        return None
    return Diagnostic(
        name="uncertified",
        severity="warning",
        message="certified=False: a reverse run from approximate posterior samples is an estimate, "
        "not a bound; pass exact=True if they are exact, or use sandwich() on simulated data",
        value=0.0,
    )


def check_gap(sandwich: Sandwich, *, tolerance: float = 1.0) -> Diagnostic | None:
    """Looks for a sandwich too wide to tell much.

    Args:
        sandwich: Bounds on simulated data.
        tolerance: Largest mean gap per pair, in nats.

    Returns:
        A finding whose value is the mean gap in nats, or ``None``.
    """
    gap = sandwich.gap.mean().item()
    if gap <= tolerance:
        return None
    return Diagnostic(
        name="gap",
        severity="warning",
        message=f"the bounds are {gap:.3g} nats apart on average; raise num_steps (the gap "
        "shrinks as 1 / num_steps) or start from a better guide",
        value=gap,
    )


def check_agreement(sandwich: Sandwich, *, error_rate: float = 1e-6) -> Diagnostic | None:
    r"""Looks for bounds that cross by more than chance allows: proof of a mistake somewhere.

    ``P(L - U > 2 b) <= 2 e^-b`` for each pair at any K and T, hence the threshold
    :math:`2 \log(2 N / \epsilon)` nats for N pairs. For the mean over 30 pairs or more, five
    standard errors below zero count as well.

    Args:
        sandwich: Bounds on simulated data.
        error_rate: Probability to accuse a correct sandwich.

    Returns:
        A finding whose value is the largest crossing ``L - U`` in nats, or ``None``.
    """
    crossing = -sandwich.gap
    threshold = 2.0 * math.log(2.0 * sandwich.num_pairs / error_rate)
    mean = crossing.mean().item()
    by_mean = sandwich.num_pairs >= 30 and mean > 5.0 * sandwich.std_error["gap"].item() + 1e-9
    largest = crossing.max().item()
    if largest <= threshold and not by_mean:
        return None
    return Diagnostic(
        name="agreement",
        severity="warning",
        message=f"the lower bound exceeds the upper by up to {largest:.3g} nats ({mean:.3g} on "
        "average), more than chance allows: a kernel that does not keep its target, transitions "
        "that are not reversible, or simulated data that are not the model's",
        value=largest,
    )


def diagnose(run: AnnealedRun) -> tuple[Diagnostic, ...]:
    """Collects all findings about a run."""
    checks = (
        check_zero_weights,
        check_weights,
        check_dominance,
        check_lineages,
        check_acceptance,
        check_divergences,
        check_pilot,
        check_lag,
        check_target,
        check_certified,
    )
    known = [found for found in run.diagnostics if found.name in _OF_THE_PROBLEM]
    return (*known, *(found for check in checks if (found := check(run)) is not None))


def diagnose_sandwich(sandwich: Sandwich, *, tolerance: float = 1.0) -> tuple[Diagnostic, ...]:
    """Collects the findings about a sandwich, of both runs and of their agreement.

    Args:
        sandwich: Bounds on simulated data.
        tolerance: Largest mean gap per pair, in nats.

    Returns:
        Findings; of a kind that both runs show, the forward run's.
    """
    found = {d.name: d for d in diagnose(sandwich.reverse)}
    found.update((d.name, d) for d in diagnose(sandwich.forward))
    for check in (check_gap(sandwich, tolerance=tolerance), check_agreement(sandwich)):
        if check is not None:
            found[check.name] = check
    return tuple(found.values())


def diagnose_starts(
    run: AnnealedRun,
    other: AnnealedRun,
    *,
    names: tuple[str, str] = ("the guide", "the prior"),
    tolerance: float = 0.1,
) -> Diagnostic | None:
    """Compares the evidence of a run with that of a run from another base.

    Both are lower bounds on the same number, and a lower bound that exceeds it is exponentially
    unlikely, so the larger is right: if the other start finds more, this run missed mass.

    Args:
        run: The forward run in question.
        other: A forward run on the same data from another base.
        names: What both started from.
        tolerance: Differences below this many nats in total, or below five standard errors, pass.

    Returns:
        A warning if ``other`` found more, a remark if ``run`` did; ``None`` if they agree. The
        value is ``run`` minus ``other`` in nats.
    """
    difference = (run.lower - other.lower).sum().item()
    variance = run.std_error.square().sum() + other.std_error.square().sum()
    std_error = variance.sqrt().nan_to_num(0.0).item()
    if abs(difference) <= max(tolerance, 5.0 * std_error):
        return None
    behind, ahead = names if difference < 0.0 else names[::-1]
    return Diagnostic(
        name="starts",
        severity="warning" if difference < 0.0 else "info",
        message=f"starting from {ahead} finds {abs(difference):.3g} nats more evidence than from "
        f"{behind} (standard error {std_error:.2g}): chains from {behind} missed posterior mass; "
        f"trust the larger",
        value=difference,
    )
