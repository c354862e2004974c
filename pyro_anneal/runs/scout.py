"""The scout: a short tempered run from the prior that looks for modes which a fitted start missed.

Chains from a base that misses a mode have flawless weights. Particles that come down from the
prior know nothing of that base: where they end at places as dense as the run's, but where the base
has no density to speak of, or find more evidence than the run, the run missed posterior mass. The
scout may itself miss modes, and chains that got stuck prove nothing: particles at places less
dense than the run's do not count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..chains.blockwise import Blockwise
from ..chains.pilot import Pilot, run_pilot
from ..kernels import Density, Kernel, State
from ..persistence.journal import Journal
from ..persistence.randomness import seeded_generator
from ..problems.bases import FittedBase, MixtureBase
from ..problems.discrete import lattice_of
from ..problems.gaussian import follow_newton
from ..problems.mixtures import distinct
from ..problems.problem import Problem
from ..problems.rows import Rows, is_dear, rows_at_once
from ..results.findings import Diagnostic
from ..results.run import AnnealedRun
from ..results.tables import format_share

__all__ = ["Scouting", "diagnose_scouting", "scout", "scout_run"]

# What helps where the message of :func:`diagnose_scouting` appears.
_REMEDY = (
    "Posterior modes are probably missed and the evidence is too low: start from the prior with "
    "more steps (guide=None; populations are then resampled where the pilot calls for it), pass a "
    "guide that covers the modes, or compare starts (cross_check=True)"
)

# Unseen particles at which Gaussians are fitted, and dimensions up to which they are.
_MOST_FITS, _MOST_DIMENSIONS = 8, 64

# Mass that the run's own chains found in those places is known to this factor only.
_DOUBT = 1.5

SETTINGS = Pilot(num_chains=64, num_moves=4, ess_fraction=0.5, max_stages=60)


@dataclass(frozen=True, eq=False)
class Scouting:
    """Where particles from the prior ended, and the evidence that they found."""

    state: State  # at the target, with the log densities of the run's own path, [M, *batch]
    log_evidence: Tensor  # estimate of sequential Monte Carlo in nats, [*batch]
    num_gradients: int  # per particle


def scout(
    from_prior: Density,
    draw_prior: Callable[[int], Tensor],
    density: Density,
    kernel: Kernel,
    *,
    seed: int,
    settings: Pilot = SETTINGS,
) -> Scouting | None:
    """Runs the pilot's tempered particles from the prior.

    Args:
        from_prior: Density of the path from the prior.
        draw_prior: Draws M positions from the prior.
        density: Density of the run's path.
        kernel: Kernel of the run.
        seed: Seed of the run.
        settings: Settings of the scout.

    Returns:
        What it found, or None if no particle has any density under the model.
    """
    with torch.no_grad():
        state = from_prior(draw_prior(settings.num_chains or 64))
        if not bool((state.log_ratio() > -torch.inf).any(0).all()):
            return None
        generator = seeded_generator(state.position.device, seed, "scout")
        outcome = run_pilot(from_prior, kernel, state, generator, settings=settings)
        return Scouting(density(outcome.position), outcome.log_evidence, outcome.num_gradients)


def scout_run(
    problem: Problem,
    run: AnnealedRun,
    kernel: Kernel,
    seed: int,
    journal: Journal,
    *,
    max_rows: int | None = None,
) -> Diagnostic | None:
    """Sends the scout down beside a finished run, and compares.

    Args:
        problem: The run's problem, whose guide was fitted.
        run: A forward run, with its posterior samples.
        kernel: Its kernel.
        seed: Its seed.
        journal: Where the finding is kept.
        max_rows: Positions that may be evaluated at once.

    Returns:
        What :func:`diagnose_scouting` finds. Nobody is sent where data are so many that each
        particle costs as much as a chain.
    """

    def compute() -> dict[str, Any]:
        if problem.from_prior is None or is_dear(problem.density, problem.layout.dim):
            return {}
        rows = max_rows or max(SETTINGS.num_chains or 64, run.num_chains)
        density, from_prior = (Blockwise(d, rows) for d in (problem.density, problem.from_prior()))
        seen = scout(from_prior, problem.draw_prior, density, kernel, seed=seed)
        if seen is None:
            return {}
        with torch.no_grad():
            end = density(problem.pack_chains(run.posterior))
        base = problem.base
        if isinstance(base, MixtureBase) and isinstance(base.first, FittedBase):
            unseen, known = _unseen_defensive(run, end, seen, base.first)
        else:
            unseen, known = _unseen(end, seen)
        found = _verdict(run, seen, unseen, known)
        if found is None and bool(unseen.any()) and not problem.layout.batch:
            found = _by_fits(problem, run, seen, unseen, known, density, seed)
        return {} if found is None else asdict(found)

    found = journal.once("scout", compute)
    return Diagnostic(**found) if found else None


def _unseen(end: State, found: Scouting, *, margin: float = 10.0) -> tuple[Tensor, Tensor]:
    """Marks the particles out of the base's reach; no mass is known there."""
    unseen = found.state.log_base < end.log_base.amin(0) - margin
    unseen &= found.state.log_target >= end.log_target.amin(0)
    return unseen, torch.zeros_like(end.log_base[0])


def _unseen_defensive(
    run: AnnealedRun, end: State, found: Scouting, fit: FittedBase, *, margin: float = 10.0
) -> tuple[Tensor, Tensor]:
    """Marks them likewise where the prior is mixed into the base.

    The base then has density everywhere, and what counts is the fit: mass out of its reach that
    the run's own chains found, by their weights, is not missed.
    """

    def reach(positions: Tensor) -> Tensor:
        return torch.stack([fit.log_density(position) for position in positions])

    with torch.no_grad():
        least = reach(torch.stack([fit.draw() for _ in range(len(found.state.position))])).amin(0)
        inside = reach(end.position) >= least - margin
        outside = reach(found.state.position) < least - margin
    of_fit = torch.where(inside, end.log_target, torch.inf).amin(0)
    dense = torch.where(inside.any(0), of_fit, end.log_target.amin(0))
    outside &= found.state.log_target >= dense
    weights = run.log_weights.to(end.log_target).softmax(0)
    return outside, (weights * ~inside).sum(0)


def diagnose_scouting(
    run: AnnealedRun,
    end: State,
    found: Scouting,
    *,
    margin: float = 10.0,
    min_mass: float = 0.2,
    tolerance: float = 3.0,
) -> Diagnostic | None:
    r"""Compares where a run ended with where the scout did.

    A particle u is unseen if :math:`\log q(u)` lies ``margin`` below its least value at the ends of
    the run's chains, although :math:`\log p(x, u)` is no less than its least value there. The
    share of unseen particles times the scout's evidence estimates the posterior mass out of the
    run's reach, here relative to the run's evidence. The scout's evidence is that of an unbiased
    weight, so it exceeds the truth by b nats with probability :math:`e^{-b}` at most.

    Args:
        run: A forward run.
        end: The state at its last weight, ``[K, *batch]``.
        found: What the scout found.
        margin: In nats.
        min_mass: Unseen mass that counts, over the run's evidence.
        tolerance: Nats of evidence beyond the run's, and five standard errors, that count.

    Returns:
        A warning whose value is the largest share of unseen particles over the batch, or None.
    """
    unseen, known = _unseen(end, found, margin=margin)
    return _verdict(run, found, unseen, known, min_mass, tolerance)


def _by_fits(
    problem: Problem,
    run: AnnealedRun,
    found: Scouting,
    unseen: Tensor,
    known: Tensor,
    density: Density,
    seed: int,
    *,
    min_mass: float = 0.1,
    margin: float = 10.0,
) -> Diagnostic | None:
    """Measures what unseen places hold where the scout's own evidence is too noisy to tell.

    Gaussians are fitted there. The evidence lower bound of one whose draws the base does not reach
    bounds the mass that the run misses, whatever the scout found.
    """
    if problem.layout.dim > _MOST_DIMENSIONS or lattice_of(problem.layout) is not None:
        return None  # no Gaussian lives on integers
    rows = Rows(density, rows_at_once(problem.density, problem.layout.dim), 0)
    if rows.is_dear:
        return None
    best = torch.where(unseen, found.state.log_target, -torch.inf).argsort(descending=True)
    points = found.state.position[best[: min(int(unseen.sum()), _MOST_FITS)]]
    generator = seeded_generator(points.device, seed, "fits of the scout")
    fits = follow_newton(rows, points, generator, num_steps=15)
    fit = problem.base.first if isinstance(problem.base, MixtureBase) else problem.base
    if not isinstance(fit, FittedBase) or not bool(fits.elbo.isfinite().any()):
        return None
    several = distinct(fits, None)
    noise = torch.randn(
        (16, *several.loc.shape), dtype=points.dtype, device=points.device, generator=generator
    )
    draws = several.loc + (several.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        own = [fit.log_density(fit.draw()) for _ in range(run.num_chains)]
        reach = torch.stack([fit.log_density(draw) for draw in draws.flatten(0, 1)])
    out_of_reach = (reach.view(draws.shape[:2]) < torch.stack(own).amin() - margin).all(0)
    if not bool(out_of_reach.any()):
        return None
    excess = several.elbo[out_of_reach].double().logsumexp(0) - run.lower / run.scale
    if not float(excess.exp() - _DOUBT * known) >= min_mass:
        return None
    share = float(unseen.double().mean())
    return Diagnostic(
        name="modes",
        severity="warning",
        message=f"{format_share(share)} of the particles that came down from the prior ended where "
        "the start has no density, and Gaussians fitted there hold at least "
        f"{float(excess.exp()):.2g} times the run's evidence. {_REMEDY}",
        value=share,
    )


def _verdict(
    run: AnnealedRun,
    found: Scouting,
    unseen: Tensor,
    known: Tensor,
    min_mass: float = 0.2,
    tolerance: float = 3.0,
) -> Diagnostic | None:
    """Judges the particles out of the start's reach, less the share of mass ``known`` there."""
    share = unseen.double().mean(0)
    excess = found.log_evidence - run.lower / run.scale
    errors = run.std_error.nan_to_num(0.0) / run.scale
    missed = (share * excess.exp() >= min_mass + _DOUBT * known) | (
        excess > tolerance + 5.0 * errors
    )
    if not bool(missed.any()):
        return None
    of_batch = ""
    if share.dim():
        of_batch = f" for {format_share(missed.double().mean().item())} of the batch"
    return Diagnostic(
        name="modes",
        severity="warning",
        message=f"particles that came down from the prior disagree with this start{of_batch}: up to "
        f"{format_share(share.max().item())} of them ended in places as dense as the run's where "
        f"the start has no density, and they found {excess.max().item():+.2g} nats of evidence beside the "
        f"run's. {_REMEDY}",
        value=share.max().item(),
    )
