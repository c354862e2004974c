"""A digest of data, so that runs on different data are not compared by accident."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

__all__ = ["add_digests", "digest_of_data"]

_MASK = (1 << 64) - 1


def digest_of_data(observed: Mapping[str, Tensor]) -> str:
    r"""Computes a digest of the observed values, whatever their arrangement.

    Models of the same data may name their sites differently, observe a vector at once or one value
    at a time, and work in float32 or float64. So the digest is that of the values as a multiset,
    each rounded to float32:

    .. math:: \Bigl(N,\; \sum_{n=1}^N h(x_n) \bmod 2^{64}\Bigr)

    where h scrambles the 32 bits of a number into 64. It is a sum, hence that of several batches is
    the sum of theirs. Permutations of the data share their digest, other data do not, up to a
    chance of about :math:`2^{-64}`.

    Source: Steele, Lea, Flood (2014), *Fast splittable pseudorandom number generators*, for h (the
    finalizer of SplitMix64).

    Args:
        observed: Values by site.

    Returns:
        The number of values and the sum, as text; empty without any value.

    Example:
        >>> both = digest_of_data({"x": torch.tensor([1.0, 2.0])})
        >>> apart = {"a": torch.tensor(2.0).double(), "b": torch.tensor([[1.0]])}
        >>> digest_of_data(apart) == both
        True
        >>> digest_of_data({"x": torch.tensor([1.0, 2.5])}) == both
        False
    """
    count, total = 0, 0
    for value in observed.values():
        value = value.detach().cpu()
        value = torch.view_as_real(value) if value.is_complex() else value
        numbers = value.reshape(-1).double().numpy()
        numbers = np.where(np.isnan(numbers), np.nan, numbers + 0.0)  # one NaN, one zero
        with np.errstate(over="ignore"):
            count += numbers.size
            bits = numbers.astype(np.float32).view(np.uint32).astype(np.uint64)
            total += int(_scrambled(bits).sum(dtype=np.uint64))
    return f"{count}:{total & _MASK:016x}" if count else ""


def add_digests(digests: Iterable[str]) -> str:
    """Computes the digest of several sets of data together.

    Example:
        >>> parts = [digest_of_data({"x": torch.tensor([v])}) for v in (1.0, 2.0)]
        >>> add_digests(parts) == digest_of_data({"x": torch.tensor([2.0, 1.0])})
        True
    """
    count, total = 0, 0
    for digest in digests:
        if digest:
            number, _, rest = digest.partition(":")
            count, total = count + int(number), total + int(rest, 16)
    return f"{count}:{total & _MASK:016x}" if count else ""


def _scrambled(
    bits: np.ndarray[tuple[int, ...], np.dtype[np.uint64]],
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    """Applies one step of SplitMix64 to each number, modulo 2 ** 64."""
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
