r"""Guides that sample auxiliary sites and derive the model's latents from them.

A guide may draw ``a ~ q(a)`` at auxiliary sites and put ``z = f(a)`` at the model's sites, as
``Delta(z, log_density=-log |dz/da|)``: EasyGuide, AutoGaussian, AutoStructured, the guides of
contrib.gp, flows. At a given z its density needs the inverse of f, which nobody knows. But chains
may move a itself: the model

.. math:: p(x, a) = p(x, f(a)) \, |dz/da|

has the same evidence, and the guide's own q(a) is a density to start from. Here that model is built
as a Pyro model: its latents are the auxiliary sites under q(a), the model's latents are observed at
f(a), and factors take q(a) and the log densities of the Deltas away again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import autoguide
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .autoguides import is_autoguide
from .checks import explained
from .density import Arguments, ModelDensity, Substitute
from .inspection import inspect_model
from .sites import TRANSPORT, Layout, base_distribution, is_deterministic, latent_sites, unmasked
from .types import Fn, Message
from .validation import validation_disabled

__all__ = ["Transport", "TransportDensity", "inspect_transport", "is_transport"]

_MAX_JACOBIAN = 64  # numbers up to which the log density of the Deltas is compared with f's


def is_transport(guide: Fn, arguments: Arguments) -> bool:
    """Tells whether a guide derives latents from auxiliary sites in a way of its own.

    Args:
        guide: Pyro guide.
        arguments: Its ``(args, kwargs)``.
    """
    own = (autoguide.AutoGaussian, autoguide.AutoStructured)
    if is_autoguide(guide) and not isinstance(guide, autoguide.AutoGuideList):
        return isinstance(guide, own)
    if isinstance(guide, autoguide.AutoGuideList):
        return any(is_transport(part, arguments) for part in guide)
    args, kwargs = arguments
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=()),
        poutine.block(),
        validation_disabled(),
        explained(),
    ):
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
    sites = latent_sites(trace).values()
    points = [isinstance(base_distribution(site["fn"]), dist.Delta) for site in sites]
    return any(points) and not all(points)


class _Reveal(Messenger):  # type: ignore[misc]
    """Shows the draws of a guide to handlers outside, and keeps what it derives from them."""

    def __init__(self, sites: Collection[str]) -> None:
        super().__init__()
        self.sites = sites
        self.values: dict[str, Tensor] = {}  # of the model's latents
        self.log_density: list[Tensor] = []  # of the Deltas, summed
        self._drawn: dict[str, str] = {}  # the guide's names of its sites, by those shown

    def _pyro_sample(self, msg: Message) -> None:
        name = msg["name"]
        if name.startswith(TRANSPORT):
            return
        derived = isinstance(base_distribution(msg["fn"]), dist.Delta)
        hidden = site_is_subsample(msg) or msg["is_observed"] or is_deterministic(msg)
        if hidden or derived:
            msg["stop"] = True
        if hidden:
            return
        msg["infer"] = {k: v for k, v in msg["infer"].items() if k != "enumerate"}
        if name in self.sites and not derived:
            msg["name"] = f"{TRANSPORT}{name}"
        self._drawn[msg["name"]] = name  # also where a handler outside conditions it

    def _pyro_post_sample(self, msg: Message) -> None:
        name = self._drawn.pop(msg["name"], None)
        if name is None:
            return
        fn, value = msg["fn"], msg["value"]
        if name in self.sites:
            self.values[name] = value
        log_prob = unmasked(fn).log_prob(value)
        if isinstance(base_distribution(fn), dist.Delta):
            self.log_density.append(log_prob.sum())
        pyro.factor(f"{TRANSPORT}density of {name}", -log_prob)


class Transport:
    """The model of a guide's auxiliary sites, as a Pyro model.

    Args:
        model: Pyro model with its observations.
        guide: The guide.
        arguments: ``(args, kwargs)`` of the guide; those of the model come with the call.
        sites: Latent sites of the model that the guide decides.
    """

    def __init__(
        self,
        model: Fn,
        guide: Fn,
        arguments: Arguments,
        sites: Collection[str],
    ) -> None:
        self.model = model
        self.guide = guide
        self.arguments = arguments
        self.sites = sites

    def run_guide(self) -> _Reveal:
        """Runs the guide; the handlers around decide its draws."""
        args, kwargs = self.arguments
        reveal = _Reveal(self.sites)
        with reveal:
            self.guide(*args, **kwargs)
        missing = [name for name in self.sites if name not in reveal.values]
        if missing:
            raise ValueError(
                f"model and guide disagree on sites; latent sites of the model without a guide: "
                f"{missing}"
            )
        return reveal

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Runs the guide, and the model at the values that the guide derives."""
        return poutine.condition(self.model, data=self.run_guide().values)(*args, **kwargs)


class TransportDensity(ModelDensity):
    """Packs and unpacks the auxiliary sites of a guide; what it unpacks is the model's latents."""

    model: Transport

    def unpack(self, position: Tensor) -> dict[str, Tensor]:
        """Computes the values of the model's latents that the guide derives at ``u``."""
        substitute = Substitute(unconstrained=self.layout.split(position))
        with validation_disabled(), poutine.block(), substitute:
            return self.model.run_guide().values

    def pack(
        self, values: Mapping[str, Tensor], exact: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Packs values of the auxiliary sites.

        Raises:
            ValueError: If values of the model's latents are given: they would have to be inverted.
        """
        if any(site.name not in values for site in self.layout.sites):
            raise ValueError(
                "this guide derives the model's latents from auxiliary sites, so that its density "
                "at given latents is not known: chains can start from it (run), not from "
                'posterior samples (sandwich, run_reverse); use guide="auto" or another guide there'
            )
        return super().pack(values, exact)


def inspect_transport(
    model: Fn,
    guide: Fn,
    model_args: Arguments,
    guide_args: Arguments,
    *,
    batch_plates: str | Sequence[str],
) -> tuple[Transport, Layout]:
    """Builds the model of a guide's auxiliary sites, and works out its layout.

    Args:
        model: Pyro model with its observations.
        guide: The guide.
        model_args: ``(args, kwargs)`` of the model.
        guide_args: ``(args, kwargs)`` of the guide.
        batch_plates: As for :func:`~pyro_anneal.models.inspection.inspect_model`.

    Returns:
        The model of the auxiliary sites and its layout.

    Raises:
        ValueError: As ``inspect_model``, and if the map from auxiliary sites to latents is not one
            to one, or its Jacobian is not the ``log_density`` of the Deltas.
    """
    own = inspect_model(model, None, model_args, model_args, batch_plates=[])
    names = [site.name for site in own.sites]
    transport = Transport(model, guide, guide_args, names)
    layout = inspect_model(transport, None, model_args, model_args, batch_plates=batch_plates)
    count = layout.dim * layout.batch_shape.numel()
    if count != own.dim:
        raise ValueError(
            f"the guide derives {own.dim} unconstrained numbers (sites {names}) from {count} at "
            f"its auxiliary sites {[site.name for site in layout.sites]}: a point mass, or an "
            "auxiliary number that would have to be integrated out, has no density to anneal "
            'from; use guide="auto" or a guide with a density'
        )
    layout = replace(
        layout,
        is_static=False,
        derived=own.sites,
        observed={n: v for n, v in layout.observed.items() if n not in names},
        notes=(*layout.notes, "chains move the auxiliary sites of the guide"),
    )
    _check_jacobian(TransportDensity(transport, layout, model_args), own)
    return transport, layout


def _check_jacobian(density: TransportDensity, own: Layout) -> None:
    """Compares the log density of the Deltas with the Jacobian of the guide's map at one draw."""
    layout = density.layout
    if own.dim > _MAX_JACOBIAN or not own.is_static:
        return
    with torch.no_grad():
        position = density.draw_prior()
    claimed: list[Tensor] = []

    def derived(flat: Tensor) -> Tensor:
        u = layout.split(flat.reshape(position.shape))
        substitute = Substitute(unconstrained=u)
        with validation_disabled(), poutine.block(), substitute:
            reveal = density.model.run_guide()
        values = {s.name: s.transform.inv(reveal.values[s.name]) for s in own.sites}
        dets = [
            s.transform.log_abs_det_jacobian(values[s.name], reveal.values[s.name]).sum()
            for s in own.sites
        ]
        inner = torch.stack([value.sum() for value in substitute.log_det.values()]).sum()
        outer = torch.stack([*reveal.log_density, *dets]).sum()
        claimed.append((inner - outer).detach())
        return own.join(values)

    with torch.enable_grad():
        jacobian = torch.autograd.functional.jacobian(derived, position.reshape(-1))
    actual = torch.linalg.slogdet(jacobian.double())[1]
    tolerance = 1e-3 * (1.0 + abs(float(actual))) + 1e-2 * (own.dtype != torch.float64)
    if not abs(float(actual) - float(claimed[0])) <= tolerance:
        raise ValueError(
            f"the log_density of the guide's Delta sites {[site.name for site in own.sites]} is "
            f"not minus the log-Jacobian of its map: together they give {float(claimed[0]):.6g}, "
            f"the map has {float(actual):.6g}; its density would be wrong"
        )
