"""DifferentiableAIS beside NumPyro's AutoDAIS: the same targets, start, optimizer and gradients.

    python benchmarks/dais.py --numpyro PYTHON    # an interpreter that has NumPyro
    python benchmarks/dais.py                     # ours alone

Both train a diagonal Gaussian base and a path of single chains from one start, by Adam with a rate
that falls tenfold, and are judged by the mean of single-sample log-weights, an ELBO. Equal gradients: both
leap with one gradient in the middle of a step.
Both learn a scale per coordinate. AutoDAIS has step sizes linear in beta under a largest one, here with
its defaults and with wider settings; ours has one per temperature, and finds the first itself.

Targets: eight schools (non-centred), logistic regression on simulated data with correlated columns
(20 coefficients), a random walk of 30 steps with unknown scale, and the germination of seeds on 21 plates, a
logistic regression with random effects (Crowder 1978; 26 latents). Float64, one thread; times are those
of the processor.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoDiagonalNormal, init_to_value
from torch import Tensor

import pyro_anneal
from pyro_anneal.losses import DifferentiableAIS, ReverseScore

RESULTS = Path(__file__).parent / "results"
AUTODAIS_STEPS = ((0.01, 0.1), (0.05, 1.0))  # first and largest step: its defaults, and wider


class DiagonalNormal(AutoDiagonalNormal):
    """A diagonal Gaussian whose scales learn in their logarithms, as AutoDAIS has it."""

    scale_constraint = constraints.positive


def schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    log_tau = pyro.sample("log_tau", dist.Normal(0.0, 1.0))
    with pyro.plate("schools", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + log_tau.exp() * eta, sigma), obs=y)


def logistic(design: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(design.new_zeros(design.shape[1]), 1.0).to_event(1))
    pyro.sample("y", dist.Bernoulli(logits=design @ w).to_event(1), obs=y)


def walk(y: Tensor) -> None:
    scale = pyro.sample("log_scale", dist.Normal(-1.0, 1.0))
    z = pyro.sample("z", dist.Normal(y.new_zeros(len(y)), 1.0).to_event(1))
    path = z.cumsum(-1) * scale.exp()
    pyro.sample("y", dist.Normal(path, 0.3).to_event(1), obs=y)


def seeds(germinated: Tensor, total: Tensor, design: Tensor) -> None:
    b = pyro.sample("b", dist.Normal(design.new_zeros(4), 10.0).to_event(1))
    log_sigma = pyro.sample("log_sigma", dist.Normal(-1.0, 1.0))
    with pyro.plate("plates", len(total)):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        logits = design @ b + log_sigma.exp() * effect
        pyro.sample("y", dist.Binomial(total, logits=logits), obs=germinated)


def seeds_data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns germinated seeds, all seeds, and a design of two factors with their product."""
    germinated = "10 23 23 26 17 5 53 55 32 46 10 8 10 8 23 0 3 22 15 32 3"
    total = "39 62 81 51 39 6 74 72 51 79 13 16 30 28 45 4 12 41 30 51 7"
    extract = np.repeat([0.0, 1.0, 0.0, 1.0], [5, 6, 5, 5])
    species = np.repeat([0.0, 1.0], [11, 10])
    design = np.stack([np.ones(21), species, extract, species * extract], -1)
    return np.array(germinated.split(), float), np.array(total.split(), float), design


def targets() -> dict[str, tuple[Any, tuple[np.ndarray, ...], dict[str, np.ndarray]]]:
    """Returns model, data and start of each target."""
    random = np.random.RandomState(0)
    y = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    mixing = 0.6 * random.randn(20, 20) + np.eye(20)
    design = random.randn(100, 20) @ mixing
    labels = (random.rand(100) < 1 / (1 + np.exp(-design @ random.randn(20)))).astype(float)
    path = 0.5 * random.randn(30).cumsum() + 0.3 * random.randn(30)
    return {
        "schools": (
            schools,
            (y, sigma),
            {"mu": np.zeros(()), "log_tau": np.zeros(()), "eta": np.zeros(8)},
        ),
        "logistic": (logistic, (design, labels), {"w": np.zeros(20)}),
        "walk": (walk, (path,), {"log_scale": np.array(-1.0), "z": np.zeros(30)}),
        "seeds": (
            seeds,
            seeds_data(),
            {"b": np.zeros(4), "log_sigma": np.array(-1.0), "effect": np.zeros(21)},
        ),
    }


def truth(model: Any, data: tuple[Tensor, ...]) -> tuple[float, float]:
    """Computes log evidence and its standard error."""
    ais = pyro_anneal.AnnealedImportance(
        model, "auto", num_chains=64, num_steps=500, seed=0, progress_bar=False
    )
    run = ais.run(*data)
    return float(run.lower), float(run.std_error)


def ours(
    model: Any, data: tuple[Tensor, ...], start: dict[str, Tensor], seed: int, args: Any
) -> dict[str, float]:
    """Trains guide and path; returns the bound."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = DiagonalNormal(
        model, init_loc_fn=init_to_value(values=start), init_scale=args.init_scale
    )
    dim = sum(v.numel() for v in start.values())
    loss = DifferentiableAIS(
        1,
        args.gradients,
        dim=dim,
        reverse=ReverseScore(dim) if args.reverse else None,
    )
    guide(*data)
    parameters = [*guide.parameters(), *loss.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=args.rate)
    seconds = 0.0
    for step in range(args.steps):
        if step == 1:
            seconds = -time.process_time()  # the first one records the densities
        for group in optimizer.param_groups:
            group["lr"] = args.rate * 0.1 ** (step / args.steps)
        optimizer.zero_grad()
        loss.differentiable_loss(model, guide, *data).backward()
        optimizer.step()
    seconds += time.process_time()
    judge = DifferentiableAIS(args.count, args.gradients, dim=dim, reverse=loss.reverse)
    judge.load_state_dict(loss.state_dict())
    kept: list[Tensor] = []
    anneal = judge._anneal  # its value is the bound of all chains: single ones are wanted
    judge._anneal = lambda *a: (kept.append(anneal(*a)), kept[-1])[1]
    judge.loss(model, guide, *data)
    logs = kept[0].flatten()
    return {
        "seed": seed,
        "bound": float(logs.mean()),
        "se": float(logs.std() / len(logs) ** 0.5),
        "ms per step": 1e3 * seconds / args.steps,
    }


def peer(name: str, data: Any, start: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Runs NumPyro's AutoDAIS in its own interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        inputs, output = Path(folder) / "in.npz", Path(folder) / "out.json"
        arrays = {f"arg{i}": value for i, value in enumerate(data)}
        arrays |= {f"start{key}": value for key, value in start.items()}
        fields = ("gradients", "steps", "rate", "count", "step_size", "step_size_max")
        arrays |= {field: getattr(args, field) for field in fields}
        np.savez(
            inputs,
            target=name,
            num_args=len(data),
            seeds=args.seeds,
            init_scale=args.init_scale,
            **arrays,
        )
        script = Path(__file__).with_name("dais_numpyro.py")
        subprocess.run([args.numpyro, script, inputs, output], check=True)
        return json.loads(output.read_text())


def main() -> None:
    """Trains on every target and writes a record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--numpyro", help="interpreter that has NumPyro")
    parser.add_argument("--targets", nargs="*", default=["schools", "logistic", "walk", "seeds"])
    parser.add_argument("--gradients", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--init-scale", type=float, default=0.1)
    parser.add_argument("--count", type=int, default=2000, help="log-weights that judge")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--reverse", action="store_true", help="ours learns a reverse kernel")
    parser.add_argument("--output", type=Path, default=RESULTS / "losses_dais.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    record: dict[str, Any] = {"rows": []}
    if args.output.exists():
        record = json.loads(args.output.read_text())
    record["versions"] = record.get("versions", {}) | {
        "pyro_anneal": pyro_anneal.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    for name in args.targets:
        model, data, start = targets()[name]
        tensors = tuple(torch.from_numpy(value) for value in data)
        begin = {key: torch.from_numpy(value) for key, value in start.items()}
        known = [row["log evidence"] for row in record["rows"] if row["target"] == name]
        exact, error = known[0] if known else truth(model, tensors)
        shared = {"target": name, "gradients": args.gradients, "steps": args.steps}
        shared |= {"log evidence": [exact, error]}

        def add(rows: list[dict[str, Any]], method: str, shared: Any = shared) -> None:
            for row in rows:
                record["rows"].append(shared | {"method": method} | row)
                print(record["rows"][-1], flush=True)
            args.output.write_text(json.dumps(record, indent=1) + "\n")

        label = "DifferentiableAIS" + (", learned reverse kernel" if args.reverse else "")
        add([ours(model, tensors, begin, seed, args) for seed in args.seeds], label)
        for step_size, largest in AUTODAIS_STEPS if args.numpyro else ():
            args.step_size, args.step_size_max = step_size, largest
            theirs = peer(name, data, start, args)
            record["versions"] |= theirs["versions"]
            add(theirs["rows"], f"AutoDAIS, step {step_size} <= {largest}")


if __name__ == "__main__":
    main()
