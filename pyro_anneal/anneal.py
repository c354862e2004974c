"""The inference object: wires model, base, pilot, chains and bounds together."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .arguments import as_count, check_reserved
from .diagnostics import checks as diagnostics
from .models.inspection import NothingToAnneal
from .models.simulation import Arguments
from .models.types import Fn
from .persistence.fingerprints import describe_arguments, described
from .persistence.journal import Journal, keep_journal
from .problems.problem import Guide
from .problems.samples import HoldsDraws, pack_samples
from .results.batches import EvidenceOfBatches
from .results.mutual_information import FEW_PAIRS, MutualInformation
from .results.rounds import PairRounds
from .results.run import AnnealedRun
from .results.sandwich import Sandwich, check_names
from .runs.batches import as_arguments, run_batches
from .runs.exact import exact_run
from .runs.freezing import freeze
from .runs.overlooked import find_overlooked
from .runs.pairs import PairSum, simulate_pairs
from .runs.progress import follow_call
from .runs.provenance import record_batches, record_call
from .runs.rounds import Done, in_rounds, run_back, run_forward
from .runs.scout import scout_run
from .runs.settings import Frozen, Settings
from .runs.surrogates import SimulatedControls

__all__ = ["AnnealedImportance", "log_evidence"]

_TARGET = 0.02  # standard error of log_evidence, nats
_MOST_ROUNDS = 13  # of log_evidence
# Shares of the progress bar by stage of a call.
_FORWARD = {"fit": 2.0, "pilot": 1.0, "forward": 6.0}
_BOTH = _FORWARD | {"reverse": 6.0}
_STAGES: dict[str, dict[str, float]] = {
    "run": _FORWARD,
    "run_reverse": {"fit": 2.0, "pilot": 1.0, "reverse": 6.0},
    "sandwich": _BOTH,
    "mutual_information": _BOTH,
    "run_batches": {"batches": 1.0},
}


class AnnealedImportance(Settings):
    r"""Annealed importance sampling for any Pyro model and guide.

    K chains move along the geometric path ``log pi_beta = (1 - beta) log q + beta log p`` from a
    base q (the prior, the user's guide, or a fitted Gaussian) to the model's joint density, in the
    unconstrained space of its latents. A pilot, which is a short run before, chooses betas, step
    sizes and scales. They are not changed afterwards, so that each chain's weight w has
    ``E[w] = p(x)`` exactly. Plates that enclose every site of model and guide are batch
    dimensions: each of their elements has chains, weights and a bound of its own.

    Source: Neal (2001), *Annealed importance sampling*; Brekelmans et al. (2022) for the
    multi-sample bounds; Grosse et al. (2015) for the sandwich.

    Args:
        model: Pyro model with its observations.
        guide: Pyro guide, ``"auto"`` to fit a Gaussian first, or None to start from the prior.
        num_chains: Number K of chains.
        num_steps: Number T of weight increments; T = 1 is importance sampling (IWAE). The default
            is 1000.
        target_gap: Error in nats to reach, instead of ``num_steps``. Rounds of doubled (or
            quadrupled) T, each with the schedule, step sizes and scales that the rounds before it
            measured, go on until the measured error is at the target and nothing says that it is
            not to be believed: chains that lag, a low effective sample size, or two rounds that
            differ. The error is the standard error of ``log_evidence`` (over a batch the root mean
            square), and the gap of a sandwich, per datum. Several simulated data sets or batches
            take the T of the first. The last round is the result, whose ``rounds`` are all of them.
            ``interval`` takes into account that the decision to stop saw the result.
        max_rounds: Largest number of rounds; T ends at ``2 ** (max_rounds - 1)`` times that of the
            first, which is 16 to 64. Where :meth:`run` measures that errors of chains do not fall
            with T, as between modes, the number of chains grows in place of T. ``"auto"``, which
            ``log_evidence`` passes, is 13, or fewer where a round would take more operations,
            counted from the recorded graph, than about half a minute (8 without a graph).
        schedule: ``"adaptive"`` (equal thermodynamic length, from the pilot), a schedule such as
            ``Linear()``, or a tensor of betas of shape ``[T + 1]`` from 0 to 1.
        kernel: Transition kernel.
        batch_plates: ``"auto"``, or names of plates to treat as batch; ``[]`` for one evidence.
        step_size: Fixed step size at all betas instead of the pilot's, with unit scales.
        pilot: Settings of the pilot.
        resampling: Whether chains form populations (sequential Monte Carlo), in which chains of
            small weight give way to copies of others at points of the path that are chosen before
            the run. For upper bounds each population holds one path from the exact posterior
            sample. True, False, or ``"auto"``: where the pilot expects log-weights to vary by more
            than one squared nat.
        prior_weight: Weight of the prior in the mixture of prior and guide that chains start
            from, in [0, 1). A share of the chains then starts from the prior and may find modes
            that the guide misses.
        cross_check: What :meth:`run` compares a guide with. ``"auto"`` sends a few tempered
            particles down from the prior where the guide was fitted, and warns if they end in
            modes that it misses; beside ``guide=None`` it looks for narrow phases that no chain
            entered; True also starts as many chains from the prior, or beside
            ``guide=None`` from a fit, and says so if they find more evidence (double the cost);
            False compares with nothing.
        compile: ``"auto"`` makes native code of the densities of a small model, and of the annealing
            loop from a few hundred steps on; evaluations of a large one are compiled by torch where
            counts of them and of operations say that this repays the four seconds that it takes.
            True compiles the loop, or the density where the loop cannot be; ``"density"`` the
            density alone; False nothing.
        progress_bar: Whether to show progress.
        seed: Seed of the run, which then leaves the global generators as they were; None draws one
            from torch's global generator.
        make_args: Rule ``observed -> (args, kwargs)`` for the guide on simulated data, where the
            argument that holds the data is ambiguous.
        chain_batch_size: Chains that run at once, so that any K fits in memory: chains run in
            blocks of this size, each with random streams of its own, one after another or on
            several processes of torch.distributed. None for blocks of 4096.
        checkpoint: File to keep progress in. A call that was killed goes on where the file ends,
            to bitwise the same numbers; one that finished returns them again. Each method has a
            place of its own in the file.
        checkpoint_every: Steps of a process's chains between writes, counted in whole chunks of
            100; None writes every 30 seconds. It does not change any number.

    Raises:
        ValueError: If a number is out of range or an option unknown.

    Example:
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> ais = AnnealedImportance(model, num_steps=100, progress_bar=False, seed=0)
        >>> evidence = ais.run(torch.tensor(2.0))
        >>> bool((evidence.lower + 2.2655).abs() < 0.1)  # log N(2; 0, sqrt 2) = -2.2655
        True
    """

    def run(self, *args: object, **kwargs: object) -> AnnealedRun:
        """Runs K forward chains and returns a lower bound on log p(x) per datum.

        Args:
            *args: Arguments of model and guide, passed unchanged.
            **kwargs: Likewise.

        Returns:
            The run, with ``lower`` in nats, log-weights, diagnostics and posterior samples.

        Raises:
            ValueError: If model, guide or data do not allow it; the message names the site.
        """
        arguments, began = (args, kwargs), time.perf_counter()
        try:
            return self._run(arguments)
        except NothingToAnneal as error:
            layout = error.layout
        run = exact_run(self.model, arguments, layout, num_chains=self.plan.num_chains)
        return replace(run, provenance=record_call(self, "run", began, {}, run))

    def _run(self, arguments: Arguments) -> AnnealedRun:
        began = time.perf_counter()
        with self._journal("run", arguments, cross_check=self.cross_check) as journal:
            frozen = freeze(self, self.model, arguments, arguments, journal, seed=journal.seed)

            def anneal(frozen: Frozen, suffix: str) -> Done:
                return run_forward(frozen, journal, stream=f"forward{suffix}")

            frozen, done = in_rounds(frozen, anneal, task="run")
            run = done.runs[0]
            found = diagnostics.diagnose(run)
            if self.cross_check:
                found = (*found, *self._scout(frozen, run, journal))
            if self.cross_check is True:
                found = (*found, *self._compare_starts(run, arguments, journal))
        diagnostics.warn(found)
        provenance = record_call(self, "run", began, journal.seconds, run)
        return replace(run, diagnostics=found, provenance=provenance)

    def run_reverse(
        self,
        posterior_samples: Mapping[str, Tensor] | HoldsDraws,
        *args: object,
        exact: bool = False,
        **kwargs: object,
    ) -> AnnealedRun:
        """Runs reverse chains from K independent posterior samples: the IR upper bound.

        Args:
            posterior_samples: Values of every latent site, ``[K, *value_shape]``, or an object
                whose ``get_samples()`` returns them, as ``pyro.infer.MCMC`` after its run.
            *args: Arguments of model and guide, passed unchanged.
            exact: Whether the samples are exact draws from p(z | x); only then is the bound
                certified.
            **kwargs: Arguments of model and guide.

        Returns:
            The reverse run; ``upper`` is its bound.

        Raises:
            ValueError: If a latent site has no samples, or some outside its support.
        """
        arguments, began = (args, kwargs), time.perf_counter()
        if isinstance(posterior_samples, HoldsDraws):
            posterior_samples = posterior_samples.get_samples()
        options = {"exact": exact, "posterior_samples": posterior_samples}
        with self._journal("run_reverse", arguments, **options) as journal:
            frozen = freeze(self, self.model, arguments, arguments, journal, seed=journal.seed)
            position = pack_samples(frozen.problem, posterior_samples)

            def anneal(frozen: Frozen, suffix: str) -> Done:
                stream = f"reverse{suffix}"
                return run_back(frozen, position, journal, stream=stream, certified=exact)

            _, done = in_rounds(frozen, anneal, task="run_reverse")
            run = done.runs[0]
        found = diagnostics.diagnose(run)
        diagnostics.warn(found)
        provenance = record_call(self, "run_reverse", began, journal.seconds, run)
        return replace(run, diagnostics=found, provenance=provenance)

    def sandwich(
        self,
        *args: object,
        num_simulations: int = 1,
        bounds: tuple[str, str] = ("IM lower", "CR upper"),
        keep_samples: bool | None = None,
        **kwargs: object,
    ) -> Sandwich:
        """Bounds log p(x) from both sides, on data SIMULATED from the model in x's shape.

        Exact pairs (z, x) are drawn from the model; forward chains then give lower bounds, and
        reverse chains from z upper bounds. The guide sees the simulated x. Pilot and automatic
        guide may see x, never z.

        Args:
            *args: Arguments of model and guide; the model gets them unchanged.
            num_simulations: Number S of simulated data sets.
            bounds: The lower bound (``"IM lower"``, ``"CR lower"``, ``"single lower"``) and the
                upper one (``"IM upper"``, ``"CR upper"``, ``"single upper"``) to report as
                ``lower`` and ``upper``. The CR lower bound costs K - 1 more reverse chains; all
                others are always among the result's ``bounds``.
            keep_samples: Whether to keep posterior samples and simulated data. By default only of
                a single data set: of several, K log-weights per pair and direction remain, so that
                memory does not grow with the size of latents and data times S.
            **kwargs: Arguments of model and guide.

        Returns:
            Lower and upper bounds in nats, ``[*batch]``, or ``[S, *batch]`` for S > 1.

        Raises:
            ValueError: If pairs simulated from the model are not exact, or the guide's data
                argument is ambiguous.
        """
        return self._sandwich("sandwich", (args, kwargs), num_simulations, bounds, keep_samples)[0]

    def mutual_information(
        self,
        *args: object,
        num_simulations: int | None = None,
        target_std_error: float | None = None,
        max_simulations: int = 10_000,
        bounds: tuple[str, str] = ("IM lower", "CR upper"),
        control_variates: bool | Literal["simulated"] = True,
        **kwargs: object,
    ) -> MutualInformation:
        r"""Bounds the mutual information between the model's observed and latent sites.

        .. math:: I = E[\log p(x | z)] - E[\log p(x)]

        over pairs simulated from the model: one per batch element and simulation. Data sets are
        simulated and annealed one after another, and only log-weights of each are kept, so any
        number of them fits in memory. Discrete sites that are enumerated are summed out; latents
        are the other sites.

        Source: Brekelmans et al. (2022), section 3.

        Args:
            *args: Arguments of model and guide, as for :meth:`sandwich`.
            num_simulations: Number of simulated data sets. By default as many as give 20 pairs,
                so that an interval over pairs means something; with ``target_std_error`` that of
                the first round.
            target_std_error: Standard error over pairs to reach on both sides, in nats: data sets
                are then simulated in rounds, as many as the measured error asks for
                (:class:`pyro_anneal.results.rounds.PairRounds`).
            max_simulations: Data sets at which to give up on ``target_std_error``, with a warning.
            bounds: Bounds on log p(x) to use, as for :meth:`sandwich`.
            control_variates: Whether log densities of sites whose entropies are known serve as
                control variates, from 50 pairs on. Their coefficients are left-one-out, so bounds
                stay bounds in expectation. ``"simulated"`` adds log p(x|z) and a Gaussian log q(x),
                centred by 32 fresh simulations for each data set.
            **kwargs: Arguments of model and guide.

        Returns:
            Lower and upper bounds in nats, with standard errors over pairs.

        Raises:
            ValueError: As :meth:`sandwich`; or if ``target_std_error`` is not positive.
        """
        if control_variates not in (True, False, "simulated"):
            raise ValueError(
                f'control_variates must be True, False or "simulated", got {control_variates!r}'
            )
        most = as_count("max_simulations", max_simulations)
        first = 1 if num_simulations is None else as_count("num_simulations", num_simulations)

        made: list[SimulatedControls] = []

        def measure(pairs: PairSum, sandwich: Sandwich) -> MutualInformation:
            controls = pairs.all_controls() if control_variates else None
            if control_variates == "simulated":
                run = sandwich.forward
                plates = dict(list(run.plates.items())[pairs.count > 1 :])  # without simulations
                made[:] = made or [
                    SimulatedControls(self.model, (args, kwargs), plates, run.seed or 0)
                ]
                more = made[0].of(pairs.count)
                more = more[:, 0] if pairs.count == 1 else more
                controls = more if controls is None else torch.cat([controls.to(more), more])
            notes = sandwich.forward.notes
            return MutualInformation.from_sandwich(sandwich, notes=notes, controls=controls)

        def rounds(pairs: PairSum) -> PairRounds:
            size = max(1, pairs.log_likelihood[0].numel())
            least = FEW_PAIRS if num_simulations is None else 1
            return PairRounds(target_std_error, least, max(size * most, least))

        def more(pairs: PairSum) -> int:
            size = max(1, pairs.log_likelihood[0].numel())
            return -(-rounds(pairs).after(measure(pairs, pairs.sandwich(bounds))) // size)

        PairRounds(target_std_error)  # checks it
        ask = more if num_simulations is None or target_std_error is not None else None
        options = {"target_std_error": target_std_error, "max_simulations": most}
        sandwich, pairs = self._sandwich(
            "mutual_information",
            (args, kwargs),
            first,
            bounds,
            keep_samples=False,
            more=ask,
            options={"rounds": num_simulations is None, **options},
        )
        result = measure(pairs, sandwich)
        missed = rounds(pairs).missed(result)
        diagnostics.warn(missed)
        return replace(result, diagnostics=(*result.diagnostics, *missed))

    def run_batches(
        self,
        batches: Iterable[object],
        *,
        arguments: Callable[[object], Arguments] = as_arguments,
        on_batch: Callable[[int, AnnealedRun], object] | None = None,
    ) -> EvidenceOfBatches:
        """Runs forward chains on one batch of data after another, and keeps numbers per datum.

        Each batch is a run of its own, with its own pilot. A few numbers per datum are kept of it,
        so a DataLoader of any length will do. With a checkpoint, finished batches are not run
        again. Under torch.distributed ranks take turns with whole batches, so pass the same loader
        to each: results do not depend on their number.

        Args:
            batches: A DataLoader, or any iterable that gives the same batches at every start.
            arguments: Turns a batch into ``(args, kwargs)`` of model and guide. By default a tuple
                or list holds positional arguments, a mapping those by name, all else is the only
                argument.
            on_batch: Called with the index of a batch and its run, posterior samples included, on
                the rank that ran it, once.

        Returns:
            Lower bounds per datum, and on the evidence of all data, in nats.

        Raises:
            ValueError: As :meth:`run`; or if there is no batch, or batches are not those of the
                checkpoint or of the other ranks.

        Example:
            >>> def model(x):
            ...     with pyro.plate("data", len(x)):
            ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
            ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            >>> ais = AnnealedImportance(model, num_steps=50, progress_bar=False, seed=0)
            >>> loader = torch.utils.data.DataLoader(torch.zeros(6), batch_size=4)
            >>> evidence = ais.run_batches(loader)
            >>> evidence.batch_sizes
            (4, 2)
            >>> bool((evidence.total / 6 + 1.2655).abs() < 0.1)  # log N(0; 0, sqrt 2) = -1.2655
            True
        """
        began = time.perf_counter()
        with self._journal("run_batches") as journal:
            result = run_batches(self, batches, journal, arguments, on_batch)
        diagnostics.warn(result.diagnostics)
        provenance = record_batches(self, began, journal.seconds, result)
        return replace(result, provenance=provenance)

    def thermodynamic_curve(self, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Estimates E_beta[log p/q] along the path, whose integral is the log evidence.

        Args:
            *args: Arguments of model and guide.
            **kwargs: Likewise.

        Returns:
            Betas ``[T]`` at which the chains were, and the mean log ratio there in nats per datum.
        """
        run = self.run(*args, **kwargs)
        return run.betas[:-1], run.mean_log_ratio

    def _scout(
        self, frozen: Frozen, run: AnnealedRun, journal: Journal
    ) -> tuple[diagnostics.Diagnostic, ...]:
        """Sends particles down from the prior where the guide was fitted; else looks for phases."""
        if frozen.problem.from_prior is None:
            found = find_overlooked(frozen, run, journal)
        else:
            found = scout_run(frozen.problem, run, frozen.path.kernel, frozen.seed, journal)
        return () if found is None else (found,)

    def _compare_starts(
        self, run: AnnealedRun, arguments: Arguments, journal: Journal
    ) -> tuple[diagnostics.Diagnostic, ...]:
        """Runs the same chains from the prior, or from a fit, and compares what both found."""
        names = ("the guide", "the prior") if self.guide is not None else ("the prior", "a fit")
        settings = replace(self, guide=None if self.guide is not None else "auto")
        prefix = f"from {names[1]}/"
        frozen = freeze(
            settings, self.model, arguments, arguments, journal, prefix, seed=journal.seed
        )

        def anneal(frozen: Frozen, suffix: str) -> Done:
            stream = f"forward from {names[1]}{suffix}"
            return run_forward(frozen, journal, prefix, stream=stream, keep_samples=False)

        _, done = in_rounds(frozen, anneal, task=f"run from {names[1]}")
        found = diagnostics.diagnose_starts(run, done.runs[0], names=names)
        return () if found is None else (found,)

    def _sandwich(
        self,
        task: str,
        arguments: Arguments,
        num_simulations: int,
        bounds: tuple[str, str],
        keep_samples: bool | None,
        more: Callable[[PairSum], int] | None = None,
        options: Mapping[str, object] | None = None,
    ) -> tuple[Sandwich, PairSum]:
        began = time.perf_counter()
        num_simulations = as_count("num_simulations", num_simulations)
        check_names(bounds)
        coupled = "CR lower" in bounds
        keep_samples = num_simulations == 1 if keep_samples is None else keep_samples
        given: dict[str, object] = {
            "num_simulations": num_simulations,
            "keep_samples": keep_samples,
        }
        given |= options or {}
        with self._journal(task, arguments, **given, coupled=coupled) as journal:
            pairs = simulate_pairs(
                self,
                arguments,
                journal,
                num_simulations=num_simulations,
                coupled=coupled,
                keep_samples=keep_samples,
                more=more,
            )
        result = pairs.sandwich(bounds)
        found = diagnostics.diagnose_sandwich(result)
        diagnostics.warn(found)
        runs = (result.forward, result.reverse)
        provenance = record_call(self, task, began, journal.seconds, *runs)
        return replace(result, diagnostics=found, provenance=provenance), pairs

    @contextlib.contextmanager
    def _journal(
        self, task: str, arguments: Arguments = ((), {}), **options: object
    ) -> Iterator[Journal]:
        """Opens the journal of a call, which depends on settings, arguments and options.

        Inside, all stages share one progress bar.
        """

        def identity() -> dict[str, str]:
            strict = self.checkpoint is not None
            given: dict[str, str] = {}
            for name, value in options.items():
                by_site = value if isinstance(value, Mapping) else {}
                parts = {f'{name}["{site}"]': part for site, part in by_site.items()}
                for what, part in (parts or {name: value}).items():
                    given[what] = described(what, part, strict=strict)
            ours = self.describe(strict=strict)
            return ours | describe_arguments(arguments, strict=strict) | given

        path = None if self.checkpoint is None else Path(self.checkpoint)
        every = self.checkpoint_every
        stages = _STAGES[task] if options.get("num_simulations", 1) == 1 else {"simulations": 1.0}
        with keep_journal(task, identity, path=path, every=every, seed=self.seed) as journal:
            visible = self.progress_bar and journal.is_first
            with follow_call(task, stages, visible, journal.seconds):
                try:
                    yield journal
                except KeyboardInterrupt:
                    if path is not None and journal.is_first:
                        print(
                            f"pyro_anneal was interrupted: saving its progress in {path}; the same "
                            "call goes on from there",
                            file=sys.stderr,
                        )
                    raise


def log_evidence(
    model: Fn,
    *args: object,
    guide: Guide = "auto",
    num_chains: int = 32,
    num_steps: int | None = None,
    target_gap: float | None = None,
    seed: int | None = None,
    progress_bar: bool = True,
    **kwargs: object,
) -> AnnealedRun:
    """Bounds the log evidence of a model in one call.

    A Gaussian is fitted to the posterior in unconstrained space (``guide="auto"``) and K = 32
    chains are annealed from it to the model, in rounds of more and more steps T until the measured
    standard error is at most 0.02 nats; the first has 16 to 64 steps, the last at most 4096 times
    as many and, unless a target is given, not more operations than about half a minute.

    Args:
        model: Pyro model with its observations.
        *args: Arguments of the model.
        guide: ``"auto"``, a Pyro guide, or None to start from the prior.
        num_chains: Number K of chains.
        num_steps: Number T of steps, fixed; None for rounds.
        target_gap: Standard error in nats that rounds go on to reach; 0.02 if neither this nor
            ``num_steps`` is given. See :class:`AnnealedImportance`.
        seed: Seed of the call, which then leaves the global generators as they were.
        progress_bar: Whether to show progress.
        **kwargs: All other keywords are arguments of the model.

    Returns:
        The run; ``lower`` is the bound in nats, per datum where plates allow it.

    Raises:
        ValueError: As :meth:`AnnealedImportance.run`; or if the model has a parameter of the name of
            an option.

    Example:
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> evidence = log_evidence(model, torch.tensor(2.0), seed=0, progress_bar=False)
        >>> bool((evidence.lower + 2.265512).abs() < 1e-3)  # the fit is exact here
        True
    """
    is_default = num_steps is None and target_gap is None
    if is_default:
        target_gap = _TARGET
    options: dict[str, Any] = {
        "guide": guide,
        "num_chains": num_chains,
        "num_steps": num_steps,
        "target_gap": target_gap,
        "seed": seed,
        "progress_bar": progress_bar,
    }
    remedy = (
        'call AnnealedImportance(model, guide="auto", num_chains=32).run(*args, **kwargs), which '
        "hands all arguments to the model"
    )
    check_reserved("log_evidence", model, args, options, remedy=remedy)
    rounds: dict[str, Any] = {"max_rounds": "auto" if is_default else _MOST_ROUNDS}
    return AnnealedImportance(model, **options, **rounds).run(*args, **kwargs)
