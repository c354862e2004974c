r"""The edge to Pyro: a model and a base become log densities of one flat unconstrained vector.

For one chain at ``u`` of shape ``[*batch, D]`` each latent site is ``z = b(u)``, with ``b`` the
bijection onto its support, which may depend on latents sampled before it. All densities are with
respect to u:

.. math::
    \log p(x, u) = \log p(x, z) + \log |\partial z / \partial u|, \qquad
    \log q(u) = \log q(z) + \log |\partial z / \partial u|

A mask on a latent site is ignored on both sides: its entries integrate to one, whatever they are.
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
from torch import Tensor
from torch.distributions import biject_to

from . import autoguides
from .sites import Layout, base_distribution, latent_sites, observed_sites, sum_to_batch

__all__ = [
    "Base",
    "GaussianBase",
    "GuideBase",
    "ModelDensity",
    "ModelEvaluation",
    "PathDensity",
    "PriorBase",
]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Substitute(Messenger):  # type: ignore[misc]
    """Puts constrained or unconstrained values at sample sites, and keeps both."""

    def __init__(
        self,
        *,
        unconstrained: Mapping[str, Tensor] | None = None,
        constrained: Mapping[str, Tensor] | None = None,
        record: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        self.given = unconstrained or {}
        self.values = dict(constrained or {})
        self.record = record  # sites whose unconstrained value is wanted, sampled if not given
        self.unconstrained: dict[str, Tensor] = {}
        self.log_det: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.given:
            transform = biject_to(msg["fn"].support)
            u = self.given[name]
            value = transform(u)
            log_det = transform.log_abs_det_jacobian(u, value)
            extra = log_det.dim() - (value.dim() - msg["fn"].event_dim)
            self.log_det[name] = sum_rightmost(log_det, extra)
            self.values[name] = value
        elif name in self.values:
            value = self.values[name].expand(msg["fn"].batch_shape + msg["fn"].event_shape)
        else:
            return
        msg["value"] = value
        msg["done"] = True

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
        substitute = _Substitute(unconstrained=unconstrained)
        trace = self._trace(substitute, enumerate_sites=bool(layout.enumerated))
        latents = latent_sites(trace)
        unknown = [n for n in latents if n not in unconstrained and n not in layout.enumerated]
        absent = [n for n in unconstrained if n not in latents]
        if unknown or absent:
            raise ValueError(
                "the model's latent sites depend on their values: "
                f"{unknown + absent} appear in some runs only; use a model of fixed structure"
            )
        trace.compute_log_prob()
        shape = layout.batch_shape
        log_det = {
            name: sum_to_batch(value, self._dims, shape)
            for name, value in substitute.log_det.items()
        }
        if layout.enumerated:
            log_prior, log_joint = self._contract(trace)
        else:
            prior_terms = [self._sum(s, latent=True, prior=True) for s in latents.values()]
            joint_terms = [self._sum(s, latent=True) for s in latents.values()]
            joint_terms += [self._sum(s, latent=False) for s in observed_sites(trace).values()]
            log_prior = torch.stack(prior_terms).sum(0)
            log_joint = torch.stack(joint_terms).sum(0)
        return ModelEvaluation(unconstrained, substitute.values, log_det, log_prior, log_joint)

    def _sum(self, site: Mapping[str, Any], *, latent: bool, prior: bool = False) -> Tensor:
        """Sums a site's log density to the batch; masks act on observed sites only."""
        value = site["unscaled_log_prob"]
        if not latent and site["mask"] is not None:
            value = dist.util.scale_and_mask(value, mask=site["mask"])
        if not prior and self._has_own_scale(site):
            value = value * site["scale"]
        return sum_to_batch(value, self._dims, self.layout.batch_shape)

    def _has_own_scale(self, site: Mapping[str, Any]) -> bool:
        """Tells whether a scale acts inside the weight; a common one is taken outside."""
        scale = site["scale"]
        return self.layout.scale == 1.0 and (isinstance(scale, Tensor) or scale != 1.0)

    def _contract(self, trace: Any) -> tuple[Tensor, Tensor]:
        """Sums out enumerated sites, keeping the batch plates."""
        trace.pack_tensors()
        sum_dims: set[str] = set()
        for name in self.layout.enumerated:
            infer = trace.nodes[name]["infer"]
            sum_dims.add(infer["_dim_to_symbol"][infer["_enumerate_dim"]])
        symbol = trace.plate_to_symbol
        target = frozenset(symbol[plate.name] for plate in self.layout.batch)
        prior_terms: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
        joint_terms: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
        latents = latent_sites(trace)
        for name, site in [*latents.items(), *observed_sites(trace).items()]:
            ordinal = frozenset(symbol[f.name] for f in site["cond_indep_stack"] if f.vectorized)
            term = site["packed"]["unscaled_log_prob"]
            if name not in latents and site["mask"] is not None:
                term = packed.scale_and_mask(term, mask=site["packed"]["mask"])
            if self._has_own_scale(site):
                if sum_dims & set(term._pyro_dims):
                    raise NotImplementedError(
                        f'site "{name}" depends on an enumerated site and has its own '
                        "poutine.scale: a power of a sum is no sum; scale all sites or none"
                    )
                scaled = packed.scale_and_mask(term, scale=site["scale"])
                joint_terms.setdefault(ordinal, []).append(scaled)
            else:
                joint_terms.setdefault(ordinal, []).append(term)
            if name in latents:
                prior_terms.setdefault(ordinal, []).append(term)
        symbols = {symbol[p.name]: p.dim for p in self.layout.batch}
        results = []
        for terms in (prior_terms, joint_terms):
            contracted = contract_to_tensor(terms, sum_dims, target_ordinal=target)
            results.append(
                sum_to_batch(
                    packed.unpack(contracted, symbols), self._dims, self.layout.batch_shape
                )
            )
        return results[0], results[1]

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
        return layout.join(unconstrained)

    def draw_prior(self) -> Tensor:
        """Draws ``u`` of shape ``[*batch, D]`` from the model's prior."""
        names = frozenset(site.name for site in self.layout.sites)
        substitute = _Substitute(record=names)
        self._trace(substitute, enumerate_sites=False)
        return self.layout.join(substitute.unconstrained)

    def unpack(self, position: Tensor) -> dict[str, Tensor]:
        """Computes the sites' values in the model's own space at ``u``, by site."""
        unconstrained = self.layout.split(position)
        if self.layout.is_static:
            return {s.name: s.transform(unconstrained[s.name]) for s in self.layout.sites}
        substitute = _Substitute(unconstrained=unconstrained)
        self._trace(substitute, enumerate_sites=False)
        return substitute.values


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
        autoguides.check_guide(guide)
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
        for site in layout.sites:
            name = site.name
            shape = trace.nodes[name]["value"].shape
            if shape != site.value_shape:
                raise ValueError(
                    f'at site "{name}" the guide draws shape {list(shape)}, the model expects '
                    f"{list(site.value_shape)}; give the guide the model's plates and event shape"
                )
        for name in self._direct:
            if isinstance(base_distribution(trace.nodes[name]["fn"]), dist.Delta):
                raise ValueError(
                    f'at site "{name}" the guide is a Delta: a point mass has no density to anneal '
                    'from; use guide="auto" or a guide with a density'
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
