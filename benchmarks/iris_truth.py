"""Evidence of mixtures on the irises' petal lengths by tempered particles, in numpy alone.

``python benchmarks/iris_truth.py K [--particles 16000] [--moves 60] [--seed 0]`` prints one line of
``benchmarks/results/iris_truths.json``. Particles come down from the prior, and so through all
labellings; they move by random walks of one component, of one coordinate, and along differences of
other particles. Ties among the data are evaluated once.
"""

import argparse
import json
import math
import time

import numpy as np

LOG_2PI = math.log(2.0 * math.pi)


def log_prior(z, num):
    """Logs of unit exponentials (for Dirichlet weights), means, and log standard deviations."""
    g, mu, log_sd = np.split(z, (num, 2 * num), axis=1)
    value = g - np.exp(g) - 0.125 * mu**2 - math.log(2.0) - 0.5 * LOG_2PI
    value += -0.5 * ((log_sd + 1.0) / 0.7) ** 2 - math.log(0.7) - 0.5 * LOG_2PI
    return value.sum(1)


def log_likelihood(z, num, values, counts):
    g, mu, log_sd = np.split(z, (num, 2 * num), axis=1)
    top = g.max(1, keepdims=True)
    log_w = g - top - np.log(np.exp(g - top).sum(1, keepdims=True))
    density = np.zeros((len(z), len(values)))
    for k in range(num):
        square = ((values - mu[:, k : k + 1]) * np.exp(-log_sd[:, k : k + 1])) ** 2
        density += np.exp(log_w[:, k : k + 1] - log_sd[:, k : k + 1] - 0.5 * (square + LOG_2PI))
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(density) @ counts, -1e8)


def propose(z, num, rng):
    count, rows = len(z), np.arange(len(z))
    kind, new = rng.integers(3), z.copy()
    if kind == 0:
        k, size = rng.integers(num, size=count), np.exp(rng.uniform(-4.0, 0.7, count))
        for part in range(3):
            new[rows, part * num + k] += size * rng.standard_normal(count)
    elif kind == 1:  # half of the particles, along differences of the other half
        order = rng.permutation(count)
        moving, rest = order[: count // 2], order[count // 2 :]
        first, second = (rest[rng.integers(len(rest), size=len(moving))] for _ in range(2))
        size = np.exp(rng.uniform(-2.3, 0.0, (len(moving), 1)))
        noise = 1e-4 * rng.standard_normal((len(moving), z.shape[1]))
        new[moving] += size * (z[first] - z[second]) + noise
    else:
        size = np.exp(rng.uniform(-3.0, 0.7, count))
        new[rows, rng.integers(3 * num, size=count)] += size * rng.standard_normal(count)
    return new


def increment(log_lik, largest, fraction=0.7):
    """Finds by bisection the step of beta that keeps a fraction of effective particles."""

    def effective(step):
        weights = np.exp(step * (log_lik - log_lik.max()))
        return weights.sum() ** 2 / (weights**2).sum() / len(weights)

    if effective(largest) >= fraction:
        return largest
    low, high = 0.0, largest
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if effective(middle) > fraction else (low, middle)
    return low


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("num", type=int, metavar="K")
    parser.add_argument("--particles", type=int, default=16_000)
    parser.add_argument("--moves", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    from sklearn.datasets import load_iris

    x = load_iris().data[:, 2]
    values, counts = np.unique((x - x.mean()) / x.std(ddof=1), return_counts=True)
    num, count, rng = given.num, given.particles, np.random.default_rng(given.seed)
    began = time.process_time()
    parts = [np.log(rng.exponential(size=(count, num))), 2.0 * rng.standard_normal((count, num))]
    z = np.concatenate([*parts, -1.0 + 0.7 * rng.standard_normal((count, num))], 1)
    prior, lik = log_prior(z, num), log_likelihood(z, num, values, counts)
    beta, log_z, stages = 0.0, 0.0, 0
    while beta < 1.0:
        step = increment(lik, 1.0 - beta)
        weights = np.exp(step * (lik - lik.max()))
        log_z += step * lik.max() + math.log(weights.mean())
        points = (rng.random() + np.arange(count)) / count
        chosen = np.searchsorted(np.cumsum(weights / weights.sum()), points).clip(max=count - 1)
        z, prior, lik = z[chosen], prior[chosen], lik[chosen]
        beta, stages = beta + step, stages + 1
        for _ in range(given.moves):
            new = propose(z, num, rng)
            new_prior, new_lik = log_prior(new, num), log_likelihood(new, num, values, counts)
            ratio = new_prior - prior + beta * (new_lik - lik)
            taken = np.log(rng.random(count)) < ratio
            z[taken], prior[taken], lik[taken] = new[taken], new_prior[taken], new_lik[taken]
    record = {"K": num, "N": count, "seed": given.seed, "moves": given.moves, "stages": stages}
    print(json.dumps(record | {"logz": log_z, "cpu": time.process_time() - began}))


if __name__ == "__main__":
    main()
