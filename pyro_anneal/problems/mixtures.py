r"""Mixtures of fits: several optima, heavier tails, exchangeable elements.

A Gaussian of largest evidence lower bound covers one mode and has tails that are too light. From
several such fits, mixtures of Student-t are adapted by importance sampling: draws of the mixture
weighted by :math:`p(x, u) / q(u)` move weights, locations and scales by one step of expectation
maximization, which lowers the Kullback-Leibler divergence *from* the posterior and so covers it.
The base is judged on draws that did not fit it, and chosen before any chain of a run starts.

Source: Cappe, Douc, Guillin, Marin and Robert (2008), *Adaptive importance sampling in general
mixture classes*.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .components import DenseComponent
from .exchangeable import Symmetry
from .gaussian import Candidates, ascend, follow_newton, quadratic_models
from .leading import is_bent, leading_coordinates
from .nested import Nested, nested_gaussians
from .populations import Population, draw_population
from .rows import Rows

__all__ = ["Mixture", "adapt", "distinct", "mixture_of_fits"]

# Least weight of a component, and degrees of freedom of one: tails that hold any second moment.
_LEAST_WEIGHT, _DOF = 1e-3, 8.0
# Nats below the best bound at which another optimum no longer counts.
_LEAST_EVIDENCE = 12.0
# Nats below it at which one of another width does not either, and the Bhattacharyya distance from
# which widths count as different.
_LEAST_EVIDENCE_INSIDE, _WIDTH = 5.0, 2.0
# Nats of evidence by which a mixture exceeds a base that misses something.
_MISSED = 0.05
# Effective fraction of draws below which components are added, and how many.
_GOOD, _EXTRA = 0.5, 8
# That below which leading coordinates are looked for; a fit of a neck's end may look better.
_BETTER = 0.85
# Steps of expectation maximization on a population of particles.
_NUM_EM = 12


@dataclass(frozen=True, eq=False)
class Mixture:
    """A mixture of Student-t or Gaussians, averaged over permutations."""

    log_weights: Tensor  # [J]
    loc: Tensor  # [J, D]
    scale_tril: Tensor  # [J, D, D]
    dof: float
    symmetry: Symmetry | None

    def terms(self, position: Tensor) -> Tensor:
        """Computes log of weight times density by component at rows ``[N, D]``, ``[J, N]``."""
        parts = [
            DenseComponent(loc, scale, self.dof).log_density(position) + log_weight
            for loc, scale, log_weight in zip(
                self.loc, self.scale_tril, self.log_weights, strict=True
            )
        ]
        return torch.stack(parts)

    def orbit(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Moves rows ``[N, D]`` by all permutations: ``[P, N, D]`` and log Jacobians ``[P, N]``."""
        if self.symmetry is None:
            return position.unsqueeze(0), torch.zeros_like(position[:, 0]).unsqueeze(0)
        # rows stand where a batch would
        return self.symmetry.act(self.symmetry.elements(), position)

    def log_density(self, position: Tensor) -> Tensor:
        """Computes log q at rows ``[N, D]``."""
        rows, log_jacobian = self.orbit(position)
        terms = self.terms(rows.flatten(0, 1)).reshape(len(self.loc), *log_jacobian.shape)
        total = (terms.logsumexp(0) + log_jacobian).logsumexp(0)
        return total - math.log(len(log_jacobian))

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws rows ``[count, D]``; permutations do not matter to symmetric weights."""
        example = self.loc
        index = torch.multinomial(
            self.log_weights.exp(), count, replacement=True, generator=generator
        )
        noise = torch.randn(
            count,
            example.shape[-1],
            dtype=example.dtype,
            device=example.device,
            generator=generator,
        )
        if not math.isinf(self.dof):
            half = torch.full_like(noise[:, :1], 0.5 * self.dof)
            noise = (
                noise
                * (torch._standard_gamma(half, generator=generator) / (0.5 * self.dof)).rsqrt()
            )
        return self.loc[index] + (self.scale_tril[index] @ noise.unsqueeze(-1)).squeeze(-1)


def distinct(
    found: Candidates, symmetry: Symmetry | None, *, most: int = 8, widths: bool = False
) -> Candidates:
    """Keeps optima that differ, up to permutations, the best first.

    Args:
        found: Gaussians.
        symmetry: Permutations that make two of them one.
        most: Largest number kept.
        widths: Whether Gaussians at one place count as two where one is much wider.
    """
    # what is not finite would come first, and hide all others
    elbos = found.elbo.where(found.elbo.isfinite(), -torch.inf)
    order = elbos.argsort(descending=True)
    kept: list[int] = []
    best = float(elbos[order[0]])
    for candidate in order.tolist():
        elbo = float(elbos[candidate])
        # not "elbo > best - ...", which is false of the best itself where that is -1e20
        if elbo == -math.inf or elbo < best - _LEAST_EVIDENCE or len(kept) == most:
            break
        places = found.loc[candidate].unsqueeze(0)
        if symmetry is not None:
            places, _ = symmetry.act(symmetry.elements(), found.loc[candidate])
        by_width = widths and elbo > best - _LEAST_EVIDENCE_INSIDE
        if not any(_is_near(found, places, candidate, other, by_width) for other in kept):
            kept.append(candidate)
    return Candidates(found.loc[kept], found.scale_tril[kept], found.elbo[kept])


def _is_near(
    found: Candidates, places: Tensor, candidate: int, other: int, by_width: bool
) -> bool:
    """Tells whether a Gaussian is another one, at any of its permuted ``places`` ``[P, D]``."""
    dim = found.loc.shape[-1]
    scale, near = found.scale_tril[other], dim + 4.0 * math.sqrt(2.0 * dim)
    white = torch.linalg.solve_triangular(scale, (places - found.loc[other]).mT, upper=False)
    # a squared distance that draws of one fit hardly reach
    if not bool((white.square().sum(0) < near).any()):
        return False
    if not by_width:
        return True
    ratio = torch.linalg.solve_triangular(scale, found.scale_tril[candidate], upper=False)
    variances = torch.linalg.svdvals(ratio).square()
    if len(places) > 1:  # all that permutations leave as it is: the volume
        variances = variances.log().mean().exp().expand_as(variances)
    bhattacharyya = 0.5 * (0.5 * (1.0 + variances)).log() - 0.25 * variances.log()
    return float(bhattacharyya.sum()) < _WIDTH


def mixture_of_fits(
    rows: Rows,
    origins: Tensor,
    fit: Candidates,
    symmetry: Symmetry | None,
    generator: torch.Generator,
    *,
    num_draws: int,
    most: int = 8,
    draw_prior: Callable[[int], Tensor] | None = None,
    settle: bool = True,
    nest: bool = True,
) -> Mixture | Nested | None:
    """Fits from further origins, and makes the base of what they found.

    Args:
        rows: Evaluates the target at positions ``[*lead, D]``.
        origins: Further starting points ``[S, D]``.
        fit: The fit that there is, of one candidate.
        symmetry: Permutations to average over.
        generator: Source of noise.
        num_draws: Draws of one adaptation.
        most: Largest number of optima kept.
        draw_prior: Draws N positions ``[N, D]`` from the prior; None where it is improper.
        settle: Whether a base is wanted even of several modes, or where few of its draws carry
            weight.
        nest: Whether to look for leading coordinates, given which the others are next to a Gaussian.

    Returns:
        The base of largest effective sample size on fresh draws; where few of them carry weight,
        that of least divergence from a population of particles. In either case None without ``settle``
        if there are several modes, and in the second.
    """
    plain = Mixture(torch.zeros_like(fit.elbo), fit.loc, fit.scale_tril, math.inf, symmetry)
    found = follow_newton(rows, origins, generator, num_steps=30)
    flanks = quadratic_models(rows, torch.cat([origins, _around(fit, generator)]), generator)
    everything = _joined(fit, found, flanks)
    several = distinct(everything, symmetry, most=most, widths=True)
    if len(several.loc) > 1:
        climbed = ascend(rows, several, generator, num_steps=60)
        several = distinct(climbed, symmetry, most=most, widths=True)
    start = Mixture(several.elbo.log_softmax(0), several.loc, several.scale_tril, _DOF, symmetry)
    adapted = adapt(rows, start, generator, num_draws=num_draws)
    best = plain
    at_best, evidence = _judge(rows, plain, generator, num_draws)
    apart = len(distinct(several, symmetry).loc) > 1
    if len(several.loc) > 1:  # a base of one mode, or of one phase, may look better than it is
        more = _judge(rows, adapted, generator, num_draws)[1] - evidence
        if apart or more > _MISSED:
            at_best = 0.0
    light = replace(adapted, dof=math.inf)
    for other in (adapted, light):
        fraction, _ = _judge(rows, other, generator, num_draws)
        if fraction > at_best:
            best, at_best = other, fraction
    nested = None
    can = nest and symmetry is None and len(fit.loc[0]) > 2
    if can and (at_best < _BETTER or is_bent(rows, fit, generator)):
        nested = _nested(rows, fit, generator)
    if nested is not None and _judge(rows, nested, generator, num_draws)[0] >= _GOOD:
        # where there seem to be several modes, or another base looks good, who covers the others?
        all_bases: list[Mixture | Nested] = [nested, best, adapted]
        if _nearest(rows, all_bases, None, generator, num_draws=num_draws) is nested:
            return nested
    if at_best >= _GOOD and (settle or not apart):
        return best
    if not settle:
        return None
    population = draw_population(
        rows,
        draw_prior,
        lambda count: adapted.draw(count, generator),
        adapted.log_density,
        generator,
    )
    if population is None:
        return best
    learnt, held = population.halves()
    grown = _grown(adapted, learnt, generator)
    bases: list[Mixture | Nested] = [plain, adapted, light, grown]
    for begin in (grown, _split(rows, adapted, generator, num_draws)):
        bases.append(adapt(rows, begin, generator, num_draws=num_draws, num_steps=12))
    if nested is not None:
        bases.append(nested)
    return _nearest(rows, bases, held, generator, num_draws=num_draws // 2)


def _nested(rows: Rows, fit: Candidates, generator: torch.Generator) -> Nested | None:
    """Nests Gaussians along leading coordinates; None without any, or where factors fail."""
    try:
        lead = leading_coordinates(rows, fit)
        return nested_gaussians(rows, fit, lead, generator) if lead else None
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None  # one base less to choose among


def _around(fit: Candidates, generator: torch.Generator, *, count: int = 4) -> Tensor:
    """Draws points on a fit's flanks and far from it, ``[2 * count, D]``."""
    loc, scale = fit.loc[0], fit.scale_tril[0]
    shape = (2 * count, len(loc))
    noise = torch.randn(shape, dtype=loc.dtype, device=loc.device, generator=generator)
    noise = torch.cat([3.0 * noise[:count], 10.0 * noise[count:]])
    return loc + noise @ scale.mT


def _joined(*several: Candidates) -> Candidates:
    """Joins Gaussians of finite bound."""
    elbo = torch.cat([found.elbo for found in several])
    alive = elbo.isfinite()
    loc = torch.cat([found.loc for found in several])
    scale = torch.cat([found.scale_tril for found in several])
    return Candidates(loc[alive], scale[alive], elbo[alive])


def _split(rows: Rows, mixture: Mixture, generator: torch.Generator, count: int) -> Mixture:
    """Adds components at draws that carry weight."""
    draws = mixture.draw(count, generator)
    log_ratio = (rows(draws)[0] - mixture.log_density(draws)).double()
    # tempered: a few draws would take all
    return _extended(mixture, draws, (0.5 * log_ratio).softmax(0), generator)


def _grown(mixture: Mixture, population: Population, generator: torch.Generator) -> Mixture:
    """Adds components at particles where density is missing, and fits all to the particles."""
    places = population.position
    log_ratio = (population.log_target - mixture.log_density(places)).double()
    weights = (0.5 * log_ratio).softmax(0) * population.weights
    mixture = _extended(mixture, places, weights, generator)
    for _ in range(_NUM_EM):
        mixture = _step(mixture, places, population.weights)
    return mixture


def _extended(
    mixture: Mixture, places: Tensor, weights: Tensor, generator: torch.Generator
) -> Mixture:
    """Adds components at some of ``places`` ``[N, D]``, drawn by weight, of half of the mass."""
    count = min(_EXTRA, int((weights > 0.0).sum()))
    index = torch.multinomial(weights, count, replacement=False, generator=generator)
    nearest = mixture.terms(places[index]).argmax(0)
    loc = torch.cat([mixture.loc, places[index]])
    scale = torch.cat([mixture.scale_tril, 0.7 * mixture.scale_tril[nearest]])
    added = torch.full((count,), -math.log(2 * count), dtype=loc.dtype, device=loc.device)
    log_weights = torch.cat([mixture.log_weights - math.log(2.0), added])
    return replace(mixture, log_weights=log_weights, loc=loc, scale_tril=scale)


def _nearest(
    rows: Rows,
    mixtures: list[Mixture | Nested],
    population: Population | None,
    generator: torch.Generator,
    *,
    num_draws: int,
) -> Mixture | Nested:
    """Chooses the mixture of least divergence from the posterior.

    The posterior is seen by draws of all mixtures together, weighted by importance, and by
    particles if there are any: a mixture is not judged by places that it reaches itself.
    """
    draws = torch.cat([mixture.draw(num_draws, generator) for mixture in mixtures])
    log_target = rows(draws)[0]
    log_densities = torch.stack([mixture.log_density(draws) for mixture in mixtures])
    weights = (log_target - log_densities.logsumexp(0)).double().softmax(0)
    if population is not None:
        log_target = torch.cat([log_target, population.log_target])
        more = torch.stack([mixture.log_density(population.position) for mixture in mixtures])
        log_densities = torch.cat([log_densities, more], 1)
        weights = torch.cat([weights, population.weights.double()])
    gaps = torch.where(weights > 0.0, weights * (log_target - log_densities), 0.0).sum(1)
    return mixtures[int(torch.where(gaps.isfinite(), gaps, torch.inf).argmin())]


def _judge(
    rows: Rows, mixture: Mixture | Nested, generator: torch.Generator, count: int
) -> tuple[float, float]:
    """Estimates the effective fraction of fresh draws, and the log evidence."""
    draws = mixture.draw(count, generator)
    log_ratio = rows(draws)[0] - mixture.log_density(draws)
    weights = log_ratio.double().softmax(0)
    evidence = float(log_ratio.double().logsumexp(0)) - math.log(count)
    return 1.0 / float(weights.square().sum()) / count, evidence


def adapt(
    rows: Rows,
    mixture: Mixture,
    generator: torch.Generator,
    *,
    num_draws: int,
    num_steps: int = 8,
) -> Mixture:
    """Moves a mixture toward the posterior by importance sampling.

    Draws of the last three steps are used together, each weighted by the mixture that made it.
    """
    past: list[tuple[Tensor, Tensor]] = []
    best, at_best = mixture, -1.0
    for _ in range(num_steps):
        draws = mixture.draw(num_draws, generator)
        log_ratio = (rows(draws)[0] - mixture.log_density(draws)).double()
        fraction = 1.0 / float(log_ratio.softmax(0).square().sum()) / num_draws
        if fraction > at_best:
            best, at_best = mixture, fraction
        past = [*past[-2:], (draws, log_ratio)]
        positions = torch.cat([place for place, _ in past])
        log_ratios = torch.cat([ratio for _, ratio in past])
        # a cap on the largest weights: half of the square root of their number is its own
        ordered = log_ratios.sort(descending=True).values
        cap = ordered[max(len(ordered) // 200, 4)]
        mixture = _step(mixture, positions, log_ratios.clamp(max=cap).softmax(0))
    fraction, _ = _judge(rows, mixture, generator, num_draws)
    return mixture if fraction > at_best else best


def _step(mixture: Mixture, positions: Tensor, weights: Tensor) -> Mixture:
    """Makes one step of expectation maximization on weighted draws ``[N, D]``."""
    rows, log_jacobian = mixture.orbit(positions)
    count, dim = len(mixture.loc), positions.shape[-1]
    flat = rows.flatten(0, 1)
    terms = mixture.terms(flat) + log_jacobian.flatten()
    shared = terms.reshape(count, *log_jacobian.shape)
    shared = shared - shared.logsumexp((0, 1), keepdim=True)
    shares = shared.exp() * weights.to(shared.dtype)  # [J, P, N]
    shares = shares.flatten(1)
    total = shares.sum(1)
    new_loc, new_scale = [], []
    for j in range(count):
        share = shares[j]
        effective = float(share.sum().square() / share.square().sum().clamp(min=1e-300))
        if not effective > 1.0:
            new_loc.append(mixture.loc[j])
            new_scale.append(mixture.scale_tril[j])
            continue
        white = torch.linalg.solve_triangular(
            mixture.scale_tril[j], (flat - mixture.loc[j]).mT, upper=False
        )
        if math.isinf(mixture.dof):
            factor = torch.ones_like(share)
        else:
            factor = (mixture.dof + dim) / (mixture.dof + white.square().sum(0))
        mass = share * factor
        mean = (white * mass).sum(1) / mass.sum()
        trust = effective / (effective + dim)
        mean = trust * mean
        centred = white - mean.unsqueeze(-1)
        covariance = (centred * mass) @ centred.mT / share.sum()
        eye = torch.eye(dim, dtype=white.dtype, device=white.device)
        strength = effective / (effective + 2.0 * dim + 10.0)
        covariance = strength * covariance + (1.0 - strength) * eye
        factor_tril, info = torch.linalg.cholesky_ex(0.5 * (covariance + covariance.mT))
        if int(info) != 0:
            factor_tril = eye
        new_loc.append(mixture.loc[j] + mixture.scale_tril[j] @ mean)
        new_scale.append(mixture.scale_tril[j] @ factor_tril)
    log_weights = (total / total.sum()).clamp(min=_LEAST_WEIGHT).log().log_softmax(0)
    loc, scale = torch.stack(new_loc), torch.stack(new_scale)
    return Mixture(log_weights, loc, scale, mixture.dof, mixture.symmetry)
