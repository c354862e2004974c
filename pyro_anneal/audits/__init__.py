"""What posterior draws tell: the evidence, and whether they are draws of the posterior."""

from .evidence import evidence_from_samples
from .inference import check_inference

__all__ = ["check_inference", "evidence_from_samples"]
