import dataclasses
import math
from statistics import NormalDist

import pytest
import torch
from perfect_chains import LinearGaussian, make_run, make_sandwich, simulate

from pyro_anneal import bounds
from pyro_anneal.diagnostics import Diagnostic
from pyro_anneal.results import Sandwich
from pyro_anneal.results.comparison import compare
from pyro_anneal.results.mutual_information import MutualInformation

S = [1.8, 0.6]
X = torch.tensor([2.4, -0.7])


def _within(value, truth, std_error):
    return bool(((value - truth).abs() < 5 * std_error).all())


# --- one run ----------------------------------------------------------------------------------


def test_forward_run_finds_the_evidence_per_datum():
    problem, _ = simulate(S, (4,))
    run = make_run(problem, num_chains=4000, num_steps=20)
    truth = problem.log_evidence
    assert run.lower.shape == (4,)
    assert (run.std_error < 0.02).all()
    assert _within(run.lower, truth, run.std_error)
    ti = run.thermodynamic_integration
    # the trapezoid on the curve's own means, computed apart from the chains' integrals
    assert (ti.std_error < 0.02).all()
    grid = torch.linspace(0, 1, 21).unsqueeze(-1)
    spread = 1 + grid * problem.s**2
    residual = (problem.x.unsqueeze(1) / spread) ** 2 + problem.s**2 / spread
    curve = -0.5 * (math.log(2 * math.pi) + residual).sum(-1)
    assert _within(ti.value, torch.trapezoid(curve, grid.squeeze(), dim=-1), ti.std_error)
    assert torch.equal(run.log_evidence, run.lower)


def test_std_error_is_that_of_repeated_runs():
    problem = LinearGaussian(torch.tensor(S), X.expand(3000, 2))
    run = make_run(problem, num_chains=50, num_steps=20)
    observed = run.lower.std().item()
    predicted = run.std_error.square().mean().sqrt().item()
    assert predicted == pytest.approx(observed, rel=0.1)
    ti = run.thermodynamic_integration
    assert ti.std_error.square().mean().sqrt().item() == pytest.approx(
        ti.value.std().item(), rel=0.1
    )


def test_one_chain_has_no_std_error():
    run = make_run(simulate(S)[0], num_chains=1)
    assert run.std_error.isnan()
    assert run.thermodynamic_integration.std_error.isnan()
    assert run.lower.item() == pytest.approx(run.log_weights.item())


def test_reverse_run_bounds_from_above():
    problem, z = simulate(S, (2000,))
    run = make_run(problem, num_chains=4, num_steps=5, start=z)
    assert torch.equal(run.upper, bounds.coupled_upper(run.log_weights))
    assert torch.equal(run.log_evidence, run.upper)
    excess = run.upper - problem.log_evidence
    assert excess.mean() > 5 * excess.std() / math.sqrt(2000)
    # chains that share their start say nothing about its variance
    assert run.std_error.isnan().all()
    independent = dataclasses.replace(run, independent_starts=True)
    assert independent.std_error.isfinite().all()


def test_directions_refuse_the_bound_they_cannot_give():
    problem, z = simulate(S)
    with pytest.raises(ValueError, match=r"no upper bound: use \.lower, or sandwich\(\)"):
        _ = make_run(problem).upper
    reverse = make_run(problem, start=z)
    with pytest.raises(ValueError, match=r"no lower bound: use \.upper"):
        _ = reverse.lower
    with pytest.raises(ValueError, match="resample a forward run"):
        reverse.resample(3)


def test_ess_of_a_reverse_run_is_that_of_the_inverse_weights():
    problem, z = simulate(S)
    weights = torch.tensor([1.0, 1.0, 1e-9]).log()
    forward = make_run(problem, num_chains=3, log_weights=weights)
    assert forward.ess.item() == pytest.approx(2.0)
    reverse = make_run(problem, num_chains=3, start=z, log_weights=weights)
    assert reverse.ess.item() == pytest.approx(1.0)


def test_a_common_scale_acts_outside_the_logarithm():
    run = make_run(simulate(S)[0], num_chains=3, log_weights=torch.tensor([1.0, 3.0, 8.0]).log())
    scaled = dataclasses.replace(run, scale=10.0)
    assert scaled.lower.item() == pytest.approx(10 * math.log(4.0))
    assert scaled.single.item() == pytest.approx(10 * math.log(24.0) / 3)
    assert scaled.std_error.item() == pytest.approx(10 * run.std_error.item())
    low, high = scaled.interval(0.9)
    assert low.item() == pytest.approx(10 * (math.log(4.0) - math.log(10.0)))
    assert high.item() == math.inf


def test_interval_of_a_run_is_one_sided_and_covers():
    problem = LinearGaussian(torch.tensor(S), X.expand(20_000, 2))
    run = make_run(problem, num_chains=2, num_steps=3)
    low, high = run.interval(0.8)
    torch.testing.assert_close(low, run.lower - math.log(5.0))
    assert (high == math.inf).all()
    assert (low > problem.log_evidence).double().mean().item() < 0.2
    total, _ = run.interval(0.8, total=True)
    assert total.item() == pytest.approx(run.lower.sum().item() - math.log(5.0))
    posterior = problem.draw(1.0, 1)[0]
    reverse = make_run(problem, num_chains=2, num_steps=3, start=posterior)
    low, high = reverse.interval(0.8)
    assert (low == -math.inf).all()
    assert (high < problem.log_evidence).double().mean().item() < 0.2


def test_interval_needs_a_level_and_a_certificate():
    problem, z = simulate(S)
    with pytest.raises(ValueError, match="level must lie strictly between 0 and 1, got 95"):
        make_run(problem).interval(95)
    uncertified = make_run(problem, start=z, certified=False)
    with pytest.raises(ValueError, match="not certified"):
        uncertified.interval()
    assert "certified=False" in repr(uncertified)


def test_plates_must_name_the_batch():
    problem, _ = simulate(S, (4,))
    with pytest.raises(ValueError, match=r"do not name the batch .* expected sizes \[4\]"):
        make_run(problem, plates={})


# --- resampling -------------------------------------------------------------------------------


def test_resampled_draws_follow_the_posterior_of_each_datum():
    problem, _ = simulate(S, (3,))
    run = make_run(problem, num_chains=20_000, num_steps=2)  # states at beta = 1/2, not 1
    draws = run.resample(20_000, seed=1)["z"]
    precision = 1 + problem.s**2
    mean = problem.s * problem.x / precision
    std_error = draws.std(0) / run.ess.sqrt().unsqueeze(-1)
    assert _within(draws.mean(0), mean, std_error)
    assert not _within(run.posterior["z"].mean(0), mean, std_error)  # the weights were needed
    torch.testing.assert_close(draws.var(0), (1 / precision).expand(3, 2), rtol=0.1, atol=0.0)


def test_resampling_places_the_plates_where_each_site_has_them():
    num_chains, rows, columns = 5, 3, 2
    log_weights = torch.randn(num_chains, rows, columns)
    chain = torch.arange(float(num_chains))
    shapes = {  # name: (value shape, plates of its leading dims)
        "plain": ((rows, columns), ("row", "column")),
        "swapped": ((columns, rows, 7), ("column", "row")),
        "gap": ((4, rows, 6, columns), ("inner", "row", None, "column")),
        "broadcast": ((rows, 1), ("row", "column")),
    }
    posterior = {
        name: chain.reshape(-1, *[1] * len(shape)).expand(num_chains, *shape).clone()
        for name, (shape, _) in shapes.items()
    }
    run = make_run(
        simulate(S)[0],
        log_weights=log_weights,
        log_evidence_ti=log_weights,
        plates={"row": rows, "column": columns},
        posterior=posterior,
        site_plates={name: plates for name, (_, plates) in shapes.items()},
    )
    draws = run.resample(11, seed=4)
    plain = draws["plain"]
    assert plain.shape == (11, rows, columns)
    assert len({tuple(plain[:, i, j].tolist()) for i in range(3) for j in range(2)}) > 1
    for n in range(11):
        for i in range(rows):
            for j in range(columns):
                k = plain[n, i, j]
                assert (draws["swapped"][n, j, i] == k).all()
                assert (draws["gap"][n, :, i, :, j] == k).all()
                assert draws["broadcast"][n, i, j] == k


def test_sites_outside_the_plates_are_kept_only_if_chains_agree():
    problem, _ = simulate(S, (3,))
    run = make_run(problem, num_chains=4)
    shared = torch.tensor([1.0, 2.0]).expand(4, 2)
    changed = dataclasses.replace(
        run,
        posterior={**run.posterior, "shared": shared, "pooled": torch.randn(4, 2)},
        site_plates={**run.site_plates, "shared": (), "pooled": (None,)},
    )
    draws = changed.resample(6)
    assert draws.keys() == {"z", "shared"}
    assert draws["shared"].tolist() == [[1.0, 2.0]] * 6


def test_resampling_repeats_with_its_seed():
    run = make_run(simulate(S, (3,))[0])
    first, second = (run.resample(9, seed=2)["z"] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, run.resample(9, seed=3)["z"])


# --- sandwich ---------------------------------------------------------------------------------


@pytest.fixture
def sandwich():
    return make_sandwich(S, (5, 200), num_chains=4, num_steps=10)


def test_sandwich_holds_the_table_of_bounds(sandwich):
    sandwich, problem = sandwich
    table = sandwich.bounds
    assert set(table) == {
        "IM lower", "IM upper", "CR lower", "CR upper", "single lower", "single upper",
    }  # fmt: skip
    assert sandwich.lower.shape == (5, 200)
    assert torch.equal(sandwich.lower, table["IM lower"])
    assert torch.equal(sandwich.upper, table["CR upper"])
    for name, bound in table.items():
        sign = 1 if name.endswith("lower") else -1
        excess = sign * (problem.log_evidence - bound)
        assert excess.mean() > 3 * excess.std() / math.sqrt(1000), name
    assert (table["single lower"] <= table["IM lower"]).all()
    assert (table["single upper"] >= table["CR upper"]).all()


def test_sandwich_bounds_keep_their_identities():
    # E[e^L] = Z and E[e^-U] = 1 / Z for each x, so the ratios average to one over pairs
    sandwich, problem = make_sandwich([0.9, 0.3], (40_000,), num_chains=3, num_steps=2)
    for name in ("IM lower", "CR lower", "IM upper", "CR upper"):
        sign = 1 if name.endswith("lower") else -1
        ratio = torch.exp(sign * (sandwich.bounds[name] - problem.log_evidence))
        std_error = (ratio.std() / math.sqrt(40_000)).item()
        assert std_error < 0.005, name
        assert abs(ratio.mean().item() - 1.0) < 5 * std_error, name


def test_sandwich_pairs_the_right_chains():
    problem, z = simulate(S)
    run, back = make_run(problem, num_chains=3), make_run(problem, num_chains=3, start=z)
    sandwich = Sandwich(
        forward=dataclasses.replace(run, log_weights=torch.tensor([2.0, 3.0, 4.0]).log()),
        reverse=dataclasses.replace(back, log_weights=torch.tensor([5.0, 8.0, 10.0]).log()),
        coupled_reverse=torch.tensor([16.0, 20.0]).log(),
    )
    expected = {
        "IM lower": 3.0,  # mean of 2, 3, 4
        "IM upper": 4.0,  # mean of 5, 3, 4
        "CR lower": 3 / (1 / 2 + 1 / 16 + 1 / 20),  # harmonic mean of 2, 16, 20
        "CR upper": 3 / (1 / 5 + 1 / 8 + 1 / 10),
        "single lower": 24.0 ** (1 / 3),
        "single upper": 400.0 ** (1 / 3),
    }
    assert {n: b.exp().item() for n, b in sandwich.bounds.items()} == pytest.approx(expected)
    ti = sandwich.thermodynamic_integration
    mean = torch.stack([run.log_evidence_ti.mean(), back.log_evidence_ti.mean()]).mean()
    assert ti.value.item() == pytest.approx(mean.item())
    assert ti.std_error.isnan()  # the reverse chains share their start


def test_standard_errors_come_from_pairs(sandwich):
    sandwich, problem = sandwich
    assert sandwich.num_pairs == 1000
    errors = sandwich.std_error
    expected = sandwich.gap.std().item() / math.sqrt(1000)
    assert errors["gap"].item() == pytest.approx(expected)
    for estimate in (sandwich.bennett, sandwich.thermodynamic_integration.value):
        difference = estimate - problem.log_evidence
        # both are consistent, not unbiased: compare with the half-width of the sandwich
        assert difference.mean().abs() < 0.25 * sandwich.gap.mean()
    single = make_sandwich(S)[0]
    assert all(error.isnan() for error in single.std_error.values())


def test_sandwich_interval_covers_and_is_tight_for_the_sum(sandwich):
    sandwich, problem = sandwich
    for name in ("IM lower", "single lower", "CR lower"):
        chosen = dataclasses.replace(sandwich, lower_bound=name)
        low, high = chosen.interval(0.8)
        outside = (low > problem.log_evidence) | (high < problem.log_evidence)
        assert outside.double().mean().item() < 0.2
    low, high = sandwich.interval(0.8, total=True)
    assert low.item() == pytest.approx(sandwich.lower.sum().item() - math.log(10.0))
    assert low < problem.log_evidence.sum() < high


def test_sandwich_chooses_its_bounds(sandwich):
    sandwich, _ = sandwich
    chosen = dataclasses.replace(sandwich, lower_bound="CR lower", upper_bound="IM upper")
    assert torch.equal(chosen.gap, sandwich.bounds["IM upper"] - sandwich.bounds["CR lower"])
    with pytest.raises(ValueError, match=r'no lower bound "IM upper" here: choose among'):
        dataclasses.replace(sandwich, lower_bound="IM upper")
    with pytest.raises(ValueError, match='no lower bound "CR lower" here'):
        dataclasses.replace(sandwich, coupled_reverse=None, lower_bound="CR lower")


def test_sandwich_checks_its_halves():
    problem, z = simulate(S, (3,))
    forward, reverse = make_run(problem), make_run(problem, start=z)
    with pytest.raises(ValueError, match="forward and a reverse run, got reverse and forward"):
        Sandwich(forward=reverse, reverse=forward)
    other, z = simulate(S, (4,))
    with pytest.raises(ValueError, match=r"share their batch, got \[3\] and \[4\]"):
        Sandwich(forward=forward, reverse=make_run(other, start=z))


# --- mutual information -----------------------------------------------------------------------


def test_mutual_information_brackets_the_truth():
    sandwich, _ = make_sandwich(S, (4000,), num_chains=2, num_steps=20)
    estimate = MutualInformation.from_sandwich(sandwich, notes=("the latent k is summed out",))
    truth = 0.5 * sum(math.log(1 + s**2) for s in S)
    assert estimate.num_pairs == 4000
    assert estimate.lower < estimate.upper
    assert estimate.lower < truth + 5 * estimate.lower_std_error
    assert estimate.upper > truth - 5 * estimate.upper_std_error
    assert estimate.upper - estimate.lower < 0.1
    low, high = estimate.normal_interval(0.95)
    assert low < truth < high
    z = NormalDist().inv_cdf(0.975)
    assert low == pytest.approx((estimate.lower - z * estimate.lower_std_error).item(), abs=1e-4)
    assert estimate.upper_interval(0.95)[1] == high
    assert estimate.terms["variational"] + estimate.terms["contrastive"] == pytest.approx(
        estimate.lower.item()
    )
    text = repr(estimate)
    assert "from 4000 pairs" in text
    assert "note: the latent k is summed out" in text


def test_mutual_information_needs_the_likelihood_of_the_pairs():
    sandwich, _ = make_sandwich(S, (3,))
    bare = dataclasses.replace(sandwich, true_log_likelihood=None)
    with pytest.raises(ValueError, match="no true_log_likelihood"):
        MutualInformation.from_sandwich(bare)


# --- comparison -------------------------------------------------------------------------------


def _models():
    x = torch.tensor([[2.4, -0.7], [-1.9, 0.2], [3.1, 0.4]])
    return {
        "weak": LinearGaussian(torch.tensor([0.2, 0.2]), x),
        "strong": LinearGaussian(torch.tensor(S), x),
        "wide": LinearGaussian(torch.tensor([3.0, 6.0]), x),
    }


def test_bayes_factors_of_known_models():
    models = _models()
    comparison = compare({n: make_run(m, 2000, 20) for n, m in models.items()})
    truth = {name: model.log_evidence.sum().item() for name, model in models.items()}
    assert list(comparison.names) == sorted(truth, key=truth.get, reverse=True)
    exact = torch.tensor([truth[name] for name in comparison.names])
    factors = exact.unsqueeze(1) - exact
    errors = comparison.bayes_factor_std_errors
    assert (errors.diagonal() == 0.0).all()
    assert errors.max() < 0.05
    off = ~torch.eye(3, dtype=torch.bool)
    assert _within(comparison.log_bayes_factors[off], factors[off], errors[off])
    probabilities = (exact - exact.logsumexp(0)).exp()
    torch.testing.assert_close(comparison.probabilities, probabilities, rtol=0.2, atol=1e-3)
    low, high = comparison.normal_interval(0.9)
    margin = NormalDist().inv_cdf(0.95) * errors
    torch.testing.assert_close(high - low, 2 * margin)
    text = repr(comparison)
    assert text.index("strong") < text.index("weak")
    assert "(asymptotic)" in text
    assert "(guaranteed)" not in text  # forward runs alone give none


def test_guaranteed_bayes_factors_need_certified_reverse_runs():
    models = _models()
    entries = {}
    for name, model in models.items():
        reverse = make_run(model, 500, 20, start=model.draw(1.0, 1)[0])
        entries[name] = (make_run(model, 500, 20), reverse)
    comparison = compare(entries)
    low, high = comparison.interval(0.9)
    exact = torch.stack([models[name].log_evidence.sum() for name in comparison.names])
    factors = exact.unsqueeze(1) - exact
    assert (low <= factors).all()
    assert (factors <= high).all()
    i, j, margin = 0, 2, 2 * math.log(40.0)
    expected = comparison.lower[i] - comparison.upper[j] - margin
    assert low[i, j].item() == pytest.approx(expected.item())
    assert "(guaranteed)" in repr(comparison)

    forward, reverse = entries["weak"]
    entries["weak"] = (forward, dataclasses.replace(reverse, certified=False))
    low, high = compare(entries).interval(0.9)
    weak = compare(entries).names.index("weak")
    others = [i for i in range(3) if i != weak]
    assert (high[weak, others] == math.inf).all()
    assert (low[others, weak] == -math.inf).all()
    assert low[weak, others].isfinite().all()


def test_comparison_refuses_what_speaks_of_other_data():
    sandwich, problem = make_sandwich(S)
    run = make_run(problem)
    with pytest.raises(TypeError, match=r'entry "b" is a Sandwich.* simulated data'):
        compare({"a": run, "b": sandwich})
    with pytest.raises(ValueError, match=r"entry \"a\" has directions \('reverse',\)"):
        compare({"a": sandwich.reverse})
    with pytest.raises(ValueError, match="at least one model"):
        compare({})
    other = make_run(problem, observed={"y": torch.zeros(7)})
    with pytest.raises(
        ValueError, match=r"'b'.* other values than 'a' .*\{'a': 2, 'b': 7\}.* allow"
    ):
        compare({"a": run, "b": other})
    forced = compare({"a": run, "b": other}, allow_different_data=True)
    assert any("of the same data only" in note for note in forced.notes)
    assert forced.data_digest == ""


def test_comparison_repeats_what_qualifies_its_entries():
    run = make_run(simulate(S)[0], scale=0.5, notes=("normalizer, not log p(x)",))
    text = repr(compare({"tempered": run}))
    assert "tempered: normalizer, not log p(x)" in text
    assert "tempered: scaled by 0.5" in text


# --- summaries --------------------------------------------------------------------------------


def test_summary_of_a_run():
    problem, _ = simulate(S, (4,))
    finding = Diagnostic(name="ess", severity="warning", message="few chains count", value=1.0)
    run = make_run(problem, notes=("scaled",), diagnostics=(finding,))
    text = repr(run)
    assert "forward: 16 chains, 50 steps, HMC(num_leapfrog=3), batch data=4" in text
    assert f"{run.lower.sum().item():.3f}"[:-1] in text
    assert "nats, sum" in text
    assert "148 gradients per chain (pilot: 400 on 32 chains)" in text
    assert "note: scaled" in text
    assert "note: few chains count" in text
    single_step = repr(make_run(problem, num_steps=1))
    assert "acceptance" not in single_step


def test_summary_of_a_sandwich_speaks_of_simulated_data():
    sandwich, _ = make_sandwich(S, (4,))
    assert "SIMULATED data" in repr(sandwich)
    assert "means over 4 pairs" in repr(sandwich)
    assert "95% interval (guaranteed)" in repr(sandwich)
    assert "pairs" not in repr(make_sandwich(S)[0])
