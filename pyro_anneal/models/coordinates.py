r"""Non-centred coordinates for latents whose location or scale depends on other latents.

A site ``theta ~ Normal(mu, tau)`` under an unknown scale makes a funnel, which no Gaussian fits and
no single step size crosses. In the coordinate ``w = (theta - mu) / tau`` its prior is standard and
independent. Which coordinate to use is a free choice: the bijection onto a support may depend on
latents sampled before, so the model, its sites and its evidence stay what they are.

Source: Papaspiliopoulos, Roberts and Skold (2007), *A general framework for the parametrization of
hierarchical models*; Gorinova, Moore and Hoffman (2020), *Automatic reparameterisation of
probabilistic programs*.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import transforms as T
from torch import Tensor

from .discrete import discrete_map, is_discrete
from .edges import bend
from .sites import Layout, base_distribution
from .supports import bijection_onto, normalized_support
from .types import Arguments, Distribution, Fn

__all__ = ["bijection", "hierarchical_sites", "noncentred"]


_REAL = (dist.Normal, dist.StudentT, dist.Cauchy, dist.Laplace)
_POSITIVE = (dist.HalfNormal, dist.HalfCauchy)


def bijection(fn: Distribution, *, noncentred: bool = False) -> Any:
    """Chooses the map from a site's unconstrained value to its support.

    Args:
        fn: The site's distribution, given the latents before it.
        noncentred: Whether to take out location and scale; no effect on other families.

    Returns:
        A torch transform.

    Example:
        >>> bijection(dist.Normal(3.0, 2.0), noncentred=True)(torch.tensor(1.0))
        tensor(5.)
    """
    if is_discrete(fn):
        return discrete_map("", fn)
    base = base_distribution(fn)
    if not noncentred or not _parameters(base):
        onto, bent = bijection_onto(normalized_support(fn)), bend(fn) if noncentred else None
        return onto if bent is None else T.ComposeTransform([bent, onto])
    if isinstance(base, dist.MultivariateNormal):
        return T.LowerCholeskyAffine(base.loc, base.scale_tril)
    shape = fn.batch_shape + fn.event_shape
    scale = base.scale.expand(shape)
    if isinstance(base, _POSITIVE):
        transform = T.ComposeTransform([T.ExpTransform(), T.AffineTransform(0.0, scale)])
    else:
        transform = T.AffineTransform(base.loc.expand(shape), scale)
        if isinstance(base, dist.LogNormal):
            transform = T.ComposeTransform([transform, T.ExpTransform()])
    return T.IndependentTransform(transform, fn.event_dim) if fn.event_dim else transform


def _parameters(base: Distribution) -> list[Tensor]:
    """Collects location and scale of a family that can be non-centred; empty for others."""
    if isinstance(base, dist.MultivariateNormal):
        # Pyro's transform knows one matrix only.
        return [base.loc, base.scale_tril] if base.scale_tril.dim() == 2 else []
    if isinstance(base, (*_REAL, dist.LogNormal)):
        return [base.loc, base.scale]
    return [base.scale] if isinstance(base, _POSITIVE) else []


def hierarchical_sites(
    model: Fn, arguments: Arguments, layout: Layout, values: dict[str, Tensor]
) -> frozenset[str]:
    """Names the sites whose location or scale depends on other latents, or whose tails are long.

    Args:
        model: Pyro model.
        arguments: Its ``(args, kwargs)``.
        layout: Its layout.
        values: Values of all latent sites at which to look.

    Returns:
        Names of the sites that non-centred coordinates concern.
    """
    args, kwargs = arguments
    names = [site.name for site in layout.sites]
    copies = {name: values[name].detach().clone() for name in names}
    data = {name: v.requires_grad_(v.is_floating_point()) for name, v in copies.items()}
    found = set()
    with torch.enable_grad(), pyro.validation_enabled(False), poutine.block():
        trace = poutine.trace(poutine.condition(model, data=data)).get_trace(*args, **kwargs)
        for name in names:
            parameters = _parameters(base_distribution(trace.nodes[name]["fn"]))
            moving = [p.sum() for p in parameters if p.requires_grad]
            if moving and _depends(
                torch.stack(moving).sum(), [v for v in data.values() if v.requires_grad]
            ):
                found.add(name)
            bent = bend(trace.nodes[name]["fn"])
            if bent is not None and bool((bent.left > 0).any() | (bent.right > 0).any()):
                found.add(name)  # heavy tails, which a bent coordinate takes away
    return frozenset(found)


def _depends(value: Tensor, latents: list[Tensor]) -> bool:
    grads = torch.autograd.grad(value, latents, allow_unused=True, retain_graph=True)
    return any(grad is not None for grad in grads)


def noncentred(layout: Layout, sites: frozenset[str]) -> Layout:
    """Returns a layout whose coordinates at ``sites`` are non-centred."""
    return replace(layout, noncentred=sites, is_static=False)
