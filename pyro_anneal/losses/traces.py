r"""From runs of a model and a guide to log-weights per datum.

A loss sees K particles as two tensors of shape ``[K, *batch]``, the log joint density
:math:`\log p(x, z_k)` and the log density of the guide :math:`\log q(z_k \mid x)`. What Pyro knows
beyond that is settled here:

* **Plates** that enclose every sample site of model and guide are the batch. All other dimensions
  are summed, so that a log-mean-exp over particles is taken inside the batch plates, and once over
  the whole model where there are none (global latents, joint AutoGuides).
* **Scales.** The subsampling factor N/B of a batch plate, and a ``poutine.scale`` common to all
  sites, multiply the bound of a datum from outside: a minibatch is then unbiased for the bound of
  the full data. A scale of single sites multiplies their log densities, inside the weight.
* **Masks** act on the log density of their site. **Subsamples** are shared by all particles.
* **Enumerated** sites of the model are summed out of the joint density.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor

from ..sites import base_distribution, is_deterministic, latent_sites, sum_to_batch

__all__ = [
    "EnumerationNeeded",
    "Gates",
    "Particles",
    "Run",
    "Sampling",
    "collect",
    "run_guide",
    "warn_once",
]

PARTICLE_PLATE = "num_particles_vectorized"  # the name that Pyro's ELBO gives it
Fn = Callable[..., Any]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Site = dict[str, Any]

Sampling = Literal["pathwise", "score", "gated"]
"""How gradients pass through a guide's samples: freely, never, or until the gates close."""


class Gates(Messenger):  # type: ignore[misc]
    """Puts a gate behind each sample of a guide, through which gradients pass until it closes.

    With the gates open, differentiating a log-weight with respect to the gates' ``outputs`` gives
    total derivatives along the sampling path. With the gates closed, the same log-weight behaves
    as if all samples were constants, and ``inputs`` are the samples as functions of the guide's
    parameters alone. It must enclose the trace that is to record the outputs.
    """

    def __init__(self, *, closed: bool = False) -> None:
        super().__init__()
        self.closed = closed
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def clear(self) -> None:
        """Forgets the samples of an abandoned run."""
        self.inputs.clear()
        self.outputs.clear()

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if msg["is_observed"] or not isinstance(value, Tensor) or not value.requires_grad:
            return
        if self.closed:
            msg["value"] = value.detach()
            return
        gated = value.clone()
        gated.register_hook(lambda grad: torch.zeros_like(grad) if self.closed else grad)
        self.inputs.append(value)
        self.outputs.append(gated)
        msg["value"] = gated


class Run(NamedTuple):
    """One run of a guide and of the model replayed against it."""

    model: Any  # traces without subsampling sites
    guide: Any
    subsamples: Any  # trace of the subsampling sites alone


@dataclass(frozen=True, kw_only=True, eq=False)
class Particles:
    """K particles of one loss evaluation."""

    log_joint: Tensor  # log p(x, z), nats, [K, *batch]
    log_guide: Tensor  # log q(z | x), nats, [K, *batch]
    score: Tensor | None  # log density of the draws that gradients do not reach, [K, *batch]
    score_sites: tuple[str, ...]  # where those are
    altered_sites: tuple[str, ...]  # guide sites with a mask or an inner scale
    scale: Tensor | float  # multiplies each datum's bound, [*batch]
    runs: tuple[Run, ...]
    gates: Gates | None
    notes: tuple[str, ...] = field(default=())  # why the objective is no bound

    @cached_property
    def log_weights(self) -> Tensor:
        """Log-weights in nats, shape ``[K, *batch]``."""
        return self.log_joint - self.log_guide

    def total(self, value: Tensor) -> Tensor:
        """Sums a value per datum, ``[..., *batch]``, with its scale, to a scalar."""
        return (value * self.scale).sum()


def _site_kind(fn: Any) -> str:
    return type(base_distribution(fn)).__name__


def _density_sites(trace: Any) -> Iterator[tuple[str, Site]]:
    """Iterates over the sample sites that carry a density."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site_is_subsample(site) and not is_deterministic(site):
            yield name, site


class EnumerationNeeded(Exception):  # a request, caught by the caller
    """A model has sites to sum out, but no dimensions were set aside for them."""


def _has_enumerated(model_trace: Any, guide_trace: Any) -> bool:
    return any(
        site["infer"].get("enumerate") == "parallel"
        for name, site in latent_sites(model_trace).items()
        if name not in guide_trace.nodes
    )


def _subsamples(*traces: Any) -> Any:
    result = poutine.Trace()
    for trace in traces:
        for name, site in trace.nodes.items():
            if site_is_subsample(site) and name not in result:
                result.add_node(name, **site.copy())
    return result


def run_guide(
    model: Fn,
    guide: Fn,
    model_arguments: Arguments,
    guide_arguments: Arguments,
    *,
    gates: Gates | None = None,
    shared: Any = None,
    first_enumeration_dim: int | None = None,
    max_plate_nesting: float = math.inf,
    model_context: Callable[[], Any] = contextlib.nullcontext,
) -> Run:
    """Runs a guide, and the model replayed against it.

    Args:
        model: Pyro model, wrapped in the particle plate if there is one.
        guide: Pyro guide, likewise.
        model_arguments: ``(args, kwargs)`` of the model.
        guide_arguments: ``(args, kwargs)`` of the guide.
        gates: What stands behind the guide's samples.
        shared: Trace of subsampling sites to reuse, from the first particle.
        first_enumeration_dim: Where enumeration of the model's sites may allocate dimensions.
        max_plate_nesting: As for Pyro's losses, for validation.
        model_context: Context in which the model runs.

    Returns:
        Both traces, with log densities.

    Raises:
        EnumerationNeeded: If the model has sites to sum out and ``first_enumeration_dim`` is None.
        ValueError: If a latent site of the model is not in the guide.
        NotImplementedError: If a site is enumerated in the guide, or a ``GuideMessenger`` or a flow
            does not allow for gates.
    """
    args, kwargs = guide_arguments
    messenger = poutine.unwrap(guide)
    with contextlib.nullcontext() if shared is None else poutine.replay(trace=shared):
        if isinstance(messenger, Messenger):
            if gates is not None:
                raise NotImplementedError(
                    f"{type(messenger).__name__} samples inside the model, where gradients cannot "
                    'be held back: use gradient="reparam" or "auto", or a guide function'
                )
            guide(*args, **kwargs)
            model_trace, guide_trace = messenger.get_traces()
        else:
            with gates or contextlib.nullcontext():
                guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            replayed = poutine.replay(model, trace=guide_trace)
            if first_enumeration_dim is not None:
                replayed = poutine.enum(replayed, first_available_dim=first_enumeration_dim)
            args, kwargs = model_arguments
            with model_context():
                model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
    if first_enumeration_dim is None and _has_enumerated(model_trace, guide_trace):
        raise EnumerationNeeded
    _check_sites(model_trace, guide_trace)
    if is_validation_enabled():
        check_model_guide_match(model_trace, guide_trace, max_plate_nesting)
    subsamples = _subsamples(guide_trace, model_trace)
    model_trace = prune_subsample_sites(model_trace)
    guide_trace = prune_subsample_sites(guide_trace)
    with model_context():
        model_trace.compute_log_prob()
    _compute_score_parts(guide_trace, gated=gates is not None)
    if is_validation_enabled():
        for trace in (model_trace, guide_trace):
            for site in trace.nodes.values():
                if site["type"] == "sample":
                    check_site_shape(site, max_plate_nesting)
    return Run(model_trace, guide_trace, subsamples)


def _compute_score_parts(trace: Any, *, gated: bool) -> None:
    for name, site in _density_sites(trace):
        one = poutine.Trace()
        one.nodes[name] = site
        try:
            one.compute_score_parts()
        except (KeyError, NotImplementedError) as error:
            if not gated:
                raise
            raise NotImplementedError(
                f'guide site "{name}" ({_site_kind(site["fn"])}) has no log density at a fixed '
                f"value ({error}): this gradient needs one, and a flow without an inverse has "
                'none; use gradient="reparam"'
            ) from error


def collect(
    runs: Sequence[Run],
    *,
    num_particles: int,
    vectorized: bool,
    sampling: Sampling,
    gates: Gates | None = None,
    batch_plates: Sequence[str] | None = None,
) -> Particles:
    """Reduces runs to log-weights per datum.

    Args:
        runs: One run in the particle plate, or one run per particle.
        num_particles: Number K of particles.
        vectorized: Whether the one run holds K particles in the particle plate.
        sampling: How the guide's samples were treated.
        gates: The gates, if ``sampling`` is ``"gated"``.
        batch_plates: Names of the plates that are the batch, where they were found before.

    Returns:
        The particles.

    Raises:
        NotImplementedError: If a scale does not commute with summing a site out.
    """
    batch = _batch_plates(runs)
    if batch_plates is not None:
        batch = {n: f for n, f in batch.items() if n in batch_plates or n == PARTICLE_PLATE}
    scales = _Scales(runs, batch)
    plates = [frame for frame in batch.values() if frame.name != PARTICLE_PLATE]
    dims = [frame.dim for frame in plates]
    shape = torch.Size(_size(frame, runs) for frame in plates)
    particle_dim = [batch[PARTICLE_PLATE].dim] if vectorized else []
    reducer = _Reducer(
        particle_dim + dims, torch.Size([num_particles] if vectorized else []) + shape, scales
    )
    parts = [_reduce_run(run, reducer, sampling) for run in runs]
    score_sites = tuple(dict.fromkeys(name for part in parts for name in part.score_sites))
    score = None
    if score_sites:
        score = _stack(
            [torch.zeros_like(p.log_guide) if p.score is None else p.score for p in parts],
            vectorized,
        )
    return Particles(
        log_joint=_stack([part.log_joint for part in parts], vectorized),
        log_guide=_stack([part.log_guide for part in parts], vectorized),
        score=score,
        score_sites=score_sites,
        altered_sites=tuple(
            name
            for run in runs
            for name, site in _density_sites(run.guide)
            if site["mask"] is not None or not _same(scales.inside(site), 1.0)
        ),
        scale=scales.outside(dims, shape),
        runs=tuple(runs),
        gates=gates,
        notes=scales.notes,
    )


def _stack(values: Sequence[Tensor], vectorized: bool) -> Tensor:
    return values[0] if vectorized else torch.stack(list(values))


def _check_sites(model_trace: Any, guide_trace: Any) -> None:
    for name, site in latent_sites(guide_trace).items():
        if site["infer"].get("enumerate"):
            raise NotImplementedError(
                f'guide site "{name}" is marked for enumeration, but a weight needs a sample: '
                'drop the mark, or drop the site from the guide and mark it with infer={"enumerate"'
                ': "parallel"} in the model, to sum it out'
            )
    for name, site in latent_sites(model_trace).items():
        if name in guide_trace.nodes:
            continue
        if site["infer"].get("num_samples") is not None:
            raise NotImplementedError(
                f'site "{name}" is enumerated by num_samples draws, which gives no exact sum; '
                "drop num_samples, or sample the site in the guide"
            )
        if site["infer"].get("_enumerate_dim") is None:
            raise ValueError(
                f'model and guide disagree on sites: latent site "{name}" of the model is not in '
                "the guide; sample it there, or, if it is discrete, mark it with "
                'infer={"enumerate": "parallel"}'
            )


def _batch_plates(runs: Sequence[Run]) -> dict[str, Any]:
    """Finds the plates that enclose every site of all runs, by name, leftmost first."""
    common: dict[str, Any] | None = None
    for run in runs:
        for trace in (run.model, run.guide):
            for _, site in _density_sites(trace):
                frames = {f.name: f for f in site["cond_indep_stack"] if f.vectorized}
                if common is None:
                    common = frames
                common = {n: f for n, f in common.items() if n in frames and frames[n] == f}
    return dict(sorted((common or {}).items(), key=lambda item: item[1].dim))


def _size(frame: Any, runs: Sequence[Run]) -> int:
    """Returns the size of a plate; a plate made without one has that of its sites."""
    if frame.size >= 0:
        return int(frame.size)
    sizes = [
        site["unscaled_log_prob"].shape[frame.dim]
        for run in runs
        for trace in (run.model, run.guide)
        for _, site in _density_sites(trace)
        if site["unscaled_log_prob"].dim() >= -frame.dim
    ]
    return max(sizes, default=1)


def _ratio(frame: Any) -> float:
    """Computes the subsampling factor N/B of a plate."""
    if frame.full_size is None or frame.full_size == frame.size:
        return 1.0
    return float(frame.full_size) / float(frame.size)


def _same(a: Tensor | float, b: Tensor | float) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            a, b = torch.as_tensor(a), torch.as_tensor(b)
        return a is b or (a.shape == b.shape and torch.allclose(a.double(), b.double(), 1e-6))
    return math.isclose(a, b, rel_tol=1e-6)


def _varies_over(scale: Tensor | float, dims: set[int]) -> bool:
    """Tells whether a scale is constant along all dimensions but ``dims``."""
    if not isinstance(scale, Tensor):
        return True
    return all(size == 1 or axis - scale.dim() in dims for axis, size in enumerate(scale.shape))


class _Scales:
    """Splits each site's scale into a part outside the bound of a datum and one inside."""

    def __init__(self, runs: Sequence[Run], batch: Mapping[str, Any]) -> None:
        self.notes: tuple[str, ...] = ()
        self._own: dict[int, Tensor | float] = {}  # poutine.scale of a site, by id
        self._inside: dict[int, float] = {}  # subsampling of plates that are no batch
        self._ratio = 1.0
        self._common: Tensor | float = 1.0
        sites = [
            (name, site)
            for run in runs
            for trace in (run.model, run.guide)
            for name, site in _density_sites(trace)
        ]
        ratios = {name: self._common_ratio(name, sites) for name in batch}
        self._ratio = math.prod(ratios.values())
        for name, site in sites:
            frames = site["cond_indep_stack"]
            every = math.prod(_ratio(frame) for frame in frames)
            own = site["scale"] if every == 1.0 else site["scale"] / every
            inside = every / self._ratio
            self._own[id(site)] = own
            self._inside[id(site)] = 1.0 if math.isclose(inside, 1.0, rel_tol=1e-9) else inside
            if self._inside[id(site)] != 1.0 and not self.notes:
                plates = [f.name for f in frames if _ratio(f) != 1.0]
                self.notes = (
                    (
                        f"plate(s) {plates} around site {name!r} are subsampled but do not enclose "
                        "every site of model and guide: with more than one particle the estimate is "
                        "no bound on the evidence of the full data"
                    ),
                )
        owns = list(self._own.values())
        dims = {frame.dim for frame in batch.values()}
        if owns and _varies_over(owns[0], dims) and all(_same(owns[0], own) for own in owns[1:]):
            self._common = owns[0]
            self._own = dict.fromkeys(self._own, 1.0)

    @staticmethod
    def _common_ratio(plate: str, sites: list[tuple[str, Site]]) -> float:
        ratios = {_ratio(f) for _, s in sites for f in s["cond_indep_stack"] if f.name == plate}
        return ratios.pop() if len(ratios) == 1 else 1.0

    def inside(self, site: Site) -> Tensor | float:
        """Returns what multiplies the log density of a site."""
        own, inside = self._own[id(site)], self._inside[id(site)]
        if isinstance(own, float | int) and math.isclose(own, 1.0, rel_tol=1e-9):
            return inside
        return own * inside

    def outside(self, dims: Sequence[int], shape: torch.Size) -> Tensor | float:
        """Returns what multiplies the bound of each datum."""
        if not isinstance(self._common, Tensor) or self._common.dim() == 0:
            return self._common * self._ratio
        return sum_to_batch(self._common, list(dims), shape) * self._ratio


class _Reducer(NamedTuple):
    """Sums log densities to particles and batch plates."""

    dims: list[int]
    shape: torch.Size
    scales: _Scales

    def __call__(self, value: Tensor) -> Tensor:
        return sum_to_batch(value, self.dims, self.shape)

    def log_prob(self, site: Site) -> Tensor:
        """Reduces the log density of a site, masked and with its inner scale."""
        inside = self.scales.inside(site)
        if not isinstance(inside, Tensor) and inside == 1.0 and site["mask"] is None:
            return self(site["unscaled_log_prob"])
        return self(scale_and_mask(site["unscaled_log_prob"], inside, site["mask"]))


class _Reduced(NamedTuple):
    log_joint: Tensor
    log_guide: Tensor
    score: Tensor | None
    score_sites: tuple[str, ...]


def _reduce_run(run: Run, reducer: _Reducer, sampling: Sampling) -> _Reduced:
    enumerated = [
        name
        for name, site in latent_sites(run.model).items()
        if site["infer"].get("_enumerate_dim") is not None
    ]
    if enumerated:
        log_joint = _sum_out(run.model, enumerated, reducer)
    else:
        terms = [reducer.log_prob(site) for _, site in _density_sites(run.model)]
        log_joint = _sum(terms, torch.zeros(reducer.shape))
    terms = [reducer.log_prob(site) for _, site in _density_sites(run.guide)]
    log_guide = _sum(terms, log_joint)
    scores, names = [], []
    for name, site in _density_sites(run.guide):
        score = _score(name, site, sampling)
        if score is not None and score.requires_grad:
            scores.append(reducer(score))
            names.append(name)
    score = _sum(scores, log_joint) if scores else None
    return _Reduced(log_joint, log_guide, score, tuple(names))


def _sum(terms: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.stack(list(terms)).sum(0) if terms else torch.zeros_like(like)


def _score(name: str, site: Site, sampling: Sampling) -> Tensor | None:
    """Returns the log density whose gradient is the score of a draw, where one is needed."""
    score = site["score_parts"].score_function
    if not is_identically_zero(score):
        return torch.as_tensor(score)
    if sampling != "score":
        return None
    fn = base_distribution(site["fn"])
    if isinstance(fn, dist.Delta) and fn.v.requires_grad:
        raise NotImplementedError(
            f'guide site "{name}" is a Delta with a learnable location, which has no score: use '
            'gradient="reparam" or "auto"'
        )
    return site["unscaled_log_prob"]  # type: ignore[no-any-return]


def _sum_out(trace: Any, enumerated: Sequence[str], reducer: _Reducer) -> Tensor:
    """Sums enumerated sites out of the joint density, by message passing within plates."""
    trace.pack_tensors()
    enum_dims: set[str] = set()
    for name in enumerated:
        infer = trace.nodes[name]["infer"]
        enum_dims.add(infer["_dim_to_symbol"][infer["_enumerate_dim"]])
    plain: list[Tensor] = []
    factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    inner: dict[str, Tensor | float] = {}
    symbol_to_dim: dict[str, int] = {}
    for name, site in _density_sites(trace):
        frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
        symbol_to_dim.update({trace.plate_to_symbol[f.name]: f.dim for f in frames})
        term = site["packed"]["unscaled_log_prob"]
        if enum_dims.isdisjoint(term._pyro_dims):
            plain.append(reducer.log_prob(site))
            continue
        if site["mask"] is not None:
            term = packed.scale_and_mask(term, mask=site["packed"]["mask"])
        ordinal = frozenset(trace.plate_to_symbol[frame.name] for frame in frames)
        factors.setdefault(ordinal, []).append(term)
        inner[name] = reducer.scales.inside(site)
    scale = _one_scale(inner)
    for terms in contract_tensor_tree(factors, enum_dims, cache={}).values():
        for term in terms:
            plain.append(reducer(packed.unpack(term, symbol_to_dim) * scale))
    return _sum(plain, torch.zeros(reducer.shape))


def _one_scale(scales: Mapping[str, Tensor | float]) -> Tensor | float:
    """Returns the scale that all factors of an enumerated sum share."""
    first = next(iter(scales.values()))
    if isinstance(first, Tensor) and first.dim():
        raise NotImplementedError(
            f"sites {list(scales)} depend on an enumerated site: only a scalar poutine.scale works"
        )
    for name, scale in scales.items():
        if not _same(first, scale):
            raise NotImplementedError(
                f'site "{name}" depends on an enumerated site and has a poutine.scale that '
                f"{next(iter(scales))!r} has not: a power of one factor does not commute with the "
                "sum; scale all such sites or none"
            )
    return first


def warn_once(notes: Sequence[str], seen: set[str]) -> None:
    """Warns of what makes the objective no bound, once per loss."""
    for note in notes:
        if note not in seen:
            seen.add(note)
            warnings.warn(note, UserWarning, stacklevel=5)
