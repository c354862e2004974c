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
from ..problems.problem import Problem

__all__ = ["describe", "describe_arguments", "describe_problem", "versions"]

Fingerprint = dict[str, str]


def _digest(*parts: bytes) -> str:
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
        return f"{kind} {_digest(_tensor_bytes(value))}"
    if isinstance(value, np.ndarray):
        content = repr(value.tolist()) if value.dtype.hasobject else value.tobytes().hex()
        return f"{value.dtype}{list(value.shape)} {_digest(content.encode())}"
    if isinstance(value, nn.Module):
        named = [*value.named_parameters(), *value.named_buffers()]
        content = "".join(f"{name}: {describe(tensor)}\n" for name, tensor in named)
        return f"{type(value).__qualname__} {_digest(content.encode())}"
    is_record = dataclasses.is_dataclass(value) and not isinstance(value, type)
    if value is None or is_record or isinstance(value, bool | int | float | complex | str | bytes):
        text = re.sub(r" at 0x[0-9a-f]+", "", repr(value))
        return text if len(text) < 200 else f"{text[:100]}... {_digest(text.encode())}"
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


def describe_problem(problem: Problem) -> Fingerprint:
    """Describes the densities of a problem: sites, data, the recorded graph and what it reads.

    Where there is no graph, the densities' values at the unconstrained origin stand for it.
    """
    layout, density = problem.layout, problem.density
    plates = ", ".join(f"{plate.name}={plate.size}" for plate in layout.batch)
    found = {
        "batch plates": plates or "none",
        "dtype": str(layout.dtype),
        "device": layout.device.type,
        "enumerated sites": ", ".join(layout.enumerated) or "none",
        "poutine.scale": repr(layout.scale),
    }
    for site in layout.sites:
        kind = type(site.transform).__name__
        found[f'latent site "{site.name}"'] = f"{site.dtype} {list(site.value_shape)} {kind}"
    for name, value in layout.observed.items():
        found[f'data at site "{name}"'] = describe(value)
    if density.code is not None:
        found["operations of the density"] = _digest(density.code.encode())
        tensors = [describe(constant) for constant in density.constants]
        found["tensors that the density reads (parameters, data, guide)"] = (
            f"{len(tensors)}, {_digest(repr(tensors).encode())}"
        )
        return found
    origin = torch.zeros(*layout.batch_shape, layout.dim, dtype=layout.dtype, device=layout.device)
    with torch.no_grad():
        state = density(origin.unsqueeze(0))
    found["densities at the origin"] = _digest(repr([describe(v) for v in state]).encode())
    return found


def versions() -> Fingerprint:
    """Describes the software that computes."""
    return {"version of pyro_anneal": __version__, "version of torch": str(torch.__version__)}
