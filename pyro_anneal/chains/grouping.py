"""Which chains belong together: populations that resample, and blocks of a guaranteed interval.

All of it is chosen from what was asked for and what the pilot found, before the chains run, so that
no identity is lost.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from .budget import Blocks, choose_blocks
from .resampling import Resampling

__all__ = ["Grouping", "choose_grouping"]

# Chains of log-weights that vary by more, in squared nats, are better resampled: from there on less
# than a third of them count.
_PAYS_ABOVE = 1.0
_LEAST_POPULATION = 8  # of "auto"
_USUAL_POPULATION, _MOST_POPULATIONS = 16, 8
# Points per unit of thermodynamic length, and their number where no pilot measured it.
_POINTS_PER_LENGTH, _FEWEST_POINTS, _MOST_POINTS = 1.5, 10, 100


@dataclass(frozen=True)
class Grouping:
    """How the K chains of a run are grouped."""

    resampling: Resampling | None
    blocks: Blocks  # for the evidence of each element of the batch
    total_blocks: Blocks  # for the sum over the batch

    @property
    def population_size(self) -> int:
        """Number M of chains that resample among each other."""
        return 1 if self.resampling is None else self.resampling.population_size

    def to_dict(self) -> dict[str, Any]:
        """Describes the grouping by plain values."""
        resampling = None if self.resampling is None else asdict(self.resampling)
        blocks = {"blocks": list(self.blocks), "total_blocks": list(self.total_blocks)}
        return {"resampling": resampling} | blocks

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Grouping:
        """Undoes :meth:`to_dict`."""
        resampling = content["resampling"]
        if resampling is not None:
            resampling = Resampling(**(resampling | {"points": tuple(resampling["points"])}))
        blocks = (Blocks(*content[name]) for name in ("blocks", "total_blocks"))
        return cls(resampling, *blocks)


def choose_grouping(
    option: bool | str,
    *,
    num_chains: int,
    num_steps: int,
    batch_size: int = 1,
    chains_at_once: int | None = None,
    length: float = math.nan,
    variance: float = math.nan,
    dead: float = 0.0,
) -> Grouping:
    """Decides whether chains resample, among whom and where, and the blocks of intervals.

    Args:
        option: ``"auto"``, True or False.
        num_chains: Number K of chains.
        num_steps: Number T of weight increments.
        batch_size: Number of elements of the batch.
        chains_at_once: Chains that run at once; populations do not reach beyond them.
        length: Thermodynamic length of the path; NaN where no pilot ran.
        variance: Of log-weights that the pilot expects, in squared nats; likewise.
        dead: Share of chains expected to start where the target has no mass.

    Returns:
        The grouping.

    Raises:
        ValueError: If resampling is asked for where at most one chain is at hand.
    """
    size = 1
    if option is True or (option == "auto" and variance > _PAYS_ABOVE):
        size = _population_size(num_chains, chains_at_once)
        if option is True and size == 1 < num_chains:
            raise ValueError(
                f"resampling=True, but {num_chains} chains in blocks of {chains_at_once} leave no "
                "two that share a population: choose a chain_batch_size that divides num_chains"
            )
        if option == "auto" and size < _LEAST_POPULATION:
            size = 1
    resampling = None
    if size > 1 and num_steps > 1:
        resampling = Resampling(size, _points(num_steps, length))
    units = num_chains // size if resampling is not None else 0
    return Grouping(
        resampling,
        choose_blocks(num_chains, variance, num_units=units, dead=dead),
        choose_blocks(num_chains, variance, num_units=units, num_data=batch_size, dead=dead),
    )


def _population_size(num_chains: int, chains_at_once: int | None) -> int:
    """Chooses M, which divides both numbers: 16, or more where that makes many populations."""
    unit = num_chains
    if chains_at_once is not None and chains_at_once < num_chains:
        unit = math.gcd(num_chains, chains_at_once)
    least = max(_USUAL_POPULATION, -(-num_chains // _MOST_POPULATIONS))
    divisors = (size for size in range(1, unit + 1) if unit % size == 0)
    return next((size for size in divisors if size >= least), unit)


def _points(num_steps: int, length: float) -> tuple[int, ...]:
    """Places points evenly: an adaptive schedule has steps of equal thermodynamic length."""
    count = num_steps / 10 if math.isnan(length) else _POINTS_PER_LENGTH * length
    count = min(max(math.ceil(min(count, _MOST_POINTS)), _FEWEST_POINTS), num_steps - 1)
    return tuple(sorted({round(num_steps * i / (count + 1)) for i in range(1, count + 1)} - {0}))
