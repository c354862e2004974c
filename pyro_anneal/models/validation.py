"""Evaluating densities without the checks of arguments and values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pyro
from torch import Tensor
from torch.distributions import Distribution

__all__ = ["validation_disabled"]


def _accept_any(self: Distribution, value: Tensor) -> None:
    """Stands in for ``Distribution._validate_sample``."""


@contextmanager
def validation_disabled() -> Iterator[None]:
    """Turns off validation, also in distributions that were made while it was on.

    ``pyro.validation_enabled(False)`` reaches new distributions only: one that was expanded
    earlier, as the priors of ``PyroSample`` often are, keeps its own flag, and its checks branch
    on values of latents.
    """
    patch = mock.patch.object(Distribution, "_validate_sample", _accept_any)
    with pyro.validation_enabled(False), patch:
        yield
