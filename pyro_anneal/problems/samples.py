"""Posterior samples that a user brings, as positions of chains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .problem import Problem

__all__ = ["HoldsDraws", "pack_samples"]


@runtime_checkable
class HoldsDraws(Protocol):
    """What holds draws of a posterior, as ``pyro.infer.MCMC`` after its run."""

    def get_samples(self, *, group_by_chain: bool = False) -> Mapping[str, Tensor]:
        """Returns the draws by site, ``[N, *value_shape]``, or ``[chains, N, *value_shape]``."""
        ...


def pack_samples(problem: Problem, samples: Mapping[str, Tensor]) -> Tensor:
    """Packs K posterior samples and checks that there is one of every site, inside its support."""
    if not isinstance(samples, Mapping):
        raise ValueError(
            "posterior samples must be a mapping from site names to tensors [K, *value_shape], or "
            f"an object with get_samples() as Pyro's MCMC, got {type(samples).__name__}"
        )
    device = problem.layout.device
    samples = {name: torch.as_tensor(value, device=device) for name, value in samples.items()}
    missing = [site.name for site in problem.layout.model_sites if site.name not in samples]
    if missing:
        raise ValueError(
            f"a reverse run needs posterior samples of every latent site, missing: {missing}"
        )
    counts = set()
    for site in problem.layout.model_sites:
        shape = samples[site.name].shape
        if shape[1:] != site.value_shape or not shape:
            grouped = len(shape) > 1 and shape[2:] == site.value_shape
            hint = "; join samples grouped by chain with value.flatten(0, 1)" if grouped else ""
            raise ValueError(
                f'posterior samples of site "{site.name}" have shape {list(shape)}, expected '
                f"[K, {', '.join(map(str, site.value_shape))}]{hint}"
            )
        counts.add(shape[0])
    if counts == {0}:
        raise ValueError("a reverse run needs K >= 1 posterior samples, got 0")
    if len(counts) != 1:
        raise ValueError(f"posterior samples differ in their number K: {sorted(counts)}")
    names = [site.name for site in problem.layout.model_sites]
    values = {name: samples[name] for name in names}
    problem.check_supports(values)
    return problem.pack_chains(values)
