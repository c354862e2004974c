"""HIS: the distribution induced by Hamiltonian importance sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints
from torch.nn.functional import softplus

from .base import SamplerInduced, evaluate

__all__ = ["HIS", "Leapfrog"]


class HIS(SamplerInduced):
    r"""Distribution of the position after T tempered leapfrog steps from the proposal.

    With ``x_0 ~ pi``, ``rho_0 ~ N(0, I)``, energy U, step size :math:`\varepsilon` and tempering
    factors with product one, :math:`\alpha_0 = 1 / \prod_t \alpha_t`,

    .. math::
        \rho \leftarrow \alpha_0 \rho; \quad
        \text{T times: }
        \rho \leftarrow \rho - \tfrac{\varepsilon}{2} \nabla U(x),\;
        x \leftarrow x + \varepsilon \rho,\;
        \rho \leftarrow \alpha_t \bigl(\rho - \tfrac{\varepsilon}{2} \nabla U(x)\bigr) .

    The map preserves volume and is inverted exactly, so with ``rho_T ~ q(rho | x)``

    .. math:: L = \log \pi(x_0) + \log N(\rho_0; 0, I) - \log q(\rho_T \mid x)

    is a lower bound on log p(x) in expectation with ``E[e^L] = p(x)``. With T = 0 it is the
    proposal. Unlike SNIS and TRS, no limit of T gives the energy model. Each T costs T + 1
    gradients of the energy per value and particle.

    Sampling is reparameterized if the proposal is. Gradients reach the proposal, the energy (it
    must be twice differentiable: no ReLU), the step sizes, the tempering and the momentum guide.

    Source: Lawson et al. (2019), section 3.3; Neal (2005), *Hamiltonian importance sampling*.

    Args:
        proposal: Distribution pi of the initial position, on all of real space.
        energy: Callable U, maps ``[..., *event]`` to ``[...]``, in nats.
        num_steps: Number T of leapfrog steps, 0 or more.
        momentum_guide: Callable, maps values ``[..., *event]`` to a reparameterized distribution q
            over momenta of that shape; a standard normal if ``None``, valid but loose.
        step_size: Step size, positive, broadcastable to the event shape, float or tensor.
        log_tempering: ``log alpha_t`` for t = 1..T, tensor of shape ``[T]``; zeros if ``None``.
        num_particles: Number M of momenta averaged in ``log_prob``.
        share_proposals: Accepted for symmetry with the others; each value has its own momenta.
        validate_args: As in torch.

    Raises:
        ValueError: If a number or shape does not fit, or the proposal is not on real space.

    Example:
        >>> from pyro.distributions import Normal
        >>> d = HIS(Normal(0.0, 1.0), lambda x: 0.5 * x**2, num_steps=0)
        >>> value = torch.tensor([0.0, 2.0])
        >>> torch.allclose(d.log_prob(value), Normal(0.0, 1.0).log_prob(value))
        True
    """

    def __init__(
        self,
        proposal: Distribution,
        energy: Callable[[Tensor], Tensor],
        num_steps: int = 5,
        momentum_guide: Callable[[Tensor], Distribution] | None = None,
        *,
        step_size: float | Tensor = 0.1,
        log_tempering: Tensor | None = None,
        num_particles: int = 1,
        share_proposals: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(num_steps, int) or isinstance(num_steps, bool) or num_steps < 0:
            raise ValueError(f"num_steps must be an integer of at least 0, got {num_steps!r}")
        support = proposal.support
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        if support is not constraints.real:
            raise ValueError(
                f"the leapfrog moves in real space, but the proposal's support is {support}: "
                "transform it, e.g. with TransformedDistribution around HIS"
            )
        if log_tempering is not None and log_tempering.shape != (num_steps,):
            raise ValueError(
                f"log_tempering has shape {list(log_tempering.shape)}, expected [{num_steps}], "
                "one factor per leapfrog step (the first factor, alpha_0, follows from them)"
            )
        self.energy = energy
        self.num_steps = num_steps
        self.momentum_guide = momentum_guide
        self.step_size = step_size
        self.log_tempering = log_tempering
        super().__init__(
            proposal,
            num_particles=num_particles,
            share_proposals=share_proposals,
            validate_args=validate_args,
        )

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether sampling is reparameterized: whether the proposal's is."""
        return bool(self.proposal.has_rsample)

    def rsample(self, sample_shape: Size | tuple[int, ...] = Size()) -> Tensor:  # noqa: B008
        """Draws exact samples with pathwise gradients, shape ``[*sample, *batch, *event]``."""
        return self._forward(self._expanded_proposal().rsample(Size(sample_shape)))[0]

    def sample(self, sample_shape: Size | tuple[int, ...] = Size()) -> Tensor:  # noqa: B008
        """Draws exact samples, shape ``[*sample, *batch, *event]``."""
        with torch.no_grad():
            return self._forward(self._expanded_proposal().sample(Size(sample_shape)))[0]

    def _forward(self, position: Tensor) -> tuple[Tensor, Tensor]:
        return self._flow(position, torch.randn_like(position), inverse=False)

    def _flow(self, position: Tensor, momentum: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        """Runs the tempered leapfrog steps, or their exact inverse: steps negated, order turned."""
        scales, step = self._log_scales(position), self.step_size
        if inverse:
            scales, step = -scales.flip(0), -step
        momentum = momentum * scales[0].exp()
        if self.num_steps == 0:
            return position, momentum
        force = self._gradient(position)
        for log_scale in scales[1:]:
            momentum = momentum - 0.5 * step * force
            position = position + step * momentum
            force = self._gradient(position)
            momentum = (momentum - 0.5 * step * force) * log_scale.exp()
        return position, momentum

    def _log_scales(self, like: Tensor) -> Tensor:
        """The log alpha_0, ..., log alpha_T, with sum zero, shape ``[T + 1]``."""
        if self.log_tempering is None:
            return like.new_zeros(self.num_steps + 1)
        return torch.cat([-self.log_tempering.sum().unsqueeze(0), self.log_tempering])

    def _gradient(self, position: Tensor) -> Tensor:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            leaf = position if position.requires_grad else position.detach().requires_grad_()
            energy = evaluate(self.energy, leaf, len(self.event_shape))
            if not energy.requires_grad:
                return torch.zeros_like(position)
            (gradient,) = torch.autograd.grad(
                energy,
                leaf,
                grad_outputs=torch.ones_like(energy),  # a sum would make rows of a plate meet
                create_graph=create_graph,
                allow_unused=True,
            )
        return torch.zeros_like(position) if gradient is None else gradient

    def _momentum_log_prob(self, momentum: Tensor) -> Tensor:
        log_prob = -0.5 * (momentum.square() + math.log(2.0 * math.pi))
        return _sum_event(log_prob, len(self.event_shape))

    def _elements_per_particle(self, shape: Size, shared: bool) -> int:
        per_value: int = max(1, self.event_shape.numel()) * (self.num_steps + 1)
        return per_value * shape.numel()

    def _log_base(self, value: Tensor) -> Tensor:
        return torch.zeros((), dtype=value.dtype, device=value.device)

    def _log_ratios(
        self, value: Tensor, shape: Size, num_particles: int, shared: bool
    ) -> tuple[Tensor, Tensor | None]:
        value = value.expand(shape + self.event_shape)
        guide = self._momentum_guide_at(value)
        momentum = guide.rsample(Size([num_particles]))
        start, momentum_start = self._flow(value.expand_as(momentum), momentum, inverse=True)
        log_ratio = (
            self.proposal.log_prob(start)
            + self._momentum_log_prob(momentum_start)
            - guide.log_prob(momentum)
        )
        return log_ratio, None

    def _momentum_guide_at(self, value: Tensor) -> Any:
        event_dim = len(self.event_shape)
        if self.momentum_guide is None:
            guide: Any = dist.Normal(torch.zeros_like(value), torch.ones_like(value))
            return guide.to_event(event_dim)
        guide = self.momentum_guide(value)
        shape = guide.batch_shape + guide.event_shape
        if shape != value.shape or not guide.has_rsample:
            raise ValueError(
                f"momentum_guide returned {type(guide).__name__} of shape {list(shape)}: expected "
                f"a reparameterized distribution of shape {list(value.shape)}, that of the values"
            )
        missing = event_dim - len(guide.event_shape)
        return dist.Independent(guide, missing) if missing else guide

    def _extended_event_shape(self) -> Size:
        return Size([2, *self.event_shape])

    def _extended_sample(self, sample_shape: Size) -> Tensor:
        start = self._expanded_proposal().sample(sample_shape)
        event_dim = len(self.event_shape)
        return torch.stack(self._forward(start), dim=start.dim() - event_dim)

    def _extended_log_prob(self, value: Tensor) -> Tensor:
        start, momentum = self._flow(value[0], value[1], inverse=True)
        log_prob: Tensor = self.proposal.log_prob(start) + self._momentum_log_prob(momentum)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))


class Leapfrog(nn.Module):
    r"""Learned step sizes and tempering of :class:`HIS`, kept in their ranges.

    Step sizes are positive, one per element of the event; tempering factors
    :math:`\alpha_1, \dots, \alpha_T` lie in (0, 1): the momentum starts large and cools.

    Source: Lawson et al. (2019), section 3.3 and App. D.1.

    Args:
        num_steps: Number T of leapfrog steps.
        event_shape: Shape of the step sizes, e.g. that of the proposal's events.
        step_size: Initial step size, positive.
        tempering: Initial factor, in (0, 1).

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> leapfrog = Leapfrog(5, (2,), step_size=0.1, tempering=0.9)
        >>> leapfrog.step_size.tolist()
        [0.1..., 0.1...]
        >>> d = HIS(dist.Normal(torch.zeros(2), 1.0).to_event(1), lambda x: x.square().sum(-1), 5,
        ...         step_size=leapfrog.step_size, log_tempering=leapfrog.log_tempering)
    """

    def __init__(
        self,
        num_steps: int,
        event_shape: Size | tuple[int, ...] = (),
        *,
        step_size: float = 0.1,
        tempering: float = 0.99,
    ) -> None:
        super().__init__()
        if num_steps < 0 or step_size <= 0.0 or not 0.0 < tempering < 1.0:
            raise ValueError(
                "num_steps must be at least 0, step_size positive and tempering in (0, 1), got "
                f"{num_steps}, {step_size} and {tempering}"
            )
        raw_step = math.log(math.expm1(step_size))  # inverse of softplus
        raw_tempering = math.log(tempering / (1.0 - tempering))
        self.raw_step_size = nn.Parameter(torch.full(tuple(event_shape), raw_step))
        self.raw_tempering = nn.Parameter(torch.full((num_steps,), raw_tempering))

    @property
    def step_size(self) -> Tensor:
        """Step sizes, of the event shape."""
        return softplus(self.raw_step_size)

    @property
    def log_tempering(self) -> Tensor:
        """The log alpha_1, ..., log alpha_T, shape ``[T]``, in nats."""
        return -softplus(-self.raw_tempering)


def _sum_event(value: Tensor, event_dim: int) -> Tensor:
    return value.sum(dim=tuple(range(-event_dim, 0))) if event_dim else value
