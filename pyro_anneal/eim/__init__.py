"""Energy-inspired models: distributions induced by samplers, as Pyro distributions."""

from .base import Extended, SamplerInduced, has_exact_log_prob
from .his import HIS, Leapfrog
from .semi_implicit import semi_implicit_bound
from .snis import SNIS
from .trs import LARS, TRS, MovingAverageNormalizer

__all__ = [
    "HIS",
    "LARS",
    "SNIS",
    "TRS",
    "Extended",
    "Leapfrog",
    "MovingAverageNormalizer",
    "SamplerInduced",
    "has_exact_log_prob",
    "semi_implicit_bound",
]
