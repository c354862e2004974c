"""What an audit of an inference returns: ranks, a divergence, one word."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..models.types import Figure
from .base import Columns, Result
from .findings import Diagnostic
from .provenance import Provenance
from .run import AnnealedRun
from .tables import Table, format_value

__all__ = ["InferenceCheck", "Jeffreys"]


class Jeffreys(NamedTuple):
    """Bounds on a Jeffreys divergence, averaged over simulated data, in nats.

    The standard errors are those over simulations; that of the lower bound is zero where it is a
    confidence limit already.
    """

    lower: Tensor
    upper: Tensor
    lower_std_error: Tensor
    upper_std_error: Tensor


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class InferenceCheck(Result):
    r"""Outcome of an inference on data simulated from the model, S times.

    ``ranks`` holds, by latent site and for the log joint density, how many of the ``num_ranked``
    draws lie below the exact posterior sample of each simulation. They are uniform if the draws are
    from the posterior. ``p_values`` are those of a test of uniformity of each scalar; the verdict
    corrects them for their number.
    """

    ranks: dict[str, Tensor]  # [S, *value_shape], from 0 to num_ranked
    num_ranked: Tensor  # [S], draws L that were ranked
    uniforms: dict[str, Tensor]  # [S, *value_shape]: (rank + V) / (L + 1), V uniform
    p_values: dict[str, Tensor]  # value_shape
    lower_terms: Tensor  # of the divergence, nats, [S]; empty if the lower end comes from ranks
    upper_terms: Tensor  # nats, [S]
    rank_limit: float  # lower 95% confidence limit on the divergence from ranks, nats
    is_guide: bool  # whether a guide was audited, which has a density
    notes: tuple[str, ...] = ()  # what the audit is about
    diagnostics: tuple[Diagnostic, ...] = ()  # what checks found
    provenance: Provenance | None = None  # how the audit was made, and what it cost
    _absent: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("interval", "normal_interval"),
        "an audit is no evidence. jeffreys has bounds on the divergence with standard errors, "
        "p_values say whether ranks are uniform",
    )

    @property
    def num_simulations(self) -> int:
        """Number S of simulated data sets."""
        return len(self.num_ranked)

    @property
    def jeffreys(self) -> Jeffreys:
        r"""Bounds on :math:`\mathrm{KL}(q \| p) + \mathrm{KL}(p \| q)`, averaged over data.

        For a guide q both sides are means over simulations of ``log p/q`` at a sample of p minus at
        draws of q: ``upper`` with the exact posterior sample, which is unbiased; ``lower`` with
        draws of q resampled by importance, which stay nearer to q than the posterior is. For draws
        without a density, ``lower`` is a 95% confidence limit from the histograms of ranks, and
        ``upper`` is that of the density *fitted* to the draws.
        """
        upper = self.upper_terms
        if self.is_guide:
            lower = self.lower_terms
            return Jeffreys(lower.mean(), upper.mean(), _error(lower), _error(upper))
        limit = torch.tensor(self.rank_limit, dtype=torch.float64)
        return Jeffreys(limit, upper.mean(), torch.zeros_like(limit), _error(upper))

    @property
    def adjusted_p_values(self) -> dict[str, Tensor]:
        """The p-values by Holm's rule: below a, at most a share a of exact samplers has any such.

        Source: Holm (1979), *A simple sequentially rejective multiple test procedure*.
        """
        flat = torch.cat([value.reshape(-1) for value in self.p_values.values()])
        order = flat.sort()
        factors = torch.arange(len(flat), 0, -1, dtype=flat.dtype)
        adjusted = torch.empty_like(flat)
        adjusted[order.indices] = (order.values * factors).cummax(0).values.clamp(max=1.0)
        parts = adjusted.split([value.numel() for value in self.p_values.values()])
        shapes = [value.shape for value in self.p_values.values()]
        return {
            name: part.reshape(shape)
            for name, part, shape in zip(self.p_values, parts, shapes, strict=True)
        }

    @property
    def directions(self) -> dict[str, AnnealedRun]:
        """Nothing: no chain is annealed, for annealing would repair the draws."""
        return {}

    @property
    def sides(self) -> dict[str, Tensor]:
        """Bounds on the Jeffreys divergence by side, nats."""
        return {"lower": self.jeffreys.lower, "upper": self.jeffreys.upper}

    def _columns(self) -> tuple[Columns, Columns]:
        names: list[str] = []
        columns: dict[str, list[float]] = {"p_value": [], "adjusted_p_value": []}
        columns["mean_uniform"] = []
        adjusted = self.adjusted_p_values
        for name, value in self.p_values.items():
            means = self.uniforms[name].mean(0).reshape(-1).tolist()
            names += labels(name, value)
            columns["p_value"] += value.reshape(-1).tolist()
            columns["adjusted_p_value"] += adjusted[name].reshape(-1).tolist()
            columns["mean_uniform"] += means
        return {"quantity": names}, columns

    def _table(self) -> Table:
        found = self.jeffreys
        what = "guide" if self.is_guide else "draws"
        names = [label for name, value in self.p_values.items() for label in labels(name, value)]
        adjusted = torch.cat([p.reshape(-1) for p in self.adjusted_p_values.values()])
        worst = int(adjusted.argmin())
        fewest, most = str(int(self.num_ranked.min())), str(int(self.num_ranked.max()))
        upper = "Jeffreys divergence at most" + ("" if self.is_guide else ", of a density fitted")
        fields = [
            ("verdict", self.verdict),
            (
                "Jeffreys divergence at least",
                format_value(found.lower.item(), found.lower_std_error.item() or None),
            ),
            (upper, format_value(found.upper.item(), found.upper_std_error.item())),
            ("quantities ranked", str(len(names))),
            ("least adjusted p-value", f"{adjusted[worst].item():.2g} ({names[worst]})"),
            ("draws ranked per data set", fewest if fewest == most else f"{fewest} to {most}"),
        ]
        if self.provenance is not None:
            fields.append(("wall time", self.provenance.describe_seconds()))
        title = (
            f"Audit of {'a' if self.is_guide else 'an inference by its'} {what} on "
            f"{self.num_simulations} SIMULATED data sets; nats"
        )
        return Table(title, fields, [*self.notes, *(d.message for d in self.diagnostics)])

    def plot(self) -> Figure:
        """Draws ranks against a uniform distribution; returns a matplotlib figure."""
        from .drawn_plot import plot_ranks

        return plot_ranks(self)


def labels(name: str, value: Tensor) -> list[str]:
    """Names the scalars of a quantity.

    Example:
        >>> labels("z", torch.zeros(2, 1))
        ['z[0, 0]', 'z[1, 0]']
    """
    if value.dim() == 0:
        return [name]
    places = torch.cartesian_prod(*(torch.arange(n) for n in value.shape))
    return [f"{name}[{', '.join(map(str, p.reshape(-1).tolist()))}]" for p in places]


def _error(values: Tensor) -> Tensor:
    if len(values) < 2:
        return torch.full((), torch.nan, dtype=torch.float64)
    return values.std() / math.sqrt(len(values))
