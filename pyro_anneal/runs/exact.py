"""Models without a latent to move: their log evidence is a number, not an estimate."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ..graphs.purity import check_pure
from ..models.density import Arguments, ModelDensity
from ..models.sites import Layout
from ..models.types import Fn
from ..models.validation import validation_disabled
from ..problems.problem import hidden_sites_named
from ..results.digest import digest_of_data
from ..results.run import AnnealedRun

__all__ = ["exact_run"]

NOTE = "exact: the model has no latent to move, so that its log density is its log evidence"


def exact_run(model: Fn, arguments: Arguments, layout: Layout, *, num_chains: int) -> AnnealedRun:
    """Computes the log evidence of a model whose latents, if any, are all enumerated.

    Args:
        model: Pyro model with its observations.
        arguments: Its ``(args, kwargs)``.
        layout: Its layout, without sites.
        num_chains: Number K of equal log-weights that the result holds, at least 2.

    Returns:
        A run of one step, all of whose weights are equal, so that its standard error is 0.

    Raises:
        ValueError: If the log density is random after all, by hidden sites or draws.
    """
    began = time.perf_counter()
    position = torch.zeros(*layout.batch_shape, 0, dtype=layout.dtype, device=layout.device)
    density = ModelDensity(model, layout, arguments)

    def both(position: Tensor) -> tuple[Tensor, Tensor]:
        value = density.evaluate(position).log_joint
        return value, value

    with torch.no_grad(), validation_disabled(), hidden_sites_named((model, arguments)):
        value = check_pure(both, position, gradients=False)[1].double()
    none = torch.zeros(0, dtype=torch.float64, device="cpu")
    per_datum = value.mean().cpu().reshape(1)
    weights = value.expand(max(num_chains, 2), *value.shape)
    return AnnealedRun(
        direction="forward",
        log_weights=weights,
        betas=torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu"),
        accept_prob=none,
        num_diverging=none.long(),
        step_size=none,
        mean_log_ratio=per_datum,
        var_log_ratio=torch.zeros_like(per_datum),
        log_evidence_ti=weights,
        posterior={},
        plates={plate.name: plate.size for plate in layout.batch},
        site_plates={},
        num_gradients=0,
        num_evaluations=1,
        seconds=time.perf_counter() - began,
        seed=None,
        kernel="none",
        density_mode="eager",
        notes=(NOTE, *layout.notes),
        scale=layout.scale,
        observed=layout.observed,
        data_digest=digest_of_data(layout.observed),
    )
