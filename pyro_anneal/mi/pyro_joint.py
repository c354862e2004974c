"""What is known about the joint distribution of x and z, read off a Pyro model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ..models.entropies import excess
from ..models.moving import log_prob_inside, supports_differ
from ..models.packing import Packing
from ..models.simulation import Unobserve
from ..models.sites import is_deterministic, mark_points
from ..models.types import Trace
from ..persistence.randomness import own_randomness
from .bijections import Bijection
from .joints import DistributionJoint, Joint, Knowledge
from .sites import sample_sites, site_bijection

__all__ = ["PyroJoint", "as_joint"]


def _binds(model: Callable[..., Any], *args: Any, **kwargs: Any) -> str | None:
    """Returns what keeps a model from being called with these arguments, or None."""
    function = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return None


class PyroJoint(Joint):
    r"""Reads p(x, z) off a Pyro model: latent sites are z, observed sites are x.

    Two forms of model are understood. A model of data, ``model(x)``, encloses all its sites in one
    plate of size ``len(x)``: every row is a pair. A model of one pair, ``model()``, is run under an
    extra plate of pairs, so it must vectorize. Several latent (or observed) sites are flattened and
    concatenated, in the order of the model.

    Covariates of a row belong to x: give them a distribution and observe them. Where they do not
    depend on z that changes nothing, ``I((x, c); z) = I(x; z | c)``, and the two log densities of c
    cancel. Arguments that are the same for every pair, such as a design, go to ``args`` and
    ``kwargs``.

    Args:
        model: The Pyro model.
        observed: Names of the sites that make up x. By default the sites with ``obs=``. Name a
            ``pyro.deterministic`` site here for a simulator without a tractable likelihood.
        example: A few rows of x, for ``model(x)`` when pairs are to be simulated: only its shape
            and dtype count, not its values.
        args: Further positional arguments of the model, after x where it takes one.
        kwargs: Keyword arguments of the model.

    Raises:
        ValueError: If the model takes arguments that are not given, there is no latent or no
            observed site, or no plate of pairs.
        NotImplementedError: If the model has factors, scales, masks or a latent site marked for
            enumeration, or one that depends on x (then the sum of latent log densities is not
            log p(z)).

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> joint = PyroJoint(model, example=torch.zeros(1))
        >>> x, z = joint.sample(5)
        >>> torch.allclose(joint.log_prior(z, x), dist.Normal(0.0, 1.0).log_prob(z))
        True
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        observed: Sequence[str] | None = None,
        example: Tensor | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.args = tuple(args)
        self.kwargs = dict(kwargs or {})
        self.observed = None if observed is None else list(observed)
        self.example = example
        self.takes_data = (
            example is not None or _binds(model, *self.args, **self.kwargs) is not None
        )
        refusal = _binds(model, None, *self.args, **self.kwargs) if self.takes_data else None
        if refusal is not None:
            raise ValueError(
                f"the model cannot be called with x and the arguments given ({refusal}): pass what "
                "is the same for all pairs as PyroJoint(args=, kwargs=), and make covariates of a "
                "row observed sites, part of x"
            )
        self._nesting = 0  # until the model was read
        self._layouts: tuple[Packing, Packing] | None = None
        self._knowledge: Knowledge = "full joint p(x, z)"
        self._moving: frozenset[str] | None = None  # observed sites whose support moves with z

    @property
    def knowledge(self) -> Knowledge:  # type: ignore[override]
        """The level of knowledge; for a model of data without example, known after its first use."""
        if not self.takes_data or self.example is not None:
            self.layouts(self._template(2))
        return self._knowledge

    def layouts(self, x: Tensor | None) -> tuple[Packing, Packing]:
        """Finds how observed and latent sites are packed into x and z, once."""
        if self._layouts is None:
            num_pairs = 2 if x is None else x.shape[0]
            self._nesting = self._read_nesting(x)
            self._layouts = self._read_layouts(num_pairs, x)
            self._check_prior(num_pairs, x)
        return self._layouts

    def sample(self, num_pairs: int) -> tuple[Tensor, Tensor]:  # noqa: D102
        x = self._template(num_pairs)
        x_layout, z_layout = self.layouts(x)
        values = self._values(self._trace(num_pairs, x))
        return x_layout.pack(values, 1), z_layout.pack(values, 1)

    def sample_prior(self, num_particles: int, x: Tensor) -> Tensor:  # noqa: D102
        _, z_layout = self.layouts(x)
        values = self._values(self._trace(x.shape[0], x, num_particles=num_particles))
        return z_layout.pack(values, 2)

    def log_prior(self, z: Tensor, x: Tensor) -> Tensor:  # noqa: D102
        return self._log_density(x, z, which="latent")

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:  # noqa: D102
        self.layouts(x)
        if self._knowledge != "full joint p(x, z)":
            raise ValueError(
                f"log p(x|z) is not known: the observed sites {self.observed} include a "
                "deterministic one, which has no density"
            )
        return self._log_density(x, z, which="observed")

    def bijection(self, x: Tensor) -> Bijection:  # noqa: D102
        x_layout, z_layout = self.layouts(x)
        data = x_layout.unpack(x) if self._knowledge == "full joint p(x, z)" else {}

        def run(num_particles: int | None) -> Trace:
            return self._trace(x.shape[0], x, data=data, num_particles=num_particles)

        return site_bijection(run, z_layout)

    def has_edges(self, x: Tensor) -> bool:  # noqa: D102
        return bool(self._edges(x))

    def _edges(self, x: Tensor) -> frozenset[str]:
        """Names the observed sites whose support depends on latents, found once."""
        if self._moving is None:
            x_layout, _ = self.layouts(x)
            with torch.no_grad(), own_randomness(0):
                first, second = (self._trace(len(x), x).nodes for _ in range(2))
            self._moving = frozenset(
                name
                for name in x_layout.names
                if not is_deterministic(first[name])
                and supports_differ(first[name]["fn"], second[name]["fn"], x.device)
            )
        return self._moving

    def controls(self, x: Tensor, z: Tensor) -> Tensor:
        """Sums ``log p + H`` over latent and over observed sites whose entropies are known."""
        x_layout, z_layout = self.layouts(x)
        trace = self._trace(x.shape[0], x, data=z_layout.unpack(z) | x_layout.unpack(x))
        sums = []
        for layout in (z_layout, x_layout):
            sites = [trace.nodes[name] for name in layout.names]
            terms = [excess(site["fn"], site["value"]) for site in sites]
            known = [t.reshape((x.shape[0], -1)).sum(-1) for t in terms if t is not None]
            if known:
                sums.append(torch.stack(known).sum(0))
        return torch.stack(sums) if sums else super().controls(x, z)

    def _template(self, num_pairs: int) -> Tensor | None:
        if not self.takes_data:
            return None
        if self.example is None:
            raise ValueError(
                "the model takes data, so simulating pairs needs the shape of x: pass x and z, or "
                "PyroJoint(model, example=x[:1]) in place of the model"
            )
        return self.example[torch.arange(num_pairs) % self.example.shape[0]]

    def _trace(
        self,
        num_pairs: int,
        x: Tensor | None,
        *,
        data: dict[str, Tensor] | None = None,
        num_particles: int | None = None,
    ) -> Any:
        model = poutine.condition(Unobserve()(self.model), data=data or {})
        nesting = self._nesting
        if not self.takes_data:
            nesting += 1
            model = pyro.plate("_pairs", num_pairs, dim=-nesting)(model)
        if num_particles is not None:
            model = pyro.plate("_particles", num_particles, dim=-1 - nesting)(model)
        with torch.set_grad_enabled(data is not None and torch.is_grad_enabled()):
            trace = poutine.trace(model).get_trace(*self._arguments(x), **self.kwargs)
        mark_points(trace)
        return trace

    def _arguments(self, x: Tensor | None) -> tuple[Any, ...]:
        return (x, *self.args) if self.takes_data else self.args

    @staticmethod
    def _values(trace: Any) -> dict[str, Tensor]:
        return {n: s["value"] for n, s in trace.nodes.items() if s["type"] == "sample"}

    def _log_density(
        self, x: Tensor, z: Tensor, *, which: Literal["latent", "observed"]
    ) -> Tensor:
        x_layout, z_layout = self.layouts(x)
        num_leading = z_layout.num_leading(z)
        data = z_layout.unpack(z) | x_layout.unpack(x)
        particles = z.shape[0] if num_leading == 2 else None
        trace = self._trace(x.shape[0], x, data=data, num_particles=particles)
        total = torch.zeros(z.shape[:num_leading], dtype=z.dtype, device=z.device)
        for name in (z_layout if which == "latent" else x_layout).names:
            site = trace.nodes[name]
            fn, value = site["fn"], site["value"]
            guarded = particles is not None and which == "observed" and name in self._edges(x)
            log_prob = log_prob_inside(fn, value) if guarded else fn.log_prob(value)
            if log_prob.shape[:num_leading] != total.shape:
                raise ValueError(
                    f'at site "{name}": log_prob has shape {list(log_prob.shape)}, expected it to '
                    f"begin with {list(total.shape)}; enclose it in the plate of pairs"
                )
            total = total + log_prob.reshape((*total.shape, -1)).sum(dim=-1)
        return total

    def _read_nesting(self, x: Tensor | None) -> int:
        with torch.no_grad():
            trace = poutine.trace(Unobserve()(self.model))
            sites = sample_sites(trace.get_trace(*self._arguments(x), **self.kwargs))
        frames = [f for site in sites.values() for f in site["cond_indep_stack"] if f.vectorized]
        return max((-f.dim for f in frames), default=0)

    def _read_layouts(self, num_pairs: int, x: Tensor | None) -> tuple[Packing, Packing]:
        sites = sample_sites(self._trace(num_pairs, x))
        if self.observed is None:
            self.observed = [n for n, s in sites.items() if s["infer"].get("was_observed")]
        missing = [n for n in self.observed if n not in sites]
        if missing:
            raise ValueError(
                f"observed sites {missing} are not in the model, which has {list(sites)}"
            )
        if not self.observed:
            raise ValueError(
                f"nothing says which of the sites {list(sites)} are x: mark them with obs=, or "
                "name them in PyroJoint(observed=[...])"
            )
        deterministic = [n for n, s in sites.items() if is_deterministic(s)]
        if set(deterministic) & set(self.observed):
            self._knowledge = "marginal p(z)"
        latent = [n for n in sites if n not in self.observed and n not in deterministic]
        if not latent:
            raise ValueError(f"the model has no latent site beside the observed {self.observed}")
        for name in latent:
            if sites[name]["infer"].get("enumerate") is not None:
                raise NotImplementedError(
                    f'at site "{name}": it is marked for enumeration, but here every latent site '
                    "is part of z and none is summed out; remove the mark to count it as part of "
                    "z, or use AnnealedImportance.mutual_information, which sums it out"
                )
        for name in latent + self.observed:
            if self.takes_data:
                self._check_plate(name, sites[name], num_pairs)
        inner = self._nesting - 1 if self.takes_data else self._nesting
        tails = {n: s["value"].shape[1:] for n, s in sites.items()}
        dtypes = {n: s["value"].dtype for n, s in sites.items()}
        x_layout = Packing({n: tails[n] for n in sites if n in self.observed}, inner, dtypes)
        return x_layout, Packing({n: tails[n] for n in latent}, inner, dtypes)

    def _check_plate(self, name: str, site: Any, num_pairs: int) -> None:
        outer = [f for f in site["cond_indep_stack"] if f.vectorized and f.dim == -self._nesting]
        if not outer or outer[0].size != num_pairs:
            raise ValueError(
                f'at site "{name}": expected a plate of size {num_pairs} (the rows of x), left of '
                'all others, around every site; use pyro.plate("data", len(x))'
            )

    def _check_prior(self, num_pairs: int, x: Tensor | None) -> None:
        """Raises if latent log densities move with x: their sum is then not log p(z)."""
        x_layout, z_layout = self.layouts(x)
        values = [self._values(self._trace(num_pairs, x)) for _ in range(2)]
        z = z_layout.pack(values[0], 1)
        first, second = (x_layout.pack(v, 1) for v in values)
        if not torch.equal(self.log_prior(z, first), self.log_prior(z, second)):
            raise NotImplementedError(
                f"the density of a latent site among {z_layout.names} depends on an observed site "
                f"among {x_layout.names}: log p(z) is not available from this model; declare "
                "latent sites before observed ones, or name other sites in observed=[...]"
            )


def as_joint(model: Any) -> Joint | None:
    """Reads what is known from a joint, a distribution of z, a Pyro model, or None.

    Args:
        model: A :class:`Joint`; a distribution, taken as p(z); a Pyro model; None for joint
            samples only.

    Returns:
        The joint, or None.

    Raises:
        TypeError: If ``model`` is none of these.
    """
    if model is None or isinstance(model, Joint):
        return model
    if isinstance(model, torch.distributions.Distribution):
        return DistributionJoint(model)
    if callable(model):
        return PyroJoint(model)
    raise TypeError(
        f"expected a Pyro model, a distribution of z, a Joint or None, got {type(model).__name__}"
    )
