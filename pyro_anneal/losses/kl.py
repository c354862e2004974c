"""KL annealing: a warm-up that weighs the divergence in the evidence lower bound."""

from __future__ import annotations

import math
from collections.abc import Callable

from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from ..arguments import as_real, check_function
from ..models.types import Fn, Message

__all__ = ["anneal_kl"]


class _WeighLatents(Messenger):  # type: ignore[misc]
    """Multiplies the log density of every site that is not observed."""

    def __init__(self, weight: Callable[[], float]) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Message) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg):
            msg["scale"] = msg["scale"] * self.weight()


def anneal_kl(model: Fn, guide: Fn, weight: float | Callable[[], float]) -> tuple[Fn, Fn]:
    r"""Weighs the divergence from the prior in the ELBO of a model and a guide.

    .. math:: E_q\bigl[\log p(x | z)\bigr] - \beta \, \mathrm{KL}\bigl(q(z | x) \,\|\, p(z)\bigr)

    A weight that rises from 0 to 1 over the first steps keeps latents from being switched off before
    the decoder has learned to use them. Both halves of the divergence must be weighed: the latent
    sites of the model *and* the sites of the guide. A ``poutine.scale`` around one site of the model
    alone raises a density to a power, which is another objective. Below weight 1 the objective is no
    bound on the evidence; at 1 it is the ELBO again.

    Use it with one particle, ``Trace_ELBO()`` or ``IWAE(1)``: with more, IWAE and TVO put the
    weighted densities inside their weights, where no divergence stands apart.

    Source: Bowman et al. (2016), *Generating Sentences from a Continuous Space*, section 3.1;
    Lawson et al. (2019), appendix D, who train their priors so.

    Args:
        model: Pyro model. Condition it before, not around what is returned.
        guide: Pyro guide.
        weight: The weight beta, no unit, or a function without arguments that returns that of the
            current step.

    Returns:
        Model and guide, to be given to a loss in place of the two.

    Raises:
        ValueError: If a weight is negative or not finite.

    Example:
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> step = 0
        >>> pair = anneal_kl(model, guide, lambda: min(1.0, step / 100))
        >>> svi = pyro.infer.SVI(*pair, pyro.optim.Adam({}), pyro.infer.Trace_ELBO())
    """
    check_function("model", model)
    check_function("guide", guide, what="a Pyro guide")
    constant = weight if callable(weight) else _checked(weight)

    def current() -> float:
        return _checked(constant()) if callable(constant) else constant

    current()
    handler = _WeighLatents(current)
    return handler(model), handler(guide)


def _checked(weight: float) -> float:
    value = as_real("weight", weight)
    if not 0.0 <= value < math.inf:
        raise ValueError(f"weight must be finite and not negative, got {weight}")
    return value
