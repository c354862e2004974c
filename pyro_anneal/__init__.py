"""Certified bounds on log evidence and mutual information for any Pyro model."""

from . import datasets, eim, losses, mi, oed
from ._version import __version__
from .anneal import AnnealedImportance, log_evidence
from .audits import check_inference, evidence_from_samples
from .chains.pilot import Pilot
from .kernels import (
    HMC,
    ChromaticGibbs,
    Composite,
    DiscreteLangevin,
    Kernel,
    RandomWalk,
    SingleSite,
)
from .results import (
    AnnealedRun,
    AnnealingWarning,
    Comparison,
    Diagnostic,
    Estimate,
    EvidenceFromSamples,
    EvidenceOfBatches,
    InferenceCheck,
    Jeffreys,
    MutualInformation,
    Sandwich,
    compare,
)
from .schedules import Linear, LogUniform, Power, Schedule, Sigmoid

__all__ = [
    "HMC",
    "AnnealedImportance",
    "AnnealedRun",
    "AnnealingWarning",
    "ChromaticGibbs",
    "Comparison",
    "Composite",
    "Diagnostic",
    "DiscreteLangevin",
    "Estimate",
    "EvidenceFromSamples",
    "EvidenceOfBatches",
    "InferenceCheck",
    "Jeffreys",
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
    "SingleSite",
    "__version__",
    "check_inference",
    "compare",
    "datasets",
    "eim",
    "evidence_from_samples",
    "log_evidence",
    "losses",
    "mi",
    "oed",
]
