"""Signs in the weights of a run that its bound rests on few chains, or on none."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..results.findings import Diagnostic
from ..results.run import AnnealedRun
from ..results.tables import format_share
from .shares import share_of

__all__ = ["check_dominance", "check_lag", "check_lineages", "check_weights", "check_zero_weights"]


def check_weights(
    run: AnnealedRun,
    *,
    min_fraction: float = 0.1,
    few: float = 1 / 3,
    max_share: float = 0.1,
    max_error: float = 0.25,
) -> Diagnostic | None:
    r"""Looks for effective sample sizes of few chains, and for their collapse.

    Below a third of K the bound rests on few chains and may be nats too low; beyond 64 chains, a
    third of 64 is enough. In a batch, some elements may fall below by chance, but none below a
    tenth. Fewer than 8 chains say little by their effective sample size, so for them the variance
    of the log-weights counts as well: of log-normal weights
    :math:`\mathrm{ESS} = K e^{-\mathrm{Var}}`. Resampling evens the weights out, after which the
    standard error still tells: beyond a quarter of a nat two of them are half a nat, and the error bar
    of a skewed estimate cannot be trusted. In a batch, over which errors average out, it may be twice
    as large.

    Args:
        run: A run of either direction.
        min_fraction: Least effective sample size over K of any batch element.
        few: Least effective sample size over K, or over 64 where K is larger, of most.
        max_share: Share of the batch elements that may have fewer.
        max_error: Largest standard error of one evidence, in nats, where chains were resampled.

    Returns:
        A finding whose value is the share of batch elements concerned, or ``None``.
    """
    collapsed = run.ess < min_fraction * run.num_chains
    if 1 < run.num_chains < 8:
        collapsed |= run.log_weights.var(dim=0) > -math.log(min_fraction)
    rests_on_few = run.ess < few * min(run.num_chains, 64)
    error = ""
    if run.num_lineages is not None:
        rests_on_few |= run.std_error > (max_error if run.ess.numel() == 1 else 2.0 * max_error)
        error = f", standard error up to {run.std_error.max().item():.2g} nats"
    if share_of(rests_on_few) > max_share:
        collapsed |= rests_on_few
    share = share_of(collapsed)
    if share == 0.0:
        return None
    return Diagnostic(
        name="ess",
        severity="warning",
        message=(
            f"the weights differ too much{_of_batch(collapsed)}: effective sample size down to "
            f"{run.ess.min().item():.1f} of {run.num_chains}{error}, so that few chains decide and the "
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


def check_lineages(
    run: AnnealedRun, *, min_fraction: float = 1 / 6, max_memory: float = 0.5
) -> Diagnostic | None:
    """Looks for resampled chains that descend from few of those at the start, and show it.

    Resampling evens out the weights, so that their effective sample size says little. What can be
    lost are lineages: first chains without descendants, and with them the modes that only those
    chains would have reached. Estimates then vary more than their standard errors tell, and are
    mostly too low. That few lineages survive proves nothing by itself: on a long path to a single
    mode it happens to everybody. It matters where chains end apart by ancestor
    (:func:`~pyro_anneal.chains.resampling.lineage_memory`), since they did not cross between modes.

    Args:
        run: A forward run.
        min_fraction: Least number of lineages over K. Populations of fewer than 8 chains pass.
        max_memory: Share of the variance between chains that their ancestors may explain.

    Returns:
        A finding whose value is the least number of lineages, or ``None``.
    """
    if run.num_lineages is None or run.direction == "reverse" or run.population_size < 8:
        return None
    few = run.num_lineages < min_fraction * run.num_chains
    if run.lineage_memory is not None:
        few = few & (run.lineage_memory[0] > max_memory)
    if share_of(few) <= 0.01:  # one row of hundreds is chance
        return None
    least = int(run.num_lineages[few].min())
    return Diagnostic(
        name="lineages",
        severity="warning",
        message=(
            f"{run.num_chains} resampled chains descend from as few as {least} of those at the "
            f"start{_of_batch(few)}, and ended apart by ancestor: modes may have died "
            "out on the way, and the evidence is "
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
            message=f"{share_of(undefined):.2%} of the log-weights are NaN or +inf: the log density "
            "is undefined or unbounded somewhere on the path",
            value=share_of(undefined),
        )
    dead = run.log_weights == -torch.inf
    share = share_of(dead)
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


def check_lag(
    run: AnnealedRun, *, min_variance: float = 0.35, factor: float = 4.0
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


def _of_batch(condition: Tensor) -> str:
    return (
        f" for {format_share(share_of(condition))} of the batch" if condition.numel() > 1 else ""
    )
