"""An audit of an inference on data simulated from the model: ranks and a divergence."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from pyro import poutine
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..arguments import as_count, check_function, check_reserved
from ..diagnostics import checks
from ..models.autoguides import check_guide, is_autoguide, sees_arguments
from ..models.density import Arguments, ModelDensity
from ..models.inspection import inspect_model
from ..models.simulation import MakeArgs
from ..models.sites import Layout
from ..models.types import Fn
from ..persistence.journal import keep_journal
from ..persistence.randomness import derived_seed, own_randomness, seeded_generator
from ..problems.bases import GuideBase, StandardNormalBase
from ..problems.discrete import lattice_of
from ..problems.drawn import fit_base, pack_draws
from ..results.inference import InferenceCheck
from ..results.provenance import Provenance
from ..runs.progress import follow_call
from ..runs.progress import progress_bar as stage
from .bridge import series_ess
from .findings import diagnose_inference
from .reading import read_draws, values_by_name
from .simulated import Densities, SimulatedData, simulate_data
from .uniformity import divergence_limit, rank, uniformity_p_value

__all__ = ["check_inference"]

# Draws to which a density is fitted, and that are drawn from it.
_MOST_FITTED, _NUM_FROM_FIT = 400, 64
_LOG_JOINT = "log_joint"


@dataclass(frozen=True, eq=False)
class _Outcome:
    """What one simulated data set gave."""

    ranks: dict[str, Tensor]
    uniforms: dict[str, Tensor]
    count: int  # draws that were ranked
    lower: float  # of the divergence, nats; NaN without a density
    upper: float


@dataclass(eq=False)
class _Audit:
    """What all simulated data sets of an audit share."""

    model: Fn
    inference: Fn
    arguments: Arguments
    fixed: dict[str, Tensor]
    make_args: MakeArgs | None
    num_draws: int
    seed: int
    layout: Layout = field(init=False)  # known with the first data set
    is_guide: bool | None = None  # likewise
    is_compared: bool = False  # whether guide and model were found to have the same sites
    densities: Densities = field(default_factory=Densities)

    def run(self, index: int) -> _Outcome:
        """Simulates one data set and looks at the inference on it."""
        seed = derived_seed(self.seed, "simulation", index)
        with own_randomness(seed):
            data = simulate_data(
                self.model, self.arguments, self.fixed, self.make_args, check=index == 0
            )
            called = None
            if self.is_guide is None:
                self.layout = self._inspect(data)
                self.is_guide, called = self._kind(data)
            if self.is_guide:
                return self._from_guide(data, seed)
            draws = self._draws(data, self._call(data) if called is None else called)
            return self._from_draws(data, draws, seed)

    def _inspect(self, data: SimulatedData) -> Layout:
        model_args = self.arguments
        layout = inspect_model(data.model, None, model_args, model_args, batch_plates=[])
        if lattice_of(layout) is not None:
            raise ValueError(
                "check_inference ranks continuous latents, and this model has discrete ones: "
                'enumerate them (infer={"enumerate": "parallel"})'
            )
        return layout

    def _kind(self, data: SimulatedData) -> tuple[bool, tuple[object, set[str]] | None]:
        """Tells a guide, which samples sites, from a function that returns draws."""
        if is_autoguide(self.inference):
            check_guide(self.inference)
            return True, None
        called = self._call(data)
        found = called[0]
        shapes = {site.name: len(site.value_shape) for site in self.layout.model_sites}
        if isinstance(found, Mapping):
            ranks = {name: torch.as_tensor(found[name]).dim() for name in shapes if name in found}
            if any(ranks[name] > shapes[name] for name in ranks) or not ranks:
                return False, called
        elif callable(getattr(found, "get_samples", None)) or hasattr(found, "posterior"):
            return False, called
        check_guide(self.inference)
        return True, None

    def _call(self, data: SimulatedData) -> tuple[object, set[str]]:
        """Calls the inference; returns what it returns, and the sites that handlers have reached."""
        args, kwargs = data.arguments
        if _takes_model(self.inference):
            kwargs = {**kwargs, "model": data.held}
        with poutine.block(), data.shown(self.fixed) as seen, torch.enable_grad():
            found = self.inference(*args, **kwargs)
        return found, seen

    def _draws(self, data: SimulatedData, called: tuple[object, set[str]]) -> object:
        """Checks that draws were made with the simulated data and the fixed sites."""
        found, seen = called
        remedy = (
            "Pyro's MCMC hides its model from the handlers around it. Give the inference a keyword "
            "parameter model, and let it run that: it gets the model with all this in place"
        )
        unread = [name for name in data.hidden if name not in seen]
        if unread and not _takes_model(self.inference):
            raise ValueError(
                f"the inference takes no data and did not read the simulated value of {unread}: "
                f"{remedy}; or pass the data as an argument"
            )
        given = values_by_name(found) if self.fixed else {}
        for name, value in self.fixed.items():
            if name in given and not bool((torch.as_tensor(given[name]) == value).all()):
                raise ValueError(
                    f'the inference returned its own draws of site "{name}", which simulate_from '
                    f"holds fixed. {remedy}"
                )
        return found

    def _from_guide(self, data: SimulatedData, seed: int) -> _Outcome:
        """Ranks draws of the guide, and compares densities, which are known."""
        model = ModelDensity(data.model, self.layout, self.arguments)
        guide_args = data.arguments if sees_arguments(self.inference) else self.arguments
        if not self.is_compared:
            inspect_model(data.model, self.inference, self.arguments, guide_args, batch_plates=[])
            self.is_compared = True
        base = GuideBase(self.inference, model, guide_args)
        with torch.no_grad():
            rows = torch.stack([base.draw() for _ in range(self.num_draws)])
            values = [model.unpack(row) for row in rows]
        exact = self._exact(model, data)
        tensors = _tensors(data, guide_args)
        every = torch.cat([exact.unsqueeze(0), rows]).to(self.layout.dtype)
        log_base, log_joint = self.densities.evaluate(model, base, tensors, every)
        ratio = log_joint - log_base
        names = [site.name for site in self.layout.sites]
        draws = {name: torch.stack([value[name] for value in values]) for name in names}
        inner = ratio[1:].mean()
        resampled = (ratio[1:].softmax(0) * ratio[1:].clamp(min=-1e300)).sum()
        lower, upper = float(resampled - inner), float(ratio[0] - inner)
        return self._ranked(data, draws, log_joint, seed, lower, upper)

    def _from_draws(self, data: SimulatedData, found: object, seed: int) -> _Outcome:
        """Ranks draws, and compares the posterior with a density fitted to them."""
        values = read_draws(found, self.layout)
        chosen = self._thinned(values)
        model = ModelDensity(data.model, self.layout, self.arguments)
        rows = pack_draws(model, chosen)
        exact = self._exact(model, data)
        upper, extra = torch.inf, rows[:0]
        base = None
        flat = {name: value.flatten(0, 1) for name, value in values.items()}
        stride = -(-len(next(iter(flat.values()))) // _MOST_FITTED)
        positions = pack_draws(model, {name: value[::stride] for name, value in flat.items()})
        try:
            base, _ = fit_base(positions.unsqueeze(0), mixtures=False)
            extra = torch.stack([base.draw() for _ in range(_NUM_FROM_FIT)])
        except ValueError:  # a point mass, at infinite divergence
            pass
        every = torch.cat([exact.unsqueeze(0), rows, extra]).to(self.layout.dtype)
        flat_base = StandardNormalBase(self.layout)  # the fitted one changes with the data
        tensors = _tensors(data, self.arguments)
        log_joint = self.densities.evaluate(model, flat_base, tensors, every)[1]
        if base is not None:
            with torch.no_grad():
                log_base = base._log_density(every)
            ratio = log_joint - log_base.double()
            upper = float(ratio[0] - ratio[1 + len(rows) :].mean())
        joint = log_joint[: 1 + len(rows)]
        return self._ranked(data, chosen, joint, seed, torch.nan, upper)

    def _exact(self, model: ModelDensity, data: SimulatedData) -> Tensor:
        """Packs the exact posterior sample."""
        names = [site.name for site in self.layout.sites]
        known = data.simulation.unconstrained
        latents = {name: data.simulation.latents[name] for name in names}
        with torch.no_grad():
            return model.pack(latents, {n: u for n, u in known.items() if n in latents})

    def _thinned(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Takes as many draws as are nearly independent, evenly spaced."""
        chains, count = next(iter(values.values())).shape[:2]
        if chains * count < 4:
            raise ValueError(
                f"check_inference needs at least 4 draws per data set, got {chains * count}"
            )
        series = torch.cat(
            [value.reshape(chains, count, -1).double() for value in values.values()], -1
        )
        effective = int(series_ess(series).min())
        number = max(4, min(self.num_draws, chains * count, effective))
        places = torch.linspace(0, chains * count - 1, number).round().long()
        return {name: value.flatten(0, 1)[places] for name, value in values.items()}

    def _ranked(
        self,
        data: SimulatedData,
        draws: dict[str, Tensor],
        log_joint: Tensor,
        seed: int,
        lower: float,
        upper: float,
    ) -> _Outcome:
        generator = seeded_generator(torch.device("cpu"), seed, "ranks")
        ranks, uniforms = {}, {}
        count = len(log_joint) - 1
        for site in self.layout.sites:
            exact = data.simulation.latents[site.name].expand(site.value_shape)
            found = rank(exact.detach(), draws[site.name].detach(), generator)
            ranks[site.name], uniforms[site.name] = found
        joint = rank(log_joint[0], log_joint[1:], generator)
        name = _LOG_JOINT if _LOG_JOINT not in ranks else f"{_LOG_JOINT}_density"
        ranks[name], uniforms[name] = joint
        return _Outcome(ranks, uniforms, count, lower, upper)


def _takes_model(inference: Fn) -> bool:
    try:
        return "model" in inspect.signature(inference).parameters
    except (TypeError, ValueError):  # no signature
        return False


def _tensors(data: SimulatedData, arguments: Arguments) -> dict[str, Tensor]:
    """Collects the tensors that change with the data, by place."""
    found = {f"site {name}": value for name, value in data.simulation.observed.items()}
    leaves = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    return found | {f"argument {place}": leaf for place, leaf in enumerate(leaves)}


def check_inference(
    model: Fn,
    inference: Fn,
    *args: object,
    num_simulations: int = 100,
    seed: int | None = None,
    simulate_from: Mapping[str, Tensor] | None = None,
    make_args: MakeArgs | None = None,
    num_draws: int = 63,
    progress_bar: bool = True,
    **kwargs: object,
) -> InferenceCheck:
    r"""Audits an inference on data simulated from the model, where exact posterior samples are known.

    Pairs (z, x) are drawn from the model, so that z is an exact posterior sample given x, and the
    inference is run on each x. If it draws from the posterior, the rank of z among its draws is
    uniform, for each scalar latent and for the log joint density. The Jeffreys divergence
    :math:`\mathrm{KL}(q \| p) + \mathrm{KL}(p \| q)` of the inference q and the posterior p is
    bounded from the same simulations. No chain is annealed, since annealing repairs wrong draws.

    Simulated data look like the prior's, not like yours. With ``simulate_from`` latent sites,
    usually hyperparameters, are held at values near their posterior given your data: in the
    simulation, and in every Pyro program that the inference runs. The audit then is of the
    inference of the *other* sites, for data such as yours. Pyro's MCMC hides its model from such
    handlers: an inference with a keyword parameter ``model`` is given the model with those sites
    held, and data in place where no argument holds them.

    Source: Talts, Betancourt, Simpson, Vehtari and Gelman (2018) for ranks; Modrak et al. (2023) for
    the joint density among them; Grosse, Ancha and Roy (2016), *Measuring the reliability of MCMC
    inference with bidirectional Monte Carlo*, for the divergence and for simulating at the fit.

    Args:
        model: Pyro model with its observations.
        inference: A guide; or a function that is called with the model's arguments, simulated data
            in place of the observed ones, and returns draws by site, ``[N, *value_shape]`` (or
            grouped by chain, or ``MCMC``). Draws are thinned to nearly independent ones.
        *args: Arguments of the model, with data in their place.
        num_simulations: Number S of simulated data sets.
        seed: Seed of the audit, which then leaves the global generators as they were.
        simulate_from: Values by latent site at which to simulate.
        make_args: Rule ``observed -> (args, kwargs)`` for the inference's arguments, where the one
            that holds the data is ambiguous.
        num_draws: Draws to rank per data set, at most.
        progress_bar: Whether to show progress.
        **kwargs: All other keywords are arguments of the model.

    Returns:
        Ranks, p-values, bounds on the divergence in nats, and a verdict, ``"failed"`` if ranks are
        not uniform (p < 0.005, corrected for the number of quantities), or a guide is further than
        0.1 nat off beyond chance; ``"suspicious"`` at p < 0.03, or 0.02 nat.

    Raises:
        ValueError: If pairs simulated from the model are not exact, the inference's data argument
            is ambiguous, latents are discrete, or a site of ``simulate_from`` is no latent.

    Example:
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def narrow(x):  # p(z | x) = N(x / 2, sqrt 1/2)
        ...     pyro.sample("z", dist.Normal(x / 2, 0.5))
        >>> import warnings
        >>> warnings.simplefilter("ignore")
        >>> check_inference(model, narrow, torch.tensor(2.0), seed=0, progress_bar=False).verdict
        'failed'
    """
    num_simulations = as_count("num_simulations", num_simulations, least=2)
    num_draws = as_count("num_draws", num_draws, least=4)
    check_function("model", model)
    check_function("inference", inference, what="a guide or a function that returns draws")
    options = ("num_simulations", "seed", "simulate_from", "make_args", "num_draws")
    remedy = "wrap the model in a function whose parameters have other names"
    reserved = (*options, "progress_bar", "inference")
    check_reserved("check_inference", model, args, reserved, remedy=remedy)
    fixed = {name: torch.as_tensor(value) for name, value in (simulate_from or {}).items()}
    began, task = time.perf_counter(), "check_inference"
    with (
        keep_journal(task, dict, path=None, every=None, seed=seed) as journal,
        follow_call(
            task, {"simulations": 1.0}, progress_bar and journal.is_first, journal.seconds
        ),
        stage("simulations", num_simulations) as bar,
    ):
        audit = _Audit(model, inference, (args, kwargs), fixed, make_args, num_draws, journal.seed)
        outcomes = []
        for index in range(num_simulations):
            outcomes.append(audit.run(index))
            bar.update(1)
    result = _collect(outcomes, bool(audit.is_guide), fixed)
    provenance = Provenance(
        task=task,
        seed=journal.seed,
        kernel="none",
        seconds={"total": time.perf_counter() - began},
    )
    result = replace(result, diagnostics=diagnose_inference(result), provenance=provenance)
    checks.warn(result.diagnostics)
    return result


def _collect(
    outcomes: list[_Outcome], is_guide: bool, fixed: Mapping[str, Tensor]
) -> InferenceCheck:
    names = list(outcomes[0].ranks)
    ranks = {name: torch.stack([o.ranks[name] for o in outcomes]) for name in names}
    uniforms = {name: torch.stack([o.uniforms[name] for o in outcomes]) for name in names}
    scalars = torch.cat([value.flatten(1) for value in map(_columns, uniforms.values())], 1)
    notes: tuple[str, ...] = ()
    if fixed:
        notes = (f"site(s) {list(fixed)} are held fixed: the audit is of the others",)
    lower = [o.lower for o in outcomes] if is_guide else []
    return InferenceCheck(
        ranks=ranks,
        num_ranked=torch.tensor([o.count for o in outcomes]),
        uniforms=uniforms,
        p_values={name: uniformity_p_value(value) for name, value in uniforms.items()},
        lower_terms=torch.tensor(lower, dtype=torch.float64),
        upper_terms=torch.tensor([o.upper for o in outcomes], dtype=torch.float64),
        rank_limit=divergence_limit(scalars),
        is_guide=is_guide,
        notes=notes,
    )


def _columns(value: Tensor) -> Tensor:
    return value.reshape(len(value), -1)
