"""What a problem depends on, so that a checkpoint can tell whether it is still the same."""

from __future__ import annotations

import pyro
import torch

from ..models.types import Fn
from ..persistence.fingerprints import Fingerprint, describe, described, digest
from .bases import Base, GuideBase, MixtureBase
from .problem import Problem

__all__ = ["describe_problem"]


def describe_problem(problem: Problem) -> Fingerprint:
    """Describes the densities of a problem: sites, data, the recorded graph and what it reads.

    Where there is no graph, the functions themselves stand for it: their code, what it closes
    over, the globals and the parameters that it reads.

    Raises:
        ValueError: If there is no graph, and something that a function reads has no description by
            content.
    """
    layout, density = problem.layout, problem.density
    plates = ", ".join(f"{plate.name}={plate.size}" for plate in layout.batch)
    found = {
        "batch plates": plates or "none",
        "dtype": str(layout.dtype),
        "device": layout.device.type,
        "enumerated sites": ", ".join(layout.enumerated) or "none",
        "poutine.scale": repr(layout.scale),
    }
    for site in layout.sites:
        kind = type(site.transform).__name__
        found[f'latent site "{site.name}"'] = f"{site.dtype} {list(site.value_shape)} {kind}"
    for name, value in layout.observed.items():
        found[f'data at site "{name}"'] = describe(value)
    if density.code is not None:
        found["operations of the density"] = digest(density.code.encode())
        tensors = [describe(constant) for constant in density.constants]
        found["tensors that the density reads (parameters, data, guide)"] = (
            f"{len(tensors)}, {digest(repr(tensors).encode())}"
        )
        return found
    for what, function in _functions(problem.model.model, problem.base).items():
        found[f"what the {what} reads (eager)"] = described(
            f"the {what}, which runs eagerly,", function
        )
    found["parameters in Pyro's store"] = describe(dict(pyro.get_param_store().items()))
    origin = torch.zeros(*layout.batch_shape, layout.dim, dtype=layout.dtype, device=layout.device)
    with torch.no_grad():
        state = density(origin.unsqueeze(0))
    found["densities at the origin"] = digest(repr([describe(v) for v in state]).encode())
    return found


def _functions(model: Fn, base: Base) -> dict[str, Fn]:
    """Collects the functions that a density calls, by what they are."""
    if isinstance(base, MixtureBase):
        return _functions(model, base.first) | _functions(model, base.second)
    return {"model": model} | ({"guide": base.guide} if isinstance(base, GuideBase) else {})
