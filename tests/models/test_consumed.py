"""Arguments that one run of the model uses up are refused by name."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_anneal import AnnealedImportance

pytestmark = pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")  # four chains
X = [torch.tensor(0.5), torch.tensor(-1.0), torch.tensor(2.0)]


def run(model, *args, **kwargs):
    return AnnealedImportance(model, num_chains=4, num_steps=2, progress_bar=False).run(
        *args, **kwargs
    )


def observe(values):
    z = pyro.sample("z", dist.Normal(0.0, 2.0))
    for i, value in enumerate(values):
        pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=value)


@pytest.mark.parametrize(
    "make", [lambda: (v for v in X), lambda: iter(X), lambda: map(torch.sin, X), lambda: zip(X)]
)
def test_iterators_are_refused(make):
    def model(data):
        observe([v[0] if isinstance(v, tuple) else v for v in data["rows"]])

    with pytest.raises(ValueError, match=r"uses up its argument \[0\]\['rows'\] \(a .*pass list"):
        run(model, {"rows": make()})
    with pytest.raises(ValueError, match=r"argument data \(a "):
        run(lambda data: observe(data), data=make())


def test_containers_that_are_emptied_are_refused():
    with pytest.raises(ValueError, match=r"argument \[0\] \(a dict of 1 item, .* left 0\)"):
        run(lambda data: observe(data.pop("x")), {"x": X})
    with pytest.raises(ValueError, match=r"argument rows \(a list of 3 items, .* left 2\)"):
        run(lambda rows: observe([rows.pop()]), rows=list(X))


def test_containers_that_only_grow_are_let_be():
    def model(data):
        data["calls"] = data.get("calls", 0) + 1
        observe(data["x"])

    assert bool(run(model, {"x": X}).lower.isfinite())


def test_iterators_that_nobody_reads_are_let_be():
    assert bool(run(lambda data, rest: observe(data), X, iter(X)).lower.isfinite())
