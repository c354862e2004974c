"""Computing numbers that repeat along a dimension once.

A scale that all rows of the data share is expanded to their shape, then squared, inverted, its
logarithm taken. Elementwise operations commute with the expansion: done before it, they cost
nothing, and nothing is stored or read once per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["ComputeOnce", "WrittenTo", "narrowed", "repeated_dims"]

aten = torch.ops.aten

# These need strides that fit; with another layout of the same numbers they would have to copy.
_VIEWS = (aten.view.default, aten._unsafe_view.default)
# These read the storage itself.
_LAYOUT_BOUND = (aten.as_strided.default, aten.as_strided_scatter.default, aten.view.dtype)


def repeated_dims(tensor: Tensor) -> tuple[int, ...]:
    """Lists the dimensions along which a tensor is known to repeat one number from its strides."""
    sizes = enumerate(zip(tensor.shape, tensor.stride(), strict=True))
    return tuple(dim for dim, (size, stride) in sizes if size > 1 and stride == 0)


def narrowed(tensor: Tensor, dims: Sequence[int]) -> Tensor:
    """Takes the first of the numbers that repeat along each of ``dims``."""
    for dim in dims:
        tensor = tensor.narrow(dim, 0, 1)
    return tensor


class WrittenTo(Exception):
    """The code writes into a result that is an expanded view here."""


class ComputeOnce(TorchDispatchMode):
    """Runs elementwise operations before the expansion of their arguments.

    For code without autograd that does not look at strides.

    Raises:
        WrittenTo: At an operation that writes into a tensor in which numbers repeat.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Handles one operation."""
        kwargs = kwargs or {}
        if func._schema.is_mutable and any(map(repeated_dims, _written(func, args, kwargs))):
            raise WrittenTo(str(func))
        if func in _VIEWS:
            return args[0].reshape(args[1])
        if func in _LAYOUT_BOUND:
            return func(args[0].contiguous(), *args[1:], **kwargs)
        if func is aten.full.default:
            return func([1] * len(args[0]), *args[1:], **kwargs).expand(args[0])
        if not _is_elementwise(func):
            return func(*args, **kwargs)
        tensors = _tensors(args, kwargs)
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
        once = [-dim for dim in range(1, len(shape) + 1) if _repeats(tensors, shape, -dim)]
        if not once:
            return func(*args, **kwargs)

        def first(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return narrowed(value, [dim for dim in once if -dim <= value.dim()])

        args, kwargs = pytree.tree_map(first, (args, kwargs))
        result = func(*args, **kwargs)
        return pytree.tree_map_only(Tensor, lambda part: part.expand(shape), result)


def _tensors(*arguments: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]


def _written(func: Any, args: tuple[Any, ...], kwargs: Any) -> list[Tensor]:
    arguments = func._schema.arguments
    named = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
    into = [x.name for x in arguments if x.alias_info is not None and x.alias_info.is_write]
    return _tensors([named[name] for name in into if name in named])


def _is_elementwise(func: Any) -> bool:
    tags = func.tags
    if torch.Tag.pointwise not in tags and func is not aten._to_copy.default:
        return False
    return not (func._schema.is_mutable or torch.Tag.nondeterministic_seeded in tags)


def _repeats(tensors: Sequence[Tensor], shape: Sequence[int], dim: int) -> bool:
    """Tells whether every tensor is the same along ``dim`` of the shape they broadcast to."""
    if shape[dim] <= 1:
        return False
    return all(
        -dim > tensor.dim() or tensor.shape[dim] == 1 or tensor.stride(dim) == 0
        for tensor in tensors
    )
