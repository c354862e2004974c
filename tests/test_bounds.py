import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from perfect_chains import chains, simulate
from scipy import stats
from scipy.optimize import brentq
from scipy.special import expit

from pyro_anneal import bounds

R = 60_000  # replications, as a batch
finite = st.floats(-100.0, 100.0, allow_subnormal=False)

# name: (bound, direction of the identity); each takes forward, coupled and independent reverse
# chains, reverse chains from the end of forward chain 0, and exact ones for IR
IDENTITIES = {
    "IM lower": lambda c: (bounds.independent_multi_lower(c["forward"]), +1),
    "IM upper": lambda c: (bounds.independent_multi_upper(c["coupled"][:1], c["forward"][1:]), -1),
    "CR upper": lambda c: (bounds.coupled_upper(c["coupled"]), -1),
    "CR lower": lambda c: (bounds.coupled_lower(c["forward"][:1], c["from_end"]), +1),
    "IR upper": lambda c: (bounds.independent_reverse_upper(c["independent"]), -1),
    "IR lower": lambda c: (
        bounds.independent_reverse_lower(c["forward"][:1], c["independent"][1:]),
        +1,
    ),
}


def _all_chains(s, betas, num_chains=3):
    """Draws K chains of each kind for R replications of one and the same lopsided x."""
    problem, _ = simulate(s)
    problem = type(problem)(problem.s, torch.tensor([1.4, -0.3]).expand(R, 2))
    forward, _, last = chains(problem, num_chains, betas)
    exact = problem.draw(1.0, num_chains)

    def reverse(k, start):
        return chains(problem, k, betas, start=start, reverse=True)[0]

    return problem.log_evidence, {
        "forward": forward,
        "coupled": reverse(num_chains, exact[0]),
        "independent": reverse(num_chains, exact),
        "from_end": reverse(num_chains - 1, last[0]),
    }


@pytest.mark.parametrize("name", IDENTITIES)
@pytest.mark.parametrize(
    ("s", "betas"),
    [
        ([0.6, 0.3], [0.0, 1.0]),  # T = 1: IWAE and RIWAE
        ([1.8, 0.6], [0.0, 0.1, 0.3, 0.6, 1.0]),  # perfect transitions
    ],
    ids=["T=1", "T=4"],
)
def test_bounds_are_unbiased_on_the_scale_of_the_evidence(name, s, betas):
    # E[e^L] = Z and E[e^-U] = 1 / Z, the identities behind every guarantee
    log_evidence, kinds = _all_chains(s, torch.tensor(betas))
    bound, sign = IDENTITIES[name](kinds)
    ratio = torch.exp(sign * (bound - log_evidence))
    std_error = (ratio.std() / math.sqrt(R)).item()
    assert std_error < 0.005
    assert abs(ratio.mean().item() - 1.0) < 5 * std_error
    # and hence the direction of the bound in expectation, by more than noise
    gap = sign * (bound - log_evidence)
    assert gap.mean().item() < -5 * (gap.std() / math.sqrt(R)).item()


def test_a_wrong_start_breaks_the_identity():
    # the test above can fail: reverse chains from the prior are no posterior samples
    log_evidence, _ = _all_chains([0.7, 0.4], torch.tensor([0.0, 1.0]))
    problem, _ = simulate([0.7, 0.4])
    problem = type(problem)(problem.s, torch.tensor([1.4, -0.3]).expand(R, 2))
    betas = torch.tensor([0.0, 1.0])
    log_weights, _, _ = chains(problem, 3, betas, start=problem.draw(0.0, 3), reverse=True)
    ratio = torch.exp(log_evidence - bounds.independent_reverse_upper(log_weights))
    assert abs(ratio.mean().item() - 1.0) > 10 * (ratio.std() / math.sqrt(R)).item()


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_interval_covers_one_realized_pair(level):
    log_evidence, kinds = _all_chains([1.8, 0.6], torch.tensor([0.0, 0.1, 0.3, 0.6, 1.0]))
    lower = bounds.independent_multi_lower(kinds["forward"])
    upper = bounds.coupled_upper(kinds["coupled"])
    low, high = bounds.interval(lower, upper, level)
    misses = ((low > log_evidence) | (high < log_evidence)).double().mean().item()
    assert misses < 1 - level
    crossed = (lower > log_evidence).double().mean().item()
    assert crossed > 0.2  # the bare bound does miss: the margin is what covers


def test_interval_margin_and_level():
    low, high = bounds.interval(torch.tensor(-3.0), torch.tensor(-2.5), level=0.9)
    assert low.item() == pytest.approx(-3.0 - math.log(20.0))
    assert high.item() == pytest.approx(-2.5 + math.log(20.0))
    for level in (0.0, 1.0, 1.5):
        with pytest.raises(
            ValueError, match=f"level must lie strictly between 0 and 1, got {level}"
        ):
            bounds.interval(low, high, level)


def test_gap_law_of_perfect_transitions():
    # M02: with linear betas and K = 1 the expected gap is (sum_j s_j^2) / T for simulated pairs
    s = torch.tensor([2.0, 0.5])
    for num_steps in (1, 7):
        problem, z = simulate(s, (R,))
        betas = torch.linspace(0, 1, num_steps + 1)
        lower = chains(problem, 1, betas)[0]
        upper = chains(problem, 1, betas, start=z, reverse=True)[0]
        gap = bounds.single_sample(upper) - bounds.single_sample(lower)
        std_error = (gap.std() / math.sqrt(R)).item()
        assert abs(gap.mean().item() - 4.25 / num_steps) < 5 * std_error


def test_im_upper_improves_on_single_by_at_most_log_k():
    _, kinds = _all_chains([1.8, 0.6], torch.tensor([0.0, 0.5, 1.0]))
    single = kinds["coupled"][0]
    upper = bounds.independent_multi_upper(kinds["coupled"][:1], kinds["forward"][1:])
    assert (upper >= single - math.log(3.0) - 1e-12).all()


def test_bounds_tighten_with_more_chains():
    log_evidence, kinds = _all_chains([1.8, 0.6], torch.tensor([0.0, 0.5, 1.0]), num_chains=8)
    lower = [bounds.independent_multi_lower(kinds["forward"][:k]).mean() for k in (1, 2, 8)]
    upper = [bounds.coupled_upper(kinds["coupled"][:k]).mean() for k in (1, 2, 8)]
    assert lower[0] < lower[1] < lower[2] < log_evidence[0] < upper[2] < upper[1] < upper[0]


# --- algebra ----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(finite, min_size=2, max_size=8), finite)
def test_harmonic_mean_mirrors_the_mean(values, shift):
    log_weights = torch.tensor(values)
    harmonic = bounds.log_harmonic_mean(log_weights)
    mirrored = -bounds.independent_multi_lower(-log_weights)
    assert harmonic.item() == pytest.approx(mirrored.item(), abs=1e-9)
    moved = bounds.log_harmonic_mean(log_weights.flip(0) + shift).item()
    assert moved == pytest.approx(harmonic.item() + shift, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(finite, min_size=1, max_size=8))
def test_order_of_the_means(values):
    # harmonic <= geometric <= arithmetic, so the single-sample bounds are never the tighter ones
    log_weights = torch.tensor(values)
    low = bounds.log_harmonic_mean(log_weights).item()
    middle = bounds.single_sample(log_weights).item()
    high = bounds.independent_multi_lower(log_weights).item()
    assert low - 1e-9 <= middle <= high + 1e-9


def test_one_chain_leaves_one_weight():
    weight, none = torch.tensor([[-3.2, 1.0]]), torch.empty(0, 2)
    for bound in (
        bounds.single_sample(weight),
        bounds.independent_multi_lower(weight),
        bounds.coupled_upper(weight),
        bounds.independent_multi_upper(weight, none),
        bounds.coupled_lower(weight, none),
    ):
        assert bound.tolist() == pytest.approx([-3.2, 1.0])


def test_zero_weights():
    dead = torch.tensor([-math.inf, 0.0])
    assert bounds.independent_multi_lower(dead).item() == pytest.approx(-math.log(2.0))
    assert bounds.coupled_upper(dead).item() == -math.inf
    assert bounds.coupled_lower(dead[:1], dead[1:]).item() == -math.inf


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (bounds.independent_multi_upper, r"exactly one reverse chain: .* got \[2, 3\]"),
        (bounds.coupled_lower, r"exactly one forward chain: .* got \[2, 3\]"),
        (bounds.independent_reverse_lower, r"exactly one forward chain: .* got \[2, 3\]"),
    ],
)
def test_the_single_chain_must_be_single(function, message):
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(2, 3), torch.zeros(1, 3))


# --- Bennett ----------------------------------------------------------------------------------


def _bennett_by_root_finding(forward, reverse):
    shift = math.log(len(forward) / len(reverse))
    both = [*forward.tolist(), *reverse.tolist()]

    def difference(c):
        return expit(forward.numpy() - c - shift).sum() - expit(c + shift - reverse.numpy()).sum()

    return brentq(difference, min(both) - 50, max(both) + 50, xtol=1e-12)


@pytest.mark.parametrize(("num_forward", "num_reverse"), [(1, 1), (4, 9), (20, 3)])
def test_bennett_solves_its_equation(num_forward, num_reverse):
    forward = torch.randn(num_forward, 5) * 3 - 40
    reverse = torch.randn(num_reverse, 5) * 2 - 36
    result = bounds.bennett(forward, reverse)
    expected = [_bennett_by_root_finding(forward[:, i], reverse[:, i]) for i in range(5)]
    assert result.tolist() == pytest.approx(expected, abs=1e-9)


def test_bennett_is_exact_for_work_distributions_that_obey_crooks():
    # log w ~ N(c - v/2, v) forward and N(c + v/2, v) in reverse share the crossing c
    c, v, num = -7.5, 4.0, 400_000
    forward = c - v / 2 + math.sqrt(v) * torch.randn(num // 4, 4)
    reverse = c + v / 2 + math.sqrt(v) * torch.randn(num // 4, 4)
    estimates = bounds.bennett(forward, reverse)
    std_error = (estimates.std() / 2).item()
    assert std_error < 0.01
    assert abs(estimates.mean().item() - c) < 5 * max(std_error, 0.003)


def test_bennett_with_zero_weights():
    # a forward chain of zero weight adds nothing to either sum but counts in K_f
    forward = torch.tensor([-math.inf, -2.0, -3.0])
    reverse = torch.tensor([-1.5, -2.5])
    result = bounds.bennett(forward, reverse).item()
    assert result == pytest.approx(_bennett_by_root_finding_with_dead(forward, reverse), abs=1e-9)
    assert bounds.bennett(forward[:1], reverse).isnan()
    assert bounds.bennett(forward, torch.tensor([math.inf])).isnan()


def _bennett_by_root_finding_with_dead(forward, reverse):
    shift = math.log(len(forward) / len(reverse))

    def difference(c):
        living = forward[forward.isfinite()].numpy()
        return expit(living - c - shift).sum() - expit(c + shift - reverse.numpy()).sum()

    return brentq(difference, -60, 60, xtol=1e-12)


def test_bennett_between_weights_far_apart():
    # T = 1 leaves gaps of thousands of nats, where a logistic function is zero in float64
    result = bounds.bennett(torch.tensor([-2000.0, -2300.0]), torch.tensor([1000.0, 1700.0]))
    assert result.item() == pytest.approx(-500.0, abs=1e-6)


small = st.lists(st.floats(-8.0, 8.0, allow_subnormal=False), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(small, small, finite)
def test_bennett_moves_with_a_shift_and_mirrors(forward, reverse, shift):
    forward, reverse = torch.tensor(forward), torch.tensor(reverse)
    result = bounds.bennett(forward, reverse).item()
    moved = bounds.bennett(forward + shift, reverse + shift).item()
    assert moved == pytest.approx(result + shift, abs=1e-6)
    assert bounds.bennett(-reverse, -forward).item() == pytest.approx(-result, abs=1e-6)


# log-weights' standard deviation: blocks of 64 chains, and the median distance below the truth
NARROW = {0.05: (64, 0.16), 0.1: (32, 0.24), 0.3: (16, 0.46), 1.0: (8, 1.03), 2.0: (4, 1.92)}


@pytest.mark.parametrize("sigma", NARROW)
def test_limits_of_blocks_are_narrow_and_cover(sigma):
    num_blocks, distance = NARROW[sigma]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 20_000, generator=generator, dtype=torch.float64)
    log_weights = sigma * noise - 0.5 * sigma**2  # log Z = 0
    limit = bounds.limit_of_blocks(bounds.block_means(log_weights, num_blocks))
    assert float((limit <= 0.0).double().mean()) >= 0.9995
    assert float(-limit.median()) == pytest.approx(distance, abs=0.01)
    markov = bounds.limit_of_blocks(bounds.block_means(log_weights, 1))
    assert float(markov.median()) < -2.99


def miss_rate(num_blocks, num_kept, margin, level=0.9, repeats=200_000):
    """Misses of blocks as bad as Markov allows: weight e^b with probability e^-b, else zero."""
    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(num_blocks, repeats, generator=generator, dtype=torch.float64)
    lower = torch.where(uniform < math.exp(-margin), margin, -torch.inf)
    limit = bounds.limit_of_blocks(lower, level, num_kept=num_kept)
    return float((limit >= -1e-9).double().mean())


@pytest.mark.parametrize(("num_blocks", "num_kept"), [(1, 1), (4, 4), (4, 3), (8, 5), (16, 14)])
def test_limits_of_blocks_miss_as_often_as_they_say_at_worst(num_blocks, num_kept):
    margin = bounds.block_margin(num_blocks, num_kept, 0.9)
    error = math.sqrt(0.1 * 0.9 / 200_000)
    assert abs(miss_rate(num_blocks, num_kept, margin) - 0.1) < 5.0 * error


def test_margins_agree_with_the_binomial_tail_and_beat_counting():
    for count, kept in [(4, 3), (8, 6), (64, 50), (5, 1)]:
        margin = bounds.block_margin(count, kept, 0.95)
        assert stats.binom.sf(kept - 1, count, math.exp(-margin)) == pytest.approx(0.05, rel=1e-9)
        counting = (math.log(math.comb(count, kept)) + math.log(20.0)) / kept
        assert margin < counting
    assert bounds.block_margin(8, 8, 0.95) == pytest.approx(math.log(20.0) / 8)


def test_limits_of_dropped_blocks_take_the_lowest_that_is_kept():
    lower = torch.tensor([[3.0], [-torch.inf], [1.0], [2.0]])
    margin = bounds.block_margin(4, 3, 0.95)
    assert float(bounds.limit_of_blocks(lower, num_kept=3)) == pytest.approx(1.0 - margin)
    assert float(bounds.limit_of_blocks(lower)) == -math.inf


def test_block_means_split_neighbours_and_keep_the_mean():
    log_weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).log().unsqueeze(1)
    means = bounds.block_means(log_weights, 2).exp().flatten()
    assert torch.allclose(means, torch.tensor([2.0, 4.5]))
    whole = bounds.block_means(log_weights, 1)[0]
    assert torch.equal(whole, bounds.independent_multi_lower(log_weights))


def test_population_upper_joins_the_bounds_that_it_generalizes():
    log_weights = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    coupled = bounds.population_upper(log_weights, 6)
    assert torch.allclose(coupled, bounds.coupled_upper(log_weights))
    single = bounds.population_upper(log_weights, 1)
    mixed = bounds.independent_multi_upper(log_weights[:1], log_weights[1:])
    assert torch.allclose(single, mixed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bounds.limit_of_blocks(torch.zeros(4), 1.0), "level must lie strictly"),
        (lambda: bounds.limit_of_blocks(torch.zeros(4), num_kept=5), "num_kept must lie"),
        (lambda: bounds.block_means(torch.zeros(4), 5), "num_blocks must lie between 1 and the 4"),
    ],
)
def test_blocks_refuse_what_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call()
