"""What the losses learn, at a small scale on real digits; the tables are in benchmarks/."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from losses_training import autoencoder, belief_net, load_mnist

from pyro_anneal.datasets import load_digits

MNIST = Path(__file__).parents[3] / "shared" / "data" / "mnist"


@pytest.fixture(autouse=True)
def _single_precision(_seeded):
    torch.set_default_dtype(torch.float32)


@pytest.mark.slow
def test_a_belief_net_learns_by_every_method():
    """Discrete latents: TVO, VIMCO and RWS reach like evidences, far above independent pixels."""
    results = belief_net(seed=0, steps=1000)
    evidence = {name: row["log evidence"] for name, row in results.items()}
    pixels = load_digits()
    rates = pixels.train.mean(0).clamp(1e-3, 1 - 1e-3)
    independent = torch.distributions.Bernoulli(rates).log_prob(pixels.test).sum(-1).mean().item()
    for name, value in evidence.items():
        assert value > independent + 3.0, name
        assert results[name]["KL(q||p)"] > 0.0
    assert max(evidence.values()) - min(evidence.values()) < 1.5


def check_order(table):
    """AIWAE paper, Table 1: annealing lowers NLL, more steps more so, and widens q's gap."""
    nll = {name: row["NLL"] for name, row in table.items()}
    assert nll["AIWAE T=5"] < nll["IWAE"] < nll["VAE"]
    assert nll["AIWAE T=11"] < nll["IWAE"]
    assert table["VAE"]["gap"] < table["IWAE"]["gap"] < table["AIWAE T=5"]["gap"]
    assert table["VAE"]["active units"] < table["AIWAE T=5"]["active units"]


@pytest.mark.slow
def test_the_order_of_vae_iwae_and_aiwae_on_digits():
    check_order(autoencoder(load_digits(), 0, 1500, 5, 200, 100))


@pytest.mark.slow
@pytest.mark.skipif(not MNIST.is_dir(), reason="no MNIST in ../shared/data/mnist")
def test_the_order_of_vae_iwae_and_aiwae_on_mnist():
    check_order(autoencoder(load_mnist(MNIST), 0, 600, 5, 150, 50))
