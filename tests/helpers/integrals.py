"""Integrals of densities of few unconstrained latents by the trapezoidal rule."""

import math

import torch


def grid(dim, half_width, count):
    """Points of the trapezoidal rule on a cube, ``[count ** dim, dim]``, and the log volume."""
    axis = torch.linspace(-half_width, half_width, count)
    points = torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)
    return points, dim * math.log(2 * half_width / (count - 1))


def integrate(density, layout, half_width, count):
    """Integrates base and target over u by the trapezoidal rule, to logs of shape ``batch``."""
    points, log_volume = grid(layout.dim, half_width, count)
    batch = layout.batch_shape
    base, target = [], []
    for part in points.split(5**7):  # equal parts, for which there is one graph
        position = part.reshape(-1, *[1] * len(batch), layout.dim).expand(-1, *batch, -1)
        with torch.no_grad():
            state = density(position.contiguous())
        base.append(state.log_base)
        target.append(state.log_target)
    return tuple(torch.cat(v).logsumexp(0) + log_volume for v in (base, target))
