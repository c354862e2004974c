"""What a run over batches of data returns: a few numbers per datum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import bounds
from ..models.types import Figure
from .base import Columns, Result
from .findings import Diagnostic
from .provenance import Provenance
from .quantiles import normal_quantile
from .run import AnnealedRun
from .tables import Table, format_value

__all__ = ["EvidenceOfBatches"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class EvidenceOfBatches(Result):
    r"""Lower bounds on the log evidence of N data that came in batches.

    .. math:: \log p(x_1, \dots, x_N) = \sum_n \log p(x_n) \ge \sum_n L_n

    in expectation, for data that are independent given the model's parameters. ``lower`` has one
    bound per datum, in the order of the batches, ``total`` is their sum, and :meth:`interval` is
    about that sum.
    """

    lower: Tensor  # IM lower bounds, nats, [N]
    single: Tensor  # single-sample bounds, nats, [N]
    std_error: Tensor  # of each lower bound, nats, [N]
    ess: Tensor  # effective sample sizes, [N]
    batch_sizes: tuple[int, ...]  # numbers per batch: one if the model has no batch plates
    num_chains: int  # K, for each datum
    num_steps: int  # T; where rounds chose it, that of the first batch
    num_gradients: int  # per chain and batch
    seconds: float  # of the chains, summed over batches
    seed: int  # of the call; batch i has the seed plus i
    scale: float = 1.0  # of a poutine.scale that all sites share
    notes: tuple[str, ...] = ()  # what the numbers are about
    diagnostics: tuple[Diagnostic, ...] = ()  # what checks found, in all batches
    data_digest: str = ""  # of the observed values of all batches
    # Sums over all data of the bounds of R independent blocks of chains, nats, [R]; None for the
    # total alone.
    block_totals: Tensor | None = None
    num_kept: int | None = None  # blocks that interval keeps; chosen before the chains ran
    provenance: Provenance | None = None  # how it was computed, and what it cost

    @property
    def directions(self) -> dict[str, AnnealedRun]:
        """Empty: the runs of batches are not kept, only a few numbers per datum."""
        return {}

    @property
    def sides(self) -> dict[str, Tensor]:
        """The lower bounds per datum, nats, ``[N]``."""
        return {"lower": self.lower}

    @property
    def num_batches(self) -> int:
        """Number of batches."""
        return len(self.batch_sizes)

    @property
    def total(self) -> Tensor:
        """Lower bound on the log evidence of all data, nats, scalar."""
        return self.lower.sum()

    @property
    def total_std_error(self) -> Tensor:
        """Standard error of ``total``, nats, scalar; NaN for one chain."""
        return self.std_error.square().sum().sqrt()

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        r"""Computes a one-sided interval of the log evidence of all data.

        Products of independent unbiased estimates are unbiased, so that the sums of R blocks of
        chains give :math:`P(\log p \ge \min_r \mathrm{total}_r - \log(1 / \alpha) / R) \ge 1 -
        \alpha = level`, at any number of chains and steps; see
        :func:`pyro_anneal.bounds.limit_of_blocks`.

        Args:
            level: Probability of coverage, in (0, 1).

        Returns:
            Ends of the interval in nats, scalars; the upper one is infinite.

        Raises:
            ValueError: If ``level`` is not in (0, 1).
        """
        totals = self.total.unsqueeze(0) if self.block_totals is None else self.block_totals
        limit = bounds.limit_of_blocks(totals / self.scale, level, num_kept=self.num_kept)
        return self.scale * limit, torch.full_like(limit, torch.inf)

    def normal_interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Computes an asymptotic interval of the log evidence of all data.

        Args:
            level: Coverage for many chains, in (0, 1).

        Returns:
            Ends of the interval in nats, scalars.

        Raises:
            ValueError: If ``level`` is not in (0, 1).
        """
        margin = normal_quantile(level) * self.total_std_error
        return self.total - margin, self.total + margin

    def _columns(self) -> tuple[Columns, Columns]:
        batches = torch.arange(self.num_batches)
        batch = torch.repeat_interleave(batches, torch.tensor(self.batch_sizes))
        names = ("lower", "std_error", "single", "ess")
        return {}, {"batch": batch} | {name: getattr(self, name) for name in names}

    def plot(self) -> Figure:
        """Draws the evidence per datum; see :func:`pyro_anneal.results.plotting.plot_batches`."""
        from .plotting import plot_batches

        return plot_batches(self)

    def _table(self) -> Table:
        per_datum = f"{self.lower.mean().item():.4g} ({self.lower.min().item():.4g} to "
        per_datum += f"{self.lower.max().item():.4g})"
        ess = f"{self.ess.mean().item():.4g} of {self.num_chains} (at least "
        ess += f"{self.ess.min().item():.4g})"
        fields = [
            (
                "lower bound (nats, sum)",
                format_value(self.total.item(), self.total_std_error.item()),
            ),
            ("at least (95%, guaranteed)", format_value(self.interval(0.95)[0].item())),
            ("lower bound per datum", per_datum),
            ("single-sample bound (sum)", format_value(self.single.sum().item())),
            ("effective sample size", ess),
        ]
        cost = f"{self.num_gradients} gradients per chain and batch"
        if self.provenance is None:
            cost += f", {self.seconds:.2f} s"
        fields.append(("cost", cost))
        title = (
            f"EvidenceOfBatches: {len(self.lower)} data in {self.num_batches} batches, "
            f"{self.num_chains} chains, {self.num_steps} steps"
        )
        fields.append(("verdict", self.verdict))
        if self.provenance is not None:
            fields.append(("wall time", self.provenance.describe_seconds()))
        return Table(title, fields, [*self.notes, *(d.message for d in self.diagnostics)])
