"""One run: a problem and its pilot, frozen, then chains through it in one direction."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..chains.budget import (
    expected_gap,
    mean_correlation,
    steps_for_gap,
    steps_within,
    weight_variance,
)
from ..chains.fluctuations import Pieces
from ..chains.loop import Direction, Path, StepStatistics, TuningTable
from ..chains.pilot import Pilot, PilotOutcome, adaptive_betas, run_pilot
from ..compiled.choice import describe_mode, loop_notes, with_loop
from ..compiled.program import LoopedDensity
from ..kernels import HMC, Kernel, State
from ..models.simulation import Arguments, MakeArgs
from ..persistence.fingerprints import describe, describe_name, described, versions
from ..persistence.journal import Journal
from ..persistence.randomness import seeded_generator
from ..problems.fingerprint import describe_problem
from ..problems.problem import Guide, Problem, prepare
from ..results.digest import digest_of_data
from ..results.run import AnnealedRun, PilotSummary
from .blocks import Blockwise, Ends, anneal_blocks, split
from .continuation import Continuation

__all__ = [
    "Frozen",
    "Settings",
    "forward",
    "freeze",
    "make_problem",
    "pack_samples",
    "progress_bar",
    "reverse",
]

_LEAPFROGS = (1, 2, 4)


@dataclass(frozen=True, kw_only=True, eq=False)
class Settings:
    """What :class:`~pyro_anneal.AnnealedImportance` was told."""

    model: Callable[..., Any]
    guide: Guide
    num_chains: int
    num_steps: int
    betas: Tensor | None  # None for the pilot's
    kernel: Kernel
    batch_plates: str | Sequence[str]
    step_size: float | Tensor | None
    pilot: Pilot
    prior_weight: float
    compile: bool | str
    progress_bar: bool
    make_args: MakeArgs | None
    chain_batch_size: int | None
    target_gap: float | None = None  # nats per datum; then T, and L if it is free, are chosen
    free_leapfrogs: bool = False
    chosen: dict[str, Any] = field(default_factory=dict)  # by the first problem, for all others

    def describe(self, *, strict: bool = True) -> dict[str, str]:
        """Describes what a checkpoint must share with a run that continues it.

        Args:
            strict: Whether to refuse a kernel without a description by content.
        """
        return versions() | {
            "model": describe_name(self.model),
            "guide": describe_name(self.guide),
            "num_chains (K)": describe(self.num_chains),
            "num_steps (T)": describe(self.num_steps),
            "schedule": "adaptive" if self.betas is None else describe(self.betas),
            "kernel": described("the kernel", self.kernel, strict=strict),
            "batch_plates": str(self.batch_plates),
            "step_size": describe(self.step_size),
            "pilot": describe(self.pilot),
            "prior_weight": describe(self.prior_weight),
            "compile": describe(self.compile),
            "chain_batch_size": describe(self.chain_batch_size),
            "target_gap": describe(self.target_gap),
        }


@dataclass(frozen=True, eq=False)
class Frozen:
    """A problem and the path that its pilot froze."""

    problem: Problem
    path: Path
    pilot: PilotSummary | None
    seed: int
    setup_seconds: float


def make_problem(
    settings: Settings,
    model: Callable[..., Any],
    model_args: Arguments,
    guide_args: Arguments,
    journal: Journal,
    prefix: str,
    *,
    seed: int,
    compile: bool = False,
) -> Problem:
    """Inspects, fits and captures, and checks that the journal speaks of the same problem."""
    with progress_bar(settings.progress_bar and settings.guide == "auto", "fit", 340) as bar:
        problem = prepare(
            model,
            settings.guide,
            model_args,
            guide_args,
            num_chains=min(settings.num_chains, settings.chain_batch_size or settings.num_chains),
            batch_plates=settings.batch_plates,
            compile=compile,
            seed=seed,
            prior_weight=settings.prior_weight,
            progress=bar.update,
            max_rows=settings.chain_batch_size,
            once=lambda compute: journal.once(f"{prefix}fit", compute),
        )
    if journal.is_kept:
        journal.identify(f"{prefix}problem", describe_problem(problem))
    return problem


def freeze(
    settings: Settings,
    model: Callable[..., Any],
    model_args: Arguments,
    guide_args: Arguments,
    journal: Journal,
    prefix: str = "",
    *,
    seed: int,
) -> Frozen:
    """Prepares the problem and runs the pilot.

    Args:
        settings: Settings.
        model: The model, conditioned on its data.
        model_args: ``(args, kwargs)`` of the model.
        guide_args: ``(args, kwargs)`` of the guide.
        journal: Where stages are kept.
        prefix: Distinguishes the stages of this run from those of others.
        seed: Seed of the run.
    """
    began = time.perf_counter()
    compile = settings.compile == "density"
    problem = make_problem(
        settings, model, model_args, guide_args, journal, prefix, seed=seed, compile=compile
    )
    setup_seconds = time.perf_counter() - began
    path, summary = _path(settings, problem, journal, f"{prefix}pilot", seed)
    problem = replace(problem, density=with_loop(problem.density, path, settings.compile))
    how = {"density evaluated as": problem.density.mode}
    how["steps run by"] = _steps_run_by(problem.density)
    journal.identify(f"{prefix}mode", how)
    return Frozen(problem, path, summary, seed, setup_seconds)


def _steps_run_by(density: Any) -> str:
    if not isinstance(density, LoopedDensity):
        return "steps"
    return "a loop, unrolled" if density.unroll else "a loop"


def _path(
    settings: Settings, problem: Problem, journal: Journal, name: str, seed: int
) -> tuple[Path, PilotSummary | None]:
    betas = settings.betas
    layout = problem.layout
    example = torch.zeros(
        *layout.batch_shape, layout.dim, dtype=layout.dtype, device=layout.device
    )
    fixed = None
    if settings.step_size is not None:
        fixed = TuningTable.constant(settings.step_size, example, settings.kernel)
    if betas is None and settings.num_steps == 1:
        betas = _on_host([0.0, 1.0])
    if betas is not None and (fixed is not None or settings.num_steps == 1):
        fixed = fixed or TuningTable.constant(1.0, example, settings.kernel)
        return Path(betas, settings.kernel, fixed), None
    spent = 0
    if settings.target_gap is not None:
        if not settings.chosen:
            settings.chosen.update(
                journal.once("budget", lambda: _choose_budget(settings, problem, seed))
            )
            spent = settings.chosen["num_gradients"]
        settings = _with_budget(settings)
    kept = journal.once(name, lambda: _pilot(settings, problem, seed))
    tables = {key: kept[key].to(example) for key in ("log_step_size", "log_scale")}
    tuning = TuningTable(tuple(kept["betas"]), **tables)
    found = {key: kept[key] for key in ("lengths", "accept_prob", "ess_fraction")}
    found |= {"num_chains": kept["num_chains"], "pieces": Pieces(*kept["pieces"])}
    found["num_gradients"] = kept["num_gradients"] + spent
    outcome = PilotOutcome(tuning=tuning, position=example[None, ..., :0], **found)
    if betas is None:
        shares = _shares(outcome.pieces, outcome.tuning.betas, outcome.lengths)
        steps = [settings.num_steps * share for share in shares]
        betas = adaptive_betas(outcome, settings.num_steps)
    else:
        steps = steps_within(outcome.pieces.betas, betas.tolist(), range(len(betas)))
    path = Path(betas, settings.kernel, fixed or tuning)
    return path, _summarize(outcome, kept["seconds"], steps, settings.num_chains)


def _choose_budget(settings: Settings, problem: Problem, seed: int) -> dict[str, Any]:
    """Chooses the fewest gradients, T times L, whose expected gap is the target."""
    assert settings.target_gap is not None
    kernels = [settings.kernel]
    if settings.free_leapfrogs and isinstance(settings.kernel, HMC):
        kernels = [replace(settings.kernel, num_leapfrog=count) for count in _LEAPFROGS]
    options, spent = [], 0
    for kernel in kernels:
        found = _pilot(replace(settings, kernel=kernel), problem, seed)
        spent += found["num_gradients"]
        pieces = Pieces(*found["pieces"])
        shares = _shares(pieces, found["betas"], found["lengths"])
        steps = steps_for_gap(settings.target_gap, pieces, shares, settings.num_chains)
        options.append((steps * kernel.num_gradients, steps, kernel.num_gradients))
    _, steps, leapfrogs = min(options)
    return {"num_steps": steps, "num_leapfrog": leapfrogs, "num_gradients": spent}


def _with_budget(settings: Settings) -> Settings:
    kernel = settings.kernel
    if settings.free_leapfrogs and isinstance(kernel, HMC):
        kernel = replace(kernel, num_leapfrog=settings.chosen["num_leapfrog"])
    return replace(settings, num_steps=settings.chosen["num_steps"], kernel=kernel)


def _pilot(settings: Settings, problem: Problem, seed: int) -> dict[str, Any]:
    """Runs the pilot; its outcome as tensors and plain values."""
    began = time.perf_counter()
    count = settings.pilot.chains_for(settings.num_chains)
    density, size = problem.density, settings.chain_batch_size
    density = density if size is None else Blockwise(density, size)
    with torch.no_grad(), progress_bar(settings.progress_bar, "pilot", 1.0) as bar:
        state = density(problem.draw(count))
        problem.check_start(state)
        outcome = run_pilot(
            density,
            settings.kernel,
            state,
            seeded_generator(problem.layout.device, seed, "pilot"),
            settings=settings.pilot,
            progress=lambda beta: bar.update(beta - bar.n),
        )
    return {
        "betas": outcome.tuning.betas,
        "log_step_size": outcome.tuning.log_step_size,
        "log_scale": outcome.tuning.log_scale,
        "lengths": outcome.lengths,
        "accept_prob": outcome.accept_prob,
        "ess_fraction": outcome.ess_fraction,
        "num_gradients": outcome.num_gradients,
        "num_chains": outcome.num_chains,
        "pieces": tuple(outcome.pieces),
        "seconds": time.perf_counter() - began,
    }


def _shares(pieces: Pieces, betas: Sequence[float], lengths: Sequence[float]) -> list[float]:
    """Computes the share of an adaptive schedule's steps in each piece: that of its length."""
    clock = lengths if lengths[-1] > 0.0 else betas  # as adaptive_betas does
    return [steps / clock[-1] for steps in steps_within(pieces.betas, betas, clock)]


def _summarize(
    outcome: PilotOutcome, seconds: float, steps: Sequence[float], num_chains: int
) -> PilotSummary:
    """Summarizes the pilot, and what it says of a run with these ``steps`` in each piece."""
    log_step, pieces = outcome.tuning.log_step_size, outcome.pieces
    variance = weight_variance(pieces.lengths, pieces.correlations, steps)
    return PilotSummary(
        num_chains=outcome.num_chains,
        num_gradients=outcome.num_gradients,
        betas=_on_host(outcome.tuning.betas),
        step_size=log_step.reshape(len(log_step), -1).mean(1).exp(),
        accept_prob=_on_host(outcome.accept_prob),
        ess_fraction=_on_host(outcome.ess_fraction),
        length=sum(pieces.lengths),
        correlation=mean_correlation(pieces, [count / sum(steps) for count in steps]),
        expected_variance=variance,
        expected_gap=expected_gap(variance, num_chains),
        seconds=seconds,
    )


def _on_host(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def forward(
    settings: Settings,
    frozen: Frozen,
    journal: Journal,
    prefix: str = "",
    *,
    stream: str = "forward",
    keep_samples: bool = True,
) -> tuple[AnnealedRun, Tensor]:
    """Runs K chains from the base to the model.

    Args:
        settings: Settings.
        frozen: The problem and its path.
        journal: Where progress is kept.
        prefix: As in :func:`freeze`.
        stream: Name of the stream of noise.
        keep_samples: Whether the run keeps its chains' ends as posterior samples.

    Returns:
        The run, and the position ``[*batch, D]`` of chain 0 at its last weight.
    """
    problem = frozen.problem
    blocks = split(settings.num_chains, settings.chain_batch_size)

    def start(chains: range) -> State:
        with torch.no_grad():
            position = problem.draw(len(chains))
            state: State = problem.density(position)
        problem.check_start(state, is_all=len(blocks) == 1)
        problem.density.check(position[:1].nan_to_num())
        return state

    # A density that froze something, or changed under way, shows at one end or the other.
    check = problem.density.check
    ends = _anneal(settings, frozen, journal, prefix, blocks, start, "forward", stream, check)
    run = _result(frozen, ends, "forward", keep_samples)
    if keep_samples:
        rows = settings.chain_batch_size
        handle = Continuation(problem, frozen.path, ends.position, ends.log_weights, rows)
        run = replace(run, continuation=handle)
    return run, ends.position[0]


def reverse(
    settings: Settings,
    frozen: Frozen,
    position: Tensor,
    journal: Journal,
    prefix: str = "",
    *,
    stream: str = "reverse",
    certified: bool = True,
    keep_samples: bool = True,
) -> AnnealedRun:
    """Runs chains from posterior samples ``[K, *batch, D]`` back to the base.

    Args:
        settings: Settings.
        frozen: The problem and its path.
        position: Starting points.
        journal: Where progress is kept.
        prefix: As in :func:`freeze`.
        stream: Name of the stream of noise.
        certified: Whether the samples are exact.
        keep_samples: Whether the run keeps its chains' ends.

    Raises:
        ValueError: If a sample has no density.
    """
    problem = frozen.problem
    blocks = split(len(position), settings.chain_batch_size)

    def start(chains: range) -> State:
        with torch.no_grad():
            state: State = problem.density(position[chains.start : chains.stop].contiguous())
        if bool((~state.log_ratio().isfinite()).any()):
            problem.check_start(state, is_all=len(blocks) == 1)
            raise ValueError(
                "some posterior samples have no density under the model or the base: check that "
                "they lie inside the supports, and that the guide covers the posterior"
            )
        return state

    ends = _anneal(settings, frozen, journal, prefix, blocks, start, "reverse", stream)
    run = _result(frozen, ends, "reverse", keep_samples)
    starts = stream == "reverse" and not bool((position == position[:1]).all())
    return replace(run, certified=certified, independent_starts=starts)


def _anneal(
    settings: Settings,
    frozen: Frozen,
    journal: Journal,
    prefix: str,
    blocks: Sequence[range],
    start: Callable[[range], State],
    direction: Direction,
    stream: str,
    check: Callable[[Tensor], object] = lambda positions: None,
) -> Ends:
    own = range(journal.world.rank, len(blocks), journal.world.size)
    total = frozen.path.num_steps * len(own)
    with torch.no_grad(), progress_bar(settings.progress_bar, stream, total) as bar:
        return anneal_blocks(
            frozen.problem.density,
            frozen.path,
            blocks,
            start,
            direction=direction,
            stream=stream,
            seed=frozen.seed,
            journal=journal,
            name=f"{prefix}{stream}",
            check=check,
            progress=bar.update,
        )


def _result(frozen: Frozen, ends: Ends, direction: Direction, keep_samples: bool) -> AnnealedRun:
    problem, path = frozen.problem, frozen.path
    layout = problem.layout
    statistics = ends.statistics
    if direction == "reverse":
        statistics = StepStatistics(*(value.flip(0) for value in statistics))
    moves = path.betas[1:-1].tolist()
    step_size = [float(path.tuning.at(beta).step_size.log().mean().exp()) for beta in moves]
    return AnnealedRun(
        direction=direction,
        log_weights=ends.log_weights,
        betas=path.betas,
        accept_prob=statistics.accept_prob,
        num_diverging=statistics.num_diverging,
        step_size=_on_host(step_size),
        mean_log_ratio=statistics.mean_log_ratio,
        var_log_ratio=statistics.var_log_ratio,
        log_evidence_ti=ends.integral,
        posterior=problem.unpack(ends.position) if keep_samples else {},
        plates={plate.name: plate.size for plate in layout.batch},
        site_plates={site.name: site.plates for site in layout.model_sites},
        num_gradients=1 + path.kernel.num_gradients * (path.num_steps - 1),
        num_evaluations=ends.num_evaluations,
        seconds=ends.seconds,
        seed=frozen.seed,
        kernel=repr(path.kernel),
        target_accept=path.kernel.target_accept,
        density_mode=describe_mode(problem.density),
        pilot=frozen.pilot,
        setup_seconds=frozen.setup_seconds,
        fit_gradients=problem.fit_gradients,
        notes=(*layout.notes, *loop_notes(problem.density)),
        scale=layout.scale,
        observed=layout.observed if keep_samples else {},
        data_digest=digest_of_data(layout.observed),
    )


def pack_samples(problem: Problem, samples: Mapping[str, Tensor]) -> Tensor:
    """Packs K posterior samples and checks that there is one of every site, inside its support."""
    if not isinstance(samples, Mapping):
        raise ValueError(
            "posterior samples must be a mapping from site names to tensors [K, *value_shape], or "
            f"an object with get_samples() as Pyro's MCMC, got {type(samples).__name__}"
        )
    device = problem.layout.device
    samples = {name: torch.as_tensor(value, device=device) for name, value in samples.items()}
    sites = problem.layout.model_sites
    missing = [site.name for site in sites if site.name not in samples]
    if missing:
        raise ValueError(
            f"a reverse run needs posterior samples of every latent site, missing: {missing}"
        )
    counts = set()
    for site in sites:
        shape = samples[site.name].shape
        if shape[1:] != site.value_shape or not shape:
            grouped = len(shape) > 1 and shape[2:] == site.value_shape
            hint = "; join samples grouped by chain with value.flatten(0, 1)" if grouped else ""
            raise ValueError(
                f'posterior samples of site "{site.name}" have shape {list(shape)}, expected '
                f"[K, {', '.join(map(str, site.value_shape))}]{hint}"
            )
        counts.add(shape[0])
    if counts == {0}:
        raise ValueError("a reverse run needs K >= 1 posterior samples, got 0")
    if len(counts) != 1:
        raise ValueError(f"posterior samples differ in their number K: {sorted(counts)}")
    names = [site.name for site in sites]
    chains = []
    for k in range(counts.pop()):
        values = {name: samples[name][k] for name in names}
        problem.check_supports(values)
        chains.append(problem.pack(values))
    return torch.stack(chains)


def progress_bar(visible: bool, label: str, total: float) -> Any:
    """Makes a bar that disappears when it is done."""
    return tqdm(total=total, desc=label, disable=not visible, leave=False)
