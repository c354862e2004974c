"""What is kept between calls is known by its content: lists, plain objects, functions, globals."""

import dataclasses
import io
import os
import subprocess
import sys
import threading
from typing import ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_anneal import HMC, AnnealedImportance
from pyro_anneal.persistence.fingerprints import Undescribable, describe

X = torch.tensor([0.4, 1.9, -0.3], dtype=torch.float64)
LEVEL = [1.0]  # read by a function below


@dataclasses.dataclass(frozen=True)
class Record:
    values: torch.Tensor
    name: str = "a"


class Plain:
    def __init__(self, *content):
        self.content = content


class Slotted:
    __slots__ = ("a",)

    def __init__(self, a):
        self.a = a


def reads_global(x):
    return x * LEVEL[0]


def closing_over(value):
    def inner(x, scale=1.0):
        return scale * x + value

    return inner


LARGE = torch.zeros(5000, dtype=torch.float64)
CHANGED = LARGE.clone()
CHANGED[2500] = 1e-12  # not in the representation of a tensor

PAIRS = {
    "numbers": ([1.0, 2.0], [1.0, 3.0]),
    "nested": ({"a": [1, (2.0, {"b": [3]})]}, {"a": [1, (2.0, {"b": [4]})]}),
    "order": ([1, 2], [2, 1]),
    "list and tuple": ([1], (1,)),
    "keys": ({"a": 1}, {"b": 1}),
    "arrays": ([np.zeros(2)], [np.ones(2)]),
    "objects in arrays": (np.array([{"a": 1}, None]), np.array([{"a": 2}, None])),
    "tensor in a list": ([LARGE], [CHANGED]),
    "tensor in a record": (Record(LARGE), Record(CHANGED)),
    "tensor in an object": (Plain(LARGE), Plain(CHANGED)),
    "slots": (Slotted(1), Slotted(2)),
    "deep": (Plain([Plain({"a": LARGE})]), Plain([Plain({"a": CHANGED})])),
    "sets": ({1, 2}, {1, 3}),
    "closures": (closing_over(1.0), closing_over(2.0)),
    "code": (lambda x: x + 1, lambda x: x + 2),
    "calls": (lambda x: x.sin(), lambda x: x.cos()),
    "modules": (nn.Linear(2, 2), nn.Linear(2, 2)),
    "kinds": (nn.Sequential(nn.Tanh()), nn.Sequential(nn.ReLU())),
    "training": (nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2).eval()),
    "methods": (Plain(1).__init__, Plain(2).__init__),
    "distributions": (dist.Normal(0.0, 1.0), dist.Normal(0.0, 2.0)),
    "numbers of numpy": (np.float64(1.0), np.float32(1.0)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_other_content_has_another_description(name):
    first, second = PAIRS[name]
    assert describe(first) == describe(first)
    assert describe(first) != describe(second)


def test_expanded_tensors_are_described():
    for shape in ([1], [1, 1], [2, 3]):  # of one number too, whose strides are zero
        expanded = torch.tensor(2.0).expand(shape)
        assert describe(expanded) == describe(torch.full(shape, 2.0))
        assert describe(expanded) != describe(torch.full(shape, 3.0))


def test_globals_that_a_function_reads_are_part_of_it(monkeypatch):
    before = describe(reads_global)
    monkeypatch.setitem(globals(), "LEVEL", [1.0])  # another list of the same content
    assert describe(reads_global) == before
    LEVEL[0] = 2.0
    assert describe(reads_global) != before


def test_objects_that_hold_themselves_are_described():
    first, second = Plain(1), Plain(2)
    first.content, second.content = (first, 1), (second, 2)
    assert describe(first) != describe(second)
    assert describe(first) == describe(first)


@pytest.mark.parametrize(
    "value",
    [io.StringIO("a"), threading.Lock(), (i for i in range(2)), [iter([1])], Plain(iter([]))],
)
def test_what_keeps_its_content_to_itself_is_refused(value):
    with pytest.raises(Undescribable, match="no content that can be read"):
        describe(value)


SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
from test_fingerprints import description
print(description())
"""


def description():
    values = torch.ones(2, dtype=torch.float64)
    return describe([Plain({"a", "b", "c"}), closing_over(values), reads_global, {1.5: None}])


def test_descriptions_are_the_same_in_every_process():
    folder = __file__.rpartition("/")[0]
    other = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(folder=folder)],
        env={**os.environ, "PYTHONHASHSEED": "1"},  # this process has another
        check=True,
        capture_output=True,
        text=True,
    )
    assert other.stdout.strip() == str(description())


# --- checkpoints -------------------------------------------------------------------------------


def model(x):
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Jittered:
    """A kernel of a plain class."""

    num_gradients: ClassVar[int] = 1
    target_accept: ClassVar[float] = 0.8

    def __init__(self, jitter):
        self.jitter = jitter

    def __getattr__(self, name):
        if name == "jitter":
            raise AttributeError(name)
        return getattr(HMC(num_leapfrog=1, jitter=self.jitter), name)


def ais(path, function=model, **options):
    settings = {"num_chains": 4, "num_steps": 3, "seed": 0, "progress_bar": False}
    return AnnealedImportance(function, checkpoint=path, **(settings | options))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", [lambda a: a.tolist(), lambda a: a.numpy(), lambda a: a])
def test_other_posterior_samples_are_refused(tmp_path, form):
    torch.manual_seed(0)
    a, b = torch.randn(4, 3), torch.randn(4, 3) + 1
    path = tmp_path / "x.ckpt"
    first = ais(path).run_reverse({"z": form(a)}, X, exact=True)
    again = ais(path).run_reverse({"z": form(a)}, X, exact=True)
    assert torch.equal(first.log_weights, again.log_weights)
    with pytest.raises(ValueError, match=r'posterior_samples\["z"\]'):
        ais(path).run_reverse({"z": form(b)}, X, exact=True)


@pytest.mark.filterwarnings("ignore")
def test_kernels_of_plain_classes_are_known_by_their_attributes(tmp_path):
    path = tmp_path / "x.ckpt"
    options = {"step_size": 0.5, "num_steps": 5}
    first = ais(path, kernel=Jittered(0.1), **options).run(X)
    again = ais(path, kernel=Jittered(0.1), **options).run(X)
    assert torch.equal(first.log_weights, again.log_weights)
    with pytest.raises(ValueError, match=r"kernel: Jittered\(jitter=0\.1\).*jitter=0\.9"):
        ais(path, kernel=Jittered(0.9), **options).run(X)


def eager(extra):
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0 if z.item() < 1.0 else 1.0 + extra[0]), obs=x)

    return model


@pytest.mark.filterwarnings("ignore")
def test_eager_models_are_known_by_what_they_read(tmp_path):
    path, x, options = tmp_path / "x.ckpt", torch.tensor(2.5), {"num_chains": 16, "num_steps": 5}
    extra = [0.0]
    first = ais(path, eager(extra), **options).run(x)
    assert first.density_mode.startswith("eager")
    again = ais(path, eager([0.0]), **options).run(x)
    assert torch.equal(first.log_weights, again.log_weights)
    extra[0] = 3.0
    with pytest.raises(ValueError, match=r"what the model reads \(eager\)"):
        ais(path, eager(extra), **options).run(x)


@pytest.mark.filterwarnings("ignore")
def test_eager_models_that_read_what_cannot_be_described_keep_no_checkpoint(tmp_path):
    stream = iter(range(10**6))

    def counting(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        assert stream is not None
        pyro.sample("x", dist.Normal(z, 1.0 if z.item() < 1.0 else 2.0), obs=x)

    with pytest.raises(ValueError, match="no checkpoint can be kept: the model, which runs eager"):
        ais(tmp_path / "x.ckpt", counting).run(torch.tensor(2.5))
    ais(None, counting).run(torch.tensor(2.5))


@pytest.mark.filterwarnings("ignore")
def test_arguments_that_cannot_be_described_keep_no_checkpoint(tmp_path):
    def extended(x, other):
        return model(x)

    with pytest.raises(ValueError, match=r"argument args\[1\] cannot be described"):
        ais(tmp_path / "x.ckpt", extended).run(X, iter([1]))
    ais(None, extended).run(X, iter([1]))
