import dataclasses
import json
import math
import zipfile

import numpy as np
import pytest
import torch
from perfect_chains import make_run, make_sandwich, simulate

from pyro_anneal import (
    AnnealedRun,
    Comparison,
    Diagnostic,
    EvidenceOfBatches,
    MutualInformation,
    Sandwich,
    compare,
)
from pyro_anneal.results import Provenance

S = [1.8, 0.6]
FOUND = Diagnostic(name="lag", severity="warning", message="far behind", value=math.inf)


def results():
    problem, z = simulate(S, (3,))
    odd = {  # dtypes that NumPy has and has not, sizes of zero, site names with all signs
        "half/site 'a'": torch.randn(4, 3).to(torch.bfloat16),
        "": torch.tensor([True, False]),
        "complex": torch.randn(2, dtype=torch.complex128),
        "none": torch.zeros(0, 3, dtype=torch.int8),
        "turned": torch.arange(6.0).reshape(2, 3).T,
    }
    provenance = Provenance(task="run", seed=3, kernel="HMC()", seconds={"total": 0.1 + 0.2})
    run = make_run(problem, diagnostics=(FOUND,), provenance=provenance, observed=odd)
    weights = run.log_weights.clone()
    weights[0, 0] = -math.inf
    sandwich, _ = make_sandwich(S, (2, 3))
    batches = EvidenceOfBatches(
        **{name: torch.randn(5) for name in ("lower", "single", "std_error", "ess")},
        batch_sizes=(3, 2),
        num_chains=4,
        num_steps=5,
        num_gradients=9,
        seconds=0.3,
        seed=1,
        notes=("a note",),
        data_digest="5:0",
    )
    information = MutualInformation.from_sandwich(sandwich)
    return [
        run,
        dataclasses.replace(run, log_weights=weights, pilot=None, seed=None),
        make_run(problem, start=z, certified=False),
        sandwich,
        batches,
        dataclasses.replace(
            information, measurements={"x": torch.tensor(2.0)}, ceiling=math.log(3)
        ),
        compare({"a": run, "b": run}, prior_odds=[1, 3]),
    ]


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


@pytest.mark.parametrize("index", range(7))
def test_every_result_comes_back_bit_by_bit(index, tmp_path):
    result = results()[index]
    path = tmp_path / "a result"
    result.save(path)
    again = type(result).load(str(path))
    assert_same(result, again)
    assert repr(result) == repr(again)
    assert [p.name for p in tmp_path.iterdir()] == ["a result"]  # one file
    again.save(path)  # replaces, and a loaded result can be saved
    assert_same(result, type(result).load(path))


def test_a_file_is_plain_numpy_and_json(tmp_path):
    run = results()[0]
    run.save(tmp_path / "run.npz")
    with np.load(tmp_path / "run.npz", allow_pickle=False) as archive:
        content = json.loads(archive["result.json"].tobytes())
        fields = content["result"]["fields"]
        assert content["result"]["class"] == "AnnealedRun"
        assert fields["kernel"] == "HMC(num_leapfrog=3)"
        weights = archive[fields["log_weights"]["tensor"]]
    np.testing.assert_array_equal(weights, run.log_weights.numpy())


def test_another_class_is_refused_by_name(tmp_path):
    for result in results()[2:]:
        result.save(tmp_path / "x")
        kinds = (AnnealedRun, Sandwich, EvidenceOfBatches, MutualInformation, Comparison)
        for kind in kinds:
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
    run = results()[0]
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
