"""A variational autoencoder on real digits with Gaussian, SNIS, TRS and HIS priors.

Data: scikit-learn's 8 x 8 digits (UCI, Alpaydin and Kaynak), binarized at half the range; 1197
train, 200 validate (early stopping), 400 test. Each prior is trained with the same encoder,
decoder and schedule by SVI with ``Trace_ELBO``. Test evidence is the IWAE bound with 1000 particles
per image: exact weights for the Gaussian prior, for the others with a fresh estimate of the prior
density, which keeps E[w] = p(x) and so a lower bound. Setting after Lawson et al. (2019),
section 5.2, at a small scale.

Joint training on 1197 images is noisy: the split, the start and the stopping time matter more than
the prior. ``--frozen`` isolates the prior: one autoencoder with a Gaussian prior per seed, then each
prior is fitted with encoder and decoder fixed, and compared on the same test images, with the sizes
K and T varied.

``--mnist FOLDER`` reads MNIST's idx files from a folder instead: 28 x 28 pixels, binarized at half
the range, 58,000 train, 2000 validate, 1000 of the test images; 50 latents, networks of 300 units.

    python benchmarks/eim_digits.py --seeds 0 1 2            # benchmarks/results/eim_digits.json
    python benchmarks/eim_digits.py --frozen --seeds 0 1     # ..._frozen.json
    python benchmarks/eim_digits.py --mnist FOLDER           # benchmarks/results/eim_mnist.json
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.nn.functional import logsigmoid, softplus
from versions import versions

from pyro_anneal.eim import HIS, SNIS, TRS, Leapfrog

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Setting:
    """Sizes of the networks and of the training."""

    pixels: int
    latent: int
    hidden: int
    hidden_energy: int
    learning_rate: float
    iwae_particles: int
    prior_particles: int


DIGITS = Setting(64, 8, 128, 64, 2e-3, 1000, 50)
MNIST = Setting(784, 50, 300, 100, 1e-3, 500, 10)


def load_digits(seed):
    """Binary images, shuffled by the seed, split into train, validation and test."""
    from sklearn.datasets import load_digits as load

    pixels = torch.tensor(load().data > 7.5, dtype=torch.float32)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    return pixels[order].split([1197, 200, 400])


def load_mnist(folder, seed):
    """Binary images of MNIST from gzipped idx files: train, validation and 1000 test images."""

    def read(name):
        with gzip.open(Path(folder) / name) as file:
            pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 784)
        return torch.tensor(pixels > 127, dtype=torch.float32)

    pixels = read("train-images-idx3-ubyte.gz")
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    train, validation = pixels[order].split([58_000, 2000])
    return train, validation[:500], read("t10k-images-idx3-ubyte.gz")[:1000]


def mlp(inputs, hidden, outputs):
    """Two hidden layers of tanh units."""
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.Tanh(),
        nn.Linear(hidden, hidden),
        nn.Tanh(),
        nn.Linear(hidden, outputs),
    )


class VAE(nn.Module):
    """Encoder, decoder and a prior over the latents."""

    def __init__(self, prior, size, setting=DIGITS):
        super().__init__()
        self.prior_name, self.size, self.setting = prior, size, setting
        latent, hidden = setting.latent, setting.hidden
        self.encoder = mlp(setting.pixels, hidden, 2 * latent)
        self.decoder = mlp(latent, hidden, setting.pixels)
        self.net = mlp(latent, setting.hidden_energy, 1) if prior != "gaussian" else None
        if prior == "his":
            self.momentum = mlp(latent, setting.hidden_energy, 2 * latent)
            self.leapfrog = Leapfrog(size, (latent,), step_size=0.05, tempering=0.99)

    def _energy(self, z):
        return self.net(z).squeeze(-1)

    def _log_accept(self, z):
        return logsigmoid(self._energy(z))

    def _momentum_guide(self, z):
        loc, raw = self.momentum(z).chunk(2, -1)
        return dist.Normal(loc, softplus(raw + 0.5) + 1e-4).to_event(1)

    def prior(self):
        """The prior, built from the current parameters."""
        base = dist.Normal(torch.zeros(self.setting.latent), 1.0).to_event(1)
        if self.prior_name == "snis":
            return SNIS(base, self._energy, self.size, share_proposals=True)
        if self.prior_name == "trs":
            return TRS(base, self._log_accept, self.size, share_proposals=True)
        if self.prior_name == "his":
            return HIS(
                base,
                self._energy,
                self.size,
                self._momentum_guide,
                step_size=self.leapfrog.step_size,
                log_tempering=self.leapfrog.log_tempering,
            )
        return base

    def posterior(self, x):
        """The encoder's Gaussian."""
        loc, raw = self.encoder(x).chunk(2, -1)
        return dist.Normal(loc, softplus(raw) + 1e-3).to_event(1)

    def likelihood(self, z):
        """The decoder's pixels."""
        return dist.Bernoulli(logits=self.decoder(z)).to_event(1)

    def model(self, x):
        """Pyro model."""
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x):
        """Pyro guide."""
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(x))

    @torch.no_grad()
    def log_evidence(self, x, num_particles, num_prior_particles):
        """IWAE bound per image, in nats."""
        parts = []
        for part in x.split(50):
            posterior = self.posterior(part)
            z = posterior.sample((num_particles,))
            prior = self.prior()
            if self.prior_name == "gaussian":
                log_prior = prior.log_prob(z)
            else:
                log_prior = prior.log_prob_bound(z, num_prior_particles)
            log_weights = log_prior + self.likelihood(z).log_prob(part) - posterior.log_prob(z)
            parts.append(torch.logsumexp(log_weights, 0) - math.log(num_particles))
        return torch.cat(parts)


def fit(vae, data, validation, num_steps, *, frozen=False, check_every=200):
    """Trains until the best validation bound, in place; returns the step of the best."""
    rate = {"lr": vae.setting.learning_rate, "betas": (0.9, 0.99), "weight_decay": 1e-5}
    pyro.clear_param_store()
    for module in (vae.encoder, vae.decoder):
        module.requires_grad_(not frozen)
    svi = SVI(vae.model, vae.guide, pyro.optim.ClippedAdam(rate), Trace_ELBO())
    best, best_step, state = -math.inf, 0, None
    for step in range(1, num_steps + 1):
        svi.step(data[torch.randint(len(data), (128,))])
        if step % check_every == 0:
            score = float(vae.log_evidence(validation, 20, 2).mean())
            if score > best:
                best, best_step = score, step
                state = {k: v.clone() for k, v in vae.state_dict().items()}
    vae.load_state_dict(state)
    return best_step


def train(prior, size, seed, num_steps, images, setting):
    """Trains one autoencoder and returns its record."""
    pyro.set_rng_seed(seed)
    data, validation, test = images
    start, vae = time.perf_counter(), VAE(prior, size, setting)
    best_step = fit(vae, data, validation, num_steps, check_every=max(200, num_steps // 25))
    prior_particles = 1 if prior == "his" else setting.prior_particles
    evidence = vae.log_evidence(test, setting.iwae_particles, prior_particles)
    record = {
        "prior": prior,
        "size": size,
        "seed": seed,
        "test_log_evidence": float(evidence.mean()),
        "standard_error_over_images": float(evidence.std() / math.sqrt(len(evidence))),
        "best_step": best_step,
        "num_steps": num_steps,
        "seconds": round(time.perf_counter() - start, 1),
        "versions": versions(),
    }
    print(record, flush=True)
    return record


FROZEN_SIZES = [("snis", 4), ("snis", 32), ("snis", 256), ("his", 1), ("his", 5), ("trs", 256)]


def train_frozen(seed, num_steps):
    """Fits every prior to one autoencoder; yields their gains over the Gaussian prior."""
    pyro.set_rng_seed(seed)
    data, validation, test = load_digits(seed)
    base = VAE("gaussian", 0)
    fit(base, data, validation, num_steps)
    gaussian = base.log_evidence(test, 300, 1)
    for prior, size in FROZEN_SIZES:
        pyro.set_rng_seed(seed)
        vae = VAE(prior, size)
        vae.load_state_dict(base.state_dict(), strict=False)
        best_step = fit(vae, data, validation, 1000, frozen=True, check_every=100)
        gain = vae.log_evidence(test, 300, 1 if prior == "his" else 50) - gaussian
        record = {
            "prior": prior,
            "size": size,
            "seed": seed,
            "gaussian_log_evidence": float(gaussian.mean()),
            "gain_over_gaussian": float(gain.mean()),
            "standard_error_of_gain": float(gain.std() / math.sqrt(len(gain))),
            "best_step": best_step,
            "versions": versions(),
        }
        print(record, flush=True)
        yield record


def main():
    """Runs all priors over seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--priors", nargs="*", default=["gaussian", "snis", "his", "trs"])
    parser.add_argument("--sizes", nargs="*", type=int, default=[], help="K or T; default 256, 5")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--num-steps", type=int, default=5000)
    parser.add_argument("--frozen", action="store_true", help="fit priors to a fixed autoencoder")
    parser.add_argument("--mnist", default=None, help="folder of MNIST's gzipped idx files")
    parser.add_argument("--output", default=None)
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    name = "eim_mnist" if args.mnist else f"eim_digits{'_frozen' if args.frozen else ''}"
    path = RESULTS / (args.output or f"{name}.json")
    records = []
    for seed in args.seeds if args.frozen else []:
        for record in train_frozen(seed, args.num_steps):
            records.append(record)
            path.write_text(json.dumps(records, indent=1) + "\n")
    if args.frozen:
        return
    setting = MNIST if args.mnist else DIGITS
    for seed in args.seeds:
        images = load_mnist(args.mnist, seed) if args.mnist else load_digits(seed)
        for prior in args.priors:
            default = {"gaussian": 0, "his": 5}.get(prior, 256)
            for size in args.sizes or [default]:
                records.append(train(prior, size, seed, args.num_steps, images, setting))
                path.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
