r"""Expected information gain of experimental designs, bounded from both sides by annealing.

The expected information gain of a design d is the mutual information of what will be observed and
what one wants to know,

.. math:: I(d) = E_{p(\theta, y | d)}\bigl[\log p(y | \theta, d) - \log p(y | d)\bigr].

Pairs are simulated from the model, so each target is an exact posterior sample given its
observation, and annealing bounds ``log p(y | d)`` from both sides. Nested Monte Carlo needs
exponentially many draws where an observation is informative; annealing does not.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..anneal import AnnealedImportance
from ..arguments import as_count, as_seed
from ..chains.pilot import Pilot
from ..mi.fitting import as_values
from ..models.types import Fn
from ..persistence.randomness import derived_seed, draw_seed, own_randomness
from ..results.controls import control_of_sides
from ..results.findings import Diagnostic
from ..results.information_gain import ExpectedInformationGain
from ..results.mutual_information import few_pairs
from ..results.provenance import Provenance, joint_record
from ..results.sandwich import Sandwich
from .budget import LEAST_BUDGET, Plan, Tried, choose, information
from .pairs import Experiment, Labels

__all__ = ["ExpectedInformationGain", "ais_eig"]

_TRIED_PAIRS = 8  # per design, on which starts are compared


def ais_eig(
    model: Fn,
    design: Tensor,
    observation_labels: str | Sequence[str],
    target_labels: str | Sequence[str] | None = None,
    *,
    num_pairs: int = 100,
    budget: int | None = None,
    gradient: bool = False,
    seed: int | None = None,
    guide: Any = "best",
    num_chains: int = 16,
    num_steps: int = 100,
    control_variates: bool = True,
    progress_bar: bool = False,
    **options: object,
) -> ExpectedInformationGain:
    r"""Bounds the expected information gain of a batch of designs by annealing.

    .. math:: I(d) = E_{p(\theta, y | d)}\bigl[\log p(y | \theta, d) - \log p(y | d)\bigr]

    An upper bound on ``log p(y | d)`` gives the lower bound on the gain, and the reverse. Where the
    model has latents that are neither target nor observed, ``log p(y | theta, d)`` is bounded in
    the same way, from the same simulated pairs, so that both sides stay bounds.

    The convention is that of :mod:`pyro.contrib.oed.eig`: ``model(design)`` observes nothing, and
    the leading dimensions of the design are plates that enclose every site. Pairs are simulated
    with the design expanded by one more dimension in front.

    The gradient is that of the score,

    .. math:: \nabla_d I(d) = E\Bigl[\nabla_d \log p(\theta, y | d)\,
        \Bigl(\log \frac{p(y | \theta, d)}{p(y | d)} - b\Bigr)\Bigr],

    with the mean of both bounds in place of the log evidence and the mean of the other pairs as the
    baseline b. It needs no reparameterized observation. It is unbiased up to the gap of the bounds.

    Source: Foster et al. (2019), *Variational Bayesian Optimal Experimental Design*, for the
    convention; Brekelmans et al. (2022), section 3, for annealed bounds on mutual information.

    Args:
        model: Pyro model of a design.
        design: Designs, ``[*designs, ...]``: leading dimensions are plates of the model.
        observation_labels: Names of the sites that an experiment would observe.
        target_labels: Names of the latents one wants to know; None for all latents.
        num_pairs: Number N of simulated pairs per design.
        budget: Evaluations of log p(y | theta, d) per design to spend, a value with its gradient
            counted as three. A pilot then chooses the number of pairs, and between independent
            draws (from the prior, or from a regression of latents on observations that is fitted
            per design) and annealed chains, in place of ``num_pairs``, ``num_chains``,
            ``num_steps`` and ``guide``. The notes say what was chosen.
        gradient: Whether to estimate the gradient with respect to the design as well.
        seed: Seed of pairs and chains.
        guide: Guide of :class:`~pyro_anneal.AnnealedImportance`, for targets and nuisances
            together; None to anneal from the prior, ``"auto"`` to fit one, ``"best"`` for whichever of
            the two leaves the smaller gap on a few pairs of their own. The notes say which.
        num_chains: Number K of chains per pair.
        num_steps: Number T of annealing steps.
        control_variates: Whether log densities of sites whose entropies are known serve as control
            variates, from 50 pairs on; left-one-out coefficients keep bounds what they are.
        progress_bar: Whether to show progress.
        **options: Further options of :class:`~pyro_anneal.AnnealedImportance`.

    Returns:
        Bounds with standard errors over pairs, one per design.

    Raises:
        ValueError: If a label is no site of the model, a target is also observed, or the design's
            leading dimensions are not plates of the model.

    Example:
        >>> def model(design):
        ...     with pyro.plate_stack("designs", design.shape):
        ...         theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        ...         pyro.sample("y", dist.Normal(design * theta, 1.0))
        >>> eig = ais_eig(model, torch.tensor([0.5, 2.0]), "y", num_steps=50, num_pairs=50, seed=0)
        >>> bool(eig.lower[1] > eig.upper[0])  # 0.80 against 0.11 nats
        True
    """
    began, design = time.perf_counter(), as_values("design", design)
    labels = Labels.check(observation_labels, target_labels)
    if isinstance(guide, str) and guide not in ("auto", "best"):
        raise ValueError(f'guide must be a Pyro guide, "best", "auto" or None, got {guide!r}')
    num_pairs = as_count("num_pairs", num_pairs)
    settings: dict[str, Any] = {
        "num_chains": num_chains,
        "num_steps": num_steps,
        "progress_bar": progress_bar,
        **options,
    }
    plan: Plan | None = None
    notes: list[str] = []
    if budget is not None:
        if guide != "best":
            raise ValueError("budget chooses the start: pass no guide with it")
        budget = as_count("budget", budget, least=LEAST_BUDGET)
        given = as_seed(seed)
        seed = draw_seed() if given is None else given
        settings = {"pilot": Pilot(num_chains=4, num_moves=3)} | settings  # it is paid per pair
        plan = choose(
            lambda count, key: Experiment.read(model, design, labels, count, key % 2**31),
            budget,
            seed,
            lambda few, chains, steps: _tried(
                few, settings | {"num_chains": chains, "num_steps": steps}
            ),
        )
        num_pairs = plan.num_pairs
        settings |= {"num_chains": plan.num_draws, "num_steps": plan.num_steps}
        notes, guide = [plan.note()], None
    elif isinstance(guide, str) and guide == "best":
        given = as_seed(seed)
        seed = draw_seed() if given is None else given
        few = Experiment.read(
            model, design, labels, _TRIED_PAIRS, derived_seed(seed, "start") % 2**31
        )
        guide, note = _better_start(few, settings)
        notes = [note]
    experiment = Experiment.read(model, design, labels, num_pairs, seed)
    chains = _Chains(experiment, guide, settings)
    if plan is not None and plan.num_steps == 1:
        with own_randomness(derived_seed(experiment.seed, "draws")):
            pair_lower, pair_upper = information(experiment, plan.bounds(experiment))
    else:
        pair_lower, pair_upper = information(experiment, chains, chains.log_likelihood)
    endless = _endless(pair_lower, pair_upper)
    middle = 0.5 * (pair_lower + pair_upper)
    slope = experiment.gradient(middle) if gradient else None
    if control_variates:
        control = control_of_sides(pair_lower, pair_upper, experiment.controls().to(middle))
        pair_lower, pair_upper = pair_lower - control, pair_upper - control
    notes += [note for run in chains.runs[:1] for note in run.notes if "SIMULATED" not in note]
    record = _record(chains.runs, began, experiment, settings)
    return ExpectedInformationGain(
        pair_lower=pair_lower,
        pair_upper=pair_upper,
        design=design.detach(),
        gradient=slope,
        notes=tuple(notes),
        diagnostics=(*few_pairs(num_pairs), *endless, *_findings(chains.runs)),
        provenance=record,
    )


@dataclass(frozen=True, eq=False)
class _Chains:
    """Bounds log densities of pairs by annealing; remembers the sandwiches."""

    experiment: Experiment
    guide: Any  # as for AnnealedImportance
    settings: dict[str, Any]
    runs: list[Sandwich] = field(default_factory=list)

    def __call__(self, observed: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        # The guide speaks of all latents; with the targets observed the prior starts the chains.
        is_first = observed == self.experiment.labels.observations
        start = self.guide if is_first or isinstance(self.guide, str) else None
        conditioned = self.experiment.observing(observed)
        settings = {"seed": self.experiment.seed, **self.settings}
        annealer = AnnealedImportance(conditioned, start, **settings)
        sandwich = annealer.sandwich(self.experiment.design, keep_samples=True)
        self.runs.append(self.experiment.check(sandwich))
        return sandwich.lower, sandwich.upper

    def log_likelihood(self) -> Tensor:
        """Returns log p(y | theta, d) of the pairs, known where all latents are targets."""
        found = self.runs[0].true_log_likelihood
        if found is None:
            raise ValueError("the sandwich kept no log likelihood of its pairs")
        return found


def _better_start(few: Experiment, settings: dict[str, Any]) -> tuple[str | None, str]:
    """Tries the prior and a fitted start on a few pairs; returns the better and a note."""
    gaps: dict[str | None, float] = {}
    refused: Exception | None = None
    for start in (None, "auto"):
        chains = _Chains(few, start, settings)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                lower, upper = information(few, chains, chains.log_likelihood)
        except (NotImplementedError, ValueError) as error:
            refused = refused or error
            continue
        gaps[start] = float((upper - lower).abs().mean())
    if not gaps and refused is not None:
        raise refused
    best = min(gaps, key=lambda start: (not math.isfinite(gaps[start]), gaps[start]))
    names = {None: "the prior", "auto": 'a fitted start (guide="auto")'}
    tried = ", ".join(f"{gap:.3g} nats from {names[start]}" for start, gap in gaps.items())
    count = len(few.design)
    return (
        best,
        f"chains start from {names[best]}: gaps on {count} pairs of their own were {tried}",
    )


def _endless(pair_lower: Tensor, pair_upper: Tensor) -> tuple[Diagnostic, ...]:
    """Finds pairs whose bounds are infinite: an observation that no draw of the latents allows."""
    count = int((~(pair_lower.isfinite() & pair_upper.isfinite())).sum())
    if count == 0:
        return ()
    message = (
        f"bounds are infinite at {count} pairs of a design: none of their draws of the latents allows the "
        "observation, as where its support depends on them. Give more draws (budget=), or a guide "
        "whose draws allow it"
    )
    return (Diagnostic(name="edges", severity="warning", message=message, value=float(count)),)


def _tried(few: Experiment, settings: dict[str, Any]) -> Tried:
    """Anneals a few pairs, and reads gap, variance and cost off them."""
    chains = _Chains(few, None, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lower, upper = information(few, chains, chains.log_likelihood)
    spent = {"pilot": 0.0, "chains": 0.0}
    for run in chains.runs:
        gradients = {} if run.provenance is None else run.provenance.gradients
        width = settings["pilot"].chains_for(settings["num_chains"])
        spent["pilot"] += 3.0 * width * gradients.get("pilot", 0)
        spent["chains"] += 3.0 * settings["num_chains"] * gradients.get("chains", 0)
    return Tried(
        gap=float((upper - lower).mean()),
        variance=min(float(side.var(0).mean()) for side in (lower, upper)),
        fixed=spent["pilot"],
        per_step=spent["chains"] / settings["num_steps"],
    )


def _findings(runs: Sequence[Sandwich]) -> tuple[Diagnostic, ...]:
    """Joins the findings of all sandwiches, the same one once."""
    found = {(d.name, d.message): d for run in runs for d in run.diagnostics}
    return tuple(found.values())


def _record(
    runs: Sequence[Sandwich], began: float, experiment: Experiment, settings: dict[str, Any]
) -> Provenance:
    chosen = {name: str(settings[name]) for name in ("num_chains", "num_steps")}
    chosen["num_pairs"] = str(len(experiment.design))
    seconds = {"total": time.perf_counter() - began}
    records = [run.provenance for run in runs if run.provenance is not None]
    if not records:
        return Provenance(
            task="ais_eig",
            seed=experiment.seed,
            kernel="none",
            device=str(experiment.design.device),
            settings=chosen,
            seconds=seconds,
        )
    record = joint_record("ais_eig", records)
    return replace(record, seconds=record.seconds | seconds, settings=record.settings | chosen)
