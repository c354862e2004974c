"""What leaves a recording is seen, and by what it was reached."""

import copy
import pickle
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_anneal import AnnealedImportance
from pyro_anneal.graphs.captured import capture

DATA = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)

WAYS_OUT = {
    "numpy": lambda t: float(t.detach().numpy().sum()),
    "tolist": lambda t: sum(t.detach().tolist()),
    "asarray": lambda t: float(np.asarray(t.detach()).sum()),
    "ufunc": lambda t: float(np.tanh(t.detach()).sum()),
    "item": lambda t: t.sum().item(),
    "float": lambda t: float(t.sum()),
    "int": lambda t: int(t.sum()),
    "bool": lambda t: 1.0 if t.sum() > 0.3 else 2.0,
    "index": lambda t: [1.0, 2.0, 3.0][(t.sum() > 0.3).long()],
    "format": lambda t: float(f"{t.sum().detach():.3f}"),
    "format of a number": lambda t: len(f"{t.sum()}"),
    "repr": lambda t: float(repr(t.detach().sum())[7:10]),
    "str": lambda t: float(str(t.detach().sum())[7:10]),
    "pickle": lambda t: pickle.loads(pickle.dumps(t.detach())).sum(),
    "deepcopy": lambda t: copy.deepcopy(t.detach()).sum(),
    "dlpack": lambda t: float(np.from_dlpack(t.detach()).sum()),
    "storage": lambda t: t.detach().untyped_storage().tolist()[0],
    "equal": lambda t: 1.0 if torch.equal(t, t.clamp(min=-1.0)) else 2.0,
    "allclose": lambda t: 1.0 if torch.allclose(t, t.clamp(min=-1.0)) else 2.0,
    "max of a list": lambda t: max(t.detach().unbind(), key=float),
    "contains": lambda t: 1.0 if 0.5 in t else 2.0,
    "tensor of a list": lambda t: torch.tensor([t.sum().detach(), 1.0]).sum(),
    "legacy tensor": lambda t: torch.Tensor([t.sum().detach(), 1.0]).sum(),
    "new": lambda t: t.new([t.sum().detach(), 1.0]).sum(),
    "new_tensor": lambda t: t.new_tensor([t.sum().detach(), 1.0]).sum(),
    "shape": lambda t: t[t > 0.0].shape[0],
    "nonzero": lambda t: len(t.nonzero()),
    "unique": lambda t: len(t.unique()),
    "arange": lambda t: torch.arange(t.detach().abs().sum()).sum(),
    "tensor_split": lambda t: len(torch.arange(9).tensor_split(t.detach().abs().long().cpu())[0]),
}


# What copies a storage is evaluated by the model, whatever it was made of.
NOT_RECORDED = ("pickle", "deepcopy", "storage")


def quietly(function, example, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return capture(function, example, num_chains=2, **options)


def standard(u):
    return -0.5 * u.square().sum()


@pytest.mark.parametrize("way", [way for way in WAYS_OUT if way != "bool"])  # recorded both ways
def test_a_latent_that_leaves_is_evaluated_by_the_model(way):
    leave = WAYS_OUT[way]
    density = quietly(lambda u: (standard(u), -u.square().sum() * leave(u)), DATA + 0.1)
    assert density.mode == "eager"
    assert not density.serves()
    assert not density.serves_all_data


@pytest.mark.filterwarnings("ignore:__array_wrap__")
@pytest.mark.parametrize("way", [way for way in WAYS_OUT if way not in NOT_RECORDED])
def test_data_that_leave_are_guarded(way):
    leave, data = WAYS_OUT[way], DATA.clone()
    density = quietly(lambda u: (standard(u), standard(u - data) * leave(data * 1.0)), DATA)
    assert density.mode == "graph", density.reason
    assert {exit.reached_by for exit in density.exits} == {"data"}
    addresses = [source.data_ptr() for source in density.exits[0].sources]
    assert data.data_ptr() in addresses
    assert "test_exits.py" in density.exits[0].place
    assert not density.serves_all_data
    assert density.serves()
    assert density.serves({data: data.clone()})
    other = torch.tensor([-3.0, 0.0, 0.0], dtype=torch.float64)
    changed = leave(other * 1.0) != leave(data)
    assert changed, "the test needs data whose way out differs"
    assert not density.serves({data: other})
    with pytest.raises(ValueError, match="recorded with numbers that are others now"):
        density.rebind({data: other})


def test_numbers_of_neither_latents_nor_data_do_not_matter():
    def function(u):
        count = int(torch.arange(3).sum())
        scale = torch.tensor(2.0).item() + torch.ones(3).numpy().sum()
        return standard(u), -u.square().sum() * count * scale

    density = quietly(function, DATA)
    assert density.serves_all_data
    assert not density.exits


def test_a_graph_without_exits_serves_all_data():
    data = DATA.clone()
    density = quietly(lambda u: (standard(u), standard(u - data.exp().clamp(min=1.0))), DATA)
    assert density.serves_all_data
    other = torch.tensor([-3.0, 0.0, 0.0], dtype=torch.float64)
    moved = density.rebind({data: other})
    position = torch.ones(2, 3, dtype=torch.float64)
    expected = standard(position[0] - other.exp().clamp(min=1.0))
    torch.testing.assert_close(moved(position).log_target[0], expected)


def test_a_branch_on_data_serves_data_on_the_same_side():
    data = DATA.clone()

    def function(u):
        return standard(u), standard(u - data) * (1.0 if data.mean() > 0 else 3.0)

    density = quietly(function, DATA)
    assert density.serves({data: data + 5.0})
    assert not density.serves({data: -data})


def test_parameters_that_leave_are_guarded_when_they_change():
    scale = torch.tensor(2.0, dtype=torch.float64)
    density = quietly(lambda u: (standard(u), standard(u) * scale.item()), DATA)
    scale.fill_(3.0)
    with pytest.raises(ValueError, match=r"\.item\(\) of data or parameters"):
        density.refresh()


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))]
)
def test_a_branch_through_numpy_is_right_for_every_seed(seed):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        far = -3.0 if z.detach().numpy() > 2.0 else 0.0
        pyro.factor("f", torch.tensor(far))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(3.0))

    ais = AnnealedImportance(model, num_chains=24, num_steps=12, seed=seed, progress_bar=False)
    with pytest.warns(UserWarning, match=r"\.numpy\(\) needs the value of a latent at test_exits"):
        run = ais.run()
    assert run.density_mode == "eager"
    # Quadrature of exp(-3 [z > 2]) N(z; 0, 1) N(3; z, 1).
    assert abs(float(run.lower) + 3.774) < 5.0 * float(run.std_error) + 0.05
