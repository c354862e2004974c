r"""Discrete latents as coordinates of u: integers that a relaxed density may be differentiated at.

A number (Bernoulli, counts) is its own coordinate. A category is a one-hot vector: where the model
takes an index, it gets the index. Whatever real number a coordinate holds, the model is evaluated
at the nearest integer, so only integers ever enter a weight; its gradient is that of
the density relaxed to real numbers, with values beyond reason cut off. Base and target are then
densities with respect to counting measure on these coordinates, and no Jacobian enters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import one_hot
from torch.overrides import TorchFunctionMode

from .sites import base_distribution
from .types import Distribution, Support

__all__ = ["DiscreteMap", "IndexByTensor", "discrete_map", "is_discrete", "support_edges"]

# Gradients guide proposals only: beyond this many nats per unit they say no more.
_LARGEST_GRADIENT = 1e4
_INTERVAL = type(constraints.integer_interval(0, 1))
_AT_LEAST = type(constraints.nonnegative_integer)


class _Bounded(torch.autograd.Function):
    """The identity, whose gradient is finite."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        """Copies the value."""
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Cuts the gradient off; NaN says nothing."""
        return grads[0].nan_to_num(0.0).clamp(-_LARGEST_GRADIENT, _LARGEST_GRADIENT)


class IndexByTensor(TorchFunctionMode):
    """Lets a single latent index pick a row without becoming a Python number.

    ``table[z]`` with a ``z`` without dimensions asks for its value, which no recording allows;
    ``index_select`` gives the same row.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs one function."""
        if func is Tensor.__getitem__ and isinstance(args[0], Tensor):
            key = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(_is_single(part) for part in key):
                return _select(args[0], key)
        return func(*args, **(kwargs or {}))


# What a tensor may be indexed by.
Index = Tensor | int | slice | list[int] | EllipsisType | None


def _is_single(key: object) -> TypeGuard[Tensor]:
    return (
        isinstance(key, Tensor)
        and key.dim() == 0
        and key.dtype in (torch.long, torch.int, torch.short)
    )


def _select(value: Tensor, key: tuple[Index, ...]) -> Tensor:
    """Indexes with single integer tensors among numbers, slices, None and an ellipsis."""
    if any(isinstance(part, Tensor | list) and not _is_single(part) for part in key):
        return value[key]
    value = value[tuple(slice(None) if _is_single(part) else part for part in key)]
    dim, found = 0, []
    places = [number for number, part in enumerate(key) if part is Ellipsis]
    after = key[places[0] + 1 :] if places else ()
    for part in key:
        if part is Ellipsis:
            dim = value.dim() - sum(not isinstance(later, int) for later in after)
        elif _is_single(part):
            found.append((dim, part))
            dim += 1
        elif not isinstance(part, int):
            dim += 1
    for dim, part in reversed(found):
        index = torch.where(part < 0, part + value.shape[dim], part)
        value = value.index_select(dim, index.reshape(1).long()).squeeze(dim)
    return value


@dataclass(frozen=True, eq=False)
class DiscreteMap:
    """What stands for a bijection at a discrete site: from coordinates of u to the site's value.

    Attributes:
        kind: ``"binary"`` and ``"integer"`` for numbers, ``"one-hot"`` for vectors, ``"index"``
            for categories that the model knows by number and u as one-hot vectors.
        lower: Least value, of the site's shape; of an index, the number of its first category.
        upper: Greatest value, may be infinite.
        dtype: Of the site's value.
    """

    kind: Literal["binary", "one-hot", "index", "integer"]
    lower: Tensor
    upper: Tensor
    size: int
    dtype: torch.dtype

    @property
    def domain(self) -> Support:
        """Constraint on u, whose ``event_dim`` counts."""
        return constraints.real_vector if self._is_vector else constraints.real

    @property
    def codomain(self) -> Support:
        """Constraint on the value, likewise."""
        return constraints.real_vector if self.kind == "one-hot" else constraints.real

    @property
    def _is_vector(self) -> bool:
        return self.kind in ("one-hot", "index")

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """Returns the shape of u for values of ``shape``."""
        return torch.Size([*shape, self.size]) if self.kind == "index" else torch.Size(shape)

    def __call__(self, u: Tensor) -> Tensor:
        """Maps coordinates to the site's value."""
        u = _Bounded.apply(u)  # type: ignore[no-untyped-call]
        if not self._is_vector:
            # An integer beyond its bounds keeps its value, which has no density.
            nearest = u.round().clamp(0.0, 1.0) if self.kind == "binary" else u.round()
            value: Tensor = u + (nearest - u).detach()
            return value.to(self.dtype)
        index = u.detach().nan_to_num().argmax(-1)
        if self.kind == "index":
            return index.to(self.dtype) + self.lower.to(self.dtype)
        hot = (index.unsqueeze(-1) == torch.arange(self.size, device=u.device)).to(u.dtype)
        value = u + (hot - u).detach()
        return value.to(self.dtype)

    def inv(self, value: Tensor) -> Tensor:
        """Maps a value to coordinates, of a floating-point type."""
        kind = value.dtype if value.is_floating_point() else torch.get_default_dtype()
        if self.kind != "index":
            return value.to(kind)
        index = (value - self.lower.to(value)).long()
        return one_hot(index, self.size).to(torch.get_default_dtype())

    def log_abs_det_jacobian(self, u: Tensor, value: Tensor) -> Tensor:
        """Returns zeros; NaN where u is none, so that dead chains stay dead."""
        zero = 0.0 * u.detach()
        return zero.sum(-1) if self._is_vector else zero


def is_discrete(fn: Distribution) -> bool:
    """Tells whether a distribution's support is discrete."""
    try:
        return bool(fn.support.is_discrete)
    except NotImplementedError:
        return False


def _plain(support: Support) -> Support:
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def discrete_map(name: str, fn: Distribution) -> DiscreteMap:
    """Chooses the coordinates of a discrete latent site.

    Args:
        name: The site's name, for errors.
        fn: Its distribution.

    Returns:
        The map from coordinates to values.

    Raises:
        ValueError: If no kernel moves values of its support, as vectors of counts of one total.
    """
    base, support = base_distribution(fn), _plain(fn.support)
    example = next(iter(_parameters(base)), torch.zeros(()))
    floating = example.dtype if example.is_floating_point() else torch.get_default_dtype()
    shape = fn.batch_shape + fn.event_shape

    def whole(value: Tensor | float) -> Tensor:
        tensor = torch.as_tensor(value, device=example.device).detach()
        return tensor.to(floating).expand(shape)

    if isinstance(base, torch.distributions.Categorical):
        size = int(base._num_events)
        return DiscreteMap("index", whole(0), whole(size - 1), size, torch.long)
    if support is constraints.one_hot:
        return DiscreteMap("one-hot", whole(0), whole(1), int(shape[-1]), floating)
    if support is constraints.boolean:
        return DiscreteMap("binary", whole(0), whole(1), 1, floating)
    if isinstance(support, _INTERVAL):
        bounds = whole(support.lower_bound), whole(support.upper_bound)
        return DiscreteMap("integer", *bounds, 1, floating)
    if isinstance(support, _AT_LEAST):
        return DiscreteMap("integer", whole(support.lower_bound), whole(math.inf), 1, floating)
    raise ValueError(
        f'latent site "{name}" is discrete ({type(base).__name__}) with the support {fn.support}, '
        "which no kernel moves: express it by Bernoulli, Categorical, OneHotCategorical or counts; "
        "or bound the evidence by importance sampling with a guide, "
        "losses.IWAE(num_particles=1000).loss"
    )


def _parameters(base: Distribution) -> list[Tensor]:
    names = getattr(base, "arg_constraints", {})
    found = (base.__dict__.get(name) for name in names)
    return [value for value in found if isinstance(value, Tensor)]


def support_edges(name: str, fn: Distribution) -> Tensor:
    """Returns numbers that tell one discrete support of a site from another."""
    found = discrete_map(name, fn)
    return torch.cat([found.lower.reshape(-1), found.upper.reshape(-1)])
