"""What is known about the joint distribution of x and z, behind one interface.

Three levels: joint samples only; samples and the marginal density p(z); samples and the full joint
density p(z) p(x|z). Tensors at this edge have the N pairs first, ``x [N, *x_event]`` and
``z [N, *z_event]``, with K particles in front where there are several per pair,
``z [K, N, *z_event]``; log densities come as ``[N]`` or ``[K, N]``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ..models.entropies import excess
from ..models.moving import log_prob_inside, supports_differ
from ..persistence.randomness import own_randomness
from .bijections import Bijection, FixedBijection

__all__ = ["DistributionJoint", "Joint", "Knowledge"]

Knowledge = Literal["joint samples", "marginal p(z)", "full joint p(x, z)"]


class Joint(ABC):
    """What is known about p(x, z).

    Attributes:
        knowledge: The level of knowledge.
    """

    knowledge: Knowledge

    @abstractmethod
    def sample(self, num_pairs: int) -> tuple[Tensor, Tensor]:
        """Draws N independent pairs, ``x [N, *x_event]`` and ``z [N, *z_event]``."""

    @abstractmethod
    def log_prior(self, z: Tensor, x: Tensor) -> Tensor:
        """Computes log p(z) of ``z [(K,) N, *z_event]``, in nats, shape ``[(K,) N]``.

        ``x [N, *x_event]`` tells only the number of rows and where N stands among the dimensions.
        """

    @abstractmethod
    def sample_prior(self, num_particles: int, x: Tensor) -> Tensor:
        """Draws K values of z per row of x, independent of it, shape ``[K, N, *z_event]``."""

    @abstractmethod
    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Computes log p(x|z) in nats, shape ``[(K,) N]``; -inf at particles at which x is impossible."""

    @abstractmethod
    def bijection(self, x: Tensor) -> Bijection:
        """Maps the support of z to unconstrained vectors."""

    def has_edges(self, x: Tensor) -> bool:
        """Tells whether the support of x depends on z, so that p(x|z) = 0 at some z."""
        return False

    def controls(self, x: Tensor, z: Tensor) -> Tensor:
        """Computes quantities of mean zero over pairs that were simulated from this joint.

        Args:
            x: Simulated data, ``[N, *x_event]``.
            z: The z of each, ``[N, *z_event]``.

        Returns:
            Control variates in nats, shape ``[C, N]``; none (C = 0) unless a joint knows better.
        """
        return torch.zeros((0, x.shape[0]))


class DistributionJoint(Joint):
    """Knows p(z) as a distribution, and p(x|z) as a distribution, a simulator, or not at all.

    Args:
        prior: The distribution of z, with an empty batch shape.
        likelihood: Maps ``z [*batch, *z_event]`` to the distribution of x, batch shape ``batch``.
        simulator: Maps ``z [N, *z_event]`` to random ``x [N, *x_event]``, where the likelihood is
            intractable. Needed only to draw pairs.

    Raises:
        ValueError: If ``prior`` has a batch shape, or both ``likelihood`` and ``simulator`` are
            given.

    Example:
        >>> prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> joint = DistributionJoint(prior, lambda z: dist.Normal(z.sum(-1), 1.0))
        >>> x, z = joint.sample(5)
        >>> x.shape, z.shape, joint.knowledge
        (torch.Size([5]), torch.Size([5, 2]), 'full joint p(x, z)')
    """

    def __init__(
        self,
        prior: Any,
        likelihood: Callable[[Tensor], Any] | None = None,
        *,
        simulator: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if prior.batch_shape:
            raise ValueError(
                f"the prior has batch shape {list(prior.batch_shape)}, expected []: it is the "
                "distribution of one z; use .to_event() for its dimensions"
            )
        if likelihood is not None and simulator is not None:
            raise ValueError("give a likelihood or a simulator, not both")
        self.prior = prior
        self.likelihood = likelihood
        self.simulator = simulator
        self._has_edges: bool | None = None  # until it is asked
        self.knowledge = "marginal p(z)" if likelihood is None else "full joint p(x, z)"

    def sample(self, num_pairs: int) -> tuple[Tensor, Tensor]:  # noqa: D102
        with torch.no_grad():
            z = self.prior.sample((num_pairs,))
            if self.likelihood is not None:
                return self.likelihood(z).sample(), z
            if self.simulator is not None:
                return self.simulator(z), z
        raise ValueError(
            "pairs cannot be simulated from a prior alone: pass x and z, or give the joint a "
            "likelihood or a simulator"
        )

    def log_prior(self, z: Tensor, x: Tensor) -> Tensor:  # noqa: D102
        event = self.prior.event_shape
        batch = z.shape[: z.dim() - len(event)]
        if batch + event != z.shape or len(batch) not in (1, 2) or batch[-1] != x.shape[0]:
            raise ValueError(
                f"z has shape {list(z.shape)}, but the prior is over values of shape {list(event)}: "
                "expected [N, *z_event]; use .to_event() for the dimensions of z"
            )
        return self.prior.log_prob(z)  # type: ignore[no-any-return]

    def sample_prior(self, num_particles: int, x: Tensor) -> Tensor:  # noqa: D102
        return self.prior.sample((num_particles, x.shape[0]))  # type: ignore[no-any-return]

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:  # noqa: D102
        if self.likelihood is None:
            raise ValueError("log p(x|z) is not known: the joint was given no likelihood")
        fn = self.likelihood(z)
        if not x.is_floating_point():  # labels and counts, which some families subtract from
            x = x.to(z.dtype if z.is_floating_point() else torch.get_default_dtype())
        if x.shape[1:] != fn.event_shape:
            raise ValueError(
                f"x has shape {list(x.shape)}, but the likelihood is over values of shape "
                f"{list(fn.event_shape)}: expected [N, *x_event]; use .to_event() for the dimensions "
                "of x, or drop an axis of one element"
            )
        is_particles = z.dim() - len(self.prior.event_shape) == 2
        guarded = is_particles and self.has_edges(x)  # a pair's own z is an error there
        value = log_prob_inside(fn, x) if guarded else fn.log_prob(x)
        expected = z.shape[: z.dim() - len(self.prior.event_shape)]
        if value.shape != expected:
            raise ValueError(
                f"log p(x|z) has shape {list(value.shape)}, expected {list(expected)} for z of "
                f"shape {list(z.shape)} and x of shape {list(x.shape)}; use .to_event() for the "
                "dimensions of x"
            )
        return value

    def has_edges(self, x: Tensor) -> bool:  # noqa: D102
        if self._has_edges is None and self.likelihood is not None:
            with torch.no_grad(), own_randomness(0):
                first, second = (self.likelihood(self.prior.sample((2,))) for _ in range(2))
            self._has_edges = supports_differ(first, second, x.device)
        return bool(self._has_edges)

    def bijection(self, x: Tensor) -> Bijection:  # noqa: D102
        return FixedBijection([(self.prior, self.prior.event_shape)])

    def controls(self, x: Tensor, z: Tensor) -> Tensor:
        """Computes ``log p(z) + H(z)`` and ``log p(x|z) + H(x|z)`` where the entropies are known."""
        terms = [excess(self.prior, z)]
        if self.likelihood is not None:
            terms.append(excess(self.likelihood(z), x))
        known = [term for term in terms if term is not None]
        return torch.stack(known) if known else super().controls(x, z)
