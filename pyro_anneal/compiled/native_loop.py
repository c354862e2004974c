"""Chunks of annealing steps as native code: all steps of a vector of chains, then the next vector.

The step of a kernel is recorded for one chain, with calls of the density left as calls, and both
become C++. A vector of chains takes all steps of a chunk before the next one begins, so that its
state stays in the cache; nothing is allocated, and no step waits for Python.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

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


def _each(pattern: str, size: int) -> str:
    return f"for (i64 e = 0; e < {size}; e++) for (i64 w = 0; w < W; w++) {pattern}"


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
        aligned = "__attribute__((aligned(128)))"
        states = [(SUFFIX[x.dtype], SCALARS[x.dtype], _numel(x.shape[1:])) for x in state]
        states += [("d", "double", states[1][2])] * 2
        names = [*(f"state{k}" for k in range(5)), "log_weights", "integral"]
        batch = states[1][2]
        # pointers: steps, 7 carried, noise, 3 columns of tuning, 2 of weights, own constants,
        # what the density reads, 7 carried, 3 seen
        at_noise, at_row = 8, 8 + len(noise)
        width = at_row + 3
        own = width + 2
        first = own + len(self.constants)
        out = first + self.source.num_shared
        lines = [
            f"v{t} {n}[{max(size, 1)}] {aligned};"
            for n, (t, _, size) in zip(names, states, strict=True)
        ]
        loads = [
            _each(f"{n}[e][w] = (({kind} *)p[{1 + k}])[row[w] * {size} + e];", size)
            for k, (n, (_, kind, size)) in enumerate(zip(names, states, strict=True))
        ]
        stores = [
            f"for (i64 w = 0; w < filled; w++) for (i64 e = 0; e < {size}; e++) "
            f"(({kind} *)p[{out + k}])[(first + w) * {size} + e] = {n}[e][w];"
            for k, (n, (_, kind, size)) in enumerate(zip(names, states, strict=True))
        ]
        draws, pointers = [], [f"state{k}" for k in range(5)]
        for k, part in enumerate(noise):
            kind, size = SCALARS[part.dtype], _numel(part.shape[1:])
            lines.append(f"v{SUFFIX[part.dtype]} noise{k}[{max(size, 1)}] {aligned};")
            draws.append(
                f"if (filled == W) for (i64 e = 0; e < {size}; e++) __builtin_memcpy(&noise{k}[e], "
                f"({kind} *)p[{at_noise + k}] + (s * {size} + e) * count + first, "
                f"W * sizeof({kind})); else "
                + _each(
                    f"noise{k}[e][w] = (({kind} *)p[{at_noise + k}])[(s * {size} + e) * count + row[w]];",
                    size,
                )
            )
            pointers.append(f"noise{k}")
        for k, part in enumerate(row):
            pointers.append(f"({SCALARS[part.dtype]} *)p[{at_row + k}] + s * {part.numel()}")
        pointers += [f"p[{own + k}]" for k in range(len(self.constants))]
        news, keeps = [], []
        for k, value in enumerate(outputs[:5]):
            news.append(f"new{k}")
            lines.append(f"v{SUFFIX[value.dtype]} new{k}[{max(value.size, 1)}] {aligned};")
            keeps.append(
                f"for (i64 e = 0; e < {value.size}; e++) state{k}[e] = to_{states[k][0]}(new{k}[e]);"
            )
        for name, value in zip(("accepted", "diverged"), outputs[5:], strict=True):
            news.append(name)
            lines.append(f"v{SUFFIX[value.dtype]} {name}[{max(value.size, 1)}] {aligned};")
        self._accepted = outputs[5].dtype
        return _RUN.format(
            declarations="\n  ".join(lines),
            num_density=1 + self.source.num_shared,
            first_density=first - 1,
            loads="\n    ".join(loads),
            noise="\n      ".join(draws),
            inputs=", ".join(f"(void *)({pointer})" for pointer in pointers),
            outputs=", ".join(news),
            step_scratch=step_scratch,
            keeps=" ".join(keeps),
            width=width,
            batch=batch,
            seen=out + 7,
            real=SCALARS[outputs[5].dtype],
            stores="\n    ".join(stores),
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
