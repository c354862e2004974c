"""What comes back, how it is shown."""

from .base import Result
from .batches import EvidenceOfBatches
from .comparison import Comparison, compare
from .drawn import EvidenceFromSamples
from .findings import AnnealingWarning, Diagnostic, judge
from .inference import InferenceCheck, Jeffreys
from .information_gain import ExpectedInformationGain
from .mutual_information import MutualInformation
from .provenance import Provenance
from .run import AnnealedRun, Estimate, PilotSummary
from .sandwich import Sandwich

__all__ = [
    "AnnealedRun",
    "AnnealingWarning",
    "Comparison",
    "Diagnostic",
    "Estimate",
    "EvidenceFromSamples",
    "EvidenceOfBatches",
    "ExpectedInformationGain",
    "InferenceCheck",
    "Jeffreys",
    "MutualInformation",
    "PilotSummary",
    "Provenance",
    "Result",
    "Sandwich",
    "compare",
    "judge",
]
