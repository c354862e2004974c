"""Densities of discrete latents: they sum to one, and their gradients give exact differences."""

import discrete_models as models
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_anneal import HMC, ChromaticGibbs, Composite, DiscreteLangevin, SingleSite
from pyro_anneal.kernels import Block
from pyro_anneal.problems.colours import colour
from pyro_anneal.problems.discrete import kernels_for, lattice_of
from pyro_anneal.problems.problem import prepare

POINTS = torch.tensor([-1.0, 0.4, 0.9, 2.0, 3.0], dtype=torch.float64)
BITS = (models.numbers(2, 9, seed=5) > 0).to(torch.float64)


def problem(model, *args, guide=None, num_chains=4):
    return prepare(
        model,
        guide,
        (args, {}),
        (args, {}),
        num_chains=num_chains,
        batch_plates="auto",
        compile=False,
        seed=0,
    )


def kernels(found, kernel=None):
    return kernels_for(kernel or HMC(), found.model, found.probe(), seed=0)


def test_a_lattice_with_a_moving_bound_sums_to_prior_one_and_to_the_evidence():
    data = torch.tensor(6.3)
    found = problem(models.nested_counts, data)
    grid = torch.cartesian_prod(torch.arange(0.0, 200.0), torch.arange(-3.0, 45.0))
    state = found.density(grid.to(found.layout.dtype))
    assert float(state.log_base.logsumexp(0)) == pytest.approx(0.0, abs=1e-4)
    truth = float(models.nested_counts_truth(data))
    assert float(state.log_target.logsumexp(0)) == pytest.approx(truth, abs=1e-4)
    assert lattice_of(found.layout).blocks[0].upper == (float("inf"),) * 2


def test_binary_rows_sum_to_the_evidence_of_each():
    found = problem(models.belief_net, BITS)
    states = models.cube(6)
    state = found.density(states.unsqueeze(1).expand(-1, 2, -1).contiguous())
    truth = models.belief_net_truth(BITS)
    assert torch.allclose(state.log_target.logsumexp(0), truth, atol=1e-10)
    assert torch.allclose(state.log_base.logsumexp(0), torch.zeros(2), atol=1e-10)


def all_changes(block, position):
    """Lists positions that differ in one variable, of every row of a batch at once."""
    for variable in range(block.count):
        first = block.start + variable * block.size
        if block.kind == "binary":
            other = position.clone()
            other[..., first] = 1.0 - other[..., first]
            yield other
            continue
        for category in range(block.size):
            other = position.clone()
            other[..., first : first + block.size] = 0.0
            other[..., first + category] = 1.0
            yield other


@pytest.mark.parametrize(
    ("model", "args"),
    [
        (models.mixture, (POINTS,)),
        (models.unknown_mean, (POINTS,)),
        (models.sequence, (POINTS,)),
        (models.mixed_guide_model, (POINTS,)),
    ],
    ids=["index", "binary beside a mean", "Markov chain", "guide"],
)
def test_lifted_gradients_are_exact_differences(model, args):
    guide = models.mixed_guide if model is models.mixed_guide_model else None
    found = problem(model, *args, guide=guide)
    assert found.layout.lifted
    torch.manual_seed(1)
    here = found.draw(1)
    state = found.density(here)
    for block in lattice_of(found.layout).blocks:
        for there in all_changes(block, here):
            end, move = found.density(there), there - here
            for value, grad in (("log_base", "grad_base"), ("log_target", "grad_target")):
                change = getattr(end, value) - getattr(state, value)
                foretold = (move * getattr(state, grad)).sum(-1)
                assert torch.allclose(foretold, change, atol=1e-8)


def test_couplings_within_a_plate_are_not_lifted():
    # enumeration would give all elements the same value: the differences would be wrong
    found = problem(models.potts_by_index, POINTS)
    assert found.layout.lifted == ()
    assert any("annealed by a discrete kernel" in note for note in found.layout.notes)
    (only,) = kernels(found)
    assert isinstance(only.parts[0], SingleSite)  # indices have no gradient


def colours(found):
    return colour(found, lattice_of(found.layout))


def ring_of_five():
    with pyro.plate("ring", 5):
        z = pyro.sample("z", dist.OneHotCategorical(logits=torch.zeros(5, 3)))
    pyro.factor("alike", 0.9 * (z * z.roll(1, 0)).sum())


def test_variables_that_meet_in_no_factor_share_a_colour():
    spins = colours(problem(models.spins))
    board = [(row + column) % 2 for row in range(3) for column in range(4)]
    assert spins in (tuple(board), tuple(1 - value for value in board))
    ring = colours(problem(ring_of_five))
    assert max(ring) == 2
    assert all(ring[k] != ring[k - 1] for k in range(5))
    assert colours(problem(models.mixture, POINTS)) == (0,)  # per row of a batch
    chain = colours(problem(models.sequence, POINTS))
    assert chain in ((0, 1, 0, 1, 0), (1, 0, 1, 0, 1))
    assert colours(problem(models.belief_net, BITS)) is None  # no gradient foretells a change
    assert colours(problem(models.potts, POINTS)) is None  # quadratic in each


def test_colours_are_offered_where_gradients_hold_all_conditionals():
    found = problem(models.spins)
    offered = kernels_for(
        HMC(), found.model, found.probe(), seed=0, colour=lambda part: colour(found, part)
    )
    assert [type(kernel.parts[0]) for kernel in offered] == [ChromaticGibbs]
    assert offered[0].num_gradients == 2
    offered = kernels_for(
        HMC(), found.model, found.probe(), seed=0, colour=lambda part: (*range(5), *range(5), 0, 1)
    )
    assert [type(kernel.parts[0]) for kernel in offered] == [DiscreteLangevin, ChromaticGibbs]
    asked = kernels_for(
        ChromaticGibbs(), found.model, found.probe(), seed=0, colour=lambda part: (0, 1) * 6
    )
    assert asked == (ChromaticGibbs((0, 1) * 6, lattice_of(found.layout)),)
    with pytest.raises(ValueError, match="use DiscreteLangevin"):
        kernels(found, Composite((ChromaticGibbs(),)))


def test_the_note_says_when_enumeration_is_better():
    found = problem(models.mixture, POINTS)
    assert any('infer={"enumerate": "parallel"}' in note for note in found.layout.notes)


def test_kernels_suit_the_latents():
    mixed, alone = problem(models.unknown_mean, POINTS), problem(models.mixture, POINTS)
    (kernel,) = kernels(mixed, HMC(3))
    assert isinstance(kernel.parts[0], DiscreteLangevin)
    assert kernel.parts[-1] == HMC(3)
    assert kernel.num_gradients == 5
    (kernel,) = kernels(alone, HMC(3))
    assert len(kernel.parts) == 1
    (kernel,) = kernels(mixed, Composite((HMC(1), SingleSite(2))))
    assert kernel.parts[1].lattice.blocks == (Block("binary", 1, 6),)
    with pytest.raises(ValueError, match="moves discrete latents only"):
        kernels(mixed, DiscreteLangevin())
    continuous = problem(lambda: pyro.sample("y", dist.Normal(_real(), 1.0), obs=POINTS[0]))
    with pytest.raises(ValueError, match="the model has none"):
        kernels(continuous, SingleSite())

    class Strange:
        num_gradients, target_accept = 1, None

    with pytest.raises(ValueError, match="Strange does not know of discrete latents"):
        kernels(mixed, Strange())


def _real():
    return pyro.sample("z", dist.Normal(0.0, 1.0))


def test_vectors_of_counts_are_refused_by_name():
    def model():
        z = pyro.sample("z", dist.Multinomial(4, torch.ones(3)))
        pyro.sample("y", dist.Normal(z[..., 0], 1.0), obs=torch.tensor(1.0))

    with pytest.raises(ValueError, match=r'"z" is discrete \(Multinomial\).*IWAE'):
        problem(model)


def test_draws_with_no_density_stay_dead():
    found = problem(models.mixture, POINTS)
    position = found.draw(2)
    position[1, 0] = torch.nan
    state = found.density(position)
    assert state.log_target[1, 0].isnan()
    assert state.log_target[0].isfinite().all()
