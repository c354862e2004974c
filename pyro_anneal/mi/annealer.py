r"""Annealing for pairs: K chains per pair, batched over pairs, from a base to a target over z.

The same loops, kernels and pilot as :class:`~pyro_anneal.AnnealedImportance`, on log densities that
are functions of tensors. The pilot sees x and draws of the base, never the z of a pair.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import bounds
from ..arguments import as_flag
from ..chains.grouping import choose_grouping
from ..chains.loop import reversed_paths, run_chains
from ..chains.path import Carry, Path
from ..chains.plan import PathOptions
from ..chains.resampling import Reference, Resampling, systematic_ancestors
from ..chains.tuning import Particles, Tuned, lay_path, tune
from ..compiled.choice import with_loop
from ..graphs.captured import CapturedDensity, capture
from ..kernels import Density, State
from ..models.validation import validation_disabled
from ..persistence.randomness import seeded_generator
from .bijections import Bijection

__all__ = ["AnnealedWeights", "Annealer", "PairDensity"]

# Gradients of a run above which recording the density as a graph repays the two seconds it takes
# (a Pyro model's gradient then costs about a third).
_CAPTURE_ABOVE = 1000
_LARGEST = 64  # steps of a first round at most; every further round may double them


class PairDensity:
    """Evaluates base and target of K chains for N pairs, and both gradients, in the space of u.

    Args:
        log_densities: Maps ``z [K, N, *z_event]`` to the log densities of base and target,
            ``[K, N]`` each.
        bijection: From u to z.
    """

    def __init__(
        self, log_densities: Callable[[Tensor], tuple[Tensor, Tensor]], bijection: Bijection
    ) -> None:
        self.log_densities = log_densities
        self.bijection = bijection

    def __call__(self, position: Tensor) -> State:
        """Evaluates ``u [K, N, D]``."""
        with torch.enable_grad(), validation_disabled():
            u = position.detach().requires_grad_()
            z, log_det = self.bijection.constrain(u)
            log_base, log_target = (value + log_det for value in self.log_densities(z))
            grad_base = torch.autograd.grad(log_base.sum(), u, retain_graph=True)[0]
            grad_target = torch.autograd.grad(log_target.sum(), u)[0]
        return State(position, log_base.detach(), log_target.detach(), grad_base, grad_target)

    def one_chain(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluates base and target of one chain, ``u [N, D]`` to ``[N]`` each."""
        with validation_disabled():
            z, log_det = self.bijection.constrain(position.unsqueeze(0))
            log_base, log_target = self.log_densities(z)
            return (log_base + log_det)[0], (log_target + log_det)[0]


class AnnealedWeights(NamedTuple):
    """Log-weights of the chains of N pairs, in nats; what was not asked for has no rows.

    Where chains are resampled, estimates of R populations stand in place of K log-weights.
    """

    forward: Tensor  # [K, N]
    reverse: Tensor  # from the z of the pair, [K, N]
    coupled: Tensor  # reverse, from the end of the first forward chain, [K - 1 or 0, N]
    independent: Tensor  # reverse, from other posterior samples, [K - 1 or 0, N]
    accept_prob: Tensor  # of the forward chains, mean over steps, scalar
    num_steps: int  # number T of weight increments

    def upper(self, kind: str) -> Tensor:
        """Computes an upper bound on the log normalizer, shape ``[N]``."""
        if kind == "CR":
            return bounds.coupled_upper(self.reverse)
        if kind == "IM":
            return bounds.independent_multi_upper(self.reverse[:1], self.forward[1:])
        if kind == "IR":
            both = torch.cat([self.reverse[:1], self.independent])
            return bounds.independent_reverse_upper(both)
        return bounds.single_sample(self.reverse)

    def lower(self, kind: str) -> Tensor:
        """Computes a lower bound on the log normalizer, shape ``[N]``."""
        if kind == "CR":
            return bounds.coupled_lower(self.forward[:1], self.coupled)
        if kind == "IM":
            return bounds.independent_multi_lower(self.forward)
        if kind == "IR":
            return bounds.independent_reverse_lower(self.forward[:1], self.independent)
        return bounds.single_sample(self.forward)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Annealer(PathOptions):
    """How pairs are annealed: K chains per pair and direction.

    Args:
        compile: ``"auto"`` makes native code of chunks of steps, or has torch compile large
            densities, when the runs to come repay it; True or False decide.

    Raises:
        ValueError: If a number is out of range or the schedule is unknown.
    """

    compile: bool | str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        as_flag("compile", self.compile)

    def _recorded(self, density: PairDensity, example: Tensor) -> PairDensity | CapturedDensity:
        """Records the density as a graph where that pays; keeps it where that fails."""
        steps = _LARGEST if self.plan.target_gap is not None else self.plan.num_steps
        gradients = steps * self.plan.kernel.num_gradients
        if self.compile is not True and gradients < _CAPTURE_ABOVE:
            return density
        with warnings.catch_warnings():
            # Our own evaluation runs all chains at once, so nothing is lost without a graph.
            warnings.filterwarnings("ignore", message="the density is evaluated slowly")
            captured = capture(
                density.one_chain,
                example,
                num_chains=self.num_chains,
                native=self.compile is not False,
            )
        return captured if captured.mode in ("graph", "compiled") else density

    def run(
        self,
        log_densities: Callable[[Tensor], tuple[Tensor, Tensor]],
        bijection: Bijection,
        draw: Callable[[int], Tensor],
        z: Tensor,
        *,
        posterior: Tensor | None = None,
        coupled_lower: bool = False,
        num_batches: int = 1,
        num_steps: int | None = None,
        gap: Callable[[AnnealedWeights], Tensor] | None = None,
    ) -> AnnealedWeights:
        """Runs forward and reverse chains for N pairs.

        With a ``target_gap`` rounds of more and more steps come first, until the mean gap over
        pairs is at the target. They only choose T: their weights are dropped, and chains of that
        length are run anew, so the choice does not favour pairs whose bounds happened to agree.

        Args:
            log_densities: Maps ``z [K, N, *z_event]`` to log densities of base and target.
            bijection: From unconstrained vectors to z.
            draw: Draws n values of the base per pair, ``[n, N, *z_event]``.
            z: Starts of the reverse chains, ``[N, *z_event]``.
            posterior: Further independent posterior samples, ``[K - 1, N, *z_event]``.
            coupled_lower: Whether to run the chains of the CR lower bound.
            num_batches: Batches of so many pairs to come, this one among them: what is compiled
                serves all.
            num_steps: Number T that rounds on another batch have chosen for this one.
            gap: Measures the gap of each pair, ``[N]``; that of IM lower and CR upper by default.

        Returns:
            The log-weights.
        """
        seed = int(torch.randint(2**62, ()))

        def base(count: int) -> Tensor:
            return bijection.unconstrain(draw(count))

        example = base(1)[0]
        density = self._recorded(PairDensity(log_densities, bijection), example)
        tuned = tune(Particles(density, base, example, seed), self.plan, num_steps=num_steps)
        pairs = _Pairs(self, density, bijection, base, z, posterior, coupled_lower, seed)
        found = tuned.found
        target = None if found is None else found.plan.target_gap
        if found is not None and target is not None:
            measure = _default_gap if gap is None else gap
            for number in range(1, self.plan.max_rounds + 1):
                gaps = measure(pairs.anneal(tuned, f", round {number}", num_batches=1))
                wanted = self._steps_after(target, tuned.path.num_steps, gaps)
                longer = found.plan.with_steps(max(wanted, tuned.path.num_steps))
                is_enough = wanted <= tuned.path.num_steps
                tuned = Tuned(*lay_path(found, longer, example))
                if is_enough:
                    break
        return pairs.anneal(tuned, "", num_batches=num_batches)

    def _steps_after(self, target: float, num_steps: int, gaps: Tensor) -> int:
        """Chooses the next T; no more than this one where its gap is at the target."""
        noise = gaps.std() / len(gaps) ** 0.5 if len(gaps) > 1 else torch.zeros(())
        measured = float(gaps.mean() + noise)  # an upper end: the mean of few gaps is uncertain
        if measured <= target:
            return num_steps
        # The gap falls as 1 / T once chains keep up with the path.
        growth = min(max(measured / target, 2.0), 4.0) if math.isfinite(measured) else 4.0
        largest = _LARGEST << (self.plan.max_rounds - 1)
        return min(math.ceil(num_steps * growth), max(largest, num_steps))

    def sample(
        self,
        log_densities: Callable[[Tensor], tuple[Tensor, Tensor]],
        bijection: Bijection,
        draw: Callable[[int], Tensor],
        num_samples: int,
    ) -> Tensor:
        """Draws from the target, by forward chains that are resampled by their weights.

        Args:
            log_densities: As in :meth:`run`.
            bijection: Likewise.
            draw: Likewise.
            num_samples: Number S of draws per pair.

        Returns:
            Draws ``[S, N, *z_event]``.
        """
        seed = int(torch.randint(2**62, ()))

        def base(count: int) -> Tensor:
            return bijection.unconstrain(draw(count))

        first = base(max(num_samples, self.num_chains))
        density = PairDensity(log_densities, bijection)
        path, _, _ = tune(Particles(density, base, first[0], seed), self.plan)
        carry, _ = run_chains(
            density, path, density(first), direction="forward", seed=seed, stream="forward"
        )
        generator = seeded_generator(first.device, seed, "posterior samples")
        ancestors = systematic_ancestors(carry.log_weights, generator)
        shuffled = torch.rand(ancestors.shape, generator=generator, device=first.device).argsort(0)
        chosen = ancestors.gather(0, shuffled)[:num_samples]
        position = carry.state.position
        index = chosen.unsqueeze(-1).expand(num_samples, *position.shape[1:])
        return bijection.constrain(position.gather(0, index))[0]


def _default_gap(weights: AnnealedWeights) -> Tensor:
    return weights.upper("CR") - weights.lower("IM")


@dataclass(frozen=True, eq=False)
class _Pairs:
    """The chains of N pairs, in all directions that are wanted."""

    annealer: Annealer
    density: PairDensity | CapturedDensity
    bijection: Bijection
    base: Callable[[int], Tensor]  # draws positions [n, N, D]
    z: Tensor
    posterior: Tensor | None
    coupled_lower: bool
    seed: int

    def anneal(self, tuned: Tuned, suffix: str, *, num_batches: int) -> AnnealedWeights:
        """Runs all chains on a path; the string tells their streams of noise apart."""
        path, summary, plan = tuned.path, tuned.summary, self.annealer.plan
        first = self.base(plan.num_chains)
        density: Density = self.density
        if isinstance(self.density, CapturedDensity):
            runs = 2 + self.coupled_lower + (self.posterior is not None)
            density = with_loop(
                self.density, path, self.annealer.compile, num_runs=num_batches * runs
            )
        grouping = choose_grouping(
            False if self.posterior is not None else plan.resampling,
            num_chains=plan.num_chains,
            num_steps=path.num_steps,
            length=math.nan if summary is None else summary.length,
            variance=math.nan if summary is None else summary.expected_variance,
        )
        exact = self.bijection.unconstrain(self.z.unsqueeze(0))
        if grouping.resampling is not None:
            populations = _Populations(density, path, grouping.resampling, self.seed, suffix)
            return populations.run(self.base, first, exact[0], self.coupled_lower)
        carry, statistics = run_chains(
            density,
            path,
            density(first),
            direction="forward",
            seed=self.seed,
            stream=f"forward{suffix}",
        )

        def reverse(position: Tensor, stream: str) -> Tensor:
            return run_chains(
                density,
                path,
                density(position.contiguous()),
                direction="reverse",
                seed=self.seed,
                stream=stream + suffix,
            )[0].log_weights

        count, num_pairs = plan.num_chains, len(self.z)
        coupled = independent = carry.log_weights[:0]
        if self.coupled_lower and count > 1:
            end = carry.state.position[:1].expand(count - 1, num_pairs, -1)
            coupled = reverse(end, "coupled reverse")
        if self.posterior is not None:
            independent = reverse(
                self.bijection.unconstrain(self.posterior), "independent reverse"
            )
        moves = statistics.accept_prob
        return AnnealedWeights(
            carry.log_weights,
            reverse(exact.expand(count, num_pairs, -1), "reverse"),
            coupled,
            independent,
            moves.mean() if len(moves) else moves.new_full((), torch.nan),
            path.num_steps,
        )


@dataclass(frozen=True)
class _Populations:
    """Resamples the chains of pairs, forward and around paths from posterior samples."""

    density: Density
    path: Path
    resampling: Resampling
    seed: int
    suffix: str = ""

    def run(
        self, base: Callable[[int], Tensor], first: Tensor, exact: Tensor, coupled_lower: bool
    ) -> AnnealedWeights:
        """Runs populations from the base, and around paths that end at ``exact [N, D]``."""
        carry, moves = self._from(first, "forward")
        size, coupled = self.resampling.population_size, carry.log_weights[:0]
        if coupled_lower and len(first) > size:
            generator = seeded_generator(first.device, self.seed, "an end of the first population")
            chosen = systematic_ancestors(carry.log_weights[:size], generator)[:1]
            position = carry.state.position
            index = chosen.unsqueeze(-1).expand(1, *position.shape[1:])
            again = self._around(base, position.gather(0, index)[0], len(first), "coupled reverse")
            coupled = self._estimates(again)[1:]
        return AnnealedWeights(
            self._estimates(carry.log_weights),
            self._estimates(self._around(base, exact, len(first), "reverse")),
            coupled,
            carry.log_weights[:0],
            moves.mean() if len(moves) else moves.new_full((), torch.nan),
            self.path.num_steps,
        )

    def _estimates(self, log_weights: Tensor) -> Tensor:
        return bounds.block_means(log_weights, len(log_weights) // self.resampling.population_size)

    def _from(
        self, position: Tensor, stream: str, paths: Reference | None = None
    ) -> tuple[Carry, Tensor]:
        carry, statistics = run_chains(
            self.density,
            self.path,
            self.density(position.contiguous()),
            direction="forward",
            seed=self.seed,
            stream=stream + self.suffix,
            resampling=self.resampling,
            reference=paths,
        )
        return carry, statistics.accept_prob

    def _around(
        self, base: Callable[[int], Tensor], end: Tensor, num_chains: int, stream: str
    ) -> Tensor:
        paths = reversed_paths(
            self.density,
            self.path,
            self.density(end.expand(num_chains, *end.shape).contiguous()),
            self.resampling,
            seed=self.seed,
            stream=f"{stream} paths{self.suffix}",
        )
        return self._from(base(num_chains), f"{stream} populations", paths)[0].log_weights
