"""What a problem and the ends of its chains say beyond their weights, as diagnostics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pyro.distributions import constraints
from torch import Tensor

from ..models.discrete import DiscreteMap
from ..models.sites import Layout, Site
from ..models.supports import leaf_constraint
from ..problems.bases import Base, GuideBase, PriorBase
from ..problems.problem import Problem
from ..results.findings import Diagnostic
from ..results.tables import format_share

__all__ = ["find_saturated", "find_unread", "findings_of"]

_CHAINS = 64  # to look at
_CHAINS_THROUGH_MODEL = 16  # where supports depend on latents, so that the model runs for each
_MAX_SHARE = 0.01  # of chains' ends at an edge
_MAX_SHARE_OF_BASE = 0.05  # of the base's draws: less moves the evidence by less than .05 nats
_UNBOUNDED = (type(constraints.real), type(constraints.real_vector))


def findings_of(problem: Problem, position: Tensor) -> tuple[Diagnostic, ...]:
    """Collects findings about the model, its base and the ends ``[K, *batch, D]`` of chains."""
    found = (find_unread(problem.layout), find_saturated(problem, position))
    return tuple(finding for finding in found if finding is not None)


def find_unread(layout: Layout) -> Diagnostic | None:
    """Looks for latents that no observed site depends on.

    Args:
        layout: The model's layout.

    Returns:
        A finding whose value is the number of such sites, or ``None``.
    """
    if not layout.unread:
        return None
    return Diagnostic(
        name="unread",
        severity="warning",
        message=(
            f"no observed site depends on latent site(s) {list(layout.unread)}: the data say "
            "nothing of them, and the evidence is what it would be without them. If they were "
            "meant to explain the data, the likelihood reads something else in their place, such "
            "as parameters (contrib.gp's variational models do); predictions are better left out"
        ),
        value=float(len(layout.unread)),
    )


def find_saturated(problem: Problem, position: Tensor) -> Diagnostic | None:
    """Measures the share of draws at which a value no longer moves with its coordinate.

    There densities are cut off, or draws pile up in one number, while the Jacobian goes on. The
    base's draws and the chains' ends are both looked at. Families whose density is known in the
    unconstrained coordinate itself (Beta, Gamma, Dirichlet, ...) are exempt.

    Args:
        problem: The problem.
        position: Ends of chains, ``[K, *batch, D]``.

    Returns:
        A finding whose value is the largest share of a site, or ``None``.
    """
    layout = problem.layout
    if layout.derived:
        return None
    names = [site.name for site in layout.sites if _may_saturate(site, problem.base)]
    if not names:
        return None
    count = _CHAINS if layout.is_static else _CHAINS_THROUGH_MODEL
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = problem.draw(count)
    lost = float((~start.reshape(len(start), -1).isfinite().all(-1)).double().mean())
    shares: dict[str, float] = {}
    if (
        isinstance(problem.base, PriorBase) and lost > _MAX_SHARE_OF_BASE
    ):  # the way back to u is infinite
        shares = dict.fromkeys(names, lost)
    parts = ((start, _MAX_SHARE_OF_BASE), (position[:count], _MAX_SHARE))
    for found in _shares(problem, parts, names):
        for name, share in found.items():
            shares[name] = max(share, shares.get(name, 0.0))
    if not shares:
        return None
    name = max(shares, key=lambda n: shares[n])
    dtype = str(layout.dtype).removeprefix("torch.")
    remedy = (
        "run in float64 (torch.set_default_dtype(torch.float64), data and parameters alike)"
        if layout.dtype != torch.float64
        else "write the model in an unconstrained coordinate, its logit say, with that density"
    )
    return Diagnostic(
        name="saturated",
        severity="warning",
        message=(
            f'{format_share(shares[name])} of the draws of site "{name}" are so near to the edge of its '
            f"support that {dtype} rounds them to one number: mass there is lost or misplaced, "
            f"and bounds are off by about as much; {remedy}, or use a family with a closed form "
            "there (Beta, Kumaraswamy, Dirichlet)"
        ),
        value=shares[name],
    )


def _may_saturate(site: Site, base: Base) -> bool:
    if isinstance(site.transform, DiscreteMap):
        return False
    if isinstance(leaf_constraint(site.support), _UNBOUNDED):
        return False
    rounded_guide = isinstance(base, GuideBase) and not base.is_exact(site.name)
    return not site.is_exact or rounded_guide


def _shares(
    problem: Problem, parts: Sequence[tuple[Tensor, float]], names: list[str]
) -> list[dict[str, float]]:
    """Measures shares of draws that stand still, by site, where they are above a share of each part.

    All places are unpacked at once.
    """
    kept = [(x[x.reshape(len(x), -1).isfinite().all(-1)], share) for x, share in parts]
    finite = [x for x, _ in kept if len(x)]
    allowed = [share for x, share in kept if len(x)]
    if not finite:
        return []
    origin = torch.zeros_like(finite[0][:1])
    places = [origin, origin + 0.5]
    places += [x + step for x in finite for step in (0.0, -0.5, 0.5)]
    unpacked = problem.unpack(torch.cat(places))
    values = {name: unpacked[name].split([len(place) for place in places]) for name in names}
    return [
        _still(
            problem,
            {name: value[:2] + value[at : at + 3] for name, value in values.items()},
            allowed[at // 3],
        )
        for at in range(2, len(places), 3)
    ]


def _still(
    problem: Problem, values: Mapping[str, Sequence[Tensor]], allowed: float
) -> dict[str, float]:
    """Measures shares at values of the origin, of half a unit from it, here, left and right."""
    found = {}
    event_dims = {site.name: len(site.event_shape) for site in problem.layout.sites}
    for name, (at_origin, moved, value, left, right) in values.items():
        # not the zeros of a triangle, say, or the ones of a correlation matrix, up to rounding
        rounding = (
            32.0 * torch.finfo(value.dtype).eps * torch.maximum(at_origin.abs(), moved.abs())
        )
        moving = (at_origin - moved).abs() > rounding
        still = ((left == value) | (right == value) | ~value.isfinite()) & moving
        still = still.reshape(*still.shape[: still.dim() - event_dims[name]], -1).any(-1)
        share = float(still.double().mean())
        if share > allowed and int(still.sum()) > 1:
            found[name] = share
    return found
