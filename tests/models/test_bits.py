"""Log densities of bits in fewer passes agree with torch's, with their first and second derivatives."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_anneal.models.bits import log_prob_of_bits, score_parts_of_bits


def run(model):
    trace = poutine.trace(model).get_trace()
    log_prob_of_bits(trace)
    return trace


def net(logits, bits, ndims=1, **scale):
    def model():
        with pyro.plate("rows", logits.shape[0]), poutine.scale(scale=scale.get("scale", 1.0)):
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(ndims), obs=bits)

    return model


@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_values_and_derivatives_are_those_of_torch(shape):
    logits = (8.0 * torch.randn(4, *shape)).requires_grad_()
    bits = (torch.rand(4, *shape) < 0.3).double()
    site = run(net(logits, bits, len(shape), scale=2.5)).nodes["x"]
    plain = dist.Bernoulli(logits=logits).to_event(len(shape)).log_prob(bits)
    assert torch.allclose(site["unscaled_log_prob"], plain, rtol=1e-13)
    assert torch.allclose(site["log_prob"], 2.5 * plain, rtol=1e-13)
    assert torch.allclose(site["log_prob_sum"], 2.5 * plain.sum(), rtol=1e-13)
    weights = torch.randn(4)
    ours, theirs = (
        torch.autograd.grad((weights * v).sum(), logits, create_graph=True)[0]
        for v in (site["unscaled_log_prob"], plain)
    )
    assert torch.allclose(ours, theirs, rtol=1e-12)
    again, expected = (torch.autograd.grad(g.square().sum(), logits)[0] for g in (ours, theirs))
    assert torch.allclose(again, expected, rtol=1e-10)
    (first,) = torch.autograd.grad(
        (weights * run(net(logits, bits, len(shape))).nodes["x"]["log_prob"]).sum(), logits
    )
    assert torch.allclose(first, theirs, rtol=1e-12)


def test_saturated_logits_are_exact():
    logits = torch.tensor([[-800.0, 60.0, -45.0, math.inf], [800.0, -60.0, 45.0, -math.inf]])
    bits = torch.tensor([0.0, 1.0, 0.0, 1.0])
    found = run(net(logits, bits)).nodes["x"]["log_prob"]
    assert found[0].item() == pytest.approx(-math.exp(-60.0) - math.exp(-45.0), rel=1e-12)
    assert found[1].item() == -math.inf
    large = run(net(logits[1:, :3], bits[:3])).nodes["x"]["log_prob"]
    assert large.item() == pytest.approx(-905.0, rel=1e-13)


def test_score_parts_are_those_of_pyro():
    logits = torch.randn(4, 6)
    mask = torch.tensor([True, False, True, True])
    model = poutine.mask(net(logits, (torch.rand(4, 6) < 0.4).double(), scale=1.5), mask=mask)
    ours, theirs = poutine.trace(model).get_trace(), poutine.trace(model).get_trace()
    score_parts_of_bits(ours)
    assert "score_parts" in ours.nodes["x"]
    theirs.compute_score_parts()
    for found, expected in zip(
        *(t.nodes["x"]["score_parts"] for t in (ours, theirs)), strict=True
    ):
        assert torch.allclose(torch.as_tensor(found), torch.as_tensor(expected), rtol=1e-13)


@pytest.mark.parametrize(
    "fn",
    [
        dist.Bernoulli(0.3 * torch.ones(3, 4)).to_event(1),  # by probabilities
        dist.Bernoulli(logits=torch.ones(3, 4), validate_args=False).to_event(1),  # maybe grey
        dist.Bernoulli(logits=torch.ones(3, 4)).to_event(1).mask(torch.tensor(True)),
        dist.ContinuousBernoulli(logits=torch.ones(3, 4)).to_event(1),
    ],
)
def test_others_are_left_to_pyro(fn):
    assert "log_prob" not in run(lambda: pyro.sample("x", fn, obs=torch.ones(3, 4))).nodes["x"]


def test_grey_values_keep_pyros_error():
    model = net(torch.zeros(3, 4), torch.full((3, 4), 0.5))
    trace = run(model)
    with pytest.raises(ValueError, match="Error while computing log_prob at site 'x'"):
        trace.compute_log_prob()
