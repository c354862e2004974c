"""Transitions for tests: correct ones that prove the kernel slot, and deliberately broken ones."""

from dataclasses import dataclass, field, replace

import torch

from pyro_anneal.kernels import HMC, Info, Tuning, accept, leapfrog


@dataclass(frozen=True)
class MetropolisScan:
    """Moves one coordinate at a time in a fixed order by random-walk Metropolis.

    Each move is reversible, the scan is not: its time reversal scans in the opposite order.
    """

    order: tuple[int, ...] = (0, 1)
    target_accept: float = 0.4

    @property
    def num_gradients(self):
        return len(self.order)

    def noise(self, state, generator):
        shape = state.position.shape
        options = {"dtype": state.position.dtype, "generator": generator}
        return torch.randn(shape, **options), torch.rand(shape, **options)

    def step(self, state, density, beta, tuning, noise):
        direction, uniform = noise
        move = tuning.step_size.unsqueeze(-1) * tuning.scale * direction
        accept_prob = 0.0
        for index in self.order:
            only = torch.zeros(move.shape[-1], dtype=move.dtype)
            only[index] = 1.0
            proposal = density(state.position + move * only)
            log_accept = proposal.log_density(beta) - state.log_density(beta)
            state, probability = accept(state, proposal, log_accept, uniform[..., index])
            accept_prob = accept_prob + probability / len(self.order)
        return state, Info(accept_prob, torch.zeros_like(accept_prob, dtype=torch.bool))

    def reversal(self):
        return replace(self, order=self.order[::-1])


@dataclass(frozen=True, eq=False)
class GibbsScan:
    """Redraws one coordinate at a time in a fixed order from its exact conditional.

    ``path`` is a `paths.GaussianPath`. With ``reverses=False`` it claims to be its own reversal.
    """

    path: object
    order: tuple[int, ...] = (0, 1)
    reverses: bool = True
    target_accept: float | None = None
    num_gradients: int = 1

    def noise(self, state, generator):
        position = state.position
        return (torch.randn(position.shape, dtype=position.dtype, generator=generator),)

    def step(self, state, density, beta, tuning, noise):
        loc, precision = self.path.at(float(beta))
        position = state.position.clone()
        for index in self.order:
            pull = (position - loc) @ precision[index]
            own = precision[index, index]
            mean = position[..., index] - pull / own
            position[..., index] = mean + noise[0][..., index] / own.sqrt()
        new = density(position)
        ones = torch.ones_like(new.log_base)
        return new, Info(ones, torch.zeros_like(ones, dtype=torch.bool))

    def reversal(self):
        return replace(self, order=self.order[::-1]) if self.reverses else self


@dataclass(frozen=True, eq=False)
class PerfectTransition:
    """Draws from a diagonal Gaussian path at beta, independently of where the chain is.

    ``at`` maps beta to location and standard deviation, ``[*batch, D]`` each.
    """

    at: object
    target_accept: float | None = None
    num_gradients: int = 1

    def noise(self, state, generator):
        position = state.position
        return (torch.randn(position.shape, dtype=position.dtype, generator=generator),)

    def step(self, state, density, beta, tuning, noise):
        loc, scale = self.at(beta)
        new = density(loc + scale * noise[0])
        ones = torch.ones_like(new.log_base)
        return new, Info(ones, torch.zeros_like(ones, dtype=torch.bool))

    def reversal(self):
        return self


@dataclass(frozen=True)
class CachedMixtureHMC(HMC):
    """BROKEN: keeps the mixed log density and gradient of the beta before, as if still valid."""

    memory: dict = field(default_factory=dict, compare=False)

    def step(self, state, density, beta, tuning, noise):
        before = self.memory.get("beta", beta)
        momentum, uniform, _ = noise
        move = tuning.step_size.unsqueeze(-1) * tuning.scale
        stale = momentum + 0.5 * move * (state.grad(before) - state.grad(beta))
        proposal, end = leapfrog(state, stale, density, beta, tuning, self.num_leapfrog)
        kinetic = 0.5 * (momentum.square().sum(-1) - end.square().sum(-1))
        log_accept = proposal.log_density(beta) - state.log_density(before) + kinetic
        new, accept_prob = accept(state, proposal, log_accept, uniform)
        self.memory["beta"] = beta
        return new, Info(accept_prob, log_accept.isnan())


@dataclass(frozen=True)
class AdaptingHMC(HMC):
    """BROKEN: adapts the step size inside the run from the acceptance it has just seen."""

    gain: float = 1.0
    memory: dict = field(default_factory=dict, compare=False)

    def step(self, state, density, beta, tuning, noise):
        log_step = self.memory.get("log_step", tuning.step_size.log())
        own = Tuning(log_step.exp(), tuning.scale)
        new, info = super().step(state, density, beta, own, noise)
        error = info.accept_prob.mean(0) - self.target_accept
        self.memory["log_step"] = log_step + self.gain * error
        return new, info
