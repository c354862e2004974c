r"""The edge to Pyro: a model and a base become log densities of one flat unconstrained vector.

For one chain at ``u`` of shape ``[*batch, D]`` each latent site is ``z = b(u)``, with ``b`` the
bijection onto its support, which may depend on latents sampled before it. All densities are with
respect to u:

.. math::
    \log p(x, u) = \log p(x, z) + \log |\partial z / \partial u|, \qquad
    \log q(u) = \log q(z) + \log |\partial z / \partial u|

A mask on a latent site (``poutine.mask`` or ``fn.mask``) is ignored on both sides: otherwise its
entries would have a flat, improper prior.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from . import autoguides
from .sites import (
    Layout,
    base_distribution,
    latent_sites,
    observed_sites,
    sum_to_batch,
    unmasked,
)

__all__ = [
    "Base",
    "GaussianBase",
    "GuideBase",
    "ModelDensity",
    "ModelEvaluation",
    "PathDensity",
    "PriorBase",
    "StandardNormalBase",
]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_FIXED_STRUCTURE = (
    "the model's sites depend on the values of its latents: {} appear in some runs only; use a "
    "model of fixed structure"
)


class _Substitute(Messenger):  # type: ignore[misc]
    """Puts constrained or unconstrained values at sample sites, and keeps both."""

    def __init__(
        self,
        *,
        unconstrained: Mapping[str, Tensor] | None = None,
        constrained: Mapping[str, Tensor] | None = None,
        record: frozenset[str] = frozenset(),
        loops: Mapping[str, list[int]] | None = None,
    ) -> None:
        super().__init__()
        self.given = unconstrained or {}
        self.values = dict(constrained or {})
        self.record = record  # sites whose unconstrained value is wanted, sampled if not given
        self.loops = loops or {}  # indices as numbers: a capture could not read them from a tensor
        self.unconstrained: dict[str, Tensor] = {}
        self.log_det: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            if msg["value"] is None and name in self.loops:
                msg["value"], msg["done"] = self.loops[name], True
            return
        if not msg["is_observed"]:
            msg["fn"], msg["mask"] = unmasked(msg["fn"]), None
        if name in self.given:
            value = self._transform(msg)
        elif name in self.values:
            value = self.values[name].expand(msg["fn"].batch_shape + msg["fn"].event_shape)
        else:
            return
        msg["value"] = value
        msg["done"] = True

    def _transform(self, msg: Any) -> Tensor:
        """Maps u to the site's support, as it is at this value of the latents before it."""
        name, fn = msg["name"], msg["fn"]
        u = self.given[name]
        transform = biject_to(fn.support)
        value: Tensor = transform(u)
        batch_shape = u.shape[: u.dim() - transform.domain.event_dim]
        if value.shape[: value.dim() - transform.codomain.event_dim] != batch_shape:
            raise ValueError(
                f'at site "{name}" the value has shape {list(value.shape)} for unconstrained '
                f"values of shape {list(u.shape)}: its support depends on an enumerated site; make "
                "the support the same for all values of that site"
            )
        log_det = transform.log_abs_det_jacobian(u, value)
        self.log_det[name] = sum_rightmost(log_det, log_det.dim() - value.dim() + fn.event_dim)
        self.values[name] = value
        return value

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.record and name not in self.given:
            self.values[name] = msg["value"]
            self.unconstrained[name] = biject_to(msg["fn"].support).inv(msg["value"])


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
        return torch.stack(list(self.log_det.values())).sum(0)


class ModelDensity:
    """The model's side: packs, unpacks and evaluates latents of one chain."""

    def __init__(self, model: Callable[..., Any], layout: Layout, arguments: Arguments) -> None:
        self.model = model
        self.layout = layout
        self.arguments = arguments
        self._dims = [plate.dim for plate in layout.batch]

    def _trace(self, substitute: _Substitute, *, enumerate_sites: bool) -> Any:
        model = self.model
        if enumerate_sites:
            model = poutine.enum(model, first_available_dim=-1 - self.layout.max_plate_nesting)
        args, kwargs = self.arguments
        with pyro.validation_enabled(False), poutine.block(), substitute:
            return poutine.trace(model).get_trace(*args, **kwargs)

    def evaluate(self, position: Tensor) -> ModelEvaluation:
        """Evaluates all densities at ``u`` of shape ``[*batch, D]``.

        Raises:
            ValueError: If a latent of the trace has no value in ``u``: it would be sampled anew at
                each call.
        """
        layout = self.layout
        unconstrained = layout.split(position)
        substitute = _Substitute(unconstrained=unconstrained, loops=layout.loops)
        trace = self._trace(substitute, enumerate_sites=bool(layout.enumerated))
        latents = latent_sites(trace)
        unknown = [n for n in latents if n not in unconstrained and n not in layout.enumerated]
        absent = [n for n in unconstrained if n not in latents]
        if unknown or absent:
            raise ValueError(_FIXED_STRUCTURE.format(unknown + absent))
        trace.compute_log_prob()
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
            log_prior = torch.stack(prior_terms).sum(0)
            log_joint = torch.stack(joint_terms).sum(0)
        return ModelEvaluation(unconstrained, substitute.values, log_det, log_prior, log_joint)

    def _sum(self, site: Mapping[str, Any], *, scaled: bool = True) -> Tensor:
        """Sums a site's log density to the batch."""
        return sum_to_batch(
            self._log_prob(site, scaled=scaled), self._dims, self.layout.batch_shape
        )

    def _log_prob(self, site: Mapping[str, Any], *, scaled: bool) -> Tensor:
        scale = site["scale"] if scaled and self._has_own_scale(site) else 1.0
        value: Tensor = dist.util.scale_and_mask(site["unscaled_log_prob"], scale, site["mask"])
        return value

    def _has_own_scale(self, site: Mapping[str, Any]) -> bool:
        """Tells whether a scale acts inside the weight; a common one is taken outside."""
        scale = site["scale"]
        return self.layout.scale == 1.0 and (isinstance(scale, Tensor) or scale != 1.0)

    def _contract(self, trace: Any) -> tuple[Tensor, Tensor]:
        """Sums out enumerated sites, keeping the batch plates."""
        trace.symbolize_dims()
        sum_dims: set[str] = set()
        for name in self.layout.enumerated:
            infer = trace.nodes[name]["infer"]
            sum_dims.add(infer["_dim_to_symbol"][infer["_enumerate_dim"]])
        latents = latent_sites(trace)
        prior: dict[frozenset[str], list[Tensor]] = {}
        joint: dict[frozenset[str], list[Tensor]] = {}
        for name, site in [*latents.items(), *observed_sites(trace).items()]:
            ordinal = frozenset(
                trace.plate_to_symbol[f.name] for f in site["cond_indep_stack"] if f.vectorized
            )
            term = self._packed(name, site, sum_dims, scaled=True)
            joint.setdefault(ordinal, []).append(term)
            if name in latents:
                term = self._packed(name, site, sum_dims, scaled=False)
                prior.setdefault(ordinal, []).append(term)
        return self._contract_terms(trace, prior, sum_dims), self._contract_terms(
            trace, joint, sum_dims
        )

    def _packed(
        self, name: str, site: Mapping[str, Any], sum_dims: set[str], *, scaled: bool
    ) -> Tensor:
        value = self._log_prob(site, scaled=scaled)
        term: Tensor = packed.pack(value, site["infer"]["_dim_to_symbol"])
        if self._has_own_scale(site) and sum_dims & set(term._pyro_dims):  # type: ignore[attr-defined]
            raise NotImplementedError(
                f'site "{name}" depends on an enumerated site and has its own poutine.scale: a '
                "power of a sum is no sum; scale all sites or none"
            )
        return term

    def _contract_terms(
        self, trace: Any, terms: dict[frozenset[str], list[Tensor]], sum_dims: set[str]
    ) -> Tensor:
        symbol = trace.plate_to_symbol
        batch = {symbol[plate.name]: plate.dim for plate in self.layout.batch}
        contracted = contract_to_tensor(
            OrderedDict(terms), sum_dims, target_ordinal=frozenset(batch)
        )
        value = packed.unpack(contracted, batch)
        return sum_to_batch(value, self._dims, self.layout.batch_shape)

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Packs values of the model's sites into ``u`` of shape ``[*batch, D]``."""
        layout = self.layout
        if layout.is_static:
            unconstrained = {
                site.name: site.transform.inv(values[site.name].expand(site.value_shape))
                for site in layout.sites
            }
        else:
            names = frozenset(site.name for site in layout.sites)
            substitute = _Substitute(constrained=values, record=names)
            self._trace(substitute, enumerate_sites=False)
            unconstrained = substitute.unconstrained
        return self._join(unconstrained)

    def _join(self, unconstrained: Mapping[str, Tensor]) -> Tensor:
        missing = [site.name for site in self.layout.sites if site.name not in unconstrained]
        if missing:
            raise ValueError(_FIXED_STRUCTURE.format(missing))
        return self.layout.join(unconstrained)

    def draw_prior(self) -> Tensor:
        """Draws ``u`` of shape ``[*batch, D]`` from the model's prior."""
        names = frozenset(site.name for site in self.layout.sites)
        substitute = _Substitute(record=names)
        self._trace(substitute, enumerate_sites=False)
        return self._join(substitute.unconstrained)

    def unpack(self, position: Tensor) -> dict[str, Tensor]:
        """Computes the sites' values in the model's own space at ``u``, by site."""
        unconstrained = self.layout.split(position)
        if self.layout.is_static:
            return {s.name: s.transform(unconstrained[s.name]) for s in self.layout.sites}
        substitute = _Substitute(unconstrained=unconstrained)
        self._trace(substitute, enumerate_sites=False)
        return {site.name: substitute.values[site.name] for site in self.layout.sites}


class Base(Protocol):
    """A normalized density to start from."""

    def draw(self) -> Tensor:
        """Draws ``u`` of shape ``[*batch, D]`` for one chain."""
        ...

    def log_prob(self, evaluation: ModelEvaluation, position: Tensor) -> Tensor:
        """Computes log q(u), shape ``[*batch]``."""
        ...


class PriorBase:
    """Starts from the model's prior, enumerated sites summed out."""

    def __init__(self, model: ModelDensity) -> None:
        self.model = model

    def draw(self) -> Tensor:
        """Draws from the prior."""
        return self.model.draw_prior()

    def log_prob(self, evaluation: ModelEvaluation, position: Tensor) -> Tensor:
        """Computes the log prior density of u."""
        return evaluation.log_prior + evaluation.total_log_det


class GuideBase:
    """Starts from a Pyro guide: hand-written, an AutoGuide, or a list of both."""

    def __init__(
        self, guide: Callable[..., Any], model: ModelDensity, arguments: Arguments
    ) -> None:
        self.guide = guide
        self.model = model
        self.arguments = arguments
        layout = model.layout
        self._dims = [plate.guide_dim for plate in layout.batch]
        derived = autoguides.derived_sites(guide) if autoguides.is_autoguide(guide) else set()
        self._direct = [site.name for site in layout.sites if site.name not in derived]
        if derived and not layout.is_static:
            raise ValueError(
                f"{type(guide).__name__} freezes the supports of one prototype run, but a support "
                'of this model depends on another latent; use guide="auto", guide=None or a '
                "hand-written guide"
            )
        trace = self._trace(None)
        known = {*self._direct, *derived, *self._auxiliary(trace)}
        unknown = [name for name in latent_sites(trace) if name not in known]
        if unknown:
            raise ValueError(
                f"the guide samples auxiliary sites {unknown}, which its density would have to "
                'integrate out; use a guide without them, or guide="auto"'
            )
        for name in self._direct:
            if isinstance(base_distribution(trace.nodes[name]["fn"]), dist.Delta):
                raise ValueError(
                    f'at site "{name}" the guide is a Delta: a point mass has no density to anneal '
                    'from; use guide="auto" or a guide with a density'
                )
        self._check_supports()

    def _auxiliary(self, trace: Any) -> set[str]:
        """Collects the sites on which an AutoGuide is conditioned."""
        if not autoguides.is_autoguide(self.guide):
            return set()
        return set(
            autoguides.auxiliary_values(
                self.guide, autoguides.unconstrained_values(self.guide, trace)
            )
        )

    def _check_supports(self, num_points: int = 32) -> None:
        """Checks that hand-written parts of the guide cover the model's support."""
        layout = self.model.layout
        shape = (*layout.batch_shape, layout.dim)
        with torch.no_grad():
            for _ in range(num_points if self._direct else 0):
                position = torch.randn(shape, dtype=layout.dtype, device=layout.device)
                values = self.model.unpack(position)
                given = {name: values[name] for name in self._direct}
                trace = self._trace(_Substitute(constrained=given))
                for name in self._direct:
                    fn = trace.nodes[name]["fn"]
                    if not bool(fn.support.check(values[name]).all()):
                        raise ValueError(
                            f'at site "{name}" the guide ({type(base_distribution(fn)).__name__}, '
                            f"support {fn.support}) has no density at values that the model "
                            "allows: no chain could reach them; use a guide with the model's "
                            "support"
                        )

    def _trace(self, substitute: Messenger | None) -> Any:
        args, kwargs = self.arguments
        with pyro.validation_enabled(False), poutine.block(), substitute or Messenger():
            return poutine.trace(self.guide).get_trace(*args, **kwargs)

    def draw(self) -> Tensor:
        """Draws from the guide."""
        trace = self._trace(None)
        if not self._direct:
            return self.model.layout.join(autoguides.unconstrained_values(self.guide, trace))
        names = [site.name for site in self.model.layout.sites]
        return self.model.pack({name: trace.nodes[name]["value"] for name in names})

    def log_prob(self, evaluation: ModelEvaluation, position: Tensor) -> Tensor:
        """Computes the log density of the guide at u."""
        given = {name: evaluation.values[name] for name in self._direct}
        if autoguides.is_autoguide(self.guide):
            given |= autoguides.auxiliary_values(self.guide, evaluation.unconstrained)
        trace = self._trace(_Substitute(constrained=given))
        shape = self.model.layout.batch_shape
        result: Tensor = torch.zeros(shape, dtype=position.dtype, device=position.device)
        for name in given:
            site = trace.nodes[name]
            log_prob = site["fn"].log_prob(site["value"])
            result = result + sum_to_batch(log_prob, self._dims, shape)
            if name in evaluation.log_det:
                result = result + evaluation.log_det[name]
        return result


class StandardNormalBase:
    """Starts from a standard normal in unconstrained space, whatever the prior."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def draw(self) -> Tensor:
        """Draws from the standard normal."""
        layout = self.layout
        shape = (*layout.batch_shape, layout.dim)
        return torch.randn(shape, dtype=layout.dtype, device=layout.device)

    def log_prob(self, evaluation: ModelEvaluation, position: Tensor) -> Tensor:
        """Computes the standard normal's log density at u."""
        normalizer = -0.5 * position.shape[-1] * math.log(2.0 * math.pi)
        return normalizer - 0.5 * position.square().sum(-1)


class GaussianBase:
    """Starts from a Gaussian in unconstrained space, one per batch element."""

    def __init__(self, loc: Tensor, scale_tril: Tensor) -> None:
        self.loc = loc  # [*batch, D]
        self.scale_tril = scale_tril  # [*batch, D, D]
        identity = torch.eye(loc.shape[-1], dtype=loc.dtype, device=loc.device)
        self.whiten = torch.linalg.solve_triangular(
            scale_tril, identity.expand_as(scale_tril), upper=False
        )
        log_scale = scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        self.log_normalizer = -0.5 * loc.shape[-1] * math.log(2.0 * math.pi) - log_scale

    def draw(self) -> Tensor:
        """Draws from the Gaussian."""
        noise = torch.randn_like(self.loc)
        return self.loc + (self.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)

    def log_prob(self, evaluation: ModelEvaluation, position: Tensor) -> Tensor:
        """Computes the Gaussian's log density at u."""
        white = (self.whiten @ (position - self.loc).unsqueeze(-1)).squeeze(-1)
        log_prob: Tensor = self.log_normalizer - 0.5 * white.square().sum(-1)
        return log_prob


class PathDensity:
    """Both ends of the path for one chain: ``u`` to ``(log q(u), log p(x, u))``."""

    def __init__(self, model: ModelDensity, base: Base) -> None:
        self.model = model
        self.base = base

    def __call__(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluates ``u`` of shape ``[*batch, D]`` to two tensors of shape ``[*batch]``."""
        with pyro.validation_enabled(False):
            evaluation = self.model.evaluate(position)
            log_base = self.base.log_prob(evaluation, position)
        return log_base, evaluation.log_joint + evaluation.total_log_det
