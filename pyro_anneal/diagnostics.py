"""Signs that a run or a sandwich should not be trusted, as pure functions of results.

A numerical outcome is data: each function returns a :class:`Diagnostic` or ``None``. No list of
signs is complete: a base that misses a mode gives flawless weights, which is what
:func:`diagnose_starts` looks for with a second base.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .budget import weight_variance
from .weights import log_normalized_weights

if TYPE_CHECKING:
    from .results import AnnealedRun, Sandwich

__all__ = [
    "AnnealingWarning",
    "Diagnostic",
    "check_acceptance",
    "check_agreement",
    "check_certified",
    "check_divergences",
    "check_gap",
    "check_lag",
    "check_pilot",
    "check_weights",
    "check_zero_weights",
    "diagnose",
    "diagnose_sandwich",
    "diagnose_starts",
    "warn",
]


class AnnealingWarning(UserWarning):
    """A run finished, but its numbers look unreliable."""


@dataclass(frozen=True, kw_only=True)
class Diagnostic:
    """One finding about a result."""

    name: str  # kind of finding: warnings are given once per name
    severity: Literal["info", "warning"]
    message: str  # what was seen and what to try
    value: float  # the figure behind it


def check_weights(run: AnnealedRun, *, min_fraction: float = 0.1) -> Diagnostic | None:
    """Looks for bounds that rest on a few chains.

    Args:
        run: A run of either direction.
        min_fraction: Least effective sample size over K. From 8 chains on, one chain with more
            than half of the weight counts as well.

    Returns:
        A finding whose value is the share of batch elements concerned, or ``None``.
    """
    num_chains = run.num_chains
    sign = 1.0 if run.direction == "forward" else -1.0
    largest = log_normalized_weights(sign * run.log_weights).amax(dim=0).exp()
    collapsed = run.ess < min_fraction * num_chains
    if num_chains >= 8:  # below, a chain holds half of the weight by chance
        collapsed = collapsed | (largest > 0.5)
    share = _share(collapsed)
    if share == 0.0:
        return None
    of_batch = f" for {share:.0%} of the batch" if collapsed.numel() > 1 else ""
    return Diagnostic(
        name="ess",
        severity="warning",
        message=(
            f"a few chains carry the weight{of_batch}: effective sample size down to "
            f"{run.ess.min().item():.1f} of {num_chains}; raise num_steps, or start closer to the "
            "posterior (another guide)"
        ),
        value=share,
    )


def check_zero_weights(run: AnnealedRun, *, max_share: float = 0.1) -> Diagnostic | None:
    """Looks for chains of zero weight and for undefined weights.

    Args:
        run: A run of either direction.
        max_share: Share of zero weights above which the finding is a warning.

    Returns:
        A finding whose value is the share of such chains, or ``None``.
    """
    undefined = run.log_weights.isnan() | (run.log_weights == torch.inf)
    if bool(undefined.any()):
        return Diagnostic(
            name="undefined_weights",
            severity="warning",
            message=f"{_share(undefined):.2%} of the log-weights are NaN or +inf: the log density "
            "is undefined or unbounded somewhere on the path",
            value=_share(undefined),
        )
    dead = run.log_weights == -torch.inf
    share = _share(dead)
    if share == 0.0:
        return None
    hopeless = bool(dead.all(dim=0).any())
    return Diagnostic(
        name="zero_weights",
        severity="warning" if hopeless or share > max_share else "info",
        message=f"{share:.1%} of the chains have zero weight"
        + (", all of them for some data" if hopeless else "")
        + ": they started where the target has no mass; check the guide's support",
        value=share,
    )


def check_acceptance(
    run: AnnealedRun, *, low: float = 0.15, max_share: float = 0.1
) -> Diagnostic | None:
    """Looks for betas at which the chains hardly move.

    Args:
        run: A run of either direction.
        low: Least acceptance probability.
        max_share: Share of the betas that may lie below it.

    Returns:
        A finding whose value is the share of such betas, or ``None``.
    """
    if run.accept_prob.numel() == 0:
        return None
    stuck = ~(run.accept_prob >= low)  # NaN counts as stuck
    if _share(stuck) <= max_share:
        return None
    where = run.betas[1:-1][stuck]
    return Diagnostic(
        name="acceptance",
        severity="warning",
        message=f"acceptance is below {low:g} at {_share(stuck):.0%} of the betas, between "
        f"{where.min().item():.2g} and {where.max().item():.2g}; give the pilot more gradients, or "
        "use more leapfrogs or another kernel",
        value=_share(stuck),
    )


def check_divergences(run: AnnealedRun, *, max_share: float = 0.01) -> Diagnostic | None:
    """Looks for transitions that diverged.

    Args:
        run: A run of either direction.
        max_share: Share of the transitions that may diverge.

    Returns:
        A finding whose value is the share of divergences, or ``None``.
    """
    moves = run.log_weights.numel() * run.num_diverging.numel()
    share = float(run.num_diverging.sum()) / moves if moves else 0.0
    if share <= max_share:
        return None
    return Diagnostic(
        name="divergences",
        severity="warning",
        message=f"{share:.1%} of the transitions diverged; reparameterize the model, or raise "
        "target_accept",
        value=share,
    )


def check_pilot(
    run: AnnealedRun, *, tolerance: float = 0.25, max_share: float = 0.2
) -> Diagnostic | None:
    """Compares the acceptance of a run with that of the pilot which tuned it.

    Args:
        run: A run of either direction.
        tolerance: Largest difference of acceptance that counts as agreement.
        max_share: Share of the betas that may disagree.

    Returns:
        A finding whose value is the share of betas that disagree, or ``None``.
    """
    if run.pilot is None or run.accept_prob.numel() == 0:
        return None
    expected = _interpolate(run.betas[1:-1], run.pilot.betas, run.pilot.accept_prob)
    share = _share(~((_smoothed(run.accept_prob).to(expected) - expected).abs() <= tolerance))
    if share <= max_share:
        return None
    return Diagnostic(
        name="pilot",
        severity="warning",
        message=f"acceptance differs from the pilot's by over {tolerance:g} at {share:.0%} of the "
        "betas: the pilot saw other regions than the run; give it more chains or gradients",
        value=share,
    )


def _smoothed(accept_prob: Tensor, *, share: float = 0.05) -> Tensor:
    """Averages over neighbouring betas: one step of a few chains is a noisy measurement."""
    reach = int(0.5 * share * len(accept_prob))
    pooled: Tensor = torch.nn.functional.avg_pool1d(
        accept_prob.view(1, 1, -1), 2 * reach + 1, 1, reach, count_include_pad=False
    )
    return pooled.flatten()


def check_lag(
    run: AnnealedRun, *, min_variance: float = 0.5, factor: float = 4.0
) -> Diagnostic | None:
    r"""Compares the variance of weights with what chains that keep up with the path would have.

    Args:
        run: A forward run.
        min_variance: Relative variance of the weights, :math:`K / \mathrm{ESS} - 1`, below which
            the bound is good whatever the pilot expected.
        factor: Ratio to the expected variance above which chains lag behind.

    Returns:
        A finding whose value is that ratio, or ``None``.
    """
    if run.pilot is None or run.direction == "reverse" or math.isnan(run.pilot.correlation):
        return None
    pilot, steps = run.pilot, run.num_steps
    expected = math.expm1(min(weight_variance(pilot.length, pilot.correlation, steps), 30.0))
    relative = float((run.num_chains / run.ess - 1.0).mean())
    if relative <= min_variance or relative <= factor * expected:
        return None
    return Diagnostic(
        name="lag",
        severity="warning",
        message=f"the weights vary {relative / expected:.2g} times as much as those of chains that "
        "keep up with the path would: some chains lag behind and the bound may be far below the "
        "truth; start closer to the posterior, reparameterize, or raise num_steps",
        value=relative / expected,
    )


def check_certified(run: AnnealedRun) -> Diagnostic | None:
    """Notes a run whose posterior samples are approximate, so that its bound is none."""
    if run.certified:
        return None
    return Diagnostic(
        name="uncertified",
        severity="info",
        message="certified=False: a reverse run from approximate posterior samples is an estimate, "
        "not a bound",
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
        check_acceptance,
        check_divergences,
        check_pilot,
        check_lag,
        check_certified,
    )
    return tuple(found for check in checks if (found := check(run)) is not None)


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


def warn(diagnostics: Iterable[Diagnostic]) -> None:
    """Issues one :class:`AnnealingWarning` per kind of finding of severity "warning".

    The warning points at the innermost line outside this package.

    Args:
        diagnostics: Findings; the first of each kind speaks for it.

    Example:
        >>> warn([Diagnostic(name="gap", severity="info", message="wide", value=2.0)])
    """
    seen: set[str] = set()
    for diagnostic in diagnostics:
        if diagnostic.severity == "warning" and diagnostic.name not in seen:
            seen.add(diagnostic.name)
            warnings.warn(diagnostic.message, AnnealingWarning, stacklevel=_outside_level())


def _outside_level() -> int:
    """Counts the stack level, as ``warn`` must give it, of the first frame outside the package."""
    package = os.path.dirname(os.path.abspath(__file__)) + os.sep
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        level, frame = level + 1, frame.f_back
    return level


def _share(condition: Tensor) -> float:
    return condition.double().mean().item()


def _interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Interpolates ``values`` at increasing ``knots`` linearly, constant beyond the ends."""
    knots, values, x = (t.detach().double().cpu() for t in (knots, values, x))
    if knots.numel() == 1:
        return values.expand(x.shape)
    right = torch.searchsorted(knots, x).clamp(1, knots.numel() - 1)
    span = knots[right] - knots[right - 1]
    fraction = ((x - knots[right - 1]) / span).clamp(0.0, 1.0)
    return torch.lerp(values[right - 1], values[right], fraction)
