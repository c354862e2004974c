"""Export to ArviZ: an ``InferenceData`` before ArviZ 1, an ``xarray.DataTree`` since.

Dimensions are ``chain`` (independent repeats of a whole run, here one), ``draw`` (the K annealed
particles), then the plates by name. Draws of ``posterior`` are weighted by
``sample_stats.log_weight`` unless resampled.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import TypeIs

from .._version import __version__
from ..models.types import Array

if TYPE_CHECKING:  # optional packages; and results import their exports, not the other way round
    from arviz import InferenceData
    from xarray import Dataset, DataTree

    from .run import AnnealedRun
    from .sandwich import Sandwich

__all__ = ["to_arviz", "to_data_tree", "to_datasets", "to_inference_data"]


Variable = tuple[tuple[str, ...], Array]  # names of dimensions, values
_DRAWS_FOR_LOO = 1000


def _is_run(result: AnnealedRun | Sandwich) -> TypeIs[AnnealedRun]:
    return len(result.directions) == 1


def to_arviz(
    result: AnnealedRun | Sandwich,
    *,
    resample: bool = False,
    num_samples: int | None = None,
    log_likelihood: bool = False,
    seed: int | None = None,
) -> InferenceData | DataTree:
    """Converts a result to what the installed ArviZ works with.

    Args:
        result: A run or a sandwich.
        resample: Whether ``posterior`` holds K equally weighted draws, resampled per datum, for
            summaries that know no weights; the weights then move out of ``sample_stats``.
        num_samples: Number of equally weighted draws in ``posterior`` instead of the K ends, by
            :meth:`~pyro_anneal.AnnealedRun.posterior_samples`. Not for reverse runs.
        log_likelihood: Whether to add the group ``log_likelihood`` of each datum at each draw,
            which ``arviz.loo`` and ``arviz.compare`` need; ``num_samples`` is then 1000 unless
            given. Not for reverse runs. That of a sandwich is of its simulated data.
        seed: Seed of the draws.

    Returns:
        ``arviz.InferenceData`` where ArviZ has it, else ``xarray.DataTree``, of groups ``posterior``
        (forward chains only), ``sample_stats``, ``observed_data``, ``annealing`` (curves over
        beta), ``evidence`` (bounds, estimates and effective sample sizes per datum), and on demand
        ``log_likelihood``.

    Raises:
        ImportError: If ArviZ is not installed.
        ValueError: If draws or log likelihoods are asked of what cannot be continued.
    """
    arviz = _import("arviz")
    datasets = to_datasets(
        result,
        resample=resample,
        num_samples=num_samples,
        log_likelihood=log_likelihood,
        seed=seed,
    )
    kind = vars(arviz).get("InferenceData")  # asking ArviZ 1 for the attribute warns
    if isinstance(kind, type) and not issubclass(kind, _import("xarray").DataTree):
        return to_inference_data(datasets)
    return to_data_tree(datasets)


def to_inference_data(datasets: Mapping[str, Dataset]) -> InferenceData:
    """Builds an ``arviz.InferenceData`` (ArviZ before 1.0) from datasets by group."""
    return _import("arviz").InferenceData(**datasets)


def to_data_tree(datasets: Mapping[str, Dataset]) -> DataTree:
    """Builds an ``xarray.DataTree`` (ArviZ from 1.0 on) from datasets by group."""
    return _import("xarray").DataTree.from_dict({f"/{k}": v for k, v in datasets.items()})


def to_datasets(
    result: AnnealedRun | Sandwich,
    *,
    resample: bool = False,
    num_samples: int | None = None,
    log_likelihood: bool = False,
    seed: int | None = None,
) -> dict[str, Dataset]:
    """Converts a result to one ``xarray.Dataset`` per group; see :func:`to_arviz`."""
    if log_likelihood and num_samples is None:
        num_samples = _DRAWS_FOR_LOO
    run = result if _is_run(result) else result.directions["forward"]
    drawn = None if num_samples is None else run.posterior_samples(num_samples, seed=seed)
    datasets = _run_datasets(
        run, resample=resample, seed=seed, drawn=drawn, log_likelihood=log_likelihood
    )
    if _is_run(result):
        return datasets
    return _sandwich_datasets(result, datasets, resampled=resample or drawn is not None)


def _run_datasets(
    run: AnnealedRun,
    *,
    resample: bool,
    seed: int | None,
    drawn: Mapping[str, Tensor] | None = None,
    log_likelihood: bool = False,
) -> dict[str, Dataset]:
    plates = tuple(run.plates)
    forward = run.direction == "forward"
    groups: dict[str, dict[str, Variable]] = {}
    count, equal = run.num_chains, resample or drawn is not None
    if forward:
        ends = run.resample(run.num_chains, seed=seed) if resample else run.posterior
        draws = ends if drawn is None else drawn
        count = len(next(iter(draws.values()), run.log_weights))
        groups["posterior"] = _posterior(run, draws)
        if log_likelihood:
            pointwise = run._continued("log_likelihood").log_likelihood(draws)
            groups["log_likelihood"] = _posterior(run, pointwise)
    acceptance = run.accept_prob.mean() if run.num_steps > 1 else torch.tensor(torch.nan)
    groups["sample_stats"] = {
        "acceptance_rate": (("chain", "draw"), _numpy(acceptance.expand(1, count)))
    }
    if not (forward and equal):  # draws that were resampled weigh the same
        log_weight = (("chain", "draw", *plates), _numpy(run.log_weights.unsqueeze(0)))
        groups["sample_stats"]["log_weight"] = log_weight
    if run.observed:
        groups["observed_data"] = _observed(run, run.observed)
    groups["annealing"] = _curves(run)
    ti = run.thermodynamic_integration
    evidence = {
        "lower" if forward else "upper": run.log_evidence,
        "single": run.single,
        "std_error": run.std_error,
        "ess": run.ess,
        "thermodynamic_integration": ti.value,
        "thermodynamic_integration_std_error": ti.std_error,
    }
    groups["evidence"] = {name: (plates, _numpy(value)) for name, value in evidence.items()}
    attrs = _attributes(run) | {"resampled": int(equal and forward)}
    return _datasets(groups, attrs, {"annealing": _beta_coordinates(run)})


def _sandwich_datasets(
    sandwich: Sandwich, of_forward: Mapping[str, Dataset], *, resampled: bool
) -> dict[str, Dataset]:
    """Adds what a sandwich has beside its forward run."""
    forward, reverse = sandwich.forward, sandwich.reverse
    plates, datasets = tuple(forward.plates), dict(of_forward)
    backward = _run_datasets(reverse, resample=False, seed=None)
    reversed_stats = backward["sample_stats"].rename({"draw": "reverse_draw"})
    datasets["sample_stats"] = datasets["sample_stats"].assign(
        {f"{name}_reverse": value for name, value in reversed_stats.data_vars.items()}
    )
    names = ["accept_prob", "num_diverging", "mean_log_ratio", "var_log_ratio"]
    curves = backward["annealing"][names].rename({"increment_beta": "reverse_increment_beta"})
    datasets["annealing"] = datasets["annealing"].merge(
        curves.rename({name: f"{name}_reverse" for name in names})
    )
    evidence = {name.replace(" ", "_"): bound for name, bound in sandwich.bounds.items()} | {
        "lower": sandwich.lower,
        "upper": sandwich.upper,
        "gap": sandwich.gap,
        "bennett": sandwich.bennett,
        "thermodynamic_integration": sandwich.thermodynamic_integration.value,
        "ess": forward.ess,
        "ess_reverse": reverse.ess,
    }
    if sandwich.true_log_likelihood is not None:
        evidence["true_log_likelihood"] = sandwich.true_log_likelihood
    groups = {"evidence": {name: (plates, _numpy(value)) for name, value in evidence.items()}}
    if sandwich.simulated:
        groups["observed_data"] = _observed(forward, sandwich.simulated)
    attrs = _attributes(forward) | {
        "resampled": int(resampled),
        "simulated_data": 1,
        "lower_bound": sandwich.lower_bound,
        "upper_bound": sandwich.upper_bound,
    }
    datasets |= _datasets(groups, attrs, {})
    return {name: dataset.assign_attrs(attrs) for name, dataset in datasets.items()}


def _posterior(run: AnnealedRun, draws: Mapping[str, Tensor]) -> dict[str, Variable]:
    return {
        site: (
            ("chain", "draw", *_named_dims(run, site, value.shape[1:])),
            _numpy(value.unsqueeze(0)),
        )
        for site, value in draws.items()
    }


def _observed(run: AnnealedRun, values: Mapping[str, Tensor]) -> dict[str, Variable]:
    return {s: (_named_dims(run, s, v.shape), _numpy(v)) for s, v in values.items()}


def _named_dims(run: AnnealedRun, site: str, shape: Sequence[int]) -> tuple[str, ...]:
    """Names a value's dims by their plates where they are known, else by site and number."""
    known = run.site_plates.get(site, ())
    dims = []
    for i, size in enumerate(shape):
        plate = known[i] if i < len(known) else None
        # an inner plate is known by name only; a size of one stands for all rows of a plate
        full = plate is not None and size == run.plates.get(plate, size)
        dims.append(plate if plate is not None and full else f"{site}_dim_{i}")
    return tuple(dims)


def _curves(run: AnnealedRun) -> dict[str, Variable]:
    return {
        "betas": (("beta",), _numpy(run.betas)),
        "accept_prob": (("transition_beta",), _numpy(run.accept_prob)),
        "num_diverging": (("transition_beta",), _numpy(run.num_diverging)),
        "step_size": (("transition_beta",), _numpy(run.step_size)),
        "mean_log_ratio": (("increment_beta",), _numpy(run.mean_log_ratio)),
        "var_log_ratio": (("increment_beta",), _numpy(run.var_log_ratio)),
    }


def _beta_coordinates(run: AnnealedRun) -> dict[str, Array]:
    betas = _numpy(run.betas)
    taken = betas[:-1] if run.direction == "forward" else betas[1:]
    return {"beta": betas, "transition_beta": betas[1:-1], "increment_beta": taken}


def _attributes(run: AnnealedRun) -> dict[str, str | float]:
    """Attributes that netCDF can store: numbers and strings only."""
    return {
        "inference_library": "pyro_anneal",
        "inference_library_version": __version__,
        "sampling_time": run.seconds,
        "direction": run.direction,
        "kernel": run.kernel,
        "num_chains": run.num_chains,
        "num_steps": run.num_steps,
        "num_gradients": run.num_gradients,
        "seed": "" if run.seed is None else run.seed,
        "certified": int(run.certified),
        "scale": run.scale,
        "notes": "; ".join(run.notes),
        "diagnostics": "; ".join(d.message for d in run.diagnostics),
    }


def _datasets(
    groups: Mapping[str, Mapping[str, Variable]],
    attrs: Mapping[str, str | float],
    coords: Mapping[str, Mapping[str, Array]],
) -> dict[str, Dataset]:
    xarray = _import("xarray")
    result = {}
    for group, variables in groups.items():
        dims: dict[str, int] = {}
        for names, values in variables.values():
            dims.update(zip(names, values.shape, strict=True))
        known = {d: np.arange(n) for d, n in dims.items()} | dict(coords.get(group, {}))
        result[group] = xarray.Dataset(
            dict(variables), coords={d: known[d] for d in dims}, attrs=dict(attrs)
        )
    return result


def _numpy(value: Tensor) -> Array:
    array: Array = value.detach().cpu().numpy()
    return array


def _import(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # ArviZ announces its 1.0 at import
            return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"this export needs the package {name}: pip install 'pyro-anneal[arviz]'"
        ) from error
