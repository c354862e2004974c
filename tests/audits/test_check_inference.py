"""Audits on models whose posterior is known: exact samplers pass, wrong ones fail, both for a reason."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoNormal
from scipy import stats

from pyro_anneal import AnnealingWarning, InferenceCheck, check_inference
from pyro_anneal.audits.uniformity import divergence_limit, rank, uniformity_p_value

QUICK = {"seed": 0, "progress_bar": False}
X = torch.tensor([2.0, -1.0])


def audit(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AnnealingWarning)
        return check_inference(*args, **QUICK, **kwargs)


def conjugate(x):
    """Two means of other prior widths, one datum each: the posterior is N(shrink x, sd)."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), torch.tensor([1.0, 3.0])).to_event(1))
    with pyro.plate("data", 2):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


SHRINK = torch.tensor([0.5, 0.9])
SD = SHRINK.sqrt()


def guide_of(width):
    def guide(x):
        pyro.sample("z", dist.Normal(SHRINK * x, width * SD).to_event(1))

    return guide


def draws_of(width, *, shift=0.0, fold=False, count=80):
    def inference(x):
        noise = torch.randn(count, 2)
        noise = noise.abs() if fold else noise
        return {"z": SHRINK * x + SD * (width * noise + shift)}

    return inference


def jeffreys_of(width):
    """KL both ways between N(0, w) and N(0, 1), twice for two dimensions."""
    return 2.0 * (0.5 * (width**2 + width**-2) - 1.0)


@pytest.mark.parametrize("inference", [guide_of(1.0), draws_of(1.0)], ids=["guide", "draws"])
def test_exact_inference_is_ok(inference):
    found = check_inference(conjugate, inference, X, num_simulations=60, **QUICK)
    assert found.verdict == "ok"
    assert found.ranks["z"].shape == (60, 2)
    assert found.ranks["log_joint"].shape == (60,)
    lower, upper, _, error = found.jeffreys
    assert lower < 1e-6
    assert abs(upper) < 5.0 * error + 0.2 if not found.is_guide else abs(upper) < 1e-6


@pytest.mark.parametrize("width", [0.6, pytest.param(1.6, marks=pytest.mark.slow)])
def test_divergence_of_a_guide_is_bounded(width):
    found = audit(conjugate, guide_of(width), X, num_simulations=60)
    lower, upper, below, above = found.jeffreys
    truth = jeffreys_of(width)
    assert abs(upper - truth) < 5.0 * above  # unbiased
    assert 0.3 * truth < lower < truth + 5.0 * below
    assert found.verdict == "failed"


@pytest.mark.parametrize(
    "inference",
    [
        draws_of(0.5),
        pytest.param(draws_of(2.0), marks=pytest.mark.slow),
        pytest.param(draws_of(1.0, shift=1.0), marks=pytest.mark.slow),
        draws_of(1.0, fold=True),
    ],
    ids=["narrow", "wide", "shifted", "half"],
)
def test_wrong_inference_fails(inference):
    with pytest.warns(AnnealingWarning):
        found = check_inference(conjugate, inference, X, num_simulations=60, **QUICK)
    assert found.verdict == "failed"


def test_wrong_dependence_shows_in_the_joint_density():
    """Marginals are right, and the correlation of the posterior is lost: only log p(x, z) sees it."""

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(), 0.1), obs=x)

    covariance = torch.eye(2) - torch.ones(2, 2) / 2.01

    def independent(x):
        return {"z": x / 2.01 + covariance.diagonal().sqrt() * torch.randn(80, 2)}

    found = audit(model, independent, torch.tensor(1.0), num_simulations=60)
    assert found.verdict == "failed"
    assert bool((found.adjusted_p_values["z"] > 0.03).all())
    assert found.adjusted_p_values["log_joint"] < 1e-3


SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])  # Rubin (1981)
SCHOOLS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])


def schools(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, SIGMA), obs=y)


def schools_sampler(least=0.0):
    """Exact draws: tau on a grid of its quantiles with all else integrated out, then the rest."""
    edge = stats.halfcauchy(scale=5.0).cdf(least)
    grid = torch.as_tensor(
        stats.halfcauchy(scale=5.0).ppf(edge + (1.0 - edge) * (torch.arange(4000) + 0.5) / 4000)
    )

    def inference(y, count=80):
        variance = grid.unsqueeze(-1).square() + SIGMA.square()
        precision = (1.0 / variance).sum(-1) + 1.0 / 25.0
        mean = (y / variance).sum(-1) / precision
        log_weight = -0.5 * variance.log().sum(-1) - 0.5 * precision.log()
        log_weight = log_weight - 0.5 * (y.square() / variance).sum(-1)
        log_weight = log_weight + 0.5 * mean.square() * precision
        index = torch.multinomial(log_weight.softmax(0), count, replacement=True)
        tau = grid[index]
        mu = mean[index] + precision[index].rsqrt() * torch.randn(count)
        inner = tau.square().reciprocal().unsqueeze(-1) + SIGMA.square().reciprocal()
        centre = (mu / tau.square()).unsqueeze(-1) + y / SIGMA.square()
        theta = centre / inner + inner.rsqrt() * torch.randn(count, 8)
        return {"mu": mu, "tau": tau, "theta": theta}

    return inference


def test_eight_schools_exact_and_cut():
    """Draws with tau > 4 alone: reverse annealing finds the right evidence from them; this does not."""
    exact = audit(schools, schools_sampler(), SCHOOLS, num_simulations=60)
    assert exact.verdict == "ok"
    cut = audit(schools, schools_sampler(4.0), SCHOOLS, num_simulations=60)
    assert cut.verdict == "failed"
    assert cut.adjusted_p_values["tau"] < 1e-4


def test_hyperparameters_held_at_the_fit():
    """With tau held, pyro programs inside see it held, and all sites else are audited."""
    seen = []

    def gibbs_like(y):
        trace = poutine.trace(schools).get_trace(y)
        tau = trace.nodes["tau"]["value"]
        seen.append(float(tau))
        variance = tau.square() + SIGMA.square()
        precision = (1.0 / variance).sum() + 1.0 / 25.0
        mu = (y / variance).sum() / precision + precision.rsqrt() * torch.randn(80)
        inner = tau.square().reciprocal() + SIGMA.square().reciprocal()
        centre = mu.unsqueeze(-1) / tau.square() + y / SIGMA.square()
        return {"mu": mu, "theta": centre / inner + inner.rsqrt() * torch.randn(80, 8)}

    options = {"num_simulations": 60, "simulate_from": {"tau": 3.0}}
    found = check_inference(schools, gibbs_like, SCHOOLS, **options, **QUICK)
    assert set(seen) == {3.0}
    assert set(found.ranks) == {"mu", "theta", "log_joint"}
    assert found.verdict == "ok"
    with pytest.raises(ValueError, match='its own draws of site "tau"'):
        audit(schools, schools_sampler(), SCHOOLS, **options)
    with pytest.raises(ValueError, match=r"names \['sigma'\], but the model's latent sites are"):
        audit(schools, gibbs_like, SCHOOLS, simulate_from={"sigma": 1.0})


@pytest.mark.slow
def test_data_in_a_closure_reach_pyro_programs():
    def model():
        conjugate(X)

    def inference():
        trace = poutine.trace(model).get_trace()
        x = trace.nodes["x"]["value"]
        assert not torch.equal(x, X)
        return draws_of(1.0)(x)

    assert audit(model, inference, num_simulations=50).verdict == "ok"


def _few_draws(model, *args):
    nuts = NUTS(model, max_tree_depth=3)
    mcmc = MCMC(nuts, num_samples=20, warmup_steps=5, disable_progbar=True)
    mcmc.run(*args)
    return mcmc


def test_mcmc_is_told_what_handlers_hold():
    """MCMC hides its model from handlers: an error says so, and a parameter ``model`` mends it."""
    options = {"num_simulations": 2, "simulate_from": {"tau": 3.0}}
    with pytest.raises(ValueError, match=r'its own draws of site "tau".*keyword parameter model'):
        audit(schools, lambda y: _few_draws(schools, y), SCHOOLS, **options)
    found = audit(schools, lambda y, model: _few_draws(model, y), SCHOOLS, **options)
    assert set(found.ranks) == {"mu", "theta", "log_joint"}

    def closure():
        conjugate(X)

    with pytest.raises(ValueError, match=r"did not read the simulated value of \['x'\]"):
        audit(closure, lambda: _few_draws(closure), num_simulations=2)
    read = []

    def inference(model):
        read.append(poutine.trace(model).get_trace().nodes["x"]["value"])
        return _few_draws(model)

    audit(closure, inference, num_simulations=2)
    assert len(read) == 2
    assert not any(torch.equal(x, X) for x in read)


@pytest.mark.slow
def test_a_guide_fitted_to_other_data_fails():
    """An AutoGuide does not look at its arguments: what was fitted to one x is wrong for another."""
    pyro.clear_param_store()
    guide = AutoNormal(conjugate)
    guide(X)
    assert audit(conjugate, guide, X, num_simulations=30).verdict == "failed"


def test_a_point_mass_fails():
    found = audit(conjugate, lambda x: {"z": (SHRINK * x).expand(20, 2)}, X, num_simulations=30)
    assert found.verdict == "failed"
    assert found.jeffreys.upper == torch.inf


def test_seed_file_frame_and_picture(tmp_path):
    found = audit(conjugate, draws_of(0.5), X, num_simulations=20)
    again = audit(conjugate, draws_of(0.5), X, num_simulations=20)
    assert torch.equal(found.ranks["z"], again.ranks["z"])
    found.save(tmp_path / "audit.npz")
    loaded = InferenceCheck.load(tmp_path / "audit.npz")
    assert loaded.summary() == found.summary()
    assert torch.equal(loaded.uniforms["z"], found.uniforms["z"])
    pytest.importorskip("pandas")
    assert list(found.to_dataframe().index) == ["z[0]", "z[1]", "log_joint"]
    pytest.importorskip("matplotlib")
    assert len([axes for axes in found.plot().axes if axes.get_title()]) == 3


def test_errors():
    with pytest.raises(ValueError, match="at least 4 draws per data set, got 3"):
        audit(conjugate, draws_of(1.0, count=3), X)
    with pytest.raises(ValueError, match="num_simulations"):
        audit(conjugate, draws_of(1.0), X, num_simulations=1)

    def discrete(x):
        k = pyro.sample("k", dist.Poisson(3.0))
        pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    with pytest.raises(ValueError, match="discrete ones"):
        audit(discrete, lambda x: {"k": torch.ones(50)}, torch.tensor(1.0))


def test_p_values_are_uniform():
    """Of 4000 uniform samples of 40, shares below a level, which thrice the least may not exceed."""
    uniforms = torch.rand(
        40, 4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    values = uniformity_p_value(uniforms)
    for level in (0.005, 0.05, 0.3):
        share, error = (values < level).double().mean(), math.sqrt(level / 4000)
        assert share < level + 4.0 * error
        assert share > 0.4 * level - 4.0 * error


@pytest.mark.parametrize("power", [0.5, 2.0])
def test_shape_statistic_is_that_of_kolmogorov(power):
    uniforms = torch.rand(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    uniforms = uniforms**power
    shape = stats.kstest(uniforms.numpy(), "uniform").pvalue
    scores = stats.norm.ppf(uniforms.numpy())
    location = 2.0 * stats.norm.sf(abs(scores.mean()) * math.sqrt(30))
    square = (scores**2).sum()
    spread = 2.0 * min(stats.chi2.cdf(square, 30), stats.chi2.sf(square, 30))
    expected = 3.0 * min(shape, location, spread)
    assert float(uniformity_p_value(uniforms)) == pytest.approx(min(expected, 1.0), rel=0.1)


def test_ties_rank_at_random():
    generator = torch.Generator().manual_seed(2)
    exact, draws = torch.zeros(5000), torch.zeros(9, 5000)
    ranks, uniforms = rank(exact, draws, generator)
    assert torch.bincount(ranks, minlength=10).min() > 400
    assert stats.kstest(uniforms.numpy(), "uniform").pvalue > 1e-4


def test_limit_stays_below_the_divergence():
    """Ranks with density 2u, of divergence (log 2 - 1/2) + (1 - log 2) = 1/2."""
    generator = torch.Generator().manual_seed(3)
    limits = [
        divergence_limit(torch.rand(100, 1, generator=generator, dtype=torch.float64).sqrt())
        for _ in range(300)
    ]
    assert sum(limit > 0.5 for limit in limits) <= 0.05 * 300 + 4 * math.sqrt(0.05 * 0.95 * 300)
    assert sum(limits) / 300 > 0.1
    even = [
        divergence_limit(torch.rand(100, 3, generator=generator, dtype=torch.float64))
        for _ in range(300)
    ]
    assert sum(limit > 0.0 for limit in even) <= 0.05 * 300 + 4 * math.sqrt(0.05 * 0.95 * 300)


@pytest.mark.slow
def test_rate_of_false_alarms():
    """At least 95 of 100 audits of an exact sampler say ok, and at most 3 say failed."""
    verdicts = []
    for seed in range(100):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AnnealingWarning)
            found = check_inference(conjugate, draws_of(1.0), X, seed=seed, progress_bar=False)
        verdicts.append(found.verdict)
    assert verdicts.count("ok") >= 95
    assert verdicts.count("failed") <= 3


@pytest.mark.slow
def test_nuts_is_ok():
    def nuts(x):
        mcmc = MCMC(NUTS(conjugate), num_samples=200, warmup_steps=100, disable_progbar=True)
        mcmc.run(x)
        return mcmc

    assert audit(conjugate, nuts, X, num_simulations=20).verdict == "ok"
