"""Which paths and kernels pay: a prototype of each, at equal gradients, on problems of known evidence.

``python benchmarks/paths_and_kernels.py [PROBLEM ...] [--methods NAME ...] [--repeats N]`` anneals
K = 64 chains from the prior, resampled among each other where their effective number falls below
.8 K, with 1000 gradients each, and writes the root mean square error of log Z over N independent runs
to ``benchmarks/results/paths_and_kernels.json``. ``--table`` prints it; ``--check`` tests both
identities of every method on a lopsided target with a few poor steps, and that persistent
momentum which does not turn at rejections is caught.

Every method has a pilot of its own, of 256 particles (or ``--pilots``, each for its share of the runs), that sets
temperatures at equal thermodynamic length, step sizes and scales; its gradients are not counted.
Prototypes share no code with the package: they are run on batches of plain tensors.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from paths_and_kernels_targets import PROBLEMS, Problem, State, draw_lopsided, lopsided, take
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "paths_and_kernels.json"
CHAINS, GRADIENTS, PILOT = 64, 1000, 256
_FIRST, _LAST = -250.0, 1e6  # log odds of the temperatures at the ends


@dataclass(frozen=True)
class Method:
    """A path and a kernel.

    Attributes:
        power: 0 for the geometric path; else that of the power mean of q and p between them, 1 - q of
            Masrani et al., 1 for the arithmetic path.
        persistence: None for fresh momenta; else the rate per unit of time at which momenta are
            partly refreshed.
        waste_free: Whether all states of a chain between two resamplings are particles.
        stratified: Whether lengths of momenta are stratified over the chains of a population.
        fading: Power m of the base on the path q^((1 - beta)^m) p^beta; 1 for the geometric one.
    """

    leapfrogs: int = 2
    accept: float = 0.75
    jitter: float = 0.5
    power: float = 0.0
    dense: bool = False
    persistence: float | None = None
    waste_free: bool = False
    stratified: bool = False
    fading: float = 1.0

    def log_density(self, state: State, odds: float) -> Tensor:
        """Computes the path's log density at a temperature given by its log odds."""
        odds_ = torch.tensor(odds, dtype=torch.float64)
        if self.power == 0.0:
            base = torch.sigmoid(-odds_) ** self.fading
            return base * state.log_q + torch.sigmoid(odds_) * state.log_p
        low = self.power * state.log_q - softplus(odds_)
        return torch.logaddexp(low, self.power * state.log_p + logsigmoid(odds_)) / self.power

    def grad(self, state: State, odds: float) -> Tensor:
        """Computes its gradient."""
        if self.fading != 1.0:
            odds_ = torch.tensor(odds, dtype=torch.float64)
            base = torch.sigmoid(-odds_) ** self.fading
            return base * state.grad_q + torch.sigmoid(odds_) * state.grad_p
        shift = self.power * (state.log_p - state.log_q)
        return torch.lerp(state.grad_q, state.grad_p, torch.sigmoid(odds + shift).unsqueeze(-1))


METHODS = {
    "HMC, 2 leapfrogs (the default)": Method(),
    "1 leapfrog": Method(leapfrogs=1, accept=0.6),
    "4 leapfrogs": Method(leapfrogs=4, accept=0.9, jitter=0.15),
    "q-path, q = .9999": Method(power=1e-4),
    "q-path, q = .999": Method(power=1e-3),
    "q-path, q = .99": Method(power=1e-2),
    "arithmetic path": Method(power=1.0),
    "fading base, m = 100": Method(fading=100.0),
    "dense mass": Method(dense=True),
    "persistent momentum, rate 1": Method(leapfrogs=1, accept=0.9, jitter=0.0, persistence=1.0),
    "persistent momentum, rate .3": Method(leapfrogs=1, accept=0.9, jitter=0.0, persistence=0.3),
    "waste-free": Method(waste_free=True),
    "stratified momenta": Method(stratified=True),
    "stratified momenta, 4 leapfrogs": Method(
        leapfrogs=4, accept=0.9, jitter=0.15, stratified=True
    ),
}


class Tuning(NamedTuple):
    """What a pilot set at one temperature."""

    step: float
    factor: Tensor  # scales [D], or a factor of a covariance [D, D]

    def whiten(self, vector: Tensor) -> Tensor:
        """Applies the transpose of the factor."""
        return vector * self.factor if self.factor.dim() == 1 else vector @ self.factor

    def colour(self, vector: Tensor) -> Tensor:
        """Applies the factor."""
        return vector * self.factor if self.factor.dim() == 1 else vector @ self.factor.T


class Plan(NamedTuple):
    """The path of a run."""

    odds: list[float]  # of temperatures, the ends included
    tunings: list[Tuning]  # one for each
    length: float


def _normal(shape: tuple[int, ...], stratified: bool) -> Tensor:
    """Draws momenta; stratified, the lengths of one population fill all strata of chi."""
    drawn = torch.randn(shape, dtype=torch.float64)
    if not stratified:
        return drawn
    *_, chains, dim = shape
    rank = torch.rand(shape[:-1], dtype=torch.float64).argsort(-1)
    uniform = (rank + torch.rand(shape[:-1], dtype=torch.float64)) / chains
    grid = _chi(dim)
    at = uniform * (len(grid) - 1)
    below = at.long().clamp(max=len(grid) - 2)
    length = torch.lerp(grid[below], grid[below + 1], at - below)
    return drawn * (length / drawn.norm(dim=-1)).unsqueeze(-1)


_CHI: dict[int, Tensor] = {}


def _chi(dim: int) -> Tensor:
    if dim not in _CHI:
        from scipy.stats import chi

        levels = np.linspace(0.0, 1.0, 20_001).clip(1e-9, 1.0 - 1e-9)
        _CHI[dim] = torch.from_numpy(chi.ppf(levels, dim))
    return _CHI[dim]


def move(
    problem: Problem,
    method: Method,
    state: State,
    velocity: Tensor,
    odds: float,
    tuning: Tuning,
    *,
    turns: bool = True,
) -> tuple[State, Tensor, Tensor]:
    """Moves all chains once: the momentum is refreshed, followed, and turned where the end is rejected.

    Run backward in time the same step goes along the opposite momentum; since that has the law of the
    momentum itself, positions of chains with persistent momentum have the law of their reversal.

    Args:
        problem: What to evaluate.
        method: How to move.
        state: Of all chains.
        velocity: Whitened momenta.
        odds: Of the temperature.
        tuning: Step size and scales.
        turns: Whether momenta turn at rejections; if not, no density stays invariant.

    Returns:
        State, momentum and acceptance probabilities.
    """
    shape, kept = tuple(velocity.shape), 0.0
    if method.persistence is not None:
        kept = math.exp(-method.persistence * method.leapfrogs * tuning.step)
    fresh = _normal(shape, method.stratified)
    velocity = kept * velocity + math.sqrt(1.0 - kept**2) * fresh
    wobble = 2.0 * torch.rand((*shape[:-1], 1), dtype=torch.float64) - 1.0
    step = tuning.step * (1.0 + method.jitter * wobble)
    end, momentum = state, velocity + 0.5 * step * tuning.whiten(method.grad(state, odds))
    for left in reversed(range(method.leapfrogs)):
        end = problem.evaluate(end.position + step * tuning.colour(momentum))
        size = step if left else 0.5 * step
        momentum = momentum + size * tuning.whiten(method.grad(end, odds))
    energy = 0.5 * (velocity.square().sum(-1) - momentum.square().sum(-1))
    log_accept = method.log_density(end, odds) - method.log_density(state, odds) + energy
    accept = log_accept.clamp(max=0.0).exp().nan_to_num(0.0)
    taken = torch.rand(accept.shape, dtype=torch.float64) < accept
    state = State(
        *(
            torch.where(taken.unsqueeze(-1) if new.dim() > taken.dim() else taken, new, old)
            for new, old in zip(end, state, strict=True)
        )
    )
    back = -velocity if turns else velocity
    return state, torch.where(taken.unsqueeze(-1), momentum, back), accept


def _ancestors(log_weights: Tensor, count: int) -> Tensor:
    """Draws ``count`` systematic ancestors of each population, ``[S, count]``."""
    cumulative = log_weights.softmax(-1).cumsum(-1)
    start = torch.rand((len(log_weights), 1), dtype=torch.float64)
    points = (start + torch.arange(count, dtype=torch.float64)) / count * cumulative[:, -1:]
    return torch.searchsorted(cumulative, points).clamp(max=log_weights.shape[1] - 1)


def _log_mean(log_weights: Tensor) -> Tensor:
    return log_weights.logsumexp(-1) - math.log(log_weights.shape[-1])


def _effective(log_weights: Tensor) -> Tensor:
    """Computes the effective share of each population."""
    double = 2.0 * log_weights.logsumexp(-1) - (2.0 * log_weights).logsumexp(-1)
    return double.exp() / log_weights.shape[-1]


def _factor(method: Method, position: Tensor) -> Tensor:
    """Estimates scales, or a factor of the covariance shrunk toward them."""
    rows = position.flatten(0, 1)
    spread = rows.std(0).clamp(min=1e-8)
    if not method.dense:
        return spread
    share = len(rows) / (len(rows) + 3.0 * rows.shape[1])
    covariance = share * rows.T.cov() + (1.0 - share) * torch.diag(spread.square())
    return torch.linalg.cholesky(covariance)


def pilot(problem: Problem, method: Method, *, most: int = 400) -> Plan:
    """Walks particles from base to target in stages of effective share .6."""
    start = problem.scale * torch.randn((1, PILOT, problem.dim), dtype=torch.float64)
    state = problem.evaluate(start)
    velocity = torch.randn_like(start)
    odds, step, length = _FIRST, 0.5, 0.0
    factor = torch.full((problem.dim,), problem.scale, dtype=torch.float64)
    found: list[tuple[float, Tuning, float]] = []
    while True:
        moves = 20 if not found else 8
        late = 0.0
        for number in range(moves):
            tuning = Tuning(step, factor)
            state, velocity, accept = move(problem, method, state, velocity, odds, tuning)
            change = (1.5 if not found else 0.8) / (1.0 + number) ** 0.6
            step *= math.exp(change * (float(accept.mean()) - method.accept))
            late += math.log(step) / (moves // 2) if number >= moves // 2 else 0.0
        step = math.exp(late)
        found.append((odds, Tuning(step, factor), length))
        if odds >= _LAST or len(found) >= most:
            break
        here = method.log_density(state, odds)

        def share(other: float, here: Tensor = here, state: State = state) -> float:
            return float(_effective(method.log_density(state, other) - here))

        low, high = odds, _LAST
        if share(_LAST) < 0.6:
            for _ in range(70):
                middle = 0.5 * (low + high)
                low, high = (middle, high) if share(middle) >= 0.6 else (low, middle)
            following = low
        else:
            following = _LAST
        length += math.sqrt(max(-math.log(share(following)), 0.0))
        weights = method.log_density(state, following) - here
        index = _ancestors(weights, PILOT)
        state, velocity, odds = state.take(index), take(velocity, index), following
        factor = _factor(method, state.position)
    return Plan([x[0] for x in found], [x[1] for x in found], found[-1][2] if found else 0.0)


def lay(method: Method, found: Plan, num_steps: int) -> Plan:
    """Places ``num_steps`` temperatures at equal distances between those of a pilot."""
    stages = len(found.odds) - 1
    clock = np.linspace(0.0, stages, num_steps + 1)  # stages of a pilot are equally long
    lower = np.minimum(clock.astype(int), stages - 1)
    odds, tunings = [], []
    for at, below in zip(clock, lower, strict=True):
        share = float(at - below)
        ends = found.odds[below], found.odds[below + 1]
        if method.power and _FIRST < ends[0] and ends[1] < _LAST:
            odds.append((1.0 - share) * ends[0] + share * ends[1])
        else:
            odds.append(_between(*ends, share))
        one, two = found.tunings[below], found.tunings[below + 1]
        step = math.exp((1.0 - share) * math.log(one.step) + share * math.log(two.step))
        factor = torch.lerp(one.factor, two.factor, share)
        if factor.dim() == 1:
            factor = torch.lerp(one.factor.log(), two.factor.log(), share).exp()
        tunings.append(Tuning(step, factor))
    odds[0], odds[-1] = found.odds[0], found.odds[-1]
    return Plan(odds, tunings, found.length)


def _between(low: float, high: float, share: float) -> float:
    """Interpolates temperatures linearly, by whichever end they are near."""
    sign = -1.0 if low > 0.0 else 1.0
    ends = [1.0 / (1.0 + math.exp(min(-sign * x, 700.0))) for x in (low, high)]
    beta = ends[0] + share * (ends[1] - ends[0])
    if not 0.0 < beta < 1.0:
        return low if share < 0.5 else high
    return sign * (math.log(beta) - math.log1p(-beta))


def anneal(
    problem: Problem,
    method: Method,
    plan: Plan,
    repeats: int,
    chains: int,
) -> Tensor:
    """Runs S populations and returns their estimates of log Z."""
    start = problem.scale * _normal((repeats, chains, problem.dim), method.stratified)
    state = problem.evaluate(start)
    velocity = _normal((repeats, chains, problem.dim), False)
    log_weights = torch.zeros(repeats, chains, dtype=torch.float64)
    for before, odds, tuning in zip(plan.odds, plan.odds[1:], plan.tunings[1:], strict=False):
        log_weights += method.log_density(state, odds) - method.log_density(state, before)
        if odds == plan.odds[-1]:
            break
        needed = (_effective(log_weights) < 0.8).unsqueeze(-1)
        own = torch.arange(chains).expand(repeats, chains)
        index = torch.where(needed, _ancestors(log_weights, chains), own)
        log_weights = torch.where(needed, _log_mean(log_weights).unsqueeze(-1), log_weights)
        state, velocity, _ = move(
            problem, method, state.take(index), take(velocity, index), odds, tuning
        )
    return _log_mean(log_weights)


def anneal_without_waste(
    problem: Problem, method: Method, plan: Plan, repeats: int, chains: int, moves: int
) -> Tensor:
    """Runs S populations in which every state of each chain is a particle (Dau and Chopin 2022)."""
    first = problem.scale * _normal((repeats, chains * moves, problem.dim), method.stratified)
    state = problem.evaluate(first)
    total = torch.zeros(repeats, dtype=torch.float64)
    for before, odds, tuning in zip(plan.odds, plan.odds[1:], plan.tunings[1:], strict=False):
        weights = method.log_density(state, odds) - method.log_density(state, before)
        total += _log_mean(weights)
        if odds == plan.odds[-1]:
            break
        here = state.take(_ancestors(weights, chains))
        velocity = torch.randn_like(here.position)
        seen = []
        for _ in range(moves):
            here, velocity, _ = move(problem, method, here, velocity, odds, tuning)
            seen.append(here)
        state = State(*(torch.cat(parts, 1) for parts in zip(*seen, strict=True)))
    return total


def estimate(problem: Problem, method: Method, repeats: int, pilots: int) -> tuple[Tensor, Plan]:
    """Runs pilots, and S populations of the budget divided among them; also returns one pilot."""
    num_moves = GRADIENTS // method.leapfrogs
    values = []
    for _ in range(pilots):
        found, count = pilot(problem, method), repeats // pilots
        if method.waste_free:
            stages = min(max(math.ceil(1.5 * found.length), 8), num_moves // 2)
            plan, moves = lay(method, found, stages), num_moves // stages
            values.append(anneal_without_waste(problem, method, plan, count, CHAINS, moves))
        else:
            values.append(anneal(problem, method, lay(method, found, num_moves), count, CHAINS))
    return torch.cat(values), found


def reverse_weights(problem: Problem, method: Method, plan: Plan, ends: Tensor) -> Tensor:
    """Runs chains back from exact draws and returns their log-weights."""
    state = problem.evaluate(ends.unsqueeze(1))
    velocity = torch.randn_like(state.position)
    log_weights = torch.zeros_like(state.log_q)
    for number in range(len(plan.odds) - 1, 0, -1):
        odds, before = plan.odds[number], plan.odds[number - 1]
        log_weights += method.log_density(state, odds) - method.log_density(state, before)
        if number > 1:
            tuning = plan.tunings[number - 1]
            state, velocity, _ = move(problem, method, state, velocity, before, tuning)
    return log_weights[:, 0]


def drift(problem: Problem, method: Method, draws: Tensor, *, turns: bool) -> Tensor:
    """Moves exact draws of the target thirty times and returns how far log p rose, each."""
    state = before = problem.evaluate(draws.unsqueeze(1))
    velocity = torch.randn_like(state.position)
    tuning = Tuning(1.6, torch.full((problem.dim,), 0.7, dtype=torch.float64))
    for _ in range(30):
        state, velocity, _ = move(problem, method, state, velocity, _LAST, tuning, turns=turns)
    return (state.log_p - before.log_p)[:, 0]


def check() -> None:
    """Measures E[exp L] / Z and E[Z exp(-U)] of every method, with its error.

    Of persistent momentum also whether draws of the target stay its draws.
    """
    problem, count = lopsided(), 120_000
    scale = torch.full((2,), 0.7, dtype=torch.float64)
    odds = [_FIRST, -2.0, -0.7, 0.5, 1.5, _LAST]
    exact = draw_lopsided(count)

    def show(name: str, values: Tensor) -> None:
        error = float(values.std()) / math.sqrt(len(values))
        off = (float(values.mean()) - 1.0) / error
        print(f"{name:48s} {float(values.mean()):.4f} +- {error:.4f} ({off:+.1f})", flush=True)

    for name, method in METHODS.items():
        factor = torch.diag(scale) if method.dense else scale
        step = 0.8 if method.persistence is None else 1.6  # with many rejections
        plan = Plan(odds, [Tuning(step, factor)] * len(odds), 0.0)
        if method.waste_free:
            lower = anneal_without_waste(problem, method, plan, count // 4, 2, 2)
        else:
            lower = anneal(problem, method, plan, count // 4, 4)
        show(f"{name}: forward", lower.exp())
        show(f"{name}: reverse", (-reverse_weights(problem, method, plan, exact)).exp())
        if method.persistence is not None:
            for turns, what in ((True, "stays"), (False, "does not turn, and leaves")):
                show(f"{name}: {what}", 1.0 + drift(problem, method, exact, turns=turns))


def table(record: dict[str, dict[str, dict[str, float]]]) -> None:
    """Prints errors, a row for each method."""
    names = [name for name in PROBLEMS if name in record]
    print("| method |", " | ".join(names), "|")
    print("|---" * (len(names) + 1) + "|")
    for method in METHODS:
        cells = [record[name].get(method) for name in names]
        shown = ["" if cell is None else f"{cell['rms']:.3g}" for cell in cells]
        print(f"| {method} |", " | ".join(shown), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problems", nargs="*", default=[], help="parts of names; all if none")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--pilots", type=int, default=1)
    parser.add_argument("--save", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.check:
        return check()
    record = json.loads(options.save.read_text()) if options.save.exists() else {}
    for name, make in PROBLEMS.items():
        wanted = not options.problems or any(part in name for part in options.problems)
        if options.table or not wanted:
            continue
        problem = make()
        for method in options.methods:
            began = time.process_time()
            torch.manual_seed(0)
            repeats = options.repeats or problem.repeats
            values, found = estimate(problem, METHODS[method], repeats, options.pilots)
            errors = values - problem.truth
            record.setdefault(name, {})[method] = {
                "rms": float(errors.square().mean().sqrt()),
                "mean": float(errors.mean()),
                "sd": float(errors.std()),
                "repeats": len(values),
                "pilots": options.pilots,
                "length": found.length,
                "stages": len(found.odds) - 1,
                "cpu_seconds": time.process_time() - began,
            }
            print(name, method, record[name][method], flush=True)
            options.save.write_text(json.dumps(record, indent=1) + "\n")
    return table(record)


if __name__ == "__main__":
    main()
