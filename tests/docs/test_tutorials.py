"""The tutorials run as they stand, at reduced size, say the truth, and match their notebooks."""

import ast
import importlib.util
import math
from pathlib import Path

import matplotlib
import nbformat
import pytest
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
TUTORIALS = sorted((ROOT / "tutorials").glob("[0-9]*.md"))


def _build():
    spec = importlib.util.spec_from_file_location("build", ROOT / "tutorials" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(text):
    """Runs the code cells in order in one namespace, as a kernel would, and prints results."""
    namespace = {"__name__": "__main__"}
    for index, cell in enumerate(_build().notebook(text).cells):
        if cell.cell_type != "code":
            continue
        where = f"{text.name}, cell {index}"
        tree = ast.parse(cell.source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, where, "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), where, "eval"), namespace)
            print(repr(value))
        plt.close("all")
    return namespace


@pytest.fixture
def run(monkeypatch):
    """Runs a tutorial as a reader would, small, in torch's own default dtype."""
    monkeypatch.setenv("PYRO_ANNEAL_TUTORIAL_SIZE", "small")
    torch.set_default_dtype(torch.float32)
    return lambda number: _run(next(text for text in TUTORIALS if text.name.startswith(number)))


@pytest.mark.parametrize("text", TUTORIALS, ids=lambda text: text.stem)
def test_notebook_is_in_step_with_its_text(text):
    committed, build = nbformat.read(text.with_suffix(".ipynb"), as_version=4), _build()
    expected = build.sources(build.notebook(text).cells)
    assert build.sources(committed.cells) == expected, "run `make notebooks`"


@pytest.mark.parametrize("text", TUTORIALS, ids=lambda text: text.stem)
def test_notebook_was_executed_in_full(text):
    committed, build = nbformat.read(text.with_suffix(".ipynb"), as_version=4), _build()
    outputs = [output for cell in committed.cells for output in cell.get("outputs", [])]
    assert build.is_in_full(committed), "run `make tutorials`"
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert all(output.output_type != "error" for output in outputs)
    assert "TqdmWarning" not in "".join(output.get("text", "") for output in outputs)


@pytest.mark.parametrize("text", TUTORIALS, ids=lambda text: text.stem)
def test_form(text):
    """Each states its problem, has mathematics and a figure, and says what to distrust."""
    body = text.read_text()
    for part in ("**Problem.**", "$$", "plt.", "## What to distrust, and a failure"):
        assert part in body, part


def test_evidence(run):
    found = run("01")
    evidence, truth = found["evidence"], found["truth"]
    assert truth.item() == pytest.approx(-36.130816, abs=1e-4)  # by independent quadrature
    assert evidence.lower < truth + 5 * evidence.std_error
    assert evidence.lower > truth - 0.2
    assert found["exact"].exp().item() == pytest.approx(4862.10, abs=0.2)
    error = found["comparison"].bayes_factor_std_errors[0, 1]
    assert (found["estimated"] - found["exact"]).abs() < 5 * error + 1e-3
    short = found["truth_absolute"] - found["missed"].lower
    assert short.item() == pytest.approx(math.log(2), abs=0.01)
    assert any("missed posterior mass" in str(w.message) for w in found["caught"])


def test_vae(run):
    found = run("02")
    sandwich = found["sandwich"]
    assert sandwich.gap.mean() > -5 * sandwich.std_error["gap"]
    assert sandwich.gap.mean() < 1.0
    for row in found["table"].values():
        assert row["gap"] > 0.0
    assert found["error"].shape == (20,)
    assert found["error"].mean() < 0.15  # of AIS, from the sum over a grid, in nats


def test_discrete_latents(run):
    found = run("03")
    truth = found["log_evidence"].item()
    curve = found["exact_curve"](found["log_q"])
    assert torch.trapezoid(curve, found["betas"]).item() == pytest.approx(truth, abs=1e-2)
    assert (curve.diff() >= -1e-5).all()  # it rises
    assert max(found["lower"].values()) < truth
    assert found["upper"][2] < truth < found["upper"][50]  # the failure shown
    off = found["off"]  # mean errors of 20 digits, K = 8
    assert off["prior", 20] < off["prior", 1]
    assert off["encoder", 20] < off["encoder", 1]
    assert off["encoder", 20] < 0.2


def test_mutual_information(run):
    found = run("04")
    for name, by_steps in found["sandwiches"].items():
        best = by_steps[max(by_steps)]
        low, high = best.normal_interval(1.0 - 1e-6)
        assert low < high
        for bound, estimate in found["estimates"][name].items():
            if bound != "MINE_DV":  # the others point in a direction
                assert estimate.lower < high + 5 * estimate.lower_std_error, bound
    assert found["seen"].plug_in > found["unseen"].plug_in + 1.0


def test_mutual_information_from_samples(run):
    found = run("05")
    truth = found["truth"]
    gaussian = -2.5 * math.log(1.0 - 0.95**2)
    assert gaussian - math.log(2) < truth < gaussian  # an unknown sign costs at most log 2
    for estimate in [*found["curve"], *found["estimates"].values()]:
        assert estimate.lower < truth + 5 * estimate.lower_std_error
    for count, estimate in zip(found["candidates"], found["curve"], strict=True):
        assert estimate.lower <= math.log(count) + 1e-5
    contrastive = found["estimates"]["GIWAE, K = 10"].terms["contrastive"]
    assert contrastive <= math.log(10) + 1e-5
    assert found["blind"].lower < math.log(200) < found["beyond"]


def test_posterior_quality(run):
    found = run("06")
    for elbo in found["on_real"].values():  # Jensen, up to the noise of 400 draws
        assert elbo < found["evidence"].lower + 1.0
    sandwich = found["sandwich"]
    assert sandwich.upper - sandwich.lower > -10.0  # by Markov, up to e^-10
    audits = found["audits"]
    assert audits["corrected"].verdict == "ok"
    assert audits["uncorrelated"].verdict == "failed"
    right, wrong = found["right"], found["wrong"]
    assert torch.equal(right.simulated["x"], wrong.simulated["x"])
    error = right.std_error["gap"]
    assert -5 * error < right.gap.mean() < 0.2
    crossing = right.upper - wrong.lower
    assert crossing.mean() < -5 * crossing.std() / len(crossing) ** 0.5
    assert wrong.gap.mean() > 0
    assert not any(d.name == "agreement" for d in wrong.diagnostics)


def test_energy_priors(run):
    found = run("07")
    assert found["attainable"].item() == pytest.approx(-0.429929, abs=0.012)  # minus the entropy
    for bound in found["bounds"].values():
        assert bound < found["attainable"] + 0.2
    error = (found["run"].lower - found["exact"]).abs()
    assert (error < 5 * found["run"].std_error + 0.05).all()  # 0.05: the integral's own sampling
    assert found["bound"] < found["cap"] < found["attainable"]
    assert "random" in found["message"]


def test_long_runs(run):
    found = run("08")
    assert torch.equal(found["continued"].log_weights, found["in_one_piece"].log_weights)
    assert "num_steps (T)" in found["refusal"]
    for result in found["runs"].values():  # Markov: a bound too high by 12 nats has odds of e^-12
        assert result.lower < -36.130816 + max(5 * result.std_error.item(), 0.5)
    total = found["total"]
    assert (total.total - found["exact"].sum()).abs() < 5 * total.total_std_error + 0.5
    for short in found["short_by"].values():
        assert short == pytest.approx(math.log(2), abs=0.02)
