"""Training by ``fit``, labels and arrays, and draws from learned posteriors."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_anneal import mi

TRUTH = 0.5 * math.log(5.0)  # z ~ N(0, 1), x ~ N(z, .5)


def pairs(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, generator=generator)
    return z + 0.5 * torch.randn(count, generator=generator), z


class Guide(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(()))
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return dist.Normal(self.gain * x, self.log_scale.exp())


def test_fit_reaches_the_best_guide_and_keeps_the_best_weights():
    bound = mi.BarberAgakov(dist.Normal(0.0, 1.0), Guide())
    state = torch.random.get_rng_state()
    fitted = bound.fit(*pairs(2000), lr=0.03, max_epochs=40, seed=0, progress_bar=False)
    assert fitted is bound
    assert torch.equal(state, torch.random.get_rng_state())
    history = bound.history
    assert history.best_epoch == int(np.argmax(history.held_out))
    assert history.held_out[-1] > history.held_out[0] + 0.3
    est = bound.estimate(*pairs(4000, seed=1))
    assert abs(float(est.lower) - TRUTH) < 0.01 + 4.5 * float(est.lower_std_error)
    assert bound.guide.gain.item() == pytest.approx(0.8, abs=0.05)
    again = mi.BarberAgakov(dist.Normal(0.0, 1.0), Guide())
    again.fit(*pairs(2000), lr=0.03, max_epochs=40, seed=0, progress_bar=False)
    assert again.history.held_out == history.held_out
    assert again.guide.gain.item() == bound.guide.gain.item()


def test_overfitting_stops_early_and_is_said():
    x, z = pairs(120)
    torch.manual_seed(0)
    bound = mi.InfoNCE(mi.ConcatCritic(1, 1, [128, 128]))
    bound.fit(
        x.sign(),
        z,
        lr=0.01,
        max_epochs=300,
        patience=10,
        batch_size=64,
        seed=0,
        progress_bar=False,
    )
    assert bound.history.stopped == "patience"
    assert len(bound.history.held_out) == bound.history.best_epoch + 11
    last = bound.history
    # restored weights beat those of the last epoch
    assert last.held_out[last.best_epoch] >= max(last.held_out)


def test_parameters_in_pyros_store_are_trained():
    pyro.clear_param_store()

    def guide(x):
        gain = pyro.param("gain", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        return dist.Normal(gain * x, scale)

    bound = mi.BarberAgakov(dist.Normal(0.0, 1.0), guide)
    bound.fit(*pairs(1000), lr=0.05, max_epochs=30, seed=0, progress_bar=False)
    assert pyro.param("gain").item() == pytest.approx(0.8, abs=0.08)
    assert pyro.param("scale").item() == pytest.approx(0.2**0.5, abs=0.06)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("critic", [mi.ConcatCritic, mi.SeparableCritic])
def test_arrays_and_labels_are_taken_as_they_come(critic, width):
    generator = np.random.default_rng(0)
    y = generator.integers(0, 3, 900)  # int64 labels, float64 data
    x = np.array([0.0, 4.0, -4.0])[y] + generator.standard_normal(900)
    torch.manual_seed(0)
    bound = mi.InfoNCE(critic(1, width, [32]))
    bound.fit(x, y, lr=0.01, max_epochs=15, batch_size=64, seed=0, progress_bar=False)
    value = float(bound.estimate(x, y, batch_size=100).lower)
    assert 0.75 < value < math.log(3.0)  # all but a few labels can be told
    with pytest.raises(ValueError, match="encode strings as integers"):
        bound.estimate(x, np.array(["a"] * 900))
    if width == 3:
        with pytest.raises(ValueError, match="must lie in"):
            bound.estimate(x, y + 1)


def test_findings_of_the_fit_reach_the_estimate():
    torch.manual_seed(0)
    x, z = pairs(400)
    critic = mi.ConcatCritic(1, 1, [64, 64])
    bound = mi.InfoNCE(critic, 4)
    bound.fit(z + 0.001 * x, z, lr=0.01, max_epochs=30, seed=0, progress_bar=False)
    with pytest.warns(UserWarning, match="ceiling"):
        est = bound.estimate(z, z)
    assert "ceiling" in [found.name for found in est.diagnostics]
    assert est.verdict == "suspicious"
    short = mi.BarberAgakov(dist.Normal(0.0, 1.0), Guide())
    short.fit(*pairs(400), max_epochs=3, seed=0, progress_bar=False)
    assert [found.name for found in short.history.diagnostics] == ["unfinished"]


def test_refusals():
    x, z = pairs(50)
    bound = mi.BarberAgakov(dist.Normal(0.0, 1.0), Guide())
    for options, message in (
        ({"validation": 1.0}, "validation must lie"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"patience": 0}, "patience"),
    ):
        with pytest.raises(ValueError, match=message):
            bound.fit(x, z, **options)
    with pytest.raises(ValueError, match="takes x and z"):
        bound.fit(x)
    with pytest.raises(ValueError, match="num_pairs simulates"):
        bound.fit(x, z, num_pairs=5)
    with pytest.raises(ValueError, match="nothing to learn"):
        mi.BarberAgakov(dist.Normal(0.0, 1.0), lambda x: dist.Normal(x, 1.0)).fit(x, z)
    with pytest.raises(ValueError, match="cannot be split"):
        mi.InfoNCE(mi.ConcatCritic(1, 1, [4])).fit(x[:3], z[:3], progress_bar=False)


def test_progress_of_fits_is_silenced(capsys, monkeypatch):
    bound = mi.BarberAgakov(dist.Normal(0.0, 1.0), Guide())
    bound.fit(*pairs(50), max_epochs=2, seed=0)
    assert "fit BarberAgakov" in capsys.readouterr().err
    monkeypatch.setenv("PYRO_ANNEAL_PROGRESS", "0")
    bound.fit(*pairs(50), max_epochs=2, seed=0)
    bound.estimate(*pairs(50), progress_bar=True)
    assert capsys.readouterr().err == ""


def _wide(x):
    return dist.Normal(0.3 * x, 1.5)


def _best(x, z):
    """log p(z|x) / q(z|x) up to a function of x, so that q e^T / Z is N(.8 x, sqrt .2)."""
    q = dist.Normal(0.3 * x, 1.5).to_event(1)
    return dist.Normal(0.8 * x, 0.2**0.5).to_event(1).log_prob(z) - q.log_prob(z)


@pytest.mark.parametrize("kind", ["GIWAE", "MINEAIS"])
def test_draws_from_the_learned_posterior(kind):
    """Proposition L.3: with the best critic it is the posterior, known in closed form here."""
    x = torch.tensor([-1.0, 2.0])
    if kind == "GIWAE":
        bound = mi.GIWAE(dist.Normal(0.0, 1.0), _wide, _best, num_particles=400)
    else:
        bound = mi.MINEAIS(dist.Normal(0.0, 1.0), _wide, _best, num_steps=60)
    draws = bound.sample_posterior(x, 1000, seed=0)
    assert draws.shape == (1000, 2)
    mean, spread = draws.mean(0), draws.std(0)
    assert bool(((mean - 0.8 * x).abs() < 4.5 * spread / 1000**0.5 + 0.01).all())
    assert bool(((spread**2 - 0.2).abs() < 4.5 * 0.2 * (2 / 1000) ** 0.5 + 0.005).all())
    assert torch.equal(draws, bound.sample_posterior(x, 1000, seed=0))


def test_mine_ais_fits_with_a_held_out_value():
    torch.manual_seed(0)
    guide = Guide()
    critic = mi.ConcatCritic(1, 1, [16])
    bound = mi.MINEAIS(dist.Normal(0.0, 1.0), guide, critic, num_steps=40, num_moves=2)
    bound.fit(*pairs(600), lr=0.02, max_epochs=12, batch_size=100, seed=0, progress_bar=False)
    est = bound.estimate(*pairs(200, seed=1))
    assert est.lower < TRUTH + 4.5 * est.lower_std_error
    assert bound.history.held_out[bound.history.best_epoch] > TRUTH - 0.15
    assert est.lower > TRUTH - 0.15 - 4.5 * est.lower_std_error
