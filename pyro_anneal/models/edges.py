r"""Densities and draws in the unconstrained coordinate itself, where values round to an edge.

``value = sigmoid(u)`` is 1 - eps at u = 17 in float32, while its Jacobian goes on falling: beyond,
a density evaluated at the value is cut off, and draws that were rounded to the edge become an atom.
Families with mass there (Beta, Dirichlet, Gamma of small shape and their kin) have closed forms in
u, through :math:`\log\sigma(\pm u)`. Here log p(z) is the density at the exact z, whatever the
rounded one that the rest of the model reads, and draws are made in u.

Source: for log-gamma draws of small shape, Marsaglia and Tsang (2000), *A simple method for
generating gamma variables*, section 6: :math:`G_a = G_{a + 1} U^{1 / a}`.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import transforms as T
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch import distributions as families
from torch.distributions import Transform, TransformedDistribution
from torch.nn.functional import logsigmoid

from .charts import BendTransform
from .sites import base_distribution
from .supports import Image, bijection_onto, leaf_constraint, normalized_support
from .types import Distribution

__all__ = [
    "bend",
    "draw_unconstrained",
    "exact_log_det",
    "exact_log_prob",
    "has_closed_form",
    "same_kind",
]

# The classes of torch: those of Pyro derive from them, and Chi2 from a Gamma.
_BETA, _KUMARASWAMY, _DIRICHLET = families.Beta, families.Kumaraswamy, families.Dirichlet
_GAMMA, _WEIBULL = families.Gamma, families.Weibull
_INVERSE_GAMMA = (dist.InverseGamma, getattr(families, "InverseGamma", dist.InverseGamma))
_RELAXED_BERNOULLI = families.RelaxedBernoulli
_RELAXED_CATEGORICAL = families.RelaxedOneHotCategorical
_OWN = (_BETA, _KUMARASWAMY, _DIRICHLET, _GAMMA, *_INVERSE_GAMMA, _WEIBULL)
_TINY_TAIL = -30.0  # log of a probability below which 1 - (1 - t)^a is a t


def has_closed_form(fn: Distribution) -> bool:
    """Tells whether a family's density and draws are known in u."""
    base = base_distribution(fn)
    known = isinstance(base, (*_OWN, _RELAXED_BERNOULLI, _RELAXED_CATEGORICAL))
    return (known and not _is_redefined(base)) or _is_image(base)


def _is_redefined(fn: Distribution) -> bool:
    """Tells whether a user's class has a density or draws of its own, whatever it derives from."""
    owners = [
        next(kind for kind in type(fn).__mro__ if name in vars(kind)).__module__.split(".")[0]
        for name in ("log_prob", "rsample", "sample", "support")
    ]
    return not set(owners) <= {"torch", "pyro"}


def _is_image(fn: Distribution) -> bool:
    return (
        isinstance(fn, TransformedDistribution)
        and isinstance(leaf_constraint(normalized_support(fn)), Image)
        and has_closed_form(fn.base_dist)
    )


def same_kind(first: Distribution, second: Distribution) -> bool:
    """Tells whether two bijections are one sigmoid, exponential or stick-breaking transform."""
    kinds = {type(_leaf(first)), type(_leaf(second))}
    known = {T.SigmoidTransform, T.StickBreakingTransform, T.ExpTransform}
    return len(kinds) == 1 and kinds <= known


def _leaf(transform: Transform) -> Transform:
    while isinstance(transform, T.IndependentTransform):
        transform = transform.base_transform
    if isinstance(transform, T.ComposeTransform) and len(transform.parts) == 1:
        return _leaf(transform.parts[0])
    return transform


def bend(fn: Distribution) -> Any:
    """Finds the transform under which the tails of u in the prior are no heavier than a normal's.

    Small shapes give u exponential tails, as long as 1 / shape, which no Gaussian start reaches.

    Args:
        fn: The site's distribution.

    Returns:
        A transform from v to u, the identity where no tail is heavy; None for other families.
    """
    rates = _tail_rates(base_distribution(fn))
    if rates is None:
        return None
    bends = [(1.0 / rate - 1.0).clamp(min=0.0) for rate in rates]
    return BendTransform(*bends)


def _tail_rates(fn: Distribution) -> tuple[Tensor, Tensor] | None:
    """Finds the rates at which the density of u falls to the left and to the right."""
    if not has_closed_form(fn):
        return None
    if isinstance(fn, _BETA | _KUMARASWAMY):
        return fn.concentration1, fn.concentration0
    if isinstance(fn, _DIRICHLET):
        a = fn.concentration
        return a[..., :-1], a.flip(-1).cumsum(-1).flip(-1)[..., 1:]
    if isinstance(fn, _GAMMA | _WEIBULL):
        return fn.concentration, torch.ones_like(fn.concentration)
    if isinstance(fn, _INVERSE_GAMMA):
        rate = fn.base_dist.concentration
        return torch.ones_like(rate), rate
    if isinstance(fn, _RELAXED_BERNOULLI):
        return fn.temperature, fn.temperature
    return _tail_rates(base_distribution(fn.base_dist)) if _is_image(fn) else None


def exact_log_det(transform: Transform, u: Tensor, value: Tensor) -> Tensor:
    """Computes log |dz/du|, also where ``value`` has rounded to an edge."""
    if isinstance(_leaf(transform), T.StickBreakingTransform):
        log_share, log_rest, _ = _sticks(u)
        return (log_share + log_rest).sum(-1)
    log_det: Tensor = transform.log_abs_det_jacobian(u, value)
    return log_det


def exact_log_prob(fn: Distribution, u: Tensor) -> Tensor | None:
    """Computes log p(z) at the exact z of u, in the coordinate of the site's own support.

    Args:
        fn: The site's distribution, without masks.
        u: Unconstrained value, shape ``[*batch_shape, *unconstrained_event_shape]``.

    Returns:
        Log density ``[*batch_shape]``, or None where no closed form is known.

    Example:
        >>> u = torch.tensor(90.0)  # sigmoid(u) rounds to 1
        >>> exact_log_prob(dist.Beta(2.0, 0.5), u)
        tensor(44.7123)
    """
    base = base_distribution(fn)
    if not has_closed_form(base):
        return None
    extra = len(fn.event_shape) - len(base.event_shape)
    log_prob: Tensor = sum_rightmost(_density(base, u), extra)
    return log_prob


def _density(fn: Distribution, u: Tensor) -> Any:
    if isinstance(fn, _BETA):
        a, b = fn.concentration1, fn.concentration0
        constant = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
        return constant + (a - 1.0) * logsigmoid(u) + (b - 1.0) * logsigmoid(-u)
    if isinstance(fn, _KUMARASWAMY):
        a, b = fn.concentration1, fn.concentration0
        log_rest = _log_one_minus_power(logsigmoid(u), logsigmoid(-u), a)
        return (a * b).log() + (a - 1.0) * logsigmoid(u) + (b - 1.0) * log_rest
    if isinstance(fn, _DIRICHLET):
        a = fn.concentration
        constant = torch.lgamma(a.sum(-1)) - torch.lgamma(a).sum(-1)
        return constant + ((a - 1.0) * _log_simplex(u)).sum(-1)
    if isinstance(fn, _GAMMA):
        a, rate = fn.concentration, fn.rate
        return a * rate.log() - torch.lgamma(a) + (a - 1.0) * u - rate * u.exp()
    if isinstance(fn, _INVERSE_GAMMA):
        a, rate = fn.base_dist.concentration, fn.base_dist.rate
        return a * rate.log() - torch.lgamma(a) - (a + 1.0) * u - rate * (-u).exp()
    if isinstance(fn, _WEIBULL):
        k, log_scale = fn.concentration, fn.scale.log()
        return k.log() - k * log_scale + (k - 1.0) * u - (k * (u - log_scale)).exp()
    if isinstance(fn, _RELAXED_BERNOULLI):
        return fn.base_dist.log_prob(u) - logsigmoid(u) - logsigmoid(-u)
    if isinstance(fn, _RELAXED_CATEGORICAL):
        log_simplex = _log_simplex(u)
        return fn.base_dist.log_prob(log_simplex) - log_simplex.sum(-1)
    return _image_density(fn, u)


def _image_density(fn: Distribution, u: Tensor) -> Any:
    """Pushes the exact density of the base through the transforms."""
    inner = bijection_onto(normalized_support(fn.base_dist))
    value = inner(u)
    log_prob = exact_log_prob(fn.base_dist, u)
    if log_prob is None:
        return None
    event_dim = len(fn.base_dist.event_shape)
    for transform in fn.transforms:
        after = transform(value)
        event_dim = max(event_dim, transform.domain.event_dim)
        log_det = transform.log_abs_det_jacobian(value, after)
        log_det = sum_rightmost(log_det, event_dim - transform.domain.event_dim)
        log_prob = log_prob - log_det
        event_dim += transform.codomain.event_dim - transform.domain.event_dim
        value = after
    return sum_rightmost(log_prob, len(fn.event_shape) - event_dim)


def _log_one_minus_power(log_z: Tensor, log_rest: Tensor, power: Tensor) -> Tensor:
    """Computes log(1 - z^a) from log z and log(1 - z)."""
    near = log_rest < _TINY_TAIL
    safe = torch.where(near, -1.0, log_z)
    return torch.where(near, power.log() + log_rest, _log1mexp(power * safe))


def _log1mexp(x: Tensor) -> Tensor:
    """Computes log(1 - exp(x)) for x < 0."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    small = x > -0.693
    first = (-torch.expm1(torch.where(small, x, -1.0))).log()
    return torch.where(small, first, torch.log1p(-torch.where(small, -1.0, x).exp()))


def _sticks(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes log shares of the stick, log of what each break leaves, and all that remains."""
    count = torch.arange(u.shape[-1], 0, -1, dtype=u.dtype, device=u.device)
    x = u - count.log()
    log_rest = logsigmoid(-x)
    total = log_rest.cumsum(-1)
    return logsigmoid(x) + total - log_rest, log_rest, total[..., -1:]


def _log_simplex(u: Tensor) -> Tensor:
    """Computes log z of the stick-breaking transform."""
    log_share, _, last = _sticks(u)
    return torch.cat([log_share, last], -1)


def draw_unconstrained(fn: Distribution) -> Tensor | None:
    """Draws u, so that ``z(u)`` is a draw that no rounding has moved.

    Args:
        fn: The site's distribution.

    Returns:
        Shape ``[*batch_shape, *unconstrained_event_shape]``, or None where no closed form is known.
    """
    base = base_distribution(fn)
    if not has_closed_form(base):
        return None
    shape = fn.batch_shape + fn.event_shape
    if base is not fn:
        base = base.expand(shape[: len(shape) - len(base.event_shape)])
    with torch.no_grad():
        u: Tensor = _draw(base)
    return u


def _draw(fn: Distribution) -> Any:
    if isinstance(fn, _BETA):
        return _log_gamma(fn.concentration1) - _log_gamma(fn.concentration0)
    if isinstance(fn, _KUMARASWAMY):
        log_rest = _log_uniform(fn.concentration0) / fn.concentration0  # log(1 - z^a)
        near = log_rest < _TINY_TAIL
        log_z = _log1mexp(torch.where(near, -1.0, log_rest)) / fn.concentration1
        log_other = torch.where(
            near, log_rest - fn.concentration1.log(), _log1mexp(torch.where(near, -1.0, log_z))
        )
        return torch.where(near, 0.0, log_z) - log_other
    if isinstance(fn, _DIRICHLET):
        return _break(_log_gamma(fn.concentration))
    if isinstance(fn, _GAMMA):
        return _log_gamma(fn.concentration) - fn.rate.log()
    if isinstance(fn, _INVERSE_GAMMA):
        return fn.base_dist.rate.log() - _log_gamma(fn.base_dist.concentration)
    if isinstance(fn, _WEIBULL):
        return fn.scale.log() + (-_log_uniform(fn.concentration)).log() / fn.concentration
    if isinstance(fn, _RELAXED_BERNOULLI):
        return fn.base_dist.sample()
    if isinstance(fn, _RELAXED_CATEGORICAL):
        return _break(fn.base_dist.sample())
    return draw_unconstrained(fn.base_dist)


def _log_uniform(like: Tensor) -> Tensor:
    return -torch.empty_like(like).exponential_()


def _log_gamma(shape: Tensor) -> Tensor:
    """Draws logs of standard gamma variables."""
    return torch._standard_gamma(shape + 1.0).log() + _log_uniform(shape) / shape


def _break(log_parts: Tensor) -> Tensor:
    """Finds u of the stick-breaking transform from logs of parts, up to a common factor."""
    tails = log_parts.flip(-1).logcumsumexp(-1).flip(-1)[..., 1:]
    size = log_parts.shape[-1] - 1
    count = torch.arange(size, 0, -1, dtype=log_parts.dtype, device=log_parts.device)
    return log_parts[..., :-1] - tails + count.log()
