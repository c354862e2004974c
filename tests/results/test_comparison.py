import dataclasses
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from example_results import example_results
from perfect_chains import make_run, simulate

from pyro_anneal import AnnealedImportance, Diagnostic, compare
from pyro_anneal.results import Provenance
from pyro_anneal.results.digest import add_digests, digest_of_data

S = [1.8, 0.6]


@pytest.fixture
def runs():
    problem, _ = simulate(S)
    runs = [make_run(problem, num_chains=400, num_steps=n) for n in (40, 3)]
    shift = 1.5  # lopsided: the second model is 1.5 nats worse
    return runs[0], dataclasses.replace(runs[1], log_weights=runs[1].log_weights - shift)


def test_a_list_of_pairs_is_as_good_as_a_dictionary(runs):
    by_name, by_pairs = (
        compare({"a": runs[0], "b": runs[1]}),
        compare(list(zip("ab", runs, strict=True))),
    )
    assert by_name.names == by_pairs.names == ("a", "b")
    assert torch.equal(by_name.lower, by_pairs.lower)
    for wrong in ([runs[0], runs[1]], runs[0], "ab"):
        with pytest.raises(TypeError, match=r'list of pairs \[\("a", a\), \("b", b\)\]'):
            compare(wrong)
    with pytest.raises(ValueError, match=r"name of its own for each model, repeated: \['a'\]"):
        compare([("a", runs[0]), ("a", runs[1])])


def test_prior_odds_enter_by_the_rule_of_bayes(runs):
    a, b = (run.lower.double().exp().item() for run in runs)
    for odds in ({"a": 1, "b": 9}, [1, 9], [0.1, 0.9]):
        result = compare([("a", runs[0]), ("b", runs[1])], prior_odds=odds)
        expected = [1 * a / (1 * a + 9 * b), 9 * b / (1 * a + 9 * b)]
        assert result.probabilities.tolist() == pytest.approx(expected)
        assert "prior probabilities: a 0.1, b 0.9" in repr(result)
    assert compare([("a", runs[0])], prior_odds=[2]).probabilities.tolist() == [1.0]
    # the Bayes factor is that of the data alone
    plain = compare([("a", runs[0]), ("b", runs[1])])
    assert torch.equal(plain.log_bayes_factors, result.log_bayes_factors)
    assert plain.probabilities.tolist() == pytest.approx([a / (a + b), b / (a + b)])
    for odds, message in (
        ([1], "one number per model: expected 2, got 1"),
        ({"a": 1, "c": 2}, r"expected \['a', 'b'\], got \['a', 'c'\]"),
        ([1, 0], "positive numbers"),
        ([1, math.inf], "positive numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            compare([("a", runs[0]), ("b", runs[1])], prior_odds=odds)


def test_uncertified_runs_are_named(runs):
    problem, z = simulate(S)
    forward = make_run(problem)
    sure = make_run(problem, start=z, certified=True)
    loose = make_run(problem, start=z, certified=False)
    result = compare({"sure": (forward, sure), "loose": (forward, loose)})
    assert next(n for n in result.notes if "not certified" in n).startswith("loose: its reverse")
    assert result.upper[result.names.index("loose")] == math.inf
    assert result.upper[result.names.index("sure")] == sure.upper.double()


def test_each_run_keeps_how_it_was_computed(runs, tmp_path):
    records = [
        Provenance(
            task="run",
            seed=seed,
            kernel="HMC()",
            settings={"num_chains": "400", "num_steps": steps},
            seconds={"total": seconds},
            versions={"torch": torch_version},
        )
        for seed, steps, seconds, torch_version in ((3, "40", 0.5, "2.4"), (4, "3", 0.25, "2.13"))
    ]
    problem, z = simulate(S)
    same = {"data_digest": runs[0].data_digest}
    reverse = make_run(problem, start=z, certified=True, provenance=records[1], **same)
    first, second = (
        dataclasses.replace(run, provenance=r) for run, r in zip(runs, records, strict=True)
    )
    result = compare({"b": second, "a": (first, reverse)})
    assert result.names == ("a", "b")
    assert result.provenances == {"a": records[0], "a (reverse)": records[1], "b": records[1]}
    assert result.provenance.task == "compare"
    assert result.provenance.seconds == {"total": 1.0}
    assert result.provenance.settings == {"num_chains": "400"}  # what all share
    assert result.provenance.seed is None
    assert any("a by torch 2.4, a (reverse) by torch 2.13" in note for note in result.notes)
    frame = pytest.importorskip("pandas") and result.to_dataframe()
    assert list(frame["seed"]) == [3, 4]
    assert list(frame["seconds"]) == [0.5, 0.25]
    result.save(tmp_path / "comparison")
    assert type(result).load(tmp_path / "comparison").provenances == result.provenances
    assert compare({"a": runs[0]}).provenance is None  # runs without a record


def test_findings_of_a_certified_reverse_run_count(runs):
    problem, z = simulate(S)
    found = Diagnostic(name="ess", severity="warning", message="few", value=0.1)
    for certified, verdict in ((True, "suspicious"), (False, "ok")):
        reverse = make_run(
            problem,
            start=z,
            certified=certified,
            diagnostics=(found,),
            data_digest=runs[0].data_digest,
        )
        assert compare({"a": (runs[0], reverse), "b": runs[1]}).verdict == verdict


def test_evidence_from_draws_may_enter():
    draws = example_results()["exact draws"]
    result = compare({"draws": draws, "run": draws.forward})
    i = result.names.index("draws")
    assert result.lower[i] == draws.lower.sum().double()
    assert result.upper[i] == draws.upper.sum().double()
    assert result.upper[1 - i] == math.inf
    assert result.provenances["draws"] == draws.provenance


def _model(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def _renamed(values):
    with pyro.plate("rows", len(values)):
        z = pyro.sample("w", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=values)


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")
def test_runs_of_other_data_are_refused():  # FAULTS A27
    ais = AnnealedImportance(_model, num_chains=4, num_steps=5, progress_bar=False, seed=0)
    a, b = ais.run(torch.tensor(0.5)), ais.run(torch.tensor(5.0))
    with pytest.raises(ValueError, match=r"\['b'\] observed other values than 'a'.*allow_diff"):
        compare({"a": a, "b": b})
    assert any(
        "same data only" in n for n in compare({"a": a, "b": b}, allow_different_data=True).notes
    )
    # another model of the same datum, named, shaped and typed in another way, may enter
    other = AnnealedImportance(_renamed, num_chains=4, num_steps=5, progress_bar=False, seed=0)
    c = other.run(torch.tensor([0.5], dtype=torch.float64))
    assert compare({"a": a, "c": c}).data_digest == a.data_digest != ""


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")
def test_batches_compare_with_a_run_of_all_data():
    ais = AnnealedImportance(_renamed, num_chains=4, num_steps=5, progress_bar=False, seed=0)
    data = torch.tensor([0.3, -2.0, 0.3, 7.0])
    whole, parts = ais.run(data), ais.run_batches(data.split(3))
    assert parts.data_digest == whole.data_digest
    result = compare([("whole", whole), ("parts", parts)])
    assert result.lower[result.names.index("parts")] == parts.total.double()
    sandwich = ais.sandwich(data, num_simulations=2)
    assert sandwich.data_digest.startswith("8:")


def test_digest_tells_data_apart_and_nothing_else():
    x = torch.tensor([0.1, -3.0, 0.0, 8.0])
    digest = digest_of_data({"x": x})
    assert digest.startswith("4:")
    same = [
        {"y": x.double()},
        {"x": x.reshape(2, 2).T},
        {"x": x * torch.tensor([1.0, 1.0, -1.0, 1.0])},  # -0.0
        {"a": x[:1], "b": x[1:]},
    ]
    assert {digest_of_data(values) for values in same} == {digest}
    assert add_digests([digest_of_data({"x": x[:3]}), digest_of_data({"x": x[3:]}), ""]) == digest
    others = [x[:3], x + 1e-6, torch.cat([x, x[:1]]), torch.tensor([0.1, -3.0, 0.1, 8.0])]
    others += [torch.cat([x[:3], torch.tensor([math.nan])]), x + 1j * x]
    assert len({digest_of_data({"x": value}) for value in others} | {digest}) == 7
    for value in (torch.tensor([True, False]), torch.tensor([3, 4]), torch.zeros(0)):
        digest_of_data({"x": value})
    assert digest_of_data({}) == digest_of_data({"x": torch.zeros(0)}) == ""
