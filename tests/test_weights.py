import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_anneal.weights import (
    effective_sample_size,
    log_mean_exp,
    log_normalized_weights,
    resample_indices,
)

INF = math.inf

finite = st.floats(-300.0, 300.0, allow_subnormal=False)
weights_or_zero = st.one_of(finite, st.just(-INF))
REDUCTIONS = (log_mean_exp, effective_sample_size, log_normalized_weights)


def _tensor(values):
    return torch.tensor(values, dtype=torch.float64)


# --- closed forms -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "mean", "ess"),
    [
        ([1.0, 3.0], 2.0, 1.6),
        ([2.0], 2.0, 1.0),
        ([0.0, 0.0, 6.0], 2.0, 1.0),
        ([5.0, 5.0, 5.0, 5.0], 5.0, 4.0),
        ([0.0, 0.0], 0.0, 0.0),
    ],
)
def test_by_hand(weights, mean, ess):
    log_weights = _tensor(weights).log()
    assert log_mean_exp(log_weights).exp().item() == pytest.approx(mean)
    assert effective_sample_size(log_weights).item() == pytest.approx(ess)


def test_weights_far_outside_the_range_of_exp():
    log_weights = _tensor([-5000.0, -5000.0 + math.log(3.0)])
    assert log_mean_exp(log_weights).item() == pytest.approx(-5000.0 + math.log(2.0))
    assert effective_sample_size(log_weights).item() == pytest.approx(1.6)
    assert log_mean_exp(-log_weights).item() == pytest.approx(5000.0 + math.log(2.0 / 3.0))


def test_importance_sampling_of_a_gaussian_integral():
    # q = N(0, 2), integrand exp(-(z - 1)^2 / 2), integral sqrt(2 pi); ESS / K tends to
    # E[w]^2 / E[w^2] with E[w^2] = int f^2 / q
    base = torch.distributions.Normal(0.0, 2.0)
    z = base.sample((200_000,))
    log_weights = -0.5 * (z - 1.0) ** 2 - base.log_prob(z)
    std_error = (log_weights.exp().std() / math.sqrt(len(z)) / math.sqrt(2 * math.pi)).item()
    assert std_error < 0.005
    expected = 0.5 * math.log(2 * math.pi)
    assert abs(log_mean_exp(log_weights).item() - expected) < 5 * std_error
    grid = torch.linspace(-30, 30, 200_001)
    second = torch.trapezoid(torch.exp(-((grid - 1) ** 2) - base.log_prob(grid)), grid).item()
    fraction = 2 * math.pi / second
    assert effective_sample_size(log_weights).item() / len(z) == pytest.approx(fraction, rel=0.01)


def test_gradient_of_log_mean_exp_is_the_normalized_weight():
    log_weights = _tensor([0.3, -1.0, 2.0]).requires_grad_()
    log_mean_exp(log_weights).backward()
    expected = [math.exp(v) / sum(math.exp(u) for u in (0.3, -1.0, 2.0)) for v in (0.3, -1.0, 2.0)]
    assert log_weights.grad.tolist() == pytest.approx(expected)


# --- special weights --------------------------------------------------------------------------


def test_all_zero_weights_are_uniform_once_normalized():
    log_weights = torch.full((4, 2), -INF)
    log_weights[:, 1] = 0.0
    assert log_mean_exp(log_weights).tolist() == [-INF, 0.0]
    assert effective_sample_size(log_weights).tolist() == pytest.approx([0.0, 4.0])
    assert log_normalized_weights(log_weights).exp().flatten().tolist() == pytest.approx(
        [0.25] * 8
    )


def test_a_zero_weight_is_normalized_to_zero():
    result = log_normalized_weights(_tensor([-INF, 1.0]))
    assert result.tolist() == [-INF, 0.0]


@pytest.mark.parametrize("function", REDUCTIONS)
def test_nan_reaches_the_result_of_its_batch_element_only(function):
    log_weights = torch.zeros(3, 2)
    log_weights[1, 0] = math.nan
    result = function(log_weights)
    assert result[..., 0].isnan().all()
    assert not result[..., 1].isnan().any()


@pytest.mark.parametrize("function", REDUCTIONS)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3)])
def test_no_particle_dimension_is_an_error(function, shape):
    with pytest.raises(ValueError, match=r"leading particle dimension of size K >= 1"):
        function(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", REDUCTIONS)
def test_dtype_is_kept(function, dtype):
    assert function(torch.zeros(3, 2, dtype=dtype)).dtype == dtype


# --- properties -------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(weights_or_zero, min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_particles_can_be_permuted(values, random):
    shuffled = list(values)
    random.shuffle(shuffled)
    for function in (log_mean_exp, effective_sample_size):
        expected = function(_tensor(values)).item()
        assert function(_tensor(shuffled)).item() == pytest.approx(expected, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(weights_or_zero, min_size=1, max_size=12), finite)
def test_a_shift_moves_the_mean_and_nothing_else(values, shift):
    log_weights = _tensor(values)
    moved = log_mean_exp(log_weights + shift).item()
    assert moved == pytest.approx(log_mean_exp(log_weights).item() + shift, abs=1e-9)
    for function in (effective_sample_size, log_normalized_weights):
        torch.testing.assert_close(
            function(log_weights + shift), function(log_weights), rtol=1e-9, atol=1e-9
        )


@settings(max_examples=60, deadline=None)
@given(st.lists(weights_or_zero, min_size=1, max_size=12))
def test_effective_sample_size_counts_the_living_at_most(values):
    ess = effective_sample_size(_tensor(values)).item()
    alive = sum(v > -INF for v in values)
    assert min(alive, 1) - 1e-9 <= ess <= alive + 1e-9


@settings(max_examples=60, deadline=None)
@given(st.lists(weights_or_zero, min_size=1, max_size=12))
def test_mean_lies_between_the_best_over_k_and_the_best(values):
    result = log_mean_exp(_tensor(values)).item()
    best = max(values)
    assert best - math.log(len(values)) - 1e-9 <= result <= best + 1e-9 or result == best == -INF


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(weights_or_zero, min_size=6, max_size=6), min_size=1, max_size=5),
)
def test_a_batch_equals_a_loop(rows):
    log_weights = _tensor(rows).reshape(-1, 2, 3)
    for function in REDUCTIONS:
        batched = function(log_weights)
        for i in range(2):
            for j in range(3):
                torch.testing.assert_close(batched[..., i, j], function(log_weights[:, i, j]))


# --- resampling -------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(weights_or_zero, min_size=1, max_size=8).filter(lambda v: max(v) > -INF),
    st.integers(1, 30),
    st.integers(0, 100),
)
def test_systematic_counts_are_floor_or_ceil(values, num_samples, seed):
    generator = torch.Generator().manual_seed(seed)
    indices = resample_indices(_tensor(values), num_samples, generator=generator)
    total = sum(math.exp(v - max(values)) for v in values)
    for k, value in enumerate(values):
        expected = num_samples * math.exp(value - max(values)) / total
        count = (indices == k).sum().item()
        assert math.floor(expected - 1e-6) <= count <= math.ceil(expected + 1e-6)


def test_resampling_is_unbiased_and_independent_over_the_batch():
    log_weights = _tensor([0.1, 0.25, 0.65]).log().unsqueeze(1).expand(3, 20_000)
    counts = torch.stack([(resample_indices(log_weights, 2) == k).sum(0) for k in range(3)])
    mean, std_error = counts.double().mean(1), counts.double().std(1) / math.sqrt(20_000)
    assert ((mean - _tensor([0.2, 0.5, 1.3])).abs() < 5 * std_error).all()
    assert counts.double().std(1)[1] > 0.4  # a shared uniform would give each element the same


def test_resampling_never_takes_the_dead():
    log_weights = _tensor([-INF, 0.0, -INF, 0.0, -INF])
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        assert set(resample_indices(log_weights, 7, generator=generator).tolist()) <= {1, 3}


def test_resampling_repeats_with_its_seed_and_leaves_the_global_state():
    state = torch.get_rng_state()
    first, second = (
        resample_indices(
            torch.randn(9, generator=torch.Generator().manual_seed(1)),
            5,
            generator=torch.Generator().manual_seed(3),
        )
        for _ in range(2)
    )
    assert first.tolist() == second.tolist()
    assert torch.equal(state, torch.get_rng_state())


def test_resampling_needs_a_sample():
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        resample_indices(torch.zeros(3), 0)
