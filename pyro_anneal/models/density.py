"""The model's side of the path: latents of one chain, packed, unpacked and evaluated.

Each latent site is ``z = b(u)``, with ``b`` the bijection onto its support, which may depend on
latents sampled before it. A mask of some entries of a latent site (``poutine.mask`` or ``fn.mask``)
is ignored: otherwise these would have a flat, improper prior. A constant mask False means just that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .coordinates import bijection
from .discrete import IndexByTensor
from .edges import bend, draw_unconstrained, exact_log_det, exact_log_prob
from .enumeration import Summed, sum_out
from .lifting import lifted_densities, shared_factor
from .masked import fill_masked
from .precision import in_float64
from .sites import (
    Layout,
    base_distribution,
    is_flat,
    latent_sites,
    mark_points,
    observed_sites,
    sum_to_batch,
    unmasked,
)
from .supports import normalized_support
from .types import Arguments, Fn, Message, Node, Support, Trace
from .validation import validation_disabled

__all__ = ["Arguments", "ModelDensity", "ModelEvaluation", "Substitute"]

Result = TypeVar("Result")

_FIXED_STRUCTURE = (
    "the model's sites depend on the values of its latents: {} appear in some runs only; use a "
    "model of fixed structure"
)


class Substitute(Messenger):  # type: ignore[misc]
    """Puts constrained or unconstrained values at sample sites, and keeps both."""

    def __init__(
        self,
        *,
        unconstrained: Mapping[str, Tensor] | None = None,
        constrained: Mapping[str, Tensor] | None = None,
        record: frozenset[str] = frozenset(),
        loops: Mapping[str, list[int]] | None = None,
        noncentred: frozenset[str] = frozenset(),
        ignore_masks: bool = False,
        exact: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.exact = exact or {}  # unconstrained values that are known better than by their values
        self.ignore_masks = ignore_masks  # of guides, which are densities whatever masks say
        self.given = unconstrained or {}
        self.values = dict(constrained or {})
        self.record = record  # sites whose unconstrained value is wanted, sampled if not given
        self.noncentred = noncentred  # sites whose coordinate leaves location and scale out
        self.loops = loops or {}  # indices as numbers: a capture could not read them from a tensor
        self.unconstrained: dict[str, Tensor] = {}
        self.log_det: dict[str, Tensor] = {}
        self.log_prob: dict[str, Tensor] = {}  # where it is known in u, exact at edges

    def _pyro_sample(self, msg: Message) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            if msg["value"] is None and name in self.loops:
                msg["value"], msg["done"] = self.loops[name], True
            return
        if not msg["is_observed"]:
            flat, fn = is_flat(msg) and not self.ignore_masks, unmasked(msg["fn"])
            msg["fn"], msg["mask"] = fn.mask(False) if flat else fn, None
        if name in self.given:
            value = self._transform(msg)
        elif name in self.values:
            value = self.values[name].expand(msg["fn"].batch_shape + msg["fn"].event_shape)
        elif name in self.record:
            u = draw_unconstrained(msg["fn"])
            if u is None:
                return
            value = self.values[name] = bijection(msg["fn"])(u)
            self.unconstrained[name] = self._unbent(msg, u)
        else:
            return
        msg["value"] = value
        msg["done"] = True

    def _transform(self, msg: Message) -> Tensor:
        """Maps u to the site's support, as it is at this value of the latents before it."""
        name, fn = msg["name"], msg["fn"]
        u = self.given[name]
        bent = bend(fn) if name in self.noncentred else None
        before = u
        u = u if bent is None else bent(u)
        transform = bijection(fn, noncentred=name in self.noncentred and bent is None)
        value: Tensor = transform(u)
        batch_shape = u.shape[: u.dim() - transform.domain.event_dim]
        if value.shape[: value.dim() - transform.codomain.event_dim] != batch_shape:
            raise ValueError(
                f'at site "{name}" the value has shape {list(value.shape)} for unconstrained '
                f"values of shape {list(u.shape)}: its support depends on an enumerated site; make "
                "the support the same for all values of that site"
            )
        log_det = exact_log_det(transform, u, value)
        if bent is not None:
            slope = bent.log_abs_det_jacobian(before, u)
            log_det = log_det + sum_rightmost(slope, slope.dim() - log_det.dim())
        self.log_det[name] = sum_rightmost(log_det, log_det.dim() - value.dim() + fn.event_dim)
        self.values[name] = value
        log_prob = None if is_flat(msg) else exact_log_prob(fn, u)
        if log_prob is not None:
            self.log_prob[name] = log_prob
        return value

    def _unbent(self, msg: Message, u: Tensor) -> Tensor:
        bent = bend(msg["fn"]) if msg["name"] in self.noncentred else None
        return u if bent is None else bent.inv(u)

    def _pyro_post_sample(self, msg: Message) -> None:
        name = msg["name"]
        if name in self.exact and name in self.record:
            self.unconstrained[name] = self._unbent(msg, self.exact[name])
        elif name in self.record and name not in self.given and name not in self.unconstrained:
            self.values[name] = msg["value"]
            transform = bijection(msg["fn"], noncentred=name in self.noncentred)
            self.unconstrained[name] = transform.inv(msg["value"])


@dataclass(frozen=True, eq=False)
class ModelEvaluation:
    """One chain's model, evaluated at ``u``."""

    unconstrained: dict[str, Tensor]  # by site
    values: dict[str, Tensor]  # by site, in the model's own space
    log_det: dict[str, Tensor]  # log |dz/du| by site, [*batch]
    log_prior: Tensor  # log p(z), enumerated sites summed out, [*batch]
    log_joint: Tensor  # log p(x, z), likewise, [*batch]

    @property
    def total_log_det(self) -> Tensor:
        """Log determinant of all sites, shape ``[*batch]``."""
        terms = list(self.log_det.values())
        return torch.stack(terms).sum(0) if terms else torch.zeros_like(self.log_joint)


def _in_precision(method: Callable[..., Result]) -> Callable[..., Result]:
    """Makes a method of the model's side compute in the precision of its layout."""

    @functools.wraps(method)
    def run(self: ModelDensity, *args: object, **kwargs: object) -> Result:
        with in_float64(self.layout.wide):
            return method(self, *args, **kwargs)

    return run


class ModelDensity:
    """The model's side: packs, unpacks and evaluates latents of one chain."""

    def __init__(self, model: Fn, layout: Layout, arguments: Arguments) -> None:
        self.model = model
        self.layout = layout
        self.arguments = arguments
        self._dims = [plate.dim for plate in layout.batch]

    def _trace(self, substitute: Substitute, *, enumerate_sites: bool) -> Trace:
        model = self.model
        if enumerate_sites:
            model = poutine.enum(model, first_available_dim=-1 - self.layout.max_plate_nesting)
        args, kwargs = self.arguments
        with validation_disabled(), poutine.block(), substitute, IndexByTensor():
            trace = poutine.trace(model).get_trace(*args, **kwargs)
        mark_points(trace)
        return trace

    @_in_precision
    def evaluate(self, position: Tensor) -> ModelEvaluation:
        """Evaluates all densities at ``u`` of shape ``[*batch, D]``.

        Raises:
            ValueError: If a latent of the trace has no value in ``u``: it would be sampled anew at
                each call.
        """
        layout = self.layout
        unconstrained = layout.split(position)
        fixed = {name: unconstrained[name].detach() for name in layout.lifted}
        substitute = Substitute(
            unconstrained=unconstrained | fixed, loops=layout.loops, noncentred=layout.noncentred
        )
        trace = self._trace(substitute, enumerate_sites=bool(layout.enumerated))
        latents = latent_sites(trace)
        unknown = [n for n in latents if n not in unconstrained and n not in layout.enumerated]
        absent = [n for n in unconstrained if n not in latents]
        if unknown or absent:
            raise ValueError(_FIXED_STRUCTURE.format(unknown + absent))
        fill_masked(trace)
        trace.compute_log_prob()
        for name, log_prob in substitute.log_prob.items():
            trace.nodes[name]["unscaled_log_prob"] = log_prob
        shape = layout.batch_shape
        log_det = {
            name: sum_to_batch(value, self._dims, shape)
            for name, value in substitute.log_det.items()
        }
        if layout.enumerated:
            log_prior, log_joint = self._contract(trace)
        else:
            prior_terms = [self._sum(s, scaled=False) for s in latents.values()]
            joint_terms = [self._sum(s) for s in latents.values()]
            joint_terms += [self._sum(s) for s in observed_sites(trace).values()]
            log_joint = torch.stack(joint_terms).sum(0)
            log_prior = (
                torch.stack(prior_terms).sum(0) if prior_terms else torch.zeros_like(log_joint)
            )
        if layout.lifted:
            lifted = self.lift(unconstrained, substitute.values, layout.lifted)
            log_prior = log_prior + (lifted[0] - lifted[0].detach())
            log_joint = log_joint + (lifted[1] - lifted[1].detach())
        return ModelEvaluation(unconstrained, substitute.values, log_det, log_prior, log_joint)

    def lift(
        self,
        unconstrained: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        names: Sequence[str],
    ) -> tuple[Tensor, Tensor]:
        """Computes the extensions of log prior and log joint density that differences come from."""

        def log_prob(site: Node, scaled: bool) -> Tensor:
            return self._log_prob(site, scaled=scaled)

        return lifted_densities(self._run, self.layout, values, unconstrained, log_prob, names)

    def shared_factor(self, values: Mapping[str, Tensor]) -> str | None:
        """Names a site whose density depends on two of the lifted sites, at any values of them."""
        return shared_factor(self._run, self.layout, values, self.layout.lifted)

    def _run(self, wrap: Callable[[Fn], Fn], given: Mapping[str, Tensor]) -> Trace:
        """Traces the model, wrapped by a function, with given values."""
        args, kwargs = self.arguments
        substitute = Substitute(constrained=given)
        with validation_disabled(), poutine.block(), substitute, IndexByTensor():
            return poutine.trace(wrap(self.model)).get_trace(*args, **kwargs)

    def _sum(self, site: Node, *, scaled: bool = True) -> Tensor:
        """Sums a site's log density to the batch."""
        return sum_to_batch(
            self._log_prob(site, scaled=scaled), self._dims, self.layout.batch_shape
        )

    def _log_prob(self, site: Node, *, scaled: bool) -> Tensor:
        scale = site["scale"] if scaled and self._has_own_scale(site) else 1.0
        log_prob = site["unscaled_log_prob"]
        if site["name"] in self.layout.guarded:
            inside = site["fn"].support.check(site["value"])
            log_prob = torch.where(inside, log_prob, -torch.inf)
        value: Tensor = dist.util.scale_and_mask(log_prob, scale, site["mask"])
        return value

    def _has_own_scale(self, site: Node) -> bool:
        """Tells whether a scale acts inside the weight; a common one is taken outside."""
        scale = site["scale"]
        return self.layout.scale == 1.0 and (isinstance(scale, Tensor) or scale != 1.0)

    def _contract(self, trace: Trace) -> tuple[Tensor, Tensor]:
        """Sums out enumerated sites, keeping the batch plates."""
        latents = latent_sites(trace)
        every = {**latents, **observed_sites(trace)}
        found = self._summed(trace, every)
        for name in found.summed:
            if self._has_own_scale(every[name]):
                raise NotImplementedError(
                    f'site "{name}" depends on an enumerated site and has its own poutine.scale: a '
                    "power of a sum is no sum; scale all sites or none"
                )
        log_joint = self._product(found, every, scaled=True)
        over = [name for name in found.summed if name in latents]
        if all(self._sums_to_one(latents[name]) for name in over):
            # nothing in the prior sees an enumerated site but such sites, whose sum is one
            found = Summed([], (), tuple(name for name in found.plain if name in latents))
        else:
            found = self._summed(trace, latents, as_drawn=True)
        return self._product(found, latents, scaled=False, like=log_joint), log_joint

    def _sums_to_one(self, site: Node) -> bool:
        """Tells whether an enumerated site is a distribution over all that is summed."""
        family = base_distribution(site["fn"])
        known = type(family).__module__.startswith(("pyro.distributions", "torch.distributions"))
        plain = site["mask"] is None and not is_flat(site)
        return site["name"] in self.layout.enumerated and known and plain

    def _summed(
        self, trace: Trace, sites: Mapping[str, Node], *, as_drawn: bool = False
    ) -> Summed:
        """Multiplies the densities of some sites, enumerated ones summed out of them.

        Args:
            trace: A run of the model.
            sites: The sites.
            as_drawn: Whether an enumerated site with a flat prior has the density that it is drawn
                from, as at a start, which is normalized.
        """
        enumerated = self.layout.enumerated

        def log_prob(site: Node) -> Tensor:
            if as_drawn and site["name"] in enumerated and is_flat(site):
                drawn: Tensor = unmasked(site["fn"]).log_prob(site["value"])
                return drawn
            return self._log_prob(site, scaled=False)

        return sum_out(trace, sites.items(), enumerated, log_prob)

    def _product(
        self,
        found: Summed,
        sites: Mapping[str, Node],
        *,
        scaled: bool,
        like: Tensor | None = None,
    ) -> Tensor:
        """Adds up what sums left and the other sites, to the batch."""
        shape = self.layout.batch_shape
        terms = [sum_to_batch(term, self._dims, shape) for term in found.terms]
        terms += [self._sum(sites[name], scaled=scaled) for name in found.plain]
        if not terms and like is not None:
            return torch.zeros_like(like)
        return torch.stack(terms).sum(0)

    @_in_precision
    def pack(
        self, values: Mapping[str, Tensor], exact: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Packs values of the model's sites into ``u`` of shape ``[*batch, D]``.

        Args:
            values: Values by site.
            exact: Unconstrained values of those sites whose values may have been rounded.
        """
        layout = self.layout
        if layout.is_static:
            unconstrained = {
                site.name: site.transform.inv(values[site.name].expand(site.value_shape))
                for site in layout.sites
            } | dict(exact or {})
        else:
            names = frozenset(site.name for site in layout.sites)
            substitute = Substitute(
                constrained=values, record=names, noncentred=layout.noncentred, exact=exact
            )
            self._trace(substitute, enumerate_sites=False)
            unconstrained = substitute.unconstrained
        return self._join(unconstrained)

    def support(self, name: str, values: Mapping[str, Tensor]) -> Support:
        """Finds the support of a site at values of the latents."""
        if self.layout.is_static:
            return next(site.support for site in self.layout.sites if site.name == name)
        trace = self._trace(Substitute(constrained=values), enumerate_sites=False)
        return normalized_support(unmasked(trace.nodes[name]["fn"]))

    def _join(self, unconstrained: Mapping[str, Tensor]) -> Tensor:
        missing = [site.name for site in self.layout.sites if site.name not in unconstrained]
        if missing:
            raise ValueError(_FIXED_STRUCTURE.format(missing))
        return self.layout.join(unconstrained)

    @_in_precision
    def draw_prior(self) -> Tensor:
        """Draws ``u`` of shape ``[*batch, D]`` from the model's prior."""
        names = frozenset(site.name for site in self.layout.sites)
        substitute = Substitute(record=names, noncentred=self.layout.noncentred)
        self._trace(substitute, enumerate_sites=False)
        return self._join(substitute.unconstrained)

    @_in_precision
    def unpack(self, position: Tensor) -> dict[str, Tensor]:
        """Computes the sites' values in the model's own space at ``u``, by site."""
        unconstrained = self.layout.split(position)
        if self.layout.is_static:
            return {s.name: s.transform(unconstrained[s.name]) for s in self.layout.sites}
        substitute = Substitute(unconstrained=unconstrained, noncentred=self.layout.noncentred)
        self._trace(substitute, enumerate_sites=False)
        return {site.name: substitute.values[site.name] for site in self.layout.sites}
