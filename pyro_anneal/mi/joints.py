"""What is known about the joint distribution of x and z, behind one interface.

Three levels: joint samples only; samples and the marginal density p(z); samples and the full joint
density p(z) p(x|z). Tensors at this edge have the N pairs first, ``x [N, *x_event]`` and
``z [N, *z_event]``, with K particles in front where there are several per pair,
``z [K, N, *z_event]``; log densities come as ``[N]`` or ``[K, N]``.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from .bijections import Bijection

__all__ = ["DistributionJoint", "Joint", "Knowledge", "PyroJoint", "as_joint"]

Knowledge = Literal["joint samples", "marginal p(z)", "full joint p(x, z)"]


class Joint(ABC):
    """What is known about p(x, z).

    Attributes:
        knowledge: The level of knowledge.
    """

    knowledge: Knowledge

    @abstractmethod
    def sample(self, num_pairs: int) -> tuple[Tensor, Tensor]:
        """Draws N independent pairs, ``x [N, *x_event]`` and ``z [N, *z_event]``."""

    @abstractmethod
    def log_prior(self, z: Tensor, x: Tensor) -> Tensor:
        """Computes log p(z) of ``z [(K,) N, *z_event]``, in nats, shape ``[(K,) N]``.

        ``x [N, *x_event]`` tells only the number of rows and where N stands among the dimensions.
        """

    @abstractmethod
    def sample_prior(self, num_particles: int, x: Tensor) -> Tensor:
        """Draws K values of z per row of x, independent of it, shape ``[K, N, *z_event]``."""

    @abstractmethod
    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Computes log p(x|z) in nats, shape ``[(K,) N]``."""

    @abstractmethod
    def bijection(self, x: Tensor) -> Bijection:
        """Maps the support of z to unconstrained vectors."""


class DistributionJoint(Joint):
    """Knows p(z) as a distribution, and p(x|z) as a distribution, a simulator, or not at all.

    Args:
        prior: The distribution of z, with an empty batch shape.
        likelihood: Maps ``z [*batch, *z_event]`` to the distribution of x, batch shape ``batch``.
        simulator: Maps ``z [N, *z_event]`` to random ``x [N, *x_event]``, where the likelihood is
            intractable. Needed only to draw pairs.

    Raises:
        ValueError: If ``prior`` has a batch shape, or both ``likelihood`` and ``simulator`` are
            given.

    Example:
        >>> prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> joint = DistributionJoint(prior, lambda z: dist.Normal(z.sum(-1), 1.0))
        >>> x, z = joint.sample(5)
        >>> x.shape, z.shape, joint.knowledge
        (torch.Size([5]), torch.Size([5, 2]), 'full joint p(x, z)')
    """

    def __init__(
        self,
        prior: Any,
        likelihood: Callable[[Tensor], Any] | None = None,
        *,
        simulator: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if prior.batch_shape:
            raise ValueError(
                f"the prior has batch shape {list(prior.batch_shape)}, expected []: it is the "
                "distribution of one z; use .to_event() for its dimensions"
            )
        if likelihood is not None and simulator is not None:
            raise ValueError("give a likelihood or a simulator, not both")
        self.prior = prior
        self.likelihood = likelihood
        self.simulator = simulator
        self.knowledge = "marginal p(z)" if likelihood is None else "full joint p(x, z)"

    def sample(self, num_pairs: int) -> tuple[Tensor, Tensor]:  # noqa: D102
        with torch.no_grad():
            z = self.prior.sample((num_pairs,))
            if self.likelihood is not None:
                return self.likelihood(z).sample(), z
            if self.simulator is not None:
                return self.simulator(z), z
        raise ValueError(
            "pairs cannot be simulated from a prior alone: pass x and z, or give the joint a "
            "likelihood or a simulator"
        )

    def log_prior(self, z: Tensor, x: Tensor) -> Tensor:  # noqa: D102
        event = self.prior.event_shape
        batch = z.shape[: z.dim() - len(event)]
        if batch + event != z.shape or len(batch) not in (1, 2) or batch[-1] != x.shape[0]:
            raise ValueError(
                f"z has shape {list(z.shape)}, but the prior is over values of shape {list(event)}: "
                "expected [N, *z_event]; use .to_event() for the dimensions of z"
            )
        return self.prior.log_prob(z)  # type: ignore[no-any-return]

    def sample_prior(self, num_particles: int, x: Tensor) -> Tensor:  # noqa: D102
        return self.prior.sample((num_particles, x.shape[0]))  # type: ignore[no-any-return]

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:  # noqa: D102
        if self.likelihood is None:
            raise ValueError("log p(x|z) is not known: the joint was given no likelihood")
        value = self.likelihood(z).log_prob(x)
        expected = z.shape[: z.dim() - len(self.prior.event_shape)]
        if value.shape != expected:
            raise ValueError(
                f"log p(x|z) has shape {list(value.shape)}, expected {list(expected)} for z of "
                f"shape {list(z.shape)} and x of shape {list(x.shape)}; use .to_event() for the "
                "dimensions of x"
            )
        return value  # type: ignore[no-any-return]

    def bijection(self, x: Tensor) -> Bijection:  # noqa: D102
        return Bijection([(self.prior.support, self.prior.event_shape)])


class _Simulate(Messenger):  # type: ignore[misc, unused-ignore]
    """Draws observed sites, as ``poutine.uncondition``, but keeps deterministic ones as they are.

    A deterministic site is a Delta whose batch shape plates would expand a second time.
    """

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"] and not msg["infer"].get("_deterministic"):
            msg["is_observed"] = False
            msg["infer"]["was_observed"] = True
            msg["value"] = None
            msg["done"] = False


class Layout:
    """Turns the values of named sites into one tensor per pair, and back.

    One site keeps its shape; several are flattened and concatenated in the order given.

    Args:
        tails: Shape of each site's value after the pair dimension.
        num_inner: How many dimensions of a tail, from the left, belong to plates inside a pair.
    """

    def __init__(self, tails: dict[str, torch.Size], num_inner: int = 0) -> None:
        self.tails = tails
        if len(tails) == 1:
            (tail,) = tails.values()
            kept = [size for size in tail[:num_inner] if size != 1]
            self.event = torch.Size(kept) + tail[num_inner:]
        else:
            self.event = torch.Size([sum(math.prod(tail) for tail in tails.values())])

    @property
    def names(self) -> list[str]:
        return list(self.tails)

    def pack(self, values: dict[str, Tensor], num_leading: int) -> Tensor:
        tensors = [values[name] for name in self.tails]
        lead = tensors[0].shape[:num_leading]
        if len(tensors) > 1:
            tensors = [torch.cat([t.reshape((*lead, -1)) for t in tensors], dim=-1)]
        return tensors[0].reshape(lead + self.event)

    def num_leading(self, packed: Tensor) -> int:
        """Counts the dimensions before the event: 1 for ``[N]``, 2 for ``[K, N]``."""
        count = packed.dim() - len(self.event)
        if count not in (1, 2) or packed.shape[count:] != self.event:
            raise ValueError(
                f"sites {self.names} hold {list(self.event)} per pair: expected shape [N, "
                f"{', '.join(map(str, self.event))}], got {list(packed.shape)}"
            )
        return count

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        lead = packed.shape[: self.num_leading(packed)]
        sizes = [math.prod(tail) for tail in self.tails.values()]
        parts = packed.reshape((*lead, -1)).split(sizes, dim=-1)
        return {
            name: part.reshape(lead + tail)
            for (name, tail), part in zip(self.tails.items(), parts, strict=True)
        }


def sample_sites(trace: Any) -> dict[str, Any]:
    """Collects the sample sites of a trace that carry randomness, checking what would bias MI."""
    sites = {}
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or poutine.util.site_is_subsample(site):
            continue
        if type(site["fn"]).__name__ == "Unit":
            raise NotImplementedError(
                f'at site "{name}": pyro.factor makes p(x, z) unnormalized, so mutual information '
                "is not defined; use a distribution"
            )
        scale = site["scale"]
        if isinstance(scale, Tensor) or scale != 1.0:
            raise NotImplementedError(
                f'at site "{name}": the scale is {scale}, expected 1; mutual information does not '
                "support poutine.scale or subsampled plates"
            )
        if site["mask"] is not None and not site["infer"].get("_deterministic"):
            raise NotImplementedError(
                f'at site "{name}": mutual information does not support poutine.mask'
            )
        sites[name] = site
    return sites


def site_bijection(trace: Any, layout: Layout) -> Bijection:
    """Maps the supports of sites, as they are in one run, to unconstrained vectors."""
    sites = [(trace.nodes[name]["fn"].support, tail) for name, tail in layout.tails.items()]
    return Bijection(sites, event=layout.event)


def _takes_data(model: Callable[..., Any]) -> bool:
    function = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        inspect.signature(function).bind()
    except TypeError:
        return True
    return False


class PyroJoint(Joint):
    r"""Reads p(x, z) off a Pyro model: latent sites are z, observed sites are x.

    Two forms of model are understood. A model of data, ``model(x)``, encloses all its sites in one
    plate of size ``len(x)``: every row is a pair. A model of one pair, ``model()``, is run under an
    extra plate of pairs, so it must vectorize. Several latent (or observed) sites are flattened and
    concatenated, in the order of the model.

    Args:
        model: The Pyro model.
        observed: Names of the sites that make up x. By default the sites with ``obs=``. Name a
            ``pyro.deterministic`` site here for a simulator without a tractable likelihood.
        example: A few rows of x, for ``model(x)`` when pairs are to be simulated: only its shape
            and dtype count, not its values.

    Raises:
        ValueError: If there is no latent or no observed site, or no plate of pairs.
        NotImplementedError: If the model has factors, scales or masks, or a latent site that
            depends on x (then the sum of latent log densities is not log p(z)).

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
    ) -> None:
        self.model = model
        self.observed = None if observed is None else list(observed)
        self.example = example
        self.takes_data = _takes_data(model) if example is None else True
        self._nesting: int | None = None
        self._layouts: tuple[Layout, Layout] | None = None
        self._knowledge: Knowledge = "full joint p(x, z)"

    @property
    def knowledge(self) -> Knowledge:  # type: ignore[override]
        """The level of knowledge; for a model of data without example, known after its first use."""
        if not self.takes_data or self.example is not None:
            self.layouts(self._template(2))
        return self._knowledge

    def layouts(self, x: Tensor | None) -> tuple[Layout, Layout]:
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
        _, z_layout = self.layouts(x)
        trace = self._trace(x.shape[0], x)
        return site_bijection(trace, z_layout)

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
        assert self._nesting is not None
        model = poutine.condition(_Simulate()(self.model), data=data or {})
        nesting, args = self._nesting, (x,) if self.takes_data else ()
        if not self.takes_data:
            nesting += 1
            model = pyro.plate("_pairs", num_pairs, dim=-nesting)(model)
        if num_particles is not None:
            model = pyro.plate("_particles", num_particles, dim=-1 - nesting)(model)
        with torch.set_grad_enabled(data is not None and torch.is_grad_enabled()):
            return poutine.trace(model).get_trace(*args)

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
            log_prob = site["fn"].log_prob(site["value"])
            if log_prob.shape[:num_leading] != total.shape:
                raise ValueError(
                    f'at site "{name}": log_prob has shape {list(log_prob.shape)}, expected it to '
                    f"begin with {list(total.shape)}; enclose it in the plate of pairs"
                )
            total = total + log_prob.reshape((*total.shape, -1)).sum(dim=-1)
        return total

    def _read_nesting(self, x: Tensor | None) -> int:
        with torch.no_grad():
            args = (x,) if self.takes_data else ()
            sites = sample_sites(poutine.trace(_Simulate()(self.model)).get_trace(*args))
        frames = [f for site in sites.values() for f in site["cond_indep_stack"] if f.vectorized]
        return max((-f.dim for f in frames), default=0)

    def _read_layouts(self, num_pairs: int, x: Tensor | None) -> tuple[Layout, Layout]:
        sites = sample_sites(self._trace(num_pairs, x))
        if self.observed is None:
            self.observed = [n for n, s in sites.items() if s["infer"].get("was_observed")]
        missing = [n for n in self.observed if n not in sites]
        if missing or not self.observed:
            raise ValueError(
                f"observed sites {missing or self.observed} not found in the model, which has "
                f"{list(sites)}; mark them with obs= or name them in PyroJoint(observed=[...])"
            )
        deterministic = [n for n, s in sites.items() if s["infer"].get("_deterministic")]
        if set(deterministic) & set(self.observed):
            self._knowledge = "marginal p(z)"
        latent = [n for n in sites if n not in self.observed and n not in deterministic]
        if not latent:
            raise ValueError(f"the model has no latent site beside the observed {self.observed}")
        for name in latent + self.observed:
            if self.takes_data:
                self._check_plate(name, sites[name], num_pairs)
        assert self._nesting is not None
        inner = self._nesting - 1 if self.takes_data else self._nesting
        tails = {n: s["value"].shape[1:] for n, s in sites.items()}
        x_layout = Layout({n: tails[n] for n in sites if n in self.observed}, inner)
        return x_layout, Layout({n: tails[n] for n in latent}, inner)

    def _check_plate(self, name: str, site: Any, num_pairs: int) -> None:
        assert self._nesting is not None
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
