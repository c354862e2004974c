"""Properties over random inputs: weights, bounds, schedules, and packing of sites."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pyro_anneal import Linear, LogUniform, Power, Sigmoid, bounds
from pyro_anneal.models.density import ModelDensity
from pyro_anneal.models.inspection import inspect_model
from pyro_anneal.schedules import as_betas
from pyro_anneal.weights import (
    effective_sample_size,
    log_mean_exp,
    log_normalized_weights,
    resample_indices,
)

settings.register_profile(
    "pyro_anneal",
    deadline=None,
    derandomize=True,  # the same examples in every run
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("pyro_anneal")

# Some builds of torch flush subnormal numbers to zero in the whole process.
nats = st.floats(-1e4, 1e4, allow_subnormal=False)
zero_weight = st.just(-math.inf)


def weights_of(num_chains, *, zeros=True):
    element = st.one_of(nats, nats, nats, zero_weight) if zeros else nats
    return st.lists(element, min_size=num_chains[0], max_size=num_chains[1]).map(
        lambda values: torch.tensor(values, dtype=torch.float64)
    )


some = weights_of((1, 40))
finite = weights_of((1, 40), zeros=False)


def close(a, b, tolerance=1e-9):
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


# --- weights ---


@given(some, st.randoms(use_true_random=False))
def test_weights_do_not_depend_on_the_order_of_chains(log_weights, random):
    order = list(range(len(log_weights)))
    random.shuffle(order)
    for function in (log_mean_exp, effective_sample_size, bounds.log_harmonic_mean):
        assert close(function(log_weights), function(log_weights[order]))
    assert close(
        log_normalized_weights(log_weights)[order], log_normalized_weights(log_weights[order])
    )


@given(some, nats)
def test_a_common_factor_moves_bounds_and_nothing_else(log_weights, shift):
    moved = log_weights + shift
    assert close(log_mean_exp(moved), log_mean_exp(log_weights) + shift)
    assert close(bounds.log_harmonic_mean(moved), bounds.log_harmonic_mean(log_weights) + shift)
    # the shift itself rounds, at 1e-12 nats
    assert close(effective_sample_size(moved), effective_sample_size(log_weights), 1e-6)


@given(some)
def test_effective_sample_size_lies_between_one_and_all(log_weights):
    ess = float(effective_sample_size(log_weights))
    if bool((log_weights == -math.inf).all()):
        assert ess == 0.0
        return
    assert 1.0 - 1e-9 <= ess <= len(log_weights) + 1e-9
    assert ess <= int((log_weights > -math.inf).sum()) + 1e-9  # zero weights never count
    largest = float(log_normalized_weights(log_weights).exp().max())
    assert 1.0 / ess <= largest + 1e-9  # sum of squares <= largest
    assert largest <= ess**-0.5 + 1e-9  # largest squared <= sum of squares


@given(some)
def test_normalized_weights_sum_to_one(log_weights):
    assert float(log_normalized_weights(log_weights).exp().sum()) == pytest.approx(1.0)


@given(finite)
def test_harmonic_geometric_and_arithmetic_means_are_in_order(log_weights):
    low = float(bounds.log_harmonic_mean(log_weights))
    middle = float(bounds.single_sample(log_weights))
    high = float(bounds.independent_multi_lower(log_weights))
    slack = 1e-9 * (1.0 + abs(middle))
    assert float(log_weights.min()) - slack <= low <= middle + slack
    assert middle - slack <= high <= float(log_weights.max()) + slack


@given(some, st.floats(0.0, 50.0, allow_subnormal=False), st.integers(0, 39))
def test_bounds_rise_with_each_weight(log_weights, growth, chain):
    larger = log_weights.clone()
    larger[chain % len(larger)] += growth
    for function in (log_mean_exp, bounds.log_harmonic_mean):
        assert float(function(larger)) >= float(function(log_weights)) - 1e-9


@given(some, st.integers(1, 50))
def test_resampling_draws_each_particle_its_share_rounded(log_weights, count):
    assume(bool((log_weights > -math.inf).any()))
    indices = resample_indices(log_weights, count)
    drawn = torch.bincount(indices, minlength=len(log_weights)).double()
    share = count * log_normalized_weights(log_weights).exp()
    assert bool(((drawn >= (share - 1e-6).floor()) & (drawn <= (share + 1e-6).ceil())).all())
    assert bool((indices.diff() >= 0).all())


# --- bounds ---


@given(weights_of((1, 1), zeros=False), finite)
def test_bounds_of_both_directions_are_symmetric(one, many):
    """Exchanging w by 1/w exchanges IM and CR/IR, upper and lower."""
    upper = bounds.independent_multi_upper(one, many)
    mirrored = -bounds.coupled_lower(-one, -many)
    assert close(upper, mirrored)


@given(weights_of((2, 40), zeros=False), st.integers(0, 1000))
def test_the_mean_of_a_split_is_that_of_the_whole(log_weights, cut):
    at = 1 + cut % (len(log_weights) - 1)
    parts = torch.stack([log_mean_exp(log_weights[:at]), log_mean_exp(log_weights[at:])])
    sizes = torch.tensor([at, len(log_weights) - at], dtype=torch.float64)
    whole = torch.logsumexp(parts + (sizes / len(log_weights)).log(), 0)
    assert close(whole, log_mean_exp(log_weights))


near = st.lists(st.floats(-12.0, 12.0, allow_subnormal=False), min_size=1, max_size=20).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


@given(near, near, nats)
def test_bennett_moves_with_the_weights_and_mirrors_with_the_directions(forward, reverse, shift):
    estimate = bounds.bennett(forward, reverse)
    tolerance = 1e-6 * (1.0 + abs(float(estimate)) + abs(shift))
    moved = bounds.bennett(forward + shift, reverse + shift)
    assert abs(float(moved) - float(estimate) - shift) <= tolerance
    mirrored = -bounds.bennett(-reverse, -forward)
    assert abs(float(mirrored) - float(estimate)) <= tolerance


@given(finite)
def test_bennett_of_equal_weights_is_that_weight(values):
    constant = values[:1].expand(5)
    estimate = float(bounds.bennett(constant, values[:1]))
    assert abs(estimate - float(values[0])) <= 1e-9 * (1.0 + abs(float(values[0])))


@given(nats, nats, st.floats(0.01, 0.98), st.floats(0.001, 0.01))
def test_intervals_are_nested(lower, upper, level, more):
    low, high = bounds.interval(torch.tensor(lower), torch.tensor(upper), level)
    wide_low, wide_high = bounds.interval(torch.tensor(lower), torch.tensor(upper), level + more)
    assert wide_low < low <= lower
    assert upper <= high < wide_high


# --- schedules ---

schedules = st.one_of(
    st.just(Linear()),
    st.floats(0.05, 8.0).map(Power),
    st.floats(1e-3, 12.0).map(Sigmoid),
    st.floats(1e-12, 0.9).map(LogUniform),
)
steps = st.integers(1, 300)


@given(schedules, steps)
def test_schedules_rise_strictly_from_zero_to_one(schedule, num_steps):
    betas = as_betas(schedule, num_steps)
    assert betas.dtype == torch.float64
    assert betas.shape == (num_steps + 1,)
    assert (float(betas[0]), float(betas[-1])) == (0.0, 1.0)
    assert bool((betas.diff() > 0).all())
    assert float(betas.diff().sum()) == pytest.approx(1.0)
    assert torch.equal(as_betas(betas), betas)


@given(st.floats(1e-3, 12.0), steps)
def test_sigmoids_are_symmetric(delta, num_steps):
    betas = Sigmoid(delta)(num_steps)
    assert close(betas + betas.flip(0), torch.ones_like(betas))


@given(schedules, st.integers(2, 100))
def test_every_second_beta_of_twice_the_steps(schedule, num_steps):
    """Schedules are curves: twice as many steps visit the same betas and one between each two."""
    assume(not isinstance(schedule, LogUniform))  # its first beta is fixed
    fine, coarse = as_betas(schedule, 2 * num_steps), as_betas(schedule, num_steps)
    assert close(fine[::2], coarse)


@given(steps, st.integers(0, 299), st.floats(-2.0, 2.0, allow_subnormal=False))
def test_disturbed_betas_are_refused_unless_they_rise(num_steps, at, shift):
    betas = Linear()(num_steps)
    at %= num_steps + 1
    betas[at] += shift
    rises = bool((betas.diff() > 0).all()) and betas[0] == 0.0 and betas[-1] == 1.0
    if rises:
        assert torch.equal(as_betas(betas), betas)
    else:
        with pytest.raises(ValueError, match="betas"):
            as_betas(betas)


# --- packing and unpacking: a round trip for every support ---


def _positive(n):
    return dist.Gamma(torch.full((n,), 2.0), 1.0).to_event(1)


SUPPORTS = {
    "real": lambda n: dist.Normal(torch.zeros(n), 1.0).to_event(1),
    "positive": _positive,
    "interval": lambda n: dist.Uniform(torch.full((n,), -2.0), 3.0).to_event(1),
    "unit interval": lambda n: dist.Beta(torch.full((n,), 2.0), 3.0).to_event(1),
    "above": lambda n: dist.Pareto(torch.full((n,), 1.5), 2.0).to_event(1),
    "simplex": lambda n: dist.Dirichlet(torch.ones(n + 1)),
    "correlation factor": lambda n: dist.LKJCholesky(n + 1, 1.5),
    "ordered": lambda n: dist.TransformedDistribution(
        dist.Normal(torch.zeros(n + 1), 1.0).to_event(1),
        dist.transforms.OrderedTransform(),
    ),
    "log normal": lambda n: dist.LogNormal(torch.zeros(n), 1.0).to_event(1),
    "circular": lambda n: dist.VonMises(torch.zeros(n), 2.0).to_event(1),
}


@st.composite
def sites(draw):
    """Draws a model: up to four sites of any support, inside or outside of up to two plates."""
    plates = draw(st.sampled_from([(), (3,), (2, 3), (1,)]))
    kinds = [
        (draw(st.sampled_from(sorted(SUPPORTS))), draw(st.integers(1, 3)), draw(st.booleans()))
        for _ in range(draw(st.integers(1, 4)))
    ]
    return plates, kinds


def build(plates, kinds):
    def model():
        frames = [pyro.plate(f"p{i}", size, dim=i - len(plates)) for i, size in enumerate(plates)]

        def inside(name, fn, **options):
            for frame in frames:
                frame.__enter__()
            try:
                pyro.sample(name, fn, **options)
            finally:
                for frame in reversed(frames):
                    frame.__exit__(None, None, None)

        for i, (kind, size, in_plates) in enumerate(kinds):
            fn = SUPPORTS[kind](size)
            if in_plates:
                inside(f"z{i}", fn)
            else:
                pyro.sample(f"z{i}", fn)
        inside("x", dist.Normal(0.0, 1.0), obs=torch.zeros(plates))

    return model


@settings(max_examples=40)
@given(sites(), st.integers(0, 10_000))
def test_packing_and_unpacking_are_inverse(drawn, seed):
    plates, kinds = drawn
    model = build(plates, kinds)
    torch.manual_seed(seed)
    arguments = ((), {})
    layout = inspect_model(model, None, arguments, arguments)
    density = ModelDensity(model, layout, arguments)
    if all(in_plates for _, _, in_plates in kinds):
        assert layout.batch_shape == plates
    position = torch.randn(*layout.batch_shape, layout.dim)
    values = density.unpack(position)
    for i, (kind, size, in_plates) in enumerate(kinds):
        fn = SUPPORTS[kind](size)
        value = values[f"z{i}"]
        assert value.shape == (plates if in_plates else ()) + fn.batch_shape + fn.event_shape
        assert bool(fn.support.check(value).all())
    assert close(density.pack(values), position, 1e-6)
    # draws of the model pack to a position that unpacks to them
    start = density.draw_prior()
    again = density.pack(density.unpack(start))
    assert close(again, start, 1e-5)
    # every element of the position belongs to one site, and sites follow one another
    stops = [site.stop for site in layout.sites]
    assert [site.start for site in layout.sites] == [0, *stops[:-1]]
    assert close(layout.join(layout.split(position)), position, 0.0)
