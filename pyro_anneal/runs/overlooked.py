r"""Phases that a run from the prior overlooked: narrow, heavy, and entered by no chain.

Chains that come down a broad slab do not see a spike in it, and their weights are flawless. Where
the likelihood's own optimum leads, and where each term of a mixture that the model names has its
optimum, Gaussians are fitted. The evidence lower bound of one of them is at most the log of the
posterior mass m under it, and the weighted ends of the chains tell which share s of the run's
evidence :math:`\hat Z` lies there. So the run missed at least

.. math:: e^{\mathrm{ELBO}} / \hat Z - s

of its own evidence, up to noise.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..kernels.base import needs_gradients
from ..persistence.journal import Journal
from ..persistence.randomness import seeded_generator
from ..problems.bases import PriorBase
from ..problems.branches import branch_optima
from ..problems.discrete import lattice_of
from ..problems.gaussian import Candidates, quadratic_models
from ..problems.phases import likelihood_optima
from ..problems.rows import Rows, rows_at_once
from ..results.findings import Diagnostic
from ..results.run import AnnealedRun
from .settings import Frozen

__all__ = ["find_overlooked"]

_MOST_DIMENSIONS = 64
# Missed mass that counts, over the run's evidence, and the errors of the estimate that it must exceed.
_LEAST_MASS, _NUM_ERRORS = 0.1, 4.0


def find_overlooked(frozen: Frozen, run: AnnealedRun, journal: Journal) -> Diagnostic | None:
    """Looks for phases beside those in which the chains of a run from the prior ended.

    Args:
        frozen: What the run used.
        run: A forward run, with its posterior samples.
        journal: Where the finding is kept.

    Returns:
        A warning whose value is the overlooked mass over the run's evidence, or None where nothing was
        found, and where fits are not to be had (batches, many dimensions or data, no gradients).
    """
    problem, kernel = frozen.problem, frozen.path.kernel
    layout = problem.layout
    if not isinstance(problem.base, PriorBase) or layout.batch or layout.dim > _MOST_DIMENSIONS:
        return None
    # The base is a guide's, and ends of chains cannot be packed; or there is no linear algebra.
    if layout.derived or torch.finfo(layout.dtype).bits < 32:
        return None
    size = rows_at_once(problem.density, layout.dim)
    rows = Rows(problem.density, size, 0)
    recorded = problem.density.mode in ("graph", "compiled") and frozen.compile != "density"
    can = recorded and needs_gradients(kernel) and run.num_steps > 1
    if not can or rows.is_dear or lattice_of(layout) is not None or not run.posterior:
        return None
    if frozen.chain_batch_size is not None and frozen.chain_batch_size < size:
        return None
    if not bool(run.log_evidence.isfinite()):
        return None

    def compute() -> dict[str, Any]:
        ends = problem.pack_chains(run.posterior)
        generator = seeded_generator(ends.device, frozen.seed, "overlooked phases")
        with torch.no_grad():
            best = ends[rows(ends)[0].argmax()]
            optima = likelihood_optima(rows, best, generator)
            branches, _ = branch_optima(problem.model, best, generator)
            fits = quadratic_models(rows, torch.cat([optima, branches]), generator)
        found = _missed(fits, ends, run)
        return {} if found is None else asdict(found)

    found = journal.once("overlooked", compute)
    return Diagnostic(**found) if found else None


def _missed(fits: Candidates, ends: Tensor, run: AnnealedRun) -> Diagnostic | None:
    """Compares the mass under each Gaussian with the share of the run's ends there."""
    alive = fits.elbo.isfinite()
    if not bool(alive.any()):
        return None
    loc, scale, dim = fits.loc[alive], fits.scale_tril[alive], ends.shape[-1]
    white = torch.linalg.solve_triangular(
        scale.unsqueeze(1), (ends - loc.unsqueeze(1)).unsqueeze(-1), upper=False
    )
    inside = white.square().sum((-2, -1)) < dim + 4.0 * math.sqrt(2.0 * dim)  # [S, K]
    weights = run.log_weights.softmax(0).to(ends)
    share = (inside * weights).sum(1).double()
    count = run.ess.double().clamp(min=1.0)
    # of a mass that n chains could miss by chance nothing is said: (1 - 4 / n)^n < .02
    share = share + _NUM_ERRORS * (share * (1.0 - share) / count).sqrt() + _NUM_ERRORS / count
    excess = fits.elbo[alive].double() - run.log_evidence / run.scale
    error = (run.std_error / run.scale).nan_to_num(0.0)
    ratio = excess.clamp(max=300.0).exp()
    missed = (excess - _NUM_ERRORS * error).clamp(max=300.0).exp() - share > _LEAST_MASS
    if not bool(missed.any()):
        return None
    found = float(torch.where(missed, ratio, 0.0).max())
    return Diagnostic(
        name="modes",
        severity="warning",
        message="a Gaussian fitted where the likelihood, or one term of a mixture in the model, is "
        f"largest holds at least {found:.2g} times the run's evidence, and no or too few "
        "chains ended there. Posterior modes are missed and the evidence is too low: start from a "
        'fit (guide="auto"), which covers them',
        value=found,
    )
