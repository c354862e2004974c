r"""Sites whose entropy is known: control variates for averages over simulated pairs.

At a site that is drawn from its own distribution f, whatever came before it,

.. math:: E[\log f(v) + H(f)] = 0,

so the sum of such terms over sites has mean zero over pairs simulated from the model.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from .sites import Layout, density_sites, sum_to_batch
from .types import Arguments, Distribution, Fn
from .validation import validation_disabled

__all__ = ["entropy_of", "excess", "pair_controls"]


def entropy_of(fn: Distribution) -> Tensor | None:
    """Computes the entropy of a distribution where torch has it in closed form.

    Args:
        fn: A distribution.

    Returns:
        Entropy in nats, in the batch shape of ``fn``, or None where it is not known. A user's own
        class is not trusted with it: its entropy may be a bound or an estimate.

    Example:
        >>> round(entropy_of(dist.Normal(0.0, 1.0)).item(), 3)
        1.419
        >>> entropy_of(dist.Poisson(2.0)) is None
        True
    """
    inner = fn
    while isinstance(inner, torch.distributions.Independent):
        inner = inner.base_dist
    if not type(inner).entropy.__module__.startswith("torch.distributions."):
        return None
    try:
        with validation_disabled():
            entropy: Tensor = fn.entropy()
    except (NotImplementedError, AttributeError):  # an expanded Multinomial lacks its binomial
        return None
    return entropy if bool(entropy.isfinite().all()) else None


def excess(fn: Distribution, value: Tensor) -> Tensor | None:
    """Computes ``log f(v) + H(f)``, whose mean over draws v of f is zero, or None if H is unknown.

    Example:
        >>> excess(dist.Bernoulli(0.5), torch.ones(2))
        tensor([0., 0.])
    """
    entropy = entropy_of(fn)
    return None if entropy is None else fn.log_prob(value) + entropy


def pair_controls(
    model: Fn,
    arguments: Arguments,
    latents: Mapping[str, Tensor],
    observed: Mapping[str, Tensor],
    layout: Layout,
) -> Tensor:
    """Computes the control variates of one simulated pair.

    Args:
        model: The user's model.
        arguments: ``(args, kwargs)`` of the model.
        latents: Simulated values of all latent sites, enumerated ones included.
        observed: Simulated values of the observed sites.
        layout: Which plates are the batch.

    Returns:
        Sums over latent and over observed sites, in nats, shape ``[C, *batch]`` with C up to 2,
        groups without a site of known entropy are left out.
    """
    args, kwargs = arguments
    with torch.no_grad(), validation_disabled(), poutine.block():
        conditioned = poutine.condition(model, data={**latents, **observed})
        trace = poutine.trace(conditioned).get_trace(*args, **kwargs)
        dims = [plate.dim for plate in layout.batch]
        groups: list[list[Tensor]] = [[], []]
        for name, site in density_sites(trace):
            if site["mask"] is not None or isinstance(site["fn"], dist.Delta):
                continue
            term = excess(site["fn"], site["value"])
            if term is not None:
                total = sum_to_batch(term, dims, layout.batch_shape)
                groups[name in observed].append(total)
    sums = [torch.stack(terms).sum(0) for terms in groups if terms]
    return torch.stack(sums) if sums else torch.zeros((0, *layout.batch_shape))
