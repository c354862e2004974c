"""A fit that lacks the tails of the posterior gets a share of the prior, and others do not."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_anneal import AnnealedImportance

pytestmark = pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")


def weak(prior, y):
    def model():
        z = pyro.sample("z", prior())
        pyro.sample("y", dist.Bernoulli(logits=z.sum()), obs=torch.tensor(y))

    return model


def run(model, **options):
    settings = {"num_chains": 256, "num_steps": 10, "seed": 0, "progress_bar": False}
    return AnnealedImportance(model, "auto", **{**settings, **options}).run()


HEAVY = {
    "Student": lambda: dist.StudentT(0.3, 0.0, 1.0),
    "Cauchy": lambda: dist.Cauchy(0.0, 3.0),
    "two dimensions": lambda: dist.StudentT(0.5, torch.zeros(2), 1.0).to_event(1),
}


@pytest.mark.parametrize(
    "name", ["Student", *(pytest.param(n, marks=pytest.mark.slow) for n in list(HEAVY)[1:])]
)
def test_heavy_tails_are_covered(name):
    """Symmetric priors and a sigmoid: half of the prior's mass, whatever its tails."""
    result = run(weak(HEAVY[name], 1.0))
    error = float(result.log_evidence) - math.log(0.5)
    assert abs(error) <= 5.0 * float(result.std_error)
    assert float(result.std_error) < 0.1
    if name == "Student":  # the others are near enough to Student-t of eight degrees
        assert any("reach tails of the posterior" in note for note in result.notes)


@pytest.mark.slow
def test_heavy_tails_of_rows_are_covered():
    def model(y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.StudentT(0.3, 0.0, 1.0))
            pyro.sample("y", dist.Bernoulli(logits=z), obs=y)

    y = torch.tensor([0.0, 1.0, 1.0])
    settings = {"num_chains": 256, "num_steps": 10, "seed": 0, "progress_bar": False}
    result = AnnealedImportance(model, "auto", **settings).run(y)
    error = (result.log_evidence - math.log(0.5)).abs()
    assert bool((error <= 5.0 * result.std_error).all())


def test_light_tails_are_left_alone():
    result = run(weak(lambda: dist.Normal(0.0, 1.0), 1.0), num_chains=32, num_steps=5)
    assert result.notes == ()
    assert float(result.std_error) < 0.01


def test_an_improper_prior_leaves_a_wider_fit():
    """A fifth of each coordinate in a shoulder, under a flat prior: the normalizer is known."""
    scales, locs = torch.tensor([0.5, 3.0]), torch.tensor([0.0, 3.0])
    mixture = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.8, 0.2])), dist.Normal(locs, scales)
    )

    def model():
        with pyro.plate("parts", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(False))
        pyro.factor("own", mixture.log_prob(z).sum())
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    truth = -0.5 * math.log(2.0 * math.pi)
    result = run(model, batch_plates=[])
    assert any("wider Student-t" in note for note in result.notes)
    assert abs(float(result.log_evidence) - truth) <= 5.0 * float(result.std_error)
