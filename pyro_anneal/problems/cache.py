"""Problems that are kept for other data of the same shapes.

A recorded graph without exits is proven to serve all data of its shapes; one with exits serves the
data for which what left is the same. So the data sets of one call (simulations, batches) and the
minibatches of a loss share what their shapes determine: the layout, the proof that rows do not meet,
the graph. What depends on values is looked at anew: observed values and their supports, supports of
latents, scales, the support of a guide.

What no tensor says (attributes of Python objects) is taken to be the same within a call. Between
calls problems are prepared anew, and find their graphs by content (:mod:`~..graphs.captured`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ..graphs.captured_density import CapturedDensity
from ..graphs.recorded import RecordedDensity
from ..models.inspection import inspect_again
from ..models.simulation import Conditioned
from ..models.transport import Transport
from .bases import Arguments, PathDensity
from .discrete import lattice_of
from .problem import Guide, Problem, assemble, finish, prepare, reason_for_float64

__all__ = ["Kept", "KeptProblems", "identity", "key_of", "prepare_kept", "tensors_of"]

Fn = Callable[..., Any]
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


@dataclass(eq=False)
class Kept:
    """One problem, ready for new data of the same shape."""

    problem: Problem
    tensors: dict[str, Tensor]  # what the graph reads that may be replaced, by place
    owners: tuple[Any, ...]  # kept alive, since their ids are keys

    def replacements(
        self, tensors: Mapping[str, Tensor], density: RecordedDensity | None = None
    ) -> dict[Tensor, Tensor]:
        """Pairs the tensors that a graph, the problem's by default, reads with the present ones."""
        known = {id(constant) for constant in (density or self.problem.density).constants}
        return {old: tensors[at] for at, old in self.tensors.items() if id(old) in known}

    def serves(self, tensors: Mapping[str, Tensor]) -> bool:
        """Tells whether the recorded graph is right for these tensors."""
        density = self.problem.density
        return density.mode == "eager" or bool(density.serves(self.replacements(tensors)))


K = TypeVar("K", bound=Kept)


class KeptProblems(Generic[K]):
    """The problems kept last, by what they were made for.

    Args:
        size: Number of kinds, and of problems of one kind, to keep.
    """

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self._entries: OrderedDict[Any, list[K]] = OrderedDict()

    def find(self, key: Any, tensors: Mapping[str, Tensor]) -> K | None:
        """Finds a problem whose graph serves these tensors; None also without a key."""
        if key is None or key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return next((kept for kept in self._entries[key] if kept.serves(tensors)), None)

    def last(self, key: Any) -> K | None:
        """Returns the problem of this key that was kept or found last; None if there is none."""
        return None if key is None else next(iter(self._entries.get(key, ())), None)

    def add(self, key: Any, kept: K) -> None:
        """Keeps a problem, unless it has no key."""
        if key is None:
            return
        same = self._entries.setdefault(key, [])
        same.insert(0, kept)
        del same[self.size :]
        self._entries.move_to_end(key)
        while len(self._entries) > self.size:
            self._entries.popitem(last=False)


def identity(fn: Any) -> tuple[int, int]:
    """Identifies a callable; a bound method is made anew at each access and has two parts."""
    return id(getattr(fn, "__self__", fn)), id(getattr(fn, "__func__", fn))


def tensors_of(places: Mapping[str, Any]) -> dict[str, Tensor]:
    """Collects the tensors in nested values, by place."""
    found = {}
    for place, value in places.items():
        for number, leaf in enumerate(tree_flatten(value)[0]):
            if isinstance(leaf, Tensor):
                found[f"leaf {number} of the {place}"] = leaf
    return found


def key_of(functions: Sequence[Any], places: Mapping[str, Any]) -> Any:
    """Makes the key of a problem: its functions, and all of its arguments but the values of tensors.

    Args:
        functions: Model and guide, by identity.
        places: Nested values that they read.

    Returns:
        The key; None where an argument is an array of NumPy, which may change and is no input of a
        graph.
    """
    parts: list[Any] = [identity(fn) for fn in functions]
    for place, value in places.items():
        leaves, structure = tree_flatten(value)
        parts.append((place, repr(structure)))
        for leaf in leaves:
            if isinstance(leaf, np.ndarray):
                return None
            if isinstance(leaf, Tensor):
                parts.append((tuple(leaf.shape), leaf.dtype, leaf.device))
            else:
                parts.append(repr(leaf) if isinstance(leaf, _PLAIN) else id(leaf))
    return tuple(parts)


def prepare_kept(
    problems: KeptProblems[Kept] | None,
    model: Fn,
    guide: Guide,
    model_args: Arguments,
    guide_args: Arguments,
    **options: Any,
) -> Problem:
    """Prepares a problem, or gives one that is kept these data.

    Args:
        problems: What is kept for the data sets of one call; None to prepare anew.
        model: Pyro model, or one conditioned on simulated data.
        guide: Guide, ``"auto"``, or None for the prior.
        model_args: ``(args, kwargs)`` of the model.
        guide_args: ``(args, kwargs)`` of the guide.
        **options: Of :func:`~.problem.prepare`, the same for all problems of the call.

    Returns:
        The problem.

    Raises:
        ValueError: As :func:`~.problem.prepare`.
    """
    if problems is None:
        return prepare(model, guide, model_args, guide_args, **options)
    owner, data = model, {}
    if isinstance(model, Conditioned):
        owner, data = model.model, model.data
    places = {"arguments": model_args, "guide's arguments": guide_args, "data": data}
    tensors, key = tensors_of(places), key_of((owner, guide), places)
    found = problems.find(key, tensors)
    if found is not None:
        problem = _renewed(found, tensors, model, guide, model_args, guide_args, options)
        if problem is not None:
            return problem
    problem = prepare(model, guide, model_args, guide_args, **options)
    if _may_be_kept(problem):
        problems.add(key, Kept(problem, tensors, (owner, guide, model_args, guide_args)))
    return problem


def _may_be_kept(problem: Problem) -> bool:
    """Tells whether shapes alone determine all that would be kept.

    Lattices of discrete latents and the exactness of their gradients may depend on the data.
    """
    return (
        problem.density.mode in ("graph", "compiled")
        and not problem.layout.wide  # which the values decide
        and lattice_of(problem.layout) is None
        and not isinstance(problem.model.model, Transport)
    )


def _renewed(
    found: Kept,
    tensors: Mapping[str, Tensor],
    model: Fn,
    guide: Guide,
    model_args: Arguments,
    guide_args: Arguments,
    options: Mapping[str, Any],
) -> Problem | None:
    """Puts new data in a kept problem; None where more than values of tensors differs."""
    hand_written = None if isinstance(guide, str) else guide
    layout = inspect_again(found.problem.inspected, model, hand_written, model_args, guide_args)
    if layout is None:
        return None
    options = {name: value for name, value in options.items() if name != "batch_plates"}

    def rebound(function: PathDensity) -> Any:
        density = found.problem.density.rebind(found.replacements(tensors), function)
        density.check(density.example.unsqueeze(0))
        return density

    def rebound_for_fit(sites: frozenset[str], function: PathDensity) -> CapturedDensity | None:
        density = found.problem.captured.get(sites)
        if density is None or density.mode == "eager":
            return None
        replacements = found.replacements(tensors, density)
        if not density.serves(replacements):
            return None
        density = density.rebind(replacements, function)
        density.check(density.example.unsqueeze(0))
        return density

    problem = assemble(model, guide, model_args, guide_args, layout)
    problem = replace(problem, vouched=found.problem.vouched)
    made, example = None if guide == "auto" else rebound, found.problem.density.example
    try:
        problem = finish(problem, guide, example, **options, rebind=rebound_for_fit, made=made)
    except ValueError:  # to be explained by a full preparation, or a number of Python is another
        return None
    is_wide = reason_for_float64(problem, gradients=options.get("gradients", True)) is not None
    return None if is_wide else problem
