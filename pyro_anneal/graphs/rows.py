"""A proof that rows of a plate do not meet, read from the recorded graph of one chain.

Log densities are granted to each row of a plate where no operation lets rows meet: the axis of the
plate is followed from the position through every operation to the outputs, by one table of rules
(:mod:`~pyro_anneal.graphs.row_rules`). The proof holds for every position and every seed; constants
(data, parameters) may be anything.
"""

from __future__ import annotations

import operator
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.passes.shape_prop import ShapeProp

from ..models.places import described
from .evaluation import LogDensities
from .purity import undisturbed
from .recording import record
from .row_rules import Call, Meet, Result, Rows, rule_of, unknown

__all__ = ["Meeting", "find_meeting", "forward_graph"]


@dataclass(frozen=True)
class Meeting:
    """Where rows of a plate meet, or may meet."""

    operation: str
    place: str  # the line of the model, " at model.py:12 (...)"; empty if not known
    how: str
    is_known: bool  # False where the table has no rule for the operation

    def __str__(self) -> str:
        return f"{self.operation}{self.place}: {self.how}"


def forward_graph(function: LogDensities, position: Tensor) -> fx.GraphModule:
    """Records both log densities of one chain, without gradients.

    Args:
        function: One chain's ``(log_base, log_target)``.
        position: Where to record, ``[*batch, D]``.

    Returns:
        The graph, with the shapes of all values.

    Raises:
        Exception: Whatever keeps the function from being recorded.
    """

    def densities(leaf: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            log_base, log_target = function(leaf.detach().requires_grad_())
        return log_base.detach(), log_target.detach()

    with undisturbed(position.device), torch.inference_mode(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the model's own show when it is captured
        graph, constants, _ = record(densities, position)
        (output,) = [node for node in graph.graph.nodes if node.op == "output"]
        output.args = (tuple(output.args[0])[:2],)
        graph.graph.eliminate_dead_code()
        ShapeProp(graph).propagate(position, *(constant.detach() for constant in constants))
    return graph


def find_meeting(graph: fx.GraphModule, axis: int, size: int) -> Meeting | None:
    """Follows the rows of one plate through a graph.

    Args:
        graph: Graph of ``(position, *constants)`` with shapes, as :func:`forward_graph` makes it.
        axis: The plate's axis in the position and in each output.
        size: Number of rows, at least 2.

    Returns:
        None if rows are proven not to meet; else the first operation where they may.
    """
    rows: dict[fx.Node, Result] = {}
    position, *others = graph.graph.nodes
    rows[position] = Rows(axis)
    for node in others:
        if node.op == "output":
            for value in node.args[0]:
                if rows.get(value) not in (None, Rows(axis)):
                    return Meeting("the result", "", "rows lie along another axis", True)
        elif node.op == "call_function":
            try:
                result = _through(node, rows, size)
            except Meet as error:
                name = getattr(node.target, "__name__", str(node.target))
                place = described(node.meta.get("place"))
                is_known = rule_of(node.target) is not unknown
                return Meeting(f"torch.{name.split('.')[0]}", place, str(error), is_known)
            if result is not None:
                rows[node] = result
    return None


def _through(node: fx.Node, rows: dict[fx.Node, Result], size: int) -> Result:
    if not any(argument in rows for argument in node.all_input_nodes):
        return None
    if node.target is operator.getitem:
        source, at = node.args
        parts = rows[source]  # type: ignore[index]
        return parts[at] if isinstance(parts, tuple) else parts  # type: ignore[index]
    return rule_of(node.target)(Call(node, rows, size))
