"""The sites that mutual information speaks of, and the map of their supports to vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..models.coordinates import bijection
from ..models.density import Substitute
from ..models.moving import supports_are_static
from ..models.packing import Packing
from ..models.sites import is_deterministic, is_factor, unmasked
from ..models.types import Trace
from ..models.validation import validation_disabled
from .bijections import Bijection, FixedBijection, check_continuous

__all__ = ["sample_sites", "site_bijection"]


def sample_sites(trace: Trace) -> dict[str, Any]:
    """Collects the sample sites of a trace that carry randomness, checking what would bias MI."""
    sites = {}
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        if is_deterministic(site):
            sites[name] = site
            continue
        if is_factor(site):
            raise NotImplementedError(
                f'at site "{name}": pyro.factor makes p(x, z) unnormalized, so mutual information '
                "is not defined; use a distribution"
            )
        scale = site["scale"]
        if isinstance(scale, Tensor) or scale != 1.0:
            raise NotImplementedError(
                f'at site "{name}": the scale is {scale}, expected 1; mutual information does not '
                "support poutine.scale or subsampled plates"
            )
        if site["mask"] is not None or unmasked(site["fn"]) is not site["fn"]:
            raise NotImplementedError(
                f'at site "{name}": mutual information does not support poutine.mask, nor a '
                "distribution's own mask"
            )
        sites[name] = site
    return sites


def site_bijection(run: Callable[[int | None], Trace], layout: Packing) -> Bijection:
    """Maps the supports of latent sites to unconstrained vectors.

    Args:
        run: Runs what samples the sites, for some particles per pair, or for pairs alone (None), and
            returns the trace.
        layout: How the sites are packed.

    Returns:
        The bijection; where a support depends on other latents, each use of it is a run.

    Raises:
        NotImplementedError: If a support is discrete.
    """
    with torch.no_grad(), poutine.block(), validation_disabled():
        first, second = run(None), run(None)
        sites = [first.nodes[name]["fn"] for name in layout.names]
        for fn in sites:
            check_continuous(fn)
        static = supports_are_static(lambda: run(None), ((), {}), first, second, layout.names)
    if static:
        parts = [(fn, tail) for fn, tail in zip(sites, layout.tails.values(), strict=True)]
        return FixedBijection(parts, event=layout.event)
    shapes = [bijection(fn).inverse_shape(fn.batch_shape + fn.event_shape) for fn in sites]
    return _MovingBijection(run, layout, [shape[1:] for shape in shapes])


class _MovingBijection(Bijection):
    """Maps onto supports that depend on other latents, by running what samples them."""

    def __init__(
        self,
        run: Callable[[int | None], Trace],
        layout: Packing,
        unconstrained: Sequence[torch.Size],
    ) -> None:
        self.run = run
        self.layout = layout
        self.unconstrained = unconstrained  # shapes of the sites' parts of u, after the rows

    def unconstrain(self, z: Tensor) -> Tensor:
        """Maps z ``[K, N, *event]`` to u ``[K, N, D]``."""
        names = self.layout.names
        given = Substitute(constrained=self.layout.unpack(z), record=frozenset(names))
        with poutine.block(), given:
            self.run(len(z))
        parts = [given.unconstrained[name].reshape(*z.shape[:2], -1) for name in names]
        return torch.cat(parts, -1)

    def constrain(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Maps u ``[K, N, D]`` to z ``[K, N, *event]`` and log |dz/du| ``[K, N]``."""
        lead, names = u.shape[:2], self.layout.names
        parts = u.split([math.prod(shape) for shape in self.unconstrained], -1)
        shaped = [
            part.reshape(lead + shape)
            for part, shape in zip(parts, self.unconstrained, strict=True)
        ]
        given = Substitute(unconstrained=dict(zip(names, shaped, strict=True)))
        with poutine.block(), given:
            self.run(len(u))
        total = torch.zeros(lead, dtype=u.dtype, device=u.device)
        for name in names:
            total = total + sum_rightmost(given.log_det[name], given.log_det[name].dim() - 2)
        return self.layout.pack(given.values, 2), total
