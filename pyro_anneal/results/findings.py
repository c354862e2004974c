"""What a diagnostic is, and how its warning is issued."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .files import stored

__all__ = ["AnnealingWarning", "Diagnostic", "Verdict", "judge", "warn"]

Verdict = Literal["ok", "suspicious", "failed"]

# Kinds of findings that show a number to be wrong. All others say that it may be.
_FATAL = frozenset(
    {"agreement", "modes", "starts", "undefined_weights", "wrong_guide", "wrong_ranks"}
)


class AnnealingWarning(UserWarning):
    """A call finished, but a check found its numbers unreliable.

    The finding is also among the ``diagnostics`` of the result. To make such warnings errors, call
    ``warnings.simplefilter("error", pyro_anneal.AnnealingWarning)``.
    """


@stored
@dataclass(frozen=True, kw_only=True)
class Diagnostic:
    """One finding about a result: what a check saw, and what to try.

    The page *Errors and warnings* lists all names. Only warnings count for the verdict.

    Attributes:
        name: Kind of finding, such as ``"ess"``; a call warns at most once of each kind.
        severity: ``"warning"``, or ``"info"`` for a remark.
        message: What was seen and what to try, in words.
        value: The figure behind it, in the units that the message names.

    Example:
        >>> found = Diagnostic(name="gap", severity="info", message="wide", value=2.0)
        >>> found.name, found.value
        ('gap', 2.0)
    """

    name: str
    severity: Literal["info", "warning"]
    message: str
    value: float


def judge(diagnostics: Iterable[Diagnostic]) -> Verdict:
    """Sums up findings in one word.

    - ``"failed"``: a warning of a kind that contradicts the number itself. Weights are undefined
      (``undefined_weights``), lower and upper bounds cross by more than chance allows
      (``agreement``), or chains or particles from elsewhere found posterior mass that the run
      misses (``starts``, ``modes``); or an audited inference is not of the posterior
      (``wrong_ranks``, ``wrong_guide``). Do not use the number.
    - ``"suspicious"``: any other warning. The bounds still hold in expectation, but they may be
      far from the truth, or rest on few chains.
    - ``"ok"``: no warning. Remarks of severity ``"info"`` do not count.

    Args:
        diagnostics: Findings about one result.

    Returns:
        The verdict.

    Example:
        >>> judge([Diagnostic(name="ess", severity="warning", message="few", value=0.1)])
        'suspicious'
    """
    kinds = {found.name for found in diagnostics if found.severity == "warning"}
    if not kinds:
        return "ok"
    return "failed" if kinds & _FATAL else "suspicious"


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
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        level, frame = level + 1, frame.f_back
    return level
