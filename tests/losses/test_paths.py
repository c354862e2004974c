"""One pass back through the model gives the doubly reparameterized gradient of two passes."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_anneal.losses import IWAE, TVO, paths


class Local:
    """Rows in a plate, each with a vector and a plate of three numbers of its own, and two sites."""

    chained = False

    def model(self, x):
        slope = pyro.param("slope", torch.tensor([0.7, -1.2]))
        with pyro.plate("rows", len(x), dim=-2):
            a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("parts", 3, dim=-1):
                b = pyro.sample("b", dist.StudentT(4.0, 0.0, 1.0))
                pyro.sample("x", dist.Normal((a * slope).sum(-1) + b, 0.5), obs=x)

    def guide(self, x):
        shift = pyro.param("shift", torch.tensor(0.3))
        scale = pyro.param("scale", torch.tensor(0.8), constraint=dist.constraints.positive)
        with pyro.plate("rows", len(x), dim=-2):
            center = x.mean(-1, keepdim=True)
            a = pyro.sample(
                "a", dist.Normal(torch.stack([center, -shift * center], -1), scale).to_event(1)
            )
            with pyro.plate("parts", 3, dim=-1):
                upon = a.sum(-1) if self.chained else 0.0
                pyro.sample("b", dist.Normal(shift * (x - upon), scale))


class Chained(Local):
    chained = True


class Points(Local):
    def guide(self, x):
        shift = pyro.param("shift", torch.tensor(0.3))
        scale = pyro.param("scale", torch.tensor(0.8))
        with pyro.plate("rows", len(x), dim=-2):
            center = x.mean(-1, keepdim=True)
            pyro.sample("a", dist.Delta(torch.stack([center, -shift * center], -1)).to_event(1))
            with pyro.plate("parts", 3, dim=-1):
                pyro.sample("b", dist.Delta(scale * x))


def gradients(loss, problem, x):
    pyro.set_rng_seed(3)
    pyro.clear_param_store()
    with pyro.poutine.trace(param_only=True) as trace:
        value = loss.differentiable_loss(problem.model, problem.guide, x)
    found = {name: site["value"].unconstrained() for name, site in trace.trace.nodes.items()}
    grads = torch.autograd.grad(value, list(found.values()))
    return {"value": value.detach()} | dict(zip(found, grads, strict=True))


@pytest.mark.parametrize("kind", [Local, Chained, Points])
@pytest.mark.parametrize(
    "make", [lambda **o: IWAE(5, "dreg", **o), lambda **o: TVO(5, gradient="dreg", **o)]
)
def test_one_pass_is_two_passes(kind, make, monkeypatch):
    x = torch.tensor([[0.5, -1.0, 2.0], [3.0, 0.1, -0.4]])
    found = []
    whole = paths._in_one_pass
    monkeypatch.setattr(
        paths, "_in_one_pass", lambda *args: (found.append(whole(*args)), found[-1])[1]
    )
    loss = make(vectorize_particles=True, max_plate_nesting=2)
    one = gradients(loss, kind(), x)
    assert (found[0] is None) is kind.chained  # there a gate would weigh a sample twice
    monkeypatch.setattr(paths, "_in_one_pass", lambda *args: None)
    two = gradients(loss, kind(), x)
    assert set(one) == {"value", "slope", "shift", "scale"}
    for name, grad in two.items():
        assert torch.allclose(one[name], grad, rtol=1e-10), name
        assert (grad != 0.0).all()


def test_a_particle_of_hardly_any_weight_has_a_ratio(monkeypatch):
    """Weights that differ by hundreds of nats, far below all rounding."""

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.1)), 1.0))
            pyro.sample("x", dist.Normal(z, 0.05), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("l", torch.tensor(0.2)), 2.0))

    problem = type("Problem", (), {"model": staticmethod(model), "guide": staticmethod(guide)})
    x = torch.tensor([0.3, 40.0])
    loss = IWAE(6, "dreg", vectorize_particles=True, max_plate_nesting=1)
    one = gradients(loss, problem, x)
    monkeypatch.setattr(paths, "_in_one_pass", lambda *args: None)
    for name, grad in gradients(loss, problem, x).items():
        assert grad.isfinite()
        assert torch.allclose(one[name], grad, rtol=1e-10), name


class Impossible(Local):
    """In some rows every particle lies where the model has no density."""

    def model(self, x):
        with pyro.plate("rows", len(x), dim=-2):
            a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.factor("half", torch.where(a.sum(-1) > 0.0, 0.0, -torch.inf))
            with pyro.plate("parts", 3, dim=-1):
                b = pyro.sample("b", dist.StudentT(4.0, 0.0, 1.0))
                pyro.sample("x", dist.Normal(a.sum(-1) + b, 0.5), obs=x)


@pytest.mark.parametrize("make", [IWAE, TVO])
def test_rows_without_weight_pull_at_nothing(make, monkeypatch):
    x = torch.tensor([[-9.0, -8.0, -9.0], [0.1, -0.2, 0.3]])
    options = {"gradient": "dreg", "vectorize_particles": True, "max_plate_nesting": 2}
    one = gradients(make(2, **options), Impossible(), x)
    assert one["value"] == torch.inf
    monkeypatch.setattr(paths, "_in_one_pass", lambda *args: None)
    two = gradients(make(2, **options), Impossible(), x)
    for name, grad in two.items():
        torch.testing.assert_close(one[name], grad)
