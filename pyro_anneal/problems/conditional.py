r"""``guide="auto"`` beside discrete latents: a fit of the others, and the exact conditional of these.

Let u be the continuous coordinates and z discrete latents that are independent of each other given u
and the data: assignments of a mixture, indicators of zero inflation, a changepoint. The base is

.. math:: q(u, z) = q(u) \, p(z | u, x), \qquad p(z | u, x) = \frac{p(x, u, z)}{p(x, u)}

where q(u) is fitted to the marginal density p(x, u), z summed out of it by Pyro's enumeration. A
weight is then that of the marginal model, :math:`p(x, u) / q(u)`, whatever z is, and all along the
path z given u keeps its exact conditional distribution. Draws of z read that off one gradient of
the target, whose differences are exact (:mod:`~..models.lifting`).

Where the discrete latents meet in a factor, are counts, or are not to be summed out, there is no
such base, and chains start from the prior. Which of them meet is known from the shapes of Pyro's
tables; that sums over a plate, or branches, do not couple them besides is checked at draws of the
prior and of the start.

Source: Casella and Robert (1996), *Rao-Blackwellisation of sampling schemes*, for the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..chains.blockwise import Blockwise
from ..graphs.captured import capture
from ..graphs.evaluation import evaluate_or_nan
from ..graphs.purity import undisturbed
from ..graphs.recorded import RecordedDensity
from ..kernels.chromatic import conditional_log_prob, draw_conditional
from ..kernels.lattice import Lattice
from ..models.density import ModelDensity, ModelEvaluation
from ..models.discrete import DiscreteMap
from ..models.inspection import inspect_model
from ..models.lifting import marked_for_enumeration
from ..models.validation import validation_disabled
from .bases import FittedBase, PathDensity, PriorBase
from .discrete import lattice_of
from .fitted import FittedStart, Once, fit_start
from .over_chains import draw_chains

__all__ = ["ConditionalBase", "conditional_start"]

_NOTE = (
    "the start is fitted with {} summed out, and draws them from their exact conditional "
    "distribution given the other latents"
)
# Positions at which densities are compared, of the prior and of the start, and how far apart they may be, in nats.
_NUM_COMPARED, _NUM_DRAWN, _TOLERANCE = 3, 8, 1e-3


@dataclass(frozen=True, eq=False)
class _Marginal:
    """The model with its discrete latents summed out, and where its coordinates are in the whole."""

    model: ModelDensity
    places: Tensor  # of its coordinates among those of the whole, [D - n]

    def log_joint(self, position: Tensor) -> Tensor:
        """Computes log p(x, u) without the Jacobian, of a position of the whole, ``[*batch]``."""
        return self.model.evaluate(position[..., self.places]).log_joint


class ConditionalBase:
    r"""Starts from a fit of the continuous latents and the exact conditional of the discrete ones.

    Args:
        fitted: The base of the continuous coordinates.
        marginal: The model, discrete latents summed out.
        lattice: The discrete coordinates of the whole.
        density: Evaluates prior and target of the whole for any number of chains.
    """

    def __init__(
        self, fitted: FittedBase, marginal: _Marginal, lattice: Lattice, density: RecordedDensity
    ) -> None:
        self.fitted = fitted
        self.lattice = lattice
        self._marginal = marginal
        self._density = density

    def draw(self) -> Tensor:
        """Draws ``u`` of shape ``[*batch, D]``."""
        return self.draw_chains(1)[0]

    def draw_chains(self, num_chains: int) -> Tensor:
        """Draws positions of K chains at once, ``[K, *batch, D]``."""
        layout = self._marginal.model.layout
        inner = draw_chains(
            self.fitted.draw,
            num_chains,
            numbers=layout.batch_shape.numel() * layout.dim,
            device=layout.device,
            vouched={FittedBase.__name__},
            kind=FittedBase.__name__,
        ).to(layout.dtype)
        example = self._density.example
        with torch.no_grad():
            position = torch.zeros_like(example).expand(num_chains, *example.shape)
            # the conditional distribution is the same whatever the values that are left behind
            first = [_first(block.take(position), block.kind) for block in self.lattice.blocks]
            position = self.lattice.replace(position, first).index_copy(
                -1, self._marginal.places, inner
            )
            evaluated = Blockwise(self._density, self._density.num_chains)(position)
            grad, uniform = evaluated.grad_target, torch.rand_like(position)
            parts = [
                draw_conditional(block, block.take(grad), block.take(uniform))
                for block in self.lattice.blocks
            ]
            return self.lattice.replace(position, parts)

    def log_prob(self, evaluation: ModelEvaluation, position: Tensor) -> Tensor:
        """Computes log q(u) + log p(z | u, x), shape ``[*batch]``."""
        inner = self.fitted.log_density(position[..., self._marginal.places])
        return inner + (evaluation.log_joint - self._marginal.log_joint(position))


def _first(value: Tensor, kind: str) -> Tensor:
    """Sets variables to zero, or to their first category."""
    if kind == "binary":
        return torch.zeros_like(value)
    names = torch.arange(value.shape[-1], device=value.device)
    return (names == 0).to(value.dtype).expand_as(value)


def conditional_start(
    model: ModelDensity,
    example: Tensor,
    *,
    num_chains: int,
    seed: int,
    progress: Callable[[int], object] = lambda count: None,
    max_rows: int | None = None,
    once: Once = lambda compute, name="": compute(),
    native: bool = False,
    vouched: set[str] | None = None,
) -> FittedStart | None:
    """Fits the continuous latents, where the discrete ones are independent given these.

    Args:
        model: The model's side of the path, its discrete sites lifted
            (:func:`~.discrete.lift`).
        example: A finite position of all latents, ``[*batch, D]``.
        num_chains: As of :func:`~.fitted.fit_start`, like the options.
        seed: Likewise.
        progress: Likewise.
        max_rows: Likewise.
        once: Likewise.
        native: Likewise.
        vouched: Likewise.

    Returns:
        The start; None where discrete latents meet, cannot be summed out or are all there is, or
        where nothing could be fitted.
    """
    layout = model.layout
    lattice, marginal = lattice_of(layout), _marginal(model)
    if marginal is None or lattice is None or layout.improper:
        return None
    if model.shared_factor(model.evaluate(example).values) is not None:
        return None
    if not _are_independent(model, marginal, lattice, example):
        return None
    try:
        start = fit_start(
            marginal.model,
            example[..., marginal.places],
            num_chains=num_chains,
            seed=seed,
            progress=progress,
            max_rows=max_rows,
            once=once,
            native=native,
            vouched=vouched,
        )
    except ValueError:  # no density around the origin
        return None
    if not isinstance(start.base, FittedBase):
        return None
    count = len(marginal.model.layout.notes)
    notes = (*start.model.layout.notes[count:], _NOTE.format(list(layout.lifted)))
    layout = replace(layout, notes=(*layout.notes, *notes))
    model = ModelDensity(model.model, layout, model.arguments)
    density = capture(
        PathDensity(model, PriorBase(model)), example, num_chains=num_chains, native=native
    )
    base = ConditionalBase(start.base, replace(marginal, model=start.model), lattice, density)
    with undisturbed(layout.device):
        torch.manual_seed(seed)
        draws = base.draw_chains(num_chains)
        if not _are_independent_there(model, marginal, lattice, draws):
            return None
    return FittedStart(model, base, lambda: density, start.num_gradients, start.prior_weight)


def _marginal(model: ModelDensity) -> _Marginal | None:
    """Sums the discrete latents out; None where not all of them can be, or nothing is left."""
    layout = model.layout
    discrete = [s.name for s in layout.sites if isinstance(s.transform, DiscreteMap)]
    if set(discrete) != set(layout.lifted) or len(discrete) == len(layout.sites):
        return None
    marked, arguments = marked_for_enumeration(model.model, discrete), model.arguments
    plates = [plate.name for plate in layout.batch]
    try:
        inner = inspect_model(marked, None, arguments, arguments, batch_plates=plates)
    except ValueError:  # what enumeration does not allow
        return None
    rest = [site for site in layout.sites if site.name not in discrete]
    alike = [(s.name, s.stop - s.start) for s in inner.sites] == [
        (s.name, s.stop - s.start) for s in rest
    ]
    if not alike or inner.dtype != layout.dtype or inner.batch_shape != layout.batch_shape:
        return None
    inner = replace(inner, wide=layout.wide)
    places = [index for site in rest for index in range(site.start, site.stop)]
    device = layout.device
    return _Marginal(ModelDensity(marked, inner, arguments), torch.tensor(places, device=device))


def _are_independent(
    model: ModelDensity, marginal: _Marginal, lattice: Lattice, example: Tensor
) -> bool:
    """Tells whether one gradient holds all conditionals: whether their product is the whole's.

    Compared are the log densities of z given the others, as the model's over that of the marginal
    model, and as a product of the conditionals that the gradient at another z tells.
    """
    function = PathDensity(model, PriorBase(model))
    found = []
    with torch.no_grad(), validation_disabled():
        for _ in range(_NUM_COMPARED):
            here = model.draw_prior().to(model.layout.dtype)
            here = torch.where(here.isfinite(), here, example)
            found.append(_agrees(function, marginal, lattice, here))
    return False not in found and True in found


def _are_independent_there(
    model: ModelDensity, marginal: _Marginal, lattice: Lattice, draws: Tensor
) -> bool:
    """Tells the same of draws ``[K, *batch, D]`` of a start, where latents may meet that others do not.

    An example is a coupling that sets in beyond a threshold, which the prior seldom reaches.
    """
    function = PathDensity(model, PriorBase(model))
    with torch.no_grad(), validation_disabled():
        found = [_agrees(function, marginal, lattice, here) for here in draws[:_NUM_DRAWN]]
    return False not in found


def _agrees(
    function: PathDensity, marginal: _Marginal, lattice: Lattice, here: Tensor
) -> bool | None:
    """Compares two log densities of another z; None where the model has none there."""
    grad = evaluate_or_nan(function, here)[3]
    parts = [
        draw_conditional(block, block.take(grad), block.take(torch.rand_like(here)))
        for block in lattice.blocks
    ]
    there = lattice.replace(here, parts)
    try:
        inner = marginal.model.evaluate(there[..., marginal.places])
        whole = function.model.evaluate(there)
    except (ValueError, RuntimeError, IndexError, NotImplementedError):
        return False
    joint = whole.log_joint + whole.total_log_det
    wanted = joint - (inner.log_joint + inner.total_log_det)
    every = torch.ones_like(there, dtype=torch.bool)
    found = sum(
        conditional_log_prob(b, b.take(grad), b.take(there), b.take(every)) for b in lattice.blocks
    )
    seen = joint.isfinite()
    digits = 1e2 * torch.finfo(joint.dtype).eps * joint.abs()
    wrong = (found - wanted).abs() > _TOLERANCE * (1.0 + wanted.abs()) + digits
    return not bool(wrong[seen].any()) if bool(seen.any()) else None
