"""Branches on latents: a function is recorded along each way, and every chain takes its own.

``if z > 0`` reads a value that differs between chains, so one way through the model is no graph for
all. The function is run once per way, with the outcomes of its branches given; what each branch
asked is recorded beside the results, and the results of the way whose answers all hold are chosen.
Gradients are chosen like values, so what another way gives, NaN included, does not reach them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.places import Place, current_place

__all__ = ["Branches", "Untaken", "along_branches"]

_MOST_WAYS = 8


class Untaken(Exception):
    """There are more ways than are worth recording, or one of them cannot be recorded."""


@dataclass(frozen=True, eq=False)
class _Way:
    outcomes: tuple[bool, ...]
    holds: Tensor | None  # whether a chain takes it, []; None without branches
    results: tuple[Tensor, ...]


class Branches:
    """Decides which way branches go while a function is recorded, and notes what they asked."""

    def __init__(self) -> None:
        self._given: tuple[bool, ...] = ()
        self._outcomes: list[bool] = []
        self._holds: Tensor | None = None
        self.is_open = False  # whether branches may be taken at all
        self.place: Place | None = None  # of the first branch

    def take(self, condition: Tensor, value: bool) -> bool:
        """Takes a branch: as given, or as it goes here.

        Args:
            condition: One number, which depends on the position.
            value: Its truth at the position where the function is recorded.

        Returns:
            The outcome.
        """
        self.place = self.place or current_place()
        number = len(self._outcomes)
        outcome = self._given[number] if number < len(self._given) else value
        self._outcomes.append(outcome)
        holds = (condition.detach() != 0).reshape(()) == outcome
        self._holds = holds if self._holds is None else self._holds & holds
        return outcome

    def follow(self, function: Callable[[], tuple[Tensor, ...]], given: tuple[bool, ...]) -> _Way:
        """Runs a function with the outcomes of its first branches given."""
        self._given, self._outcomes, self._holds, self.is_open = given, [], None, True
        try:
            results = function()
        finally:
            self.is_open = False
        return _Way(tuple(self._outcomes), self._holds, results)

    def failed(self, results: Sequence[Tensor]) -> _Way:
        """Gives the way just followed, which raised, these results."""
        return _Way(tuple(self._outcomes), self._holds, tuple(results))


def along_branches(
    function: Callable[[], tuple[Tensor, ...]], branches: Branches
) -> tuple[Tensor, ...]:
    """Runs a function along all ways through its branches on the position.

    Args:
        function: Returns tensors, the same number and shapes along each way.
        branches: Asked by whoever sees a branch.

    Returns:
        The results, chosen by what the branches ask.

    Raises:
        Untaken: If there are more than eight ways, or any but the first cannot be recorded.
        Exception: Whatever the function raises along the first. Along others an error of the model
            is NaN, as where a model raises at one position.
    """
    ways: list[_Way] = []
    waiting: list[tuple[bool, ...]] = [()]
    while waiting:
        if len(ways) == _MOST_WAYS:
            raise Untaken
        given = waiting.pop()
        try:
            way = branches.follow(function, given)
        except (ValueError, ArithmeticError, RuntimeError):  # the model fails along this way
            if not ways:
                raise
            way = branches.failed([torch.full_like(x, torch.nan) for x in ways[0].results])
        except Exception as error:
            if not ways:
                raise
            raise Untaken from error
        ways.append(way)
        for number in range(len(given), len(way.outcomes)):
            waiting.append((*way.outcomes[:number], not way.outcomes[number]))
    chosen = ways[0].results
    for way in ways[1:]:
        if way.holds is not None:
            pairs = zip(way.results, chosen, strict=True)
            chosen = tuple(torch.where(way.holds, own, other) for own, other in pairs)
    return chosen
