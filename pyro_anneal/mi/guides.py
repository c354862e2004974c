"""Variational conditionals q(z|x), from a distribution factory or a Pyro guide, behind one interface.

A guide is any callable of x: one that returns a distribution of batch shape ``[N]``, or a Pyro
guide with the model's latent sites inside a plate of size N. With roles swapped (joint samples
only) the same code reads q(x|z): the letters z and x below then change places.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ..models.packing import Packing
from ..models.sites import is_deterministic
from ..models.types import Fn, Trace
from .bijections import Bijection, FixedBijection
from .joints import Joint
from .pyro_joint import PyroJoint
from .sites import sample_sites, site_bijection

__all__ = ["Conditional", "Prior", "condition_on"]


class Conditional(ABC):
    """The distribution q(. | x) for the N rows of one x."""

    @abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """Computes log q(z|x) of ``z [(K,) N, *z_event]`` in nats, shape ``[(K,) N]``."""

    @abstractmethod
    def sample(self, num_particles: int) -> tuple[Tensor, Tensor]:
        """Draws K values per row, and computes log q of them: ``[K, N, *z_event]``, ``[K, N]``.

        Values are reparameterized where gradients are on.

        Raises:
            NotImplementedError: If gradients of q are wanted and it cannot be reparameterized.
        """

    @abstractmethod
    def bijection(self) -> Bijection:
        """Maps the support of q to unconstrained vectors."""


class _FromDistribution(Conditional):
    def __init__(self, q: Any, num_rows: int) -> None:
        if q.batch_shape != (num_rows,):
            raise ValueError(
                f"the guide returned a distribution of batch shape {list(q.batch_shape)}, expected "
                f"[N={num_rows}], one row per datum; use .to_event() for the dimensions of z"
            )
        self.q = q

    def log_prob(self, z: Tensor) -> Tensor:
        value = self.q.log_prob(z)
        expected = z.shape[: z.dim() - len(self.q.event_shape)]
        if value.shape != expected:
            raise ValueError(
                f"log q(z|x) has shape {list(value.shape)}, expected {list(expected)} for z of "
                f"shape {list(z.shape)} and events of shape {list(self.q.event_shape)}"
            )
        return value  # type: ignore[no-any-return]

    def sample(self, num_particles: int) -> tuple[Tensor, Tensor]:
        if self.q.has_rsample:
            z = self.q.rsample((num_particles,))
            return z, self.q.log_prob(z)
        z = self.q.sample((num_particles,))
        log_q = self.q.log_prob(z)
        _refuse_score_function(log_q, "the guide's distribution")
        return z, log_q

    def bijection(self) -> Bijection:
        return FixedBijection([(self.q, self.q.event_shape)])


class _FromTrace(Conditional):
    def __init__(self, guide: Fn, x: Tensor, trace: Trace, joint: Any) -> None:
        self.guide = guide
        self.x = x
        sites = _guide_sites(trace)
        names = joint.layouts(x)[1].names if isinstance(joint, PyroJoint) else list(sites)
        if set(names) != set(sites):
            raise ValueError(
                f"guide and model disagree on latent sites: the model has {names}, the guide has "
                f"{list(sites)}"
            )
        frames = [f for s in sites.values() for f in s["cond_indep_stack"] if f.vectorized]
        self.nesting = max((-f.dim for f in frames), default=0)
        for name, site in sites.items():
            outer = [
                f for f in site["cond_indep_stack"] if f.vectorized and -f.dim == self.nesting
            ]
            if not outer or outer[0].size != x.shape[0]:
                raise ValueError(
                    f'at guide site "{name}": expected a plate of size {x.shape[0]} (the rows of '
                    'x), left of all others; use pyro.plate("data", len(x))'
                )
        tails = {name: sites[name]["value"].shape[1:] for name in names}
        self.layout = Packing(tails, self.nesting - 1)

    def _run(self, num_particles: int | None, data: dict[str, Tensor]) -> tuple[Any, Tensor]:
        trace = self._trace(num_particles, data)
        lead = 1 if num_particles is None else 2
        total: Any = 0.0
        for name in self.layout.names:
            site = trace.nodes[name]
            log_prob = site["fn"].log_prob(site["value"])
            total = total + log_prob.reshape((*log_prob.shape[:lead], -1)).sum(dim=-1)
        return trace, total

    def _trace(self, num_particles: int | None, data: dict[str, Tensor]) -> Trace:
        guide = poutine.condition(self.guide, data=data)
        if num_particles is not None:
            guide = pyro.plate("_particles", num_particles, dim=-1 - self.nesting)(guide)
        return poutine.trace(guide).get_trace(self.x)

    def bijection(self) -> Bijection:
        return site_bijection(lambda count: self._trace(count, {}), self.layout)

    def log_prob(self, z: Tensor) -> Tensor:
        num_particles = z.shape[0] if self.layout.num_leading(z) == 2 else None
        return self._run(num_particles, self.layout.unpack(z))[1]

    def sample(self, num_particles: int) -> tuple[Tensor, Tensor]:
        trace, log_q = self._run(num_particles, {})
        for name in self.layout.names:
            if not trace.nodes[name]["fn"].has_rsample:
                _refuse_score_function(log_q, f'guide site "{name}"')
        values = {name: trace.nodes[name]["value"] for name in self.layout.names}
        return self.layout.pack(values, 2), log_q


class Prior(Conditional):
    """The prior p(z) of a joint in place of a guide, whatever x is: q(z | x) = p(z)."""

    def __init__(self, joint: Joint, x: Tensor) -> None:
        self.joint = joint
        self.x = x

    def log_prob(self, z: Tensor) -> Tensor:
        """Computes log p(z)."""
        return self.joint.log_prior(z, self.x)

    def sample(self, num_particles: int) -> tuple[Tensor, Tensor]:
        """Draws K values per row, and computes log p of them."""
        with torch.no_grad():
            z = self.joint.sample_prior(num_particles, self.x)
        return z, self.log_prob(z)

    def bijection(self) -> Bijection:
        """Maps the support of the prior to unconstrained vectors."""
        return self.joint.bijection(self.x)


def _guide_sites(trace: Trace) -> dict[str, Any]:
    sites = sample_sites(trace)
    return {n: s for n, s in sites.items() if not is_deterministic(s)}


def _refuse_score_function(log_q: Tensor, where: str) -> None:
    if log_q.requires_grad:
        raise NotImplementedError(
            f"{where} cannot be reparameterized, so the gradient through its samples would be "
            "missing; train the guide with BarberAgakov, then freeze it (requires_grad_(False)) "
            "and train the critic"
        )


def condition_on(guide: Fn, x: Tensor, joint: Any = None) -> Conditional:
    """Reads q(. | x) from a guide, whichever form it has.

    Args:
        guide: Callable of x: returns a distribution of batch shape ``[N]``, or is a Pyro guide.
        x: Data, shape ``[N, *x_event]``.
        joint: The joint whose latent sites a Pyro guide must match, if there is one.

    Returns:
        The conditional.

    Raises:
        ValueError: If the guide returns no distribution and has no sample sites, or its sites or
            shapes disagree with the model.

    Example:
        >>> q = condition_on(lambda x: dist.Normal(x, 1.0), torch.zeros(3))
        >>> q.log_prob(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """
    with poutine.trace() as tracer:
        result = guide(x)
    if isinstance(result, torch.distributions.Distribution):
        return _FromDistribution(result, x.shape[0])
    if _guide_sites(tracer.trace):
        return _FromTrace(guide, x, tracer.trace, joint)
    raise ValueError(
        "the guide must return a distribution of batch shape [N] or have Pyro sample sites; it "
        f"returned {type(result).__name__} and has no sample site"
    )
