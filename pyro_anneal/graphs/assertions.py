"""Branches that a recording need not take: assertions, warnings, and shortcuts inside Pyro.

``assert (z >= 0).all()`` reads a value of a latent in Python, which no graph allows. What it says
holds wherever the model is right, and ``python -O`` drops it: so does a recording. Pyro's
``warn_if_nan`` and ``warn_if_inf`` change no value, either.

Pyro's stable distributions test whether any parameter or value lies near a hole of their formulas,
only to save work where none does. While a density is recorded they take the way that is right for all, and
that has no branch.
"""

from __future__ import annotations

import dis
import functools
import math
import os
import sys
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pyro.distributions.stable as pyro_stable
import pyro.infer.reparam.stable as pyro_reparam
import pyro.util
import torch
from torch import Tensor

__all__ = ["asserted_value", "without_shortcuts"]


# Modules of Pyro that hold the log density of stable distributions, in versions that have it.
_DENSITIES = [
    module
    for name in ("pyro.distributions.stable", "pyro.distributions.stable_log_prob")
    if (module := sys.modules.get(name)) is not None and hasattr(module, "_stable_log_prob")
]
_WARNINGS = frozenset(
    function.__code__ for function in (pyro.util.warn_if_nan, pyro.util.warn_if_inf)
)
# What lies between a number and who asks for it.
_BETWEEN = tuple(
    f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1])
)


def asserted_value() -> bool | None:
    """Finds out whether the truth value asked for now is that of an assertion or a warning.

    Returns:
        The value with which it holds, or with which nothing is said; None for any other branch.
    """
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and _is_between(frame):
        frame = frame.f_back
    if frame is not None and frame.f_code in _WARNINGS:
        return False
    return None if frame is None else _assertion_at(frame.f_code, frame.f_lasti)


def _is_between(frame: types.FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_BETWEEN)


@functools.lru_cache(maxsize=4096)
def _assertion_at(code: types.CodeType, at: int) -> bool | None:
    """Reads the jump at an instruction: over the raising of AssertionError, or not."""
    holds: bool | None = None
    for step in dis.get_instructions(code):
        if step.offset < at or step.opname in ("TO_BOOL", "CACHE", "EXTENDED_ARG"):
            continue
        if holds is not None:
            return holds if "AssertionError" in _loaded(step) else None
        if not step.opname.startswith("POP_JUMP"):
            return None
        holds = step.opname.endswith("IF_TRUE")
    return None


def _loaded(step: dis.Instruction) -> str:
    return "AssertionError" if step.opname == "LOAD_ASSERTION_ERROR" else step.argrepr


@contextmanager
def without_shortcuts() -> Iterator[None]:
    """Makes Pyro's stable distributions compute without branches."""
    with ExitStack() as stack:
        for module in (pyro_stable, pyro_reparam):
            if hasattr(module, "_standard_stable"):
                stack.enter_context(mock.patch.object(module, "_standard_stable", _stable))
        if hasattr(pyro_reparam, "_safe_shift"):
            stack.enter_context(mock.patch.object(pyro_reparam, "_safe_shift", _shift))
        for module in _DENSITIES:
            stack.enter_context(mock.patch.object(module, "_stable_log_prob", _log_density))
        yield


def _stable(alpha: Any, beta: Any, uniform: Tensor, exponential: Tensor, coords: str) -> Tensor:
    """Computes what Pyro's function of this name does, for alpha near 1 and elsewhere alike.

    Near the hole at 1 two points at a fixed distance from it are interpolated; elsewhere both are
    the point itself. As in Pyro, alpha gets the gradient of the points.
    """
    if not isinstance(alpha, Tensor) or not isinstance(beta, Tensor):
        alpha, beta = torch.as_tensor(alpha), torch.as_tensor(beta)
    if coords == "S":  # discontinuous, so interpolate in S0
        z = _stable(alpha, beta, uniform, exponential, "S0")
        return torch.where(alpha == 1, z, z + beta * (math.pi / 2 * alpha).tan())
    total = torch.zeros_like(uniform)
    for moved, weight in _points(alpha, pyro_stable.RADIUS):
        z = pyro_stable._unsafe_standard_stable(moved, beta, uniform, exponential, coords=coords)
        total = total + weight * z
    return total


def _shift(alpha: Tensor, skew: Tensor, scale: Tensor, skew_abs: Tensor) -> Tensor:
    """Computes Pyro's ``_safe_shift`` of a reparametrized stable distribution."""
    total = torch.zeros_like(alpha)
    for moved, weight in _points(alpha, 0.005):
        own = skew_abs.pow(moved.reciprocal())
        total = total + weight * pyro_reparam._unsafe_shift(moved, skew, own)
    return total


def _points(alpha: Tensor, radius: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Lists the two points between which Pyro interpolates, and their weights."""
    middle = alpha.detach()
    near = (middle - 1.0).abs() <= radius
    for side in (-1.0, 1.0):
        point = torch.where(near, 1.0 + side * radius, middle)
        weight = torch.where(near, 1.0 - (point - middle).abs() / (2.0 * radius), 0.5)
        yield alpha + (point - middle), weight


def _log_density(alpha: Tensor, beta: Tensor, value: Tensor, coords: str) -> Tensor:
    """Computes what Pyro's ``_stable_log_prob`` does, for alpha near 1 and elsewhere alike."""
    formulas: Any = sys.modules["pyro.distributions.stable_log_prob"]
    if coords == "S":
        value = torch.where(alpha == 1, value, value - beta * (math.pi / 2 * alpha)).tan()
    elif coords != "S0":
        raise ValueError(f"Unknown coords: {coords}")
    radius = formulas.alpha_near_one_tolerance
    near = (alpha - 1.0).abs() < radius
    above = _log_density_off_one(torch.where(near, 1.0 + radius, alpha), beta, value)
    below = _log_density_off_one(torch.full_like(alpha, 1.0 - radius), beta, value)
    return _between(near, alpha - 1.0, radius, above, below)


def _log_density_off_one(alpha: Tensor, beta: Tensor, value: Tensor) -> Tensor:
    """Computes the log density where alpha is not near 1, for values near 0 and elsewhere alike."""
    formulas: Any = sys.modules["pyro.distributions.stable_log_prob"]
    value = value + beta * (math.pi / 2 * alpha).tan()
    density_at_zero = formulas._unsafe_alpha_stable_log_prob_at_zero(alpha, 0).exp()
    radius = (formulas.value_near_zero_tolerance_alpha * alpha / (1.0 - alpha).abs()).clamp(
        max=formulas.value_near_zero_tolerance_density * density_at_zero.reciprocal()
    )
    near = value.abs() < radius
    above = formulas._unsafe_stable_log_prob(alpha, beta, torch.where(near, radius, value))
    below = formulas._unsafe_stable_log_prob(alpha, beta, -radius)
    return _between(near, value, radius, above, below)


def _between(
    near: Tensor, offset: Tensor, radius: Tensor | float, above: Tensor, below: Tensor
) -> Tensor:
    """Interpolates between densities at either side of a hole, where it is near."""
    weight = torch.where(near, offset, 0.0) / (2.0 * radius) + 0.5
    mixed = torch.logaddexp(above + weight.log(), below + (1.0 - weight).log())
    return torch.where(near, mixed, above)
