r"""Data that a model reads elsewhere than at its observed sites: copies, found by their values.

A simulated pair (z, x) is exact only if the model's densities do not depend on the user's data in
another way: lagged values from a list, a prior with the mean of the data, a closure or an attribute
that holds them. Memory addresses do not tell, since ``torch.as_tensor(np.array(x))`` is new memory.

So the model is run once more on the simulated pair while every tensor that an operation reads is
compared with the user's data. A tensor (or the numbers of a list) that shares their values is made
a variable, and what its gradient reaches is a density that depends on the user's data. Values that
the simulation replaced, as those of ``obs=x * 1.0``, reach nothing. What has no gradient is looked
for by substitution (:mod:`~.substitutes`).
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro import poutine
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from .places import Place, current_place, described
from .resemblance import how_alike, moments
from .sites import density_sites, mark_points
from .substitutes import find_by_substitution, fractions
from .types import Arguments, Array, Fn
from .validation import validation_disabled

__all__ = ["Copy", "explain_copies", "explain_likeness", "find_copies", "share_values"]


_MAX_NUMBERS = 20_000_000  # numbers that are compared in one run
_LEAST_SCALARS = 3  # single numbers that must agree: .5 and .1 are also constants of models
_LEAST_SURPRISE = 1.5  # nats: values in random order hold these neighbours once in 4 or 5 times

# Functions whose result leaves the graph, or that need numbers: their arguments stay as they are.
_UNTOUCHED = {
    *("numpy", "__array__", "tolist", "item", "__float__", "__int__", "__bool__", "__repr__"),
    *("__format__", "__index__", "data_ptr", "__dlpack__", "__reduce_ex__", "__deepcopy__"),
    *(
        "__get__",
        "__set__",
        "size",
        "dim",
        "stride",
        "numel",
        "is_floating_point",
        "requires_grad_",
    ),
    *(
        "__len__",
        "__hash__",
        "detach",
        "is_complex",
        "is_contiguous",
        "storage_offset",
        "__iter__",
    ),
}
_ARITHMETIC = {
    *("add", "sub", "mul", "div", "true_divide", "pow", "rsub", "maximum", "minimum", "where"),
    *("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__"),
    *("__rtruediv__", "__pow__", "__rpow__", "__rdiv__", "__div__", "__rpow__"),
}


class Copy(NamedTuple):
    """A copy of an observed site's data on which the densities depend, or what is like one."""

    site: str
    place: Place | None  # where it is first read
    what: str  # "a tensor of shape [3]" or "5 numbers"
    like: str = ""  # "a monotone function", if it may be like the data by chance


def _single(values: Tensor) -> Array:
    """Returns the values in single precision, so that a list in float32 equals one in float64."""
    flat = values.detach().reshape(-1).to("cpu", torch.float32).numpy()
    return flat + np.float32(0.0)  # no minus zero


def _neighbours(values: Array) -> Array:
    """Returns the distinct pairs of neighbouring values, as one number each."""
    bits = values.view(np.uint32).astype(np.uint64)
    return np.unique(bits[:-1] << np.uint64(32) | bits[1:])


def share_values(values: Tensor, data: Tensor) -> bool:
    """Tells whether a tensor holds values of some data, more of them than by chance.

    Either at least two distinct fractions, and half of all, or at least half of the pairs of
    neighbours of whole numbers, are the same, which must be unlikely for values in another order:
    two hundred labels hold most pairs of labels. Index ranges and constants do not count, nor do
    zeros and ones, of which twenty or more must agree as a whole.

    Example:
        >>> share_values(torch.tensor([0.5, -1.0, 2.0]), torch.tensor([-1.0, 2.0, 0.3]))
        True
        >>> share_values(torch.arange(4), torch.tensor([0.0, 1.0, 2.0, 5.0]))
        False
    """
    ours, theirs = _single(values), _single(data)
    if min(len(np.unique(ours)), len(np.unique(theirs))) < 2:  # constants tell nothing
        return False
    first, second = fractions(ours), fractions(theirs)
    common = int(np.isin(first, second, assume_unique=True).sum())
    if common >= 2 and 2 * common >= min(len(first), len(second)):
        return True
    steps = np.unique(np.diff(ours))
    if (len(steps) < 2 and len(ours) > 2) or len(np.unique(ours)) < 2:  # a range, or a constant
        return False
    if bool(np.isin(ours, [0.0, 1.0]).all()):
        return len(ours) >= 20 and len(ours) == len(theirs) and bool((ours == theirs).all())
    first, second = _neighbours(ours), _neighbours(theirs)
    shared = first[np.isin(first, second, assume_unique=True)]
    if not len(shared) or 2 * len(shared) < min(len(first), len(second)):
        return False
    return _surprise(shared, max(ours, theirs, key=len)) > _LEAST_SURPRISE


def _surprise(pairs: Array, values: Array) -> float:
    """Computes minus the log probability that these values in random order hold all the pairs."""
    kinds, counts = np.unique(values.view(np.uint32), return_counts=True)
    share = dict(zip(kinds.tolist(), (counts / len(values)).tolist(), strict=True))
    total = 0.0
    for pair in pairs.tolist():
        expected = (len(values) - 1) * share[pair >> 32] * share[pair & 0xFFFFFFFF]
        total -= math.log(-math.expm1(-expected))
    return total


class _Search(TorchFunctionMode):
    """Makes variables of the constants that share values with the data."""

    def __init__(self, data: Mapping[str, Tensor], known: list[Tensor]) -> None:
        super().__init__()
        self.data = data
        own = {name: fractions(_single(value)) for name, value in self.data.items()}
        self.numbers = {
            name: {float(v) for v in values}
            for name, values in own.items()
            if _LEAST_SCALARS <= len(values) <= 100_000
        }
        self.seen: dict[int, tuple[Tensor, Tensor]] = {
            id(value): (value, value) for value in known
        }
        self.moments = {name: moments(value) for name, value in self.data.items()}
        self.found: list[tuple[Copy, Tensor]] = []
        self.scalars: list[tuple[str, float, Place | None, Tensor]] = []
        self.budget = _MAX_NUMBERS

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _UNTOUCHED:
            return func(*args, **(kwargs or {}))
        arithmetic = name in _ARITHMETIC
        args, kwargs = tree_map(
            lambda leaf: self._replace(leaf, arithmetic), (tuple(args), dict(kwargs or {}))
        )
        return func(*args, **kwargs)

    def _replace(self, leaf: Any, arithmetic: bool) -> Any:
        if isinstance(leaf, float) and arithmetic:
            return self._number(leaf, leaf)
        if not isinstance(leaf, Tensor) or leaf.requires_grad or leaf.layout != torch.strided:
            return leaf
        if id(leaf) not in self.seen:
            self.seen[id(leaf)] = (leaf, self._variable(leaf))
        return self.seen[id(leaf)][1]

    def _number(self, value: float, leaf: Any) -> Any:
        rounded = float(np.float32(value))
        for name, numbers in self.numbers.items():
            if rounded in numbers:
                variable = self._made_variable(leaf)
                self.scalars.append((name, rounded, current_place(), variable))
                return variable
        for name, known in self.moments.items():
            for kind, moment in known.items():
                if abs(value - moment) <= 2e-6 * abs(moment):
                    variable = self._made_variable(leaf)
                    what = f"the number {value:.6g} (their {kind})"
                    self.found.append((Copy(name, current_place(), what), variable))
                    return variable
        return leaf

    def _made_variable(self, leaf: Any) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad():
            return torch.as_tensor(leaf).detach().clone().requires_grad_()

    def _variable(self, leaf: Tensor) -> Tensor:
        if leaf.dtype == torch.bool or leaf.is_complex() or leaf.numel() > self.budget:
            return leaf
        self.budget -= leaf.numel()
        with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad():
            if leaf.numel() == 1:
                if not leaf.is_floating_point():
                    return leaf
                made = self._number(float(leaf), leaf)
                return made if isinstance(made, Tensor) else leaf
            for name, value in self.data.items():
                same = share_values(leaf, value)
                like = "" if same else how_alike(leaf, value)
                if like is None:
                    continue
                what = f"a tensor of shape {list(leaf.shape)}"
                copy = Copy(name, current_place(), what, like)
                variable = leaf.detach().clone()
                if not leaf.is_floating_point():  # whole numbers may be indices, and stay them
                    return leaf
                self.found.append((copy, variable.requires_grad_()))
                return variable * 1.0  # which may be written to
        return leaf


def find_copies(
    model: Fn,
    arguments: Arguments,
    latents: Mapping[str, Tensor],
    observed: Mapping[str, Tensor],
    original: Mapping[str, Tensor],
) -> list[Copy]:
    """Finds copies of the data on which log p(z, x) of a simulated pair depends.

    Args:
        model: Pyro model with its observations.
        arguments: Its ``(args, kwargs)``, with the user's data.
        latents: Simulated latents, by site.
        observed: Simulated data, by site.
        original: The user's data, by site.

    Returns:
        The copies, and what is like one (``like``). Empty also where the model cannot be followed,
        as it computes with closures outside of torch, or fails where values are variables and where
        they are others.
    """
    data = _pooled(
        {n: v for n, v in original.items() if not torch.equal(v, observed[n].to(v.dtype))}
    )
    found = _find_by_gradient(model, arguments, latents, observed, data)
    if all(copy.like for copy in found):
        other = find_by_substitution(model, arguments, latents, observed, data)
        found += [] if other is None else [Copy(*other)]
    return found


def _find_by_gradient(
    model: Fn,
    arguments: Arguments,
    latents: Mapping[str, Tensor],
    observed: Mapping[str, Tensor],
    data: dict[str, Tensor],
) -> list[Copy]:
    values = {
        name: value.detach().clone().requires_grad_(value.is_floating_point())
        for name, value in {**latents, **observed}.items()
    }
    search = _Search(data, list(values.values()))
    args, kwargs = arguments
    with (
        contextlib.suppress(Exception),
        warnings.catch_warnings(),
        torch.enable_grad(),
        validation_disabled(),
        poutine.block(),
        torch.random.fork_rng(devices=()),
    ):
        warnings.simplefilter("ignore")
        with search:
            trace = poutine.trace(poutine.condition(model, data=values)).get_trace(*args, **kwargs)
            mark_points(trace)
            terms = [site["fn"].log_prob(site["value"]).sum() for _, site in density_sites(trace)]
            total = torch.stack([term for term in terms if term.requires_grad]).sum()
        variables = [variable for _, variable in search.found]
        variables += [variable for *_, variable in search.scalars]
        if variables:
            grads = torch.autograd.grad(total, variables, allow_unused=True)
            return _that_matter(search, [_is_felt(grad) for grad in grads])
    return []


def _pooled(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Joins the sites that hold one number each, as a loop over time makes them."""
    single = {name: value for name, value in data.items() if value.numel() == 1}
    joined = {name: value for name, value in data.items() if value.numel() > 1}
    if len(single) > 1:
        first, *_, last = single
        values = [value.detach().reshape(()).to("cpu", torch.float64) for value in single.values()]
        joined[f'{first}" to "{last}'] = torch.stack(values)
    return joined


def _is_felt(grad: Tensor | None) -> bool:
    return grad is not None and bool((grad != 0).any())


def _that_matter(search: _Search, felt: list[bool]) -> list[Copy]:
    copies = [copy for (copy, _), matters in zip(search.found, felt, strict=False) if matters]
    rest = felt[len(search.found) :]
    matched: dict[str, dict[float, Place | None]] = {}
    for (name, value, place, _), matters in zip(search.scalars, rest, strict=True):
        if matters:
            matched.setdefault(name, {}).setdefault(value, place)
    for name, values in matched.items():
        if len(values) >= max(_LEAST_SCALARS, 0.5 * len(search.numbers[name])):
            place = next(iter(values.values()))
            copies.append(Copy(name, place, f"{len(values)} numbers"))
    return copies


def explain_copies(copies: list[Copy]) -> str:
    """Says which data are read where."""
    first = copies[0]
    how = "was computed from" if first.what.startswith("the number") else "holds values of"
    return (
        f'the model reads the data of site "{first.site}" elsewhere than at that site: '
        f"{first.what}{described(first.place)} {how} them, and its densities depend on "
        "it, so that pairs simulated from it are not exact; let the model use the value that "
        "pyro.sample returns, or use run() for a lower bound"
    )


def explain_likeness(copy: Copy) -> str:
    """Says what would follow if numbers that are like the data were computed from them."""
    return (
        f'{copy.what}{described(copy.place)} is {copy.like} of the data of site "{copy.site}": if it '
        "was computed from them, pairs simulated from this model are not exact, and neither are "
        "bounds on them; if it is a covariate, all is well"
    )
