"""AIS and IWAE from the prior and from an encoder, on decoders of 2, 10 and 100 latents: the paper's Table 1.

    python benchmarks/mi_table_1.py --data mnist --work build --output benchmarks/results --decoder VAE --latents 10
    python benchmarks/mi_table_1.py --table benchmarks/results/mi_table_1.json

Rows are those of the table as the authors' scripts make it (github.com/huangsicong/ais_mi_estimation: IWAE
with K = 1, 1000 and 10^6, AIS with T = 1, 500 and 30,000, each from p(z) and from q(z|x)), at sizes for one
thread: K up to 1000, T up to 2000, the small decoders and encoders of ``mi_images.py``, 40 pairs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch

sys.path.insert(0, str(Path(__file__).parent))
import mi_images

from pyro_anneal import mi


def rows(joint: mi.DistributionJoint, encoder: mi_images.Encoder) -> dict[str, mi.Bound]:
    found: dict[str, mi.Bound] = {}
    for start, guide in (("p(z)", None), ("q(z|x)", encoder)):
        for count in (1, 1000):
            found[f"IWAE, K={count}, {start}"] = mi.IWAE(joint, guide, count)
        for steps in (100, 500, 2000):
            bound = mi.AIS(joint, guide, num_chains=8, num_steps=steps)
            found[f"AIS, K=8, T={steps}, {start}"] = bound
    return found


def show(record: dict[str, Any]) -> None:
    """Prints bounds as a table of Markdown, a column for each decoder."""
    names = list(record)
    print("| bound |", " | ".join(names), "|")
    print("|---" * (len(names) + 1) + "|")
    for row in next(iter(record.values()))["rows"]:
        cells = [record[name]["rows"].get(row) for name in names]
        shown = ["" if c is None else f"{c['lower']:.1f}, {c['upper']:.1f}" for c in cells]
        print(f"| {row} |", " | ".join(shown), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of MNIST's files")
    parser.add_argument("--work", type=Path, help="folder of trained networks")
    parser.add_argument("--decoder", choices=["VAE", "GAN"], default="VAE")
    parser.add_argument("--latents", type=int, default=10)
    parser.add_argument("--num-pairs", type=int, default=40)
    parser.add_argument("--output", type=Path, help="folder for a JSON file, which is added to")
    parser.add_argument("--table", type=Path, help="show this record, and run nothing")
    args = parser.parse_args()
    if args.table is not None:
        show(json.loads(args.table.read_text()))
        return
    torch.set_num_threads(1)
    torch.manual_seed(args.latents)
    mi_images.NUM_LATENT = args.latents
    mi_images.PRIOR = dist.Normal(torch.zeros(args.latents), 1.0).to_event(1)
    name = f"{args.decoder}, {args.latents} latents"
    joint, encoder = mi_images.problem(args, mi_images.Kept(args.work, name.replace(", ", "_")))
    encoder.requires_grad_(False)
    torch.manual_seed(1000)
    x, z = joint.sample(args.num_pairs)
    path = args.output / "mi_table_1.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    found = record.setdefault(name, {"pairs": args.num_pairs, "rows": {}})
    for row, bound in rows(joint, encoder).items():
        if row in found["rows"]:
            continue
        began = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            est = bound.estimate(x, z, seed=0)
        values = ("lower", "lower_std_error", "upper", "upper_std_error")
        found["rows"][row] = {side: round(float(getattr(est, side)), 4) for side in values} | {
            "gap_std_error": round(
                float((est.pair_upper - est.pair_lower).std() / len(x) ** 0.5), 4
            ),
            "findings": [d.name for d in est.diagnostics],
            "cpu_seconds": round(time.process_time() - began, 2),
        }
        print(name, row, found["rows"][row], flush=True)
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
