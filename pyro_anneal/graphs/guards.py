"""Guards: for which other data a recording with exits stays right."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from .exits import Influence
from .rewriting import Unsupported, dependent_nodes

__all__ = ["Guards", "split_guards"]


@dataclass(frozen=True, eq=False)
class Guards:
    """Computes anew what left a recording, and compares it with what left then."""

    graph: fx.GraphModule  # (position, *constants) -> values; does not depend on the position
    position: Tensor
    num_constants: int
    values: tuple[Tensor, ...]
    only_shapes: tuple[bool, ...]

    def hold(self, constants: Sequence[Tensor]) -> bool:
        """Tells whether what leaves is the same with these constants."""
        given = [constant.detach() for constant in constants[: self.num_constants]]
        try:
            with torch.no_grad():
                found = self.graph(self.position, *given)
        except (RuntimeError, ValueError, IndexError):  # a shape that follows from values
            return False
        return all(
            old.shape == new.shape
            and (only_shape or torch.equal(old, new) or _equal_with_nan(old, new))
            for old, new, only_shape in zip(self.values, found, self.only_shapes, strict=True)
        )


def _equal_with_nan(old: Tensor, new: Tensor) -> bool:
    return bool(((old == new) | (old.isnan() & new.isnan())).all())


def split_guards(
    graph: fx.GraphModule, position: Tensor, constants: Sequence[Tensor], noted: Influence
) -> Guards | None:
    """Takes the guards, the last outputs of a recorded graph, out of it.

    Args:
        graph: Graph of ``(position, *constants)``; changed in place.
        position: Example position.
        constants: What the graph reads.
        noted: What left while it was recorded.

    Returns:
        The guards; None if nothing left.

    Raises:
        Unsupported: If a guard depends on the position after all.
    """
    count = len(noted.guards)
    if not count:
        return None
    (output,) = [node for node in graph.graph.nodes if node.op == "output"]
    outputs = tuple(output.args[0])
    guards = copy.deepcopy(graph.graph)
    (guarded,) = [node for node in guards.nodes if node.op == "output"]
    guarded.args = (tuple(guarded.args[0])[-count:],)
    guards.eliminate_dead_code()
    output.args = (outputs[:-count],)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    module = fx.GraphModule(torch.nn.Module(), guards)
    if not dependent_nodes(module).isdisjoint(guarded.all_input_nodes):
        raise Unsupported("a number that left the graph depends on the position")
    with torch.no_grad():
        values = module(position, *(constant.detach() for constant in constants))
    only_shapes = tuple(guard.only_shape for guard in noted.guards)
    return Guards(module, position, len(constants), tuple(values), only_shapes)
