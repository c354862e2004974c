"""A bar over batches or epochs, silenced as those of annealing are."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.std import TqdmWarning

from ..arguments import bars_are_silenced

with warnings.catch_warnings():  # notebooks without ipywidgets get bars of text, without advice
    warnings.simplefilter("ignore", TqdmWarning)
    from tqdm.auto import tqdm

__all__ = ["progress_over"]

Item = TypeVar("Item")


def progress_over(
    label: str, items: Iterable[Item], visible: bool, total: int | None = None
) -> Iterator[Item]:
    """Iterates over items and shows a bar, unless ``PYRO_ANNEAL_PROGRESS=0`` silences it.

    Example:
        >>> list(progress_over("epochs", range(3), False))
        [0, 1, 2]
    """
    if not visible or bars_are_silenced():
        return iter(items)
    return iter(tqdm(items, total=total, desc=label))
