"""Processes that share a run: forked ones, and a script for torchrun."""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed
from resumable import CALLS, fork, quietly


def _rank(function, rank, size, folder, *args):
    """Joins a group of processes and saves what a function returns, or the error."""
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    try:
        result = function(rank, *args)
    except (ValueError, RuntimeError) as error:
        (Path(folder) / f"error{rank}").write_text(f"{type(error).__name__}: {error}")
        os._exit(1)  # no orderly end, as when a process dies
    torch.save(result, Path(folder) / f"result{rank}")
    torch.distributed.destroy_process_group()


def run_ranks(function, size, folder, *args, timeout=120):
    """Runs ``function(rank, *args)`` on forked ranks; returns results and errors by rank."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    processes = [fork(_rank, function, rank, size, folder, *args) for rank in range(size)]
    for process in processes:
        process.join(timeout)
    assert all(process.exitcode is not None for process in processes), "a rank hangs"
    results, errors = {}, {}
    for rank in range(size):
        if (folder / f"result{rank}").exists():
            results[rank] = torch.load(folder / f"result{rank}", weights_only=False)
        if (folder / f"error{rank}").exists():
            errors[rank] = (folder / f"error{rank}").read_text()
    return results, errors


def main(name, path, output):
    """Joins the group that torchrun describes, and saves the result of one call."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    result = quietly(CALLS[name], path if path != "-" else None)
    torch.save(result, f"{output}{rank}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
