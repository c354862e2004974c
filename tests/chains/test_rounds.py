"""Rounds that measure: their guarantees, when they stop, and what they leave."""

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from test_gap_law import WEIGHTS

from pyro_anneal import HMC, AnnealedImportance, AnnealedRun, Linear, bounds, log_evidence
from pyro_anneal.chains.rounds import Goal, first_steps
from pyro_anneal.diagnostics import checks as diagnostics

QUIET = {"progress_bar": False, "compile": False}


def linear_vae(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(10), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ WEIGHTS.T, 1.0).to_event(1), obs=x)


def far_from_the_prior(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 5.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)


def near_the_posterior(x):
    pyro.sample("z", dist.Normal(0.9 * x, 0.6).to_event(1))


X = torch.tensor([1.0, -2.0, 3.0])
LOG_EVIDENCE = float(dist.Normal(0.0, math.sqrt(25.25)).log_prob(X).sum())


def count_steps(goal, errors, *, sound=True):
    now, steps = goal.first(errors(goal.first_steps)), []
    while now is not None:
        steps.append(now.num_steps)
        now = goal.after(now, errors(now.num_steps), sound=sound)
    return steps


@pytest.mark.parametrize("target", [0.3, 0.02, 0.001])
@pytest.mark.parametrize("power", [0.3, 0.5, 1.0])
def test_all_rounds_cost_at_most_twice_the_last(power, target):
    steps = count_steps(Goal(target, 12, 16), lambda count: 0.5 * (16 / count) ** power)
    assert sum(steps) <= 2 * steps[-1]
    assert steps[-1] <= 16 * 2**11
    assert 0.5 * (16 / steps[-1]) ** power <= target or steps[-1] == 16 * 2**11


def test_a_round_that_is_not_to_be_believed_is_never_the_last_but_one():
    steps = count_steps(Goal(0.02, 5, 16), lambda count: 0.001, sound=False)
    assert steps == [16, 32, 64, 128, 256]
    assert count_steps(Goal(0.02, 5, 16), lambda count: math.nan) == [16, 64, 256]
    assert count_steps(Goal(0.02, 5, 16), lambda count: 0.001) == [16]


def test_a_round_that_costs_too_much_is_not_begun():
    far = lambda count: 1.0
    assert count_steps(Goal(0.02, 8, 16, most_steps=16 * 128), far) == [16, 64, 256, 1024, 2048]
    assert count_steps(Goal(0.02, 8, 16, most_steps=300), far) == [16, 64, 256]
    assert count_steps(Goal(0.02, 8, 16, most_steps=700), far) == [16, 64, 256, 512]
    assert count_steps(Goal(0.02, 8, 16, most_steps=16), far) == [16]
    last = Goal(0.02, 8, 16, most_steps=31).first(1.0)
    assert (last.is_last, last.look) == (True, 1)  # so it may be reported, at the first look


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")
def test_the_default_spares_rounds_of_many_operations(monkeypatch):
    monkeypatch.setattr("pyro_anneal.runs.rounds._MOST_WORK", 3000.0)
    options = {"seed": 0, "guide": None, "num_chains": 2, "progress_bar": False}
    run = log_evidence(far_from_the_prior, X, **options)
    assert len(run.rounds) == 1  # two chains of 32 steps with tens of operations each
    assert run.measured_gap > 0.02
    assert "target" in [finding.name for finding in run.diagnostics]
    asked = log_evidence(far_from_the_prior, X, target_gap=0.02, **options)
    assert len(asked.rounds) > 1  # a target that was asked for is gone after


def test_long_paths_begin_with_more_steps():
    assert [first_steps(length) for length in (0.0, 4.0, 5.0, 100.0)] == [16, 16, 32, 64]


def test_more_chains_cost_what_more_steps_would():
    goal = Goal(0.01, 6, 16)
    now, work = goal.first(1.0), []
    while now is not None:
        work.append(now.num_steps * now.growth)
        assert now.num_steps == (16 if now.number < 3 else 16 * 4)
        now = goal.after(now, 0.1, sound=True, stalls=now.number != 2)
    assert work == [16, 64, 256, 512]  # the last is 16 * 2^5 in all


def test_the_interval_survives_every_rule_of_stopping():
    """A rule that stops at whatever overstates: weights that make Markov's inequality tight."""
    generator = torch.Generator().manual_seed(0)
    alpha, repetitions, rounds = 0.2, 20_000, 6
    fails = {"looks": 0.0, "none": 0.0}
    for name in fails:
        failed = torch.zeros(repetitions, dtype=torch.bool)
        for look in range(1, rounds + 1):
            level = bounds.level_of_look(1 - alpha, look if name == "looks" else 0)
            # w = c with probability 1 / c, else 0: E[w] = 1, and c just beyond the limit's margin
            height = 1.0001 / (1 - level)
            hit = torch.rand(repetitions, 1, generator=generator).T < 1 / height
            log_weights = torch.where(hit, math.log(height), -math.inf)
            failed |= bounds.limit_of_blocks(log_weights, level) > 0.0
        fails[name] = float(failed.double().mean())
    error = math.sqrt(alpha / repetitions)
    assert fails["looks"] <= alpha + 4 * error
    assert fails["looks"] > 0.8 * (alpha * (1 - 0.5**rounds) - 0.03)  # the test has teeth
    assert fails["none"] > 2 * alpha


@pytest.mark.parametrize("sigma", [0.2, 1.0, 2.5])
def test_the_interval_covers_where_the_error_decides(sigma):
    """Log-normal weights, whose low standard errors go with low evidence."""
    generator = torch.Generator().manual_seed(1)
    covered, repetitions, goal = 0, 400, Goal(0.05, 5, 16)
    for _ in range(repetitions):
        now, look = goal.first(math.inf), 0
        while now is not None:
            spread = sigma * math.sqrt(16 / now.num_steps)
            noise = torch.randn(16, generator=generator, dtype=torch.float64)
            log_weights = spread * noise - 0.5 * spread**2
            error = float(log_weights.softmax(0).mul(16).std()) / 4
            look, now = now.look, goal.after(now, error, sound=True)
        level = bounds.level_of_look(0.5, look)
        covered += bool(
            bounds.limit_of_blocks(log_weights.view(4, 4).logsumexp(1) - math.log(4), level) <= 0
        )
    assert covered >= repetitions * 0.5


def test_rounds_stop_at_the_target_and_leave_their_runs():
    ais = AnnealedImportance(far_from_the_prior, num_chains=32, target_gap=0.1, seed=0, **QUIET)
    told = dict(vars(ais))
    run = ais.run(X)
    assert float(run.std_error) == pytest.approx(run.measured_gap, rel=1e-6)
    assert run.measured_gap <= run.target_gap == 0.1
    assert [each.num_steps for each in run.rounds] == sorted({r.num_steps for r in run.rounds})
    assert len(run.rounds) >= 2
    assert torch.equal(run.rounds[-1].log_weights, run.log_weights)
    assert all(each.posterior == {} and each.rounds == () for each in run.rounds)
    assert run.posterior["z"].shape == (32, 3)
    assert run.num_looks >= 1
    assert sum(each.num_steps for each in run.rounds) <= 2 * run.num_steps
    streams = [each.log_weights for each in run.rounds]
    assert not any(torch.equal(a, b) for a in streams for b in streams if a is not b)
    assert abs(float(run.lower) - LOG_EVIDENCE) < 5 * float(run.std_error)
    own = run.rounds[-1].interval(0.9)[0]
    assert run.interval(0.9)[0] < own  # what the look costs
    assert torch.equal(
        run.interval(0.9)[0], run.rounds[-1].interval(1 - 0.1 / 2**run.num_looks)[0]
    )
    assert "rounds (target 0.1)" in repr(run)
    assert vars(ais) == told


@pytest.mark.slow
def test_a_better_start_takes_fewer_steps_and_a_nearer_target_more():
    steps = {
        (guide, target): AnnealedImportance(
            far_from_the_prior, guide, target_gap=target, seed=0, **QUIET
        )
        .run(X)
        .num_steps
        for guide, target in ((None, 0.2), (None, 0.1), (near_the_posterior, 0.1))
    }
    assert steps[near_the_posterior, 0.1] < steps[None, 0.1]
    assert steps[None, 0.2] < steps[None, 0.1]


def two_far_modes():
    weights, loc = torch.tensor([0.5, 0.5]), torch.tensor([-6.0, 6.0])
    z = pyro.sample("z", dist.Normal(0.0, 6.0))
    modes = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(loc, 1.0))
    pyro.factor("modes", modes.log_prob(z) - dist.Normal(0.0, 6.0).log_prob(z))


def mostly_one_of_them():
    weights, loc = torch.tensor([0.8, 0.2]), torch.tensor([-6.0, 6.0])
    pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(loc, 1.2)))


def test_rounds_take_more_chains_where_steps_do_not_help():
    """No chain crosses: each weight is .5 / .8 or .5 / .2, of variance .5625 whatever T is."""
    options = {"num_chains": 32, "target_gap": 0.05, "cross_check": False, "seed": 0, **QUIET}
    run = AnnealedImportance(two_far_modes, mostly_one_of_them, **options).run()
    chains = [each.num_chains for each in run.rounds]
    steps = [each.num_steps for each in run.rounds]
    assert chains[0] == 32
    assert chains[-1] == run.num_chains == len(run.posterior["z"]) > 100
    assert steps[-1] < 1024
    assert float(run.std_error) == pytest.approx(math.sqrt(0.5625 / run.num_chains), rel=0.2)
    assert float(run.std_error) <= 0.05
    assert abs(float(run.lower)) < 5.0 * float(run.std_error)


def lopsided(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Gamma(torch.tensor(2.0), 1.0))
        pyro.sample("x", dist.Normal(z, 1.5), obs=x)


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")
def test_every_round_keeps_both_identities():
    ais = AnnealedImportance(
        lopsided, num_chains=2, target_gap=1e-6, max_rounds=3, kernel=HMC(1), seed=3, **QUIET
    )
    sandwich = ais.sandwich(torch.zeros(3000))
    x = sandwich.simulated["x"].double()
    grid = torch.linspace(1e-4, 30.0, 6000, dtype=torch.float64).unsqueeze(1)
    log_joint = dist.Gamma(2.0, 1.0).log_prob(grid) + dist.Normal(grid, 1.5).log_prob(x)
    truth = log_joint.logsumexp(0) + math.log(float(grid[1] - grid[0]))
    assert len(sandwich.forward.rounds) == len(sandwich.reverse.rounds) == 2
    for run, back in zip(sandwich.forward.rounds, sandwich.reverse.rounds, strict=True):
        assert torch.equal(run.betas, back.betas)
        assert torch.equal(run.step_size, back.step_size)
        for ratio in ((run.lower - truth).exp(), (truth - back.upper).exp()):
            error = float(ratio.std()) / math.sqrt(len(ratio))
            assert error < 0.03
            assert abs(float(ratio.mean()) - 1.0) < 5 * error


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")
def test_a_target_out_of_reach_is_told():
    ais = AnnealedImportance(far_from_the_prior, target_gap=1e-4, max_rounds=2, seed=0, **QUIET)
    run = ais.run(X)
    remark = next(d for d in run.diagnostics if d.name == "target")
    assert remark.severity == "warning"
    near = diagnostics.check_target(replace(run, target_gap=0.9 * run.measured_gap))
    assert near.severity == "info"
    assert diagnostics.check_target(replace(run, target_gap=run.measured_gap)) is None
    assert "after 2 rounds" in remark.message
    assert remark.value == run.measured_gap > 1e-4


def test_rounds_go_on_from_a_checkpoint_and_into_files(tmp_path):
    path = tmp_path / "x.ckpt"
    options = {"target_gap": 0.3, "seed": 0, **QUIET}
    runs = [
        AnnealedImportance(far_from_the_prior, checkpoint=kept, **options).run(X)
        for kept in (None, path, path)
    ]
    for other in runs[1:]:
        assert torch.equal(other.log_weights, runs[0].log_weights)
        assert torch.equal(other.betas, runs[0].betas)
        for mine, theirs in zip(runs[0].rounds, other.rounds, strict=True):
            assert torch.equal(mine.log_weights, theirs.log_weights)
    runs[0].save(tmp_path / "x.npz")
    again = AnnealedRun.load(tmp_path / "x.npz")
    assert [r.num_steps for r in again.rounds] == [r.num_steps for r in runs[0].rounds]
    assert torch.equal(again.interval()[0], runs[0].interval()[0])


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")
def test_a_sandwich_reaches_its_gap_and_simulations_share_the_steps(tmp_path):
    options = {"num_chains": 4, "target_gap": 0.03, "kernel": HMC(1), "seed": 0, **QUIET}
    results = [
        AnnealedImportance(lopsided, checkpoint=kept, **options).sandwich(
            torch.zeros(30), num_simulations=2
        )
        for kept in (None, tmp_path / "x.ckpt", tmp_path / "x.ckpt")
    ]
    first = results[0]
    assert first.lower.shape == (2, 30)
    assert first.forward.measured_gap <= 0.03
    assert float(first.gap.mean()) < 0.03 + 5 * float(first.std_error["gap"])
    for other in results[1:]:
        assert torch.equal(other.lower, first.lower)
        assert torch.equal(other.upper, first.upper)
        assert len(other.forward.rounds) == len(first.forward.rounds)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")  # wide on purpose
def test_batches_share_the_steps_of_the_first(tmp_path):
    options = {"num_chains": 4, "target_gap": 0.6, "kernel": HMC(1), "seed": 0, **QUIET}
    batches = [torch.ones(3, 100), torch.zeros(2, 100)]
    results = [
        AnnealedImportance(linear_vae, checkpoint=kept, **options).run_batches(batches)
        for kept in (None, tmp_path / "x.ckpt", tmp_path / "x.ckpt")
    ]
    assert 16 <= results[0].num_steps < 1000
    assert results[0].num_gradients == results[0].num_steps  # 1 + L (T - 1), L = 1
    for other in results[1:]:
        assert other.num_steps == results[0].num_steps
        assert torch.equal(other.lower, results[0].lower)


def test_reverse_runs_have_rounds_too():
    generator = torch.Generator().manual_seed(4)
    shrink = 25.0 / 25.25
    noise = torch.randn(32, 3, generator=generator)
    samples = {"z": shrink * X + math.sqrt(0.25 * shrink) * noise}
    ais = AnnealedImportance(far_from_the_prior, target_gap=0.1, num_chains=32, seed=0, **QUIET)
    run = ais.run_reverse(samples, X, exact=True)
    assert run.rounds
    assert run.measured_gap <= 0.1
    assert abs(float(run.upper) - LOG_EVIDENCE) < 5 * float(run.std_error)


def test_a_cross_check_has_rounds_of_its_own(monkeypatch):
    others, compare = [], diagnostics.diagnose_starts
    monkeypatch.setattr(
        diagnostics,
        "diagnose_starts",
        lambda run, other, **names: others.append(other) or compare(run, other, **names),
    )
    run = AnnealedImportance(
        far_from_the_prior, near_the_posterior, target_gap=0.15, cross_check=True, seed=0, **QUIET
    ).run(X)
    assert others[0].num_steps > run.num_steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_gap": 0.0}, "target_gap must be positive"),
        ({"target_gap": 0.1, "num_steps": 10}, "either target_gap or num_steps"),
        ({"target_gap": 0.1, "schedule": Linear()}, "either target_gap or num_steps"),
        ({"target_gap": 0.1, "max_rounds": 0}, "max_rounds"),
    ],
)
def test_a_target_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        AnnealedImportance(linear_vae, **options)
