"""Exact pairs (z, x) simulated from a model, and the arguments a guide needs to see them.

The reverse chains of a sandwich start from exact posterior samples. Simulation provides them: draw
(z, x) from the model itself, condition the model on x, and z is an exact posterior sample.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .checks import explained
from .coordinates import bijection
from .copies import explain_copies, explain_likeness, find_copies
from .edges import draw_unconstrained
from .sites import (
    base_distribution,
    density_sites,
    is_deterministic,
    is_factor,
    is_flat,
    is_point,
    mark_points,
    unmasked,
)
from .types import Arguments, Fn, Message, Node, Trace
from .validation import validation_disabled

__all__ = [
    "Arguments",
    "Conditioned",
    "MakeArgs",
    "Simulation",
    "Unobserve",
    "check_copies",
    "guide_arguments",
    "simulate",
]

MakeArgs = Callable[[dict[str, Tensor]], Arguments]


@dataclass(frozen=True, eq=False)
class Conditioned:
    """A model conditioned on data, which can be told apart from it."""

    model: Fn
    data: dict[str, Tensor]  # by site

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Runs the model on the data."""
        return poutine.condition(self.model, data=self.data)(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class Simulation:
    """One exact pair, drawn from the model."""

    latents: dict[str, Tensor]  # by site, enumerated ones included
    observed: dict[str, Tensor]  # by site
    original: dict[str, Tensor]  # the user's values of the observed sites
    log_joint: float  # log p(z, x) at the simulation, masked sites left out, nats
    unconstrained: dict[str, Tensor]  # of latents with mass at an edge, as they were drawn in u


class Unobserve(Messenger):  # type: ignore[misc, unused-ignore]
    """Draws observed sites, as ``poutine.uncondition``, but keeps deterministic ones as they are.

    A deterministic site is a Delta over its whole value, whose batch shape a plate would expand a
    second time: ``[N]`` would come back as ``[N, N]``, and all that depends on it too.
    """

    def _pyro_sample(self, msg: Message) -> None:
        if msg["is_observed"] and not is_deterministic(msg):
            msg["is_observed"] = False
            msg["infer"]["was_observed"] = True
            msg["infer"]["obs"] = msg["value"]
            msg["value"] = None
            msg["done"] = False


def _check_exact(name: str, site: Node) -> None:
    """Checks that simulating a site draws from the density that the model declares."""
    fn = base_distribution(site["fn"])
    scale = site["scale"]
    if is_factor(site):
        raise ValueError(
            f'pyro.factor("{name}") changes the joint density without being simulated, so pairs '
            "are not exact: express it as an observed site, or use run() for a lower bound"
        )
    if isinstance(scale, Tensor) or scale != 1.0:
        raise ValueError(
            f'poutine.scale acts on site "{name}": the scaled density is not the one that is '
            "simulated; remove the scale, or use run() for a lower bound"
        )
    if isinstance(fn, dist.Delta) and bool((torch.as_tensor(fn.log_density) != 0).any()):
        raise ValueError(
            f'site "{name}" is a Delta with its own log_density, which simulation does not see; '
            "express it as an observed site, or use run() for a lower bound"
        )
    if isinstance(fn, dist.ImproperUniform):
        raise ValueError(f'site "{name}" is improper (ImproperUniform) and cannot be simulated')
    if is_flat(site) and not site["infer"].get("was_observed"):
        raise ValueError(
            f'the prior of site "{name}" is flat, as a mask False leaves it without a density, and '
            "cannot be simulated: drop the mask, or use run() for a lower bound"
        )


class _CheckExact(Messenger):  # type: ignore[misc]
    """Checks each site before it is simulated."""

    def _pyro_sample(self, msg: Message) -> None:
        if site_is_subsample(msg) or is_deterministic(msg) or is_point(msg):
            return
        for frame in msg["cond_indep_stack"]:
            if frame.full_size is not None and frame.full_size != frame.size:
                raise ValueError(
                    f'plate "{frame.name}" is subsampled: pairs simulated under it are not '
                    "exact; pass a plate of the subset's own size"
                )
        _check_exact(msg["name"], msg)


class _DrawAtEdges(Messenger):  # type: ignore[misc]
    """Draws latents with mass at an edge of their support in the unconstrained coordinate."""

    def __init__(self) -> None:
        super().__init__()
        self.unconstrained: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Message) -> None:
        free = not msg["is_observed"] and not msg["done"] and msg["value"] is None
        if site_is_subsample(msg) or not free or msg["infer"].get("was_observed"):
            return
        u = draw_unconstrained(msg["fn"])
        if u is not None:
            self.unconstrained[msg["name"]] = u
            msg["value"], msg["done"] = bijection(msg["fn"])(u), True


class _Joint(NamedTuple):
    """Log density of all sites at once."""

    log_prob: float
    size: float  # sum of absolute values, which bounds the rounding error
    precision: float  # machine epsilon of the coarsest site

    def agrees_with(self, other: _Joint) -> bool:
        """Tells whether two evaluations are equal up to rounding."""
        tolerance = 1e3 * self.precision * (1.0 + self.size)
        return abs(self.log_prob - other.log_prob) <= tolerance


def _joint(trace: Trace) -> _Joint:
    total, size, precision = 0.0, 0.0, 0.0
    for name, site in density_sites(trace):
        # A copy misses the cache of transforms, whose inverse would differ by rounding.
        log_prob = site["fn"].log_prob(site["value"].clone())
        log_prob = dist.util.scale_and_mask(log_prob, mask=site["mask"])
        if not bool(log_prob.isfinite().all()):
            raise ValueError(
                f'at site "{name}" a value simulated from the model has log density '
                f"{float(log_prob.sum())}: its distribution draws values outside its support, or "
                "its parameters are not finite"
            )
        total += float(log_prob.double().sum())
        size += float(log_prob.double().abs().sum())
        precision = max(precision, torch.finfo(log_prob.dtype).eps)
    return _Joint(total, size, precision)


def simulate(model: Fn, arguments: Arguments) -> Simulation:
    """Draws (z, x) from the model, x in the shape of the user's data.

    Args:
        model: Pyro model with its observations.
        arguments: ``(args, kwargs)`` of the model, used unchanged.

    Returns:
        The simulated pair.

    Raises:
        ValueError: If simulating does not draw from the declared joint density: ``pyro.factor``,
            ``poutine.scale``, subsampled plates, a ``Delta`` with a log density, improper priors;
            or if log p(z, x) of the simulation and of the conditioned model disagree, also when
            the model's arguments hold the simulated data.
    """
    args, kwargs = arguments
    with torch.no_grad(), validation_disabled(), poutine.block():
        with explained(), _DrawAtEdges() as edges, _CheckExact():
            trace = poutine.trace(Unobserve()(model)).get_trace(*args, **kwargs)
        mark_points(trace)
        latents, observed, original, hidden = {}, {}, {}, {}
        for name, site in density_sites(trace):
            if site["infer"].get("was_observed"):
                observed[name] = site["value"]
                obs = site["infer"]["obs"]
                original[name] = torch.as_tensor(obs, device=site["value"].device)
                if site["mask"] is not None or unmasked(site["fn"]) is not site["fn"]:
                    hidden[name] = _redraw_masked(site)
            else:
                latents[name] = site["value"]
        joint = _joint(trace)

        def again(values: dict[str, Tensor], arguments: Arguments) -> _Joint:
            conditioned = poutine.condition(model, data={**latents, **values})
            trace = poutine.trace(conditioned).get_trace(*arguments[0], **arguments[1])
            mark_points(trace)
            return _joint(trace)

        _check_agreement(joint, again(observed, arguments), observed, "")
        if hidden:
            message = f" (masked entries of {sorted(hidden)} influence other sites)"
            _check_agreement(joint, again({**observed, **hidden}, arguments), observed, message)
        replaced = _overwrite(arguments, original, observed).arguments
        _check_agreement(joint, again(observed, replaced), observed, "")
    exact = {name: u for name, u in edges.unconstrained.items() if name in latents}
    return Simulation(latents, observed, original, joint.log_prob, exact)


def check_copies(model: Fn, arguments: Arguments, simulation: Simulation) -> tuple[str, ...]:
    """Checks that the densities of a simulated pair do not depend on a copy of the user's data.

    One run of the model and one of its gradient: a property of the model, so that one of several
    simulations is enough.

    Returns:
        Remarks on numbers that may have been computed from the data, and may be covariates.

    Raises:
        ValueError: If they do; it names the site and the line that reads the copy.
    """
    copies = find_copies(
        model, arguments, simulation.latents, simulation.observed, simulation.original
    )
    proven = [copy for copy in copies if not copy.like]
    if proven:
        raise ValueError(explain_copies(proven))
    return tuple(dict.fromkeys(explain_likeness(copy) for copy in copies))


def _check_agreement(
    simulated: _Joint, conditioned: _Joint, observed: Mapping[str, Tensor], detail: str
) -> None:
    if not simulated.agrees_with(conditioned):
        raise ValueError(
            f"log p(z, x) is {simulated.log_prob:.6g} at the simulation but "
            f"{conditioned.log_prob:.6g} for the model conditioned on it: the model uses its data "
            f"elsewhere than at the observed sites {sorted(observed)}{detail}, as an "
            "autoregressive mean or a normalization does; let the model use the value that "
            "pyro.sample returns"
        )


def _redraw_masked(site: Node) -> Tensor:
    """Draws the masked entries of an observed site again; the others keep their values."""
    fn, value = site["fn"], site["value"]
    keep = torch.ones((), dtype=torch.bool, device=value.device)
    masks = [(site["mask"], len(fn.event_shape))]
    while unmasked(fn) is not fn:
        base = fn.base_dist
        if isinstance(fn, dist.MaskedDistribution):
            masks.append((fn._mask, len(base.event_shape)))
        fn = base
    for mask, event_dim in masks:
        if mask is not None:
            mask = torch.as_tensor(mask, device=value.device)
            keep = keep & mask.reshape([*mask.shape, *[1] * event_dim])
    return torch.where(keep, value, site["fn"].sample())


def _addresses(value: Tensor) -> Tensor:
    """Computes the address of each element in memory, in the order of ``flatten``."""
    address = torch.zeros((), dtype=torch.long, device="cpu")
    for size, stride in zip(value.shape, value.stride(), strict=True):
        address = address.unsqueeze(-1) + stride * torch.arange(size, device="cpu")
    return value.data_ptr() + value.element_size() * address.flatten()


def _as_tensor(leaf: object) -> Tensor | None:
    """Views a tensor or a NumPy array as a tensor that shares its memory; None for the rest."""
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of read-only arrays: this one is read
            leaf = torch.as_tensor(leaf, device="cpu")
    if not isinstance(leaf, Tensor):
        return None
    return leaf if leaf.layout == torch.strided and leaf.numel() > 0 else None


class _Overwritten(NamedTuple):
    """Arguments with simulated values in place of the observed ones."""

    arguments: Arguments
    complete: set[str]  # sites all of whose elements were found in some argument
    disputed: set[str]  # sites two of whose elements, or another site's, share memory


def _overwrite(
    arguments: Arguments, original: Mapping[str, Tensor], observed: Mapping[str, Tensor]
) -> _Overwritten:
    """Writes simulated data over the observed values wherever the arguments hold them.

    Arguments that share no element with an observed value are kept as they are.
    """
    complete: set[str] = set()
    disputed: set[str] = set()

    def replace(leaf: object) -> object:
        tensor = _as_tensor(leaf)
        if tensor is None:
            return leaf
        where = _addresses(tensor)
        claimed = torch.zeros_like(where, dtype=torch.bool)
        flat = tensor.detach().clone().flatten()
        for name, value in original.items():
            same_kind = value.device == tensor.device and value.dtype == tensor.dtype
            if not same_kind or value.numel() != observed[name].numel() or value.numel() == 0:
                continue
            order = _addresses(value).sort()
            slot = torch.searchsorted(order.values, where).clamp(max=len(order.values) - 1)
            found = order.values[slot] == where
            if not bool(found.any()):
                continue
            if bool((found & claimed).any()) or bool((order.values.diff() == 0).any()):
                disputed.add(name)
                continue
            claimed |= found
            simulated = observed[name].flatten()[order.indices[slot[found]].to(tensor.device)]
            flat[found.to(tensor.device)] = simulated.to(tensor.dtype)
            if int(found.sum()) >= value.numel():
                complete.add(name)
        if not bool(claimed.any()):
            return leaf
        new = flat.reshape(tensor.shape)
        return new if isinstance(leaf, Tensor) else new.numpy()

    return _Overwritten(tree_map(replace, arguments), complete, disputed)


def guide_arguments(
    arguments: Arguments,
    simulation: Simulation,
    make_args: MakeArgs | None = None,
) -> Arguments:
    """Puts the simulated data in place of the user's in the arguments, for the guide alone.

    Tensors and arrays are looked for in nested lists, tuples and dictionaries too. Wherever their
    memory is that of an observed value (the same tensor, a view, a slice), the simulated values
    are written over a copy; whatever shares no element with one (covariates) is kept.

    Args:
        arguments: The user's ``(args, kwargs)``.
        simulation: The simulated pair, with the original observations.
        make_args: The user's own rule, which then decides alone.

    Returns:
        Arguments for the guide.

    Raises:
        ValueError: If there are arguments, but an observed value is in none of them: one may be a
            copy or a transform of it; or if two sites observe the same element.
    """
    if make_args is not None:
        return make_args(simulation.observed)
    new = _overwrite(arguments, simulation.original, simulation.observed)
    if new.disputed:
        raise ValueError(
            f"observed site(s) {sorted(new.disputed)} share memory with another site, or within "
            "themselves (expand), so it is ambiguous which simulated value the guide should see; "
            "pass "
            "make_args=lambda observed: (args, kwargs)"
        )
    plain = (bool, int, float, complex, str, bytes, type(None))
    could_hold_data = any(not isinstance(leaf, plain) for leaf in tree_leaves(arguments))
    missing = [name for name in simulation.original if name not in new.complete]
    if could_hold_data and missing:
        raise ValueError(
            f"no argument of the guide holds the value of observed site(s) {missing} (it may be a "
            "copy or a transform of one), so the guide cannot be shown the simulated data; pass "
            "make_args=lambda observed: (args, kwargs)"
        )
    return new.arguments
