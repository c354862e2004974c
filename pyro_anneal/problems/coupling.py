"""Whether the rows of a batch plate meet: by proof, and by a test where no graph is."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..graphs.evaluation import LogDensities
from ..graphs.purity import rows_meet_at, undisturbed
from ..graphs.rewriting import Impure
from ..graphs.rows import Meeting, find_meeting, forward_graph
from ..models.places import user_line
from ..models.sites import BatchPlate

__all__ = ["Coupling", "find_coupling"]


class Coupling(NamedTuple):
    """Plates whose elements share one evidence, and what a reader must know of it."""

    plates: tuple[str, ...]
    notes: tuple[str, ...]


def find_coupling(
    function: LogDensities,
    plates: Sequence[BatchPlate],
    probe: Callable[[], Tensor],
    *,
    is_requested: bool,
) -> Coupling:
    """Finds the plates whose elements may influence each other's log densities.

    A plate is free of coupling where the recorded graph proves it, for every position, data and
    seed. What the proof does not cover makes the plate joint; if the user asked for the plate, an
    operation without a rule is let pass when a test at two positions finds nothing.

    Args:
        function: One chain's log densities, in the layout with these plates as batch.
        plates: The batch plates.
        probe: Finds a finite position.
        is_requested: Whether the user asked for these plates by name.

    Returns:
        The coupled plates, and notes.

    Raises:
        ValueError: If the user asked for a plate whose elements meet.
    """
    wide = [(axis, plate) for axis, plate in enumerate(plates) if plate.size > 1]
    if not wide:
        return Coupling((), ())
    try:
        graph = forward_graph(function, probe())
    except Impure:
        raise
    except Exception as error:  # noqa: BLE001 - anything that a tracer or a model may raise
        names = _tested(function, wide, probe, is_requested)
        reason = f"{_first_line(error)}{user_line(traceback.extract_tb(error.__traceback__))}"
        only = [plate.name for _, plate in wide if plate.name not in names]
        note = (
            f"that elements of plate(s) {only} do not influence each other is tested at a few "
            f"positions, not proven: the model cannot be recorded ({reason})"
        )
        return Coupling(names, (*_shared(names), *([note] if only else [])))
    found = {plate.name: find_meeting(graph, axis, plate.size) for axis, plate in wide}
    meetings = {name: meeting for name, meeting in found.items() if meeting is not None}
    if not is_requested:
        return Coupling(tuple(meetings), tuple(_note(n, m) for n, m in meetings.items()))
    for name, meeting in meetings.items():
        if meeting.is_known:
            raise _refusal([name], f" ({meeting})")
    if meetings:
        _tested(function, wide, probe, is_requested)
    return Coupling((), tuple(_unproven(n, m) for n, m in meetings.items()))


def _note(name: str, meeting: Meeting) -> str:
    if not meeting.is_known:
        return (
            f"elements of plate(s) {[name]} share one evidence, since it is not proven that they do "
            f"not influence each other ({meeting}); batch_plates=[{name!r}] overrules this"
        )
    return (
        f"elements of plate(s) {[name]} influence each other ({meeting}): they share one evidence"
    )


def _unproven(name: str, meeting: Meeting) -> str:
    return (
        f"that elements of plate(s) {[name]} do not influence each other is tested at a few "
        f"positions, not proven ({meeting})"
    )


def _shared(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    return [f"elements of plate(s) {list(names)} influence each other: they share one evidence"]


def _refusal(names: Sequence[str], why: str = "") -> ValueError:
    return ValueError(
        f"elements of plate(s) {list(names)} influence each other's log density in spite of the "
        f"plate{why or ' (a mean over rows, BatchNorm in the decoder)'}: leave them out of "
        "batch_plates to treat the plate jointly"
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _tested(
    function: LogDensities,
    wide: Sequence[tuple[int, BatchPlate]],
    probe: Callable[[], Tensor],
    is_requested: bool,
) -> tuple[str, ...]:
    """Names the plates whose elements move each other's log densities at some positions.

    Two draws a and b are mixed along one plate, half of its elements from each: an element whose
    latents come from a must have the densities it has at a, whatever its neighbours do. Gradients
    with weighted rows tell all pairs at once.
    """
    first, second = probe(), probe()
    coupled = []
    with undisturbed(first.device), torch.no_grad():
        ends = function(first), function(second)
        for axis, plate in wide:
            shape = [plate.size if i == axis else 1 for i in range(first.dim() - 1)]
            generator = torch.Generator("cpu").manual_seed(0)
            for _ in range(4):
                order = torch.randperm(plate.size, generator=generator, device="cpu")
                take = (order < plate.size // 2).reshape(shape).to(first.device)
                mixed = function(torch.where(take.unsqueeze(-1), second, first))
                if any(
                    _differ(torch.where(take, b, a), m)
                    for a, b, m in zip(*ends, mixed, strict=True)
                ):
                    coupled.append(plate.name)
                    break
        if not coupled and any(rows_meet_at(function, position) for position in (first, second)):
            coupled = [plate.name for _, plate in wide]
    if coupled and is_requested:
        raise _refusal(coupled)
    return tuple(coupled)


def _differ(expected: Tensor, value: Tensor) -> bool:
    """Compares log densities where they are finite, up to rounding."""
    tolerance = 1e-10 if expected.dtype == torch.float64 else 1e-4
    same: Any = (value - expected).abs() <= tolerance * (1.0 + expected.abs())
    return not bool((same | ~expected.isfinite()).all())
