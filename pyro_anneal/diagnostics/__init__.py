"""Signs that a run or a sandwich should not be trusted, as pure functions of results."""

from ..results.findings import AnnealingWarning, Diagnostic, warn
from .checks import (
    check_agreement,
    check_certified,
    check_gap,
    check_target,
    diagnose,
    diagnose_sandwich,
    diagnose_starts,
)
from .transitions import check_acceptance, check_divergences, check_pilot
from .weights import (
    check_dominance,
    check_lag,
    check_lineages,
    check_weights,
    check_zero_weights,
)

__all__ = [
    "AnnealingWarning",
    "Diagnostic",
    "check_acceptance",
    "check_agreement",
    "check_certified",
    "check_divergences",
    "check_dominance",
    "check_gap",
    "check_lag",
    "check_lineages",
    "check_pilot",
    "check_target",
    "check_weights",
    "check_zero_weights",
    "diagnose",
    "diagnose_sandwich",
    "diagnose_starts",
    "warn",
]
