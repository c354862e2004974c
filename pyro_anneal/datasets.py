"""Small real data that needs no download: scikit-learn's bundled digits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Digits", "load_digits"]


class Digits(NamedTuple):
    """Binarized 8 x 8 digits, pixels as 0.0 and 1.0."""

    train: Tensor  # [N, 64]
    test: Tensor  # [M, 64]


def load_digits(num_test: int = 297, *, seed: int = 0) -> Digits:
    """Loads the optical recognition digits of scikit-learn, pixels binarized at half intensity.

    Source: Alpaydin and Kaynak (1998), UCI repository, as bundled with scikit-learn.

    Args:
        num_test: Held-out digits, of 1797.
        seed: Seed of the split.

    Returns:
        Training and held-out digits in the default dtype.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If ``num_test`` is out of range.

    Example:
        >>> load_digits().train.shape
        torch.Size([1500, 64])
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn: pip install 'pyro-anneal[demo]'"
        ) from error
    if not 0 < num_test < 1797:
        raise ValueError(f"num_test must lie between 1 and 1796, got {num_test}")
    images = torch.from_numpy(load().data)
    pixels = (images > 7.5).to(torch.get_default_dtype())
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    return Digits(train=pixels[order[num_test:]], test=pixels[order[:num_test]])
