"""Every rule of native code against torch, at random numbers and at edges.

Graphs are compared with the model at a few points before they are used; a wrong rule could agree there.
"""

import itertools
import math

import pytest
import torch
from test_native_code import native, needs_compiler

from pyro_anneal.native.rules import ELEMENTWISE

aten = torch.ops.aten
EDGES = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 88.0, -103.0, 709.0, -745.0, 1e30, -1e30, 1e-30, 1e-42, 0.5, -0.5, 2.0, -3.0]  # fmt: skip
# Operands that are no tensors, by name of the operation and of the argument.
NUMBERS = {
    ("clamp", "min"): -0.5,
    ("clamp", "max"): 0.8,
    ("masked_fill", "value"): -math.inf,
    ("clamp_min", "min"): 0.3,
    ("clamp_max", "max"): 0.3,
    ("hardtanh", "min_val"): -0.7,
    ("hardtanh", "max_val"): 0.2,
    ("elu_backward", "is_result"): False,
    ("leaky_relu_backward", "self_is_result"): False,
    ("leaky_relu", "negative_slope"): 0.2,
    ("threshold_backward", "threshold"): 0.1,
    ("softplus", "threshold"): 20.0,
    ("softplus_backward", "threshold"): 20.0,
    ("elu", "alpha"): 1.3,
    ("add", "alpha"): -2.0,
    ("sub", "alpha"): 3.0,
    ("rsub", "alpha"): 2.0,
    ("binary_cross_entropy_with_logits", "reduction"): 0,
    ("where", "self"): 2.5,
    ("where", "other"): -math.inf,
}
GIVEN = (
    "reduction",
    "min",
    "max",
    "alpha",
    "min_val",
    "max_val",
    "threshold",
    "negative_slope",
)  # have defaults
OF_TRUTHS = ("logical_", "bitwise_", "__and__", "__or__")
TRUTHS = {("where", "condition"), ("masked_fill", "mask")}
# Relative to what is near a root, and to the operands where terms cancel.
NEAR_ROOTS = ("digamma", "lgamma")
CANCELLING = ("add", "sub", "rsub", "lerp", "addcmul", "addcdiv", "logaddexp", "binary_cross_entropy_with_logits", "tanh_backward", "silu_backward", "sigmoid_backward")  # fmt: skip


def called(name):
    """Makes a function of three numbers that calls one operation, from its schema."""
    short, _, overload = name.partition(".")
    operation = getattr(getattr(aten, short), overload)

    def function(*numbers):
        args, named, operands, skipped = [], {}, iter(numbers), False
        for argument in operation._schema.arguments:
            kind, place = str(argument.type), (short, argument.name)
            is_given = argument.name in GIVEN or not argument.has_default_value()
            if "Tensor" in kind:
                if not is_given:
                    skipped = True
                    continue
                value = next(operands)
                if place == ("log_sigmoid_backward", "buffer"):
                    value = (-numbers[1].abs()).exp()
                if place == ("masked_fill", "value"):
                    value = value.new_full((), -2.5)
                if short.startswith(OF_TRUTHS) or place in TRUTHS:
                    value = value > 0.2
            elif not is_given or ("Optional" in kind and place not in NUMBERS):
                skipped = True
                continue
            else:
                value = NUMBERS.get(place, 0.75)
            if argument.kwarg_only or skipped:
                named[argument.name] = value
            else:
                args.append(value)
        result = operation(*args, **named)
        return result if result.is_floating_point() else result.to(numbers[0].dtype)

    return function


def operands(dtype):
    """Triples of numbers: all pairs of edges, edges beside usual numbers, numbers of all sizes."""
    generator = torch.Generator().manual_seed(0)
    edges = torch.tensor(EDGES, dtype=torch.float64)
    pairs = torch.tensor(list(itertools.product(EDGES, EDGES)), dtype=torch.float64)
    third = edges[torch.randint(len(edges), (len(pairs), 1), generator=generator)]
    usual = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    sizes = torch.randn(200, 3, generator=generator, dtype=torch.float64) * torch.logspace(
        -6, 2, 200, dtype=torch.float64
    ).unsqueeze(1)
    inside = torch.rand(100, 3, generator=generator, dtype=torch.float64)
    mixed = torch.where(torch.rand(200, 3, generator=generator) < 0.3, third[:200], usual)
    return torch.cat([torch.cat([pairs, third], 1), usual, sizes, inside, mixed]).to(dtype)


@needs_compiler
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)]
)
def test_every_operation_on_numbers_is_that_of_torch(dtype):
    functions = {name: called(name) for name in sorted(ELEMENTWISE)}
    position = operands(dtype)
    run = native(lambda u: tuple(f(*u.split(1)) for f in functions.values()), position[0])
    columns = position.split(1, 1)
    wide = [column.double() for column in columns]
    known = [column.abs().nan_to_num(0.0, 0.0) for column in wide]
    size = sum(known) + known[1] * known[2]
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    wrong = {}
    for name, got in zip(functions, run(position), strict=True):
        eager, exact = functions[name](*columns), functions[name](*wide)
        usual = eager.isfinite() & exact.to(dtype).isfinite()
        # where torch itself overflows or is undefined, the same happens
        same = (got == eager) | (got.isnan() & eager.isnan())
        own = (eager.double() - exact).abs()
        bound = 8.0 * eps * exact.abs() + 4.0 * own + 4.0 * tiny
        short = name.partition(".")[0]
        if short in CANCELLING:
            bound = bound + 8.0 * eps * size
        if short in NEAR_ROOTS:
            bound = bound + 64.0 * eps
        close = ((got.double() - exact).abs() <= bound) & usual
        bad = ~(same | close).squeeze(1)
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            wrong[name] = (
                int(bad.sum()),
                position[first].tolist(),
                float(got[first]),
                float(eager[first]),
            )
    assert not wrong, "\n".join(f"{name}: {found}" for name, found in wrong.items())
