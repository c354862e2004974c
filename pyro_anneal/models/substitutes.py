r"""Copies of data that no gradient shows: whole numbers, tables, and what is computed outside torch.

Beside the search by gradients (:mod:`~.copies`), the model is run on the same simulated pair with other
numbers in place of the user's data wherever they are found by value: in the arguments, be they tensors,
arrays or lists, and in the tensors that an operation reads. The substitutes are the same numbers
in another order, and some of them repeated, so that an index stays an index. What observed sites
hold is the simulation in any case; if a density changes, the model reads the data elsewhere.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from .places import Place, current_place
from .sites import density_sites, mark_points, unmasked
from .types import Arguments, Array, Fn
from .validation import validation_disabled

__all__ = ["find_by_substitution", "fractions"]

_CHANCE = 20.0  # pairs of series of which one may agree by chance
_LARGEST = 100_000
_MOST = 20  # places that are tried one by one
# Their results leave the graph: what they read is substituted where it comes from.
_KEPT = ("__get__", "__set__", "size", "dim", "stride", "numel", "data_ptr", "requires_grad_")

Substitute = Callable[[Array], Array]


def fractions(values: Array) -> Array:
    """Returns the distinct values that are no integers: they do not agree by chance."""
    finite = values[np.isfinite(values)]
    return np.unique(finite[finite != np.round(finite)])


def _in_another_order(values: Array) -> Array:
    """Moves the numbers on by one place; missing ones stay where they are."""
    new, there = values.copy(), ~np.isnan(values)
    new[there] = np.roll(values[there], 1)
    return new


def _extremes(values: Array) -> Array:
    """Repeats the smallest and the largest: other moments, the same range."""
    new, there = values.copy(), ~np.isnan(values)
    low, high = values[there].min(), values[there].max()
    new[there] = np.where(np.arange(there.sum()) % 3 == 0, low, high)
    return new


class _Substitution(TorchFunctionMode):
    """Puts other numbers in place of the user's data."""

    def __init__(
        self,
        data: Mapping[str, Array],
        known: list[Tensor],
        substitute: Substitute,
        only: int | None,
    ) -> None:
        super().__init__()
        self.only = only  # of what is found, in order
        self.data = data
        self.substitute = substitute
        self.seen: dict[int, tuple[Tensor, Tensor]] = {id(v): (v, v) for v in known}
        self.found: list[tuple[str, Place | None, str]] = []
        self.is_running = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _KEPT:
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(self.tensor, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)

    def tensor(self, leaf: Any) -> Any:
        """Substitutes a tensor that holds the data; returns all else as it is."""
        if not isinstance(leaf, Tensor) or leaf.requires_grad or leaf.layout != torch.strided:
            return leaf
        if id(leaf) not in self.seen:
            self.seen[id(leaf)] = (leaf, self._substituted(leaf))
        return self.seen[id(leaf)][1]

    def _substituted(self, leaf: Tensor) -> Tensor:
        if leaf.dtype == torch.bool or leaf.is_complex() or not 1 < leaf.numel() <= _LARGEST:
            return leaf
        with torch._C.DisableTorchFunctionSubclass():
            values = leaf.detach().cpu().to(torch.float64).reshape(-1).numpy()
            new = self.array(values, f"a tensor of shape {list(leaf.shape)}")
            if new is values:
                return leaf
            return torch.as_tensor(new).reshape(leaf.shape).to(leaf)

    def array(self, values: Array, what: str) -> Array:
        """Substitutes numbers that are those of some data, or a stretch of them."""
        for name, theirs in self.data.items():
            if _are_from(values, theirs):
                what = what if self.is_running else "an argument"
                self.found.append((name, current_place() if self.is_running else None, what))
                chosen = self.only is None or self.only == len(self.found) - 1
                return self.substitute(values) if chosen else values
        return values

    def argument(self, value: Any) -> Any:
        """Substitutes data within an argument, in nested lists and dictionaries too."""
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, np.ndarray) and value.dtype.kind in "iuf" and value.size > 1:
            flat = value.astype(np.float64).reshape(-1)
            new = self.array(flat, "an argument")
            return value if new is flat else new.reshape(value.shape).astype(value.dtype)
        if type(value) in (list, tuple):
            if len(value) > 1 and all(type(part) in (int, float) for part in value):
                flat = np.array(value, dtype=np.float64)
                new = self.array(flat, "an argument")
                kinds = [type(part) for part in value]
                same = new is flat
                return (
                    value if same else type(value)(k(v) for k, v in zip(kinds, new, strict=True))
                )
            return type(value)(self.argument(part) for part in value)
        if type(value) is dict:
            return {key: self.argument(part) for key, part in value.items()}
        return value


def _are_from(values: Array, data: Array) -> bool:
    """Tells whether numbers are the data's: half of their fractions, or stretches of whole numbers.

    A stretch is so long that it would agree by chance once in twenty such pairs, by the entropy of
    the numbers.
    """
    ours, theirs = values.astype(np.float32), data.astype(np.float32)
    first, second = fractions(ours), fractions(theirs)
    common = int(np.isin(first, second, assume_unique=True).sum())
    if common >= 2 and 2 * common >= min(len(first), len(second)):
        return True
    if 2 * len(first) > len(ours):  # parameters, say: no whole numbers
        return False
    if len(np.unique(np.diff(ours))) < 2 or len(np.unique(theirs)) < 2:  # a range, or constants
        return False
    _, counts = np.unique(ours, return_counts=True)
    shares = counts / len(ours)
    entropy = float(-(shares * np.log(shares)).sum())
    length = math.ceil(math.log(_CHANCE * len(ours) * len(theirs)) / entropy)
    if length > min(len(ours), len(theirs)):
        return False
    known = np.concatenate([_stretches(theirs, length), _stretches(theirs[::-1], length)])
    found = np.isin(_stretches(ours, length), known)
    return bool(2 * found.sum() >= min(len(found), len(theirs) - length + 1))


def _stretches(values: Array, length: int) -> Array:
    """Gives every stretch of numbers a number of its own, up to chance."""
    bits = np.ascontiguousarray(values + np.float32(0.0)).view(np.uint32).astype(np.uint64)
    factors = np.random.RandomState(0).randint(1, 2**62, size=length).astype(np.uint64)
    total = np.zeros(len(bits) - length + 1, dtype=np.uint64)
    for place, factor in enumerate(factors | np.uint64(1)):
        total += bits[place : place + len(total)] * factor  # modulo 2 ** 64
    return total


def find_by_substitution(
    model: Fn,
    arguments: Arguments,
    latents: Mapping[str, Tensor],
    observed: Mapping[str, Tensor],
    data: Mapping[str, Tensor],
) -> tuple[str, Place | None, str] | None:
    """Finds data on which log p(z, x) of a simulated pair depends, whatever computes with them.

    Args:
        model: Pyro model with its observations.
        arguments: Its ``(args, kwargs)``, with the user's data.
        latents: Simulated latents, by site.
        observed: Simulated data, by site.
        data: The user's data, by site; sites of one number each joined.

    Returns:
        The site, the line that reads its data first and what holds them; None if none is found, or
        where the model does not run on substitutes.
    """
    numbers = {
        name: value.detach().cpu().to(torch.float64).reshape(-1).numpy()
        for name, value in data.items()
        if 1 < value.numel() <= _LARGEST and not value.is_complex()
    }
    values = {
        name: value.detach().clone().requires_grad_(value.is_floating_point())
        for name, value in {**latents, **observed}.items()
    }

    def densities(
        substitute: Substitute | None, only: int | None = None
    ) -> tuple[dict[str, float], _Substitution]:
        sought = {} if substitute is None else numbers
        search = _Substitution(sought, list(values.values()), substitute or np.copy, only)
        args, kwargs = search.argument(list(arguments[0])), search.argument(dict(arguments[1]))
        search.is_running = True
        with search, torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            trace = poutine.trace(poutine.condition(model, data=values)).get_trace(*args, **kwargs)
            mark_points(trace)
            terms = {
                name: unmasked(site["fn"]).log_prob(site["value"]).nan_to_num().sum()
                for name, site in density_sites(trace)
            }
        return {name: float(term.detach()) for name, term in terms.items()}, search

    with (
        contextlib.suppress(Exception),
        warnings.catch_warnings(),
        torch.enable_grad(),
        validation_disabled(),
        poutine.block(),
    ):
        warnings.simplefilter("ignore")
        before, _ = densities(None)
        for substitute in (_in_another_order, _extremes):
            with contextlib.suppress(Exception):  # a value that the model does not accept
                after, search = densities(substitute)
                if not search.found or not _differ(before, after):
                    continue
                for index, found in enumerate(search.found[:_MOST]):
                    with contextlib.suppress(Exception):
                        if _differ(before, densities(substitute, index)[0]):
                            return found
                return search.found[0]
    return None


def _differ(before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    if before.keys() != after.keys():
        return True
    pairs = [(before[name], after[name]) for name in before]
    return any(abs(a - b) > 1e-6 * (1.0 + abs(a)) for a, b in pairs)
