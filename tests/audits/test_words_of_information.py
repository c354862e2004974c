"""The names that pages promise for information and posteriors, each constructed once."""

import inspect

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_anneal import check_inference, evidence_from_samples, mi
from pyro_anneal.oed import ais_eig

pytestmark = pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")


def model(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def draws(x, count=64):
    return {"z": x / 2.0 + 0.5**0.5 * torch.randn(count)}


def parameters(function):
    return inspect.signature(function).parameters


@pytest.mark.parametrize("exact", [False, True])
def test_evidence_from_samples(exact):
    found = parameters(evidence_from_samples)
    assert [*found][:2] == ["model", "samples"]
    assert found["exact"].default is False
    assert found["seed"].default is None
    assert found["args"].kind is inspect.Parameter.VAR_POSITIONAL
    assert found["kwargs"].kind is inspect.Parameter.VAR_KEYWORD
    x = torch.tensor(1.0)
    result = evidence_from_samples(
        model, draws(x), x, exact=exact, seed=0, num_steps=3, progress_bar=False
    )
    assert result.lower.shape == result.std_error.shape == ()
    assert isinstance(result.diagnostics, tuple)
    if exact:
        assert bool(result.upper.isfinite())
    else:
        with pytest.raises(ValueError, match="exact=True"):
            _ = result.upper
    assert len(result.interval()) == len(result.normal_interval()) == 2


def test_check_inference():
    found = parameters(check_inference)
    assert [*found][:2] == ["model", "inference"]
    assert "num_simulations" in found
    assert found["seed"].default is None
    audit = check_inference(
        model, draws, torch.tensor(0.0), num_simulations=4, seed=0, progress_bar=False
    )
    assert audit.verdict in ("ok", "suspicious", "failed")
    assert audit.jeffreys.lower <= audit.jeffreys.upper
    assert len(audit.ranks["z"]) == 4
    assert callable(audit.plot)


def test_ais_eig():
    def designed(design):
        with pyro.plate_stack("designs", design.shape):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(design * z, 1.0))

    names = ["model", "design", "observation_labels", "target_labels"]
    assert [*parameters(ais_eig)][:4] == names
    gain = ais_eig(designed, torch.ones(3), ["y"], ["z"], num_pairs=4, num_steps=3, seed=0)
    for name in ("lower", "upper", "lower_std_error", "upper_std_error"):
        assert getattr(gain, name).shape == (3,)
    assert len(gain.normal_interval()) == 2
    with pytest.raises(AttributeError, match="finite samples"):
        gain.interval()


def test_fit():
    for bound in (mi.InfoNCE, mi.GIWAE, mi.MINEAIS, mi.BarberAgakov):
        found = parameters(bound.fit)
        assert [*found][:3] == ["self", "x", "z"]
        for name in ("seed", "progress_bar"):
            assert found[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert found["seed"].default is None
