"""Pyro's AutoGuides, which sample an auxiliary site and derive the model's latents from it.

Their density is known in the unconstrained space of that auxiliary site. Two maps are enough to
anneal from them: from a guide's trace to the unconstrained value of each model site, and back from
those values to the auxiliary sites that the guide is to be conditioned on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from pyro.infer import autoguide
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from .types import Fn, Trace

__all__ = [
    "auxiliary_values",
    "check_guide",
    "derived_sites",
    "is_autoguide",
    "sees_arguments",
    "unconstrained_values",
]


def is_autoguide(guide: object) -> bool:
    """Tells whether a guide is one of Pyro's AutoGuides."""
    return isinstance(guide, AutoGuide)


def _parts(guide: object) -> Iterator[AutoGuide]:
    """Iterates over the AutoGuides that sample auxiliary sites."""
    if isinstance(guide, autoguide.AutoGuideList):
        for part in guide:
            yield from _parts(part)
    elif is_autoguide(guide) and not isinstance(guide, autoguide.AutoCallable):
        yield guide


def sees_arguments(guide: object) -> bool:
    """Tells whether a guide's density depends on its arguments: it, or a part, is hand-written."""
    if isinstance(guide, autoguide.AutoGuideList):
        return any(sees_arguments(part) for part in guide)
    return callable(guide) and (
        not is_autoguide(guide) or isinstance(guide, autoguide.AutoCallable)
    )


def check_guide(guide: Fn | None, *, invertible: bool = True) -> None:
    """Checks that an AutoGuide has a density that can be evaluated.

    Args:
        guide: The guide.
        invertible: Whether that must be possible at given latents.

    Raises:
        ValueError: If the guide is a point mass, or of a kind without a tractable density.
    """
    for part in _parts(guide):
        name = type(part).__name__
        if isinstance(part, autoguide.AutoLaplaceApproximation):
            raise ValueError(
                "AutoLaplaceApproximation is a point mass until it is completed: pass "
                "guide.laplace_approximation(*args) instead"
            )
        if isinstance(part, autoguide.AutoDelta | autoguide.AutoDiscreteParallel):
            raise ValueError(
                f"{name} has no density to anneal from (it is a point mass or discrete): use "
                'guide="auto", AutoNormal or AutoMultivariateNormal'
            )
        derives = isinstance(part, autoguide.AutoGaussian | autoguide.AutoStructured)
        if derives and not invertible:
            continue
        if not isinstance(part, autoguide.AutoNormal | autoguide.AutoContinuous):
            raise ValueError(
                f"{name} is not supported as a base: its density at given latents cannot be "
                'evaluated; use guide="auto", AutoNormal, or one of the AutoContinuous family'
            )


def _joint_site(guide: AutoGuide) -> str:
    return f"_{guide._pyro_name}_latent"


def derived_sites(guide: Fn) -> set[str]:
    """Collects the model sites whose values an AutoGuide derives from auxiliary sites."""
    return {
        name for part in _parts(guide) for name, _ in part.prototype_trace.iter_stochastic_nodes()
    }


def unconstrained_values(guide: Fn, trace: Trace) -> dict[str, Tensor]:
    """Reads the unconstrained value of each derived site from the guide's trace."""
    values = {}
    for part in _parts(guide):
        if isinstance(part, autoguide.AutoNormal):
            for name, _ in part.prototype_trace.iter_stochastic_nodes():
                values[name] = trace.nodes[f"{name}_unconstrained"]["value"]
        else:
            latent = trace.nodes[_joint_site(part)]["value"]
            for site, value in part._unpack_latent(latent):
                values[site["name"]] = value
    return values


def auxiliary_values(guide: Fn, unconstrained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Computes the values of the auxiliary sites that give these unconstrained values."""
    values = {}
    for part in _parts(guide):
        names = [name for name, _ in part.prototype_trace.iter_stochastic_nodes()]
        if isinstance(part, autoguide.AutoNormal):
            values.update({f"{name}_unconstrained": unconstrained[name] for name in names})
        else:
            flat = [unconstrained[name].reshape(-1) for name in names]
            values[_joint_site(part)] = torch.cat(flat)
    return values
