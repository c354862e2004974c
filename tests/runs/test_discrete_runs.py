"""Whole runs on models with discrete latents, against sums over their states."""

import discrete_models as models
import pyro.distributions as dist
import pytest
import torch

from pyro_anneal import AnnealedImportance, DiscreteLangevin, SingleSite, log_evidence

POINTS = torch.tensor([-1.0, 0.4, 0.9, 2.0, 3.0], dtype=torch.float64)
BITS = (models.numbers(3, 9, seed=5) > 0).to(torch.float64)
CAUGHT = torch.tensor([3.0, 5.0, 4.0], dtype=torch.float64)
CASES = {
    "belief net": (models.belief_net, models.belief_net_truth, None, BITS),
    "belief net, guide": (
        models.belief_net,
        models.belief_net_truth,
        models.belief_net_guide,
        BITS,
    ),
    "indices per row": (models.mixture, models.mixture_truth, None, POINTS),
    "beside a mean": (models.unknown_mean, models.unknown_mean_truth, None, POINTS),
    "counts": (models.counted, models.counted_truth, None, CAUGHT),
    "moving support": (
        models.nested_counts,
        models.nested_counts_truth,
        None,
        torch.tensor(3.3, dtype=torch.float64),
    ),
    "one-hot": (models.potts, models.potts_truth, None, POINTS),
    "spins": (models.spins, models.spins_truth, None, None),
    "coupled indices": (models.potts_by_index, models.potts_truth, None, POINTS),
    "Markov chain": (models.sequence, models.sequence_truth, None, POINTS),
    "mixed guide": (
        models.mixed_guide_model,
        models.mixed_guide_truth,
        models.mixed_guide,
        POINTS,
    ),
}
SLOW = {"belief net, guide", "coupled indices", "moving support", "Markov chain", "one-hot"}


def annealer(model, guide=None, *, num_chains=32, num_steps=150, **options):
    options = {"compile": False, "progress_bar": False, "seed": 1} | options
    return AnnealedImportance(model, guide, num_chains=num_chains, num_steps=num_steps, **options)


def params():
    for name in CASES:
        marks = pytest.mark.slow if name in SLOW else ()
        yield pytest.param(name, marks=marks, id=name)


@pytest.mark.parametrize("name", list(params()))
@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")
def test_the_evidence_is_that_of_the_sum_over_states(name):
    model, truth, guide, data = CASES[name]
    run = annealer(model, guide).run(data)
    error = (run.lower - truth(data)).abs()
    assert (run.std_error < 0.3).all()
    assert (error < 4.5 * run.std_error + 0.02).all()
    for value in run.posterior.values():
        assert value.isfinite().all()


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")
def test_sandwiches_close_around_the_evidence_of_each_row():
    result = annealer(models.belief_net, num_steps=400).sandwich(BITS)
    simulated = models.belief_net_truth(result.simulated["x"])
    assert (result.lower < simulated + 0.3).all()
    assert (result.upper > simulated - 0.3).all()
    assert (result.upper - result.lower).abs().max() < 0.5
    assert result.upper.shape == (3,)


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")
def test_exact_draws_bound_from_above():
    data, count = POINTS, 32
    probs = torch.softmax(
        models.SHARES.log() + dist.Normal(models.LOCS, 1.0).log_prob(data.unsqueeze(-1)), -1
    )
    torch.manual_seed(3)
    draws = torch.distributions.Categorical(probs).sample((count,))
    run = annealer(models.mixture).run_reverse({"z": draws}, data, exact=True)
    assert run.certified
    assert ((run.upper - models.mixture_truth(data)).abs() < 0.1).all()
    with pytest.raises(ValueError, match='"z" lies outside its support'):
        annealer(models.mixture).run_reverse({"z": draws + 1}, data)


def test_an_automatic_start_is_the_prior_and_says_so():
    run = annealer(models.mixture, "auto", num_steps=50).run(POINTS)
    assert any("chains start from the prior" in note for note in run.notes)
    assert ((run.lower - models.mixture_truth(POINTS)).abs() < 0.3).all()


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")
def test_kernels_of_the_user_are_used_and_steps_may_be_fixed():
    run = annealer(models.belief_net, kernel=SingleSite(2)).run(BITS)
    assert "SingleSite" in run.kernel
    assert run.num_gradients == 1 + 2 * 149
    fixed = annealer(models.belief_net, kernel=DiscreteLangevin(), step_size=0.1).run(BITS)
    assert ((fixed.lower - models.belief_net_truth(BITS)).abs() < 0.6).all()
    mixed = annealer(models.unknown_mean, step_size=0.3).run(POINTS)
    truth = models.unknown_mean_truth(POINTS)
    assert abs(float(mixed.lower - truth)) < 5.0 * float(mixed.std_error) + 0.02


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")
def test_a_checkpoint_continues_to_the_same_numbers(tmp_path):
    first = annealer(models.unknown_mean, num_steps=40, checkpoint=tmp_path / "run.ckpt").run(
        POINTS
    )
    again = annealer(models.unknown_mean, num_steps=40, checkpoint=tmp_path / "run.ckpt").run(
        POINTS
    )
    plain = annealer(models.unknown_mean, num_steps=40).run(POINTS)
    assert torch.equal(first.log_weights, again.log_weights)
    assert torch.equal(first.log_weights, plain.log_weights)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")
def test_the_compiled_loop_gives_the_same_weights():
    plain = annealer(models.unknown_mean, num_steps=120).run(POINTS)
    looped = annealer(models.unknown_mean, num_steps=120, compile=True).run(POINTS)
    assert "loop" in looped.density_mode
    # a proposal decided by rounding may go either way in some chain
    same = torch.isclose(plain.log_weights, looped.log_weights, atol=1e-6)
    assert same.double().mean() > 0.9


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")
def test_log_evidence_takes_discrete_models():
    run = log_evidence(models.counted, CAUGHT)
    assert abs(float(run.lower - models.counted_truth(CAUGHT))) < 0.1
