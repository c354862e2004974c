"""Evidence of posteriordb's models whose data are at hand, beside truths by two methods.

``python benchmarks/posteriordb.py [--data FOLDER] [--seeds 0 1] [NAME ...]`` merges into
``benchmarks/results/posteriordb.json``; FOLDER holds the unpacked JSON of github.com/stan-dev/posteriordb
for the models of ``posteriordb_more.py``. Truths use numpy and scipy alone: Gaussian latents
integrated in closed form and what is left by quadrature (``exact``), and importance sampling of the
whole joint density from a Student-t at its optimum (``sampled``). Priors are those of posteriordb
(Magnusson et al., BSD-3-Clause); its kilpisjarvi has a flat scale, hence no evidence.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy import optimize, special, stats

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from cases import CASES
from datafiles import find
from hard_problems import (
    SCHOOLS_SIGMA,
    SCHOOLS_Y,
    _log_integral,
    _log_normal,
    _schools_truth,
    autoregression,
    schools,
)
from posteriordb_more import MORE

from pyro_anneal import log_evidence

RESULTS = Path(__file__).parent / "results" / "posteriordb.json"


def data(name):
    return json.loads(find(f"posteriordb/{name}.json").read_text())


def sampled(log_joint, start, num=100_000, dof=6.0):
    """Importance sampling of exp(log_joint(u [N, D])) from a Student-t at the optimum."""
    negative = lambda u: -float(log_joint(u[None])[0])
    best = optimize.minimize(negative, start, method="BFGS", options={"maxiter": 2000}).x
    dim, width = len(best), 1e-3
    eye = np.eye(dim) * width
    hessian = np.empty((dim, dim))
    for i in range(dim):
        for j in range(dim):
            corners = [best + a * eye[i] + b * eye[j] for a in (1, -1) for b in (1, -1)]
            plus, minus, other, both = (negative(u) for u in corners)
            hessian[i, j] = (plus - minus - other + both) / (4 * width**2)
    values, vectors = np.linalg.eigh(0.5 * (hessian + hessian.T))
    scale = 1.3 * vectors / np.sqrt(values.clip(1e-3))
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((num, dim)) / np.sqrt(rng.chisquare(dof, num) / dof)[:, None]
    log_base = stats.multivariate_t(np.zeros(dim), np.eye(dim), df=dof).logpdf(noise)
    log_base = log_base - np.linalg.slogdet(scale)[1]
    ratio = np.concatenate([log_joint(best + part @ scale.T) for part in np.split(noise, 100)])
    ratio = ratio - log_base
    weights = np.exp(ratio - ratio.max())
    error = weights.std() / weights.mean() / math.sqrt(num)
    return float(ratio.max() + math.log(weights.mean())), float(error)


def _regression(design, y, log_prior_scale):
    """Evidence of ``y ~ N(X b, s)``, ``b ~ N(0, 10)``: exact in b; and the whole joint density."""
    gram = 100.0 * design @ design.T

    def given(log_scale):
        cov = gram + math.exp(2.0 * log_scale) * np.eye(len(y))
        return _log_normal(y, 0.0, cov) + log_prior_scale(math.exp(log_scale)) + log_scale

    def log_joint(u):
        b, log_scale = u[:, :-1], u[:, -1:]
        value = stats.norm.logpdf(y, b @ design.T, np.exp(log_scale)).sum(1)
        value = value + stats.norm.logpdf(b, 0.0, 10.0).sum(1)
        return value + log_prior_scale(np.exp(log_scale[:, 0])) + log_scale[:, 0]

    least = np.linalg.lstsq(design, y, rcond=None)[0]
    centre = math.log((y - design @ least).std())
    exact = lambda: _log_integral(given, centre - 0.8, centre + 1.0, 201)
    return exact, log_joint, np.append(least, centre)


def ar_k():
    y = np.array(data("arK")["y"])
    design = np.stack([np.ones(195), *(y[5 - k : 200 - k] for k in range(1, 6))], -1)
    truth = _regression(design, y[5:], stats.halfcauchy(scale=2.5).logpdf)
    return autoregression, (torch.tensor(y),), *truth


def blr_model(design, y):
    b = pyro.sample("beta", dist.Normal(torch.zeros(design.shape[1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(design @ b, sigma), obs=y)


def blr(name):
    design, y = (np.array(data(name)[key]) for key in ("X", "y"))
    truth = _regression(design, y, stats.halfnorm(scale=10.0).logpdf)
    return blr_model, (torch.tensor(design), torch.tensor(y)), *truth


def eight_schools(centred):
    y, sigma = np.array(SCHOOLS_Y), np.array(SCHOOLS_SIGMA)

    def log_joint(u):  # not centred: the narrow neck of the other would need more draws
        mu, log_tau, white = u[:, :1], u[:, 1:2], u[:, 2:]
        tau = np.exp(log_tau)
        value = stats.norm.logpdf(y, mu + tau * white, sigma).sum(1)
        value = value + stats.norm.logpdf(white).sum(1) + stats.norm.logpdf(mu[:, 0], 0.0, 5.0)
        return value + stats.halfcauchy.logpdf(tau[:, 0], scale=5.0) + log_tau[:, 0]

    args = (torch.tensor(SCHOOLS_Y), torch.tensor(SCHOOLS_SIGMA), centred)
    return schools, args, _schools_truth, log_joint, np.append([4.0, 1.0], np.zeros(8))


def dogs():
    case = CASES["E17 dogs"]()
    design, y = (np.asarray(part) for part in case.args[:2])
    signed = 2.0 * y - 1.0

    def log_joint(u):
        value = -np.logaddexp(0.0, -signed * (u @ design.T)).sum(1)
        return value + stats.norm.logpdf(u, 0.0, 100.0).sum(1)

    return case.model, case.args, lambda: case.truth, log_joint, np.zeros(3)


def gp_regression(x, y):
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    cov = alpha.square() * torch.exp(-0.5 * ((x[:, None] - x) / rho).square())
    cov = cov + sigma * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), cov), obs=y)


def gp_regr():
    found = data("gp_pois_regr")
    x, y = (np.array(found[key]) for key in ("x", "y"))
    gaps = -0.5 * (x[:, None] - x) ** 2

    def one(log_rho, log_alpha, log_sigma):
        rho, alpha, sigma = (math.exp(value) for value in (log_rho, log_alpha, log_sigma))
        cov = alpha**2 * np.exp(gaps / rho**2) + sigma * np.eye(len(x))
        value = _log_normal(y, 0.0, cov) + stats.gamma.logpdf(rho, 25.0, scale=0.25)
        value += stats.halfnorm.logpdf(alpha, scale=2.0) + stats.halfnorm.logpdf(sigma)
        return value + log_rho + log_alpha + log_sigma

    def log_joint(u):
        return np.array([one(*row) for row in u])

    def exact():
        axes = (
            np.linspace(0.9, 2.7, 41),
            np.linspace(-1.2, 2.4, 45),
            np.linspace(-7.0, 1.7, 61),
        )
        cell = math.prod(axis[1] - axis[0] for axis in axes)
        mesh = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
        return float(special.logsumexp(log_joint(mesh)) + math.log(cell))

    args = (torch.tensor(x, dtype=torch.double), torch.tensor(y))
    return gp_regression, args, exact, log_joint, np.array([1.8, 0.7, 0.0])


def gauss_mix(y):
    """Two components in order: as such of twice the density of unordered ones."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(torch.full((2,), 2.0)).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    weights = torch.stack([theta, 1.0 - theta])
    with pyro.plate("data", len(y)):
        mixture = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(mu, sigma))
        pyro.sample("y", mixture, obs=y)


def low_dim_gauss_mix():
    """As a model of unordered components, whose evidence is the same: the prior is symmetric."""
    y = np.array(data("low_dim_gauss_mix")["y"])

    def log_joint(u):
        mu, log_sigma, logit = u[:, :2], u[:, 2:4], u[:, 4]
        sigma, theta = np.exp(log_sigma), special.expit(logit)
        near = stats.norm.logpdf(y, mu[:, :1], sigma[:, :1]) + np.log(theta)[:, None]
        far = stats.norm.logpdf(y, mu[:, 1:], sigma[:, 1:]) + np.log1p(-theta)[:, None]
        value = np.logaddexp(near, far).sum(1) + stats.norm.logpdf(mu, 0.0, 2.0).sum(1)
        value = value + (stats.halfnorm.logpdf(sigma, scale=2.0) + log_sigma).sum(1)
        value = value + stats.beta.logpdf(theta, 5.0, 5.0) + np.log(theta) + np.log1p(-theta)
        return value + math.log(2.0)  # the other labelling, far away

    def exact():
        """Gauss-Hermite on a grid of the optimum's own Gaussian."""
        return _gauss_hermite(log_joint, np.array([-2.7, 2.8, 0.0, 0.0, 0.5]), 9)

    return gauss_mix, (torch.tensor(y),), exact, log_joint, np.array([-2.7, 2.8, 0.0, 0.0, 0.5])


def _gauss_hermite(log_joint, start, num):
    negative = lambda u: -float(log_joint(u[None])[0])
    best = optimize.minimize(negative, start, method="BFGS").x
    dim, width = len(best), 1e-3
    eye, hessian = np.eye(dim) * width, np.empty((dim, dim))
    for i in range(dim):
        for j in range(dim):
            parts = [(a * b, best + a * eye[i] + b * eye[j]) for a in (1, -1) for b in (1, -1)]
            hessian[i, j] = sum(sign * negative(u) for sign, u in parts) / (4 * width**2)
    scale = np.linalg.cholesky(np.linalg.inv(0.5 * (hessian + hessian.T)))
    nodes, weights = np.polynomial.hermite_e.hermegauss(num)
    mesh = np.stack(np.meshgrid(*[nodes] * dim, indexing="ij"), -1).reshape(-1, dim)
    logs = np.log(weights) + 0.5 * nodes**2
    total = np.stack(np.meshgrid(*[logs] * dim, indexing="ij"), -1).reshape(-1, dim).sum(1)
    points = best + mesh @ scale.T
    values = np.concatenate([log_joint(part) for part in np.array_split(points, 200)])
    return float(special.logsumexp(values + total) + np.log(np.diag(scale)).sum())


DEAR = ("Mh", "GLMM1", "GLMM_Poisson", "pilots")  # densities with inner sums or factorizations
MODELS = {
    "arK": ar_k,
    "sblri-blr": lambda: blr("sblri"),
    "sblrc-blr": lambda: blr("sblrc"),
    "eight_schools_centered": lambda: eight_schools(True),
    "eight_schools_noncentered": lambda: eight_schools(False),
    "dogs": dogs,
    "gp_regr": gp_regr,
    "low_dim_gauss_mix": low_dim_gauss_mix,
}


def measure(model, args, truth, seed):
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = log_evidence(model, *args, seed=seed, progress_bar=False)
    return {
        "seed": seed,
        "error": round(float(run.lower) - truth, 5),
        "std_error": round(float(run.std_error), 5),
        "covers": bool(float(run.interval()[0]) <= truth),
        "below": round(truth - float(run.interval()[0]), 4),
        "steps": run.num_steps,
        "chains": run.num_chains,
        "warnings": [d.name for d in run.diagnostics if d.severity == "warning"],
        "cpu_seconds": round(time.process_time() - began, 2),
    }


def at(folder):
    """Yields the models at hand and, given a folder of posteriordb's JSON, those typed from it."""
    yield from MODELS.items()
    for name, (file, make) in MORE.items() if folder is not None else ():
        found = json.loads((folder / f"{file}.json").read_text())
        yield name, lambda make=make, found=found: make(found)


def table(kept):
    """Prints what was measured as a table."""
    print("| model | log evidence | second method | errors | standard errors | CPU s | warnings |")
    print("|---|---|---|---|---|---|---|")
    for name, record in kept.items():
        other, error = record["sampled"]
        runs = record["runs"]
        exact = "" if record["exact"] is None else f"{record['exact']:.3f}"
        cells = [", ".join(f"{run[key]:{style}}" for run in runs) for key, style in COLUMNS]
        told = sorted({warning for run in runs for warning in run["warnings"]})
        cells = [name, exact, f"{other:.3f} +- {error:.3f}", *cells, ", ".join(told)]
        print(f"| {' | '.join(cells)} |")
    runs = [run for record in kept.values() for run in record["runs"]]
    covered = sum(run["covers"] for run in runs)
    print(f"\n{len(kept)} models, {len(runs)} runs, {covered} intervals cover")


COLUMNS = (("error", "+.3f"), ("std_error", ".3f"), ("cpu_seconds", ".1f"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[""])
    parser.add_argument("--data", type=Path, help="folder of posteriordb's data, as JSON")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--table", action="store_true", help="print what was measured before")
    given = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if given.table:
        table(kept)
        return
    for name, make in at(given.data):
        if not any(part in name for part in given.names):
            continue
        model, args, exact, log_joint, start = make()
        num = 100_000 if name in MODELS else 3_000 if name in DEAR else 20_000
        other, error = sampled(log_joint, start, num=num)
        truth = other if exact is None else exact()
        record = {"exact": None if exact is None else round(truth, 5)}
        record["sampled"] = [round(other, 5), round(error, 5)]
        record["runs"] = [measure(model, args, truth, seed) for seed in given.seeds]
        print(name, json.dumps(record), flush=True)
        kept[name] = record
        lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in kept.items())
        RESULTS.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
