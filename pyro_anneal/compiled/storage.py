"""How the tensors of a compiled step are stored: chains last or first, packed, repeated ones once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..chains.path import StepTable
from ..graphs.repetition import narrowed, repeated_dims

__all__ = [
    "Shared",
    "StorageLayout",
    "Template",
    "by_dtype",
    "pack",
    "store_table",
    "unpack",
]

# Shared tensors up to this size are packed into one buffer.
_PACK_UP_TO = 4096
# With chains first, a short row that repeats would split one long loop into loops over its length:
# it is stored as often as it repeats, unless that takes too many numbers.
_SHORT_ROW = 64
_STORE_REPEATED_UP_TO = 2**18


class Template(NamedTuple):
    """Shape without the dimension of chains last, and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Shared(NamedTuple):
    """How a tensor that all chains and steps share is stored: nothing twice but short rows."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    repeated: tuple[int, ...]  # dimensions along which one number repeats
    transposed: bool  # columns of a matrix as rows

    @classmethod
    def of(cls, tensor: Tensor, *, transposed: bool, chains_last: bool) -> Shared:
        """Describes a tensor."""
        repeated = repeated_dims(tensor)
        if repeated and not chains_last and tensor.dim() - 1 not in repeated:
            is_short = tensor.shape[-1] < _SHORT_ROW and tensor.numel() <= _STORE_REPEATED_UP_TO
            repeated = () if is_short else repeated
        return cls(tuple(tensor.shape), tensor.dtype, repeated, transposed and not repeated)

    @property
    def stored_shape(self) -> torch.Size:
        """Shape without repetitions."""
        sizes = enumerate(self.shape)
        stored = [1 if dim in self.repeated else size for dim, size in sizes]
        return torch.Size(stored[::-1] if self.transposed else stored)

    @property
    def small(self) -> bool:
        """Whether it is packed with others."""
        return self.stored_shape.numel() <= _PACK_UP_TO

    def store(self, tensor: Tensor) -> Tensor:
        """Drops repetitions."""
        tensor = narrowed(tensor, self.repeated)
        return tensor.mT if self.transposed else tensor

    def load(self, stored: Tensor) -> Tensor:
        """Inverts :meth:`store`."""
        stored = stored.reshape(self.stored_shape)
        return stored.mT if self.transposed else stored.expand(self.shape)


@dataclass(frozen=True)
class StorageLayout:
    """How tensors are stored between steps.

    Attributes:
        last: Whether chains are the last dimension, and tensors of one dtype share a buffer.
        count: Number K of chains.
        carried: State, log-weights and integral, one chain each if chains are last.
        noise: Likewise, the noise of one step.
        shared: What all chains and steps share.
    """

    last: bool
    count: int
    carried: tuple[Template, ...]
    noise: tuple[Template, ...]
    shared: tuple[Shared, ...]

    def store(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Turns tensors with chains first into what a loop carries."""
        if not self.last:
            return [tensor.contiguous() for tensor in tensors]
        return pack([tensor.movedim(0, -1) for tensor in tensors], self.count)

    def load(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """Turns what a loop carried into tensors with chains first."""
        if not self.last:
            return list(buffers)
        tensors = unpack(buffers, self.carried, self.count)
        return [tensor.movedim(-1, 0).contiguous() for tensor in tensors]

    def store_noise(self, parts: Sequence[Tensor], size: int) -> list[Tensor]:
        """Turns noise, ``[n, K, ...]`` of n steps, into tables of ``size`` rows, one per step."""
        if not self.last:
            return [_padded(part, size) for part in parts]
        tables, steps = [], len(parts[0])
        for group in by_dtype([template.dtype for template in self.noise]):
            rows = [parts[i].movedim(1, -1).reshape(steps, -1, self.count) for i in group]
            table = rows[0].new_empty(size, sum(x.shape[1] for x in rows), self.count)
            torch.cat(rows, 1, out=table[:steps])
            tables.append(table)
        return tables

    def store_shared(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Packs the small ones of the tensors that all chains share."""
        pairs = list(zip(self.shared, tensors, strict=True))
        small = [how.store(tensor) for how, tensor in pairs if how.small]
        return [
            *pack(small, 1),
            *(how.store(tensor).contiguous() for how, tensor in pairs if not how.small),
        ]

    def load_shared(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """Inverts :meth:`store_shared`."""
        small = [Template(how.stored_shape, how.dtype) for how in self.shared if how.small]
        packed = len(by_dtype([template.dtype for template in small]))
        unpacked = iter(unpack(buffers[:packed], small, 1))
        large = iter(buffers[packed:])
        return [how.load(next(unpacked if how.small else large)) for how in self.shared]


def by_dtype(dtypes: Sequence[torch.dtype]) -> list[list[int]]:
    """Groups positions of a sequence by dtype, in order of appearance."""
    groups: dict[torch.dtype, list[int]] = {}
    for index, dtype in enumerate(dtypes):
        groups.setdefault(dtype, []).append(index)
    return list(groups.values())


def pack(tensors: Sequence[Tensor], count: int) -> list[Tensor]:
    """Joins tensors ``[*shape, count]`` of one dtype into ``[rows, count]``."""
    groups = by_dtype([tensor.dtype for tensor in tensors])
    return [torch.cat([tensors[i].reshape(-1, count) for i in group]) for group in groups]


def unpack(buffers: Sequence[Tensor], templates: Sequence[Template], count: int) -> list[Tensor]:
    """Inverts :func:`pack`."""
    tensors: dict[int, Tensor] = {}
    groups = by_dtype([template.dtype for template in templates])
    for buffer, group in zip(buffers, groups, strict=True):
        row = 0
        for index in group:
            shape = templates[index].shape
            rows = torch.Size(shape).numel()
            tensors[index] = buffer[row : row + rows].reshape(*shape, count)
            row += rows
    return [tensors[index] for index in range(len(templates))]


def _padded(tensor: Tensor, size: int) -> Tensor:
    if len(tensor) == size:
        return tensor.contiguous()
    table = tensor.new_empty(size, *tensor.shape[1:])  # nobody reads the rest
    table[: len(tensor)] = tensor
    return table


def store_table(table: StepTable, size: int) -> list[Tensor]:
    """Packs a table of steps into one tensor per dtype, ``[size, columns]``."""
    count = len(table.beta)
    tuning = [table.beta, table.step_size, table.scale]
    return [
        _padded(torch.cat([part.reshape(count, -1) for part in parts], 1), size)
        for parts in (tuning, [table.width, table.quadrature])
    ]
