"""Runs random models of known evidence and counts errors, warnings and verdicts, per kind.

The models are those of ``tests/helpers/random_models.py``: trees of latents of all supports,
transforms, discrete sites, nested plates, rows that meet, masks, scales, data of all forms, both
precisions, short runs from all starts. A *quiet error* is a result without a warning further from
the truth than five standard errors (and .01 nat).

Run as ``python benchmarks/quiet_errors.py [--first 0] [--count 1000] [--output FILE]``. One line of
JSON per model is appended as it ends; seeds that the file holds are not run again. ``--table`` prints
what the file holds, ``--summary FILE`` also writes it as JSON.
"""

import argparse
import json
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import pyro
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "helpers"))

from random_models import Seeded, build, judge

ROWS = HERE / "results" / "quiet_errors.jsonl"
GROUPS = (
    *("real", "positive", "interval", "angle", "vector", "mixture", "discrete", "flat"),
    *("transform", "coupling", "rows apart", "enumerated", "nested plates", "mask by", "scale"),
    *("data", "torch.float32", "torch.float64", "start", "kernel", "likelihood"),
)


def study(seed):
    """Runs the model of one seed."""
    started = time.process_time()
    pyro.clear_param_store()
    record = {"seed": seed}
    try:
        model = build(Seeded(seed))
        record |= {"description": model.description, "accuracy": model.accuracy}
        record |= judge(model, seed=seed)
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is counted
        record |= {"crash": f"{type(error).__name__}: {error}"[:600]}
        record |= {"where": traceback.format_exc().splitlines()[-4:]}
    return record | {"seconds": round(time.process_time() - started, 3)}


def is_wrong(record):
    """Tells whether a result is further from the truth than chance allows."""
    return abs(record["error"]) > record["allowed"]


def table(records):
    """Counts results per kind: how many are right, and what was said of the rest."""
    done = [r for r in records if "crash" not in r]
    found = {"all": summarize(done)}
    for group in GROUPS:
        names = sorted(
            {t for r in done for t in r["tags"] if t == group or t.startswith(f"{group} ")}
        )
        for name in names:
            found[name] = summarize([r for r in done if name in r["tags"]])
    return found


def summarize(records):
    """Counts good and bad results, warnings and verdicts."""
    good = [r for r in records if abs(r["error"]) <= 0.1]
    bad = [r for r in records if abs(r["error"]) > 0.5]
    wrong = [r for r in records if is_wrong(r)]
    return {
        "models": len(records),
        "beyond 5 standard errors": len(wrong),
        "... without a warning": sum(not r["warnings"] for r in wrong),
        "within .1 nat": len(good),
        "... called suspicious": sum(r["verdict"] == "suspicious" for r in good),
        "... called failed": sum(r["verdict"] == "failed" for r in good),
        "over .5 nat off": len(bad),
        "... called ok": sum(r["verdict"] == "ok" for r in bad),
        "warnings of good": dict(Counter(w for r in good for w in r["warnings"]).most_common()),
        "warnings of bad": dict(Counter(w for r in bad for w in r["warnings"]).most_common()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=ROWS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--summary", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.touch()
    records = [json.loads(line) for line in options.output.read_text().splitlines()]
    known = {record["seed"] for record in records}
    if not options.table:
        warnings.simplefilter("ignore")
        with options.output.open("a") as file:
            for seed in range(options.first, options.first + options.count):
                if seed in known:
                    continue
                records.append(study(seed))
                file.write(json.dumps(records[-1]) + "\n")
                file.flush()
    for record in records:
        if "crash" in record:
            print("CRASH", record["seed"], record["crash"], record.get("description"))
        elif is_wrong(record) and not record["warnings"]:
            print("QUIET", record["seed"], f"{record['error']:.3f}", record["description"])
    found = table(records)
    for name, row in found.items():
        print(f"{name:28s}", *(value for value in row.values() if isinstance(value, int)))
    print(json.dumps(found["all"], indent=1))
    if options.summary:
        crashes = sum("crash" in record for record in records)
        report = {"torch": torch.__version__, "crashes": crashes, "kinds": found}
        options.summary.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
