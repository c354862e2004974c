"""Python values that change between calls of a loss: attributes, closures, globals, containers."""

import os
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_anneal.losses import AIWAE, DifferentiableAIS
from pyro_anneal.problems.watched import Watched

X = torch.tensor([0.5, 1.0, -2.0], dtype=torch.float64)
SETTINGS = {"noise": 1.0}


def pair(noise):
    """A model, and its exact posterior as the guide, whose noise is what a function returns."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, float(noise())), obs=x)

    def guide(x):
        variance = float(noise()) ** 2
        with pyro.plate("data", len(x)):
            scale = (variance / (1.0 + variance)) ** 0.5
            pyro.sample("z", dist.Normal(x / (1.0 + variance), scale))

    return model, guide


class Plain:
    def __init__(self):
        self.noise = 1.0
        self.array = np.ones(1)
        self.numbers = [1.0]
        self.inner = {"deep": [{"noise": 1.0}]}
        self.tensor = torch.tensor(1.0)

    def set(self, value):
        self.noise = value

    def get(self):
        return self.noise


class Module(Plain, nn.Module):
    def __init__(self):
        nn.Module.__init__(self)
        Plain.__init__(self)


class OfClass:
    noise = 1.0

    @classmethod
    def set(cls, value):
        cls.noise = value

    def get(self):
        return type(self).noise


def in_array(owner, value):
    owner.array[0] = value


def in_list(owner, value):
    owner.numbers[0] = value


def deep(owner, value):
    owner.inner = {"deep": [{"noise": value}]}  # new containers all the way


def exchanged(owner, value):
    owner.tensor = torch.tensor(value)


WAYS = {
    "attribute": (Plain, Plain.set, Plain.get),
    "attribute of a module": (Module, Plain.set, Plain.get),
    "attribute of a class": (OfClass, lambda o, value: type(o).set(value), OfClass.get),
    "array": (Plain, in_array, lambda o: o.array[0]),
    "list": (Plain, in_list, lambda o: o.numbers[0]),
    "containers made anew": (Plain, deep, lambda o: o.inner["deep"][0]["noise"]),
    "tensor exchanged": (Plain, exchanged, lambda o: o.tensor),
    "global": (dict, lambda o, value: SETTINGS.update(noise=value), lambda o: SETTINGS["noise"]),
}


@pytest.mark.parametrize("way", WAYS)
def test_changes_are_seen(way):
    kind, write, read = WAYS[way]
    owner = kind()
    model, guide = pair(lambda: read(owner))
    write(owner, 1.0)
    watched = Watched(model, guide)
    assert watched.change() is None
    write(owner, 0.5)
    assert watched.change() is not None
    write(owner, 1.0)
    assert watched.is_complete
    assert (watched.change() is None) == (way != "tensor exchanged")


def check(way, make, noises):
    kind, write, read = WAYS[way]
    owner = kind()
    model, guide = pair(lambda: read(owner))
    options = {"compile": False} if make is AIWAE else {"step_size": 0.01}
    loss = make(2, num_steps=1, **options)
    # from the exact posterior all weights are the evidence, but for the error of a leapfrog
    tolerance = 1e-6 if make is AIWAE else 0.02
    for noise in noises:
        write(owner, noise)
        truth = -dist.Normal(0.0, (1.0 + noise**2) ** 0.5).log_prob(X).sum()
        assert loss.loss(model, guide, X) == pytest.approx(float(truth), abs=tolerance)
    write(owner, 1.0)


def test_a_call_sees_python_as_it_is():
    check("attribute of a module", AIWAE, (1.0, 0.5))


@pytest.mark.slow
@pytest.mark.parametrize("make", [AIWAE, DifferentiableAIS])
@pytest.mark.parametrize("way", WAYS)
def test_every_call_sees_python_as_it_is(way, make):
    check(way, make, (1.0, 1.0, 0.5, 1.0, 0.5))


@pytest.mark.slow
def test_what_always_changes_is_named_and_checked():
    class Counting(Plain):
        calls = 0

        def get(self):
            self.calls += 1  # reaches no density
            return self.noise

    owner = Counting()
    model, guide = pair(owner.get)
    loss = AIWAE(2, num_steps=1, compile=False)
    for _ in range(9):
        loss.loss(model, guide, X)
    with pytest.warns(RuntimeWarning, match=r"\['calls'\].*changes from call to call"):
        loss.loss(model, guide, X)
    prepared = loss._cache._prepare
    recorded = []
    loss._cache._prepare = lambda *a: recorded.append(1) or prepared(*a)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss.loss(model, guide, X)
        assert not recorded  # the graph is kept, and compared with the model
        owner.noise = 0.5
        truth = -dist.Normal(0.0, 1.25**0.5).log_prob(X).sum()
        assert loss.loss(model, guide, X) == pytest.approx(float(truth), abs=1e-6)
        assert recorded


@pytest.mark.slow
def test_what_cannot_be_watched_is_compared_and_then_followed(monkeypatch):
    monkeypatch.setenv("NOISE", "1.0")
    model, guide = pair(lambda: os.environ["NOISE"])
    loss = AIWAE(2, num_steps=1, compile=False)
    values = []
    for number, noise in enumerate(("1.0", "1.0", "0.5", "0.5", "0.5", "2.0"), 1):
        monkeypatch.setenv("NOISE", noise)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            values.append(loss.loss(model, guide, X))
        assert any("cannot be watched" in str(w.message) for w in caught) == (number == 4)
    for value, noise in zip(values[3:], (0.5, 0.5, 2.0), strict=True):  # the third is not noticed
        truth = -dist.Normal(0.0, (1.0 + noise**2) ** 0.5).log_prob(X).sum()
        assert value == pytest.approx(float(truth), abs=1e-6)


def test_objects_made_anew_with_the_same_content_are_no_change():
    class Remaking:
        def __call__(self, x):
            self.plates = {"data": [3, 4]}
            return x

    model = Remaking()
    model(X)
    watched = Watched(model)
    model(X)
    assert watched.change() is None
    model.plates = {"data": [3, 5]}
    assert watched.change() is not None


def test_large_objects_are_not_complete():
    held = [[i] for i in range(10_000)]
    assert not Watched(lambda: held).is_complete
    assert Watched(lambda: X).is_complete
