r"""Exchangeable elements: permutations of a plate that leave the joint density as it is.

A mixture of K components has K! posterior modes of equal mass, and a fit finds one. Where a
permutation :math:`\pi` of axes leaves :math:`p(x, z)` unchanged, a base q may be averaged over the
group:

.. math:: \bar q(u) = \frac{1}{|G|} \sum_{\pi \in G} q(T_\pi u) |\partial T_\pi u / \partial u|

with :math:`T_\pi` the permutation in unconstrained space. That is a normalized density whatever
the model, so a permutation wrongly taken for a symmetry costs efficiency and no guarantee.

Axes move together: of all latents in the plate, and event axes that its elements index (weights of
a Dirichlet). A number on an interval, such as the weight of the first of two components, counts as an axis of two: their
exchange mirrors it. Sets of axes are tried from small to large, at random points, by a transposition and a
cycle, which generate all permutations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.sites import Layout, Site

__all__ = ["Symmetry", "as_symmetry", "find_symmetry"]

# The largest group over which a base is averaged; axes longer than that, and more of them than
# can be tried in all combinations, are left alone.
_LARGEST_GROUP = 720
_MOST_AXES = 8

Axis = tuple[int, int]  # index of a site, axis of its value
_MIRRORED = -1  # in place of an axis: the value is mirrored in the middle of its interval


# Sets of axes as plain lists: their length, and the axes of each.
Spread = Sequence[tuple[int, list[Axis]]]


@dataclass(frozen=True)
class Symmetry:
    """Permutations of sets of axes, all combinations of them.

    Args:
        groups: Length and axes of each set that is permuted together.
    """

    layout: Layout
    groups: tuple[tuple[int, tuple[Axis, ...]], ...]

    @property
    def order(self) -> int:
        """Number of permutations."""
        return math.prod(math.factorial(length) for length, _ in self.groups)

    @property
    def spread(self) -> Spread:
        """The sets of axes as plain lists, to be kept in a journal."""
        return [(length, list(axes)) for length, axes in self.groups]

    def describe(self) -> str:
        """Says which sites have exchangeable elements."""
        mirrored = {
            axis: " (mirrored)" if axis == _MIRRORED else ""
            for _, axes in self.groups
            for _, axis in axes
        }
        sites = [
            sorted({self.layout.sites[which].name + mirrored[axis] for which, axis in axes})
            for _, axes in self.groups
        ]
        named = " and ".join(", ".join(names) for names in sites)
        return (
            f"elements of {named} are exchangeable: the fitted start is averaged over "
            f"{self.order} permutations"
        )

    def elements(self) -> list[tuple[tuple[int, ...], ...]]:
        """Lists the permutations, one tuple per set of axes; the identity first."""
        each = [list(itertools.permutations(range(length))) for length, _ in self.groups]
        return list(itertools.product(*each))

    def act(
        self, elements: Sequence[tuple[tuple[int, ...], ...]], position: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Moves one position ``[*batch, D]`` by each of P permutations.

        Returns:
            Positions ``[P, *batch, D]`` and log Jacobians ``[P, *batch]``.
        """
        layout = self.layout
        index = torch.stack([self._indices(element) for element in elements]).to(position.device)
        rows = position[..., index].movedim(-2, 0)
        log_jacobian = torch.zeros_like(rows[..., 0])
        for number, (length, axes) in enumerate(self.groups):
            for which, axis in axes:
                site = layout.sites[which]
                if axis == _MIRRORED:
                    mirrored = [-1.0 if element[number][0] == 1 else 1.0 for element in elements]
                    signs = rows.new_tensor(mirrored).reshape(-1, *[1] * (rows.dim() - 1))
                    parts = rows.split(
                        [site.start, site.stop - site.start, layout.dim - site.stop], dim=-1
                    )
                    rows = torch.cat([parts[0], signs * parts[1], parts[2]], dim=-1)
                    continue
                if not _is_simplex(site):
                    continue
                orders = torch.tensor([element[number] for element in elements])
                flat = position[..., site.start : site.stop]
                moved, change = _permute_simplex(flat, orders.to(position.device), length)
                rows = torch.cat([rows[..., : site.start], moved, rows[..., site.stop :]], dim=-1)
                log_jacobian = log_jacobian + change
        return rows, log_jacobian

    def _indices(self, element: tuple[tuple[int, ...], ...]) -> Tensor:
        """Computes where each coordinate comes from; those of a simplex stay, to be moved apart."""
        layout = self.layout
        # batch elements share their permutation, so one of them shows the coordinates
        order = torch.arange(layout.dim)
        for (_, axes), permutation in zip(self.groups, element, strict=True):
            for which, axis in axes:
                site = layout.sites[which]
                if axis == _MIRRORED or _is_simplex(site):
                    continue
                shape = [
                    size
                    for dim, size in enumerate(site.unconstrained_shape)
                    if dim not in site.batch_axes
                ]
                inner = axis - sum(dim < axis for dim in site.batch_axes)
                block = order[site.start : site.stop].reshape(shape)
                block = block.index_select(inner, torch.tensor(permutation))
                order[site.start : site.stop] = block.reshape(-1)
        return order


def _is_simplex(site: Site) -> bool:
    return site.unconstrained_shape != site.value_shape


def _permute_simplex(flat: Tensor, orders: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Permutes points of a simplex given in stick-breaking coordinates ``[*batch, n (K - 1)]``.

    All in logarithms, so that weights next to zero keep their digits. A permutation of the simplex
    keeps volumes, so the Jacobian is that of the coordinates at both ends.
    """
    shape = flat.shape
    u = flat.reshape(*shape[:-1], -1, length - 1)
    offset = torch.arange(length - 1, 0, -1, dtype=u.dtype, device=u.device).log()
    log_weights, log_det = _to_log_simplex(u - offset)
    moved = log_weights[..., orders].movedim(-2, 0)  # [P, *batch, n, K]
    tails = [moved[..., k + 1 :].logsumexp(-1) for k in range(length - 1)]
    stick = moved[..., :-1] - torch.stack(tails, -1)
    _, new_log_det = _to_log_simplex(stick)
    change = (log_det - new_log_det).sum(-1)
    return (stick + offset).reshape(len(orders), *shape), change


def _to_log_simplex(stick: Tensor) -> tuple[Tensor, Tensor]:
    """Breaks a stick at ``sigmoid(stick)``: log weights ``[..., K]`` and log determinant."""
    taken = torch.nn.functional.logsigmoid(stick)
    left = torch.nn.functional.logsigmoid(-stick)
    before = torch.nn.functional.pad(left.cumsum(-1), (1, 0))
    log_weights = torch.nn.functional.pad(taken, (0, 1)) + before
    return log_weights, (log_weights[..., :-1] + left).sum(-1)


def as_symmetry(layout: Layout, spread: Spread) -> Symmetry | None:
    """Undoes :attr:`Symmetry.spread`; None for no sets of axes."""
    groups = tuple((length, tuple(axes)) for length, axes in spread)
    return Symmetry(layout, groups) if groups else None


def find_symmetry(
    layout: Layout, log_target: Callable[[Tensor], Tensor], points: Tensor
) -> Symmetry | None:
    """Finds sets of axes whose permutation leaves the joint density as it is.

    Args:
        layout: Where latents live.
        log_target: Evaluates log p(x, u) at rows ``[R, *batch, D]``, shape ``[R, *batch]``.
        points: Where to compare, rows ``[N, *batch, D]`` of finite density.

    Returns:
        The symmetry, or None if there is none.
    """
    groups: list[tuple[int, tuple[Axis, ...]]] = []
    order = 1
    with torch.no_grad():
        before = log_target(points)
        for length, axes in sorted(_candidates(layout).items()):
            if len(axes) > _MOST_AXES or order * math.factorial(length) > _LARGEST_GROUP:
                continue
            rest = list(axes)
            for chosen in _minimal_sets(layout, length, rest, log_target, points, before):
                if order * math.factorial(length) <= _LARGEST_GROUP:
                    groups.append((length, chosen))
                    order *= math.factorial(length)
    return Symmetry(layout, tuple(groups)) if groups else None


def _minimal_sets(
    layout: Layout,
    length: int,
    rest: list[Axis],
    log_target: Callable[[Tensor], Tensor],
    points: Tensor,
    before: Tensor,
) -> list[tuple[Axis, ...]]:
    """Finds disjoint sets of axes of one length that pass, the smallest first."""
    found: list[tuple[Axis, ...]] = []
    size = 1
    while size <= len(rest):
        sets = [s for s in itertools.combinations(rest, size) if len({a[0] for a in s}) == size]
        for chosen in sets:
            if all(axis in rest for axis in chosen) and _passes(
                Symmetry(layout, ((length, chosen),)), log_target, points, before
            ):
                found.append(chosen)
                rest = [axis for axis in rest if axis not in chosen]
        size += 1
    return found


def _passes(
    symmetry: Symmetry, log_target: Callable[[Tensor], Tensor], points: Tensor, before: Tensor
) -> bool:
    """Compares the joint density before and after a transposition and a cycle."""
    length = symmetry.groups[0][0]
    identity = tuple(range(length))
    swap = (1, 0, *identity[2:])
    cycle = (*identity[1:], 0)
    elements = [(permutation,) for permutation in {swap, cycle}]
    tolerance = 1e-9 if before.dtype == torch.float64 else 1e-4
    for point, value in zip(points, before, strict=True):
        moved, log_jacobian = symmetry.act(elements, point)
        after = log_target(moved) + log_jacobian
        same = (after - value).abs() <= tolerance * (1.0 + value.abs())
        if not bool(same.all()):
            return False
    return True


def _candidates(layout: Layout) -> dict[int, list[Axis]]:
    """Collects axes of latents that may be permuted, by their length."""
    axes: dict[int, list[Axis]] = {}
    for number, site in enumerate(layout.sites):
        shape = site.value_shape
        if not _is_simplex(site):
            allowed = [axis for axis in range(len(shape)) if axis not in site.batch_axes]
        elif type(site.transform).__name__ == "StickBreakingTransform":
            allowed = [len(shape) - 1]
        else:
            continue
        for axis in allowed:
            if shape[axis] > 1:
                axes.setdefault(shape[axis], []).append((number, axis))
    intervals = [n for n, site in enumerate(layout.sites) if _is_on_interval(site)]
    pairs = axes.get(2, [])
    if intervals and len(pairs) + len(intervals) <= _MOST_AXES:
        axes[2] = [*pairs, *((number, _MIRRORED) for number in intervals)]
    return axes


def _is_on_interval(site: Site) -> bool:
    """Tells whether a site's value is an affine function of a sigmoid, which is odd about zero."""
    parts = [type(part).__name__ for part in getattr(site.transform, "parts", [site.transform])]
    return "SigmoidTransform" in parts and set(parts) <= {"SigmoidTransform", "AffineTransform"}
