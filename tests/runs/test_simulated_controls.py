"""Control variates of simulated data sets: mean zero, the same pairs, and what they remove."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_anneal import AnnealedImportance
from pyro_anneal.models.simulation import simulate
from pyro_anneal.persistence.randomness import own_randomness
from pyro_anneal.runs.surrogates import SimulatedControls


def counts(x):
    """Two Poisson counts per row, whose entropy torch does not know, of a Gamma rate."""
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        pyro.sample("first", dist.Poisson(3.0 * z), obs=x[:, 0])
        both = torch.stack([z, 2.0 * z], -1)
        pyro.sample("second", dist.Poisson(both).to_event(1), obs=x)


X = torch.ones(400, 2)


def test_controls_have_mean_zero_and_speak_of_the_very_pairs():
    controls = SimulatedControls(counts, ((X,), {}), {"rows": 400}, seed=3)
    found = controls.of(8)
    assert found.shape == (2, 8, 400)
    flat = found.flatten(1)
    error = flat.std(1) / flat.shape[1] ** 0.5
    assert bool((flat.mean(1).abs() < 4.5 * error).all())
    with own_randomness(3 + 5):
        pairs = simulate(counts, ((X,), {}))
    z, seen = pairs.latents["z"], pairs.observed
    exact = dist.Poisson(3.0 * z).log_prob(seen["first"])
    exact = exact + dist.Poisson(torch.stack([z, 2.0 * z], -1)).log_prob(seen["second"]).sum(-1)
    centred = exact.double() - exact.double().mean()
    ours = found[0, 5] - found[0, 5].mean()
    # what differs is the mean of 32 fresh ones, of a 32nd of the variance
    assert float((ours - centred).var() / centred.var()) == pytest.approx(1.0 / 32.0, rel=0.5)
    assert torch.equal(controls.of(3), found[:, :3])


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")
def test_mutual_information_keeps_its_gaps_and_loses_variance():
    ais = AnnealedImportance(
        counts, num_chains=16, num_steps=30, seed=0, progress_bar=False, resampling=False
    )
    plain, with_them = (
        ais.mutual_information(X[:60], num_simulations=2, control_variates=wanted)
        for wanted in (True, "simulated")
    )
    torch.testing.assert_close(
        with_them.pair_upper - with_them.pair_lower, plain.pair_upper - plain.pair_lower
    )
    assert float(with_them.measurements["variance_ratio"]) < 0.5
    assert float(with_them.lower_std_error) < 0.8 * float(plain.lower_std_error)
    far = (with_them.lower - plain.lower).abs()
    assert float(far) < 4.0 * float(plain.lower_std_error)


def test_other_values_are_refused():
    with pytest.raises(ValueError, match="control_variates must be"):
        AnnealedImportance(counts).mutual_information(X, control_variates="all")
