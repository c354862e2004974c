"""Noise that kernels declare is drawn for many steps at once, and is what it says."""

import math

import pytest
import torch
from scipy import stats

from pyro_anneal.kernels import HMC, Composite, RandomWalk, State
from pyro_anneal.kernels.base import moves_chains_alone
from pyro_anneal.kernels.noise import (
    Noise,
    declared,
    draw_steps,
    draw_together,
    noise_in_blocks,
)


def state(num_chains=3, batch=(2,), dim=4):
    wide = torch.zeros(num_chains, *batch, dim, dtype=torch.float64)
    return State(wide, wide[..., 0], wide[..., 0], wide, wide)


class Undeclared:
    """A user's kernel, which draws its noise step by step."""

    num_gradients, target_accept = 1, None

    def noise(self, state, generator):
        return (torch.rand((), generator=generator), torch.randn(2, generator=generator))

    def step(self, state, density, beta, tuning, noise):
        raise NotImplementedError

    def reversal(self):
        return self


@pytest.mark.parametrize(
    ("part", "law"),
    [
        (Noise("normal", (5,)), stats.norm()),
        (Noise("uniform"), stats.uniform()),
        (Noise("uniform", (2, 3), low=-1.0), stats.uniform(-1.0, 2.0)),
        (Noise("exponential"), stats.expon()),
    ],
)
def test_every_kind_has_its_law(part, law):
    generator = torch.Generator().manual_seed(0)
    (drawn,) = draw_together([part], state(50), 100, generator)
    assert drawn.shape == (100, 50, 2, *part.shape)
    assert drawn.dtype == torch.float64
    assert stats.kstest(drawn.flatten().numpy()[:20_000], law.cdf).pvalue > 1e-3
    assert drawn.movedim(1, -1).is_contiguous()  # chains last, as compiled steps keep it
    halves = drawn[:50].flatten(), drawn[50:].flatten()
    correlation = torch.corrcoef(torch.stack(halves))[0, 1]
    assert abs(correlation) < 5.0 / math.sqrt(len(halves[0]))


@pytest.mark.parametrize("kernel", [HMC(2), RandomWalk(), Composite((HMC(1), RandomWalk()))])
def test_a_kernel_draws_what_it_declares(kernel):
    example = state()
    single = kernel.noise(example, torch.Generator().manual_seed(1))
    together = draw_steps(kernel, example, 1, torch.Generator().manual_seed(1))
    parts = declared(kernel, example)
    assert len(single) == len(together) == len(parts)
    for one, drawn, part in zip(single, together, parts, strict=True):
        assert one.shape == drawn.shape[1:] == (3, 2, *part.shape)
    if not isinstance(kernel, Composite):
        assert all(torch.equal(a, b[0]) for a, b in zip(single, together, strict=True))


def test_other_kernels_draw_step_by_step():
    kernel, example = Undeclared(), state()
    generator = torch.Generator().manual_seed(2)
    expected = [kernel.noise(example, generator) for _ in range(7)]
    for limit in (2**22, 8):  # all at once, or two steps at a time
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pyro_anneal.kernels.noise._LIMIT", limit)
            blocks = noise_in_blocks(kernel, example, 7, 100, torch.Generator().manual_seed(2))
            got = list(blocks)
        assert [len(range(7)[steps]) for steps, _ in got] == ([7] if limit > 8 else [2, 2, 2, 1])
        for number, part in enumerate(zip(*expected, strict=True)):
            joined = torch.cat([noise[number] for _, noise in got])
            assert torch.equal(joined, torch.stack(part))
    assert declared(Composite((HMC(1), Undeclared())), example) is None


def test_who_says_nothing_may_let_chains_see_each_other():
    assert moves_chains_alone(HMC())
    assert moves_chains_alone(RandomWalk())
    assert not moves_chains_alone(Undeclared())
    assert not moves_chains_alone(Composite((HMC(), Undeclared())))
