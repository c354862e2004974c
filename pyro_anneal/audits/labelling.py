r"""Labellings that posterior draws do not visit: K! modes of a mixture, of which a sampler saw one.

Where permutations g of exchangeable elements leave :math:`p(x, u)` unchanged, its mass is the same at
all of them, and the density q fitted to the draws says which of them the draws visited:

.. math:: \log |G| - \frac{1}{N} \sum_n \log \sum_{g \in G}
    \frac{q(T_g u_n) |\partial T_g u_n / \partial u_n|}{q(u_n)}

is zero where q is the same at all of them, and :math:`\log |G|` where draws kept to one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..models.sites import Layout
from ..problems.exchangeable import find_symmetry
from ..results.findings import Diagnostic

__all__ = ["find_missing_labellings"]

_NUM_POINTS, _NUM_DRAWS = 3, 24
_LARGEST_GROUP = 120
_LEAST_NATS = 0.1


def find_missing_labellings(
    layout: Layout, evaluate: Callable[[Tensor], tuple[Tensor, Tensor]], draws: Tensor
) -> Diagnostic | None:
    """Looks for permutations of exchangeable elements at which no draws are.

    Args:
        layout: Where latents live.
        evaluate: Computes log p(x, u) and log p(x, u) - log q(u) of rows ``[N, *batch, D]``, each
            ``[N, *batch]``, with q fitted to draws.
        draws: Posterior draws ``[N, *batch, D]``.

    Returns:
        A warning whose value is what the evidence lacks, in nats; None where nothing was found.
    """
    spread = draws[:: max(1, len(draws) // _NUM_DRAWS)][:_NUM_DRAWS]
    symmetry = find_symmetry(layout, lambda rows: evaluate(rows)[0], spread[:_NUM_POINTS])
    if symmetry is None or symmetry.order > _LARGEST_GROUP:
        return None
    elements = symmetry.elements()
    visited = []
    for draw in spread:
        rows, _ = symmetry.act(elements, draw)  # the identity first
        ratio = evaluate(rows)[1]  # p is as it was: what differs is q and the Jacobian
        visited.append((ratio[0] - ratio).logsumexp(0))
    lacking = float((math.log(len(elements)) - torch.stack(visited).mean(0)).max())
    if not lacking > _LEAST_NATS:
        return None
    sites = symmetry.describe().split(" are exchangeable")[0]
    return Diagnostic(
        name="labelling",
        severity="warning",
        message=f"{sites} are exchangeable, in {len(elements)} ways of equal mass, and the draws did "
        f"not visit all of them alike: the evidence lacks some {lacking:.2g} nats (as much as "
        f"log {len(elements)}). Permute the elements of each draw at random before the call",
        value=lacking,
    )
