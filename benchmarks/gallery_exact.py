"""Evidence of the gallery's models in closed form, by sums over states, and by quadrature.

Everything is written out from the formulas of the models, in double precision, without Pyro's
tracing and without this package.
"""

import itertools
import math
from typing import Any

import numpy as np
import torch
from gallery_truths import register
from torch import Tensor

LOG_2PI = math.log(2.0 * math.pi)


def _nodes(low: float, high: float, count: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and log weights of an interval, in panels of at most 100 nodes."""
    panels = -(-count // 100)
    edges = torch.linspace(low, high, panels + 1, dtype=torch.float64)
    x, w = map(torch.tensor, np.polynomial.legendre.leggauss(-(-count // panels)))
    half = 0.5 * edges.diff()[:, None]
    nodes = edges[:-1, None] + half * (x + 1.0)
    return nodes.flatten(), (half * w).log().flatten()


def _normal(x: Tensor, mean: Any, sd: Any) -> Tensor:
    sd = torch.as_tensor(sd, dtype=torch.float64)
    return -0.5 * ((x - mean) / sd) ** 2 - sd.log() - 0.5 * LOG_2PI


def _gaussian(y: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    return torch.distributions.MultivariateNormal(mean, covariance).log_prob(y)


def _beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


def _choose(n: Tensor, k: Tensor) -> Tensor:
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def _found(value: Any, how: str) -> dict[str, Any]:
    return {"value": float(value), "how": how}


# Eight schools -------------------------------------------------------------------------------


def _half_cauchy(scale: float, count: int = 2000) -> tuple[Tensor, Tensor]:
    u, log_w = _nodes(0.0, 1.0, count)
    return scale * torch.tan(0.5 * math.pi * u), log_w


@register("eight_schools/mcmc")
def _(entry: Any) -> dict[str, Any]:
    _, sigma, y = (a.double() if torch.is_tensor(a) else a for a in entry.args)
    tau, log_w = _half_cauchy(25.0)
    covariance = (tau[:, None] ** 2 + sigma**2).diag_embed() + 100.0
    return _found(
        torch.logsumexp(log_w + _gaussian(y, torch.zeros_like(y), covariance), 0),
        "quadrature over tau, the rest Gaussian",
    )


@register("eight_schools/svi")
def _(entry: Any) -> dict[str, Any]:
    y, sigma = (
        entry.args[0].double().T
    )  # each school has mu and tau of its own: they are in a plate
    tau, log_w = _half_cauchy(25.0)
    sd = (tau[:, None] ** 2 + sigma**2 + 100.0).sqrt()
    each = torch.logsumexp(log_w[:, None] + _normal(y, 0.0, sd), 0)
    return _found(each.sum(), "quadrature over tau, the rest Gaussian")


# Baseball ------------------------------------------------------------------------------------


@register("baseball/fully_pooled")
def _(entry: Any) -> dict[str, Any]:
    n, k = (a.double() for a in entry.args)
    value = _choose(n, k).sum() + _beta(k.sum() + 1, (n - k).sum() + 1)
    return _found(value, "closed form")


@register("baseball/not_pooled")
def _(entry: Any) -> dict[str, Any]:
    n, k = (a.double() for a in entry.args)
    return _found((_choose(n, k) + _beta(k + 1, n - k + 1)).sum(), "closed form")


@register("baseball/partially_pooled")
def _(entry: Any) -> dict[str, Any]:
    n, k = (a.double() for a in entry.args)
    m, log_m = _nodes(0.0, 1.0, 400)
    u, log_u = _nodes(0.0, 1.0, 400)  # kappa**-1.5 is uniform
    kappa = u ** (-1.0 / 1.5)
    a, b = m[:, None, None] * kappa[:, None], (1 - m)[:, None, None] * kappa[:, None]
    each = _choose(n, k) + _beta(a + k, b + n - k) - _beta(a, b)
    inside = each.sum(-1) + log_m[:, None] + log_u
    return _found(torch.logsumexp(inside.flatten(), 0), "quadrature over m and kappa")


@register("baseball/partially_pooled_with_logit")
def _(entry: Any) -> dict[str, Any]:
    n, k = (a.double() for a in entry.args)
    loc, log_loc = _nodes(-8.0, 6.0, 120)
    scale, log_scale = _half_cauchy(1.0, 300)
    total = []
    for one, log_one in zip(scale, log_scale, strict=True):
        if one < 0.5:  # alpha = loc + scale * noise
            noise, log_noise = _nodes(-9.0, 9.0, 120)
            alpha, log_w = loc[:, None] + one * noise, log_noise + _normal(noise, 0.0, 1.0)
        else:
            alpha, log_alpha = _nodes(-9.0, 7.0, 200)
            alpha = alpha.expand(len(loc), -1)
            log_w = log_alpha + _normal(alpha, loc[:, None], one)
        like = k[:, None, None] * alpha - n[:, None, None] * torch.nn.functional.softplus(alpha)
        each = torch.logsumexp(like + log_w, -1).sum(0) + _choose(n, k).sum()
        total.append(torch.logsumexp(each + log_loc + _normal(loc, -1.0, 1.0), 0) + log_one)
    return _found(torch.logsumexp(torch.stack(total), 0), "quadrature over loc, scale and alpha")


@register("inclined_plane")
def _(entry: Any) -> dict[str, Any]:
    (times,) = entry.args
    mu, log_w = _nodes(0.0, 0.6, 20000)  # beyond .577 the box does not slide, which rules mu out
    sine = torch.tensor(9.8 * np.sin(np.pi / 6))
    speed_up = sine - torch.tensor(9.8 * np.cos(np.pi / 6)) * mu.float()
    passed, way, speed = torch.zeros_like(speed_up), torch.zeros_like(speed_up), 0.0
    speed = torch.zeros_like(speed_up)
    for _ in range(2000):
        going = way < 2.0
        way = torch.where(going, way + speed * 0.005, way)
        speed = torch.where(going, speed + speed_up * 0.005, speed)
        passed = torch.where(going, passed + 0.005, passed)
    passed = torch.where(speed_up > 0, passed, 1e5)
    like = _normal(times.double(), passed.double()[:, None], 0.02).sum(-1)
    return _found(torch.logsumexp(like + log_w, 0), "quadrature over mu")


# Hidden Markov models: sums over state sequences, conjugate rows ------------------------------


def _rows(counts: Tensor, prior: Tensor) -> Tensor:
    """Evidence of category counts ``[..., R, K]`` under Dirichlet rows, summed over rows."""
    total, whole = counts.sum(-1), prior.sum(-1)
    each = (torch.lgamma(prior + counts) - torch.lgamma(prior)).sum(-1)
    return (each + torch.lgamma(whole) - torch.lgamma(whole + total)).sum(-1)


def _paths(states: int, length: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(states), repeat=length)))


def _one_hot(values: Tensor, size: int) -> Tensor:
    return torch.nn.functional.one_hot(values, size).double()


def _transitions(paths: Tensor, states: int) -> Tensor:
    """Counts of ``[P, from, to]``, from state 0 before the first step."""
    before = torch.nn.functional.pad(paths[:, :-1], (1, 0))
    return torch.einsum("pti,ptj->pij", _one_hot(before, states), _one_hot(paths, states))


def _tones(codes: Tensor, seen: Tensor, size: int) -> Tensor:
    """Counts ``[P, code, tone, off/on]`` of tones ``[T, tone]`` by code ``[P, T, tone]``."""
    marks = _one_hot(codes, size)  # [P, T, tone, code]
    both = torch.stack([1.0 - seen, seen], -1)
    return torch.einsum("ptnc,tnv->pcnv", marks, both)


def _hmm_sequences(entry: Any) -> list[Tensor]:
    sequences, lengths, _ = entry.args
    return [s[:length].double() for s, length in zip(sequences, lengths, strict=True)]


_STAY = 0.9 * torch.eye(4, dtype=torch.float64) + 0.1
_STAY_2 = 0.9 * torch.eye(2, dtype=torch.float64) + 0.1
_TONE = torch.tensor([0.9, 0.1], dtype=torch.float64)  # off, on


def _over_pairs(parts: list[list[Tensor]], priors: list[Tensor]) -> dict[str, Any]:
    """Sums over pairs of paths of two sequences the evidence of their added counts."""
    total = []
    for index in range(len(parts[0][0])):
        value = torch.zeros(())
        for first, second, prior in zip(*parts, priors, strict=True):
            counts = (first[index] + second).reshape(len(second), -1, prior.shape[-1])
            value = value + _rows(counts, prior.expand(counts.shape[1:]))
        total.append(torch.logsumexp(value, 0))
    return _found(
        torch.logsumexp(torch.stack(total), 0), "sum over state sequences, conjugate tables"
    )


@register("hmm/model_0", "hmm/model_1")
def _(entry: Any) -> dict[str, Any]:
    parts = []
    for seen in _hmm_sequences(entry):
        paths = _paths(4, len(seen))
        codes = paths[:, :, None].expand(-1, -1, seen.shape[1])
        parts.append([_transitions(paths, 4), _tones(codes, seen, 4)])
    return _over_pairs(parts, [_STAY, _TONE])


@register("hmm/model_2")
def _(entry: Any) -> dict[str, Any]:
    parts = []
    for seen in _hmm_sequences(entry):
        paths = _paths(4, len(seen))
        before = torch.nn.functional.pad(seen[:-1], (0, 0, 1, 0)).long()
        parts.append([_transitions(paths, 4), _tones(2 * paths[:, :, None] + before, seen, 8)])
    return _over_pairs(parts, [_STAY, _TONE])


@register("hmm/model_3", "hmm/model_4")
def _(entry: Any) -> dict[str, Any]:
    crossed = entry.model.__name__ == "model_4"
    parts = []
    for seen in _hmm_sequences(entry):
        paths = _paths(4, len(seen))
        w, x = paths // 2, paths % 2
        before = torch.nn.functional.pad(x[:, :-1], (1, 0))
        rows = 2 * w + before if crossed else before
        to_x = torch.einsum("pti,ptj->pij", _one_hot(rows, 4 if crossed else 2), _one_hot(x, 2))
        codes = paths[:, :, None].expand(-1, -1, seen.shape[1])
        parts.append([_transitions(w, 2), to_x, _tones(codes, seen, 4)])
    prior_x = _STAY_2.repeat(2, 1) if crossed else _STAY_2
    return _over_pairs(parts, [_STAY_2, prior_x, _TONE])


@register("hmm/model_5")
def _(entry: Any) -> dict[str, Any]:
    net = entry.model.__globals__["tones_generator"]
    parts = []
    with torch.no_grad():
        for seen in _hmm_sequences(entry):
            paths = _paths(4, len(seen))
            before = torch.nn.functional.pad(seen[:-1], (0, 0, 1, 0)).float()
            logits = torch.stack(
                [net(torch.full((len(seen), 1), state), before) for state in range(4)]
            ).double()  # [state, T, tone]
            like = (seen * logits - torch.nn.functional.softplus(logits)).sum(-1)
            parts.append((_transitions(paths, 4), like[paths, torch.arange(len(seen))].sum(-1)))
    total = [
        torch.logsumexp(_rows(one + parts[1][0], _STAY) + like + parts[1][1], 0)
        for one, like in zip(*parts[0], strict=True)
    ]
    return _found(torch.logsumexp(torch.stack(total), 0), "sum over state sequences, conjugate")


@register("hmm/model_6")
def _(entry: Any) -> dict[str, Any]:
    import pyro

    x, y = pyro.param("probs_x").detach().double(), pyro.param("probs_y").detach().double()
    total = torch.zeros(())
    for seen in _hmm_sequences(entry):
        paths = torch.nn.functional.pad(_paths(4, len(seen)), (2, 0))
        steps = x[paths[:, :-2], paths[:, 1:-1], paths[:, 2:]].log().sum(-1)
        tone = y[paths[:, 2:]]  # [P, T, tone]
        like = (seen * tone.log() + (1 - seen) * (-tone).log1p()).sum((-1, -2))
        total = total + torch.logsumexp(steps + like, 0)
    return _found(total, "sum over state sequences")


@register("hmm/model_7")
def _(entry: Any) -> dict[str, Any]:
    # The net gets all states at once, so that each tone has one probability whatever the state.
    net = entry.model.__globals__["tones_generator"]
    total = torch.zeros(())
    with torch.no_grad():
        for seen in _hmm_sequences(entry):
            logits = net(torch.arange(4), seen.float()[:, None])[:, 0].double()
            total = total + (seen * logits - torch.nn.functional.softplus(logits)).sum()
    return _found(total, "closed form: states make no difference")


@register("tutorial/enumeration/hmm")
def _(entry: Any) -> dict[str, Any]:
    (data,) = entry.args
    paths = _paths(2, len(data))
    emitted = torch.einsum("pti,tj->pij", _one_hot(paths, 2), _one_hot(data, 3))
    value = _rows(_transitions(paths, 2), torch.full((2, 2), 0.5).double())
    value = value + _rows(emitted, torch.full((2, 3), 0.5).double())
    return _found(torch.logsumexp(value, 0), "sum over state sequences, conjugate tables")


# Capture and recapture -----------------------------------------------------------------------


def _captured(history: Tensor, phi: Tensor, rho: Tensor) -> Tensor:
    """Likelihood of one animal, given survival ``[..., T - 1]`` and capture probability.

    The example changes its mask in place after each step, so that Pyro, which computes densities
    when the model has run, masks nothing: an animal is alive up to its first capture, and it counts
    that it was not seen before.
    """
    first = int(history.nonzero()[0])
    last = int(history.nonzero()[-1])
    log = torch.zeros(torch.broadcast_shapes(phi.shape[:-1], rho.shape)).double()
    log = log + first * (-rho).log1p() + rho.log()
    for t in range(first + 1, last + 1):
        seen = rho if history[t] else 1.0 - rho
        log = log + phi[..., t - 1].log() + seen.log()
    unseen = torch.ones_like(log)  # probability of never being seen after the last capture
    for t in reversed(range(last + 1, len(history))):
        unseen = 1.0 - phi[..., t - 1] + phi[..., t - 1] * (1.0 - rho) * unseen
    return log + unseen.log()


@register("capture_recapture/model_1", "capture_recapture/model_4")
def _(entry: Any) -> dict[str, Any]:
    history, sex = entry.args
    nodes, log_w = _nodes(0.0, 1.0, 60)
    groups = sex.long() if entry.model.__name__ == "model_4" else torch.zeros(len(sex)).long()
    like = {}
    for group in range(2):
        total = torch.zeros(60, 60).double()
        for animal in history[groups == group]:
            phi = nodes[:, None, None].expand(-1, -1, history.shape[1] - 1)
            total = total + _captured(animal, phi, nodes)
        like[group] = torch.logsumexp(total + log_w[:, None], 0)
    return _found(torch.logsumexp(like[0] + like[1] + log_w, 0), "quadrature")


@register("capture_recapture/model_2")
def _(entry: Any) -> dict[str, Any]:
    history, _ = entry.args
    nodes, log_w = _nodes(0.0, 1.0, 24)
    phi = torch.stack(torch.meshgrid(nodes, nodes, nodes, indexing="ij"), -1)[..., None, :]
    total = sum(_captured(animal, phi, nodes) for animal in history)
    total = total + log_w + log_w[:, None] + log_w[:, None, None] + log_w[:, None, None, None]
    return _found(torch.logsumexp(total.flatten(), 0), "quadrature")


def _coefficients(likelihood: Tensor, nodes: list[Tensor]) -> Tensor:
    """Finds the coefficients of a polynomial by its values on a grid, one axis per variable."""
    for axis, points in enumerate(nodes):
        powers = points[:, None] ** torch.arange(len(points))
        moved = torch.linalg.solve(powers, likelihood.movedim(axis, 0).reshape(len(points), -1))
        shape = likelihood.movedim(axis, 0).shape
        likelihood = moved.reshape(shape).movedim(0, axis)
    return likelihood


@register("capture_recapture/model_3")
def _(entry: Any) -> dict[str, Any]:
    # Survivals enter as powers up to the number of animals, and are independent given their mean.
    history, _ = entry.args
    rho, log_rho = _nodes(0.0, 1.0, 60)
    points = torch.tensor([0.2, 0.4, 0.6, 0.8]).double()
    phi = torch.stack(torch.meshgrid(points, points, points, indexing="ij"), -1)[..., None, :]
    like = sum(_captured(animal, phi, rho) for animal in history)
    powers = _coefficients(torch.logsumexp(like + log_rho, -1).exp(), [points] * 3)
    mean, log_mean = _nodes(0.0, 1.0, 400)
    sigma, log_sigma = _nodes(0.0, 10.0, 200)
    noise, log_noise = _nodes(-9.0, 9.0, 400)
    logits = torch.logit(mean)[:, None, None] + sigma[:, None] * noise
    weight = (log_noise + _normal(noise, 0.0, 1.0)).exp()
    moments = torch.stack([logits.sigmoid() ** k @ weight for k in range(4)])
    inside = torch.einsum("abc,aij,bij,cij->ij", powers, moments, moments, moments)
    value = (inside * (log_mean[:, None] + log_sigma).exp()).sum().log() - math.log(10.0)
    return _found(value, "quadrature of a polynomial in survival")


@register("capture_recapture/model_5")
def _(entry: Any) -> dict[str, Any]:
    history, sex = entry.args
    rho, log_rho = _nodes(0.0, 1.0, 60)
    one = torch.tensor([0.3, 0.7]).double()  # of one female; two males
    two = torch.tensor([0.2, 0.5, 0.8]).double()
    grid = torch.stack(torch.meshgrid(one, two, one, two, one, two, indexing="ij"), -1)
    like = torch.zeros(())
    for animal, male in zip(history, sex, strict=True):
        like = like + _captured(animal, grid[..., None, int(male) :: 2], rho)
    powers = _coefficients(torch.logsumexp(like + log_rho, -1).exp(), [one, two] * 3)
    beta, log_beta = _nodes(-60.0, 60.0, 800)
    gamma, log_gamma = _nodes(-60.0, 60.0, 2000)
    weight = (log_gamma + _normal(gamma, 0.0, 10.0)).exp()
    females, males = gamma.sigmoid(), (beta[:, None] + gamma).sigmoid()
    moments = torch.stack(
        [torch.stack([males**j @ (females**i * weight) for j in range(3)]) for i in range(2)]
    )
    inside = torch.einsum("abcdef,abn,cdn,efn->n", powers, moments, moments, moments)
    value = (inside * (log_beta + _normal(beta, 0.0, 10.0)).exp()).sum().log()
    return _found(value, "quadrature of a polynomial in survival")


# Conjugate models, and one or two numbers left --------------------------------------------------


@register("toy_mixture_model_discrete_enumeration")
def _(entry: Any) -> dict[str, Any]:
    obs = entry.args[1]
    a, c = obs["A"].long(), obs["C"].long()
    total = []
    for b in _paths(2, 4):
        of_b = torch.einsum("ti,tj->ij", _one_hot(a, 2), _one_hot(b, 2))
        of_c = torch.einsum("ti,tj->ij", _one_hot(b, 2), _one_hot(c, 2))
        ones = torch.ones(2, 2).double()
        total.append(_rows(of_b, ones) + _rows(of_c, ones))
    of_a = _one_hot(a, 2).sum(0)[None]
    value = torch.logsumexp(torch.stack(total), 0) + _rows(of_a, torch.ones(1, 2).double())
    return _found(value, "sum over states, conjugate")


@register("tutorial/svi_part_i", "tutorial/mle_map")
def _(entry: Any) -> dict[str, Any]:
    ten = torch.tensor(10.0).double()
    return _found(_beta(ten + 6, ten + 4) - _beta(ten, ten), "closed form")


@register("tutorial/bayesian_regression_ii", "tutorial/intro_long")
def _(entry: Any) -> dict[str, Any]:
    x, r, y = (a.double() for a in entry.args)
    design = torch.stack([10.0 * torch.ones_like(x), x, r, x * r], 1)
    sigma, log_w = _nodes(0.0, 10.0, 4000)
    covariance = design @ design.T + sigma[:, None, None] ** 2 * torch.eye(len(y))
    like = _gaussian(y, torch.zeros_like(y), covariance)
    return _found(torch.logsumexp(like + log_w, 0) - math.log(10.0), "quadrature over sigma")


@register("tutorial/boosting_bbvi")
def _(entry: Any) -> dict[str, Any]:
    z, log_w = _nodes(-3.0, 3.0, 20000)
    like = _normal(entry.args[0].double(), z[:, None] ** 2, 0.1).sum(-1)
    return _found(torch.logsumexp(like + _normal(z, 0.0, 5.0) + log_w, 0), "quadrature")


@register("tutorial/gmm")
def _(entry: Any) -> dict[str, Any]:
    data = entry.args[0].double()
    t, log_w = _nodes(-12.0, 12.0, 1200)
    variance = (2.0 * t).exp()  # scale = e^t, t normal with standard deviation 2
    total = []
    for z in _paths(2, len(data)):
        value = _rows(_one_hot(z, 2).sum(0)[None], torch.full((1, 2), 0.5).double())
        value = value + log_w + _normal(t, 0.0, 2.0)
        for part in (data[z == 0], data[z == 1]):
            n, mean = len(part), part.mean() if len(part) else torch.tensor(0.0)
            spread = (part - mean).square().sum()
            value = value - 0.5 * n * (LOG_2PI + 2.0 * t) - 0.5 * spread / variance
            if n:
                value = value + 0.5 * (LOG_2PI + (variance / n).log())
                value = value + _normal(mean, 0.0, (100.0 + variance / n).sqrt())
        total.append(torch.logsumexp(value, 0))
    return _found(torch.logsumexp(torch.stack(total), 0), "sum over assignments, quadrature")


@register("tutorial/dirichlet_process_mixture")
def _(entry: Any) -> dict[str, Any]:
    data, alpha = entry.args[0].double(), 0.1
    one, small = torch.tensor(1.0).double(), torch.tensor(alpha).double()
    total = []
    for z in _paths(3, len(data)):
        value = torch.zeros(())
        for k in range(2):
            here, later = (z == k).sum(), (z > k).sum()
            value = value + _beta(one + here, small + later) - _beta(one, small)
        for k in range(3):
            part = data[z == k]
            covariance = torch.eye(len(part)).double() + 5.0
            for axis in range(2) if len(part) else ():
                value = value + _gaussian(
                    part[:, axis], torch.zeros(len(part)).double(), covariance
                )
        total.append(value)
    return _found(torch.logsumexp(torch.stack(total), 0), "sum over assignments, conjugate")


@register("tutorial/svi_flow_guide")
def _(entry: Any) -> dict[str, Any]:
    (x,) = entry.args
    x = x.double()
    z, log_w = _nodes(-9.0, 9.0, 2000)
    rho = 0.99 * z.tanh()
    noise = 0.01 * torch.stack([torch.ones_like(rho), rho, rho, torch.ones_like(rho)], -1)
    noise = noise.reshape(-1, 2, 2)
    eye = torch.eye(2).double()
    mean = x.mean(0)  # [datum, 2]
    zero = torch.zeros(2).double()
    inside = _gaussian(mean[:, None], zero, eye + noise / 5)
    inside = inside + _gaussian(x[:, :, None], mean[:, None], noise).sum(0)
    inside = inside - _gaussian(zero, zero, noise / 5)
    value = torch.logsumexp(inside + log_w + _normal(z, 0.0, 1.0), -1).sum()
    return _found(value, "quadrature over the correlation, the rest Gaussian")


@register("tutorial/working_memory")
def _(entry: Any) -> dict[str, Any]:
    (l,) = entry.args
    theta, log_w = _nodes(-15.0, 29.0, 2000)
    y = torch.tensor([1.0, 1.0, 0.0]).double()
    logits = theta[:, None] - l.double()
    like = (y * logits - torch.nn.functional.softplus(logits)).sum(-1)
    return _found(torch.logsumexp(like + log_w + _normal(theta, 7.0, 2.0), 0), "quadrature")


@register("tutorial/easyguide")
def _(entry: Any) -> dict[str, Any]:
    batch = entry.args[0].double()  # [time, datum]
    t, log_t = _nodes(-1.0 - 4.5, -1.0 + 4.5, 80)
    noise, log_noise = _nodes(-8.0, 8.0, 40)
    log_noise = log_noise + _normal(noise, 0.0, 1.0)
    steps = torch.stack(torch.meshgrid(noise, noise, noise, indexing="ij")).reshape(3, -1)
    log_w = sum(torch.meshgrid(log_noise, log_noise, log_noise, indexing="ij")).reshape(-1)
    walk = steps.cumsum(0)
    total = []
    for one in (-1.0 + 0.5 * (t + 1.0) / 0.5).exp():
        z = one * walk
        soft = torch.nn.functional.softplus(z).sum(0)
        total.append(torch.logsumexp(batch.T @ z - soft + log_w, -1).sum())
    value = torch.stack(total) + log_t + _normal(t, -1.0, 0.5)
    return _found(torch.logsumexp(value, 0), "quadrature over drift and states")


@register("smcfilter")
def _(entry: Any) -> dict[str, Any]:
    y = entry.args[0].double()
    a = torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double()
    mean, covariance, total = torch.tensor([1.0, 0.0]).double(), torch.zeros(2, 2).double(), 0.0
    for one in y:  # a Kalman filter; states are rows
        mean, covariance = mean @ a, a.T @ covariance @ a + 9.0 * torch.eye(2)
        variance = covariance[0, 0] + 1.0
        total = total + _normal(one, mean[0], variance.sqrt())
        gain = covariance[:, 0] / variance
        mean = mean + gain * (one - mean[0])
        covariance = covariance - torch.outer(gain, covariance[0])
    return _found(total, "Kalman filter")


@register("autoname/tree_data")
def _(entry: Any) -> dict[str, Any]:
    del entry
    # Paths from the root to each leaf: every edge and every observation has variance 1.
    leaves = {("foo",): 1.0, ("bar", 0): 0.0, ("bar", 1): 1.0}
    leaves |= {("baz", "noun"): 4.0, ("baz", "verb"): 2.0}
    y = torch.tensor(list(leaves.values())).double()
    covariance = torch.zeros(5, 5).double()
    for (i, one), (j, two) in itertools.product(enumerate(leaves), repeat=2):
        shared = sum(1 for s, t in zip(one, two, strict=False) if s == t)
        shared = len(one) if i == j else (shared if one[0] == two[0] else 0)
        covariance[i, j] = 1.0 + shared + (1.0 if i == j else 0.0)
    return _found(_gaussian(y, torch.zeros(5).double(), covariance), "closed form")


@register("autoname/mixture")
def _(entry: Any) -> dict[str, Any]:
    data, _ = entry.args
    return _found(_normal(data.double(), 0.0, 1.0).sum(), "closed form: equal components")


@register("autoname/scoping_mixture")
def _(entry: Any) -> dict[str, Any]:
    import pyro

    locs = pyro.param("locs").detach().double()
    each = _normal(entry.args[1].double()[:, None], locs, 0.5) - math.log(2.0)
    return _found(torch.logsumexp(each, -1).sum(), "sum over assignments")


@register("oed/ab_test")
def _(entry: Any) -> dict[str, Any]:
    design = entry.args[0].double()
    mean, sd = torch.tensor([0.0, 1.0]).double(), torch.tensor([2.0, 1.0]).double()
    covariance = design @ (sd**2).diag() @ design.T + torch.eye(3)
    y = torch.tensor([0.3, -1.0, 2.0]).double()
    return _found(_gaussian(y, design @ mean, covariance), "closed form")


def _kernel(jitter: float) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.linspace(0, 1, 6)
    y = torch.sin(3 * x).double()
    away = (x.double()[:, None] - x.double()) ** 2
    return y, (-0.5 * away).exp(), jitter * torch.eye(6).double()


@register("gp/sparse")
def _(entry: Any) -> dict[str, Any]:
    del entry
    y, kernel, jitter = _kernel(1.0 + 1e-6)  # noise 1 by default
    t, log_w = _nodes(-9.0, 9.0, 1000)
    like = _gaussian(y, torch.zeros(6).double(), t.exp()[:, None, None] * kernel + jitter)
    value = torch.logsumexp(like + log_w + _normal(t, 0.0, 1.0), 0)
    return _found(value, "quadrature over the variance")


@register("gp/variational")
def _(entry: Any) -> dict[str, Any]:
    # Pyro's model reads the guide's parameters in place of the latent f, which nothing reads.
    del entry
    y = torch.sin(3 * torch.linspace(0, 1, 6)).double()
    return _found(_normal(y, 0.0, math.sqrt(1.1)).sum(), "closed form: the latent is not read")


# Epidemics -----------------------------------------------------------------------------------


@register(
    "sir_hmc/discrete_model",
    "sir_hmc/reparameterized_discrete_model",
    "sir_hmc/continuous_model",
    "sir_hmc/vectorized_model",
)
def _(entry: Any) -> dict[str, Any]:
    """Filters S and I on a grid of R0 and rho.

    The continuous models are equivalent: their splines give each integer the mass 1. The vectorized
    one counts the first S and I four times each and divides by 4, not 16.
    """
    args, data = entry.args
    population, tau = args.population, args.recovery_time
    t, log_t = _nodes(-7.0, 7.0, 200)
    rho, log_rho = _nodes(0.0, 1.0, 24)
    recover = 1.0 / (1.0 + tau)
    now = {(population - 1, 1): torch.ones(len(t), len(rho)).double()}
    for seen in data.int().tolist():
        later: dict[tuple[int, int], Tensor] = {}
        for (s, i), mass in now.items():
            p = -torch.expm1(-t.exp() / (tau * population) * i)[:, None]
            for new in range(seen, s + 1):
                gain = math.comb(s, new) * p**new * (1 - p) ** (s - new)
                gain = gain * math.comb(new, seen) * rho**seen * (1 - rho) ** (new - seen)
                for gone in range(i + 1):
                    share = math.comb(i, gone) * recover**gone * (1 - recover) ** (i - gone)
                    key = (s - new, i + new - gone)
                    later[key] = later.get(key, 0.0) + mass * gain * share
        now = later
    total = sum(now.values()).log() + log_rho + (log_t + _normal(t, 0.0, 1.0))[:, None]
    value = torch.logsumexp(total.flatten(), 0)
    if entry.model.__name__ == "vectorized_model":
        value = value + math.log(4.0)
    return _found(value, "sum over states, quadrature over R0 and rho")


@register("air")
def _(entry: Any) -> dict[str, Any]:
    # The model draws all images of a batch at once: here, many copies of each image.
    from pyro import poutine

    torch.manual_seed(5)
    copies, value, variance = 5000, 0.0, 0.0
    for image in entry.args[0]:
        parts = []
        with torch.no_grad():
            for _ in range(300):
                inputs = (image.expand(copies, -1, -1), copies)
                trace = poutine.trace(entry.model).get_trace(*inputs, **entry.kwargs)
                site = trace.nodes["obs"]
                parts.append(site["fn"].log_prob(site["value"]).double())
        like = torch.cat(parts)
        share = (like - like.max()).exp()
        value += float(like.max() + share.mean().log())
        variance += float((share.std() / share.mean()) ** 2 / len(share))
    found = _found(value, "3,000,000 draws of the prior, weighed by the images")
    return found | {"std_error": variance**0.5}


@register("neutra")
def _(entry: Any) -> dict[str, Any]:
    del entry
    return _found(0.0, "nothing is observed")
