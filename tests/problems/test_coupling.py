"""Rows of a plate are independent where the graph proves it, and joint elsewhere."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_anneal import AnnealedImportance
from pyro_anneal.graphs.rows import find_meeting, forward_graph
from pyro_anneal.models.charts import CircleTransform

ROWS, DIM = 5, 3
torch.manual_seed(0)
MLP = nn.Sequential(nn.Linear(DIM, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4))
CONV = nn.Sequential(
    nn.ConvTranspose2d(1, 2, 3),
    nn.BatchNorm2d(2).eval(),
    nn.GroupNorm(2, 2),
    nn.ReLU(),
    nn.Conv2d(2, 1, 2),
    nn.Upsample(scale_factor=2),
    nn.MaxPool2d(2),
)
ATTENTION = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0).eval()
GRU = nn.GRU(DIM, 4, batch_first=True)
CELL = nn.LSTMCell(DIM, 4)
TABLE = nn.Embedding(ROWS, DIM)
NORM = nn.InstanceNorm1d(DIM, affine=True)
for module in (MLP, CONV, ATTENTION, GRU, CELL, TABLE, NORM):
    module.double()
X = torch.randn(ROWS, 4, dtype=torch.float64)
EYE = torch.eye(DIM, dtype=torch.float64)


def total(value):
    return value.flatten(1).sum(-1)


def assembled(u):
    h = torch.zeros(ROWS, DIM, dtype=u.dtype)
    for i in range(DIM):
        h[:, i] = 2 * u[:, i]
    h[:, 1:] = u[:, :2]
    h[..., 0] += 1.0
    return h.sum(-1)


def every_function(u):
    functions = nn.functional
    names = "logsigmoid softplus gelu silu mish elu celu selu hardtanh hardswish hardsigmoid"
    names += " softsign tanhshrink softshrink hardshrink relu6 leaky_relu"
    value = sum(getattr(functions, name)(u) for name in names.split())
    names = "ndtr log_ndtr erfinv expit erfcx entr i0e i1 digamma gammaln sinc xlog1py"
    for name in names.split():
        arguments = (u, u) if name == "xlog1py" else (u,)
        value = value + getattr(torch.special, name)(*arguments)
    value = (
        value + torch.special.gammainc(u.abs(), u.abs()) + torch.special.zeta(u.abs() + 2.0, 1.0)
    )
    value = value + torch.xlogy(u, u) + torch.logaddexp(u, -u) + torch.hypot(u, u) + u.heaviside(u)
    return value + torch.atan2(u, u) + u.copysign(-u) + u.frac() + torch.polar(u, u).real


def outer(u):
    return u.unsqueeze(-1) * u.unsqueeze(-2) + EYE


def solved(u):
    covariance = EYE.expand(ROWS, DIM, DIM) * 2
    return total(torch.linalg.solve(covariance, u.unsqueeze(-1)))


def scattered(u):
    index = torch.tensor([2, 0, 1]).expand(ROWS, DIM)
    return total(torch.zeros_like(u).scatter_add(1, index, u) * u.gather(1, index))


def triangular(u):
    h = torch.zeros(ROWS, DIM, DIM, dtype=u.dtype)
    h[..., torch.ones(DIM, DIM).tril(-1).bool()] = u
    return total(torch.linalg.solve_triangular(h + EYE, u.unsqueeze(-1), upper=False))


def shifted(u):
    h = torch.zeros(ROWS + 1, dtype=u.dtype)
    h[torch.arange(ROWS + 1) != 2] = u[:, 0]
    return h[1:]


APART = {
    "decoder": lambda u: dist.Normal(MLP(u), 1.0).log_prob(X).sum(-1),
    "convolutions": lambda u: total(CONV(u.view(ROWS, 1, 1, DIM).expand(ROWS, 1, 3, DIM))),
    "sequences": lambda u: total(MLP(u.unsqueeze(1).expand(ROWS, 7, DIM))),
    "flat sequences": lambda u: total(MLP(u.repeat_interleave(7, 0)).view(ROWS, 7, 4)),
    "attention": lambda u: total(ATTENTION(u.unsqueeze(-1).expand(ROWS, DIM, 4) * X[0])),
    "recurrent": lambda u: total(GRU(u.unsqueeze(1).expand(ROWS, 4, DIM).cumsum(1))[0]),
    "cell": lambda u: total(CELL(u)[0]),
    "instance norm": lambda u: total(NORM(u.unsqueeze(-1) * X.unsqueeze(1)).square()),
    "normal": lambda u: dist.MultivariateNormal(EYE[0], EYE).log_prob(u),
    "covariances": lambda u: dist.MultivariateNormal(u, outer(u)).log_prob(EYE[0]),
    "cholesky": lambda u: torch.linalg.cholesky(outer(u)).diagonal(dim1=-1, dim2=-2).log().sum(-1),
    "determinant": lambda u: torch.linalg.slogdet(outer(u))[1] + torch.linalg.det(outer(u)),
    "solve": solved,
    "quadratic form": lambda u: torch.einsum("bi,ij,bj->b", u, EYE, u),
    "softmax": lambda u: u.softmax(-1).log().cumsum(-1).flip(-1).sort(-1)[0].sum(-1),
    "mixture": lambda u: dist.MixtureSameFamily(
        dist.Categorical(EYE[0] + 1), dist.Normal(u, 1.0)
    ).log_prob(X[:, 0]),
    "own entry": lambda u: u[torch.arange(ROWS), torch.tensor([0, 1, 2, 0, 1])],
    "assembled": assembled,
    "scattered": scattered,
    "triangular by a mask": triangular,
    "multinomial": lambda u: dist.Multinomial(4, u.softmax(-1)).log_prob(4.0 * EYE[0]),
    "zeros by a mask": lambda u: total(u.clone().index_put_((u < 0,), torch.zeros(()).to(u))),
    "table": lambda u: total(TABLE(torch.arange(ROWS)) * u),
    "lookup": lambda u: total(EYE[(u > 0).long().sum(-1) % DIM] * u),
    "statistics": lambda u: u.var(-1) + u.logsumexp(-1) + u.norm(dim=-1) + u.amax(-1) + u.prod(-1),
    "cut and joined": lambda u: total(torch.cat([*[a for a in u.split(1, -1)][::-1], u], -1)),
    "transposed": lambda u: (u.T * torch.arange(3.0).unsqueeze(-1)).sum(0),
    "constants along rows": lambda u: total(u * X[:, :1].flip(0).cumsum(0)),
    "elementwise functions": lambda u: total(every_function(u)),
    "angles": lambda u: dist.VonMises(CircleTransform(EYE[0])(u), 2.0).log_prob(EYE[0]).sum(-1),
    "custom gradient": lambda u: total(Square.apply(u)),
}
TOGETHER = {
    "cat": lambda u: total(torch.cat([u[:1], u[1:2] + 2 * u[:1], u[2:]])),
    "max": lambda u: total(u + 3 * torch.relu(u.max() - 2.0)),
    "mean": lambda u: total(u - u.mean(0)),
    "flip": lambda u: total(u.flip(0)),
    "roll": lambda u: total(u.roll(1, 0)),
    "cumsum": lambda u: total(u.cumsum(0)),
    "sort": lambda u: total(u.sort(0)[0]),
    "batch norm": lambda u: total(nn.functional.batch_norm(u, None, None, training=True)),
    "gram": lambda u: (u @ u.T).sum(-1),
    "pairs": lambda u: total((u.unsqueeze(1) - u).square()),
    "permutation": lambda u: total(u[torch.tensor([1, 0, 2, 3, 4])]),
    "view": lambda u: u.reshape(DIM, ROWS).sum(0),
    "transposed view": lambda u: u.T.reshape(ROWS, DIM).sum(-1),
    "weights over rows": lambda u: (u.T @ torch.ones(ROWS, ROWS, dtype=u.dtype)).sum(0),
    "graph edges": lambda u: total(u.index_add(0, torch.tensor([0]), u[3:4])),
    "siblings": lambda u: total(u + u[torch.tensor([0, 0, 1, 1, 2])]),
    "one row": lambda u: total(u * u[0]),
    "softmax over rows": lambda u: total(u.softmax(0)),
    "attention over rows": lambda u: total(ATTENTION(u @ X[:DIM].expand(DIM, 4))),
    "kernel": lambda u: torch.cdist(u, u).sum(-1),
    "scan": lambda u: torch.stack([u[: i + 1].sum() for i in range(ROWS)]),
    "shifted by a mask": shifted,
    "written": lambda u: total(torch.zeros_like(u).index_put((torch.tensor([4, 3, 2, 1, 0]),), u)),
}


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return u.square()

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def meeting(function):
    u = torch.randn(ROWS, DIM, dtype=torch.float64)
    graph = forward_graph(lambda u: (total(-u.square()), function(u)), u)
    return find_meeting(graph, 0, ROWS)


@pytest.mark.parametrize("name", APART)
def test_rows_apart_are_proven_apart(name):
    assert meeting(APART[name]) is None


@pytest.mark.parametrize("name", TOGETHER)
def test_rows_that_meet_are_found_with_operation_and_line(name):
    found = meeting(TOGETHER[name])
    assert found is not None
    assert "test_coupling.py" in found.place


def test_unknown_operations_are_unproven():
    found = meeting(lambda u: total(u.unsqueeze(-1).expand(ROWS, DIM, 2).renorm(2, 0, 1.0)))
    assert found is not None
    assert not found.is_known


def siblings(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        loc = torch.cat([z[:1], z[1:2] + 2 * z[:1], z[2:]])
        pyro.sample("x", dist.Normal(loc, 0.5), obs=x)


X_OF_SIBLINGS = torch.tensor([1.5, -1.0, 0.3, 0.2, -0.5, 0.1, 0.7, -1.2, 0.4, 0.9])


def run(model, *args, chains=256, steps=40, **options):
    ais = AnnealedImportance(
        model, num_chains=chains, num_steps=steps, progress_bar=False, **options
    )
    return ais.run(*args)


@pytest.mark.parametrize("seed", range(3))
def test_one_coupled_pair_makes_the_plate_joint_for_every_seed(seed):
    mix = torch.eye(10, dtype=torch.float64)
    mix[1, 0] = 2.0
    covariance = mix @ mix.T + 0.25 * torch.eye(10)
    truth = torch.distributions.MultivariateNormal(torch.zeros(10), covariance)
    truth = float(truth.log_prob(X_OF_SIBLINGS.double()))
    assert truth == pytest.approx(-15.588, abs=1e-3)
    result = run(siblings, X_OF_SIBLINGS.double(), seed=seed)
    assert result.lower.shape == ()
    assert float(result.lower) == pytest.approx(truth, abs=5 * float(result.std_error))
    (note,) = [note for note in result.notes if "influence each other" in note]
    assert "torch.slice at test_coupling.py" in note
    with pytest.raises(ValueError, match=r"influence each other's .* \(torch.slice at test_coup"):
        run(siblings, X_OF_SIBLINGS, batch_plates=["data"])


@pytest.mark.parametrize("seed", range(2))
def test_coupling_in_a_region_makes_the_plate_joint_for_every_seed(seed):
    def model(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + 3 * torch.relu(z.max() - 2.0), 0.5), obs=x)

    result = run(model, torch.tensor([2.9, 2.7, 2.8], dtype=torch.float64), seed=seed, steps=300)
    assert result.lower.shape == ()
    # Quadrature on a grid of 241^3.
    assert float(result.lower) == pytest.approx(-9.364, abs=5 * float(result.std_error))


def test_a_model_that_is_not_recorded_says_that_rows_are_only_tested():
    def model(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            offset = torch.as_tensor((z.detach() > 100.0).numpy(), dtype=z.dtype)
            pyro.sample("x", dist.Normal(z + offset, 1.0), obs=x)

    with pytest.warns(UserWarning, match="evaluated slowly"):
        result = run(model, torch.tensor([0.4, 1.9, -0.3]), chains=8, steps=2, step_size=0.5)
    assert result.lower.shape == (3,)
    assert any("is tested at a few positions, not proven" in note for note in result.notes)


def test_a_plate_with_an_unknown_operation_is_joint_unless_it_is_asked_for():
    def model(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = z.renorm(2, 0, 100.0)  # far from its limit: the identity
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    x = torch.tensor([[0.4, 1.9], [-0.3, 0.0], [1.0, 1.0]], dtype=torch.float64)
    truth = torch.distributions.Normal(0.0, math.sqrt(2.0)).log_prob(x).sum(-1)
    joint = run(model, x)
    assert joint.lower.shape == ()
    assert any("not proven" in note and "torch.renorm" in note for note in joint.notes)
    assert float(joint.lower) == pytest.approx(float(truth.sum()), abs=5 * float(joint.std_error))
    rows = run(model, x, batch_plates=["data"])
    assert any("is tested at a few positions, not proven" in note for note in rows.notes)
    assert ((rows.lower - truth).abs() < 5 * rows.std_error + 1e-3).all()


def compositions(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)))
        pyro.sample("x", dist.Multinomial(4, z), obs=x)


def test_counts_of_categories_keep_their_own_evidence():
    """Multinomial writes zeros by a mask of the data; the truth is Dirichlet-multinomial."""
    x = torch.tensor([[1.0, 2.0, 1.0], [4.0, 0.0, 0.0], [0.0, 1.0, 3.0]], dtype=torch.float64)
    found = run(compositions, x, chains=64, steps=20)
    truth = dist.DirichletMultinomial(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), 4)
    assert found.lower.shape == (3,)
    assert bool(((found.lower - truth.log_prob(x)).abs() < 5 * found.std_error + 1e-3).all())
