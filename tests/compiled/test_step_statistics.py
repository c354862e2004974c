"""The table of statistics against numpy, with what must not count beside the chains."""

import math

import numpy as np
import pytest
import torch

from pyro_anneal.compiled.statistics import (
    in_one_pass,
    in_passes,
    last_mean,
    new_table,
    with_column,
)
from pyro_anneal.kernels import State

LANES = (math.nan, math.inf, -math.inf, 7.0)  # after the chains


def numbers(batch, offset):
    rng = np.random.RandomState(0)
    ratio = torch.tensor(offset + rng.exponential(3.0, (*batch, 20)) ** 2)
    return (
        ratio,
        torch.tensor(rng.beta(5, 1, (*batch, 20))),
        torch.tensor(rng.rand(*batch, 20) < 0.2),
    )


def widened(values, others=LANES):
    others = torch.tensor(others).to(values.dtype).expand(*values.shape[:-1], -1)
    return torch.cat([values, others], -1)


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("offset", [0.0, -1e7])
def test_both_ways_give_the_statistics_of_numpy(batch, offset):
    ratio, accepted, diverged = numbers(batch, offset)
    truth = [
        ratio.numpy().mean(),
        ratio.numpy().var(-1).mean(),
        accepted.numpy().mean(),
        diverged.numpy().sum(),
    ]
    chains_first = [x.movedim(-1, 0) for x in (ratio, accepted, diverged)]
    near = torch.tensor(offset + 5.0, dtype=torch.float64)
    wide = [widened(ratio), widened(accepted), widened(diverged, (True,) * 4)]
    for seen in (in_passes(*chains_first, chain_dim=0), in_one_pass(*wide, count=20, near=near)):
        assert [x.dtype for x in seen] == [torch.float64] * 4
        assert [float(x) for x in seen] == pytest.approx(truth, rel=1e-8)


def test_a_chain_without_density_is_no_number_in_the_variance():
    ratio, accepted, diverged = numbers((), 0.0)
    ratio[3] = -math.inf
    near = torch.zeros((), dtype=torch.float64)
    ways = (
        in_passes(ratio, accepted, diverged, chain_dim=-1),
        in_one_pass(ratio, accepted, diverged, count=20, near=near),
    )
    for mean, variance, *_ in ways:
        assert mean == -math.inf
        assert variance.isnan()


def test_columns_are_written_and_the_last_mean_is_read():
    log_base, log_target = torch.tensor([0.5, 1.5]), torch.tensor([3.0, 8.0])
    empty = torch.zeros(2, 1)
    state = State(empty, log_base, log_target, empty, empty)
    table = new_table(5, state)
    assert table.shape == (4, 5)
    step = torch.tensor(0)
    assert last_mean(table, step) == pytest.approx((2.5 + 6.5) / 2)  # before the first
    for mean, read in ((2.0, 2.0), (-math.inf, 0.0), (math.nan, 0.0), (4.0, 4.0)):
        values = [torch.tensor(x, dtype=torch.float64) for x in (mean, 10.0, 0.5, 1.0)]
        before = table.clone()
        table = with_column(table, step, values)
        assert table[:, step].tolist() == pytest.approx([mean, 10.0, 0.5, 1.0], nan_ok=True)
        others = [column for column in range(5) if column != step]
        assert torch.equal(table[:, others].nan_to_num(), before[:, others].nan_to_num())
        step = step + 1
        assert last_mean(table, step) == read
    nowhere = state._replace(log_target=torch.tensor([3.0, -math.inf]))
    assert last_mean(new_table(5, nowhere), torch.tensor(0)) == 0.0
