"""MINE-AIS: an energy-based posterior trained by MCMC, measured by multi-sample AIS."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..arguments import as_count, as_seed
from ..chains.pilot import Pilot
from ..kernels import HMC, Kernel, Tuning
from ..persistence.randomness import seeded_if
from ..schedules import Schedule
from .annealer import Annealer, PairDensity
from .base import Direction, Values, flatten
from .fitting import as_values
from .guides import Conditional
from .joints import Knowledge
from .variational import VariationalBound, check_chains, check_critic

__all__ = ["MINEAIS"]

_NUM_SCALE_DRAWS = 16
_NUM_HELD_OUT_DRAWS = 256
_FEW_PAIRS = 256  # of which GIWAE is measured at once
_CONDITIONAL = (
    "the reverse chains start from p(z|x), not from the energy-based posterior: that they bound "
    "log Z(x) from above, hence IBAL from below, is conditional on Prop. M.1 (the lower bound on I "
    "is not); compare log_z_upper with log_z_lower"
)


class MINEAIS(VariationalBound):
    r"""Bounds I from below by an energy-based posterior: the implicit Barber-Agakov bound (IBAL).

    .. math::
        \pi(z|x) = \frac{q(z|x)\, e^{T(x, z)}}{Z(x)}

    .. math::
        \mathrm{IBAL} = E_{p(x, z)}\Bigl[\log \frac{q(z|x)}{p(z)} + T(x, z)\Bigr]
        - E_{p(x)}[\log Z(x)] = I - E\, \mathrm{KL}(p(z|x) \| \pi(z|x))

    **Training** (:meth:`loss`). log Z cannot be computed, but its gradient is an expectation under
    :math:`\pi`, so that of IBAL with respect to the parameters of q and T is

    .. math:: E_{p(x, z)}[\nabla (\log q(z|x) + T(x, z))]
        - E_{p(x) \pi(z|x)}[\nabla (\log q(z|x) + T(x, z))]

    The samples of :math:`\pi` come from ``num_moves`` HMC transitions started at the z of the pair,
    a true posterior sample. **Only the gradient of the loss means something; its value is a
    difference of energies, not a bound.**

    **Measuring** (:meth:`estimate`). AIS from q to :math:`q e^T`. Forward chains bound log Z from
    below. Reverse chains ought to start at samples of :math:`\pi`, of which there are none; they
    start at the z of the pair. In place of log Z plus a divergence their mean log-weight is
    ``log Z + KL(P_rev || Q_fwd) - KL(p(z|x) || pi(z|x))``, so

    - as a bound on IBAL the result is conditional on the first divergence exceeding the second
      (Prop. M.1), which tight agreement of both sides makes plausible and no run proves;
    - as a lower bound on I it holds without that condition: I minus the first divergence, the
      Barber-Agakov argument on the extended space of the chains. The same holds for IM and CR.

    ``measurements`` has ``log_z_lower`` and ``log_z_upper`` (means over x) and ``ibal_upper``, the
    value of IBAL that the forward chains allow: a convergence check, not a bound on I. ``giwae`` is
    :class:`GIWAE` of the same guide and critic with 256 particles, which IBAL exceeds, and, where the
    full joint is known, ``best_critic`` that of the best critic; a finding says if either is above.

    Source: Brekelmans et al. (2022), Eq. 19-20 and Prop. M.1; App. N for joint samples only.

    Args:
        model: What gives p(z): a Pyro model, a distribution of z or a joint; None for joint
            samples only, where roles are swapped and the bound only measures.
        guide: The variational conditional q(z|x), called with x; with roles swapped q(x|z), called
            with z.
        critic: Scores pairs, differentiable in z.
        num_chains: K chains per pair and direction of a measurement.
        num_steps: T weight increments of a measurement.
        num_moves: M, HMC transitions per training step.
        num_negatives: Chains per pair in training, all from the z of the pair. The gradient is the
            difference of two energies of about equal variance: many chains halve its noise, which
            one chain doubles over that of GIWAE.
        num_leapfrog: Leapfrogs per transition in training.
        kernel: Transition kernel of measurements; HMC by default.
        bound: Multi-sample bound that the reverse chains of a measurement use.
        schedule: ``"adaptive"`` from a pilot, a schedule such as ``Linear()``, or betas.
        step_size: Fixed step size of measurements in place of the pilot's. In training, moves are
            scaled by the guide's spread, and a common step size adapts to an acceptance of 0.65;
            it is kept in the buffer ``log_step_size``.
        pilot: Settings of the pilot.
        compile: ``"auto"`` compiles chunks of steps when the batches to come repay it.
        data_entropy: H(x) in nats, if known while roles are swapped.

    Raises:
        ValueError: If a number is below 1.

    Example:
        >>> prior, guide = dist.Normal(0.0, 1.0), lambda x: dist.Normal(0.5 * x, 1.0)
        >>> no_critic = lambda x, z: 0.0 * (x * z).sum(-1)
        >>> est = MINEAIS(prior, guide, no_critic, num_steps=4).estimate(
        ...     torch.randn(9), torch.randn(9)
        ... )
        >>> torch.allclose(est.lower.float(), est.terms["variational"], atol=1e-5)
        True
    """

    requires: ClassVar[Knowledge] = "marginal p(z)"
    directions: ClassVar[tuple[Direction, ...]] = ("lower",)
    breaks: ClassVar[str] = "a guide or critic trained on the same pairs"
    log_step_size: Tensor

    def __init__(
        self,
        model: Any,
        guide: Callable[..., Any],
        critic: Callable[..., Tensor],
        *,
        num_chains: int = 16,
        num_steps: int = 500,
        num_moves: int = 5,
        num_leapfrog: int = 5,
        num_negatives: int = 1,
        kernel: Kernel | None = None,
        bound: Literal["CR", "IM", "single"] = "CR",
        schedule: str | Schedule | Tensor = "adaptive",
        step_size: float | None = None,
        pilot: Pilot | None = None,
        compile: bool | str = "auto",
        data_entropy: float | None = None,
    ) -> None:
        super().__init__(model=model, guide=guide, critic=critic, data_entropy=data_entropy)
        self.num_moves = as_count("num_moves", num_moves)
        self.num_negatives = as_count("num_negatives", num_negatives)
        if bound not in ("CR", "IM", "single"):
            raise ValueError(f'bound must be "CR", "IM" or "single", got {bound!r}')
        self.annealer = Annealer(
            num_chains=num_chains,
            num_steps=num_steps,
            kernel=kernel,
            schedule=schedule,
            pilot=pilot,
            step_size=step_size,
            compile=compile,
        )
        self.training_kernel = HMC(num_leapfrog=num_leapfrog, target_accept=0.65)
        self.bound = bound
        self.register_buffer("log_step_size", torch.tensor(math.log(0.3)))

    @property
    def num_rows_per_pair(self) -> int:
        """Chains of a pair that run together."""
        return max(self.annealer.num_chains, self.annealer.plan.pilot.chains_for(1))

    def _tempered(
        self, q: Conditional, given: Tensor
    ) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Returns the function of ``[K, N, *event]`` that anneals q to q exp(T)."""
        flat = flatten(given, 1)

        def log_densities(values: Tensor) -> tuple[Tensor, Tensor]:
            log_q = q.log_prob(values)
            moved = flatten(values, 2)
            pair = (flat, moved) if self.joint is not None else (moved, flat)
            return log_q, log_q + self._scores(*pair, log_q.shape)

        return log_densities

    def loss(self, x: Tensor, z: Tensor) -> Tensor:
        """Computes a scalar whose gradient is that of minus IBAL, by Eq. 20; not its value.

        Args:
            x: Data, shape ``[N, *x_event]``.
            z: The z that belongs to each row, shape ``[N, *z_event]``.

        Returns:
            Scalar; call ``backward()`` on it.

        Raises:
            ValueError: If x or z requires a gradient: an encoder cannot be trained through this
                loss, since log Z depends on it too; or nothing has parameters.
        """
        x, z = self._checked_pairs(x, z)
        if x.requires_grad or z.requires_grad:
            raise ValueError(
                "MINEAIS trains its guide and critic only, but x or z requires a gradient: train "
                "an encoder with BarberAgakov or GIWAE, or detach x and z"
            )
        given, value = (x, z) if self.joint is not None else (z, x)
        negatives = self._negatives(given, value)
        q = self._condition(given)
        negative = self._tempered(q, given)(negatives)[1].mean(dim=0)
        loss = negative - q.log_prob(value) - self._score(x, z)
        if not loss.requires_grad:
            raise ValueError("MINEAIS has nothing to learn: guide and critic have no parameters")
        return loss.mean()

    def held_out_values(self, x: Tensor, z: Tensor) -> Values:
        """Computes what :meth:`fit` compares on held-out pairs: GIWAE of the same guide and critic.

        For one critic it is a lower bound on IBAL, short by what exceeds the logarithm of the 256
        particles; annealing at each epoch would cost more than the training.
        """
        statistics = self._contrast(x, z, _NUM_HELD_OUT_DRAWS)
        lower = statistics["variational"] + statistics["contrastive"]
        terms = {name: statistics[name] for name in ("variational", "contrastive")}
        return Values(lower=lower, terms=terms, ceiling=math.log(_NUM_HELD_OUT_DRAWS))

    def sample_posterior(self, x: Tensor, num_samples: int, *, seed: int | None = None) -> Tensor:
        r"""Draws from the learned posterior :math:`q(z|x) e^{T(x, z)} / Z(x)`, by annealing.

        Chains go from draws of q to the energy-based posterior in ``num_steps`` steps, and are
        resampled by their weights: the draws are asymptotically exact in their number and that of
        steps. At the best critic this is p(z|x).

        Source: Brekelmans et al. (2022), Prop. L.3.

        Args:
            x: Data, ``[N, *x_event]``; with roles swapped z, of which x are drawn.
            num_samples: Draws S per row, from as many chains (at least ``num_chains``).
            seed: Seed; None draws from the global generator.

        Returns:
            Draws ``[S, N, *event]``.

        Example:
            >>> guide, critic = lambda x: dist.Normal(x, 1.0), lambda x, z: 2.0 * z.sum(-1)
            >>> bound = MINEAIS(dist.Normal(0.0, 1.0), guide, critic, num_steps=50)
            >>> draws = bound.sample_posterior(torch.zeros(1), 400, seed=0)  # N(2, 1)
            >>> bool((draws.mean() - 2.0).abs() < 0.25)
            True
        """
        num_samples = as_count("num_samples", num_samples)
        with torch.no_grad(), seeded_if(as_seed(seed)):
            given = as_values("x", x)
            q = self._condition(given)
            return self.annealer.sample(
                self._tempered(q, given),
                q.bijection(),
                lambda count: q.sample(count)[0],
                num_samples,
            )

    def _negatives(self, given: Tensor, value: Tensor) -> Tensor:
        """Moves the true z (x, with roles swapped) by HMC toward the energy-based posterior."""
        q = self._condition(given)
        bijection = q.bijection()
        density = PairDensity(self._tempered(q, given), bijection)
        with torch.no_grad():
            start = bijection.unconstrain(value.unsqueeze(0))
            state = density(start.expand(self.num_negatives, *start.shape[1:]).contiguous())
            # The spread of q per coordinate and row is the scale of the moves: it knows x only.
            draws = bijection.unconstrain(q.sample(_NUM_SCALE_DRAWS)[0])
            scale = draws.std(dim=0).clamp(min=1e-6)
        one = torch.ones((), dtype=state.position.dtype, device=state.position.device)
        for _ in range(self.num_moves):
            step = self.log_step_size.exp().to(one).expand(state.position.shape[1])
            noise = self.training_kernel.noise(state, None)
            state, info = self.training_kernel.step(
                state, density, one, Tuning(step, scale), noise
            )
            gain = info.accept_prob.mean() - self.training_kernel.target_accept
            self.log_step_size += 0.05 * gain.to(self.log_step_size)
        with torch.no_grad():
            return bijection.constrain(state.position)[0]

    def _statistics(self, x: Tensor, z: Tensor, *, for_loss: bool) -> dict[str, Tensor]:
        given, value = (x, z) if self.joint is not None else (z, x)
        q = self._condition(given)
        weights = self.annealer.run(
            self._tempered(q, given),
            q.bijection(),
            lambda count: q.sample(count)[0],
            value,
            num_batches=self._num_batches,
        )
        score = self._score(x, z)
        return self._giwae(x, z) | {
            "variational": q.log_prob(value) - self._log_marginal(x, z),
            "score": score,
            "log_z_lower": weights.lower("IM"),
            "log_z_upper": weights.upper(self.bound),
            "accept_prob": torch.full_like(score, float(weights.accept_prob)),
        }

    def _giwae(self, x: Tensor, z: Tensor) -> dict[str, Tensor]:
        """Measures GIWAE of this guide, of this critic and the best, a few pairs at a time."""
        found: dict[str, list[Tensor]] = {}
        for pair in zip(x.split(_FEW_PAIRS), z.split(_FEW_PAIRS), strict=True):
            contrast = self._contrast(*pair, _NUM_HELD_OUT_DRAWS)
            value = contrast["variational"] + contrast["contrastive"]
            found.setdefault("giwae", []).append(value)
            if "best_critic" in contrast:
                found.setdefault("best_critic", []).append(contrast["best_critic"])
        return {name: torch.cat(values) for name, values in found.items()}

    def _assemble(self, statistics: dict[str, Tensor]) -> Values:
        variational, score = statistics["variational"], statistics["score"]
        contrastive = score - statistics["log_z_upper"]
        ibal_upper = variational + score - statistics["log_z_lower"]
        shown = ("log_z_lower", "log_z_upper", "accept_prob", "giwae", "best_critic")
        measurements = {name: statistics[name].mean() for name in shown if name in statistics}
        lower, giwae = variational + contrastive, statistics["giwae"]
        found = check_critic(lower, contrastive, statistics.get("best_critic"))
        return Values(
            lower=lower,
            terms={"variational": variational, "contrastive": contrastive},
            notes=(_CONDITIONAL,),
            measurements={**measurements, "ibal_upper": ibal_upper.mean()},
            diagnostics=found or check_chains(lower, giwae),
        )
