"""Findings about evidence from draws."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from ..diagnostics.checks import diagnose
from ..results.drawn import EvidenceFromSamples
from ..results.findings import Diagnostic
from ..results.run import Estimate

__all__ = ["diagnose_evidence"]

# Split R-hat above which chains count as unmixed, effective draws that a half should have, the
# tail index beyond which a mean of weights is unreliable (Vehtari et al. 2024), and nats.
_R_HAT, _LEAST_EFFECTIVE, _PARETO_K, _TOLERANCE, _STD_ERROR = 1.05, 100.0, 0.7, 0.05, 0.025
# Standard errors that make a contradiction.
_SIGMAS = 5.0


def diagnose_evidence(result: EvidenceFromSamples) -> tuple[Diagnostic, ...]:
    """Collects all findings about evidence from draws, those about its chains included."""
    found = [
        *_draws(result),
        *_tails(result),
        *_precision(result),
        *_contradictions(result),
        *diagnose(result.forward),
    ]
    return tuple(found)


def _finding(
    name: str, message: str, value: float, severity: Literal["info", "warning"] = "warning"
) -> Diagnostic:
    return Diagnostic(name=name, severity=severity, message=message, value=value)


def _draws(result: EvidenceFromSamples) -> list[Diagnostic]:
    found = []
    effective, r_hat = result.num_effective.min().item(), result.r_hat.max().item()
    if r_hat > _R_HAT:
        text = (
            f"the posterior draws have not mixed: R-hat is {r_hat:.3f} (above {_R_HAT}), so that "
            "bridge sampling and the harmonic mean speak of some part of the posterior; run the "
            "sampler longer, with several chains. The lower bound holds all the same"
        )
        found.append(_finding("unmixed_draws", text, r_hat))
    elif effective < _LEAST_EFFECTIVE:
        text = (
            f"half of the draws is worth only {effective:.0f} independent ones: bridge sampling and "
            f"its standard error want {_LEAST_EFFECTIVE:.0f} or more; draw more"
        )
        found.append(_finding("few_draws", text, effective))
    return found


def _tails(result: EvidenceFromSamples) -> list[Diagnostic]:
    """Judges the tails of the ratios; bounded terms of small variance do not feel them."""
    base, draws = (k.nan_to_num(nan=-math.inf) for k in result.pareto_k)
    tail = base.maximum(draws)
    heavy = tail > _PARETO_K
    if not bool(heavy.any()):
        return []
    value = tail.max().item()
    if bool((result.bridge_std_error[heavy] > _STD_ERROR).any()):
        text = (
            f"the fitted density ({result.base}) and the posterior draws overlap little: the ratios' "
            f"Pareto k is {value:.2f} (above {_PARETO_K}), and bridge sampling feels it; give more "
            "draws, or rely on the annealed bound"
        )
        return [_finding("pareto_k", text, value)]
    text = (
        f"the ratios have a heavy tail (Pareto k {value:.2f}), which the bounded terms of the bridge "
        "do not feel: importance sampling or a harmonic mean alone would"
    )
    return [_finding("pareto_k", text, value, "info")]


def _precision(result: EvidenceFromSamples) -> list[Diagnostic]:
    error = result.bridge_std_error.max().item()
    if error <= _STD_ERROR:
        return []
    text = (
        f"bridge sampling has a standard error of {error:.2g} nats: for an error below "
        f"{_TOLERANCE} nats give more draws"
    )
    return [_finding("std_error", text, error)]


def _contradictions(result: EvidenceFromSamples) -> list[Diagnostic]:
    found = []
    bridge, annealed = result.estimate, Estimate(result.lower, result.std_error)
    excess = _excess(bridge, annealed)
    if not excess <= 0.0:
        text = (
            "bridge sampling and annealing contradict each other by "
            f"{_distance(bridge, annealed):.3g} nats, far beyond their errors: the draws do not "
            "represent the posterior, or chains did not reach it. The lower bound holds in "
            "expectation; do not use the estimate"
        )
        found.append(_finding("agreement", text, _distance(bridge, annealed)))
    thames = result.thames
    if _excess(thames, bridge) > 0.0:
        text = (
            "the truncated harmonic mean and bridge sampling differ by "
            f"{_distance(thames, bridge):.3g} nats, beyond their errors: the posterior is far from "
            "an ellipsoid in unconstrained space, or the draws do not represent it"
        )
        found.append(_finding("harmonic_mean", text, _distance(thames, bridge)))
    if result.reverse is not None:
        upper = Estimate(result.upper, result.reverse.std_error)
        crossing = (annealed.value - upper.value) - _margin(annealed, upper)
        if crossing.max().item() > 0.0:
            text = (
                "the lower bound exceeds the upper one by "
                f"{(annealed.value - upper.value).max().item():.3g} nats, beyond their errors: the "
                "draws are not exact draws of this posterior"
            )
            found.append(_finding("agreement", text, crossing.max().item()))
        gap = (upper.value - annealed.value).max().item()
        if gap > 1.0:
            text = f"the annealed bounds are {gap:.3g} nats apart: raise num_steps"
            found.append(_finding("gap", text, gap))
    return found


def _margin(first: Estimate, second: Estimate) -> Tensor:
    both = first.std_error.nan_to_num().square() + second.std_error.nan_to_num().square()
    return _SIGMAS * both.sqrt() + _TOLERANCE


def _distance(first: Estimate, second: Estimate) -> float:
    return (first.value - second.value).abs().max().item()


def _excess(first: Estimate, second: Estimate) -> float:
    """Computes by how much two estimates differ beyond their errors; NaN if one is undefined."""
    return ((first.value - second.value).abs() - _margin(first, second)).max().item()
