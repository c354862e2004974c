"""Posterior draws in whatever container, as values by site and chain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.sites import Layout
from ..problems.samples import HoldsDraws

__all__ = ["read_draws", "values_by_name"]


def values_by_name(samples: object) -> dict[str, Any]:
    """Opens a container of draws.

    Args:
        samples: A mapping from names to values, an object with ``get_samples(group_by_chain=True)``
            as ``pyro.infer.MCMC``, or one with a group ``posterior`` as ArviZ's ``InferenceData``
            and xarray's ``DataTree``.

    Raises:
        ValueError: If it is none of these.
    """
    if isinstance(samples, HoldsDraws):
        return dict(samples.get_samples(group_by_chain=True))
    group: Any = getattr(samples, "posterior", None)
    if hasattr(group, "data_vars"):
        return {str(name): np.asarray(group[name].values) for name in group.data_vars}
    if isinstance(samples, Mapping):
        return dict(samples)
    raise ValueError(
        "samples must be a mapping from site names to draws [N, *value_shape] or "
        "[chains, N, *value_shape], Pyro's MCMC after its run, or InferenceData or a DataTree with "
        f"a group posterior, got {type(samples).__name__}"
    )


def read_draws(samples: object, layout: Layout) -> dict[str, Tensor]:
    """Reads the draws of every latent site, grouped by chain.

    Args:
        samples: As for :func:`values_by_name`.
        layout: The model's layout.

    Returns:
        Values ``[C, N, *value_shape]`` by site; C = 1 where draws were not grouped.

    Raises:
        ValueError: If a site is missing, has another shape, or differs in its numbers of draws.
    """
    given = values_by_name(samples)
    missing = [site.name for site in layout.model_sites if site.name not in given]
    if missing:
        raise ValueError(
            f"samples hold no draws of the latent site(s) {missing}: the evidence needs draws of "
            f"all of {[site.name for site in layout.model_sites]}"
        )
    values, counts = {}, {}
    for site in layout.model_sites:
        value = torch.as_tensor(given[site.name], device=layout.device).detach()
        shape, wanted = tuple(value.shape), tuple(site.value_shape)
        if len(shape) == 1 + len(wanted) and shape[1:] == wanted:
            value = value.unsqueeze(0)
        elif len(shape) != 2 + len(wanted) or shape[2:] != wanted:
            inner = "".join(f", {size}" for size in wanted)
            raise ValueError(
                f'draws of site "{site.name}" have shape {list(shape)}, expected [N{inner}], or '
                f"grouped by chain [C, N{inner}]"
            )
        values[site.name] = value.to(site.dtype)
        counts[site.name] = tuple(value.shape[:2])
    if len(set(counts.values())) > 1:
        raise ValueError(f"sites differ in their numbers of chains and draws: {counts}")
    return values
