"""One file that holds tensors and plain Python values, and is never seen half written.

The file is a line with the format's name, a digest, and what :func:`torch.save` makes of a
dictionary. It is written beside its final place and moved there, so that a process killed at any
moment leaves either the old file or the new one. The digest finds what a file system lost later:
the readers of torch's own format do not check sums.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["load", "save", "to_host"]

_NAME = b"pyro_anneal checkpoint "
_HEADER = _NAME + b"1\n"
_DIGEST_SIZE = 32
# What torch.load gives back with weights_only=True, beside tensors and containers.
_PLAIN = (str, bytes, bool, int, float, type(None))


def to_host(content: Any) -> Any:
    """Copies the tensors in nested dictionaries, lists and tuples to the host's memory.

    A tensor that already lies there is shared, unless it is a view of something larger.
    """

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            assert type(leaf) in _PLAIN, f"{type(leaf)} could not be read back"
            return leaf
        leaf = leaf.detach().cpu()
        larger = leaf.untyped_storage().nbytes() > leaf.numel() * leaf.element_size()
        return leaf.clone() if larger else leaf

    return tree_map(copy, content)


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file in one step, as seen by every reader.

    Args:
        path: Where to write. A file ``path.tmp`` beside it is used on the way.
        content: Tensors, numbers, strings, in nested dictionaries, lists and tuples.
    """
    payload = io.BytesIO()
    torch.save(to_host(content), payload)
    digest = hashlib.blake2b(payload.getbuffer(), digest_size=_DIGEST_SIZE).digest()
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(_HEADER + digest)
        file.write(payload.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes the move itself last through a loss of power, where the system can do that."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load(path: Path) -> dict[str, Any]:
    """Reads a file that :func:`save` wrote; nothing in it is executed.

    Args:
        path: The file.

    Returns:
        The content, tensors on the host.

    Raises:
        ValueError: If the file is no checkpoint, of another format, truncated or corrupted.
    """
    with open(path, "rb") as file:
        raw = file.read()
    if not raw.startswith(_HEADER):
        what = "of another format" if raw.startswith(_NAME) else "no checkpoint of pyro_anneal"
        raise ValueError(f"{path} is {what}: name another file, or delete it to start anew")
    start = len(_HEADER) + _DIGEST_SIZE
    digest, payload = raw[len(_HEADER) : start], raw[start:]
    if hashlib.blake2b(payload, digest_size=_DIGEST_SIZE).digest() != digest:
        raise ValueError(
            f"the checkpoint {path} is truncated or corrupted ({len(raw)} bytes): restore a copy "
            "of it, or delete it to start anew"
        )
    try:
        content = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and plain values, so pyro_anneal did not write it: "
            "name another file"
        ) from error
    assert isinstance(content, dict)
    return content
