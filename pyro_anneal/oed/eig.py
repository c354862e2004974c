r"""Expected information gain of experimental designs, bounded from both sides by annealing.

The expected information gain of a design d is the mutual information of what will be observed and
what one wants to know,

.. math:: I(d) = E_{p(\theta, y | d)}\bigl[\log p(y | \theta, d) - \log p(y | d)\bigr].

Pairs are simulated from the model, so each target is an exact posterior sample given its
observation, and annealing bounds ``log p(y | d)`` from both sides. Nested Monte Carlo needs
exponentially many draws where an observation is informative; annealing does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..anneal import AnnealedImportance
from ..arguments import as_count
from ..models.types import Fn
from ..results.controls import leave_one_out_control
from ..results.findings import Diagnostic
from ..results.information_gain import ExpectedInformationGain
from ..results.mutual_information import few_pairs
from ..results.provenance import Provenance, joint_record
from ..results.sandwich import Sandwich
from .pairs import Experiment, Labels

__all__ = ["ExpectedInformationGain", "ais_eig"]


def ais_eig(
    model: Fn,
    design: Tensor,
    observation_labels: str | Sequence[str],
    target_labels: str | Sequence[str] | None = None,
    *,
    num_pairs: int = 100,
    gradient: bool = False,
    seed: int | None = None,
    guide: Any = None,
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
        gradient: Whether to estimate the gradient with respect to the design as well.
        seed: Seed of pairs and chains.
        guide: Guide of :class:`~pyro_anneal.AnnealedImportance`, for targets and nuisances
            together; None to anneal from the prior, ``"auto"`` to fit one.
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
    began = time.perf_counter()
    num_pairs = as_count("num_pairs", num_pairs)
    experiment = Experiment.read(
        model, design, Labels.check(observation_labels, target_labels), num_pairs, seed
    )
    settings: dict[str, Any] = {
        "num_chains": num_chains,
        "num_steps": num_steps,
        "progress_bar": progress_bar,
    }
    settings |= {"seed": experiment.seed, **options}

    runs: list[Sandwich] = []

    def bound(observed: Sequence[str], guide: Any) -> Sandwich:
        conditioned = experiment.observing(observed)
        annealer = AnnealedImportance(conditioned, guide, **settings)
        sandwich = annealer.sandwich(experiment.design, keep_samples=True)
        runs.append(experiment.check(sandwich))
        return runs[-1]

    evidence = bound(experiment.labels.observations, guide)
    lower, upper = _log_likelihood(experiment, evidence, guide, bound)
    pair_lower, pair_upper = lower - evidence.upper, upper - evidence.lower
    middle = 0.5 * (pair_lower + pair_upper)
    slope = experiment.gradient(middle) if gradient else None
    if control_variates:
        control = leave_one_out_control(middle, experiment.controls().to(middle))
        pair_lower, pair_upper = pair_lower - control, pair_upper - control
    return ExpectedInformationGain(
        pair_lower=pair_lower,
        pair_upper=pair_upper,
        design=design.detach(),
        gradient=slope,
        notes=tuple(note for note in evidence.notes if "SIMULATED" not in note),
        diagnostics=(*few_pairs(num_pairs), *_findings(runs)),
        provenance=_record(runs, began, num_pairs),
    )


def _log_likelihood(
    experiment: Experiment,
    evidence: Sandwich,
    guide: Fn | str | None,
    bound: Callable[[Sequence[str], Fn | str | None], Sandwich],
) -> tuple[Tensor, Tensor]:
    """Bounds the log likelihood of the targets from both sides; it is known without nuisances."""
    if not experiment.nuisances:
        if evidence.true_log_likelihood is None:
            raise ValueError("the sandwich kept no log likelihood of its pairs")
        return evidence.true_log_likelihood, evidence.true_log_likelihood
    # The guide speaks of all latents; with the targets observed the prior starts the chains.
    start = guide if isinstance(guide, str) else None
    joint = bound((*experiment.targets, *experiment.labels.observations), start)
    prior = experiment.log_prior_of_targets()
    if prior is not None:
        return joint.lower - prior, joint.upper - prior
    # It depends on nuisances, and needs bounds of its own.
    targets = bound(experiment.targets, start)
    return joint.lower - targets.upper, joint.upper - targets.lower


def _findings(runs: Sequence[Sandwich]) -> tuple[Diagnostic, ...]:
    """Joins the findings of all sandwiches, the same one once."""
    found = {(d.name, d.message): d for run in runs for d in run.diagnostics}
    return tuple(found.values())


def _record(runs: Sequence[Sandwich], began: float, num_pairs: int) -> Provenance | None:
    records = [run.provenance for run in runs if run.provenance is not None]
    if not records:
        return None
    record = joint_record("ais_eig", records)
    seconds = record.seconds | {"total": time.perf_counter() - began}
    settings = record.settings | {"num_pairs": str(num_pairs)}
    return replace(record, seconds=seconds, settings=settings)
