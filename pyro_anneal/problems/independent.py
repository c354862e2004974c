r"""Parts of a posterior that do not meet: each is fitted by itself, and the base is their product.

Where coordinates fall into parts of which

.. math:: \log p(x, u) = \sum_b f_b(u_b)

a posterior of two modes in each of B parts has :math:`2^B` modes, which no list of fits holds; a
product of B mixtures of two does. Whether parts meet is seen in second derivatives at a few points,
and tested between far ones by exchanging one part at a time:

.. math:: f(u \text{ with } v_b) + f(v \text{ with } u_b) = f(u) + f(v)

A base is free to be wrong: chains move under the whole model, and weights take the difference in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import Density, State
from .gaussian import Candidates, elbo_of, hessians
from .rows import Rows

__all__ = ["independent_parts", "marginal_fit", "rows_of_part"]

_MOST_PARTS = 64
# Curvature between two coordinates, over the geometric mean of their own, that counts as none, and
# what exchanges may leave, over the size of the values: differences of gradients are inexact.
_NO_CURVATURE, _EXACT = {torch.float64: 1e-5, torch.float32: 1e-2}, 1e-7


def independent_parts(rows: Rows, points: Tensor) -> list[list[int]]:
    """Finds the parts into which the target falls.

    Args:
        rows: Evaluates the target.
        points: Positions of finite density at which to look, ``[P, D]``, two at least.

    Returns:
        Coordinates by part; one part of all where parts meet, or would be too many.
    """
    dim = points.shape[-1]
    whole = [list(range(dim))]
    if len(points) < 2 or points.dtype not in _NO_CURVATURE:
        return whole
    found = hessians(rows, points).abs()
    own = found.diagonal(dim1=-2, dim2=-1).clamp(min=1e-12 * float(found.amax()))
    between = found / (own.unsqueeze(-1) * own.unsqueeze(-2)).sqrt()
    meets = (between > _NO_CURVATURE[points.dtype]).any(0) | ~found.isfinite().all(0)
    parts = _connected(meets)
    if not 1 < len(parts) <= _MOST_PARTS or not _exchange(rows, points, parts):
        return whole
    return parts


def _connected(meets: Tensor) -> list[list[int]]:
    """Collects coordinates that are joined by ``meets``, ``[D, D]``."""
    label = torch.arange(len(meets), device=meets.device)
    linked = meets | meets.mT | torch.eye(len(meets), dtype=torch.bool, device=meets.device)
    for _ in range(len(meets)):
        least = torch.where(linked, label, len(meets)).amin(1)
        if bool((least == label).all()):
            break
        label = least
    labels = label.tolist()
    return [[i for i, own in enumerate(labels) if own == part] for part in sorted(set(labels))]


def _exchange(rows: Rows, points: Tensor, parts: Sequence[Sequence[int]]) -> bool:
    """Tells whether exchanging any part between two points leaves the sum of log densities."""
    first, second = points[0], points[1:]
    ours, theirs = [], []
    for part in parts:
        swapped = first.expand_as(second).clone()
        swapped[:, part] = second[:, part]
        back = second.clone()
        back[:, part] = first[part]
        ours.append(swapped)
        theirs.append(back)
    before = rows(points)[0]
    after = rows(torch.stack(ours))[0] + rows(torch.stack(theirs))[0]  # [B, P - 1]
    expected = before[:1] + before[1:]
    size = before.abs().amax() + after.abs().amax() + 1.0
    unit = _EXACT if points.dtype == torch.float64 else 1e-3
    return bool(((after - expected).abs() <= unit * size).all())


class _PartDensity:
    """The target of one part, the others held where the fit stands."""

    def __init__(self, density: Density, loc: Tensor, part: Sequence[int]) -> None:
        self.density = density
        self.loc = loc
        self.part = list(part)

    def __call__(self, position: Tensor) -> State:
        whole = self.loc.expand(*position.shape[:-1], len(self.loc)).clone()
        whole[..., self.part] = position
        state = self.density(whole)
        return state._replace(
            position=position,
            grad_base=state.grad_base[..., self.part],
            grad_target=state.grad_target[..., self.part],
        )


def rows_of_part(rows: Rows, loc: Tensor, part: Sequence[int]) -> Rows:
    """Evaluates the target at positions of one part ``[*lead, D_b]``, the others at ``loc``."""
    return Rows(_PartDensity(rows.density, loc, part), rows.size, 0)


def marginal_fit(
    rows: Rows, fit: Candidates, part: Sequence[int], generator: torch.Generator
) -> Candidates:
    """Takes one part of a Gaussian ``[1, D]``, with the bound of that part.

    Args:
        rows: Evaluates the target of the part.
        fit: The Gaussian of all coordinates.
        part: Its coordinates.
        generator: Source of noise.
    """
    rest = fit.scale_tril[:, part]
    scale = torch.linalg.qr(rest.mT).R.mT  # rest @ rest.mT = scale @ scale.mT
    scale = scale * scale.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return elbo_of(rows, fit.loc[:, part], scale, generator)
