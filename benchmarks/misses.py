"""Errors and warnings of ``log_evidence`` where posterior mass is easily missed.

``python benchmarks/misses.py [--seeds 0 1 2] [--steps T] [--target G] [--resume] NAME ...`` runs
the problems whose names contain one of the NAMEs and merges into
``benchmarks/results/misses.json``: per problem and seed the bound minus the truth, standard error,
steps of the rounds, warnings, and CPU seconds of one thread. ``--resume`` leaves out the seeds that
the record has.
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
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from datafiles import find
from hard_problems import HARD_PROBLEMS, _log_integral_2d, _log_normal

from pyro_anneal import AnnealedImportance

RESULTS = Path(__file__).parent / "results" / "misses.json"
# Petal lengths of the irises by K: quadrature or symmetrized importance sampling, and tempered
# populations of 16,000 for three and four components (``iris_truth.py``).
IRIS_TRUTHS = {2: -131.959, 3: -132.683, 4: -133.606}


def components(x, num):
    w = pyro.sample("w", dist.Dirichlet(torch.ones(num)))
    with pyro.plate("components", num):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        sd = pyro.sample("sd", dist.LogNormal(-1.0, 0.7))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(w), dist.Normal(mu, sd)), obs=x)


def iris():
    from sklearn.datasets import load_iris

    x = torch.tensor(load_iris().data[:, 2])
    return (x - x.mean()) / x.std()


def spike_and_slab(shift, width, share, dim):
    """A normalized mixture of two phases, the narrow one ``shift`` beside the broad one."""
    x = pyro.sample("x", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
    phases = []
    for centre, scale, weight in ((1.0, 0.5, 1.0 - share), (1.0 + shift, width, share)):
        data = torch.full((dim,), centre)
        evidence = dist.Normal(torch.zeros(dim), math.hypot(1.0, scale)).log_prob(data).sum()
        phases.append(dist.Normal(x, scale).log_prob(data).sum() - evidence + math.log(weight))
    pyro.factor("phases", torch.stack(phases).logsumexp(0))


def brownian(y, seen):
    """Brownian motion with unknown scales (the inference gym's), the middle third unobserved."""
    innovation = pyro.sample("innovation", dist.LogNormal(0.0, 2.0))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 2.0))
    x = []
    for t in range(30):
        x.append(pyro.sample(f"x{t}", dist.Normal(x[-1] if x else 0.0, innovation)))
    with pyro.plate("times", int(seen.sum())):
        pyro.sample("y", dist.Normal(torch.stack(x)[seen], noise), obs=y[seen])


def brownian_data():
    y = np.genfromtxt(find("inference_gym/brownian_observed_loc.csv"))
    seen = torch.ones(30, dtype=torch.bool)
    seen[10:20] = False
    return torch.as_tensor(y), seen


def brownian_truth():
    y, seen = brownian_data()
    times = np.arange(1, 31)[seen.numpy()]
    steps, y = np.minimum.outer(times, times).astype(float), y.numpy()[seen.numpy()]

    def given(log_innovation, log_noise):
        cov = math.exp(2 * log_innovation) * steps + math.exp(2 * log_noise) * np.eye(len(y))
        prior = stats.norm.logpdf([log_innovation, log_noise], 0.0, 2.0).sum()
        return _log_normal(y, 0.0, cov) + prior

    def log_density(log_innovation, log_noises):
        return np.array([given(log_innovation, value) for value in log_noises])

    return _log_integral_2d(log_density, (-6.0, 1.5), (-9.0, 0.5), (201, 201))


def far_modes(loc):
    """Unit Gaussians far apart, normalized, under a wide prior."""
    prior = dist.Normal(torch.zeros(loc.shape[-1]), 40.0).to_event(1)
    x = pyro.sample("x", prior)
    modes = dist.Normal(loc, 1.0).to_event(1).log_prob(x).logsumexp(0) - math.log(len(loc))
    pyro.factor("modes", modes - prior.log_prob(x))


def student_modes(loc):
    """Products of Student-t with two degrees of freedom, normalized, under a wide prior."""
    prior = dist.Normal(torch.zeros(loc.shape[-1]), 15.0).to_event(1)
    x = pyro.sample("x", prior)
    modes = dist.StudentT(2.0, loc, 1.0).to_event(1).log_prob(x).logsumexp(0)
    pyro.factor("modes", modes - math.log(len(loc)) - prior.log_prob(x))


def one_gaussian(dim):
    """A Gaussian of fifty dimensions, from a wide prior: nothing to miss."""
    prior = dist.Normal(torch.zeros(dim), 40.0).to_event(1)
    x = pyro.sample("x", prior)
    pyro.factor("mode", dist.Normal(5.0, 1.0).expand([dim]).to_event(1).log_prob(x))
    pyro.factor("base", -prior.log_prob(x))


def _means(count, width):
    generator = torch.Generator().manual_seed(0)
    return (2.0 * torch.rand(count, 50, generator=generator, dtype=torch.float64) - 1.0) * width


PRIOR = {"guide": None, "num_chains": 64, "num_steps": 500}


def problems():
    """Yields name, model, arguments, truth (or a function) and options that are not the default."""
    for num, truth in IRIS_TRUTHS.items():
        yield f"iris, {num} components", components, lambda num=num: (iris(), num), truth, {}
    for shift, width, share in ((0.0, 0.05, 0.9), (0.4, 0.02, 0.9), (0.4, 0.05, 0.5)):
        args = lambda case=(shift, width, share, 10): case
        name = f"spike {width:g} of {share:.0%}, {shift:g} beside the slab"
        yield name, spike_and_slab, args, 0.0, {}
        yield f"{name}, prior", spike_and_slab, args, 0.0, {"guide": None, "num_steps": 500}
    for name, make in HARD_PROBLEMS.items():
        case = make()
        yield name, case.model, lambda case=case: case.args, case.truth, {}
    yield "brownian, unknown scales", brownian, brownian_data, brownian_truth, {}
    yield "one Gaussian, d=50, prior", one_gaussian, lambda: (50,), 0.0, PRIOR
    far, heavy = lambda: (_means(40, 40.0),), lambda: (_means(10, 10.0),)
    for options, which in (({}, ""), (PRIOR, ", prior")):
        yield f"40 Gaussians, d=50{which}", far_modes, far, 0.0, options
        yield f"10 Student-t, d=50{which}", student_modes, heavy, 0.0, options


def measure(model, args, truth, *, seed, steps, options):
    began = time.process_time()
    defaults = {"guide": "auto", "num_chains": 32, "target_gap": 0.02, "max_rounds": "auto"}
    if "target_gap" in options:
        defaults["max_rounds"] = 13  # as log_evidence has for a target that is passed
    if steps is not None or "num_steps" in options:
        defaults.pop("target_gap")
        options = options | ({} if steps is None else {"num_steps": steps})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = AnnealedImportance(model, seed=seed, progress_bar=False, **(defaults | options)).run(
            *args
        )
    return {
        "seed": seed,
        "lower": round(float(run.lower), 4),
        "error": None if truth is None else round(float(run.lower) - truth, 4),
        "std_error": round(float(run.std_error), 4),
        "ess": round(float(run.ess), 1),
        "steps": [each.num_steps for each in run.rounds or (run,)],
        "chains": [each.num_chains for each in run.rounds or (run,)],
        "lineages": None if run.num_lineages is None else int(run.num_lineages.min()),
        "warnings": [d.name for d in run.diagnostics if d.severity == "warning"],
        "gradients": {"fit": run.fit_gradients},
        "cpu_seconds": round(time.process_time() - began, 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", help="parts of names, or * for all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--target", type=float, help="a target of rounds that is not the default")
    parser.add_argument("--resume", action="store_true", help="only seeds that are not there yet")
    parser.add_argument("--save", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    kept = json.loads(given.save.read_text()) if given.save.exists() else {}
    for name, model, make_args, truth, options in problems():
        if given.target is not None:
            name, options = (
                f"{name}, target {given.target:g}",
                {"target_gap": given.target} | options,
            )
        if "*" not in given.names and not any(part in name for part in given.names):
            continue
        truth = truth() if callable(truth) else truth
        record = {"truth": truth, "options": {**options, "steps": given.steps}, "runs": []}
        if given.resume and name in kept:
            record["runs"] = kept[name]["runs"]
        done = {run["seed"] for run in record["runs"]}
        for seed in (seed for seed in given.seeds if seed not in done):
            found = measure(
                model, make_args(), truth, seed=seed, steps=given.steps, options=options
            )
            record["runs"].append(found)
            print(name, json.dumps(found), flush=True)
            kept[name] = record
            lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in kept.items())
            given.save.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
