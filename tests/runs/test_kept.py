"""What is kept between calls never gives stale numbers: against closed forms after every change."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_anneal import AnnealedImportance
from pyro_anneal.graphs import captured, kept
from pyro_anneal.problems import fitted
from pyro_anneal.problems.content import Remembered

pytestmark = pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")


def log_normal(x, variance):
    return float(-0.5 * (math.log(2 * math.pi * variance) + x**2 / variance))


def annealed(model, guide="auto", **options):
    """A Gaussian fit is exact for the models here, so that every log-weight is log Z."""
    settings = {"num_chains": 8, "num_steps": 3, "seed": 0, "progress_bar": False}
    return AnnealedImportance(model, guide, cross_check=False, **(settings | options))


def lower(ais, *args):
    return float(ais.run(*args).lower)


class Scaled:
    """A model that reads numbers of Python, a tensor of its own, and a parameter."""

    def __init__(self):
        self.sd = 0.5
        self.cap = 1e6
        self.shift = torch.tensor(0.0, dtype=torch.float64)
        self.weight = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        self.scale = 1.0

    def __call__(self, x):
        zero = torch.zeros((), dtype=torch.float64)
        with poutine.scale(scale=self.scale):
            z = pyro.sample("z", dist.Normal(zero, 1.0))
            mean = torch.where(z > self.cap, 1e3 * torch.ones_like(z), self.weight * z)
            pyro.sample("x", dist.Normal(mean + self.shift, self.sd), obs=x)

    def truth(self, x):
        variance = float(self.weight.detach()) ** 2 + self.sd**2
        return self.scale * log_normal(float(x) - float(self.shift), variance)


def test_changed_data_parameters_and_numbers_are_seen():
    model = Scaled()
    ais = annealed(model)
    x = torch.tensor(1.3, dtype=torch.float64)
    assert lower(ais, x) == pytest.approx(model.truth(x), abs=1e-6)
    x.fill_(-0.4)  # in place
    assert lower(ais, x) == pytest.approx(model.truth(x), abs=1e-6)
    x = torch.tensor(2.0, dtype=torch.float64)  # another tensor
    assert lower(ais, x) == pytest.approx(model.truth(x), abs=1e-6)
    model.sd = 0.5 * (1.0 + 1e-5)  # a number of Python, by less than any check of values sees
    assert lower(ais, x) == pytest.approx(model.truth(x), abs=1e-7)
    model.shift.add_(0.7)  # a tensor of the closure, in place
    assert lower(ais, x) == pytest.approx(model.truth(x), abs=1e-6)
    model.shift = torch.tensor(-0.2, dtype=torch.float64)  # and replaced
    assert lower(ais, x) == pytest.approx(model.truth(x), abs=1e-6)
    optimizer = torch.optim.SGD([model.weight], lr=0.3)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert float(model.weight.detach()) == pytest.approx(0.7)
    assert lower(ais, x) == pytest.approx(model.truth(x), abs=1e-6)
    model.weight = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    assert lower(ais, x) == pytest.approx(model.truth(x), abs=1e-6)
    model.scale = 2.0
    assert lower(ais, x) == pytest.approx(model.truth(x), abs=1e-6)


def test_a_branch_that_no_chain_reaches_is_another_density():
    model = Scaled()
    x = torch.tensor(0.3, dtype=torch.float64)
    first = annealed(model, None, num_steps=50).run(x)
    model.cap = 60.0  # of standard deviations: the same densities wherever a chain may be
    before = {key: set(graphs) for key, graphs in kept._GRAPHS.items()}
    second = annealed(model, None, num_steps=50).run(x)
    assert torch.equal(first.log_weights, second.log_weights)
    found = {key: set(graphs) for key, graphs in kept._GRAPHS.items()}
    assert found != before  # recorded for itself, however alike


def test_dtype_and_shape_are_part_of_the_problem():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), dtype=x.dtype), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    ais = annealed(model)
    for x in (torch.tensor([1.0, -2.0]), torch.tensor([1.0, -2.0]).double(), torch.zeros(3)):
        run = ais.run(x)
        truth = [log_normal(float(value), 1.25) for value in x]
        assert run.lower.tolist() == pytest.approx(truth, abs=1e-3)
        assert run.posterior["z"].dtype == x.dtype


def test_models_of_the_same_code_do_not_share_numbers():
    def made(sd):
        def model(x):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            pyro.sample("x", dist.Normal(z, sd), obs=x)

        return model

    x = torch.tensor(1.1, dtype=torch.float64)
    for sd in (0.5, 0.50001, torch.tensor(2.0).double(), torch.tensor(2.5).double()):
        truth = log_normal(1.1, 1.0 + float(sd) ** 2)
        assert lower(annealed(made(sd)), x) == pytest.approx(truth, abs=1e-7)


@pytest.mark.parametrize("guide", ["auto", None], ids=["auto", "prior"])
def test_a_repeated_run_gives_the_numbers_of_a_fresh_object(guide):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("schools", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, 4.0))
            pyro.sample("y", dist.StudentT(5.0, theta, 10.0), obs=y)

    y = torch.tensor([28.0, 8.0, -3.0])
    kept._GRAPHS.clear()
    ais = annealed(model, guide, num_steps=20)
    first = ais.run(y)
    ais.run(y + 1.0)  # other data in between
    again = ais.run(y.clone())
    kept._GRAPHS.clear()
    fresh = annealed(model, guide, num_steps=20).run(y)
    for other in (again, fresh):
        assert torch.equal(first.log_weights, other.log_weights)
        assert torch.equal(first.betas, other.betas)
        assert torch.equal(first.posterior["theta"], other.posterior["theta"])
    assert first.fit_gradients == again.fit_gradients


def test_a_fit_of_the_same_data_is_made_once():
    calls = []

    def model(x):
        calls.append(1)
        z = pyro.sample("z", dist.StudentT(3.0, torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    ais = annealed(model, seed=None)
    x = torch.tensor([1.0, -2.0])
    torch.manual_seed(0)
    first, second = ais.run(x), ais.run(x)
    assert first.seed != second.seed
    assert first.fit_gradients == second.fit_gradients > 0
    spent = captured.CapturedDensity.__call__
    evaluated = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            captured.CapturedDensity,
            "__call__",
            lambda self, position: (evaluated.append(1), spent(self, position))[1],
        )
        third = ais.run(x)
    used = third.num_gradients + third.pilot.num_gradients
    assert len(evaluated) <= used + 5  # nothing for the fit
    fresh = annealed(model, seed=third.seed).run(x)
    assert torch.equal(third.log_weights, fresh.log_weights)


def test_observed_values_outside_their_support_are_refused_on_every_call():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.LogNormal(z, 1.0), obs=x)

    ais = annealed(model, None)
    ais.run(torch.tensor(1.0))
    with pytest.raises(ValueError, match="'x'"):
        ais.run(torch.tensor(-1.0))
    with pytest.raises(ValueError, match="NaN"):
        ais.run(torch.tensor(math.nan))


def _rows(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.sample("x", dist.StudentT(5.0, z, 0.5), obs=x)


def _guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.8 * x, 0.7))


@pytest.mark.parametrize(
    "guide",
    [pytest.param(None, marks=pytest.mark.slow), _guide, "auto"],
    ids=["prior", "guide", "auto"],
)
def test_simulations_of_a_call_are_those_of_separate_calls(guide):
    x = torch.tensor([1.0, -2.0])
    options = {"num_steps": 6, "resampling": False}
    together = annealed(_rows, guide, **options).sandwich(x, num_simulations=3)
    for index in range(3):
        alone = annealed(_rows, guide, **options, seed=index).sandwich(x)
        for one, several in (
            (alone.forward, together.forward),
            (alone.reverse, together.reverse),
        ):
            assert torch.equal(one.log_weights, several.log_weights[:, index])


def test_batches_of_a_call_are_those_of_separate_calls():
    batches = list(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    together = annealed(_rows, None, num_steps=6, resampling=False).run_batches(batches)
    for index, batch in enumerate(batches):
        alone = annealed(_rows, None, num_steps=6, resampling=False, seed=index).run(batch)
        assert torch.equal(alone.lower, together.lower[4 * index : 4 * index + 4])


def test_further_simulations_and_batches_run_the_model_a_few_times():
    calls = []

    def model(x):
        calls.append(1)
        _rows(x)

    def spent(call):
        before = len(calls)
        call()
        return len(calls) - before

    x = torch.tensor([1.0, -2.0])
    ais = annealed(model, None, num_steps=3)
    ais.run(x)
    few, many = (spent(lambda n=n: ais.sandwich(x, num_simulations=n)) for n in (2, 6))
    assert (many - few) / 4 <= 24
    few, many = (spent(lambda n=n: ais.run_batches([x + i for i in range(n)])) for n in (2, 6))
    assert (many - few) / 4 <= 12


def test_a_run_reads_the_model_a_few_times_however_many_chains(monkeypatch):
    calls = []

    def model(y):
        calls.append(1)
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, 10.0), obs=y)

    y = torch.tensor([28.0, 8.0, -3.0, 7.0])
    for num_chains in (8, 128):
        kept._GRAPHS.clear()
        monkeypatch.setattr(fitted, "_FITS", Remembered())
        ais = AnnealedImportance(
            model, "auto", num_chains=num_chains, num_steps=3, seed=0, progress_bar=False
        )
        for most in (40, 20):  # the first call of a process, and another
            calls.clear()
            ais.run(y)
            assert len(calls) <= most


def test_fits_of_further_data_share_what_the_first_recorded(monkeypatch):
    recorded, original = [], kept.record_densities
    monkeypatch.setattr(
        kept,
        "record_densities",
        lambda *args, **options: (recorded.append(1), original(*args, **options))[1],
    )
    batches = [torch.tensor([1.0, -2.0]) + i for i in range(4)]
    annealed(_rows, num_steps=3).run_batches(batches[:1])  # makes graphs of their kind
    counts = []
    for count in (2, 4):
        recorded.clear()
        found = annealed(_rows, num_steps=3).run_batches(batches[:count])
        counts.append(len(recorded))
    assert counts[1] - counts[0] <= 2  # of the fitted base, one for each
    for index, batch in enumerate(batches):
        alone = annealed(_rows, num_steps=3, seed=index).run(batch)
        assert torch.equal(alone.lower, found.lower[2 * index : 2 * index + 2])


def test_a_batch_outside_the_support_is_refused_among_others():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Exponential(z.exp()), obs=x)

    ais = annealed(model, None)
    with pytest.raises(ValueError, match="support"):
        ais.run_batches([torch.tensor([1.0, 2.0]), torch.tensor([1.0, -2.0])])
    with pytest.raises(ValueError, match="NaN"):
        ais.run_batches([torch.tensor([1.0, 2.0]), torch.tensor([1.0, math.nan])])


def test_a_branch_on_the_data_is_recorded_for_either_side():
    def model(x):
        sd = 0.5 if bool(x.sum() > 0) else 2.0
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), dtype=x.dtype), 1.0))
            pyro.sample("x", dist.Normal(z, sd), obs=x)

    batches = [torch.tensor([1.0, 0.5]).double(), torch.tensor([-1.0, 0.5]).double()]
    batches.append(torch.tensor([2.0, 0.1]).double())
    found = annealed(model).run_batches(batches)
    truth = [
        log_normal(float(value), 1.0 + (0.25 if batch.sum() > 0 else 4.0))
        for batch in batches
        for value in batch
    ]
    assert found.lower.tolist() == pytest.approx(truth, abs=1e-5)
