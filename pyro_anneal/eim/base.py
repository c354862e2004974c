r"""What the sampler-induced distributions share: bounds on their density, and the exact extended space.

An energy-inspired model is a sampler read as a distribution. The sampler draws auxiliary variables
``a`` (rejected proposals, a momentum) beside the value ``x``, and ``p(x, a)`` is known exactly,
while ``p(x)`` is not. Auxiliary-variable variational inference draws ``a ~ r(a | x)`` and uses

.. math:: w = \frac{p(x, a)}{r(a \mid x)}, \qquad E_r[w] = p(x), \qquad E_r[\log w] \le \log p(x).

Source: Lawson, Tucker, Dai and Ranganath (2019), *Energy-Inspired Models: Learning with
Sampler-Induced Distributions*, section 3.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Transform, constraints

from ..weights import log_mean_exp

__all__ = ["Extended", "SamplerInduced", "has_exact_log_prob"]

# Elements of proposals held at once where a computation can be split: 32 MB in float64.
CHUNK_ELEMENTS = 2**22


class SamplerInduced(TorchDistribution):  # type: ignore[misc]
    r"""Base of the distributions induced by a sampler: TRS, SNIS and HIS.

    Sampling is exact. ``log_prob`` is stochastic: a lower bound in expectation, and its exponential
    is unbiased,

    .. math::
        L = \log \frac{1}{M} \sum_{m=1}^M w_m, \qquad E[e^L] = p(x), \qquad E[L] \le \log p(x),

    tighter with M. So ``has_exact_log_prob`` is ``False``: a lower bound on the log density of a
    model's site keeps every lower bound on the evidence a lower bound; the same in a guide does
    not, and AIS needs :meth:`extended`. Values of one call are independent of each other given
    the inputs, unless ``share_proposals`` is set.

    Distributions are cheap to build and hold references to the modules given. Build them inside
    the model, so that ``pyro.module`` and optimizers see the modules; :meth:`to` moves them.

    Args:
        proposal: Distribution of the draws.
        num_particles: Number M of draws of the auxiliary variables in ``log_prob``.
        share_proposals: Whether all values of one ``log_prob`` call share the auxiliary draws. Each
            value keeps its bound, and ``E[e^L] = p(x)``; products over values no longer do.
        validate_args: As in torch.

    Raises:
        ValueError: If ``num_particles`` is below 1.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    has_rsample = False
    has_exact_log_prob = False
    proposal: Any

    def __init__(
        self,
        proposal: Distribution,
        *,
        num_particles: int = 1,
        share_proposals: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(proposal, Distribution):
            raise TypeError(f"proposal must be a distribution, got {type(proposal).__name__}")
        check_count("num_particles", num_particles)
        self.proposal = proposal
        self.num_particles = num_particles
        self.share_proposals = share_proposals
        super().__init__(proposal.batch_shape, proposal.event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Support of the values, that of the proposal."""
        support: constraints.Constraint = self.proposal.support
        return support

    def expand(self, batch_shape: Size | tuple[int, ...], _instance: Any = None) -> SamplerInduced:
        """Returns the distribution with its batch shape enlarged; draws are independent."""
        batch_shape = Size(batch_shape)
        self.proposal.expand(batch_shape)  # raises where the shapes do not fit
        new = copy.copy(self)
        new._batch_shape = batch_shape
        return new

    def to(self, *args: object, **kwargs: object) -> SamplerInduced:
        """Returns the distribution on another device or dtype, with arguments as ``Tensor.to``.

        Modules among its parts are moved in place, as ``nn.Module.to`` does; tensors are copied
        with their gradients. An energy that is a plain function keeps what it closes over.
        """
        new: SamplerInduced = _moved(self, args, kwargs)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Draws a lower bound on the log density, with the constructor's settings.

        Args:
            value: Values, shape ``[*sample, *batch, *event]``.

        Returns:
            Lower bound L in nats with ``E[e^L] = p(value)``, shape ``[*sample, *batch]``.
        """
        return self.log_prob_bound(value)

    def log_prob_bound(
        self,
        value: Tensor,
        num_particles: int | None = None,
        *,
        share_proposals: bool | None = None,
    ) -> Tensor:
        r"""Draws the multi-sample lower bound on the log density, ``log mean_m w_m``.

        Without gradients the M particles are drawn in chunks, so memory does not grow with M.

        Source: Burda et al. (2016) over the auxiliary variables; Lawson et al. (2019), section 5,
        evaluates with M = 1000.

        Args:
            value: Values, shape ``[*sample, *batch, *event]``.
            num_particles: Number M of particles; the constructor's if ``None``.
            share_proposals: As in the constructor, whose setting is used if ``None``. With M
                in the hundreds, sharing makes the evaluation of many values affordable.

        Returns:
            Lower bound L in nats with ``E[e^L] = p(value)``, shape ``[*sample, *batch]``. Its
            gradients are those of the expectation: pathwise through a reparameterized proposal;
            for others a score-function term with value zero is added.
        """
        if self._validate_args:
            self._validate_sample(value)
        num_particles = self.num_particles if num_particles is None else num_particles
        check_count("num_particles", num_particles)
        shared = self.share_proposals if share_proposals is None else share_proposals
        shape = torch.broadcast_shapes(self._sample_dims(value), self.batch_shape)
        chunk = max(1, CHUNK_ELEMENTS // max(1, self._elements_per_particle(shape, shared)))
        parts, scores = [], []
        for start in range(0, num_particles, chunk):
            part, score = self._log_ratios(value, shape, min(chunk, num_particles - start), shared)
            parts.append(part.expand(-1, *shape))
            if score is not None:
                scores.append(score.sum(dim=0))
        log_ratio = log_mean_exp(torch.cat(parts))
        if scores:
            log_ratio = log_ratio + log_ratio.detach() * torch.stack(scores).sum(dim=0)
        return log_ratio + self._log_base(value)

    def extended(self) -> Extended:
        """Returns the joint distribution of the value and the auxiliary variables, exactly.

        Use it where the density must be exact: in ``AnnealedImportance``, in MCMC and in guides.
        """
        return Extended(self)

    def _sample_dims(self, value: Tensor) -> Size:
        return value.shape[: value.dim() - len(self.event_shape)]

    def _expanded_proposal(self) -> Any:
        if self.proposal.batch_shape == self.batch_shape:
            return self.proposal
        return self.proposal.expand(self.batch_shape)

    def _elements_per_particle(self, shape: Size, shared: bool) -> int:
        raise NotImplementedError

    def _log_base(self, value: Tensor) -> Tensor:
        """Part of every log-weight that involves no auxiliary variable, shape ``[*shape]``."""
        raise NotImplementedError

    def _log_ratios(
        self, value: Tensor, shape: Size, num_particles: int, shared: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Log-weights ``[M, *shape]`` without the base, and the score term (value 0) if needed."""
        raise NotImplementedError

    def _extended_event_shape(self) -> Size:
        raise NotImplementedError

    def _extended_sample(self, sample_shape: Size) -> Tensor:
        raise NotImplementedError

    def _extended_log_prob(self, value: Tensor) -> Tensor:
        raise NotImplementedError


class Extended(TorchDistribution):  # type: ignore[misc]
    r"""Joint distribution of a sampler's value and its auxiliary variables.

    Events are stacked along a new leading event dimension: slot 0 holds the value ``x``, the
    others the auxiliary variables. Sampling and ``log_prob`` are both exact, and the marginal of
    slot 0 is the sampler-induced distribution. Obtained from :meth:`SamplerInduced.extended`.

    Example:
        >>> from pyro.distributions import Normal
        >>> from pyro_anneal.eim import SNIS
        >>> extended = SNIS(Normal(0.0, 1.0), lambda x: 0.5 * x**2, num_samples=4).extended()
        >>> extended.event_shape, extended.has_exact_log_prob
        (torch.Size([4]), True)
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    has_rsample = False
    has_exact_log_prob = True

    def __init__(self, sampler: SamplerInduced, validate_args: bool | None = None) -> None:
        if not has_exact_log_prob(sampler.proposal):
            raise NotImplementedError(
                f"{type(sampler).__name__}.extended() needs a proposal with an exact log_prob, got "
                f"{type(sampler.proposal).__name__}: write its extended() as a site of its own"
            )
        self.sampler = sampler
        super().__init__(
            sampler.batch_shape, sampler._extended_event_shape(), validate_args=validate_args
        )

    @property
    def support(self) -> constraints.Constraint:
        """Support of the stacked events, that of the value in each slot."""
        return constraints.independent(self.sampler.support, 1)

    def expand(self, batch_shape: Size | tuple[int, ...], _instance: Any = None) -> Extended:
        """Returns the distribution with its batch shape enlarged."""
        return Extended(self.sampler.expand(batch_shape), validate_args=self._validate_args)

    def sample(self, sample_shape: Size | tuple[int, ...] = Size()) -> Tensor:  # noqa: B008
        """Draws values with their auxiliary variables, ``[*sample, *batch, slots, *event]``."""
        with torch.no_grad():
            return self.sampler._extended_sample(Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Computes the joint log density in nats, exactly, shape ``[*sample, *batch]``."""
        if self._validate_args:
            self._validate_sample(value)
        slots_dim = value.dim() - len(self.event_shape)
        return self.sampler._extended_log_prob(value.movedim(slots_dim, 0))


def has_exact_log_prob(distribution: Distribution) -> bool:
    """Tells whether a distribution's ``log_prob`` is its log density, not an estimate of it.

    Looks through the wrappers of torch and Pyro (``to_event``, ``expand``, ``mask``, transforms,
    mixtures).

    Args:
        distribution: Any distribution; those that do not say otherwise are exact.

    Returns:
        ``False`` for the sampler-induced distributions and whatever wraps one.

    Example:
        >>> from pyro_anneal.eim import SNIS
        >>> snis = SNIS(dist.Normal(torch.zeros(3), 1.0), lambda x: x**2, num_samples=8)
        >>> has_exact_log_prob(snis.to_event(1)), has_exact_log_prob(snis.extended())
        (False, True)
    """
    own = getattr(distribution, "has_exact_log_prob", None)
    if own is not None:
        return bool(own)
    inner = ("base_dist", "_component_distribution", "component0", "component1")
    parts = [getattr(distribution, name, None) for name in inner]
    return all(has_exact_log_prob(part) for part in parts if isinstance(part, Distribution))


def check_count(name: str, value: int) -> None:
    """Raises unless a count is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def evaluate(function: Callable[[Tensor], Tensor], value: Tensor, event_dim: int) -> Tensor:
    """Evaluates an energy or log acceptance and checks the shape of its result.

    Args:
        function: The callable given by the user.
        value: Values, shape ``[*leading, *event]``.
        event_dim: Number of event dimensions.

    Returns:
        Result, shape ``[*leading]``; dimensions of size 1 may have grown where the callable
        depends on the batch.

    Raises:
        ValueError: If the result has another shape.
    """
    result = function(value)
    expected = value.shape[: value.dim() - event_dim]
    fits = result.dim() == len(expected) and all(
        have in (want, have if want == 1 else want)
        for have, want in zip(result.shape, expected, strict=True)
    )
    if not fits:
        name = getattr(function, "__name__", type(function).__name__)
        raise ValueError(
            f"{name} returned shape {list(result.shape)} for values of shape "
            f"{list(value.shape)} with {event_dim} event dimension(s): expected "
            f"{list(expected)}; a network that ends in one unit needs .squeeze(-1)"
        )
    return result


def _moved(part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(part, (Tensor, nn.Module)):
        return part.to(*args, **kwargs)
    if isinstance(part, (list, tuple)) and not isinstance(part, Size):
        return type(part)(_moved(item, args, kwargs) for item in part)
    if isinstance(part, (Distribution, Transform)):
        new = copy.copy(part)
        for key, item in vars(part).items():
            new.__dict__[key] = _moved(item, args, kwargs)
        return new
    return part
