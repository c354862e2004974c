"""Results in one file each: tensors as NumPy arrays, all else as JSON, and nothing that executes.

A file is what :func:`numpy.savez` writes: a zip archive of arrays. The array ``result.json`` holds
text: the format's version, the name of the class, and its fields, where a tensor is a reference to
another array of the archive. So every file can be read without this package, and loading one never
unpickles anything. Tensors come back bit by bit, on the host.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import zipfile
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .._version import __version__
from ..models.types import Array

__all__ = ["load_result", "save_result", "stored"]

_FORMAT = "pyro_anneal result"
_VERSION = 1
_METADATA = "result.json"
_KINDS: dict[str, type] = {}
_T = TypeVar("_T", bound=type)


def stored(kind: _T) -> _T:
    """Registers a dataclass whose instances may be written to files.

    Fields whose metadata say ``{"saved": False}`` are left out, and have their default once loaded.
    """
    _KINDS[kind.__name__] = kind
    return kind


def save_result(result: Any, path: str | os.PathLike[str]) -> None:
    """Writes a result to a file in one step, so that no reader sees half of it.

    Args:
        result: An instance of a class that was registered by :func:`stored`.
        path: Where to write; an existing file is replaced.

    Raises:
        TypeError: If a field holds what can be neither JSON nor an array.
    """
    arrays: dict[str, Array] = {}
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "written by": __version__,
        "result": _encode(result, arrays, type(result).__name__),
    }
    text = json.dumps(content, allow_nan=False).encode()
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **{_METADATA: np.frombuffer(text, np.uint8)}, **arrays)
    os.replace(temporary, path)


def load_result(kind: type[Any], path: str | os.PathLike[str]) -> Any:
    """Reads a result that :func:`save_result` wrote.

    Args:
        kind: The class that the file must hold.
        path: The file.

    Returns:
        The result, with its tensors on the host.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, is no result, was written by a later version, or holds
            a result of another class.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # np.load would accept a bare array as well
            members = {name.removesuffix(".npy"): name for name in archive.namelist()}
            arrays = {key: _read(archive, name) for key, name in members.items()}
        content = json.loads(arrays.pop(_METADATA).tobytes())
    except FileNotFoundError:
        raise
    except (ValueError, KeyError, AttributeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{os.fspath(path)!r} holds no result of pyro_anneal, or is damaged: {error}"
        ) from error
    if content.get("format") != _FORMAT or content.get("version") != _VERSION:
        raise ValueError(
            f"{os.fspath(path)!r} was written by pyro_anneal {content.get('written by')} in version "
            f"{content.get('version')} of the format, this is {__version__} with version {_VERSION}"
        )
    found = content["result"]["class"]
    if found != kind.__name__:
        raise ValueError(f"{os.fspath(path)!r} holds a {found}: read it with {found}.load(path)")
    return _decode(content["result"], arrays)


def _read(archive: zipfile.ZipFile, name: str) -> Array:
    with archive.open(name) as member:
        array: Array = np.lib.format.read_array(member, allow_pickle=False)
    return array


def _encode(value: Any, arrays: dict[str, Array], where: str) -> object:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Tensor):
        return _encode_tensor(value, arrays, where)
    if isinstance(value, tuple | list):
        items = [_encode(item, arrays, f"{where}[{i}]") for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, dict):
        pairs = [[k, _encode(item, arrays, f"{where}[{k!r}]")] for k, item in value.items()]
        return {"dict": pairs}
    if type(value).__name__ in _KINDS:
        fields = {
            f.name: _encode(getattr(value, f.name), arrays, f"{where}.{f.name}")
            for f in dataclasses.fields(value)
            if f.metadata.get("saved", True)
        }
        return {"class": type(value).__name__, "fields": fields}
    raise TypeError(f"{where} is a {type(value).__name__}, which cannot be saved")


def _encode_tensor(value: Tensor, arrays: dict[str, Array], where: str) -> object:
    key = f"{len(arrays)} {where}".replace("/", "|")
    value = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    dtype = str(value.dtype).removeprefix("torch.")
    try:
        arrays[key] = value.numpy()
    except TypeError:  # bfloat16 and other types that NumPy lacks: their bytes
        arrays[key] = value.reshape(-1).view(torch.uint8).numpy()
    return {"tensor": key, "dtype": dtype, "shape": list(value.shape)}


def _decode(value: object, arrays: dict[str, Array]) -> Any:
    if isinstance(value, list):
        return [_decode(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    if "float" in value:
        return float(value["float"])
    if "tensor" in value:
        dtype = getattr(torch, value["dtype"])
        tensor = torch.from_numpy(np.array(arrays[value["tensor"]]))  # a writable copy
        return tensor if tensor.dtype == dtype else tensor.view(dtype).reshape(value["shape"])
    if "tuple" in value:
        return tuple(_decode(item, arrays) for item in value["tuple"])
    if "dict" in value:
        return {key: _decode(item, arrays) for key, item in value["dict"]}
    kind = _KINDS.get(value["class"])
    known = {f.name for f in dataclasses.fields(kind)} if kind is not None else set()
    unknown = sorted(set(value["fields"]) - known)
    if kind is None or unknown:
        raise ValueError(
            f"the file holds a {value['class']} with {unknown or 'its fields'}, which "
            f"pyro_anneal {__version__} does not know: it was written by a later version"
        )
    return kind(**{name: _decode(item, arrays) for name, item in value["fields"].items()})
