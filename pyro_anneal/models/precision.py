"""Running a model in float64 that was written in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["in_float64"]


class _Float64(TorchDispatchMode):
    """Computes every operation on float32 numbers in float64."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = pytree.tree_map(_wide, (args, kwargs or {}))
        return func(*args, **kwargs)


def _wide(value: Any) -> Any:
    if value is torch.float32:
        return torch.float64
    if isinstance(value, Tensor) and value.dtype is torch.float32:
        return value.to(torch.float64)
    return value


@contextmanager
def in_float64(active: bool = True) -> Iterator[None]:
    """Computes in float64 whatever runs inside: data, parameters and literals are widened.

    Args:
        active: Whether to do so.

    Example:
        >>> with in_float64():
        ...     print((torch.ones(2, dtype=torch.float32) / 3).dtype)
        torch.float64
    """
    if not active or any(isinstance(mode, _Float64) for mode in _modes()):
        yield
        return
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():  # type: ignore[no-untyped-call]
            yield
    finally:
        torch.set_default_dtype(default)


def _modes() -> list[Any]:
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    return list(_get_current_dispatch_mode_stack())
