"""Random streams that are functions of keys, and torch's global generators, saved and restored."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = [
    "derived_seed",
    "draw_seed",
    "own_randomness",
    "random_state",
    "seeded_generator",
    "seeded_if",
    "set_random_state",
]


def derived_seed(*keys: object) -> int:
    """Computes a seed in [0, 2^63) from keys, the same in every process."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seeded_generator(device: torch.device, *keys: object) -> torch.Generator:
    """Makes a generator whose stream is a function of the keys alone."""
    return torch.Generator(device=device).manual_seed(derived_seed(*keys))


def draw_seed() -> int:
    """Draws a seed from torch's global generator."""
    return int(torch.randint(2**31, (), device="cpu").item())


def _cuda_devices() -> range:
    return range(torch.cuda.device_count()) if torch.cuda.is_initialized() else range(0)


@contextlib.contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Seeds torch inside, and leaves the global generators as they were."""
    # gradients inside torch.inference_mode() would fail
    with torch.random.fork_rng(devices=_cuda_devices()), torch.inference_mode(False):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def seeded_if(seed: int | None) -> Iterator[None]:
    """Seeds torch inside as :func:`own_randomness` does; None leaves all as it is."""
    with contextlib.nullcontext() if seed is None else own_randomness(seed):
        yield


def random_state() -> list[Tensor]:
    """Reads the states of torch's global generators, the CPU's first."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in _cuda_devices())]


def set_random_state(states: Sequence[Tensor]) -> None:
    """Puts back what :func:`random_state` read."""
    torch.set_rng_state(states[0])
    for device, state in zip(_cuda_devices(), states[1:], strict=False):
        torch.cuda.set_rng_state(state, device)
