r"""Bounds that need one marginal density: Barber-Agakov and GIWAE.

With joint samples only (``model=None``) roles are swapped: the guide is a variational q(x|z),
negatives are x, and p(x) is unknown, so the bounds are on I minus the constant data entropy H(x).
That is enough to train an encoder: gradients flow through z. Source: Brekelmans et al. (2022),
App. N.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..arguments import as_count, as_seed
from ..persistence.randomness import seeded_if
from ..results.findings import Diagnostic
from .base import Bound, Direction, Values, flatten
from .contrastive import contrastive_term
from .fitting import as_values
from .joints import Knowledge

__all__ = ["GIWAE", "BarberAgakov"]

# Nats, and standard errors, by which a critic may lie below the best one.
_FAR, _FAR_ERRORS = 0.1, 3.0


class VariationalBound(Bound):
    """What bounds with a variational conditional and one marginal share: the swap of roles."""

    def __init__(
        self,
        *,
        model: Any,
        guide: Callable[..., Any],
        critic: Callable[..., Tensor] | None = None,
        data_entropy: float | None = None,
    ) -> None:
        super().__init__(model=model, guide=guide, critic=critic)
        if data_entropy is not None and model is not None:
            raise ValueError(
                "data_entropy is H(x), used with joint samples only (model=None); with a model "
                "the marginal is that of z"
            )
        self.data_entropy = data_entropy

    def _check_knowledge(self, needed: Knowledge) -> None:
        if self.joint is not None:  # without a model roles are swapped
            super()._check_knowledge(needed)

    def _missing(self) -> str | None:
        return "H(x)" if self.joint is None and self.data_entropy is None else None

    def _leaves_out(self) -> bool:
        return self.joint is None  # log p(x), of which H(x) is the mean alone

    def _log_marginal(self, x: Tensor, z: Tensor) -> Tensor:
        """Computes log p(z); with roles swapped minus the data entropy, or 0 if that is unknown."""
        if self.joint is not None:
            return self.joint.log_prior(z, x)
        return torch.full((x.shape[0],), -(self.data_entropy or 0.0), dtype=x.dtype).to(x.device)

    def _contrast(self, x: Tensor, z: Tensor, num_particles: int) -> dict[str, Tensor]:
        """Computes the terms of GIWAE: the positive among draws of the guide."""
        given, value = (x, z) if self.joint is not None else (z, x)
        q = self._condition(given)
        variational = q.log_prob(value) - self._log_marginal(x, z)
        positive = self._score(x, z)
        negatives = positive.new_zeros((0, x.shape[0]))
        draws, log_q = None, None
        if num_particles > 1:
            draws, log_q = q.sample(num_particles - 1)
            negatives = self._score_draws(given, draws)
        statistics = {
            "variational": variational,
            "contrastive": contrastive_term(positive, negatives),
        }
        if draws is not None and log_q is not None and self._knows_the_best_critic():
            joint = self._known

            def best(values: Tensor, log_q: Tensor) -> Tensor:
                return joint.log_likelihood(x, values) + joint.log_prior(values, x) - log_q

            with torch.no_grad():
                ideal = contrastive_term(best(value, q.log_prob(value)), best(draws, log_q))
                statistics["best_critic"] = variational.detach() + ideal
        return statistics

    def _knows_the_best_critic(self) -> bool:
        """Tells whether log p(x, z) / q(z|x) can be computed, and is wanted: not in training."""
        full = self.joint is not None and self.joint.knowledge == "full joint p(x, z)"
        return full and not torch.is_grad_enabled()

    def _score_draws(self, given: Tensor, draws: Tensor) -> Tensor:
        """Scores draws ``[K, N, *event]`` of the guide with what it was given, ``[K, N]``."""
        if self.joint is not None:
            return self._score(given, draws, 2)
        return self._scorer(flatten(draws, 2), flatten(given, 1))


class BarberAgakov(VariationalBound):
    r"""Bounds I by a variational conditional: from below, and with the full joint from above.

    .. math:: E_{p(x, z)}\Bigl[\log \frac{q(z|x)}{p(z)}\Bigr] \le I \le
        E_{p(x, z)}[\log p(x|z)] - E_{p(x) q(z|x)}\Bigl[\log \frac{p(x, z)}{q(z|x)}\Bigr]

    The gaps are ``E KL(p(z|x) || q(z|x))`` and ``E KL(q(z|x) || p(z|x))``.

    Source: Barber and Agakov (2003); Brekelmans et al. (2022).

    Args:
        model: What gives p(z): a Pyro model, a distribution of z or a joint; None for joint
            samples only, where roles are swapped. The upper bound comes along where the full
            joint is known.
        guide: The variational conditional: q(z|x), called with x; with roles swapped q(x|z),
            called with z.
        num_particles: Draws of q per pair for the upper bound.
        data_entropy: H(x) in nats, if known while roles are swapped.

    Raises:
        ValueError: If ``num_particles`` is below 1.

    Example:
        >>> prior, guide = dist.Normal(0.0, 1.0), lambda x: dist.Normal(0.0 * x, 1.0)
        >>> BarberAgakov(prior, guide).estimate(torch.randn(9), torch.randn(9)).lower
        tensor(0.)
    """

    requires: ClassVar[Knowledge] = "marginal p(z)"
    directions: ClassVar[tuple[Direction, ...]] = ("lower", "upper")
    breaks: ClassVar[str] = "a guide trained on the same pairs"

    def __init__(
        self,
        model: Any,
        guide: Callable[..., Any],
        num_particles: int = 1,
        *,
        data_entropy: float | None = None,
    ) -> None:
        super().__init__(model=model, guide=guide, data_entropy=data_entropy)
        check_particles(num_particles)
        self.num_particles = num_particles

    @property
    def num_rows_per_pair(self) -> int:  # noqa: D102
        return self.num_particles

    def _statistics(self, x: Tensor, z: Tensor, *, for_loss: bool) -> dict[str, Tensor]:
        given, value = (x, z) if self.joint is not None else (z, x)
        q = self._condition(given)
        statistics = {"variational": q.log_prob(value) - self._log_marginal(x, z)}
        full = self.joint is not None and self.joint.knowledge == "full joint p(x, z)"
        if full and not for_loss:
            joint = self._known
            draws, log_q = q.sample(self.num_particles)
            log_joint = joint.log_likelihood(x, draws) + joint.log_prior(draws, x)
            elbo = (log_joint - log_q).mean(dim=0)
            statistics["upper"] = joint.log_likelihood(x, z) - elbo
        return statistics

    def _assemble(self, statistics: dict[str, Tensor]) -> Values:
        term = statistics["variational"]
        upper = statistics.get("upper")
        return Values(lower=term, upper=upper, terms={"variational": term})


class GIWAE(VariationalBound):
    r"""Bounds I from below by a variational and a contrastive term: generalized IWAE.

    .. math:: E\Bigl[\log \frac{q(z_1|x)}{p(z_1)}\Bigr] +
        E\Bigl[\log \frac{e^{T(x, z_1)}}{\frac{1}{K} \sum_{k=1}^K e^{T(x, z_k)}}\Bigr] \le I,
        \qquad z_1 \sim p(z|x), \; z_{2:K} \sim q(z|x)

    It is Barber-Agakov at K = 1, InfoNCE at q(z|x) = p(z), the IWAE lower bound with the best
    critic ``log p(x, z) / q(z|x) + c(x)``, and tends to IBAL (see :class:`MINEAIS`) as K grows.
    The contrastive term adds at most ``log K``; with a bad critic it is negative, and the bound
    falls below Barber-Agakov. Where the full joint is known, an estimate says what the best critic
    would have given on the same draws (``measurements["best_critic"]``), and finds a critic that
    is far from it.

    Source: Brekelmans et al. (2022), GIWAE; App. N for joint samples only.

    Args:
        model: What gives p(z): a Pyro model, a distribution of z or a joint; None for joint
            samples only, where roles are swapped and negatives are x.
        guide: The variational conditional: q(z|x), called with x; with roles swapped q(x|z),
            called with z. It must be reparameterizable, or frozen.
        critic: Scores pairs.
        num_particles: K, the positive included.
        data_entropy: H(x) in nats, if known while roles are swapped.

    Raises:
        ValueError: If ``num_particles`` is below 1.

    Example:
        >>> from pyro_anneal import mi
        >>> prior, guide = dist.Normal(0.0, 1.0), lambda x: dist.Normal(0.5 * x, 0.8)
        >>> bound = GIWAE(prior, guide, mi.SeparableCritic(1, 1, [8]), num_particles=4)
        >>> est = bound.estimate(torch.randn(64), torch.randn(64))
        >>> torch.allclose(est.lower, est.terms["variational"] + est.terms["contrastive"])
        True
    """

    requires: ClassVar[Knowledge] = "marginal p(z)"
    directions: ClassVar[tuple[Direction, ...]] = ("lower",)
    breaks: ClassVar[str] = "a guide or critic trained on the same pairs"

    def __init__(
        self,
        model: Any,
        guide: Callable[..., Any],
        critic: Callable[..., Tensor],
        num_particles: int = 100,
        *,
        data_entropy: float | None = None,
    ) -> None:
        super().__init__(model=model, guide=guide, critic=critic, data_entropy=data_entropy)
        check_particles(num_particles)
        self.num_particles = num_particles

    @property
    def num_rows_per_pair(self) -> int:  # noqa: D102
        return self.num_particles

    def _statistics(self, x: Tensor, z: Tensor, *, for_loss: bool) -> dict[str, Tensor]:
        return self._contrast(x, z, self.num_particles)

    def sample_posterior(self, x: Tensor, num_samples: int, *, seed: int | None = None) -> Tensor:
        r"""Draws from the normalized posterior that GIWAE stands for.

        K values are drawn from q(z|x), and one of them is chosen with probability proportional to
        :math:`e^{T(x, z)}`. GIWAE is a bound by this distribution, which has a normalized density
        and tends to :math:`q(z|x) e^{T(x, z)} / Z(x)` as K grows.

        Source: Brekelmans et al. (2022), the probabilistic interpretation of GIWAE (App. L);
        Lawson et al. (2019) for the distribution.

        Args:
            x: Data, ``[N, *x_event]``; with roles swapped z, of which x are drawn.
            num_samples: Draws S per row, each from K values of its own.
            seed: Seed; None draws from the global generator.

        Returns:
            Draws ``[S, N, *event]``.

        Example:
            >>> guide, critic = lambda x: dist.Normal(x, 1.0), lambda x, z: 9.0 * z.sum(-1)
            >>> bound = GIWAE(dist.Normal(0.0, 1.0), guide, critic, num_particles=50)
            >>> bool((bound.sample_posterior(torch.zeros(3), 20, seed=0) > 0.5).all())
            True
        """
        num_samples = as_count("num_samples", num_samples)
        with torch.no_grad(), seeded_if(as_seed(seed)):
            given = as_values("x", x)
            q = self._condition(given)
            drawn = []
            for _ in range(num_samples):
                draws, _ = q.sample(self.num_particles)
                scores = self._score_draws(given, draws)
                chosen = torch.distributions.Categorical(logits=scores.mT).sample()
                drawn.append(draws[chosen, torch.arange(len(given), device=chosen.device)])
            return torch.stack(drawn)

    def _assemble(self, statistics: dict[str, Tensor]) -> Values:
        ceiling = math.log(self.num_particles) if self.num_particles > 1 else None
        terms = {name: statistics[name] for name in ("variational", "contrastive")}
        lower = terms["variational"] + terms["contrastive"]
        best = statistics.get("best_critic")
        return Values(
            lower=lower,
            terms=terms,
            ceiling=ceiling,
            measurements={} if best is None else {"best_critic": best.mean()},
            diagnostics=check_critic(lower, terms["contrastive"], best),
        )


def check_critic(
    lower: Tensor, contrastive: Tensor, best: Tensor | None
) -> tuple[Diagnostic, ...]:
    """Finds a critic that is far from the best one, or worse than none, pair by pair.

    Args:
        lower: Values of the bound, ``[N]``.
        contrastive: What the critic adds to Barber-Agakov.
        best: Values of a lower bound that the best critic reaches or exceeds with this guide; None
            where the full joint is not known.
    """
    if lower.requires_grad:  # in training
        return ()
    if count := int(contrastive.isnan().sum()):
        message = (
            f"the scores of {count} of {len(contrastive)} pairs are NaN, and so is the bound: look for "
            "logarithms and roots of negative numbers, or infinite values, in the critic"
        )
        return (
            Diagnostic(name="critic", severity="warning", message=message, value=float(count)),
        )
    if best is not None and (left := _beyond_chance(best - lower)) is not None:
        message = (
            f"the critic is {left:.3g} nats below what the best one reaches with this guide "
            f"({float(best.mean()):.3g} nats, by IWAE): train it for longer, or take a better family"
        )
        return (Diagnostic(name="critic", severity="info", message=message, value=left),)
    if (worse := _beyond_chance(-contrastive)) is not None:
        message = (
            f"the critic takes {worse:.3g} nats from what the guide alone gives (BarberAgakov), where the "
            "best one adds: train it for longer or on more pairs, or take a smaller one"
        )
        return (Diagnostic(name="critic", severity="warning", message=message, value=worse),)
    return ()


def check_chains(lower: Tensor, giwae: Tensor) -> tuple[Diagnostic, ...]:
    """Finds an energy-based bound below GIWAE of the same critic: its chains have not converged."""
    if (left := _beyond_chance(giwae - lower)) is None:
        return ()
    message = (
        f"annealing gives {left:.3g} nats less than GIWAE of the same guide and critic, which the "
        "energy-based bound exceeds: raise num_steps or num_chains"
    )
    return (Diagnostic(name="gap", severity="warning", message=message, value=left),)


def _beyond_chance(lost: Tensor) -> float | None:
    """Computes a mean over pairs in nats, or None if it is small or may be chance."""
    left = float(lost.mean())
    error = float(lost.std()) / len(lost) ** 0.5 if len(lost) > 1 else math.inf
    return left if left > max(_FAR, _FAR_ERRORS * error) else None


def check_particles(num_particles: int) -> None:
    """Raises unless there is at least one particle."""
    as_count("num_particles", num_particles)
