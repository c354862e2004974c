"""Several processes share a run: the same numbers whatever their number, and clear failures."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from ranks import run_ranks
from resumable import (
    CALLS,
    DATA,
    annealed,
    assert_same,
    fork,
    numbers,
    quietly,
    shorten,
    uninterrupted,
)

import pyro_anneal
import pyro_anneal.chains.loop
from pyro_anneal.chains.blockwise import Blockwise
from pyro_anneal.chains.path import StepStatistics
from pyro_anneal.persistence import files as checkpoint
from pyro_anneal.persistence.journal import Journal
from pyro_anneal.runs import blocks

pytestmark = [
    pytest.mark.filterwarnings("ignore::pyro_anneal.diagnostics.AnnealingWarning"),
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="torch was built without gloo",
    ),
]


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    shorten(monkeypatch)


def call(rank, name, path=None, **options):
    return CALLS[name](path, **options)


# --- blocks -----------------------------------------------------------------------------------


def test_blocks_cover_all_chains_once():
    for count in (1, 7, 8, 9):
        for size in (1, 4, 8, None):
            parts = blocks.split(count, size)
            assert [k for part in parts for k in part] == list(range(count))
            assert max(map(len, parts)) <= (size or count)


def test_a_single_block_has_the_numbers_of_chains_without_blocks():
    whole = annealed(chain_batch_size=None).run(DATA)
    for size in (6, 4096):
        assert_same(annealed(chain_batch_size=size).run(DATA), whole)


def test_blocks_are_independent_and_the_first_does_not_depend_on_others():
    few = annealed(chain_batch_size=2, num_chains=4, pilot=pyro_anneal.Pilot(num_chains=16))
    many = annealed(chain_batch_size=2, num_chains=8, pilot=pyro_anneal.Pilot(num_chains=16))
    few, many = few.run(DATA), many.run(DATA)
    assert torch.equal(few.log_weights, many.log_weights[:4])
    pairs = many.log_weights.reshape(4, 2, 3)
    for i in range(4):
        for j in range(i):
            assert not torch.isclose(pairs[i], pairs[j]).any()


def test_statistics_of_blocks_are_those_of_all_chains():
    # ratios of 6 chains on a batch of 2, in blocks of 4 and 2
    ratio = torch.tensor([[0.0, 1.0], [1.0, 5.0], [2.0, 3.0], [5.0, 3.0], [4.0, -1.0], [6.0, 1.0]])
    parts = [ratio[:4], ratio[4:]]

    def describe(part, accept, diverging):
        return StepStatistics(
            part.mean().reshape(1),
            part.var(0, correction=0).mean().reshape(1),
            torch.tensor([accept]),
            torch.tensor([diverging]),
        )

    described = [describe(parts[0], 0.5, 1.0), describe(parts[1], 0.8, 2.0)]
    merged = blocks.merge_statistics(described, [4, 2])
    assert merged.mean_log_ratio.item() == pytest.approx(ratio.mean().item(), rel=1e-14)
    assert merged.accept_prob.item() == pytest.approx((4 * 0.5 + 2 * 0.8) / 6, rel=1e-14)
    assert merged.num_diverging.item() == 3.0
    # sums of squares within blocks: 14 + 8 and 2 + 2, of 6 - 2 degrees of freedom per element
    assert merged.var_log_ratio.item() == pytest.approx(0.5 * (16 + 10) / 4 * 5 / 6, rel=1e-14)
    single = blocks.merge_statistics(described * 1, [1, 1])
    assert single.var_log_ratio.isnan().all()


def test_a_density_in_pieces_is_the_density():
    seen = []

    def density(position):
        seen.append(len(position))
        value = position.sum(-1)
        return pyro_anneal.kernels.State(position, value, 2 * value, position, 3 * position)

    position = torch.arange(14.0).reshape(7, 2)
    whole = density(position)
    pieces = Blockwise(density, 3)(position)
    assert all(torch.equal(a, b) for a, b in zip(pieces, whole, strict=True))
    assert seen == [7, 3, 3, 3]


# --- ranks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("run", 2),
        pytest.param("populations", 2, marks=pytest.mark.slow),
        pytest.param("run_batches", 3, marks=pytest.mark.slow),  # as when a rank died, below
        pytest.param("sandwich", 3, marks=pytest.mark.slow),
        pytest.param("mutual_information", 2, marks=pytest.mark.slow),
        pytest.param("run_batches", 2, marks=pytest.mark.slow),
    ],
)
def test_results_do_not_depend_on_the_number_of_ranks(tmp_path, name, size):
    alone = uninterrupted(name)
    results, errors = run_ranks(call, size, tmp_path / "ranks", name, None)
    assert not errors
    for rank in range(size):  # every rank has all
        assert_same(results[rank], alone)


def test_the_environment_of_torchrun_starts_it(tmp_path, monkeypatch):
    """What torchrun tells its processes, told to forked ones: they need not import torch anew."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    processes = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        command = ("run_reverse", str(tmp_path / "x.ckpt"), str(tmp_path / "out"))
        processes.append(fork(ranks.main, *command))
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    for rank in range(2):
        ours = torch.load(tmp_path / f"out{rank}", weights_only=False)
        assert_same(ours, uninterrupted("run_reverse"))


@pytest.mark.slow
def test_torchrun_starts_it(tmp_path, monkeypatch):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = Path(__file__).parents[1] / "helpers" / "ranks.py"
    root = Path(pyro_anneal.__file__).parents[1]
    done = subprocess.run(
        [*command, str(script), "run_reverse", str(tmp_path / "x.ckpt"), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.undo()  # the new processes know nothing of it
    alone = quietly(CALLS["run_reverse"], None)
    for rank in range(2):
        assert_same(torch.load(tmp_path / f"out{rank}", weights_only=False), alone)


def die_at(rank, name, path, victim, event):
    """Runs a call whose rank ``victim`` is killed at a chunk of its chains."""
    record, count = Journal.record, 0

    def deadly(self, *args, **kwargs):
        nonlocal count
        count += 1
        if rank == victim and count == event:
            os.kill(os.getpid(), signal.SIGKILL)
        return record(self, *args, **kwargs)

    Journal.record = deadly
    return CALLS[name](path)


@pytest.mark.parametrize(
    ("name", "victim", "event", "then"),
    [
        ("run", 1, 3, 1),
        ("run_batches", 0, 8, 3),
        pytest.param("sandwich", 1, 11, 2, marks=pytest.mark.slow),
        pytest.param("run", 0, 8, 2, marks=pytest.mark.slow),
    ],
)
def test_a_dead_rank_fails_the_run_and_its_checkpoint_stays_good(
    tmp_path, name, victim, event, then
):
    path = tmp_path / "x.ckpt"
    results, errors = run_ranks(die_at, 2, tmp_path / "first", name, path, victim, event)
    assert not results
    survivor = 1 - victim
    message = errors.pop(survivor)
    assert not errors
    assert message.startswith(f"RuntimeError: rank {survivor} of 2 could not share")
    assert "another process of this run died" in message
    assert "start the same command again" in message
    for file in tmp_path.glob("x.ckpt*"):
        checkpoint.load(file)
    alone = uninterrupted(name)
    if then == 1:
        assert_same(quietly(CALLS[name], path), alone)
    else:
        results, errors = run_ranks(call, then, tmp_path / "second", name, path)
        assert not errors
        for rank in range(then):
            assert_same(results[rank], alone)
    assert [p.name for p in tmp_path.glob("x.ckpt*")] == ["x.ckpt"]


def call_with_other_data(rank, shift):
    return annealed().run(DATA + shift * rank)


def call_with_shards(rank):
    return annealed().run_batches([DATA + rank, DATA])


def call_without_start(rank):
    return annealed().run(torch.full((3,), 1e200))  # a square beyond the largest float


@pytest.mark.parametrize(
    ("function", "args", "message"),
    [
        (call_with_other_data, (1.0,), "ranks 1 and 0 do not see the same call: argument args"),
        (call_with_shards, (), "ranks 1 and 0 see different batches: .*no DistributedSampler"),
    ],
)
def test_ranks_must_agree(tmp_path, function, args, message):
    results, errors = run_ranks(function, 2, tmp_path / "ranks", *args)
    assert not results
    with pytest.raises(ValueError, match=message):
        raise ValueError(errors[0])


def test_an_error_of_the_pilot_reaches_every_rank(tmp_path):
    _, errors = run_ranks(call_without_start, 2, tmp_path / "ranks")
    assert "check the data for NaN" in errors[0]
    assert errors[1] == f"{errors[0]} (found by rank 0)"


def test_a_warning_says_that_ranks_have_nothing_to_do(tmp_path):
    results, errors = run_ranks(idle, 2, tmp_path / "ranks")
    assert not errors
    assert results[0] == ["6 chains are 1 block("]
    assert results[1] == []


def idle(rank):
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        annealed(chain_batch_size=None).run(DATA)
    found = [str(w.message) for w in caught if "nothing to do" in str(w.message)]
    return [message[:21] for message in found]


def test_ranks_write_only_while_a_call_lasts(tmp_path):
    path = tmp_path / "x.ckpt"
    results, errors = run_ranks(call, 2, tmp_path / "ranks", "run_reverse", path)
    assert not errors
    assert [p.name for p in tmp_path.glob("x.ckpt*")] == ["x.ckpt"]
    assert numbers(quietly(CALLS["run_reverse"], path)).keys() == numbers(results[0]).keys()
