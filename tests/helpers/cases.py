"""Real problems whose log evidence is known, for tests and benchmarks.

Small tables lie in ``tests/data``; a case whose table is too large for it raises FileNotFoundError
where ``PYRO_ANNEAL_DATA`` names no folder that holds it.
"""

import csv
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from datafiles import find


@dataclass(frozen=True)
class Case:
    """A model with its arguments and the truth."""

    model: Any
    args: tuple[Any, ...]
    truth: float
    error: float = 0.0  # of the truth itself
    guide: Any = "auto"  # the documented choice of start


def _tensor(values):
    return torch.as_tensor(np.asarray(values, dtype=np.float64))


def _rows(name):
    with find(name).open() as file:
        return list(csv.DictReader(file))


def _standardize(x):
    x = np.asarray(x, dtype=np.float64)
    sd = x.std(0)
    return (x - x.mean(0)) / np.where(sd > 0, sd, 1.0)


def _pad(x):
    return np.concatenate([np.ones((len(x), 1)), x], 1)


def logistic(design, y, scale):
    w = pyro.sample("w", dist.Normal(torch.zeros(design.shape[1]), scale).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=design @ w), obs=y)


def _logistic_case(design, y, scale, truth, error):
    return Case(logistic, (_tensor(design), _tensor(y), scale), truth, error)


def _pima(columns):
    rows = _rows("pima/Pima.tr.csv") + _rows("pima/Pima.te.csv")
    x = [[float(r[c]) for c in columns] for r in rows]
    return _pad(_standardize(x)), [r["type"] == "Yes" for r in rows]


def _regression(x, y):
    a = pyro.sample("a", dist.Normal(3000.0, 1000.0))
    b = pyro.sample("b", dist.Normal(185.0, 100.0))
    s2 = pyro.sample("s2", dist.InverseGamma(3.0, 2.0 * 300.0**2))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a + b * (x - x.mean()), s2.sqrt()), obs=y)


def _radiata(column, truth):
    data = json.loads(find("radiata/pines.data.json").read_text())
    return Case(_regression, (_tensor(data[column]), _tensor(data["y"])), truth)


def conjugate(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def eight_schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    log_tau = pyro.sample("log_tau", dist.Normal(5.0, 1.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, log_tau.exp()))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


SCHOOLS_Y = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]  # Rubin (1981)
SCHOOLS_SIGMA = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]


def _dogs():
    y = np.array(json.loads(find("posteriordb/dogs.json").read_text())["y"], dtype=np.float64)
    shock = np.cumsum(y, 1) - y
    avoid = np.cumsum(1 - y, 1) - (1 - y)
    design = np.stack([np.ones_like(y), avoid, shock], -1).reshape(-1, 3)
    return _logistic_case(design, y.reshape(-1), 100.0, -306.021073, 0.0)


def _brownian_model(y, seen):
    x = []
    for t in range(30):
        x.append(pyro.sample(f"x{t}", dist.Normal(x[-1] if x else 0.0, 0.1)))
    x = torch.stack(x)
    with pyro.plate("times", int(seen.sum())):
        pyro.sample("y", dist.Normal(x[seen], 0.15), obs=y[seen])


def _brownian():
    y = np.genfromtxt(find("inference_gym/brownian_observed_loc.csv"))
    y = _tensor(y)
    seen = torch.ones(30, dtype=torch.bool)
    seen[10:20] = False
    return Case(_brownian_model, (y, seen), 5.613043)


def _probit(x, y):
    a = pyro.sample("a", dist.Normal(torch.zeros(2), math.sqrt(10.0)).to_event(1))
    probability = torch.special.ndtr(a[0] + a[1] * x).clamp(1e-300, 1 - 1e-16)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(probability), obs=y)


def _turtles():
    rows = _rows("turtles/turtles.csv")
    x, y = (_tensor([float(r[c]) for r in rows]) for c in "xy")
    return Case(_probit, (x, y), -156.478590)


def _hierarchical(y):
    t2 = pyro.sample("t2", dist.InverseGamma(1.0, 1.0))
    with pyro.plate("data", len(y)):
        theta = pyro.sample("theta", dist.Normal(0.0, t2.sqrt()))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def _bridgesampling():
    y = _tensor(np.genfromtxt(find("bridgesampling/vignette_y.csv")))
    return Case(_hierarchical, (y,), -37.534131)


def _fixed_regression(design, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(design.shape[1]), 0.240021**0.5).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(design @ w, 0.924901**0.5), obs=y)


def _nhefs():
    names = ["qsmk", "sex", "age", "race", "smokeyrs", "wt82_71"]
    rows = [[r[n] for n in names] for r in _rows("autobdmc/nhefs_book.csv")]
    x = _standardize([[float(v) for v in r] for r in rows if all(v.strip() for v in r)])
    return Case(_fixed_regression, (_tensor(_pad(x[:, :-1])), _tensor(x[:, -1])), -2328.926090)


def _autoregression(y):
    alpha = pyro.sample("alpha", dist.Normal(0.0, 1.0))
    beta = pyro.sample("beta", dist.Normal(1.0, 0.1))
    s2 = pyro.sample("s2", dist.InverseGamma(1.0, 1.0))
    with pyro.plate("times", len(y) - 1):
        pyro.sample("y", dist.Normal(alpha + beta * y[:-1], s2.sqrt()), obs=y[1:])


def _google():
    with find("autobdmc/google_stock.txt").open() as file:
        y = [float(line.split()[1]) for line in list(file)[1:] if line.strip()]
    return Case(_autoregression, (_tensor(y),), -310.256041)


def _blr(design, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(design.shape[1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(design @ w, sigma), obs=y)


def _sblri():
    data = json.loads(find("posteriordb/sblri.json").read_text())
    return Case(_blr, (_tensor(data["X"]), _tensor(data["y"])), -184.773172)


def _mixture(y, components):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(components)))
    s2 = pyro.sample("s2", dist.InverseGamma(3.0, 20.0))
    with pyro.plate("components", components):
        mu = pyro.sample("mu", dist.Normal(20.0, 10.0))
    with pyro.plate("data", len(y)):
        label = pyro.sample("label", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(mu[label], s2.sqrt()), obs=y)


def _galaxies(components, truth, error):
    y = np.array([float(r["dat"]) for r in _rows("galaxies/galaxies.csv")]) / 1000.0
    y[77] = 26.960
    return Case(_mixture, (_tensor(y), components), truth, error, guide=None)


def _cox(counts, chol, mean, area):
    size = len(counts)
    white = pyro.sample("white", dist.Normal(torch.zeros(size), 1.0).to_event(1))
    f = mean + chol @ white
    pyro.factor("likelihood", (counts * f - area * f.exp()).sum())


def _log_gaussian_cox(grid, truth, error):
    points = np.array([[float(r["data_x"]), float(r["data_y"])] for r in _rows("lgcp/fpines.csv")])
    counts, _, _ = np.histogram2d(points[:, 0], points[:, 1], bins=grid, range=[[0, 1], [0, 1]])
    index = np.stack(np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij"), -1)
    index = index.reshape(-1, 2)
    distance = np.sqrt(((index[:, None] - index[None]) ** 2).sum(-1))
    chol = np.linalg.cholesky(1.91 * np.exp(-distance / (grid / 33.0)))
    args = (_tensor(counts.reshape(-1)), _tensor(chol), math.log(126) - 0.955, 1.0 / grid**2)
    return Case(_cox, args, truth, error, guide=None)


def _many_well(pairs):
    """Pairs of a double well, against a wide Gaussian that is then taken out by a factor."""
    x = pyro.sample("x", dist.Normal(torch.zeros(pairs, 2), 1.5).to_event(2))
    base = dist.Normal(0.0, 1.5).log_prob(x).sum()
    first, second = x[:, 0], x[:, 1]
    well = -(first**4) + 6.0 * first**2 + 0.5 * first - 0.5 * second**2
    pyro.factor("well", well.sum() - base)


def _funnel():
    """Neal's funnel in ten dimensions against a standard start; its evidence is 0."""
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    x = pyro.sample("x", dist.Normal(torch.zeros(9), 1.0).to_event(1))
    wide = dist.Normal(0.0, (0.5 * v).exp()).log_prob(x).sum()
    pyro.factor("funnel", wide - dist.Normal(0.0, 1.0).log_prob(x).sum())


CASES = {
    "E01 conjugate": lambda: Case(conjugate, (torch.tensor(2.0),), -2.265512),
    "E02 radiata M1": lambda: _radiata("x", -309.924328),
    "E02 radiata M2": lambda: _radiata("z", -301.435102),
    "E04 pima-532 M1": lambda: _logistic_case(
        *_pima(["npreg", "glu", "bmi", "ped"]), 10.0, -257.2364, 3e-4
    ),
    "E05 pima-532 M2": lambda: _logistic_case(
        *_pima(["npreg", "glu", "bmi", "ped", "age"]), 10.0, -259.8622, 3e-4
    ),
    "E08 pima-768": lambda: _pima768(),
    "E12 ionosphere": lambda: _ionosphere(),
    "E15 german": lambda: _german(),
    "E17 dogs": _dogs,
    "E18 eight schools": lambda: Case(
        eight_schools, (_tensor(SCHOOLS_Y), _tensor(SCHOOLS_SIGMA)), -36.130816
    ),
    "E21 brownian": _brownian,
    "E24 turtles": _turtles,
    "E26 hierarchical": _bridgesampling,
    "E28 nhefs": _nhefs,
    "E31 google": _google,
    "E34 sblri": _sblri,
    "E38 galaxies K=3": lambda: _galaxies(3, -226.812, 0.013),
    "E39 galaxies K=2": lambda: _galaxies(2, -239.757, 0.03),
    "E40 cox M=10": lambda: _log_gaussian_cox(10, 474.412, 0.010),
    "E41 cox M=20": lambda: _log_gaussian_cox(20, 490.726, 0.015),
    "E44 many-well 2-d": lambda: Case(_many_well, (1,), 10.293480, guide=None),
    "E44 many-well 6-d": lambda: Case(_many_well, (3,), 30.880439, guide=None),
    "E46 funnel": lambda: Case(_funnel, (), 0.0, guide=None),
}


def _pima768():
    data = np.genfromtxt(find("pima/pima-indians-diabetes.data"), delimiter=",")
    return _logistic_case(_pad(_standardize(data[:, :-1])), data[:, -1], 1.0, -383.8820, 4e-4)


def _ionosphere():
    data = np.load(find("ionosphere/ionosphere_full.npz"))
    y = (data["y"] + 1) / 2
    return _logistic_case(_pad(_standardize(data["X"])), y, 1.0, -111.6122, 2e-3)


def _german():
    data = np.genfromtxt(find("german/german.data-numeric"))
    return _logistic_case(_pad(_standardize(data[:, :-1])), data[:, -1] - 1, 1.0, -529.1768, 1e-3)
