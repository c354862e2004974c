"""Functions of one chain, run once for all chains.

A model is written for one chain. Under :func:`torch.vmap` one run of it gives the draws, or the
values, of K chains. Where that cannot be done it is run chain by chain: a model that branches on a
latent, leaves torch, or draws noise that is not torch's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..models.density import ModelDensity
from ..persistence.randomness import random_state, set_random_state

__all__ = ["draw_chains", "draw_prior_chains", "map_chains"]

# Numbers that one run of a model may hold at once, in the largest of its sites.
_MOST_NUMBERS = 2**24

# What makes a tensor to be filled in place afterwards, by noise as a rule.
_MAKERS = frozenset(
    {
        torch.empty,
        torch.empty_like,
        torch.zeros,
        torch.zeros_like,
        Tensor.new,
        Tensor.new_empty,
        Tensor.new_zeros,
    }
)


class _OfEachChain(TorchFunctionMode):
    """Gives every chain its own copy of the tensors that are made to be filled in place.

    vmap cannot put K different numbers into one tensor, and says so.
    """

    def __init__(self, zero: Tensor) -> None:
        super().__init__()
        self.zero = zero  # one number of each chain, all of them zero

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs one function."""
        made = func(*args, **(kwargs or {}))
        if func in _MAKERS and made.dtype != torch.bool:
            return made + self.zero.to(made)
        return made


@contextlib.contextmanager
def _dirichlet_without_gradient() -> Iterator[None]:
    """Draws from Dirichlet and Beta by the operation itself: vmap does not know its autograd."""
    try:
        from torch.distributions.dirichlet import _Dirichlet
    except ImportError:  # another version of torch
        yield
        return
    with mock.patch.object(_Dirichlet, "apply", staticmethod(torch._sample_dirichlet)):
        yield


def _chunks(count: int, numbers: int) -> list[int]:
    size = max(1, _MOST_NUMBERS // max(numbers, 1))
    return [min(size, count - start) for start in range(0, count, size)]


def draw_chains(
    draw: Callable[[], Tensor],
    count: int,
    *,
    numbers: int,
    device: torch.device,
    alone: Callable[[], Tensor] | None = None,
    vouched: set[str] | None = None,
    kind: str = "",
) -> Tensor:
    """Draws independently for K chains, by as few calls as possible.

    One call may draw for all chains only if its noise is torch's own: it is made twice from the
    same state of the generators, and must give the same draws again. Noise of NumPy, say, would be
    the same for all chains. What was found of one kind of draw is remembered in ``vouched``.

    Args:
        draw: Draws for one chain, with torch's global generator; it raises where it cannot.
        count: Number K of chains.
        numbers: Numbers that one chain's largest tensor holds; it bounds the chains at once.
        device: Where the draws live.
        alone: Draws for one chain where chains are drawn one by one, in place of ``draw``; it may
            deal with the failure of one chain.
        vouched: Kinds of draws whose noise is known to be torch's own; such draws are made once.
        kind: Of these draws.

    Returns:
        Draws ``[K, ...]``.
    """
    vouched = set() if vouched is None else vouched
    known = kind in vouched
    with torch.no_grad():
        if count > 1:
            before = random_state()
            try:
                parts = [
                    _draw_at_once(draw, n, device, once=known) for n in _chunks(count, numbers)
                ]
            except Exception:  # noqa: BLE001 - whatever vmap does not know, or one chain's failure
                set_random_state(before)
            else:
                if all(part is not None for part in parts):
                    vouched.add(kind)
                    return torch.cat([part for part in parts if part is not None])
                set_random_state(before)
        return torch.stack([(alone or draw)() for _ in range(count)])


def _draw_at_once(
    draw: Callable[[], Tensor], count: int, device: torch.device, *, once: bool
) -> Tensor | None:
    """Draws for several chains by one call; None where noise is not torch's own."""

    def one(zero: Tensor) -> Tensor:
        with _OfEachChain(zero), _dirichlet_without_gradient():
            return draw()

    def of_all() -> Tensor:
        drawn: Tensor = torch.vmap(one, randomness="different")(torch.zeros(count, device=device))
        return drawn

    before = random_state()
    first = of_all()
    if once:
        return first
    set_random_state(before)
    second = of_all()
    if not torch.equal(first.nan_to_num(), second.nan_to_num()):
        return None
    if count > 1 and first[0].numel() and bool((first == first[:1]).all()):
        return None
    return second


def map_chains(
    function: Callable[[Any], Any], chains: Tensor | Mapping[str, Tensor], *, numbers: int
) -> Any:
    """Computes a function of each of K chains, by as few calls as possible.

    Args:
        function: Of one chain's tensor, or of its tensors by name; returns a tensor or tensors by
            name.
        chains: Tensors ``[K, ...]``.
        numbers: As of :func:`draw_chains`.

    Returns:
        What the function returns, with K first.
    """
    given = dict(chains) if isinstance(chains, Mapping) else chains
    leaves = list(given.values()) if isinstance(given, dict) else [given]
    count = len(leaves[0])
    if count > 1:
        with contextlib.suppress(Exception):  # whatever vmap does not know, or one chain's failure
            sizes = _chunks(count, numbers)
            parts = [
                torch.vmap(function, randomness="different")(part) for part in _split(given, sizes)
            ]
            return _join(parts, torch.cat)
    return _join([function(_one(part)) for part in _split(given, [1] * count)], torch.stack)


def _split(chains: Any, sizes: list[int]) -> list[Any]:
    if isinstance(chains, Tensor):
        return list(chains.split(sizes))
    split = {name: value.split(sizes) for name, value in chains.items()}
    return [{name: value[k] for name, value in split.items()} for k in range(len(sizes))]


def _one(part: Any) -> Any:
    return part[0] if isinstance(part, Tensor) else {n: value[0] for n, value in part.items()}


def _join(parts: list[Any], how: Callable[[list[Tensor]], Tensor]) -> Any:
    if isinstance(parts[0], Tensor):
        return how(parts)
    return {name: how([part[name] for part in parts]) for name in parts[0]}


def draw_prior_chains(
    model: ModelDensity, count: int, *, vouched: set[str] | None = None
) -> Tensor:
    """Draws positions from the prior, NaN where the model fails.

    Args:
        model: The model's side of the path.
        count: Number N of draws.
        vouched: As of :func:`draw_chains`; ``PriorBase`` is the kind of these draws.

    Returns:
        Positions ``[N, *batch, D]``.
    """
    layout = model.layout

    def alone() -> Tensor:
        try:
            return model.draw_prior()
        except (ValueError, RuntimeError):  # the model fails at this draw
            shape = (*layout.batch_shape, layout.dim)
            return torch.full(shape, torch.nan, device=layout.device)

    numbers = max([layout.dim, *(value.numel() for value in layout.observed.values())])
    draws = draw_chains(
        model.draw_prior,
        count,
        numbers=numbers,
        device=layout.device,
        alone=alone,
        vouched=vouched,
        kind="PriorBase",
    )
    return draws.to(layout.dtype)
