r"""The graph of one annealing step: a move, an increment of the weights, a row of statistics.

A body maps ``(index, *carry, *inputs)`` to ``(index + 1, *carry)``, all of fixed shapes, so that it
can be the body of a loop. Everything that changes from step to step (beta, step size, scale, noise)
lies in tables with one row per step, of which the body reads row ``index``.

Small models keep chains last: the innermost loops of the compiled code then run over chains, and
the whole state is one buffer per dtype, ``[rows, K]``, since every separate tensor costs a few
tenths of a microsecond per step. Models with matrix products keep chains first, as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx

from .chains_last import Transposing, over_chains_last
from .graph_folding import simplify
from .graph_passes import lift_constants
from .graphs import flat_graph
from .kernels import Kernel, State, Tuning
from .matrix_products import right_operands
from .repetition import ComputeOnce, WrittenTo, narrowed, repeated_dims
from .step_statistics import in_one_pass, in_passes, last_mean, new_table, with_column
from .unrolled import CannotUnroll, count_operations, over_chains_unrolled

__all__ = ["UNROLL_UP_TO", "Body", "DensityGraphs", "Layout", "StepTable", "build_body"]

# Fewer chains than a vector register holds waste most of it.
_CHAINS_LAST_FROM = 8
# Shared tensors up to this size are packed into one buffer.
_PACK_UP_TO = 4096
# With chains first, a short row that repeats would split one long loop into loops over its length:
# it is stored as often as it repeats, unless that takes too many numbers.
_SHORT_ROW = 64
_STORE_REPEATED_UP_TO = 2**18
# Operations of a step, element by element; inductor takes some 5 milliseconds for each.
UNROLL_UP_TO = 4000


class StepTable(NamedTuple):
    """What changes from step to step apart from the noise, one row per step."""

    beta: Tensor  # [n], of the position's dtype
    step_size: Tensor  # [n, *batch]
    scale: Tensor  # [n, *batch, D]
    width: Tensor  # beta_t - beta_{t-1} of the increment after the move, float64, [n]
    quadrature: Tensor  # weight of the state after the move in the integral over beta, [n]


class DensityGraphs(NamedTuple):
    """Graphs of one density with the tensors to call them with."""

    one_chain: tuple[fx.GraphModule, list[Tensor]]
    all_chains: tuple[fx.GraphModule, list[Tensor]]


class Template(NamedTuple):
    """Shape without the dimension of chains last, and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Shared(NamedTuple):
    """How a tensor that all chains and steps share is stored: nothing twice but short rows."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    repeated: tuple[int, ...]  # dimensions along which one number repeats
    transposed: bool  # columns of a matrix as rows

    @classmethod
    def of(cls, tensor: Tensor, *, transposed: bool, chains_last: bool) -> Shared:
        """Describes a tensor."""
        repeated = repeated_dims(tensor)
        if repeated and not chains_last and tensor.dim() - 1 not in repeated:
            is_short = tensor.shape[-1] < _SHORT_ROW and tensor.numel() <= _STORE_REPEATED_UP_TO
            repeated = () if is_short else repeated
        return cls(tuple(tensor.shape), tensor.dtype, repeated, transposed and not repeated)

    @property
    def stored_shape(self) -> torch.Size:
        """Shape without repetitions."""
        sizes = enumerate(self.shape)
        stored = [1 if dim in self.repeated else size for dim, size in sizes]
        return torch.Size(stored[::-1] if self.transposed else stored)

    @property
    def small(self) -> bool:
        """Whether it is packed with others."""
        return self.stored_shape.numel() <= _PACK_UP_TO

    def store(self, tensor: Tensor) -> Tensor:
        """Drops repetitions."""
        tensor = narrowed(tensor, self.repeated)
        return tensor.mT if self.transposed else tensor

    def load(self, stored: Tensor) -> Tensor:
        """Inverts :meth:`store`."""
        stored = stored.reshape(self.stored_shape)
        return stored.mT if self.transposed else stored.expand(self.shape)


@dataclass(frozen=True)
class Layout:
    """How tensors are stored between steps.

    Attributes:
        last: Whether chains are the last dimension, and tensors of one dtype share a buffer.
        unrolled: Whether, moreover, tensors are taken apart into vectors over chains.
        count: Number K of chains.
        lanes: Columns of a buffer with chains last. Those after K repeat the first chains.
        carried: State, log-weights and integral, one chain each if chains are last.
        noise: Likewise, the noise of one step.
        shared: What all chains and steps share.
    """

    last: bool
    unrolled: bool
    count: int
    lanes: int
    carried: tuple[Template, ...]
    noise: tuple[Template, ...]
    shared: tuple[Shared, ...]

    def store(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Turns tensors with chains first into what a loop carries."""
        if not self.last:
            return [tensor.contiguous() for tensor in tensors]
        lanes = [[self._filled(tensor.movedim(0, -1))] for tensor in tensors]
        return _pack(lanes, self.lanes)

    def load(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """Turns what a loop carried into tensors with chains first."""
        if not self.last:
            return list(buffers)
        tensors = _unpack(buffers, self.carried, self.lanes)
        return [tensor[..., : self.count].movedim(-1, 0).contiguous() for tensor in tensors]

    def _filled(self, tensor: Tensor) -> Tensor:
        """Repeats the first of K chains in the lanes after them."""
        if self.lanes == self.count:
            return tensor
        return torch.cat([tensor, tensor[..., : self.lanes - self.count]], -1)

    def store_noise(self, steps: Sequence[Sequence[Tensor]], size: int) -> list[Tensor]:
        """Turns the noise of several steps into tables of ``size`` rows, one per step."""
        parts = [torch.stack(part) for part in zip(*steps, strict=True)]
        if not self.last:
            return [_padded(part, size) for part in parts]
        tables = []
        for group in _by_dtype([template.dtype for template in self.noise]):
            rows = [parts[i].movedim(1, -1).reshape(len(steps), -1, self.count) for i in group]
            table = rows[0].new_zeros(size, sum(x.shape[1] for x in rows), self.lanes)
            filled = table[: len(steps)]
            torch.cat(rows, 1, out=filled[..., : self.count])
            filled[..., self.count :] = filled[..., : self.lanes - self.count]
            tables.append(table)
        return tables

    def store_shared(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Packs the small ones of the tensors that all chains share."""
        pairs = list(zip(self.shared, tensors, strict=True))
        small = [[how.store(tensor)] for how, tensor in pairs if how.small]
        return [
            *_pack(small, 1),
            *(how.store(tensor).contiguous() for how, tensor in pairs if not how.small),
        ]

    def load_shared(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """Inverts :meth:`store_shared`."""
        small = [Template(how.stored_shape, how.dtype) for how in self.shared if how.small]
        packed = len(_by_dtype([template.dtype for template in small]))
        unpacked = iter(_unpack(buffers[:packed], small, 1))
        large = iter(buffers[packed:])
        return [how.load(next(unpacked if how.small else large)) for how in self.shared]


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
    layout: Layout
    size: int
    constants: tuple[Tensor, ...]

    @property
    def num_carried(self) -> int:
        """Number of tensors that one step hands to the next, the index among them."""
        if not self.layout.last:
            return 2 + len(self.layout.carried)
        return 2 + len(_by_dtype([template.dtype for template in self.layout.carried]))


def _lanes(count: int, item_size: int) -> int:
    """Widens rows that begin at the same places of the processor's cache, by one line of it."""
    return count + 64 // item_size if count * item_size % 2048 == 0 else count


def _by_dtype(dtypes: Sequence[torch.dtype]) -> list[list[int]]:
    groups: dict[torch.dtype, list[int]] = {}
    for index, dtype in enumerate(dtypes):
        groups.setdefault(dtype, []).append(index)
    return list(groups.values())


def _pack(tensors: Sequence[Sequence[Tensor]], count: int) -> list[Tensor]:
    """Joins tensors of one dtype, each in parts ``[*shape, count]``, into ``[rows, count]``."""
    groups = _by_dtype([parts[0].dtype for parts in tensors])
    return [
        torch.cat([part.reshape(-1, count) for i in group for part in tensors[i]])
        for group in groups
    ]


def _unpack(buffers: Sequence[Tensor], templates: Sequence[Template], count: int) -> list[Tensor]:
    tensors: dict[int, Tensor] = {}
    groups = _by_dtype([template.dtype for template in templates])
    for buffer, group in zip(buffers, groups, strict=True):
        row = 0
        for index in group:
            shape = templates[index].shape
            rows = torch.Size(shape).numel()
            tensors[index] = buffer[row : row + rows].reshape(*shape, count)
            row += rows
    return [tensors[index] for index in range(len(templates))]


def _padded(tensor: Tensor, size: int) -> Tensor:
    if len(tensor) == size:
        return tensor.contiguous()
    table = tensor.new_zeros(size, *tensor.shape[1:])
    table[: len(tensor)] = tensor
    return table


def store_table(table: StepTable, size: int) -> list[Tensor]:
    """Packs a table of steps into one tensor per dtype, ``[size, columns]``."""
    count = len(table.beta)
    tuning = [table.beta, table.step_size, table.scale]
    return [
        _padded(torch.cat([part.reshape(count, -1) for part in parts], 1), size)
        for parts in (tuning, [table.width, table.quadrature])
    ]


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
    *,
    unroll: bool = False,
) -> Body:
    """Records one step of a kernel as a graph.

    Args:
        graphs: The density of one chain and of all chains.
        kernel: Its ``step`` is run on tensors without values.
        state: Example of K chains.
        noise: Example of the noise of one step.
        table: Example, one row at least.
        size: Rows of the tables of the compiled program.
        unroll: Whether to take a small step apart, element by element.

    Returns:
        The body, chains last where that is faster.

    Raises:
        Exception: Whatever a step that cannot be recorded raises.
    """
    count = len(state.position)
    each = bool(getattr(kernel, "moves_chains_alone", False))
    if each and count >= _CHAINS_LAST_FROM and all(len(part) == count for part in noise):
        unroll = unroll and state.position.device.type == "cpu"
        for unrolled in (True, False) if unroll else (False,):
            try:
                return _build(
                    graphs, kernel, state, noise, table, size, last=True, unrolled=unrolled
                )
            except (CannotUnroll, Transposing):
                pass
    return _build(graphs, kernel, state, noise, table, size, last=False, unrolled=False)


def _build(
    graphs: DensityGraphs,
    kernel: Kernel,
    state: State,
    noise: Sequence[Tensor],
    table: StepTable,
    size: int,
    *,
    last: bool,
    unrolled: bool,
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
    if unrolled and count_operations(step) > UNROLL_UP_TO:
        raise CannotUnroll("too many operations")
    right = right_operands(step)
    step = simplify(step)
    first = len(per_chain) + len(row)
    count = len(state.position)
    layout = Layout(
        last,
        unrolled,
        count,
        _lanes(count, state.position.element_size()) if unrolled else count,
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
        *layout.store_noise([noise], size),
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
    step: fx.GraphModule, layout: Layout, tuning_shapes: Sequence[Sequence[int]]
) -> Step:
    """Wraps one step into reading rows of tables, weighing, and taking statistics."""
    num_carried = len(layout.carried)
    dtypes = [template.dtype for template in layout.carried]
    num_buffers = len(_by_dtype(dtypes)) if layout.last else num_carried
    noise_groups = _by_dtype([template.dtype for template in layout.noise])
    num_noise = len(noise_groups) if layout.last else len(layout.noise)
    evaluate = over_chains_unrolled if layout.unrolled else _over_chains_last

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
            *state, log_weights, integral = _unpack(buffers, layout.carried, layout.lanes)
            parts = _unpack(noise, layout.noise, layout.lanes)
            each = [part.unsqueeze(0) for part in (*state, *parts)]
            outputs = evaluate(step, each, [*row, *values])
        else:
            *state, log_weights, integral = buffers
            outputs = [[output] for output in step(*state, *noise, *row, *values)]
        *new, accept_prob, diverging = outputs
        per_row = (*new[1:3], accept_prob, diverging)
        log_base, log_target, accepted, diverged = (
            _joined(parts, log_weights.shape) for parts in per_row
        )
        ratio = log_target.double() - log_base.double()
        ratio = torch.where(ratio.isnan(), -torch.inf, ratio)
        if layout.unrolled:
            near = last_mean(statistics, index)
            seen = in_one_pass(ratio, accepted, diverged, count=layout.count, near=near)
        else:
            chain_dim = -1 if layout.last else 0
            seen = in_passes(ratio, accepted, diverged, chain_dim=chain_dim)
        carried = [*new, [log_weights + width * ratio], [integral + weight * ratio]]
        typed = [[x.to(t) for x in parts] for parts, t in zip(carried, dtypes, strict=True)]
        packed = _pack(typed, layout.lanes) if layout.last else [x.contiguous() for (x,) in typed]
        return (index + 1, *packed, with_column(statistics, index, seen))

    num_step_inputs = sum(node.op == "placeholder" for node in step.graph.nodes)
    num_own_constants = (
        num_step_inputs - 5 - len(layout.noise) - len(tuning_shapes) - len(layout.shared)
    )
    return body


def _over_chains_last(
    step: fx.GraphModule, each: Sequence[Tensor], shared: Sequence[Tensor]
) -> list[list[Tensor]]:
    return [[output.squeeze(0)] for output in over_chains_last(step, each, shared)]


def _joined(parts: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Joins the parts of a tensor, its elements or itself."""
    return parts[0].reshape(shape) if len(parts) == 1 else torch.stack(list(parts)).reshape(shape)


def _split_row(row: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    sizes = [torch.Size(shape).numel() for shape in shapes]
    parts = row.split(sizes)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
