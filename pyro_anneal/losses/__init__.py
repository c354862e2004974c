"""Training losses for ``pyro.infer.SVI``."""

from .eubo import EUBO
from .iwae import IWAE
from .tvo import TVO, Moments

__all__ = ["EUBO", "IWAE", "TVO", "Moments"]
