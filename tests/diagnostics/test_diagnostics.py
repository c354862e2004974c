import dataclasses
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from perfect_chains import LinearGaussian, make_run, make_sandwich, simulate

from pyro_anneal import HMC, AnnealedImportance, Linear, Pilot
from pyro_anneal.chains.resampling import lineage_memory
from pyro_anneal.diagnostics import (
    AnnealingWarning,
    Diagnostic,
    check_acceptance,
    check_agreement,
    check_certified,
    check_divergences,
    check_dominance,
    check_gap,
    check_lineages,
    check_pilot,
    check_weights,
    check_zero_weights,
    diagnose,
    diagnose_sandwich,
    diagnose_starts,
    warn,
)
from pyro_anneal.kernels import Info

S = [1.8, 0.6]


@pytest.fixture
def problem():
    return simulate(S, (40,))[0]


@pytest.fixture
def run(problem):
    return make_run(problem, num_chains=16, num_steps=100)


def _replaced(run, **changes):
    return dataclasses.replace(run, **changes)


@pytest.mark.parametrize("num_chains", [1, 2, 4, 16, 100])
def test_easy_runs_stay_unflagged(problem, num_chains):
    assert diagnose(make_run(problem, num_chains=num_chains, num_steps=200)) == ()


@pytest.mark.parametrize("batch", [(), (40,), (3, 20)])
def test_easy_sandwiches_stay_unflagged(batch):
    assert diagnose_sandwich(make_sandwich(S, batch, num_steps=200)[0]) == ()


def test_few_lineages(run):
    own = torch.arange(16).unsqueeze(1).expand(16, 40)
    populations = {"population_size": 8, "num_resamplings": torch.zeros(2, 40, dtype=torch.long)}
    even = _replaced(run, ancestors=own, **populations)
    assert check_lineages(run) is None  # nothing is resampled
    assert check_lineages(even) is None
    assert torch.equal(even.num_lineages, torch.full((40,), 16))
    descend = own.clone()
    descend[:, 3] = 5  # all from one
    descend[:, 4] = torch.arange(16) // 8 * 8  # one per population
    found = check_lineages(_replaced(even, ancestors=descend))
    assert (found.name, found.severity, found.value) == ("lineages", "warning", 1.0)
    assert "as few as 1 of those at the start for 5% of the batch" in found.message
    small = _replaced(even, ancestors=descend, population_size=4)
    assert check_lineages(small) is None
    memory = torch.zeros(1, 40)
    mixed = _replaced(even, ancestors=descend, lineage_memory=memory)
    assert check_lineages(mixed) is None  # few, but their descendants are everywhere
    memory = torch.full((1, 40), 0.9)
    apart = _replaced(even, ancestors=descend, lineage_memory=memory)
    assert check_lineages(apart).message == found.message


def test_resampled_chains_of_few_lineages_have_a_large_error(run):
    """Weights are even after resampling; the standard error over lineages is not."""
    own = torch.arange(16).unsqueeze(1).expand(16, 40).clone()
    populations = {"population_size": 8, "num_resamplings": torch.zeros(2, 40, dtype=torch.long)}
    even = _replaced(run, ancestors=own, **populations)
    assert check_weights(even) is None
    own[:, :10] = torch.arange(16).unsqueeze(1) // 8 * 8  # one ancestor per population
    found = check_weights(_replaced(even, ancestors=own))
    assert found.value == pytest.approx(10 / 40)
    assert "standard error up to" in found.message


def test_resampled_chains_whose_standard_error_is_a_quarter_of_a_nat_are_flagged():
    """Forty Gaussians from their prior ended .76 nats low at a standard error of .4986, unflagged."""
    levels = (torch.arange(16, dtype=torch.float64) + 0.5) / 16
    weights = (1.1 * torch.special.ndtri(levels))[[*range(0, 16, 2), *range(1, 16, 2)]]
    for batch in (1, 40):
        run = make_run(simulate(S, (batch,))[0], num_chains=16, num_steps=100)
        uneven = _replaced(run, log_weights=weights.unsqueeze(1).expand(16, batch))
        assert float(uneven.ess.min()) > 16 / 3
        assert check_weights(uneven) is None
        own = torch.arange(16).unsqueeze(1).expand(16, batch)
        counts = torch.ones(2, batch, dtype=torch.long)
        resampled = _replaced(uneven, ancestors=own, population_size=8, num_resamplings=counts)
        assert 0.25 < float(resampled.std_error.max()) < 0.5
        found = check_weights(resampled)
        assert (found is None) if batch > 1 else (found.value == 1.0)


@pytest.mark.parametrize(("spread", "least", "most"), [(0.0, 0.0, 0.35), (20.0, 0.9, 1.0)])
def test_memory_tells_lineages_that_stayed_apart(spread, least, most):
    """Ends of 64 chains of 6 lineages, of one mode or of a mode each; one coordinate tells."""
    generator = torch.Generator().manual_seed(0)
    ancestors = torch.randint(6, (64, 500), generator=generator) * 7
    position = torch.randn(64, 500, 10, generator=generator)
    position[..., 3] += spread * ancestors
    memory = lineage_memory(position, ancestors)
    assert memory.shape == (500,)
    assert float(memory.min()) >= least
    assert float(memory.max()) <= most
    alone, one = torch.arange(64).unsqueeze(1).expand(64, 500), torch.zeros_like(ancestors)
    assert float(lineage_memory(position, alone).max()) == 0.0
    assert float(lineage_memory(position, one).min()) == 1.0


def test_collapsed_weights(problem):
    run = make_run(problem, num_chains=16, num_steps=200)
    log_weights = run.log_weights.clone()
    log_weights[3, :10] += 20.0
    finding = check_weights(_replaced(run, log_weights=log_weights))
    assert finding.name == "ess"
    assert finding.value == pytest.approx(10 / 40)
    assert "for 25% of the batch" in finding.message
    assert "down to 1.0 of 16" in finding.message


def test_no_share_of_a_few_reads_as_none():
    problem, _ = simulate([1.0], (600,))
    run = make_run(problem, num_chains=16, num_steps=5)
    log_weights = torch.zeros_like(run.log_weights)
    log_weights[3, 0] = 20.0
    finding = check_dominance(_replaced(run, log_weights=log_weights))
    assert "for 0.17% of the batch" in finding.message


def test_collapse_in_reverse_is_that_of_the_inverse_weights(problem):
    run = make_run(problem, num_steps=200, start=problem.draw(1.0, 1)[0])
    log_weights = run.log_weights.clone()
    log_weights[3] += 20.0  # a large weight is harmless in reverse
    assert check_weights(_replaced(run, log_weights=log_weights)) is None
    log_weights[3] -= 40.0
    assert check_weights(_replaced(run, log_weights=log_weights)).value == 1.0


def test_many_chains_can_collapse_without_one_in_front():
    log_weights = torch.full((1000,), -30.0)
    log_weights[:50] = 0.0
    run = make_run(simulate(S)[0], log_weights=log_weights)
    assert check_weights(run).value == 1.0  # ESS 50 of 1000
    assert check_weights(run, min_fraction=0.04) is None


def _with_ess(num_chains, ess):
    """One-datum weights of which ``ess`` are equal and the rest zero."""
    log_weights = torch.full((num_chains,), -50.0)
    log_weights[:ess] = 0.0
    return make_run(simulate(S)[0], log_weights=log_weights)


@pytest.mark.parametrize(
    ("num_chains", "least"), [(8, 3), (16, 6), (32, 11), (64, 22), (100, 22), (1000, 100)]
)
def test_bounds_that_rest_on_few_chains(num_chains, least):
    """Below a third of K, of 64 at most, or below a tenth."""
    assert check_weights(_with_ess(num_chains, least)) is None
    finding = check_weights(_with_ess(num_chains, least - 1))
    assert f"down to {least - 1:.1f} of {num_chains}, so that few chains decide" in finding.message


def test_a_few_rows_of_few_chains_pass(problem):
    run = make_run(problem, num_chains=16, num_steps=200)
    log_weights = torch.zeros_like(run.log_weights)
    log_weights[4:, :4] = -50.0  # ESS 4 of 16 in a tenth of the rows
    assert check_weights(_replaced(run, log_weights=log_weights)) is None
    log_weights[4:, :5] = -50.0
    assert check_weights(_replaced(run, log_weights=log_weights)).value == pytest.approx(5 / 40)


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")
@pytest.mark.parametrize("seed", [0, 2])
def test_too_few_steps_from_the_prior_are_flagged(seed):
    """Evidence -11.355; 16 chains of 10 steps end up to several nats away from it."""

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(8), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.2).to_event(1), obs=x)

    ais = AnnealedImportance(
        model, num_chains=16, num_steps=10, seed=seed, resampling=False, progress_bar=False
    )
    run = ais.run(torch.ones(8))
    assert "ess" in {found.name for found in run.diagnostics}
    assert abs(float(run.lower) + 11.355) > 0.5


def test_one_chain_that_dominates(problem):
    run = make_run(problem, num_chains=16, num_steps=200)
    log_weights = run.log_weights.clone()
    log_weights[3, :10] += 20.0
    finding = check_dominance(_replaced(run, log_weights=log_weights))
    assert finding.name == "dominance"
    assert finding.value > 0.99
    assert (
        "one of 16 chains holds up to 100% of the weight for 25% of the batch" in finding.message
    )
    assert check_dominance(run) is None


def test_dominance_without_a_collapse():
    # one weight of 60%, the rest equal: ESS 2.75 of 20, above a tenth, below a third
    weights = torch.cat([torch.tensor([0.6]), torch.full((19,), 0.4 / 19)])
    run = make_run(simulate(S)[0], log_weights=weights.log())
    assert float(run.largest_weight) == pytest.approx(0.6)
    assert check_dominance(run).value == pytest.approx(0.6)
    assert check_weights(run, few=0.1) is None
    assert check_dominance(run, max_weight=0.61) is None


def test_two_chains_that_differ_by_nats(problem):
    """Two chains cannot fall below a tenth of two; their spread tells."""
    run = make_run(LinearGaussian(problem.s, problem.x[0]), num_chains=2, num_steps=200)
    assert check_weights(run) is None
    log_weights = torch.tensor([-4.0, -7.0])  # variance 4.5, above log 10
    finding = check_weights(_replaced(run, log_weights=log_weights))
    assert "the weights differ too much: effective sample size" in finding.message


@pytest.mark.parametrize(("dead", "severity"), [(1, "info"), (100, "warning")])
def test_chains_of_zero_weight(run, dead, severity):
    log_weights = run.log_weights.clone()
    log_weights.view(-1)[: dead * 5 : 5] = -math.inf
    finding = check_zero_weights(_replaced(run, log_weights=log_weights))
    assert (finding.name, finding.severity) == ("zero_weights", severity)
    assert finding.value == pytest.approx(dead / 640)


def test_a_datum_without_any_weight_is_a_warning_at_any_share(run):
    log_weights = run.log_weights.clone()
    log_weights[:, 7] = -math.inf
    finding = check_zero_weights(_replaced(run, log_weights=log_weights))
    assert finding.severity == "warning"
    assert "all of them for some data" in finding.message


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_undefined_weights(run, value):
    log_weights = run.log_weights.clone()
    log_weights[0, 0] = value
    finding = check_zero_weights(_replaced(run, log_weights=log_weights))
    assert (finding.name, finding.severity) == ("undefined_weights", "warning")
    assert finding.value == pytest.approx(1 / 640)


@pytest.mark.parametrize("low", [0.02, math.nan])
def test_chains_that_do_not_move(run, low):
    accept_prob = run.accept_prob.clone()
    accept_prob[:9] = low
    assert check_acceptance(_replaced(run, accept_prob=accept_prob)) is None  # 9 of 99
    accept_prob[:20] = low
    finding = check_acceptance(_replaced(run, accept_prob=accept_prob))
    assert finding.value == pytest.approx(20 / 99)
    assert "between 0.01 and 0.2" in finding.message


def test_chains_that_take_tiny_steps(run):
    accept_prob = torch.full((99,), 0.999)
    assert check_acceptance(_replaced(run, accept_prob=accept_prob)) is None  # a Gibbs kernel
    finding = check_acceptance(_replaced(run, accept_prob=accept_prob, target_accept=0.8))
    assert finding.name == "acceptance"
    assert "above 0.99 at 100% of the betas" in finding.message
    assert check_acceptance(_replaced(run, target_accept=0.8)) is None


def test_divergences_anywhere(run):
    num_diverging = torch.full((99,), 6)  # of 16 * 40 = 640 transitions each
    assert check_divergences(_replaced(run, num_diverging=num_diverging)) is None
    finding = check_divergences(_replaced(run, num_diverging=num_diverging + 1))
    assert finding.value == pytest.approx(7 / 640)


def test_divergences_in_a_tenth_of_the_path(run):
    num_diverging = torch.zeros(99, dtype=torch.long)
    num_diverging[90:] = 12  # of 640: 1.9 per cent
    assert check_divergences(_replaced(run, num_diverging=num_diverging)) is None
    num_diverging[90:] = 14
    finding = check_divergences(_replaced(run, num_diverging=num_diverging))
    assert finding.value == pytest.approx(9 * 14 / (99 * 640))
    assert "2.2% in the worst tenth" in finding.message


@pytest.mark.parametrize(
    ("length", "severity"), [(0.4, "info"), (0.6, "warning"), (None, "warning")]
)
def test_divergences_matter_where_chains_have_far_to_go(run, length, severity):
    pilot = None if length is None else dataclasses.replace(run.pilot, length=length)
    many = _replaced(run, num_diverging=torch.full((99,), 20), pilot=pilot)
    assert check_divergences(many).severity == severity


def test_few_divergences_of_few_transitions_prove_nothing(problem):
    short = make_run(problem, num_chains=1, num_steps=100)  # 40 transitions per step
    num_diverging = torch.zeros(99, dtype=torch.long)
    num_diverging[97] = 9  # of 360
    assert check_divergences(_replaced(short, num_diverging=num_diverging)) is None
    num_diverging[98] = 1
    assert check_divergences(_replaced(short, num_diverging=num_diverging)) is not None


def test_pilot_that_saw_other_regions(run):
    # a pilot whose acceptance ramps from 0.75 to 0.15, seen by a run at 0.75 throughout:
    # the ramp leaves the tolerance of 0.25 at beta = 0.25 / 0.6
    pilot = dataclasses.replace(
        run.pilot,
        betas=torch.tensor([0.0, 1.0]),
        accept_prob=torch.tensor([0.75, 0.15]),
        step_size=run.pilot.step_size[[0, -1]],
    )
    finding = check_pilot(_replaced(run, pilot=pilot))
    betas = run.betas[1:-1]
    assert finding.value == pytest.approx((betas > 0.25 / 0.6).double().mean().item())
    assert check_pilot(_replaced(run, pilot=pilot), tolerance=0.6) is None
    assert check_pilot(_replaced(run, pilot=None)) is None
    # the user's own step size: the pilot's acceptance speaks of another kernel
    assert check_pilot(_replaced(run, pilot=pilot, step_size=0.5 * run.step_size)) is None


def test_a_few_transitions_are_no_evidence_against_the_pilot(problem):
    x = problem.x[0]
    run = make_run(LinearGaussian(problem.s, x), num_chains=2, num_steps=40)
    noise = 0.75 + torch.where(torch.rand(39) < 0.5, -0.6, 0.25)  # single transitions
    assert check_pilot(_replaced(run, accept_prob=noise)) is None
    long = make_run(LinearGaussian(problem.s, x), num_chains=2, num_steps=400)
    noise = 0.75 + torch.where(torch.rand(399) < 0.3, -0.6, 0.25)  # 0.75 on average
    assert check_pilot(_replaced(long, accept_prob=noise)) is None
    finding = check_pilot(_replaced(long, accept_prob=torch.full((399,), 0.3)))
    assert finding.value == 1.0


def test_one_step_has_no_transitions_to_judge(problem):
    run = make_run(problem, num_chains=4, num_steps=1)
    assert check_acceptance(run) is check_divergences(run) is check_pilot(run) is None


def test_uncertified_reverse_run(problem):
    run = make_run(problem, start=problem.draw(1.0, 1)[0])
    assert check_certified(run) is None
    finding = check_certified(_replaced(run, certified=False))
    assert finding.severity == "warning"
    assert "certified=False" in finding.message


def test_wide_gap():
    sandwich, _ = make_sandwich([6.0, 2.0], (40,), num_chains=2, num_steps=4)
    finding = check_gap(sandwich)
    assert finding.value == pytest.approx(sandwich.gap.mean().item())
    assert finding.value > 1.0
    assert check_gap(sandwich, tolerance=finding.value + 0.1) is None
    assert "gap" in {d.name for d in diagnose_sandwich(sandwich)}


def test_crossed_bounds_of_one_pair():
    sandwich, _ = make_sandwich(S)
    threshold = 2 * math.log(2e6)

    def crossing(by):
        reverse = sandwich.reverse
        shift = -sandwich.gap - by
        return dataclasses.replace(
            sandwich, reverse=_replaced(reverse, log_weights=reverse.log_weights + shift)
        )

    assert check_agreement(crossing(threshold - 0.1)) is None  # chance cannot be excluded
    finding = check_agreement(crossing(threshold + 0.1))
    assert finding.value == pytest.approx(threshold + 0.1)


def test_crossed_bounds_on_average():
    # half a nat for every one of 400 pairs is no chance, though no single pair is suspect
    sandwich, _ = make_sandwich(S, (400,), num_steps=100)
    assert check_agreement(sandwich) is None
    reverse = _replaced(sandwich.reverse, log_weights=sandwich.reverse.log_weights - 0.5)
    finding = check_agreement(dataclasses.replace(sandwich, reverse=reverse))
    assert finding.severity == "warning"
    assert finding.value < 5.0


def test_starts_that_disagree():
    problem = LinearGaussian(torch.tensor(S), torch.tensor([2.4, -0.7]))
    run, other = make_run(problem, 500, 50), make_run(problem, 500, 50)
    assert diagnose_starts(run, other) is None
    # a base that found one of two equal modes: flawless weights, log 2 too few
    missed = _replaced(run, log_weights=run.log_weights - math.log(2.0))
    assert diagnose(missed) == ()
    finding = diagnose_starts(missed, other)
    assert (finding.name, finding.severity) == ("starts", "warning")
    assert "starting from the prior finds" in finding.message
    assert finding.value == pytest.approx(-math.log(2.0), abs=0.1)
    # the other way round the run in question is the better one
    finding = diagnose_starts(other, missed)
    assert finding.severity == "info"
    assert "starting from the guide finds" in finding.message


def test_starts_that_differ_by_noise_agree():
    problem = LinearGaussian(torch.tensor([3.0, 1.0]), torch.tensor([2.4, -0.7]))
    flagged = 0
    for _ in range(30):
        run, other = make_run(problem, 20, 5), make_run(problem, 20, 5)
        flagged += diagnose_starts(run, other) is not None
    assert flagged == 0


def test_warnings_are_given_once_per_kind():
    def finding(name, severity="warning", message="m"):
        return Diagnostic(name=name, severity=severity, message=message, value=0.0)

    with pytest.warns(AnnealingWarning) as caught:
        warn([finding("ess"), finding("gap"), finding("ess"), finding("x", "info")])
    assert len(caught) == 2
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn([finding("x", "info")])


def test_a_sandwich_names_each_kind_once():
    sandwich, _ = make_sandwich(S, (10,), num_steps=200)
    low = torch.full((199,), 0.01)
    both = dataclasses.replace(
        sandwich,
        forward=_replaced(sandwich.forward, accept_prob=low),
        reverse=_replaced(sandwich.reverse, accept_prob=low, certified=False),
    )
    names = [d.name for d in diagnose_sandwich(both)]
    assert sorted(names) == ["acceptance", "pilot", "uncertified"]


# --- the same through AnnealedImportance: what provokes each warning, and an easy problem ---


def _located(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def _rows(x):
    with pyro.plate("data", len(x)):
        _located(x)


def _narrow(x):  # the posterior is a thousandth of the prior
    z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 1e-3).to_event(1), obs=x)


def _ais(model=_located, **options):
    options = {"num_chains": 16, "num_steps": 100, "progress_bar": False, "seed": 0} | options
    return AnnealedImportance(model, **options)


X = torch.tensor(0.8)


def test_an_easy_run_and_an_easy_sandwich_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _ais().run(X).diagnostics == ()
        assert _ais().sandwich(X).diagnostics == ()
        exact = 0.64 + math.sqrt(0.2) * torch.randn(16)
        assert _ais().run_reverse({"z": exact}, X, exact=True).diagnostics == ()


PROVOKED = {
    "ess": lambda: _ais(_narrow, num_steps=2, schedule=Linear()).run(torch.ones(4)),
    "dominance": lambda: _ais(_narrow, num_steps=2, schedule=Linear()).run(torch.ones(4)),
    "acceptance": lambda: _ais(step_size=50.0).run(X),
    "divergences": lambda: _ais(_narrow, step_size=1.0).run(torch.ones(4)),
    "gap": lambda: _ais(_narrow, num_steps=2).sandwich(torch.ones(4)),
    "uncertified": lambda: _ais().run_reverse({"z": torch.randn(16)}, X),
    # a pilot of one stage: it never saw the way from the prior to the posterior
    "pilot": lambda: _ais(_narrow, pilot=Pilot(num_chains=4, num_moves=1, max_stages=1)).run(
        torch.ones(4)
    ),
    # a move that keeps no density, with a reversal that does
    "agreement": lambda: _ais(
        _rows, kernel=_ToTheMode(), num_steps=40, schedule=Linear(), step_size=0.5
    ).sandwich(torch.ones(40)),
}


@dataclasses.dataclass(frozen=True)
class _ToTheMode:
    target_accept: float | None = None
    num_gradients: int = 1

    def noise(self, state, generator):
        return (torch.zeros_like(state.log_base),)

    def step(self, state, density, beta, tuning, noise):
        new = density(state.position + 0.2 * state.grad_target)  # of _rows: to the mode
        accepted = torch.ones_like(state.log_base)
        return new, Info(accept_prob=accepted, diverging=accepted == 0.0)

    def reversal(self):
        return HMC()


@pytest.mark.parametrize("name", PROVOKED)
def test_each_failure_gives_its_warning(name):
    with pytest.warns(AnnealingWarning) as caught:
        result = PROVOKED[name]()
    (finding,) = [d for d in result.diagnostics if d.name == name]
    assert finding.severity == "warning"
    assert [str(w.message) for w in caught].count(finding.message) == 1
