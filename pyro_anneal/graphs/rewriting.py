"""Passes over a recorded graph: refuse what cannot be captured, rewrite what vmap does not know."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..models.places import described

__all__ = [
    "Impure",
    "Unsupported",
    "dependent_nodes",
    "drop_dead",
    "is_mutable",
    "is_random",
    "lift_constants",
    "make_batchable",
    "refuse_randomness",
    "refuse_writes",
    "without_private_writes",
]

aten = torch.ops.aten
_NO_END = 2**63 - 1  # how aten writes "to the end" in a slice


class Unsupported(Exception):
    """The function cannot be recorded faithfully; the message says why."""


class Impure(ValueError):
    """The function is no function of the latents alone: no mode of evaluation would be right."""


def is_random(func: Any, args: Sequence[Any] = ()) -> bool:
    """Tells whether an operation draws random numbers."""
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
        return False
    # Attention and fused dropout carry the tag even when their probability is zero.
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False))
    if "dropout_p" in names:
        return bool(given.get("dropout_p", 0.0))
    return not (given.get("train") is False or given.get("training") is False)


def is_mutable(node: fx.Node) -> bool:
    """Tells whether a node writes in place."""
    return (
        node.op == "call_function"
        and getattr(node.target, "_schema", None) is not None
        and (
            node.target._schema.is_mutable  # type: ignore[union-attr]
        )
    )


# Writes in place that autograd makes in its own temporary results, and what gives the same numbers.
_OUT_OF_PLACE: dict[Any, Any] = {
    aten.add_.Tensor: aten.add.Tensor,
    aten.bitwise_and_.Tensor: aten.bitwise_and.Tensor,
    aten.div_.Tensor: aten.div.Tensor,
    aten.logical_and_.default: aten.logical_and.default,
    aten.masked_fill_.Scalar: aten.masked_fill.Scalar,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.relu_.default: aten.relu.default,
    aten.scatter_.value: aten.scatter.value,
    aten.sub_.Tensor: aten.sub.Tensor,
}
_OF_ONE_TYPE = (aten.add_.Tensor, aten.div_.Tensor, aten.mul_.Tensor, aten.sub_.Tensor)


def without_private_writes(graph: fx.GraphModule) -> None:
    """Replaces writes into results that nothing else holds by operations that make new ones.

    What remains to be made functional is what models write themselves; few do.
    """
    places = {node: number for number, node in enumerate(graph.graph.nodes)}
    for node in list(graph.graph.nodes):
        new = _OUT_OF_PLACE.get(node.target) if node.op == "call_function" else None
        if new is not None and _is_private(node, places):
            node.target = new


def _is_private(node: fx.Node, places: dict[fx.Node, int]) -> bool:
    """Tells whether a node writes into what one earlier operation made, and nobody reads later."""
    into = node.args[0]
    if not isinstance(into, fx.Node) or into.op != "call_function" or node.kwargs:
        return False
    if any(places[user] > places[node] for user in into.users):
        return False
    holders = [into, *(user for user in into.users if user is not node)]
    if any(_returns_alias(holder) for holder in holders):
        return False
    meta, result = (part.meta.get("tensor_meta") for part in (into, node))
    if meta is None or result is None or not hasattr(meta, "dtype") or meta.shape != result.shape:
        return False
    if node.target is aten.logical_and_.default:
        return bool(meta.dtype is torch.bool)
    if node.target in _OF_ONE_TYPE:
        other = node.args[1]
        of_other = other.meta.get("tensor_meta") if isinstance(other, fx.Node) else None
        return of_other is not None and of_other.dtype == meta.dtype
    return True


def _returns_alias(node: fx.Node) -> bool:
    """Tells whether results of an operation may share memory with what it was given."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.is_mutable or node.target is aten._unsafe_view.default:
        return True
    return any(value.alias_info is not None for value in schema.returns)


def lift_constants(graph: fx.GraphModule) -> list[Tensor]:
    """Turns every captured tensor into an input, one per tensor, and returns the tensors."""
    placeholders: dict[int, fx.Node] = {}
    constants: list[Tensor] = []
    captured: set[str] = set()
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = operator.attrgetter(node.target)(graph)
        if id(tensor) not in placeholders:
            with graph.graph.inserting_after(inputs[-1]):
                new = graph.graph.placeholder(f"constant_{len(inputs) - 1}")
            new.meta = dict(node.meta)
            inputs.append(new)
            placeholders[id(tensor)] = new
            constants.append(tensor)
        node.replace_all_uses_with(placeholders[id(tensor)])
        graph.graph.erase_node(node)
        captured.add(node.target)
    for name in captured:  # a graph lives until garbage is collected; tensors need not
        owner, _, attribute = name.rpartition(".")
        delattr(graph.get_submodule(owner), attribute)
    graph.recompile()
    return constants


def _new_input(graph: fx.Graph) -> fx.Node:
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(inputs[-1]):
        return graph.placeholder(f"constant_{len(inputs) - 1}")


def refuse_writes(graph: fx.GraphModule) -> None:
    """Refuses a functional graph that writes into its inputs.

    Raises:
        Impure: If it does.
    """
    if any(is_mutable(node) for node in graph.graph.nodes):  # only inputs are still written to
        raise Impure(
            "the density writes in place into a tensor that it did not create (a buffer, a "
            "parameter or data): annealing needs a function of the latents alone; call "
            ".eval() on modules with running statistics, or write into a clone"
        )


def drop_dead(graph: fx.Graph) -> None:
    """Removes operations whose results nothing reads, random ones as well."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)


def refuse_randomness(graph: fx.GraphModule) -> None:
    """Refuses a functional graph without dead nodes in which random numbers are drawn.

    Raises:
        Impure: If there are.
    """
    for node in graph.graph.nodes:
        if node.op == "call_function" and is_random(node.target, node.args):
            raise Impure(
                f"the density draws random numbers ({node.target}"
                f"{described(node.meta.get('place'))}): annealing needs a deterministic density; "
                "call .eval() on modules with dropout, and give every latent a value"
            )


def dependent_nodes(graph: fx.GraphModule) -> set[fx.Node]:
    """Collects the nodes that depend on the position, the first input."""
    dependent: set[fx.Node] = set()
    for node in graph.graph.nodes:
        first = node.op == "placeholder" and not dependent
        if node.op != "output" and (first or not dependent.isdisjoint(node.all_input_nodes)):
            dependent.add(node)
    return dependent


def _dtype(node: Any) -> torch.dtype | None:
    return getattr(node.meta.get("tensor_meta"), "dtype", None) if node is not None else None


def make_batchable(graph: fx.GraphModule, device: torch.device) -> list[Tensor]:
    """Rewrites operations that vmap does not know into ones that it knows.

    Args:
        graph: Functional graph whose nodes carry ``tensor_meta``.
        device: Where new constants go.

    Returns:
        New constants; their inputs are the graph's last.

    Raises:
        Unsupported: If the shape of a result depends on the position.
    """
    constants: list[Tensor] = []
    dependent = dependent_nodes(graph)
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.copy.default:  # nor does autograd, whatever it copies
            _copy_to_expand(node)
            continue
        if node not in dependent:
            continue
        if _is_choice(node):
            _choose(node)
            continue
        _refuse_dynamic_shape(node, dependent)
        if node.target in (aten.index.Tensor, aten.index_put.default):
            _masks_to_indices(node)
        elif node.target in (aten.as_strided.default, aten.as_strided_scatter.default):
            constants.append(_unstride(node, device))
        elif node.target is aten.masked_select.default:
            _masked_select_to_index(node)
        elif node.target is aten.log_sigmoid_backward.default:
            _open_log_sigmoid(node)
        elif _NO_END in node.args:
            _close_slice(node)
    return constants


def _is_choice(node: fx.Node) -> bool:
    """Tells whether a node puts one number where a mask of the same shape is true."""
    if node.target is not aten.index_put.default:
        return False
    source, indices, value, *accumulate = node.args
    shapes = [getattr(x, "meta", {}).get("tensor_meta") for x in (source, indices[0], value)]  # type: ignore[index]
    if len(indices) != 1 or any(accumulate) or not all(hasattr(x, "shape") for x in shapes):  # type: ignore[arg-type]
        return False
    into, mask, number = (shape for shape in shapes if shape is not None)
    same = into.dtype == number.dtype and into.shape == mask.shape
    return bool(same and mask.dtype is torch.bool and number.shape.numel() == 1)


def _choose(node: fx.Node) -> None:
    """Replaces writing one number by a mask with a choice, whatever the mask depends on."""
    source, indices, value, *_ = node.args
    with node.graph.inserting_before(node):
        number = node.graph.call_function(aten.reshape.default, (value, []))
        number.meta["tensor_meta"] = value.meta["tensor_meta"]._replace(shape=torch.Size([]))  # type: ignore[union-attr]
        new = node.graph.call_function(aten.where.self, (indices[0], number, source))  # type: ignore[index]
    _replace(node, new)


def _refuse_dynamic_shape(node: fx.Node, dependent: set[fx.Node]) -> None:
    arguments: list[Any] = node.all_input_nodes
    if node.target in (aten.index.Tensor, aten.index_put.default):
        indices: Any = node.args[1]
        arguments = [index for index in indices if _dtype(index) is torch.bool]
    elif node.target is aten.masked_select.default:
        arguments = [node.args[1]]
    elif torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return
    if not dependent.isdisjoint(arguments):
        raise Unsupported(f"the shape of {node.target} depends on values of latents")


def _replace(old: fx.Node, new: fx.Node) -> None:
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def _masked_select_to_index(node: fx.Node) -> None:
    """Replaces ``masked_select`` with a constant mask by indexing."""
    operands: Any = node.args[:2]
    source, mask = operands
    shape = torch.broadcast_shapes(*(x.meta["tensor_meta"].shape for x in operands))
    call = node.graph.call_function
    with node.graph.inserting_before(node):
        wide = call(aten.expand.default, (source, list(shape)))
        wide_mask = call(aten.expand.default, (mask, list(shape)))
        new = call(aten.index.Tensor, (wide, [wide_mask]))
    wide_mask.meta["tensor_meta"] = mask.meta["tensor_meta"]._replace(shape=shape)
    _replace(node, new)
    _masks_to_indices(new)


def _open_log_sigmoid(node: fx.Node) -> None:
    """Writes the derivative out: the fused kernel does not broadcast its first argument."""
    operands: Any = node.args[:2]
    grad, source = operands
    with node.graph.inserting_before(node):
        new = source
        for target in (aten.neg.default, aten.sigmoid.default):
            new = node.graph.call_function(target, (new,))
            new.meta = dict(source.meta)
        new = node.graph.call_function(aten.mul.Tensor, (grad, new))
    _replace(node, new)


def _copy_to_expand(node: fx.Node) -> None:
    """Replaces the functional form of ``target.copy_(source)``."""
    operands: Any = node.args[:2]
    target, source = operands
    with node.graph.inserting_before(node):
        shape = list(target.meta["tensor_meta"].shape)
        new = node.graph.call_function(aten.expand.default, (source, shape))
        if _dtype(source) is not _dtype(target):
            kwargs: dict[str, Any] = {"dtype": _dtype(target)}
            new = node.graph.call_function(aten._to_copy.default, (new,), kwargs)
    _replace(node, new)


def _masks_to_indices(node: fx.Node) -> None:
    """Replaces constant boolean masks by the indices of their true elements."""
    indices: list[Any] = []
    with node.graph.inserting_before(node):
        masks: Any = node.args[1]
        for index in masks:
            if _dtype(index) is not torch.bool:
                indices.append(index)
                continue
            call = node.graph.call_function
            rank = len(index.meta["tensor_meta"].shape)
            found = call(aten.nonzero.default, (index,))
            indices += [call(aten.select.int, (found, 1, dim)) for dim in range(rank)]
    node.args = (node.args[0], indices, *node.args[2:])


def _close_slice(node: fx.Node) -> None:
    """Replaces "to the end" by the length: vmap's arithmetic overflows on the former."""
    args = list(node.args)
    at: int = args.index(_NO_END)
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    if names[at] != "end" or "dim" not in names:
        return
    source: Any = args[1] if "input_sizes" in names else args[0]
    shape = source.meta["tensor_meta"].shape if isinstance(source, fx.Node) else source
    args[at] = shape[args[names.index("dim")]]
    node.args = tuple(args)


def _unstride(node: fx.Node, device: torch.device) -> Tensor:
    """Replaces a view of raw storage, which autograd makes for in-place writes, by indexing.

    Returns:
        The indices, a new constant of the graph.
    """
    scatter = node.target is aten.as_strided_scatter.default
    base: Any = node.args[0]
    view: Any = node.args[2:] if scatter else node.args[1:]
    size, stride, *rest = view
    meta = base.meta["tensor_meta"]
    # Where each element of the storage lies in the base, then which of them the view sees.
    extent = 1 + sum((n - 1) * s for n, s in zip(meta.shape, meta.stride, strict=True))
    where = torch.zeros(extent, dtype=torch.long, device="cpu")
    order = torch.arange(meta.shape.numel(), device="cpu").view(meta.shape)
    where.as_strided(meta.shape, meta.stride).copy_(order)
    seen = where.as_strided(size, stride, rest[0] if rest and rest[0] else 0).flatten()

    graph, call = node.graph, node.graph.call_function
    index = _new_input(graph)
    with graph.inserting_before(node):
        rows = call(aten.reshape.default, (base, [-1]))
        if scatter:
            source = call(aten.reshape.default, (node.args[1], [-1]))
            put = call(aten.index_put.default, (rows, [index], source))
            new = call(aten.reshape.default, (put, list(meta.shape)))
        else:
            taken = call(aten.index.Tensor, (rows, [index]))
            new = call(aten.reshape.default, (taken, size))
    _replace(node, new)
    return seen.to(device)
