r"""The graph of one annealing step: a move, an increment of the weights, a row of statistics.

A body maps ``(index, *carry, *inputs)`` to ``(index + 1, *carry)``, all of fixed shapes, so that it
can be the body of a loop. Everything that changes from step to step (beta, step size, scale, noise)
lies in tables with one row per step, of which the body reads row ``index``.

Small models keep chains last: the innermost loops of the compiled code then run over chains, and
the whole state is one buffer per dtype, ``[rows, K]``, since every separate tensor costs a few
tenths of a microsecond per step. Models with matrix products keep chains first, as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx

from ..chains.path import StepTable
from ..graphs.folding import simplify
from ..graphs.matrix_products import right_operands
from ..graphs.recording import flat_graph
from ..graphs.repetition import ComputeOnce, WrittenTo
from ..graphs.rewriting import lift_constants
from ..kernels import Kernel, State, Tuning
from ..kernels.base import moves_chains_alone
from .chains_last import Transposing, over_chains_last
from .statistics import in_passes, new_table, with_column
from .storage import (
    Shared,
    StorageLayout,
    Template,
    by_dtype,
    pack,
    store_table,
    unpack,
)

__all__ = ["Body", "DensityGraphs", "build_body"]

# Fewer chains than a vector register holds waste most of it.
_CHAINS_LAST_FROM = 8


class DensityGraphs(NamedTuple):
    """Graphs of one density with the tensors to call them with."""

    one_chain: tuple[fx.GraphModule, list[Tensor]]
    all_chains: tuple[fx.GraphModule, list[Tensor]]


@dataclass(frozen=True, eq=False)
class Body:
    """The graph of one step, ready to be compiled.

    Attributes:
        graph: ``(index, *carry, statistics, *tables, *noise, *shared)`` to
            ``(index + 1, *carry, statistics)``.
        layout: How its arguments are stored.
        size: Rows of the tables.
        constants: Tensors of the kernel's own, the last inputs.
    """

    graph: fx.GraphModule
    layout: StorageLayout
    size: int
    constants: tuple[Tensor, ...]

    @property
    def num_carried(self) -> int:
        """Number of tensors that one step hands to the next, the index among them."""
        if not self.layout.last:
            return 2 + len(self.layout.carried)
        return 2 + len(by_dtype([template.dtype for template in self.layout.carried]))


Step = Callable[..., tuple[Tensor, ...]]


def _step_function(
    kernel: Kernel, graph: fx.GraphModule, num_noise: int, *, one_chain: bool
) -> Step:
    """Writes a kernel's step as a function of a flat list of tensors with chains first."""

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        state, noise = State(*tensors[:5]), tensors[5 : 5 + num_noise]
        beta, step_size, scale, *shared = tensors[5 + num_noise :]

        def density(position: Tensor) -> State:
            if one_chain:
                outputs = graph(position.squeeze(0), *shared)
                return State(position, *(output.unsqueeze(0) for output in outputs))
            return State(position, *graph(position, *shared))

        new, info = kernel.step(state, density, beta, Tuning(step_size, scale), noise)
        shape = new.log_base.shape
        return (*new, info.accept_prob.expand(shape), info.diverging.expand(shape))

    return step


def _template(tensor: Tensor, *, drop_chains: bool) -> Template:
    return Template(tensor.shape[1:] if drop_chains else tensor.shape, tensor.dtype)


def build_body(
    graphs: DensityGraphs,
    kernel: Kernel,
    state: State,
    noise: Sequence[Tensor],
    table: StepTable,
    size: int,
) -> Body:
    """Records one step of a kernel as a graph.

    Args:
        graphs: The density of one chain and of all chains.
        kernel: Its ``step`` is run on tensors without values.
        state: Example of K chains.
        noise: Example of the noise of one step.
        table: Example, one row at least.
        size: Rows of the tables of the compiled program.

    Returns:
        The body, chains last where that is faster.

    Raises:
        Exception: Whatever a step that cannot be recorded raises.
    """
    count = len(state.position)
    each = moves_chains_alone(kernel)
    if each and count >= _CHAINS_LAST_FROM and all(len(part) == count for part in noise):
        with contextlib.suppress(Transposing):
            return _build(graphs, kernel, state, noise, table, size, last=True)
    return _build(graphs, kernel, state, noise, table, size, last=False)


def _build(
    graphs: DensityGraphs,
    kernel: Kernel,
    state: State,
    noise: Sequence[Tensor],
    table: StepTable,
    size: int,
    *,
    last: bool,
) -> Body:
    graph, shared = graphs.one_chain if last else graphs.all_chains
    weights = [torch.zeros_like(state.log_target, dtype=torch.float64) for _ in range(2)]
    chains = slice(0, 1) if last else slice(None)
    row = [part[0] for part in table[:3]]
    per_chain = [part[chains].contiguous() for part in (*state, *noise)]
    step = flat_graph(
        _step_function(kernel, graph, len(noise), one_chain=last), *per_chain, *row, *shared
    )
    constants = lift_constants(step)  # tensors that the kernel made or holds
    right = right_operands(step)
    step = simplify(step)
    first = len(per_chain) + len(row)
    count = len(state.position)
    layout = StorageLayout(
        last,
        count,
        tuple(_template(x, drop_chains=last) for x in (*state, *weights)),
        tuple(_template(x, drop_chains=last) for x in noise),
        tuple(
            Shared.of(tensor, transposed=first + index in right, chains_last=last)
            for index, tensor in enumerate(shared)
        ),
    )
    body = _body_function(step, layout, [part.shape[1:] for part in table[:3]])
    example = [
        torch.zeros((), dtype=torch.long, device=state.position.device),
        *layout.store([*state, *weights]),
        new_table(size, state),
        *store_table(StepTable(*(column[:1] for column in table)), size),
        *layout.store_noise([part.unsqueeze(0) for part in noise], size),
        *layout.store_shared(shared),
        *constants,
    ]

    def once(*tensors: Tensor) -> tuple[Tensor, ...]:
        with ComputeOnce(invert=True):
            return body(*tensors)

    with torch.no_grad():
        try:
            recorded = flat_graph(once, *example)
        except WrittenTo:
            recorded = flat_graph(body, *example)
    constants += lift_constants(recorded)
    return Body(simplify(recorded), layout, size, tuple(constants))


def _body_function(
    step: fx.GraphModule, layout: StorageLayout, tuning_shapes: Sequence[Sequence[int]]
) -> Step:
    """Wraps one step into reading rows of tables, weighing, and taking statistics."""
    num_carried = len(layout.carried)
    dtypes = [template.dtype for template in layout.carried]
    num_buffers = len(by_dtype(dtypes)) if layout.last else num_carried
    noise_groups = by_dtype([template.dtype for template in layout.noise])
    num_noise = len(noise_groups) if layout.last else len(layout.noise)

    def body(index: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        where = index.reshape(1)

        def at_index(rows: Tensor) -> Tensor:
            return rows.index_select(0, where).squeeze(0)

        buffers, rest = tensors[:num_buffers], tensors[num_buffers:]
        statistics, tuning, quadrature, *rest_list = rest
        noise = [at_index(part) for part in rest_list[:num_noise]]
        shared = rest_list[num_noise:]
        own = len(shared) - num_own_constants
        values = [*layout.load_shared(shared[:own]), *shared[own:]]
        row = _split_row(at_index(tuning), tuning_shapes)
        width, weight = at_index(quadrature).unbind(0)
        if layout.last:
            *state, log_weights, integral = unpack(buffers, layout.carried, layout.count)
            parts = unpack(noise, layout.noise, layout.count)
            each = [part.unsqueeze(0) for part in (*state, *parts)]
            found = over_chains_last(step, each, [*row, *values])
            outputs = [part.squeeze(0) for part in found]
        else:
            *state, log_weights, integral = buffers
            outputs = list(step(*state, *noise, *row, *values))
        *new, accept_prob, diverging = outputs
        log_base, log_target = new[1:3]
        ratio = log_target.double() - log_base.double()
        ratio = torch.where(ratio.isnan(), -torch.inf, ratio)
        seen = in_passes(ratio, accept_prob, diverging, chain_dim=-1 if layout.last else 0)
        carried = [*new, log_weights + width * ratio, integral + weight * ratio]
        typed = [part.to(dtype) for part, dtype in zip(carried, dtypes, strict=True)]
        packed = pack(typed, layout.count) if layout.last else [x.contiguous() for x in typed]
        return (index + 1, *packed, with_column(statistics, index, seen))

    num_step_inputs = sum(node.op == "placeholder" for node in step.graph.nodes)
    num_own_constants = (
        num_step_inputs - 5 - len(layout.noise) - len(tuning_shapes) - len(layout.shared)
    )
    return body


def _split_row(row: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    sizes = [torch.Size(shape).numel() for shape in shapes]
    parts = row.split(sizes)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
