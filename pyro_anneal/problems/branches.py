r"""Branches: the components of mixtures inside a model, each of which may be a phase of its own.

A needle beside a broad slab is found from no draw and by no gradient of

.. math:: \log p(x, z) = \log \sum_k \exp a_k(z)

since from the slab the needle's share vanishes. But where a model says so itself, by a
``logsumexp`` or ``logaddexp`` whose result is one number, each :math:`a_k` is at hand, and its own
optimum is where that phase stands. They are starting points of fits and nothing else: the fits are
made, and weighed, under the model. Mixtures over single data (one sum per datum) are left alone, and
so are enumerated sites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..models.density import ModelDensity
from ..models.validation import validation_disabled
from .gaussian import follow_newton
from .rows import Rows

__all__ = ["branch_optima"]

_MOST_BRANCHES = 64
# Rows of one Newton step beyond which it costs more than it may find.
_MOST_ROWS = 30_000


class _Branch(TorchFunctionMode):
    """Takes one term of every sum of exponentials that gives one number, and counts the terms.

    The first branch takes the first term of each; every other branch takes one other term of one
    of them.
    """

    def __init__(self, branch: Tensor) -> None:
        super().__init__()
        self.branch = branch
        self.count = 1

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        terms: Tensor | None = None
        if func in (torch.logaddexp, Tensor.logaddexp) and not kwargs:
            terms = torch.stack(torch.broadcast_tensors(*args))
        elif func in (torch.logsumexp, Tensor.logsumexp):
            terms = _terms(*args, **kwargs)
        result = func(*args, **kwargs)
        if terms is None or result.numel() != 1 or len(terms) < 2:
            return result
        own = self.branch - self.count + 1
        self.count += len(terms) - 1
        own = torch.where((own > 0) & (own < len(terms)), own, 0)
        taken = torch.arange(len(terms), device=terms.device) == own
        return torch.where(taken.view(-1, *[1] * result.dim()), terms, 0.0).sum(0)


def _terms(input: Tensor, dim: Any = None, keepdim: bool = False, **other: Any) -> Tensor | None:
    """Puts the terms of a ``logsumexp`` first; None where it sums over several dimensions."""
    if isinstance(dim, tuple | list) and len(dim) == 1:
        (dim,) = dim
    if not isinstance(dim, int) or other or not input.dim():
        return None
    terms = input.movedim(dim, 0)
    return terms.unsqueeze(dim if dim < 0 else dim + 1) if keepdim else terms


class _BranchRows(Rows):
    """Evaluates, at positions ``[*lead, S, D]``, branch s of the model at the s-th of them."""

    def __init__(self, model: ModelDensity, count: int) -> None:
        super().__init__(_no_density, 128, 0)
        self.branches = torch.arange(count, device=model.layout.device)

        def value(position: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
            with validation_disabled(), _Branch(branch):
                found = model.evaluate(position)
            log_joint = found.log_joint + found.total_log_det
            return log_joint.sum(), log_joint.sum().detach()

        self.function = torch.func.vmap(torch.func.grad(value, has_aux=True))

    def __call__(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluates log density ``[*lead, S]`` and its gradient ``[*lead, S, D]``."""
        flat = position.reshape(-1, position.shape[-1])
        branches = self.branches.repeat(len(flat) // len(self.branches))
        grad, value = self.function(flat, branches)
        self.count += len(flat)
        value = torch.where(value.isnan(), -torch.inf, value)
        grad = torch.where(grad.isfinite(), grad, 0.0)
        return value.detach().reshape(position.shape[:-1]), grad.detach().reshape(position.shape)


def _no_density(position: Tensor) -> Any:
    raise NotImplementedError("branches are evaluated through the model")


def branch_optima(
    model: ModelDensity, origin: Tensor, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Finds the optimum of each branch of a model.

    Args:
        model: The model, without batch.
        origin: Where to start, ``[D]``.
        generator: Source of noise.

    Returns:
        Optima ``[S, D]``, those that are finite, none where the model has one branch or cannot be
        evaluated at several positions at once; and the gradients spent.
    """
    nothing = origin.new_empty(0, len(origin)), 0
    counter = _Branch(torch.zeros((), dtype=torch.int64, device=origin.device))
    try:
        with torch.no_grad(), validation_disabled(), counter:
            model.evaluate(origin)
        count = counter.count
        if not 2 <= count <= _MOST_BRANCHES or 4 * count * len(origin) > _MOST_ROWS:
            return nothing
        rows = _BranchRows(model, count)
        start = origin.expand(count, len(origin)).contiguous()
        found = follow_newton(rows, start, generator, num_steps=12, patience=3)
    except Exception:  # noqa: BLE001 - whatever vmap does not know; branches are a bonus
        return nothing
    places = found.loc[found.loc.isfinite().all(-1) & found.elbo.isfinite()]
    return places, rows.count
