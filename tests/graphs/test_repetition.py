"""Numbers that repeat are computed once, and are the same numbers."""

import pytest
import torch

from pyro_anneal.graphs.repetition import ComputeOnce, WrittenTo, narrowed, repeated_dims

SCALE = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
ROWS = SCALE.expand(4, 3)
X = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

# Each with the dimensions along which its result is known to repeat.
CASES = {
    "one argument": (lambda: ROWS.log(), (0,)),
    "chain": (lambda: -((2.0 * ROWS.square()).reciprocal()), (0,)),
    "two scales": (lambda: ROWS * SCALE[:1].expand(4, 3), (0,)),
    "missing dimension": (lambda: ROWS + SCALE, (0,)),
    "number": (lambda: torch.tensor(2.0).double().expand(4, 3).exp(), (0, 1)),
    "filled": (lambda: torch.full((4, 3), 2.0).log(), (0, 1)),
    "condition": (lambda: torch.where(ROWS > 1.0, ROWS, 0.0), (0,)),
    "other type": (lambda: ROWS.float().double(), (0,)),
    "mixed": (lambda: X / ROWS.exp(), ()),
    "moved": (lambda: ROWS.exp().mT * 2.0, (1,)),
    "reshaped": (lambda: (ROWS * 2.0).view(12), ()),
    "reshaped by one": (lambda: (ROWS * 2.0).view(4, 1, 3) + 1.0, (0,)),
    "storage": (lambda: torch.as_strided(ROWS * 2.0, (2, 6), (6, 1)), ()),
    "sum": (lambda: ROWS.exp().sum(0), ()),
    "product": (lambda: X.mT @ ROWS.exp(), ()),
    "joined": (lambda: torch.cat([ROWS.exp(), X]), ()),
    "empty": (lambda: SCALE[:0].expand(4, 0).exp(), (0,)),
}


@pytest.mark.parametrize("name", CASES)
def test_results_are_the_same_and_repeat(name):
    function, dims = CASES[name]
    expected = function()
    with ComputeOnce():
        got = function()
    torch.testing.assert_close(got, expected, rtol=1e-15, atol=0.0)
    assert repeated_dims(got) == dims


class Counted(torch.Tensor):
    """Counts the elements that operations compute."""

    computed = 0

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = torch.utils._pytree.tree_map_only(Counted, lambda t: t.plain, (args, kwargs or {}))
        result = func(*plain[0], **plain[1])
        if torch.Tag.pointwise in func.tags:
            cls.computed += result.numel()
        return Counted(result)

    @staticmethod
    def __new__(cls, plain):
        strides = {"strides": plain.stride(), "dtype": plain.dtype}
        self = torch.Tensor._make_wrapper_subclass(cls, plain.shape, **strides)
        self.plain = plain
        return self


def test_nothing_is_computed_twice():
    Counted.computed = 0
    rows = Counted(SCALE).expand(1000, 3)
    with ComputeOnce():
        result = (2.0 * rows.square()).log()
    assert Counted.computed == 9  # three operations on three numbers
    assert result.shape == (1000, 3)


def test_writing_into_a_view_is_refused_not_done_to_all():
    with ComputeOnce(), pytest.raises(WrittenTo, match="add_"):
        ROWS.exp().add_(X)
    with ComputeOnce():
        torch.testing.assert_close(X.exp().add_(ROWS.exp()), X.exp() + ROWS.exp())


def test_narrowed_drops_what_repeats():
    assert repeated_dims(ROWS) == (0,)
    assert repeated_dims(X) == ()
    assert torch.equal(narrowed(ROWS, (0,)), SCALE[None])


def elementwise_operations():
    """All elementwise operations of PyTorch that take one to three tensors and nothing else."""
    aten = torch.ops.aten
    packets = (getattr(aten, name) for name in dir(aten))
    for packet in packets:
        for overload in getattr(packet, "overloads", list)():
            func = getattr(packet, overload)
            needed = [x for x in func._schema.arguments if not x.has_default_value()]
            written = func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags
            if torch.Tag.pointwise not in func.tags or written or len(needed) not in (1, 2, 3):
                continue
            if all(str(x.type) == "Tensor" and not x.kwarg_only for x in needed):
                yield func, len(needed)


def test_every_elementwise_operation_commutes_with_expansion():
    one, other = SCALE[:1].expand(4, 3), ROWS / 4.0
    compared = 0
    for func, count in elementwise_operations():
        for operands in ([other, one, other], [other, X, one], [other, one, X]):
            try:
                expected = func(*operands[:count])
            except (RuntimeError, NotImplementedError, TypeError):  # of integers or booleans only
                continue
            with ComputeOnce():
                got = func(*operands[:count])
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=0.0, equal_nan=True)
            compared += 1
    assert compared > 200
