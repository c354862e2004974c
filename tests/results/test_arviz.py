import dataclasses
import sys
import warnings

import numpy as np
import pytest
import torch
from perfect_chains import make_run, make_sandwich, simulate

from pyro_anneal.results.arviz import to_arviz, to_data_tree, to_datasets, to_inference_data

xarray = pytest.importorskip("xarray")
with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    arviz = pytest.importorskip("arviz")

S = [1.8, 0.6]
GROUPS = {"posterior", "sample_stats", "observed_data", "annealing", "evidence"}


@pytest.fixture
def run():
    run = make_run(simulate(S, (3,))[0], num_chains=4, num_steps=6)
    return dataclasses.replace(run, site_plates={"z": ("data",), "x": ("data",)})


@pytest.fixture
def sandwich():
    return make_sandwich(S, (2, 3), num_chains=4, num_steps=6)[0]


def test_groups_dims_and_values(run):
    groups = to_datasets(run)
    assert set(groups) == GROUPS
    z = groups["posterior"]["z"]
    assert z.dims == ("chain", "draw", "data", "z_dim_1")
    np.testing.assert_array_equal(z.values[0], run.posterior["z"].numpy())
    stats = groups["sample_stats"]
    assert stats["log_weight"].dims == ("chain", "draw", "data")
    np.testing.assert_array_equal(stats["log_weight"].values[0], run.log_weights.numpy())
    assert stats["acceptance_rate"].dims == ("chain", "draw")
    np.testing.assert_allclose(stats["acceptance_rate"].values, 0.75)
    assert groups["observed_data"]["x"].dims == ("data", "x_dim_1")
    evidence = groups["evidence"]
    assert evidence["lower"].dims == ("data",)
    np.testing.assert_array_equal(evidence["lower"].values, run.lower.numpy())
    np.testing.assert_array_equal(evidence["ess"].values, run.ess.numpy())
    assert "upper" not in evidence


def test_curves_sit_at_their_betas(run):
    annealing = to_datasets(run)["annealing"]
    betas = run.betas.numpy()
    np.testing.assert_array_equal(annealing["betas"].values, betas)
    np.testing.assert_array_equal(annealing["transition_beta"].values, betas[1:-1])
    np.testing.assert_array_equal(annealing["increment_beta"].values, betas[:-1])
    half = annealing["mean_log_ratio"].sel(increment_beta=0.5).item()
    assert half == run.mean_log_ratio[3].item()


def test_reverse_run_has_no_posterior_and_takes_increments_at_the_colder_beta():
    problem, z = simulate(S, (3,))
    run = make_run(problem, num_chains=4, num_steps=6, start=z, certified=False)
    groups = to_datasets(run, resample=True)
    assert "posterior" not in groups
    np.testing.assert_array_equal(
        groups["annealing"]["increment_beta"].values, run.betas[1:].numpy()
    )
    assert groups["evidence"].attrs["certified"] == 0
    np.testing.assert_array_equal(groups["evidence"]["upper"].values, run.upper.numpy())
    np.testing.assert_array_equal(
        groups["sample_stats"]["log_weight"].values[0], run.log_weights.numpy()
    )


def test_plates_of_size_one_and_inner_plates_keep_their_place():
    run = make_run(
        simulate(S)[0],
        num_chains=2,
        log_weights=torch.zeros(2, 3),
        log_evidence_ti=torch.zeros(2, 3),
        plates={"data": 3},
        posterior={"inner": torch.zeros(2, 5, 3), "shared": torch.zeros(2, 1, 4)},
        site_plates={"inner": ("group", "data"), "shared": ("data",)},
    )
    posterior = to_datasets(run)["posterior"]
    assert posterior["inner"].dims == ("chain", "draw", "group", "data")
    assert posterior["shared"].dims == ("chain", "draw", "shared_dim_0", "shared_dim_1")


def test_resampled_posterior_weighs_the_same(run):
    groups = to_datasets(run, resample=True, seed=5)
    expected = run.resample(4, seed=5)["z"].numpy()
    np.testing.assert_array_equal(groups["posterior"]["z"].values[0], expected)
    assert "log_weight" not in groups["sample_stats"]
    assert groups["posterior"].attrs["resampled"] == 1
    assert to_datasets(run)["posterior"].attrs["resampled"] == 0


def test_sandwich_holds_both_directions(sandwich):
    groups = to_datasets(sandwich)
    assert set(groups) == GROUPS
    assert groups["posterior"]["z"].dims == ("chain", "draw", "simulation", "data", "z_dim_2")
    evidence = groups["evidence"]
    assert evidence["upper"].dims == ("simulation", "data")
    for name, bound in sandwich.bounds.items():
        np.testing.assert_array_equal(evidence[name.replace(" ", "_")].values, bound.numpy())
    np.testing.assert_array_equal(evidence["gap"].values, sandwich.gap.numpy())
    backward = groups["sample_stats"]["log_weight_reverse"]
    assert backward.dims == ("chain", "reverse_draw", "simulation", "data")
    np.testing.assert_array_equal(backward.values[0], sandwich.reverse.log_weights.numpy())
    annealing = groups["annealing"]
    end = annealing["mean_log_ratio_reverse"].sel(reverse_increment_beta=1.0).item()
    assert end == sandwich.reverse.mean_log_ratio[-1].item()
    start = annealing["mean_log_ratio"].sel(increment_beta=0.0).item()
    assert start == sandwich.forward.mean_log_ratio[0].item()
    np.testing.assert_array_equal(
        groups["observed_data"]["x"].values, sandwich.simulated["x"].numpy()
    )
    assert all(dataset.attrs["simulated_data"] == 1 for dataset in groups.values())


@pytest.mark.parametrize("kind", ["run", "sandwich", "single step"])
def test_data_tree_and_its_netcdf(kind, run, sandwich, tmp_path):
    result = {"run": run, "sandwich": sandwich}.get(kind) or make_run(simulate(S)[0], num_steps=1)
    datasets = to_datasets(result)
    tree = to_data_tree(datasets)
    assert isinstance(tree, xarray.DataTree)
    assert set(tree.children) == set(datasets)
    xarray.testing.assert_identical(tree["posterior"].to_dataset(), datasets["posterior"])
    pytest.importorskip("h5netcdf", reason="the file needs h5netcdf")
    pytest.importorskip("h5py", reason="h5netcdf needs h5py to write")
    tree.to_netcdf(tmp_path / "run.nc", engine="h5netcdf")
    with xarray.open_datatree(tmp_path / "run.nc", engine="h5netcdf") as stored:
        np.testing.assert_array_equal(
            stored["evidence"]["lower"].values, datasets["evidence"]["lower"].values
        )


@pytest.mark.skipif("InferenceData" not in vars(arviz), reason="ArviZ 1 has no InferenceData")
def test_inference_data_works_with_arviz(run):
    data = run.to_arviz()
    assert isinstance(data, arviz.InferenceData)
    assert set(data.groups()) == GROUPS
    resampled = run.to_arviz(resample=True, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ on few draws
        table = arviz.summary(resampled, kind="stats")
    expected = run.resample(4, seed=1)["z"].mean(0).numpy()
    np.testing.assert_allclose(table["mean"].values, expected.reshape(-1), atol=5e-3)


def test_the_installed_arviz_decides(run, monkeypatch):
    class NewArviz:  # has no InferenceData
        pass

    monkeypatch.setitem(sys.modules, "arviz", NewArviz())
    assert isinstance(to_arviz(run), xarray.DataTree)

    class AliasingArviz:
        InferenceData = xarray.DataTree

    monkeypatch.setitem(sys.modules, "arviz", AliasingArviz())
    assert isinstance(to_arviz(run), xarray.DataTree)


@pytest.mark.parametrize("package", ["arviz", "xarray"])
def test_absence_names_the_extra(run, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ImportError, match=rf"package {package}: pip install 'pyro-anneal\[arviz\]'"
    ):
        to_arviz(run)
    if package == "arviz":  # the datasets themselves need xarray only
        assert set(to_datasets(run)) == GROUPS
    else:
        with pytest.raises(ImportError, match="package xarray"):
            to_inference_data(to_datasets(run))
