"""Pairs of latents and observations, simulated for a batch of designs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..arguments import as_seed
from ..models.entropies import excess
from ..models.simulation import Simulation, simulate
from ..models.sites import is_deterministic, sum_to_batch
from ..models.types import Distribution, Fn, Message, Trace
from ..models.validation import validation_disabled
from ..results.sandwich import Sandwich

__all__ = ["Experiment", "Labels", "ModelRun"]


@dataclass(frozen=True)
class Labels:
    """Which sites are observed, and which one wants to know."""

    observations: tuple[str, ...]
    targets: tuple[str, ...] | None  # None for all latents

    @staticmethod
    def check(observations: str | Sequence[str], targets: str | Sequence[str] | None) -> Labels:
        """Makes tuples of names, as Pyro's functions take them."""

        def names(given: str | Sequence[str]) -> tuple[str, ...]:
            return (given,) if isinstance(given, str) else tuple(given)

        wanted = None if targets is None else names(targets)
        labels = Labels(names(observations), wanted)
        if not labels.observations or wanted == ():
            raise ValueError("an experiment needs at least one observed and one target site")
        both = sorted(set(labels.observations) & set(wanted or ()))
        if both:
            raise ValueError(f"site(s) {both} are both observed and target")
        return labels


class _Ignore(Messenger):  # type: ignore[misc]
    """Leaves sites out of the joint density, though they are drawn."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Message) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["is_observed"] = self.values[msg["name"]], True
            msg["mask"] = False


@dataclass(frozen=True, eq=False)
class ModelRun:
    """One run of a model of designs.

    Attributes:
        trace: Its trace.
        plates: Axis and size of each plate around every site, from the left.
    """

    trace: Trace
    plates: tuple[tuple[int, int], ...]

    @property
    def lead(self) -> torch.Size:
        """Sizes of those plates: draws, if any, pairs and designs."""
        return torch.Size([size for _, size in self.plates])

    def fn(self, name: str) -> Distribution:
        """Returns the distribution of a site."""
        found: Distribution = self.trace.nodes[name]["fn"]
        return found

    def values(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Collects the values of sites."""
        return {name: self.trace.nodes[name]["value"] for name in names}

    def log_prob(self, names: Sequence[str]) -> Tensor:
        """Sums the log densities of sites over all but the common plates, in nats."""
        self.trace.compute_log_prob(lambda name, site: name in names)
        dims = [dim for dim, _ in self.plates]
        terms = [
            sum_to_batch(self.trace.nodes[name]["log_prob"], dims, self.lead) for name in names
        ]
        return torch.stack(terms).sum(0)


@dataclass(frozen=True, eq=False)
class Experiment:
    """A model of designs with N simulated pairs per design.

    Attributes:
        model: The user's model.
        design: Designs, expanded by a leading dimension of size N.
        labels: Names of the sites.
        latents: Names of all latent sites, in the model's order.
        simulation: The pairs.
        seed: Seed of the pairs.
        plates: Axis and size of each plate that encloses every site, from the left: that of the
            pairs, those of the designs, and any other.
    """

    model: Fn
    design: Tensor
    labels: Labels
    latents: tuple[str, ...]
    simulation: Simulation
    seed: int
    plates: tuple[tuple[int, int], ...]

    @staticmethod
    def read(
        model: Fn, design: Tensor, labels: Labels, num_pairs: int, seed: int | None
    ) -> Experiment:
        """Runs the model once on the expanded designs, and simulates the pairs.

        Raises:
            ValueError: If a label is no site of the model.
        """
        if not isinstance(design, Tensor):
            raise ValueError(f"design must be a tensor, got {type(design).__name__}")
        expanded = design.detach().expand(num_pairs, *design.shape)
        given = as_seed(seed)
        given = int(torch.randint(2**31, ())) if given is None else given
        with torch.no_grad(), poutine.block(), torch.random.fork_rng():
            torch.manual_seed(given)
            trace: Trace = poutine.trace(model).get_trace(expanded)
        names = [
            name
            for name in trace.stochastic_nodes
            if not (site_is_subsample(trace.nodes[name]) or is_deterministic(trace.nodes[name]))
        ]
        unknown = [
            name for name in (*labels.observations, *(labels.targets or ())) if name not in names
        ]
        if unknown:
            raise ValueError(
                f"site(s) {unknown} are no unobserved sites of the model, which has {names}"
            )
        latents = tuple(name for name in names if name not in labels.observations)
        values = {name: trace.nodes[name]["value"] for name in labels.observations}
        conditioned = poutine.condition(model, data=values)
        with torch.random.fork_rng():
            torch.manual_seed(given)
            simulation = simulate(conditioned, ((expanded,), {}))
        plates = _common_plates(trace, names)
        return Experiment(model, expanded, labels, latents, simulation, given, plates)

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the sites one wants to know."""
        return self.latents if self.labels.targets is None else self.labels.targets

    @property
    def nuisances(self) -> tuple[str, ...]:
        """Names of the latents that are no target."""
        return tuple(name for name in self.latents if name not in self.targets)

    @property
    def values(self) -> dict[str, Tensor]:
        """Simulated values of all sites."""
        return self.simulation.latents | self.simulation.observed

    def observing(self, names: Sequence[str]) -> Fn:
        """Returns the model with these sites observed, and other observations left out."""
        data = {name: self.values[name] for name in names}
        ignored = {n: self.values[n] for n in self.labels.observations if n not in data}
        model = poutine.condition(self.model, data=data)
        return _Ignore(ignored)(model) if ignored else model  # type: ignore[no-any-return]

    def check(self, sandwich: Sandwich) -> Sandwich:
        """Checks that a sandwich speaks of the same pairs, one per design.

        Raises:
            ValueError: If the leading dimensions of the designs are no plates of the whole model.
        """
        shape = sandwich.lower.shape
        if not shape or shape[0] != len(self.design):
            raise ValueError(
                f"the design, expanded to {list(self.design.shape)}, gives bounds of shape "
                f"{list(shape)}: its leading dimensions must be plates that enclose every site of "
                "the model, as in pyro.contrib.oed (pyro.plate_stack over design.shape)"
            )
        for name, value in sandwich.simulated.items():
            if not torch.equal(value, self.values[name]):
                raise RuntimeError(f'site "{name}" was simulated anew: pairs do not match')
        return sandwich

    def log_prior_of_targets(self) -> Tensor | None:
        """Computes log p(target | d) of each pair, or None where it depends on nuisances."""
        found = None
        for _ in range(5):
            data = {name: self.values[name] for name in self.targets}
            log_prob = self._log_prob(poutine.condition(self.model, data=data), self.targets)
            if found is not None and not torch.equal(found, log_prob):
                return None
            found = log_prob
        return found

    def controls(self) -> Tensor:
        """Computes control variates of all pairs, of mean zero, ``[C, N, *designs]``.

        Sums of log density plus entropy, where that is known, over the latents and over the
        observations: I = H(y) - H(y | theta), and the second entropy need not be sampled.
        """
        with torch.no_grad(), validation_disabled(), poutine.block():
            model = poutine.condition(self.model, data=self.values)
            trace = poutine.trace(model).get_trace(self.design)
        sums = []
        for names in (self.latents, self.labels.observations):
            sites = [trace.nodes[name] for name in names]
            terms = [excess(site["fn"], site["value"]) for site in sites]
            known = [self._per_pair(term) for term in terms if term is not None]
            if known:
                sums.append(torch.stack(known).sum(0))
        return torch.stack(sums) if sums else torch.zeros((0, *self.shape))

    def _per_pair(self, log_prob: Tensor) -> Tensor:
        """Sums a site's log density over all but pairs and designs, to ``[N, *designs]``."""
        return sum_to_batch(log_prob, [dim for dim, _ in self.plates], self.shape)

    @property
    def shape(self) -> torch.Size:
        """Numbers of pairs and designs, ``[N, *designs]``."""
        return torch.Size([size for _, size in self.plates])

    def part(self, rows: slice) -> Experiment:
        """Takes some of the pairs."""
        design = self.design[rows]
        simulation = replace(
            self.simulation,
            latents={name: value[rows] for name, value in self.simulation.latents.items()},
            observed={name: value[rows] for name, value in self.simulation.observed.items()},
        )
        (first, _), *rest = self.plates
        plates = ((first, len(design)), *rest)
        return replace(self, design=design, simulation=simulation, plates=plates)

    def run(self, values: Mapping[str, Tensor], num_draws: int | None = None) -> ModelRun:
        """Runs the model with these values in place, and draws of its own for the other sites.

        Args:
            values: By site, ``[N, *designs, ...]``, or with K in front.
            num_draws: Number K of draws per pair, in front of all; None for no such dimension.

        Raises:
            ValueError: If the model does not take leading dimensions of the design as plates.
        """
        design, plates = self.design, self.plates
        if num_draws is not None:
            design = design.expand(num_draws, *design.shape)
            plates = ((plates[0][0] - 1, num_draws), *plates)
            values = {name: self._in_front(name, v, num_draws) for name, v in values.items()}
        model = poutine.condition(self.model, data=dict(values))
        with validation_disabled(), poutine.block():
            trace: Trace = poutine.trace(model).get_trace(design)
        found = _common_plates(trace, (*self.latents, *self.labels.observations))
        if found != plates:
            raise ValueError(
                f"the design, expanded to {list(design.shape)}, runs under plates of (axis, size) "
                f"{list(found)}, expected {list(plates)}: all leading dimensions of a design must "
                "be plates, as in pyro.contrib.oed (pyro.plate_stack over design.shape)"
            )
        return ModelRun(trace, plates)

    def _in_front(self, name: str, value: Tensor, num_draws: int) -> Tensor:
        if value.dim() == self.values[name].dim():
            value = value.expand(num_draws, *value.shape)
        return value

    def gradient(self, gain: Tensor) -> Tensor:
        """Computes the score gradient of the mean of ``gain``, ``[N, *designs]``, over pairs."""
        count = len(gain)
        baseline = (gain.sum(0) - gain) / max(count - 1, 1)
        weight = (gain - baseline).detach() / count
        design = self.design[0].clone().requires_grad_()
        model = poutine.condition(self.model, data=self.values)
        with torch.enable_grad():
            expanded = design.expand(count, *design.shape)
            log_prob = self._log_prob(model, tuple(self.values), expanded)
            (slope,) = torch.autograd.grad((weight * log_prob).sum(), design)
        return slope

    def _log_prob(self, model: Fn, names: Sequence[str], design: Tensor | None = None) -> Tensor:
        """Sums the log densities of sites, ``[N, *designs]``."""
        with validation_disabled(), poutine.block():
            trace = poutine.trace(model).get_trace(self.design if design is None else design)
            trace.compute_log_prob(lambda name, site: name in names)
        return torch.stack([self._per_pair(trace.nodes[name]["log_prob"]) for name in names]).sum(
            0
        )


def _common_plates(trace: Trace, names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Finds axis and size of the plates around all of these sites, from the left."""
    stacks = [
        {(f.name, f.dim, f.size) for f in trace.nodes[name]["cond_indep_stack"] if f.vectorized}
        for name in names
    ]
    common = set.intersection(*stacks)
    return tuple(sorted((dim, size) for _, dim, size in common))
