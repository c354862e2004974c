"""Where in the user's code something happened: the innermost line that is no library's."""

from __future__ import annotations

import contextlib
import functools
import linecache
import sys
import traceback
from pathlib import Path

import pyro
import torch

__all__ = ["Place", "current_place", "described", "user_line"]

Place = tuple[str, int]  # file name and line

# Frames inside these are not the user's.
_LIBRARIES = [Path(str(module.__file__)).parent for module in (torch, pyro)]
_LIBRARIES += [Path(__file__).parents[1], Path(contextlib.__file__), Path(functools.__file__)]


@functools.lru_cache(maxsize=4096)
def _is_library(filename: str) -> bool:
    path = Path(filename)
    return any(path.is_relative_to(folder) for folder in _LIBRARIES)


def user_line(frames: traceback.StackSummary) -> str:
    """Formats the innermost line outside of torch, Pyro and this package, or an empty string."""
    for frame in reversed(frames):
        if not _is_library(frame.filename):
            place = f"{Path(frame.filename).name}:{frame.lineno}"
            return f" at {place} ({(frame.line or '').strip()})"
    return ""


def current_place() -> Place | None:
    """Finds the innermost line now running outside of torch, Pyro and this package."""
    frame = sys._getframe(1)
    while frame is not None:
        if not _is_library(frame.f_code.co_filename):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return None


def described(place: Place | None) -> str:
    """Formats a place like :func:`user_line`."""
    if place is None:
        return ""
    filename, line = place
    return f" at {Path(filename).name}:{line} ({linecache.getline(filename, line).strip()})"


def summary(error: Exception) -> str:
    """Says in one line what an error was, and at which line of the user's code."""
    where = user_line(traceback.extract_tb(error.__traceback__))
    message = str(error).strip()
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}{where}"
