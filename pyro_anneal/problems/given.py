r"""A Gaussian whose mean, scales and correlations move smoothly with a few coordinates.

Of coordinates h and all others x,

.. math:: \log q(x \mid h) = -\tfrac12 |w|^2 - \sum_i s_i(h) - \tfrac{m}{2} \log 2 \pi, \quad
    w = e^{-s(h)} \odot U(h) \, (x - m(h))

with U unit lower triangular, so that x is Gaussian for each h whatever the functions are. They are
piecewise linear, blended by normalized bumps around a few nodes :math:`c_j`,

.. math:: f(h) = \sum_j r_j(h) \, (f_j + F_j (h - c_j)), \quad
    r_j(h) \propto e^{-|A (h - c_j)|^2 / 2}

and constant outside a box around the places where Gaussians were seen. Scales are exponentials of such functions,
so a neck in which all of them shrink with h is met exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

__all__ = ["Given", "fit_given"]

_NUM_NODES = {1: 6, 2: 12, 3: 16}
_NUM_LLOYD, _BANDWIDTH = 10, 0.7
# Least scale, in roundings of a value.
_LEAST_SCALE = 1e3
# Pull to a straight line, as mass.
_PULL, _PULL_OF_SCALES = 1e-5, 3e-5
# Share of the fit's weights that places of little mass have, for what lies beyond the places seen.
_SHARE_OF_ALL = 0.02
_MARGIN = 0.25  # of the box, over the width of what was seen


@dataclass(frozen=True, eq=False)
class Given:
    """The conditional Gaussian, as tables over B = C (1 + d) functions of h."""

    nodes: Tensor  # [C, d]
    metric: Tensor  # A, [d, d]
    box: Tensor  # least and largest values, [2, d]
    centre: Tensor  # c, [m]
    shift: Tensor  # e, [B, m]
    log_scale: Tensor  # s, [B, m]
    lower: Tensor  # U below its diagonal, [B, m, m]

    def tensors(self) -> dict[str, Tensor]:
        """Collects the tables by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def functions(self, value: Tensor) -> Tensor:
        """Computes the B functions at values ``[*rows, d]``, ``[*rows, B]``."""
        inside = torch.minimum(torch.maximum(value, self.box[0]), self.box[1])
        apart = inside.unsqueeze(-2) - self.nodes  # [*rows, C, d]
        square = (apart.unsqueeze(-2) * self.metric).sum(-1).square().sum(-1)
        bumps = (-0.5 * square).softmax(-1).unsqueeze(-1)
        return torch.cat([bumps, bumps * apart], -1).flatten(-2)

    def line(self) -> Tensor:
        """Makes the coefficients of 1 and of each leading coordinate, ``[1 + d, B]``."""
        count, dim = self.nodes.shape
        found = self.nodes.new_zeros(1 + dim, count, 1 + dim)
        found[0, :, 0] = 1.0
        for axis in range(dim):
            found[1 + axis, :, 0] = self.nodes[:, axis]
            found[1 + axis, :, 1 + axis] = 1.0
        return found.flatten(1)

    def log_density(self, value: Tensor, other: Tensor) -> Tensor:
        """Computes log q of ``other`` ``[*rows, m]`` given ``value`` ``[*rows, d]``."""
        functions = self.functions(value).unsqueeze(-1)  # [*rows, B, 1]
        log_scale = (self.log_scale.mT @ functions).squeeze(-1)
        apart, dim = other - self.centre, other.shape[-1]
        # all tables at once: one product is what native code knows best
        turned = (self.lower.flatten(0, 1) @ apart.unsqueeze(-1)).squeeze(-1)
        turned = turned.reshape(*apart.shape[:-1], len(self.lower), dim) - self.shift
        white = (apart + (turned * functions).sum(-2)) * (-log_scale).exp()
        square = white.square().sum(-1) + dim * math.log(2.0 * math.pi)
        return -0.5 * square - log_scale.sum(-1)

    def place(self, value: Tensor, noise: Tensor) -> Tensor:
        """Turns white noise ``[*rows, m]`` to draws of x given ``value`` ``[*rows, d]``.

        Without noise it is the mean.
        """
        shift, log_scale, lower = self.at(value)
        placed: Tensor = torch.linalg.solve_triangular(
            lower + torch.eye(noise.shape[-1], dtype=noise.dtype, device=noise.device),
            (shift + log_scale.exp() * noise).unsqueeze(-1),
            upper=False,
            unitriangular=True,
        )
        return self.centre + placed.squeeze(-1)

    def at(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Computes shifts, log scales and what is below U's diagonal, at ``[*rows, d]``."""
        functions = self.functions(value)
        shift, log_scale = functions @ self.shift, functions @ self.log_scale
        lower = functions @ self.lower.flatten(1)
        return shift, log_scale, lower.reshape(*shift.shape, shift.shape[-1])


def fit_given(
    value: Tensor, weights: Tensor, loc: Tensor, scale_tril: Tensor, generator: torch.Generator
) -> Given:
    """Fits the functions to Gaussians at many values by weighted least squares.

    Args:
        value: Values of h, ``[N, d]``.
        weights: The mass at each, normalized, ``[N]``.
        loc: Means of x there, ``[N, m]``.
        scale_tril: Factors of their covariances, ``[N, m, m]``.
        generator: Chooses where nodes begin.

    Returns:
        Tables of the type of ``value``, computed in double precision.
    """
    dtype, least = value.dtype, _LEAST_SCALE * torch.finfo(value.dtype).eps
    value, weights, loc, scale_tril = (x.double() for x in (value, weights, loc, scale_tril))
    weights = (1.0 - _SHARE_OF_ALL) * weights + _SHARE_OF_ALL / len(value)
    shell, unit = _bumps(value, weights, generator)
    functions = shell.functions(value) / unit
    deviation = scale_tril.diagonal(dim1=-2, dim2=-1)
    identity = torch.eye(loc.shape[-1], dtype=loc.dtype, device=loc.device)
    inverse = torch.linalg.solve_triangular(
        scale_tril, identity.expand_as(scale_tril), upper=False
    )
    turned = inverse * deviation.unsqueeze(-1)
    centre = weights @ loc
    shift = (turned @ (loc - centre).unsqueeze(-1)).squeeze(-1)
    straight = _Straight(shell, functions, unit, weights)
    # an error of a regression counts in units of what it leaves, which shrinks in a neck
    wanted = torch.cat([turned.tril(-1), shift.unsqueeze(-1)], -1)
    rows = straight.fit(deviation.square().reciprocal(), wanted, _PULL)
    floored = torch.maximum(deviation, least * (1.0 + loc.abs()))  # what rounding leaves of x
    even = torch.ones_like(deviation[:, :1])
    log_scale = straight.fit(even, floored.log().unsqueeze(1), _PULL_OF_SCALES)
    unit = unit.unsqueeze(-1)
    found = replace(
        shell,
        centre=centre,
        shift=rows[..., -1].mT / unit,
        log_scale=log_scale[0] / unit,
        lower=rows[..., :-1].movedim(0, 1) / unit.unsqueeze(-1),
    )
    return Given(**{name: table.to(dtype) for name, table in found.tensors().items()})


def _bumps(value: Tensor, weights: Tensor, generator: torch.Generator) -> tuple[Given, Tensor]:
    """Places the functions; each is to be divided by its unit, so that slopes count alike."""
    count, dim = value.shape
    centre = weights @ value
    apart = value - centre
    moments = (apart * weights.unsqueeze(-1)).mT @ apart
    eye = torch.eye(dim, dtype=value.dtype, device=value.device)
    moments = moments + 1e-9 * eye * moments.diagonal().mean().clamp(min=1e-12)
    whiten = torch.linalg.inv(torch.linalg.cholesky(moments))
    nodes, spacing = _nodes(
        apart @ whiten.mT, weights.sqrt(), min(_NUM_NODES[dim], count), generator
    )
    nodes = centre + torch.linalg.solve(whiten, nodes.mT).mT
    box = torch.stack([value.amin(0), value.amax(0)])
    box = box + _MARGIN * (box[1] - box[0]) * torch.tensor([[-1.0], [1.0]]).to(box)
    empty = value.new_zeros(0)
    unit = torch.cat([centre.new_ones(1), moments.diagonal().sqrt()]).repeat(len(nodes))
    return Given(nodes, whiten / (_BANDWIDTH * spacing), box, *(empty,) * 4), unit


class _Straight:
    """Regressions on functions of h; where few places tell, they keep to one straight line."""

    def __init__(self, shell: Given, functions: Tensor, unit: Tensor, weights: Tensor) -> None:
        self.functions, self.weights = functions, weights  # [N, B], [N]
        self.line = shell.line() * unit  # coefficients of straight lines, [1 + d, B]
        self.size = 1 + shell.nodes.shape[-1]
        self.bumps = functions[:, :: self.size]  # [N, C]

    def fit(self, counts: Tensor, wanted: Tensor, pull: float) -> Tensor:
        """Fits ``wanted`` ``[N, R, P]``.

        Args:
            counts: What a squared error counts at each place, ``[N, R]``.
            wanted: ``[N, R, P]``.
            pull: Mass whose error of 1 in a coefficient is as bad as leaving the line by 1.

        Returns:
            Coefficients ``[R, B, P]``.
        """
        weights = self.weights.unsqueeze(-1) * counts
        total = weights.sum(0)
        around = (self.bumps.mT @ counts) / self.bumps.sum(0).clamp(min=1e-300).unsqueeze(-1)
        ridge = pull * (around / total).mT.repeat_interleave(self.size, -1)  # [R, B]
        weights = weights / total

        def solve(basis: Tensor, target: Tensor, ridges: Tensor) -> Tensor:
            gram = torch.einsum("nr,nb,nc->rbc", weights, basis, basis)
            right = torch.einsum("nr,nb,nrp->rbp", weights, basis, target)
            tiny = 1e-10 * gram.diagonal(dim1=-2, dim2=-1) + 1e-14
            solved: Tensor = torch.linalg.solve(gram + (ridges + tiny).diag_embed(), right)
            return solved

        straight = self.functions @ self.line.mT
        first = solve(straight, wanted, torch.zeros_like(ridge[:, : self.size]))
        left = wanted - torch.einsum("nl,rlp->nrp", straight, first)
        return self.line.mT @ first + solve(self.functions, left, ridge)


def _nodes(
    white: Tensor, weights: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Spreads nodes over weighted places ``[N, d]``: the nodes, and their typical distance."""
    weights = weights / weights.sum()
    first = int(torch.multinomial(weights, 1, generator=generator))
    chosen = [first]
    far = (white - white[first]).square().sum(-1)
    while len(chosen) < count:  # the farthest by weight
        chosen.append(int((far * weights).argmax()))
        far = torch.minimum(far, (white - white[chosen[-1]]).square().sum(-1))
    nodes = white[chosen]
    for _ in range(_NUM_LLOYD):
        nearest = torch.cdist(white, nodes).argmin(1)
        member = torch.nn.functional.one_hot(nearest, count).to(white) * weights.unsqueeze(-1)
        total = member.sum(0)
        moved = (member.mT @ white) / total.clamp(min=1e-300).unsqueeze(-1)
        nodes = torch.where((total > 0.0).unsqueeze(-1), moved, nodes)
    if count == 1:
        return nodes, white.new_ones(())
    between = torch.cdist(nodes, nodes) + 1e9 * torch.eye(
        count, dtype=white.dtype, device=white.device
    )
    return nodes, between.amin(1).mean().clamp(min=1e-3)
