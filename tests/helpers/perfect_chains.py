"""Annealed chains with perfect transitions on a diagonal linear-Gaussian model, and results of them.

Latents ``z_j ~ N(0, 1)``, data ``x_j = s_j z_j + e_j`` with ``e_j ~ N(0, 1)``; the base is the prior.
Every density of the path is Gaussian, so each state is an exact and independent draw.
"""

from dataclasses import dataclass

import torch

from pyro_anneal.results import AnnealedRun, PilotSummary, Sandwich
from pyro_anneal.results.digest import digest_of_data


@dataclass(frozen=True)
class LinearGaussian:
    s: torch.Tensor  # [D]
    x: torch.Tensor  # [*batch, D]

    @property
    def log_evidence(self):
        return torch.distributions.Normal(0.0, (1 + self.s**2).sqrt()).log_prob(self.x).sum(-1)

    def draw(self, beta, num_chains):
        precision = 1 + beta * self.s**2
        mean = beta * self.s * self.x / precision
        return mean + torch.randn(num_chains, *self.x.shape) / precision.sqrt()

    def log_ratio(self, z):
        return torch.distributions.Normal(self.s * z, 1.0).log_prob(self.x).sum(-1)


def simulate(s, batch=()):
    """Draws pairs (model with data, exact posterior sample)."""
    s = torch.as_tensor(s)
    z = torch.randn(*batch, len(s))
    return LinearGaussian(s, s * z + torch.randn(*batch, len(s))), z


def chains(problem, num_chains, betas, *, start=None, reverse=False):
    """Returns log-weights [K, *batch], log ratios [T + 1, K, *batch] and the last state."""
    states = [problem.draw(beta, num_chains) for beta in betas]
    if start is not None:
        states[-1] = start.expand(num_chains, *problem.x.shape)
    ratios = torch.stack([problem.log_ratio(z) for z in states])
    taken = ratios[1:] if reverse else ratios[:-1]
    increments = betas.diff().reshape(-1, *[1] * (ratios.dim() - 1))
    return (increments * taken).sum(0), ratios, states[1] if reverse else states[-2]


def make_run(problem, num_chains=16, num_steps=50, *, betas=None, start=None, **changes):
    """Builds a forward run, or with ``start`` a reverse one, as AnnealedImportance would."""
    betas = torch.linspace(0, 1, num_steps + 1) if betas is None else betas
    num_steps, reverse = len(betas) - 1, start is not None
    log_weights, ratios, last = chains(problem, num_chains, betas, start=start, reverse=reverse)
    taken = ratios[1:] if reverse else ratios[:-1]
    batch = tuple(problem.x.shape[:-1])
    plates = {"data": batch[-1]} if batch else {}
    if len(batch) == 2:
        plates = {"simulation": batch[0], **plates}
    weights = betas.diff().reshape(-1, *[1] * (ratios.dim() - 1))
    per_datum = taken.reshape(num_steps, num_chains, -1)
    fields = {
        "direction": "reverse" if reverse else "forward",
        "log_weights": log_weights,
        "betas": betas,
        "accept_prob": torch.full((num_steps - 1,), 0.75),
        "num_diverging": torch.zeros(num_steps - 1, dtype=torch.long),
        "step_size": 0.3 * (1 + betas[1:-1]).rsqrt(),
        "mean_log_ratio": per_datum.mean((1, 2)),
        "var_log_ratio": per_datum.var(1, correction=0).mean(-1),
        "log_evidence_ti": (0.5 * weights * (ratios[1:] + ratios[:-1])).sum(0),
        "posterior": {"z": last},
        "plates": plates,
        "site_plates": {"z": (*plates,)},
        "num_gradients": 1 + 3 * (num_steps - 1),
        "num_evaluations": 1 + 3 * (num_steps - 1),
        "seconds": 0.25,
        "seed": 7,
        "kernel": "HMC(num_leapfrog=3)",
        "density_mode": "compiled",
        "pilot": PilotSummary(
            num_chains=32,
            num_gradients=400,
            betas=torch.linspace(0, 1, 9),
            step_size=0.3 * (1 + torch.linspace(0, 1, 9)).rsqrt(),
            accept_prob=torch.full((9,), 0.77),
            ess_fraction=torch.full((9,), 0.9),
            length=4.2,
            seconds=0.5,
        ),
        "observed": {"x": problem.x},
    }
    fields |= changes
    return AnnealedRun(**({"data_digest": digest_of_data(fields["observed"])} | fields))


def make_sandwich(s, batch=(), num_chains=16, num_steps=50, *, betas=None, **changes):
    problem, z = simulate(s, batch)
    betas = torch.linspace(0, 1, num_steps + 1) if betas is None else betas
    forward = make_run(problem, num_chains, betas=betas)
    fields = {
        "forward": forward,
        "reverse": make_run(problem, num_chains, betas=betas, start=z),
        "simulated": {"x": problem.x},
        "true_log_likelihood": problem.log_ratio(z),
    }
    if num_chains > 1:
        end = forward.posterior["z"][0]  # where forward chain 0 took its last weight
        fields["coupled_reverse"] = chains(
            problem, num_chains - 1, betas, start=end, reverse=True
        )[0]
    return Sandwich(**(fields | changes)), problem
