"""Peak memory of runs against chains K, data B, steps T and simulated data sets S.

Each setting runs in a process of its own. The peak is that of the resident set, less what the
process held before the run (Python, torch, the model).

    python benchmarks/memory.py                 # all settings, writes results/memory.json
    python benchmarks/memory.py --one '{"num_chains": 64}'
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch

from pyro_anneal import HMC, AnnealedImportance, Linear

RESULTS = Path(__file__).parent / "results" / "memory.json"
BASE = {"num_chains": 16, "batch": 8, "num_steps": 20, "chain_batch_size": None, "pairs": 0}
CHANGES = [
    {},
    {"num_chains": 64},
    {"num_chains": 256},
    {"num_chains": 1024},
    {"num_chains": 256, "chain_batch_size": 16},
    {"num_chains": 1024, "chain_batch_size": 16},
    {"batch": 32},
    {"batch": 128},
    {"num_steps": 200},
    {"num_steps": 2000},
    {"num_steps": 10_000},
    {"pairs": 1},
    {"pairs": 10},
    {"pairs": 40},
]
LATENTS, HIDDEN, PIXELS = 10, 200, 784


class Decoder(torch.nn.Module):
    """A VAE's decoder with untrained weights: memory does not depend on their values."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(LATENTS, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, PIXELS)
        ).requires_grad_(False)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENTS), 1.0).to_event(1))
            logits = self.net(z)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


def peak(reset=False):
    """Reads the largest resident set so far in MiB, or sets it back to the present one."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure(setting):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x = Decoder(), torch.zeros(setting["batch"], PIXELS)

    def annealed(**changes):
        options = {key: setting[key] for key in ("num_chains", "num_steps", "chain_batch_size")}
        return AnnealedImportance(
            model,
            schedule=Linear(),
            kernel=HMC(num_leapfrog=1),
            step_size=0.1,
            compile=False,
            progress_bar=False,
            seed=0,
            **(options | changes),
        )

    annealed(num_chains=2, num_steps=2).run(x[:2])  # lazily loaded parts of torch
    before = peak(reset=True)
    ais = annealed()
    if setting["pairs"]:
        ais.mutual_information(x, num_simulations=setting["pairs"])
    else:
        ais.run(x)
    return {**setting, "peak_mib": round(peak() - before, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", help="a setting, as JSON")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(BASE | json.loads(arguments.one))))
        return
    rows = []
    for change in CHANGES:
        command = [sys.executable, "-W", "ignore", __file__, "--one", json.dumps(change)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
        about = {
            "model": f"VAE decoder {LATENTS}-{HIDDEN}-{PIXELS}, float32",
            "torch": torch.__version__,
            "machine": platform.machine(),
            "threads": 1,
        }
        arguments.output.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
