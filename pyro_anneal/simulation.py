"""Exact pairs (z, x) simulated from a model, and the arguments a guide needs to see them.

The reverse chains of a sandwich start from exact posterior samples. Simulation provides them: draw
(z, x) from the model itself, condition the model on x, and z is an exact posterior sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .sites import base_distribution, is_deterministic, is_factor

__all__ = ["Arguments", "MakeArgs", "Simulation", "guide_arguments", "simulate"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
MakeArgs = Callable[[dict[str, Tensor]], Arguments]


@dataclass(frozen=True, eq=False)
class Simulation:
    """One exact pair, drawn from the model."""

    latents: dict[str, Tensor]  # by site, enumerated ones included
    observed: dict[str, Tensor]  # by site
    original: dict[str, Tensor]  # the user's values of the observed sites
    log_joint: Tensor  # log p(z, x) at the simulation, scalar


def _check_exact(name: str, site: Mapping[str, Any]) -> None:
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


def _joint(trace: Any) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for site in trace.nodes.values():
        if site["type"] != "sample" or site_is_subsample(site) or is_deterministic(site):
            continue
        value = site["fn"].log_prob(site["value"])
        if site["mask"] is not None:
            value = dist.util.scale_and_mask(value, mask=site["mask"])
        total = total + value.double().sum().cpu()
    return total


def simulate(model: Callable[..., Any], arguments: Arguments) -> Simulation:
    """Draws (z, x) from the model, x in the shape of the user's data.

    Args:
        model: Pyro model with its observations.
        arguments: ``(args, kwargs)`` of the model, used unchanged.

    Returns:
        The simulated pair.

    Raises:
        ValueError: If simulating does not draw from the declared joint density: ``pyro.factor``,
            ``poutine.scale``, subsampled plates, a ``Delta`` with a log density, improper priors;
            or if log p(z, x) of the simulation and of the conditioned model disagree.
    """
    args, kwargs = arguments
    with torch.no_grad(), pyro.validation_enabled(False), poutine.block():
        trace = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
        latents, observed, original = {}, {}, {}
        for name, site in trace.nodes.items():
            if site["type"] != "sample" or is_deterministic(site):
                continue
            if site_is_subsample(site):
                continue
            for frame in site["cond_indep_stack"]:
                if frame.full_size is not None and frame.full_size != frame.size:
                    raise ValueError(
                        f'plate "{frame.name}" is subsampled: pairs simulated under it are not '
                        "exact; pass a plate of the subset's own size"
                    )
            _check_exact(name, site)
            if site["infer"].get("was_observed"):
                observed[name] = site["value"]
                original[name] = torch.as_tensor(site["infer"]["obs"])
            else:
                latents[name] = site["value"]
        log_joint = _joint(trace)
        conditioned = poutine.condition(model, data={**latents, **observed})
        again = _joint(poutine.trace(conditioned).get_trace(*args, **kwargs))
    tolerance = 1e-3 + 1e-4 * abs(float(log_joint))
    if not abs(float(again) - float(log_joint)) <= tolerance:
        raise ValueError(
            f"log p(z, x) is {float(log_joint):.6g} at the simulation but {float(again):.6g} for "
            "the model conditioned on it: the model uses its data elsewhere than at the observed "
            f"sites {sorted(observed)} (an autoregressive mean, a normalization); make the model "
            "use the value that pyro.sample returns"
        )
    return Simulation(latents, observed, original, log_joint)


def _shares_storage(a: Tensor, b: Tensor) -> bool:
    return (
        a.device == b.device
        and a.numel() > 0
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    )


def guide_arguments(
    arguments: Arguments,
    simulation: Simulation,
    make_args: MakeArgs | None = None,
) -> Arguments:
    """Replaces the arguments that are the data by the simulated data, for the guide alone.

    An argument is replaced if it is, or is a reshaped view of all of, the value of one observed
    site. Arguments that share no storage with an observed value (covariates) are kept.

    Args:
        arguments: The user's ``(args, kwargs)``.
        simulation: The simulated pair, with the original observations.
        make_args: The user's own rule, which then decides alone.

    Returns:
        Arguments for the guide.

    Raises:
        ValueError: If it is ambiguous which argument holds the data.
    """
    if make_args is not None:
        return make_args(simulation.observed)
    found: set[str] = set()

    def replace(where: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        sharing = [n for n, obs in simulation.original.items() if _shares_storage(value, obs)]
        if not sharing:
            return value
        exact = [n for n in sharing if _covers(value, simulation.original[n])]
        if len(exact) != 1:
            raise ValueError(
                f"the guide's {where} shares memory with observed sites {sharing} but is not one "
                "of them, so simulated data cannot be put in its place; pass "
                "make_args=lambda observed: (args, kwargs)"
            )
        found.add(exact[0])
        return simulation.observed[exact[0]].reshape(value.shape).to(value.dtype)

    args, kwargs = arguments
    new_args = tuple(replace(f"argument {i}", value) for i, value in enumerate(args))
    new_kwargs = {name: replace(f'argument "{name}"', value) for name, value in kwargs.items()}
    tensors = any(isinstance(value, Tensor) for value in (*args, *kwargs.values()))
    missing = [name for name in simulation.original if name not in found]
    if tensors and missing:
        raise ValueError(
            f"no argument of the guide is the value of observed site(s) {missing} (it may be a "
            "copy or a transform of one), so the guide cannot be shown the simulated data; pass "
            "make_args=lambda observed: (args, kwargs)"
        )
    return new_args, new_kwargs


def _covers(value: Tensor, observed: Tensor) -> bool:
    """Tells whether two views of one storage hold the same elements in the same order."""
    return (
        value.numel() == observed.numel()
        and value.data_ptr() == observed.data_ptr()
        and value.is_contiguous()
        and observed.is_contiguous()
    )
