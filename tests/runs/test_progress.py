import re

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_anneal import AnnealedImportance, log_evidence

pytestmark = pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")
X = torch.tensor([0.4, -2.0])


def model(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def _ais(**options):
    return AnnealedImportance(
        model, **({"num_chains": 4, "num_steps": 250, "seed": 0, "compile": False} | options)
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda: _ais(guide="auto").run(X),
        lambda: _ais(cross_check=True, guide="auto").run(X),
        lambda: _ais().sandwich(X, bounds=("CR lower", "CR upper")),
        lambda: _ais(num_steps=5).mutual_information(X, num_simulations=3),
        lambda: _ais(num_steps=5).run_batches(X.split(1)),
        lambda: _ais(num_steps=5).run_batches(iter(X.split(1))),
        lambda: log_evidence(model, X, num_chains=4, num_steps=20, seed=0),
    ],
    ids=["run", "cross check", "sandwich", "information", "batches", "stream", "first call"],
)
def test_one_bar_that_ends_full(call, capsys):
    call()
    shown = capsys.readouterr().err
    lines = [line for line in shown.split("\n") if line.strip()]
    assert len(lines) == 1  # one bar, redrawn
    states = [int(p) for p in re.findall(r"(\d+)%\|", lines[0])]
    assert states == sorted(states)
    assert states[-1] == 100
    assert lines[0].rstrip().endswith("done")


def test_silence(capsys, monkeypatch):
    _ais(progress_bar=False).run(X)
    monkeypatch.setenv("PYRO_ANNEAL_PROGRESS", "0")
    _ais().run(X)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kept", [True, False])
def test_an_interrupted_call_says_where_it_saves(kept, capsys, tmp_path, monkeypatch):
    path = tmp_path / "run.ckpt"
    ais = _ais(checkpoint=path if kept else None)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("pyro_anneal.anneal.run_forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ais.run(X)
    shown = capsys.readouterr().err
    assert (f"saving its progress in {path}; the same call goes on from there" in shown) == kept
    assert path.exists() == kept
    assert "100%" not in shown


def test_first_call_takes_options_and_arguments():
    with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
        log_evidence(model, X, steps=3, progress_bar=False)
    run = log_evidence(model, x=X, num_steps=30, num_chains=5, seed=7, progress_bar=False)
    assert (run.num_steps, run.num_chains, run.seed) == (30, 5, 7)
    again = log_evidence(model, X, num_steps=30, num_chains=5, seed=7, progress_bar=False)
    assert torch.equal(run.log_weights, again.log_weights)
    prior = log_evidence(model, X, guide=None, target_gap=1.0, seed=0, progress_bar=False)
    assert prior.fit_gradients == 0
    assert prior.num_steps < 1000


def test_a_model_with_a_reserved_parameter_is_told_what_to_do():
    def walk(x, num_steps):
        z = pyro.sample("z", dist.Normal(0.0, float(num_steps)))
        pyro.sample("x", dist.Normal(z, 1.0).expand([2]).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"\['num_steps'\].*by position, or call AnnealedImp"):
        log_evidence(walk, X, num_steps=3)
    run = log_evidence(walk, X, 3, num_steps=20, seed=0, progress_bar=False)
    assert run.num_steps == 20
