"""Runs that are killed at any moment continue, to bitwise the same numbers."""

import math
import os
import random
import re
import signal
import time

import pyro
import pyro.distributions as dist
import pytest
import torch
from resumable import (
    CALLS,
    DATA,
    annealed,
    assert_same,
    call_run,
    fork,
    model,
    quietly,
    run_until_event,
    shorten,
    uninterrupted,
)

import pyro_anneal.chains.loop
from pyro_anneal import HMC, AnnealedImportance, Linear, Pilot
from pyro_anneal.persistence import files as checkpoint
from pyro_anneal.persistence import journal
from pyro_anneal.persistence.journal import Journal

pytestmark = pytest.mark.filterwarnings("ignore::pyro_anneal.diagnostics.AnnealingWarning")


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    shorten(monkeypatch)


# --- the file ---------------------------------------------------------------------------------

CONTENT = {"a": torch.arange(5.0)[1:3], "b": [1, (2.5, None)], "c": {3: "three"}}


def test_a_file_gives_back_what_it_was_given(tmp_path):
    path = tmp_path / "x.ckpt"
    checkpoint.save(path, CONTENT)
    content = checkpoint.load(path)
    assert torch.equal(content["a"], torch.tensor([1.0, 2.0]))
    assert content["a"].untyped_storage().nbytes() == 2 * 4  # not what it is a view of
    assert content["b"] == [1, (2.5, None)]
    assert content["c"] == {3: "three"}
    assert [p.name for p in tmp_path.iterdir()] == ["x.ckpt"]


@pytest.mark.parametrize("share", [0.0, 0.03, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path, share):
    path = tmp_path / "x.ckpt"
    checkpoint.save(path, CONTENT)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(ValueError, match=r"x\.ckpt.*(truncated or corrupted|no checkpoint)"):
        checkpoint.load(path)


def test_every_corrupted_byte_is_found(tmp_path):
    path = tmp_path / "x.ckpt"
    checkpoint.save(path, CONTENT)
    raw = path.read_bytes()
    for at in range(0, len(raw), 97):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            checkpoint.load(path)


def test_other_files_and_formats_are_refused(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save(CONTENT, path)
    with pytest.raises(ValueError, match="no checkpoint of pyro_anneal"):
        annealed(path).run(DATA)
    path.write_bytes(b"pyro_anneal checkpoint 99\n" + bytes(100))
    with pytest.raises(ValueError, match="of another format"):
        annealed(path).run(DATA)


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    path = tmp_path / "x.ckpt"
    monkeypatch.setattr(checkpoint, "to_host", lambda content: content)
    checkpoint.save(path, {"tasks": Harmful()})  # a valid digest
    with pytest.raises(ValueError, match="more than tensors and plain values"):
        checkpoint.load(path)
    assert not (tmp_path / "harm").exists()


# --- killed at any moment ---------------------------------------------------------------------


def kill_at(name, path, event):
    process = fork(run_until_event, CALLS[name], path, event)
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


@pytest.mark.parametrize(
    ("name", "events"),
    [
        ("run", (4, 27)),
        ("run_reverse", (1, 14)),
        ("sandwich", (11, 41)),
        ("populations", (25, 60)),
        pytest.param("mutual_information", (3, 45), marks=pytest.mark.slow),  # also pairs
        pytest.param("run_batches", (22, 33), marks=pytest.mark.slow),  # also with ranks
    ],
)
def test_a_killed_call_ends_with_the_numbers_of_an_uninterrupted_one(tmp_path, name, events):
    path = tmp_path / "x.ckpt"
    for event in events:
        assert not kill_at(name, path, event)
    assert_same(CALLS[name](path), uninterrupted(name))
    assert [p.name for p in tmp_path.iterdir()] == ["x.ckpt"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CALLS)
def test_a_call_killed_at_any_event_of_a_run_continues(tmp_path, name):
    for event in range(1, 1000, 6):
        path = tmp_path / f"{event}.ckpt"
        finished = kill_at(name, path, event)
        assert_same(CALLS[name](path), uninterrupted(name))
        if finished:
            break
    assert 30 < event < 999


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CALLS)
def test_a_call_killed_many_times_at_random_moments_continues(tmp_path, name):
    choose = random.Random(7)
    began = time.monotonic()
    quietly(CALLS[name], tmp_path / "timed.ckpt")
    duration = time.monotonic() - began
    for attempt in range(2):
        path, kills = tmp_path / f"{attempt}.ckpt", 0
        while kills < 12:
            process = fork(CALLS[name], path)
            process.join(choose.uniform(0.0, 1.2) * duration)
            if process.exitcode is not None:
                break
            os.kill(process.pid, signal.SIGKILL)
            process.join(60)
            kills += 1
        assert_same(CALLS[name](path), uninterrupted(name))


# --- what is kept ------------------------------------------------------------------------------


def steps_of(path, name, monkeypatch):
    """Counts the steps of chains, and the pilots and fits, that a call computes."""
    steps, stages = [], []
    record, once = Journal.record, Journal.once

    def counting_record(self, name, block, state, *, steps: int, kept=steps):
        kept.append(steps)
        return record(self, name, block, state, steps=steps)

    def counting_once(self, name, compute):
        return once(self, name, lambda: (stages.append(name), compute())[1])

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "record", counting_record)
        patch.setattr(Journal, "once", counting_once)
        result = CALLS[name](path)
    return sum(steps), stages, result


def test_a_finished_call_returns_its_numbers_without_any_step(tmp_path, monkeypatch):
    path = tmp_path / "x.ckpt"
    steps, stages, first = steps_of(path, "run", monkeypatch)
    assert steps == 2 * 3 * 50  # from guide and prior, in three blocks
    assert stages == ["fit", "pilot", "scout", "from the prior/pilot"]
    steps, stages, second = steps_of(path, "run", monkeypatch)
    assert (steps, stages) == (0, [])
    assert_same(first, second)
    assert second.seconds == first.seconds


def test_an_interrupt_loses_one_chunk_at_most(tmp_path, monkeypatch):
    path, original, calls = tmp_path / "x.ckpt", pyro_anneal.chains.loop._run_chunk, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pyro_anneal.chains.loop, "_run_chunk", interrupted)
        with pytest.raises(KeyboardInterrupt):
            call_run(path, checkpoint_every=10_000)  # never due
    slot = checkpoint.load(path)["tasks"]["run"]
    assert slot["blocks"]["forward"][0]["num_chunks"] == 2
    steps, stages, result = steps_of(path, "run", monkeypatch)
    assert steps == 2 * 3 * 50 - 40
    assert stages == ["scout", "from the prior/pilot"]  # fit and pilot were in the file
    assert_same(result, uninterrupted("run"))


@pytest.mark.parametrize("every", [1, 45, 10_000, None])
def test_how_often_it_is_written_changes_no_number(tmp_path, monkeypatch, every):
    writes, save = [], checkpoint.save
    # However slow the machine: what writes are due by time does not count here.
    monkeypatch.setattr(journal, "_WORTH_WRITING", math.inf)
    monkeypatch.setattr(journal, "_WRITE_AFTER", math.inf)
    monkeypatch.setattr(checkpoint, "save", lambda *args: (writes.append(1), save(*args)))
    result = CALLS["run_reverse"](tmp_path / "x.ckpt", checkpoint_every=every)
    assert_same(result, uninterrupted("run_reverse"))
    # 3 blocks (5 chains by two) of 3 chunks of 20 steps, the last of 10; and the end of the call
    assert len(writes) == {1: 9 + 1, 45: 3 + 1}.get(every, 1)


def test_methods_share_a_file(tmp_path):
    path = tmp_path / "x.ckpt"
    for name in ("run_reverse", "mutual_information", "run_reverse"):
        assert_same(CALLS[name](path), uninterrupted(name))
    assert set(checkpoint.load(path)["tasks"]) == {"run_reverse", "mutual_information"}


def test_a_drawn_seed_is_kept(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.manual_seed(1)
    first = annealed(path, seed=None).run(DATA)
    after = torch.rand(())
    torch.manual_seed(2)
    second = annealed(path, seed=None).run(DATA)
    assert_same(first, second)
    torch.manual_seed(1)
    fresh = annealed(seed=None).run(DATA)
    assert_same(first, fresh)
    assert torch.rand(()) == after  # one draw, with or without a file


# --- files of other runs -----------------------------------------------------------------------


def shifted(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor(1.0, dtype=x.dtype), 2.5))
        pyro.sample("x", dist.StudentT(3.0, z, 0.3), obs=x)


def scaled(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor(1.0, dtype=x.dtype), 2.0))
        pyro.sample("x", dist.StudentT(3.0, z * 1.5, 0.3), obs=x)


CHANGES = {
    "num_chains (K): 6 there, 7 now": {"num_chains": 7},
    "num_steps (T): 50 there, 40 now": {"num_steps": 40},
    "schedule: adaptive there, ": {"schedule": Linear()},
    "kernel: HMC(num_leapfrog=2, ": {"kernel": HMC(num_leapfrog=3)},
    "guide: None there, 'auto' now": {"guide": "auto"},
    "step_size: None there, 0.5 now": {"step_size": 0.5},
    "pilot: Pilot(": {"pilot": Pilot(num_moves=5)},
    "batch_plates: auto there, [] now": {"batch_plates": []},
    "compile: 'auto' there, False now": {"compile": False},
    "chain_batch_size: 2 there, 3 now": {"chain_batch_size": 3},
    "cross_check: 'auto' there, True now": {"cross_check": True},
    "seed: 3 there, 4 now": {"seed": 4},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "x.ckpt"
    quietly(annealed(path).run, DATA)
    return path


@pytest.mark.parametrize("message", CHANGES)
def test_a_file_of_other_settings_is_refused(finished, message):
    before = finished.read_bytes()
    with pytest.raises(ValueError, match=rf"{finished}.*{re.escape(message)}"):
        annealed(finished, **CHANGES[message]).run(DATA)
    assert finished.read_bytes() == before


def test_a_file_of_other_data_dtype_or_arguments_is_refused(finished):
    with pytest.raises(ValueError, match=r"argument args\[0\]: float64\[3\]"):
        annealed(finished).run(DATA + 1e-15)
    with pytest.raises(ValueError, match=r"there, float32\[3\]"):
        annealed(finished).run(DATA.float())
    with pytest.raises(ValueError, match=r"argument kwargs\['x'\]: absent there"):
        annealed(finished).run(x=DATA)


@pytest.mark.parametrize(
    ("other", "message"),
    [(shifted, "model: model there, shifted now"), (scaled, "model: model there, scaled now")],
)
def test_a_file_of_another_model_is_refused(finished, monkeypatch, other, message):
    def ais():
        return AnnealedImportance(other, **options)

    options = {
        "num_chains": 6,
        "num_steps": 50,
        "pilot": Pilot(num_chains=4, num_moves=2, ess_fraction=0.3),
        "progress_bar": False,
        "seed": 3,
        "chain_batch_size": 2,
        "checkpoint": finished,
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        ais().run(DATA)
    # under the same name the recorded graph, and the tensors it reads, tell
    monkeypatch.setattr(other, "__qualname__", model.__qualname__)
    with pytest.raises(
        ValueError, match=r"operations of the density|tensors that the density reads"
    ):
        ais().run(DATA)


def decoder(scale):
    weight = torch.full((2,), scale)

    def linear(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(weight * z.unsqueeze(-1), 1.0).to_event(1), obs=x)

    return linear


@pytest.mark.parametrize("method", ["run", "mutual_information"])
def test_trained_parameters_are_part_of_a_model(tmp_path, method):
    def call(scale):
        options = {"num_chains": 2, "num_steps": 20, "progress_bar": False, "seed": 0}
        ais = AnnealedImportance(decoder(scale), checkpoint=tmp_path / "x.ckpt", **options)
        return getattr(ais, method)(torch.zeros(3, 2))

    call(1.0)
    call(1.0)
    with pytest.raises(ValueError, match=r"tensors that the density reads|data at site"):
        call(1.0 + 1e-12)


def test_a_file_of_another_version_is_refused(finished, monkeypatch):
    monkeypatch.setattr(pyro_anneal.persistence.fingerprints, "__version__", "0.0.9")
    with pytest.raises(ValueError, match=r"version of pyro_anneal: .* there, 0\.0\.9 now"):
        annealed(finished).run(DATA)


def test_settings_of_a_checkpoint_are_checked(tmp_path):
    with pytest.raises(ValueError, match="checkpoint_every must be at least 1"):
        annealed(tmp_path / "x", checkpoint_every=0)
    with pytest.raises(ValueError, match="needs a file"):
        annealed(checkpoint_every=10)
    with pytest.raises(ValueError, match="chain_batch_size must be at least 1"):
        annealed(chain_batch_size=0)
