r"""Surrogates whose gradients follow the sampling paths of a guide, behind gates.

A doubly reparameterized gradient weighs particles in one way for the model's parameters and in another
for the guide's. One pass back through the model serves both: as particles and data of a batch do not
touch each other, what arrives at a sample is that particle's own, and is weighed anew there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import finite_or_zero, require_pathwise
from .particles import Particles
from .traces import Gates

__all__ = ["along_the_path", "doubly_reparameterized"]


def doubly_reparameterized(particles: Particles, weights: Tensor, path_weights: Tensor) -> Tensor:
    r"""Builds the surrogate of a doubly reparameterized gradient.

    .. math::
        \nabla_\theta: \sum_k a_k \nabla_\theta \log p(x, z_k), \qquad
        \nabla_\phi: \sum_k \Bigl(a_k - \frac{\partial a_k}{\partial \log w_k}\Bigr)
        \frac{\partial \log w_k}{\partial z_k} \nabla_\phi z_k

    with :math:`a_k = \partial L / \partial \log w_k` for a bound L of the log-weights. The gradient of
    the guide's density at fixed z, whose expectation the second term replaces, is not there.

    Source: Tucker et al. (2019), *Doubly Reparameterized Gradient Estimators for Monte Carlo
    Objectives*, section 3, for L = IWAE.

    Args:
        particles: Particles with open gates, which this function closes.
        weights: ``a``, ``[K, *batch]``.
        path_weights: ``a`` minus its derivative, ``[K, *batch]``.

    Returns:
        Scalar whose gradient is the estimate of the bound's gradient.

    Raises:
        NotImplementedError: If a site of the guide is not reparameterized, masked or scaled.
    """
    require_pathwise(particles, 'gradient="dreg"', 'gradient="auto"')
    if particles.altered_sites:
        raise NotImplementedError(
            f'gradient="dreg" needs the plain density of the guide, but site '
            f'"{particles.altered_sites[0]}" has a mask or a scale of its own; use '
            'gradient="reparam"'
        )
    together = _in_one_pass(particles, weights.detach(), path_weights.detach())
    if together is not None:
        return together
    surrogate = particles.total(
        (weights.detach() * finite_or_zero(particles.log_joint)).sum(dim=0)
    )
    return surrogate + along_the_path(particles, path_weights)


def _in_one_pass(particles: Particles, weights: Tensor, path_weights: Tensor) -> Tensor | None:
    """Builds the same surrogate with gates that weigh gradients anew; None where they cannot.

    A gate multiplies what reaches a particle by the ratio of both weights. That is right once on the
    way, so samples that depend on others, as in a hierarchical guide, take two passes; so do particles
    of separate runs.
    """
    gates, axes = particles.gates, particles.axes
    if gates is None or axes is None or _are_chained(gates):
        return None
    # A weight of zero has no ratio; one below all rounding has, and changes nothing.
    tiny = torch.finfo(weights.dtype).eps ** 2
    weights = torch.where(weights.abs() < tiny, tiny, weights)
    ratio = path_weights / weights
    factors = [
        _spread(ratio, axes, output, event_dim)
        for output, event_dim in zip(gates.outputs, gates.event_dims, strict=True)
    ]
    if any(factor is None for factor in factors):
        return None
    surrogate = particles.total((weights * finite_or_zero(particles.log_joint)).sum(dim=0))
    # The guide's density, at fixed parameters; that of points has no gradient.
    # A particle without weight counts by neither, though its row may have no other.
    log_guide = torch.where(particles.log_joint == -torch.inf, 0.0, particles.log_guide)
    density = particles.total((path_weights * finite_or_zero(log_guide)).sum(dim=0))
    if gates.outputs and density.requires_grad:
        grads = torch.autograd.grad(density, gates.outputs, retain_graph=True, allow_unused=True)
        for grad, value in zip(grads, gates.inputs, strict=True):
            if grad is not None:
                surrogate = surrogate - (grad * value).sum()
    gates.factors = factors
    return surrogate


def _spread(ratio: Tensor, axes: Sequence[int], sample: Tensor, event_dim: int) -> Tensor | None:
    """Shapes ``[K, *batch]`` to multiply a sample, whose last axes are its event."""
    shape = [1] * sample.dim()
    for axis, size in zip(axes, ratio.shape, strict=True):
        place = sample.dim() - event_dim + axis
        if place < 0 or sample.shape[place] != size:
            return None
        shape[place] = size
    return ratio.reshape(shape)


def _are_chained(gates: Gates) -> bool:
    """Tells whether a sample of the guide depends on another one."""
    if len(gates.outputs) < 2:
        return False
    others = {output.grad_fn for output in gates.outputs}
    seen = set()
    stack = [value.grad_fn for value in gates.inputs]
    while stack:
        node = stack.pop()
        if node in others:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            stack += [following for following, _ in node.next_functions]
    return False


def along_the_path(particles: Particles, weights: Tensor) -> Tensor:
    r"""Builds the surrogate of ``sum_k a_k log w_k`` along the guide's sampling paths alone.

    Nothing of it reaches the model's parameters, nor the guide's through its density at fixed z.
    It closes the gates, so that from here on the log-weights treat the samples as constants.

    Args:
        particles: Particles with open gates.
        weights: ``a``, ``[K, *batch]``.

    Returns:
        Scalar whose gradient is the path's.
    """
    gates = particles.gates
    if gates is None:
        raise TypeError("the particles were drawn without gates")
    path = particles.total((weights.detach() * finite_or_zero(particles.log_weights)).sum(dim=0))
    surrogate = torch.zeros_like(path.detach())
    if gates.outputs:
        grads = torch.autograd.grad(path, gates.outputs, retain_graph=True, allow_unused=True)
        for grad, value in zip(grads, gates.inputs, strict=True):
            if grad is not None:
                surrogate = surrogate + (grad * value).sum()
    gates.closed = True
    return surrogate
