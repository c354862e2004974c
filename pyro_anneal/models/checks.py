"""Checks of a model's and a guide's traces; each error names the site, the plate or the shape."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from types import TracebackType
from unittest import mock

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine import runtime
from pyro.poutine.messenger import Messenger
from torch import Tensor

from .discrete import discrete_map
from .masked import reads_nan_as_missing
from .sites import (
    base_distribution,
    density_sites,
    is_factor,
    latent_sites,
    observed_sites,
    unmasked,
)
from .supports import normalized_support
from .types import Arguments, Fn, Message, Node, Support, Trace

__all__ = [
    "check_latents",
    "check_log_probs",
    "check_plates",
    "check_structure",
    "check_value_shapes",
    "explained",
    "hidden_sites",
    "outside_support",
    "support_of",
    "undeclared_axes",
]


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a value of type {type(value).__name__} (pass a tensor)"
    kind = str(value.dtype).removeprefix("torch.")
    layout = "" if value.layout == torch.strided else f" {value.layout}"
    return f"a value of shape {list(value.shape)}, {kind}, on {value.device}{layout}"


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Names the plate or the site at which Pyro fails inside, where torch's error does not."""
    try:
        yield
    except (ZeroDivisionError, RuntimeError, NotImplementedError, TypeError) as error:
        message = _explain(error.__traceback__)
        if message is None:
            raise
        raise ValueError(f"{message} ({str(error).splitlines()[0]})") from error


def _explain(traceback: TracebackType | None) -> str | None:
    """Reads from the frames of a failure which plate or improper site it was."""
    while traceback is not None:
        local = traceback.tb_frame.f_locals
        owner, size = local.get("self"), local.get("size")
        if isinstance(owner, Messenger) and isinstance(size, int) and size <= 0:
            return (
                f'plate "{local.get("name")}" has size {size}: without a row there is no evidence; '
                "pass at least one row of data, or leave the plate out"
            )
        msg = local.get("msg")
        if isinstance(msg, dict) and isinstance(msg.get("fn"), dist.ImproperUniform):
            return (
                f'site "{msg["name"]}" is an ImproperUniform, which has no normalized density and '
                "cannot be sampled; use a proper distribution here"
            )
        traceback = traceback.tb_next
    return None


def hidden_sites(function: Fn, arguments: Arguments) -> list[str]:
    """Names the sites that are sampled out of sight of handlers, under ``poutine.block``.

    Args:
        function: Model or guide.
        arguments: Its ``(args, kwargs)``.
    """
    sampled: list[str] = []
    process = runtime.default_process_message

    def record(msg: Message) -> None:
        if msg["type"] == "sample" and not msg["is_observed"] and not msg["done"]:
            sampled.append(msg["name"])
        process(msg)

    args, kwargs = arguments
    with torch.no_grad(), mock.patch.object(runtime, "default_process_message", record):
        trace = poutine.trace(function).get_trace(*args, **kwargs)
    return [name for name in dict.fromkeys(sampled) if name not in trace.nodes]


def check_log_probs(trace: Trace) -> None:
    """Computes all log densities, and checks that they are real numbers on one device."""
    sites = [*latent_sites(trace).values(), *observed_sites(trace).values()]
    device = sites[0]["value"].device
    for name, site in density_sites(trace):
        kind, value = type(base_distribution(site["fn"])).__name__, site["value"]
        if device.type == "meta" or (isinstance(value, Tensor) and value.is_meta):
            raise ValueError(f'at site "{name}": a value on the meta device holds no numbers')
        try:
            log_prob = site["fn"].log_prob(value)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            shape = [*site["fn"].batch_shape, *site["fn"].event_shape]
            raise ValueError(
                f'at site "{name}": {kind} of shape {shape} has no log density at '
                f"{_describe(value)}: {str(error).splitlines()[0]}"
            ) from error
        if log_prob.is_complex():
            raise ValueError(
                f'at site "{name}": the log density is complex; pass real data and parameters'
            )
        if log_prob.device != device:
            raise ValueError(
                f'at site "{name}": the log density is on {log_prob.device}, but the latents are '
                f"on {device}; move the model's parameters and the data to one device"
            )
    trace.compute_log_prob()


def outside_support(trace: Trace) -> dict[str, str]:
    """Finds observed values outside their support at which torch gives a finite density.

    Returns:
        What is wrong, by site. Masked values do not count.
    """
    found = {}
    for name, site in observed_sites(trace).items():
        fn, value = site["fn"], site["value"]
        if is_factor(site) or unmasked(fn) is not fn:
            continue
        if reads_nan_as_missing(fn):
            value = torch.where(value.isnan(), torch.zeros_like(value), value)
        try:
            inside = fn.support.check(value)
        except (
            NotImplementedError,
            RuntimeError,
            ValueError,
        ):  # no support, or none of this shape
            continue
        mask = True if site["mask"] is None else site["mask"]
        outside = not inside if isinstance(inside, bool) else ~inside  # a bool of a number
        wrong = outside & site["unscaled_log_prob"].isfinite()
        wrong &= torch.as_tensor(mask, device=wrong.device)
        if bool(wrong.any()):
            first = tuple(int(i) for i in wrong.nonzero()[0])
            example = value.expand(wrong.shape + fn.event_shape)[first]
            where = f"at index {list(first)}" if first else "there"
            found[name] = (
                f'at site "{name}": {int(wrong.sum())} observed value(s) lie outside the support '
                f"{fn.support} of {type(base_distribution(fn)).__name__} ({where}: "
                f"{example.tolist()}), yet have a finite log density; correct the data, or pass "
                "validate_args=False to the distribution if this density is meant"
            )
    return found


def check_plates(trace: Trace) -> None:
    """Checks that no plate is subsampled."""
    for name, site in trace.nodes.items():
        if site["type"] != "sample":
            continue
        for frame in site["cond_indep_stack"]:
            if frame.full_size is not None and frame.full_size != frame.size:
                raise ValueError(
                    f'plate "{frame.name}" is subsampled ({frame.size} of {frame.full_size}) at '
                    f'site "{name}": the evidence of a random subset is no evidence of the data; '
                    "pass the whole data set, or the subset with a plate of its own size"
                )


def undeclared_axes(name: str, site: Node, *, enumerated: bool) -> list[int]:
    """Finds the axes of a site's log density that belong to no plate, and are summed.

    The log density, not the distribution: an observed value of shape [N, 1] against a distribution
    of shape [N] gives [N, N] terms.

    Args:
        name: Name of the site.
        site: The site.
        enumerated: Whether sites are enumerated: then an axis must be known to be independent.

    Returns:
        Negative axes, from the left.

    Raises:
        ValueError: If value and distribution spread each other, which is a mistake more often than
            not, or if sites are enumerated; it names the axis and its size.
    """
    shape = site["unscaled_log_prob"].shape
    known = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
    axes = [i for i in range(-len(shape), 0) if shape[i] > 1 and i not in known]
    value = site["value"]
    spread = False
    if isinstance(value, Tensor):
        rank = max(value.dim() - len(site["fn"].event_shape), 0)
        spread = shape not in (site["fn"].batch_shape, value.shape[:rank])
    if axes and (spread or enumerated):
        axis = axes[0]
        why = "value and distribution spread each other" if spread else "sites are enumerated"
        raise ValueError(
            f'at site "{name}": log_prob has shape {list(shape)}, but axis {axis} of size '
            f"{shape[axis]} belongs to no plate, and {why}; enclose it in "
            f'pyro.plate("data", {shape[axis]}, dim={axis}) or declare it dependent with '
            f".to_event({-axis})"
        )
    return axes


def check_structure(first: Trace, second: Trace) -> None:
    """Checks that two runs of the model had the same sites."""
    names = [set(latent_sites(trace)) | set(observed_sites(trace)) for trace in (first, second)]
    if names[0] != names[1]:
        raise ValueError(
            "the model's sites depend on the values of its latents: "
            f"{sorted(names[0] ^ names[1])} appear in some runs only; use a model of fixed "
            "structure"
        )


def check_latents(model_trace: Trace, guide_trace: Trace | None) -> list[str]:
    """Checks that latents can be moved or are enumerated, and are covered by the guide."""
    latents = latent_sites(model_trace)
    enumerated = []
    for name, site in latents.items():
        if isinstance(base_distribution(site["fn"]), dist.Delta):
            raise ValueError(
                f'latent site "{name}" is a Delta with a log_density: a point has no density to '
                "move under; write pyro.deterministic for its value and pyro.factor for its "
                "log_density"
            )
        how = site["infer"].get("enumerate")
        if how == "parallel" and getattr(site["fn"], "has_enumerate_support", False):
            if site["infer"].get("num_samples") is not None:
                raise ValueError(
                    f'site "{name}" is enumerated by num_samples draws, which is random; leave '
                    "num_samples out to sum over its support"
                )
            enumerated.append(name)
        elif how == "sequential":
            raise ValueError(
                f'site "{name}" is enumerated sequentially; use '
                'infer={"enumerate": "parallel"} or config_enumerate(model, "parallel")'
            )
        elif support_of(name, site).is_discrete:
            discrete_map(name, site["fn"])  # raises where no kernel could move it
    continuous = [name for name in latents if name not in enumerated]
    if not observed_sites(model_trace):
        raise ValueError(
            "the model has no observation: condition it on data with pyro.sample(..., obs=x) or "
            "poutine.condition; without any its log evidence is 0"
        )
    if guide_trace is not None:
        _check_same_sites(continuous, enumerated, guide_trace, observed_sites(model_trace))
    return enumerated


def _check_same_sites(
    continuous: list[str],
    enumerated: list[str],
    guide_trace: Trace,
    observed: Mapping[str, Node],
) -> None:
    guided = latent_sites(guide_trace)
    missing = [name for name in continuous if name not in guided]
    extra = [
        name
        for name, site in guided.items()
        if name not in continuous
        and not site["infer"].get("is_auxiliary")
        and not (name in enumerated and getattr(site["fn"], "has_enumerate_support", False))
    ]
    if missing or extra:
        problems = []
        if missing:
            problems.append(f"latent sites of the model without a guide: {missing}")
        both = [name for name in extra if name in enumerated]
        if both:
            problems.append(
                f"sites that the model enumerates and the guide samples: {both} (leave them out of "
                "the guide: the model sums over them)"
            )
        seen = [name for name in extra if name in observed]
        if seen:
            problems.append(f"sites of the guide that the model observes: {seen}")
        rest = [name for name in extra if name not in both and name not in seen]
        if rest:
            problems.append(
                f"sites of the guide that the model lacks: {rest} (their density cannot be "
                "integrated out of the guide)"
            )
        raise ValueError("model and guide disagree on sites; " + "; ".join(problems))


def support_of(name: str, site: Node) -> Support:
    """Works out the support of a latent site, which a user's own distribution may lack."""
    try:
        return normalized_support(site["fn"])
    except ValueError as error:
        raise ValueError(f'latent site "{name}": {error}') from error
    except NotImplementedError as error:
        raise ValueError(
            f'latent site "{name}": {type(site["fn"]).__name__} declares no support, so there is '
            "no bijection onto it; give the distribution a support property"
        ) from error


def check_value_shapes(model_trace: Trace, guide_trace: Trace) -> None:
    """Checks that the guide's values have the shapes that the model's distributions give."""
    for name, site in latent_sites(model_trace).items():
        if name not in guide_trace.nodes:
            continue
        shape = guide_trace.nodes[name]["value"].shape
        expected = site["fn"].batch_shape + site["fn"].event_shape
        if shape != expected:
            raise ValueError(
                f'at site "{name}" the guide draws shape {list(shape)}, the model expects '
                f"{list(expected)}; give the guide the model's plates and event shape"
            )
