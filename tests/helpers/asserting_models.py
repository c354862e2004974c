"""Models that assert; in a module whose assertions pytest does not rewrite."""

import pyro
import pyro.distributions as dist
import torch


def asserting():
    z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
    assert z > 0.0
    assert (z > 0.0).all(), f"a message {1}"
    assert not (z < 0.0).any()
    pyro.sample("y", dist.Normal(z, 0.5), obs=torch.tensor(1.0))


def counting():
    z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
    assert int(z.floor()) >= 0  # a number, and no truth value
    pyro.sample("y", dist.Normal(z, 0.5), obs=torch.tensor(1.0))
