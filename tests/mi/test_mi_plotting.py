"""The plots draw the numbers they are given."""

import matplotlib as mpl
import pytest
import torch

from pyro_anneal.mi import MutualInformation
from pyro_anneal.mi.plotting import plot_bounds, plot_bounds_against_time, plot_decomposition

mpl.use("Agg")


def estimate(lower, upper=None, **kwargs):
    spread = torch.tensor([-1.0, 1.0])
    return MutualInformation(
        method="IWAE",
        pair_lower=lower + spread,
        pair_upper=None if upper is None else upper + spread,
        **kwargs,
    )


@pytest.fixture(autouse=True)
def _close():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


@pytest.mark.parametrize("plot", [plot_bounds, plot_bounds_against_time])
def test_bounds_are_drawn_in_order_of_k(plot):
    series = {"IWAE": {100: estimate(2.0, 3.0), 10: estimate(1.0, 5.0)}, "BA": {1: estimate(0.5)}}
    axes = plot(series, truth=2.5)
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["IWAE lower"].get_xdata()) == [10, 100]
    assert list(lines["IWAE lower"].get_ydata()) == [1.0, 2.0]
    assert list(lines["IWAE upper"].get_ydata()) == [5.0, 3.0]
    assert "BA upper" not in lines
    assert set(lines["truth"].get_ydata()) == {2.5}


def test_decomposition_stacks_its_parts():
    terms = {"variational": torch.tensor(3.0), "contrastive": torch.tensor(0.5)}
    axes = plot_decomposition(
        {"GIWAE": estimate(3.5, terms=terms, ceiling=0.7), "AIS": estimate(4.0)}, truth=4.2
    )
    heights = [patch.get_height() for patch in axes.patches]
    assert heights[:3] == [3.0, 0.5, 4.0]
    assert axes.patches[1].get_y() == 3.0
    assert [text.get_text() for text in axes.get_xticklabels()] == ["GIWAE", "AIS"]


def test_nothing_to_plot_raises():
    with pytest.raises(ValueError, match="series is empty"):
        plot_bounds({})
    with pytest.raises(ValueError, match="level must lie"):
        plot_bounds({"IWAE": {1: estimate(1.0)}}, level=95)
    only_upper = MutualInformation(method="AIS", pair_upper=torch.ones(2))
    with pytest.raises(ValueError, match='"AIS" has no lower bound'):
        plot_decomposition([only_upper])
