"""What moves the discrete latents of a problem: their lattice, their gradient, and their kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from pyro import poutine
from torch import Tensor

from ..graphs.evaluation import evaluate_or_nan
from ..kernels import (
    HMC,
    Block,
    ChromaticGibbs,
    Composite,
    DiscreteLangevin,
    Kernel,
    Lattice,
    RandomWalk,
    SingleSite,
)
from ..kernels.chromatic import draw_conditional
from ..kernels.lattice import MovesLattice
from ..models.density import ModelDensity
from ..models.discrete import DiscreteMap
from ..models.lifting import liftable_sites
from ..models.sites import Layout, Site
from ..models.validation import validation_disabled
from .bases import PathDensity, PriorBase
from .colours import change_one, foretold

__all__ = ["kernels_for", "lattice_of", "lift"]

Colour = Callable[[Lattice], tuple[int, ...] | None]
_MIXED = "Composite((DiscreteLangevin(), HMC()))"


def lattice_of(layout: Layout) -> Lattice | None:
    """Collects the discrete coordinates of a layout, or None if there is none."""
    sites = [site for site in layout.sites if isinstance(site.transform, DiscreteMap)]
    blocks = [_block(site, is_static=layout.is_static) for site in sites]
    return Lattice.of(layout.dim, blocks) if blocks else None


def _block(site: Site, *, is_static: bool) -> Block:
    transform: DiscreteMap = site.transform
    if transform.kind == "binary":
        return Block("binary", site.start, site.stop)
    if transform.kind in ("index", "one-hot"):
        return Block("one-hot", site.start, site.stop, size=transform.size)
    if not is_static:  # bounds that move with other latents: beyond them there is no density
        count = site.stop - site.start
        open_below, open_above = (-math.inf,) * count, (math.inf,) * count
        return Block("integer", site.start, site.stop, lower=open_below, upper=open_above)
    lower, upper = (site.flatten(edge) for edge in (transform.lower, transform.upper))
    # Elements of a batch share a kernel: the widest bounds; beyond its own the density is zero.
    shape = (-1, site.stop - site.start)
    low, high = lower.reshape(shape).amin(0), upper.reshape(shape).amax(0)
    return Block(
        "integer", site.start, site.stop, lower=tuple(low.tolist()), upper=tuple(high.tolist())
    )


def lift(model: ModelDensity, example: Tensor) -> Layout:
    """Finds out for which discrete sites one gradient gives all exact differences.

    Args:
        model: The model's side of the path.
        example: A finite position, ``[*batch, D]``.

    Returns:
        The layout that names them, with a note.
    """
    layout = model.layout
    names = tuple(s.name for s in layout.sites if isinstance(s.transform, DiscreteMap))
    note = f"discrete sites {list(names)} are annealed by a discrete kernel"
    if not layout.enumerated:
        args, kwargs = model.arguments
        with torch.no_grad(), poutine.block(), validation_disabled():
            trace = poutine.trace(model.model).get_trace(*args, **kwargs)
        candidates = liftable_sites(layout, trace)
        by_index = [s.name for s in layout.sites if s.name in candidates and s.transform.size > 1]
        for chosen in dict.fromkeys((tuple(candidates), tuple(by_index))):
            lifted = replace(layout, lifted=chosen)
            if chosen and _is_exact(ModelDensity(model.model, lifted, model.arguments), example):
                note += (
                    f'; {list(chosen)} could be summed out instead (infer={{"enumerate": '
                    '"parallel"}), which is better while few of them meet in one factor'
                )
                return replace(lifted, notes=(*layout.notes, note))
    return replace(layout, notes=(*layout.notes, note))


def _positions(model: ModelDensity, example: Tensor, count: int) -> list[Tensor]:
    with torch.no_grad():
        draws = [model.draw_prior().to(model.layout.dtype) for _ in range(count)]
    return [torch.where(draw.isfinite(), draw, example) for draw in draws]


def _differences(
    model: ModelDensity,
    example: Tensor,
    lattice: Lattice,
    *,
    num_draws: int = 3,
    num_changes: int = 8,
    settle: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compares true changes of log p with those foretold at either end, at draws of the prior.

    Args:
        model: The model's side of the path.
        example: A finite position.
        lattice: The variables to change.
        num_draws: Number of draws.
        num_changes: Changes tried at each.
        settle: Whether to leave draws without density by the conditionals that gradients tell.

    Returns:
        True changes, those foretold before, and those foretold of the way back, ``[n, *batch]``.
    """
    function = PathDensity(model, PriorBase(model))
    rows = []
    for here in _positions(model, example, num_draws):
        start = evaluate_or_nan(function, here)
        if settle and not bool(start[1].isfinite().all()):
            here = _redrawn(lattice, here, start[3])  # out of states that the data exclude
            start = evaluate_or_nan(function, here)
        for index in torch.randperm(lattice.count)[:num_changes].tolist():
            there = change_one(lattice, here, index)
            end = evaluate_or_nan(function, there)
            move = there - here
            rows.append(
                torch.stack([end[1] - start[1], foretold(move, start[3]), -foretold(move, end[3])])
            )
    found = torch.stack(rows, dim=1)
    return found[0], found[1], found[2]


def _redrawn(lattice: Lattice, here: Tensor, grad: Tensor) -> Tensor:
    """Draws all variables from the conditionals that a gradient tells."""
    uniform = torch.rand_like(here)
    parts = [draw_conditional(b, b.take(grad), b.take(uniform)) for b in lattice.blocks]
    return lattice.replace(here, parts)


def _is_exact(model: ModelDensity, example: Tensor) -> bool:
    """Tells whether gradients of lifted sites give exact differences."""
    layout = model.layout
    blocks = [
        _block(site, is_static=layout.is_static)
        for site in layout.sites
        if site.name in layout.lifted
    ]
    try:
        found = _differences(model, example, Lattice.of(layout.dim, blocks), settle=True)
    except (NotImplementedError, RuntimeError, ValueError, IndexError, KeyError):
        return False  # CannotLift, and whatever the model does with an enumerated value
    wanted, there, back = found
    seen = wanted.abs() < 1e3
    wrong = torch.maximum((there - wanted).abs(), (back + wanted).abs())
    return bool(seen.any()) and bool((wrong <= 1e-3 * (1.0 + wanted.abs()))[seen].all())


def _is_informed(model: ModelDensity, example: Tensor, lattice: Lattice) -> bool:
    """Tells whether gradients foretell changes well enough to propose by them.

    Locally balanced proposals accept a single change with the ratio exp(D + (b - f) / 2), for the
    true change D and those foretold forward, f, and back, b: what is wrong alike cancels.
    """
    change, forward, back = (
        value.clamp(-20.0, 20.0) for value in _differences(model, example, lattice)
    )
    rest = (change + 0.5 * (back - forward)).abs().nan_to_num(20.0)
    return float(rest.mean()) <= 0.5 * float(change.abs().nan_to_num(20.0).mean()) + 1e-6


def kernels_for(
    kernel: Kernel,
    model: ModelDensity,
    example: Tensor,
    *,
    seed: int,
    colour: Colour = lambda lattice: None,
) -> tuple[Kernel, ...]:
    """Tells a kernel which coordinates are discrete, and gives it parts that move them.

    Args:
        kernel: Of the user, or the default.
        model: The model's side of the path.
        example: A finite position, ``[*batch, D]``.
        seed: Seed of the points at which gradients are tried out.
        colour: Colours the zeros, ones and categories of a lattice so that neighbours differ; None
            where few colours do not suffice.

    Returns:
        The kernel alone, or where the model has discrete latents the kernel with their lattice,
        or, if it moves continuous coordinates only, composites of it and of discrete kernels, among
        which a pilot may choose; the first is the one to take without.

    Raises:
        ValueError: If the kernel does not suit the model's latents.
    """
    layout = model.layout
    lattice = lattice_of(layout)
    moves_discrete = _moves_discrete(kernel)
    if lattice is None:
        if moves_discrete:
            raise ValueError(
                f"{type(kernel).__name__} moves discrete latents, and the model has none that is "
                "not enumerated: use HMC()"
            )
        return (kernel,)
    covers_all = all(isinstance(s.transform, DiscreteMap) for s in layout.sites)
    if moves_discrete and isinstance(kernel, MovesLattice):
        if not covers_all and not _moves_continuous(kernel):
            raise ValueError(
                f"{type(kernel).__name__} moves discrete latents only, and the model has "
                f"continuous ones, too: use {_MIXED}"
            )
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            return (_with_colours(kernel.on(lattice), lattice, colour),)
    continuous = kernel.parts if isinstance(kernel, Composite) else (kernel,)
    strange = [type(part).__name__ for part in continuous if not _moves_by_scale(part)]
    if strange:
        raise ValueError(
            f"the kernel {strange[0]} does not know of discrete latents and might move them off "
            f"the integers: use {_MIXED}, or a Composite of your own"
        )
    rest = () if covers_all else continuous
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        options = _discrete_parts(model, example, lattice, colour)
    return tuple(Composite((*parts, *rest)).on(lattice) for parts in options)


def _moves_by_scale(part: Kernel) -> bool:
    """Tells whether a scale of zero keeps a coordinate where it is."""
    return isinstance(part, HMC | RandomWalk)


def _moves_discrete(kernel: Kernel) -> bool:
    if isinstance(kernel, Composite):
        return any(_moves_discrete(part) for part in kernel.parts)
    return isinstance(kernel, MovesLattice)


def _moves_continuous(kernel: Kernel) -> bool:
    return isinstance(kernel, Composite) and not all(_moves_discrete(p) for p in kernel.parts)


def _with_colours(kernel: Kernel, lattice: Lattice, colour: Colour) -> Kernel:
    """Colours the variables of a kernel that asks for it."""
    if isinstance(kernel, Composite):
        parts = tuple(_with_colours(part, lattice, colour) for part in kernel.parts)
        return replace(kernel, parts=parts)
    if not isinstance(kernel, ChromaticGibbs) or kernel.colours is not None:
        return kernel
    colours = colour(kernel.lattice or lattice)
    if colours is None:
        raise ValueError(
            "ChromaticGibbs reads conditional distributions off gradients, which do not foretell "
            "every change of this model's discrete latents exactly, or it needs more than 8 "
            "colours: use DiscreteLangevin() or SingleSite()"
        )
    return replace(kernel, colours=colours)


def _discrete_parts(
    model: ModelDensity,
    example: Tensor,
    lattice: Lattice,
    colour: Colour,
) -> list[tuple[Kernel, ...]]:
    """Lists kernels for choices and integers, which have step sizes of their own.

    Without exact differences a gradient may say little about a flip: then single changes compete,
    or, where it says nothing, stand in.
    """
    layout = model.layout
    single: tuple[Kernel, ...] = (SingleSite(lattice=lattice),)
    names = {s.name for s in layout.sites if isinstance(s.transform, DiscreteMap)}
    own = [lattice.only("binary", "one-hot"), lattice.only("integer")]
    own = [part for part in own if part.blocks]
    if names == set(layout.lifted):
        exact: tuple[Kernel, ...] = tuple(DiscreteLangevin(lattice=part) for part in own)
        return _with_conditionals([exact], exact, own, colour)
    informed = [_is_informed(model, example, part) for part in own]
    if not any(informed):
        return [single]
    kinds = [DiscreteLangevin if good else SingleSite for good in informed]
    many = tuple(kind(lattice=part) for kind, part in zip(kinds, own, strict=True))
    if not informed[0]:
        return [many, single]
    return _with_conditionals([many, single], many, own, colour)


def _with_conditionals(
    options: list[tuple[Kernel, ...]],
    parts: tuple[Kernel, ...],
    lattices: list[Lattice],
    colour: Colour,
) -> list[tuple[Kernel, ...]]:
    """Draws zeros, ones and categories from their conditionals where few colours suffice.

    Short pilots of kernels that change little at a time miss slow memory and promise too much, so
    up to four colours are taken without asking; more compete. With one colour a step draws all
    variables exactly.
    """
    if any(block.kind == "integer" for block in lattices[0].blocks):
        return options
    colours = colour(lattices[0])
    if colours is None:
        return options
    by_colour = (ChromaticGibbs(colours, lattices[0]), *parts[1:])
    return [by_colour] if max(colours) < 4 else [options[0], by_colour]
