"""Writes a schedule as a C++ function of arrays."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .schedule import Schedule, squeezed
from .stages import Cholesky, DensityCall, Loop, Member, Product, Scan, Scatter, Solve
from .values import SCALARS, SUFFIX, CannotGenerate, Expression, Value, literal

__all__ = ["c_type", "cast", "write_function"]

# Elements up to which an array lies on the stack, and bytes of all the others together.
_ON_STACK, _MOST_SCRATCH = 64, 2**23
# Terms from which a whole sum is kept in float64.
_LONG_SUM = 64


def c_type(value: Value) -> str:
    """Names the type of an array's elements."""
    if value.is_stored_as_bytes:
        return "unsigned char"
    return f"v{SUFFIX[value.dtype]}" if value.is_vector else SCALARS[value.dtype]


def cast(value: Value, pointer: str) -> str:
    """Declares an array at a pointer."""
    return f"{c_type(value)} *{value.name} = ({c_type(value)} *){pointer};"


class _Writer:
    def __init__(self, schedule: Schedule, lanes: int, density: str | None) -> None:
        self.schedule, self.lanes, self.density = schedule, lanes, density
        self.stage = 0
        self.last_read: dict[str, int] = {}  # stage by array, of what is kept in memory
        self.made: dict[str, tuple[int, Value]] = {}
        self.locals: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.lines: list[str] = []

    def read(self, value: Value, at: Sequence[str]) -> Expression:
        """Reads an element, from a variable of the loop where there is one."""
        if value.number is None and value.name in self.locals and value.is_whole:
            name, shape = self.locals[value.name]
            if squeezed(value.shape) == shape:
                return Expression(name, value.dtype, value.is_vector)
        if value.number is None:
            self.last_read[value.name] = max(self.stage, self.last_read.get(value.name, 0))
        return value.at(at)

    def body(self, stored: set[str] | None) -> list[str]:
        """Writes all stages; ``stored`` names the arrays that are read, None for not yet known."""
        self.lines = []
        for number, stage in enumerate(self.schedule.stages):
            self.stage = number
            self.locals = {}
            if isinstance(stage, Loop):
                self._loop(stage, stored)
            elif isinstance(stage, Product):
                self._product(stage)
            elif isinstance(stage, Scatter):
                self._scatter(stage)
            elif isinstance(stage, Scan):
                self._scan(stage)
            elif isinstance(stage, (Cholesky, Solve)):
                self._factor(stage)
            else:
                self._call(stage)
        self.stage = len(self.schedule.stages)
        self.locals = {}
        for number, output in enumerate(self.schedule.outputs):
            self._output(number, output)
        return self.lines

    def _nest(self, shape: Sequence[int]) -> tuple[list[str], list[str]]:
        """Opens loops over a shape: their lines, and the indices."""
        lines, at = [], []
        for dim, size in enumerate(shape):
            if size == 1:
                at.append("0")
                continue
            lines.append(f"for (i64 i{dim} = 0; i{dim} < {size}; i{dim}++) {{")
            at.append(f"i{dim}")
        return lines, at

    def _loop(self, loop: Loop, stored: set[str] | None) -> None:
        opening, at = self._nest(loop.shape)
        before: list[str] = []
        inside: list[str] = []
        after: list[str] = []
        for member in loop.members:
            self.made[member.result.name] = (self.stage, member.result)
            where = [i if n != 1 else "0" for i, n in zip(at, loop.shape, strict=True)]
            # a shape that differs in dimensions of one element only
            own = _aligned(member, loop.shape, where)
            element = member.emit(self.read, own)
            if member.result.is_vector:
                element = element.widened()
            if member.reduced is not None:
                self._sum(member, member.reduced, element, own, before, inside, after)
                continue
            name = f"x{member.result.name}"
            inside.append(f"const auto {name} = {element.code};")
            self.locals[member.result.name] = (name, squeezed(member.result.shape))
            if stored is None or member.result.name in stored:
                inside.append(f"{member.result.at(own).code} = {name};")
        if inside:
            self.lines += [*before, "{", *opening, *inside, "}" * (len(opening) + 1), *after]

    def _sum(
        self,
        member: Member,
        reduced: tuple[float, str],
        element: Expression,
        at: Sequence[str],
        before: list[str],
        inside: list[str],
        after: list[str],
    ) -> None:
        start, join = reduced
        if not member.result.dtype.is_floating_point and abs(start) == torch.inf:
            start = _extreme(member.result.dtype, start > 0)
        result, whole = member.result, member.result.size == 1
        begin = literal(start, result.dtype)
        begin = begin.widened() if result.is_vector else begin
        if whole:
            name, kind = f"a{result.name}", c_type(result)
            terms = _terms(member)
            if result.dtype is torch.float32 and terms >= _LONG_SUM and join == "{0} + {1}":
                kind = "vd" if result.is_vector else "double"
                before.append(f"{kind} {name} = {{}};")
                inside.append(f"{name} = {name} + to_d({element.code});")
                after.append(f"{result.name}[0] = to_f({name});")
                return
            before.append(f"{kind} {name} = {begin.code};")
            inside.append(f"{name} = {join.format(name, element.code)};")
            after.append(f"{result.name}[0] = {name};")
            return
        place = result.at(["0" if d in member.dims else index for d, index in enumerate(at)]).code
        before.append(f"for (i64 i = 0; i < {result.size}; i++) {result.name}[i] = {begin.code};")
        inside.append(f"{place} = {join.format(place, element.code)};")

    def _product(self, stage: Product) -> None:
        result, left, right, added = stage.result, stage.left, stage.right, stage.added
        self.made[result.name] = (self.stage, result)
        batch, rows, columns = result.shape
        vector = c_type(result)
        product_is_vector = left.is_vector or right.is_vector
        kind = f"v{SUFFIX[result.dtype]}" if product_is_vector else SCALARS[result.dtype]
        a, b = self.read(left, ["p", "i", "k"]), self.read(right, ["p", "k", "j"])
        value = Expression("v", result.dtype, product_is_vector)
        if added is not None:
            more = self.read(added, ["p", "i", "j"])
            value = Expression(f"(v + {more.code})", result.dtype, True)
        code = value.code if not result.is_vector else f"wide({value.code})"
        # accumulators fill the registers: 32 of 64 bytes, two for a vector of float64 and 16 lanes
        big = 8 if result.dtype is torch.float64 and self.lanes == 16 else 16
        tile = (1, 8) if rows == 1 else (8, 1) if columns == 1 else (big // 4, 4)
        self.lines += [
            f"for (i64 p = 0; p < {batch}; p++)",
            f"product<{tile[0]}, {tile[1]}, {kind}>({rows}, {left.shape[2]}, {columns},",
            f"[&](i64 i, i64 k) {{ return {a.code}; }},",
            f"[&](i64 k, i64 j) {{ return {b.code}; }},",
            f"[&](i64 i, i64 j, {kind} v) {{ {result.at(['p', 'i', 'j']).code} = ({vector}){code}; }});",
        ]

    def _scatter(self, stage: Scatter) -> None:
        result, start, rows = stage.result, stage.start, stage.rows
        self.made[result.name] = (self.stage, result)
        opening, at = self._nest(result.shape)
        begin = self.read(start, at)
        begin = begin.widened() if result.is_vector else begin
        self.lines += [*opening, f"{result.at(at).code} = {begin.code};", "}" * len(opening)]
        opening, at = self._nest(rows.shape)
        place = result.at(stage.place(self.read, at)).code
        element = self.read(rows, at)
        element = element.widened() if result.is_vector else element
        join = "+=" if stage.accumulate else "="
        self.lines += [*opening, f"{place} {join} {element.code};", "}" * len(opening)]

    def _scan(self, stage: Scan) -> None:
        result, dim = stage.result, stage.dim
        self.made[result.name] = (self.stage, result)
        opening, at = self._nest(result.shape)
        before = result.at([*at[:dim], f"({at[dim]} - 1)", *at[dim + 1 :]]).code
        element = self.read(stage.source, at).code
        joined = f"{at[dim]} == 0 ? {element} : {stage.join.format(before, element)}"
        self.lines += [*opening, f"{result.at(at).code} = {joined};", "}" * len(opening)]

    def _factor(self, stage: Cholesky | Solve) -> None:
        result = stage.result
        self.made[result.name] = (self.stage, result)
        batch, size, columns = result.shape
        kind, place = c_type(result), result.at(["p", "i", "j"]).code

        def reader(value: Value) -> str:
            element = self.read(value, ["p", "i", "j"])
            code = element.widened().code if result.is_vector else element.code
            return f"[&](i64 i, i64 j) {{ return {code}; }}"

        write = f"[&](i64 i, i64 j, {kind} v) {{ {place} = v; }}"
        if isinstance(stage, Cholesky):
            self.lines.append(
                f"for (i64 i = 0; i < {result.size}; i++) {result.name}[i] = {kind}{{}};"
            )
            call = f"cholesky<{kind}>({size}, {reader(stage.matrix)}"
        else:
            flags = f"{str(stage.is_upper).lower()}, {str(stage.is_unit).lower()}"
            call = f"solve<{kind}>({size}, {columns}, {flags}, {reader(stage.matrix)}, "
            call += reader(stage.right)
        self.lines.append(f"for (i64 p = 0; p < {batch}; p++) {call}, {write}, {reader(result)});")

    def _call(self, stage: DensityCall) -> None:
        if self.density is None:
            raise CannotGenerate("a call of a density")
        position = stage.position
        if not position.is_whole or not position.is_vector:
            raise CannotGenerate("a density called at a view")
        for result in stage.results:
            self.made[result.name] = (self.stage, result)
        self.read(position, ["0"] * len(position.shape))
        names = ", ".join(result.name for result in stage.results)
        self.lines += [
            f"{{ density_in[0] = {position.name}; void *density_out[] = {{{names}}};",
            f"{self.density}(density_in, density_out, density_scratch, nullptr, nullptr); }}",
        ]

    def _output(self, number: int, value: Value) -> None:
        opening, at = self._nest(value.shape)
        element = self.read(value, at).widened()
        target = Value.array(f"out{number}", value.dtype, value.shape, is_vector=True)
        self.lines += [
            cast(target, f"out[{number}]"),
            *opening,
            f"{target.at(at).code} = {element.code};",
            "}" * len(opening),
        ]


def _extreme(dtype: torch.dtype, largest: bool) -> int:
    if dtype is torch.bool:
        return int(largest)
    info = torch.iinfo(dtype)
    return info.max if largest else info.min + 1


def _terms(member: Member) -> int:
    return max((value.size for value in member.inputs), default=1)


def _aligned(member: Member, shape: Sequence[int], at: Sequence[str]) -> list[str]:
    """Indexes a member's own shape by the indices of a loop that has the same elements."""
    own = member.inputs[0].shape if member.reduced is not None else member.result.shape
    if tuple(own) == tuple(shape):
        return list(at)
    used = iter([index for index, size in zip(at, shape, strict=True) if size != 1])
    return [next(used) if size != 1 else "0" for size in own]


def _places(writer: _Writer, arrays: Sequence[str]) -> tuple[dict[str, int], int]:
    """Gives large arrays places in scratch memory that others have left: places and bytes."""
    places: dict[str, int] = {}
    live: list[tuple[int, int, int]] = []  # start, stop, last stage that reads
    most = 0
    for name in sorted(arrays, key=lambda name: writer.made[name][0]):
        made, value = writer.made[name]
        size = _bytes(value, writer.lanes)
        live = [one for one in live if one[2] >= made]
        start = 0
        for begin, stop, _ in sorted(live):
            if begin - start >= size:
                break
            start = max(start, stop)
        live.append((start, start + size, writer.last_read[name]))
        places[name] = start
        most = max(most, start + size)
    return places, most


def _bytes(value: Value, lanes: int) -> int:
    item = 8 if value.dtype in (torch.float64, torch.int64) else 4
    size = value.size * item * (lanes if value.is_vector else 1)
    return -(-size // 128) * 128


def write_function(
    name: str, schedule: Schedule, inputs: Sequence[Value], lanes: int, density: str | None = None
) -> tuple[str, int]:
    """Writes a schedule as a function ``(in, out, scratch, density_in, density_scratch)``.

    Args:
        name: Of the function.
        schedule: What it computes.
        inputs: Arrays at the pointers of ``in``.
        lanes: Chains W in a vector.
        density: Name of the function that calls of the density go to.

    Returns:
        The source, and the bytes of scratch memory that it needs.

    Raises:
        CannotGenerate: If too much memory would be needed.
    """
    writer = _Writer(schedule, lanes, density)
    writer.body(None)
    made = {array: place for array, place in writer.made.items() if array in writer.last_read}
    lines = writer.body(set(made))
    large = [array for array, (_, value) in made.items() if value.size > _ON_STACK]
    places, scratch = _places(writer, large)
    if scratch > _MOST_SCRATCH:
        raise CannotGenerate("too large for its vectors to stay in the cache")
    head = [cast(value, f"in[{number}]") for number, value in enumerate(inputs)]
    for array, (_, value) in writer.made.items():
        if array in places:
            head.append(cast(value, f"(scratch + {places[array]})"))
        elif array in made or _is_always_written(writer, array):
            head.append(f"{c_type(value)} {array}[{max(value.size, 1)}];")
    arguments = "void **in, void **out, char *scratch, void **density_in, char *density_scratch"
    text = "\n".join([f"static void {name}({arguments}) {{", *head, *lines, "}"])
    return text, scratch


def _is_always_written(writer: _Writer, array: str) -> bool:
    """Tells whether an array that nobody reads is written all the same."""
    stage = writer.schedule.stages[writer.made[array][0]]
    if not isinstance(stage, Loop):
        return True
    return any(m.result.name == array and m.reduced is not None for m in stage.members)
