"""Transition kernels and what they share."""

from .base import Density, Info, Kernel, State, Tuning
from .chromatic import ChromaticGibbs
from .composite import Composite
from .discrete import DiscreteLangevin, SingleSite
from .hmc import HMC, leapfrog
from .lattice import Block, Lattice
from .metropolis import accept
from .random_walk import RandomWalk

__all__ = [
    "HMC",
    "Block",
    "ChromaticGibbs",
    "Composite",
    "Density",
    "DiscreteLangevin",
    "Info",
    "Kernel",
    "Lattice",
    "RandomWalk",
    "SingleSite",
    "State",
    "Tuning",
    "accept",
    "leapfrog",
]
