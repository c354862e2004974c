"""A model and a base put together: draws, values of sites, and who is to blame for a bad start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pyro import poutine
from torch import Tensor

from ..graphs.captured_density import CapturedDensity
from ..graphs.evaluation import LINALG_ERROR, FailuresAsNaN
from ..graphs.recorded import RecordedDensity
from ..kernels import State
from ..models.discrete import DiscreteMap, is_discrete
from ..models.precision import in_float64
from ..models.sites import Layout, latent_sites, mark_points, observed_sites
from ..models.supports import normalized_support
from ..models.transport import Transport, TransportDensity
from ..models.types import Fn
from ..models.validation import validation_disabled
from .bases import (
    Arguments,
    Base,
    DrawsChains,
    FittedBase,
    GuideBase,
    MixtureBase,
    ModelDensity,
    PathDensity,
    PriorBase,
    StandardNormalBase,
)
from .over_chains import draw_chains, map_chains

__all__ = ["Guide", "Problem", "assemble"]


Guide = Fn | Literal["auto"] | None


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
    # After a fit, what it captured, by the sites whose coordinate is not centred.
    captured: Mapping[frozenset[str], CapturedDensity] = field(default_factory=dict)
    # kinds of bases whose noise is torch's own
    vouched: set[str] = field(default_factory=lambda: {FittedBase.__name__})

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
        if isinstance(base, MixtureBase) and isinstance(base.first, DrawsChains):
            parts = self._draw(base.first, num_chains), self._draw(base.second, num_chains)
            position = base.mix(*parts)
        elif isinstance(base, DrawsChains):
            position = base.draw_chains(num_chains)
        else:
            position = self._draw_by_function(base, num_chains)
        position = position.to(self.layout.dtype)
        return torch.where(position.isfinite().all(-1, keepdim=True), position, torch.nan)

    def _draw_by_function(self, base: Base, num_chains: int) -> Tensor:
        """Draws for K chains by a function of one chain, by one call of it where that can be."""
        return draw_chains(
            base.draw,
            num_chains,
            numbers=self._numbers,
            device=self.layout.device,
            alone=lambda: self._draw_one(base),
            vouched=self.vouched,
            kind=_kind_of_noise(base),
        )

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
                more="; where the start rarely draws what the model allows, pass more chains, "
                f"num_chains={32 * len(ratio)}",
            )

    def _raise(self, position: Tensor, problem: str, more: str = "") -> None:
        sites = self._culprits(position)
        named = f"at site(s) {sites} the log density" if sites else "the log density"
        moving = sorted(set(self.model.layout.guarded).intersection(sites))
        remedy = (
            f"the support of {moving} depends on latents, and no start allows the data: pass a guide "
            "whose draws do"
            if moving and "no finite" in problem
            else "check the data for NaN or values outside the support, and the guide for mass where "
            "the model has none, or for draws that round to the edge of a support"
        )
        raise ValueError(f"{named} {problem}: {remedy}{more}")

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


def _kind_of_noise(base: Base) -> str:
    """Tells apart where the noise of draws comes from: what is fitted here draws torch's own."""
    if isinstance(base, MixtureBase) and isinstance(base.first, FittedBase):
        return _kind_of_noise(base.second)
    return type(base).__name__


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
