"""One annealing problem: a model and a base at given arguments, captured and checked."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..graphs.captured import capture
from ..graphs.evaluation import evaluate_or_nan
from ..graphs.purity import undisturbed
from ..graphs.recorded import RecordedDensity
from ..graphs.rewriting import Impure
from ..models.autoguides import check_guide
from ..models.checks import hidden_sites
from ..models.inspection import inspect_model
from ..models.sites import Layout
from ..models.transport import inspect_transport, is_transport
from ..models.types import Fn
from .assembled import Guide, Problem, assemble
from .bases import (
    Arguments,
    GuideBase,
    MixtureBase,
    ModelDensity,
    PathDensity,
    PriorBase,
)
from .conditional import conditional_start
from .content import Remembered, content_of
from .coupling import find_coupling
from .discrete import lattice_of, lift
from .fitted import FittedStart, Once, Rebind, fit_start
from .precision import why_float64

__all__ = [
    "Guide",
    "MakeStart",
    "Problem",
    "assemble",
    "finish",
    "hidden_sites_named",
    "prepare",
    "reason_for_float64",
]

_NOT_FITTED = (
    'guide="auto" fits a start beside discrete latents only where these are independent of each '
    "other given the other latents, and can be summed out: chains start from the prior"
)

MakeStart = Callable[[ModelDensity, Tensor], FittedStart]  # from the model and a finite position


def prepare(
    model: Fn,
    guide: Guide,
    model_args: Arguments,
    guide_args: Arguments,
    *,
    num_chains: int,
    batch_plates: str | Sequence[str],
    compile: bool,
    seed: int,
    prior_weight: float = 0.0,
    progress: Callable[[int], object] = lambda count: None,
    max_rows: int | None = None,
    once: Once = lambda compute, name="": compute(),
    gradients: bool = True,
    make_start: MakeStart | None = None,
    native: bool = False,
    widen: bool = True,
    why_wide: str | None = None,
) -> Problem:
    """Inspects, captures and checks a model and a base.

    Args:
        model: Pyro model with its observations.
        guide: Guide, ``"auto"``, or None for the prior.
        model_args: ``(args, kwargs)`` of the model.
        guide_args: ``(args, kwargs)`` of the guide.
        num_chains: Chains K that the capture is made for; others are captured when met.
        batch_plates: ``"auto"`` or plate names.
        compile: Whether to compile the captured graph.
        seed: Seed of ``guide="auto"``.
        prior_weight: Weight of the prior mixed into the base.
        progress: Called with the steps of the automatic fit.
        max_rows: Positions that the automatic fit may evaluate at once.
        once: Calls the automatic fit, or returns what it gave before.
        gradients: Whether the chains need gradients.
        make_start: Makes the base of ``guide="auto"``, in place of the automatic fit.
        native: Whether small graphs become native code.
        widen: Whether to go to float64 where float32 is not enough.
        why_wide: Why the problem is computed in float64 whatever the model's own precision.

    Returns:
        The problem.

    Raises:
        ValueError: For everything that :func:`~pyro_anneal.models.inspection.inspect_model` and the capture
            refuse, and if rows of a requested batch plate influence each other.
    """
    asked = (model, guide, model_args, guide_args, _options(locals()))
    model, guide, layout = _inspect(
        model, guide, model_args, guide_args, batch_plates, mixed=prior_weight > 0.0
    )
    problem = assemble(model, guide, model_args, guide_args, layout)
    layout = _without_coupled_plates(problem, guide, model_args, guide_args, batch_plates)
    if layout is not problem.layout:
        problem = assemble(model, guide, model_args, guide_args, layout)
    if why_wide is not None:
        note = f"computed in float64: {why_wide}"
        layout = replace(layout, dtype=torch.float64, wide=True, notes=(*layout.notes, note))
        problem = assemble(model, guide, model_args, guide_args, layout)
        once = functools.partial(once, name="fit in float64")
    example = problem.probe()
    if lattice_of(layout) is not None:
        layout = lift(problem.model, example)
        problem = assemble(model, guide, model_args, guide_args, layout)
        if guide == "auto":
            with hidden_sites_named((model, model_args)):
                start = conditional_start(
                    problem.model,
                    example,
                    num_chains=num_chains,
                    seed=seed,
                    progress=progress,
                    max_rows=max_rows,
                    once=once,
                    native=native,
                    vouched=problem.vouched,
                )
            if start is None:
                layout = replace(layout, notes=(*layout.notes, _NOT_FITTED))
                guide, problem = None, assemble(model, None, model_args, guide_args, layout)
            make_start = None if start is None else lambda model, example: start
    problem = finish(
        problem,
        guide,
        example,
        num_chains=num_chains,
        compile=compile,
        seed=seed,
        prior_weight=prior_weight,
        progress=progress,
        max_rows=max_rows,
        once=once,
        gradients=gradients,
        make_start=make_start,
        native=native,
    )
    settled = not widen or why_wide is not None or lattice_of(layout) is not None
    reason = None if settled else reason_for_float64(problem, gradients=gradients)
    return problem if reason is None else prepare(*asked[:4], **asked[4], why_wide=reason)


def _inspect(
    model: Fn,
    guide: Guide,
    model_args: Arguments,
    guide_args: Arguments,
    batch_plates: str | Sequence[str],
    *,
    mixed: bool,
) -> tuple[Fn, Guide, Layout]:
    """Finds the layout; a guide that derives the latents becomes part of the model."""
    if not (guide is None or guide == "auto" or callable(guide)):
        raise ValueError(f'guide must be a Pyro guide, "auto" or None, got {guide!r}')
    hand_written = None if isinstance(guide, str) else guide
    check_guide(hand_written, invertible=False)
    if hand_written is not None and is_transport(hand_written, guide_args):
        if mixed:
            raise ValueError(
                "prior_weight mixes the prior into the density of the guide, which derives the "
                "model's latents from auxiliary sites: its density at draws of the prior is not "
                "known; leave prior_weight out"
            )
        model, layout = inspect_transport(
            model, hand_written, model_args, guide_args, batch_plates=batch_plates
        )
        guide = None
    else:
        layout = inspect_model(
            model, hand_written, model_args, guide_args, batch_plates=batch_plates
        )
    if layout.improper and (guide is None or (guide == "auto" and lattice_of(layout))):
        remedy = 'use guide="auto" or a guide with a density'
        if guide == "auto":
            remedy = (
                'guide="auto" fits nothing beside discrete latents; enumerate those, or pass a '
                "guide that samples all latents"
            )
        raise ValueError(
            f"the prior of site(s) {list(layout.improper)} is improper (ImproperUniform, mask(False)) or has no draws, so "
            f"chains cannot start from it; {remedy}"
        )
    return model, guide, layout


def _without_coupled_plates(
    problem: Problem,
    guide: Guide,
    model_args: Arguments,
    guide_args: Arguments,
    batch_plates: str | Sequence[str],
) -> Layout:
    """Treats plates jointly whose elements meet in the densities; the layout as it is if none do."""
    layout, model = problem.layout, problem.model.model
    coupling = find_coupling(
        problem.function, layout.batch, problem.probe, is_requested=batch_plates != "auto"
    )
    if coupling.plates:
        rest = [plate.name for plate in layout.batch if plate.name not in coupling.plates]
        hand_written = None if isinstance(guide, str) else guide
        joint = inspect_model(model, hand_written, model_args, guide_args, batch_plates=rest)
        static = joint.is_static and not layout.derived
        layout = replace(joint, derived=layout.derived, is_static=static)
    if coupling.notes:
        layout = replace(layout, notes=(*layout.notes, *coupling.notes))
    return layout


def finish(
    problem: Problem,
    guide: Guide,
    example: Tensor,
    *,
    num_chains: int,
    compile: bool,
    seed: int,
    prior_weight: float = 0.0,
    progress: Callable[[int], object] = lambda count: None,
    max_rows: int | None = None,
    once: Once = lambda compute, name="": compute(),
    gradients: bool = True,
    make_start: MakeStart | None = None,
    native: bool = False,
    rebind: Rebind = lambda sites, function: None,
    made: Callable[[PathDensity], Any] | None = None,
) -> Problem:
    """Fits the base, where that is asked for, and captures the densities.

    Args:
        problem: From :func:`assemble`.
        guide: As of :func:`prepare`, like the options.
        example: A finite position, ``[*batch, D]``.
        num_chains: Likewise.
        compile: Likewise.
        seed: Likewise.
        prior_weight: Likewise.
        progress: Likewise.
        max_rows: Likewise.
        once: Likewise.
        gradients: Likewise.
        make_start: Likewise.
        native: Likewise.
        rebind: As of :func:`~.fitted.fit_start`.
        made: Makes the density of both ends for one chain into that for all; None to capture it.
    """
    functions = [(problem.model.model, problem.model.arguments)]
    if isinstance(problem.base, GuideBase):
        functions.append((problem.base.guide, problem.base.arguments))
    with hidden_sites_named(*functions):
        if guide == "auto":
            if make_start is None:
                start = fit_start(
                    problem.model,
                    example,
                    num_chains=num_chains,
                    seed=seed,
                    progress=progress,
                    max_rows=max_rows,
                    once=once,
                    native=native,
                    vouched=problem.vouched,
                    rebind=rebind,
                )
            else:
                start = make_start(problem.model, example)
            problem = _started(problem, start)
            prior_weight = prior_weight or start.prior_weight
        if prior_weight > 0.0 and guide is not None:
            base = MixtureBase(problem.base, PriorBase(problem.model), prior_weight)
            problem = replace(problem, base=base, function=PathDensity(problem.model, base))
        if made is not None:
            return replace(problem, density=made(problem.function))
        density = capture(
            problem.function,
            example,
            num_chains=num_chains,
            compile=compile,
            gradients=gradients,
            native=native,
        )
    return replace(problem, density=density)


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Picks the options of :func:`prepare` that a second preparation shares."""
    positional = ("model", "guide", "model_args", "guide_args", "why_wide")
    return {name: value for name, value in given.items() if name not in positional}


# Steps uphill before precisions are compared, and fewer for graphs of many operations.
_STEPS, _FEW_STEPS, _MANY_OPERATIONS = 60, 25, 4000

# Decisions by the content of all that they depend on.
_REASONS: Remembered[str | None] = Remembered(size=64)


def _is_long(density: RecordedDensity) -> bool:
    """Tells whether a graph has so many operations that evaluations take tens of milliseconds."""
    if density.mode == "eager":
        return False
    return len(density.chain_graph_and_inputs()[0].graph.nodes) > _MANY_OPERATIONS


def reason_for_float64(problem: Problem, *, gradients: bool) -> str | None:
    """Compares a problem with itself in float64; None if float32 is enough."""
    density, function = problem.density, problem.function
    if problem.layout.dtype is not torch.float32:
        return None
    run: Callable[[Tensor], Any] = functools.partial(
        evaluate_or_nan, function, gradients=gradients
    )
    if density.native_source_and_inputs() is not None:

        def run(position: Tensor) -> Any:
            state = density(position.unsqueeze(0))
            density.num_evaluations -= 1
            return tuple(part[0] for part in state[1:])

    elif density.mode == "graph" and _is_long(density):

        def run(position: Tensor) -> Any:  # the graph of all chains is compiled already
            state = density(position.expand(density.num_chains, *position.shape))
            density.num_evaluations -= 1
            return tuple(part[0] for part in state[1:])

    elif density.mode != "eager":
        graph, inputs = density.chain_graph_and_inputs()

        def run(position: Tensor) -> Any:
            return graph(position.contiguous(), *inputs)

    def decide() -> str | None:
        with undisturbed(problem.layout.device):
            torch.manual_seed(0)  # a function of model and data alone
            draws = problem.draw(8)
        steps = _FEW_STEPS if _is_long(density) else _STEPS
        return why_float64(function, run, draws, ascend=gradients, num_steps=steps)

    return _REASONS.get(content_of(density, gradients), decide)


@contextlib.contextmanager
def hidden_sites_named(*functions: tuple[Fn, Arguments]) -> Iterator[None]:
    """Names the sites that handlers do not see where a density turns out to be random.

    Args:
        *functions: Model and guide, each with its ``(args, kwargs)``.
    """
    try:
        yield
    except Impure as error:
        hidden = [name for function in functions for name in hidden_sites(*function)]
        if not hidden:
            raise
        raise ValueError(
            f"site(s) {hidden} are hidden by poutine.block, or by a reparameterizer such as "
            "ConjugateReparam, and sampled anew at each evaluation, so that the density is random: "
            "condition them on a value inside the block, or let them be seen (leave the "
            f"reparameterizer out) ({error})"
        ) from error


def _started(problem: Problem, start: FittedStart) -> Problem:
    """Replaces the prior by a fitted base, in the coordinates that suit it."""
    return replace(
        problem,
        layout=start.model.layout,
        model=start.model,
        base=start.base,
        function=PathDensity(start.model, start.base),
        fit_gradients=start.num_gradients,
        from_prior=start.from_prior,
        captured=start.captured,
    )
