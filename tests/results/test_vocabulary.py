import dataclasses
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from example_results import S, example_results
from perfect_chains import make_run, make_sandwich, simulate

from pyro_anneal import AnnealedImportance, Diagnostic, MutualInformation, mi
from pyro_anneal.results import InferenceCheck, Provenance, Result, judge


def _found(name, severity="warning"):
    return Diagnostic(name=name, severity=severity, message=f"{name} <seen>", value=1.0)


# Words that a class lacks, for a reason that it gives when asked.
LACKS = {
    "MutualInformation": {"interval"},
    "ExpectedInformationGain": {"interval"},
    "InferenceCheck": {"interval", "normal_interval"},
}


def _subclasses(kind):
    below = [k for k in kind.__subclasses__() if k.__module__.startswith("pyro_anneal.")]
    return set(below).union(*(_subclasses(k) for k in below))


def test_every_class_of_results_has_an_example():
    assert {type(result) for result in example_results().values()} == _subclasses(Result)


@pytest.mark.parametrize("name", example_results())
def test_every_result_speaks_the_same_words(name):
    result = example_results()[name]
    assert set(result.directions) <= {"forward", "reverse"}
    assert set(result.sides) <= {"lower", "upper"}
    if not isinstance(result, InferenceCheck):  # its sides are those of a divergence
        assert all(torch.equal(v, getattr(result, k)) for k, v in result.sides.items())
    assert isinstance(result.diagnostics, tuple)
    assert isinstance(result.notes, tuple)
    assert result.verdict == judge(result.diagnostics)
    assert result.verdict in ("ok", "suspicious", "failed")
    assert result.provenance is None or isinstance(result.provenance, Provenance)


@pytest.mark.parametrize("name", example_results())
def test_every_result_is_shown(name, tmp_path):
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot
    from matplotlib.text import Text

    result = example_results()[name]
    assert result.summary() == repr(result)
    _, *rows = repr(result).splitlines()
    assert "nats" in repr(result)
    assert len(rows) >= 3
    assert "verdict" in repr(result)
    for found in result.diagnostics:
        assert found.message in repr(result)
    if result.provenance is not None:
        assert "wall time" in repr(result)
    html = result._repr_html_()
    assert html.startswith("<div><strong>")
    assert "verdict" in html
    frame = result.to_dataframe()
    assert len(frame) > 0
    assert frame.columns.is_unique
    figure = result.plot()
    figure.savefig(tmp_path / "picture.png", dpi=40)
    texts = [text.get_text() for text in figure.findobj(Text)]
    inference = isinstance(result, InferenceCheck)  # p-values and ranks have no unit
    assert inference or any("nats" in text for text in texts)
    assert figure.get_suptitle() or any(axes.get_title() for axes in figure.axes)
    pyplot.close(figure)


@pytest.mark.parametrize("name", example_results())
def test_every_interval_has_a_level_and_two_ends(name):
    result = example_results()[name]
    for word in ("interval", "normal_interval"):
        if word in LACKS.get(type(result).__name__, ()):
            with pytest.raises(AttributeError, match=rf"has no {word}\(\)"):
                getattr(result, word)
            continue
        if word == "interval" and name == "estimate":
            with pytest.raises(ValueError, match="not certified"):
                result.interval()
            continue
        intervals = [getattr(result, word)(level) for level in (0.5, 0.9)]
        (low, high), (lower, higher) = (map(torch.as_tensor, ends) for ends in intervals)
        ordered = (lower <= low) & (low <= high) & (high <= higher)
        unknown = low.isnan() & high.isnan()  # where no standard error is known
        assert bool((ordered | unknown).all())
        for level in (0.0, 1.0, -1.0):
            with pytest.raises(ValueError, match="level must lie strictly between 0 and 1"):
                getattr(result, word)(level)


def test_verdict():
    assert judge([]) == "ok"
    assert judge([_found("starts", "info"), _found("zero_weights", "info")]) == "ok"
    assert judge([_found("lag"), _found("starts", "info")]) == "suspicious"
    for name in ("agreement", "modes", "starts", "undefined_weights"):
        assert judge([_found("ess"), _found(name)]) == "failed"


def test_directions_and_sides():
    sandwich, _ = make_sandwich(S, (2, 3))
    assert sandwich.directions == {"forward": sandwich.forward, "reverse": sandwich.reverse}
    assert sandwich.forward.directions == {"forward": sandwich.forward}
    assert torch.equal(sandwich.sides["lower"], sandwich.lower)
    assert torch.equal(sandwich.sides["upper"], sandwich.upper)
    assert list(sandwich.forward.sides) == ["lower"]
    assert list(sandwich.reverse.sides) == ["upper"]


def test_an_uncertified_reverse_run_is_an_estimate():  # FAULTS B6
    problem, z = simulate(S)
    run = make_run(problem, start=z, certified=False)
    assert run.kind == "estimate"
    assert run.sides == {}
    assert "upper bound" not in repr(run)
    assert repr(run).splitlines()[1].split()[0] == "estimate"
    sure = dataclasses.replace(run, certified=True)
    assert sure.kind == "upper bound"
    assert repr(sure).splitlines()[1].startswith("  upper bound (nats)")


def test_html_is_escaped_and_holds_all_rows():
    run = make_run(simulate(S)[0], diagnostics=(_found("ess"),))
    html = run._repr_html_()
    assert "ess &lt;seen&gt;" in html
    assert html.count("<tr>") == len(run._table().rows) == html.count("</tr>")
    table = example_results()["comparison"]._repr_html_()
    assert table.count("<tr>") == 3  # a header and two models


def test_data_frames_hold_the_numbers():
    pandas = pytest.importorskip("pandas")
    examples = example_results()
    names = ("run", "estimate", "sandwich", "batches", "information", "comparison")
    run, reverse, sandwich, batches, information, comparison = (examples[n] for n in names)
    frame = run.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.index.names == ["data"]
    np.testing.assert_array_equal(frame["lower"], run.lower.numpy())
    np.testing.assert_array_equal(frame["std_error"], run.std_error.numpy())
    assert "estimate" in reverse.to_dataframe()
    frame = sandwich.to_dataframe()
    assert frame.index.names == ["simulation", "data"]
    assert frame.loc[(1, 2), "gap"] == sandwich.gap[1, 2].item()
    assert frame.loc[(1, 0), "CR upper"] == sandwich.bounds["CR upper"][1, 0].item()
    frame = batches.to_dataframe()
    assert list(frame["batch"]) == [0, 0, 0, 1, 1]
    np.testing.assert_array_equal(frame["ess"], batches.ess.numpy())
    assert information.to_dataframe()["lower"].mean() == pytest.approx(information.lower.item())
    frame = comparison.to_dataframe()
    assert list(frame.index) == list(comparison.names)
    assert frame["probability"].sum() == pytest.approx(1.0)
    single = make_run(simulate(S)[0]).to_dataframe()
    assert single.shape[0] == 1


def test_absence_of_pandas_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-anneal\[pandas\]'"):
        example_results()["run"].to_dataframe()


def _model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")
@pytest.mark.parametrize("name", ["run", "sandwich", "run_reverse", "mutual_information"])
def test_provenance_splits_the_wall_time(name):
    x = torch.tensor([0.3, -2.0])
    guide = "auto" if name == "run" else None  # fits take seconds
    ais = AnnealedImportance(_model, guide, num_chains=4, num_steps=20, progress_bar=False, seed=5)
    arguments = ({"z": torch.zeros(3, 2)}, x) if name == "run_reverse" else (x,)
    result = getattr(ais, name)(*arguments)
    record = result.provenance
    assert record.task == name
    assert record.settings["num_chains"] == "4"
    assert record.settings["num_steps"] == "20"
    assert record.settings["guide"] == str(guide)
    assert record.settings["model"] == "_model"
    assert record.seed == 5
    assert record.kernel.startswith("HMC(")
    assert set(record.versions) == {"pyro_anneal", "pyro", "torch", "python"}
    assert record.versions["torch"] == torch.__version__
    assert list(record.seconds) == ["fit", "pilot", "chains", "total"]
    parts = sum(record.seconds[k] for k in ("fit", "pilot", "chains"))
    assert 0.0 < parts <= record.seconds["total"]
    assert list(record.gradients) == ["fit", "pilot", "chains"]
    assert (record.gradients["fit"] > 0) == (guide == "auto")
    assert min(record.gradients["pilot"], record.gradients["chains"]) > 0
    wall = next(line for line in repr(result).splitlines() if "wall time" in line)
    assert all(word in wall for word in ("s in all", "fit", "pilot", "chains"))


@pytest.mark.parametrize("kind", ["AIS", "IWAE"])
def test_estimates_of_mutual_information_say_how_they_were_made(kind):
    joint = mi.DistributionJoint(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 0.5))
    if kind == "AIS":
        bound = mi.AIS(joint, num_chains=3, num_steps=4)
        settings = {"num_chains": "3", "num_steps": "4"}
    else:
        bound, settings = mi.IWAE(joint, None, num_particles=7), {"num_particles": "7"}
    estimate = bound.estimate(num_pairs=25, seed=9)
    record = estimate.provenance
    assert record.task == f"mi.{kind}.estimate"
    assert record.seed == 9
    assert settings.items() <= record.settings.items()
    assert record.kernel.startswith("HMC(") == (kind == "AIS")
    assert record.seconds["total"] > 0.0
    assert "wall time" in repr(estimate)


def test_mutual_information_inherits_findings():
    sandwich, _ = make_sandwich(S, (4,), diagnostics=(_found("gap"),))
    information = MutualInformation.from_sandwich(sandwich)
    assert information.verdict == "suspicious"
    assert "gap <seen>" in repr(information)


def test_the_sandwich_explains_itself():
    sandwich, _ = make_sandwich(S, (3,))
    shift = sandwich.gap.mean() + 0.25
    reverse = dataclasses.replace(
        sandwich.reverse, log_weights=sandwich.reverse.log_weights - shift
    )
    crossed = dataclasses.replace(sandwich, reverse=reverse)
    assert "0.25 nats above the upper one, no more than chance allows" in repr(crossed)
    proof = dataclasses.replace(crossed, diagnostics=(_found("agreement"),))
    assert "chance allows" not in repr(proof)
    assert proof.verdict == "failed"
    wide = make_sandwich(S, (3,), num_steps=2)[0]
    low, high = wide.interval(0.95)
    margin = ((high - low) - wide.gap).mean().item()
    assert f"the 95% interval is {margin:.1f} nats wider than the gap by construction" in repr(
        wide
    )
