"""Names for what Pyro, NumPy and matplotlib leave untyped, each said once.

Pyro's traces, sites and messages carry whatever a model puts there; what a name stands for is a
promise to the reader, and to nobody's type checker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

__all__ = [
    "Arguments",
    "Array",
    "Axes",
    "Distribution",
    "Figure",
    "Fn",
    "Message",
    "Node",
    "Support",
    "Trace",
]

Fn = Callable[..., Any]  # a model, a guide, or a function of the same kind
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a model or a guide: positional, by name
Trace = Any  # a pyro.poutine.Trace
Node = Mapping[str, Any]  # a site of a trace, by field
Message = Any  # a site while handlers see it, who may change it
Distribution = Any  # what a sample statement takes, wrappers and masks included
Support = Any  # a constraint of torch or Pyro, or one of their wrappers
Array = np.ndarray[Any, Any]  # of NumPy, any shape and dtype
Axes = Any  # of matplotlib, one or several
Figure = Any  # of matplotlib
