r"""Control variates of simulated data sets: log p(x|z) and a Gaussian log q(x), centred by fresh simulations.

For each data set and each element of its batch plates, with m fresh simulations of the same model,

.. math:: c_i = s(x_i, z_i) - \frac{1}{m} \sum_{j=1}^m s(x_{ij}, z_{ij}), \qquad E[c_i] = 0 .

Simulations are made again from the seeds of the data sets, so nothing of them has to be kept. The same as
:mod:`pyro_anneal.mi.surrogates`, for models whose pairs are elements of plates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from pyro import poutine
from torch import Tensor

from ..models.simulation import Arguments, Unobserve, simulate
from ..models.sites import density_sites, mark_points, sum_to_batch
from ..models.squashed import SquashedGaussian
from ..models.types import Fn, Trace
from ..models.validation import validation_disabled
from ..persistence.randomness import derived_seed, own_randomness

__all__ = ["SimulatedControls"]

_NUM_FITTED, _MOST_FITTING, _NUM_FRESH = 1000, 200, 32


@dataclass(eq=False)
class SimulatedControls:
    """Control variates of the data sets that a call simulates, made as they are asked for.

    Attributes:
        model: The user's model.
        arguments: Its ``(args, kwargs)``.
        plates: Sizes of the batch plates by name, from the left.
        seed: Seed of the first data set; the others follow it.
    """

    model: Fn
    arguments: Arguments
    plates: Mapping[str, int]
    seed: int
    _made: list[Tensor] = field(default_factory=list)
    _gaussian: SquashedGaussian | None = None

    def of(self, count: int) -> Tensor:
        """Computes those of the first data sets, ``[2, count, *batch]``, in nats."""
        while len(self._made) < count:
            self._made.append(self._controls(len(self._made)))
        return torch.stack(self._made[:count], 1)

    def _controls(self, index: int) -> Tensor:
        if self._gaussian is None:
            size = max(1, torch.Size(self.plates.values()).numel())
            sets = min(_MOST_FITTING, -(-_NUM_FITTED // size))
            with own_randomness(derived_seed(self.seed, "surrogate")):
                rows = [self._drawn()[0] for _ in range(sets)]
            self._gaussian = SquashedGaussian.fit(torch.cat(rows))
        found = self._values(*self._replayed(self.seed + index), self._gaussian)
        total = torch.zeros_like(found)
        with own_randomness(derived_seed(self.seed, "fresh", index)):
            for _ in range(_NUM_FRESH):
                total += self._values(*self._drawn(), self._gaussian)
        return found - total / _NUM_FRESH

    def _values(self, rows: Tensor, log_prob: Tensor, gaussian: SquashedGaussian) -> Tensor:
        return torch.stack([log_prob, gaussian.log_density(rows).reshape(log_prob.shape)])

    def _replayed(self, seed: int) -> tuple[Tensor, Tensor]:
        """Reads the pairs that were simulated from a seed."""
        with own_randomness(seed):
            simulation = simulate(self.model, self.arguments)
        data = {**simulation.latents, **simulation.observed}
        args, kwargs = self.arguments
        with torch.no_grad(), validation_disabled(), poutine.block():
            model = poutine.condition(Unobserve()(self.model), data=data)
            return self._read(poutine.trace(model).get_trace(*args, **kwargs))

    def _drawn(self) -> tuple[Tensor, Tensor]:
        """Simulates pairs."""
        args, kwargs = self.arguments
        with torch.no_grad(), validation_disabled(), poutine.block():
            return self._read(poutine.trace(Unobserve()(self.model)).get_trace(*args, **kwargs))

    def _read(self, trace: Trace) -> tuple[Tensor, Tensor]:
        """Reads x, a row for each batch element, ``[B, D]``, and log p(x|z), ``[*batch]``."""
        mark_points(trace)
        shape = torch.Size(self.plates.values())
        terms, rows = [], []
        for _, site in density_sites(trace):
            if not site["infer"].get("was_observed"):
                continue
            frames = {f.name: f.dim for f in site["cond_indep_stack"] if f.vectorized}
            dims = [frames[name] for name in self.plates]
            term = site["fn"].log_prob(site["value"])
            if site["mask"] is not None:
                term = torch.where(torch.as_tensor(site["mask"], device=term.device), term, 0.0)
            terms.append(sum_to_batch(term, dims, shape).double())
            value, events = site["value"], site["fn"].event_dim
            places = [value.dim() + dim - events for dim in dims]
            front = value.movedim(places, list(range(len(dims))))
            rows.append(front.reshape(shape.numel(), -1).double())
        return torch.cat(rows, -1), torch.stack(terms).sum(0)
