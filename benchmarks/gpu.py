"""Checks and times the annealing loop on a CUDA machine, against the same numbers on the CPU.

Run as ``python benchmarks/gpu.py [--output FILE]``. It checks that

- log-weights agree between CPU and GPU in float64, given the same starts and the same noise;
- the loop waits for the device nowhere (``torch.cuda.set_sync_debug_mode``);
- one AIS step can be captured as a CUDA graph, and replays to the same numbers;

and measures, in float32, an AIS step over its bare gradients (plain, captured, and compiled with
``mode="reduce-overhead"``), chains times data per second, and the setting of the paper's MNIST VAE
(128 data, 48 chains, a 784-1024-1024-1024-10 decoder, 20 leapfrogs), extrapolated to 30,000
temperatures against the 8 hours on a P100 that the paper reports. The decoder's weights are random:
times do not depend on them.

Without CUDA it says so, runs the CPU half of its checks at a tiny size, and exits with 0.
"""

import argparse
import contextlib
import itertools
import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_anneal import HMC, Linear
from pyro_anneal.chains.loop import run_chains
from pyro_anneal.chains.path import Path as AnnealingPath
from pyro_anneal.chains.path import TuningTable
from pyro_anneal.kernels import State, Tuning
from pyro_anneal.problems.problem import prepare

RESULTS = Path(__file__).resolve().parent / "results" / "gpu.json"
PAPER_HOURS, PAPER_STEPS, PAPER_LEAPFROGS = 8.0, 30_000, 20


@dataclass(frozen=True)
class Size:
    """How large a decoder, and how many data and chains."""

    pixels: int
    hidden: tuple[int, ...]
    latents: int
    data: int
    chains: int


PAPER = Size(784, (1024, 1024, 1024), 10, 128, 48)
TINY = Size(12, (8,), 3, 4, 5)


def decoder(size, dtype, device):
    """Builds an MLP from latents to logits, with the same random weights on every device."""
    generator = torch.Generator("cpu").manual_seed(0)
    widths = [size.latents, *size.hidden, size.pixels]
    layers = []
    for wide, out in itertools.pairwise(widths):
        layer = nn.Linear(wide, out, device="cpu", dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(out, wide, generator=generator) / wide**0.5)
            layer.bias.zero_()
        layers += [layer, nn.Tanh()]
    net = nn.Sequential(*layers[:-1])
    return net.to(device=device, dtype=dtype).requires_grad_(False)


def vae(size, dtype, device):
    """Builds a model of binary images, and random images."""
    net = decoder(size, dtype, device)
    generator = torch.Generator("cpu").manual_seed(1)
    images = torch.rand(size.data, size.pixels, generator=generator) < 0.5
    images = images.to(device=device, dtype=dtype)

    def model(x):
        zeros = torch.zeros(size.latents, dtype=x.dtype, device=x.device)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=net(z)).to_event(1), obs=x)

    return model, images


def density_of(size, dtype, device, compiled=False):
    """Captures prior and joint density of the model for K chains."""
    model, images = vae(size, dtype, device)
    arguments = ((images,), {})
    return prepare(
        model,
        None,
        arguments,
        arguments,
        num_chains=size.chains,
        batch_plates="auto",
        compile=compiled,
        seed=0,
    ).density


class SharedNoise(HMC):
    """HMC whose noise is drawn on the CPU, so that both devices see the same numbers."""

    def noise(self, state, generator):
        """Draws on the CPU and copies."""
        position = state.position
        home = State(*(torch.empty(value.shape, dtype=value.dtype) for value in state))
        seed = generator.initial_seed()  # one per chunk, the same on all devices
        if seed not in self.streams:
            self.streams[seed] = torch.Generator("cpu").manual_seed(seed)
        drawn = super().noise(home, self.streams[seed])
        return tuple(value.to(position.device) for value in drawn)


def shared_noise(num_leapfrog):
    kernel = SharedNoise(num_leapfrog)
    object.__setattr__(kernel, "streams", {})
    return kernel


def start(size, dtype, device):
    generator = torch.Generator("cpu").manual_seed(2)
    shape = (size.chains, size.data, size.latents)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def table(size, dtype, device, step_size=0.1):
    example = torch.zeros(size.data, size.latents, dtype=dtype, device=device)
    return TuningTable.constant(step_size, example)


def anneal(size, dtype, device, num_steps, kernel, compiled=False):
    """Runs the loop itself and returns its log-weights."""
    density = density_of(size, dtype, device, compiled)
    path = AnnealingPath(Linear()(num_steps), kernel, table(size, dtype, device))
    with torch.no_grad():
        state = density(start(size, dtype, device))
        carry, _ = run_chains(density, path, state, direction="forward", seed=0, stream="gpu")
    return carry.log_weights


def check_agreement(size, device, num_steps=20):
    """Compares log-weights in float64 with those on the CPU, given the same noise."""
    ours = anneal(size, torch.float64, device, num_steps, shared_noise(2)).cpu()
    theirs = anneal(size, torch.float64, torch.device("cpu"), num_steps, shared_noise(2))
    difference = float((ours - theirs).abs().max())
    scale = float(theirs.abs().max())
    return {"largest_difference_nats": difference, "agrees": difference <= 1e-9 * (1.0 + scale)}


@contextlib.contextmanager
def synchronizations(device):
    """Collects torch's warnings of operations at which the host waits for the device."""
    found = []
    if device.type != "cuda":
        yield found
        return
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    found += [str(w.message) for w in caught if "synchroniz" in str(w.message)]


def check_synchronization(size, device, num_steps=250):
    """Counts where the loop waits for the device, over several chunks of steps."""
    dtype = torch.float32
    density = density_of(size, dtype, device)
    path = AnnealingPath(Linear()(num_steps), HMC(2), table(size, dtype, device))
    with torch.no_grad():
        state = density(start(size, dtype, device))
        with synchronizations(device) as found:
            run_chains(density, path, state, direction="forward", seed=0, stream="sync")
    return {"steps": num_steps, "count": len(found), "first": found[:1]}


def one_step(density, kernel, tuning, beta):
    """Builds one AIS step as a function of tensors: transition and weight increment."""

    def step(position, log_base, log_target, grad_base, grad_target, log_weights, *noise):
        state = State(position, log_base, log_target, grad_base, grad_target)
        state, _ = kernel.step(state, density, beta, tuning, noise)
        return (*state, log_weights + 1e-3 * state.log_ratio().double())

    return step


def step_and_inputs(size, dtype, device, num_leapfrog):
    density = density_of(size, dtype, device)
    graph, values = density.graph_and_inputs(size.chains)
    kernel = HMC(num_leapfrog)
    tuning: Tuning = table(size, dtype, device).at(0.5)
    beta = torch.full((), 0.5, dtype=dtype, device=device)

    def evaluate(position):
        return State(position, *graph(position, *values))

    with torch.no_grad():
        state = density(start(size, dtype, device))
        noise = kernel.noise(state, torch.Generator(device).manual_seed(3))
    weights = torch.zeros_like(state.log_target, dtype=torch.float64)
    inputs = (*state, weights, *noise)
    return one_step(evaluate, kernel, tuning, beta), evaluate, inputs


def check_cuda_graph(size, device, num_leapfrog=2):
    """Captures one AIS step as a CUDA graph and compares its replay with the step itself."""
    step, _, inputs = step_and_inputs(size, torch.float32, device, num_leapfrog)
    with torch.no_grad():
        expected = step(*inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = step(*inputs)
        graph.replay()
        torch.cuda.synchronize()
    return {
        "largest_difference": max(
            float((a - b).abs().max()) for a, b in zip(outputs, expected, strict=True)
        ),
        "replay_seconds": seconds(graph.replay, device),
    }


def seconds(function, device, repeats=20):
    """Times a call: the best of three averages, after a warm-up."""

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    best = float("inf")
    for _ in range(3):
        function()
        wait()
        began = time.perf_counter()
        for _ in range(repeats):
            function()
        wait()
        best = min(best, (time.perf_counter() - began) / repeats)
    return best


def measure(size, device, num_leapfrog, *, compiled):
    """Times one AIS step and the bare gradients that it needs."""
    step, evaluate, inputs = step_and_inputs(size, torch.float32, device, num_leapfrog)
    position = inputs[0]
    with torch.no_grad():
        result = {
            "num_leapfrog": num_leapfrog,
            "gradient_seconds": seconds(lambda: evaluate(position), device),
            "step_seconds": seconds(lambda: step(*inputs), device),
        }
        if compiled:
            fast = torch.compile(step, mode="reduce-overhead")
            result["compiled_step_seconds"] = seconds(lambda: fast(*inputs), device)
    best = min(value for name, value in result.items() if name.endswith("step_seconds"))
    bare = num_leapfrog * result["gradient_seconds"]
    result["step_over_bare_gradients"] = result["step_seconds"] / bare
    result["best_step_over_bare_gradients"] = best / bare
    result["chains_times_data_per_second"] = size.chains * size.data / best
    return result


def paper_setting(device):
    """Extrapolates the paper's run from steps of its size."""
    result = measure(PAPER, device, PAPER_LEAPFROGS, compiled=True)
    best = min(result["step_seconds"], result["compiled_step_seconds"])
    hours = best * PAPER_STEPS / 3600.0
    return result | {
        "hours_for_30000_steps": hours,
        "paper_hours_on_a_p100": PAPER_HOURS,
        "speedup_over_the_paper": PAPER_HOURS / hours,
    }


def report(device):
    """Runs all checks, and on a GPU all measurements."""
    size = Size(64, (64, 64), 8, 16, 16) if device.type == "cuda" else TINY
    with warnings.catch_warnings():
        # an evaluation that fell back would be another program
        warnings.filterwarnings("error", message="the density is evaluated slowly")
        results = {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu only",
            "torch": torch.__version__,
            "cuda": torch.version.cuda if device.type == "cuda" else None,
            "agreement": check_agreement(size, device),
            "synchronization": check_synchronization(size, device, 250),
        }
    if device.type != "cuda":
        step, _, inputs = step_and_inputs(size, torch.float64, device, 2)
        with torch.no_grad():
            *_, weights = step(*inputs)
        results["step_is_finite"] = bool(weights.isfinite().all())
        return results
    results["cuda_graph"] = check_cuda_graph(size, device)
    results["small"] = measure(size, device, 2, compiled=True)
    results["paper"] = paper_setting(device)
    return results


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if torch.cuda.is_available():
        results = report(torch.device("cuda"))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n")
    else:
        print("no CUDA device: running the CPU half of the checks; nothing is timed or written")
        results = report(torch.device("cpu"))
    print(json.dumps(results, indent=1))
    passed = results["agreement"]["agrees"] and results["synchronization"]["count"] == 0
    if not passed:
        raise SystemExit("CPU and GPU disagree, or the loop waits for the device")
    return results


if __name__ == "__main__":
    main()
