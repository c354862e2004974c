"""The evidence upper bound (EUBO), which trains the guide toward the posterior."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to
from typing_extensions import Unpack

from ..arguments import as_count
from ..models.autoguides import (
    auxiliary_values,
    check_guide,
    derived_sites,
    is_autoguide,
    sees_arguments,
)
from ..models.simulation import (
    MakeArgs,
    Simulation,
    check_copies,
    guide_arguments,
    simulate,
)
from ..models.sites import base_distribution
from ..models.types import Fn, Message
from ..weights import log_mean_exp, log_normalized_weights
from .base import (
    Evaluation,
    ParticleELBO,
    PyroOptions,
    finite_or_zero,
    without_parameters,
)
from .iwae import score_weights
from .particles import Particles, collect
from .paths import along_the_path
from .traces import Arguments, Gates

__all__ = ["EUBO"]


class _Clamp(Messenger):  # type: ignore[misc]
    """Puts given values at the guide's latent sites."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Message) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True


def _clamped_values(guide: Any, simulation: Simulation, arguments: Arguments) -> dict[str, Tensor]:
    """Computes the values of the guide's own sites that give the simulated latents."""
    values = dict(simulation.latents)
    if not is_autoguide(guide):
        return values
    check_guide(guide)
    if getattr(guide, "prototype_trace", None) is None:
        with poutine.block():
            guide(*arguments[0], **arguments[1])
    derived = derived_sites(guide)
    unconstrained = {}
    for part in _prototypes(guide):
        for name, site in part.iter_stochastic_nodes():
            unconstrained[name] = biject_to(site["fn"].support).inv(values[name])
    values = {name: value for name, value in values.items() if name not in derived}
    return values | auxiliary_values(guide, unconstrained)


def _prototypes(guide: Any) -> Iterator[Any]:
    """Iterates over the prototype traces of an AutoGuide and its parts."""
    if isinstance(guide, torch.nn.ModuleList):
        for part in guide:
            yield from _prototypes(part)
    elif is_autoguide(guide):
        yield guide.prototype_trace


class EUBO(ParticleELBO):
    r"""Upper bound on the log evidence, from the posterior's side.

    .. math:: U = E_{p(z | x)}\Bigl[\log \frac{p(x, z)}{q(z | x)}\Bigr]
              = \log p(x) + KL(p(z | x) \,\|\, q(z | x))

    The loss is **plus** the bound, and only the guide learns: minimizing it brings the guide to
    cover the posterior. The model's parameters get no gradient (without the detachment they would
    run away), and an enclosing ``SVI`` does not see them.

    * ``posterior="importance"``: posterior expectations are self-normalized sums over K particles
      of the guide, ``sum_k w_k log w_k / sum_k w_k``. Its gradient is that of wake-phi. The value
      approaches the bound from below as K grows: at finite K it is **not** an upper bound.
    * ``posterior="simulated"``: exact pairs (z, x) simulated from the model, of which z is an exact
      posterior sample, and K - 1 particles of the guide besides:

      .. math:: U = \log \frac{1}{K} \Bigl(w(z^*) + \sum_{k=2}^K w_k\Bigr),
                \qquad z^* \sim p(z | x), \; z_k \sim q(z | x)

      With one particle this is the sleep phase, and inference compilation. ``E[U]`` is an upper
      bound on ``E[log p(x)]`` at any K; x is **simulated**, in the shape of the data. The guide
      sees the simulated x in place of the argument that holds the data.

    Source: Masrani, Le and Wood (2019), section 2 and Table 2; Le et al. (2019), *Revisiting
    Reweighted Wake-Sleep*, Eq. 5; Brekelmans et al. (2022), Eq. 32, for K > 1 simulated.

    Args:
        num_particles: Number K of particles; at least 2 for ``"importance"``.
        posterior: Where posterior samples come from.
        make_args: For ``"simulated"``: a function of the simulated observations, by site, that
            returns the guide's ``(args, kwargs)``, where it is ambiguous which argument is data.
        **options: What Pyro's losses take too, see :class:`~pyro_anneal.losses.base.PyroOptions`.

    Raises:
        ValueError: If ``posterior`` is unknown, or ``"importance"`` has fewer than two particles.

    Example:
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):  # the exact posterior: every weight equals p(x)
        ...     pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> round(EUBO(num_particles=5).loss(model, guide, torch.tensor(2.0)), 4)
        -2.2655
    """

    def __init__(
        self,
        num_particles: int = 10,
        posterior: Literal["importance", "simulated"] = "importance",
        *,
        make_args: MakeArgs | None = None,
        **options: Unpack[PyroOptions],
    ) -> None:
        if posterior not in ("importance", "simulated"):
            raise ValueError(f'posterior must be "importance" or "simulated", got {posterior!r}')
        num_particles = as_count("num_particles", num_particles, least=-(2**63))
        if posterior == "importance" and num_particles < 2:
            raise ValueError(
                'posterior="importance" weighs particles against each other and needs '
                f"num_particles >= 2, got {num_particles}: with one the gradient has mean zero"
            )
        super().__init__(
            num_particles,
            **options,
        )
        self.posterior = posterior
        self.make_args = make_args
        self._is_checked = False  # whether the model was searched for copies of its data

    def _fields(self) -> dict[str, object]:
        return super()._fields() | {"posterior": self.posterior}

    def _evaluate(self, model: Fn, guide: Fn, arguments: Arguments) -> Evaluation:
        if self.posterior == "importance":
            return self._importance(without_parameters(model), guide, arguments)
        return self._simulated(without_parameters(model), guide, arguments)

    def _importance(self, model: Fn, guide: Fn, arguments: Arguments) -> Evaluation:
        particles = self._particles(model, guide, arguments, "score", model_context=torch.no_grad)
        log_weights = particles.log_weights.detach()
        weights = log_normalized_weights(log_weights).exp()
        bound = (weights * finite_or_zero(log_weights)).sum(0)
        bound = torch.where((log_weights == -torch.inf).all(0), -torch.inf, bound)
        value = particles.total(bound)
        if not torch.is_grad_enabled():
            return Evaluation(value, None)
        cross_entropy = -(weights * finite_or_zero(particles.log_guide)).sum(0)
        return Evaluation(value, particles.total(cross_entropy))

    def _simulated(self, model: Fn, guide: Fn, arguments: Arguments) -> Evaluation:
        simulation = simulate(model, arguments)
        if not self._is_checked:
            check_copies(model, arguments, simulation)
            self._is_checked = True
        guide_args = arguments
        if sees_arguments(guide) or self.make_args is not None:
            guide_args = guide_arguments(arguments, simulation, self.make_args)
        conditioned = poutine.condition(model, data=simulation.observed)
        gates = Gates() if torch.is_grad_enabled() and self.num_particles > 1 else None
        values = _clamped_values(guide, simulation, guide_args)

        def clamped(*args: Any, **kwargs: Any) -> None:
            with _Clamp(values):
                guide(*args, **kwargs)

        runs = self._runs(
            conditioned, clamped, arguments, guide_args, 1, None, None, torch.no_grad
        )
        if self.num_particles == 1:
            exact = collect(runs, num_particles=1, vectorized=False, sampling="pathwise")
            _check_density(exact)
            value = exact.total(exact.log_weights[0].detach())
            return Evaluation(value, -exact.total(exact.log_guide[0]))
        draws = self._runs(
            conditioned, guide, arguments, guide_args, self.num_particles - 1, gates
        )
        return self._combine(runs, draws, gates)

    def _combine(self, exact_runs: list[Any], draws: list[Any], gates: Gates | None) -> Evaluation:
        """Builds the bound of one exact posterior sample and K - 1 draws of the guide."""
        count = self.num_particles - 1
        sampling: Literal["pathwise", "gated"] = "pathwise" if gates is None else "gated"
        exact = collect(exact_runs, num_particles=1, vectorized=False, sampling="pathwise")
        _check_density(exact)
        drawn = collect(
            draws,
            num_particles=count,
            vectorized=self.vectorize_particles and count > 1,
            sampling=sampling,
            gates=gates,
        )
        log_weights = torch.cat([exact.log_weights, drawn.log_weights]).detach()
        value = exact.total(log_mean_exp(log_weights))
        if gates is None:
            return Evaluation(value, None)
        weights = log_normalized_weights(log_weights).exp()
        surrogate = -exact.total(weights[0] * exact.log_guide[0])
        if drawn.score_sites or drawn.altered_sites:
            gates.closed = True
            by_score = score_weights(log_weights)[1:] - weights[1:]
            terms = by_score * finite_or_zero(drawn.log_guide)
            return Evaluation(value, surrogate + drawn.total(terms.sum(0)))
        # Doubly reparameterized: the path alone, with squared weights (see IWAE), and through the
        # gates alone, so that nothing reaches the model's parameters.
        return Evaluation(value, surrogate + along_the_path(drawn, weights[1:].square()))


def _check_density(exact: Particles) -> None:
    """Checks that the guide has a density at the simulated latents."""
    if bool(exact.log_guide.isfinite().all()):
        return
    for name, site in exact.runs[0].guide.nodes.items():
        if site["type"] == "sample" and not bool(site["log_prob"].isfinite().all()):
            if isinstance(base_distribution(site["fn"]), dist.Delta):
                raise ValueError(
                    f'the guide puts a Delta at the latent "{name}", a point or a value computed '
                    "from its other sites, which has no density at the value that the model "
                    'simulated; use posterior="importance" or an autoguide of Pyro'
                )
            raise ValueError(
                f'the guide has no density at the latent "{name}" that the model simulated '
                f"(log q = {float(site['log_prob'].min())}): a point mass or a support too small; "
                "use a guide that covers the model's prior"
            )
