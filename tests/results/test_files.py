import dataclasses
import json
import math
import zipfile

import numpy as np
import pytest
import torch
from example_results import S, example_results
from perfect_chains import make_run, simulate

from pyro_anneal import AnnealedRun


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert (
            torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) if a.numel() else a.shape == b.shape
        )
    elif dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            if field.metadata.get("saved", True):
                assert_same(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key, value in a.items():
            assert_same(value, b[key])
    elif isinstance(a, tuple | list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b or (math.isnan(a) and math.isnan(b))


@pytest.mark.parametrize("name", example_results())
def test_every_result_comes_back_bit_by_bit(name, tmp_path):
    result = example_results()[name]
    path = tmp_path / "a result"
    result.save(path)
    again = type(result).load(str(path))
    assert_same(result, again)
    assert repr(result) == repr(again)
    assert [p.name for p in tmp_path.iterdir()] == ["a result"]  # one file
    again.save(path)  # replaces, and a loaded result can be saved
    assert_same(result, type(result).load(path))


def test_a_file_is_plain_numpy_and_json(tmp_path):
    run = example_results()["run"]
    run.save(tmp_path / "run.npz")
    with np.load(tmp_path / "run.npz", allow_pickle=False) as archive:
        content = json.loads(archive["result.json"].tobytes())
        fields = content["result"]["fields"]
        assert content["result"]["class"] == "AnnealedRun"
        assert fields["kernel"] == "HMC(num_leapfrog=3)"
        weights = archive[fields["log_weights"]["tensor"]]
    np.testing.assert_array_equal(weights, run.log_weights.numpy())


def test_another_class_is_refused_by_name(tmp_path):
    results = example_results().values()
    for result in results:
        result.save(tmp_path / "x")
        for kind in {type(other) for other in results}:
            if kind is not type(result):
                with pytest.raises(ValueError, match=rf"{type(result).__name__}\.load\(path\)"):
                    kind.load(tmp_path / "x")


def test_other_files_and_other_versions_are_refused(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(FileNotFoundError):
        AnnealedRun.load(path)
    path.write_bytes(b"not a file of ours")
    with pytest.raises(ValueError, match="holds no result of pyro_anneal, or is damaged"):
        AnnealedRun.load(path)
    with open(path, "wb") as file:
        np.savez(file, a=np.zeros(3))
    with pytest.raises(ValueError, match="holds no result"):
        AnnealedRun.load(path)
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match="holds no result"):
        AnnealedRun.load(path)
    run = example_results()["run"]
    run.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        AnnealedRun.load(path)
    spot = whole.index(b"far behind")  # a byte that the archive's check sum covers
    path.write_bytes(whole[:spot] + b"X" + whole[spot + 1 :])
    with pytest.raises(ValueError, match="damaged"):
        AnnealedRun.load(path)
    path.write_bytes(whole)
    for change, message in (
        (lambda c: c.update(version=2), "in version 2 of the format"),
        (lambda c: c["result"]["fields"].update(new=1), r"with \['new'\].* later version"),
    ):
        path.write_bytes(_changed(path, change))
        with pytest.raises(ValueError, match=message):
            AnnealedRun.load(path)
        path.write_bytes(whole)


def _changed(path, change):
    with np.load(path, allow_pickle=False) as archive:
        arrays = dict(archive)
    content = json.loads(arrays["result.json"].tobytes())
    change(content)
    arrays["result.json"] = np.frombuffer(json.dumps(content).encode(), np.uint8)
    with open(path, "wb") as file:
        np.savez(file, **arrays)
    assert zipfile.is_zipfile(path)
    return path.read_bytes()


def test_nothing_that_executes_is_written(tmp_path):
    run = make_run(simulate(S)[0], kernel=print)
    with pytest.raises(TypeError, match=r"AnnealedRun.kernel is a builtin.*cannot be saved"):
        run.save(tmp_path / "x")
    assert not (tmp_path / "x").exists()
