"""What a learned reverse kernel of differentiable annealing predicts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..arguments import as_count

__all__ = ["ReverseScore"]


class ReverseScore(nn.Module):
    r"""Network :math:`s(u, v, \beta)` that corrects the mean of reversed momenta.

    A multilayer perceptron of position, momentum and temperature, shared by all rows of the batch.
    Its last layer starts at zero, so that training starts from the uncorrected kernel.

    Args:
        dim: Size D of the latents of one row in unconstrained space.
        hidden: Units of the hidden layers.

    Raises:
        ValueError: If a size is below 1.

    Example:
        >>> score = ReverseScore(3)
        >>> score(torch.ones(4, 3), torch.ones(4, 3), torch.tensor(0.5)).abs().sum().item()
        0.0
    """

    def __init__(self, dim: int, hidden: Sequence[int] = (64,)) -> None:
        super().__init__()
        sizes = [2 * as_count("dim", dim) + 1, *(as_count("hidden", size) for size in hidden)]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), nn.SiLU()]
        last = nn.Linear(sizes[-1], dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(*layers, last)

    def forward(self, position: Tensor, momentum: Tensor, beta: Tensor) -> Tensor:
        """Predicts the correction, in the shape ``[..., D]`` of the position."""
        column = beta.to(position).expand(*position.shape[:-1], 1)
        result: Tensor = self.net(torch.cat([position, momentum, column], -1))
        return result
