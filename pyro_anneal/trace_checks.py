"""Checks of a model's and a guide's traces; each error names the site, the plate or the shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .sites import latent_sites, observed_sites

__all__ = [
    "check_latents",
    "check_plates",
    "check_shape",
    "check_structure",
    "check_value_shapes",
    "plate_frames",
    "support_of",
]


def plate_frames(site: Mapping[str, Any]) -> dict[str, Any]:
    """Collects the vectorized plates around a site, by name."""
    return {f.name: f for f in site["cond_indep_stack"] if f.vectorized}


def check_plates(trace: Any) -> None:
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


def check_shape(name: str, site: Mapping[str, Any]) -> None:
    """Checks that every axis of a site's log density belongs to a plate.

    The log density, not the distribution: an observed value of shape [N, 1] against a distribution
    of shape [N] gives [N, N] terms.
    """
    shape = site["unscaled_log_prob"].shape
    known = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
    for axis in range(-len(shape), 0):
        if shape[axis] > 1 and axis not in known:
            raise ValueError(
                f'at site "{name}": log_prob has shape {list(shape)}, but axis {axis} of size '
                f"{shape[axis]} belongs to no plate; enclose it in "
                f'pyro.plate("data", {shape[axis]}, dim={axis}) or declare it dependent with '
                f".to_event({-axis})"
            )


def check_structure(first: Any, second: Any) -> None:
    """Checks that two runs of the model had the same sites."""
    names = [set(latent_sites(trace)) | set(observed_sites(trace)) for trace in (first, second)]
    if names[0] != names[1]:
        raise ValueError(
            "the model's sites depend on the values of its latents: "
            f"{sorted(names[0] ^ names[1])} appear in some runs only; use a model of fixed "
            "structure"
        )


def check_latents(model_trace: Any, guide_trace: Any | None) -> list[str]:
    """Checks that latents are continuous or enumerated and covered by the guide."""
    latents = latent_sites(model_trace)
    enumerated = []
    for name, site in latents.items():
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
            raise ValueError(
                f'latent site "{name}" is discrete ({type(site["fn"]).__name__}) and nothing sums '
                "it out or moves it: mark it with "
                'infer={"enumerate": "parallel"} or wrap the model in pyro.infer.config_enumerate'
            )
    continuous = [name for name in latents if name not in enumerated]
    if not continuous:
        what = "enumerated sites only" if enumerated else "no latent site"
        raise ValueError(
            f"the model has {what}, so there is nothing to anneal: its log evidence is the "
            "log density itself (pyro.infer.TraceEnum_ELBO sums enumerated sites exactly)"
        )
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
    guide_trace: Any,
    observed: Mapping[str, Any],
) -> None:
    guided = latent_sites(guide_trace)
    missing = [name for name in continuous if name not in guided]
    extra = [
        name
        for name, site in guided.items()
        if name not in continuous and not site["infer"].get("is_auxiliary")
    ]
    if missing or extra:
        problems = []
        if missing:
            problems.append(f"latent sites of the model without a guide: {missing}")
        both = [name for name in extra if name in enumerated]
        if both:
            problems.append(f"sites that the model enumerates and the guide samples: {both}")
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


def support_of(name: str, site: Mapping[str, Any]) -> Any:
    """Reads the support of a latent site, which a user's own distribution may lack."""
    try:
        return site["fn"].support
    except NotImplementedError as error:
        raise ValueError(
            f'latent site "{name}": {type(site["fn"]).__name__} declares no support, so there is '
            "no bijection onto it; give the distribution a support property"
        ) from error


def check_value_shapes(model_trace: Any, guide_trace: Any) -> None:
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
