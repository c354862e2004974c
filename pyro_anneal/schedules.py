r"""Schedules of inverse temperatures, from the base at beta = 0 to the target at beta = 1.

A schedule is any callable ``schedule(num_steps) -> betas`` that returns ``num_steps + 1`` strictly
increasing numbers from exactly 0 to exactly 1, in float64. The parts of this module are small
frozen configurations of that kind. Each takes ``partitions``, its number of steps where the caller
names none (the thermodynamic losses); a caller that names one must agree with it.

:func:`as_betas` turns a schedule or a tensor into checked betas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .arguments import as_count, as_real, check_function

__all__ = ["Linear", "LogUniform", "Power", "Schedule", "Sigmoid", "as_betas"]


@runtime_checkable
class Schedule(Protocol):
    """Anything that turns a number of steps T into betas of shape ``[T + 1]``, from 0 to 1."""

    def __call__(self, num_steps: int) -> Tensor:
        """Returns strictly increasing betas from 0 to 1, shape ``[num_steps + 1]``, float64."""
        ...


@dataclass(frozen=True)
class Linear:
    r"""Spaces betas equally, :math:`\beta_t = t / T`.

    Args:
        partitions: Number of steps T where the caller names none.

    Example:
        >>> Linear()(4).tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """

    partitions: int | None = None

    def __call__(self, num_steps: int | None = None) -> Tensor:
        """Returns betas of shape ``[num_steps + 1]``, float64."""
        return _unit_grid(_num_steps(self, self.partitions, num_steps))


@dataclass(frozen=True)
class Power:
    r"""Spaces betas as a power of the linear ones, :math:`\beta_t = (t / T)^p`.

    Powers above 1 put more temperatures near the base, where a vague prior meets the likelihood.

    Source: Friel and Pettitt (2008), *Marginal likelihood estimation via power posteriors*,
    section 4, who use powers of 3 to 5.

    Args:
        exponent: The power p, positive.
        partitions: Number of steps T where the caller names none.

    Raises:
        ValueError: If ``exponent`` is not positive and finite.

    Example:
        >>> Power(2.0)(4).tolist()
        [0.0, 0.0625, 0.25, 0.5625, 1.0]
    """

    exponent: float
    partitions: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 < as_real("Power.exponent", self.exponent) < math.inf:
            raise ValueError(f"Power needs a positive, finite exponent, got {self.exponent}")

    def __call__(self, num_steps: int | None = None) -> Tensor:
        """Returns betas of shape ``[num_steps + 1]``, float64."""
        return _unit_grid(_num_steps(self, self.partitions, num_steps)) ** self.exponent


@dataclass(frozen=True)
class Sigmoid:
    r"""Spaces betas along a logistic curve, dense near both ends.

    .. math::
        \tilde\beta_t = \sigma\bigl(\delta (2 t / T - 1)\bigr), \qquad
        \beta_t = \frac{\tilde\beta_t - \tilde\beta_0}{\tilde\beta_T - \tilde\beta_0}

    Source: Grosse, Ghahramani and Adams (2015), *Sandwiching the marginal likelihood using
    bidirectional Monte Carlo*, section 5, with :math:`\delta = 4`.

    Args:
        delta: Steepness, positive; near 0 the schedule is linear.
        partitions: Number of steps T where the caller names none.

    Raises:
        ValueError: If ``delta`` is not positive and finite.

    Example:
        >>> Sigmoid(4.0)(2).tolist()
        [0.0, 0.5, 1.0]
    """

    delta: float = 4.0
    partitions: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 < as_real("Sigmoid.delta", self.delta) < math.inf:
            raise ValueError(f"Sigmoid needs a positive, finite delta, got {self.delta}")

    def __call__(self, num_steps: int | None = None) -> Tensor:
        """Returns betas of shape ``[num_steps + 1]``, float64."""
        grid = _unit_grid(_num_steps(self, self.partitions, num_steps))
        # sigmoid(2 y) = (1 + tanh y) / 2: tanh keeps the symmetry exact and the ends distinct
        curve = torch.tanh(0.5 * self.delta * (2.0 * grid - 1.0))
        betas = 0.5 + 0.5 * curve / math.tanh(0.5 * self.delta)
        return _pin_ends(betas)


@dataclass(frozen=True)
class LogUniform:
    r"""Spaces betas equally in their logarithm from ``beta_1`` to 1, after beta = 0.

    .. math:: \beta_0 = 0, \qquad \beta_t = \beta_1^{(T - t) / (T - 1)}, \quad t = 1 \ldots T

    With T = 2 the betas are ``0, beta_1, 1``, the choice that Masrani et al. find good for the
    thermodynamic variational objective.

    Source: Masrani, Le and Wood (2019), *The Thermodynamic Variational Objective*, section 6.

    Args:
        beta_1: First positive beta, in (0, 1); unused when T = 1.
        partitions: Number of steps T where the caller names none.

    Raises:
        ValueError: If ``beta_1`` is not strictly between 0 and 1.

    Example:
        >>> LogUniform(beta_1=0.01)(3).float()
        tensor([0.0000, 0.0100, 0.1000, 1.0000])
    """

    beta_1: float
    partitions: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 < as_real("LogUniform.beta_1", self.beta_1) < 1.0:
            raise ValueError(f"LogUniform needs 0 < beta_1 < 1, got {self.beta_1}")

    def __call__(self, num_steps: int | None = None) -> Tensor:
        """Returns betas of shape ``[num_steps + 1]``, float64."""
        steps = _num_steps(self, self.partitions, num_steps)
        if steps == 1:
            return _unit_grid(1)
        exponents = 1.0 - _unit_grid(steps - 1)
        positive = torch.exp(math.log(self.beta_1) * exponents)
        return _pin_ends(torch.cat([positive.new_zeros(1), positive]))


def as_betas(
    schedule: Callable[..., Tensor] | Tensor | Sequence[float], num_steps: int | None = None
) -> Tensor:
    r"""Turns a schedule or a tensor into checked betas.

    Args:
        schedule: A callable of the number of steps, or betas themselves: a tensor of shape
            ``[T + 1]`` or a list of numbers.
        num_steps: Number of steps T; ``None`` takes it from the tensor, or from the
            ``partitions`` of the schedule.

    Returns:
        Strictly increasing betas from 0 to 1, shape ``[T + 1]``, float64.

    Raises:
        ValueError: If ``num_steps`` is below 1 or disagrees with the schedule, or if the betas
            are not one-dimensional and strictly increasing from 0 to 1; the message names the
            index that breaks it.

    Example:
        >>> as_betas(torch.tensor([0.0, 0.25, 1.0]), None).tolist()
        [0.0, 0.25, 1.0]
        >>> as_betas(Linear(), 2).tolist()
        [0.0, 0.5, 1.0]
    """
    if num_steps is not None:
        num_steps = as_count("num_steps", num_steps)
    if isinstance(schedule, list | tuple):
        numbers = [as_real(f"betas[{index}]", beta) for index, beta in enumerate(schedule)]
        schedule = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    if not isinstance(schedule, Tensor):
        check_function(
            "schedule", schedule, what="a schedule such as Linear(), or betas as a list or tensor"
        )
    betas = schedule if isinstance(schedule, Tensor) else schedule(num_steps)  # type: ignore[operator]
    if not isinstance(betas, Tensor) or betas.is_complex():
        kind = betas.dtype if isinstance(betas, Tensor) else type(betas).__name__
        raise ValueError(f"betas must be a real tensor of shape [T + 1], got {kind}")
    betas = betas.detach().double().cpu()
    if betas.dim() != 1 or betas.shape[0] < 2:
        raise ValueError(
            f"betas must be one-dimensional with at least two entries, got {list(betas.shape)}"
        )
    if num_steps is not None and betas.shape[0] != num_steps + 1:
        raise ValueError(
            f"expected {num_steps + 1} betas for num_steps={num_steps}, got {betas.shape[0]}"
        )
    if betas[0] != 0.0:
        raise ValueError(f"betas[0] must be 0, got {betas[0].item()}")
    rising = betas[1:] > betas[:-1]  # False at NaN, too
    if not rising.all():
        index = int((~rising).nonzero()[0]) + 1
        raise ValueError(
            f"betas must increase strictly: betas[{index}] = {betas[index].item()} follows "
            f"betas[{index - 1}] = {betas[index - 1].item()}"
        )
    if betas[-1] != 1.0:
        raise ValueError(f"betas[{betas.shape[0] - 1}] must be 1, got {betas[-1].item()}")
    return betas


def _num_steps(schedule: object, partitions: int | None, num_steps: int | None) -> int:
    name = type(schedule).__name__
    steps = partitions if num_steps is None else num_steps
    if steps is None:
        raise ValueError(f"{name} needs a number of steps: pass {name}(..., partitions=...)")
    if partitions is not None and steps != partitions:
        raise ValueError(f"{name} has partitions={partitions}, but num_steps={num_steps} is asked")
    return as_count(f"{name} num_steps", steps)


def _unit_grid(num_steps: int) -> Tensor:
    return torch.arange(num_steps + 1, dtype=torch.float64, device="cpu") / num_steps


def _pin_ends(betas: Tensor) -> Tensor:
    """Sets the first and last beta to exactly 0 and 1, where rounding may miss them."""
    return torch.cat([betas.new_zeros(1), betas[1:-1], betas.new_ones(1)])
