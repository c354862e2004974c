"""The entries of the gallery: how each model of Pyro's examples and tutorials is called."""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import autoguide
from torch import nn

from pyro_anneal import RandomWalk

ENTRIES: dict[str, Callable[[Any], "Entry"]] = {}


@dataclass
class Entry:
    """A model, its guide, and arguments of reduced size."""

    source: str
    model: Any
    guide: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    starts: tuple[Any, ...] = ("auto",)  # beside the own guide
    remedy: dict[str, Any] = field(default_factory=dict)  # options that a refusal asks for

    @property
    def guides(self) -> list[Any]:
        """Guides to run from."""
        return [*([] if self.guide is None else [self.guide]), *self.starts]


def entry(name: str) -> Callable[[Any], Any]:
    """Registers an entry."""

    def register(function: Any) -> Any:
        ENTRIES[name] = function
        return function

    return register


def _namespace(**values: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(**values)


SCHOOLS = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]
ERRORS = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]


@entry("eight_schools/mcmc")
def _(s):
    m = s.module("eight_schools/mcmc.py")
    y, sigma = torch.tensor(SCHOOLS), torch.tensor(ERRORS)
    return Entry("examples/eight_schools/mcmc.py", m.conditioned_model, None, (m.model, sigma, y))


@entry("eight_schools/svi")
def _(s):
    m = s.module("eight_schools/svi.py")
    data = torch.stack([torch.tensor(SCHOOLS), torch.tensor(ERRORS)], 1)
    return Entry("examples/eight_schools/svi.py", m.model, m.guide, (data,))


def _baseball(name):
    def make(s):
        m = s.module("baseball.py")
        at_bats, hits = torch.full((6,), 45.0), torch.tensor([18.0, 17.0, 16.0, 15.0, 14.0, 7.0])
        model = getattr(m, name)
        guide = autoguide.AutoNormal(model)
        return Entry("examples/baseball.py", model, guide, (at_bats, hits))

    return make


for _name in ("fully_pooled", "not_pooled", "partially_pooled", "partially_pooled_with_logit"):
    ENTRIES[f"baseball/{_name}"] = _baseball(_name)


@entry("inclined_plane")
def _(s):
    m = s.module("inclined_plane.py")
    source, inputs = "examples/inclined_plane.py", (m.observed_data[:5],)
    remedy = {"kernel": RandomWalk(), "num_chains": 16}
    return Entry(source, m.model, None, inputs, starts=(None,), remedy=remedy)


@entry("lkj")
def _(s):
    m = s.module("lkj.py")
    y = torch.randn(20, 3)
    return Entry("examples/lkj.py", m.model, autoguide.AutoNormal(m.model), (y,))


@entry("lda")
def _(s):
    m = s.module("lda.py")
    args = _namespace(
        num_topics=2, num_words=6, num_docs=4, num_words_per_doc=5, layer_sizes="4-4"
    )
    data = m.model(args=args)[2]
    guide = functools.partial(m.parametrized_guide, m.make_predictor(args))
    return Entry("examples/lda.py", m.model, guide, (data, args))


@entry("toy_mixture_model_discrete_enumeration")
def _(s):
    m = s.module("toy_mixture_model_discrete_enumeration.py")
    prior = {"A": torch.tensor([1.0, 10.0]), "B": torch.tensor([[10.0, 1.0], [1.0, 10.0]])}
    prior["C"] = prior["B"]
    obs = {"A": torch.tensor([1.0, 0.0, 1.0, 1.0]), "C": torch.tensor([0.0, 1.0, 0.0, 1.0])}
    return Entry(
        "examples/toy_mixture_model_discrete_enumeration.py", m.model, m.guide, (prior, obs, 4)
    )


@entry("sparse_regression")
def _(s):
    m = s.module("sparse_regression.py")
    hypers = {"expected_sparsity": 2.0, "alpha1": 3.0, "beta1": 1.0, "alpha2": 3.0, "beta2": 1.0}
    hypers = {k: torch.tensor(v) for k, v in hypers.items()}
    hypers |= {"alpha3": torch.tensor(1.0), "c": torch.tensor(1.0)}
    x = torch.randn(12, 4)
    y = x[:, 0] - x[:, 1] * x[:, 2]
    guide = autoguide.AutoNormal(m.model)
    return Entry("examples/sparse_regression.py", m.model, guide, (x, y, hypers))


@entry("sparse_gamma_def/easy guide")
def _(s):
    m = s.module("sparse_gamma_def.py")
    d = m.SparseGammaDEF()
    d.top_width, d.mid_width, d.bottom_width, d.image_size = 3, 3, 2, 6
    guide = m.MyEasyGuide(d.model)
    x = torch.randint(0, 5, (3, 6)).float()
    return Entry("examples/sparse_gamma_def.py", d.model, guide, (x,), starts=(None,))


@entry("sparse_gamma_def/custom guide")
def _(s):
    m = s.module("sparse_gamma_def.py")
    d = m.SparseGammaDEF()
    d.top_width, d.mid_width, d.bottom_width, d.image_size = 3, 3, 2, 6
    x = torch.randint(0, 5, (3, 6)).float()
    return Entry("examples/sparse_gamma_def.py", d.model, d.guide, (x,), starts=())


def _hmm(number):
    def make(s):
        m = s.module("hmm.py")
        args = _namespace(
            hidden_dim=4, nn_dim=4, nn_channels=2, jit=False, raftery_parameterization=False
        )
        sequences = torch.bernoulli(torch.full((2, 4, 5), 0.4))
        lengths = torch.tensor([4, 3])
        model = getattr(m, f"model_{number}")
        guide = autoguide.AutoNormal(
            pyro.poutine.block(model, expose_fn=lambda site: site["name"].startswith("probs_"))
        )
        inputs = (sequences, lengths, args)
        starts = () if number == 6 else ("auto",)  # which has parameters, and no latents
        return Entry("examples/hmm.py", model, guide, inputs, starts=starts)

    return make


for _number in range(8):
    ENTRIES[f"hmm/model_{_number}"] = _hmm(_number)


def _cjs(number):
    def make(s):
        m = s.module("capture_recapture/cjs.py")
        history = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
        sex = torch.tensor([0.0, 1.0, 1.0])
        model = getattr(m, f"model_{number}")
        exposed = ["phi", "rho", "phi_logit_mean", "phi_sigma"]
        guide = autoguide.AutoDiagonalNormal(
            pyro.poutine.block(
                model,
                expose_fn=lambda site: (
                    site["name"][:3] in ("phi", "rho") or site["name"] in exposed
                ),
            )
        )
        return Entry("examples/capture_recapture/cjs.py", model, guide, (history, sex))

    return make


for _number in range(1, 6):
    ENTRIES[f"capture_recapture/model_{_number}"] = _cjs(_number)


@entry("vae")
def _(s):
    m = s.module("vae/vae.py")
    vae = m.VAE(z_dim=3, hidden_dim=8)
    x = torch.rand(2, 784)
    return Entry("examples/vae/vae.py", vae.model, vae.guide, (x,), starts=(None,))


@entry("ss_vae_M2/unsupervised")
def _(s):
    m = s.module("vae/ss_vae_M2.py")
    vae = m.SSVAE(output_size=3, input_size=8, z_dim=2, hidden_layers=[5], config_enum="parallel")
    xs = torch.bernoulli(torch.full((2, 8), 0.5))
    model, guide = vae.model, pyro.infer.config_enumerate(vae.guide, "parallel", expand=True)
    return Entry("examples/vae/ss_vae_M2.py", model, guide, (xs,), starts=())


@entry("ss_vae_M2/supervised")
def _(s):
    m = s.module("vae/ss_vae_M2.py")
    vae = m.SSVAE(output_size=3, input_size=8, z_dim=2, hidden_layers=[5], config_enum="parallel")
    xs = torch.bernoulli(torch.full((2, 8), 0.5))
    return Entry("examples/vae/ss_vae_M2.py", vae.model, vae.guide, (xs, torch.eye(3)[:2]))


@entry("cvae")
def _(s):
    m, b = s.module("cvae/cvae.py"), s.module("cvae/baseline.py")
    net = m.CVAE(3, 8, 8, b.BaselineNet(8, 8))
    xs = torch.rand(2, 28, 28)
    xs[:, 14:] = -1.0  # the half to fill in
    ys = torch.bernoulli(torch.full((2, 28, 28), 0.5))
    return Entry("examples/cvae/cvae.py", net.model, net.guide, (xs, ys), starts=(None,))


@entry("dmm")
def _(s):
    m = s.module("dmm.py")
    net = m.DMM(input_dim=5, z_dim=2, emission_dim=4, transition_dim=4, rnn_dim=6)
    x = torch.bernoulli(torch.full((2, 3, 5), 0.5))
    lengths = torch.tensor([3, 2])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    packed = nn.utils.rnn.pack_padded_sequence(x.flip(1), lengths, batch_first=True)
    return Entry(
        "examples/dmm.py", net.model, net.guide, (x, packed, mask, lengths), starts=(None,)
    )


@entry("dmm/iaf")
def _(s):
    m = s.module("dmm.py")
    net = m.DMM(
        input_dim=5, z_dim=2, emission_dim=4, transition_dim=4, rnn_dim=6, num_iafs=1, iaf_dim=4
    )
    x = torch.bernoulli(torch.full((2, 3, 5), 0.5))
    lengths, mask = torch.tensor([3, 3]), torch.ones(2, 3)
    packed = nn.utils.rnn.pack_padded_sequence(x.flip(1), lengths, batch_first=True)
    return Entry("examples/dmm.py", net.model, net.guide, (x, packed, mask, lengths), starts=())


@entry("air")
def _(s):
    m = s.module("air/air.py")
    net = m.AIR(
        num_steps=2, x_size=6, window_size=4, z_what_size=2, rnn_hidden_size=8, use_baselines=False
    )
    x = torch.rand(2, 6, 6)
    inputs = {"z_pres_prior_p": lambda t: torch.tensor(0.5)}
    return Entry("examples/air/air.py", net.model, net.guide, (x, 2), inputs, starts=(None,))


@entry("scanvi")
def _(s):
    m = s.module("scanvi/scanvi.py")
    net = m.SCANVI(num_genes=6, num_labels=2, l_loc=2.0, l_scale=1.0, latent_dim=2).eval()
    x = torch.randint(0, 6, (3, 6)).float() + 1.0
    y = torch.eye(2)[[0, 1, 0]]
    return Entry("examples/scanvi/scanvi.py", net.model, net.guide, (x, y), starts=())


@entry("neutra")
def _(s):
    m = s.module("neutra.py")
    guide = autoguide.AutoDiagonalNormal(m.model)
    inputs = (torch.tensor(1.15), torch.tensor(1.0))
    return Entry("examples/neutra.py", m.model, guide, inputs, starts=(None,))


@entry("svi_torch")
def _(s):
    m = s.module("svi_torch.py")
    model = m.Model(12)
    x = torch.randn(12)
    inputs = (x, 0.5 * x + 0.3 * torch.randn(12))
    return Entry("examples/svi_torch.py", model, autoguide.AutoNormal(model), inputs)


def _sir(name, starts):
    def make(s):
        m = s.module("sir_hmc.py")
        args = m.args = _namespace(population=10, recovery_time=3.0)  # a global of the script
        data = torch.tensor([1.0, 2.0, 1.0])
        remedy = {"num_chains": 256} if name == "discrete_model" else {}
        source, inputs = "examples/sir_hmc.py", (args, data)
        return Entry(source, getattr(m, name), None, inputs, starts=starts, remedy=remedy)

    return make


for _name, _starts in (
    ("discrete_model", (None,)),
    ("reparameterized_discrete_model", (None,)),
    ("continuous_model", ("auto",)),
    ("vectorized_model", ("auto",)),
):
    ENTRIES[f"sir_hmc/{_name}"] = _sir(_name, _starts)


@entry("smcfilter")
def _(s):
    m = s.module("smcfilter.py")

    def model(ys):
        state, inner = {}, m.SimpleHarmonicModel(1.0, 1.0)
        inner.init(state, initial=torch.tensor([1.0, 0.0]))
        for y in ys:
            inner.step(state, y)

    return Entry("examples/smcfilter.py", model, None, (torch.tensor([0.5, -0.3, 0.8]),))


@entry("mixed_hmm")
def _(s):
    m, data = s.module("mixed_hmm/model.py"), s.module("mixed_hmm/seal_data.py")
    del data
    config = {
        "MISSING": 1e-6,
        "sizes": {"state": 2, "random": 2, "group": 2, "individual": 2, "timesteps": 3},
        "group": {"random": "continuous", "fixed": None},
        "individual": {"random": None, "fixed": None, "mask": torch.ones(2, 2).bool()},
        "timestep": {"random": None, "fixed": None, "mask": torch.ones(2, 2, 3).bool()},
        "observations": {
            "step": torch.rand(2, 2, 3) + 0.1,
            "angle": torch.rand(2, 2, 3),
            "omega": torch.rand(2, 2, 3) * 0.8 + 0.1,
        },
    }
    model = functools.partial(m.model_generic, config)
    guide = functools.partial(m.guide_generic, config)
    return Entry("examples/mixed_hmm/model.py", model, guide, (), starts=())


@entry("autoname/tree_data")
def _(s):
    m = s.module("contrib/autoname/tree_data.py")
    one = torch.tensor(1.0)
    data = {"foo": one, "bar": [0 * one, 1 * one], "baz": {"noun": 4 * one, "verb": 2 * one}}
    return Entry("examples/contrib/autoname/tree_data.py", m.model, m.guide, (data,))


@entry("autoname/mixture")
def _(s):
    m = s.module("contrib/autoname/mixture.py")
    data = torch.tensor([0.0, 1.0, 20.0])
    return Entry(
        "examples/contrib/autoname/mixture.py", m.model, m.guide, (data, 2), starts=(None,)
    )


@entry("autoname/scoping_mixture")
def _(s):
    m = s.module("contrib/autoname/scoping_mixture.py")
    data, guide = torch.tensor([0.0, 1.0, 20.0]), pyro.infer.config_enumerate(m.guide)
    source = "examples/contrib/autoname/scoping_mixture.py"
    return Entry(source, m.model, guide, (2, data), starts=(None,))


@entry("cevae")
def _(s):
    from pyro.contrib.cevae import CEVAE

    del s
    net = CEVAE(feature_dim=3, latent_dim=2, hidden_dim=5, num_layers=2)
    x, t, y = torch.randn(4, 3), torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.randn(4)
    source = "examples/contrib/cevae/synthetic.py"
    net.whiten = lambda x: x
    return Entry(source, net.model, net.guide, (x, t, (y > 0).float()), starts=())


@entry("epidemiology/sir")
def _(s):
    from pyro.contrib.epidemiology.models import SimpleSIRModel

    del s
    torch.set_default_dtype(torch.float64)  # which the model asks for
    sir = SimpleSIRModel(20, 3.0, torch.tensor([1.0, 2.0, 1.0]))
    model = sir._relaxed_model  # what fit_svi fits
    guide = autoguide.AutoNormal(model)
    return Entry("examples/contrib/epidemiology/sir.py", model, guide)


@entry("mue/ProfileHMM")
def _(s):
    from pyro.contrib.mue.models import ProfileHMM

    del s
    net = ProfileHMM(3, 3, 2.0, 2.0)
    x = torch.eye(3)[torch.tensor([[0, 1, 2], [0, 2, 2]])]
    source = "examples/contrib/mue/ProfileHMM.py"
    return Entry(source, net.model, net.guide, (x, torch.tensor(1.0)))


@entry("oed/ab_test")
def _(s):
    from pyro.contrib.oed.glmm import known_covariance_linear_model

    del s
    prior = (torch.tensor([0.0, 1.0]), torch.tensor([2.0, 1.0]))
    model = known_covariance_linear_model(*prior, torch.tensor(1.0))
    design = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    conditioned = pyro.condition(model, {"y": torch.tensor([0.3, -1.0, 2.0])})
    return Entry("examples/contrib/oed/ab_test.py", conditioned, None, (design,))


@entry("forecast/bart")
def _(s):
    m = s.module("contrib/forecast/bart.py")
    torch.manual_seed(3)
    data = torch.randn(24 * 7 + 5, 2)
    covariates = torch.zeros(len(data), 0)
    return Entry("examples/contrib/forecast/bart.py", m.Model(), None, (data, covariates))


@entry("gp/sparse")
def _(s):
    from pyro.contrib import gp

    del s
    x = torch.linspace(0, 1, 6)
    y = torch.sin(3 * x)
    kernel = gp.kernels.RBF(1)
    kernel.variance = pyro.nn.PyroSample(dist.LogNormal(0.0, 1.0))
    model = gp.models.GPRegression(x, y, kernel)
    kernel.autoguide("variance", dist.Normal)
    return Entry("tutorial/source/gp.ipynb", model.model, model.guide, ())


@entry("gp/variational")
def _(s):
    from pyro.contrib import gp

    del s
    x = torch.linspace(0, 1, 6)
    y = torch.sin(3 * x)
    likelihood = gp.likelihoods.Gaussian(variance=torch.tensor(0.1))
    model = gp.models.VariationalGP(x, y, gp.kernels.RBF(1), likelihood)
    return Entry("examples/contrib/gp/sv-dkl.py (VariationalGP)", model.model, model.guide, ())


@entry("tutorial/bayesian_regression_ii")
def _(s):
    m = s.cells("bayesian_regression_ii", 7, constraints=dist.constraints)
    x, r = torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.tensor([0.3, 1.1, 2.0, 0.7])
    return Entry("tutorial/source/bayesian_regression_ii.ipynb", m.model, m.guide, (x, r, 8.0 - r))


@entry("tutorial/svi_part_i")
def _(s):
    m = s.cells("svi_part_i", 3, constraints=dist.constraints)
    data = [torch.tensor(1.0)] * 6 + [torch.tensor(0.0)] * 4
    return Entry("tutorial/source/svi_part_i.ipynb", m.model, m.guide, (data,))


@entry("tutorial/easyguide")
def _(s):
    from pyro.contrib.easyguide import easy_guide

    names = {"easy_guide": easy_guide, "constraints": dist.constraints, "rank": 2, "full_size": 5}
    m = s.cells("easyguide", 4, 13, **names)
    batch = torch.bernoulli(torch.full((3, 5), 0.5))
    inputs = (batch, torch.arange(5), 5)
    return Entry("tutorial/source/easyguide.ipynb", m.model, m.guide, inputs)


@entry("tutorial/gmm")
def _(s):
    names = {
        "constraints": dist.constraints,
        "K": 2,
        "config_enumerate": pyro.infer.config_enumerate,
    }
    m = s.cells("gmm", 5, **names)
    data = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])
    guide = autoguide.AutoNormal(pyro.poutine.block(m.model, expose=["weights", "locs", "scale"]))
    return Entry("tutorial/source/gmm.ipynb", m.model, guide, (data,))


_FAMILIES = ("Beta", "Uniform", "Gamma", "Poisson", "Categorical", "Dirichlet")


@entry("tutorial/dirichlet_process_mixture")
def _(s):
    from torch.nn import functional

    names = {n: getattr(dist, n) for n in _FAMILIES}
    names |= {"MultivariateNormal": dist.MultivariateNormal, "constraints": dist.constraints}
    names |= {"F": functional, "T": 3, "N": 4, "alpha": 0.1}
    names["mix_weights"] = lambda beta: (
        functional.pad(beta, (0, 1), value=1)
        * functional.pad((1 - beta).cumprod(-1), (1, 0), value=1)
    )
    m = s.cells("dirichlet_process_mixture", 7, 9, **names)
    data = torch.randn(4, 2)
    source = "tutorial/source/dirichlet_process_mixture.ipynb"
    return Entry(source, m.model, m.guide, (data,), starts=(None,))


@entry("tutorial/mle_map")
def _(s):
    m = s.cells("mle_map", 4, constraints=dist.constraints)
    model, data = m.original_model, torch.tensor([1.0] * 6 + [0.0] * 4)
    source = "tutorial/source/mle_map.ipynb"
    return Entry(source, model, autoguide.AutoNormal(model), (data,))


@entry("tutorial/boosting_bbvi")
def _(s):
    m = s.cells("boosting_bbvi", 6, 8, constraints=dist.constraints, n=4)
    data, guide = torch.randn(4), functools.partial(m.guide, index=0)
    return Entry("tutorial/source/boosting_bbvi.ipynb", m.model, guide, (data,))


@entry("tutorial/intro_long")
def _(s):
    x, r = torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.tensor([0.3, 1.1, 2.0, 0.7])
    names = {"is_cont_africa": x, "ruggedness": r, "log_gdp": 8.0 - r}
    m = s.cells("intro_long", 34, 42, constraints=dist.constraints, **names)
    source = "tutorial/source/intro_long.ipynb"
    return Entry(source, m.model, m.custom_guide, tuple(names.values()))


@entry("tutorial/enumeration/hmm")
def _(s):
    names = {"AutoNormal": autoguide.AutoNormal, "TraceEnum_ELBO": pyro.infer.TraceEnum_ELBO}
    m = s.cells("enumeration", 22, 24, 27, **names)
    data = torch.tensor([0, 1, 1, 2, 0])
    inputs = {"data_dim": 3, "hidden_dim": 2}
    pyro.clear_param_store()  # the notebook's guide was used with other sizes
    guide = autoguide.AutoNormal(
        pyro.poutine.block(m.hmm_model, expose=["transition", "emission"])
    )
    return Entry("tutorial/source/enumeration.ipynb", m.hmm_model, guide, (data,), inputs)


@entry("tutorial/logistic-growth")
def _(s):
    m = s.cells("logistic-growth", 17, dataset={"time_step_days": 14.0})
    counts = torch.tensor([[2.0, 3.0, 1.0], [4.0, 1.0, 3.0], [1.0, 5.0, 4.0]])
    model = m.basic_model
    source = "tutorial/source/logistic-growth.ipynb"
    return Entry(source, model, autoguide.AutoNormal(model), (counts,))


@entry("tutorial/svi_flow_guide")
def _(s):
    names = {"Tensor": torch.Tensor, "constraints": dist.constraints, "nn": nn}
    m = s.cells("svi_flow_guide", 3, **names)
    x = 0.3 * torch.randn(5, 3, 2)
    guide = autoguide.AutoMultivariateNormal(m.model)  # in place of a flow of the package zuko
    return Entry("tutorial/source/svi_flow_guide.ipynb", m.model, guide, (x,))


@entry("tutorial/working_memory")
def _(s):
    m = s.cells("working_memory", 2, 6)
    model = pyro.condition(m.model, {"y": torch.tensor([1.0, 1.0, 0.0])})
    l = torch.tensor([5.0, 7.0, 9.0])
    return Entry("tutorial/source/working_memory.ipynb", model, m.guide, (l,))


@entry("tutorial/stable")
def _(s):
    from pyro.infer import reparam

    names = {"StableReparam": reparam.StableReparam, "poutine": pyro.poutine}
    names["DiscreteCosineReparam"] = reparam.DiscreteCosineReparam
    m = s.cells("stable", 14, 16, **names)
    guide = autoguide.AutoDiagonalNormal(m.reparam_model)
    return Entry("tutorial/source/stable.ipynb", m.reparam_model, guide, (0.01 * torch.randn(5),))


@entry("tutorial/stable/log_prob")
def _(s):
    from pyro.infer import reparam

    m = s.cells("stable", 14)
    model = pyro.poutine.reparam(m.model, {"v": reparam.DiscreteCosineReparam()})
    guide = autoguide.AutoDiagonalNormal(model)
    return Entry("tutorial/source/stable.ipynb", model, guide, (0.01 * torch.randn(5),))
