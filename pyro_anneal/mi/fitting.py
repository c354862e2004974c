"""Training of critics and guides: minibatches, a held-out split, early stopping, a seed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import pyro
import torch
from torch import Tensor

from ..arguments import as_count, as_real
from ..persistence.randomness import draw_seed, seeded_if
from ..results.findings import Diagnostic
from .progress import progress_over

if TYPE_CHECKING:
    from .base import Bound

__all__ = ["Fit", "FitOptions", "fit_bound"]

# A held-out value this many standard errors below that of the training pairs is overfitted.
_OVERFIT_ERRORS = 3.0


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How a bound is trained.

    Attributes:
        max_epochs: Passes over the training pairs at most.
        batch_size: Pairs per step.
        lr: Learning rate of Adam at the start; it is halved after each ``patience / 2`` epochs
            without a better held-out value.
        patience: Epochs without a better held-out value after which training stops.
        validation: Fraction of the pairs that is held out, in (0, 1).

    Raises:
        ValueError: If a number is out of range.
    """

    max_epochs: int = 200
    batch_size: int = 128
    lr: float = 1e-3
    patience: int = 20
    validation: float = 0.2

    def __post_init__(self) -> None:
        as_count("max_epochs", self.max_epochs)
        as_count("batch_size", self.batch_size)
        as_count("patience", self.patience)
        if not as_real("lr", self.lr) > 0.0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not 0.0 < as_real("validation", self.validation) < 1.0:
            raise ValueError(
                f"validation must lie strictly between 0 and 1, got {self.validation}"
            )


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a training went, in nats per epoch.

    Attributes:
        training: Mean objective of the minibatches of each epoch, while weights moved.
        held_out: Objective on the held-out pairs after each epoch.
        best_epoch: The epoch whose weights were kept, from 0.
        stopped: Why it ended: ``"patience"`` or ``"max_epochs"``.
        diagnostics: Findings: ``overfitted``, ``unfinished`` or ``ceiling``.
    """

    training: tuple[float, ...]
    held_out: tuple[float, ...]
    best_epoch: int
    stopped: str
    diagnostics: tuple[Diagnostic, ...] = ()


class _Parameters:
    """Parameters of a bound, those that its guide keeps in Pyro's store included."""

    def __init__(self, bound: Bound, warm_up: Callable[[], object]) -> None:
        with pyro.poutine.trace(param_only=True) as capture:
            warm_up()
        stored = {
            id(parameter): parameter
            for site in capture.trace.nodes.values()
            for parameter in [site["value"].unconstrained()]
        }
        stored |= {id(p): p for p in bound.parameters() if p.requires_grad}
        self.tensors = list(stored.values())
        self.bound = bound
        if not self.tensors:
            raise ValueError(f"{type(bound).__name__}: guide and critic have no parameters to fit")

    def state(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Copies all values, buffers included."""
        buffers = copy.deepcopy(dict(self.bound.named_buffers()))
        return [p.detach().clone() for p in self.tensors], buffers

    def restore(self, state: tuple[list[Tensor], dict[str, Tensor]]) -> None:
        """Puts copied values back in place."""
        with torch.no_grad():
            for parameter, value in zip(self.tensors, state[0], strict=True):
                parameter.copy_(value)
            for name, buffer in self.bound.named_buffers():
                buffer.copy_(state[1][name])


def fit_bound(
    bound: Bound,
    x: Tensor,
    z: Tensor,
    options: FitOptions,
    *,
    seed: int | None,
    progress_bar: bool,
) -> Fit:
    """Trains a bound; see :meth:`pyro_anneal.mi.Bound.fit`."""
    with seeded_if(seed):
        order = torch.randperm(len(x), device=x.device)
        num_held = max(1, round(options.validation * len(x)))
        least = 2 if bound.num_rows_per_pair == 0 else 1  # pairs that are each other's negatives
        if num_held < least or len(x) - num_held < least:
            raise ValueError(
                f"{len(x)} pairs cannot be split into training pairs and {num_held} held-out ones "
                f"of at least {least}; give more pairs, or another validation fraction"
            )
        held, rest = order[:num_held], order[num_held:]
        probe = rest[: max(least, min(len(rest), options.batch_size))]
        parameters = _Parameters(bound, lambda: bound.loss(x[probe], z[probe]))
        run = _Training(bound, parameters, options, (x, z), held, rest, least)
        run.go(progress_bar)
    return run.result()


class _Objective(NamedTuple):
    mean: float
    std_error: float
    contrastive: float | None
    ceiling: float


class _Training:
    def __init__(
        self,
        bound: Bound,
        parameters: _Parameters,
        options: FitOptions,
        pairs: tuple[Tensor, Tensor],
        held: Tensor,
        rest: Tensor,
        least: int,
    ) -> None:
        self.bound, self.parameters, self.options = bound, parameters, options
        self.pairs, self.held, self.rest, self.least = pairs, held, rest, least
        self.training: list[float] = []
        self.held_out: list[float] = []
        self.best_epoch = 0
        self.stopped = "max_epochs"
        self.found: list[Diagnostic] = []
        self.evaluation_seed = draw_seed()

    def go(self, progress_bar: bool) -> None:
        optimizer = torch.optim.Adam(self.parameters.tensors, lr=self.options.lr)
        halve = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer,
            "max",
            factor=0.5,
            patience=max(1, self.options.patience // 2),
            threshold=0.0,
        )
        best = self.parameters.state()
        epochs = range(self.options.max_epochs)
        for epoch in progress_over(f"fit {type(self.bound).__name__}", epochs, progress_bar):
            self.training.append(self._epoch(optimizer))
            value = self._evaluate(self.held).mean
            self.held_out.append(value)
            halve.step(value)
            if value >= max(self.held_out):
                best, self.best_epoch = self.parameters.state(), epoch
            if epoch - self.best_epoch >= self.options.patience:
                self.stopped = "patience"
                break
        self.parameters.restore(best)
        self._diagnose()

    def _epoch(self, optimizer: torch.optim.Optimizer) -> float:
        values = []
        for rows in self._batches(self.rest[torch.randperm(len(self.rest)).to(self.rest.device)]):
            optimizer.zero_grad()
            loss = self.bound.loss(*self._take(rows))
            loss.backward()
            optimizer.step()
            values.append(-float(loss.detach()))
        mean = sum(values) / len(values)
        if math.isnan(mean):
            raise ValueError(
                f"the loss became NaN in epoch {len(self.training)}: lower lr, or scale x and z"
            )
        return mean

    def _batches(self, rows: Tensor) -> Iterator[Tensor]:
        parts: Iterable[Tensor] = rows.split(self.options.batch_size)
        return (part for part in parts if len(part) >= self.least)

    def _take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.pairs[0][rows], self.pairs[1][rows]

    def _evaluate(self, rows: Tensor) -> _Objective:
        """Measures the objective, with the same randomness each time."""
        values, contrastive, ceilings = [], [], []
        with seeded_if(self.evaluation_seed), torch.no_grad():
            for part in self._batches(rows):
                found = self.bound.held_out_values(*self._take(part))
                values.append(found.objective)
                if found.ceiling is not None:
                    contrastive.append(found.terms["contrastive"])
                    ceilings.append(found.ceiling)
        value = torch.cat(values).double()
        error = value.std() / len(value) ** 0.5 if len(value) > 1 else value.new_tensor(torch.inf)
        return _Objective(
            float(value.mean()),
            float(error),
            float(torch.cat(contrastive).mean()) if contrastive else None,
            max(ceilings, default=0.0),
        )

    def _diagnose(self) -> None:
        held = self._evaluate(self.held)
        seen = self._evaluate(self.rest[: max(self.least, len(self.held))])
        gap, error = seen.mean - held.mean, (held.std_error**2 + seen.std_error**2) ** 0.5
        if gap > _OVERFIT_ERRORS * error:
            self._add(
                "overfitted",
                f"the objective is {gap:.3g} nats higher on training pairs than on held-out ones: "
                "more pairs or a smaller critic would bring it closer to what it could be",
                gap,
            )
        late = len(self.held_out) - self.best_epoch
        if self.stopped == "max_epochs" and late <= max(1, self.options.patience // 4):
            self._add(
                "unfinished",
                f"the held-out value was still rising when the {len(self.held_out)} epochs "
                "ended: raise max_epochs",
                held.mean,
            )
        if held.contrastive is not None and held.contrastive >= 0.9 * held.ceiling > 0.0:
            self._add(
                "ceiling",
                f"the contrastive term on held-out pairs, {held.contrastive:.3g} nats, sits at "
                f"the ceiling of {held.ceiling:.3g} nats that the number of candidates sets: the "
                "mutual information may be much larger",
                held.contrastive,
            )

    def _add(self, name: str, message: str, value: float) -> None:
        self.found.append(Diagnostic(name=name, severity="warning", message=message, value=value))

    def result(self) -> Fit:
        return Fit(
            training=tuple(self.training),
            held_out=tuple(self.held_out),
            best_epoch=self.best_epoch,
            stopped=self.stopped,
            diagnostics=tuple(self.found),
        )


def as_values(name: str, value: Any) -> Tensor:
    """Returns tensors as they are and numpy arrays or lists as tensors, doubles in default dtype.

    Example:
        >>> import numpy
        >>> as_values("x", numpy.zeros(2)).dtype == torch.get_default_dtype()
        True
    """
    if isinstance(value, Tensor):
        return value
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name} must be a tensor or an array of numbers with pairs along dimension 0, got "
            f"{type(value).__name__}: {error}; encode strings as integers"
        ) from None
    return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor
