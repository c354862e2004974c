"""Running a model in float64 that was written in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .modes import DispatchMode

__all__ = ["in_float64"]


class _Float64(DispatchMode):
    """Computes every operation on float32 numbers in float64."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = {name: _wide(value) for name, value in (kwargs or {}).items()}
        return func(*map(_wide, args), **named)


def _wide(value: Any) -> Any:
    """Widens an argument of an operation, which is no deeper than a list of tensors."""
    if isinstance(value, Tensor):
        return value.to(torch.float64) if value.dtype is torch.float32 else value
    if isinstance(value, (list, tuple)):
        return [_wide(element) for element in value]
    return torch.float64 if value is torch.float32 else value


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
