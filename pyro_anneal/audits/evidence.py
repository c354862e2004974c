"""Log evidence from posterior draws: bridge sampling, a harmonic mean, and annealing."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from pyro.ops.stats import split_gelman_rubin
from torch import Tensor

from ..arguments import as_flag, check_reserved
from ..diagnostics import checks
from ..models.density import ModelDensity
from ..models.types import Fn
from ..persistence.journal import Journal, keep_journal
from ..problems.components import DenseComponent
from ..problems.discrete import lattice_of
from ..problems.drawn import drawn_base, pack_draws
from ..problems.fitted import FittedStart
from ..problems.problem import Problem
from ..results.drawn import EvidenceFromSamples
from ..results.findings import Diagnostic
from ..results.provenance import Provenance
from ..results.run import Estimate
from ..runs.freezing import freeze
from ..runs.progress import follow_call
from ..runs.run import forward, reverse
from ..runs.settings import Frozen, Settings
from .bridge import bridge, pareto_k, series_ess, truncated_harmonic_mean
from .findings import diagnose_evidence
from .labelling import find_missing_labellings
from .reading import read_draws

__all__ = ["evidence_from_samples"]

# Draws that are read at most: more are thinned evenly. Positions that are evaluated at once.
_MOST_DRAWS, _ROWS = 4000, 256
_STAGES = {"fit": 2.0, "pilot": 1.0, "forward": 4.0, "reverse": 4.0}


@dataclass(frozen=True, eq=False)
class _Halves:
    """Draws by site, ``[C, N, *value_shape]``: one half fits the base, the other does the rest."""

    first: dict[str, Tensor]
    second: dict[str, Tensor]
    kind: str

    @property
    def count(self) -> int:
        """Number of draws of the second half."""
        shape = next(iter(self.second.values())).shape
        return shape[0] * shape[1]


def evidence_from_samples(
    model: Fn,
    samples: object,
    *args: object,
    exact: bool = False,
    seed: int | None = None,
    num_chains: int = 32,
    num_steps: int = 200,
    progress_bar: bool = True,
    **kwargs: object,
) -> EvidenceFromSamples:
    """Computes the log evidence of a model from draws of its posterior.

    A density q is fitted to half of the draws in unconstrained space: a Gaussian, a Student-t or a
    mixture, of low rank where dimensions are many, in centred or non-centred coordinates, whichever
    gives the most density to held-out draws. The rest follows from q:

    - annealing from q to the model: ``lower``, a bound in expectation whatever the draws are;
    - bridge sampling between q and the other half of the draws: ``estimate``, with a standard error
      from effective sample sizes, right if the draws represent the posterior;
    - the truncated harmonic mean of that half (THAMES), as a check;
    - with ``exact=True``, reverse chains from draws of the other half: ``upper``.

    Chains that have not mixed, labellings of exchangeable elements that they did not visit, heavy
    tails of the ratios and methods that contradict each other are among the ``diagnostics``.

    Source: Meng and Wong (1996); Overstall and Forster (2010) for fitting q to one half; Metodiev et
    al. (2024) for the harmonic mean.

    Args:
        model: Pyro model with its observations.
        samples: Draws of every latent site: a mapping from names to ``[N, *value_shape]``, or
            ``[C, N, *value_shape]`` grouped by chain, ``pyro.infer.MCMC`` after its run, or
            ``InferenceData`` or a ``DataTree`` with a group ``posterior``.
        *args: Arguments of the model.
        exact: Whether the draws are independent, exact draws from p(z | x). Those of a Markov
            chain are not.
        seed: Seed of the call, which then leaves the global generators as they were.
        num_chains: Number K of chains in each direction.
        num_steps: Number T of steps of each.
        progress_bar: Whether to show progress.
        **kwargs: All other keywords are arguments of the model.

    Returns:
        The bounds and estimates in nats, per datum where plates enclose the whole model.

    Raises:
        ValueError: If a latent site has no draws, or some outside its support; if there are fewer
            than 20; if the model has discrete latents that are not enumerated, or a parameter of
            the name of an option.

    Example:
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> draws = {"z": 1.0 + 0.5**0.5 * torch.randn(1000)}  # p(z | x) = N(1, 1/2)
        >>> evidence = evidence_from_samples(
        ...     model, draws, torch.tensor(2.0), exact=True, seed=0, num_steps=20, progress_bar=False
        ... )
        >>> bool((evidence.estimate.value + 2.265512).abs() < 0.01)  # log N(2; 0, sqrt 2)
        True
    """
    as_flag("exact", exact)
    options = ("exact", "seed", "num_chains", "num_steps", "progress_bar", "samples")
    remedy = "wrap the model in a function whose parameters have other names"
    check_reserved("evidence_from_samples", model, args, options, remedy=remedy)
    settings = Settings(
        model,
        "auto",
        num_chains=num_chains,
        num_steps=num_steps,
        seed=seed,
        progress_bar=progress_bar,
    )
    began, arguments = time.perf_counter(), (args, kwargs)
    task = "evidence_from_samples"
    with (
        keep_journal(task, dict, path=None, every=None, seed=settings.seed) as journal,
        follow_call(task, _STAGES, progress_bar and journal.is_first, journal.seconds),
    ):
        read: list[_Halves] = []  # anew for each precision that was tried

        def make_start(density: ModelDensity, example: Tensor) -> FittedStart:
            values = read_draws(samples, density.layout)
            first, second = _split(values)
            drawn = drawn_base(density, first)
            read.append(_Halves(first, second, drawn.kind))
            return FittedStart(drawn.model, drawn.base, None, 0)

        frozen = freeze(
            settings,
            model,
            arguments,
            arguments,
            journal,
            seed=journal.seed,
            make_start=make_start,
        )
        if lattice_of(frozen.problem.layout) is not None:
            raise ValueError(
                "evidence_from_samples fits a density to continuous latents, and this model has "
                'discrete ones: enumerate them (infer={"enumerate": "parallel"}), or use '
                "AnnealedImportance(model).run(...)"
            )
        result, missing = _evidence(frozen, read[-1], journal, exact)
    found = (*diagnose_evidence(result), *([] if missing is None else [missing]))
    checks.warn(found)
    provenance = _provenance(task, journal, result, time.perf_counter() - began)
    return replace(result, diagnostics=found, provenance=provenance)


def _split(values: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Thins draws to a number that is read in seconds, and cuts each chain into two halves."""
    chains, count = next(iter(values.values())).shape[:2]
    if chains * count < 20:
        raise ValueError(f"evidence_from_samples needs at least 20 draws, got {chains * count}")
    if count < 4:  # so many chains, that they stand for draws
        values = {name: value.transpose(0, 1) for name, value in values.items()}
        values = {name: value.flatten(0, 1).unsqueeze(0) for name, value in values.items()}
        chains, count = 1, chains * count
    stride = -(-chains * count // _MOST_DRAWS)
    values = {name: value[:, ::stride] for name, value in values.items()}
    half = next(iter(values.values())).shape[1] // 2
    first = {name: value[:, :half] for name, value in values.items()}
    return first, {name: value[:, half : 2 * half] for name, value in values.items()}


def _evidence(
    frozen: Frozen, halves: _Halves, journal: Journal, exact: bool
) -> tuple[EvidenceFromSamples, Diagnostic | None]:
    """Computes everything from a frozen problem and the two halves, and labellings they lack."""
    problem = frozen.problem
    flat = {name: value.flatten(0, 1) for name, value in halves.second.items()}
    packed = pack_draws(problem.model, flat)
    chains = next(iter(halves.second.values())).shape[0]
    draws = packed.unflatten(0, (chains, -1))
    log_joint, log_ratio = _evaluate(problem, packed)
    if not bool(log_joint.isfinite().all()):
        raise ValueError(
            "some posterior draws have no density under the model: check that they belong to this "
            "model and these data, and lie inside the supports"
        )
    log_joint, log_ratio = (v.unflatten(0, (chains, -1)) for v in (log_joint, log_ratio))
    proposals = _evaluate(problem, problem.draw(halves.count))[1]
    scale = problem.layout.scale
    value, error = bridge(proposals, log_ratio, independent=exact)
    before = {name: value.flatten(0, 1) for name, value in halves.first.items()}
    earlier = pack_draws(problem.model, before)
    harmonic = _harmonic_mean(earlier.double(), draws, log_joint, exact)
    run, _ = forward(frozen, journal)
    back = None
    if exact:
        stride = max(1, len(packed) // frozen.num_chains)
        starts = packed[::stride][: frozen.num_chains]
        back = reverse(frozen, starts, journal, certified=True)
    series = torch.cat([draws.double(), log_joint.unsqueeze(-1).double()], -1)
    missing = find_missing_labellings(
        problem.layout, lambda rows: _evaluate(problem, rows), packed
    )
    result = EvidenceFromSamples(
        forward=run,
        reverse=back,
        bridge=scale * value,
        bridge_std_error=scale * error,
        harmonic_mean=scale * harmonic.value,
        harmonic_mean_std_error=scale * harmonic.std_error,
        pareto_k=torch.stack([pareto_k(proposals), pareto_k(-log_ratio.flatten(0, 1))]),
        r_hat=_r_hat(torch.cat([earlier.unflatten(0, (chains, -1)), draws], 1).double(), exact),
        num_effective=series_ess(series, independent=exact).amin(-1),
        num_draws=2 * halves.count,
        base=halves.kind,
        exact=exact,
    )
    return result, missing


def _evaluate(problem: Problem, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Computes log p(x, u) and log p(x, u) - log q(u) at ``[N, *batch, D]``, each ``[N, *batch]``.

    Positions without a density, as base draws outside the support, have -inf.
    """
    joint, ratio = [], []
    with torch.no_grad():
        for rows in positions.split(_ROWS):
            missing = _ROWS - len(rows)
            padded = torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])
            state = problem.density(padded.contiguous())
            joint.append(state.log_target[: len(rows)])
            ratio.append(state.log_ratio()[: len(rows)])
    found = torch.cat(joint).double(), torch.cat(ratio).double()
    alive = found[0].isfinite()
    return torch.where(alive, found[0], -torch.inf), torch.where(alive, found[1], -torch.inf)


def _harmonic_mean(rows: Tensor, draws: Tensor, log_joint: Tensor, exact: bool) -> Estimate:
    """Computes the truncated harmonic mean of the second half, in moments of the first."""
    dim = rows.shape[-1]
    nothing = torch.full(rows.shape[1:-1], torch.nan, dtype=torch.float64, device=rows.device)
    if len(rows) < 2 * dim:
        return Estimate(nothing, nothing)
    loc = rows.mean(0)
    covariance = torch.einsum("n...i,n...j->...ij", rows - loc, rows - loc) / (len(rows) - 1)
    jitter = 1e-12 * torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))
    factor, failed = torch.linalg.cholesky_ex(covariance + jitter)
    if bool(failed.any()):
        return Estimate(nothing, nothing)
    component = DenseComponent(loc, factor)
    white = (component.whiten @ (draws.double() - loc).unsqueeze(-1)).squeeze(-1)
    return truncated_harmonic_mean(log_joint, white, component.log_scale, independent=exact)


def _r_hat(series: Tensor, exact: bool) -> Tensor:
    """Computes the largest split R-hat over ``[C, N, *batch, D]``, shape ``[*batch]``."""
    if exact or series.shape[1] < 4:
        return torch.full(series.shape[2:-1], torch.nan, dtype=torch.float64, device=series.device)
    found: Tensor = split_gelman_rubin(series - series.mean((0, 1)), chain_dim=0, sample_dim=1)
    return found.nan_to_num(nan=1.0).amax(-1)


def _provenance(
    task: str, journal: Journal, result: EvidenceFromSamples, seconds: float
) -> Provenance:
    run = result.forward
    gradients = {"chains": sum(r.num_gradients for r in result.directions.values())}
    if run.pilot is not None:
        gradients["pilot"] = run.pilot.num_gradients
    return Provenance(
        task=task,
        seed=run.seed,
        kernel=run.kernel,
        device=str(run.log_weights.device),
        seconds=journal.seconds | {"total": seconds},
        gradients=gradients,
    )
