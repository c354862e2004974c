"""The densities of K chains as native code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from .library import load
from .prelude import prelude
from .schedule import Schedule
from .values import SCALARS, SUFFIX, CannotGenerate, Value
from .writer import write_function

__all__ = ["DensitySource", "NativeDensity", "density_source", "ready"]

# Operations on vectors by one evaluation, beyond which libraries of matrix products are better.
_MOST_WORK = 2_000_000
# Nodes of a graph; each is a few lines of C++. Compilers take two seconds for 4000, and a minute
# for 13000.
_MOST_NODES = 6000


@dataclass(frozen=True, eq=False)
class DensitySource:
    """A density as a function in C++.

    Attributes:
        text: The function ``density``, without the prelude.
        lanes: Chains W in a vector.
        scratch: Bytes of scratch memory.
        position: Shape and type of one chain's position.
        results: Shapes and types of one chain's results.
        work: Operations on vectors, about.
        num_shared: Tensors that all chains share.
    """

    text: str
    lanes: int
    scratch: int
    position: tuple[tuple[int, ...], torch.dtype]
    results: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    work: int
    num_shared: int


def shared_value(name: str, tensor: Tensor) -> Value:
    """Describes a tensor that all chains share, as :func:`ready` lays it out."""
    if tensor.dtype is torch.bool:
        value = Value.array(name, tensor.dtype, tensor.shape, is_vector=False)
        return replace(value, is_stored_as_bytes=True)
    dtype = tensor.dtype if tensor.is_floating_point() else torch.int64
    return Value.array(name, dtype, tensor.shape, is_vector=False)


def ready(tensor: Tensor) -> Tensor:
    """Lays a shared tensor out as native code reads it."""
    tensor = tensor.detach()
    if not tensor.is_floating_point() and tensor.dtype is not torch.bool:
        tensor = tensor.long()
    return tensor.contiguous()


def density_source(
    graph: fx.GraphModule, position: Tensor, inputs: Sequence[Tensor]
) -> DensitySource:
    """Writes the graph of one chain's densities as a function of vectors of chains.

    Args:
        graph: Of ``(position, *inputs)``, functional aten operations.
        position: Example of one chain.
        inputs: What all chains share.

    Raises:
        CannotGenerate: If the graph has an operation without a rule, or is too large.
    """
    if len(graph.graph.nodes) > _MOST_NODES:
        raise CannotGenerate("too many operations")
    shape, dtype = tuple(position.shape), position.dtype
    if dtype not in (torch.float32, torch.float64):
        raise CannotGenerate(f"positions of type {dtype}")
    if any(tensor.device.type != "cpu" for tensor in (position, *inputs)):
        raise CannotGenerate("tensors that are not in the processor's memory")
    lanes = 16 if dtype is torch.float32 else 8
    given = [Value.array("s0", dtype, shape, is_vector=True)]
    given += [shared_value(f"s{number}", tensor) for number, tensor in enumerate(inputs, 1)]
    schedule = Schedule(graph, given)
    if schedule.work > _MOST_WORK:
        raise CannotGenerate("too much work for one vector of chains")
    text, scratch = write_function("density", schedule, given, lanes)
    results = tuple((output.shape, output.dtype) for output in schedule.outputs)
    return DensitySource(text, lanes, scratch, (shape, dtype), results, schedule.work, len(inputs))


_EVALUATE = """
extern "C" void run(i64 count, i64 begin, i64 end, void **p, char *scratch) {{
  {number} position[{size}] __attribute__((aligned(128)));
  {declarations}
  void *in[{num_inputs}] = {{position}};
  for (int i = 1; i < {num_inputs}; i++) in[i] = p[{first} + i];
  void *out[] = {{{names}}};
  for (i64 first = begin; first < end; first += W) {{
    i64 row[W];
    for (int w = 0; w < W; w++) row[w] = first + w < count ? first + w : count - 1;
    for (i64 e = 0; e < {size}; e++)
      for (int w = 0; w < W; w++) position[e][w] = (({scalar} *)p[0])[row[w] * {size} + e];
    density(in, out, scratch, nullptr, nullptr);
    i64 filled = end - first < W ? end - first : W;
    {stores}
  }}
}}
"""


def _store(target: str, source: str, scalar: str, size: int) -> str:
    return (
        f"for (i64 w = 0; w < filled; w++) for (i64 e = 0; e < {size}; e++) "
        f"(({scalar} *){target})[(first + w) * {size} + e] = {source}[e][w];"
    )


class NativeDensity:
    """A compiled density.

    Args:
        source: The density in C++.

    Raises:
        CannotGenerate: If it cannot be compiled here.
    """

    def __init__(self, source: DensitySource) -> None:
        self.source = source
        (shape, dtype), results = source.position, source.results
        sizes = [torch.Size(one).numel() for one, _ in results]
        kinds = [SCALARS[one] for _, one in results]
        vectors = [f"v{SUFFIX[one]}" for _, one in results]
        outs = range(len(results))
        text = _EVALUATE.format(
            number=f"v{SUFFIX[dtype]}",
            scalar=SCALARS[dtype],
            size=torch.Size(shape).numel(),
            declarations=" ".join(
                f"{vectors[k]} r{k}[{max(sizes[k], 1)}] __attribute__((aligned(128)));"
                for k in outs
            ),
            names=", ".join(f"r{k}" for k in outs),
            num_inputs=1 + source.num_shared,
            first=len(results),
            stores=" ".join(_store(f"p[{k + 1}]", f"r{k}", kinds[k], sizes[k]) for k in outs),
        )
        self._library = load(prelude(source.lanes) + source.text + text, work=source.work)

    def __call__(self, position: Tensor, shared: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Evaluates K chains.

        Args:
            position: ``[K, *batch, D]``, contiguous.
            shared: What all chains share, as :func:`ready` lays it out.
        """
        count = len(position)
        outputs = tuple(
            torch.empty((count, *shape), dtype=dtype, device="cpu")
            for shape, dtype in self.source.results
        )
        self._library.run(
            count,
            [position, *outputs, *shared],
            lanes=self.source.lanes,
            scratch=self.source.scratch,
            work=self.source.work,
        )
        return outputs
