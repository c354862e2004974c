"""Energy-inspired models: distributions induced by samplers, as Pyro distributions."""

from .base import Extended, SamplerInduced
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
    "semi_implicit_bound",
]
