"""Calls that can be killed and started again, with all numbers that must come out the same."""

import dataclasses
import functools
import multiprocessing
import os
import signal
import threading
import warnings

import pyro
import pyro.distributions as dist
import torch
from tqdm.auto import tqdm

from pyro_anneal import AnnealedImportance, Pilot
from pyro_anneal.chains import loop as chains
from pyro_anneal.persistence import files as checkpoint
from pyro_anneal.persistence import journal
from pyro_anneal.problems import fitted as fitted_start
from pyro_anneal.problems import gaussian as gaussian_fit

DATA = torch.tensor([0.3, -2.0, 5.0], dtype=torch.float64)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor(1.0, dtype=x.dtype), 2.0))
        pyro.sample("x", dist.StudentT(3.0, z, 0.3), obs=x)


def annealed(path=None, **options):
    every = None if path is None else 20
    defaults = {
        "num_chains": 6,
        "num_steps": 50,
        "pilot": Pilot(num_chains=4, num_moves=2, ess_fraction=0.3),
        "progress_bar": False,
        "seed": 3,
        "chain_batch_size": 2,
        "checkpoint": path,
        "checkpoint_every": every,
    }
    return AnnealedImportance(model, **(defaults | options))


def call_run(path, **options):
    return annealed(path, guide="auto", cross_check=True, **options).run(DATA)


def call_run_reverse(path, **options):
    samples = {"z": torch.linspace(-3.0, 3.0, 15, dtype=torch.float64).reshape(5, 3)}
    return annealed(path, **options).run_reverse(samples, DATA, exact=True)


def call_sandwich(path, **options):
    ais = annealed(path, **options)
    return ais.sandwich(DATA, bounds=("CR lower", "CR upper"))


def call_populations(path, **options):
    options = {"resampling": True, "chain_batch_size": 3} | options  # two populations of three
    ais = annealed(path, **options)
    return ais.sandwich(DATA, bounds=("CR lower", "CR upper"))


def call_mutual_information(path, **options):
    return annealed(path, **options).mutual_information(DATA[:2], num_simulations=2)


def call_run_batches(path, **options):
    data = torch.utils.data.TensorDataset(torch.linspace(-2.0, 2.0, 7, dtype=torch.float64))
    loader = torch.utils.data.DataLoader(data, batch_size=3, shuffle=True)
    return annealed(path, **options).run_batches(loader)


CALLS = {
    "run": call_run,
    "run_reverse": call_run_reverse,
    "sandwich": call_sandwich,
    "populations": call_populations,
    "mutual_information": call_mutual_information,
    "run_batches": call_run_batches,
}


def shorten(monkeypatch):
    """Makes chunks of 20 steps, and automatic guides that need few of them."""
    fit = functools.partial(gaussian_fit.fit_gaussian, num_newton=4, num_ascent=6)
    monkeypatch.setattr(fitted_start, "fit_gaussian", fit)
    monkeypatch.setattr(chains, "CHUNK_SIZE", 20)


@functools.cache
def uninterrupted(name):
    """Computes the result of a call once, without a checkpoint; to be shortened."""
    return quietly(CALLS[name], None)


def numbers(result):
    """Collects all numbers of a result but the time it took, and what lasts only as a process does."""
    if dataclasses.is_dataclass(result):
        kept = [f.name for f in dataclasses.fields(result) if f.metadata.get("saved", True)]
        result = {name: getattr(result, name) for name in kept}
    if isinstance(result, dict):
        passing = ("seconds", "continuation", "settings")  # how it was asked for is no number
        parts = {k: numbers(v) for k, v in result.items() if not str(k).endswith(passing)}
        return {f"{k}.{n}": v for k, part in parts.items() for n, v in part.items()}
    return {"": result}


def assert_same(first, second):
    first, second = numbers(first), numbers(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            same = torch.equal(value.nan_to_num(7.5), second[name].nan_to_num(7.5))
        else:
            same = value == second[name]
        assert same, f"{name}: {value} and {second[name]}"


def quietly(call, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


def fork(function, *args):
    """Runs a function in a forked process; returns the process, to be killed or joined."""

    def run():
        # The lock of progress bars is shared with forked processes: killed, one would keep it.
        tqdm.set_lock(threading.RLock())
        quietly(function, *args)

    process = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside threads
        process.start()
    return process


def count_events(on_event):
    """Calls ``on_event`` at each chunk of chains and at several moments of each write."""

    def before(owner, name):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            on_event(name)
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    class System:
        """The functions of os that a write goes through."""

        def __getattr__(self, name):
            return getattr(os, name)

    checkpoint.os = System()
    before(journal.Journal, "record")
    before(checkpoint.os, "fsync")
    before(checkpoint.os, "replace")
    before(checkpoint, "_sync_folder")


def run_until_event(call, path, last):
    """Runs a call in this process, which kills itself at event number ``last``."""
    count = 0

    def on_event(name):
        nonlocal count
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)

    count_events(on_event)
    call(path)
