"""Models of unusual form: their evidence is right, or the refusal says what helps."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, config_enumerate

from pyro_anneal import AnnealedImportance, log_evidence

STARTS = [None, "auto"]


def annealed(model, guide=None, **options):
    settings = {"num_chains": 64, "num_steps": 100, "seed": 0, "progress_bar": False}
    return AnnealedImportance(model, guide, **(settings | options))


def agrees(run, truth, floor=1e-3):
    total = run.lower.sum()
    error = run.std_error.square().sum().sqrt()
    return abs(float(total) - truth) < 4 * float(error) + floor


def sizeless(x):
    with pyro.plate("data"):
        z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def sizeless_guide(x):
    with pyro.plate("data"):
        pyro.sample("z", dist.Normal(0.4 * x, 0.8))


@pytest.mark.parametrize("guide", [*STARTS, sizeless_guide])
def test_plates_without_a_size(guide):
    x = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    truth = float(dist.Normal(0.0, 2.0**0.5).log_prob(x).sum())
    run = annealed(sizeless, guide).run(x)
    assert run.plates == {"data": 5}
    assert agrees(run, truth)
    assert torch.allclose(
        run.lower.detach(), dist.Normal(0.0, 2.0**0.5).log_prob(x), atol=0.3, rtol=0.0
    )


def point(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    d = pyro.sample("d", dist.Delta(2.0 * z))
    pyro.sample("x", dist.Normal(d, 1.0), obs=x)


def point_guide(x):
    pyro.sample("z", dist.Normal(0.3 * x, 0.7))


@pytest.mark.parametrize("guide", [*STARTS, point_guide])
def test_point_masses_of_a_model_are_values(guide):
    x = torch.tensor(0.5)
    truth = float(dist.Normal(0.0, 5.0**0.5).log_prob(x))
    ais = annealed(point, guide)
    run = ais.run(x)
    assert agrees(run, truth)
    assert set(run.posterior) == {"z"}
    assert ais.sandwich(x).gap.abs() < 1.0


def test_a_point_mass_with_a_log_density_is_named():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        d = pyro.sample("d", dist.Delta(z, log_density=torch.tensor(0.5)))
        pyro.sample("x", dist.Normal(d, 1.0), obs=x)

    with pytest.raises(ValueError, match=r'"d" is a Delta with a log_density.*pyro.factor'):
        annealed(model).run(torch.tensor(0.5))


def numbers_and_numpy(y):
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a, 0.3), obs=y)


def numbers_per_row(y):
    with pyro.plate("data", len(y)):
        a = pyro.sample("a", dist.Normal(0.0, 2.0))
        pyro.sample("y", dist.Normal(a, 0.3), obs=y)


def numbers_guide(y):
    pyro.sample("a", dist.Normal(0.0, 0.5))


def gaussian_evidence(y, prior, noise):
    covariance = prior**2 * torch.ones(len(y), len(y)) + noise**2 * torch.eye(len(y))
    normal = torch.distributions.MultivariateNormal(torch.zeros(len(y)), covariance.double())
    return float(normal.log_prob(y))


@pytest.mark.filterwarnings("ignore:certified=False")
@pytest.mark.parametrize("guide", [*STARTS, numbers_guide])
def test_priors_of_numbers_beside_data_from_numpy(guide):
    torch.set_default_dtype(torch.float32)  # restored by the fixture
    y = torch.tensor(np.linspace(-1, 1, 5))
    truth = gaussian_evidence(y, 2.0, 0.3)
    assert truth == pytest.approx(-15.168, abs=1e-3)
    ais = annealed(numbers_and_numpy, guide)
    run = ais.run(y)
    assert agrees(run, truth)
    assert run.posterior["a"].dtype == torch.float32
    back = ais.run_reverse({"a": 0.134 * torch.randn(64)}, y)
    assert abs(float(back.upper) - truth) < 5 * float(back.std_error) + 0.1
    assert bool(torch.isfinite(ais.sandwich(y).gap))


@pytest.mark.parametrize("guide", STARTS)
def test_numbers_and_numpy_in_a_batch_plate(guide):
    torch.set_default_dtype(torch.float32)
    y = torch.tensor(np.linspace(-1, 1, 5))
    truth = float(dist.Normal(0.0, (4.0 + 0.09) ** 0.5).log_prob(y).sum())
    run = annealed(numbers_per_row, guide).run(y)
    assert run.plates == {"data": 5}
    assert agrees(run, truth)


def test_the_front_door_takes_data_from_numpy():
    torch.set_default_dtype(torch.float32)
    y = torch.tensor(np.linspace(-1, 1, 5))
    assert float(log_evidence(numbers_and_numpy, y).lower) == pytest.approx(-15.168, abs=0.06)


def undeclared(y):
    eta = pyro.sample("eta", dist.Normal(torch.zeros(8), torch.ones(8)))
    pyro.sample("y", dist.Normal(eta, 1.0), obs=y)


@pytest.mark.parametrize("guide", STARTS)
def test_axes_that_no_plate_declares_are_summed(guide):
    y = torch.linspace(-1, 1, 8)
    truth = float(dist.Normal(0.0, 2.0**0.5).log_prob(y).sum())
    run = annealed(undeclared, guide).run(y)
    assert run.batch_shape == ()
    assert agrees(run, truth)
    (note,) = [note for note in run.notes if "belong to no plate" in note]
    assert '[-1] of site "eta", [-1] of site "y"' in note


def test_undeclared_axes_inside_a_batch_plate_are_summed_per_row():
    x = torch.tensor([[0.3, -1.0, 2.0], [1.5, 0.2, -0.4]])  # three rows of two numbers

    def model(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    run = annealed(model).run(x)
    truth = [gaussian_evidence(x[:, i], 1.0, 1.0) for i in range(3)]
    assert run.plates == {"data": 3}
    error = 5 * run.std_error + 1e-3
    assert bool(((run.lower - torch.tensor(truth)).abs() < error).all())


def test_undeclared_axes_beside_enumerated_sites_are_refused():
    @config_enumerate
    def model(y):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z + k, 1.0), obs=y)

    with pytest.raises(ValueError, match="belongs to no plate, and sites are enumerated"):
        annealed(model).run(torch.zeros(3))


def test_a_model_without_latents_has_its_log_density_as_evidence():
    def model(x):
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(torch.tensor([0.0, 1.0, 2.0]), 1.0), obs=x)

    x = torch.tensor([0.4, 1.9, -0.3])
    truth = dist.Normal(torch.tensor([0.0, 1.0, 2.0]), 1.0).log_prob(x)
    for run in (log_evidence(model, x), annealed(model, num_chains=1).run(x)):
        assert torch.allclose(run.lower, truth)
        assert bool((run.std_error == 0).all())
        assert any("exact: " in note for note in run.notes)
        assert run.provenance.task == "run"
        assert run.provenance.seconds["total"] > 0.0
        assert run.summary()


def test_a_model_of_enumerated_latents_alone_is_summed():
    @config_enumerate
    def model(x):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        with pyro.plate("data", 3):
            b = pyro.sample("b", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(k + 2.0 * b, 1.0), obs=x)

    x = torch.tensor([0.4, 1.9, -0.3])
    truth = 0.0
    for k, p in enumerate([0.2, 0.3, 0.5]):
        rows = [
            math.log(
                0.7 * float(dist.Normal(float(k), 1.0).log_prob(v).exp())
                + 0.3 * float(dist.Normal(k + 2.0, 1.0).log_prob(v).exp())
            )
            for v in x
        ]
        truth += p * math.exp(sum(rows))
    run = annealed(model).run(x)
    assert float(run.lower) == pytest.approx(math.log(truth), abs=1e-6)
    assert float(run.std_error) == 0.0


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")
def test_event_axes_that_cannot_be_enumerated_are_annealed():
    @config_enumerate
    def model(x):
        k = pyro.sample("k", dist.Bernoulli(0.5 * torch.ones(2)).to_event(1))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + k.sum(), 1.0), obs=x)

    run = annealed(model).run(torch.tensor(0.5))
    marginal = dist.Normal(torch.tensor([0.0, 1.0, 1.0, 2.0]), math.sqrt(2.0))
    truth = float(marginal.log_prob(torch.tensor(0.5)).exp().mean().log())
    assert abs(float(run.lower) - truth) < 5.0 * float(run.std_error) + 1e-3
    assert any("['k'] are annealed by a discrete kernel" in note for note in run.notes)


def test_a_latent_hidden_by_block_is_named():
    def model(x):
        with poutine.block(hide=["w"]):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + w, 1.0), obs=x)

    for guide in STARTS:
        with pytest.raises(ValueError, match=r"\['w'\].*poutine.block"):
            annealed(model, guide).run(torch.tensor(0.5))


def hierarchical(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 2):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.filterwarnings("ignore:certified=False")
def test_samples_of_mcmc_start_reverse_chains():
    x = torch.tensor([0.5, 1.0])
    mcmc = MCMC(NUTS(hierarchical), num_samples=8, warmup_steps=20, disable_progbar=True)
    mcmc.run(x)
    ais = annealed(hierarchical, num_steps=10)
    truth = gaussian_evidence(x, 1.0, 1.0)
    runs = [ais.run_reverse(samples, x) for samples in (mcmc, mcmc.get_samples())]
    assert all(torch.equal(run.log_weights, runs[0].log_weights) for run in runs)
    assert runs[0].num_chains == 8
    assert abs(float(runs[0].upper) - truth) < 1.0
    with pytest.raises(ValueError, match=r"flatten\(0, 1\)"):
        ais.run_reverse(mcmc.get_samples(group_by_chain=True), x)
    with pytest.raises(ValueError, match="get_samples"):
        ais.run_reverse([1.0, 2.0], x)
