"""Kernels against exact mechanics and quadrature."""

import math

import pytest
import torch
from paths import Counted, lopsided
from transitions import GibbsScan, MetropolisScan

from pyro_anneal.kernels import HMC, Kernel, RandomWalk, State, Tuning, accept, leapfrog

BETA = torch.tensor(0.6, dtype=torch.float64)
KERNELS = [HMC(1), HMC(3), RandomWalk()]


def oscillator(position):
    """Harmonic oscillators of frequencies 1, 2, .. as target; the base is flat."""
    frequency = torch.arange(1.0, position.shape[-1] + 1.0)
    grad = -frequency.square() * position
    log_target = 0.5 * (position * grad).sum(-1)
    zero = torch.zeros_like(log_target)
    return State(position, zero, log_target, torch.zeros_like(position), grad)


def tuning(step_size, scale):
    return Tuning(torch.tensor(step_size), torch.tensor(scale))


def energy(state, momentum, beta):
    return 0.5 * momentum.square().sum(-1) - state.log_density(beta)


def given(kernel, normal, uniform, jitter=0.0):
    """Builds the noise of one step from given numbers."""
    extra = (torch.full_like(uniform, jitter),) if isinstance(kernel, HMC) else ()
    return normal, uniform, *extra


# --- the integrator ---------------------------------------------------------------------------


def test_leapfrog_conserves_the_shadow_energy_of_the_oscillator():
    # leapfrog solves exactly the oscillator of energy v^2 + (1 - h^2 s^2 w^2 / 4) (s w)^2 (u/s)^2
    step, scale = 0.3, torch.tensor([1.5, 0.4, 0.7])
    stiffness = (scale * torch.arange(1.0, 4.0)).square()
    position, momentum = torch.randn(5, 3), torch.randn(5, 3)

    def shadow(position, momentum):
        shrunk = 1.0 - 0.25 * step**2 * stiffness
        return momentum.square() + shrunk * stiffness * (position / scale).square()

    one = torch.tensor(1.0)
    state, end = leapfrog(
        oscillator(position), momentum, oscillator, one, Tuning(torch.tensor(step), scale), 50
    )
    before, after = shadow(position, momentum), shadow(state.position, end)
    assert torch.allclose(after, before, rtol=1e-12, atol=0.0)
    assert not torch.allclose(state.position, position, atol=0.1)


def test_energy_error_is_of_second_order():
    density = lopsided()
    position, momentum = density.draw_target(200), torch.randn(200, 2)
    errors = []
    for num_steps in (20, 40, 80):
        state = density(position)
        table = tuning(1.5 / num_steps, [0.8, 1.3])
        end_state, end = leapfrog(state, momentum, density, BETA, table, num_steps)
        change = energy(end_state, end, BETA) - energy(state, momentum, BETA)
        errors.append(float(change.abs().mean()))
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.02)
    assert errors[1] / errors[2] == pytest.approx(4.0, rel=0.01)


def test_leapfrog_is_reversible():
    density = lopsided()
    position, momentum = density.draw_base(100), torch.randn(100, 2)
    table = tuning(0.4, [0.8, 1.3])
    there, end = leapfrog(density(position), momentum, density, BETA, table, 7)
    back, start = leapfrog(there, -end, density, BETA, table, 7)
    assert not torch.allclose(there.position, position, atol=0.1)
    assert torch.allclose(back.position, position, rtol=0.0, atol=1e-12)
    assert torch.allclose(start, -momentum, rtol=0.0, atol=1e-12)


def test_leapfrog_preserves_volume_and_is_symplectic():
    density, scale = lopsided(), torch.tensor([0.8, 1.3])

    def flow(point):
        position, momentum = point[:2], point[2:]
        table = Tuning(torch.tensor(0.7), scale)
        state, end = leapfrog(density(position), momentum * scale, density, BETA, table, 3)
        return torch.cat([state.position, end / scale])  # canonical momentum p = v / scale

    jacobian = torch.autograd.functional.jacobian(flow, torch.tensor([0.9, -0.2, 0.7, -1.1]))
    zero, eye = torch.zeros(2, 2), torch.eye(2)
    form = torch.cat([torch.cat([zero, eye], 1), torch.cat([-eye, zero], 1)])
    assert torch.det(jacobian).item() == pytest.approx(1.0, abs=1e-12)
    assert torch.allclose(jacobian.T @ form @ jacobian, form, rtol=0.0, atol=1e-12)
    assert not torch.allclose(jacobian, torch.eye(4), atol=0.1)


def test_leapfrog_follows_the_path_at_beta():
    density = lopsided()

    def mixed(position):
        state = density(position)
        grad = 0.4 * state.grad_base + 0.6 * state.grad_target
        value = 0.4 * state.log_base + 0.6 * state.log_target
        return State(position, torch.zeros_like(value), value, torch.zeros_like(grad), grad)

    position, momentum, table = density.draw_base(9), torch.randn(9, 2), tuning(0.4, [0.8, 1.3])
    at_beta, end = leapfrog(density(position), momentum, density, BETA, table, 4)
    direct, same = leapfrog(mixed(position), momentum, mixed, torch.tensor(1.0), table, 4)
    assert torch.allclose(at_beta.position, direct.position, rtol=1e-10)
    assert torch.allclose(end, same, rtol=1e-10)
    assert torch.allclose(at_beta.log_density(BETA), direct.log_target, rtol=1e-10)


# --- acceptance -------------------------------------------------------------------------------


def fill(value, shape=(3, 2)):
    wide = torch.full((*shape, 4), value)
    return State(wide, wide[..., 0] + 1, wide[..., 0] + 2, wide + 3, wide + 4)


@pytest.mark.parametrize(
    ("log_accept", "uniform", "taken", "probability"),
    [
        (math.nan, 0.0, False, 0.0),
        (math.nan, 0.999, False, 0.0),
        (-math.inf, 0.0, False, 0.0),
        (-math.inf, 1.0 - 2.0**-53, False, 0.0),
        (math.inf, 0.0, True, 1.0),
        (-1e-3, 0.0, False, math.exp(-1e-3)),  # 1 - uniform = 1 is above exp(-0.001)
        (-800.0, 0.0, False, 0.0),  # exp underflows, as a uniform of 0 must not accept it
        (math.log(0.3), 0.71, True, 0.3),  # 1 - 0.71 < 0.3
        (math.log(0.3), 0.69, False, 0.3),
        (5.0, 0.5, True, 1.0),
    ],
)
def test_accept_at_the_edges(log_accept, uniform, taken, probability):
    shape = (3, 2)
    new, accept_prob = accept(
        fill(0.0), fill(10.0), torch.full(shape, log_accept), torch.full(shape, uniform)
    )
    expected = fill(10.0) if taken else fill(0.0)
    for value, wanted in zip(new, expected, strict=True):
        assert torch.equal(value, wanted)
    assert torch.allclose(accept_prob, torch.full(shape, probability), rtol=1e-12)


def test_accept_selects_per_chain_and_batch_element():
    log_accept = torch.tensor([[9.0, -9.0], [math.nan, 9.0], [-9.0, -9.0]])
    new, _ = accept(fill(0.0), fill(10.0), log_accept, torch.full((3, 2), 0.5))
    taken = torch.tensor([[10.0, 0.0], [0.0, 10.0], [0.0, 0.0]])
    assert torch.equal(new.position, taken.unsqueeze(-1).expand(3, 2, 4))
    assert torch.equal(new.log_base, taken + 1)
    assert torch.equal(new.log_target, taken + 2)
    assert torch.equal(new.grad_base, taken.unsqueeze(-1).expand(3, 2, 4) + 3)
    assert torch.equal(new.grad_target, taken.unsqueeze(-1).expand(3, 2, 4) + 4)


def test_a_rejected_nan_proposal_does_not_poison_the_state():
    bad = State(*(torch.full_like(value, math.nan) for value in fill(0.0)))
    new, _ = accept(fill(0.0), bad, torch.full((3, 2), math.nan), torch.zeros(3, 2))
    assert all(value.isfinite().all() for value in new)


# --- invariance -------------------------------------------------------------------------------


def test_hmc_satisfies_detailed_balance():
    # pi(u) phi(v) a(u, v) = pi(u') phi(v') a(u', -v'), with the volume of the map equal to 1
    density, table = lopsided(), tuning(0.9, [0.8, 1.3])
    state, momentum = density(density.draw_base(500)), torch.randn(500, 2)
    uniform = torch.zeros(500)
    kernel = HMC(2)
    jitter = 2.0 * torch.rand(500) - 1.0  # chosen without regard to the state
    jittered = Tuning(table.step_size * (1.0 + 0.5 * jitter), table.scale)
    there, end = leapfrog(state, momentum, density, BETA, jittered, 2)
    _, info = kernel.step(state, density, BETA, table, (momentum, uniform, jitter))
    _, info_back = kernel.step(there, density, BETA, table, (-end, uniform, jitter))
    flow = info.accept_prob.log() - energy(state, momentum, BETA)
    flow_back = info_back.accept_prob.log() - energy(there, end, BETA)
    assert torch.allclose(flow, flow_back, rtol=0.0, atol=1e-10)
    assert info.accept_prob.min() < 0.9  # the test is about rejections, too


def test_random_walk_satisfies_detailed_balance():
    density, table = lopsided(), tuning(1.3, [0.8, 1.3])
    here, there = density(density.draw_base(500)), density(density.draw_target(500))
    noise = (there.position - here.position) / (1.3 * table.scale)
    uniform = torch.zeros(500)
    _, info = RandomWalk().step(here, density, BETA, table, (noise, uniform))
    _, back = RandomWalk().step(there, density, BETA, table, (-noise, uniform))
    flow = info.accept_prob.log() + here.log_density(BETA)
    flow_back = back.accept_prob.log() + there.log_density(BETA)
    assert torch.allclose(flow, flow_back, rtol=0.0, atol=1e-10)


@pytest.mark.parametrize(
    ("kernel", "step_size"), [(HMC(1), 1.3), (HMC(3), 0.8), (RandomWalk(), 1.4)], ids=repr
)
@pytest.mark.parametrize("beta", [0.05, 0.6, 1.0])
def test_density_is_invariant_by_quadrature(kernel, step_size, beta):
    # integrates over positions and momenta: no Monte Carlo error, and no exact sampler needed
    density = lopsided(dim=1)
    u, v = torch.linspace(-9.0, 10.0, 2001), torch.linspace(-7.0, 7.0, 501)
    beta = torch.tensor(beta)
    state = density(u[:, None, None].expand(-1, len(v), 1))
    momentum = v[None, :, None].expand(len(u), -1, 1)
    noise = given(kernel, momentum, torch.zeros(len(u), len(v)), jitter=0.3)
    proposal = State(*(value.clone() for value in state))

    def record(position):
        nonlocal proposal
        proposal = density(position)
        return proposal

    _, info = kernel.step(state, record, beta, tuning(step_size, [0.9]), noise)
    weights = (state.log_density(beta) - 0.5 * momentum[..., 0].square()).exp()
    weights = weights / weights.sum()
    assert info.accept_prob.mul(weights).sum() < 0.99
    for moment in (lambda x: x, torch.square, lambda x: x**3, torch.sin, torch.atan):
        before, after = moment(state.position[..., 0]), moment(proposal.position[..., 0])
        moved = torch.lerp(before, after, info.accept_prob)
        expected = (weights * before).sum()
        assert abs(float((weights * moved).sum() - expected)) < 1e-4
    # the error that rejection mends is a hundred times larger
    unadjusted = (weights * proposal.position[..., 0].square()).sum()
    assert abs(float(unadjusted - (weights * state.position[..., 0].square()).sum())) > 1e-2


@pytest.mark.parametrize("kernel", [*KERNELS, MetropolisScan()], ids=repr)
def test_moments_stay_under_many_transitions(kernel):
    # two dimensions, exact draws from the target, 200,000 independent chains
    density = lopsided()
    state = density(density.draw_target(200_000))
    generator = torch.Generator().manual_seed(3)
    one, table = torch.tensor(1.0), tuning(0.9, [0.8, 1.3])
    for _ in range(4):
        noise = kernel.noise(state, generator)
        state, info = kernel.step(state, density, one, table, noise)
    assert 0.1 < info.accept_prob.mean() < 0.98
    share, rest = density.weights
    (low, high), (narrow, wide) = density.locs, density.scales
    mean = share * low + rest * high
    second = share * (low**2 + narrow**2) + rest * (high**2 + wide**2)
    third = share * (low**3 + 3 * low * narrow**2) + rest * (high**3 + 3 * high * wide**2)
    cross = share * low.prod() + rest * high.prod()
    u = state.position
    for values, truth in ((u, mean), (u**2, second), (u**3, third), (u.prod(-1), cross)):
        std_error = values.std(0) / math.sqrt(len(u))
        assert ((values.mean(0) - truth).abs() <= 5.0 * std_error).all()


# --- bookkeeping ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "count"), [(HMC(1), 1), (HMC(5), 5), (RandomWalk(), 1), (MetropolisScan(), 2)]
)
def test_a_step_costs_exactly_what_the_kernel_says(kernel, count):
    density = Counted(lopsided())
    state = density(torch.zeros(3, 2))
    density.count = 0
    noise = kernel.noise(state, None)
    kernel.step(state, density, BETA, tuning(0.5, [1.0, 1.0]), noise)
    assert density.count == count == kernel.num_gradients


def test_hmc_info_by_hand():
    # one leapfrog on a standard normal from u = 1 with v = 2, h = 0.5:
    # v' = 1.75, u' = 1.875, v'' = 1.28125; energies 2.5 and 2.578613...
    state = oscillator(torch.tensor([[1.0]]))
    kernel = HMC(1)
    noise = given(kernel, torch.tensor([[2.0]]), torch.tensor([0.05]))
    table = tuning(0.5, [1.0])
    new, info = kernel.step(state, oscillator, torch.tensor(1.0), table, noise)
    change = 0.5 * (1.875**2 + 1.28125**2) - 2.5
    assert info.accept_prob.item() == pytest.approx(math.exp(-change), rel=1e-12)
    assert not info.diverging.item()
    assert new.position.item() == 1.0  # 1 - 0.05 > exp(-0.0786) = 0.9244
    noise = given(kernel, torch.tensor([[2.0]]), torch.tensor([0.1]))
    new, _ = kernel.step(state, oscillator, torch.tensor(1.0), table, noise)
    assert new.position.item() == 1.875


def test_jitter_multiplies_the_step_size_of_each_chain():
    density, table = lopsided(), tuning(0.4, [0.8, 1.3])
    state, normal = density(density.draw_base(3)), torch.randn(3, 2)
    jitter, uniform = torch.tensor([-1.0, 0.0, 1.0]), torch.full((3,), 1.0 - 1e-12)  # accepts
    new, info = HMC(2, jitter=0.25).step(state, density, BETA, table, (normal, uniform, jitter))
    for i, factor in enumerate([0.75, 1.0, 1.25]):
        own = Tuning(factor * table.step_size, table.scale)
        one = State(*(value[i] for value in state))
        end, _ = leapfrog(one, normal[i], density, BETA, own, 2)
        assert torch.allclose(new.position[i], end.position, rtol=1e-12)
    plain, same = HMC(2, jitter=0.0).step(state, density, BETA, table, (normal, uniform, jitter))
    assert torch.equal(plain.position[1], new.position[1])
    assert torch.equal(same.accept_prob[1], info.accept_prob[1])
    assert not torch.allclose(plain.position[0], new.position[0])


def test_hmc_rejects_and_reports_divergences():
    def cliff(position):  # NaN beyond 2, -1e6 beyond 1
        state = oscillator(position)
        u = position[..., 0]
        value = torch.where(u > 2.0, math.nan, torch.where(u > 1.0, -1e6, state.log_target))
        return state._replace(log_target=value)

    state = cliff(torch.zeros(3, 1))
    noise = given(HMC(1), torch.tensor([[3.0], [1.5], [0.5]]), torch.full((3,), 0.5))
    new, info = HMC(1).step(state, cliff, torch.tensor(1.0), tuning(1.0, [1.0]), noise)
    assert info.diverging.tolist() == [True, True, False]
    assert info.accept_prob[:2].tolist() == [0.0, 0.0]
    assert new.position[:, 0].tolist() == [0.0, 0.0, 0.5]
    assert new.log_target.isfinite().all()


def test_a_chain_without_density_takes_any_step_that_has_one():
    def outside(position):
        state = oscillator(position)
        return state._replace(
            log_target=torch.where(position[..., 0] < 0.0, -math.inf, state.log_target)
        )

    state = outside(torch.tensor([[-0.5]]))
    noise = given(HMC(1), torch.tensor([[2.0]]), torch.tensor([0.0]))
    new, info = HMC(1).step(state, outside, BETA, tuning(1.0, [1.0]), noise)
    assert info.accept_prob.item() == 1.0
    assert new.position.item() > 0.0


@pytest.mark.parametrize("kernel", [*KERNELS, MetropolisScan()], ids=repr)
def test_a_batch_equals_a_loop_over_its_elements(kernel):
    density = lopsided()
    state = density(density.draw_base(6, 4))
    table = Tuning(torch.tensor([0.2, 0.5, 0.9, 1.4]), torch.rand(4, 2) + 0.5)
    noise = kernel.noise(state, torch.Generator().manual_seed(0))
    together, info = kernel.step(state, density, BETA, table, noise)
    for i in range(4):
        one = State(*(value[:, i] for value in state))
        own = Tuning(table.step_size[i], table.scale[i])
        alone, its_info = kernel.step(one, density, BETA, own, tuple(n[:, i] for n in noise))
        for whole, part in zip(together, alone, strict=True):
            assert torch.allclose(whole[:, i], part, rtol=1e-12)
        assert torch.allclose(info.accept_prob[:, i], its_info.accept_prob, rtol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_a_function_of_the_generator_and_keeps_the_dtype(kernel, dtype):
    density = lopsided(dtype=dtype)
    state = density(density.draw_base(50, 40))
    first = kernel.noise(state, torch.Generator().manual_seed(5))
    again = kernel.noise(state, torch.Generator().manual_seed(5))
    other = kernel.noise(state, torch.Generator().manual_seed(6))
    normal, uniform, *jitter = first
    assert normal.shape == (50, 40, 2)
    assert uniform.shape == (50, 40)
    assert ((uniform >= 0.0) & (uniform < 1.0)).all()
    assert all(value.shape == (50, 40) for value in jitter)
    assert all(((value >= -1.0) & (value <= 1.0)).all() for value in jitter)
    assert all(value.min() < -0.9 and value.max() > 0.9 for value in jitter)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    table = Tuning(torch.full((40,), 0.5, dtype=dtype), torch.ones(40, 2, dtype=dtype))
    new, info = kernel.step(state, density, BETA.to(dtype), table, first)
    assert {value.dtype for value in (*new, info.accept_prob)} == {dtype}
    assert info.diverging.dtype == torch.bool
    assert info.accept_prob.shape == info.diverging.shape == (50, 40)


@pytest.mark.parametrize("kernel", [*KERNELS, MetropolisScan(), GibbsScan(None)], ids=repr)
def test_kernels_fit_the_slot(kernel):
    assert isinstance(kernel, Kernel)
    assert kernel.reversal().reversal() == kernel or isinstance(kernel, GibbsScan)


def test_reversal():
    assert HMC(2).reversal() == HMC(2)
    assert RandomWalk().reversal() == RandomWalk()
    assert MetropolisScan().reversal() == MetropolisScan(order=(1, 0))
    assert MetropolisScan().reversal().reversal() == MetropolisScan()


@pytest.mark.parametrize("count", [0, -3])
def test_hmc_refuses_a_number_of_leapfrogs_below_one(count):
    with pytest.raises(ValueError, match=f"num_leapfrog must be at least 1, got {count}"):
        HMC(count)


@pytest.mark.parametrize("jitter", [-0.1, 1.0, math.nan])
def test_hmc_refuses_a_jitter_that_could_stop_or_reverse_it(jitter):
    with pytest.raises(ValueError, match=r"jitter must lie in \[0, 1\)"):
        HMC(jitter=jitter)


@pytest.mark.parametrize("kernel", [HMC, RandomWalk])
@pytest.mark.parametrize("target", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_kernels_refuse_an_acceptance_outside_the_unit_interval(kernel, target):
    with pytest.raises(ValueError, match=r"target_accept must lie in \(0, 1\)"):
        kernel(target_accept=target)
