"""A pytest plugin that runs Pyro's own tests with a loss of this package in place of Pyro's.

It puts a class of ours where the tests import ``Trace_ELBO`` (or ``RenyiELBO``) and keeps the tests
that use it. Beside a checkout of pyro-ppl/pyro at the version that is installed:

    PYTHONPATH=<this directory> python -m pytest -p loss_plugin --pyro-loss TVO tests/infer/...

With ``--pyro-loss Trace_ELBO`` nothing is replaced, which gives the count to compare with;
``--pyro-record FILE`` adds the counts and every test that did not pass, with its message, to a JSON file. Those
of the first three lines are in ``benchmarks/results/losses_pyro_suite.json``.

Passed of those run, with Pyro's tests of October 2024 and Pyro 1.9.2 (skipped and expected
failures left out):

| tests/infer/ | Trace_ELBO | IWAE | TVO | TVO covariance | EUBO |
|---|---|---|---|---|---|
| test_valid_models.py | 122/122 | 120 | 120 | 120 | 120 |
| test_gradient.py | 28/28 | 6 (earlier) | 23 | 22 | - |
| test_autoguide.py | 153/163 | 150 | 153 | 126 | 115 |
| test_inference.py (earlier) | 15/15 | 15 | 14 | - | - |
| test_multi_sample_elbos.py (earlier; for RenyiELBO) | 2/2 | 2 | 2 | - | - |

What remains, and why:

* test_valid_models, all: the two cases of one test, which expects a warning where a guide marks a site
  for enumeration, since ``Trace_ELBO`` misuses it. Ours have nothing to warn of: ``IWAE`` takes the
  expectation over the site, as ``TraceEnum_ELBO`` does, and TVO and EUBO draw it, as they say.
* test_gradient, IWAE: 22 tests compare gradients at 10 to 200,000 particles with those of the ELBO,
  which is another objective there. TVO (one left partition: the ELBO) is the one to compare.
* test_gradient, TVO: four tests compute what one particle must give, and TVO has at least two. One
  (two for the covariance gradient) has 200,000 replicates in a plate under global latents:
  ``Trace_ELBO`` uses a learning signal per plate, a bound of the whole model has one signal.
* test_autoguide, all: ten need funsor. IWAE: three tests expect 100 steps of 100 particles to
  bring the ELBO's optimum. Covariance, EUBO: point-mass guides have no score, and messenger guides
  sample inside the model; both are errors that name the site or the guide. EUBO besides: tests of
  the sign and the value of the ELBO.
* test_inference, TVO: a distribution made for tests scores only the very tensor that it drew last
  (Pyro excuses ReweightedWakeSleep from the same test).
"""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path

import pyro.infer
import pytest
import torch

import pyro_anneal
from pyro_anneal.losses import EUBO, IWAE, TVO


class IWAEForTrace(IWAE):
    """IWAE with Pyro's default of one particle, where it is the ELBO."""

    def __init__(self, num_particles=1, max_plate_nesting=math.inf, *args, **kwargs):
        kwargs = _named(args, kwargs)
        super().__init__(num_particles, max_plate_nesting=max_plate_nesting, **kwargs)


class TVOForTrace(TVO):
    """TVO of one left partition, whose expectation is the ELBO, with at least two particles."""

    schedule_of_test = torch.tensor([0.0, 1.0])

    def __init__(self, num_particles=1, max_plate_nesting=math.inf, *args, **kwargs):
        kwargs = _named(args, kwargs)
        super().__init__(
            max(num_particles, 2),
            self.schedule_of_test,
            gradient="auto",
            max_plate_nesting=max_plate_nesting,
            **kwargs,
        )


class TVOTwoForTrace(TVOForTrace):
    """TVO with two partitions."""

    schedule_of_test = torch.tensor([0.0, 0.025, 1.0])


class CovarianceForTrace(TVOForTrace):
    """TVO of one left partition with the covariance gradient."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gradient = "covariance"


class EUBOForTrace(EUBO):
    """EUBO by importance weights, at least two particles."""

    def __init__(self, num_particles=1, max_plate_nesting=math.inf, *args, **kwargs):
        kwargs = _named(args, kwargs)
        super().__init__(max(num_particles, 2), max_plate_nesting=max_plate_nesting, **kwargs)


def _named(args, kwargs):
    names = ("max_iarange_nesting", "vectorize_particles", "strict_enumeration_warning")
    kwargs = {**kwargs, **dict(zip(names, args, strict=False))}
    kwargs.pop("max_iarange_nesting", None)
    return kwargs


LOSSES = {
    "Trace_ELBO": pyro.infer.Trace_ELBO,
    "IWAE": IWAEForTrace,
    "TVO": TVOForTrace,
    "TVO2": TVOTwoForTrace,
    "TVOcov": CovarianceForTrace,
    "EUBO": EUBOForTrace,
}
CHOSEN = []


def pytest_addoption(parser):
    parser.addoption("--pyro-loss", choices=list(LOSSES), default="Trace_ELBO")
    parser.addoption("--pyro-target", choices=["Trace_ELBO", "RenyiELBO"], default="Trace_ELBO")
    parser.addoption("--pyro-record", type=Path, help="JSON file to which the counts are added")


def pytest_configure(config):
    # Pyro's tests make warnings errors; this one is meant for most of their subsampled models.
    config.addinivalue_line("filterwarnings", r"ignore:plate\(s\):UserWarning")
    target = config.getoption("--pyro-target")
    name = config.getoption("--pyro-loss")
    loss = getattr(pyro.infer, target) if name == "Trace_ELBO" else LOSSES[name]
    setattr(pyro.infer, target, loss)
    CHOSEN[:] = [loss, target]


def _uses(item):
    loss, target = CHOSEN
    spec = getattr(item, "callspec", None)
    values = list(spec.params.values()) if spec else []
    others = [v for v in values if "ELBO" in getattr(v, "__name__", "") or v is loss]
    if others:
        return any(v is loss for v in others)
    if any("DiffTrace" in getattr(v, "__name__", "") for v in values):
        return True
    try:
        return target + "(" in inspect.getsource(item.function).replace("Jit" + target, "")
    except (OSError, AttributeError, TypeError):
        return False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    keep = [item for item in items if _uses(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in keep])
    items[:] = keep


def pytest_terminal_summary(terminalreporter, config):
    """Adds counts, and every test that did not pass, to the record."""
    path = config.getoption("--pyro-record")
    if path is None:
        return
    stats = terminalreporter.stats
    ids = {
        outcome: sorted({r.nodeid for r in stats.get(outcome, []) if hasattr(r, "nodeid")})
        for outcome in ("passed", "failed", "error", "xpassed", "xfailed", "skipped")
    }
    reasons = {
        r.nodeid: r.longrepr.reprcrash.message.splitlines()[0][:200]
        for r in stats.get("failed", [])
        if hasattr(r.longrepr, "reprcrash")
    }
    record = json.loads(path.read_text()) if path.exists() else {}
    record["versions"] = {
        "pyro": pyro.__version__,
        "torch": torch.__version__,
        "pyro_anneal": pyro_anneal.__version__,
    }
    for file in sorted({i.split("::")[0] for values in ids.values() for i in values}):
        mine = {k: [i.split("::")[1] for i in v if i.startswith(file)] for k, v in ids.items()}
        row = {outcome: len(names) for outcome, names in mine.items() if names}
        row["run"] = sum(row.get(o, 0) for o in ("passed", "failed", "error", "xpassed"))
        row["not passed"] = {
            n: reasons.get(f"{file}::{n}", o) for o in ("failed", "error") for n in mine[o]
        }
        loss = config.getoption("--pyro-loss")
        name = f"{loss} for {config.getoption('--pyro-target')}"
        record.setdefault("files", {}).setdefault(file, {})[name] = row
    path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
