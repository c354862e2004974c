"""What posterior draws tell: the evidence, and whether they are draws of the posterior."""

from .evidence import evidence_from_samples

__all__ = ["evidence_from_samples"]
