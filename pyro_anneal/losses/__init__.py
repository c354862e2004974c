"""Training losses for ``pyro.infer.SVI``."""

from .iwae import IWAE
from .tvo import TVO, Moments

__all__ = ["IWAE", "TVO", "Moments"]
