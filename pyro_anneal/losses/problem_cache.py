"""The annealing engine at the service of losses: minibatch after minibatch, one capture.

A loss meets new data at every step, under parameters that an optimizer moves. What does not change
is prepared once per shape of the arguments: the layout of the model and the captured graph of its
densities. New data and new parameters are then mere inputs of that graph.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..graphs.differentiable import DifferentiableDensity
from ..models.autoguides import is_autoguide
from ..models.discrete import DiscreteMap
from ..models.sites import TRANSPORT, Layout
from ..models.transport import Transport, TransportDensity
from ..persistence.randomness import own_randomness
from ..problems.bases import GuideBase, ModelDensity, PathDensity, PriorBase
from ..problems.cache import Kept, KeptProblems, key_of, tensors_of
from ..problems.discrete import lattice_of
from ..problems.over_chains import map_chains
from ..problems.problem import prepare
from ..problems.watched import Watched
from .scales import Scales
from .traces import Arguments

__all__ = ["FixedBatch", "Prepared", "ProblemCache", "pack_draws", "particle_values"]

Fn = Callable[..., Any]
_PATIENCE = 8  # recordings for changes of one value, before it is ignored


class FixedBatch(Messenger):  # type: ignore[misc]
    """Makes subsampled plates look like plates of the minibatch itself.

    Subsamples are replayed from a trace, and their factors N/B, which belong outside the bound of a
    datum, are removed from the scales; so is a scale that all sites share.
    """

    def __init__(self, subsamples: Any, *, common_scale: bool = False) -> None:
        super().__init__()
        self.subsamples = subsamples
        self.common_scale = common_scale

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            if msg["name"] in self.subsamples:
                msg["value"] = self.subsamples.nodes[msg["name"]]["value"]
                msg["done"] = True
            return
        frames = []
        for frame in msg["cond_indep_stack"]:
            if frame.full_size is not None and frame.full_size != frame.size:
                msg["scale"] = msg["scale"] * frame.size / frame.full_size
                frame = frame._replace(full_size=frame.size)
            frames.append(frame)
        msg["cond_indep_stack"] = tuple(frames)
        if self.common_scale:
            msg["scale"] = 1.0


@dataclass(eq=False)
class Prepared(Kept):
    """One problem of a loss, ready for new data of the same shape."""

    batch_plates: tuple[str, ...]
    example: Tensor  # a position, [*batch, D]
    watched: Watched
    ignored: set[str]  # what changes at every call, shared by all problems of a cache
    num_calls: int = 0
    differentiable: dict[int, DifferentiableDensity | None] = field(default_factory=dict)  # by K

    @property
    def layout(self) -> Layout:
        """Layout of the model's latents."""
        return self.problem.layout

    def serves(self, tensors: Mapping[str, Tensor]) -> bool:
        """Tells whether the recorded graph is right for these tensors, and Python as it is now."""
        return self.watched.change(self.ignored) is None and super().serves(tensors)

    def agrees(self, function: PathDensity, tensors: Mapping[str, Tensor]) -> bool:
        """Compares the recorded graph with the model as it is now, at one position."""
        density = self.problem.density
        if density.mode == "eager":
            return True  # nothing is recorded
        try:
            density.rebind(self.replacements(tensors), function).check(self.example.unsqueeze(0))
        except ValueError:
            return False
        return True

    def differentiate(self, function: PathDensity, count: int) -> DifferentiableDensity | None:
        """Records both log densities of K chains for autograd, once; None where that fails."""
        if count not in self.differentiable:
            found = None
            if self.problem.density.mode != "eager":
                with contextlib.suppress(Exception), own_randomness(0):  # what vmap does not know
                    found = DifferentiableDensity(function, self.example, count)
            self.differentiable[count] = found
        return self.differentiable[count]


def _places(arguments: Arguments, subsamples: Any) -> dict[str, Any]:
    values = {name: site["value"] for name, site in subsamples.nodes.items()}
    return {"arguments": arguments, "subsamples": values}


class ProblemCache:
    """Prepares problems once per model, guide, shape of the arguments, and scales of sites.

    The captured graph reads the tensors among the arguments, the subsamples and the parameters.
    Where a value of one of them left the recording (a branch on the minibatch, a parameter turned
    into a number), the graph serves the data and parameters for which that value is the same; for
    others it is recorded anew, and several recordings are kept. A graph without such exits serves
    all. What no tensor says (attributes, closures, globals of Python) is watched for changes
    (:class:`~pyro_anneal.problems.watched.Watched`). Where that is too much, or changes at every call,
    the graph is compared with the model at one point per call instead, else at calls 2, 4, 8 and so
    on. Where the two differ, the density is recorded anew and, with a warning, compared at every call.

    Args:
        num_chains: Number K of chains.
        compile: Whether chunks of steps are to be compiled, for
            :func:`~pyro_anneal.compiled.choice.with_loop`; the cache itself only records.
        size: Number of problems to keep.
    """

    def __init__(self, num_chains: int, *, compile: bool | Literal["auto"], size: int = 4) -> None:
        self.num_chains = num_chains
        self.compile = compile
        self._kept: KeptProblems[Prepared] = KeptProblems(size)
        self._changes: Counter[str] = Counter()
        self._ignored: set[str] = set()
        self._always = False  # whether every call is compared with the model

    def get(
        self, model: Fn, guide: Fn, arguments: Arguments, subsamples: Any, scales: Scales
    ) -> tuple[Prepared, Any]:
        """Returns the problem and its density of K chains at these arguments.

        Args:
            model: Pyro model.
            guide: Pyro guide.
            arguments: ``(args, kwargs)`` of both.
            subsamples: Trace of the subsampling sites.
            scales: The scales of all sites, as they are at this call.

        Returns:
            The prepared problem, and the captured density on the present data and parameters.

        Raises:
            ValueError: As :func:`~pyro_anneal.problems.problem.prepare`.
        """
        prepared, tensors = self.prepared(model, guide, arguments, subsamples, scales)
        common = scales.is_common
        density = prepared.problem.density
        if prepared.num_calls == 1:
            return prepared, density
        if density.mode == "eager":
            fresh = self._prepare(model, guide, arguments, subsamples, tensors, common)
            return fresh, fresh.problem.density
        return prepared, density.rebind(prepared.replacements(tensors))

    def prepared(
        self, model: Fn, guide: Fn, arguments: Arguments, subsamples: Any, scales: Scales
    ) -> tuple[Prepared, dict[str, Tensor]]:
        """Returns a problem that serves these arguments, and the tensors among them."""
        places = _places(arguments, subsamples)
        tensors, key = tensors_of(places), key_of((model, guide), places)
        key = None if key is None else (*key, scales.key)
        common = scales.is_common
        found = self._kept.find(key, tensors)
        if found is not None and self._is_due(found):
            with own_randomness(0):
                function = self.function(found, model, guide, arguments, subsamples, common)
                agrees = found.agrees(function, tensors)
            if not agrees:
                self._always = self._warn_of_hidden_values()
                found = None
        if found is None:
            self._count_changes(key)
            found = self._prepare(model, guide, arguments, subsamples, tensors, common)
            self._kept.add(key, found)
        found.num_calls += 1
        return found, tensors

    def _is_due(self, found: Prepared) -> bool:
        """Tells whether a graph is to be compared with the model at the coming call."""
        number = found.num_calls + 1
        unseen = bool(self._ignored) or self._always or not found.watched.is_complete
        return unseen or number & (number - 1) == 0

    def _warn_of_hidden_values(self) -> bool:
        if not (self._always or self._ignored):
            warnings.warn(
                "the density that was recorded is no longer that of the model: it depends on values "
                "that cannot be watched (a file, the environment, a library's state); from now on "
                "it is compared with the model at one point per call. Pass what the densities "
                "depend on as a tensor among the arguments",
                RuntimeWarning,
                stacklevel=2,
            )
        return True

    def _count_changes(self, key: Any) -> None:
        """Ignores what changes again and again, and says so."""
        last = self._kept.last(key)
        change = None if last is None else last.watched.change(self._ignored)
        if change is None:
            return
        self._changes[change] += 1
        if self._changes[change] > _PATIENCE:
            self._ignored.add(change)
            warnings.warn(
                f"{change}, which model or guide can reach, changes from call to call, and a "
                "density would be recorded anew each time; from now on the recorded one is "
                "compared with the model at one point per call instead. Pass what the densities "
                "depend on as a tensor among the arguments, and keep counters and outputs outside",
                RuntimeWarning,
                stacklevel=2,
            )

    @staticmethod
    def function(
        prepared: Prepared,
        model: Fn,
        guide: Fn,
        arguments: Arguments,
        subsamples: Any,
        common_scale: bool,
    ) -> PathDensity:
        """Returns one chain's densities on the present data, through Pyro."""
        fixed = FixedBatch(subsamples, common_scale=common_scale)
        layout, wrapped = prepared.layout, _keep_kind(fixed, guide)
        if layout.derived:
            names = [site.name for site in layout.derived]
            transport = Transport(fixed(model), wrapped, arguments, names)
            derived = TransportDensity(transport, layout, arguments)
            return PathDensity(derived, PriorBase(derived))
        density = ModelDensity(fixed(model), layout, arguments)
        return PathDensity(density, GuideBase(wrapped, density, arguments))

    def _prepare(
        self,
        model: Fn,
        guide: Fn,
        arguments: Arguments,
        subsamples: Any,
        tensors: dict[str, Tensor],
        common_scale: bool,
    ) -> Prepared:
        with own_randomness(0):  # a training that goes on in another process prepares anew
            return self._prepared_anew(model, guide, arguments, subsamples, tensors, common_scale)

    def _prepared_anew(
        self,
        model: Fn,
        guide: Fn,
        arguments: Arguments,
        subsamples: Any,
        tensors: dict[str, Tensor],
        common_scale: bool,
    ) -> Prepared:
        fixed = FixedBatch(subsamples, common_scale=common_scale)
        problem = prepare(
            fixed(model),
            _keep_kind(fixed, guide),
            arguments,
            arguments,
            num_chains=self.num_chains,
            batch_plates="auto",
            compile=False,
            native=self.compile is not False,
            seed=0,
            widen=False,
        )
        if lattice_of(problem.layout) is not None:
            sites = problem.layout.sites
            name = next(s.name for s in sites if isinstance(s.transform, DiscreteMap))
            raise ValueError(
                f'latent site "{name}" is discrete, and this loss moves continuous ones: mark it with '
                'infer={"enumerate": "parallel"}, or use TVO or IWAE'
            )
        plates = tuple(plate.name for plate in problem.layout.batch)
        example = problem.draw(1)[0].nan_to_num()
        return Prepared(
            problem,
            tensors,
            (model, guide, arguments),
            plates,
            example,
            Watched(model, guide),
            self._ignored,
        )


def _keep_kind(fixed: FixedBatch, guide: Fn) -> Fn:
    """Wraps a guide, but leaves an AutoGuide what it is: the engine asks for its kind."""
    wrapped: Fn = guide if is_autoguide(guide) else fixed(guide)
    return wrapped


def pack_draws(prepared: Prepared, traces: list[Any], num_particles: int) -> Tensor:
    """Packs the guide's draws into positions ``[K, *batch, D]``.

    Args:
        prepared: The problem.
        traces: Guide traces, one in the particle plate or one per particle.
        num_particles: Number K of particles.
    """
    layout = prepared.layout
    values = {}
    for site in layout.sites:
        name = site.name.removeprefix(TRANSPORT)
        draws = [trace.nodes[name]["value"] for trace in traces]
        value = draws[0] if len(draws) == 1 and num_particles > 1 else torch.stack(draws)
        # In the particle plate there may be axes of size 1 between it and the site's own.
        values[site.name] = value.expand(
            num_particles, *[1] * (value.dim() - 1 - len(site.value_shape)), *site.value_shape
        ).reshape(num_particles, *site.value_shape)
    packed: Tensor = map_chains(prepared.problem.model.pack, values, numbers=1)
    return packed.to(layout.dtype)


def particle_values(
    prepared: Prepared, model: ModelDensity, position: Tensor, max_plate_nesting: float | None
) -> dict[str, Tensor]:
    """Unpacks positions ``[K, *batch, D]`` to sites' values, particles first.

    Args:
        prepared: The problem.
        model: The model's side of the densities.
        position: Positions of K chains.
        max_plate_nesting: With the particle plate, where it is; None to keep K leading.

    Returns:
        Values by site; in the particle plate's dimension if there is one.
    """
    layout = prepared.layout
    values = map_chains(model.unpack, position, numbers=1)
    if max_plate_nesting is None:
        return dict(values)
    shaped = {}
    for site in layout.model_sites:
        value = values[site.name]
        gap = int(max_plate_nesting) - 1 - len(site.batch_shape)
        shaped[site.name] = value.reshape(len(value), *[1] * gap, *site.value_shape)
    return shaped


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Hides what runs inside from enclosing handlers, and takes no gradients."""
    with torch.no_grad(), poutine.block():
        yield
