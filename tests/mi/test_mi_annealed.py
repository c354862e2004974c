"""AIS and MINE-AIS on joints of known mutual information."""

import math
import warnings
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from mi_problems import PROBLEMS, correlated_normal, linear_vae
from torch import nn

from pyro_anneal import AnnealedImportance, mi
from pyro_anneal.kernels import HMC, Info
from pyro_anneal.schedules import Linear


@dataclass(frozen=True)
class Perfect:
    """Draws exactly from the path between N(0, I) and a linear Gaussian posterior."""

    weights: torch.Tensor
    x: torch.Tensor
    num_gradients: int = 1
    target_accept: float | None = None

    def noise(self, state, generator):
        shape = state.position.shape
        return (torch.randn(shape, generator=generator, dtype=state.position.dtype),)

    def step(self, state, density, beta, tuning, noise):
        gram = self.weights.mT @ self.weights
        covariance = torch.linalg.inv(torch.eye(len(gram)) + beta * gram)
        mean = beta * self.x @ self.weights @ covariance
        new = density(mean + noise[0] @ torch.linalg.cholesky(covariance).mT)
        ones = torch.ones_like(new.log_base)
        return new, Info(accept_prob=ones, diverging=ones < 0)

    def reversal(self):
        return self


@pytest.mark.parametrize(
    ("num_steps", "lower", "upper"),
    [(1, 0.0, 976.2826), (10, 9.587615, 107.215877), (100, 18.983137, 28.745963)],
)
def test_perfect_transitions_give_the_closed_form(num_steps, lower, upper):
    """M02: the gap times T is tr W'W at every T."""
    problem = linear_vae()
    x, z = problem.joint.sample(1500)
    gain = (problem.joint.likelihood(torch.eye(10)).base_dist.loc).mT  # W, column by column
    bound = mi.AIS(
        problem.joint,
        num_chains=1,
        num_steps=num_steps,
        schedule=Linear(),
        step_size=1.0,
        kernel=Perfect(gain, x),
        lower="single",
        upper="single",
    )
    est = bound.estimate(x, z)
    assert abs(est.lower - lower) <= 5 * est.lower_std_error
    assert abs(est.upper - upper) <= 5 * est.upper_std_error


def sandwiches():
    """All problems with one pair of bounds, two of them with every pair; others are slow."""
    for kinds in (("CR", "IM"), ("IM", "CR"), ("IR", "IR")):
        for name in PROBLEMS:
            if name.startswith("linear"):
                continue  # has a test of its own
            is_default = kinds == ("CR", "IM") or name in ("dense normal 5 (M03)", "X (M08)")
            marks = () if is_default else pytest.mark.slow
            yield pytest.param(name, kinds, marks=marks, id=f"{name}-{'-'.join(kinds)}")


@pytest.mark.parametrize(("name", "kinds"), list(sandwiches()))
def test_ais_is_a_sandwich(name, kinds):
    """From an imperfect guide, with few steps and an HMC kernel."""
    problem = PROBLEMS[name]()
    bound = mi.AIS(
        problem.joint,
        problem.guide,
        num_chains=3,
        num_steps=15,
        lower=kinds[0],
        upper=kinds[1],
        posterior=lambda x, n: problem.posterior(x).sample((n,)),
    )
    est = bound.estimate(*problem.joint.sample(300))
    assert est.lower <= problem.truth + 5 * est.lower_std_error
    assert est.upper >= problem.truth - 5 * est.upper_std_error
    assert -0.05 < est.gap < 0.6
    assert est.measurements["accept_prob"] > 0.4


@pytest.mark.parametrize("num_chains", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_ais_on_the_linear_vae_from_the_prior(num_chains):
    """M01 (I = 22.735): bounds on log p(x) against its closed form, pair by pair."""
    problem = linear_vae()
    x, z = problem.joint.sample(40)
    bound = mi.AIS(problem.joint, num_chains=num_chains, num_steps=250)
    est = bound.estimate(x, z)
    exact = problem.log_ratio(x, z)
    below, above = exact - est.pair_lower, est.pair_upper - exact
    for deficit in (below, above):
        error = deficit.std() / math.sqrt(len(deficit))
        assert deficit.mean() > -5 * error
        assert deficit.mean() < 1.5
    # The sandwich is tight pair by pair, and the data's own error is reported.
    assert est.gap < 2.0 < 5 * est.lower_std_error


def test_one_step_is_barber_agakov_or_importance_sampling():
    problem = correlated_normal(0.425757, 2.0, d=20)
    x, z = problem.joint.sample(50)
    one = mi.AIS(problem.joint, problem.guide, num_chains=1, num_steps=1).estimate(x, z)
    ba = mi.BarberAgakov(problem.joint, problem.guide).estimate(x, z)
    torch.testing.assert_close(one.pair_lower, ba.pair_lower)
    # With K > 1, one step and exact reverse starts CR is still Barber-Agakov.
    many = mi.AIS(problem.joint, problem.guide, num_chains=5, num_steps=1).estimate(x, z)
    torch.testing.assert_close(many.pair_lower, ba.pair_lower)
    assert (many.measurements["IM lower"] > many.lower).item()


def test_the_terms_are_barber_agakov_of_the_base_and_what_annealing_adds():
    problem = correlated_normal(0.425757, 2.0, d=3)
    x, z = problem.joint.sample(50)
    ba = mi.BarberAgakov(problem.joint, problem.guide).estimate(x, z)
    est = mi.AIS(problem.joint, problem.guide, num_chains=4, num_steps=20).estimate(x, z)
    torch.testing.assert_close(est.terms["variational"], ba.lower)
    assert est.terms["contrastive"] > 0.0
    torch.testing.assert_close(est.terms["variational"] + est.terms["contrastive"], est.lower)


def test_the_one_liner_on_a_pyro_model():
    """I = 1/2 sum log(1 + w^2) for x = w z + noise, from a guide with a known BA bound."""
    weights = torch.tensor([3.0, 0.2])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(weights * z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.3 * x, 0.5).to_event(1))

    x = torch.zeros(300, 2)
    options = {"num_chains": 8, "num_steps": 100, "seed": 3, "progress_bar": False}
    truth = 0.5 * torch.log1p(weights**2).sum()
    est = AnnealedImportance(model, guide, **options).mutual_information(x)
    assert est.lower <= truth + 5 * est.lower_std_error
    assert est.upper >= truth - 5 * est.upper_std_error
    assert -0.02 < est.gap < 0.1
    # E log N(z; 0.3 x, 0.5) - E log N(z; 0, 1), with E (z - 0.3 x)^2 = (1 - 0.3 w)^2 + 0.09.
    error = (1.0 - 0.3 * weights) ** 2 + 0.09
    variational = (0.5 - 2.0 * error + math.log(2.0)).sum()
    assert abs(est.terms["variational"] - variational) < 5 * est.lower_std_error
    from_prior = AnnealedImportance(model, **options).mutual_information(x)
    assert abs(from_prior.terms["variational"]) < 1e-9
    low, high = from_prior.normal_interval(0.9999)
    assert low < truth < high


def test_supports_and_pyro_models():
    """A positive latent and a probability, from a Pyro model; truth by quadrature."""

    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.5))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    # I = E log p(x|z) / p(x), p(x) negative binomial.
    grid = torch.linspace(1e-4, 25.0, 20001)
    x = torch.arange(0.0, 80.0)
    log_prior = dist.Gamma(2.0, 1.5).log_prob(grid)
    log_lik = dist.Poisson(grid.unsqueeze(-1)).log_prob(x)
    marginal = dist.NegativeBinomial(2.0, torch.tensor(1 / 2.5)).log_prob(x)
    inner = ((log_lik - marginal) * log_lik.exp()).sum(-1)
    truth = torch.trapezoid(inner * log_prior.exp(), grid)
    joint = mi.PyroJoint(model, example=torch.zeros(1))
    est = mi.AIS(joint, num_chains=4, num_steps=40).estimate(num_pairs=1500)
    assert est.lower <= truth + 5 * est.lower_std_error
    assert est.upper >= truth - 5 * est.upper_std_error
    assert est.gap < 0.05


def test_discrete_latents_and_bad_requests_raise():
    prior = dist.Categorical(torch.ones(3))
    joint = mi.DistributionJoint(prior, lambda z: dist.Normal(z.double(), 1.0))
    with pytest.raises(NotImplementedError, match="discrete support"):
        mi.AIS(joint, num_steps=4).estimate(num_pairs=4)
    problem = PROBLEMS["X (M08)"]()
    with pytest.raises(ValueError, match="several exact posterior samples"):
        mi.AIS(problem.joint, lower="IR")
    with pytest.raises(ValueError, match=r"num_steps \(T\) must be at least 1"):
        mi.AIS(problem.joint, num_steps=0)
    with pytest.raises(ValueError, match="nothing to learn"):
        mi.AIS(problem.joint).loss(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="schedule must be"):
        mi.AIS(problem.joint, schedule="cosine")


def gaussian_energy(tilt):
    """q = N(0, 1), T = tilt x z - z^2 / 2: pi(z|x) = N(tilt x / 2, 1 / 2), log Z in closed form."""
    critic = lambda x, z: (tilt * x * z - 0.5 * z.square()).squeeze(-1)
    guide = lambda x: dist.Normal(torch.zeros_like(x), 1.0)
    log_z = lambda x: tilt**2 * x.square() / 4 - 0.5 * math.log(2.0)
    return guide, critic, log_z


@pytest.mark.parametrize("tilt", [0.9, -2.0])
@pytest.mark.parametrize("bound", ["CR", "IM", "single"])
def test_ibal_is_measured_and_stays_below_mi(tilt, bound):
    """A good and a terrible critic: the measured value is never above I, whatever Prop. M.1."""
    rho = 0.75
    joint = mi.DistributionJoint(
        dist.Normal(0.0, 1.0), lambda z: dist.Normal(rho * z, math.sqrt(1 - rho**2))
    )
    guide, critic, log_z = gaussian_energy(tilt)
    x, z = joint.sample(1000)
    truth = -0.5 * math.log(1 - rho**2)
    for num_steps in (1, 3, 60):
        measured = mi.MINEAIS(
            joint.prior, guide, critic, num_chains=4, num_steps=num_steps, bound=bound
        ).estimate(x, z)
        assert measured.lower <= truth + 5 * measured.lower_std_error
    # The longest run agrees with the closed form of IBAL, pair by pair up to its own noise.
    exact = critic(x.unsqueeze(-1), z.unsqueeze(-1)) - log_z(x)
    error = (measured.pair_lower - exact).std() / math.sqrt(len(exact))
    # A terrible critic keeps chains that start at p(z|x) from reaching Z: Prop. M.1 at work.
    tolerance = 5 * error + (0.01 if tilt > 0 else 0.15)
    assert (measured.lower - exact.mean()).abs() < tolerance
    assert (measured.measurements["ibal_upper"] - exact.mean()).abs() < tolerance
    assert "Prop. M.1" in measured.notes[0]


def test_one_step_of_mine_ais_is_giwae_or_barber_agakov():
    """At T = 1 nothing moves: CR gives Barber-Agakov, and IM is GIWAE."""
    guide, critic, _ = gaussian_energy(0.9)
    x, z = torch.randn(2, 3000)
    prior = dist.Normal(0.0, 1.0)
    cr = mi.MINEAIS(prior, guide, critic, num_chains=4, num_steps=1).estimate(x, z)
    ba = mi.BarberAgakov(prior, guide).estimate(x, z)
    torch.testing.assert_close(cr.pair_lower, ba.pair_lower)
    im = mi.MINEAIS(prior, guide, critic, num_chains=4, num_steps=1, bound="IM").estimate(x, z)
    giwae = mi.GIWAE(prior, guide, critic, 4).estimate(x, z)
    error = (im.lower_std_error**2 + giwae.lower_std_error**2).sqrt()
    assert abs(im.lower - giwae.lower) < 5 * error
    torch.testing.assert_close(im.terms["variational"], giwae.terms["variational"])


@pytest.mark.parametrize("num_negatives", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_gradient_of_mine_ais_is_that_of_ibal(num_negatives):
    """Against autograd of the closed form; many moves, so that the chains forget their start."""
    tilt = nn.Parameter(torch.tensor(0.5))
    scale = nn.Parameter(torch.tensor(1.3))
    critic = lambda x, z: (tilt * x * z).squeeze(-1)
    guide = lambda x: dist.Normal(torch.zeros_like(x), scale)
    bound = mi.MINEAIS(
        dist.Normal(0.0, 1.0),
        guide,
        critic,
        num_moves=60,
        num_leapfrog=4,
        num_negatives=num_negatives,
    )
    z = torch.randn(4000)
    x = 0.75 * z + math.sqrt(1 - 0.75**2) * torch.randn(4000)
    bound.loss(x, z)  # adapts the step size
    assert 0.2 < bound.log_step_size.exp() < 3.0
    gradients = []
    for part_x, part_z in zip(x.split(250), z.split(250), strict=True):
        gradients.append(
            torch.stack(torch.autograd.grad(bound.loss(part_x, part_z), [tilt, scale]))
        )
    gradients = torch.stack(gradients)
    log_z = 0.5 * (scale * tilt * x).square()  # E_q exp(tilt x z)
    log_q = dist.Normal(0.0, scale).log_prob(z)
    ibal = (log_q + tilt * x * z - log_z).mean()
    exact = -torch.stack(torch.autograd.grad(ibal, [tilt, scale]))
    error = gradients.std(0) / math.sqrt(len(gradients))
    assert ((gradients.mean(0) - exact).abs() < 5 * error).all()
    assert (error < 0.05).all()


def test_more_negatives_halve_the_noise_of_the_gradient():
    """At the best critic (pi = p(z|x)) the variance is that of one sample times 1 + 1 / n."""
    rho, num_pairs = 0.6, 10_000
    # A slope of its own for every pair shows the gradient of each.
    slope = nn.Parameter(torch.full((num_pairs, 1), rho / (1.0 - rho**2)))
    curve = 0.5 - 0.5 / (1.0 - rho**2)
    critic = lambda x, z: (slope * x * z + curve * z.square()).squeeze(-1)
    guide = lambda x: dist.Normal(torch.zeros_like(x), 1.0)
    x = torch.full((num_pairs,), 1.5)
    z = rho * x + math.sqrt(1.0 - rho**2) * torch.randn(num_pairs)
    for count in (1, 4):
        bound = mi.MINEAIS(
            dist.Normal(0.0, 1.0),
            guide,
            critic,
            num_moves=20,
            num_leapfrog=4,
            num_negatives=count,
        )
        bound.loss(x, z)  # adapts the step size
        noise = num_pairs * torch.autograd.grad(bound.loss(x, z), [slope])[0]
        # The gradient of a pair is x (mean of n negatives - z).
        expected = 1.5**2 * (1.0 - rho**2) * (1.0 + 1.0 / count)
        assert noise.var() == pytest.approx(expected, rel=5 * math.sqrt(2.0 / num_pairs))
        assert noise.mean().abs() < 5 * noise.std() / math.sqrt(num_pairs)


def test_mine_ais_refuses_encoders():
    guide, critic, _ = gaussian_energy(0.9)
    bound = mi.MINEAIS(None, guide, critic)
    x, z = torch.randn(2, 5)
    with pytest.raises(ValueError, match="train an encoder with BarberAgakov or GIWAE"):
        bound.loss(x, z.requires_grad_())
    with pytest.raises(ValueError, match="nothing to learn"):
        bound.loss(x, z.detach())
    with pytest.raises(ValueError, match="num_negatives must be at least 1"):
        mi.MINEAIS(None, guide, critic, num_negatives=0)
    with pytest.raises(ValueError, match="num_moves must be at least 1"):
        mi.MINEAIS(None, guide, critic, num_moves=0)


def test_roles_swapped_measure_ibal_up_to_the_data_entropy():
    rho, entropy = 0.75, 0.5 * math.log(2 * math.pi * math.e)
    joint = mi.DistributionJoint(
        dist.Normal(0.0, 1.0), lambda z: dist.Normal(rho * z, math.sqrt(1 - rho**2))
    )
    decoder = lambda z: dist.Normal(0.5 * z, 1.0)
    critic = lambda x, z: (0.4 * x * z).squeeze(-1)
    x, z = joint.sample(3000)
    known = mi.MINEAIS(None, decoder, critic, num_chains=4, num_steps=30, data_entropy=entropy)
    est = known.estimate(x, z)
    # E_q exp(.4 x z) with x ~ N(.5 z, 1): exp(.2 z^2 + .08 z^2)
    log_q = dist.Normal(0.5 * z, 1.0).log_prob(x)
    exact = entropy + (log_q + 0.4 * x * z - 0.28 * z.square()).mean()
    assert abs(est.lower - exact) < 0.02
    assert est.missing is None
    assert est.lower < -0.5 * math.log(1 - rho**2) + 5 * est.lower_std_error
    unknown = mi.MINEAIS(None, decoder, critic, num_chains=4, num_steps=5).estimate(x, z)
    assert unknown.missing == "H(x)"


@pytest.mark.slow
def test_trained_mine_ais_beats_giwae_and_barber_agakov():
    """M12, I = 6: one Gaussian guide that is too simple, then energies on top of it."""
    problem = correlated_normal(0.671706, 6.0)
    torch.manual_seed(0)

    class MeanField(nn.Module):
        """Ignores x but for one coordinate: far from the posterior."""

        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(20))

        def forward(self, x):
            return dist.Normal(0.3 * x, self.log_scale.exp()).to_event(1)

    prior, results = problem.joint.prior, {}
    makers = {
        "BA": lambda g, c: mi.BarberAgakov(prior, g),
        "GIWAE": lambda g, c: mi.GIWAE(prior, g, c, 32),
        "MINEAIS": lambda g, c: mi.MINEAIS(prior, g, c, num_chains=8, num_steps=200),
    }
    for name, make in makers.items():
        torch.manual_seed(1)
        bound = make(MeanField(), mi.ConcatCritic(20, 20, [64, 64]))
        optimizer = torch.optim.Adam(bound.parameters(), lr=2e-3)
        for _ in range(1500):
            optimizer.zero_grad()
            bound.loss(*problem.joint.sample(128)).backward()
            optimizer.step()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*ceiling")
            results[name] = bound.estimate(*problem.joint.sample(500))
    for est in results.values():
        assert est.lower <= problem.truth + 5 * est.lower_std_error
    assert results["MINEAIS"].lower > results["GIWAE"].lower > results["BA"].lower
    assert results["MINEAIS"].lower > problem.truth - 0.5
    gap = results["MINEAIS"].measurements["ibal_upper"] - results["MINEAIS"].lower
    assert abs(gap) < 0.2


def test_resampled_chains_of_pairs_are_certified_on_both_sides():
    """Both identities of every bound, pair by pair, with two populations of a poor kernel."""
    joint = mi.DistributionJoint(dist.Normal(0.0, math.sqrt(2.0)), lambda z: dist.Normal(z, 0.3))
    x, z = joint.sample(3000)
    ais = mi.AIS(
        joint,
        num_chains=32,
        num_steps=5,
        schedule=Linear(),
        step_size=0.4,
        kernel=HMC(1),
        resampling=True,
        upper="CR",
    )
    weights, _ = ais._anneal(x, z)
    assert weights.forward.shape == weights.reverse.shape == (2, 3000)
    assert weights.coupled.shape == (1, 3000)
    exact = dist.Normal(0.0, math.sqrt(2.09)).log_prob(x)
    for kind in ("CR", "IM"):
        for ratio in (weights.lower(kind) - exact, exact - weights.upper(kind)):
            error = float(ratio.exp().std() / math.sqrt(3000))
            assert error < 0.05
            assert abs(float(ratio.exp().mean()) - 1.0) < 5.0 * error
    est = ais.estimate(x, z)
    truth = 0.5 * math.log(2.09 / 0.09)
    assert est.lower - 5 * est.lower_std_error <= truth <= est.upper + 5 * est.upper_std_error


def test_resampled_chains_of_pairs_with_vectors_as_latents():
    """The same identities, where z is a vector whose elements have scales of their own."""
    spread = torch.tensor([1.4, 0.6])
    joint = mi.DistributionJoint(
        dist.Normal(torch.zeros(2), spread).to_event(1),
        lambda z: dist.Normal(z, 0.5).to_event(1),
    )
    x, z = joint.sample(1000)
    ais = mi.AIS(joint, num_chains=16, num_steps=20, kernel=HMC(2), resampling=True, upper="CR")
    weights, _ = ais._anneal(x, z)
    exact = dist.Normal(0.0, (spread.square() + 0.25).sqrt()).log_prob(x).sum(-1)
    for ratio in (weights.lower("IM") - exact, exact - weights.upper("CR")):
        error = float(ratio.exp().std() / math.sqrt(1000))
        assert error < 0.05
        assert abs(float(ratio.exp().mean()) - 1.0) < 5.0 * error


def test_resampling_of_ir_bounds_is_refused():
    joint = mi.DistributionJoint(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 0.5))
    with pytest.raises(ValueError, match="IR bounds take one posterior sample per chain"):
        mi.AIS(joint, lower="IR", posterior=lambda x, n: x, resampling=True)


def test_a_target_for_the_gap_chooses_the_steps():
    """Rounds choose T on the first batch, for all; a target out of reach is named."""
    problem = correlated_normal(0.8, -math.log(1.0 - 0.64), d=2)
    bound = mi.AIS(problem.joint, num_chains=4, target_gap=0.1)
    est = bound.estimate(num_pairs=120, batch_size=40, seed=0)
    gaps = est.pair_upper - est.pair_lower
    assert est.gap < 0.1 + 3 * gaps.std() / len(gaps) ** 0.5
    assert 16 <= est.measurements["num_steps"] <= 256
    # All batches have the same T, so its mean is a number of steps.
    assert est.measurements["num_steps"] == est.measurements["num_steps"].round()
    assert est.lower <= problem.truth + 5 * est.lower_std_error
    assert est.upper >= problem.truth - 5 * est.upper_std_error
    assert not [d for d in est.diagnostics if d.name == "target"]
    short = mi.AIS(linear_vae().joint, num_chains=1, target_gap=0.01, max_rounds=1)
    (found,) = (d for d in short.estimate(num_pairs=20, seed=0).diagnostics if d.name == "target")
    assert "raise max_rounds" in found.message
    with pytest.raises(ValueError, match="either target_gap or num_steps"):
        mi.AIS(problem.joint, num_steps=10, target_gap=0.1)


class _Stop(Exception):
    pass


def test_a_killed_estimate_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    problem = correlated_normal(0.6, 2.0, d=2)
    path = tmp_path / "estimate.ckpt"

    def bound(**options):
        return mi.AIS(problem.joint, num_chains=2, num_steps=5, checkpoint=path, **options)

    def estimate(bound):
        return bound.estimate(num_pairs=60, batch_size=20, seed=3)

    calls = []
    anneal = mi.AIS._anneal

    def killed(self, x, z):
        calls.append(1)
        if len(calls) == 3:
            raise _Stop
        return anneal(self, x, z)

    monkeypatch.setattr(mi.AIS, "_anneal", killed)
    with pytest.raises(_Stop):
        estimate(bound())
    resumed = estimate(bound())  # two batches are found, the third is computed
    assert len(calls) == 4
    found = estimate(bound())
    assert len(calls) == 4
    path.unlink()
    whole = estimate(bound())
    for other in (resumed, found):
        assert torch.equal(other.pair_lower, whole.pair_lower)
        assert torch.equal(other.pair_upper, whole.pair_upper)
    plain = mi.AIS(problem.joint, num_chains=2, num_steps=5)
    assert torch.equal(estimate(plain).pair_lower, whole.pair_lower)
    with pytest.raises(ValueError, match="another run: resampling"):
        estimate(bound(resampling=False))
    other = correlated_normal(0.61, 2.0, d=2).joint
    with pytest.raises(ValueError, match="belongs to another run"):
        mi.AIS(other, num_chains=2, num_steps=5, checkpoint=path).estimate(
            num_pairs=60, batch_size=20, seed=3
        )


def test_a_likelihood_as_critic_gives_iwae_and_the_best_bound():
    """With the true likelihood GIWAE is IWAE on the same draws, and IBAL is I."""
    problem = linear_vae()
    x, z = problem.joint.sample(30)
    scale = problem.guide(x).stddev
    guide = lambda x: dist.Normal(problem.guide(x).mean, scale[0]).to_event(1)
    critic = mi.LikelihoodCritic(problem.joint.likelihood, problem.joint.prior, guide)
    giwae = mi.GIWAE(problem.joint, guide, critic, 20).estimate(x, z, seed=0)
    iwae = mi.IWAE(problem.joint, guide, 20).estimate(x, z, seed=0)
    torch.testing.assert_close(giwae.lower, giwae.measurements["best_critic"], atol=1e-3, rtol=0.0)
    noise = (giwae.pair_lower - iwae.pair_lower).std() / 30**0.5  # other draws of the guide
    assert (giwae.lower - iwae.lower).abs() < 5 * noise + 1e-4
    assert not [d for d in giwae.diagnostics if d.name == "critic"]
    poor = mi.GIWAE(problem.joint, guide, lambda x, z: -critic(x, z), 20)
    (found,) = (d for d in poor.estimate(x, z, seed=0).diagnostics if d.name == "critic")
    assert found.value > 0.1
    mine = mi.MINEAIS(problem.joint.prior, guide, critic, num_chains=4, num_steps=60)
    exact = problem.log_ratio(x, z)
    deficit = exact - mine.estimate(x, z, seed=0).pair_lower
    assert -5 * deficit.std() / 30**0.5 < deficit.mean() < 0.2
