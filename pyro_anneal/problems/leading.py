"""Leading coordinates: those along which curvature changes, given which all else is Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor

from .gaussian import Candidates, hessians
from .rows import Rows

__all__ = ["MOST_LEADING", "is_bent", "leading_coordinates"]

# Leading coordinates at most, and those that are tried: where curvature changes most.
MOST_LEADING, _MOST_LIKELY = 3, 12
# Squared size of third derivatives from which a good sample is not believed, and directions probed.
_BENT, _NUM_PROBES = 1.0, 16
# Third derivatives left to explain, squared: what is little, over that at first, and in itself.
_LEAST_SHARE, _LEAST_SIZE = 0.002, 0.1


def is_bent(rows: Rows, fit: Candidates, generator: torch.Generator) -> bool:
    r"""Asks whether third derivatives are large, from a few gradients.

    For directions v of independent signs in the fit's units, :math:`\|T(v, v)\|^2` is at least
    :math:`2 \|T\|^2` on average, up to the diagonal.

    Args:
        rows: Evaluates the target.
        fit: A Gaussian, ``[1, D]``.
        generator: Source of directions.
    """
    loc, scale = fit.loc[0], fit.scale_tril[0]
    shape = (_NUM_PROBES, len(loc))
    noise = torch.randn(shape, dtype=loc.dtype, device=loc.device, generator=generator)
    moved = 0.5 * noise.sign() @ scale.mT
    grad = rows(torch.cat([loc + moved, loc - moved, loc.unsqueeze(0)]))[1]
    bent = (grad[:_NUM_PROBES] + grad[_NUM_PROBES:-1] - 2.0 * grad[-1]) / 0.5**2
    return float((bent @ scale).square().sum(-1).mean()) > 2.0 * _BENT


def leading_coordinates(rows: Rows, fit: Candidates) -> list[int]:
    r"""Finds coordinates given which the others are next to a Gaussian.

    With :math:`T_{ijk}` the third derivatives of the target, in units of the Gaussian's conditional
    covariance given h, :math:`\|T\|^2` over all others is what h leaves unexplained; a Gaussian
    falls short of it by about :math:`\|T\|^2 / 12` nats. Coordinates are added one by one, each the
    one that leaves the least.

    Args:
        rows: Evaluates the target.
        fit: A Gaussian, ``[1, D]``.

    Returns:
        Up to three coordinates; none where a Gaussian fits.
    """
    loc, scale = fit.loc[0], fit.scale_tril[0]
    precision = torch.cholesky_inverse(scale)
    width = precision.diagonal().rsqrt()
    shifts = torch.diag(width)
    found = hessians(rows, torch.cat([loc + shifts, loc - shifts])).nan_to_num()
    third = (found[: len(loc)] - found[len(loc) :]) / (2.0 * width).view(-1, 1, 1)
    lead: list[int] = []
    size = first = _unexplained(third, precision, lead)
    most = min(MOST_LEADING, len(loc) - 1)
    while len(lead) < most and size > max(_LEAST_SIZE, _LEAST_SHARE * first):
        rest = _likely(third, precision, lead)
        left = [_unexplained(third, precision, [*lead, i]) for i in rest]
        least = min(range(len(rest)), key=left.__getitem__)
        if not left[least] < 0.7 * size:
            break
        lead, size = [*lead, rest[least]], left[least]
    return lead


def _likely(third: Tensor, precision: Tensor, lead: list[int]) -> list[int]:
    """Takes the coordinates along which the curvature of those that do not lead changes most."""
    rest, factor, part = _given(third, precision, lead)
    width = precision.diagonal()[rest].rsqrt()
    moved = (factor.mT @ part @ factor).square().sum((1, 2)) * width.square()
    return [rest[i] for i in moved.argsort(descending=True)[:_MOST_LIKELY].tolist()]


def _given(third: Tensor, precision: Tensor, lead: list[int]) -> tuple[list[int], Tensor, Tensor]:
    """Takes what does not lead: coordinates, factor of their covariance, third derivatives."""
    rest = [i for i in range(len(third)) if i not in lead]
    own = torch.linalg.inv(precision[rest][:, rest])
    factor = torch.linalg.cholesky(0.5 * (own + own.mT))
    return rest, factor, third[rest][:, rest][:, :, rest]


def _unexplained(third: Tensor, precision: Tensor, lead: list[int]) -> float:
    """Computes the squared size of third derivatives given the leading coordinates."""
    _, factor, part = _given(third, precision, lead)
    for _ in range(3):
        part = torch.tensordot(part, factor, dims=([0], [0]))
    return float(part.square().sum())
