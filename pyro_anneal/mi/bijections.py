"""Supports of z to unconstrained vectors, for chains that move z.

Where a density is normalized, and the map onto that set, is worked out by
:mod:`pyro_anneal.models.supports`: one period of an angle, the image of a base's support.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor

from ..models.coordinates import bijection
from ..models.discrete import is_discrete
from ..models.edges import exact_log_det

__all__ = ["Bijection", "FixedBijection", "check_continuous"]


class Bijection(ABC):
    """Maps z of shape ``[K, N, *event]`` to ``u [K, N, D]`` without constraints, and back."""

    @abstractmethod
    def unconstrain(self, z: Tensor) -> Tensor:
        """Maps z ``[K, N, *event]`` to u ``[K, N, D]``."""

    @abstractmethod
    def constrain(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Maps u ``[K, N, D]`` to z ``[K, N, *event]`` and log |dz/du| ``[K, N]``."""


def check_continuous(fn: Any) -> None:
    """Checks that chains can move on the support of a distribution.

    Raises:
        NotImplementedError: If it is discrete: gradients of chains do not exist there.
    """
    if is_discrete(fn):
        raise NotImplementedError(
            f"z has the discrete support {fn.support}, which gradient-based chains cannot "
            "move on; use BarberAgakov, GIWAE, IWAE or the contrastive bounds"
        )


class FixedBijection(Bijection):
    """Maps onto supports that depend on nothing that moves.

    Args:
        parts: Distribution and shape (after the rows) of each part that z is made of.
        event: Shape of z after the rows; that of the only part by default. Several parts are
            flattened and concatenated.

    Raises:
        NotImplementedError: If a support is discrete.

    Example:
        >>> positive = FixedBijection([(torch.distributions.Exponential(1.0), torch.Size([]))])
        >>> z, log_det = positive.constrain(torch.zeros(2, 3, 1))
        >>> z.shape, log_det.shape
        (torch.Size([2, 3]), torch.Size([2, 3]))
    """

    def __init__(
        self, parts: Sequence[tuple[Any, torch.Size]], *, event: torch.Size | None = None
    ) -> None:
        for fn, _ in parts:
            check_continuous(fn)
        self.event = parts[0][1] if event is None else event
        self.tails = [tail for _, tail in parts]
        self.transforms = [bijection(fn) for fn, _ in parts]

    def unconstrain(self, z: Tensor) -> Tensor:
        """Maps z ``[K, N, *event]`` to u ``[K, N, D]``."""
        z = z if z.is_floating_point() else z.to(torch.get_default_dtype())  # whole numbers
        lead = z.shape[:2]
        sizes = [math.prod(tail) for tail in self.tails]
        parts = z.reshape(*lead, -1).split(sizes, dim=-1)
        shaped = [part.reshape(lead + tail) for part, tail in zip(parts, self.tails, strict=True)]
        return torch.cat(
            [
                t.inv(part).reshape(*lead, -1)
                for t, part in zip(self.transforms, shaped, strict=True)
            ],
            dim=-1,
        )

    def constrain(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Maps u ``[K, N, D]`` to z ``[K, N, *event]`` and log |dz/du| ``[K, N]``."""
        lead = u.shape[:2]
        shapes = [
            t.inverse_shape(lead + tail)
            for t, tail in zip(self.transforms, self.tails, strict=True)
        ]
        sizes = [math.prod(shape[2:]) for shape in shapes]
        total = torch.zeros(lead, dtype=u.dtype, device=u.device)
        values = []
        for part, shape, transform in zip(
            u.split(sizes, dim=-1), shapes, self.transforms, strict=True
        ):
            unconstrained = part.reshape(shape)
            value = transform(unconstrained)
            log_det = exact_log_det(transform, unconstrained, value)
            total = total + sum_rightmost(log_det, log_det.dim() - 2)
            values.append(value.reshape(*lead, -1))
        return torch.cat(values, dim=-1).reshape(lead + self.event), total
