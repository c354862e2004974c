"""What comes back, how it is shown."""

from .batches import EvidenceOfBatches
from .comparison import Comparison, compare
from .findings import AnnealingWarning, Diagnostic
from .mutual_information import MutualInformation
from .run import AnnealedRun, Estimate, PilotSummary
from .sandwich import Sandwich

__all__ = [
    "AnnealedRun",
    "AnnealingWarning",
    "Comparison",
    "Diagnostic",
    "Estimate",
    "EvidenceOfBatches",
    "MutualInformation",
    "PilotSummary",
    "Sandwich",
    "compare",
]
