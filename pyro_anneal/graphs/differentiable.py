"""Log densities of K chains as one graph that autograd differentiates, parameters included."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .evaluation import LogDensities
from .recording import batch, trace

__all__ = ["DifferentiableDensity"]


class DifferentiableDensity:
    """Both log densities of K chains, with gradients to positions, parameters and data.

    One chain is recorded without its gradients and vectorized over chains. What the graph reads
    (parameters, data) are live inputs, so that autograd reaches them at every call.

    Args:
        function: One chain's ``(log_base, log_target)``.
        example: Position of one chain, ``[*batch, D]``.
        num_chains: Number K of chains.

    Raises:
        Exception: Whatever recording or vectorizing raise; the density must then be evaluated chain
            by chain.
    """

    def __init__(self, function: LogDensities, example: Tensor, num_chains: int) -> None:
        with torch.no_grad():
            traced = trace(function, example.detach(), only_values=True)
            constants = [constant.detach() for constant in traced.constants]
            positions = example.detach().expand(num_chains, *example.shape).contiguous()
            batched = batch(traced.graph, positions, constants)
        self.graph: Callable[..., tuple[Tensor, Tensor]] = batched.graph
        self.constants = traced.constants
        self._own = batched.constants[len(constants) :]  # made while vectorizing

    def inputs(self, replacements: Mapping[Tensor, Tensor]) -> Sequence[Tensor]:
        """Returns what the graph reads besides positions, some of it replaced by other tensors.

        Args:
            replacements: New tensor by old one, known by identity.
        """
        new = {id(old): value for old, value in replacements.items()}
        return [*(new.get(id(value), value) for value in self.constants), *self._own]

    def __call__(self, position: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Evaluates log q and log p at positions ``[K, *batch, D]``, each ``[K, *batch]``."""
        log_base, log_target = self.graph(position, *inputs)
        return log_base, log_target
