"""A guide as the base of a path: its density in the coordinates of the model's latents."""

from __future__ import annotations

from collections.abc import Iterator

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ..models import autoguides
from ..models.checks import explained
from ..models.coordinates import bijection
from ..models.density import Arguments, ModelDensity, ModelEvaluation, Substitute
from ..models.discrete import DiscreteMap, IndexByTensor, discrete_map, is_discrete
from ..models.edges import exact_log_prob, has_closed_form, same_kind
from ..models.enumeration import sum_out
from ..models.lifting import own_extension
from ..models.mass import check_normalized
from ..models.precision import in_float64
from ..models.sites import base_distribution, latent_sites, sum_to_batch, unmasked
from ..models.supports import (
    Circle,
    Image,
    is_mistaken_by_pyro,
    leaf_constraint,
    normalized_support,
)
from ..models.types import Fn, Node, Trace
from ..models.validation import validation_disabled

__all__ = ["GuideBase"]


class GuideBase:
    """Starts from a Pyro guide: hand-written, an AutoGuide, or a list of both."""

    def __init__(self, guide: Fn, model: ModelDensity, arguments: Arguments) -> None:
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
        with explained():
            trace = self._trace(None)
        known = {*self._direct, *derived, *self._auxiliary(trace)}
        self._summed = [
            name
            for name, site in latent_sites(trace).items()
            if name in layout.enumerated and getattr(site["fn"], "has_enumerate_support", False)
        ]
        known.update(self._summed)
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
        for name in self._direct:
            check_normalized(f'site "{name}" of the guide', trace.nodes[name]["fn"])
        # Sites with mass at an edge, in the same coordinate as the model's
        self._exact = frozenset(
            site.name
            for site in layout.sites
            if site.name in self._direct
            and has_closed_form(trace.nodes[site.name]["fn"])
            and same_kind(bijection(trace.nodes[site.name]["fn"]), site.transform)
        )
        self._tabled = {
            site.name: site
            for site in layout.sites
            if isinstance(site.transform, DiscreteMap)
            and (site.name in layout.lifted or site.transform.kind == "index")
        }
        self._check_angles(trace)
        self._check_supports()

    def is_exact(self, name: str) -> bool:
        """Tells whether the guide's density of a site is known in u itself, also at edges."""
        return name in self._exact

    def _check_angles(self, trace: Trace) -> None:
        """Refuses guides on the reals for sites that live on a period, or on an image."""
        for site in self.model.layout.sites:
            if site.name not in self._direct and is_mistaken_by_pyro(site.support):
                raise ValueError(
                    f'at site "{site.name}" {type(self.guide).__name__} takes the declared support '
                    "for real, but the density is normalized on a smaller set only (one period, or "
                    'the image of a bounded base): use guide="auto", guide=None, or write the guide '
                    "by hand with the model's family"
                )
            if site.name in self._direct and isinstance(leaf_constraint(site.support), Circle):
                fn = trace.nodes[site.name]["fn"]
                if not isinstance(leaf_constraint(normalized_support(fn)), Circle):
                    raise ValueError(
                        f'at site "{site.name}" the model has an angle, one period around the '
                        f"circle, and the guide a {type(base_distribution(fn)).__name__}, which is "
                        "normalized on another set: use VonMises in the guide, or "
                        'guide="auto"'
                    )

    def _auxiliary(self, trace: Trace) -> set[str]:
        """Collects the sites on which an AutoGuide is conditioned."""
        if not autoguides.is_autoguide(self.guide):
            return set()
        return set(
            autoguides.auxiliary_values(
                self.guide, autoguides.unconstrained_values(self.guide, trace)
            )
        )

    def _check_supports(self) -> None:
        """Checks that hand-written parts of the guide have density all over the model's support.

        The two supports are compared at values up to the ends of the model's: unconstrained values
        of growing size, as far as they are told apart from the edge in this precision.
        """
        if not self._direct:
            return
        layout = self.model.layout
        integers = {
            site.name: site.transform
            for site in layout.sites
            if isinstance(site.transform, DiscreteMap) and site.transform.kind == "integer"
        }
        with torch.no_grad():
            for position in self._far_positions():
                values = self.model.unpack(position)
                again = self.model.pack(values)
                reached = (again - position).abs() <= 1e-3 * (1.0 + position.abs())
                told_apart = self.model.layout.split(reached.to(position.dtype))
                trace = self._trace(self._at({n: values[n] for n in self._direct}))
                for name in self._direct:
                    fn = trace.nodes[name]["fn"]
                    if is_discrete(fn) and name in integers:
                        wide = self._covers(integers[name], discrete_map(name, fn))
                        covered = wide or not layout.is_static
                    else:
                        inside = normalized_support(fn).check(values[name])
                        covered = bool(inside.all()) or not bool((told_apart[name] > 0).all())
                    if not covered:
                        raise ValueError(
                            f'at site "{name}" the guide ({type(base_distribution(fn)).__name__}, '
                            f"support {fn.support}) has no density at values that the model "
                            "allows: no chain could reach them, and the number would be the "
                            "evidence of a truncated prior; use a guide with the model's support"
                        )

    @staticmethod
    def _covers(model: DiscreteMap, guide: DiscreteMap) -> bool:
        """Tells whether the guide's integers reach as far as the model's."""
        low, high = guide.lower <= model.lower, guide.upper >= model.upper
        return bool((low & high).all())

    def _far_positions(self) -> Iterator[Tensor]:
        """Makes unconstrained positions near the origin and far from it, in several directions."""
        layout = self.model.layout
        shape = (*layout.batch_shape, layout.dim)
        for size in (1.0, 1.0, 1.0, 1.0, 3.0, 6.0, 12.0, 25.0, 60.0, 1e3, 1e6):
            noise = torch.randn(shape, dtype=layout.dtype, device=layout.device)
            if size == 1.0:
                yield noise
            else:
                yield size * noise.sign()
                yield -size * noise.sign()

    @staticmethod
    def _at(values: dict[str, Tensor]) -> Substitute:
        return Substitute(constrained=values, ignore_masks=True)

    def _trace(self, substitute: Messenger | None, *, enumerate_sites: bool = False) -> Trace:
        args, kwargs = self.arguments
        guide = self.guide
        if enumerate_sites:  # whether the guide marks them or not: the model sums them out
            marks: dict[str, object] = {"enumerate": "parallel"}
            guide = poutine.infer_config(
                guide, lambda site: marks if site["name"] in self._summed else {}
            )
            guide = poutine.enum(
                guide, first_available_dim=-1 - self.model.layout.max_plate_nesting
            )
        with validation_disabled(), poutine.block(), substitute or Messenger(), IndexByTensor():
            return poutine.trace(guide).get_trace(*args, **kwargs)

    def _log_prob(self, site: Node, evaluation: ModelEvaluation) -> Tensor:
        """Computes the log density of one site, in closed form of u where values may be rounded."""
        name, fn = site["name"], unmasked(site["fn"])
        exact = None
        if name in self._exact:
            exact = exact_log_prob(fn, evaluation.unconstrained[name])
        log_prob: Tensor = fn.log_prob(site["value"]) if exact is None else exact
        return log_prob

    def _sum_out(
        self, trace: Trace, evaluation: ModelEvaluation, zero: Tensor
    ) -> tuple[Tensor, list[str]]:
        """Sums the guide's density over the sites that the model enumerates, too."""
        found = sum_out(
            trace,
            latent_sites(trace).items(),
            self._summed,
            lambda site: self._log_prob(site, evaluation),
        )
        terms = [sum_to_batch(term, self._dims, zero.shape) for term in found.terms]
        return torch.stack([zero, *terms]).sum(0), list(found.plain)

    def draw(self) -> Tensor:
        """Draws from the guide."""
        with in_float64(self.model.layout.wide):
            return self._draw()

    def _draw(self) -> Tensor:
        substitute = Substitute(record=self._exact, ignore_masks=True)
        trace = self._trace(substitute)
        if not self._direct:
            return self.model.layout.join(autoguides.unconstrained_values(self.guide, trace))
        names = [site.name for site in self.model.layout.sites]
        values = {name: trace.nodes[name]["value"] for name in names}
        for name in self._direct:
            if name not in self._exact:
                values[name] = self._inside(name, values)
        return self.model.pack(values, substitute.unconstrained)

    def _inside(self, name: str, values: dict[str, Tensor]) -> Tensor:
        """Returns NaN in place of draws outside of the model's support, which the bijection clamps.

        Such a chain has no weight, and the others keep theirs: the guide is wider than the model.
        An upper bound is then too high by minus the log of the guide's mass inside.
        """
        value, support = values[name], self.model.support(name, values)
        leaf = leaf_constraint(support)
        if not isinstance(leaf, constraints.interval | constraints.half_open_interval | Image):
            return value
        inside = support.check(value)
        extra = value.dim() - inside.dim()
        return torch.where(inside.reshape(inside.shape + (1,) * extra), value, torch.nan)

    def log_prob(self, evaluation: ModelEvaluation, position: Tensor) -> Tensor:
        """Computes the log density of the guide at u."""
        given = {name: evaluation.values[name] for name in self._direct}
        if autoguides.is_autoguide(self.guide):
            given |= autoguides.auxiliary_values(self.guide, evaluation.unconstrained)
        trace = self._trace(self._at(given), enumerate_sites=bool(self._summed))
        shape = self.model.layout.batch_shape
        result: Tensor = torch.zeros(shape, dtype=position.dtype, device=position.device)
        plain = list(given)
        if self._summed:
            result, plain = self._sum_out(trace, evaluation, result)
            for name in given:
                if name not in plain and name in evaluation.log_det:
                    result = result + evaluation.log_det[name]
        for name in plain:
            site = trace.nodes[name]
            log_prob = self._log_prob(site, evaluation)
            if name in self._tabled:  # the value has no gradient
                u = evaluation.unconstrained[name]
                extension = own_extension(self._tabled[name], u, site["fn"])
                log_prob = log_prob + (extension - extension.detach())
            result = result + sum_to_batch(log_prob, self._dims, shape)
            if name in evaluation.log_det:
                result = result + evaluation.log_det[name]
        return result
