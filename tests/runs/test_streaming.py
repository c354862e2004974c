"""Data in batches, and pairs one after another, in memory that does not grow with their number."""

import gc
import itertools
import math
import re
import warnings
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from resumable import shorten
from torch.utils.data import DataLoader, TensorDataset

import pyro_anneal
from pyro_anneal import AnnealedImportance, Linear, bounds
from pyro_anneal.persistence import files as checkpoint
from pyro_anneal.persistence.journal import Journal
from pyro_anneal.runs.batches import as_arguments

SCALE = torch.linspace(0.5, 2.0, 4)


def linear(x):
    """Evidence N(x; 0, 1 + s^2) per coordinate."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z * SCALE, 1.0).to_event(1), obs=x)


def linear_evidence(x):
    return dist.Normal(0.0, (1.0 + SCALE.square()).sqrt()).log_prob(x).sum(-1)


def annealed(model=linear, **options):
    defaults = {
        "num_chains": 8,
        "num_steps": 60,
        "schedule": Linear(),
        "step_size": 0.6,
        "progress_bar": False,
        "seed": 0,
    }
    return AnnealedImportance(model, **(defaults | options))


# --- batches ----------------------------------------------------------------------------------


def test_batches_give_the_evidence_of_each_datum():
    data = torch.randn(23, 4) * 2.0
    loader = DataLoader(TensorDataset(data), batch_size=10)
    evidence = annealed(num_chains=64).run_batches(loader)
    truth = linear_evidence(data)
    assert evidence.batch_sizes == (10, 10, 3)
    assert evidence.lower.shape == evidence.ess.shape == (23,)
    # the bias of the logarithm is half its variance
    bias = 0.5 * evidence.std_error.square()
    assert ((evidence.lower + bias - truth).abs() <= 5.0 * evidence.std_error).all()
    total_error = 5.0 * evidence.total_std_error.item()
    assert total_error < 5.0
    assert (evidence.total + bias.sum()).item() == pytest.approx(
        truth.sum().item(), abs=total_error
    )
    low, high = evidence.interval(0.95)
    limit = bounds.limit_of_blocks(evidence.block_totals, 0.95, num_kept=evidence.num_kept)
    assert low.item() == pytest.approx(limit.item())
    assert evidence.total.item() - math.log(20.0) < low.item()  # narrower than Markov's here
    assert high == math.inf
    assert low <= truth.sum()


def test_each_batch_is_a_run_with_a_seed_of_its_own():
    first, second = torch.randn(3, 4), torch.randn(2, 4)
    evidence = annealed(seed=5).run_batches([first, second])
    alone = annealed(seed=5).run(first), annealed(seed=6).run(second)
    assert torch.equal(evidence.lower, torch.cat([run.lower for run in alone]))
    assert torch.equal(evidence.ess, torch.cat([run.ess for run in alone]))
    assert evidence.num_gradients == alone[0].num_gradients


def test_what_a_loader_yields_becomes_arguments():
    assert as_arguments(3) == ((3,), {})
    assert as_arguments((1, 2)) == ((1, 2), {})
    assert as_arguments([1]) == ((1,), {})
    assert as_arguments({"x": 1}) == ((), {"x": 1})
    x, labels = torch.randn(4, 4), torch.arange(4)
    expected = annealed().run_batches([x]).lower
    assert torch.equal(annealed().run_batches([{"x": x}]).lower, expected)
    chosen = annealed().run_batches([(x, labels)], arguments=lambda batch: ((batch[0],), {}))
    assert torch.equal(chosen.lower, expected)


def test_every_batch_is_handed_out_once_with_its_posterior(tmp_path):
    seen = {}
    batches = [torch.randn(3, 4), torch.randn(2, 4)]
    ais = annealed(checkpoint=tmp_path / "x.ckpt")
    first = ais.run_batches(batches, on_batch=seen.__setitem__)
    assert [run.posterior["z"].shape for run in seen.values()] == [(8, 3, 4), (8, 2, 4)]
    assert torch.equal(torch.cat([run.lower for run in seen.values()]), first.lower)
    seen.clear()
    again = ais.run_batches(batches, on_batch=seen.__setitem__)
    assert not seen
    assert torch.equal(again.lower, first.lower)


def test_finished_batches_are_not_run_again(tmp_path, monkeypatch):
    batches, steps, record = [torch.randn(2, 4) for _ in range(3)], [], Journal.record

    def counting(self, name, *args, **kwargs):
        steps.append(name)
        return record(self, name, *args, **kwargs)

    monkeypatch.setattr(Journal, "record", counting)
    options = {"checkpoint": tmp_path / "x.ckpt", "checkpoint_every": 1}

    class Failed(Exception):
        pass

    def failing():
        yield from batches[:2]
        raise Failed

    with pytest.raises(Failed):
        annealed(**options).run_batches(failing())
    assert {name.split("/")[0] for name in steps} == {"0", "1"}
    steps.clear()
    evidence = annealed(**options).run_batches(batches)
    assert {name.split("/")[0] for name in steps} == {"2"}
    assert torch.equal(evidence.lower, annealed().run_batches(batches).lower)


def test_batches_must_be_those_of_the_checkpoint(tmp_path):
    batches = [torch.randn(2, 4) for _ in range(3)]
    ais = annealed(checkpoint=tmp_path / "x.ckpt")
    ais.run_batches(batches)
    with pytest.raises(ValueError, match="batch 1 is not the one of the checkpoint"):
        ais.run_batches([batches[0], batches[2], batches[1]])
    with pytest.raises(ValueError, match="holds 3 batches, but there are 2 now"):
        ais.run_batches(batches[:2])
    longer = ais.run_batches([*batches, batches[0]])  # more data may follow
    assert longer.batch_sizes == (2, 2, 2, 2)


def test_no_batch_is_an_error():
    with pytest.raises(ValueError, match="got no batch"):
        annealed().run_batches([])
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        annealed().run_batches([torch.zeros(1, 4)]).interval(1.0)


def test_a_model_without_batch_plates_has_one_evidence_per_batch():
    def joint(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    evidence = annealed(joint).run_batches([torch.zeros(3), torch.ones(5)])
    assert evidence.batch_sizes == (1, 1)
    assert any("only if no latent is shared" in note for note in evidence.notes)
    assert "2 data in 2 batches" in repr(evidence)


def test_a_common_scale_is_taken_outside_and_must_not_change():
    def model(x, scale):
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=scale):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([0.3, -1.0])
    evidence = annealed(model).run_batches([(x, 2.0), (x + 1, 2.0)])
    low, _ = evidence.interval(0.9)
    unscaled = bounds.limit_of_blocks(evidence.block_totals / 2.0, 0.9, num_kept=evidence.num_kept)
    assert low.item() == pytest.approx(2.0 * unscaled.item())
    with pytest.raises(ValueError, match=r"scale is 2\.0 in the first batch and 3\.0 in batch 1"):
        annealed(model).run_batches([(x, 2.0), (x, 3.0)])


def test_findings_of_all_batches_are_one_warning():
    def narrow(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.001), obs=x)

    batches = [torch.zeros(2), torch.full((2,), 3.0), torch.full((2,), -5.0)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        evidence = annealed(narrow, num_steps=2).run_batches(batches)
    found = {finding.name: finding.message for finding in evidence.diagnostics}
    assert len(found) == len(evidence.diagnostics)
    assert re.match(r"in 3 of 3 batches, as in batch \d: one of 8 chains", found["dominance"])
    warned = [str(warning.message) for warning in caught]
    assert warned == [f.message for f in evidence.diagnostics if f.severity == "warning"]


@pytest.mark.filterwarnings("ignore::pyro_anneal.diagnostics.AnnealingWarning")
def test_a_run_of_any_length_holds_two_batches_at_most():
    alive, most = weakref.WeakSet(), []

    def endless():
        for _ in range(5):
            batch = torch.randn(2, 4)
            alive.add(batch)
            yield batch
            del batch
            most.append(len(alive))

    gc.disable()  # batches do not wait for the collector
    try:
        annealed(num_steps=5).run_batches(endless())
    finally:
        gc.enable()
    assert max(most) <= 2  # the batch at hand, and the one that the kept recording was made for


# --- pairs ------------------------------------------------------------------------------------


def live_bytes():
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pyro_anneal.diagnostics.AnnealingWarning")
def test_pairs_keep_log_weights_only(monkeypatch):
    shorten(monkeypatch)
    held, original = [], pyro_anneal.runs.pairs.simulate_pair

    def measured(*args, **kwargs):
        pair = original(*args, **kwargs)
        held.append(live_bytes())
        return pair

    monkeypatch.setattr(pyro_anneal.runs.pairs, "simulate_pair", measured)

    def wide(x):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(torch.zeros(200), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = torch.zeros(2, 200)
    annealed(wide, num_steps=20).mutual_information(x, num_simulations=5)
    growth = [b - a for a, b in itertools.pairwise(held[1:])]
    latents = 8 * 2 * 200 * 8  # bytes of one direction's samples
    per_pair = 2 * 2 * 8 * 2 * 8  # log-weights and their integrals, both directions
    assert max(growth) <= 4 * per_pair < latents / 10
    held.clear()
    annealed(wide, num_steps=20).sandwich(x, num_simulations=5, keep_samples=True)
    assert held[-1] - held[1] > 3 * latents  # the measure would see them


@pytest.mark.filterwarnings("ignore::pyro_anneal.diagnostics.AnnealingWarning")
def test_graphs_of_finished_data_sets_are_freed():
    counts, original = [], pyro_anneal.runs.pairs.simulate_pair

    def counted(*args, **kwargs):
        graphs = sum(type(x).__name__ == "CapturedDensity" for x in gc.get_objects())
        texts = len(torch.fx.graph_module._loader.eval_cache)
        counts.append((graphs, texts))
        patch.setattr(pyro_anneal.persistence.memory, "_next_collection", 0.0)
        patch.setattr(pyro_anneal.persistence.memory, "_LEAST_MADE", 0)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyro_anneal.runs.pairs, "simulate_pair", counted)
        annealed(num_steps=3).mutual_information(torch.zeros(2, 4), num_simulations=3)
    assert counts[1] == counts[2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pyro_anneal.diagnostics.AnnealingWarning")
def test_simulations_are_those_of_runs_one_by_one():
    x = torch.zeros(3, 4)
    together = annealed(seed=7).sandwich(x, num_simulations=3, keep_samples=True)
    alone = [annealed(seed=7 + i).sandwich(x) for i in range(3)]
    assert torch.equal(together.lower, torch.stack([part.lower for part in alone]))
    assert torch.equal(together.upper, torch.stack([part.upper for part in alone]))
    assert torch.equal(
        together.forward.posterior["z"],
        torch.stack([part.forward.posterior["z"] for part in alone], 1),
    )
    assert torch.equal(
        together.simulated["x"], torch.stack([part.simulated["x"] for part in alone])
    )
    lean = annealed(seed=7).sandwich(x, num_simulations=3)
    assert torch.equal(lean.lower, together.lower)
    assert lean.simulated == lean.forward.posterior == {}
    mean = torch.stack([part.forward.mean_log_ratio for part in alone]).mean(0)
    assert torch.allclose(lean.forward.mean_log_ratio, mean, rtol=1e-13)


def test_a_lean_sandwich_prints_and_exports(tmp_path):
    pytest.importorskip("arviz")
    ais = annealed(checkpoint=tmp_path / "x.ckpt")
    lean = ais.sandwich(torch.zeros(3, 4), num_simulations=2)
    assert "means over 6 pairs" in repr(lean)
    data = lean.to_arviz()
    assert "evidence" in data.groups() if callable(data.groups) else data.groups
    slot = checkpoint.load(tmp_path / "x.ckpt")["tasks"]["sandwich"]
    assert set(slot["outcomes"]) == {"pairs"}  # stages of finished data sets are gone
