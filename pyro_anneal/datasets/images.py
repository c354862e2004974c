"""Images to try things on: scikit-learn's digits, which need no download, MNIST and Omniglot."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..models.types import Array

__all__ = ["Digits", "load_digits", "load_mnist", "load_omniglot"]

_MNIST_FILES = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")
# Of each Omniglot file format, the names under which it is passed around.
_TRAIN_KEYS, _TEST_KEYS = (
    ("train", "data", "x_train", "background"),
    (
        "test",
        "testdata",
        "x_test",
        "evaluation",
    ),
)


class Digits(NamedTuple):
    """Images as flat rows: binary pixels are 0.0 and 1.0, others intensities in [0, 1]."""

    train: Tensor  # [N, pixels]
    test: Tensor  # [M, pixels]


def load_digits(num_test: int = 297, *, seed: int = 0) -> Digits:
    """Loads the optical recognition digits of scikit-learn, pixels binarized at half intensity.

    Source: Alpaydin and Kaynak (1998), UCI repository, as bundled with scikit-learn.

    Args:
        num_test: Held-out digits, of 1797.
        seed: Seed of the split.

    Returns:
        Training and held-out digits of 8 x 8 pixels in the default dtype.

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


def load_mnist(
    path: str | Path | None = None, *, download: bool = False, binarize: bool = True
) -> Digits:
    """Loads MNIST, 60,000 training and 10,000 test images of 28 x 28 pixels.

    Source: LeCun, Cortes and Burges, *The MNIST database of handwritten digits*.

    Args:
        path: A folder with the idx files ``train-images-idx3-ubyte`` and ``t10k-images-idx3-ubyte``
            (or ``.gz``, also below ``MNIST/raw``, where torchvision puts them), or an ``.npz`` file
            with ``x_train`` and ``x_test``.
        download: Whether to fetch what ``path`` does not have: with torchvision, into ``path``, if
            it is installed, else from OpenML with scikit-learn.
        binarize: Whether to round pixels at half intensity; otherwise they are in [0, 1].

    Returns:
        Training and test images, ``[N, 784]``, in the default dtype.

    Raises:
        FileNotFoundError: If there is nothing at ``path`` and ``download`` is False.
        ImportError: If ``download`` has neither torchvision nor scikit-learn.
        ValueError: If a file is not what its name says.

    Example:
        >>> load_mnist("nowhere")
        Traceback (most recent call last):
        FileNotFoundError: no MNIST at nowhere: ...
    """
    train, test = _find_mnist(path) or _fetch_mnist(path, download=download)
    return Digits(*(_as_rows(images, binarize) for images in (train, test)))


def load_omniglot(
    path: str | Path | None = None,
    *,
    num_test: int = 8070,
    download: bool = False,
    binarize: bool = True,
) -> Digits:
    """Loads Omniglot, 32,460 handwritten characters, as 28 x 28 pixels.

    Strokes are 1. Files that hold one set of images are split in their order, the last ``num_test``
    for the test; the file of Burda et al. (2016), ``chardata.mat``, has its own split.

    Source: Lake, Salakhutdinov and Tenenbaum (2015), *Human-level concept learning through
    probabilistic program induction*.

    Args:
        path: An ``.npz`` or ``.mat`` file with images, or an ``.npy`` file, or a folder for
            torchvision.
        num_test: Test images, where the file has no split.
        download: Whether to fetch the original drawings by torchvision into ``path``; they are
            reduced to 28 x 28 by averaging.
        binarize: Whether to round pixels at half intensity; otherwise they are in [0, 1].

    Returns:
        Training and test images, ``[N, 784]``, in the default dtype.

    Raises:
        FileNotFoundError: If there is nothing at ``path`` and ``download`` is False.
        ImportError: If a ``.mat`` file is read without scipy, or ``download`` has no torchvision.
        ValueError: If the file holds no images, or fewer than ``num_test``.

    Example:
        >>> load_omniglot("nowhere.mat")
        Traceback (most recent call last):
        FileNotFoundError: no Omniglot at nowhere.mat: ...
    """
    file = None if path is None else Path(path)
    if file is not None and file.is_file():
        images, test = _read_arrays(file)
    elif download:
        images, test = _fetch_omniglot(file or Path("data")), None
    else:
        raise FileNotFoundError(
            f"no Omniglot at {path}: pass the path of a .mat, .npz or .npy file, or download=True"
        )
    if test is None:
        if not 0 < num_test < len(images):
            raise ValueError(
                f"num_test must lie between 1 and {len(images) - 1}, the images of {path} less "
                f"one, got {num_test}"
            )
        images, test = images[:-num_test], images[-num_test:]
    return Digits(*(_as_rows(part, binarize) for part in (images, test)))


def _as_rows(images: Array, binarize: bool) -> Tensor:
    """Flattens images and scales integers to [0, 1]."""
    largest = 255.0 if images.dtype == np.uint8 and images.max(initial=0) > 1 else 1.0
    rows = torch.from_numpy(np.array(images.reshape(len(images), -1)))  # a copy: writable
    rows = rows.to(torch.get_default_dtype()) / largest
    return (rows > 0.5).to(rows.dtype) if binarize else rows


def _read_idx(path: Path) -> Array:
    """Reads an idx file of bytes, plain or gzipped."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        content = file.read()
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is no idx file of unsigned bytes")
    dims = content[3]
    shape = struct.unpack(f">{dims}I", content[4 : 4 + 4 * dims])
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dims)
    if values.size != int(np.prod(shape)):
        raise ValueError(f"{path} announces shape {list(shape)} but holds {values.size} bytes")
    return values.reshape(shape)


def _find_mnist(
    path: str | Path | None,
) -> tuple[Array, Array] | None:
    if path is None:
        return None
    root = Path(path)
    if root.is_file():
        train, test = _read_arrays(root)
        if test is None:
            raise ValueError(f"{root} has no test images: expected arrays x_train and x_test")
        return train, test
    for folder in (root, root / "MNIST" / "raw"):
        found = []
        for name in _MNIST_FILES:
            # Some copies have a dot where others have a dash.
            names = (name, f"{name}.gz", name.replace("-idx", ".idx"))
            found += [file for n in names if (file := folder / n).is_file()][:1]
        if len(found) == 2:
            return _read_idx(found[0]), _read_idx(found[1])
    return None


def _fetch_mnist(path: str | Path | None, *, download: bool) -> tuple[Array, Array]:
    if not download:
        raise FileNotFoundError(
            f"no MNIST at {path}: pass the folder of {' and '.join(_MNIST_FILES)} (or .gz), an "
            ".npz file, or download=True"
        )
    try:
        from torchvision.datasets import MNIST
    except ImportError:
        return _fetch_openml()
    root = str(path or "data")
    train, test = (MNIST(root, train=part, download=True).data.numpy() for part in (True, False))
    return train, test


def _fetch_openml() -> tuple[Array, Array]:
    try:
        from sklearn.datasets import fetch_openml
    except ImportError as error:
        raise ImportError(
            "downloading MNIST needs torchvision, or scikit-learn: pip install 'pyro-anneal[demo]'"
        ) from error
    images = fetch_openml("mnist_784", version=1, as_frame=False).data.astype(np.uint8)
    return images[:60_000], images[60_000:]


def _fetch_omniglot(root: Path) -> Array:
    try:
        from torchvision.datasets import Omniglot
    except ImportError as error:
        raise ImportError(
            "downloading Omniglot needs torchvision: pip install torchvision"
        ) from error
    parts = [
        np.stack([np.asarray(image) for image, _ in Omniglot(str(root), part, download=True)])
        for part in (True, False)
    ]
    drawings = torch.from_numpy(255 - np.concatenate(parts)).float()  # strokes become 255
    reduced = torch.nn.functional.adaptive_avg_pool2d(drawings, 28)
    return (reduced / 255.0).numpy()


def _read_arrays(path: Path) -> tuple[Array, Array | None]:
    """Reads images, and test images where the file has them, from ``.npy``, ``.npz`` or ``.mat``."""
    if path.suffix == ".npy":
        return np.load(path), None
    if path.suffix == ".mat":
        try:
            from scipy.io import loadmat
        except ImportError as error:
            raise ImportError("reading .mat files needs scipy: pip install scipy") from error
        # MATLAB counts images in columns.
        arrays = {k: v.T for k, v in loadmat(path).items() if not k.startswith("__")}
    elif path.suffix == ".npz":
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
    else:
        raise ValueError(f"{path} is none of .npy, .npz and .mat")
    train = next((arrays[key] for key in _TRAIN_KEYS if key in arrays), None)
    test = next((arrays[key] for key in _TEST_KEYS if key in arrays), None)
    if train is None:
        images = [value for value in arrays.values() if value.ndim >= 2 and value[0].size == 784]
        if len(images) != 1:
            raise ValueError(
                f"{path} holds {sorted(arrays)}: expected images of 784 pixels as one of "
                f"{list(_TRAIN_KEYS)}"
            )
        train = images[0]
    return train, test
