"""The annealing loop: which weight is taken where, what it costs, and when it must not break."""

import gc
import math
from dataclasses import dataclass, field

import pytest
import torch
from paths import Counted, GaussianPath, constant_path, lopsided
from transitions import MetropolisScan, PerfectTransition

from pyro_anneal import bounds
from pyro_anneal.chains.loop import CHUNK_SIZE, final_move, run_chains
from pyro_anneal.chains.path import Path, TuningTable
from pyro_anneal.kernels import HMC, Info, RandomWalk, State
from pyro_anneal.persistence.randomness import seeded_generator
from pyro_anneal.schedules import Linear, Power


@dataclass(frozen=True)
class Recorder:
    """Adds 1 to the position and notes the beta of each move; its reversal subtracts 1."""

    moves: list = field(default_factory=list)
    increment: float = 1.0
    target_accept: float | None = None
    num_gradients: int = 1

    def noise(self, state, generator):
        return (torch.rand((), generator=generator),)

    def step(self, state, density, beta, tuning, noise):
        self.moves.append((self.increment, float(beta)))
        new = density(state.position + self.increment)
        shape = new.log_base.shape
        accept_prob = torch.full(shape, float(beta))
        diverging = torch.zeros(shape, dtype=torch.bool)
        diverging[0] = beta > 0.5
        return new, Info(accept_prob, diverging)

    def reversal(self):
        return Recorder(self.moves, -self.increment)


def powers(position):
    """Base 0 and target 10^u: the weight spells where each increment was taken."""
    zero = torch.zeros(position.shape[:-1], dtype=position.dtype)
    grad = torch.zeros_like(position)
    return State(position, zero, 10.0 ** position[..., 0], grad, grad)


def anneal(density, path, position, direction="forward", *, seed=0, stream="s", **kwargs):
    state = density(position)
    return run_chains(
        density, path, state, direction=direction, seed=seed, stream=stream, **kwargs
    )


# --- order of increments and transitions (DESIGN, section 5) ----------------------------------

BETAS = [0.0, 0.1, 0.3, 0.7, 1.0]


def test_forward_chains_weigh_then_move():
    kernel = Recorder()
    path = constant_path(torch.tensor(BETAS), kernel, 1.0, torch.zeros(1))
    carry, statistics = anneal(powers, path, torch.zeros(2, 1))
    # at u = 0, 1, 2, 3 with widths 0.1, 0.2, 0.4, 0.3
    assert carry.log_weights.tolist() == pytest.approx([0.1 + 2.0 + 40.0 + 300.0] * 2)
    assert kernel.moves == [(1.0, pytest.approx(beta)) for beta in BETAS[1:-1]]
    assert carry.state.position.tolist() == [[3.0], [3.0]]  # where the last weight was taken
    assert statistics.mean_log_ratio.tolist() == [1.0, 10.0, 100.0, 1000.0]
    assert statistics.accept_prob.tolist() == pytest.approx(BETAS[1:-1])
    assert statistics.num_diverging.tolist() == [0.0, 0.0, 1.0]


def test_reverse_chains_weigh_then_move_with_the_reversed_kernel():
    kernel = Recorder()
    path = constant_path(torch.tensor(BETAS), kernel, 1.0, torch.zeros(1))
    carry, statistics = anneal(powers, path, torch.full((2, 1), 3.0), "reverse")
    # at u = 3, 2, 1, 0 with widths 0.3, 0.4, 0.2, 0.1: the forward path backwards
    assert carry.log_weights.tolist() == pytest.approx([300.0 + 40.0 + 2.0 + 0.1] * 2)
    assert kernel.moves == [(-1.0, pytest.approx(beta)) for beta in BETAS[-2:0:-1]]
    assert carry.state.position.tolist() == [[0.0], [0.0]]
    # in order of visit: the first entry is the state at beta = 1
    assert statistics.mean_log_ratio.tolist() == [1000.0, 100.0, 10.0, 1.0]
    assert statistics.accept_prob.tolist() == pytest.approx(BETAS[-2:0:-1])
    assert statistics.num_diverging.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("num_steps", [1, 2, CHUNK_SIZE, CHUNK_SIZE + 1, 2 * CHUNK_SIZE + 7])
def test_every_increment_and_move_happens_once_across_chunks(direction, num_steps):
    kernel, chunks = Recorder(), []
    betas = Power(1.7)(num_steps)
    path = constant_path(betas, kernel, 1.0, torch.zeros(1))

    def level(position):  # ratio u: linear, so that the sum has a closed form
        return powers(position)._replace(log_target=position[..., 0])

    carry, statistics = anneal(level, path, torch.zeros(1, 1), direction, progress=chunks.append)
    ticks = torch.arange(num_steps, dtype=torch.float64)
    widths = betas.diff() if direction == "forward" else -betas.diff().flip(0)
    assert carry.log_weights.item() == pytest.approx(float((widths * ticks).sum()), rel=1e-12)
    moves = betas[1:-1] if direction == "forward" else betas[1:-1].flip(0)
    assert [beta for _, beta in kernel.moves] == pytest.approx(moves.tolist())
    assert sum(chunks) == num_steps
    assert max(chunks) <= CHUNK_SIZE
    assert statistics.mean_log_ratio.shape == statistics.var_log_ratio.shape == (num_steps,)
    assert statistics.accept_prob.shape == statistics.num_diverging.shape == (num_steps - 1,)


def test_final_move_is_one_transition_at_the_target():
    kernel = Recorder()
    path = constant_path(torch.tensor(BETAS), kernel, 1.0, torch.zeros(1))
    moved, accept = final_move(powers, path, powers(torch.zeros(2, 1)), seed=0, stream="s")
    assert kernel.moves == [(1.0, 1.0)]
    assert moved.position.tolist() == [[1.0], [1.0]]
    assert accept == 1.0


# --- T = 1 ------------------------------------------------------------------------------------


def test_one_step_is_importance_sampling():
    density = lopsided()
    path = constant_path(Linear()(1), HMC(), 0.3, torch.zeros(5, 2))
    draws, samples = density.draw_base(7, 5), density.draw_target(7, 5)
    forward = anneal(density, path, draws)[0]
    reverse = anneal(density, path, samples, "reverse")[0]
    base = torch.distributions.Normal(density.base_loc, density.base_scale)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(density.weights),
        torch.distributions.Independent(
            torch.distributions.Normal(density.locs, density.scales), 1
        ),
    )

    def log_ratio(z):
        return mixture.log_prob(z) + density.log_normalizer - base.log_prob(z).sum(-1)

    iwae = log_ratio(draws).logsumexp(0) - math.log(7)
    assert torch.allclose(bounds.independent_multi_lower(forward.log_weights), iwae, rtol=1e-12)
    riwae = -((-log_ratio(samples)).logsumexp(0) - math.log(7))
    assert torch.allclose(bounds.independent_reverse_upper(reverse.log_weights), riwae, rtol=1e-12)
    assert torch.equal(forward.state.position, draws)  # no transition at all
    assert torch.equal(reverse.state.position, samples)


def test_exact_base_gives_weights_without_variance():
    # base = target / Z at every beta: each weight is Z whatever the kernel does
    precision = torch.tensor([[2.0, 0.7], [0.7, 1.0]])
    loc = torch.tensor([0.4, -1.0])
    density = GaussianPath(loc, precision, loc, precision, log_normalizer=-3.25)
    path = constant_path(Linear()(17), HMC(2), 0.4, torch.zeros(2))
    for direction in ("forward", "reverse"):
        carry, statistics = anneal(density, path, density.draw_base(6), direction)
        assert torch.allclose(carry.log_weights, torch.full((6,), -3.25), rtol=1e-13)
        assert torch.allclose(carry.integral, torch.full((6,), -3.25), rtol=1e-13)
        assert statistics.var_log_ratio.max() < 1e-20


# --- cost -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "each"), [(HMC(1), 1), (HMC(4), 4), (RandomWalk(), 1), (MetropolisScan(), 2)]
)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_run_costs_l_gradients_per_transition_and_nothing_else(kernel, each, direction):
    density = Counted(lopsided())
    path = constant_path(Linear()(23), kernel, 0.4, torch.zeros(2))
    state = density(torch.zeros(3, 2))
    density.count = 0
    run_chains(density, path, state, direction=direction, seed=0, stream="s")
    assert density.count == 22 * each


def live_bytes():
    """Measures what tensors hold."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_memory_does_not_grow_with_the_number_of_steps():
    density, held = lopsided(), {}
    num_chains = 4000
    one_position = num_chains * 2 * 8  # bytes
    start = density.draw_base(num_chains)
    for num_steps in (CHUNK_SIZE, 6 * CHUNK_SIZE):
        path = constant_path(Linear()(num_steps), HMC(1), 0.4, torch.zeros(2))
        ends = []

        def measure(_, ends=ends, num_steps=num_steps):
            ends.append(live_bytes() if len(ends) + 1 == num_steps // CHUNK_SIZE else 0)

        anneal(density, path, start, progress=measure)
        held[num_steps] = ends[-1]
    short, long = held.values()
    assert short > 5 * one_position  # the measure sees the chains' states
    # only numbers per step may remain: less than one position of one of 500 steps
    assert abs(long - short) < one_position


# --- numbers ----------------------------------------------------------------------------------


def test_float32_models_accumulate_in_float64():
    # 1000.0625 is exact in float32, sums of thousands of its parts are not
    def constant(position):
        value = torch.full(position.shape[:-1], 1000.0625, dtype=torch.float32)
        grad = torch.zeros_like(position)
        return State(position, torch.zeros_like(value), value, grad, grad)

    num_steps = 3000
    path = constant_path(Linear()(num_steps), HMC(1), 0.5, torch.zeros(1, dtype=torch.float32))
    carry, _ = anneal(constant, path, torch.zeros(2, 1, dtype=torch.float32))
    assert carry.log_weights.dtype == carry.integral.dtype == torch.float64
    assert carry.state.position.dtype == torch.float32
    assert carry.log_weights.tolist() == pytest.approx([1000.0625] * 2, abs=1e-9)
    assert carry.integral.tolist() == pytest.approx([1000.0625] * 2, abs=1e-9)
    in_float32 = torch.zeros((), dtype=torch.float32)
    for width in Linear()(num_steps).diff().float():
        in_float32 = in_float32 + width * torch.tensor(1000.0625, dtype=torch.float32)
    assert abs(float(in_float32) - 1000.0625) > 1e-3  # what float32 would have lost


@pytest.mark.parametrize("value", [-math.inf, math.nan])
@pytest.mark.parametrize("num_steps", [1, 6])
def test_starts_without_density_have_weight_zero_and_harm_no_other(value, num_steps):
    # half the base lies where the target has no density; E[w] must stay Z
    def half(position):
        state = oscillating(position)
        outside = position[..., 0] < 0.0
        return state._replace(
            log_target=torch.where(outside, value, state.log_target),
            grad_target=torch.where(outside.unsqueeze(-1), value, state.grad_target),
        )

    path = constant_path(Linear()(num_steps), HMC(2), 0.5, torch.zeros(1))
    position = torch.randn(50_000, 1)
    carry, statistics = anneal(half, path, position)
    outside = position[:, 0] < 0.0
    assert (carry.log_weights[outside] == -math.inf).all()
    assert carry.log_weights[~outside].isfinite().all()
    # integral of exp(-u^2) over u > 0, so that Z = sqrt(pi) / 2
    weights = carry.log_weights.exp()
    std_error = float(weights.std()) / math.sqrt(len(weights))
    assert std_error < 0.005
    assert abs(float(weights.mean()) - math.sqrt(math.pi) / 2) <= 5.0 * std_error
    assert statistics.accept_prob.isfinite().all()


def oscillating(position):
    """Base N(0, 1), target exp(-u^2)."""
    square = position[..., 0].square()
    base = -0.5 * square - 0.5 * math.log(2.0 * math.pi)
    return State(position, base, -square, -position, -2.0 * position)


def test_runs_repeat_bit_by_bit_and_streams_differ():
    density = lopsided()
    path = constant_path(Linear()(CHUNK_SIZE + 20), HMC(2), 0.4, torch.zeros(2))
    position = density.draw_base(16)

    def weights(seed, stream, direction="forward"):
        return anneal(density, path, position, direction, seed=seed, stream=stream)[0].log_weights

    first = weights(3, "forward")
    torch.rand(5)  # the global generator has no part in it
    assert torch.equal(weights(3, "forward"), first)
    assert not torch.isclose(weights(4, "forward"), first).any()
    assert not torch.isclose(weights(3, "reverse"), first).any()


def test_chunks_repeat_from_their_starting_state_and_do_not_share_noise():
    generators = [
        seeded_generator(torch.device("cpu"), 3, "forward", chunk) for chunk in (0, 0, 1)
    ]
    draws = [torch.rand(4, generator=generator) for generator in generators]
    assert torch.equal(draws[0], draws[1])
    assert not torch.isclose(draws[0], draws[2]).any()


def test_a_run_does_not_touch_the_global_generator():
    density = lopsided()
    path = constant_path(Linear()(5), HMC(2), 0.4, torch.zeros(2))
    position = density.draw_base(4)
    before = torch.get_rng_state()
    anneal(density, path, position)
    assert torch.equal(torch.get_rng_state(), before)


def test_statistics_are_means_over_chains_and_batch():
    kernel = Recorder()
    path = constant_path(torch.tensor([0.0, 0.4, 1.0]), kernel, 1.0, torch.zeros(2, 1))
    position = torch.tensor([[[0.0], [1.0]], [[1.0], [3.0]]])  # [K = 2, batch = 2, D = 1]

    def level(position):
        return powers(position)._replace(log_target=position[..., 0])

    _, statistics = anneal(level, path, position)
    # ratios [[0, 1], [1, 3]]: variances over chains 1/4 and 1
    assert statistics.mean_log_ratio.tolist() == [1.25, 2.25]
    assert statistics.var_log_ratio.tolist() == [0.625, 0.625]


# --- thermodynamic integration ----------------------------------------------------------------


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_trapezoids_follow_the_closed_form_curve(direction):
    # case E01: z ~ N(0, 1), x | z ~ N(z, 1), x = 2, whose curve is
    # g(b) = -log(2 pi) / 2 - [4 / (1 + b)^2 + 1 / (1 + b)] / 2 and log p(x) = -2.265512
    log_two_pi = math.log(2.0 * math.pi)

    def e01(position):
        u = position[..., 0]
        base = -0.5 * u.square() - 0.5 * log_two_pi
        target = base - 0.5 * (2.0 - u).square() - 0.5 * log_two_pi
        return State(position, base, target, -position, 2.0 - 2.0 * position)

    def at(beta):
        return 2.0 * beta / (1.0 + beta), (1.0 + beta) ** -0.5

    def curve(beta):
        return -0.5 * log_two_pi - 0.5 * (4.0 / (1.0 + beta) ** 2 + 1.0 / (1.0 + beta))

    betas = Power(1.3)(40)
    path = constant_path(betas, PerfectTransition(at), 1.0, torch.zeros(1))
    num_chains = 20_000
    loc, scale = at(0.0 if direction == "forward" else 1.0)
    start = loc + scale * torch.randn(num_chains, 1)
    carry, statistics = anneal(e01, path, start, direction)
    visited = betas[:-1] if direction == "forward" else betas[1:].flip(0)
    std_errors = (statistics.var_log_ratio / num_chains).sqrt()
    assert ((statistics.mean_log_ratio - curve(visited)).abs() <= 5.0 * std_errors).all()
    assert std_errors.max() < 0.02
    value, std_error = carry.integral.mean(), carry.integral.std() / math.sqrt(num_chains)
    # trapezoids between visited betas, the last interval by its one visited end
    nodes = torch.cat([curve(betas[:-1]), curve(betas[-2:-1])])
    if direction == "reverse":
        nodes = torch.cat([curve(betas[1:2]), curve(betas[1:])])
    expected = torch.trapezoid(nodes, betas)
    assert abs(float(value - expected)) <= 5.0 * float(std_error)
    assert float(std_error) < 0.002
    assert abs(float(value) + 2.265512) < 0.05  # coarse betas: an estimate, not a bound


def test_trapezoids_converge_to_the_evidence():
    density = lopsided()
    path = constant_path(Power(1.5)(700), HMC(2), 0.7, torch.zeros(2))
    carry, _ = anneal(density, path, density.draw_base(300))
    std_error = float(carry.integral.std()) / math.sqrt(300)
    assert std_error < 0.01
    assert abs(float(carry.integral.mean()) - density.log_normalizer) <= 5.0 * std_error


# --- tuning -----------------------------------------------------------------------------------


def test_tuning_is_interpolated_in_the_logarithm():
    step_size = torch.tensor([[1.0, 2.0], [4.0, 8.0], [1.0, 1.0]])  # [S = 3, batch = 2]
    scale = torch.tensor([[[1.0], [1.0]], [[100.0], [1.0]], [[1.0], [1.0]]])  # [3, 2, D = 1]
    table = TuningTable((0.0, 0.2, 0.6), step_size.log(), scale.log())
    for beta, steps, scales in [
        (0.0, [1.0, 2.0], [1.0, 1.0]),
        (0.1, [2.0, 4.0], [10.0, 1.0]),
        (0.2, [4.0, 8.0], [100.0, 1.0]),
        (0.4, [2.0, 8.0**0.5], [10.0, 1.0]),
        (0.6, [1.0, 1.0], [1.0, 1.0]),
        (0.9, [1.0, 1.0], [1.0, 1.0]),  # constant beyond the last knot
    ]:
        tuning = table.at(beta)
        assert tuning.step_size.tolist() == pytest.approx(steps)
        assert tuning.scale[:, 0].tolist() == pytest.approx(scales)


def test_tuning_is_constant_before_the_first_knot():
    table = TuningTable((0.5, 1.0), torch.tensor([[0.0], [1.0]]), torch.zeros(2, 1, 1))
    assert table.at(0.1).step_size.tolist() == [1.0]


def test_constant_tuning():
    table = TuningTable.constant(torch.tensor([0.2, 0.5]), torch.zeros(2, 3))
    for beta in (0.0, 1e-9, 0.5, 1.0):
        assert table.at(beta).step_size.tolist() == pytest.approx([0.2, 0.5])
        assert torch.equal(table.at(beta).scale, torch.ones(2, 3))


def test_moves_use_the_tuning_of_their_beta():
    @dataclass(frozen=True)
    class Listener(Recorder):
        seen: list = field(default_factory=list)

        def step(self, state, density, beta, tuning, noise):
            self.seen.append((round(float(beta), 6), round(float(tuning.step_size), 6)))
            return super().step(state, density, beta, tuning, noise)

        def reversal(self):
            return self

    table = TuningTable((0.0, 1.0), torch.tensor([0.0, 1.0]), torch.zeros(2, 1))
    expected = [(beta, round(math.exp(beta), 6)) for beta in (0.25, 0.5, 0.75)]
    for direction in ("forward", "reverse"):
        kernel = Listener()
        anneal(powers, Path(Linear()(4), kernel, table), torch.zeros(2, 1), direction)
        assert sorted(kernel.seen) == expected
