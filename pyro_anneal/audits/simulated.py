"""Data simulated for an audit: with sites held fixed, shown to the inference, evaluated again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..graphs.captured import CapturedDensity, capture
from ..models.density import Arguments, ModelDensity
from ..models.simulation import MakeArgs, Simulation, check_copies, guide_arguments, simulate
from ..models.sites import latent_sites
from ..models.types import Fn, Message
from ..problems.bases import Base, PathDensity

__all__ = ["Densities", "Fixed", "SimulatedData", "simulate_data"]

# Rows of positions that are evaluated at once.
_ROWS = 64


class Fixed(Messenger):  # type: ignore[misc]
    """Holds sites at given values, without a density of their own: as ``pyro.deterministic``."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = dict(values)

    def _pyro_sample(self, msg: Message) -> None:
        value = self.values.get(msg["name"])
        if value is None or msg["is_observed"]:
            return
        fn = msg["fn"]
        value = value.expand(fn.batch_shape + fn.event_shape)
        msg["fn"] = dist.Delta(value, event_dim=fn.event_dim).mask(False)
        msg["value"], msg["is_observed"] = value, True
        msg["infer"] = {**msg["infer"], "_deterministic": True}


class _Shown(Messenger):  # type: ignore[misc]
    """Remembers which sites Pyro programs inside have reached."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def _pyro_sample(self, msg: Message) -> None:
        self.names.add(msg["name"])


@dataclass(frozen=True, eq=False)
class SimulatedData:
    """One simulated data set, and how model and inference see it."""

    simulation: Simulation
    model: Fn  # conditioned on the data, sites held fixed
    arguments: Arguments  # for the inference: simulated data in place of the observed
    hidden: dict[str, Tensor]  # data that no argument holds

    held: Fn  # the model for the inference: sites fixed, hidden data in place

    @contextlib.contextmanager
    def shown(self, fixed: Mapping[str, Tensor]) -> Iterator[set[str]]:
        """Shows Pyro programs inside what the arguments do not: fixed sites, and hidden data.

        Yields:
            Names of the sites that were reached; ``MCMC.run`` hides its own from all handlers.
        """
        with _Shown() as seen, Fixed(fixed), poutine.condition(data=self.hidden):
            yield seen.names


def simulate_data(
    model: Fn,
    arguments: Arguments,
    fixed: Mapping[str, Tensor],
    make_args: MakeArgs | None,
    *,
    check: bool,
) -> SimulatedData:
    """Draws an exact pair (z, x) from the model, with torch's global generator.

    Args:
        model: The model.
        arguments: Its ``(args, kwargs)``.
        fixed: Latent sites to hold at values.
        make_args: Rule for the inference's arguments.
        check: Whether to check that the model holds no copy of its data, and knows the fixed sites.

    Raises:
        ValueError: As :func:`~pyro_anneal.models.simulation.simulate` and
            :func:`~pyro_anneal.models.simulation.guide_arguments`; or if a fixed site is no latent.
    """
    if check and fixed:
        with torch.no_grad(), poutine.block():
            trace = poutine.trace(model).get_trace(*arguments[0], **arguments[1])
        unknown = [name for name in fixed if name not in latent_sites(trace)]
        if unknown:
            raise ValueError(
                f"simulate_from names {unknown}, but the model's latent sites are "
                f"{list(latent_sites(trace))}"
            )
    held = Fixed(fixed)(model) if fixed else model
    simulation = simulate(held, arguments)
    if check:
        check_copies(held, arguments, simulation)
    plain = (bool, int, float, complex, str, bytes, type(None))
    holds_data = any(not isinstance(leaf, plain) for leaf in tree_leaves(arguments))
    shown = guide_arguments(arguments, simulation, make_args)
    hidden = {} if holds_data or make_args is not None else simulation.observed
    conditioned = poutine.condition(held, data=simulation.observed)
    given = conditioned if hidden else held
    return SimulatedData(simulation, conditioned, shown, hidden, given)


class Densities:
    """Evaluates log p and log q on one data set after another, from one recording where it serves."""

    def __init__(self) -> None:
        self._captured: CapturedDensity | None = None
        self._tensors: dict[str, Tensor] = {}

    def evaluate(
        self, model: ModelDensity, base: Base, tensors: Mapping[str, Tensor], rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Computes log q and log p, each ``[N]``, at positions ``[N, D]``.

        Args:
            model: The model's side, on these data.
            base: The base, on these data.
            tensors: The data by place, in the same places at each call.
            rows: Positions.
        """
        density = self._density(PathDensity(model, base), tensors, rows[0])
        parts = []
        with torch.no_grad():
            for part in rows.split(_ROWS):
                fill = part[-1:].expand(_ROWS - len(part), *part.shape[1:])
                state = density(torch.cat([part, fill]).contiguous())
                parts.append(torch.stack([state.log_base, state.log_target])[:, : len(part)])
        log_base, log_target = torch.cat(parts, 1).double()
        return log_base, torch.where(log_target.isnan(), -torch.inf, log_target)

    def _density(
        self, function: PathDensity, tensors: Mapping[str, Tensor], example: Tensor
    ) -> CapturedDensity:
        kept = self._captured
        if kept is not None and kept.mode != "eager":
            known = {id(constant) for constant in kept.constants}
            new = {old: tensors[place] for place, old in self._tensors.items() if id(old) in known}
            with contextlib.suppress(ValueError):
                if kept.serves(new):
                    return kept.rebind(new, function)
        self._captured = capture(function, example, num_chains=_ROWS, gradients=False)
        self._tensors = dict(tensors)
        return self._captured
