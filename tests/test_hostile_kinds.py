"""Other inputs of the kinds that once gave wrong numbers: each is right, or refused by name.

Rows that meet in a plate, in thirty ways; structures and families of Pyro that few models have.
Truths are Gaussian, by quadrature, or by enumeration.
"""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import integrate, special, stats
from torch import nn

from pyro_anneal import AnnealedImportance

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
T = dist.transforms
X = torch.tensor([1.5, -1.0, 0.3, 0.9], dtype=torch.float64)
W = torch.tensor(
    [[1.0, 0, 0, 0], [0.5, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0.3, 1]], dtype=torch.float64
)
normal = stats.norm.pdf


def run(model, *arguments, guide=None, chains=128, steps=60, **options):
    settings = {"num_chains": chains, "num_steps": steps, "seed": 0, "progress_bar": False}
    return AnnealedImportance(model, guide, **{**settings, **options}).run(*arguments)


def assert_right(result, truth):
    found, truth = result.log_evidence.double().numpy(), np.asarray(truth)
    assert found.shape == truth.shape
    std_error = result.std_error.double().numpy()
    assert (np.abs(found - truth) <= 4.5 * std_error + 0.5 * std_error**2 + 0.005).all()


# --- rows of a plate that meet ---


def written(z):
    out = z.clone()
    out[1:] += 0.5 * z[:-1]
    return out


def pooled(z):
    lead = z.view(1, 1, -1)
    wide = nn.functional.interpolate(lead, size=4, mode="linear", align_corners=True)
    return (wide + 0.3 * nn.functional.avg_pool1d(lead, 3, 1, 1)).view(-1)


LINEAR = {
    "cumsum": lambda z: z.cumsum(-1),
    "conv": lambda z: nn.functional.conv1d(
        z.view(1, 1, -1), torch.tensor([[[0.5, 1.0, 0.0]]]).to(z), padding=1
    ).view(-1),
    "fft": lambda z: torch.fft.irfft(torch.fft.rfft(z) * torch.tensor([1.0, 0.5, 0.2]), n=4),
    "index_select": lambda z: z + 0.5 * z.index_select(0, torch.tensor([1, 0, 3, 3])),
    "gather": lambda z: z + 0.5 * z.gather(0, torch.tensor([1, 2, 3, 0])),
    "roll": lambda z: z - 0.4 * z.roll(1, 0),
    "mean": lambda z: z - z.mean(-1, keepdim=True),
    "scatter_add": lambda z: z + torch.zeros_like(z).scatter_add(0, torch.tensor([0, 0, 1, 1]), z),
    "einsum": lambda z: torch.einsum("ij,j->i", W, z),
    "outer": lambda z: z + 0.2 * torch.outer(torch.ones_like(z), z).sum(1),
    "loop": lambda z: torch.stack([z[i] + (0.5 * z[i - 1] if i else 0.0) for i in range(4)]),
    "as_strided": lambda z: z + 0.5 * torch.as_strided(torch.cat([z, z]), (4,), (1,), 1),
    "diff": lambda z: torch.diff(z, prepend=z.new_zeros(1)),
    "pooling": pooled,
    "in place": written,
    "view": lambda z: z + 0.5 * z.view(2, 2).flip(1).reshape(4),
}


@pytest.mark.parametrize("name", LINEAR)
def test_rows_that_meet_linearly_share_one_evidence(name):
    mix = LINEAR[name]

    def model(x):
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(mix(z), 0.5), obs=x)

    weights = np.stack([mix(row).numpy() for row in torch.eye(4)], -1)
    covariance = weights @ weights.T + 0.25 * np.eye(4)
    assert_right(
        run(model, X), stats.multivariate_normal(np.zeros(4), covariance).logpdf(X.numpy())
    )


def attend(z):
    lead = z.view(1, 2, 1)
    return nn.functional.scaled_dot_product_attention(lead, lead, lead).view(2)


CURVED = {
    "softmax": (lambda z: 3 * z.softmax(0), lambda z: 3 * special.softmax(z, -1)),
    "sort": (lambda z: z.sort(0)[0].flip(0), lambda z: np.sort(z, -1)[..., ::-1]),
    "std": (lambda z: z * z.std(), lambda z: z * z.std(-1, ddof=1, keepdims=True)),
    "attention": (
        attend,
        lambda z: (special.softmax(z[..., :, None] * z[..., None, :], -1) * z[..., None, :]).sum(
            -1
        ),
    ),
    "batch norm": (
        lambda z: nn.functional.batch_norm(z.view(2, 1), None, None, training=True).view(2),
        lambda z: (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-5),
    ),
    "threshold": (
        lambda z: z - 0.5 * torch.relu(z.max() - 2.0),
        lambda z: z - 0.5 * np.maximum(z.max(-1, keepdims=True) - 2.0, 0.0),
    ),
    "logsumexp": (
        lambda z: z - torch.logsumexp(z, 0),
        lambda z: z - special.logsumexp(z, -1, keepdims=True),
    ),
    "product": (lambda z: z + z.prod(), lambda z: z + z.prod(-1, keepdims=True)),
    "median": (lambda z: z + z.median(), lambda z: z + z.min(-1, keepdims=True)),
    "argmax": (
        lambda z: z + (z.argmax() == torch.arange(2)).to(z.dtype),
        lambda z: z + (z == z.max(-1, keepdims=True)),
    ),
}


@pytest.mark.parametrize("name", CURVED)
def test_rows_that_meet_in_curves_share_one_evidence(name):
    mix, by_numpy = CURVED[name]

    def model(x):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(mix(z), 0.5), obs=x)

    grid = np.linspace(-7.0, 7.0, 1401)
    z = np.stack(np.meshgrid(grid, grid, indexing="ij"), -1)
    loc = by_numpy(z)
    density = normal(z).prod(-1) * normal(1.5, loc[..., 0], 0.5) * normal(-1.0, loc[..., 1], 0.5)
    truth = math.log(density.sum() * (grid[1] - grid[0]) ** 2)
    assert_right(run(model, X[:2], chains=256), truth)


# --- structures and families ---


def chained(*steps):
    return lambda: dist.TransformedDistribution(steps[0], list(steps[1:]))


def one(prior, y):
    def model():
        z = pyro.sample("z", prior())
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(y))

    return model


def integral(density, low, high):
    return math.log(integrate.quad(density, low, high, epsabs=1e-13, limit=500)[0])


CHAINS = {
    "an exponential variable, reflected and bent": (
        chained(dist.Exponential(1.0), T.AffineTransform(0.0, -1.0), T.ExpTransform()),
        0.9,
        integral(lambda u: normal(0.9, u, 1.0), 0.0, 1.0),
    ),
    "an inverse of tanh": (
        chained(dist.Uniform(0.0, 1.0), T.AffineTransform(-1.0, 2.0), T.TanhTransform().inv),
        1.3,
        integral(lambda u: normal(1.3, np.arctanh(2 * u - 1), 1.0), 1e-12, 1 - 1e-12),
    ),
    "a beta variable, reflected, in a sigmoid": (
        chained(dist.Beta(0.7, 2.0), T.AffineTransform(1.0, -2.0), T.SigmoidTransform()),
        0.2,
        integral(
            lambda b: stats.beta.pdf(b, 0.7, 2) * normal(0.2, special.expit(1 - 2 * b), 1.0), 0, 1
        ),
    ),
    "an inverse of a half-normal": (
        chained(dist.HalfNormal(1.0), T.PowerTransform(torch.tensor(-1.0))),
        1.3,
        integral(lambda h: 2 * normal(h) * normal(1.3, 1 / h, 1.0), 1e-9, 12.0),
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_of_transforms(name):
    prior, y, truth = CHAINS[name]
    assert_right(run(one(prior, y), guide="auto", chains=256), truth)


def test_flat_priors_of_all_shapes():
    def simplex():
        flat = dist.ImproperUniform(dist.constraints.simplex, (), (3,))
        pyro.sample("y", dist.Categorical(pyro.sample("z", flat)), obs=torch.tensor(0))

    def rows():
        with pyro.plate("rows", 2):
            flat = dist.ImproperUniform(dist.constraints.positive, (2,), ())
            z = pyro.sample("z", flat)
            pyro.sample("y", dist.Exponential(z), obs=torch.tensor([0.5, 2.0]))

    def vector():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).mask(False).to_event(1))
        pyro.factor("prior", dist.Normal(0.0, 2.0).log_prob(z).sum())
        pyro.sample("y", dist.Normal(z.sum(), 1.0), obs=torch.tensor(0.5))

    assert_right(run(simplex, guide="auto"), math.log(1 / 6))
    assert_right(run(rows, guide="auto"), -2.0 * np.log([0.5, 2.0]))
    assert_right(run(vector, guide="auto"), stats.norm.logpdf(0.5, 0.0, 13**0.5))


def test_parents_bound_children_that_bound_theirs():
    def model():
        a = pyro.sample("a", dist.HalfNormal(1.0))
        b = pyro.sample("b", dist.Uniform(-a, 2 * a))
        c = pyro.sample("c", dist.Uniform(b, b + a))
        pyro.sample("y", dist.Normal(c, 0.5), obs=torch.tensor(0.5))

    cdf = lambda x: stats.norm.cdf(x, 0.5, 0.5)
    density = lambda b, a: 2 * normal(a) / (3 * a * a) * (cdf(b + a) - cdf(b))
    truth = math.log(integrate.dblquad(density, 1e-6, 8, lambda a: -a, lambda a: 2 * a)[0])
    assert_right(run(model, guide="auto", chains=256, steps=100), truth)


def test_markov_chains_of_both_kinds():
    table = torch.tensor([[0.8, 0.2], [0.3, 0.7]])

    def model(x):
        z, k = pyro.sample("z0", dist.Normal(0.0, 1.0)), torch.tensor(0)
        for t in pyro.markov(range(3)):
            z = pyro.sample(f"z{t + 1}", dist.Normal(z, 1.0))
            fn = dist.Categorical(table.to(z.dtype)[k])
            k = pyro.sample(f"k{t}", fn, infer={"enumerate": "parallel"})
            pyro.sample(f"x{t}", dist.Normal(z + 2.0 * k, 0.5), obs=x[t])

    weights = np.c_[np.ones(3), np.tril(np.ones((3, 3)))]
    covariance = weights @ weights.T + 0.25 * np.eye(3)
    total, rates = 0.0, table.double().numpy()
    for path in np.ndindex(2, 2, 2):
        share = np.prod([rates[before, now] for before, now in zip((0, *path), path)])  # noqa: B905
        density = stats.multivariate_normal(2.0 * np.array(path), covariance)
        total += share * density.pdf(X[:3].numpy())
    assert_right(run(model, X[:3], steps=80), math.log(total))


def test_parameters_with_a_prior_and_interventions():
    def base(x):
        a = pyro.param("a", torch.tensor(0.0, dtype=torch.float64))
        pyro.sample("x", dist.Normal(a * torch.ones(3), 0.7).to_event(1), obs=x)

    lifted = poutine.lift(base, prior={"a": dist.Normal(0.0, 1.0)})
    covariance = np.ones((3, 3)) + 0.49 * np.eye(3)
    truth = stats.multivariate_normal(np.zeros(3), covariance).logpdf(X[:3].numpy())
    assert_right(run(lifted, X[:3]), truth)

    def pair(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    done = poutine.do(pair, data={"b": torch.tensor(0.7)})
    assert_right(run(done, torch.tensor(0.5)), stats.norm.logpdf(0.5, 0.7, 2**0.5))


@pytest.mark.parametrize("make", ["traced", "scripted", "checkpointed", "vmapped", "two layers"])
def test_decoders_of_other_makes(make):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    if make == "traced":
        decode = torch.jit.trace(net, torch.zeros(3, 2))
    elif make == "scripted":
        decode = torch.jit.script(net)
    elif make == "checkpointed":
        decode = lambda z: torch.utils.checkpoint.checkpoint(net, z, use_reentrant=False)
    elif make == "vmapped":
        decode = torch.func.vmap(net)
    else:
        lstm, last = nn.LSTM(2, 4, 2, batch_first=True).double(), nn.Linear(4, 1).double()
        decode = lambda z: last(lstm(z.unsqueeze(-2).expand(-1, 4, 2))[0]).squeeze(-1)
    y = 0.5 * torch.randn(3, 4)

    def model(y):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(decode(z), 1.0).to_event(1), obs=y)

    grid = torch.linspace(-6, 6, 241)
    z = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2)
    with torch.no_grad():
        loc, prior = decode(z), dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    terms = [prior + dist.Normal(loc, 1.0).log_prob(row).sum(-1) for row in y]
    truth = torch.stack(terms).logsumexp(-1) + 2 * math.log(0.05)
    assert_right(run(model, y, steps=30), truth.numpy())
