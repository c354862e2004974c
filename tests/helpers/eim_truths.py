"""Densities of small samplers by quadrature, independent of the package."""

import math

import numpy as np
import torch

GRID = torch.linspace(-12.0, 12.0, 4001, dtype=torch.float64)
STEP = float(GRID[1] - GRID[0])
POINTS = torch.tensor([-2.1, -0.4, 0.3, 1.7], dtype=torch.float64)  # asymmetric
LOC, SCALE = 0.3, 1.2


def normal(x, loc=LOC, scale=SCALE):
    return torch.exp(-0.5 * ((x - loc) / scale) ** 2) / (scale * math.sqrt(2.0 * math.pi))


def energy(x):
    """A lopsided energy with two wells."""
    return 0.4 * x + 0.1 * x**2 + torch.sin(2.0 * x)


def energy_gradient(x):
    return 0.4 + 0.2 * x + 2.0 * np.cos(2.0 * x)


def log_accept(x):
    return -torch.nn.functional.softplus(1.5 - 0.8 * x + torch.sin(2.0 * x))


def accept(x):
    return torch.exp(log_accept(x))


def snis_density(x, num_samples):
    """Density of SNIS for K = 2 or 3, by one or two integrals over the other proposals."""
    weight, grid_weight, mass = (
        torch.exp(-energy(x)),
        torch.exp(-energy(GRID)),
        normal(GRID) * STEP,
    )
    if num_samples == 2:
        share = 2.0 * weight[:, None] / (weight[:, None] + grid_weight)
        return normal(x) * (share * mass).sum(-1)
    grid_weight, mass = grid_weight[::30], normal(GRID)[::30] * STEP * 30
    pair = grid_weight[:, None] + grid_weight
    share = 3.0 * weight[:, None, None] / (weight[:, None, None] + pair)
    return normal(x) * (share * mass[:, None] * mass).sum((-1, -2))


def trs_density(x, num_trials):
    normalizer = float((accept(GRID) * normal(GRID)).sum() * STEP)
    series = sum((1.0 - normalizer) ** t for t in range(num_trials - 1))
    return normal(x) * (accept(x) * series + (1.0 - normalizer) ** (num_trials - 1))


def his_density(x, num_steps, step_size, log_tempering):
    """Density of HIS, integrating its final momentum out; the steps undone one by one."""
    x0 = np.repeat(x.numpy()[:, None], len(GRID), axis=1)
    momentum = np.repeat(GRID.numpy()[None], len(x), axis=0)
    for t in reversed(range(num_steps)):
        momentum = momentum / math.exp(log_tempering[t])
        momentum = momentum + 0.5 * step_size * energy_gradient(x0)
        x0 = x0 - step_size * momentum
        momentum = momentum + 0.5 * step_size * energy_gradient(x0)
    momentum = momentum * math.exp(sum(log_tempering))
    joint = normal(torch.tensor(x0)) * normal(torch.tensor(momentum), 0.0, 1.0)
    return joint.sum(-1) * STEP


def assert_mean(samples, truth, dim=0, sigmas=5.0):
    """Asserts that the mean of samples agrees with the truth within its own standard errors."""
    mean = samples.mean(dim)
    error = samples.std(dim) / math.sqrt(samples.shape[dim])
    truth = torch.as_tensor(truth, dtype=mean.dtype)
    assert ((mean - truth).abs() <= sigmas * error + 1e-12).all(), (mean, truth, error)
