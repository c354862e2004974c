"""The script for GPUs, as far as it runs without one."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from pyro_anneal import HMC

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("without_cuda")
def test_without_cuda_it_says_so_and_runs_its_checks(script, tmp_path, capsys):
    output = tmp_path / "gpu.json"
    results = script.main(["--output", str(output)])
    assert "no CUDA device" in capsys.readouterr().out
    assert not output.exists()  # figures of a CPU must not pass for those of a GPU
    assert results["device"] == "cpu only"
    assert results["agreement"] == {"largest_difference_nats": 0.0, "agrees": True}
    assert results["synchronization"] == {"steps": 250, "count": 0, "first": []}
    assert results["step_is_finite"]


@pytest.mark.usefixtures("without_cuda")
def test_a_disagreement_fails(script, monkeypatch, tmp_path):
    kernels = iter([HMC(2), HMC(3)])
    monkeypatch.setattr(script, "shared_noise", lambda _: next(kernels))
    with pytest.raises(SystemExit, match="disagree"):
        script.main(["--output", str(tmp_path / "gpu.json")])


def test_shared_noise_continues_its_stream_and_repeats_it(script):
    """Two kernels give the same numbers; one kernel never gives the same numbers twice."""
    size, device = script.TINY, torch.device("cpu")
    state = script.density_of(size, torch.float64, device)(
        script.start(size, torch.float64, device)
    )
    first, second = script.shared_noise(2), script.shared_noise(2)
    generator = torch.Generator().manual_seed(7)
    draws = [first.noise(state, generator)[0] for _ in range(2)]
    assert torch.equal(draws[0], second.noise(state, generator)[0])
    assert torch.equal(draws[1], second.noise(state, generator)[0])
    assert not torch.equal(*draws)


def test_one_step_is_that_of_the_loop(script):
    """The step that is timed and captured has the weights of the annealing loop."""
    size, device, dtype = script.TINY, torch.device("cpu"), torch.float64
    step, evaluate, inputs = script.step_and_inputs(size, dtype, device, 2)
    *state, log_weights = step(*inputs)
    position, log_base, log_target, *_ = state
    again = evaluate(position)
    assert torch.allclose(again.log_base, log_base)
    assert torch.allclose(again.log_target, log_target)
    assert torch.allclose(log_weights, 1e-3 * (log_target - log_base))
    assert not torch.equal(position, inputs[0])


@pytest.mark.gpu
def test_all_on_a_gpu(script, tmp_path):
    output = tmp_path / "gpu.json"
    script.main(["--output", str(output)])
    results = json.loads(output.read_text())
    assert results["agreement"]["agrees"]
    assert results["synchronization"]["count"] == 0
    assert results["cuda_graph"]["largest_difference"] < 1e-4
    assert results["paper"]["hours_for_30000_steps"] > 0.0
