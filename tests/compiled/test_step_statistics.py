"""The statistics of steps against numpy."""

import math

import numpy as np
import pytest
import torch

from pyro_anneal.compiled.native_loop import statistics_of_steps
from pyro_anneal.compiled.statistics import in_passes, new_table, with_column
from pyro_anneal.kernels import State


def numbers(batch, offset):
    rng = np.random.RandomState(0)
    ratio = torch.tensor(offset + rng.exponential(3.0, (20, *batch)) ** 2)
    return (
        ratio,
        torch.tensor(rng.beta(5, 1, (20, *batch))),
        torch.tensor(rng.rand(20, *batch) < 0.2),
    )


def of_one_step(*tensors):
    (row,) = statistics_of_steps(*(tensor.unsqueeze(0) for tensor in tensors))
    return list(row)


WAYS = (lambda *tensors: in_passes(*tensors, chain_dim=0), of_one_step)


@pytest.mark.parametrize("batch", [(), (3,), (3, 2)])
@pytest.mark.parametrize("offset", [0.0, -1e7])
@pytest.mark.parametrize("way", WAYS)
def test_statistics_are_those_of_numpy(batch, offset, way):
    ratio, accepted, diverged = numbers(batch, offset)
    truth = [
        ratio.numpy().mean(),
        ratio.numpy().var(0).mean(),
        accepted.numpy().mean(),
        diverged.numpy().sum(),
    ]
    seen = way(ratio, accepted, diverged)
    assert [x.dtype for x in seen] == [torch.float64] * 4
    assert [float(x) for x in seen] == pytest.approx(truth, rel=1e-8)


@pytest.mark.parametrize("way", WAYS)
def test_a_chain_without_density_is_no_number_in_the_variance(way):
    ratio, accepted, diverged = numbers((), 0.0)
    ratio[3] = -math.inf
    mean, variance, *_ = way(ratio, accepted, diverged)
    assert mean == -math.inf
    assert variance.isnan()


def test_columns_are_written():
    empty = torch.zeros(2, 1)
    table = new_table(5, State(empty, torch.zeros(2), torch.zeros(2), empty, empty))
    assert table.shape == (4, 5)
    for step, mean in enumerate((2.0, -math.inf, math.nan, 4.0)):
        values = [torch.tensor(x, dtype=torch.float64) for x in (mean, 10.0, 0.5, 1.0)]
        before = table.clone()
        table = with_column(table, torch.tensor(step), values)
        assert table[:, step].tolist() == pytest.approx([mean, 10.0, 0.5, 1.0], nan_ok=True)
        others = [column for column in range(5) if column != step]
        assert torch.equal(table[:, others].nan_to_num(), before[:, others].nan_to_num())
