"""What an annealed run returns.

Results store what was measured and derive the rest. All densities and bounds are in nats; a batch
is the tuple of plates that enclose the whole model, in the order of ``AnnealedRun.plates``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import bounds
from ..arguments import as_count, as_real, as_seed
from ..models.types import Figure
from ..weights import (
    effective_sample_size,
    log_mean_exp,
    log_normalized_weights,
)
from .base import Columns, Result
from .exported import Exported
from .files import stored
from .findings import Diagnostic
from .provenance import Provenance
from .quantiles import normal_quantile
from .run_draws import resample_ends
from .run_table import run_columns, run_table
from .tables import Table

__all__ = ["AnnealedRun", "Continues", "Estimate", "PilotSummary", "std_error_over_pairs"]


class Estimate(NamedTuple):
    """An estimate of a log evidence, which is no bound, and its standard error.

    Both are in nats, in the shape of the batch; the standard error is NaN where it is not known.
    ``value, std_error = estimate`` unpacks the two.
    """

    value: Tensor
    std_error: Tensor


class Continues(Protocol):
    """What continues a run in the process that ran it; see :mod:`pyro_anneal.runs.continuation`."""

    def draw(self, num_samples: int, *, thin: int, seed: int | None) -> dict[str, Tensor]:
        """Draws values by site, ``[n, *value_shape]``."""

    def log_likelihood(self, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Computes log likelihoods by observed site in nats, ``[n, ...]``."""


@stored
@dataclass(frozen=True, kw_only=True, eq=False)
class PilotSummary:
    """What the pilot found and what it cost; the run used it frozen."""

    num_chains: int  # particles M of the pilot
    num_gradients: int  # per particle
    betas: Tensor  # where its S stages ended, [S]
    step_size: Tensor  # [S], geometric mean over the batch
    accept_prob: Tensor  # [S], mean over chains and batch
    ess_fraction: Tensor  # conditional effective sample size over K between knots, [S]
    length: float  # thermodynamic length of the path
    seconds: float  # wall time
    correlation: float = math.nan  # of log p/q over one transition, to the same effect if constant
    expected_variance: float = math.nan  # of log-weights at this T, per datum
    expected_gap: float = math.nan  # of a sandwich at this K and T, nats per datum


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AnnealedRun(Exported, Result):
    r"""Outcome of K annealed chains over T steps in one direction.

    Forward chains, which is what :meth:`AnnealedImportance.run` and :func:`log_evidence` return,
    give a :attr:`lower` bound on the log evidence, with :attr:`interval` and :attr:`std_error`.
    Reverse chains, started from exact posterior samples, give an :attr:`upper` bound. Print the
    run for a table, and look at :attr:`verdict` first.

    Where plates enclose the whole model, all of this is per datum: the bounds have the shape
    ``batch`` of these plates, and ``run.lower.sum()`` bounds the log evidence of all data. A common
    ``poutine.scale`` s multiplies the bound outside the logarithm, so that
    :math:`E[e^{L/s}] = Z`.

    Example:
        >>> from pyro_anneal import AnnealedImportance
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> ais = AnnealedImportance(model, num_steps=50, progress_bar=False, seed=0)
        >>> run = ais.run(torch.tensor([2.0, 0.0]))
        >>> run.lower.shape, run.plates
        (torch.Size([2]), {'data': 2})
        >>> truth = torch.tensor([-2.2655, -1.2655])  # log densities of N(0, sqrt 2)
        >>> bool(((run.lower - truth).abs() < 5 * run.std_error).all())
        True
    """

    direction: Literal["forward", "reverse"]  # from the base to the model, or back
    log_weights: Tensor  # of the chains, nats, [K, *batch], float64
    betas: Tensor  # inverse temperatures, from 0 to 1, [T + 1]
    accept_prob: Tensor  # mean over chains and batch, for each beta at which chains move, [T - 1]
    num_diverging: Tensor  # number of divergent transitions, over chains and batch, [T - 1]
    step_size: Tensor  # geometric mean over the batch, [T - 1]
    mean_log_ratio: Tensor  # mean of log p/q where each increment is taken, nats per datum, [T]
    var_log_ratio: Tensor  # its variance over chains, per datum, [T]
    log_evidence_ti: Tensor  # integral of log p/q over beta, by chain, nats, [K, *batch]
    posterior: dict[str, Tensor]  # ends of the chains by site, [K, *value_shape], weighted
    plates: dict[str, int]  # sizes of the batch plates, in the order of the batch
    site_plates: dict[str, tuple[str | None, ...]]  # plates of the leading dims of a site's values
    num_gradients: int  # per chain: 1 + L (T - 1) with L leapfrogs
    num_evaluations: int  # calls of the density, counted
    seconds: float  # wall time of the chains
    seed: int | None  # of the call
    kernel: str  # the transition kernel
    density_mode: str  # how densities were evaluated: "graph", "compiled loop", "eager" and so on
    pilot: PilotSummary | None = None  # what the pilot found; None without one
    setup_seconds: float = 0.0  # wall time of inspection, recording and automatic guide
    fit_gradients: int = 0  # gradients of single chains spent on guide="auto", per batch element
    notes: tuple[str, ...] = ()  # what the number is about, and what was chosen for you
    scale: float = 1.0  # of a poutine.scale that all sites share
    certified: bool = True  # False for a reverse run from approximate posterior samples
    independent_starts: bool = (
        False  # reverse only: whether chains start from posterior samples of their own
    )
    target_accept: float | None = None  # of the kernel; None if it has no step size to tune
    observed: dict[str, Tensor] = field(default_factory=dict)  # the data, by observed site
    diagnostics: tuple[Diagnostic, ...] = ()  # what checks found
    data_digest: str = ""  # of the observed values, whatever their arrangement
    provenance: Provenance | None = None  # how the run was computed, and what it cost
    population_size: int = 1  # neighbouring chains that resampled among each other
    ancestors: Tensor | None = None  # the first ancestor of each resampled chain, [K, *batch]
    num_resamplings: Tensor | None = None  # of each population, [R, *batch]
    lineage_memory: Tensor | None = None  # what ends tell of these ancestors, 0 to 1, [1, *batch]
    # Blocks of chains for the guaranteed interval, and how many of them are kept, for each element
    # of the batch; chosen before the chains ran.
    blocks: tuple[int, int] = (1, 1)
    total_blocks: tuple[int, int] = (1, 1)  # the same for the sum over the batch
    rounds: tuple[AnnealedRun, ...] = ()  # all rounds of a call with a target; this is the last
    num_looks: int = 0  # which of the rounds that might have been reported this is
    target_gap: float | None = None  # the error that was asked for, nats
    measured_gap: float | None = None  # the error that was measured, nats
    # What posterior_samples continues; it lasts as long as the process, and is not saved.
    continuation: Continues | None = field(default=None, metadata={"saved": False})

    def __getstate__(self) -> dict[str, object]:
        """Leaves out what lasts only as long as the process."""
        return self.__dict__ | {"continuation": None}

    def __post_init__(self) -> None:
        if self.num_chains % self.population_size:
            raise ValueError(
                f"{self.num_chains} chains are no multiple of population_size="
                f"{self.population_size}"
            )
        if tuple(self.plates.values()) != self.batch_shape:
            raise ValueError(
                f"plates {self.plates} do not name the batch of log_weights: expected sizes "
                f"{list(self.batch_shape)}"
            )

    @property
    def num_chains(self) -> int:
        """Number K of chains."""
        return self.log_weights.shape[0]

    @property
    def num_steps(self) -> int:
        """Number T of increments."""
        return self.betas.shape[0] - 1

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the plates that enclose the whole model."""
        return tuple(self.log_weights.shape[1:])

    @property
    def num_populations(self) -> int:
        """Number R of populations; without resampling each chain is a population of its own."""
        return self.num_chains // self.population_size

    @property
    def population_estimates(self) -> Tensor:
        """Estimate ``log Z_hat`` of each population in nats, ``[R, *batch]``.

        Without resampling these are the log-weights. Estimates of forward populations are
        independent, with ``E[Z_hat] = Z``. Those of populations that hold a path from an exact
        posterior sample have ``E[1 / Z_hat] = 1 / Z``.
        """
        if self.population_size == 1:
            return self.log_weights
        return bounds.block_means(self.log_weights, self.num_populations)

    @property
    def num_lineages(self) -> Tensor | None:
        """Number of first chains that have descendants, ``batch``; None without resampling.

        Few lineages at the end mean that few of the modes that chains started towards are still
        represented.
        """
        if self.ancestors is None:
            return None
        ordered = self.ancestors.sort(dim=0).values
        return 1 + (ordered.diff(dim=0) > 0).sum(0)

    @property
    def _sign(self) -> float:
        return 1.0 if self.direction == "forward" else -1.0

    @property
    def lower(self) -> Tensor:
        """IM lower bound on the log evidence, ``log mean_k w_k``, nats, shape ``batch``.

        Where chains are resampled, the weights hold what earlier stages gave, so that this is the
        logarithm of the mean of the populations' estimates.

        Raises:
            ValueError: If the chains ran in reverse.
        """
        if self.direction == "reverse":
            raise ValueError("reverse chains give no lower bound: use .upper of this run")
        return self.scale * bounds.independent_multi_lower(self.log_weights)

    @property
    def upper(self) -> Tensor:
        """Upper bound ``-log mean_k 1 / w_k`` (CR, or IR for independent starts), shape ``batch``.

        Where chains are resampled, the mean is over populations instead of chains; see
        :func:`pyro_anneal.bounds.population_upper`. The number is a bound only if the posterior
        samples were exact (``certified``). Otherwise it is an estimate, and :attr:`kind` says so.
        Reverse chains repair the draws that they start from, so its agreement with a lower bound
        proves nothing about the sampler.

        Raises:
            ValueError: If the chains ran forward.
        """
        if self.direction == "forward":
            raise ValueError(
                "forward chains give no upper bound: use .lower, or sandwich() or run_reverse() "
                "for an upper bound"
            )
        return self.scale * bounds.log_harmonic_mean(self.population_estimates)

    @property
    def log_evidence(self) -> Tensor:
        """The bound of this direction: ``lower`` forward, ``upper`` in reverse, shape ``batch``."""
        return self.lower if self.direction == "forward" else self.upper

    @property
    def single(self) -> Tensor:
        """Single-sample bound: the mean log-weight, nats, shape ``batch``.

        It is a lower bound of forward chains and an upper bound of reverse chains, and looser than
        the bound of several chains. Where chains were resampled, it is the mean of ``log Z_hat``
        over populations.
        """
        return self.scale * bounds.single_sample(self.population_estimates)

    @property
    def _signed_weights(self) -> Tensor:
        """Log-weights of what a posterior sample of one direction is weighted by."""
        return self.log_weights if self.population_size > 1 else self._sign * self.log_weights

    @property
    def ess(self) -> Tensor:
        """Effective sample size of the weights (of ``1 / w`` in reverse), in [1, K].

        Where chains were resampled, this is the effective sample size since the last resampling;
        what was lost before shows in :attr:`num_lineages`.
        """
        return effective_sample_size(self._signed_weights)

    @property
    def largest_weight(self) -> Tensor:
        """Largest share of the weight (of ``1 / w`` in reverse) that one chain holds, ``batch``."""
        return log_normalized_weights(self._signed_weights).amax(dim=0).exp()

    @property
    def std_error(self) -> Tensor:
        r"""Standard error of ``log_evidence`` by the delta method, nats, shape ``batch``.

        .. math:: \sqrt{\mathrm{Var}(w) / K} \,/\, \bar w

        An asymptotic figure: a mode that no chain visited does not show. NaN for one chain, and
        for reverse chains that share their start (theirs comes from independent pairs only).

        Chains that were resampled vary by lineage: with the shares :math:`S_e` of the weight that
        descend from ancestor e it is :math:`\sqrt{(\sum_e S_e^2 - 1 / K) \, K / (K - 1)}`, which
        is the same where each chain is its own ancestor.

        Source: Chan and Lai (2013), *A general theory of particle filters in hidden Markov models
        and some applications*; Lee and Whiteley (2018), *Variance estimation in the particle
        filter*.
        """
        log_weights = self._sign * self.log_weights
        if self.ancestors is not None:
            if self.direction == "reverse" or self.num_chains == 1:
                return torch.full_like(log_weights[0], torch.nan)
            shares = log_normalized_weights(log_weights).exp()
            by_ancestor = torch.zeros_like(shares).scatter_add(0, self.ancestors, shares)
            excess = by_ancestor.square().sum(0) - 1.0 / self.num_chains
            variance = excess.clamp(min=0.0) * self.num_chains / (self.num_chains - 1)
            return self.scale * torch.where(log_weights.isnan().any(0), torch.nan, variance.sqrt())
        relative = torch.exp(log_weights - log_mean_exp(log_weights))
        return self.scale * self._std_error_of_mean(relative)

    @property
    def thermodynamic_integration(self) -> Estimate:
        """Estimate of the log evidence by integrating ``log p/q`` over beta, shape ``batch``.

        This is no bound: the trapezoid rule has an error, and so have chains that lag behind the
        path. The mean over resampled chains is right as well, but its standard error is not known
        and therefore NaN.
        """
        value = self.scale * self.log_evidence_ti.mean(dim=0)
        if self.population_size > 1:
            return Estimate(value, torch.full_like(value, torch.nan))
        return Estimate(value, self.scale * self._std_error_of_mean(self.log_evidence_ti))

    def _std_error_of_mean(self, values: Tensor) -> Tensor:
        dependent = self.direction == "reverse" and not self.independent_starts
        if self.num_chains == 1 or dependent:
            return torch.full_like(values[0], torch.nan)
        return values.std(dim=0) / math.sqrt(self.num_chains)

    def interval(self, level: float = 0.95, *, total: bool = False) -> tuple[Tensor, Tensor]:
        r"""Computes a one-sided interval with a finite-sample guarantee.

        .. math:: P\bigl(\log Z \ge \min_r L_r - \log(1 / \alpha) / R\bigr) \ge 1 - \alpha = level

        over R blocks of chains (``blocks``, ``total_blocks``), chosen before the run; see
        :func:`pyro_anneal.bounds.limit_of_blocks`. It holds at any K and T. Forward chains alone
        cannot exclude evidence that none of them found, so the upper end is infinite; a reverse run
        has the mirrored interval, of one block where its chains share a posterior sample.

        Where rounds stopped at a target, the n-th round that might have been reported
        (``num_looks``) has the share :math:`2^{-n} \alpha`, so that the interval reported fails
        with probability :math:`\alpha` at most, whatever the decision to stop looked at. One look
        costs :math:`\log 2 / R` nats. Each of ``rounds`` has an interval of its own level.

        Args:
            level: Probability of coverage, in (0, 1).
            total: Whether to cover the sum over the batch instead of each element.

        Returns:
            Ends of the interval in nats, each of shape ``batch``, or scalars for the total.

        Raises:
            ValueError: If ``level`` is not in (0, 1), or the run is not certified.
        """
        if not 0.0 < as_real("level", level) < 1.0:
            raise ValueError(f"level must lie strictly between 0 and 1, got {level}")
        if not self.certified:
            raise ValueError(
                "this run is not certified (its posterior samples are approximate), so no interval "
                "has a guarantee; use sandwich() on simulated data"
            )
        count, kept = self.total_blocks if total else self.blocks
        if self.direction == "reverse" and not self.independent_starts:
            count = kept = 1
        if self.population_size > 1 and self.direction == "reverse":
            estimates = self.population_estimates
        else:
            estimates = self.log_weights
        means = self._sign * bounds.block_means(self._sign * estimates, count)
        if total:
            means = means.reshape(count, -1).sum(1)
        limit = (
            self.scale
            * self._sign
            * bounds.limit_of_blocks(
                self._sign * means, bounds.level_of_look(level, self.num_looks), num_kept=kept
            )
        )
        infinite = torch.full_like(limit, torch.inf)
        return (limit, infinite) if self.direction == "forward" else (-infinite, limit)

    def normal_interval(
        self, level: float = 0.95, *, total: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Computes an asymptotic interval, ``log_evidence`` plus and minus standard errors.

        It is narrower than :meth:`interval` and knows nothing of what no chain has seen: a mode that
        was missed, or a tail of the weights.

        Args:
            level: Coverage for many chains, in (0, 1).
            total: Whether to cover the sum over the batch instead of each element.

        Returns:
            Ends of the interval in nats, each of shape ``batch``, or scalars for the total; NaN
            where the standard error is not known.

        Raises:
            ValueError: If ``level`` is not in (0, 1).
        """
        value, error = self.log_evidence, self.std_error
        if total:
            value, error = value.sum(), error.square().sum().sqrt()
        margin = normal_quantile(level) * error
        return value - margin, value + margin

    def resample(self, num_samples: int, *, seed: int | None = None) -> dict[str, Tensor]:
        """Draws equally weighted posterior samples, per datum, by systematic resampling.

        Each batch element has weights and indices of its own. A site outside some batch plate
        has no weight of its own: it is kept if all chains agree on it, else left out.

        Args:
            num_samples: Number of draws.
            seed: Seed of the draws; the global generator if ``None``.

        Returns:
            Values by site in the model's own space, shape ``[num_samples, *value_shape]``.

        Raises:
            ValueError: If the chains ran in reverse, or ``num_samples`` is below 1.
        """
        if self.direction == "reverse":
            raise ValueError(
                "reverse chains end at the base, not at the posterior: resample a forward run"
            )
        return resample_ends(self, num_samples, seed)

    def posterior_samples(
        self, num_samples: int, *, thin: int = 10, seed: int | None = None
    ) -> dict[str, Tensor]:
        r"""Draws many equally weighted posterior samples: the chains go on at :math:`\beta = 1`.

        The K ends are resampled by their weights, per datum, and moved by the run's own frozen
        kernel, which keeps the posterior; every ``thin`` transitions each chain gives a draw. So
        the draws are as good as the K weights, and do not repeat their K values as :meth:`resample`
        does. Draws of one chain are dependent. A mode that no chain ended in stays missed. The
        cost is about ``num_samples * thin`` transitions, K at a time.

        Args:
            num_samples: Number n of draws.
            thin: Transitions of a chain before each of its draws.
            seed: Seed of the draws; one drawn from torch's global generator if None.

        Returns:
            Values by site in the model's own space, ``[n, *value_shape]``.

        Raises:
            ValueError: If the chains ran in reverse, a count is below 1, or this result cannot be
                continued: it was loaded, copied, or merged from several simulated data sets.

        Example:
            >>> from pyro_anneal import AnnealedImportance
            >>> def model(x):
            ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
            ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            >>> ais = AnnealedImportance(model, num_steps=50, progress_bar=False, seed=0)
            >>> draws = ais.run(torch.tensor(2.0)).posterior_samples(500, seed=1)["z"]
            >>> draws.shape, bool((draws.mean() - 1.0).abs() < 0.1)  # p(z | x) = N(1, 1/2)
            (torch.Size([500]), True)
        """
        num_samples, thin = as_count("num_samples", num_samples), as_count("thin", thin)
        return self._continued("posterior_samples").draw(
            num_samples, thin=thin, seed=as_seed(seed)
        )

    def _continued(self, what: str) -> Continues:
        """Returns what continues the run, or says why there is none."""
        if self.direction == "reverse":
            raise ValueError(
                f"{what} needs a forward run: reverse chains end at the base, not at the posterior"
            )
        if self.continuation is None:
            raise ValueError(
                f"{what} needs the model and the chains, which are kept only in the process that "
                "ran them, not in files, copies or results on several simulated data sets: call "
                "run() again (with the same seed it gives the same run), or use resample(n) for "
                f"draws among the {self.num_chains} ends"
            )
        return self.continuation

    @property
    def directions(self) -> dict[str, AnnealedRun]:
        """This run, by its direction."""
        return {self.direction: self}

    @property
    def kind(self) -> Literal["lower bound", "upper bound", "estimate"]:
        """What ``log_evidence`` is: an estimate, where the starts were approximate."""
        if not self.certified:
            return "estimate"
        return "lower bound" if self.direction == "forward" else "upper bound"

    @property
    def sides(self) -> dict[str, Tensor]:
        """The bound by its side, nats, shape ``batch``; none if the run is only an estimate."""
        if not self.certified:
            return {}
        return {"lower" if self.direction == "forward" else "upper": self.log_evidence}

    def _columns(self) -> tuple[Columns, Columns]:
        return run_columns(self)

    def _table(self) -> Table:
        return run_table(self)

    def plot(self) -> Figure:
        """Draws the run; see :func:`pyro_anneal.results.plotting.plot_run`."""
        from .plotting import plot_run

        return plot_run(self)


def std_error_over_pairs(values: Tensor) -> Tensor:
    """Computes the standard error of the mean of N independent values; NaN where N < 2."""
    if values.numel() < 2:
        return torch.full((), torch.nan, dtype=values.dtype, device=values.device)
    return values.std() / math.sqrt(values.numel())
