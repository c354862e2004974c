"""Signs in the transitions of a run that its chains hardly move, diverge, or were tuned elsewhere."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..results.findings import Diagnostic
from ..results.run import AnnealedRun
from ..results.tables import format_share
from .shares import share_of

__all__ = ["check_acceptance", "check_divergences", "check_pilot"]


# Transitions over which an acceptance is averaged before it is compared with another.
_ENOUGH_TRANSITIONS = 100


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
        if share_of(outside) > max_share:
            where = run.betas[1:-1][outside.to(run.betas.device)]
            return Diagnostic(
                name="acceptance",
                severity="warning",
                message=f"acceptance is {what} at {format_share(share_of(outside))} of the betas, "
                f"between {where.min().item():.2g} and {where.max().item():.2g}: the chains hardly "
                f"move; {advice} or another kernel",
                value=share_of(outside),
            )
    return None


def check_divergences(
    run: AnnealedRun,
    *,
    max_share: float = 0.01,
    max_share_of_tenth: float = 0.02,
    short: float = 0.5,
) -> Diagnostic | None:
    r"""Looks for transitions that diverged, anywhere or in one part of the path.

    Where the target narrows to a neck that chains do not enter, they diverge near its end alone.
    A divergence is a rejection, and does no harm by itself: on a path of thermodynamic length
    :math:`\Lambda` draws of the base alone have weights of relative variance
    :math:`e^{\Lambda^2} - 1`, and where that is little, nothing depends on where chains move. Then
    the finding is a remark. (Starts that cover a neck have chains in it, which diverge there.)

    Args:
        run: A run of either direction.
        max_share: Share of the transitions that may diverge.
        max_share_of_tenth: Likewise in any tenth of the path, where ten or more did.
        short: Length up to which a path is short.

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
    is_short = run.pilot is not None and run.pilot.length <= short
    consequence = (
        "the path is so short that draws of its base would do, and little depends on it"
        if is_short
        else "the chains may miss a narrow part of the target; reparameterize the model, or raise "
        "target_accept"
    )
    return Diagnostic(
        name="divergences",
        severity="info" if is_short else "warning",
        message=f"{format_share(share)} of the transitions diverged, "
        f"{format_share(max(share, worst))} in the worst tenth of the path: {consequence}",
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
    share = share_of(
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


def _interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Interpolates ``values`` at increasing ``knots`` linearly, constant beyond the ends."""
    knots, values, x = (t.detach().double().cpu() for t in (knots, values, x))
    if knots.numel() == 1:
        return values.expand(x.shape)
    right = torch.searchsorted(knots, x).clamp(1, knots.numel() - 1)
    span = knots[right] - knots[right - 1]
    fraction = ((x - knots[right - 1]) / span).clamp(0.0, 1.0)
    return torch.lerp(values[right - 1], values[right], fraction)
