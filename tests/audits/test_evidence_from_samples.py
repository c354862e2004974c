"""Evidence from posterior draws: closed forms, both identities, containers, and what is flagged."""

import math
import warnings
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES
from pyro.infer import MCMC, NUTS
from scipy import stats

from pyro_anneal import AnnealingWarning, EvidenceFromSamples, evidence_from_samples
from pyro_anneal.audits.bridge import bridge, pareto_k, series_ess, truncated_harmonic_mean

QUICK = {"seed": 0, "progress_bar": False}


def counts(y):
    """Poisson counts with a Gamma rate: skewed, the posterior and the evidence are closed forms."""
    with pyro.plate("data", len(y)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
        pyro.sample("y", dist.Poisson(rate), obs=y)


def counts_evidence(y):
    return stats.nbinom(2.0, 0.5 / 1.5).logpmf(y.numpy())


def counts_draws(y, *shape):
    return {"rate": dist.Gamma(2.0 + y, 1.5).sample(shape)}


def shared(y):
    rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


Y = torch.tensor([0.0, 3.0, 11.0])
# log of the integral of Gamma(2, .5) times three Poisson densities
SHARED_EVIDENCE = (
    2.0 * math.log(0.5)
    - math.lgamma(2.0)
    + math.lgamma(16.0)
    - 16.0 * math.log(3.5)
    - sum(math.lgamma(1.0 + v) for v in (0, 3, 11))
)


def shared_draws(*shape):
    return {"rate": dist.Gamma(16.0, 3.5).sample(shape)}


def test_closed_form_per_datum():
    torch.manual_seed(0)
    draws = counts_draws(Y, 3000)
    found = evidence_from_samples(counts, draws, Y, exact=True, num_steps=50, **QUICK)
    truth = torch.as_tensor(counts_evidence(Y))
    for name, (value, error) in found._estimates().items():
        assert value.shape == (3,)
        assert bool(((value - truth).abs() < 5.0 * error + 1e-3).all()), name
        assert bool((error < 0.06).all()), name
    low, high = found.interval()
    assert bool(((low < truth) & (truth < high) & (high - low < 1.5)).all())
    assert found.verdict == "ok"
    assert set(found.sides) == {"lower", "upper"}


def test_both_identities():
    """E[e^L] = Z and E[e^-U] = 1 / Z at two steps from a base of few draws."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AnnealingWarning)
        found = evidence_from_samples(
            shared, shared_draws(4000), Y, exact=True, num_chains=2000, num_steps=2, **QUICK
        )
    forward = (found.forward.log_weights - SHARED_EVIDENCE).exp()
    backward = (SHARED_EVIDENCE - found.reverse.log_weights).exp()
    for ratio in (forward, backward):
        error = ratio.std() / math.sqrt(len(ratio))
        assert abs(ratio.mean() - 1.0) < 5.0 * error
        assert 1e-4 < error < 0.05


@pytest.mark.slow
def test_many_dimensions():
    """150 dimensions: a base of low rank, and the truth between the bounds."""

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(150), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    torch.manual_seed(5)
    x = 1.1 * torch.randn(150)
    truth = dist.Normal(0.0, math.sqrt(1.25)).log_prob(x).sum()
    draws = {"z": 0.8 * x + math.sqrt(0.2) * torch.randn(1500, 150)}
    found = evidence_from_samples(model, draws, x, exact=True, num_steps=100, **QUICK)
    assert "low rank" in found.base
    assert abs(found.estimate.value - truth) < 5.0 * found.estimate.std_error < 0.15
    low, high = found.interval()
    assert low < truth < high


def test_a_sampler_of_one_tail_is_contradicted():
    """Draws of the upper third alone: the bridge is wrong, annealing is not, and it says so."""
    torch.manual_seed(2)
    draws = shared_draws(6000)["rate"]
    draws = {"rate": draws[draws > stats.gamma(16.0, scale=1 / 3.5).ppf(2 / 3)]}
    with pytest.warns(AnnealingWarning) as warned:
        found = evidence_from_samples(shared, draws, Y, num_steps=100, **QUICK)
    assert any("contradict each other" in str(warning.message) for warning in warned)
    assert found.verdict == "failed"
    assert abs(found.lower - SHARED_EVIDENCE) < 5.0 * found.std_error + 0.01
    assert abs(found.estimate.value - SHARED_EVIDENCE) > 0.1


@pytest.mark.slow
def test_chains_apart_are_flagged():
    torch.manual_seed(3)
    draws = shared_draws(2, 500)["rate"].sort().values
    draws = torch.stack([draws[0, :250], draws[1, 250:]])  # one chain low, one high
    draws = draws[:, torch.randperm(250)]
    with pytest.warns(AnnealingWarning) as warned:
        found = evidence_from_samples(shared, {"rate": draws}, Y, num_steps=50, **QUICK)
    assert any("have not mixed" in str(warning.message) for warning in warned)
    assert found.r_hat > 1.5
    assert found.verdict != "ok"


@pytest.fixture(scope="module")
def grouped():
    torch.manual_seed(4)
    return shared_draws(2, 400)


def test_containers_agree(grouped):
    mcmc = SimpleNamespace(get_samples=lambda group_by_chain: grouped)
    arrays = {name: value.numpy() for name, value in grouped.items()}
    results = [
        evidence_from_samples(shared, samples, Y, num_steps=5, num_chains=16, **QUICK)
        for samples in (grouped, arrays, mcmc)
    ]
    for found in results[1:]:
        assert torch.equal(found.lower, results[0].lower)
        assert torch.equal(found.bridge, results[0].bridge)


def test_arviz_containers(grouped):
    arviz = pytest.importorskip("arviz")
    arrays = {name: value.numpy() for name, value in grouped.items()}
    try:
        data = arviz.from_dict(posterior=arrays)
    except TypeError:  # ArviZ 1
        data = arviz.from_dict({"posterior": arrays})
    first, second = (
        evidence_from_samples(shared, samples, Y, num_steps=5, num_chains=16, **QUICK)
        for samples in (grouped, data)
    )
    assert torch.equal(first.bridge, second.bridge)


def test_file_frame_and_picture(grouped, tmp_path):
    found = evidence_from_samples(shared, grouped, Y, num_steps=5, num_chains=16, **QUICK)
    found.save(tmp_path / "evidence.npz")
    again = EvidenceFromSamples.load(tmp_path / "evidence.npz")
    assert again.summary() == found.summary()
    assert torch.equal(again.bridge, found.bridge)
    pytest.importorskip("pandas")
    assert found.to_dataframe()["bridge"].item() == found.estimate.value.item()
    pytest.importorskip("matplotlib")
    labels = [text.get_text() for text in found.plot().axes[0].get_yticklabels()]
    assert labels == ["annealed lower bound", "bridge sampling", "truncated harmonic mean"]


def test_upper_needs_exact_draws(grouped):
    found = evidence_from_samples(shared, grouped, Y, num_steps=5, num_chains=16, **QUICK)
    assert found.interval()[1] == torch.inf
    with pytest.raises(ValueError, match="only exact posterior draws"):
        _ = found.upper


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"other": torch.ones(50)}, r"no draws of the latent site\(s\) \['rate'\]"),
        ({"rate": torch.ones(50, 2)}, r'site "rate" have shape \[50, 2\].*\[N\], or.*\[C, N\]'),
        ({"rate": torch.ones(19)}, "at least 20 draws, got 19"),
        ({"rate": -torch.ones(50)}, 'site "rate" lie outside its support'),
        (torch.ones(50), "samples must be a mapping"),
        ({"rate": torch.ones(50)}, "do not vary"),
    ],
)
def test_errors_name_what_is_wrong(samples, message):
    if message.startswith('site "rate" have'):
        samples = {"rate": torch.ones(50, 2, 3)}
        message = (
            r'site "rate" have shape \[50, 2, 3\], expected \[N\], or grouped by chain \[C, N\]'
        )
    with pytest.raises(ValueError, match=message):
        evidence_from_samples(shared, samples, Y, **QUICK)


def test_a_parameter_named_as_an_option():
    def model(y, exact=None):
        shared(y)

    with pytest.raises(ValueError, match=r"takes \['exact'\] as its own"):
        evidence_from_samples(model, shared_draws(50), Y, **QUICK)


def test_discrete_latents_are_refused():
    def model(y):
        k = pyro.sample("k", dist.Poisson(3.0))
        pyro.sample("y", dist.Normal(k, 1.0), obs=y)

    with pytest.raises(ValueError, match="discrete ones"):
        evidence_from_samples(model, {"k": torch.ones(50)}, torch.tensor(1.0), **QUICK)


def test_the_bridge_is_right_and_knows_its_error():
    """Two Gaussians of other width, 300 times: bias and spread against the standard error."""
    generator = torch.Generator().manual_seed(0)
    target = torch.distributions.Normal(0.7, 0.6)
    log_z = 3.0

    def ratio(u):
        return log_z + target.log_prob(u) - torch.distributions.Normal(0.0, 1.0).log_prob(u)

    values, errors = [], []
    for _ in range(300):
        proposals = torch.randn(200, generator=generator)
        draws = 0.7 + 0.6 * torch.randn(1, 150, generator=generator)
        found = bridge(ratio(proposals), ratio(draws), independent=True)
        values.append(found.value)
        errors.append(found.std_error)
    scores = (torch.stack(values) - log_z) / torch.stack(errors)
    assert abs(scores.mean()) < 5.0 / math.sqrt(300)
    assert 0.85 < scores.std() < 1.15


@pytest.mark.slow
def test_the_bridge_counts_dependent_draws():
    """Of an autoregression the error is that of the effective number, not of the draws."""
    generator = torch.Generator().manual_seed(1)
    scores = []
    for _ in range(200):
        noise = torch.randn(4, 400, generator=generator)
        chains = [noise[:, 0]]
        for t in range(1, 400):
            chains.append(0.9 * chains[-1] + math.sqrt(1 - 0.81) * noise[:, t])
        draws = 0.7 + 0.6 * torch.stack(chains, 1)
        proposals = torch.randn(1600, generator=generator)
        target, base = dist.Normal(0.7, 0.6), dist.Normal(0.0, 1.0)
        found = bridge(
            target.log_prob(proposals) - base.log_prob(proposals),
            target.log_prob(draws) - base.log_prob(draws),
        )
        scores.append(found.value / found.std_error)
    assert 0.75 < torch.stack(scores).std() < 1.3


def test_harmonic_mean_of_a_gaussian():
    generator = torch.Generator().manual_seed(2)
    white = torch.randn(2, 4000, 3, generator=generator)
    log_joint = -1.5 + dist.Normal(0.0, 1.0).log_prob(white).sum(-1)
    found = truncated_harmonic_mean(log_joint, white, torch.zeros(()), independent=True)
    assert abs(found.value + 1.5) < 5.0 * found.std_error < 0.1


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_pareto_k_of_pareto_weights(k):
    uniform = torch.rand(20000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert abs(pareto_k(-k * uniform.log()) - k) < 0.2


def test_effective_size_of_an_autoregression():
    generator = np.random.default_rng(0)
    series = np.zeros((4, 5000))
    for t in range(1, 5000):
        series[:, t] = 0.5 * series[:, t - 1] + generator.normal(size=4)
    found = series_ess(torch.as_tensor(series))
    assert abs(found / 20000 - 1.0 / 3.0) < 0.05  # (1 - .5) / (1 + .5)


def _nuts(case, count, *, chains=2):
    pyro.set_rng_seed(0)
    parts = []
    for _ in range(chains):
        nuts = NUTS(case.model, full_mass=True)
        mcmc = MCMC(nuts, num_samples=count, warmup_steps=400, disable_progbar=True)
        mcmc.run(*case.args)
        parts.append(mcmc.get_samples())
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["E17 dogs", "E34 sblri"])
def test_nuts_on_posteriordb(name):
    case = CASES[name]()
    draws = _nuts(case, 500)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AnnealingWarning)
        found = evidence_from_samples(case.model, draws, *case.args, **QUICK)
    assert abs(found.estimate.value - case.truth) < 0.05
    assert abs(found.lower - case.truth) < 0.05
    warned = {d.name for d in found.diagnostics if d.severity == "warning"}
    assert warned <= {"few_draws"}  # sigma of E34 moves slowly


@pytest.mark.parametrize("shift", [-2000.0, 2000.0])
def test_errors_do_not_depend_on_the_size_of_the_evidence(shift):
    """exp(2000) and exp(-2000) are no numbers; the evidence of a thousand data is one of them."""
    torch.manual_seed(0)
    proposals, draws = torch.randn(400).double(), 0.5 + torch.randn(2, 200).double()
    plain, moved = bridge(proposals, draws), bridge(proposals + shift, draws + shift)
    assert float(moved.value - shift) == pytest.approx(float(plain.value), abs=1e-8)
    assert float(moved.std_error) == pytest.approx(float(plain.std_error), rel=1e-6)
    white = torch.randn(2, 200, 3).double()
    log_joint, scale = -0.5 * white.square().sum(-1), torch.zeros((), dtype=torch.float64)
    plain = truncated_harmonic_mean(log_joint, white, scale)
    moved = truncated_harmonic_mean(log_joint + shift, white, scale)
    assert float(moved.value - shift) == pytest.approx(float(plain.value), abs=1e-8)
    assert float(moved.std_error) == pytest.approx(float(plain.std_error), rel=1e-6)
