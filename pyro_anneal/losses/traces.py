"""Runs of a model and a guide, and the gates through which gradients pass into samples."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor

from ..arguments import check_function
from ..models.bits import log_prob_of_bits, score_parts_of_bits
from ..models.checks import explained, undeclared_axes
from ..models.masked import check_filled, fill_masked
from ..models.sites import base_distribution, density_sites, latent_sites, mark_points
from ..models.types import Arguments, Fn, Message, Node, Trace

__all__ = ["Arguments", "EnumerationNeeded", "Gates", "Run", "Site", "run_guide"]

Site = Node


class Gates(Messenger):  # type: ignore[misc]
    """Puts a gate behind each sample of a guide, through which gradients pass until it closes.

    With the gates open, differentiating a log-weight with respect to the gates' ``outputs`` gives
    total derivatives along the sampling path. With the gates closed, the same log-weight behaves
    as if all samples were constants, and ``inputs`` are the samples as functions of the guide's
    parameters alone. Gates that have ``factors``, one per sample, multiply what passes by them. It must
    enclose the trace that is to record the outputs.
    """

    def __init__(self, *, closed: bool = False) -> None:
        super().__init__()
        self.closed = closed
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.event_dims: list[int] = []
        self.factors: Sequence[Tensor | None] = ()

    def clear(self) -> None:
        """Forgets the samples of an abandoned run."""
        self.inputs.clear()
        self.outputs.clear()
        self.event_dims.clear()

    def _pyro_post_sample(self, msg: Message) -> None:
        value = msg["value"]
        if msg["is_observed"] or not isinstance(value, Tensor) or not value.requires_grad:
            return
        if self.closed:
            msg["value"] = value.detach()
            return
        gated, index = value.clone(), len(self.outputs)
        gated.register_hook(lambda grad: self._pass(grad, index))
        self.inputs.append(value)
        self.outputs.append(gated)
        self.event_dims.append(msg["fn"].event_dim)
        msg["value"] = gated

    def _pass(self, grad: Tensor, index: int) -> Tensor:
        """Returns what passes of a gradient at a sample."""
        if self.closed:
            return torch.zeros_like(grad)
        factor = self.factors[index] if self.factors else None
        return grad if factor is None else grad * factor


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a guide and of the model replayed against it."""

    model: Any  # traces without subsampling sites
    guide: Any  # without the sites that it observes, too: nothing is drawn there
    subsamples: Trace  # trace of the subsampling sites alone
    marked: tuple[str, ...] = ()  # guide sites that are marked for enumeration, and were sampled

    @cached_property
    def model_sites(self) -> dict[str, Site]:
        """The model's sites that carry a density, in program order."""
        return dict(density_sites(self.model))

    @cached_property
    def guide_sites(self) -> dict[str, Site]:
        """The guide's sites that carry a density, in program order."""
        return dict(density_sites(self.guide))

    @property
    def sites(self) -> Iterator[tuple[str, Site]]:
        """Iterates over both."""
        yield from self.model_sites.items()
        yield from self.guide_sites.items()


class EnumerationNeeded(Exception):  # a request, caught by the caller
    """A model has sites to sum out, but no dimensions were set aside for them."""


def run_guide(
    model: Fn,
    guide: Fn,
    model_arguments: Arguments,
    guide_arguments: Arguments,
    *,
    gates: Gates | None = None,
    shared: Any = None,
    first_enumeration_dim: int | None = None,
    max_plate_nesting: float = math.inf,
    model_context: Callable[[], Any] = contextlib.nullcontext,
) -> Run:
    """Runs a guide, and the model replayed against it.

    Args:
        model: Pyro model, wrapped in the particle plate if there is one.
        guide: Pyro guide, likewise.
        model_arguments: ``(args, kwargs)`` of the model.
        guide_arguments: ``(args, kwargs)`` of the guide.
        gates: What stands behind the guide's samples.
        shared: Trace of subsampling sites to reuse, from the first particle.
        first_enumeration_dim: Where enumeration of the model's sites may allocate dimensions; None
            if no site of the model is to be summed out, as far as is known.
        max_plate_nesting: As for Pyro's losses, for validation.
        model_context: Context in which the model runs.

    Returns:
        Both traces, with log densities.

    Raises:
        EnumerationNeeded: If the model has sites to sum out and ``first_enumeration_dim`` is None.
        ValueError: If a latent site of the model is not in the guide.
        NotImplementedError: If a ``GuideMessenger`` or a flow does not allow for gates.
    """
    args, kwargs = guide_arguments
    check_function("model", model)
    check_function("guide", guide, what="a Pyro guide")
    messenger = poutine.unwrap(guide)
    sharing = contextlib.nullcontext() if shared is None else poutine.replay(trace=shared)
    with explained(), sharing:
        if isinstance(messenger, Messenger):
            if gates is not None:
                raise NotImplementedError(
                    f"{type(messenger).__name__} samples inside the model, where gradients cannot "
                    'be held back: use gradient="reparam" or "auto", or a guide function'
                )
            guide(*args, **kwargs)
            model_trace, guide_trace = messenger.get_traces()
        else:
            with gates or contextlib.nullcontext():
                guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            # The handler of enumeration must see sites before replay fills them: it keeps count of
            # the markov contexts that they are in.
            replayed = model
            if first_enumeration_dim is not None:
                replayed = _sample_those(model, guide_trace)
                replayed = poutine.enum(replayed, first_available_dim=first_enumeration_dim)
            replayed = poutine.replay(replayed, trace=guide_trace)
            args, kwargs = model_arguments
            with model_context():
                model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
    if first_enumeration_dim is None and _has_enumerated(model_trace, guide_trace):
        raise EnumerationNeeded
    mark_points(model_trace, guide_trace)
    _check_sites(model_trace, guide_trace)
    if is_validation_enabled():
        check_model_guide_match(model_trace, guide_trace, max_plate_nesting)
    subsamples = _subsamples(guide_trace, model_trace)
    model_trace = prune_subsample_sites(model_trace)
    guide_trace = _without_observed(prune_subsample_sites(guide_trace))
    marked = tuple(n for n, s in guide_trace.nodes.items() if s.get("infer", {}).get("enumerate"))
    fill_masked(model_trace)
    with model_context():
        bits = {id(model_trace.nodes[name]["value"]) for name in log_prob_of_bits(model_trace)}
        model_trace.compute_log_prob()
    check_filled(model_trace)
    _compute_score_parts(guide_trace, bits, gated=gates is not None)
    if is_validation_enabled():
        _check_shapes((model_trace, guide_trace), max_plate_nesting)
    return Run(model_trace, guide_trace, subsamples, marked)


def _check_shapes(traces: Iterable[Trace], max_plate_nesting: float) -> None:
    """Checks that each axis of a log density is a plate's, or one that can only be summed.

    Pyro's losses refuse the latter. It is an error here, too, where axes left of the plates have
    another use: that of particles, or of enumeration; and where a site in plates has axes whose
    sizes are not theirs.
    """
    summed = {}
    for trace in traces:
        for name, site in trace.nodes.items():
            if site["type"] != "sample":
                continue
            try:
                check_site_shape(site, max_plate_nesting)
            except ValueError:
                in_plates = any(frame.vectorized for frame in site["cond_indep_stack"])
                if in_plates or max_plate_nesting < math.inf:
                    raise
                axes = undeclared_axes(name, site, enumerated=False)
                if not axes:
                    raise
                summed[name] = f'{axes} of site "{name}"'
    if summed:
        warnings.warn(
            f"axes that belong to no plate are summed: {', '.join(summed.values())}; declare them "
            "by pyro.plate or .to_event, as Pyro's losses ask for",
            stacklevel=2,
        )


def _sample_those(model: Fn, guide_trace: Trace) -> Fn:
    """Drops the marks for enumeration at sites of the model whose values the guide draws."""
    drawn = latent_sites(guide_trace)
    unmarked = {"enumerate": None}
    fn: Fn = poutine.infer_config(model, lambda site: unmarked if site["name"] in drawn else {})
    return fn


def _without_observed(guide_trace: Trace) -> Any:
    """Leaves out the observed sites of a guide, which are no part of the density of its draws."""
    for name in [n for n, s in guide_trace.nodes.items() if s["type"] == "sample"]:
        if guide_trace.nodes[name]["is_observed"]:
            guide_trace.remove_node(name)
    return guide_trace


def _has_enumerated(model_trace: Trace, guide_trace: Trace) -> bool:
    return any(
        site["infer"].get("enumerate") == "parallel"
        for name, site in latent_sites(model_trace).items()
        if name not in guide_trace.nodes
    )


def _subsamples(*traces: Any) -> Any:
    result = poutine.Trace()
    for trace in traces:
        for name, site in trace.nodes.items():
            if site_is_subsample(site) and name not in result:
                result.add_node(name, **site.copy())
    return result


def _check_sites(model_trace: Trace, guide_trace: Trace) -> None:
    for name, site in latent_sites(model_trace).items():
        if name in guide_trace.nodes:
            continue
        if site["infer"].get("num_samples") is not None:
            raise NotImplementedError(
                f'site "{name}" is enumerated by num_samples draws, which gives no exact sum; '
                "drop num_samples, or sample the site in the guide"
            )
        if site["infer"].get("_enumerate_dim") is None:
            raise ValueError(
                f'model and guide disagree on sites: latent site "{name}" of the model is not in '
                "the guide; sample it there, or, if it is discrete, mark it with "
                'infer={"enumerate": "parallel"}'
            )


def _compute_score_parts(trace: Trace, bits: Collection[int], *, gated: bool) -> None:
    score_parts_of_bits(trace, bits)
    for name, site in density_sites(trace):
        one = poutine.Trace()
        one.nodes[name] = site
        try:
            one.compute_score_parts()
        except (KeyError, NotImplementedError) as error:
            if not gated:
                raise
            raise NotImplementedError(
                f'guide site "{name}" ({type(base_distribution(site["fn"])).__name__}) has no log density at a fixed '
                f"value ({error}): this gradient needs one, and a flow without an inverse has "
                'none; use gradient="reparam"'
            ) from error
