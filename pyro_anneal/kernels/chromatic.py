r"""Gibbs sampling of many discrete coordinates at once: those of one colour in turn.

Variables that do not meet in any factor are independent given the others. With the graph of
variables coloured, so that neighbours differ, all variables of one colour are drawn together from
their conditional distributions. Where the log density is linear in each variable, one gradient g
holds all conditionals exactly,

.. math:: \pi_k \propto e^{g_k}

(``sigmoid(g)`` for zeros and ones), and every draw is accepted. Each colour is corrected by a
Metropolis test all the same, so a colouring or a gradient that is wrong costs acceptance and never
exactness. A step sweeps through the colours forward or backward, by a fair coin: a sweep's transpose
is the sweep in the opposite order, so their even mixture satisfies detailed balance.

Source: Gonzalez, Low, Gretton and Guestrin (2011), *Parallel Gibbs sampling: from colored fields to
thin junction trees*.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .base import Density, Info, State, Tuning
from .lattice import Block, Lattice, bound
from .metropolis import MetropolisKernel, accept
from .noise import Noise

__all__ = ["ChromaticGibbs", "conditional_log_prob", "draw_conditional"]


def draw_conditional(block: Block, grad: Tensor, uniform: Tensor) -> Tensor:
    """Draws all variables of a block from the conditionals that a gradient tells."""
    if block.kind == "binary":
        return (uniform < grad.sigmoid()).to(grad.dtype)
    gumbel = -(-uniform.log()).log()
    best = (grad + gumbel).argmax(-1, keepdim=True)
    return (best == torch.arange(block.size, device=grad.device)).to(grad.dtype)


def conditional_log_prob(block: Block, grad: Tensor, x: Tensor, chosen: Tensor) -> Tensor:
    """Computes the log probability of drawing ``x`` at the chosen coordinates, summed."""
    if block.kind == "binary":
        return torch.where(chosen, x * grad - softplus(grad), 0.0).sum(-1)
    log_pi = torch.where(x > 0.5, grad.log_softmax(-1), 0.0)
    return torch.where(chosen, log_pi, 0.0).sum((-2, -1))


@dataclass(frozen=True)
class ChromaticGibbs(MetropolisKernel):
    r"""Draws zeros, ones and categories from their conditionals, one colour of variables after another.

    For Ising models, Boltzmann machines and other models that are linear in each variable while the
    others are held: it is chosen by itself where a colouring of few colours is found. A step is a
    sweep through all variables and costs one gradient per colour. Reversible; nothing is tuned.

    Args:
        colours: The colour of each variable, numbers from 0 without gaps; None until the problem
            that is annealed fills them in.
        lattice: The coordinates to move, ``"binary"`` and ``"one-hot"`` only; likewise.

    Raises:
        ValueError: If a colour is missing or the lattice holds integers or another number of
            variables.

    Example:
        >>> from pyro_anneal.kernels import Block, Lattice
        >>> chain = Lattice(4, (Block("binary", 0, 4),))  # 0 - 1 - 2 - 3
        >>> ChromaticGibbs((0, 1, 0, 1), chain).num_gradients
        2
    """

    colours: tuple[int, ...] | None = None
    lattice: Lattice | None = None

    def __post_init__(self) -> None:
        if self.colours is not None and {*self.colours} != set(range(self._num_colours)):
            raise ValueError(f"colours must be numbers from 0 without gaps, got {self.colours}")
        if self.lattice is None:
            return
        kinds = {block.kind for block in self.lattice.blocks}
        if "integer" in kinds:
            raise ValueError(
                "ChromaticGibbs draws zeros, ones and categories, and the lattice holds integers: "
                "use DiscreteLangevin() for these"
            )
        if self.colours is not None and len(self.colours) != self.lattice.count:
            raise ValueError(
                f"ChromaticGibbs has {len(self.colours)} colours for "
                f"{self.lattice.count} discrete variables: give one for each"
            )

    @property
    def _num_colours(self) -> int:
        return 1 + max(self.colours or (0,))

    @property
    def num_gradients(self) -> int:
        """Gradients per transition: one per colour."""
        return self._num_colours

    @property
    def target_accept(self) -> float | None:
        """Nothing is steered."""
        return None

    def on(self, lattice: Lattice) -> ChromaticGibbs:
        """Returns the kernel that moves the coordinates of ``lattice``."""
        return replace(self, lattice=lattice)

    def declared_noise(self, state: State) -> tuple[Noise, ...]:
        """A uniform number per coordinate, one per colour's test, and one for the direction."""
        dim = state.position.shape[-1]
        return Noise("uniform", (dim,)), Noise("uniform", (self._num_colours,)), Noise("uniform")

    def step(
        self,
        state: State,
        density: Density,
        beta: Tensor,
        tuning: Tuning,
        noise: tuple[Tensor, ...],
    ) -> tuple[State, Info]:
        """Moves all chains once at inverse temperature ``beta``."""
        lattice = bound(self.lattice, self)
        each, tests, coin = noise
        colour_of = self._coordinates(lattice, state.position)
        last = self._num_colours - 1
        total = torch.zeros_like(state.log_base)
        failed = torch.zeros_like(state.log_base, dtype=torch.bool)
        for turn in range(last + 1):
            colour = torch.where(coin < 0.5, turn, last - turn).unsqueeze(-1)
            chosen = colour_of == colour
            here, grad = state.position, state.grad(beta)
            parts = [
                draw_conditional(block, block.take(grad), block.take(each))
                for block in lattice.blocks
            ]
            proposal = density(torch.where(chosen, lattice.replace(here, parts), here))
            there, back = proposal.position, proposal.grad(beta)
            log_accept = proposal.log_density(beta) - state.log_density(beta)
            for block in lattice.blocks:
                own = block.take(chosen)
                log_accept = log_accept + conditional_log_prob(
                    block, block.take(back), block.take(here), own
                )
                log_accept = log_accept - conditional_log_prob(
                    block, block.take(grad), block.take(there), own
                )
            state, accept_prob = accept(state, proposal, log_accept, tests[..., turn])
            total = total + accept_prob / (last + 1)
            failed = failed | log_accept.isnan()
        return state, Info(accept_prob=total, diverging=failed)

    def _coordinates(self, lattice: Lattice, like: Tensor) -> Tensor:
        """Finds the colour of each coordinate, -1 for those that stay, ``[dim]``."""
        if self.colours is None:
            raise ValueError(
                "ChromaticGibbs was given no colours: build it with colours=..., or hand it to "
                "AnnealedImportance, which colours the variables"
            )
        colours = torch.tensor((*self.colours, -1), dtype=torch.long, device=like.device)
        return colours[lattice.variables(like)]
