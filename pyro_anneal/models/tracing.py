"""Runs of a model and its guide that are looked at: once at least, under the handlers that allow any model."""

from __future__ import annotations

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger

from .checks import (
    check_value_shapes,
    explained,
)
from .consumed import Consumed
from .coordinates import bijection
from .sites import (
    mark_points,
)
from .supports import can_be_sampled
from .types import Arguments, Fn, Message, Trace

__all__ = ["TracePair", "draw_two", "trace_of", "trace_pair"]


# Of the model, and of the guide if there is one.
TracePair = tuple[Trace, Trace | None]


class _StartImproper(Messenger):  # type: ignore[misc]
    """Gives sites that cannot be sampled, as with an improper prior, some value in the support."""

    def _pyro_sample(self, msg: Message) -> None:
        fn = msg["fn"]
        if msg["value"] is None and not can_be_sampled(fn):
            transform = bijection(fn)
            shape = transform.inverse_shape(fn.batch_shape + fn.event_shape)
            msg["value"] = transform(torch.randn(shape))
            msg["done"] = True


def trace_of(function: Fn, arguments: Arguments) -> Trace:
    """Runs a model or a guide; errors name the line of the user's code."""
    args, kwargs = arguments
    with explained(), _StartImproper():
        return poutine.trace(function).get_trace(*args, **kwargs)


class _Marks(Messenger):  # type: ignore[misc]
    """Remembers the model's own marks for enumeration, in whose place replay puts the guide's."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: dict[str, object] = {}

    def _pyro_sample(self, msg: Message) -> None:
        self.marks[msg["name"]] = msg["infer"].get("enumerate")

    def restore(self, trace: Trace) -> None:
        """Puts the marks back at the sites of the model's trace."""
        for name, mark in self.marks.items():
            site = trace.nodes.get(name)
            if site is not None and site["infer"].get("enumerate") != mark:
                site["infer"] = {**site["infer"], "enumerate": mark}


def trace_pair(
    model: Fn,
    guide: Fn | None,
    model_args: Arguments,
    guide_args: Arguments,
) -> TracePair:
    """Runs the guide, and the model at the guide's values; the model alone without a guide."""
    if guide is None:
        trace = trace_of(model, model_args)
        mark_points(trace)
        return trace, None
    guide_trace = trace_of(guide, guide_args)
    try:
        marks = _Marks()
        trace = trace_of(poutine.replay(marks(model), trace=guide_trace), model_args)
        marks.restore(trace)
    except (RuntimeError, ValueError):  # perhaps because the guide's values do not fit the model
        check_value_shapes(trace_of(model, model_args), guide_trace)
        raise
    mark_points(trace, guide_trace)
    check_value_shapes(trace, guide_trace)
    return trace, guide_trace


def draw_two(
    model: Fn,
    guide: Fn | None,
    model_args: Arguments,
    guide_args: Arguments,
    num_tries: int,
) -> tuple[TracePair, TracePair]:
    """Traces model and guide twice; where some draws have no density, looks for two that have.

    Raises:
        ValueError: If the first run used up an argument.
    """
    consumed = Consumed(model_args)
    traces: list[TracePair] = []
    for attempt in range(num_tries):
        try:
            traces.append(trace_pair(model, guide, model_args, guide_args))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            if attempt == num_tries - 1:
                raise
        what = consumed.what()
        if what is not None:
            raise ValueError(
                f"the model uses up its {what}, while annealing runs it many times: let it read "
                "without taking out, or take a copy inside"
            )
        if len(traces) == 2:
            break
    return traces[0], traces[-1]
