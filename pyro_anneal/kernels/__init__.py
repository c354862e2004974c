"""Transition kernels and what they share."""

from .base import Density, Info, Kernel, State, Tuning
from .hmc import HMC, accept, leapfrog
from .random_walk import RandomWalk

__all__ = [
    "HMC",
    "Density",
    "Info",
    "Kernel",
    "RandomWalk",
    "State",
    "Tuning",
    "accept",
    "leapfrog",
]
