r"""Both ends of the annealing path as log densities of one flat unconstrained vector.

For one chain at ``u`` of shape ``[*batch, D]`` each latent site is ``z = b(u)``. All densities are
with respect to u:

.. math::
    \log p(x, u) = \log p(x, z) + \log |\partial z / \partial u|, \qquad
    \log q(u) = \log q(z) + \log |\partial z / \partial u|

The base q is the prior, a guide, or a Gaussian in u; a mask in the guide is ignored, as one on the
model's latents is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..models.density import Arguments, ModelDensity, ModelEvaluation
from ..models.precision import in_float64
from ..models.sites import Layout
from ..models.validation import validation_disabled
from .components import Component
from .exchangeable import Symmetry
from .guide_base import GuideBase

__all__ = [
    "Arguments",
    "Base",
    "DrawsChains",
    "FittedBase",
    "GuideBase",
    "MixtureBase",
    "ModelDensity",
    "ModelEvaluation",
    "PathDensity",
    "PriorBase",
    "StandardNormalBase",
]


class Base(Protocol):
    """A normalized density to start from."""

    def draw(self) -> Tensor:
        """Draws ``u`` of shape ``[*batch, D]`` for one chain."""
        ...

    def log_prob(self, evaluation: ModelEvaluation, position: Tensor) -> Tensor:
        """Computes log q(u), shape ``[*batch]``."""
        ...


@runtime_checkable
class DrawsChains(Protocol):
    """A base that draws many chains by itself."""

    def draw_chains(self, num_chains: int) -> Tensor:
        """Draws positions ``[K, *batch, D]``."""
        ...


class PriorBase:
    """Starts from the model's prior, enumerated sites summed out."""

    def __init__(self, model: ModelDensity) -> None:
        self.model = model

    def draw(self) -> Tensor:
        """Draws from the prior."""
        return self.model.draw_prior()

    def log_prob(self, evaluation: ModelEvaluation, position: Tensor) -> Tensor:
        """Computes the log prior density of u."""
        return evaluation.log_prior + evaluation.total_log_det


class StandardNormalBase:
    """Starts from a standard normal in unconstrained space, whatever the prior."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def draw(self) -> Tensor:
        """Draws from the standard normal."""
        layout = self.layout
        shape = (*layout.batch_shape, layout.dim)
        return torch.randn(shape, dtype=layout.dtype, device=layout.device)

    def log_prob(self, evaluation: ModelEvaluation, position: Tensor) -> Tensor:
        """Computes the standard normal's log density at u."""
        normalizer = -0.5 * position.shape[-1] * math.log(2.0 * math.pi)
        return normalizer - 0.5 * position.square().sum(-1)


class FittedBase:
    r"""Starts from what was fitted in unconstrained space: a mixture of components.

    .. math:: \log q(u) = \log \sum_j \pi_j q_j(u)

    Args:
        components: Normalized densities.
        log_weights: Their log weights ``[J]``, in nats; they are normalized here.
        symmetry: Permutations over which the mixture is averaged.
    """

    def __init__(
        self,
        components: Sequence[Component],
        log_weights: Tensor | None = None,
        symmetry: Symmetry | None = None,
    ) -> None:
        self.components = tuple(components)
        self.symmetry = symmetry
        self.elements = [] if symmetry is None else symmetry.elements()
        if log_weights is None:
            log_weights = torch.zeros(len(self.components), device="cpu")
        self.log_weights = log_weights.double().log_softmax(0).tolist()

    def draw(self) -> Tensor:
        """Draws from the mixture, all batch elements from one component."""
        position = torch.stack([component.draw() for component in self.components])
        if len(self.components) > 1:  # without a number of Python, for all chains at once
            weights = torch.tensor(self.log_weights, dtype=torch.float64).exp()
            index = torch.multinomial(weights.to(position.device), 1)
            position = position.index_select(0, index)
        position = position.squeeze(0)
        if self.symmetry is None:
            return position
        element = int(torch.randint(len(self.elements), ()))
        return self.symmetry.act([self.elements[element]], position)[0][0]

    def log_prob(self, evaluation: ModelEvaluation, position: Tensor) -> Tensor:
        """Computes the mixture's log density at u."""
        return self.log_density(position)

    def log_density(self, position: Tensor) -> Tensor:
        """Computes log q(u) of ``u`` alone, shape ``[*batch]``."""
        if self.symmetry is None:
            return self._log_density(position.unsqueeze(0))[0]
        rows, log_jacobian = self.symmetry.act(self.elements, position)
        terms = self._log_density(rows) + log_jacobian
        return terms.logsumexp(0) - math.log(len(self.elements))

    def log_density_of_rows(self, position: Tensor) -> Tensor:
        """Computes log q at rows ``[P, *batch, D]``, shape ``[P, *batch]``."""
        if self.symmetry is None:
            return self._log_density(position)
        return torch.stack([self.log_density(row) for row in position])

    def _log_density(self, position: Tensor) -> Tensor:
        """Computes log q at rows ``[P, *batch, D]``, shape ``[P, *batch]``."""
        if len(self.components) == 1:
            return self.components[0].log_density(position)
        terms = [
            component.log_density(position) + log_weight
            for component, log_weight in zip(self.components, self.log_weights, strict=True)
        ]
        return torch.stack(terms).logsumexp(0)


class MixtureBase:
    r"""Starts from a mixture, ``(1 - weight) first + weight second``: a defensive start.

    A fitted base has light tails and one mode; a little of the prior in it reaches modes that the
    fit missed. The mixture is normalized, so weights and bounds keep their guarantees.

    Source: Hesterberg (1995), *Weighted average importance sampling and defensive mixture
    distributions*.
    """

    def __init__(self, first: Base, second: Base, weight: float) -> None:
        self.first = first
        self.second = second
        self.weight = weight

    def draw(self) -> Tensor:
        """Draws from the mixture, each batch element from a component of its own."""
        return self.mix(self.first.draw(), self.second.draw())

    def mix(self, first: Tensor, second: Tensor) -> Tensor:
        """Takes each batch element of each chain from one of two draws, ``[..., *batch, D]``."""
        take = torch.rand(first.shape[:-1], device=first.device) < self.weight
        return torch.where(take.unsqueeze(-1), second, first)

    def log_prob(self, evaluation: ModelEvaluation, position: Tensor) -> Tensor:
        """Computes the mixture's log density at u."""
        return torch.logaddexp(
            math.log1p(-self.weight) + self.first.log_prob(evaluation, position),
            math.log(self.weight) + self.second.log_prob(evaluation, position),
        )


class PathDensity:
    """Both ends of the path for one chain: ``u`` to ``(log q(u), log p(x, u))``."""

    def __init__(self, model: ModelDensity, base: Base) -> None:
        self.model = model
        self.base = base

    def context(self) -> AbstractContextManager[object]:
        """Makes the context in which densities and their gradients are to be computed."""
        return in_float64(self.model.layout.wide)

    def __call__(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluates ``u`` of shape ``[*batch, D]`` to two tensors of shape ``[*batch]``."""
        with validation_disabled(), self.context():
            evaluation = self.model.evaluate(position)
            log_base = self.base.log_prob(evaluation, position)
        return log_base, evaluation.log_joint + evaluation.total_log_det
