"""Signs that a run or a sandwich should not be trusted, as pure functions of results.

A numerical outcome is data: each function returns a :class:`Diagnostic` or ``None``. No list of
signs is complete: a base that misses a mode gives flawless weights, which is what
:func:`diagnose_starts` looks for with a second base.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..results.findings import AnnealingWarning, Diagnostic, warn
from ..results.run import AnnealedRun
from ..results.sandwich import Sandwich
from ..results.tables import format_share

__all__ = [
    "AnnealingWarning",
    "Diagnostic",
    "check_acceptance",
    "check_agreement",
    "check_certified",
    "check_divergences",
    "check_dominance",
    "check_gap",
    "check_lag",
    "check_lineages",
    "check_pilot",
    "check_target",
    "check_weights",
    "check_zero_weights",
    "diagnose",
    "diagnose_sandwich",
    "diagnose_starts",
    "warn",
]


# Transitions over which an acceptance is averaged before it is compared with another.
_ENOUGH_TRANSITIONS = 100
# Kinds of findings that came with the run, since no figure of it shows them.
_OF_THE_PROBLEM = ("unread", "saturated")


def check_weights(
    run: AnnealedRun, *, min_fraction: float = 0.1, few: float = 1 / 3, max_share: float = 0.1
) -> Diagnostic | None:
    r"""Looks for effective sample sizes of few chains, and for their collapse.

    Below a third of K the bound rests on few chains and may be nats too low; beyond 64 chains, a
    third of 64 is enough. In a batch, some elements may fall below by chance, but none below a
    tenth. Fewer than 8 chains say little by their effective sample size, so for them the variance
    of the log-weights counts as well: of log-normal weights
    :math:`\mathrm{ESS} = K e^{-\mathrm{Var}}`.

    Args:
        run: A run of either direction.
        min_fraction: Least effective sample size over K of any batch element.
        few: Least effective sample size over K, or over 64 where K is larger, of most.
        max_share: Share of the batch elements that may have fewer.

    Returns:
        A finding whose value is the share of batch elements concerned, or ``None``.
    """
    collapsed = run.ess < min_fraction * run.num_chains
    if 1 < run.num_chains < 8:
        collapsed |= run.log_weights.var(dim=0) > -math.log(min_fraction)
    rests_on_few = run.ess < few * min(run.num_chains, 64)
    if _share(rests_on_few) > max_share:
        collapsed |= rests_on_few
    share = _share(collapsed)
    if share == 0.0:
        return None
    return Diagnostic(
        name="ess",
        severity="warning",
        message=(
            f"the weights differ too much{_of_batch(collapsed)}: effective sample size down to "
            f"{run.ess.min().item():.1f} of {run.num_chains}, so that few chains decide and the "
            "bound may be nats off; raise num_steps or num_chains, or start closer to the "
            "posterior (another guide)"
        ),
        value=share,
    )


def check_dominance(run: AnnealedRun, *, max_weight: float = 0.5) -> Diagnostic | None:
    """Looks for bounds that rest on one chain.

    Args:
        run: A run of either direction. Fewer than 8 chains pass: one of them holds half of the
            weight by chance.
        max_weight: Largest share of the weight that one chain may hold.

    Returns:
        A finding whose value is the largest share of a chain, or ``None``.
    """
    dominated = run.largest_weight > max_weight
    if run.num_chains < 8 or not bool(dominated.any()):
        return None
    largest = run.largest_weight.max().item()
    return Diagnostic(
        name="dominance",
        severity="warning",
        message=(
            f"one of {run.num_chains} chains holds up to {format_share(largest)} of the weight"
            f"{_of_batch(dominated)}: the bound and its standard error rest on that chain; raise "
            "num_steps, or start closer to the posterior (another guide)"
        ),
        value=largest,
    )


def check_lineages(run: AnnealedRun, *, min_fraction: float = 1 / 6) -> Diagnostic | None:
    """Looks for resampled chains that descend from few of those at the start.

    Resampling evens out the weights, so that their effective sample size says little. What can be
    lost are lineages: first chains without descendants, and with them the modes that only those
    chains would have reached. Estimates then vary more than their standard errors tell, and are
    mostly too low.

    Args:
        run: A forward run.
        min_fraction: Least number of lineages over K. Populations of fewer than 8 chains pass.

    Returns:
        A finding whose value is the least number of lineages, or ``None``.
    """
    if run.num_lineages is None or run.direction == "reverse" or run.population_size < 8:
        return None
    few = run.num_lineages < min_fraction * run.num_chains
    if _share(few) <= 0.01:  # one row of hundreds is chance
        return None
    least = int(run.num_lineages.min())
    return Diagnostic(
        name="lineages",
        severity="warning",
        message=(
            f"{run.num_chains} resampled chains descend from as few as {least} of those at the "
            f"start{_of_batch(few)}: modes may have died out on the way, and the evidence is "
            "rather too low than its standard error says; raise num_steps or num_chains, or start "
            "closer to the posterior (another guide)"
        ),
        value=float(least),
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
    r"""Looks for betas at which the chains hardly move, because they reject or take tiny steps.

    An acceptance of nearly one means steps far too small, where the kernel's step size can be
    tuned: for a target a, those above :math:`1 - (1 - a) / 20`.

    Args:
        run: A run of either direction.
        low: Least acceptance probability.
        max_share: Share of the betas that may lie outside the range.

    Returns:
        A finding whose value is the share of such betas, or ``None``.
    """
    if run.accept_prob.numel() == 0:
        return None
    high = 1.0 if run.target_accept is None else 1.0 - 0.05 * (1.0 - run.target_accept)
    count = run.log_weights.numel()  # transitions per beta
    accept_prob = _smoothed(run.accept_prob, count)
    stuck, timid = ~(accept_prob >= low), accept_prob > high  # NaN counts as stuck
    if count * len(accept_prob) < _ENOUGH_TRANSITIONS:  # a few may well be accepted all
        timid = torch.zeros_like(timid)
    for outside, what, advice in (
        (stuck, f"below {low:g}", "give the pilot more gradients, use more leapfrogs"),
        (timid, f"above {high:.3g}", "take larger steps (leave step_size to the pilot)"),
    ):
        if _share(outside) > max_share:
            where = run.betas[1:-1][outside.to(run.betas.device)]
            return Diagnostic(
                name="acceptance",
                severity="warning",
                message=f"acceptance is {what} at {format_share(_share(outside))} of the betas, "
                f"between {where.min().item():.2g} and {where.max().item():.2g}: the chains hardly "
                f"move; {advice} or another kernel",
                value=_share(outside),
            )
    return None


def check_divergences(
    run: AnnealedRun, *, max_share: float = 0.01, max_share_of_tenth: float = 0.02
) -> Diagnostic | None:
    """Looks for transitions that diverged, anywhere or in one part of the path.

    Where the target narrows to a neck that chains do not enter, they diverge near its end alone.

    Args:
        run: A run of either direction.
        max_share: Share of the transitions that may diverge.
        max_share_of_tenth: Likewise in any tenth of the path, where ten or more did.

    Returns:
        A finding whose value is the share of divergences, or ``None``.
    """
    diverged = run.num_diverging.double()
    if not len(diverged):
        return None
    chains = run.log_weights.numel()
    share = float(diverged.mean()) / chains
    tenths = [part for part in diverged.tensor_split(10) if part.sum() >= 10]
    worst = max((float(part.mean()) / chains for part in tenths), default=0.0)
    if share <= max_share and worst <= max_share_of_tenth:
        return None
    return Diagnostic(
        name="divergences",
        severity="warning",
        message=f"{format_share(share)} of the transitions diverged, "
        f"{format_share(max(share, worst))} in the worst tenth of the path: the chains may miss a "
        "narrow part of the target; reparameterize the model, or raise target_accept",
        value=share,
    )


def check_pilot(
    run: AnnealedRun, *, tolerance: float = 0.25, max_share: float = 0.2
) -> Diagnostic | None:
    """Compares the acceptance of a run with that of the pilot which tuned it.

    Passes where the user gave the step size, and where there are too few transitions to tell.

    Args:
        run: A run of either direction.
        tolerance: Largest difference of acceptance that counts as agreement.
        max_share: Share of the betas that may disagree.

    Returns:
        A finding whose value is the share of betas that disagree, or ``None``.
    """
    pilot, betas = run.pilot, run.betas[1:-1]
    count = run.log_weights.numel()  # transitions per beta
    if pilot is None or count * len(betas) < _ENOUGH_TRANSITIONS:
        return None
    log_step = _interpolate(betas, pilot.betas, pilot.step_size.log())
    if not torch.allclose(log_step, run.step_size.double().cpu().log(), atol=0.1):
        return None
    expected = _interpolate(betas, pilot.betas, pilot.accept_prob)
    share = _share(
        ~(
            (_smoothed(run.accept_prob, count, share=0.05).to(expected) - expected).abs()
            <= tolerance
        )
    )
    if share <= max_share:
        return None
    return Diagnostic(
        name="pilot",
        severity="warning",
        message=f"acceptance differs from the pilot's by over {tolerance:g} at "
        f"{format_share(share)} of the "
        "betas: the pilot saw other regions than the run; give it more chains or gradients",
        value=share,
    )


def _smoothed(accept_prob: Tensor, count: int, *, share: float = 0.0) -> Tensor:
    """Averages over neighbouring betas: one step of a few chains is a noisy measurement."""
    needed = max(share * len(accept_prob), _ENOUGH_TRANSITIONS / count)  # betas to average
    reach = math.ceil(0.5 * (needed - 1.0)) if needed > 1.0 else 0
    pooled: Tensor = torch.nn.functional.avg_pool1d(
        accept_prob.view(1, 1, -1), 2 * reach + 1, 1, reach, count_include_pad=False
    )
    return pooled.flatten()


def check_lag(
    run: AnnealedRun, *, min_variance: float = 0.5, factor: float = 4.0
) -> Diagnostic | None:
    r"""Compares the variance of log-weights with that of chains that keep up with the path.

    Chains that are always close to the density of their beta have log-weights whose variance the
    pilot can predict. A variance several times as large says that the chains lag behind: the
    density moves on faster than they follow.

    Args:
        run: A forward run.
        min_variance: Relative variance of the weights, :math:`K / \mathrm{ESS} - 1`, below which
            the bound is good whatever the pilot expected.
        factor: Ratio to the expected variance above which chains lag behind.

    Returns:
        A finding whose value is that ratio, or ``None``.
    """
    if run.pilot is None or run.direction == "reverse" or math.isnan(run.pilot.expected_variance):
        return None
    expected = math.expm1(min(run.pilot.expected_variance, 30.0))
    relative = float((run.num_chains / run.ess - 1.0).mean())
    if relative <= min_variance or relative <= factor * expected:
        return None
    ratio = relative / expected if expected > 0.0 else math.inf
    return Diagnostic(
        name="lag",
        severity="warning",
        message=f"the weights vary {ratio:.2g} times as much as those of chains that "
        "keep up with the path would: some chains lag behind and the bound may be far below the "
        "truth; start closer to the posterior, reparameterize, or raise num_steps",
        value=ratio,
    )


def check_target(run: AnnealedRun) -> Diagnostic | None:
    """Says what rounds have reached where it is not the target.

    Args:
        run: The last of several rounds.

    Returns:
        A remark whose value is the measured error in nats, or ``None``.
    """
    target, error = run.target_gap, run.measured_gap
    if target is None or error is None or error <= target:
        return None
    return Diagnostic(
        name="target",
        severity="info",
        message=f"after {len(run.rounds)} rounds, the last of {run.num_steps} steps, the error is "
        f"{error:.2g} nats and not yet {target:g}: raise max_rounds or num_chains, or start closer "
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


def _of_batch(condition: Tensor) -> str:
    return f" for {format_share(_share(condition))} of the batch" if condition.numel() > 1 else ""


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
