"""One annealing problem: a model and a base at given arguments, captured and checked."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from pyro import poutine
from torch import Tensor

from ..graphs.captured import capture
from ..graphs.evaluation import LINALG_ERROR, FailuresAsNaN, evaluate_or_nan
from ..graphs.purity import undisturbed
from ..graphs.recorded import RecordedDensity
from ..graphs.rewriting import Impure
from ..kernels import State
from ..models.autoguides import check_guide
from ..models.checks import hidden_sites
from ..models.discrete import DiscreteMap, is_discrete
from ..models.inspection import inspect_model
from ..models.precision import in_float64
from ..models.sites import Layout, latent_sites, mark_points, observed_sites
from ..models.supports import normalized_support
from ..models.transport import Transport, TransportDensity, inspect_transport, is_transport
from ..models.types import Fn
from ..models.validation import validation_disabled
from .bases import (
    Arguments,
    Base,
    GuideBase,
    MixtureBase,
    ModelDensity,
    PathDensity,
    PriorBase,
    StandardNormalBase,
)
from .content import Remembered, content_of
from .coupling import find_coupling
from .discrete import lattice_of, lift
from .fitted import FittedStart, Once, fit_start
from .over_chains import draw_chains, map_chains
from .precision import why_float64

__all__ = ["MakeStart", "Problem", "assemble", "finish", "prepare", "reason_for_float64"]

Guide = Fn | Literal["auto"] | None
MakeStart = Callable[[ModelDensity, Tensor], FittedStart]  # from the model and a finite position


@dataclass(frozen=True, eq=False)
class Problem:
    """A model and a base, ready to be annealed."""

    layout: Layout
    model: ModelDensity
    base: Base
    function: PathDensity  # one chain, through Pyro
    density: RecordedDensity  # of K chains
    fit_gradients: int  # spent on guide="auto", per batch element
    inspected: Layout  # before a fit chose coordinates
    from_prior: Callable[[], Any] | None = None  # density of the path from the prior, after a fit
    vouched: set[str] = field(default_factory=set)  # kinds of bases whose noise is torch's own

    def draw(self, num_chains: int) -> Tensor:
        """Draws positions ``[K, *batch, D]`` from the base.

        A draw outside the model's support, or one for which the model raises, has no density: its
        position is NaN and its weight zero. Drawing again would start from a truncated base whose
        normalizer nobody knows, and overstate the evidence.
        """
        return self._draw(self.base, num_chains)

    def draw_prior(self, num_chains: int) -> Tensor:
        """Draws positions ``[K, *batch, D]`` from the model's prior, likewise."""
        return self._draw(PriorBase(self.model), num_chains)

    def _draw(self, base: Base, num_chains: int) -> Tensor:
        position = draw_chains(
            base.draw,
            num_chains,
            numbers=self._numbers,
            device=self.layout.device,
            alone=lambda: self._draw_one(base),
            vouched=self.vouched,
            kind=type(base).__name__,
        ).to(self.layout.dtype)
        return torch.where(position.isfinite().all(-1, keepdim=True), position, torch.nan)

    @property
    def _numbers(self) -> int:
        """Numbers in the largest tensor of one chain, as far as is known."""
        observed = [value.numel() for value in self.layout.observed.values()]
        return max([*observed, self.layout.batch_shape.numel() * self.layout.dim])

    def _draw_one(self, base: Base) -> Tensor:
        layout = self.layout
        try:
            position = base.draw().to(layout.dtype)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            shape = (*layout.batch_shape, layout.dim)
            position = torch.full(shape, torch.nan, dtype=layout.dtype, device=layout.device)
        return torch.where(position.isfinite().all(-1, keepdim=True), position, torch.nan)

    def probe(self, *, num_tries: int = 100) -> Tensor:
        """Finds a finite position ``[*batch, D]`` to look at the densities: not a draw of the base.

        Batch elements are filled from several draws; zeros where none was finite.
        """
        with torch.no_grad():
            position = self._draw_one(self.base)
            for _ in range(num_tries):
                if bool(position.isfinite().all()):
                    break
                position = torch.where(position.isfinite(), position, self._draw_one(self.base))
        return position.nan_to_num()

    def unpack(self, position: Tensor) -> dict[str, Tensor]:
        """Computes sites' values, ``[K, *value_shape]``, in the model's own space."""
        names = [site.name for site in self.layout.model_sites]

        def values(chain: Tensor) -> dict[str, Tensor]:
            try:
                found = self.model.unpack(chain)
            except (
                LINALG_ERROR
            ):  # of a likelihood, say: the values of latents are known all the same
                with FailuresAsNaN():
                    found = self.model.unpack(chain)
            return {name: found[name] for name in names}

        with torch.no_grad():
            unpacked: dict[str, Tensor] = map_chains(values, position, numbers=self._numbers)
        return unpacked

    def pack(self, values: dict[str, Tensor], exact: dict[str, Tensor] | None = None) -> Tensor:
        """Packs one value of each latent site into ``[*batch, D]``, where known from its u."""
        sites = {site.name for site in self.layout.sites}
        exact = {name: u for name, u in (exact or {}).items() if name in sites}
        with torch.no_grad():
            return self.model.pack(values, exact).to(self.layout.dtype)

    def pack_chains(self, values: Mapping[str, Tensor]) -> Tensor:
        """Packs K values of each latent site, ``[K, *value_shape]``, into ``[K, *batch, D]``."""
        with torch.no_grad():
            packed: Tensor = map_chains(self.model.pack, values, numbers=self._numbers)
        return packed.to(self.layout.dtype)

    def check_supports(self, values: Mapping[str, Tensor]) -> None:
        """Checks that K values of each site lie inside its support.

        Raises:
            ValueError: If one does not; names the site.
        """
        for site in self.layout.sites:  # before the model looks a category up
            transform = site.transform
            if isinstance(transform, DiscreteMap) and transform.kind == "index":
                value = values[site.name]
                if bool(((value < transform.lower) | (value > transform.upper)).any()):
                    raise ValueError(
                        f'a posterior sample of site "{site.name}" lies outside its support: '
                        f"it has {transform.size} categories, from 0"
                    )
        args, kwargs = self.model.arguments
        supports = {}

        def inside(chain: dict[str, Tensor]) -> dict[str, Tensor]:
            model = poutine.condition(self.model.model, data=chain)
            trace = poutine.trace(model).get_trace(*args, **kwargs)
            found = {}
            for name, value in chain.items():
                fn = trace.nodes[name]["fn"]
                supports[name] = fn.support if is_discrete(fn) else normalized_support(fn)
                found[name] = supports[name].check(value).all()
            return found

        wide = in_float64(self.layout.wide)
        with torch.no_grad(), validation_disabled(), poutine.block(), wide:
            all_inside = map_chains(inside, values, numbers=self._numbers)
        for name, flags in all_inside.items():
            if not bool(flags.all()):
                raise ValueError(
                    f'a posterior sample of site "{name}" lies outside its support {supports[name]}'
                )

    def log_likelihood(self, position: Tensor) -> Tensor:
        """Computes log p(x | z) of one chain, enumerated sites summed out, ``[*batch]``."""
        with torch.no_grad(), validation_disabled():
            evaluation = self.model.evaluate(position)
        return evaluation.log_joint - evaluation.log_prior

    def check_start(self, state: State, *, is_all: bool = True) -> None:
        """Checks the log densities at the start of forward chains.

        Args:
            state: The chains' state.
            is_all: Whether these are all chains of the run, so that one of each batch element must
                have a density.

        Raises:
            ValueError: If a log density is +inf, or no chain of a batch element has any.
        """
        ratio = state.log_ratio()
        infinite = (state.log_target == torch.inf) | (state.log_base == torch.inf)
        infinite |= (state.log_base == -torch.inf) & state.position.isfinite().all(-1)
        dead = ~(ratio > -torch.inf).any(dim=0)
        if bool(infinite.any()):
            chain = int(infinite.reshape(len(infinite), -1).any(1).nonzero()[0])
            self._raise(state.position[chain], "is infinite")
        if is_all and bool(dead.any()):
            element = [int(i) for i in dead.nonzero()[0]]
            where = f" (batch element {element})" if element else ""
            self._raise(
                state.position[0],
                f"has no finite value at any of the {len(ratio)} starting points{where}",
            )

    def _raise(self, position: Tensor, problem: str) -> None:
        sites = self._culprits(position)
        named = f"at site(s) {sites} the log density" if sites else "the log density"
        raise ValueError(
            f"{named} {problem}: check the data for NaN or values outside the support, and the "
            "guide for mass where the model has none, or for draws that round to the edge of a support"
        )

    def _culprits(self, position: Tensor) -> list[str]:
        """Names the sites whose log density at ``position`` is not finite."""
        culprits = []
        args, kwargs = self.model.arguments
        wide = in_float64(self.layout.wide)
        with torch.no_grad(), poutine.block(), validation_disabled(), wide:
            try:
                values = self.unpack(position.unsqueeze(0))
                data = {name: value[0] for name, value in values.items()}
                model = poutine.condition(self.model.model, data=data)
                trace = poutine.trace(model).get_trace(*args, **kwargs)
                mark_points(trace)
                for name, site in {**latent_sites(trace), **observed_sites(trace)}.items():
                    if not bool(site["fn"].log_prob(site["value"]).isfinite().all()):
                        culprits.append(name)
                hand_written = isinstance(self.base, GuideBase)
                if hand_written and not bool(self.function(position)[0].isfinite().all()):
                    culprits.append("the guide")
            except (ValueError, RuntimeError) as error:  # the model fails here
                culprits.append(str(error).splitlines()[0])
        return culprits


def prepare(
    model: Fn,
    guide: Guide,
    model_args: Arguments,
    guide_args: Arguments,
    *,
    num_chains: int,
    batch_plates: str | Sequence[str],
    compile: bool,
    seed: int,
    prior_weight: float = 0.0,
    progress: Callable[[int], object] = lambda count: None,
    max_rows: int | None = None,
    once: Once = lambda compute, name="": compute(),
    gradients: bool = True,
    make_start: MakeStart | None = None,
    native: bool = False,
    widen: bool = True,
    why_wide: str | None = None,
) -> Problem:
    """Inspects, captures and checks a model and a base.

    Args:
        model: Pyro model with its observations.
        guide: Guide, ``"auto"``, or None for the prior.
        model_args: ``(args, kwargs)`` of the model.
        guide_args: ``(args, kwargs)`` of the guide.
        num_chains: Chains K that the capture is made for; others are captured when met.
        batch_plates: ``"auto"`` or plate names.
        compile: Whether to compile the captured graph.
        seed: Seed of ``guide="auto"``.
        prior_weight: Weight of the prior mixed into the base.
        progress: Called with the steps of the automatic fit.
        max_rows: Positions that the automatic fit may evaluate at once.
        once: Calls the automatic fit, or returns what it gave before.
        gradients: Whether the chains need gradients.
        make_start: Makes the base of ``guide="auto"``, in place of the automatic fit.
        native: Whether small graphs become native code.
        widen: Whether to go to float64 where float32 is not enough.
        why_wide: Why the problem is computed in float64 whatever the model's own precision.

    Returns:
        The problem.

    Raises:
        ValueError: For everything that :func:`~pyro_anneal.models.inspection.inspect_model` and the capture
            refuse, and if rows of a requested batch plate influence each other.
    """
    asked = (model, guide, model_args, guide_args, _options(locals()))
    if not (guide is None or guide == "auto" or callable(guide)):
        raise ValueError(f'guide must be a Pyro guide, "auto" or None, got {guide!r}')
    hand_written = None if isinstance(guide, str) else guide
    check_guide(hand_written, invertible=False)
    if hand_written is not None and is_transport(hand_written, guide_args):
        if prior_weight > 0.0:
            raise ValueError(
                "prior_weight mixes the prior into the density of the guide, which derives the "
                "model's latents from auxiliary sites: its density at draws of the prior is not "
                "known; leave prior_weight out"
            )
        model, layout = inspect_transport(
            model, hand_written, model_args, guide_args, batch_plates=batch_plates
        )
        guide = hand_written = None
    else:
        layout = inspect_model(
            model, hand_written, model_args, guide_args, batch_plates=batch_plates
        )
    if layout.improper and (guide is None or (guide == "auto" and lattice_of(layout))):
        remedy = 'use guide="auto" or a guide with a density'
        if guide == "auto":
            remedy = (
                'guide="auto" fits nothing beside discrete latents; enumerate those, or pass a '
                "guide that samples all latents"
            )
        raise ValueError(
            f"the prior of site(s) {list(layout.improper)} is improper (ImproperUniform, mask(False)) or has no draws, so "
            f"chains cannot start from it; {remedy}"
        )
    problem = assemble(model, guide, model_args, guide_args, layout)
    coupling = find_coupling(
        problem.function, layout.batch, problem.probe, is_requested=batch_plates != "auto"
    )
    if coupling.plates:
        rest = [plate.name for plate in layout.batch if plate.name not in coupling.plates]
        joint = inspect_model(model, hand_written, model_args, guide_args, batch_plates=rest)
        static = joint.is_static and not layout.derived
        layout = replace(joint, derived=layout.derived, is_static=static)
    if coupling.notes:
        layout = replace(layout, notes=(*layout.notes, *coupling.notes))
        problem = assemble(model, guide, model_args, guide_args, layout)
    if why_wide is not None:
        note = f"computed in float64: {why_wide}"
        layout = replace(layout, dtype=torch.float64, wide=True, notes=(*layout.notes, note))
        problem = assemble(model, guide, model_args, guide_args, layout)
        once = functools.partial(once, name="fit in float64")
    example = problem.probe()
    if lattice_of(layout) is not None:
        layout = lift(problem.model, example)
        if guide == "auto":
            note = 'guide="auto" fits no Gaussian beside discrete latents: chains start from the prior'
            guide, layout = None, replace(layout, notes=(*layout.notes, note))
        problem = assemble(model, guide, model_args, guide_args, layout)
    problem = finish(
        problem,
        guide,
        example,
        num_chains=num_chains,
        compile=compile,
        seed=seed,
        prior_weight=prior_weight,
        progress=progress,
        max_rows=max_rows,
        once=once,
        gradients=gradients,
        make_start=make_start,
        native=native,
    )
    if not widen or why_wide is not None or lattice_of(layout) is not None:
        return problem
    reason = reason_for_float64(problem, gradients=gradients)
    if reason is None:
        return problem
    return prepare(*asked[:4], **asked[4], why_wide=reason)


def finish(
    problem: Problem,
    guide: Guide,
    example: Tensor,
    *,
    num_chains: int,
    compile: bool,
    seed: int,
    prior_weight: float = 0.0,
    progress: Callable[[int], object] = lambda count: None,
    max_rows: int | None = None,
    once: Once = lambda compute, name="": compute(),
    gradients: bool = True,
    make_start: MakeStart | None = None,
    native: bool = False,
    made: Callable[[PathDensity], Any] | None = None,
) -> Problem:
    """Fits the base, where that is asked for, and captures the densities.

    Args:
        problem: From :func:`assemble`.
        guide: As of :func:`prepare`, like the options.
        example: A finite position, ``[*batch, D]``.
        num_chains: Likewise.
        compile: Likewise.
        seed: Likewise.
        prior_weight: Likewise.
        progress: Likewise.
        max_rows: Likewise.
        once: Likewise.
        gradients: Likewise.
        make_start: Likewise.
        native: Likewise.
        made: Makes the density of both ends for one chain into that for all; None to capture it.
    """
    with _hidden_sites_named(problem.model, problem.base):
        if guide == "auto":
            if make_start is None:
                start = fit_start(
                    problem.model,
                    example,
                    num_chains=num_chains,
                    seed=seed,
                    progress=progress,
                    max_rows=max_rows,
                    once=once,
                    native=native,
                )
            else:
                start = make_start(problem.model, example)
            problem = _started(problem, start)
            prior_weight = prior_weight or start.prior_weight
        if prior_weight > 0.0 and guide is not None:
            base = MixtureBase(problem.base, PriorBase(problem.model), prior_weight)
            problem = replace(problem, base=base, function=PathDensity(problem.model, base))
        if made is not None:
            return replace(problem, density=made(problem.function))
        density = capture(
            problem.function,
            example,
            num_chains=num_chains,
            compile=compile,
            gradients=gradients,
            native=native,
        )
    return replace(problem, density=density)


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Picks the options of :func:`prepare` that a second preparation shares."""
    positional = ("model", "guide", "model_args", "guide_args", "why_wide")
    return {name: value for name, value in given.items() if name not in positional}


# Decisions by the content of all that they depend on.
_REASONS: Remembered[str | None] = Remembered(size=64)


def reason_for_float64(problem: Problem, *, gradients: bool) -> str | None:
    """Compares a problem with itself in float64; None if float32 is enough."""
    density, function = problem.density, problem.function
    if problem.layout.dtype is not torch.float32:
        return None
    run: Callable[[Tensor], Any] = functools.partial(
        evaluate_or_nan, function, gradients=gradients
    )
    if density.native_source_and_inputs() is not None:

        def run(position: Tensor) -> Any:
            state = density(position.unsqueeze(0))
            density.num_evaluations -= 1
            return tuple(part[0] for part in state[1:])

    elif density.mode != "eager":
        graph, inputs = density.chain_graph_and_inputs()

        def run(position: Tensor) -> Any:
            return graph(position.contiguous(), *inputs)

    def decide() -> str | None:
        with undisturbed(problem.layout.device):
            torch.manual_seed(0)  # a function of model and data alone
            draws = problem.draw(8)
        return why_float64(function, run, draws, ascend=gradients)

    return _REASONS.get(content_of(density, gradients), decide)


@contextlib.contextmanager
def _hidden_sites_named(model: ModelDensity, base: Base) -> Iterator[None]:
    """Names the sites under ``poutine.block`` where a density turns out to be random."""
    try:
        yield
    except Impure as error:
        functions = [(model.model, model.arguments)]
        if isinstance(base, GuideBase):
            functions.append((base.guide, base.arguments))
        hidden = [name for function in functions for name in hidden_sites(*function)]
        if not hidden:
            raise
        raise ValueError(
            f"site(s) {hidden} are hidden by poutine.block and sampled anew at each evaluation, so "
            "that the density is random: condition them on a value inside the block, or let them "
            f"be seen ({error})"
        ) from error


def assemble(
    model: Fn,
    guide: Guide,
    model_args: Arguments,
    guide_args: Arguments,
    layout: Layout,
) -> Problem:
    """Puts a model and a base together; a base that is to be fitted is a standard normal yet."""
    kind = TransportDensity if isinstance(model, Transport) else ModelDensity
    model_density = kind(model, layout, model_args)
    base: Base
    if guide is None:
        base = PriorBase(model_density)
    elif isinstance(guide, str):  # until the Gaussian is fitted
        base = StandardNormalBase(layout)
    else:
        base = GuideBase(guide, model_density, guide_args)
    function = PathDensity(model_density, base)
    unrecorded: Any = None  # until the problem is finished
    return Problem(layout, model_density, base, function, unrecorded, 0, layout)


def _started(problem: Problem, start: FittedStart) -> Problem:
    """Replaces the prior by a fitted base, in the coordinates that suit it."""
    return replace(
        problem,
        layout=start.model.layout,
        model=start.model,
        base=start.base,
        function=PathDensity(start.model, start.base),
        fit_gradients=start.num_gradients,
        from_prior=start.from_prior,
    )
