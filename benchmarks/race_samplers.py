"""Adapters of two public AIS codes, given as paths, to one interface; none of their code is here.

``bdmc`` is github.com/lxuechen/BDMC; ``ami`` is the AIS core of github.com/huangsicong/ais_mi_estimation.
Both anneal rows of a decoder from the prior with step sizes adapted on the way, on a linear schedule
or, where ``sigmoid`` is set, on a sigmoidal one.
"""

import contextlib
import functools
import importlib
import importlib.machinery
import io
import math
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import torch


def schedule_of(num_steps, sigmoid, forward):
    """Betas from 0 to 1, or from 1 to 0: linear, or the logistic curve on ``[-sigmoid, sigmoid]``."""
    betas = torch.linspace(0.0, 1.0, num_steps + 1)
    if sigmoid is not None:
        curve = torch.sigmoid(sigmoid * (2.0 * betas - 1.0))
        betas = (curve - curve[0]) / (curve[-1] - curve[0])
    return betas if forward else betas.flip(0)


def gaussian_log_likelihood(mean, data):
    return -0.5 * ((data - mean).square() + math.log(2.0 * math.pi)).sum(1)


@contextlib.contextmanager
def _quietly():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _import(name):
    """Imports a module, with stand-ins for what it imports and the race does not need."""
    while True:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name.startswith("codebase"):
                raise
            sys.modules[error.name] = mock.MagicMock()
            sys.modules[error.name].__spec__ = importlib.machinery.ModuleSpec(error.name, None)


class Bdmc:
    """Runs lxuechen/BDMC on a decoder with unit Gaussian noise."""

    sigmoid = None

    def __init__(self, path):
        sys.path.insert(0, str(path))
        self.ais, self.hmc, self.utils = (
            importlib.import_module(n) for n in ("ais", "hmc", "utils")
        )
        self.trajectory = self.hmc.hmc_trajectory
        self.utils.log_bernoulli = gaussian_log_likelihood  # read at every call

    def run(self, decode, latents, data, *, num_steps, num_leapfrog, num_chains, forward):
        """Returns bounds on log p(x), [rows]: lower if forward, else upper."""
        self.hmc.hmc_trajectory = functools.partial(self.trajectory, L=num_leapfrog)
        model = types.SimpleNamespace(decode=decode, latent_dim=latents.shape[1])
        schedule = schedule_of(num_steps, self.sigmoid, forward)
        with _quietly():
            (bounds,) = self.ais.ais_trajectory(
                model, iter([(data, latents)]), forward, schedule, n_sample=num_chains,
                device=torch.device("cpu"),
            )  # fmt: skip
        return bounds.detach()


class Ami:
    """Runs the AIS core of ais_mi_estimation on a decoder with unit Gaussian noise."""

    sigmoid = None

    def __init__(self, path):
        for name in ("codebase", "codebase.algorithms", "codebase.utils"):
            package = types.ModuleType(name)  # spares the imports of its __init__ files
            package.__path__ = [str(Path(path, *name.split(".")))]
            sys.modules[name] = package
        self.ais = _import("codebase.algorithms.ais")
        self.folder = tempfile.mkdtemp()

    def run(self, decode, latents, data, *, num_steps, num_leapfrog, num_chains, forward):
        rows, dim = latents.shape
        total = rows * num_chains
        space = types.SimpleNamespace
        task = space(
            target_dist="joint_xz", num_total_chains=total, n_chains=num_chains, batch_size=rows,
            leap_steps=num_leapfrog, acceptance_prob=0.65, prior_dist=None, n_batch=1,
        )  # fmt: skip
        messenger = space(
            fix_data_simulation=False, save_post_images=False, loadable_dir=self.folder,
            mode="", beta=1.0,
        )  # fmt: skip
        hparams = space(
            tvo=False, messenger=messenger, device=torch.device("cpu"), dtype=torch.float32,
            dataset=space(name="given", input_vector_length=data.shape[1]), random_seed=0,
            step_sizes_target=None, save_step_sizes=False, ais_gc=10**9, rd=task, hparam_set="race",
            model_train=space(z_size=dim), monitor_hmc=False, mixed_precision=False,
        )  # fmt: skip
        log_variance = torch.zeros(())
        model = space(decode=lambda z: (decode(z), log_variance))
        schedule = schedule_of(num_steps, self.sigmoid, forward)
        core = self.ais.AIS_core("joint_xz", None, model, task, hparams, None)
        hparams.messenger.save_post_images = False
        self.ais.save_comparison = lambda *args, **kwargs: None
        self.ais.note_taking = lambda *args, **kwargs: None
        self.ais.set_random_seed = lambda seed: None  # it would start all runs alike
        with _quietly():
            result = self.ais.run_ais_chain_simplified(
                model, [(data, latents)], "forward" if forward else "backward", schedule, hparams,
                task, step_sizes_dir="", anneal_ops=core,
            )  # fmt: skip
        return result[0].detach()
