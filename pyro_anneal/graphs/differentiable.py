"""Log densities of K chains as one graph that autograd differentiates, parameters included."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .evaluation import LogDensities, as_written
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
        ValueError: If the model has gradients of its own making, which a graph of values lacks.
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
        self._check_gradients(function, example, num_chains)

    @torch.enable_grad()
    def _check_gradients(self, function: LogDensities, example: Tensor, num_chains: int) -> None:
        """Compares gradients at the example with the model's, which ``autograd.Function`` may bend.

        ``pyro.ops.special.safe_log``, which sums over states of a hidden Markov model end in, is one:
        at a state of probability zero the gradient of its recorded ``log`` is NaN.
        """
        leaf = example.detach().clone().requires_grad_()
        position = leaf.expand(num_chains, *leaf.shape)
        inputs = [leaf, *(c for c in self.constants if c.is_leaf and c.requires_grad)]
        recorded = self(position, self.inputs({}))
        for ours, theirs in zip(recorded, _as_written(function, leaf), strict=True):
            try:
                wanted = _derivatives(theirs.sum(), inputs)
            except RuntimeError:  # the model's own can be differentiated once alone
                return
            found = _derivatives(ours.sum() / num_chains, inputs)
            for one, other in zip(found, wanted, strict=True):
                slack = 1e-6 + 1e-3 * float(other.detach().abs().max()) if other.numel() else 0.0
                if not torch.allclose(one, other, rtol=1e-2, atol=slack, equal_nan=True):
                    raise ValueError("the model's gradient is not that of its values")

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


def _as_written(function: LogDensities, position: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluates one chain through the model itself."""
    with as_written():
        return function(position)


def _derivatives(value: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Computes first derivatives, and those of the first by position, as training needs them."""
    first = _gradients(value, inputs)
    return first + _gradients(first[0].sum(), inputs)


def _gradients(value: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Computes gradients, zero where the value does not depend on an input."""
    if not value.requires_grad:
        return [torch.zeros_like(one) for one in inputs]
    found = torch.autograd.grad(value, inputs, create_graph=True, allow_unused=True)
    return [
        torch.zeros_like(one) if gradient is None else gradient
        for gradient, one in zip(found, inputs, strict=True)
    ]
