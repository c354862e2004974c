"""Random Pyro models whose evidence is known: trees of latents, by nested quadrature.

A model has a root, perhaps a second global latent below it, perhaps discrete sites that are summed
out, and rows in a plate, each perhaps with a latent of its own and with columns in a plate below.
Rows may meet in their likelihood; data come as arguments, from a closure or an attribute, in lists
or arrays; sites are masked and scaled. Truths use quantile functions from scipy in place of
densities, ``E[f(z)] = int_0^1 f(Q(v)) dv`` (see ``random_families``).
"""

import contextlib
import math
from dataclasses import dataclass, field

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from random_families import Family, families, transformed
from scipy import special, stats

from pyro_anneal import AnnealedImportance, RandomWalk

LIKELIHOODS = ("Normal", "Bernoulli", "Poisson", "StudentT")
BENT = {  # transforms, and the kinds of support that they may follow
    "affine": ("real", "positive", "interval", "angle"),
    "reflect": ("real", "positive", "interval", "angle"),
    "exp": ("real", "interval", "angle"),
    "sigmoid": ("real", "positive", "interval", "angle"),
    "tanh": ("real", "interval"),
    "power": ("positive",),
    "softplus": ("real", "interval"),
}
HEAVY = ("Cauchy", "StudentT", "HalfCauchy", "FisherSnedecor", "Pareto", "InverseGamma")


class Seeded:
    """Chooses by a seed; numbers by another one, so that models of one structure can share it."""

    def __init__(self, seed, numbers=None):
        self.random = np.random.RandomState(seed)
        self.numbers = self.random if numbers is None else np.random.RandomState(numbers)

    def pick(self, options):
        return options[self.random.randint(len(options))]

    def number(self, low, high):
        return float(self.numbers.uniform(low, high))


class Drawn:
    """Chooses by hypothesis, so that failures shrink."""

    def __init__(self, draw, strategies):
        self.draw = draw
        self.strategies = strategies

    def pick(self, options):
        return self.draw(self.strategies.sampled_from(options))

    def number(self, low, high):
        steps = self.draw(self.strategies.integers(0, 1000))
        return low + (high - low) * steps / 1000


@dataclass
class Latent:
    """A latent: its family or, for a mixture, those of its parts with their weights."""

    name: str  # of the site
    words: str  # describes it
    family: Family
    parts: list = field(default_factory=list)  # of (weight, quantile)
    tags: tuple = ()

    def sample(self, parent, size=None):
        fn = self.family.make(parent)
        if size is not None and tuple(fn.batch_shape) != (size,):
            fn = fn.expand([size])
        value = pyro.sample(self.name, fn)
        if self.family.improper is not None:
            pyro.factor(f"{self.name}_prior", self.family.improper(value, parent))
        return self.family.read(value)

    def values(self, parent, nodes):
        """Returns values ``[..., n]`` at parents ``[..., 1]``, and their probabilities."""
        if self.family.atoms is not None:
            values, weights = self.family.atoms
            return np.broadcast_to(values, (*parent.shape[:-1], len(values))), weights
        v, w = nodes
        found = [
            np.broadcast_to(quantile(v, parent), (*parent.shape[:-1], len(v)))
            for _, quantile in self.parts
        ]
        return np.concatenate(found, -1), np.concatenate([weight * w for weight, _ in self.parts])


def _latent(choose, site, parent, kinds):
    """Draws a latent: a family of some kind, perhaps transformed, perhaps a mixture."""
    a, b = choose.number(0.3, 3.0), choose.number(0.3, 3.0)
    loc = choose.number(-2.0, 2.0)
    shift, scale = choose.number(-1.0, 1.0), choose.number(0.5, 2.0)
    kind = choose.pick(kinds)
    if kind == "mixture":
        locs, weights = torch.tensor([-a, b]), torch.tensor([0.3, 0.7])
        family = Family(
            lambda p: dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(locs, 0.5)),
            None,
        )
        parts = [
            (0.3, lambda v, p: -a + 0.5 * special.ndtri(v)),
            (0.7, lambda v, p: b + 0.5 * special.ndtri(v)),
        ]
        return Latent(site, "mixture", family, parts, ("mixture",))
    found = families(a, b, loc, parent)[kind]
    names = sorted(found)
    if site == "local" and kind == "vector":
        names.remove("LKJ")  # which Pyro cannot expand to a plate
    words = choose.pick(names)
    family, tags = found[words], (kind, words)
    if family.one and kind in ("real", "positive", "interval", "angle"):
        bends = [bend for bend, fits in BENT.items() if kind in fits]
        bend = choose.pick(["none"] * len(bends) + bends)
        # an exponential of heavy tails has no moments that chains could estimate
        if bend != "none" and not (bend in ("exp", "power") and words in HEAVY):
            family, words = transformed(bend, family, shift, scale), f"{bend} of {words}"
            tags = (*tags, f"transform {bend}")
        if parent and choose.pick([False, False, True]):  # an image that moves with the parent
            inner = family
            family = inner._replace(
                make=lambda p: dist.TransformedDistribution(
                    inner.make(p), [dist.transforms.AffineTransform(p, 1.0)]
                ),
                quantile=lambda v, p: p + inner.quantile(v, p),
            )
            words, tags = f"shifted {words}", (*tags, "transform shifted")
    return Latent(site, words, family, [(1.0, family.quantile)], tags)


@dataclass
class Structure:
    """Everything about a model but its latents."""

    rows: int  # 0 for one observation outside of plates
    columns: int  # observations of a row in a plate of their own; 0 for none
    enumerated: str  # "", "global", "rows" or "chain"
    coupling: str  # how rows meet: a key of COUPLINGS, or ""
    likelihood: str
    noise: float
    slope: float
    data: np.ndarray  # [rows or 1, columns or 1]
    mask: np.ndarray  # likewise, of truth values
    masked_by: str  # "", "handler" or "distribution"
    scale: float


COUPLINGS = {  # in torch and in numpy, over the last axis
    "cumsum": (lambda h: h.cumsum(-1), lambda h: h.cumsum(-1)),
    "flip": (lambda h: h + 0.5 * h.flip(-1), lambda h: h + 0.5 * h[..., ::-1]),
    "mean": (lambda h: h - 0.5 * h.mean(-1, keepdim=True), lambda h: h - 0.5 * h.mean(-1, keepdims=True)),
    "softmax": (lambda h: 2.0 * h.softmax(-1), lambda h: 2.0 * special.softmax(h, -1)),
    "sort": (lambda h: h.sort(-1)[0], lambda h: np.sort(h, -1)),
    "threshold": (
        lambda h: h + 2.0 * torch.relu(h.amax(-1, keepdim=True) - 1.5),
        lambda h: h + 2.0 * np.maximum(h.max(-1, keepdims=True) - 1.5, 0.0),
    ),
    "index": (lambda h: h[torch.tensor([0, 0])], lambda h: h[..., [0, 0]]),
    "matmul": (
        lambda h: torch.tensor([[1.0, 0.0], [0.7, 1.0]], dtype=h.dtype) @ h,
        lambda h: h @ np.array([[1.0, 0.7], [0.0, 1.0]]),
    ),
    "fft": (
        lambda h: torch.fft.rfft(h).real,  # sum and difference
        lambda h: np.stack([h.sum(-1), h[..., 0] - h[..., 1]], -1),
    ),
    "conv": (
        lambda h: torch.nn.functional.conv1d(
            h.view(1, 1, -1), torch.tensor([[[0.5, 1.0, 0.0]]], dtype=h.dtype), padding=1
        ).view(-1),
        lambda h: np.stack([h[..., 0], h[..., 1] + 0.5 * h[..., 0]], -1),
    ),
}  # fmt: skip


@dataclass
class RandomModel:
    """A model, its arguments, the log evidence of its data, and how to run it."""

    model: object
    arguments: tuple
    log_evidence: np.ndarray  # a number, or one per row
    accuracy: float  # of the quadrature, in nats
    dtype: torch.dtype
    guide: object
    options: dict
    description: str
    tags: tuple


def _squash(h, tanh):
    return 3.0 * tanh(h / 3.0)


def build(choose, *, small=False):
    """Builds a random model.

    Args:
        choose: Draws choices and numbers.
        small: Whether to leave out the structures that take a second and more to record.
    """
    dtype = choose.pick([torch.float32, torch.float64])
    torch.set_default_dtype(dtype)
    rowwise = choose.pick([False, False, True])  # no latent that rows share
    rows = choose.pick([1, 2, 3] if rowwise else [0, 0, 1, 2, 3])
    common = ["real", "real", "positive", "interval", "angle", "vector", "mixture"]
    rare = [] if small else ["discrete", "flat"]
    kinds = common + rare
    root = None if rowwise else _latent(choose, "root", False, kinds)
    deep = not rowwise and choose.pick([False, False, True] if small else [False, True])
    if root is not None and "flat" in root.tags:  # a fit starts from no discrete site
        kinds = [kind for kind in kinds if kind != "discrete"]
    if root is not None and "discrete" in root.tags:
        kinds = [kind for kind in kinds if kind != "flat"]
    child = _latent(choose, "child", True, kinds) if deep else None
    if child is not None and "flat" in child.tags:
        kinds = [kind for kind in kinds if kind != "discrete"]
    has_local = rowwise or (rows > 0 and not (small and deep) and choose.pick([False, True]))
    row_kinds = [k for k in kinds if k != "flat"]
    local = _latent(choose, "local", not rowwise, row_kinds) if has_local else None
    discrete = any(x is not None and "discrete" in x.tags for x in (root, child, local))
    switches = ["", "", "", "global" if not rowwise else "", "rows" if rows else "", "chain"]
    enumerated = choose.pick(switches if not discrete else [""])
    coupling = ""
    if rows == 2 and has_local and child is None and enumerated in ("", "global"):
        coupling = choose.pick(["", *sorted(COUPLINGS)])
    columns = choose.pick([0, 0, 2]) if rows and not coupling and not small else 0
    likelihood = choose.pick(LIKELIHOODS)
    shape = (max(rows, 1), max(columns, 1))
    picks = [choose.pick([-1.0, 0.5, 1.5]) for _ in range(shape[0] * shape[1])]
    data = np.array(picks).reshape(shape)
    if likelihood == "Bernoulli":
        data = (data > 0).astype(float)
    if likelihood == "Poisson":
        data = np.round(data + 1.0)
    masked_by = choose.pick(["", "", "", "handler", "distribution"]) if rows > 1 else ""
    mask = np.ones(shape, dtype=bool)
    if masked_by:
        mask[-1] = False
    scale = choose.pick([1.0, 1.0, 1.0, 1.0, 0.5, 2.0])
    scale = 1.0 if enumerated else scale  # a power of a sum is no sum, and is refused
    structure = Structure(
        rows, columns, enumerated, coupling, likelihood, choose.number(0.4, 2.0),
        choose.pick([1.0, -0.5]), data, mask, masked_by, scale,
    )  # fmt: skip
    latents = (root, child, local)
    source = choose.pick(["argument", "list", "array", "closure", "attribute", "float64"])
    model, arguments = _model(structure, latents, source)
    flat = any("flat" in x.tags for x in latents if x is not None)
    starts = [None, None, "guide"] if small else [None, None, None, None, "auto", "guide"]
    start = choose.pick(["auto"] if flat else starts)
    guide = _guide(model) if start == "guide" else start
    kernel = choose.pick(["default"] * 5 + ["random walk", "one step"])
    options = {"num_chains": 48, "num_steps": 8, "batch_plates": "auto" if rowwise else []}
    if kernel == "random walk" and not discrete:
        options |= {"kernel": RandomWalk()}
    if kernel == "one step":
        options |= {"num_steps": 1, "num_chains": 256}
    deepest = root is not None and child is not None and local is not None
    counts = (4, 6) if deepest else (6, 10)
    coarse, fine = (_evidence(structure, latents, count) for count in counts)
    if coupling or (rowwise and enumerated == "chain"):
        coarse, fine = coarse.sum(), fine.sum()
    words = " > ".join(x.words for x in latents if x is not None)
    description = (
        f"{words}; {rows} rows x {columns}, {likelihood}({structure.noise:.2f}), "
        f"enumerated {enumerated!r}, coupling {coupling!r}, mask {masked_by!r}, scale {scale}, "
        f"data {source}, {dtype}, start {start}, {kernel}"
    )
    tags = [tag for x in latents if x is not None for tag in x.tags]
    tags += [f"likelihood {likelihood}", str(dtype), f"start {start or 'prior'}", f"data {source}"]
    tags += [f"kernel {kernel}"]
    tags += [f"enumerated {enumerated}"] if enumerated else []
    tags += [f"coupling {coupling}"] if coupling else []
    tags += ["nested plates"] if columns else []
    tags += [f"mask by {masked_by}"] if masked_by else []
    tags += ["scale"] if scale != 1.0 else []
    tags += ["rows apart"] if rowwise and not coupling else []
    return RandomModel(
        model, arguments, fine, float(np.abs(fine - coarse).max()), dtype, guide, options,
        description, tuple(tags),
    )  # fmt: skip


class _Holder:
    """A model that finds its data in an attribute."""

    def __init__(self, run, y):
        self.run, self.y = run, y

    def __call__(self):
        self.run(self.y)


def _model(structure, latents, source):
    """Writes the model, and says with which arguments it is called."""
    data = structure.data if structure.columns else structure.data[:, 0]
    mask = torch.as_tensor(structure.mask if structure.columns else structure.mask[:, 0])
    filled = np.where(mask.numpy(), data, np.nan) if structure.likelihood == "Normal" else data
    y = torch.tensor(filled.tolist())
    run = _program(structure, latents, mask)
    if source == "float64":
        return run, (y.double(),)
    if source == "list":
        return (lambda values: run(torch.tensor(values))), (filled.tolist(),)
    if source == "array":
        array = filled.astype(str(torch.get_default_dtype()).removeprefix("torch."))
        return (lambda values: run(torch.as_tensor(values))), (array,)
    if source == "closure":
        return (lambda: run(y)), ()
    if source == "attribute":
        return _Holder(run, y), ()
    return run, (y,)


def _program(s, latents, mask):
    root, child, local = latents
    noise, slope = torch.tensor(s.noise), s.slope

    def observe(h, k, y, mask):
        h = slope * _squash(h, torch.tanh) + k
        fn = {
            "Normal": lambda: dist.Normal(h, noise),
            "StudentT": lambda: dist.StudentT(4.0, h, noise),
            "Bernoulli": lambda: dist.Bernoulli(logits=h),
            "Poisson": lambda: dist.Poisson(h.exp()),
        }[s.likelihood]()
        context = contextlib.nullcontext()
        if s.masked_by == "handler":
            context = poutine.mask(mask=mask)
        if s.masked_by == "distribution":
            fn = fn.mask(mask)
        with context, poutine.scale(scale=s.scale):
            pyro.sample("y", fn, obs=y)

    def switch(name="k", probability=0.3):
        fn = dist.Bernoulli(probability)
        return pyro.sample(name, fn, infer={"enumerate": "parallel"})

    def model(y):
        h, k = torch.zeros(()), torch.zeros(())
        if root is not None:
            h = root.sample(torch.zeros(()))
        if child is not None:
            h = child.sample(_squash(h, torch.tanh)) + 0.5 * _squash(h, torch.tanh)
        if s.enumerated == "global":
            k = switch()
        if s.enumerated == "chain":
            k = switch("k2", 0.2 + 0.5 * switch("k1"))
        if not s.rows:
            observe(h, k, y[0], mask[0])
            return
        with pyro.plate("rows", s.rows, dim=-1 if not s.columns else -2):
            if local is not None:
                # with columns, rows are the axis before the last
                size = s.rows
                if s.columns:
                    h = _column(local, _squash(h, torch.tanh), size) + 0.5 * _squash(h, torch.tanh)
                else:
                    parent = _squash(h, torch.tanh)
                    h = local.sample(parent, size) + 0.5 * parent
            if s.coupling:
                h = COUPLINGS[s.coupling][0](h)
            k = switch() if s.enumerated == "rows" else k
            if not s.columns:
                observe(h, k, y, mask)
                return
            with pyro.plate("columns", s.columns, dim=-1):
                observe(h, k, y, mask)

    return model


def _column(local, parent, size):
    """Samples a latent of rows that lie along the axis before the last."""
    fn = local.family.make(parent)
    return local.family.read(pyro.sample(local.name, fn.expand([size, 1])))


def _guide(model):
    """The prior, as a guide: the model without its observations and what is summed out."""
    apart = ("y", "k", "k1", "k2")
    return poutine.block(
        model, hide_fn=lambda site: site["type"] == "sample" and site["name"] in apart
    )


_EDGES = [0.0, 1e-12, 1e-8, 1e-5, 1e-3, 0.02, 0.1, 0.25, 0.5]


def _nodes(count):
    """Gauss-Legendre nodes in panels that narrow towards both ends."""
    x, w = np.polynomial.legendre.leggauss(count)
    edges = np.array(_EDGES)
    widths = np.diff(edges)
    v = (edges[:-1, None] + 0.5 * widths[:, None] * (x + 1.0)).ravel()
    weights = (0.5 * widths[:, None] * w).ravel()
    v = np.concatenate([v, 1.0 - v[::-1]])
    return np.clip(v, 1e-300, 1.0 - 1e-16), np.concatenate([weights, weights[::-1]])


def _log_density(s, value, h):
    if s.likelihood == "Normal":
        return stats.norm.logpdf(value, h, s.noise)
    if s.likelihood == "StudentT":
        return stats.t.logpdf((value - h) / s.noise, 4.0) - math.log(s.noise)
    if s.likelihood == "Bernoulli":
        return -np.logaddexp(0.0, -h if value else h)
    return value * h - np.exp(h) - special.gammaln(value + 1.0)


def _evidence(s, latents, count):
    """Computes the log evidence: per row where no latent is shared, else one number."""
    root, child, local = latents
    coupled = count if not s.coupling else count - 4  # three integrals within each other
    nodes = _nodes(coupled)

    def observed(h, k, values, mask):
        """The density of a row's columns."""
        h = slope * _squash(h, np.tanh) + k
        log_density = 0.0
        for value, counts in zip(values, mask, strict=True):
            if counts:
                log_density = log_density + _log_density(s, value, h)
        return np.exp(s.scale * (log_density + 0.0 * h))

    slope = s.slope

    def average(latent, parent, function):
        """Averages a function of a latent, and of what is below, at parents ``[...]``."""
        parent = np.asarray(parent)[..., None]
        z, weights = latent.values(parent, nodes)
        return (function(z + 0.5 * parent) * weights).sum(-1)

    def switched(function, kind):
        if s.enumerated != kind:
            return function(0.0)
        if kind == "chain":
            ends = 0.7 * np.array([0.8, 0.2]) + 0.3 * np.array([0.3, 0.7])
            return ends[0] * function(0.0) + ends[1] * function(1.0)
        return 0.7 * function(0.0) + 0.3 * function(1.0)

    def row(h, k, n):
        below = lambda z: switched(lambda j: observed(z, k + j, s.data[n], s.mask[n]), "rows")
        return below(h) if local is None else average(local, _squash(h, np.tanh), below)

    def pair(h, k):
        parent = _squash(np.asarray(h), np.tanh)[..., None]
        z, w = local.values(parent, nodes)
        z = z + 0.5 * parent
        both = np.stack(np.broadcast_arrays(z[..., :, None], z[..., None, :]), -1)
        loc = COUPLINGS[s.coupling][1](both)
        density = 1.0
        for n in range(2):
            density = density * observed(loc[..., n], k, s.data[n], s.mask[n])
        return (density * w[:, None] * w).sum((-1, -2))

    def all_rows(h):
        def product(k):
            if s.coupling:
                return pair(h, k)
            result = 1.0
            for n in range(max(s.rows, 1)):
                result = result * row(h, k, n)
            return result

        return switched(lambda k: switched(lambda j: product(k + j), "chain"), "global")

    if root is None and not s.coupling and s.enumerated != "chain":
        return np.log(np.array([float(row(np.zeros(()), 0.0, n)) for n in range(s.rows)]))
    if root is None:
        return np.log(float(all_rows(np.zeros(()))))
    below = all_rows if child is None else lambda h: average(child, _squash(h, np.tanh), all_rows)
    return np.log(float(average(root, np.zeros(()), below)))


def judge(random_model, *, seed):
    """Runs a random model and compares it with its truth.

    Returns:
        A record: error and standard error in nats (of the worst row), warnings, verdict, tags.
    """
    torch.set_default_dtype(random_model.dtype)
    ais = AnnealedImportance(
        random_model.model, random_model.guide, seed=seed, progress_bar=False,
        **random_model.options,
    )  # fmt: skip
    result = ais.run(*random_model.arguments)
    found, std_error = result.log_evidence.double().numpy(), result.std_error.double().numpy()
    truth = random_model.log_evidence
    if found.shape != truth.shape:  # rows that were not proven apart count together
        assert truth.ndim >= found.ndim, (found.shape, truth.shape)
        truth = truth.sum()
    error = np.atleast_1d(found - truth)
    std_error = np.atleast_1d(std_error)
    # half of the variance over K is the bias of the logarithm
    allowed = 5.0 * std_error + 0.5 * std_error**2 + 0.01 + random_model.accuracy
    worst = int((np.abs(error) / allowed).argmax())
    return {
        "error": float(error[worst]),
        "std_error": float(std_error[worst]),
        "allowed": float(allowed[worst]),
        "warnings": sorted({f.name for f in result.diagnostics if f.severity == "warning"}),
        "verdict": result.verdict,
        "mode": result.density_mode,
        "joint": found.ndim == 0,
        "description": random_model.description,
        "tags": list(random_model.tags),
    }
