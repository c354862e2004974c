"""Runs the models of Pyro's own examples and tutorials through a run and through every loss.

The models are Pyro's, unmodified, at reduced size: fetch its repository and pass the folder.

    git clone --depth 1 https://github.com/pyro-ppl/pyro
    python benchmarks/gallery.py pyro

Each entry runs in a process of its own. The outcome of each way is a number, a refusal (an error of
this package or of Pyro that names what is wrong, with its words), or a crash. Writes
``benchmarks/results/gallery.json`` and the table of ``docs/gallery.md``.
"""

import argparse
import collections
import contextlib
import fcntl
import functools
import importlib.machinery
import importlib.util
import json
import math
import os
import platform
import random
import resource
import subprocess
import sys
import time
import traceback
import types
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from gallery_entries import ENTRIES
from gallery_truths import truth
from pyro import poutine

import pyro_anneal
from pyro_anneal import AnnealedImportance
from pyro_anneal.losses import AIWAE, EUBO, IWAE, TVO, DifferentiableAIS, Tightest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gallery.json"
PAGE = ROOT / "docs" / "gallery.md"
WAYS = {
    "IWAE": lambda: IWAE(3),
    "IWAE dreg": lambda: IWAE(3, gradient="dreg"),
    "IWAE vimco": lambda: IWAE(3, gradient="vimco"),
    "TVO": lambda: TVO(3),
    "TVO auto": lambda: TVO(3, Tightest(5), gradient="auto"),
    "TVO upper": lambda: TVO(3, bound="upper"),
    "EUBO": lambda: EUBO(3),
    "EUBO simulated": lambda: EUBO(2, "simulated"),
    "AIWAE": lambda: AIWAE(3, num_steps=2),
    "DifferentiableAIS": lambda: DifferentiableAIS(2, num_steps=2),
}
_REFUSALS = (ValueError, NotImplementedError)  # and a line that this package, or Pyro, wrote


class _Missing:
    """Puts stand-ins for packages of plots and data sets that the examples import."""

    NAMES = ("matplotlib", "seaborn", "pandas", "visdom", "torchvision", "scanpy", "sklearn")
    NAMES += ("pytorch_lightning", "horovod", "wget", "observations", "graphviz")

    def __init__(self) -> None:
        self.names = {name for name in self.NAMES if importlib.util.find_spec(name) is None}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = mock.MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__name__ = [], spec, spec.name
        return module

    def exec_module(self, module):
        pass


class Sources:
    """Loads modules and notebook cells of the fetched repository."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def module(self, path: str):
        """Imports ``examples/PATH``."""
        file = self.folder / "examples" / path
        for parent in (self.folder, self.folder / "examples", file.parent):
            sys.path.insert(0, str(parent))
        return importlib.import_module(
            ".".join(file.relative_to(file.parent).with_suffix("").parts)
        )

    def cells(self, name: str, *numbers: int, **names):
        """Executes some cells of ``tutorial/source/NAME.ipynb``; returns their namespace."""
        os.environ["CI"] = "1"  # as Pyro's own tests run them: two steps of training
        pyro.render_model = lambda *args, **kwargs: None
        book = json.loads((self.folder / "tutorial" / "source" / f"{name}.ipynb").read_text())
        space = {
            "torch": torch,
            "pyro": pyro,
            "dist": dist,
            "np": np,
            "poutine": poutine,
            "__name__": "notebook",
            "smoke_test": True,
            "os": os,
            **names,
        }
        for number in numbers:
            text = "".join(book["cells"][number]["source"])
            skipped = ("%", "!", "assert pyro.__version__")
            lines = [t for t in text.splitlines() if not t.lstrip().startswith(skipped)]
            exec(  # noqa: S102
                compile("\n".join(lines), f"{name}.ipynb, cell {number}", "exec"), space
            )
        return types.SimpleNamespace(**{k: v for k, v in space.items() if k[0] != "_"})


def _outcome(function):
    began = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = function()
    except Exception as error:  # noqa: BLE001
        kind = "refused" if _is_refusal(error) else "crash"
        says = " ".join(str(error).split()).partition(" Trace Shapes:")[0][:500]
        found = {"outcome": kind, "error": type(error).__name__, "says": says}
        if kind == "crash":
            traceback.print_exc()  # paths of this machine stay out of the record
    found["cpu_seconds"] = round(time.process_time() - began, 1)
    return found


def _is_refusal(error):
    """Tells whether an error of this package, raised on purpose, explains itself."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = "pyro_anneal" in last.filename
    theirs = last.filename.endswith("pyro/util.py")  # the checks of shapes in Pyro's own losses
    return (ours or theirs) and isinstance(error, _REFUSALS) and len(str(error)) > 20


def _run(entry, guide, **options):
    settings = {"num_chains": 8, "num_steps": 20, "seed": 0, "progress_bar": False} | options
    ais = AnnealedImportance(entry.model, guide, **settings)
    run = ais.run(*entry.args, **entry.kwargs)
    total = float(run.lower.double().sum())
    error = float(run.std_error.double().square().sum().sqrt())
    names = [finding.name for finding in run.diagnostics]
    return {
        "outcome": "number",
        "value": total,
        "std_error": error,
        "diagnostics": names,
        "warned": any(finding.severity == "warning" for finding in run.diagnostics),
        "notes": [note[:160] for note in run.notes],
    }


def _prepare(entry):
    """Runs guide and model once, so that parameters they draw are the same whatever runs first."""
    pyro.set_rng_seed(7)
    for function in (entry.guide, entry.model):
        with contextlib.suppress(Exception):
            poutine.trace(function).get_trace(*entry.args, **entry.kwargs)


def _loss(entry, make):
    guide = entry.guide
    if guide is None:
        return {"outcome": "none", "says": "the example has no guide"}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        value = make().loss_and_grads(entry.model, guide, *entry.args, **entry.kwargs)
    found = {"outcome": "number", "value": float(value)}
    if math.isnan(value):  # which Pyro's losses warn of, too
        found["diagnostics"] = ["warned"] if any("NaN" in str(w.message) for w in said) else []
    return found


def one(folder: Path, name: str, only: list[str] | None = None) -> None:
    """Runs one entry in every way, and prints each outcome as soon as it is there."""
    logging_off = mock.patch("logging.basicConfig")
    torch.set_num_threads(1)
    sys.meta_path.append(_Missing())
    pyro.set_rng_seed(0)
    out = sys.stdout
    with logging_off, contextlib.redirect_stdout(sys.stderr):
        entry = ENTRIES[name](Sources(folder))
        _prepare(entry)
        ways = {}
        for guide in entry.guides:
            label = "own guide" if callable(guide) else (guide or "prior")
            ways[f"run, {label}"] = functools.partial(_run, entry, guide)
        if entry.remedy:
            told = functools.partial(_run, entry, entry.starts[0], **entry.remedy)
            ways["run, as told"] = told
        ways["truth"] = functools.partial(truth, entry, name)
        for label, make in WAYS.items():
            ways[label] = functools.partial(_loss, entry, make)
        ways = {label: way for label, way in ways.items() if not only or label in only}
        print(json.dumps({"source": entry.source, "ways": list(ways)}), file=out, flush=True)
        for label, way in ways.items():
            random.seed(0)
            print(json.dumps({label: _outcome(way)}), file=out, flush=True)


def page(results: dict) -> str:
    """Writes the tables of outcomes."""
    entries = results["entries"]
    counts = collections.Counter()
    rows, losses, refusals, checks = [], [], [], []
    for name, entry in entries.items():
        ways = dict(entry["ways"])
        known = ways.pop("truth", {"outcome": "none"})
        runs = {k: v for k, v in ways.items() if k.startswith("run") or k == "all"}
        for way, outcome in runs.items():
            verdict = _verdict(outcome, known)
            checks.append((name, way, verdict))
            rows.append(f"| {name} | {way.removeprefix('run, ')} | {_cell(outcome)} | {verdict} |")
            rows[-1] += f" {_cell(known)} | {known.get('how', '')} |"
        given = [ways.get(way, {"outcome": "none"}) for way in WAYS]
        if any(one["outcome"] != "none" for one in given):
            losses.append(f"| {name} | " + " | ".join(map(_cell, given)) + " |")
        for way, outcome in ways.items():
            counts[outcome["outcome"]] += 1
            if outcome["outcome"] in ("refused", "crash", "timeout"):
                says = outcome.get("says", "").partition(" Trace Shapes:")[0].replace("|", "\\|")
                refusals.append((f"{outcome['outcome']}: {says}", name, way))
    return "\n".join(
        [
            *_introduction(results, counts, checks),
            "| model | start | log evidence, nats | verdict | truth | by |",
            "|" + "---|" * 6,
            *rows,
            "",
            "## Every loss",
            "",
            "One step, minus the bound in nats (`EUBO` and `TVO upper`: plus). Without a guide of the",
            "example there is no row.",
            "",
            "| model | " + " | ".join(WAYS) + " |",
            "|" + "---|" * (1 + len(WAYS)),
            *losses,
            "",
            "## What was refused or wrong once",
            "",
            "Right today, with the tests under `tests/` that say so. A model whose sites depend on its",
            "latents is still refused, by the names of the sites.",
            "",
            "| | tests |",
            "|---|---|",
            *(f"| {what} | {tests} |" for what, tests in _ONCE_REFUSED.items()),
            "",
            "## What is refused, and the words",
            "",
            "| models and ways | says |",
            "|---|---|",
            *_grouped(refusals),
            "",
        ]
    )


# What Pyro's models do that was refused once, and the tests that it is right today.
_ONCE_REFUSED = {
    "axes that no plate declares (eight_schools/mcmc, lkj)": (
        "models/test_reading.py, losses/test_guide_forms.py: test_axes_that_no_plate_declares_are_summed"
    ),
    'pyro.param("x", torch.randn(...)) (autoname/scoping_mixture)': (
        "graphs/test_hostile_models.py: test_losses_take_parameters_initialized_at_random"
    ),
    "draws that never reach the density": (
        "graphs/test_hostile_models.py: test_draws_that_reach_no_density_do_no_harm"
    ),
    "guides of an auxiliary site and a Delta (gp/sparse, tutorial/easyguide)": (
        "problems/test_transport.py: test_an_auxiliary_site_and_a_delta_with_its_jacobian"
    ),
    "AutoGaussian, AutoStructured": (
        "problems/test_transport.py: test_guides_of_a_hierarchy, test_losses_take_these_guides"
    ),
    "guides that enumerate, in losses (ss_vae_M2/unsupervised)": (
        "losses/test_guide_forms.py: test_several_particles_sample_the_sites_that_a_guide_enumerates"
    ),
    "plates without a size (autoname/scoping_mixture, cvae)": (
        "models/test_reading.py: test_plates_without_a_size; losses/test_guide_forms.py"
    ),
    "models without latents, or with enumerated ones alone (hmm/model_6)": (
        "models/test_reading.py: test_a_model_without_latents_has_its_log_density_as_evidence, "
        "test_a_model_of_enumerated_latents_alone_is_summed"
    ),
    "enumerated sites under a mask False (sir_hmc/reparameterized_discrete_model)": (
        "models/test_supports.py: "
        "test_an_enumerated_site_with_a_flat_prior_is_summed_with_weight_one"
    ),
    "gradients that a model makes itself, in DifferentiableAIS (mue/ProfileHMM)": (
        "losses/test_differentiable_ais.py: test_gradients_that_a_model_makes_itself_are_kept"
    ),
}


def _introduction(results, counts, checks):
    entries = results["entries"]
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    states = collections.Counter(entry.get("state", "?") for entry in entries.values())
    states = ", ".join(f"{state}: {count}" for state, count in states.items())
    verdicts = collections.Counter(verdict for _, _, verdict in checks)
    known = [name for name, entry in entries.items() if _truth(entry)["outcome"] == "number"]
    accepted = [name for name in entries if _is_accepted(name, entries[name], checks)]
    share = 100.0 * len(accepted) / max(len(entries), 1)
    bad = [f"{name} ({way})" for name, way, verdict in checks if verdict == "silent"]
    kinds = ("number", "refused", "crash", "timeout")
    missing = [name for name in ENTRIES if name not in entries]
    return [
        "# Pyro's own gallery",
        "",
        "The models of Pyro's `examples/` and tutorials, unmodified and at reduced size, through",
        "`run` (8 chains, 20 steps: a smoke test, not a tight bound) and one step of every loss",
        "with the guide of the example. `python benchmarks/gallery.py FOLDER` makes this page from",
        f"a checkout of Pyro; this one: {versions}.",
        "",
        f"The record holds {len(entries)} of the {len(ENTRIES)} entries of the script (entries by",
        f"commit of this package: {states}). Of their",
        f"{sum(counts[kind] for kind in kinds)} outcomes, "
        + ", ".join(f"{kind}: {counts[kind]}" for kind in kinds)
        + ".",
        *([f"Not in the record: {', '.join(missing)}."] if missing else []),
        "",
        f"**{len(accepted)} of {len(entries)} models ({share:.0f} %)** end in every way without a crash,",
        "a timeout, a NaN, or a number that is wrong without a warning: in numbers or refusals. A",
        "verdict is *right* within 4 standard errors or 0.1 nat of the truth",
        f"({verdicts['right']} runs), *flagged* where a warning stands beside a number that is off",
        f"({verdicts['flagged']}), *silent* where none does ({verdicts['silent']}"
        + (f": {', '.join(bad)}" if bad else "")
        + "), and *no truth*",
        f"where nothing checks the number ({verdicts['no truth']} runs).",
        f"Truths are known for {len(known)} models. They share no code with this package",
        "(`benchmarks/gallery_exact.py` and `gallery_truths.py`): closed forms, sums over states and",
        "quadrature; else importance sampling with draws of a Student-t mixture, on the potential",
        "energy of Pyro's HMC, or of the prior or the guide, where at least 200 draws count.",
        "",
        "Examples import packages of plots and data sets; the script puts empty stand-ins in the",
        "place of those that are not installed. SciPy is needed: Pyro's `Stable` uses it.",
        "",
    ]


def _truth(entry):
    return entry["ways"].get("truth", {"outcome": "none"})


def _is_accepted(name, entry, checks):
    """Tells whether no way crashed, timed out, or was wrong without a word."""
    if any(way["outcome"] in ("crash", "timeout") for way in entry["ways"].values()):
        return False
    values = [w for k, w in entry["ways"].items() if k != "truth" and w["outcome"] == "number"]
    if any(math.isnan(way["value"]) for way in values):
        return False
    return all(verdict != "silent" for one, _, verdict in checks if one == name)


def _grouped(refusals):
    """Puts refusals in the same words into one row."""
    groups: dict[str, dict[str, list[str]]] = {}
    for says, name, way in refusals:
        groups.setdefault(says, {}).setdefault(name, []).append(way)
    for says, names in groups.items():
        who = "; ".join(f"{name}: {', '.join(ways)}" for name, ways in names.items())
        yield f"| {who} | {says} |"


def _verdict(run, known):
    """Compares a run with the truth."""
    if run["outcome"] != "number":
        return run["outcome"]
    if known["outcome"] != "number":
        return "no truth"
    error = (run["std_error"] ** 2 + known["std_error"] ** 2) ** 0.5
    if abs(run["value"] - known["value"]) <= max(4.0 * error, 0.1):
        return "right"
    said = run["warned"] and set(run["diagnostics"]) - {"unread"}  # which is of the model alone
    return "flagged" if said else "silent"


def _cell(outcome):
    if outcome["outcome"] == "number":
        text = f"{outcome['value']:.4g}"
        if outcome.get("std_error"):  # none of what is exact
            text += f" ± {outcome['std_error']:.2g}"
        flagged = [d for d in outcome.get("diagnostics", []) if d]
        return text + (f" ({', '.join(flagged)})" if flagged else "")
    return {"none": "–"}.get(outcome["outcome"], outcome["outcome"])


def main() -> None:
    """Runs all entries, or those named, and writes results and page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a checkout of Pyro's repository")
    parser.add_argument("--only", nargs="*", default=None, help="names of entries")
    parser.add_argument("--one", default=None, help="run this entry here, and print its outcome")
    parser.add_argument("--timeout", type=int, default=120, help="CPU seconds per entry")
    parser.add_argument("--ways", nargs="*", default=None, help="run these again, keep the others")
    parser.add_argument("--page", action="store_true", help="write the page from the record alone")
    parser.add_argument("--shard", type=int, default=0, help="which part of the entries to run")
    parser.add_argument("--shards", type=int, default=1, help="of how many parts")
    parser.add_argument("--resume", action="store_true", help="skip what this commit has run")
    options = parser.parse_args()
    if options.one is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (options.timeout, options.timeout))
        one(options.folder.resolve(), options.one, options.ways)
        return
    if options.page:
        _write({})
        return
    names = options.only or list(ENTRIES)[options.shard :: options.shards]
    for name in names:
        kept = _recorded().get(name)
        if options.resume and kept is not None and kept.get("state") == _state():
            continue
        began = time.perf_counter()
        command = [sys.executable, __file__, str(options.folder), "--one", name]
        command += ["--timeout", str(options.timeout)]
        command += ["--ways", *options.ways] if options.ways else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = _read(done, options.timeout) | {"state": _state()}
        if options.ways and kept is not None and "all" not in found["ways"]:
            found = kept | {"ways": kept["ways"] | found["ways"]}
        outcomes = collections.Counter(
            way["outcome"] for key, way in found["ways"].items() if key != "truth"
        )
        print(f"{name}: {dict(outcomes)} ({time.perf_counter() - began:.0f} s)", flush=True)
        _write({name: found})


def _state() -> str:
    """Names the last commit that changed the package."""
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%h", "--abbrev=7", "--"]
    command += ["pyro_anneal"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _read(done, timeout: int) -> dict:
    """Reads what a process of an entry printed: the ways it did not reach share its end."""
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    says, kind = f"not ended after {timeout} s of CPU time", "timeout"
    if done.returncode > 0:
        kind = "crash"
        says = next((t for t in reversed(done.stderr.splitlines()) if "Error" in t), "")[:300]
    if not lines:
        return {"ways": {"all": {"outcome": kind, "says": says}}}
    ways = {label: found for line in lines[1:] for label, found in line.items()}
    for label in lines[0]["ways"]:
        ways.setdefault(label, {"outcome": kind, "says": says})
    return {"source": lines[0]["source"], "ways": ways}


def _recorded() -> dict:
    return json.loads(RESULTS.read_text())["entries"] if RESULTS.exists() else {}


def _write(found: dict) -> None:
    """Puts outcomes into the record, which other processes write too, and makes the page anew."""
    versions = {
        "pyro_anneal": pyro_anneal.__version__,
        "pyro": pyro.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    with RESULTS.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        entries = _recorded() | found
        ordered = {name: entries[name] for name in ENTRIES if name in entries}
        results = {"versions": versions, "entries": ordered}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
