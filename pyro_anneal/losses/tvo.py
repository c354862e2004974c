"""The thermodynamic variational objective (TVO)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..arguments import as_count
from ..models.types import Fn
from ..schedules import Linear, as_betas
from .base import (
    Evaluation,
    ParticleELBO,
    PyroOptions,
    finite_or_zero,
    require_pathwise,
    weighted_sum,
    without_parameters,
)
from .particles import Particles, Sampling
from .partitions import Moments, Tightest
from .paths import doubly_reparameterized
from .traces import Arguments

__all__ = ["TVO", "Thermodynamic", "thermodynamic"]

_SAMPLING: dict[str, Sampling] = {
    "covariance": "score",
    "reparam": "pathwise",
    "dreg": "gated",
    "auto": "gated",
}
_PARTITIONS = 30  # they cost next to nothing, and do best: docs/losses.md, "Measured"
Integration = Literal["left", "right", "trapezoid"]
Correction = Literal["weighted", "particles", "none"]


def _widths(betas: Tensor, integration: Integration) -> Tensor:
    """Computes quadrature weights of a Riemann sum or the trapezoid rule; they sum to 1."""
    steps = betas.diff()
    zero = steps.new_zeros(1)
    left, right = torch.cat([steps, zero]), torch.cat([zero, steps])
    return {"left": left, "right": right, "trapezoid": 0.5 * (left + right)}[integration]


class Thermodynamic(NamedTuple):
    """A thermodynamic objective at given log-weights, and the coefficients of its gradient."""

    value: Tensor  # nats, [*batch]
    weights: Tensor  # of each log-weight's gradient, [S, *batch]
    score_weights: Tensor  # of each score, [S, *batch]
    path_weights: Tensor | None  # of a doubly reparameterized path, [S, *batch]


def thermodynamic(
    log_weights: Tensor,
    betas: Tensor,
    *,
    integration: Integration = "left",
    correction: Correction = "none",
    path: bool = False,
) -> Thermodynamic:
    r"""Integrates the self-normalized curve :math:`E_\beta[\log w]` over beta.

    .. math::
        T = \sum_j \Delta_j \sum_s \bar w_s^{(j)} \log w_s, \qquad
        \bar w_s^{(j)} \propto w_s^{\beta_j}

    The curve rises with beta, and its integral is ``log mean w``. So, at any S and on any betas,
    ``left <= log mean w <= right``.

    The gradient of an expectation under :math:`\pi_\beta \propto q\, w^\beta` is

    .. math:: \nabla E_\beta[f] = E_\beta[\nabla f] + \mathrm{Cov}_\beta[\nabla \log \pi_\beta, f]

    which gives each log-weight the coefficient
    :math:`a_s = \sum_j \Delta_j \bar w_s^{(j)} (1 + \beta_j c_j (\log w_s - E_j))`, and each score
    :math:`b_s = 1 / S + \sum_j \Delta_j \bar w_s^{(j)} c_j (\log w_s - E_j)`. The term 1 / S has
    mean zero and removes all noise where the guide is exact.

    Source: Masrani, Le and Wood (2019), *The Thermodynamic Variational Objective*, Eq. 9 to 13.

    Args:
        log_weights: Log-weights in nats, shape ``[S, *batch]``.
        betas: From 0 to 1, shape ``[K + 1]``.
        integration: Riemann sum or trapezoid rule.
        correction: Factor c of the sample covariance: ``"particles"`` for ``S / (S - 1)``, exact
            at beta = 0 only; ``"weighted"`` for ``1 / (1 - sum w^2)``; ``"none"`` for 1, which
            makes ``a`` the exact derivative of the value.
        path: Whether to compute ``a - da / dlog w`` too.

    Returns:
        Value and coefficients.

    Example:
        >>> betas = torch.tensor([0.0, 1.0])
        >>> thermodynamic(torch.tensor([1.0, 3.0]), betas).value  # the mean: the ELBO
        tensor(2.)
    """
    count = log_weights.shape[0]
    shape = (-1,) + (1,) * log_weights.dim()
    beta = betas.to(log_weights).reshape(shape)  # [K + 1, 1, ...]
    width = _widths(betas, integration).to(log_weights).reshape(shape)
    zero = log_weights == -torch.inf
    some_zero = bool(zero.any())  # seldom: what they need is a good part of all operations
    value_of = finite_or_zero(log_weights) if some_zero else log_weights
    heated = beta * value_of  # [K + 1, S, *batch]
    if some_zero:
        empty = zero.all(0)
        heated = torch.where(zero & ~empty, -torch.inf, heated)
    weight = torch.softmax(heated, dim=1)
    mean = (weight * value_of).sum(1, keepdim=True)
    value = (width * mean).sum(0)[0]
    deviation = value_of - mean
    if some_zero:
        # At beta = 0 a particle of weight zero makes the mean log-weight -inf.
        lost = empty if integration == "right" else zero.any(0)
        value = torch.where(lost, -torch.inf, value)
        deviation = torch.where(zero, 0.0, deviation)
    covariance = weight * deviation
    if correction == "weighted":
        spread = (weight * (1.0 - weight)).sum(1, keepdim=True)
        covariance = covariance / spread.clamp_min(torch.finfo(spread.dtype).tiny)
    elif correction == "particles":
        covariance = covariance * (count / (count - 1))
    path_weights = None
    if path:
        plain = weight * (1.0 + beta * deviation)
        curved = beta * (weight * (1.0 - plain) + plain * (1.0 - weight))
        path_weights = (width * (plain - curved)).sum(0)
    return Thermodynamic(
        value,
        (width * (weight + beta * covariance)).sum(0),
        (width * covariance).sum(0) + 1.0 / count,
        path_weights,
    )


def _check_sides(bound: str, integration: str | None, gradient: str) -> None:
    """Checks that an objective has a direction.

    Raises:
        ValueError: If it has none; the message says what to use.
    """
    if bound not in ("lower", "upper"):
        raise ValueError(f'bound must be "lower" or "upper", got {bound!r}')
    if integration == "right":
        raise ValueError(
            'integration="right" bounds from above, so that maximizing it runs away; use '
            'bound="upper", which minimizes it over the guide with the model held fixed'
        )
    if integration == "trapezoid":
        raise ValueError(
            'integration="trapezoid" bounds from neither side, so that it cannot be trained on; '
            'train on bound="lower" or "upper", and report '
            'thermodynamic(log_weights, betas, integration="trapezoid").value'
        )
    if integration not in (None, "left"):
        raise ValueError(
            f'integration must be "left" or None, got {integration!r}; the side is chosen by bound='
        )
    if bound == "upper" and integration == "left":
        raise ValueError('integration="left" is the lower bound: pass bound="upper" alone')
    if bound == "upper" and gradient != "covariance":
        raise ValueError(
            f'bound="upper" has no gradient={gradient!r}: along sampling paths the sum over '
            'particles itself would be minimized, which has no lower limit; use "covariance"'
        )


class TVO(ParticleELBO):
    r"""Thermodynamic variational objective, a Riemann sum of the log evidence over temperatures.

    .. math::
        \log p(x) = \int_0^1 E_{\pi_\beta}[\log w] \, d\beta, \qquad
        \pi_\beta(z) \propto q(z | x)^{1 - \beta} p(x, z)^\beta, \quad w = p(x, z) / q(z | x)

    The expectations are self-normalized importance sums over S particles of the guide, the same
    for all betas, so more betas cost next to nothing.

    * ``bound="lower"``: the left Riemann sum, a lower bound in expectation, never above the IWAE
      bound of the same particles. The loss is **minus** the sum; model and guide learn. With betas
      (0, 1) it is the ELBO.
    * ``bound="upper"``: the right Riemann sum, an upper bound in the limit of many particles. The
      loss is **plus** the sum, and only the guide learns: it is drawn toward the posterior from the
      other side, as by the wake phase of wake-sleep, which is the case of betas (0, 1). The model's
      parameters get no gradient and an enclosing ``SVI`` does not see them, since a model that
      minimizes its own evidence runs away. At finite S the value lies above the IWAE bound of the
      same particles and need **not** bound log p(x).

    The trapezoid rule lies between the two sums and bounds nothing, so it is no objective: its value
    is an estimate to report, ``thermodynamic(log_weights, betas, integration="trapezoid").value``.

    Gradients of the guide:

    * ``"covariance"``: the paper's, by the score, for any guide with a density.
    * ``"reparam"``: along the sampling path of the S-particle sum; an error where a site has none.
    * ``"dreg"``: doubly reparameterized; an error likewise.
    * ``"auto"``: ``"dreg"`` if every site is reparameterized; else per site, along the path where
      there is one and by the score elsewhere.

    With the same particles ``"dreg"`` has the least noise, at the cost of one more backward pass
    through the model; ``"covariance"`` is the cheapest, since nothing is differentiated with
    respect to z, and in few dimensions beats ``"reparam"``.

    With ever more partitions the sum becomes the IWAE bound of its particles, and ``"covariance"``
    with ``correction="particles"`` leads the guide by

    .. math:: \frac{1}{S - 1} \sum_s \Bigl(\int_0^1 \bar w_s(\beta) \, d\beta - \frac{1}{S}\Bigr)
              \nabla_\phi \log q(z_s)

    which is the wake phase of wake-sleep, averaged over temperatures, with a baseline: the guide
    goes on to learn where the objective itself no longer depends on it.

    ``bound="upper"`` takes ``"covariance"`` alone: along sampling paths one would minimize the
    S-particle sum itself, which has no lower limit.

    Source: Masrani, Le and Wood (2019), Eq. 8 to 13, Table 2 and appendix C for the upper bound,
    and appendix for the correction; Brekelmans et al. (2020) for :class:`Moments`.

    Args:
        num_particles: Number S of particles, at least 2.
        schedule: ``LogUniform(beta_1, partitions)`` or another schedule with ``partitions``,
            :class:`Tightest` or :class:`Moments`, which look at the particles, or betas from 0 to
            1 as a list or tensor. None is ``Linear(30)``, 30 equal partitions.
        bound: The side: ``"lower"`` is maximized, ``"upper"`` is minimized over the guide.
        gradient: Estimator of the guide's gradient.
        integration: ``"left"``, another word for ``bound="lower"``. The other rules are refused,
            with the reason.
        correction: Factor of the sample covariance, as in :func:`thermodynamic`; it acts where
            some site's gradient is taken by the score. Against exact gradients of small problems
            ``"particles"`` had less bias and less noise than ``"weighted"``.
        **options: What Pyro's losses take too, see :class:`~pyro_anneal.losses.base.PyroOptions`.

    Raises:
        ValueError: If ``num_particles`` is below 2, the betas do not increase from 0 to 1, or an
            option is unknown.

    Example:
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # the exact posterior: every weight equals p(x)
        ...     pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> round(TVO(num_particles=5).loss(model, guide, torch.tensor(2.0)), 4)
        2.2655
    """

    def __init__(
        self,
        num_particles: int = 10,
        schedule: Callable[..., Tensor] | Tensor | Sequence[float] | None = None,
        bound: Literal["lower", "upper"] = "lower",
        gradient: Literal["covariance", "reparam", "dreg", "auto"] = "covariance",
        *,
        integration: str | None = None,
        correction: Correction = "particles",
        **options: Unpack[PyroOptions],
    ) -> None:
        num_particles = as_count("num_particles", num_particles, least=-(2**63))
        if num_particles < 2:
            raise ValueError(
                "TVO estimates a covariance over particles and needs num_particles >= 2, got "
                f"{num_particles}; for one particle use IWAE(1) or Trace_ELBO"
            )
        if gradient not in _SAMPLING:
            raise ValueError(f"gradient must be one of {list(_SAMPLING)}, got {gradient!r}")
        _check_sides(bound, integration, gradient)
        if correction not in ("weighted", "particles", "none"):
            raise ValueError(
                f'correction must be "weighted", "particles" or "none", got {correction!r}'
            )
        super().__init__(
            num_particles,
            **options,
        )
        schedule = Linear(_PARTITIONS) if schedule is None else schedule
        self._schedule: Moments | Tightest | Tensor
        if isinstance(schedule, Moments | Tightest):
            self._schedule = schedule
        else:
            self._schedule = as_betas(schedule)
        self._ungated = False  # whether gates do not work with this guide
        self.schedule = schedule
        self.bound: Literal["lower", "upper"] = bound
        self.gradient = gradient
        self.correction: Correction = correction

    def _is_linear(self) -> bool:
        fixed = isinstance(self._schedule, Tensor) and len(self._schedule) == 2
        return fixed and self.bound == "lower"

    def _fields(self) -> dict[str, object]:
        fields = super()._fields() | {"schedule": self.schedule, "bound": self.bound}
        return fields | {"gradient": self.gradient}

    def betas(self, log_weights: Tensor) -> Tensor:
        """Returns the betas used at these log-weights, ``[S, *batch]``, as a tensor ``[K + 1]``."""
        if isinstance(self._schedule, Tightest):
            return self._schedule(log_weights, "left" if self.bound == "lower" else "right")
        if isinstance(self._schedule, Moments):
            return self._schedule(log_weights)
        return self._schedule

    def _evaluate(self, model: Fn, guide: Fn, arguments: Arguments) -> Evaluation:
        if self.bound == "upper":
            return self._evaluate_upper(model, guide, arguments)
        particles = self._draw(model, guide, arguments)
        log_weights = particles.log_weights.detach()
        parts = thermodynamic(
            log_weights,
            self.betas(log_weights),
            correction="none" if particles.score is None else self.correction,
            path=self.gradient in ("dreg", "auto"),
        )
        value = -particles.total(parts.value)
        if not torch.is_grad_enabled():
            return Evaluation(value, None)
        plain = particles.score is None and not particles.altered_sites
        path = parts.path_weights
        wanted = self.gradient == "dreg" or (self.gradient == "auto" and plain)
        if path is not None and wanted and (particles.gates or self.gradient == "dreg"):
            surrogate = doubly_reparameterized(particles, parts.weights, path)
            return Evaluation(value, -surrogate)
        if self.gradient == "reparam":
            require_pathwise(particles, 'gradient="reparam"', 'gradient="covariance" or "auto"')
        return Evaluation(value, -weighted_sum(particles, parts.weights, parts.score_weights))

    def _evaluate_upper(self, model: Fn, guide: Fn, arguments: Arguments) -> Evaluation:
        """Evaluates the right sum, whose gradient reaches the guide alone."""
        detached = without_parameters(model)
        particles = self._particles(
            detached, guide, arguments, "score", model_context=torch.no_grad
        )
        log_weights = particles.log_weights.detach()
        parts = thermodynamic(
            log_weights,
            self.betas(log_weights),
            integration="right",
            correction=self.correction,
        )
        value = particles.total(parts.value)
        if not torch.is_grad_enabled():
            return Evaluation(value, None)
        return Evaluation(value, weighted_sum(particles, parts.weights, parts.score_weights))

    def _draw(self, model: Fn, guide: Fn, arguments: Arguments) -> Particles:
        sampling = _SAMPLING[self.gradient]
        if self.gradient != "auto":
            return self._particles(model, guide, arguments, sampling)
        if not self._ungated:
            try:
                return self._particles(model, guide, arguments, sampling)
            except NotImplementedError:  # flows without an inverse, guides that are messengers
                self._ungated = True
        return self._particles(model, guide, arguments, "pathwise")
