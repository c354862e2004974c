"""Several kernels in turn, each for coordinates of its own, in an order that reads the same backward."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import Density, Info, Kernel, State, Tuning, largest_step, moves_chains_alone
from .lattice import Lattice, MovesLattice, lattice_moved_by
from .noise import Noise, declared

__all__ = ["Composite"]


@dataclass(frozen=True)
class Composite:
    r"""Moves discrete and continuous coordinates in turn: A B C B A.

    A product of reversible kernels is not reversible, unless it is a palindrome. The last part
    moves once, all others twice. Parts that move discrete coordinates have a lattice; the others
    get the scale of the discrete coordinates as zero, and so leave these where they are.

    Args:
        parts: Reversible kernels, the last of which moves once.
        lattice: The discrete coordinates; None until the problem that is annealed fills them in.

    Raises:
        ValueError: If there is no part.

    Example:
        >>> from pyro_anneal.kernels import HMC, DiscreteLangevin
        >>> Composite((DiscreteLangevin(), HMC(2))).num_gradients
        4
    """

    parts: tuple[Kernel, ...]
    lattice: Lattice | None = None

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("Composite needs at least one kernel")
        assert self._num_noise  # drawn here, where no step is being recorded, and kept

    @property
    def _order(self) -> list[int]:
        count = len(self.parts)
        return [*range(count), *range(count - 2, -1, -1)]

    @functools.cached_property
    def _num_noise(self) -> list[int]:
        """Counts the tensors of each part's noise."""
        wide, flat = torch.zeros(1, 1, device="cpu"), torch.zeros(1, device="cpu")
        example = State(wide, flat, flat, wide, wide)
        generator = torch.Generator("cpu")
        return [len(part.noise(example, generator)) for part in self.parts]

    @property
    def num_gradients(self) -> int:
        """Calls of the density per transition."""
        return sum(self.parts[index].num_gradients for index in self._order)

    @property
    def target_accept(self) -> float | None:
        """Mean target of the continuous parts; None without, since discrete ones may always accept."""
        moving = [part for part in self.parts if lattice_moved_by(part) is None]
        found = [part.target_accept for part in moving if part.target_accept is not None]
        return sum(found) / len(found) if found else None

    @property
    def target_accepts(self) -> tuple[float | None, ...]:
        """Acceptance that the pilot steers each part's step size toward."""
        return tuple(part.target_accept for part in self.parts)

    @property
    def largest_step(self) -> tuple[float, ...]:
        """Step size of each part beyond which nothing changes."""
        found = [largest_step(part) for part in self.parts]
        return tuple(min(step) if isinstance(step, tuple) else float(step) for step in found)

    @property
    def num_step_sizes(self) -> int:
        """Number of step sizes: one per part, in the last dimension of ``Tuning.step_size``."""
        return len(self.parts)

    @property
    def moves_chains_alone(self) -> bool:
        """Whether no part lets chains see each other."""
        return all(moves_chains_alone(part) for part in self.parts)

    def on(self, lattice: Lattice) -> Composite:
        """Returns the kernel whose discrete coordinates are those of ``lattice``."""
        parts = tuple(
            part.on(part.lattice or lattice) if isinstance(part, MovesLattice) else part
            for part in self.parts
        )
        return replace(self, parts=parts, lattice=lattice)

    def declared_noise(self, state: State) -> tuple[Noise, ...] | None:
        """The noise of each part in turn, if all declare theirs."""
        found = [declared(self.parts[index], state) for index in self._order]
        every = [parts for parts in found if parts is not None]
        return tuple(itertools.chain(*every)) if len(every) == len(found) else None

    def noise(self, state: State, generator: torch.Generator | None) -> tuple[Tensor, ...]:
        """Draws the randomness of each part in turn."""
        return tuple(
            tensor for index in self._order for tensor in self.parts[index].noise(state, generator)
        )

    def step(
        self,
        state: State,
        density: Density,
        beta: Tensor,
        tuning: Tuning,
        noise: tuple[Tensor, ...],
    ) -> tuple[State, Info]:
        """Moves all chains once at inverse temperature ``beta``."""
        order = self._order
        counts = [self._num_noise[index] for index in order]
        accepts: list[list[Tensor]] = [[] for _ in self.parts]
        diverging = torch.zeros_like(state.log_base, dtype=torch.bool)
        rest = list(noise)
        for index, count in zip(order, counts, strict=True):
            part = self.parts[index]
            own, rest = tuple(rest[:count]), rest[count:]
            table = self._tuning(index, tuning)
            state, info = part.step(state, density, beta, table, own)
            accepts[index].append(info.accept_prob)
            diverging = diverging | info.diverging
        each = torch.stack([torch.stack(found).mean(0) for found in accepts], dim=-1)
        return state, Info(each.mean(-1), diverging, each)

    def _tuning(self, index: int, tuning: Tuning) -> Tuning:
        """Takes one part's step size, and hides the discrete coordinates from continuous kernels."""
        scale = tuning.scale
        if self.lattice is not None and lattice_moved_by(self.parts[index]) is None:
            scale = torch.where(self.lattice.mask(scale), 0.0, scale)
        return Tuning(tuning.step_size[..., index], scale)

    def reversal(self) -> Kernel:
        """Returns the palindrome of the parts' reversals, which is the kernel itself for most."""
        return replace(self, parts=tuple(part.reversal() for part in self.parts))
