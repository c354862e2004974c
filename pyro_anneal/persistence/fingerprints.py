"""What a run depends on, as short texts by name, so that two runs can be compared."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._version import __version__

__all__ = ["Fingerprint", "describe", "describe_arguments", "digest", "versions"]

Fingerprint = dict[str, str]


def digest(*parts: bytes) -> str:
    """Digests bytes into 16 hexadecimal digits."""
    hasher = hashlib.blake2b(digest_size=8)
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little") + part)
    return hasher.hexdigest()


def _tensor_bytes(value: Tensor) -> bytes:
    dense = value.detach().cpu().to_dense() if value.layout != torch.strided else value.detach()
    raw = dense.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    return raw.numpy().tobytes()


def describe(value: Any) -> str:
    """Describes a value by a text that is the same in every process.

    Tensors, arrays and modules are described by all of their content; objects of other kinds by
    their type, or by their representation where it holds no address.

    Example:
        >>> describe(torch.zeros(2, dtype=torch.float64)) == describe(torch.ones(2).double())
        False
        >>> describe(0.5)
        '0.5'
    """
    if isinstance(value, Tensor):
        kind = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        return f"{kind} {digest(_tensor_bytes(value))}"
    if isinstance(value, np.ndarray):
        content = repr(value.tolist()) if value.dtype.hasobject else value.tobytes().hex()
        return f"{value.dtype}{list(value.shape)} {digest(content.encode())}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(describe(entry) for entry in value)}]"
    if isinstance(value, nn.Module):
        named = [*value.named_parameters(), *value.named_buffers()]
        content = "".join(f"{name}: {describe(tensor)}\n" for name, tensor in named)
        return f"{type(value).__qualname__} {digest(content.encode())}"
    is_record = dataclasses.is_dataclass(value) and not isinstance(value, type)
    if value is None or is_record or isinstance(value, bool | int | float | complex | str | bytes):
        text = re.sub(r" at 0x[0-9a-f]+", "", repr(value))
        return text if len(text) < 200 else f"{text[:100]}... {digest(text.encode())}"
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def describe_arguments(arguments: tuple[tuple[Any, ...], Mapping[str, Any]]) -> Fingerprint:
    """Describes each tensor and number in nested arguments of a model.

    Example:
        >>> describe_arguments(((1.5,), {"flag": True}))
        {'argument args[0]': '1.5', "argument kwargs['flag']": 'True'}
    """
    args, kwargs = arguments
    found = {}
    for name, part in (("args", args), ("kwargs", dict(kwargs))):
        leaves, _ = pytree.tree_flatten_with_path(part)
        for path, leaf in leaves:
            found[f"argument {name}{pytree.keystr(path)}"] = describe(leaf)
    return found


def versions() -> Fingerprint:
    """Describes the software that computes."""
    return {"version of pyro_anneal": __version__, "version of torch": str(torch.__version__)}
