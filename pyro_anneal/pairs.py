"""Forward and reverse runs on one simulated pair, and several of them side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .results import AnnealedRun

__all__ = ["Pair", "merge_pairs"]


class Pair(NamedTuple):
    """What one simulated data set gave."""

    forward: AnnealedRun
    reverse: AnnealedRun
    coupled_reverse: Tensor | None  # log-weights from the end of forward chain 0
    observed: dict[str, Tensor]
    log_likelihood: Tensor  # log p(x | z), [*batch]


def merge_pairs(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Merges simulated data sets into the fields of one sandwich.

    One pair keeps its batch; several get a leading plate ``"simulation"``.

    Args:
        pairs: One entry per simulated data set.

    Returns:
        Keyword arguments of :class:`~pyro_anneal.results.Sandwich`.
    """
    if len(pairs) == 1:
        pair = pairs[0]
        return {
            "forward": pair.forward,
            "reverse": pair.reverse,
            "coupled_reverse": pair.coupled_reverse,
            "simulated": pair.observed,
            "true_log_likelihood": pair.log_likelihood,
        }
    coupled = [pair.coupled_reverse for pair in pairs if pair.coupled_reverse is not None]
    return {
        "forward": _merge_runs([pair.forward for pair in pairs]),
        "reverse": _merge_runs([pair.reverse for pair in pairs]),
        "coupled_reverse": torch.stack(coupled, 1) if coupled else None,
        "simulated": _stack([pair.observed for pair in pairs], 0),
        "true_log_likelihood": torch.stack([pair.log_likelihood for pair in pairs]),
    }


def _stack(values: Sequence[dict[str, Tensor]], dim: int) -> dict[str, Tensor]:
    return {name: torch.stack([v[name] for v in values], dim) for name in values[0]}


def _merge_runs(runs: Sequence[AnnealedRun]) -> AnnealedRun:
    """Merges runs on different data; each had its own pilot, so curves are averages over them."""
    first = runs[0]

    def mean(pick: Callable[[AnnealedRun], Tensor]) -> Tensor:
        return torch.stack([pick(run) for run in runs]).mean(0)

    return replace(
        first,
        log_weights=torch.stack([run.log_weights for run in runs], 1),
        log_evidence_ti=torch.stack([run.log_evidence_ti for run in runs], 1),
        betas=mean(lambda run: run.betas),
        accept_prob=mean(lambda run: run.accept_prob),
        num_diverging=torch.stack([run.num_diverging for run in runs]).sum(0),
        step_size=mean(lambda run: run.step_size),
        mean_log_ratio=mean(lambda run: run.mean_log_ratio),
        var_log_ratio=mean(lambda run: run.var_log_ratio),
        posterior=_stack([run.posterior for run in runs], 1),
        plates={"simulation": len(runs), **first.plates},
        site_plates={name: ("simulation", *rest) for name, rest in first.site_plates.items()},
        observed=_stack([run.observed for run in runs], 0),
        num_evaluations=sum(run.num_evaluations for run in runs),
        seconds=sum(run.seconds for run in runs),
    )
