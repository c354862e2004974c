"""Names for what Pyro, NumPy and matplotlib leave untyped, each said once.

Pyro's traces, sites and messages carry whatever a model puts there; what a name stands for is a
promise to the reader, and to nobody's type checker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine import Trace
from pyro.poutine.runtime import Message
from torch.distributions import constraints

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
Node = Mapping[str, Any]  # a site of a trace, by field
Distribution: TypeAlias = TorchDistributionMixin  # what a sample statement takes, masks included
Support: TypeAlias = constraints.Constraint  # of torch or Pyro, or one of their wrappers
Array = np.ndarray[Any, Any]  # of NumPy, any shape and dtype
Axes = Any  # of matplotlib, one or several
Figure = Any  # of matplotlib
