"""Training losses for ``pyro.infer.SVI``."""

from .aiwae import AIWAE
from .differentiable_ais import DifferentiableAIS
from .eubo import EUBO
from .iwae import IWAE
from .kl import anneal_kl
from .partitions import Moments, Tightest
from .reverse_score import ReverseScore
from .tvo import TVO

__all__ = [
    "AIWAE",
    "EUBO",
    "IWAE",
    "TVO",
    "DifferentiableAIS",
    "Moments",
    "ReverseScore",
    "Tightest",
    "anneal_kl",
]
