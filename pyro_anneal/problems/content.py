"""What a computation on a captured density depends on, by content, so that it is made once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from ..graphs.recorded import RecordedDensity
from ..persistence.fingerprints import describe

__all__ = ["Remembered", "content_of"]

Value = TypeVar("Value")


def content_of(density: RecordedDensity, *options: object) -> tuple[str, ...] | None:
    """Describes a captured density by content: its operations, and all tensors that they read.

    Args:
        density: The captured density.
        options: What else the computation depends on, told apart by ``repr``.

    Returns:
        The description; None without a recorded graph, whose numbers may come from anywhere.
    """
    if density.code is None:
        return None
    example = density.example
    tensors = [
        f"no numbers, {list(constant.shape)}" if constant.is_meta else describe(constant)
        for constant in density.constants
    ]
    kind = (tuple(example.shape), example.dtype, str(example.device), density.mode)
    return density.code, repr((kind, torch.get_num_threads(), options)), repr(tensors)


class Remembered(Generic[Value]):
    """Values by content, the last few.

    Args:
        size: Number of values to keep.

    Example:
        >>> remembered = Remembered(size=2)
        >>> remembered.get(("a",), lambda: 1), remembered.get(("a",), lambda: 2)
        (1, 1)
        >>> remembered.get(None, lambda: 2)
        2
    """

    def __init__(self, size: int = 16) -> None:
        self.size = size
        self._values: OrderedDict[tuple[str, ...], Value] = OrderedDict()

    def get(self, content: tuple[str, ...] | None, compute: Callable[[], Value]) -> Value:
        """Returns the value of this content, computed the first time; always without content."""
        if content is None:
            return compute()
        if content not in self._values:
            self._values[content] = compute()
            while len(self._values) > self.size:
                self._values.popitem(last=False)
        self._values.move_to_end(content)
        return self._values[content]
