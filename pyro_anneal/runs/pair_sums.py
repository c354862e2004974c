"""Sums over simulated pairs: of their log-weights everything, of their curves the mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..results.digest import add_digests
from ..results.findings import Diagnostic
from ..results.run import AnnealedRun, Continues, PilotSummary
from ..results.sandwich import Sandwich

__all__ = ["Pair", "PairSum", "RunSum"]

# Fields of a run that are added up over data sets; curves become averages, for each data set had
# a pilot of its own.
_TOTALS = ("num_diverging", "num_evaluations", "seconds", "setup_seconds")
_CURVES = ("betas", "accept_prob", "step_size", "mean_log_ratio", "var_log_ratio")
_SUMMED = (*_TOTALS, *_CURVES)
# Fields that are kept for each data set, and where several are stacked.
_PER_PAIR = ("log_weights", "log_evidence_ti")
_PER_PAIR_IF_ANY = ("ancestors", "num_resamplings", "lineage_memory")  # where chains are resampled
_BY_SITE = {"posterior": 1, "observed": 0}


class Pair(NamedTuple):
    """What one simulated data set gave."""

    forward: AnnealedRun
    reverse: AnnealedRun
    coupled_reverse: Tensor | None  # log-weights from the end of forward chain 0
    observed: dict[str, Tensor]  # empty if samples are not kept
    log_likelihood: Tensor  # log p(x | z), [*batch]
    controls: Tensor  # of mean zero over pairs, [C, *batch]


class RunSum:
    """Runs on different data, merged: log-weights side by side, averages of their curves."""

    def __init__(self) -> None:
        self.count = 0
        self.shared: dict[str, Any] = {}  # other fields of the first run
        self.per_pair: dict[str, list[Tensor]] = {}
        self.by_site: dict[str, list[dict[str, Tensor]]] = {name: [] for name in _BY_SITE}
        self.sums: dict[str, Any] = dict.fromkeys(_SUMMED, 0)
        self.digests: list[str] = []
        self.continuation: Continues | None = None  # of the only run; never in a file

    def add(self, run: AnnealedRun) -> None:
        """Adds one run."""
        fields = dict(vars(run)) | {"continuation": None}
        resampled = [name for name in _PER_PAIR_IF_ANY if fields[name] is not None]
        for name in (*_PER_PAIR, *resampled):
            self.per_pair.setdefault(name, []).append(fields.pop(name))
        for name in _BY_SITE:
            self.by_site[name].append(fields.pop(name))
        for name in _SUMMED:
            self.sums[name] = self.sums[name] + fields.pop(name)
        self.continuation = run.continuation if self.count == 0 else None
        if self.count == 0:
            self.shared = fields
        self.digests.append(fields["data_digest"])
        self.count += 1

    def result(self) -> AnnealedRun:
        """Builds the merged run; with several runs its first plate counts them."""
        shared = self.shared | {"data_digest": add_digests(self.digests)}
        fields: dict[str, Any] = {
            name: total if name in _TOTALS else total / self.count
            for name, total in self.sums.items()
        }
        if self.count == 1:
            fields |= {name: values[0] for name, values in self.per_pair.items()}
            fields |= {name: values[0] for name, values in self.by_site.items()}
            shared["continuation"] = self.continuation
        else:
            fields |= {name: torch.stack(values, 1) for name, values in self.per_pair.items()}
            fields |= {
                name: _stack(values, _BY_SITE[name]) for name, values in self.by_site.items()
            }
            shared["plates"] = {"simulation": self.count, **shared["plates"]}
            shared["site_plates"] = {
                name: ("simulation", *rest) for name, rest in shared["site_plates"].items()
            }
        return AnnealedRun(**shared, **fields)

    def to_dict(self) -> dict[str, Any]:
        """Describes the runs by tensors and plain values."""
        return {
            "count": self.count,
            "shared": _plain(self.shared),
            "per_pair": {name: torch.stack(values) for name, values in self.per_pair.items()},
            "by_site": {name: _stack(values, 0) for name, values in self.by_site.items()},
            "sums": self.sums,
            "digests": self.digests,
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> RunSum:
        """Undoes :meth:`to_dict`."""
        total = cls()
        total.count, total.sums = content["count"], dict(content["sums"])
        total.shared, total.digests = _unplain(content["shared"]), list(content["digests"])
        total.per_pair = {name: list(values) for name, values in content["per_pair"].items()}
        for name, values in content["by_site"].items():
            total.by_site[name] = _unstack(values, total.count)
        return total


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """Describes fields of a run, its rounds included, by tensors and plain values."""
    pilot = fields["pilot"]
    return fields | {
        "pilot": None if pilot is None else vars(pilot),
        "diagnostics": [vars(found) for found in fields["diagnostics"]],
        "rounds": [_plain(dict(vars(run))) for run in fields["rounds"]],
    }


def _unplain(content: dict[str, Any]) -> dict[str, Any]:
    """Undoes :func:`_plain`."""
    pilot = content["pilot"]
    return content | {
        "pilot": None if pilot is None else PilotSummary(**pilot),
        "diagnostics": tuple(Diagnostic(**found) for found in content["diagnostics"]),
        "rounds": tuple(AnnealedRun(**_unplain(run)) for run in content["rounds"]),
    }


class PairSum:
    """Pairs, merged as they come."""

    def __init__(self) -> None:
        self.forward, self.reverse = RunSum(), RunSum()
        self.coupled: list[Tensor] = []
        self.observed: list[dict[str, Tensor]] = []
        self.log_likelihood: list[Tensor] = []
        self.controls: list[Tensor] = []

    @property
    def count(self) -> int:
        """Number of simulated data sets."""
        return self.forward.count

    def add(self, pair: Pair) -> None:
        """Adds what one data set gave."""
        self.forward.add(pair.forward)
        self.reverse.add(pair.reverse)
        if pair.coupled_reverse is not None:
            self.coupled.append(pair.coupled_reverse)
        self.observed.append(pair.observed)
        self.log_likelihood.append(pair.log_likelihood)
        self.controls.append(pair.controls)

    def sandwich(self, bounds: tuple[str, str]) -> Sandwich:
        """Builds the sandwich; one data set keeps its batch, several get a leading plate."""
        one = self.count == 1
        coupled = torch.stack(self.coupled, 1) if self.coupled else None
        return Sandwich(
            forward=self.forward.result(),
            reverse=self.reverse.result(),
            coupled_reverse=coupled.squeeze(1) if one and coupled is not None else coupled,
            simulated=self.observed[0] if one else _stack(self.observed, 0),
            true_log_likelihood=(
                self.log_likelihood[0] if one else torch.stack(self.log_likelihood)
            ),
            lower_bound=bounds[0],
            upper_bound=bounds[1],
        )

    def all_controls(self) -> Tensor | None:
        """Joins the control variates of all pairs, ``[C, (S,) *batch]``, or None without any."""
        if len({controls.shape for controls in self.controls}) != 1 or not len(self.controls[0]):
            return None
        return self.controls[0] if self.count == 1 else torch.stack(self.controls, 1)

    def to_dict(self) -> dict[str, Any]:
        """Describes the pairs by tensors and plain values."""
        return {
            "forward": self.forward.to_dict(),
            "reverse": self.reverse.to_dict(),
            "coupled": torch.stack(self.coupled) if self.coupled else None,
            "observed": _stack(self.observed, 0),
            "log_likelihood": torch.stack(self.log_likelihood),
            "controls": list(self.controls),
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any], device: torch.device) -> PairSum:
        """Undoes :meth:`to_dict`, with the tensors on a device."""
        content = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, content)
        total = cls()
        total.forward = RunSum.from_dict(content["forward"])
        total.reverse = RunSum.from_dict(content["reverse"])
        total.coupled = [] if content["coupled"] is None else list(content["coupled"])
        total.observed = _unstack(content["observed"], total.count)
        total.log_likelihood = list(content["log_likelihood"])
        total.controls = list(content["controls"])
        return total


def _stack(values: Sequence[dict[str, Tensor]], dim: int) -> dict[str, Tensor]:
    return {name: torch.stack([value[name] for value in values], dim) for name in values[0]}


def _unstack(values: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    return [{name: value[i] for name, value in values.items()} for i in range(count)]
