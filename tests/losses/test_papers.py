"""The scripts at the size of the papers, at a tiny size: they resume, and measure the truth."""

import itertools
import json
import sys
from pathlib import Path

import pyro
import pytest
import torch

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "papers"))

import aiwae
import common
import eim_priors
import nets
import tvo

TINY = ["--images", "digits", "--steps", "4", "--batch", "5", "--rate", "0.01", "--num-test", "4"]
NET = ["--latents", "3", "--hidden", "8"]
CASES = {
    "compare": (tvo, ["compare", "--layers", "4", "3", "--particles", "3"], 13),
    "partitions": (tvo, ["partitions", "--layers", "4", "--particles", "3"], 21),
    "gradients": (tvo, ["gradients", "--layers", "4", "--particles", "3"], 10),
    "continuous": (tvo, ["continuous", "--particles", "3", *NET], 7),
    "aiwae": (
        aiwae,
        [
            *NET,
            "--particles",
            "1",
            "2",
            "--ais-steps",
            "10",
            "--chains",
            "3",
            "--num-simulated",
            "2",
        ],
        7,
    ),
    "eim": (
        eim_priors,
        [*NET, "--hidden-energy", "5", "--proposals", "8", "--eval-particles", "5"],
        4,
    ),
    "eim, grey": (
        eim_priors,
        [*NET, "--hidden-energy", "5", "--proposals", "8", "--continuous"],
        4,
    ),
}


@pytest.fixture(autouse=True)
def _single_precision(_seeded):
    torch.set_default_dtype(torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_a_script_fills_its_record_once(name, tmp_path, capsys):
    script, options, count = CASES[name]
    path = tmp_path / "record.json"
    arguments = [*options, *TINY, "--seeds", "0", "--output", str(path)]
    arguments += ["--checkpoints", str(tmp_path / "kept")]
    extra = ["--eval-particles", "10", "--repetitions", "3"] if script is tvo else []
    script.main(arguments + extra)
    first = json.loads(path.read_text())
    assert len(first["rows"]) == count
    assert {"torch", "pyro", "pyro_anneal"} <= first["versions"].keys()
    for row in first["rows"]:
        numbers = [v for v in row.values() if isinstance(v, float)]
        assert all(abs(v) < 1e4 for v in numbers), row
        assert row["seed"] == 0
    script.main(arguments + extra)
    assert json.loads(path.read_text())["rows"] == first["rows"]
    assert "| --- |" in capsys.readouterr().out.replace("---|", " --- |")
    assert not any(tmp_path.glob("kept/*.pt"))


@pytest.mark.parametrize(
    ("script", "options"),
    [
        (tvo, ["compare", "--layers", "2", "--methods", "TVO .05", "--eval-particles", "2"]),
        (
            aiwae,
            [
                *NET,
                "--methods",
                "VAE",
                "--ais-steps",
                "2",
                "--chains",
                "2",
                "--num-simulated",
                "1",
            ],
        ),
        (
            eim_priors,
            [*NET, "--priors", "gaussian", "--eval-particles", "2"],
        ),
    ],
)
def test_a_longer_run_is_another_cell(script, options, tmp_path, capsys):
    path = tmp_path / "record.json"
    tiny = ["--images", "digits", "--batch", "2", "--num-test", "2", "--output", str(path)]
    if script is not eim_priors:
        tiny += ["--particles", "2"]
    for steps in ("1", "2", "1"):
        script.main([*options, *tiny, "--seeds", "0", "--rate", "0.01", "--steps", steps])
    assert [row["steps"] for row in json.loads(path.read_text())["rows"]] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["IWAE", "AIWAE T=5"])
def test_training_that_was_cut_short_goes_on_with_the_same_numbers(name, tmp_path):
    images = common.digits()
    results = []
    for cut in (None, 3):
        pyro.set_rng_seed(1)
        mean = images.train.mean(0)
        model, guide = nets.Decoder(3, 8, mean), nets.Encoder(3, 8, mean)
        for steps in (6,) if cut is None else (cut, 6):
            loss = aiwae.method(name, 2, type("Arguments", (), {"compile": False}))
            carried = [(loss, ("log_step_size", "num_adaptations"))] if "A" in name[0] else []
            place = tmp_path / f"{cut}.pt"
            trainer = common.Trainer(6, 5, 0.01, 1, place, every=3, carried=carried, redraw=True)

            def stop(step, steps=steps):
                if step == steps:
                    raise KeyboardInterrupt

            trainer.on_step = stop
            if steps < 6:
                with pytest.raises(KeyboardInterrupt):
                    trainer.run(model, guide, loss.differentiable_loss, images.train)
                pyro.set_rng_seed(99)  # what another process would begin with
                model, guide = nets.Decoder(3, 8, mean), nets.Encoder(3, 8, mean)
            else:
                trainer.run(model, guide, loss.differentiable_loss, images.train)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert (results[0] - results[1]).abs().max() == 0.0


def test_the_belief_net_is_judged_by_the_evidence_of_all_states():
    """Two layers of 3 and 2 bits, summed over 32 states; the guide's chain has that support."""
    torch.manual_seed(0)
    mean = torch.tensor([0.2, 0.7, 0.5, 0.9])
    model, guide = nets.BeliefModel([3, 2], mean), nets.BeliefGuide([3, 2], mean)
    with torch.no_grad():
        for parameter in [*model.parameters(), *guide.parameters()]:
            parameter += 0.5 * torch.randn_like(parameter)
    x = torch.tensor([[1.0, 0.0, 1.0, 1.0]])
    terms = []
    for state in itertools.product([0.0, 1.0], repeat=5):
        z = {"z0": torch.tensor([state[:3]]), "z1": torch.tensor([state[3:]])}
        with torch.no_grad():
            trace = pyro.poutine.trace(pyro.poutine.condition(model, data=z)).get_trace(x)
            terms.append(trace.log_prob_sum())
    exact = torch.stack(terms).logsumexp(0).item()
    values = torch.tensor([common.evidence(model, guide, x, 2000) for _ in range(10)])
    assert abs(values.mean().item() - exact) < 5.0 * values.std().item() / 10**0.5 + 1e-3
    assert common.elbo(model, guide, x, particles=2000) < exact


@pytest.mark.slow
def test_separate_draws_change_the_noise_of_the_gradient_and_not_its_mean():
    torch.manual_seed(0)
    images = common.digits()
    mean = images.train.mean(0)
    model, guide = nets.BeliefModel([4], mean), nets.BeliefGuide([4], mean)
    x = images.train[:2]
    weights = list(guide.parameters())
    grads = {}
    for name, kind in {"common": tvo.TVO, "separate": tvo.SeparateDraws}.items():
        loss = kind(30, [0.0, 0.3, 1.0], **common.OPTIONS)
        rows = [
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(
                        loss.differentiable_loss(model, guide, x), weights
                    )
                ]
            )
            for _ in range(600)
        ]
        grads[name] = torch.stack(rows)
    means = {name: g.mean(0) for name, g in grads.items()}
    errors = sum(g.var(0) / len(g) for g in grads.values()).sqrt()
    difference = (means["common"] - means["separate"]).abs()
    seen = errors > 1e-7
    # Both are self-normalized: at S = 30 their biases differ by some per cent of the gradient.
    allowed = 5.0 * errors + 0.1 * means["common"].abs()
    assert (difference <= allowed)[seen].all()
    assert grads["common"].std(0).mean() < grads["separate"].std(0).mean()
