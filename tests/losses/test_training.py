"""What the losses learn, at a small scale on real digits; the tables are in benchmarks/."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from datafiles import find_or_skip

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "papers")]

import tvo
from losses_training import autoencoder, load_mnist

from pyro_anneal.datasets import load_digits


@pytest.fixture(autouse=True)
def _single_precision(_seeded):
    torch.set_default_dtype(torch.float32)


@pytest.mark.slow
def test_a_belief_net_learns_by_every_method(tmp_path):
    """Discrete latents: TVO, VIMCO and RWS reach like evidences, far above independent pixels."""
    path = tmp_path / "record.json"
    options = "--images digits --layers 30 --steps 1000 --batch 50 --rate 3e-3 --particles 10"
    options += f" --seeds 0 --eval-particles 300 --output {path}"
    names = ["TVO tightest", "VIMCO", "RWS"]
    tvo.main(["compare", *options.split(), "--methods", *names])
    rows = {row["method"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == names
    pixels = load_digits()
    rates = pixels.train.mean(0).clamp(1e-3, 1 - 1e-3)
    independent = torch.distributions.Bernoulli(rates).log_prob(pixels.test).sum(-1).mean().item()
    evidence = [row["log evidence"] for row in rows.values()]
    assert min(evidence) > independent + 3.0
    assert max(evidence) - min(evidence) < 1.5
    assert min(row["KL(q||p)"] for row in rows.values()) > 0.0
    assert rows["TVO tightest"]["KL(q||p)"] < rows["VIMCO"]["KL(q||p)"]  # a closer guide


def _autoencoders(data, annealed, **settings):
    """Trains the autoencoders of the AIWAE paper's Table 1 with one seed and K = 5."""
    arguments = Namespace(particles=5, **settings)
    return [autoencoder(data, 0, name, arguments) for name in ("VAE", "IWAE", annealed)]


@pytest.mark.slow
def test_the_order_of_vae_iwae_and_aiwae():
    """AIWAE paper, Table 1, at equal K: annealing lowers NLL; the guide of the ELBO is tightest.

    That AIWAE's gap exceeds IWAE's shows in longer runs only (benchmarks/losses_training.py).
    """
    settings = {"steps": 1000, "ais_steps": 150, "num_test": 100}
    vae, iwae, aiwae = _autoencoders(load_digits(), "AIWAE T=5", **settings)
    assert aiwae["NLL"] < iwae["NLL"] < vae["NLL"]
    assert vae["gap"] < min(iwae["gap"], aiwae["gap"])
    assert vae["active units"] < aiwae["active units"]


@pytest.mark.slow
def test_the_order_on_mnist():
    """The same on MNIST, averaged to 14 x 14. After 1000 steps, half of these, IWAE is still level."""
    folder = find_or_skip("mnist")
    settings = {"steps": 2000, "ais_steps": 150, "num_test": 100}
    vae, iwae, aiwae = _autoencoders(load_mnist(folder), "AIWAE T=11", **settings)
    assert aiwae["NLL"] < iwae["NLL"] < vae["NLL"]
    assert vae["active units"] <= iwae["active units"] <= aiwae["active units"]
