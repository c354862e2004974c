"""Starts beside discrete latents: a fit with these summed out, and their exact conditional."""

import discrete_models as models
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_anneal import AnnealedImportance, log_evidence
from pyro_anneal.problems.conditional import ConditionalBase
from pyro_anneal.problems.problem import prepare

POINTS = torch.tensor([-1.0, 0.4, 0.9, 2.0, 3.0], dtype=torch.float64)


def problem(model, *args, **options):
    return prepare(
        model,
        "auto",
        (args, {}),
        (args, {}),
        num_chains=32,
        batch_plates="auto",
        compile=False,
        seed=0,
        **options,
    )


LOWER = torch.tensor([-2.0, 0.0, 1.0], dtype=torch.float64)
UPPER = torch.tensor([0.5, 2.5, 4.0], dtype=torch.float64)


def ranges(data):
    """Points in ranges that overlap: most categories are impossible at most points."""
    shares = pyro.sample("shares", dist.Dirichlet(torch.tensor([1.0, 0.5, 2.0])))
    with pyro.plate("points", len(data)):
        z = pyro.sample("z", dist.Categorical(shares))
        pyro.sample("y", dist.Uniform(LOWER[z], UPPER[z]), obs=data)


def ranges_truth(data):
    states = torch.cartesian_prod(*[torch.arange(3)] * len(data))
    inside = ((data >= LOWER[states]) & (data <= UPPER[states])).all(-1)
    counts = torch.stack([(states == k).sum(-1) for k in range(3)], -1)[inside]
    alpha = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    prior = torch.lgamma(alpha.sum()) - torch.lgamma(alpha.sum() + len(data))
    prior = prior + (torch.lgamma(alpha + counts) - torch.lgamma(alpha)).sum(-1)
    return (prior - (UPPER - LOWER).log()[states[inside]].sum(-1)).logsumexp(0)


def mean_by_row(data):
    """In each row an unknown mean, and two points that may belong to it."""
    with pyro.plate("rows", len(data), dim=-2):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("points", 2, dim=-1):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.7, 0.3])))
            pyro.sample("y", dist.Normal(mean * z, 0.7), obs=data)


def test_the_base_is_normalized_and_weights_do_not_depend_on_discrete_latents():
    found = problem(models.unknown_mean, POINTS)
    assert isinstance(found.base, ConditionalBase)
    grid = torch.linspace(-14.0, 14.0, 2001, dtype=torch.float64)
    states = models.cube(5).double()
    where = torch.cat(
        [
            grid.view(-1, 1, 1).expand(-1, 32, -1),
            states.expand(len(grid), -1, -1),
        ],
        dim=-1,
    )
    state = found.density(where.flatten(0, 1))
    total = state.log_base.logsumexp(0) + torch.tensor(28.0 / 2000).log()
    assert float(total) == pytest.approx(0.0, abs=1e-4)
    ratio = state.log_ratio().view(len(grid), 32)
    assert (ratio - ratio[:, :1]).abs().max() < 1e-8


def test_draws_follow_the_density_of_the_base():
    found = problem(models.unknown_mean, POINTS)
    torch.manual_seed(0)
    draws = found.draw(20_000)
    z = draws[:, 1:]
    assert bool(((z == 0.0) | (z == 1.0)).all())
    # given the mean, flags are on with odds of two normal densities
    mean = draws[:, :1]
    on = dist.Normal(mean, 0.7).log_prob(POINTS) - dist.Normal(0.0, 0.7).log_prob(POINTS)
    wanted = (on + torch.tensor(0.3 / 0.7).log()).sigmoid()
    for part in (mean[:, 0] > 1.5, mean[:, 0] <= 1.5):
        excess = (z - wanted)[part]
        assert (excess.mean(0).abs() < 4.5 * excess.std(0) / len(excess) ** 0.5 + 1e-9).all()
    # the pairs are uncorrelated beyond what the mean explains
    rest = z - wanted
    pairs = rest[:, 0] * rest[:, 4]
    assert abs(float(pairs.mean())) < 4.5 * float(pairs.std()) / 20_000**0.5


def exact_draws(count):
    """Draws from the posterior of ``unknown_mean`` on a grid."""
    grid = torch.linspace(-14.0, 14.0, 20_001, dtype=torch.float64)
    off = torch.tensor(0.7).log() + dist.Normal(0.0, 0.7).log_prob(POINTS)
    on = torch.tensor(0.3).log() + dist.Normal(grid.unsqueeze(-1), 0.7).log_prob(POINTS)
    each = torch.logaddexp(on, off.expand_as(on)).sum(-1)
    log_joint = dist.Normal(0.0, 2.0).log_prob(grid) + each
    index = torch.multinomial(log_joint.softmax(0), count, replacement=True)
    flags = torch.bernoulli((on[index] - off).sigmoid())
    return {"mean": grid[index], "z": flags}


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")
@pytest.mark.parametrize(
    "prior_weight", [0.0, pytest.param(0.6, marks=pytest.mark.slow)], ids=["fit", "and prior"]
)
def test_both_identities_hold(prior_weight):
    count = 3000
    annealed = AnnealedImportance(
        models.unknown_mean,
        "auto",
        num_chains=count,
        num_steps=4,
        prior_weight=prior_weight,
        resampling=False,
        cross_check=False,
        compile=False,
        progress_bar=False,
        seed=2,
    )
    truth = models.unknown_mean_truth(POINTS)
    forward = (annealed.run(POINTS).log_weights - truth).exp()
    torch.manual_seed(4)
    run = annealed.run_reverse(exact_draws(count), POINTS, exact=True)
    back = (truth - run.log_weights).exp()
    # of the prior's share, which reaches far beyond the posterior, 1 / w has no variance
    for ratio in (forward, back) if prior_weight == 0.0 else (forward,):
        error = float(ratio.std()) / count**0.5
        assert error < 0.05
        assert abs(float(ratio.mean()) - 1.0) < 4.5 * error + 1e-3


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")
def test_states_without_density_are_never_drawn():
    found = problem(ranges, POINTS)
    assert isinstance(found.base, ConditionalBase)
    torch.manual_seed(0)
    state = found.density(found.draw(200))
    assert bool(state.log_ratio().isfinite().all())
    run = log_evidence(ranges, POINTS, progress_bar=False, seed=0)
    assert abs(float(run.lower - ranges_truth(POINTS))) < 4.5 * float(run.std_error) + 5e-3
    assert float(run.std_error) < 0.05


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")
def test_rows_of_a_batch_have_bases_of_their_own():
    data = torch.tensor([[-1.0, 0.4], [4.0, 4.2], [0.1, 6.0]], dtype=torch.float64)
    run = AnnealedImportance(
        mean_by_row,
        "auto",
        num_chains=64,
        num_steps=16,
        compile=False,
        progress_bar=False,
        seed=0,
    ).run(data)
    assert any("summed out, and draws them" in note for note in run.notes)
    grid = torch.linspace(-14.0, 14.0, 4001, dtype=torch.float64).view(-1, 1, 1)
    shares = torch.tensor([0.7, 0.3], dtype=torch.float64).log()
    each = torch.logaddexp(
        shares[0] + dist.Normal(0.0, 0.7).log_prob(data),
        shares[1] + dist.Normal(grid, 0.7).log_prob(data),
    )
    log_joint = each.sum(-1) + dist.Normal(0.0, 2.0).log_prob(grid[..., 0])
    truth = log_joint.logsumexp(0) + torch.tensor(28.0 / 4000).log()
    assert run.lower.shape == (3,)
    assert ((run.lower - truth).abs() < 4.5 * run.std_error + 5e-3).all()
    assert (run.std_error < 0.1).all()


@pytest.mark.parametrize(
    ("model", "args"),
    [
        (models.sequence, (POINTS,)),  # neighbours meet
        (models.potts_by_index, (POINTS,)),  # not to be summed out
        (models.counted, (POINTS.round().abs(),)),  # without an end
        (models.mixture, (POINTS,)),  # nothing else to fit
    ],
    ids=["Markov chain", "coupled", "counts", "alone"],
)
def test_elsewhere_chains_start_from_the_prior_and_a_note_says_so(model, args):
    found = problem(model, *args)
    assert not isinstance(found.base, ConditionalBase)
    assert any("chains start from the prior" in note for note in found.layout.notes)


def coupled_beyond(y):
    """Two indicators that meet only where a coordinate is beyond what the prior draws."""
    c = pyro.sample("c", dist.Normal(0.0, 1.0))
    a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.4)))
    b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.3)))
    pyro.factor("pair", 8.0 * (c - 2.3).relu() * a * b)
    pyro.sample("y", dist.Normal(c.abs(), 0.15), obs=y)


def test_latents_that_meet_where_the_prior_seldom_is_have_no_such_start():
    found = problem(coupled_beyond, torch.tensor(2.9))
    assert not isinstance(found.base, ConditionalBase)
    assert any("chains start from the prior" in note for note in found.layout.notes)


def coupled_nowhere_near(y):
    """Two indicators whose coupling no draw of the prior or of a fit reaches."""
    c = pyro.sample("c", dist.Normal(0.0, 1.0))
    a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.4)))
    b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.3)))
    pyro.factor("pair", 8.0 * (c - 40.0).relu() * a * b)
    pyro.sample("y", dist.Normal(c, 0.5), obs=y)


def test_shapes_tell_which_latents_meet_in_a_factor_whatever_its_value():
    found = problem(coupled_nowhere_near, torch.tensor(0.5))
    assert found.model.shared_factor(found.model.evaluate(found.probe()).values) == "pair"
    assert not isinstance(found.base, ConditionalBase)


def test_latents_that_meet_in_no_factor_share_none():
    found = problem(ranges, POINTS)
    assert found.model.shared_factor(found.model.evaluate(found.probe()).values) is None
    assert isinstance(found.base, ConditionalBase)
