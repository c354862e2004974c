r"""From the log densities of one chain to a fast evaluator of K chains.

A model written for one chain is recorded once, vectorized over chains as a graph and, on request,
compiled. Parameters and data are inputs of the graph: :meth:`CapturedDensity.refresh` reads them
anew after optimizer steps, :meth:`CapturedDensity.rebind` swaps them for other data of the same
shape, and neither records or compiles again. What cannot be recorded is evaluated through the
model itself, chain by chain, with a warning that says why; what is no function of the latents
(dropout, running statistics) is refused.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..models.places import summary
from .captured_density import CapturedDensity
from .evaluation import LogDensities
from .exits import Exit, PositionLeft
from .kept import Kind, find_kept, keep, kind_of, recorded_again
from .programs import stacked
from .purity import check_pure, undisturbed
from .recording import (
    Recording,
    record_densities,
    trace,
)
from .rewriting import Impure

__all__ = ["CapturedDensity", "capture"]


def capture(
    function: LogDensities,
    example: Tensor,
    *,
    num_chains: int,
    compile: bool = False,
    gradients: bool = True,
    native: bool = False,
) -> CapturedDensity:
    r"""Turns the log densities of one chain into an evaluator of K chains.

    .. math:: u \mapsto (\log q(u), \log p(x, u), \nabla \log q(u), \nabla \log p(x, u))

    Rows of the batch must be independent: the gradient of their sum is taken as every row's own.

    Args:
        function: Maps an unconstrained position ``[*batch, D]`` to ``(log_base, log_target)``,
            each ``[*batch]``, nats. Any PyTorch or Pyro code.
        example: A typical position, shape ``[*batch, D]``.
        num_chains: Number K of chains to prepare for.
        compile: Whether to compile with inductor.
        gradients: Whether gradients are needed; they are zeros if not, and a function that leaves
            torch will do.
        native: Whether a small graph on a CPU becomes native code, which takes a moment.

    Returns:
        The evaluator. Its ``mode`` is ``"compiled"``, ``"graph"``, ``"graph-loop"`` (chain by
        chain through the graph) or ``"eager"`` (chain by chain through ``function``); ``reason``
        says why not better. The last two warn.

    Raises:
        ValueError: If the density draws random numbers, changes a module's buffers, writes into
            tensors it did not create, differs between two calls, or has a wrong shape.

    Example:
        >>> def function(u):
        ...     return -0.5 * u.square().sum(-1), -2.0 * u.square().sum(-1)
        >>> density = capture(function, torch.zeros(2), num_chains=3)
        >>> density.mode
        'graph'
        >>> density(torch.ones(3, 2)).grad_target[0]
        tensor([-4., -4.])
    """
    example = example.detach().contiguous()
    options: dict[str, Any] = {"num_chains": num_chains, "gradients": gradients}
    options["native"] = native or compile
    kind = kind_of(example, compile=compile, gradients=gradients, native=native or compile)
    with undisturbed(example.device), torch.inference_mode(False):
        recording = recorded_again(function, example, kind, gradients=gradients)
        density = find_kept(function, example, recording, kind, num_chains=num_chains)
        if density is None:
            density = _captured(function, example, recording, kind, compile=compile, **options)
    if density.mode in ("graph-loop", "eager"):
        how = "its graph" if density.mode == "graph-loop" else "the model"
        warnings.warn(
            f"the density is evaluated slowly, chain by chain through {how}: {density.reason}",
            stacklevel=2,
        )
    return density


def _captured(
    function: LogDensities,
    example: Tensor,
    recording: Recording | None,
    kind: Kind,
    *,
    num_chains: int,
    compile: bool,
    gradients: bool,
    native: bool,
) -> CapturedDensity:
    """Checks, records and vectorizes a function for the first time."""
    options: dict[str, Any] = {"num_chains": num_chains, "gradients": gradients}
    options["native"] = native
    at_example = check_pure(function, example, gradients=gradients)
    traced, reason = None, None
    exits: tuple[Exit, ...] = ()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the checks above have shown the model's own
            if recording is None:
                recording = record_densities(function, example, gradients=gradients)
            traced = trace(function, example, gradients=gradients, recording=recording)
    except Impure:
        raise
    except PositionLeft as error:
        reason, exits = f"it cannot be recorded ({error})", (error.exit,)
    except Exception as error:  # noqa: BLE001 - anything that a tracer or a model may raise
        reason = f"it cannot be recorded ({summary(error)})"
    if traced is not None and recording is not None:
        try:
            density = CapturedDensity(
                function, example, traced, compile=compile, reason=None, **options
            )
            probes = _probes(example)
            model = stacked([at_example, *density._eager_each(function, probes[1:])])
            mismatch = density._mismatch(function, probes, model)
            if mismatch is not None and density.native_source_and_inputs() is not None:
                density.without_native_code()
                mismatch = density._mismatch(function, probes, model)
            if mismatch is None:
                keep(density, recording, kind)
            else:
                density._trace = None
                density.reason = (
                    f"it depends on values that leave the graph, such as .numpy() or .item() "
                    f"({mismatch})"
                )
            return density
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - operations that record and do not replay
            reason = f"its graph does not replay ({summary(error)})"
    density = CapturedDensity(function, example, None, compile=False, reason=reason, **options)
    density.exits = exits
    return density


def _probes(example: Tensor) -> Tensor:
    """Moves the example by a little and by a unit, without the global random state."""
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(example.shape, generator=generator, dtype=torch.float64, device="cpu").to(
        example
    )
    return torch.stack([example, example + 0.1 * noise, example - noise])
