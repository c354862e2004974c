"""Values of named sites, in the model's own space, as one tensor per row of a batch, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["Packing"]


class Packing:
    """Turns the values of named sites into one tensor per pair, and back.

    One site keeps its shape; several are flattened and concatenated in the order given.

    Args:
        tails: Shape of each site's value after the pair dimension.
        num_inner: How many dimensions of a tail, from the left, belong to plates inside a pair.
        dtypes: Of the values that sites draw: labels stay integers beside numbers, and what a
            Bernoulli sees is a float whatever the user's array holds.
    """

    def __init__(
        self,
        tails: dict[str, torch.Size],
        num_inner: int = 0,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        self.tails = tails
        self.dtypes = dict(dtypes or {})
        if len(tails) == 1:
            (tail,) = tails.values()
            kept = [size for size in tail[:num_inner] if size != 1]
            self.event = torch.Size(kept) + tail[num_inner:]
        else:
            self.event = torch.Size([sum(math.prod(tail) for tail in tails.values())])

    @property
    def names(self) -> list[str]:
        """Names of the sites, in order."""
        return list(self.tails)

    def pack(self, values: Mapping[str, Tensor], num_leading: int) -> Tensor:
        """Packs values ``[*leading, *tail]`` of the sites into ``[*leading, *event]``."""
        tensors = [values[name] for name in self.tails]
        lead = tensors[0].shape[:num_leading]
        if len(tensors) > 1:
            tensors = [torch.cat([t.reshape((*lead, -1)) for t in tensors], dim=-1)]
        return tensors[0].reshape(lead + self.event)

    def num_leading(self, packed: Tensor) -> int:
        """Counts the dimensions before the event: 1 for ``[N]``, 2 for ``[K, N]``."""
        count = packed.dim() - len(self.event)
        if count not in (1, 2) or packed.shape[count:] != self.event:
            raise ValueError(
                f"sites {self.names} hold {list(self.event)} per pair: expected shape [N, "
                f"{', '.join(map(str, self.event))}], got {list(packed.shape)}"
            )
        return count

    def _own(self, name: str, value: Tensor) -> Tensor:
        dtype = self.dtypes.get(name, value.dtype)
        kept = value.is_floating_point() and dtype.is_floating_point  # float64 data stay so
        return value if kept else value.to(dtype)

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """Unpacks ``[(K,) N, *event]`` into the values of the sites."""
        lead = packed.shape[: self.num_leading(packed)]
        sizes = [math.prod(tail) for tail in self.tails.values()]
        parts = packed.reshape((*lead, -1)).split(sizes, dim=-1)
        return {
            name: self._own(name, part.reshape(lead + tail))
            for (name, tail), part in zip(self.tails.items(), parts, strict=True)
        }
