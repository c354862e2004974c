"""Races against peers: time per step, sandwich gap at equal gradients, evidence against seconds.

One command makes one table; one race at a time merges into the same file::

    python benchmarks/races.py all --bdmc PATH --ami PATH --peer-python PATH
    python benchmarks/races.py steps|gap|evidence ...     python benchmarks/races.py table

``PATH`` of ``--bdmc`` and ``--ami`` are checkouts of github.com/lxuechen/BDMC and
github.com/huangsicong/ais_mi_estimation; ``--peer-python`` is an interpreter with pymc, blackjax and
dynesty. A peer that is not given is left out. One thread. Results lie in
``benchmarks/results/races.json``.
"""

import argparse
import itertools
import json
import math
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch

from pyro_anneal import HMC, AnnealedImportance, AnnealingWarning, Linear, log_evidence

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "races.json"
sys.path[:0] = [str(HERE), str(HERE.parent / "tests" / "helpers")]

ROWS, CHAINS, GRADIENTS = 100, 16, 2000
PEER_ROWS = 20  # of the gaps: theirs are large against their standard errors
LEAPFROGS = (1, 2, 10)  # of the peers, in the race of gaps
SCHEDULES = (None, 4.0)  # of the peers there: linear, and sigmoid of this sharpness


# --- Decoders with unit Gaussian noise, float32


def linear_decoder():
    """The linear VAE of case M01: 10 latents, 100 observations."""
    weights = torch.tensor(np.random.RandomState(0).randn(100, 10), dtype=torch.float32)
    return 10, lambda z: z @ weights.T


def mlp_decoder():
    """Two layers: 20 latents, 200 hidden units, 200 observations."""
    draw = np.random.RandomState(0)
    first = torch.tensor(draw.randn(20, 200) / math.sqrt(20), dtype=torch.float32)
    second = torch.tensor(3.0 * draw.randn(200, 200) / math.sqrt(200), dtype=torch.float32)
    return 20, lambda z: torch.tanh(z @ first) @ second


DECODERS = {"linear": linear_decoder, "MLP": mlp_decoder}


def decoder_model(decode, dim):
    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decode(z), 1.0).to_event(1), obs=x)

    return model


def simulate(decode, dim, seed):
    torch.manual_seed(seed)
    latents = torch.randn(ROWS, dim)
    mean = decode(latents)
    return latents, mean + torch.randn_like(mean)


def peers(options):
    from race_samplers import Ami, Bdmc

    given = {"BDMC": (Bdmc, options.bdmc), "ais_mi_estimation": (Ami, options.ami)}
    return {name: kind(path) for name, (kind, path) in given.items() if path}


# --- Race 1: seconds per AIS step at L = 10, same decoder, rows and T


def seconds_per_step(ais, data):
    """Times the chains alone, without set-up and pilot; the best of two runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return min(ais.run(data).seconds for _ in range(2)) / ais.num_steps


def race_steps(options):
    """Ours: linear schedule and HMC(10), as theirs; compiled."""
    records = {}
    for name, decoder in DECODERS.items():
        dim, decode = decoder()
        latents, data = simulate(decode, dim, 0)
        steps = options.steps
        record = {"steps": steps, "rows": ROWS, "chains": CHAINS}
        ais = AnnealedImportance(
            decoder_model(decode, dim),
            num_chains=CHAINS,
            num_steps=steps,
            schedule=Linear(),
            kernel=HMC(10),
            compile=True,
            cross_check=False,
            progress_bar=False,
            seed=0,
        )
        record["pyro_anneal"] = seconds_per_step(ais, data)
        for peer, sampler in peers(options).items():
            settings = {"num_leapfrog": 10, "num_chains": CHAINS, "forward": True}
            sampler.run(decode, latents, data, num_steps=3, **settings)
            times = []
            for _ in range(2):
                began = time.perf_counter()
                sampler.run(decode, latents, data, num_steps=steps, **settings)
                times.append(time.perf_counter() - began)
            record[peer] = min(times) / steps
        records[name] = record
        print(name, record, flush=True)
        save("steps", records)


# --- Race 2: gap of the sandwich at equal gradients


def our_gap(decode, dim, seed, num_leapfrog, target_accept):
    """Spends 2000 gradients per chain, the pilot's included, on our sandwich."""
    kernel = HMC(num_leapfrog, target_accept=target_accept)
    settings = {
        "num_chains": CHAINS,
        "kernel": kernel,
        "compile": True,
        "progress_bar": False,
        "seed": seed,
    }
    model, shape = decoder_model(decode, dim), torch.zeros(ROWS, len(decode(torch.zeros(dim))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AnnealingWarning)  # the first run only asks for the cost
        probe = AnnealedImportance(model, num_steps=2, **settings).sandwich(shape)
        steps = (GRADIENTS - probe.forward.pilot.num_gradients - 1) // num_leapfrog + 1
        sandwich = AnnealedImportance(model, num_steps=steps, **settings).sandwich(shape)
    spent = sandwich.forward.num_gradients + sandwich.forward.pilot.num_gradients
    assert spent <= GRADIENTS
    return {
        "gap": float(sandwich.gap.mean()),
        "gap_std_error": float(sandwich.std_error["gap"]),
        "expected_gap": sandwich.forward.pilot.expected_gap,
        "num_steps": steps,
        "gradients": spent,
        "num_leapfrog": num_leapfrog,
    }


def their_gap(sampler, decode, dim, seed, num_leapfrog):
    latents, data = (values[:PEER_ROWS] for values in simulate(decode, dim, seed))
    steps = GRADIENTS // num_leapfrog  # they spend one more per step, which a cache would save
    settings = {"num_steps": steps, "num_leapfrog": num_leapfrog, "num_chains": CHAINS}
    upper = sampler.run(decode, latents, data, forward=False, **settings)
    gap = upper - sampler.run(decode, latents, data, forward=True, **settings)
    error = float(gap.std()) / math.sqrt(len(gap))
    return {"gap": float(gap.mean()), "gap_std_error": error, "num_steps": steps}


def race_gap(options):
    records = load().get("gap", {})
    for name in options.decoders:
        dim, decode = DECODERS[name]()
        record = records.get(name, {})
        if "pyro_anneal" in options.methods:
            record["pyro_anneal"] = [
                our_gap(decode, dim, seed, options.leapfrogs, 0.75)
                for seed in range(options.seeds)
            ]
        records[name] = record
        save("gap", records)
        gaps = [round(run["gap"], 4) for run in record.get("pyro_anneal", [])]
        print(name, "ours", gaps, flush=True)
        for peer, sampler in peers(options).items():
            for shape, leapfrogs in itertools.product(SCHEDULES, LEAPFROGS):
                key = f"{peer}{' sigmoid' if shape else ''} L={leapfrogs}"
                if len(record.get(key, [])) >= options.seeds:
                    continue
                sampler.sigmoid = shape
                record[key] = [
                    their_gap(sampler, decode, dim, seed, leapfrogs)
                    for seed in range(options.seeds)
                ]
                print(name, key, [round(r["gap"], 2) for r in record[key]], flush=True)
                save("gap", records)


def mean_gap(runs):
    return statistics.mean(run["gap"] for run in runs)


# --- Race 3: error of the evidence against seconds


def evidence_cases():
    """Name to (model, arguments, truth); arguments are what the peers' script knows by kind."""
    import cases
    import hard_problems
    from datafiles import find

    found = {}
    names = ("E18 eight schools", "E08 pima-768", "E15 german")
    for name in names:
        case = cases.CASES[name]()
        kind = "schools" if "schools" in name else "logistic"
        found[name] = (kind, case.model, case.args, case.truth)
    sonar = np.load(find("sonar/sonar_full.npz"))
    y = (sonar["y"] + 1) / 2 if sonar["y"].min() < 0 else sonar["y"]
    design = cases._pad(cases._standardize(sonar["X"]))
    args = (cases._tensor(design), cases._tensor(y), 1.0)
    found["sonar, d=61"] = ("logistic", cases.logistic, args, SONAR_TRUTH)
    problem = hard_problems.HARD_PROBLEMS["AR(5), N(0,10)"]()
    found["AR(5), N(0,10)"] = ("autoregression", problem.model, problem.args, problem.truth())
    return found


# Importance sampling from a Student-t refitted five times, 400,000 draws: standard error 0.004.
SONAR_TRUTH = -108.387
# Standard errors that rounds go on to, the default's and a smaller one.
PEERS = ("pymc", "blackjax", "dynesty")
OURS = {None: "pyro_anneal", 0.005: "pyro_anneal to .005"}


def our_evidence(model, args, truth, seed, target):
    """Fit, pilot, rounds and scout; later seeds find what the first call of the model has kept."""
    began = processor_seconds()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AnnealingWarning)
        run = log_evidence(model, *args, target_gap=target, seed=seed, progress_bar=False)
    return {
        "error": float(run.lower) - float(truth),
        "std_error": float(run.std_error),
        "seconds": processor_seconds() - began,
        "flags": [found.name for found in run.diagnostics if found.severity == "warning"],
        "steps": [each.num_steps for each in run.rounds],
        "chains": run.num_chains,
    }


def processor_seconds():
    """Counts those of this process and of compilers that it called."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(part for kind in kinds for part in resource.getrusage(kind)[:2])


def race_evidence(options):
    torch.set_default_dtype(torch.float64)
    records = load().get("evidence", {})
    for name, (kind, model, args, truth) in evidence_cases().items():
        if options.only and options.only not in name:
            continue
        record = records.setdefault(name, {"truth": truth})
        record["truth"] = truth
        if "pyro_anneal" in options.methods:
            for target, label in OURS.items():
                seeds = range(options.seeds)
                runs = [our_evidence(model, args, truth, seed, target) for seed in seeds]
                record[label] = runs
                print(name, label, runs, flush=True)
        for method in options.methods:
            if method != "pyro_anneal" and options.peer_python:
                record[method] = peer_evidence(options, method, kind, args, truth)
                print(name, method, record[method], flush=True)
            save("evidence", records)


def peer_evidence(options, method, kind, args, truth):
    arrays = {f"arg{i}": np.asarray(a) for i, a in enumerate(args)}
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder, "data.npz"), Path(folder, "out.json")
        np.savez(data, **arrays)
        command = [options.peer_python, HERE / "race_peers.py", method, kind, data, out]
        threads = dict.fromkeys(
            ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"
        )
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        environment = {**os.environ, **threads, "XLA_FLAGS": flags, "PYTHONPATH": ""}
        arguments = [*map(str, command), str(options.seeds)]
        how = {"env": environment, "capture_output": True, "text": True}
        limit = int(options.limit)
        done = subprocess.run(
            ["bash", "-c", f'ulimit -S -t {limit}; exec "$@"', "bash", *arguments],
            check=False,
            **how,
        )
        if done.returncode and not out.exists():
            late = done.returncode == -signal.SIGXCPU
            said = ["no word of it", *done.stderr.strip().splitlines()][-1][:200]
            return [{"failed": f"not ended after {limit} s" if late else said}]
        runs = json.loads(out.read_text())["runs"]
    return [{**run, "error": run.pop("log_evidence") - truth} for run in runs]


# --- Results


def load():
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def save(race, records):
    RESULTS.write_text(json.dumps({**load(), race: records}, indent=1) + "\n")


def table(options=None):
    """Prints everything measured as one Markdown table."""
    found = load()
    rows = ["| race | case | pyro_anneal | peer | ratio |", "|---|---|---|---|---|"]
    for case, record in found.get("steps", {}).items():
        ours = record["pyro_anneal"]
        for peer, theirs in record.items():
            if peer not in ("steps", "rows", "chains", "pyro_anneal"):
                cells = f"{1e3 * ours:.2f} ms | {peer}: {1e3 * theirs:.2f} ms"
                rows.append(f"| time per step, L=10 | {case} | {cells} | {theirs / ours:.1f} |")
    for case, record in found.get("gap", {}).items():
        ours = mean_gap(record["pyro_anneal"])
        for peer in ("BDMC", "ais_mi_estimation"):
            at = {key: mean_gap(runs) for key, runs in record.items() if key.startswith(peer)}
            if at:
                best = min(at, key=at.__getitem__)
                long = min((k for k in at if k.endswith(" L=10")), key=at.__getitem__)
                for key in dict.fromkeys((best, long)):
                    label = f"{key}{' (their best)' if key == best else ''}: {at[key]:.2f}"
                    rows.append(
                        f"| gap at {GRADIENTS} gradients, nats | {case} | {ours:.3f} | {label} "
                        f"| {at[key] / ours:.0f} |"
                    )
    evidence = []
    for case, record in found.get("evidence", {}).items():
        evidence.append(
            f"| {case} | "
            + " | ".join(describe(record.get(name)) for name in (*OURS.values(), *PEERS))
            + " |"
        )
    print("\n".join(rows))
    heads = ["error of log p(x), nats in s", *OURS.values(), *PEERS]
    print("\n".join(["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *evidence]))


def describe(runs):
    """Root mean square error over seeds, and the times of the first call and of a later one."""
    if not runs:
        return "-"
    if any("failed" in run for run in runs):
        return str(next(run["failed"] for run in runs if "failed" in run))
    error = statistics.mean(run["error"] ** 2 for run in runs) ** 0.5
    first, *later = (run["seconds"] for run in runs)
    times = [f"{first:.1f}", *([f"{statistics.median(later):.1f}"] if later else [])]
    return f"{error:.3f} in {' / '.join(times)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("race", choices=["all", "steps", "gap", "evidence", "table"])
    parser.add_argument("--bdmc", type=Path)
    parser.add_argument("--ami", type=Path)
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--leapfrogs", type=int, default=1, help="ours in the race of gaps")
    parser.add_argument("--decoders", nargs="+", default=list(DECODERS), choices=list(DECODERS))
    parser.add_argument("--only", default="", help="part of the name of an evidence case")
    methods = ["pyro_anneal", *PEERS]
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods)
    parser.add_argument("--limit", type=float, default=600.0, help="CPU seconds of a peer's seeds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    races = {"steps": race_steps, "gap": race_gap, "evidence": race_evidence, "table": table}
    for name in races if options.race == "all" else [options.race]:
        races[name](options)
        torch.set_default_dtype(torch.float32)


if __name__ == "__main__":
    main()
