"""The networks of the papers: belief nets and autoencoders."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn


class BeliefModel(nn.Module):
    """Bits in layers, the top one with learned probabilities, linear logits below."""

    def __init__(self, layers: list[int], mean: Tensor) -> None:
        super().__init__()
        self.top = nn.Parameter(torch.zeros(layers[0]))
        sizes = [*layers, len(mean)]
        self.below = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.below[-1].bias.data = torch.logit(mean, eps=1e-4)

    def forward(self, x: Tensor) -> None:
        logits = self.top
        with pyro.plate("data", len(x)):
            for index, linear in enumerate(self.below):
                z = pyro.sample(f"z{index}", dist.Bernoulli(logits=logits).to_event(1))
                logits = linear(2 * z - 1)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


class BeliefGuide(nn.Module):
    """The layers from the image up."""

    def __init__(self, layers: list[int], mean: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        sizes = [*layers, len(mean)]
        self.above = nn.ModuleList(nn.Linear(b, a) for a, b in itertools.pairwise(sizes))

    def forward(self, x: Tensor) -> None:
        h = (x - self.mean + 1) / 2
        with pyro.plate("data", len(x)):
            for index in reversed(range(len(self.above))):
                logits = self.above[index](h)
                z = pyro.sample(f"z{index}", dist.Bernoulli(logits=logits).to_event(1))
                h = 2 * z - 1


class Decoder(nn.Module):
    """Gaussian latents, two layers of tanh units."""

    def __init__(self, latents: int, hidden: int, mean: Tensor) -> None:
        super().__init__()
        self.latents = latents
        self.net = two_layers(latents, hidden, len(mean))
        self.net[-1].bias.data = torch.logit(mean, eps=1e-4)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latents), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(1), obs=x)


class Encoder(nn.Module):
    """A diagonal Gaussian."""

    def __init__(self, latents: int, hidden: int, mean: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.net = two_layers(len(mean), hidden, 2 * latents)

    def forward(self, x: Tensor) -> None:
        loc, log_scale = self.net(x - self.mean).chunk(2, dim=-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def two_layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.Tanh(),
        nn.Linear(hidden, hidden),
        nn.Tanh(),
        nn.Linear(hidden, outputs),
    )
