"""What goes on after a run: its chains at the target, and the likelihood of each datum there.

The last weight of a run is taken before beta reaches 1, and K weighted ends are few. Resampled, they
are draws of the posterior up to the error of K weights; moved on by the run's own frozen kernel at
beta = 1, which keeps the posterior, they stay such draws and forget where they were copied from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pyro import poutine
from torch import Tensor

from ..chains.blockwise import Blockwise
from ..chains.path import Path
from ..kernels import Density
from ..models.sites import is_factor, latent_sites, observed_sites
from ..models.validation import validation_disabled
from ..persistence.randomness import draw_seed, seeded_generator
from ..problems.problem import Problem
from ..weights import resample_indices

__all__ = ["Continuation"]


@dataclass(frozen=True, eq=False)
class Continuation:
    """A finished forward run's problem, path and ends; it lasts as long as the process."""

    problem: Problem
    path: Path
    position: Tensor  # at the last weight, [K, *batch, D]
    log_weights: Tensor  # [K, *batch]
    max_rows: int | None = None  # positions that may be evaluated at once

    def draw(self, num_samples: int, *, thin: int, seed: int | None) -> dict[str, Tensor]:
        """Draws from the posterior by moving the resampled ends at beta = 1.

        Args:
            num_samples: Number n of draws.
            thin: Transitions before each draw of a chain.
            seed: Seed of resampling and moves; None draws one from torch's global generator.

        Returns:
            Values by site, ``[n, *value_shape]``; equally weighted, in no order of importance.
        """
        problem, path = self.problem, self.path
        count, device = len(self.position), self.position.device
        generator = seeded_generator(device, draw_seed() if seed is None else seed, "continue")
        density: Density = problem.density
        density = density if self.max_rows is None else Blockwise(density, self.max_rows)
        with torch.no_grad():
            indices = resample_indices(self.log_weights, count, generator=generator)
            # resampled indices are sorted, and a part of the last round may be all that is needed
            indices = indices[torch.randperm(count, generator=generator, device=device)]
            position = self.position.gather(
                0, indices.unsqueeze(-1).expand(*indices.shape, self.position.shape[-1])
            )
            state = density(position)
            one = torch.ones((), dtype=position.dtype, device=device)
            tuning, kept = path.tuning.at(1.0), []
            for _ in range(-(-num_samples // count)):
                for _ in range(thin):
                    noise = path.kernel.noise(state, generator)
                    state = path.kernel.step(state, density, one, tuning, noise)[0]
                kept.append(state.position)
        return problem.unpack(torch.cat(kept)[:num_samples])

    def log_likelihood(self, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Computes the log likelihood of each datum, at each draw.

        Args:
            draws: Values by latent site, ``[n, *value_shape]``.

        Returns:
            Nats by observed site, ``[n, *batch_shape of the site]``. Masked entries are 0, and
            scales of ``poutine.scale`` are left out.

        Raises:
            ValueError: If the model has latent sites that were summed out: the likelihood of a
                datum is then no product over sites.
        """
        model, (args, kwargs) = self.problem.model.model, self.problem.model.arguments
        rows: dict[str, list[Tensor]] = {}
        for k in range(len(next(iter(draws.values())))):
            data = {name: value[k] for name, value in draws.items()}
            with torch.no_grad(), validation_disabled(), poutine.block():
                trace = poutine.trace(poutine.condition(model, data=data)).get_trace(
                    *args, **kwargs
                )
            for name, site in observed_sites(trace).items():
                if name in data or is_factor(site):
                    continue
                log_prob = site["fn"].log_prob(site["value"])
                mask = site["mask"]
                if mask is not None:
                    log_prob = torch.where(torch.as_tensor(mask), log_prob, 0.0)
                rows.setdefault(name, []).append(log_prob)
            free = [name for name in latent_sites(trace) if name not in data]
            if free:
                raise ValueError(
                    f"the log likelihood of each datum is not known: site(s) {free} have no draws, "
                    "because they were summed out; write them as a mixture distribution "
                    "(pyro.distributions.MixtureSameFamily), or compare by evidence"
                )
        return {name: torch.stack(values) for name, values in rows.items()}
