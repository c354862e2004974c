"""Decoders trained on real images: the paper's picture at small scale (its Fig. 3)."""

import warnings

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from datafiles import find_or_skip
from torch import nn

from pyro_anneal import mi

NUM_LATENT = 20


def digits():
    sklearn = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn")
    return torch.tensor(sklearn.load_digits().data / 16.0, dtype=torch.float32)


def mnist():
    return read_mnist(sorted(find_or_skip("mnist").glob("*images*")))


def read_mnist(files):
    import gzip

    path = max(files, key=lambda file: file.stat().st_size)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        content = file.read()
    images = np.frombuffer(content, dtype=np.uint8, offset=16).reshape(-1, 784)
    return torch.tensor(images[:10000] / 255.0, dtype=torch.float32)


def mlp(*sizes):
    layers = []
    for i in range(len(sizes) - 1):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class Encoder(nn.Module):
    """A diagonal Gaussian q(z|x)."""

    def __init__(self, x_dim):
        super().__init__()
        self.net = mlp(x_dim, 64, 64, 2 * NUM_LATENT)

    def forward(self, x):
        loc, log_scale = self.net(x).chunk(2, -1)
        return dist.Normal(loc, log_scale.clamp(-7.0, 3.0).exp()).to_event(1)


def train_vae(images, num_steps, noise):
    """Trains a VAE and returns its decoder."""
    decoder, encoder = mlp(NUM_LATENT, 64, 64, images.shape[1]), Encoder(images.shape[1])
    optimizer = torch.optim.Adam([*decoder.parameters(), *encoder.parameters()], lr=1e-3)
    for _ in range(num_steps):
        x = images[torch.randint(len(images), (128,))]
        q = encoder(x)
        z = q.rsample()
        log_p = dist.Normal(decoder(z).sigmoid(), noise).to_event(1).log_prob(x)
        kl = torch.distributions.kl_divergence(q.base_dist, torch.distributions.Normal(0.0, 1.0))
        optimizer.zero_grad()
        (kl.sum(-1) - log_p).mean().backward()
        optimizer.step()
    return decoder


def train_gan(images, num_steps, noise):
    """Trains a GAN with an InfoGAN term, without which a small generator ignores its latents."""
    generator, critic = mlp(NUM_LATENT, 64, 64, images.shape[1]), mlp(images.shape[1], 64, 64, 1)
    encoder = Encoder(images.shape[1])
    for_g = torch.optim.Adam([*generator.parameters(), *encoder.parameters()], lr=1e-3)
    for_d = torch.optim.Adam(critic.parameters(), lr=3e-4, betas=(0.5, 0.999))
    softplus = nn.functional.softplus
    for _ in range(num_steps):
        real = images[torch.randint(len(images), (128,))]
        real = real + noise * torch.randn_like(real)
        z = torch.randn(128, NUM_LATENT)
        fake = generator(z).sigmoid()
        fake = fake + noise * torch.randn_like(fake)
        for_d.zero_grad()
        (softplus(-critic(real)) + softplus(critic(fake.detach()))).mean().backward()
        for_d.step()
        for_g.zero_grad()
        information = encoder(fake).log_prob(z).mean()
        (softplus(-critic(fake)).mean() - 0.1 * information).backward()
        for_g.step()
    return generator


def fit(bound, joint, num_steps, lr=1e-3):
    optimizer = torch.optim.Adam(bound.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        optimizer.zero_grad()
        bound.loss(*joint.sample(100)).backward()
        optimizer.step()
        schedule.step()
    return bound


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("train", [train_vae, train_gan], ids=["VAE", "GAN"])
@pytest.mark.parametrize("load", [digits, mnist], ids=["digits", "MNIST"])
def test_the_papers_picture(load, train):
    torch.set_default_dtype(torch.float32)
    images = load()
    # Measured with less noise than trained, for a mutual information of tens of nats; as many
    # more pixels tell as much more, so noise grows with their number. A small GAN's images of
    # MNIST vary less (at 0.1 its latents tell 12 nats).
    noise = 0.03 * (images.shape[1] / 64) ** 0.5
    if train is train_gan and load is mnist:
        noise = 0.04
    decoder = train(images, 2000, 0.1).requires_grad_(False)
    prior = dist.Normal(torch.zeros(NUM_LATENT), 1.0).to_event(1)
    joint = mi.DistributionJoint(
        prior, lambda z: dist.Normal(decoder(z).sigmoid(), noise).to_event(1)
    )
    encoder = Encoder(images.shape[1])
    ba = fit(mi.BarberAgakov(prior, encoder), joint, 2000)

    def copy():
        other = Encoder(images.shape[1])
        other.load_state_dict(encoder.state_dict())
        return other

    def critic(guide):
        return mi.RelativeCritic(guide, mi.ConcatCritic(images.shape[1], NUM_LATENT, [64, 64]))

    first, second = copy(), copy()
    giwae = fit(mi.GIWAE(prior, first, critic(first), 32), joint, 1500)
    mine = mi.MINEAIS(
        prior,
        second,
        critic(second),
        num_moves=5,
        num_leapfrog=4,
        num_negatives=8,
        num_chains=4,
        num_steps=200,
    )
    fit(mine, joint, 1500)
    x, z = joint.sample(60)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*ceiling")
        results = {
            "AIS": mi.AIS(joint, num_chains=8, num_steps=6 * images.shape[1]).estimate(x, z),
            "IWAE from the prior": mi.StructuredInfoNCE(joint, 1000).estimate(x, z),
            "IWAE": mi.IWAE(joint, encoder, 1000).estimate(x, z),
            "BA": ba.estimate(x, z),
            "GIWAE": giwae.estimate(x, z),
            "MINEAIS": mine.estimate(x, z),
        }
    for name, est in results.items():
        print(f"{name:<20} {est}")
    print(results["MINEAIS"].measurements)
    ais = results["AIS"]
    assert -0.1 < ais.gap < 1.0
    assert results["IWAE from the prior"].lower < ais.lower - 10.0
    assert results["IWAE from the prior"].upper > ais.upper + 10.0
    for name in ("GIWAE", "MINEAIS"):
        gain = results[name].pair_lower - results["BA"].pair_lower
        assert gain.mean() > 5 * gain.std() / len(gain) ** 0.5
    # Not behind GIWAE beyond the noise of 60 pairs. Measured on digits: 0.3 nats ahead (VAE); with
    # one negative chain per pair, whose gradients are noisier, level (VAE and GAN).
    lead = results["MINEAIS"].pair_lower - results["GIWAE"].pair_lower
    assert lead.mean() > -5 * lead.std() / len(lead) ** 0.5
    for name in ("BA", "GIWAE", "MINEAIS", "IWAE"):
        excess = results[name].pair_lower - ais.pair_upper
        assert excess.mean() < 5 * excess.std() / len(excess) ** 0.5


class LearnedLikelihood(nn.Module):
    """r(x|z) = N(sigmoid(g(z)), s^2), whose network and noise are learned from pairs."""

    def __init__(self, x_dim):
        super().__init__()
        self.net = mlp(NUM_LATENT, 128, 128, x_dim)
        self.log_scale = nn.Parameter(torch.tensor(-1.0))

    def forward(self, z):
        return dist.Normal(self.net(z).sigmoid(), self.log_scale.exp()).to_event(1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_learned_likelihood_is_the_critic_of_a_decoder():
    """MINE-AIS, which knows pairs and p(z), within a tenth of AIS, which knows the decoder."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    images = digits()
    noise = 0.03
    decoder = train_vae(images, 2000, 0.1).requires_grad_(False)
    prior = dist.Normal(torch.zeros(NUM_LATENT), 1.0).to_event(1)
    joint = mi.DistributionJoint(
        prior, lambda z: dist.Normal(decoder(z).sigmoid(), noise).to_event(1)
    )
    encoder = Encoder(images.shape[1])
    ba = fit(mi.BarberAgakov(prior, encoder), joint, 2000)
    likelihood = LearnedLikelihood(images.shape[1])
    fit(mi.BarberAgakov(None, likelihood), joint, 5000, lr=3e-3)
    critic = mi.LikelihoodCritic(likelihood, prior, encoder)
    mine = mi.MINEAIS(prior, encoder, critic, num_chains=4, num_steps=1000)
    x, z = joint.sample(60)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*ceiling")
        ais = mi.AIS(joint, num_chains=8, num_steps=600).estimate(x, z, seed=0)
        found = mine.estimate(x, z, seed=0)
        giwae = mi.GIWAE(prior, encoder, critic, 64).estimate(x, z, seed=0)
        guided = ba.estimate(x, z, seed=0)
    print(ais, found, giwae, guided, found.measurements, sep="\n")
    assert ais.gap < 0.1 * ais.lower
    assert found.lower > 0.9 * 0.5 * (ais.lower + ais.upper)
    assert found.lower > giwae.lower + 1.0 > guided.lower + 2.0
    excess = found.pair_lower - ais.pair_upper
    assert excess.mean() < 4 * excess.std() / len(excess) ** 0.5
    below = found.measurements["log_z_upper"] - found.measurements["log_z_lower"]
    assert -0.1 < below < 2.0  # forward and reverse chains agree about log Z
