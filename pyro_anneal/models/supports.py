"""Where a site's density is normalized, and the bijection that reaches it.

A declared support is only a claim. Angles are declared real although their densities are periodic;
a :class:`~torch.distributions.TransformedDistribution` declares the codomain of its last transform
whatever its base covers. On such a set the density does not integrate to one, and every bound would
be wrong without a sign of it. Here the support is worked out: one period for the circular families,
the image of the base's support under the transforms, the components' support for mixtures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions import transforms as T
from torch import Tensor
from torch import distributions as families
from torch.distributions import Transform, TransformedDistribution, biject_to

from .charts import CircleTransform, PositiveDefiniteTransform, SphereTransform
from .sites import base_distribution
from .types import Distribution, Support

__all__ = [
    "Circle",
    "Image",
    "Sphere",
    "bijection_onto",
    "can_be_sampled",
    "is_improper",
    "is_mistaken_by_pyro",
    "leaf_constraint",
    "normalized_support",
]

_CIRCULAR = (families.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)
# Families whose own ``support`` is right, or that a chain through their base describes better.
_PUSHED = (dist.AffineBeta,)
_ONE_TO_ONE = (dist.transforms.SimplexToOrderedTransform,)  # which its class does not declare
_POSITIVE = (type(constraints.positive), type(constraints.nonnegative))


class Circle(constraints.Constraint):  # type: ignore[misc]
    """Angles in [-pi, pi), cut opposite to ``centre``."""

    def __init__(self, centre: Tensor) -> None:
        self.centre = centre
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Tells which values lie in the period."""
        return (value >= -torch.pi - 1e-5) & (value <= torch.pi + 1e-5)


class Sphere(constraints.Constraint):  # type: ignore[misc]
    """Unit vectors; ``centre`` is one of them, or None."""

    event_dim = 1

    def __init__(self, centre: Tensor | None, dim: int) -> None:
        self.centre = centre
        self.dim = dim
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Tells which vectors have length one."""
        inside: Tensor = constraints.sphere.check(value)
        return inside


class Image(constraints.Constraint):  # type: ignore[misc]
    """The image of a set under transforms."""

    def __init__(self, base: Support, transforms: tuple[Transform, ...], event_dim: int) -> None:
        self.base = base
        self.transforms = transforms
        self._event_dim = event_dim
        super().__init__()

    @property
    def event_dim(self) -> int:
        """Number of dimensions of one value."""
        return self._event_dim

    def check(self, value: Tensor) -> Tensor:
        """Tells which values are images of values in the base's set."""
        base, inside = value, None
        for transform in reversed(self.transforms):
            inside = transform.codomain.check(base)
            outside = torch.full_like(base, torch.nan)
            extra = base.dim() - inside.dim()
            base = torch.where(inside.reshape(inside.shape + (1,) * extra), base, outside)
            base = transform.inv(base)
        found: Tensor = self.base.check(base) & base.isfinite().reshape(
            (*base.shape[: base.dim() - self.base.event_dim], -1)
        ).all(-1)
        rest = value.dim() - self._event_dim
        return found if found.dim() <= rest else found.reshape(*found.shape[:rest], -1).all(-1)

    def __repr__(self) -> str:
        names = [type(transform).__name__ for transform in self.transforms]
        return f"image of {self.base} under {names}"


def leaf_constraint(constraint: Support) -> Support:
    """Removes ``constraints.independent``."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


def normalized_support(fn: Distribution) -> Support:
    """Works out the set on which a distribution's density is normalized.

    Args:
        fn: A continuous distribution.

    Returns:
        A constraint for values of shape ``[..., *event_shape]``.

    Raises:
        NotImplementedError: If the distribution declares no support.
        ValueError: If there is no density: a transform is not one to one, or the supports of a
            mixture's components differ.

    Example:
        >>> shifted = dist.TransformedDistribution(
        ...     dist.Exponential(1.0), [dist.transforms.AffineTransform(2.0, 1.0)]
        ... )
        >>> shifted.support  # what it declares
        Real()
        >>> normalized_support(shifted).check(torch.tensor([1.0, 3.0]))
        tensor([False,  True])
    """
    base = base_distribution(fn)
    support = _base_support(base)
    own = len(base.event_shape)
    if support.event_dim < own and isinstance(leaf_constraint(support), Circle | Image):
        support = constraints.independent(support, own - support.event_dim)
    extra = len(fn.event_shape) - own  # of to_event
    return constraints.independent(support, extra) if extra > 0 else support


def _base_support(fn: Distribution) -> Support:
    if isinstance(fn, _CIRCULAR):
        return Circle(_centre(fn))
    if isinstance(fn, dist.ProjectedNormal | dist.VonMises3D):
        return Sphere(fn.concentration, fn.event_shape[0])
    if isinstance(fn, families.MixtureSameFamily):
        return _mixture_support(fn)
    if type(fn).__name__ == "GeneralizedPareto":  # not in every version of torch
        return _pareto_support(fn)
    if isinstance(fn, TransformedDistribution) and _is_pushed(fn):
        return _pushed(fn)
    support: Support = fn.support
    if isinstance(leaf_constraint(support), type(constraints.sphere)):
        return Sphere(None, fn.event_shape[0])
    return support


def _pareto_support(fn: Distribution) -> Support:
    """Tells bounded tails from unbounded ones; the declared interval has an infinite end."""
    bounded = fn.concentration < 0
    support: Support = fn.support
    if bool(bounded.all()):
        return support
    if bool(bounded.any()):
        raise ValueError(
            "some elements of GeneralizedPareto are bounded (negative concentration) and some are "
            "not; sample them as two sites"
        )
    half_line: Support = constraints.greater_than(fn.loc)
    return half_line


def _centre(fn: Distribution) -> Tensor:
    """Finds where the mass of a circular family is, so that the cut may lie opposite."""
    if isinstance(fn, dist.SineSkewed):
        return _centre(fn.base_dist)
    if isinstance(fn, dist.SineBivariateVonMises):
        return torch.stack([fn.phi_loc, fn.psi_loc], -1)
    if isinstance(fn, families.VonMises):
        return torch.as_tensor(fn.loc)
    return torch.zeros(())


def _is_pushed(fn: Distribution) -> bool:
    """Tells whether a class takes its support from its last transform alone."""
    generic = getattr(type(fn), "support", None) is TransformedDistribution.support
    return bool(fn.transforms) and (generic or isinstance(fn, _PUSHED))


def _pushed(fn: Distribution) -> Support:
    bent = [
        type(t).__name__ for t in fn.transforms if not (t.bijective or isinstance(t, _ONE_TO_ONE))
    ]
    if bent:
        raise ValueError(
            f"{bent[0]} is not one to one, or does not say so, and without that "
            "TransformedDistribution has no density; use FoldedDistribution, HalfNormal or HalfCauchy, "
            "or a transform that has an inverse (of your own: with bijective = True in its class)"
        )
    support, declared = normalized_support(fn.base_dist), fn.support
    if _fills(support, fn.transforms, len(fn.base_dist.event_shape)):
        return cast("Support", declared)
    return Image(support, tuple(fn.transforms), len(fn.event_shape))


def _fills(support: Support, transforms: Sequence[Transform], event_dim: int) -> bool:
    """Tells whether a set is all of each transform's domain in turn."""
    for transform in transforms:
        if not _equal_sets(leaf_constraint(support), leaf_constraint(transform.domain)):
            return False
        support = transform.codomain
    return True


def _equal_sets(first: Support, second: Support) -> bool:
    if isinstance(first, _POSITIVE) and isinstance(second, _POSITIVE):
        return True
    if isinstance(first, Circle | Sphere | Image) or type(first) is not type(second):
        return False
    if type(first) is type(constraints.real):
        return True
    pairs = [(vars(first).get(key), vars(second).get(key)) for key in vars(first)]
    plain = all(isinstance(a, int | float) and isinstance(b, int | float) for a, b in pairs)
    return plain and all(a == b for a, b in pairs)


def _mixture_support(fn: Distribution) -> Support:
    """Finds the common support of the components of a mixture."""
    component = fn.component_distribution
    support = normalized_support(component)
    leaf = leaf_constraint(support)
    if isinstance(leaf, Circle):
        plain: Support = Circle(torch.zeros(()))
    elif isinstance(leaf, Sphere):
        plain = Sphere(None, leaf.dim)
    elif isinstance(leaf, Image):
        if torch.Size(component.batch_shape).numel() > 1 and _has_parameters(leaf):
            raise ValueError(
                "the components of a MixtureSameFamily are shifted or scaled by transforms, so "
                "their supports may differ; sample the component as a site of its own and sum it "
                "out (config_enumerate)"
            )
        plain = leaf
    else:
        axis = -1 - (len(component.event_shape) - leaf.event_dim)
        plain = _common(leaf, axis, base_distribution(component))
    extra = len(fn.event_shape) - plain.event_dim
    return constraints.independent(plain, extra) if extra > 0 else plain


def _has_parameters(image: Image) -> bool:
    """Tells whether some transform has more than one number as a parameter."""
    return any(
        isinstance(value, Tensor) and value.numel() > 1
        for transform in image.transforms
        for value in vars(transform).values()
    )


def _common(leaf: Any, axis: int, component: Any) -> Any:
    """Takes the components' axis out of the bounds of an interval."""
    keys = [key for key, value in vars(leaf).items() if isinstance(value, Tensor)]
    if not keys:
        return leaf
    if not all(key in ("lower_bound", "upper_bound") for key in keys):
        return leaf
    bounds = dict(vars(leaf))
    for key in keys:
        value = bounds[key]
        if value.dim() < -axis:
            continue
        if isinstance(component, families.Uniform):  # has density zero outside of its own bounds
            bounds[key] = value.amin(axis) if key == "lower_bound" else value.amax(axis)
        elif bool((value == value.select(axis, 0).unsqueeze(axis)).all()):
            bounds[key] = value.select(axis, 0)
        else:
            raise ValueError(
                f"the components of a MixtureSameFamily have different supports ({key}); sample "
                "the component as a site of its own and sum it out (config_enumerate)"
            )
    return type(leaf)(*[bounds[key] for key in ("lower_bound", "upper_bound") if key in bounds])


def bijection_onto(constraint: Support) -> Transform:
    """Finds the bijection from unconstrained values onto a set.

    Args:
        constraint: What :func:`normalized_support` returned.

    Returns:
        A torch transform.

    Raises:
        NotImplementedError: If none is known.
    """
    if isinstance(constraint, constraints.independent):
        base = bijection_onto(constraint.base_constraint)
        return _independent(base, constraint.reinterpreted_batch_ndims)
    if isinstance(constraint, Circle):
        return CircleTransform(constraint.centre)
    if isinstance(constraint, Sphere):
        return SphereTransform(constraint.centre, constraint.dim)
    if isinstance(constraint, type(constraints.positive_definite)):
        return PositiveDefiniteTransform()
    if isinstance(constraint, Image):
        parts = [bijection_onto(constraint.base), *constraint.transforms]
        chain = T.ComposeTransform(parts)
        return _independent(chain, constraint.event_dim - chain.codomain.event_dim)
    found: Transform = biject_to(constraint)
    return found


def _independent(transform: Transform, extra: int) -> Transform:
    """Counts more of the last axes as one event."""
    if extra <= 0:
        return transform
    independent: Transform = T.IndependentTransform(transform, extra)
    return independent


def is_improper(fn: Distribution) -> bool:
    """Tells whether a distribution has no normalized density."""
    return isinstance(base_distribution(fn), dist.ImproperUniform)


def can_be_sampled(fn: Distribution) -> bool:
    """Tells whether a distribution has draws: VonMises3D, say, has a density alone."""
    kind = type(base_distribution(fn))
    plain = (
        kind.sample is torch.distributions.Distribution.sample
        or kind.sample is dist.TorchDistribution.sample
    )
    return not is_improper(fn) and not (
        plain and kind.rsample is torch.distributions.Distribution.rsample
    )


def is_mistaken_by_pyro(support: Support) -> bool:
    """Tells whether AutoGuides of Pyro place a site on a wider set than its own."""
    return isinstance(leaf_constraint(support), Circle | Image)
