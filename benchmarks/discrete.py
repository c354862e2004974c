"""Evidence of models with discrete latents that nothing sums out, against exact sums.

Run as ``python benchmarks/discrete.py [--only NAME]`` on one thread; prints the table of
``docs/discrete.md`` and merges into ``benchmarks/results/discrete.json``. ``--mnist DIR`` trains
the belief net of images first, on the four files of MNIST in that directory.
"""

import argparse
import gzip
import json
import math
import re
import time
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch

from pyro_anneal import AnnealedImportance, log_evidence

RESULTS = Path(__file__).resolve().parent / "results" / "discrete.json"
CRITICAL = 0.5 * math.log(1.0 + math.sqrt(2.0))


def bits(count):
    """Lists all rows of zeros and ones, ``[2 ** count, count]``."""
    codes = torch.arange(2**count).unsqueeze(-1)
    return ((codes >> torch.arange(count)) & 1).to(torch.get_default_dtype())


# --- the Ising model --------------------------------------------------------------------------


def neighbours(side, *, periodic):
    """Lists the bonds of a square lattice, two tensors of sites."""
    site = torch.arange(side * side).view(side, side)
    if periodic:
        there = (site.roll(-1, 0), site.roll(-1, 1))
        return site.flatten().repeat(2), torch.cat([part.flatten() for part in there])
    left = torch.cat([site[:-1].flatten(), site[:, :-1].flatten()])
    return left, torch.cat([site[1:].flatten(), site[:, 1:].flatten()])


def ising(side, coupling, *, periodic):
    left, right = neighbours(side, periodic=periodic)
    count = side * side

    def model():
        with pyro.plate("sites", count):
            up = pyro.sample("up", dist.Bernoulli(torch.full((count,), 0.5)))
        spin = 2.0 * up - 1.0
        energy = coupling * (spin[left] * spin[right]).sum()
        pyro.factor("bonds", energy + count * math.log(2.0))

    return model


def exact_ising(side, coupling, *, periodic, count, seed):
    """Draws exactly by coupling from the past: heat bath on a checkerboard, from all up and down.

    Source: Propp and Wilson (1996), *Exact sampling with coupled Markov chains*.
    """
    rows, columns = np.indices((side, side))
    even = (rows + columns) % 2 == 0
    generator = np.random.default_rng(seed)

    def field(spin):
        if periodic:
            return sum(np.roll(spin, step, axis) for axis in (-1, -2) for step in (1, -1))
        padded = np.pad(spin, [(0, 0), (1, 1), (1, 1)])
        return (
            padded[:, 2:, 1:-1] + padded[:, :-2, 1:-1] + padded[:, 1:-1, 2:] + padded[:, 1:-1, :-2]
        )

    def sweep(spin, uniform):
        for colour in (even, ~even):
            up = 1.0 / (1.0 + np.exp(-2.0 * coupling * field(spin)))
            spin = np.where(colour, np.where(uniform < up, 1.0, -1.0), spin)
        return spin

    draws = []
    for _ in range(count):
        past, length = [], 64
        while True:
            while len(past) < length:  # further back in time
                past.append(generator.random((side, side)))
            spin = np.stack([np.ones((side, side)), -np.ones((side, side))])
            for uniform in reversed(past):
                spin = sweep(spin, uniform)
            if (spin[0] == spin[1]).all():
                break
            length *= 2
        draws.append(torch.tensor(spin[0].reshape(-1) > 0).to(torch.get_default_dtype()))
    return torch.stack(draws)


def run_ising(side, coupling, truth, *, periodic, num_chains, num_steps, num_exact):
    model = ising(side, coupling, periodic=periodic)
    options = {"num_steps": num_steps, "compile": "auto"}
    record = both_ways(annealer(model, num_chains=num_chains, **options), truth)
    began = time.process_time()
    draws = exact_ising(side, coupling, periodic=periodic, count=num_exact, seed=1)
    reverse = annealer(model, num_chains=num_exact, **options).run_reverse(
        {"up": draws}, exact=True
    )
    record["upper_error"] = float(reverse.upper) - truth
    record["upper_std_error"] = float(reverse.std_error)
    record["seconds_upper"] = time.process_time() - began
    return record


# --- helpers ----------------------------------------------------------------------------------


def annealer(model, guide=None, **options):
    options = {"compile": False} | options  # compiling costs more than these runs
    return AnnealedImportance(model, guide, seed=0, progress_bar=False, **options)


def kernel_of(run):
    """Names the kernel's parts."""
    names = re.findall(r"DiscreteLangevin|ChromaticGibbs|SingleSite|HMC", run.kernel)
    return " + ".join(dict.fromkeys(names))


def both_ways(annealed, truth, *args):
    """Runs forward, and records the error of the lower bound."""
    began = time.process_time()
    return record_of(annealed.run(*args), truth, began)


def record_of(run, truth, began):
    return {
        "truth": truth,
        "lower_error": float(run.lower) - truth,
        "std_error": float(run.std_error),
        "seconds": time.process_time() - began,
        "kernel": kernel_of(run),
        "num_chains": run.num_chains,
        "num_steps": run.num_steps,
        "gradients": run.num_gradients,
        "flags": [found.name for found in run.diagnostics if found.severity == "warning"],
    }


def by_default(model, truth, *args):
    """Calls ``log_evidence`` as anybody would."""
    began = time.process_time()
    run = log_evidence(model, *args, seed=0, progress_bar=False)
    return record_of(run, truth, began)


# --- belief nets ------------------------------------------------------------------------------


def small_belief_net():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(30, 12, generator=generator) / math.sqrt(2.0)

    def model(data):
        with pyro.plate("rows", len(data)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((len(data), 12), 0.5)).to_event(1))
            logits = (2.0 * z - 1.0) @ weights.T
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=data)

    began = time.process_time()
    annealed = annealer(model, num_chains=64, num_steps=12000)
    result = annealed.sandwich(torch.zeros(8, 30))
    seconds = time.process_time() - began
    logits = (2.0 * bits(12) - 1.0) @ weights.T
    data = result.simulated["x"].unsqueeze(-2)
    truth = dist.Bernoulli(logits=logits).log_prob(data).sum(-1).logsumexp(-1) - 12 * math.log(2)
    gap = result.upper - result.lower
    return {
        "truth": float(truth.mean()),
        "lower_error": float((result.lower - truth).mean()),
        "upper_error": float((result.upper - truth).mean()),
        "largest_error": float(
            torch.maximum((result.lower - truth).abs(), (result.upper - truth).abs()).max()
        ),
        "gap": float(gap.mean()),
        "largest_gap": float(gap.abs().max()),
        "seconds": seconds,
        "kernel": kernel_of(result.forward),
    }


def boltzmann_machine():
    generator = torch.Generator().manual_seed(1)
    weights = 0.5 * torch.randn(20, 16, generator=generator)
    below = 0.3 * torch.randn(20, generator=generator)
    above = 0.3 * torch.randn(16, generator=generator)

    def model():
        v = pyro.sample("v", dist.Bernoulli(torch.full((20,), 0.5)).to_event(1))
        h = pyro.sample("h", dist.Bernoulli(torch.full((16,), 0.5)).to_event(1))
        energy = v @ weights @ h + v @ below + h @ above
        pyro.factor("energy", energy + 36 * math.log(2.0))

    h = bits(16)
    truth = float(
        (h @ above + torch.nn.functional.softplus(h @ weights.T + below).sum(-1)).logsumexp(0)
    )
    return both_ways(annealer(model, num_chains=128, num_steps=4000), truth)


def gaussian_boltzmann_machine(seed, dim, hidden, truth):
    """CASES E51 with both layers latent: visible units real, hidden ones binary."""
    random = np.random.RandomState(seed)
    weights, below, above = (
        torch.tensor(scale * random.randn(*shape))
        for scale, shape in ((0.5, (dim, hidden)), (0.5, (dim,)), (0.5, (hidden,)))
    )

    def model():
        v = pyro.sample("v", dist.Normal(below, 1.0).to_event(1))
        h = pyro.sample("h", dist.Bernoulli(torch.full((hidden,), 0.5)).to_event(1))
        constant = hidden * math.log(2.0) + 0.5 * dim * math.log(2.0 * math.pi)
        pyro.factor("energy", v @ weights @ h + h @ above + constant)

    return both_ways(annealer(model, num_chains=128, num_steps=8000), truth)


# --- discrete beside continuous ---------------------------------------------------------------


def mixture():
    torch.manual_seed(2)
    data = torch.cat([torch.randn(40) - 3.0, torch.randn(35), 0.7 * torch.randn(25) + 4.0])

    def model(data):
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("components", 3):
            locs = pyro.sample("locs", dist.Normal(0.0, 4.0))
        with pyro.plate("points", len(data)):
            kind = pyro.sample("kind", dist.Categorical(shares))
            pyro.sample("y", dist.Normal(locs[kind], 1.0), obs=data)

    truth, change = mixture_truth(data)
    return by_default(model, truth, data) | {"error_of_truth": change}


def mixture_truth(data):
    """Integrates the marginal likelihood around one of its six equal modes, in five dimensions.

    Returns:
        log Z from 13 nodes of Gauss-Hermite per dimension, and how far 11 nodes are from it.
    """

    def joint(u):  # two log ratios of shares, three locations
        logits = torch.cat([u[..., :2], torch.zeros_like(u[..., :1])], -1)
        shares, locs = logits.log_softmax(-1), u[..., 2:]
        prior = dist.Normal(0.0, 4.0).log_prob(locs).sum(-1) + shares.sum(-1) + math.log(2.0)
        each = shares.unsqueeze(-2) + dist.Normal(locs.unsqueeze(-2), 1.0).log_prob(
            data.unsqueeze(-1)
        )
        return prior + each.logsumexp(-1).sum(-1)

    mode = torch.tensor([0.5, 0.3, -3.0, 0.0, 4.0])
    for _ in range(20):
        grad = torch.func.grad(joint)(mode)
        hessian = torch.func.hessian(joint)(mode)
        mode = mode - torch.linalg.solve(hessian, grad)
    scale = torch.linalg.cholesky(torch.linalg.inv(-hessian))
    found = []
    for number in (11, 13):
        nodes, weights = map(torch.tensor, np.polynomial.hermite_e.hermegauss(number))
        grid = torch.cartesian_prod(*[nodes] * 5)
        weight = torch.cartesian_prod(*[weights.log() + 0.5 * nodes**2] * 5).sum(-1)
        values = torch.cat([joint(mode + part @ scale.T) for part in grid.split(20_000)])
        found.append(float((values + weight).logsumexp(0) + scale.diagonal().log().sum()))
    return found[1] + math.log(6.0), found[1] - found[0]


def changepoint():
    torch.manual_seed(3)
    counts = torch.cat(
        [torch.poisson(torch.full((40,), 3.0)), torch.poisson(torch.full((60,), 1.0))]
    )

    def model(counts):
        number = len(counts)
        early = pyro.sample("early", dist.Gamma(2.0, 1.0))
        late = pyro.sample("late", dist.Gamma(2.0, 1.0))
        change = pyro.sample("change", dist.Categorical(torch.ones(number)))
        rate = torch.where(torch.arange(number) < change, early, late)
        with pyro.plate("years", number):
            pyro.sample("events", dist.Poisson(rate), obs=counts)

    def segment(part):
        total, number = part.sum(), len(part)
        value = torch.lgamma(2.0 + total) - (2.0 + total) * math.log(1.0 + number)
        return value - torch.lgamma(part + 1.0).sum()

    terms = [segment(counts[:t]) + segment(counts[t:]) for t in range(100)]
    truth = float(torch.stack(terms).logsumexp(0) - math.log(100))
    return by_default(model, truth, counts)


def zero_inflated():
    torch.manual_seed(4)
    data = torch.poisson(torch.full((60,), 2.5)) * torch.bernoulli(torch.full((60,), 0.6))

    def model(data):
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("points", len(data)):
            active = pyro.sample("active", dist.Bernoulli(share))
            pyro.sample("count", dist.Poisson(rate * active + 1e-9), obs=data)

    share = (torch.arange(1000) + 0.5) / 1000
    rate = (torch.arange(2000) + 0.5) * 0.01
    on = share.log()[:, None, None] + dist.Poisson(rate + 1e-9).log_prob(data[:, None]).T
    off = (-share).log1p()[:, None, None] + dist.Poisson(torch.tensor(1e-9)).log_prob(data)
    likelihood = torch.logaddexp(on, off.expand_as(on)).sum(-1)
    prior = dist.Beta(2.0, 2.0).log_prob(share)[:, None] + dist.Gamma(2.0, 1.0).log_prob(rate)
    truth = float((likelihood + prior).flatten().logsumexp(0) + math.log(1e-3 * 0.01))
    return by_default(model, truth, data)


def spike_and_slab():
    torch.manual_seed(5)
    number, dim = 60, 20
    design = torch.randn(number, dim)
    design[:, 1] = 0.9 * design[:, 0] + 0.4 * design[:, 1]  # two columns that compete
    coefficients = torch.zeros(dim)
    coefficients[[0, 4, 9]] = torch.tensor([1.2, -0.8, 0.5])
    data = design @ coefficients + torch.randn(number)

    def model(data):
        with pyro.plate("columns", dim):
            used = pyro.sample("used", dist.Bernoulli(0.2))
            slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", number):
            pyro.sample("y", dist.Normal(design @ (used * slope), 1.0), obs=data)

    gram, pull = design.T @ design, design.T @ data
    terms = []
    for code in bits(dim).split(2**14):  # A = I + D gram D on the columns that are used
        inner = torch.eye(dim) + code.unsqueeze(-1) * gram * code.unsqueeze(-2)
        lower = torch.linalg.cholesky(inner)
        part = torch.linalg.solve_triangular(lower, (code * pull).unsqueeze(-1), upper=False)
        value = 0.5 * part.square().sum((-1, -2)) - lower.diagonal(0, -2, -1).log().sum(-1)
        on = code.sum(-1)
        terms.append(value + on * math.log(0.2) + (dim - on) * math.log(0.8))
    constant = -0.5 * float(data @ data) - 0.5 * number * math.log(2.0 * math.pi)
    truth = float(torch.cat(terms).logsumexp(0)) + constant
    return by_default(model, truth, data)


# --- the belief net of images -----------------------------------------------------------------


def deep_belief_net(folder, *, steps, num_images, num_chains, num_steps, num_samples=5000):
    """Trains a net of 200 and 200 binary latents by TVO; bounds images simulated from it."""
    from pyro_anneal.losses import TVO

    torch.set_default_dtype(torch.float32)
    with gzip.open(next(Path(folder).glob("train-images*")), "rb") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 784)
    images = torch.tensor(pixels[:20_000] > 127).float()
    layers = torch.nn.ModuleDict(
        {
            "down": torch.nn.Linear(200, 200),
            "out": torch.nn.Linear(200, 784),
            "up": torch.nn.Linear(784, 200),
            "top": torch.nn.Linear(200, 200),
        }
    )
    share = images.mean(0).clamp(0.01, 0.99)
    layers["out"].bias.data = share.logit()

    def model(x):
        pyro.module("layers", layers)
        with pyro.plate("rows", len(x)):
            z2 = pyro.sample("z2", dist.Bernoulli(torch.full((len(x), 200), 0.5)).to_event(1))
            z1 = pyro.sample("z1", dist.Bernoulli(logits=layers["down"](z2)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=layers["out"](z1)).to_event(1), obs=x)

    def guide(x):
        pyro.module("layers", layers)
        with pyro.plate("rows", len(x)):
            z1 = pyro.sample("z1", dist.Bernoulli(logits=layers["up"](x)).to_event(1))
            pyro.sample("z2", dist.Bernoulli(logits=layers["top"](z1)).to_event(1))

    began = time.process_time()
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 2e-3}), TVO(10))
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        svi.step(images[torch.randint(len(images), (50,), generator=generator)])
    trained = time.process_time() - began
    layers.requires_grad_(False)
    began = time.process_time()
    annealed = annealer(model, guide, num_chains=num_chains, num_steps=num_steps)
    result = annealed.sandwich(torch.zeros(num_images, 784))
    seconds = time.process_time() - began
    simulated = result.simulated["x"]
    began = time.process_time()
    iwae = importance_bound(model, guide, simulated, num_samples)
    gap = result.upper - result.lower
    return {
        "lower": float(result.lower.mean()),
        "upper": float(result.upper.mean()),
        "gap": float(gap.mean()),
        "largest_gap": float(gap.max()),
        "std_error_of_gap": float(gap.std() / num_images**0.5),
        "share_within_a_tenth": float((gap.abs() < 0.1).double().mean()),
        "iwae_less_lower": float((iwae - result.lower).mean()),
        "seconds": seconds,
        "seconds_of_iwae": time.process_time() - began,
        "seconds_of_training": trained,
        "training_steps": steps,
        "num_chains": num_chains,
        "num_steps": num_steps,
        "kernel": kernel_of(result.forward),
        "accept_prob": float(result.forward.accept_prob.mean()),
    }


def importance_bound(model, guide, data, num_samples):
    """Computes the IWAE bound of each row, in parts that fit in memory."""
    parts = []
    with torch.no_grad():
        for _ in range(num_samples // 100):
            rows = data.repeat(100, 1)
            trace = pyro.poutine.trace(guide).get_trace(rows)
            joint = pyro.poutine.trace(pyro.poutine.replay(model, trace=trace)).get_trace(rows)
            trace.compute_log_prob()
            joint.compute_log_prob()
            log_weight = sum(joint.nodes[name]["log_prob"] for name in ("z1", "z2", "x"))
            log_weight = log_weight - sum(trace.nodes[name]["log_prob"] for name in ("z1", "z2"))
            parts.append(log_weight.double().view(100, len(data)))
    return torch.cat(parts).logsumexp(0) - math.log(num_samples)


CASES = {
    "Ising 6 x 6, free, J = .2": lambda: run_ising(
        6, 0.2, 26.185827, periodic=False, num_chains=128, num_steps=4000, num_exact=64
    ),
    "Ising 6 x 6, free, J = .44": lambda: run_ising(
        6, 0.44, 31.564146, periodic=False, num_chains=128, num_steps=8000, num_exact=64
    ),
    "Ising 20 x 20, periodic, critical": lambda: run_ising(
        20, CRITICAL, 372.518277, periodic=True, num_chains=96, num_steps=24000, num_exact=96
    ),
    "belief net 12-30, 8 rows": small_belief_net,
    "RBM 20 x 16": boltzmann_machine,
    "Gaussian RBM 10 x 8 (E51)": lambda: gaussian_boltzmann_machine(0, 10, 8, 23.434922),
    "Gaussian RBM 20 x 12 (E51)": lambda: gaussian_boltzmann_machine(1, 20, 12, 54.600569),
    "mixture, 100 assignments": mixture,
    "changepoint": changepoint,
    "zero-inflated counts, 60 indicators": zero_inflated,
    "spike and slab, d = 20": spike_and_slab,
}


def show(found):
    print("| problem | log Z | lower bound less truth | upper bound less truth | seconds |")
    print("|---|---|---|---|---|")
    for name, record in found.items():
        if "truth" not in record:
            continue
        upper = f"{record['upper_error']:+.4f}" if "upper_error" in record else ""
        if "upper_std_error" in record:
            upper += f" ± {record['upper_std_error']:.3f}"
        lower = f"{record['lower_error']:+.4f}"
        if "std_error" in record:
            lower += f" ± {record['std_error']:.3f}"
        flags = f" ({', '.join(record['flags'])})" if record.get("flags") else ""
        print(
            f"| {name} | {record['truth']:.4f} | {lower}{flags} | {upper} "
            f"| {record['seconds'] + record.get('seconds_upper', 0.0):.0f} |"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--print", action="store_true", help="print what was measured before")
    parser.add_argument("--mnist", help="folder of MNIST; measures the net of images alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    cases = CASES
    if options.mnist:
        cases = {
            "belief net 200-200, images": lambda: deep_belief_net(
                options.mnist, steps=700, num_images=50, num_chains=64, num_steps=4000
            )
        }
    for name, measure in cases.items():
        if options.print or options.only not in name:
            continue
        pyro.set_rng_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            record = measure()
        print(name, json.dumps(record), flush=True)
        found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        found[name] = record
        ordered = {key: found[key] for key in [*CASES, *found] if key in found}
        RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
    show(json.loads(RESULTS.read_text()) if RESULTS.exists() else {})


if __name__ == "__main__":
    main()
