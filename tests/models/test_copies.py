"""Data that a model also reads elsewhere are found by value; constants that look alike are not."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_anneal import AnnealedImportance
from pyro_anneal.losses import EUBO
from pyro_anneal.models.copies import share_values

DATA = [0.5, -1.0, 2.0, 0.3]
LONG = torch.tensor([0.31, -1.22, 0.75, 2.11, -0.43, 0.08, 1.37, -0.92])


def annealed(model, guide=None):
    return AnnealedImportance(
        model, guide, num_chains=16, num_steps=50, seed=0, progress_bar=False
    )


def lagged_array(x):
    x = torch.as_tensor(np.array(x))
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("x", dist.Normal(a * x[:-1], 1.0), obs=x[1:])


def empirical_prior(x):
    x = torch.as_tensor(x)
    a = pyro.sample("a", dist.Normal(x.mean(), x.std()))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(a, 1.0), obs=x * 1.0)


def cast(x):
    y = torch.as_tensor(x).float()
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("x", dist.Normal(a + y.mean(), 1.0), obs=y.double())


def lagged_numbers(x):
    x = [float(v) for v in x]
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    for i in range(1, len(x)):
        pyro.sample(f"x_{i}", dist.Normal(a * x[i - 1], 1.0), obs=torch.tensor(x[i]))


def lagged_parameters(x):
    x = [float(v) for v in x]
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(a + torch.tensor(x).flip(0), 1.0), obs=torch.tensor(x))


class Holder:
    def __init__(self, x):
        self.x = x

    def __call__(self, x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a * self.x.roll(1), 1.0), obs=x.clone())


COUNTS = torch.tensor([3.0, 7.0, 2.0, 9.0, 4.0, 1.0])


def lagged_counts(read):
    """Counts that depend on those before them, however the model reads these."""

    def model(x):
        a = pyro.sample("a", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", 5):
            pyro.sample("x", dist.Poisson(a * (1.0 + read(x))), obs=x[1:] * 1.0)

    return model


HELD = COUNTS.long()
TABLE = torch.linspace(0.0, 1.0, 10)
OUTSIDE_OF_GRADIENTS = {
    "whole numbers of a closure": lambda x: HELD[:-1],
    "array of whole numbers": lambda x: torch.as_tensor(HELD.numpy()[:-1]),
    "list of whole numbers": lambda x: torch.tensor([3, 7, 2, 9, 4]),
    "indices": lambda x: TABLE.to(x.dtype)[x.long()[:-1]],
    "comparison": lambda x: (x > 3)[:-1].to(x.dtype),
    "NumPy": lambda x: torch.as_tensor(np.sqrt(x.numpy()[:-1])),
    "number of a mean": lambda x: x.mean().item(),
    "number of Python": lambda x: sum(x.tolist()) / 6,
}


COPIES = {
    "lagged array of a list": (lagged_array, DATA),
    "lagged array of a tensor": (lagged_array, torch.tensor(DATA, dtype=torch.float64)),
    "prior of the data's moments": (empirical_prior, DATA),
    "prior of the moments of a tensor": (empirical_prior, torch.tensor(DATA)),
    "cast": (cast, DATA),
    "numbers in parameters": (lagged_parameters, LONG),
    "lagged numbers of a loop": (lagged_numbers, LONG),
    "attribute": (Holder(LONG.clone()), LONG),
}


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # np.array while recording
@pytest.mark.parametrize("name", COPIES)
def test_copies_of_data_are_refused(name):
    model, x = COPIES[name]
    message = r'reads the data of site "x.*" elsewhere.* at test_copies.py:\d+ \('
    with pytest.raises(ValueError, match=message):
        annealed(model).sandwich(x)
    with pytest.raises(ValueError, match=message):
        annealed(model).mutual_information(x)
    annealed(model).run(x)  # a lower bound needs no simulation


@pytest.mark.parametrize("way", OUTSIDE_OF_GRADIENTS)
def test_copies_that_no_gradient_shows_are_refused(way):
    model = lagged_counts(OUTSIDE_OF_GRADIENTS[way])
    x = COUNTS.to(torch.get_default_dtype())
    with pytest.raises(ValueError, match=r'reads the data of site "x" elsewhere'):
        annealed(model).sandwich(x)


def test_closures_are_searched():
    held = [float(v) for v in LONG]

    def model(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a * torch.tensor(held), 1.0), obs=x + 0.0)

    with pytest.raises(ValueError, match='reads the data of site "x"'):
        annealed(model).sandwich(LONG)


def test_losses_on_simulated_data_refuse_copies():
    def guide(x):
        pyro.sample("a", dist.Normal(0.0, 1.0))

    loss = EUBO(2, posterior="simulated", make_args=lambda observed: ((DATA,), {}))
    with pytest.raises(ValueError, match='reads the data of site "x"'):
        loss.loss(empirical_prior, guide, DATA)


def regression(x, y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a * x, 0.5), obs=y)


def transformed(y):
    y = torch.as_tensor(y)
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a, 0.5), obs=(y - 0.5) * 2.0)


def counts(y):
    k = torch.arange(len(y), dtype=torch.get_default_dtype())
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson(rate * (1.0 + k)), obs=y)


def binary(x, y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=a * x), obs=y)


def constants(y):
    a = pyro.sample("a", dist.Normal(0.3, 0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a, torch.tensor([1.0, 1.0, 2.0, 2.0])), obs=y)


def masked(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)), poutine.mask(mask=(y > -900.0) & ~y.isnan()):
        pyro.sample("y", dist.Normal(a, 0.5), obs=y + 0.0)


def standardized(y):
    a = pyro.sample("a", dist.Normal(0.0, 0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(a, 0.5), obs=(y - y.mean()) / y.std())


def counted(group, y):
    a = pyro.sample("a", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson(a * (1.0 + group)), obs=y.to(a.dtype))


CLEAN = {
    "a mask of missing data": (masked, (torch.tensor([0.31, -999.0, 0.75, float("nan"), 1.2]),)),
    "standardized data": (standardized, (torch.tensor([0.31, -1.22, 0.75, 2.0]),)),
    "groups beside counts": (
        counted,
        (torch.tensor([0, 1, 2, 1, 0, 2, 1, 2]), torch.tensor([1, 0, 2, 4, 0, 1, 3, 2])),
    ),
    "covariates": (regression, (torch.linspace(-1, 1, 8), LONG)),
    "a transform of the data": (transformed, ([0.31, -1.22, 0.75],)),
    "index ranges beside counts": (counts, (torch.tensor([0.0, 1.0, 2.0, 3.0, 9.0]),)),
    "binary covariates": (
        binary,
        (torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 1.0, 1.0])),
    ),
    "numbers that are also data": (constants, (torch.tensor([0.5, 0.3, 1.0, 2.0]),)),
}


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")  # four chains, two steps
@pytest.mark.parametrize("name", CLEAN)
def test_values_that_agree_by_chance_do_no_harm(name):
    model, arguments = CLEAN[name]
    ais = AnnealedImportance(model, num_chains=4, num_steps=2, seed=0, progress_bar=False)
    result = ais.sandwich(*arguments)
    assert bool(result.gap.isfinite().all())


@pytest.mark.parametrize(
    ("values", "data", "same"),
    [
        ([0.5, -1.0, 2.0], [-1.0, 2.0, 0.3], True),
        ([3.0, 7.0, 2.0, 9.0], [7.0, 2.0, 9.0, 4.0], True),  # counts, lagged
        (LONG.flip(0).tolist(), LONG.tolist(), True),  # another order
        (LONG[:4].tolist(), LONG.tolist(), True),  # a part
        ([0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 7.0], False),
        ([2.0, 2.0, 2.0], [2.0, 2.0, 5.0], False),
        ([0.0, 1.0, 1.0], [0.0, 1.0, 1.0], False),
        ([0.0, 1.0] * 10, [0.0, 1.0] * 10, True),
        ([0.0, 0.0, 3.0, 1.0], [0.0] * 4, False),  # data that are all the same, as examples are
        ([0.5], [0.5, 0.7], False),
        ([0.1, 0.2], [0.31, 0.42], False),
        ([1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0, 2.0, 1.0, 2.0, 2.0, 3.0] * 20, False),  # labels
        ([-3.0, 0.0, 2.0], [0.0, 2.0, 1.0, 0.0, 1.0, 1.0, 2.0, 0.0, 2.0, 2.0], False),
    ],
)
def test_what_counts_as_a_copy(values, data, same):
    assert share_values(torch.tensor(values), torch.tensor(data)) is same


def with_constant(constant, prior=(0.0, 1.0)):
    def model(x):
        a = pyro.sample("a", dist.Normal(*prior))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a * constant, 1.0), obs=x)

    return model


FUNCTIONS = {  # of the data, computed before the model is called
    "affine": (lambda x: 2.0 * x + 1.0, "an affine function"),
    "standardized": (lambda x: (x - x.mean()) / x.std(), "an affine function"),
    "exponential": (torch.exp, "a monotone function"),
    "ranks": (lambda x: x.argsort().argsort().to(x.dtype), "a monotone function"),
    "squares": (torch.square, "a monotone function"),  # of the sizes
    "lagged logs": (lambda x: x[:-1].abs().log(), "a monotone function"),
}


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")  # few chains, two steps
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_may_be_computed_from_the_data_is_noted(name):
    function, words = FUNCTIONS[name]
    x = torch.tensor([0.51, -1.32, 2.07, 0.34, 1.71, -0.23, 0.92, -0.84, 1.13, 0.67, -0.12, 2.2])
    constant = function(x)
    result = annealed(with_constant(constant[: len(x)])).sandwich(x[-len(constant) :])
    found = [note for note in result.forward.notes if words in note]
    assert len(found) == 1
    assert "test_copies.py" in found[0]
    assert "if it is a covariate, all is well" in found[0]


@pytest.mark.parametrize("moment", [torch.std, torch.mean, lambda x: x.log().mean().abs()])
def test_moments_computed_before_are_refused(moment):
    x = torch.tensor([0.5137, 1.3229, 2.0791, 4.3417])
    prior = (torch.zeros(()), torch.tensor(float(moment(x))))
    with pytest.raises(ValueError, match=r"the number .* \(their .*\).* was computed from them"):
        annealed(with_constant(1.0, prior)).sandwich(x)


def test_numbers_near_a_moment_are_not_it():
    x = torch.tensor([0.5137, 1.3229, 2.0791, 4.3417])
    prior = (torch.zeros(()), x.std() * 1.0001)
    assert annealed(with_constant(1.0, prior)).sandwich(x).forward.notes == ()


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")
@pytest.mark.parametrize(
    "constant",
    [
        torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0]),
        torch.linspace(-1.0, 1.0, 9),
        torch.randn(9, generator=torch.Generator().manual_seed(3)),
        torch.ones(9),
    ],
)
def test_covariates_are_no_functions_of_the_data(constant):
    x = torch.tensor([0.51, -1.32, 2.07, 0.34, 1.71, -0.23, 0.92, -0.84, 1.13])
    for data in (x, x.sort().values):
        assert annealed(with_constant(constant)).sandwich(data).forward.notes == ()
