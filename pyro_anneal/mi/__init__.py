"""Bounds on mutual information, from joint samples only up to the full joint density.

| known of p(x, z) | bounds |
|---|---|
| joint samples | :class:`InfoNCE`, :class:`MINE_DV`, :class:`MINE_F` |
| and p(z) | :class:`BarberAgakov`, :class:`GIWAE`, generalized MINE (guide given) |
| and p(x given z) | :class:`IWAE`, :class:`RIWAE`, :class:`StructuredInfoNCE`, upper bounds |

Source: Brekelmans et al. (2022), *Improving Mutual Information Estimation with Annealed and
Energy-Based Bounds*.
"""

from ..results.mutual_information import MutualInformation
from .ais import AIS
from .base import Bound
from .contrastive import MINE_DV, MINE_F, InfoNCE
from .critics import (
    ConcatCritic,
    Critic,
    LikelihoodCritic,
    RelativeCritic,
    SeparableCritic,
    pairwise_scores,
)
from .importance import IWAE, RIWAE, StructuredInfoNCE
from .joints import DistributionJoint, Joint
from .mine_ais import MINEAIS
from .plotting import plot_bounds, plot_bounds_against_time, plot_decomposition
from .pyro_joint import PyroJoint
from .variational import GIWAE, BarberAgakov

__all__ = [
    "AIS",
    "GIWAE",
    "IWAE",
    "MINEAIS",
    "MINE_DV",
    "MINE_F",
    "RIWAE",
    "BarberAgakov",
    "Bound",
    "ConcatCritic",
    "Critic",
    "DistributionJoint",
    "InfoNCE",
    "Joint",
    "LikelihoodCritic",
    "MutualInformation",
    "PyroJoint",
    "RelativeCritic",
    "SeparableCritic",
    "StructuredInfoNCE",
    "pairwise_scores",
    "plot_bounds",
    "plot_bounds_against_time",
    "plot_decomposition",
]
