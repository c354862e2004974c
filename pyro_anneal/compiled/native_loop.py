"""Chunks of annealing steps as native code: all steps of a vector of chains, then the next vector.

The step of a kernel is recorded for one chain, with calls of the density left as calls, and both
become C++. A vector of chains takes all steps of a chunk before the next one begins, so that its
state stays in the cache; nothing is allocated, and no step waits for Python.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..chains.path import StepTable
from ..graphs.folding import simplify
from ..graphs.recorder import flat_graph
from ..graphs.rewriting import lift_constants
from ..kernels import Kernel, State, Tuning
from ..native.evaluation import DensitySource, ready, shared_value
from ..native.library import load
from ..native.prelude import prelude
from ..native.schedule import Schedule, evaluate_density
from ..native.values import SCALARS, SUFFIX, CannotGenerate, Value
from ..native.writer import write_function

__all__ = ["NativeLoop", "statistics_of_steps"]

_RUN = """
extern "C" void run(i64 count, i64 begin, i64 end, void **p, char *scratch) {{
  i64 steps = *(i64 *)p[0];
  {declarations}
  void *density_in[{num_density}] = {{nullptr}};
  for (int i = 1; i < {num_density}; i++) density_in[i] = p[{first_density} + i];
  for (i64 first = begin; first < end; first += W) {{
    i64 row[W];
    for (int w = 0; w < W; w++) row[w] = first + w < count ? first + w : count - 1;
    i64 filled = end - first < W ? end - first : W;
    {loads}
    for (i64 s = 0; s < steps; s++) {{
      {noise}
      void *in[] = {{{inputs}}};
      void *out[] = {{{outputs}}};
      step(in, out, scratch, density_in, scratch + {step_scratch});
      {keeps}
      const double width = ((double *)p[{width}])[s], weight = ((double *)p[{width} + 1])[s];
      for (i64 e = 0; e < {batch}; e++) {{
        vd ratio = to_d(state2[e]) - to_d(state1[e]);
        ratio = ratio != ratio ? -__builtin_inf() + (vd){{}} : ratio;
        log_weights[e] = log_weights[e] + width * ratio;
        integral[e] = integral[e] + weight * ratio;
        for (i64 w = 0; w < filled; w++) {{
          i64 at = (s * count + first + w) * {batch} + e;
          ((double *)p[{seen}])[at] = ratio[w];
          (({real} *)p[{seen} + 1])[at] = accepted[e][w];
          ((unsigned char *)p[{seen} + 2])[at] = diverged[e][w] != 0;
        }}
      }}
    }}
    {stores}
  }}
}}
"""


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


@dataclass(frozen=True)
class _Array:
    """An array of vectors of chains, and where the chains' numbers lie in memory.

    Attributes:
        name: In C++.
        dtype: Of its numbers.
        size: Numbers of one chain.
        pointer: Index of the tensor that it is read from, of the function's pointers.
    """

    name: str
    dtype: torch.dtype
    size: int
    pointer: int

    @property
    def declared(self) -> str:
        """Its declaration."""
        aligned = "__attribute__((aligned(128)))"
        return f"v{SUFFIX[self.dtype]} {self.name}[{max(self.size, 1)}] {aligned};"

    def _each(self, number: str) -> str:
        return (
            f"for (i64 e = 0; e < {self.size}; e++) for (i64 w = 0; w < W; w++) "
            f"{self.name}[e][w] = (({SCALARS[self.dtype]} *)p[{self.pointer}])[{number}];"
        )

    @property
    def loaded(self) -> str:
        """Reads it from ``[K, size]``."""
        return self._each(f"row[w] * {self.size} + e")

    @property
    def drawn(self) -> str:
        """Reads it for step ``s`` from ``[n, size, K]``, at once where chains fill the vector."""
        scalar, place = SCALARS[self.dtype], f"(s * {self.size} + e) * count"
        whole = (
            f"for (i64 e = 0; e < {self.size}; e++) __builtin_memcpy(&{self.name}[e], "
            f"({scalar} *)p[{self.pointer}] + {place} + first, W * sizeof({scalar}));"
        )
        return f"if (filled == W) {whole} else {self._each(f'{place} + row[w]')}"

    def kept(self, new: _Array) -> str:
        """Takes the numbers of another array."""
        kind = SUFFIX[self.dtype]
        return f"for (i64 e = 0; e < {new.size}; e++) {self.name}[e] = to_{kind}({new.name}[e]);"

    def stored(self, shift: int) -> str:
        """Writes it to ``[K, size]``, at the pointer ``shift`` further on."""
        return (
            f"for (i64 w = 0; w < filled; w++) for (i64 e = 0; e < {self.size}; e++) "
            f"(({SCALARS[self.dtype]} *)p[{self.pointer + shift}])[(first + w) * {self.size} + e] = "
            f"{self.name}[e][w];"
        )


def _carried(state: State) -> list[_Array]:
    """Names what a chunk carries: the state, the log-weights and their integral."""
    arrays = [
        _Array(f"state{k}", x.dtype, _numel(x.shape[1:]), 1 + k) for k, x in enumerate(state)
    ]
    for name in ("log_weights", "integral"):
        arrays.append(_Array(name, torch.float64, arrays[1].size, 1 + len(arrays)))
    return arrays


class NativeLoop:
    """The chunks of one kernel and one density.

    Args:
        source: The density in C++.
        kernel: Moves chains that do not see each other.
        state: Example of K chains.
        noise: Example of the noise of one step.
        table: Example, one row at least.

    Raises:
        CannotGenerate: If the kernel's step has an operation without a rule.
        Exception: Whatever a step that cannot be recorded raises.
    """

    def __init__(
        self,
        source: DensitySource,
        kernel: Kernel,
        state: State,
        noise: Sequence[Tensor],
        table: StepTable,
    ) -> None:
        self.source = source
        graph, constants = _step_graph(source, kernel, state, noise, table)
        self.constants = [ready(constant) for constant in constants]
        per_chain = [*state, *noise]
        given = [
            Value.array(f"s{k}", x.dtype, (1, *x.shape[1:]), is_vector=True)
            for k, x in enumerate(per_chain)
        ]
        row = [part[0] for part in table[:3]]
        for tensor in (*row, *self.constants):
            given.append(shared_value(f"s{len(given)}", tensor))
        schedule = Schedule(
            graph, given, "u", [((1, *size), dtype) for size, dtype in source.results]
        )
        text, scratch = write_function("step", schedule, given, source.lanes, "density")
        self._work = schedule.work + kernel.num_gradients * source.work
        self._scratch = scratch + source.scratch
        run = self._runner(state, noise, row, schedule.outputs, scratch)
        self._library = load(
            "".join([prelude(source.lanes), source.text, "\n", text, run]), work=source.work
        )

    def _runner(
        self,
        state: State,
        noise: Sequence[Tensor],
        row: Sequence[Tensor],
        outputs: Sequence[Value],
        step_scratch: int,
    ) -> str:
        """Writes the function that runs all steps of one vector of chains, then the next."""
        carried = _carried(state)
        batch = carried[1].size
        # pointers: steps, 7 carried, noise, 3 columns of tuning, 2 of weights, own constants,
        # what the density reads, 7 carried, 3 seen
        at_noise, at_row = 8, 8 + len(noise)
        width = at_row + 3
        own = width + 2
        first = own + len(self.constants)
        out = first + self.source.num_shared
        drawn = [
            _Array(f"noise{k}", x.dtype, _numel(x.shape[1:]), at_noise + k)
            for k, x in enumerate(noise)
        ]
        names = [*(f"new{k}" for k in range(5)), "accepted", "diverged"]
        results = [
            _Array(name, value.dtype, value.size, 0)
            for name, value in zip(names, outputs, strict=True)
        ]
        inputs = [*(array.name for array in carried[:5]), *(array.name for array in drawn)]
        for k, part in enumerate(row):
            inputs.append(f"({SCALARS[part.dtype]} *)p[{at_row + k}] + s * {part.numel()}")
        inputs += [f"p[{own + k}]" for k in range(len(self.constants))]
        self._accepted = outputs[5].dtype
        pairs = zip(carried[:5], results, strict=False)
        return _RUN.format(
            declarations="\n  ".join(x.declared for x in (*carried, *drawn, *results)),
            num_density=1 + self.source.num_shared,
            first_density=first - 1,
            loads="\n    ".join(array.loaded for array in carried),
            noise="\n      ".join(array.drawn for array in drawn),
            inputs=", ".join(f"(void *)({pointer})" for pointer in inputs),
            outputs=", ".join(names),
            step_scratch=step_scratch,
            keeps=" ".join(old.kept(new) for old, new in pairs),
            width=width,
            batch=batch,
            seen=out + 7,
            real=SCALARS[outputs[5].dtype],
            stores="\n    ".join(array.stored(out - 1) for array in carried),
        )

    def __call__(
        self,
        state: State,
        log_weights: Tensor,
        integral: Tensor,
        table: StepTable,
        noise: Sequence[Tensor],
        shared: Sequence[Tensor],
    ) -> tuple[State, Tensor, Tensor, Tensor]:
        """Runs the steps of a table.

        Args:
            state: K chains.
            log_weights: Theirs.
            integral: Theirs.
            table: One row per step.
            noise: With a leading dimension of steps.
            shared: What the density reads, as :func:`~pyro_anneal.native.evaluation.ready` lays it out.

        Returns:
            State, log-weights and integral after the last step, and the statistics of each, ``[n, 4]``.
        """
        steps, count = len(table.beta), len(state.position)
        carried = [x.contiguous() for x in (*state, log_weights, integral)]
        ends = [torch.empty_like(x) for x in carried]
        shape = (steps, *state.log_base.shape)
        seen = [
            torch.empty(shape, dtype=dtype, device="cpu")
            for dtype in (torch.float64, self._accepted, torch.bool)
        ]
        tensors = [
            torch.tensor(steps, device="cpu"),
            *carried,
            *(part.movedim(1, -1).contiguous() for part in noise),
            *(column.contiguous() for column in table),
            *self.constants,
            *shared,
            *ends,
            *seen,
        ]
        self._library.run(
            count,
            tensors,
            lanes=self.source.lanes,
            scratch=self._scratch,
            work=self._work * steps,
        )
        return State(*ends[:5]), ends[5], ends[6], statistics_of_steps(*seen)


def statistics_of_steps(ratio: Tensor, accepted: Tensor, diverged: Tensor) -> Tensor:
    """Takes the statistics of steps ``[n, K, *batch]``, ``[n, 4]``."""
    per_step = tuple(range(1, ratio.dim()))
    variance = ratio.var(dim=1, correction=0)
    rest = per_step[:-1]
    return torch.stack(
        [
            ratio.mean(per_step),
            variance.mean(rest) if rest else variance,
            accepted.mean(per_step).double(),
            diverged.sum(per_step).double(),
        ],
        1,
    )


def _step_graph(
    source: DensitySource,
    kernel: Kernel,
    state: State,
    noise: Sequence[Tensor],
    table: StepTable,
) -> tuple[fx.GraphModule, list[Tensor]]:
    """Records one step of one chain, calls of the density included as such."""
    per_chain = [part[:1].contiguous() for part in (*state, *noise)]
    row = [part[0] for part in table[:3]]
    calls = kernel.num_gradients
    results = [
        torch.zeros((1, *s), dtype=d, device="cpu")
        for s, d in source.results
        for _ in range(calls)
    ]
    results = [results[k * calls + call] for call in range(calls) for k in range(4)]

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        own, given = State(*tensors[:5]), tensors[5 : 5 + len(noise)]
        beta, step_size, scale, *returned = tensors[5 + len(noise) :]
        asked: list[Tensor] = []

        def density(position: Tensor) -> State:
            number = len(asked)
            if number == calls:
                raise CannotGenerate("a step that evaluates the density more often than it says")
            asked.append(position)
            return State(position, *returned[4 * number : 4 * number + 4])

        new, info = kernel.step(own, density, beta, Tuning(step_size, scale), given)
        if len(asked) != calls:
            raise CannotGenerate("a step that evaluates the density less often than it says")
        shape = new.log_base.shape
        outputs = (*new, info.accept_prob.expand(shape), info.diverging.expand(shape), *asked)
        return tuple(output.contiguous() for output in outputs)

    with torch.no_grad():
        graph = flat_graph(step, *per_chain, *row, *results)
    constants = lift_constants(graph)
    graph = simplify(graph)
    _call_density(graph, calls, first=len(per_chain) + len(row))
    return graph, constants


def _call_density(graph: fx.GraphModule, calls: int, first: int) -> None:
    """Puts calls where the results of the density were inputs."""
    nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
    results = nodes[first : first + 4 * calls]
    (output,) = [node for node in graph.graph.nodes if node.op == "output"]
    (*kept,) = output.args[0]
    asked = kept[len(kept) - calls :]
    output.args = (tuple(kept[: len(kept) - calls]),)
    for number, position in enumerate(asked):
        with graph.graph.inserting_after(position if position.op != "placeholder" else nodes[-1]):
            call = graph.graph.call_function(evaluate_density, (position,))
        for k in reversed(range(4)):
            with graph.graph.inserting_after(call):
                item = graph.graph.call_function(operator.getitem, (call, k))
            results[4 * number + k].replace_all_uses_with(item)
    for node in results:
        graph.graph.erase_node(node)
