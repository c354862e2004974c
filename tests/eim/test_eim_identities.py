"""Identities of the paper: IWAE as AVVI, CPC as a Barber-Agakov bound, the semi-implicit bound."""

import math

import pyro
import pyro.distributions as dist
import torch
from eim_truths import assert_mean

from pyro_anneal.eim import SNIS, semi_implicit_bound

LOG_EVIDENCE = -2.265512  # z ~ N(0, 1), x | z ~ N(z, 1), x = 2: x ~ N(0, sqrt 2)


def log_joint(z):
    return dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(torch.tensor(2.0))


def test_iwae_is_avvi_with_an_snis_model():
    # The variational distribution is SNIS with proposal q and weight p(x, z) / q(z); the model
    # extends p(x, z) by the other proposals. The ELBO of the extended pair is IWAE, path by path.
    guide, num_samples = dist.Normal(0.4, 1.1), 5
    snis = SNIS(guide, lambda z: guide.log_prob(z) - log_joint(z), num_samples)
    pool = snis.extended().sample((20_000,))
    log_model = log_joint(pool[:, 0]) + guide.log_prob(pool[:, 1:]).sum(-1)
    elbo = log_model - snis.extended().log_prob(pool)
    iwae = torch.logsumexp(log_joint(pool) - guide.log_prob(pool), -1) - math.log(num_samples)
    torch.testing.assert_close(elbo, iwae)
    # Forgetting which one was picked, the SNIS pool is a pool of plain proposals: the ELBO of the
    # SNIS family is the IWAE bound.
    plain = guide.sample((20_000, num_samples))
    value = torch.logsumexp(log_joint(plain) - guide.log_prob(plain), -1) - math.log(num_samples)
    error = ((elbo.var() + value.var()) / len(elbo)).sqrt()
    assert abs(elbo.mean() - value.mean()) < 5.0 * error
    assert_mean(elbo.exp(), math.exp(LOG_EVIDENCE))
    assert elbo.mean() < LOG_EVIDENCE - 5.0 * error


def test_barber_agakov_with_snis_is_infonce():
    # I(x; y) >= E[log q(x | y) - log p(x)] with q the SNIS of proposal p(x), energy -critic.
    rho, num_samples = 0.75, 8
    x = torch.randn(20_000)
    y = rho * x + math.sqrt(1.0 - rho**2) * torch.randn(20_000)
    marginal = dist.Normal(0.0, 1.0)

    def critic(x, y):  # the optimal one: log p(y | x) up to a function of y
        return dist.Normal(rho * x, math.sqrt(1.0 - rho**2)).log_prob(y)

    pyro.set_rng_seed(7)
    conditional = SNIS(marginal, lambda x: -critic(x, y), num_samples)
    barber_agakov = conditional.log_prob(x) - marginal.log_prob(x)
    pyro.set_rng_seed(7)
    negatives = marginal.sample((num_samples - 1, 1, 20_000))[:, 0]
    scores = torch.cat([critic(x, y).unsqueeze(0), critic(negatives, y)])
    infonce = torch.log_softmax(scores, 0)[0] + math.log(num_samples)
    torch.testing.assert_close(barber_agakov, infonce)
    truth = -0.5 * math.log(1.0 - rho**2)
    error = infonce.std() / math.sqrt(len(x))
    assert infonce.max() <= math.log(num_samples)
    assert infonce.mean() < truth + 5.0 * error
    tight = SNIS(marginal, lambda x: -critic(x, y), 512).log_prob(x) - marginal.log_prob(x)
    assert infonce.mean() + 5.0 * error < tight.mean() < truth + 5.0 * error
    assert abs(tight.mean().item() - truth) < 0.03


def semi_implicit_draws(num_samples, num_draws=40_000):
    """A guide z | psi ~ N(psi, 0.4), psi ~ N(0.8, 0.5): marginally N(0.8, sqrt .41)."""
    psi = dist.Normal(0.8, 0.5).sample((num_samples, num_draws))
    z = dist.Normal(psi[0], 0.4).sample()
    log_q = dist.Normal(psi, 0.4).log_prob(z)
    return psi, z, log_q


def test_semi_implicit_bound_is_valid_and_tightens():
    exact = dist.Normal(0.8, math.sqrt(0.41))
    psi, z, _ = semi_implicit_draws(2)
    elbo = (log_joint(z) - exact.log_prob(z)).mean()  # with the exact density of the guide
    means = []
    for num_samples in (1, 4, 64):
        _, z, log_q = semi_implicit_draws(num_samples)
        bound = semi_implicit_bound(log_joint(z), log_q[0], log_q[1:])
        assert_mean(bound.exp(), math.exp(LOG_EVIDENCE))
        error = bound.std() / math.sqrt(len(z))
        assert bound.mean() < LOG_EVIDENCE + 5.0 * error
        means.append(bound.mean())
    assert means[0] + 0.2 < means[1] < means[2]
    assert abs(means[2] - elbo) < 0.02
    # Leaving out the draw that made z breaks it: above the ELBO it should stay under.
    psi, z, _ = semi_implicit_draws(2)
    fresh = dist.Normal(psi[1], 0.4).log_prob(z)
    broken = log_joint(z) - fresh
    assert broken.mean() > LOG_EVIDENCE + 0.5


def test_semi_implicit_bound_is_avvi_with_an_snis_reverse():
    mixing, num_samples = dist.Normal(0.8, 0.5), 6
    psi, z, log_q = semi_implicit_draws(num_samples, num_draws=1000)
    reverse = SNIS(mixing, lambda psi: -dist.Normal(psi, 0.4).log_prob(z), num_samples)
    pool = psi.movedim(0, -1)
    log_reverse = SNIS(
        mixing.expand([1000]), lambda psi: -dist.Normal(psi, 0.4).log_prob(z), num_samples
    ).extended()
    avvi = (
        log_joint(z)
        + log_reverse.log_prob(pool)
        - mixing.log_prob(pool).sum(-1)
        - dist.Normal(psi[0], 0.4).log_prob(z)
    )
    torch.testing.assert_close(avvi, semi_implicit_bound(log_joint(z), log_q[0], log_q[1:]))
    assert not reverse.has_exact_log_prob
