r"""Whether a user's own distribution is normalized on the support that it declares.

The families of torch and Pyro are known. A class of the user's own may declare the reals where its
formula is a density on the positive numbers only: ``log_prob`` goes on below zero, base and bounds
with it. In one dimension the mass is measured, in the unconstrained coordinate u:

.. math:: \int p(z(u)) \, |dz/du| \, du = 1

at the distribution's own draws and on a grid that widens like sinh away from them, the log density
taken for linear in between. The sum is repeated on every other point: only what both agree on is an
objection. Draws outside
the support, or without density, are one in any dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributions import Transform, TransformedDistribution

from .sites import base_distribution
from .supports import bijection_onto, can_be_sampled, normalized_support
from .types import Distribution, Support
from .validation import validation_disabled

__all__ = ["check_domains", "check_normalized", "is_of_user", "saturates"]

_KNOWN = ("torch", "pyro")
# Of the families of torch, one whose constant is wrong at extreme parameters (logits beyond 30).
_DOUBTFUL = (torch.distributions.ContinuousBernoulli,)
_DRAWS = 2000
_LARGEST_BATCH = 2000  # elements beyond which only draws are looked at
_TOLERANCE = 0.02  # of the mass
_KS = 3.0  # Kolmogorov's statistic: exceeded by chance once in 3e7


def is_of_user(fn: Distribution) -> bool:
    """Tells whether a distribution, or a part of it, is of a class outside of torch and Pyro."""
    fn = base_distribution(fn)
    if type(fn).__module__.split(".")[0] not in _KNOWN:
        return True
    parts = [getattr(fn, "base_dist", None), getattr(fn, "component_distribution", None)]
    if isinstance(fn, TransformedDistribution):
        kinds = [type(transform).__module__.split(".")[0] for transform in fn.transforms]
        if any(kind not in _KNOWN for kind in kinds):
            return True
    return any(part is not None and part is not fn and is_of_user(part) for part in parts)


def saturates(transform: Transform, value: Tensor) -> Tensor:
    """Tells where a value no longer moves with u: at its edge, or by half a unit of u.

    Args:
        transform: The bijection onto the support.
        value: Values of shape ``[..., *event_shape]``.

    Returns:
        Truth values, one per value, of whether any of its coordinates stands still.

    Example:
        >>> sigmoid = torch.distributions.transforms.SigmoidTransform()
        >>> saturates(sigmoid, torch.tensor([0.5, 1.0 - 6e-8]))
        tensor([False,  True])
    """
    u = transform.inv(value)
    here = transform(u)
    rank = transform.codomain.event_dim
    still = torch.zeros(value.shape[: value.dim() - rank], dtype=torch.bool, device=value.device)
    for step in (-0.5, 0.5):
        moved = transform(u + step) != here
        moved = moved.reshape(*still.shape, -1).any(-1)
        still |= ~moved | ~value.reshape(*still.shape, -1).isfinite().all(-1)
    return still


@contextmanager
def _generator_of_its_own() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def check_normalized(where: str, fn: Distribution) -> None:
    """Checks draws, and in one dimension the mass, of a distribution of the user's own.

    Args:
        where: Names the site in messages, as in ``latent site "z"``.
        fn: Its distribution; others than those of the user's own pass.

    Raises:
        ValueError: If draws lie outside the declared support or have no density, the density does
            not integrate to one over it, or draws do not follow it.
    """
    fn = base_distribution(fn)
    if not (is_of_user(fn) or isinstance(fn, _DOUBTFUL)) or not can_be_sampled(fn):
        return
    try:
        support = normalized_support(fn)
    except (NotImplementedError, ValueError):
        return  # reported by name elsewhere
    if support.is_discrete:
        return
    with torch.no_grad(), validation_disabled():
        problem = _problem(fn, support)
    if problem is not None:
        raise ValueError(f"at {where}: {problem}")


def check_domains(where: str, fn: Distribution) -> None:
    """Checks that draws of a base lie where the transforms of a distribution are defined.

    A power of a normal variable, say, has a density for positive numbers alone, and its formula
    gives a part of the mass away.

    Args:
        where: Names the site in messages, as in ``latent site "z"``.
        fn: Its distribution; others than transformed ones pass.

    Raises:
        ValueError: If some draws lie outside, by more than rounding.
    """
    fn = base_distribution(fn)
    if not isinstance(fn, TransformedDistribution) or not can_be_sampled(fn.base_dist):
        return
    check_domains(where, fn.base_dist)
    with torch.no_grad(), validation_disabled(), _generator_of_its_own():
        try:
            value = fn.base_dist.sample((_DRAWS,))
            for transform in fn.transforms:
                outside = ~_near(transform.domain, value)
                if bool(outside.any()):
                    break
                value = transform(value)
            else:
                return
        except (NotImplementedError, RuntimeError, TypeError, ValueError, IndexError):
            return  # no sample_shape, or a domain that cannot be asked
    raise ValueError(
        f"at {where}: {_share(outside):.2g} of the draws of {type(fn.base_dist).__name__} lie "
        f"outside of {transform.domain}, on which {type(transform).__name__} is one to one, so that "
        f"{type(fn).__name__} has no normalized density: use a base or a transform that fits"
    )


def _near(domain: Support, value: Tensor) -> Tensor:
    """Tells which values lie in a set, or at its edge by rounding."""
    inside: Tensor = domain.check(value)
    step = 1e-5 * (1.0 + value.abs())
    for moved in (value + step, value - step):
        inside |= domain.check(moved)
    return inside


def _share(condition: Tensor) -> float:
    return float(condition.double().mean())


def _problem(fn: Distribution, support: Support) -> str | None:
    kind = type(fn).__name__
    size = max(torch.Size(fn.batch_shape).numel(), 1)
    try:
        with _generator_of_its_own():
            draws = fn.sample((_DRAWS if size <= _LARGEST_BATCH else 8,))
            log_prob, again = fn.log_prob(draws), fn.log_prob(draws)
        if bool(((again != log_prob) & ~(again.isnan() & log_prob.isnan())).any()):
            return None  # an estimate, which is refused by name where it is annealed
        transform = bijection_onto(support)
        at_edge = saturates(transform, draws)
    except (NotImplementedError, RuntimeError, TypeError, ValueError, IndexError):
        return None  # no sample_shape: nothing can be said
    if not draws.is_floating_point():
        return None
    inside = support.check(draws)
    if not bool(inside.all()):
        return (
            f"draws of {kind} lie outside of its declared support {support}, such as "
            f"{_example(draws, inside, fn)}: give the class the support that its draws have"
        )
    dense = (log_prob > -torch.inf) | at_edge  # False for NaN
    if not bool(dense.all()):
        return (
            f"{kind} has no density (log_prob is -inf or NaN) at draws of its own, such as "
            f"{_example(draws, dense, fn)}: its sample and log_prob disagree"
        )
    if len(fn.event_shape) or size > _LARGEST_BATCH or log_prob.shape != draws.shape:
        return None
    return _problem_of_mass(fn, support, draws)


def _example(draws: Tensor, fine: Tensor, fn: Distribution) -> Distribution:
    first = tuple(int(i) for i in (~fine).nonzero()[0])
    return draws[first[: draws.dim() - len(fn.event_shape)]].tolist()


def _problem_of_mass(fn: Distribution, support: Support, draws: Tensor) -> str | None:
    kind, transform = type(fn).__name__, bijection_onto(support)
    edge = saturates(transform, draws).double().mean(0).flatten()  # share of the draws
    u = transform.inv(draws)
    knots = _knots(u)
    fine, share_below = _integrate(fn, transform, knots, u.dtype)
    coarse, _ = _integrate(fn, transform, knots[::2], u.dtype)
    mass = fine + edge
    slack = _TOLERANCE + 5.0 * (edge * (1.0 - edge) / len(draws)).sqrt()
    off, sure = mass - 1.0, coarse + edge - 1.0
    wrong = (off.abs() > slack) & (sure.abs() > slack) & (off.sign() == sure.sign())
    settled = ((fine - coarse).abs() <= 0.25 * off.abs()) | ((fine > 2.0) & (coarse > 2.0))
    wrong &= settled & ~fine.isnan()
    if bool(wrong.any()):
        worst = mass[wrong][0].item()
        size = f"{worst:.3g}" if worst < 1e6 else "infinity, or a very large number,"
        return (
            f"the density of {kind} integrates to {size} over its declared support {support}, not "
            "to 1, so that no bound on the evidence would hold: declare the support on which it "
            "is normalized, return -inf outside, or add the missing constant to log_prob; a prior "
            "without a normalizer is written as ImproperUniform and pyro.factor"
        )
    settled = (fine - coarse).abs() <= 0.005
    distance = _distance(knots, share_below, u.reshape(len(u), -1))
    apart = (distance * math.sqrt(len(u)) > _KS) & settled & (distance > 0.02) & (edge == 0.0)
    if bool(apart.any()):
        return (
            f"draws of {kind} do not follow its log_prob (their distribution functions differ by "
            f"{distance[apart][0].item():.2f}): correct sample or log_prob; chains start from "
            "the one and are weighed by the other"
        )
    return None


def _knots(u: Tensor) -> Tensor:
    """Chooses where to evaluate, ``[N, B]`` in increasing order, N odd."""
    u = u.reshape(len(u), -1).double().sort(0).values
    low, middle, high = u.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=u.dtype).to(u), dim=0)
    scale = ((high - low) / 2.56).clamp(min=1e-6 * (1.0 + middle.abs()))
    near = torch.arange(-8.0, 8.0, 0.02, dtype=u.dtype, device=u.device)
    far = torch.arange(8.0, 60.0, 0.1, dtype=u.dtype, device=u.device)
    steps = torch.cat([-far.flip(0), near, far])
    grid = middle + scale * steps.sinh().unsqueeze(-1)
    points = torch.cat([u, grid]).sort(0).values
    between = 0.5 * (points[1:] + points[:-1])
    knots = torch.empty(2 * len(points) - 1, points.shape[1], dtype=u.dtype, device=u.device)
    knots[::2], knots[1::2] = points, between
    return knots


def _integrate(
    fn: Distribution, transform: Transform, knots: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Integrates a piecewise log-linear density: the mass ``[B]``, and its part below each knot."""
    u = knots.to(dtype).reshape(len(knots), *fn.batch_shape)
    value = transform(u)
    log_density = fn.log_prob(value) + transform.log_abs_det_jacobian(u, value)
    moves = ~saturates(transform, value)
    log_density = torch.where(moves & log_density.isfinite(), log_density, -torch.inf)
    log_density = log_density.double().reshape(len(knots), -1).clamp(-1e6, 600.0)
    top = torch.maximum(log_density[1:], log_density[:-1])
    fall = log_density.diff(dim=0).abs().clamp(min=1e-12)
    area = knots.diff(dim=0) * top.exp() * -torch.expm1(-fall) / fall
    below = torch.cat([torch.zeros_like(area[:1]), area.cumsum(0)])
    return below[-1], below


def _distance(knots: Tensor, below: Tensor, draws: Tensor) -> Tensor:
    """Computes Kolmogorov's distance of draws ``[n, B]`` from a distribution function."""
    ordered = draws.double().sort(0).values
    at = torch.searchsorted(knots.T.contiguous(), ordered.T.contiguous()).clamp(max=len(knots) - 1)
    expected = below.gather(0, at.T) / below[-1].clamp(min=1e-300)
    ranks = torch.arange(len(ordered), dtype=torch.float64, device=draws.device).unsqueeze(-1)
    above, under = (ranks + 1.0) / len(ordered) - expected, expected - ranks / len(ordered)
    return torch.maximum(above, under).amax(0)
