"""Findings about evidence from draws, and about an audited inference."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..diagnostics.checks import diagnose
from ..results.drawn import EvidenceFromSamples
from ..results.findings import Diagnostic
from ..results.inference import InferenceCheck, labels
from ..results.run import Estimate

__all__ = ["diagnose_evidence", "diagnose_inference"]

# Split R-hat above which chains count as unmixed, effective draws that a half should have, the
# tail index beyond which a mean of weights is unreliable (Vehtari et al. 2024), and nats.
_R_HAT, _LEAST_EFFECTIVE, _PARETO_K, _TOLERANCE, _STD_ERROR = 1.05, 100.0, 0.7, 0.05, 0.025
# Standard errors that make a contradiction, and nats of a harmonic mean's that make it worthless.
_SIGMAS, _VAGUE = 5.0, 0.25
# Adjusted p-values below which ranks are suspicious, or wrong; nats, likewise for a guide; and the
# standard errors by which a divergence is lowered first, by the side that it comes from.
_SUSPICIOUS_P, _FAILED_P = 0.03, 0.005
_SUSPICIOUS_NATS, _FAILED_NATS = 0.02, 0.1
_LOWER_SIGMAS, _UPPER_SIGMAS = 2.33, 4.0
# Least number of draws that ranks want.
_LEAST_RANKED = 10


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
    vague = thames.std_error > _VAGUE  # and then its own error is not known either
    apart = (thames.value - bridge.value).abs() > _margin(thames, bridge)
    if bool((apart & ~vague).any()):
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


def diagnose_inference(result: InferenceCheck) -> tuple[Diagnostic, ...]:
    """Collects all findings about an audited inference."""
    found = []
    adjusted = {name: p.reshape(-1) for name, p in result.adjusted_p_values.items()}
    names = [label for name, p in result.p_values.items() for label in labels(name, p)]
    values = torch.cat(list(adjusted.values()))
    least = values.min().item()
    if least < _SUSPICIOUS_P:
        which = [name for name, p in zip(names, values.tolist(), strict=True) if p < _SUSPICIOUS_P]
        text = (
            f"exact posterior samples do not rank uniformly among the draws, at {which[:5]} "
            f"(least p = {least:.2g}, corrected for {len(names)} quantities)"
        )
        if least < _FAILED_P:
            text += ": the inference does not draw from the posterior; plot() shows how"
            found.append(_finding("wrong_ranks", text, least))
        else:
            text += ": repeat with more simulations and another seed"
            found.append(_finding("ranks", text, least))
    if result.is_guide:
        found += _divergence(result)
    fewest = int(result.num_ranked.min())
    if fewest < _LEAST_RANKED:
        text = (
            f"some data sets left only {fewest} nearly independent draws to rank: a coarse test; "
            "draw more"
        )
        found.append(_finding("few_draws", text, float(fewest)))
    return tuple(found)


def _divergence(result: InferenceCheck) -> list[Diagnostic]:
    bounds = result.jeffreys
    limits = (
        bounds.lower - _LOWER_SIGMAS * bounds.lower_std_error,
        bounds.upper - _UPPER_SIGMAS * bounds.upper_std_error,
    )
    limit = max(value.nan_to_num(nan=-math.inf).item() for value in limits)
    limit = math.inf if bounds.upper.item() == math.inf else limit
    if limit <= _SUSPICIOUS_NATS:
        return []
    text = (
        "the Jeffreys divergence of guide and posterior is more than "
        f"{limit:.2g} nats on average, beyond chance"
    )
    if limit > _FAILED_NATS:
        return [_finding("wrong_guide", text + ": a richer guide, or longer training", limit)]
    return [_finding("divergence", text, limit)]
