"""Evidence of the gallery's models by ways that share no code with this package.

Three ways, of which the first that reaches an entry is taken:

* a function of its own, registered under the name of the entry: a closed form, a sum over all
  states, or quadrature;
* adaptive importance sampling on the potential energy that Pyro's HMC uses (which sums out what can
  be enumerated): draws of a mixture of Student-t, moved to its own weighted draws round by round;
* one draw at a time from the prior, the example's guide or a normal that SVI fits, weighed by
  Pyro's own bound.
"""

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor

TRUTHS: dict[str, Callable[[Any], dict[str, Any]]] = {}
_DEGREES = 5.0
_FEWEST = 200.0  # draws that have to count


def truth(entry: Any, name: str) -> dict[str, Any]:
    """Finds the log evidence of an entry, its standard error, and how it was found."""
    import gallery_exact  # noqa: F401  # registers its truths here

    if name in TRUTHS:
        return {"outcome": "number", "std_error": 0.0} | TRUTHS[name](entry)
    reasons = []
    for way in (sampled, drawn, fitted):
        try:
            found = way(entry)
        except Exception as error:  # noqa: BLE001
            reasons.append(f"{way.__name__}: {type(error).__name__} {str(error)[:80]}")
            continue
        if found["ess"] >= _FEWEST:
            return {"outcome": "number"} | found
        reasons.append(f"{way.__name__}: {found['ess']:.0f} draws count")
    return {"outcome": "none", "says": "; ".join(reasons)}


def register(*names: str) -> Callable[[Any], Any]:
    """Registers a truth of entries."""

    def put(function: Any) -> Any:
        for name in names:
            TRUTHS[name] = function
        return function

    return put


class _Potential:
    """Minus the log joint density of an entry, as Pyro's HMC sees it, of many vectors at once."""

    def __init__(self, entry: Any) -> None:
        options = {"model_args": entry.args, "model_kwargs": entry.kwargs}
        pyro.set_rng_seed(3)
        first, self.function, self.transforms, _ = initialize_model(entry.model, **options)
        self.entry = entry
        self.shapes = {name: value.shape for name, value in first.items()}
        self.start = self.pack(first)
        self.batched: bool | None = None

    def pack(self, values: dict[str, Tensor]) -> Tensor:
        return torch.cat([values[name].detach().reshape(-1) for name in self.shapes])

    def unpack(self, vector: Tensor) -> dict[str, Tensor]:
        sizes = [shape.numel() for shape in self.shapes.values()]
        parts = vector.split(sizes)
        return {n: p.reshape(s) for (n, s), p in zip(self.shapes.items(), parts, strict=True)}

    def one(self, vector: Tensor) -> Tensor:
        return -self.function(self.unpack(vector))

    def __call__(self, vectors: Tensor) -> Tensor:
        """Evaluates log densities, ``[N, D]`` to ``[N]``."""
        vectors = vectors.to(self.start)
        with torch.no_grad(), pyro.validation_enabled(False):
            if self.batched is None:
                single = torch.stack([self.one(vector) for vector in vectors[:3]])
                self.batched = False
                with contextlib.suppress(Exception):
                    together = torch.func.vmap(self.one)(vectors[:3])
                    self.batched = torch.allclose(together, single, rtol=1e-4, equal_nan=True)
            if self.batched:
                values = torch.cat([torch.func.vmap(self.one)(v) for v in vectors.split(2000)])
            else:
                values = torch.stack([self._quietly(vector) for vector in vectors])
        return values.double().nan_to_num(-torch.inf, posinf=-torch.inf)

    def _quietly(self, vector: Tensor) -> Tensor:
        try:
            return self.one(vector)
        except (ValueError, RuntimeError):  # outside of what torch can factorize
            return torch.tensor(-torch.inf)

    def prior(self, count: int) -> Tensor:
        """Draws from the prior, unconstrained."""
        draws = []
        for _ in range(count):
            trace = poutine.trace(self.entry.model).get_trace(
                *self.entry.args, **self.entry.kwargs
            )
            values = {n: trace.nodes[n]["value"] for n in self.shapes}
            draws.append(self.pack({n: self.transforms[n](v) for n, v in values.items()}))
        return torch.stack(draws).double().clamp(-40.0, 40.0)


class _Mixture:
    """Equal multivariate Student-t around components of weighted draws, and a wide one."""

    def __init__(self, draws: Tensor, weights: Tensor, count: int, widen: float = 1.0) -> None:
        dim = draws.shape[1]
        centers = draws[torch.multinomial(weights + 1e-300, count, replacement=True)]
        shares = weights / weights.sum()
        whole = _covariance(draws, shares)
        scales = [torch.linalg.cholesky(whole)] * count
        for _ in range(15 if count > 1 else 1):
            log_r = torch.stack(
                [_student(draws, c, s) for c, s in zip(centers, scales, strict=True)]
            )
            parts = torch.softmax(log_r, 0) * shares
            centers = (parts @ draws) / parts.sum(1, keepdim=True).clamp_min(1e-30)
            scales = []
            for part in parts:
                total = part.sum()
                few = 1.0 / (part.square().sum() / total.square()).clamp_min(1e-30)
                mixed = float(dim / (dim + few))  # few draws: closer to the whole
                own = _covariance(draws, part / total.clamp_min(1e-30))
                scales.append(torch.linalg.cholesky((1 - mixed) * own + mixed * whole))
        self.shares = torch.cat([parts.sum(1).clamp_min(0.02), torch.tensor([0.1])])
        self.shares = self.shares / self.shares.sum()
        self.centers = torch.cat([centers, (shares @ draws)[None]])
        wide = 2.0 * torch.linalg.cholesky(whole)
        self.scales = torch.stack([*[widen * scale for scale in scales], wide])

    def sample(self, count: int) -> Tensor:
        which = torch.multinomial(self.shares, count, replacement=True)
        noise = torch.randn(count, self.centers.shape[1], dtype=torch.float64)
        gamma = torch.distributions.Chi2(torch.tensor(_DEGREES).double()).sample((count, 1))
        steps = (self.scales[which] @ noise[..., None])[..., 0]
        return self.centers[which] + steps * (_DEGREES / gamma).sqrt()

    def log_prob(self, draws: Tensor) -> Tensor:
        parts = [_student(draws, c, s) for c, s in zip(self.centers, self.scales, strict=True)]
        return torch.logsumexp(torch.stack(parts) + self.shares.log()[:, None], 0)


def _student(draws: Tensor, center: Tensor, scale: Tensor) -> Tensor:
    dim = draws.shape[1]
    solved = torch.linalg.solve_triangular(scale, (draws - center).T, upper=False)
    constant = math.lgamma((_DEGREES + dim) / 2) - math.lgamma(_DEGREES / 2)
    constant -= dim / 2 * math.log(_DEGREES * math.pi)
    tail = -(_DEGREES + dim) / 2 * torch.log1p(solved.square().sum(0) / _DEGREES)
    return constant - scale.diagonal().log().sum() + tail


def _covariance(draws: Tensor, shares: Tensor) -> Tensor:
    away = draws - shares @ draws
    found = (shares[:, None] * away).T @ away
    return found + (1e-6 + 1e-3 * found.diagonal()).diag_embed()


def sampled(
    entry: Any, *, seconds: float = 7.0, most: int = 20000, log: Any = None
) -> dict[str, Any]:
    """Estimates the evidence by adaptive importance sampling on Pyro's potential energy."""
    potential = _Potential(entry)
    dim = len(potential.start)
    if dim > 80:
        raise NotImplementedError(f"{dim} dimensions")
    torch.manual_seed(4)
    draws = potential.prior(600)
    mixture = _Mixture(draws, torch.ones(len(draws)).double(), 1)
    began, log_weights, best = time.process_time(), torch.empty(0), 0.0
    kept_draws, kept_weights = draws[:0], torch.empty(0).double()
    for turn in range(40):
        size = 2000 if potential.batched is not False else 500
        draws = mixture.sample(size)
        log_weights = potential(draws) - mixture.log_prob(draws)
        kept_draws = torch.cat([kept_draws, draws])[-4 * size :]
        kept_weights = torch.cat([kept_weights, log_weights])[-4 * size :]
        ess = _ess(log_weights)
        if log:
            log(turn, float(log_weights.max()), ess, _value(log_weights))
        if ess > 0.6 * size or time.process_time() - began > 0.5 * seconds:
            break
        if ess > 0.3 * size and ess < best * 1.05:
            break
        best = max(best, ess)
        if turn == 6 and best < 15.0:
            return _summary(log_weights)  # hopeless
        power = 1.0  # weights whose few largest are flattened until they can place a mixture
        while _ess(power * kept_weights) < max(60.0, 5.0 * dim) and power > 1e-3:
            power *= 0.7
        shares = torch.softmax(power * kept_weights, 0)
        # weights in turn, above: draws of earlier mixtures weigh as drawn there
        mixture = _Mixture(kept_draws, shares, 1 if turn < 4 else min(2 + turn // 3, 6))
    final: list[Tensor] = []
    while sum(map(len, final)) < most and time.process_time() - began < seconds:
        draws = mixture.sample(size)
        final.append(potential(draws) - mixture.log_prob(draws))
    log_weights = torch.cat(final)
    found = _summary(log_weights) | {"how": f"Student-t mixture, {dim} dimensions"}
    found["top_share"] = float(torch.softmax(log_weights, 0).max())
    return found


def drawn(entry: Any) -> dict[str, Any]:
    """Weighs draws of the prior and of the example's guide by Pyro's bound of one particle."""
    good = [_importance(entry, _prior(entry.model), "prior")]
    if entry.guide is not None:
        with contextlib.suppress(Exception):
            good.append(_importance(entry, entry.guide, "guide"))
    return max(good, key=lambda one: one["ess"])


def fitted(entry: Any) -> dict[str, Any]:
    """Weighs draws of a normal in unconstrained space that Pyro's SVI fits."""
    guide = AutoMultivariateNormal(_prior(entry.model), init_scale=0.1)
    prefix = type(guide).__name__
    optimizer = pyro.optim.Adam(lambda name: {"lr": 0.02 if name.startswith(prefix) else 0.0})
    elbo = pyro.infer.TraceEnum_ELBO(strict_enumeration_warning=False)
    svi = pyro.infer.SVI(entry.model, guide, optimizer, elbo)
    pyro.set_rng_seed(2)
    began = time.process_time()
    while time.process_time() < began + 6.0:
        svi.step(*entry.args, **entry.kwargs)
    return _importance(entry, guide, "fit of SVI")


def _prior(model: Any) -> Any:
    def hidden(site: dict[str, Any]) -> bool:
        if site["type"] != "sample":
            return False
        summed = site["infer"].get("enumerate") is not None
        return site["is_observed"] or summed or type(site["fn"]).__name__ == "_Subsample"

    return poutine.block(model, hide_fn=hidden)


def _importance(entry: Any, guide: Any, label: str, *, seconds: float = 3.0) -> dict[str, Any]:
    sites = poutine.trace(guide).get_trace(*entry.args, **entry.kwargs).nodes.values()
    if any(site["type"] == "sample" and site["infer"].get("enumerate") for site in sites):
        raise NotImplementedError("a bound averages over what the guide enumerates")
    elbo = pyro.infer.TraceEnum_ELBO(strict_enumeration_warning=False)
    began, log_weights = time.process_time(), []
    pyro.set_rng_seed(1)
    with torch.no_grad():
        while len(log_weights) < 20000 and time.process_time() < began + seconds:
            log_weights.append(-elbo.loss(entry.model, guide, *entry.args, **entry.kwargs))
    weights = torch.tensor(log_weights, dtype=torch.float64)
    weights = weights.nan_to_num(-torch.inf, posinf=-torch.inf)
    return _summary(weights) | {"how": f"draws of the {label}"}


def _ess(log_weights: Tensor) -> float:
    shares = torch.softmax(log_weights, 0)
    return float(1.0 / shares.square().sum())


def _value(log_weights: Tensor) -> float:
    return float(torch.logsumexp(log_weights, 0) - math.log(len(log_weights)))


def _summary(log_weights: Tensor) -> dict[str, Any]:
    share = (log_weights - log_weights.max()).exp()
    error = float(share.std() / share.mean() / len(share) ** 0.5)
    return {"value": _value(log_weights), "std_error": error, "ess": _ess(log_weights)}
