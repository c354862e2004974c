"""The inference object: wires model, base, pilot, chains and bounds together."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from . import diagnostics
from .autoguides import sees_arguments
from .chains import (
    Carry,
    Direction,
    Path,
    StepStatistics,
    TuningTable,
    run_chains,
    seeded_generator,
)
from .chunk_program import LoopedDensity, loop_problem, repays_compilation
from .information import MutualInformation
from .kernels import HMC, Kernel, State
from .pairs import Pair, merge_pairs
from .pilot import Pilot, PilotOutcome, adaptive_betas, run_pilot
from .problem import Guide, Problem, prepare
from .results import AnnealedRun, PilotSummary, Sandwich
from .schedules import Schedule, as_betas
from .simulation import Arguments, MakeArgs, guide_arguments, simulate

__all__ = ["AnnealedImportance", "log_evidence"]


@dataclass(frozen=True, eq=False)
class _Frozen:
    """A problem and the path that its pilot froze."""

    problem: Problem
    path: Path
    pilot: PilotSummary | None
    seed: int
    setup_seconds: float


class AnnealedImportance:
    r"""Annealed importance sampling for any Pyro model and guide.

    K chains move along the geometric path ``log pi_beta = (1 - beta) log q + beta log p`` from a
    base q (the prior, the user's guide, or a fitted Gaussian) to the model's joint density, in the
    unconstrained space of its latents. A pilot chooses betas, step sizes and scales and freezes
    them, so that ``E[w] = p(x)`` holds exactly. Plates that enclose every site of model and guide
    are batch dimensions, with a bound per element.

    Source: Neal (2001), *Annealed importance sampling*; Brekelmans et al. (2022) for the
    multi-sample bounds; Grosse et al. (2015) for the sandwich.

    Args:
        model: Pyro model with its observations.
        guide: Pyro guide, ``"auto"`` to fit a Gaussian first, or None to start from the prior.
        num_chains: Number K of chains.
        num_steps: Number T of weight increments; T = 1 is importance sampling (IWAE).
        schedule: ``"adaptive"`` (equal thermodynamic length, from the pilot), a schedule such as
            ``Linear()``, or a tensor of betas of shape ``[T + 1]`` from 0 to 1.
        kernel: Transition kernel.
        batch_plates: ``"auto"``, or names of plates to treat as batch; ``[]`` for one evidence.
        step_size: Fixed step size at all betas instead of the pilot's, with unit scales.
        pilot: Settings of the pilot.
        prior_weight: Weight of the prior mixed into the guide, in [0, 1): a defensive start, for
            modes that a fitted guide may miss.
        cross_check: Whether :meth:`run` also starts as many chains from the prior, and says so if
            they find more evidence. Doubles the cost; nothing to do where ``guide`` is None.
        compile: ``"auto"`` compiles the annealing loop when counts of steps and operations say
            that this repays the ten seconds or more that it takes, or the density alone where the
            loop cannot be compiled; True compiles the loop (else the density), ``"density"`` the
            density alone, False nothing.
        progress_bar: Whether to show progress.
        seed: Seed of the run, which then leaves the global generators as they were; None draws one
            from torch's global generator.
        make_args: Rule ``observed -> (args, kwargs)`` for the guide on simulated data, where the
            argument that holds the data is ambiguous.

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

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Guide = None,
        *,
        num_chains: int = 16,
        num_steps: int = 1000,
        schedule: str | Schedule | Tensor = "adaptive",
        kernel: Kernel | None = None,
        batch_plates: str | Sequence[str] = "auto",
        step_size: float | Tensor | None = None,
        pilot: Pilot | None = None,
        prior_weight: float = 0.0,
        cross_check: bool = False,
        compile: bool | str = "auto",
        progress_bar: bool = True,
        seed: int | None = None,
        make_args: MakeArgs | None = None,
    ) -> None:
        if num_chains < 1:
            raise ValueError(f"num_chains (K) must be at least 1, got {num_chains}")
        if num_steps < 1:
            raise ValueError(f"num_steps (T) must be at least 1, got {num_steps}")
        if isinstance(schedule, str) and schedule != "adaptive":
            raise ValueError(f'schedule must be "adaptive", a schedule or betas, got {schedule!r}')
        if not 0.0 <= prior_weight < 1.0:
            raise ValueError(f"prior_weight must lie in [0, 1), got {prior_weight}")
        if compile not in ("auto", "density", True, False):
            raise ValueError(f'compile must be "auto", "density", True or False, got {compile!r}')
        if isinstance(schedule, Tensor):
            num_steps = len(schedule) - 1
        self.model = model
        self.guide = guide
        self.num_chains = num_chains
        self.num_steps = num_steps
        self.kernel = HMC() if kernel is None else kernel
        self.batch_plates = batch_plates
        self.step_size = step_size
        self.pilot = Pilot() if pilot is None else pilot
        self.prior_weight = prior_weight
        self.cross_check = cross_check
        self.compile = compile
        self.progress_bar = progress_bar
        self.seed = seed
        self.make_args = make_args
        self._betas = None if isinstance(schedule, str) else as_betas(schedule, num_steps)

    def run(self, *args: Any, **kwargs: Any) -> AnnealedRun:
        """Runs K forward chains and returns a lower bound on log p(x) per datum.

        Args:
            *args: Arguments of model and guide, passed unchanged.
            **kwargs: Likewise.

        Returns:
            The run: ``lower`` in nats, log-weights, diagnostics, posterior samples.

        Raises:
            ValueError: If model, guide or data do not allow it; the message names the site.
        """
        arguments = (args, kwargs)
        with _own_randomness(self.seed) as seed:
            frozen = self._freeze(self.model, arguments, arguments, seed)
            run, _ = self._forward(frozen)
            found = diagnostics.diagnose(run)
            if self.cross_check and self.guide is not None:
                found = (*found, *self._compare_with_prior(run, arguments, seed))
        diagnostics.warn(found)
        return replace(run, diagnostics=found)

    def run_reverse(
        self,
        posterior_samples: Mapping[str, Tensor],
        *args: Any,
        exact: bool = False,
        **kwargs: Any,
    ) -> AnnealedRun:
        """Runs reverse chains from K independent posterior samples: the IR upper bound.

        Args:
            posterior_samples: Values of every latent site, ``[K, *value_shape]``.
            *args: Arguments of model and guide, passed unchanged.
            exact: Whether the samples are exact draws from p(z | x); only then is the bound
                certified.
            **kwargs: Arguments of model and guide.

        Returns:
            The reverse run; ``upper`` is its bound.

        Raises:
            ValueError: If a latent site has no samples, or some outside its support.
        """
        arguments = (args, kwargs)
        with _own_randomness(self.seed) as seed:
            frozen = self._freeze(self.model, arguments, arguments, seed)
            position = _pack_samples(frozen.problem, posterior_samples)
            run, _ = self._reverse(frozen, position, "reverse", certified=exact)
        return _diagnosed(run)

    def sandwich(
        self,
        *args: Any,
        num_simulations: int = 1,
        bounds: tuple[str, str] = ("IM lower", "CR upper"),
        **kwargs: Any,
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
            **kwargs: Arguments of model and guide.

        Returns:
            Lower and upper bounds in nats, ``[*batch]``, or ``[S, *batch]`` for S > 1.

        Raises:
            ValueError: If pairs simulated from the model are not exact, or the guide's data
                argument is ambiguous.
        """
        if num_simulations < 1:
            raise ValueError(f"num_simulations must be at least 1, got {num_simulations}")
        coupled = "CR lower" in bounds
        with _own_randomness(self.seed) as seed:
            parts = [
                self._simulate_once((args, kwargs), seed + index, coupled)
                for index in range(num_simulations)
            ]
        result = Sandwich(**merge_pairs(parts), lower_bound=bounds[0], upper_bound=bounds[1])
        found = diagnostics.diagnose_sandwich(result)
        diagnostics.warn(found)
        return replace(result, diagnostics=found)

    def mutual_information(
        self,
        *args: Any,
        num_simulations: int = 1,
        bounds: tuple[str, str] = ("IM lower", "CR upper"),
        **kwargs: Any,
    ) -> MutualInformation:
        r"""Bounds the mutual information between the model's observed and latent sites.

        .. math:: I = E[\log p(x | z)] - E[\log p(x)]

        over pairs simulated from the model: one per batch element and simulation. Discrete sites
        that are enumerated are summed out; latents are the other sites.

        Source: Brekelmans et al. (2022), section 3.

        Args:
            *args: Arguments of model and guide, as for :meth:`sandwich`.
            num_simulations: Number of simulated data sets.
            bounds: Bounds on log p(x) to use, as for :meth:`sandwich`.
            **kwargs: Arguments of model and guide.

        Returns:
            Lower and upper bounds in nats, with standard errors over pairs.

        Raises:
            ValueError: As :meth:`sandwich`.
        """
        result = self.sandwich(*args, num_simulations=num_simulations, bounds=bounds, **kwargs)
        return MutualInformation.from_sandwich(result, notes=result.forward.notes)

    def thermodynamic_curve(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Estimates E_beta[log p/q] along the path, whose integral is the log evidence.

        Args:
            *args: Arguments of model and guide.
            **kwargs: Likewise.

        Returns:
            Betas ``[T]`` at which the chains were, and the mean log ratio there in nats per datum.
        """
        run = self.run(*args, **kwargs)
        return run.betas[:-1], run.mean_log_ratio

    def _compare_with_prior(
        self, run: AnnealedRun, arguments: Arguments, seed: int
    ) -> tuple[diagnostics.Diagnostic, ...]:
        """Runs the same chains from the prior and compares what both starts found."""
        from_prior = copy.copy(self)
        from_prior.guide = None
        frozen = from_prior._freeze(self.model, arguments, arguments, seed)
        other, _ = from_prior._forward(frozen, "forward from the prior")
        found = diagnostics.diagnose_starts(run, other)
        return () if found is None else (found,)

    def _freeze(
        self,
        model: Callable[..., Any],
        model_args: Arguments,
        guide_args: Arguments,
        seed: int,
    ) -> _Frozen:
        """Prepares the problem and runs the pilot."""
        began = time.perf_counter()
        with _bar(self.progress_bar and self.guide == "auto", "fit", 340) as bar:
            problem = prepare(
                model,
                self.guide,
                model_args,
                guide_args,
                num_chains=self.num_chains,
                batch_plates=self.batch_plates,
                compile=self.compile == "density",
                seed=seed,
                prior_weight=self.prior_weight,
                progress=bar.update,
            )
            problem = replace(problem, density=self._compiled(problem.density))
        setup_seconds = time.perf_counter() - began
        path, summary = self._run_pilot(problem, seed)
        return _Frozen(problem, path, summary, seed, setup_seconds)

    def _compiled(self, density: Any) -> Any:
        """Compiles the loop or the density, as ``compile`` and counts of operations say."""
        if self.compile in (False, "density") or self.num_steps == 1:
            return density
        problem = loop_problem(density, self.kernel)
        if self.compile == "auto" and (
            density.mode in ("eager", "graph-loop")
            or not repays_compilation(density, self.kernel, self.num_steps - 1)
        ):
            return density
        if problem is not None:
            density.compile()
        return LoopedDensity(density, problem)

    def _run_pilot(self, problem: Problem, seed: int) -> tuple[Path, PilotSummary | None]:
        betas = self._betas
        layout = problem.layout
        example = torch.zeros(
            *layout.batch_shape, layout.dim, dtype=layout.dtype, device=layout.device
        )
        fixed = None if self.step_size is None else TuningTable.constant(self.step_size, example)
        if betas is None and self.num_steps == 1:
            betas = torch.tensor([0.0, 1.0], dtype=torch.float64)
        if betas is not None and (fixed is not None or self.num_steps == 1):
            fixed = fixed or TuningTable.constant(1.0, example)
            return Path(betas, self.kernel, fixed), None
        began = time.perf_counter()
        count = self.pilot.chains_for(self.num_chains)
        with torch.no_grad(), _bar(self.progress_bar, "pilot", 1.0) as bar:
            state = problem.density(problem.draw(count))
            problem.check_start(state)
            outcome = run_pilot(
                problem.density,
                self.kernel,
                state,
                seeded_generator(layout.device, seed, "pilot"),
                settings=self.pilot,
                progress=lambda beta: bar.update(beta - bar.n),
            )
        betas = adaptive_betas(outcome, self.num_steps) if betas is None else betas
        path = Path(betas, self.kernel, fixed or outcome.tuning)
        return path, _summarize(outcome, time.perf_counter() - began)

    def _forward(self, frozen: _Frozen, stream: str = "forward") -> tuple[AnnealedRun, State]:
        began = time.perf_counter()
        problem = frozen.problem
        with torch.no_grad():
            position = problem.draw(self.num_chains)
            before = problem.density.num_evaluations
            state = problem.density(position)
            problem.check_start(state)
            problem.density.check(position[:1].nan_to_num())
        carry, statistics = self._anneal(frozen, state, "forward", stream)
        # A density that froze something, or changed under way, shows at one end or the other.
        ends = torch.cat([position[:1], carry.state.position[:1]]).nan_to_num()
        problem.density.check(ends)
        run = self._result(
            frozen, carry, statistics, "forward", time.perf_counter() - began, before
        )
        return run, carry.state

    def _reverse(
        self, frozen: _Frozen, position: Tensor, stream: str, *, certified: bool = True
    ) -> tuple[AnnealedRun, State]:
        began = time.perf_counter()
        with torch.no_grad():
            before = frozen.problem.density.num_evaluations
            state = frozen.problem.density(position)
        if bool((~state.log_ratio().isfinite()).any()):
            frozen.problem.check_start(state)
            raise ValueError(
                "some posterior samples have no density under the model or the base: check that "
                "they lie inside the supports, and that the guide covers the posterior"
            )
        carry, statistics = self._anneal(frozen, state, "reverse", stream)
        run = self._result(
            frozen, carry, statistics, "reverse", time.perf_counter() - began, before
        )
        starts = stream == "reverse" and not bool((position == position[:1]).all())
        return replace(run, certified=certified, independent_starts=starts), carry.state

    def _anneal(
        self, frozen: _Frozen, state: State, direction: Direction, stream: str
    ) -> tuple[Carry, StepStatistics]:
        total = frozen.path.num_steps
        with torch.no_grad(), _bar(self.progress_bar, stream, total) as bar:
            return run_chains(
                frozen.problem.density,
                frozen.path,
                state,
                direction=direction,
                seed=frozen.seed,
                stream=stream,
                progress=bar.update,
            )

    def _simulate_once(self, arguments: Arguments, seed: int, coupled: bool) -> Pair:
        torch.manual_seed(seed)
        simulation = simulate(self.model, arguments)
        conditioned = poutine.condition(self.model, data=simulation.observed)
        guide_args = arguments
        if sees_arguments(self.guide) or self.make_args is not None:
            guide_args = guide_arguments(arguments, simulation, self.make_args)
        frozen = self._freeze(conditioned, arguments, guide_args, seed)
        forward, end = self._forward(frozen)
        exact = frozen.problem.pack(simulation.latents)
        starts = exact.expand(self.num_chains, *exact.shape).clone()
        reverse, _ = self._reverse(frozen, starts, "reverse")
        extra = None
        if coupled and self.num_chains > 1:
            first = end.position[:1].expand(self.num_chains - 1, *exact.shape).clone()
            extra = self._reverse(frozen, first, "coupled reverse")[0].log_weights
        log_likelihood = frozen.problem.log_likelihood(exact)
        return Pair(forward, reverse, extra, simulation.observed, log_likelihood)

    def _result(
        self,
        frozen: _Frozen,
        carry: Carry,
        statistics: StepStatistics,
        direction: Direction,
        seconds: float,
        evaluations_before: int,
    ) -> AnnealedRun:
        problem, path = frozen.problem, frozen.path
        layout = problem.layout
        if direction == "reverse":
            statistics = StepStatistics(*(value.flip(0) for value in statistics))
        moves = path.betas[1:-1].tolist()
        step_size = [float(path.tuning.at(beta).step_size.log().mean().exp()) for beta in moves]
        kernel = path.kernel
        return AnnealedRun(
            direction=direction,
            log_weights=carry.log_weights,
            betas=path.betas,
            accept_prob=statistics.accept_prob,
            num_diverging=statistics.num_diverging,
            step_size=torch.tensor(step_size, dtype=torch.float64),
            mean_log_ratio=statistics.mean_log_ratio,
            var_log_ratio=statistics.var_log_ratio,
            log_evidence_ti=carry.integral,
            posterior=problem.unpack(carry.state.position),
            plates={plate.name: plate.size for plate in layout.batch},
            site_plates={site.name: site.plates for site in layout.sites},
            num_gradients=1 + kernel.num_gradients * (path.num_steps - 1),
            num_evaluations=problem.density.num_evaluations - evaluations_before,
            seconds=seconds,
            seed=frozen.seed,
            kernel=repr(kernel),
            density_mode=_density_mode(problem.density),
            pilot=frozen.pilot,
            setup_seconds=frozen.setup_seconds,
            fit_gradients=problem.fit_gradients,
            notes=(*layout.notes, *_loop_notes(problem.density)),
            scale=layout.scale,
            observed=layout.observed,
        )


def log_evidence(model: Callable[..., Any], *args: Any, **kwargs: Any) -> AnnealedRun:
    """Bounds the log evidence of a model in one call.

    A Gaussian is fitted to the posterior in unconstrained space (``guide="auto"``) and K = 16
    chains are annealed from it to the model over T = 1000 steps.

    Args:
        model: Pyro model with its observations.
        *args: Arguments of the model.
        **kwargs: Arguments of the model.

    Returns:
        The run; ``lower`` is the bound in nats, per datum where plates allow it.

    Raises:
        ValueError: As :meth:`AnnealedImportance.run`.

    Example:
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> evidence = log_evidence(model, torch.tensor(2.0))
        >>> bool((evidence.lower + 2.265512).abs() < 1e-3)  # the fit is exact here
        True
    """
    return AnnealedImportance(model, guide="auto").run(*args, **kwargs)


def _summarize(outcome: PilotOutcome, seconds: float) -> PilotSummary:
    steps = outcome.tuning.log_step_size
    return PilotSummary(
        num_chains=outcome.num_chains,
        num_gradients=outcome.num_gradients,
        betas=torch.tensor(outcome.tuning.betas, dtype=torch.float64),
        step_size=steps.reshape(len(steps), -1).mean(1).exp(),
        accept_prob=torch.tensor(outcome.accept_prob, dtype=torch.float64),
        ess_fraction=torch.tensor(outcome.ess_fraction, dtype=torch.float64),
        length=outcome.lengths[-1],
        seconds=seconds,
    )


def _density_mode(density: Any) -> str:
    if isinstance(density, LoopedDensity) and density.loop_mode is not None:
        return f"compiled {density.loop_mode}"
    return str(density.mode)


def _loop_notes(density: Any) -> tuple[str, ...]:
    if isinstance(density, LoopedDensity) and density.loop_reason is not None:
        return (f"the annealing loop could not be compiled ({density.loop_reason})",)
    return ()


def _diagnosed(run: AnnealedRun) -> AnnealedRun:
    found = diagnostics.diagnose(run)
    diagnostics.warn(found)
    return replace(run, diagnostics=found)


def _pack_samples(problem: Problem, samples: Mapping[str, Tensor]) -> Tensor:
    """Packs K posterior samples and checks that there is one of every site, inside its support."""
    missing = [site.name for site in problem.layout.sites if site.name not in samples]
    if missing:
        raise ValueError(
            f"a reverse run needs posterior samples of every latent site, missing: {missing}"
        )
    counts = set()
    for site in problem.layout.sites:
        shape = samples[site.name].shape
        if shape[1:] != site.value_shape or not shape:
            raise ValueError(
                f'posterior samples of site "{site.name}" have shape {list(shape)}, expected '
                f"[K, {', '.join(map(str, site.value_shape))}]"
            )
        counts.add(shape[0])
    if len(counts) != 1:
        raise ValueError(f"posterior samples differ in their number K: {sorted(counts)}")
    names = [site.name for site in problem.layout.sites]
    chains = []
    for k in range(counts.pop()):
        values = {name: samples[name][k] for name in names}
        problem.check_supports(values)
        chains.append(problem.pack(values))
    return torch.stack(chains)


@contextlib.contextmanager
def _own_randomness(seed: int | None) -> Iterator[int]:
    """Seeds torch inside, and leaves the global generators as they were.

    Without a seed one is drawn from torch's global generator, which moves on by that draw.
    """
    if seed is None:
        seed = int(torch.randint(2**31, ()).item())
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield seed


def _bar(visible: bool, label: str, total: float) -> Any:
    return tqdm(total=total, desc=label, disable=not visible, leave=False)
