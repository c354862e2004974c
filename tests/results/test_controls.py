"""Control variates with left-one-out coefficients, rounds of pairs, and intervals over pairs."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_anneal import MutualInformation
from pyro_anneal.models.entropies import entropy_of, excess
from pyro_anneal.results.controls import leave_one_out_control
from pyro_anneal.results.mutual_information import control_pairs
from pyro_anneal.results.rounds import PairRounds


def test_left_one_out_by_hand():
    """Against a loop of least squares, one per pair."""
    torch.manual_seed(0)
    controls = torch.randn(2, 60, 3)
    values = 1.0 + controls[0] - 2.0 * controls[1] + torch.randn(60, 3).exp()
    found = leave_one_out_control(values, controls)
    for i in (0, 7, 59):
        for j in range(3):
            rest = [k for k in range(60) if k != i]
            v, c = values[rest, j], controls[:, rest, j]
            slope = torch.linalg.solve(c @ c.mT, c @ (v - v.mean()))
            assert found[i, j] == pytest.approx(float(slope @ controls[:, i, j]), abs=1e-4)


def test_the_mean_stays_where_it_was():
    """Skewed values that depend on the control nonlinearly: coefficients fitted to all pairs are
    biased here, left-one-out ones are not.
    """
    torch.manual_seed(1)
    num, size = 40_000, 50
    c = torch.randn(num * size, dtype=torch.double)
    v = (c + c**2).reshape(num, size).mT.contiguous()  # E = 1
    c = c.reshape(num, size).mT.contiguous()
    controlled = (v - leave_one_out_control(v, c.unsqueeze(0))).mean(0)
    assert abs(float(controlled.mean()) - 1.0) < 4.0 * float(controlled.std()) / num**0.5
    slope = (c * (v - v.mean(0))).sum(0) / c.square().sum(0)
    fitted = (v - slope * c).mean(0)
    assert abs(float(fitted.mean()) - 1.0) > 8.0 * float(fitted.std()) / num**0.5


def test_few_pairs_and_values_that_are_not_finite_are_left_alone():
    v, c = torch.randn(60), torch.randn(1, 60)
    assert not leave_one_out_control(v[:49], c[:, :49]).any()
    assert not leave_one_out_control(v, torch.zeros(0, 60)).any()
    assert not leave_one_out_control(v, torch.zeros(1, 60)).any()
    v[3] = -math.inf
    assert not leave_one_out_control(v, c).any()


def test_both_sides_share_the_coefficients():
    torch.manual_seed(2)
    c = torch.randn(1, 50)
    lower, gap = 3.0 * c[0] + 0.1 * torch.randn(50), torch.rand(50)
    pairs = control_pairs(lower, lower + gap, c)
    torch.testing.assert_close(pairs.upper - pairs.lower, gap, atol=1e-5, rtol=1e-5)
    assert float(pairs.measurements["variance_ratio"]) < 0.03
    torch.testing.assert_close(pairs.lower.mean(), lower.mean() + pairs.terms["control"])


@pytest.mark.parametrize(
    "fn",
    [
        dist.Normal(0.3, 2.0),
        dist.Gamma(0.7, 2.0),
        dist.Bernoulli(0.1).expand([2]).to_event(1),
        dist.Categorical(torch.tensor([0.1, 0.2, 0.7])),
        dist.LogNormal(0.5, 0.7),
        dist.HalfCauchy(2.0),
        dist.Dirichlet(torch.tensor([0.5, 1.0, 3.0])),
    ],
    ids=lambda fn: type(fn).__name__,
)
def test_excess_has_mean_zero(fn):
    torch.manual_seed(3)
    value = excess(fn, fn.sample((4000,)))
    assert abs(float(value.mean())) < 4.5 * float(value.std()) / 4000**0.5
    assert float(value.std()) > 0.0


def test_entropies_that_are_unknown_or_the_users_own():
    class Mine(dist.Normal):
        def entropy(self):
            return torch.tensor(1.0)

    for fn in (dist.Poisson(2.0), Mine(0.0, 1.0), Mine(0.0, 1.0).expand([2]).to_event(1)):
        assert entropy_of(fn) is None
    assert entropy_of(dist.Normal(0.0, 1.0).mask(False)) is None
    assert entropy_of(dist.Delta(torch.tensor(1.0))) is None


def test_an_expanded_multinomial_lacks_its_entropy():
    """Torch drops what the entropy needs when a plate expands the distribution."""
    fn = dist.Multinomial(3, torch.full((4,), 0.25))
    assert entropy_of(fn.expand([5])) is None or torch.allclose(
        entropy_of(fn.expand([5])), entropy_of(fn)
    )


def test_rounds():
    rounds = PairRounds(0.1, least=20, most=1000)
    assert rounds.next(5, math.nan) == 20
    assert rounds.next(20, 0.1) == 20  # reached
    assert rounds.next(20, 0.15) == math.ceil(20 * 1.1 * 2.25)
    assert rounds.next(20, math.inf) == 80
    assert rounds.next(900, 1.0) == 1000
    assert rounds.next(1000, 1.0) == 1000  # given up
    assert PairRounds(None).next(20, 5.0) == 20
    result = MutualInformation(method="x", pair_lower=torch.tensor([0.0, 9.0] * 500))
    assert [found.name for found in rounds.missed(result)] == ["target_std_error"]
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="target_std_error must be positive"):
            PairRounds(wrong)


def test_no_interval_by_that_name():
    result = MutualInformation(method="x", pair_lower=torch.tensor([1.0, 2.0]))
    assert not hasattr(result, "interval")
    with pytest.raises(AttributeError, match="normal_interval"):
        result.interval(0.95)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = result.nothing


def test_quantiles_of_few_pairs():
    values = torch.tensor([1.0, 2.0, 6.0])
    low, high = MutualInformation(
        method="x", pair_lower=values, pair_upper=values
    ).normal_interval(0.95)
    margin = 4.302653 * math.sqrt(7.0 / 3.0)  # t of two degrees of freedom; variance 7
    assert low == pytest.approx(3.0 - margin, abs=1e-4)
    assert high == pytest.approx(3.0 + margin, abs=1e-4)
    one = MutualInformation(method="x", pair_lower=values[:1], pair_upper=values[:1])
    assert one.normal_interval() == (-math.inf, math.inf)
    assert "nan" not in repr(one)
    none = MutualInformation(method="x", pair_lower=torch.tensor([-math.inf, 0.0, 1.0]))
    assert none.normal_interval() == (-math.inf, math.inf)
