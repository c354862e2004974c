"""Pyro models with discrete latents whose evidence is a short sum."""

import itertools
import math

import pyro
import pyro.distributions as dist
import torch


def numbers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def cube(count):
    """Lists all rows of zeros and ones."""
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=count)))


WEIGHTS = numbers(9, 6)


def belief_net(data):
    """Six binary latents, nine binary data, per row."""
    rows = len(data)
    with pyro.plate("rows", rows):
        z = pyro.sample("z", dist.Bernoulli(torch.full((rows, 6), 0.3)).to_event(1))
        logits = (2.0 * z - 1.0) @ WEIGHTS.T
        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=data)


def belief_net_truth(data):
    states = cube(6)
    prior = dist.Bernoulli(torch.full((6,), 0.3)).log_prob(states).sum(-1)
    logits = (2.0 * states - 1.0) @ WEIGHTS.T
    likelihood = dist.Bernoulli(logits=logits).log_prob(data.unsqueeze(1)).sum(-1)
    return (prior + likelihood).logsumexp(-1)


def belief_net_guide(data):
    rows = len(data)
    with pyro.plate("rows", rows):
        pyro.sample("z", dist.Bernoulli(torch.full((rows, 6), 0.6)).to_event(1))


LOCS = torch.tensor([-1.5, 0.5, 3.0], dtype=torch.float64)
SHARES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def mixture(data):
    """Assignments of points to known components: each an index, independent of the others."""
    with pyro.plate("points", len(data)):
        z = pyro.sample("z", dist.Categorical(SHARES))
        pyro.sample("y", dist.Normal(LOCS[z], 1.0), obs=data)


def mixture_truth(data):
    return (SHARES.log() + dist.Normal(LOCS, 1.0).log_prob(data.unsqueeze(-1))).logsumexp(-1)


def unknown_mean(data):
    """A mixture whose second component has an unknown mean: discrete beside continuous."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("points", len(data)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(z * mean, 0.7), obs=data)


def unknown_mean_truth(data):
    grid = torch.linspace(-14.0, 14.0, 20_001)
    each = torch.stack(
        [
            math.log(0.7) + dist.Normal(0.0, 0.7).log_prob(data).expand(len(grid), -1),
            math.log(0.3) + dist.Normal(grid.unsqueeze(-1), 0.7).log_prob(data),
        ]
    ).logsumexp(0)
    log_joint = dist.Normal(0.0, 2.0).log_prob(grid) + each.sum(-1)
    return log_joint.logsumexp(0) + math.log(28.0 / 20_000)


def counted(caught):
    """Animals of which some were caught: a count whose data bound it from below."""
    number = pyro.sample("number", dist.Poisson(9.0))
    with pyro.plate("visits", len(caught)):
        pyro.sample("caught", dist.Binomial(number, 0.4), obs=caught)


def counted_truth(caught):
    number = torch.arange(float(caught.max()), 120.0)
    likelihood = dist.Binomial(number.unsqueeze(-1), 0.4).log_prob(caught).sum(-1)
    return (dist.Poisson(9.0).log_prob(number) + likelihood).logsumexp(0)


def nested_counts(data):
    """A binomial whose total is latent, too: a support that moves."""
    total = pyro.sample("total", dist.Geometric(0.15))
    part = pyro.sample("part", dist.Binomial(total, 0.6))
    pyro.sample("y", dist.Normal(part, 0.8), obs=data)


def nested_counts_truth(data):
    total = torch.arange(0.0, 200.0)
    part = torch.arange(0.0, 40.0).unsqueeze(-1)
    within = part <= total
    log_part = dist.Binomial(total.expand(40, -1), 0.6).log_prob(
        torch.where(within, part, torch.zeros(()))
    )
    terms = dist.Geometric(0.15).log_prob(total) + torch.where(within, log_part, -math.inf)
    return (terms + dist.Normal(part, 0.8).log_prob(data)).logsumexp((0, 1))


COUPLING = 0.9


def potts(data):
    """A ring of five one-hot vectors, neighbours alike, observed with noise."""
    with pyro.plate("ring", 5):
        z = pyro.sample("z", dist.OneHotCategorical(logits=torch.zeros(5, 3)))
        pyro.sample("y", dist.Normal(z @ LOCS, 1.5), obs=data)
    pyro.factor("alike", COUPLING * (z * z.roll(1, 0)).sum())


def potts_truth(data):
    total = []
    for state in itertools.product(range(3), repeat=5):
        z = torch.tensor(state)
        log_prob = 5 * math.log(1 / 3) + COUPLING * float((z == z.roll(1)).sum())
        total.append(log_prob + float(dist.Normal(LOCS[z], 1.5).log_prob(data).sum()))
    return torch.tensor(total).logsumexp(0)


SPINS = (3, 4)
FIELDS = numbers(12, seed=3)
BONDS = [
    (r * 4 + c, r2 * 4 + c2)
    for r, c in itertools.product(range(3), range(4))
    for r2, c2 in ((r + 1, c), (r, c + 1))
    if r2 < 3 and c2 < 4
]


def _bonds(up):
    left, right = torch.tensor(BONDS).T
    return 0.8 * ((2.0 * up - 1.0)[..., left] * (2.0 * up - 1.0)[..., right]).sum(-1) + up @ FIELDS


def spins(data=None):
    """An Ising model on 3 x 4 sites in a random field, which is all the data there is."""
    with pyro.plate("sites", 12):
        up = pyro.sample("up", dist.Bernoulli(torch.full((12,), 0.3)))
    pyro.factor("bonds", _bonds(up))


def spins_truth(data=None):
    up = cube(12).double()
    prior = dist.Bernoulli(torch.full((12,), 0.3)).log_prob(up).sum(-1)
    return (prior + _bonds(up)).logsumexp(0)


def potts_by_index(data):
    """The same by indices, which no gradient reaches."""
    with pyro.plate("ring", 5):
        z = pyro.sample("z", dist.Categorical(logits=torch.zeros(5, 3)))
        pyro.sample("y", dist.Normal(LOCS[z], 1.5), obs=data)
    pyro.factor("alike", COUPLING * (z == z.roll(1, 0)).sum().to(LOCS.dtype))


STAY = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.3, 0.6]], dtype=torch.float64)


def sequence(data):
    """A hidden Markov model of three states."""
    z = torch.tensor(0)
    for step in pyro.markov(range(len(data))):
        z = pyro.sample(f"z{step}", dist.Categorical(STAY[z]))
        pyro.sample(f"y{step}", dist.Normal(LOCS[z], 1.2), obs=data[step])


def sequence_truth(data):
    log_probs = torch.tensor([0.0, -math.inf, -math.inf])
    for value in data:
        moved = (log_probs.unsqueeze(-1) + STAY.log()).logsumexp(0)
        log_probs = moved + dist.Normal(LOCS, 1.2).log_prob(value)
    return log_probs.logsumexp(0)


def mixed_guide_model(data):
    """A category and a number beside a mean, for a guide that samples them."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    kind = pyro.sample("kind", dist.Categorical(SHARES))
    flag = pyro.sample("flag", dist.Bernoulli(0.3))
    with pyro.plate("points", len(data)):
        pyro.sample("y", dist.Normal(mean + LOCS[kind] * flag, 1.0), obs=data)


def mixed_guide(data):
    pyro.sample("mean", dist.Normal(0.5, 1.0))
    pyro.sample("kind", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
    pyro.sample("flag", dist.Bernoulli(0.6))


def mixed_guide_truth(data):
    total = []
    for kind in range(3):
        for flag in (0.0, 1.0):
            log_prob = SHARES[kind].log() + dist.Bernoulli(0.3).log_prob(torch.tensor(flag))
            loc = torch.full((len(data),), float(LOCS[kind]) * flag)
            cov = torch.eye(len(data)) + 4.0
            total.append(log_prob + dist.MultivariateNormal(loc, cov).log_prob(data))
    return torch.stack(total).logsumexp(0)
