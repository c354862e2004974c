"""What leaves a recording: numbers that the model reads from tensors in Python.

A recorded graph knows operations. A number that Python reads from a tensor, to branch on it, to
count a loop or to hand it to NumPy, leaves the graph and is a constant there. Whether that is right
depends on what the tensor was made of, which is followed here from storage to storage:

- the *position*: then no graph is right, and the model itself must be evaluated;
- *data* alone (arguments, observations, parameters, buffers, whatever tensor existed before): then
  the graph is right for these data. A *guard*, recorded beside the densities, computes anew what
  left, and tells for which other data the graph is right as well;
- neither: then it is the same in every evaluation.

Without an exit of the first two kinds the graph is proven to serve all data of its shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..models.places import Place, current_place, described
from .assertions import asserted_value
from .branches import Branches
from .recorder import current_recorder, tensors_in
from .rewriting import Unsupported

__all__ = ["Exit", "ExitsByFunction", "Guard", "Influence", "PositionLeft"]

aten = torch.ops.aten

# Ways out that need not dispatch an operation. Those that do carry the tag
# data_dependent_output, too.
_WAYS_OUT = frozenset(
    {
        "numpy",
        "tolist",
        "storage",
        "untyped_storage",
        "data_ptr",
        "item",
        "__bool__",
        "__complex__",
        "__float__",
        "__index__",
        "__int__",
        "__array__",
        "__dlpack__",
        "__deepcopy__",
        "__reduce__",
        "__reduce_ex__",
        "__format__",
        "__repr__",
        "__str__",
    }
)
# These make a new tensor of numbers, which they read from the tensors in a list.
_MAKERS = frozenset({"tensor", "as_tensor", "asarray", "new", "new_tensor"})
# These read the values of some arguments in C++ and branch on them, without an operation.
_READ_INSIDE: dict[str, tuple[int, ...]] = {
    "_pack_padded_sequence": (1,),
    "_pad_packed_sequence": (1,),
    "tensor_split": (1,),
    "ctc_loss": (2, 3),
    # With packed sequences, whose batch sizes are the second argument.
    "lstm": (1,),
    "gru": (1,),
    "rnn_tanh": (1,),
    "rnn_relu": (1,),
}


@dataclass(frozen=True, eq=False)
class Exit:
    """A value that left the recording."""

    how: str  # such as ".item()"
    place: str  # the line of the model, " at model.py:12 (...)"; empty if not known
    reached_by: Literal["position", "data"]
    sources: tuple[Tensor, ...] = ()  # what it was made of, besides the position

    def __str__(self) -> str:
        owner = "a latent" if self.reached_by == "position" else "data or parameters"
        return f"{self.how} of {owner}{self.place}"


@dataclass(frozen=True, eq=False)
class Guard:
    """What must not change for a recording to stay right."""

    tensor: Tensor
    only_shape: bool


class PositionLeft(Unsupported):
    """The position's value is needed in Python, so no graph is right for all positions."""

    def __init__(self, exit: Exit) -> None:
        super().__init__(f"{exit.how} needs the value of a latent{exit.place}")
        self.exit = exit


_POSITION = -1


class Influence:
    """Follows the position and the data through the storages that operations write.

    Args:
        position: The input whose influence is followed.
    """

    def __init__(self, position: Tensor) -> None:
        # An entry holds a weak reference, so that no other storage gets its address meanwhile.
        self._reached: dict[int, tuple[Any, frozenset[int]]] = {}
        self._external: list[Tensor] = []
        self.exits: list[Exit] = []
        self.guards: list[Guard] = []
        self._is_noted = False
        self.branches = Branches()
        self._recorder = current_recorder()
        self.mark(position, frozenset({_POSITION}))

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Overlooks exits inside, which are noted already."""
        self._is_noted, before = True, self._is_noted
        try:
            yield
        finally:
            self._is_noted = before

    def mark(self, tensor: Tensor, reach: frozenset[int]) -> None:
        """Notes what a tensor was made of."""
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
        self._reached[int(storage._cdata)] = (storage._weak_ref(), reach)

    def of(self, *tensors: Tensor) -> frozenset[int]:
        """Collects what tensors were made of; one not met before is data."""
        reach: frozenset[int] = frozenset()
        for tensor in tensors:
            with torch._C.DisableTorchFunction():
                key = int(tensor.untyped_storage()._cdata)
            if key not in self._reached:
                self._external.append(tensor.detach())
                self.mark(tensor, frozenset({len(self._external) - 1}))
            found = self._reached[key][1]
            reach = reach | found if reach else found
        return reach

    def leave(
        self,
        how: str,
        tensors: Sequence[Tensor],
        *,
        only_shape: bool = False,
        guard: Sequence[Tensor] | None = None,
        place: Place | None = None,
    ) -> None:
        """Notes that values of tensors leave.

        Args:
            how: In the words of Python.
            tensors: Whose values leave.
            only_shape: Whether only a shape that follows from the values leaves.
            guard: What to compare with later in place of ``tensors``.
            place: Where, if not at the line now running.

        Raises:
            PositionLeft: If the position reaches one of them.
        """
        reach = self.of(*tensors)
        if not reach:
            return
        where = described(place or current_place())
        sources = tuple(self._external[index] for index in sorted(reach) if index != _POSITION)
        if _POSITION in reach:
            exit = Exit(how, where, "position", sources)
            self.exits.append(exit)
            raise PositionLeft(exit)
        self.exits.append(Exit(how, where, "data", sources))
        for tensor in tensors if guard is None else guard:
            # A copy, recorded like any operation: the tensor itself may be written to later.
            self.guards.append(Guard(tensor.detach().clone(), only_shape))

    def follow(self, func: Any, args: Any, kwargs: Any, run: Any) -> Any:
        """Runs one operation, follows its results, and notes what leaves by it."""
        inputs = tensors_in((args, kwargs))
        if torch.Tag.data_dependent_output in func.tags:
            if _POSITION in self.of(*inputs):  # in a hook, where no function is seen
                holds = asserted_value()
                if holds is not None:
                    return holds
            if not self._is_noted:
                self.leave(_python_name(func), inputs)
            with nullcontext() if self._recorder is None else self._recorder.paused():
                return func(*args, **kwargs)
        shaping, counted = _shaping(func, args, inputs)
        if _POSITION in self.of(*shaping):
            self.leave(f"the shape of a result ({func})", shaping)
        result = run(func, args, kwargs)
        if func in (aten.lift_fresh.default, aten.lift_fresh_copy.default):
            reach: frozenset[int] = frozenset()  # made of numbers just now
        else:
            reach = self.of(*inputs)
        for output in (*_written(func, args, kwargs), *tensors_in(result)):
            self.mark(output, reach)
        if shaping:
            guard = [result] if counted is None else [mask.sum() for mask in counted]
            self.leave(
                f"the shape of a result ({func})",
                shaping,
                only_shape=counted is None,
                guard=tensors_in(guard),
            )
        return result


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    if not func._schema.is_mutable:
        return []
    arguments = func._schema.arguments
    named = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
    into = [x.name for x in arguments if x.alias_info is not None and x.alias_info.is_write]
    return tensors_in([named[name] for name in into if name in named])


def _python_name(func: Any) -> str:
    name = func._schema.name.removeprefix("aten::")
    return "a number from a tensor" if name == "_local_scalar_dense" else f"torch.{name}()"


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)


def _shaping(
    func: Any, args: Any, inputs: list[Tensor]
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Finds whose values determine the shape of a result, and masks whose counts say it."""
    if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        masks = [index for index in args[1] if _is_mask(index)]
        one_number = func is not aten.index.Tensor and args[2].numel() == 1
        return ([], None) if one_number else (masks, masks)
    if func is aten.masked_select.default:
        return [args[1]], [args[1]]
    if torch.Tag.dynamic_output_shape in func.tags:
        return inputs, None
    return [], None


class ExitsByFunction(TorchFunctionMode):
    """Notes exits that dispatch no operation: ``.numpy()``, ``.tolist()``, ``np.asarray``."""

    def __init__(self, influence: Influence) -> None:
        super().__init__()
        self.influence = influence

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs one function."""
        name = getattr(func, "__name__", "")
        kwargs = kwargs or {}
        if name in _WAYS_OUT and args and isinstance(args[0], Tensor):
            if name == "__bool__" and _POSITION in self.influence.of(args[0]):
                holds = asserted_value()
                if holds is not None:
                    return holds
                if self.influence.branches.is_open:
                    with self.influence.noted():
                        value = func(*args, **kwargs)
                    return self.influence.branches.take(args[0], value)
            self.influence.leave(_WORDS.get(name, f".{name}()"), args[:1])
            with self.influence.noted():
                return func(*args, **kwargs)
        if name in _MAKERS:
            parts = [x for x in (*args, *kwargs.values()) if isinstance(x, list | tuple)]
            inside = tensors_in(parts)
            if inside:
                self.influence.leave(f"{name}() of a list", inside)
        elif name in _READ_INSIDE:
            read = [args[at] for at in _READ_INSIDE[name] if at < len(args)]
            values = [x for x in read if isinstance(x, Tensor)]
            if values:
                self.influence.leave(f"{name} of lengths", values)
        return func(*args, **kwargs)


_WORDS = {
    "__bool__": "a branch",
    "__complex__": "complex()",
    "__float__": "float()",
    "__index__": "an index or count",
    "__int__": "int()",
    "__array__": "a NumPy function",
    "__format__": "a formatted string",
    "__repr__": "printing",
    "__str__": "printing",
    "__deepcopy__": "copy.deepcopy()",
    "__reduce__": "pickling",
    "__reduce_ex__": "pickling",
}
