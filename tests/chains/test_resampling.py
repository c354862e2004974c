"""Resampling among chains: exact at any size, forward and around a reversed path.

Every batch element is an independent repeat of one lopsided problem, so that E[Z_hat / Z] = 1 and
E[Z / Z_hat] = 1 are tested within standard errors; schemes that are wrong must fail.
"""

import itertools
import math

import pytest
import torch
from paths import lopsided, lopsided_gaussian
from transitions import GibbsScan, MetropolisScan

from pyro_anneal import bounds
from pyro_anneal.chains.loop import reversed_paths, run_chains
from pyro_anneal.chains.path import Path, TuningTable
from pyro_anneal.chains.resampling import (
    Lineage,
    Resampling,
    gather_chains,
    systematic_ancestors,
)
from pyro_anneal.kernels import HMC, RandomWalk, State
from pyro_anneal.schedules import Linear

REPEATS = 30_000
KERNELS = {
    "HMC, 1 leapfrog": (HMC(1), 0.5),
    "HMC, 3 leapfrogs": (HMC(3), 0.4),
    "random walk": (RandomWalk(), 0.8),
    "non-reversible scan": (MetropolisScan(), 0.9),
}


def forward(density, path, resampling, num_chains, *, repeats=REPEATS, seed=1):
    """Log-weights of a forward run and its lineage."""
    seen = []
    torch.manual_seed(seed)
    carry, _ = run_chains(
        density,
        path,
        density(density.draw_base(num_chains, repeats)),
        direction="forward",
        seed=seed,
        stream="forward",
        resampling=resampling,
        record=seen.append,
    )
    return carry, seen[-1].lineage


def around(density, path, resampling, num_chains, *, repeats=REPEATS, seed=1, broken=None):
    """Log-weights of populations around reversed paths from one exact posterior sample."""
    torch.manual_seed(seed)
    exact = density.draw_target(1, repeats).expand(num_chains, repeats, -1)
    paths = reversed_paths(
        density, path, density(exact), resampling, seed=seed, stream="reversed paths"
    )
    if broken is not None:
        paths = broken(paths)
    carry, _ = run_chains(
        density,
        path,
        density(density.draw_base(num_chains, repeats)),
        direction="forward",
        seed=seed,
        stream="around a path",
        resampling=resampling,
        reference=paths,
    )
    return carry


def errors(density, log_weights, reverse, groups):
    """Deviations from both identities in standard errors, and the larger standard error."""
    log_z = density.log_normalizer
    estimates = [
        (bounds.independent_multi_lower(log_weights) - log_z).exp(),
        (log_z - bounds.population_upper(reverse, groups)).exp(),
    ]
    std_errors = [float(x.std() / math.sqrt(x.numel())) for x in estimates]
    off = [(float(x.mean()) - 1.0) / e for x, e in zip(estimates, std_errors, strict=True)]
    assert max(std_errors) < 0.012
    return off


def path_of(density, kernel, step_size, num_steps, repeats=REPEATS):
    table = TuningTable.constant(step_size, density.draw_base(repeats))
    return Path(Linear()(num_steps), kernel, table)


@pytest.mark.parametrize("name", KERNELS)
def test_both_identities_hold_for_every_kernel(name):
    density = lopsided()
    path = path_of(density, *KERNELS[name], 5)
    resampling = Resampling(4, (1, 2, 4), threshold=0.9)
    carry, lineage = forward(density, path, resampling, 4)
    assert float(lineage.num_resamplings.double().mean()) > 0.3
    reverse = around(density, path, resampling, 4)
    assert max(map(abs, errors(density, carry.log_weights, reverse.log_weights, 1))) < 5.0


@pytest.mark.parametrize(
    ("num_chains", "groups", "points", "threshold"),
    [
        (1, 1, (1, 3), 0.9),  # nothing to resample
        (6, 2, (1, 2, 3, 4), 1.0),  # two populations of three, always resampled
        (6, 3, (2,), 0.7),
        (5, 1, (), 0.5),  # IM upper
        (4, 4, (2,), 0.9),  # CR upper
        (8, 2, (2, 4), 0.7),
    ],
)
def test_both_identities_hold_for_populations(num_chains, groups, points, threshold):
    density = lopsided()
    path = path_of(density, HMC(1), 0.5, 5)
    resampling = Resampling(num_chains // groups, points, threshold)
    carry, _ = forward(density, path, resampling, num_chains)
    reverse = around(density, path, resampling, num_chains)
    found = errors(density, carry.log_weights, reverse.log_weights, groups)
    assert max(map(abs, found)) < 5.0


def test_no_points_give_the_bounds_without_resampling_bit_by_bit():
    density = lopsided()
    path = path_of(density, HMC(1), 0.5, 5, repeats=50)
    torch.manual_seed(1)
    start = density(density.draw_base(4, 50))
    options = {"direction": "forward", "seed": 1, "stream": "forward"}
    plain, _ = run_chains(density, path, start, **options)
    carry, lineage = forward(density, path, Resampling(4, ()), 4, repeats=50)
    assert torch.equal(plain.log_weights, carry.log_weights)
    assert torch.equal(lineage.ancestors, torch.arange(4).view(4, 1).expand(4, 50))


def test_wrong_weights_of_the_held_path_are_caught():
    density = lopsided()
    path = path_of(density, HMC(1), 0.5, 5)
    resampling = Resampling(4, (1, 2, 4), threshold=1.0)

    def forgets_the_first_segment(paths):
        sums = [weights - paths.log_weights[0] for weights in paths.log_weights]
        return paths._replace(log_weights=tuple(sums))

    reverse = around(density, path, resampling, 4, broken=forgets_the_first_segment)
    ratio = (density.log_normalizer - bounds.population_upper(reverse.log_weights, 1)).exp()
    assert abs(float(ratio.mean()) - 1.0) > 8.0 * float(ratio.std()) / math.sqrt(REPEATS)


def test_a_path_that_is_not_held_is_caught(monkeypatch):
    # an ordinary run whose chains forget the posterior sample is no conditional one
    density = lopsided()
    path = path_of(density, HMC(1), 0.5, 5)
    resampling = Resampling(4, (1, 2, 4), threshold=1.0)
    carry, _ = forward(density, path, resampling, 4)
    ratio = (density.log_normalizer - bounds.population_upper(carry.log_weights, 1)).exp()
    assert abs(float(ratio.mean()) - 1.0) > 8.0 * float(ratio.std()) / math.sqrt(REPEATS)


def test_a_scan_without_its_reversal_is_caught_around_a_path_alone():
    density = lopsided_gaussian()
    resampling = Resampling(3, (2, 4, 6), threshold=0.9)
    found, many = {}, 90_000
    for reverses in (True, False):
        kernel = GibbsScan(density, reverses=reverses)
        path = Path(Linear()(8), kernel, TuningTable.constant(1.0, density.draw_base(many)))
        carry, _ = forward(density, path, resampling, 3, repeats=many)
        reverse = around(density, path, resampling, 3, repeats=many)
        found[reverses] = errors(density, carry.log_weights, reverse.log_weights, 1)
    assert max(map(abs, found[True])) < 5.0
    assert abs(found[False][0]) < 5.0 < abs(found[False][1])


def test_ancestors_have_the_weights_probabilities_in_every_slot():
    weights = torch.tensor([0.5, 0.1, 0.0, 0.4], dtype=torch.float64)
    log_weights = weights.log().unsqueeze(1).expand(4, 200_000)
    generator = torch.Generator().manual_seed(0)
    drawn = systematic_ancestors(log_weights, generator)
    for slot in drawn:
        shares = torch.bincount(slot, minlength=4).double() / 200_000
        error = (weights * (1.0 - weights) / 200_000).sqrt()
        assert bool(((shares - weights).abs() <= 5.0 * error).all())
    counts = torch.stack([(drawn == k).sum(0) for k in range(4)]).double()
    expected = 4.0 * weights.unsqueeze(1)
    assert bool(((counts - expected).abs() < 1.0 + 1e-9).all())  # systematic: floor or ceil


def test_conditional_ancestors_have_the_law_of_unconditional_ones_that_keep_the_first():
    weights = torch.tensor([0.6, 0.15, 0.25], dtype=torch.float64)
    log_weights = weights.log().unsqueeze(1).expand(3, 300_000)
    free = systematic_ancestors(log_weights, torch.Generator().manual_seed(0))
    kept = free[:, free[0] == 0]
    held = systematic_ancestors(log_weights, torch.Generator().manual_seed(1), holds_first=True)

    def shares(drawn):
        code = drawn[0] * 9 + drawn[1] * 3 + drawn[2]
        return torch.bincount(code, minlength=27).double() / drawn.shape[1]

    assert bool((held[0] == 0).all())
    error = (shares(kept) * (1.0 / kept.shape[1] + 1.0 / held.shape[1])).sqrt()
    assert bool(((shares(kept) - shares(held)).abs() <= 5.0 * error + 1e-9).all())
    assert int((shares(held) > 0).sum()) >= 3


def test_populations_of_no_weight_stay_as_they_are():
    position = torch.arange(4.0).view(4, 1, 1)
    state = State(position, *[position[..., 0]] * 2, *[position] * 2)
    log_weights = torch.tensor([-torch.inf, -torch.inf, -torch.inf, -1.0]).double().view(4, 1)
    resampling = Resampling(2, (1,), threshold=0.9)
    new, after, lineage = resampling.resample(
        state, log_weights, Lineage.beginning(log_weights, 2), torch.Generator().manual_seed(0)
    )
    assert new.position.flatten().tolist() == [0.0, 1.0, 3.0, 3.0]
    assert after.flatten().tolist()[:2] == [-math.inf, -math.inf]
    assert torch.allclose(after[2:], torch.tensor(-1.0 - math.log(2.0)).double())
    assert lineage.ancestors.flatten().tolist() == [0, 1, 3, 3]
    assert lineage.num_resamplings.flatten().tolist() == [0, 1]
    assert bounds.independent_multi_lower(after) == bounds.independent_multi_lower(log_weights)


def test_undefined_weights_reach_the_result():
    position = torch.zeros(2, 1, 1)
    state = State(position, *[position[..., 0]] * 2, *[position] * 2)
    log_weights = torch.tensor([torch.nan, 0.0]).double().view(2, 1)
    _, after, _ = Resampling(2, (1,)).resample(
        state, log_weights, Lineage.beginning(log_weights, 2), torch.Generator().manual_seed(0)
    )
    assert bool(after.isnan().any())


def test_batch_elements_resample_by_themselves():
    density = lopsided()
    path = path_of(density, HMC(1), 0.5, 5, repeats=200)
    _, lineage = forward(density, path, Resampling(4, (2, 4), 0.95), 8, repeats=200)
    counts = lineage.num_resamplings
    assert counts.shape == (2, 200)
    assert counts.unique().tolist() == [0, 1, 2]
    own = torch.arange(8).view(2, 4).repeat_interleave(4, 0)  # populations do not mix
    for k, member in itertools.product(range(8), range(200)):
        assert int(lineage.ancestors[k, member]) in own[k].tolist()


def test_chains_are_gathered_per_batch_element():
    position = torch.arange(12.0).view(3, 2, 2)
    state = State(position, position.sum(-1), -position.sum(-1), 2 * position, 3 * position)
    indices = torch.tensor([[0, 2], [0, 1], [1, 1]])
    moved = gather_chains(state, indices)
    for k, b in itertools.product(range(3), range(2)):
        for value, got in zip(state, moved, strict=True):
            assert torch.equal(got[k, b], value[indices[k, b], b])
