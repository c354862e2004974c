r"""Bounds that need the full joint density, by importance sampling: IWAE, RIWAE, S-InfoNCE.

All rest on ``I = E[log p(x|z)] - E[log p(x)]``: an upper bound on log p(x) gives a lower bound on
I, and the other way round. These are the AIS bounds without intermediate temperatures (T = 1), and
their error is at least of the order of ``KL - log K`` nats, KL being that between the posterior
and its proposal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import bounds
from ..models.types import Fn
from .base import Bound, Direction, Values
from .joints import Knowledge
from .variational import check_particles

__all__ = ["IWAE", "RIWAE", "StructuredInfoNCE"]


class _Importance(Bound):
    """What bounds on log p(x) from K weights share: E[log p(x|z)] minus the bound."""

    requires: ClassVar[Knowledge] = "full joint p(x, z)"
    directions: ClassVar[tuple[Direction, ...]] = ("lower", "upper")

    def __init__(self, *, model: Any, guide: Fn | None, num_particles: int) -> None:
        super().__init__(model=model, guide=guide)
        check_particles(num_particles)
        self.num_particles = num_particles

    @property
    def num_rows_per_pair(self) -> int:
        return self.num_particles

    def _log_weights(self, x: Tensor, z: Tensor, log_q: Tensor) -> Tensor:
        """Computes log p(x, z) - log q(z|x), shape ``[(K,) N]``."""
        return self._known.log_likelihood(x, z) + self._known.log_prior(z, x) - log_q

    def _assemble(self, statistics: dict[str, Tensor]) -> Values:
        ceiling = math.log(self.num_particles) if self.num_particles > 1 else None
        terms = {k: v for k, v in statistics.items() if k in ("variational", "contrastive")}
        lower = torch.stack(list(terms.values())).sum(dim=0)
        return Values(lower=lower, upper=statistics["upper"], terms=terms, ceiling=ceiling)


class IWAE(_Importance):
    r"""Bounds I from both sides by K importance samples from a guide.

    .. math::
        E\Bigl[\log p(x|z_1) - \log \frac{1}{K} \sum_{k=1}^K w_k\Bigr] \le I \le
        E\Bigl[\log p(x|z) - \log \frac{1}{K} \sum_{k=1}^K w'_k\Bigr], \qquad
        w = \frac{p(x, z)}{q(z|x)}

    On the left ``w_1`` belongs to the true z and the others to draws of q; on the right all K are
    draws of q. At K = 1 these are the Barber-Agakov bounds, and the lower one gains at most
    ``log K`` over that: it is GIWAE with the best critic.

    Source: Burda, Grosse and Salakhutdinov (2016); Sobolev and Vetrov (2019); Brekelmans et al.
    (2022), IWAE bounds.

    Args:
        model: The full joint: a Pyro model or a joint.
        guide: The proposal q(z|x), called with x; None for the prior of the model.
        num_particles: K.

    Raises:
        ValueError: If the full joint is not known, or ``num_particles`` is below 1.

    Example:
        >>> from pyro_anneal import mi
        >>> model = mi.DistributionJoint(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0))
        >>> exact = lambda x: dist.Normal(x / 2, 0.5**0.5)
        >>> est = mi.IWAE(model, exact, num_particles=3).estimate(num_pairs=4)
        >>> torch.allclose(est.pair_lower, est.pair_upper, atol=1e-6)
        True
    """

    breaks: ClassVar[str] = "a guide trained on the same pairs"

    def __init__(self, model: Any, guide: Fn | None = None, num_particles: int = 100) -> None:
        super().__init__(model=model, guide=guide, num_particles=num_particles)

    def _statistics(self, x: Tensor, z: Tensor, *, for_loss: bool) -> dict[str, Tensor]:
        joint = self._known
        q = self._condition(x)
        log_q, log_prior = q.log_prob(z), joint.log_prior(z, x)
        log_likelihood = joint.log_likelihood(x, z)
        true = (log_likelihood + log_prior - log_q).unsqueeze(0)
        draws, log_q_draws = q.sample(self.num_particles)
        weights = self._log_weights(x, draws, log_q_draws)
        log_upper = bounds.independent_multi_upper(true, weights[:-1])
        return {
            "variational": log_q - log_prior,
            "contrastive": true[0] - log_upper,
            "upper": log_likelihood - bounds.independent_multi_lower(weights),
        }


class StructuredInfoNCE(_Importance):
    r"""Bounds I from both sides by K draws of z from the prior: InfoNCE with the best critic.

    .. math::
        E\Bigl[\log \frac{p(x|z_1)}{\frac{1}{K} \sum_{k=1}^K p(x|z_k)}\Bigr] \le I \le
        E\Bigl[\log \frac{p(x|z)}{\frac{1}{K} \sum_{k=1}^K p(x|z'_k)}\Bigr], \qquad
        z_{2:K}, z'_{1:K} \sim p(z)

    On the left ``z_1`` is the true z; that side never exceeds ``log K``. It is :class:`IWAE` with
    the prior as guide.

    Source: Poole et al. (2019), structured bounds with tractable encoders; Brekelmans et al. (2022),
    structured InfoNCE.

    Args:
        model: The full joint: a Pyro model or a joint.
        num_particles: K.

    Raises:
        ValueError: If the full joint is not known, or ``num_particles`` is below 1.

    Example:
        >>> from pyro_anneal import mi
        >>> model = mi.DistributionJoint(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 9.0))
        >>> bound = mi.StructuredInfoNCE(model, num_particles=2)
        >>> bool(bound.estimate(num_pairs=9).lower <= torch.tensor(2.0).log())
        True
    """

    breaks: ClassVar[str] = "nothing beyond independent exact pairs"

    def __init__(self, model: Any, num_particles: int = 100) -> None:
        super().__init__(model=model, guide=None, num_particles=num_particles)

    def _statistics(self, x: Tensor, z: Tensor, *, for_loss: bool) -> dict[str, Tensor]:
        joint = self._known
        log_likelihood = joint.log_likelihood(x, z)
        draws = joint.sample_prior(self.num_particles, x)
        weights = joint.log_likelihood(x, draws)
        log_upper = bounds.independent_multi_upper(log_likelihood.unsqueeze(0), weights[:-1])
        return {
            "contrastive": log_likelihood - log_upper,
            "upper": log_likelihood - bounds.independent_multi_lower(weights),
        }


class RIWAE(_Importance):
    r"""Bounds I from both sides by K exact posterior samples: reverse IWAE.

    .. math::
        E\Bigl[\log p(x|z_1) + \log \frac{1}{K} \sum_{k=1}^K \frac{1}{w_k}\Bigr] \le I \le
        E\Bigl[\log p(x|z_1) + \log \frac{1}{K} \Bigl(\frac{1}{w'_1}
        + \sum_{k=2}^K \frac{1}{w_k}\Bigr)\Bigr], \qquad w = \frac{p(x, z)}{q(z|x)}

    All z's are independent exact posterior samples of the same x, except that ``w'_1`` belongs to
    a draw of q. A simulated pair gives one such sample, the rest must come from elsewhere, which
    is rare outside of conjugate or enumerable models; at K = 1 it is Barber-Agakov.

    Source: Brekelmans et al. (2022), independent reverse multi-sample AIS, at T = 1.

    Args:
        model: The full joint: a Pyro model or a joint.
        guide: The proposal q(z|x), called with x.
        num_particles: K.
        posterior: Draws exact posterior samples: maps ``x [N, *x_event]`` and a number n to
            ``[n, N, *z_event]``. Needed for K above 1.

    Raises:
        ValueError: If the full joint is not known, ``num_particles`` is below 1, or above 1
            without ``posterior``.

    Example:
        >>> from pyro_anneal import mi
        >>> model = mi.DistributionJoint(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0))
        >>> exact = lambda x: dist.Normal(x / 2, 0.5**0.5)
        >>> bound = mi.RIWAE(model, exact, 3, posterior=lambda x, n: exact(x).sample((n,)))
        >>> est = bound.estimate(num_pairs=4)
        >>> torch.allclose(est.pair_lower, est.pair_upper, atol=1e-6)
        True
    """

    breaks: ClassVar[str] = "posterior samples that are not exact, or depend on z"

    def __init__(
        self,
        model: Any,
        guide: Fn,
        num_particles: int = 1,
        *,
        posterior: Callable[[Tensor, int], Tensor] | None = None,
    ) -> None:
        super().__init__(model=model, guide=guide, num_particles=num_particles)
        if num_particles > 1 and posterior is None:
            raise ValueError(
                f"RIWAE with num_particles={num_particles} needs {num_particles - 1} exact "
                "posterior samples beside the simulated one: pass posterior=, or use "
                "num_particles=1 (Barber-Agakov) or IWAE"
            )
        self.posterior = posterior

    def _statistics(self, x: Tensor, z: Tensor, *, for_loss: bool) -> dict[str, Tensor]:
        joint = self._known
        q = self._condition(x)
        log_q, log_prior = q.log_prob(z), joint.log_prior(z, x)
        log_likelihood = joint.log_likelihood(x, z)
        reverse = (log_likelihood + log_prior - log_q).unsqueeze(0)
        if self.posterior is not None and self.num_particles > 1:
            others = self.posterior(x, self.num_particles - 1)
            weights = self._log_weights(x, others, q.log_prob(others))
            reverse = torch.cat([reverse, weights])
        draws, log_q_draws = q.sample(1)
        forward = self._log_weights(x, draws, log_q_draws)
        log_upper = bounds.independent_reverse_upper(reverse)
        log_lower = bounds.independent_reverse_lower(forward, reverse[1:])
        return {
            "variational": log_q - log_prior,
            "contrastive": reverse[0] - log_upper,
            "upper": log_likelihood - log_lower,
        }
