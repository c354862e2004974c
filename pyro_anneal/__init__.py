"""Certified bounds on log evidence and mutual information for any Pyro model."""

from ._version import __version__
from .anneal import AnnealedImportance, log_evidence
from .comparison import Comparison, compare
from .diagnostics import AnnealingWarning, Diagnostic
from .information import MutualInformation
from .kernels import HMC, Kernel, RandomWalk
from .pilot import Pilot
from .results import AnnealedRun, Estimate, Sandwich
from .schedules import Linear, LogUniform, Power, Schedule, Sigmoid
from .streaming import EvidenceOfBatches

__all__ = [
    "HMC",
    "AnnealedImportance",
    "AnnealedRun",
    "AnnealingWarning",
    "Comparison",
    "Diagnostic",
    "Estimate",
    "EvidenceOfBatches",
    "Kernel",
    "Linear",
    "LogUniform",
    "MutualInformation",
    "Pilot",
    "Power",
    "RandomWalk",
    "Sandwich",
    "Schedule",
    "Sigmoid",
    "__version__",
    "compare",
    "log_evidence",
]
