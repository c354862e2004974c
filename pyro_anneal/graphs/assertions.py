"""Branches that a recording need not take: assertions, and shortcuts inside Pyro.

``assert (z >= 0).all()`` reads a value of a latent in Python, which no graph allows. What it says
holds wherever the model is right, and ``python -O`` drops it: so does a recording.

Pyro's stable distributions test whether any parameter lies near a hole of their formulas, only to
save work where none does. While a density is recorded they take the way that is right for all, and
that has no branch.
"""

from __future__ import annotations

import dis
import functools
import math
import sys
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pyro.distributions.stable as pyro_stable
import pyro.infer.reparam.stable as pyro_reparam
import torch
from torch import Tensor

__all__ = ["asserted_value", "without_shortcuts"]


def asserted_value() -> bool | None:
    """Finds out whether the truth value asked for now is that of an assertion.

    Returns:
        The value with which it holds; None for any other branch.
    """
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and _is_between(frame):
        frame = frame.f_back
    return None if frame is None else _assertion_at(frame.f_code, frame.f_lasti)


def _is_between(frame: types.FrameType) -> bool:
    return frame.f_code.co_name == "__torch_function__" or frame.f_code.co_filename == __file__


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
