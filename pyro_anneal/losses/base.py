"""What all losses share: Pyro's contract, and particles drawn from a guide."""

from __future__ import annotations

import contextlib
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import pyro
import torch
from pyro import poutine
from pyro.infer.elbo import ELBO
from pyro.util import get_rng_state, set_rng_state, warn_if_nan
from torch import Tensor
from typing_extensions import Unpack

from ..arguments import as_count
from ..models.types import Fn
from .particles import PARTICLE_PLATE, Particles, Sampling, collect
from .traces import Arguments, EnumerationNeeded, Gates, Run, run_guide

__all__ = [
    "Evaluation",
    "ParticleELBO",
    "PyroOptions",
    "finite_or_zero",
    "require_pathwise",
    "weighted_sum",
    "without_parameters",
]


class Evaluation(NamedTuple):
    """One evaluation of a loss."""

    value: Tensor  # what is minimized, nats, scalar, detached
    surrogate: Tensor | None  # scalar whose gradient estimates that of the objective


class PyroOptions(TypedDict, total=False):
    """The options that every loss here shares with Pyro's losses, all by keyword.

    Args:
        max_plate_nesting: Bound on the number of nested plates; guessed where it is needed.
        vectorize_particles: Whether to draw all particles in one run, inside an outermost plate.
        strict_enumeration_warning: Accepted for compatibility with Pyro's losses.
        ignore_jit_warnings: Accepted for compatibility with Pyro's losses.
        jit_options: Accepted for compatibility with Pyro's losses.
        retain_graph: Whether ``loss_and_grads`` keeps the autograd graph.
    """

    max_plate_nesting: float
    vectorize_particles: bool
    strict_enumeration_warning: bool
    ignore_jit_warnings: bool
    jit_options: dict[str, Any] | None
    retain_graph: bool | None


class ParticleELBO(ELBO):  # type: ignore[misc]
    """A loss made of K particles from the guide, under Pyro's contract.

    Subclasses implement :meth:`_evaluate`. ``loss`` returns the value without gradients,
    ``loss_and_grads`` also runs backward, ``differentiable_loss`` returns a scalar tensor whose
    value is the loss and whose gradient is that of the surrogate.

    Args:
        num_particles: Number K of particles.
        **options: What Pyro's losses take too, see :class:`PyroOptions`.
    """

    num_particles: int
    vectorize_particles: bool
    max_plate_nesting: float

    def __init__(self, num_particles: int, **options: Unpack[PyroOptions]) -> None:
        unknown = sorted(options.keys() - PyroOptions.__annotations__.keys())
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has no option {unknown[0]!r}; besides its own it takes "
                f"those of Pyro's losses: {', '.join(PyroOptions.__annotations__)}"
            )
        num_particles = as_count("num_particles", num_particles)
        nesting = options.get("max_plate_nesting", math.inf)
        if nesting != math.inf:
            options["max_plate_nesting"] = as_count("max_plate_nesting", nesting, least=0)
        super().__init__(num_particles=num_particles, **options)
        self._warned: set[str] = set()
        # Whether a model was seen that has sites to sum out; None before the first.
        self._enumerates: bool | None = None

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self._fields().items())
        return f"{type(self).__name__}({fields})"

    def _fields(self) -> dict[str, object]:
        """Returns what tells this loss from others of its class, for its repr."""
        shown: dict[str, object] = {"num_particles": self.num_particles}
        if self.vectorize_particles:
            shown["vectorize_particles"] = True
        if self.max_plate_nesting != math.inf:
            shown["max_plate_nesting"] = int(self.max_plate_nesting)
        return shown

    @abstractmethod
    def _evaluate(self, model: Fn, guide: Fn, arguments: Arguments) -> Evaluation:
        """Evaluates the loss, with a surrogate if gradients are enabled."""

    def _is_linear(self) -> bool:
        """Tells whether the objective is linear in the log-weights, as the ELBO is."""
        return self.num_particles == 1

    def loss(self, model: Fn, guide: Fn, *args: Any, **kwargs: Any) -> float:
        """Evaluates the loss without gradients.

        Args:
            model: Pyro model.
            guide: Pyro guide.
            *args: Arguments of both.
            **kwargs: Arguments of both.

        Returns:
            The loss in nats.
        """
        with torch.no_grad():
            value = float(self._evaluate(model, guide, (args, kwargs)).value)
        warn_if_nan(value, "loss")
        return value

    def differentiable_loss(self, model: Fn, guide: Fn, *args: Any, **kwargs: Any) -> Tensor:
        """Evaluates the loss as a tensor to differentiate.

        Args:
            model: Pyro model.
            guide: Pyro guide.
            *args: Arguments of both.
            **kwargs: Arguments of both.

        Returns:
            Scalar in nats; its gradient is that of the surrogate.
        """
        value, surrogate = self._evaluate(model, guide, (args, kwargs))
        warn_if_nan(value, "loss")
        return value if surrogate is None else value + (surrogate - surrogate.detach())

    def loss_and_grads(self, model: Fn, guide: Fn, *args: Any, **kwargs: Any) -> float:
        """Evaluates the loss and accumulates gradients of all parameters that it reaches.

        Args:
            model: Pyro model.
            guide: Pyro guide.
            *args: Arguments of both.
            **kwargs: Arguments of both.

        Returns:
            The loss in nats.
        """
        value, surrogate = self._evaluate(model, guide, (args, kwargs))
        if surrogate is not None and surrogate.requires_grad:
            surrogate.backward(retain_graph=self.retain_graph)
        loss = float(value)
        warn_if_nan(loss, "loss")
        return loss

    def _get_trace(
        self,
        model: Fn,
        guide: Fn,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, Any]:
        """Returns the model's and the guide's trace of one run."""
        run = run_guide(model, guide, (args, kwargs), (args, kwargs))
        return run.model, run.guide

    def _particles(
        self,
        model: Fn,
        guide: Fn,
        arguments: Arguments,
        sampling: Sampling,
        **options: Any,
    ) -> Particles:
        """Draws the K particles."""
        if not torch.is_grad_enabled():
            sampling = "pathwise"  # nothing to hold back, and nothing to check
        gates = None if sampling == "pathwise" else Gates(closed=sampling == "score")
        count = self.num_particles
        runs = self._runs(model, guide, arguments, arguments, count, gates, **options)
        particles = collect(
            runs,
            num_particles=count,
            vectorized=self.vectorize_particles and count > 1,
            sampling=sampling,
            gates=gates,
        )
        if not self._is_linear():
            self._warn(particles)
        return particles

    def _warn(self, particles: Particles) -> None:
        """Warns of what makes the objective no bound, once per loss."""
        for note in particles.notes:
            if note not in self._warned:
                self._warned.add(note)
                warnings.warn(note, UserWarning, stacklevel=5)

    def _runs(
        self,
        model: Fn,
        guide: Fn,
        model_arguments: Arguments,
        guide_arguments: Arguments,
        count: int,
        gates: Gates | None,
        shared: Any = None,
        model_context: Callable[[], Any] = contextlib.nullcontext,
    ) -> list[Run]:
        """Runs guide and model for ``count`` particles that share their subsamples."""
        vectorized = self.vectorize_particles and count > 1
        if self.vectorize_particles and self.max_plate_nesting == math.inf:
            self._guess(model, guide, model_arguments, guide_arguments)
        if vectorized:
            plate = pyro.plate(PARTICLE_PLATE, count, dim=-int(self.max_plate_nesting))
            model, guide = plate(model), plate(guide)
        runs: list[Run] = []
        while len(runs) < (1 if vectorized else count):
            enumerates = self._enumerates and self.max_plate_nesting < math.inf
            state = get_rng_state() if self._enumerates is None else None
            try:
                run = run_guide(
                    model,
                    guide,
                    model_arguments,
                    guide_arguments,
                    gates=gates,
                    shared=shared,
                    first_enumeration_dim=-1 - int(self.max_plate_nesting) if enumerates else None,
                    max_plate_nesting=self.max_plate_nesting,
                    model_context=model_context,
                )
            except EnumerationNeeded:
                if gates is not None:
                    gates.clear()
                self._enumerates = True
                if state is not None:
                    set_rng_state(state)  # the same draws, again
                if self.max_plate_nesting == math.inf:
                    self._guess(model, guide, model_arguments, guide_arguments)
                continue
            self._enumerates = self._enumerates or False
            runs.append(run)
            shared = run.subsamples
        return runs

    def _guess(
        self,
        model: Fn,
        guide: Fn,
        model_arguments: Arguments,
        guide_arguments: Arguments,
    ) -> None:
        """Guesses ``max_plate_nesting`` by running guide and model once."""
        args, kwargs = guide_arguments
        if model_arguments is guide_arguments:
            self._guess_max_plate_nesting(model, guide, args, kwargs)
            return
        model_args, model_kwargs = model_arguments
        self._guess_max_plate_nesting(
            lambda *_, **__: model(*model_args, **model_kwargs), guide, args, kwargs
        )

    def _in_particle_plate(self, fn: Fn, count: int) -> Fn:
        plate = pyro.plate(PARTICLE_PLATE, count, dim=-int(self.max_plate_nesting))
        return plate(fn)  # type: ignore[no-any-return]


def without_parameters(model: Fn) -> Fn:
    """Hides the model's parameters from an enclosing SVI, so that no optimizer moves them."""
    return poutine.block(model, hide_types=["param"])  # type: ignore[no-any-return]


def finite_or_zero(values: Tensor) -> Tensor:
    """Replaces ``-inf`` by 0, so that particles of zero weight pass no NaN into a gradient."""
    return torch.where(values == -torch.inf, 0.0, values)


def require_pathwise(particles: Particles, what: str, alternative: str) -> None:
    """Checks that gradients reach every draw of the guide along its sampling path.

    Raises:
        NotImplementedError: If a site has no reparameterized sampler; it names the site.
    """
    if particles.score_sites:
        name = particles.score_sites[0]
        fn = particles.runs[0].guide.nodes[name]["fn"]
        while hasattr(fn, "base_dist"):
            fn = fn.base_dist
        raise NotImplementedError(
            f'{what} needs reparameterized draws, but guide site "{name}" is a '
            f"{type(fn).__name__} with parameters, whose gradient would be silently lost; "
            f"use {alternative}"
        )


def weighted_sum(particles: Particles, weights: Tensor, score_weights: Tensor | None) -> Tensor:
    r"""Builds the surrogate ``sum_k a_k log w_k + b_k score_k`` of a bound, a scalar.

    Args:
        particles: The particles.
        weights: Coefficients ``a`` of the log-weights, ``[K, *batch]``, taken as constants.
        score_weights: Coefficients ``b`` of the scores, ``[K, *batch]``, likewise.

    Returns:
        Scalar whose gradient is the estimate of the bound's gradient.
    """
    terms = weights.detach() * finite_or_zero(particles.log_weights)
    if particles.score is not None and score_weights is not None:
        terms = terms + score_weights.detach() * finite_or_zero(particles.score)
    return particles.total(terms.sum(dim=0))
