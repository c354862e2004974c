"""Checks of what users pass: each error names the argument, what it got and what to do."""

from __future__ import annotations

import inspect
import math
import operator
import os
from collections.abc import Callable, Iterable
from typing import Any, SupportsFloat, SupportsIndex, cast

from torch import Tensor
from torch.distributions import Distribution

__all__ = [
    "as_count",
    "as_flag",
    "as_real",
    "as_seed",
    "bars_are_silenced",
    "check_function",
    "check_kernel",
    "check_reserved",
    "check_step_size",
]


def as_count(name: str, value: object, *, least: int = 1) -> int:
    """Returns a number of things as an ``int``.

    Args:
        name: What the message calls it.
        value: An integer of any library.
        least: Smallest value allowed.

    Raises:
        ValueError: If it is no integer (``8.0`` and ``True`` are none), or too small.

    Example:
        >>> as_count("num_chains (K)", torch.tensor(8))
        8
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(cast("SupportsIndex", value))
    except TypeError:
        raise ValueError(
            f"{name} must be an integer, got {value!r} ({type(value).__name__})"
        ) from None
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {count}")
    return count


def as_real(name: str, value: object) -> float:
    """Returns a real number as a ``float``; NaN and infinity pass.

    Raises:
        ValueError: If it is none.

    Example:
        >>> as_real("step_size", 1)
        1.0
    """
    single = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    if isinstance(value, bool | str | bytes | complex) or (
        isinstance(value, Tensor) and not single
    ):
        raise ValueError(f"{name} must be a number, got {value!r}")
    try:
        return float(cast("SupportsFloat", value))
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be a number, got {value!r} ({type(value).__name__})"
        ) from None


def as_flag(name: str, value: object, *others: str) -> bool | str:
    """Returns ``"auto"``, True, False or one of ``others``.

    Raises:
        ValueError: If it is anything else.

    Example:
        >>> as_flag("compile", "auto")
        'auto'
    """
    if isinstance(value, bool) or (isinstance(value, str) and value in ("auto", *others)):
        return value
    named = ", ".join(f'"{other}"' for other in ("auto", *others))
    raise ValueError(f"{name} must be {named}, True or False, got {value!r}")


def as_seed(value: object) -> int | None:
    """Returns a seed, or None.

    Raises:
        ValueError: If it is no integer that torch's generators take.

    Example:
        >>> as_seed(7)
        7
    """
    if value is None:
        return None
    seed = as_count("seed", value, least=-(2**63))
    if seed >= 2**63:
        raise ValueError(f"seed must be below 2**63, got {seed}")
    return seed


def check_function(name: str, value: object, *, what: str = "a Pyro function") -> None:
    """Checks that a model, a guide or a critic can be called.

    Raises:
        ValueError: If it cannot, or is a class or a distribution in place of a function.
    """
    if isinstance(value, type):
        raise ValueError(
            f"{name} must be {what}, got the class {value.__name__}: pass an instance of it"
        )
    if isinstance(value, Distribution):
        raise ValueError(
            f"{name} must be {what}, got a distribution ({type(value).__name__}): write a function "
            "that calls pyro.sample with it"
        )
    if not callable(value):
        raise ValueError(f"{name} must be {what}, got {value!r}")


def check_kernel(value: object) -> None:
    """Checks that a transition kernel has the parts that annealing calls.

    Raises:
        ValueError: If it lacks some; names them.
    """
    if isinstance(value, type):
        raise ValueError(f"kernel is the class {value.__name__}: pass {value.__name__}()")
    parts = ("num_gradients", "target_accept", "noise", "step", "reversal")
    missing = [part for part in parts if not hasattr(value, part)]
    if missing:
        raise ValueError(
            f"kernel must be a transition kernel such as HMC(), got {value!r}, which lacks "
            f"{missing} (see pyro_anneal.Kernel)"
        )
    num_gradients, target = (getattr(value, part) for part in parts[:2])
    as_count("kernel.num_gradients", num_gradients, least=0)
    if target is not None and not 0.0 < as_real("kernel.target_accept", target) < 1.0:
        raise ValueError(f"kernel.target_accept must lie in (0, 1) or be None, got {target}")


def check_step_size(value: object) -> None:
    """Checks a fixed step size: a positive number, or a tensor of one per batch element.

    Raises:
        ValueError: If it is none, or not positive and finite.
    """
    if isinstance(value, Tensor) and value.is_floating_point():
        fine = bool((value.isfinite() & (value > 0.0)).all())
    else:
        fine = 0.0 < as_real("step_size", value) < math.inf
    if not fine:
        raise ValueError(f"step_size must be positive and finite, got {value}")


def check_reserved(
    task: str,
    model: Callable[..., Any],
    args: tuple[object, ...],
    options: Iterable[str],
    *,
    remedy: str,
) -> None:
    """Checks that no option of a function is meant for the model whose arguments it passes on.

    A parameter of that name that a positional argument fills is no matter of doubt.

    Args:
        task: Name of the function.
        model: The model.
        args: Its positional arguments.
        options: Names of the function's own options.
        remedy: What to do instead of passing the argument by position.

    Raises:
        ValueError: If the model has a parameter of the name of an option.
    """
    try:
        parameters = list(inspect.signature(model).parameters.values())
    except (TypeError, ValueError):  # no signature: a builtin, or no function at all
        return
    filled = {
        parameter.name
        for parameter, _ in zip(parameters, args, strict=False)
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
    }
    shared = [p.name for p in parameters if p.name in set(options) and p.name not in filled]
    if shared:
        raise ValueError(
            f"{task} takes {shared} as its own option(s), but the model has parameter(s) of that "
            f"name: pass them by position, or {remedy}"
        )


def bars_are_silenced() -> bool:
    """Tells whether ``PYRO_ANNEAL_PROGRESS=0`` in the environment silences all progress bars."""
    wanted = os.environ.get("PYRO_ANNEAL_PROGRESS", "1").strip().lower()
    return wanted in ("0", "false", "off")
