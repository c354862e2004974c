"""Plates that enclose every site become batch dimensions; coupled rows are found."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import nn

from pyro_anneal import AnnealedImportance, Linear
from pyro_anneal.models.inspection import inspect_model

X = torch.tensor([0.4, 1.9, -0.3, 5.0], dtype=torch.float64)
TRUTH = torch.as_tensor(stats.norm(0.0, math.sqrt(2.0)).logpdf(X))


def rows(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def with_deterministic(x):
    pyro.deterministic("size", torch.tensor(float(len(x))))
    rows(x)


def with_param(x):
    scale = pyro.param("scale", lambda: torch.ones(()))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.deterministic("twice", 2.0 * z)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, z):
        return z + self.bias


SHIFT = Shift()


def with_module(x):
    shift = pyro.module("shift", SHIFT)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(shift(z), 1.0), obs=x)


def layout_of(model, *args, **options):
    return inspect_model(model, None, (args, {}), (args, {}), **options)


@pytest.mark.parametrize("model", [rows, with_deterministic, with_param, with_module])
def test_unrelated_sites_leave_the_batch(model):
    assert [(p.name, p.size) for p in layout_of(model, X).batch] == [("data", 4)]
    ais = AnnealedImportance(
        model, num_chains=32, num_steps=16, schedule=Linear(), step_size=0.9, progress_bar=False,
        seed=0,
    )  # fmt: skip
    run = ais.run(X)
    assert run.lower.shape == (4,)
    assert not run.notes
    assert bool(((run.lower - TRUTH).abs() <= 5.0 * run.std_error).all())


def test_latent_outside_the_plate_makes_one_evidence():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    assert layout_of(model, X).batch == ()
    with pytest.raises(ValueError, match=r'plate "data" cannot be a batch dimension.*\[\'mu\'\]'):
        layout_of(model, X, batch_plates=["data"])


def test_batch_plates_can_be_named_or_refused():
    def model(x):
        with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(2, 3)
    assert tuple(layout_of(model, x).batch_shape) == (2, 3)
    assert tuple(layout_of(model, x, batch_plates=["columns"]).batch_shape) == (3,)
    assert layout_of(model, x, batch_plates=["columns"]).dim == 2
    assert tuple(layout_of(model, x, batch_plates=[]).batch_shape) == ()
    with pytest.raises(ValueError, match='plate "nowhere" cannot be a batch dimension'):
        layout_of(model, x, batch_plates=["nowhere"])
    with pytest.raises(ValueError, match='batch_plates must be "auto" or a list'):
        layout_of(model, x, batch_plates="columns")


def test_split_and_join_are_inverse_and_plate_by_plate():
    def model(x):
        with pyro.plate("rows", 2, dim=-2):
            pyro.sample("a", dist.Dirichlet(torch.ones(3)))
            with pyro.plate("columns", 4, dim=-1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    layout = layout_of(model, torch.zeros(2, 4))
    assert layout.dim == 2 + 4
    u = torch.randn(2, 6)
    parts = layout.split(u)
    assert parts["a"].shape == (2, 1, 2)
    assert parts["z"].shape == (2, 4)
    torch.testing.assert_close(parts["z"], u[:, 2:], rtol=0, atol=0)
    torch.testing.assert_close(layout.join(parts), u, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")  # its weights collapse
def test_rows_accept_and_reject_independently():
    """One impossible row must not stop the others."""
    x = torch.tensor([0.4, 1.9, 1e3])
    ais = AnnealedImportance(
        rows, num_chains=32, num_steps=32, schedule=Linear(), step_size=0.9, progress_bar=False,
        seed=0,
    )  # fmt: skip
    run = ais.run(x)
    truth = torch.as_tensor(stats.norm(0.0, math.sqrt(2.0)).logpdf(x))
    assert bool(((run.lower - truth).abs() <= 5.0 * run.std_error)[:2].all())
    assert run.lower[2] < truth[2] - 100.0


def test_a_row_does_not_depend_on_the_others():
    """Noise is drawn per row, so changing one row's data leaves the others bit by bit."""
    options = {"num_chains": 8, "num_steps": 20, "schedule": Linear(), "step_size": 0.9}
    ais = AnnealedImportance(rows, **options, progress_bar=False, seed=4)
    other = X.clone()
    other[1] = -2.0
    first, second = ais.run(X).log_weights, ais.run(other).log_weights
    keep = [0, 2, 3]
    torch.testing.assert_close(first[:, keep], second[:, keep], rtol=0, atol=0)
    assert not torch.equal(first[:, 1], second[:, 1])


def test_joint_evidence_is_the_sum_of_rows():
    options = {"num_chains": 64, "num_steps": 40, "progress_bar": False, "seed": 0}
    joint = AnnealedImportance(rows, batch_plates=[], **options).run(X)
    assert joint.lower.shape == ()
    assert abs(joint.lower - TRUTH.sum()) <= 5.0 * joint.std_error
    assert joint.std_error < 0.3


def test_models_need_not_be_vectorized_over_particles():
    """Shapes are those of one chain: indexing, len and float literals are the user's business."""

    def model(x):
        weights = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        assert weights.shape == (3,)
        first, *rest = weights
        mean = torch.stack([first, rest[0] + rest[1], first * 0.0])
        for i in range(3):
            pyro.sample(f"x_{i}", dist.Normal(mean[i], 0.8), obs=x[i])

    x = X[:3]
    design = torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0]])
    cov = design @ design.T + 0.64 * torch.eye(3)
    truth = float(dist.MultivariateNormal(torch.zeros(3), cov).log_prob(x))
    run = AnnealedImportance(model, num_chains=32, num_steps=60, progress_bar=False, seed=0).run(x)
    assert abs(run.lower - truth) <= 5.0 * run.std_error
    assert run.std_error < 0.2


# ---- rows that are coupled in spite of the plate


def centred(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z - z.mean(0), 1.0), obs=x)


def standardized(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        z = (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()  # BatchNorm in training
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def neighbours(x):  # row i looks at row i - 1 only
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + z.roll(1), 1.0), obs=x)


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")  # one step is too few
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("model", [centred, standardized, neighbours])
@pytest.mark.parametrize("seed", [0, 1])
def test_coupled_rows_are_found(model, size, seed):
    options = {"num_chains": 4, "num_steps": 1, "progress_bar": False, "seed": seed}
    run = AnnealedImportance(model, **options).run(X[:size])
    assert run.lower.shape == ()
    assert any("plate(s) ['data'] influence each other" in note for note in run.notes)
    named = AnnealedImportance(model, batch_plates=["data"], **options)
    with pytest.raises(ValueError, match=r"plate\(s\) \['data'\] influence each other"):
        named.run(X[:size])


def test_coupled_rows_have_the_right_joint_evidence():
    run = AnnealedImportance(centred, num_chains=64, num_steps=40, progress_bar=False, seed=0).run(
        X
    )
    centring = torch.eye(4) - 0.25
    cov = centring @ centring.T + torch.eye(4)
    truth = dist.MultivariateNormal(torch.zeros(4), cov).log_prob(X)
    assert abs(run.lower - truth) <= 5.0 * run.std_error
    assert run.std_error < 0.3


def test_only_the_coupled_plate_loses_its_evidence():
    def model(x):
        with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z - z.mean(-1, keepdim=True), 1.0), obs=x)

    x = torch.tensor([[0.4, 1.9, -0.3], [0.1, -0.5, 0.2]])
    run = AnnealedImportance(model, num_chains=64, num_steps=30, progress_bar=False, seed=0).run(x)
    assert run.plates == {"rows": 2}
    centring = torch.eye(3) - 1.0 / 3.0
    cov = centring @ centring.T + torch.eye(3)
    truth = dist.MultivariateNormal(torch.zeros(3), cov).log_prob(x)
    assert bool(((run.lower - truth).abs() <= 5.0 * run.std_error).all())
    named = AnnealedImportance(
        model, batch_plates=["columns"], num_steps=1, progress_bar=False, seed=0
    )
    with pytest.raises(ValueError, match=r"plate\(s\) \['columns'\] influence"):
        named.run(x)
