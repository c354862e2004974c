"""One table of bad inputs: each gives an error that names the culprit, or the right answer.

``REFUSED`` holds what must raise, with the words that name the culprit and the remedy. ``ANSWERED``
holds input that looks bad and has a right answer, with the truth from a closed form.
"""

import dataclasses
import math
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoNormal
from scipy import integrate, stats
from torch import nn

from pyro_anneal import (
    HMC,
    AnnealedImportance,
    Linear,
    LogUniform,
    Pilot,
    Power,
    RandomWalk,
    Sigmoid,
    bounds,
    eim,
    mi,
    weights,
)
from pyro_anneal.arguments import as_count
from pyro_anneal.losses import AIWAE, EUBO, IWAE, TVO, DifferentiableAIS

NAN, INF = math.nan, math.inf
X = torch.tensor([0.4, 1.9, -0.3], dtype=torch.float64)
HALF = torch.float16


# --- models and guides ---


def rows(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def rows_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.5 * x, 0.7))


def shared(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def one(likelihood, prior=lambda: dist.Normal(0.0, 1.0), factor=None):
    """Builds ``z ~ prior, y ~ likelihood(z)``, with an optional factor of z."""

    def model(x):
        z = pyro.sample("z", prior())
        if factor is not None:
            pyro.factor("factor", factor(z))
        fn, value = likelihood(z, x)
        pyro.sample("y", fn, obs=value)

    return model


def normal(z, x):
    return dist.Normal(z, 1.0), x[0]


def seen(fn, value):
    return one(lambda z, x: (fn(z), torch.as_tensor(value)))


def guided(fn):
    return lambda x: pyro.sample("z", fn())


def plate_of(size):
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("items", size):
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(max(size, 0)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[0])

    return model


def twice_named(x):
    pyro.sample("z", dist.Normal(0.0, 1.0))
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=x[0])


def nested_plates_of_one_name(x):
    with pyro.plate("data", 3), pyro.plate("data", 2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z.sum(), 1.0), obs=x[0])


def empty_site(x):
    e = pyro.sample("empty", dist.Normal(torch.zeros(0), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(e.sum(), 1.0), obs=x[0])


def writes_into_its_data(x):
    x.add_(1.0)
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=x[0])


class Counter:
    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z + self.calls, 1.0), obs=x[0])


def raises(x):
    raise RuntimeError("the decoder of shelf 7 is broken")


def run(model=rows, guide=None, data=X, **options):
    options = {"num_chains": 8, "num_steps": 3, "progress_bar": False, "seed": 0} | options
    return AnnealedImportance(model, guide, **options).run(data)


def sandwich(model=rows, guide=None, data=X, **options):
    ais = AnnealedImportance(model, guide, num_chains=4, num_steps=3, progress_bar=False, seed=0)
    return ais.sandwich(data, **options)


def reverse(samples):
    ais = AnnealedImportance(rows, num_chains=4, num_steps=3, progress_bar=False, seed=0)
    return ais.run_reverse(samples, X)


def loss(value, model=rows, guide=rows_guide, data=X):
    return value.loss(model, guide, data)


PRIOR = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
PAIRS = torch.ones(6, 2), torch.arange(12.0).reshape(6, 2)


def inner(x, z):
    return (x * z).sum(-1)


def encoder(x):
    return dist.Normal(x / 2, 0.7).to_event(1)


def estimate(bound, x=PAIRS[0], z=PAIRS[1]):
    return bound.estimate(x.to(torch.get_default_dtype()), z.to(torch.get_default_dtype()))


@dataclasses.dataclass(frozen=True)
class NoReversal:
    num_gradients: int = 1
    target_accept: float | None = None

    def noise(self, state, generator):
        return ()

    def step(self, state, density, beta, tuning, noise):
        return state


class WrongTarget(RandomWalk):
    target_accept = 3.0

    def __init__(self):
        pass


REFUSED = {
    # --- numbers of chains and steps ---
    "K a float": (lambda: run(num_chains=8.0), r"num_chains \(K\) must be an integer, got 8.0"),
    "K a fraction": (lambda: run(num_chains=8.5), r"num_chains \(K\) must be an integer, got 8.5"),
    "K a bool": (lambda: run(num_chains=True), r"num_chains \(K\) .* got True \(bool\)"),
    "K a string": (lambda: run(num_chains="8"), r"num_chains \(K\) .* got '8' \(str\)"),
    "K None": (lambda: run(num_chains=None), r"num_chains \(K\) must be an integer, got None"),
    "K infinite": (lambda: run(num_chains=INF), r"num_chains \(K\) must be an integer, got inf"),
    "K negative": (lambda: run(num_chains=-3), r"num_chains \(K\) must be at least 1, got -3"),
    "T a float": (lambda: run(num_steps=3.0), r"num_steps \(T\) must be an integer, got 3.0"),
    "T a bool": (lambda: run(num_steps=True), r"num_steps \(T\) must be an integer, got True"),
    "T NaN": (lambda: run(num_steps=NAN), r"num_steps \(T\) must be an integer, got nan"),
    "T zero": (lambda: run(num_steps=0), r"num_steps \(T\) must be at least 1, got 0"),
    # --- schedules ---
    "schedule a class": (lambda: run(schedule=Linear), "the class Linear: pass an instance"),
    "schedule a word in a list": (lambda: run(schedule=["adaptive"]), r"betas\[0\] must be a"),
    "schedule None": (lambda: run(schedule=None), "schedule must be a schedule such as Linear"),
    "schedule of lists": (lambda: run(schedule=lambda n: [0.0, 1.0]), "real tensor .* got list"),
    "schedule too short": (
        lambda: run(schedule=torch.zeros(1)),
        r"at least two entries, got \[1\]",
    ),
    "schedule a matrix": (lambda: run(schedule=torch.zeros(2, 2)), r"one-dimensional .* \[2, 2\]"),
    "schedule of another length": (
        lambda: run(schedule=lambda n: torch.linspace(0, 1, 8)),
        "expected 4 betas for num_steps=3, got 8",
    ),
    "betas complex": (
        lambda: run(schedule=torch.tensor([0.0, 1.0 + 0j])),
        "betas must be a real tensor .* got torch.complex",
    ),
    "betas with NaN": (lambda: run(schedule=torch.tensor([0.0, NAN, 1.0])), r"betas\[1\] = nan"),
    "betas above one": (lambda: run(schedule=torch.tensor([0.0, 2.0, 1.0])), r"betas\[2\] = 1.0"),
    "betas reversed": (lambda: run(schedule=torch.tensor([1.0, 0.0])), r"betas\[0\] must be 0"),
    "Linear of a fraction": (
        lambda: Linear()(3.5),
        "Linear num_steps must be an integer, got 3.5",
    ),
    "Power of a string": (lambda: Power("3"), "Power.exponent must be a number, got '3'"),
    "Sigmoid without steepness": (lambda: Sigmoid(0.0), "Sigmoid needs a positive, finite delta"),
    "LogUniform of NaN": (lambda: LogUniform(NAN), "LogUniform needs 0 < beta_1 < 1, got nan"),
    # --- kernels, step sizes, pilots ---
    "kernel a class": (lambda: run(kernel=HMC), r"kernel is the class HMC: pass HMC\(\)"),
    "kernel a string": (lambda: run(kernel="hmc"), "got 'hmc', which lacks .*'step', 'reversal'"),
    "kernel without reversal": (lambda: run(kernel=NoReversal()), r"lacks \['reversal'\]"),
    "kernel of acceptance 3": (lambda: run(kernel=WrongTarget()), r"target_accept .* got 3.0"),
    "half a leapfrog": (lambda: HMC(num_leapfrog=1.5), "num_leapfrog must be an integer, got 1.5"),
    "jitter NaN": (lambda: HMC(jitter=NAN), r"jitter must lie in \[0, 1\), got nan"),
    "step size negative": (lambda: run(step_size=-0.1), "step_size must be positive and finite"),
    "step size zero": (lambda: run(step_size=0.0), "step_size must be positive and finite, got 0"),
    "step size NaN": (
        lambda: run(step_size=NAN),
        "step_size must be positive and finite, got nan",
    ),
    "step size infinite": (lambda: run(step_size=INF), "step_size must be positive .* got inf"),
    "step size a bool": (lambda: run(step_size=True), "step_size must be a number, got True"),
    "step size a string": (lambda: run(step_size="small"), "step_size must be .* got 'small'"),
    "step size per wrong batch": (
        lambda: run(step_size=torch.ones(5)),
        r"step_size has shape \[5\], expected a number or the batch's shape \[3\]",
    ),
    "pilot a dict": (lambda: run(pilot={"num_moves": 3}), r"pilot must be a Pilot\(...\) or None"),
    "pilot of 4.5 chains": (lambda: Pilot(num_chains=4.5), "Pilot.num_chains must be an integer"),
    "pilot of half a move": (lambda: Pilot(num_moves=0.5), "Pilot.num_moves must be an integer"),
    # --- other options ---
    "seed a float": (lambda: run(seed=1.5), "seed must be an integer, got 1.5"),
    "seed beyond 64 bits": (lambda: run(seed=2**70), r"seed must be below 2\*\*63"),
    "compile 1": (
        lambda: run(compile=1),
        'compile must be "auto", "density", True or False, got 1',
    ),
    "prior_weight one": (
        lambda: run(guide=rows_guide, prior_weight=1),
        r"prior_weight .* \[0, 1\)",
    ),
    "prior_weight a string": (lambda: run(prior_weight="a"), "prior_weight must be a number"),
    "batch_plates a name": (lambda: run(batch_plates="data"), "batch_plates must .* got 'data'"),
    "batch_plates None": (lambda: run(batch_plates=None), "batch_plates must be .* got None"),
    "batch_plates of numbers": (
        lambda: run(batch_plates=[3]),
        r"batch_plates must be .* got \[3\]",
    ),
    "batch plate twice": (lambda: run(batch_plates=["data"] * 2), 'plate "data" stands twice'),
    "batch plate unknown": (
        lambda: run(batch_plates=["rows"]),
        'plate "rows" cannot be a batch dimension',
    ),
    "make_args a string": (
        lambda: AnnealedImportance(rows, make_args="x"),
        "make_args must be a function .* got 'x'",
    ),
    "model None": (lambda: run(None), "model must be a Pyro function, got None"),
    "model a distribution": (
        lambda: run(dist.Normal(0.0, 1.0)),
        r"model must be .* got a distribution \(Normal\): write a function",
    ),
    "guide a misspelt word": (lambda: run(guide="Auto"), "guide must be .* got 'Auto'"),
    "guide a class": (lambda: run(guide=AutoNormal), "the class AutoNormal: pass an instance"),
    # --- data ---
    "data with NaN": (
        lambda: run(data=X * NAN),
        r'at site "x" 3 observed .* NaN .* check the data for NaN',
    ),
    "data with one NaN": (
        lambda: run(data=torch.tensor([0.4, NAN])),
        r'at site "x" 1 observed .* NaN .* \(the first at index \[1\]\)',
    ),
    "data infinite": (lambda: run(data=torch.tensor([0.4, INF])), r"\['x'\] .* element \[1\]"),
    "data that overflow": (
        lambda: run(data=X * 1e200),
        r"at site\(s\) \['x'\] .* no finite value",
    ),
    "data bool": (lambda: run(data=X > 0), r'at site "x": Normal of shape \[3\] .* bool, on cpu'),
    "data complex": (lambda: run(data=X + 1j), 'at site "x": the log density is complex'),
    "data a list": (lambda: run(data=[0.4, 1.9]), r'at site "x": .* type list \(pass a tensor\)'),
    "data NumPy": (lambda: run(data=X.numpy()), r"type ndarray \(pass a tensor\)"),
    "data a string": (lambda: run(data="abc"), r'at site "x": .* a value of type str'),
    "data sparse": (lambda: run(data=X.to_sparse()), r'at site "x": .* torch.sparse_coo'),
    "data on another device": (lambda: run(data=X.to("meta")), 'at site "x": .* the meta device'),
    "data empty": (
        lambda: run(data=torch.zeros(0)),
        'plate "data" has size 0: .* at least one row',
    ),
    "data a column": (lambda: run(data=X.unsqueeze(1)), r'at site "x": .* \[3, 3\], but axis -2'),
    "data missing": (
        lambda: AnnealedImportance(rows).run(),
        r"rows\(\) missing 1 required .* 'x'",
    ),
    # --- observed values that no parameter can give ---
    "Bernoulli of 2": (
        lambda: run(seen(lambda z: dist.Bernoulli(logits=z), 2.0)),
        r'site "y": 1 observed value\(s\) lie outside the support Boolean\(\) of Bernoulli',
    ),
    "Bernoulli of a half": (
        lambda: run(seen(lambda z: dist.Bernoulli(logits=z), 0.5)),
        "there: 0.5.* pass validate_args=False",
    ),
    "one pixel of many": (
        lambda: run(
            seen(
                lambda z: dist.Bernoulli(logits=z.expand(2, 3)).to_event(2),
                [[0.0, 1.0, 0.0], [1.0, 255.0, 0.0]],
            )
        ),
        r'site "y": 1 observed value\(s\) lie outside',
    ),
    "Poisson of a fraction": (
        lambda: run(seen(lambda z: dist.Poisson(z.exp()), 1.5)),
        "IntegerGreaterThan.* of Poisson .*1.5",
    ),
    "Poisson of a negative": (
        lambda: run(seen(lambda z: dist.Poisson(z.exp()), -1.0)),
        r"at site\(s\) \['y'\] the log density has no finite value",
    ),
    "Exponential of a negative": (
        lambda: run(seen(lambda z: dist.Exponential(z.exp()), -1.0)),
        'at site "y": .* outside the support .* of Exponential .*-1.0',
    ),
    "category out of range": (
        lambda: run(seen(lambda z: dist.Categorical(logits=z.expand(3)), 7)),
        'at site "y": Categorical .* index 7 is out of bounds',
    ),
    "Uniform out of reach": (
        lambda: run(
            one(lambda z, x: (dist.Uniform(0.0, z), x[1]), lambda: dist.Uniform(0.0, 1.0))
        ),
        r"at site\(s\) \['y'\] the log density has no finite value",
    ),
    "too few observations": (
        lambda: run(seen(lambda z: dist.Normal(z.expand(4), 1.0).to_event(1), [1.0, 2.0])),
        r'at site "y": Normal of shape \[4\] has no log density at a value of shape \[2\]',
    ),
    # --- models ---
    "factor minus infinity": (
        lambda: run(one(normal, factor=lambda z: z * 0 - INF)),
        r"at site\(s\) \['factor'\] the log density has no finite value",
    ),
    "factor that no start meets": (
        lambda: run(one(normal, factor=lambda z: torch.where(z > 6, 0.0, -INF))),
        r"at site\(s\) \['factor'\] .* at any of the 16 starting points",
    ),
    "factor that no fit meets": (
        lambda: run(one(normal, factor=lambda z: z * 0 - INF), guide="auto"),
        r'guide="auto" found no density .* \(guide=None\)',
    ),
    "scale negative": (
        lambda: run(one(normal, lambda: dist.Normal(0.0, -1.0))),
        r"at site\(s\) \['z'\] the log density has no finite value",
    ),
    "scale zero": (lambda: run(seen(lambda z: dist.Normal(z, 0.0), 0.4)), r"at site\(s\) \['y'\]"),
    "scale NaN": (lambda: run(one(normal, lambda: dist.Normal(0.0, NAN))), r"\['z', 'y'\]"),
    "float16 that overflows": (
        lambda: run(
            one(
                lambda z, x: (dist.Normal(300 * z, torch.tensor(0.01, dtype=HALF)), x[0].half()),
                lambda: dist.Normal(torch.zeros((), dtype=HALF), torch.ones((), dtype=HALF)),
            )
        ),
        r"at site\(s\) \['y'\] the log density has no finite value",
    ),
    "plate empty": (lambda: run(plate_of(0)), 'plate "items" has size 0'),
    "plate negative": (lambda: run(plate_of(-2)), 'plate "items" has size -2'),
    "site twice": (lambda: run(twice_named), "Multiple sample sites named 'z'"),
    "plate twice": (lambda: run(nested_plates_of_one_name), "Multiple sample sites named 'data'"),
    "latent without elements": (lambda: run(empty_site), r"\['empty'\] have no elements"),
    "simplex of one category": (
        lambda: run(
            one(
                lambda z, x: (dist.Normal(z.sum(), 1.0), x[0]),
                lambda: dist.Dirichlet(torch.ones(1)),
            )
        ),
        r"latent sites \['z'\] have no elements",
    ),
    "latents on another device": (
        lambda: run(one(normal, lambda: dist.Normal(torch.zeros((), device="meta"), 1.0))),
        'at site "z": a value on the meta device',
    ),
    "model with a state": (
        lambda: run(Counter()),
        "two different results .* attributes that change",
    ),
    "model that draws": (
        lambda: run(seen(lambda z: dist.Normal(z + torch.randn(()), 1.0), 0.4)),
        r"draws random numbers \(aten::randn\) at test_hostile.py",
    ),
    "model that draws from Python": (
        lambda: run(seen(lambda z: dist.Normal(z + random.random(), 1.0), 0.4)),
        "draws numbers from Python's random",
    ),
    "model that writes into its data": (
        lambda: run(writes_into_its_data, data=X.clone()),
        "two different results .* data written in place",
    ),
    "model that raises": (lambda: run(raises), "the decoder of shelf 7 is broken"),
    "scale of the model zero": (
        lambda: run(poutine.scale(rows, scale=0.0)),
        "scale > 0 but got 0",
    ),
    # --- guides ---
    "guide of wrong event": (
        lambda: run(shared, guided(lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1))),
        r'at site "z" the guide draws shape \[2\], the model expects \[\]',
    ),
    "guide of wrong batch": (
        lambda: run(shared, guided(lambda: dist.Normal(torch.zeros(2), 1.0))),
        r'at site "z" the guide draws shape \[2\]',
    ),
    "guide of nothing": (lambda: run(rows, lambda x: None), r"without a guide: \['z'\]"),
    "guide of another site": (
        lambda: run(shared, lambda x: pyro.sample("w", dist.Normal(0.0, 1.0))),
        r"without a guide: \['z'\]; sites of the guide that the model lacks: \['w'\]",
    ),
    "guide too narrow": (
        lambda: run(shared, guided(lambda: dist.Uniform(-0.1, 0.1))),
        r'at site "z" the guide \(Uniform, .* no chain could reach them',
    ),
    "guide discrete": (
        lambda: run(shared, guided(lambda: dist.Bernoulli(0.5))),
        r'at site "z" the guide \(Bernoulli',
    ),
    "guide a point": (
        lambda: run(shared, guided(lambda: dist.Delta(torch.tensor(0.1)))),
        'at site "z" the guide is a Delta',
    ),
    "guide AutoDelta": (lambda: run(shared, AutoDelta(shared)), "AutoDelta has no density"),
    "guide of another model": (
        lambda: run(shared, AutoNormal(rows)),
        'at site "z" the guide draws',
    ),
    "guide improper": (
        lambda: run(shared, guided(lambda: dist.ImproperUniform(dist.constraints.real, (), ()))),
        'site "z" is an ImproperUniform, which has no normalized density',
    ),
    "guide of NaN": (lambda: run(shared, guided(lambda: dist.Normal(NAN, 1.0))), "'the guide'"),
    "guide of no width": (
        lambda: run(shared, guided(lambda: dist.Normal(0.0, 0.0))),
        r"at site\(s\) \['the guide'\]",
    ),
    "guide of other arguments": (
        lambda: run(shared, lambda: None),
        "takes 0 positional arguments",
    ),
    # --- sandwiches and reverse runs ---
    "bounds a name": (lambda: sandwich(bounds="IM lower"), "bounds must be a pair .* 'IM lower'"),
    "bounds exchanged": (
        lambda: sandwich(bounds=("CR upper", "IM lower")),
        "bounds must be a pair",
    ),
    "simulations a fraction": (
        lambda: sandwich(num_simulations=1.5),
        "num_simulations must be an integer, got 1.5",
    ),
    "sandwich of a factor": (
        lambda: sandwich(one(normal, factor=lambda z: -z.square())),
        r'pyro.factor\("factor"\) changes the joint density .* or use run\(\)',
    ),
    "sandwich of expanded data": (
        lambda: sandwich(guide=rows_guide, data=X[:1].expand(3)),
        r"site\(s\) \['x'\] share memory .*make_args",
    ),
    "sandwich of no data": (lambda: sandwich(data=torch.zeros(0)), 'plate "data" has size 0'),
    "samples None": (lambda: reverse(None), "posterior samples must be a mapping .* NoneType"),
    "samples a tensor": (lambda: reverse(torch.zeros(4, 3)), "must be a mapping .* got Tensor"),
    "samples of no chain": (lambda: reverse({"z": torch.zeros(0, 3)}), "K >= 1 posterior samples"),
    "samples NaN": (
        lambda: reverse({"z": torch.full((4, 3), NAN)}),
        '"z" lies outside its support',
    ),
    "samples infinite": (lambda: reverse({"z": torch.full((4, 3), INF)}), r"\['z', 'x'\]"),
    # --- losses ---
    "IWAE of a fraction": (lambda: IWAE(8.5), "num_particles must be an integer, got 8.5"),
    "IWAE of True": (lambda: IWAE(True), "num_particles must be an integer, got True"),
    "TVO of a float": (lambda: TVO(8.0), "num_particles must be an integer, got 8.0"),
    "EUBO of a fraction": (lambda: EUBO(2.5), "num_particles must be an integer, got 2.5"),
    "AIWAE of a string": (lambda: AIWAE("4"), "num_particles must be an integer, got '4'"),
    "AIWAE of half a step": (lambda: AIWAE(4, num_steps=0.5), "num_steps must be an integer"),
    "AIWAE of too few betas": (lambda: AIWAE(4, schedule=[0, 1]), "expected 5 betas"),
    "DifferentiableAIS of damping NaN": (
        lambda: DifferentiableAIS(4, damping=NAN),
        "damping must lie strictly between 0 and 1",
    ),
    "loss of nesting 'deep'": (
        lambda: IWAE(4, max_plate_nesting="deep"),
        "max_plate_nesting must be an integer, got 'deep'",
    ),
    "loss without a guide": (lambda: loss(IWAE(4), guide=None), "guide must be a Pyro guide"),
    "loss of no data": (lambda: loss(TVO(4), data=torch.zeros(0)), 'plate "data" has size 0'),
    "loss of NaN": (lambda: loss(IWAE(4), data=X * NAN), "Normal.* found invalid values"),
    "loss with a guide of another site": (
        lambda: loss(EUBO(4), guide=guided(lambda: dist.Normal(0.0, 1.0)), model=empty_site),
        'latent site "empty" of the model is not in the guide',
    ),
    # --- mutual information ---
    "critic a string": (lambda: mi.InfoNCE("inner"), "critic must be a function .* got 'inner'"),
    "critic of vectors": (
        lambda: estimate(mi.InfoNCE(lambda x, z: x * z)),
        r"critic returned shape \[6, 5, 2\] .* expected one score per pair, \[6, 5\]",
    ),
    "critic of other widths": (
        lambda: estimate(mi.InfoNCE(mi.ConcatCritic(3, 2))),
        "the critic was made for x_dim=3, got x of shape",
    ),
    "pairs unequal": (
        lambda: estimate(mi.InfoNCE(inner), z=PAIRS[1][:2]),
        r"same number N >= 1 of pairs .* \[6, 2\] and \[2, 2\]",
    ),
    "pairs of strings": (
        lambda: mi.InfoNCE(inner).estimate(np.array(["a", "b"]), PAIRS[1][:2]),
        "x must be a tensor or an array of numbers .* got ndarray",
    ),
    "pairs with NaN": (lambda: estimate(mi.InfoNCE(inner), z=PAIRS[1] * NAN), "z holds 12 NaN"),
    "pairs a fraction": (
        lambda: mi.AIS(mi.PyroJoint(rows, example=torch.zeros(1))).estimate(num_pairs=2.5),
        "num_pairs must be an integer, got 2.5",
    ),
    "prior of other events": (
        lambda: estimate(mi.BarberAgakov(dist.Normal(0.0, 1.0), encoder)),
        r"z has shape \[6, 2\], but the prior is over values of shape \[\]",
    ),
    "encoder without events": (
        lambda: estimate(mi.BarberAgakov(PRIOR, lambda x: dist.Normal(x / 2, 0.7))),
        r"the guide returned a distribution of batch shape \[6, 2\], expected \[N=6\]",
    ),
    "GIWAE of a fraction": (
        lambda: mi.GIWAE(PRIOR, encoder, inner, num_particles=2.5),
        "num_particles must be an integer, got 2.5",
    ),
    "AIS of half a chain": (
        lambda: mi.AIS(mi.PyroJoint(rows, example=torch.zeros(1)), num_chains=0.5),
        r"num_chains \(K\) must be an integer",
    ),
    "AIS without a likelihood": (lambda: mi.AIS(PRIOR), "AIS needs the full joint"),
    # --- energy-inspired models ---
    "SNIS of a fraction": (
        lambda: eim.SNIS(PRIOR, inner, num_samples=2.5),
        "num_samples must be an integer of at least 1, got 2.5",
    ),
    "TRS above one": (
        lambda: eim.TRS(PRIOR, lambda x: x.square().sum(-1) + 1, num_trials=4).log_prob(
            torch.zeros(2, dtype=PRIOR.mean.dtype)
        ),
        "log_accept must be at most 0",
    ),
    "energy of vectors": (
        lambda: eim.SNIS(PRIOR, lambda x: x, num_samples=4).log_prob(
            torch.zeros(2, dtype=PRIOR.mean.dtype)
        ),
        r"returned shape \[2\] for values of shape \[2\]",
    ),
    # --- functions of log-weights ---
    "weights a list": (
        lambda: weights.log_mean_exp([0.0]),
        "log_weights must be a tensor .* list",
    ),
    "weights of no chain": (lambda: weights.log_mean_exp(torch.zeros(0)), r"K >= 1: .* got \[0\]"),
    "weights NaN resampled": (
        lambda: weights.resample_indices(torch.tensor([0.0, NAN]), 2),
        "log_weights hold NaN",
    ),
    "2.5 resamples": (
        lambda: weights.resample_indices(torch.zeros(2), 2.5),
        "num_samples must be an integer, got 2.5",
    ),
    "level 95": (lambda: bounds.interval(X, X, 95), "strictly between 0 and 1, got 95"),
    "level a string": (lambda: bounds.interval(X, X, "95%"), "level must be a number, got '95%'"),
    "Bennett of one side": (
        lambda: bounds.bennett(X[:0], X),
        "at least one chain of each direction",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_names_the_culprit(name):
    call, message = REFUSED[name]
    # ValueError by the package; RuntimeError and TypeError pass from Pyro and Python unchanged.
    with pytest.raises((ValueError, RuntimeError, TypeError), match="(?s)" + message):
        call()


# --- input that looks bad and has a right answer ---

ROWS = stats.norm(0.0, math.sqrt(2.0)).logpdf


def quad(likelihood, low=-12.0, high=12.0, prior=stats.norm.pdf, points=()):
    value, _ = integrate.quad(
        lambda z: prior(z) * likelihood(z),
        low,
        high,
        points=points or None,
        epsabs=1e-12,
        limit=500,
    )
    return math.log(value)


def likelihood_of(scale=1.0, at=lambda z: z):
    return lambda z: stats.norm(at(z), scale).pdf(0.4)


def shared_truth(x):
    return stats.multivariate_normal(np.zeros(len(x)), np.eye(len(x)) + 1.0).logpdf(x)


def in_inference_mode():
    with torch.inference_mode():
        return run(num_chains=128, num_steps=20)


def made_in_inference_mode():
    with torch.inference_mode():
        return X * 1.0


def with_empty_site(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("empty", dist.Normal(torch.zeros(0), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z, 1.0), obs=x[0])


def plate_of_scalar(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(z, 1.0), obs=x[0])


def all_masked(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3), poutine.mask(mask=torch.zeros(3, dtype=torch.bool)):
        pyro.sample("y", dist.Bernoulli(logits=z), obs=torch.full((3,), -1.0))


def some_masked(x):  # -1 marks a missing value, which lies outside the support
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    values = torch.tensor([1.0, -1.0, 0.0])
    with pyro.plate("data", 3), poutine.mask(mask=values >= 0):
        pyro.sample("y", dist.Bernoulli(logits=z), obs=values)


def gray_pixels(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Bernoulli(logits=z, validate_args=False), obs=torch.tensor(0.5))


def moving_support(x):  # Pareto's density below its scale is finite in torch, and zero in truth
    z = pyro.sample("z", dist.Uniform(0.0, 1.0))
    pyro.sample("y", dist.Pareto(z, 2.0), obs=torch.tensor(0.5))


def numpy_inside(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(torch.as_tensor(np.tanh(z.detach().numpy())), 1.0), obs=x[0])


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))

    def forward(self, x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(self.weight[0] * z, 1.0), obs=x[0])


def half():
    return dist.Normal(torch.zeros((), dtype=HALF), torch.ones((), dtype=HALF))


def on_rows(data):
    return lambda: (
        run(data=data, num_chains=128, num_steps=20),
        ROWS(data.detach().double().numpy()),
    )


def of(model, truth, **options):
    options = {"num_chains": 128, "num_steps": 20} | options
    return lambda: (run(model, **options), truth() if callable(truth) else truth)


ANSWERED = {
    "K a NumPy integer": lambda: (run(num_chains=np.int64(128)), ROWS(X)),
    "K a tensor": lambda: (run(num_chains=torch.tensor(128)), ROWS(X)),
    "betas of integers": of(rows, ROWS(X), schedule=torch.tensor([0, 1])),
    "betas that require gradients": of(
        rows, ROWS(X), schedule=torch.linspace(0, 1, 9).requires_grad_()
    ),
    "step size per datum": of(rows, ROWS(X), step_size=torch.tensor([0.3, 0.5, 0.9])),
    "seed negative": of(rows, ROWS(X), seed=-1),
    "data of integers": on_rows(torch.tensor([0, 2, -1])),
    "data float16": on_rows(X.half()),
    "data bfloat16": on_rows(X.bfloat16()),
    "data float32": on_rows(X.float()),
    "data expanded": on_rows(X[1].expand(3)),
    "data with strides": on_rows(torch.arange(-3.0, 3.0)[::2]),
    "data that require gradients": on_rows(X.clone().requires_grad_()),
    "data from a computation": on_rows(X.clone().requires_grad_() * 1.0),
    "data denormal": on_rows(X * 1e-310),
    "data from inference mode": on_rows(made_in_inference_mode()),
    "run in inference mode": lambda: (in_inference_mode(), ROWS(X)),
    "observation a number": of(
        one(lambda z, x: (dist.Normal(z, 1.0), 0.4)), stats.norm(0, math.sqrt(2)).logpdf(0.4)
    ),
    "hard constraint by a factor": of(
        one(normal, factor=lambda z: torch.where(z > 0, 0.0, -INF)),
        lambda: quad(likelihood_of(), low=0.0),
        num_chains=512,
    ),
    "likelihood constant": of(seen(lambda z: dist.Bernoulli(0.6 + 0.0 * z), 1.0), math.log(0.6)),
    "likelihood constant, fitted": of(
        seen(lambda z: dist.Bernoulli(0.6 + 0.0 * z), 1.0), math.log(0.6), guide="auto"
    ),
    "likelihood of a detached latent": of(
        seen(lambda z: dist.Normal(z.detach(), 1.0), 0.4), stats.norm(0, math.sqrt(2)).logpdf(0.4)
    ),
    "likelihood undefined for half of the prior": of(
        seen(lambda z: dist.Normal(z.log(), 1.0), 0.4),
        lambda: quad(lambda z: stats.norm(np.log(z), 1.0).pdf(0.4), low=1e-12),
        num_chains=512,
    ),
    "gradient undefined for half of the prior": of(
        seen(lambda z: dist.Normal(torch.where(z > 0, z.sqrt(), 0.0 * z), 1.0), 0.4),
        lambda: quad(likelihood_of(at=lambda z: np.sqrt(max(z, 0.0))), points=(0.0,)),
        num_chains=512,
    ),
    "likelihood that overflows for half of the prior": of(
        seen(lambda z: dist.Normal((500 * z).exp(), 1.0), 0.4),
        lambda: quad(
            likelihood_of(at=lambda z: np.exp(min(500 * z, 300.0))), points=(-0.01, 0.0, 0.01)
        ),
        num_chains=512,
    ),
    "support bounded by a latent": of(
        one(lambda z, x: (dist.Uniform(0.0, z), x[0]), lambda: dist.Uniform(0.0, 1.0)),
        math.log(-math.log(0.4)),
        num_chains=512,
    ),
    "density finite outside a moving support": of(
        moving_support,
        math.log(2.0 / 0.5**3 * 0.5**3 / 3.0),  # integral over z < 0.5 of 2 z^2 / y^3
        num_chains=512,
    ),
    "heavy tails": of(
        one(normal, lambda: dist.Cauchy(0.0, 1.0)),
        lambda: quad(likelihood_of(), -60.0, 60.0, stats.cauchy.pdf),
        num_chains=512,
    ),
    "empty latent beside a full one": of(with_empty_site, stats.norm(0, math.sqrt(2)).logpdf(0.4)),
    "one value for a plate of three": of(plate_of_scalar, shared_truth([0.4] * 3)),
    "everything masked": of(all_masked, 0.0),
    "missing values masked": of(
        some_masked, lambda: quad(lambda z: math.exp(-z) / (1 + math.exp(-z)) ** 2)
    ),
    "gray pixels, validation off": of(
        gray_pixels, lambda: quad(lambda z: math.exp(-z / 2) / (1 + math.exp(-z)))
    ),
    "latent float16": of(
        one(lambda z, x: (dist.Normal(z, 1.0), x[0].half()), half),
        stats.norm(0, math.sqrt(2)).logpdf(float(X[0].half())),
        step_size=0.5,
        num_chains=64,
    ),
    "module with parameters": of(Decoder(), stats.norm(0, math.sqrt(5)).logpdf(0.4)),
    "guide that observes": of(
        shared,
        shared_truth(X),
        guide=lambda x: (
            pyro.sample("z", dist.Normal(0.0, 1.0)),
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0)),
        ),
    ),
    "guide scaled": of(
        shared,
        shared_truth(X),
        guide=poutine.scale(guided(lambda: dist.Normal(0.0, 1.0)), scale=2.0),
    ),
    "guide masked": of(
        shared,
        shared_truth(X),
        guide=poutine.mask(guided(lambda: dist.Normal(0.0, 1.0)), mask=torch.tensor(False)),
    ),
    "guide with a factor": of(
        shared,
        shared_truth(X),
        guide=lambda x: (
            pyro.sample("z", dist.Normal(0.0, 1.0)),
            pyro.factor("f", torch.tensor(1.0)),
        ),
    ),
    "guide without the plate": of(
        rows,
        ROWS(X).sum(),
        guide=lambda x: pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0)),
    ),
    "guide float32": of(
        shared,
        shared_truth(X),
        guide=guided(lambda: dist.Normal(torch.zeros((), dtype=torch.float32), 1.0)),
    ),
    "prior_weight without a guide": of(rows, ROWS(X), prior_weight=0.5),
}


SLOW = {  # like others that are answered
    "K a NumPy integer",
    "seed negative",
    "data bfloat16",
    "data with strides",
    "data from a computation",
    "observation a number",
    "guide scaled",
    "guide with a factor",
}
assert SLOW <= set(ANSWERED)


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in ANSWERED]
)
@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")  # half of them start badly
def test_input_that_looks_bad_gets_the_right_answer(name):
    result, truth = ANSWERED[name]()
    assert result.lower.shape == np.shape(truth)
    error = (result.lower - torch.as_tensor(truth)).abs()
    # half of the variance over K is the bias of the logarithm
    allowed = 5.0 * result.std_error + result.std_error.square() + 1e-3
    assert bool((error <= allowed).all()), (result.lower, truth, result.std_error)
    assert float(result.std_error.max()) < 0.1


def test_samples_that_fit_after_conversion():
    ais = AnnealedImportance(rows, num_chains=4, num_steps=3, progress_bar=False, seed=0)
    samples = {"z": torch.tensor([[0, 1, 0], [1, 0, -1]])}
    variants = [
        samples["z"].double(),
        samples["z"],
        samples["z"].float(),
        samples["z"].numpy(),
        samples["z"].double().requires_grad_(),
    ]
    runs = [ais.run_reverse({"z": value}, X, exact=True).upper for value in variants]
    assert all(torch.equal(value, runs[0]) for value in runs[1:])


@pytest.mark.filterwarnings("ignore::pyro_anneal.AnnealingWarning")
def test_simulated_data_do_not_depend_on_values_that_are_replaced():
    plain = sandwich(data=X)
    for data in (X * NAN, X.clone().requires_grad_(), X.to(torch.int64)):
        assert torch.equal(sandwich(data=data).lower, plain.lower)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the density is evaluated slowly")
def test_a_likelihood_in_numpy_is_slow_and_right():
    result = run(numpy_inside, num_chains=64, num_steps=4)
    truth = quad(likelihood_of(at=np.tanh))
    assert result.density_mode == "eager"
    assert abs(float(result.lower) - truth) <= 5.0 * float(result.std_error) + 1e-3


def test_counts_know_integers_of_all_kinds():
    for value in (3, np.int32(3), np.int64(3), torch.tensor(3)):
        assert type(as_count("n", value)) is int
