"""Whether float32 is enough for a problem, judged where the posterior is.

The same densities are evaluated in float64 at points like draws of the posterior: the fitted
Gaussian's, or the best of some draws of the base, moved uphill. There a run needs log densities, and
positions, to within a hundredth of a nat.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..graphs.evaluation import LogDensities, Outputs, evaluate_or_nan
from ..graphs.purity import undisturbed
from ..models.precision import in_float64

__all__ = ["TOLERANCE", "why_float64"]

TOLERANCE = 0.01  # nats
_NUM_DRAWS = 8


def why_float64(
    function: LogDensities,
    evaluate: Callable[[Tensor], Outputs],
    draws: Tensor,
    *,
    ascend: bool,
    num_steps: int = 60,
) -> str | None:
    """Says why a problem needs float64; None if float32 is enough.

    Args:
        function: One chain's log densities through the model, in its own precision.
        evaluate: Evaluates one chain quickly: log densities and gradients.
        draws: Draws of the base, ``[M, *batch, D]``.
        ascend: Whether gradients may lead from the draws to where the posterior is.
        num_steps: Number of such steps.

    Returns:
        A sentence for the notes of a run.
    """
    with undisturbed(draws.device), torch.no_grad():
        point = _uphill(evaluate, draws, num_steps if ascend else 0)
        narrow = evaluate_or_nan(function, point, gradients=False)
        with in_float64():
            wide = evaluate_or_nan(function, point.double(), gradients=False)
            # Half the distance to the next float32, one way or the other for each coordinate.
            generator = torch.Generator("cpu").manual_seed(0)
            signs = torch.randint(0, 2, point.shape, generator=generator, device="cpu") * 2 - 1
            signs = signs.to(point.device)
            ulp = torch.finfo(torch.float32).eps * point.double().abs()
            moved = evaluate_or_nan(function, point.double() + signs * ulp / 2, gradients=False)
    if any(value.dtype is torch.float64 for value in narrow[:2]) and point.dtype is torch.float32:
        return "data or parameters are float64 and latents float32"
    worst = max(float(_largest(a.double() - b)) for a, b in zip(narrow[:2], wide[:2], strict=True))
    unit = torch.finfo(torch.float32).eps * float(_largest(wide[1]))  # of the sum itself
    if max(worst, unit) > TOLERANCE:
        return f"log densities in float32 are wrong by about {max(worst, unit):.2g} nats"
    grid = float(_largest(moved[1] - wide[1]))
    if ascend and point.dtype is torch.float32 and grid > TOLERANCE:
        return f"neighbouring float32 positions differ by about {grid:.2g} nats"
    return None


def _largest(value: Tensor) -> Tensor:
    return value.abs().where(value.isfinite(), 0.0).max()


def _uphill(evaluate: Callable[[Tensor], Outputs], draws: Tensor, num_steps: int) -> Tensor:
    """Moves the best draw of each row uphill, by steps of Adam that shrink."""
    values = torch.stack([evaluate(draw)[1] for draw in draws])
    best = values.nan_to_num(nan=-torch.inf).argmax(0)
    index = best[None, ..., None].expand(1, *draws.shape[1:])
    point = draws.gather(0, index)[0].nan_to_num()
    outputs = evaluate(point)
    found, score = point, outputs[1]
    first, second = torch.zeros_like(point), torch.zeros_like(point)
    for step in range(1, num_steps + 1):
        grad = outputs[3].nan_to_num(posinf=0.0, neginf=0.0).to(point)
        first, second = 0.8 * first + 0.2 * grad, 0.95 * second + 0.05 * grad.square()
        mean = first / (1.0 - 0.8**step)
        scale = (second / (1.0 - 0.95**step)).sqrt() + torch.finfo(point.dtype).tiny
        point = point + 0.3 * (1.0 - step / (num_steps + 1)) ** 2 * mean / scale
        outputs = evaluate(point)
        value = outputs[1]
        better = value > score
        found = torch.where(better.unsqueeze(-1), point, found)
        score = torch.where(better, value, score)
    return found
