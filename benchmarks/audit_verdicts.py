"""How often does ``check_inference`` speak against a sampler that is right? Record for docs/distrust.md.

    python benchmarks/audit_verdicts.py [--first 0] [--count 100]    # two minutes; adds to results/audit_verdicts.json

Audits of 100 simulations, one seed each, of 80 exact draws from a conjugate model of two latents. Every
verdict but ``"ok"`` is false.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_anneal import check_inference

RESULTS = Path(__file__).parent / "results" / "audit_verdicts.json"
DATA = torch.tensor([1.0, -0.5])


def model(x: Tensor) -> None:
    with pyro.plate("rows", 2):
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def exact(x: Tensor) -> dict[str, Tensor]:
    """Draws from p(z|x) = N(0.8 x, 0.8)."""
    return {"z": 0.8 * x + 0.8**0.5 * torch.randn(80, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")
    kept = json.loads(args.output.read_text()) if args.output.exists() else {"audits": {}}
    began = time.process_time()
    for seed in range(args.first, args.first + args.count):
        audit = check_inference(model, exact, DATA, seed=seed, progress_bar=False)
        least = min(float(p.min()) for p in audit.adjusted_p_values.values())
        kept["audits"][str(seed)] = [audit.verdict, round(least, 5)]
        verdicts = [verdict for verdict, _ in kept["audits"].values()]
        kept["verdicts"] = {name: verdicts.count(name) for name in ("ok", "suspicious", "failed")}
        args.output.write_text(json.dumps(kept) + "\n")
    print(kept["verdicts"], f"{time.process_time() - began:.0f} CPU s")


if __name__ == "__main__":
    main()
