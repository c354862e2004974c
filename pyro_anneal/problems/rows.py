"""Rows of positions evaluated at the target, their Hessian-vector products, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels import Density

__all__ = ["Rows", "is_dear", "rows_at_once"]

# Positions of one evaluation, by the size of the data that each of them reads: while a model is
# small, rows cost nothing beside the call itself; a million data make each row cost by itself.
_MANY_ROWS, _FEW_ROWS = 128, 8
_SMALL_DATA, _LARGE_DATA = 10_000, 200_000


def rows_at_once(density: object, dim: int) -> int:
    """Chooses how many positions one evaluation of the fit takes.

    Args:
        density: The captured density; its constants are parameters and data.
        dim: Dimensions D of a position.

    Returns:
        Rows per evaluation.
    """
    size = sum(constant.numel() for constant in getattr(density, "constants", ()))
    if size <= _SMALL_DATA and dim <= _MANY_ROWS:
        return _MANY_ROWS
    return 32 if size <= _LARGE_DATA else _FEW_ROWS


def is_dear(density: Any, dim: int) -> bool:
    """Tells whether each position costs by itself, so that few should be evaluated.

    Args:
        density: The captured density.
        dim: Dimensions D of a position.
    """
    return rows_at_once(density, dim) <= _FEW_ROWS


class Rows:
    """Evaluates the target at rows of positions, a fixed number at once, and counts them.

    Args:
        density: Evaluates positions ``[K, *batch, D]``; only the target side is used.
        size: Rows per call, so that one graph serves all; the last call is filled up.
        batch_rank: Number of batch dimensions.
    """

    def __init__(self, density: Density, size: int, batch_rank: int) -> None:
        self.density = density
        self.size = size
        self.batch_rank = batch_rank
        self.count = 0
        self._product: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def is_dear(self) -> bool:
        """Tells whether each row costs by itself, so that few should be evaluated."""
        return self.size <= _FEW_ROWS

    def __call__(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluates log p ``[*lead, *batch]`` and its gradient at ``[*lead, *batch, D]``.

        Whatever stands before the batch are rows. NaN counts as no density at all, a gradient
        that is not finite as zero.
        """
        lead = position.shape[: position.dim() - self.batch_rank - 1]
        flat = position.reshape(-1, *position.shape[len(lead) :])
        values, grads = [], []
        for piece in self._pieces(flat):
            state = self.density(piece)
            values.append(state.log_target)
            grads.append(state.grad_target)
        self.count += self.size * len(values)
        value, grad = torch.cat(values)[: len(flat)], torch.cat(grads)[: len(flat)]
        value = torch.where(value.isnan(), -torch.inf, value)
        grad = torch.where(grad.isfinite(), grad, 0.0)
        return value.reshape(*lead, *value.shape[1:]), grad.reshape(*lead, *grad.shape[1:])

    def products(self, position: Tensor, vectors: Tensor) -> Tensor:
        """Multiplies the Hessian of log p at ``[*lead, *batch, D]`` by ``vectors`` of that shape.

        The recorded gradient is differentiated once more; where that cannot be done, gradients on
        both sides are subtracted.
        """
        tail = position.shape[position.dim() - self.batch_rank - 1 :]
        flat, along = position.reshape(-1, *tail), vectors.reshape(-1, *tail)
        if self._product is None:
            self._product = self._choose(flat, along)
        pieces = zip(self._pieces(flat), self._pieces(along), strict=True)
        products = [self._product(piece, vector) for piece, vector in pieces]
        product = torch.cat(products)[: len(flat)]
        return torch.where(product.isfinite(), product, 0.0).reshape(position.shape)

    def _pieces(self, position: Tensor) -> tuple[Tensor, ...]:
        filler = position[:1].expand(-len(position) % self.size, *position.shape[1:])
        pieces: tuple[Tensor, ...] = torch.cat([position, filler]).split(self.size)
        return pieces

    def _choose(self, position: Tensor, vectors: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Takes the exact product if there is one, and if it agrees with differences."""
        exact = _exact_product(self.density, self.size)
        if exact is None:
            return self._difference
        piece, vector = self._pieces(position)[0], self._pieces(vectors)[0]
        try:
            product = exact(piece, vector)
        except Exception:  # noqa: BLE001 - an operation without a second derivative
            return self._difference
        other = self._difference(piece, vector)
        error = (product - other).norm() / other.norm().clamp(min=1e-30)
        return self._counted(exact) if float(error) < 1e-2 else self._difference

    def _counted(
        self, exact: Callable[[Tensor, Tensor], Tensor]
    ) -> Callable[[Tensor, Tensor], Tensor]:
        def product(position: Tensor, vectors: Tensor) -> Tensor:
            self.count += 2 * self.size
            return exact(position, vectors)

        return product

    def _difference(self, position: Tensor, vectors: Tensor) -> Tensor:
        unit = 1e-5 if position.dtype == torch.float64 else 3e-3
        size = (vectors.abs() / (1.0 + position.abs())).amax(-1, keepdim=True)
        width = unit / size.clamp(min=torch.finfo(position.dtype).tiny)
        above, below = self(position + width * vectors)[1], self(position - width * vectors)[1]
        return (above - below) / (2.0 * width)


def _exact_product(density: Any, size: int) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Differentiates the recorded gradient of ``size`` rows; None without a graph."""
    if getattr(density, "mode", "eager") not in ("graph", "compiled"):
        return None
    graph, inputs = density.graph_and_inputs(size)

    def product(position: Tensor, vectors: Tensor) -> Tensor:
        with torch.enable_grad():
            moved = position.detach().clone().requires_grad_(True)
            gradient = graph(moved, *inputs)[3]
            return torch.autograd.grad(gradient, moved, vectors)[0].detach()

    return product
