"""Checks that a density is a function of its latents alone, and names what breaks that."""

from __future__ import annotations

import random
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from ..models.modes import DispatchMode
from ..models.places import user_line
from ..models.validation import validation_disabled
from .evaluation import LogDensities, Outputs, evaluate_or_nan, evaluate_weighted
from .rewriting import Impure, is_random

__all__ = ["check_pure", "evaluate_rows", "rows_meet_at", "undisturbed", "worst_difference"]

_DRAWS = 10  # where numbers are drawn outside of torch: a coin shows itself but once in 1000
_NAMES = ("log_base", "log_target", "grad_base", "grad_target")


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Restores random states, validation flags and Pyro's parameter store on exit."""
    devices = [device] if device.type == "cuda" else []
    store = pyro.get_param_store()
    names = set(store.keys())
    try:
        with torch.random.fork_rng(devices=devices), validation_disabled():
            yield
    finally:
        for name in set(store.keys()) - names:
            del store[name]


def check_pure(function: LogDensities, position: Tensor, *, gradients: bool = True) -> Outputs:
    """Evaluates a density twice and refuses what is no function of the latents.

    Args:
        function: One chain's ``(log_base, log_target)``.
        position: Where to evaluate.
        gradients: Whether gradients are needed.

    Returns:
        The log densities and gradients.

    Raises:
        Impure: If the function draws random numbers that reach its results, changes a module's
            buffers (they are restored), or gives two different results; names the module or the
            line.
    """
    buffers = _Buffers()
    with buffers.watch():
        # The first call may initialize parameters, at random.
        with _without_gradients_explained():
            first = evaluate_or_nan(function, position, strict=True, gradients=gradients)
        before, outside = _random_state(position.device), _state_outside_torch()
        result = evaluate_or_nan(function, position, strict=True, gradients=gradients)
        after = _random_state(position.device)
        drawn_outside = _state_outside_torch() != outside
    changed = buffers.restore()
    if changed is not None:
        raise Impure(
            f"the density changes {changed}: annealing needs a function of the latents alone; "
            "call .eval() on the module"
        )
    drawn = not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    # A draw that no result depends on (the initial value of a parameter) does no harm.
    if drawn and not _same_under_other_draws(function, position, result, gradients):
        raise Impure(
            f"the density draws random numbers{_random_culprit(function, position)}: annealing "
            "needs a deterministic density; call .eval() on modules with dropout, and give every "
            "latent a value"
        )
    if drawn_outside and not all(  # perhaps of two numbers, so that two draws may well agree
        _same_under_other_draws(function, position, result, gradients) for _ in range(_DRAWS)
    ):
        raise Impure(
            "the density draws numbers from Python's random or numpy.random: annealing needs a "
            "deterministic density; draw them once, before the model is called"
        )
    for name, one, two in zip(("log_base", "log_target"), first, result, strict=False):
        # Some GPU kernels add in any order: rounding may differ, values may not.
        rtol = torch.finfo(one.dtype).eps ** (1 / 3)
        if not torch.allclose(one, two, rtol=rtol, atol=rtol, equal_nan=True):
            raise Impure(
                f"the density gave two different results at the same position ({name}: {one} and "
                f"{two}): annealing needs a deterministic density; call .eval() on modules with "
                "dropout or batch normalization, and look for other sources of randomness, for "
                "data written in place, and for attributes that change with each evaluation"
            )
    return result


@contextmanager
def _without_gradients_explained() -> Iterator[None]:
    """Says what to do where a model leaves torch and so has no gradient."""
    try:
        yield
    except RuntimeError as error:
        if "on Tensor that requires grad" not in str(error):
            raise
        where = user_line(traceback.extract_tb(error.__traceback__))
        raise ValueError(
            f"the density leaves torch{where}, so it has no gradient: use kernel=RandomWalk(), "
            "which needs none, or num_steps=1 (importance sampling)"
        ) from error


def _same_under_other_draws(
    function: LogDensities, position: Tensor, result: Outputs, gradients: bool
) -> bool:
    again = evaluate_or_nan(function, position, strict=True, gradients=gradients)
    return all(
        torch.allclose(a, b, rtol=1e-6, atol=1e-9, equal_nan=True)
        for a, b in zip(again, result, strict=True)
    )


def rows_meet_at(function: LogDensities, position: Tensor) -> bool:
    """Tells whether a row's log density depends on other rows, to first order at one position.

    With weights w of the rows, the gradient of ``sum_i w_i log p_i`` with respect to row i is
    ``w_i`` times the gradient of the plain sum, if and only if no pair of rows meets (but for
    weights of measure zero).

    Args:
        function: One chain's ``(log_base, log_target)``.
        position: Where to look, ``[*batch, D]``.
    """
    return evaluate_rows(function, position)[1]


def evaluate_rows(function: LogDensities, position: Tensor) -> tuple[Outputs, bool]:
    """Computes the densities at a position, and :func:`rows_meet_at`, by one run of the model.

    Returns:
        Log densities and gradients as :func:`~.evaluation.evaluate_or_nan`, and whether rows meet;
        where the model fails that is not known, and False.
    """
    generator = torch.Generator("cpu").manual_seed(1)
    weights = torch.rand(position.shape[:-1], generator=generator, device="cpu").to(position) + 0.5
    try:
        plain, weighted = evaluate_weighted(function, position, weights)
    except (ValueError, ArithmeticError, RuntimeError):  # the model fails here
        return evaluate_or_nan(function, position), False
    for value, one, two in zip(plain[:2], plain[2:], weighted, strict=True):
        expected, fine = weights.unsqueeze(-1) * one, one.isfinite() & two.isfinite()
        fine &= value.isfinite().unsqueeze(-1)
        scale = expected.abs().where(fine, 0.0).amax()
        # Parts of the model may be narrower than the position.
        allowed = 10.0 * torch.finfo(one.dtype).eps ** (1 / 3) * (1.0 + scale)
        if bool((((two - expected).abs() > allowed) & fine).any()):
            return plain, True
    return plain, False


def worst_difference(
    graph: Outputs, model: Outputs, eps: float, noise: Sequence[Tensor] | None = None
) -> str | None:
    """Describes the worst difference that is more than rounding, relative to the largest value.

    Where a log density is not finite in both (a rejection), its gradient does not matter.
    """
    for at, (name, ours, theirs) in enumerate(zip(_NAMES, graph, model, strict=True)):
        defined = graph[at % 2].isfinite() | model[at % 2].isfinite()
        if at >= 2:
            defined = defined.unsqueeze(-1).expand_as(ours)
        scale = theirs.abs().nan_to_num(posinf=0.0)
        scale = scale.amax(-1, keepdim=True) if at >= 2 else scale
        allowed = max(eps, torch.finfo(ours.dtype).eps) ** (1 / 3) * (1.0 + scale)
        if noise is not None:
            allowed = allowed + 16.0 * noise[at]
        both = ours.isfinite() == theirs.isfinite()
        close = torch.where(ours.isfinite(), (ours - theirs).abs() <= allowed, True)
        wrong = defined & ~(both & close)
        if bool(wrong.any()):
            first = tuple(int(i) for i in wrong.nonzero()[0])
            return f"{name} is {float(ours[first]):.6g}, the model says {float(theirs[first]):.6g}"
    return None


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _state_outside_torch() -> tuple[bytes, object, object]:
    """Reads the states of the generators of numpy and of Python."""
    _, keys, place, *_ = np.random.get_state(legacy=True)
    return np.asarray(keys).tobytes(), place, random.getstate()


class _Buffers:
    """Remembers the buffers of every module called while it is active."""

    def __init__(self) -> None:
        self.modules: dict[nn.Module, None] = {}
        self.saved: dict[int, tuple[nn.Module, str, Tensor, int, Tensor]] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Notes modules as they are called."""
        handle = register_module_forward_pre_hook(self._save)
        try:
            with warnings.catch_warnings():  # of compiled modules, which run as they are written
                warnings.filterwarnings("ignore", message=".*when there are global hooks")
                yield
        finally:
            handle.remove()

    def _save(self, module: nn.Module, _: Any) -> None:
        if module in self.modules:
            return
        self.modules[module] = None
        for owner in module.modules():
            for name, buffer in owner._buffers.items():
                if buffer is not None and id(buffer) not in self.saved:
                    copy = buffer.detach().clone()
                    self.saved[id(buffer)] = (owner, name, buffer, buffer._version, copy)

    def restore(self) -> str | None:
        """Puts changed buffers back, and describes the first."""
        description = None
        for owner, name, buffer, version, copy in self.saved.values():
            # Fused kernels such as batch norm's write without counting a version.
            written = buffer._version != version or not torch.equal(buffer, copy)
            if owner._buffers.get(name) is buffer and not written:
                continue
            description = description or f'buffer "{name}" of {qualified(owner, self.modules)}'
            owner._buffers[name] = buffer
            if written:
                with torch.no_grad():
                    buffer.copy_(copy)
        return description


def qualified(module: nn.Module, called: dict[nn.Module, None]) -> str:
    """Names a module by its type and its longest path inside the modules called."""
    paths = [
        f"{type(root).__name__}.{name}"
        for root in called
        for name, inner in root.named_modules()
        if inner is module and name
    ]
    kind = type(module).__name__
    return f"module {kind} ({max(paths, key=len)})" if paths else f"module {kind}"


class _RandomOperations(DispatchMode):
    """Notes the first random operation and the line of user code that made it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.culprit: str = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not self.culprit and is_random(func, args):
            self.culprit = f" ({func.name()}){user_line(traceback.extract_stack())}"
        return func(*args, **(kwargs or {}))


def _random_culprit(function: LogDensities, position: Tensor) -> str:
    """Finds the innermost module, else the line, that draws random numbers."""
    called: dict[nn.Module, None] = {}
    states: dict[nn.Module, list[Tensor]] = {}
    culprits: list[nn.Module] = []

    def enter(module: nn.Module, _: Any) -> None:
        called[module] = None
        states[module] = _random_state(position.device)

    def leave(module: nn.Module, *_: Any) -> None:
        after = _random_state(position.device)
        if not all(torch.equal(a, b) for a, b in zip(states[module], after, strict=True)):
            culprits.append(module)

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        with _RandomOperations() as operations:
            evaluate_or_nan(function, position, strict=True)
    finally:
        for handle in handles:
            handle.remove()
    if culprits:
        return f" in {qualified(culprits[0], called)}"
    return str(operations.culprit)
