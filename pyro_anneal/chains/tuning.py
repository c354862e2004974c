"""The tuner: what path a run takes, how long, and with which step sizes.

Whoever anneals (:class:`~pyro_anneal.AnnealedImportance`, bounds on mutual information, a loss) hands
it densities and a plan, and gets a frozen path back. It sees draws of the base, never a posterior
sample.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import Density, Kernel, State
from ..persistence.randomness import seeded_generator
from ..results.run import PilotSummary
from .budget import (
    expected_gap,
    mean_correlation,
    steps_within,
    weight_variance,
)
from .fluctuations import Pieces
from .path import Path, TuningTable
from .pilot import Pilot, PilotOutcome, adaptive_betas, run_pilot
from .plan import Plan
from .rounds import first_steps

__all__ = ["Found", "Once", "Particles", "Tuned", "choose_kernel", "lay_path", "tune"]

Stage = dict[str, Any]  # tensors and plain values, so that it can be kept
# Computes a stage of this name, or returns what it gave before.
Once = Callable[[str, Callable[[], Stage]], Stage]


def _computed(name: str, compute: Callable[[], Stage]) -> Stage:
    return compute()


class Tuned(NamedTuple):
    """What the tuner decided."""

    path: Path
    summary: PilotSummary | None  # None where nothing was left to tune
    found: Found | None  # likewise


class Laid(NamedTuple):
    """A path through what a pilot found."""

    path: Path
    summary: PilotSummary
    found: Found


class Found(NamedTuple):
    """What a pilot found, for rounds to improve on."""

    outcome: PilotOutcome
    seconds: float
    plan: Plan  # with the kernel that was chosen, and with the target of rounds still to come


@dataclass(frozen=True, eq=False)
class Particles:
    """What a pilot walks with.

    Args:
        density: Evaluates base and target of any number of particles.
        draw: Draws positions ``[M, *batch, D]`` from the base.
        example: Position of one chain, ``[*batch, D]``; only its kind counts.
        seed: Seed of the pilot.
        check: Called with the state at the start; raises where no pilot can begin.
        progress: Called with the beta reached after each stage.
    """

    density: Density
    draw: Callable[[int], Tensor]
    example: Tensor
    seed: int
    check: Callable[[State], object] = lambda state: None
    progress: Callable[[float], object] = lambda beta: None

    def walk(self, kernel: Kernel, settings: Pilot, num_chains: int) -> Stage:
        """Runs the pilot of a run of ``num_chains`` chains; its outcome as a stage."""
        began = time.perf_counter()
        with torch.no_grad():
            state = self.density(self.draw(settings.chains_for(num_chains)))
            self.check(state)
            outcome = run_pilot(
                self.density,
                kernel,
                state,
                seeded_generator(self.example.device, self.seed, "pilot"),
                settings=settings,
                progress=self.progress,
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


def tune(
    particles: Particles,
    plan: Plan,
    *,
    num_steps: int | None = None,
    once: Once = _computed,
) -> Tuned:
    """Chooses the path of a run and freezes it, by a pilot where anything is left open.

    Args:
        particles: What the pilot walks with.
        plan: What was asked for. With a target the path is that of the first round.
        num_steps: Number of steps that another problem's rounds have reached for this one.
        once: Keeps the stage ``"pilot"``, so that another process need not compute it again.

    Returns:
        The path, what the pilot found and what it cost.
    """
    example = particles.example
    if num_steps is not None:
        plan = plan.with_steps(num_steps)
    fixed = _fixed_table(plan, example)
    if plan.betas is not None and (fixed is not None or len(plan.betas) == 2):
        fixed = fixed or TuningTable.constant(1.0, example, plan.kernel)
        return Tuned(Path(plan.betas, plan.kernel, fixed), None, None)
    kept = once("pilot", lambda: particles.walk(plan.kernel, plan.pilot, plan.num_chains))
    found = Found(_outcome(kept, example), kept["seconds"], plan)
    if plan.target_gap is not None:
        plan = plan.with_steps(first_steps(sum(found.outcome.pieces.lengths), plan.fewest_steps))
    return Tuned(*lay_path(found, plan, example))


def lay_path(found: Found, plan: Plan, example: Tensor) -> Laid:
    """Lays a path of the plan's number of steps through what a pilot found.

    Args:
        found: Of a pilot, or of rounds after it.
        plan: Its number of steps, betas and step size count.
        example: Position of one chain, ``[*batch, D]``.

    Returns:
        The path, and what to expect of it.
    """
    outcome = found.outcome
    if plan.betas is None:
        shares = _shares(outcome.pieces, outcome.tuning.betas, outcome.lengths)
        steps = [plan.num_steps * share for share in shares]
        betas = adaptive_betas(outcome, plan.num_steps)
    else:
        betas = plan.betas
        steps = steps_within(outcome.pieces.betas, betas.tolist(), range(len(betas)))
    path = Path(betas, plan.kernel, _fixed_table(plan, example) or outcome.tuning)
    return Laid(path, _summarize(outcome, found.seconds, steps, plan.num_chains), found)


def _fixed_table(plan: Plan, example: Tensor) -> TuningTable | None:
    if plan.step_size is None:
        return None
    return TuningTable.constant(plan.step_size, example, plan.kernel)


def choose_kernel(particles: Particles, plan: Plan, *, once: Once = _computed) -> Plan:
    """Chooses the kernel whose pilot promises the least variance for its gradients.

    Args:
        particles: What the pilots walk with, one pilot for each kernel of the plan.
        plan: What was asked for.
        once: Keeps the stage ``"kernel"``.

    Returns:
        The plan with one kernel; the first where no pilot is wanted.
    """
    if len(plan.kernels) == 1 or plan.num_steps == 1 or plan.step_size is not None:
        return replace(plan, kernels=plan.kernels[:1])

    def compare() -> Stage:
        variances = []
        for kernel in plan.kernels:
            found = particles.walk(kernel, plan.pilot, plan.num_chains)
            pieces = Pieces(*found["pieces"])
            shares = _shares(pieces, found["betas"], found["lengths"])
            steps = [plan.num_steps / kernel.num_gradients * share for share in shares]
            variances.append(weight_variance(pieces.lengths, pieces.correlations, steps))
        return {"index": min(range(len(variances)), key=variances.__getitem__)}

    return replace(plan, kernels=(plan.kernels[once("kernel", compare)["index"]],))


def _outcome(kept: Mapping[str, Any], example: Tensor) -> PilotOutcome:
    """Restores what a pilot found, on the device of the chains."""
    tables = {key: kept[key].to(example) for key in ("log_step_size", "log_scale")}
    return PilotOutcome(
        tuning=TuningTable(tuple(kept["betas"]), **tables),
        lengths=kept["lengths"],
        accept_prob=kept["accept_prob"],
        ess_fraction=kept["ess_fraction"],
        num_gradients=kept["num_gradients"],
        num_chains=kept["num_chains"],
        position=example[None, ..., :0],
        log_evidence=torch.full_like(example[..., 0], torch.nan, dtype=torch.float64),
        pieces=Pieces(*kept["pieces"]),
    )


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
