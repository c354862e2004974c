"""What the densities of a problem depend on, as short texts by name."""

from __future__ import annotations

import torch

from ..persistence.fingerprints import Fingerprint, describe, digest
from .problem import Problem

__all__ = ["describe_problem"]


def describe_problem(problem: Problem) -> Fingerprint:
    """Describes the densities of a problem: sites, data, the recorded graph and what it reads.

    Where there is no graph, the densities' values at the unconstrained origin stand for it.
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
    origin = torch.zeros(*layout.batch_shape, layout.dim, dtype=layout.dtype, device=layout.device)
    with torch.no_grad():
        state = density(origin.unsqueeze(0))
    found["densities at the origin"] = digest(repr([describe(v) for v in state]).encode())
    return found
