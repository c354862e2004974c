"""Measures how far results can be believed: coverage of intervals, and what diagnostics catch.

Random problems of known evidence, many of them hard on purpose: few steps, few chains, kernels that
hardly move or never accept, starts far from the posterior, two modes. For each the sandwich is run
on simulated data, and the interval with a finite-sample guarantee, the asymptotic interval (lower
bound plus or minus 1.96 standard errors) and the diagnostics are compared with the truth.

Run as ``python benchmarks/calibration.py [--problems 200] [--output FILE]``. One pair per problem
counts, so that the problems are independent; results are written after each problem.
"""

import argparse
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy import special, stats
from scipy.special import betaln, gammaln

from pyro_anneal import HMC, AnnealedImportance, Linear, LogUniform, Power, RandomWalk, Sigmoid
from pyro_anneal.diagnostics import diagnose
from pyro_anneal.results.findings import judge

RESULTS = Path(__file__).resolve().parent / "results" / "calibration.json"
LEVELS = (0.5, 0.8, 0.95)


@dataclass(frozen=True)
class Problem:
    """A model, data of the shape to simulate, and log p(x) of any data, per batch element."""

    family: str
    dim: int
    batch: int
    model: Callable[..., Any]
    data: torch.Tensor
    log_evidence: Callable[[np.ndarray], np.ndarray]


def linear_gaussian(rng):
    """``z ~ N(0, s^2), x = W z + e`` with rows in a plate: one evidence per row."""
    d, m, n = int(rng.integers(1, 9)), int(rng.integers(1, 7)), int(rng.integers(1, 5))
    weights = rng.normal(size=(m, d)) * rng.uniform(0.3, 3.0)
    prior, noise = rng.uniform(0.3, 3.0, size=d), rng.uniform(0.2, 2.0, size=m)
    w, s, e = (torch.as_tensor(v) for v in (weights, prior, noise))

    def model(x):
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Normal(torch.zeros(d), s).to_event(1))
            pyro.sample("x", dist.Normal(z @ w.T, e).to_event(1), obs=x)

    cov = weights @ np.diag(prior**2) @ weights.T + np.diag(noise**2)

    def log_evidence(x):
        return stats.multivariate_normal(np.zeros(m), cov).logpdf(x).reshape(n)

    return Problem("linear Gaussian", d, n, model, torch.zeros(n, m), log_evidence)


def shared_mean(rng):
    """One mean for all rows: the plate is no batch."""
    n, tau, noise = int(rng.integers(1, 30)), rng.uniform(0.5, 20.0), rng.uniform(0.2, 2.0)

    def model(x):
        mean = pyro.sample("mean", dist.Normal(3.0, tau))
        with pyro.plate("rows", n):
            pyro.sample("x", dist.Normal(mean, noise), obs=x)

    cov = tau**2 * np.ones((n, n)) + noise**2 * np.eye(n)

    def log_evidence(x):
        return np.asarray(stats.multivariate_normal(3.0 * np.ones(n), cov).logpdf(x))

    return Problem("shared mean", 1, 1, model, torch.zeros(n), log_evidence)


def gamma_poisson(rng):
    """Counts with rates of their own: a lopsided posterior per row."""
    n, a, b = int(rng.integers(1, 4)), rng.uniform(0.5, 4.0), rng.uniform(0.05, 2.0)

    def model(x):
        with pyro.plate("rows", n):
            rate = pyro.sample("rate", dist.Gamma(a, b))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def log_evidence(x):
        return (
            gammaln(a + x)
            - gammaln(a)
            - gammaln(x + 1)
            + a * np.log(b / (b + 1))
            - x * np.log1p(b)
        )

    return Problem("gamma Poisson", 1, n, model, torch.zeros(n), log_evidence)


def beta_binomial(rng):
    """A proportion shared by d groups of trials."""
    n, a, b = int(rng.integers(1, 20)), rng.uniform(0.3, 5.0), rng.uniform(0.3, 5.0)
    total = int(rng.integers(1, 60))

    def model(x):
        p = pyro.sample("p", dist.Beta(a, b))
        with pyro.plate("groups", n):
            pyro.sample("x", dist.Binomial(total, p), obs=x)

    def log_evidence(x):
        choose = gammaln(total + 1) - gammaln(x + 1) - gammaln(total - x + 1)
        return choose.sum() + betaln(a + x.sum(), b + n * total - x.sum()) - betaln(a, b)

    return Problem("beta binomial", 1, 1, model, torch.zeros(n), log_evidence)


def unknown_scale(rng):
    """Mean and variance unknown (normal inverse gamma): a support that is not the real line."""
    n, a, b, k = int(rng.integers(2, 15)), rng.uniform(2.0, 5.0), rng.uniform(0.5, 5.0), 0.3

    def model(x):
        variance = pyro.sample("variance", dist.InverseGamma(a, b))
        mean = pyro.sample("mean", dist.Normal(0.0, (variance / k).sqrt()))
        with pyro.plate("rows", n):
            pyro.sample("x", dist.Normal(mean, variance.sqrt()), obs=x)

    shape = (b / a) * (np.eye(n) + np.ones((n, n)) / k)

    def log_evidence(x):
        return np.asarray(stats.multivariate_t(np.zeros(n), shape, df=2 * a).logpdf(x))

    return Problem("unknown scale", 2, 1, model, torch.zeros(n), log_evidence)


def squares(rng):
    """``x_i = c z_i^2 + e_i``: two modes per dimension, 2^d in all; truth by quadrature."""
    d, c, noise = int(rng.integers(1, 6)), rng.uniform(0.5, 3.0), rng.uniform(0.1, 1.0)

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.full((d,), 0.3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(c * z.square(), noise).to_event(1), obs=x)

    grid = np.linspace(-10.0, 10.0, 400_001)

    def log_evidence(x):
        prior = stats.norm(0.3, 1.0).pdf(grid)
        terms = [np.trapezoid(prior * stats.norm(c * grid**2, noise).pdf(v), grid) for v in x]
        return np.asarray(np.log(terms).sum())

    return Problem("squares", d, 1, model, torch.zeros(d), log_evidence)


def small_beta(rng):
    """Proportions next to 0 and 1, whose mass lies within rounding of the edges, in float32 too."""
    n, total = int(rng.integers(1, 4)), int(rng.integers(1, 12))
    a, b = rng.uniform(0.02, 0.3, size=2)

    def model(x):
        with pyro.plate("rows", n):
            p = pyro.sample("p", dist.Beta(a, b))
            pyro.sample("x", dist.Binomial(total, p), obs=x)

    def log_evidence(x):
        choose = gammaln(total + 1) - gammaln(x + 1) - gammaln(total - x + 1)
        return choose + betaln(a + x, b + total - x) - betaln(a, b)

    return Problem("small Beta", 1, n, model, torch.zeros(n), log_evidence)


def angles(rng):
    """Angles with observed directions: a circular prior, cut opposite to its centre."""
    n = int(rng.integers(1, 4))
    centre, prior, noise = rng.uniform(-3.0, 3.0), rng.uniform(0.2, 4.0), rng.uniform(0.3, 2.0)

    def model(x):
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.VonMises(torch.tensor(centre), prior)).unsqueeze(-1)
            fn = dist.Normal(torch.cat([z.cos(), z.sin()], -1), noise)
            pyro.sample("x", fn.to_event(1), obs=x)

    grid = np.linspace(-math.pi, math.pi, 4001)[:-1]
    density = stats.vonmises.pdf(grid, prior, centre)

    def log_evidence(x):
        terms = stats.norm(np.cos(grid), noise).pdf(x[:, :1])
        terms = terms * stats.norm(np.sin(grid), noise).pdf(x[:, 1:])
        return np.log((density * terms).sum(-1) * (grid[1] - grid[0]))

    return Problem("angles", 1, n, model, torch.zeros(n, 2), log_evidence)


def counted_animals(rng):
    """A number of animals, a count without an end, seen at several visits: a discrete latent."""
    visits, mean, seen = int(rng.integers(1, 6)), rng.uniform(1.0, 15.0), rng.uniform(0.1, 0.9)

    def model(x):
        number = pyro.sample("number", dist.Poisson(torch.tensor(mean)))
        with pyro.plate("visits", visits):
            pyro.sample("x", dist.Binomial(number, torch.tensor(seen)), obs=x)

    numbers = np.arange(200)

    def log_evidence(x):
        terms = stats.poisson.logpmf(numbers, mean)
        return np.asarray(
            special.logsumexp(terms + stats.binom.logpmf(x[:, None], numbers, seen).sum(0))
        )

    return Problem("discrete count", 1, 1, model, torch.zeros(visits), log_evidence)


def switching(rng):
    """Rows of two kinds, summed out, around a common location."""
    n, apart, share = int(rng.integers(1, 8)), rng.uniform(1.0, 5.0), rng.uniform(0.1, 0.9)
    tau, noise = rng.uniform(0.5, 10.0), rng.uniform(0.3, 1.5)

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, tau))
        with pyro.plate("rows", n):
            k = pyro.sample("k", dist.Bernoulli(share), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(mean + apart * k, noise), obs=x)

    grid = np.linspace(-9.0 * tau, 9.0 * tau, 20_001)

    def log_evidence(x):
        terms = stats.norm(0.0, tau).logpdf(grid)
        for value in x:
            one = stats.norm(grid + apart, noise).logpdf(value) + math.log(share)
            other = stats.norm(grid, noise).logpdf(value) + math.log1p(-share)
            terms = terms + np.logaddexp(one, other)
        return np.asarray(special.logsumexp(terms) + math.log(grid[1] - grid[0]))

    return Problem("enumerated rows", 1, 1, model, torch.zeros(n), log_evidence)


def reflected(rng):
    """A gamma variable, shifted and reflected below another latent."""
    n, shape = int(rng.integers(1, 4)), rng.uniform(0.5, 4.0)
    tau, noise = rng.uniform(0.3, 3.0), rng.uniform(0.2, 1.5)

    def model(x):
        top = pyro.sample("top", dist.Normal(0.0, tau))
        fn = dist.TransformedDistribution(
            dist.Gamma(torch.tensor(shape), 1.0), [dist.transforms.AffineTransform(top, -1.0)]
        )
        z = pyro.sample("z", fn)
        with pyro.plate("rows", n):
            pyro.sample("x", dist.Normal(z, noise), obs=x)

    v = (np.arange(2000) + 0.5) / 2000
    gammas, tops = stats.gamma.ppf(v, shape), stats.norm(0.0, tau).ppf(v)
    places = tops[:, None] - gammas

    def log_evidence(x):
        terms = sum(stats.norm(places, noise).logpdf(value) for value in x)
        return np.asarray(special.logsumexp(terms) - 2.0 * math.log(2000))

    return Problem("image of a support", 2, 1, model, torch.zeros(n), log_evidence)


FAMILIES = (
    *(linear_gaussian, shared_mean, gamma_poisson, beta_binomial, unknown_scale, squares),
    *(small_beta, angles, counted_animals, switching, reflected),
)
# Name, kernel and fixed step size: None is the pilot's. Half of them are bad on purpose.
KERNELS = (
    ("HMC, 2 leapfrogs", HMC(2), None),
    ("HMC, 5 leapfrogs", HMC(5), None),
    ("random walk", RandomWalk(), None),
    ("HMC that hardly moves", HMC(2), 1e-3),
    ("HMC that never accepts", HMC(2), 50.0),
    ("random walk that hardly moves", RandomWalk(), 1e-2),
)
HEALTHY = (*(name for name, _, step_size in KERNELS if step_size is None), "pilot's choice")


def draw_settings(rng, *, is_discrete=False):
    """Draws the number of chains and steps, the kernel, the schedule and the start."""
    name, kernel, step_size = KERNELS[rng.integers(len(KERNELS))]
    if is_discrete:  # moved by the pilot's choice of discrete kernels
        name, kernel, step_size = "pilot's choice", None, None
    schedules = ("adaptive", "adaptive", Linear(), Sigmoid(4.0), Power(3.0), LogUniform(1e-3))
    schedule = schedules[rng.integers(len(schedules))]
    options = {
        "num_chains": int(rng.choice([2, 4, 16, 64])),
        "num_steps": int(rng.choice([1, 3, 10, 30, 100])),
        **({} if kernel is None else {"kernel": kernel}),
        "step_size": step_size,
        "schedule": schedule,
        "guide": (None, None, "auto")[rng.integers(3)],
    }
    return name, options


def study(index, seed):
    """Runs one problem and compares everything with the truth, on the first pair."""
    rng = np.random.default_rng([seed, index])
    problem = FAMILIES[index % len(FAMILIES)](rng)
    kernel, options = draw_settings(rng, is_discrete=problem.family == "discrete count")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the findings are recorded
        ais = AnnealedImportance(problem.model, progress_bar=False, seed=index, **options)
        sandwich = ais.sandwich(problem.data)
    truths = np.asarray(problem.log_evidence(sandwich.simulated["x"].numpy()))
    truth = float(truths.reshape(-1)[0])
    lower, upper = (float(b.reshape(-1)[0]) for b in (sandwich.lower, sandwich.upper))
    std_error = float(sandwich.forward.std_error.reshape(-1)[0])
    ends = {level: [float(e.reshape(-1)[0]) for e in sandwich.interval(level)] for level in LEVELS}
    found = diagnose(sandwich.forward)
    run_only = [d.name for d in found if d.severity == "warning"]
    return {
        "family": problem.family,
        "dim": problem.dim,
        "batch": problem.batch,
        "kernel": kernel,
        "num_chains": options["num_chains"],
        "num_steps": options["num_steps"],
        "schedule": str(options["schedule"]),
        "start": options["guide"] or "prior",
        "truth": truth,
        "lower": lower,
        "upper": upper,
        "std_error": std_error,
        "width": ends[0.95][1] - ends[0.95][0],
        "covers": {str(level): low <= truth <= high for level, (low, high) in ends.items()},
        "bounds_cover": lower <= truth <= upper,
        "asymptotic_covers": abs(lower - truth) <= 1.96 * std_error + 1e-6,
        "run_verdict": judge(found),
        "verdict": sandwich.verdict,
        "run_warnings": run_only,
        "sandwich_warnings": [d.name for d in sandwich.diagnostics if d.severity == "warning"],
    }


def _share(rows, condition):
    return sum(condition(r) for r in rows) / len(rows) if rows else math.nan


def summarize(rows):
    """Computes coverage, widths, and how often failures were flagged."""
    gaps = np.array([r["upper"] - r["lower"] for r in rows])
    widths = np.array([r["width"] for r in rows])
    misses = [r for r in rows if not r["asymptotic_covers"]]
    far = [r for r in rows if abs(r["truth"] - r["lower"]) > 1.0]
    close = [r for r in rows if abs(r["truth"] - r["lower"]) <= 0.1]
    healthy = [r for r in close if r["kernel"] in HEALTHY]
    return {
        "problems": len(rows),
        "coverage": {str(v): _share(rows, lambda r, v=v: r["covers"][str(v)]) for v in LEVELS},
        "width_0.95_nats": {
            name: float(np.quantile(widths, q))
            for name, q in (("median", 0.5), ("upper decile", 0.9))
        },
        "gap_nats": {"median": float(np.median(gaps)), "mean": float(gaps.mean())},
        "bare_bounds_cover": _share(rows, lambda r: r["bounds_cover"]),
        "asymptotic_coverage": _share(rows, lambda r: r["asymptotic_covers"]),
        "asymptotic_misses": len(misses),
        "asymptotic_misses_flagged": {
            "run": _share(misses, lambda r: bool(r["run_warnings"])),
            "sandwich": _share(misses, lambda r: bool(r["sandwich_warnings"])),
        },
        "lower_over_1_nat_off": len(far),
        "lower_over_1_nat_off_flagged": {
            "run": _share(far, lambda r: bool(r["run_warnings"])),
            "sandwich": _share(far, lambda r: bool(r["sandwich_warnings"])),
        },
        "within_0.1_nat": len(close),
        "within_0.1_nat_flagged": {
            "run": _share(close, lambda r: bool(r["run_warnings"])),
            "sandwich": _share(close, lambda r: bool(r["sandwich_warnings"])),
        },
        "within_0.1_nat_healthy_kernel": len(healthy),
        "within_0.1_nat_healthy_kernel_flagged": {
            "run": _share(healthy, lambda r: bool(r["run_warnings"])),
            "sandwich": _share(healthy, lambda r: bool(r["sandwich_warnings"])),
        },
        "verdicts": {
            quality: {
                side: dict(Counter(r[key] for r in found))
                for side, key in (("run", "run_verdict"), ("sandwich", "verdict"))
            }
            for quality, found in (("within_0.1_nat", healthy), ("over_1_nat_off", far))
        },
    }


def per_kind(rows):
    """Counts, per diagnostic, warnings of good and of bad runs; per family, silent misses."""
    far = [r for r in rows if abs(r["truth"] - r["lower"]) > 1.0]
    close = [r for r in rows if abs(r["truth"] - r["lower"]) <= 0.1]
    names = sorted({name for r in rows for name in r["run_warnings"]})
    count = lambda found, name: sum(name in r["run_warnings"] for r in found)
    return {
        "diagnostics": {
            name: {"of_bad": count(far, name), "of_good": count(close, name)} for name in names
        },
        "families": {
            family: {
                "problems": sum(r["family"] == family for r in rows),
                "over_1_nat_off": sum(r["family"] == family for r in far),
                "silent": sum(r["family"] == family and not r["run_warnings"] for r in far),
                "covered": sum(r["family"] == family and r["covers"]["0.95"] for r in rows),
            }
            for family in sorted({r["family"] for r in rows})
        },
    }


def _finite(row):
    """Replaces what JSON has no word for."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def _write(path, seed, rows):
    report = {
        "seed": seed,
        "torch": torch.__version__,
        "summary": summarize(rows),
        "kinds": per_kind(rows),
        "rows": [_finite(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    rows = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
    rows = [{k: (math.nan if v is None else v) for k, v in r.items()} for r in rows]
    for index in range(len(rows), options.problems):
        rows.append(study(index, options.seed))
        _write(options.output, options.seed, rows)
        last = rows[-1]
        print(
            f"{index:4d} {last['family']:16s} {last['kernel']:30s} K={last['num_chains']:<3d} "
            f"T={last['num_steps']:<4d} truth {last['truth']:9.3f} in "
            f"[{last['lower']:9.3f}, {last['upper']:9.3f}] {last['sandwich_warnings']}",
            flush=True,
        )
    print(json.dumps(summarize(rows), indent=1))


if __name__ == "__main__":
    main()
