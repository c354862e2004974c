import dataclasses
import math
import sys

import numpy as np
import pytest
import torch
from perfect_chains import make_run, make_sandwich, simulate

from pyro_anneal import EvidenceOfBatches, MutualInformation, compare
from pyro_anneal.results import plotting

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
from matplotlib import pyplot

S = [1.8, 0.6]


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    pyplot.close("all")


@pytest.fixture
def sandwich():
    return make_sandwich(S, (30,), num_chains=8, num_steps=20)[0]


def _line(axes, start):
    (found,) = [line for line in axes.lines if line.get_label().startswith(start)]
    return found


def _labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_bounds_against_steps():
    results = {t: make_sandwich(S, (30,), 4, t)[0] for t in (9, 1, 3)}
    figure = plotting.plot_bounds(results, truth=-3.5)
    bounds, gaps = figure.axes
    for container, name in zip(bounds.containers, ("lower", "upper"), strict=True):
        assert container.get_label() == name
        steps, means = container.lines[0].get_data()
        assert list(steps) == [1, 3, 9]
        expected = [getattr(results[t], name).mean().item() for t in (1, 3, 9)]
        np.testing.assert_allclose(means, expected)
    assert _line(bounds, "truth").get_ydata()[0] == -3.5
    assert "nats" in bounds.get_ylabel()
    assert gaps.get_yscale() == "log"
    steps, means = gaps.containers[0].lines[0].get_data()
    assert list(means) == [results[int(t)].gap.mean().item() for t in steps]


@pytest.mark.filterwarnings("ignore:Conversion of an array")  # in some versions of Matplotlib
def test_gaps_below_zero_are_shown_by_their_reach():
    wide, crossed = (make_sandwich(S, (30,), 4, t)[0] for t in (1, 50))
    shift = crossed.gap.mean() + 1e-3
    reverse = crossed.reverse
    crossed = dataclasses.replace(
        crossed, reverse=dataclasses.replace(reverse, log_weights=reverse.log_weights - shift)
    )
    gaps = plotting.plot_bounds({1: wide, 50: crossed}).axes[1]
    marks = _line(gaps, "not positive")
    expected = -1e-3 + 2 * crossed.std_error["gap"].item()
    assert marks.get_xdata() == [50]
    assert marks.get_ydata()[0] == pytest.approx(expected)


def test_bounds_of_forward_runs_have_one_side():
    problem, _ = simulate(S)
    figure = plotting.plot_bounds({t: make_run(problem, num_steps=t) for t in (2, 8)})
    assert len(figure.axes) == 1
    assert _labels(figure.axes[0]) == ["lower"]
    with pytest.raises(ValueError, match="at least one result"):
        plotting.plot_bounds({})


def test_weights_of_a_single_datum_are_drawn_as_they_are():
    sandwich, _ = make_sandwich(S, num_chains=200, num_steps=20)
    axes = plotting.plot_log_weights(sandwich).axes[0]
    assert axes.get_xlabel().startswith("log-weight (nats)")
    for side in ("lower", "upper"):
        position = _line(axes, f"{side} bound").get_xdata()[0]
        assert position == pytest.approx(getattr(sandwich, side).item())
    assert _line(axes, "Bennett").get_xdata()[0] == pytest.approx(sandwich.bennett.item())
    for histogram, run in zip(axes.containers, (sandwich.forward, sandwich.reverse), strict=True):
        left = histogram[0].get_x()
        right = histogram[-1].get_x() + histogram[-1].get_width()
        inside = ((run.log_weights >= left) & (run.log_weights <= right)).sum().item()
        assert sum(bar.get_height() for bar in histogram) == inside > 150


def test_weights_of_a_batch_are_relative_to_each_datum(sandwich):
    axes = plotting.plot_log_weights(sandwich).axes[0]
    assert axes.get_xlabel().startswith("log-weight - log evidence (nats)")
    expected = (sandwich.lower - sandwich.bennett).mean().item()
    assert _line(axes, "lower bound").get_xdata()[0] == pytest.approx(expected)


def test_outliers_and_the_dead_are_counted_not_drawn():
    weights = torch.cat([torch.randn(197), torch.tensor([-400.0, -math.inf, -math.inf])])
    run = make_run(simulate(S)[0], num_chains=200, log_weights=weights, log_evidence_ti=weights)
    axes = plotting.plot_log_weights(run).axes[0]
    assert "off the axis: 3 forward" in axes.get_xlabel()
    assert axes.get_xlim()[0] > -20


def test_thermodynamic_curve_and_its_integral(sandwich):
    axes = plotting.plot_thermodynamic_curve(sandwich).axes[0]
    betas = sandwich.forward.betas.numpy()
    for run, taken in ((sandwich.forward, betas[:-1]), (sandwich.reverse, betas[1:])):
        x, y = _line(axes, f"{run.direction}: $E").get_data()
        np.testing.assert_array_equal(x, taken)
        np.testing.assert_array_equal(y, run.mean_log_ratio.numpy())
        x, y = _line(axes, f"{run.direction}: integral").get_data()
        np.testing.assert_array_equal(x, betas)
        assert y[0] == 0.0
        assert y[-1] == pytest.approx(run.single.mean().item())  # an identity of the increments
    assert axes.get_xscale() == "linear"
    assert axes.get_yscale() == "linear"


def test_crowded_betas_are_spread():
    betas = torch.cat([torch.zeros(1), torch.logspace(-12, 0, 101)])
    run = make_run(simulate([40.0, 25.0])[0], betas=betas)
    axes = plotting.plot_thermodynamic_curve(run).axes[0]
    assert axes.get_xscale() == "function"
    assert axes.get_yscale() == "symlog"
    axes.figure.canvas.draw()
    to_axes = axes.transData + axes.transAxes.inverted()
    places = to_axes.transform(np.stack([betas.numpy(), 0 * betas.numpy()], 1))[:, 0]
    assert places[0] == pytest.approx(0.0)
    assert places[-1] == pytest.approx(1.0)
    assert places[1] < 0.1  # little room is lost below the first beta
    assert 0.2 < np.median(places) < 0.8
    ticks = to_axes.transform(np.stack([axes.get_xticks(), 0 * axes.get_xticks()], 1))[:, 0]
    assert len(ticks) >= 4
    assert np.diff(ticks).min() > 0.05


def test_acceptance_and_step_size(sandwich):
    figure = plotting.plot_acceptance(sandwich)
    acceptance, step_size = figure.axes
    assert _labels(acceptance) == ["forward", "pilot", "reverse"]
    run = sandwich.forward
    x, y = _line(acceptance, "forward").get_data()
    np.testing.assert_array_equal(x, run.betas[1:-1].numpy())
    np.testing.assert_array_equal(y, run.accept_prob.numpy())
    np.testing.assert_array_equal(step_size.lines[-1].get_ydata(), run.step_size.numpy())
    assert step_size.get_yscale() == "linear"
    steep = dataclasses.replace(run, step_size=torch.logspace(-3, 0, 19))
    assert plotting.plot_acceptance(steep).axes[1].get_yscale() == "log"


def test_dead_chains_leave_a_gap_in_the_curve():
    run = make_run(simulate(S)[0], num_steps=10)
    curve = run.mean_log_ratio.clone()
    curve[0] = -math.inf
    axes = plotting.plot_thermodynamic_curve(dataclasses.replace(run, mean_log_ratio=curve)).axes[
        0
    ]
    _, y = _line(axes, "forward: $E").get_data()
    np.testing.assert_array_equal(y, [np.nan, *curve[1:].tolist()])
    assert all(math.isfinite(end) for end in axes.get_ylim())


@pytest.mark.parametrize("kind", ["run", "reverse", "sandwich", "single step", "all dead"])
def test_four_panels_are_drawn(kind, sandwich, tmp_path):
    result = {
        "run": sandwich.forward,
        "reverse": sandwich.reverse,
        "sandwich": sandwich,
        "single step": make_sandwich(S, num_chains=4, num_steps=1)[0],
        "all dead": make_run(simulate(S)[0], log_weights=torch.full((16,), -math.inf)),
    }[kind]
    figure = result.plot()
    assert len(figure.axes) == 4
    units = figure.axes[0].get_xlabel() + figure.axes[1].get_ylabel()
    assert units.count("nats") == 2
    figure.savefig(tmp_path / "figure.png", dpi=50)


def test_absence_names_the_extra(sandwich, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-anneal\[plot\]'"):
        plotting.plot_log_weights(sandwich)


def test_flat_curves_are_centred(sandwich):
    run = sandwich.forward
    flat = dataclasses.replace(run, mean_log_ratio=-90.0 + 0.1 * torch.randn(20))
    axes = plotting.plot_thermodynamic_curve(flat).axes[0]
    center = float(np.median(flat.mean_log_ratio.numpy()))
    _, y = _line(axes, "forward: $E").get_data()
    np.testing.assert_allclose(y, flat.mean_log_ratio.numpy() - center)
    assert axes.get_ylabel() == f"nats per datum above {center:.4g}"
    assert max(abs(end) for end in axes.get_ylim()) < 1.0
    _, integral = _line(axes, "forward: integral").get_data()
    expected = float((flat.betas.diff() * (flat.mean_log_ratio - center)).sum())
    assert integral[-1] == pytest.approx(expected, abs=1e-6)


def test_a_single_evidence_is_in_nats_not_per_datum():
    run = make_run(simulate(S)[0])
    assert plotting.plot_thermodynamic_curve(run).axes[0].get_ylabel() == "nats"
    bounds = plotting.plot_bounds({50: run}).axes[0]
    assert bounds.get_ylabel() == "log evidence (nats)"
    assert [t.get_text() for t in bounds.get_xticklabels()] == ["50"]


def test_legends_stay_off_the_bars(sandwich):
    axes = plotting.plot_log_weights(sandwich).axes[0]
    axes.figure.canvas.draw()
    legend = axes.get_legend().get_window_extent()
    tallest = max(bar.get_window_extent().y1 for c in axes.containers for bar in c)
    assert legend.y0 > tallest
    for label in ("lower bound", "upper bound", "Bennett"):
        assert _line(axes, label).get_window_extent().y1 <= legend.y0 + 1.0


def test_forest_of_bayes_factors():
    problem, z = simulate(S)
    a = make_run(problem, 400)
    b = dataclasses.replace(make_run(problem, 400), log_weights=a.log_weights - 4.0)
    c = dataclasses.replace(b, log_weights=b.log_weights - 2.0)
    reverse = make_run(problem, 400, start=z, independent_starts=True)
    result = compare({"c": c, "a": (a, reverse), "b": (b, reverse)})
    axes = result.plot().axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b", "c"]
    assert axes.get_xlabel() == "log Bayes factor against a (nats)"
    low, high = (end[:, 0].tolist() for end in result.normal_interval(0.95))
    bars = [line for line in axes.lines if line.get_linewidth() == 4.5]
    assert [list(bar.get_xdata()) for bar in bars] == [[low[i], high[i]] for i in (1, 2)]
    points = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
    assert points == pytest.approx([0.0, -4.0, -6.0])
    (sure,) = [line for line in axes.lines if line.get_label() == "guaranteed"]
    low, high = (end[1, 0].item() for end in result.interval(0.95))
    assert list(sure.get_xdata()) == [low, high]  # c has no upper bound, so no such bar
    assert len(compare({"a": a}).plot().axes) == 1


def test_batches_and_mutual_information_are_drawn(sandwich, tmp_path):
    information = MutualInformation.from_sandwich(sandwich)
    figure = information.plot()
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == [
        "lower bound",
        "upper bound",
    ]
    left, right = figure.axes
    means = [container.lines[0].get_ydata()[0] for container in left.containers]
    assert means == [information.lower.item(), information.upper.item()]
    assert sum(bar.get_height() for bar in right.containers[0]) == 30
    assert "nats" in left.get_ylabel()
    batches = EvidenceOfBatches(
        lower=torch.tensor([-3.0, -2.0, -math.inf]),
        single=torch.zeros(3),
        std_error=torch.ones(3),
        ess=torch.tensor([3.0, 4.0, 1.0]),
        batch_sizes=(2, 1),
        num_chains=4,
        num_steps=5,
        num_gradients=9,
        seconds=0.1,
        seed=0,
    )
    figure = batches.plot()
    assert figure.axes[0].get_title() == "1 without finite bound"
    assert sum(bar.get_height() for bar in figure.axes[0].containers[0]) == 2
    figure.savefig(tmp_path / "figure.png", dpi=50)
