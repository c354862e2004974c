"""Loaders of images, on tiny files that the tests write."""

import gzip
import struct
import sys

import numpy as np
import pytest
import torch
from scipy.io import savemat

from pyro_anneal.datasets import load_digits, load_mnist, load_omniglot


def _images(count, seed):
    return np.random.RandomState(seed).randint(0, 256, (count, 28, 28), dtype=np.uint8)


def _write_idx(path, images):
    content = struct.pack(">BBBB3I", 0, 0, 8, 3, *images.shape) + images.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


TRAIN, TEST = _images(5, 0), _images(3, 1)
EXPECTED = torch.from_numpy(TRAIN.reshape(5, 784) > 127.5).double()


def test_digits_split_without_overlap():
    digits = load_digits(297)
    assert digits.train.shape == (1500, 64)
    assert digits.test.shape == (297, 64)
    everything = torch.cat([digits.train, digits.test])
    assert set(everything.unique().tolist()) == {0.0, 1.0}
    other = load_digits(100, seed=3)  # the same images in another order
    assert everything.sum() == torch.cat([other.train, other.test]).sum()
    assert torch.equal(load_digits(297).test, digits.test)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("folder", [".", "MNIST/raw"])
def test_mnist_from_idx_files(tmp_path, suffix, folder):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    _write_idx(tmp_path / folder / f"train-images-idx3-ubyte{suffix}", TRAIN)
    _write_idx(tmp_path / folder / f"t10k-images-idx3-ubyte{suffix}", TEST)
    found = load_mnist(tmp_path)
    assert torch.equal(found.train, EXPECTED)
    assert found.test.shape == (3, 784)
    gray = load_mnist(tmp_path, binarize=False)
    assert torch.allclose(gray.test * 255, torch.from_numpy(TEST.reshape(3, -1)).double())


def test_mnist_from_npz(tmp_path):
    np.savez(tmp_path / "mnist.npz", x_train=TRAIN, x_test=TEST, y_train=np.zeros(5))
    assert torch.equal(load_mnist(tmp_path / "mnist.npz").train, EXPECTED)


def test_default_dtype(tmp_path):
    np.savez(tmp_path / "mnist.npz", x_train=TRAIN, x_test=TEST)
    torch.set_default_dtype(torch.float32)
    assert load_mnist(tmp_path / "mnist.npz").train.dtype == torch.float32


def test_mnist_from_openml_without_torchvision(monkeypatch):
    """Without torchvision, OpenML's 70,000 rows are cut as MNIST is."""
    pixels = np.zeros((70_000, 784))
    pixels[59_999:60_001, 0] = 255, 200
    asked = []

    def fetch_openml(name, **options):
        asked.append((name, options["version"]))
        return type("Bunch", (), {"data": pixels})

    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch_openml)
    found = load_mnist(download=True, binarize=False)
    assert asked == [("mnist_784", 1)]
    assert (found.train.shape, found.test.shape) == ((60_000, 784), (10_000, 784))
    assert found.train[-1, 0] == 1.0
    assert found.test[0, 0].item() == pytest.approx(200 / 255)


def test_omniglot_from_the_matlab_file(tmp_path):
    """The file of Burda et al. has images in columns, and strokes as ones."""
    strokes = (TRAIN > 127).astype(float)
    held_out = (TEST > 127).astype(float)
    content = {"data": strokes.reshape(5, 784).T, "testdata": held_out.reshape(3, 784).T}
    savemat(tmp_path / "chardata.mat", content)
    found = load_omniglot(tmp_path / "chardata.mat")
    assert torch.equal(found.train, EXPECTED)
    assert torch.equal(found.test, torch.from_numpy(held_out.reshape(3, 784)))


def test_omniglot_from_arrays(tmp_path):
    np.savez(tmp_path / "both.npz", background=TRAIN, evaluation=TEST)
    assert torch.equal(load_omniglot(tmp_path / "both.npz").train, EXPECTED)
    np.save(tmp_path / "one.npy", TRAIN)
    found = load_omniglot(tmp_path / "one.npy", num_test=2)
    assert torch.equal(torch.cat([found.train, found.test]), EXPECTED)
    assert len(found.test) == 2
    np.savez(tmp_path / "any.npz", images=TRAIN, labels=np.arange(5))
    assert torch.equal(load_omniglot(tmp_path / "any.npz", num_test=1).train, EXPECTED[:4])


def test_omniglot_is_reduced_by_averaging(monkeypatch, tmp_path):
    """Black strokes on white of 56 x 56 pixels become strokes of 1 on 28 x 28."""
    drawing = np.full((56, 56), 255, np.uint8)
    drawing[:2, :2] = 0  # one pixel of the reduced image
    drawing[2:4, 0] = 0  # half a pixel
    module = type(sys)("torchvision.datasets")
    module.Omniglot = lambda root, background, download: [(drawing, 0)] * (2 if background else 1)
    monkeypatch.setitem(sys.modules, "torchvision", type(sys)("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)
    found = load_omniglot(tmp_path, download=True, num_test=1, binarize=False)
    assert found.train.shape == (2, 784)
    expected = torch.zeros(28, 28)
    expected[0, 0], expected[1, 0] = 1.0, 0.5
    assert torch.allclose(found.train[0].reshape(28, 28), expected)


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="num_test must lie between 1 and 1796, got 0"):
        load_digits(0)
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
        load_mnist(tmp_path)
    with pytest.raises(FileNotFoundError, match="download=True"):
        load_omniglot()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"not idx")
    _write_idx(tmp_path / "t10k-images-idx3-ubyte", TEST)
    with pytest.raises(ValueError, match="no idx file"):
        load_mnist(tmp_path)
    whole = struct.pack(">BBBB3I", 0, 0, 8, 3, 5, 28, 28) + TRAIN.tobytes()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="announces shape"):
        load_mnist(tmp_path)
    np.savez(tmp_path / "no.npz", images=np.zeros((3, 5)))
    with pytest.raises(ValueError, match="expected images of 784 pixels"):
        load_omniglot(tmp_path / "no.npz")
    (tmp_path / "images.txt").write_text("")
    with pytest.raises(ValueError, match=r"none of \.npy, \.npz and \.mat"):
        load_omniglot(tmp_path / "images.txt")
    np.savez(tmp_path / "train.npz", x_train=TRAIN)
    with pytest.raises(ValueError, match="no test images"):
        load_mnist(tmp_path / "train.npz")
    with pytest.raises(ValueError, match="num_test must lie between 1 and 4"):
        load_omniglot(tmp_path / "train.npz", num_test=5)
    for name in ("torchvision", "torchvision.datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="needs torchvision"):
        load_omniglot(tmp_path, download=True)
